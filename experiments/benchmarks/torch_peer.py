"""diffusers' network on torch, sampled and trained by hand: whom benchmark.py compares with."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddim_jax.convert.diffusers_unet import config_from_unet, flax_to_diffusers
from ddim_jax.schedule import linear_schedule
from ddim_jax.unet import UNet


def sampling(network: Any, x_T: Any, num_sample_steps: int, dtype: str) -> Callable[[], Any]:
    """DDIM of one batch in torch, eq. 12 by hand, so that no scheduler's overhead is counted."""
    import torch

    schedule = linear_schedule()
    timesteps = schedule.timesteps(num_sample_steps)
    levels = [float(schedule.alpha_bar(t)) for t in (*timesteps.tolist(), schedule.clean)]
    x_T, layout = _images(x_T, network)

    indices = torch.from_numpy(timesteps).to(x_T.device)  # numbers would be compiled in, one by one

    def run():
        with torch.inference_mode(), _autocast(x_T.device, dtype):
            x = x_T
            for t, ab, ab_prev in zip(indices, levels, levels[1:], strict=False):
                eps = network(x, t).sample.float()
                x0 = (x - (1 - ab) ** 0.5 * eps) / ab**0.5
                x = ab_prev**0.5 * x0 + (1 - ab_prev) ** 0.5 * eps
                x = x.contiguous(memory_format=layout)
        return _synchronize(x)

    return run


def training(
    network: Any, x0: Any, num_train_steps: int, dtype: str, ema_decay: float
) -> Callable[[], Any]:
    """Updates on one batch in torch: fused Adam, multi-tensor clipping and average."""
    import torch

    network = network.train()
    x0, layout = _images(x0, network)
    weights = list(network.parameters())
    average = [w.detach().clone() for w in weights]
    adam = torch.optim.Adam(weights, lr=2e-4, fused=True)
    levels = torch.tensor(np.asarray(linear_schedule().alphas_cumprod), device=x0.device)

    def run():
        for _ in range(num_train_steps):
            t = torch.randint(0, len(levels), (len(x0),), device=x0.device)
            ab = levels[t][:, None, None, None]
            noise = torch.randn_like(x0)
            x_t = (ab.sqrt() * x0 + (1 - ab).sqrt() * noise).contiguous(memory_format=layout)
            with _autocast(x0.device, dtype):
                loss = (network(x_t, t).sample.float() - noise).square().mean()
            adam.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            adam.step()
            with torch.no_grad():
                torch._foreach_lerp_(average, weights, 1 - ema_decay)
        return _synchronize(loss)

    return run


def networks(model: UNet, params: Any, image_size: int) -> dict[str, Any]:
    """diffusers' network with these weights: both layouts on a CPU; on a GPU the faster one, as it
    is and compiled.

    Raises FloatingPointError if it is not the same function.
    """
    try:
        import diffusers
        import torch
    except ImportError as error:
        raise ValueError(
            f"peer diffusers needs torch and diffusers; {error}. pip install torch diffusers"
        ) from error
    torch.set_num_threads(os.cpu_count() or 1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    cuda = jax.default_backend() == "gpu"
    settings = {k: v for k, v in config_from_unet(model, image_size).items() if k[0] != "_"}
    weights = {k: torch.from_numpy(a.copy()) for k, a in flax_to_diffusers(params, model).items()}

    def network(layout):
        unet = diffusers.UNet2DModel(**settings)
        unet.load_state_dict(weights)
        return unet.to("cuda" if cuda else "cpu", memory_format=layout).eval()

    layouts = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    made = {f"diffusers, {name}": network(layout) for name, layout in layouts.items()}
    _check_same(made["diffusers, contiguous"], model, params, image_size)
    if cuda:
        del made["diffusers, contiguous"]  # tensor cores read channels last
        compiled = torch.compile(network(torch.channels_last), dynamic=False)
        made["diffusers, channels_last, compiled"] = compiled
    return made


def _check_same(network: Any, model: UNet, params: Any, image_size: int) -> None:
    import torch

    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, image_size, image_size, 3)))
    with torch.inference_mode():
        want = network(_images(x, network)[0], 500).sample
    want = want.permute(0, 2, 3, 1).cpu().numpy()
    with jax.default_matmul_precision("highest"):
        # Jitted: one by one, the operations take longer to compile.
        apply = jax.jit(model.clone(dtype=jnp.float32).apply)
        got = apply({"params": params}, x, 500)
    error = np.abs(np.asarray(got) - want).max() / want.std()
    if error > 1e-2:  # TF32 is allowed there
        raise FloatingPointError(f"the two networks differ by {error:.1e} of the output's std")


def _images(x: jax.Array, network: Any) -> tuple[Any, Any]:
    """The images where the network is, and the memory layout that its weights have."""
    import torch

    weight = next(w for w in network.parameters() if w.ndim == 4 and w.shape[1] > 1)
    last = weight.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    images = torch.from_numpy(np.array(x, np.float32)).permute(0, 3, 1, 2).to(weight.device)
    return images.contiguous(memory_format=layout), layout


def _autocast(device: Any, dtype: str) -> Any:
    import torch

    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def _synchronize(result: Any) -> Any:
    import torch

    if result.device.type == "cuda":
        torch.cuda.synchronize()
    return result
