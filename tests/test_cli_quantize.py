"""`intact quantize`, `check` and `zoo`: a user's own network from the command line to files."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.export import Dim, export, save

import intact
from cli_harness import FILES, STAGES, Ran, intact_
from intact.cli.check import clamp_words
from intact.data import load_dataset, to_input
from intact.data.carried import KEY
from intact.data.preprocessing import Preprocessing
from intact.engines.reference import ReferenceEngine
from intact.zoo import NETWORKS, LeNet

NET = """\
from torch import nn

def make():
    return nn.Sequential(
        nn.MaxPool2d(4), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU6(), nn.Flatten(), nn.Linear(256, 10)
    )

class Soft(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x):
        return self.norm(self.conv(x))
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Iterator[Path]:
    """A folder with a network, its weights, and data of several kinds; the working folder."""
    folder = tmp_path_factory.mktemp("own")
    before = Path.cwd()
    os.chdir(folder)
    (folder / "own_net.py").write_text(NET)
    torch.manual_seed(1)
    names: dict[str, object] = {}
    exec(NET, names)  # noqa: S102
    net = names["make"]().eval()
    save_file(net.state_dict(), "w.safetensors")
    torch.save({"state_dict": net.state_dict()}, "w.pt")
    save(export(net, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=({0: Dim("n")},)), "net.pt2")
    digits = load_dataset("digits")
    np.save("x.npy", to_input(digits.test_images[:50]))
    np.save("last.npy", to_input(digits.test_images[:9]).transpose(0, 2, 3, 1))
    np.savez("xy.npz", x=to_input(digits.test_images[:50]), y=digits.test_labels[:50])
    for i, pixels in enumerate(digits.train_images[:6]):
        path = folder / "photos" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.transpose(1, 2, 0)).resize((48, 40)).save(path)
    yield folder
    os.chdir(before)
    sys.modules.pop("own_net", None)


def quantize(*arguments: object) -> Ran:
    return intact_("quantize", "--model", "own_net.py:make", "--weights", "w.pt", *arguments)


@pytest.fixture(scope="module")
def labelled(here) -> tuple[Path, Ran]:
    ran = quantize("--data", "digits", "--samples", 60, "--calibration", 40, "-o", "labelled")
    return here / "labelled", ran


@pytest.fixture(scope="module")
def unlabelled(here) -> tuple[Path, Ran]:
    return here / "unlabelled", quantize("--data", "x.npy", "--calibration", 40, "-o", "unlabelled")


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


# -- quantize ------------------------------------------------------------------------------------


def test_quantize_leaves_what_lenet_leaves(labelled):
    folder, ran = labelled
    assert (ran.code, ran.err) == (0, "")
    assert sorted(path.name for path in folder.iterdir()) == FILES
    lines = ran.out.splitlines()
    assert lines[0] == "own_net.py:make on digits, test images, recipe default"
    assert [line.split()[0] for line in lines[2:8]] == ["stage", *STAGES]
    assert max(map(len, lines)) <= 80
    assert "note:" not in ran.out
    report = results(folder)
    assert report["stages"][-1]["total"] == 60
    assert report["data"]["calibration"] == 40
    weights, ours = load_file("w.safetensors"), load_file(folder / "float.safetensors")
    assert all(torch.equal(ours[name], weights[name]) for name in weights)


def test_calibration_is_spread_over_the_training_part(labelled):
    folder, _ = labelled
    images = load_dataset("digits").train_images
    chosen = images[np.linspace(0, len(images) - 1, 40).round().astype(int)]
    net = nn.Sequential(
        nn.MaxPool2d(4), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU6(), nn.Flatten(), nn.Linear(256, 10)
    )
    net.load_state_dict(load_file("w.safetensors"))
    expected = intact.quantize(net, [torch.from_numpy(to_input(chosen))])
    written = intact.load(folder / "program.safetensors")
    assert written.parameters.keys() == expected.parameters.keys()
    for name, values in expected.parameters.items():
        assert np.array_equal(written.parameters[name], values), name


