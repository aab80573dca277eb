"""The U-Net against the paper code's and diffusers' outputs, and what Flax users expect of it."""

import functools
import json

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden_param
from refusals import refused

from ddim_jax.convert import diffusers_to_flax, paper_to_flax
from ddim_jax.convert.diffusers_unet import unet_from_config
from ddim_jax.unet import GroupNorm, UNet, timestep_embedding

TINY = UNet(
    channels=16,
    channel_mults=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    norm_groups=4,
)
PUBLISHED = {  # compatibility.md: model, image size, tensors, parameters
    "cifar10": (UNet(dropout=0.1), 32, 328, 35_746_307),
    "celeba": (UNet(channel_mults=(1, 2, 2, 2, 4), dropout=0.1), 64, 390, 78_700_803),
    "lsun": (UNet(channel_mults=(1, 1, 2, 2, 4, 4)), 256, 450, 113_673_219),
}

# These networks are run once or twice: LLVM's optimisation would take longer than it saves.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normal(seed, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def apply(model, variables, *args, **kwargs):
    return jit(functools.partial(model.apply, **kwargs))(variables, *args)


def init(model, x, *args, **kwargs):
    """Variables of std 0.1 everywhere, so that no part of the network is invisible."""
    shapes = jax.eval_shape(functools.partial(model.init, **kwargs), jax.random.key(0), x, *args)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: jnp.asarray(0.1 * rng.standard_normal(a.shape), a.dtype), shapes)


# Parity


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_have_the_published_sizes(name):
    model, size, num_tensors, num_parameters = PUBLISHED[name]
    x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    t = jax.ShapeDtypeStruct((), jnp.int32)
    leaves = jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0), x, t))
    assert len(leaves) == num_tensors
    assert sum(leaf.size for leaf in leaves) == num_parameters
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    "name, num_tensors",
    [
        ("tiny", 144),
        ("cifar10", 328),
        ("celeba", 390),
        pytest.param("lsun", 450, marks=pytest.mark.slow),
    ],
)
def test_equals_the_paper_codes_network(golden, shared, name, num_tensors):
    arrays = golden("unet_ermongroup.npz")
    spec = json.loads(shared("golden/unet_ermongroup_params.json").read_text())[name]
    config = spec["config"]
    model = UNet(
        image_channels=config["channels"],
        channels=config["ch"],
        channel_mults=tuple(config["ch_mult"]),
        num_res_blocks=config["num_res_blocks"],
        attention_resolutions=tuple(config["attn_resolutions"]),
    )
    state_dict = {key: golden_param(key, tuple(shape)) for key, shape in spec["params"].items()}
    assert len(state_dict) == num_tensors
    params = paper_to_flax(state_dict, model, config["image_size"])

    if name == "lsun":
        rng = np.random.default_rng(int(arrays["lsun/x_seed"]))
        x, want = rng.standard_normal((1, 3, 256, 256), np.float32), arrays["lsun/y_every_16"]
    else:
        x, want = arrays[f"{name}/x"], arrays[f"{name}/y"]
    got = apply_channels_first(model, params, x, arrays[f"{name}/t"])
    got = got[:, :, ::16, ::16] if name == "lsun" else got
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * want.std())


def test_equals_diffusers_network(golden, shared):
    arrays = golden("unet_diffusers.npz")
    spec = json.loads(shared("golden/unet_diffusers_params.json").read_text())
    state_dict = {key: golden_param(key, tuple(shape)) for key, shape in spec["params"].items()}
    assert len(state_dict) == 328
    model, image_size = unet_from_config(spec["config"])
    params = diffusers_to_flax(state_dict, model, image_size)
    got = apply_channels_first(model, params, arrays["x"], arrays["t"])
    np.testing.assert_allclose(got, arrays["y"], rtol=0, atol=1e-4 * arrays["y"].std())


def apply_channels_first(model, params, x, t):
    x = jnp.asarray(x.transpose(0, 2, 3, 1))
    y = apply(model, {"params": params}, x, jnp.asarray(t, jnp.int32))
    return np.asarray(y).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("width", [32, 33])
