"""Runs: what `fit` trains, a folder holds and `load_trained` opens.

run = load_trained("runs/digits")
images = run.sample(jax.random.key(0), 64, num_sample_steps=50)

fit(TrainConfig(workdir="runs/mine", data="digits", model=ModelConfig(...), max_steps=3000))
"""

from ddim_jax.runs.config import TrainConfig as TrainConfig
from ddim_jax.runs.draw import DrawInputs as DrawInputs
from ddim_jax.runs.draw import check_finite as check_finite
from ddim_jax.runs.draw import checked_images as checked_images
from ddim_jax.runs.draw import draw_images as draw_images
from ddim_jax.runs.draw import image_program as image_program
from ddim_jax.runs.draw import to_pixels as to_pixels
from ddim_jax.runs.fit import fit as fit
from ddim_jax.runs.folder import load_spec as load_spec
from ddim_jax.runs.folder import read_config as read_config
from ddim_jax.runs.hosts import join as join
from ddim_jax.runs.load import Run as Run
from ddim_jax.runs.load import Weights as Weights
from ddim_jax.runs.load import load_trained as load_trained
from ddim_jax.runs.load import weights_called as weights_called
from ddim_jax.runs.log import Watcher as Watcher
from ddim_jax.runs.spec import CODECS as CODECS
from ddim_jax.runs.spec import SCHEDULES as SCHEDULES
from ddim_jax.runs.spec import ModelConfig as ModelConfig
from ddim_jax.runs.spec import RunParams as RunParams
from ddim_jax.runs.spec import RunSpec as RunSpec
from ddim_jax.runs.spec import ScheduleConfig as ScheduleConfig
