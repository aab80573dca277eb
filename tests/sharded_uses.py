"""Every public function on arrays that are split over eight devices, against one device.

python tests/sharded_uses.py [ways]    in a process with eight devices; a line a way, or a use

A use is a function of a dict of arrays with one leading axis of images, and a key. It is run whole
on one device, and then with the leading axis split: under jit on automatic axes and on explicit
ones (which `jax.make_mesh` makes by default), eagerly on explicit ones, and inside `shard_map`,
where the axes are manual, on a mesh of either kind.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ddim_jax as dj
from ddim_jax.numerics import expand_level
from ddim_jax.train import init_train_state, train_step
from ddim_jax.unet import UNet

SHAPE = (8, 8, 4)
BATCH = 16
SPLIT = PartitionSpec("images")
STEPS = dj.ddim_timesteps(1000, 3)

Use = Callable[[dict[str, Any]], Any]


def arrays() -> dict[str, Any]:
    """The arguments: images, noise, indices, labels, times, levels, keys; split by their rows."""
    random = np.random.default_rng(0)
    x, eps = random.normal(size=(2, BATCH, *SHAPE)).astype(np.float32)
    levels = np.sort(random.uniform(0.05, 0.95, (2, BATCH)).astype(np.float32), axis=0)
    return {
        "x": np.clip(x, -1, 1),
        "eps": eps,
        "i": np.arange(100, 100 + BATCH),
        "t": np.linspace(0, 999, BATCH).astype(np.int32),
        "label": np.arange(BATCH) % 4,
        "ab": levels[0],
        "ab_prev": levels[1],
    }


def uses(schedule: dj.Schedule) -> dict[str, Use]:
    """Name -> use. What is closed over, the schedule and the network's weights, is on no mesh."""
    key = jax.random.key(5)
    old_key = jax.random.PRNGKey(5)

    def eps_fn(x, t):  # a network that knows where it is
        return x * expand_level(schedule.noise_variance(t), x)

    v_fn = dj.from_v(eps_fn, schedule)
    table: dict[str, Use] = {
        "image_keys": lambda a: jax.random.key_data(dj.image_keys(key, a["i"])),
        "image_keys, old key": lambda a: jax.random.key_data(dj.image_keys(old_key, a["i"])),
        "initial_noise": lambda a: dj.initial_noise(key, a["i"], SHAPE)[0],
        "initial_noise, keys": lambda a: jax.random.key_data(
            dj.initial_noise(key, a["i"], SHAPE)[1]
        ),
        "draw_noise": lambda a: dj.draw_noise(dj.image_keys(key, a["i"]), a["x"]),
        "fold_in": lambda a: jax.random.key_data(dj.fold_in(dj.image_keys(key, a["i"]), 3)),
        "fold_in, each": lambda a: jax.random.key_data(
            dj.fold_in(dj.image_keys(key, a["i"]), a["t"])
        ),
        "alpha_bar": lambda a: schedule.alpha_bar(a["t"]),
        "alpha_bar, vmap": lambda a: jax.vmap(schedule.alpha_bar)(a["t"]),
        "noise_variance": lambda a: schedule.noise_variance(a["t"]),
        "log_snr": lambda a: schedule.log_snr(a["t"]),
        "is_clean": lambda a: schedule.is_clean(a["t"]),
        "mirror": lambda a: schedule.mirror(a["t"]),
        "nearest": lambda a: schedule.nearest(schedule.log_snr(a["t"])),
        "draw": lambda a: jax.vmap(schedule.draw)(dj.image_keys(key, a["i"])),
        "add_noise": lambda a: dj.add_noise(schedule, a["x"], a["eps"], a["t"]),
        "add_noise, one t": lambda a: dj.add_noise(schedule, a["x"], a["eps"], 500),
        "posterior_mean": lambda a: dj.posterior_mean(a["x"], a["eps"], a["ab"], a["ab_prev"], 0.1),
        "ddpm_posterior": lambda a: dj.ddpm_posterior(a["x"], a["eps"], a["ab"], a["ab_prev"]),
        "ddim_sigma": lambda a: dj.ddim_sigma(a["ab"], a["ab_prev"]),
        "ddim_sigma_hat": lambda a: dj.ddim_sigma_hat(a["ab"], a["ab_prev"]),
        "ddim_step": lambda a: dj.ddim_step(
            a["x"], a["eps"], a["ab"], a["ab_prev"], eta=0.5, noise=a["eps"]
        ),
        "ddpm_step": lambda a: dj.ddpm_step(
            a["x"], a["eps"], a["ab"], a["ab_prev"], noise=a["eps"], variance="fixed_large"
        ),
        "sigma_hat_step": lambda a: dj.sigma_hat_step(
            a["x"], a["eps"], a["ab"], a["ab_prev"], noise=a["eps"]
        ),
        "from_v": lambda a: v_fn(a["x"], a["t"]),
        "from_x0": lambda a: dj.from_x0(eps_fn, schedule)(a["x"], a["t"]),
        "from_score": lambda a: dj.from_score(eps_fn, schedule)(a["x"], a["t"]),
        "clip_x0": lambda a: dj.clip_x0(eps_fn, schedule)(a["x"], a["t"]),
        "clip_x0_keep_eps": lambda a: dj.clip_x0_keep_eps(eps_fn, schedule)(a["x"], a["t"]),
        "guided": lambda a: dj.guided(eps_fn, lambda x, t: x, a["ab"])(a["x"], a["t"]),
        "velocity": lambda a: dj.velocity(a["x"], a["eps"], a["ab"]),
        "lerp": lambda a: jax.vmap(dj.lerp)(a["x"], a["eps"], a["ab"]),
        "slerp": lambda a: jax.vmap(dj.slerp)(a["x"], a["eps"], a["ab"]),
        "interpolation_line": lambda a: jax.vmap(lambda x, y: dj.interpolation_line(x, y, 5))(
            a["x"], a["eps"]
        ),
        "interpolation_grid": lambda a: jax.vmap(
            lambda x, y: dj.interpolation_grid(jnp.stack([x, y, y + x, y - x]), 3, 3)
        )(a["x"], a["eps"]),
        "ode coordinates": lambda a: dj.from_ode_coordinates(
            *dj.to_ode_coordinates(a["x"], a["ab"])
        ),
        "ode_field": lambda a: dj.ode_field(eps_fn, schedule)(a["x"], jnp.float32(0.7)),
        "eps_loss": lambda a: dj.eps_loss(dj.image_keys(key, a["i"]), eps_fn, schedule, a["x"]),
        "eps_loss, times": lambda a: dj.eps_loss(
            dj.image_keys(key, a["i"]), eps_fn, schedule, a["x"], t=a["t"]
        ),
        "prediction_loss, v": lambda a: dj.prediction_loss(
            dj.image_keys(key, a["i"]),
            eps_fn,
            schedule,
            a["x"],
            predicts="v",
            weight=dj.min_snr("v"),
        ),
        "gradient of eps_loss": lambda a: jax.grad(
            lambda x: dj.eps_loss(dj.image_keys(key, a["i"]), eps_fn, schedule, x, t=a["t"]).sum()
        )(a["x"]),
        "antithetic_timesteps": lambda a: dj.antithetic_timesteps(
            key, a["i"] - 100, BATCH, schedule
        ),
        "encode": lambda a: dj.encode(v_fn, schedule, a["x"], STEPS),
        "encode_fixed_point": lambda a: dj.encode_fixed_point(eps_fn, schedule, a["x"], STEPS),
        "variational_bound": lambda a: (
            dj.variational_bound(
                dj.image_keys(key, a["i"]),
                eps_fn,
                schedule,
                a["x"],
                STEPS,
                dj.process_sigmas(schedule, STEPS),
            ).total
        ),
        "sample_trajectory": lambda a: [
            jnp.moveaxis(part, 0, 1)
            for part in dj.sample_trajectory(None, eps_fn, schedule, a["x"], STEPS)
        ],
        "vmap of one image": lambda a: jax.vmap(
            lambda key, x: dj.sample(key, eps_fn, schedule, x, STEPS, dj.ddim(1.0))
        )(dj.image_keys(key, a["i"]), a["x"]),
        "traced eta, sigma-hat": lambda a: dj.sample(
            dj.image_keys(key, a["i"]),
            eps_fn,
            schedule,
            a["x"],
            STEPS,
            dj.ddim_or_sigma_hat(jnp.float32(0.5), jnp.bool_(True)),
        ),
        **_conversions(),
        **_networks(schedule, key),
    }
    for name in dj.SAMPLERS:
        table[f"sample, {name}"] = _sampled(name, key, eps_fn, schedule)
    table["train_step"] = _trained(1)
    table["train_step, microbatches"] = _trained(2)
    table["sample, pair"] = _sampled("ddpm", key, v_fn, schedule)
    return table


