"""The named configurations against what was published: DDPM's and DDIM's papers and code."""

import jax
import pytest

pytest.importorskip("tyro")

import tyro
from convert import IMAGE_SHAPES
from presets import PRESETS

from ddim_jax.objectives import Denoising
from ddim_jax.runs import ScheduleConfig
from ddim_jax.unet import parameter_shapes

# channel_mults, dropout, EMA decay, batch, rate, clipping, sub-sequence, steps, parameters
CIFAR10 = (1, 2, 2, 2), 0.1, 0.9999, 128, 2e-4, 1.0, "quadratic", 790_000, 35_746_307
CELEBA = (1, 2, 2, 2, 4), 0.1, 0.9999, 128, 2e-4, 1.0, "uniform", None, 78_700_803
BEDROOM = (1, 1, 2, 2, 4, 4), 0.0, 0.999, 64, 2e-5, None, "uniform", 2_388_000, 113_673_219
CHURCH = (*BEDROOM[:7], 4_432_000, BEDROOM[8])


@pytest.mark.parametrize(
    "name, published",
    [("cifar10", CIFAR10), ("celeba", CELEBA), ("bedroom", BEDROOM), ("church", CHURCH)],
)
def test_published_configurations(name, published):
    mults, dropout, ema_decay, batch_size, rate, clip_norm, spacing, steps, parameters = published
    config = PRESETS[name][1]
    model = config.model
    assert (model.channels, model.channel_mults, model.dropout) == (128, mults, dropout)
    assert (model.num_res_blocks, model.attention_resolutions) == (2, (16,))
    assert (config.ema_decay, config.batch_size, config.learning_rate) == (
        ema_decay, batch_size, rate)  # fmt: skip
    assert (config.clip_norm, config.spacing, config.objective.flip) == (clip_norm, spacing, True)
    assert steps in (None, config.max_steps)
    assert config.schedule == ScheduleConfig("linear", 1000, 1e-4, 0.02)
    image_shape = IMAGE_SHAPES[name]
    shapes = parameter_shapes(model.make(image_shape[-1]), image_shape)
    assert sum(shape.size for shape in jax.tree.leaves(shapes)) == parameters


def test_the_two_recipes_differ_where_the_two_codes_do():
    ddpm, torch = PRESETS["cifar10"][1], PRESETS["cifar10-torch-recipe"][1]
    ours, theirs = ddpm.objective, torch.objective
    assert (ours.reduction, ours.timesteps, ddpm.warmup_steps) == ("mean", "independent", 5000)
    assert (theirs.reduction, theirs.timesteps, torch.warmup_steps) == ("sum", "antithetic", 0)
    assert ddpm.model == torch.model


def test_published_presets_average_from_the_start_as_ddpm_and_short_ones_do_not():
    warmed = {name for name, (_, config) in PRESETS.items() if config.ema_warmup}
    assert warmed == {"digits", "digits-v"}


def test_digits_v_differs_from_digits_in_its_noise_alone():
    """v, on a schedule whose last level is pure noise, which a trailing sub-sequence visits."""
    digits, digits_v = PRESETS["digits"][1], PRESETS["digits-v"][1]
    spec = digits_v.spec((8, 8, 1))
    assert spec.predicts == "v"
    assert float(spec.schedule.alpha_bar(999)) == 0
    assert spec.timesteps(10)[0] == 999
    for name in ("data", "model", "batch_size", "learning_rate", "max_steps", "objective"):
        assert getattr(digits, name) == getattr(digits_v, name), name


def test_options_of_the_objective_stand_beside_the_others():
    arguments = ["digits", "--workdir", "w", "--reduction", "sum", "--label-dropout", "0.2",
                 "--flip", "--predicts", "v", "--schedule.zero-terminal-snr",
                 "--model.channels", "16", "--init-from", "there"]  # fmt: skip
    config = tyro.extras.overridable_config_cli(PRESETS, args=arguments)
    assert config.objective == Denoising(reduction="sum", label_dropout=0.2, flip=True)
    assert (config.workdir, config.predicts, config.init_from) == ("w", "v", "there")
    assert config.schedule == ScheduleConfig(zero_terminal_snr=True)
    assert config.model.channels == 16 and config.batch_size == 32  # the preset's
