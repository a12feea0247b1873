"""Plots as inline SVG: few paths, no text, stretched to whatever width the page gives them.

An SVG that stretches must not hold text, so labels are HTML on top of it, placed in percent: they
keep their size on a phone. Colours are CSS classes, so that a plot follows the page's theme.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from intact.analysis import TensorAnalysis
from intact.report.axes import Axis, Tick, log_ticks, round_ticks
from intact.staged import StageResult, UnlabelledResult

__all__ = [
    "ChannelPlot",
    "CodePlot",
    "HistogramPlot",
    "SignalPlot",
    "StagePlot",
    "channel_plot",
    "code_plot",
    "histogram_plot",
    "signal_plot",
    "stage_plot",
]

WIDTH, HEIGHT = 1024, 250
"""Units of the drawing area, about half a pixel each; 256 codes are 4 units wide, exactly."""
LOG_FLOOR = 0.5
"""Where the logarithmic count axis begins, so that a count of 1 can be seen."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A value worth a line across the histogram: `kind` is "sigma" or "mean"."""

    at: float
    label: str
    kind: str


@dataclass(frozen=True, slots=True)
class HistogramPlot:
    """Float values filled, quantized values outlined; both with linear and logarithmic counts.

    x, linear, log  ticks of the values, and of the counts on both scales
    low, high       the values that `first` and `last`, fractions of the width, stand for
    cut             the one bin that leaves the linear plot at its top, and its count; or None
    """

    svg: Markup
    rails: Markup
    x: tuple[Tick, ...]
    linear: tuple[Tick, ...]
    log: tuple[Tick, ...]
    marks: tuple[Mark, ...]
    low: float
    high: float
    first: float
    last: float
    cut: Tick | None


@dataclass(frozen=True, slots=True)
class CodePlot:
    """How often each code of the type occurs, logarithmically.

    used, barred, total  codes that occur, that the layer's clamp excludes, and all of the type
    first                the type's lowest code
    """

    svg: Markup
    ticks: tuple[Tick, ...]
    used: int
    barred: int
    total: int
    first: int


@dataclass(frozen=True, slots=True)
class ChannelPlot:
    """Smallest and largest value of every channel, over the range that its grid covers."""

    svg: Markup
    y: tuple[Tick, ...]


@dataclass(frozen=True, slots=True)
class StagePlot:
    """The accuracies of all stages on one axis, and their flips on another.

    off  stages so far below that an axis which holds them would leave nothing to see of the others
    """

    ticks: tuple[Tick, ...]
    reference: float
    low: tuple[float, ...]
    dot: tuple[float, ...]
    high: tuple[float, ...]
    off: tuple[bool, ...]
    wrong: tuple[float, ...]
    right: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class SignalPlot:
    """The signal-to-noise ratios of all stages on one axis from 0; None for float itself."""

    ticks: tuple[Tick, ...]
    at: tuple[float | None, ...]


def histogram_plot(tensor: TensorAnalysis) -> HistogramPlot:
    """The values of a tensor before and after, with its range, mean and three sigma."""
    h = tensor.histogram
    axis = Axis.around(h.low, h.high, tensor.min, tensor.max, *tensor.range)
    tallest = [max(pair) for pair in zip(h.before, h.after, strict=True)]
    top, cut = max(1.0, *tallest), _cut(tallest)
    edges = [
        round(WIDTH * axis.at(h.low + (h.high - h.low) * i / len(h.before)))
        for i in range(len(h.before) + 1)
    ]
    linear = round_ticks(Axis(0, 1.04 * cut), 4, short=True)[1:]
    log = log_ticks(LOG_FLOOR, 1.3 * top)
    parts = [_box("band", axis.at(tensor.range[0]), axis.at(tensor.range[1]))]
    for name, ticks in (("linear", linear), ("log", log)):
        parts.append(f'<g class="{name}"><path class="grid" d="{_across(ticks)}"/>')
        for series, counts in (("before", h.before), ("after", h.after)):
            if name == "linear":
                heights = [_linear_height(c, cut) for c in counts]
            else:
                heights = [_log_height(c, top) for c in counts]
            parts.append(f'<path class="{series}" d="{_steps(edges, heights)}"/>')
        parts.append("</g>")
    marks = _marks(tensor, axis)
    for kind in ("sigma", "mean"):
        lines = "".join(f"M{_x(m.at)} 0V{HEIGHT}" for m in marks if m.kind == kind)
        if lines:
            parts.append(f'<path class="{kind}" d="{lines}"/>')
    return HistogramPlot(
        svg=_svg(HEIGHT, parts),
        rails=_rails(tensor, axis),
        x=round_ticks(axis, 6),
        linear=linear,
        log=log,
        marks=_readable(marks),
        low=h.low,
        high=h.high,
        first=axis.at(h.low),
        last=axis.at(h.high),
        cut=_cut_label(tallest, cut, edges),
    )


