"""tools/fuzz.py in short: fixed inputs, none of which ends in a traceback, a hang or a silently wrong result."""

import random
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers import mutate
from tests.helpers.ranks import run_module
from tools import fuzz


def test_damaged_files_give_an_error_or_a_warning_that_names_the_damage(tmp_path):
    done = run_module("tools.fuzz", "--inputs", "10", "--folder", str(tmp_path), cwd=Path(__file__).parents[1])
    assert done.returncode == 0 and done.stdout.count("\n10 inputs in ") == 1, done.stdout + done.stderr[-2000:]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 10


@pytest.mark.parametrize(
    ("code", "result", "said", "outcome"),
    [
        (0, "50", "", "unchanged"),
        (0, "60", "", "silently wrong"),
        (0, "60", "RuntimeWarning: another file is damaged", "silently wrong"),
        (0, "60", "RuntimeWarning: runs/done/config.yaml is damaged", "recovered"),
        (2, "", "error: runs/done/config.yaml is damaged", "clear error"),
        (2, "", "error: 'utf-8' codec can't decode byte", "unclear error"),
        (1, "", "Traceback (most recent call last):\nTypeError", "traceback"),
        (2, "", f"error: config.yaml: {fuzz.CANARY}", "leak"),
        (2, "", "error: config.yaml: \x1b[2J", "leak"),
        (-11, "", "", "traceback"),
        (None, "", "", "hang"),
    ],
)
def test_an_outcome_is_judged_by_what_a_user_sees(tmp_path, code, result, said, outcome):
    (tmp_path / "stderr").write_text(said)
    (tmp_path / "result.json").write_text(f'{{"Last": "{result}"}}')
    reference, path = {"Last": "50", "said": []}, Path("runs/done/config.yaml")
    assert fuzz.judge("evaluate", tmp_path, code, reference, path, lambda part: False) == outcome


def test_a_resume_that_warns_must_still_end_with_the_same_parameters(tmp_path):
    (tmp_path / "stderr").write_text("warning: runs/stopped/journal.jsonl is damaged")
    reference = {"tensors": "a", "journal.jsonl": "b", "said": []}
    for result, outcome in (('{"tensors": "a", "journal.jsonl": "c"}', "recovered"), ('{"tensors": "c"}', "silently wrong")):
        (tmp_path / "result.json").write_text(result)
        assert fuzz.judge("resume", tmp_path, 0, reference, Path("runs/stopped/journal.jsonl"), lambda part: False) == outcome


@pytest.mark.parametrize("mutator", [*mutate.MUTATORS, mutate.digit_changed, mutate.line_moved, mutate.text_mutated, mutate.resealed])
def test_an_input_is_a_function_of_its_number(mutator):
    content = b"".join(b'{"a": %d, "b": [2], "crc": "x"}\n' % line for line in range(9))
    same = {mutator(content, random.Random(3)) for _ in range(2)}
    assert len(same) == 1 and len({mutator(content, random.Random(seed)) for seed in range(20)}) > 3


def test_every_target_and_command_has_its_turn():
    turns = Counter((fuzz.case(number)[1].files, fuzz.case(number)[2]) for number in range(2000))
    assert turns.keys() == {(target.files, command) for target in fuzz.TARGETS for command in target.commands}
