"""A user's own network, from what a command line can say: code, an exported program, a name."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from intact.errors import ModelError, ModelWarning
from intact.exported import ExportedModel, read_exported
from intact.ops import Shape
from intact.zoo import NETWORKS, load_network, read_network

__all__ = ["input_shape", "input_shapes", "load_model", "title"]

WEIGHTS = (".safetensors", ".pt", ".pth")
STATE_KEYS = ("state_dict", "model_state_dict", "model")
"""Under these, checkpoints keep the state dict beside optimisers and epochs."""
PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before all names of a state dict."""


def load_model(
    spec: str, weights: str | PathLike[str] | None = None, *, trained: bool = True
) -> nn.Module:
    """A trained network, in eval mode.

    spec     `FILE.py:NAME` or `package.module:NAME`, where `NAME` is a function or class that needs
             no arguments, or a module; `FILE.pt2`, see `ExportedModel`; or a network of the zoo
    weights  a safetensors file, or what `torch.save` wrote of a state dict, `.pt` or `.pth`; never
             unpickled beyond tensors. None: the network has its weights already
    trained  False takes a network of the zoo as it is initialised: for its structure alone

    A file of code is run, with its folder on `sys.path`; a module is imported with the working
    folder there. What they print goes to standard error.

    Raises `ModelError` that says what is wrong with the code, with its line, or with the weights,
    all at once. Warns with `ModelWarning` of batch norm that has never seen data.
    """
    if spec in NETWORKS:
        if weights is not None:
            return read_network(spec, weights)
        return load_network(spec) if trained else NETWORKS[spec].make().eval()
    if Path(spec).suffix == ".pt2":
        if weights is not None:
            raise ModelError(f"{spec} holds its own weights: leave {weights} out.")
        return read_exported(spec)
    model = _made(spec)
    if weights is not None:
        _load_weights(model, Path(weights), spec)
    model.eval()
    _check_statistics(model)
    return model


def input_shapes(model: nn.Module) -> tuple[Shape, ...]:
    """The shapes of one sample of every input, where the network itself says so, else nothing.

    An exported one does, and those of the zoo.
    """
    if isinstance(model, ExportedModel):
        return model.input_shapes
    return ((3, 32, 32),) if type(model).__module__.startswith("intact.zoo.") else ()


def input_shape(model: nn.Module) -> Shape | None:
    """The shape of one sample, where the network itself says so and has one input."""
    shapes = input_shapes(model)
    return shapes[0] if len(shapes) == 1 else None


def title(spec: str) -> str:
    """What to call a network in a report: its name in the zoo, or the words that name it."""
    return NETWORKS[spec].title if spec in NETWORKS else spec


# -- code ----------------------------------------------------------------------------------------


def _made(spec: str) -> nn.Module:
    """The module that `FILE.py:NAME` or `package.module:NAME` stands for."""
    where, colon, name = spec.rpartition(":")
    if not colon or not where or not name.isidentifier():
        raise ModelError(_no_spec(spec))
    file = Path(where) if where.endswith(".py") else None
    folder = Path.cwd() if file is None else file.absolute().parent
    with _importing(folder):
        module = _imported(where) if file is None else _run(file)
        made = _attribute(module, name, where)
        if not isinstance(made, nn.Module):
            made = _called(made, name, where)
    if not isinstance(made, nn.Module):
        raise ModelError(
            f"{name} of {where} gives {_article(made)}, not a torch.nn.Module. Does it return the "
            "network?"
        )
    return made


def _no_spec(spec: str) -> str:
    """What is wrong with a text that names no network."""
    path = Path(spec)
    if path.suffix == ".py":
        return (
            f"{spec} is a file of code, but which network in it? Write {spec}:NAME, where NAME is "
            "a function or class that needs no arguments, or the network itself."
        )
    if path.suffix in WEIGHTS:
        return (
            f"{spec} holds weights, which are no network without the code. Give the code as "
            "--model FILE.py:NAME and this file as --weights."
        )
    close = difflib.get_close_matches(spec, NETWORKS, 1)
    hint = f" Do you mean {close[0]}?" if close else ""
    return (
        f"there is no network {spec!r} in the zoo, which has {', '.join(NETWORKS)}.{hint} For a "
        "network of your own give FILE.py:NAME or package.module:NAME, where NAME is a function "
        "or class that makes it without arguments, or FILE.pt2."
    )


@contextmanager
def _importing(folder: Path) -> Iterator[None]:
    """The user's code finds what lies beside it, and its prints are not taken for our output."""
    sys.path.insert(0, str(folder))
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        sys.path.remove(str(folder))