def test_timestep_embedding_is_ho_et_als(width):
    t = np.array([0, 1, 999])
    half = width // 2
    want = np.zeros((3, width))
    for i in range(half):
        angle = t * np.exp(-i * np.log(10000.0) / (half - 1))
        want[:, i], want[:, half + i] = np.sin(angle), np.cos(angle)
    # An angle near 999 carries a float32 rounding of 3e-5.
    np.testing.assert_allclose(timestep_embedding(jnp.asarray(t), width), want, atol=1e-4)


# One image, batches, vmap


def test_one_image_batches_and_vmap_agree():
    x, t = normal(1, (3, 8, 8, 3)), jnp.array([0, 10, 999])
    variables = init(TINY, x, t)
    batch = apply(TINY, variables, x, t)
    one = jit(TINY.apply)
    one_by_one = [one(variables, x[i], t[i]) for i in range(3)]
    mapped = jit(jax.vmap(TINY.apply, in_axes=(None, 0, 0)))(variables, x, t)
    scale = batch.std()
    np.testing.assert_allclose(jnp.stack(one_by_one) / scale, batch / scale, atol=1e-5)
    np.testing.assert_allclose(mapped / scale, batch / scale, atol=1e-5)
    assert jnp.abs(batch[0] - one(variables, x[0], t[2])).max() > 0.01 * scale  # t matters


def test_a_scalar_t_serves_the_whole_batch():
    x = normal(1, (3, 8, 8, 3))
    variables = init(TINY, x, 0)
    got, want = apply(TINY, variables, x, 7), apply(TINY, variables, x, jnp.full(3, 7))
    np.testing.assert_allclose(got, want, atol=1e-5 * want.std())


def test_images_need_not_be_square():
    x = normal(1, (2, 8, 12, 3))
    assert jax.eval_shape(TINY.apply, init(TINY, x, 0), x, 0).shape == x.shape


def test_every_parameter_has_a_gradient():
    model = TINY.clone(num_classes=5)
    x, t = normal(1, (6, 8, 8, 3)), jnp.arange(6)
    variables = init(model, x, t, t)
    grad = jit(jax.grad(lambda v: (model.apply(v, x, t, t) ** 2).mean()))(variables)
    # A key's bias shifts every logit of a query alike, which the softmax ignores.
    alive = {
        jax.tree_util.keystr(path): bool(jnp.abs(g).max() > 0)
        for path, g in jax.tree.leaves_with_path(grad)
        if not jax.tree_util.keystr(path).endswith("['k']['bias']")
    }
    assert all(alive.values()), [name for name, has_gradient in alive.items() if not has_gradient]


# Precision


def test_bfloat16_compute_keeps_float32_parameters_and_output():
    x, t = normal(1, (2, 8, 8, 3)), jnp.array([3, 999])
    variables = init(TINY, x, t)
    model = TINY.clone(dtype=jnp.bfloat16)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, t)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}

    want, got = apply(TINY, variables, x, t), apply(model, variables, x, t)
    assert got.dtype == jnp.float32
    error = jnp.sqrt(jnp.mean((got - want) ** 2)) / want.std()
    assert 1e-4 < error < 0.03  # bfloat16 has 8 bits; no error at all would mean float32 was used
    half = jax.eval_shape(model.apply, variables, x.astype(jnp.bfloat16), t)
    assert half.dtype == jnp.bfloat16


def normed(x, dtype):
    """A group norm with 2 groups of 4 channels beside float64's of the same numbers."""
    x, weights = jnp.asarray(x, dtype), np.random.default_rng(1).standard_normal((2, 8))
    params = {"scale": jnp.float32(weights[0]), "bias": jnp.float32(weights[1])}
    got = GroupNorm(2, dtype).apply({"params": params}, x)
    groups = np.asarray(x, np.float64).reshape(2, 256, 2, 4)
    mean, var = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    unit = ((groups - mean) / np.sqrt(var + 1e-6)).reshape(x.shape)
    return np.asarray(got, np.float64), unit * weights[0] + weights[1]


