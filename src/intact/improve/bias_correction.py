"""Bias correction: what quantization adds to a channel on average is taken off its bias.

M. Nagel et al.: Data-Free Quantization Through Weight Equalization and Bias Correction (2019), here
from data: layer by layer, each with the layers before it quantized and corrected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from intact.arithmetic import dequantize, quantize
from intact.calibrate import summed_over_processes
from intact.network import Network
from intact.ops import Linear, Op, last_uses, weighted
from intact.program import Program
from intact.signature import Values, wrapped

__all__ = ["correct_biases", "samples_that_fit"]

SAMPLES = 256
"""Enough for any network: 64 gave SQNRs within 0.1 dB of these on ResNet-20 and MobileNetV2."""
BUDGET = 2**29
"""Bytes of activations that are held at a time."""
CHUNK = 8
"""Samples that are run together: what they need on the way is small beside what is held."""


def samples_that_fit(network: Network) -> int:
    """How many samples `correct_biases` should have: `SAMPLES`, or as many as `BUDGET` holds."""
    sizes = {name: 4 * math.prod(spec.shape) for name, spec in network.tensors.items()}
    freed = last_uses(network.ops, network.outputs)
    held = most = sum(sizes[name] for name in network.inputs)
    for op in network.ops:
        held += sizes[op.name]
        most = max(most, held)
        held -= sum(sizes[tensor] for tensor in freed.get(op.name, ()))
    return min(SAMPLES, max(CHUNK, BUDGET // (2 * most)))


def correct_biases(network: Network, program: Program, samples: Values) -> Network:
    """The network with biases for which the program's layers are right on average.

    network  aligned, float
    program  what it was lowered to; only its weights and grids are read
    samples  float32 [N, *input shape]; of several inputs, a tuple in their order. N may be 0 under
             `torch.distributed`, where the samples of all processes count and all return the same
    returns  `network` with other biases, and with new ones where there were none: lower it with the
             same grids. It is no reference to compare with, for its own results are off by what the
             quantized weights add

    Of each output channel, before its clamp, the mean over samples and positions of what the
    program's layer yields beyond the float layer is taken off. It is shrunk by what chance alone
    would make of it (James and Stein, 1961; per channel, from the spread between samples): with few
    samples an estimate of nothing would be noise. Both sides are floats: the codes of the program
    by way of float32, not its exact sums.

    Time is that of running the network a few times on the samples; see `samples_that_fit` for the
    memory.
    """
    parameters = dict(network.parameters)
    weights = {f"{op.name}.weight": _real_weight(program, op) for op in network.ops if weighted(op)}
    quantized = network.with_parameters(weights)
    real, rounded = {}, {}
    for name, given in zip(network.inputs, wrapped(samples, network.inputs), strict=True):
        chunks = [given[i : i + CHUNK] for i in range(0, len(given), CHUNK)]
        real[name] = chunks
        rounded[name] = [_rounded(program, name, chunk) for chunk in chunks]
    freed = last_uses(network.ops, network.outputs)
    with torch.inference_mode():
        for op in network.ops:
            wanted = [network.run_op(op, [real[i][k] for i in op.inputs]) for k in _all(chunks)]
            got = [quantized.run_op(op, [rounded[i][k] for i in op.inputs]) for k in _all(chunks)]
            if weighted(op):
                error = _mean_error(op, wanted, got, len(weights[f"{op.name}.weight"]))
                name = f"{op.name}.bias"
                old = parameters.get(name, torch.zeros(len(error)))
                parameters[name] = (old.detach().cpu().double() - error).float()
                shape = (-1,) if isinstance(op, Linear) else (-1, 1, 1)
                got = [part - error.float().reshape(shape) for part in got]
            clamp = network.tensors[op.name]
            real[op.name] = [part.clamp(clamp.low, clamp.high) for part in wanted]
            rounded[op.name] = [_rounded(program, op.name, part) for part in got]
            for tensor in freed.get(op.name, ()):
                del real[tensor], rounded[tensor]
    return replace(network, parameters=parameters)


def _all(chunks: Sequence[torch.Tensor]) -> range:
    return range(len(chunks))


def _real_weight(program: Program, op: Op) -> torch.Tensor:
    codes, scale = (program.parameters[f"{op.name}.{kind}"] for kind in ("weight", "weight_scale"))
    return torch.from_numpy(codes * scale.reshape(-1, *[1] * (codes.ndim - 1)))


def _rounded(program: Program, name: str, x: torch.Tensor) -> torch.Tensor:
    """The real values of a tensor's codes; its fused clamp is in their range."""
    grid = program.tensors[name].qparams
    return torch.from_numpy(dequantize(quantize(x.numpy(), grid, name), grid))


def _mean_error(
    op: Op, wanted: Sequence[torch.Tensor], got: Sequence[torch.Tensor], channels: int
) -> torch.Tensor:
    """Mean of `got - wanted` per output channel, shrunk; float64 [channels]."""
    # Sums over samples of 1, of a sample's mean per channel, and of its square.
    sums = torch.zeros(3, channels, dtype=torch.float64)
    for a, b in zip(wanted, got, strict=True):
        error = (b - a).double()
        last = error if isinstance(op, Linear) else error.movedim(1, -1)
        means = last.reshape(len(a), -1, channels).mean(1)
        sums += torch.stack([torch.full_like(means[0], len(a)), means.sum(0), (means**2).sum(0)])
    count, first, second = summed_over_processes(sums)
    mean = first / count
    variance = (second - count * mean**2).clamp(min=0) / (count - 1).clamp(min=1) / count
    certain = (1 - variance / mean**2).clamp(min=0).nan_to_num(0)  # 0 / 0: there is no error
    error_of_channel: torch.Tensor = mean * certain
    return error_of_channel
