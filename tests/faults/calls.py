"""Calls of the public functions with something wrong: the right answer or a ValueError.

python tests/faults/calls.py 20000 [--seed 0]     draws so many; prints what was silent or foreign

Each argument has a role, and each role ways to be wrong and ways to be unusual and right. A call
with a wrong argument must raise ValueError, or, where values are only known inside jit, give NaN.
A call with unusual and right ones must give what the usual spelling gives.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ddim_jax as dj

T = 20
SCHEDULE = dj.linear_schedule(T)
SHAPES = [(3, 5), (2, 4, 4, 1), (1, 2, 3), (4, 8), (5,), (6, 2, 2, 3), (2, 1, 1, 1, 2)]


@dataclasses.dataclass(frozen=True)
class Role:
    """What an argument is: a usual value, wrong ones, and right ones that are spelt otherwise.

    Each is a function of the data's shape. Wrong values under jit are those whose type is right.
    """

    usual: Callable[[tuple[int, ...]], Any]
    wrong: Mapping[str, Callable[[tuple[int, ...]], Any]]
    wrong_in_jit: Mapping[str, Callable[[tuple[int, ...]], Any]] = dataclasses.field(
        default_factory=dict
    )
    right: Mapping[str, Callable[[Any], Any]] = dataclasses.field(default_factory=dict)
    """Of the usual value."""


def _always(value: Any) -> Callable[[tuple[int, ...]], Any]:
    return lambda shape: value


NOTHING = {
    "None": _always(None), "words": _always("a"), "a list": _always([0.5, 0.5]),
    "a dict": _always({}), "complex": _always(0.5 + 1j), "a function": _always(len),
    "an object array": _always(np.array([None, 1])),
}  # fmt: skip
NO_ARRAYS = {k: v for k, v in NOTHING.items() if k != "a list"}


def _data(seed: int, *, fixed_shape: bool) -> Role:
    def usual(shape):
        return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)

    wrong = {
        **NOTHING,
        "integers": lambda shape: jnp.ones(shape, jnp.int32),
        "grey levels": lambda shape: np.ones(shape, np.uint8),
        "flags": lambda shape: np.ones(shape, bool),
        "complex numbers": lambda shape: jnp.ones(shape, jnp.complex64),
        "an int": _always(3),
    }
    if fixed_shape:
        wrong |= {
            "another shape": lambda shape: jnp.zeros((*shape, 2)),
            "one row more": lambda shape: jnp.zeros((shape[0] + 1, *shape[1:])),
            "no rows": lambda shape: jnp.zeros((0, *shape[1:])),
            "one number": _always(0.5),
        }
    right = {
        "NumPy": np.asarray,
        "float64": lambda x: np.asarray(x, np.float64),
        "split in halves": lambda x: np.asarray(x)[::1],
    }
    return Role(usual, wrong, right=right)


def _level(usual: float, *, beside_data: bool = True) -> Role:
    wrong = {
        **NOTHING,
        "above 1": _always(1.5), "an index": _always(500), "below 0": _always(-0.1),
        "minus infinity": _always(-np.inf), "infinity": _always(np.inf),
        "indices": _always(np.array([5, 3])), "a flag": _always(np.array(True)),
    }  # fmt: skip
    if beside_data:
        wrong |= {
            "other axes": lambda shape: np.full((shape[0] + 1,), 0.5, np.float32),
            "too many axes": lambda shape: np.full((*shape, 1), 0.5, np.float32),
        }
    in_jit = {"above 1": _always(1.5), "below 0": _always(-0.1), "infinity": _always(np.inf)}
    right = {
        "NumPy": np.float32, "float64": np.float64, "a scalar array": jnp.float32,
        "no axes": lambda v: np.full((), v), "one axis": lambda v: np.full((1,), v, np.float32),
    }  # fmt: skip
    return Role(_always(usual), wrong, in_jit, right)


def _eta(usual: float) -> Role:
    wrong = {
        **NOTHING, "below 0": _always(-1.0), "NaN": _always(np.nan), "a flag": _always(True),
    }  # fmt: skip
    in_jit = {"below 0": _always(-1.0), "NaN": _always(np.nan)}
    return Role(_always(usual), wrong, in_jit, {"NumPy": np.float32, "an array": jnp.float32})


def _key(*, optional: bool = False, one: bool = False) -> Role:
    wrong = {
        **{k: v for k, v in NOTHING.items() if not (optional and k == "None")},
        "a seed": _always(0), "a float": _always(0.5),
        "numbers": lambda shape: jnp.zeros(shape),
        "too many keys": lambda shape: jax.random.split(jax.random.key(0), shape[0] + 1),
        "signed words": _always(np.zeros(2, np.int32)),
        "three words": _always(np.zeros(3, np.uint32)),
    }  # fmt: skip
    if one:
        wrong["a key for each"] = lambda shape: jax.random.split(jax.random.key(0), shape[0])
    right = {
        "words of a key": jax.random.key_data,
        "NumPy": lambda k: np.asarray(jax.random.key_data(k)),
    }
    return Role(_always(jax.random.key(3)), wrong, right=right)


SCHEDULE_ROLE = Role(
    _always(SCHEDULE),
    {**NO_ARRAYS, "T": _always(T), "a table": _always(np.linspace(0.9, 0.1, T)),
     "its class": _always(dj.Schedule)},
)  # fmt: skip
TIMESTEPS = Role(
    _always(np.array([15, 8, 2], np.int32)),
    {
        **{k: v for k, v in NOTHING.items() if k != "a list"},
        "how many": _always(3), "fractions": _always([15.5, 2.5]), "floats": _always([15.0, 2.0]),
        "ascending": _always([2, 8, 15]), "none": _always([]), "T": _always([T, 3]),
        "-1": _always([5, -1]), "a matrix": _always(np.array([[5, 3]])),
        "flags": _always(np.array([True, False])), "wrapped": _always(np.array([2**32 + 5, 3])),
    },
    {"-1": _always(np.array([15, 8, -1])), "T": _always(np.array([T, 8, 2]))},
    {
        "a list": lambda t: t.tolist(), "a tuple": lambda t: tuple(t.tolist()),
        "unsigned": lambda t: t.astype(np.uint32), "bytes": lambda t: t.astype(np.uint8),
        "int64": lambda t: t.astype(np.int64), "an array": jnp.asarray,
    },
)  # fmt: skip
TIME = Role(
    _always(5),
    {
        **NOTHING, "a fraction": _always(0.5), "T": _always(T), "-2": _always(-2),
        "wrapped": _always(2**32 + 5), "a wrapped -1": _always(np.uint32(2**32 - 1)),
        "a flag": _always(True),
    },
    {"T": _always(T), "-2": _always(-2), "a wrapped -1": _always(np.uint32(2**32 - 1))},
    {"NumPy": np.int64, "unsigned": np.uint8, "an array": jnp.int32},
)  # fmt: skip
TIME_OF_DATA = dataclasses.replace(
    TIME, wrong={**TIME.wrong, "other axes": lambda shape: np.zeros(shape[0] + 1, np.int32)}
)
INDICES = Role(
    lambda shape: np.arange(shape[0]),
    {
        **{k: v for k, v in NOTHING.items() if k != "a list"},
        "how many": _always(3), "fractions": lambda shape: np.arange(shape[0]) + 0.7,
        "a matrix": _always(np.array([[0, 1]])), "2**32": lambda s: np.arange(s[0]) + 2**32,
        "negative": lambda s: np.arange(s[0]) - 9, "flags": lambda s: np.ones(s[0], bool),
    },
    right={"unsigned": lambda i: i.astype(np.uint8), "an array": jnp.asarray},
)  # fmt: skip


def _count(usual: int, *, at_least: int = 1) -> Role:
    wrong = {
        **NOTHING, "a fraction": _always(2.5), "too few": _always(at_least - 1),
        "negative": _always(-3), "a number in words": _always("3"), "a flag": _always(True),
        "NaN": _always(np.nan), "an array": _always(np.array([2, 3])),
    }  # fmt: skip
    return Role(_always(usual), wrong, right={"NumPy": np.int64})


def _number(usual: float, wrong: Mapping[str, float]) -> Role:
    values = {name: _always(value) for name, value in wrong.items()}
    bad = {**NOTHING, "NaN": _always(np.nan), "a flag": _always(True), **values}
    return Role(_always(usual), bad, right={"NumPy": np.float64})


def _choice(usual: str) -> Role:
    return Role(_always(usual), {**NOTHING, "another": _always("nope"), "a number": _always(3)})


def _network(x, t):
    return 0.5 * x


FN = Role(
    _always(_network),
    {
        **{k: v for k, v in NO_ARRAYS.items() if k != "a function"},
        "an array": lambda shape: jnp.zeros(shape), "its name": _always("eps_fn"),
        "nothing back": _always(lambda x, t: None), "words back": _always(lambda x, t: "a"),
        "another shape back": _always(lambda x, t: x[..., None]),
        "a pair back": _always(lambda x, t: (x, x)),
        "integers back": _always(lambda x, t: jnp.ones(x.shape, jnp.int32)),
    },
)  # fmt: skip
SAMPLER = Role(
    _always(dj.ddim(0.5)),
    {**{k: v for k, v in NOTHING.items() if k != "None"}, "its name": _always("ddim"),
     "uncalled": _always(dj.ddim)},
)  # fmt: skip
FLAG = Role(
    _always(False),
    {**NOTHING, "no": _always("no"), "a number": _always(2.5), "flags": _always([True, False])},
    right={"NumPy": np.bool_, "an array": jnp.asarray},
)  # fmt: skip
SIGMAS = Role(
    lambda shape: np.asarray(dj.process_sigmas(SCHEDULE, np.array([15, 8, 2]))),
    {
        **{k: v for k, v in NOTHING.items() if k != "a list"}, "one": _always(0.5),
        "too few": _always(np.ones(2, np.float32)), "negative": _always(-np.ones(3, np.float32)),
        "zero": _always(np.zeros(3, np.float32)), "NaN": _always(np.full(3, np.nan, np.float32)),
        "whole numbers": _always(np.ones(3, np.int32)),
    },
    right={"float64": lambda s: s.astype(np.float64), "an array": jnp.asarray},
)  # fmt: skip
SHAPE = Role(
    lambda shape: shape[1:],
    {**{k: v for k, v in NOTHING.items() if k not in ("a list",)}, "negative": _always((2, -1)),
     "fractions": _always((2.5,)), "an array": lambda shape: jnp.zeros(shape)},
)  # fmt: skip
BETAS = Role(
    _always(np.linspace(1e-3, 0.2, T)),
    {**NOTHING, "an int": _always(3), "above 1": _always([0.5, 1.5]), "zero": _always([0.0, 0.5]),
     "NaN": _always([0.1, np.nan]), "none": _always([]), "a matrix": _always(np.full((2, 2), 0.1)),
     "flags": _always(np.array([True, True])), "tiny": _always([1e-12, 1e-12])},
    right={"a list": lambda b: b.tolist(), "an array": jnp.asarray},
)  # fmt: skip
del BETAS.wrong["a list"]  # pyright: ignore

X = _data(0, fixed_shape=False)
LIKE_X = _data(1, fixed_shape=True)
AB, AB_PREV = _level(0.4), _level(0.7)
PAIR = {"alpha_bar": AB, "alpha_bar_prev": AB_PREV}
ALONE = {"alpha_bar": _level(0.4, beside_data=False),
         "alpha_bar_prev": _level(0.7, beside_data=False)}  # fmt: skip


def uses() -> dict[str, tuple[Callable[..., Any], dict[str, Role]]]:
    """Name -> function, and the role of each of its arguments."""
    table: dict[str, tuple[Callable[..., Any], dict[str, Role]]] = {}
    for a in ("epsilon", "x0", "v", "score"):
        for b in ("epsilon", "x0", "v", "score"):
            if a != b:
                own = "eps" if a == "epsilon" else a
                roles = {own: LIKE_X, "x_t": X, "alpha_bar": AB}
                table[f"{a}_to_{b}"] = getattr(dj, f"{a}_to_{b}"), roles

    def applied(wrapper):
        def call(fn, schedule, x, t):
            return wrapper(fn, schedule)(x, t)

        return call

    wrapped = {"fn": FN, "schedule": SCHEDULE_ROLE, "x": X, "t": TIME_OF_DATA}
    run = {"key": _key(optional=True), "eps_fn": FN, "schedule": SCHEDULE_ROLE, "x_T": X,
           "timesteps": TIMESTEPS, "sampler": SAMPLER}  # fmt: skip
    coded = {"eps_fn": FN, "schedule": SCHEDULE_ROLE, "x_0": X, "timesteps": TIMESTEPS}
    grid = {"schedule": SCHEDULE_ROLE, "timesteps": TIMESTEPS}
    beta = {"zero": 0.0, "one": 1.0, "negative": -0.1, "infinite": np.inf}
    return table | {
        "velocity": (dj.velocity, {"x0": X, "eps": LIKE_X, "alpha_bar": AB}),
        "add_noise": (
            dj.add_noise,
            {"schedule": SCHEDULE_ROLE, "x0": X, "eps": LIKE_X, "t": TIME_OF_DATA},
        ),
        "posterior_mean": (
            dj.posterior_mean,
            {"x0": LIKE_X, "x_t": X, **PAIR, "sigma": _eta(0.1)},
        ),
        "ddpm_posterior": (dj.ddpm_posterior, {"x0": LIKE_X, "x_t": X, **PAIR}),
        "ddim_sigma": (dj.ddim_sigma, {**ALONE, "eta": _eta(0.5)}),
        "ddim_sigma_hat": (dj.ddim_sigma_hat, ALONE),
        "ddim_step": (
            dj.ddim_step,
            {"x_t": X, "eps": LIKE_X, **PAIR, "eta": _eta(0.5), "noise": LIKE_X},
        ),
        "ddpm_step": (
            dj.ddpm_step,
            {"x_t": X, "eps": LIKE_X, **PAIR, "noise": LIKE_X, "variance": _choice("fixed_large")},
        ),
        "sigma_hat_step": (
            dj.sigma_hat_step, {"x_t": X, "eps": LIKE_X, **PAIR, "noise": LIKE_X},
        ),
        "to_ode_coordinates": (dj.to_ode_coordinates, {"x_t": X, "alpha_bar": AB}),
        "from_ode_coordinates": (dj.from_ode_coordinates, {"x_bar": X, "s": _eta(0.5)}),
        "lerp": (dj.lerp, {"a": X, "b": LIKE_X, "fraction": _number(0.3, {})}),
        "slerp": (dj.slerp, {"a": X, "b": LIKE_X, "fraction": _number(0.3, {})}),
        "interpolation_line": (
            dj.interpolation_line, {"a": X, "b": LIKE_X, "num_points": _count(3, at_least=2)},
        ),
        "draw_noise": (dj.draw_noise, {"key": _key(), "x": X}),
        "image_keys": (dj.image_keys, {"key": _key(one=True), "indices": INDICES}),
        "initial_noise": (
            dj.initial_noise, {"key": _key(one=True), "indices": INDICES, "image_shape": SHAPE},
        ),
        "seed_key": (dj.seed_key, {"seed": _count(7, at_least=0)}),
        "linear_schedule": (
            dj.linear_schedule,
            {"num_steps": _count(9), "beta_start": _number(0.01, beta),
             "beta_end": _number(0.2, beta)},
        ),
        "scaled_linear_schedule": (
            dj.scaled_linear_schedule,
            {"num_steps": _count(9), "beta_start": _number(0.01, beta),
             "beta_end": _number(0.2, beta)},
        ),
        "cosine_schedule": (
            dj.cosine_schedule,
            {"num_steps": _count(9), "offset": _number(0.008, {"negative": -0.1, "inf": np.inf}),
             "max_beta": _number(0.999, {"zero": 0.0, "one": 1.0, "above": 2.0})},
        ),
        "schedule_from_betas": (dj.schedule_from_betas, {"betas": BETAS}),
        "zero_terminal_snr": (dj.zero_terminal_snr, {"schedule": SCHEDULE_ROLE}),
        "ddim_timesteps": (
            dj.ddim_timesteps,
            {"num_steps": _count(T), "num_sample_steps": _count(5), "spacing": _choice("trailing")},
        ),
        "alpha_bar": (lambda t: SCHEDULE.alpha_bar(t), {"t": TIME}),
        "noise_variance": (lambda t: SCHEDULE.noise_variance(t), {"t": TIME}),
        "log_snr": (lambda t: SCHEDULE.log_snr(t), {"t": TIME}),
        "sample": (dj.sample, run),
        "sample_trajectory": (dj.sample_trajectory, run),
        "encode": (dj.encode, coded),
        "encode_fixed_point": (
            dj.encode_fixed_point, {**coded, "num_iterations": _count(2)},
        ),
        "eps_loss": (
            dj.eps_loss,
            {"key": _key(), "eps_fn": FN, "schedule": SCHEDULE_ROLE, "x0": X,
             "norm": _choice("l1")},
        ),
        "prediction_loss": (
            dj.prediction_loss,
            {"key": _key(), "network_fn": FN, "schedule": SCHEDULE_ROLE, "x0": X,
             "predicts": _choice("v")},
        ),
        "antithetic_timesteps": (
            dj.antithetic_timesteps,
            {"key": _key(one=True), "indices": INDICES, "batch_size": _count(8),
             "schedule": SCHEDULE_ROLE},
        ),
        "process_sigmas": (dj.process_sigmas, {**grid, "eta": _eta(0.5)}),
        "fixed_large_sigmas": (dj.fixed_large_sigmas, grid),
        "variational_weights": (dj.variational_weights, {**grid, "sigma": SIGMAS}),
        "variational_bound": (
            dj.variational_bound,
            {"key": _key(), "eps_fn": FN, "schedule": SCHEDULE_ROLE, "x0": X,
             "timesteps": TIMESTEPS, "sigma": SIGMAS},
        ),
        "from_v": (applied(dj.from_v), wrapped),
        "from_x0": (applied(dj.from_x0), wrapped),
        "from_score": (applied(dj.from_score), wrapped),
        "clip_x0": (applied(dj.clip_x0), wrapped),
        "clip_x0_keep_eps": (applied(dj.clip_x0_keep_eps), wrapped),
        "guided": (
            lambda cond, uncond, scale, x: dj.guided(cond, uncond, scale)(x, jnp.int32(3)),
            {"cond": FN, "uncond": FN, "scale": _number(1.5, {}), "x": X},
        ),
        "ddim": (
            lambda eta, x: dj.sample(
                jax.random.key(0), _network, SCHEDULE, x, [5, 2], dj.ddim(eta)
            ),
            {"eta": _eta(0.5), "x": X},
        ),
        "ddim_or_sigma_hat": (
            lambda eta, flag, x: dj.sample(
                jax.random.key(0), _network, SCHEDULE, x, [5, 2], dj.ddim_or_sigma_hat(eta, flag)
            ),
            {"eta": _eta(0.5), "flag": FLAG, "x": X},
        ),
        "named_sampler": (
            lambda name, eta, x: dj.sample(
                jax.random.key(0), _network, SCHEDULE, x, [5, 2], dj.named_sampler(name, eta)
            ),
            {"name": _choice("ddim"), "eta": _eta(0.5), "x": X},
        ),
        "min_snr": (
            lambda predicts, gamma: dj.min_snr(predicts, gamma)(jnp.float32(0.3)),
            {"predicts": _choice("v"),
             "gamma": _number(5.0, {"zero": 0.0, "negative": -1.0})},
        ),
        "Schedule": (
            lambda table: dj.Schedule(table).alpha_bar(2),
            {"table": Role(
                _always(np.linspace(0.9, 0.1, T, dtype=np.float32)),
                {**NOTHING, "rising": _always(np.linspace(0.1, 0.9, T)),
                 "levels of 1": _always(np.ones(3, np.float32)),
                 "whole numbers": _always(np.arange(3)), "none": _always(np.zeros(0, np.float32)),
                 "NaN": _always(np.array([0.9, np.nan, 0.1]))},
            )},
        ),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Call:
    """A function, the data's shape, which argument is replaced by what, and whether under jit."""

    name: str
    shape: tuple[int, ...]
    argument: str
    how: str
    kind: str
    """wrong, wrong in jit, or right"""


