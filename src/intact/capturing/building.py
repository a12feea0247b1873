"""From a graph of ATen operations to a `Network`, node by node; refusals are collected."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten

from intact.capturing.exporting import BATCH, is_users
from intact.errors import CaptureError
from intact.network import Network, TensorSpec
from intact.ops import (
    Add,
    Clamp,
    Concat,
    MaxPool2d,
    Op,
    Pad,
    Padding,
    Pair,
    Permute,
    Reshape,
    Shape,
    Slice,
    Subtract,
    Table,
    Upsample,
    has_own_grid,
    weighted,
)
from intact.pointwise import Pointwise, X
from intact.signature import listed

__all__ = [
    "Builder",
    "Function",
    "Parts",
    "Refusal",
    "UnsupportedError",
    "Value",
    "arguments",
    "converts",
    "function_name",
    "operation_name",
    "stays_whole",
]


class UnsupportedError(Exception):
    """Why an operation has no place in a `Network`, and what to do."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An operation that has no place in a `Network`.

    function  as users know it: "softmax"
    layer     path of the module that holds it, or the class of the whole
    source    the user's line, `model.py:42: x = ...`; "" where it is not known
    reason    why, and what to do
    """

    function: str
    layer: str
    source: str
    reason: str


@dataclass(frozen=True, slots=True)
class Function:
    """A value that is a function of one tensor, element by element, and not computed yet.

    So a chain of such functions becomes one `Table`.

    bounds  where the function is a clamp and nothing else
    """

    root: str
    function: Pointwise
    bounds: tuple[float, float] | None = None


Value: TypeAlias = "str | Function"
"""What a node's value is: a tensor, by its name, or a function of one."""
Parts: TypeAlias = Mapping[int, str]
"""Of a node with several results: the tensor of each one that is used."""

Converter = Callable[["Builder", Node, dict[str, Any]], "Value | Parts | torch.Tensor"]
"""Returns a tensor where the value turns out not to depend on the input."""
AnyConverter = TypeVar("AnyConverter", bound=Converter)
_CONVERTERS: dict[Any, Converter] = {}

# Functions that are constant outside of these bounds: what they read can be clamped to them, and
# its grid then spends no codes on what makes no difference.
_FLAT: Mapping[Any, tuple[float, float]] = {
    torch.ops.aten.hardswish.default: (-3.0, math.inf),
    torch.ops.aten.hardsigmoid.default: (-3.0, 3.0),
}


def converts(*targets: Any) -> Callable[[AnyConverter], AnyConverter]:
    """Register the converter of some ATen operations, or of all that have a `torch.Tag`."""

    def register(converter: AnyConverter) -> AnyConverter:
        _CONVERTERS.update(dict.fromkeys(targets, converter))
        return converter

    return register


def converter_of(target: Any) -> Converter | None:
    """What converts an operation: a converter of its own, or that of all that work element by
    element.
    """
    if target in _CONVERTERS:
        return _CONVERTERS[target]
    tags = getattr(target, "tags", ())
    if torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags:
        return _CONVERTERS[torch.Tag.pointwise]
    return None


def stays_whole(target: object) -> bool:
    """Whether a converter of its own takes an operation, so that it must not be decomposed."""
    return target in _CONVERTERS


