"""The report: its sentences, its JSON, and the page as text."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intact.analysis import Histogram, TensorAnalysis
from intact.errors import IntactError, StorageError
from intact.report import render, report_from_json, report_to_json, sentence, verdict
from intact.report.axes import Axis, round_ticks
from intact.report.numbers import minus_and_spaces, points, real, share, size
from intact.report.plots import (
    HEIGHT,
    channel_plot,
    code_plot,
    histogram_plot,
    signal_plot,
    stage_plot,
)
from intact.report.value import Report
from intact.significance import percent
from intact.staged import UnlabelledResult
from report_fixture import deep_report, lenet_report, stage

LENET = lenet_report()
LAB = lenet_report(lab=True)
PAGE = render(LENET)
FLOAT = stage("float", 7200, 0, 0, 1.0)


# -- sentences -----------------------------------------------------------------------------------


def test_a_difference_that_chance_explains_is_called_noise() -> None:
    base = dataclasses.replace(FLOAT, correct=5207, accuracy=0.5207)
    other = dataclasses.replace(
        base, name="integer", accuracy=0.5211, flips_to_right=131, flips_to_wrong=127, p_value=0.852
    )
    assert sentence(other, base) == (
        "52.11 % against 52.07 %: 131 images became right, 127 wrong; such a difference is noise, "
        "p = 0.85"
    )


def test_a_significant_loss_is_stated_in_points_with_its_interval() -> None:
    text = sentence(stage("bias-unscaled", 6744, 631, 175, 3e-98, 0.006), FLOAT)
    assert text == (
        "67.44 % against 72.00 %: 175 images became right, 631 wrong; such a difference is not "
        "noise, p < 0.001: it costs 4.6 points (95 % interval 4.0 to 5.2)"
    )


def test_a_significant_gain_is_not_called_a_cost() -> None:
    text = sentence(stage("integer", 7230, 10, 40, 0.00002, 0.0013), FLOAT)
    assert text.endswith("it gains 0.30 points (95 % interval 0.17 to 0.43)")


@pytest.mark.parametrize(
    ("p", "noise", "written"),
    [(0.05, True, "p = 0.05"), (0.049, False, "p = 0.049"), (0.0012, False, "p = 0.0012")],
)
def test_noise_begins_at_five_percent(p: float, noise: bool, written: str) -> None:
    text = sentence(stage("integer", 7180, 60, 40, p, 0.002), FLOAT)
    assert ("is noise" in text) == noise
    assert ("is not noise" in text) != noise
    assert written in text


def test_sentences_of_special_cases() -> None:
    same = dataclasses.replace(stage("weights", 7200, 0, 0, 1.0), agreement=1.0)
    assert sentence(same, FLOAT) == "72.00 % against 72.00 %: every prediction is the same"
    other = dataclasses.replace(same, agreement=0.99)
    assert sentence(other, FLOAT).endswith("no image became right or wrong")
    assert "1 image became right, 0 wrong" in sentence(stage("weights", 7201, 0, 1, 1.0), FLOAT)
    assert sentence(FLOAT, FLOAT) == (
        "72.00 %: 7,200 of 10,000 images are right (95 % interval 71.1 to 72.9 %)"
    )


def test_the_verdict_is_about_the_program_wherever_its_stage_stands() -> None:
    expected = (
        "As integers only: 71.93 % against 72.00 % in float; 34 images became right, 41 wrong; "
        "such a difference is noise, p = 0.49. 68 kB instead of 248 kB."
    )
    assert verdict(LENET) == expected
    moved = dataclasses.replace(LENET, stages=(*LENET.stages[:3], *LENET.stages[:2:-1]))
    assert moved.stages[-1].name == "bias-unscaled"
    assert verdict(moved) == expected


def test_a_verdict_without_flips_claims_no_more_than_was_seen() -> None:
    quiet = dataclasses.replace(stage("integer", 7200, 0, 0, 1.0), agreement=0.99)
    report = dataclasses.replace(LENET, stages=(FLOAT, quiet))
    start = "As integers only: 72.00 %, with "
    assert verdict(report).startswith(f"{start}the same images right as in float. ")
    same = dataclasses.replace(report, stages=(FLOAT, dataclasses.replace(quiet, agreement=1.0)))
    assert verdict(same).startswith(f"{start}every prediction as in float. ")


# -- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1.00"),
        (-0.0123456, "-0.0123"),
        (999.9, "1,000"),
        (123456.7, "123,457"),
        (1e-7, "1.00 × 10⁻⁷"),
        (-2.5e9, "-2.50 × 10⁹"),
    ],
)
def test_reals_have_three_significant_digits(value: float, text: str) -> None:
    assert real(value) == text


@given(st.floats(-1e300, 1e300))
def test_a_real_reads_back_to_within_its_digits(value: float) -> None:
    text = real(value).replace(",", "").replace(" × 10", "e")
    back = float(text.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")))
    assert abs(back - value) <= 0.00501 * abs(value)


def test_figures_never_claim_more_than_they_know() -> None:
    assert [percent(0.96111, 360), percent(0.5207, 10_000)] == ["96.1 %", "52.07 %"]
    assert [points(-0.0007, 10_000), points(1e-9, 10_000)] == ["-0.07", "0.00"]
    assert [share(x) for x in (0, 1e-9, 0.0027, 0.5, 0.99999, 1)] == [
        "0 %",
        "< 0.01 %",
        "0.27 %",
        "50.0 %",
        "> 99.9 %",
        "100 %",
    ]
    assert [size(x) for x in (12, 5_500, 62_400, 1_250_000)] == [
        "12 bytes",
        "5.5 kB",
        "62 kB",
        "1.2 MB",
    ]


def test_typesetting_changes_signs_and_spaces_only_where_they_belong_to_numbers() -> None:
    text = minus_and_spaces("-0.5 to 3 dB, p = 0.49")
    assert text == "\u22120.5 to 3\u00a0dB, p\u00a0=\u00a00.49"
    plain = "bias-unscaled int-8 layer-1 k -o"
    assert minus_and_spaces(plain) == plain


# -- JSON ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("report", [LENET, LAB, deep_report(3)], ids=["default", "lab", "deep"])
def test_json_reads_back_to_the_same_report_and_the_same_bytes(report: Report) -> None:
    text = report_to_json(report)
    back = report_from_json(text)
    assert back == report
    assert report_to_json(back) == text


def test_json_has_the_documented_keys_in_a_stable_order() -> None:
    document = json.loads(report_to_json(LENET))
    assert list(document) == [
        "format", "title", "command", "stages", "inputs", "layers", "diagnosis", "program",
        "recipe", "recipe_toml", "data", "seed", "versions",
    ]  # fmt: skip
    assert list(document["stages"][0])[:5] == ["name", "correct", "total", "accuracy", "interval"]
    assert {"sha256", "bytes", "float_bytes"} <= set(document["program"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1: 2}])
def test_json_refuses_to_write_what_it_cannot_hold(value: Any) -> None:
    report = dataclasses.replace(LENET, data={"name": value})
    with pytest.raises(IntactError, match=r"report\.data\.name"):
        report_to_json(report)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"format": 2', '"format": 1', "format 1"),
        ('"format": 2', '"format": true', "format True"),
        ('"format": 2,', "", "format None"),
        ('"seed": 0', '"seed": "0"', r"report\.seed must be of type int, but is '0'"),
        ('"seed": 0', '"seed": false', r"report\.seed"),
        ('"seed": 0', '"seed": 0, "seed": 1', "twice"),
        ('"seed": 0', '"sead": 0', "lacks 'seed'"),
        ('"seed": 0', '"seed": 0, "more": 1', "unknown key, 'more'"),
        ('"correct": 7200', '"correct": 7200.5', r"report\.stages\[0\]\.correct"),
        ('"total": 10000', '"total": 0', "at least one image"),
        ('"accuracy": 0.72', '"accuracy": NaN', "NaN"),
        ('"accuracy": 0.72', '"accuracy": 1e999', r"stages\[0\]\.accuracy must be a finite number"),
        ('"accuracy": 0.72', f'"accuracy": 1{"0" * 400}', "finite number"),
        ('"severity": "problem"', '"severity": "fatal"', r"diagnosis\[0\]\.severity"),
        ('"bits": 8', '"bits": 64', "bits is 64"),
        ('"qmin": -128', '"qmin": -127', "one count per code"),
        ('"classes": 10', '"classes": 1e999', r"report\.data\.classes"),
        ('"min": -1.0', '"min": -1e300', r"report\.inputs\.input: .* float32"),
    ],
)
def test_a_malformed_file_is_an_error_that_says_where(old: str, new: str, message: str) -> None:
    text = report_to_json(LENET)
    assert old in text
    with pytest.raises(StorageError, match=message):
        report_from_json(text.replace(old, new, 1))


def test_a_report_without_any_input_is_refused() -> None:
    text = report_to_json(dataclasses.replace(LENET, inputs={}))
    with pytest.raises(StorageError, match=r"report\.inputs must name at least one input"):
        report_from_json(text)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"format": 2}'])
def test_what_is_no_report_at_all_is_an_error(text: str) -> None:
    with pytest.raises(StorageError):
        report_from_json(text)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a document; of long lists of numbers the first entry only."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield value, key
            yield from _places(item)
    elif isinstance(value, list) and value:
        yield value, 0
        yield from _places(value[0])


def test_a_wrong_value_anywhere_is_an_intact_error_or_a_report_that_renders() -> None:
    document = json.loads(report_to_json(dataclasses.replace(LENET, layers=LENET.layers[:1])))
    count = 0
    for container, key in list(_places(document)):
        kept = container[key]
        for wrong in (None, -1, [], "<b>"):
            container[key] = wrong
            try:
                report = report_from_json(json.dumps(document))
            except IntactError:
                count += 1
            else:
                assert "</html>" in render(report) if count % 20 == 0 else report
        container[key] = kept
    assert count > 200


# -- plots ---------------------------------------------------------------------------------------


def _staircase(path: str) -> list[tuple[int, int]]:
    """The corners that an SVG path of M, H, h and v visits."""
    corners, x, y = [], 0, 0
    for command, first, second in re.findall(r"([MHhv])(-?\d+)(?: (-?\d+))?", path):
        n = int(first)
        match command:
            case "M":
                x, y = n, int(second)
            case "H":
                x = n
            case "h":
                x += n
            case "v":
                y += n
        corners.append((x, y))
    return corners


def _paths(svg: str, name: str) -> list[str]:
    return re.findall(rf'<path class="{name}" d="([^"]*)"', svg)


def _tensor(counts: tuple[float, ...], **changes: Any) -> TensorAnalysis:
    histogram = Histogram(-1.0, 1.0, counts, counts[::-1])
    fields = {"histogram": histogram, "min": -1.0, "max": 1.0, "range": (-1.0, 1.0), **changes}
    return dataclasses.replace(LENET.inputs["input"], **fields)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40))
def test_the_area_under_a_histogram_is_that_of_its_counts(counts: list[int]) -> None:
    plot = histogram_plot(_tensor(tuple(map(float, counts))))
    linear = plot.svg.split('class="log"')[0]
    corners = _staircase(_paths(linear, "before")[0])
    area = sum((b[0] - a[0]) * (HEIGHT - a[1]) for a, b in itertools.pairwise(corners))
    cut = sorted([*map(max, zip(counts, counts[::-1], strict=True)), 0, 0])[-3]
    if plot.cut is None:
        top = max(1, *counts)
        expected = sum(counts) / len(counts) / (1.04 * top) * HEIGHT * 1024
        assert abs(area - expected) <= 0.02 * HEIGHT * 1024
    else:
        assert max(counts) > 4 * cut
    assert corners[0] == (0, HEIGHT)
    assert corners[-1] == (1024, HEIGHT)


def test_a_peak_that_would_flatten_the_rest_is_cut_and_labelled() -> None:
    counts = (90_000.0, *[100.0 - i for i in range(50)])
    tensor = _tensor(counts, histogram=Histogram(-1.0, 1.0, counts, counts))
    plot = histogram_plot(tensor)
    assert plot.cut is not None
    assert plot.cut.label == "90,000 (96%)"
    assert histogram_plot(_tensor(tuple([10.0] * 20))).cut is None


def test_unused_codes_and_codes_out_of_reach_are_told_apart() -> None:
    codes = tuple(5 if i % 2 else 0 for i in range(128))
    plot = code_plot(_tensor((1.0,), codes=codes, qmin=0, qmax=127, zero_point=0))
    assert (plot.used, plot.barred, plot.total, plot.first) == (64, 128, 256, -128)
    assert _paths(plot.svg, "barred") == ["M0 0H512V100H0z"]
    assert _paths(plot.svg, "unused")[0].count("M") == 64


@pytest.mark.parametrize(
    "changes",
    [
        {"min": 0.0, "max": 0.0, "range": (0.0, 0.0), "histogram": Histogram(0, 0, (0.0,), (0.0,))},
        {"codes": (1, 0, 0, 7), "qmin": -2, "qmax": 1, "bits": 2, "type_name": "int2"},
        {"codes": (3,) * 256, "qmin": 0, "qmax": 255, "zero_point": 8, "type_name": "uint8"},
        {"channel_min": (), "channel_max": ()},
        {"min": -3e38, "max": 3e38, "range": (-1e-38, 1e-38)},
        {"min": 0.0, "max": 5e-324, "range": (0.0, 0.0), "histogram": Histogram(0, 0, (1,), (1,))},
    ],
    ids=["constant", "two bits", "unsigned", "no channels", "huge", "tiny"],
)
def test_unusual_tensors_are_drawn(changes: dict[str, Any]) -> None:
    tensor = _tensor((1.0, 2.0), **changes)
    for svg in (histogram_plot(tensor).svg, code_plot(tensor).svg):
        assert not re.search("nan|inf|e[+-]", svg)
    assert (channel_plot(tensor) is None) == (len(tensor.channel_min) < 2)
    assert "</html>" in render(dataclasses.replace(LENET, inputs={"input": tensor}))


@given(st.floats(-1e4, 1e4), st.floats(1e-3, 1e6), st.integers(2, 8))
def test_ticks_are_round_numbers_within_the_axis(low: float, length: float, most: int) -> None:
    axis = Axis(low, low + length)
    ticks = round_ticks(axis, most)
    assert len(ticks) <= most + 1
    assert all(0 <= tick.at <= 1 for tick in ticks)
    steps = [b.at - a.at for a, b in itertools.pairwise(ticks)]
    assert all(abs(step - steps[0]) < 1e-6 for step in steps)


def test_ticks_of_an_axis_that_everyone_knows() -> None:
    labels = [tick.label for tick in round_ticks(Axis(-0.31, 0.52), 5)]
    assert labels == ["-0.2", "0", "0.2", "0.4"]
    assert [t.label for t in round_ticks(Axis(0, 52_000), 3, short=True)] == ["0", "20k", "40k"]


# -- the page ------------------------------------------------------------------------------------


class _Reader(HTMLParser):
    """Collects ids, tags, attributes and visible text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text: list[str] = []
        self.hidden = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden = tag in ("script", "style")
        self.tags.append(tag)
        for name, value in attrs:
            self.attributes.add(name)
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "action", "data", "poster", "srcset"):
                self.links.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        self.hidden = self.hidden and tag not in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.text.append(data)


