"""What the programs of the published configurations need on a TPU, without one: its compiler says.

pip install -e '.[experiments,tpu]'
python experiments/benchmarks/compile_for.py                       # four v5e chips
python experiments/benchmarks/compile_for.py --topology v4:2x2x1 --configs cifar10 --dtypes bfloat16

One line for each program as it is compiled, which takes minutes; the same command goes on where it
was stopped. Figures are of one chip, and of one step of a loop: XLA counts a loop's body once.
The chip is not asked how fast it is: `roofline` is the larger of FLOPs over the data sheet's peak
for bfloat16 products, which JAX's default precision takes for float32 too, and bytes over its
bandwidth. Of the bytes XLA counts some stay in on-chip memory: the time by bytes is an upper bound.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # where common/ stands

from common import cli
from likelihood import bound_program
from presets import PRESETS

from ddim_jax import parallel, process_sigmas, train, unet
from ddim_jax.files import read_json, write_json
from ddim_jax.keys import seed_key
from ddim_jax.metrics.inception import inception_outputs, inception_shapes
from ddim_jax.numerics import Precision, matmul_precision
from ddim_jax.objectives import Denoising, Setup
from ddim_jax.parallel import Devices
from ddim_jax.paths import File, Folder
from ddim_jax.runs import RunParams, RunSpec
from ddim_jax.runs.draw import DrawInputs, image_program
from ddim_jax.runs.options import check_limits, option
from ddim_jax.samplers import encode

NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # there is no chip to fight for
}
"""What the TPU's library reads, when it is loaded, on a machine that has none."""
IMAGES = {"cifar10": ((32, 32, 3), 256), "celeba": ((64, 64, 3), 64), "bedroom": ((256, 256, 3), 8)}
"""Configuration -> its images, and how many a chip samples at once."""
PROGRAMS = ("sample", "train", "encode", "bound", "features")


class Chip(NamedTuple):
    """A data sheet. Source: cloud.google.com/tpu/docs, "TPU versions"."""

    tflops: float  # of bfloat16 products
    bandwidth: float  # bytes a second
    memory: float  # bytes


CHIPS = {
    "TPU v4": Chip(275, 1228e9, 32e9),
    "TPU v5 lite": Chip(197, 819e9, 16e9),
    "TPU v5": Chip(459, 2765e9, 95e9),
    "TPU v6 lite": Chip(918, 1640e9, 32e9),
}
"""By the names that JAX has for them."""


@dataclasses.dataclass(frozen=True)
class CompileConfig:
    """What is compiled, and for what."""

    topology: tuple[str, ...] = ("v5e:2x2",)
    """Slices, as JAX names them: v5e:2x2 has four chips, v4:2x2x1 too."""
    configs: tuple[Literal["cifar10", "celeba", "bedroom"], ...] = ("cifar10", "celeba", "bedroom")
    """Published configurations; church's network is bedroom's."""
    programs: tuple[Literal["sample", "train", "encode", "bound", "features"], ...] = PROGRAMS
    """Which programs of each; Inception's features are of CIFAR-10's images alone."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Precisions of the network."""
    precision: Precision | None = None
    """How products of float32 matrices are computed; JAX's default if not given."""
    num_sample_steps: int = option(100, at_least=1)
    """S of the loops."""
    batch_per_chip: int | None = option(None, at_least=1)
    """Images a chip works on at once; what stands in IMAGES, and the preset's batch, if not
    given."""
    microbatches: int = option(1, at_least=1)
    """Parts of a chip's batch in training."""
    remat: bool = False
    """Train with each block computed again for its gradient."""
    cpu_convolution: bool = False
    """With the formulation of the convolution's gradients that a CPU takes."""
    out: File | None = None
    """A JSON file for the table; rows that it has are not made again."""
    hlo: Folder | None = None
    """Where the compiled programs go, as text."""


class Case(NamedTuple):
    """One program."""

    topology: str
    config: str
    program: str
    dtype: str
    batch: int  # images a chip


