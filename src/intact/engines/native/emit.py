"""From a plan to one C file: the frame, its tables, and the portable kernels.

The portable kernels are C99 that any compiler takes and any CPU runs. They are written so that a
compiler vectorises them: contiguous bytes, constant shapes, no branch inside. The emitters for
vector instructions replace the kernels of a `MatMul` and a `Lookup` and the loading of the input;
everything else stands here once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from typing_extensions import assert_never

from intact.engines.native.plan import (
    MOST_STACK,
    Average,
    Concatenate,
    Elementwise,
    Gather,
    Layout,
    Lookup,
    MatMul,
    Maximum,
    Output,
    Place,
    Plan,
    Product,
    Requantization,
    Step,
    make_plan,
)
from intact.errors import ProgramError
from intact.program import Program

__all__ = ["ABI", "Emitter", "Generated", "Tables", "generate"]

ABI = 1
"""Version of `intact_module`; the runtime refuses another."""

Array = npt.NDArray[Any]

MOST_LOOPS = 8
"""Loops around a copy of bytes; what would take more is a table."""

MODULE = """\
typedef struct {
    uint32_t abi;
    uint32_t input_bytes;
    uint32_t output_bytes;
    uint32_t block;
    uint64_t arena_bytes;
    uint64_t trace_bytes;
    void (*init)(void *arena);
    void (*run)(const uint8_t *input, uint8_t *output, uint32_t n, void *arena);
    void (*trace)(const uint8_t *input, uint8_t *output, uint8_t *traced, void *arena);
    uint32_t amx;
} intact_module;
"""

PRELUDE = """\
#include <stdint.h>
#include <string.h>

/* noipa: gcc 12 may take the stores of a loop for none, and then leaves out the call. */
#if defined(__GNUC__) && !defined(__clang__)
#define LAYER static __attribute__((noinline, noipa))
#elif defined(__GNUC__)
#define LAYER static __attribute__((noinline))
#else
#define LAYER static
#endif
#if defined(__GNUC__)
#define TABLE static const __attribute__((aligned(64)))
#define EXPORT __attribute__((visibility("default")))
#else
#define TABLE static const
#define EXPORT
#endif

/* clamp(rint(acc * m), low, high) + zero, in IEEE float32 (arithmetic.md, section 3). The bounds
   are integers, so clamping first changes nothing; then adding and taking off 1.5 * 2**23 rounds to
   the nearest integer, ties to even. */
static inline uint8_t requantize(int32_t acc, float m, float low, float high, int32_t zero)
{
    float p = (float)acc * m;
    p = p > low ? p : low;
    p = p < high ? p : high;
    return (uint8_t)((int32_t)((p + 12582912.0f) - 12582912.0f) + zero);
}
"""


@dataclass(frozen=True, slots=True)
class Generated:
    """A program as C.

    source      one translation unit that exports `intact_program`
    traced      names of the tensors that `trace` writes, in its order
    arena_bytes working memory of one thread
    block       samples per call of `run`, at most
    """

    source: str
    traced: tuple[str, ...]
    arena_bytes: int
    block: int


@dataclass
class Tables:
    """Constant arrays of the file, each under a name of its own."""

    lines: list[str] = field(default_factory=list)

    def add(self, name: str, array: Array) -> str:
        """Add a table; int8 and uint8 as string literals, which compilers read fastest."""
        flat = np.ascontiguousarray(array).reshape(-1)
        kind = {"int8": "int8_t", "uint8": "uint8_t", "int32": "int32_t", "float32": "float"}
        kind_name = kind[flat.dtype.name]
        if flat.dtype.itemsize == 1:
            octal = [f"\\{b:03o}" for b in range(256)]
            raw = flat.view(np.uint8).tolist()
            rows = (raw[i : i + 32] for i in range(0, len(raw), 32))
            body = "\n".join('    "' + "".join([octal[b] for b in row]) + '"' for row in rows)
            # One more byte for the terminating 0, so that the literal fits exactly.
            self.lines.append(f"TABLE {kind_name} {name}[{len(raw) + 1}] =\n{body};\n")
            return name
        if flat.dtype == np.float32:
            items = [float(v).hex() + "f" for v in flat]
        else:
            items = [str(v) if v > -(2**31) else "(-2147483647 - 1)" for v in flat.tolist()]
        rows = (items[i : i + 8] for i in range(0, len(items), 8))
        body = ",\n".join("    " + ", ".join(row) for row in rows)
        self.lines.append(f"TABLE {kind_name} {name}[{len(items)}] = {{\n{body}\n}};\n")
        return name


class Emitter:
    """The portable kernels; a subclass answers for the steps that it does better.

    `load`, `matmul` and `lookup` may return None: then the portable kernel is taken.
    """

    layout = Layout()
    prelude = ""
    amx = False

    def __init__(self, tables: Tables) -> None:
        self.tables = tables

    def load(self, place: Place) -> str | None:
        """Statements that copy `input`, canonical codes, to `x`, the place's first element."""
        del place
        return None

    def matmul(self, step: MatMul, name: str) -> str | None:
        """The body of a convolution or linear layer."""
        del step, name
        return None

    def lookup(self, step: Lookup, name: str) -> str | None:
        """The body of a table look-up."""
        del step, name
        return None

    def thread_start(self) -> str:
        """Statements before the layers of a call of `run`."""
        return ""

    def thread_end(self) -> str:
        """Statements after them."""
        return ""


