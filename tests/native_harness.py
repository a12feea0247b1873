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

    def run(self, codes: np.ndarray) -> np.ndarray:
        codes = np.ascontiguousarray(codes)
        spec = self.program.tensors[self.program.output]
        out = np.empty((len(codes), *spec.shape), spec.qparams.dtype)
        for i in range(0, len(codes), self.module.block):
            part = codes[i : i + self.module.block]
            to = out[i : i + self.module.block]
            self.module.run(part.ctypes.data, to.ctypes.data, len(part), self._arena.ctypes.data)
        return out

    def trace(self, sample: np.ndarray) -> dict[str, np.ndarray]:
        sample = np.ascontiguousarray(sample)
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


def first_difference(compiled: Compiled, codes: np.ndarray) -> str | None:
    """The first tensor, or batch size, at which kernels and reference part; None if nowhere."""
    expected: dict[str, list[np.ndarray]] = {}
    output = ReferenceEngine(compiled.program)(
        codes, lambda name, tensor: expected.setdefault(name, []).append(tensor)
    )
    for name, tensor in compiled.trace(codes[0]).items():
        if not np.array_equal(tensor, expected[name][0][0]):
            return name
    block = compiled.module.block
    for n in sorted({1, block - 1, block, block + 1, 3 * block} - {0}):
        repeated = np.resize(codes, (n, *codes.shape[1:]))
        if not np.array_equal(compiled.run(repeated), np.resize(output, (n, *output.shape[1:]))):
            return f"a batch of {n}"
    return None
