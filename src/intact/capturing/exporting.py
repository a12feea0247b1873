"""Checks of a module, and its export to a graph of ATen operations by `torch.export`."""

from __future__ import annotations

import copy
import inspect
import io
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import torch
from torch import nn
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from intact.errors import CaptureError
from intact.signature import Values, in_order

__all__ = ["BATCH", "export", "is_users", "required_inputs"]

BATCH = 11
"""Samples in the exported batch: a prime that hardly occurs as a size, so that an axis of this
length is the batch. A single sample would not do, as `squeeze()` would remove its axis."""


def export(
    module: nn.Module, example: Values, whole: Callable[[object], bool]
) -> tuple[nn.Module, ExportedProgram]:
    """A copy of the module in eval mode, and its graph on a batch of `BATCH` samples.

    example  float32 `[N, ...]`; only the shape of its first sample matters. For several inputs a
             tuple or list of such tensors in the order of `forward`'s parameters, or a mapping from
             their names
    whole    whether an operation must stay as it is; others become simpler ones where torch knows
             how, as `glu` becomes a split, a sigmoid and a product

    Raises `CaptureError` for what is no module, no example, has parameters that cannot be, or
    cannot be exported.
    """
    _check_module(module)
    batches = tuple(_batch(part) for part in _positional(module, example))
    _check_signature(module, len(batches))
    _check_parameters(module)
    evaluated = _eval_copy(module)
    return evaluated, _export(evaluated, batches, whole)


def required_inputs(module: nn.Module) -> list[str]:
    """The parameters of `forward` that must be given; `CaptureError` for what is no module."""
    _check_module(module)
    parameters = inspect.signature(module.forward).parameters.values()
    return [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]


def _check_module(module: object) -> None:
    if not isinstance(module, nn.Module):
        raise CaptureError(f"capture takes a torch.nn.Module, not {type(module).__name__}.")


def _positional(module: nn.Module, example: Values) -> tuple[object, ...]:
    """The examples of all inputs, in the order of `forward`'s parameters."""
    if not isinstance(example, Mapping):
        return tuple(example) if isinstance(example, tuple | list) else (example,)
    names = list(inspect.signature(module.forward).parameters)[: len(example)]
    return in_order(example, names, "module", CaptureError)


def _batch(example: object) -> torch.Tensor:
    if not isinstance(example, torch.Tensor):
        raise CaptureError(
            "the example must be a tensor, or a tuple of tensors for several inputs, not a "
            f"{type(example).__name__}."
        )
    if example.dtype != torch.float32:
        raise CaptureError(f"the example must be float32, not {example.dtype}.")
    if example.ndim < 2 or example.numel() == 0:
        raise CaptureError(
            "the example must be a batch [N, ...] of at least one sample, not of shape "
            f"{list(example.shape)}."
        )
    # Zeros, not the example: the values do not matter, and it may live on another device.
    return torch.zeros(BATCH, *example.shape[1:])


def _check_signature(module: nn.Module, given: int) -> None:
    try:
        inspect.signature(module.forward).bind(*range(given))
    except TypeError as error:
        needed = required_inputs(module)
        raise CaptureError(
            f"{type(module).__name__}.forward takes {len(needed)} inputs ({', '.join(needed)}), "
            f"but the example has {given}. Give a tuple of tensors, one for each."
        ) from error


def _check_parameters(module: nn.Module) -> None:
    bad: dict[str, list[str]] = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            problem = "not initialised: run the module once first"
        elif tensor.is_meta:
            problem = "on the meta device, without values: load the weights first"
        elif tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype != torch.float32):
            problem = f"{tensor.dtype}, not float32: call .float() on the module"
        elif not bool(torch.isfinite(tensor).all()):
            problem = "NaN or infinite: the training diverged, or a file is damaged"
        else:
            continue
        bad.setdefault(problem, []).append(name)
    if bad:
        lines = [f"  {', '.join(names)}: {problem}." for problem, names in bad.items()]
        raise CaptureError("these parameters cannot be captured:\n" + "\n".join(lines))


def _eval_copy(module: nn.Module) -> nn.Module:
    """A copy, so that neither training flags nor what a user's `eval()` does reach the original.

    Parameters on the CPU are shared with it: nothing writes to them in eval mode, and a second copy
    of the weights is what a large network has no memory for.
    """
    shared: dict[int, object] = {id(p): p for p in module.parameters() if p.device.type == "cpu"}
    try:
        clone = copy.deepcopy(module, shared)
    except Exception as error:
        raise CaptureError(
            f"{type(module).__name__} cannot be copied ({_first_line(error)}); tensors that a "
            "module keeps as plain attributes must be parameters or buffers."
        ) from error
    return clone.cpu().eval()


# -- export --------------------------------------------------------------------------------------


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither warnings of torch's internals nor its dump of a failed graph reach the user."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _export(
    module: nn.Module, batches: tuple[torch.Tensor, ...], whole: Callable[[object], bool]
) -> ExportedProgram:
    """Export statically; resolve in-place writes, and decompose what need not stay whole."""
    try:
        with _quiet():
            exported: ExportedProgram = torch.export.export(module, batches, strict=False)
            lowered: ExportedProgram = exported.run_decompositions({})
            targets = {node.target for node in lowered.graph.nodes}
            if not all(whole(t) for t in targets if isinstance(t, OpOverload)):
                table = torch.export.default_decompositions()
                for operation in [operation for operation in table if whole(operation)]:
                    del table[operation]
                lowered = lowered.run_decompositions(table)
    except Exception as error:
        raise _export_error(module, batches, error) from error
    return lowered


def _export_error(
    module: nn.Module, batches: tuple[torch.Tensor, ...], error: Exception
) -> CaptureError:
    name = type(module).__name__
    try:
        # Does it run at all? Its own error is one that users have seen before.
        with _quiet(), torch.no_grad():
            module(*batches)
    except Exception as own:  # noqa: BLE001
        return CaptureError(
            f"{name} fails on a batch of {BATCH} samples of the example's shape, "
            f"{', '.join(str(list(batch.shape[1:])) for batch in batches)}:{_user_frame(own)}\n"
            f"  {type(own).__name__}: {_first_line(own)}"
        )
    if "data-dependent" in str(error):
        return CaptureError(
            f"the control flow of {name} depends on the values of tensors:{_user_frame(error)}\n"
            "  A network is one fixed sequence of operations. Take the decision out of forward."
        )
    return CaptureError(
        f"torch.export cannot capture {name}:{_user_frame(error)}\n"
        f"  {type(error).__name__}: {_first_line(error)}\n"
        "  Take what is no fixed sequence of tensor operations out of forward. All of the error: "
        "torch.export.export(module, (x,), strict=False)."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


_HERE = Path(__file__).parent
_OTHERS = (Path(torch.__file__).parent, _HERE)
_EXPORTED = _HERE.parent / "exported.py"
"""Runs the operations of an exported program, whose lines are elsewhere."""


def is_users(file: str) -> bool:
    """Whether a file of a traceback is the user's own, neither torch's nor one of this package."""
    path = Path(file)
    ours = path == _EXPORTED or any(folder in path.parents for folder in _OTHERS)
    return not file.startswith("<") and not ours


def _user_frame(error: Exception) -> str:
    """The innermost line of the user's code in an error's traceback, to append to a message."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_users(f.filename)]
    if not frames:
        return ""
    return f"\n  {Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line}"
