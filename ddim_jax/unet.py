"""The U-Net of Ho et al. 2020 (arXiv:2006.11239, appendix B), which the DDIM paper samples.

It is one network with three published spellings (the paper's torch code, diffusers' `UNet2DModel`,
DDPM's TensorFlow code); `ddim_jax.convert` renames their weights to ours. It predicts from (x, t)
alone and knows nothing about noise schedules. Images are channels last: (B, H, W, C).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ddim_jax.convolution import conv_general_dilated
from ddim_jax.tables import take_or_nan
from ddim_jax.types import Time

DDPM_INIT = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
ZERO_INIT = nn.initializers.variance_scaling(1e-10, "fan_avg", "uniform")
"""Nearly zero, so that every block starts as the identity and the network as a constant."""


class UNet(nn.Module):
    """A network with the signature of `EpsFn`: `model.apply(variables, x, t)` predicts the noise.

    The defaults are the published CIFAR-10 network, 35 746 307 parameters. Parameters and group
    norms are float32 whatever `dtype` is. Dropout is active only with `train=True`, which then
    needs `rngs={"dropout": key}`. Make the variables with `model.init(key, x, t)`, not jitted: as
    one program its random draws take XLA three times as long to compile.

    With `num_classes` a label is required: the classes are 0 .. num_classes - 1, and the index
    num_classes means "no class", the unconditional half of classifier-free guidance. A network
    without `no_class_row` has the classes alone.
    """

    image_channels: int = 3
    channels: int = 128  # at full resolution; the time embedding is four times as wide
    channel_mults: tuple[int, ...] = (1, 2, 2, 2)  # one per level, each level half as high and wide
    num_res_blocks: int = 2  # per level on the way down, one more on the way up
    attention_resolutions: tuple[int, ...] = (16,)  # image heights at which the blocks attend
    dropout: float = 0.0
    num_classes: int | None = None
    norm_groups: int = 32
    dtype: DTypeLike = jnp.float32  # of the computation
    no_class_row: bool = True  # whether the label num_classes, "no class", has an embedding
    remat: bool = False  # compute each block again for the gradient: less memory, more time

    def __post_init__(self) -> None:
        """Refuses settings that make no network."""
        super().__post_init__()
        _check_settings(self)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch H W C"],
        t: Time,
        label: Int[Array, "*labels"] | int | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "*batch H W C"]:
        """Predicted noise, of x's shape and dtype.

        `x` is (B, H, W, C) in about [-1, 1], or one image (H, W, C), so that `jax.vmap` over images
        works. `t` and `label` are integer scalars, or (B,) when x has a batch; `t` is a real number
        where the schedule counts in those, of about the same range, 0 to 1000. A label that the
        network has not gives NaN, and a ValueError if it is a Python number.
        """
        t, label = _check_inputs(self, x, t, label)
        residual_block, attention_block = ResidualBlock, AttentionBlock
        if self.remat:
            residual_block = nn.remat(ResidualBlock, static_argnums=(3,))  # train; 0 is self
            attention_block = nn.remat(AttentionBlock)
        residual = functools.partial(
            residual_block, dropout=self.dropout, norm_groups=self.norm_groups, dtype=self.dtype
        )
        attention = functools.partial(
            attention_block, norm_groups=self.norm_groups, dtype=self.dtype
        )
        conv3x3 = functools.partial(_conv3x3, dtype=self.dtype)
        widths = [self.channels * mult for mult in self.channel_mults]
        last = len(widths) - 1

        h = x.astype(self.dtype)[None] if x.ndim == 3 else x.astype(self.dtype)
        temb = self._embed(t, label)

        h = conv3x3(self.channels, name="conv_in")(h)
        skips = [h]
        for level, width in enumerate(widths):
            for block in range(self.num_res_blocks):
                h = residual(width, name=f"down_{level}_block_{block}")(h, temb, train)
                if h.shape[1] in self.attention_resolutions:
                    h = attention(name=f"down_{level}_attn_{block}")(h)
                skips.append(h)
            if level < last:
                # Padded right and bottom only, as TensorFlow's "SAME" does on even sizes.
                pad = ((0, 1), (0, 1))
                h = conv3x3(width, strides=2, padding=pad, name=f"down_{level}_downsample")(h)
                skips.append(h)

        h = residual(widths[-1], name="mid_block_1")(h, temb, train)
        h = attention(name="mid_attn_1")(h)
        h = residual(widths[-1], name="mid_block_2")(h, temb, train)

        for level, width in reversed(list(enumerate(widths))):
            for block in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = residual(width, name=f"up_{level}_block_{block}")(h, temb, train)
                if h.shape[1] in self.attention_resolutions:
                    h = attention(name=f"up_{level}_attn_{block}")(h)
            if level > 0:
                h = _upsample_nearest(h)
                h = conv3x3(width, name=f"up_{level}_upsample")(h)

        h = nn.swish(GroupNorm(self.norm_groups, self.dtype, name="norm_out")(h))
        h = conv3x3(self.image_channels, ZERO_INIT, name="conv_out")(h)
        return h.reshape(x.shape).astype(x.dtype)

    def _embed(self, t: Time, label: Int[Array, " M"] | None) -> Float[Array, "B E"]:
        """Time, and the class if there is one, as the vector every residual block reads."""
        dense = functools.partial(
            nn.Dense, 4 * self.channels, dtype=self.dtype, kernel_init=DDPM_INIT
        )
        temb = timestep_embedding(t, self.channels)
        temb = dense(name="temb_dense_1")(nn.swish(dense(name="temb_dense_0")(temb)))
        if self.num_classes is not None and label is not None:
            rows = self.num_classes + self.no_class_row
            classes = nn.Embed(rows, 4 * self.channels, name="label_embed")
            row = take_or_nan(jnp.asarray(classes.embedding), label)
            temb = temb + row.astype(self.dtype)
        # Every block starts with this swish, so once is enough.
        return nn.swish(temb)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around the time embedding, plus a shortcut; x + h is not rescaled."""

    features: int
    dropout: float
    norm_groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], temb: Float[Array, "#B E"], train: bool
    ) -> Float[Array, "B H W D"]:
        """`temb` has been through its swish already."""
        dense = functools.partial(nn.Dense, self.features, dtype=self.dtype, kernel_init=DDPM_INIT)
        h = nn.swish(GroupNorm(self.norm_groups, self.dtype, name="norm1")(x))
        h = _conv3x3(self.features, dtype=self.dtype, name="conv1")(h)
        h = h + dense(name="temb_proj")(temb)[:, None, None, :]

        h = nn.swish(GroupNorm(self.norm_groups, self.dtype, name="norm2")(h))
        h = nn.Dropout(self.dropout)(h, deterministic=not train)
        h = _conv3x3(self.features, ZERO_INIT, dtype=self.dtype, name="conv2")(h)

        if x.shape[-1] != self.features:
            x = dense(name="nin_shortcut")(x)  # a 1x1 convolution
        return x + h


