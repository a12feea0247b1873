"""Networks with the structures that people have: captured, quantized, and equal in every engine."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import intact
from architectures import ARCHITECTURES, SEVERAL
from intact.capturing import capture
from intact.engines import ENGINES, load_engine
from intact.errors import EngineUnavailableError
from intact.signature import unwrapped

torch.set_num_threads(1)
SHAPE = (3, 64, 64)


def settled(make: Callable[[], nn.Module], *shapes: tuple[int, ...]) -> nn.Module:
    """Random weights, and the statistics of batch norm that they lead to."""
    torch.manual_seed(0)
    module = make()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.2)
    with torch.no_grad():
        module.train()(*(torch.randn(16, *shape) for shape in shapes))
    return module.eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_becomes_a_program_that_every_engine_runs_to_the_same_codes(name):
    module = settled(ARCHITECTURES[name], SHAPE)
    x = torch.randn(16, *SHAPE)
    network = capture(module, x[:1])
    with torch.no_grad():
        real = module(x)
        torch.testing.assert_close(network(x), real, rtol=1e-3, atol=1e-4)
    program = intact.quantize(module, [x])
    codes = program.quantize_input(x.numpy()[:3])
    reference = load_engine("reference", program)(codes)
    ran = set()
    for engine in ENGINES:
        try:
            got = load_engine(engine, program)(codes)
        except EngineUnavailableError:
            continue  # another test says which are missing here
        assert np.array_equal(got, reference), engine
        ran.add(engine)
    assert {"reference", "torch"} <= ran
    noise = program.run(x.numpy(), engine="torch") - real.numpy()
    assert 10 * math.log10(np.square(real.numpy()).sum() / np.square(noise).sum()) > 15


def tensors(result) -> list[torch.Tensor]:
    values = result.values() if isinstance(result, dict) else result
    return [result] if isinstance(result, torch.Tensor) else list(values)


def each(values) -> tuple[np.ndarray, ...]:
    return values if isinstance(values, tuple) else (values,)


@pytest.mark.parametrize("name", SEVERAL)
def test_a_network_of_several_inputs_or_outputs_has_the_same_codes_in_every_engine(name):
    make, shapes = SEVERAL[name]
    module = settled(make, *shapes)
    x = tuple(torch.randn(16, *shape) for shape in shapes)
    with torch.no_grad():
        real = tensors(module(*x))
    network = capture(module, x)
    assert len(network.inputs) == len(shapes)
    with torch.no_grad():
        for got, expected in zip(tensors(network(unwrapped(x))), real, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    program = intact.quantize(module, [(unwrapped(x), None)])
    arrays = unwrapped(part.numpy() for part in x)
    codes = program.check_codes(program.quantize_input(arrays))
    for n in (1, 16):
        given = unwrapped(array[:n] for array in codes)
        reference = each(load_engine("reference", program)(given))
        ran = set()
        for engine in ENGINES:
            try:
                made = load_engine(engine, program)
            except EngineUnavailableError:
                continue  # another test says which are missing here
            for got, expected in zip(each(made(given)), reference, strict=True):
                assert np.array_equal(got, expected), engine
            ran.add(engine)
        assert {"reference", "torch"} <= ran
    for got, expected in zip(each(program.run(arrays, engine="torch")), real, strict=True):
        noise = got - expected.numpy()
        power = np.square(expected.numpy()).sum() / np.square(noise).sum()
        assert 10 * math.log10(power) > 15
