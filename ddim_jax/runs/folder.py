"""The folder of a run: config.json beside checkpoints/.

config.json holds what a network is sampled with ("model", "schedule", "predicts", "codec",
"spacing", "image_shape", "rounding") and how it came about: a run's settings, or "converted_from".
Sampling options are arguments and never stored with weights.

Format 2 names the objective's settings under "objective"; in format 1, which has no number, they
stand beside the others. A setting that a file lacks has the default that it had when it was new,
which is what versions before it did.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from flax import traverse_util

from ddim_jax.checkpoint import Checkpointer
from ddim_jax.checks import check_types
from ddim_jax.codec import CODECS
from ddim_jax.files import SEAL, differences, naming, read_json, read_npz, write_json, write_whole
from ddim_jax.hashing import content_hash
from ddim_jax.objectives import OBJECTIVES
from ddim_jax.paths import expanded, local_path
from ddim_jax.runs.config import TrainConfig
from ddim_jax.runs.options import defaults, may_change
from ddim_jax.runs.spec import RunSpec, described, spec_from

FORMAT = 2
RECORDED = frozenset({"rounding", "format", "init_from_hash", "versions", "unconditional"}) | {
    f"converted_from.{name}"
    for name in ("taken", "file", "set", "scheduler", "not_obeyed", "spacing_from")
}  # of the source: its weights have a hash
"""Written for the reader, or known from what is compared, and not compared."""
SAVED, SAVED_FORMAT = "saved.json", 1
_STEP = re.compile(r'\{"step": (\d+)\b')
DATA_CONTENT = "data_content"
"""What the images are, as `content_of` says; absent from what older versions wrote."""
ALL_DIGITS = 1797


Config = TypeVar("Config", bound=TrainConfig)


def read_config(workdir: str | pathlib.Path) -> dict[str, Any]:
    """The content of config.json, in today's format.

    Raises ValueError where there is none, where it is damaged, and for a format of the future.
    """
    path = local_path(workdir, "workdir", "folder") / "config.json"
    if not path.is_file():
        raise ValueError(
            f"workdir {workdir} has no config.json, so it is not a trained or converted model; "
            "train or convert one first."
        )
    config = read_json(path)
    if (found := config.get("format", 1)) not in (1, FORMAT):
        raise ValueError(
            f"{path} must be of format 1 or {FORMAT}, which this version reads; got {found!r}. Use "
            "the version that wrote it, or a newer one."
        )
    kinds = dict.fromkeys(("data", "data_dir", "init_from", DATA_CONTENT), str | None)
    kinds |= {"converted_from": dict, "split": str, "num_images": int, "ema_warmup": bool}
    with naming(path):
        check_types(config, kinds, "Restore it from the run's log or train anew.")
    return _digits_as_then(config if found == FORMAT else _from_format_1(config))


def _digits_as_then(config: dict[str, Any]) -> dict[str, Any]:
    """The digits' "train" was all of them when nothing was written about their content."""
    then = ("digits", "train", ALL_DIGITS)
    if DATA_CONTENT in config or tuple(map(config.get, ("data", "split", "num_images"))) != then:
        return config
    return config | {"split": "all"}


def _from_format_1(config: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(OBJECTIVES["denoising"])}
    old = {key: value for key, value in config.items() if key in names}
    rest = {key: value for key, value in config.items() if key not in names}
    if "converted_from" in rest:  # its hash was another one
        origin = rest["converted_from"]
        rest["converted_from"] = {k: v for k, v in origin.items() if k != "weights_hash"}
    return rest | ({"objective": {"name": "denoising", **old}} if old else {})


def as_begun(config: Config) -> Config:
    """The settings with those that the run in the folder has and its version could not say.

    Its average was warmed up; the presets that have its name may do otherwise today.
    """
    workdir = local_path(config.workdir, "workdir", "folder")
    if not (has_checkpoints(workdir) and (workdir / "config.json").is_file()):
        return config
    if "ema_warmup" in read_config(workdir) or config.ema_warmup:
        return config
    print(f"{workdir} was begun when every average was warmed up, and goes on so: ema_warmup")
    return dataclasses.replace(config, ema_warmup=True)


