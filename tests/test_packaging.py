"""What is shipped beside the code: the wheel's metadata, the containers' file lists, the workflow and the notebook."""

import json
import re
import tomllib
from pathlib import Path

import yaml

from dist_vlcl.config import compose_config

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HATCH = PROJECT["tool"]["hatch"]
DOCKERFILE, APPTAINER = ((ROOT / "containers" / name).read_text() for name in ("Dockerfile", "dist_vlcl.def"))


def test_the_readme_of_the_wheel_has_absolute_addresses_below_the_repository():
    text = (ROOT / "README.md").read_text()
    for rule in HATCH["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    _, _, repository = PROJECT["project"]["urls"]["Repository"].partition("github.com/")
    pictures, links = re.findall(r"!\[[^]]*\]\(([^)]+)", text), re.findall(r"(?<!!)\[[^]]*\]\(([^)]+)", text)
    assert pictures and all(target.startswith(f"https://raw.githubusercontent.com/{repository}/main/docs/images/") for target in pictures)
    assert len(links) > 10 and all(
        target.startswith((f"https://github.com/{repository}/blob/main/", "https://arxiv.org/")) for target in links
    )


def test_the_addresses_of_the_project_have_one_repository():
    urls = PROJECT["project"]["urls"]
    assert all(url.startswith(urls["Repository"]) for url in urls.values())


def test_every_dependency_names_the_oldest_version_that_is_tested():
    extras = PROJECT["project"]["optional-dependencies"]
    named = [item for items in (PROJECT["project"]["dependencies"], *extras.values()) for item in items if not item.startswith("dist-vlcl")]
    assert len(named) > 20 and not [item for item in named if not re.fullmatch(r"[\w-]+>=[\d.]+", item)]


def test_containers_get_all_that_a_wheel_is_built_from_and_its_pinned_versions():
    allowed = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines()[1:]}
    wheel = HATCH["build"]["targets"]["wheel"]
    needed = {
        "pyproject.toml",
        "constraints.txt",
        "README.md",
        *PROJECT["project"]["license-files"],
        *wheel["packages"],
        *wheel["force-include"],
    }
    copied = re.findall(r"^    (\S+) /opt/dist_vlcl/\1$", APPTAINER, re.M)
    assert allowed == set(copied) == needed and all((ROOT / name).exists() for name in needed)


def test_both_containers_install_the_same_and_only_extras_that_there_are():
    """torch is the base image's; the other pins are constraints.txt's without what belongs to torch."""
    images, extras, filters = (
        [re.search(pattern, text)[1] for text in (DOCKERFILE, APPTAINER)]
        for pattern in (r"pytorch/pytorch:(\S+)", r"/opt/dist_vlcl\[([^]]+)\]", r"grep -vE '([^']+)'")
    )
    assert len(set(images)) == len(set(extras)) == len(set(filters)) == 1
    assert set(extras[0].split(",")) == set(PROJECT["project"]["optional-dependencies"]) - {"all", "dev", "deepspeed"}
    pinned = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not re.match(filters[0], line)]
    assert len(pinned) > 80 and not [line for line in pinned if re.match("torch|triton|nvidia|cuda", line)]
    assert all(f"torch=={images[0].split('-')[0]}" in text for text in (DOCKERFILE, APPTAINER))


def test_the_workflow_only_calls_what_the_repository_has():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert len(commands) == len(jobs)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    for program, *words in map(str.split, commands):
        assert set(words) <= set(targets) if program == "make" else (ROOT / program).stat().st_mode & 0o100


def test_the_notebook_runs_from_start_to_end(tmp_path, monkeypatch, capsys):
    """With two steps a task."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "dist_vlcl.config.compose_config", lambda options: compose_config([*options, "train.max_steps=2", "run.plots=false"])
    )
    cells = json.loads((ROOT / "examples/digits.ipynb").read_text())["cells"]
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert len(names["labels"]) == 4 and len(names["accuracy"].rows) == 2
    assert capsys.readouterr().out.rstrip().endswith(str(list(zip(names["digits"].target[:4], names["labels"], strict=True))))
