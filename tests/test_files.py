import io
import json
import os
import pathlib
import resource
import signal
import stat
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from ddim_jax.files import (
    differences,
    npz_names,
    only_one_process,
    read_json,
    read_npz,
    write_whole,
    written_whole,
)

ROOT = pathlib.Path(__file__).resolve().parents[1]


def start(program: str, *arguments: object, **options) -> subprocess.Popen:
    """A process of its own, which says "ready" when it is, and ends with this test."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, **options)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


# write_whole


def test_a_file_is_written_and_replaced_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "file.json"
    for content in (b"", b"one", bytes(range(256)) * 5000):
        write_whole(path, content)
        assert path.read_bytes() == content
        assert [*tmp_path.iterdir()] == [path]
    write_whole(str(path), b"a path may be text")
    assert path.read_bytes() == b"a path may be text"


def test_others_may_read_what_was_written_as_they_may_any_file(tmp_path):
    write_whole(tmp_path / "ours", b"")
    (tmp_path / "plain").write_bytes(b"")
    modes = [(tmp_path / name).stat().st_mode for name in ("ours", "plain")]
    assert modes[0] == modes[1]


def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(handle):
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "content")
        fsync(handle)

    def noted_replace(old, new):
        done.append("name")
        assert pathlib.Path(old).read_bytes() == b"new"
        assert pathlib.Path(old).parent == pathlib.Path(new).parent
        replace(old, new)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_whole(tmp_path / "file", b"new")
    assert done == ["content", "name", "folder"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_content_alone(tmp_path, monkeypatch, broken, error):
    path = tmp_path / "file"
    write_whole(path, b"old")

    def fail(*arguments):
        raise error

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(type(error)):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]


def test_a_full_disk_leaves_the_old_content_alone(tmp_path):
    program = """
import sys
from ddim_jax.files import write_whole
print("ready", flush=True)
try:
    write_whole(sys.argv[1], bytes(10**6))
except OSError:
    sys.exit(7)
"""
    path = tmp_path / "file"
    write_whole(path, b"old")

    def no_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5))

    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    with start(program, path, preexec_fn=no_room, env=environment) as process:
        assert process.wait() == 7
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]


def test_a_kill_leaves_one_content_or_the_other(tmp_path):
    program = """
import itertools, sys
from ddim_jax.files import write_whole
for i in itertools.count():
    write_whole(sys.argv[1], bytes([i % 2]) * 10**6)
    if i == 1:
        print("ready", flush=True)
"""
    for _ in range(3):
        with start(program, tmp_path / "file") as process:
            process.send_signal(signal.SIGKILL)
        content = (tmp_path / "file").read_bytes()
        assert content in (b"\0" * 10**6, b"\1" * 10**6)


def test_two_processes_that_write_one_file_leave_a_whole_one(tmp_path):
    program = """
import sys
from ddim_jax.files import write_whole
print("ready", flush=True)
for _ in range(50):
    write_whole(sys.argv[1], sys.argv[2].encode() * int(sys.argv[3]))
