"""The integer program: ops, codes and multipliers, and the rules that make them one program."""

from __future__ import annotations

import hashlib
import html
import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from os import PathLike
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt

from intact.arithmetic import (
    INT32_MAX,
    MULTIPLIER_LIMIT,
    QParams,
    accumulator_bits,
    accumulator_bound,
    dequantize,
    multiplier_value,
    quantize,
)
from intact.errors import IntactError, ProgramError
from intact.ops import (
    Add,
    AvgPool2d,
    Clamp,
    Conv2d,
    GlobalAvgPool,
    MaxPool2d,
    Multiply,
    Op,
    Shape,
    Subtract,
    Table,
    accumulates,
    macs,
    output_shape,
    pool_size,
    weighted,
)
from intact.signature import Values, in_order, signature_error, the_only, unwrapped, wrapped

if TYPE_CHECKING:
    from intact.engines import Engine

__all__ = ["PIXELS", "Program", "QTensor"]

MAX_OPS = 10_000
MAX_ELEMENTS = 2**28
"""Most elements of a parameter, or of one sample of a tensor, padding included: 256 MiB of codes
and at most 2 GiB of accumulators, which a laptop still holds."""
MAX_TOTAL_ELEMENTS = 2**31
"""Most elements of all tensors of one sample together, as if none were freed."""
MAX_WORK = 2**40
"""Most multiply-accumulates (or comparisons, in a max pool) of one op for one sample."""
MAX_DIMENSIONS = 8
MAX_WINDOW = 2**16
"""Largest kernel, stride, padding and dilation."""
MAX_NAME = 200
MAX_INFO = 2**20
"""Most characters of a program's `info`, all keys and values together."""
SMALLEST_SCALE = 2.0**-126
"""Smallest normal float32: a subnormal one is 0 on hardware that flushes them."""
LARGEST_SCALE = 2.0**119
"""`scale * (q - zero_point)` stays finite in float32: `2**119 * 255 < 2**127`."""

Array = npt.NDArray[Any]

PIXELS = QParams((1.0,), 0, 0, 255, signed=False)
"""The grid of an input of 8-bit pixels: each is its own code."""


@dataclass(frozen=True, slots=True)
class QTensor:
    """A tensor of a program: the shape of one sample, and its quantization grid."""

    shape: Shape
    qparams: QParams


def _never(x: object) -> None:
    """The quick way of an engine that has none."""
    del x


@dataclass(frozen=True, slots=True)
class _Ready:
    """An engine, and its quick ways from a whole batch to codes and to floats.

    A quick way answers None for a batch that needs a closer look: converting, or an error. With a
    small network on native code, NumPy's checks would take longer than the network.
    """

    engine: Engine
    try_codes: Callable[[object], Values | None]
    try_run: Callable[[object], npt.NDArray[np.float32] | None]

    @classmethod
    def make(cls, name: str, program: Program, threads: int | None) -> _Ready:
        from intact.engines import load_engine

        engine = load_engine(name, program, threads)
        quick = (getattr(engine, way, _never) for way in ("try_codes", "try_run"))
        return cls(engine, *quick)


