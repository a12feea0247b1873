"""The command line on networks and programs with several inputs and outputs."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch.export import Dim, export, save

import intact
from cli_harness import FILES, Ran, intact_
from intact.data import load_dataset, spread, to_input
from test_several_ends import batch, pyramid

NET = """\
import torch
from torch import nn

class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool, self.conv = nn.MaxPool2d(4), nn.Conv2d(3, 4, 3, padding=1)
        self.scores, self.box = nn.Linear(256, 10), nn.Linear(256, 4)

    def forward(self, x):
        x = torch.relu(self.conv(self.pool(x)))
        return {"scores": self.scores(x.flatten(1)), "box": self.box(x.flatten(1)), "map": x}

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(5, 4)

    def forward(self, image, facts):
        return self.conv(image).mean((2, 3)) + self.fc(facts)
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("several")
    before = Path.cwd()
    os.chdir(folder)
    (folder / "several_net.py").write_text(NET)
    torch.manual_seed(1)
    names: dict[str, object] = {}
    exec(NET, names)  # noqa: S102
    torch.save(names["Heads"]().state_dict(), "w.pt")
    example = (torch.zeros(2, 3, 8, 8), torch.zeros(2, 5))
    dynamic = ({0: Dim("n")}, {0: Dim("n")})
    save(export(names["Pair"]().eval(), example, dynamic_shapes=dynamic), "pair.pt2")
    pyramid().save("pyramid.st")
    yield folder
    os.chdir(before)
    sys.modules.pop("several_net", None)


@pytest.fixture(scope="module")
def quantized(here) -> Ran:
    options = ("--weights", "w.pt", "--data", "digits", "--samples", 60, "--calibration", 40)
    return intact_("quantize", "--model", "several_net.py:Heads", *options, "-o", "heads")


def test_quantize_leaves_everything_for_a_network_with_several_outputs(here, quantized):
    assert (quantized.code, quantized.err) == (0, "")
    assert sorted(path.name for path in (here / "heads").iterdir()) == FILES
    program = intact.load("heads/program.safetensors")
    assert program.outputs == ("scores", "box", "conv")
    assert program.info["outputs"].splitlines()[1] == "box = result['box']"
    report = json.loads(Path("heads/results.json").read_text(encoding="utf-8"))
    digits = load_dataset("digits")
    at = spread(len(digits.test_images), 60)
    scores = program.run(to_input(digits.test_images[at]), engine="reference")[0]
    right = (scores.argmax(1) == digits.test_labels[at]).sum()
    assert report["stages"][-1]["correct"] == right
    page = Path("heads/report.html").read_text(encoding="utf-8")
    note = "Of the 3 outputs, scores, box and conv, the first one is what predictions are made from"
    assert note in page
    assert note in " ".join(quantized.out.split())


def test_run_predicts_with_the_first_output_and_writes_all(here, quantized):
    np.save("x.npy", to_input(load_dataset("digits").test_images[:5]))
    program = intact.load("heads/program.safetensors")
    expected = program.run(np.load("x.npy"), engine="reference")
    ran = intact_("run", "heads/program.safetensors", "x.npy", "-o", "out.npz", "--json")
    assert (ran.code, ran.err) == (0, "")
    shown = json.loads(ran.out)
    assert [each["class"] for each in shown] == expected[0].argmax(1).tolist()
    with np.load("out.npz") as written:
        assert list(written) == ["scores", "box", "conv"]
        for name, array in zip(program.outputs, expected, strict=True):
            assert np.array_equal(written[name], array)
            values = np.array([each["outputs"][name] for each in shown], np.float32)
            assert np.array_equal(values, array)
    assert intact_("run", "heads/program.safetensors", "x.npy", "-o", "out.json").code == 0
    assert json.loads(Path("out.json").read_text()) == shown
    for suffix in ("csv", "npy"):
        ran = intact_("run", "heads/program.safetensors", "x.npy", "-o", f"out.{suffix}")
        assert ran.code != 0
        assert "has 3 outputs" in ran.err
        assert not Path(f"out.{suffix}").exists()


