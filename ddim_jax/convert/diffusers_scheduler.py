"""diffusers' scheduler_config.json: which noise schedule it describes, and what a network predicts.

A scheduler's other settings say how diffusers samples, which is no property of a network; which of
them this library does otherwise is listed by `not_obeyed`. A key that a file lacks means the
default of its class. Schedulers of another process than DDPM's are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ddim_jax.checks import check_types, look_up
from ddim_jax.schedule import (
    Schedule,
    Spacing,
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

SPACINGS: dict[str, Spacing] = {
    "leading": "uniform",
    "linspace": "linspace",
    "trailing": "trailing",
}
"""diffusers' name of a sub-sequence -> ours."""


_PIXEL_SPACE = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
_STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear"}
_DDPM = _PIXEL_SPACE | {"timestep_spacing": "leading", "clip_sample": True}
_SOLVER = _PIXEL_SPACE | {"timestep_spacing": "linspace"}
_K_SOLVER = _STABLE_DIFFUSION | {"timestep_spacing": "linspace"}
_SAME_PROCESS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "DDIMScheduler": _DDPM,
    "DDIMParallelScheduler": _DDPM,
    "DDIMInverseScheduler": _DDPM,
    "RePaintScheduler": _DDPM,
    "UnCLIPScheduler": _DDPM | {"beta_schedule": "squaredcos_cap_v2"},
    "PNDMScheduler": _PIXEL_SPACE | {"timestep_spacing": "leading", "set_alpha_to_one": False},
    "DEISMultistepScheduler": _SOLVER,
    "DPMSolverMultistepScheduler": _SOLVER,
    "DPMSolverMultistepInverseScheduler": _SOLVER,
    "DPMSolverSinglestepScheduler": _SOLVER,
    "EulerDiscreteScheduler": _SOLVER,
    "EulerAncestralDiscreteScheduler": _SOLVER,
    "LMSDiscreteScheduler": _SOLVER,
    "SASolverScheduler": _SOLVER,
    "UniPCMultistepScheduler": _SOLVER,
    "DPMSolverSDEScheduler": _K_SOLVER,
    "HeunDiscreteScheduler": _K_SOLVER,
    "KDPM2DiscreteScheduler": _K_SOLVER,
    "KDPM2AncestralDiscreteScheduler": _K_SOLVER,
}
"""Schedulers of DDPM's process, each another sampler of it -> defaults of their settings."""

_OTHER_PROCESSES = (  # how their names start, and what they are
    ("FlowM", "flow matching, a straight line from data to noise"),
    ("Helios", "flow matching, a straight line from data to noise"),
    ("Piflow", "flow matching, a straight line from data to noise"),
    ("LTXEuler", "flow matching, a straight line from data to noise"),
    ("ScoreSdeVe", "the variance-exploding process, which never shrinks the data"),
    ("KarrasVe", "the variance-exploding process, which never shrinks the data"),
    ("EDM", "EDM's process, whose network sees a scaled image and the logarithm of its noise"),
    ("CosineDPMSolver", "EDM's process, whose network sees a scaled image and its noise"),
    ("ScoreSdeVp", "the variance-preserving process in continuous time"),
    ("IPNDM", "a process in continuous time with a table of its own"),
    ("DDPMWuerstchen", "a process in continuous time with a table of its own"),
    ("CogVideoX", "a process whose levels are shifted"),
    ("CMStochastic", "a consistency model, which jumps to the data and predicts no noise"),
    ("ConsistencyDecoder", "a consistency model, which jumps to the data and predicts no noise"),
    ("LCM", "a consistency model distilled from another, which predicts that one's jumps"),
    ("TCD", "a consistency model distilled from another, which predicts that one's jumps"),
    ("SCM", "a consistency model in trigonometric time"),
    ("VQDiffusion", "diffusion of discrete codes"),
    ("Amused", "masking of discrete codes"),
)

_OBEYED = frozenset(
    {"num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas"}
    | {"rescale_betas_zero_snr", "prediction_type", "predict_epsilon", "timestep_spacing"}
)
_AS_OURS: dict[str, tuple[Any, ...]] = {  # setting -> values that are what this library does
    "clip_sample": (False,),
    "thresholding": (False,),
    "set_alpha_to_one": (True,),
    "steps_offset": (0,),
    "variance_type": ("fixed_small", "fixed_small_log", None),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
    "timestep_type": ("discrete",),
    "sigma_min": (None,),
    "sigma_max": (None,),
}
_PARTS = {  # setting -> the setting that it is part of
    "clip_sample_range": "clip_sample",
    "sample_max_value": "thresholding",
    "dynamic_thresholding_ratio": "thresholding",
}


