"""From a program to a plan: which kernels run, in what order, on which bytes.

A plan is what all emitters share. It fuses, lays tensors out and gives them memory; how one step
becomes instructions is the emitters' business.

Codes are stored as unsigned bytes, `code + 128` for signed types, so that one dot product of
unsigned by signed bytes serves every program. With stored `x'` and stored zero point `zx'`,

    sum (x' - zx') * w + bias  =  sum x' * w  +  (bias - zx' * sum w)

and the second part is a constant per channel: the bias of the step. It is taken modulo 2**32, in
which the sum is exact because the program proves that the true accumulator fits int32
(arithmetic.md, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from typing_extensions import assert_never

from intact.arithmetic import QParams, code_range, multiplier_value, quantize
from intact.errors import EngineUnavailableError
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
)
from intact.program import Program, QTensor

__all__ = [
    "Average",
    "Concatenate",
    "Elementwise",
    "Gather",
    "Layout",
    "Lookup",
    "MatMul",
    "Maximum",
    "Output",
    "Place",
    "Plan",
    "Product",
    "Requantization",
    "Step",
    "TooLargeError",
    "make_plan",
    "stored_offset",
]

Array = npt.NDArray[Any]

ALIGNMENT = 64
SLACK = 128
"""Bytes behind every tensor that a kernel may read (never use) past its end, and the vector that
a kernel may write past the end of a dense tensor whose successor is written later."""
MOST_ACCUMULATORS = 24
"""Accumulators of a kernel across pixels: 32 registers less operands."""
BLOCK = 16
"""Samples per call of the last linear layers: their weights are then read once for all of them."""
BLOCK_BYTES = 2**18
"""Most bytes of the tensors that are held for a whole block: more would leave the cache."""
MOST_STACK = 2**18
"""Most bytes of a kernel's local arrays: threads may have half a megabyte of stack."""
MOST_UNROLLED = 64
"""Columns of a kernel that are written out one by one, at most: compilers take long over more."""
MOST_TENSOR_BYTES = 2**30
"""Of a tensor with its border, and of a linear layer's weights: kernels address them with int."""
MOST_ARENA_BYTES = 2**32
"""Working memory of one thread."""


class TooLargeError(EngineUnavailableError):
    """A program that no instruction set can run; the reference engine can."""


def stored_offset(qparams: QParams) -> int:
    """What is added to a code to store it as an unsigned byte: 128 for signed types, else 0."""
    return 128 if qparams.signed else 0


