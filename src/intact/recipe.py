"""The choices of a quantization: a frozen value, readable from TOML and written back to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import tomli
import tomli_w

from intact.arithmetic import GRIDS, Grid
from intact.errors import RecipeError
from intact.ranges import MSE, MinMax, RangeMethod, parse_range

__all__ = [
    "PRESETS",
    "ActivationRecipe",
    "ImproveRecipe",
    "InputRecipe",
    "Override",
    "Recipe",
    "Scheme",
    "WeightRecipe",
    "load_recipe",
]

Scheme: TypeAlias = Literal["symmetric", "affine", "textbook"]
"""How a range becomes a grid.

symmetric  signed codes, zero point 0, scale `max|t| / 127`: the largest value is the largest code
affine     unsigned codes with an even zero point: all codes are spent on the range
textbook   signed codes, zero point 0, scale `max|t| / 128`: one code more, and the most positive
           value saturates by one code
"""
SCHEMES: tuple[str, ...] = get_args(Scheme)


@dataclass(frozen=True, slots=True)
class WeightRecipe:
    """How weights are quantized; the zero point of a weight is always 0.

    bits         2 to 8
    scheme       "symmetric" or "textbook"
    per_channel  one scale per output channel, instead of one per tensor
    range        how the clipping range is chosen from the values
    """

    bits: int = 8
    scheme: Scheme = "symmetric"
    per_channel: bool = True
    range: RangeMethod = field(default_factory=MSE)

    def __post_init__(self) -> None:
        _check(self)
        if self.scheme == "affine":
            raise RecipeError("weights.scheme cannot be 'affine': a weight's zero point is 0.")


@dataclass(frozen=True, slots=True)
class ActivationRecipe:
    """How activations are quantized, always per tensor; fields as in `WeightRecipe`."""

    bits: int = 8
    scheme: Scheme = "affine"
    range: RangeMethod = field(default_factory=MSE)

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, slots=True)
class InputRecipe:
    """How the network's input is quantized.

    power_of_two  take the smallest power of two as scale that leaves at most one code clipped,
                  with zero point 0: then `x / scale` is exact on every engine
                  (arithmetic.md, section 1). Signed or unsigned, as the range demands
    """

    bits: int = 8
    scheme: Scheme = "symmetric"
    range: RangeMethod = field(default_factory=MinMax)
    power_of_two: bool = True

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, slots=True)
class ImproveRecipe:
    """What is done to the float network so that it quantizes better.

    equalize      whether channels are scaled to ranges that are more alike, between layers that can
                  make up for it (`intact.improve.equalization`)
    correct_bias  whether biases make up for the mean error of their layer on calibration data
                  (`intact.improve.bias_correction`); "auto": if the network has depthwise
                  convolutions
    """

    equalize: bool = False
    correct_bias: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        equalize: Any = self.equalize  # a recipe may come from a file: check what the types promise
        if type(equalize) is not bool:
            raise RecipeError(f"equalize is {equalize!r}; it is either true or false.")
        if type(self.correct_bias) is not bool and self.correct_bias != "auto":
            raise RecipeError(f"correct_bias is {self.correct_bias!r}; true, false or 'auto'.")


Section = TypeVar("Section", WeightRecipe, ActivationRecipe, InputRecipe, ImproveRecipe)


@dataclass(frozen=True, slots=True)
class Override:
    """One choice that differs for some layers.

    layers   a layer's name, or a pattern with `*`, `?` and `[…]`
    section  "weights" or "activations"
    key      a field of that section's recipe
    value    what it is for those layers
    """

    layers: str
    section: Literal["weights", "activations"]
    key: str
    value: Any


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that a user may choose.

    name         for reports
    grid         from which multipliers are taken: "dyadic", "power_of_two" or "float"
    weights      of every layer
    activations  of every tensor but input and output
    input        of the network's input
    output       of the network's output: by default its whole range, since a logit that saturates
                 can no longer win
    improve      what is done to the float network before
    overrides    exceptions, applied in order: a later one wins
    """

    name: str = "default"
    grid: Grid = "dyadic"
    weights: WeightRecipe = field(default_factory=WeightRecipe)
    activations: ActivationRecipe = field(default_factory=ActivationRecipe)
    input: InputRecipe = field(default_factory=InputRecipe)
    output: ActivationRecipe = field(default_factory=lambda: ActivationRecipe(range=MinMax()))
    improve: ImproveRecipe = field(default_factory=ImproveRecipe)
    overrides: tuple[Override, ...] = ()

    def __post_init__(self) -> None:
        if self.grid not in GRIDS:
            raise RecipeError(f"grid is {self.grid!r}; choose one of {', '.join(GRIDS)}.")
        for override in self.overrides:  # a bad value is found here, not in the middle of a run
            _apply(getattr(self, override.section), (override,))

    def for_weights(self, layer: str) -> WeightRecipe:
        """The recipe of one layer's weights."""
        return _apply(self.weights, self._matching(layer, "weights"))

    def for_activations(self, layer: str, *, is_output: bool = False) -> ActivationRecipe:
        """The recipe of one layer's result."""
        base = self.output if is_output else self.activations
        return _apply(base, self._matching(layer, "activations"))

    def _matching(self, layer: str, section: str) -> list[Override]:
        return [o for o in self.overrides if o.section == section and fnmatchcase(layer, o.layers)]

    def check_layers(self, layers: Iterable[str]) -> None:
        """Raise `RecipeError` if an override matches no layer: it would be ignored in silence."""
        names = list(layers)
        for override in self.overrides:
            if not any(fnmatchcase(name, override.layers) for name in names):
                raise RecipeError(
                    f"the recipe {self.name!r} has an override for {override.layers!r}, but no "
                    f"layer matches it. The layers are: {', '.join(names)}."
                )

    # -- TOML ------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The recipe as nested plain values: what `results.json` holds and TOML writes."""
        result: dict[str, Any] = {"name": self.name, "grid": self.grid}
        for section in _SECTIONS:
            value = getattr(self, section)
            result[section] = {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
        layers: dict[str, dict[str, dict[str, Any]]] = {}
        for o in self.overrides:
            layers.setdefault(o.layers, {}).setdefault(o.section, {})[o.key] = _plain(o.value)
        return {**result, "layers": layers} if layers else result

    def to_toml(self) -> str:
        """The recipe as TOML, in full: what `from_toml` reads back to an equal value."""
        return tomli_w.dumps(self.to_dict())

    @classmethod
    def from_toml(cls, text: str, origin: str = "the recipe") -> Recipe:
        """Read a recipe from TOML; what is absent is as in the default recipe.

        origin  what to call the text in errors, such as its file name
        """
        try:
            table = tomli.loads(text)
        except tomli.TOMLDecodeError as error:
            raise RecipeError(f"{origin} is not valid TOML: {error}.") from error
        try:
            return _from_table(table)
        except RecipeError as error:
            raise RecipeError(f"{origin}: {error}") from error

    def __str__(self) -> str:
        return self.to_toml()


_SECTIONS: Mapping[str, type[WeightRecipe | ActivationRecipe | InputRecipe | ImproveRecipe]] = (
    MappingProxyType(
        {
            "weights": WeightRecipe,
            "activations": ActivationRecipe,
            "input": InputRecipe,
            "output": ActivationRecipe,
            "improve": ImproveRecipe,
        }
    )
)


def _check(section: WeightRecipe | ActivationRecipe | InputRecipe) -> None:
    bits: Any = section.bits  # a recipe may come from a file: check what the types promise
    if not (type(bits) is int and 2 <= bits <= 8):
        raise RecipeError(f"bits is {bits!r}; choose a whole number from 2 to 8.")
    if section.scheme not in SCHEMES:
        raise RecipeError(f"scheme is {section.scheme!r}; choose one of {', '.join(SCHEMES)}.")
    for flag in ("per_channel", "power_of_two"):
        value = getattr(section, flag, False)
        if type(value) is not bool:
            raise RecipeError(f"{flag} is {value!r}; it is either true or false.")


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | bool) else str(value)


