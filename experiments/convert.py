"""Make a workdir, which every script takes, of published weights; or publish a workdir's weights.

python experiments/convert.py --from diffusers --path google/ddpm-cifar10-32 --workdir runs/google
python experiments/convert.py --from ddim --path celeba.ckpt --preset celeba --workdir runs/celeba
python experiments/convert.py --to diffusers --workdir runs/mine --out mine-for-diffusers
python experiments/convert.py --to ddim --workdir runs/mine --out mine.ckpt
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import pathlib
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import jax
import tyro
from common import cli
from presets import PRESETS

from ddim_jax import convert
from ddim_jax.convert.diffusers_scheduler import (
    BETA_SCHEDULES,
    complete_scheduler,
    not_obeyed,
    spacing_from_diffusers,
)
from ddim_jax.files import only_one_process, write_whole
from ddim_jax.hashing import content_hash
from ddim_jax.paths import AnyPath, Folder
from ddim_jax.runs import ModelConfig, Run, RunSpec, ScheduleConfig, Weights, load_trained
from ddim_jax.runs.folder import checkpoints, write_config
from ddim_jax.runs.options import check_limits, option
from ddim_jax.schedule import Spacing
from ddim_jax.unet import UNet

Format = Literal["diffusers", "ddim"]
IMAGE_SHAPES = {
    "cifar10": (32, 32, 3),
    "celeba": (64, 64, 3),
    "bedroom": (256, 256, 3),
    "church": (256, 256, 3),
}


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """Weights from a published format into a workdir (--from), or out of one (--to)."""

    workdir: Folder
    """The model: a new folder for --from, for --to one that train.py or convert.py wrote."""
    source: Annotated[Format | None, tyro.conf.arg(name="from")] = None
    """Read --path: a diffusers folder or hub id, or a .ckpt or .pth file of the paper's code."""
    path: AnyPath | None = None
    """What --from reads."""
    target: Annotated[Format | None, tyro.conf.arg(name="to")] = None
    """Write --out: a folder that diffusers' pipelines load, or a .ckpt for the paper's code."""
    out: AnyPath | None = None
    """What --to writes; must not exist."""
    preset: Literal["cifar10", "celeba", "bedroom", "church"] = "cifar10"
    """The network of a file that --from ddim reads: it holds weights and no settings."""
    spacing: Spacing | None = None
    """Sub-sequence to sample with; if not given the one that the paper's numbers of the data set
    are of, which the preset or the name of a diffusers folder says, else its scheduler's."""
    step: int | None = option(None, at_least=0)
    """Which checkpoint of the workdir to write with --to; the newest if not given."""
    weights: Weights = "ema"
    """Averaged or raw; a set of which nothing says which it is gets this name."""
    last_class_is_null: bool = False
    """The last class of the network that --from diffusers reads means "no class"; guidance then
    starts from it, and is refused without."""


def main(config: ConvertConfig) -> None:
    """Convert in the direction asked for."""
    check_limits(config)
    match config.source, config.target:
        case "diffusers" | "ddim", None:
            _into_workdir(config)
        case None, "diffusers" | "ddim":
            _out_of_workdir(config)
        case _:
            raise ValueError(
                "give one of --from and --to, each diffusers or ddim; got both or none"
            )


class _Loaded(NamedTuple):
    """A network with weights, as a file describes it."""

    spec: RunSpec
    params: Any
    origin: dict[str, Any]
    """What goes into config.json about it."""


