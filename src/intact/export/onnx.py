"""ONNX: a program as a file of standard operators that compute the program's integers.

`docs/onnx.md` says what such a file contains and what is proven of it. In short: between the first
and the last nodes every tensor of the program is a tensor of codes, and the arithmetic works on
*nominal* scales, 1 for activations and `M` for weights (arithmetic.md, section 6). The real scales
are metadata. How a layer is written is decided by proof, from the bound of its actual weights.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
from typing_extensions import assert_never

from intact import __version__
from intact.arithmetic import QParams, code_range, is_power_of_two, multiplier_value, quantize
from intact.errors import ExportError
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
    Padding,
    Pair,
    Permute,
    Requantize,
    Reshape,
    Shape,
    Slice,
    Subtract,
    Table,
    Upsample,
    accumulates,
)
from intact.program import Array, Program
from intact.storage import write_atomically

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

__all__ = [
    "FLAVOURS",
    "IOS",
    "TRACED",
    "Flavour",
    "Form",
    "Io",
    "export",
    "forms",
    "model",
    "saturates",
    "saturating",
    "saturation_probe",
]

Flavour: TypeAlias = Literal["qdq", "qoperator", "integer"]
"""qdq        float operators on integers between DequantizeLinear and QuantizeLinear, of which
           engines make int8 kernels
qoperator  QLinearConv and QLinearMatMul, which ONNX Runtime runs fastest
integer    ConvInteger and MatMulInteger of uint8 by uint8: the int32 accumulators are tensors of
           the graph, and no kernel of any CPU saturates"""

Io: TypeAlias = Literal["float", "integer"]
"""What goes in and out: float32 values, or integer codes."""

Form: TypeAlias = Literal["fused", "float", "qlinear", "integer"]
"""How an op that accumulates is written.

fused    one float operator, `M` in the scale of its weights; exact because `M` is a power of two,
         so that the products with `M` and all their sums are float32 numbers
float    one float operator on integers, exact because no sum exceeds 2**24; then the multiplier
qlinear  QLinearConv or QLinearMatMul, exact because on the dyadic grid every product with `M` is
         exact or saturates (arithmetic.md, section 3), in float32 and all the more in float64
integer  ConvInteger or MatMulInteger, on parts of the weights whose sums stay below 2**24, often
         one; sums and bias in int32; then the multiplier"""

FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)
IOS: tuple[Io, ...] = get_args(Io)

TRACED = "/traced"
"""Appended to the name of a tensor that a model gives out, see `model`."""
BATCH = "N"
"""The name of the dynamic first dimension."""
OPSET = 19
"""The oldest that the reference evaluator of `onnx` runs; engines have had it since 2023."""
IR_VERSION = 9
FLOAT32_EXACT = 2**24
"""Integers up to this magnitude, and their sums below it, are exact in float32."""
MAX_BYTES = 2**31 - 2**16
"""Protocol buffers end at 2 GiB; the rest is for what stands around the model's parts."""
MAX_PAIR = 2**15 // 255
"""Two weights of one sign that sum to this at most cannot saturate the int16 in which x86 without
VNNI adds two products of a uint8 and an int8 (`vpmaddubsw`): `128 * 255 < 2**15`."""

Float32: TypeAlias = npt.NDArray[np.float32]


def export(
    program: Program,
    path: str | os.PathLike[str],
    *,
    flavour: Flavour = "qdq",
    io: Io = "float",
) -> None:
    """Write a program to one ONNX file, atomically; the folder must exist.

    Takes what `model` takes and raises what it raises, and `StorageError` where the file cannot be
    written. Equal programs give equal bytes.
    """
    made = model(program, flavour=flavour, io=io)
    write_atomically(path, made.SerializeToString(deterministic=True))


def model(
    program: Program,
    *,
    flavour: Flavour = "qdq",
    io: Io = "float",
    trace: bool = False,
) -> ModelProto:
    """A program as an ONNX model that `onnx.checker` has checked in full.

    flavour  which operators it consists of, see `Flavour`
    io       "float": float32 `[N, *shape]` in and out, as `Program.run`. "integer": codes in the
             program's own types, as `Program.codes`
    trace    whether to give out every op's codes too, in the program's own types: outputs called as
             the ops, with `TRACED` appended

    Input and output have the program's names, and so has the node that does an op's work. The batch
    `N` is dynamic and at least 1.

    Raises `ExportError` where `onnx` is missing, an option has no such value, or the model would be
    larger than 2 GiB.
    """
    try:
        import onnx
    except ImportError as error:
        raise ExportError(
            "an export to ONNX needs the package onnx, which is not installed; run "
            "`pip install 'intact[onnx]'`."
        ) from error
    _check("flavour", flavour, FLAVOURS)
    _check("io", io, IOS)
    made = _Graph(program, flavour, io, trace).model()
    onnx.checker.check_model(made, full_check=True)
    return made


def forms(program: Program, flavour: Flavour = "qdq") -> dict[str, Form]:
    """How each op that accumulates is written, in the order of the ops."""
    _check("flavour", flavour, FLAVOURS)
    return {op.name: _form(program, op, flavour) for op in program.ops if accumulates(op)}


