"""Crops that published sets are prepared with, by name."""

from __future__ import annotations

from typing import Any, NamedTuple

import PIL.Image

from ddim_jax.checks import look_up


class Crop(NamedTuple):
    """What is cut out of every image, all of them of one size."""

    name: str
    of: tuple[int, int]
    """Width and height of the images."""
    box: tuple[int, int, int, int]
    """Left, top, right, bottom in them."""
    default_size: int
    """Side of the square that is made of it, unless one is given."""

    def __call__(self, image: PIL.Image.Image, name: str) -> PIL.Image.Image:
        """The part of the image. ValueError, calling it `name`, for one of another size."""
        self.check_size(image.size, name)
        return image.crop(self.box)

    def check_size(self, size: tuple[int, int], name: str) -> None:
        """Raise ValueError unless an image of this width and height is one to be cropped."""
        if size != self.of:
            raise ValueError(
                f"images must be {_by(self.of)} (width x height) for the crop {self.name}; {name} "
                f"is {_by(size)}. Leave crop out for images that are cropped already."
            )

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of what is cut out."""
        left, top, right, bottom = self.box
        return right - left, bottom - top

    def facts(self) -> dict[str, Any]:
        """The crop as a recipe says it."""
        return {"crop": {"name": self.name, "of": list(self.of), "box": list(self.box)}}


CROPS: dict[str, Crop] = {"celeba": Crop("celeba", (178, 218), (25, 57, 153, 185), 64)}
"""celeba: the 128x128 around the face that the paper's code cuts out of aligned CelebA."""


def named_crop(name: str | None) -> Crop | None:
    """The crop of that name; None for None. Raises ValueError for an unknown name."""
    return None if name is None else look_up("crop", name, CROPS)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
