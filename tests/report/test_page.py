"""Reports of run folders that the trainer's own code has written."""

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dist_vlcl.commands import report as command
from dist_vlcl.paper import paper_runs, published
from dist_vlcl.report.page import Report, to_html
from dist_vlcl.report.paper_figures import draw_figure
from dist_vlcl.report.records import run_frame
from tests.helpers.runs import write_run

GOLDEN = Path(__file__).parent / "golden" / "report.md"
SMALL = ("data=cifar100", "model=small", "train.epochs=2")
SETTINGS = "adapter.scale=1.0; model.name=small_clip; model.pretrained=shipped; train.epochs=2; only a part of the test images (50 a class)"


def report_of(monkeypatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    command.main()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        one = [f"seed={seed}"]
        write_run(root, "paper=t1-moe-cifar20-fo", *one, last=0.80 + 0.01 * seed, avg=0.87, zero_shot=0.66)
        write_run(root, "paper=t2-moe-cifar20-dual-hop_odd", *one, last=0.81 + 0.02 * seed, avg=0.88 + 0.01 * seed)
        frozen = [*one, "orders.order=frozen", f"run.name=frozen-{seed}"]
        write_run(root, "paper=t2-moe-cifar20-dual-hop_odd", *frozen, last=0.80 + 0.01 * seed, avg=0.88)
        write_run(root, *SMALL, *one, "orders=first", last=0.20, avg=0.31, test_images=50)
        write_run(root, *SMALL, *one, "orders=dual_hop_odd", "zo=mozo", last=0.22 + 0.01 * seed, avg=0.32, test_images=50)
        write_run(root, *one, "zo=conservative", last=0.9, avg=0.95, records=True)
    write_run(root, "zo=mozo", last=0.92, avg=0.95, zero_shot=0.15, records=True)
    write_run(root, "paper=t1-moe-cifar20-fo", "run.name=t1-moe-cifar20-fo-seed0-again", last=0.5, avg=0.5)
    write_run(root, "paper=t1-moe-cifar20-dual", last=0.7, avg=0.8, num_tasks_done=2)
    (root / "stray").mkdir()
    return root


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as monkeypatch:
        report_of(monkeypatch, *sorted(runs.iterdir()), "--out", out)
    return out


def page_of(folders: Iterable[Path], against: str | None = None) -> str:
    """Return the page of a report alone: pictures take long to draw."""
    published_cells = pd.DataFrame(map(asdict, paper_runs().values()))
    return Report(run_frame(sorted(folders))[0], published_cells, published()["table5_memory_gb"], {}, against).page


def page(report: Path) -> str:
    return (report / "report.md").read_text(encoding="utf-8")


def data(report: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(report / "data" / f"{name}.csv", keep_default_na=False, na_values=[""]).fillna({"other_settings": "", "claim": ""})


def test_the_page_of_two_runs_is_the_golden_one(runs):
    """After an intended change: look at the new page of these two runs, then copy it to tests/report/golden/report.md."""
    assert page_of([runs / "t1-moe-cifar20-fo-seed0", runs / "t2-moe-cifar20-dual-hop_odd-seed0"]) == GOLDEN.read_text()


def test_a_cell_has_the_paper_s_number_ours_the_differences_and_the_gain_over_the_control(report):
    cells = data(report, "cells")
    cell = cells[(cells.paper_id == "t2-moe-cifar20-dual-hop_odd") & (cells.metric == "last") & (cells.other_settings == "")]
    assert len(cell) == 1
    cell = cell.iloc[0]
    assert (cell.paper, cell["mean"], cell["seeds"]) == (81.64, pytest.approx(82.0), 2)
    assert cell["std"] == pytest.approx(np.sqrt(2)) and cell.difference == pytest.approx(0.36)
    assert (cell.gain, cell.gain_seeds, cell.to_first, cell.paper_to_first) == (
        *(pytest.approx(1.5), 2, pytest.approx(1.5)),
        pytest.approx(1.17),
    )


def test_the_page_leads_with_the_runs_the_best_first_each_with_its_control(report):
    results = page(report).split("## What was run")[1].split("##")[0]
    for dataset, number in (("CIFAR-100 Inc20", 6), ("digits Inc2", 3)):
        lasts = [float(last) for last in re.findall(rf"^\| {dataset} \| [^|]+ \| [^|]* \| ([\d.]+)", results, re.M)]
        assert lasts == sorted(lasts, reverse=True) and len(lasts) == number
    own = "82.00 ± 1.41 (2) ★ | +1.50 | [−4.85, +7.85] | 88.50 ± 0.71 (2) ★ | +0.50 | [−5.85, +6.85] |"
    assert f"| CIFAR-100 Inc20 | dual hop_odd, conservative | frozen | {own}  |" in results
    assert f"| dual hop_odd, mozo | frozen | 22.50 ± 0.71 (2) | – | – | 32.00 ± 0.00 (2) | – | – | {SETTINGS} |" in results


def test_the_best_value_among_the_methods_with_the_same_seeds_is_marked(report):
    results = page(report).split("## What was run")[1].split("##")[0]
    for dataset in ("CIFAR-100 Inc20", "digits Inc2"):
        rows = [[cell.strip() for cell in line.split("|")] for line in results.splitlines() if line.startswith(f"| {dataset}")]
        for column in (4, 7):
            for number in ("(1)", "(2)"):  # seeds 0; 0 and 1
                of_seeds = [row[column] for row in rows if number in row[column]]
                best = max((float(text.split()[0]) for text in of_seeds), default=0)
                assert [text.endswith("★") for text in of_seeds] == [
                    len(of_seeds) > 1 and float(text.split()[0]) == best for text in of_seeds
                ]


def test_a_method_is_marked_only_if_no_other_is_better_over_its_own_seeds(tmp_path):
    """Two methods have two seeds. Naive steps have the second seed only: beaten there, though the best of those with that seed alone."""
    for seed in ("seed=0", "seed=1"):
        write_run(tmp_path, "orders=first", seed, last=0.7, avg=0.7)
        write_run(tmp_path, "orders.order=frozen", seed, last=0.6, avg=0.8)
    write_run(tmp_path, "zo=naive", "seed=1", last=0.65, avg=0.65)
    write_run(tmp_path, "zo=sign", "seed=1", last=0.75, avg=0.6)
    lines = page_of(tmp_path.iterdir()).split("## What was run")[1].split("##")[0].splitlines()
    rows = {line.split(" | ")[1]: line for line in lines if line.startswith("| digits")}
    marked = {method: [cell.endswith("★") for cell in line.split(" | ") if re.match(r"\d", cell)] for method, line in rows.items()}
    assert marked == {
        "first order": [True, False],
        "dual hop_odd, frozen": [False, True],
        "dual hop_odd, naive": [False, False],
        "dual hop_odd, sign": [True, False],
    }


def test_the_control_of_what_learns_alone_is_zero_shot_clip_also_where_all_runs_have_that_setting(tmp_path):
    for seed in ("seed=0", "seed=1"):
        write_run(tmp_path, "orders=language_all", "orders.rest=frozen", "zo=naive", seed, last=0.5, avg=0.6, zero_shot=0.4)
    assert "| digits Inc2 | language all, naive | zero-shot | 50.00" in page_of(tmp_path.iterdir())


def test_every_method_can_be_compared_with_a_chosen_one(runs):
    """Of CIFAR-100 Inc20 with the paper's model, over two seeds; the small CLIP's runs are another group, with first order of its own."""
    text = page_of(runs.iterdir(), "first order")
    question, asked = text[text.index("**Does a method differ from the one that was chosen?**") :].split("\n\n")[:2]
    assert text.replace(f"{question}\n\n{asked}\n\n", "") == page_of(runs.iterdir())  # nothing else changes
    rows = [line.removeprefix("| ").split(" | ")[:5] for line in asked.splitlines()[2:]]
    assert [row[1:] for row in rows] == [
        ["dual hop_odd, frozen", "first order", "2", "+0.00"],
        ["dual hop_odd, conservative", "first order", "2", "+1.50"],
        ["dual hop_odd, mozo", "first order; adapter.scale=1.0", "2", "+2.50"],
    ]


def test_a_method_that_cannot_be_chosen_is_refused_with_those_that_can(tmp_path, monkeypatch, capsys):
    """Three runs have one label, and differ in a setting; first order has another seed."""
    for scale, last in (("1", 0.55), ("3", 0.5), ("9", 0.6)):
        write_run(tmp_path, "zo=naive", f"zo.lr_scale={scale}", f"run.name={scale}", last=last, avg=last)
    write_run(tmp_path, "orders=first", "seed=1", last=0.7, avg=0.7)
    runs = sorted(tmp_path.iterdir())
    plain = "dual hop_odd, naive; adapter.scale=1.0"
    names = [plain, f"{plain}; zo.lr_scale=3.0", f"{plain}; zo.lr_scale=9.0"]
    both = "choose from:\n  " + "\n  ".join(names)
    for chosen, why in [
        ("dual hop_odd, naive", f"3 methods have this name; {both}\n"),
        ("dual hop_odd", f"no complete run has this method; {both}\n  first order; adapter.scale=1.0\n"),
        ("first order", "no other method has a seed and the settings of training in common with it"),
    ]:
        with pytest.raises(SystemExit):
            report_of(monkeypatch, *runs, "--out", tmp_path / "report", "--against", chosen)
        assert f"--against {chosen!r}: {why}" in capsys.readouterr().err
    for chosen, less in ((names[2], "−10.00"), (plain, "+5.00")):  # the whole name of one is the beginning of the others
        assert f"| dual hop_odd, naive | {chosen} | 1 | {less} |" in page_of(runs, chosen)


def test_every_entry_of_the_contents_leads_to_its_section(report):
    html, sections = (report / "report.html").read_text(), re.findall(r"^## (.+)", page(report), re.M)
    links = re.findall(r'<a href="#([^"]+)">([^<]+)</a>', html)
    assert [title for _, title in links] == sections and len(sections) >= 6
    assert all(f'<h2 id="{anchor}">{title}</h2>' in html for anchor, title in links)
    assert html.index("<a href") < html.index("<table>")


def test_each_complete_run_has_its_accuracy_matrix_and_its_curve(report, runs):
    text = page(report).split("## Each run")[1].split("\n## ")[0]
    complete = data(report, "runs").sort_values("last", ascending=False, kind="stable")
    assert (
        re.findall(r"^\*\*(.+?)\.\*\* Row t", text, re.M)
        == re.findall(r"^\*\*(.+?)\.\*\* Accuracy on all", text, re.M)
        == list(complete.run)
    )
    for number, run in enumerate(complete.run, start=1):
        assert data(report, f"accuracy_matrix-{number}").seen.iloc[-1] == pytest.approx(complete.set_index("run").loc[run, "last"] / 100)
        assert {f"accuracy_matrix-{number}.png", f"accuracy-{number}.png"} <= {path.name for path in (report / "images").iterdir()}


def test_no_column_has_dashes_alone(report):
    for table in re.findall(r"(?:^\|.*\n)+", page(report), re.M):
        rows = [line.strip("|").split(" | ") for line in table.strip().splitlines()]
        for place, aligned in enumerate(rows[1]):
            assert ":---" in aligned or {row[place].strip(" |") for row in rows[2:]} - {"", "–"}, table


def test_settings_that_all_runs_share_are_named_once(runs):
    results = page_of(runs.glob("digits-*")).split("## What was run")[1].split("##")[0]
    assert results.count("model.name=small_clip") == 1 and "other settings |" not in results and "zero-shot CLIP" in results


def test_the_paper_s_tables_show_ours_beside_theirs(report):
    table = page(report).split("### Table 2.")[1]
    assert "| dual hop_odd, conservative | 81.64 | 82.00 ± 1.41 (2) | +0.36 | +1.17 | +1.50 | 88.11 | 88.50 ± 0.71 (2) | +0.39 |" in table
    assert "| dual hop_even, conservative | 81.59 | – | – | +1.12 | – |" in table and "lora" not in table


def test_another_model_is_not_compared_with_the_paper_s_accuracy(report):
    table = page(report).split("### Table 1.")[1]
    assert f"| first order | 80.47 | 20.00 ± 0.00 (2) | – | – | 86.97 | 31.00 ± 0.00 (2) | – | – | {SETTINGS} |" in table


def test_folders_that_are_not_used_are_named_with_the_reason(report):
    unused = page(report).split("## What is missing")[1]
    assert "t1-moe-cifar20-dual-seed0 (not complete, tasks done: 2)" in unused
    assert "t1-moe-cifar20-fo-seed0-again (repeats the settings and the seed of another run)" in unused
    assert "stray (not a run folder: it has no config.yaml)" in unused


def test_the_html_needs_no_other_file(report):
    html = (report / "report.html").read_text()
    references = re.findall(r"""(?:src|href)=["'](?!data:|#)""", html)
    assert not references and "<link" not in html and "<script" not in html and "@import" not in html
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    assert len(pictures) == len(list((report / "images").glob("*.png"))) > 0
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    assert html.count("<table>") == len(re.findall(r"^\| :---", page(report), re.M))


def test_only_pictures_of_the_report_are_put_into_the_html(tmp_path, monkeypatch, capsys):
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    html = to_html(f"![ours](images/a.png) ![other]({secret}) ![up](images/../secret.png)", {"images/a.png": b"ours"})
    assert html.count("<img") == 1 and base64.b64encode(b"ours").decode() in html and base64.b64encode(b"secret").decode() not in html
    named = write_run(tmp_path, "zo=mozo", last=0.5, avg=0.5, num_tasks_done=1).rename(tmp_path / "![x](..)<b>")
    report_of(monkeypatch, named, "--out", tmp_path / "out")
    html = (tmp_path / "out" / "report.html").read_text()
    assert "left out: ![x](..)<b> (not complete, tasks done: 1)" in capsys.readouterr().out
    assert "![x](..)&lt;b&gt; (not complete, tasks done: 1)" in html and "<img" not in html


def test_a_loss_figure_holds_every_step_of_every_run(report, runs):
    assert not list((report / "data").glob("figure2-*")) and not list((report / "data").glob("figure*-cifar100-inc10*"))
    losses = data(report, "figure3-digits-inc2")
    assert set(losses.run) == {f"digits-inc2-moe-conservative-dual-hop_odd-seed{seed}" for seed in (0, 1)}
    for name, of_run in losses.groupby("run"):
        lines = [json.loads(line) for line in (runs / str(name) / "metrics.jsonl").read_text().splitlines()]
        assert np.allclose(of_run.loss, [line["loss"] for line in lines if line["kind"] == "step"])


def test_a_unit_figure_holds_each_unit_s_statistics_over_steps(report, runs):
    units = data(report, "figure7-digits-inc2")
    assert len(units) == 3 * 24 and set(units.variant) == {"conservative", "mozo"}
    name = "digits-inc2-moe-mozo-dual-hop_odd-seed0"
    records = pd.read_parquet(runs / name / "units")
    unit = records[(records.branch == "language") & (records.layer == 3)]
    line = units[(units.run == name) & (units.tower == "language") & (units.layer == 3)].iloc[0]
    assert (line.order, line.steps) == ("zeroth", len(unit))
    assert line.coordinate_variance == pytest.approx(unit.gradient_variance.mean(), rel=1e-4)
    assert line.norm_variance == pytest.approx(unit.gradient_norm.var(), rel=1e-4)
    assert line.mean_update == pytest.approx(unit.update_norm.mean(), rel=1e-4)


def test_a_caption_says_from_which_runs_and_with_which_settings(report):
    assert "From 3 runs. Without a run or its records: dual hop_even, conservative; dual hop_even, mozo." in page(report)
    assert "Other settings than the paper's: model.name=small_clip; model.pretrained=shipped." in page(report)


def test_a_caption_names_the_settings_of_each_method(tmp_path):
    folder = write_run(tmp_path, "zo=conservative", "zo.lr_scale=3", last=0.5, avg=0.5, records=True)
    runs, _ = run_frame([folder])
    assert " dual hop_odd, conservative: adapter.scale=1.0; zo.lr_scale=3." in draw_figure(3, runs).caption


def test_figure_8_has_a_row_per_seed(report):
    seeds = data(report, "figure8-cifar100-inc20")
    assert sorted(seeds[seeds.variant == "conservative"]["last"]) == pytest.approx([81, 83]) and set(seeds.seed) == {0, 1}
    assert {"last", "avg"} < set(seeds.columns)


def test_a_claim_is_answered_with_the_paper_s_own_difference_beside(report):
    found = data(report, "comparisons").query("other_settings == '' and variant == 'conservative'").set_index(["claim", "metric"])
    assert {claim for claim, _ in found.index} == {"hop_reaches_first_order", "differs_from_control"}
    reached, control = found.loc[("hop_reaches_first_order", "last")], found.loc[("differs_from_control", "last")]
    assert (reached.paper, reached["mean"]) == (pytest.approx(81.64 - 80.47), pytest.approx(1.5)) and np.isnan(control.paper)
    low = 1.5 - 12.706 * 0.5  # differences 1 and 2; t(1)
    assert (reached.low, reached.verdict) == (pytest.approx(low, abs=1e-3), "not decided")
    text = page(report)
    missing = text.split("## What is missing")[1].splitlines()
    [unasked] = [line for line in missing if line.startswith("Questions without runs: ")]
    assert "Is zeroth order in both branches behind first order?" in unasked and "reach first order" not in unasked
    # The frozen control is in the table, and does not count.
    assert "reach first order?** (Δ > −1 point) Last not decided: 2; Avg not decided: 1; Avg no interval: 1." in text
    assert text.count("dual hop_odd, frozen | first order | 2 |") == 1


def test_memory_is_the_most_that_a_step_of_a_probe_has_held(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "runs", "paper=t5-moe-dual", last=0.9, avg=0.9, records=True, peak_gib=1.25)
    report_of(monkeypatch, folder, "--out", tmp_path / "out")
    memory = data(tmp_path / "out", "memory").query("adapter == 'moe' and setting == 'dual'").iloc[0]
    assert (memory.paper_gb, memory.peak_gib, memory.runs) == (2.17, 1.25, 1)
    assert "| moe | dual all | Tiny-ImageNet Inc125 |  | 2.17 | 1.00 | 1.25 | 0.58 |" in page(tmp_path / "out")
    assert "t5-moe-dual-seed0 (ended by train.max_steps: only its memory is shown)" in page(tmp_path / "out")
    assert not list((tmp_path / "out" / "images").iterdir()) and data(tmp_path / "out", "runs").empty


def test_a_report_is_written_where_the_locale_knows_ascii_only(tmp_path):
    run = write_run(tmp_path / "runs", "data=digits", last=0.9, avg=0.9)
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "dist_vlcl", "report", run, "--out", tmp_path / "out"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert "±" in page(tmp_path / "out") and (tmp_path / "out" / "report.html").stat().st_size > 1000


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "runs", "data=digits", last=0.9, avg=0.9)
    (tmp_path / "out").write_text("a file")
    with pytest.raises(SystemExit) as ended:
        report_of(monkeypatch, run, "--out", tmp_path / "out")
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(("argument", "words"), [("nowhere", "no such folder"), (".", "none of these is a run folder")])
def test_a_wrong_folder_is_refused_in_one_line(tmp_path, monkeypatch, capsys, argument, words):
    with pytest.raises(SystemExit) as exit:
        report_of(monkeypatch, tmp_path / argument)
    assert exit.value.code == 2 and words in capsys.readouterr().err
