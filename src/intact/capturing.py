"""`capture`: a trained float module becomes a `Network`.

`torch.export` yields a graph of ATen operations, in which in-place writes are already resolved.
Each is canonicalised to the op set of `intact.ops`:

| in the module | in the `Network` |
|---|---|
| `conv2d`, any stride, padding (numbers, "same", "valid"), dilation, groups | `Conv2d` |
| `linear` | `Linear` |
| batch norm whose input is read by nobody else and comes from `Conv2d` or `Linear` | folded there |
| any other batch norm | a depthwise 1x1 `Conv2d`, between two `Reshape` unless `[C, H, W]` |
| `relu`, `relu6`, `hardtanh`, `clamp`, `clip` after an op that accumulates or an `Add`, whose \
result nobody else reads | `low`, `high` of that op's `TensorSpec` |
| any other clamp | `Clamp`; a clamp of a clamp is one clamp |
| `max_pool2d` | `MaxPool2d`; ceil mode as more padding below and on the right |
| `avg_pool2d` that divides by the kernel's size | `AvgPool2d` |
| `adaptive_avg_pool2d` to 1x1, `mean((2, 3))` | `GlobalAvgPool`; `Reshape` without `keepdim` |
| adaptive pools to a size that divides the input's | `AvgPool2d`, `MaxPool2d` |
| `x + y`, `x += y` of equal shapes | `Add` |
| `cat` | `Concat` |
| `flatten`, `view`, `reshape`, `squeeze`, `unsqueeze` | `Reshape` |
| `permute`, `transpose` | `Permute` |
| dropout, `contiguous`, `clone`, `detach`, a reshape to the same shape, `x + 0` | nothing |
| whatever is computed from parameters alone (weight norm, ...) | its value |
| anything else | one `CaptureError` that lists every offender |

The network computes what the module computes in eval mode, bit for bit, with two exceptions that
are within float rounding: batch norm, and an adaptive average pool whose windows' area is no power
of two (torch divides by height, then by width; `AvgPool2d` divides once).
"""

from __future__ import annotations

import copy
import inspect
import io
import logging
import math
import operator
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.fx.node import map_arg
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from intact.errors import CaptureError
from intact.network import Network, TensorSpec
from intact.ops import (
    Add,
    AvgPool2d,
    Clamp,
    Concat,
    Conv2d,
    GlobalAvgPool,
    Linear,
    MaxPool2d,
    Op,
    Padding,
    Pair,
    Permute,
    Reshape,
    Shape,
    accumulates,
    weighted,
)

__all__ = ["capture"]

BATCH = 11
"""Samples in the exported batch: a prime that hardly occurs as a size, so that an axis of this
length is the batch. A single sample would not do, as `squeeze()` would remove its axis."""

SUPPORTED = (
    "conv2d, linear, batch norm, relu, relu6, hardtanh, clamp, max_pool2d, avg_pool2d, adaptive "
    "pools, mean((2, 3)), add, cat, flatten, view, reshape, squeeze, unsqueeze, permute, "
    "transpose, dropout"
)

_ACTIVATION = "Use ReLU, ReLU6 or a clamp."
_ARITHMETIC = (
    "A constant factor or offset belongs in the weights or bias of the layer before it; of two "
    "tensors, only sums are supported."
)
_NORM = "Use batch norm: its statistics are constants, so it folds into the layer before it."
_SLICE = "Compute the parts by layers of their own, and join them with cat."
_PRODUCT = "Use nn.Linear or nn.Conv2d, whose weights are constants."
_FAMILIES = {
    "celu elu gelu hardsigmoid hardswish leaky_relu mish prelu selu sigmoid silu softplus tanh "
    "threshold": _ACTIVATION,
    "div mul neg rsub sub true_divide": _ARITHMETIC,
    "group_norm instance_norm layer_norm rms_norm": _NORM,
    "chunk indexing narrow select slice split unbind": _SLICE,
    "addmm bmm einsum matmul mm": _PRODUCT,
}
_HINTS: Mapping[str, str] = {
    **{name: hint for names, hint in _FAMILIES.items() for name in names.split()},
    "argmax": "Leave it out, and take the argmax of the network's output.",
    "amax": "Use adaptive_max_pool2d(x, 1).",
    "batch_norm": "It normalises by the statistics of the batch at hand, so a result would depend "
    "on what else is in the batch. Train with track_running_stats=True.",
    "clamp": "Give its bounds as numbers.",
    "conv1d": "Use conv2d on samples of shape [C, 1, L].",
    "dropout": "It drops in eval mode too; pass training=self.training.",
    "mean": "Average over both spatial axes at once: mean((2, 3)).",
    "pad": "Give zero padding to the convolution or pool after it; there are no other modes.",
    "stack": "Use cat.",
    "sum": "Use mean((2, 3)); the constant factor belongs in the next layer's weights.",
}


