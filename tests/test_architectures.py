"""Networks with the structures that people have: captured, quantized, and equal in every engine."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import intact
from architectures import ARCHITECTURES
from intact.capturing import capture
from intact.engines import ENGINES, load_engine
from intact.errors import EngineUnavailableError

torch.set_num_threads(1)
SHAPE = (3, 64, 64)


def settled(name: str) -> nn.Module:
    """Random weights, and the statistics of batch norm that they lead to."""
    torch.manual_seed(0)
    module = ARCHITECTURES[name]()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.2)
    with torch.no_grad():
        module.train()(torch.randn(16, *SHAPE))
    return module.eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_becomes_a_program_that_every_engine_runs_to_the_same_codes(name):
    module = settled(name)
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
