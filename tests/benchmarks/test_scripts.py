"""Every benchmark runs at a tiny size, writes what it prints, and refuses wrong input in one line."""

import json
import os
import re
import subprocess

import pytest

from benchmarks import data, memory, noise, scaling, step, wire
from benchmarks.common import Table, Workload, interleaved, ratio
from benchmarks.naive import naive_step
from dist_vlcl.dist.world import World
from tests.helpers.hosts import hosts
from tests.helpers.ranks import run_ranks, warm_python

TINY = ["--images", "8", "--classes", "4", "model=small", "cluster.device=cpu"]


def run(script, path, *arguments: str) -> list[list[dict]]:
    """The rows of every table that a script writes."""
    script.main([*arguments, "--json", str(path)])
    return [table["rows"] for table in json.loads(path.read_text())["tables"]]


def test_step_prints_and_writes_counted_and_timed_costs(tmp_path, capsys):
    [[row]] = run(step, tmp_path / "step.json", *TINY, "--repeats", "1", "--orders", "language_all", "model.precision=bf16")
    assert row["executed / model"] <= 1.05 and row["images/s"] == 8 / row["s"] and row["naive s"] > 0
    printed = capsys.readouterr().out
    assert "| language_all | 4 |" in printed and "dist_vlcl" in printed


def test_step_counts_every_order_plan_and_prints_each_at_once(tmp_path, capsys):
    [rows] = run(step, tmp_path / "step.json", *TINY, "--count", "--orders", "first,dual_all", "adapter=lora")
    assert [row["orders"] for row in rows] == ["first", "dual_all"]
    assert rows[0]["executed TFLOP"] != rows[1]["executed TFLOP"] and "s" not in rows[0]
    said = capsys.readouterr().err.splitlines()
    assert re.match(r"1 of 2, \d+ s left: orders first, classes 4, naive TFLOP ", said[0]) and said[1].startswith(
        "2 of 2, 0 s left: orders dual"
    )


def test_the_naive_step_stays_in_fp32():
    naive = naive_step(Workload(("model=small", "model.precision=bf16"), 8, 4), "cpu")
    assert {str(p.dtype) for p in naive.towers.parameters()} == {"torch.float32"} and naive.tokens.shape[1] == 77


def test_memory_counts_saved_bytes_and_peaks(tmp_path):
    saved, [peak] = run(memory, tmp_path / "memory.json", *TINY, "--orders", "dual_all")
    assert saved[0]["MB per image"] < saved[1]["MB per image"] and peak["counted GB"] > 0


def test_noise_measures_draws_and_slopes(tmp_path):
    [ways] = run(noise, tmp_path / "noise.json", *TINY, "--repeats", "1")
    assert len(ways) == 4 and all(row["million numbers/s"] > 0 for row in ways)
    [rows] = run(noise, tmp_path / "slope.json", *TINY, "--repeats", "2", "--slope", "--orders", "vision_all")
    by_mode = {(row["precision"], row["zo.evaluation"]): row["noise / slope"] for row in rows}
    assert by_mode["fp32", "whole"] < 0.1 < by_mode["bf16", "whole"]


def test_data_times_the_loader_on_both_encodings(tmp_path):
    [rows] = run(data, tmp_path / "data.json", "--stored", "32", "--images", "8", "--repeats", "1", "--size", "32")
    assert [row["stored as"] for row in rows] == ["png", "pixels"]
    assert all(row["read, decode"] > 0 and row["read, decode, crop, resize"] > 0 for row in rows)


def on_two_ranks(world: World) -> tuple[dict, dict]:
    workload = Workload(("model=small", "zo=mozo", "orders=dual_hop_odd"), images=16, classes=4)
    return wire.sent(world, workload, "", 1), scaling.time_ranks(world, workload, workload.changed(images=8), 1)


def test_wire_and_scaling_measure_two_ranks():
    [(sent, scaled), _] = run_ranks(on_two_ranks, 2)
    assert sent["collectives"] == 3  # the gradients, DDP's flags of which parameters were used, and the losses
    assert sent["of these gradients"] == sent["first-order parameters, bytes"] < sent["bytes"]
    assert scaled["ranks bit-identical"] == "yes" and scaled["images/s"] == 16 / scaled["s"]


def test_between_two_hosts_zeroth_order_sends_a_few_packets_and_first_order_its_gradients(tmp_path):
    """At most 64 bytes a rank and step (docs/performance.md); the network interface shows that nothing else travels."""
    arguments = [*TINY, "zo=mozo", "--interface", "eth0", "--steps", "5", "--orders", "dual_all,first"]
    command = [warm_python(), "-m", "benchmarks.wire", *arguments, "--json", str(tmp_path / "{host}.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    with hosts("--no-gso") as pair:
        line = pair.command("run", "--timeout", 250, "--", *command)
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:]
    zeroth, first = json.loads((tmp_path / "h1.json").read_text())["tables"][0]["rows"]
    assert zeroth["collectives"] == 1 and zeroth["bytes"] <= 64
    assert zeroth["bytes"] < zeroth["bytes by eth0"] < 2000  # headers and acknowledgements of a few packets
    assert first["of these gradients"] > 2_000_000 and first["bytes by eth0"] > first["bytes"]


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (step, ["--orders", "sideways", "--count"], "orders=sideways: choose from"),
        (step, ["--images", "0"], "--images: 0: give a positive number"),
        (step, ["--classes", "few"], "--classes: few: give a positive number"),
        (step, ["cluster.device=cuda"], "cluster.device=cuda: torch finds no GPU"),
        (step, ["zo.probes=0", "--count"], "zo.probes=0"),
        (wire, TINY, "start at least two, with: torchrun"),
    ],
)
def test_wrong_input_is_refused_in_one_line(script, arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("benchmarks.step.count", lambda workload: workload.config and {})
    with pytest.raises(SystemExit) as stopped:
        script.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_variants_run_in_turn_and_the_first_turn_is_not_counted():
    order = []
    seconds = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, "cpu")
    assert order == ["a", "b"] * 3 and [len(s) for s in seconds.values()] == [2, 2]


def test_a_ratio_compares_turns_that_ran_side_by_side():
    assert ratio([2.0, 6.0, 4.0], [1.0, 2.0, 1.0]) == "3.00 (2.00 to 4.00)"


def test_a_table_is_markdown():
    table = Table("T", [{"a": "x", "b": 1.23456}, {"a": 1000, "b": ""}], "N")
    assert table.markdown() == "**T**\n\n| a | b |\n| --- | --- |\n| x | 1.23 |\n| 1,000 |  |\n\nN"