def _sampled(name: str, key: jax.Array, denoiser: dj.Denoiser, schedule: dj.Schedule) -> Use:
    def draw(a):
        x_T, keys = dj.initial_noise(key, a["i"], SHAPE)
        return dj.sample(keys, denoiser, schedule, x_T, STEPS, dj.named_sampler(name))

    return draw


def _conversions() -> dict[str, Use]:
    names = [f"{a}_to_{b}" for a in ("epsilon", "x0", "v", "score") for b in ("epsilon", "x0", "v")]
    names += ["epsilon_to_score", "x0_to_score", "v_to_score"]

    def use(name: str) -> Use:
        return lambda a: getattr(dj, name)(a["eps"], a["x"], a["ab"])

    return {name: use(name) for name in names if hasattr(dj, name)}


def _networks(schedule: dj.Schedule, key: jax.Array) -> dict[str, Use]:
    model = UNet(
        image_channels=4,
        channels=8,
        channel_mults=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(4,),
        norm_groups=4,
        num_classes=4,
        dropout=0.1,
    )
    params = model.init(jax.random.key(0), jnp.zeros((1, *SHAPE)), 0, 0)
    # Weights that are not nearly zero at the end, so that the output says something.
    params = jax.tree.map(lambda p: p + 0.02 * np.arange(p.size).reshape(p.shape) % 0.1, params)
    params = jax.tree.map(np.asarray, params)

    def loss(params, a):
        network = lambda x, t: model.apply(params, x, t, a["label"])  # noqa: E731
        return mean(dj.eps_loss(dj.image_keys(key, a["i"]), network, schedule, a["x"]))

    def draw(a):
        network = lambda x, t: model.apply(params, x, t, a["label"])  # noqa: E731
        x_T, keys = dj.initial_noise(key, a["i"], SHAPE)
        return dj.sample(keys, network, schedule, x_T, STEPS, dj.ddim(1.0))

    return {
        "unet": lambda a: model.apply(params, a["x"], a["t"], a["label"]),
        "unet, one t": lambda a: model.apply(params, a["x"], 7, a["label"]),
        "unet, vmap": lambda a: jax.vmap(lambda x, t, c: model.apply(params, x, t, c))(
            a["x"], a["t"], a["label"]
        ),
        "unet, bfloat16": lambda a: model.clone(dtype=jnp.bfloat16).apply(
            params, a["x"], a["t"], a["label"]
        ),
        "unet, gradient in x": lambda a: jax.grad(
            lambda x: model.apply(params, x, a["t"], a["label"]).sum()
        )(a["x"]),
        "unet, sample": draw,
        "unet, gradient in weights": lambda a: Whole(jax.grad(loss)(params, a)),
    }


