"""The command line: what it leaves, prints and returns, and how it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import intact
from cli_harness import FILES, STAGES, Ran, intact_
from intact import training
from intact.data import load_dataset, to_input
from intact.data.carried import carried_by
from intact.recipe import PRESETS
from intact.zoo import LeNet


def process(*arguments: object, **options) -> subprocess.CompletedProcess:
    code = "from intact.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Iterator[tuple[Path, Ran]]:
    """The one full run that most tests look at; paths in its command are relative."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("demo"))
    ran = intact_("lenet", "--calibration", 100, "-o", "runs/demo")
    yield Path("runs/demo").absolute(), ran
    os.chdir(before)


@pytest.fixture(scope="module")
def results(demo) -> dict:
    return json.loads((demo[0] / "results.json").read_text(encoding="utf-8"))


def paint(root: Path, classes: int, images: int = 5) -> Path:
    """A tree of tiny images, one folder per class."""
    rng = np.random.default_rng(0)
    for label in range(classes):
        (root / f"class{label:02}").mkdir(parents=True)
        for i in range(images):
            pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(root / f"class{label:02}" / f"{i}.png")
    return root


# -- lenet ---------------------------------------------------------------------------------------


def test_lenet_leaves_exactly_five_files_and_no_noise(demo):
    folder, ran = demo
    assert ran.code == 0
    assert ran.err == ""  # no progress bar where there is no terminal
    assert sorted(path.name for path in folder.iterdir()) == FILES


def test_lenet_prints_the_table_of_stages_in_80_columns(demo, results):
    lines = demo[1].out.splitlines()
    assert lines[0] == "LeNet (bias on the last layer) on digits, recipe default"
    table = lines[2:8]
    assert [line.split()[0] for line in table] == ["stage", *STAGES]
    for line, stage in zip(table[1:], results["stages"], strict=True):
        assert f"{100 * stage['accuracy']:.1f} %" in line
    assert max(map(len, lines)) <= 80
    assert lines[-1].startswith("runs/demo/report.html")


def test_results_have_every_stage_in_full(results):
    assert [stage["name"] for stage in results["stages"]] == STAGES
    for stage in results["stages"]:
        assert set(stage) >= {
            "name", "correct", "total", "accuracy", "interval", "flips_to_wrong",
            "flips_to_right", "p_value", "difference", "difference_interval", "agreement",
        }  # fmt: skip
        assert stage["total"] == 500
        assert stage["accuracy"] == stage["correct"] / 500
        low, high = stage["interval"]
        assert low < stage["accuracy"] < high
        gained = stage["flips_to_right"] - stage["flips_to_wrong"]
        assert gained == stage["correct"] - results["stages"][0]["correct"]
        assert len(stage["difference_interval"]) == 2


def test_results_have_every_layer_in_full(results):
    statistics = {"min", "max", "mean", "std", "three_sigma", "outlier_fraction"}
    statistics |= {"clipped_fraction", "scale", "zero_point"}
    assert [layer["name"] for layer in results["layers"]] == [
        "conv1", "pool1", "conv2", "pool2", "fc1", "fc2", "fc3",
    ]  # fmt: skip
    weighted = []
    for layer in results["layers"]:
        assert set(layer) >= {"activation", "weight", "accumulator_bits", "macs", "sqnr_db"}
        assert set(layer["activation"]) >= statistics
        if layer["weight"] is not None:
            weighted.append(layer["name"])
            assert set(layer["weight"]) >= statistics
            assert layer["accumulator_bits"] > 8
            assert layer["macs"] > 0
    assert weighted == ["conv1", "conv2", "fc1", "fc2", "fc3"]


