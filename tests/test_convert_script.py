"""experiments/convert.py: it leaves a workdir like any other, and overwrites nothing."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import edits
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tyro")

import convert
import presets
import sample
from convert import ConvertConfig
from refusals import refused
from small_runs import SMALL, newest_step

from ddim_jax.checkpoint import Checkpointer
from ddim_jax.convert import flax_to_paper, save_diffusers
from ddim_jax.files import only_one_process
from ddim_jax.runs import ModelConfig, load_trained, read_config
from ddim_jax.runs.folder import write_config
from ddim_jax.unet import UNet

ROOT = pathlib.Path(__file__).resolve().parents[1]
UNITS = UNet(
    channels=8, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(4,), norm_groups=4
)
PAPER = ModelConfig(  # as small as the paper's 32 groups allow
    channels=32, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(16,)
)


@functools.cache
def weights(model: UNet, image_size: int, seed: int = 0):
    shape = (image_size, image_size, model.image_channels)
    return jax.jit(model.init)(jax.random.key(seed), np.zeros(shape, np.float32), 0)["params"]


def assert_same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.fixture
def folder(tmp_path):
    """A diffusers folder of the small network."""
    save_diffusers(tmp_path / "published", UNITS, weights(UNITS, 8), 8, schedule="scaled_linear")
    return tmp_path / "published"


def from_diffusers(folder, workdir, **changes):
    convert.main(
        ConvertConfig(workdir=str(workdir), source="diffusers", path=str(folder), **changes)
    )


def test_a_converted_folder_samples_and_converts_back_to_the_same_files(folder, tmp_path, capsys):
    workdir, back = tmp_path / "workdir", tmp_path / "back"
    from_diffusers(folder, workdir)
    trained = load_trained(workdir)
    assert_same(trained.params.network, weights(UNITS, 8))
    assert trained.weights_hash in capsys.readouterr().out

    sample.main(
        sample.SampleConfig(
            workdir=str(workdir), out=str(tmp_path / "s"), num_images=2, num_sample_steps=2
        )
    )
    assert (tmp_path / "s" / "images" / "00001.png").is_file()
    assert "converted ema weights, S = 2" in capsys.readouterr().out

    convert.main(ConvertConfig(workdir=str(workdir), target="diffusers", out=str(back)))
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 4  # the index, the scheduler, the network, its weights
    for file in files:
        assert (back / file).read_bytes() == (folder / file).read_bytes(), file


def test_config_json_says_how_to_sample_and_what_was_taken(folder, tmp_path):
    from_diffusers(folder, tmp_path / "w")
    config = read_config(tmp_path / "w")
    assert config["image_shape"] == [8, 8, 3]
    assert config["model"]["attention_resolutions"] == [4]
    assert config["schedule"]["name"] == "scaled_linear"
    assert config["spacing"] == "uniform"  # diffusers' "leading"
    assert config["rounding"] == "nearest"
    origin = config["converted_from"]
    assert (origin["format"], origin["path"], origin["weights"]) == (
        "diffusers", str(folder), "ema")  # fmt: skip
    assert "144 tensors" in origin["taken"]
    assert origin["weights_hash"] == load_trained(tmp_path / "w").weights_hash


@pytest.mark.parametrize("name, ours", [("trailing", "trailing"), ("linspace", "linspace")])
def test_the_schedulers_own_sub_sequence_is_kept_unless_another_is_given(
    folder, tmp_path, name, ours
):
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"timestep_spacing": name}))
    from_diffusers(folder, tmp_path / "w")
    assert read_config(tmp_path / "w")["spacing"] == ours
    from_diffusers(folder, tmp_path / "q", spacing="quadratic")
    assert read_config(tmp_path / "q")["spacing"] == "quadratic"


@pytest.mark.parametrize(
    "name, spacing, says",
    [
        ("ddpm-cifar10-32", "quadratic", "the paper's for cifar10, appendix D.2, by the name"),
        ("ddpm-ema-bedroom-256", "uniform", "the paper's for bedroom, appendix D.2, by the name"),
        ("mine", "uniform", "timestep_spacing of its scheduler"),
        ("ddpm-cifar100-32", "uniform", "timestep_spacing of its scheduler"),
        ("ddpm-celebahq-256", "uniform", "timestep_spacing of its scheduler"),
    ],
)
def test_a_published_network_gets_the_sub_sequence_of_the_papers_numbers(
    folder, tmp_path, name, spacing, says, capsys
):
    """As the paper's appendix D.2 has it: quadratic for CIFAR-10, linear for the others."""
    from_diffusers(shutil.copytree(folder, tmp_path / name), tmp_path / "w")
    config = read_config(tmp_path / "w")
    assert config["spacing"] == spacing
    assert config["converted_from"]["spacing_from"].startswith(says)
    assert f"{spacing} sub-sequence ({says}" in capsys.readouterr().out


