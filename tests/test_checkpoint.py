import functools
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
import pytest

from ddim_jax.checkpoint import Checkpointer, DamagedCheckpointError


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    key: Any


@flax.struct.dataclass
class StructState:
    step: Any
    params: Any
    opt_state: Any
    key: Any


def make_state(seed: int = 0, kind: type = State, step: int = 0):
    """Every kind of leaf a run has; the values are noise, so that no bit is easy to guess."""
    key = jax.random.key(seed)
    params = {
        "Conv_0": {"kernel": jax.random.normal(key, (3, 3, 2, 4)), "bias": jnp.zeros(4)},
        "half": jax.random.normal(key, (5,), jnp.bfloat16),
        "odd": {"nan": jnp.array([jnp.nan, -0.0, jnp.inf]), "empty": {}, "none": None},
    }
    opt_state = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)).init(params)
    return kind(jnp.int32(step), params, opt_state, key)


def assert_bitwise(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert type(x) is type(y) and x.dtype == y.dtype and x.shape == y.shape
        if jax.dtypes.issubdtype(y.dtype, jax.dtypes.prng_key):
            assert jax.random.key_impl(x) == jax.random.key_impl(y)
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("kind", [State, StructState])
@pytest.mark.parametrize("abstract", [False, True])
def test_restore_is_bitwise(tmp_path, kind, abstract):
    state = make_state(3, kind)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(7, state)
    template = make_state(4, kind)
    if abstract:
        template = jax.eval_shape(functools.partial(make_state, kind=kind))
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == 7
        assert_bitwise(checkpointer.restore(template), state)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_of_both_styles(tmp_path, impl):
    tree = {
        "new": jax.random.split(jax.random.key(5, impl=impl), 3),
        "old": jax.random.PRNGKey(6),
    }
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, tree)
        assert_bitwise(checkpointer.restore(jax.eval_shape(lambda: tree)), tree)


def test_host_leaves_stay_on_the_host(tmp_path):
    tree = {"array": np.arange(3, dtype=np.int16), "number": 2.5, "count": 7, "scalar": np.int32(4)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, tree)
        restored = checkpointer.restore(tree)
    assert {key: type(leaf) for key, leaf in restored.items()} == {
        key: type(leaf) for key, leaf in tree.items()
    }
    np.testing.assert_array_equal(restored.pop("array"), tree.pop("array"))
    assert restored == tree


def test_a_device_array_comes_back_where_the_template_is(tmp_path):
    program = """
    import sys
    import jax
    import jax.numpy as jnp
    from ddim_jax.checkpoint import Checkpointer
    one, other = jax.devices()
    with Checkpointer(sys.argv[1]) as checkpointer:
        checkpointer.save(0, {"x": jax.device_put(jnp.arange(3.0), one)})
        x = checkpointer.restore({"x": jax.device_put(jnp.zeros(3), other)})["x"]
    assert x.devices() == {other} and x.tolist() == [0, 1, 2]
    """
    run(program, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    with Checkpointer(tmp_path) as checkpointer:  # a machine with another number of devices
        assert checkpointer.restore({"x": jnp.zeros(3)})["x"].tolist() == [0, 1, 2]


def run(program, *arguments, **environment):
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    return subprocess.run(command, check=True, env=environment, capture_output=True, text=True)


def test_what_is_saved_does_not_change_afterwards(tmp_path):
    """The save runs in the background while the next steps reuse the very same memory."""
    update = jax.jit(lambda x: x + 1, donate_argnums=0)
    x, host = jnp.zeros(2_000_000), np.zeros(2_000_000)
    x = update(x)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": x, "host": host})
        for _ in range(5):
            x = update(x)
            host += 1
        restored = checkpointer.restore({"x": x, "host": host})
    np.testing.assert_array_equal(restored["x"], 1)
    np.testing.assert_array_equal(restored["host"], 0)


def test_the_last_few_are_kept_and_any_of_them_restores(tmp_path):
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        assert checkpointer.latest_step() is None and checkpointer.all_steps() == []
        for step in (0, 10, 200):
            checkpointer.save(step, make_state(step))
        checkpointer.wait()
        assert checkpointer.all_steps() == [10, 200] and checkpointer.latest_step() == 200
        assert_bitwise(checkpointer.restore(make_state()), make_state(200))
        assert_bitwise(checkpointer.restore(make_state(), step=10), make_state(10))
        checkpointer.save(200, make_state(1))  # saved already: stays
        assert_bitwise(checkpointer.restore(make_state()), make_state(200))
        with pytest.raises(ValueError, match=r"after the newest checkpoint.*200; got 11"):
            checkpointer.save(11, make_state())
        with pytest.raises(ValueError, match=r"step must be one of \[10, 200\].*got 0"):
            checkpointer.restore(make_state(), step=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "200"]
    with pytest.raises(ValueError, match="keep must be at least 1; got 0"):
        Checkpointer(tmp_path, keep=0)
    with pytest.raises(ValueError, match="keep_every must be at least 1; got 0"):
        Checkpointer(tmp_path, keep_every=0)


def test_every_so_many_are_kept_for_ever(tmp_path):
    with Checkpointer(tmp_path, keep=2, keep_every=4) as checkpointer:
        for step in range(1, 12):
            checkpointer.save(step, {"x": np.float32(step)})
        checkpointer.wait()
        assert checkpointer.all_steps() == [4, 8, 10, 11]
        assert checkpointer.restore({"x": np.float32(0)}, 4) == {"x": 4}


def test_a_part_restores_without_knowing_the_rest(tmp_path):
    state = make_state(1)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, state)
        part = checkpointer.restore({"params": make_state().params}, partial=True)
        assert_bitwise(part, {"params": state.params})
        with pytest.raises(ValueError, match="opt_state/1/0/count is only in the checkpoint"):
            checkpointer.restore({"params": make_state().params})


