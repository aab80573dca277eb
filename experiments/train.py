"""Train a U-Net, under pmap on all devices; resumes the run it finds in the workdir.

python experiments/train.py digits --workdir runs/digits
python experiments/train.py cifar10 --workdir runs/cifar10 --data-dir /data/tfds
python experiments/train.py cifar10-small --workdir runs/mine --data photos/ --image-size 32
python experiments/train.py digits-v --workdir runs/v                     # predicts v
python experiments/train.py digits --workdir runs/more --init-from runs/digits
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import jax
import numpy as np
import tensorboardX
import tqdm
from common import cli, pictures
from presets import PRESETS, TrainOptions

from ddim_jax.paths import local_path
from ddim_jax.runs import TrainConfig, Watcher, fit, join


def main(config: TrainConfig) -> None:
    """Train, with a progress bar, TensorBoard's logs and grids of samples."""
    fit(config, [_Bar(), _Board(local_path(config.workdir))])


class _Bar(Watcher):
    def start(self, step: int, max_steps: int) -> None:
        self._bar = tqdm.tqdm(
            total=max_steps, initial=step, unit="step", disable=None, smoothing=0.1
        )

    def update(self, step: int) -> None:
        self._bar.update(1)

    def line(self, line: dict[str, int | float]) -> None:
        loss, rate = line["loss"], line["images_per_second"]
        self._bar.set_postfix_str(f"loss {loss:.4f}, {rate:.0f} images/s")

    def measured(self, step: int, numbers: Mapping[str, int | float | None]) -> None:
        if jax.process_index() == 0:
            said = (
                f"{name} {number:.5g}" for name, number in numbers.items() if number is not None
            )
            tqdm.tqdm.write(f"step {step}: {', '.join(said)}")

    def close(self) -> None:
        self._bar.close()


class _Board(Watcher):
    """TensorBoard's logs, and samples/step_*.png; the first host writes."""

    def __init__(self, workdir: pathlib.Path):
        self._workdir, self._board = workdir, None

    def start(self, step: int, max_steps: int) -> None:
        del max_steps
        if jax.process_index() == 0:
            self._board = tensorboardX.SummaryWriter(
                str(self._workdir / "tensorboard"), purge_step=step + 1
            )

    def line(self, line: dict[str, int | float]) -> None:
        if self._board is not None:
            for name in line.keys() - {"step"}:
                self._board.add_scalar(name, line[name], int(line["step"]))
            self._board.flush()  # a killed run goes on after its checkpoint, and logs no line twice

    def images(self, step: int, images: np.ndarray) -> None:
        if self._board is not None:
            pictures.save_grid(self._workdir / "samples" / f"step_{step:07d}.png", images)
            self._board.add_image("samples", pictures.tile(images, 8), step, dataformats="HWC")

    def measured(self, step: int, numbers: Mapping[str, int | float | None]) -> None:
        if self._board is not None:
            for name, number in numbers.items():
                if number is not None and not name.startswith("num_"):
                    self._board.add_scalar(name, number, step)
            self._board.flush()

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


if __name__ == "__main__":
    cli.run(main, TrainOptions, PRESETS, prepare=join)
