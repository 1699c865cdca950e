"""Claims of the README and the top-level files: what they name exists, and their commands are commands."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from dist_vlcl.config import CONFIG_FOLDER, expand_paper, from_hydra

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands() -> list[list[str]]:
    lines = [line.strip().split("#")[0] for line in README.splitlines() if line.startswith("    ")]
    return [shlex.split(line) for line in lines if re.match(r"(accelerate|python|make|torchrun) ", line)]


def test_there_are_commands():
    assert len(commands()) >= 10


@pytest.mark.parametrize(
    "command", [c for c in commands() if set(c) & {"dist_vlcl.train", "dist_vlcl.data.build", "dist_vlcl.data.verify"}], ids=" ".join
)
def test_every_command_line_composes(command):
    module = next(k for k, word in enumerate(command) if word.startswith("dist_vlcl."))
    overrides = [word for word in command[module + 1 :] if not word.startswith("--")]
    with initialize_config_dir(str(CONFIG_FOLDER), version_base=None):
        from_hydra(compose("config", expand_paper(overrides)))


def test_every_make_target_and_linked_file_exists():
    makefile = (ROOT / "Makefile").read_text()
    for command in commands():
        if command[0] == "make":
            assert re.search(rf"^{command[1]}:", makefile, re.M)
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_picture_is_explained_and_that_of_the_claims_leads_to_the_page_with_all():
    below = {name: text for name, text in re.findall(r"^!\[[^\]]*\]\(docs/images/(.+)\.png\)\n\n(.+)", README, re.M)}
    assert len(below) == README.count("![")
    assert "`make train`" in below["digits_accuracy_matrix"]
    assert "(docs/REPRODUCTION.md#" in below["small-clip-shipped-claims-cifar100"]


def test_the_tree_in_the_readme_is_the_tree():
    for name in ("train.py", "evaluate.py", "config.py", "step.py", "orders.py", "schedule.py", "sweep.py", "tune.py", "paper.py"):
        assert name in README and (ROOT / "dist_vlcl" / name).exists()
    folders = {p.name for p in (ROOT / "dist_vlcl").iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert all(f"{folder}/" in README for folder in folders)


def test_versions_are_pinned_by_name_and_number_only():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line]
    assert lines and all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!_-]+", line) for line in lines)


def test_the_small_clip_fits_its_limit():
    weights = CONFIG_FOLDER.parent / "dist_vlcl/model/small/small_clip.safetensors"
    assert weights.stat().st_size <= 12_000_000


def test_citation_names_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    paper = citation["preferred-citation"]
    assert "Zeroth-Order Optimization for Continual Learning" in paper["title"]
    assert len(paper["authors"]) == 9 and all(author["family-names"] and author["given-names"] for author in paper["authors"])
    assert paper["identifiers"] == [{"type": "other", "value": "arXiv:2506.12409"}]
