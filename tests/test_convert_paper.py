"""The paper code's checkpoints: names, layouts, file forms, and files that must be refused."""

import functools
import json
import pathlib
import pickle
import re
import sys

import jax
import numpy as np
import pytest
from conftest import golden_param
from refusals import refused

from ddim_jax.convert import flax_to_paper, load_paper_checkpoint, paper_to_flax
from ddim_jax.unet import UNet

MODELS = {  # the networks of unet_ermongroup_params.json
    "tiny": UNet(channels=32, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(4,)),
    "cifar10": UNet(),
    "celeba": UNet(channel_mults=(1, 2, 2, 2, 4)),
    "lsun": UNet(channel_mults=(1, 1, 2, 2, 4, 4)),
}
TINY = MODELS["tiny"]


def state_dict(shared, name):
    spec = json.loads(shared("golden/unet_ermongroup_params.json").read_text())[name]
    return {key: golden_param(key, tuple(shape)) for key, shape in spec["params"].items()}


@pytest.mark.parametrize(
    "name, num_tensors, image_size",
    [
        ("tiny", 144, 8),
        ("cifar10", 328, 32),
        pytest.param("celeba", 390, 64, marks=pytest.mark.slow),
        pytest.param("lsun", 450, 256, marks=pytest.mark.slow),
    ],
)
def test_round_trip_is_bitwise(shared, name, num_tensors, image_size):
    want = state_dict(shared, name)
    assert len(want) == num_tensors
    got = flax_to_paper(paper_to_flax(want, MODELS[name], image_size))
    assert got.keys() == want.keys()
    for key in want:
        np.testing.assert_array_equal(got[key], want[key], err_msg=key)
        assert got[key].dtype == np.float32


def test_layouts():
    """(O, I, h, w) becomes (h, w, I, O) and (O, I) becomes (I, O), seen on single entries."""
    params = paper_to_flax(numbered(), TINY, 8)
    weight = numbered()["down.1.block.0.conv1.weight"]
    assert params["down_1_block_0"]["conv1"]["kernel"][2, 1, 3, 5] == weight[5, 3, 2, 1]
    weight = numbered()["mid.attn_1.q.weight"]
    assert params["mid_attn_1"]["q"]["kernel"][3, 5] == weight[5, 3, 0, 0]
    weight = numbered()["temb.dense.0.weight"]
    assert params["temb_dense_0"]["kernel"][3, 5] == weight[5, 3]


@functools.cache
def numbered():
    """Every entry of every tensor another number; shapes from our own export."""
    shapes = jax.eval_shape(TINY.init, jax.random.key(0), np.zeros((8, 8, 3), np.float32), 0)
    zeros = jax.tree.map(lambda a: np.zeros(a.shape, np.float32), shapes["params"])
    arrays = flax_to_paper(zeros)
    return {k: np.arange(a.size, dtype=np.float32).reshape(a.shape) for k, a in arrays.items()}


def test_attention_weights_may_be_matrices():
    arrays = numbered()
    matrices = {k: a[:, :, 0, 0] if a.shape[2:] == (1, 1) else a for k, a in arrays.items()}
    want, got = paper_to_flax(arrays, TINY, 8), paper_to_flax(matrices, TINY, 8)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_what_differs_is_listed():
    arrays = dict(numbered())
    del arrays["mid.attn_1.q.bias"]
    arrays["mid.attn_1.relative.bias"] = np.zeros(4, np.float32)
    arrays["conv_in.weight"] = np.zeros((32, 1, 3, 3), np.float32)
    with pytest.raises(ValueError, match="1 tensors missing, 1 left over, 1 of another") as error:
        paper_to_flax(arrays, TINY, 8)
    assert "missing mid.attn_1.q.bias (64,)" in str(error.value)
    assert "left over mid.attn_1.relative.bias (4,)" in str(error.value)
    assert "conv_in.weight is (32, 1, 3, 3), must be (32, 3, 3, 3)" in str(error.value)


def test_many_differences_are_counted():
    arrays = {k: a for k, a in numbered().items() if not k.startswith("up.")}
    num_missing = len(numbered()) - len(arrays)
    with pytest.raises(ValueError, match=f"{num_missing} tensors missing") as error:
        paper_to_flax(arrays, TINY, 8)
    assert len(re.findall(r"\n  missing up\.", str(error.value))) == 8
    assert f"and {num_missing - 8} more" in str(error.value)


def test_attention_at_another_level_does_not_fit():
    """At 16 x 16 the attention of resolution 4 would stand a level lower."""
    with refused("must be among the heights"):
        paper_to_flax(numbered(), TINY, 16)
    lower = TINY.clone(attention_resolutions=(8,))
    with refused(r"left over down\.1\.attn\.0|missing down\.0\.attn\.0"):
        paper_to_flax(numbered(), lower, 8)


# Files, which need torch