def _changed(base: Section, changes: Mapping[str, Any]) -> Section:
    """A section with some fields replaced by values as TOML gives them."""
    known = {f.name for f in fields(base)}
    unknown = sorted(set(changes) - known)
    if unknown:
        raise RecipeError(f"unknown key {unknown[0]!r}; the keys are {', '.join(sorted(known))}.")
    values = dict(changes)
    if isinstance(values.get("range"), str):
        values["range"] = parse_range(values["range"])
    elif "range" in values and not isinstance(values["range"], RangeMethod):
        raise RecipeError(f"range is {values['range']!r}; it is a text such as 'percentile:99.9'.")
    return replace(base, **values)


def _apply(base: Section, overrides: Iterable[Override]) -> Section:
    for o in overrides:
        try:
            base = _changed(base, {o.key: o.value})
        except RecipeError as error:
            raise RecipeError(f"layers.{o.layers}.{o.section}: {error}") from error
    return base


def _from_table(table: Mapping[str, Any]) -> Recipe:
    known = {"name", "grid", "layers", *_SECTIONS}
    unknown = sorted(set(table) - known)
    if unknown:
        raise RecipeError(f"unknown key {unknown[0]!r}; the keys are {', '.join(sorted(known))}.")
    recipe = Recipe(name="custom")
    changes: dict[str, Any] = {}
    for key in ("name", "grid"):
        if key in table:
            if not isinstance(table[key], str):
                raise RecipeError(f"{key} is {table[key]!r}; it is a text.")
            changes[key] = table[key]
    for name in _SECTIONS:
        try:
            changes[name] = _changed(getattr(recipe, name), _table(table.get(name, {})))
        except RecipeError as error:
            raise RecipeError(f"[{name}]: {error}") from error
    overrides: list[Override] = []
    for layers, sections in _table(table.get("layers", {})).items():
        for section, values in _table(sections).items():
            if section not in ("weights", "activations"):
                raise RecipeError(
                    f"layers.{layers} has a table {section!r}; a layer has 'weights' and "
                    "'activations'."
                )
            overrides += [
                Override(layers, section, key, value)  # type: ignore[arg-type]
                for key, value in _table(values).items()
            ]
    return replace(recipe, **changes, overrides=tuple(overrides))


