"""How an image comes about: the states x_t, the predictions x0_hat, and an animation of both.

python experiments/trajectory.py --workdir runs/digits
"""

from __future__ import annotations

import dataclasses
import pathlib

import cli
import generate
import jax
import matplotlib.pyplot as plt
import numpy as np
import panels
import pictures
import real
from workdir import Trained, Weights, load_trained

from ddim_jax.keys import initial_noise
from ddim_jax.parallel import over_devices
from ddim_jax.samplers import sample_trajectory
from ddim_jax.schedule import Spacing, ddim_timesteps

MAX_FRAMES = 50


@dataclasses.dataclass(frozen=True)
class TrajectoryConfig:
    """Every state and prediction on the way from noise to a few images."""

    workdir: str
    """The model: a folder that train.py or convert.py wrote."""
    out: str = "out/trajectory"
    """Where trajectory.png and trajectory.gif go."""
    num_images: int = 9
    """Images in the animation; the strips show the first three."""
    num_sample_steps: int = 50
    """S, the number of steps."""
    num_columns: int = 11
    """States on a strip, both ends included."""
    sampler: generate.SamplerName = "ddim"
    """The method."""
    eta: float = 0.0
    """0 is DDIM, 1 is DDPM (eq. 16); for the sampler ddim."""
    spacing: Spacing | None = None
    """Sub-sequence of time indices; the model's own if not given."""
    seed: int = 0
    """Image i depends on (seed, i) alone."""
    frame_ms: int = 80
    """Time of each frame of the animation."""
    weights: Weights = "ema"
    """The averaged weights, or the raw ones."""


def main(config: TrajectoryConfig) -> None:
    """Sample with every state kept, draw."""
    cli.check_at_least(config, num_images=1, num_columns=2, frame_ms=1)
    sampler = generate.make_sampler(config.sampler, config.eta)
    trained = load_trained(config.workdir, config.weights)
    network = trained.network
    timesteps = ddim_timesteps(
        network.schedule.num_steps, config.num_sample_steps, config.spacing or network.spacing
    )
    states, x0s = _trajectories(trained, timesteps, sampler, config)
    out = pathlib.Path(config.out)
    _draw(out / "trajectory.png", states, x0s, timesteps, config.num_columns)
    pictures.save_gif(out / "trajectory.gif", _frames(states, x0s), config.frame_ms)
    half_way = _distance_to_end(x0s)[len(timesteps) // 2]
    print(
        f"x0_hat after half of the {len(timesteps)} steps is {half_way:.3f} from the image (root "
        f"mean square on [0, 1]); see {out / 'trajectory.png'} and {out / 'trajectory.gif'}"
    )


def _trajectories(trained: Trained, timesteps, sampler, config: TrajectoryConfig):
    """uint8 states (N, S + 1, H, W, C) and predictions (N, S, H, W, C)."""
    network = trained.network

    def program(params, indices):
        x_T, keys = initial_noise(jax.random.key(config.seed), indices, network.image_shape)
        label = indices % (network.model.num_classes or 1)
        eps_fn = network.eps_fn(params, label)
        both = sample_trajectory(keys, eps_fn, network.schedule, x_T, timesteps, sampler)
        return tuple(generate.to_pixels(x.swapaxes(0, 1)) for x in both)

    indices = np.arange(config.num_images)
    both = real.over_batches(over_devices(program), trained.params, len(indices), indices)
    return tuple(map(generate.on_host, both))


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


def _draw(path: pathlib.Path, states, x0s, timesteps, num_columns: int) -> None:
    """Left strips in pairs, x_t above x0_hat; right how soon x0_hat is the image."""
    num_steps = len(timesteps)
    shown = np.linspace(0, num_steps - 1, min(num_columns, num_steps)).round().astype(int)
    pairs = [strip[i, shown] for i in range(min(3, len(states))) for strip in (states, x0s)]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 3.6), width_ratios=(1.6, 1), layout="constrained"
    )
    panels.show_images(
        left,
        np.stack(pairs),
        rows=["x_t", "x0_hat"] * (len(pairs) // 2),
        columns=[f"t={timesteps[i]}" for i in shown],
        title="states, and the image predicted from each",
    )
    right.plot(np.arange(1, num_steps + 1), _distance_to_end(x0s))
    right.set(xlabel="steps done", ylabel="distance of x0_hat to the image", ylim=(0, None))
    right.set_title("preview: how soon the image is decided", fontsize=10)
    panels.save(figure, path)


if __name__ == "__main__":
    cli.run(main, TrajectoryConfig)