def test_results_say_what_they_are_about(demo, results):
    data = (demo[0] / "program.safetensors").read_bytes()
    assert results["program"]["sha256"] == hashlib.sha256(data).hexdigest()
    assert results["program"]["bytes"] == len(data)
    tensors = load_file(demo[0] / "float.safetensors")
    assert results["program"]["float_bytes"] == sum(4 * t.numel() for t in tensors.values())
    assert results["recipe"] == PRESETS["default"].to_dict()
    assert results["data"]["name"] == "digits"
    assert results["data"]["calibration"] == 100
    assert results["seed"] == 0
    assert {"intact", "torch", "numpy", "python"} <= set(results["versions"])
    assert isinstance(results["diagnosis"], list)
    assert results["command"] == (
        "intact lenet --data digits --bias last --recipe default --calibration 100 --seed 0 "
        "-o runs/demo"
    )


def test_predictions_have_the_accuracy_that_the_results_state(demo, results):
    labels = load_dataset("digits").test_labels
    with np.load(demo[0] / "predictions.npz", allow_pickle=False) as predictions:
        assert predictions.files == STAGES
        for stage in results["stages"]:
            predicted = predictions[stage["name"]]
            assert predicted.dtype == np.int64
            assert predicted.shape == (500,)
            assert int((predicted == labels).sum()) == stage["correct"]


