"""The shipped results: the page shows what the CSV files hold, and both come from run folders."""

import argparse
import importlib.util
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from dist_vlcl.paper import CONFIG_FOLDER
from dist_vlcl.report.records import CELL
from tests.helpers.runs import write_run
from tests.report.test_statistics import FO, results

ROOT = Path(__file__).parents[1]


def tool(name: str):
    """Return a script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


evidence, confirm = tool("evidence"), tool("confirm")


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
    parts = evidence.parts_of_pages(read_back)
    assert parts == evidence.parts_of_pages(rows[0].assign(is_complete=True, is_probe=False))
    text = parts["results.md"]
    assert "- Is language with zo=conservative, the paper's default, the same as frozen language? Yes so far (Δ Avg +0.05 points" in text
    question = "Is dual hop_odd with zo=conservative, the paper's default, the same as its frozen control?"
    assert f"| {question} | \\|Δ\\| \\< 0.5 | Avg | 0 | – | – | – | – | not run |" in text
    assert "| CIFAR-100 Inc20 | language all, naive | orders.rest=frozen | 3 | 0.30 |" in text
    assert text.index("## The primary contrasts") < text.index("## All runs with several seeds")
    assert (
        "2 comparisons, Δ Avg +0.05 to +3.00. Answers in Avg from several seeds: yes (higher) 1, no (within ±0.5) 1." in parts["claims.md"]
    )
    assert parts["one-seed.md"] == "No plan has run once."


def test_a_plan_with_one_seed_is_on_the_page_of_those_alone(read_back):
    parts = evidence.parts_of_pages(read_back[(read_back.seed == 0) | (read_back.variant != "naive")])
    row = "| CIFAR-100 Inc20 | language all, naive | zero-shot | 65.00 (1) "
    assert [page for page, text in parts.items() if row in text] == ["one-seed.md"]
    assert "## Questions" not in parts["one-seed.md"]  # differences to a control are in the table of runs


def test_r_is_shown_also_where_no_step_was_measured():
    runs = evidence.read(ROOT / "docs" / "results")
    chosen = runs[runs.run.str.fullmatch("cifar100-(dual-walk|first)-s1[1-4]")]
    assert len(chosen) == 8 and chosen.cosine.isna().all()
    assert "What did zeroth order contribute?" in (text := evidence.parts_of_pages(chosen)["results.md"]) and "| R Avg |" in text


def test_r_is_shown_with_its_interval(read_back):
    text = evidence.parts_of_pages(read_back)["results.md"]
    found = [0.05 / 0.20, 0.06 / 0.20, 0.07 / 0.20]  # Last of three seeds
    low, high = stats.t.interval(0.95, 2, np.mean(found), stats.sem(found))
    assert f"| CIFAR-100 Inc20 | language all, naive | orders.rest=frozen | 3 | 0.30 | [{low:+.2f}, {high:+.2f}] |" in text


@pytest.mark.filterwarnings("ignore:.*steps missing")  # these runs have results only
def test_the_confirming_runs_are_those_that_the_contrasts_compare(tmp_path):
    runs = confirm.commands(["many-probes", "defaults", "positive-control"], "cifar100", [10]) + confirm.commands(
        ["hybrid", "frozen"], "tiny_imagenet", [10]
    )
    for options in runs:
        run = [option for option in options if not option.startswith("run.")]
        write_run(tmp_path, *run, f"run.name={options[-1].split('=')[1]}", last=0.5, avg=0.6, zero_shot=0.4)
    rows = evidence.collect(sorted(tmp_path.iterdir()))
    results = evidence.results_of(rows.assign(is_complete=True).drop(columns=["recovered_last", "recovered_avg"]))
    contrasts = evidence.contrasts_of(results, yaml.safe_load((CONFIG_FOLDER / "contrasts.yaml").read_text()))
    assert dict(zip(contrasts.name, contrasts.seeds, strict=True)) == dict.fromkeys(contrasts.name, 1)
    ratios = rows.set_index("run").recovered_avg.dropna()
    assert set(ratios.index) == {
        f"cifar100-{name}-s10" for name in ("language", "language-many-walk", "dual-conservative", "dual-walk", "ten-times")
    }


def test_the_runs_of_which_r_is_made_have_the_same_seeds_and_class_orders():
    runs = confirm.commands(["language", "language-first", "learning-rates"], "cifar100")
    pairs = [tuple(word for word in run if word.startswith(("seed=", "tasks.order="))) for run in runs]
    assert pairs == [(f"seed={seed}", f"tasks.order=seed:{seed}") for seed in range(20, 30)] * 5


def test_added_runs_keep_the_rows_whose_folders_are_gone_and_count_in_r(rows, tmp_path):
    expected, out = rows[0].set_index("run").sort_index(), tmp_path / "runs.csv"
    folders = {path.name: path for path in rows[1].iterdir()}
    alone = set(expected.index[expected.recovered_last.notna()])  # their R needs first order, whose rows are already in the file
    evidence.write_csv([path for name, path in folders.items() if name not in alone], out)
    assert len(pd.read_csv(out)) == 9
    evidence.write_csv([folders[name] for name in alone], out, adds=True)
    (tmp_path / "again" / next(iter(folders))).mkdir(parents=True)  # a run of that name is under way elsewhere
    shutil.copy(folders[next(iter(folders))] / "config.yaml", tmp_path / "again" / next(iter(folders)))
    evidence.write_csv([tmp_path / "again" / next(iter(folders))], out, adds=True)
    for _ in range(2):
        found = evidence.read(tmp_path).set_index("run").sort_index()
        assert found.recovered_last.equals(expected.recovered_last) and found["last"].equals(expected["last"])
        rows_of_before = pd.read_csv(out).assign(last=0)
        rows_of_before.assign(run="old-" + rows_of_before.run).to_csv(out, index=False)
        evidence.write_csv(list(folders.values()), out, adds=True)  # a run that is collected again replaces its row, whatever its name was


def test_two_folders_of_one_name_are_refused(rows, tmp_path):
    first, second = sorted(rows[1].iterdir())[:2]
    shutil.copytree(second, tmp_path / first.name)
    with pytest.raises(SystemExit, match=f"two folders have the name {first.name}"):
        evidence.collect([first, tmp_path / first.name])


def test_a_range_of_seeds_that_has_none_is_refused():
    assert confirm.seeds_of("10-12") == [10, 11, 12] and confirm.seeds_of("7,9") == [7, 9]
    with pytest.raises(argparse.ArgumentTypeError, match="19-10: the first seed must be the smallest"):
        confirm.seeds_of("19-10")


def test_only_the_part_between_the_markers_is_written(read_back, tmp_path):
    page = f"before\n{evidence.BEGIN}\nold\n{evidence.END}\nafter\n"
    written = evidence.with_section(page, "new")
    assert written == f"before\n{evidence.BEGIN}\n\nnew\n\n{evidence.END}\nafter\n" == evidence.with_section(written, "new")
    with pytest.raises(ValueError, match="the page needs these two lines once"):
        evidence.with_section("no markers", "new")
    evidence.parts_of_pages(read_back, tmp_path / "images")
    assert list((tmp_path / "images").glob("results-*.png"))


def test_the_page_shows_what_the_shipped_csv_files_hold():
    runs = evidence.read(ROOT / "docs" / "results")
    assert len(runs) > 300
    for name, part in evidence.parts_of_pages(runs, folder=ROOT / "docs" / "results").items():
        page = (evidence.DOCS / name).read_text()
        assert evidence.with_section(page, part) == page


def test_the_results_in_the_readme_are_those_of_the_csv_files():
    page, runs = " ".join((ROOT / "README.md").read_text().split()), evidence.read(ROOT / "docs" / "results")
    first_run = runs[(runs.dataset == "digits") & runs.seed.isin([0, 1, 2]) & (runs.shared_settings == runs.model_settings)]
    first_run = first_run[~first_run.method_settings.str.contains("orders.rest")]
    of_cifar = runs[(runs.dataset == "cifar100") & ~runs.shared_settings.str.contains("train.epochs|first_order.lr")]
    late = of_cifar[of_cifar.seed.isin(range(20, 30)) & of_cifar.method_settings.str.contains("vision: first")]
    parts = {(key, 3): part for key, part in first_run.groupby("variant")} | {
        (key, 10): part for key, part in late.groupby(["layers", "variant"])
    }
    names = {
        "zero_shot": "`orders=zero_shot`: CLIP without training",
        "none": "`orders=first`: first order in all blocks",
        "mozo": "default: MoZO in odd blocks, first order in even blocks",
        "frozen": "`orders.order=frozen`: the odd blocks are not trained",
        ("suffix4", "many_probes"): "`orders=language_late zo=many_probes`: vision by first order",
        ("all but language suffix4", "frozen"): "the same with `orders.order=first`",
        ("suffix4", "frozen"): "the same with `orders.order=frozen`",
    }
    for (key, seeds), part in parts.items():
        if key != ("suffix4", "manywalk"):
            texts = [f"{part[metric].mean():.2f} ± {part[metric].std():.2f}" for metric in ("last", "avg")]
            assert len(part) == seeds and f"| {names.pop(key)} | {' | '.join(texts)} |" in page
    assert not names
    everywhere = of_cifar[(of_cifar.variant == "none") & (of_cifar.adapter == "moe")]
    assert f"First order in all blocks has {everywhere['last'].mean():.2f}, {everywhere.avg.mean():.2f}" in page and len(everywhere) == 10
    tiny = runs[(runs.dataset == "tiny_imagenet") & (runs.layers == "suffix4")].pivot(index="seed", columns="variant", values="avg")
    assert f"loses {(tiny.frozen - tiny.many_probes).mean():.2f} Avg on Tiny-ImageNet" in page
    lost = tiny.frozen - tiny.manywalk
    low, high = stats.t.interval(0.95, 9, lost.mean(), stats.sem(lost))
    text = f"random signs lose {lost.mean():.2f} of Avg ({low:.2f} to {high:.2f})"
    assert text in " ".join((evidence.DOCS / "results.md").read_text().split()) and len(lost) == 10


@pytest.mark.parametrize("branch", ["language", "vision"])
def test_the_table_of_a_screen_and_the_gain_of_its_fresh_runs_are_those_of_its_csv_file(branch):
    page = (evidence.DOCS / "settings.md").read_text().replace("**", "")
    page = page[page.index(f"### {branch.title()} alone") :].partition("\n#")[0]
    runs = pd.read_csv(ROOT / "docs" / "results" / "screens" / f"{branch}.csv")
    screen, fresh = runs[runs.part == "screen"], runs[runs.part == "fresh"]
    means = screen[screen.order == "zeroth"].groupby(["zo", "zo.lr_scale", "zo.probes"]).accuracy.mean().unstack()
    for (strategy, scale), row in means.iterrows():
        assert f"| {strategy}, {scale:g} | {' | '.join('–' if np.isnan(mean) else f'{mean:.2f}' for mean in row)} |" in page
    assert f"first order {screen[screen.order == 'first'].accuracy.mean():.2f}" in page

    cautious = screen[(screen.zo == "conservative") & (screen["zo.probes"] == 1)]
    is_long = cautious["zo.lr_scale"] == 10
    counted = cautious if branch == "vision" else cautious[~is_long]
    words = [
        f"takes the plain step in {counted.ordinary.mean():.0f} % of its steps",
        f"it stays in {cautious[is_long].stayed.mean():.0f} %",
    ]
    if branch == "language":
        words.append(f"ends {(cautious[is_long].accuracy - cautious[is_long].zero_shot).mean():.1f} points above frozen units")
    assert (screen[(screen.zo == "conservative") & (screen["zo.probes"] > 1)].ordinary == 100).all()
    assert all(text in " ".join(page.split()) for text in words)
    best = means.stack().idxmax()
    ours = fresh[fresh.order == "zeroth"]
    assert {tuple(run) for run in ours[["zo", "zo.lr_scale", "zo.probes"]].to_numpy()} == {best} and len(ours) == 5
    gains = ours.accuracy - ours.zero_shot  # with all units frozen the model is zero-shot CLIP
    low, high = stats.t.interval(0.95, 4, gains.mean(), stats.sem(gains))
    assert f"{gains.mean():+.2f} points over frozen units (95 % interval {low:+.2f} to {high:+.2f}" in page


def test_what_the_screens_choice_does_over_all_tasks_is_in_the_rows_of_its_runs():
    page = (evidence.DOCS / "settings.md").read_text()
    page = page[page.index("### The screens' choice over all tasks") :].partition("\n#")[0]
    runs = evidence.read(ROOT / "docs" / "results")
    runs = runs[(runs.dataset == "cifar100") & (runs.adapter == "moe") & runs.seed.isin(range(10, 20))]
    ours = runs[(runs.variant == "sign") & runs.method_settings.str.contains("zo.lr_scale=10.0")]
    plain = runs[(runs.method_settings == "adapter.scale=1.0") & ~runs.shared_settings.str.contains("train.epochs")]
    walks = runs[(runs.variant == "signwalk") & runs.method_settings.str.contains("zo.lr_scale=10.0")]
    lost = []
    for (branch, layers), tuned in ours.groupby(["branch", "layers"]):
        of_plan = plain[(plain.branch == branch) & (plain.layers == layers)]
        parts = [of_plan[of_plan.variant == variant] for variant in ("frozen", "conservative")]
        if branch == "dual" and layers == "all":
            parts[0] = tuned.assign(last=tuned.zero_shot_last, avg=tuned.zero_shot_avg)
        assert [len(part) for part in (*parts, tuned)] == [10, 10, 10]
        texts = [f"{part['last'].mean():.2f}, {part.avg.mean():.2f}" for part in (*parts, tuned)]
        texts[0] += " (zero-shot)" * (branch == "dual" and layers == "all")
        gains = tuned.set_index("seed")["last"] - parts[0].set_index("seed")["last"]
        low, high = stats.t.interval(0.95, 9, gains.mean(), stats.sem(gains))
        assert f"| {branch} {layers} | {' | '.join(texts)} | {gains.mean():.2f} ({low:.2f} to {high:.2f}) |" in page
        lost += list(-gains)
        signs = walks[(walks.branch == branch) & (walks.layers == layers)].set_index("seed")
        gains = (tuned.set_index("seed").avg - signs.avg).dropna()
        low, high = stats.t.interval(0.95, len(gains) - 1, gains.mean(), stats.sem(gains))
        lost_by_walk = (signs.avg - parts[0].set_index("seed").avg).dropna().mean()
        found = f"{signs['last'].mean():.2f}, {signs.avg.mean():.2f} | {lost_by_walk:.2f} | {gains.mean():.2f} ({low:.2f} to {high:.2f})"
        assert f"| {branch} {layers} | 10 to {9 + len(gains)} | {found} |" in page and max(gains.index) == 9 + len(gains)
        assert f" {100 * gains.mean() / -lost_by_walk:.0f} % in {branch} {layers}" in page
    assert len(lost) == 40 and f"loses {min(lost):.1f} to {max(lost):.1f} points of Last" in page


def test_what_another_cpu_changes_is_in_the_rows_of_both():
    page = " ".join((evidence.DOCS / "reproduction.md").read_text().split())
    there = pd.read_csv(ROOT / "docs/results/screens/other_cpu.csv").set_index("run")
    here = evidence.read(ROOT / "docs" / "results").set_index("run").loc[there.index]
    changes = (there - here[["last", "avg"]]).abs()
    by_signs = here.variant == "sign"
    smooth, signs = (changes[chosen].max() for chosen in (~by_signs, by_signs))
    assert f"by at most {smooth['last']:.2f} points of Last and {smooth.avg:.2f} of Avg (seven runs)" in page and sum(~by_signs) == 7
    assert f"by up to {signs['last']:.2f} of Last and {signs.avg:.2f} of Avg (two runs)" in page and sum(by_signs) == 2


def test_what_mozo_s_slopes_do_is_in_the_rows_of_its_random_walk():
    page = " ".join((evidence.DOCS / "results.md").read_text().split())
    runs = evidence.read(ROOT / "docs" / "results")
    runs = runs[(runs.branch == "dual") & (runs.layers == "hop_odd") & ~runs.method_settings.str.contains("zo.")]
    names = {"cifar100": "CIFAR-100", "tiny_imagenet": "Tiny-ImageNet", "digits": "digits"}
    for dataset, part in runs[runs.seed.isin(range(10, 20))].groupby("dataset"):
        walk, ours = (part[part.variant == variant].set_index("seed").avg for variant in ("signwalk", "mozo"))
        gains = ours - walk
        low, high = stats.t.interval(0.95, 9, gains.mean(), stats.sem(gains))
        text = rf"{re.escape(f'{gains.mean():+.2f}')}( points of Avg)? on {names.pop(dataset)} \((95 % interval )?"
        assert len(gains) == 10 and re.search(text + re.escape(f"{low:+.2f} to {high:+.2f})"), page)
    assert not names


def test_the_screen_over_all_tasks_is_that_of_its_csv_file():
    page = (evidence.DOCS / "settings.md").read_text().replace("**", "")
    page = page[page.index("### Language over all tasks") :].partition("\n#")[0]
    runs = pd.read_csv(ROOT / "docs" / "results" / "screens" / "language_tasks.csv")
    is_frozen = runs["orders.order"] == "frozen"
    runs["name"] = runs["zo.lr_scale"].map("{:g}".format).mask(is_frozen, "language frozen")
    means = runs[runs.part == "screen"].groupby("name")[["last", "accuracy"]].mean()
    assert len(means) == 4 and all(f"| {row.Index} | {row.last + 1e-9:.2f} | {row.accuracy:.2f} |" in page for row in means.itertuples())
    fresh = runs[runs.part == "fresh"].pivot(index="seed", columns="name", values="accuracy")
    assert set(fresh) == {means.accuracy.idxmax(), "language frozen"} and len(fresh) == 5
    gains = fresh[means.accuracy.idxmax()] - fresh["language frozen"]
    low, high = stats.t.interval(0.95, 4, gains.mean(), stats.sem(gains))
    screened = means.accuracy.max() - means.accuracy["language frozen"]
    found = f"{gains.mean():+.2f} points of Avg over frozen language (95 % interval {low:+.2f} to {high:+.2f}; the screen said"
    assert f"{found} {screened:+.2f})" in " ".join(page.split())
    rows = evidence.read(ROOT / "docs" / "results")
    rows = rows[(rows.dataset == "cifar100") & (rows.branch == "language") & (rows.layers == "all")]
    ours, frozen = (
        rows[(rows.variant == "sign") & rows.method_settings.str.contains("zo.lr_scale=3.0")].set_index("seed"),
        rows[rows.variant == "frozen"].set_index("seed"),
    )
    texts = []
    for metric in ("avg", "last"):
        gains = (ours[metric] - frozen[metric]).dropna()
        low, high = stats.t.interval(0.95, len(gains) - 1, gains.mean(), stats.sem(gains))
        texts.append(f"{gains.mean():.2f} of {metric.title()} ({low:.2f} to {high:.2f})")
    assert len(gains) == 10 and " and ".join(texts) in " ".join(page.split())
    walk = rows[(rows.variant == "signwalk") & rows.method_settings.str.contains("zo.lr_scale=3.0")].set_index("seed")
    gains = (ours.avg - walk.avg).dropna()
    low, high = stats.t.interval(0.95, 9, gains.mean(), stats.sem(gains))
    assert len(gains) == 10 and f"it gains {gains.mean():.2f} of Avg ({low:.2f} to {high:.2f}): here" in " ".join(page.split())


def test_the_trials_of_the_first_run_are_those_of_their_csv_file():
    page = (evidence.DOCS / "settings.md").read_text().replace("**", "")
    trials = pd.read_csv(ROOT / "docs" / "results" / "screens" / "digits.csv")
    start = {"train.batch_size": 32, "train.epochs": 5, "train.warmup_steps": 10, "first_order.lr": 1e-3}
    start |= {"adapter.scale": 1.0, "orders.layers": "hop_odd"}
    texts = ("{} images", "{} epochs", "{} warm-up steps", "lr {:.0e}", "`adapter.scale={:g}`", "`orders=dual_{}`")
    for trial in trials[trials.seed == 0].to_dict("records"):
        differs = {key: trial[key] != value for key, value in start.items()}
        differs["train.epochs"] |= differs["train.batch_size"]  # the page names both
        told = zip(start, texts, strict=True)
        changed = [text.format(trial[key]).replace("e-0", "e-") for key, text in told if differs[key]]
        order = sorted(changed, key=lambda text: text.startswith("lr"))  # the page names the learning rate last
        assert f"| {', '.join(order) or 'nothing'} | {trial['last']:.2f} |" in page
    best = trials[trials["last"] == trials["last"].max()].iloc[0]
    assert (best["train.batch_size"], best["train.epochs"], best.zero_shot_last) == (16, 3, 77.35)


def test_the_tables_of_the_choice_of_many_probes_are_those_of_their_csv_files():
    screens, page = ROOT / "docs" / "results" / "screens", (evidence.DOCS / "settings.md").read_text()
    late = pd.read_csv(screens / "late_blocks.csv")
    beside_vision = late[~late.language.str.contains("alone|zero-shot") & (late.step_along_gradient_in_lr != 400)]
    means = pd.read_csv(screens / "all_blocks.csv").groupby(["dataset", "plan"])[["last", "avg"]].mean()
    shown = [*beside_vision[["last", "avg"]].itertuples(index=False), *means.itertuples(index=False)]
    assert [pair for pair in shown if f"{pair.last:.2f}, {pair.avg:.2f}" not in page] == []


def test_the_learning_rates_of_first_order_and_r_against_the_best_of_them_are_those_of_their_csv_files():
    page = (evidence.DOCS / "settings.md").read_text().replace("**", "")
    page = " ".join(page[page.index("## First order's learning rate") : page.index("## The scale of the experts")].split())
    trials = pd.read_csv(ROOT / "docs" / "results" / "screens" / "first_order_lr.csv")
    means = trials.groupby(["plan", "first_order.lr"])[["last", "avg"]].mean()
    assert [mean for mean in means.itertuples(index=False) if f"{mean.last:.2f}, {mean.avg:.2f}" not in page] == []
    hybrid, frozen = (means.loc[f"late language {how}, vision by first order", 0.003] for how in ("by many_probes", "frozen"))
    assert f"gains {hybrid.avg - frozen.avg:.2f} of Avg over" in page and f"and {hybrid['last'] - frozen['last']:.2f} of Last (" in page
    pair = trials[(trials["first_order.lr"] == 0.003) & trials.plan.str.endswith("vision by first order")].pivot(
        index="seed", columns="plan"
    )
    for metric, interval in (("avg", "(95 % interval {:.2f} to {:.2f})"), ("last", "({:.2f} to {:+.2f})")):
        gains = -pair[metric].diff(axis=1).iloc[:, 1]  # many_probes less frozen
        assert interval.format(*stats.t.interval(0.95, 2, gains.mean(), stats.sem(gains))) in page

    runs = pd.read_csv(ROOT / "docs" / "results" / "cifar100.csv").fillna({"other_settings": ""})
    alone = runs[runs.other_settings.str.contains("orders.rest=frozen") & runs.layers.str.contains("suffix4")]
    rates = alone.other_settings.str.extract(r"first_order.lr=([\d.]+)")[0].astype(float).fillna(0.001)
    runs_of = {key: found.set_index("seed") for key, found in alone.groupby([alone.variant, rates])}
    assert [len(found) for found in runs_of.values()] == [10] * 6
    walked = runs_of["manywalk", 0.001]
    gains = walked.avg - walked.zero_shot_avg
    low, high = stats.t.interval(0.95, 9, gains.mean(), stats.sem(gains))
    assert f"the same steps, at the default rate, have {gains.mean():+.2f} of Avg over zero-shot ({low:+.2f} to {high:+.2f})" in page
    forgetting = [runs_of["frozen", rate].forgetting.mean() for rate in (0.001, 0.003, 0.01)]
    assert "forgetting is {:.1f}, {:.1f} and {:.1f} points".format(*forgetting) in page
    for rate, first_rate, metric in (
        *((rate, rate, metric) for rate in (0.001, 0.003) for metric in ("last", "avg")),
        *((0.003, 0.01, "avg"), (0.001, 0.003, "last")),  # the best of each
    ):
        ours, first = runs_of["many_probes", rate], runs_of["frozen", first_rate]
        assert {f"{found['last'].mean():.2f}, {found.avg.mean():.2f} |" in page for found in (ours, first)} == {True}
        ratio = (ours[metric] - ours[f"zero_shot_{metric}"]) / (first[metric] - ours[f"zero_shot_{metric}"])
        low, high = stats.t.interval(0.95, 9, ratio.mean(), stats.sem(ratio))
        assert f"{ratio.mean():.2f} ({low:.2f} to {high:.2f})" in page


CONTRAST = {
    **{"name": "a", "question": "?", "metric": "last", "claim": "above", "where": {"dataset": "cifar100"}},
    **{"method": {"branch": "dual", "variant": "naive", "settings": ["zo.lr_scale=3.0"]}, "against": {"variant": "none"}},
}


def two_methods(differences: list[float], settings: str = "zo.lr_scale=3.0") -> pd.DataFrame:
    """Return results of first order and of a naive run that differs from it by these points."""
    frame = results(FO, ("dual", "all", "naive", settings), seeds=len(differences))
    frame.loc[frame.variant == "naive", "last"] = frame["last"][frame.variant == "none"].to_numpy() + differences
    return frame


@pytest.mark.parametrize(
    ("claim", "differences", "answer"),
    [
        ("above", [1.0, 1.2, 0.9, 1.1], "yes"),
        ("above", [-1.0, -1.2, -0.9, -1.1], "no"),
        ("above", [-1.0, 1.2, -0.9, 1.1], "not decided"),
        ("same", [0.1, -0.1, 0.05, 0.0], "yes"),
        ("same", [1.0, 1.2, 0.9, 1.1], "no"),
        ("same", [1.0, -1.2, 0.9, -1.1], "not decided"),  # a wide interval shows nothing
        ("same", [0.0, 0.0], "not decided"),  # equal by chance once in a while
        ("same", [0.0] * 10, "yes"),
        ("same", [0.6] * 10, "not decided"),
        ("above", [0.6] * 10, "yes"),
    ],
)
def test_a_contrast_is_answered_by_the_test_that_was_named(claim, differences, answer):
    [found] = evidence.contrasts_of(two_methods(differences), {"contrasts": [{**CONTRAST, "claim": claim}]}).to_dict("records")
    assert found["answer"] == answer and found["seeds"] == len(differences)


def test_an_equivalence_test_is_two_one_sided_tests():
    differences = np.array([0.2, 0.3, 0.1])  # mean 0.2, standard error 0.1 / sqrt 3; t(2)
    [found] = evidence.contrasts_of(two_methods(list(differences)), {"contrasts": [{**CONTRAST, "claim": "same"}]}).to_dict("records")
    assert found["p"] == pytest.approx(stats.t.sf((0.5 - 0.2) / (0.1 / 3**0.5), 2))


def test_equal_differences_have_the_p_of_a_sign_test():
    [found] = evidence.contrasts_of(two_methods([0.1, 0.1]), {"contrasts": [{**CONTRAST, "claim": "same"}]}).to_dict("records")
    assert found["p"] == 0.25


def test_a_contrast_takes_the_settings_that_it_names_and_no_others():
    for settings, seeds in (("zo.lr_scale=3.0", 4), ("", 0), ("zo.lr_scale=3.0; zo.sides=2", 0), ("adapter.scale=1.0; zo.lr_scale=3.0", 0)):
        assert evidence.contrasts_of(two_methods([1.0, 2.0, 3.0, 4.0], settings), {"contrasts": [CONTRAST]}).seeds[0] == seeds


def test_a_contrast_is_between_runs_that_differ_in_order_and_strategy_only():
    both = two_methods([1.0, 2.0, 3.0, 4.0], "adapter.scale=1.0; zo.lr_scale=3.0")
    both.loc[both.variant == "none", ["method_settings", "other_settings"]] = "adapter.scale=1.0"
    contrasts = evidence.contrasts_of(pd.concat([both, two_methods([9.0])]), {"contrasts": [CONTRAST]})  # and another pair of one seed
    assert (contrasts.seeds[0], contrasts["mean"][0]) == (4, pytest.approx(2.5))


def test_holm_s_correction_is_that_of_the_textbook_and_counts_contrasts_without_runs():
    assert list(evidence.holm(pd.Series([0.01, 0.04, 0.03]))) == pytest.approx([0.03, 0.06, 0.06])
    assert evidence.holm(pd.Series([0.01, np.nan, np.nan]))[0] == pytest.approx(0.03)


def test_every_contrast_has_a_name_and_the_fields_of_the_schema():
    plan = yaml.safe_load((CONFIG_FOLDER / "contrasts.yaml").read_text())
    assert 5 <= len(plan["contrasts"]) <= 7 and len({contrast["name"] for contrast in plan["contrasts"]}) == len(plan["contrasts"])
    for contrast in plan["contrasts"]:
        for side in (contrast["method"], contrast["against"]):
            assert set(side) <= {*CELL, "settings"} and contrast["claim"] in ("above", "same") and contrast["metric"] in ("last", "avg")
