"""A trained run, opened from its folder."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from ddim_jax.checks import check_one_of
from ddim_jax.hashing import content_hash
from ddim_jax.numerics import Precision
from ddim_jax.parallel import everywhere
from ddim_jax.runs.draw import DrawInputs, ImageProgram, draw_images, image_program
from ddim_jax.runs.folder import checkpoints, load_codec_params, load_spec, read_config
from ddim_jax.runs.spec import RunParams, RunSpec
from ddim_jax.samplers import Sampler, ddim
from ddim_jax.types import Denoiser, PRNGKey, is_traced

Weights = Literal["ema", "raw"]

DDIM = ddim()

NO_FINGERPRINT = ("unconditional", "precision")
"""Of a spec's description: what decides no number, and what stands there by another name."""


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A run with weights, and where they come from."""

    spec: RunSpec
    params: RunParams
    """On every device of this host."""
    step: int
    """Updates behind the weights; 0 of converted ones."""
    weights: Weights

    def denoiser(
        self, label: int | jax.Array | None = None, guidance_scale: float = 1.0
    ) -> Denoiser:
        """The network with these weights, for `sample`, `encode` and whatever else takes one.

        `label` is one class, or (B,) of them. Raises ValueError for what the network has not.
        """
        if label is not None and self.spec.num_classes is None:
            raise ValueError(
                "label must be left out for a network that was trained without labels; got "
                f"{label}."
            )
        if isinstance(label, int):
            self.spec.check_label(label)
        elif label is not None:
            self._check_labels(label)
        label = None if label is None else jnp.asarray(label)
        return self.spec.denoiser(self.params, label, guidance_scale)

    def _check_labels(self, labels: jax.Array) -> None:
        """`check_label` for several; num_classes, "no class", is one where it was trained."""
        classes, spec = self.spec.num_classes or 1, self.spec
        no_class = spec.model_config.no_class_row and spec.unconditional
        if is_traced(labels):
            return  # NaN where the network has no such row
        wrong = [label for label in np.ravel(labels) if not 0 <= label < classes + no_class]
        if wrong:
            none = f", and {classes} for 'no class'" if no_class else "; 'no class' is not trained"
            raise ValueError(
                f"label must be in [0, {classes - 1}], the classes of this network{none}; got "
                f"{wrong[0]}."
            )

    def sample(
        self,
        key: PRNGKey,
        num_images: int,
        num_sample_steps: int = 50,
        *,
        sampler: Sampler = DDIM,
        spacing: str | None = None,
        label: int | None = None,
        guidance_scale: float = 1.0,
        batch_size: int = 256,
    ) -> UInt8[np.ndarray, "N H W C"]:
        """uint8 images, drawn on all devices of this host; image i depends on (key, i) alone.

        Of a network with classes image i is of class i % K, or all are of the class `label`. The
        program of a setting is compiled once, of a sampler for as long as it is the same object.
        Raises ValueError for settings the run cannot have, FloatingPointError where an image is not
        finite.
        """
        timesteps = tuple(self.spec.timesteps(num_sample_steps, spacing).tolist())
        program = _program(self.spec, timesteps, sampler, label, guidance_scale)
        return draw_images(program, DrawInputs(self.params, key), num_images, batch_size)

    @functools.cached_property
    def weights_hash(self) -> str:
        """SHA-256 of the network's weights, 16 digits: the same weights have the same one."""
        return content_hash(jax.device_get(self.params.network))[:16]

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """All that decides the numbers of what is computed with this run, as JSON holds it.

        Beside it stands what was asked for (S, eta, seed, N, ...). Two numbers with one fingerprint
        may be compared; a computation that goes on must find its own.
        """
        codec = jax.device_get(self.params.codec)
        facts = {
            **{k: v for k, v in self.spec.describe().items() if k not in NO_FINGERPRINT},
            "weights": {"kind": self.weights, "step": self.step, "hash": self.weights_hash},
            "codec_hash": content_hash(codec)[:16] if jax.tree.leaves(codec) else None,
            "matmul_precision": self.spec.precision or _matmul_precision(),
            "threefry_partitionable": bool(jax.config.jax_threefry_partitionable),  # pyright: ignore
            "device_kind": jax.devices()[0].device_kind,
        }
        return json.loads(json.dumps(facts))  # as it will be read: lists for tuples

    @property
    def weights_called(self) -> str:
        """What to call the weights in a sentence."""
        return weights_called(self.weights, self.step)

    @property
    def fingerprint_id(self) -> str:
        """Twelve digits that stand for the fingerprint."""
        return hashlib.sha256(json.dumps(self.fingerprint, sort_keys=True).encode()).hexdigest()[
            :12
        ]