def saturates(program: Program, op: Op) -> bool:
    """Whether an int8 kernel of x86 without VNNI could saturate on the op's weights.

    Such a kernel adds two products of a code, at most 255, and a weight in int16. Which weights it
    pairs depends on how it packs them, so: any two of one channel. An average pool's are all 1.
    """
    weight = program.parameters.get(f"{op.name}.weight")
    if weight is None:
        return False
    ordered = np.sort(weight.reshape(len(weight), -1), axis=1)
    highest = np.maximum(ordered[:, -2:], 0).sum(axis=1, dtype=np.int64).max()
    lowest = np.minimum(ordered[:, :2], 0).sum(axis=1, dtype=np.int64).min()
    return bool(max(highest, -lowest) > MAX_PAIR)


def saturating(program: Program, flavour: Flavour = "qdq") -> tuple[str, ...]:
    """Ops that are written so that an int8 kernel of x86 without VNNI could saturate on them."""
    return tuple(
        name
        for name, form in forms(program, flavour).items()
        # The integer form stores weights as uint8, but where QLinearConv stands beside it.
        if (form != "integer" or flavour == "qoperator")
        and any(op.name == name and saturates(program, op) for op in program.ops)
    )


def saturation_probe() -> tuple[Program, Array, Array]:
    """A program, input codes, and the output codes that they have in an engine that is exact.

    In an int8 kernel that saturates on uint8 times int8, each output is about half as large. So an
    engine can ask itself, on the CPU at hand, whether it may run other flavours than "integer".
    """
    from intact.program import QTensor

    grid = QParams((1.0,), 0, 0, 255, signed=False)
    terms, channels = 144, 16
    parameters = {}
    for name, shape in (("conv", (channels, 16, 3, 3)), ("linear", (channels, terms))):
        parameters[f"{name}.weight"] = np.full(shape, 127, np.int8)
        parameters[f"{name}.multiplier"] = np.array([1], np.int32)
        parameters[f"{name}.weight_scale"] = np.array([2.0**-16], np.float32)
    program = Program(
        ("input",),
        ("output",),
        (
            Conv2d("conv", ("input",)),
            Reshape("convolved", ("conv",), (channels,)),
            Reshape("flat", ("input",), (terms,)),
            Linear("linear", ("flat",)),
            Concat("output", ("convolved", "linear")),
        ),
        {
            "input": QTensor((16, 3, 3), grid),
            "conv": QTensor((channels, 1, 1), grid),
            "convolved": QTensor((channels,), grid),
            "flat": QTensor((terms,), grid),
            "linear": QTensor((channels,), grid),
            "output": QTensor((2 * channels,), grid),
        },
        parameters,
    )
    code = round(terms * 127 * 255 / 2**16)  # 71.16
    return (
        program,
        np.full((1, 16, 3, 3), 255, np.uint8),
        np.full((1, 2 * channels), code, np.uint8),
    )


# -- decisions -----------------------------------------------------------------------------------


def _check(option: str, given: str, choices: Sequence[str]) -> None:
    if given not in choices:
        raise ExportError(f"there is no {option} {given!r}; choose one of {', '.join(choices)}.")


def _form(program: Program, op: Op, flavour: Flavour) -> Form:
    if isinstance(op, Requantize | Multiply):
        return "float"  # a code, or a product of two, times a number: the definition itself
    match flavour:
        case "qdq":
            if _fuses_exactly(program, op):
                return "fused"
            fits = int(program.accumulator_bounds(op).max()) <= FLOAT32_EXACT
            return "float" if fits else "integer"
        case "qoperator":
            # QLinearMatMul has no bias. Off the dyadic grid the result of either depends on the
            # type in which an engine multiplies: float32 in most, float64 in some.
            biased = isinstance(op, Linear) and f"{op.name}.bias" in program.parameters
            free = program.parameters[f"{op.name}.multiplier"].dtype == np.float32
            return "integer" if biased or free else "qlinear"
        case "integer":
            return "integer"
        case _:
            assert_never(flavour)


def _fuses_exactly(program: Program, op: Op) -> bool:
    """Whether float32 is exact, in any order, with `M` multiplied into the weights and the bias.

    It is where `M` is a power of two and the accumulator's bound fits the significand, 24 bits. So
    it is for most layers on the power-of-two grid, and for hardly any on the dyadic one. Products
    with a short odd multiple of a power would be exact too, but OpenVINO's int8 kernels divide by
    `1 / M`, and of 24,576 sums times 7, 3 or 5 * 2**k, many of them ties, 89 were rounded wrongly.
    Codes narrower than their type need a clamp, with which no engine fuses.
    """
    if _narrow(program.tensors[op.name].qparams):
        return False
    multiplier = program.parameters[f"{op.name}.multiplier"]
    value = multiplier_value(multiplier, program.tensors[op.name].qparams.bits).astype(np.float64)
    significand, exponent = np.frexp(value)
    # Where all inputs are 0 so is the bound, but a weight itself must be exact all the same.
    bound = np.maximum(program.accumulator_bounds(op), 128)
    # The range of exponents keeps sums from underflowing, and from overflowing an int32.
    fits = (bound <= FLOAT32_EXACT) & (exponent > -64) & (value * bound < 2**30)
    return bool(((significand == 0.5) & fits).all())


def unsigned(program: Program) -> Program:
    """The same program with uint8 codes: signed codes, and their zero points, are raised.

    By `2**(bits - 1)`, which is even: the codes stand for the same real values. Of the parameters
    only tables hold codes; their entries are raised too, and keep their order. ONNX Runtime has no
    ConvInteger of int8 inputs, and its QLinearConv of them is slow.
    """
    raised = {name: replace(t, qparams=_raised(t.qparams)) for name, t in program.tensors.items()}
    tables = {
        f"{op.name}.table": (
            program.parameters[f"{op.name}.table"].astype(np.int16)
            + _raised_by(program.tensors[op.name].qparams)
        ).astype(np.uint8)
        for op in program.ops
        if isinstance(op, Table)
    }
    return replace(program, tensors=raised, parameters={**program.parameters, **tables})


