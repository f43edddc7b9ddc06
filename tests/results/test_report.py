"""The report: the page shows what the records hold, and a real browser shows the page well."""

import math
import os
import re
import runpy
import sys
from html.parser import HTMLParser

import pytest
import torch

from lightning_blip.metrics import average_score, backward_transfer, forgetting
from lightning_blip.results.report import report
from tests.helpers.browser import CHROMIUM, browser
from tests.helpers.records import HOSTILE, RECORDS, record

VOID = {"meta", "link"}


class Page(HTMLParser):
    """The elements of a page, each with its attributes and all text within it."""

    def __init__(self, path):
        super().__init__()
        self.elements, self._open = [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self._open, f"not closed: {[tag for tag, _, _ in self._open]}"

    def handle_starttag(self, tag, attributes):
        element = (tag, dict(attributes), [])
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        for _, _, text in self._open:
            text.append(data)

    def texts(self, tag, **attributes):
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [
            "".join(text)
            for name, has, text in self.elements
            if name == tag and wanted.items() <= has.items()
        ]


def page(tmp_path, *records):
    folders = []
    for index, one in enumerate(records):
        folders.append(tmp_path / f"run {index}")
        folders[-1].mkdir(exist_ok=True)
        one.write(folders[-1] / "forgetting.json")
    return Page(report(folders, tmp_path / "out" / "page.html"))


def value(text):
    return float(re.sub("[ %,]", "", text).replace("\N{MINUS SIGN}", "-"))


@pytest.mark.parametrize("name", RECORDS)
def test_every_record_makes_a_page_that_needs_no_other_file(tmp_path, name):
    for records in ([RECORDS[name]], [RECORDS[name], RECORDS["ordinary"]]):
        shown = page(tmp_path, *records)
        for tag, attributes, _ in shown.elements:
            assert tag not in ("script", "img", "iframe", "b") or (tag == "b" and not attributes)
            assert attributes.get("href", "data:,") == "data:,"
            assert "src" not in attributes
            # No coordinate may come from a missing value.
            assert not any("nan" in attributes.get(part, "") for part in ("d", "x", "y", "cx", "cy"))
        assert "://" not in re.sub(r"<title>.*?</title>", "", shown.source)
        svgs = [
            attributes
            for tag, attributes, _ in shown.elements
            if tag == "svg" and attributes.get("role") == "img"
        ]
        assert len(svgs) >= 3
        titled = re.findall(r'<svg[^>]*role="img"[^>]*>\s*<title>[^<]+</title>', shown.source)
        assert len(titled) == len(svgs)


def test_scores_are_shown_in_tips_cells_and_the_table(tmp_path):
    one = record()
    shown = page(tmp_path, one)
    tips = shown.texts("title")
    for score in one.scores:
        when = "after" if score.boundary else f"position {score.position:g}, while"
        assert f"{score.task}: {100 * score.score:.1f} %, {when} learning {score.learning}" in tips
    cells = shown.texts("text", fill="#fff") + shown.texts("text", fill="#000")
    expected = [f"{100 * score:.1f}" for row in one.matrix for score in row if math.isfinite(score)]
    assert sorted(cells) == sorted(expected)
    table = [value(text) for text in shown.texts("dd")[:6:2]]
    measured = [
        100 * float(measure(torch.tensor(one.matrix)))
        for measure in (average_score, backward_transfer, forgetting)
    ]
    assert table == pytest.approx(measured, abs=0.051)
    assert shown.texts("dd")[6:9:2] == ["0.45 %", "3 of 3"]
    assert "position in the sequence, in tasks" in shown.texts("text")


def test_scores_outside_0_to_1_are_not_shown_in_percent(tmp_path):
    one = RECORDS["returns"]
    shown = page(tmp_path, one)
    assert value(shown.texts("dd")[0]) == pytest.approx(
        float(average_score(torch.tensor(one.matrix))), rel=0.01
    )
    assert "%" not in shown.texts("dd")[0]
    assert shown.texts("p", class_="unit")[0] == "val_acc"


def test_points_and_ticks_have_the_same_scale(tmp_path):
    one = RECORDS["returns"]
    shown = page(tmp_path, one)
    start = shown.elements.index(next(element for element in shown.elements if element[0] == "svg"))
    ticks, points = [], []
    for tag, attributes, text in shown.elements[start:]:
        if tag == "text" and attributes.get("class") == "y" and len(ticks) < 2:
            ticks.append((float(attributes["y"].rstrip("%")), value("".join(text))))
        if tag == "circle":
            points.append((float(attributes["cx"].rstrip("%")), float(attributes["cy"].rstrip("%"))))
    (y0, v0), (y1, v1) = ticks
    drawn = [(x * 3 / 100, v0 + (y - y0) * (v1 - v0) / (y1 - y0)) for x, y in points][: len(one.scores)]
    measured = [(score.position, score.score) for score in one.scores]
    for at, wanted in zip(sorted(drawn), sorted(measured), strict=True):
        assert at == pytest.approx(wanted, abs=0.1)


def test_bars_add_up_to_the_used_capacity(tmp_path):
    one = record(layers=30)
    shown = page(tmp_path, one)
    bars = [
        attributes
        for tag, attributes, text in shown.elements
        if tag == "rect" and "of all bits" in "".join(text)
    ]
    assert len(bars) == 3 * 8  # seven layers and the other layers, after each of three tasks
    columns = {}
    for bar in bars:
        columns.setdefault(bar["x"], []).append(float(bar["height"].rstrip("%")))
    heights = [sum(column) for column in columns.values()]
    used = [frozen.used_capacity for frozen in one.frozen]
    assert [height / heights[-1] for height in heights] == pytest.approx(
        [share / used[-1] for share in used], abs=0.01
    )
    assert any(text.endswith("23 others") for text in shown.texts("li"))
    assert "2 bits: 2 of 1,000 values (0.2 %)" in shown.texts("title")


def test_without_blip_the_page_has_no_capacity(tmp_path):
    headings = page(tmp_path, record(blip=False)).texts("h2")
    assert headings == ["Score on each task", "R, the scores after each task", "Settings"]
    assert page(tmp_path, record()).texts("h2") == [
        "Score on each task", "R, the scores after each task", "Used capacity", "Frozen bits of each layer",
        "Predicted forgetting", "Settings",
    ]  # fmt: skip


def test_settings_in_which_runs_differ_are_marked(tmp_path):
    shown = page(tmp_path, record(), record(blip=False))
    assert shown.texts("h1") == ["run 0 and run 1"]
    assert "Mean score over the tasks seen" in shown.texts("h2")
    marked = [text.replace("≠", " ").split() for text in shown.texts("tr", class_="differs")]
    assert ["optimizer.lr", "0.10.2"] in marked
    assert not {"hidden", "batch_size", "torch"} & {words[0] for words in marked}
    assert {"basis", "pull", "prior", "max_bits"} <= {words[0] for words in marked}


def test_names_are_escaped(tmp_path):
    shown = page(tmp_path, RECORDS["hostile names"])
    assert "<b>&" not in shown.source
    assert any(title.startswith(HOSTILE + ":") for title in shown.texts("title"))
    assert "{{ 1 }}" in shown.source


def test_the_newest_record_below_a_folder_is_taken(tmp_path):
    for index, name in enumerate(["a", "b", "c"]):
        path = tmp_path / "logs" / name / "forgetting.json"
        path.parent.mkdir(parents=True)
        record(tasks=index + 1).write(path)
        os.utime(path, (1000 - abs(index - 1), 1000 - abs(index - 1)))
    path = report([tmp_path / "logs"])
    assert path == tmp_path / "logs" / "b" / "report.html"
    assert Page(path).texts("h1") == ["b"]
    assert (
        report([tmp_path / "logs" / "a", tmp_path / "logs" / "c" / "forgetting.json"])
        == tmp_path / "logs" / "report.html"
    )


def test_runs_in_folders_of_the_same_name_have_different_names(tmp_path):
    for method in ("blip", "plain"):
        (tmp_path / method / "version_0").mkdir(parents=True)
        record().write(tmp_path / method / "version_0" / "forgetting.json")
    path = report([tmp_path / "blip", tmp_path / "plain"], tmp_path / "page.html")
    assert Page(path).texts("h1") == ["blip/version_0 and plain/version_0"]


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["lightning_blip", "report", *map(str, arguments)])
    runpy.run_module("lightning_blip", run_name="__main__")