def test_the_stated_command_makes_the_same_bytes_and_json(demo, results, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = intact_(*results["command"].split()[1:], "--json")
    assert (ran.code, ran.err) == (0, "")
    assert json.loads(ran.out) == results
    for name in FILES:
        assert (tmp_path / "runs/demo" / name).read_bytes() == (demo[0] / name).read_bytes(), name


def test_lenet_takes_a_recipe_file_and_images_and_weights_of_ones_own(demo, tmp_path):
    (tmp_path / "mine.toml").write_text('name = "mine"\n[layers."fc*".weights]\nbits = 4\n')
    data = paint(tmp_path / "my [images]", classes=3)
    out = tmp_path / "out [1]" / "[bold]"
    out.mkdir(parents=True)
    (out / "results.json").write_text("left by another run")
    ran = intact_(
        "lenet", "--data", "folder", "--data-dir", data, "--recipe", tmp_path / "mine.toml",
        "--weights", demo[0] / "float.safetensors", "-o", out,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert f"images of {data}" in ran.out.replace("\n", "")  # no brackets lost as markup
    assert f"{out}/report.html" in ran.out
    report = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert report["recipe"]["name"] == "mine"
    assert report["data"]["calibration"] == report["data"]["train"] == 12  # all there are
    weighted = [layer for layer in report["layers"] if layer["weight"]]
    assert [layer["weight"]["bits"] for layer in weighted] == [8, 8, 4, 4, 4]
    program = intact.load(out / "program.safetensors")
    assert np.abs(program.parameters["fc1.weight"]).max() <= 8


# -- training ------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch):
    """Trainings of two epochs with large batches."""
    brief = training.Schedule(epochs=2, batch_size=128, learning_rate=0.05)
    monkeypatch.setattr(training, "BEST_DIGITS", brief)
    monkeypatch.setattr(training, "BEST", brief)


def test_train_writes_weights_that_lenet_takes(short, tmp_path):
    file = tmp_path / "new" / "w.safetensors"
    ran = intact_("train", "lenet", "--bias", "none", "--seed", 3, "-o", file)
    assert ran.code == 0, ran.err
    assert re.fullmatch(r"\d+\.\d\d% on 500 test images", ran.out.removeprefix(f"{file}: ").strip())
    assert os.listdir(file.parent) == ["w.safetensors"]  # noqa: PTH208
    out = tmp_path / "out"
    ran = intact_(
        "lenet", "--bias", "none", "--weights", file, "--calibration", 10, "-o", out,
        "--recipe", "lab", "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    trained, used = load_file(file), load_file(out / "float.safetensors")
    assert all(torch.equal(used[name], trained[name]) for name in trained)
    stages = json.loads(ran.out)["stages"]
    assert [stage["name"] for stage in stages] == [s for s in STAGES if s != "bias-unscaled"]

    again = tmp_path / "again"
    ran = intact_(
        "lenet", "--bias", "none", "--train", "--seed", 3, "--calibration", 10, "-o", again,
        "--recipe", "lab",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert sorted(path.name for path in again.iterdir()) == FILES
    for name in ("float.safetensors", "predictions.npz", "program.safetensors"):
        assert (again / name).read_bytes() == (out / name).read_bytes()


def test_an_interrupted_training_goes_on_with_resume(short, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    assert intact_("train", "lenet", "-o", whole).code == 0
    epoch = training._Run.epoch

    def interrupted(self, number, progress):
        if number == 1:
            raise KeyboardInterrupt
        epoch(self, number, progress)

    with monkeypatch.context() as patched:
        patched.setattr(training._Run, "epoch", interrupted)
        ran = intact_("train", "lenet", "-o", parts)
    assert ran.code == 130
    assert ran.err == "\ninterrupted; --resume goes on after the last full epoch\n"
    assert ran.out == ""
    assert not parts.exists()
    assert (tmp_path / "parts.safetensors.checkpoint").is_file()
    ran = intact_("train", "lenet", "-o", parts, "--resume", "--json")
    assert ran.code == 0, ran.err
    facts = json.loads(ran.out)
    assert facts["accuracy"] == facts["correct"] / facts["total"]
    assert facts["path"] == str(parts)
    ours, theirs = load_file(parts), load_file(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_train_refuses_a_folder_as_its_file_before_it_trains(tmp_path):
    ran = intact_("train", "lenet", "-o", tmp_path)
    assert ran.code == 1
    assert f"{tmp_path} is a folder. Name a file in it" in ran.err


# -- inspect, evaluate, report -------------------------------------------------------------------


def test_inspect_shows_every_op_in_full(demo):
    path = demo[0] / "program.safetensors"
    ran = intact_("inspect", path)
    assert (ran.code, ran.err) == (0, "")
    program = intact.load(path)
    assert program.sha256 in ran.out
    assert "…" in ran.out.split("conv1")[1].split("pool1")[0]  # a range of multipliers
    assert "images: resized to 32×32 (bilinear), RGB, mean 0.5, std 0.5" in ran.out
    lines = ran.out.splitlines()[-9:]
    assert max(map(len, lines)) <= 80
    names = [program.input, *(op.name for op in program.ops)]
    for line, name in zip(lines, names, strict=True):
        cells = line.split()
        assert cells[0] == name
        assert cells[2] == "×".join(map(str, program.tensors[name].shape))
        assert cells[3] == program.tensors[name].qparams.type_name


def test_inspect_as_json_holds_what_the_program_says(demo):
    path = demo[0] / "program.safetensors"
    ran = intact_("inspect", path, "--json")
    facts = json.loads(ran.out)
    program = intact.load(path)
    assert facts["sha256"] == program.sha256
    assert facts["bytes"] == path.stat().st_size
    assert facts["info"] == dict(program.info)
    assert facts["images"] == carried_by(program).words()
    assert [op["name"] for op in facts["ops"]] == [op.name for op in program.ops]
    for op in facts["ops"]:
        grid = program.tensors[op["name"]].qparams
        assert (op["scale"], op["zero_point"]) == (grid.scale[0], grid.zero_point)
        if "multiplier" in op:
            stored = program.parameters[f"{op['name']}.multiplier"]
            assert op["multiplier"] == stored.tolist()


@pytest.mark.parametrize("engine", ["auto", "reference", "torch"])
def test_evaluate_finds_what_the_integer_stage_found(demo, results, engine):
    path = demo[0] / "program.safetensors"
    ran = intact_("evaluate", path, "--data", "digits", "--engine", engine, "--json")
    assert (ran.code, ran.err) == (0, "")
    integer = results["stages"][-1]
    digits = load_dataset("digits")
    inputs = hashlib.sha256(to_input(digits.test_images).tobytes()).hexdigest()
    labels = hashlib.sha256(digits.test_labels.astype("<i8").tobytes()).hexdigest()
    assert json.loads(ran.out) == {
        "program": results["program"]["sha256"],
        "data": {"name": "digits, test images", "sha256": {"test": inputs, "labels": labels}},
        "engine": engine,
        **{key: integer[key] for key in ("correct", "total", "accuracy", "interval")},
    }


def test_evaluate_says_so_in_words(demo, results):
    correct = results["stages"][-1]["correct"]
    ran = intact_("evaluate", demo[0] / "program.safetensors", "--data", "digits")
    assert ran.out.startswith(f"{correct / 5:.1f} % ({correct} of 500), 95 % interval ")


def test_report_draws_the_same_page_again(demo, results, tmp_path):
    for name in ("results.json", "report.html"):
        (tmp_path / name).write_bytes((demo[0] / name).read_bytes())
    (tmp_path / "report.html").write_text("damaged")
    ran = intact_("report", tmp_path)
    assert (ran.code, ran.err) == (0, "")
    assert (tmp_path / "report.html").read_bytes() == (demo[0] / "report.html").read_bytes()
    assert ran.out.splitlines()[:8] == demo[1].out.splitlines()[:8]
    ran = intact_("report", tmp_path, "--json")
    assert ran.out == (tmp_path / "results.json").read_text(encoding="utf-8")


def test_report_opens_the_page_where_it_is(demo, monkeypatch):
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert intact_("report", demo[0], "--open").code == 0
    assert opened == [(demo[0] / "report.html").as_uri()]


# -- errors --------------------------------------------------------------------------------------


def refused(message: str, *arguments: object) -> None:
    """Exit status 1, one message, and nothing on standard output."""
    ran = intact_(*arguments)
    assert ran.code == 1
    assert ran.out == ""
    assert ran.err.startswith("error: ")
    assert "Traceback" not in ran.err
    assert re.search(message, ran.err, re.DOTALL), ran.err


@pytest.mark.parametrize("command", ["inspect", "evaluate"])
@pytest.mark.parametrize("damage", ["bit", "truncated", "empty", "missing", "folder"])
def test_a_damaged_program_is_refused(demo, tmp_path, command, damage):
    path = tmp_path / "p.safetensors"
    data = bytearray((demo[0] / "program.safetensors").read_bytes())
    if damage == "bit":
        data[-100] ^= 4
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(data[: {"truncated": 5000, "empty": 0}.get(damage, len(data))])
    data = ["--data", "digits"] if command == "evaluate" else []
    refused(rf"{path}", command, path, *data)


def test_data_that_does_not_fit_a_program_is_refused(tmp_path):
    torch.manual_seed(0)
    small = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    path = tmp_path / "small.safetensors"
    intact.quantize(small, [torch.randn(8, 3, 2, 2)]).save(path)
    refused(
        "tells 3 classes apart, but digits, test images has 10. Evaluate it on",
        "evaluate", path, "--data", "digits",
    )  # fmt: skip
    np.savez(tmp_path / "x.npz", x=np.zeros((3, 3, 32, 32), np.float32), y=np.arange(3))
    refused(
        r"holds samples of shape \[3, 32, 32\], but the network takes \[3, 2, 2\]",
        "evaluate", path, "--data", tmp_path / "x.npz",
    )  # fmt: skip


@pytest.mark.parametrize("damage", ["missing", "text", "number", "other", "latin-1"])
def test_a_damaged_results_file_is_refused_and_the_page_stays(results, tmp_path, damage):
    (tmp_path / "report.html").write_text("the page")
    path = tmp_path / "results.json"
    if damage == "text":
        path.write_text("{")
    if damage == "number":
        path.write_text(json.dumps({**results, "seed": "seven"}))
    if damage == "other":
        path.write_text("[1, 2]")
    if damage == "latin-1":
        path.write_bytes(b'{"title": "\xe9"}')
    refused("results.json|JSON|report.seed", "report", tmp_path)
    assert (tmp_path / "report.html").read_text() == "the page"


def weights(path: Path, bias: str, value: float | None = None) -> Path:
    torch.manual_seed(0)
    state = LeNet(bias).state_dict()
    if value is not None:
        state["fc1.weight"][0, 0] = value
    save_file(state, path)
    return path


BAD_LENET = {
    "digits elsewhere": ("leave the data folder out", "--data-dir", "."),
    "no images": ("'folder' needs a data folder", "--data", "folder"),
    "empty images": ("holds no folders", "--data", "folder", "--data-dir", "empty"),
    "no cifar": (
        "empty holds neither data_batch_1.bin nor a folder cifar-10-batches-bin",
        "--data", "cifar10",
    ),
    "cifar elsewhere": ("nowhere holds neither", "--data", "cifar10", "--data-dir", "nowhere"),
    "12 classes": (
        "tells 10 classes apart, but folder has 12. Leave classes out",
        "--data", "folder", "--data-dir", "twelve", "--weights", "last.safetensors",
    ),
    "no weights for images": (
        "no trained LeNet is shipped for data 'folder'.*Train one",
        "--data", "folder", "--data-dir", "twelve",
    ),
    "other bias": (
        "with bias 'none': fc3.bias is not",
        "--bias", "none", "--weights", "last.safetensors",
    ),
    "missing bias": ("conv1.bias is missing", "--bias", "all", "--weights", "last.safetensors"),
    "NaN weights": ("fc1.weight holds NaN", "--weights", "nan.safetensors"),
    "no weights": ("nowhere.safetensors cannot be read", "--weights", "nowhere.safetensors"),
    "no weights at all": ("typo.toml cannot be read as", "--weights", "typo.toml"),
    "no recipe": ("'labs' is neither a preset", "--recipe", "labs"),
    "typo": (r"typo.toml: \[weights\]: unknown key 'bit'; the keys are", "--recipe", "typo.toml"),
    "no TOML": ("broken.toml is not valid TOML", "--recipe", "broken.toml"),
    "no such layer": ("'conv9', but no layer matches it", "--recipe", "conv9.toml"),
    "out is a file": ("typo.toml is a file, not a folder", "-o", "typo.toml"),
    "out is in a file": ("typo.toml is a file, not a folder", "-o", "typo.toml/deep/er"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> Path:
    """A folder with everything that `BAD_LENET` names."""
    root = tmp_path_factory.mktemp("bad")
    (root / "empty").mkdir()
    paint(root / "twelve", classes=12)
    weights(root / "last.safetensors", "last")
    weights(root / "nan.safetensors", "last", np.nan)
    (root / "typo.toml").write_text("[weights]\nbit = 4\n")
    (root / "broken.toml").write_text("[weights\n")
    (root / "conv9.toml").write_text("[layers.conv9.weights]\nbits = 4\n")
    return root


@pytest.mark.parametrize("case", BAD_LENET)
def test_lenet_refuses_bad_input_and_leaves_nothing(case, bad, monkeypatch):
    monkeypatch.chdir(bad)
    monkeypatch.setenv("INTACT_DATA_DIR", "empty")  # so that nothing is downloaded
    before = sorted(bad.rglob("*"))
    message, *arguments = BAD_LENET[case]
    out = [] if "-o" in arguments else ["-o", "out"]
    refused(message, "lenet", *arguments, *out)
    assert sorted(bad.rglob("*")) == before


def test_a_read_only_folder_is_refused_before_the_run(tmp_path, monkeypatch):
    # Root may write anywhere, so the system is asked in a way that a test can answer.
    monkeypatch.setattr("os.access", lambda path, _mode: Path(path) != tmp_path)
    refused(f"the folder {tmp_path} is read-only. Choose", "lenet", "-o", tmp_path / "a" / "b")


def test_a_folder_that_cannot_be_made_is_refused(bad):
    refused(
        "typo.toml/x cannot be made: .*directory", "train", "lenet", "-o", bad / "typo.toml/x/w"
    )


@pytest.mark.parametrize(
    ("said", "arguments"),
    [
        ("No such command 'lenett'", ["lenett"]),
        ("No such option", ["lenet", "--recipes", "lab"]),
        ("'mnist' is not one of 'digits', 'cifar10'", ["lenet", "--data", "mnist"]),
        ("'first' is not one of 'none', 'last', 'all'", ["lenet", "--bias", "first"]),
        ("Invalid value for '--calibration'", ["lenet", "--calibration", "0"]),
        ("Invalid value for '--calibration'", ["lenet", "--calibration", "many"]),
        ("Invalid value for '--seed'", ["lenet", "--seed", "-1"]),
        ("give one", ["lenet", "--train", "--weights", "w.safetensors"]),
        ("'fast' is not one of", ["train", "lenet", "--schedule", "fast"]),
        ("'gpu' is not one of", ["evaluate", "p.safetensors", "--engine", "gpu"]),
        ("Missing option '--data'", ["evaluate", "p.safetensors"]),
        ("Missing argument", ["inspect"]),
        ("unexpected extra argument", ["inspect", "a", "b"]),
    ],
)
def test_wrong_usage_is_status_2(said, arguments):
    ran = intact_(*arguments)
    assert (ran.code, ran.out) == (2, "")
    plain = " ".join(re.sub(r"[│╭╮╰╯─]", " ", ran.err).split())
    assert said in plain
    assert "Traceback" not in ran.err


def test_ctrl_c_is_status_130(tmp_path, monkeypatch):
    def interrupt(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("intact.data.load_dataset", interrupt)
    assert intact_("lenet", "-o", tmp_path / "out") == Ran(130, "", "")
    assert not (tmp_path / "out").exists()


# -- help ----------------------------------------------------------------------------------------

COMMANDS = [
    [], ["lenet"], ["train"], ["train", "lenet"], ["train", "resnet20"], ["inspect"], ["evaluate"],
    ["run"], ["bench"], ["report"], ["export"], ["certify"], ["quantize"],
    ["check"], ["zoo"],
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_fits_80_columns_and_describes_every_option(command):
    ran = intact_(*command, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert f"Usage: intact {' '.join(command)}".strip() in ran.out
    assert max(map(len, ran.out.splitlines())) <= 80
    for line in ran.out.splitlines():
        if re.match(r"│ (\*  )? *--", line):
            assert re.search(r"[a-z]{3,}", line[40:]), line


def test_the_version_is_shown():
    assert intact_("--version") == Ran(0, f"intact {intact.__version__}\n", "")


# -- as a process of its own ---------------------------------------------------------------------


def test_the_command_line_starts_without_what_only_some_commands_need():
    code = "import sys, intact.cli; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(ran.stdout.split())
    assert "intact.cli.quantize" in loaded
    assert not loaded & {"torch", "numpy", "scipy", "sklearn", "jinja2", "PIL", "safetensors"}


def test_an_error_is_one_line_on_standard_error(tmp_path):
    ran = process("inspect", tmp_path / "none.safetensors")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert re.fullmatch(r"error: cannot read .*none.safetensors does not exist.*\n", ran.stderr)


def test_the_warning_of_an_engine_is_one_line_on_standard_error(demo, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((1, 3, 32, 32), np.float32))
    nowhere = dict.fromkeys(["PATH", "HOME", "XDG_CACHE_HOME"], str(tmp_path))
    environment = {**os.environ, **nowhere, "CC": ""}  # no compiler, and nothing compiled before
    ran = process("run", demo[0] / "program.safetensors", tmp_path / "x.npy", env=environment)
    assert ran.returncode == 0, ran.stderr
    if not ran.stderr:
        pytest.skip("the package ziglang brings a compiler")
    assert re.fullmatch(r"warning: running on the engine 'reference', .*\n", ran.stderr)


def test_an_encoding_that_lacks_a_character_is_no_error(demo):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ran = process("inspect", demo[0] / "program.safetensors", env=environment)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert r"3\xd732\xd732" in ran.stdout
