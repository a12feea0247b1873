"""Running a program on a user's own inputs: what is read, what comes out, what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import intact
from intact import inference
from intact.arithmetic import dequantize
from intact.cli.options import EngineChoice
from intact.data import to_input
from intact.data.folder import find_images, read_images
from intact.data.preprocessing import PRESETS
from intact.engines import ENGINES, load_engine
from intact.errors import DataError, ProgramError
from intact.inference import Predictions, infer, read_inputs
from test_cli import intact_


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


def predict(program: intact.Program, source: Path, **options) -> Predictions:
    return infer(
        program, load_engine("reference", program), read_inputs(program, source, **options)
    )


# -- inputs --------------------------------------------------------------------------------------


def test_images_are_run_in_the_order_of_their_paths(program, folder, pixels):
    got = predict(program, folder)
    assert got.names == NAMES
    assert np.array_equal(got.output, program.run(to_input(pixels[ORDER])))
    assert got.output.dtype == np.float32


def test_slices_and_progress_do_not_change_the_result(program, folder, monkeypatch):
    whole = predict(program, folder).output
    monkeypatch.setattr(inference, "SLICE", 2)
    done: list[int] = []
    inputs = read_inputs(program, folder)
    assert [len(batch) for batch in inputs.slices()] == [2, 2, 1]
    got = infer(program, load_engine("reference", program), inputs, done.append)
    assert np.array_equal(got.output, whole)
    assert done == [2, 4, 5]


def test_one_image_is_a_batch_of_one(program, folder, pixels):
    got = predict(program, folder / "z.png")
    assert got.names == ("z.png",)
    assert np.array_equal(got.output, program.run(to_input(pixels[4:])))


def test_images_are_converted_and_resized_to_the_input(program, tmp_path):
    gray = Image.fromarray(np.full((20, 30), 77, np.uint8))
    gray.save(tmp_path / "gray.png")
    expected = np.full((1, 3, 6, 8), 77, np.uint8)
    read = read_images([tmp_path / "gray.png"], PRESETS["unit"], (3, 6, 8))
    assert np.array_equal(read, expected)
    assert np.array_equal(predict(program, tmp_path).output, program.run(to_input(expected)))


def test_pixels_are_normalised_as_asked(program, folder, pixels):
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    x = (pixels[ORDER] / np.float32(255)).astype(np.float32)
    x = (x - np.array(mean, np.float32).reshape(3, 1, 1)) / np.array(std, np.float32).reshape(
        3, 1, 1
    )
    got = predict(program, folder, mean=mean, std=std)
    assert np.array_equal(got.output, program.run(x))
    assert not np.array_equal(got.output, predict(program, folder).output)
    one = predict(program, folder, mean=[0.25], std=[2.0])
    assert np.array_equal(
        one.output, predict(program, folder, mean=[0.25] * 3, std=[2.0] * 3).output
    )


@pytest.mark.parametrize("kind", ["npy", "npz"])
@pytest.mark.parametrize("codes", [False, True])
def test_arrays_are_taken_as_they_are(program, tmp_path, kind, codes):
    x = np.random.default_rng(0).normal(size=(7, 3, 6, 8)).astype(np.float32)
    given = program.quantize_input(x) if codes else x
    file = tmp_path / f"x.{kind}"
    np.save(file, given) if kind == "npy" else np.savez(file, given)
    got = predict(program, file)
    assert got.names == tuple("0123456")
    assert np.array_equal(got.output, program.run(x))


def refused(program: intact.Program, source: Path, **options) -> str:
    with pytest.raises((DataError, ProgramError)) as error:
        read_inputs(program, source, **options)
    return str(error.value)


def test_arrays_that_do_not_fit_are_refused_before_anything_runs(program, tmp_path):
    file = tmp_path / "x.npy"
    for array, message in (
        (
            np.zeros((2, 3, 8, 8), np.float32),
            "x.npy holds float32 [2, 3, 8, 8], but the program takes float32 [N, 3, 6, 8], normal",
        ),
        (np.zeros((2, 3, 8, 8), np.int8), "its network, or codes, int8 [N, 3, 6, 8]."),
        (np.zeros((3, 6, 8), np.float32), "x.npy holds float32 [3, 6, 8], but the program takes"),
        (np.zeros((2, 3, 6, 8), np.int64), "x.npy holds int64 [2, 3, 6, 8], but the program takes"),
        (np.float32(1), "holds a single number"),
    ):
        np.save(file, array)
        assert message in refused(program, file)


def test_a_nan_is_refused_with_the_number_of_its_sample(program, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "SLICE", 4)
    x = np.zeros((11, 3, 6, 8), np.float32)
    x[9, 1, 2, 3] = np.nan
    np.save(tmp_path / "x.npy", x)
    assert "holds a NaN in sample 9, at [1, 2, 3]" in refused(program, tmp_path / "x.npy")


def test_at_most_so_many_samples_are_taken_spread_over_all(program, tmp_path, folder):
    x = np.arange(9, dtype=np.float32).reshape(9, 1, 1, 1) * np.ones((3, 6, 8), np.float32)
    np.save(tmp_path / "x.npy", x)
    got = read_inputs(program, tmp_path / "x.npy", most=3)
    assert got.names == ("0", "4", "8")
    assert np.array_equal(np.concatenate(list(got.slices())), x[[0, 4, 8]])
    assert read_inputs(program, tmp_path / "x.npy", most=20).names == tuple("012345678")
    assert read_inputs(program, folder, most=3).names == (NAMES[0], NAMES[2], NAMES[4])


def test_a_file_that_is_no_array_or_a_pickle_is_refused(program, tmp_path):
    for content in (b"", b"\x93NUMPY", b"PK\x03\x04", b"[1, 2]"):
        (tmp_path / "x.npy").write_bytes(content)
        assert "cannot be read as an array" in refused(program, tmp_path / "x.npy")
    np.save(tmp_path / "o.npy", np.array([{}], object), allow_pickle=True)
    for file in ("x.npy", "o.npy"):  # NumPy itself would recommend to load what may run code
        message = refused(program, tmp_path / file)
        assert "cannot be read as an array: it holds no numbers." in message
        assert "pickle" not in message
    assert "as an array: no such file or directory." in refused(program, tmp_path / "none.npy")


def test_a_damaged_array_is_refused(program, tmp_path):
    file = tmp_path / "x.npy"
    np.save(file, np.zeros((2, 3, 6, 8), np.float32))
    whole = file.read_bytes()
    shape = b"(2, 3, 6, 8), "
    for damaged in (whole[:-1], whole.replace(shape, b"(%d,)" % 10**10 + b" ")):
        assert damaged != whole
        file.write_bytes(damaged)
        assert "cannot be read as an array" in refused(program, file)
    packed = tmp_path / "x.npz"
    np.savez_compressed(packed, np.random.default_rng(0).normal(size=(50, 3, 6, 8)))
    content = bytearray(packed.read_bytes())
    content[2000:2400] = bytes(400)
    packed.write_bytes(content)
    assert "cannot be read as an array" in refused(program, packed)


def test_an_archive_must_hold_one_array(program, tmp_path):
    np.savez(tmp_path / "x.npz", a=np.zeros(1), b=np.zeros(1))
    assert "holds 2 arrays (a, b): give a file with one" in refused(program, tmp_path / "x.npz")


def test_images_that_cannot_be_are_refused(program, folder, tmp_path):
    assert "does not exist. Name a folder of images" in refused(program, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "holds no images (" in refused(program, tmp_path / "empty")
    assert "2 numbers were given to normalise 3 channels" in refused(program, folder, mean=[0, 1])
    assert "must be positive" in refused(program, folder, std=[1, 0, 1])
    assert "must be finite" in refused(program, folder, mean=[float("nan")])
    broken = folder / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken\.png cannot be read as an image"):
        predict(program, folder)


def test_a_program_that_takes_no_images_says_what_it_takes(tmp_path):
    program = make((2, 4, 4), nn.Conv2d(2, 2, 3))
    message = refused(program, tmp_path)
    assert "shape [2, 4, 4], which are no images of 1 or 3 channels" in message
    assert "float32 [N, 2, 4, 4] in a .npy file" in message


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


def test_the_command_prints_a_line_per_input_and_writes_the_outputs(path, program, folder, pixels):
    out = folder.parent / "new" / "predictions.npy"
    ran = intact_("run", path, folder, "-o", out, "--engine", "torch", "--threads", 1)
    assert ran.code == 0, ran.err
    expected = program.run(to_input(pixels[ORDER]))
    assert np.array_equal(np.load(out), expected)
    lines = [line.split() for line in ran.out.splitlines()]
    assert lines[0] == ["input", "class", "output"]
    for line, name, row in zip(lines[1:], NAMES, expected, strict=False):
        assert line == [name, str(row.argmax()), f"{row.max():.4g}"]
    assert ran.out.splitlines()[-1] == f"{out}  all outputs of 5 inputs"


def test_a_normalisation_that_nobody_gave_is_said(path, folder):
    """Another one gives other classes, and nothing in the outputs would tell."""
    assert "warning: pixels were normalised with mean 0.5" in intact_("run", path, folder).err
    given = intact_("run", path, folder, "--mean", "0.5", "--std", "0.5")
    assert (given.code, given.err) == (0, "")


def test_json_goes_to_standard_output(path, program, folder, pixels):
    ran = intact_("run", path, folder / "z.png", "--json", "--mean", "0.5,0.5,0.5", "--std", "0.5")
    assert ran.code == 0, ran.err
    expected = program.run(to_input(pixels[4:]))[0]
    assert json.loads(ran.out) == [
        {"input": "z.png", "class": int(expected.argmax()), "output": expected.tolist()}
    ]


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "auto"])
def test_all_engines_give_the_same_outputs(path, program, folder, pixels, engine):
    ran = intact_("run", path, folder, "--json", "--engine", engine)
    if ran.code:
        pytest.skip(ran.err.strip())
    expected = program.run(to_input(pixels[ORDER]), engine="reference")
    assert np.array_equal([p["output"] for p in json.loads(ran.out)], expected)


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
        (["none"], 1, "none does not exist"),
        (["x.npy"], 1, "x.npy cannot be read as an array"),
        ([".", "-o", "p.txt"], 1, "its name must end in .csv, .json, .npy or .npz"),
        ([".", "-o", "/dev/null/p.csv"], 1, "/dev/null is a file, not a folder"),
        ([".", "--mean", "gray"], 2, "--mean takes numbers with commas between them, not 'gray'"),
        ([".", "--std", "0.5,0.5"], 1, "2 numbers were given to normalise 3 channels"),
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
