"""Every benchmark runs at a tiny size, hands back what it says, and refuses bad input in words."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from benchmarks import scale, step
from benchmarks.__main__ import COMMANDS, MARKED, main
from benchmarks.pictures import PICTURES
from benchmarks.result import Result, Table, interleaved, spread
from tests.helpers.hosts import hosts

TINY = "--model small --images 8 --classes 4 --count-on cpu"
RUNS = {
    "step": f"{TINY} --repeats 1 --orders language_all --picture {{folder}}/pictures/step.png",
    "memory": f"{TINY} --adapter lora --orders dual_all --picture {{folder}}/pictures/memory.png",
    "wire": f"{TINY} --orders dual_hop_odd",
    "noise": f"{TINY} --repeats 1",
    "slope": f"{TINY} --directions 1 --orders language_all",
    "stream": "--count 32 --images 8 --repeats 1 --size 32",
    "scale": f"{TINY} --processes 2 --strong --steps 1 --orders dual_hop_odd --apart --trace {{folder}}/trace.json",
    "growth": f"{TINY} --class-counts 2,4 --expert-counts 2,4 --task-counts 1,3 --orders dual_all",
    "eval": f"{TINY} --class-counts 4 --time --repeats 1",
    "switch": f"{TINY} --repeats 1",
    "probes": f"{TINY} --probes 1,2 --draws 32 --batches 1 --orders language_all",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_benchmark_runs(command, tmp_path, capsys):
    path = tmp_path / "result.json"
    main([command, *RUNS[command].format(folder=tmp_path).split(), "--json", str(path)])
    saved, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert saved["records"] and saved["machine"]["torch"] in printed
    for table in saved["tables"]:
        assert table["title"] in printed and table["rows"]
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
    if command in PICTURES:
        assert (tmp_path / f"pictures/{command}.png").read_bytes().startswith(b"\x89PNG")
        assert PICTURES[command](Result([Table(**table) for table in saved["tables"]])).bars
    if command == "memory":
        assert [row[-1] for row in saved["tables"][1]["rows"]] == [1.73] * 4  # the paper's, with LoRA
    if command == "wire":  # three losses in float64, and one number with count, flag and time
        assert saved["tables"][0]["rows"][0][2] == 32
        assert saved["records"][0]["digest_is_equal"]
    if command == "probes":  # the error of two probes is half of that of one: a law of Gaussian directions
        assert all(0.7 < record["error"] / record["expected"] < 1.4 for record in saved["records"])
    if command == "step":
        assert saved["tables"][0]["rows"][0][4] <= 1.05
    if command == "scale":  # half of what one rank needs for all images; gradients under way, and the wait for what is left of them
        [row], [record] = saved["tables"][0]["rows"], saved["records"]
        assert row[5].startswith(f"{record['seconds_alone'][0] / 2 / record['seconds'][0]:.2f} (")
        assert record["digest_is_equal"] and len(record["seconds_strangers"]) == 1
        assert {"gloo:all_reduce", "first order: wait for gradients"} <= {
            e["name"] for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        }
    if command == "growth":  # tasks seen: 1.0 x
        [first, third] = (record["flops"] for record in saved["records"] if "task" in record)
        assert first == third


def test_a_fast_step_in_bf16_is_measured_beside_a_naive_one_in_fp32(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(step, "naive_of", lambda *arguments, make=step.naive_of: (made.append(make(*arguments)), made[-1])[1])
    main(["step", *RUNS["step"].format(folder=tmp_path).split(), "--precision", "bf16", "--json", str(tmp_path / "result.json")])
    saved = json.loads((tmp_path / "result.json").read_text())
    [[*_, naive_s, fast_s, _, rate]], [record] = saved["tables"][0]["rows"], saved["records"]
    assert saved["tables"][0]["columns"][-4:] == ["naive s, fp32", "fast s, bf16", "times faster", "images/s"]
    assert {p.dtype for p in made[0].towers.parameters()} == {torch.float32}
    assert rate == 8 / fast_s and naive_s == record["naive_s"][0]


@pytest.mark.parametrize(("options", "efficiency"), [("", "0.80 (0.80 to 0.80)"), ("--strong", "0.40 (0.40 to 0.40)")])
def test_scaling_is_against_as_many_times_what_one_rank_does_alone(options, efficiency, tmp_path, monkeypatch):
    seconds = {"seconds": [5.0], "seconds_strangers": [4.5], "seconds_alone": [4.0], "digest_is_equal": True}
    monkeypatch.setattr(scale, "launch", lambda *_, **__: seconds)
    main(["scale", *f"{TINY} --processes 2 --orders dual_all {options} --json {tmp_path / 'result.json'}".split()])
    [row] = json.loads((tmp_path / "result.json").read_text())["tables"][0]["rows"]
    assert row[5:] == [efficiency, "0.90 (0.90 to 0.90)", "yes"]


def test_a_document_s_tables_are_written_again_and_the_rest_is_left(tmp_path, monkeypatch):
    document = tmp_path / "P.md"
    count = f"step --count {TINY} --orders dual_all --picture {tmp_path}/P.png"
    document.write_text(
        f"before\n\n<!-- bench: {count} -->\nold\n<!-- /bench -->\n\nafter\n<!-- bench: step --device cuda -->\nkept\n<!-- /bench -->\n"
    )
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    main(["docs", str(document)])
    text = document.read_text()
    assert text.startswith(f"before\n\n<!-- bench: {count} -->\n\n**FLOPs of a step") and "old" not in text
    assert (tmp_path / "P.png").exists()
    assert text.endswith("after\n<!-- bench: step --device cuda -->\nkept\n<!-- /bench -->\n")
    once = re.sub("load [0-9.]+", "", text)
    main(["docs", str(document)])
    assert re.sub("load [0-9.]+", "", document.read_text()) == once


def test_the_commands_of_the_documentation_are_commands():
    from pathlib import Path

    from benchmarks.__main__ import build_parser

    docs = Path(__file__).parents[2] / "docs"
    text = (docs / "PERFORMANCE.md").read_text() + (docs / "ENGINES.md").read_text()
    commands = [match["command"] for match in MARKED.finditer(text)]
    assert {command.split()[0] for command in commands} == set(COMMANDS)
    for command in commands:
        args = build_parser().parse_args(command.split())
        if getattr(args, "picture", None):
            assert f"({args.picture.relative_to('docs')})" in text
            assert (docs.parent / args.picture).stat().st_size < 60_000


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("step --orders sideways", "--orders sideways: choose from all, first, dual_all"),
        ("step --zo bold --count", "--zo bold: choose from conservative, mozo, naive, sign"),
        ("step --model large", "--model large: choose from"),
        ("step --images 0", "--images: 0: give a positive number"),
        ("step --device cuda", "--device cuda: torch sees no GPU"),
        ("growth --class-counts few", "--class-counts: few: give positive numbers"),
        ("scale --processes one", "--processes: one: give positive numbers"),
        ("scale --processes 2,0", "--processes: 2,0: give positive numbers"),
        ("scale --steps 0", "--steps: 0: give a positive number"),
        ("wire --processes 0", "--processes: 0: give a positive number"),
        ("step --count --picture step.jpg", "--picture: step.jpg: give a file that ends in .png"),
        ("docs /nowhere.md", "/nowhere.md"),
    ],
)
def test_bad_input_is_refused_in_words(line, words, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        main(line.split())
    assert stopped.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"python -m benchmarks {command}" in capsys.readouterr().out.split("examples:")[1]


def test_variants_take_turns_and_the_first_turn_warms_up():
    order = []
    seconds = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, "cpu")
    assert order == ["a", "b"] * 3 and [len(s) for s in seconds.values()] == [2, 2]


def test_a_ratio_is_of_the_turns_that_stood_side_by_side():
    assert spread([2.0, 6.0, 4.0], [1.0, 2.0, 1.0]) == "3.00 (2.00 to 4.00)"


def test_a_table_in_markdown():
    assert (
        Table("T", ["a", "b"], [["x", 1.23456], [1000, ""]]).markdown() == "**T**\n\n| a | b |\n| --- | --- |\n| x | 1.23 |\n| 1,000 |  |"
    )


def test_on_the_interface_between_two_hosts_zeroth_order_sends_a_few_packets_and_first_order_its_gradients(tmp_path):
    """The promise of DESIGN: at most 64 bytes handed over a rank and step, against the gradients of every parameter."""
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "wire",
        "--interface",
        "eth0",
        "--steps",
        "5",
        *TINY.replace("--count-on cpu", "").split(),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}  # one thread each
    with hosts("--no-gso") as pair:
        done = subprocess.run(
            pair.command("run", "--timeout", 250, "--", *command, "--orders", "dual_all,first", "--json", str(tmp_path / "{host}.json")),
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
        )
    assert done.returncode == 0, done.stdout[-2000:]
    zeroth, first = json.loads((tmp_path / "h1.json").read_text())["records"]
    assert (zeroth["orders"], zeroth["exchanges"]) == ("dual_all", 1) and zeroth["payload"] <= 64
    assert zeroth["payload"] < zeroth["bytes"] < 2000  # headers and acknowledgements of a few packets
    assert first["payload"] > 2_000_000 and first["bytes"] > first["payload"]
