"""The lab recipe is the textbook scheme: against an implementation of it in NumPy, written from
the text (docs/design.md, "The experiment that must always work") and not from the package.

Factors are codes per unit: `n_W = 128 / max|W|`, `n_I = 128 / max|input|`. Every layer hands on an
integer that carries all factors before it, the *chain*, so `n_O = 128 / max|chain * output|`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view

import intact
from intact.data import Dataset, load_dataset, to_input
from intact.engines.reference import ReferenceEngine
from intact.engines.torch import TorchEngine
from intact.pipeline import Quantized, quantize_network
from intact.recipe import PRESETS
from intact.zoo import BIASES, LeNet, load_lenet

Array = np.ndarray[Any, Any]
LAYERS = ("conv1", "conv2", "fc1", "fc2", "fc3")
BATCH = 500
CALIBRATION = 1000
STAGES = ("float", "weights", "activations", "bias-unscaled", "integer")


# -- the textbook ----------------------------------------------------------------------------------


def linear_part(layer: str, x: Array, weight: Array) -> Array:
    """A layer without bias and ReLU.

    In the precision of `x`. Of codes float32 is exact: a sum of 400 products stays below 2**24.
    """
    weight = weight.astype(x.dtype)
    if layer.startswith("conv"):
        patches = sliding_window_view(x, (5, 5), axis=(2, 3))  # [N, C, H', W', 5, 5]
        return np.tensordot(patches, weight, ([1, 4, 5], [1, 2, 3])).transpose(0, 3, 1, 2)
    return x.reshape(len(x), -1) @ weight.T


def along(bias: Array, x: Array) -> Array:
    """The bias, shaped to be added to a layer's output."""
    return bias.reshape(-1, 1, 1) if x.ndim == 4 else bias


