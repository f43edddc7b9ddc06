"""The pictures: matplotlib draws what the charts describe."""

import matplotlib.style
import numpy as np
import pytest
from matplotlib.colors import to_hex

from lightning_blip.results import charts, figures
from lightning_blip.results.charts import Scales
from tests.helpers.records import RECORDS, record


def drawn(picture):
    """Return the colours, the texts beside the plot, and all lines with points of a picture's first plot."""
    axes = picture.axes[0]
    lines = [line for line in axes.lines if line.get_marker() == "."]
    legend = axes.get_legend()
    texts = [text.get_text() for text in legend.get_texts()] if legend else []
    return axes, lines, texts


def test_curves_have_the_points_colours_and_axes_of_the_chart():
    one = record(missing={(1, 0)})
    chart = charts.task_scores(one, Scales.of([one]))
    axes, lines, texts = drawn(figures.curves_picture(one))
    assert [to_hex(line.get_color()) for line in lines] == [line.colour.light for line in chart.lines]
    for line, shown in zip(chart.lines, lines, strict=True):
        np.testing.assert_array_equal(shown.get_xdata(), [point.x for point in line.points])
        np.testing.assert_array_equal(shown.get_ydata(), [point.y for point in line.points])
    rings = [line for line in axes.lines if line.get_marker() == "o"]
    assert [len(ring.get_xdata()) for ring in rings] == [2, 2, 1]
    boundaries = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"]
    assert boundaries == [1, 2]
    assert texts == ["90.2  task_2", "76.8  task_1", "63.3  task_0"]
    assert [label.get_text() for label in axes.get_yticklabels()] == [text for _, text in chart.y.ticks]
    assert (axes.get_xlim(), axes.get_ylabel()) == ((0.0, 3.0), "val_acc in %")


def test_the_heat_map_has_the_cells_and_the_scale_of_the_chart():
    one = record(missing={(1, 0)})
    chart = charts.score_matrix(one, Scales.of([one]))
    axes, scale = figures.matrix_picture(one).axes
    colours = axes.images[0].get_array()
    assert {(cell.learned, cell.task): cell.fill for cell in chart.cells} == {
        (i, j): to_hex(colours[i, j]) for i, j in np.argwhere(colours[..., 3]).tolist()
    }
    assert [label.get_text() for label in scale.get_yticklabels()] == [text for _, text in chart.scale.ticks]
    assert [text.get_text() for text in axes.texts] == [cell.text for cell in chart.cells]
    assert [label.get_text() for label in axes.get_xticklabels()] == one.tasks


def test_bars_have_the_heights_and_colours_of_the_chart():
    one = record(layers=3)
    chart = charts.used_capacity(one, Scales.of([one]))
    axes, _, texts = drawn(figures.capacity_picture(one))
    assert [(bar.get_y(), bar.get_y() + bar.get_height()) for bar in axes.patches] == [
        pytest.approx((bar.bottom, bar.top)) for bar in chart.bars
    ]
    assert [to_hex(bar.get_facecolor()) for bar in axes.patches] == [bar.colour.light for bar in chart.bars]
    assert texts == ["0.3 %  body.2", "0.2 %  body.1", "0.1 %  body.0"]


def test_a_dark_background_has_the_colours_for_dark_pages():
    one = record()
    with matplotlib.style.context("dark_background"):
        _, lines, _ = drawn(figures.curves_picture(one))
        bars = figures.capacity_picture(one).axes[0].patches
    of_all = Scales.of([one])
    assert [to_hex(line.get_color()) for line in lines] == [
        line.colour.dark for line in charts.task_scores(one, of_all).lines
    ]
    assert [to_hex(bar.get_facecolor()) for bar in bars] == [
        bar.colour.dark for bar in charts.used_capacity(one, of_all).bars
    ]


def test_many_tasks_are_named_by_a_strip_of_their_colours():
    picture = figures.curves_picture(record(tasks=13))
    _, lines, texts = drawn(picture)
    strip = picture.axes[1]
    assert (len(lines), texts) == (13, [])
    assert [label.get_text() for label in strip.get_yticklabels()] == ["task_0", "task_12"]
    assert not list(figures.matrix_picture(record(tasks=13)).axes[0].texts)


def test_the_overview_has_the_curves_and_the_heat_map_beside_each_other():
    one = record()
    curves, matrix, _ = figures.overview(one).axes
    assert [axes.get_title() for axes in (curves, matrix)] == [
        "Score on each task", "R, the scores after each task",
    ]  # fmt: skip
    assert len([line for line in curves.lines if line.get_marker() == "."]) == 3
    assert len(matrix.texts) == 6


def test_a_comparison_has_a_line_and_a_heat_map_per_run_on_the_same_scale():
    runs = {"plain $x$": record(blip=False, scale=0.5), "BLIP": record()}
    means, *maps, scale = figures.comparison(runs).axes
    assert [axes.get_title() for axes in maps] == [r"R of plain \$x\$", "R of BLIP"]
    fills = [to_hex(axes.images[0].get_array()[0, 0]) for axes in maps]
    assert fills[0] != fills[1]
    assert scale.get_ylabel() == "val_acc in %"
    shown = [text.get_text() for text in means.get_legend().get_texts()]
    assert shown == ["76.8  BLIP", r"38.4  plain \$x\$"]


@pytest.mark.filterwarnings("ignore:Glyph .* missing")
@pytest.mark.parametrize("name", RECORDS)
def test_every_record_can_be_drawn(tmp_path, name):
    one = RECORDS[name]
    pictures = [figures.overview(one), *([figures.capacity_picture(one)] if one.frozen else [])]
    for picture in pictures:
        picture.savefig(tmp_path / "picture.png", dpi=50)