@dataclass(frozen=True, eq=False)
class Program:
    """An integer network, self-contained and validated: whatever exists can be run.

    inputs      names of the input tensors, in the order in which a batch gives them; each is read
                by some op
    outputs     names of the output tensors, in the order in which a result has them: results of
                ops, each once
    ops         in topological order; an op's result carries its name
    tensors     every input's and every op's name -> `QTensor`
    parameters  per op, read-only arrays:
                `<op>.weight`        int8, convolution and linear
                `<op>.bias`          int32 [O], in units of scale_x * scale_w[o]; may be absent
                `<op>.weight_scale`  float32 [1] or [O]
                `<op>.multiplier`    of every op that accumulates, [1] or [O]: int32 `m` (dyadic,
                                     `M = m / 2**shift`) or float32 `M`
                `<op>.table`         of a `Table`, int8 or uint8 as its result, `[1 or C, 2**bits]`:
                                     the result's code for each code of the input's type, the
                                     lowest first; a row per index of axis 0, or one for all
    info        free text about the program (recipe, origin); part of the file and of its hash

    Two programs are equal when their files would be.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ops: tuple[Op, ...]
    tensors: Mapping[str, QTensor]
    parameters: Mapping[str, Array]
    info: Mapping[str, str] = field(default_factory=dict)
    # Engines that were asked for, by name and threads: a program never changes, so made once.
    _engines: dict[tuple[str, int | None], _Ready] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "ops", tuple(self.ops))
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))
        object.__setattr__(self, "info", MappingProxyType(dict(self.info)))
        frozen = {}
        for name, array in self.parameters.items():
            # A copy that nobody else holds, so that it cannot change under a validated program.
            frozen[name] = np.array(array, order="C", copy=True)
            frozen[name].flags.writeable = False
        object.__setattr__(self, "parameters", MappingProxyType(frozen))
        _validate(self)

    # -- inputs and outputs ----------------------------------------------------------------------

    @property
    def input(self) -> str:
        """Name of the only input; `ProgramError` where there are several."""
        return the_only("input", self.inputs, "program", ProgramError)

    @property
    def output(self) -> str:
        """Name of the only output; `ProgramError` where there are several."""
        return the_only("output", self.outputs, "program", ProgramError)

    def _given(self, x: Any) -> tuple[Array, ...]:
        """The arrays that a caller gives, in the order of the inputs."""
        given = in_order(x, self.inputs, "program", ProgramError)
        return tuple(_as_array(part, self._called(i)) for i, part in enumerate(given))

    def _called(self, index: int) -> str:
        """An input in a message."""
        return "the input" if len(self.inputs) == 1 else f"the input {self.inputs[index]!r}"

    def _quantized(self, index: int, array: Array) -> Array:
        """Float values of an input as codes."""
        name = self.inputs[index]
        spec, called = self.tensors[name], self._called(index)
        real = _floats(array, spec.qparams, called)
        if real.shape[1:] != spec.shape or real.ndim == 0:
            who = "the program" if len(self.inputs) == 1 else called
            raise ProgramError(
                f"{who} takes batches of shape [N, {', '.join(map(str, spec.shape))}], not "
                f"{list(real.shape)}."
            )
        return quantize(real, spec.qparams, f"the input {name!r}")

    # -- running ---------------------------------------------------------------------------------

    def quantize_input(self, x: npt.ArrayLike | Mapping[str, npt.ArrayLike]) -> Values:
        """Float input `[N, *shape]` to the codes that `codes` takes.

        Of several inputs, a tuple in their order or a mapping from their names to a tuple.
        """
        return unwrapped(self._quantized(i, array) for i, array in enumerate(self._given(x)))

    def codes(
        self,
        x: npt.ArrayLike | Mapping[str, npt.ArrayLike],
        engine: str = "auto",
        threads: int | None = None,
    ) -> Values:
        """Run a batch to integer codes.

        x        float32 `[N, *input shape]`, which is quantized first, or codes in the input's
                 own dtype (int8 or uint8), which are taken as they are. Of several inputs, a tuple
                 of such arrays in the order of `inputs`, or a mapping from their names, all with
                 the same N
        engine   "reference" (NumPy, the definition), "torch", "native" (compiled for this machine),
                 or "auto": the fastest of them here. The bits are the same; see
                 `intact.engines.load_engine`
        threads  most threads that share the batch; None: as many as the engine finds
        returns  int8 or uint8 `[N, *output shape]`. Of several outputs, a tuple of such arrays in
                 the order of `outputs`
        """
        ready = self._engines.get((engine, threads))
        if ready is not None and (quick := ready.try_codes(x)) is not None:
            return quick
        given = self.input_codes(x)
        if ready is None:
            ready = self._engines[engine, threads] = _Ready.make(engine, self, threads)
        return ready.engine(given)

    def run(
        self,
        x: npt.ArrayLike | Mapping[str, npt.ArrayLike],
        engine: str = "auto",
        threads: int | None = None,
    ) -> Values:
        """Run a batch: float32 `[N, *input shape]` in, float32 `[N, *output shape]` out.

        Quantizes, runs `codes`, dequantizes. Takes what `codes` takes, and returns a tuple where
        that does.
        """
        ready = self._engines.get((engine, threads))
        if ready is not None and (quick := ready.try_run(x)) is not None:
            return quick
        return self.dequantize_output(self.codes(x, engine, threads))

    def dequantize_output(self, codes: Values) -> Values:
        """What `codes` returns, as real values: float32 in the place of every code."""
        arrays = zip(self.outputs, wrapped(codes, self.outputs), strict=True)
        return unwrapped(dequantize(array, self.tensors[name].qparams) for name, array in arrays)

    def input_codes(self, x: npt.ArrayLike | Mapping[str, npt.ArrayLike]) -> Values:
        """What `codes` runs: codes that are given, and floats quantized. Takes what that takes."""
        grids = [self.tensors[name].qparams for name in self.inputs]
        given = unwrapped(
            array if array.dtype == grid.dtype else self._quantized(i, array)
            for i, (array, grid) in enumerate(zip(self._given(x), grids, strict=True))
        )
        self.check_codes(given)
        return given

    def check_codes(self, codes: Values) -> tuple[Array, ...]:
        """The arrays of a batch of codes, in the order of the inputs.

        Raises `ProgramError` unless it is one that the program may run.
        """
        arrays = self._given(codes)
        for i, (name, array) in enumerate(zip(self.inputs, arrays, strict=True)):
            _check_codes(array, self.tensors[name], self._called(i))
        if len({len(array) for array in arrays}) > 1:
            sizes = ", ".join(
                f"{len(array)} of {name!r}" for name, array in zip(self.inputs, arrays, strict=True)
            )
            raise ProgramError(f"every input must have as many samples, but there are {sizes}.")
        return arrays

    # -- facts -----------------------------------------------------------------------------------

    def input_shapes(self, op: Op) -> list[Shape]:
        """The sample shapes of an op's inputs."""
        return [self.tensors[i].shape for i in op.inputs]

    def accumulator_bounds(self, op: Op) -> npt.NDArray[np.int64]:
        """The largest magnitude of any partial sum of an op that accumulates, per channel.

        arithmetic.md, section 2. An average pool is a sum with weights of 1.
        """
        biggest = self.tensors[op.inputs[0]].qparams.max_magnitude
        if weighted(op):
            weight = self.parameters[f"{op.name}.weight"]
            return accumulator_bound(weight, biggest, self.parameters.get(f"{op.name}.bias"))
        if isinstance(op, Multiply):
            return np.array([biggest * self.tensors[op.inputs[1]].qparams.max_magnitude], np.int64)
        terms = 1
        if isinstance(op, AvgPool2d | GlobalAvgPool):
            terms = pool_size(op, self.tensors[op.inputs[0]].shape)
        return np.array([biggest * terms], np.int64)

    def accumulator_bits(self, op: Op) -> int:
        """Bits of the register that an op's accumulators need; see `accumulator_bounds`."""
        return accumulator_bits(int(self.accumulator_bounds(op).max()))

    def macs(self, op: Op) -> int:
        """Multiply-accumulates of an op for one sample."""
        weight = self.parameters.get(f"{op.name}.weight")
        shapes = self.input_shapes(op)
        kernel = None if weight is None else weight.shape
        return macs(op, shapes, self.tensors[op.name].shape, kernel)

    def op_bytes(self, op: Op) -> int:
        """Bytes of an op's weights, biases, multipliers and table, as stored: a byte per code."""
        names = (f"{op.name}.{kind}" for kind in ("weight", "bias", "multiplier", "table"))
        return sum(self.parameters[n].nbytes for n in names if n in self.parameters)

    @property
    def takes_pixels(self) -> bool:
        """Whether the input's real values are 0 to 255 and its codes the same: 8-bit pixels."""
        return len(self.inputs) == 1 and self.tensors[self.input].qparams == PIXELS

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all weights, biases, multipliers and tables: what running it needs."""
        return sum(map(self.op_bytes, self.ops))

    # -- files and looks -------------------------------------------------------------------------

    def save(self, path: str | PathLike[str]) -> None:
        """Write the program to one safetensors file, atomically; see `intact.load`."""
        from intact.storage import save

        save(self, path)

    @property
    def sha256(self) -> str:
        """The hash of the program's file, in hex: its identity."""
        from intact.storage import to_bytes

        return hashlib.sha256(to_bytes(self)).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles (of one's own: to other processes) go through the file's bytes."""
        from intact.storage import from_bytes, to_bytes

        return from_bytes, (to_bytes(self), "a pickled program")

    def __repr__(self) -> str:
        given, made = (
            ", ".join(f"{name} {list(self.tensors[name].shape)}" for name in names)
            for names in (self.inputs, self.outputs)
        )
        return (
            f"<intact.Program {given} -> {made}, {len(self.ops)} ops, "
            f"{sum(map(self.macs, self.ops)):,} MACs, {self.parameter_bytes:,} bytes>"
        )

    def _repr_html_(self) -> str:
        """The program as a table, for notebooks."""
        head = ("op", "", "result", "codes", "scale", "zero point", "MACs", "bytes", "acc bits")
        rows = []
        lines: list[tuple[str, Op | None]] = [(name, None) for name in self.inputs]
        lines += [(op.name, op) for op in self.ops]
        for name, op in lines:
            grid = self.tensors[name].qparams
            rows.append(
                (
                    name,
                    "input" if op is None else type(op).__name__,
                    "×".join(map(str, self.tensors[name].shape)),
                    f"{grid.type_name} {grid.qmin}…{grid.qmax}",
                    f"{grid.scale[0]:.6g}",
                    str(grid.zero_point),
                    "" if op is None else f"{self.macs(op):,}",
                    "" if op is None else f"{self.op_bytes(op):,}",
                    str(self.accumulator_bits(op)) if op and accumulates(op) else "",
                )
            )
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in rows
        )
        heads = "".join(f"<th>{cell}</th>" for cell in head)
        return f"<p>{html.escape(repr(self))}</p><table><tr>{heads}</tr>{body}</table>"


def _as_array(x: npt.ArrayLike, called: str) -> Array:
    try:
        return np.asarray(x)
    except (ValueError, TypeError, RuntimeError) as error:
        reason = str(error).rstrip(".")
        raise ProgramError(
            f"{called} is no array: {reason}. Give an array or a CPU tensor of float32."
        ) from error


def _floats(array: Array, spec: QParams, called: str) -> npt.NDArray[np.float32]:
    """The array as float32, if it holds floats: other integers could be meant as codes."""
    if array.dtype.kind != "f":
        raise ProgramError(
            f"{called} is {array.dtype.name}. Give float32 values, or codes as {spec.dtype.name}."
        )
    with np.errstate(over="ignore"):  # a float64 beyond float32 is inf, which saturates
        return np.asarray(array, np.float32)


def _check_codes(codes: Array, spec: QTensor, called: str) -> None:
    """Raise `ProgramError` unless these are codes of an input."""
    grid = spec.qparams
    if codes.dtype != grid.dtype or codes.shape[1:] != spec.shape or codes.ndim == 0:
        raise ProgramError(
            f"the codes of {called} must be {grid.dtype.name} of shape "
            f"[N, {', '.join(map(str, spec.shape))}], not {codes.dtype.name} "
            f"{list(codes.shape)}."
        )
    if codes.size and not (grid.qmin <= int(codes.min()) and int(codes.max()) <= grid.qmax):
        raise ProgramError(
            f"the codes of {called} reach from {codes.min()} to {codes.max()}, outside of its "
            f"range [{grid.qmin}, {grid.qmax}]."
        )


# -- validation ----------------------------------------------------------------------------------
# A program may come from a stranger's file. What passes here can be run by every engine: nothing
# below allocates or loops in proportion to a number that has not been bounded first.


def _require(condition: object, message: str) -> None:
    if not condition:
        raise ProgramError(message)


def field_error(cls: type, values: Mapping[str, object]) -> str | None:
    """What is wrong with `values` as the fields of the dataclass `cls`, or None.

    Names and types are checked exactly: no missing or unknown field, no bool or float for an int,
    no list for a tuple. Integers lie within 32 bits and tuples of any length hold at most
    `MAX_DIMENSIONS` integers, so that later arithmetic on them stays small.
    """
    hints = _field_types(cls)
    if unknown := sorted(map(str, set(values) - set(hints))):
        return f"there is no field {_short(unknown[0])}; the fields are {', '.join(hints)}"
    for name, hint in hints.items():
        if name not in values:
            return f"the field {name!r} is missing"
        if not _fits(values[name], hint):
            wanted = str(hint) if get_args(hint) else hint.__name__
            return f"{name} is {_short(values[name])}, which is no {wanted} within its limits"
    return None


@cache
def _field_types(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is of an annotated type: str, int, float, bool, None, a tuple, a union."""
    arguments = get_args(hint)
    if get_origin(hint) is tuple:
        if not isinstance(value, tuple):
            return False
        if arguments[-1] is not Ellipsis:
            return len(value) == len(arguments) and all(map(_fits, value, arguments))
        few = arguments[0] is not int or len(value) <= MAX_DIMENSIONS
        return few and all(_fits(item, arguments[0]) for item in value)
    if arguments:
        return any(_fits(value, choice) for choice in arguments)
    if hint is int:  # not isinstance: True is an int, and JSON would write it as `true`
        return type(value) is int and abs(value) <= INT32_MAX
    return isinstance(value, hint)


def _short(value: object) -> str:
    """A value as part of a message, however large or strange it is."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return f"a huge {type(value).__name__}"


def _validate(program: Program) -> None:
    """Raise `ProgramError` unless the program obeys every rule of arithmetic.md."""
    _require(0 < len(program.ops) <= MAX_OPS, f"a program has 1 to {MAX_OPS} ops.")
    for op in program.ops:
        _require(isinstance(op, Op), f"{_short(op)} is no op.")
        wrong = field_error(type(op), {f.name: getattr(op, f.name) for f in fields(op)})
        _require(wrong is None, f"{type(op).__name__} {_short(op.name)}: {wrong}.")
    for kind in ("inputs", "outputs"):
        given = getattr(program, kind)
        _require(isinstance(given, tuple), f"{kind} is {_short(given)}, but must be a tuple.")
    names = [*program.inputs, *(op.name for op in program.ops)]
    for name in (*names, *program.outputs, *program.tensors):
        _check_name(name)
    _require(len(set(names)) == len(names), "two tensors have the same name.")
    unmatched = sorted(set(names) ^ set(program.tensors))
    _require(
        not unmatched,
        "the inputs and the ops do not match the tensors one to one: "
        f"{', '.join(map(repr, unmatched[:5]))}.",
    )
    _check_info(program)
    for name, tensor in program.tensors.items():
        _check_tensor(name, tensor)
    total = sum(math.prod(tensor.shape) for tensor in program.tensors.values())
    _require(
        total <= MAX_TOTAL_ELEMENTS,
        f"the tensors of one sample have {total:,} elements together, more than "
        f"{MAX_TOTAL_ELEMENTS:,}.",
    )
    known = set(program.inputs)
    expected: set[str] = set()
    for op in program.ops:
        _require(op.inputs, f"op {op.name!r} has no inputs.")
        for tensor_name in op.inputs:
            _require(
                tensor_name in known,
                f"op {op.name!r} reads {_short(tensor_name)}, which is not computed before it: the "
                "graph has a cycle, or its ops are out of order.",
            )
        known.add(op.name)
        try:
            expected |= _validate_op(program, op)
        except ProgramError:
            raise
        except IntactError as error:
            raise ProgramError(str(error)) from error
    wrong = signature_error(program.inputs, program.outputs, program.ops)
    _require(wrong is None, f"{wrong}.")
    extra, missing = set(program.parameters) - expected, expected - set(program.parameters)
    _require(not extra, f"parameters that no op uses: {_short(sorted(extra)[:5])}.")
    _require(not missing, f"parameters that are missing: {sorted(missing)[:5]}.")


def _check_name(name: object) -> None:
    """Names of tensors appear in reports, in generated code and on terminals."""
    _require(
        isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable(),
        f"{_short(name)} is no name of a tensor: names are 1 to {MAX_NAME} printable characters.",
    )


def _check_info(program: Program) -> None:
    texts = [text for pair in program.info.items() for text in pair]
    _require(all(isinstance(text, str) for text in texts), "info must map text to text.")
    for text in texts:
        _require(
            text.replace("\n", "").replace("\t", "").isprintable(),
            f"info holds {_short(text)}; of the characters that cannot be printed, only line feed "
            "and tab are allowed.",
        )
    size = sum(map(len, texts))
    _require(size <= MAX_INFO, f"info has {size:,} characters, more than {MAX_INFO:,}.")


def _check_tensor(name: str, tensor: QTensor) -> None:
    _require(isinstance(tensor, QTensor), f"tensor {name!r} is {_short(tensor)}, no QTensor.")
    _require(isinstance(tensor.qparams, QParams), f"tensor {name!r} has no QParams.")
    grid = tensor.qparams
    wrong = field_error(QTensor, {"shape": tensor.shape, "qparams": grid}) or field_error(
        QParams, {f.name: getattr(grid, f.name) for f in fields(grid)}
    )
    _require(wrong is None, f"tensor {name!r}: {wrong}.")
    _require(grid.axis is None, f"tensor {name!r}: activations are per tensor.")
    _check_scales(f"the scale of tensor {name!r}", np.array(grid.scale, np.float32))
    _require(
        tensor.shape
        and all(n >= 1 for n in tensor.shape)
        and math.prod(tensor.shape) <= MAX_ELEMENTS,
        f"tensor {name!r} has an impossible shape, {list(tensor.shape)}: a sample has 1 to "
        f"{MAX_DIMENSIONS} dimensions, of positive sizes, and at most {MAX_ELEMENTS:,} elements.",
    )


def _check_scales(what: str, scales: Array) -> None:
    """Of tensors and weights, and float multipliers: normal, and finite times any code."""
    legal = (scales >= SMALLEST_SCALE) & (scales <= LARGEST_SCALE)  # False for NaN
    _require(legal.all(), f"{what} must lie within [2**-126, 2**119].")


def _validate_op(program: Program, op: Op) -> set[str]:
    """Check one op; returns the names of the parameters that it must have."""
    out = program.tensors[op.name]
    expected: set[str] = set()
    weight: Array | None = None
    channels = 1
    if weighted(op):
        weight = _array(program, f"{op.name}.weight", np.int8)
        _require(weight.ndim in (2, 4) and weight.size, f"{op.name}.weight is empty or misshapen.")
        channels = len(weight)
        expected |= {f"{op.name}.weight", f"{op.name}.weight_scale"}
        scales = _array(program, f"{op.name}.weight_scale", np.float32)
        _require(
            scales.shape in ((1,), (channels,)),
            f"{op.name}.weight_scale must hold 1 or {channels} values, not {list(scales.shape)}.",
        )
        _check_scales(f"{op.name}.weight_scale", scales)
        if f"{op.name}.bias" in program.parameters:
            expected.add(f"{op.name}.bias")
            bias = _array(program, f"{op.name}.bias", np.int32)
            _require(bias.shape == (channels,), f"{op.name}.bias must have shape [{channels}].")
    shape = output_shape(op, program.input_shapes(op), None if weight is None else weight.shape)
    _require(shape == out.shape, f"op {op.name!r} yields {list(shape)}, not {list(out.shape)}.")
    if isinstance(op, Conv2d | MaxPool2d | AvgPool2d):
        _check_windows(program, op)
    _check_work(op, program.macs(op))
    if accumulates(op):
        expected.add(f"{op.name}.multiplier")
        _check_multiplier(program, op, channels)
        bound = int(program.accumulator_bounds(op).max())
        _require(
            bound <= INT32_MAX,
            f"an accumulator of {op.name!r} could reach {bound:,}, which int32 cannot hold. Use "
            "fewer bits, or split the layer.",
        )
    elif isinstance(op, Table):
        expected.add(f"{op.name}.table")
        _check_table(program, op)
    else:
        _check_grid(program, op)
    return expected


def _array(program: Program, name: str, dtype: type[np.generic]) -> Array:
    array = program.parameters.get(name)
    if array is None:
        raise ProgramError(f"parameters that are missing: [{name!r}].")
    _require(array.dtype == dtype, f"{name} is {array.dtype}, not {np.dtype(dtype).name}.")
    _require(array.size <= MAX_ELEMENTS, f"{name} has more than {MAX_ELEMENTS:,} elements.")
    return array


def _check_windows(program: Program, op: Conv2d | MaxPool2d | AvgPool2d) -> None:
    """Bound what a sliding window makes an engine allocate; every max pool has a maximum."""
    source, result = program.tensors[op.inputs[0]].shape, program.tensors[op.name].shape
    if isinstance(op, Conv2d):
        kernel = program.parameters[f"{op.name}.weight"].shape[2:]
    else:
        kernel = op.kernel
    dilation = (1, 1) if isinstance(op, AvgPool2d) else op.dilation
    _require(
        max(*kernel, *op.stride, *op.padding, *dilation) <= MAX_WINDOW,
        f"op {op.name!r}: kernel, stride, padding and dilation are at most {MAX_WINDOW}.",
    )
    top, bottom, left, right = op.padding
    padded = (source[0], source[1] + top + bottom, source[2] + left + right)
    _require(
        math.prod(padded) <= MAX_ELEMENTS,
        f"op {op.name!r} pads its input to {list(padded)}, more than {MAX_ELEMENTS:,} elements.",
    )
    if not isinstance(op, MaxPool2d):
        return
    _check_work(op, math.prod(result) * math.prod(kernel))
    for axis, before in enumerate((top, left)):
        # A window that starts at a real position is fine, so look at the first ones and the last.
        first = range(min(result[1 + axis], before // op.stride[axis] + 1))
        starts = np.array([*first, result[1 + axis] - 1]) * op.stride[axis] - before
        tap = np.maximum(0, -(starts // dilation[axis]))  # the first that is not before the input
        _require(
            (tap < kernel[axis]).all() and (starts + tap * dilation[axis] < source[1 + axis]).all(),
            f"op {op.name!r} has a window that lies in the padding altogether, so it has no "
            "maximum. Pad less.",
        )


def _check_work(op: Op, steps: int) -> None:
    _require(
        steps <= MAX_WORK,
        f"op {op.name!r} takes {steps:,} steps for one sample, more than {MAX_WORK:,}.",
    )


def _check_multiplier(program: Program, op: Op, channels: int) -> None:
    """Multipliers are legal, and are the quotient of the scales that the program states.

    The quotient binds weighted ops only: their weights were quantized after the multiplier was
    known. Pools and `Requantize` round `M` to the grid, and that rounded `M` is the definition.
    """
    name = f"{op.name}.multiplier"
    array = program.parameters.get(name)
    if array is None:
        raise ProgramError(f"parameters that are missing: [{name!r}].")
    _require(array.shape in ((1,), (channels,)), f"{name} must have 1 or {channels} values.")
    if array.dtype == np.int32:
        legal = (array >= 1).all() and (array < MULTIPLIER_LIMIT).all()
        _require(legal, f"{name} must lie within [1, 2**24).")
    else:
        _require(array.dtype == np.float32, f"{name} is {array.dtype}, not int32 or float32.")
        _check_scales(name, array)
    if weighted(op):
        source, result = program.tensors[op.inputs[0]].qparams, program.tensors[op.name].qparams
        scales = program.parameters[f"{op.name}.weight_scale"].astype(np.float64)
        stated = source.scale[0] / result.scale[0] * scales
        actual = multiplier_value(array, result.bits).astype(np.float64)
        # The scales are float32, so their quotient is within a few ulp of M, never further.
        _require(
            np.all(np.abs(actual - stated) <= 2.0**-20 * actual),
            f"{name} contradicts the scales: scale_x * scale_w / scale_y is not M.",
        )


def _check_table(program: Program, op: Table) -> None:
    """A table has an entry for every code of its input's type, and entries are legal codes."""
    source, out = program.tensors[op.inputs[0]], program.tensors[op.name].qparams
    name = f"{op.name}.table"
    table = _array(program, name, out.dtype.type)
    entries = 2**source.qparams.bits
    _require(
        table.shape in ((1, entries), (source.shape[0], entries)),
        f"{name} must have shape [1 or {source.shape[0]}, {entries}], not {list(table.shape)}.",
    )
    _require(
        out.qmin <= int(table.min()) and int(table.max()) <= out.qmax,
        f"{name} holds codes outside of [{out.qmin}, {out.qmax}].",
    )


def _check_grid(program: Program, op: Op) -> None:
    """An op without a multiplier cannot change the grid of its operands."""
    out = program.tensors[op.name].qparams
    for tensor in op.inputs:
        given = program.tensors[tensor].qparams
        same = (given.scale, given.zero_point, given.bits, given.signed) == (
            out.scale,
            out.zero_point,
            out.bits,
            out.signed,
        )
        _require(same, f"op {op.name!r} and its input {tensor!r} must share scale and zero point.")
        narrows = isinstance(op, Clamp | Add | Subtract)
        _require(
            narrows or (out.qmin <= given.qmin and given.qmax <= out.qmax),
            f"op {op.name!r} cannot narrow the code range of {tensor!r}.",
        )
