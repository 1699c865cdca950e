"""What tools/soak.py takes for equal, and how it counts. The soak itself takes minutes: see docs/reliability.md."""

import random
from pathlib import Path

import pytest
import torch

from dist_vlcl.reading import seal, to_line
from dist_vlcl.run import checkpoint
from tools import soak


def folder_of(root: Path, name: str, value: float = 1.0, steps: int = 3, loss: float = 0.5) -> soak.Run:
    run = soak.Run(root, name, soak.ZEROTH)
    checkpoint.save(run.folder, steps, {"adapters/a": torch.tensor([value, 2.0])}, {}, keep=2, identity={})
    for file in ("metrics.jsonl", "journal.jsonl"):
        records = [{"kind": "step", "step": step + 1, "loss": loss, "time": step} for step in range(steps)]
        (run.folder / file).write_text("".join(to_line(seal(record)) for record in records))
    return run


@pytest.mark.parametrize(
    ("change", "found"),
    [({}, []), ({"value": 1.0000001}, ["adapters/a"]), ({"loss": 0.4}, ["metrics.jsonl", "journal.jsonl"])],
)
def test_a_run_differs_if_one_bit_or_one_line_does(tmp_path, change, found):
    assert soak.differing(folder_of(tmp_path, "a", **change), folder_of(tmp_path, "b").folder) == found


def test_where_no_equal_bits_are_promised_a_thousandth_is_allowed(tmp_path):
    reference = folder_of(tmp_path, "b").folder
    for value, found in ((1.0005, []), (1.01, ["adapters/a"])):
        run = folder_of(tmp_path, f"a{value}", value)
        run.is_exact = False
        assert soak.differing(run, reference) == found


def test_other_ranks_end_the_promise_of_equal_bits_for_first_order_and_other_threads_for_all():
    for plan in soak.PLANS:
        for seed in range(200):
            run = soak.Run(Path("runs"), "a", plan)
            changed = soak.change(run, random.Random(seed)) or ""
            assert run.is_exact == ("threads" not in changed and ("rank" not in changed or plan == soak.ZEROTH)), changed


def test_the_report_counts_faults_runs_and_problems():
    found = [{"fault": "disk full", "plan": "p", "run": "0-0", "problem": None}] * 3
    found += [{"fault": "kill", "plan": "p", "run": "0-0", "problem": "hung"}]
    found += [{"fault": None, "plan": "p", "run": "0-0", "problem": None, "end": "equal bits"}]
    text = soak.report(found)
    assert text.startswith("4 faults in 1 runs (1 p, equal bits); problems: 1") and "| disk full | 3 |" in text and "kill: hung" in text
