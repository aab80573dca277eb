"""The house: samplers keep one protocol, files import lower floors only, imports are light."""

import ast
import functools
import inspect
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from counting import visited
from refusals import refused

import ddim_jax as dj
from ddim_jax import solvers

PACKAGE = pathlib.Path(dj.__file__).parent
EXPERIMENTS = PACKAGE.parent / "experiments"
SCHEDULE = dj.linear_schedule()
KEY = jax.random.key(0)

# ------------------------------------------------------------------- every sampler, one protocol

SAMPLERS = {
    **{name: make() for name, make in dj.SAMPLERS.items()},
    "ddim(0.5)": dj.ddim(0.5),
    "ddim_or_sigma_hat(0.5, False)": dj.ddim_or_sigma_hat(0.5, False),
    "ddim_or_sigma_hat(0.5, True)": dj.ddim_or_sigma_hat(0.5, True),
    "ddim_or_sigma_hat(0.5, jnp.array(True))": dj.ddim_or_sigma_hat(0.5, jnp.array(True)),
}
DETERMINISTIC = ["ddim", "heun", "dpm_solver_pp_2m", "probability_flow_euler"]
every_sampler = pytest.mark.parametrize("name", SAMPLERS)


def public_functions(module):
    """(name, function) of what a module offers, whether it defines or hands it on."""
    return [
        (name, value)
        for name, value in vars(module).items()
        if inspect.isfunction(value) and not name.startswith("_")
    ]


def test_no_sampler_is_forgotten_here():
    found = {
        name
        for module in (dj, solvers)
        for name, function in public_functions(module)
        if inspect.signature(function).return_annotation in (dj.Sampler, "Sampler")
    }
    tested = {name.partition("(")[0] for name in SAMPLERS} - {"ddpm_fixed_large"}  # an argument
    assert found == tested | {"named_sampler"}


def test_the_table_of_samplers():
    names = ["ddim", "sigma_hat", "ddpm", "ddpm_fixed_large"]
    names += ["heun", "dpm_solver_pp_2m", "probability_flow_euler"]
    assert list(dj.SAMPLERS) == names
    for name in names:
        run = functools.partial(dj.sample, KEY, lambda x, t: jnp.tanh(x), SCHEDULE)
        x_T = jax.random.normal(KEY, (3,))
        got = run(x_T, [900, 500, 100], dj.named_sampler(name))
        np.testing.assert_array_equal(got, run(x_T, [900, 500, 100], dj.SAMPLERS[name]()))
    half = run(x_T, [900, 500, 100], dj.named_sampler("ddim", 0.5))
    np.testing.assert_array_equal(half, run(x_T, [900, 500, 100], dj.ddim(0.5)))


def test_names_and_etas_that_are_none_are_refused():
    with refused(rf"sampler must be one of {', '.join(dj.SAMPLERS)}; got 'euler'"):
        dj.named_sampler("euler")
    with refused("eta must be left out for the sampler heun, which has none; got 0.5"):
        dj.named_sampler("heun", 0.5)
    with refused("eta must be at least 0"):
        dj.named_sampler("ddim", -0.5)


def test_a_sampler_of_ones_own_is_an_entry_of_the_table(monkeypatch):
    monkeypatch.setitem(dj.SAMPLERS, "mine", lambda: dj.ddim(0.25))
    assert isinstance(dj.named_sampler("mine"), dj.Sampler)
    assert dj.named_sampler("mine").network_calls(5) == 5  # the default: one call a step
    with refused("eta must be left out for the sampler mine"):
        dj.named_sampler("mine", 0.5)
    with refused("got 'yours'"):
        dj.named_sampler("yours")


def test_a_sampler_of_ones_own_may_have_an_eta(monkeypatch):
    """Twice its eta of ddim's is ddim of that."""
    monkeypatch.setitem(dj.SAMPLERS, "twice", lambda eta=0.1: dj.ddim(2 * eta))
    schedule, x_T, key = dj.linear_schedule(), jnp.ones((2, 3)), jax.random.key(0)

    def draw(sampler):
        return dj.sample(key, lambda x, t: x / 2, schedule, x_T, [900, 100], sampler)

    assert (draw(dj.named_sampler("twice", 0.25)) == draw(dj.ddim(0.5))).all()
    assert (draw(dj.named_sampler("twice")) == draw(dj.ddim(0.0))).all()


@every_sampler
def test_a_sampler_is_two_functions_with_the_agreed_arguments(name):
    sampler = SAMPLERS[name]
    assert isinstance(sampler, dj.Sampler)
    assert sampler._fields == ("init", "step", "network_calls")
    assert list(inspect.signature(sampler.init).parameters) == ["x_T"]
    step = ["key", "state", "eps_fn", "schedule", "t", "t_prev"]
    assert list(inspect.signature(sampler.step).parameters) == step


