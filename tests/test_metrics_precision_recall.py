import numpy as np
import pytest

from ddim_jax.metrics.precision_recall import density_coverage, precision_recall


def brute_force(real, generated, k):
    """Both pairs from all distances in float64, one Python loop a ball."""

    def distances(a, b):
        return np.linalg.norm(np.float64(a)[:, None] - np.float64(b)[None], axis=-1)

    def radii(points):  # entry 0 of a sorted row is the point itself
        return np.sort(distances(points, points), axis=1)[:, k]

    real_radii, generated_radii = radii(real), radii(generated)
    between = distances(real, generated)
    n, m = between.shape
    inside_real = [[between[i, j] <= real_radii[i] for i in range(n)] for j in range(m)]
    inside_generated = [[between[i, j] <= generated_radii[j] for j in range(m)] for i in range(n)]
    precision = np.mean([any(row) for row in inside_real])
    recall = np.mean([any(row) for row in inside_generated])
    density = np.mean([sum(row) for row in inside_real]) / k
    coverage = np.mean([between[i].min() <= real_radii[i] for i in range(n)])
    return (precision, recall), (density, coverage)


@pytest.mark.parametrize("block_size", [7, 1000])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_equals_brute_force(k, block_size):
    rng = np.random.default_rng(k)
    real = rng.normal(size=(60, 5)).astype(np.float32)
    generated = (0.8 * rng.normal(size=(45, 5)) + 1.2).astype(np.float32)
    want_pr, want_dc = brute_force(real, generated, k)
    assert 0 < want_pr[0] < 1 and 0 < want_pr[1] < 1 and 0 < want_dc[1] < 1
    got_pr = precision_recall(real, generated, k=k, block_size=block_size)
    got_dc = density_coverage(real, generated, k=k, block_size=block_size)
    np.testing.assert_allclose(got_pr, want_pr, rtol=1e-6)
    np.testing.assert_allclose(got_dc, want_dc, rtol=1e-6)


def test_far_from_zero_the_distances_keep_their_digits():
    rng = np.random.default_rng(0)
    real, generated = rng.normal(size=(2, 80, 4))
    offset = np.array([3e3, -1e3, 5e3, 0])
    shifted = precision_recall(real + offset, generated + offset)
    np.testing.assert_allclose(shifted, brute_force(real, generated, 3)[0], atol=0.03)


def test_disjoint_sets_share_nothing():
    real = np.random.default_rng(0).normal(size=(30, 4))
    assert precision_recall(real, real + 1e3) == (0, 0)
    assert density_coverage(real, real + 1e3) == (0, 0)


def test_dropped_mode_costs_recall_not_precision():
    rng = np.random.default_rng(0)
    centres = np.array([[0.0, 0.0], [100.0, 0.0]])
    real = (centres[:, None] + rng.normal(size=(2, 200, 2))).reshape(-1, 2)
    generated = rng.normal(size=(400, 2))
    precision, recall = precision_recall(real, generated)
    density, coverage = density_coverage(real, generated)
    assert precision > 0.9 and recall < 0.51
    assert density > 0.8 and coverage < 0.51


def test_density_of_the_same_distribution_is_about_one():
    # Naeem et al. derive, for two sets drawn from one distribution: E[density] = 1 and
    # E[coverage] = 1 - (N - 1)...(N - k) / ((M + N - 1)...(M + N - k)).
    real, generated = np.random.default_rng(0).normal(size=(2, 2000, 3))
    density, coverage = density_coverage(real, generated, k=5)
    n, k = 2000, 5
    ratios = [(n - i) / (2 * n - i) for i in range(1, k + 1)]
    np.testing.assert_allclose(density, 1, atol=0.05)
    np.testing.assert_allclose(coverage, 1 - np.prod(ratios), atol=0.02)


def test_bad_arguments_are_named():
    x = np.zeros((4, 2))
    with pytest.raises(ValueError, match=r"k must be in \[1, 3\].*got 5"):
        density_coverage(x, x)
    with pytest.raises(ValueError, match=r"generated must have shape \(N, 2\); got \(4, 3\)"):
        precision_recall(x, np.zeros((4, 3)))


def test_features_that_are_not_finite_are_refused():
    # A NaN is in no ball: coverage was 0 and precision 0.9 of a set and itself, where both are 1.
    x = np.random.default_rng(0).normal(size=(10, 4))
    assert precision_recall(x, x).precision == density_coverage(x, x).coverage == 1
    y = x.copy()
    y[3, 1] = np.nan
    for function in (precision_recall, density_coverage):
        with pytest.raises(ValueError, match=r"generated must be finite; .* in 1 of 40 places"):
            function(x, y)
        with pytest.raises(ValueError, match="real must be finite"):
            function(y, x)