def _trained(num_microbatches: int) -> Use:
    """An update of weights that all devices hold, by a loss that has a state of its own."""

    def loss_fn(params, inputs):
        m, seen = inputs.state["m"], inputs.state["seen"]
        losses = jnp.square(inputs.batch["x"].mean(axis=(1, 2)) @ params["w"] - m)
        return losses, {"m": 0.5 * m + 0.5 * losses.mean(), "seen": seen}

    tx = optax.sgd(0.5)
    weights = {"w": np.arange(1.0, 5.0, dtype=np.float32)}
    loss_state = {"m": np.float32(0.25), "seen": np.int32(3)}

    def update(a):
        state = init_train_state(jax.random.key(1), weights, tx, loss_state=loss_state)
        step = functools.partial(train_step, loss_fn=loss_fn, tx=tx, ema_decay=0.5)
        axis_name = "images" if in_shard_map() else None
        state, metrics = step(
            state, {"x": a["x"]}, axis_name=axis_name, num_microbatches=num_microbatches
        )
        return Whole((state.params, state.ema_params, state.loss_state["m"], metrics))

    return update


def in_shard_map() -> bool:
    try:
        jax.lax.axis_index("images")
    except NameError:
        return False
    return True


def mean(losses: jax.Array) -> jax.Array:
    """Over all images: inside shard_map those of the other devices too."""
    return jax.lax.pmean(losses.mean(), "images") if in_shard_map() else losses.mean()


