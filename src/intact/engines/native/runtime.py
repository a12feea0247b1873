"""The Python side of `runtime.c`: an extension module where Python's headers are, else ctypes."""

from __future__ import annotations

import atexit
import ctypes
import functools
import importlib.machinery
import importlib.util
import itertools
import math
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from intact.arithmetic import is_power_of_two
from intact.engines.native.build import NO_COMPILER, CompileError, Compiler, library, library_key
from intact.engines.native.cache import Cache, key_of
from intact.errors import EngineUnavailableError
from intact.program import PIXELS, Program, QTensor

__all__ = ["Loaded", "Runtime", "load_runtime", "pack", "source_text", "unpack"]

Array = npt.NDArray[Any]
MODULE = "intact_runtime"
ERROR_BYTES = 1024


class Loaded(Protocol):
    """A compiled program, ready to run.

    All three take a contiguous batch of at least one sample, float32 or input codes in their own
    dtype, and answer None for anything else, and for a batch that holds a NaN or a code outside of
    the input's range: then somebody else must find the right words.

    Several inputs are one here, packed, whose codes are the bytes of theirs; several outputs
    likewise. Then floats mean nothing, and nobody has checked the ranges.
    """

    @property
    def arena_bytes(self) -> int:
        """Working memory of one thread."""
        ...

    def codes(self, x: object, /) -> Array | None:
        """Output codes `[N, *output shape]`."""
        ...

    def run(self, x: object, /) -> npt.NDArray[np.float32] | None:
        """Float32 `[N, *output shape]`: the codes, dequantized."""
        ...

    def trace(self, x: object, /) -> tuple[Array, npt.NDArray[np.uint8]] | None:
        """Output codes, and the bytes of all traced tensors `[N, bytes of one sample]`."""
        ...


class Runtime(Protocol):
    """`runtime.c`, loaded."""

    def features(self) -> str:
        """What CPU and operating system offer: names of `cpu.ISAS`, separated by spaces."""
        ...

    def cpu(self) -> str:
        """What distinguishes this model of CPU from others."""
        ...

    def request_amx(self) -> int:
        """Ask the operating system for AMX; 0 if this process may use it."""
        ...

    def stop(self) -> None:
        """End the threads of the pool."""
        ...

    def load(self, path: Path, program: Program, threads: int) -> Loaded:
        """Load a compiled program. Raises OSError if its library cannot be loaded."""
        ...


@functools.cache
def source_text() -> str:
    """The text of `runtime.c`."""
    return Path(__file__).with_name("runtime.c").read_text("utf-8")


@functools.cache
def load_runtime(cache: Cache, compiler: Compiler | None, extension: bool = True) -> Runtime:
    """Compile `runtime.c`, or find it compiled, and load it, once per process.

    compiler   None: only one that was compiled earlier will do, whichever compiler made it
    extension  whether to make an extension module where that is possible
    """
    include = Path(sysconfig.get_path("include"))
    if extension and (include / "Python.h").exists():
        flags = ["-DINTACT_PYTHON", f"-I{include}"]
        if sys.platform == "darwin":
            flags.append("-Wl,-undefined,dynamic_lookup")
        try:
            return _Extension(_library(cache, compiler, flags))
        except CompileError:
            pass  # headers that do not fit; ctypes needs none
    return _Ctypes(_library(cache, compiler, []))


def _library(cache: Cache, compiler: Compiler | None, flags: list[str]) -> Path:
    """The library of `runtime.c`. The latest is remembered, for when there is no compiler."""
    python = sysconfig.get_config_var("SOABI") or sys.version
    latest = key_of("runtime", source_text(), flags, python, sys.platform)
    if compiler is None:
        fact = cache.fact(latest)
        found = cache.find(fact["library"]) if fact else None
        if found is None:
            raise EngineUnavailableError(NO_COMPILER)
        return found
    # One library for all CPUs of the architecture: what it needs of them it asks when it runs.
    flags = [*compiler.flags("portable"), "-std=gnu11", *flags]
    path = library(cache, compiler, source_text() + f"/* {python} */\n", flags)
    key = library_key(compiler, source_text() + f"/* {python} */\n", flags)
    if (cache.fact(latest) or {}).get("library") != key:
        cache.remember(latest, {"library": key})
    return path


