import jax.numpy as jnp
import numpy as np
import pytest

from ddim_jax.metrics.inception_score import inception_score


def test_sure_and_varied_scores_the_number_of_classes():
    logits = 1e4 * np.tile(np.eye(7, dtype=np.float32), (10, 1))
    mean, std = inception_score(logits, num_splits=5)
    np.testing.assert_allclose(mean, 7, rtol=1e-5)
    assert std < 1e-4


@pytest.mark.parametrize("row", [[0, 0, 0], [3, -1, 2], [1e4, 0, 0]])
def test_one_answer_for_all_scores_one(row):
    logits = np.tile(np.array(row, np.float32), (40, 1))
    np.testing.assert_allclose(inception_score(logits), (1, 0), atol=1e-5)


def test_equals_loops_over_images_and_classes_with_uneven_splits():
    logits = np.random.default_rng(0).normal(size=(23, 6)).astype(np.float32) * 2
    p = np.exp(np.float64(logits))
    p /= p.sum(axis=1, keepdims=True)
    scores = []
    for a, b in [(0, 5), (5, 11), (11, 17), (17, 23)]:  # i * 23 // 4
        marginal = p[a:b].mean(axis=0)
        divergences = [
            sum(q * np.log(q / m) for q, m in zip(r, marginal, strict=True)) for r in p[a:b]
        ]
        scores.append(np.exp(np.mean(divergences)))
    got = inception_score(jnp.asarray(logits), num_splits=4)
    np.testing.assert_allclose(got, (np.mean(scores), np.std(scores)), rtol=1e-5)


def test_more_splits_than_images_is_refused():
    with pytest.raises(ValueError, match=r"num_splits must be in \[1, 4\].*got 10"):
        inception_score(np.zeros((4, 3), np.float32))


def test_logits_that_are_not_finite_are_refused():
    logits = np.zeros((4, 3), np.float32)
    logits[1, 1] = np.inf
    with pytest.raises(ValueError, match=r"logits must be finite; .* in 1 of 12 places"):
        inception_score(logits, 1)