Uses = Callable[[], dict[str, tuple[Callable[..., Any], dict[str, Role]]]]
"""Name -> function, and the role of each of its arguments."""


def every_call(shape: tuple[int, ...], table: Uses | None = None) -> list[Call]:
    """Every argument of every function, replaced by each thing that its role knows."""
    return [
        Call(name, shape, argument, how, kind)
        for name, (_, roles) in (table or uses)().items()
        for argument, role in roles.items()
        for kind, hows in (("wrong", role.wrong), ("wrong in jit", role.wrong_in_jit),
                           ("right", role.right))
        for how in hows
    ]  # fmt: skip


def fault_of(call: Call, table: Uses | None = None) -> str | None:
    """What is wrong with the answer; None where it is as it should be."""
    function, roles = (table or uses)()[call.name]
    arguments = {name: role.usual(call.shape) for name, role in roles.items()}
    role = roles[call.argument]
    try:
        if call.kind == "right":
            want = function(**arguments)
            arguments[call.argument] = role.right[call.how](arguments[call.argument])
            return _differs(function(**arguments), want)
        if call.kind == "wrong":
            arguments[call.argument] = role.wrong[call.how](call.shape)
            answer = function(**arguments)
        else:
            bad = jnp.asarray(role.wrong_in_jit[call.how](call.shape))

            def traced(value):
                return function(**{**arguments, call.argument: value})

            answer = jax.jit(traced)(bad)
    except ValueError as error:
        return None if call.kind != "right" and _is_ours(error) else f"foreign {_said(error)}"
    except Exception as error:  # of any kind: that is what is looked for
        return f"foreign {_said(error)}"
    return None if _says_nan(answer) else f"silent: {_short(answer)}"


