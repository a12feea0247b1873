"""Running a program on a user's own inputs: what is read, what comes out, what is refused."""

from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import intact
from cli_harness import Ran, intact_
from intact import inference
from intact.arithmetic import dequantize
from intact.capturing import capture
from intact.cli.options import EngineChoice
from intact.data import to_input
from intact.data.carried import carried_by, info_of
from intact.data.folder import find_images
from intact.data.preprocessing import PRESETS, Preprocessing
from intact.data.samples import Samples
from intact.data.sources import open_samples
from intact.engines import ENGINES, load_engine
from intact.errors import DataError, ProgramError
from intact.inference import Predictions, evaluate, infer
from intact.pipeline import quantize_network
from intact.pixels import take_pixels
from intact.recipe import Recipe
from intact.significance import wilson_interval


def make(shape: tuple[int, ...], layer: nn.Module) -> intact.Program:
    torch.manual_seed(0)
    model = nn.Sequential(layer, nn.ReLU(), nn.Flatten())
    x = torch.randn(64, *shape)
    return intact.quantize(nn.Sequential(model, nn.Linear(model(x).shape[1], 5)), [x])


@pytest.fixture(scope="module")
def program() -> intact.Program:
    return make((3, 6, 8), nn.Conv2d(3, 4, 3))


@pytest.fixture(scope="module")
def path(program, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run") / "p.safetensors"
    program.save(path)
    return path


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 3, 6, 8), np.uint8)


