"""A run that starts from the weights of another workdir, trained or converted."""

from __future__ import annotations

from typing import Any

import jax

from ddim_jax.runs.folder import load_spec, read_config
from ddim_jax.runs.load import load_weights
from ddim_jax.runs.spec import ModelConfig, RunSpec


def weights_from(workdir: str, spec: RunSpec) -> tuple[Any, Any]:
    """The parameters and their average, on the host; a converted workdir has one set for both.

    Hosts call it when they know that all will: orbax makes them wait for one another.
    """
    only = read_config(workdir).get("converted_from", {}).get("weights")
    kinds = (only, only) if only else ("raw", "ema")
    params, average = (jax.device_get(load_weights(workdir, spec, kind)[0]) for kind in kinds)
    return params, average


def check_init_from(workdir: str, spec: RunSpec) -> None:
    """Raise ValueError for a workdir whose weights are not for this run."""
    there = load_spec(workdir)
    if there.latent_shape[-1] != spec.latent_shape[-1]:
        raise ValueError(
            f"init_from must hold a network for {spec.latent_shape[-1]} channels; {workdir} has "
            f"{there.latent_shape[-1]}."
        )
    groups, wanted = there.model_config.norm_groups, spec.model_config.norm_groups
    if groups != wanted:  # which the shapes of the weights do not show
        raise ValueError(
            f"model.norm_groups must be {groups}, as in the network of init_from {workdir}; "
            f"got {wanted}."
        )
    _check_same_classes(workdir, there.model_config, spec.model_config)
    if there.predicts != spec.predicts:
        raise ValueError(
            f"predicts must be {there.predicts}, as the network of init_from {workdir} does; got "
            f"{spec.predicts}. Its weights would fit, and mean something else."
        )
    if there.codec != spec.codec:
        raise ValueError(
            f"codec must be {there.codec}, as of init_from {workdir}; got {spec.codec}. Its "
            "network sees what that codec makes of images."
        )
    if there.schedule_config != spec.schedule_config:
        print(f"init_from {workdir} was trained on another schedule: {there.schedule_config}")


def _check_same_classes(workdir: str, there: ModelConfig, wanted: ModelConfig) -> None:
    """Ten classes, or nine and "no class": the shapes of the weights do not show which."""
    if there.num_classes is None or wanted.num_classes is None:
        return  # which they do show
    for name in ("num_classes", "no_class_row"):
        if getattr(there, name) != getattr(wanted, name):
            raise ValueError(
                f"model.{name} must be {getattr(there, name)}, as in the network of init_from "
                f"{workdir}; got {getattr(wanted, name)}."
            )
