import functools
import hashlib
import http.server
import json
import threading

import jax
import numpy as np
import pytest
from conftest import golden_param
from refusals import refused

from ddim_jax.metrics import inception as inception_module
from ddim_jax.metrics.inception import (
    WEIGHTS_FILE,
    cache_dir,
    fetch_weights,
    inception,
    inception_features,
    inception_input,
    inception_outputs,
    load_inception,
    params_from_state_dict,
)

DEPTHS = ["pool64", "pool192", "pool768", "pool2048"]


@pytest.fixture(scope="module")
def state_dict(shared):
    shapes = json.loads(shared("golden/inception_fid_params.json").read_text())
    return {name: golden_param(name, tuple(shape)) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def params(state_dict):
    return params_from_state_dict(state_dict)


@pytest.mark.parametrize("case", ["cifar", "sixtyfour"])
def test_golden_features_at_four_depths(params, golden, state_dict, case):
    arrays = golden("inception_fid.npz")
    got, outputs = jax.jit(lambda *args: (inception(*args), inception_outputs(*args)))(
        params, arrays[f"{case}/images"]
    )
    for depth in DEPTHS:
        want = arrays[f"{case}/{depth}"]
        np.testing.assert_allclose(getattr(got, depth), want, rtol=1e-4, atol=1e-4 * want.std())
    # The stored features end before the last layer, a plain affine map.
    logits = arrays[f"{case}/pool2048"] @ state_dict["fc.weight"].T + state_dict["fc.bias"]
    np.testing.assert_allclose(got.logits, logits, atol=1e-4 * logits.std())
    np.testing.assert_array_equal(outputs["pool"], got.pool2048)
    without_bias = logits - state_dict["fc.bias"]  # as published scores were made
    np.testing.assert_allclose(outputs["logits"], without_bias, atol=1e-4 * logits.std())


@pytest.mark.parametrize("size", [(32, 32), (500, 333), (299, 299), (1, 2)])
def test_resize_is_bilinear_between_pixel_centres_whatever_the_size(size):
    images = np.random.default_rng(0).integers(0, 256, (1, *size, 3), dtype=np.uint8)
    want = images[0] / 127.5 - 1
    for axis, length in enumerate(size):
        position = np.clip((np.arange(299) + 0.5) * length / 299 - 0.5, 0, length - 1)
        low = np.floor(position).astype(int)
        high = np.minimum(low + 1, length - 1)
        share = np.expand_dims(position - low, (1, 2) if axis == 0 else (0, 2))
        want = want.take(low, axis) * (1 - share) + want.take(high, axis) * share
    # Positions are float32, as in torch, so far pixels are blended to 1e-4 only.
    np.testing.assert_allclose(inception_input(images)[0], want, atol=2e-4)


def test_inputs_that_are_no_images_are_refused(params):
    with refused(r"images must have shape \(B, H, W, 1 or 3\); got \(1, 8, 8, 4\)"):
        inception(params, np.zeros((1, 8, 8, 4), np.uint8))
    with refused("images must have shape"):
        inception(params, np.zeros((8, 8, 3), np.uint8))
    with refused("images must be uint8.*got float32.*Round them first"):
        inception(params, np.zeros((1, 8, 8, 3), np.float32))


def test_grey_is_rgb_with_equal_channels(params):
    grey = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 1), dtype=np.uint8)
    first = jax.jit(lambda images: inception(params, images).pool64)  # compiles no further
    np.testing.assert_array_equal(first(grey), first(np.repeat(grey, 3, axis=-1)))


def test_features_are_the_last_pool(params):
    images = jax.ShapeDtypeStruct((7, 32, 32, 3), np.uint8)
    features = jax.eval_shape(inception_features, params, images)
    assert features.shape == (7, 2048) and features.dtype == np.float32


def test_a_published_form_pth_loads_through_the_real_loader(params, state_dict, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(array) for name, array in state_dict.items()}
    tensors["Conv2d_1a_3x3.bn.num_batches_tracked"] = torch.tensor(0)  # newer torch writes these
    torch.save(tensors, tmp_path / "renamed.pth")
    assert_same(load_inception(tmp_path / "renamed.pth"), params)


def test_a_safetensors_copy_loads_without_torch(params, state_dict, tmp_path):
    numpy_io = pytest.importorskip("safetensors.numpy")
    numpy_io.save_file(state_dict, tmp_path / "copy.safetensors")
    assert_same(load_inception(tmp_path / "copy.safetensors"), params)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert all(map(np.array_equal, jax.tree.leaves(got), jax.tree.leaves(want)))