"""
    path = tmp_path / "file"
    with start(program, path, "a", 10**6) as one, start(program, path, "b", 100) as other:
        assert (one.wait(), other.wait()) == (0, 0)
    assert path.read_bytes() in (b"a" * 10**6, b"b" * 100)
    assert [*tmp_path.iterdir()] == [path]


# read_json


def test_an_object_is_read(tmp_path):
    path = tmp_path / "config.json"
    content = {"model": {"channels": [1, 2]}, "name": "Zürich", "rate": 1e-4, "none": None}
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    assert read_json(path) == content == read_json(str(path))
    path.write_text("{}")
    assert read_json(path) == {}


@pytest.mark.parametrize(
    "content",
    [b"", b'{"a": 1', b"{'a': 1}", b'{"a": "\xff"}', b"\0\0\0\0", b"[" * 10**5, b'{"a": 1} {}'],
)
def test_damaged_json_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json .*damaged"):
        read_json(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"config\.json .*damaged.*\. Train anew\."):
        read_json(tmp_path / "config.json", way_out="Train anew.")


@pytest.mark.parametrize("content, kind", [("[1]", "list"), ("3", "int"), ('"a"', "str")])
def test_json_that_is_no_object_is_named(tmp_path, content, kind):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"config\.json must hold .* object.* has a {kind}"):
        read_json(tmp_path / "config.json")


def test_json_that_is_absent_is_not_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        read_json(tmp_path / "none.json")


# read_npz

ARRAYS = {
    "mu": np.arange(3.0),
    "sigma": np.arange(9, dtype=np.float32).reshape(3, 3),
    "images": np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8),
    "metadata": np.array('{"features": "pixels"}'),
    "count": np.array(12),
    "empty": np.zeros((0, 2)),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
}


def npz(save=np.savez, **arrays) -> bytes:
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(got[name], array)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_every_array_is_read_as_numpy_reads_it(tmp_path, save):
    path = tmp_path / "stats.npz"
    path.write_bytes(npz(save, **ARRAYS))
    got = read_npz(path, "statistics")
    assert_same(got, ARRAYS)
    with np.load(path) as file:
        assert_same(got, dict(file))
        assert npz_names(path, "statistics") == file.files


def test_only_the_arrays_asked_for_are_read(tmp_path):
    path = tmp_path / "set.npz"
    path.write_bytes(npz(images=ARRAYS["images"], notes=np.array([None], object)))
    assert_same(read_npz(path, "images", ["images", "x"]), {"images": ARRAYS["images"]})
    assert npz_names(path, "images") == ["images", "notes"]
    with pytest.raises(ValueError, match=r"set\.npz"):
        read_npz(path, "images")


def one_byte_more(whole: bytes) -> bytes:
    """A .npz whose array has a byte after its end, with a checksum that is right."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name) + b"\0")
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no zip at all",
        npz(mu=ARRAYS["mu"])[:-30],
        npz(mu=ARRAYS["mu"])[30:],
        one_byte_more(npz(mu=ARRAYS["mu"])),
        npz(mu=np.array([print], object)),
        npz(lambda file, mu: np.save(file, mu), mu=ARRAYS["mu"]),  # a .npy under another name
        ARRAYS["mu"].dumps(),  # a pickle
    ],
    ids=["empty", "foreign", "cut", "beheaded", "longer", "objects", "npy", "pickle"],
)
def test_what_is_no_whole_npz_of_plain_arrays_is_named(tmp_path, content):
    path = tmp_path / "stats.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"stats\.npz cannot be read as statistics.*\(.+\)"):
        read_npz(path, "statistics")
    with pytest.raises(ValueError, match=r"stats\.npz .*\. Delete it\."):
        read_npz(path, "statistics", way_out="Delete it.")