def test_the_same_file_again_is_fine_and_another_model_is_refused(folder, tmp_path):
    from_diffusers(folder, tmp_path / "w")
    before = (tmp_path / "w" / "config.json").read_text()
    from_diffusers(folder, tmp_path / "w")
    # Other weights of the same network, in the same place: only their hash tells.
    save_diffusers(folder, UNITS, weights(UNITS, 8, seed=1), 8, schedule="scaled_linear")
    with pytest.raises(ValueError, match=r"configuration: converted_from\.weights_hash is"):
        from_diffusers(folder, tmp_path / "w")
    assert (tmp_path / "w" / "config.json").read_text() == before
    assert_same(load_trained(tmp_path / "w").params.network, weights(UNITS, 8))


def test_a_run_in_the_folder_is_left_alone(folder, tmp_path):
    """Whether a process is at it, or it stands still."""
    run = tmp_path / "run"
    with only_one_process(run), refused("run is in use by another process"):
        from_diffusers(folder, run)
    assert not (run / "config.json").exists() and not (run / "checkpoints").exists()
    write_config(run, SMALL.spec((8, 8, 1)).describe())
    with Checkpointer(run / "checkpoints") as checkpointer:
        checkpointer.save(3, {"params": {"w": jnp.ones(2)}})
    before = (run / "config.json").read_text()
    with refused("configuration: .*converted_from"):
        from_diffusers(folder, run)
    assert (run / "config.json").read_text() == before and newest_step(run) == 3


def test_the_set_that_was_not_taken_is_refused_by_name(folder, tmp_path):
    from_diffusers(folder, tmp_path / "w", weights="raw")
    assert_same(load_trained(tmp_path / "w", "raw").params.network, weights(UNITS, 8))
    with pytest.raises(ValueError, match=r"weights must be 'raw' for .*got 'ema'"):
        load_trained(tmp_path / "w")


def test_the_record_says_which_file_which_set_and_what_is_not_followed(folder, tmp_path, capsys):
    """A raw and an averaged folder side by side, as diffusers' EMAModel leaves them."""
    shutil.copytree(folder / "unet", folder / "unet_ema")
    averaged = weights(UNITS, 8, seed=1)
    save_diffusers(tmp_path / "other", UNITS, averaged, 8)
    name = "unet/diffusion_pytorch_model.safetensors"
    shutil.copy(tmp_path / "other" / name, folder / "unet_ema")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    changed = json.loads(scheduler.read_text()) | {"clip_sample": True, "steps_offset": 1}
    scheduler.write_text(json.dumps(changed))
    for kind, want, place in (("ema", averaged, "unet_ema"), ("raw", weights(UNITS, 8), "unet")):
        workdir = tmp_path / kind
        from_diffusers(folder, workdir, weights=kind)
        assert_same(load_trained(workdir, kind).params.network, want)
        origin = read_config(workdir)["converted_from"]
        assert origin["file"] == name.replace("unet", place) and origin["set"] == kind
        assert origin["scheduler"] == changed
        assert origin["not_obeyed"] == {"clip_sample": True, "steps_offset": 1}
        out = capsys.readouterr().out
        assert f"the {kind} weights; also there and not read: " in out
        assert "does not follow: clip_sample True, steps_offset 1." in out
    # A workdir of before these were written down is the same workdir.
    config = edits.content(tmp_path / "raw" / "config.json")
    for key in ("file", "set", "scheduler", "not_obeyed"):
        del config["converted_from"][key]
    (tmp_path / "raw" / "config.json").write_text(json.dumps(config))
    from_diffusers(folder, tmp_path / "raw", weights="raw")


