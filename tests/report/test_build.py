"""Reports of run folders that the trainer's own code has written."""

import base64
import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dist_vlcl.report import build
from dist_vlcl.report.paper_tables import paired_test
from tests.helpers.runs import write_run

GOLDEN = Path(__file__).parent / "golden" / "report.md"
SMALL = ("data=cifar100", "model=small", "train.epochs=2")


def report_of(*arguments: str) -> None:
    sys.argv = ["build", *arguments]
    build.main()


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
    argv = sys.argv
    report_of(*map(str, sorted(runs.iterdir())), "--out", str(out))
    sys.argv = argv
    return out


def page(report: Path) -> str:
    return (report / "report.md").read_text()


def test_the_page_is_the_golden_one(report):
    """After a change that is meant: look at the new page, then copy it to tests/report/golden/report.md."""
    assert page(report) == GOLDEN.read_text()


def test_ours_stand_under_theirs_with_difference_seeds_spread_and_control(report):
    cells = pd.read_csv(report / "data" / "cells.csv")
    cell = cells[
        (cells.paper_id == "t2-moe-cifar20-dual-hop_odd") & (cells.metric == "last") & (cells.table == "Table 2") & (cells.seeds > 0)
    ]
    assert len(cell) == 1
    cell = cell.iloc[0]
    assert (cell.paper, cell["mean"], cell["seeds"]) == (81.64, pytest.approx(82.0), 2)
    assert cell["std"] == pytest.approx(np.sqrt(2)) and cell.difference == pytest.approx(0.36)
    assert (cell.control_mean, cell.control_seeds) == (pytest.approx(80.5), 2)
    assert (cell.gain, cell.to_first, cell.paper_to_first) == (pytest.approx(1.5), pytest.approx(1.5), pytest.approx(1.17))


def test_the_tables_say_so_too(report):
    text = page(report)
    assert "| **dual hop_odd, conservative** | paper | 81.64 | 88.11 |" in text
    assert "|  | ours | 82.00 ± 1.41 (2) | 88.50 ± 0.71 (2) |" in text
    assert "|  | ours − paper | +0.36 | +0.39 |" in text
    assert "|  | frozen | 80.50 ± 0.71 (2) | 88.00 ± 0.00 (2) |" in text


def test_another_model_has_its_own_part_and_no_difference_to_the_paper(report):
    parts = re.split(r"^## ", page(report), flags=re.M)
    small = next(part for part in parts if part.startswith("Part 2, small_clip (shipped): not the paper's model\n"))
    told = ("model.name small_clip (not ViT-B-16-quickgelu)", "train.epochs 2 (not 1)", "the test set a part (not whole)")
    assert all(departure in small for departure in told)
    assert "ours − paper" not in small and "ours − our first order" in small
    paper = next(part for part in parts if "the paper's model and settings\n" in part)
    assert "small_clip" not in paper


def test_a_cell_that_the_paper_has_not_is_shown_without_its_number(report):
    """Table 3 has no CIFAR-100 Inc20."""
    assert "| **dual hop_odd, mozo** | ours | 22.50 ± 0.71 (2) |" in page(report)


def test_missing_cells_and_controls_are_named(report):
    missing = page(report).split("### Missing")[1]
    assert "`t1-moe-cifar20-dual`" in missing and "`t3-moe-imgr20-mozo-hop_even`" in missing and "`t1-moe-cifar20-fo`" not in missing
    assert "controls: dual hop_odd, frozen" in page(report)


def test_folders_that_are_not_used_are_named_with_the_reason(report):
    unused = page(report).split("## Not in this report")[1]
    assert "`t1-moe-cifar20-dual-seed0`: not complete: 2 tasks done" in unused
    assert "`t1-moe-cifar20-fo-seed0-again`: repeats a run of the same cell and seed" in unused
    assert "`stray`: no run folder: config.yaml is missing" in unused


def test_the_html_needs_no_other_file(report):
    html = (report / "report.html").read_text()
    assert (
        not re.findall(r"""(?:src|href)=["'](?!data:)""", html) and "<link" not in html and "<script" not in html and "@import" not in html
    )
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    assert len(pictures) == len(list((report / "images").glob("*.png"))) > 0
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    assert html.count("<table>") == len(re.findall(r"^\| :---", page(report), re.M))


