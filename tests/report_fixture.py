"""A realistic report without a run: LeNet-like layers, quantized here with plain NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from intact.analysis import Histogram, LayerAnalysis, TensorAnalysis
from intact.diagnosis import Finding
from intact.report.value import ProgramFacts, Report
from intact.staged import StageResult

BINS = 96
Array = npt.NDArray[Any]


def _tensor(
    values: Array,
    shape: tuple[int, ...],
    channels: Array,
    scale: Array,
    zero_point: int = 0,
    qmin: int = -128,
    qmax: int = 127,
    type_name: str = "int8",
) -> TensorAnalysis:
    codes = np.clip(np.rint(channels / scale[:, None]) + zero_point, qmin, qmax).astype(int)
    after = (codes - zero_point) * scale[:, None]
    steps = (qmin - zero_point) * scale, (qmax - zero_point) * scale
    low, high = float(steps[0].min()), float(steps[1].max())
    left, right = min(low, float(values.min())), max(high, float(values.max()))
    mean, std = float(values.mean()), float(values.std())
    noise = float(((channels - after) ** 2).mean())
    counts = np.bincount(codes.ravel() - qmin, minlength=qmax - qmin + 1)
    outside = (values < mean - 3 * std) | (values > mean + 3 * std)
    clipped = (channels < steps[0][:, None] - scale[:, None] / 2) | (
        channels > steps[1][:, None] + scale[:, None] / 2
    )
    return TensorAnalysis(
        shape=shape,
        count=values.size,
        min=float(values.min()),
        max=float(values.max()),
        mean=mean,
        std=std,
        three_sigma=(mean - 3 * std, mean + 3 * std),
        outlier_fraction=float(outside.mean()),
        clipped_fraction=float(clipped.mean()),
        range=(low, high),
        type_name=type_name,
        bits=8,
        qmin=qmin,
        qmax=qmax,
        zero_point=zero_point,
        scale=tuple(scale.tolist()),
        codes=tuple(counts.tolist()),
        code_usage=float((counts > 0).sum() / 256),
        sqnr_db=10 * math.log10(float((values**2).mean()) / noise) if noise else None,
        channel_min=tuple(channels.min(1).tolist()),
        channel_max=tuple(channels.max(1).tolist()),
        histogram=Histogram(
            left,
            right,
            tuple(np.histogram(values, BINS, (left, right))[0].astype(float).tolist()),
            tuple(np.histogram(after, BINS, (left, right))[0].astype(float).tolist()),
        ),
    )


def _weight(rng: np.random.Generator, shape: tuple[int, ...], per_channel: bool) -> TensorAnalysis:
    fan_in = math.prod(shape[1:])
    values = rng.normal(0, 0.6 / math.sqrt(fan_in), (shape[0], fan_in))
    values *= rng.uniform(0.5, 1.5, (shape[0], 1))
    outliers = rng.random(values.shape) < 2 / values.size
    values = np.where(outliers, values * 3, values)
    peak = np.abs(values).max(1) if per_channel else np.abs(values).max(keepdims=True)[:, 0]
    scale = peak / 127
    return _tensor(values.ravel(), shape, values, scale)


def _activation(
    rng: np.random.Generator, shape: tuple[int, ...], relu: bool, symmetric: bool
) -> TensorAnalysis:
    channels = rng.normal(0.1, 1.0, (shape[0], 4000)) * rng.uniform(0.4, 2.2, (shape[0], 1))
    if relu:
        channels = np.maximum(channels, 0)
        channels[0] = 0.0
    peak = float(np.abs(channels).max())
    if symmetric:
        qmin = 0 if relu else -128
        return _tensor(channels.ravel(), shape, channels, np.array([peak / 128]), 0, qmin)
    low = float(channels.min())
    top = 0.94 * peak
    scale = (top - low) / 255
    zero = -128 - round(low / scale)
    zero += zero % 2
    return _tensor(channels.ravel(), shape, channels, np.array([scale]), zero)


def _layer(
    rng: np.random.Generator,
    name: str,
    op: str,
    source: str,
    in_shape: tuple[int, ...],
    out_shape: tuple[int, ...],
    weight_shape: tuple[int, ...] | None,
    relu: bool,
    lab: bool,
    sqnr: float | None,
) -> LayerAnalysis:
    weight = None if weight_shape is None else _weight(rng, weight_shape, not lab)
    macs = 0 if weight_shape is None else math.prod(out_shape) * math.prod(weight_shape[1:])
    outputs = out_shape[0] if weight is not None else 1
    bound = 0 if weight_shape is None else 128 * 40 * math.prod(weight_shape[1:])
    biased = op == "Linear" and not relu
    multiplier: tuple[float, ...] = ()
    if weight is not None:
        scales = np.asarray(weight.scale) * 0.02
        multiplier = tuple(
            scales.astype(np.float32).tolist() if lab else np.rint(scales * 2**16 * 40).tolist()
        )
        multiplier = multiplier if lab else tuple(int(m) for m in multiplier)
    return LayerAnalysis(
        name=name,
        op=op,
        inputs=(source,),
        input_shape=in_shape,
        output_shape=out_shape,
        macs=macs,
        bytes=math.prod(weight_shape) + 4 * outputs if weight_shape else 0,
        relu=relu,
        weight=weight,
        activation=_activation(rng, out_shape, relu, lab),
        bias_range=(-0.21, 0.34) if biased else None,
        bias_codes=(-2114, 3391) if biased else None,
        multiplier=multiplier,
        shift=None if lab else 16,
        accumulator_bits=0 if bound == 0 else bound.bit_length() + 1,
        accumulator_bound=bound,
        sqnr_db=sqnr,
    )


def stage(
    name: str, correct: int, wrong: int, right: int, p: float, spread: float = 0.0
) -> StageResult:
    """One stage of 10,000 images; `spread` is the half width of the difference's interval."""
    total, base = 10_000, 7_200
    accuracy = correct / total
    difference = (correct - base) / total
    return StageResult(
        name=name,
        correct=correct,
        total=total,
        accuracy=accuracy,
        interval=(accuracy - 0.0089, accuracy + 0.0087),
        flips_to_wrong=wrong,
        flips_to_right=right,
        p_value=p,
        difference=difference,
        difference_interval=(difference - spread, difference + spread),
        agreement=1.0 if name == "float" else 0.987,
        sqnr_db=None if name == "float" else 32.4,
    )


