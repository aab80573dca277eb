"""What users hand over by mistake is refused by the argument's name, the rule and the value."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refused

import ddim_jax as dj

KEY = jax.random.key(0)
SCHEDULE = dj.linear_schedule(1000)
X = jnp.ones((2, 4, 4, 1))
STEPS = dj.ddim_timesteps(1000, 4)
RISING = np.linspace(0.1, 0.9, 10, dtype=np.float32)


def eps_fn(x, t):
    return x


BAD = {
    # Tables that are no schedule.
    "a list": (lambda: dj.Schedule([0.9, 0.5]), "alphas_cumprod must be an array; got list"),
    "rising": (
        lambda: dj.Schedule(RISING),
        r"fall strictly.*got \[0\.1.*, 0\.18888.*, \.\.\., .*\]\. Reverse",
    ),
    "rising, on a device": (lambda: dj.Schedule(jnp.asarray(RISING)), "must fall strictly"),
    "betas": (lambda: dj.Schedule(np.linspace(1e-4, 0.02, 9)), r"schedule_from_betas\(betas\)"),
    "integers": (lambda: dj.Schedule(np.arange(9)), "alphas_cumprod must be floating point"),
    "a matrix": (lambda: dj.Schedule(np.ones((2, 2))), r"vector \(T,\); got shape \(2, 2\)"),
    "no levels": (lambda: dj.Schedule(np.ones(0)), r"non-empty vector.*got shape \(0,\)"),
    "clean data": (lambda: dj.Schedule(np.array([1.0, 0.5])), r"inside \(0, 1\).*got \[1\. , 0\.5"),
    "below 0": (lambda: dj.Schedule(np.array([0.5, -0.1])), r"inside \(0, 1\)"),
    "not a number": (lambda: dj.Schedule(np.array([0.5, np.nan])), r"inside \(0, 1\).*nan"),
    "other variances": (
        lambda: dj.Schedule(np.array([0.5, 0.2]), np.array([0.5, 0.2])),
        r"noise_variances must be 1 - alphas_cumprod; got \[0\.5, 0\.2\]",
    ),
    "variances too few": (
        lambda: dj.Schedule(np.array([0.5, 0.2]), np.array([0.5])),
        r"noise_variances must have the data's shape \(2,\); got \(1,\)",
    ),
    "a number of steps with a fraction": (lambda: dj.linear_schedule(10.5), "num_steps.*got 10.5"),
    "a number of steps in words": (lambda: dj.ddim_timesteps("10", 2), "num_steps.*got '10'"),
    # Noise levels.
    "eta in words": (lambda: dj.ddim("x"), "eta must be at least 0 .*got 'x'"),
    "eta None": (lambda: dj.ddim(None), "eta must be at least 0.*got None"),
    "eta of a name": (lambda: dj.named_sampler("ddim", "0.5"), "eta must be at least 0.*'0.5'"),
    "eta of a step": (lambda: dj.ddim_step(X, X, 0.5, 0.7, eta="a"), "eta must be at least 0"),
    # Keys and indices.
    "how many": (
        lambda: dj.initial_noise(KEY, 4, (8, 8, 1)),
        r"indices.*got shape \(\).*arange\(4",
    ),
    "how many keys": (lambda: dj.image_keys(KEY, 4), r"indices must be a vector \(B,\)"),
    "indices as floats": (lambda: dj.image_keys(KEY, np.ones(3)), "integers.*dtype float"),
    "keys for a key": (
        lambda: dj.image_keys(jax.random.split(KEY, 3), jnp.arange(3)),
        r"key must be one key.*got keys of shape \(3,\)",
    ),
    "a seed for a key": (
        lambda: dj.sample(0, eps_fn, SCHEDULE, X, STEPS),
        "key must be a PRNG key",
    ),
    "a seed to fold into": (lambda: dj.fold_in(0, 3), "key must be a PRNG key.*got 0"),
    "a seed with a fraction": (
        lambda: dj.seed_key(1.5),
        r"seed must be.*2\*\*32|4294967296.*got 1.5",
    ),
    "a seed in words": (lambda: dj.seed_key("3"), "seed must be.*got '3'"),
    "a shape for an array": (lambda: dj.draw_noise(KEY, (2, 3)), "x must be an array; got tuple"),
    # Things in each other's place.
    "T for a schedule": (
        lambda: dj.sample(KEY, eps_fn, 1000, X, STEPS),
        "schedule must be a noise schedule.*got int",
    ),
    "a table for a schedule": (
        lambda: dj.sample(KEY, eps_fn, RISING, X, STEPS),
        r"schedule must be.*ndarray.*Schedule\(table\)",
    ),
    "exchanged": (
        lambda: dj.sample(KEY, SCHEDULE, eps_fn, X, STEPS),
        "eps_fn must be a function of .*; got Schedule",
    ),
    "encoding with T": (lambda: dj.encode(eps_fn, 1000, X, STEPS), "schedule must be.*got int"),
    "encoding exactly with T": (
        lambda: dj.encode_fixed_point(eps_fn, 1000, X, STEPS),
        "schedule must be.*got int",
    ),
    "clipping without": (lambda: dj.clip_x0(eps_fn, None), "schedule must be.*got NoneType"),
    "v without": (lambda: dj.from_v(eps_fn, None), "schedule must be.*got NoneType"),
    "no network": (lambda: dj.sample(KEY, None, SCHEDULE, X, STEPS), "eps_fn must be a function"),
    "a sampler's name": (
        lambda: dj.sample(KEY, eps_fn, SCHEDULE, X, STEPS, "ddim"),
        r"sampler must be a Sampler, such as ddim\(\)",
    ),
    "a sampler's maker": (
        lambda: dj.sample(KEY, eps_fn, SCHEDULE, X, STEPS, dj.heun),
        "sampler must be a Sampler.*Call it first",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_it_is_refused_by_name(name):
    call, message = BAD[name]
    with refused(message):
        call()


def test_a_schedule_s_tree_may_hold_what_is_no_schedule():
    """A gradient, a batch or a placeholder, which JAX puts into the same tree."""
    schedule = dj.Schedule(SCHEDULE.alphas_cumprod)
    slope = jax.grad(lambda schedule: schedule.log_snr(3))(schedule)
    ab = np.float64(SCHEDULE.alphas_cumprod[3])
    np.testing.assert_allclose(slope.alphas_cumprod[3], 1 / ab + 1 / (1 - ab), rtol=1e-4)
    assert np.count_nonzero(slope.alphas_cumprod) == 1
    assert jax.tree.map(jnp.shape, schedule).alphas_cumprod == (1000,)
    two = jax.vmap(lambda ends: dj.Schedule(jnp.linspace(ends, 0.01, 10)))(jnp.array([0.9, 0.8]))
    assert two.alphas_cumprod.shape == (2, 10)
    assert jax.jit(lambda schedule: schedule)(schedule).alpha_bar(3) == SCHEDULE.alphas_cumprod[3]
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(SCHEDULE)]
    assert paths == [".alphas_cumprod", ".noise_variances"]


def test_help_shows_names_and_no_addresses():
    public = {id(getattr(dj, name)) for name in dj.__all__}  # help gives these their names
    for name in dj.__all__:
        if inspect.isfunction(value := getattr(dj, name)):
            defaults = [p.default for p in inspect.signature(value).parameters.values()]
            assert not [d for d in defaults if " at 0x" in repr(d) and id(d) not in public], name
    contract = inspect.getdoc(dj.Sampler)
    for word in ("init(x_T)", "t_prev", "draw_noise", "fold_in", "network_calls(S)", "or None"):
        assert word in contract
