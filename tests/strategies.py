"""Random valid programs over all ops, and codes to run them on: what engines are compared with.

`programs()` and `input_codes(program)` are hypothesis strategies. Structure is drawn by hypothesis,
so that it shrinks; array contents come from a drawn seed, which keeps a program to milliseconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from intact.arithmetic import (
    INT32_MAX,
    Grid,
    QParams,
    accumulator_bound,
    code_range,
    grid_neighbours,
    multiplier_value,
    quantize,
)
from intact.ops import (
    Add,
    AvgPool2d,
    Clamp,
    Concat,
    Conv2d,
    GlobalAvgPool,
    Linear,
    MaxPool2d,
    Multiply,
    Op,
    Pad,
    Permute,
    Requantize,
    Reshape,
    Shape,
    Slice,
    Subtract,
    Table,
    Upsample,
    output_shape,
    pool_size,
)
from intact.program import Program, QTensor
from intact.signature import unwrapped

Draw = Any
MOST_ELEMENTS = 2048
GRIDS: tuple[Grid, ...] = ("float", "dyadic", "power_of_two")


@dataclass
class Builder:
    """A program in the making. Each method adds one op and returns the name of its result."""

    tensors: dict[str, QTensor]
    rng: np.random.Generator
    inputs: list[str] = field(default_factory=lambda: ["x"])
    ops: list[Op] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def start(cls, shape: Shape, qparams: QParams, seed: int = 0) -> Builder:
        return cls({"x": QTensor(shape, qparams)}, np.random.default_rng(seed))

    def input(self, name: str, shape: Shape, qparams: QParams) -> str:
        """Add another input."""
        self.inputs.append(name)
        self.tensors[name] = QTensor(shape, qparams)
        return name

    def finish(self, *outputs: str | None, info: dict[str, str] | None = None) -> Program:
        last = tuple(output or self.ops[-1].name for output in outputs or (None,))
        inputs, ops = tuple(self.inputs), tuple(self.ops)
        return Program(inputs, last, ops, self.tensors, self.parameters, info or {})

    def shape(self, name: str) -> Shape:
        return self.tensors[name].shape

    def grid(self, name: str) -> QParams:
        return self.tensors[name].qparams

    def new_name(self, op: str) -> str:
        return f"{op}{len(self.ops)}"

    def add(self, op: Op, qparams: QParams) -> str:
        """Add an op that has no weight; its result's shape follows."""
        self.ops.append(op)
        shape = output_shape(op, [self.shape(i) for i in op.inputs])
        self.tensors[op.name] = QTensor(shape, qparams)
        return op.name

    def weighted(
        self,
        op: Conv2d | Linear,
        weight: Any,
        qparams: QParams,
        *,
        grid: Grid = "dyadic",
        per_channel: bool = True,
        bias: Any = None,
        gain: float = 1.0,
    ) -> str:
        """Add a convolution or a linear layer.

        gain  how far typical results reach into the code range: 1 about fills it, 8 saturates
        """
        source = self.grid(op.inputs[0])
        # Typical accumulators grow with the root of the number of terms, not with the number.
        rms = np.sqrt((weight.reshape(len(weight), -1).astype(np.float64) ** 2).sum(1) + 1)
        typical = rms * max(source.max_magnitude, 1) / 2
        if bias is not None:
            typical = np.maximum(typical, np.abs(bias.astype(np.float64)))
        reach = (qparams.qmax - qparams.qmin + 1) / 2
        wanted = gain * reach / (typical if per_channel else typical.max(keepdims=True))
        multiplier = grid_neighbours(wanted, grid, qparams.bits)[0]
        real = multiplier_value(multiplier, qparams.bits).astype(np.float64)
        self.ops.append(op)
        self.parameters[f"{op.name}.weight"] = weight
        if bias is not None:
            self.parameters[f"{op.name}.bias"] = bias
        self.parameters[f"{op.name}.multiplier"] = multiplier
        scale = (real * qparams.scale[0] / source.scale[0]).astype(np.float32)
        self.parameters[f"{op.name}.weight_scale"] = scale
        shape = output_shape(op, [self.shape(op.inputs[0])], weight.shape)
        self.tensors[op.name] = QTensor(shape, qparams)
        return op.name

    def rescaled(
        self, op: AvgPool2d | GlobalAvgPool | Requantize, qparams: QParams, grid: Grid = "dyadic"
    ) -> str:
        """Add an op whose multiplier is the quotient of the scales, rounded to the grid."""
        source = self.tensors[op.inputs[0]]
        terms = 1 if isinstance(op, Requantize) else pool_size(op, source.shape)
        quotient = source.qparams.scale[0] / (terms * qparams.scale[0])
        multiplier = grid_neighbours([quotient], grid, qparams.bits)[0]
        self.parameters[f"{op.name}.multiplier"] = multiplier
        return self.add(op, qparams)

    def on_grid(self, name: str, qparams: QParams, grid: Grid = "dyadic") -> str:
        """The tensor itself where it has this grid already, else its `Requantize`."""
        same = [(g.scale, g.zero_point, g.bits, g.signed) for g in (self.grid(name), qparams)]
        if same[0] == same[1]:
            return name
        return self.rescaled(Requantize(self.new_name("requantize"), (name,)), qparams, grid)