def test_the_stated_command_makes_the_same_bytes(labelled, tmp_path):
    folder, _ = labelled
    words = results(folder)["command"].split()[1:]
    words[words.index("-o") + 1] = str(tmp_path / "again")
    ran = intact_(*words, "--json")
    assert json.loads(ran.out) | {"command": ""} == results(folder) | {"command": ""}
    for name in ("float.safetensors", "predictions.npz", "program.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_without_labels_stages_are_compared_with_float(unlabelled):
    folder, ran = unlabelled
    assert (ran.code, ran.err) == (0, "")
    assert sorted(path.name for path in folder.iterdir()) == FILES
    lines = ran.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[2].split() == [
        "stage", "as", "in", "float", "95", "%", "interval", "other", "SQNR",
    ]  # fmt: skip
    assert "of float" not in ran.out
    assert "accuracy" not in ran.out
    assert "note: ranges were chosen from samples that the stages were measured on" in ran.out
    program = intact.load(folder / "program.safetensors")
    codes = ReferenceEngine(program)(program.quantize_input(np.load("x.npy")))
    with np.load(folder / "predictions.npz") as predictions:
        assert np.array_equal(predictions["integer"], codes.argmax(1))
        same = int((predictions["integer"] == predictions["float"]).sum())
    last = results(folder)["stages"][-1]
    assert (last["same"], last["total"]) == (same, 50)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "SQNR of the outputs" in page
    assert "<dt>Accuracy</dt>" not in page


def test_report_draws_a_run_without_labels_again(unlabelled):
    folder, ran = unlabelled
    page = (folder / "report.html").read_bytes()
    again = intact_("report", folder)
    assert (again.code, again.err) == (0, "")
    assert again.out.splitlines()[:8] == ran.out.splitlines()[:8]
    assert (folder / "report.html").read_bytes() == page


def test_labels_of_a_file_make_accuracies_and_other_data_calibrates(here):
    ran = quantize(
        "--data", "xy.npz", "--calibration-data", "digits", "--calibration", 9, "-o", "c"
    )
    assert ran.code == 0, ran.err
    assert "note: ranges" not in ran.out
    report = results(here / "c")
    assert report["data"]["calibrated on"] == "digits, train images"
    predicted = np.load("c/predictions.npz")["integer"]
    right = int((predicted == np.load("xy.npz")["y"]).sum())
    assert (report["stages"][-1]["correct"], report["stages"][-1]["total"]) == (right, 50)


def test_with_pixels_the_program_takes_them_as_they_are(here):
    ran = quantize("--data", "digits", "--samples", 60, "--calibration", 40, "--pixels", "-o", "p")
    assert ran.code == 0, ran.err
    program = intact.load("p/program.safetensors")
    assert program.takes_pixels
    images = load_dataset("digits").test_images
    assert program.codes(images).shape == (len(images), 10)
    evaluated = intact_("evaluate", "p/program.safetensors", "--data", "digits", "--json")
    right = program.codes(images).argmax(1) == load_dataset("digits").test_labels
    assert json.loads(evaluated.out)["correct"] == int(right.sum())
    shown = intact_("run", "p/program.safetensors", "photos", "--json")
    assert json.loads(shown.out)[0]["input"] == "class0/0.png"
    wrong = intact_("run", "p/program.safetensors", "photos", "--mean", "0.5")
    assert "takes pixels as they are, with their normalisation inside: leave --mean" in wrong.err
    resized = intact_("run", "p/program.safetensors", "photos", "--resize", 36, "--json")
    assert "note: with --resize images are shorter side resized to 36" in resized.err
    as_made = Preprocessing(resize=36, mean=(0,), std=(1,), normalise=False)
    pixels = [
        as_made.pixels(Image.open(path), (3, 32, 32))
        for path in sorted(Path("photos").rglob("*.png"))
    ]
    assert [p["output"] for p in json.loads(resized.out)] == program.run(np.stack(pixels)).tolist()


def test_pixels_need_to_be_pixels_and_a_normalisation(here):
    ran = quantize("--data", "photos", "--pixels", "--input-shape", "3,32,32", "-o", "none")
    assert "how the network wants pixels normalised is not known" in ran.err
    ran = quantize("--data", "x.npy", "--pixels", "--preset", "signed", "-o", "none")
    assert "x.npy holds values that are no pixels, whole numbers from 0 to 255" in ran.err
    assert not (here / "none").exists()


def test_data_that_was_normalised_otherwise_is_noticed(here):
    np.save("unit.npy", (np.load("x.npy") + 1) / 2)
    common = ("--calibration-data", "x.npy", "--calibration", 40, "-o", "other")
    assert "warning: unit.npy reaches from 0 to 1" in quantize("--data", "unit.npy", *common).out
    assert "warning" not in quantize("--data", "x.npy", *common).out


RESIZED = ("--preset", "imagenet", "--resize", 36, "--crop", 32)
SOURCES = {
    "digits": ("digits", ()),
    "digits otherwise": ("digits", ("--preset", "unit")),
    "arrays": ("xy.npz", ()),
    "pixels": ("pixels.npz", ("--mean", "0.4,0.5,0.6", "--std", "0.25")),
    "folders": ("photos", RESIZED),
    "no normalisation": ("photos", (*RESIZED, "--pixels")),
}


@pytest.mark.parametrize("case", SOURCES)
def test_the_accuracy_of_evaluate_is_that_of_the_last_stage_without_saying_how(here, case):
    """The number that was measured is the number of the program on the same data, exactly."""
    digits = load_dataset("digits")
    np.savez("pixels.npz", x=digits.test_images[:40], y=digits.test_labels[:40])
    source, how = SOURCES[case]
    common = ("--input-shape", "3,32,32", "--calibration", 20, "--samples", 30)
    ran = quantize("--data", source, *how, *common, "-o", "same")
    assert ran.code == 0, ran.err
    measured = results(here / "same")
    last = measured["stages"][-1]
    ran = intact_(
        "evaluate", "same/program.safetensors", "--data", source, "--samples", 30, "--json"
    )
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["program"] == measured["program"]["sha256"]
    for key in ("correct", "total", "accuracy", "interval"):
        assert found[key] == last[key], key
    assert found["data"]["sha256"]["test"] == measured["data"]["sha256"]["test"]
    assert found["data"]["sha256"]["labels"] == measured["data"]["sha256"]["labels"]
    assert "note:" not in ran.err
    shown = intact_("run", "same/program.safetensors", source, "--samples", 30, "--json")
    predicted = np.load("same/predictions.npz")["integer"]
    assert [p["class"] for p in json.loads(shown.out)] == predicted.tolist()


def test_other_images_than_those_that_were_measured_are_seen_in_the_hashes(here, labelled):
    folder, _ = labelled
    common = (
        "evaluate",
        folder / "program.safetensors",
        "--data",
        "digits",
        "--samples",
        60,
        "--json",
    )
    same, other = (json.loads(intact_(*common, *how).out) for how in ((), ("--preset", "unit")))
    sha256 = results(folder)["data"]["sha256"]
    assert same["data"]["sha256"]["test"] == sha256["test"] != other["data"]["sha256"]["test"]
    assert other["data"]["sha256"]["labels"] == sha256["labels"]


def test_a_program_made_of_floats_carries_nothing_and_asks_for_images(here):
    assert quantize("--data", "xy.npz", "-o", "floats").code == 0
    assert KEY not in intact.load("floats/program.safetensors").info
    for command in (["evaluate", "--data"], ["certify", "--data"], ["run"]):
        ran = intact_(command[0], "floats/program.safetensors", *command[1:], "photos")
        assert (ran.code, ran.out) == (1, "")
        assert "Say how: `preprocessing`" in ran.err
        assert "on the command line --preset, or --mean and --std" in ran.err
    # The built-in data sets know how they are normalised.
    ran = intact_("evaluate", "floats/program.safetensors", "--data", "digits", "--json")
    assert (ran.code, json.loads(ran.out)["total"]) == (0, 500)


def test_evaluate_doubts_classes_that_are_not_the_networks_and_chance(here, labelled):
    program = labelled[0] / "program.safetensors"
    ran = intact_("evaluate", program, "--data", "photos")
    said = " ".join(ran.err.split())
    assert "warning: images of photos has 2 classes, but the network has 10 outputs" in said
    digits = load_dataset("digits")
    x = to_input(digits.test_images)
    right = intact.load(program).codes(x).argmax(1)
    np.savez("right.npz", x=x, y=right)
    np.savez("shifted.npz", x=x, y=(right + 1) % 10)
    ran = intact_("evaluate", program, "--data", "right.npz")
    assert (ran.out[:8], ran.err) == ("100.0 % ", "")
    ran = intact_("evaluate", program, "--data", "shifted.npz")
    assert "warning: guessing among 10 classes is right as often, p = 1." in ran.err
    assert ran.out.startswith("0.0 % (0 of 500)")


def test_a_float_network_that_only_guesses_is_called_a_problem(here):
    digits = load_dataset("digits")
    np.savez("wrong.npz", x=to_input(digits.test_images), y=(digits.test_labels + 5) % 10)
    ran = quantize("--data", "wrong.npz", "-o", "guessing")
    rules = [finding["rule"] for finding in results(here / "guessing")["diagnosis"]]
    assert ("guessing" in rules) == ("problem: The float network is right on" in ran.out)
    assert "guessing" in rules


def test_an_exported_program_gives_the_same_program(labelled, here):
    ran = intact_(
        "quantize", "--model", "net.pt2", "--data", "digits", "--samples", 9, "--calibration", 40,
        "-o", "exported",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    ours, theirs = (
        intact.load(f / "program.safetensors") for f in (here / "exported", labelled[0])
    )
    assert ours.ops == theirs.ops
    for name, values in theirs.parameters.items():
        assert np.array_equal(ours.parameters[name], values), name


def test_images_are_brought_to_the_networks_input_and_bad_ones_left_out(here):
    (here / "photos/class1/damaged.png").write_bytes(b"no image")
    common = (
        "--data",
        "photos",
        "--calibration",
        4,
        "--input-shape",
        "3,32,32",
        "-o",
        "photos_out",
    )
    for how in (
        ("--preset", "unit", "--resize", 40),
        ("--mean", 0, "--std", "1,1,1", "--resize", 40),
    ):
        assert re.search(r"error: .*damaged.png cannot be read", quantize(*common, *how).err)
        ran = quantize(*common, *how, "--skip-corrupt")
        assert ran.code == 0
        assert re.fullmatch(r"left out: .*damaged.png cannot be read .*\n", ran.err)
        report = results(here / "photos_out")
        assert report["stages"][0]["total"] == 6
        assert report["data"]["classes"] == ["class0", "class1"]
        assert report["inputs"]["input"]["min"] >= 0
        assert "warning: images of photos has 2 classes, but the network has 10 outputs" in ran.out
    (here / "photos/class1/damaged.png").unlink()


def test_a_folder_with_two_parts_is_not_calibrated_on_what_is_measured(here):
    for part in ("train", "test"):
        (here / "parts" / part).parent.mkdir(exist_ok=True)
        shutil.copytree(here / "photos", here / "parts" / part)
    common = ("--preset", "signed", "--input-shape", "3,32,32", "-o", "parts_out")
    ran = quantize("--data", "parts", *common)
    assert ran.code == 0, ran.err
    assert "note: ranges" not in ran.out
    assert results(here / "parts_out")["data"]["calibrated on"] == "images of parts/train"
    assert "note: ranges" in quantize("--data", "photos", *common).out


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("has no 'mkae'. Do you mean make", ["--model", "own_net.py:mkae", "--data", "x.npy"]),
        ("none.pt does not exist", ["--weights", "none.pt", "--data", "x.npy"]),
        ("none is not there. Name a folder", ["--data", "none"]),
        ("photos holds images, which must become", ["--data", "photos"]),
        ("photos holds images.*--preset, or --mean and --std", ["--data", "photos"]),
        ("leave --mean and --std out", ["--data", "x.npy", "--mean", "0", "--std", "1"]),
        ("leave --preset out", ["--data", "xy.npz", "--preset", "unit"]),
        ("The channels come last: move .*Output size is too small", ["--data", "last.npy"]),
        ("said only in part: give --preset, or both", ["--data", "photos", "--mean", "0.5"]),
        ("said only in part: give --preset, or both", ["--data", "photos", "--crop", "32"]),
        ("'labs' is neither a preset", ["--data", "x.npy", "--recipe", "labs"]),
        (
            r"Sequential fails on a batch .* \[3, 28, 28\]:.*mat1 and mat2 shapes",
            ["--data", "digits", "--input-shape", "3,28,28"],
        ),
        (r"of shape \[3, 32, 32\], but", ["--data", "x.npy", "--input-shape", "1,2,2"]),
        ("digits are embedded", ["--data", "digits", "--data-dir", "photos"]),
        ("only digits and cifar10 take a data folder", ["--data", "x.npy", "--data-dir", "."]),
        ("own_net.py is a file, not a folder", ["--data", "x.npy", "-o", "own_net.py"]),
    ],
)  # fmt: skip
def test_mistakes_are_one_message_and_leave_nothing(here, message, arguments):
    before = sorted(here.rglob("*"))
    ran = quantize(*arguments) if "-o" in arguments else quantize(*arguments, "-o", "bad")
    assert (ran.code, ran.out) == (1, "")
    assert re.search(message, ran.err, re.DOTALL), ran.err
    assert "Traceback" not in ran.err
    assert [p for p in sorted(here.rglob("*")) if "__pycache__" not in str(p)] == [
        p for p in before if "__pycache__" not in str(p)
    ]


