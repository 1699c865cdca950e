"""The shipped results: the page shows what the CSV files hold, and both come from run folders."""

import importlib.util
from pathlib import Path

import pandas as pd
import pytest

from tests.helpers.runs import write_run

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("evidence", ROOT / "tools" / "evidence.py")
evidence = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(evidence)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> tuple[pd.DataFrame, Path]:
    """Runs of language alone, its frozen twin and first order on the same units; as collected, and as read back from a CSV file."""
    root, plan = tmp_path_factory.mktemp("runs"), ["data=cifar100", "tasks.increment=20", "model=vit_b16", "orders=language_all"]
    folders = []
    for seed in range(3):
        one, more = [*plan, f"seed={seed}"], 0.01 * seed
        alone = [*one, "orders.rest=frozen"]
        folders.append(write_run(root, *alone, "zo=naive", last=0.65 + more, avg=0.66 + more, zero_shot=0.60, records=True))
        folders.append(write_run(root, *alone, "orders.order=first", last=0.80, avg=0.80))
        folders.append(write_run(root, *one, "zo=conservative", last=0.701 + more, avg=0.751 + more))
        folders.append(write_run(root, *one, "orders.order=frozen", last=0.70 + more, avg=0.75 + 1.05 * more))
    return evidence.collect(folders), root


@pytest.fixture(scope="module")
def read_back(rows, tmp_path_factory) -> pd.DataFrame:
    folder = tmp_path_factory.mktemp("results")
    half = len(rows[0]) // 2
    rows[0][:half].to_csv(folder / "a.csv", index=False)
    rows[0][half:].to_csv(folder / "b.csv", index=False)
    return evidence.read(folder)


def test_a_csv_file_holds_every_run_with_its_numbers(rows, read_back):
    assert len(read_back) == 12 and set(read_back.run) == {path.name for path in rows[1].iterdir()}
    run = read_back[(read_back.variant == "naive") & (read_back.seed == 1)].iloc[0]
    assert (run["last"], run.method_settings, run.shared_settings) == (pytest.approx(66, abs=0.01), "orders.rest=frozen", "")
    assert run.recovered_last == pytest.approx(0.3, abs=0.01) and run.descent > 0 and 0 < run.cosine < 1
    assert "path" not in read_back and not any("/" in str(value) for value in read_back.to_numpy().flat)


def test_the_page_s_part_is_the_same_from_the_csv_files_as_from_the_runs(rows, read_back):
    text = evidence.section(read_back)
    assert text == evidence.section(rows[0].assign(is_complete=True, is_probe=False))
    assert "- Is language with the paper's defaults the same as frozen language? Yes (Δ Avg +0.05 points, 3 seeds, 95 % interval" in text
    assert "- Is MoZO on hop_odd the same as sign steps with equal epsilons? Not run." in text
    assert "| CIFAR-100 Inc20 | language all, naive | orders.rest=frozen | 0.30 |" in text
    assert text.index("### The primary contrasts") < text.index("### Results") < text.index("### Questions")


def test_only_the_part_between_the_markers_is_written(read_back, tmp_path):
    page = f"before\n{evidence.BEGIN}\nold\n{evidence.END}\nafter\n"
    written = evidence.with_section(page, "new")
    assert written == f"before\n{evidence.BEGIN}\n\nnew\n\n{evidence.END}\nafter\n" == evidence.with_section(written, "new")
    with pytest.raises(ValueError, match="the page needs these two lines once"):
        evidence.with_section("no markers", "new")
    evidence.section(read_back, tmp_path / "images")
    assert list((tmp_path / "images").glob("results-*.png"))


def test_the_page_shows_what_the_shipped_csv_files_hold():
    runs = evidence.read(ROOT / "docs" / "results")
    if runs.empty:
        pytest.skip("docs/results has no CSV files yet")
    page = evidence.PAGE.read_text()
    assert evidence.with_section(page, evidence.section(runs)) == page
