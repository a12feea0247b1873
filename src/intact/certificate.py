"""The certificate: what comparing the engines of a machine, code by code, has found.

`certifying` makes it, `docs/certificate.md` says how to read it.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from intact.errors import StorageError
from intact.ops import Shape
from intact.strict_json import parse_document, plain, read_value, write_document

__all__ = [
    "FLOAT_KINDS",
    "FORMAT",
    "KINDS",
    "Boundary",
    "Certificate",
    "Count",
    "Difference",
    "EngineResult",
    "FloatResult",
    "Inputs",
    "Layer",
    "certificate_table",
    "together",
]

FORMAT = 1
"""Version of the layout of the JSON. Raised when a reader of the old one would be misled."""

KINDS = {
    "data": "real inputs",
    "stand-in": "random floats over the input's range, in place of real inputs",
    "random": "uniform random codes",
    "structured": "extremes, alternations, ramps, single channels at an end of the range",
    "boundaries": "per layer: accumulators on both sides of boundaries between codes",
    "extremes": "per layer: accumulators at both ends of their range",
    "sums": "per addition and subtraction: every pair of codes",
    "products": "per multiplication: every pair of codes",
    "entries": "per table: every code at every index of the channels",
}
"""The kinds of input, in the order in which they are run."""

FLOAT_KINDS = {
    "data": "real inputs",
    "stand-in": "random floats over the input's range, in place of real inputs",
    "random": "random floats away from ties",
    "ties": "floats half way between two codes, or next to that",
}


@dataclass(frozen=True, slots=True)
class Layer:
    """An op of the program."""

    name: str
    op: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class Inputs:
    """What engines were run on.

    kind     one of `KINDS`
    samples  of the program or, for kinds of layers, of all layers together
    sha256   of the codes, row-major, of all layers in order
    """

    kind: str
    description: str
    samples: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Boundary:
    """How well the search for boundaries of a layer went; see `adversarial.Boundaries`."""

    layer: str
    samples: int
    wanted: int
    hit: int
    ties: int
    out_of_reach: int


@dataclass(frozen=True, slots=True)
class Count:
    """Values of one tensor that were compared, and how many of them were different."""

    layer: str
    kind: str
    compared: int
    different: int


@dataclass(frozen=True, slots=True)
class Difference:
    """A value that is not what the reference engine says.

    sample   among those of its kind (for kinds of layers: of that layer)
    channel  the first axis; the last one of a linear layer's result
    index    of the value in the layer's result, all axes
    """

    layer: str
    kind: str
    sample: int
    channel: int
    index: tuple[int, ...]
    expected: int
    got: int

    def __str__(self) -> str:
        place = ", ".join(map(str, self.index))
        return (
            f"{self.layer} is the first layer that differs: {self.got} instead of {self.expected} "
            f"in channel {self.channel}, at [{place}], sample {self.sample} of {self.kind!r}"
        )


@dataclass(frozen=True, slots=True)
class EngineResult:
    """One engine in one setting.

    first    of the first layer, in the order of the program, with a difference
    failure  why it was not run to the end; "" if it was
    """

    name: str
    counts: tuple[Count, ...]
    first: Difference | None
    failure: str

    @property
    def compared(self) -> int:
        """Values that were compared."""
        return sum(count.compared for count in self.counts)

    @property
    def different(self) -> int:
        """Values that were different."""
        return sum(count.different for count in self.counts)

    @property
    def ok(self) -> bool:
        """Whether something was compared, all of it, and nothing was different."""
        return self.compared > 0 and self.different == 0 and not self.failure

    def of_kind(self, kind: str) -> tuple[int, int]:
        """Values compared and values different, of one kind of input."""
        return together((c.compared, c.different) for c in self.counts if c.kind == kind)

    def of_layer(self, layer: str) -> tuple[int, int]:
        """Values compared and values different, of one layer."""
        return together((c.compared, c.different) for c in self.counts if c.layer == layer)


@dataclass(frozen=True, slots=True)
class FloatResult:
    """An engine that quantizes its input itself, on float32 inputs of one kind of `FLOAT_KINDS`.

    Compared are the output, as float32, and the codes of every layer.

    tolerated  whether this engine may differ here: near ties it rounds inputs in another way
               (arithmetic.md, section 1)
    """

    engine: str
    kind: str
    samples: int
    samples_different: int
    compared: int
    different: int
    tolerated: bool
    failure: str

    @property
    def ok(self) -> bool:
        """Whether nothing was different, or was allowed to be."""
        return not self.failure and (self.tolerated or self.different == 0)


@dataclass(frozen=True)
class Certificate:
    """That engines agree on a program, or where they do not.

    program   SHA-256 of the program's file
    layers    its ops, in order
    inputs    what was run, one entry per kind
    engines   what was compared with the reference engine
    floats    the same for engines that take floats
    missing   engine that this machine cannot run -> why
    notes     what a reader should know of this run
    machine   the processor, its features, the system
    versions  of everything that took part
    seed      of the random codes
    date      as the caller gave it
    """

    program: str
    layers: tuple[Layer, ...]
    inputs: tuple[Inputs, ...]
    boundaries: tuple[Boundary, ...]
    engines: tuple[EngineResult, ...]
    floats: tuple[FloatResult, ...]
    missing: Mapping[str, str]
    notes: tuple[str, ...]
    machine: Mapping[str, str]
    versions: Mapping[str, str]
    seed: int
    date: str

    @property
    def runs(self) -> tuple[EngineResult | FloatResult, ...]:
        """All comparisons in which nothing may be different."""
        return (*self.engines, *(result for result in self.floats if not result.tolerated))

    @property
    def failed(self) -> tuple[EngineResult | FloatResult, ...]:
        """Runs that are not as they must be: something was different, or they did not end."""
        runs: tuple[EngineResult | FloatResult, ...] = (*self.engines, *self.floats)
        return tuple(run for run in runs if not run.ok)

    @property
    def tolerated(self) -> int:
        """Samples in which an engine rounded an input next to a tie in its own way."""
        return sum(result.samples_different for result in self.floats if result.tolerated)

    @property
    def compared(self) -> int:
        """Values that were compared, on all engines together, where none may be different."""
        return sum(run.compared for run in self.runs)

    @property
    def different(self) -> int:
        """How many of those were different."""
        return sum(run.different for run in self.runs)

    @property
    def ok(self) -> bool:
        """Whether at least one engine was compared and every one gave the same codes."""
        return bool(self.engines) and not self.failed

    def families(self) -> dict[str, tuple[EngineResult, ...]]:
        """The runs by engine: those whose names begin with the same word are its settings."""
        found: dict[str, tuple[EngineResult, ...]] = {}
        for run in self.engines:
            family = run.name.split()[0]
            found[family] = (*found.get(family, ()), run)
        return found

    @property
    def first(self) -> tuple[str, Difference] | None:
        """The first difference in the order of the program, and the engine that it is of."""
        order = {layer.name: i for i, layer in enumerate(self.layers)}
        found = [(e.name, e.first) for e in self.engines if e.first is not None]
        return min(found, key=lambda pair: order[pair[1].layer], default=None)

    def sentence(self) -> str:
        """The result in one sentence."""
        names = _count(len(self.engines), "engine setting")
        if not self.engines:
            return "No engine was compared with the reference engine."
        if self.ok:
            return f"{self.compared:,} values compared on {names}: all are equal."
        failed = [run for run in self.failed if run.failure]
        parts = [f"{self.different:,} of {self.compared:,} values on {names} differ"]
        if failed:
            parts.append(f"{_count(len(failed), 'run')} failed")
        return " and ".join(parts) + "."

    def reasons(self) -> tuple[str, ...]:
        """Per run that is not as it must be, where it first differs or why it did not end."""
        found = []
        for run in self.failed:
            if run.failure:
                reason = run.failure
            elif isinstance(run, FloatResult):
                reason = f"{run.different:,} of {run.compared:,} values differ for {run.kind!r}"
            else:
                reason = str(run.first or "nothing was compared")
            name = run.engine + ", floats" if isinstance(run, FloatResult) else run.name
            found.append(f"{name}: {reason}")
        return tuple(found)

    def to_json(self) -> str:
        """As JSON text, with what follows from the counts under `result`."""
        document = {"format": FORMAT, "result": self._result()}
        return write_document({**document, **plain(self, "certificate")})

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """Read what `to_json` wrote; anything else is a `StorageError` that says where.

        So is a `result` that does not follow from the counts.
        """
        document = parse_document(text, "certificate.json", FORMAT, "Run `intact certify` again")
        result = document.pop("result", None)
        certificate = cast("Certificate", read_value(document, cls, "certificate"))
        certificate._check()
        if result != certificate._result():
            raise StorageError("certificate.result is not what follows from the counts.")
        return certificate

    def _result(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "compared": self.compared,
            "different": self.different,
            "sentence": self.sentence(),
        }

    def _check(self) -> None:
        """Rules that types cannot say, and that totals and tables rely on."""
        layers = {layer.name for layer in self.layers}
        named = {boundary.layer for boundary in self.boundaries}
        kinds = {inputs.kind for inputs in self.inputs}
        for engine in self.engines:
            named |= {count.layer for count in engine.counts}
            named |= {engine.first.layer} if engine.first else set()
            kinds |= {count.kind for count in engine.counts}
        floats = {result.kind for result in self.floats} - set(FLOAT_KINDS)
        if unknown := sorted((named - layers) | (kinds - set(KINDS)) | floats):
            raise StorageError(
                f"certificate: no layer and no kind of input is called {unknown[0]!r}."
            )
        counts: list[Count | FloatResult] = [c for e in self.engines for c in e.counts]
        for count in (*counts, *self.floats):
            if not 0 <= count.different <= count.compared:
                raise StorageError(
                    f"certificate: {count.different} of {count.compared} values cannot differ."
                )

    def __repr__(self) -> str:
        return f"<intact.Certificate of {self.program[:8]}: {self.sentence()}>"

    def _repr_html_(self) -> str:
        """The table, for notebooks."""
        heading, *rows = certificate_table(self)
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in heading)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in rows
        )
        differences = "".join(f"<li>{html.escape(reason)}</li>" for reason in self.reasons())
        return (
            f"<p>{html.escape(self.sentence())}</p><ul>{differences}</ul>"
            f"<table><tr>{head}</tr>{body}</table>"
        )


def certificate_table(certificate: Certificate) -> list[tuple[str, ...]]:
    """A column of text per engine, all settings of one together; the heading first.

    Rows: how many settings, values compared by kind of input, and how many were different.
    """
    families = certificate.families()
    rows: list[tuple[str, ...]] = [("", *families)]
    rows.append(("settings", *(str(len(runs)) for runs in families.values())))
    for inputs in certificate.inputs:
        cells = []
        for runs in families.values():
            compared, different = together(run.of_kind(inputs.kind) for run in runs)
            cells.append(f"{different:,} of {compared:,}" if different else f"{compared:,}")
        rows.append((inputs.kind, *cells))
    ends = []
    for runs in families.values():
        failed = any(run.failure for run in runs)
        ends.append("failed" if failed else f"{sum(run.different for run in runs):,}")
    rows.append(("different", *ends))
    return rows


def together(counts: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The sums of values compared and of values different."""
    pairs = tuple(counts)
    return sum(compared for compared, _ in pairs), sum(different for _, different in pairs)


def _count(number: int, what: str) -> str:
    """`1 engine`, `2 engines`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
