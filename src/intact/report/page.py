"""The report as one self-contained HTML page: no network, no font, no image, readable without
JavaScript.

The plots are inline SVG, not a plotting library: a page is 100 to 900 kB instead of 5 MB, follows
the reader's theme, prints, and shows fifty layers at once.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from intact.analysis import LayerAnalysis, TensorAnalysis
from intact.certificate import FLOAT_KINDS, KINDS, Certificate, EngineResult, FloatResult, together
from intact.diagnosis import Finding
from intact.errors import StorageError
from intact.report import numbers, words
from intact.report.plots import (
    ChannelPlot,
    CodePlot,
    HistogramPlot,
    SignalPlot,
    StagePlot,
    channel_plot,
    code_plot,
    histogram_plot,
    signal_plot,
    stage_plot,
)
from intact.report.value import Report
from intact.significance import percent
from intact.staged import Result, StageResult, UnlabelledResult

__all__ = ["render"]

_SEVERITIES = {"problem": "Problem", "advice": "Advice", "note": "Note"}

_RULES = {
    "channel-spread": "Spread between channels",
    "dead-channels": "Constant channels",
    "few-codes": "Few codes in use",
    "few-images": "Few calibration images",
    "guessing": "No better than guessing",
    "noisy": "Noise",
    "one-sided": "One-sided values",
    "saturating": "Saturation",
}
"""Titles of cards; any other rule is its own title."""


def render(report: Report, certificate: Certificate | None = None) -> str:
    """The page: one HTML document, the same bytes for the same report and certificate.

    certificate  of the report's program; that of another is a `StorageError`

    Every text of the report (titles, layer names, versions) is escaped: it is not trusted.
    """
    if certificate is not None and certificate.program != report.program.sha256:
        raise StorageError(
            "the certificate is one of another program than the report is about. Run `intact "
            "certify` on this one."
        )
    script = _template("page.js")
    page = (
        _environment()
        .get_template("page.html")
        .render(
            report=report,
            verdict=words.verdict(report),
            headline=words.headline(report),
            stages=_stages(report.stages),
            groups=_groups(report),
            layers=[_layer(i, layer, report) for i, layer in enumerate(report.layers)],
            certificate=None if certificate is None else _certificate(certificate),
            sources=[
                (name, _panel("Input", f"source-{i}", tensor))
                for i, (name, tensor) in enumerate(report.inputs.items())
            ],
            style=Markup(_template("page.css")),  # noqa: S704 (our own file)
            script=Markup(script),  # noqa: S704 (our own file)
            script_hash=_hash(script),
        )
    )
    return page + "\n"


# -- what the template shows ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Figure:
    """One figure of a tensor: what it is called, what it is, and what that means."""

    label: str
    value: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class _Panel:
    """One tensor: its plots and figures."""

    title: str
    id: str
    tensor: TensorAnalysis
    grid: str
    histogram: HistogramPlot
    codes: CodePlot
    channels: ChannelPlot | None
    figures: tuple[_Figure, ...]


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer: its row of the table and its section."""

    id: str
    analysis: LayerAnalysis
    multiplier: str
    multiplier_hint: str
    panels: tuple[_Panel, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class _Group:
    """Findings of one rule with the same advice: one card. `recipe` has the lines of all."""

    id: str
    severity: str
    label: str
    title: str
    findings: tuple[tuple[Finding, str], ...]
    advice: str
    recipe: str


@dataclass(frozen=True, slots=True)
class _Compared:
    """A row of a table of the certificate.

    cells  per column, values compared and how many of them were different
    note   what else there is to say of it
    """

    name: str
    cells: tuple[tuple[int, int], ...]
    note: str
    ok: bool

    @property
    def different(self) -> int:
        return sum(different for _, different in self.cells)


@dataclass(frozen=True, slots=True)
class _Certified:
    """The certificate as the page shows it: engines, then all settings, layers and floats."""

    value: Certificate
    kinds: tuple[tuple[str, str], ...]
    engines: tuple[_Compared, ...]
    settings: tuple[_Compared, ...]
    layers: tuple[_Compared, ...]
    float_kinds: tuple[tuple[str, str], ...]
    floats: tuple[_Compared, ...]
    families: tuple[tuple[str, str], ...]
    boundaries: int
    ties: int


def _stages(results: Sequence[Result]) -> StagePlot | SignalPlot:
    """Accuracies where the data has labels, else how much of the signal is left."""
    labelled = [r for r in results if isinstance(r, StageResult)]
    unlabelled = [r for r in results if isinstance(r, UnlabelledResult)]
    return stage_plot(labelled) if labelled else signal_plot(unlabelled)


def _certificate(certificate: Certificate) -> _Certified:
    kinds = [inputs.kind for inputs in certificate.inputs]
    families = certificate.families()
    floats: dict[str, list[FloatResult]] = {}
    for result in certificate.floats:
        floats.setdefault(result.engine, []).append(result)
    met = {result.kind for result in certificate.floats}
    float_kinds = [kind for kind in FLOAT_KINDS if kind in met]

    def by_kind(name: str, runs: Sequence[EngineResult]) -> _Compared:
        cells = tuple(together(run.of_kind(kind) for run in runs) for kind in kinds)
        problems = [run.failure or str(run.first or "") for run in runs if not run.ok]
        return _Compared(name, cells, problems[0] if problems else "", not problems)

    def by_engine(layer: str) -> _Compared:
        cells = tuple(together(run.of_layer(layer) for run in runs) for runs in families.values())
        return _Compared(layer, cells, "", not any(different for _, different in cells))

    return _Certified(
        certificate,
        tuple((kind, KINDS[kind]) for kind in kinds),
        tuple(
            by_kind(f"{name}, {len(runs)} settings" if len(runs) > 1 else name, runs)
            for name, runs in families.items()
        ),
        tuple(by_kind(run.name, (run,)) for run in certificate.engines),
        tuple(by_engine(layer.name) for layer in certificate.layers),
        tuple((kind, FLOAT_KINDS[kind]) for kind in float_kinds),
        tuple(_float_row(name, results, float_kinds) for name, results in floats.items()),
        tuple((name, ", ".join(run.name for run in runs)) for name, runs in families.items()),
        sum(boundary.hit for boundary in certificate.boundaries),
        sum(boundary.ties for boundary in certificate.boundaries),
    )


def _float_row(name: str, results: Sequence[FloatResult], kinds: Sequence[str]) -> _Compared:
    cells = {r.kind: (r.compared, r.different) for r in results}
    wrong = [r for r in results if not r.ok]
    aside = sum(r.samples_different for r in results if r.tolerated)
    note = wrong[0].failure if wrong else ""
    if aside and not wrong:
        note = f"rounds floats next to a tie otherwise, in {aside:,} samples"
    return _Compared(name, tuple(cells.get(k, (0, 0)) for k in kinds), note, not wrong)


def _layer(index: int, layer: LayerAnalysis, report: Report) -> _Layer:
    panels = [_panel("Activations", f"layer-{index}-activation", layer.activation)]
    if layer.weight is not None:
        panels.insert(0, _panel("Weights", f"layer-{index}-weight", layer.weight))
    multiplier, hint = _multiplier(layer)
    return _Layer(
        id=f"layer-{index}",
        analysis=layer,
        multiplier=multiplier,
        multiplier_hint=hint,
        panels=tuple(panels),
        findings=tuple(f for f in report.diagnosis if f.layer == layer.name),
    )


def _multiplier(layer: LayerAnalysis) -> tuple[str, str]:
    """The multiplier as it is stored, and the real factor that it stands for."""
    if not layer.multiplier:
        return "", ""
    if layer.shift is None:
        return numbers.extent(layer.multiplier, 4), "float32"
    low, high = numbers.count(min(layer.multiplier)), numbers.count(max(layer.multiplier))
    integers = low if low == high else f"{low} to {high}"
    real = numbers.extent([m / 2**layer.shift for m in layer.multiplier])
    return f"{integers} / 2{numbers.superscript(layer.shift)}", f"M = {real}"


def _panel(title: str, name: str, tensor: TensorAnalysis) -> _Panel:
    codes = code_plot(tensor)
    return _Panel(
        title=title,
        id=name,
        tensor=tensor,
        grid=_grid(tensor),
        histogram=histogram_plot(tensor),
        codes=codes,
        channels=channel_plot(tensor),
        figures=_figures(tensor, codes),
    )


def _grid(tensor: TensorAnalysis) -> str:
    """The grid in words: "int8, symmetric, one scale per channel"."""
    signed = not tensor.type_name.startswith("u")
    zero = tensor.zero_point
    kind = "symmetric" if signed and zero == 0 else f"zero point {zero}"
    scales = "one scale" if len(tensor.scale) == 1 else f"{len(tensor.scale)} scales, per channel"
    return f"{tensor.type_name}, {kind}, {scales}"


def _figures(tensor: TensorAnalysis, codes: CodePlot) -> tuple[_Figure, ...]:
    real = numbers.real
    return (
        _Figure("Range", f"{real(tensor.min)} to {real(tensor.max)}"),
        _Figure("Mean", real(tensor.mean)),
        _Figure("Standard deviation", real(tensor.std)),
        _Figure("Mean ± 3σ", f"{real(tensor.three_sigma[0])} to {real(tensor.three_sigma[1])}"),
        _Figure(
            "Outside 3σ",
            numbers.share(tensor.outlier_fraction),
            "0.27 % if normal",
        ),
        _Figure(
            "Chosen range",
            f"{real(tensor.range[0])} to {real(tensor.range[1])}",
            f"codes {tensor.qmin} to {tensor.qmax}",
        ),
        _Figure("Scale", numbers.extent(tensor.scale)),
        _Figure("Clipped", numbers.share(tensor.clipped_fraction)),
        _Figure("Codes in use", numbers.share(tensor.code_usage), f"{codes.used} of {codes.total}"),
        _Figure("SQNR", numbers.decibel(tensor.sqnr_db)),
    )


def _groups(report: Report) -> tuple[_Group, ...]:
    """The findings, worst first; those that say the same of several layers share a card."""
    index = {layer.name: f"layer-{i}" for i, layer in enumerate(report.layers)}
    order = list(_SEVERITIES)
    together: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in sorted(report.diagnosis, key=lambda f: order.index(f.severity)):
        together.setdefault((finding.severity, finding.rule, finding.advice), []).append(finding)
    return tuple(
        _Group(
            id=f"finding-{i}",
            severity=severity,
            label=_SEVERITIES[severity],
            title=_RULES.get(rule, rule.replace("-", " ").capitalize()),
            findings=tuple((f, index.get(f.layer, "")) for f in findings),
            advice=advice,
            recipe=_joined(f.recipe for f in findings),
        )
        for i, ((severity, rule, advice), findings) in enumerate(together.items())
    )


def _joined(recipes: Iterable[str]) -> str:
    """Recipe lines of several findings, each once."""
    return "\n\n".join(dict.fromkeys(r.strip() for r in recipes if r.strip()))


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested plain values as rows: "sha256 test" -> its hash."""
    if isinstance(value, Mapping):
        return [row for key, item in value.items() for row in _flat(item, f"{name} {key}".strip())]
    if isinstance(value, list | tuple):
        return [(name, ", ".join(map(str, value)))]
    if isinstance(value, int) and not isinstance(value, bool):
        return [(name, numbers.count(value))]
    return [(name, str(value))]


# -- the template --------------------------------------------------------------------------------


def _template(name: str) -> str:
    return (files("intact.report") / "templates" / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """What the page's security policy names, so that no other script can run in it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@cache
def _environment() -> Environment:
    environment = Environment(
        autoescape=True,
        loader=FunctionLoader(_template),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    texts: Mapping[str, Callable[..., str]] = {
        "count": numbers.count,
        "decibel": numbers.decibel,
        "extent": numbers.extent,
        "percent": percent,
        "points": numbers.points,
        "real": numbers.real,
        "shape": lambda shape: "×".join(map(str, shape)) or "scalar",
        "share": numbers.share,
        "short_count": numbers.short_count,
        "size": numbers.size,
    }
    environment.filters.update({name: _typeset(f) for name, f in texts.items()})
    environment.filters.update(
        {
            "text": numbers.minus_and_spaces,
            "at": lambda fraction: f"{100 * fraction:.2f}%",
            "packed": _packed,
            "bare": lambda text: text.rsplit("\N{NO-BREAK SPACE}", 1)[0],
            "dash": lambda text: text.replace(" to ", "\N{EN DASH}"),
            "flat": _flat,
            "product": math.prod,
            "quality": lambda sqnr: min(max(sqnr / 60, 0.0), 1.0),
        }
    )
    environment.globals.update(
        sentence=words.sentence,
        outputs_note=words.outputs_note,
        stage_title=words.stage_title,
        explanation=words.explanation,
    )
    return environment


def _typeset(write: Callable[..., str]) -> Callable[..., str]:
    return lambda *args: numbers.minus_and_spaces(write(*args))


def _packed(values: Sequence[float]) -> str:
    """Numbers for the page's script, four digits each, an empty field for 0."""
    return ",".join(
        "" if v == 0 else str(v) if isinstance(v, int) else f"{v:.4g}".replace("e+0", "e")
        for v in values
    )
