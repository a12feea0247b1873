"""The front door: `quantize` and `stages`, what they take, and how they refuse everything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import intact
from intact.calibrate import calibrate
from intact.capturing import capture
from intact.choose import align, choose_qparams
from intact.errors import IntactError
from intact.lower import lower
from intact.pipeline import quantize_network
from intact.recipe import PRESETS, Recipe, WeightRecipe


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(144, 5)
    )


X = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    Y = net().eval()(X).argmax(1)


def changed(index: tuple[int, ...], value: float) -> torch.Tensor:
    x = X.clone()
    x[index] = value
    return x


# -- quantize ------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["default", "lab"])
def test_quantize_is_its_steps_one_after_the_other(recipe):
    network = align(capture(net(), X))
    qparams = choose_qparams(network, calibrate(network, [X]), PRESETS[recipe])
    steps = lower(network, qparams, PRESETS[recipe], {"recipe": PRESETS[recipe].to_toml()})
    assert intact.quantize(net(), [X], recipe) == steps
    assert intact.quantize(net(), [X + 1], recipe) != steps


def test_the_program_computes_what_the_module_computes_up_to_noise():
    model = net().eval()
    program = intact.quantize(model, [X])
    with torch.no_grad():
        reference = model(X).numpy()
    got = program.run(X)
    assert got.dtype == np.float32
    assert np.abs(got - reference).max() < 0.05 * np.abs(reference).max()
    scale = program.tensors[program.output].qparams
    assert np.array_equal(
        got, (program.codes(X).astype(np.float32) - scale.zero_point) * np.float32(scale.scale[0])
    )


@pytest.mark.parametrize(
    "batches",
    [
        [X[:7], X[7:8], X[8:]],
        [X[8:], X[:8]],
        [X.numpy()],
        [X.double()],
        [X.numpy().astype(np.float64)],
        [(X, Y)],
        [[X, Y]],
        [(X, Y, "a third thing")],
        ((X[i : i + 5], None) for i in range(0, 24, 5)),
        DataLoader(TensorDataset(X, Y), batch_size=5),
        [X.clone().requires_grad_()],
    ],
    ids=lambda batches: type(batches).__name__,
)
def test_batches_may_be_of_any_kind_and_size(batches):
    assert intact.quantize(net(), batches) == intact.quantize(net(), [X])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_data_of_half_precision_is_taken_at_its_values(dtype):
    half = X.to(dtype)
    assert intact.quantize(net(), [half]) == intact.quantize(net(), [half.float()])


def test_the_module_is_left_as_it_was():
    model = net()
    model[2].eval()  # a mix: some modules train, some do not
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    intact.quantize(model, [X])
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_recipe_is_a_name_a_file_or_a_value(tmp_path):
    recipe = Recipe(name="mine", weights=WeightRecipe(bits=5))
    path = tmp_path / "mine.toml"
    path.write_text(recipe.to_toml(), encoding="utf-8")
    by_value = intact.quantize(net(), [X], recipe)
    assert by_value == intact.quantize(net(), [X], path) == intact.quantize(net(), [X], str(path))
    assert by_value != intact.quantize(net(), [X])
    assert Recipe.from_toml(by_value.info["recipe"]) == recipe


def test_an_override_that_matches_nothing_is_found_before_calibration():
    def never() -> Any:
        raise AssertionError("calibration has begun")
        yield X

    recipe = Recipe.from_toml('[layers."conv9".weights]\nbits = 4\n')
    with pytest.raises(IntactError, match=r"'conv9', but no layer matches it.*The layers are: 0"):
        quantize_network(capture(net(), X), never(), recipe)


# -- stages --------------------------------------------------------------------------------------


def test_stages_measures_the_program_that_quantize_makes():
    stages = intact.stages(net(), [X], [(X[:10], Y[:10]), (X[10:], Y[10:])])
    assert stages.program == intact.quantize(net(), [X])
    assert [r.name for r in stages] == [
        "float", "weights", "activations", "bias-unscaled", "integer",
    ]  # fmt: skip
    assert stages["float"].correct == 24  # the labels are what the module says
    codes = stages.program.codes(X, "reference")
    assert np.array_equal(stages.predictions["integer"], codes.argmax(1))
    assert stages["integer"].correct == int((codes.argmax(1) == Y.numpy()).sum())


def test_test_data_of_the_wrong_kind_is_found_before_calibration():
    def never() -> Any:
        raise AssertionError("calibration has begun")
        yield X

    with pytest.raises(IntactError, match="the test data must be an iterable of batches"):
        intact.stages(net(), never(), X)


# -- bad input -----------------------------------------------------------------------------------

HALF = r"0.weight, 0.bias, 4.weight, 4.bias: torch.float16, not float32: call .float\(\)"
MODELS = {
    "function": (lambda: torch.relu, "capture takes a torch.nn.Module, not"),
    "class": (lambda: nn.ReLU, "capture takes a torch.nn.Module, not type"),
    "state dict": (lambda: net().state_dict(), "a torch.nn.Module, not OrderedDict"),
    "half": (lambda: net().half(), HALF),
    "unsupported": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
        "batch_norm",
    ),
}
NO_BATCH = "calibration batch 0: a batch is a tensor or an array, or a pair of one and labels, not"
DATA = {
    "none": (lambda: None, "must be an iterable of batches, not a NoneType. Give a list"),
    "number": (lambda: 5, "must be an iterable of batches, not a int. Give a list"),
    "text": (lambda: "data", "must be an iterable of batches, not a str. Give a list"),
    "dict": (lambda: {"train": X}, "must be an iterable of batches, not a dict. Give a list"),
    "tensor": (lambda: X, "not a Tensor. Put it in a list: that is one batch"),
    "array": (X.numpy, "not a ndarray. Put it in a list: that is one batch"),
    "dataset": (lambda: TensorDataset(X, Y), "single samples: wrap it in a DataLoader"),
    "empty": (list, "no calibration data: the iterable of batches is empty. Give at least one"),
    "empty loader": (lambda: DataLoader(TensorDataset(X[:0])), "no calibration data"),
    "batch of none": (lambda: [None], f"{NO_BATCH} a NoneType"),
    "batch of dict": (lambda: [{"image": X}], f"{NO_BATCH} a dict"),
    "batch of lists": (lambda: [X.tolist()], f"{NO_BATCH} a list"),
    "batch of nothing": (lambda: [()], f"{NO_BATCH} a tuple"),
    "later dict": (lambda: [X, {"image": X}], "calibration batch 1: a batch is a tensor"),
    "integers": (lambda: [X.int()], "batch 0: the images are torch.int32. Give them as float32"),
    "pixels": (lambda: [X.numpy().astype(np.uint8)], "torch.uint8. Give them as float32"),
    "words": (lambda: [X, np.array(["a"])], "batch 1: the images are an array of <U1"),
    "sparse": (lambda: [X.to_sparse()], "batch 0: the images are sparse"),
    "no images": (lambda: [X[:0]], "calibration batch 0: it holds no images"),
    "one image": (lambda: [X, X[0]], "batch 1.*Put it in a list: that is one image"),
    "other size": (lambda: [X, X[..., :7]], r"batch 1: its shape is \[24, 3, 8, 7\], but the net"),
    "other channels": (lambda: [X[:, :1]], r"the example's shape, \[1, 8, 8\]:\s.*3 channels"),
    "NaN": (lambda: [X, changed((3, 1, 2, 2), np.nan)], "batch 1: tensor 'input' holds 1 NaN"),
    "infinity": (lambda: [changed((3, 1, 2, 2), -np.inf)], "batch 0: tensor 'input' .* 1 inf"),
    "huge": (lambda: [X.clamp(-3, 3) * 1e38], "the scale of tensor .input. must lie within"),
}
RECIPES = {
    "none": (lambda: None, "a recipe is the name of a preset .default, lab., .* not a NoneType"),
    "dict": (lambda: {"grid": "float"}, "not a dict"),
    "class": (lambda: Recipe, "not a type"),
    "typo": (lambda: "defualt", "'defualt' is neither a preset .default, lab. nor a readable TOML"),
    "no path": (lambda: "a\0b", "neither a preset"),
}


def refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(IntactError, match=f"(?s){message}"):
        call()


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_cannot_be_captured_is_refused(case):
    make, message = MODELS[case]
    refused(lambda: intact.quantize(make(), [X]), message)


def test_nan_weights_are_refused():
    model = net()
    model[0].weight.data[0, 0, 0, 0] = np.nan
    refused(lambda: intact.quantize(model, [X]), "0.weight: NaN or infinite")


@pytest.mark.parametrize("case", DATA)
def test_bad_calibration_data_is_refused(case):
    make, message = DATA[case]
    refused(lambda: intact.quantize(net(), make()), message)


@pytest.mark.parametrize("case", RECIPES)
def test_what_is_no_recipe_is_refused(case):
    make, message = RECIPES[case]
    refused(lambda: intact.quantize(net(), [X], make()), message)


TEST_DATA = {
    "none": (lambda: None, "the test data must be an iterable of batches, not a NoneType"),
    "empty": (list, "there is no test data"),
    "no labels": (lambda: [X], "a test batch is a pair"),
    "dict": (lambda: [{"image": X, "label": Y}], "a test batch is a pair"),
    "few labels": (lambda: [(X, Y[:3])], "24 samples came with labels of shape"),
    "float labels": (lambda: [(X, Y.float())], "labels must be integers"),
    "label too large": (lambda: [(X, Y + 5)], "but the network has 5 outputs"),
    "integers": (lambda: [(X.int(), Y)], "test inputs are torch.int32"),
    "NaN": (lambda: [(changed((3, 1, 2, 2), np.nan), Y)], r"NaN at index \(3, 1, 2, 2\)"),
    "shape": (lambda: [(X[..., :7], Y)], r"\[N, 3, 8, 8\], not \[24, 3, 8, 7\]"),
}


@pytest.mark.parametrize("case", TEST_DATA)
def test_bad_test_data_is_refused(case):
    make, message = TEST_DATA[case]
    refused(lambda: intact.stages(net(), [X], make(), "lab"), message)


@pytest.fixture(scope="module")
def program() -> intact.Program:
    return intact.quantize(net(), [X])


INPUTS = {
    "none": (lambda: None, "the input is object. Give float32 values, or codes as int8"),
    "text": (lambda: "abc", "Give float32 values, or codes as int8"),
    "dict": (lambda: {"x": X}, "the program has no input 'x'; it has 'input'"),
    "pair": (lambda: (X, Y), "the input is no array: .* Give an array or a CPU tensor"),
    "ragged": (lambda: [[1.0], [1.0, 2.0]], "the input is no array"),
    "graph": (lambda: X.clone().requires_grad_(), r"Use tensor.detach\(\)"),
    "bfloat16": (X.bfloat16, "BFloat16. Give an array or a CPU tensor of float32"),
    "int64": (X.long, "the input is int64. Give float32 values, or codes as int8"),
    "uint8": (X.byte, "the input is uint8. Give float32 values, or codes as int8"),
    "bool": (lambda: X > 0, "the input is bool"),
    "complex": (lambda: X.numpy().astype(np.complex64), "the input is complex64"),
    "one image": (lambda: X[0], r"batches of shape \[N, 3, 8, 8\], not \[3, 8, 8\]"),
    "number": (lambda: 1.0, r"batches of shape \[N, 3, 8, 8\], not \[\]"),
    "other size": (lambda: X[..., 1:], r"\[N, 3, 8, 8\], not \[24, 3, 8, 7\]"),
    "codes of another size": (X[..., 1:].char, r"int8 of shape \[N, 3, 8, 8\]"),
    "NaN": (lambda: changed((3, 1, 2, 2), np.nan), r"NaN at index \(3, 1, 2, 2\)"),
}


@pytest.mark.parametrize("method", ["run", "codes"])
@pytest.mark.parametrize("case", INPUTS)
def test_a_program_refuses_bad_input(program, method, case):
    make, message = INPUTS[case]
    refused(lambda: getattr(program, method)(make()), message)


@pytest.mark.parametrize("engine", ["gpu", None, ""])
def test_a_program_refuses_an_unknown_engine(program, engine):
    refused(lambda: program.run(X, engine), "there is no engine .*; choose one of auto, native")


def test_a_program_takes_empty_batches_and_infinities(program):
    assert program.run(X[:0]).shape == (0, 5)
    largest = program.tensors[program.input].qparams
    saturated = changed((0, 0, 0, 0), largest.scale[0] * 1000)
    infinite = changed((0, 0, 0, 0), np.inf)
    assert np.array_equal(program.codes(infinite), program.codes(saturated))