def test_a_field_without_leaves_may_be_newer_or_older_than_the_checkpoint(tmp_path):
    """As a state that an older version saved, and a newer one, differ in."""

    class Longer(NamedTuple):
        step: Any
        params: Any
        opt_state: Any
        key: Any
        extra: Any = ()

    state = make_state(1)
    with Checkpointer(tmp_path / "short") as checkpointer:
        checkpointer.save(0, state)
        assert_bitwise(checkpointer.restore(Longer(*make_state())), Longer(*state))
        part = {"params": make_state().params, "extra": ()}
        assert_bitwise(checkpointer.restore(part, partial=True), part | {"params": state.params})
        with pytest.raises(ValueError, match="extra/mean is not in the checkpoint"):
            checkpointer.restore(Longer(*make_state(), {"mean": jnp.zeros(())}))
    with Checkpointer(tmp_path / "long") as checkpointer:
        checkpointer.save(0, Longer(*state))
        assert_bitwise(checkpointer.restore(make_state()), state)


def test_a_checkpoint_of_something_else_is_refused_with_what_differs(tmp_path):
    state = make_state()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(5, state)
        params = dict(state.params) | {"half": jnp.zeros(6, jnp.float32), "new": jnp.zeros(2)}
        del params["Conv_0"]
        with pytest.raises(ValueError) as error:
            checkpointer.restore({"params": params}, partial=True)
        with pytest.raises(ValueError, match="params/Conv_0/bias is only in the checkpoint"):
            checkpointer.restore(state._replace(params=params))
    message = str(error.value)
    assert str(tmp_path / "5") in message
    assert "params/Conv_0/bias is only in the checkpoint" in message
    assert "params/new is not in the checkpoint" in message
    assert "params/half is bfloat16[5] in the checkpoint, float32[6] is wanted" in message


def test_reading_makes_no_folder(tmp_path):
    absent = tmp_path / "absent"
    with Checkpointer(absent) as checkpointer:
        assert checkpointer.latest_step() is None
        with pytest.raises(ValueError, match=f"{absent} has no whole checkpoint"):
            checkpointer.restore(make_state())
    assert not absent.exists()


def damage_metadata(path: pathlib.Path):
    (path / "_METADATA").unlink()


def damage_index(path: pathlib.Path):
    (path / "manifest.ocdbt").write_bytes(b"")


