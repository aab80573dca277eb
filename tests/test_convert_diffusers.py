"""diffusers folders: read, written, refused; with diffusers installed, also its own outputs."""

import functools
import json
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from refusals import refused

from ddim_jax import samplers
from ddim_jax.convert import (
    load_diffusers,
    prediction_from_diffusers,
    save_diffusers,
    schedule_from_diffusers,
)
from ddim_jax.convert.diffusers_unet import config_from_unet, unet_from_config
from ddim_jax.denoisers import clip_x0_keep_eps
from ddim_jax.schedule import (
    cosine_schedule,
    ddim_timesteps,
    linear_schedule,
    scaled_linear_schedule,
    schedule_from_betas,
    zero_terminal_snr,
)
from ddim_jax.unet import UNet

TINY = UNet(
    channels=8, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(4,), norm_groups=4
)
WEIGHTS = "diffusion_pytorch_model.safetensors"
# As in the config.json of google/ddpm-cifar10-32, keys it leaves out left out here too.
CONFIG = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [8, 16],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 4,
    "out_channels": 3,
    "sample_size": 8,
    "time_embedding_type": "positional",
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}


def tiny_shapes():
    """Names and shapes of the tensors of CONFIG's network, written down from diffusers' own."""
    shapes = {}

    def layer(name, *weight):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, weight[:1]

    def resnet(name, channels_in, channels):
        layer(f"{name}.norm1", channels_in)
        layer(f"{name}.conv1", channels, channels_in, 3, 3)
        layer(f"{name}.time_emb_proj", channels, 32)
        layer(f"{name}.norm2", channels)
        layer(f"{name}.conv2", channels, channels, 3, 3)
        if channels_in != channels:
            layer(f"{name}.conv_shortcut", channels, channels_in, 1, 1)

    def attention(name, channels):
        layer(f"{name}.group_norm", channels)
        for linear in ("to_q", "to_k", "to_v", "to_out.0"):
            layer(f"{name}.{linear}", channels, channels)

    layer("conv_in", 8, 3, 3, 3)
    layer("time_embedding.linear_1", 32, 8)
    layer("time_embedding.linear_2", 32, 32)
    resnet("down_blocks.0.resnets.0", 8, 8)
    layer("down_blocks.0.downsamplers.0.conv", 8, 8, 3, 3)
    resnet("down_blocks.1.resnets.0", 8, 16)
    attention("down_blocks.1.attentions.0", 16)
    resnet("mid_block.resnets.0", 16, 16)
    attention("mid_block.attentions.0", 16)
    resnet("mid_block.resnets.1", 16, 16)
    resnet("up_blocks.0.resnets.0", 16 + 16, 16)
    attention("up_blocks.0.attentions.0", 16)
    resnet("up_blocks.0.resnets.1", 16 + 8, 16)
    attention("up_blocks.0.attentions.1", 16)
    layer("up_blocks.0.upsamplers.0.conv", 16, 16, 3, 3)
    resnet("up_blocks.1.resnets.0", 16 + 8, 8)
    resnet("up_blocks.1.resnets.1", 8 + 8, 8)
    layer("conv_norm_out", 8)
    layer("conv_out", 3, 8, 3, 3)
    return shapes


@functools.cache
def tiny_tensors():
    rng = np.random.default_rng(0)
    return {k: 0.1 * rng.standard_normal(shape, np.float32) for k, shape in tiny_shapes().items()}


