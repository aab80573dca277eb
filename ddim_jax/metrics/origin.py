"""How images came to be, where a feature network sees it: JPEG compression, a crop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

NOT_CROPPED = "none"
OTHER_SHARE = 0.05
"""Shares of compressed images that differ by more are warned of."""


class Origin(NamedTuple):
    """What is known of one side's images; None where nobody knows."""

    lossy: float | None = None
    """Share, in [0, 1], of the images that show what JPEG or the like did to them."""
    crop: str | None = None
    """The name of the crop they were cut by, or NOT_CROPPED."""


def origin_of(facts: Mapping[str, Any], num_images: int | None) -> Origin:
    """What a source's facts, or the recipe of statistics, say of so many images.

    A source that counts its compressed images says its crop too, so that none there is none.
    """
    lossy, crop = facts.get("lossy_files"), facts.get("crop")
    if isinstance(crop, Mapping):
        crop = crop.get("name")
    elif lossy is not None:
        crop = NOT_CROPPED
    share = min(lossy / num_images, 1.0) if isinstance(lossy, int) and num_images else None
    return Origin(share, crop)


def origin_warnings(samples: Origin, real: Origin) -> list[str]:
    """A sentence for each thing in which the two sides' images came to be otherwise.

    A public report has 5.80 for what was 2.50: feature networks see what JPEG does.
    """
    found = []
    if samples.lossy is not None and real.lossy is not None:
        ours, theirs = samples.lossy, real.lossy
        if abs(ours - theirs) > OTHER_SHARE:
            advice = (
                "Write samples as PNG."
                if ours > theirs
                else "Where there are lossless originals, make the statistics of those."
            )
            found.append(
                f"{_percent(theirs)} of the statistics' images and {_percent(ours)} of the samples "
                "were JPEG files or the like, at about their size: the distance counts the "
                f"compression. {advice}"
            )
    if samples.crop and real.crop and samples.crop != real.crop:
        found.append(
            f"The statistics are of images {_cropped(real.crop)}, and what is measured comes from "
            f"images {_cropped(samples.crop)}: unless they were cropped before, the distance "
            "counts the difference. Make the statistics anew with the same --crop."
        )
    return found


def _cropped(crop: str) -> str:
    return "that nothing cropped" if crop == NOT_CROPPED else f"cropped as {crop}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"