@pytest.mark.parametrize("mean, atol", [(0, 3e-6), (10, 1e-5), (1e3, 1e-3)])
def test_group_norm_survives_a_large_mean(mean, atol):
    """In float32 E[x^2] - E[x]^2 would be wrong by 7e-5 at a mean of 10, by 0.4 at 1000."""
    x = np.random.default_rng(0).standard_normal((2, 16, 16, 8)) + mean
    np.testing.assert_allclose(*normed(x, jnp.float32), rtol=0, atol=atol)


@pytest.mark.parametrize("mean", [0, 1, 10, 100])
def test_group_norm_of_bfloat16_rounds_its_result_alone(mean):
    """At a mean of 100 the images hold half a unit; what cancels is 100 times below that."""
    x = np.random.default_rng(0).standard_normal((2, 16, 16, 8)) + mean
    np.testing.assert_allclose(*normed(x, jnp.bfloat16), rtol=2**-8, atol=2**-8)


def test_remat_is_the_same_gradient_in_less_memory():
    """With dropout too: a block that is computed again drops the same units."""
    small = UNet(channels=8, channel_mults=(1, 2), num_res_blocks=2, attention_resolutions=(8,),
                 norm_groups=4, dropout=0.3)  # fmt: skip
    x, t = jax.random.normal(jax.random.key(0), (4, 16, 16, 3)), jnp.arange(4)
    params = jax.tree.map(lambda a: a + 0.1, small.init(jax.random.key(1), x, t))

    def loss(net, params):
        rngs = {"dropout": jax.random.key(2)}
        return jnp.sum(net.apply(params, x, t, train=True, rngs=rngs) ** 2)

    def gradient(net):
        return jax.flatten_util.ravel_pytree(jit(jax.grad(functools.partial(loss, net)))(params))[0]

    def kept(net):
        """Bytes that the forward pass leaves for the gradient."""
        left = jax.eval_shape(
            lambda params: jax.vjp(functools.partial(loss, net), params)[1], params
        )
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(left))

    again = small.clone(remat=True)
    want = gradient(small)
    # Some are zero but for rounding, a bias before a norm: the scale is that of all of them.
    np.testing.assert_allclose(gradient(again), want, rtol=0, atol=1e-5 * float(abs(want).max()))
    weights = sum(a.nbytes for a in jax.tree.leaves(params))
    assert kept(again) - weights < 0.35 * (kept(small) - weights)


# Initialisation, dropout, labels


def test_init_is_ddpms():
    x = normal(1, (2, 8, 8, 3))
    params = jit(TINY.init)(jax.random.key(0), x, 0)["params"]
    kernel = params["down_1_block_0"]["conv1"]["kernel"]  # 3x3, 16 -> 32
    limit = np.sqrt(3 / (9 * (16 + 32) / 2))  # uniform of variance 1 / fan_avg
    assert 0.99 * limit < jnp.abs(kernel).max() <= limit
    np.testing.assert_allclose(kernel.std(), limit / np.sqrt(3), rtol=0.02)

    block, attn = params["mid_block_1"], params["mid_attn_1"]
    for layer in (block["conv2"], attn["proj_out"], params["conv_out"]):
        assert 0 < jnp.abs(layer["kernel"]).max() < 1e-4
    assert jnp.abs(apply(TINY, {"params": params}, x, 0)).max() < 1e-3  # nothing predicted yet