def test_rendering_is_deterministic() -> None:
    assert render(lenet_report()) == PAGE
    assert render(LAB) != PAGE


def test_the_page_holds_every_layer_stage_and_finding() -> None:
    text = minus_and_spaces("".join(_Reader(PAGE).text))
    for layer in LENET.layers:
        assert text.count(layer.name) >= 3
    for result in LENET.stages:
        assert minus_and_spaces(sentence(result, LENET.stages[0])) in text
    for finding in LENET.diagnosis:
        assert minus_and_spaces(finding.message) in text
        assert minus_and_spaces(finding.recipe) in text
    for fact in (LENET.command, LENET.program.sha256, LENET.recipe_toml.strip(), "2.13.0"):
        assert fact in text


def test_the_page_loads_nothing_and_its_links_stay_inside() -> None:
    reader = _Reader(PAGE)
    assert len(set(reader.ids)) == len(reader.ids)
    targets = {link[1:] for link in reader.links if link.startswith("#")}
    assert targets <= set(reader.ids)
    assert [link for link in reader.links if not link.startswith("#")] == ["data:,"]
    assert not re.search(r"https?://|@import|url\(", PAGE)
    assert "default-src 'none'" in PAGE


HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}'</style>"


def test_hostile_text_stays_text() -> None:
    layers = tuple(
        dataclasses.replace(layer, name=HOSTILE + layer.name, op=HOSTILE, inputs=(HOSTILE,))
        for layer in LENET.layers
    )
    findings = tuple(
        dataclasses.replace(
            f, rule=HOSTILE, layer=layers[0].name, message=HOSTILE, advice=HOSTILE, recipe=HOSTILE
        )
        for f in LENET.diagnosis
    )
    stages = (LENET.stages[0], dataclasses.replace(LENET.stages[1], name=HOSTILE))
    report = dataclasses.replace(
        LENET,
        title=HOSTILE,
        command=HOSTILE,
        layers=layers,
        diagnosis=findings,
        stages=stages,
        program=dataclasses.replace(LENET.program, sha256=HOSTILE),
        recipe_toml=HOSTILE,
        data={HOSTILE: [HOSTILE]},
        versions={HOSTILE: HOSTILE, "intact": HOSTILE},
        inputs={HOSTILE: dataclasses.replace(LENET.inputs["input"], type_name=HOSTILE)},
    )
    reader, calm = _Reader(render(report)), _Reader(PAGE)
    assert reader.tags.count("script") == 1
    assert set(reader.tags) <= set(calm.tags)
    assert reader.attributes <= calm.attributes
    assert HOSTILE in "".join(reader.text)