@pytest.mark.parametrize(
    ("said", "arguments"),
    [
        ("Missing option '--model'", ["quantize", "--data", "digits"]),
        ("Missing option '--data'", ["quantize", "--model", "resnet20"]),
        ("'square' is not one of", ["quantize", "--preset", "square"]),
        ("takes a side, or height and width", ["--crop", "1,2,3"]),
        ("--input-shape takes numbers with commas", ["--input-shape", "3x32x32"]),
        ("--input-shape takes sizes of 1 or more", ["--input-shape", "3,0,32"]),
        ("Missing argument", ["check"]),
    ],
)
def test_wrong_usage_is_status_2(here, said, arguments):
    command = arguments if arguments[0] in ("quantize", "check") else None
    ran = intact_(*command) if command else quantize("--data", "x.npy", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert said in " ".join(re.sub(r"[│╭╮╰╯─]", " ", ran.err).split())


# -- check ---------------------------------------------------------------------------------------


def test_check_lists_every_layer_and_what_to_run_next(here):
    ran = intact_("check", "own_net.py:make", "--weights", "w.pt", "--input-shape", "3,32,32")
    assert (ran.code, ran.err) == (0, "")
    lines = [line.split() for line in ran.out.splitlines()]
    assert lines[0] == ["own_net.py:make"]
    assert lines[1] == ["3×32×32", "in,", "10", "out"]
    assert lines[4] == ["0", "MaxPool2d", "3×8×8"]
    macs_, parameters = 4 * 8 * 8 * 3 * 9, 4 * 3 * 9 + 4
    assert lines[5] == ["1", "Conv2d,", "ReLU6", "4×8×8", f"{macs_:,}", str(parameters)]
    assert lines[7] == ["4", "Linear", "10", "2,560", "2,570"]
    assert lines[9][:2] == ["4", "layers,"]
    assert f"{macs_ + 2560:,} MACs per sample, {parameters + 2570:,} parameters" in ran.out
    assert ran.out.splitlines()[-1] == (
        "next: intact quantize --model own_net.py:make --weights w.pt --input-shape 3,32,32 "
        "--data digits"
    )


def test_check_as_json_has_the_source_lines(here):
    ran = intact_("check", "net.pt2", "--json")
    assert (ran.code, ran.err) == (0, "")
    facts = json.loads(ran.out)
    assert facts["ok"] is True
    assert facts["inputs"] == {"input": [3, 32, 32]}
    assert [layer["op"] for layer in facts["layers"]] == [
        "MaxPool2d", "Conv2d", "Reshape", "Linear",
    ]  # fmt: skip
    assert facts["macs"] == sum(layer["macs"] for layer in facts["layers"])
    shape = ("--input-shape", "3,8,8")
    (here / "lines.py").write_text(
        NET.replace("BatchNorm2d(4, track_running_stats=False)", "ReLU()")
    )
    layers = json.loads(intact_("check", "lines.py:Soft", *shape, "--json").out)["layers"]
    assert [layer["source"] for layer in layers] == ["lines.py:15: return self.norm(self.conv(x))"]
    assert layers[0]["clamp"] == "ReLU"


def test_check_ends_with_a_command_that_says_all_that_was_given(here):
    (here / "plain.py").write_text("from torch import nn\nnet = nn.Linear(8, 2)\n")
    ran = intact_("check", "plain.py:net", "--input-shape", "3,8,8")
    assert ran.out.splitlines()[-2:] == [
        "next: intact quantize --model plain.py:net --input-shape 3,8,8 --data SOURCE",
        "SOURCE is a folder of images, or a .npy or .npz file",
    ]


def test_check_refuses_with_status_1_what_cannot_be_converted(here):
    arguments = ("check", "own_net.py:Soft", "--input-shape", "3,8,8")
    ran = intact_(*arguments)
    assert (ran.code, ran.err) == (1, "")
    line = "own_net.py:15: return self.norm(self.conv(x))"
    assert ran.out.splitlines()[:5] == [
        "own_net.py:Soft",
        "1 operation has no place in an integer program:",
        "",
        "1. batch_norm in norm",
        f"   {line}",
    ]
    assert "track_running_stats=True" in " ".join(ran.out.split())
    assert max(map(len, ran.out.splitlines())) <= 80
    ran = intact_(*arguments, "--json")
    assert (ran.code, ran.err) == (1, "")
    facts = json.loads(ran.out)
    assert (facts["model"], facts["ok"]) == ("own_net.py:Soft", False)
    (refusal,) = facts["refusals"]
    assert (refusal["function"], refusal["layer"]) == ("batch_norm", "norm")
    assert refusal["source"] == line
    assert "track_running_stats=True" in refusal["reason"]


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (-math.inf, math.inf, ""),
        (0.0, math.inf, "ReLU"),
        (0.0, 6.0, "ReLU6"),
        (0.0, 5.0, "0 to 5"),
        (-1.0, 1.0, "-1 to 1"),
        (-3.0, math.inf, "at least -3"),
        (-math.inf, 0.5, "at most 0.5"),
    ],
)
def test_what_is_fused_into_a_layer_has_a_name(low, high, words):
    assert clamp_words(low, high) == words


