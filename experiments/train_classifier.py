"""Train the small classifier whose features measure samples of one data set: no download.

python experiments/train_classifier.py digits --out classifier
python experiments/train_classifier.py cifar10 --data-dir /data/tfds --out classifier
python experiments/make_statistics.py digits --features classifier --out classifier/stats.npz

Distances between its features are named fd_classifier, never FID.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from common import cli
from common.progress import Progress

from ddim_jax.checks import NUM_SEEDS
from ddim_jax.data.load import CropName, load_images
from ddim_jax.data.source import ImageSource
from ddim_jax.data.stream import batches, sequential_batches
from ddim_jax.keys import seed_key
from ddim_jax.metrics.classifier import (
    Classifier,
    apply_classifier,
    classifier_loss,
    init_classifier,
    save_classifier,
)
from ddim_jax.metrics.features import CLASSIFIER_FILE
from ddim_jax.paths import DataName, Folder
from ddim_jax.runs.options import MAX_BATCH, MAX_SIDE, check_limits, option


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """One classifier; every field is a command-line option."""

    out: Folder
    """The folder that gets classifier.safetensors."""
    data: DataName = "cifar10"
    """digits, a TFDS name, or another set with labels."""
    data_dir: Folder | None = None
    """Where TFDS sets stand; its own default if not given."""
    train_split: str = "train"
    """What it learns from."""
    test_split: str = "test"
    """What its accuracy is measured on."""
    image_size: int | None = option(None, at_least=1, below=MAX_SIDE)
    """Resize and crop images to this side."""
    crop: CropName | None = None
    """celeba cuts the paper's 128x128 out of aligned CelebA images, 178x218, and makes it 64x64
    unless image_size is given; TFDS's celeb_a always has it."""
    width: int = option(32, at_least=1)
    """Channels at full size; the features are four times as many."""
    num_steps: int = option(5000, at_least=1)
    """Updates."""
    batch_size: int = option(128, at_least=1, below=MAX_BATCH)
    """Images in an update."""
    learning_rate: float = option(2e-3, above=0, below=float("inf"))
    """Adam's rate at the start; a cosine takes it to 0."""
    flip: bool = True
    """Mirror images left to right at random."""
    seed: int = option(0, at_least=0, below=NUM_SEEDS)
    """Of the weights and the order of the data."""


CIFAR10 = ClassifierConfig(out=tyro.MISSING)

PRESETS: dict[str, tuple[str, ClassifierConfig]] = {
    "digits": (
        "handwritten digits: seconds",
        dataclasses.replace(CIFAR10, data="digits", width=16, num_steps=300, flip=False),
    ),
    "cifar10": ("CIFAR-10; --data takes any other set with labels", CIFAR10),
}


def main(config: ClassifierConfig) -> None:
    """Train, test, and write the weights."""
    check_limits(config)
    train_set, test_set = _load(config)
    if train_set.num_classes is None:
        raise ValueError(
            f"data must have labels to train a classifier on; {train_set.name} has none. Measure "
            "with --features inception or pixels."
        )
    model = Classifier(train_set.num_classes, config.width)
    out = pathlib.Path(config.out)
    out.mkdir(parents=True, exist_ok=True)  # a path that cannot be written is refused now
    started = time.monotonic()
    params = _train(config, model, train_set)
    seconds = time.monotonic() - started
    accuracy = _accuracy(model, params, test_set)

    recipe = dataclasses.asdict(config) | {"test_accuracy": accuracy}
    digest = save_classifier(out / CLASSIFIER_FILE, model, params, recipe)
    print(
        f"classifier {digest[:12]} in {out / CLASSIFIER_FILE}: accuracy {accuracy:.4f} on the "
        f"{len(test_set)} images of {test_set.name} ({config.test_split}); trained in "
        f"{seconds:.1f} s"
    )


def _train(config: ClassifierConfig, model: Classifier, train_set: ImageSource) -> Any:
    """The weights after the last update."""
    tx = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.num_steps))
    params = init_classifier(seed_key(config.seed), model, train_set.image_shape)
    update = jax.jit(functools.partial(_update, model, tx, config.flip), donate_argnums=(0, 1))
    opt_state = tx.init(params)
    stream = batches(train_set, config.batch_size, seed=config.seed)
    with Progress("train_classifier.py", config.num_steps, "steps") as progress:
        for step in progress.each(range(config.num_steps)):
            batch = next(stream)
            key = jax.random.fold_in(seed_key(config.seed), step)
            params, opt_state, loss = update(params, opt_state, key, batch["image"], batch["label"])
            if (step + 1) % max(1, config.num_steps // 10) == 0:
                if not np.isfinite(loss):
                    raise FloatingPointError(f"the loss of step {step + 1} is {loss}.")
                progress.say(f"step {step + 1} of {config.num_steps}: loss {float(loss):.4f}")
    return params


def _load(config: ClassifierConfig) -> tuple[ImageSource, ImageSource]:
    load = functools.partial(
        load_images,
        config.data,
        data_dir=config.data_dir,
        image_size=config.image_size,
        crop=config.crop,
    )
    return load(split=config.train_split), load(split=config.test_split)


def _update(model, tx, flip, params, opt_state, key, images, labels):
    if flip:
        mirror = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
        images = jnp.where(mirror, images[:, :, ::-1], images)
    (loss, _), grads = jax.value_and_grad(classifier_loss, has_aux=True)(
        params, model, images, labels
    )
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


def _accuracy(model: Classifier, params, source: ImageSource) -> float:
    classes = jax.jit(lambda images: apply_classifier(model, params, images).logits.argmax(axis=-1))
    right = sum(
        int((np.asarray(classes(batch["image"])) == batch["label"]).sum())
        for batch in sequential_batches(source, 500)
    )
    return right / len(source)


if __name__ == "__main__":
    cli.run(main, ClassifierConfig, PRESETS)
