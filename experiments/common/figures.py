"""Figures: grids of images with labels, as axes of matplotlib."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import UInt8

from common import pictures

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ddim_jax.files import write_whole


def show_images(
    axes: Axes,
    images: UInt8[np.ndarray, "R C H W ch"],
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    title: str = "",
) -> None:
    """Draw a grid of images, with a label for each row and each column."""
    num_rows, num_columns, height, width, channels = images.shape
    picture = pictures.tile(images.reshape(-1, height, width, channels), num_columns)
    axes.imshow(
        picture[..., 0] if channels == 1 else picture,
        cmap="gray",
        vmin=0,
        vmax=255,
        interpolation="nearest",
    )
    middles_x = np.arange(num_columns) * (width + 1) + (width - 1) / 2
    middles_y = np.arange(num_rows) * (height + 1) + (height - 1) / 2
    axes.set_xticks(middles_x[: len(columns)], columns)
    axes.set_yticks(middles_y[: len(rows)], rows)
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=10)


def count_axis(axes: Axes, values: Sequence[int], label: str) -> None:
    """A logarithmic x axis with a tick at each of the values."""
    axes.set_xscale("log")
    axes.set_xticks(values, [str(v) for v in values])
    axes.minorticks_off()
    axes.set_xlabel(label)


def save(figure: Figure, path: pathlib.Path) -> None:
    """Write the figure as a PNG file and forget it."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, file.getvalue())