def test_check_takes_a_network_of_the_zoo_trained_or_not():
    for name, network in NETWORKS.items():
        ran = intact_("check", name, "--json")
        assert ran.code == 0, ran.err
        count = sum(p.numel() for p in network.make().parameters())
        # Batch norm is folded: its two parameters per channel become a bias.
        assert 0.95 * count < json.loads(ran.out)["parameters"] <= count


def test_check_asks_for_a_shape_that_nobody_knows(here):
    ran = intact_("check", "own_net.py:make")
    assert (ran.code, ran.out) == (1, "")
    assert "own_net.py:make does not say what it takes" in ran.err


# -- zoo -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def listed() -> list[dict]:
    return json.loads(intact_("zoo", "--json").out)


def test_zoo_lists_every_network_and_how_to_get_its_figures(listed):
    ran = intact_("zoo")
    assert (ran.code, ran.err) == (0, "")
    assert max(map(len, ran.out.splitlines())) <= 80
    names = [row["name"] for row in listed]
    assert set(names) == {*NETWORKS, "lenet-none", "lenet-last", "lenet-all"}
    for row, line in zip(listed, ran.out.splitlines()[1:], strict=False):
        cells = line.split()
        assert cells[:4] == [row["name"], row["data"], f"{row['parameters']:,}", f"{row['macs']:,}"]
        found = row["measured"]
        if found is None:
            assert f"intact train {row['name']}" in ran.out
        else:
            # 500 digits support one decimal, the 10,000 images of CIFAR-10 two.
            decimals = 1 if row["data"] == "digits" else 2
            right = 100 * found["integer_correct"] / found["images"]
            assert f"{right:.{decimals}f}" in cells[4:]
            assert row["command"] in ran.out or row["data"] == "digits"