def test_evaluate_counts_the_first_output(here, quantized):
    ran = intact_("evaluate", "heads/program.safetensors", "--data", "digits", "--json")
    assert ran.code == 0
    program, digits = intact.load("heads/program.safetensors"), load_dataset("digits")
    scores = program.run(to_input(digits.test_images))[0]
    assert json.loads(ran.out)["correct"] == (scores.argmax(1) == digits.test_labels).sum()


def test_inspect_shows_all_inputs_and_names_the_outputs(here):
    ran = intact_("inspect", "pyramid.st")
    assert ran.code == 0
    assert [line.split()[:2] for line in ran.out.splitlines() if " Input " in line] == [
        ["x", "Input"],
        ["facts", "Input"],
    ]
    assert ran.out.splitlines()[-1] == "outputs, in this order: sum, up, both, mixed"
    facts = json.loads(intact_("inspect", "pyramid.st", "--json").out)
    assert [tensor["name"] for tensor in facts["inputs"]] == ["x", "facts"]
    assert facts["outputs"] == ["sum", "up", "both", "mixed"]


@pytest.mark.parametrize("model", ["several_net.py:Pair", "pair.pt2"])
def test_check_takes_a_shape_for_each_input(here, model):
    shapes = () if model.endswith(".pt2") else ("--input-shape", "3,8,8", "--input-shape", "5")
    ran = intact_("check", model, *shapes)
    assert (ran.code, ran.err) == (0, "")
    assert "image 3×8×8, facts 5 in, 4 out" in ran.out
    assert ran.out.endswith(
        f"next: intact quantize --model {model} --data SOURCE\n"
        "SOURCE is a .npz or .safetensors file, or a folder of .npy files, with an array "
        "for each input:\nimage, facts\n"
    )
    facts = json.loads(intact_("check", model, *shapes, "--json").out)
    assert facts["inputs"] == {"image": [3, 8, 8], "facts": [5]}
    assert list(facts["outputs"].values()) == [[4]]
    ran = intact_("check", model, "--input-shape", "3,8,8")
    assert ran.code != 0
    assert "takes 2 inputs (image, facts), but the example has 1" in " ".join(ran.err.split())


def test_export_writes_all_inputs_and_outputs(here):
    onnx = pytest.importorskip("onnx")
    assert intact_("export", "pyramid.st", "-o", "pyramid.onnx").code == 0
    graph = onnx.load("pyramid.onnx").graph
    assert [value.name for value in graph.input] == ["x", "facts"]
    assert [value.name for value in graph.output] == ["sum", "up", "both", "mixed"]


def test_bench_measures_several_inputs_and_outputs(here):
    options = ("--engines", "torch,reference", "--batch", "1,2", "--rounds", 1, "--json")
    ran = intact_("bench", "pyramid.st", *options)
    assert (ran.code, ran.err) == (0, "")
    measured = json.loads(ran.out)["measured"]
    assert {m["name"] for m in measured} == {"torch", "reference", "float32 torch"}


def test_certify_compares_every_layer_from_all_inputs_to_all_outputs(here):
    engines = "torch,native portable,onnxruntime qdq all,openvino"
    ran = intact_("certify", "pyramid.st", "--engines", engines, "--samples", 7)
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(Path("certificate.json").read_text(encoding="utf-8"))
    assert {kind["kind"] for kind in found["inputs"]} >= {"stand-in", "random", "structured"}


def test_a_fault_behind_any_output_or_input_fails_the_certificate():
    from intact.certifying import certify
    from intact.configurations import Configuration
    from intact.engines.reference import ReferenceEngine

    program = pyramid()

    class Faulty(ReferenceEngine):
        """Wrong in one output, or with its inputs' samples out of step."""

        fault: object = None

        def __call__(self, codes, hook=None):
            if self.program != program:
                return super().__call__(codes, hook)
            if self.fault == "input":
                codes = (codes[0], codes[1][::-1].copy())
            outputs = list(super().__call__(codes, hook))
            if isinstance(self.fault, int):
                outputs[self.fault] = outputs[self.fault] ^ (hook is None)
            return tuple(outputs)

    for fault in (None, 0, 1, 2, 3, "input"):
        engine = type("Engine", (Faulty,), {"fault": fault})
        found = certify(
            program,
            batch(program, 6),
            engines=["torch"],
            samples=6,
            also=[Configuration("own", engine)],
        )
        assert found.ok == (fault is None), fault
        if isinstance(fault, int):
            assert found.engines[-1].first.layer == program.outputs[fault]


