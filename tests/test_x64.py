"""With jax_enable_x64 everything is the float32 that checkpoints hold, and the same numbers."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("sklearn")

from small_runs import SMALL, leaves

from ddim_jax import ddim, linear_schedule, sample
from ddim_jax.codec import CODECS
from ddim_jax.metrics.classifier import Classifier, apply_classifier, init_classifier
from ddim_jax.runs import fit, load_trained
from ddim_jax.solvers import SAMPLERS
from ddim_jax.train import adam_with_warmup, init_train_state

MODEL = dataclasses.replace(
    SMALL.model, channel_mults=(1, 2), attention_resolutions=(8,), num_classes=10, dropout=0.0
)
CONFIG = dataclasses.replace(SMALL, model=MODEL, ema_decay=0.9, max_steps=2, warmup_steps=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two updates in float32: norms, attention, a shortcut, labels. Dropout is drawn otherwise."""
    workdir = tmp_path_factory.mktemp("x64") / "model"
    fit(dataclasses.replace(CONFIG, workdir=str(workdir)))
    return workdir


def reals(tree):
    return {str(a.dtype) for a in jax.tree.leaves(tree) if jnp.issubdtype(a.dtype, jnp.floating)}


def test_all_that_is_made_is_float32():
    image = jax.ShapeDtypeStruct((2, 8, 8, 1), np.uint8)
    with jax.enable_x64(True):
        classifier = Classifier(10, 4)
        params = jax.eval_shape(lambda: init_classifier(jax.random.key(0), classifier, (8, 8, 1)))
        features = jax.eval_shape(lambda p, x: apply_classifier(classifier, p, x), params, image)
        network = CONFIG.spec((8, 8, 1)).parameter_shapes()
        tx = adam_with_warmup(1e-3, 5, 1.0)
        state = jax.eval_shape(lambda p: init_train_state(jax.random.key(0), p, tx), network)
        assert reals((params, features, network, state)) == {"float32"}
        whole = {a.dtype for a in jax.tree.leaves(state) if jnp.issubdtype(a.dtype, jnp.integer)}
        assert whole == {np.dtype("int32")}
        assert set(CODECS) == {"pixels"}  # another has weights to look at here


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_keeps_float32(name):
    x_T = jax.ShapeDtypeStruct((2, 3), np.float32)
    with jax.enable_x64(True):
        schedule, key, sampler = linear_schedule(), jax.random.key(0), SAMPLERS[name]()
        x_0 = jax.eval_shape(
            lambda x: sample(key, lambda x, t: jnp.tanh(x), schedule, x, [900, 500, 9], sampler),
            x_T,
        )
    assert x_0.dtype == jnp.float32


def test_a_float32_run_is_opened_drawn_from_and_trained_on_to_the_same_numbers(trained, tmp_path):
    longer = dataclasses.replace(CONFIG, max_steps=4)
    run = load_trained(trained)
    short = run.sample(jax.random.key(0), 4, 4, sampler=ddim(0.5))
    folders = [shutil.copytree(trained, tmp_path / name) for name in ("x32", "x64")]
    fit(dataclasses.replace(longer, workdir=str(folders[0])))
    with jax.enable_x64(True):
        run = load_trained(trained)
        assert reals(run.params) == {"float32"}
        images = run.sample(jax.random.key(0), 4, 4, sampler=ddim(0.5))
        assert np.abs(images.astype(int) - short).max() <= 1
        x, label = jnp.zeros((4, 8, 8, 1), jnp.float32), jnp.arange(4)
        assert run.denoiser(label, 3.0)(x, jnp.asarray(500)).dtype == jnp.float32
        fit(dataclasses.replace(longer, workdir=str(folders[1])))
    want, got = map(leaves, folders)
    assert want.keys() == got.keys()
    for name in want:
        assert want[name].dtype == got[name].dtype, name
        np.testing.assert_allclose(got[name], want[name], rtol=1e-3, atol=2e-5, err_msg=name)
    losses = [json.loads((f / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
              for f in folders]  # fmt: skip
    np.testing.assert_allclose(*losses, rtol=1e-5)