def test_a_report_with_next_to_nothing_in_it_is_still_a_page() -> None:
    report = dataclasses.replace(
        LENET,
        stages=LENET.stages[:1],
        layers=(),
        diagnosis=(),
        data={},
        versions={},
        recipe_toml="",
    )
    assert "No rule found anything" in render(report)


UNLABELLED = dataclasses.replace(
    LENET,
    stages=(
        UnlabelledResult("float", 1000, 1000, 1.0, (0.9962, 1.0), None),
        UnlabelledResult("weights", 998, 1000, 0.998, (0.9927, 0.9995), 41.25),
        UnlabelledResult("bias-unscaled", 312, 1000, 0.312, (0.284, 0.3414), -1.5),
        UnlabelledResult("integer", 1000, 1000, 1.0, (0.9962, 1.0), 31.04),
    ),
)


def test_without_labels_the_page_speaks_of_signal_and_noise_and_of_no_accuracy() -> None:
    text = minus_and_spaces("".join(_Reader(render(UNLABELLED)).text))
    assert "every prediction is as in float; the outputs carry 31.0 dB" in " ".join(text.split())
    for shown in ("41.2 dB", "−1.5 dB", "99.80 %", "31.20 %", "28.4 % to 34.1 %", "1,000 samples"):
        assert minus_and_spaces(shown) in text, shown
    assert not re.search("accuracy|became|images that changed", text, re.IGNORECASE)