# -- data of several inputs ----------------------------------------------------------------------

COUNT = 60
MODELS = ["several_net.py:Pair", "several_net:Pair", "pair.pt2"]


@pytest.fixture(scope="module")
def pairs(here) -> dict[str, np.ndarray]:
    """Arrays for the inputs of `Pair` and labels, as `.npz`, `.safetensors` and a folder."""
    rng = np.random.default_rng(0)
    arrays = {
        "facts": rng.normal(size=(COUNT, 5)),
        "image": rng.normal(size=(COUNT, 3, 8, 8)).astype(np.float32),
        "y": rng.integers(0, 4, COUNT),
    }
    np.savez("pairs.npz", **arrays)
    save_file(arrays, "pairs.safetensors")
    Path("pairs").mkdir()
    for name, array in arrays.items():
        np.save(f"pairs/{name}.npy", array)
    return arrays


@pytest.fixture(scope="module")
def paired(pairs) -> dict[str, Ran]:
    """`quantize` of each model, from another kind of source each."""
    sources = ("pairs.npz", "pairs.safetensors", "pairs")
    return {
        model: intact_("quantize", "--model", model, "--data", source, "-o", f"pair{i}")
        for i, (model, source) in enumerate(zip(MODELS, sources, strict=True))
    }


def given(arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return arrays["image"], arrays["facts"].astype(np.float32)


@pytest.mark.parametrize("model", MODELS)
def test_quantize_takes_an_array_for_each_input_by_its_name(here, pairs, paired, model):
    ran, folder = paired[model], Path(f"pair{MODELS.index(model)}")
    assert (ran.code, ran.err) == (0, "")
    assert sorted(path.name for path in folder.iterdir()) == FILES
    program = intact.load(folder / "program.safetensors")
    assert program.inputs == ("image", "facts")
    predicted = program.run(given(pairs), engine="reference").argmax(1)
    report = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert report["stages"][-1]["correct"] == (predicted == pairs["y"]).sum()
    assert report["stages"][-1]["sqnr_db"] > 25
    assert list(report["inputs"]) == ["image", "facts"]
    assert [report["inputs"][name]["shape"] for name in program.inputs] == [[3, 8, 8], [5]]
    hashes = [hashlib.sha256(x.tobytes()).digest() for x in given(pairs)]
    assert report["data"]["sha256"] == {
        "calibration": hashlib.sha256(b"".join(hashes)).hexdigest(),
        "test": hashlib.sha256(b"".join(hashes)).hexdigest(),
        "labels": hashlib.sha256(pairs["y"].tobytes()).hexdigest(),
    }


def test_the_program_is_that_of_python(here, pairs, paired):
    from several_net import Pair

    model, exported = Pair(), torch.export.load("pair.pt2")
    model.load_state_dict(exported.state_dict)
    batch = tuple(map(torch.from_numpy, given(pairs)))
    expected = intact.quantize(model, [batch])
    program = intact.load("pair2/program.safetensors")
    assert program.run(given(pairs)).tolist() == expected.run(given(pairs)).tolist()


def test_the_page_shows_every_input(here, paired):
    page = Path("pair0/report.html").read_text(encoding="utf-8")
    for i, name in enumerate(("image", "facts")):
        assert f'<a href="#input-{i}"><span>{name}</span></a>' in page
        assert f'<h3 id="input-{i}-title"><span class="name">{name}</span>' in page


@pytest.mark.parametrize("source", ["pairs.npz", "pairs.safetensors", "pairs"])
def test_run_evaluate_and_certify_take_every_source_of_several_inputs(here, pairs, paired, source):
    program = intact.load("pair2/program.safetensors")
    outputs = program.run(given(pairs), engine="reference")
    ran = intact_("run", "pair2/program.safetensors", source, "--json")
    assert (ran.code, ran.err) == (0, "")
    shown = json.loads(ran.out)
    assert [each["input"] for each in shown] == [str(i) for i in range(COUNT)]
    assert np.array_equal(np.array([each["output"] for each in shown], np.float32), outputs)
    ran = intact_("evaluate", "pair2/program.safetensors", "--data", source, "--json")
    assert ran.code == 0
    found = json.loads(ran.out)
    right = int((outputs.argmax(1) == pairs["y"]).sum())
    assert (found["correct"], found["total"]) == (right, COUNT)
    report = json.loads(Path("pair2/results.json").read_text(encoding="utf-8"))
    assert found["data"]["sha256"] == {k: report["data"]["sha256"][k] for k in ("test", "labels")}
    options = ("--engines", "torch", "--samples", 9, "-o", "c.json")
    ran = intact_("certify", "pair2/program.safetensors", "--data", source, *options)
    assert (ran.code, ran.err) == (0, "")
    data = json.loads(Path("c.json").read_text(encoding="utf-8"))["inputs"][0]
    at = spread(COUNT, 9)
    codes = program.quantize_input(tuple(x[at] for x in given(pairs)))
    assert (data["kind"], data["samples"], data["description"]) == ("data", 9, source)
    assert data["sha256"] == hashlib.sha256(b"".join(c.tobytes() for c in codes)).hexdigest()


def test_samples_and_several_outputs_of_several_inputs(here):
    program = intact.load("pyramid.st")
    rng = np.random.default_rng(0)
    shapes = [(7, *program.tensors[name].shape) for name in program.inputs]
    x = tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)
    np.savez("seven.npz", x=x[0], facts=x[1])
    ran = intact_("run", "pyramid.st", "seven.npz", "--samples", 3, "-o", "three.npz")
    assert (ran.code, ran.err) == (0, "")
    expected = program.run(tuple(part[[0, 3, 6]] for part in x), engine="reference")
    with np.load("three.npz") as written:
        assert list(written) == list(program.outputs)
        for name, array in zip(program.outputs, expected, strict=True):
            assert np.array_equal(written[name], array)


