"""Frechet distance of a folder or .npz of images against statistics.

python experiments/fid.py out/samples/images --stats stats/cifar10.npz
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import cli
import measures
import tyro

from ddim_jax import data
from ddim_jax.metrics.statistics import gather_moments


@dataclasses.dataclass(frozen=True)
class FidConfig:
    """One set of images, one distance; called FID only with Inception features."""

    images: Annotated[str, tyro.conf.Positional]
    """A folder of images or a .npz of uint8 (N, H, W, C); the name of a data set works too."""
    stats: str
    """What statistics.py wrote, or the .npz that pytorch-fid and TTUR publish."""
    feature_weights: str | None = None
    """The network's weights; if not given classifier.safetensors beside the statistics, or
    Inception's published ones."""
    image_size: int | None = None
    """Resize and crop images to this side; without it all must have one size."""
    split: str = "train"
    """Which part of a data set."""
    data_dir: str | None = None
    """Where TFDS sets stand; its own default if not given."""
    batch_size: int = 256
    """Images at once."""


def main(config: FidConfig) -> None:
    """Print the distance with its protocol."""
    source = data.load_images(
        config.images, split=config.split, data_dir=config.data_dir, image_size=config.image_size
    )
    (measure,) = measures.open_measures([config.stats], config.feature_weights, source.image_shape)
    batch_size = measures.whole_batch_size(config.batch_size, len(source))
    moments = gather_moments(
        measures.on_all_devices(measure.network),
        (batch["image"] for batch in data.sequential_batches(source, batch_size)),
    )
    print(
        f"{measure.name} {measure.distance(moments):.6g}: N = {len(source)} images of "
        f"{config.images}, statistics {measure.statistics.content_hash[:12]}, network "
        f"{measure.network.content_hash[:12]}"
    )
    if warning := measure.warning(len(source)):
        print(f"warning: {warning}")


if __name__ == "__main__":
    cli.run(main, FidConfig)