def _into_workdir(config: ConvertConfig) -> None:
    if config.path is None:
        raise ValueError("path must be given with --from: the file, folder or hub id to read.")
    if config.step is not None:
        raise ValueError(f"step must be left out with --from, which makes one; got {config.step}.")
    load = _load_diffusers if config.source == "diffusers" else _load_ddim
    try:
        loaded = load(config.path, config)
    except (OSError, ImportError) as error:  # no such file, no network, an extra not installed
        raise ValueError(f"path {config.path} cannot be read: {error}") from error

    spec, workdir = loaded.spec, pathlib.Path(config.workdir)
    spacing, spacing_from = _spacing(config, spec)
    spec = dataclasses.replace(spec, spacing=spacing)
    if config.last_class_is_null and config.source != "diffusers":
        raise ValueError("last_class_is_null must be left out without --from diffusers.")
    digest = content_hash(loaded.params)[:16]
    origin = {
        "format": config.source,
        "path": config.path,
        **loaded.origin,
        "spacing_from": spacing_from,
        "weights": config.weights,
        "weights_hash": digest,
    }
    name = "ema_params" if config.weights == "ema" else "params"
    with only_one_process(workdir):
        write_config(workdir, spec.describe() | {"converted_from": origin})
        with checkpoints(workdir) as checkpointer:
            checkpointer.save(0, {name: loaded.params})
    print(
        f"{loaded.origin['taken']}\nare the {config.weights} weights in {workdir}: "
        f"{_count(loaded.params)} parameters, hash {digest}; images {spec.image_shape}, "
        f"{spec.schedule_config.name} schedule of {spec.schedule_config.num_steps} steps, "
        f"{spec.spacing} sub-sequence ({spacing_from}), predicts {spec.predicts}{_classes(spec)}"
    )
    if left := loaded.origin.get("not_obeyed"):
        settings = ", ".join(f"{name} {value}" for name, value in left.items())
        print(f"Settings of its scheduler that sampling here does not follow: {settings}.")


def _spacing(config: ConvertConfig, spec: RunSpec) -> tuple[Spacing, str]:
    """The sub-sequence to sample with, and where it comes from."""
    if config.spacing is not None:
        return config.spacing, "by --spacing"
    published = "the paper's for {}, appendix D.2"
    if config.source == "ddim":
        return spec.spacing, published.format(config.preset)
    name = pathlib.Path(config.path or "").name.lower()
    words = re.split(r"[^a-z0-9]+", name)  # cifar100 and celebahq are other sets
    found = [preset for preset in IMAGE_SHAPES if preset in words]
    if len(found) == 1 and spec.spacing == "uniform":  # one that a scheduler asks for otherwise
        return PRESETS[found[0]][1].spacing, published.format(found[0]) + f", by the name {name}"
    return spec.spacing, "timestep_spacing of its scheduler"


def _classes(spec: RunSpec) -> str:
    """How many classes there are, and whether guidance has a place to start from."""
    if spec.num_classes is None:
        return ""
    if spec.model_config.no_class_row:
        return f", {spec.num_classes} classes and 'no class'"
    return (
        f", {spec.num_classes} classes without 'no class', so guidance is refused (if the last one "
        "means none, give --last-class-is-null)"
    )


def _load_diffusers(path: str, config: ConvertConfig) -> _Loaded:
    found = convert.open_diffusers(
        path, config.weights, last_class_is_null=config.last_class_is_null or None
    )
    checkpoint = found.checkpoint
    size, taken = checkpoint.image_size, checkpoint.description
    if checkpoint.scheduler is None:
        taken += "; no scheduler_config.json beside them, so the schedule is DDPM's, by assumption"
    scheduler = checkpoint.scheduler or {}
    spec = RunSpec(
        model_config=_model_config(checkpoint.model),
        schedule_config=_schedule_config(scheduler),
        image_shape=(size, size, checkpoint.model.image_channels),
        spacing=spacing_from_diffusers(scheduler),
        predicts=convert.prediction_from_diffusers(scheduler),
        unconditional=found.unconditional or checkpoint.model.num_classes is None,
    )
    origin = {
        "taken": taken,
        "file": found.file,
        "set": found.kind or "unlabelled",
        "scheduler": checkpoint.scheduler,
        "not_obeyed": not_obeyed(scheduler) if scheduler else {},
    }
    return _Loaded(spec, checkpoint.params, origin)