def main(config: CompileConfig) -> None:
    """Compile, and print a markdown table."""
    check_limits(config)
    os.environ.update(NO_TPU | os.environ)
    jax.config.update("jax_platforms", "cpu")  # what is compiled for is named, not looked for
    jax.config.update("jax_enable_compilation_cache", False)  # what is kept takes no time
    if not config.cpu_convolution:
        unet.conv_general_dilated = jax.lax.conv_general_dilated  # by default the host decides
    rows = _kept_rows(config)
    for case in _cases(config):
        asked = case._asdict() | _choices(config)
        if any(asked.items() <= row.items() for row in rows):
            continue
        rows.append(asked | _figures(case, config))
        print(_line(rows[-1]), flush=True)
        if config.out is not None:
            pathlib.Path(config.out).parent.mkdir(parents=True, exist_ok=True)
            write_json(config.out, _facts() | {"rows": rows})
    print(f"\n{_table(rows)}")


def _choices(config: CompileConfig) -> dict[str, Any]:
    names = ("precision", "microbatches", "remat", "cpu_convolution", "num_sample_steps")
    return {name: getattr(config, name) for name in names}


def _kept_rows(config: CompileConfig) -> list[dict[str, Any]]:
    if config.out is None or not os.path.exists(config.out):
        return []
    kept = read_json(config.out, way_out="Give another file.")
    versions, theirs = _facts()["versions"], kept.get("versions")
    if theirs != versions or "rows" not in kept:
        raise ValueError(
            f"out must be a table of this compiler, {versions}; {config.out} is of {theirs}. "
            "Give another file."
        )
    return kept["rows"]


def _facts() -> dict[str, Any]:
    names = ("jax", "jaxlib", "libtpu", "flax")
    return {
        "command": "python experiments/benchmarks/compile_for.py " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in names},
    }


def _cases(config: CompileConfig) -> Iterator[Case]:
    for topology in config.topology:
        chips = len(_devices(topology))
        for name in config.configs:
            for program in config.programs:
                batch = IMAGES[name][1]
                if program == "train":
                    batch = PRESETS[name][1].batch_size // chips
                for dtype in config.dtypes:
                    if program == "features" and (name, dtype) != ("cifar10", config.dtypes[0]):
                        continue
                    yield Case(topology, name, program, dtype, config.batch_per_chip or batch)


def _devices(topology: str) -> Devices:
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # whatever the compiler's library calls it
        raise ValueError(
            f"topology must be one that libtpu knows, such as v5e:2x2; got {topology} "
            f"({str(error).splitlines()[0][:200]}). Install the extra tpu if it is missing."
        ) from error


def _figures(case: Case, config: CompileConfig) -> dict[str, Any]:
    """Compile one program, and read off what it needs."""
    devices, start = _devices(case.topology), time.perf_counter()
    with matmul_precision(config.precision):
        compiled = _MAKE[case.program](case, config, devices)
    seconds = time.perf_counter() - start
    if config.hlo is not None:
        folder = pathlib.Path(config.hlo)
        folder.mkdir(parents=True, exist_ok=True)
        name = "-".join(map(str, case)).replace(":", "_")
        (folder / f"{name}.txt").write_text(str(compiled.as_text()))
    costs: Any = compiled.cost_analysis()
    memory: Any = compiled.memory_analysis()
    chip = CHIPS[devices[0].device_kind]
    flops, moved = costs["flops"], costs["bytes accessed"]
    by_flops, by_bytes = flops / (1e12 * chip.tflops), moved / chip.bandwidth
    needs = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return {
        "compile_seconds": seconds,
        "memory": needs - memory.alias_size_in_bytes,
        "of_memory": (needs - memory.alias_size_in_bytes) / chip.memory,
        "flops": flops,
        "bytes": moved,
        "roofline_seconds": max(by_flops, by_bytes),
        "binds": "FLOPs" if by_flops > by_bytes else "bytes",
    }


# ------------------------------------------------------------------------------------- programs


def _spec(case: Case) -> RunSpec:
    preset = PRESETS[case.config][1]
    model = dataclasses.replace(preset.model, dtype=case.dtype)
    return dataclasses.replace(preset, model=model).spec(IMAGES[case.config][0])


