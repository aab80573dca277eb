"""The scripts, run as their users run them: training, sampling, sweeps, latents.

Each probe takes the folder that all probes of one tree share: folder/work holds the runs, the rest
is compared. `quick` trains fewer kinds of runs, none of them the digits preset as it is. `go_on` is
the cross check: runs that another tree began.
"""

from __future__ import annotations

import json
import pathlib
import re
import shutil
from typing import Any

import jax
import layout
import numpy as np
import orbax.checkpoint as ocp
from parts import on_two_processes, part, script

LOG = "--log-every 1 --sample-every 0 --checkpoint-every 40"
TRAIN = (
    "digits --model.channels 16 --model.norm-groups 4 --model.channel-mults 1 "
    f"--model.attention-resolutions --batch-size 16 --warmup-steps 10 {LOG}"
)
STOP, END = 80, 120
LABELS = "--model.num-classes 10 --model.dropout 0.1"
RECIPE = "--reduction sum --timesteps antithetic --loss l1 --num-microbatches 2"
KINDS = {
    "labels": (END, LABELS),
    "flip": (10, "--flip"),
    "sum_antithetic_l1": (10, RECIPE),
}
QUICK_KINDS = {"labels": (END, f"{LABELS} --flip {RECIPE}")}
"""Name -> steps and options; where little time is given, all of them at once."""

DRAW = "--num-sample-steps 6 --num-images 8"
LABEL = "--label 3 --guidance-scale 2"
SWEEP = "--num-samples 96 --batch-size 32 --save-every 1"
CELLS = "--steps 3 6 --etas 0 0.5 1 sigma_hat"
LATENTS = {
    "reconstruct.py": "--num-images 6 --steps 4 --fixed-point-iterations 2",
    "likelihood.py": "--num-images 8 --num-sample-steps 6 --etas 0.5",
    "same_latent.py": "--num-images 8 --steps 3 6",
    "interpolate.py": "--images 0 1 --num-points 4 --grid-size 3 --num-sample-steps 6",
    "trajectory.py": "--num-images 3 --num-sample-steps 6 --eta 0.5",
}
EIGHT_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}


def training(workdir: pathlib.Path, max_steps: int, *options: object, **env: Any) -> None:
    script("train.py", TRAIN, "--workdir", workdir, "--max-steps", max_steps, *options, **env)


def keep_training(workdir: pathlib.Path, path: pathlib.Path) -> None:
    """Every leaf of every checkpoint, read without a template, and the logged numbers."""
    arrays = {}
    for checkpoint in (workdir / "checkpoints").iterdir():
        if checkpoint.name.isdecimal():
            item = checkpoint / "default"
            tree = ocp.PyTreeCheckpointer().restore(item if item.exists() else checkpoint)
            flat, _ = jax.tree_util.tree_flatten_with_path(tree)
            for leaf_path, leaf in flat:
                name = jax.tree_util.keystr(leaf_path, simple=True, separator="/")
                arrays[f"step {checkpoint.name}/{name}"] = np.asarray(leaf)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for column in ("step", "loss", "grad_norm"):
        arrays[f"metrics/{column}"] = np.array([line[column] for line in lines])
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)


def keep_numbers(path: pathlib.Path, numbers: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(numbers))


def printed(text: str) -> list[float]:
    """The decimal fractions in what a script printed."""
    return [float(number) for number in re.findall(r"\d+\.\d+(?:e[+-]?\d+)?", text)]


def train(folder: pathlib.Path, quick: bool) -> None:
    work, kept = folder / "work", folder / "train"
    with part("straight"):
        training(work / "straight", END)
        keep_training(work / "straight", kept / "straight.npz")
    with part("stopped and resumed"):
        if quick:  # as a kill between two checkpoints leaves it
            shutil.copytree(work / "straight", work / "stopped")
            shutil.rmtree(work / "stopped" / "checkpoints" / str(END))
        else:
            training(work / "stopped", STOP)
        shutil.copytree(work / "stopped", work / "resumed")
        training(work / "resumed", END)
        keep_training(work / "resumed", kept / "resumed.npz")
    for name, (max_steps, options) in (QUICK_KINDS if quick else KINDS).items():
        with part(f"training, {name}"):
            training(work / name, max_steps, options)
            keep_training(work / name, kept / f"{name}.npz")
    if not quick:
        with part("the preset itself"):
            where = ("--workdir", work / "preset", "--max-steps", 20)
            script("train.py", "digits", LOG, *where)
            keep_training(work / "preset", kept / "preset.npz")


def processes(folder: pathlib.Path, quick: bool) -> None:
    workdir = folder / "work" / "two_processes"
    with part("two processes"):
        on_two_processes("train.py", TRAIN, "--workdir", workdir, "--max-steps", 20)
        keep_training(workdir, folder / "processes" / "two.npz")


def draw(model: pathlib.Path, out: pathlib.Path, *options: object, **env: Any) -> None:
    with part(f"sample {out.name}"):
        script("sample.py", "--workdir", model, "--out", out, DRAW, *options, **env)