def _load_ddim(path: str, config: ConvertConfig) -> _Loaded:
    preset, image_shape = PRESETS[config.preset][1], IMAGE_SHAPES[config.preset]
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError("no such file")
    params, taken = convert.load_paper_checkpoint(
        path, preset.model.make(image_shape[-1]), image_shape[0], config.weights
    )
    with pathlib.Path(path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    spec = preset.spec(image_shape)
    return _Loaded(spec, params, {"preset": config.preset, "sha256": digest, "taken": taken})


def _model_config(model: UNet) -> ModelConfig:
    names = {field.name for field in dataclasses.fields(ModelConfig)} - {"dtype"}
    return ModelConfig(**{name: getattr(model, name) for name in names})


def _schedule_config(scheduler: Mapping[str, Any]) -> ScheduleConfig:
    convert.schedule_from_diffusers(scheduler)  # for its check
    scheduler = complete_scheduler(scheduler)
    if scheduler.get("trained_betas") is not None:
        raise ValueError(
            "trained_betas must be null in scheduler_config.json, since a workdir describes its "
            "schedule by a formula; in Python, ddim_jax.convert loads the network and the schedule."
        )
    ours = {theirs: name for name, theirs in BETA_SCHEDULES.items()}
    return ScheduleConfig(
        name=ours[scheduler["beta_schedule"]],
        num_steps=scheduler["num_train_timesteps"],
        beta_start=scheduler["beta_start"],
        beta_end=scheduler["beta_end"],
        zero_terminal_snr=bool(scheduler.get("rescale_betas_zero_snr", False)),
    )


def _out_of_workdir(config: ConvertConfig) -> None:
    if config.out is None:
        raise ValueError("out must be given with --to: where the converted weights go.")
    out = pathlib.Path(config.out)
    if out.exists():
        raise ValueError(f"out must not exist, so that nothing is overwritten; {out} does.")
    run = load_trained(config.workdir, config.weights, config.step)
    if not run.spec.codec.is_identity:
        raise ValueError(
            "the model must be of pixels, since neither format holds a codec; "
            f"{config.workdir} has the codec {type(run.spec.codec).__name__}."
        )
    if config.target == "diffusers":
        _save_diffusers(out, run)
    else:
        _save_ddim(out, run)
    print(
        f"{run.weights_called} of {config.workdir} are in {out}: "
        f"{_count(run.params.network)} parameters, hash {run.weights_hash}"
    )
    if run.spec.spacing != "uniform":
        print(
            f"The sub-sequence {run.spec.spacing} is not in the file: to convert it back, "
            f"give --spacing {run.spec.spacing}."
        )


def _save_diffusers(out: pathlib.Path, run: Run) -> None:
    spec = run.spec
    height, width, _ = spec.image_shape
    if height != width:
        raise ValueError(f"images must be square for diffusers; the model's are {height}x{width}.")
    schedule = spec.schedule_config
    convert.save_diffusers(
        out,
        spec.model,
        run.params.network,
        height,
        schedule=schedule.name,  # pyright: ignore[reportArgumentType]
        num_steps=schedule.num_steps,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        prediction=spec.predicts,  # pyright: ignore[reportArgumentType]
        zero_terminal_snr=schedule.zero_terminal_snr,
        unconditional=spec.unconditional,
    )


def _save_ddim(out: pathlib.Path, run: Run) -> None:
    model = run.spec.model
    if run.spec.predicts != "eps":
        raise ValueError(
            "the model must predict eps for the paper's code, which knows nothing else; "
            f"this one predicts {run.spec.predicts}. --to diffusers holds it."
        )
    if model.norm_groups != 32 or model.num_classes is not None:
        raise ValueError(
            "norm_groups must be 32 and num_classes None for the paper's code, which has no other "
            f"network; got {model.norm_groups} and {model.num_classes}. --to diffusers holds both."
        )
    try:
        import torch
    except ImportError as error:
        raise ValueError("--to ddim needs torch: pip install 'ddim_jax[convert]'") from error
    state_dict = convert.flax_to_paper(run.params.network)
    out.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    torch.save({name: torch.tensor(array) for name, array in state_dict.items()}, file)
    write_whole(out, file.getvalue())


def _count(params: Any) -> str:
    return f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,}"


if __name__ == "__main__":
    cli.run(main, ConvertConfig)
