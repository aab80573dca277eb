"""parallel.py: many devices do what one does. Fake devices need a process of their own."""

import os
import subprocess
import sys
import textwrap
import unittest

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddim_jax import parallel, train


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
        from ddim_jax.objectives import Denoising, Setup
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
        objective = Denoising(flip=True, timesteps="antithetic")
        loss_fn = objective.loss_fn(Setup(model.apply, linear_schedule(), batch_size=16))
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
        import hashlib, jax, jax.numpy as jnp, numpy as np
        from ddim_jax import ddim, initial_noise
        from ddim_jax.runs import (
            DrawInputs, ModelConfig, RunParams, RunSpec, ScheduleConfig, draw_images, image_program)
        model = ModelConfig(channels=8, channel_mults=(1, 2), num_res_blocks=1,
                            attention_resolutions=(), dropout=0.0, norm_groups=4)
        spec = RunSpec(model, ScheduleConfig(), (8, 8, 1))
        params = jax.jit(spec.model.init)(jax.random.key(0), jnp.zeros((8, 8, 1)), 0)["params"]
        params = jax.tree.map(lambda p: p + 0.01, params)
        program = image_program(spec, spec.timesteps(10), lambda eta: ddim(eta))
        inputs = DrawInputs(RunParams(params, {}), jax.random.key(0), (1.0,))
        for batch_size in (8, 16):
            images = draw_images(program, inputs, 21, batch_size)
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


def test_training_compiles_once():
    """It did twice: what `replicate` made was placed on another mesh than what pmap returns."""
    tx = optax.adam(1e-3)
    state = train.init_train_state(jax.random.key(0), {"w": jnp.ones(3)}, tx)

    def loss_fn(params, inputs):
        return jnp.square(inputs.batch["image"] - params["w"]).mean(-1), inputs.state

    step = parallel.pmap_train_step(loss_fn, tx, ema_decay=0.9)
    replicas, batch = parallel.replicate(state), parallel.shard({"image": np.zeros((8, 3))})
    with jax.log_compiles(), unittest.TestCase().assertLogs("jax", "WARNING") as logs:
        for _ in range(3):
            replicas, _ = step(replicas, batch)
    compiled = [line for line in logs.output if "Finished XLA compilation" in line]
    assert len(compiled) == 1, compiled


@pytest.mark.parametrize("eta", [0.5, np.float32(0.5), jnp.float32(0.5)])
def test_a_call_finds_compiled_what_was_compiled_before(eta):
    """Of Python's numbers too, whose type in JAX is one of their own."""
    traces = []

    def fn(params, x):
        traces.append(x.shape)
        return params["w"] * params["eta"] * x

    program, x = parallel.over_devices(fn), np.ones((jax.local_device_count(), 3), np.float32)
    params = {"w": jnp.float32(3), "eta": eta}
    program.compile(params, x)
    np.testing.assert_array_equal(program(params, x), 1.5 * x)
    assert len(traces) == 1


def test_over_devices_splits_only_the_arrays():
    f = parallel.over_devices(lambda p, x, y: p["scale"] * x + y)
    got = f({"scale": jnp.float32(3)}, jnp.arange(4.0), jnp.ones(4))
    np.testing.assert_array_equal(got, [1, 4, 7, 10])
    assert isinstance(got, jax.Array)


# ------------------------------------------------------------------- what train_step promises


def test_on_8_devices_a_loss_sees_what_it_sees_on_one():
    """Average, frozen arrays, its own state, key and places; what is frozen stays usable."""
    out = in_process_with_devices(
        8,
        """
        import functools, sys, jax, jax.numpy as jnp, numpy as np, optax
        sys.path.insert(0, "tests")
        from test_train import DECAY, RATE, contract_loss, contract_run
        from ddim_jax import parallel, train
        from ddim_jax.objectives import Frozen

        rng = np.random.default_rng(2)
        x, w, start = (rng.normal(size=size).astype(np.float32) for size in ((8, 3), 3, 3))
        tx = optax.sgd(RATE)
        state = parallel.replicate(train.init_train_state(
            jax.random.key(7), jnp.asarray(start), tx,
            loss_state={"mean": jnp.zeros(()), "count": jnp.zeros((), jnp.int32)}))
        frozen = parallel.replicate(Frozen(objective={"w": jnp.asarray(w)}))
        step = parallel.pmap_train_step(contract_loss, tx, ema_decay=DECAY)
        before = state
        for _ in range(5):
            state, _ = step(state, parallel.shard({"x": x}), frozen)
        assert before.params.is_deleted()  # donated, and yet
        np.testing.assert_array_equal(frozen.objective["w"], np.tile(w, (8, 1)))

        params, average, mean = contract_run(5, x, w, start)
        got = parallel.unreplicate(state)
        np.testing.assert_allclose(got.params, params, rtol=1e-4)
        np.testing.assert_allclose(got.ema_params, average, rtol=1e-4)
        np.testing.assert_allclose(got.loss_state["mean"], mean, rtol=1e-4)
        assert got.loss_state["count"] == 5
        for leaf in jax.tree.leaves((state.params, state.loss_state)):
            leaf = np.asarray(leaf)  # all replicas alike, to the bit
            assert (leaf == leaf[:1]).all()
        print("same")
        """,
    )
    assert out.strip() == "same"