def test_signals_are_drawn_from_zero_to_the_best() -> None:
    plot = signal_plot(UNLABELLED.stages)
    assert plot.at[0] is None
    assert plot.at[2] == 0.0  # more noise than signal
    assert plot.at[3] == pytest.approx(31.04 / (1.05 * 41.25))
    exact = [dataclasses.replace(stage, sqnr_db=None) for stage in UNLABELLED.stages]
    assert set(signal_plot(exact).at) == {None}
    assert "exact" in render(dataclasses.replace(UNLABELLED, stages=tuple(exact)))


def test_stages_with_and_without_accuracies_do_not_mix() -> None:
    text = report_to_json(UNLABELLED)
    assert report_from_json(text) == UNLABELLED
    document = json.loads(text)
    document["stages"][0] = json.loads(report_to_json(LENET))["stages"][0]
    with pytest.raises(StorageError, match="stages with accuracies, and stages without"):
        report_from_json(json.dumps(document))


def test_sentences_without_labels() -> None:
    first, weights, *_ = UNLABELLED.stages
    assert sentence(first, first) == "the yardstick, on 1,000 samples without labels"
    assert sentence(weights, first) == (
        "99.80 % of the predictions are as in float; the outputs carry 41.2 dB"
    )
    assert verdict(UNLABELLED).startswith("As integers only: every prediction is as in float; ")