@every_sampler
@pytest.mark.parametrize("S", [1, 7])
def test_a_sampler_says_how_often_it_asks_the_network(name, S):
    sampler, x_T = SAMPLERS[name], jnp.ones(2)
    timesteps = dj.ddim_timesteps(1000, S)
    run = lambda f: dj.sample(KEY, f, SCHEDULE, x_T, timesteps, sampler)  # noqa: E731
    asked_at = visited(run, lambda x, t: 0.5 * x)
    assert len(asked_at) == sampler.network_calls(S)
    assert set(asked_at) == set(timesteps.tolist())


@every_sampler
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_a_step_keeps_the_states_structure_shapes_and_dtypes(name, shape, dtype):
    sampler = SAMPLERS[name]

    def init_and_step(x_T, t, t_prev):
        state = sampler.init(x_T)
        return state, sampler.step(KEY, state, lambda x, t: 0.5 * x, SCHEDULE, t, t_prev)

    x_T, t = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((), jnp.int32)
    before, after = jax.eval_shape(init_and_step, x_T, t, t)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert jax.tree.leaves(before) == jax.tree.leaves(after)
    for field in (after.x, after.x0):
        assert field.shape == shape and field.dtype == dtype


IMAGE = jnp.linspace(-0.9, 0.9, 6).reshape(2, 3)


def knows_the_image(x, t):
    return dj.x0_to_epsilon(jnp.broadcast_to(IMAGE, x.shape), x, SCHEDULE.alpha_bar(t))


@every_sampler
def test_a_sampler_goes_from_noise_to_data(name):
    timesteps = dj.ddim_timesteps(1000, 50, "linspace")
    x_T = jax.random.normal(KEY, IMAGE.shape)
    run = functools.partial(dj.sample_trajectory, KEY, knows_the_image, SCHEDULE)
    states, x0s = jax.jit(lambda x: run(x, timesteps, SAMPLERS[name]))(x_T)
    np.testing.assert_array_equal(states[0], x_T)
    assert states.shape == (51, 2, 3) and x0s.shape == (50, 2, 3)
    # Euler's method in t is no exact solution for one image; every other sampler here is.
    atol = 0.15 if name == "probability_flow_euler" else 1e-4
    np.testing.assert_allclose(states[-1], IMAGE, atol=atol)
    np.testing.assert_allclose(x0s[1:], np.broadcast_to(IMAGE, x0s[1:].shape), atol=1e-3)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_deterministic_sampler_needs_no_key_and_maps_over_images(name):
    x_T = jax.random.normal(KEY, (3, 2, 3))

    def run(x_T):
        network = lambda x, t: jnp.tanh(x)  # noqa: E731
        return dj.sample(None, network, SCHEDULE, x_T, [900, 500, 100], SAMPLERS[name])

    batch = jax.jit(run)(x_T)
    np.testing.assert_allclose(jax.jit(jax.vmap(run))(x_T), batch, atol=1e-5)
    gradient = jax.jit(jax.grad(lambda x: run(x).sum()))(x_T)
    assert np.isfinite(gradient).all() and np.any(gradient != 0)


# ------------------------------------------------------------------------------ the public names

SIGNATURES = {
    "ddim_timesteps": "num_steps, num_sample_steps, spacing='uniform'",
    "linear_schedule": "num_steps=1000, beta_start=0.0001, beta_end=0.02",
    "schedule_from_betas": "betas",
    "epsilon_to_x0": "eps, x_t, alpha_bar",
    "x0_to_epsilon": "x0, x_t, alpha_bar",
    "v_to_x0": "v, x_t, alpha_bar",
    "epsilon_to_score": "eps, x_t, alpha_bar",
    "add_noise": "schedule, x0, eps, t",
    "ddim_sigma": "alpha_bar, alpha_bar_prev, eta=1.0",
    "ddim_step": "x_t, eps, alpha_bar, alpha_bar_prev, *, eta=0.0, noise=None",
    "ddim": "eta=0.0",
    "sigma_hat": "",
    "ddim_or_sigma_hat": "eta, is_sigma_hat",
    "named_sampler": "name, eta=0.0",
    "ddpm": "variance='fixed_small'",
    "encode": "eps_fn, schedule, x_0, timesteps",
    "guided": "cond_fn, uncond_fn, scale",
    "from_v": "v_fn, schedule",
    "from_x0": "x0_fn, schedule",
    "clip_x0": "eps_fn, schedule, low=-1.0, high=1.0",
    "clip_x0_keep_eps": "eps_fn, schedule, low=-1.0, high=1.0",
    "zero_terminal_snr": "schedule",
    "velocity": "x0, eps, alpha_bar",
    "eps_loss": "key, eps_fn, schedule, x0, *, t=None, norm='l2'",
    "prediction_loss": (
        "key, network_fn, schedule, x0, *, predicts='eps', t=None, norm='l2', weight=None"
    ),
    "min_snr": "predicts='eps', gamma=5.0",
    "antithetic_timesteps": "key, indices, batch_size, schedule",
    "Prediction": "x0, eps",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_promised_signatures(name):
    signature = inspect.signature(getattr(dj, name))
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == f"({SIGNATURES[name]})"


def test_sample_and_its_trajectory_take_the_same_arguments():
    arguments = ["key", "eps_fn", "schedule", "x_T", "timesteps", "sampler"]
    for run in (dj.sample, dj.sample_trajectory):
        assert list(inspect.signature(run).parameters) == arguments


def test_public_functions_say_what_they_are_and_hide_no_arguments():
    for name, function in public_functions(dj):
        assert function.__doc__, name
        kinds = {p.kind for p in inspect.signature(function).parameters.values()}
        assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}, name


