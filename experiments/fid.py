"""Distance of a folder or .npz of images from statistics: FID, and other metrics by name.

python experiments/fid.py out/samples/images --stats stats/cifar10.npz
python experiments/fid.py out/samples/images --stats stats/cifar10.npz --metrics frechet kid
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro
from common import cli
from common.measures import Measure, MetricOptions, gather, open_measures
from common.options import DataOptions
from common.sample_set import open_images

from ddim_jax.metrics.metric import Metric, State, column_name
from ddim_jax.paths import DataName, File
from ddim_jax.runs.options import MAX_BATCH, check_limits, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class FidConfig(MetricOptions, DataOptions):
    """One set of images, a line for each metric; called FID only with Inception features."""

    images: Annotated[DataName, tyro.conf.Positional]
    """A folder of images or a .npz of uint8 (N, H, W, C); the name of a data set works too. Of what
    sample.py wrote all images are measured, and those that are not complete are refused."""
    stats: File
    """What make_statistics.py wrote, or the .npz that pytorch-fid and TTUR publish."""
    batch_size: int = option(256, at_least=1, below=MAX_BATCH)
    """Images at once."""


def main(config: FidConfig) -> None:
    """Print the numbers with their protocol."""
    check_limits(config)
    source, images, origin = open_images(config.images, config)
    (measure,) = open_measures([config.stats], config, source.image_shape, origin)
    states = gather(
        measure.network, measure.metrics, source, config.batch_size, config.kept_features
    )
    for metric in measure.metrics:
        print(_line(measure, metric, states, f"N = {images}"))
        if warning := measure.warning(metric, states):
            print(f"warning: {warning}")


def _line(measure: Measure, metric: Metric, states: dict[str, State], images: str) -> str:
    """One metric's numbers, and what they depend on."""
    numbers = measure.statistics.compute(metric, states)
    columns = [column_name(number, measure.name) for number in metric.numbers]
    values = ", ".join(f"{column} {numbers[column]:.6g}" for column in columns)
    description = measure.describe(metric, states)
    protocol = [images] if description in images else [images, description]
    if statistics_hash := measure.statistics.reference_hash(metric):
        protocol.append(f"statistics {statistics_hash[:12]}")
    return f"{values}: {', '.join(protocol)}, network {measure.network.content_hash[:12]}"


if __name__ == "__main__":
    cli.run(main, FidConfig)
