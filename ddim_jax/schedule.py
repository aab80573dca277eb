"""Noise schedules, and the sub-sequences of time indices that samplers visit.

The one table is alphas_cumprod, the cumulative product of 1 - beta. It is what the DDIM paper
calls alpha; we call its value at index t `alpha_bar`. Index -1 is clean data: alpha_bar(-1) = 1.
Beside it stands 1 - alphas_cumprod, rounded by itself: near clean data float32 keeps only three
digits of the difference.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ddim_jax.checks import check_count, check_floating, check_number, check_same_shape
from ddim_jax.tables import take_or_nan
from ddim_jax.types import Level, PRNGKey, Time, Timesteps, is_traced

Spacing = Literal["uniform", "quadratic", "linspace", "trailing"]
NOISY_SHARE = 0.7
"""Of T: a sub-sequence that starts below this index starts where images are not noise yet."""
MAX_STEPS = 10**6
Table: TypeAlias = Float[Array, "T"] | Float[np.ndarray, "T"]
"""NumPy's where it is known: a JAX array would belong to the mesh that was set when it was made."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Noise schedule over indices: q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I).

    That -1 is clean data, and which indices there are, is known to its methods alone: other code
    asks them, and so takes a schedule of any other kind (`NoiseSchedule`).
    A pytree, so it passes through jit, vmap and grad as an argument. Build one with
    `linear_schedule` and its siblings, or from a table (T,) of one's own.
    Raises ValueError for tables, unless they are traced, that are none of such levels.
    """

    alphas_cumprod: Table  # strictly decreasing, inside (0, 1); the last may be 0
    noise_variances: Table | None = None
    """1 - alphas_cumprod, rounded by itself. None takes the difference of what is there: for tables
    that are learned, whose gradient must see one table, or given in float64."""

    def __post_init__(self) -> None:  # noqa: D105
        _check_tables(self.alphas_cumprod, self.noise_variances)

    @property
    def num_steps(self) -> int:
        """T, the number of noise levels the network was trained on."""
        return self.alphas_cumprod.shape[0]

    @property
    def clean(self) -> int:
        """-1, the index of clean data."""
        return -1

    def alpha_bar(self, t: Time, /) -> Float[Array, "*index"]:
        """Signal level at index t, in [0, 1]: 1 at t = -1 (clean data), NaN outside [-1, T - 1]."""
        return _look_up(self.alphas_cumprod, t, clean=1.0)

    def noise_variance(self, t: Time, /) -> Float[Array, "*index"]:
        """1 - alpha_bar(t), exact to float32's last digit; 0 at t = -1, NaN outside [-1, T - 1].

        `1 - schedule.alpha_bar(0)` is off by 1.6e-4 of itself for the published schedule. No step
        notices; a ratio of such small variances does, as in the variational bound.
        """
        if self.noise_variances is None:
            return 1 - self.alpha_bar(t)
        return _look_up(self.noise_variances, t, clean=0.0)

    def log_snr(self, t: Time, /) -> Float[Array, "*index"]:
        """Log signal-to-noise ratio log(alpha_bar / (1 - alpha_bar)) at t; +inf at t = -1."""
        return jnp.log(self.alpha_bar(t)) - jnp.log(self.noise_variance(t))

    def is_clean(self, t: Time, /) -> Bool[Array, "*index"]:
        """Whether t is -1, clean data."""
        return jnp.asarray(t) == self.clean

    def nearest(self, log_snr: Level, /) -> Int[Array, "*level"]:
        """The index in [0, T - 1] whose log SNR is nearest to the one given."""
        alpha_bar = jnp.asarray(self.alphas_cumprod)
        known = jnp.log(alpha_bar) - jnp.log1p(-alpha_bar)
        # Finite, since the last level may be 0 and what is asked for clean data or pure noise.
        distance = jnp.abs(_finite(jnp.asarray(log_snr))[..., None] - _finite(known))
        return jnp.argmin(distance, axis=-1).astype(jnp.int32)

    def timesteps(self, num_sample_steps: int, spacing: str = "uniform") -> Int[np.ndarray, "S"]:
        """`ddim_timesteps` for this T."""
        return ddim_timesteps(self.num_steps, num_sample_steps, spacing)  # pyright: ignore[reportArgumentType]

    def check_timesteps(self, timesteps: Timesteps) -> Int[Array, "S"]:
        """The indices as int32, checked: descending, inside [0, T - 1], not empty.

        A repeated index is allowed. Values that are traced cannot be checked; an index outside the
        schedule then gives NaN samples. Raises ValueError for anything else that breaks the rule.
        """
        return _check_indices(timesteps, self.num_steps)

    def draw(self, key: PRNGKey, /, shape: tuple[int, ...] = ()) -> Int[Array, "..."]:
        """Indices uniform over [0, T - 1]."""
        # Under x64 other bits would be drawn, of int64.
        return jax.random.randint(key, shape, 0, self.num_steps, jnp.int32)

    def mirror(self, t: Int[Array, "*index"], /) -> Int[Array, "*index"]:
        """T - 1 - t."""
        return self.num_steps - 1 - t


def _flatten(schedule: Schedule):
    names = ("alphas_cumprod", "noise_variances")
    return [(jax.tree_util.GetAttrKey(name), getattr(schedule, name)) for name in names], None


def _unflatten(_: None, tables) -> Schedule:
    """Unchecked: JAX puts gradients, batches and placeholders into the same tree."""
    schedule = object.__new__(Schedule)
    for name, table in zip(("alphas_cumprod", "noise_variances"), tables, strict=True):
        object.__setattr__(schedule, name, table)
    return schedule


jax.tree_util.register_pytree_with_keys(Schedule, _flatten, _unflatten)


def _check_tables(alphas_cumprod: Table, noise_variances: Table | None) -> None:
    if is_traced(alphas_cumprod) or is_traced(noise_variances):
        return
    check_floating("alphas_cumprod", alphas_cumprod)
    levels = np.asarray(alphas_cumprod, np.float64)
    if levels.ndim != 1 or levels.size == 0:
        raise ValueError(
            f"alphas_cumprod must be a non-empty vector (T,); got shape {levels.shape}."
        )
    if not (levels[0] < 1 and levels[-1] >= 0 and np.all(np.diff(levels) < 0)):
        raise ValueError(
            "alphas_cumprod must fall strictly inside (0, 1), from t = 0, next to clean data, to "
            f"T - 1, where it may be 0; got {_preview(levels)}. Reverse a table that rises; of "
            "betas, take schedule_from_betas(betas)."
        )
    if noise_variances is not None:
        check_same_shape("noise_variances", noise_variances, alphas_cumprod)
        if not np.allclose(np.asarray(noise_variances), 1 - levels, atol=1e-3):
            raise ValueError(
                "noise_variances must be 1 - alphas_cumprod; got "
                f"{_preview(np.asarray(noise_variances))}. Leave it out to have it computed."
            )


def _finite(log_snr: jax.Array) -> jax.Array:
    return jnp.clip(log_snr, -160.0, 160.0)


def _look_up(table: Table, t: Time, clean: float) -> Float[Array, "*index"]:
    """table[t], `clean` at -1, NaN where the table has no such index."""
    t = _as_index(t)
    # A wrong index must show, but no right one: else jax_debug_nans would stop at clean data.
    value = take_or_nan(jnp.asarray(table), jnp.where(t == -1, 0, t))
    return jnp.where(t == -1, jnp.full_like(value, clean), value)


def _as_index(t: Time) -> Int[Array, "*index"]:
    known = t if isinstance(t, jax.Array) else np.asarray(t)
    if not jnp.issubdtype(known.dtype, jnp.integer):
        if isinstance(t, int) and not isinstance(t, bool):  # beyond what NumPy counts
            return jnp.int32(_FAR)
        raise ValueError(f"t must be integer indices into the schedule; got dtype {known.dtype}.")
    # None wraps to another: uint32's last is not -1, clean data, nor is 2**32 + 5 the index 5.
    if jnp.iinfo(known.dtype).max > _FAR:
        array = jnp if isinstance(known, jax.Array) else np
        known = array.where((known > _FAR) | (known < -1), _FAR, known)
    return jnp.asarray(known).astype(jnp.int32)


_FAR = 2**31 - 1
"""An index that no schedule has."""


def schedule_from_betas(betas: Sequence[float] | np.ndarray | Float[Array, "T"]) -> Schedule:
    """Schedule with DDPM's per-step variances `betas`, shape (T,), each in (0, 1).

    Both tables are taken in float64 on the host and cast to float32 once.
    Raises ValueError for another rank, an empty array, a value outside (0, 1), or betas so small or
    so many that float32 cannot tell two levels, or a level from 0 or 1, apart.
    Source: Ho et al. 2020 (arXiv:2006.11239), section 2.
    """
    given = np.asarray(betas)
    if not jnp.issubdtype(given.dtype, jnp.floating):
        raise ValueError(f"betas must be floating point, each in (0, 1); got dtype {given.dtype}.")
    betas = given.astype(np.float64)
    if betas.ndim != 1 or betas.size == 0:
        raise ValueError(f"betas must be a non-empty vector (T,); got shape {betas.shape}.")
    if not (np.all(betas > 0) and np.all(betas < 1)):
        raise ValueError(
            f"betas must lie in (0, 1); got values from {betas.min():g} to {betas.max():g}."
        )
    exact = np.cumprod(1.0 - betas)
    alphas_cumprod = exact.astype(np.float32)
    levels = np.concatenate([[1.0], alphas_cumprod])
    if not (np.all(np.diff(levels) < 0) and levels[-1] >= np.finfo(np.float32).tiny):
        raise ValueError(
            "betas must give levels alpha_bar that fall strictly from 1 towards 0 in float32; "
            f"got {_preview(levels)}. Betas below 6e-8 do not move alpha_bar; too many near 1 "
            "exhaust it: use fewer steps."
        )
    return Schedule(alphas_cumprod, (1 - exact).astype(np.float32))


def linear_schedule(
    num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Schedule:
    """Schedule with betas linear in t, the one every published DDIM network was trained with.

    Source: Ho et al. 2020, section 4. The defaults give alpha_bar(999) = 4.0358e-5.
    """
    _check_num_steps(num_steps)
    check_number("beta_start", beta_start)
    check_number("beta_end", beta_end)
    return schedule_from_betas(np.linspace(beta_start, beta_end, num_steps, dtype=np.float64))


def scaled_linear_schedule(
    num_steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
) -> Schedule:
    """Schedule with sqrt(beta) linear in t, as latent diffusion models use.

    Source: Rombach et al. 2022 (arXiv:2112.10752), their released configurations.
    """
    _check_num_steps(num_steps)
    check_number("beta_start", beta_start)
    check_number("beta_end", beta_end)
    if not (beta_start > 0 and beta_end > 0):
        raise ValueError(
            f"beta_start and beta_end must lie in (0, 1); got {beta_start} and {beta_end}."
        )
    roots = np.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=np.float64)
    return schedule_from_betas(roots**2)


def cosine_schedule(
    num_steps: int = 1000, offset: float = 0.008, max_beta: float = 0.999
) -> Schedule:
    """Schedule whose alpha_bar follows a squared cosine, betas clipped at `max_beta`.

    Source: Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 17.
    """
    _check_num_steps(num_steps)
    check_number("offset", offset)
    check_number("max_beta", max_beta)
    if offset < 0 or not 0 < max_beta < 1:
        raise ValueError(
            f"offset must be at least 0, and max_beta in (0, 1); got {offset} and {max_beta}."
        )
    time = np.arange(num_steps + 1, dtype=np.float64) / num_steps
    level = np.cos((time + offset) / (1 + offset) * np.pi / 2) ** 2
    return schedule_from_betas(np.minimum(1 - level[1:] / level[:-1], max_beta))


def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """The schedule with alpha_bar(T - 1) = 0, pure noise, and its first level as it was.

    sqrt(alpha_bar) is shifted and scaled in float64 on the host. The tables given are float32, and
    the shift cancels digits: the result is right to about 1e-5 of itself near T - 1, to the last
    digit near clean data. At T - 1 eps says nothing about x0: such a network predicts v or x0.
    Raises ValueError for fewer than two steps, which cannot keep the first level and end at 0.
    Source: Lin et al. 2023 (arXiv:2305.08891), algorithm 1.
    """
    if not isinstance(schedule, Schedule):
        raise ValueError(
            "schedule must be a Schedule, such as linear_schedule() gives; got "
            f"{type(schedule).__name__}."
        )
    if schedule.num_steps < 2:
        raise ValueError(
            "schedule must have at least 2 steps, the first to stay and the last to become pure "
            f"noise; got {schedule.num_steps}."
        )
    levels = np.asarray(schedule.alphas_cumprod, np.float64)
    noise = 1 - levels
    if schedule.noise_variances is not None:
        noise = np.asarray(schedule.noise_variances, np.float64)
    root = np.sqrt(np.where(noise < levels, 1 - noise, levels))  # the smaller one is more exact
    exact = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    levels, noise = np.append(levels[0], exact[1:]), np.append(noise[0], 1 - exact[1:])
    dtype = schedule.alphas_cumprod.dtype
    return Schedule(levels.astype(dtype), noise.astype(dtype))


def _check_num_steps(num_steps: int) -> None:
    check_count("num_steps", num_steps)
    if num_steps > MAX_STEPS:  # before memory for so many is asked for
        raise ValueError(
            f"num_steps must be at most {MAX_STEPS}, since float32 cannot tell the levels of more "
            f"apart; got {num_steps}."
        )


def ddim_timesteps(
    num_steps: int, num_sample_steps: int, spacing: Spacing = "uniform"
) -> Int[np.ndarray, "S"]:
    """Time indices a sampler visits: int32, descending, exactly `num_sample_steps` of them.

    spacing:
      "uniform": i * (T // S), the paper's linear sub-sequence. S = 10: 900, 800, .., 0.
      "quadratic": int(linspace(0, sqrt(0.8 T), S)**2), the paper's choice for CIFAR-10.
        S = 10: 800, 632, 483, .., 9, 0. A large S repeats an index, which leaves x unchanged.
      "linspace": round(linspace(0, T - 1, S)), both ends included.
      "trailing": round(T - i * T / S) - 1, from T - 1 downwards.
    With S = T each is all of T - 1, .., 0, and with S = 1 it is T - 1, where x_T is noise; the
    paper's rules, read literally, would visit 0 alone.

    Warns where the first index is below 0.7 T, as that of "uniform" is for S = 2, 3 and for S above
    T / 2: at 0.7 T of DDPM's schedule alpha_bar is 0.007, and 0.08 at T / 2, so that noise is not
    what the network expects there, and samples are pale.
    Raises ValueError unless 1 <= num_sample_steps <= num_steps and the spacing is one of these.
    Source: Song et al. 2021, appendix D.2; the last two are other tools' habits.
    """
    _check_num_steps(num_steps)
    whole = isinstance(num_sample_steps, int | np.integer) and not isinstance(
        num_sample_steps, bool
    )
    if not whole or not 1 <= num_sample_steps <= num_steps:
        raise ValueError(
            f"num_sample_steps must be an integer in [1, {num_steps}], the length of the trained "
            f"schedule; got {num_sample_steps!r}."
        )
    if not isinstance(spacing, str) or spacing not in get_args(Spacing):
        raise ValueError(f"spacing must be one of {get_args(Spacing)}; got {spacing!r}.")
    timesteps = _ascending(num_steps, num_sample_steps, spacing).astype(np.int32)[::-1].copy()
    warn_of_low_start(
        timesteps, num_steps, f"spacing={spacing!r} with {num_sample_steps} of {num_steps} steps"
    )
    return timesteps


def warn_of_low_start(timesteps: np.ndarray, num_steps: int, what: str) -> None:
    """Warn where the first of the times, which are called `what`, is below 0.7 T."""
    if timesteps[0] < NOISY_SHARE * num_steps:
        warnings.warn(
            f"{what} starts at t = {timesteps[0]}, where images are not noise yet: samples drawn "
            f'from noise come out pale. spacing="trailing" starts at {num_steps - 1}.',
            stacklevel=3,
        )


def _ascending(num_steps: int, num_sample_steps: int, spacing: Spacing) -> np.ndarray:
    if num_sample_steps == num_steps:
        return np.arange(num_steps)
    if num_sample_steps == 1:
        return np.array([num_steps - 1])
    i = np.arange(num_sample_steps)
    match spacing:
        case "uniform":
            return i * (num_steps // num_sample_steps)
        case "quadratic":
            # float64 on the host: in float32 the floor differs for a quarter of all S.
            return np.linspace(0, np.sqrt(0.8 * num_steps), num_sample_steps) ** 2
        case "linspace":
            return np.round(np.linspace(0, num_steps - 1, num_sample_steps))
        case "trailing":
            return np.round(num_steps - i * (num_steps / num_sample_steps))[::-1] - 1


def _check_indices(timesteps: Timesteps, num_steps: int) -> Int[Array, "S"]:
    indices = jnp.asarray(timesteps) if is_traced(timesteps) else np.asarray(timesteps)
    if indices.ndim != 1 or indices.size == 0 or not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(
            "timesteps must be a non-empty vector of integers, such as ddim_timesteps gives; "
            f"got shape {indices.shape} and dtype {indices.dtype}."
        )
    if isinstance(indices, jax.Array):
        # Clean data is no place to start from; as an index that there is not it gives NaN.
        return jnp.where(indices < 0, num_steps, indices).astype(jnp.int32)
    indices = indices.astype(np.int64)  # the differences of unsigned ones would wrap
    if np.any(np.diff(indices) > 0):
        raise ValueError(
            "timesteps must descend, from the noisiest index to the cleanest; "
            f"got {_preview(indices)}. Reverse the list, or sort it."
        )
    if indices[-1] < 0 or indices[0] >= num_steps:
        raise ValueError(
            f"timesteps must lie in [0, {num_steps - 1}], the trained schedule; "
            f"got {_preview(indices)}."
        )
    return jnp.asarray(indices, jnp.int32)


def _preview(values: np.ndarray) -> str:
    return np.array2string(
        values, max_line_width=1000, precision=6, threshold=8, edgeitems=3, separator=", "
    )
