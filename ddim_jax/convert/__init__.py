"""Published weights to ours and back: one file for each checkpoint format, both directions.

`paper` reads what the DDIM paper's torch code and its conversions of DDPM's weights store;
`diffusers` reads and writes a folder that diffusers' pipelines load. Everything is checked before
it is used: no tensor missing, none left over, every shape equal.
"""

from ddim_jax.convert.diffusers import DiffusersCheckpoint as DiffusersCheckpoint
from ddim_jax.convert.diffusers import DiffusersFolder as DiffusersFolder
from ddim_jax.convert.diffusers import load_diffusers as load_diffusers
from ddim_jax.convert.diffusers import open_diffusers as open_diffusers
from ddim_jax.convert.diffusers import save_diffusers as save_diffusers
from ddim_jax.convert.diffusers_scheduler import (
    prediction_from_diffusers as prediction_from_diffusers,
)
from ddim_jax.convert.diffusers_scheduler import (
    schedule_from_diffusers as schedule_from_diffusers,
)
from ddim_jax.convert.diffusers_unet import diffusers_to_flax as diffusers_to_flax
from ddim_jax.convert.diffusers_unet import flax_to_diffusers as flax_to_diffusers
from ddim_jax.convert.paper import flax_to_paper as flax_to_paper
from ddim_jax.convert.paper import load_paper_checkpoint as load_paper_checkpoint
from ddim_jax.convert.paper import paper_to_flax as paper_to_flax
