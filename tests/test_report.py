"""Reports: the same figures in every form, whole in themselves, safe with any text, and with any part missing."""

import copy
import io
import itertools
import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reports import HOSTILE, LABELS, made_report
from rich.console import Console

from aum_compress.errors import BundleError
from aum_compress.report import tables
from aum_compress.report.charts import Series, _ticks, dot_chart, line_chart
from aum_compress.report.html import render_html
from aum_compress.report.markdown import render_markdown
from aum_compress.report.quantisation import quantisation_section
from aum_compress.report.sections import MOST_LAYERS, sections
from aum_compress.report.tables import plain_lines, print_report, road_table
from aum_compress.report.verdict import verdict
from aum_compress.report.write import read_report, report_files


@pytest.fixture
def report() -> dict:
    return made_report()


@pytest.fixture
def early(report: dict) -> dict:
    """As after `run --until data`."""
    return report | {
        "road": [], "budget": None, "gated": None, "verification": {}, "training": {}, "pruning": None,
        "quantisation": None, "next": "",
    }  # fmt: skip


class Page(HTMLParser):
    """What a browser would build: balanced elements, tables as text, everything that could be fetched."""

    VOID = frozenset({"meta", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if any(tag in ("td", "th") for tag in self.open):
            self.rows[-1][-1] += data


def markdown_rows(text: str) -> list[list[str]]:
    rows = [line[2:-2].replace("\\", "").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if not set(row) <= {"---", "---:"}]


def test_the_three_forms_carry_the_same_figures(report):
    files = report_files(report)
    content = json.loads(files["report.json"])
    page, text = Page(files["report.html"].decode()), files["report.md"].decode()

    assert content == json.loads(json.dumps(report))
    assert page.rows == markdown_rows(text)
    for number, row in enumerate(content["road"]):
        accuracy, cost = (
            next(r for r in page.rows[start:] if r[0] == row["title"]) for start in (0, len(content["road"]) + 1)
        )
        assert accuracy[1:3] == [f"{row['precision']} {row['measured_with']}", f"{row['test']['accuracy']:.1f}"], number
        assert accuracy[3:5] == [f"{row['test'][group]:.1f}" for group in ("seen", "unseen")]
        assert cost[2:5] == [f"{row[key]:,}" for key in ("params", "param_bytes", "macs")]
    for form in ("".join(page.text), text):
        assert "98,765" in form
        assert f"{content['budget']['param_bytes']:,} of 128,000 bytes" in form
        assert report["next"] in form


def test_screen_carries_the_same_figures_in_100_columns(report):
    terminal = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    terminal.print(road_table(report))
    for lines in (terminal.file.getvalue().splitlines(), plain_lines(report)):
        assert max(map(len, lines)) <= 100
        for row in report["road"]:
            line = next(line for line in lines if line.startswith(row["title"]))
            assert f"{row['test']['accuracy']:.1f}" in line
            assert f"{row['param_bytes']:,}" in line
            assert f"{row['macs']:,}" in line
    text = "\n".join(plain_lines(report))
    assert "Within budget, every exported file verified" in text
    assert "of 30,000,000 MACs" in text
    assert "model-fp32.onnx  verified  3 of 3 checks, largest error 2.5e-06" in text
    assert text.endswith(f"next: {report['next']}")


@pytest.mark.parametrize("terminal", [False, True])
def test_print_report_on_a_terminal_and_in_a_pipe(report, monkeypatch, capsys, terminal):
    buffer = io.StringIO()
    console = Console(file=buffer, width=100, force_terminal=terminal, color_system=None, soft_wrap=True)
    monkeypatch.setattr(tables, "out", console)
    print_report(report, Path("exports/quickstart"))
    printed = buffer.getvalue() + capsys.readouterr().out
    assert "teacher (aum-tiny)" in printed
    assert "1,234,567,890" in printed
    assert Path("exports/quickstart/report.html").as_posix() in printed
    assert "\x1b[" not in printed


def test_page_is_whole_in_itself(report):
    text = report_files(report)["report.html"].decode()
    page = Page(text)
    assert page.links == ["data:,"]
    assert page.tags.isdisjoint({"script", "img", "iframe", "object", "base", "form"})
    assert "url(" not in text
    assert "@import" not in text
    assert "http:" not in text
    assert "https:" not in text
    assert "svg" in page.tags


def test_hostile_text_stays_text(report):
    hostile = report | {"recipe": HOSTILE, "next": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    hostile["data"] = report["data"] | {"labels": [HOSTILE, *LABELS], "seen_devices": [HOSTILE]}
    hostile["training"] = {HOSTILE: report["training"]["teacher"]}
    hostile["road"] = [row | {"title": HOSTILE} for row in report["road"]]
    for row in hostile["road"]:
        row["test"] = row["test"] | {"by_class": {HOSTILE: 1.0}, "by_device": {HOSTILE: 1.0, "": 2.0}}
    hostile["budget"]["layers"][0]["name"] = HOSTILE
    hostile["budget"]["notes"] = [HOSTILE]

    page = Page(render_html(hostile))
    assert page.tags.isdisjoint({"script", "a"})
    assert "".join(page.text).count(HOSTILE) > 10
    assert any(row[0] == "(none)" for row in page.rows)

    text = render_markdown(hostile)
    outside_code = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    assert "<script" not in outside_code.replace("\\<", "")
    assert "](" not in outside_code.replace("\\]", "")
    for line, following in itertools.pairwise(text.splitlines()):
        if line.startswith("|") and following.startswith("|"):  # a bar in a label makes no column
            assert line.replace("\\|", "").count("|") == following.replace("\\|", "").count("|")

    console = Console(file=io.StringIO(), width=400)
    console.print(road_table(report | {"road": [report["road"][0] | {"title": "[bold]x[/nothing]"}]}))
    assert "[bold]x[/nothing]" in console.file.getvalue()


def test_values_that_are_not_finite_become_null_and_a_dash(report):
    report["training"]["teacher"][3] |= {"train_loss": math.nan, "val_loss": math.inf, "val_accuracy": None}
    report["road"][0]["test"]["log_loss"] = math.inf
    report["verification"]["model-int8.onnx"]["checks"][1]["sqnr_db"] = math.nan
    files = report_files(report)

    def refuse(constant):
        raise AssertionError(constant)

    content = json.loads(files["report.json"], parse_constant=refuse)
    assert content["training"]["teacher"][3]["val_loss"] is None
    assert content["road"][0]["test"]["log_loss"] is None
    for form in (files["report.html"].decode(), files["report.md"].decode()):
        assert ">nan<" not in form
        assert "| nan" not in form
        assert "| inf" not in form
    assert files["report.html"].decode().count("<polyline") > 4  # the curve is broken at the gap, and goes on


def test_the_report_says_where_a_cpu_without_vnni_would_saturate(report):
    def text(**changes):
        found = quantisation_section(report | {"quantisation": report["quantisation"] | changes})
        return " ".join(found.paragraphs)

    assert "Weights of 7 bits: no sum of two products leaves 16 bits" in text()
    assert "1,234 pairs of weights can leave 16 bits" in text(weight_bits=8, saturating_pairs=1234)
    assert "nothing can saturate" in text(layers={"head": "int4-weight"})
    assert "76,543 bytes, +0.40 points lost on 512 validation clips; rolled back: patch_embed.stages.0.0." in text()


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        ({"verification": {}}, "verification"),
        ({"training": {}}, "training"),
        ({"training": {"teacher": []}}, "training"),
        ({"pruning": None}, "pruning"),
        ({"quantisation": None}, "quantisation"),
        ({"road": []}, "road"),
        ({"budget": None}, "layers"),
    ],
)
def test_a_part_without_figures_is_left_out(report, changes, absent):
    assert absent in {section.key for section in sections(report)}
    less = report | changes
    assert absent not in {section.key for section in sections(less)}
    Page(render_html(less))
    assert render_markdown(less)
    assert plain_lines(less)


def test_data_without_devices(report):
    report["data"] |= {"seen_devices": [], "unseen_devices": []}
    for row in report["road"]:
        for key in ("by_device", "seen", "unseen"):
            del row["test"][key]
    assert "devices" not in {section.key for section in sections(report)}
    assert "unseen devices" not in "\n".join([*verdict(report).facts])
    assert "unseen devices</li>" not in render_html(report)
    assert "unseen:" not in "\n".join(plain_lines(report))
    Page(render_html(report))


def test_before_any_model_there_is_a_report_all_the_same(early):
    files = report_files(early)
    assert "no model was made yet" in files["report.md"].decode()
    assert [section.key for section in sections(early)] == ["provenance"]
    Page(files["report.html"].decode())
    assert plain_lines(early) == ["", "No model was made yet"]


def test_verdicts(report):
    assert verdict(report).good is True
    assert verdict(report).headline == "Within budget, every exported file verified"

    unverified = report | {"verification": {}}
    assert verdict(unverified).good is None
    assert verdict(unverified).headline == "Within budget, not verified: model-fp32.onnx, model-int8.onnx"

    failed = copy.deepcopy(report)
    failed["verification"]["model-int8.onnx"]["passed"] = False
    assert verdict(failed).good is False
    assert "verification failed for model-int8.onnx" in verdict(failed).headline
    assert "FAILED" in render_html(failed)

    over = copy.deepcopy(report)
    over["budget"] = over["budget"] | {"verdict": "over", "param_bytes": 131_204}
    assert verdict(over).good is False
    assert "131,204 of 128,000 bytes of parameters (102.5 %)" in verdict(over).facts
    assert 'class="bar over"' in render_html(over)

    teacher_only = over | {"road": report["road"][:1], "gated": "02-teacher", "verification": {}}
    assert verdict(teacher_only).good is None
    assert verdict(teacher_only).headline == "Not exported yet; the newest model, 02-teacher, is over budget"


def test_layers_beyond_the_largest_are_summed(report):
    rows = next(section for section in sections(report) if section.key == "layers").tables[0].rows
    whole = report["budget"]
    assert len(whole["layers"]) > MOST_LAYERS
    assert len(rows) == MOST_LAYERS + 1
    assert rows[-1][0].text == f"{len(whole['layers']) - MOST_LAYERS} smaller layers"
    for column, key in ((1, "param_bytes"), (3, "macs_per_clip"), (5, "params")):
        assert sum(int(row[column].text.replace(",", "")) for row in rows) == whole[key]


def test_read_report_gives_back_what_was_written(report, early, tmp_path):
    for name, content in (("whole", report), ("early", early)):
        (tmp_path / name).mkdir()
        for file, data in report_files(content).items():
            (tmp_path / name / file).write_bytes(data)
        assert read_report(tmp_path / name) == json.loads(json.dumps(content))


def test_read_report_refuses_what_is_no_report(report, tmp_path):
    path = tmp_path / "report.json"
    with pytest.raises(BundleError, match=r"report\.json: cannot be read: No such file.*exports/quickstart"):
        read_report(tmp_path)
    whole = report_files(report)["report.json"]
    for content in (whole[: len(whole) // 2], b"", b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(BundleError, match=r"is no JSON.*run the recipe again"):
            read_report(tmp_path)
    for content in ("[]", "{}", '{"schema_version": 2}', '"text"'):
        path.write_text(content)
        with pytest.raises(BundleError, match=r"schema_version is .*, wanted 1"):
            read_report(tmp_path)
    report["road"][1]["param_bytes"] = "many"
    del report["seed"]
    path.write_text(json.dumps(report))
    with pytest.raises(BundleError, match="is not a whole report") as caught:
        read_report(tmp_path)
    assert "road.1.param_bytes: " in str(caught.value)
    assert "seed: Field required" in str(caught.value)


finite = st.floats(-1e9, 1e9)


@settings(max_examples=60, deadline=None)
@given(low=finite, high=finite)
def test_ticks_are_few_round_and_span_the_range(low, high):
    low, high = min(low, high), max(low, high)
    ticks = _ticks(low, high)
    assert 2 <= len(ticks) <= 7
    slack = 1e-9 * max(1.0, abs(low), abs(high))
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    whole = _ticks(low, high, whole=True)
    assert all(tick == round(tick) for tick in whole)


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.none() | finite, min_size=1, max_size=50))
def test_curves_stay_inside_their_frame(values):
    drawn = line_chart(range(1, len(values) + 1), [Series("a", values), Series("b", values)], "label", "epoch")
    if all(value is None for value in values):
        assert drawn == ""
        return
    for part in drawn.split('<ul class="legend">')[0].split('points="')[1:]:
        for point in part.split('"')[0].split():
            x, y = map(float, point.split(","))
            assert -5 <= x <= 365
            assert -5 <= y <= 215


def test_dot_chart_places_values_on_its_scale():
    drawn = dot_chart(["one"], [Series("all", [50.0]), Series("seen", [None])], "label", ("chance", 10.0))
    assert '<circle class="mark s0" cx="176.0"' in drawn  # halfway between the ends, 6 and 346
    assert drawn.count("<polygon") == 1  # in the legend alone
    assert "chance" in drawn


def test_no_torch_is_needed():
    code = (
        "import sys, aum_compress.report.write, aum_compress.report.tables;"
        "sys.exit('torch' in sys.modules or 'onnx' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