@jax.tree_util.register_pytree_node_class
class Whole:
    """A result that has no axis of images."""

    def __init__(self, tree: Any):
        self.tree = tree

    def tree_flatten(self):
        return (self.tree,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def ways() -> dict[str, Callable[[Use, dict[str, Any]], Any]]:
    """Name -> (use, arrays) -> result, with the arrays split over all devices."""

    def mesh_of(kind: AxisType) -> jax.sharding.Mesh:
        return jax.make_mesh((jax.device_count(),), ("images",), axis_types=(kind,))

    def place(mesh, a):
        return jax.device_put(a, NamedSharding(mesh, SPLIT))

    def jitted(kind: AxisType):
        def run(use, a):
            mesh = mesh_of(kind)
            with jax.set_mesh(mesh):
                return jax.jit(use)(place(mesh, a))

        return run

    def without_context(use, a):
        return jax.jit(use)(place(mesh_of(AxisType.Explicit), a))

    def eager(use, a):
        mesh = mesh_of(AxisType.Explicit)
        with jax.set_mesh(mesh):
            return use(place(mesh, a))

    def manual(kind: AxisType):
        def run(use, a):
            mesh = mesh_of(kind)
            shapes = jax.eval_shape(use, a)
            out = jax.tree.map(
                lambda part: PartitionSpec() if isinstance(part, Whole) else SPLIT,
                shapes,
                is_leaf=lambda part: isinstance(part, Whole),
            )
            with jax.set_mesh(mesh):
                mapped = jax.shard_map(use, mesh=mesh, in_specs=SPLIT, out_specs=out)
                return jax.jit(mapped)(place(mesh, a))

        return run

    return {
        "jit, automatic axes": jitted(AxisType.Auto),
        "jit, explicit axes": jitted(AxisType.Explicit),
        "jit, explicit axes, no mesh set": without_context,
        "eager, explicit axes": eager,
        "shard_map on automatic axes": manual(AxisType.Auto),
        "shard_map on explicit axes": manual(AxisType.Explicit),
    }


def difference(got: Any, want: Any) -> float:
    """The largest difference from what one device gives, in units of that result's size."""

    def compare(g, w):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        return np.abs(g - w).max() / max(1.0, np.abs(w).max()) if g.shape == w.shape else np.inf

    return max(jax.tree.leaves(jax.tree.map(compare, got, want)))


def together(table: dict[str, Use]) -> Use:
    """All uses as one, since one program compiles sooner than many."""
    return lambda a: {name: use(a) for name, use in table.items()}


def tolerance(name: str) -> float:
    """What splitting may change: the order of sums, which bfloat16 shows."""
    return 2e-2 if "bfloat16" in name else 1e-5


def wrong_in(way: str, table: dict[str, Use], want: dict[str, Any], a: dict[str, Any]) -> list[str]:
    """A line for each use that this way gives another result, or none."""
    try:
        got = ways()[way](together(table), a)
    except Exception as error:
        if len(table) == 1:
            (name,) = table
            text = " ".join(f"{type(error).__name__}: {error}".split())
            return [f"{name} | {way} | {text[:400]}"]
        return [
            line
            for name, use in table.items()
            for line in wrong_in(way, {name: use}, {name: want[name]}, a)
        ]
    off = {name: difference(got[name], want[name]) for name in table}
    return [
        f"{name} | {way} | off by {off[name]:.1e}"
        for name in table
        if not off[name] < tolerance(name)
    ]


def ran_in(way: str, name: str) -> bool:
    """Whether a use is tried in a way.

    On explicit axes a gradient in weights contracts the axis that is split. JAX takes its sharding
    from the weights', if they are on the mesh that is set, and has no rule for convolutions.
    """
    if "shard_map" in way or "automatic" in way:
        return True
    if name == "unet, gradient in weights" or (name.startswith("train_step") and "jit," not in way):
        return False
    if "eager" in way:  # each operation of a network is a program, and they are those of jit
        return not name.startswith("unet,")
    # JAX 0.12 cannot vmap a scan there whose state becomes a batch on the way.
    return not (name.startswith(("train_step", "vmap of one")) and "no mesh" in way)


def main(words: list[str]) -> int:
    """Run the ways that are named, or all; one line for each use that is wrong."""
    a, count = arrays(), 0
    with jax.set_mesh(jax.make_mesh((jax.device_count(),), ("images",))):
        schedule = dj.linear_schedule(1000)  # whose tables belong to no mesh, nevertheless
    table = uses(schedule)
    want = jax.jit(together(table))(a)
    for way in words or ways():
        started = time.monotonic()
        ran = {name: use for name, use in table.items() if ran_in(way, name)}
        lines = wrong_in(way, ran, want, a)
        print(*lines, sep="\n", end="\n" if lines else "")
        seconds = time.monotonic() - started
        print(f"{way}: {len(ran)} uses, {len(lines)} wrong, {seconds:.0f} s", flush=True)
        count += len(lines)
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