def weights_called(kind: str, step: int) -> str:
    """What to call weights: "ema weights of step 6"; nobody knows the step of converted ones."""
    return f"{kind} weights of step {step}" if step else f"converted {kind} weights"


def _matmul_precision() -> str:
    """How products of float32 matrices are computed, as `jax.default_matmul_precision` set it."""
    return str(jax.config.jax_default_matmul_precision or "default")  # pyright: ignore


def load_trained(
    workdir: str | pathlib.Path,
    weights: Weights = "ema",
    step: int | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    precision: Precision | None = None,
    clip_x0: bool = False,
) -> Run:
    """The run in a workdir with its averaged weights, or the raw ones; of the newest step if None.

    `dtype` is the precision to compute in, if not the run's own; weights stay float32. `precision`
    is that of products of float32 matrices, and `clip_x0` clips every data prediction to [-1, 1]
    (`RunSpec`); all three are in the fingerprint.
    Raises ValueError where there is no such run, step or set of weights, or where it is damaged,
    and for a `clip_x0` of a model of latents.
    """
    check_one_of("weights", weights, ("ema", "raw"))
    spec, config = load_spec(workdir), read_config(workdir)
    only = config.get("converted_from", {}).get("weights", weights)
    if weights != only:
        raise ValueError(
            f"weights must be {only!r} for {workdir}, which was converted from a file and holds "
            f"that set alone; got {weights!r}."
        )
    spec = dataclasses.replace(spec, clip_x0=clip_x0, precision=precision or spec.precision)
    network, step = load_weights(workdir, spec, weights, step)
    if dtype is not None:
        check_one_of("dtype", dtype, ("float32", "bfloat16"))
        model_config = dataclasses.replace(spec.model_config, dtype=dtype)
        spec = dataclasses.replace(spec, model_config=model_config)
    if weights == "ema" and (share := random_share(config, step)) > 0.1:
        warnings.warn(
            f"{share:.1%} of the averaged weights of step {step} are the random first ones: their "
            f"ema_decay is {config['ema_decay']}, without a warm-up. Take the raw weights, or "
            "train with ema_warmup.",
            stacklevel=2,
        )
    params = RunParams(network, load_codec_params(workdir))
    return Run(spec, everywhere(params), step, weights)


def random_share(config: Mapping[str, Any], step: int) -> float:
    """How much of the average of a run of this config.json are its random first weights."""
    if config.get("ema_warmup", True) or config.get("init_from") is not None:
        return 0.0
    return float(config.get("ema_decay", 0.0)) ** step


def load_weights(
    workdir: str | pathlib.Path, spec: RunSpec, weights: Weights, step: int | None = None
) -> tuple[Any, int]:
    """The network's weights in a workdir, which are to fit `spec`, and the step they are of."""
    name = "ema_params" if weights == "ema" else "params"
    with checkpoints(workdir) as checkpointer:
        template = {name: spec.parameter_shapes()}
        if step is None:
            tree, step = checkpointer.restore_newest(template, partial=True)
        else:
            tree = checkpointer.restore(template, step, partial=True)
    return tree[name], step


@functools.lru_cache(maxsize=16)
def _program(
    spec: RunSpec,
    timesteps: tuple[int, ...],
    sampler: Sampler,
    label: int | None,
    guidance_scale: float,
) -> ImageProgram:
    grid = np.asarray(timesteps)
    return image_program(spec, grid, lambda: sampler, label=label, guidance_scale=guidance_scale)
