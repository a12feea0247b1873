"""`Network`: its validation, and its one interpreter, op by op against torch."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from intact.errors import IntactError
from intact.network import Network, TensorSpec
from intact.ops import (
    Add,
    AvgPool2d,
    Clamp,
    Concat,
    Conv2d,
    GlobalAvgPool,
    Linear,
    MaxPool2d,
    Op,
    Permute,
    Requantize,
    Reshape,
    output_shape,
)

torch.set_num_threads(1)


def single(op: Op, shape, parameters=(), low=-math.inf, high=math.inf) -> Network:
    """A network of one op that reads `x` as often as it needs."""
    parameters = {f"y.{k}": v for k, v in dict(parameters).items()}
    weight = parameters.get("y.weight")
    shapes = [shape] * len(op.inputs)
    result = output_shape(op, shapes, None if weight is None else tuple(weight.shape))
    tensors = {"x": TensorSpec(shape), "y": TensorSpec(result, low, high)}
    return Network(("x",), ("y",), (op,), tensors, parameters)


def chain() -> Network:
    """conv (ReLU) -> pool -> flat -> fc, and a skip around a clamp."""
    shapes = {"x": (2, 6, 6), "conv": (4, 6, 6), "c": (4, 6, 6), "sum": (4, 6, 6)}
    shapes |= {"pool": (4, 3, 3), "flat": (36,), "fc": (5,)}
    generator = torch.Generator().manual_seed(3)
    return Network(
        inputs=("x",),
        outputs=("fc",),
        ops=(
            Conv2d("conv", ("x",), padding=(1, 1, 1, 1)),
            Clamp("c", ("conv",)),
            Add("sum", ("conv", "c")),
            MaxPool2d("pool", ("sum",)),
            Reshape("flat", ("pool",), (36,)),
            Linear("fc", ("flat",)),
        ),
        tensors={
            name: TensorSpec(shape, *{"conv": (0.0, math.inf), "c": (0.0, 0.5)}.get(name, ()))
            for name, shape in shapes.items()
        },
        parameters={
            "conv.weight": torch.randn(4, 2, 3, 3, generator=generator),
            "conv.bias": torch.randn(4, generator=generator),
            "fc.weight": torch.randn(5, 36, generator=generator),
        },
        sources={"conv": "model.py:1: x = self.conv(x)"},
    )


def chain_by_hand(p, x):
    conv = F.conv2d(x, p["conv.weight"], p["conv.bias"], padding=1).relu()
    return F.linear(F.max_pool2d(conv + conv.clamp(0, 0.5), 2).flatten(1), p["fc.weight"])


# -- running --------------------------------------------------------------------------------------


def test_a_network_equals_the_same_calls_of_torch():
    network, x = chain(), torch.randn(3, 2, 6, 6)
    assert torch.equal(network(x), chain_by_hand(network.parameters, x))


def test_the_comparison_notices_a_single_changed_weight():
    network, x = chain(), torch.randn(3, 2, 6, 6)
    weight = network.parameters["fc.weight"].clone()
    weight[0, 0] *= 2
    broken = network.with_parameters({"fc.weight": weight})
    assert not torch.equal(broken(x), chain_by_hand(network.parameters, x))


numbers = st.integers(1, 3)
paddings = st.tuples(*[st.integers(0, 2)] * 4)


@settings(max_examples=60, deadline=None)
@given(numbers, st.tuples(numbers, numbers), st.tuples(numbers, numbers), paddings)
def test_convolution_pads_each_side_as_it_says(groups, kernel, stride, padding):
    torch.manual_seed(0)
    x = torch.randint(-8, 8, (2, 2 * groups, 7, 8)).float()
    weight = torch.randint(-8, 8, (groups * 2, 2, *kernel)).float()
    op = Conv2d("y", ("x",), stride, padding, (2, 1), groups)
    top, bottom, left, right = padding
    expected = F.conv2d(
        F.pad(x, (left, right, top, bottom)), weight, None, stride, 0, (2, 1), groups
    )
    # Small integers: every sum is exact, so the order of summation cannot matter.
    assert torch.equal(single(op, (2 * groups, 7, 8), {"weight": weight})(x), expected)


@settings(max_examples=60, deadline=None)
@given(st.tuples(numbers, numbers), st.tuples(numbers, numbers), paddings, st.booleans())
def test_pools_pad_each_side_as_they_say(kernel, stride, padding, dilated):
    padding = tuple(min(p, kernel[i // 2] - 1) for i, p in enumerate(padding))
    top, bottom, left, right = padding
    x = torch.randn(2, 3, 7, 8) - 5
    dilation = (2, 2) if dilated else (1, 1)
    op = MaxPool2d("y", ("x",), kernel, stride, padding, dilation)
    around = F.pad(x, (left, right, top, bottom), value=-math.inf)
    expected = F.max_pool2d(around, kernel, stride, 0, dilation)
    assert torch.equal(single(op, (3, 7, 8))(x), expected)

    around = F.pad(x, (left, right, top, bottom))
    got = single(AvgPool2d("y", ("x",), kernel, stride, padding), (3, 7, 8))(x)
    assert torch.equal(got, F.avg_pool2d(around, kernel, stride))


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (Add("y", ("x", "x")), lambda x: x + x),
        (Concat("y", ("x", "x")), lambda x: torch.cat([x, x], 1)),
        (Concat("y", ("x", "x"), 2), lambda x: torch.cat([x, x], 3)),
        (GlobalAvgPool("y", ("x",)), lambda x: F.adaptive_avg_pool2d(x, 1)),
        (Reshape("y", ("x",), (6, 20)), lambda x: x.reshape(3, 6, 20)),
        (Permute("y", ("x",), (1, 2, 0)), lambda x: x.permute(0, 2, 3, 1)),
        (Clamp("y", ("x",)), lambda x: x),
        (Requantize("y", ("x",)), lambda x: x),
    ],
)
def test_the_other_ops_equal_torch(op, expected):
    x = torch.randn(3, 4, 5, 6)
    assert torch.equal(single(op, (4, 5, 6))(x), expected(x))


def test_linear_works_on_the_last_axis():
    x, weight, bias = torch.randn(3, 4, 5), torch.randn(7, 5), torch.randn(7)
    network = single(Linear("y", ("x",)), (4, 5), {"weight": weight, "bias": bias})
    assert torch.equal(network(x), F.linear(x, weight, bias))


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, math.inf), (0.0, 6.0), (-math.inf, 1.0), (-0.3, 0.2), (-0.5, math.inf)]
)
def test_the_clamp_of_a_tensor_is_applied_to_it(low, high):
    x = torch.randn(100, 4) * 4
    network = single(Requantize("y", ("x",)), (4,), low=low, high=high)
    assert torch.equal(network(x), x.clamp(low, high))


def test_nan_passes_through_a_clamp():
    network = single(Clamp("y", ("x",)), (1,), low=0.0, high=6.0)
    assert network(torch.tensor([[math.nan]])).isnan().all()


def test_the_hook_sees_input_and_every_result_after_its_clamp():
    network, x = chain(), torch.randn(3, 2, 6, 6)
    seen = {}

    def hook(name, tensor):
        seen[name] = tensor
        return tensor

    output = network(x, hook)
    assert list(seen) == ["x", "conv", "c", "sum", "pool", "flat", "fc"]
    assert torch.equal(seen["x"], x)
    assert seen["conv"].min() == 0
    assert seen["c"].max() == 0.5
    assert torch.equal(seen["fc"], output)
    assert {n: tuple(t.shape[1:]) for n, t in seen.items()} == {
        n: s.shape for n, s in network.tensors.items()
    }


def test_what_the_hook_returns_takes_the_tensors_place():
    network, x = chain(), torch.randn(3, 2, 6, 6)
    replaced = network(x, lambda name, t: torch.zeros_like(t) if name == "flat" else t)
    assert torch.equal(replaced, torch.zeros(3, 5))
    doubled = network(x, lambda name, t: 2 * t if name == "fc" else t)
    assert torch.equal(doubled, 2 * network(x))


def test_tensors_are_freed_once_nobody_reads_them():
    network = chain()
    alive: dict[str, weakref.ref[torch.Tensor]] = {}
    held = {}

    def hook(name, tensor):
        held[name] = {n for n, ref in alive.items() if ref() is not None}
        fresh = tensor.clone()
        alive[name] = weakref.ref(fresh)
        return fresh

    with torch.no_grad():
        network(torch.randn(1, 2, 6, 6), hook)
    assert held["sum"] >= {"conv", "c"}  # both are being read
    assert held["flat"] == {"pool"}
    assert held["fc"] == {"flat"}


def test_gradients_flow_to_the_input_and_to_parameters():
    network = chain()
    weight = network.parameters["conv.weight"].clone().requires_grad_()
    x = torch.randn(3, 2, 6, 6, requires_grad=True)
    loss = network.with_parameters({"conv.weight": weight})(x).square().sum()
    got = torch.autograd.grad(loss, [x, weight])

    expected = chain_by_hand({**network.parameters, "conv.weight": weight}, x).square().sum()
    wanted = torch.autograd.grad(expected, [x, weight])
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
        assert a.abs().sum() > 0


def test_a_batch_of_none_or_one_works():
    network = chain()
    assert network(torch.randn(0, 2, 6, 6)).shape == (0, 5)
    assert network(torch.randn(1, 2, 6, 6)).shape == (1, 5)


@pytest.mark.parametrize("shape", [(3, 2, 6, 7), (2, 6, 6), (3, 2, 6), (3, 2, 6, 6, 1)])
def test_a_batch_of_another_shape_is_refused(shape):
    with pytest.raises(IntactError, match=r"batches of shape \[N, 2, 6, 6\]"):
        chain()(torch.randn(shape))


# -- parameters -----------------------------------------------------------------------------------


def test_with_parameters_returns_another_network_and_leaves_this_one():
    network = chain()
    bias = torch.zeros(4)
    other = network.with_parameters({"conv.bias": bias})
    assert other.parameters["conv.bias"] is bias
    assert other.parameters["fc.weight"] is network.parameters["fc.weight"]
    assert network.parameters["conv.bias"].abs().sum() > 0
    assert other.sources == network.sources


@pytest.mark.parametrize("name", ["fc.bias", "conv", "fc.weight"])
def test_with_parameters_takes_only_what_is_there_in_its_shape(name):
    with pytest.raises(IntactError, match=rf"no parameter '{name}' of shape \[2\]"):
        chain().with_parameters({name: torch.zeros(2)})


def test_to_moves_the_parameters():
    assert all(p.device.type == "meta" for p in chain().to("meta").parameters.values())


# -- validation -----------------------------------------------------------------------------------


def test_the_mappings_of_a_network_cannot_be_changed():
    network = chain()
    for mapping in (network.tensors, network.parameters, network.sources):
        with pytest.raises(TypeError):
            mapping["conv"] = None


def test_a_network_keeps_copies_of_the_mappings_it_was_given():
    tensors = {"x": TensorSpec((4,)), "y": TensorSpec((4,))}
    network = Network(("x",), ("y",), (Clamp("y", ("x",)),), tensors, {})
    tensors.clear()
    assert set(network.tensors) == {"x", "y"}


def without(mapping, *names):
    return {k: v for k, v in mapping.items() if k not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n: {"ops": n.ops[::-1]}, "reads 'flat' before it is computed"),
        (lambda n: {"ops": (*n.ops, n.ops[0])}, "'conv' is defined twice"),
        (lambda n: {"ops": (Clamp("x", ("x",)), *n.ops)}, "'x' is defined twice"),
        (lambda n: {"tensors": without(n.tensors, "pool")}, "'pool' is .* has no TensorSpec"),
        (lambda n: {"parameters": without(n.parameters, "fc.weight")}, "'fc' has no weight"),
        (
            lambda n: {"tensors": {**n.tensors, "fc": TensorSpec((6,))}},
            r"'fc' yields \[5\], but its TensorSpec says \[6\]",
        ),
        (lambda _: {"outputs": ("nowhere",)}, "'nowhere' is computed by no op"),
        (
            lambda n: {"parameters": {**n.parameters, "fc.weight": torch.zeros(5, 35)}},
            "Linear 'fc': input",
        ),
    ],
)
def test_a_network_that_cannot_run_cannot_be_built(change, message):
    network = chain()
    with pytest.raises(IntactError, match=message):
        replace(network, **change(network))