def code_plot(tensor: TensorAnalysis) -> CodePlot:
    """The codes of a tensor over all codes of its type."""
    total = 2**tensor.bits
    first = 0 if tensor.type_name.startswith("u") else -total // 2
    height, step = 100, WIDTH / total
    top = max(1, *tensor.codes)
    edges = [round(step * (tensor.qmin - first + i)) for i in range(len(tensor.codes) + 1)]
    heights = [round(_log_height(c, 1.0 * top) * height / HEIGHT) for c in tensor.codes]
    unused = [c == 0 for c in tensor.codes]
    parts = [
        f'<path class="used" d="{_steps(edges, heights, height)}"/>',
        f'<path class="unused" d="{_runs(edges, unused, height)}"/>',
    ]
    barred = [(0, edges[0]), (edges[-1], WIDTH)]
    path = "".join(f"M{a} 0H{b}V{height}H{a}z" for a, b in barred if b > a)
    if path:
        parts.append(f'<path class="barred" d="{path}"/>')
    ends = (first, tensor.zero_point, first + total - 1)
    ticks = [Tick((code - first + 0.5) / total, str(code)) for code in dict.fromkeys(ends)]
    return CodePlot(
        svg=_svg(height, parts),
        ticks=tuple(ticks),
        used=unused.count(False),
        barred=total - len(tensor.codes),
        total=total,
        first=first,
    )


def channel_plot(tensor: TensorAnalysis) -> ChannelPlot | None:
    """The extent of every channel; None where there are not at least two channels."""
    n = len(tensor.channel_min)
    if n < 2:
        return None
    scales = tensor.scale if len(tensor.scale) == n else tensor.scale[:1] * n
    lows = [s * (tensor.qmin - tensor.zero_point) for s in scales]
    highs = [s * (tensor.qmax - tensor.zero_point) for s in scales]
    axis = Axis.around(0.0, *lows, *highs, *tensor.channel_min, *tensor.channel_max)
    height = 200
    down = [round(height * (1 - axis.at(v))) for v in lows]
    up = [round(height * (1 - axis.at(v))) for v in highs]
    edges = [round(WIDTH * i / n) for i in range(n + 1)]
    band = f"M0 {up[0]}" + "".join(f"V{y}H{x}" for y, x in zip(up, edges[1:], strict=True))
    band += "".join(f"V{y}H{x}" for y, x in zip(reversed(down), edges[-2::-1], strict=True)) + "z"
    bars = "".join(
        f"M{round(WIDTH * (i + 0.5) / n)} {round(height * (1 - axis.at(low)))}"
        f"V{round(height * (1 - axis.at(high)))}"
        for i, (low, high) in enumerate(zip(tensor.channel_min, tensor.channel_max, strict=True))
    )
    zero = round(height * (1 - axis.at(0)))
    width = "wide" if n <= 32 else "narrow" if n <= 128 else "hair"
    parts = [
        f'<path class="band" d="{band}"/>',
        f'<path class="grid" d="M0 {zero}H{WIDTH}"/>',
        f'<path class="channel {width}" d="{bars}"/>',
    ]
    return ChannelPlot(_svg(height, parts), round_ticks(axis, 3))


FAR_OFF = 3
"""A stage that many interval widths below float is left off the axis."""


def stage_plot(stages: Sequence[StageResult]) -> StagePlot:
    """Positions of all stages: accuracies in percent, flips as a share of the largest count."""
    low, high = stages[0].interval
    off = [stages[0].accuracy - s.accuracy > FAR_OFF * (high - low) for s in stages]
    shown = [s for s, far in zip(stages, off, strict=True) if not far]
    ends = [100 * end for s in shown for end in (*s.interval, s.accuracy)]
    axis = Axis.around(*ends, margin=0.06)
    most = max(1, *(max(s.flips_to_wrong, s.flips_to_right) for s in shown))
    return StagePlot(
        ticks=round_ticks(axis, 5),
        reference=axis.at(100 * stages[0].accuracy),
        low=tuple(axis.at(100 * s.interval[0]) for s in stages),
        dot=tuple(axis.at(100 * s.accuracy) for s in stages),
        high=tuple(axis.at(100 * s.interval[1]) for s in stages),
        off=tuple(off),
        wrong=tuple(0.0 if s not in shown else s.flips_to_wrong / most for s in stages),
        right=tuple(0.0 if s not in shown else s.flips_to_right / most for s in stages),
    )


def signal_plot(stages: Sequence[UnlabelledResult]) -> SignalPlot:
    """Positions of all stages whose outputs are compared with float's; below 0 dB is at 0."""
    known = [s.sqnr_db for s in stages if s.sqnr_db is not None]
    axis = Axis(0, 1.05 * max(20.0, *known, 0.0))
    return SignalPlot(
        ticks=round_ticks(axis, 5),
        at=tuple(None if s.sqnr_db is None else max(axis.at(s.sqnr_db), 0.0) for s in stages),
    )