def capture(module: nn.Module, example: torch.Tensor) -> Network:
    """The module as a `Network`: what it computes in eval mode, with its present parameters.

    module   takes one float32 batch and returns one tensor; both have the batch as first axis. It
             may be in training mode and on any device; it is not changed, a copy is captured
    example  float32 `[N, ...]` with N >= 1; only the shape of its first sample matters
    returns  a network on the CPU whose parameters are detached copies. An op is named after the
             module that holds it (`layer1.0.conv2`), or after the function and the enclosing module
             (`layer1.0.add`); repeated names get `_1`, `_2`. The input is `input`

    Raises `CaptureError` that lists every operation the op set does not cover, each with its layer,
    the user's source line and what to do.
    """
    if not isinstance(module, nn.Module):
        raise CaptureError(f"capture takes a torch.nn.Module, not {type(module).__name__}.")
    batch = _batch(example)
    _check_signature(module)
    _check_parameters(module)
    evaluated = _eval_copy(module)
    return _Builder(evaluated, _export(evaluated, batch)).build()


# -- checks before the export --------------------------------------------------------------------


def _batch(example: object) -> torch.Tensor:
    if not isinstance(example, torch.Tensor):
        raise CaptureError(f"the example must be a tensor, not a {type(example).__name__}.")
    if example.dtype != torch.float32:
        raise CaptureError(f"the example must be float32, not {example.dtype}.")
    if example.ndim < 2 or example.numel() == 0:
        raise CaptureError(
            "the example must be a batch [N, ...] of at least one sample, not of shape "
            f"{list(example.shape)}."
        )
    # Zeros, not the example: the values do not matter, and it may live on another device.
    return torch.zeros(BATCH, *example.shape[1:])


def _check_signature(module: nn.Module) -> None:
    parameters = inspect.signature(module.forward).parameters.values()
    needed = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if len(needed) > 1:
        raise CaptureError(
            f"{type(module).__name__}.forward takes {len(needed)} inputs ({', '.join(needed)}), "
            "but a network has exactly one. Wrap the module in one that fixes the others."
        )


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
    """A copy, so that neither training flags nor what a user's `eval()` does reach the original."""
    try:
        clone = copy.deepcopy(module)
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


def _export(module: nn.Module, batch: torch.Tensor) -> ExportedProgram:
    """Export statically; resolve in-place writes, but leave every high-level operation whole."""
    try:
        with _quiet():
            exported: ExportedProgram = torch.export.export(module, (batch,), strict=False)
            lowered: ExportedProgram = exported.run_decompositions({})
    except Exception as error:
        raise _export_error(module, batch, error) from error
    return lowered