def digits(report: Path, number: int) -> pd.DataFrame:
    (path,) = (report / "data").glob(f"*figure{number}-digits-inc2.csv")
    return pd.read_csv(path)


def test_a_loss_figure_holds_every_step_of_every_run(report, runs):
    absent = "dual all, conservative; vision all, conservative; language all, conservative"
    assert f"- Figure 2. Loss by branch that learns by zeroth order; digits Inc2: not run: {absent}\n" in page(report)
    data = digits(report, 3)
    assert set(data.run) == {f"digits-inc2-moe-conservative-dual-hop_odd-seed{seed}" for seed in (0, 1)}
    for name, of_run in data.groupby("run"):
        lines = [json.loads(line) for line in (runs / str(name) / "metrics.jsonl").read_text().splitlines()]
        assert np.allclose(of_run.loss, [line["loss"] for line in lines if line["kind"] == "step"])


def test_a_unit_figure_holds_each_unit_s_statistics_over_steps(report, runs):
    data = digits(report, 7)
    assert len(data) == 3 * 24 and set(data.variant) == {"conservative", "mozo"}
    name = "digits-inc2-moe-mozo-dual-hop_odd-seed0"
    units = pd.read_parquet(runs / name / "units")
    unit = units[(units.branch == "language") & (units.layer == 3)]
    line = data[(data.run == name) & (data.tower == "language") & (data.layer == 3)].iloc[0]
    assert (line.order, line.steps) == ("zeroth", len(unit))
    assert line.coordinate_variance == pytest.approx(unit.gradient_variance.mean(), rel=1e-4)
    assert line.norm_variance == pytest.approx(unit.gradient_norm.var(), rel=1e-4)
    assert line.mean_update == pytest.approx(unit.update_norm.mean(), rel=1e-4)


def test_a_caption_says_from_which_runs_and_what_is_absent(report):
    assert "From 3 runs: seeds 0, 1 of dual hop_odd, conservative, and seed 0 of dual hop_odd, mozo." in page(report)
    assert "Without: dual hop_even, conservative; dual hop_even, mozo (not run, or not recorded)." in page(report)


def test_a_figure_without_records_says_so(report):
    assert "by branch, hop_odd; CIFAR-100 Inc20: no run of it has recorded its units (units/*.parquet)\n" in page(report)
    assert "- Figure 3. Loss with hop_odd; CIFAR-100 Inc20: no run of it has losses in metrics.jsonl\n" in page(report)


def test_figure_8_has_a_line_a_seed(report):
    (path,) = (report / "data").glob("vit*figure8-cifar100-inc20.csv")
    data = pd.read_csv(path)
    assert sorted(data[data.variant == "conservative"]["last"]) == pytest.approx([81, 83]) and set(data.seed) == {0, 1}


def test_the_claims_are_answered_with_the_paper_s_own_difference_beside(report):
    found = pd.read_csv(report / "data" / "comparisons.csv").query("section.str.startswith('Part 1') and variant == 'conservative'")
    by_claim = found.set_index(["claim", "metric"])
    assert set(found.claim) == {"hop_reaches_first_order", "differs_from_control"}
    reached, control = by_claim.loc[("hop_reaches_first_order", "last")], by_claim.loc[("differs_from_control", "last")]
    assert (reached.paper, reached["mean"]) == (pytest.approx(81.64 - 80.47), pytest.approx(1.5)) and np.isnan(control.paper)
    low = 1.5 - 12.706 * 0.5  # differences 1 and 2; t(1)
    assert (reached.low, reached.verdict) == (pytest.approx(low, abs=1e-3), "not told apart")
    text = page(report)
    assert "**Do hop plans reach first order?** (Δ > −1 point) Last: not told apart 1; Avg: not told apart 1." in text
    assert "**Does dual zeroth order fall behind first order?** (Δ < 0) Not run." in text
    assert (report / "images" / "vit-b-16-quickgelu-openai-claims-cifar100.png").exists()


