"""Generated C, compiled quickly and called through ctypes: kernels without their engine."""

from __future__ import annotations

import ctypes
import math
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from intact.engines.native.build import Compiler, find_compiler
from intact.engines.native.cache import open_cache
from intact.engines.native.emit import generate
from intact.engines.reference import ReferenceEngine
from intact.program import Program
from intact.signature import Values, unwrapped


class Module(ctypes.Structure):
    """`intact_module`."""

    _fields_ = (
        ("abi", ctypes.c_uint32),
        ("input_bytes", ctypes.c_uint32),
        ("output_bytes", ctypes.c_uint32),
        ("block", ctypes.c_uint32),
        ("arena_bytes", ctypes.c_uint64),
        ("trace_bytes", ctypes.c_uint64),
        ("init", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
        (
            "run",
            ctypes.CFUNCTYPE(
                None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p
            ),
        ),
        (
            "trace",
            ctypes.CFUNCTYPE(
                None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p
            ),
        ),
        ("amx", ctypes.c_uint32),
    )


def compiler() -> Compiler:
    found = find_compiler(open_cache())
    if found is None:
        pytest.skip("there is no C compiler here")
    return found


class Compiled:
    """A program's kernels, compiled with little optimization."""

    def __init__(
        self,
        program: Program,
        isa: str,
        folder: Path,
        *,
        fuse: bool = True,
        change: Callable[[str], str] = lambda source: source,
        flags: Sequence[str] = (),
    ) -> None:
        self.program = program
        self.generated = generate(program, isa, fuse=fuse)
        tool = compiler()
        number = len(list(folder.iterdir()))
        source, library = folder / f"{number}.c", folder / f"{number}.so"
        source.write_text(change(self.generated.source))
        options = [
            *tool.flags(isa),
            "-O1",
            "-shared",
            "-fPIC",
            *flags,
            str(source),
            "-o",
            str(library),
        ]
        subprocess.run([*tool.command, *options], check=True)
        self._library = ctypes.CDLL(str(library))
        self.module = Module.in_dll(self._library, "intact_program")
        # Filled with a pattern: what a kernel reads without having written it would show.
        memory = np.full(self.module.arena_bytes + 64, 0xA5, np.uint8)
        start = -memory.ctypes.data % 64
        self._arena = memory[start : start + self.module.arena_bytes]
        self.module.init(self._arena.ctypes.data)

    def run(self, codes: Values) -> Values:
        codes = as_bytes(codes)
        out = np.empty((len(codes), self.module.output_bytes), np.uint8)
        for i in range(0, len(codes), self.module.block):
            part = codes[i : i + self.module.block]
            to = out[i : i + self.module.block]
            self.module.run(part.ctypes.data, to.ctypes.data, len(part), self._arena.ctypes.data)
        results, start = [], 0
        for name in self.program.outputs:
            spec = self.program.tensors[name]
            end = start + math.prod(spec.shape)
            values = np.ascontiguousarray(out[:, start:end]).view(spec.qparams.dtype)
            results.append(values.reshape(len(codes), *spec.shape))
            start = end
        return unwrapped(results)

    def trace(self, sample: Values) -> dict[str, np.ndarray]:
        """All traced tensors of a batch of one."""
        sample = as_bytes(sample)
        traced = np.empty(self.module.trace_bytes, np.uint8)
        out = np.empty(self.module.output_bytes, np.uint8)
        self.module.trace(
            sample.ctypes.data, out.ctypes.data, traced.ctypes.data, self._arena.ctypes.data
        )
        result, start = {}, 0
        for name in self.generated.traced:
            spec = self.program.tensors[name]
            size = math.prod(spec.shape)
            values = traced[start : start + size].view(spec.qparams.dtype)
            result[name] = values.reshape(spec.shape)
            start += size
        assert start == len(traced)
        return result


def as_bytes(codes: Values) -> np.ndarray:
    """Samples as kernels take them: the codes of all inputs, one behind the other."""
    arrays = codes if isinstance(codes, tuple) else (codes,)
    return np.concatenate(
        [np.frombuffer(a.tobytes(), np.uint8).reshape(len(a), -1) for a in arrays], axis=1
    )


def first_difference(compiled: Compiled, codes: Values) -> str | None:
    """The first tensor, or batch size, at which kernels and reference part; None if nowhere."""
    expected: dict[str, list[np.ndarray]] = {}
    output = ReferenceEngine(compiled.program)(
        codes, lambda name, tensor: expected.setdefault(name, []).append(tensor)
    )
    inputs = codes if isinstance(codes, tuple) else (codes,)
    outputs = output if isinstance(output, tuple) else (output,)
    for name, tensor in compiled.trace(unwrapped(array[:1] for array in inputs)).items():
        if not np.array_equal(tensor, expected[name][0][0]):
            return name
    block = compiled.module.block
    for n in sorted({1, block - 1, block, block + 1, 3 * block} - {0}):
        got = compiled.run(unwrapped(np.resize(array, (n, *array.shape[1:])) for array in inputs))
        for right, made in zip(outputs, got if isinstance(got, tuple) else (got,), strict=True):
            if not np.array_equal(made, np.resize(right, (n, *right.shape[1:]))):
                return f"a batch of {n}"
    return None