SCHEDULER_TYPES = {
    **dict.fromkeys(("beta_start", "beta_end"), float),
    **dict.fromkeys(("rescale_betas_zero_snr", "predict_epsilon", "use_flow_sigmas"), bool | None),
    **dict.fromkeys(("beta_schedule", "prediction_type", "timestep_spacing"), str | None),
    "num_train_timesteps": int,
    "trained_betas": tuple[float, ...] | None,
}
"""Of the settings that are read."""


def complete_scheduler(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler_config.json with the defaults of its class for the keys it lacks.

    One without "_class_name" counts as a DDPMScheduler. Raises ValueError, by its name, for a
    scheduler of another process, and for settings that make another process of it.
    """
    check_types(scheduler, SCHEDULER_TYPES)
    name = scheduler.get("_class_name", "DDPMScheduler")
    defaults = _SAME_PROCESS.get(str(name).removeprefix("Flax"))
    if defaults is None:
        reasons = [what for start, what in _OTHER_PROCESSES if _starts(str(name), start)]
        reason = f"that is {reasons[0]}" if reasons else "that one is not known here"
        raise ValueError(
            f"_class_name of the scheduler must be one of DDPM's process; got {name!r}: {reason}. "
            "If the network was trained on a table of betas after all, put the DDPMScheduler of "
            "its training into scheduler_config.json. Known are "
            f"{', '.join(kind.removesuffix('Scheduler') for kind in _SAME_PROCESS)}."
        )
    complete = {"num_train_timesteps": 1000, **defaults, **scheduler}
    if complete.get("use_flow_sigmas"):
        raise ValueError(
            f"use_flow_sigmas must be false for DDPM's process; got {complete['use_flow_sigmas']!r}"
            f", which makes flow matching of {name}."
        )
    if complete.get("timestep_type", "discrete") != "discrete":
        raise ValueError(
            "timestep_type must be 'discrete', the index of a level, which is what the network "
            f"sees; got {complete['timestep_type']!r}."
        )
    betas, num_steps = complete.get("trained_betas"), scheduler.get("num_train_timesteps")
    if betas is not None and num_steps not in (None, len(betas)):
        raise ValueError(
            f"num_train_timesteps must be {len(betas)}, the number of trained_betas; got "
            f"{num_steps}. Remove the one that is wrong."
        )
    return complete


def not_obeyed(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of how diffusers samples that this library does not follow, by name.

    Defaults of its class count as well: a DDPMScheduler clips unless its file says otherwise. A
    solver's own settings, such as its order, are all there, since the solver is another here.
    Raises ValueError where `complete_scheduler` does.
    """
    complete = complete_scheduler(scheduler)

    def follows(name: str) -> bool:
        if name in _OBEYED or name.startswith("_"):
            return True
        whole = _PARTS.get(name, name)
        return complete.get(whole, _AS_OURS.get(whole, (None,))[0]) in _AS_OURS.get(whole, ())

    return {name: value for name, value in complete.items() if not follows(name)}


def spacing_from_diffusers(scheduler: Mapping[str, Any]) -> Spacing:
    """Our name of the sub-sequence that a scheduler_config.json samples with.

    "leading" is our "uniform" where the steps divide T. Raises ValueError for another one.
    """
    name = complete_scheduler(scheduler)["timestep_spacing"]
    return look_up("timestep_spacing", name, SPACINGS)


def schedule_from_diffusers(scheduler: Mapping[str, Any]) -> Schedule:
    """The noise schedule a scheduler_config.json describes.

    Raises ValueError for a schedule we do not have, and for a scheduler of another process.
    """
    scheduler = complete_scheduler(scheduler)
    schedule = _before_rescaling(scheduler)
    return zero_terminal_snr(schedule) if scheduler.get("rescale_betas_zero_snr") else schedule


def prediction_from_diffusers(scheduler: Mapping[str, Any]) -> Literal["eps", "v", "x0"]:
    """What the network beside a scheduler_config.json predicts: the noise, v, or the data.

    Without "prediction_type" it is the noise, unless "predict_epsilon", which says the same in the
    files of diffusers before 0.13, is false: then it is the data. Raises ValueError for another
    type, and for two entries that contradict each other.
    """
    check_types(scheduler, SCHEDULER_TYPES)
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
    num_steps = scheduler["num_train_timesteps"]
    betas = scheduler["beta_start"], scheduler["beta_end"]
    match scheduler["beta_schedule"]:
        case "linear":
            return linear_schedule(num_steps, *betas)
        case "scaled_linear":
            return scaled_linear_schedule(num_steps, *betas)
        case "squaredcos_cap_v2":
            return cosine_schedule(num_steps)
        case other:
            names = tuple(BETA_SCHEDULES.values())
            raise ValueError(f"beta_schedule must be one of {names}; got {other!r}.")


def _starts(name: str, start: str) -> bool:
    return name.removeprefix("Flax").startswith(start)
