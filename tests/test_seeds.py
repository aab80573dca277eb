"""One rule for seeds, [0, 2**32), in every script and in every function that takes one."""

import dataclasses
import importlib
import inspect
import pathlib
import pkgutil
import sys

import numpy as np
import pytest

pytest.importorskip("tyro")
pytest.importorskip("sklearn")

from refusals import refused

import ddim_jax
from ddim_jax.data.digits import digits
from ddim_jax.data.stream import batches, shuffled_indices
from ddim_jax.keys import seed_key
from ddim_jax.metrics.kid import kid
from ddim_jax.runs.options import check_limits

EXPERIMENTS = pathlib.Path(__file__).resolve().parents[1] / "experiments"
LAST = 2**32 - 1
RULE = r"seed must be in \[0, 4294967296\)"
FEATURES = np.random.default_rng(0).normal(size=(4, 3))
CALLS = {  # every public function with a seed, and how it is called
    "check_seed": ddim_jax.checks.check_seed,
    "seed_key": seed_key,
    "shuffled_indices": lambda seed: shuffled_indices(5, seed, np.arange(3)),
    "batches": lambda seed: next(batches(digits(), 4, seed=seed)),
    "kid": lambda seed: kid(FEATURES, FEATURES, num_subsets=1, subset_size=2, seed=seed),
}


def modules():
    for info in pkgutil.walk_packages(ddim_jax.__path__, "ddim_jax."):
        yield importlib.import_module(info.name)
    for path in sorted(EXPERIMENTS.glob("*.py")) + sorted((EXPERIMENTS / "common").glob("*.py")):
        name = path.stem if path.parent == EXPERIMENTS else f"common.{path.stem}"
        yield importlib.import_module(name)
    for path in sorted((EXPERIMENTS / "benchmarks").glob("benchmark*.py")):
        yield importlib.import_module(path.stem)


def defined(kind):
    """(module, name, what) of all that our modules and scripts define themselves."""
    for module in modules():
        for name, value in vars(module).items():
            if kind(value) and value.__module__ == module.__name__ and name[0] != "_":
                yield module, name, value


def test_every_script_refuses_a_seed_beyond_32_bits():
    found = [
        value
        for _, _, value in defined(dataclasses.is_dataclass)
        if inspect.isclass(value)
        and value.__name__.endswith(("Config", "Options"))  # what a command line shows
        and "seed" in {f.name for f in dataclasses.fields(value)}
    ]
    names = {value.__name__ for value in found}
    assert {"TrainConfig", "SampleConfig", "ClassifierConfig", "BenchmarkConfig"} <= names
    for value in found:
        fields = {f.name: f.default for f in dataclasses.fields(value)}
        config = object.__new__(value)
        for name, default in fields.items():
            object.__setattr__(config, name, None if default is dataclasses.MISSING else default)
        for seed in (0, LAST):
            object.__setattr__(config, "seed", seed)
            check_limits(config)
        for seed in (-1, LAST + 1, 2**40):
            object.__setattr__(config, "seed", seed)
            with refused(RULE):
                check_limits(config)
        if hasattr(sys.modules[value.__module__], "main"):
            assert "check_limits(config)" in inspect.getsource(sys.modules[value.__module__].main)


def test_every_public_function_with_a_seed_refuses_one_beyond_32_bits():
    found = {
        name
        for module, name, value in defined(inspect.isfunction)
        if "seed" in inspect.signature(value).parameters and module.__name__[:8] == "ddim_jax"
    }
    assert found == CALLS.keys()
    for call in CALLS.values():
        call(LAST)
        for seed in (-1, LAST + 1, 2**40, 0.5, True):
            with refused(RULE):
                call(seed)
