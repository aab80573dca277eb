"""Which weights of a diffusers folder are taken: sets, variants, shards and prefixed names.

Each set has weights of its own, so that the values say which was read.
"""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from refusals import refused
from test_convert_diffusers import CONFIG, TINY, WEIGHTS, tiny_tensors, write

from ddim_jax.convert import load_diffusers, open_diffusers, save_diffusers
from ddim_jax.convert.prefixes import without_prefix

# What diffusers 0.3x's EMAModel.save_pretrained adds to the network's config.json.
EMA_FIELDS = {
    "decay": 0.9999,
    "min_decay": 0.0,
    "optimization_step": 4,
    "update_after_step": 0,
    "use_ema_warmup": False,
    "inv_gamma": 1.0,
    "power": 0.75,
}
RAW, EMA, OTHER = 1.0, 2.0, 3.0


def shifted(by):
    """The tensors of a set that can be told from the others."""
    return {name: tensor + np.float32(by) for name, tensor in tiny_tensors().items()}


def taken(folder, weights="ema"):
    """By how much the set that was read is shifted, and what was said of it."""
    checkpoint = load_diffusers(folder, weights)
    bias = tiny_tensors()["conv_in.bias"]
    shift = np.asarray(checkpoint.params["conv_in"]["bias"]) - bias
    np.testing.assert_allclose(shift, shift[0], atol=1e-2)
    return round(float(shift[0])), checkpoint.description


def both(folder, ema_name="unet_ema", fields=EMA_FIELDS):
    write(folder / "unet", tensors=shifted(RAW))
    write(folder / ema_name, CONFIG | fields, shifted(EMA))
    return folder


@pytest.mark.parametrize("fields", [EMA_FIELDS, {}])
def test_of_a_raw_and_an_averaged_folder_the_one_asked_for_is_taken(tmp_path, fields):
    both(tmp_path, fields=fields)
    for weights, want, other in (("ema", EMA, "unet/"), ("raw", RAW, "unet_ema/")):
        got, said = taken(tmp_path, weights)
        assert got == want
        assert f"the {weights} weights; also there and not read: {other}{WEIGHTS}" in said
        found = open_diffusers(tmp_path, weights)
        assert found.kind == weights
        assert found.file == f"{'unet_ema' if weights == 'ema' else 'unet'}/{WEIGHTS}"
    # The folder of a network given by itself: its brother says what it is.
    assert taken(tmp_path / "unet_ema")[0] == EMA and taken(tmp_path / "unet", "raw")[0] == RAW
    with refused("must hold the ema weights asked for; it has the raw ones alone.*or give"):
        load_diffusers(tmp_path / "unet")
    with refused("must hold the raw weights asked for; it has the ema ones alone"):
        load_diffusers(tmp_path / "unet_ema", "raw")


def test_an_average_alone_is_no_raw_set_and_an_unlabelled_one_is_either(tmp_path):
    alone = write(tmp_path / "any_name", CONFIG | EMA_FIELDS, shifted(EMA))
    assert taken(alone)[0] == EMA
    with refused("must hold the raw weights asked for"):
        load_diffusers(alone, "raw")
    plain = write(tmp_path / "plain", tensors=shifted(RAW))
    for weights in ("ema", "raw"):
        got, said = taken(plain, weights)
        assert got == RAW and "nothing says whether they are averaged" in said
        assert open_diffusers(plain, weights).kind is None
    with refused("weights must be one of ema, raw; got 'both'"):
        load_diffusers(plain, "both")


def put(folder, name, tensors):
    safetensors.numpy.save_file(tensors, folder / name)


def test_full_precision_in_safetensors_comes_first_and_what_is_left_is_named(tmp_path):
    write(tmp_path, tensors=shifted(RAW))
    half = {name: tensor.astype(np.float16) for name, tensor in shifted(OTHER).items()}
    variant = WEIGHTS.replace(".", ".fp16.", 1)
    put(tmp_path, variant, half)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"never opened")
    got, said = taken(tmp_path)
    assert got == RAW
    assert f"not read: diffusion_pytorch_model.bin, {variant}" in said
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / "diffusion_pytorch_model.bin").unlink()
    got, said = taken(tmp_path)
    assert got == OTHER and variant in said
    # Half precision is read as it is, into float32.
    kernel = load_diffusers(tmp_path).params["temb_dense_0"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, half["time_embedding.linear_1.weight"].T.astype("f4"))


@pytest.mark.parametrize("variant, labelled", [("non_ema", RAW), ("ema", EMA)])
def test_a_variant_that_names_one_set_names_the_other(tmp_path, variant, labelled):
    plain = RAW + EMA - labelled
    write(tmp_path, tensors=shifted(plain))
    put(tmp_path, WEIGHTS.replace(".", f".{variant}.", 1), shifted(labelled))
    assert (taken(tmp_path)[0], taken(tmp_path, "raw")[0]) == (EMA, RAW)


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_shards_are_read_by_their_index(tmp_path, variant):
    write(tmp_path).joinpath(WEIGHTS).unlink()
    stem = "diffusion_pytorch_model" + (f".{variant}" if variant else "")
    shards = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    tensors = shifted(EMA)
    names = sorted(tensors)
    weight_map = {name: shards[i % 2] for i, name in enumerate(names)}
    for shard in shards:
        put(tmp_path, shard, {k: tensors[k] for k in names if weight_map[k] == shard})
    end = f".index.{variant}.json" if variant else ".index.json"
    index = tmp_path / f"{WEIGHTS}{end}"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert taken(tmp_path)[0] == EMA
    assert open_diffusers(tmp_path).file == index.name

    index.write_text(json.dumps({"weight_map": weight_map | {"absent": shards[0]}}))
    with refused("names 1 tensors that its shards lack, such as absent"):
        load_diffusers(tmp_path)
    index.write_text(json.dumps({"weight_map": weight_map | {"a": "../other.safetensors"}}))
    with refused(r"names the shard \.\./other\.safetensors, which is not there"):
        load_diffusers(tmp_path)
    index.write_text("{}")
    with refused("must have weight_map"):
        load_diffusers(tmp_path)