def write(folder, config=CONFIG, tensors=None, scheduler=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors or tiny_tensors(), folder / WEIGHTS)
    if scheduler is not None:
        (folder / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


# Reading


def test_config_and_tensors_are_read(tmp_path):
    checkpoint = load_diffusers(write(tmp_path, scheduler={"beta_end": 0.03}))
    assert checkpoint.model == TINY
    assert checkpoint.image_size == 8
    assert checkpoint.scheduler == {"beta_end": 0.03}
    assert str(tmp_path) in checkpoint.description
    shapes = jax.eval_shape(TINY.init, jax.random.key(0), np.zeros((8, 8, 3), np.float32), 0)
    assert jax.tree.map(jnp.shape, checkpoint.params) == jax.tree.map(jnp.shape, shapes["params"])
    # Up blocks count from below, and convolutions are (O, I, h, w) there and (h, w, I, O) here.
    theirs = tiny_tensors()["up_blocks.0.resnets.1.conv1.weight"]
    ours = checkpoint.params["up_1_block_1"]["conv1"]["kernel"]
    np.testing.assert_array_equal(ours, theirs.transpose(2, 3, 1, 0))
    theirs = tiny_tensors()["mid_block.attentions.0.to_out.0.weight"]
    np.testing.assert_array_equal(checkpoint.params["mid_attn_1"]["proj_out"]["kernel"], theirs.T)


def test_a_pipelines_folder_is_read_too(tmp_path):
    write(tmp_path / "unet")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"beta_end": 0.03}')
    for folder in (tmp_path, tmp_path / "unet"):
        checkpoint = load_diffusers(folder)
        assert checkpoint.scheduler == {"beta_end": 0.03}
        assert checkpoint.image_size == 8


def test_old_attention_names_are_read(tmp_path):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in tiny_tensors().items():
        for now, before in old.items():
            name = name.replace(f".{now}.", f".{before}.")
        tensors[name] = tensor
    assert "mid_block.attentions.0.proj_attn.bias" in tensors
    want = load_diffusers(write(tmp_path / "new")).params
    got = load_diffusers(write(tmp_path / "old", tensors=tensors)).params
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_bin_weights_are_read_with_torch(tmp_path):
    torch = pytest.importorskip("torch")
    want = load_diffusers(write(tmp_path)).params
    (tmp_path / WEIGHTS).unlink()
    tensors = {k: torch.from_numpy(a.copy()) for k, a in tiny_tensors().items()}
    torch.save(tensors, tmp_path / "diffusion_pytorch_model.bin")
    got = load_diffusers(tmp_path).params
    jax.tree.map(np.testing.assert_array_equal, got, want)

    torch.save([1, 2], tmp_path / "diffusion_pytorch_model.bin")
    with refused("must hold a state dict; got a list"):
        load_diffusers(tmp_path)


