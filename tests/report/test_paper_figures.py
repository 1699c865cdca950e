"""Figures over many runs are readable whatever their labels."""

import itertools

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from dist_vlcl.report import paper_figures
from dist_vlcl.report.figures import STYLE
from dist_vlcl.report.paper_figures import draw_seeds, pictures_of
from tests.report.test_statistics import FO, NOTE, ZERO_SHOT, results

HOP, MOZO = ("dual", "hop_odd", "conservative"), ("dual", "hop_odd", "mozo")
METHODS = [FO, ZERO_SHOT, ("dual", "hop_odd", "frozen", ""), (*HOP, ""), (*HOP, NOTE), (*HOP, "orders.rest=frozen"), (*MOZO, NOTE)]
METHODS += [("language", "all", "conservative", ""), ("vision", "all", "conservative", "")]


def assert_readable(figure) -> None:
    """Every text is inside of the figure, and no two labels of one axis touch."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    width, height = figure.bbox.size
    for axes in figure.axes:
        ticks = [text for text in axes.get_yticklabels() if text.get_text() and text.get_visible()]
        low, high = axes.get_xlim()
        numbers = [text for text in axes.get_xticklabels() if low <= text.get_position()[0] <= high]  # others are not drawn
        written = [*ticks, *numbers, axes.xaxis.label, axes._left_title]
        boxes = {text.get_text(): text.get_window_extent(renderer) for text in written if text.get_text()}
        for text, box in boxes.items():
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width + 1 and box.y1 <= height, text
        extents = sorted((text.get_window_extent(renderer) for text in ticks), key=lambda box: box.y0)
        assert all(below.y1 <= above.y0 for below, above in itertools.pairwise(extents))
        assert len(extents) == len(axes.get_yticks()) or not ticks


def test_a_label_of_several_lines_has_the_room_it_needs():
    with matplotlib.rc_context(fname=STYLE):
        picture = draw_seeds(results(*METHODS))
        assert_readable(picture.figure)
    assert len(picture.data) == 3 * (len(METHODS) - 1)


def test_figure_8_shows_last_beside_avg():
    found = results(FO, (*HOP, ""), ZERO_SHOT, seeds=4)
    found = found[(found.variant == "zero_shot") | (found.seed < 3)]  # a seed that only zero-shot has does not count
    shown, untrained = found[found.variant != "zero_shot"], found[(found.variant == "zero_shot") & (found.seed < 3)]
    picture = draw_seeds(found)
    for axes, (metric, name) in zip(picture.figure.axes, (("last", "Last (%)"), ("avg", "Avg (%)")), strict=True):
        [seeds] = [line for line in axes.lines if line.get_label() == "a seed"]
        assert axes.get_xlabel() == name and sorted(seeds.get_xdata()) == sorted(shown[metric])
        assert sorted(picture.data[metric]) == sorted(shown[metric])
        [line] = [line for line in axes.lines if line.get_label() == "zero-shot CLIP"]
        assert line.get_xdata()[0] == pytest.approx(untrained[metric].mean())
    assert sorted(shown["last"]) != sorted(shown["avg"])


@pytest.mark.parametrize(("increment", "name"), [(20, "figure8-cifar100-inc20"), (0, "figure8-cifar100")])
def test_a_picture_names_the_classes_of_a_task_where_they_are_a_number(increment, name):
    found = results(FO, (*HOP, ""), increment=increment)
    with matplotlib.rc_context(fname=STYLE):
        assert [picture.name for picture in pictures_of(found[:0], found)] == [name]


@pytest.mark.parametrize("seeds", [2, 3])
def test_figure_8_has_an_interval_of_three_seeds_and_none_of_two_and_no_setting_that_all_methods_share(seeds):
    picture = draw_seeds(results((*HOP, "zo.sides=2; train.epochs=3"), (*HOP, "train.epochs=3"), seeds=seeds))
    for axes in picture.figure.axes:
        [bars] = [container.lines[2][0] for container in axes.containers]
        assert np.isfinite([segment for segment in bars.get_segments() if len(segment)]).any() == (seeds == 3)
    labels = [label.get_text() for label in picture.figure.axes[0].get_yticklabels()]
    assert len(labels) == 2 and sum("zo.sides=2" in label for label in labels) == 1 and not any("epochs" in label for label in labels)


@pytest.mark.parametrize(("base", "expected"), [(10, "1e−05"), (1.12, "0.6")], ids=["decades", "less than a decade"])
def test_a_logarithmic_axis_has_plain_numbers_of_which_each_comes_once(monkeypatch, base, expected):
    about = [("vision", layer, "zeroth", "mozo", float(base) ** -layer) for layer in range(1, 7)]
    units = pd.DataFrame(about, columns=["tower", "layer", "order", "method", "coordinate_variance"])
    units = units.assign(norm_variance=units.layer / 10, mean_update=1.0)
    monkeypatch.setattr(paper_figures, "gather", lambda runs, read: units)
    with matplotlib.rc_context(fname=STYLE):
        figure = paper_figures.draw_units(pd.DataFrame(), ["mozo"]).figure
        FigureCanvasAgg(figure).draw()
    kinds = ("major", "minor")
    labels = [text.get_text() for kind in kinds for text in figure.axes[0].get_yticklabels(which=kind) if text.get_text()]
    assert expected in labels and not any("$" in text for text in labels)
    assert len(labels) == len(set(labels))