class AttentionBlock(nn.Module):
    """Every pixel attends to every pixel: one head, as wide as the feature map, and a shortcut."""

    norm_groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Returns x plus what was attended to."""
        batch, height, width, channels = x.shape
        dense = functools.partial(nn.Dense, channels, dtype=self.dtype)
        h = GroupNorm(self.norm_groups, self.dtype, name="norm")(x)
        # (batch, position, head, channel), in two steps: the second as a reshape would leave open
        # how a batch that is split over a mesh stays split.
        h = h.reshape(batch, height * width, channels)[:, :, None, :]
        q, k, v = (dense(kernel_init=DDPM_INIT, name=name)(h) for name in "qkv")
        h = jax.nn.dot_product_attention(q, k, v)[:, :, 0, :]  # scales by C ** -0.5
        return x + dense(kernel_init=ZERO_INIT, name="proj_out")(h).reshape(x.shape)


def timestep_embedding(t: Time, width: int) -> Float[Array, "N E"]:
    """Sines, then cosines, of the index t at width // 2 frequencies from 1 down to 1e-4.

    The index enters as it is, not divided by T. An odd width is padded with a zero.
    Source: Ho et al. 2020, whose last frequency is exactly 1e-4: half - 1 in the denominator.
    """
    half = width // 2
    frequencies = np.exp(-math.log(10_000) * np.arange(half) / (half - 1))
    angles = jnp.asarray(t, jnp.float32)[:, None] * jnp.asarray(frequencies, jnp.float32)
    embedding = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, width % 2)))


def _conv3x3(
    features: int,
    kernel_init: nn.initializers.Initializer = DDPM_INIT,
    *,
    strides: int = 1,
    padding: int | tuple[tuple[int, int], tuple[int, int]] = 1,
    dtype: DTypeLike,
    name: str,
) -> nn.Conv:
    return nn.Conv(
        features,
        (3, 3),
        strides,
        padding,
        dtype=dtype,
        kernel_init=kernel_init,
        conv_general_dilated=conv_general_dilated,
        name=name,
    )


class GroupNorm(nn.Module):
    """`flax.linen.GroupNorm` with its parameters, in float32 whatever the dtype of the result.

    Variance is the mean square of what the mean leaves, which keeps its digits far from zero too.
    Of bfloat16, whose rounding is coarser than what cancels, it is E[x^2] - E[x]^2: a TPU sums both
    as it writes the convolution before, and x is not read again for them.
    Sums over the pixels come before sums over a group's channels: channels are innermost in memory,
    so the long sums run along vectors. On a CPU that takes 0.6 of the time.
    """

    groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """x with mean 0 and variance 1 in each group of channels, then scaled and shifted."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        coarse = x.dtype.itemsize < 4
        x = x.astype(jnp.float32)
        mean = self._group_mean(x)
        square = self._group_mean(jnp.square(x if coarse else x - mean))
        variance = jnp.maximum(square - jnp.square(mean), 0) if coarse else square
        x = (x - mean) * jax.lax.rsqrt(variance + 1e-6)
        return (x * scale + bias).astype(self.dtype)

    def _group_mean(self, x: Float[Array, "B H W C"]) -> Float[Array, "B 1 1 C"]:
        """The mean over the pixels and channels of a group, for each of its channels."""
        batch, _, _, channels = x.shape
        size = channels // self.groups
        mean = x.mean(axis=(1, 2)).reshape(batch, self.groups, size).mean(axis=-1)
        return jnp.repeat(mean, size, axis=-1)[:, None, None, :]


