"""diffusers' scheduler_config.json: which noise schedule it describes, and what a network predicts.

A scheduler's other settings say how diffusers samples, which is no property of a network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ddim_jax.checks import look_up
from ddim_jax.schedule import (
    Schedule,
    cosine_schedule,
    linear_schedule,
    scaled_linear_schedule,
    schedule_from_betas,
    zero_terminal_snr,
)

BETA_SCHEDULES = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "cosine": "squaredcos_cap_v2",
}
"""Our name of a noise schedule -> diffusers' name."""

PREDICTIONS: dict[str, Literal["eps", "v", "x0"]] = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x0",
}
"""diffusers' name of what a network predicts -> ours."""


def schedule_from_diffusers(scheduler: Mapping[str, Any]) -> Schedule:
    """The noise schedule a scheduler_config.json describes.

    Raises ValueError for a schedule we do not have.
    """
    schedule = _before_rescaling(scheduler)
    return zero_terminal_snr(schedule) if scheduler.get("rescale_betas_zero_snr") else schedule


def prediction_from_diffusers(scheduler: Mapping[str, Any]) -> Literal["eps", "v", "x0"]:
    """What the network beside a scheduler_config.json predicts: the noise, v, or the data.

    Without "prediction_type" it is the noise, unless "predict_epsilon", which says the same in the
    files of diffusers before 0.13, is false: then it is the data. Raises ValueError for another
    type, and for two entries that contradict each other.
    """
    epsilon = scheduler.get("predict_epsilon")
    old = None if epsilon is None else "epsilon" if epsilon else "sample"
    name = scheduler.get("prediction_type", old or "epsilon")
    prediction = look_up("prediction_type", name, PREDICTIONS)
    if old not in (None, name):
        raise ValueError(
            f"predict_epsilon must agree with prediction_type, which is {name!r}; got {epsilon!r}. "
            "Remove the one that is wrong."
        )
    return prediction


def scheduler_config(
    *,
    schedule: Literal["linear", "scaled_linear", "cosine"],
    num_steps: int,
    beta_start: float,
    beta_end: float,
    clip_sample: bool,
    prediction: Literal["eps", "v", "x0"],
    zero_terminal_snr: bool,
) -> dict[str, Any]:
    """scheduler_config.json of a `DDPMScheduler` for `save_diffusers`, whose arguments these are.

    Raises ValueError if `schedule_from_diffusers` would, or for another prediction.
    """
    theirs: dict[str, str] = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    config = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": num_steps,
        "beta_schedule": BETA_SCHEDULES.get(schedule, schedule),
        "beta_start": beta_start,
        "beta_end": beta_end,
        "clip_sample": clip_sample,
        "prediction_type": look_up("prediction", prediction, theirs),
        "variance_type": "fixed_small",
        # "leading" is our "uniform" where the steps divide T; it never visits the last level.
        "timestep_spacing": "trailing" if zero_terminal_snr else "leading",
        "steps_offset": 0,
    }
    if zero_terminal_snr:
        config["rescale_betas_zero_snr"] = True
    schedule_from_diffusers(config)  # for its check
    return config


def _before_rescaling(scheduler: Mapping[str, Any]) -> Schedule:
    if scheduler.get("trained_betas") is not None:
        return schedule_from_betas(scheduler["trained_betas"])
    num_steps = scheduler.get("num_train_timesteps", 1000)
    betas = scheduler.get("beta_start", 1e-4), scheduler.get("beta_end", 0.02)
    match scheduler.get("beta_schedule", "linear"):
        case "linear":
            return linear_schedule(num_steps, *betas)
        case "scaled_linear":
            return scaled_linear_schedule(num_steps, *betas)
        case "squaredcos_cap_v2":
            return cosine_schedule(num_steps)
        case other:
            names = tuple(BETA_SCHEDULES.values())
            raise ValueError(f"beta_schedule must be one of {names}; got {other!r}.")
