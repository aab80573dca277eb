"""Codecs: between uint8 images and what the network sees.

A diffusion model of pixels sees the image itself, in [-1, 1]; one of latents sees what an encoder
made of it. A codec is that difference and nothing else: whatever else runs a network knows x0 and
its shape, and asks the codec for images.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Array, Float, UInt8

from ddim_jax.data.pixels import to_model_range
from ddim_jax.types import Data, PRNGKey

Shape: TypeAlias = tuple[int, ...]
Images: TypeAlias = UInt8[Array, "B H W C"] | UInt8[np.ndarray, "B H W C"]


@dataclasses.dataclass(frozen=True)
class Codec:
    """The identity on pixels, and what others override. Its fields are its settings.

    Another codec is a frozen dataclass with these methods and an entry of `CODECS`. Its weights
    are a pytree that `init` makes or reads when a run begins; they are kept with the run, are an
    argument of every program, and part of the run's fingerprint.
    """

    @property
    def is_identity(self) -> bool:
        """Whether x0 is the image itself; bits per dimension have no other meaning."""
        return type(self) is Codec

    def init(self, image_shape: Shape) -> Any:
        """The codec's weights, a pytree; raises ValueError for images it cannot encode."""
        del image_shape
        return {}

    def latent_shape(self, image_shape: Shape) -> Shape:
        """The shape of x0, and so of x_T, for images (H, W, C)."""
        return image_shape

    def encode(self, params: Any, images: Images, key: PRNGKey | None = None) -> Data:
        """x0 (B, *latent_shape) of images. With keys (B,) it may be drawn, image i from key i."""
        del params, key
        return to_model_range(images)

    def decode(self, params: Any, x0: Data) -> Float[Array, "B H W C"]:
        """Images in [-1, 1], not yet whole grey levels, of x0 (B, *latent_shape)."""
        del params
        return x0


PIXELS = Codec()
"""The identity: x0 is the image."""

CODECS: dict[str, type[Codec]] = {"pixels": Codec}
"""The codecs a run may name. A new one is its class and its entry here."""