def sample(folder: pathlib.Path, quick: bool) -> None:
    model, kept = folder / "work" / "straight", folder / "sample"
    draw(model, kept / "ddim", "--save-npz")
    draw(model, kept / "eta_0.5", "--eta 0.5 --spacing quadratic --batch-size 3")
    draw(model, kept / "sigma_hat", layout.sigma_hat_options())
    for name in ("heun", "dpm_solver_pp_2m"):
        draw(model, kept / name, f"--sampler {name}")
    draw(folder / "work" / "labels", kept / "label", LABEL)
    if not quick:
        for name in ("ddpm", "probability_flow_euler"):
            draw(model, kept / name, f"--sampler {name}")
        draw(folder / "work" / "preset", kept / "preset", "--eta 1 --weights raw")


def statistics(folder: pathlib.Path, quick: bool) -> None:
    stats, kept = folder / "work" / "stats", folder / "statistics"
    with part("classifier"):
        script("train_classifier.py", "digits", "--num-steps 30 --width 8 --out", stats)
        shutil.copytree(stats, kept / "classifier")
    for name in ("classifier", "pixels"):
        with part(f"statistics of {name}"):
            path = stats / f"{name}.npz"
            script("make_statistics.py", "digits", "--features", name, "--out", path)
            shutil.copy(path, kept)
    with part("fid.py"):
        images, options = folder / "sample" / "ddim" / "images", ("--stats", stats / "pixels.npz")
        found = re.search(r"fd_pixels ([^\s:,]+)", script("fid.py", images, *options))
        keep_numbers(kept / "fid.json", {"fd_pixels": float(found[1]) if found else None})


def sweeping(old: pathlib.Path, out: pathlib.Path, *options: object) -> None:
    stats = [old / "work" / "stats" / f"{name}.npz" for name in ("classifier", "pixels")]
    where = ("--workdir", old / "work" / "straight", "--stats", *stats, "--out", out)
    script("fid_sweep.py", *where, SWEEP, *options)


def keep_sweep(out: pathlib.Path, kept: pathlib.Path) -> None:
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    keep_numbers(kept / "distances.json", dict(map(layout.sweep_cell, lines)))
    shutil.copytree(out / "samples", kept / "samples")


def sweep(folder: pathlib.Path, quick: bool) -> None:
    work, kept = folder / "work", folder / "sweep"
    with part("sweep"):
        sweeping(folder, work / "sweep", CELLS)
        keep_sweep(work / "sweep", kept / "straight")
    with part("sweep, stopped after two cells and within the third"):
        stopped = work / "sweep_stopped"
        shutil.copytree(work / "sweep", stopped)
        lines = (stopped / "results.jsonl").read_text().splitlines(keepends=True)
        (stopped / "results.jsonl").write_text("".join(lines[:2]))
        sweeping(folder, stopped, CELLS, "--max-seconds 0.001")
        shutil.copytree(stopped, work / "sweep_resumed")
        sweeping(folder, work / "sweep_resumed", CELLS)
        keep_sweep(work / "sweep_resumed", kept / "resumed")


def latents(folder: pathlib.Path, quick: bool) -> None:
    """results.json where there is one; the pictures, and what was printed, where there is none."""
    work, kept = folder / "work", folder / "latents"
    for name, options in LATENTS.items():
        with part(name):
            out, stem = work / name, name.removesuffix(".py")
            where = ["--workdir", work / "straight", "--out", out]
            if name == "same_latent.py":
                where += ["--classifier", work / "stats" / "classifier.safetensors"]
            text = script(name, *where, options)
            (kept / stem).mkdir(parents=True)
            if name in ("interpolate.py", "trajectory.py"):
                keep_numbers(kept / stem / "printed.json", printed(text))
                for picture in [*out.glob("*.png"), *out.glob("*.gif")]:
                    shutil.copy(picture, kept / stem)
            else:
                shutil.copy(out / "results.json", kept / stem)


def devices(folder: pathlib.Path, quick: bool) -> None:
    work, kept = folder / "work", folder / "devices"
    with part("training on eight devices"):
        training(work / "eight", 10, environment=EIGHT_DEVICES)
        keep_training(work / "eight", kept / "train.npz")
    options = "--eta 0.5 --batch-size 8"
    draw(work / "straight", kept / "sample", options, environment=EIGHT_DEVICES)


def go_on(folder: pathlib.Path, old: pathlib.Path) -> None:
    """What `old` began, finished by this tree under the names of what `old` finished itself."""
    work, began = folder / "work", old / "work"
    with part("training that the old tree began"):
        shutil.copytree(began / "stopped", work / "stopped")
        training(work / "stopped", END)
        keep_training(work / "stopped", folder / "train" / "straight.npz")
    with part("a sweep that the old tree began"):
        shutil.copytree(began / "sweep_stopped", work / "sweep")
        sweeping(old, work / "sweep", CELLS)
        keep_sweep(work / "sweep", folder / "sweep" / "straight")
    draw(began / "straight", folder / "sample" / "ddim", "--save-npz")
    draw(began / "labels", folder / "sample" / "label", LABEL)


SCRIPTS = (train, processes, sample, statistics, sweep, latents, devices)