LENET = (
    ("conv1", "Conv2d", (3, 32, 32), (6, 28, 28), (6, 3, 5, 5), True, 38.2),
    ("pool1", "MaxPool2d", (6, 28, 28), (6, 14, 14), None, True, 38.9),
    ("conv2", "Conv2d", (6, 14, 14), (16, 10, 10), (16, 6, 5, 5), True, 35.1),
    ("pool2", "MaxPool2d", (16, 10, 10), (16, 5, 5), None, True, 35.9),
    ("fc1", "Linear", (400,), (120,), (120, 400), True, 34.2),
    ("fc2", "Linear", (120,), (84,), (84, 120), True, 33.4),
    ("fc3", "Linear", (84,), (10,), (10, 84), False, 32.4),
)


def lenet_report(lab: bool = False) -> Report:
    """A report on a LeNet; `lab` for symmetric activations, weights per tensor, float `M`."""
    rng = np.random.default_rng(7)
    source, layers = "input", []
    for name, op, in_shape, out_shape, weight_shape, relu, sqnr in LENET:
        layers.append(
            _layer(rng, name, op, source, in_shape, out_shape, weight_shape, relu, lab, sqnr)
        )
        source = name
    pixels = (rng.beta(1.2, 1.3, (3, 8000)) * 255).round() / 127.5 - 1
    return _report(tuple(layers), _tensor(pixels.ravel(), (3, 32, 32), pixels, np.array([2**-7])))