def test_the_package_hands_names_on_as_themselves():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    *imports, names = tree.body[1:]
    assert all(isinstance(node, ast.ImportFrom) for node in imports)
    imported = [alias for node in imports for alias in node.names]
    assert all(alias.asname is None for alias in imported)
    # help() and `import *` show these, and no modules.
    assert isinstance(names, ast.Assign) and sorted(dj.__all__) == sorted(a.name for a in imported)


# ----------------------------------------------------------------------------------- the floors

FLOORS = {
    "types": 0,
    "convolution": 0,
    "checks": 0,
    "numerics": 1,
    "files": 1,
    "paths": 0,
    "tables": 0,
    "hashing": 1,
    "schedule": 1,
    "keys": 1,
    "unet": 1,
    "checkpoint": 1,
    "data.pixels": 1,
    "data": 2,
    "codec": 2,
    "predict": 2,
    "process": 2,
    "latents": 2,
    "convert": 2,
    "steps": 3,
    "denoisers": 3,
    "ode": 3,
    "metrics": 3,
    "samplers": 4,
    "inversion": 4,
    "bound": 4,
    "losses": 4,
    "solvers": 5,
    "objectives": 5,
    "train": 6,
    "parallel": 7,
    "runs": 8,
}
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def imported_modules(path):
    """Full names of what a file imports anywhere, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module
            if node.module == "ddim_jax":
                yield from (f"ddim_jax.{alias.name}" for alias in node.names)


def floor(parts):
    """The floor of a module, given as the parts of its name; files of a folder share theirs."""
    return FLOORS.get(".".join(parts[:2])) or FLOORS[parts[0]]


@pytest.mark.parametrize("file", [f for f in FILES if f != pathlib.Path("__init__.py")], ids=str)
def test_a_file_imports_lower_floors_only(file):
    own = file.with_suffix("").parts
    assert own[0] in FLOORS, f"give {file} a floor in tests/test_api.py"
    for module in imported_modules(PACKAGE / file):
        package, _, rest = module.partition(".")
        if package != "ddim_jax" or not rest:
            continue
        other = rest.split(".")
        if other[0] != own[0]:  # files of one folder may use each other
            assert floor(other) < floor(own), f"{file} imports {module}"


def test_no_circle_among_the_files_of_a_folder():
    """Imports at the top of files, followed from each file, never come back to it."""
    uses = {
        file.with_suffix("").parts: {
            tuple(module.split(".")[1:])
            for node in ast.parse((PACKAGE / file).read_text()).body
            if isinstance(node, ast.ImportFrom) and (module := node.module or "")[:8] == "ddim_jax"
        }
        for file in FILES
        if file.name != "__init__.py"
    }

    def reached(start, seen):
        for other in uses.get(start, set()) - seen:
            seen.add(other)
            reached(other, seen)
        return seen

    for file in uses:
        assert file not in reached(file, set()), file


def test_nothing_in_the_library_imports_a_script():
    scripts = {path.stem for path in EXPERIMENTS.glob("*.py")} | {"experiments", "tyro", "tqdm"}
    for file in FILES:
        used = {module.partition(".")[0] for module in imported_modules(PACKAGE / file)}
        assert not used & scripts, file


def test_pmap_lives_in_one_file():
    for file in FILES:
        tree = ast.parse((PACKAGE / file).read_text())
        names = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        if file != pathlib.Path("parallel.py"):
            assert not names & {"jax.pmap", "jax.distributed", "jax.shard_map"}, file


def test_the_reference_imports_nothing_of_ours():
    path = pathlib.Path(__file__).with_name("reference.py")
    packages = {module.partition(".")[0] for module in imported_modules(path)}
    assert packages <= {"__future__", "math", "numpy"}


# ------------------------------------------------------------------------------- a light import


IMPORT = """
import json, sys
import jax
import ddim_jax
from jax._src import xla_bridge
print(json.dumps([list(sys.modules), len(xla_bridge._backends)]))
"""


@pytest.fixture(scope="module")
def imported():
    """What a fresh interpreter says of the import: modules loaded, backends started."""
    command = [sys.executable, "-c", IMPORT]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    return json.loads(run.stdout)


def test_the_import_loads_no_heavy_package(imported):
    heavy = set(
        [
            "flax",
            "orbax",
            "tensorflow",
            "matplotlib",
            "torch",
            "optax",
            "sklearn",
            "tyro",
            "tqdm",
            "PIL",
        ]
    )
    assert not heavy & set(imported[0])


def test_the_import_starts_no_backend(imported):
    """Else it would take the accelerator, or spoil a later jax.distributed.initialize."""
    assert imported[1] == 0
