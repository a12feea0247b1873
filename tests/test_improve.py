"""What improves a float network leaves its function alone, and its program closer to it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import intact
from intact.arithmetic import dequantize
from intact.calibrate import calibrate
from intact.capturing import capture
from intact.choose import align, choose_qparams
from intact.engines.torch import TorchEngine
from intact.errors import CalibrationError, RecipeError
from intact.improve import correct_biases, equalize
from intact.improve.bias_correction import SAMPLES, samples_that_fit
from intact.improve.equalization import has_depthwise
from intact.lower import lower
from intact.network import Network
from intact.pipeline import quantize_network
from intact.recipe import PRESETS, ImproveRecipe, Recipe, WeightRecipe
from intact.zoo.mobilenet import InvertedResidual

torch.set_num_threads(1)

DEFAULT = PRESETS["default"]


def seeded(make, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    module = make()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):  # channels whose ranges differ by far
            nn.init.uniform_(part.weight, 0.05, 3)
            nn.init.uniform_(part.bias, -0.5, 0.5)
    return module.eval()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.bn0(self.stem(x)))
        x = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + x)
        return self.fc(torch.flatten(self.pool(nn.functional.max_pool2d(x, 2)), 1))


def mobile() -> nn.Module:
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU6()]
    layers += [InvertedResidual(6, 6, 1, 4), InvertedResidual(6, 9, 2, 3)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 5))


def images(count: int = 48, seed: int = 1) -> torch.Tensor:
    noise = torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
    return noise + 0.8  # a mean, which errors of weights multiply


NETWORKS = {"residual": Residual, "mobile": mobile}


def captured(name: str) -> Network:
    return capture(seeded(NETWORKS[name]), images(1))


def unevenness(network: Network, x: torch.Tensor) -> float:
    """The mean over all tensors of log2 of the largest channel's range over the median one's."""
    ratios = []
    for sketch in calibrate(network, [x]).values():
        reach = np.maximum(-sketch.channel_min, sketch.channel_max)
        ratios.append(np.log2(reach.max() / np.median(reach[reach > 0])))
    return float(np.mean(ratios))


# -- equalization ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_equalization_changes_the_weights_and_not_the_function(name):
    network, x = captured(name), images()
    equal = equalize(network, calibrate(network, [x]))
    changed = [
        key
        for key, value in network.parameters.items()
        if not torch.equal(value, equal.parameters[key])
    ]
    assert len(changed) >= 4
    expected, got = network(x), equal(x)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    broken = equal.with_parameters({changed[0]: equal.parameters[changed[0]] * 1.01})
    assert (broken(x) - expected).abs().max() > 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", NETWORKS)
def test_equalization_brings_the_ranges_of_channels_together(name):
    network, x = captured(name), images()
    equal = equalize(network, calibrate(network, [x]))
    assert unevenness(equal, x) < 0.8 * unevenness(network, x)


def test_equalization_keeps_what_relu6_cuts_off():
    network, x = captured("mobile"), 4 * images()
    before = calibrate(network, [x])
    cut = [n for n, spec in network.tensors.items() if spec.high == 6 and before[n].max == 6]
    assert cut  # otherwise this test would show nothing
    equal = equalize(network, before)
    assert {n: s.high for n, s in equal.tensors.items()} == {
        n: s.high for n, s in network.tensors.items()
    }
    expected, got = network(x), equal(x)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


def test_input_output_and_what_is_not_homogeneous_keep_their_scale():
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, groups=2)
            self.third = nn.Conv2d(4, 4, 1)

        def forward(self, x):  # a clamp that is no ReLU, and a grouped convolution
            return self.third(self.second(torch.clamp(self.first(x), -1, 1)))

    network = capture(seeded(Shifted), images(1))
    sketches = calibrate(network, [images()])
    equal = equalize(network, sketches)
    for name in ("first.weight", "first.bias", "third.bias"):
        assert torch.equal(equal.parameters[name], network.parameters[name])
    assert not torch.equal(equal.parameters["third.weight"], network.parameters["third.weight"])
    with pytest.raises(CalibrationError, match="has no Sketch: calibrate the same network"):
        equalize(network, {network.input: sketches[network.input]})


def test_a_dead_channel_stays_dead():
    model = seeded(Residual)
    with torch.no_grad():
        model.bn1.weight[3] = 0
        model.bn1.bias[3] = -1
    network, x = capture(model, images(1)), images()
    equal = equalize(network, calibrate(network, [x]))
    assert all(torch.isfinite(p).all() for p in equal.parameters.values())
    assert torch.allclose(equal(x), network(x), rtol=1e-4, atol=1e-5)


# -- bias correction -------------------------------------------------------------------------------


def four_bits(network: Network, x: torch.Tensor):
    """An aligned network, its grids and program with weights of 4 bits, and the recipe."""
    recipe = Recipe(weights=WeightRecipe(bits=4), improve=ImproveRecipe(correct_bias=False))
    aligned = align(network)
    qparams = choose_qparams(aligned, calibrate(network, [x]), recipe)
    return aligned, qparams, lower(aligned, qparams, recipe), recipe


def logits(program, x: torch.Tensor) -> np.ndarray:
    grid = program.tensors[program.output].qparams
    return dequantize(TorchEngine(program)(program.quantize_input(x.numpy())), grid)


@pytest.mark.parametrize("name", NETWORKS)
def test_corrected_biases_leave_no_mean_error_in_the_logits(name):
    network, x = captured(name), images(256)
    aligned, qparams, program, recipe = four_bits(network, x)
    corrected = lower(correct_biases(aligned, program, x), qparams, recipe)
    expected = network(x).detach().numpy()
    before, after = (logits(p, x) - expected for p in (program, corrected))
    step = program.tensors[program.output].qparams.scale[0]
    assert np.abs(after.mean(axis=0)).max() < 0.5 * step
    assert np.abs(before.mean(axis=0)).max() > step
    assert np.square(after).mean() < 0.8 * np.square(before).mean()


def test_the_first_layer_is_corrected_by_its_own_mean_error():
    network, x = captured("residual"), images(64)
    aligned, _, program, _ = four_bits(network, x)
    corrected = correct_biases(aligned, program, x)
    scale, codes = (program.parameters[f"stem.{k}"] for k in ("weight_scale", "weight"))
    grid = program.tensors[program.input].qparams
    codes_in = torch.from_numpy(program.quantize_input(x.numpy()).astype(np.float64))
    weight = torch.from_numpy(codes.astype(np.float64) * scale.reshape(-1, 1, 1, 1))
    got = nn.functional.conv2d(codes_in * grid.scale[0], weight, padding=1)
    wanted = nn.functional.conv2d(x.double(), network.parameters["stem.weight"].double(), padding=1)
    error = (got - wanted).mean((2, 3))
    mean, variance = error.mean(0), error.var(0) / len(x)
    expected = mean * (1 - variance / mean**2).clamp(min=0)
    moved = network.parameters["stem.bias"].double() - corrected.parameters["stem.bias"].double()
    assert torch.allclose(moved, expected, atol=1e-6)
    assert expected.abs().max() > 1e-3


def test_a_layer_without_bias_gets_one_and_weights_stay():
    network, x = capture(nn.Conv2d(3, 4, 3, bias=False), images(1)), images()
    aligned, qparams, program, recipe = four_bits(network, x)
    corrected = correct_biases(aligned, program, x)
    name = f"{network.output}.bias"
    assert name not in network.parameters
    assert corrected.parameters[name].dtype == torch.float32
    other = lower(corrected, qparams, recipe)
    assert np.array_equal(
        other.parameters[f"{network.output}.weight"], program.parameters[f"{network.output}.weight"]
    )
    assert (other.parameters[name] != 0).any()


def test_an_error_that_may_be_chance_is_not_corrected():
    network = capture(nn.Conv2d(3, 4, 1, bias=False), images(1))
    x = torch.cat([images(2), -images(2)])  # every error comes with its opposite
    aligned, _, program, _ = four_bits(network, torch.cat([x, -x]))
    corrected = correct_biases(aligned, program, x)
    assert (corrected.parameters[f"{network.output}.bias"] == 0).all()


def test_samples_are_as_many_as_memory_allows():
    small = captured("residual")
    assert samples_that_fit(small) == SAMPLES
    large = capture(nn.Conv2d(3, 64, 3, padding=1), torch.zeros(1, 3, 512, 512))
    held = 4 * (3 + 64) * 512 * 512
    assert samples_that_fit(large) == max(8, 2**29 // (2 * held))


# -- in the pipeline -------------------------------------------------------------------------------


def stream(x: torch.Tensor, size: int = 10):
    yield from x.split(size)  # a generator: it can be used only once


def test_auto_corrects_networks_with_depthwise_convolutions_alone():
    x = images(64)
    for name, corrects in (("residual", False), ("mobile", True)):
        network = captured(name)
        assert has_depthwise(network) == corrects
        off = replace(DEFAULT, improve=ImproveRecipe(correct_bias=False))
        auto, plain = (quantize_network(network, stream(x), r).program for r in (DEFAULT, off))
        biases = [key for key in auto.parameters if key.endswith(".bias")]
        same = all(np.array_equal(auto.parameters[k], plain.parameters[k]) for k in biases)
        assert same != corrects


def test_the_pipeline_does_what_the_steps_do():
    network, x = captured("mobile"), images(64)
    recipe = replace(DEFAULT, improve=ImproveRecipe(equalize=True, correct_bias=True))
    got = quantize_network(network, stream(x), recipe)
    equal = equalize(network, calibrate(network, x.split(10)))
    aligned, sketches = align(equal), calibrate(equal, x.split(10))
    qparams = choose_qparams(aligned, sketches, recipe)
    program = lower(aligned, qparams, recipe)
    program = lower(correct_biases(aligned, program, x), qparams, recipe)
    assert got.sketches == sketches
    for name, value in program.parameters.items():
        assert np.array_equal(got.program.parameters[name], value)
    # The float network of the result is the reference: it has the biases of the user's.
    assert torch.equal(got.network.parameters["7.bias"], network.parameters["7.bias"])


def test_a_stream_of_single_samples_is_kept_no_longer_than_needed():
    recipe = replace(DEFAULT, improve=ImproveRecipe(equalize=True, correct_bias=True))
    x = images(SAMPLES + 20)
    network = captured("mobile")
    whole = quantize_network(network, [x[:SAMPLES], x[SAMPLES:]], recipe).program
    single = quantize_network(network, stream(x, 1), recipe).program
    weights = [key for key in whole.parameters if key.endswith(".weight")]
    assert all(np.array_equal(whole.parameters[k], single.parameters[k]) for k in weights)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("equalize = 1", "equalize is 1; it is either true or false"),
        ('equalize = "auto"', "equalize is 'auto'; it is either true or false"),
        ('correct_bias = "yes"', "correct_bias is 'yes'; true, false or 'auto'"),
        ("correct = true", "unknown key 'correct'; the keys are correct_bias, equalize"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(text, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_toml(f"[improve]\n{text}")


def test_a_recipe_says_what_is_improved():
    recipe = Recipe.from_toml("improve.equalize = true\nimprove.correct_bias = false")
    assert recipe.improve == ImproveRecipe(equalize=True, correct_bias=False)
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert Recipe.from_toml("").improve.correct_bias == "auto"
    assert PRESETS["lab"].improve == ImproveRecipe(equalize=False, correct_bias=False)
    assert intact.Recipe is Recipe