class Malicious:
    """Pickled, it becomes a call that creates the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_a_malicious_bin_is_never_executed(tmp_path):
    torch = pytest.importorskip("torch")
    write(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    content = {"conv_in.weight": Malicious(tmp_path / "trap")}
    torch.save(content, tmp_path / "diffusion_pytorch_model.bin")
    with refused("diffusion_pytorch_model.bin was refused"):
        load_diffusers(tmp_path)
    assert not (tmp_path / "trap").exists()


# Refusing


def test_a_missing_attention_head_dim_is_refused(tmp_path):
    config = {k: v for k, v in CONFIG.items() if k != "attention_head_dim"}
    with refused("attention_head_dim must be None.*got 8 .the key is missing, and means 8"):
        load_diffusers(write(tmp_path, config))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attention_head_dim": 8}, "attention_head_dim must be None .*; got 8. Another"),
        ({"flip_sin_to_cos": True}, "flip_sin_to_cos must be False"),
        ({"freq_shift": 0}, "freq_shift must be 1"),
        ({"norm_eps": 1e-5}, "norm_eps must be 1e-06"),
        ({"downsample_padding": 1}, "downsample_padding must be 0"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"_class_name": "UNet2DConditionModel"}, "_class_name must be 'UNet2DModel'"),
        ({"out_channels": 6}, r"out_channels must equal in_channels \(3\)"),
        ({"sample_size": [8, 12]}, "sample_size must be one integer"),
        ({"block_out_channels": [8, 12]}, "block_out_channels"),
        ({"block_out_channels": [8, 16, 16]}, "block_out_channels"),
        ({"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, "must mirror"),
        ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}, "got 'SkipDownBlock2D'"),
        ({"norm_num_groups": 3}, "norm_groups"),
    ],
)
def test_other_networks_are_refused_by_the_setting(tmp_path, change, message):
    with refused(f"(?s)config.json.*{message}"):
        load_diffusers(write(tmp_path, CONFIG | change))


def test_an_incomplete_config_is_refused(tmp_path):
    config = {k: v for k, v in CONFIG.items() if k != "in_channels"}
    with refused("in_channels"):
        load_diffusers(write(tmp_path, config))


def test_tensors_that_do_not_fit_are_listed(tmp_path):
    tensors = tiny_tensors() | {
        "conv_out.weight": np.zeros((3, 8, 1, 1), np.float32),
        "up_blocks.2.resnets.0.norm1.weight": np.zeros(8, np.float32),
    }
    del tensors["mid_block.attentions.0.to_k.bias"]
    with pytest.raises(ValueError, match="1 tensors missing, 1 left over, 1 of another") as error:
        load_diffusers(write(tmp_path, tensors=tensors))
    assert f"{tmp_path / WEIGHTS}" in str(error.value)
    assert "missing mid_block.attentions.0.to_k.bias (16,)" in str(error.value)
    assert "left over up_blocks.2.resnets.0.norm1.weight (8,)" in str(error.value)
    assert "conv_out.weight is (3, 8, 1, 1), must be (3, 8, 3, 3)" in str(error.value)


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.5, 0.999])
def test_a_truncated_file_is_named(tmp_path, fraction):
    path = write(tmp_path) / WEIGHTS
    whole = path.read_bytes()
    path.write_bytes(whole[: int(fraction * len(whole))])
    with refused(f"{path} is damaged"):
        load_diffusers(tmp_path)


@pytest.mark.parametrize("text", ["", '{"act_fn": ', "[1]"])
def test_a_damaged_config_is_named(tmp_path, text):
    path = write(tmp_path) / "config.json"
    path.write_text(text)
    with refused(str(path)):
        load_diffusers(tmp_path)


def test_a_folder_without_a_network(tmp_path):
    with refused("none of .*config.json.* exists"):
        load_diffusers(tmp_path)
    write(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with refused("none of .*safetensors.*bin exists"):
        load_diffusers(tmp_path)


# The hub, without a network: a stand-in for huggingface_hub


def test_a_hub_id_is_fetched(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repo_id, allow_patterns):
        asked.append((repo_id, allow_patterns))
        return str(tmp_path)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    write(tmp_path)
    assert load_diffusers("google/ddpm-cifar10-32").image_size == 8
    assert [repo_id for repo_id, _ in asked] == ["google/ddpm-cifar10-32"]
    patterns = asked[0][1]
    assert {"config.json", WEIGHTS, "unet/config.json", f"unet/{WEIGHTS}"} <= set(patterns)
    assert not any(pattern.endswith("bin") for pattern in patterns)

    (tmp_path / WEIGHTS).unlink()  # an old repository: .bin only
    with refused("none of"):
        load_diffusers("google/ddpm-cifar10-32")
    assert "diffusion_pytorch_model.bin" in asked[-1][1]


def test_neither_folder_nor_hub_id():
    with refused("no folder ./none; a repository of the hub is written owner/name"):
        load_diffusers("./none")


def test_without_huggingface_hub_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"ddim_jax\[convert\]"):
        load_diffusers("google/ddpm-cifar10-32")


# Writing


def test_round_trip_is_bitwise(tmp_path):
    first = load_diffusers(write(tmp_path / "theirs"))
    save_diffusers(tmp_path / "ours", first.model, first.params, 8, beta_end=0.03)
    tensors = safetensors.numpy.load_file(tmp_path / "ours" / "unet" / WEIGHTS)
    assert tensors.keys() == tiny_tensors().keys()
    for name, want in tiny_tensors().items():
        np.testing.assert_array_equal(tensors[name], want, err_msg=name)
    config = json.loads((tmp_path / "ours" / "unet" / "config.json").read_text())
    assert {k: config[k] for k in CONFIG if k != "_diffusers_version"} == {
        k: v for k, v in CONFIG.items() if k != "_diffusers_version"
    }
    second = load_diffusers(tmp_path / "ours")
    assert second.scheduler is not None
    assert second.model == first.model
    jax.tree.map(np.testing.assert_array_equal, second.params, first.params)
    np.testing.assert_array_equal(
        schedule_from_diffusers(second.scheduler).alphas_cumprod,
        linear_schedule(1000, 1e-4, 0.03).alphas_cumprod,
    )


@pytest.mark.parametrize(
    "name, make",
    [
        ("linear", linear_schedule),
        ("scaled_linear", scaled_linear_schedule),
        ("cosine", lambda num_steps, *_: cosine_schedule(num_steps)),
    ],
)
def test_schedules_survive_the_config(tmp_path, name, make):
    params = load_diffusers(write(tmp_path / "theirs")).params
    betas = {"beta_start": 1e-3, "beta_end": 0.03}
    save_diffusers(tmp_path, TINY, params, 8, schedule=name, num_steps=50, **betas)
    got = schedule_from_diffusers(load_diffusers(tmp_path).scheduler)
    np.testing.assert_array_equal(got.alphas_cumprod, make(50, 1e-3, 0.03).alphas_cumprod)


@pytest.mark.parametrize(
    "model",
    [
        UNet(dropout=0.1),
        UNet(channel_mults=(1, 1, 2, 2, 4, 4), num_res_blocks=3),
        UNet(num_classes=10),
    ],
)
def test_every_setting_survives_the_config(tmp_path, model):
    config = json.loads(json.dumps(config_from_unet(model, 64)))
    assert unet_from_config(config) == (model, 64)


def test_what_diffusers_cannot_hold_is_refused(tmp_path):
    params = load_diffusers(write(tmp_path / "theirs")).params
    out = tmp_path / "ours"
    with refused(r"channel_mults must start with 1 .* got \(2, 4\)"):
        save_diffusers(out, TINY.clone(channel_mults=(2, 4)), params, 8)
    with refused("do not fit"):
        save_diffusers(out, TINY.clone(num_res_blocks=2), params, 8)
    with refused("betas must lie"):
        save_diffusers(out, TINY, params, 8, beta_start=0.0)
    with refused("beta_schedule must be one of .* got 'sigmoid'"):
        save_diffusers(out, TINY, params, 8, schedule="sigmoid")
    with refused("prediction must be one of eps, v, x0; got 'epsilon'"):
        save_diffusers(out, TINY, params, 8, prediction="epsilon")
    with refused("schedule must have at least 2 steps"):
        save_diffusers(out, TINY, params, 8, num_steps=1, zero_terminal_snr=True)
    assert not out.exists()


# Schedules


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"num_train_timesteps": 100, "beta_end": 0.05},
        {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
        {"rescale_betas_zero_snr": True},
        {"rescale_betas_zero_snr": True, "beta_schedule": "squaredcos_cap_v2"},
        {"rescale_betas_zero_snr": True, "trained_betas": [0.1, 0.2, 0.3]},
    ],
)
def test_schedules_are_diffusers_own(config):
    diffusers = pytest.importorskip("diffusers")
    want = diffusers.DDPMScheduler(**config).alphas_cumprod.numpy()
    got = schedule_from_diffusers(config).alphas_cumprod
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-6)  # their table is a float32 product


@pytest.mark.parametrize(
    "config, message",
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule must be one of .* got 'sigmoid'"),
        ({"rescale_betas_zero_snr": True, "num_train_timesteps": 1}, "at least 2 steps"),
    ],
)
def test_other_schedules_are_refused(config, message):
    with refused(message):
        schedule_from_diffusers(config)


@pytest.mark.parametrize(
    "config, before",
    [
        ({}, linear_schedule()),
        ({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
         scaled_linear_schedule()),
        ({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50}, cosine_schedule(50)),
        ({"trained_betas": [0.1, 0.2, 0.3]}, schedule_from_betas([0.1, 0.2, 0.3])),
    ],
)  # fmt: skip
def test_betas_rescaled_to_zero_snr(config, before):
    """Lin et al. 2023, algorithm 1, of whatever betas the other entries give."""
    got = schedule_from_diffusers(config | {"rescale_betas_zero_snr": True})
    np.testing.assert_array_equal(got.alphas_cumprod, zero_terminal_snr(before).alphas_cumprod)
    assert got.alphas_cumprod[-1] == 0
    plain = schedule_from_diffusers(config | {"rescale_betas_zero_snr": False})
    np.testing.assert_array_equal(plain.alphas_cumprod, before.alphas_cumprod)


# Predictions


@pytest.mark.parametrize(
    "config, want",
    [
        ({}, "eps"),
        ({"prediction_type": "epsilon"}, "eps"),
        ({"prediction_type": "v_prediction"}, "v"),
        ({"prediction_type": "sample"}, "x0"),
        ({"predict_epsilon": True}, "eps"),
        ({"predict_epsilon": False}, "x0"),
        ({"predict_epsilon": None}, "eps"),
        ({"predict_epsilon": None, "prediction_type": "v_prediction"}, "v"),
        ({"predict_epsilon": False, "prediction_type": "sample"}, "x0"),
    ],
)
def test_predictions_are_read(config, want):
    assert prediction_from_diffusers(config) == want
    schedule_from_diffusers(config)  # whatever the network predicts


@pytest.mark.parametrize(
    "config, message",
    [
        ({"prediction_type": "flow_prediction"},
         "prediction_type must be one of epsilon, v_prediction, sample; got 'flow_prediction'"),
        ({"prediction_type": None}, "prediction_type must be one of .* got None"),
        ({"predict_epsilon": False, "prediction_type": "v_prediction"},
         "predict_epsilon must agree with prediction_type, .*'v_prediction'; got False"),
        ({"predict_epsilon": True, "prediction_type": "sample"}, "predict_epsilon must agree"),
    ],
)  # fmt: skip
def test_other_predictions_are_refused(config, message):
    with refused(message):
        prediction_from_diffusers(config)


@pytest.mark.parametrize(
    "prediction, theirs", [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")]
)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_predictions_and_zero_snr_are_written(tmp_path, prediction, theirs, zero_snr):
    params = load_diffusers(write(tmp_path / "theirs")).params
    save_diffusers(
        tmp_path, TINY, params, 8, prediction=prediction, zero_terminal_snr=zero_snr, num_steps=50
    )
    scheduler = load_diffusers(tmp_path).scheduler
    assert scheduler["prediction_type"] == theirs
    assert scheduler.get("rescale_betas_zero_snr", False) is zero_snr
    assert prediction_from_diffusers(scheduler) == prediction
    want = zero_terminal_snr(linear_schedule(50)) if zero_snr else linear_schedule(50)
    got = schedule_from_diffusers(scheduler)
    np.testing.assert_array_equal(got.alphas_cumprod, want.alphas_cumprod)
    np.testing.assert_array_equal(got.noise_variances, want.noise_variances)


def test_a_scheduler_of_the_defaults_has_no_new_entries(tmp_path):
    save_diffusers(tmp_path, TINY, load_diffusers(write(tmp_path / "theirs")).params, 8)
    want = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": "linear",
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "clip_sample": False,
        "prediction_type": "epsilon",
        "variance_type": "fixed_small",
        "timestep_spacing": "leading",
        "steps_offset": 0,
    }
    text = (tmp_path / "scheduler" / "scheduler_config.json").read_text()
    assert text == json.dumps(want, indent=2) + "\n"


# Against diffusers itself


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A network of diffusers' own making with random weights, its folder, and diffusers."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    config = {k: v for k, v in CONFIG.items() if not k.startswith("_")}
    network = diffusers.UNet2DModel(**config).eval()
    with torch.no_grad():  # fresh group norms are the identity; make each layer count
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("theirs")
    network.save_pretrained(folder)
    return network, folder, diffusers


def their_output(network, x, t, **kwargs):
    import torch

    with torch.inference_mode():
        x = torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)
        return network(x, torch.from_numpy(np.array(t)), **kwargs).sample.permute(0, 2, 3, 1)


def test_a_folder_by_diffusers_gives_the_same_output(theirs):
    network, folder, _ = theirs
    model, params, image_size, _, _ = load_diffusers(folder)
    x = jax.random.normal(jax.random.key(1), (2, image_size, image_size, 3))
    t = np.array([3, 999], np.int32)
    want = their_output(network, x, t).numpy()
    got = jax.jit(model.apply)({"params": params}, x, t)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * want.std())


def test_class_embeddings_convert_too(theirs, tmp_path):
    _, _, diffusers = theirs
    model = TINY.clone(num_classes=4)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((8, 8, 3), np.float32), 0, 0)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.float32(rng.standard_normal(a.shape)), shapes["params"])
    save_diffusers(tmp_path, model, params, 8)
    network = diffusers.UNet2DModel.from_pretrained(tmp_path, subfolder="unet")

    import torch

    x, t, label = (
        np.float32(rng.standard_normal((2, 8, 8, 3))),
        np.array([3, 999]),
        np.array([1, 4]),
    )
    want = their_output(network, x, t, class_labels=torch.from_numpy(label)).numpy()
    got = jax.jit(model.apply)({"params": params}, x, jnp.int32(t), jnp.int32(label))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * want.std())


@pytest.mark.parametrize("pipeline_name", ["DDPMPipeline", "DDIMPipeline"])
def test_our_export_loads_as_a_pipeline(theirs, tmp_path, pipeline_name):
    network, folder, diffusers = theirs
    model, params, image_size, _, _ = load_diffusers(folder)
    save_diffusers(tmp_path, model, params, image_size, num_steps=500)
    pipeline = getattr(diffusers, pipeline_name).from_pretrained(tmp_path)
    assert pipeline.scheduler.config.num_train_timesteps == 500
    assert not pipeline.scheduler.config.clip_sample
    x = np.float32(np.random.default_rng(0).standard_normal((2, 8, 8, 3)))
    want = their_output(network, x, np.array([3, 400]))
    got = their_output(pipeline.unet, x, np.array([3, 400]))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_our_export_steps_as_theirs(theirs, tmp_path, prediction):
    """The data that their scheduler finds in a network's output is the one our names promise."""
    import torch

    _, folder, diffusers = theirs
    model, params, image_size, _, _ = load_diffusers(folder)
    save_diffusers(
        tmp_path, model, params, image_size, prediction=prediction, zero_terminal_snr=True
    )
    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert float(scheduler.alphas_cumprod[-1]) == 0
    rng = np.random.default_rng(0)
    x0, eps = rng.standard_normal((2, 1, 3, 8, 8), np.float32)
    schedule = schedule_from_diffusers(load_diffusers(tmp_path).scheduler)
    ab = float(schedule.alpha_bar(500))
    x_t = ab**0.5 * x0 + (1 - ab) ** 0.5 * eps
    output = {"eps": eps, "x0": x0, "v": ab**0.5 * eps - (1 - ab) ** 0.5 * x0}[prediction]
    scheduler.set_timesteps(10)
    step = scheduler.step(torch.from_numpy(output), 500, torch.from_numpy(x_t))
    np.testing.assert_allclose(step.pred_original_sample, x0, rtol=0, atol=1e-3)


