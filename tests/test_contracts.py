"""Kinds of one's own: a codec, an objective, a schedule and a metric that the library never saw.

Each is defined here, put into its table, and taken through a training run, a sweep, and encoding
and decoding, by the same commands as everything else.
"""

import dataclasses
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tyro")

import fid_sweep
import make_statistics
import reconstruct
import sample
from small_runs import SMALL

from ddim_jax import NoiseSchedule
from ddim_jax.codec import CODECS, Codec
from ddim_jax.data.digits import digits
from ddim_jax.data.pixels import to_model_range
from ddim_jax.keys import image_keys
from ddim_jax.losses import draw_times
from ddim_jax.metrics.metric import Metric, Number
from ddim_jax.metrics.table import METRICS
from ddim_jax.objectives import OBJECTIVES, LossFn, Objective, Setup
from ddim_jax.runs import (
    SCHEDULES,
    ScheduleConfig,
    TrainConfig,
    fit,
    load_trained,
    read_config,
)
from ddim_jax.runs.load import load_weights

# ------------------------------------------------------------------------------------- a codec


@dataclasses.dataclass(frozen=True)
class Blocks(Codec):
    """Blocks of pixels, turned by an orthogonal matrix, its weights: another shape, no loss."""

    side: int = 2
    seed: int = 3

    def init(self, image_shape):
        size = self.side**2 * image_shape[-1]
        rng = np.random.default_rng(self.seed)
        return {"turn": {"kernel": np.linalg.qr(rng.normal(size=(size, size)))[0].astype("f4")}}

    def latent_shape(self, image_shape):
        h, w, c = image_shape
        return h // self.side, w // self.side, c * self.side**2

    def encode(self, params, images, key=None):
        b, h, w, c = images.shape
        x = to_model_range(images).reshape(
            b, h // self.side, self.side, w // self.side, self.side, c
        )
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(b, *self.latent_shape((h, w, c)))
        return jnp.matmul(x, params["turn"]["kernel"], precision="highest")

    def decode(self, params, x0):
        b, h, w, c = x0.shape
        x = jnp.matmul(x0, params["turn"]["kernel"].T, precision="highest")
        x = x.reshape(b, h, w, self.side, self.side, c // self.side**2).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(b, h * self.side, w * self.side, c // self.side**2)


# --------------------------------------------------------------------------------- an objective


@dataclasses.dataclass(frozen=True)
class Imitate(Objective):
    """Says what a teacher says, a frozen argument, and keeps the mean of its own losses."""

    teacher: str = ""

    def check(self, predicts):
        if not self.teacher:
            raise ValueError("teacher must name a workdir; got ''.")

    def frozen(self) -> Any:
        return load_trained(self.teacher).params.network

    def init_state(self, setup: Setup) -> Any:
        return {"mean_loss": jnp.zeros(()), "steps": jnp.zeros((), jnp.int32)}

    def loss_fn(self, setup: Setup) -> LossFn:
        def loss_fn(params, inputs):
            x0 = setup.codec.encode(inputs.frozen.codec, inputs.batch["image"])
            keys = image_keys(inputs.key, inputs.places)
            t = draw_times(keys, x0.shape[0], setup.schedule)
            said = setup.apply_fn({"params": params}, x0, t)
            right = setup.apply_fn({"params": inputs.frozen.objective}, x0, t)
            losses = jnp.square(said - right).mean(axis=(1, 2, 3))
            steps = inputs.state["steps"] + 1
            mean = inputs.state["mean_loss"]
            mean = mean + (losses.mean() - mean) / steps
            return losses, {"mean_loss": mean, "steps": steps}

        return loss_fn


# ---------------------------------------------------------------------------------- a schedule


@dataclasses.dataclass(frozen=True)
class Angle:
    """alpha_bar = cos(angle)^2 at real times (0, 1000], the last at nine tenths of pure noise."""

    num_steps: int = 200
    clean = 0.0

    def _angle(self, t):
        t = jnp.asarray(t, jnp.float32)
        inside = (t >= 0) & (t <= 1000)
        return jnp.where(inside, t, jnp.nan) / 1000 * (0.95 * np.pi / 2)

    def alpha_bar(self, t):
        return jnp.cos(self._angle(t)) ** 2

    def noise_variance(self, t):
        return jnp.sin(self._angle(t)) ** 2

    def log_snr(self, t):
        return -2 * jnp.log(jnp.tan(self._angle(t)))

    def is_clean(self, t):
        return jnp.asarray(t) <= 0

    def nearest(self, log_snr):
        return jnp.arctan(jnp.exp(-log_snr / 2)) / (0.95 * np.pi / 2) * 1000

    def timesteps(self, num_sample_steps, spacing="uniform"):
        del spacing
        return np.linspace(0, 1000, num_sample_steps + 1, dtype=np.float32)[:0:-1].copy()

    def check_timesteps(self, timesteps):
        times = np.asarray(timesteps, np.float32)
        if times.ndim != 1 or not np.all(np.diff(times) <= 0):
            raise ValueError(f"timesteps must descend; got {timesteps}.")
        return jnp.asarray(times)

    def draw(self, key, shape=()):
        return 1000 * jax.random.uniform(key, shape, minval=1e-3)

    def mirror(self, t):
        return 1000 - t


# ------------------------------------------------------------------------------------ a metric


class Total(NamedTuple):
    count: np.ndarray
    total: np.ndarray


def brightness(num_kept: int) -> Metric:
    """How much brighter than the reference."""
    del num_kept

    def update(state, features, indices):
        features = np.asarray(features, np.float64)
        return Total(state.count + features.size, state.total + features.sum())

    def compute(state, reference):
        return {"brightness": state.total / state.count - reference.total / reference.count}

    return Metric(
        name="brightness",
        features="pool",
        state="total",
        numbers=(Number("brightness", "Brightness", "lower", "linear"),),
        init=lambda dim: Total(np.array(0), np.array(0.0)),
        update=update,
        merge=lambda a, b: Total(a.count + b.count, a.total + b.total),
        compute=compute,
    )


# --------------------------------------------------------------------------- all of them at work


@pytest.fixture(scope="module")
def tables():
    """The four kinds in their tables."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CODECS, "blocks", Blocks)
        patch.setitem(OBJECTIVES, "imitate", Imitate)
        patch.setitem(SCHEDULES, "angle", lambda config: Angle(config.num_steps))
        patch.setitem(METRICS, "brightness", brightness)
        yield


@pytest.fixture(scope="module")
def config(tables, tmp_path_factory):
    """A run with the codec and the schedule, predicting v."""
    return TrainConfig(
        workdir=str(tmp_path_factory.mktemp("own") / "run"),
        data="digits",
        model=dataclasses.replace(SMALL.model, dropout=0.0),
        schedule=ScheduleConfig(name="angle", num_steps=200),
        codec=Blocks(side=2),
        predicts="v",
        max_steps=8,
        batch_size=8,
        learning_rate=1e-3,
        warmup_steps=0,
        sample_every=0,
        checkpoint_every=4,
        log_every=4,
    )


@pytest.fixture(scope="module")
def trained(config):
    fit(config)
    return config.workdir


def test_the_schedule_is_one():
    assert isinstance(Angle(), NoiseSchedule)


def test_a_run_keeps_its_kinds_and_opens_with_them(trained):
    there = read_config(trained)
    assert there["codec"] == {"name": "blocks", "side": 2, "seed": 3}
    assert there["schedule"]["name"] == "angle" and there["predicts"] == "v"
    run = load_trained(trained)
    assert run.spec.codec == Blocks(2) and isinstance(run.spec.schedule, Angle)
    assert (run.spec.image_shape, run.spec.latent_shape) == ((8, 8, 1), (4, 4, 4))
    want = Blocks(2).init((8, 8, 1))["turn"]["kernel"]
    np.testing.assert_array_equal(run.params.codec["turn"]["kernel"], want)
    assert run.fingerprint["codec"]["name"] == "blocks" and run.fingerprint["codec_hash"]


def test_the_codec_loses_nothing(trained):
    run, images = load_trained(trained), digits().images[:16]
    x0 = run.spec.encode(run.params, images)
    assert x0.shape == (16, 4, 4, 4)
    # An orthogonal turn keeps the norm of each image.
    norms = np.linalg.norm(np.asarray(to_model_range(images)).reshape(16, -1), axis=1)
    np.testing.assert_allclose(np.linalg.norm(x0.reshape(16, -1), axis=1), norms, rtol=1e-5)
    np.testing.assert_allclose(run.spec.decode(run.params, x0), to_model_range(images), atol=1e-6)


def test_another_codec_in_the_same_folder_is_refused_by_name(trained, config):
    with pytest.raises(ValueError, match=r"codec\.seed is 3 there and 4 now"):
        fit(dataclasses.replace(config, codec=Blocks(2, seed=4)))


def test_an_objective_with_a_teacher_and_a_state(trained, config, tmp_path):
    imitate = dataclasses.replace(
        config, workdir=str(tmp_path / "student"), objective=Imitate(trained), seed=1
    )
    fit(dataclasses.replace(imitate, max_steps=4))
    fit(imitate)  # resumed with its state
    lines = [json.loads(line) for line in (tmp_path / "student/metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [4, 8]
    there = read_config(imitate.workdir)
    assert there["objective"] == {"name": "imitate", "teacher": trained} and there["frozen_hash"]

    from ddim_jax.runs.folder import checkpoints

    with checkpoints(imitate.workdir) as checkpointer:
        state = checkpointer.restore(
            {"loss_state": {"mean_loss": np.zeros((), "f4"), "steps": np.zeros((), "i4")}},
            partial=True,
        )["loss_state"]
    assert state["steps"] == 8
    # The mean of 8 losses is the mean of the two lines' means of 4.
    np.testing.assert_allclose(state["mean_loss"], np.mean([x["loss"] for x in lines]), rtol=1e-5)

    # Another teacher is another run, whatever its folder is called.
    with pytest.raises(ValueError, match="frozen_hash is"):
        weights, _ = load_weights(trained, load_trained(trained).spec, "raw")
        moved = dataclasses.replace(imitate.objective)
        object.__setattr__(moved, "frozen", lambda: weights)
        fit(dataclasses.replace(imitate, objective=moved))
    with pytest.raises(ValueError, match="teacher must name a workdir"):
        fit(dataclasses.replace(imitate, objective=Imitate()))


def test_encoding_and_decoding_with_the_codec_and_the_schedule(trained, tmp_path):
    reconstruct.main(
        reconstruct.ReconstructConfig(
            workdir=trained, out=str(tmp_path), num_images=4, steps=(10, 40)
        )
    )
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert rows[1]["mse"] < rows[0]["mse"] < 0.1


def test_a_sweep_with_the_metric(trained, tmp_path):
    stats, out = tmp_path / "stats.npz", tmp_path / "sweep"
    make_statistics.main(
        make_statistics.StatisticsConfig(
            data="digits", out=str(stats), features="pixels", metrics=("frechet", "brightness")
        )
    )
    fid_sweep.main(
        fid_sweep.SweepConfig(
            workdir=trained,
            stats=(str(stats),),
            out=str(out),
            steps=(3,),
            etas=(0.0, "sigma_hat"),
            samplers=("heun",),
            metrics=("frechet", "brightness"),
            num_samples=24,
            batch_size=16,
        )
    )
    lines = [json.loads(line) for line in (out / "results.jsonl").open()]
    assert [line["sampler"] for line in lines] == ["ddim", "sigma_hat", "heun"]
    real = np.asarray(to_model_range(digits().images)).mean()
    for line, options in zip(
        lines, [{}, {"sampler": "sigma_hat"}, {"sampler": "heun"}], strict=True
    ):
        samples = tmp_path / line["sampler"]
        sample.main(
            sample.SampleConfig(
                workdir=trained,
                out=str(samples),
                num_images=24,
                num_sample_steps=3,
                save_npz=True,
                **options,
            )
        )
        images = np.load(samples / "samples.npz")["images"]
        want = np.asarray(to_model_range(images)).mean() - real
        np.testing.assert_allclose(line["values"]["brightness_pixels"], want, atol=1e-5)
    assert "brightness_pixels" in (out / "report.html").read_text()