def test_the_command_line_writes_the_page_and_prints_its_path(tmp_path, monkeypatch, capsys):
    record().write(tmp_path / "forgetting.json")
    command(monkeypatch, tmp_path, "--output", tmp_path / "page.html")
    assert capsys.readouterr().out == f"Report: {tmp_path / 'page.html'}\n"
    assert Page(tmp_path / "page.html").texts("h1") == [tmp_path.name]


def test_errors_are_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(
        SystemExit, match=r"no forgetting.json in or below .*: name the log folder of a fit that had"
    ):
        command(monkeypatch, tmp_path)
    broken = tmp_path / "broken" / "forgetting.json"
    broken.parent.mkdir()
    for text, why in (('{"version": 99}', "version 99"), ('{"version": 1, "metr', "broken")):
        broken.write_text(text)
        with pytest.raises(SystemExit, match=why) as error:
            command(monkeypatch, broken)
        assert "\n" not in str(error.value)
    (tmp_path / "other").mkdir()
    record(metric="return").write(tmp_path / "other" / "forgetting.json")
    record().write(broken)
    with pytest.raises(SystemExit, match=r"runs=.* different metrics, \['val_acc', 'return'\]"):
        command(monkeypatch, broken.parent, tmp_path / "other")
    with pytest.raises(ValueError, match="at least one folder"):
        report([])