def test_a_scheduler_of_another_process_leaves_no_workdir(folder, tmp_path):
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}')
    with pytest.raises(ValueError, match=r"FlowMatchEulerDiscreteScheduler.*flow matching"):
        from_diffusers(folder, tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_guidance_needs_a_last_class_that_is_said_to_be_none(tmp_path, capsys):
    model = UNITS.clone(num_classes=3, no_class_row=False)
    shape = np.zeros((8, 8, 3), np.float32)
    params = jax.jit(model.init)(jax.random.key(0), shape, 0, 0)["params"]
    save_diffusers(tmp_path / "published", model, params, 8)

    from_diffusers(tmp_path / "published", tmp_path / "plain")
    assert "3 classes without 'no class'" in capsys.readouterr().out
    run = load_trained(tmp_path / "plain")
    assert run.spec.num_classes == 3
    with pytest.raises(ValueError, match="guidance_scale must be 1 for a network without a row"):
        run.denoiser(0, 2.0)
    out = tmp_path / "samples"
    with pytest.raises(ValueError, match="guidance_scale must be 1 for a network without a row"):
        sample.main(sample.SampleConfig(workdir=str(tmp_path / "plain"), out=str(out),
                                        guidance_scale=3.0))  # fmt: skip
    assert not out.exists()

    from_diffusers(tmp_path / "published", tmp_path / "null", last_class_is_null=True)
    run = load_trained(tmp_path / "null")
    assert run.spec.num_classes == 2
    x, t = jax.random.normal(jax.random.key(0), (2, 8, 8, 3)), jnp.asarray(500)
    apply = jax.jit(model.apply)
    cond, none = (apply({"params": params}, x, t, label) for label in (1, 2))
    got = jax.jit(run.denoiser(1, 3.0))(x, t)
    np.testing.assert_allclose(got, none + 3 * (cond - none), atol=1e-5)

    # And back: as many rows, and what the last means.
    for name in ("plain", "null"):
        back, again = tmp_path / f"{name}-back", tmp_path / f"{name}-again"
        convert.main(ConvertConfig(workdir=str(tmp_path / name), target="diffusers", out=str(back)))
        from_diffusers(back, again)
        assert load_trained(again).spec == load_trained(tmp_path / name).spec

    # Converted before it was written down: the last class was taken for none, whatever it was.
    config = edits.content(tmp_path / "null" / "config.json")
    assert config.pop("unconditional") is True
    (tmp_path / "null" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"not known to be trained.*convert them again"):
        load_trained(tmp_path / "null").denoiser(1, 3.0)


def test_a_schedule_without_a_formula_is_refused(folder, tmp_path):
    scheduler = folder / "scheduler" / "scheduler_config.json"
    betas = np.linspace(0.001, 0.1, 10).tolist()
    scheduler.write_text(json.dumps({"trained_betas": betas}))
    with pytest.raises(ValueError, match="trained_betas must be null"):
        from_diffusers(folder, tmp_path / "w")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, "one of --from and --to"),
        ({"source": "ddim", "target": "ddim"}, "one of --from and --to"),
        ({"source": "diffusers"}, "path must be given"),
        ({"target": "diffusers"}, "out must be given"),
        ({"target": "diffusers", "out": "."}, "out must not exist"),
        ({"target": "diffusers", "out": "new"}, "has no config.json"),
    ],
)
def test_what_does_not_go_together_is_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert.main(ConvertConfig(workdir=str(tmp_path / "w"), **change))
    assert not (tmp_path / "w").exists()


