import numpy as np
import pytest

from ddim_jax.metrics.kid import kid, polynomial_mmd


def test_mmd_equals_a_double_loop():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 3)), rng.normal(size=(5, 3)) + 0.5

    def k(a, b):
        return (np.dot(a, b) / 3 + 1) ** 3

    xx = np.mean([k(x[i], x[j]) for i in range(7) for j in range(7) if i != j])
    yy = np.mean([k(y[i], y[j]) for i in range(5) for j in range(5) if i != j])
    xy = np.mean([k(a, b) for a in x for b in y])
    np.testing.assert_allclose(polynomial_mmd(x, y), xx + yy - 2 * xy, rtol=1e-12)


def test_in_one_dimension_it_compares_the_first_three_moments():
    # (ab + 1)^3 = sum_p binom(3, p) a^p b^p, so the estimate is a weighted sum over p of the
    # unbiased estimates of (E x^p - E y^p)^2, which need no pairs at all.
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(400, 1)), rng.gamma(2.0, size=(300, 1))

    def mean_of_products(a):
        return (a.sum() ** 2 - (a**2).sum()) / (a.size * (a.size - 1))

    want = sum(
        weight
        * (mean_of_products(x**p) + mean_of_products(y**p) - 2 * (x**p).mean() * (y**p).mean())
        for p, weight in [(1, 3), (2, 3), (3, 1)]
    )
    np.testing.assert_allclose(polynomial_mmd(x, y), want, rtol=1e-10)


def test_unbiased_at_any_subset_size():
    # Same distribution: the expectation is 0 although each subset has only 10 points.
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 4000, 4))
    mean, std = kid(x, y, num_subsets=1000, subset_size=10)
    assert abs(mean) < 4 * std / np.sqrt(1000)
    assert std > 0.01


def test_shift_is_found_and_agrees_with_the_population_value():
    # N(0, 1) against N(1, 1): moments (0, 1, 0) and (1, 2, 4), so 3 * 1 + 3 * 1 + 16 = 22.
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 20_000, 1))
    mean, std = kid(x, y + 1, num_subsets=100, subset_size=500)
    assert abs(mean - 22) < 1 and 0 < std < 5


def test_seed_decides_the_subsets():
    x, y = np.random.default_rng(0).normal(size=(2, 100, 4))
    first, again, other = (kid(x, y, num_subsets=3, subset_size=20, seed=s) for s in (0, 0, 1))
    assert first == again != other


def test_whole_set_as_subset_has_no_error_bar():
    x, y = np.random.default_rng(0).normal(size=(2, 50, 4)).astype(np.float32)
    mean, std = kid(x, y, num_subsets=4, subset_size=50)
    np.testing.assert_allclose(mean, polynomial_mmd(np.float64(x), np.float64(y)), rtol=1e-10)
    assert std < 1e-12


def test_bad_sizes_are_named():
    x = np.zeros((10, 4))
    with pytest.raises(ValueError, match=r"subset_size must be in \[2, 10\].*got 1000"):
        kid(x, x)
    with pytest.raises(ValueError, match="num_subsets must be at least 1; got 0"):
        kid(x, x, num_subsets=0, subset_size=5)
    with pytest.raises(ValueError, match=r"y must have shape \(N, 4\); got \(10, 5\)"):
        polynomial_mmd(x, np.zeros((10, 5)))


def test_features_that_are_not_finite_are_refused_not_a_number_less():
    x = np.random.default_rng(0).normal(size=(10, 4))
    for bad in (np.nan, np.inf):
        y = x.copy()
        y[3, 1] = bad
        with pytest.raises(ValueError, match=r"x must be finite; .* in 1 of 40 places"):
            kid(y, x, subset_size=5)
        with pytest.raises(ValueError, match="y must be finite"):
            kid(x, y, subset_size=5)