# -- several inputs or outputs --------------------------------------------------------------------


def pack(arrays: Sequence[Array]) -> Array:
    """The codes of all inputs as the one that the runtime knows of.

    One array is itself. Of several, uint8 `[N, bytes of a sample]`: a sample's bytes of the first,
    then of the second, ...
    """
    if len(arrays) == 1:
        return np.ascontiguousarray(arrays[0])
    flat = [np.ascontiguousarray(array).reshape(len(array), -1) for array in arrays]
    return np.concatenate([array.view(np.uint8) for array in flat], axis=1)


def unpack(packed: Array, specs: Sequence[QTensor]) -> tuple[Array, ...]:
    """What `pack` has packed: an array for each tensor; of one, the array itself."""
    if len(specs) == 1:
        return (packed,)
    ends = itertools.accumulate(math.prod(spec.shape) for spec in specs)
    parts = np.split(packed, list(ends)[:-1], axis=1)
    return tuple(
        np.ascontiguousarray(part).view(spec.qparams.dtype).reshape(len(packed), *spec.shape)
        for part, spec in zip(parts, specs, strict=True)
    )


def _ends(program: Program) -> Iterator[QTensor]:
    """What the runtime takes for the input and the output of a program."""
    for names in (program.inputs, program.outputs):
        specs = [program.tensors[name] for name in names]
        size = sum(math.prod(spec.shape) for spec in specs)
        yield specs[0] if len(specs) == 1 else QTensor((size,), PIXELS)


def _grids(program: Program) -> tuple[Any, ...]:
    """The numbers that `intact_load` wants of the grids of input and output."""
    given, wanted = (spec.qparams for spec in _ends(program))
    scale = given.scale[0]
    # 1 / 2**k is exact, and multiplying by it rounds the same value as dividing by 2**k does.
    factor = 1 / scale if is_power_of_two(scale) else 0.0
    return (
        *(scale, factor, given.zero_point, given.qmin, given.qmax, given.signed),
        *(wanted.scale[0], wanted.zero_point, wanted.signed),
    )


class _Extension:
    """`runtime.c` as an extension module."""

    def __init__(self, path: Path) -> None:
        loader = importlib.machinery.ExtensionFileLoader(MODULE, str(path))
        spec = importlib.machinery.ModuleSpec(MODULE, loader, origin=str(path))
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        self._engine: Callable[..., Loaded] = module.Engine
        self.features: Callable[[], str] = module.features
        self.cpu: Callable[[], str] = module.cpu
        self.request_amx: Callable[[], int] = module.request_amx
        self.stop: Callable[[], None] = module.stop
        atexit.register(self.stop)

    def load(self, path: Path, program: Program, threads: int) -> Loaded:
        given, wanted = _ends(program)
        return self._engine(
            str(path),
            threads,
            *_grids(program),
            given.shape,
            wanted.shape,
            np.empty,
            wanted.qparams.dtype,
            np.dtype(np.uint8),
            np.dtype(np.float32),
        )


class _Module(ctypes.Structure):
    """`intact_module` of runtime.c, as far as Python reads it."""

    _fields_ = (
        ("abi", ctypes.c_uint32),
        ("input_bytes", ctypes.c_uint32),
        ("output_bytes", ctypes.c_uint32),
        ("block", ctypes.c_uint32),
        ("arena_bytes", ctypes.c_uint64),
        ("trace_bytes", ctypes.c_uint64),
    )