# -- parts ---------------------------------------------------------------------------------------


def _svg(height: int, parts: Iterable[str]) -> Markup:
    """Only numbers and class names of this module go in: no text of the report."""
    return Markup(  # noqa: S704
        f'<svg viewBox="0 0 {WIDTH} {height}" preserveAspectRatio="none" aria-hidden="true">'
        + "".join(parts)
        + "</svg>"
    )


def _x(at: float) -> int:
    return round(WIDTH * at)


def _box(name: str, low: float, high: float) -> str:
    return f'<path class="{name}" d="M{_x(low)} 0H{_x(high)}V{HEIGHT}H{_x(low)}z"/>'


def _across(ticks: Iterable[Tick]) -> str:
    return "".join(f"M0 {round(HEIGHT * (1 - t.at))}H{WIDTH}" for t in ticks)


def _cut(counts: Sequence[float]) -> float:
    """Where the linear axis ends: at the largest count, unless that one would flatten all others.

    After a ReLU half of all values are 0, all in one bin; of the rest nothing could be seen.
    """
    first, *others = sorted(counts, reverse=True)
    # The peak may straddle the border of two bins.
    rest = others[1] if len(others) > 1 else 0.0
    return 1.25 * rest if rest >= 1 and first > 4 * rest else max(1.0, first)


def _cut_label(counts: Sequence[float], cut: float, edges: Sequence[int]) -> Tick | None:
    top = max(counts)
    if top <= cut:
        return None
    i = counts.index(top)
    share = top / sum(counts)
    return Tick((edges[i] + edges[i + 1]) / 2 / WIDTH, f"{top:,.0f} ({share:.0%})")


def _linear_height(count: float, top: float) -> int:
    return min(round(HEIGHT * count / (1.04 * top)), HEIGHT + 2)


def _log_height(count: float, top: float) -> int:
    """Never 0 for a count that is not: rare values are what the scale is for."""
    if count <= 0:
        return 0
    part = math.log(max(count, LOG_FLOOR) / LOG_FLOOR) / math.log(1.3 * top / LOG_FLOOR)
    return max(round(HEIGHT * part), 3)


def _steps(edges: Sequence[int], heights: Sequence[int], base: int = HEIGHT) -> str:
    """A staircase over `edges`, from the base line and back to it; equal neighbours are merged."""
    path, at, level = [f"M{edges[0]} {base}"], edges[0], 0
    for start, height in zip((*edges[:-1], edges[-1]), (*heights, 0), strict=True):
        if height != level:
            path.append((f"h{start - at}" if start > at else "") + f"v{level - height}")
            at, level = start, height
    return "".join(path) + f"H{edges[-1]}"


def _runs(edges: Sequence[int], chosen: Sequence[bool], y: int) -> str:
    """Horizontal strokes along every run of chosen bins."""
    path: list[str] = []
    for i, wanted in enumerate(chosen):
        if not wanted:
            continue
        if i and chosen[i - 1]:
            path[-1] = f"H{edges[i + 1]}"
        else:
            path += [f"M{edges[i]} {y}", f"H{edges[i + 1]}"]
    return "".join(path)


def _rails(tensor: TensorAnalysis, axis: Axis) -> Markup:
    """Two rails under the histogram: the extent of the floats, and the chosen range.

    The first is thick within three sigma of the mean.
    """
    low, high = _x(axis.at(tensor.min)), _x(axis.at(tensor.max))
    inner = [_x(axis.at(min(max(v, tensor.min), tensor.max))) for v in tensor.three_sigma]
    a, b = (_x(axis.at(v)) for v in tensor.range)
    parts = [
        f'<path class="rail" d="M{low} 5V25M{low} 15H{high}M{high} 5V25"/>',
        f'<path class="core" d="M{inner[0]} 15H{inner[1]}"/>',
        f'<path class="range" d="M{a} 40V60M{a} 50H{b}M{b} 40V60"/>',
    ]
    return _svg(65, parts)


def _marks(tensor: TensorAnalysis, axis: Axis) -> tuple[Mark, ...]:
    low, high = tensor.three_sigma
    every = ((low, "-3σ", "sigma"), (tensor.mean, "mean", "mean"), (high, "+3σ", "sigma"))
    return tuple(Mark(axis.at(v), name, kind) for v, name, kind in every if axis.holds(v))


def _readable(marks: Sequence[Mark]) -> tuple[Mark, ...]:
    """The marks with labels that do not run into each other; the mean's gives way."""
    sigmas = [m for m in marks if m.kind == "sigma"]
    if len(sigmas) == 2 and sigmas[1].at - sigmas[0].at < 0.12:
        return (Mark((sigmas[0].at + sigmas[1].at) / 2, "±3σ", "sigma"),)
    return tuple(
        m for m in marks if m.kind == "sigma" or all(abs(m.at - s.at) > 0.11 for s in sigmas)
    )