def _upsample_nearest(x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
    b, h, w, c = x.shape
    # A side at a time: a reshape of both would leave open how the result is split over a mesh.
    x = jnp.broadcast_to(x[:, :, None], (b, h, 2, w, c)).reshape(b, 2 * h, w, c)
    return jnp.broadcast_to(x[:, :, :, None], (b, 2 * h, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def _check_settings(net: UNet) -> None:
    for name in ("image_channels", "num_res_blocks", "norm_groups"):
        if getattr(net, name) < 1:
            raise ValueError(f"{name} must be at least 1; got {getattr(net, name)}.")
    if net.channels < 4 or net.channels % net.norm_groups:
        raise ValueError(
            f"channels must be at least 4 and divisible by norm_groups ({net.norm_groups}); "
            f"got {net.channels}. For a small network choose fewer norm_groups."
        )
    if not net.channel_mults or min(net.channel_mults) < 1:
        raise ValueError(
            f"channel_mults must hold one integer >= 1 per level; got {tuple(net.channel_mults)}."
        )
    if not 0 <= net.dropout < 1:
        raise ValueError(f"dropout must be in [0, 1); got {net.dropout}.")
    if net.num_classes is not None and net.num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, or None; got {net.num_classes}.")


def _check_inputs(net: UNet, x, t, label):
    """t and label as int arrays of shape (1,) or (B,), or a ValueError that says what is wrong."""
    if x.ndim not in (3, 4) or x.shape[-1] != net.image_channels:
        raise ValueError(
            f"x must be (B, H, W, {net.image_channels}) or (H, W, {net.image_channels}), channels "
            f"last; got shape {x.shape}."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating point, in about [-1, 1]; got dtype {x.dtype}.")
    height, width = x.shape[-3:-1]
    halvings = len(net.channel_mults) - 1
    if height % 2**halvings or width % 2**halvings:
        raise ValueError(
            f"x's height and width must be divisible by {2**halvings}, since {halvings + 1} levels "
            f"halve them {halvings} times; got {height} x {width}. Pad or crop the images, or use "
            "fewer channel_mults."
        )
    heights = [height // 2**level for level in range(halvings + 1)]
    if not set(net.attention_resolutions) <= set(heights):
        raise ValueError(
            f"attention_resolutions must be among the heights of the levels, {heights} for x of "
            f"height {height}; got {tuple(net.attention_resolutions)}. Otherwise those attention "
            "blocks would silently be left out."
        )
    if (net.num_classes is None) != (label is None):
        raise ValueError(
            "label was given, but this network has num_classes=None."
            if label is not None
            else f"label is required, since num_classes={net.num_classes}; {_no_class(net)}."
        )
    if net.num_classes is not None and isinstance(label, int):
        last = net.num_classes - 1 + net.no_class_row
        if not 0 <= label <= last:
            raise ValueError(
                f"label must be in [0, {last}]; got {label}. For none: {_no_class(net)}."
            )
    batch = x.shape[:-3]
    t = _check_index("t", t, batch, or_real=True)
    return t, None if label is None else _check_index("label", label, batch)


def _no_class(net: UNet) -> str:
    if net.no_class_row:
        return f"pass {net.num_classes} for 'no class'"
    return "this network has no row for 'no class' (no_class_row=False)"


def _check_index(name: str, index, batch: tuple[int, ...], *, or_real: bool = False) -> Array:
    index = jnp.asarray(index)
    real = or_real and jnp.issubdtype(index.dtype, jnp.floating)
    if not real and not jnp.issubdtype(index.dtype, jnp.integer):
        also = ", or a real time of a continuous schedule" if or_real else ""
        raise ValueError(f"{name} must be an integer index{also}; got dtype {index.dtype}.")
    if index.shape not in ((), batch):
        raise ValueError(
            f"{name} must be a scalar{f' or have shape {batch}' if batch else ''}, "
            f"to go with x; got shape {index.shape}."
        )
    return index.reshape(-1)


def parameter_shapes(model: UNet, image_shape: tuple[int, ...]) -> Any:
    """Shapes and dtypes of the model's parameters for images (H, W, C), without computing any.

    The height matters: it decides at which levels the attention blocks stand. A tree of
    `jax.ShapeDtypeStruct`, as `model.init` returns it under "params".
    """
    image = jax.ShapeDtypeStruct(image_shape, jnp.float32)
    index = jax.ShapeDtypeStruct((), jnp.int32)
    label = None if model.num_classes is None else index
    return jax.eval_shape(model.init, jax.random.key(0), image, index, label)["params"]