CONTRASTS = """
(() => {
  const parse = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const light = c => c.slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || e.tagName === "title" || e.hasAttribute("fill")) continue;
    const style = getComputedStyle(e), ink = e instanceof SVGElement ? style.fill : style.color;
    const [x, y] = [light(parse(ink)), light(behind(e))].sort((p, q) => p - q);
    found.push([(y + 0.05) / (x + 0.05), e.textContent.trim().slice(0, 30)]);
  }
  return found.sort((p, q) => p[0] - q[0]);
})()
"""


TEXTS = '[...document.querySelectorAll("text, li, td, th, dd")]'
# Text that leaves the page at a side, and numbers of a heat map that leave their cell.
CUT_OFF = (
    f"{TEXTS}.filter"
    """
(e => {
  const box = e.getBoundingClientRect(), cell = e.parentElement.querySelector(":scope > rect");
  const wide = cell && e.closest(".map g") && box.width > cell.getBoundingClientRect().width;
  return wide || box.left < 0 || box.right > innerWidth && !e.closest(".scroll");
}).map(e => e.textContent)
"""
)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH")
def test_a_browser_shows_the_whole_page_at_any_width_in_light_and_dark(tmp_path):
    with browser(tmp_path / "profile") as shown:
        for name, one in RECORDS.items():
            page(tmp_path, one, RECORDS["ordinary"])
            path = tmp_path / "out" / "page.html"
            for width in (360, 1440):
                shown.open(path, width)
                assert shown.evaluate("document.documentElement.scrollWidth") <= width, (name, width)
                assert shown.evaluate(f"{TEXTS}.length") > 20, (name, width)
                assert shown.evaluate(CUT_OFF) == [], (name, width)
            requested = [
                e["params"]["request"]["url"]
                for e in shown.events
                if e["method"] == "Network.requestWillBeSent"
            ]
            assert {url.partition(":")[0] for url in requested} <= {"file", "data"}
            assert len([url for url in requested if url.startswith("file")]) == 1
            assert not [
                e for e in shown.events if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")
            ]
        backgrounds = []
        for dark in (False, True):
            shown.open(path, 1280, dark=dark)
            backgrounds.append(shown.evaluate("getComputedStyle(document.body).backgroundColor"))
            worst, *_, best = shown.evaluate(CONTRASTS)
            assert worst[0] >= 4.5, worst
            assert best[0] > 12
        assert backgrounds == ["rgb(255, 255, 255)", "rgb(20, 23, 28)"]
