"""The script behind statistics.py, which says how to call it."""

from __future__ import annotations

import dataclasses
import pathlib
import time
from typing import Annotated

import cli
import jax
import measures
import tyro

from ddim_jax import data
from ddim_jax.metrics.statistics import FeatureName, compute_statistics, save_statistics


@dataclasses.dataclass(frozen=True)
class StatisticsConfig:
    """Mean and covariance of the features of every image of a data set, each exactly once."""

    data: Annotated[str, tyro.conf.Positional]
    """digits, a TFDS name, a folder of images, or a .npz file of uint8 images."""
    out: str
    """The .npz file to write; pytorch-fid and TTUR read it too."""
    features: FeatureName = "inception"
    """The network behind the features: FID, fd_classifier or fd_pixels."""
    feature_weights: str | None = None
    """Its weights; if not given classifier.safetensors beside `out`, or Inception's published."""
    split: str = "train"
    """Which part of the data; TFDS slices such as train[:1000] work."""
    data_dir: str | None = None
    """Where TFDS sets stand; its own default if not given."""
    image_size: int | None = None
    """Resize and crop images to this side."""
    batch_size: int = 256
    """Images at once."""


def main(config: StatisticsConfig) -> None:
    """Compute the statistics and write them, with their recipe inside."""
    cli.check_at_least(config, batch_size=1)
    network = measures.open_network(config.features, config.feature_weights, config.out)
    source = data.load_images(
        config.data, split=config.split, data_dir=config.data_dir, image_size=config.image_size
    )
    recipe = {
        "name": source.name,
        "split": config.split,
        "image_shape": list(source.image_shape),
        "resized_to": config.image_size,
    }
    started = time.monotonic()
    batch_size = measures.whole_batch_size(config.batch_size, len(source))
    statistics = compute_statistics(
        measures.on_all_devices(network),
        (batch["image"] for batch in data.sequential_batches(source, batch_size)),
        num_samples=len(source),
        data=recipe,
    )
    seconds = time.monotonic() - started
    pathlib.Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    save_statistics(config.out, statistics)
    print(
        f"{config.features} statistics {statistics.content_hash[:12]} of {statistics.num_samples} "
        f"images of {source.name} ({config.split}) in {config.out}: {len(statistics.mean)} "
        f"features, network {network.content_hash[:12]}, {seconds:.1f} s on "
        f"{jax.local_device_count()} {jax.default_backend()} device(s)"
    )
