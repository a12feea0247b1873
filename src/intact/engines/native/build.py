"""From C to a shared library: finding a compiler, its flags, and running it.

Tried in order: `$CC`, cc, gcc, clang, and the `ziglang` package, which pip installs. The first that
makes a library is taken.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from intact.engines.native.cache import Cache, key_of
from intact.engines.native.cpu import ISAS
from intact.errors import ProgramError

__all__ = [
    "NO_COMPILER",
    "CompileError",
    "Compiler",
    "compile_c",
    "find_compiler",
    "library",
    "library_key",
    "understands",
]

COMPILE_SECONDS = 900
"""A compiler that takes longer is ended: the largest programs need minutes."""
PROBE_SECONDS = 120
"""The first use of `zig cc` builds parts of its own library."""
ERROR_LINES = 12

NO_COMPILER = (
    "programs are compiled here, and there is no C compiler: none of $CC, cc, gcc, clang and zig "
    "works. `pip install 'intact[native]'` brings one."
)

SHARED = ("-shared", "-fPIC", "-fvisibility=hidden")
"""What makes a shared library of it."""

Kind = Literal["gcc", "clang", "zig"]

# What a compiler must manage to be taken: some are installed without the C library's headers.
_TRIAL = "#include <stdint.h>\n#include <string.h>\nint32_t trial(void) { return 0; }\n"


class CompileError(ProgramError):
    """A compiler failed; the message ends with its own last lines."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C compiler that works.

    command   what to run
    kind      how its flags are spelled
    identity  what distinguishes it from others: its path and its own words on its version
    """

    command: tuple[str, ...]
    kind: Kind
    identity: str

    @property
    def name(self) -> str:
        """A name for messages."""
        return "zig cc" if self.kind == "zig" else Path(self.command[0]).name

    def flags(self, isa: str) -> list[str]:
        """The flags of everything that is compiled for an instruction set.

        `-ffp-contract=off`: a fused multiply-add would round once where arithmetic.md rounds twice.
        `-fno-fast-math`: $CC may bring the contrary, which knows no NaN and switches subnormal
        numbers off for the whole process.
        `-fno-trapping-math`: nobody looks at the flags that floats raise. Else gcc 12 takes a clamp
        for a branch and vectorises no requantization but for AVX-512.
        """
        flags = ["-O3", "-std=c99" if isa == "portable" else "-std=gnu11"]
        # In this order: to clang, what undoes fast math also undoes what was said of contraction.
        flags += ["-fno-fast-math", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
        features = ISAS[isa].features
        if self.kind == "zig":  # without -mcpu it compiles for the CPU it runs on
            names = "".join(f"+{f.replace('-', '_')}" for f in features)
            flags.append(f"-mcpu=x86_64{names}" if features else "-mcpu=baseline")
        else:
            flags += [f"-m{f}" for f in features]
            if platform.machine() in ("x86_64", "AMD64"):
                flags.append("-mtune=native")  # an order of instructions, never a choice of them
        if "avx512f" in features:
            flags.append("-mprefer-vector-width=512")
        return flags


def find_compiler(cache: Cache) -> Compiler | None:
    """The first C compiler that works, or None."""
    for command in _commands():
        if compiler := _examine(command, cache):
            return compiler
    return None


def _commands() -> Iterator[tuple[str, ...]]:
    """Full commands of the compilers that are installed."""
    try:
        named = shlex.split(os.environ.get("CC", ""))
    except ValueError:  # a quotation without an end
        named = []
    for command in (named, ["cc"], ["gcc"], ["clang"]):
        if command and (path := shutil.which(command[0])):
            yield (path, *command[1:])
    spec = importlib.util.find_spec("ziglang")
    if spec and spec.origin and (path := shutil.which("zig", path=str(Path(spec.origin).parent))):
        yield (path, "cc")  # `python -m ziglang cc`, without starting a Python


def _examine(command: tuple[str, ...], cache: Cache) -> Compiler | None:
    """The compiler of a command, if it works: which is remembered until its executable changes."""
    try:
        real = Path(command[0]).resolve(strict=True)
        facts = real.stat()
    except OSError:
        return None
    key = key_of("compiler", command, real, facts.st_size, facts.st_mtime_ns)
    if fact := cache.fact(key):
        return Compiler(command, fact["kind"], fact["identity"])
    try:
        with cache.work_folder() as work:
            code, version = _run(cache, [*command, "--version"], work, PROBE_SECONDS)
            if code:
                return None
            kind: Kind = "clang" if "clang" in version else "gcc"
            if real.stem == "zig":
                kind = "zig"
            found = Compiler(command, kind, f"{shlex.join(command)}: {version.strip()}")
            trial = work / "trial.so"
            compile_c(
                cache, found, _TRIAL, [*found.flags("portable"), *SHARED], trial, PROBE_SECONDS
            )
    except (OSError, subprocess.TimeoutExpired, CompileError):
        return None
    cache.remember(key, {"kind": found.kind, "identity": found.identity})
    return found


def compile_c(
    cache: Cache,
    compiler: Compiler,
    source: str,
    flags: Sequence[str],
    output: Path,
    seconds: float = COMPILE_SECONDS,
) -> None:
    """Compile one file of C to `output`, in whose folder it also works.

    Raises `CompileError` with the compiler's last lines, also when it takes more than `seconds`.
    """
    folder = output.parent
    (folder / "source.c").write_text(source, "utf-8")
    command = [*compiler.command, *flags, "source.c", "-o", output.name]
    if sys.platform != "darwin":
        command += ["-pthread", "-ldl"]
    try:
        code, said = _run(cache, command, folder, seconds)
    except subprocess.TimeoutExpired as error:
        raise CompileError(f"{compiler.name} was ended after {seconds:.0f} s.") from error
    except OSError as error:
        raise CompileError(f"{compiler.name} cannot be run: {error.strerror}.") from error
    if code or not output.exists():
        lines = said.strip().splitlines()[-ERROR_LINES:]
        how = f"was ended by signal {-code}" if code < 0 else f"failed with status {code}"
        raise CompileError("\n".join([f"{compiler.name} {how}:", *lines]))


def _run(cache: Cache, command: Sequence[str], folder: Path, seconds: float) -> tuple[int, str]:
    """Run a command in a folder; its status and what it said. None of its children survives."""
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "TMPDIR": str(folder),
        "ZIG_LOCAL_CACHE_DIR": str(folder),
        "ZIG_GLOBAL_CACHE_DIR": str(cache.folder / "zig"),  # the user's may be read-only
    }
    with subprocess.Popen(  # noqa: S603 - a compiler of the user's
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a group of its own: a driver's children end with it
    ) as process:
        try:
            said, _ = process.communicate(timeout=seconds)
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, said.decode("utf-8", "replace")


def library_key(compiler: Compiler, source: str, flags: Sequence[str]) -> str:
    """The key in the cache of the library that `library` makes."""
    return key_of("library", source, *flags, compiler.identity, sys.platform, platform.machine())


def library(cache: Cache, compiler: Compiler, source: str, flags: Sequence[str]) -> Path:
    """The shared library of one file of C: from the cache, or compiled into it."""
    key = library_key(compiler, source, flags)
    return cache.library(
        key, lambda output: compile_c(cache, compiler, source, [*flags, *SHARED], output)
    )


def understands(cache: Cache, compiler: Compiler, isa: str) -> bool:
    """Whether the compiler has the instructions of an instruction set; a yes is remembered."""
    flags = [*compiler.flags(isa), *SHARED]
    key = key_of("understands", compiler.identity, isa, *flags)
    if isa == "portable" or cache.fact(key):
        return True
    source = f"#include <immintrin.h>\nvoid probe(void) {{ {ISAS[isa].probe} }}\n"
    try:
        with cache.work_folder() as work:
            compile_c(cache, compiler, source, flags, work / "probe.so", PROBE_SECONDS)
    except CompileError:
        return False
    cache.remember(key, {"isa": isa})
    return True