def _export_error(module: nn.Module, batch: torch.Tensor, error: Exception) -> CaptureError:
    name = type(module).__name__
    try:
        # Does it run at all? Its own error is one that users have seen before.
        with _quiet(), torch.no_grad():
            module(batch)
    except Exception as own:  # noqa: BLE001
        return CaptureError(
            f"{name} fails on a batch of {BATCH} samples of the example's shape, "
            f"{list(batch.shape[1:])}:{_user_frame(own)}\n"
            f"  {type(own).__name__}: {_first_line(own)}"
        )
    if "data-dependent" in str(error):
        return CaptureError(
            f"the control flow of {name} depends on the values of tensors:{_user_frame(error)}\n"
            "  A network is one fixed sequence of operations. Take the decision out of forward."
        )
    return CaptureError(
        f"torch.export cannot capture {name}:{_user_frame(error)}\n"
        f"  {type(error).__name__}: {_first_line(error)}"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


_TORCH = Path(torch.__file__).parent


def _is_users(file: str) -> bool:
    return not (file.startswith("<") or file == __file__ or _TORCH in Path(file).parents)


def _user_frame(error: Exception) -> str:
    """The innermost line of the user's code in an error's traceback, to append to a message."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_users(f.filename)]
    if not frames:
        return ""
    return f"\n  {Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line}"


# -- from the graph to the network ---------------------------------------------------------------


class _UnsupportedError(Exception):
    """Why an operation has no place in a `Network`, and what to do."""


Converter = Callable[["_Builder", Node, dict[str, Any]], str]
_CONVERTERS: dict[Any, Converter] = {}


def _converts(*targets: Any) -> Callable[[Converter], Converter]:
    def register(converter: Converter) -> Converter:
        _CONVERTERS.update(dict.fromkeys(targets, converter))
        return converter

    return register


class _Builder:
    """Converts the nodes of an exported graph in order; collects refusals instead of stopping."""

    def __init__(self, module: nn.Module, program: ExportedProgram) -> None:
        self.module = module
        self.program = program
        self.paths = {path for path, _ in module.named_modules()}
        self.names: set[str] = set()
        self.input = self.unique("input")
        self.ops: dict[str, Op] = {}
        self.tensors: dict[str, TensorSpec] = {}
        self.parameters: dict[str, torch.Tensor] = {}
        self.sources: dict[str, str] = {}
        self.bound: dict[Node, str] = {}
        """The tensor that a node's value is."""
        self.shared: set[str] = set()
        """Tensors that several operations read, so that nothing may be fused into them."""
        self.constants: dict[Node, Any] = {}
        """Values that do not depend on the input: parameters, and what is computed from them."""
        self.refusals: dict[Node, str] = {}

    def build(self) -> Network:
        """Convert the whole graph, or raise one `CaptureError` with every refusal."""
        graph = self.program.graph
        result = self._output()
        # A module that overwrites its input returns that as well; it is no output of the network.
        graph.output_node().args = ((result,),)
        graph.eliminate_dead_code()
        self._bind_placeholders()
        for node in graph.nodes:
            if node.op == "call_function":
                self._convert(node)
        if self.refusals:
            raise self._error()
        if result in self.constants:
            raise CaptureError("the output does not depend on the input.")
        if not self.ops:
            raise CaptureError("the module returns its input: there is nothing to capture.")
        parameters = {k: v.detach().float().clone() for k, v in self.parameters.items()}
        for name, tensor in parameters.items():
            if not bool(torch.isfinite(tensor).all()):
                raise CaptureError(
                    f"{name} is NaN or infinite once batch norm is folded. Look for a negative "
                    "running_var, or one so small that its inverse overflows."
                )
        return Network(
            input=self.input,
            output=self.bound[result],
            ops=tuple(self.ops.values()),
            tensors=self.tensors,
            parameters=parameters,
            sources=self.sources,
        )

    def _output(self) -> Node:
        out_spec = self.program.call_spec.out_spec
        outputs = self.program.graph_signature.user_outputs
        results = [a for a in self.program.graph.output_node().args[0] if isinstance(a, Node)]
        named = [r for r in results if r.name == outputs[0]] if len(outputs) == 1 else []
        if not named or out_spec is None or not out_spec.is_leaf():
            given = "" if out_spec is None or out_spec.is_leaf() else out_spec.type.__name__
            raise CaptureError(
                f"{type(self.module).__name__} must return one tensor"
                + (f", not a {given} of {len(outputs)}" if given else "")
                + ". Wrap it in a module that returns the one you need."
            )
        return named[0]

    def _bind_placeholders(self) -> None:
        values = {**self.program.state_dict, **self.program.constants}
        nodes = {n.name: n for n in self.program.graph.nodes if n.op == "placeholder"}
        for spec in self.program.graph_signature.input_specs:
            node = nodes.get(spec.arg.name)
            if node is None:
                continue
            if spec.kind != InputKind.USER_INPUT:
                value = values.get(spec.target or "")
                self.constants[node] = value.detach() if isinstance(value, torch.Tensor) else value
            elif isinstance(node.meta.get("val"), torch.Tensor):
                self.tensors[self.input] = TensorSpec(tuple(node.meta["val"].shape[1:]))
                self.bind(node, self.input)

    def _convert(self, node: Node) -> None:
        sources = node.all_input_nodes
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            return
        if all(n in self.constants for n in sources) and _deterministic(node):
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: self.constants[n])
            self.constants[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            return
        if node.target is operator.getitem and sources[0] in self.refusals:
            self._stand_in(node)
            return
        try:
            if node.target is operator.getitem:
                if node.args[1] != 0:
                    raise _UnsupportedError("Only a pool's values can be used, not its indices.")
                self.bind(node, self.bound[sources[0]])
                return
            converter = _CONVERTERS.get(node.target)
            if converter is None:
                raise _UnsupportedError(_hint(node))
            if any(n not in self.bound and n not in self.constants for n in sources):
                self._stand_in(node)  # an operand was refused, which has been said
                return
            self.bind(node, converter(self, node, _arguments(node)))
        except _UnsupportedError as refusal:
            self.refusals[node] = str(refusal)
            self._stand_in(node)

    def _stand_in(self, node: Node) -> None:
        """Let what reads a refused result be checked too, as far as that result is a tensor."""
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == BATCH:
            name = self.unique(f"refused.{node.name}")
            self.tensors[name] = TensorSpec(tuple(value.shape[1:]))
            self.bind(node, name)

    def _error(self) -> CaptureError:
        count, name = len(self.refusals), type(self.module).__name__
        lines = [f"{count} operation{'s' * (count > 1)} of {name} cannot be captured:"]
        for i, (node, reason) in enumerate(self.refusals.items(), 1):
            path = self.path(node)
            source = _source(node)
            lines += ["", f"{i}. {_function(node)} in {path or name}"]
            lines += [f"   {source}"] if source else []
            lines += [f"   {reason}"]
        lines += ["", f"Supported: {SUPPORTED}."]
        return CaptureError("\n".join(lines))

    # -- what converters use ---------------------------------------------------------------------

    def bind(self, node: Node, name: str) -> None:
        """Say that the node's value is the tensor `name`."""
        self.bound[node] = name
        if len(node.users) > 1:
            self.shared.add(name)

    def tensor(self, value: Any, ndim: int | None = None) -> str:
        """The name of a tensor that depends on the input."""
        if value in self.constants or not isinstance(value, Node):
            what = "a tensor that is constant" if isinstance(value, Node) else f"{value}"
            raise _UnsupportedError(
                f"An operand is {what}, not computed from the input. {_ARITHMETIC}"
            )
        name = self.bound[value]
        if ndim is not None and len(self.tensors[name].shape) != ndim:
            raise _UnsupportedError(
                f"It takes batches of {ndim + 1} dimensions, [N, C, H, W], not "
                f"{list(value.meta['val'].shape)}."
            )
        return name

    def constant(self, value: Node) -> torch.Tensor:
        """A tensor that does not depend on the input."""
        if value not in self.constants:
            raise _UnsupportedError("Its weights depend on the input; they must be constants.")
        tensor: torch.Tensor = self.constants[value]
        return tensor

    def optional(self, value: Node | None) -> torch.Tensor | None:
        """A tensor that does not depend on the input, if there is one."""
        return None if value is None else self.constant(value)

    def emit(
        self,
        node: Node,
        op: Op,
        shape: Shape,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> str:
        """Add an op whose result has `shape`; returns its name."""
        self.ops[op.name] = op
        self.tensors[op.name] = TensorSpec(shape)
        if weight is not None:
            self.parameters[f"{op.name}.weight"] = weight
        if bias is not None:
            self.parameters[f"{op.name}.bias"] = bias
        if source := _source(node):
            self.sources[op.name] = source
        return op.name

    def path(self, node: Node) -> str:
        """The path of the innermost module that a node runs in; "" is the whole."""
        stack = list(node.meta.get("nn_module_stack", {}).values())
        return re.sub(r"@\d+", "", stack[-1][0]) if stack else ""

    def name(self, node: Node) -> str:
        """A new name for a node's op: its module's path, or that and the function's name."""
        path = self.path(node)
        if path and path in self.paths:
            layer = self.module.get_submodule(path)
            kinds = (k.__module__ for k in type(layer).__mro__ if k is not nn.Module)
            inner = {child for child, _ in layer.named_children()} - {"parametrizations"}
            if not inner and any(k.startswith("torch.nn.") for k in kinds):
                return self.unique(path, owned=True)
        function = _function(node)
        return self.unique(f"{path}.{function}" if path else function)

    def unique(self, base: str, *, owned: bool = False) -> str:
        """`base`, or `base_1`, `base_2`, …: a name that no tensor has, nor any module.

        owned  `base` is the path of the module that the name is for
        """
        name, count = base, 0
        while name in self.names or (name in self.paths and not (owned and name == base)):
            count += 1
            name = f"{base}_{count}"
        self.names.add(name)
        return name

    def shape(self, node: Node) -> Shape:
        """The shape of one sample of a node's value; refuses a value without the batch axis."""
        value = node.meta["val"]
        shape = tuple((value[0] if isinstance(value, tuple | list) else value).shape)
        if not shape or shape[0] != BATCH:
            raise _UnsupportedError(
                "Its result does not keep the batch as its first axis. Write x.flatten(1) or "
                "x.view(x.size(0), ...)."
            )
        return shape[1:]


def _deterministic(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ())


def _arguments(node: Node) -> dict[str, Any]:
    """The arguments of an ATen node by name, defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {**dict(zip((a.name for a in schema), node.args, strict=False)), **node.kwargs}
    return {a.name: given.get(a.name, a.default_value) for a in schema}


def _function(node: Node) -> str:
    """The function's name as users know it: `flatten`, though ATen calls it `view`."""
    name: str = node.meta.get("torch_fn", ("", ""))[1].rpartition(".")[2]
    if not any(hasattr(place, name) for place in (torch, torch.Tensor, nn.functional)):
        packet = getattr(node.target, "overloadpacket", node.target)
        name = getattr(packet, "__name__", str(packet))
    return "indexing" if name == "__getitem__" else name.strip("_")


def _hint(node: Node) -> str:
    name = _function(node)
    if name in ("softmax", "log_softmax") and all(u.op == "output" for u in node.users):
        return "Leave it out: argmax does not need it."
    return _HINTS.get(name, "The op set has no such operation.")


def _source(node: Node) -> str:
    """The user's line that a node stems from, as `model.py:42: x = self.conv1(x)`."""
    trace = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "(.+)", line (\d+), in .+\n(?: {4}(.+))?', trace)
    users = [f for f in frames if _is_users(f[0])]
    if not users:
        return ""
    file, line, code = users[-1]
    return f"{Path(file).name}:{line}: {code.strip()}"


# -- converters: one per kind of operation ---------------------------------------------------------

_aten = torch.ops.aten


def _pair(value: Sequence[int]) -> Pair:
    return (value[0], value[-1])


@_converts(_aten.conv2d.default, _aten.conv2d.padding)
def _conv2d(b: _Builder, node: Node, a: dict[str, Any]) -> str:
    x = b.tensor(a["input"], ndim=3)
    weight = b.constant(a["weight"])
    dilation = _pair(a["dilation"])
    if a["padding"] == "same":
        excess = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        # As torch does it: what is odd goes below and to the right.
        top, left = excess[0] // 2, excess[1] // 2
        padding = (top, excess[0] - top, left, excess[1] - left)
    elif a["padding"] == "valid":
        padding = (0, 0, 0, 0)
    else:
        top, left = _pair(a["padding"])
        padding = (top, top, left, left)
    op = Conv2d(b.name(node), (x,), _pair(a["stride"]), padding, dilation, a["groups"])
    return b.emit(node, op, b.shape(node), weight, b.optional(a["bias"]))


@_converts(_aten.linear.default)
def _linear(b: _Builder, node: Node, a: dict[str, Any]) -> str:
    x, weight = b.tensor(a["input"]), b.constant(a["weight"])
    if weight.ndim != 2:
        raise _UnsupportedError(
            f"Its weight has {weight.ndim} dimension, not 2: [outputs, inputs]."
        )
    op = Linear(b.name(node), (x,))
    return b.emit(node, op, b.shape(node), weight, b.optional(a["bias"]))


@_converts(_aten._native_batch_norm_legit_no_training.default)
def _batch_norm(b: _Builder, node: Node, a: dict[str, Any]) -> str:
    x = b.tensor(a["input"])
    mean, variance = b.constant(a["running_mean"]), b.constant(a["running_var"])
    # y = (x - mean) * factor + beta, all in float64; rounded once, when the network is built.
    factor = (variance.double() + a["eps"]).rsqrt()
    gamma, beta = b.optional(a["weight"]), b.optional(a["bias"])
    if gamma is not None:
        factor = factor * gamma.double()
    offset = -mean.double() * factor
    if beta is not None:
        offset = offset + beta.double()

    shape, op = b.tensors[x].shape, b.ops.get(x)
    channels_first = isinstance(op, Conv2d) or len(shape) == 1
    if op and weighted(op) and channels_first and x not in b.shared and not _clamped(b.tensors[x]):
        weight = b.parameters[f"{x}.weight"].double()
        bias = b.parameters.get(f"{x}.bias")
        b.parameters[f"{x}.weight"] = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
        b.parameters[f"{x}.bias"] = offset if bias is None else bias.double() * factor + offset
        return x
    name = b.name(node)
    if len(shape) != 3:
        image = (shape[0], math.prod(shape[1:]), 1)
        x = b.emit(node, Reshape(b.unique(f"{name}.reshape"), (x,), image), image)
    conv = Conv2d(name, (x,), groups=shape[0])
    x = b.emit(node, conv, b.tensors[x].shape, factor.reshape(-1, 1, 1, 1), offset)
    if len(shape) != 3:
        x = b.emit(node, Reshape(b.unique(f"{name}.reshape"), (x,), shape), shape)
    return x


def _clamped(spec: TensorSpec) -> bool:
    return spec.low != -math.inf or spec.high != math.inf


_BOUNDS: dict[Any, tuple[float, float]] = {
    _aten.relu.default: (0.0, math.inf),
    _aten.relu6.default: (0.0, 6.0),
}


@_converts(*_BOUNDS, _aten.hardtanh.default, _aten.clamp.default, _aten.clip.default)
@_converts(_aten.clamp_min.default, _aten.clamp_max.default)
def _clamp(b: _Builder, node: Node, a: dict[str, Any]) -> str:
    """Fused into the producer where that is possible.

    A clamp commutes with ops that only move values, so the producer may stand before a max pool:
    otherwise its grid would spend codes on values that nobody reads.
    """
    x = b.tensor(a["self"])
    low, high = _BOUNDS.get(node.target, (a.get("min"), a.get("max")))
    if low is None:
        low = a.get("min_val", -math.inf)
    if high is None:
        high = a.get("max_val", math.inf)
    source, op = x, b.ops.get(x)
    while isinstance(op, MaxPool2d | Reshape | Permute) and source not in b.shared:
        source = op.inputs[0]
        op = b.ops.get(source)
    fusible = op is not None and (accumulates(op) or isinstance(op, Add | Clamp))
    result = x
    if not fusible or source in b.shared:
        result = source = b.emit(node, Clamp(b.name(node), (x,)), b.shape(node))
    spec = b.tensors[source]
    # It may be a clamp of a clamp. Where low > high everything becomes high, as in torch.
    least, most = (float(min(max(bound, low), high)) for bound in (spec.low, spec.high))
    b.tensors[source] = replace(spec, low=least, high=most)
    return result


def _overhang(a: dict[str, Any], size: Shape, out: Shape, dilation: Pair) -> Padding:
    """Padding of a pool, with what ceil mode adds below and on the right."""
    kernel, padding = _pair(a["kernel_size"]), _pair(a["padding"])
    stride = _pair(a["stride"] or kernel)
    after = []
    for i in range(2):
        reach = dilation[i] * (kernel[i] - 1) + 1
        needed = (out[i] - 1) * stride[i] + reach - size[i] - padding[i]
        after.append(max(padding[i], needed))
    return (padding[0], after[0], padding[1], after[1])


@_converts(_aten.max_pool2d.default, _aten.max_pool2d_with_indices.default)
def _max_pool(b: _Builder, node: Node, a: dict[str, Any]) -> str:
    x = b.tensor(a.get("self", a.get("input")), ndim=3)
    shape, size = b.shape(node), b.tensors[x].shape[1:]
    kernel, dilation = _pair(a["kernel_size"]), _pair(a["dilation"])
    stride = _pair(a["stride"] or kernel)
    padding = _overhang(a, size, shape[1:], dilation)
    for i in range(2):
        for start in range(-padding[2 * i], shape[1 + i] * stride[i] - padding[2 * i], stride[i]):
            # A dilated window can step over the whole input.
            if not any(0 <= start + dilation[i] * j < size[i] for j in range(kernel[i])):
                raise _UnsupportedError(
                    "A window sees nothing but padding, so its maximum is -inf."
                )
    op = MaxPool2d(b.name(node), (x,), kernel, stride, padding, dilation)
    return b.emit(node, op, shape)


@_converts(_aten.avg_pool2d.default)
def _avg_pool(b: _Builder, node: Node, a: dict[str, Any]) -> str:
    x = b.tensor(a["self"], ndim=3)
    shape, kernel = b.shape(node), _pair(a["kernel_size"])
    padding = _overhang(a, b.tensors[x].shape[1:], shape[1:], (1, 1))
    if a["divisor_override"] not in (None, kernel[0] * kernel[1]):
        raise _UnsupportedError("It does not divide by the kernel's size. Drop divisor_override.")
    if any(padding) and not a["count_include_pad"]:
        raise _UnsupportedError("Its divisor changes at the border. Use count_include_pad=True.")
    if (padding[1], padding[3]) != (padding[0], padding[2]):
        raise _UnsupportedError("Its divisor changes where windows hang over. Use ceil_mode=False.")
    op = AvgPool2d(b.name(node), (x,), kernel, _pair(a["stride"] or kernel), padding)
    return b.emit(node, op, shape)


def _adaptive_windows(size: Shape, out: Shape) -> Pair:
    if size[0] % out[0] or size[1] % out[1]:
        raise _UnsupportedError(
            f"Its windows differ in size: {list(out)} does not divide {list(size)}. Choose an "
            "output size that divides the input's, or resize the images."
        )
    return (size[0] // out[0], size[1] // out[1])


@_converts(_aten.adaptive_avg_pool2d.default, _aten._adaptive_avg_pool2d.default)
def _adaptive_avg_pool(b: _Builder, node: Node, a: dict[str, Any]) -> str:
    x = b.tensor(a["self"], ndim=3)
    shape, size = b.shape(node), b.tensors[x].shape
    if shape == size:
        return x
    if shape[1:] == (1, 1):
        return b.emit(node, GlobalAvgPool(b.name(node), (x,)), shape)
    windows = _adaptive_windows(size[1:], shape[1:])
    return b.emit(node, AvgPool2d(b.name(node), (x,), windows, windows), shape)


@_converts(_aten.adaptive_max_pool2d.default)
def _adaptive_max_pool(b: _Builder, node: Node, a: dict[str, Any]) -> str:
    x = b.tensor(a["self"], ndim=3)
    shape, size = b.shape(node), b.tensors[x].shape
    if shape == size:
        return x
    windows = _adaptive_windows(size[1:], shape[1:])
    return b.emit(node, MaxPool2d(b.name(node), (x,), windows, windows), shape)


@_converts(_aten.mean.dim)
def _mean(b: _Builder, node: Node, a: dict[str, Any]) -> str:
    x = b.tensor(a["self"])
    size = b.tensors[x].shape
    axes = {d % (len(size) + 1) for d in a["dim"] or ()}
    if len(size) != 3 or axes != {2, 3}:
        raise _UnsupportedError(_HINTS["mean"])
    pooled = (size[0], 1, 1)
    name = b.emit(node, GlobalAvgPool(b.name(node), (x,)), pooled)
    if a["keepdim"]:
        return name
    shape = (size[0],)
    return b.emit(node, Reshape(b.unique(f"{name}.reshape"), (name,), shape), shape)


@_converts(_aten.add.Tensor)
def _add(b: _Builder, node: Node, a: dict[str, Any]) -> str:
    if a["other"] == 0:  # where sum([...]) starts
        return b.tensor(a["self"])
    left, right = b.tensor(a["self"]), b.tensor(a["other"])
    if a["alpha"] != 1:
        raise _UnsupportedError(f"It adds alpha = {a['alpha']} times a tensor. {_ARITHMETIC}")
    shapes = b.tensors[left].shape, b.tensors[right].shape
    if shapes[0] != shapes[1]:
        raise _UnsupportedError(
            f"It broadcasts: the operands are {list(shapes[0])} and {list(shapes[1])} per sample. "
            "Both must have one shape."
        )
    return b.emit(node, Add(b.name(node), (left, right)), b.shape(node))


@_converts(_aten.cat.default, _aten.concat.default, _aten.concatenate.default)
def _cat(b: _Builder, node: Node, a: dict[str, Any]) -> str:
    inputs = tuple(b.tensor(t) for t in a["tensors"])
    axis = a["dim"] % (len(b.tensors[inputs[0]].shape) + 1) - 1
    if axis < 0:
        raise _UnsupportedError(
            "It joins along the batch. Choose another axis; 1 is the channels'."
        )
    return b.emit(node, Concat(b.name(node), inputs, axis), b.shape(node))


@_converts(
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.reshape.default,
    _aten.flatten.using_ints,
    _aten.unflatten.int,
    _aten.squeeze.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.unsqueeze.default,
)
def _reshape(b: _Builder, node: Node, a: dict[str, Any]) -> str:
    x, shape = b.tensor(a["self"]), b.shape(node)
    if shape == b.tensors[x].shape:
        return x
    return b.emit(node, Reshape(b.name(node), (x,), shape), shape)


def _permute_axes(b: _Builder, node: Node, x: str, order: Sequence[int]) -> str:
    axes = [d % len(order) for d in order]
    if axes[0] != 0:
        raise _UnsupportedError("It moves the batch, which must stay the first axis.")
    if axes == sorted(axes):
        return x
    op = Permute(b.name(node), (x,), tuple(d - 1 for d in axes[1:]))
    return b.emit(node, op, b.shape(node))


@_converts(_aten.permute.default)
def _permute(b: _Builder, node: Node, a: dict[str, Any]) -> str:
    return _permute_axes(b, node, b.tensor(a["self"]), a["dims"])


@_converts(_aten.transpose.int)
def _transpose(b: _Builder, node: Node, a: dict[str, Any]) -> str:
    x = b.tensor(a["self"])
    order = list(range(len(b.tensors[x].shape) + 1))
    i, j = a["dim0"], a["dim1"]
    order[i], order[j] = order[j], order[i]
    return _permute_axes(b, node, x, order)


@_converts(_aten.clone.default, _aten.detach.default, _aten.alias.default, _aten._to_copy.default)
@_converts(_aten.contiguous.default, _aten.to.dtype, _aten.to.dtype_layout)
def _nothing(b: _Builder, node: Node, a: dict[str, Any]) -> str:
    if node.meta["val"].dtype != torch.float32:
        raise _UnsupportedError(f"It converts to {node.meta['val'].dtype}; float32 is needed.")
    return b.tensor(a["self"])
