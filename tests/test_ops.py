"""Geometry of every op, against torch and by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from intact.errors import IntactError
from intact.ops import (
    Add,
    AvgPool2d,
    Clamp,
    Concat,
    Conv2d,
    GlobalAvgPool,
    Linear,
    MaxPool2d,
    Permute,
    Requantize,
    Reshape,
    accumulates,
    last_uses,
    macs,
    moves_codes,
    output_shape,
    pool_size,
    weighted,
)

X = ("x",)
ALL = (
    Conv2d("y", X),
    Linear("y", X),
    Add("y", ("a", "b")),
    Concat("y", ("a", "b")),
    MaxPool2d("y", X),
    AvgPool2d("y", X),
    GlobalAvgPool("y", X),
    Reshape("y", X),
    Permute("y", X),
    Clamp("y", X),
    Requantize("y", X),
)
small = st.integers(1, 4)
pairs = st.tuples(small, small)
paddings = st.tuples(*[st.integers(0, 3)] * 4)
sizes = st.tuples(st.integers(1, 4), st.integers(1, 12), st.integers(1, 12))


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(1, *shape, device="meta")


def torch_shape(call):
    """What torch says, or None where it refuses."""
    try:
        return tuple(call().shape[1:])
    except RuntimeError:
        return None


def our_shape(op, *args):
    try:
        return output_shape(op, *args)
    except IntactError:
        return None


def padded(shape, padding):
    top, bottom, left, right = padding
    return F.pad(meta(*shape), (left, right, top, bottom))


@settings(max_examples=200, deadline=None)
@given(sizes, small, small, pairs, pairs, paddings, pairs)
def test_convolution_has_the_shape_that_torch_says(
    shape, groups, outputs, kernel, stride, padding, dilation
):
    shape = (shape[0] * groups, *shape[1:])
    weight = (outputs * groups, shape[0] // groups, *kernel)
    op = Conv2d("y", X, stride, padding, dilation, groups)
    expected = torch_shape(
        lambda: F.conv2d(
            padded(shape, padding),
            torch.empty(weight, device="meta"),
            None,
            stride,
            0,
            dilation,
            groups,
        )
    )
    assert our_shape(op, [shape], weight) == expected


@settings(max_examples=200, deadline=None)
@given(sizes, pairs, pairs, paddings, pairs)
def test_max_pool_has_the_shape_that_torch_says(shape, kernel, stride, padding, dilation):
    if any(p >= kernel[i // 2] for i, p in enumerate(padding)):
        padding = (0, 0, 0, 0)
    op = MaxPool2d("y", X, kernel, stride, padding, dilation)
    expected = torch_shape(
        lambda: F.max_pool2d(padded(shape, padding), kernel, stride, 0, dilation)
    )
    assert our_shape(op, [shape]) == expected


@settings(max_examples=200, deadline=None)
@given(sizes, pairs, pairs, paddings)
def test_average_pool_has_the_shape_that_torch_says(shape, kernel, stride, padding):
    op = AvgPool2d("y", X, kernel, stride, padding)
    expected = torch_shape(lambda: F.avg_pool2d(padded(shape, padding), kernel, stride))
    assert our_shape(op, [shape]) == expected


@given(st.permutations([2, 3, 4, 5]))
def test_permute_has_the_shape_that_torch_says(axes):
    shape = (7, 5, 3, 2)
    axes = [a - 2 for a in axes]
    expected = tuple(torch.empty(shape).permute(axes).shape)
    assert output_shape(Permute("y", X, tuple(axes)), [shape]) == expected


def test_the_other_shapes():
    assert output_shape(Linear("y", X), [(5,)], (7, 5)) == (7,)
    assert output_shape(Linear("y", X), [(3, 4, 5)], (7, 5)) == (3, 4, 7)
    assert output_shape(Add("y", ("a", "b")), [(2, 3), (2, 3)]) == (2, 3)
    assert output_shape(Concat("y", ("a", "b", "c")), [(2, 3), (1, 3), (4, 3)]) == (7, 3)
    assert output_shape(Concat("y", ("a", "b"), 1), [(2, 3), (2, 5)]) == (2, 8)
    assert output_shape(GlobalAvgPool("y", X), [(6, 5, 4)]) == (6, 1, 1)
    assert output_shape(Reshape("y", X, (4, 6)), [(2, 3, 4)]) == (4, 6)
    assert output_shape(Clamp("y", X), [(2, 3)]) == (2, 3)
    assert output_shape(Requantize("y", X), [(2,)]) == (2,)


@pytest.mark.parametrize(
    ("op", "inputs", "weight", "message"),
    [
        (Conv2d("y", X), [(3, 8)], (4, 3, 1, 1), "takes 3-dimensional samples"),
        (Conv2d("y", X), [(3, 8, 8)], None, "needs a 4-dimensional weight"),
        (Conv2d("y", X), [(3, 8, 8)], (4, 3), "needs a 4-dimensional weight"),
        (Conv2d("y", X), [(3, 8, 8)], (4, 2, 1, 1), "do not fit a weight"),
        (Conv2d("y", X, groups=2), [(4, 8, 8)], (3, 2, 1, 1), "do not fit a weight"),
        (Conv2d("y", X, groups=0), [(4, 8, 8)], (3, 2, 1, 1), "do not fit a weight"),
        (Conv2d("y", X), [(3, 8, 8)], (4, 3, 9, 1), "a window of 9 does not fit"),
        (Conv2d("y", X, dilation=(1, 4)), [(3, 8, 8)], (4, 3, 1, 3), "a window of 9"),
        (Conv2d("y", X, stride=(0, 1)), [(3, 8, 8)], (4, 3, 1, 1), "must be positive"),
        (Conv2d("y", X, padding=(0, 0, -1, 0)), [(3, 8, 8)], (4, 3, 1, 1), "not negative"),
        (Conv2d("y", X), [(3, 8, 8)] * 2, (4, 3, 1, 1), "takes 1 input"),
        (Linear("y", X), [(4,)], (3, 5), "does not fit a weight"),
        (Linear("y", X), [()], (3, 5), "does not fit a weight"),
        (Linear("y", X), [(4,)], None, "does not fit a weight"),
        (Add("y", X), [(4,)], None, "takes 2 input"),
        (Add("y", ("a", "b")), [(4,), (1,)], None, "operands differ"),
        (Concat("y", ()), [], None, "no axis 0"),
        (Concat("y", ("a", "b"), 2), [(4, 2), (4, 2)], None, "no axis 2"),
        (Concat("y", ("a", "b"), -1), [(4, 2), (4, 2)], None, "no axis -1"),
        (Concat("y", ("a", "b")), [(4, 2), (4, 3)], None, "differ outside axis 0"),
        (MaxPool2d("y", X, padding=(2, 0, 0, 0)), [(1, 8, 8)], None, "smaller than the kernel"),
        (MaxPool2d("y", X, padding=(0, 0, 0, 2)), [(1, 8, 8)], None, "smaller than the kernel"),
        (AvgPool2d("y", X), [(8, 8)], None, "takes 3-dimensional samples"),
        (GlobalAvgPool("y", X), [(8,)], None, "takes 3-dimensional samples"),
        (Reshape("y", X, (5,)), [(4,)], None, "cannot view"),
        (Reshape("y", X, (-2, -2)), [(4,)], None, "cannot view"),
        (Permute("y", X, (0, 0)), [(4, 2)], None, "no order of 2 axes"),
    ],
)
def test_impossible_geometry_is_refused_with_the_ops_name(op, inputs, weight, message):
    with pytest.raises(IntactError, match=message) as error:
        output_shape(op, inputs, weight)
    assert f"{type(op).__name__} 'y'" in str(error.value)


def test_macs_count_the_products_of_a_brute_force_convolution():
    shape, weight = (4, 7, 6), (6, 2, 3, 2)
    op = Conv2d("y", X, stride=(2, 1), padding=(1, 1, 0, 0), groups=2)
    outputs, height, width = output_shape(op, [shape], weight)
    products = sum(
        1
        for _ in range(outputs * height * width)  # every output
        for _ in range(weight[1] * weight[2] * weight[3])  # reads one window of its group
    )
    assert macs(op, [shape], (outputs, height, width), weight) == products


def test_macs_of_the_other_ops():
    assert macs(Linear("y", X), [(3, 5)], (3, 7), (7, 5)) == 3 * 7 * 5
    assert macs(AvgPool2d("y", X, (3, 2)), [(4, 6, 6)], (4, 2, 3)) == 4 * 2 * 3 * 6
    assert macs(GlobalAvgPool("y", X), [(4, 6, 5)], (4, 1, 1)) == 4 * 30
    assert macs(Conv2d("y", X), [(3, 8, 8)], (4, 8, 8)) == 0
    for op in ALL:
        if not (weighted(op) or isinstance(op, AvgPool2d | GlobalAvgPool)):
            assert macs(op, [(4, 4, 4)], (4, 4, 4)) == 0


def test_pool_size_counts_padding_too():
    assert pool_size(AvgPool2d("y", X, (3, 2), padding=(1, 1, 1, 1)), (4, 5, 5)) == 6
    assert pool_size(GlobalAvgPool("y", X), (4, 5, 6)) == 30


def test_every_op_is_of_one_kind():
    kinds = {type(op).__name__: (weighted(op), accumulates(op), moves_codes(op)) for op in ALL}
    assert kinds == {
        "Conv2d": (True, True, False),
        "Linear": (True, True, False),
        "Add": (False, False, False),
        "Concat": (False, False, False),
        "MaxPool2d": (False, False, True),
        "AvgPool2d": (False, True, False),
        "GlobalAvgPool": (False, True, False),
        "Reshape": (False, False, True),
        "Permute": (False, False, True),
        "Clamp": (False, False, True),
        "Requantize": (False, True, False),
    }


def test_last_uses_frees_each_tensor_after_its_last_reader():
    ops = [Clamp("a", X), Clamp("b", ("a",)), Add("c", ("a", "b")), Clamp("dead", ("x",))]
    freed = last_uses(ops, keep=("c",))
    assert {name: set(tensors) for name, tensors in freed.items()} == {
        "c": {"a", "b"},
        "dead": {"x", "dead"},
    }