def test_every_method_stands_beside_its_control(report):
    assert (
        "| dual hop_odd, conservative | 82.00 ± 1.41 (2) | 88.50 ± 0.71 (2) | frozen | +1.50 | [−4.85, +7.85] | +0.50 | [−5.85, +6.85] |"
        in page(report)
    )


def test_results_and_claims_go_into_another_page_between_its_marks(runs, tmp_path, monkeypatch, capsys):
    other = tmp_path / "docs" / "PAGE.md"
    other.parent.mkdir()
    other.write_text("before\n<!-- report -->\nstale words\n<!-- /report -->\nafter\n")
    small = [str(folder) for folder in runs.glob("cifar100-inc20-*seed*")] + [str(folder) for folder in runs.glob("digits-*seed0")]
    monkeypatch.setattr(sys, "argv", ["build", *small, "--out", str(tmp_path / "out"), "--into", str(other)])
    build.main()
    text = other.read_text()
    assert text.startswith("before\n<!-- report -->\n") and text.endswith("<!-- /report -->\nafter\n") and "stale words" not in text
    assert "### Part 1, small_clip (shipped): not the paper's model" in text and "#### CIFAR-100 Inc20" in text
    pictures = re.findall(r"\]\((images/[^)]+)\)", text)
    assert all((other.parent / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert all((other.parent / picture).stat().st_size < 150_000 for picture in pictures)
    built = {f"images/{path.name}" for path in (tmp_path / "out" / "images").glob("*.png")}
    assert set(pictures) == built and {name.split("-")[-3] for name in built} >= {"figure3", "figure7", "figure8"}
    captions = {line for line in text.splitlines() if line.startswith("**Figure ")}
    assert len(captions) == sum("figure" in picture for picture in pictures) and all("From " in caption for caption in captions)
    other.write_text("no marks")
    with pytest.raises(SystemExit):
        build.main()
    assert "give a page that has the lines <!-- report --> and <!-- /report -->" in capsys.readouterr().err
    assert other.read_text() == "no marks"


def test_a_paired_test_is_that_of_the_textbook():
    """t(2) = 2 / (1 / sqrt 3) = 3.464; its 97.5 % quantile is 4.303."""
    found = paired_test([1.0, 2.0, 3.0])
    assert (found["seeds"], found["mean"]) == (3, 2.0)
    assert [found["low"], found["high"], found["p"]] == pytest.approx([2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5, 0.0742], abs=1e-3)
    assert np.isnan(paired_test([1.0])["p"]) and np.isnan(paired_test([1.0, 1.0])["p"])


def test_memory_is_the_most_that_a_step_has_held(tmp_path):
    write_run(tmp_path, "paper=t1-moe-cifar20-dual", "tasks.num_tasks=1", last=0.9, avg=0.9, records=True, peak_gib=1.25)
    ((run,), _) = build.read_runs([*tmp_path.iterdir()])
    run.config["train"]["max_steps"] = 5
    report = build.build([run])
    line = report.data["memory"].query("adapter == 'moe' and setting == 'dual'").iloc[0]
    assert (line.paper_gb, line.peak_gib, line.runs) == (2.17, 1.25, 1)
    assert [*report.pictures] == ["vit-b-16-quickgelu-openai-memory"] and "runs" not in report.data


@pytest.mark.parametrize(("argument", "words"), [("nowhere", "no such folder"), (".", "none of these is the folder of a run")])
def test_a_slip_is_answered_in_words(tmp_path, monkeypatch, capsys, argument, words):
    monkeypatch.setattr(sys, "argv", ["build", str(tmp_path / argument)])
    with pytest.raises(SystemExit) as exit:
        build.main()
    assert exit.value.code == 2 and words in capsys.readouterr().err


def test_a_run_that_cannot_be_read_is_passed_over_by_name(tmp_path):
    folder = write_run(tmp_path, last=0.9, avg=0.9)
    (folder / "accuracy.json").write_text('{"complete"')
    runs, passed_over = build.read_runs([folder])
    assert not runs and passed_over[folder.name].startswith("cannot be read: ")
