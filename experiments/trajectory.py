"""How an image comes about: the states x_t, the predictions x0_hat, and an animation of both.

A model of latents shows both as its codec decodes them.

python experiments/trajectory.py --workdir runs/digits
"""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import matplotlib.pyplot as plt
import numpy as np
from common import cli, figures, pictures
from common.options import DrawOptions, ModelOptions, SamplerOptions, StepsOptions
from common.progress import Progress
from jaxtyping import UInt8

from ddim_jax.keys import initial_noise, seed_key
from ddim_jax.parallel import map_rows, over_devices
from ddim_jax.paths import Folder
from ddim_jax.runs import Run, RunParams, checked_images, to_pixels
from ddim_jax.runs.options import check_limits, option
from ddim_jax.samplers import Sampler, sample_trajectory
from ddim_jax.solvers import named_sampler

MAX_FRAMES = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrajectoryConfig(DrawOptions, SamplerOptions, StepsOptions, ModelOptions):
    """Every state and prediction on the way from noise to a few images."""

    out: Folder = "out/trajectory"
    """Where trajectory.png and trajectory.gif go."""
    num_images: int = option(9, at_least=1, below=10_001)
    """Images in the animation; the strips show the first three."""
    num_columns: int = option(11, at_least=2, below=10_001)
    """States on a strip, both ends included."""
    frame_ms: int = option(80, at_least=1)
    """Time of each frame of the animation."""


def main(config: TrajectoryConfig) -> None:
    """Sample with every state kept, draw."""
    check_limits(config)
    sampler = named_sampler(config.sampler, config.eta)
    run = config.load()
    timesteps = run.spec.timesteps(config.num_sample_steps, config.spacing)
    states, x0s = _trajectories(run, timesteps, sampler, config)
    out = pathlib.Path(config.out)
    alpha_bar = float(run.spec.schedule.alpha_bar(timesteps[0]))
    amplified = ((1 - alpha_bar) / alpha_bar) ** 0.5
    _draw(out / "trajectory.png", states, x0s, timesteps, config.num_columns, amplified)
    pictures.save_gif(out / "trajectory.gif", _frames(states, x0s), config.frame_ms)
    half_way = _distance_to_end(x0s)[len(timesteps) // 2]
    print(
        f"x0_hat after half of the {len(timesteps)} steps is {half_way:.3f} from the image (root "
        f"mean square on [0, 1]); run {run.fingerprint_id}, see {out / 'trajectory.png'} and "
        f"{out / 'trajectory.gif'}"
    )


def _trajectories(
    run: Run, timesteps: np.ndarray, sampler: Sampler, config: TrajectoryConfig
) -> tuple[UInt8[np.ndarray, "N states H W C"], UInt8[np.ndarray, "N steps H W C"]]:
    """S + 1 states and S predictions of each image, as the model's codec decodes them."""
    spec = run.spec

    def program(params: RunParams, indices):
        x_T, keys = initial_noise(seed_key(config.seed), indices, spec.latent_shape)
        eps_fn = spec.denoiser(params, indices % (spec.num_classes or 1))
        both = sample_trajectory(keys, eps_fn, spec.schedule, x_T, timesteps, sampler)
        # One time after the other: all at once would outgrow what sampling needs.
        images = (jax.lax.map(lambda x: spec.decode(params, x), xs) for xs in both)
        return tuple(to_pixels(x.swapaxes(0, 1)) for x in images)

    indices = np.arange(config.num_images)
    with Progress("trajectory.py", len(indices), "images") as progress:
        states, x0s = map_rows(
            over_devices(program), run.params, config.batch_size, indices, on_rows=progress.add
        )
    return checked_images(states), checked_images(x0s)


def _distance_to_end(x0s) -> np.ndarray:
    """Root mean squared difference on [0, 1] of each prediction to the last, over all images."""
    difference = (x0s.astype(np.float64) - x0s[:, -1:]) / 255
    return np.sqrt((difference**2).mean(axis=(0, 2, 3, 4)))


def _frames(states, x0s) -> list[np.ndarray]:
    """The states left and the predictions right, in time; the last frame stays for a while."""
    columns, num_steps = max(1, round(len(states) ** 0.5)), x0s.shape[1]

    def frame(i: int) -> np.ndarray:
        left = pictures.tile(states[:, i], columns)
        right = pictures.tile(x0s[:, min(i, num_steps - 1)], columns)
        # 32 grey levels: noise compresses badly, and nobody sees the difference.
        return pictures.enlarge(pictures.beside(left, right) // 8 * 8 + 4, 128)

    shown = np.linspace(0, num_steps, min(num_steps, MAX_FRAMES) + 1).round().astype(int)
    return [frame(i) for i in shown] + [frame(num_steps)] * 15


def _draw(path: pathlib.Path, states, x0s, timesteps, num_columns: int, amplified: float) -> None:
    """Left strips in pairs, x_t above x0_hat; right how soon x0_hat is the image."""
    num_steps = len(timesteps)
    shown = np.linspace(0, num_steps - 1, min(num_columns, num_steps)).round().astype(int)
    pairs = [strip[i, shown] for i in range(min(3, len(states))) for strip in (states, x0s)]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 3.6), width_ratios=(1.6, 1), layout="constrained"
    )
    figures.show_images(
        left,
        np.stack(pairs),
        rows=["x_t", "x0_hat"] * (len(pairs) // 2),
        columns=[f"t={timesteps[i]}" for i in shown],
        title="states, and the image predicted from each",
    )
    right.plot(np.arange(1, num_steps + 1), _distance_to_end(x0s))
    right.set(xlabel="steps done", ylabel="RMS of x0_hat - image, on [0, 1]", ylim=(0, None))
    right.set_title(
        "how soon the image is decided\n"
        f"(x0_hat has {amplified:.0f} times the network's error at first)",
        fontsize=10,
    )
    figures.save(figure, path)


if __name__ == "__main__":
    cli.run(main, TrajectoryConfig)