def test_without_labels_and_with_other_calibration_data(here, pairs):
    np.savez("few.npz", image=pairs["image"][:9], facts=pairs["facts"][:9])
    options = ("--data", "few.npz", "--calibration-data", "pairs", "-o", "few", "--json")
    ran = intact_("quantize", "--model", "pair.pt2", *options)
    assert ran.code == 0
    report = json.loads(ran.out)
    assert "labels" not in report["data"]["sha256"]
    assert report["stages"][-1]["total"] == 9
    assert (report["data"]["calibration"], report["data"]["calibrated on"]) == (COUNT, "pairs")
    ran = intact_("evaluate", "few/program.safetensors", "--data", "few.npz")
    assert ran.code != 0
    assert "few.npz has no labels" in ran.err


def test_a_folder_with_both_parts_calibrates_on_the_one_and_measures_on_the_other(here, pairs):
    for part, samples in (("train", slice(20, None)), ("test", slice(20))):
        Path("parts", part).mkdir(parents=True)
        for name, array in pairs.items():
            np.save(f"parts/{part}/{name}.npy", array[samples])
    ran = intact_("quantize", "--model", "pair.pt2", "--data", "parts", "-o", "parts_out")
    assert ran.code == 0
    assert "ranges were chosen from samples that the stages were measured on" not in ran.out
    report = json.loads(Path("parts_out/results.json").read_text(encoding="utf-8"))
    data = report["data"]
    assert (data["name"], data["calibrated on"]) == ("parts/test", "parts/train")
    assert (data["test"], data["calibration"]) == (20, COUNT - 20)
    ran = intact_("evaluate", "parts_out/program.safetensors", "--data", "parts", "--json")
    assert json.loads(ran.out)["correct"] == report["stages"][-1]["correct"]