def test_what_zoo_lists_is_what_the_networks_have(listed):
    layers = {
        "lenet-none": [6 * 28**2 * 3 * 25, 16 * 10**2 * 6 * 25, 120 * 400, 84 * 120, 10 * 84],
        "resnet8": [  # three blocks of 16, 32 and 64 channels; the pool adds up 64 values
            *[16 * 32**2 * 3 * 9, 16 * 32**2 * 16 * 9, 16 * 32**2 * 16 * 9],
            *[32 * 16**2 * 16 * 9, 32 * 16**2 * 32 * 9, 32 * 16**2 * 16],
            *[64 * 8**2 * 32 * 9, 64 * 8**2 * 64 * 9, 64 * 8**2 * 32],
            *[64 * 64, 64 * 10],
        ],
    }
    for row in listed:
        name = row["name"]
        made = LeNet(name[6:]) if name.startswith("lenet-") else NETWORKS[name].make()
        assert row["parameters"] == sum(p.numel() for p in made.parameters())
        assert row["macs"] == sum(layers.get(name, [row["macs"]]))


def test_accuracies_of_the_zoo_are_those_of_the_shipped_program(listed, tmp_path):
    row = next(row for row in listed if (row["name"], row["data"]) == ("lenet-none", "digits"))
    words = row["command"].split()[1:]
    report = json.loads(intact_(*words, "-o", tmp_path, "--json").out)
    found = row["measured"]
    assert report["stages"][0]["correct"] == found["float_correct"]
    assert report["stages"][-1]["correct"] == found["integer_correct"]
    assert report["stages"][-1]["total"] == found["images"]