class _Ctypes:
    """`runtime.c` through ctypes."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        number, real, flag, pointer = ctypes.c_int32, ctypes.c_float, ctypes.c_bool, ctypes.c_void_p
        library.intact_features.restype = ctypes.c_char_p
        library.intact_cpu.restype = ctypes.c_char_p
        library.intact_load.restype = pointer
        library.intact_load.argtypes = (
            *(ctypes.c_char_p, ctypes.c_uint32),
            *(real, real, number, number, number, flag),
            *(real, number, flag),
            *(ctypes.c_char_p, ctypes.c_size_t),
        )
        library.intact_run.argtypes = (*[pointer] * 6, ctypes.c_size_t)
        library.intact_free.argtypes = (pointer,)
        library.intact_free.restype = None
        library.intact_stop.restype = None
        library.intact_module_of.argtypes = (pointer,)
        library.intact_module_of.restype = ctypes.POINTER(_Module)
        self._library = library
        atexit.register(self.stop)

    def features(self) -> str:
        return bytes(self._library.intact_features()).decode()

    def cpu(self) -> str:
        return bytes(self._library.intact_cpu()).decode()

    def request_amx(self) -> int:
        return int(self._library.intact_request_amx())

    def stop(self) -> None:
        self._library.intact_stop()

    def load(self, path: Path, program: Program, threads: int) -> Loaded:
        error = ctypes.create_string_buffer(ERROR_BYTES)
        engine = self._library.intact_load(
            str(path).encode(), threads, *_grids(program), error, ERROR_BYTES
        )
        if not engine:
            raise OSError(error.value.decode("utf-8", "replace"))
        return _CtypesLoaded(self._library, engine, program)


def _address(array: Array) -> int:
    """Where an array that is not empty begins. `array.ctypes` would take three times as long."""
    if array.flags.carray:  # contiguous and writeable
        return ctypes.addressof(ctypes.c_char.from_buffer(array.data))
    return int(array.ctypes.data)


class _CtypesLoaded:
    """A compiled program through ctypes."""

    def __init__(self, library: ctypes.CDLL, engine: int, program: Program) -> None:
        given, wanted = _ends(program)
        self._run, self._free, self._engine = library.intact_run, library.intact_free, engine
        module = library.intact_module_of(engine).contents
        self.arena_bytes = int(module.arena_bytes)
        self._trace_bytes = int(module.trace_bytes)
        self._input_shape, self._output_shape = given.shape, wanted.shape
        self._input_dtype, self._output_dtype = given.qparams.dtype, wanted.qparams.dtype
        self._float32 = np.dtype(np.float32)

    def __del__(self) -> None:
        self._free(self._engine)

    def codes(self, x: object, /) -> Array | None:
        return self._call(x, self._output_dtype, None)

    def run(self, x: object, /) -> npt.NDArray[np.float32] | None:
        return self._call(x, self._float32, None)

    def trace(self, x: object, /) -> tuple[Array, npt.NDArray[np.uint8]] | None:
        if not isinstance(x, np.ndarray):
            return None
        traced = np.empty((len(x), self._trace_bytes), np.uint8)
        result = self._call(x, self._output_dtype, _address(traced))
        return None if result is None else (result, traced)

    def _call(self, x: object, dtype: np.dtype[Any], traced: int | None) -> Array | None:
        if not isinstance(x, np.ndarray) or x.shape[1:] != self._input_shape or not len(x):
            return None
        real = x.dtype == self._float32
        if not (real or x.dtype == self._input_dtype) or not (
            x.flags.c_contiguous and x.flags.aligned
        ):
            return None
        n = len(x)
        result = np.empty((n, *self._output_shape), dtype)
        given, made = _address(x), _address(result)
        codes = dtype is not self._float32
        status = self._run(
            self._engine,
            *((None, given) if real else (given, None)),
            *((made, None) if codes else (None, made)),
            traced,
            n,
        )
        if status == 2:
            raise MemoryError
        return None if status else result
