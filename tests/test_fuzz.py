"""tools/fuzz.py in short: fixed inputs, none of which ends in a traceback, a hang or a silently wrong result."""

import random
from pathlib import Path

import pytest

from tests.helpers.ranks import run_module
from tools import fuzz


def test_damaged_run_folders_give_an_error_or_a_warning_that_names_the_damage():
    done = run_module("tools.fuzz", "--inputs", "5", "--only", "run", cwd=Path(__file__).parents[1])
    assert done.returncode == 0 and done.stdout.count("\n5 inputs in ") == 1, done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize(
    ("code", "out", "err", "outcome"),
    [
        (0, "Last 50", "", "no effect"),
        (0, "Last 60", "", "silently wrong"),
        (0, "Last 60", "RuntimeWarning: damaged", "recovered"),
        (2, "", "error: config.yaml is damaged", "clear error"),
        (1, "", "Traceback (most recent call last):\nTypeError", "traceback"),
        (-11, "", "", "traceback"),
        (None, "", "", "hang"),
    ],
)
def test_an_outcome_is_judged_by_what_a_user_sees(tmp_path, code, out, err, outcome):
    (tmp_path / "stdout").write_text(out)
    (tmp_path / "stderr").write_text(err)
    assert fuzz.judge("evaluate", tmp_path, code, "Last 50") == outcome


def test_an_input_is_a_function_of_its_number(tmp_path):
    texts = set()
    for _ in range(2):
        (tmp_path / "file").write_text('{"a": 1, "b": [2]}\n' * 9)
        fuzz.damage(tmp_path / "file", random.Random(3))
        texts.add((tmp_path / "file").read_bytes())
    assert len(texts) == 1 and fuzz.case(5, None)[1:] == fuzz.case(5, None)[1:]