def _is_ours(error: BaseException) -> bool:
    """Whether it was raised in a file of this project, and not below it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and "ddim_jax" in trace.tb_frame.f_code.co_filename


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def _leaves(answer: Any) -> list[np.ndarray]:
    leaves = jax.tree.leaves(answer)
    return [
        np.asarray(jax.random.key_data(x) if _is_key(x) else x, np.float64)
        for x in leaves
        if isinstance(x, jax.Array | np.ndarray | np.generic | float | int)
    ]


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _says_nan(answer: Any) -> bool:
    """Of several answers one may be right: what a network itself said, the steps before."""
    return any(np.isnan(leaf).any() for leaf in _leaves(answer))


def _differs(found: Any, want: Any) -> str | None:
    a, b = _leaves(found), _leaves(want)
    if len(a) != len(b):
        return f"another structure: {_short(found)}"
    for x, y in zip(a, b, strict=True):
        if np.squeeze(x).shape != np.squeeze(y).shape or not np.allclose(x, y, 1e-4, 1e-5):
            return f"another answer: {_short(found)}, not {_short(want)}"
    return None


def _short(answer: Any) -> str:
    return " ".join(str(answer).split())[:80]


def main(table: Uses = uses, shapes: Sequence[tuple[int, ...]] = SHAPES) -> int:
    """Make calls, and print the faults by function and argument; their number."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    rng = random.Random(asked.seed)
    calls = [call for shape in shapes for call in every_call(shape, table)]
    rng.shuffle(calls)
    calls = calls[: asked.count]
    found = collections.defaultdict(list)
    for call in calls:
        if fault := fault_of(call, table):
            found[f"{call.name}({call.argument})"].append(f"{call.how} [{call.kind}]: {fault}")
    for place, faults in sorted(found.items()):
        print(place)
        for fault in sorted(set(faults)):
            print(f"    {fault}")
    number = sum(map(len, found.values()))
    kinds = collections.Counter(call.kind for call in calls)
    print(f"{len(calls)} calls ({dict(kinds)}), {number} faults")
    return number


if __name__ == "__main__":
    raise SystemExit(min(main(), 1))
