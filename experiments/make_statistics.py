"""Statistics of a data set's features: what samples are measured against.

python experiments/make_statistics.py cifar10 --features inception --out stats/cifar10.npz
python experiments/make_statistics.py digits --features classifier --out classifier/stats.npz
python experiments/make_statistics.py cifar10 --out stats/cifar10.npz --metrics frechet kid
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from typing import Annotated

import jax
import tyro
from common import cli
from common.measures import MetricOptions, gather, open_network
from common.options import DataOptions
from common.sample_set import open_images

from ddim_jax.data.source import facts_of
from ddim_jax.metrics.features import FEATURE_NETWORKS
from ddim_jax.metrics.frechet import MOMENTS, frechet_metric
from ddim_jax.metrics.statistics import save_statistics, statistics_of
from ddim_jax.paths import DataName, File
from ddim_jax.runs.options import MAX_BATCH, check_limits, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class StatisticsConfig(MetricOptions, DataOptions):
    """States of the metrics over every image of a data set, each exactly once.

    Mean and covariance, which frechet needs, are always there.
    """

    data: Annotated[DataName, tyro.conf.Positional]
    """digits, a TFDS name, a folder of images, or a .npz file of uint8 images."""
    out: File
    """The .npz file to write; pytorch-fid and TTUR read it too."""
    features: Annotated[
        str, tyro.conf.arg(help=f"The network behind the features: {', '.join(FEATURE_NETWORKS)}.")
    ] = "inception"
    batch_size: int = option(256, at_least=1, below=MAX_BATCH)
    """Images at once."""


def main(config: StatisticsConfig) -> None:
    """Compute the statistics and write them, with their recipe inside."""
    check_limits(config)
    metrics = [metric for metric in config.named_metrics() if metric.needs_reference]
    network = open_network(config.features, config.feature_weights, config.out)
    source, images, _ = open_images(config.data, config)
    recipe = {
        "name": source.name,
        "split": config.split,
        "image_shape": list(source.image_shape),
        "resized_to": config.image_size,
        **facts_of(source),
    }
    started = time.monotonic()
    metrics = [frechet_metric(), *metrics]
    states = gather(network, metrics, source, config.batch_size, config.kept_features)
    statistics = statistics_of(states, network, num_samples=len(source), data=recipe)
    seconds = time.monotonic() - started
    pathlib.Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    save_statistics(config.out, statistics)
    print(
        f"{config.features} statistics {statistics.content_hash[:12]} of {images} "
        f"({config.split}) in {config.out}: {len(statistics.mean)} "
        f"features, {', '.join([MOMENTS, *statistics.states])}, network "
        f"{network.content_hash[:12]}, {seconds:.1f} s on {jax.local_device_count()} "
        f"{jax.default_backend()} device(s)"
    )


if __name__ == "__main__":
    cli.run(main, StatisticsConfig)