def after(layer: str, x: Array) -> Array:
    """Max pool 2 behind the convolutions."""
    if layer.startswith("conv"):
        n, c, h, w = x.shape
        return x.reshape(n, c, h // 2, 2, w // 2, 2).max((3, 5))
    return x


def float_outputs(parameters: dict[str, Array], x: Array) -> dict[str, Array]:
    """Every layer's output, ReLU applied, before pooling; rounded to float32 as torch's is."""
    outputs = {}
    for layer in LAYERS:
        x = linear_part(layer, x.astype(np.float64), parameters[f"{layer}.weight"])
        if f"{layer}.bias" in parameters:
            x = x + along(parameters[f"{layer}.bias"], x)
        x = (x if layer == "fc3" else np.maximum(x, 0)).astype(np.float32)
        outputs[layer] = x
        x = after(layer, x)
    return outputs


def half_up(x: Array) -> Array:
    return np.floor(x + 0.5)


@dataclass(frozen=True)
class Textbook:
    """The scheme with its factors; what is not as the text says is a mistake on purpose."""

    parameters: dict[str, Array]
    n_input: float
    n_weight: dict[str, float]
    n_output: dict[str, float]
    chain: dict[str, float]  # of a layer's accumulator: every factor before it, and its n_W
    round: Callable[[Array], Array] = np.rint
    precision: Any = np.float32  # of the product that is rounded; arithmetic.md, section 3

    @classmethod
    def calibrated(
        cls, parameters: dict[str, Array], largest: dict[str, float], codes: float = 128.0
    ) -> Textbook:
        """largest: max|input| and max|output| of every layer, over the calibration images."""
        n_weight = {
            layer: codes / float(np.abs(parameters[f"{layer}.weight"]).max()) for layer in LAYERS
        }
        n_input = codes / largest["input"]
        carried, n_output, chain = n_input, {}, {}
        for layer in LAYERS:
            chain[layer] = carried * n_weight[layer]
            n_output[layer] = codes / (largest[layer] * chain[layer])
            carried = chain[layer] * n_output[layer]
        return cls(parameters, n_input, n_weight, n_output, chain)

    def to_codes(self, x: Array) -> Array:
        return np.clip(self.round(x), -128, 127)

    def input_codes(self, x: Array) -> Array:
        return self.to_codes(x * np.float64(self.n_input))

    def weight_codes(self, layer: str) -> Array:
        return self.to_codes(self.parameters[f"{layer}.weight"] * np.float64(self.n_weight[layer]))

    def bias(self, layer: str, kind: str) -> Array | None:
        """chain: int32. exact: on the chain, not rounded. real: as trained."""
        real = self.parameters.get(f"{layer}.bias")
        if real is None:
            return None
        scaled = real * np.float64(self.chain[layer])
        return {
            "chain": np.clip(self.round(scaled), -(2**31), 2**31 - 1),
            "exact": scaled,
            "real": real.astype(np.float64),
        }[kind]

    def outputs(self, x: Array, bias: str) -> dict[str, Array]:
        """Integer codes: of the input and of every layer's output, before pooling."""
        codes = {"input": self.input_codes(x)}
        x = codes["input"]
        for layer in LAYERS:
            acc = linear_part(layer, x.astype(np.float32), self.weight_codes(layer))
            acc = acc.astype(np.float64)
            if (b := self.bias(layer, bias)) is not None:
                acc = acc + along(b, acc)
            if layer != "fc3":
                acc = np.maximum(acc, 0)
            factor = self.precision(self.n_output[layer])
            codes[layer] = self.to_codes(acc.astype(self.precision) * factor)
            x = after(layer, codes[layer])
        return codes

    def logits(self, stage: str, x: Array) -> Array:
        """The last layer's output of a stage; a positive factor does not move its argmax."""
        if stage == "float":
            return float_outputs(self.parameters, x)["fc3"]
        if stage == "weights":
            real = {layer: self.weight_codes(layer) / self.n_weight[layer] for layer in LAYERS}
            rounded = {f"{layer}.weight": w.astype(np.float32) for layer, w in real.items()}
            return float_outputs({**self.parameters, **rounded}, x)["fc3"]
        bias = {"activations": "exact", "bias-unscaled": "real", "integer": "chain"}[stage]
        return self.outputs(x, bias)["fc3"]


# -- the two side by side --------------------------------------------------------------------------
@dataclass(frozen=True)
class Both:
    """One trained network: the package's lab program, and the textbook."""

    data: Dataset
    model: LeNet
    quantized: Quantized
    book: Textbook
    calibration: list[torch.Tensor]
    test: list[tuple[torch.Tensor, Array]]


def inputs(images: Array) -> list[torch.Tensor]:
    return [torch.from_numpy(to_input(images[i : i + BATCH])) for i in range(0, len(images), BATCH)]


def largest_in_torch(model: LeNet, batches: list[torch.Tensor]) -> dict[str, float]:
    """max|t| of the input and of every layer's output behind its ReLU, as torch computes them."""
    largest = dict.fromkeys(("input", *LAYERS), 0.0)

    def see(name: str, x: torch.Tensor) -> None:
        largest[name] = max(largest[name], float(x.abs().max()))

    hooks = [
        model.get_submodule(layer).register_forward_hook(
            lambda _, __, y, layer=layer: see(layer, y if layer == "fc3" else torch.relu(y))
        )
        for layer in LAYERS
    ]
    with torch.inference_mode():
        for x in batches:
            see("input", x)
            model(x)
    for hook in hooks:
        hook.remove()
    return largest


@cache
def both(data: str, bias: str) -> Both:
    dataset = load_dataset(data)
    model = load_lenet(data, bias)  # type: ignore[arg-type]
    calibration = inputs(dataset.train_images[:CALIBRATION])
    images, labels = inputs(dataset.test_images), dataset.test_labels
    network = intact.capture(model, calibration[0])
    return Both(
        dataset,
        model,
        quantize_network(network, calibration, PRESETS["lab"]),
        Textbook.calibrated(parameters_of(model), largest_in_torch(model, calibration)),
        calibration,
        [(x, labels[i * BATCH : (i + 1) * BATCH]) for i, x in enumerate(images)],
    )


def parameters_of(model: LeNet) -> dict[str, Array]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def code_differences(quantized: Quantized, codes: dict[str, Array], x: torch.Tensor) -> list[str]:
    """The tensors in which the program's codes are not `codes`."""
    seen: dict[str, list[Array]] = {}
    engine = TorchEngine(quantized.program)
    engine(
        quantized.program.quantize_input(x.numpy()),
        lambda name, part: seen.setdefault(name, []).append(part.copy()),
    )
    seen["input"] = seen.pop(quantized.program.input)
    return [name for name in codes if not np.array_equal(np.concatenate(seen[name]), codes[name])]


@pytest.mark.parametrize("bias", BIASES)
def test_every_weight_and_bias_code_is_the_textbooks(bias):
    pair = both("digits", bias)
    for layer in LAYERS:
        ours = pair.quantized.program.parameters
        assert np.array_equal(ours[f"{layer}.weight"], pair.book.weight_codes(layer))
        wanted = pair.book.bias(layer, "chain")
        assert (f"{layer}.bias" in ours) == (wanted is not None)
        if wanted is not None:
            assert np.array_equal(ours[f"{layer}.bias"], wanted)


@pytest.mark.parametrize("bias", BIASES)
def test_the_chain_of_factors_telescopes_to_the_multiplier(bias):
    """`n_O`, computed on activations that carry the whole chain, is `M = s_x s_w / s_y`: equal.

    The scales are exact in float32, since they are a float32 divided by 128; so both ways are a
    few float64 roundings of the same number, and one rounding to float32 makes them the same.
    """
    pair = both("digits", bias)
    program, book = pair.quantized.program, pair.book
    source = program.input
    for layer in LAYERS:
        stored = program.parameters[f"{layer}.multiplier"]
        scale_x, scale_y = (program.tensors[t].qparams.scale[0] for t in (source, layer))
        scale_w = float(program.parameters[f"{layer}.weight_scale"][0])
        assert stored.dtype == np.float32
        assert stored.shape == (1,)
        assert stored[0] == np.float32(scale_x * scale_w / scale_y)
        assert stored[0] == np.float32(book.n_output[layer])
        assert book.n_output[layer] == pytest.approx(scale_x * scale_w / scale_y, rel=1e-14)
        # The chain in front of a layer's accumulator is one over its unit.
        assert book.chain[layer] == pytest.approx(1 / (scale_x * scale_w), rel=1e-14)
        source = layer


@pytest.mark.parametrize("bias", BIASES)
def test_every_code_of_every_layer_is_the_textbooks(bias):
    pair = both("digits", bias)
    for x, _ in pair.test:
        assert code_differences(pair.quantized, pair.book.outputs(x.numpy(), "chain"), x) == []


def test_the_reference_engine_gives_the_textbooks_codes_too():
    pair = both("digits", "all")
    x = pair.test[0][0][:40]
    codes = pair.book.outputs(x.numpy(), "chain")
    program = pair.quantized.program
    got = ReferenceEngine(program)(program.quantize_input(x.numpy()))
    assert np.array_equal(got, codes["fc3"])


def prediction_differences(pair: Both) -> dict[str, int]:
    """Stage -> number of test images that the textbook puts into another class."""
    stages = intact.stages(pair.model, pair.calibration, pair.test, "lab")
    wanted = [s for s in STAGES if s != "bias-unscaled" or "fc3.bias" in pair.book.parameters]
    assert list(stages.predictions) == wanted
    different = dict.fromkeys(wanted, 0)
    for i, (x, _) in enumerate(pair.test):
        for stage in wanted:
            mine = pair.book.logits(stage, x.numpy()).argmax(axis=1)
            theirs = stages.predictions[stage][i * BATCH : i * BATCH + len(mine)]
            different[stage] += int((mine != theirs).sum())
    return different


@pytest.mark.parametrize("bias", BIASES)
def test_every_stage_predicts_every_digit_as_the_textbook_does(bias):
    assert not any(prediction_differences(both("digits", bias)).values())


def test_the_textbook_calibrated_without_torch_is_the_same_to_a_few_float32_roundings():
    pair = both("digits", "all")
    largest = dict.fromkeys(("input", *LAYERS), 0.0)
    for x in pair.calibration:
        for name, y in {
            "input": x.numpy(),
            **float_outputs(pair.book.parameters, x.numpy()),
        }.items():
            largest[name] = max(largest[name], float(np.abs(y).max()))
    book = Textbook.calibrated(pair.book.parameters, largest)
    for layer in LAYERS:
        assert book.n_output[layer] == pytest.approx(pair.book.n_output[layer], rel=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("INTACT_DATA_DIR"), reason="INTACT_DATA_DIR is not set")
@pytest.mark.parametrize("bias", BIASES)
def test_cifar10_agrees_on_all_10_000_images(bias):
    pair = both("cifar10", bias)
    assert sum(len(y) for _, y in pair.test) == 10_000
    assert not any(prediction_differences(pair).values())
    for x, _ in pair.test:
        assert code_differences(pair.quantized, pair.book.outputs(x.numpy(), "chain"), x) == []


# -- mistakes on purpose: the comparison would notice ----------------------------------------------


def test_127_codes_per_unit_would_be_noticed():
    pair = both("digits", "all")
    wrong = Textbook.calibrated(
        pair.book.parameters, largest_in_torch(pair.model, pair.calibration), codes=127.0
    )
    x = pair.test[0][0]
    different = code_differences(pair.quantized, wrong.outputs(x.numpy(), "chain"), x)
    assert different == ["input", *LAYERS]


def test_rounding_half_up_would_be_noticed():
    """Pixels never lie half way between two codes, nor hardly a product: inputs that do."""
    pair = both("digits", "all")
    assert pair.book.n_input == 128.0
    halves = (np.arange(3 * 32 * 32, dtype=np.float32) % 256 - 128 + np.float32(0.5)) / 128
    x = torch.from_numpy(halves.reshape(1, 3, 32, 32))
    assert code_differences(pair.quantized, pair.book.outputs(x.numpy(), "chain"), x) == []
    wrong = replace(pair.book, round=half_up)
    different = code_differences(pair.quantized, wrong.outputs(x.numpy(), "chain"), x)
    assert {"input", "conv1"} <= set(different)


def test_a_bias_in_real_units_would_be_noticed():
    pair = both("digits", "last")
    x = pair.test[0][0]
    assert code_differences(pair.quantized, pair.book.outputs(x.numpy(), "real"), x) == ["fc3"]


def test_one_factor_missing_from_the_chain_would_be_noticed():
    pair = both("digits", "none")
    largest = largest_in_torch(pair.model, pair.calibration)
    book = pair.book
    forgotten = 128 / (largest["conv2"] * book.n_weight["conv2"])  # not on the chain before it
    wrong = replace(book, n_output={**book.n_output, "conv2": forgotten})
    x = pair.test[0][0]
    different = code_differences(pair.quantized, wrong.outputs(x.numpy(), "chain"), x)
    assert different == ["conv2", "fc1", "fc2", "fc3"]