def test_folding_batch_norm_keeps_the_layer(state_dict, params):
    name = "Mixed_6a.branch3x3dbl_1"
    kernel, bias = (np.asarray(params["Mixed_6a"]["branch3x3dbl_1"][k]) for k in ("kernel", "bias"))
    x = np.random.default_rng(0).normal(size=(5, kernel.shape[2]))
    conv = x @ np.float64(state_dict[f"{name}.conv.weight"][:, :, 0, 0]).T
    mean, var = (state_dict[f"{name}.bn.running_{k}"] for k in ("mean", "var"))
    norm = (conv - mean) / np.sqrt(var + 1e-3)
    want = norm * state_dict[f"{name}.bn.weight"] + state_dict[f"{name}.bn.bias"]
    np.testing.assert_allclose(x @ kernel[0, 0] + bias, want, atol=1e-5)


def test_weights_of_another_network_are_listed(state_dict):
    broken = dict(state_dict, extra=np.zeros(1), **{"fc.bias": np.zeros(1000)})
    del broken["Mixed_7c.branch1x1.bn.weight"]
    with pytest.raises(ValueError) as error:
        params_from_state_dict(broken)
    message = str(error.value)
    assert "Mixed_7c.branch1x1.bn.weight is missing" in message
    assert "extra is left over" in message
    assert "fc.bias has shape (1000,) instead of (1008,)" in message


def test_missing_file_says_which_where_and_how(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load_inception(tmp_path / "absent.pth")
    for part in (WEIGHTS_FILE, "6726825d", str(cache_dir()), "--feature-weights"):
        assert part in str(error.value)


def test_published_name_with_other_bytes_is_refused(tmp_path):
    (tmp_path / WEIGHTS_FILE).write_bytes(b"half a download")
    with pytest.raises(ValueError, match="must have sha256 6726825d"):
        load_inception(tmp_path / WEIGHTS_FILE)


def test_damaged_files_are_refused_by_name(tmp_path):
    (tmp_path / "copy.safetensors").write_bytes(b"not tensors at all")
    with pytest.raises(ValueError, match=r"copy\.safetensors is damaged"):
        load_inception(tmp_path / "copy.safetensors")
    pytest.importorskip("torch")
    (tmp_path / "copy.pth").write_bytes(b"not tensors at all")
    with pytest.raises(ValueError, match=r"copy\.pth was refused"):
        load_inception(tmp_path / "copy.pth")


CONTENT = b"weights" * 100_000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def served(tmp_path):
    """URL of a folder on a local web server, and the paths it was asked for."""
    folder, asked = tmp_path / "served", []
    folder.mkdir()
    (folder / "file.pth").write_bytes(CONTENT)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            asked.append(self.path)

    handler = functools.partial(Handler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_fetched_once_and_kept(served, tmp_path, monkeypatch):
    url, asked = served
    monkeypatch.setenv("DDIM_JAX_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        path = fetch_weights(url=f"{url}/file.pth", sha256=SHA256)
        assert path == tmp_path / "cache" / WEIGHTS_FILE and path.read_bytes() == CONTENT
    assert asked == ["/file.pth"]
    assert [p.name for p in path.parent.iterdir()] == [WEIGHTS_FILE]


def test_a_download_of_the_wrong_hash_leaves_nothing(served, tmp_path):
    with pytest.raises(ValueError, match="Is the download complete"):
        fetch_weights(tmp_path / "cache", f"{served[0]}/file.pth", sha256="0" * 64)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("url", ["{server}/absent.pth", "file:///absent.pth"])
def test_a_failed_download_says_what_to_do(served, tmp_path, url):
    with pytest.raises(FileNotFoundError, match=f"Could not fetch.*{WEIGHTS_FILE}.*6726825d"):
        fetch_weights(tmp_path / "cache", url.format(server=served[0]))
    assert not list((tmp_path / "cache").iterdir())


def test_no_path_means_the_fetched_file(tmp_path, monkeypatch):
    monkeypatch.setattr(inception_module, "fetch_weights", lambda: tmp_path / "fetched.pth")
    with pytest.raises(FileNotFoundError, match=r"fetched\.pth"):
        load_inception()


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("DDIM_JAX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "ddim_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "ddim_jax"


@pytest.mark.parametrize("name, value", [("fc.bias", np.nan), ("Mixed_7c.branch1x1.bn.var", -1)])
def test_weights_that_are_not_finite_are_named(state_dict, name, value):
    name = name.replace("bn.var", "bn.running_var")
    broken = dict(state_dict, **{name: np.full_like(state_dict[name], value)})
    with pytest.raises(ValueError, match=f"weights must be finite; .*{name.split('.bn')[0][:2]}"):
        params_from_state_dict(broken)
