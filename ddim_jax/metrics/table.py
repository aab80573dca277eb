"""The metrics by name. A metric of your own is one entry more, made before it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ddim_jax.checks import check_count, look_up
from ddim_jax.metrics.frechet import frechet_metric
from ddim_jax.metrics.inception_score import inception_score_metric
from ddim_jax.metrics.kept import NUM_KEPT
from ddim_jax.metrics.kid import kid_metric
from ddim_jax.metrics.metric import Metric
from ddim_jax.metrics.precision_recall import density_coverage_metric, precision_recall_metric

METRICS: dict[str, Callable[[int], Metric]] = {
    "frechet": frechet_metric,
    "kid": kid_metric,
    "inception_score": inception_score_metric,
    "precision_recall": precision_recall_metric,
    "density_coverage": density_coverage_metric,
}
"""name -> (num_kept) -> the metric; those that keep features keep those of so many images."""


def named_metrics(names: Iterable[str], num_kept: int = NUM_KEPT) -> tuple[Metric, ...]:
    """The metrics of these names, each once, all with the same `num_kept`.

    Raises ValueError, listing the names there are, for another one.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise ValueError(f"names must be a list of names of metrics; got {names!r}.")
    check_count("num_kept", num_kept, 2)
    return tuple(look_up("metric", name, METRICS)(num_kept) for name in dict.fromkeys(names))