@dataclass(frozen=True, slots=True)
class Layout:
    """How an emitter wants tensors laid out.

    pad_rgb     three channels are stored as four bytes, the last of which meets zero weights
    pixel_lanes convolutions of few channels of the input are computed with a vector across pixels,
                so the input's columns are stored by phase, see `Place.phases`
    lanes       int32 lanes of a vector
    """

    pad_rgb: bool = False
    pixel_lanes: bool = False
    lanes: int = 1


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies: `[C, H, W]` as rows of pixels of channels (NHWC), with a border.

    Other ranks are stored as they are: `[..., K]` is one row of pixels with K channels.

    offset  of channel 0, row 0, column 0 (inside of the border) of sample 0, bytes in the arena
    pixel   bytes from a pixel to the next of its row (of its phase), at least `channels`
    row     bytes from a row to the next
    border  rows and columns around it that hold the stored zero point, for padded convolutions
    phases  column x lies in phase `x % phases`, at index `x // phases`; phases follow each other
    phase   bytes from a phase to the next
    windows where a column holds not its pixel alone but the window of a kernel that starts there:
            its bytes without gaps, as this many dwords. The first dwords of all columns (of a
            phase) come first, then the second ones, and so on
    row_phases   0, or row y lies in row phase `y % row_phases`, at index `y // row_phases`; then
            the windows of a row follow those of the row before it without a gap, so that a vector
            of neighbouring outputs may run on into the next row
    row_phase    bytes from a row phase to the next
    sample  bytes from a sample to the next, where a block of samples is held, else 0
    start, size   the bytes it owns, all samples and slack included
    fill_each   whether others share its bytes, so that border and `fill` are written each time
    fill    the stored constant of a `Pad`, which all elements have that its step does not write
    """

    tensor: str
    channels: int
    height: int
    width: int
    pixel: int
    row: int
    border: Padding
    zero: int
    signed: bool
    phases: int = 1
    phase: int = 0
    windows: int = 0
    row_phases: int = 0
    row_phase: int = 0
    sample: int = 0
    start: int = 0
    size: int = 0
    fill_each: bool = False
    fill: int | None = None

    @property
    def offset(self) -> int:
        """Of channel 0, row 0, column 0 of sample 0."""
        top, _, left, _ = self.border
        return self.start + top * self.row + self.column(left)

    def column(self, x: int) -> int:
        """Bytes from the row's first stored pixel to its column `x`, border included."""
        return (x % self.phases) * self.phase + (x // self.phases) * self.pixel

    def line(self, y: int) -> int:
        """Bytes from the first stored row to row `y`, border included."""
        if not self.row_phases:
            return y * self.row
        return y % self.row_phases * self.row_phase + y // self.row_phases * self.row

    def element_offsets(self) -> Array:
        """Bytes from `offset` to every element, `[C, H, W]`; int64."""
        left = self.border[2]
        columns = np.array([self.column(left + x) for x in range(self.width)]) - self.column(left)
        c, y = np.arange(self.channels), np.arange(self.height)
        offsets: Array = c[:, None, None] + y[None, :, None] * self.row + columns[None, None, :]
        return offsets

    @property
    def dense(self) -> bool:
        """Whether rows of pixels of channels follow each other without a gap."""
        return (
            self.pixel == self.channels and self.row == self.width * self.pixel and not self.phase
        )


@dataclass(frozen=True, slots=True)
class Requantization:
    """Accumulators to stored codes: `clamp(rint(float32(acc) * M) + zero, low, high)`.

    arithmetic.md, section 3: on the dyadic grid this line and the integer one give the same bits.

    multiplier  float32 [O]
    zero, low, high   of the stored codes
    wide        whether some `acc * M` may exceed what an int32 holds, so that a kernel must clamp
                before it converts
    """

    multiplier: Array
    zero: int
    low: int
    high: int
    wide: bool


@dataclass(frozen=True, slots=True)
class MatMul:
    """A convolution or linear layer with what was fused into it.

    name, ops   of the tensor it stores, and of the program's ops that it covers, in order
    weight      int8 `[O, KH, KW, C / groups]`; a linear layer has KH = KW = 1 and one entry per
                byte of its input, 0 where a byte is no element
    bias        int32 [O], with the input's zero point folded in
    first       byte offset, from the source's `offset`, of the window's first tap at output (0, 0)
    out         height and width of the convolution's result, before `pool`
    pool        height and width of the fused max pool, (1, 1) for none
    addend      the other operand of a fused addition
    addend_rule what moves the addend to the common grid first, where a `Requantize` is fused too
    sum_range   the range of the addition's stored codes
    sum_zero    the stored zero point of the addition
    table       uint8 [256], what becomes of each stored code at last where a `Table` is fused
    rows        whether pixels are the samples of a block: a linear layer of the tail
    """

    name: str
    ops: tuple[Op, ...]
    source: Place
    target: Place
    weight: Array
    bias: Array
    requantization: Requantization
    groups: int = 1
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    first: int = 0
    out: Pair = (1, 1)
    pool: Pair = (1, 1)
    addend: Place | None = None
    addend_rule: Requantization | None = None
    sum_range: Pair = (0, 255)
    sum_zero: int = 0
    table: Array | None = None
    rows: bool = False
    pixel_lanes: bool = False

    @property
    def depthwise(self) -> bool:
        """Whether each channel is convolved with a kernel of its own, one to one."""
        return self.groups > 1 and self.weight.shape[3] == 1 and len(self.weight) == self.groups


@dataclass(frozen=True, slots=True)
class Average:
    """Sum over windows (padding counts as the zero point), then requantize."""

    name: str
    ops: tuple[Op, ...]
    source: Place
    target: Place
    kernel: Pair
    stride: Pair
    padding: Padding
    bias: int
    requantization: Requantization


@dataclass(frozen=True, slots=True)
class Maximum:
    """Maximum over windows; padding never wins."""

    name: str
    ops: tuple[Op, ...]
    source: Place
    target: Place
    kernel: Pair
    stride: Pair
    padding: Padding
    dilation: Pair


@dataclass(frozen=True, slots=True)
class Elementwise:
    """A map of one or two tensors, element by element: add, subtract, clamp, requantize.

    subtracts   whether the second operand is taken off
    """

    name: str
    ops: tuple[Op, ...]
    sources: tuple[Place, ...]
    target: Place
    low: int
    high: int
    requantization: Requantization | None = None
    subtracts: bool = False


@dataclass(frozen=True, slots=True)
class Product:
    """Two tensors multiplied element by element, then requantized.

    sources  of the target's channels, height and width; the second one is repeated along those of
             which it has 1
    """

    name: str
    ops: tuple[Op, ...]
    sources: tuple[Place, Place]
    target: Place
    requantization: Requantization


@dataclass(frozen=True, slots=True)
class Lookup:
    """Stored codes looked up in a table.

    table     uint8 [rows, 256]: the target's stored code for each stored code of the source
    channels  whether it has a row per channel; else one per `target.width / rows` pixels
    """

    name: str
    ops: tuple[Op, ...]
    source: Place
    target: Place
    table: Array
    channels: bool


@dataclass(frozen=True, slots=True)
class Concatenate:
    """Tensors one behind the other along the channels of their pixels (axis 0 of `[C, H, W]`)."""

    name: str
    ops: tuple[Op, ...]
    sources: tuple[Place, ...]
    target: Place


@dataclass(frozen=True, slots=True)
class Gather:
    """Bytes of one tensor (or several) in another order, some of them not at all or repeatedly.

    index   per source, int32 [elements of the target that it gives]: byte offsets from its `offset`
    places  per source, int32 of the same length: byte offsets from the target's `offset`, rising
    """

    name: str
    ops: tuple[Op, ...]
    sources: tuple[Place, ...]
    target: Place
    index: tuple[Array, ...]
    places: tuple[Array, ...]


Step: TypeAlias = MatMul | Average | Maximum | Elementwise | Product | Lookup | Concatenate | Gather


@dataclass(frozen=True, slots=True)
class Output:
    """Where a result lies.

    tensor   its name in the program
    offsets  byte offset of every element from `place.offset`, in row-major order
    """

    tensor: str
    place: Place
    offsets: Array


@dataclass(frozen=True, slots=True)
class Plan:
    """What a generated module does for up to `block` samples.

    head   steps that run sample by sample
    tail   linear layers that run on all samples of the block at once
    inputs where the codes of every input are stored
    outputs where each result lies
    traced tensors that are stored, in the order of their steps, the inputs first but for one of
           which parts that no kernel reads are overwritten
    arena  bytes of working memory
    """

    program: Program
    head: tuple[Step, ...]
    tail: tuple[MatMul, ...]
    inputs: tuple[Place, ...]
    outputs: tuple[Output, ...]
    traced: tuple[Place, ...]
    block: int
    arena: int


@dataclass
class _View:
    """A tensor whose elements are those of another one, which is not stored.

    In another shape or order, or only some of them, or each of them several times.
    """

    root: str
    index: Array  # for each of its elements, in row-major order, the index in the root's


@dataclass
class _Draft:
    """A step before places are known."""

    ops: tuple[Op, ...]
    name: str
    reads: tuple[str, ...]
    pool: Pair = (1, 1)
    addend: str | None = None
    addend_op: Requantize | None = None
    table: Table | None = None
    rows: bool = False
    view: _View | None = None  # a view that must be stored


def make_plan(program: Program, layout: Layout, *, fuse: bool = True) -> Plan:
    """Plan the program.

    fuse  False stores every op's result, for comparison; not those that only rename, select or
          repeat bytes
    """
    return _Planner(program, layout, fuse).plan()


class _Planner:
    def __init__(self, program: Program, layout: Layout, fuse: bool) -> None:
        self.program = program
        self.layout = layout
        self.fuse = fuse
        self.tensors = dict(program.tensors)  # and those that only this plan has
        self.readers: dict[str, list[Op]] = {}
        for op in program.ops:
            for tensor in op.inputs:
                self.readers.setdefault(tensor, []).append(op)
        self.views: dict[str, _View] = {}
        self.across: set[str] = set()  # convolutions that are computed across pixels
        self.makers: dict[str, _Draft] = {}  # of every stored tensor
        self.reading: dict[str, list[_Draft]] = {}  # of every stored tensor, views of it included

    # -- what is fused, and what is only renamed ---------------------------------------------------

    def plan(self) -> Plan:
        drafts = self._draft()
        tail = self._tail(drafts)
        names = (*self.program.inputs, *(draft.name for draft in drafts))
        for draft in drafts:
            self.makers[draft.name] = draft
            for root in {self._root(tensor) for tensor in draft.reads}:
                self.reading.setdefault(root, []).append(draft)
        places = {name: self._place(name) for name in names}
        block = BLOCK if tail else 1
        while block > 1 and block * sum(places[t].size for t in self._held(tail)) > BLOCK_BYTES:
            block //= 2
        places, arena = self._allocate(drafts, places, self._held(tail), block)
        steps = [self._step(draft, places) for draft in drafts]
        count = len(steps) - len(tail)
        rows = [step for step in steps[count:] if isinstance(step, MatMul)]
        traced = tuple(
            places[name]
            for name in names
            if name in self.program.tensors and not places[name].row_phases
        )
        return Plan(
            self.program,
            tuple(steps[:count]),
            tuple(rows),
            tuple(places[name] for name in self.program.inputs),
            tuple(Output(name, *self._resolve(name, places)) for name in self.program.outputs),
            traced,
            block,
            arena,
        )

    def _only_reader(self, name: str) -> Op | None:
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.program.outputs else None

    def _draft(self) -> list[_Draft]:
        """One draft per step, in order; fills `views`."""
        drafts: list[_Draft] = []
        waiting: dict[
            str, Conv2d
        ] = {}  # convolutions that run where the op that absorbs them stands
        rescaled: dict[str, Requantize] = {}  # likewise, on the addend's side
        position = {op.name: i for i, op in enumerate(self.program.ops)}
        for op in self.program.ops:
            if isinstance(op, Reshape | Permute | Slice | Upsample):
                self._view(op)
                continue
            if self.fuse and isinstance(op, Table) and self._looks_up(op, drafts):
                continue
            if isinstance(op, Multiply) and not self._repeats_regularly(op):
                drafts += self._repeated(op)
                continue
            if self.fuse and isinstance(op, Conv2d):
                reader = self._only_reader(op.name)
                if self._pools(op, reader) or self._adds(op, reader, position):
                    self._store_views(op, drafts)
                    waiting[op.name] = op
                    continue
            if self.fuse and isinstance(op, Requantize) and self._rescales(op, waiting):
                rescaled[op.name] = op
                continue
            if isinstance(op, Linear) and len(self.tensors[op.name].shape) == 3:
                drafts += self._linear_on_image(op)
                continue
            producer = next((waiting[i] for i in op.inputs if i in waiting), None)
            if producer is None:
                self._store_views(op, drafts)
                drafts.append(_Draft((op,), op.name, op.inputs))
            elif isinstance(op, MaxPool2d):
                drafts.append(_Draft((producer, op), op.name, producer.inputs, op.kernel))
            else:
                other = next(i for i in op.inputs if i != producer.name)
                rule = rescaled.pop(other, None)
                covered = (producer, op) if rule is None else (producer, rule, op)
                other = other if rule is None else rule.inputs[0]
                self._store_view(other, drafts)
                reads = (*producer.inputs, other)
                drafts.append(_Draft(covered, op.name, reads, addend=other, addend_op=rule))
        return drafts

    def _linear_on_image(self, op: Linear) -> list[_Draft]:
        """A product over the last of three axes: images are stored with their first one last.

        So its operand and its result are copied to tensors of four axes, which are stored as is.
        """
        drafts = []
        before, after = copy_name(op, "operand"), copy_name(op, "result")
        for copy, original in ((before, op.inputs[0]), (after, op.name)):
            spec = self.tensors[original]
            self.tensors[copy] = QTensor((1, *spec.shape), spec.qparams)
        view = self._elements(op.inputs[0])
        drafts.append(_Draft((op,), before, (view.root,), view=view))
        drafts.append(_Draft((op,), after, (before,)))
        same = np.arange(math.prod(self.tensors[op.name].shape))
        drafts.append(_Draft((op,), op.name, (after,), view=_View(after, same)))
        return drafts

    def _repeats_regularly(self, op: Multiply) -> bool:
        """Whether the second operand, as it is stored, is whole or 1 along every axis."""
        first, second = (image_shape(self.tensors[i].shape) for i in op.inputs)
        return all(n in (1, size) for n, size in zip(second, first, strict=True))

    def _repeated(self, op: Multiply) -> list[_Draft]:
        """A product of more than three axes, some of them repeated: of a copy that has them all."""
        name = copy_name(op, "operand")
        shape = self.tensors[op.inputs[0]].shape
        spec = self.tensors[op.inputs[1]]
        view = self._elements(op.inputs[1])
        index = np.broadcast_to(view.index.reshape(spec.shape), shape).reshape(-1)
        self.tensors[name] = QTensor(shape, spec.qparams)
        drafts: list[_Draft] = []
        self._store_view(op.inputs[0], drafts)
        drafts.append(_Draft((op,), name, (view.root,), view=_View(view.root, index)))
        drafts.append(_Draft((op,), op.name, (op.inputs[0], name)))
        return drafts

    def _looks_up(self, op: Table, drafts: list[_Draft]) -> bool:
        """Fuse a table of one row into the layer that only it reads, if there is one."""
        source = op.inputs[0]
        if self._only_reader(source) != op or len(self.program.parameters[f"{op.name}.table"]) > 1:
            return False
        for draft in drafts:
            layer = isinstance(draft.ops[0], Conv2d | Linear) and draft.view is None
            if draft.name == source and layer and draft.table is None:
                draft.ops, draft.name, draft.table = (*draft.ops, op), op.name, op
                return True
        return False

    def _pools(self, conv: Conv2d, reader: Op | None) -> bool:
        """Whether the max pool that reads it can be taken from the accumulators.

        Requantization is monotonic and the same for all positions of a channel, so the maximum of
        the codes is the code of the maximum.
        """
        tensors = self.tensors
        return (
            isinstance(reader, MaxPool2d)
            and reader.kernel == reader.stride
            and math.prod(reader.kernel) <= 4
            and reader.padding == (0, 0, 0, 0)
            and reader.dilation == (1, 1)
            and tensors[reader.name].qparams == tensors[conv.name].qparams
            and not self._depthwise(conv)
        )

    def _adds(self, conv: Conv2d, reader: Op | None, position: dict[str, int]) -> bool:
        """Whether it is the operand of an addition that is computed last."""
        if not isinstance(reader, Add) or len(set(reader.inputs)) != 2 or self._depthwise(conv):
            return False
        # Of two convolutions that only the addition reads, the later one takes it over.
        other = next(i for i in reader.inputs if i != conv.name)
        rival = position.get(other, -1) > position[conv.name]
        return not (rival and isinstance(self.program.ops[position[other]], Conv2d))

    def _rescales(self, op: Requantize, waiting: dict[str, Conv2d]) -> bool:
        """Whether its only use is an addition to a convolution that waits for it."""
        reader = self._only_reader(op.name)
        if not isinstance(reader, Add) or len(self.tensors[op.name].shape) != 3:
            return False
        return any(i in waiting and i != op.name for i in reader.inputs)

    def _depthwise(self, conv: Conv2d) -> bool:
        weight = self.program.parameters[f"{conv.name}.weight"]
        return conv.groups > 1 and weight.shape[1] == 1 and len(weight) == conv.groups

    def _elements(self, tensor: str) -> _View:
        """The tensor as a view: of itself, if it is none."""
        whole = np.arange(math.prod(self.tensors[tensor].shape))
        return self.views.get(tensor) or _View(tensor, whole)

    def _view(self, op: Reshape | Permute | Slice | Upsample) -> None:
        source = self._elements(op.inputs[0])
        index = source.index.reshape(self.tensors[op.inputs[0]].shape)
        match op:
            case Reshape():
                pass
            case Permute():
                index = np.transpose(index, op.axes)
            case Slice():
                kept = slice(op.start, op.stop, op.step)
                index = index[(slice(None),) * op.axis + (kept,)]
            case Upsample():
                for axis, factor in enumerate(op.factors):
                    index = np.repeat(index, factor, axis)
            case _:
                assert_never(op)
        self.views[op.name] = _View(source.root, index.reshape(-1))

    def _store_views(self, op: Op, drafts: list[_Draft]) -> None:
        """Store the views that this op cannot read as they are."""
        if isinstance(op, Linear) and self._permutes_weights(op.inputs[0]):
            return
        if isinstance(op, Concat | Pad):
            return  # a gather, which reads anything
        for tensor in op.inputs:
            self._store_view(tensor, drafts)

    def _store_view(self, tensor: str, drafts: list[_Draft]) -> None:
        view = self.views.pop(tensor, None)  # views that were made of it go on through its root
        if view is not None:
            op = next(op for op in self.program.ops if op.name == tensor)
            # Earlier steps that could read the view as it is find it stored now, too.
            readers = (i for i, draft in enumerate(drafts) if tensor in draft.reads)
            draft = _Draft((op,), tensor, (view.root,), view=view)
            drafts.insert(next(readers, len(drafts)), draft)

    def _permutes_weights(self, tensor: str) -> bool:
        """Whether a linear layer reads this view's root, with its weights in the order of that.

        A byte that is no element meets a weight of 0. One that is several elements would need the
        sum of their weights, which int8 does not hold.
        """
        if len(self.tensors[tensor].shape) > 1:
            return False
        view = self._elements(tensor)
        most = math.prod(self.tensors[view.root].shape)
        times = np.bincount(view.index, minlength=most)
        return bool(times.max() == 1 and 2 * len(view.index) >= most)

    def _concatenates(self, op: Concat) -> bool:
        """Whether stored pixels lie side by side in the result's."""
        rank = len(self.tensors[op.name].shape)
        channels = op.axis == (0 if rank == 3 else rank - 1)
        return channels and not any(tensor in self.views for tensor in op.inputs)

    def _tail(self, drafts: list[_Draft]) -> list[_Draft]:
        """The linear layers at the end, each on one vector per sample."""
        tail: list[_Draft] = []
        for draft in reversed(drafts):
            op = draft.ops[0]
            if not isinstance(op, Linear) or len(self.tensors[draft.name].shape) != 1:
                break
            tail.insert(0, draft)
        # What the head computes must not depend on them, and does not: the order is topological.
        # Every result of the tail and everything it reads is held for the whole block.
        for draft in tail:
            draft.rows = True
        return tail

    def _root(self, tensor: str) -> str:
        view = self.views.get(tensor)
        return view.root if view else tensor

    def _held(self, tail: Sequence[_Draft]) -> frozenset[str]:
        if not tail:
            return frozenset()
        held = {self._root(i) for draft in tail for i in draft.reads}
        held |= {draft.name for draft in tail} | set(map(self._root, self.program.outputs))
        return frozenset(held)

    # -- where tensors lie -------------------------------------------------------------------------

    def _place(self, name: str) -> Place:
        spec = self.tensors[name]
        channels, height, width = image_shape(spec.shape)
        border = (0, 0, 0, 0)
        convolutions: list[Conv2d] = []
        readers = self.reading.get(name, [])
        for draft in readers:
            op = draft.ops[0]
            if isinstance(op, Conv2d) and op.inputs[0] == name:
                convolutions.append(op)
                border = (
                    max(border[0], op.padding[0]),
                    max(border[1], op.padding[1]),
                    max(border[2], op.padding[2]),
                    max(border[3], op.padding[3]),
                )
        only_convolutions = len(convolutions) == len(readers) and bool(readers)
        pixel = channels
        if self.layout.pad_rgb and channels == 3 and only_convolutions:
            pixel = 4
        phases = 1
        if (
            only_convolutions
            and len(readers) == 1
            and name in self.program.inputs
            and readers[0].addend is None  # it may be this tensor itself
            and self._across_pixels(convolutions[0], readers[0].pool)
        ):
            self.across.add(convolutions[0].name)
            phases, pixel = convolutions[0].stride[1] * readers[0].pool[1], 4
        columns = border[2] + width + border[3]
        phase = -(-columns // phases) * pixel if phases > 1 else 0
        row = phase * phases if phases > 1 else columns * pixel
        windows = row_phases = row_phase = 0
        if pixel == 4 and channels == 3 and convolutions[0].name in self.across:
            kw = self.program.parameters[f"{convolutions[0].name}.weight"].shape[3]
            packed = -(-kw * channels // 4)
            each = -(-columns // (phases * self.layout.lanes)) * self.layout.lanes
            # All pixels pass through the stack, with room for a kernel behind those of a phase.
            small = height * phases * (each + MOST_UNROLLED) * 4 <= MOST_STACK
            if packed < kw and not any(border) and small:
                windows = packed
                phase = packed * each * 4
                row = phase * phases
                conv, pool = convolutions[0], readers[0].pool
                if runs := self._runs_on(conv, pool, self._place(readers[0].name)):
                    row_phases = conv.stride[0] * pool[0]
                    row, plane = runs
                    phase = packed * plane
                    row_phase = phase * phases
        zero = spec.qparams.zero_point + stored_offset(spec.qparams)
        fill = None
        maker = self.makers.get(name)
        if maker and isinstance(op := maker.ops[0], Pad) and any(op.padding):
            fill = int(quantize(op.value, spec.qparams)) + stored_offset(spec.qparams)
        size = (border[0] + height + border[1]) * row
        if row_phases:
            size = row_phases * row_phase
        _bound(f"the tensor {name!r} with its padding", size, MOST_TENSOR_BYTES)
        return Place(
            name,
            channels,
            height,
            width,
            pixel,
            row,
            border,
            zero,
            spec.qparams.signed,
            phases,
            phase,
            windows,
            row_phases,
            row_phase,
            size=align(size + SLACK),
            fill=fill,
        )

    def _runs_on(self, conv: Conv2d, pool: Pair, target: Place) -> Pair | None:
        """Bytes of a row of windows, and of a plane of them, if vectors run on from row to row.

        They do where that takes fewer vectors, and where the results of a row follow those of the
        row before it.
        """
        lanes = self.layout.lanes
        height, width = (
            n // p for n, p in zip(self.tensors[conv.name].shape[1:], pool, strict=True)
        )
        vectors = -(-height * width // lanes)
        if vectors >= height * -(-width // lanes) or not target.dense:
            return None
        phases = conv.stride[0] * pool[0]
        kernel = self.program.parameters[f"{conv.name}.weight"].shape[2]
        farthest = (pool[0] - 1) * conv.stride[0] + (kernel - 1) * conv.dilation[0]
        rows = -(-self.tensors[conv.inputs[0]].shape[1] // phases)
        # Up to the last vector that is written, and the last one that is read.
        dwords = max(rows * width + lanes, vectors * lanes + farthest // phases * width)
        return width * 4, -(-dwords // lanes) * lanes * 4

    def _across_pixels(self, conv: Conv2d, pool: Pair) -> bool:
        """Whether a vector across pixels needs fewer dot products than one across channels."""
        weight = self.program.parameters[f"{conv.name}.weight"]
        out_channels, channels, kh, kw = weight.shape
        if not self.layout.pixel_lanes or conv.groups != 1 or channels not in {3, 4}:
            return False
        if out_channels * math.prod(pool) > MOST_ACCUMULATORS or conv.dilation[1] != 1:
            return False
        if kw > MOST_UNROLLED:
            return False
        lanes = self.layout.lanes
        width = self.tensors[conv.name].shape[2] // pool[1]
        vectors = -(-width // lanes)
        across_pixels = vectors * lanes / width * out_channels * kh * kw
        across_channels = -(-out_channels // lanes) * lanes * kh * -(-kw * channels // 4)
        return bool(across_pixels < across_channels)

    def _allocate(
        self,
        drafts: Sequence[_Draft],
        places: dict[str, Place],
        held: frozenset[str],
        block: int,
    ) -> tuple[dict[str, Place], int]:
        """Give every tensor its bytes: those that do not live at the same time may share."""
        last = {name: len(drafts) for name in held}
        born = dict.fromkeys(self.program.inputs, -1)
        for name in self.program.inputs:
            last.setdefault(name, -1)
        for name in self.program.outputs:
            last[self._root(name)] = len(drafts)
        for i, draft in enumerate(drafts):
            born[draft.name] = i
            last.setdefault(draft.name, i)
            for tensor in draft.reads:
                root = self._root(tensor)
                last[root] = max(last.get(root, i), i)
        placed: list[tuple[int, int, int, int, str]] = []  # start, end, first, last step
        # A held tensor outlives the loop over samples, so that nothing may share its bytes.
        order = sorted(born, key=lambda name: (name not in held, -places[name].size, born[name]))
        result: dict[str, Place] = {}
        for name in order:
            size = places[name].size * (block if name in held else 1)
            first, final = (-1, len(drafts)) if name in held else (born[name], last[name])
            start = 0
            for other in sorted(placed):
                if other[2] <= final and first <= other[3] and start < other[1]:
                    if start + size <= other[0]:
                        break
                    start = max(start, other[1])
            placed.append((start, start + size, first, final, name))
            result[name] = replace(
                places[name],
                start=start,
                size=size,
                sample=places[name].size if name in held and block > 1 else 0,
            )
        for start, end, _, _, name in placed:
            shared = any(s < end and start < e and n != name for s, e, _, _, n in placed)
            result[name] = replace(result[name], fill_each=shared)
        arena = max(end for _, end, *_ in placed) + SLACK
        _bound("a sample's working memory", arena, MOST_ARENA_BYTES)
        return result, align(arena)

    def _resolve(self, tensor: str, places: dict[str, Place]) -> tuple[Place, Array]:
        """Where a tensor's elements lie: a place, and each one's byte offset in row-major order."""
        view = self.views.get(tensor)
        root = view.root if view else tensor
        offsets = logical_offsets(places[root], self.tensors[root].shape)
        return places[root], offsets[view.index] if view else offsets

    # -- steps -------------------------------------------------------------------------------------

    def _step(self, draft: _Draft, places: dict[str, Place]) -> Step:
        op = draft.ops[0]
        if draft.view is not None:
            return self._gather(draft, places)
        target = places[draft.name]
        out = self.tensors[draft.name].qparams
        offset = stored_offset(out)
        match op:
            case Conv2d():
                return self._convolution(draft, op, places)
            case Linear():
                return self._linear(draft, op, places)
            case AvgPool2d() | GlobalAvgPool():
                source = places[op.inputs[0]]
                kernel, stride, padding = (source.height, source.width), (1, 1), (0, 0, 0, 0)
                if isinstance(op, AvgPool2d):
                    kernel, stride, padding = op.kernel, op.stride, op.padding
                bias = -source.zero * kernel[0] * kernel[1]
                return Average(
                    op.name, draft.ops, source, target,
                    kernel, stride, padding, bias, self._requantization(op),
                )  # fmt: skip
            case MaxPool2d():
                source = places[op.inputs[0]]
                return Maximum(
                    op.name, draft.ops, source, target,
                    op.kernel, op.stride, op.padding, op.dilation,
                )  # fmt: skip
            case Add() | Subtract() | Clamp() | Requantize():
                rule = self._requantization(op) if isinstance(op, Requantize) else None
                low, high = out.qmin + offset, out.qmax + offset
                sources = tuple(places[i] for i in op.inputs)
                return Elementwise(
                    op.name, draft.ops, sources, target, low, high, rule, isinstance(op, Subtract)
                )
            case Multiply():
                first, second = (places[i] for i in draft.reads)
                rule = self._requantization(op)
                return Product(op.name, draft.ops, (first, second), target, rule)
            case Table():
                shape = self.tensors[op.name].shape
                return Lookup(
                    op.name, draft.ops, places[op.inputs[0]], target,
                    self._table(op), channels=len(shape) in {1, 3},
                )  # fmt: skip
            case Concat():
                if self._concatenates(op):
                    sources = tuple(places[i] for i in op.inputs)
                    return Concatenate(op.name, draft.ops, sources, target)
                return self._gather(draft, places)
            case Pad():
                return self._gather(draft, places)
            case Reshape() | Permute() | Slice() | Upsample():
                raise AssertionError(op)
            case _:
                assert_never(op)

    def _gather(self, draft: _Draft, places: dict[str, Place]) -> Gather:
        """Copy elements: a view that must be stored, a concatenation, or what `Pad` surrounds."""
        op = draft.ops[0]
        shape = self.tensors[draft.name].shape
        target = places[draft.name]
        where = logical_offsets(target, shape).reshape(shape)
        if draft.view is not None:
            root = draft.view.root
            offsets = logical_offsets(places[root], self.tensors[root].shape)
            sources, found, parts = [places[root]], [offsets[draft.view.index]], [where]
        else:
            sources, found = [], []
            for tensor in op.inputs:
                place, offsets = self._resolve(tensor, places)
                sources.append(place)
                found.append(offsets)
            if isinstance(op, Concat):
                ends = np.cumsum([self.tensors[i].shape[op.axis] for i in op.inputs])
                parts = np.split(where, ends[:-1], axis=op.axis)
            elif isinstance(op, Pad):
                widths = zip(op.padding[::2], op.padding[1::2], shape, strict=True)
                parts = [where[tuple(slice(before, n - after) for before, after, n in widths)]]
            else:
                raise AssertionError(op)
        pairs = [_rising(*pair) for pair in zip(found, parts, strict=True)]
        return Gather(
            draft.name,
            draft.ops,
            tuple(sources),
            target,
            tuple(index for index, _ in pairs),
            tuple(to for _, to in pairs),
        )

    def _table(self, op: Table) -> Array:
        """uint8 [rows, 256]: the result's stored code for each stored code, legal or not."""
        source, out = (self.tensors[name].qparams for name in (op.inputs[0], op.name))
        codes = np.arange(256) - stored_offset(source)
        lowest = code_range(source.bits, source.signed)[0]
        entries = np.clip(codes - lowest, 0, 2**source.bits - 1)
        table = self.program.parameters[f"{op.name}.table"]
        _bound(f"the table of {op.name!r}", len(table) * 256, MOST_TENSOR_BYTES)
        return np.asarray(
            (table.astype(np.int16) + stored_offset(out)).astype(np.uint8)[:, entries]
        )

    def _requantization(self, op: Op) -> Requantization:
        out = self.tensors[op.name].qparams
        stored = self.program.parameters[f"{op.name}.multiplier"]
        shape = self.tensors[op.name].shape
        weight = self.program.parameters.get(f"{op.name}.weight")
        channels = shape[0] if weight is None else len(weight)
        multiplier = np.broadcast_to(multiplier_value(stored, out.bits), (channels,))
        bounds = self.program.accumulator_bounds(op).astype(np.float64)
        wide = bool((bounds * multiplier.astype(np.float64)).max() > 2.0**30)
        offset = stored_offset(out)
        return Requantization(
            np.ascontiguousarray(multiplier, np.float32),
            out.zero_point + offset,
            out.qmin + offset,
            out.qmax + offset,
            wide,
        )

    def _bias(self, op: Op, weight: Array, zero: int) -> Array:
        """int32 [O]: the op's bias less `zero` times the sum of its weights, modulo 2**32."""
        total = -zero * weight.reshape(len(weight), -1).sum(1, dtype=np.int64)
        bias = self.program.parameters.get(f"{op.name}.bias")
        if bias is not None:
            total = total + bias
        return np.asarray(total.astype(np.uint32).view(np.int32))

    def _convolution(self, draft: _Draft, op: Conv2d, places: dict[str, Place]) -> MatMul:
        source = places[op.inputs[0]]
        weight = self.program.parameters[f"{op.name}.weight"]
        top, _, left, _ = op.padding
        _, height, width = self.tensors[op.name].shape
        x = source.border[2] - left
        first = -top * source.row + source.column(x) - source.column(source.border[2])
        # Of what is stored, or looked up at last.
        out = self.tensors[draft.ops[-1 if draft.table is None else -2].name].qparams
        offset = stored_offset(out)
        return MatMul(
            draft.name,
            draft.ops,
            source,
            places[draft.name],
            np.ascontiguousarray(weight.transpose(0, 2, 3, 1)),
            self._bias(op, weight, source.zero),
            self._requantization(op),
            op.groups,
            op.stride,
            op.dilation,
            first,
            (height, width),
            draft.pool,
            places[draft.addend] if draft.addend is not None else None,
            self._requantization(draft.addend_op) if draft.addend_op is not None else None,
            (out.qmin + offset, out.qmax + offset),
            out.zero_point + offset,
            self._table(draft.table)[0] if draft.table is not None else None,
            pixel_lanes=op.name in self.across,
        )

    def _linear(self, draft: _Draft, op: Linear, places: dict[str, Place]) -> MatMul:
        weight = self.program.parameters[f"{op.name}.weight"]
        source, offsets = self._resolve(draft.reads[0], places)
        shape = self.tensors[draft.reads[0]].shape
        rows = math.prod(shape[:-1])
        bias = self._bias(op, weight, source.zero)
        if len(shape) == 1:
            # One weight per byte of the source, in its own order; borders and gaps get 0.
            start = int(offsets.min())
            reach = int(offsets.max()) - start + 1
            _bound(f"the weight of {op.name!r}, spread", len(weight) * reach, MOST_TENSOR_BYTES)
            spread = np.zeros((len(weight), reach), np.int8)
            spread[:, offsets - start] = weight
            weight = spread
        else:
            start = 0
        return MatMul(
            draft.name,
            draft.ops,
            source,
            places[draft.name],
            np.ascontiguousarray(weight[:, None, None, :]),
            bias,
            self._requantization(op),
            first=start,
            out=(1, rows),
            table=self._table(draft.table)[0] if draft.table is not None else None,
            rows=draft.rows,
        )


def _bound(what: str, size: int, most: int) -> None:
    if size > most:
        raise TooLargeError(
            f"{what} would take {size:,} bytes, more than the {most:,} of native code."
        )


def align(size: int) -> int:
    """The next multiple of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def copy_name(op: Op, what: str) -> str:
    """The name of a tensor that only a plan has; no tensor of a program has a tab in its name."""
    return f"{op.name}\t{what}"


def _rising(index: Array, places: Array) -> tuple[Array, Array]:
    """Both as int32 in the order in which the target's bytes lie.

    index   offsets in the source, in row-major order
    places  offsets in the target, in the shape of the elements
    """
    index = index.reshape(places.shape)
    if places.ndim == 3:  # pixels of channels
        index, places = (np.transpose(each, (1, 2, 0)) for each in (index, places))
    return index.reshape(-1).astype(np.int32), places.reshape(-1).astype(np.int32)


def image_shape(shape: Shape) -> tuple[int, int, int]:
    """Channels, height and width under which a tensor of any rank is stored."""
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    if not shape:
        return 1, 1, 1
    return shape[-1], 1, math.prod(shape[:-1])


def logical_offsets(place: Place, shape: Shape) -> Array:
    """Bytes from the place's `offset` to every element, in the tensor's row-major order."""
    offsets = place.element_offsets()
    if len(shape) != 3:
        offsets = np.transpose(offsets, (1, 2, 0))
    return offsets.reshape(-1)
