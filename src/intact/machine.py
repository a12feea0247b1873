"""What this machine is: the processor, what it can do, and the versions of what runs on it."""

from __future__ import annotations

import os
import platform
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from intact import __version__

__all__ = ["cpu_features", "cpu_name", "describe", "versions"]

PACKAGES = ("numpy", "torch", "onnx", "onnxruntime", "openvino")
"""That compute, or write what computes."""

_ARITHMETIC = re.compile(r"(sse|ssse|avx|amx|fma|f16c|asimd|sve|sme(?!p)|i8mm|bf16)\w*")
"""Features that decide which kernels run, as Linux spells them."""


@cache
def _cpuinfo() -> tuple[tuple[str, str], ...]:
    """The lines of Linux's description of its processors, in pairs; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return ()
    pairs = (line.partition(":") for line in lines)
    return tuple((name.strip(), value.strip()) for name, _, value in pairs)


def cpu_name() -> str:
    """The processor's name."""
    names = (value for name, value in _cpuinfo() if name == "model name")
    return next(names, platform.processor() or "unknown processor")


def cpu_features() -> tuple[str, ...]:
    """The processor's features that matter to arithmetic, sorted; empty where nobody tells."""
    flags = next((value for name, value in _cpuinfo() if name in ("flags", "Features")), "")
    return tuple(sorted(flag for flag in flags.split() if _ARITHMETIC.fullmatch(flag)))


def describe() -> dict[str, str]:
    """The machine, as text: processor, its features, cores, operating system."""
    return {
        "processor": cpu_name(),
        "features": " ".join(cpu_features()) or "unknown",
        "cores": str(os.cpu_count() or 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Python, intact, and the packages of `PACKAGES` that are installed."""
    found = {"intact": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