def _sample(case: Case, config: CompileConfig, devices: Devices) -> jax.stages.Compiled:
    spec = _spec(case)
    program = image_program(spec, spec.timesteps(config.num_sample_steps), devices=devices)
    inputs = DrawInputs(_weights(spec), jax.eval_shape(lambda: seed_key(0)))
    return program.compile(inputs, _indices(case, devices))


def _encode(case: Case, config: CompileConfig, devices: Devices) -> jax.stages.Compiled:
    spec = _spec(case)
    timesteps = spec.timesteps(config.num_sample_steps)

    def program(params: RunParams, images: jax.Array) -> jax.Array:
        return encode(spec.denoiser(params), spec.schedule, spec.encode(params, images), timesteps)

    over = parallel.over_devices(program, devices)
    return over.compile(_weights(spec), _images(case, devices))


def _bound(case: Case, config: CompileConfig, devices: Devices) -> jax.stages.Compiled:
    spec = _spec(case)
    timesteps = spec.timesteps(config.num_sample_steps)
    sigmas = process_sigmas(spec.schedule, timesteps)
    program = bound_program(spec, timesteps, [(sigmas, sigmas)], seed=0, devices=devices)
    indices = _indices(case, devices)  # of the labels' shape and type too, which are not read
    return program.compile(_weights(spec), _images(case, devices), indices, indices)


def _features(case: Case, config: CompileConfig, devices: Devices) -> jax.stages.Compiled:
    over = parallel.over_devices(inception_outputs, devices)
    return over.compile(inception_shapes(), _images(case, devices))


def _train(case: Case, config: CompileConfig, devices: Devices) -> jax.stages.Compiled:
    preset, spec, chips = PRESETS[case.config][1], _spec(case), len(devices)
    tx = train.adam_with_warmup(preset.learning_rate, preset.warmup_steps, preset.clip_norm)
    model = spec.model.clone(remat=config.remat)
    setup = Setup(model.apply, spec.schedule, chips * case.batch)
    step = parallel.pmap_train_step(
        Denoising().loss_fn(setup),
        tx,
        ema_decay=preset.ema_decay,
        num_microbatches=config.microbatches,
        devices=devices,
    )

    def state() -> train.TrainState:
        weights = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), spec.parameter_shapes())
        return train.init_train_state(seed_key(0), weights, tx)

    def on_each(tree: Any) -> Any:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct((chips, *a.shape), a.dtype), tree)

    image = jax.ShapeDtypeStruct((case.batch, *spec.image_shape), jnp.uint8)
    return step.lower(on_each(jax.eval_shape(state)), on_each({"image": image})).compile()  # pyright: ignore[reportFunctionMemberAccess]


_MAKE: dict[str, Callable[..., jax.stages.Compiled]] = {
    "sample": _sample, "train": _train, "encode": _encode, "bound": _bound, "features": _features,
}  # fmt: skip


def _weights(spec: RunSpec) -> RunParams:
    return RunParams(spec.parameter_shapes(), ())


def _indices(case: Case, devices: Devices) -> Any:
    return jax.ShapeDtypeStruct((len(devices) * case.batch,), jnp.int32)


def _images(case: Case, devices: Devices) -> Any:
    shape = (len(devices) * case.batch, *IMAGES[case.config][0])
    return jax.ShapeDtypeStruct(shape, jnp.uint8)


# --------------------------------------------------------------------------------------- report


def _line(row: dict[str, Any]) -> str:
    return (
        f"| {row['topology']} | {row['config']} | {row['program']} | {row['dtype']} | "
        f"{row['batch']} | {row['compile_seconds']:.0f} s | {row['memory'] / 1e9:.2f} GB "
        f"({row['of_memory']:.0%}) | {row['flops'] / 1e12:.3g} T | {row['bytes'] / 1e9:.3g} GB | "
        f"{1e3 * row['roofline_seconds']:.1f} ms, {row['binds']} |"
    )


def _table(rows: list[dict[str, Any]]) -> str:
    return "\n".join(
        [
            "| slice | network | program | dtype | images a chip | compiling | memory | FLOPs | "
            "bytes | roofline |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *map(_line, rows),
        ]
    )


if __name__ == "__main__":
    cli.run(main, CompileConfig)
