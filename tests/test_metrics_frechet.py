import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from ddim_jax.metrics.frechet import (
    FeatureMoments,
    few_samples_warning,
    finalize_moments,
    frechet_distance,
    frechet_distance_from_features,
    init_moments,
    merge_moments,
    update_moments,
)


def gather(batches, dim):
    moments = init_moments(dim)
    for batch in batches:
        moments = update_moments(moments, batch)
    return moments


@pytest.mark.parametrize("case", ["well", "few"])
def test_golden_distances(golden, case):
    arrays = golden("frechet.npz")
    got = frechet_distance_from_features(arrays[f"{case}/a"], arrays[f"{case}/b"])
    np.testing.assert_allclose(got, arrays[f"{case}/fid"], rtol=1e-6)


def test_golden_distances_from_uneven_batches(golden):
    arrays = golden("frechet.npz")
    cuts = [1, 3, 500, 1999]
    a, b = (finalize_moments(gather(np.split(arrays[f"well/{side}"], cuts), 64)) for side in "ab")
    np.testing.assert_allclose(frechet_distance(*a, *b), arrays["well/fid"], rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 60), max_size=8).map(sorted),
    offset=st.sampled_from([0.0, 1e3, 1e6]),
    seed=st.integers(0, 99),
)
def test_any_batching_gives_numpy_moments_even_far_from_zero(cuts, offset, seed):
    x = np.random.default_rng(seed).normal(size=(60, 5)) + offset
    mean, cov = finalize_moments(gather(np.split(x, cuts), 5))
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(cov, np.cov(x, rowvar=False), rtol=1e-8, atol=1e-10)


def test_merging_two_halves_is_seeing_both():
    x = np.random.default_rng(0).normal(size=(50, 3))
    merged = merge_moments(gather([x[:20]], 3), gather([x[20:]], 3))
    np.testing.assert_allclose(finalize_moments(merged)[1], np.cov(x, rowvar=False), rtol=1e-12)
    assert merge_moments(init_moments(3), init_moments(3)).count == 0


def test_saved_moments_continue_bitwise(tmp_path):
    batches = np.random.default_rng(0).normal(size=(6, 10, 4)).astype(np.float32)
    whole = gather(batches, 4)
    np.savez(tmp_path / "moments.npz", **gather(batches[:3], 4)._asdict())
    with np.load(tmp_path / "moments.npz") as file:
        resumed = FeatureMoments(**file)
    for batch in batches[3:]:
        resumed = update_moments(resumed, batch)
    for got, want in zip(resumed, whole, strict=True):
        assert np.array_equal(got, want) and got.dtype == want.dtype


def test_update_leaves_its_argument_alone():
    start = init_moments(2)
    update_moments(start, np.ones((3, 2)))
    assert start.count == 0 and not start.mean.any() and not start.scatter.any()


def test_commuting_gaussians_have_a_closed_form():
    # Diagonal covariances: |m1 - m2|^2 + sum (s1 - s2)^2, standard deviations s.
    rng = np.random.default_rng(0)
    m1, m2, s1, s2 = rng.uniform(0.1, 3, size=(4, 20))
    want = np.sum((m1 - m2) ** 2) + np.sum((s1 - s2) ** 2)
    rotation = np.linalg.qr(rng.normal(size=(20, 20)))[0]
    c1, c2 = (rotation @ np.diag(s**2) @ rotation.T for s in (s1, s2))
    got = frechet_distance(rotation @ m1, c1, rotation @ m2, c2)
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_full_covariances_equal_the_sqrtm_form():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 30, 30))
    c1, c2 = a @ a.T, b @ b.T
    want = np.trace(c1) + np.trace(c2) - 2 * np.trace(scipy.linalg.sqrtm(c1 @ c2).real)
    got = frechet_distance(np.zeros(30), c1, np.zeros(30), c2)
    np.testing.assert_allclose(got, want, rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(rank1=st.integers(0, 8), rank2=st.integers(0, 8), seed=st.integers(0, 999))
def test_any_rank_is_finite_not_negative_and_symmetric(rank1, rank2, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(8, rank1)), rng.normal(size=(8, rank2))
    mean, c1, c2 = np.zeros(8), a @ a.T, b @ b.T
    there, back = frechet_distance(mean, c1, mean, c2), frechet_distance(mean, c2, mean, c1)
    assert np.isfinite(there) and there >= 0
    np.testing.assert_allclose(there, back, rtol=1e-6, atol=1e-6)
    # The trace of the root is the nuclear norm of A^T B for any factors of the two covariances.
    want = np.trace(c1) + np.trace(c2) - 2 * np.linalg.svd(a.T @ b, compute_uv=False).sum()
    np.testing.assert_allclose(there, want, rtol=1e-6, atol=1e-6)


def test_distance_to_itself_is_zero():
    x = np.random.default_rng(0).normal(size=(20, 40))
    assert 0 <= frechet_distance_from_features(x, x) < 1e-5
    zero = np.zeros((5, 5))
    assert frechet_distance(np.zeros(5), zero, np.zeros(5), zero) == 0


def test_shifted_copies_differ_by_the_shift():
    x = np.random.default_rng(0).normal(size=(200, 6))
    shift = np.arange(6.0)
    np.testing.assert_allclose(
        frechet_distance_from_features(x, x + shift), np.sum(shift**2), rtol=1e-9
    )


def test_wrong_dimensions_are_named():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"features must have shape \(N, 4\); got \(9, 5\)"):
        update_moments(init_moments(4), rng.normal(size=(9, 5)))
    with pytest.raises(ValueError, match=r"mean2 must have shape .*same feature network"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4))
    with refused(r"cov1 must have shape \(3, 3\); got \(4, 4\)"):
        frechet_distance(np.zeros(3), np.eye(4), np.zeros(3), np.eye(3))
    with pytest.raises(ValueError, match="dim must be at least 1"):
        init_moments(0)


def test_not_finite_is_refused_not_passed_on():
    with pytest.raises(ValueError, match="features must be finite"):
        update_moments(init_moments(2), np.array([[0.0, np.nan]]))
    with pytest.raises(ValueError, match="cov2 must be finite"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), np.full((2, 2), np.inf))


@pytest.mark.parametrize("count", [0, 1])
def test_a_covariance_needs_two_samples(count):
    with pytest.raises(ValueError, match=f"at least 2 samples; got {count}"):
        finalize_moments(gather([np.ones((count, 2))], 2))


def test_the_benchmark_gives_both_the_same_features():
    benchmark = pytest.importorskip("benchmark_frechet")
    config = benchmark.BenchmarkConfig(num_samples=300, dim=32, batch_size=128)
    a, b = (np.concatenate(list(benchmark.feature_batches(config, side))) for side in range(2))
    assert a.shape == b.shape == (300, 32) and not np.array_equal(a, b)
    statistics = [
        x for moments in (gather([a], 32), gather([b], 32)) for x in finalize_moments(moments)
    ]
    np.testing.assert_allclose(
        frechet_distance(*statistics), benchmark.sqrtm_distance(*statistics), rtol=1e-6
    )


def test_few_samples_warn():
    assert few_samples_warning(2049, 2048) is None
    assert "2048 samples do not exceed the 2048" in (few_samples_warning(2048, 2048) or "")
