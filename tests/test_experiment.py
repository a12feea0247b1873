"""One run of the experiment in-process: what it measures, and what it leaves on disk."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import intact
from intact.data import Dataset, load_dataset, to_input
from intact.data.several import open_several
from intact.data.sources import open_samples
from intact.engines.reference import ReferenceEngine
from intact.errors import DataError, IntactError
from intact.experiment import Experiment, batch_size, dataset_part, run_experiment, write_experiment
from intact.network import Network
from intact.recipe import PRESETS, Recipe
from intact.report import render, report_from_json
from intact.storage import load
from intact.zoo import load_lenet

FILES = [
    "float.safetensors", "predictions.npz", "program.safetensors", "report.html", "results.json",
]  # fmt: skip
CALIBRATION = 20


@pytest.fixture(scope="module")
def digits() -> Dataset:
    """The digits, but few of them."""
    whole = load_dataset("digits")
    return replace(
        whole,
        train_images=whole.train_images[:40],
        train_labels=whole.train_labels[:40],
        test_images=whole.test_images[:60],
        test_labels=whole.test_labels[:60],
    )


def run(dataset: Dataset, recipe: str | Recipe = "lab", **changes) -> Experiment:
    arguments = {
        "calibration": dataset_part(dataset, "train", CALIBRATION),
        "test": dataset_part(dataset, "test"),
        "recipe": PRESETS[recipe] if isinstance(recipe, str) else recipe,
        "title": "a title",
        "command": "a command",
        "seed": 7,
    }
    return run_experiment(load_lenet("digits", "last"), **arguments | changes)


@pytest.fixture(scope="module")
def experiment(digits) -> Experiment:
    return run(digits)


@pytest.fixture(scope="module")
def folder(experiment, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run")
    write_experiment(experiment, path)
    return path


def test_a_run_leaves_five_files(folder):
    assert sorted(path.name for path in folder.iterdir()) == FILES


def test_the_float_file_is_the_network(folder):
    state = load_lenet("digits", "last").state_dict()
    written = load_file(folder / "float.safetensors")
    assert set(written) == set(state)
    assert all(torch.equal(written[name], state[name]) for name in state)


def test_the_program_is_what_quantize_makes_of_the_first_training_images(digits, folder):
    images = torch.from_numpy(to_input(digits.train_images[:CALIBRATION]))
    expected = intact.quantize(load_lenet("digits", "last"), [images], "lab")
    written = load(folder / "program.safetensors")
    assert replace(written, info={}) == replace(expected, info={})
    assert written.info["title"] == "a title"


def test_predictions_are_those_of_the_file_and_of_the_module(digits, folder):
    x = to_input(digits.test_images)
    with np.load(folder / "predictions.npz", allow_pickle=False) as arrays:
        predictions = dict(arrays)
    assert all(a.dtype == np.int64 and a.shape == (60,) for a in predictions.values())
    with torch.inference_mode():
        expected = load_lenet("digits", "last")(torch.from_numpy(x)).argmax(1).numpy()
    assert np.array_equal(predictions["float"], expected)
    program = load(folder / "program.safetensors")
    codes = ReferenceEngine(program)(program.quantize_input(x))
    assert np.array_equal(predictions["integer"], codes.argmax(1))


def test_results_are_the_report_and_describe_the_files(digits, experiment, folder):
    report = report_from_json((folder / "results.json").read_text(encoding="utf-8"))
    assert report == experiment.report
    assert (folder / "report.html").read_text(encoding="utf-8") == render(report)
    data = (folder / "program.safetensors").read_bytes()
    assert report.program.sha256 == hashlib.sha256(data).hexdigest()
    assert report.program.bytes == len(data)
    state = load_file(folder / "float.safetensors")
    assert report.program.float_bytes == 4 * sum(t.numel() for t in state.values())
    assert (report.title, report.command, report.seed) == ("a title", "a command", 7)
    images = to_input(digits.train_images[:CALIBRATION]), to_input(digits.test_images)
    calibration, test = (hashlib.sha256(x.tobytes()).hexdigest() for x in images)
    assert report.data == {
        "name": "digits",
        "classes": [str(i) for i in range(10)],
        "test": 60,
        "calibration": CALIBRATION,
        "calibrated on": "digits",
        "sha256": {
            "calibration": calibration,
            "test": test,
            "labels": hashlib.sha256(digits.test_labels.tobytes()).hexdigest(),
        },
    }
    assert Recipe.from_toml(report.recipe_toml) == PRESETS["lab"]
    assert json.loads(json.dumps(report.recipe)) == PRESETS["lab"].to_dict()
    assert report.versions["intact"] == intact.__version__
    assert report.versions["torch"] == torch.__version__
    assert {"python", "platform", "numpy", "scipy", "safetensors"} <= set(report.versions)


def test_only_the_calibration_images_matter_to_the_program(digits, experiment):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, digits.train_images.shape, np.uint8)
    later = noise.copy()
    later[:CALIBRATION] = digits.train_images[:CALIBRATION]
    other = replace(digits, train_images=later, test_images=digits.test_images[::-1].copy())
    program = experiment.quantized.program
    assert run(other).quantized.program == program
    assert run(replace(digits, train_images=noise)).quantized.program != program


def test_a_second_run_writes_the_same_bytes_over_the_first(digits, folder, tmp_path):
    for name in FILES:
        (tmp_path / name).write_bytes(b"left by another run" * 1000)
    write_experiment(run(digits), tmp_path)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES


def test_progress_counts_the_images_of_each_step(digits):
    told: list[tuple[str, int, int]] = []
    run(digits, progress=lambda *step: told.append(step))
    assert told == [
        ("capturing", 0, 1),
        ("calibrating", CALIBRATION, CALIBRATION),
        ("lowering", 0, 1),
        ("measuring the stages", 60, 60),
        ("comparing every layer", CALIBRATION, CALIBRATION),
    ]


def test_what_is_said_of_the_data_can_be_given(digits):
    assert run(digits, data={"name": "mine"}).report.data == {"name": "mine"}


@pytest.mark.parametrize("count", [0, -1])
def test_no_images_to_calibrate_on_are_refused(digits, count):
    with pytest.raises(DataError, match=f"{count} images are none to work with"):
        dataset_part(digits, "train", count)
    assert dataset_part(digits, "train", 41).count == 40


def test_more_classes_than_the_network_tells_apart_are_refused(digits):
    with pytest.raises(DataError, match=r"10 classes apart, but digits has 12. Leave"):
        run(replace(digits, classes=tuple("abcdefghijkl")))


def test_fewer_classes_are_fine(digits):
    few = replace(
        digits,
        classes=("zero", "other"),
        train_labels=(digits.train_labels > 0).astype(np.int64),
        test_labels=(digits.test_labels > 0).astype(np.int64),
    )
    report = run(few).report
    assert report.data["classes"] == ["zero", "other"]
    assert report.stages[0].correct < 40  # most digits are neither 0 nor 1


def test_images_of_another_size_are_refused(digits):
    small = replace(digits, train_images=digits.train_images[..., :28, :28].copy())
    with pytest.raises(IntactError, match=r"LeNet fails on a batch .* shape, \[3, 28, 28\]"):
        run(small)
    small = replace(digits, test_images=digits.test_images[..., :28, :28].copy())
    with pytest.raises(DataError, match=r"\[3, 32, 32\], as calibration .* shape \[3, 28, 28\]"):
        run(small)


def test_a_recipe_for_a_layer_that_is_not_there_is_refused(digits):
    recipe = Recipe.from_toml("[layers.conv9.weights]\nbits = 4\n")
    with pytest.raises(IntactError, match=r"'conv9', but no layer matches it.*conv1, pool1, conv2"):
        run(digits, recipe)


def test_a_folder_that_is_not_there_is_refused(experiment, tmp_path):
    with pytest.raises(IntactError, match="missing does not exist"):
        write_experiment(experiment, tmp_path / "missing")


# -- several inputs -------------------------------------------------------------------------------


class Sides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, a, b):
        return torch.relu(self.left(a)) + self.right(b)


def test_samples_must_be_of_the_inputs_that_the_network_takes(digits, tmp_path):
    arrays = {"a": np.ones((3, 4), np.float32), "b": np.ones((3, 2), np.float32)}
    np.savez(tmp_path / "ab.npz", **arrays)
    np.save(tmp_path / "a.npy", arrays["a"])
    both = open_several(tmp_path / "ab.npz", {"a": (4,), "b": (2,)})
    turned = open_several(tmp_path / "ab.npz", {"b": (2,), "a": (4,)})
    alone = open_samples(tmp_path / "a.npy")
    arguments = {"recipe": PRESETS["lab"], "title": "", "command": "", "seed": 0}
    with pytest.raises(DataError, match=r"takes 2 inputs, 'a' and 'b', but .* a\.npy are of one"):
        run_experiment(Sides(), both, alone, **arguments)
    with pytest.raises(DataError, match=r"but samples of ab\.npz are of 'b' and 'a'"):
        run_experiment(Sides(), turned, both, **arguments)
    with pytest.raises(DataError, match=r"takes one input, but samples of ab\.npz are of 'a' and"):
        run_experiment(nn.Linear(4, 3), both, alone, **arguments)
    report = run_experiment(Sides(), both, both.take(2), **arguments).report
    assert (list(report.inputs), report.stages[0].total) == (["a", "b"], 2)


# -- data without labels ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unlabelled(digits, tmp_path_factory) -> Experiment:
    path = tmp_path_factory.mktemp("data") / "x.npy"
    np.save(path, to_input(digits.test_images))
    return run(digits, test=open_samples(path))


def test_without_labels_only_what_is_said_of_them_is_different(experiment, unlabelled):
    assert unlabelled.stages.labels is None
    assert unlabelled.quantized.program == experiment.quantized.program
    for name, predicted in experiment.stages.predictions.items():
        assert np.array_equal(unlabelled.stages.predictions[name], predicted)
        ours, theirs = unlabelled.stages[name], experiment.stages[name]
        assert (ours.agreement, ours.sqnr_db) == (theirs.agreement, theirs.sqnr_db)
    data = unlabelled.report.data
    assert data["sha256"].keys() == {"calibration", "test"}
    assert data["sha256"]["test"] == experiment.report.data["sha256"]["test"]


def test_a_run_without_labels_leaves_the_same_files(unlabelled, tmp_path):
    write_experiment(unlabelled, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    text = (tmp_path / "results.json").read_text(encoding="utf-8")
    assert report_from_json(text) == unlabelled.report
    assert "accuracy" not in json.loads(text)["stages"][0]


# -- batches ---------------------------------------------------------------------------------------


def test_batches_shrink_with_what_a_network_keeps_in_memory():
    def conv(side: int) -> Network:
        net = torch.nn.Conv2d(1, 63, 1)
        return intact.capture(net, torch.zeros(1, 1, side, side))

    assert batch_size(conv(8)) == 500
    assert batch_size(conv(64)) == 2**26 // (64 * 64**2)
    assert batch_size(conv(1024)) == 1
