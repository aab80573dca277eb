"""Real images: CIFAR-10 as TFDS stores it, trained on by the commands users type."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from ddim_jax.data.load import load_images
from ddim_jax.data.source import ArraySource

ROOT = pathlib.Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("split, count", [("train", 50_000), ("test", 10_000)])
def test_the_splits_are_whole(shared, split, count):
    source = load_images("cifar10", data_dir=shared("tfds"), split=split, in_memory=False)
    assert len(source) == count
    assert source.image_shape == (32, 32, 3)
    assert source.num_classes == 10


@pytest.mark.slow
def test_the_training_images_have_the_published_channel_means(shared):
    source = load_images("cifar10", data_dir=shared("tfds"))
    assert isinstance(source, ArraySource)  # it fits in memory, so that is where it is
    means = source.images.mean(axis=(0, 1, 2), dtype=np.float64) / 255
    np.testing.assert_allclose(means, [0.49139968, 0.48215841, 0.44653091], atol=5e-9)
    np.testing.assert_array_equal(np.bincount(source.labels), [5000] * 10)


# Training, with a network small enough for a CPU

SMALL = [
    "--model.channels=16", "--model.channel-mults", "1", "2", "--model.num-res-blocks=1",
    "--model.norm-groups=8", "--batch-size=16", "--sample-every=0",
]  # fmt: skip


def train(preset: str, workdir: pathlib.Path, data_dir: pathlib.Path, *options: str) -> list:
    """The lines of metrics.jsonl that a run of train.py leaves."""
    command = [sys.executable, "experiments/train.py", preset, "--workdir", str(workdir)]
    command += ["--data-dir", str(data_dir), *SMALL, *options]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_loss_falls_in_200_steps(shared, tmp_path):
    options = ["--max-steps=200", "--log-every=20", "--warmup-steps=20", "--learning-rate=1e-3"]
    lines = train("cifar10", tmp_path, shared("tfds"), *options)
    assert [line["step"] for line in lines] == list(range(20, 201, 20))
    # Each line is the mean of 20 steps. Predicting no noise at all, as the first step does, has
    # loss 1.
    first, last = lines[0]["loss"], lines[-1]["loss"]
    assert 0.5 < first < 1.1
    assert last < 0.3 * first, lines
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["spacing"], config["rounding"]) == ("quadratic", "nearest")
    objective = config["objective"]
    assert (objective["reduction"], objective["timesteps"]) == ("mean", "independent")  # the recipe


@pytest.mark.slow
def test_the_papers_torch_recipe_sums_over_pixels(shared, tmp_path):
    options = ["--max-steps=3", "--log-every=1", "--split=train[:100]"]
    lines = train("cifar10-torch-recipe", tmp_path, shared("tfds"), *options)
    # At first the network predicts 0, so the loss is a chi-square of 32 * 32 * 3 degrees of
    # freedom, averaged over the batch: 3072, give or take 20.
    assert abs(lines[0]["loss"] - 3072) < 100
    assert [line["step"] for line in lines] == [1, 2, 3]


# A set that streams from disk

STREAMED = """
import dataclasses, sys
sys.path.insert(0, "experiments")
import numpy as np
from ddim_jax.data import load, source as sources, stream

data_dir, workdir, seen, max_steps, num_processes, process_id, port = sys.argv[1:]
load.MAX_BYTES_IN_MEMORY = 0  # so that CIFAR-10 streams as LSUN does
batches, images = stream.batches, []

def recorded(source, *arguments, **options):
    assert not isinstance(source, sources.ArraySource)
    for batch in batches(source, *arguments, **options):
        images.append(batch["image"])
        yield batch

stream.batches = recorded  # before the training imports it
import train
from presets import CIFAR10, ModelConfig

many = int(num_processes) > 1
train.main(
    dataclasses.replace(
        CIFAR10,
        model=ModelConfig(4, (1,), 1, attention_resolutions=(), dropout=0.0, norm_groups=2),
        data_dir=data_dir, split="train[:50]", workdir=workdir, max_steps=int(max_steps),
        batch_size=16, seed=7, log_every=1, sample_every=0, distributed=many,
        coordinator=f"127.0.0.1:{port}" if many else None,
        num_processes=int(num_processes) if many else None,
        process_id=int(process_id) if many else None,
    )
)
np.save(seen, np.stack(images[:3]))  # the batches after these were only fetched ahead
"""


def streamed(data_dir, folder: pathlib.Path, num_processes: int) -> tuple[np.ndarray, list]:
    """What the steps 1 to 3 and, after a restart, 4 to 6 were given, and metrics.jsonl."""
    steps = []
    for max_steps in (3, 6):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        seen = [folder / f"seen_{max_steps}_{process}.npy" for process in range(num_processes)]
        runs = [
            subprocess.Popen(
                [sys.executable, "-c", STREAMED, str(data_dir), str(folder / "workdir"), str(file),
                 str(max_steps), str(num_processes), str(process), str(port)],
                cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
            )
            for process, file in enumerate(seen)
        ]  # fmt: skip
        try:
            for run in runs:
                _, errors = run.communicate(timeout=600)
                assert run.returncode == 0, errors[-3000:]
        finally:
            for run in runs:
                run.kill()  # where one failed, the other waits for it
        steps.append(np.concatenate([np.load(file) for file in seen], axis=1))
    lines = (folder / "workdir" / "metrics.jsonl").read_text().splitlines()
    return np.concatenate(steps), [json.loads(line) for line in lines]


@pytest.mark.slow
def test_a_streaming_run_resumes_with_the_very_next_example_on_1_and_on_2_processes(
    shared, tmp_path
):
    data_dir = shared("tfds")
    source = load_images("cifar10", data_dir=data_dir, split="train[:50]")
    # 96 examples: epochs 0 and 1, whole or in part, each in the order of its own permutation.
    order = [np.random.default_rng((7, epoch)).permutation(50) for epoch in range(2)]
    want = source.images[np.concatenate(order)[:96]].reshape(6, 16, 32, 32, 3)

    metrics = {}
    for num_processes in (1, 2):
        folder = tmp_path / str(num_processes)
        folder.mkdir()
        got, metrics[num_processes] = streamed(data_dir, folder, num_processes)
        np.testing.assert_array_equal(got, want)
    assert [line["step"] for line in metrics[1]] == [1, 2, 3, 4, 5, 6]
    for alone, together in zip(metrics[1], metrics[2], strict=True):
        assert alone["step"] == together["step"]
        np.testing.assert_allclose(together["loss"], alone["loss"], rtol=1e-4)
        np.testing.assert_allclose(together["grad_norm"], alone["grad_norm"], rtol=1e-3)
