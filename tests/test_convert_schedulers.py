"""Schedulers of diffusers: DDPM's process is read, another is refused, and what is left is said."""

import numpy as np
import pytest
from refusals import refused

from ddim_jax.convert import prediction_from_diffusers, schedule_from_diffusers
from ddim_jax.convert.diffusers_scheduler import not_obeyed, spacing_from_diffusers


@pytest.mark.parametrize(
    "name, first, last",
    [  # defaults of the classes' constructors in diffusers
        (None, 1e-4, 0.02),
        ("DDPMScheduler", 1e-4, 0.02),
        ("DDIMScheduler", 1e-4, 0.02),
        ("FlaxDDIMScheduler", 1e-4, 0.02),
        ("PNDMScheduler", 1e-4, 0.02),
        ("DPMSolverMultistepScheduler", 1e-4, 0.02),
        ("EulerDiscreteScheduler", 1e-4, 0.02),
        ("HeunDiscreteScheduler", 0.00085, 0.012),
        ("KDPM2AncestralDiscreteScheduler", 0.00085, 0.012),
    ],
)
def test_a_missing_beta_is_its_classs_default(name, first, last):
    config = {} if name is None else {"_class_name": name}
    want = np.cumprod(1 - np.linspace(first, last, 1000))
    np.testing.assert_allclose(schedule_from_diffusers(config).alphas_cumprod, want, rtol=2e-5)
    given = config | {"beta_start": 0.01, "beta_end": 0.05, "num_train_timesteps": 7}
    want = np.cumprod(1 - np.linspace(0.01, 0.05, 7))
    np.testing.assert_allclose(schedule_from_diffusers(given).alphas_cumprod, want, rtol=1e-5)


def test_the_cosine_is_unclips_default():
    t = np.linspace(0, 1, 1001)  # Nichol & Dhariwal 2021, eq. 17, betas cut at 0.999
    f = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    want = np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], 0.999))
    got = schedule_from_diffusers({"_class_name": "UnCLIPScheduler"}).alphas_cumprod
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    "name, what",
    [
        ("FlowMatchEulerDiscreteScheduler", "flow matching"),
        ("FlaxScoreSdeVeScheduler", "variance-exploding"),
        ("ScoreSdeVpScheduler", "continuous time"),
        ("KarrasVeScheduler", "variance-exploding"),
        ("EDMEulerScheduler", "EDM"),
        ("EDMDPMSolverMultistepScheduler", "EDM"),
        ("CMStochasticIterativeScheduler", "consistency model"),
        ("LCMScheduler", "consistency model distilled"),
        ("TCDScheduler", "consistency model distilled"),
        ("VQDiffusionScheduler", "discrete codes"),
        ("CogVideoXDDIMScheduler", "shifted"),
        ("NobodysScheduler", "not known here"),
        (None, "not known here"),
    ],
)
def test_another_process_is_refused_by_name(name, what):
    for function in (schedule_from_diffusers, not_obeyed, spacing_from_diffusers):
        with refused(f"_class_name of the scheduler .*; got {name!r}: .*{what}.*scheduler_config"):
            function({"_class_name": name, "beta_start": 1e-4, "beta_end": 0.02})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_flow_sigmas": True}, "use_flow_sigmas must be false"),
        ({"timestep_type": "continuous"}, "timestep_type must be 'discrete'.*got 'continuous'"),
        ({"trained_betas": [0.1, 0.2], "num_train_timesteps": 1000},
         "num_train_timesteps must be 2, the number of trained_betas; got 1000"),
    ],
)  # fmt: skip
def test_a_setting_that_makes_another_process_is_refused(change, message):
    with refused(message):
        schedule_from_diffusers({"_class_name": "EulerDiscreteScheduler"} | change)


def test_trained_betas_are_the_table():
    config = {"_class_name": "DDIMScheduler", "trained_betas": [0.1, 0.2], "beta_end": 0.5}
    np.testing.assert_allclose(
        schedule_from_diffusers(config).alphas_cumprod, [0.9, 0.9 * 0.8], rtol=1e-6
    )


def test_what_a_network_predicts_is_read_whatever_the_scheduler():
    old = {"_class_name": "DDPMScheduler", "predict_epsilon": False}
    assert prediction_from_diffusers(old) == "x0"
    new = {"_class_name": "EulerDiscreteScheduler", "prediction_type": "v_prediction"}
    assert prediction_from_diffusers(new) == "v"


def test_the_spacing_is_its_classs_default_and_another_is_refused():
    assert spacing_from_diffusers({}) == "uniform"
    assert spacing_from_diffusers({"_class_name": "DPMSolverMultistepScheduler"}) == "linspace"
    assert spacing_from_diffusers({"timestep_spacing": "trailing"}) == "trailing"
    with refused("timestep_spacing must be one of .*; got 'log'"):
        spacing_from_diffusers({"timestep_spacing": "log"})


@pytest.mark.parametrize(
    "config, want",
    [
        # save_diffusers' own: nothing is lost.
        ({"_class_name": "DDPMScheduler", "clip_sample": False, "variance_type": "fixed_small",
          "steps_offset": 0, "timestep_spacing": "leading", "rescale_betas_zero_snr": False}, {}),
        # The class clips where its file does not say.
        ({"_class_name": "DDPMScheduler", "_diffusers_version": "0.1"}, {"clip_sample": True}),
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1},
         {"set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1}),
        ({"_class_name": "DDIMScheduler", "clip_sample": True, "clip_sample_range": 2.0},
         {"clip_sample": True, "clip_sample_range": 2.0}),
        ({"_class_name": "DDIMScheduler", "clip_sample": False, "clip_sample_range": 1.0,
          "thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.99},
         {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.99}),
        ({"_class_name": "DDIMScheduler", "clip_sample": False, "thresholding": False,
          "sample_max_value": 1.0, "dynamic_thresholding_ratio": 0.995}, {}),
        ({"_class_name": "DDPMScheduler", "clip_sample": False, "variance_type": "learned_range"},
         {"variance_type": "learned_range"}),
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True},
         {"use_karras_sigmas": True}),
    ],
)  # fmt: skip
def test_what_is_not_followed_is_named(config, want):
    assert not_obeyed(config) == want