class Builder:
    """Converts the nodes of an exported graph in order; collects refusals instead of stopping."""

    def __init__(
        self, module: nn.Module, program: ExportedProgram, hint: Callable[[Node], str]
    ) -> None:
        self.module = module
        self.program = program
        self.hint = hint
        self.paths = {path for path, _ in module.named_modules()}
        self.names: set[str] = set()
        self.inputs = self._input_names()
        self.ops: dict[str, Op] = {}
        self.tensors: dict[str, TensorSpec] = {}
        self.parameters: dict[str, torch.Tensor] = {}
        self.functions: dict[str, Pointwise] = {}
        self.sources: dict[str, str] = {}
        self.bound: dict[Node, Value] = {}
        """What a node's value is."""
        self.parts: dict[Node, Parts] = {}
        """The results of a node that has several."""
        self.shared: set[str] = set()
        """Tensors that several operations read, so that nothing may be fused into them."""
        self.constants: dict[Node, Any] = {}
        """Values that do not depend on the input: parameters, and what is computed from them."""
        self.layers: dict[str, tuple[str, int]] = {}
        """Tensors that are another view of a layer's result, with the same channels: the layer,
        and how many of its output channels make one channel."""
        self.refused: dict[Node, str] = {}

    # -- the whole ---------------------------------------------------------------------------------

    def build(self) -> tuple[Network | None, tuple[Refusal, ...]]:
        """Convert the whole graph: a network, or every refusal."""
        graph = self.program.graph
        results = self._results()
        # A module that overwrites its input returns that as well; it is no output of the network.
        graph.output_node().args = (tuple(results.values()),)
        graph.eliminate_dead_code()
        self._bind_placeholders()
        for node in graph.nodes:
            if node.op == "call_function":
                self._convert(node)
        for place, result in results.items():
            if result in self.constants:
                raise CaptureError(f"the output{_at(place)} does not depend on the input.")
        made = {p: self.tensor(node) for p, node in results.items() if node in self.bound}
        for name, op in self.ops.items():
            self._check(name, op)
        if self.refused:
            found: dict[tuple[str, str, str], Refusal] = {}
            for refusal in map(self._refusal, self.refused):
                # Of a function that is several operations, the first refusal says it.
                key = (refusal.function, refusal.layer, refusal.source)
                found.setdefault(key, refusal)
            return None, tuple(found.values())
        for place, result in results.items():
            if result.meta["val"].dtype != torch.float32:
                raise CaptureError(
                    f"{type(self.module).__name__} returns {result.meta['val'].dtype}{_at(place)}; "
                    "return float32."
                )
        if not self.ops:
            raise CaptureError("the module returns its input: there is nothing to capture.")
        outputs = self._distinct(made.values())
        self._prune(outputs)
        parameters = {}
        for name in tuple(self.parameters):  # one by one, as what was folded is in float64
            tensor = self.parameters.pop(name).detach()
            parameters[name] = tensor.to(torch.float32, copy=True)
        for name, tensor in parameters.items():
            if not bool(torch.isfinite(tensor).all()):
                raise CaptureError(
                    f"{name} is NaN or infinite once batch norm and constants are folded. Look for "
                    "a negative running_var, or one so small that its inverse overflows."
                )
        network = Network(
            inputs=tuple(self.inputs.values()),
            outputs=outputs,
            ops=tuple(self.ops.values()),
            tensors=self.tensors,
            parameters=parameters,
            sources=self.sources,
            functions=self.functions,
            returned=dict(zip(outputs, made, strict=True)) if len(outputs) > 1 else {},
        )
        return network, ()

    def _distinct(self, tensors: Iterable[str]) -> tuple[str, ...]:
        """The outputs, each the result of an op and each another tensor.

        A module may return its input, or one tensor twice. Each further time it is a `Reshape` to
        the shape that it has, which no engine computes anything for.
        """
        outputs: list[str] = []
        for tensor in tensors:
            name = tensor
            if tensor in outputs or tensor not in self.ops:
                name = self.unique("output")
                self.tensors[name] = TensorSpec(self.tensors[tensor].shape)
                self.ops[name] = Reshape(name, (tensor,), self.tensors[tensor].shape)
            outputs.append(name)
        return tuple(outputs)

    def _prune(self, outputs: Iterable[str]) -> None:
        """Leave out what no output depends on: views that others have looked behind."""
        needed = set(outputs)
        for name, op in reversed(self.ops.items()):
            if name in needed:
                needed.update(op.inputs)
        for name in [name for name in self.ops if name not in needed]:
            self.drop(name)
            self.functions.pop(name, None)
            for kind in ("weight", "bias"):
                self.parameters.pop(f"{name}.{kind}", None)
        if unused := [name for name in self.inputs.values() if name not in needed]:
            raise CaptureError(
                f"what {type(self.module).__name__} returns does not depend on its input "
                f"{listed(unused)}. Leave it out of the example, or wrap the module in one that "
                "does not take it."
            )

    def _check(self, name: str, op: Op) -> None:
        """Refuse what was left for a reader to absorb, and no reader did."""
        if getattr(op, "value", 0.0) in (math.inf, -math.inf):
            node = next(n for n, value in self.bound.items() if value == name)
            self.refused[node] = (
                "It pads with an infinity, which no code stands for. Only a max pool right after "
                "it can take that over; else pad with a finite number."
            )

    def _input_names(self) -> dict[str, str]:
        """Placeholder of the graph -> name of the input: `input`, or those of the parameters.

        Where there are several, callers give them by these names, so that a layer of the same name
        gives way.
        """
        given = self.program.graph_signature.user_inputs
        names = [name for name in given if isinstance(name, str)]
        if len(names) == 1:
            return {names[0]: self.unique("input")}
        return {name: self.unique(name, owned=True) for name in names}

    def _results(self) -> dict[str, Node]:
        """The tensors that the module returns: place in its result, as `['boxes'][0]`, -> node.

        In the order of `torch.utils._pytree`: through tuples, lists and dictionaries as they stand.
        None is left out.
        """
        out_spec = self.program.call_spec.out_spec
        values = self.program.graph_signature.user_outputs
        nodes = {a.name: a for a in self.program.graph.output_node().args[0] if isinstance(a, Node)}
        places = [""] * len(values)
        if out_spec is not None:
            tree = tree_unflatten(range(out_spec.num_leaves), out_spec)
            places = [keystr(path) for path, _ in tree_flatten_with_path(tree)[0]]
        results: dict[str, Node] = {}
        for place, value in zip(places, values, strict=True):
            if value is None:
                continue
            if not isinstance(value, str) or value not in nodes:
                raise CaptureError(
                    f"{type(self.module).__name__} returns {value!r}{_at(place)}, which is no "
                    "tensor. Wrap it in a module that returns tensors only."
                )
            results[place] = nodes[value]
        if not results:
            raise CaptureError(f"{type(self.module).__name__} returns no tensor.")
        return results

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
                name = self.inputs[node.name]
                self.tensors[name] = TensorSpec(tuple(node.meta["val"].shape[1:]))
                self.bind(node, name)

    def _convert(self, node: Node) -> None:
        sources = node.all_input_nodes
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            return
        if all(n in self.constants for n in sources) and _deterministic(node):
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: self.constants[n])
            self.constants[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            return
        try:
            if node.target is operator.getitem:
                known = sources[0] in self.parts or sources[0] in self.bound
                if sources[0] in self.refused or not known:
                    self._stand_in(node)
                    return
                self.bind(node, self._item(sources[0], node.args[1]))
                return
            converter = converter_of(node.target)
            if converter is None:
                raise UnsupportedError(self.hint(node))
            if any(n not in self.bound and n not in self.constants for n in sources):
                self._stand_in(node)  # an operand was refused, which has been said
                return
            value = converter(self, node, arguments(node))
            if isinstance(value, torch.Tensor):
                self.constants[node] = value
            elif isinstance(value, Mapping):
                self.parts[node] = value
            else:
                self.bind(node, value)
        except UnsupportedError as refusal:
            self.refused[node] = str(refusal)
            self._stand_in(node)

    def _item(self, node: Node, index: Any) -> Value:
        if node in self.parts:
            return self.parts[node][index]
        if index != 0:
            raise UnsupportedError(
                "Only the values of a maximum can be used, not where they are. To undo a pool, "
                "resize with nn.functional.interpolate, and train again."
            )
        return self.bound[node]

    def _stand_in(self, node: Node) -> None:
        """Let what reads a refused result be checked too, as far as that result is a tensor."""
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == BATCH:
            name = self.unique(f"refused.{node.name}")
            self.tensors[name] = TensorSpec(tuple(value.shape[1:]))
            self.bind(node, name)

    def _refusal(self, node: Node) -> Refusal:
        layer = self.path(node) or type(self.module).__name__
        return Refusal(function_name(node), layer, _source(node), self.refused[node])

    # -- what converters use ---------------------------------------------------------------------

    def bind(self, node: Node, value: Value) -> None:
        """Say what the node's value is."""
        self.bound[node] = value
        if isinstance(value, str) and len(node.users) > 1:
            self.shared.add(value)

    def tensor(self, value: Any, ndim: int | None = None) -> str:
        """The name of a tensor that depends on the input, computed now if need be."""
        if value in self.constants or not isinstance(value, Node):
            what = "a tensor that is constant" if isinstance(value, Node) else f"{value}"
            raise UnsupportedError(
                f"An operand is {what}, not computed from the input. Put it into the weights or "
                "the bias of the layer before it."
            )
        bound = self.bound[value]
        name = self._compute(value, bound) if isinstance(bound, Function) else bound
        if name != bound:
            self.bind(value, name)
        if ndim is not None and len(self.tensors[name].shape) != ndim:
            raise UnsupportedError(
                f"It takes batches of {ndim + 1} dimensions, "
                f"{'[N, C, H, W]' if ndim == 3 else '[N, C, L]'}, not "
                f"{list(value.meta['val'].shape)}."
            )
        return name

    def expression(self, node: Node) -> tuple[str, Pointwise]:
        """The tensor that a value is a function of, and the function; `X` for the tensor itself."""
        bound = self.bound[node]
        return (bound, X) if isinstance(bound, str) else (bound.root, bound.function)

    def _compute(self, node: Node, value: Function) -> str:
        """Add the op that computes a function; returns its name."""
        shape = self.tensors[value.root].shape
        if value.bounds is not None:
            name = self.emit(node, Clamp(self.name(node), (value.root,)), shape)
            self.tensors[name] = TensorSpec(shape, *value.bounds)
            return name
        target, first = value.function.target, value.function.arguments[0]
        bounds = _FLAT.get(target)
        if bounds and isinstance(first, Pointwise) and first.target is None:
            self.clamp(value.root, *bounds)
        name = self.emit(node, Table(self.name(node), (value.root,)), shape)
        self.functions[name] = value.function
        return name

    def clamp(self, tensor: str, low: float, high: float) -> bool:
        """Fuse a clamp into the op that computes a tensor; False where that is not possible.

        A clamp commutes with ops that only move values, so it may go to the producer before a max
        pool: otherwise the producer's grid would spend codes on values that nobody reads.
        """
        source, op = tensor, self.ops.get(tensor)
        while isinstance(op, MaxPool2d | Reshape | Permute | Slice | Upsample):
            if source in self.shared:
                return False
            source = op.inputs[0]
            op = self.ops.get(source)
        if op is None or source in self.shared:
            return False
        if not (has_own_grid(op) or isinstance(op, Add | Subtract | Clamp)):
            return False
        spec = self.tensors[source]
        # It may be a clamp of a clamp. Where low > high everything becomes high, as in torch.
        least, most = (float(min(max(bound, low), high)) for bound in (spec.low, spec.high))
        self.tensors[source] = replace(spec, low=least, high=most)
        return True

    def absorb_padding(
        self, x: str, padding: Padding, value: float, most: Pair | None = None
    ) -> tuple[str, Padding]:
        """What stands before a `Pad` that the reader of its result can do itself, and the padding.

        value  what the reader pads with: 0, or -inf for a maximum, which never takes it. A constant
               that nothing in the tensor is below changes no maximum either
        most   the reader's padding must be smaller than this; None: any
        """
        op = self.ops.get(x)
        if not isinstance(op, Pad) or x in self.shared or any(op.padding[:2]):
            return x, padding
        ignored = value == -math.inf and op.value <= self.least(op.inputs[0])
        if op.value != value and not ignored:
            return x, padding
        top, bottom, left, right = (p + q for p, q in zip(padding, op.padding[2:], strict=True))
        if most is not None and (max(top, bottom) >= most[0] or max(left, right) >= most[1]):
            return x, padding
        return self.drop(x), (top, bottom, left, right)

    def least(self, tensor: str) -> float:
        """A bound that no value of a tensor is below; -inf where none is known."""
        op, low = self.ops.get(tensor), self.tensors[tensor].low
        if isinstance(op, MaxPool2d | Reshape | Permute | Slice | Upsample | Concat):
            return max(low, min(self.least(source) for source in op.inputs))
        return low

    def layer(self, tensor: str) -> tuple[str, int] | None:
        """The convolution or linear layer whose result a tensor is, if something may be folded
        into its weights; and how many of its output channels make one channel of the tensor.
        """
        name, parts = self.layers.get(tensor, (tensor, 1))
        op = self.ops.get(name)
        if op is None or not weighted(op) or {name, tensor} & self.shared:
            return None
        spec = self.tensors[name]
        clamped = spec.low != -math.inf or spec.high != math.inf
        return None if clamped else (name, parts)

    def constant(self, value: Node) -> torch.Tensor:
        """A tensor that does not depend on the input."""
        if value not in self.constants:
            raise UnsupportedError(
                "Its weights depend on the input; they must be constants. Use a layer with weights "
                "of its own, and train again."
            )
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

    def table(self, node: Node, name: str, source: str, function: Pointwise) -> str:
        """Add a function of a tensor, one of several ops of a node: `<layer>.<name>`."""
        op = Table(self.unique(f"{self.base(node)}.{name}"), (source,))
        self.functions[op.name] = function
        return self.emit(node, op, self.tensors[source].shape)

    def drop(self, name: str) -> str:
        """Take back an op that one reader absorbs; returns what the op read."""
        op = self.ops.pop(name)
        del self.tensors[name]
        self.sources.pop(name, None)
        return op.inputs[0]

    def behind(self, tensor: str) -> str:
        """What an op that only moves values reads; the op is taken back if nobody else needs it."""
        if tensor in self.shared or any(tensor in op.inputs for op in self.ops.values()):
            source = self.ops[tensor].inputs[0]
            self.shared.add(source)  # by the op, and by whoever reads it instead of the op
            return source
        return self.drop(tensor)

    def reshape(self, node: Node, name: str, x: str, shape: Shape) -> str:
        """`x` under another shape: a `Reshape` unless it has that already, and no two in a row."""
        while isinstance(self.ops.get(x), Reshape) and shape != self.tensors[x].shape:
            x = self.behind(x)
        if shape == self.tensors[x].shape:
            return x
        name = self.unique(name, owned=name == self.path(node))
        return self.emit(node, Reshape(name, (x,), shape), shape)

    def permute(self, node: Node, name: str, x: str, axes: Sequence[int]) -> str:
        """`x` with its axes in another order: a `Permute`, and no two in a row."""
        op = self.ops.get(x)
        if isinstance(op, Permute):
            axes = [op.axes[a] for a in axes]
            x = self.behind(x)
        if list(axes) == sorted(axes):
            return x
        shape = tuple(self.tensors[x].shape[a] for a in axes)
        name = self.unique(name, owned=name == self.path(node))
        return self.emit(node, Permute(name, (x,), tuple(axes)), shape)

    # -- names and shapes --------------------------------------------------------------------------

    def path(self, node: Node) -> str:
        """The path of the innermost module that a node runs in; "" is the whole."""
        stack = list(node.meta.get("nn_module_stack", {}).values())
        return re.sub(r"@\d+", "", stack[-1][0]) if stack else ""

    def base(self, node: Node) -> str:
        """The name that users know, not yet made unique: of the layer, or of the function in it."""
        path = self.path(node)
        if path and path in self.paths:
            layer = self.module.get_submodule(path)
            kinds = (k.__module__ for k in type(layer).__mro__ if k is not nn.Module)
            inner = {child for child, _ in layer.named_children()} - {"parametrizations"}
            if not inner and any(k.startswith("torch.nn.") for k in kinds):
                return path
        function = function_name(node)
        return f"{path}.{function}" if path else function

    def name(self, node: Node) -> str:
        """A unique name for an op: the layer's path, or that and the function's name."""
        base = self.base(node)
        return self.unique(base, owned=base == self.path(node))

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
        return self.sample(value[0] if isinstance(value, tuple | list) else value)

    def sample(self, value: torch.Tensor) -> Shape:
        """The shape of one sample of a batch; refuses a value without the batch axis.

        A bare number per sample is a vector of length 1: a tensor of a program has an axis.
        """
        shape = tuple(value.shape)
        if not shape or shape[0] != BATCH:
            raise UnsupportedError(
                "Its result does not keep the batch as its first axis. Write x.flatten(1) or "
                "x.view(x.size(0), ...)."
            )
        return shape[1:] or (1,)


def _at(place: str) -> str:
    """A place in a module's result for a message; nothing where the result is one tensor."""
    return f" at {place}" if place else ""


def _deterministic(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ())


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of an ATen node by name, defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {**dict(zip((a.name for a in schema), node.args, strict=False)), **node.kwargs}
    return {a.name: given.get(a.name, a.default_value) for a in schema}


def operation_name(target: object) -> str:
    """The name of an ATen operation without its overload: `add` of `aten.add.Tensor`."""
    packet = getattr(target, "overloadpacket", target)
    return str(getattr(packet, "__name__", packet))


def function_name(node: Node) -> str:
    """The function's name as users know it: `flatten`, though ATen calls it `view`."""
    name: str = node.meta.get("torch_fn", ("", ""))[1].rpartition(".")[2]
    if not any(hasattr(place, name) for place in (torch, torch.Tensor, nn.functional)):
        name = operation_name(node.target)
    return "indexing" if name == "__getitem__" else name.strip("_")


def _source(node: Node) -> str:
    """The user's line that a node stems from, as `model.py:42: x = self.conv1(x)`."""
    trace = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "(.+)", line (\d+), in .+\n(?: {4}(.+))?', trace)
    users = [f for f in frames if is_users(f[0])]
    if not users:
        return ""
    file, line, code = users[-1]
    return f"{Path(file).name}:{line}: {code.strip()}"