def test_the_paper_has_no_network_with_other_groups(folder, tmp_path):
    from_diffusers(folder, tmp_path / "w")
    out = tmp_path / "new.ckpt"
    with pytest.raises(ValueError, match="norm_groups must be 32"):
        convert.main(ConvertConfig(workdir=str(tmp_path / "w"), target="ddim", out=str(out)))
    assert not out.exists()


def test_a_damaged_file_ends_in_one_line_with_exit_code_2(folder, tmp_path):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    done = subprocess.run(
        [sys.executable, "experiments/convert.py", "--from", "diffusers", "--path", str(folder),
         "--workdir", str(tmp_path / "w")],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert str(file) in done.stderr and "damaged" in done.stderr
    assert not (tmp_path / "w").exists()


# The paper's files, which need torch


@pytest.fixture
def small_cifar10(monkeypatch):
    """The preset "cifar10" with a network that converts in a second; returns that network."""
    label, preset = presets.PRESETS["cifar10"]
    small = dataclasses.replace(preset, model=PAPER)
    monkeypatch.setitem(presets.PRESETS, "cifar10", (label, small))
    return PAPER.make(3)


def test_the_papers_list_keeps_the_set_asked_for_and_comes_back_bitwise(small_cifar10, tmp_path):
    torch = pytest.importorskip("torch")
    raw, ema = (weights(small_cifar10, 32, seed) for seed in (0, 1))
    to_tensors = lambda params: {k: torch.tensor(a) for k, a in flax_to_paper(params).items()}  # noqa: E731
    raw_dict = {f"module.{name}": tensor for name, tensor in to_tensors(raw).items()}
    path = tmp_path / "ckpt.pth"
    torch.save([raw_dict, {"state": {}}, 7, 790_000, to_tensors(ema)], path)

    for name, want in [("ema", ema), ("raw", raw)]:
        workdir, out = tmp_path / name, tmp_path / f"{name}.ckpt"
        convert.main(
            ConvertConfig(workdir=str(workdir), source="ddim", path=str(path), weights=name)
        )
        assert_same(load_trained(workdir, name).params.network, want)
        config = read_config(workdir)
        assert config["spacing"] == "quadratic" and config["image_shape"] == [32, 32, 3]
        assert config["converted_from"]["taken"].lower().startswith(name)
        assert len(config["converted_from"]["sha256"]) == 64
        convert.main(ConvertConfig(workdir=str(workdir), target="ddim", out=str(out), weights=name))
        back = torch.load(out, weights_only=True)
        assert back.keys() == to_tensors(want).keys()
        assert all(torch.equal(back[key], tensor) for key, tensor in to_tensors(want).items())


def test_a_list_without_an_average_is_refused_as_ema(small_cifar10, tmp_path):
    torch = pytest.importorskip("torch")
    arrays = flax_to_paper(weights(small_cifar10, 32))
    path = tmp_path / "ckpt.pth"
    torch.save([{k: torch.tensor(a) for k, a in arrays.items()}, {}, 7, 790_000], path)
    with pytest.raises(ValueError, match="no moving average"):
        convert.main(ConvertConfig(workdir=str(tmp_path / "w"), source="ddim", path=str(path)))
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("form", ["diffusers", "ddim"])
def test_what_cannot_be_read_is_one_valueerror(form, tmp_path):
    """No such file, or no torch to read it with."""
    path = str(tmp_path / "absent.ckpt")
    with pytest.raises(ValueError, match="absent"):
        convert.main(ConvertConfig(workdir=str(tmp_path / "w"), source=form, path=path))
