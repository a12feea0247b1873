"""From a float module to a program in one call: capture, calibrate, improve, choose, lower."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from intact.calibrate import Batch, calibrate, split
from intact.capturing import capture
from intact.capturing.exporting import required_inputs
from intact.choose import align, choose_qparams
from intact.data.carried import info_of
from intact.data.preprocessing import Preprocessing
from intact.errors import CalibrationError, DataError
from intact.improve.bias_correction import correct_biases, samples_that_fit
from intact.improve.equalization import equalize, has_depthwise
from intact.lower import lower
from intact.network import Network
from intact.program import Program
from intact.recipe import Recipe, load_recipe
from intact.signature import Values, in_order, unwrapped, wrapped
from intact.sketch import Sketch
from intact.staged import Stages, measure

__all__ = ["Quantized", "quantize", "quantize_network", "stages"]


@dataclass(frozen=True, eq=False)
class Quantized:
    """A program, and everything that it was made from.

    network   the aligned float network: op by op what the program is. Equalized where the recipe
              says so, but with its own biases
    corrected the same with the biases that were lowered
    sketches  tensor -> what calibration saw
    """

    network: Network
    corrected: Network
    sketches: Mapping[str, Sketch]
    recipe: Recipe
    program: Program


def quantize_network(
    network: Network,
    batches: Iterable[Batch],
    recipe: Recipe,
    *,
    preprocessing: Preprocessing | None = None,
    info: Mapping[str, str] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Quantized:
    """Calibrate a captured network and lower it.

    batches        for calibration: float32 `[N, *input shape]`, or pairs of that and labels; for
                   several inputs see `calibrate.split`
    preprocessing  how images become inputs of this network, which then has one; the program
                   carries it
    info           other text that the program carries
    progress       called after each batch with the number of samples seen so far
    """
    recipe.check_layers(op.name for op in network.ops)  # before, not after, a long calibration
    carried: Mapping[str, str] = {}
    if preprocessing is not None:
        carried = info_of(preprocessing, network.tensors[network.input].shape)
    most = samples_that_fit(network)
    batches = iter(batches)
    if recipe.improve.equalize:
        first = _first(batches, len(network.inputs), most)
        network = equalize(network, calibrate(network, first))
        batches = chain(first, batches)
    wanted = recipe.improve.correct_bias
    correct = has_depthwise(network) if wanted == "auto" else wanted
    samples: list[tuple[torch.Tensor, ...]] = []
    if correct:
        batches = _keeping(batches, network.inputs, samples, most)
    sketches = calibrate(network, batches, progress)
    aligned = align(network)
    qparams = choose_qparams(aligned, sketches, recipe)
    facts = {"recipe": recipe.to_toml(), **carried, **_returned(network), **(info or {})}
    program = lower(aligned, qparams, recipe, facts)
    corrected = aligned
    if correct:
        shapes = (network.tensors[name].shape for name in network.inputs)
        samples.append(tuple(torch.zeros(0, *shape) for shape in shapes))
        held = unwrapped(map(torch.cat, zip(*samples, strict=True)))
        corrected = correct_biases(aligned, program, held)
        program = lower(corrected, qparams, recipe, facts)
    return Quantized(aligned, corrected, sketches, recipe, program)


def _first(batches: Iterator[Batch], inputs: int, most: int) -> list[Batch]:
    """The first batches, until they hold `most` samples."""
    first: list[Batch] = []
    count = 0
    for batch in batches:
        first.append(batch)
        given, _ = split(batch, inputs)
        parts = [*given.values()] if isinstance(given, Mapping) else wrapped(given, [""] * inputs)
        x = parts[0] if parts else None
        count += len(x) if isinstance(x, torch.Tensor | np.ndarray) and x.ndim else 1
        if count >= most:
            break
    return first


def _keeping(
    batches: Iterable[Batch],
    inputs: Sequence[str],
    samples: list[tuple[torch.Tensor, ...]],
    most: int,
) -> Iterator[Batch]:
    """The batches, of which the first `most` samples are copied as they pass, input by input."""
    for batch in batches:
        yield batch  # whoever took it has checked it before it comes here
        missing = most - sum(len(parts[0]) for parts in samples)
        if missing > 0:
            given = in_order(split(batch, len(inputs))[0], inputs, "network", CalibrationError)
            held = (torch.as_tensor(part)[:missing].detach() for part in given)
            samples.append(tuple(part.to("cpu", torch.float32, copy=True) for part in held))


def _returned(network: Network) -> dict[str, str]:
    """What the program's `info` says about several outputs: where the module returned each."""
    places = [f"{name} = result{place}" for name, place in network.returned.items()]
    return {"outputs": "\n".join(places)} if places else {}