def _table(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise RecipeError(f"{value!r} stands where a table belongs.")
    return value


_TEXTBOOK = ActivationRecipe(scheme="textbook", range=MinMax())

PRESETS: Mapping[str, Recipe] = MappingProxyType(
    {
        "default": Recipe(),
        "lab": Recipe(
            name="lab",
            grid="float",
            weights=WeightRecipe(scheme="textbook", per_channel=False, range=MinMax()),
            activations=_TEXTBOOK,
            input=InputRecipe(scheme="textbook", range=MinMax(), power_of_two=False),
            output=_TEXTBOOK,
            improve=ImproveRecipe(equalize=False, correct_bias=False),
        ),
    }
)
"""`default`, and `lab`: the textbook scheme, `128 / max|t|` per tensor with float multipliers."""


def load_recipe(recipe: str | Path | Recipe) -> Recipe:
    """A preset's name, a path to a TOML file, or a recipe as it is."""
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str | Path):  # callers without a type checker
        raise RecipeError(
            f"a recipe is the name of a preset ({', '.join(PRESETS)}), the path of a TOML file or "
            f"a Recipe, not a {type(recipe).__name__}."
        )
    if str(recipe) in PRESETS:
        return PRESETS[str(recipe)]
    path = Path(recipe)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # not UTF-8; not a path at all
        raise RecipeError(
            f"{str(recipe)!r} is neither a preset ({', '.join(PRESETS)}) nor a readable TOML file: "
            f"{error}."
        ) from error
    return Recipe.from_toml(text, str(path))
