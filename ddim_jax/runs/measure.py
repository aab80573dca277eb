"""How far a run has come, measured while it trains: the distance of samples, a held-out loss.

Every host measures all of it, so that none waits for another's numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from ddim_jax.data.content import content_of
from ddim_jax.data.load import held_out_split, load_images, splits_of
from ddim_jax.data.source import ArraySource, ImageSource
from ddim_jax.keys import image_keys, seed_key
from ddim_jax.losses import prediction_loss
from ddim_jax.metrics.features import network_of
from ddim_jax.metrics.frechet import MOMENTS, few_samples_warning, frechet_metric
from ddim_jax.metrics.metric import column_name, init_states, update_states
from ddim_jax.metrics.origin import NOT_CROPPED, Origin, origin_of, origin_warnings
from ddim_jax.metrics.statistics import load_statistics
from ddim_jax.parallel import map_batches, map_rows, over_devices
from ddim_jax.runs.config import TrainConfig
from ddim_jax.runs.draw import DrawInputs, image_program
from ddim_jax.runs.spec import RunParams, RunSpec

Measured = dict[str, int | float | None]
"""What a line of metrics.jsonl says beside its step; None where samples were not finite."""

PROTOCOL = "measured_with"
"""What such a line calls its protocol: numbers of two protocols make no curve."""


class Measure(NamedTuple):
    """What is measured while a run trains."""

    numbers: Callable[[RunParams], Measured]
    """(averaged weights) -> numbers, always from the same latents, noise and images."""
    protocol: dict[str, Any]
    """What decides the numbers beside the weights, as JSON holds it; "warnings" among it, which
    must be read with them."""


def open_measure(config: TrainConfig, spec: RunSpec, source: ImageSource) -> Measure | None:
    """What `config.fid_every` asks for; None where it is 0.

    Raises ValueError for statistics that do not fit the images, and where there is nothing to
    measure.
    """
    if not config.fid_every:
        return None
    measures: list[Measure] = []
    if config.fid_stats is not None:
        measures.append(_distance(config, spec, source))
    if (held_out := _held_out(config, source)) is not None:
        measures.append(_loss(config, spec, held_out))
    if not measures:
        raise ValueError(
            "fid_stats must be given with fid_every for data without a split to hold out; got "
            f"None, and {source.name}. Make them with make_statistics.py, or set fid_every to 0."
        )

    def numbers(params: RunParams) -> Measured:
        return {name: number for part in measures for name, number in part.numbers(params).items()}

    return Measure(
        numbers,
        {name: fact for part in measures for name, fact in part.protocol.items()},
    )


def crop_of(config: Mapping[str, Any]) -> str | None:
    """How the images were cropped that a config.json trains on; None where nobody knows.

    Those that nothing resized may have been cropped before.
    """
    if str(config.get("data", "")).partition(":")[0] == "celeb_a":
        return "celeba"
    if (crop := config.get("crop")) is not None:
        return crop
    return None if config.get("image_size") is None else NOT_CROPPED


class _Drawn(NamedTuple):
    features: jax.Array
    finite: jax.Array


def _distance(config: TrainConfig, spec: RunSpec, source: ImageSource) -> Measure:
    """The Frechet distance of samples to the statistics, called as sweeps call it: fid is of
    Inception's features alone."""
    path = str(config.fid_stats)
    try:
        statistics = load_statistics(path)
    except FileNotFoundError as error:  # a wrong path is a wrong setting
        raise ValueError(f"fid_stats {path} does not exist.") from error
    network, metric = network_of(statistics.features, None, path), frechet_metric()
    shape = (source.image_shape[0], source.image_shape[1], source.image_shape[2])
    statistics.check_network(network, shape)
    steps = min(config.fid_sample_steps, spec.schedule.num_steps)
    images = image_program(spec, spec.timesteps(steps))
    features = over_devices(lambda params, images: network.apply_fn(params, images))

    def program(inputs: DrawInputs, indices: Any) -> _Drawn:
        pixels = images(inputs, indices)
        return _Drawn(features(network.params, pixels.images)[metric.features], pixels.finite)

    column = column_name(metric.numbers[0], statistics.features)
    firsts = range(0, config.fid_samples, config.batch_size)
    batches = [np.arange(i, min(i + config.batch_size, config.fid_samples)) for i in firsts]

    def numbers(params: RunParams) -> Measured:
        states = init_states([metric], {metric.features: len(statistics.mean)})
        finite = True
        for rows, drawn in zip(
            batches, map_batches(program, DrawInputs(params, seed_key(0)), batches), strict=True
        ):
            finite = finite and bool(drawn.finite.all())
            if finite:
                states = update_states(states, [metric], {metric.features: drawn.features}, rows)
        distance = float(statistics.distance(states[MOMENTS])) if finite else None
        return {column: distance, "num_samples": config.fid_samples, "num_sample_steps": steps}

    drawn = Origin(lossy=0.0, crop=crop_of(config.describe()))
    warnings = origin_warnings(drawn, origin_of(statistics.data, statistics.num_samples))
    few = few_samples_warning(config.fid_samples, len(statistics.mean))
    return Measure(
        numbers,
        {
            "statistics": statistics.content_hash[:16],
            "network": network.content_hash[:16],
            "num_samples": config.fid_samples,
            "num_sample_steps": steps,
            "warnings": [*filter(None, [few, *warnings])],
        },
    )


def _held_out(config: TrainConfig, source: ImageSource) -> ArraySource | None:
    """The first images of the split that is held out; None where there is none."""
    split = config.held_out_split
    if split is None:
        split = held_out_split(splits_of(config.data, config.data_dir), config.split)
    if split is None:
        return None
    held_out = load_images(
        config.data,
        split=split,
        data_dir=config.data_dir,
        image_size=config.image_size,
        crop=config.crop,
        in_memory=False,
    )
    if tuple(held_out.image_shape) != tuple(source.image_shape):
        raise ValueError(
            f"held_out_split must hold images of the run's shape {tuple(source.image_shape)}; "
            f"{held_out.name} has {tuple(held_out.image_shape)}."
        )
    number = min(len(held_out), config.fid_samples)
    examples = [held_out[index] for index in range(number)]
    labels = None
    if held_out.num_classes is not None:
        labels = np.array([example["label"] for example in examples], np.int32)
    images = np.stack([example["image"] for example in examples])
    return ArraySource(images, labels, held_out.name, held_out.num_classes)


def _loss(config: TrainConfig, spec: RunSpec, held_out: ArraySource) -> Measure:
    """The mean squared error of what the network predicts, without dropout or flips.

    Each image always at the same time with the same noise.
    """

    def losses(params: RunParams, images, labels, indices):
        keys = image_keys(seed_key(0), indices)
        given = () if spec.num_classes is None else (labels,)

        def network(x, t):
            return spec.model.apply({"params": params.network}, x, t, *given)

        return prediction_loss(
            keys,
            network,  # pyright: ignore[reportArgumentType]
            spec.schedule,
            spec.encode(params, images),
            predicts=spec.predicts,
        )

    program = over_devices(losses)
    indices = np.arange(len(held_out))
    labels = np.zeros(len(held_out), np.int32) if held_out.labels is None else held_out.labels

    def numbers(params: RunParams) -> Measured:
        found = map_rows(program, params, config.batch_size, held_out.images, labels, indices)
        return {"held_out_loss": float(np.mean(found)), "num_held_out": len(held_out)}

    return Measure(numbers, {"held_out": content_of(held_out), "num_held_out": len(held_out)})