def damage_data(path: pathlib.Path):
    for file in [*(path / "d").iterdir(), *path.glob("ocdbt.process_0/d/*")]:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_a_checkpoint_that_vanished_is_not_called_damaged(tmp_path):
    """As when a run that keeps its newest deletes the one being read."""
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": np.ones(3)})
        checkpointer.wait()
        shutil.rmtree(tmp_path / "1")
        with pytest.raises(ValueError, match=r"/1 was removed while it was read.*call again"):
            checkpointer.restore({"w": np.ones(3)}, 1)


@pytest.mark.parametrize("error", [PermissionError, MemoryError])
def test_what_is_no_damage_passes_through(tmp_path, monkeypatch, error):
    def fail(*args, **options):
        raise error("not yours")

    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": np.ones(3)})
        checkpointer.wait()
        monkeypatch.setattr(checkpointer._manager, "restore", fail)
        with pytest.raises(error, match="not yours"):
            checkpointer.restore({"w": np.ones(3)})


@pytest.mark.parametrize("damage", [damage_metadata, damage_index, damage_data])
def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path, damage):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1))
        checkpointer.save(2, make_state(2))
    (item,) = [path for path in (tmp_path / "2").iterdir() if path.is_dir()]
    damage(item)
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(DamagedCheckpointError, match=r"/2 is damaged \("):
            checkpointer.restore(make_state(), step=2)
        with pytest.warns(UserWarning, match=r"/2 is damaged .*Taken instead: step 1"):
            assert_bitwise(checkpointer.restore(make_state()), make_state(1))
        checkpointer.set_aside_after(1)
        assert checkpointer.all_steps() == [1] and (tmp_path / "2.damaged").is_dir()
        checkpointer.save(2, make_state(2))
        assert_bitwise(checkpointer.restore(make_state()), make_state(2))


def test_damage_everywhere_is_one_message_and_nothing_is_overwritten(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"w": np.ones(3)})
    for step in (1, 2):
        shutil.rmtree(tmp_path / str(step) / "default")
    before = sorted(tmp_path.rglob("*"))
    everywhere = pytest.raises(DamagedCheckpointError, match=r"all 2 checkpoints.*damaged.*/2 is")
    with Checkpointer(tmp_path) as checkpointer, everywhere:
        checkpointer.restore({"w": np.ones(3)})
    assert sorted(tmp_path.rglob("*")) == before