def emitters() -> dict[str, type[Emitter]]:
    """All instruction sets for which code can be generated."""
    from intact.engines.native.emit_amx import Amx
    from intact.engines.native.emit_avx2 import Avx2
    from intact.engines.native.emit_avx512 import Avx512Vnni

    return {
        "amx": Amx,
        "avx512vbmi": Avx512Vnni,
        "avx512vnni": Avx512Vnni,
        "avx512": Avx2,  # whose other kernels the compiler vectorises for wider vectors
        "avx2": Avx2,
        "portable": Emitter,
    }


def generate(program: Program, isa: str, *, fuse: bool = True) -> Generated:
    """The program as C for an instruction set.

    isa   a key of `emitters()`
    fuse  False stores the result of every op, for comparison with other engines
    """
    known = emitters()
    if isa not in known:
        raise ProgramError(f"there is no instruction set {isa!r}; choose one of {list(known)}.")
    emitter = known[isa](Tables())
    plan = make_plan(program, emitter.layout, fuse=fuse)
    return _File(plan, emitter, isa).write()


# -- text ------------------------------------------------------------------------------------------


def clean(name: str) -> str:
    """A tensor's name for a comment: what could end the comment or the line becomes `_`."""
    return re.sub(r"[^A-Za-z0-9_.\-]", "_", name)[:80]


def identifier(name: str) -> str:
    """A tensor's name as part of an identifier."""
    return re.sub(r"[^A-Za-z0-9_]", "_", name)[:40]


def indent(text: str, depth: int = 1) -> str:
    """Every line that is not empty, moved to the right."""
    return "\n".join("    " * depth + line if line else line for line in text.split("\n"))


def loop(variable: str, count: int, body: str) -> str:
    """A C loop; a block where there is one round only."""
    if count == 1:
        return f"{{\n    const int {variable} = 0; (void){variable};\n{indent(body)}\n}}"
    return f"for (int {variable} = 0; {variable} < {count}; {variable}++) {{\n{indent(body)}\n}}"


def shape_text(place: Place) -> str:
    """`C x H x W`."""
    return f"{place.channels}x{place.height}x{place.width}"


def pointer(name: str, place: Place, *, const: bool, sample: str = "s") -> str:
    """A declaration of a pointer to a place's first element."""
    qualifier = "const " if const else ""
    move = f" + (size_t){sample} * {place.sample}" if place.sample else ""
    return f"{qualifier}uint8_t *{name} = arena + {place.offset}{move};"


def filled(place: Place, pointer_name: str) -> str:
    """Statements that set what no step writes: the border, and the constant of a `Pad`."""
    parts = [fill_border(place, pointer_name)]
    if place.fill is not None:
        row = f"memset({pointer_name} + y * {place.row}, {place.fill}, "
        row += f"{place.width * place.pixel});"
        parts.append(loop("y", place.height, row))
    return "\n".join(filter(None, parts))


def fill_border(place: Place, pointer_name: str) -> str:
    """Statements that set the border of a tensor to its stored zero point, or nothing."""
    top, bottom, left, right = place.border
    if not any(place.border):
        return ""
    start = f"{pointer_name} - {place.offset - place.start}"
    rows = top + place.height + bottom
    lines = []
    if place.phases > 1:
        return f"memset({start}, {place.zero}, {rows * place.row});"
    if top:
        lines.append(f"memset({start}, {place.zero}, {top * place.row});")
    if left or right:
        # The right border of a row and the left border of the next one are neighbours.
        gap = (left + right) * place.pixel
        first = f"{pointer_name} - {left * place.pixel}"
        lines.append(f"memset({first}, {place.zero}, {left * place.pixel});")
        body = f"memset({pointer_name} + y * {place.row} + {place.width * place.pixel}, "
        body += f"{place.zero}, {gap});"
        if place.height > 1:
            lines.append(loop("y", place.height - 1, body))
        last = (place.height - 1) * place.row + place.width * place.pixel
        lines.append(f"memset({pointer_name} + {last}, {place.zero}, {right * place.pixel});")
    if bottom:
        below = place.height * place.row - left * place.pixel
        lines.append(f"memset({pointer_name} + {below}, {place.zero}, {bottom * place.row});")
    return "\n".join(line for line in lines if ", 0);" not in line)


def bounds(rule: Requantization) -> str:
    """The last arguments of `requantize`."""
    low, high = rule.low - rule.zero, rule.high - rule.zero
    return f"{low}.0f, {high}.0f, {rule.zero}"