# ----------------------------------------------------------------------------- rows in batches


def test_index_batches_cover_every_row_in_order():
    got = [batch.tolist() for batch in parallel.index_batches(7, 3)]
    assert got == [[0, 1, 2], [3, 4, 5], [6]]
    assert [batch.tolist() for batch in parallel.index_batches(7, 3, start=5)] == [[5, 6]]
    assert [*parallel.index_batches(0, 3)] == [] == [*parallel.index_batches(3, 3, start=3)]
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        parallel.index_batches(7, 0)


@pytest.mark.parametrize("num_rows, batch_size, start", [(50, 7, 0), (50, 7, 9), (5, 16, 0)])
def test_processes_share_the_rows_and_none_is_left_out(monkeypatch, num_rows, batch_size, start):
    shares = []
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    for process in range(3):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        shares.append([*parallel.index_batches(num_rows, batch_size, start)])
    rows = np.concatenate([batch for share in shares for batch in share])
    np.testing.assert_array_equal(np.sort(rows), np.arange(start, num_rows))
    # They take turns: the third batch is the third process's.
    third = np.arange(start + 2 * batch_size, min(start + 3 * batch_size, num_rows))
    np.testing.assert_array_equal(shares[2][0] if shares[2] else [], third)


def test_any_number_of_rows_one_compilation_for_each_device_count():
    """Rows that do not divide by the devices are filled up, and the filling is cut again."""
    code = """
        import jax, jax.numpy as jnp, numpy as np
        from ddim_jax import parallel

        def check(num_rows, batch_size):
            traces = []

            def program(params, x, i):
                traces.append(x.shape)
                return {"affine": params["w"] * x + i[:, None], "row": i}

            rng = np.random.default_rng(num_rows)
            x, i = rng.normal(size=(num_rows, 2)).astype(np.float32), np.arange(num_rows)
            run, params = parallel.over_devices(program), {"w": jnp.float32(3)}
            got = parallel.map_rows(run, params, batch_size, x, i)
            assert all(isinstance(leaf, np.ndarray) for leaf in got.values())
            np.testing.assert_array_equal(got["row"], i)
            np.testing.assert_allclose(got["affine"], 3 * x + i[:, None], rtol=1e-6)
            batches = [(x[n : n + batch_size], i[n : n + batch_size])
                       for n in range(0, num_rows, batch_size)]
            parts = list(parallel.map_batches(run, params, batches))
            assert [len(part["row"]) for part in parts] == [len(rows[0]) for rows in batches]
            np.testing.assert_array_equal(np.concatenate([p["row"] for p in parts]), i)
            assert len(traces) == 1, traces  # the short last batch needs no program of its own
            assert traces[0][0] % jax.local_device_count() == 0

        for num_rows, batch_size in [(1, 4), (7, 16), (8, 8), (19, 8), (21, 5), (16, 16)]:
            check(num_rows, batch_size)
        print("cut")
    """
    for devices in (1, 8):
        assert in_process_with_devices(devices, code).strip() == "cut"


def test_a_batch_is_an_array_or_a_tuple_and_a_larger_one_may_follow():
    run = jax.jit(lambda params, x: (params + x, x.sum(-1)))
    batches = [np.ones((2, 3)), (np.full((5, 3), 2.0),), jnp.zeros((1, 3))]
    got = list(parallel.map_batches(run, 10, batches))
    assert [whole.shape for whole, _ in got] == [(2, 3), (5, 3), (1, 3)]
    np.testing.assert_array_equal(
        np.concatenate([sums for _, sums in got]), [3] * 2 + [6] * 5 + [0]
    )
    assert list(parallel.map_batches(run, 10, [])) == []


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_so_many_batches_compute_ahead_of_the_one_handed_out(ahead):
    begun = []

    def program(params, x):
        begun.append(int(x[0]))
        return x + params

    results = parallel.map_batches(program, 100, (np.full(1, i) for i in range(6)), ahead=ahead)
    assert begun == []
    for i in range(6):
        assert next(results).tolist() == [100 + i]
        assert len(begun) == min(6, i + 1 + ahead)
    assert next(results, None) is None and begun == [*range(6)]


def test_rows_are_taken_at_least_one_at_a_time():
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        parallel.map_rows(lambda params, x: x, None, 0, np.ones(3))
    with pytest.raises(ValueError, match=r"arrays must have rows, and all as many; got \[0\]"):
        parallel.map_rows(lambda params, x: x, None, 4, np.ones((0, 3)))


def test_rows_that_do_not_go_together_are_refused():
    program = parallel.over_devices(lambda params, a, b: a + b)
    for other in (np.arange(9.0), np.arange(11.0)):
        with pytest.raises(ValueError, match=r"got \[10, (9|11)\] rows"):
            parallel.map_rows(program, {}, 4, np.arange(10.0), other)
    with pytest.raises(ValueError, match="one row for each of its 3 rows"):
        list(parallel.map_batches(lambda params, a: jnp.zeros(8), {}, [np.arange(3.0)]))
