"""JSON of wrong types: a ValueError that names the file, the key, the rule and the value."""

import copy
import json

import numpy as np
import pytest

pytest.importorskip("tyro")

from common import sample_set
from common.sweep_store import find_settings, read_results
from refusals import refused
from test_sweep_report import LINE

from ddim_jax.convert import schedule_from_diffusers
from ddim_jax.convert.diffusers import _read_scheduler
from ddim_jax.convert.diffusers_unet import config_from_unet, unet_from_config
from ddim_jax.metrics.classifier import load_classifier
from ddim_jax.metrics.statistics import load_statistics
from ddim_jax.runs import ModelConfig, RunSpec, ScheduleConfig, load_spec, load_trained
from ddim_jax.unet import UNet

MODEL = ModelConfig(channels=8, norm_groups=4)


def changed(content, key, value):
    content = copy.deepcopy(content)
    *outer, last = key.split(".")
    place = content
    for name in outer:
        place = place[name]
    place[last] = value
    return content


CONFIG = RunSpec(MODEL, ScheduleConfig(), (32, 32, 3)).describe() | {"format": 2}


@pytest.mark.parametrize(
    "key, rule",
    [
        ("model", "an object"),
        ("model.channels", "a whole number"),
        ("model.channel_mults", "a list, each entry a whole number"),
        ("model.dropout", "a number"),
        ("model.dtype", "one of 'float32', 'bfloat16'"),
        ("schedule", "an object"),
        ("schedule.beta_end", "a number"),
        ("schedule.zero_terminal_snr", "true or false"),
        ("codec", "an object"),
        ("image_shape", "a list, each entry a whole number, 3 of them"),
        ("spacing", "a string"),
        ("converted_from", "an object"),
        ("data", "a string or null"),
    ],
)
def test_a_config_of_wrong_types_names_file_key_rule_and_value(tmp_path, key, rule):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    load_spec(tmp_path)
    for value in ([[8]], 8.5, True):
        if (value is True and rule.startswith("true")) or (value == 8.5 and rule == "a number"):
            continue
        (tmp_path / "config.json").write_text(json.dumps(changed(CONFIG, key, value)))
        words = rf"config\.json.*{key} must be {rule}; got .*Restore it"
        for load in (load_spec, load_trained):
            with refused(words):
                load(tmp_path)


def test_a_scheduler_of_wrong_types_is_named(tmp_path):
    right = {
        "_class_name": "DDPMScheduler", "num_train_timesteps": 100, "beta_start": 1e-4,
        "beta_end": 0.02, "beta_schedule": "linear", "trained_betas": None,
        "rescale_betas_zero_snr": False, "prediction_type": "epsilon",
    }  # fmt: skip
    path = tmp_path / "scheduler_config.json"
    for key in right.keys() - {"_class_name"}:
        for value in ({"a": 1}, "x" if key[-1] in "st" and key[:4] != "beta" else [1, "x"]):
            if isinstance(value, str) and isinstance(right[key], str):
                continue
            path.write_text(json.dumps(right | {key: value}))
            with refused(rf"scheduler_config\.json: {key} must be .*; got .*again"):
                _read_scheduler(tmp_path)
            with refused(f"{key} must be .*; got "):
                schedule_from_diffusers(right | {key: value})
    path.write_text(json.dumps(right))
    assert _read_scheduler(tmp_path) == right


@pytest.mark.parametrize(
    "key",
    ["in_channels", "block_out_channels", "down_block_types", "layers_per_block",
     "dropout", "norm_num_groups", "num_class_embeds"],
)  # fmt: skip
def test_a_network_of_wrong_types_is_named(key):
    right = config_from_unet(UNet(channels=32), 32)
    unet_from_config(right)
    for value in ("8", {"8": 8}, [[8]], True):
        with refused(f"{key} must be .*; got "):
            unet_from_config(right | {key: value})


SAMPLES = {
    "format": 1, "num_images": 1, "complete": False, "seed": 0, "num_sample_steps": 5,
    "spacing": "uniform", "sampler": "ddim", "eta": 0.0, "label": None, "guidance_scale": 1.0,
    "image_shape": [8, 8, 1], "digits": 5, "batch_size": 4, "fingerprint_id": "a1",
    "fingerprint": {"weights": {"kind": "ema", "step": 6}},
}  # fmt: skip


@pytest.mark.parametrize("key", [*SAMPLES, "fingerprint.weights"])
def test_samples_of_wrong_types_are_named(tmp_path, key):
    path = tmp_path / "samples.json"
    path.write_text(json.dumps(SAMPLES))
    found = sample_set._read(path, tmp_path)
    assert found is not None and found.summary()
    for value in ([["x"]], {"a": 1}):
        if isinstance(value, dict) and key.startswith("fingerprint") and key[-3:] != "_id":
            continue
        path.write_text(json.dumps(changed(SAMPLES, key, value)))
        with refused(rf"samples\.json .*{key} must be .*; got |must be of format 1"):
            sample_set._read(path, tmp_path)
    path.write_text(json.dumps(changed(SAMPLES, "fingerprint", {"a": 1})))
    with refused(r"fingerprint.weights lacks kind, step"):
        sample_set._read(path, tmp_path)


@pytest.mark.parametrize("key", ["S", "sampler", "eta", "guidance_scale", "values", "measures"])
def test_results_of_wrong_types_are_named(tmp_path, key):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(LINE) + "\n")
    assert read_results(tmp_path) == [LINE]
    for value in ([1], {"fid": [1]}, True):
        path.write_text(json.dumps(LINE | {key: value}) + "\n")
        with refused(r"results\.jsonl is damaged \(.*delete the bad line"):
            read_results(tmp_path)


@pytest.mark.parametrize("key", ["batch_size", "seed", "measures", "fingerprint", "spacing"])
def test_a_sweep_of_wrong_types_is_named(tmp_path, key):
    (tmp_path / "sweep.json").write_text(json.dumps({"format": 2, key: [1]}))
    with refused(rf"sweep\.json: {key} must be .*; got \[1\]\. Restore it"):
        find_settings(tmp_path, {"measures": {}}, None, None, None)


def test_statistics_and_a_classifier_of_wrong_types_are_named(tmp_path):
    from safetensors.numpy import save_file

    for metadata in ({"features": [1]}, {"features": "pixels", "num_samples": "9"},
                     {"features": "pixels", "format": "2"}):  # fmt: skip
        np.savez(tmp_path / "s.npz", mu=np.zeros(2), sigma=np.eye(2), metadata=json.dumps(metadata))
        with refused(r"s\.npz: (features|num_samples|format) must be .*; got .*Make it again"):
            load_statistics(tmp_path / "s.npz")
    path = tmp_path / "c.safetensors"
    right = {"num_classes": 10, "width": 4, "content_hash": "x", "metadata": {}}
    for header in ([], {"width": 4}, right | {"width": "4"}, right | {"metadata": []}):
        save_file({"a": np.zeros(1, np.float32)}, path, {"ddim_jax.classifier": json.dumps(header)})
        with refused(r"c\.safetensors(:| is not a classifier: its entry .*(no object|lacks cont))"):
            load_classifier(path)