class _File:
    """One generated file."""

    def __init__(self, plan: Plan, emitter: Emitter, isa: str) -> None:
        self.plan = plan
        self.emitter = emitter
        self.isa = isa
        self.tables = emitter.tables
        self.functions: list[str] = []

    def write(self) -> Generated:
        plan, program = self.plan, self.plan.program
        head = [self._layer(i, step) for i, step in enumerate(plan.head)]
        tail = [self._layer(len(plan.head) + i, step) for i, step in enumerate(plan.tail)]
        loads = [self._load(*each) for each in zip(self._names("load"), plan.inputs, strict=True)]
        stores = [
            self._store(*each) for each in zip(self._names("store"), plan.outputs, strict=True)
        ]
        self.functions += [*loads, *stores, self._init(), self._run(head, tail)]
        self.functions.append(self._trace(head, tail))
        input_bytes, output_bytes = sum(self._sizes("load")), sum(self._sizes("store"))
        traced = sum(p.channels * p.height * p.width for p in plan.traced)
        work = sum(map(program.macs, program.ops))
        title = (
            f"/* Generated by intact from the program {program.sha256},\n"
            f"   for {self.isa}. {len(plan.head) + len(plan.tail)} layers, {work} MACs a sample, "
            f"{plan.arena} bytes of working memory. */"
        )
        facts = f"{ABI}, {input_bytes}, {output_bytes}, {plan.block}, {plan.arena}u, {traced}u"
        module = (
            "extern EXPORT const intact_module intact_program;\n"
            f"EXPORT const intact_module intact_program = {{\n    {facts},\n"
            f"    init, run, trace, {int(self.emitter.amx)}\n}};\n"
        )
        prelude = (PRELUDE, MODULE, self.emitter.prelude)
        source = "\n".join((title, *prelude, *self.tables.lines, *self.functions, module))
        names = tuple(place.tensor for place in plan.traced)
        return Generated(source, names, plan.arena, plan.block)

    # -- the frame ---------------------------------------------------------------------------------

    def _stored(self) -> list[Place]:
        """Every tensor that has bytes of its own, the inputs first."""
        steps = (*self.plan.head, *self.plan.tail)
        return [*self.plan.inputs, *(step.target for step in steps)]

    # The bytes of a sample are those of all its inputs (outputs), one behind the other in order.

    def _sizes(self, kind: Literal["load", "store"]) -> list[int]:
        """Bytes of each input, to load, or of each output, to store."""
        program = self.plan.program
        names = program.inputs if kind == "load" else program.outputs
        return [math.prod(program.tensors[name].shape) for name in names]

    def _names(self, kind: Literal["load", "store"]) -> list[str]:
        """The functions that load (store) each input (output)."""
        count = len(self._sizes(kind))
        return [kind] if count == 1 else [f"{kind}{i}" for i in range(count)]

    def _calls(self, kind: Literal["load", "store"], array: str, sample: str) -> list[str]:
        """The calls that load all inputs of a sample from `array`, or store its outputs there."""
        sizes = self._sizes(kind)
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        move = f" + (size_t){sample} * {sum(sizes)}" if sample != "0" else ""
        return [
            f"{name}({array}{move}{f' + {start}' if start else ''}, arena, {sample});"
            for name, start in zip(self._names(kind), starts, strict=True)
        ]

    def _load(self, name: str, place: Place) -> str:
        body = self.emitter.load(place) or self._portable_load(place)
        border = fill_border(place, "x") if place.fill_each else ""
        return function(
            f"input {clean(place.tensor)}: {shape_text(place)}",
            f"{name}(const uint8_t *input, uint8_t *arena, uint32_t s)",
            ["(void)s;", pointer("x", place, const=False), border, body],
            layer=True,
        )

    def _portable_load(self, place: Place) -> str:
        flip = " ^ 128" if place.signed else ""
        spec = self.plan.program.tensors[place.tensor]
        if len(spec.shape) != 3:
            count = place.channels * place.width
            return loop("i", count, f"x[i] = (uint8_t)(input[i]{flip});")
        column = self._column(place, "x_")
        body = f"x[y * {place.row} + {column} + c] = (uint8_t)(*input++{flip});"
        return loop("c", place.channels, loop("y", place.height, loop("x_", place.width, body)))

    def _column(self, place: Place, variable: str) -> str:
        """Bytes from a row's column 0 to a column that is known at run time only."""
        if place.phases == 1:
            return f"{variable} * {place.pixel}"
        left = place.border[2]
        x = f"({variable} + {left})"
        first = place.column(left)
        return (
            f"{x} % {place.phases} * {place.phase} + {x} / {place.phases} * {place.pixel} - {first}"
        )

    def _store(self, name: str, output: Output) -> str:
        table = name.replace("store", "order_of_output")
        copy = self._copy_out(output.place, output.offsets, "output", table)
        return function(
            f"output {clean(output.tensor)}",
            f"{name}(uint8_t *output, const uint8_t *arena, uint32_t s)",
            ["(void)s;", pointer("x", output.place, const=True), copy],
            layer=True,
        )

    def _copy_out(self, place: Place, offsets: Array, target: str, table: str) -> str:
        """Statements that write a tensor's elements in row-major order.

        table  name of the table that they may need
        """
        flip = " ^ 128" if place.signed else ""
        if np.array_equal(offsets, np.arange(len(offsets))):
            return loop("i", len(offsets), f"{target}[i] = (uint8_t)(x[i]{flip});")
        if np.array_equal(offsets, place.element_offsets().reshape(-1)):
            body = f"*{target}++ = (uint8_t)(x[y * {place.row} + "
            body += f"{self._column(place, 'x_')} + c]{flip});"
            inner = loop("y", place.height, loop("x_", place.width, body))
            return loop("c", place.channels, inner)
        if loops := strided(offsets):
            return nested(loops, f"*{target}++ = (uint8_t)(x[{{0}}]{flip});")
        table = self.tables.add(table, offsets.astype(np.int32))
        return loop("i", len(offsets), f"{target}[i] = (uint8_t)(x[{table}[i]]{flip});")

    def _init(self) -> str:
        """What no step writes of the tensors that share their bytes with nobody."""
        lines = ["uint8_t *const arena = memory;", "(void)arena;"]
        for place in self._stored():
            fill = "" if place.fill_each else filled(place, "x")
            if fill:
                block = f"{pointer('x', place, const=False)}\n{fill}"
                count = self.plan.block if place.sample else 1
                lines.append(loop("s", count, block))
        return function("once for each arena", "init(void *memory)", lines)

    def _run(self, head: Sequence[str], tail: Sequence[str]) -> str:
        per_sample = "\n".join(
            (
                *self._calls("load", "input", "s"),
                *(f"{name}(arena, s);" for name in head),
            )
        )
        stores = "\n".join(self._calls("store", "output", "s"))
        lines = [
            "uint8_t *const arena = memory;",
            self.emitter.thread_start(),
            for_samples(per_sample if tail else per_sample + "\n" + stores),
            *(f"{name}(arena, n);" for name in tail),
            for_samples(stores) if tail else "",
            self.emitter.thread_end(),
        ]
        return function(
            "n samples, at most a block",
            "run(const uint8_t *input, uint8_t *output, uint32_t n, void *memory)",
            lines,
        )

    def _trace(self, head: Sequence[str], tail: Sequence[str]) -> str:
        lines = ["uint8_t *const arena = memory;", self.emitter.thread_start()]
        places = {place.tensor: place for place in self.plan.traced}
        inputs = (place.tensor for place in self.plan.inputs)
        calls = list(zip(inputs, self._calls("load", "input", "0"), strict=True))
        for step, name in zip(self.plan.head, head, strict=True):
            calls.append((step.name, f"{name}(arena, 0);"))
        for row, name in zip(self.plan.tail, tail, strict=True):
            calls.append((row.name, f"{name}(arena, 1);"))
        for tensor, call in calls:
            if tensor not in places:
                lines.append(call)
                continue
            place = places[tensor]
            offsets = place.element_offsets()
            if len(self.plan.program.tensors[place.tensor].shape) != 3:
                offsets = np.transpose(offsets, (1, 2, 0))
            count = offsets.size
            copy = self._copy_out(place, offsets.reshape(-1), "to", "order_of_to")
            lines.append(
                f"{call}\n{{\n    const uint8_t *x = arena + {place.offset};\n"
                f"    uint8_t *to = traced;\n{indent(copy)}\n    traced += {count};\n}}"
            )
        lines += [*self._calls("store", "output", "0"), self.emitter.thread_end()]
        return function(
            "one sample, by the same kernels; `traced` gets every stored tensor",
            "trace(const uint8_t *input, uint8_t *output, uint8_t *traced, void *memory)",
            lines,
        )

    # -- layers ------------------------------------------------------------------------------------

    def _layer(self, index: int, step: Step) -> str:
        name = f"layer{index}_{identifier(step.name)}"
        sources: tuple[Place, ...]
        if isinstance(step, MatMul | Average | Maximum | Lookup):
            sources = (step.source,)
        else:
            sources = step.sources
        ops = " + ".join(f"{type(op).__name__} {clean(op.name)}" for op in step.ops)
        title = f"{ops}: {', '.join(map(shape_text, sources))} -> {shape_text(step.target)}"
        rows = isinstance(step, MatMul) and step.rows
        lines = [] if rows else ["(void)s;"]
        counter = "0" if rows else "s"
        names = ["x"] if len(sources) == 1 else [f"x{i}" for i in range(len(sources))]
        for source_name, source in zip(names, sources, strict=True):
            lines.append(pointer(source_name, source, const=True, sample=counter))
        lines.append(pointer("to", step.target, const=False, sample=counter))
        if isinstance(step, MatMul):
            title += f", {matmul_text(step)}"
            if step.addend is not None:
                lines.append(pointer("addend", step.addend, const=True, sample=counter))
        if step.target.fill_each:
            lines.append(filled(step.target, "to"))
        lines.append(self._body(step, name))
        argument = "n" if rows else "s"
        signature = f"{name}(uint8_t *arena, uint32_t {argument})"
        self.functions.append(function(title, signature, lines, layer=True))
        return name

    def _body(self, step: Step, name: str) -> str:
        match step:
            case MatMul():
                special = self.emitter.matmul(step, name)
                if special is not None:
                    return special
                if step.depthwise:
                    return self._depthwise(step, name)
                return self._matmul(step, name)
            case Average():
                return self._average(step, name)
            case Maximum():
                return maximum(step)
            case Elementwise():
                return self._elementwise(step, name)
            case Product():
                return product(step)
            case Lookup():
                return self.emitter.lookup(step, name) or self._lookup(step, name)
            case Concatenate():
                return concatenate(step)
            case Gather():
                return self._gather(step, name)
            case _:
                assert_never(step)

    def _matmul(self, step: MatMul, name: str) -> str:
        """A patch of bytes times the rows of the weight: the form that compilers vectorise."""
        out_channels, kh, kw, channels = step.weight.shape
        source, target = step.source, step.target
        contiguous = step.groups == 1 and source.pixel == channels and step.dilation[1] == 1
        taps = kh if contiguous else kh * kw
        run = kw * channels if contiguous else channels
        direct = taps == 1
        terms = taps * run
        padded = -(-terms // 64) * 64 if terms >= 32 else -(-terms // 16) * 16
        group = out_channels // step.groups
        weight = np.zeros((out_channels, padded), np.int8)
        weight[:, :terms] = step.weight.reshape(out_channels, -1)
        w = self.tables.add(f"{name}_weight", weight)
        b = self.tables.add(f"{name}_bias", step.bias)
        m = self.tables.add(f"{name}_multiplier", step.requantization.multiplier)
        pool_h, pool_w = step.pool
        sy, sx = step.stride
        pixel = source.pixel
        sample = source.sample if step.rows else pixel * sx
        base = "group" if step.groups > 1 else "window"
        positions = [(i, j) for i in range(pool_h) for j in range(pool_w)]
        copied = len(positions) * padded <= MOST_STACK
        gather = []
        for p, (i, j) in enumerate(positions):
            move = i * sy * source.row + j * sx * pixel
            if direct or not copied:
                gather.append(f"const uint8_t *const patch{p} = {base} + {move};")
                continue
            gather.append(f"uint8_t patch{p}[{padded}];")
            if padded > terms:
                gather.append(f"memset(patch{p} + {terms}, 0, {padded - terms});")
            rows = f"{base} + {move} + ky * {step.dilation[0] * source.row}"
            if contiguous:
                gather.append(loop("ky", kh, f"memcpy(patch{p} + ky * {run}, {rows}, {run});"))
            else:
                copy = f"memcpy(patch{p} + (ky * {kw} + kx) * {run}, {rows}"
                copy += f" + kx * {step.dilation[1] * pixel}, {run});"
                gather.append(loop("ky", kh, loop("kx", kw, copy)))
        body = [f"const int8_t *const row = {w} + (size_t)o * {padded};"]
        # The sum is taken modulo 2**32; the true accumulator fits.
        for p in range(len(positions)):
            # Signed as long as no sum of products can leave int32: then the dot product is seen.
            kind = "int32_t" if padded * 255 * 128 < 2**31 else "uint32_t"
            if direct or copied:
                inner = f"acc{p} += ({kind})((int32_t)patch{p}[k] * row[k]);"
                dot = loop("k", padded, inner)
            else:
                at, tap = f"ky * {step.dilation[0] * source.row} + k", "ky"
                if not contiguous:
                    at, tap = f"{at} + kx * {step.dilation[1] * pixel}", f"(ky * {kw} + kx)"
                inner = f"acc{p} += ({kind})((int32_t)patch{p}[{at}] * row[{tap} * {run} + k]);"
                dot = loop("k", run, inner)
                dot = loop("ky", kh, dot if contiguous else loop("kx", kw, dot))
            body.append(f"{kind} acc{p} = 0;\n{dot}")
            body.append(f"const int32_t sum{p} = (int32_t)((uint32_t)acc{p} + (uint32_t){b}[o]);")
        body.append("int32_t sum = sum0;")
        body += [f"sum = sum{p} > sum ? sum{p} : sum;" for p in range(1, len(positions))]
        body.append(f"uint8_t code = requantize(sum, {m}[o], {bounds(step.requantization)});")
        if step.addend is not None:
            body.append(added(step, "code", "with[o]"))
        body.append(f"out[o] = {self._looked_up(step, name, 'code')};")
        if step.groups > 1:
            channel = loop("i", group, "\n".join((f"const int o = g * {group} + i;", *body)))
            shift = f"const uint8_t *const group = window + g * {channels};"
            inner = loop("g", step.groups, "\n".join((shift, *gather, channel)))
        else:
            inner = "\n".join((*gather, loop("o", out_channels, "\n".join(body))))
        if step.rows:
            return (
                f"for (uint32_t i = 0; i < n; i++) {{\n"
                f"    const uint8_t *const window = x + {step.first} + (size_t)i * {sample};\n"
                f"    uint8_t *const out = to + (size_t)i * {target.sample};\n{indent(inner)}\n}}"
            )
        address = f"x + {step.first} + y * {sy * pool_h * source.row} + x_ * {sample * pool_w}"
        lines = [
            f"const uint8_t *const window = {address};",
            f"uint8_t *const out = to + y * {target.row} + x_ * {target.pixel};",
        ]
        if step.addend is not None:
            a = step.addend
            lines.append(f"const uint8_t *const with = addend + y * {a.row} + x_ * {a.pixel};")
        return self._positions(step, "\n".join((*lines, inner)))

    def _positions(self, step: MatMul, body: str) -> str:
        height, width = step.out[0] // step.pool[0], step.out[1] // step.pool[1]
        return loop("y", height, loop("x_", width, body))

    def _depthwise(self, step: MatMul, name: str) -> str:
        channels, kh, kw, _ = step.weight.shape
        source, target = step.source, step.target
        w = self.tables.add(f"{name}_weight", np.transpose(step.weight[..., 0], (1, 2, 0)))
        b = self.tables.add(f"{name}_bias", step.bias)
        m = self.tables.add(f"{name}_multiplier", step.requantization.multiplier)
        sy, sx = step.stride
        dy, dx = step.dilation
        chunk = min(channels, 64)
        at = f"{step.first} + y * {sy * source.row} + x_ * {sx * source.pixel} + c0"
        body = [
            f"const uint8_t *const window = x + {at};",
            f"uint8_t *const out = to + y * {target.row} + x_ * {target.pixel} + c0;",
            f"uint32_t acc[{chunk}];",
        ]
        taps = [(i, j) for i in range(kh) for j in range(kw)]
        count = str(chunk) if channels % chunk == 0 else "count"
        if count == "count":
            body.append(f"const int count = {channels} - c0 < {chunk} ? {channels} - c0 : {chunk};")

        def each(statement: str) -> str:
            return f"for (int c = 0; c < {count}; c++) {{\n    {statement}\n}}"

        if len(taps) <= 25:
            terms = " + ".join(
                f"(int32_t)window[c + {i * dy * source.row + j * dx * source.pixel}] * "
                f"{w}[c0 + c + {(i * kw + j) * channels}]"
                for i, j in taps
            )
            body.append(each(f"acc[c] = (uint32_t)({terms});"))
        else:
            body.append(each("acc[c] = 0;"))
            tap = f"ky * {dy * source.row} + kx * {dx * source.pixel}"
            factor = f"{w}[(ky * {kw} + kx) * {channels} + c0 + c]"
            add = each(f"acc[c] += (uint32_t)((int32_t)window[{tap} + c] * {factor});")
            body.append(loop("ky", kh, loop("kx", kw, add)))
        sum_ = f"(int32_t)(acc[c] + (uint32_t){b}[c0 + c])"
        code = f"requantize({sum_}, {m}[c0 + c], {bounds(step.requantization)})"
        body.append(each(f"out[c] = {code};"))
        if step.table is not None:  # apart, as compilers make no vectors of a look-up
            body.append(each(f"out[c] = {self._looked_up(step, name, 'out[c]')};"))
        chunks = f"for (int c0 = 0; c0 < {channels}; c0 += {chunk}) {{\n"
        return self._positions(step, chunks + indent("\n".join(body)) + "\n}")

    def _looked_up(self, step: MatMul, name: str, code: str) -> str:
        """The code, or its entry in the fused table."""
        if step.table is None:
            return code
        return f"{self.tables.add(f'{name}_table', step.table)}[{code}]"

    def _average(self, step: Average, name: str) -> str:
        source, target = step.source, step.target
        kh, kw = step.kernel
        (sy, sx), (top, _, left, _) = step.stride, step.padding
        m = self.tables.add(f"{name}_multiplier", step.requantization.multiplier)
        channels = source.channels
        chunk = min(channels, 64)
        padded = any(step.padding)
        count = f"({channels} - c0 < {chunk} ? {channels} - c0 : {chunk})"
        count = str(chunk) if channels % chunk == 0 else count
        tap = f"v * {source.row} + u * {source.pixel} + c0 + c"
        add = f"for (int c = 0; c < {count}; c++) {{\n    acc[c] += x[{tap}];\n}}"
        window = f"const int v = y * {sy} + ky - {top}, u = x_ * {sx} + kx - {left};\n"
        if padded:
            inside = f"v >= 0 && v < {source.height} && u >= 0 && u < {source.width}"
            pad = f"for (int c = 0; c < {count}; c++) {{\n    acc[c] += {source.zero};\n}}"
            add = f"if ({inside}) {{\n{indent(add)}\n}} else {{\n{indent(pad)}\n}}"
        body = (
            f"uint8_t *const out = to + y * {target.row} + x_ * {target.pixel} + c0;\n"
            f"uint32_t acc[{chunk}];\n"  # modulo 2**32; the true accumulator fits int32
            f"for (int c = 0; c < {count}; c++) {{\n    acc[c] = {step.bias % 2**32}u;\n}}\n"
            + loop("ky", kh, loop("kx", kw, window + add))
            + f"\nfor (int c = 0; c < {count}; c++) {{\n    out[c] = requantize((int32_t)acc[c], "
            f"{m}[c0 + c], {bounds(step.requantization)});\n}}"
        )
        chunks = f"for (int c0 = 0; c0 < {channels}; c0 += {chunk}) {{\n{indent(body)}\n}}"
        return loop("y", target.height, loop("x_", target.width, chunks))

    def _elementwise(self, step: Elementwise, name: str) -> str:
        zero, low, high = step.target.zero, step.low, step.high
        rule = step.requantization
        if rule is not None:
            m = self.tables.add(f"{name}_multiplier", rule.multiplier[:1])
            value = f"requantize((int32_t){{0}} - {step.sources[0].zero}, {m}[0], {bounds(rule)})"
            return over_elements(step, f"{{to}} = {value};")
        total = "(int32_t){0}"
        if len(step.sources) == 2:
            total += f" - {{1}} + {zero}" if step.subtracts else f" + {{1}} - {zero}"
        clamp = f"v = v > {low} ? v : {low};\n{{to}} = (uint8_t)(v < {high} ? v : {high});"
        return over_elements(step, f"int32_t v = {total};\n{clamp}")

    def _lookup(self, step: Lookup, name: str) -> str:
        table = self.tables.add(f"{name}_table", step.table)
        rows = len(step.table)
        if rows == 1:
            return over_elements(step, f"{{to}} = {table}[{{0}}];")
        row = "c" if step.channels else f"x_ / {step.target.width // rows}"
        return over_elements(step, f"{{to}} = {table}[({row}) * 256 + {{0}}];", flat=False)

    def _gather(self, step: Gather, name: str) -> str:
        lines = []
        for i, (index, places) in enumerate(zip(step.index, step.places, strict=True)):
            source = "x" if len(step.sources) == 1 else f"x{i}"
            if loops := strided(places, index):
                lines.append(copied(loops, source))
                continue
            first = int(places[0])
            at = f"i + {first}"
            if not np.array_equal(places, np.arange(first, first + len(places))):
                at = f"{self.tables.add(f'{name}_to{i}', places)}[i]"
            table = self.tables.add(f"{name}_from{i}", index)
            lines.append(loop("i", len(index), f"to[{at}] = {source}[{table}[i]];"))
        return "\n".join(lines)


def function(title: str, signature: str, lines: Iterable[str], *, layer: bool = False) -> str:
    """A C function with its comment."""
    body = indent("\n".join(line for line in lines if line))
    return f"/* {title} */\n{'LAYER' if layer else 'static'} void {signature}\n{{\n{body}\n}}\n"


def for_samples(body: str) -> str:
    """A loop over the samples of a block."""
    return f"for (uint32_t s = 0; s < n; s++) {{\n{indent(body)}\n}}"


def matmul_text(step: MatMul) -> str:
    """What a comment says of a convolution's geometry."""
    _, kh, kw, _ = step.weight.shape
    text = f"{kh}x{kw}, stride {step.stride[0]}x{step.stride[1]}"
    if step.dilation != (1, 1):
        text += f", dilation {step.dilation[0]}x{step.dilation[1]}"
    return text + (f", {step.groups} groups" if step.groups > 1 else "")


def added(step: MatMul, code: str, other: str) -> str:
    """`clamp((a - z) + (b - z) + z)` on stored codes.  arithmetic.md, section 4."""
    low, high = step.sum_range
    rule = step.addend_rule
    if rule is not None and step.addend is not None:
        m = f"{float(rule.multiplier[0]).hex()}f"
        other = f"requantize({other} - {step.addend.zero}, {m}, {bounds(rule)})"
    return (
        f"int32_t total = (int32_t){code} + {other} - {step.sum_zero};\n"
        f"total = total > {low} ? total : {low};\n"
        f"{code} = (uint8_t)(total < {high} ? total : {high});"
    )


def over_elements(
    step: Elementwise | Product | Lookup, statement: str, *, flat: bool = True
) -> str:
    """Loops over all elements; `{0}`, `{1}` and `{to}` stand for their bytes.

    Of a source of one channel, row or column where the target has several it is always that one.

    flat  False: always with a loop over columns, `x_`, and one over channels, `c`
    """
    target = step.target
    sources = (step.source,) if isinstance(step, Lookup) else step.sources
    names = ["x"] if len(sources) == 1 else [f"x{i}" for i in range(len(sources))]
    places = (*sources, target)

    def spread(at: Callable[[Place], str]) -> str:
        operands = [f"{n}[{at(p)}]" for n, p in zip(names, sources, strict=True)]
        return statement.format(*operands, to=f"to[{at(target)}]")

    def down(place: Place) -> str:
        return f"y * {place.row} + " if place.height == target.height else ""

    def element(place: Place) -> str:
        right = f"x_ * {place.pixel} + " if place.width == target.width else ""
        return f"{down(place)}{right}{'c' if place.channels == target.channels else '0'}"

    along = all(p.pixel == p.channels == target.channels for p in places)
    if flat and along and all(p.width == target.width for p in places):
        inner = loop("i", target.width * target.channels, spread(lambda p: f"{down(p)}i"))
    else:
        inner = loop("x_", target.width, loop("c", target.channels, spread(element)))
    return loop("y", target.height, inner)


def product(step: Product) -> str:
    """`(a - za) * (b - zb)`, requantized."""
    first, second = step.sources
    m = f"{float(step.requantization.multiplier[0]).hex()}f"
    acc = f"((int32_t){{0}} - {first.zero}) * ((int32_t){{1}} - {second.zero})"
    value = f"requantize({acc}, {m}, {bounds(step.requantization)})"
    return over_elements(step, f"{{to}} = {value};")


def maximum(step: Maximum) -> str:
    """A max pool, channels innermost."""
    source, target = step.source, step.target
    kh, kw = step.kernel
    (sy, sx), (dy, dx), (top, _, left, _) = step.stride, step.dilation, step.padding
    channels = source.channels
    at = f"v * {source.row} + u * {source.pixel} + c"
    take = loop("c", channels, f"out[c] = x[{at}] > out[c] ? x[{at}] : out[c];")
    window = f"const int v = y * {sy} + ky * {dy} - {top}, u = x_ * {sx} + kx * {dx} - {left};\n"
    if any(step.padding):
        inside = f"v >= 0 && v < {source.height} && u >= 0 && u < {source.width}"
        take = f"if ({inside}) {{\n{indent(take)}\n}}"
    body = (
        f"uint8_t *const out = to + y * {target.row} + x_ * {target.pixel};\n"
        f"memset(out, 0, {channels});\n" + loop("ky", kh, loop("kx", kw, window + take))
    )
    return loop("y", target.height, loop("x_", target.width, body))


@dataclass(frozen=True, slots=True)
class _Strides:
    """Nested loops, outermost first: how often, and what is added to each of some indices."""

    first: list[int]
    rounds: list[tuple[int, list[int]]]


def strided(*indices: Array) -> _Strides | None:
    """The loops that count through these arrays of one length all at once, if there are any.

    A permutation of a large image as a table would take minutes to compile.
    """
    first = [int(index[0]) for index in indices]
    rounds: list[tuple[int, list[int]]] = []
    while (left := len(indices[0])) > 1:
        steps = [int(index[1]) - int(index[0]) for index in indices]
        regular = np.all([np.diff(i) == s for i, s in zip(indices, steps, strict=True)], axis=0)
        count = left if regular.all() else int(np.argmin(regular)) + 1
        if left % count or len(rounds) == MOST_LOOPS:
            return None
        grids = [index.reshape(-1, count) for index in indices]
        if any((np.diff(g) != s).any() for g, s in zip(grids, steps, strict=True)):
            return None
        rounds.insert(0, (count, steps))
        indices = tuple(grid[:, 0] for grid in grids)
    return _Strides(first, rounds)


def nested(loops: _Strides, statement: str) -> str:
    """The loops around a statement, in which `{0}`, `{1}` stand for the indices."""
    terms = [
        " + ".join([str(first), *(f"i{k} * {s[n]}" for k, (_, s) in enumerate(loops.rounds))])
        for n, first in enumerate(loops.first)
    ]
    text = statement.format(*terms)
    for k, (count, _) in reversed(list(enumerate(loops.rounds))):
        text = loop(f"i{k}", count, text)
    return text


def copied(loops: _Strides, source: str) -> str:
    """Loops that copy to the first index from the second one: bytes, or runs of them."""
    if loops.rounds and loops.rounds[-1][1] == [1, 1]:
        run = loops.rounds[-1][0]
        outer = _Strides(loops.first, loops.rounds[:-1])
        return nested(outer, f"memcpy(to + {{0}}, {source} + {{1}}, {run});")
    return nested(loops, f"to[{{0}}] = {source}[{{1}}];")


def concatenate(step: Concatenate) -> str:
    """Channels side by side."""
    lines, first = [], 0
    for i, source in enumerate(step.sources):
        name = "x" if len(step.sources) == 1 else f"x{i}"
        copy = (
            f"memcpy(to + y * {step.target.row} + x_ * {step.target.pixel} + {first}, "
            f"{name} + y * {source.row} + x_ * {source.pixel}, {source.channels});"
        )
        lines.append(copy)
        first += source.channels
    return loop("y", step.target.height, loop("x_", step.target.width, "\n".join(lines)))