def quantize(
    model: nn.Module,
    batches: Iterable[Batch],
    recipe: str | Path | Recipe = "default",
    *,
    preprocessing: Preprocessing | None = None,
) -> Program:
    """Make an integer program of a trained float module.

    model          in eval or training mode; it is captured in eval mode and left as it is
    batches        calibration data as the model takes it: float32 `[N, ...]`, or pairs of that and
                   labels (which are ignored), as a DataLoader yields them. A hundred images or
                   more. For a model with several inputs, tuples of arrays or mappings; see
                   `calibrate.split`
    recipe         a preset ("default", "lab"), a path to a TOML file, or a `Recipe`
    preprocessing  how images were made into those batches. It changes none of them: the program
                   carries it, so that `intact run` and `intact evaluate` can do the same

    Raises `CaptureError` with a list of all unsupported ops, `CalibrationError` for data that
    cannot be used, `RecipeError` for a recipe that does not fit; all are `IntactError`.
    """
    return _quantize(model, batches, load_recipe(recipe), preprocessing).program


def stages(
    model: nn.Module,
    calibration: Iterable[Batch],
    test: Iterable[Batch],
    recipe: str | Path | Recipe = "default",
) -> Stages:
    """Quantize a module step by step, and measure every step on test data.

    calibration  as `batches` of `quantize`
    test         pairs of float32 `[N, ...]` and integer labels `[N]`; without labels, pairs of that
                 and None: every step is then compared with the float network alone
    returns      one result per stage, the predictions of each, and the program
    """
    _check_iterable(test, "the test data")  # before, not after, a long calibration
    quantized = _quantize(model, calibration, load_recipe(recipe))
    return measure(quantized.network, quantized.program, test, corrected=quantized.corrected)


def _quantize(
    model: nn.Module,
    batches: Iterable[Batch],
    recipe: Recipe,
    preprocessing: Preprocessing | None = None,
) -> Quantized:
    _check_iterable(batches, "the calibration data")
    iterator = iter(batches)
    try:
        first = next(iterator)
    except StopIteration:
        raise CalibrationError(
            "there is no calibration data: the iterable of batches is empty. Give at least one "
            "batch; a generator can be used only once."
        ) from None
    network = capture(model, _example(first, max(1, len(required_inputs(model)))))
    return quantize_network(network, chain([first], iterator), recipe, preprocessing=preprocessing)


def _check_iterable(batches: object, what: str) -> None:
    """Refuse what yields something else than batches when it is iterated over."""
    if isinstance(batches, torch.Tensor | np.ndarray):
        hint = "Put it in a list: that is one batch."
    elif isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
        hint = "It yields single samples: wrap it in a DataLoader."
    elif isinstance(batches, str | bytes | Mapping) or not isinstance(batches, Iterable):
        hint = "Give a list of tensors or a DataLoader."
    else:
        return
    raise DataError(
        f"{what} must be an iterable of batches, not a {type(batches).__name__}. {hint}"
    )


def _example(batch: Batch, inputs: int) -> Values:
    """One sample of the shapes of a batch's, which is all that `capture` looks at.

    inputs  how many the module must be given; it may take more

    Everything else about the batch is `calibrate`'s to judge, as for all other batches.
    """
    given, _ = split(batch, inputs)
    if isinstance(given, Mapping) and inputs > 1:
        return {name: _zeros(x) for name, x in given.items()}
    if isinstance(given, tuple | list) and given:
        return unwrapped(_zeros(x) for x in given)
    return _zeros(given)


def _zeros(x: object) -> torch.Tensor:
    if not isinstance(x, torch.Tensor | np.ndarray):
        raise CalibrationError(
            "calibration batch 0: a batch is a tensor or an array, or a pair of one and labels, "
            f"not a {type(x).__name__}."
        )
    return torch.zeros(1, *x.shape[1:])
