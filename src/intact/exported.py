"""Exported programs (`torch.export`, files `.pt2`) as modules that `capture` takes."""

from __future__ import annotations

import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Parameter, Signature
from os import PathLike
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from intact.errors import ModelError
from intact.ops import Shape

__all__ = ["ExportedModel", "read_exported"]

_TRAINING = {"batch_norm": "training", "dropout": "train", "feature_dropout": "train"}
"""ATen operation -> its argument that says whether it is in training mode."""

_DYNAMIC = "dynamic_shapes=({0: torch.export.Dim('batch')},)"
"""For one input; for several, as often as there are inputs."""


class ExportedModel(nn.Module):
    """A module that runs the graph of an exported program, each operation in its old place.

    What `ExportedProgram.module()` returns is one flat module that refuses `eval()`; captured, its
    layers would be called `conv2d_17`. Here the modules of the network are there again, as empty
    ones with their parameters, and every operation runs inside of the one that it was in, so that
    layers have the names that users know.

    input_shapes  of one sample of each input, float32

    Inputs keep the names that the exported program has for them: `forward` has them as parameters.

    A program that was exported in training mode or for one size of batch is a `ModelError` that
    says how to export it.
    """

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        self.input_shapes = _input_shapes(program)
        module = program.module(check_guards=False)
        _check_mode(module.graph)
        self._shared = _Shared(module.graph, program.call_spec.out_spec)
        self.forward = MethodType(_forward(self._shared.graph), self)
        for node in self._shared.graph.nodes:
            if node.op == "call_function":
                self._make_place(*_place(node))
        for node in self._shared.graph.nodes:
            if node.op == "get_attr":
                self._take(str(node.target), operator.attrgetter(node.target)(module))
        self.eval()

    def run(self, inputs: Sequence[torch.Tensor]) -> Any:
        """What the exported program computes."""
        values: dict[Node, Any] = {}
        given = iter(inputs)
        for node in self._shared.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "get_attr":
                values[node] = operator.attrgetter(node.target)(self)
            elif node.op == "call_function":
                args, kwargs = map_arg((node.args, node.kwargs), lambda n: values[n])
                path, _ = _place(node)
                call = _function(node.target)
                if path:
                    values[node] = self.get_submodule(path)(call, args, kwargs)
                else:
                    values[node] = call(*args, **kwargs)
        results = map_arg(self._shared.graph.output_node().args[0], lambda n: values[n])
        return pytree.tree_unflatten(results, self._shared.out_spec)  # type: ignore[arg-type]

    def _make_place(self, path: str, layer: bool) -> None:
        """The module at a path, and those that it is in."""
        parent: nn.Module = self
        names = path.split(".") if path else []
        for i, name in enumerate(names):
            if name not in parent._modules:
                parent.add_module(name, _Layer() if layer and i == len(names) - 1 else _Place())
            parent = parent.get_submodule(name)

    def _take(self, name: str, value: Any) -> None:
        """Keep a parameter, a buffer or a constant of the program where it was."""
        path, _, last = name.rpartition(".")
        self._make_place(path, layer=False)
        owner = self.get_submodule(path)
        if isinstance(value, nn.Parameter):
            owner.register_parameter(last, value)
        elif isinstance(value, torch.Tensor):
            owner.register_buffer(last, value)
        else:
            setattr(owner, last, value)


@dataclass(frozen=True, eq=False)
class _Shared:
    """What copies of a module share, as nothing changes it: its graph, and what it returns."""

    graph: Graph
    out_spec: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


def _forward(graph: Graph) -> Callable[..., Any]:
    """The `forward` of one exported model, which runs the graph.

    torch.export and `capture` read off its signature what inputs are called. That of a method of
    the class would be the same for all programs.
    """

    def forward(model: ExportedModel, *inputs: torch.Tensor) -> Any:
        return model.run(inputs)

    names = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
    parameters = [Parameter(name, Parameter.POSITIONAL_ONLY) for name in ("self", *names)]
    forward.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return forward


class _Place(nn.Module):
    """Where operations run: a module of the exported network."""

    def forward(
        self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        return call(*args, **kwargs)


class _Layer(_Place, nn.Identity):  # type: ignore[misc]  # two ways to be called
    """The place of a layer of `torch.nn`; by its base, `capture` sees that it is one."""


def read_exported(path: str | PathLike[str]) -> ExportedModel:
    """The exported program in a `.pt2` file, as `torch.export.save` writes it.

    torch may unpickle parts of such a file: take one only from people whose code you would run.
    """
    try:
        with _quiet():
            program = torch.export.load(path)
    except Exception as error:  # what torch raises on damaged files is not documented
        if not Path(path).is_file():
            raise ModelError(f"{path} does not exist, or is no file.") from error
        raise ModelError(
            f"{path} cannot be read as an exported program: {_first_line(error)} Write it with "
            "torch.export.save."
        ) from error
    try:
        return ExportedModel(program)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """What torch logs and warns of while it reads a damaged file says no more than its error."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _input_shapes(program: ExportedProgram) -> tuple[Shape, ...]:
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    shapes = []
    for name in program.graph_signature.user_inputs:
        if not isinstance(name, str):
            raise ModelError(
                f"it takes {name!r} beside tensors. Export a module that has it as an attribute."
            )
        shapes.append(_input_shape(nodes[name].meta["val"].shape))
    return tuple(shapes)


def _input_shape(shape: Sequence[Any]) -> Shape:
    if not len(shape) or isinstance(shape[0], int):
        raise ModelError(
            f"it takes only inputs of shape {list(shape)}, of this one size of batch. Export it "
            f"for any: torch.export.export(model.eval(), (example,), {_DYNAMIC}), with an example "
            "of two samples or more."
        )
    if not all(isinstance(size, int) for size in shape[1:]):
        raise ModelError(
            f"it takes samples of many shapes, {list(shape[1:])}. An integer program has one: "
            f"export it with no other axis dynamic than the first, {_DYNAMIC}."
        )
    return tuple(int(size) for size in shape[1:])


def _check_mode(graph: Graph) -> None:
    for node in graph.nodes:
        name = getattr(_function(node.target), "__name__", "")
        flag = _TRAINING.get(name)
        if flag is None:
            continue
        names = [argument.name for argument in node.target._schema.arguments]
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        if given.get(flag):
            raise ModelError(
                f"it was exported in training mode: its {name} is that of training. "
                "Call model.eval() before torch.export.export."
            )


def _place(node: Node) -> tuple[str, bool]:
    """The path of the module that a node runs in, and whether that is a layer of `torch.nn`."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if not stack:
        return "", False
    path, kind = stack[-1]
    name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    # A module that is called twice is `conv@1` the second time.
    return path.partition("@")[0], name.startswith("torch.nn.")


def _function(target: Any) -> Callable[..., Any]:
    """`add` for `add.Tensor`: names of layers come from the function that is called."""
    return target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target  # type: ignore[no-any-return]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".") + "."