def test_an_input_that_looks_unlike_the_calibrations_is_named(here, pairs):
    np.savez("loud.npz", image=pairs["image"], facts=100 * pairs["facts"])
    options = ("--data", "loud.npz", "--calibration-data", "pairs.npz", "-o", "loud")
    ran = intact_("quantize", "--model", "pair.pt2", *options)
    assert ran.code == 0
    warnings = [line for line in ran.out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert "'facts' of loud.npz reaches from" in warnings[0]


WRONG = {
    "digits": "digits cannot hold samples of the network's 2 inputs, 'image' and 'facts'. Name a "
    ".npz or .safetensors file, or a folder of .npy files",
    "absent.npz": "absent.npz cannot be read as an array: no such file",
}


@pytest.mark.parametrize("command", [("run",), ("evaluate", "--data"), ("certify", "--data")])
@pytest.mark.parametrize("source", WRONG)
def test_sources_that_hold_one_input_are_refused(here, paired, command, source):
    ran = intact_(command[0], "pair2/program.safetensors", *command[1:], source)
    assert ran.code != 0
    assert WRONG[source] in " ".join(ran.err.split())


@pytest.mark.parametrize("model", MODELS[1:])
def test_names_that_are_not_those_of_the_inputs_are_no_guess_of_quantize(here, pairs, model):
    np.savez("renamed.npz", picture=pairs["image"], facts=pairs["facts"], y=pairs["y"])
    ran = intact_("quantize", "--model", model, "--data", "renamed.npz", "-o", "renamed")
    assert ran.code != 0
    said = " ".join(ran.err.split())
    assert "renamed.npz holds the arrays 'picture', 'facts' and 'y'" in said
    assert "the network's inputs are 'image' and 'facts'" in said
    assert "If 'picture' is meant for 'image', rename it." in said
    assert not Path("renamed").exists()


def test_the_shape_of_an_input_is_checked_before_anything_runs(here, pairs, paired):
    arrays = {"facts": np.zeros((4, 7), np.float32), "image": np.zeros((4, 3, 8, 8), np.float32)}
    np.savez("wide.npz", **arrays)
    message = "'facts' of wide.npz holds samples of shape [7], but the network takes [5]"
    for command in (
        ("run", "pair2/program.safetensors", "wide.npz"),
        ("quantize", "--model", "pair.pt2", "--data", "wide.npz", "-o", "wide"),
    ):
        ran = intact_(*command)
        assert ran.code != 0
        assert message in " ".join(ran.err.split())
    # Code does not say what it takes, until it runs.
    ran = intact_("quantize", "--model", MODELS[0], "--data", "wide.npz", "-o", "wide")
    assert ran.code != 0
    assert "several_net.py:" in ran.err
    ran = intact_(
        *("quantize", "--model", MODELS[0], "--data", "wide.npz"),
        *("--calibration-data", "pairs.npz", "-o", "wide"),
    )
    assert ran.code != 0
    assert "captured for samples of 'facts' of shape [5]" in " ".join(ran.err.split())


@pytest.mark.parametrize(
    "options",
    [
        ("--preset", "unit"),
        ("--resize", 8),
        ("--mean", "0.5", "--std", "0.5"),
        ("--workers", 2),
        ("--skip-corrupt",),
        ("--data-dir", "."),
    ],
)
def test_options_about_images_are_refused_where_there_are_several_inputs(here, paired, options):
    given = " and ".join(option for option in options if str(option).startswith("--"))
    for command in (
        ("run", "pair2/program.safetensors", "pairs.npz"),
        ("quantize", "--model", "pair.pt2", "--data", "pairs.npz", "-o", "refused"),
    ):
        ran = intact_(*command, *options)
        assert ran.code != 0
        said = " ".join(ran.err.split())
        assert "the network has 2 inputs, 'image' and 'facts', whose arrays are taken as" in said
        assert f"leave {given} out" in said
    assert not Path("refused").exists()


@pytest.mark.parametrize("options", [("--pixels",), ("--input-shape", "3,8,8")])
def test_options_of_quantize_about_one_input_are_refused(here, pairs, options):
    ran = intact_("quantize", "--model", "pair.pt2", "--data", "pairs", *options, "-o", "refused")
    assert ran.code != 0
    assert f"leave {options[0]} out" in " ".join(ran.err.split())
    assert not Path("refused").exists()
