"""Integer-only quantization: a trained float network in, a program of exact integers out.

    program = intact.quantize(model, calibration_batches)   # nn.Module -> Program
    program.run(x)                                          # float32 in, float32 out
    program.codes(x)                                        # integer codes of the output
    program.save("program.safetensors")
    program = intact.load("program.safetensors")            # needs no torch
    certificate = intact.certify(program)                   # every engine here: the same bits?

Importing this package loads neither torch nor anything that draws.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from intact.capturing import capture
    from intact.certifying import certify
    from intact.errors import IntactError
    from intact.pipeline import quantize, stages
    from intact.program import Program
    from intact.recipe import Recipe
    from intact.storage import load

__version__ = "0.1.0"

__all__ = [
    "IntactError",
    "Program",
    "Recipe",
    "__version__",
    "capture",
    "certify",
    "load",
    "quantize",
    "stages",
]

_HOMES = {
    "IntactError": "errors",
    "Program": "program",
    "Recipe": "recipe",
    "capture": "capturing",
    "certify": "certifying",
    "load": "storage",
    "quantize": "pipeline",
    "stages": "pipeline",
}


def __getattr__(name: str) -> Any:
    if name == "export":  # a package, with one function per format
        return import_module("intact.export")
    if name not in _HOMES:
        raise AttributeError(f"module 'intact' has no attribute {name!r}")
    value = getattr(import_module(f"intact.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