def test_a_card_shows_few_findings_and_folds_the_rest() -> None:
    finding = LENET.diagnosis[-1]
    for count, folded in ((6, 0), (7, 2), (40, 35)):
        report = dataclasses.replace(LENET, diagnosis=(finding,) * count)
        page = render(report)
        assert page.count('<details class="more">') == (folded > 0)
        assert folded == 0 or f"<summary>{folded} more</summary>" in page


def test_a_page_is_light_enough_for_a_mail() -> None:
    sizes = {
        "LeNet": len(PAGE.encode()),
        "50 convolutions": len(render(deep_report(50)).encode()),
    }
    print({name: size(n) for name, n in sizes.items()})  # noqa: T201
    assert sizes["LeNet"] < 250_000
    assert sizes["50 convolutions"] < 1_100_000


def test_a_stage_far_below_does_not_squeeze_the_others():
    report = lenet_report()
    first = report.stages[0]
    lost = dataclasses.replace(first, name="bias-unscaled", accuracy=first.accuracy - 0.4)
    near = dataclasses.replace(first, name="integer", accuracy=first.accuracy - 0.001)
    plot = stage_plot([first, lost, near])
    assert plot.off == (False, True, False)
    assert plot.high[0] - plot.low[0] > 0.5
    assert stage_plot([first, near]).low[0] == plot.low[0]
