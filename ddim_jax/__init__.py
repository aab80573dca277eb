"""Denoising diffusion implicit models (Song, Meng, Ermon 2021) in JAX.

The names here are the pure core: schedules, steps, samplers, losses. Networks, data, training and
metrics are modules to import by name (`ddim_jax.unet`, `ddim_jax.train`, ...), so that this import
loads neither flax, orbax, tensorflow nor matplotlib.
"""

from ddim_jax.bound import BoundTerms as BoundTerms
from ddim_jax.bound import fixed_large_sigmas as fixed_large_sigmas
from ddim_jax.bound import process_sigmas as process_sigmas
from ddim_jax.bound import variational_bound as variational_bound
from ddim_jax.bound import variational_weights as variational_weights
from ddim_jax.denoisers import clip_x0 as clip_x0
from ddim_jax.denoisers import from_score as from_score
from ddim_jax.denoisers import from_v as from_v
from ddim_jax.denoisers import from_x0 as from_x0
from ddim_jax.denoisers import guided as guided
from ddim_jax.inversion import encode_fixed_point as encode_fixed_point
from ddim_jax.keys import image_keys as image_keys
from ddim_jax.keys import initial_noise as initial_noise
from ddim_jax.latents import interpolation_grid as interpolation_grid
from ddim_jax.latents import interpolation_line as interpolation_line
from ddim_jax.latents import lerp as lerp
from ddim_jax.latents import slerp as slerp
from ddim_jax.losses import antithetic_timesteps as antithetic_timesteps
from ddim_jax.losses import eps_loss as eps_loss
from ddim_jax.ode import from_ode_coordinates as from_ode_coordinates
from ddim_jax.ode import ode_field as ode_field
from ddim_jax.ode import to_ode_coordinates as to_ode_coordinates
from ddim_jax.predict import epsilon_to_score as epsilon_to_score
from ddim_jax.predict import epsilon_to_v as epsilon_to_v
from ddim_jax.predict import epsilon_to_x0 as epsilon_to_x0
from ddim_jax.predict import score_to_epsilon as score_to_epsilon
from ddim_jax.predict import score_to_v as score_to_v
from ddim_jax.predict import score_to_x0 as score_to_x0
from ddim_jax.predict import v_to_epsilon as v_to_epsilon
from ddim_jax.predict import v_to_score as v_to_score
from ddim_jax.predict import v_to_x0 as v_to_x0
from ddim_jax.predict import x0_to_epsilon as x0_to_epsilon
from ddim_jax.predict import x0_to_score as x0_to_score
from ddim_jax.predict import x0_to_v as x0_to_v
from ddim_jax.process import add_noise as add_noise
from ddim_jax.process import ddpm_posterior as ddpm_posterior
from ddim_jax.process import posterior_mean as posterior_mean
from ddim_jax.samplers import Sampler as Sampler
from ddim_jax.samplers import SamplerState as SamplerState
from ddim_jax.samplers import ddim as ddim
from ddim_jax.samplers import ddim_clip_data as ddim_clip_data
from ddim_jax.samplers import ddpm as ddpm
from ddim_jax.samplers import encode as encode
from ddim_jax.samplers import sample as sample
from ddim_jax.samplers import sample_trajectory as sample_trajectory
from ddim_jax.schedule import Schedule as Schedule
from ddim_jax.schedule import cosine_schedule as cosine_schedule
from ddim_jax.schedule import ddim_timesteps as ddim_timesteps
from ddim_jax.schedule import linear_schedule as linear_schedule
from ddim_jax.schedule import scaled_linear_schedule as scaled_linear_schedule
from ddim_jax.schedule import schedule_from_betas as schedule_from_betas
from ddim_jax.solvers import dpm_solver_pp_2m as dpm_solver_pp_2m
from ddim_jax.solvers import heun as heun
from ddim_jax.solvers import probability_flow_euler as probability_flow_euler
from ddim_jax.steps import ddim_sigma as ddim_sigma
from ddim_jax.steps import ddim_sigma_hat as ddim_sigma_hat
from ddim_jax.steps import ddim_step as ddim_step
from ddim_jax.steps import ddim_step_clip_data as ddim_step_clip_data
from ddim_jax.steps import ddpm_step as ddpm_step
from ddim_jax.steps import sigma_hat_step as sigma_hat_step
from ddim_jax.types import EpsFn as EpsFn
