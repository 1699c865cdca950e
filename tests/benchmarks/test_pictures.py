"""A benchmark's picture shows what its table says."""

import pytest

from benchmarks.pictures import PICTURES, draw
from benchmarks.result import Result, Table

STEP = Table(
    "FLOPs of a step: vit_b16, mozo",
    ["orders", "naive TFLOP", "model TFLOP", "executed TFLOP", "executed / model", "naive / model"],
    [["first", 9.36, 8.48, 8.55, 1.01, 1.1], ["language_all", 18.7, 8.47, 8.56, 1.01, 2.21]],
)
MEMORY = Table(
    "Peak of a step, weights included: 64 images",
    ["orders", "precision", "checkpoint", "counted GB", "GPU GB", "paper GB"],
    [
        ["first", "fp32", "no", 5.24, 5.5, 19.96],
        ["first", "fp32", "yes", 1.97, "not measured", 19.96],
        ["vision_suffix", "fp32", "no", 1.21, "not measured", ""],
        ["vision_suffix", "fp32", "yes", 1.2, 1.3, ""],
    ],
)


@pytest.mark.parametrize(
    ("command", "table", "bars", "marks"),
    [
        (
            "step",
            STEP,
            {"naive": {"first": 9.36, "language_all": 18.7}, "executed": {"first": 8.55, "language_all": 8.56}},
            {"executed": {"first": 8.48, "language_all": 8.47}},
        ),
        (
            "memory",
            MEMORY,
            {
                "paper": {"first": 19.96},
                "fp32": {"first": 5.24, "vision_suffix": 1.21},
                "fp32, checkpoints": {"first": 1.97, "vision_suffix": 1.2},
            },
            {"fp32": {"first": 5.5}, "fp32, checkpoints": {"vision_suffix": 1.3}},
        ),
    ],
)
def test_bars_and_marks_are_the_table_s_numbers_each_in_its_plan(command, table, bars, marks):
    shown = PICTURES[command](Result([table]))
    assert shown.bars == bars and shown.marks == marks and shown.groups == [row for row in dict.fromkeys(r[0] for r in table.rows)]
    [axes] = draw(shown).axes
    labels = {tick: text.get_text() for tick, text in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)}

    def group(place: float) -> str:
        return labels[min(labels, key=lambda tick: abs(tick - place))]

    drawn = {
        bar.get_label(): {group(p.get_y() + p.get_height() / 2): p.get_width() for p in bar.patches}
        for bar in axes.containers
        if hasattr(bar, "patches")
    }
    assert drawn == bars
    points = {(group(y), x) for line in axes.get_lines() for x, y in zip(*line.get_data(), strict=True)}
    assert points == {item for of_bar in marks.values() for item in of_bar.items()}
    numbers = {text.get_text() for text in axes.texts}
    assert {"9.36", "18.7"} <= numbers if command == "step" else {"20.0", "5.24", "1.97"} <= numbers