@pytest.fixture
def folder(tmp_path, pixels) -> Path:
    """Images of the program's own size, some deeper down, and files that are no images."""
    root = tmp_path / "images"
    for name, image in zip(
        ["b.png", "a.png", "x/c.PNG", "x/y/d.bmp", "z.png"], pixels, strict=True
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(root / name)
    for name in ("notes.txt", ".hidden.png", "x/.cache/e.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"no image")
    return root


NAMES = ("a.png", "b.png", "x/c.PNG", "x/y/d.bmp", "z.png")
ORDER = [1, 0, 2, 3, 4]


def opened(program: intact.Program, source: object, **options) -> Samples:
    options = {"preprocessing": PRESETS["signed"], **options}
    return open_samples(source, shape=program.tensors[program.input].shape, **options)


def predict(program: intact.Program, source: object, **options) -> Predictions:
    return infer(program, load_engine("reference", program), opened(program, source, **options))


# -- samples -------------------------------------------------------------------------------------


def test_images_are_run_in_the_order_of_their_paths(program, folder, pixels):
    got = predict(program, folder)
    assert got.names == NAMES
    assert np.array_equal(got.output, program.run(to_input(pixels[ORDER])))
    assert got.output.dtype == np.float32


def test_batches_and_progress_do_not_change_the_result(program, folder, monkeypatch):
    whole = predict(program, folder).output
    monkeypatch.setattr(inference, "BATCH", 2)
    done: list[int] = []
    got = infer(program, load_engine("reference", program), opened(program, folder), done.append)
    assert np.array_equal(got.output, whole)
    assert done == [2, 4, 5]


def test_one_image_is_a_batch_of_one(program, folder, pixels):
    got = predict(program, folder / "z.png")
    assert got.names == ("z.png",)
    assert np.array_equal(got.output, program.run(to_input(pixels[4:])))


def test_images_that_are_left_out_leave_the_others_their_names(program, folder, pixels):
    (folder / "m.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"m\.png cannot be read as an image"):
        predict(program, folder)
    left_out: list[str] = []
    got = predict(program, folder, skip_corrupt=True, on_skip=left_out.append)
    assert got.names == NAMES
    assert np.array_equal(got.output, program.run(to_input(pixels[ORDER])))
    assert len(left_out) == 1


def test_samples_of_arrays_lists_and_streams_are_called_by_their_numbers(program, tmp_path):
    x = np.random.default_rng(0).normal(size=(7, 3, 6, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    for source in (tmp_path / "x.npy", x, list(x), (part for part in (x[:3], x[3:]))):
        got = predict(program, source)
        assert got.names == tuple("0123456")
        assert np.array_equal(got.output, program.run(x))
    few = opened(program, tmp_path / "x.npy").take(3)
    assert [names for names, _ in few.named_batches(2)] == [("0", "3"), ("6",)]
    assert np.array_equal(np.concatenate([x for _, x in few.named_batches(2)]), x[[0, 3, 6]])
    first = opened(program, (part for part in (x[:3], x[3:]))).take(4)
    assert [names for names, _ in first.named_batches(3)] == [("0", "1", "2"), ("3",)]


def test_only_whole_pixels_go_to_a_program_that_takes_them_as_they_are(pixels):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5))
    network = take_pixels(capture(net.eval(), torch.zeros(1, 3, 6, 8)), (0.5,), (0.5,))
    as_they_are = replace(PRESETS["signed"], normalise=False)
    made = quantize_network(
        network, [torch.from_numpy(pixels).float()], Recipe(), preprocessing=as_they_are
    ).program
    assert carried_by(made) == as_they_are.settled((3, 6, 8))
    expected = made.run(pixels)
    got = predict(made, pixels, preprocessing=as_they_are)
    assert np.array_equal(got.output, expected)
    assert np.array_equal(predict(made, pixels.astype(np.float32)).output, expected)
    with pytest.raises(DataError, match="values that are no pixels, whole numbers from 0 to 255"):
        predict(made, to_input(pixels))


# -- accuracy ------------------------------------------------------------------------------------


def test_the_accuracy_is_how_often_the_first_largest_output_is_the_label(program, monkeypatch):
    monkeypatch.setattr(inference, "BATCH", 4)
    x = np.random.default_rng(1).normal(size=(11, 3, 6, 8)).astype(np.float32)
    labels = np.arange(11) % 5
    done: list[int] = []
    found = evaluate(
        program, load_engine("reference", program), opened(program, (x, labels)), done.append
    )
    right = int((program.codes(x).argmax(1) == labels).sum())
    assert (found.correct, found.total, done) == (right, 11, [4, 8, 11])
    assert found.accuracy == right / 11
    assert found.interval == wilson_interval(right, 11)
    assert found.inputs == hashlib.sha256(x.tobytes()).hexdigest()
    assert found.labels == hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()


def test_without_labels_or_with_those_of_other_classes_there_is_no_accuracy(program, tmp_path):
    engine = load_engine("reference", program)
    x = np.zeros((3, 3, 6, 8), np.float32)
    with pytest.raises(DataError, match=r"has no labels.* a folder per class, or a \.npz"):
        evaluate(program, engine, opened(program, x))
    with pytest.raises(DataError, match=r"labels from 1 to 5.*subtract 1"):
        evaluate(program, engine, opened(program, (x, np.array([1, 5, 2]))))
    for i in range(6):
        (tmp_path / str(i)).mkdir()
        Image.new("RGB", (8, 6)).save(tmp_path / str(i) / "a.png")
    with pytest.raises(DataError, match=r"tells 5 classes apart, but images of .* has 6"):
        evaluate(program, engine, opened(program, tmp_path))


def test_hidden_and_other_files_are_no_images(folder):
    assert [p.relative_to(folder).as_posix() for p in find_images(folder)] == list(NAMES)


# -- predictions ---------------------------------------------------------------------------------


@pytest.fixture
def predictions() -> Predictions:
    return Predictions(("a", "b,c"), {"fc": np.array([[0.5, 2, 2], [-1, -3, -2]], np.float32)})


def test_the_class_is_the_first_of_the_largest_outputs(predictions):
    assert predictions.classes.tolist() == [1, 0]
    assert predictions.scores.tolist() == [2, -1]


def test_every_format_holds_every_output(predictions, tmp_path):
    predictions.write(tmp_path / "p.csv")
    with (tmp_path / "p.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["input", "class", "output0", "output1", "output2"]
    assert [row[:2] for row in rows[1:]] == [["a", "1"], ["b,c", "0"]]
    read = np.array([[np.float32(v) for v in row[2:]] for row in rows[1:]])
    assert np.array_equal(read, predictions.output)
    predictions.write(tmp_path / "p.json")
    assert json.loads((tmp_path / "p.json").read_text("utf-8")) == [
        {"input": "a", "class": 1, "output": [0.5, 2, 2]},
        {"input": "b,c", "class": 0, "output": [-1, -3, -2]},
    ]
    predictions.write(tmp_path / "p.npy")
    assert np.array_equal(np.load(tmp_path / "p.npy"), predictions.output)
    predictions.write(tmp_path / "p.npz")
    with np.load(tmp_path / "p.npz") as written:
        assert list(written) == ["fc"]
        assert np.array_equal(written["fc"], predictions.output)
    with pytest.raises(DataError, match=r"must end in \.csv, \.json, \.npy or \.npz"):
        predictions.write(tmp_path / "p.txt")


def test_a_text_file_has_the_bits_of_every_float(tmp_path):
    output = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    Predictions(tuple(map(str, range(50))), {"fc": output}).write(tmp_path / "p.csv")
    rows = (tmp_path / "p.csv").read_text("utf-8").splitlines()[1:]
    read = [[np.float32(v) for v in row.split(",")[2:]] for row in rows]
    assert np.array_equal(np.array(read), output)


# -- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def carrying(program, tmp_path_factory) -> Path:
    """The program, carrying how its images are prepared: not as anything else would guess."""
    path = tmp_path_factory.mktemp("carrying") / "p.safetensors"
    replace(program, info=info_of(IMAGENET, (3, 6, 8))).save(path)
    return path


IMAGENET = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def test_the_command_prints_a_line_per_input_and_writes_the_outputs(
    carrying, program, folder, pixels
):
    out = folder.parent / "new" / "predictions.npy"
    ran = intact_("run", carrying, folder, "-o", out, "--engine", "torch", "--threads", 1)
    assert (ran.code, ran.err) == (0, "")
    expected = program.run(to_input(pixels[ORDER], IMAGENET.mean, IMAGENET.std))
    assert np.array_equal(np.load(out), expected)
    lines = [line.split() for line in ran.out.splitlines()]
    assert lines[0] == ["input", "class", "output"]
    for line, name, row in zip(lines[1:], NAMES, expected, strict=False):
        assert line == [name, str(row.argmax()), f"{row.max():.4g}"]
    assert ran.out.splitlines()[-1] == f"{out}  all outputs of 5 inputs"


def outputs(ran: Ran) -> np.ndarray:
    assert ran.code == 0, ran.err
    return np.array([prediction["output"] for prediction in json.loads(ran.out)], np.float32)


def test_images_need_a_program_that_says_how_or_options_that_do(path, program, folder, pixels):
    ran = intact_("run", path, folder)
    assert (ran.code, ran.out) == (1, "")
    assert "on the command line --preset, or --mean and --std" in ran.err
    given = intact_("run", path, folder, "--mean", "0.25", "--std", "2", "--json")
    assert given.err == ""
    assert np.array_equal(outputs(given), program.run(to_input(pixels[ORDER], (0.25,), (2.0,))))


def test_options_override_what_the_program_carries_and_the_difference_is_said(
    carrying, program, folder, pixels
):
    signed = intact_("run", carrying, folder, "--preset", "signed", "--json")
    assert np.array_equal(outputs(signed), program.run(to_input(pixels[ORDER])))
    said = " ".join(signed.err.split())
    assert (
        "note: with --preset images are resized to 6×8 (bilinear), RGB, mean 0.5, std 0.5;" in said
    )
    assert said.endswith("mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225")
    part = intact_("run", carrying, folder, "--std", "0.5", "--json")
    assert np.array_equal(
        outputs(part), program.run(to_input(pixels[ORDER], IMAGENET.mean, (0.5,)))
    )
    assert "note: with --std" in part.err
    same = intact_(
        "run", carrying, folder, "--mean", "0.485,0.456,0.406", "--crop", "6,8", "--json"
    )
    assert (same.code, same.err) == (0, "")


def test_options_about_images_are_refused_where_there_are_none(carrying, program, tmp_path):
    x = np.random.default_rng(0).normal(size=(2, 3, 6, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    assert np.array_equal(
        outputs(intact_("run", carrying, tmp_path / "x.npy", "--json")), program.run(x)
    )
    ran = intact_("run", carrying, tmp_path / "x.npy", "--mean", "0", "--std", "1")
    assert (ran.code, ran.out) == (1, "")
    assert "x.npy holds floats, which are taken as the network takes them" in ran.err
    assert "leave --mean and --std out" in ran.err


def test_samples_are_spread_and_bad_images_left_out(carrying, folder):
    ran = intact_("run", carrying, folder, "--samples", 3, "--json")
    assert [p["input"] for p in json.loads(ran.out)] == [NAMES[0], NAMES[2], NAMES[4]]
    (folder / "m.png").write_bytes(b"no image")
    ran = intact_("run", carrying, folder, "--skip-corrupt", "--workers", 2, "--json")
    assert [p["input"] for p in json.loads(ran.out)] == list(NAMES)
    assert ran.err.startswith("left out: ")


def test_json_goes_to_standard_output(carrying, program, folder, pixels):
    ran = intact_("run", carrying, folder / "z.png", "--json")
    assert (ran.code, ran.err) == (0, "")
    expected = program.run(to_input(pixels[4:], IMAGENET.mean, IMAGENET.std))[0]
    assert json.loads(ran.out) == [
        {"input": "z.png", "class": int(expected.argmax()), "output": expected.tolist()}
    ]


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "auto"])
def test_all_engines_give_the_same_outputs(carrying, program, folder, pixels, engine):
    ran = intact_("run", carrying, folder, "--json", "--engine", engine)
    if ran.code:
        pytest.skip(ran.err.strip())
    x = to_input(pixels[ORDER], IMAGENET.mean, IMAGENET.std)
    assert np.array_equal(outputs(ran), program.run(x, engine="reference"))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("threads", [-1, 0, 10**6])
def test_no_engine_takes_an_impossible_number_of_threads(program, engine, threads):
    with pytest.raises(ProgramError, match=f"threads is {threads}, but must be 1 to 1024"):
        load_engine(engine, program, threads=threads)


def test_the_command_offers_every_engine():
    assert tuple(choice.value for choice in EngineChoice) == ENGINES


def test_the_output_is_dequantized(program, pixels):
    x = to_input(pixels)
    grid = program.tensors[program.output].qparams
    assert np.array_equal(program.run(x), dequantize(program.codes(x), grid))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["none"], 1, "none is not there. Name a folder of images"),
        (["digits", "--data-dir", "."], 1, "digits are embedded"),
        (["x.npy"], 1, "x.npy cannot be read as an array"),
        ([".", "-o", "p.txt"], 1, "its name must end in .csv, .json, .npy or .npz"),
        ([".", "-o", "/dev/null/p.csv"], 1, "/dev/null is a file, not a folder"),
        ([".", "--mean", "gray"], 2, "--mean takes numbers with commas between them, not 'gray'"),
        ([".", "--mean", "0", "--std", "1,1"], 1, "2 numbers were given to normalise 3 channels"),
        ([".", "--std", "1"], 1, "said only in part: give --preset, or both --mean and --std"),
        ([".", "--threads", "0"], 2, "--threads"),
    ],
)
def test_wrong_usage_is_refused_and_leaves_nothing(
    path, tmp_path, monkeypatch, arguments, code, message
):
    monkeypatch.chdir(tmp_path)
    ran = intact_("run", path, *arguments)
    assert ran.code == code
    assert message in " ".join(ran.err.replace("│", " ").split())
    assert ran.out == ""
    assert list(tmp_path.iterdir()) == []
