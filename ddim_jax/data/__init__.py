"""Images: where they come from, their pixels, and the order in which training sees them."""

from ddim_jax.data.content import content_of as content_of
from ddim_jax.data.load import MAX_BYTES_IN_MEMORY as MAX_BYTES_IN_MEMORY
from ddim_jax.data.load import load_images as load_images
from ddim_jax.data.load import splits_of as splits_of
from ddim_jax.data.pixels import to_model_range as to_model_range
from ddim_jax.data.pixels import to_uint8 as to_uint8
from ddim_jax.data.source import ArraySource as ArraySource
from ddim_jax.data.source import Example as Example
from ddim_jax.data.source import ImageSource as ImageSource
from ddim_jax.data.stream import batches as batches
from ddim_jax.data.stream import prefetch_to_device as prefetch_to_device
from ddim_jax.data.stream import sequential_batches as sequential_batches
from ddim_jax.data.stream import shuffled_indices as shuffled_indices