def example(seed: int = 0) -> Program:
    """A small program with most ops, always the same: convolution, pool, add, linear."""
    b = Builder.start((2, 5, 5), QParams((2.0**-7,)), seed)
    relu = QParams((2.0**-4,), -128, -128, 127)
    weight = b.rng.integers(-128, 128, (4, 2, 3, 3), np.int8)
    bias = b.rng.integers(-9999, 9999, 4, np.int32)
    conv = b.weighted(Conv2d("conv1", ("x",), padding=(1, 1, 1, 1)), weight, relu, bias=bias)
    pool = b.add(MaxPool2d("pool1", (conv,)), relu)
    both = b.add(Add("add", (pool, pool)), relu)
    flat = b.add(Reshape("flatten", (both,), (16,)), relu)
    b.weighted(
        Linear("fc", (flat,)), b.rng.integers(-128, 128, (3, 16), np.int8), QParams((0.125,))
    )
    return b.finish(info={"recipe": "default"})


# -- strategies ----------------------------------------------------------------------------------


@st.composite
def grids(draw: Draw, scale: float | None = None) -> QParams:
    """Any grid of an activation: 2 to 8 bits, any even zero point, now and then a narrow range."""
    bits = draw(st.sampled_from([8, 8, 8, 2, 3, 4, 5, 6, 7]))
    signed = draw(st.booleans())
    low, high = code_range(bits, signed)
    zero_point = 2 * draw(st.integers(-(-low // 2), high // 2))
    zero_point = draw(st.sampled_from([0, zero_point, 2 * (-(-low // 2)), 2 * (high // 2)]))
    qmin, qmax = low, high
    if draw(st.booleans()):
        qmin = draw(st.sampled_from([zero_point, low, draw(st.integers(low, high))]))
        qmax = draw(st.integers(qmin, high))
    if scale is None:
        exponent = draw(st.one_of(st.integers(-10, 3), st.integers(-40, 40)))
        scale = draw(st.floats(1, 2, width=32)) * 2.0**exponent
    return QParams((float(np.float32(scale)),), zero_point, qmin, qmax, bits, signed)


def similar(b: Builder, name: str) -> st.SearchStrategy[QParams]:
    """Grids that hold about the real values of a tensor, so that not all of it saturates."""
    given = b.grid(name)
    reach = given.scale[0] * max(given.max_magnitude, 1)
    return st.builds(
        lambda grid, factor: replace(
            grid, scale=(float(np.float32(factor * reach / max(grid.max_magnitude, 1))),)
        ),
        grids(scale=1.0),
        st.sampled_from([0.25, 0.7, 1.0, 1.3]),
    )


def shapes() -> st.SearchStrategy[Shape]:
    size = st.integers(1, 9)
    image = st.tuples(st.integers(1, 6), size, size)
    return st.one_of(*[image] * 5, st.tuples(size), st.tuples(size, size))


@st.composite
def programs(draw: Draw, max_ops: int = 6, *, several: bool = False) -> Program:
    """Small valid programs over all ops of `ops.py`.

    several  whether there may be up to three inputs and outputs, of any types; else one of each
    """
    if draw(st.integers(0, 19)) == 0:
        shape: Shape = (draw(st.integers(500, 1500)),)  # accumulators far beyond 2**24
    else:
        shape = draw(shapes())
    b = Builder.start(shape, draw(grids()), draw(st.integers(0, 2**32 - 1)))
    for i in range(draw(st.integers(0, 2)) if several else 0):
        b.input(f"x{i}", draw(shapes()), draw(grids()))
    for _ in range(draw(st.integers(1, max_ops))):
        names = list(b.tensors)
        source = draw(st.sampled_from([names[-1], names[-1], *names]))
        kinds = [_linear, _add, _concat, _reshape, _permute, _clamp, _requantize]
        kinds += [_subtract, _multiply, _multiply, _table, _table, _slice, _pad, _upsample]
        if len(b.shape(source)) == 3:
            kinds += [*[_conv] * 4, *[_max_pool] * 2, *[_avg_pool] * 2, _global_avg_pool]
        draw(st.sampled_from(kinds))(draw, b, source)
    info = draw(st.sampled_from([{}, {"recipe": "täglich\n\t8 bits"}]))
    if several:
        for name in b.inputs:
            if not any(name in op.inputs for op in b.ops):
                _requantize(draw, b, name)
        made = st.sampled_from([op.name for op in b.ops])
        return b.finish(*draw(st.lists(made, min_size=1, max_size=3, unique=True)), info=info)
    output = draw(st.sampled_from([b.ops[-1].name, b.ops[-1].name, *(op.name for op in b.ops)]))
    return b.finish(output, info=info)


@st.composite
def input_codes(draw: Draw, program: Program) -> Any:
    """A batch of 0 to 3 samples: uniform codes, only the extremes, or one code throughout.

    Of several inputs a tuple.
    """
    n = draw(st.sampled_from([1, 2, 3, 0]))
    return unwrapped(_codes_of(draw, program.tensors[name], n) for name in program.inputs)


def _codes_of(draw: Draw, spec: QTensor, n: int) -> Any:
    low, high = spec.qparams.qmin, spec.qparams.qmax
    shape = (n, *spec.shape)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["uniform", "extremes", "constant"]))
    if kind == "uniform":
        codes = rng.integers(low, high + 1, shape)
    elif kind == "extremes":
        codes = rng.choice([low, high], shape)
    else:
        codes = np.full(shape, draw(st.integers(low, high)))
    return codes.astype(spec.qparams.dtype)


def _weights(draw: Draw, b: Builder, shape: Shape) -> Any:
    low, high = code_range(draw(st.sampled_from([8, 8, 8, 2, 4])), signed=True)
    if draw(st.integers(0, 4)) == 0:
        return b.rng.choice(np.array([low, high], np.int8), shape)
    return b.rng.integers(low, high + 1, shape).astype(np.int8)


def _weighted(draw: Draw, b: Builder, op: Conv2d | Linear, weight: Any) -> None:
    bound = accumulator_bound(weight, b.grid(op.inputs[0]).max_magnitude, None)
    room = INT32_MAX - bound
    kind = draw(st.sampled_from(["none", "small", "small", "large", "extreme"]))
    bias = None
    if kind == "small":
        bias = b.rng.integers(-bound // 2 - 1, bound // 2 + 2)
    elif kind == "large":
        bias = b.rng.integers(-(2**27), 2**27, len(bound))
    elif kind == "extreme":  # the bound is INT32_MAX exactly
        bias = b.rng.choice([-1, 1], len(bound)) * room
    b.weighted(
        op,
        weight,
        draw(grids()),
        grid=draw(st.sampled_from(GRIDS)),
        per_channel=draw(st.booleans()),
        bias=None if bias is None else np.clip(bias, -room, room).astype(np.int32),
        gain=draw(st.sampled_from([0.3, 1.0, 1.0, 4.0])),
    )


def _window(draw: Draw, size: int, *, padding_below_kernel: bool) -> tuple[int, ...]:
    """Kernel, stride, dilation, padding before and after along one axis; they fit together."""
    kernel = draw(st.sampled_from([1, 2, 3, 3, 5]))
    dilation = draw(st.sampled_from([1, 1, 1, 2, 3]))
    most = min(kernel - 1 if padding_below_kernel else 3, 3)
    before, after = draw(st.integers(0, most)), draw(st.integers(0, most))
    if dilation * (kernel - 1) >= size + before + after:
        kernel, dilation = min(kernel, size), 1
    if padding_below_kernel:
        # With dilation a window of padding alone may arise; without, never.
        dilation = 1 if before or after else dilation
        before, after = min(before, kernel - 1), min(after, kernel - 1)
    return kernel, draw(st.integers(1, 3)), dilation, before, after


def _conv(draw: Draw, b: Builder, source: str) -> None:
    channels, height, width = b.shape(source)
    kh, sh, dh, top, bottom = _window(draw, height, padding_below_kernel=False)
    kw, sw, dw, left, right = _window(draw, width, padding_below_kernel=False)
    divisors = [g for g in range(1, channels + 1) if channels % g == 0]
    groups = draw(st.sampled_from([1, channels, *divisors]))
    out_channels = groups * draw(st.integers(1, max(1, 6 // groups)))
    op = Conv2d(
        b.new_name("conv"),
        (source,),
        (sh, sw),
        (top, bottom, left, right),
        (dh, dw),
        groups,
    )
    weight = _weights(draw, b, (out_channels, channels // groups, kh, kw))
    if math.prod(output_shape(op, [b.shape(source)], weight.shape)) <= MOST_ELEMENTS:
        _weighted(draw, b, op, weight)
    else:
        _requantize(draw, b, source)


def _linear(draw: Draw, b: Builder, source: str) -> None:
    shape = (draw(st.integers(1, 6)), b.shape(source)[-1])
    _weighted(draw, b, Linear(b.new_name("linear"), (source,)), _weights(draw, b, shape))


def _partners(draw: Draw, b: Builder, source: str, fits: Any, count: int) -> tuple[str, ...]:
    """`source` and tensors that fit its shape, all brought to one drawn grid."""
    others = st.sampled_from([name for name in b.tensors if fits(b.shape(name))])
    chosen = [source, *(draw(others) for _ in range(count - 1))]
    common = draw(st.one_of(st.just(b.grid(source)), similar(b, source)))
    multipliers = draw(st.sampled_from(GRIDS))
    return tuple(b.on_grid(name, common, multipliers) for name in chosen)


def _hull(b: Builder, names: tuple[str, ...]) -> QParams:
    """The grid of the tensors, with a code range that holds those of all."""
    grids = [b.grid(name) for name in names]
    return replace(grids[0], qmin=min(g.qmin for g in grids), qmax=max(g.qmax for g in grids))


def _add(draw: Draw, b: Builder, source: str) -> None:
    shape = b.shape(source)
    operands = _partners(draw, b, source, lambda s: s == shape, 2)
    b.add(Add(b.new_name("add"), operands), _narrowed(draw, b.grid(operands[0])))


def _subtract(draw: Draw, b: Builder, source: str) -> None:
    shape = b.shape(source)
    operands = _partners(draw, b, source, lambda s: s == shape, 2)
    b.add(Subtract(b.new_name("subtract"), operands), _narrowed(draw, b.grid(operands[0])))


def _multiply(draw: Draw, b: Builder, source: str) -> None:
    """By a tensor of its shape, or by one of length 1 along some axes, such as a slice of it."""
    shape = b.shape(source)
    if draw(st.booleans()):
        axis = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, shape[axis] - 1))
        b.add(Slice(b.new_name("slice"), (source,), axis, at, at + 1), b.grid(source))

    def fits(other: Shape) -> bool:
        return len(other) == len(shape) and all(
            n in (1, size) for n, size in zip(other, shape, strict=True)
        )

    other = draw(st.sampled_from([name for name in b.tensors if fits(b.shape(name))][::-1]))
    op = Multiply(b.new_name("multiply"), (source, other))
    grid = draw(grids())
    reach = [b.grid(name).scale[0] * max(b.grid(name).max_magnitude, 1) for name in op.inputs]
    scale = draw(st.sampled_from([0.25, 1.0, 1.3])) * reach[0] * reach[1]
    if not 2.0**-100 <= scale <= 2.0**100:
        _requantize(draw, b, source)
        return
    scale = float(np.float32(scale / max(grid.max_magnitude, 1)))
    quotient = b.grid(source).scale[0] * b.grid(other).scale[0] / scale
    multipliers = draw(st.sampled_from(GRIDS))
    b.parameters[f"{op.name}.multiplier"] = grid_neighbours([quotient], multipliers, grid.bits)[0]
    b.add(op, replace(grid, scale=(scale,)))


def _table(draw: Draw, b: Builder, source: str) -> None:
    """Any codes at all, for all channels or for each: no engine may assume a smooth function."""
    op = Table(b.new_name("table"), (source,))
    grid = draw(grids())
    rows = draw(st.sampled_from([1, 1, b.shape(source)[0]]))
    shape = (rows, 2 ** b.grid(source).bits)
    table = b.rng.integers(grid.qmin, grid.qmax + 1, shape).astype(grid.dtype)
    b.parameters[f"{op.name}.table"] = table
    b.add(op, grid)


def _slice(draw: Draw, b: Builder, source: str) -> None:
    shape = b.shape(source)
    axis = draw(st.integers(0, len(shape) - 1))
    start = draw(st.integers(0, shape[axis] - 1))
    stop, step = draw(st.integers(start + 1, shape[axis])), draw(st.sampled_from([1, 1, 2, 3]))
    op = Slice(b.new_name("slice"), (source,), axis, start, stop, step)
    b.add(op, b.grid(source))


def _pad(draw: Draw, b: Builder, source: str) -> None:
    shape, grid = b.shape(source), b.grid(source)
    padding = tuple(draw(st.sampled_from([0, 0, 1, 2])) for _ in range(2 * len(shape)))
    value = draw(st.sampled_from([0.0, 0.0, 1.3 * grid.scale[0], -50.0 * grid.scale[0]]))
    op = Pad(b.new_name("pad"), (source,), padding, value)
    if math.prod(output_shape(op, [shape])) > MOST_ELEMENTS:
        _requantize(draw, b, source)
        return
    low, high = code_range(grid.bits, grid.signed)
    code = int(quantize(value, replace(grid, qmin=low, qmax=high)))
    b.add(op, replace(grid, qmin=min(grid.qmin, code), qmax=max(grid.qmax, code)))


def _upsample(draw: Draw, b: Builder, source: str) -> None:
    shape = b.shape(source)
    op = Upsample(
        b.new_name("upsample"),
        (source,),
        tuple(draw(st.sampled_from([1, 2, 2, 3])) for _ in shape),
    )
    if math.prod(output_shape(op, [shape])) > MOST_ELEMENTS:
        _requantize(draw, b, source)
        return
    b.add(op, b.grid(source))


def _concat(draw: Draw, b: Builder, source: str) -> None:
    shape = b.shape(source)
    axis = draw(st.integers(0, len(shape) - 1))

    def fits(other: Shape) -> bool:
        around = (other[:axis], other[axis + 1 :]) == (shape[:axis], shape[axis + 1 :])
        return len(other) == len(shape) and around

    if 3 * math.prod(shape) > MOST_ELEMENTS:
        _requantize(draw, b, source)
        return
    operands = _partners(draw, b, source, fits, draw(st.integers(1, 3)))
    b.add(Concat(b.new_name("concat"), operands, axis), _hull(b, operands))


def _max_pool(draw: Draw, b: Builder, source: str) -> None:
    _, height, width = b.shape(source)
    kh, sh, dh, top, bottom = _window(draw, height, padding_below_kernel=True)
    kw, sw, dw, left, right = _window(draw, width, padding_below_kernel=True)
    name, padding = b.new_name("maxpool"), (top, bottom, left, right)
    op = MaxPool2d(name, (source,), (kh, kw), (sh, sw), padding, (dh, dw))
    b.add(op, b.grid(source))


def _avg_pool(draw: Draw, b: Builder, source: str) -> None:
    _, height, width = b.shape(source)
    kh, sh, _, top, bottom = _window(draw, height, padding_below_kernel=True)
    kw, sw, _, left, right = _window(draw, width, padding_below_kernel=True)
    name = b.new_name("avgpool")
    op = AvgPool2d(name, (source,), (kh, kw), (sh, sw), (top, bottom, left, right))
    b.rescaled(op, draw(similar(b, source)), draw(st.sampled_from(GRIDS)))


def _global_avg_pool(draw: Draw, b: Builder, source: str) -> None:
    op = GlobalAvgPool(b.new_name("globalavgpool"), (source,))
    b.rescaled(op, draw(similar(b, source)), draw(st.sampled_from(GRIDS)))


def _reshape(draw: Draw, b: Builder, source: str) -> None:
    shape = draw(st.permutations(b.shape(source)))
    count = math.prod(shape)
    choices = [tuple(shape), (count,), (1, count), (count, 1, 1)]
    choices += [(d, count // d) for d in range(2, 5) if count % d == 0]
    choices += [(1, d, count // d) for d in range(2, 5) if count % d == 0]
    b.add(Reshape(b.new_name("reshape"), (source,), draw(st.sampled_from(choices))), b.grid(source))


def _permute(draw: Draw, b: Builder, source: str) -> None:
    axes = tuple(draw(st.permutations(range(len(b.shape(source))))))
    b.add(Permute(b.new_name("permute"), (source,), axes), b.grid(source))


def _narrowed(draw: Draw, grid: QParams) -> QParams:
    low, high = code_range(grid.bits, grid.signed)
    qmin = draw(st.one_of(st.just(grid.qmin), st.integers(low, high)))
    return replace(grid, qmin=qmin, qmax=draw(st.integers(qmin, high)))


def _clamp(draw: Draw, b: Builder, source: str) -> None:
    b.add(Clamp(b.new_name("clamp"), (source,)), _narrowed(draw, b.grid(source)))


def _requantize(draw: Draw, b: Builder, source: str) -> None:
    op = Requantize(b.new_name("requantize"), (source,))
    b.rescaled(op, draw(similar(b, source)), draw(st.sampled_from(GRIDS)))