def deep_report(blocks: int) -> Report:
    """A report on a network of many convolutions, to see that a long page stays quick."""
    rng = np.random.default_rng(8)
    layers = [
        _layer(
            rng,
            f"layer{i // 4 + 1}.{i % 4}.conv",
            "Conv2d",
            "input" if i == 0 else f"layer{(i - 1) // 4 + 1}.{(i - 1) % 4}.conv",
            (32, 16, 16),
            (32, 16, 16),
            (32, 32, 3, 3),
            True,
            False,
            40 - 10 * i / blocks,
        )
        for i in range(blocks)
    ]
    pixels = (rng.random((3, 8000)) * 255).round() / 127.5 - 1
    scale = np.array([2**-7])
    return _report(tuple(layers), _tensor(pixels.ravel(), (3, 32, 32), pixels, scale))


def _report(layers: tuple[LayerAnalysis, ...], source: TensorAnalysis) -> Report:
    first = layers[0].name
    one_sided = "Use an affine grid for activations: it spends all 256 codes on what occurs."
    affine = '[activations]\nscheme = "affine"'
    return Report(
        title="LeNet (bias on the last layer) on CIFAR-10",
        command="intact lenet --data cifar10 --bias last --recipe default -o out",
        stages=(
            stage("float", 7200, 0, 0, 1.0),
            stage("weights", 7204, 13, 17, 0.58, 0.0011),
            stage("activations", 7195, 38, 33, 0.64, 0.0017),
            stage("bias-unscaled", 6744, 631, 175, 3e-98, 0.0056),
            stage("integer", 7193, 41, 34, 0.49, 0.0017),
        ),
        inputs={"input": source},
        layers=layers,
        diagnosis=(
            Finding(
                "one-sided",
                "problem",
                first,
                f"{first}: no activation is below 0, but the grid is symmetric: 128 of 256 codes "
                "can never occur.",
                one_sided,
                affine,
            ),
            Finding(
                "one-sided",
                "problem",
                layers[2].name,
                f"{layers[2].name}: no activation is below 0, but the grid is symmetric: 128 of "
                "256 codes can never occur.",
                one_sided,
                affine,
            ),
            Finding(
                "outliers",
                "advice",
                layers[2].name,
                f"{layers[2].name}: 0.92 % of the weights lie beyond 3 sigma (0.27 % would be "
                "normal); the largest is 7.1 sigma away and sets the scale of all others.",
                "Choose the range by error instead of the extremes, or give every channel its own "
                "scale.",
                f'[layers."{layers[2].name}".weights]\nrange = "mse"\nper_channel = true',
            ),
            Finding(
                "dead-channels",
                "note",
                first,
                f"{first}: channel 0 is 0 for every calibration image.",
                "Prune it, or look at the training: it costs time and gives nothing.",
            ),
        ),
        program=ProgramFacts(
            sha256="9f2c1c3b5d0a47e8b1d66f0a2c4e8f7316b95ad0c87e42f3a1d05be6c9478f21",
            bytes=67_912,
            float_bytes=248_432,
            parameter_bytes=62_606,
            ops=len(layers),
            macs=sum(layer.macs for layer in layers),
            accumulator_bits=max(layer.accumulator_bits for layer in layers),
            outputs=(layers[-1].name,),
        ),
        recipe={"name": "default", "activations": {"scheme": "affine", "bits": 8}, "layers": {}},
        recipe_toml='name = "default"\n\n[weights]\nper_channel = true\n\n'
        '[activations]\nscheme = "affine"\nrange = "mse"\n',
        data={
            "name": "cifar10",
            "classes": 10,
            "train": 50_000,
            "test": 10_000,
            "calibration": 1_000,
            "sha256": {"test": "0d1c" * 16, "calibration": "77ab" * 16},
        },
        seed=0,
        versions={
            "intact": "0.1.0",
            "numpy": "2.3.1",
            "torch": "2.13.0",
            "python": "3.11.2",
            "platform": "Linux-x86_64",
        },
    )
