"""Modules of C that follow the ABI of compiled programs, and a cache of their own for tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from intact.arithmetic import QParams
from intact.engines.native import build
from intact.engines.native.cache import Cache, open_cache
from intact.engines.native.emit import MODULE
from intact.ops import Clamp
from intact.program import Program, QTensor

FRAME = (
    "#include <stdint.h>\n#include <string.h>\n#include <stdatomic.h>\n#include <time.h>\n"
    + MODULE
    + """
%(code)s
static void trace(const uint8_t *in, uint8_t *out, uint8_t *traced, void *arena)
{
    run(in, out, 1, arena);
    memcpy(traced, out, %(size)d);
}
__attribute__((visibility("default"))) const intact_module intact_program = {
    1, %(size)d, %(size)d, %(block)d, 64, %(size)d, init, run, trace, 0};
"""
)
COPY = """
static void init(void *arena) { (void)arena; }
static void run(const uint8_t *in, uint8_t *out, uint32_t n, void *arena)
{
    (void)arena;
    memcpy(out, in, (size_t)n * %d);
}
"""
# Every sample takes some time and answers with the number of the arena it was computed in, or with
# 255 if two threads used that arena at once. Numbers begin at 1: 0 is an arena without `init`.
WHERE = """
static atomic_uint arenas;
typedef struct { uint32_t number; atomic_flag busy; } memory;
static void init(void *arena)
{
    memory *m = arena;
    m->number = 1 + atomic_fetch_add(&arenas, 1);
    atomic_flag_clear(&m->busy);
}
static void run(const uint8_t *in, uint8_t *out, uint32_t n, void *arena)
{
    memory *m = arena;
    const int taken = atomic_flag_test_and_set(&m->busy);
    const struct timespec pause = {0, 1000000};
    (void)in;
    for (uint32_t i = 0; i < n; i++) {
        nanosleep(&pause, 0);
        memset(out + i * %(size)d, taken ? 255 : (int)m->number, %(size)d);
    }
    atomic_flag_clear(&m->busy);
}
"""


@contextmanager
def private_cache(folder: Path) -> Iterator[Cache]:
    """The user's cache is below `folder`, for this process and its children."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    try:
        yield open_cache()
    finally:
        if before is None:
            del os.environ["XDG_CACHE_HOME"]
        else:
            os.environ["XDG_CACHE_HOME"] = before


def the_compiler(cache: Cache) -> build.Compiler:
    compiler = build.find_compiler(cache)
    if compiler is None:
        pytest.skip("there is no C compiler here")
    return compiler


def tools(cache: Cache) -> SimpleNamespace:
    return SimpleNamespace(cache=cache, compiler=the_compiler(cache))


def module(kit: SimpleNamespace, code: str, size: int, block: int = 16) -> Path:
    """Compile a module with samples of `size` codes, in and out."""
    source = FRAME % {"code": code, "size": size, "block": block}
    flags = [*kit.compiler.flags("portable"), "-std=gnu11"]
    return build.library(kit.cache, kit.compiler, source, flags)


def copy_module(kit: SimpleNamespace, size: int) -> Path:
    """A module whose output is its input."""
    return module(kit, COPY % size, size)


def copy_program(given: QParams, size: int) -> Program:
    """A program that does the same: its grid is that of input and output."""
    tensors = {"x": QTensor((size,), given), "y": QTensor((size,), given)}
    return Program(("x",), ("y",), (Clamp("y", ("x",)),), tensors, {})


def codes_for(program: Program, n: int, seed: int = 0) -> np.ndarray:
    """A batch of random codes."""
    spec = program.tensors[program.input]
    rng = np.random.default_rng(seed)
    codes = rng.integers(spec.qparams.qmin, spec.qparams.qmax + 1, (n, *spec.shape))
    return codes.astype(spec.qparams.dtype)