@pytest.mark.parametrize("clip", [False, True])
def test_ddim_draws_the_same_images_as_their_pipeline(theirs, tmp_path, clip):
    import torch

    _, folder, diffusers = theirs
    model, params, image_size, _, _ = load_diffusers(folder)
    # Little noise, since an untrained network would blow up a state of much noise out of all range.
    save_diffusers(tmp_path, model, params, image_size, beta_end=1e-3, clip_sample=clip)
    pipeline = diffusers.DDIMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    x_T = torch.randn((4, 3, 8, 8), generator=torch.Generator().manual_seed(5))
    want = pipeline(
        4, torch.Generator().manual_seed(5), eta=0.0, num_inference_steps=10, output_type="np"
    ).images

    schedule = schedule_from_diffusers(load_diffusers(tmp_path).scheduler)
    network = lambda x, t: model.apply({"params": params}, x, t)  # noqa: E731
    x_0 = samplers.sample(
        jax.random.key(0),
        clip_x0_keep_eps(network, schedule) if clip else network,
        schedule,
        jnp.asarray(x_T.permute(0, 2, 3, 1).numpy()),
        ddim_timesteps(schedule.num_steps, 10),
    )
    inside = np.mean((want > 0) & (want < 1))
    assert inside > 0.2  # images all black and white would prove little
    np.testing.assert_allclose(jnp.clip(x_0 / 2 + 0.5, 0, 1), want, rtol=0, atol=1e-3)