def test_what_is_there_is_listed_where_nothing_fits(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "model.pt").write_bytes(b"")
    (tmp_path / "sub" / "weights.ckpt").write_bytes(b"")
    with refused(r"none of .*config\.json.* exists; .* are model\.pt, sub/weights\.ckpt"):
        load_diffusers(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with refused(r"none of .* exists, nor a variant .* are config\.json, model\.pt"):
        load_diffusers(tmp_path)


# ------------------------------------------------------------------------------ names in a file


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "unet.", "module._orig_mod."])
def test_a_wrappers_prefix_goes(tmp_path, prefix):
    write(tmp_path, tensors={f"{prefix}{k}": v for k, v in shifted(EMA).items()})
    assert taken(tmp_path)[0] == EMA == taken(tmp_path, "raw")[0]


@pytest.mark.parametrize(
    "raw, ema",
    [("unet.", "ema_model."), ("", "ema_model."), ("online_model.", "ema_model.module.")],
)
def test_of_two_sets_in_a_file_the_one_asked_for_is_taken(tmp_path, raw, ema):
    tensors = {f"{raw}{k}": v for k, v in shifted(RAW).items()}
    tensors |= {f"{ema}{k}": v for k, v in shifted(EMA).items()}
    tensors |= {"initted": np.array([1.0], "f4")} if raw == "online_model." else {}
    write(tmp_path, tensors=tensors)
    for weights, want in (("ema", EMA), ("raw", RAW)):
        got, said = taken(tmp_path, weights)
        assert got == want and f"the {weights} weights by their names" in said
        assert "also there and not read" in said
        assert open_diffusers(tmp_path, weights).kind == weights


def test_a_mixture_is_left_alone_and_an_average_is_no_raw_set():
    mixed = {"module.a": 1, "b": 2}
    assert without_prefix(mixed, "ema") == (mixed, None, "")
    assert without_prefix({"ema_model.a": 1}, "ema") == ({"a": 1}, "ema", "")
    with refused("must hold the raw weights .* the ema ones alone"):
        without_prefix({"ema_model.a": 1}, "raw")


# ------------------------------------------------------------------------------------- writing


def test_a_written_file_has_the_mode_of_every_other_and_is_whole(tmp_path, monkeypatch):
    params = load_diffusers(write(tmp_path / "theirs")).params
    before = os.umask(0o027)
    try:
        save_diffusers(tmp_path / "ours", TINY, params, 8)
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "ours").rglob("*.*")}
    assert modes == {0o640}

    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    path = tmp_path / "ours" / "unet" / WEIGHTS
    whole = path.read_bytes()
    with pytest.raises(OSError, match="no space"):
        save_diffusers(tmp_path / "ours", TINY, jax.tree.map(lambda a: a + 1, params), 8)
    assert path.read_bytes() == whole


# ------------------------------------------------------------------------------------- classes


def with_classes(rows):
    return shifted(0) | {"class_embedding.weight": np.arange(rows * 32, dtype="f4").reshape(-1, 32)}


def test_ten_rows_are_ten_classes_unless_the_last_is_said_to_be_none(tmp_path):
    write(tmp_path, CONFIG | {"num_class_embeds": 10}, with_classes(10))
    found = open_diffusers(tmp_path)
    model = found.checkpoint.model
    assert (model.num_classes, model.no_class_row, found.unconditional) == (10, False, False)
    rows = found.checkpoint.params["label_embed"]["embedding"]
    np.testing.assert_array_equal(rows, with_classes(10)["class_embedding.weight"])
    x, params = jnp.zeros((8, 8, 3)), {"params": found.checkpoint.params}
    assert np.isfinite(model.apply(params, x, 3, 9)).all()
    assert np.isnan(model.apply(params, x, 3, jnp.array(10))).all()
    with refused(r"label must be in \[0, 9\]; got 10.*no row for 'no class'"):
        model.apply(params, x, 3, 10)

    found = open_diffusers(tmp_path, last_class_is_null=True)
    model = found.checkpoint.model
    assert (model.num_classes, model.no_class_row, found.unconditional) == (9, True, True)
    with refused("last_class_is_null must be left out for a network without classes"):
        load_diffusers(write(tmp_path / "plain"), last_class_is_null=True)


@pytest.mark.parametrize("null, trained", [(False, False), (True, True), (True, False)])
def test_our_export_says_what_its_last_class_means(tmp_path, null, trained):
    write(tmp_path / "theirs", CONFIG | {"num_class_embeds": 10}, with_classes(10))
    model, params, *_ = load_diffusers(tmp_path / "theirs", last_class_is_null=null)
    save_diffusers(tmp_path / "ours", model, params, 8, unconditional=trained)
    config = json.loads((tmp_path / "ours" / "unet" / "config.json").read_text())
    assert config["num_class_embeds"] == 10
    found = open_diffusers(tmp_path / "ours")
    assert (found.checkpoint.model, found.unconditional) == (model, trained)