@pytest.fixture
def save(tmp_path):
    """save(content) -> path of a .ckpt with it, arrays as torch tensors."""
    torch = pytest.importorskip("torch")

    def save(content, **kwargs):
        path = tmp_path / "model.ckpt"
        tensors = jax.tree.map(
            lambda a: torch.from_numpy(a.copy()) if isinstance(a, np.ndarray) else a, content
        )
        torch.save(tensors, path, **kwargs)
        return path

    return save


def listed(raw, ema=None):
    """The list the paper's code saves."""
    optimizer = {"state": {0: {"step": 3}}, "param_groups": [{"lr": 2e-4, "betas": (0.9, 0.999)}]}
    entries = [{f"module.{k}": a for k, a in raw.items()}, optimizer, 7, 790_000]
    return entries if ema is None else [*entries, ema]


def plus_one(arrays):
    return {k: a + 1 for k, a in arrays.items()}


def assert_holds(params, want):
    jax.tree.map(np.testing.assert_array_equal, params, paper_to_flax(want, TINY, 8))


@pytest.mark.parametrize("new_file_format", [True, False])  # the published files are old ones
def test_plain_state_dict(save, new_file_format):
    path = save(numbered(), _use_new_zipfile_serialization=new_file_format)
    params, description = load_paper_checkpoint(path, TINY, 8)
    assert_holds(params, numbered())
    assert "the only weights" in description and "144 tensors" in description
    assert str(path) in description


def test_list_with_a_moving_average(save):
    raw, ema = numbered(), plus_one(numbered())
    path = save(listed(raw, ema))
    params, description = load_paper_checkpoint(path, TINY, 8)
    assert_holds(params, ema)
    assert description.startswith("EMA weights")
    params, description = load_paper_checkpoint(path, TINY, 8, weights="raw")
    assert_holds(params, raw)
    assert description.startswith("raw weights")


def test_list_without_a_moving_average(save):
    path = save(listed(numbered()))
    with refused(r"no moving average: the last of its 4 .*weights='raw'"):
        load_paper_checkpoint(path, TINY, 8)
    params, _ = load_paper_checkpoint(path, TINY, 8, weights="raw")
    assert_holds(params, numbered())


def test_half_precision_becomes_float32(save):
    torch = pytest.importorskip("torch")
    half = {k: torch.from_numpy(a).bfloat16() for k, a in numbered().items()}
    params, _ = load_paper_checkpoint(save(half), TINY, 8)
    assert_holds(params, {k: a.float().numpy() for k, a in half.items()})


@pytest.mark.parametrize(
    "content, message",
    [
        ({"state_dict": {"a": 1}, "epoch": 3}, "neither a state dict nor a list.* holds a dict"),
        ([1, 2], "neither a state dict nor a list"),
        ([], "neither a state dict nor a list"),
    ],
)
def test_other_forms_are_refused(save, content, message):
    with refused(message):
        load_paper_checkpoint(save(content), TINY, 8)


def test_misfits_name_the_file(save):
    arrays = dict(numbered())
    del arrays["conv_out.bias"]
    path = save(arrays)
    with refused(f"(?s){path}.*missing conv_out.bias"):
        load_paper_checkpoint(path, TINY, 8)


def test_unknown_choice_of_weights(save):
    with refused("weights must be 'ema' or 'raw'; got 'best'"):
        load_paper_checkpoint(save(numbered()), TINY, 8, weights="best")


class Malicious:
    """Pickled, it becomes a call that creates the file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("by", ["torch.save", "pickle.dump"])
def test_a_malicious_pickle_is_never_executed(save, tmp_path, by):
    torch = pytest.importorskip("torch")
    trap, path = tmp_path / "trap", tmp_path / "evil.ckpt"
    content = {"conv_in.weight": Malicious(trap)}
    with path.open("wb") as file:
        torch.save(content, file) if by == "torch.save" else pickle.dump(content, file, protocol=2)
    with refused("could run code"):
        load_paper_checkpoint(path, TINY, 8)
    assert not trap.exists()
    if by == "pickle.dump":  # the trap works, so the test could fail
        pickle.loads(path.read_bytes())
        assert trap.exists()


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("new_file_format", [True, False])
def test_a_truncated_file_is_named(save, fraction, new_file_format):
    path = save(numbered(), _use_new_zipfile_serialization=new_file_format)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(fraction * len(whole))])
    with refused(f"{path} was refused: it is damaged"):
        load_paper_checkpoint(path, TINY, 8)


def test_an_absent_file(tmp_path):
    pytest.importorskip("torch")
    with pytest.raises(FileNotFoundError):
        load_paper_checkpoint(tmp_path / "none.ckpt", TINY, 8)


def test_without_torch_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"ddim_jax\[convert\]"):
        load_paper_checkpoint(tmp_path / "model.ckpt", TINY, 8)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(value):
    arrays = dict(numbered())
    arrays["conv_in.bias"] = np.full(arrays["conv_in.bias"].shape, value)
    with pytest.raises(ValueError, match=r"finite; 1 of \d+ arrays .* first conv_in\.bias"):
        paper_to_flax(arrays, TINY, 8)
