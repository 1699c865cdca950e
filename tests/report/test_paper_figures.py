"""Figures over many runs: readable whatever their labels, and true about what is not there."""

import itertools
from pathlib import Path

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from dist_vlcl.report.cells import ZERO_SHOT, Entry, Method, Section, Stream, first_order
from dist_vlcl.report.figures import STYLE
from dist_vlcl.report.paper_figures import claims_pictures, draw_claims, draw_seeds
from dist_vlcl.report.paper_tables import comparison_frame
from dist_vlcl.report.records import Run

STREAMS = (Stream("cifar100", 20), Stream("cifar100", 10))
FO, HOP, MOZO = first_order("moe"), Method("moe", "dual", "hop_odd", "conservative"), Method("moe", "dual", "hop_odd", "mozo")
NOTE = ("zo.epsilon.language 0.0001 (not 0.001)", "zo.epsilon.vision 0.0001 (not 0.0005)", "zo.lr_scale 3.0 (not 1.0)")
OTHER_NOTE = ("orders.rest frozen (not first)", "zo.granularity unit (not branch)")


def section_of(cells: list[tuple[Stream, Method, tuple[str, ...]]]) -> Section:
    entries = []
    for number, (stream, method, note) in enumerate(cells):
        for seed in (0, 1, 2):
            accuracy = {"last": 0.5 + 0.01 * number + 0.003 * seed**2, "avg": 0.6 + 0.005 * (number * seed % 7)}
            run = Run(Path(f"{number}-{seed}"), {"seed": seed, "train": {}}, accuracy)
            entries.append(Entry(run, stream, method, (), note))
    return Section(1, "small_clip (shipped)", False, [], entries)


def noted(*streams: Stream) -> Section:
    cells = [(FO, ()), (ZERO_SHOT, ()), (HOP.twin, ()), (HOP, ()), (HOP, NOTE), (HOP, OTHER_NOTE), (MOZO, NOTE), (MOZO, NOTE[:1])]
    return section_of([(stream, *cell) for stream in streams for cell in cells])


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
    section = noted(*STREAMS)
    with matplotlib.rc_context(STYLE):
        comparisons = comparison_frame(section)
        assert_readable(draw_claims(comparisons[comparisons.claim != ""]))
        assert_readable(draw_seeds(section, STREAMS[0], ())[0])


def test_a_method_is_compared_with_the_other_once_where_settings_are_equal():
    """Else two marks would share a row, and a table would show one of them."""
    comparisons = comparison_frame(noted(STREAMS[0]))
    assert not comparisons.duplicated(["adapter", "branch", "layers", "variant", "settings", "against", "metric"]).any()
    mozo = comparisons[(comparisons.variant == "mozo") & (comparisons.claim == "mozo_above_its_plan") & (comparisons.metric == "last")]
    assert dict(zip(mozo.settings, mozo["mean"], strict=True)) == pytest.approx({"; ".join(NOTE): 2.0})


def test_a_caption_says_what_an_empty_row_means():
    full = [(stream, method, ()) for stream in STREAMS for method in (FO, HOP, HOP.twin)]
    sections = section_of(full), section_of([*full, (STREAMS[0], MOZO, ())])
    captions = [next(claims_pictures(section, comparison_frame(section))).caption for section in sections]
    assert ["Empty: not run" in caption for caption in captions] == [False, True]