def test_dropout_of_an_example_depends_on_its_own_key():
    model = TINY.clone(dropout=0.5)
    x, t = normal(1, (3, 8, 8, 3)), jnp.array([1, 2, 3])
    variables = init(model, x, t)
    keys = jax.random.split(jax.random.key(3), 3)

    def train_pass(x, t, key):
        return model.apply(variables, x, t, train=True, rngs={"dropout": key})

    @jit
    def mapped(keys):
        return jax.vmap(train_pass)(x, t, keys)

    scale = apply(model, variables, x, t).std()
    np.testing.assert_allclose(
        mapped(keys)[1] / scale, jit(train_pass)(x[1], t[1], keys[1]) / scale, atol=1e-5
    )
    changed = jnp.abs(mapped(keys) - mapped(keys.at[1].set(keys[0]))).max(axis=(1, 2, 3)) / scale
    assert changed[0] == changed[2] == 0
    assert changed[1] > 0.05


def test_without_train_there_is_no_dropout():
    x = normal(1, (2, 8, 8, 3))
    variables = init(TINY, x, 0)
    want = apply(TINY, variables, x, 0)
    np.testing.assert_array_equal(apply(TINY.clone(dropout=0.5), variables, x, 0), want)
    # With dropout = 0.0 no key is asked for.
    np.testing.assert_array_equal(apply(TINY, variables, x, 0, train=True), want)


def test_labels_choose_the_class():
    model = TINY.clone(num_classes=2)
    x = jnp.broadcast_to(normal(1, (8, 8, 3)), (3, 8, 8, 3))
    variables = init(model, x, 0, 0)
    apply_model = jit(model.apply)
    y = apply_model(variables, x, 5, jnp.arange(3))  # 2 is "no class"
    assert all(jnp.abs(y[i] - y[j]).max() > 1e-3 for i, j in [(0, 1), (0, 2), (1, 2)])
    np.testing.assert_allclose(apply_model(variables, x[0], 5, 1), y[1], atol=1e-5 * y.std())
    outside = apply_model(variables, x, 5, jnp.array([-1, 3, 2]))
    assert jnp.isnan(outside[:2]).all() and not jnp.isnan(outside[2]).any()


# Bad input


IMAGE = np.zeros((2, 8, 8, 3), np.float32)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((np.zeros((2, 8, 8, 1), np.float32), 0), r"x must be \(B, H, W, 3\)"),
        ((np.zeros((2, 3, 8, 8), np.float32), 0), "channels last"),
        ((np.zeros((8, 8), np.float32), 0), "got shape"),
        ((np.zeros((2, 8, 8, 3), np.uint8), 0), "floating point"),
        ((np.zeros((2, 7, 8, 3), np.float32), 0), "divisible by 2"),
        ((np.zeros((2, 16, 16, 3), np.float32), 0), r"among the heights of the levels, \[16, 8\]"),
        ((IMAGE, True), "t must be an integer index"),
        ((IMAGE, np.zeros(3, np.int32)), r"t must be a scalar or have shape \(2,\)"),
        ((IMAGE[0], np.zeros(2, np.int32)), "t must be a scalar,"),
        ((IMAGE, 0, 1), "num_classes=None"),
    ],
)
def test_bad_input_is_refused_by_name(arguments, message):
    with refused(message):
        jax.eval_shape(lambda: TINY.init(jax.random.key(0), *arguments))


@pytest.mark.parametrize(
    "label, message",
    [(None, "pass 10 for 'no class'"), (0.5, "label must be an integer"), (np.zeros(3), "label")],
)
def test_bad_labels_are_refused_by_name(label, message):
    with refused(message):
        model = TINY.clone(num_classes=10)
        jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGE, 0, label))


@pytest.mark.parametrize(
    "settings, name",
    [
        ({"channels": 48}, "channels must be .* divisible by norm_groups"),
        ({"channels": 2, "norm_groups": 1}, "channels"),
        ({"channel_mults": ()}, "channel_mults"),
        ({"channel_mults": (1, 0)}, "channel_mults"),
        ({"num_res_blocks": 0}, "num_res_blocks"),
        ({"image_channels": 0}, "image_channels"),
        ({"norm_groups": 0}, "norm_groups"),
        ({"dropout": 1.0}, "dropout"),
        ({"num_classes": 0}, "num_classes"),
    ],
)
def test_settings_that_make_no_network_are_refused(settings, name):
    with refused(name):
        UNet(**settings)