def write_config(workdir: str | pathlib.Path, config: Mapping[str, Any]) -> None:
    """Write config.json, or raise ValueError if the one there is of another run.

    A run that saved nothing binds nobody. Raises ValueError also where one that did has lost its
    config.json.
    """
    workdir = local_path(workdir, "workdir", "folder")
    path = workdir / "config.json"
    wanted = json.loads(json.dumps({"format": FORMAT, **config}))  # tuples become lists, as there
    if has_checkpoints(workdir):
        if not path.is_file():
            raise ValueError(
                f"workdir {workdir} holds checkpoints and its config.json is gone, so nobody knows "
                "of which run. Restore it, or give another workdir."
            )
        _check_same_run(workdir, read_config(workdir), wanted)
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(path, wanted)


def _check_same_run(workdir: pathlib.Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    if "converted_from" in there and "converted_from" not in wanted:
        raise ValueError(
            f"workdir {workdir} holds converted weights, which cannot be trained on; give another "
            "workdir, and this one with init_from."
        )
    then = json.loads(json.dumps(_defaults()))
    if "converted_from" in wanted:
        then = {name: then[name] for name in ("model", "schedule", "predicts", "codec")}
    origin = there.get("converted_from")
    if origin is not None and "weights_hash" not in origin:
        origin["weights_hash"] = _converted_hash(workdir, there)
    ignored = may_change(TrainConfig) | RECORDED
    there, wanted = _paths_alike(there, wanted)
    if differ := differences(_merged(then, there), _merged(then, wanted), ignored):
        raise ValueError(
            f"workdir {workdir} holds a run of another configuration: {'; '.join(differ)}. "
            f"Give the same settings to resume it, or another workdir.{_about_data(there, wanted)}"
        )


def _paths_alike(there: dict[str, Any], wanted: dict[str, Any]) -> tuple[dict, dict]:
    """Both, with one spelling for what is one place, and data compared by content if it can be."""
    if there.get(DATA_CONTENT) is None or wanted.get(DATA_CONTENT) is None:
        names, dropped = ("data", "init_from"), {DATA_CONTENT}
    else:
        names, dropped = ("init_from",), {"data"}
    there, wanted = ({k: v for k, v in x.items() if k not in dropped} for x in (there, wanted))
    for name in names:
        if name in wanted and same_place(there.get(name), wanted[name]):
            there[name] = wanted[name]
    return there, wanted


def same_place(one: str | None, other: str | None) -> bool:
    """Whether two names are one, or two paths of one place, spelt otherwise or by a link."""
    if not one or not other:
        return one == other
    real = [os.path.realpath(expanded(name)) for name in (one, other)]
    return real[0] == real[1]


def _about_data(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What to say beside the differences where the images are others."""
    if wanted.get("data") == "digits" and (there.get("split"), wanted["split"]) == ("all", "train"):
        return (
            ' The digits\' "train" was all 1797 of them in the version that trained it, which is '
            'the split "all" now.'
        )
    if there.get(DATA_CONTENT) != wanted.get(DATA_CONTENT):
        return (
            " Its images were others: they are compared by what they are, names, sizes and bytes, "
            "not by where they stand."
        )
    return ""


def _converted_hash(workdir: pathlib.Path, config: Mapping[str, Any]) -> str:
    """The hash of converted weights, for a file that holds another kind of hash."""
    name = "ema_params" if config["converted_from"]["weights"] == "ema" else "params"
    shapes = spec_from(config).parameter_shapes()
    with checkpoints(workdir) as checkpointer:
        params = checkpointer.restore({name: shapes}, partial=True)[name]
    return content_hash(jax.device_get(params))[:16]


def _defaults() -> dict[str, Any]:
    settings = TrainConfig()
    return defaults(TrainConfig) | {
        "objective": described(settings.objective, OBJECTIVES),
        "codec": described(settings.codec, CODECS),
    }


def _merged(defaults: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The config, with defaults for what it lacks; likewise for settings within settings."""
    nested = {}
    for key, value in defaults.items():
        given = config.get(key)
        if isinstance(value, Mapping) and isinstance(given, Mapping):
            # Another objective, or codec, has other settings and so other defaults.
            another_kind = key in ("objective", "codec") and given.get("name") != value["name"]
            nested[key] = given if another_kind else _merged(value, given)
    return {**defaults, **config, **nested}


def has_checkpoints(workdir: str | pathlib.Path) -> bool:
    """Whether a run saved anything there."""
    return bool(saved_steps(workdir))


def saved_steps(workdir: str | pathlib.Path) -> list[int]:
    """The steps saved there, ascending. Not asked of orbax, which waits for the other hosts."""
    folders = (local_path(workdir, "workdir") / "checkpoints").glob("*")
    return sorted(int(folder.name) for folder in folders if folder.name.isdecimal())


def checkpoints(
    workdir: str | pathlib.Path, keep: int = 3, keep_every: int | None = None
) -> Checkpointer:
    """The checkpoints of a workdir; saved.json beside them says which was the last."""
    workdir = local_path(workdir, "workdir")

    def on_saved(step: int) -> None:
        if jax.process_index() == 0:
            write_json(workdir / SAVED, {"format": SAVED_FORMAT, "step": step})

    folder = workdir / "checkpoints"
    return Checkpointer(folder, keep=keep, keep_every=keep_every, on_saved=on_saved)


def check_not_lost(workdir: str | pathlib.Path) -> None:
    """Raise ValueError for a workdir whose run saved checkpoints that are not there.

    Moved away, or on a disk that is not mounted: to begin anew there would empty its log.
    """
    workdir = local_path(workdir, "workdir")
    if saved_steps(workdir):
        return
    step = _last_saved(workdir)
    if step is not None:
        raise ValueError(
            f"workdir {workdir} holds a run that saved a checkpoint of step {step}, and "
            f"{workdir / 'checkpoints'} has none: were they moved, or is their disk not mounted? "
            "Put them back, or give another workdir; to begin anew here, delete this one."
        )


def _last_saved(workdir: pathlib.Path) -> int | None:
    """The step of a checkpoint that was once whole there; None if nothing says so."""
    if (path := workdir / SAVED).is_file():
        content = read_json(path, way_out="Delete it if checkpoints/ is whole.")
        if (found := content.get("format")) != SAVED_FORMAT:
            raise ValueError(
                f"{path} must be of format {SAVED_FORMAT}; got {found!r}. Use the version that "
                "wrote it, or a newer one."
            )
        return content.get("step")
    # Older versions did not write it, nor seals. Their log says how far they came, and two
    # checkpoints on the first was whole, since one is waited for before the next is begun.
    log, config = workdir / "metrics.jsonl", workdir / "config.json"
    if not (log.is_file() and config.is_file()) or f'"{SEAL}"' in config.read_text():
        return None
    every = read_config(workdir).get("checkpoint_every")
    lines = log.read_text(errors="replace").splitlines()
    steps = [int(found[1]) for found in map(_STEP.match, lines) if found]
    if not isinstance(every, int) or not steps or max(steps) < 2 * every:
        return None
    return max(steps) // every * every - every


def load_spec(workdir: str | pathlib.Path) -> RunSpec:
    """The run that a workdir's config.json describes, without its weights."""
    config = read_config(workdir)
    try:
        return spec_from(config)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__} "
        raise ValueError(
            f"{workdir}/config.json does not describe a network: {kind}{error} Restore it from the "
            "run's log or train anew."
        ) from error


def save_codec_params(workdir: str | pathlib.Path, params: Any) -> None:
    """Keep a codec's weights, nested dicts of arrays, with the run; nothing where it has none."""
    arrays: dict[Any, Any] = traverse_util.flatten_dict(params, sep="/")
    if arrays:
        file = io.BytesIO()
        np.savez(file, **arrays)
        write_whole(local_path(workdir, "workdir") / "codec.npz", file.getvalue())


def load_codec_params(workdir: str | pathlib.Path) -> Any:
    """What `save_codec_params` kept; {} where it kept nothing."""
    path = local_path(workdir, "workdir") / "codec.npz"
    return (
        traverse_util.unflatten_dict(read_npz(path, "the weights of a codec"), sep="/")
        if path.exists()
        else {}
    )