def _raised_by(grid: QParams) -> int:
    return -code_range(grid.bits, grid.signed)[0]


def _raised(grid: QParams) -> QParams:
    by = _raised_by(grid)
    return replace(
        grid,
        zero_point=grid.zero_point + by,
        qmin=grid.qmin + by,
        qmax=grid.qmax + by,
        signed=False,
    )


def _narrow(grid: QParams) -> bool:
    """Whether a grid's code range is less than that of the stored type."""
    return (grid.qmin, grid.qmax) != code_range(8, grid.signed)


# -- layers --------------------------------------------------------------------------------------

_INT8 = QParams((1.0,))
_UINT8 = QParams((1.0,), 128, 0, 255, signed=False)


@dataclass(frozen=True, eq=False)
class _Layer:
    """A convolution, linear or average pool, as what ONNX has for it: Conv or MatMul.

    name        of the op, and of its result
    codes       name of the value that holds the input's codes, whose grid is `source`
    target      the result's grid
    weight      int8 `[O, C / groups, kh, kw]`, or `[O, K]`; an average pool's are 1
    bias        int32 [O], or None
    multiplier  float32 `M`, [1] or [O]
    geometry    attributes of the convolution; None of a linear
    """

    name: str
    codes: str
    source: QParams
    target: QParams
    weight: Array
    bias: Array | None
    multiplier: Float32
    geometry: Mapping[str, Any] | None

    @property
    def rows(self) -> Array:
        """The weights, flattened to `[O, K]`."""
        return self.weight.reshape(len(self.weight), -1)

    @property
    def stored(self) -> Array:
        """The weights as MatMul takes them, `[K, O]`, or as Conv does."""
        return self.weight.T if self.geometry is None else self.weight

    @property
    def factor(self) -> Float32:
        """The multiplier, a scalar where there is one for all channels."""
        return self.multiplier.reshape(()) if self.multiplier.size == 1 else self.multiplier

    def over_channels(self, values: Array) -> Array:
        """Values per channel, shaped to broadcast against the accumulators."""
        return values if self.geometry is None or not values.ndim else values.reshape(-1, 1, 1)

    def parts(self) -> Iterator[slice]:
        """Ranges of the flattened weights whose sums float32 holds; together, all of them."""
        terms = np.abs(self.rows.astype(np.int64)) * self.source.max_magnitude
        begin, total = 0, np.zeros(len(terms), np.int64)
        for k in range(terms.shape[1]):
            total += terms[:, k]
            if total.max() > FLOAT32_EXACT:
                yield slice(begin, k)
                begin, total = k, terms[:, k].copy()
        yield slice(begin, terms.shape[1])


def _windows(stride: Pair, padding: Padding, dilation: Pair) -> dict[str, list[int]]:
    """Attributes of an ONNX convolution or pool, whose pads are top, left, bottom, right."""
    top, bottom, left, right = padding
    pads = [top, left, bottom, right]
    return {"strides": list(stride), "pads": pads, "dilations": list(dilation)}


# OpenVINO 2026.4 computes two kinds of convolution wrongly, from whatever its memory holds, and
# crashes now and then (docs/onnx.md). They are written in another way, with the same sums.


def _pads_much(geometry: Mapping[str, Any], kernel: Sequence[int], size: Sequence[int]) -> bool:
    """Whether a window can lie in the padding altogether, or be larger than the unpadded input.

    Such a padding becomes an operator of its own.
    """
    pads, dilations = geometry["pads"], geometry["dilations"]
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    outside = any(pad >= r for pad, r in zip(pads, reach * 2, strict=True))
    larger = any(r > n for r, n in zip(reach, size, strict=True))
    return any(pads) and (outside or larger)


def _one_channel(geometry: Mapping[str, Any], weight: Array) -> bool:
    """Whether a convolution sees one channel per group and yields several, or strides sideways.

    Its weights become those of one group, and of two channels at least.
    """
    groups = geometry["group"]
    many = len(weight) > groups if groups > 1 else geometry["strides"][1] > 1
    return bool(weight.shape[1] == 1 and many)


def _ungrouped(weight: Array, groups: int) -> Array:
    """Weights `[O, 1, kh, kw]` of `groups` groups as `[O, max(2, groups), kh, kw]` of one."""
    channels = np.arange(len(weight)) // (len(weight) // groups)
    dense = np.zeros((len(weight), max(2, groups), *weight.shape[2:]), weight.dtype)
    dense[np.arange(len(weight)), channels] = weight[:, 0]
    return dense


