"""The charts: what each shows, in which colours, and where its labels lie."""

import math
from itertools import pairwise

import pytest

from lightning_blip.results import charts, palette, scales, svg
from lightning_blip.results.chart_types import Label
from lightning_blip.results.charts import Run, Scales
from tests.helpers.records import RECORDS, record


def contrast(one, other):
    def luminance(colour):
        if len(colour) == 4:
            colour = "#" + "".join(2 * digit for digit in colour[1:])
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_have_contrast_to_the_page_and_numbers_to_their_cells():
    assert min(contrast(*palette.heat_colour(step / 100)) for step in range(101)) >= 4.5
    colours = [
        *(palette.task_colour(index, 50) for index in range(50)),
        *(palette.layer_colour(index, 8) for index in range(8)),
        *(palette.run_colour(index) for index in range(6)),
    ]
    for colour in colours:
        assert contrast(colour.light, "#ffffff") >= 3
        assert contrast(colour.dark, "#14171c") >= 3


def test_ticks_of_large_numbers_that_are_close_have_different_texts():
    texts = [text for _, text in scales.axis_over([-499_999.994, -499_999.991]).ticks]
    values = [float(text.replace(",", "").replace("\N{MINUS SIGN}", "-")) for text in texts]
    steps = [after - before for before, after in pairwise(values)]
    assert len(steps) >= 3
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-3)
    assert steps[0] > 0


def test_an_axis_of_equal_values_is_wide_enough_for_ticks():
    axis = scales.axis_over([5.0, 5.0, math.nan])
    assert axis.low < 5 < axis.high
    assert axis.digits == len("4.8") < len({text for _, text in axis.ticks})


def test_numbers_have_significant_digits_and_a_mark_for_missing_ones():
    assert [scales.number(value) for value in (1234.5, -0.5, 0.0, 1.2345e-5, math.inf)] == [
        "1,234", "\N{MINUS SIGN}0.5", "0", "1.23e\N{MINUS SIGN}05", scales.MISSING,
    ]  # fmt: skip
    percent, plain = scales.Unit(percent=True), scales.Unit(percent=False)
    assert [percent.full(value) for value in (0.0, -0.04, 99.96, math.nan)] == [
        "0.0 %", "0.0 %", "100.0 %", scales.MISSING,
    ]  # fmt: skip
    assert [plain.full(value) for value in (0.123456, 1234.5, math.nan)] == [
        "0.123", "1,234", scales.MISSING,
    ]  # fmt: skip


def test_labels_keep_their_distance_and_stay_inside():
    labels = [Label(str(index), "", palette.run_colour(0), 4.0 - 0.1 * index) for index in range(12)]
    tops = [one.top for one in svg.placed(labels, scales.Axis(0.0, 100.0, []))]
    assert max(tops) <= svg.HEIGHT
    assert min(after - before for before, after in pairwise(tops)) >= 15.9


def test_each_task_is_a_line_through_its_scores_in_the_unit_of_the_chart():
    one = record()
    chart = charts.task_scores(one, Scales.of([one]))
    assert [line.name for line in chart.lines] == one.tasks
    for line in chart.lines:
        expected = [(s.position, 100 * s.score, s.boundary) for s in one.scores if s.task == line.name]
        assert [(point.x, point.y, point.boundary) for point in line.points] == expected
    assert [(label.name, label.value) for label in chart.labels] == [
        (task, f"{100 * score:.1f}") for task, score in zip(one.tasks, one.matrix[-1], strict=True)
    ]
    assert (chart.y_name, chart.y.low, chart.y.high) == ("val_acc in %", 40.0, 100.0)


@pytest.mark.parametrize("tasks", [8, 9, 12, 13])
def test_names_and_numbers_are_left_out_where_they_have_no_room(tasks):
    one = record(tasks=tasks)
    of_all = Scales.of([one])
    lines, matrix = charts.task_scores(one, of_all), charts.score_matrix(one, of_all)
    assert len(lines.labels) == (tasks if tasks <= 12 else 0)
    assert matrix.numbers == (tasks <= 12)
    assert [index for index, _, _ in matrix.names] == list(range(0, tasks, 1 if tasks <= 12 else 2))
    assert all(("." in cell.text) == (tasks <= 8) for cell in matrix.cells)
    ticks = charts.used_capacity(one, of_all).x.ticks
    assert [text for _, text in ticks] == [str(n) for n in range(1, tasks + 1, 1 if tasks <= 12 else 2)]


def test_scores_that_were_not_measured_interrupt_lines_and_leave_cells_out():
    one = record(missing={(1, 0), (2, 2)})
    of_all = Scales.of([one])
    first, *_, last = charts.task_scores(one, of_all).lines
    assert [point.measured for point in first.points] == [True, True, False, False, True, True]
    assert last.name == "task_1"  # task_2 has no score
    assert [(cell.learned, cell.task) for cell in charts.score_matrix(one, of_all).cells] == [
        (0, 0), (1, 1), (2, 0), (2, 1),
    ]  # fmt: skip


def test_a_mean_is_over_the_scores_of_one_validation():
    one = record(tasks=2)
    (line,) = charts.mean_scores([Run("a", palette.run_colour(0), one)], scales.Unit.of([one])).lines
    assert [(point.x, point.boundary) for point in line.points] == [
        (0.5, False), (1.0, True), (1.5, False), (2.0, True),
    ]  # fmt: skip
    assert line.points[-1].y == pytest.approx(100 * sum(one.matrix[1]) / 2)


def test_bars_stand_on_one_another_up_to_the_used_capacity():
    one = record(layers=30)
    chart = charts.used_capacity(one, Scales.of([one]))
    for place, frozen in enumerate(one.frozen):
        column = [bar for bar in chart.bars if int(bar.left) == place]
        assert len(column) == 8
        assert column[0].bottom == 0
        assert all(after.bottom == before.top for before, after in pairwise(column))
        assert column[-1].top == pytest.approx(100 * frozen.used_capacity)
    assert [label.name for label in chart.labels] == [f"body.{n}" for n in range(23, 30)] + ["23 others"]


def test_histograms_of_all_runs_have_the_same_axes():
    runs = [Run(str(n), palette.run_colour(n), record(layers=n)) for n in (1, 2)]
    histograms = charts.bit_histograms([*runs, Run("plain", palette.run_colour(0), record(blip=False))])
    assert [run for run, _ in histograms] == runs
    shown = [chart for _, layers in histograms for chart in layers.values()]
    assert len(shown) == 3
    assert {(chart.x.high, chart.y.low) for chart in shown} == {(3.0, -4.0)}
    heights = [math.log10(count / 1000) for count in (972, 26, 2)]
    assert [bar.top for bar in shown[0].bars] == pytest.approx(heights)
    assert {bar.bottom for bar in shown[0].bars} == {-4.0}


def test_a_record_without_finite_scores_has_empty_charts():
    one = RECORDS["nothing finite"]
    of_all = Scales.of([one])
    assert charts.task_scores(one, of_all).lines == charts.score_matrix(one, of_all).cells == []
