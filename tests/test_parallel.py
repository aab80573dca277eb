"""parallel.py: many devices do what one does. Fake devices need a process of their own."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddim_jax import parallel


def in_process_with_devices(count: int, code: str) -> str:
    flags = f"--xla_force_host_platform_device_count={count}"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_pmapped_step_on_8_devices_is_the_step_on_the_whole_batch():
    out = in_process_with_devices(
        8,
        """
        import functools, jax, jax.numpy as jnp, numpy as np, optax
        from ddim_jax import linear_schedule, parallel, train
        from ddim_jax.unet import UNet

        assert jax.device_count() == 8
        model = UNet(image_channels=1, channels=4, channel_mults=(1,), num_res_blocks=1,
                     attention_resolutions=(), dropout=0.3, norm_groups=2)
        # Plain SGD: Adam would divide rounding errors by themselves where a gradient is 0.
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
        params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((8, 8, 1)), 0)["params"]
        params = jax.tree.map(  # no layer may be silent, or half the network is not tested
            lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params)
        make = lambda: train.init_train_state(
            jax.random.key(1), jax.tree.map(jnp.copy, params), tx)
        batch = {"image": np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), np.uint8)}
        # The settings in which an example depends most on its place in the batch.
        loss_fn = train.diffusion_loss(model.apply, linear_schedule(), batch_size=16,
                                       flip=True, timesteps="antithetic")
        one = jax.jit(functools.partial(
            train.train_step, loss_fn=loss_fn, tx=tx, ema_decay=0.9))
        many = parallel.pmap_train_step(loss_fn, tx, ema_decay=0.9, num_microbatches=2)
        state, replicas = make(), parallel.replicate(make())
        for _ in range(3):
            state, metrics = one(state, batch)
            replicas, all_metrics = many(replicas, parallel.shard(batch))
        got = parallel.unreplicate(replicas)
        moved = max(jnp.abs(a - b).max()
                    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(params)))
        assert moved > 1e-3, moved
        for part in ("params", "ema_params"):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
                         getattr(got, part), getattr(state, part))
        np.testing.assert_allclose(
            parallel.unreplicate(all_metrics)["loss"], metrics["loss"], rtol=1e-5)
        for leaf in jax.tree.leaves(replicas.params):  # all replicas alike, to the bit
            leaf = np.asarray(leaf)
            assert (leaf == leaf[:1]).all()
        print("same")
        """,
    )
    assert out.strip() == "same"


def test_samples_are_the_same_on_1_and_8_devices_and_for_any_batch():
    code = """
        import sys; sys.path.insert(0, "experiments")
        import generate, hashlib, jax, jax.numpy as jnp, numpy as np
        from workdir import Network
        from ddim_jax import ddim, ddim_timesteps, initial_noise, linear_schedule
        from ddim_jax.unet import UNet
        model = UNet(image_channels=1, channels=8, channel_mults=(1, 2), num_res_blocks=1,
                     attention_resolutions=(), norm_groups=4)
        params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((8, 8, 1)), 0)["params"]
        params = jax.tree.map(lambda p: p + 0.01, params)
        network = Network(model, linear_schedule(), (8, 8, 1), "uniform")
        program = generate.image_program(
            network, ddim_timesteps(1000, 10), lambda eta: ddim(eta))
        for batch_size in (8, 16):
            images = generate.images(program, params, 21, batch_size, 0, 1.0)
            assert images.shape == (21, 8, 8, 1)
            print(" ".join(map(str, images.ravel())))
        x_T, keys = initial_noise(jax.random.key(5), jnp.arange(21), (8, 8, 1))
        print(hashlib.sha256(np.asarray(x_T).tobytes()).hexdigest())
    """
    runs = [in_process_with_devices(n, code).splitlines() for n in (1, 8)]
    assert runs[0][2] == runs[1][2], "the noise must be the same to the bit"
    grids = np.array([line.split() for run in runs for line in run[:2]], int)
    assert grids.std() > 20, "constant images would prove nothing"
    # 1e-4 in data units may still round to the neighbouring grey level, rarely.
    assert np.abs(grids - grids[0]).max() <= 1
    assert (grids != grids[0]).mean() < 1e-2


def test_batch_size_must_be_divisible_by_devices_and_microbatches():
    parallel.check_batch_size(64, 2)
    with pytest.raises(ValueError, match=r"batch_size must be divisible by 3 .* got 64.*63"):
        parallel.check_batch_size(64, 3)
    with pytest.raises(ValueError, match="batch_size"):
        parallel.check_batch_size(0)


def test_params_placed_once_are_not_copied_again():
    in_process_with_devices(
        4,
        """
        import jax, jax.numpy as jnp
        from ddim_jax import parallel
        placed = parallel.everywhere({"w": jnp.arange(3.0)})
        again = parallel.everywhere(placed)
        for shard, other in zip(placed["w"].addressable_shards, again["w"].addressable_shards):
            assert shard.data.unsafe_buffer_pointer() == other.data.unsafe_buffer_pointer()
            assert shard.data.shape == (3,)
        assert len(placed["w"].addressable_shards) == 4
        """,
    )


def test_unreplicate_gives_copies_on_the_host():
    tree = {"w": jnp.arange(3.0), "key": jax.random.key(1)}
    replicas = parallel.replicate(tree)
    got = parallel.unreplicate(replicas)
    assert isinstance(got["w"], np.ndarray)
    assert not np.shares_memory(got["w"], np.asarray(replicas["w"].addressable_data(0)))
    np.testing.assert_array_equal(got["w"], tree["w"])
    assert got["key"] == tree["key"]
    donated = jax.pmap(lambda w: w + 1, donate_argnums=0)(replicas["w"])
    jax.block_until_ready(donated)
    np.testing.assert_array_equal(got["w"], tree["w"])


def test_over_devices_splits_only_the_arrays():
    f = parallel.over_devices(lambda p, x, y: p["scale"] * x + y)
    got = f({"scale": jnp.float32(3)}, jnp.arange(4.0), jnp.ones(4))
    np.testing.assert_array_equal(got, [1, 4, 7, 10])
    assert isinstance(got, jax.Array)