class _Graph:
    """An ONNX graph in the making: each method adds nodes and returns the name of a value."""

    def __init__(self, program: Program, flavour: Flavour, io: Io, trace: bool) -> None:
        self.program = program
        self.flavour = flavour
        self.io = io
        self.trace = trace
        self.forms = forms(program, flavour)
        as_is = flavour == "qdq" and "integer" not in self.forms.values()
        self.inner = program if as_is else unsigned(program)
        """What is written: the program itself, or the same with unsigned codes."""
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.bytes = 0
        self.value_names = {*program.tensors, *(name + TRACED for name in program.tensors)}
        self.node_names = set(program.tensors)
        self.current = ""
        """Name of the op whose nodes are being added."""
        self.shared: dict[tuple[str, float], str] = {}
        self.codes: dict[str, str] = {}
        """Name of the value that holds the codes of a tensor."""

    # -- pieces ----------------------------------------------------------------------------------

    def constant(self, name: str, array: npt.ArrayLike, dtype: npt.DTypeLike) -> str:
        """An initializer."""
        import onnx

        values = np.asarray(array, dtype)
        self.bytes += values.nbytes
        if self.bytes > MAX_BYTES:
            raise self.too_large()
        name = _take(name, self.value_names)
        self.initializers.append(onnx.numpy_helper.from_array(values, name))
        return name

    def too_large(self) -> ExportError:
        return ExportError(
            "the ONNX model would be larger than 2 GiB, the most that a file without external data "
            f"can be; the program has {self.program.parameter_bytes:,} bytes of parameters. Split "
            "the network into several programs."
        )

    def scalar(self, value: int, dtype: npt.DTypeLike) -> str:
        """A scalar initializer, one for all nodes that need it."""
        key = (np.dtype(dtype).name, value)
        if key not in self.shared:
            self.shared[key] = self.constant(f"{key[0]}/{value}", value, dtype)
        return self.shared[key]

    def node(
        self, kind: str, inputs: Sequence[str], name: str, output: str | None = None, **attrs: Any
    ) -> str:
        """A node with one output. The node that does an op's work is called as the op."""
        import onnx

        output = output or _take(name, self.value_names)
        called = name if name == self.current else _take(name, self.node_names)
        self.nodes.append(onnx.helper.make_node(kind, inputs, [output], called, **attrs))
        return output

    def dequantize(self, codes: str, grid: QParams, name: str) -> str:
        """Codes to float32 `q - zero_point`."""
        nominal = [self.scalar(1, np.float32), self.scalar(grid.zero_point, grid.dtype)]
        return self.node("DequantizeLinear", [codes, *nominal], name)

    def quantize(self, centred: str, grid: QParams, name: str, output: str) -> str:
        """Float32 `q - zero_point`, all integers, to codes, clamped to their type."""
        nominal = [self.scalar(1, np.float32), self.scalar(grid.zero_point, grid.dtype)]
        return self.node("QuantizeLinear", [centred, *nominal], name, output)

    def clamp(self, centred: str, grid: QParams, name: str) -> str:
        """Float32 `q - zero_point`, clamped to the code range."""
        ends = (grid.qmin - grid.zero_point, grid.qmax - grid.zero_point)
        return self.node("Clip", [centred, *(self.scalar(e, np.float32) for e in ends)], name)

    def requantize(self, sums: str, name: str, factor: Array, output: str) -> None:
        """Float32 accumulators to codes, step by step.  arithmetic.md, section 3."""
        grid = self.inner.tensors[name].qparams
        multiplier = self.constant(f"{name}/multiplier", factor, np.float32)
        scaled = self.node("Mul", [sums, multiplier], f"{name}/scaled")
        self.round_to_codes(scaled, grid, name, output)

    def round_to_codes(self, centred: str, grid: QParams, name: str, output: str) -> None:
        """`clamp(rint(.) + zero_point)` with a step for each.

        QuantizeLinear then sees integers within its range, so it does not matter whether an engine
        divides by the scale or multiplies, and adds the zero point before it rounds or after.
        """
        rounded = self.node("Round", [centred], f"{name}/rounded")
        clamped = self.clamp(rounded, grid, f"{name}/clamped")
        self.quantize(clamped, grid, f"{name}/quantize", output)

    def wide(self, name: str) -> str:
        """The value to which a kernel writes codes that know no range but that of their type."""
        narrow = _narrow(self.inner.tensors[name].qparams)
        return _take(f"{name}/wide", self.value_names) if narrow else self.codes[name]

    def narrowed(self, name: str, wide: str) -> None:
        """From `wide` to the tensor's codes."""
        if wide != self.codes[name]:
            grid = self.inner.tensors[name].qparams
            ends = [self.scalar(grid.qmin, grid.dtype), self.scalar(grid.qmax, grid.dtype)]
            self.node("Clip", [wide, *ends], f"{name}/narrow", self.codes[name])

    # -- the whole -------------------------------------------------------------------------------

    def model(self) -> ModelProto:
        import onnx

        program, inner = self.program, self.inner
        ends = (*program.inputs, *program.outputs)
        # Not in the order of the mapping, which a file does not keep.
        names = (*program.inputs, *(op.name for op in program.ops))
        for name in names:
            other = inner.tensors[name] != program.tensors[name]
            apart = name in ends and (self.io == "float" or other)
            self.codes[name] = _take(f"{name}/codes", self.value_names) if apart else name
        for name in program.inputs:
            self.input(name)
        for op in program.ops:
            first, self.current = len(self.nodes), op.name
            self.op(op)
            self.describe(op, self.nodes[first:])
        self.current = ""
        for name in program.outputs:
            self.output(name)
        outputs = [self.info(program, name, name, self.io) for name in program.outputs]
        if self.trace:
            for op in program.ops:
                traced = op.name + TRACED
                self.recode(self.codes[op.name], op.name, inner, program, traced)
                outputs.append(self.info(program, op.name, traced, "integer"))
        graph = onnx.helper.make_graph(
            self.nodes,
            "intact",
            [self.info(program, name, name, self.io) for name in program.inputs],
            outputs,
            self.initializers,
            value_info=[
                self.info(inner, name, self.codes[name], "integer")
                for name in names
                if self.codes[name] not in ends
            ],
        )
        made = onnx.helper.make_model(
            graph,
            producer_name="intact",
            producer_version=__version__,
            doc_string=(
                f"An integer-only program, written by intact {__version__}. Its tensors hold "
                "integer codes on nominal scales; the real scales are in the metadata, "
                f"intact.tensors. SHA-256 of the program: {program.sha256}"
            ),
            ir_version=IR_VERSION,
            opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        )
        onnx.helper.set_model_props(made, self.metadata())
        if made.ByteSize() > MAX_BYTES:
            raise self.too_large()
        return made

    def info(self, program: Program, tensor: str, value: str, io: Io) -> ValueInfoProto:
        """The declaration of a value that holds a tensor, as real values or as codes."""
        import onnx

        spec = program.tensors[tensor]
        dtype = np.dtype(np.float32) if io == "float" else spec.qparams.dtype
        kind = onnx.helper.np_dtype_to_tensor_dtype(dtype)
        return onnx.helper.make_tensor_value_info(value, kind, [BATCH, *spec.shape])

    def describe(self, op: Op, nodes: Sequence[NodeProto]) -> None:
        """Say in a viewer what an op's nodes compute."""
        grid = self.program.tensors[op.name].qparams
        form = f", {self.forms[op.name]}" if op.name in self.forms else ""
        chosen = next((node for node in nodes if node.name == op.name), nodes[-1])
        chosen.doc_string = (
            f"{type(op).__name__}{form}: {grid.type_name} {grid.qmin} to {grid.qmax}, scale "
            f"{grid.scale[0]!r}, zero point {grid.zero_point}"
        )

    def metadata(self) -> dict[str, str]:
        program, inner = self.program, self.inner
        tensors = {
            name: {
                "value": self.codes[name],
                "type": tensor.qparams.type_name,
                "scale": tensor.qparams.scale[0],
                "zero_point": tensor.qparams.zero_point,
                "qmin": tensor.qparams.qmin,
                "qmax": tensor.qparams.qmax,
                "raised_by": inner.tensors[name].qparams.zero_point - tensor.qparams.zero_point,
            }
            for name, tensor in program.tensors.items()
        }
        layers: dict[str, dict[str, Any]] = {}
        risky = saturating(program, self.flavour)
        for op in program.ops:
            if op.name in self.forms:
                layers[op.name] = {
                    "form": self.forms[op.name],
                    "saturates_without_vnni": op.name in risky,
                }
                scales = program.parameters.get(f"{op.name}.weight_scale")
                if scales is not None:
                    layers[op.name]["weight_scale"] = scales.tolist()
        values = {"tensors": tensors, "layers": layers, "info": dict(program.info)}
        return {
            "intact.version": __version__,
            "intact.program": program.sha256,
            "intact.flavour": self.flavour,
            "intact.io": self.io,
            **{f"intact.{key}": json.dumps(value, sort_keys=True) for key, value in values.items()},
        }

    def input(self, name: str) -> None:
        """From what goes in to codes."""
        grid, codes = self.inner.tensors[name].qparams, self.codes[name]
        if self.io == "integer":
            if codes != name:
                self.recode(name, name, self.program, self.inner, codes)
            return
        scale = np.float32(grid.scale[0])
        if is_power_of_two(scale):
            # A power of two. To divide by it and to multiply by its inverse is the same, so it is
            # written as what engines make of a division by a constant.
            inverse = self.constant(f"{name}/inverse_scale", 1 / scale, np.float32)
            scaled = self.node("Mul", [name, inverse], f"{name}/scaled")
        else:
            divisor = self.constant(f"{name}/scale", scale, np.float32)
            scaled = self.node("Div", [name, divisor], f"{name}/scaled")
        self.round_to_codes(scaled, grid, name, codes)

    def output(self, name: str) -> None:
        """From codes to what goes out."""
        grid, codes = self.inner.tensors[name].qparams, self.codes[name]
        if self.io == "integer":
            if codes != name:
                self.recode(codes, name, self.inner, self.program, name)
            return
        # Under another shape. Otherwise OpenVINO fuses the scale with the operators before it, and
        # then multiplies before it has rounded.
        shape = self.program.tensors[name].shape
        deeper = self.constant(f"{name}/deeper", [0, *shape, 1], np.int64)
        apart = self.node("Reshape", [codes, deeper], f"{name}/apart")
        scale = self.constant(f"{name}/scale", grid.scale[0], np.float32)
        zero_point = self.scalar(grid.zero_point, grid.dtype)
        real = self.node("DequantizeLinear", [apart, scale, zero_point], f"{name}/dequantize")
        back = self.constant(f"{name}/shape", [0, *shape], np.int64)
        self.node("Reshape", [real, back], f"{name}/real", name)

    def recode(
        self, codes: str, tensor: str, source: Program, target: Program, output: str
    ) -> None:
        """A tensor's codes in one program to those in another that has other zero points."""
        before, after = (program.tensors[tensor].qparams for program in (source, target))
        if before == after:
            self.node("Identity", [codes], f"{output}/identity", output)
        else:
            centred = self.dequantize(codes, before, f"{output}/centred")
            self.quantize(centred, after, f"{output}/recode", output)

    # -- ops -------------------------------------------------------------------------------------

    def op(self, op: Op) -> None:
        """Add the nodes of an op; its result is `self.codes[op.name]`."""
        name, output = op.name, self.codes[op.name]
        grid = self.inner.tensors[name].qparams
        inputs = [self.codes[i] for i in op.inputs]
        grids = [self.inner.tensors[i].qparams for i in op.inputs]
        match op:
            case Conv2d() | Linear() | AvgPool2d() | GlobalAvgPool():
                self.accumulate(self.layer(op))
            case Requantize():
                stored = self.program.parameters[f"{name}.multiplier"]
                x = self.dequantize(inputs[0], grids[0], f"{name}/dequantize")
                factor = multiplier_value(stored, grid.bits).reshape(())
                self.requantize(x, name, factor, output)
            case Add() | Subtract():
                kind, result = ("Add", "sum") if isinstance(op, Add) else ("Sub", "difference")
                terms = self.centred(name, inputs, grids)
                total = self.node(kind, terms, name, _take(f"{name}/{result}", self.value_names))
                if _narrow(grid):
                    total = self.clamp(total, grid, f"{name}/clamped")
                self.quantize(total, grid, f"{name}/quantize", output)
            case Multiply():
                factors = self.centred(name, inputs, grids)
                product = _take(f"{name}/product", self.value_names)
                self.node("Mul", factors, name, product)  # at most 255 * 255: exact
                # The identity. Without it optimizers would multiply a factor by the multiplier.
                integers = self.node("Round", [product], f"{name}/integers")
                stored = self.program.parameters[f"{name}.multiplier"]
                factor = multiplier_value(stored, grid.bits).reshape(())
                self.requantize(integers, name, factor, output)
            case Table():
                self.table(op, inputs[0], grids[0])
            case Clamp():
                ends = [self.scalar(grid.qmin, grid.dtype), self.scalar(grid.qmax, grid.dtype)]
                self.node("Clip", [*inputs, *ends], name, output)
            case Concat():
                self.node("Concat", inputs, name, output, axis=op.axis + 1)
            case MaxPool2d():
                windows = _windows(op.stride, op.padding, op.dilation)
                kernel = list(op.kernel)
                self.node("MaxPool", inputs, name, output, kernel_shape=kernel, **windows)
            case Reshape():
                # 0 keeps the batch, whatever it is.
                shape = self.constant(f"{name}/shape", [0, *op.shape], np.int64)
                self.node("Reshape", [*inputs, shape], name, output)
            case Slice():
                bounds = {"start": op.start, "stop": op.stop, "axis": op.axis + 1, "step": op.step}
                chosen = [
                    self.constant(f"{name}/{key}", [value], np.int64)
                    for key, value in bounds.items()
                ]
                self.node("Slice", [*inputs, *chosen], name, output)
            case Pad():
                code = self.scalar(int(quantize(op.value, grid)), grid.dtype)
                widths = [0, *op.padding[::2], 0, *op.padding[1::2]]
                pads = self.constant(f"{name}/pads", widths, np.int64)
                self.node("Pad", [*inputs, pads, code], name, output)
            case Upsample():
                self.upsample(op, inputs[0])
            case Permute():
                # Under another shape. Otherwise OpenVINO moves it behind the subtraction of the
                # zero point, and crashes where a grouped convolution follows.
                before = self.constant(
                    f"{name}/deeper", [0, *self.shape(op.inputs[0]), 1], np.int64
                )
                after = self.constant(f"{name}/shape", [0, *self.shape(name)], np.int64)
                deep = self.node("Reshape", [*inputs, before], f"{name}/apart")
                perm = [0, *(a + 1 for a in op.axes), len(op.axes) + 1]
                turned = _take(f"{name}/turned", self.value_names)
                self.node("Transpose", [deep], name, turned, perm=perm)
                self.node("Reshape", [turned, after], f"{name}/back", output)
            case _:
                assert_never(op)

    def centred(
        self, name: str, inputs: Sequence[str], grids: Sequence[QParams]
    ) -> tuple[str, ...]:
        """Both operands of the op as float32 `q - zero_point`."""
        return tuple(
            self.dequantize(codes, grid, f"{name}/dequantize_{i}")
            for i, (codes, grid) in enumerate(zip(inputs, grids, strict=True))
        )

    def table(self, op: Table, codes: str, source: QParams) -> None:
        """Entries of the flattened table, by the code and, if channels differ, the channel."""
        name, output = op.name, self.codes[op.name]
        rows = self.inner.parameters[f"{name}.table"]
        entries = self.constant(f"{name}.table", rows.reshape(-1), rows.dtype)
        first = np.arange(len(rows)) * rows.shape[1] - code_range(source.bits, source.signed)[0]
        index = self.node("Cast", [codes], f"{name}/code", to=_element_type(np.int32))
        if first.any():
            over_rows = first.reshape(-1, *[1] * (len(self.shape(name)) - 1))
            begin = self.constant(f"{name}/first", over_rows, np.int32)
            index = self.node("Add", [index, begin], f"{name}/entry")
        if self.flavour != "qoperator":
            self.node("Gather", [entries, index], name, output)
            return
        # ONNX Runtime's Gather takes 8 ns for an element, its GatherElements 1 ns.
        flat, shape = (
            self.constant(f"{name}/{key}", value, np.int64)
            for key, value in (("flat", [-1]), ("shape", [-1, *self.shape(name)]))
        )
        index = self.node("Reshape", [index, flat], f"{name}/entries")
        found = _take(f"{name}/found", self.value_names)
        self.node("GatherElements", [entries, index], name, found, axis=0)
        self.node("Reshape", [found, shape], f"{name}/back", output)

    def upsample(self, op: Upsample, codes: str) -> None:
        """Enlarge images with Resize; where other axes grow, take each index several times."""
        name, output, shape = op.name, self.codes[op.name], self.shape(op.inputs[0])
        if len(shape) == 3 and op.factors[0] == 1:
            scales = self.constant(f"{name}/scales", [1, *op.factors], np.float32)
            # floor(index / scale): exact, as scales are integers.
            how = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
            self.node("Resize", [codes, "", scales], name, output, mode="nearest", **how)
            return
        # OpenVINO's Resize crashes on some tensors that are no images.
        growing = [axis for axis, factor in enumerate(op.factors) if factor > 1]
        for axis in growing[:-1]:
            codes = self.repeated(op, codes, axis, f"{name}/along_{axis}")
        last = growing[-1] if growing else 0
        self.repeated(op, codes, last, name, output)

    def repeated(
        self, op: Upsample, codes: str, axis: int, name: str, output: str | None = None
    ) -> str:
        """Every element along an axis of the sample as often as the op says."""
        size, factor = self.shape(op.inputs[0])[axis], op.factors[axis]
        index = np.arange(size).repeat(factor)
        indices = self.constant(f"{op.name}/indices_{axis}", index, np.int64)
        return self.node("Gather", [codes, indices], name, output, axis=axis + 1)

    def shape(self, tensor: str) -> Shape:
        """Of a sample."""
        return self.program.tensors[tensor].shape

    def layer(self, op: Conv2d | Linear | AvgPool2d | GlobalAvgPool) -> _Layer:
        source, target = (self.inner.tensors[name] for name in (op.inputs[0], op.name))
        geometry: dict[str, Any] | None = None
        match op:
            case Conv2d():
                weight = self.program.parameters[f"{op.name}.weight"]
                geometry = {**_windows(op.stride, op.padding, op.dilation), "group": op.groups}
            case Linear():
                weight = self.program.parameters[f"{op.name}.weight"]
            case AvgPool2d():
                weight = np.ones((source.shape[0], 1, *op.kernel), np.int8)
                geometry = {**_windows(op.stride, op.padding, (1, 1)), "group": len(weight)}
            case GlobalAvgPool():
                weight = np.ones((source.shape[0], 1, *source.shape[1:]), np.int8)
                geometry = {**_windows((1, 1), (0, 0, 0, 0), (1, 1)), "group": len(weight)}
            case _:
                assert_never(op)
        codes = self.codes[op.inputs[0]]
        if geometry and self.flavour != "qoperator":  # which OpenVINO does not read
            widths = [0] * 8
            if _pads_much(geometry, weight.shape[2:], source.shape[1:]):
                top, left, bottom, right = geometry["pads"]
                widths = [0, 0, top, left, 0, 0, bottom, right]
                geometry["pads"] = [0, 0, 0, 0]
            if _one_channel(geometry, weight):
                weight = _ungrouped(weight, geometry["group"])
                geometry["group"] = 1
                widths[5] = weight.shape[1] - source.shape[0]
            if any(widths):
                codes = self.padded(op.name, codes, source.qparams, widths)
        stored = self.program.parameters[f"{op.name}.multiplier"]
        return _Layer(
            op.name,
            codes,
            source.qparams,
            target.qparams,
            weight,
            self.program.parameters.get(f"{op.name}.bias"),
            multiplier_value(stored, target.qparams.bits),
            geometry,
        )

    def padded(self, name: str, codes: str, grid: QParams, widths: Sequence[int]) -> str:
        """Codes with their zero point around them; `widths` before and after each axis."""
        ends = self.constant(f"{name}/pads", widths, np.int64)
        value = self.scalar(grid.zero_point, grid.dtype)
        return self.node("Pad", [codes, ends, value], f"{name}/padded")

    def accumulate(self, layer: _Layer) -> None:
        form = self.forms[layer.name]
        match form:
            case "fused":
                self.fused(layer)
            case "float":
                self.floating(layer)
            case "integer":
                self.integer(layer)
            case "qlinear":
                self.qlinear(layer)
            case _:
                assert_never(form)

    def fused(self, layer: _Layer) -> None:
        """DequantizeLinear of the weights with scale `M`, Conv or MatMul, QuantizeLinear."""
        name, many = layer.name, layer.factor.ndim > 0
        scale = self.constant(f"{name}/multiplier", layer.factor, np.float32)
        zeros = np.zeros(layer.factor.shape)
        scaled = [
            self.constant(f"{name}.weight", layer.stored, np.int8),
            scale,
            self.constant(f"{name}/weight_zero_point", zeros, np.int8),
        ]
        axis = {"axis": 0 if layer.geometry else 1} if many else {}
        weight = self.node("DequantizeLinear", scaled, f"{name}/dequantize_weight", None, **axis)
        bias = None
        if layer.bias is not None:
            codes = self.constant(f"{name}.bias", layer.bias, np.int32)
            axis = {"axis": 0} if many else {}
            dequantize = f"{name}/dequantize_bias"
            bias = self.node("DequantizeLinear", [codes, scale], dequantize, None, **axis)
        x = self.dequantize(layer.codes, layer.source, f"{name}/dequantize")
        sums = self.float_sums(layer, x, weight, bias)
        self.quantize(sums, layer.target, f"{name}/quantize", self.codes[name])

    def floating(self, layer: _Layer) -> None:
        """Conv or MatMul of integers in float32, then the multiplier."""
        name = layer.name
        x = self.dequantize(layer.codes, layer.source, f"{name}/dequantize")
        stored = self.constant(f"{name}.weight", layer.stored, np.int8)
        weight = self.dequantize(stored, _INT8, f"{name}/dequantize_weight")
        bias = None
        if layer.bias is not None:
            codes = self.constant(f"{name}.bias", layer.bias, np.int32)
            one = self.scalar(1, np.float32)
            bias = self.node("DequantizeLinear", [codes, one], f"{name}/dequantize_bias")
        sums = self.float_sums(layer, x, weight, bias)
        factor, output = layer.over_channels(layer.factor), self.codes[name]
        # A convolution that yields one position goes on under another shape. Otherwise OpenVINO
        # fuses the multipliers of its channels, and makes zeros of a batch of one.
        apart = layer.geometry is not None and self.shape(name)[1:] == (1, 1) and factor.ndim > 0
        if apart:
            flat = self.constant(f"{name}/flat", [0, -1], np.int64)
            sums = self.node("Reshape", [sums, flat], f"{name}/apart")
            factor, output = layer.factor, _take(f"{name}/flat_codes", self.value_names)
        # The identity. Without it optimizers would multiply the weights by the multiplier.
        integers = self.node("Round", [sums], f"{name}/integers")
        self.requantize(integers, name, factor, output)
        if apart:
            back = self.constant(f"{name}/shape", [0, *self.shape(name)], np.int64)
            self.node("Reshape", [output, back], f"{name}/back", self.codes[name])

    def float_sums(self, layer: _Layer, x: str, weight: str, bias: str | None) -> str:
        sums = _take(f"{layer.name}/sums", self.value_names)
        if layer.geometry is not None:
            inputs = [x, weight] if bias is None else [x, weight, bias]
            return self.node("Conv", inputs, layer.name, sums, **layer.geometry)
        self.node("MatMul", [x, weight], layer.name, sums)
        return sums if bias is None else self.node("Add", [sums, bias], f"{layer.name}/biased")

    def qlinear(self, layer: _Layer) -> None:
        """QLinearConv or QLinearMatMul."""
        name = layer.name
        zeros = np.zeros(layer.factor.shape)
        inputs = [
            layer.codes,
            self.scalar(1, np.float32),
            self.scalar(layer.source.zero_point, layer.source.dtype),
            self.constant(f"{name}.weight", layer.stored, np.int8),
            self.constant(f"{name}/multiplier", layer.factor, np.float32),
            self.constant(f"{name}/weight_zero_point", zeros, np.int8),
            self.scalar(1, np.float32),
            self.scalar(layer.target.zero_point, layer.target.dtype),
        ]
        wide = self.wide(name)
        if layer.geometry is None:
            self.node("QLinearMatMul", inputs, name, wide)
        else:
            if layer.bias is not None:
                inputs.append(self.constant(f"{name}.bias", layer.bias, np.int32))
            self.node("QLinearConv", inputs, name, wide, **layer.geometry)
        self.narrowed(name, wide)

    def integer(self, layer: _Layer) -> None:
        """Sums and bias in int32, then the multiplier.

        No part adds up to more than 2**24, because OpenVINO adds these sums in float32.
        """
        name = layer.name
        parts = list(layer.parts())
        sums = [
            self.part(layer, part, name if len(parts) == 1 else f"{name}/part_{i}")
            for i, part in enumerate(parts)
        ]
        total = sums[0]
        for i, more in enumerate(sums[1:], 1):
            total = self.node("Add", [total, more], f"{name}/sum_{i}")
        if layer.bias is not None:
            bias = self.constant(f"{name}.bias", layer.over_channels(layer.bias), np.int32)
            total = self.node("Add", [total, bias], f"{name}/accumulators")
        real = self.node("Cast", [total], f"{name}/float", to=_element_type(np.float32))
        self.requantize(real, name, layer.over_channels(layer.factor), self.codes[name])

    def part(self, layer: _Layer, part: slice, name: str) -> str:
        """int32 sums over a range of the flattened weights."""
        codes = layer.codes
        chosen = replace(layer, weight=layer.rows[:, part])
        if layer.geometry is not None:
            masked = np.zeros_like(layer.rows)
            masked[:, part] = layer.rows[:, part]
            chosen = replace(layer, weight=masked.reshape(layer.weight.shape))
        elif chosen.weight.shape != layer.weight.shape:
            ends = [self.constant(f"{name}/begin", [part.start], np.int64)]
            ends.append(self.constant(f"{name}/end", [part.stop], np.int64))
            axis = self.constant(f"{name}/axis", [-1], np.int64)
            codes = self.node("Slice", [codes, *ends, axis], f"{name}/slice")
        stored, grid = chosen.stored, _INT8
        if self.flavour != "qoperator":
            # Kernels for uint8 by uint8 multiply in int16 and add in int32 on every CPU, and ONNX
            # Runtime runs ConvInteger of int8 weights slowly on x86, and not at all on ARM64.
            stored, grid = stored.astype(np.int16) + _UINT8.zero_point, _UINT8
        weight = self.constant(f"{name}.weight", stored, grid.dtype)
        zeros = [self.scalar(g.zero_point, g.dtype) for g in (layer.source, grid)]
        sums = _take(f"{name}/int32", self.value_names)
        kind = "MatMulInteger" if layer.geometry is None else "ConvInteger"
        return self.node(kind, [codes, weight, *zeros], name, sums, **(layer.geometry or {}))


def _element_type(dtype: npt.DTypeLike) -> int:
    import onnx

    return onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def _take(name: str, taken: set[str]) -> str:
    """`name`, or the first of `name_2`, `name_3`, … that is free; taken from now on."""
    free, n = name, 2
    while free in taken:
        free, n = f"{name}_{n}", n + 1
    taken.add(free)
    return free
