"""Exporters: a program as a file for other tools. One function each, called as its format.

    intact.export.onnx(program, "program.onnx")    # docs/onnx.md

The function hides the module of the same name, from which `from intact.export.onnx import model`
still imports.
"""

from __future__ import annotations

from intact.export.onnx import export as onnx

__all__ = ["onnx"]