def test_no_flipped_bit_gives_other_numbers(tmp_path):
    """Each file of a checkpoint, bits drawn at random: the numbers saved, or a refusal."""
    state, rng = make_state(1), np.random.default_rng(0)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
    refused = 0
    for path in sorted(path for path in (tmp_path / "1").rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for place in rng.integers(8 * len(whole), size=4):
            bits = np.unpackbits(np.frombuffer(whole, np.uint8))
            bits[place] ^= 1
            path.write_bytes(np.packbits(bits).tobytes())
            with Checkpointer(tmp_path) as checkpointer:
                try:
                    assert_bitwise(checkpointer.restore(make_state(), 1), state)
                except DamagedCheckpointError:
                    refused += 1
        path.write_bytes(whole)
    assert refused >= 8  # arrays and lists of arrays; some files are not read


def test_arrays_that_are_others_than_those_saved_are_damage(tmp_path):
    """As a disk that gives back a neighbour's block: whole, readable and wrong."""
    for name, value in (("a", 1.0), ("b", 2.0)):
        with Checkpointer(tmp_path / name) as checkpointer:
            checkpointer.save(1, {"w": np.full(3, value), "v": np.zeros(2)})
    shutil.rmtree(tmp_path / "a/1/default")
    shutil.copytree(tmp_path / "b/1/default", tmp_path / "a/1/default")
    damaged = pytest.raises(DamagedCheckpointError, match="1 arrays are not what was saved, w is")
    with Checkpointer(tmp_path / "a") as checkpointer, damaged:
        checkpointer.restore({"w": np.ones(3), "v": np.ones(2)}, 1)


def test_a_checkpoint_of_before_there_were_hashes_is_read(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": np.ones(3)})
    path = tmp_path / "1" / "_CHECKPOINT_METADATA"
    written = json.loads(path.read_text())
    assert written.pop("custom_metadata")["ddim_jax"]["sha256"].keys() == {"w"}
    path.write_text(json.dumps(written | {"custom_metadata": {}}))
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore({"w": np.zeros(3)})["w"].tolist() == [1, 1, 1]


def test_a_kill_while_saving_leaves_the_checkpoint_before_it(tmp_path):
    program = """
    import sys
    import numpy as np
    from ddim_jax.checkpoint import Checkpointer
    checkpointer = Checkpointer(sys.argv[1])
    checkpointer.save(1, {"x": np.full(10, 1.0)})
    checkpointer.wait()
    x = np.random.default_rng(0).normal(size=30_000_000)
    checkpointer.save(2, {"x": x})
    checkpointer.close()
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program), str(tmp_path)])
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("2*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()

    assert [path.name for path in tmp_path.glob("2*")] != ["2"], "killed too late to show anything"
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.all_steps() == [1]
        np.testing.assert_array_equal(checkpointer.restore({"x": np.zeros(10)})["x"], 1)
        checkpointer.save(2, {"x": np.full(10, 2.0)})
        np.testing.assert_array_equal(checkpointer.restore({"x": np.zeros(10)})["x"], 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]  # what it left is gone


@pytest.mark.slow
def test_two_processes_save_once_and_resume_with_the_very_next_example(tmp_path):
    program = """
    import sys
    import jax
    import numpy as np
    from ddim_jax.checkpoint import Checkpointer
    from ddim_jax.data.load import load_images
    from ddim_jax.data.stream import batches

    workdir, port, process, num_processes, stop = sys.argv[1], *map(int, sys.argv[2:])
    if num_processes > 1:
        jax.distributed.initialize(f"localhost:{port}", num_processes, process)
    source = load_images(f"{workdir}/images", in_memory=False)
    with Checkpointer(f"{workdir}/checkpoints") as checkpointer:
        state = {"step": jax.numpy.int32(0), "key": jax.random.key(0)}
        if checkpointer.latest_step() is not None:
            state = checkpointer.restore(state)
        stream = batches(
            source, 6, seed=1, start_step=int(state["step"]),
            shard_index=process, shard_count=num_processes,
        )
        for step in range(int(state["step"]), stop):
            seen = ",".join(str(pixel) for pixel in next(stream)["image"][:, 0, 0, 0])
            with open(f"{workdir}/seen-{step}-{process}", "x") as file:
                file.write(seen)
            checkpointer.save(step + 1, state | {"step": jax.numpy.int32(step + 1)})
    """
    (tmp_path / "images").mkdir()
    for i in range(10):
        PIL.Image.new("L", (2, 2), i).save(tmp_path / "images" / f"{i}.png")

    def train(num_processes, stop):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(program)]
                + [str(arg) for arg in (tmp_path, port, process, num_processes, stop)]
            )
            for process in range(num_processes)
        ]
        assert [process.wait(timeout=120) for process in processes] == [0] * num_processes

    train(num_processes=2, stop=2)
    train(num_processes=2, stop=4)
    train(num_processes=1, stop=5)

    seen = []
    for step in range(5):
        shards = sorted(tmp_path.glob(f"seen-{step}-*"))
        assert len(shards) == (1 if step == 4 else 2)
        seen += [int(pixel) for shard in shards for pixel in shard.read_text().split(",")]
    assert len(seen) == 30  # three whole epochs of ten, each image once in each
    for epoch in range(3):
        assert sorted(seen[10 * epoch : 10 * epoch + 10]) == list(range(10))


def test_a_part_is_restored_whole_or_not_at_all(tmp_path):
    """A network without a class embedding must not open the weights of one that has it."""
    saved = {"params": {"a": np.ones(2), "label_embed": np.ones(3)}, "opt": np.zeros(1)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, saved)
        with pytest.raises(ValueError, match="params/label_embed is only in the checkpoint"):
            checkpointer.restore({"params": {"a": np.ones(2)}}, partial=True)
        got = checkpointer.restore({"params": saved["params"]}, partial=True)
    np.testing.assert_array_equal(got["params"]["label_embed"], 1)
