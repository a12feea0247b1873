"""The command line on networks and programs with several inputs and outputs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.export import Dim, export, save

import intact
from cli_harness import FILES, Ran, intact_
from intact.data import load_dataset, spread, to_input
from intact.ops import Conv2d
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
    names = ("image", "facts") if shapes else ("inputs_0", "inputs_1")
    assert f"{names[0]} 3×8×8, {names[1]} 5 in, 4 out" in ran.out
    facts = json.loads(intact_("check", model, *shapes, "--json").out)
    assert facts["inputs"] == {names[0]: [3, 8, 8], names[1]: [5]}
    assert list(facts["outputs"].values()) == [[4]]
    if shapes:
        ran = intact_("check", model, *shapes[:2])
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
    ran = intact_("certify", "pyramid.st", "--data", "digits")
    assert ran.code != 0
    assert "has 2 inputs" in ran.err


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


def test_what_takes_one_input_only_says_so(here):
    np.save("images.npy", np.zeros((4, 3, 8, 8), np.float32))
    pair = ("quantize", "--model", "several_net.py:Pair", "--data", "images.npy", "-o", "pair")
    ran = intact_(*pair)
    assert ran.code != 0
    assert "takes 2 inputs, 'image' and 'facts', but samples" in " ".join(ran.err.split())
    assert not Path("pair").exists()
    np.save("x.npy", np.zeros((2, 3, 16, 16), np.float32))
    ran = intact_("run", "pyramid.st", "x.npy")
    assert ran.code != 0
    assert "the program has 2 inputs, 'x' and 'facts'; this works with one" in " ".join(
        ran.err.split()
    )
    assert any(isinstance(op, Conv2d) for op in pyramid().ops)
