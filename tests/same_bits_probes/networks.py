"""Networks: outputs, gradients, published weights."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from inputs import GOLDEN, KEY, SMALL, Arrays, X, named, weights

from ddim_jax.convert import flax_to_diffusers, flax_to_paper, paper_to_flax
from ddim_jax.unet import UNet


def published_network(quick: bool) -> Arrays:
    """The CIFAR-10 network at its full size, on one image."""
    model = UNet()
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 32, 32, 3), np.float32))
    # Run once: LLVM's optimisation would take longer than it saves.
    options = {"xla_backend_optimization_level": 0} if quick else None
    program = jax.jit(model.apply, compiler_options=options)
    return named(output=program({"params": weights(model, x)}, x, jnp.int32(500)))


def small_network(quick: bool) -> Arrays:
    """Outputs and gradients, in training with dropout and labels too."""
    t, label = jnp.array([0, 500, 999]), jnp.array([0, 3, 5])
    found: dict[str, Any] = {}
    for name, changes in {"plain": {}, "labels": {"num_classes": 5, "dropout": 0.3}}.items():
        model = SMALL.clone(**changes)
        labels = (label,) if changes else ()

        def loss(params, model=model, labels=labels):
            rngs = {"dropout": KEY}
            y = model.apply({"params": params}, X, t, *labels, train=True, rngs=rngs)
            return (y**2).mean(), y

        params = weights(model, X, *labels)
        if not quick or labels:  # takes long to compile
            found[name] = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        if not changes:
            half = SMALL.clone(dtype=jnp.bfloat16)
            found["bfloat16"] = jax.jit(half.apply)({"params": params}, X, t)
    return named(**found)


def converted_weights(quick: bool) -> Arrays:
    """Published spellings of a tiny network to ours and back, where the golden files are."""
    if not GOLDEN.exists():
        return {}
    spec = json.loads((GOLDEN / "unet_ermongroup_params.json").read_text())["tiny"]
    config = spec["config"]
    model = UNet(
        image_channels=config["channels"],
        channels=config["ch"],
        channel_mults=tuple(config["ch_mult"]),
        num_res_blocks=config["num_res_blocks"],
        attention_resolutions=tuple(config["attn_resolutions"]),
    )
    rng = np.random.default_rng(0)
    state = {k: rng.standard_normal(shape, np.float32) for k, shape in spec["params"].items()}
    params = paper_to_flax(state, model, config["image_size"])
    found = {"ours": params, "paper": flax_to_paper(params)}
    return named(**found, diffusers=flax_to_diffusers(params, model))


NETWORKS = (published_network, small_network, converted_weights)