class Trap:
    """Unpickled, it would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_is_unpickled(tmp_path):
    path = tmp_path / "stats.npz"
    np.savez(path, mu=np.array([Trap(tmp_path / "trapped")], object))
    with pytest.raises(ValueError, match=r"stats\.npz"):
        read_npz(path, "statistics")
    assert [*tmp_path.iterdir()] == [path]


def damaged(whole: bytes) -> list[bytes]:
    """Every beginning, every byte turned around, and bursts of other bytes."""
    rng = np.random.default_rng(0)
    cases = [whole[:length] for length in range(0, len(whole), 7)]
    for place in range(len(whole)):
        for mask in (1, 255):
            cases.append(whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :])
    for place in rng.integers(0, len(whole), 200):
        burst = rng.bytes(rng.integers(2, 12))
        cases.append((whole[:place] + burst + whole[place + len(burst) :])[: len(whole)])
    return cases


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_anywhere_is_named_or_does_not_touch_the_numbers(tmp_path, save):
    want = {name: ARRAYS[name] for name in ("mu", "images")}
    path, refused = tmp_path / "stats.npz", 0
    for content in damaged(npz(save, **want)):
        path.write_bytes(content)
        try:
            got = read_npz(path, "statistics")
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
        else:  # damage to dates, permissions, or the directory's list
            assert_same(got, {name: want[name] for name in got})
    assert refused > 500


def test_an_npz_that_is_absent_is_not_damaged(tmp_path):
    for path in (tmp_path / "none.npz", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"{path} is not a file.*statistics"):
            read_npz(path, "statistics")


# differences


def test_equal_settings_do_not_differ():
    settings = {"seed": 1, "model": {"channels": 4, "mults": [1, 2]}}
    assert differences(settings, json.loads(json.dumps(settings))) == []
    assert differences({}, {}) == []


def test_each_difference_is_a_line_and_the_lines_are_sorted():
    there = {"seed": 1, "rate": 0.1, "name": "a", "same": [1]}
    wanted = {"same": [1], "name": "b", "rate": 0.1, "seed": 2}
    assert differences(there, wanted) == [
        "name is 'a' there and 'b' now",
        "seed is 1 there and 2 now",
    ]


def test_inside_a_mapping_the_one_setting_is_named():
    there = {"model": {"attention": {"heads": 1, "at": [16]}, "channels": 4}, "a": 0}
    wanted = {"model": {"attention": {"heads": 2, "at": [16]}, "channels": 8}, "a": 0}
    assert differences(there, wanted) == [
        "model.attention.heads is 1 there and 2 now",
        "model.channels is 4 there and 8 now",
    ]


def test_a_key_that_is_absent_is_none():
    """So files from before a setting existed agree with its None."""
    assert differences({"a": 1}, {"a": 1, "new": None}) == []
    assert differences({"a": 1, "old": None}, {"a": 1}) == []
    assert differences({"a": 1}, {"b": {"c": 2}}) == [
        "a is 1 there and None now",
        "b is None there and {'c': 2} now",
    ]
    assert differences({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}) == ["a.c is None there and 2 now"]
    assert differences({"a": {"b": 1}}, {"a": "b"}) == ["a is {'b': 1} there and 'b' now"]


def test_what_may_change_is_ignored():
    there = {"workdir": "x", "model": {"dropout": 0.1, "channels": 4}, "seed": 1}
    wanted = {"workdir": "y", "model": {"dropout": 0.2, "channels": 8}, "seed": 1}
    assert differences(there, wanted, frozenset({"workdir", "model.dropout"})) == [
        "model.channels is 4 there and 8 now"
    ]
    assert differences(there, wanted, ignore={"workdir", "model"}) == []
    assert len(differences(there, wanted, ignore={"dropout", "channels"})) == 3


# only_one_process


HOLDER = """
import sys
from ddim_jax.files import only_one_process
with only_one_process(sys.argv[1]):
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_held_by_one_process_and_let_go_by_a_killed_one(tmp_path):
    folder = tmp_path / "made" / "with its parents"
    with start(HOLDER, folder, stdin=subprocess.PIPE) as holder:
        words = "in use by another process of this command; wait for it, or give another folder"
        with pytest.raises(ValueError, match=words) as error, only_one_process(folder):
            pytest.fail("held twice")
        assert str(folder) in str(error.value)
        holder.kill()
    with only_one_process(folder):
        pass
    with only_one_process(folder):  # and let go of at the end
        pass


def test_two_folders_are_held_at_once(tmp_path):
    with only_one_process(tmp_path / "a"), only_one_process(tmp_path / "b"):
        pass


def test_an_error_inside_lets_go(tmp_path):
    with pytest.raises(KeyError), only_one_process(tmp_path):
        raise KeyError("inside")
    with only_one_process(tmp_path):
        pass


def test_what_a_kill_left_is_deleted_by_the_next_who_holds_the_folder(tmp_path):
    (tmp_path / "samples").mkdir()
    left = [tmp_path / "a.json.0123abcd.new", tmp_path / "samples" / "b.png.ffffffff.new"]
    kept = [tmp_path / "a.json", tmp_path / "mine.new", tmp_path / "samples" / "b.png"]
    for path in left + kept:
        path.touch()
    with only_one_process(tmp_path):
        pass
    assert all(path.exists() for path in kept) and not any(path.exists() for path in left)


def test_what_a_kill_left_of_a_file_is_deleted_by_the_next_who_writes_it(tmp_path):
    path = tmp_path / "s [1].npz"
    left = path.with_name("s [1].npz.0123abcd.new")
    kept = [tmp_path / "s 1.npz.0123abcd.new", tmp_path / "other.npz.0123abcd.new"]
    for file in (left, *kept):
        file.write_bytes(b"half")
    with written_whole(path) as file:  # another process, which is at it
        (live,) = {p for p in tmp_path.iterdir() if p.name.startswith(path.name)} - {left}
        write_whole(path, b"ours")
        assert live.exists() and not left.exists()
        file.write(b"theirs")
    assert path.read_bytes() == b"theirs" and all(other.exists() for other in kept)
    assert sorted(tmp_path.iterdir()) == sorted([path, *kept])