def _run(file: Path) -> ModuleType:
    if not file.is_file():
        raise ModelError(f"{file} does not exist, or is no file.")
    spec = importlib.util.spec_from_file_location(f"intact_model_{file.stem}", file.absolute())
    if spec is None or spec.loader is None:
        raise ModelError(f"{file} cannot be imported as Python.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and type hints look there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ModelError(f"{file} cannot be imported:{_failure(error)}") from error
    return module


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            file = Path(f"{name.replace('.', '/')}.py")
            hint = f" There is a file {file}: run this from its folder." if file.is_file() else ""
            raise ModelError(
                f"there is no module {name}: Python knows no {error.name!r} here.{hint} For a file "
                "write FILE.py:NAME."
            ) from error
        raise ModelError(f"{name} cannot be imported:{_failure(error)}") from error
    except (Exception, SystemExit) as error:
        raise ModelError(f"{name} cannot be imported:{_failure(error)}") from error


def _attribute(module: ModuleType, name: str, where: str) -> Any:
    if hasattr(module, name):
        return getattr(module, name)
    own = [
        key
        for key, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__ or isinstance(value, nn.Module)
    ]
    close = difflib.get_close_matches(name, own, 1)
    hint = f" Do you mean {close[0]}?" if close else ""
    defines = f" It defines {', '.join(own)}." if own and not close else ""
    raise ModelError(f"{where} has no {name!r}.{hint}{defines}")


def _called(factory: Any, name: str, where: str) -> Any:
    if not callable(factory):
        raise ModelError(
            f"{name} of {where} is {_article(factory)}. Name a function or class that needs no "
            "arguments, or a torch.nn.Module."
        )
    try:
        parameters = list(inspect.signature(factory).parameters.values())
    except (TypeError, ValueError):  # of builtins; they say themselves what they lack
        parameters = []
    needed = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if needed:
        raise ModelError(
            f"{name} of {where} needs arguments: {', '.join(needed)}. Write a function that gives "
            f"them, and name that one:\n\n    def make():\n"
            f"        return {name}({', '.join(f'{n}=...' for n in needed)})\n"
        )
    try:
        return factory()
    except (Exception, SystemExit) as error:
        raise ModelError(f"{name} of {where} fails:{_failure(error)}") from error


def _failure(error: BaseException) -> str:
    """An error in the user's code, with the line that it comes from, below a message."""
    if isinstance(error, SystemExit):
        what = (
            "It ends the interpreter. Put what it does when it is run below "
            '`if __name__ == "__main__":`.'
        )
    else:
        text = (str(error).strip() or "no message").splitlines()[0]
        if isinstance(error, SyntaxError):
            text = error.msg
        what = f"{type(error).__name__}: {text}"
    if isinstance(error, SyntaxError) and error.filename:
        line = (error.text or "").strip()
        return f"\n  {Path(error.filename).name}:{error.lineno}: {line}\n  {what}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_users(f.filename)]
    if not frames:
        return f"\n  {what}"
    return f"\n  {Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line}\n  {what}"


_LIBRARIES = (Path(__file__).parent, Path(torch.__file__).parent)


def _is_users(file: str) -> bool:
    return not (file.startswith("<") or any(folder in Path(file).parents for folder in _LIBRARIES))


def _article(value: object) -> str:
    name = "None" if value is None else type(value).__name__
    return name if value is None else f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


# -- weights -------------------------------------------------------------------------------------


def _load_weights(model: nn.Module, path: Path, spec: str) -> None:
    given = _state(path)
    wanted = model.state_dict()
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in given):
            given = {name.removeprefix(prefix): tensor for name, tensor in given.items()}
    defects = _defects(given, wanted)
    if defects:
        raise ModelError(
            f"{path} does not hold the weights of {spec}:\n" + "\n".join(f"  {d}" for d in defects)
        )
    try:
        # Counters of batch norm are missing from old files, and of no use in eval mode.
        model.load_state_dict(given, strict=False)
    except Exception as error:
        raise ModelError(
            f"the weights of {path} fit {spec}, but it refuses them:{_failure(error)}"
        ) from error


def _state(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file."""
    if path.suffix not in WEIGHTS:
        raise ModelError(f"{path}: weights come as {', '.join(WEIGHTS)}.")
    if not path.is_file():
        raise ModelError(f"{path} does not exist, or is no file.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} cannot be read as a safetensors file: {error}") from error
    try:
        # Never otherwise: a pickle can run any code while it is read.
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ModelError(
            f"{path} holds more than tensors, or is damaged, and is not read: other pickles can "
            "run any code. Where it was made, write the weights alone: "
            "torch.save(model.state_dict(), 'weights.pt')."
        ) from error
    for key in STATE_KEYS:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not found:
        raise ModelError(f"{path} holds {_article(found)}, not a state dict of tensors.")
    others = [str(key) for key, value in found.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ModelError(
            f"{path} is no state dict: {', '.join(others[:5])}{', …' if len(others) > 5 else ''} "
            f"are no tensors. A checkpoint keeps it under {', '.join(map(repr, STATE_KEYS))}."
        )
    return {str(name): tensor for name, tensor in found.items()}


def _defects(given: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> list[str]:
    """Every way in which tensors are not those of the network, with what may have been meant."""
    missing = [n for n in wanted if n not in given and not n.endswith("num_batches_tracked")]
    extra = [n for n in given if n not in wanted]
    defects = []
    for name in missing:
        shape = wanted[name].shape
        alike = [n for n in extra if given[n].shape == shape]
        close = difflib.get_close_matches(name, alike, 1, 0.4)
        hint = f"; the file's {close[0]} has that shape" if close else ""
        defects.append(f"{name} {list(shape)} is missing{hint}")
    for name in extra:
        close = difflib.get_close_matches(name, missing, 1)
        hint = f"; is it {close[0]}?" if close else ""
        defects.append(f"{name} {list(given[name].shape)} is not part of the network{hint}")
    for name in wanted:
        if name in given and given[name].shape != wanted[name].shape:
            shapes = list(given[name].shape), list(wanted[name].shape)
            defects.append(f"{name} has shape {shapes[0]}, not the network's {shapes[1]}")
    return defects


def _check_statistics(model: nn.Module) -> None:
    """Warn of batch norm with the mean 0 and the variance 1 that it is made with."""
    untrained = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        and layer.running_mean is not None
        and layer.running_var is not None
        and not layer.running_mean.any()
        and bool((layer.running_var == 1).all())
        and not layer.num_batches_tracked
    ]
    if untrained:
        shown = ", ".join(untrained[:5]) + (", …" if len(untrained) > 5 else "")
        warnings.warn(
            f"batch norm has never seen data: the running mean is 0 and the variance 1 in {shown}. "
            "Are these the trained weights?",
            ModelWarning,
            stacklevel=3,
        )
