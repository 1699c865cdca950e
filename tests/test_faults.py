"""Claims about faults of whole runs (docs/reliability.md): found and named, survived without a trace, or refused in words."""

import ctypes
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from dist_vlcl.commands import evaluate
from dist_vlcl.config import Config
from dist_vlcl.data.shards import open_index
from dist_vlcl.dist.agree import ReplicaDivergedError
from dist_vlcl.dist.first_order import FirstOrder, FirstOrderConfig
from dist_vlcl.dist.world import World
from dist_vlcl.orders import OrderPlan, assign
from dist_vlcl.reading import seal, to_line
from dist_vlcl.run import checkpoint
from dist_vlcl.run.folder import RunRefused
from dist_vlcl.step import HybridStep
from dist_vlcl.train import main, train
from dist_vlcl.zo.noise import Key
from tests.dist.test_hybrid_step import NAMES, STRATEGIES, part_of
from tests.helpers.ranks import run_module, run_ranks, warm_python
from tests.helpers.tiny_clip import architecture, tiny_clip
from tests.test_train import configured, records, run_once

ROOT = Path(__file__).parents[1]
TINY = ["model.pretrained=random", "eval.zero_shot=false", "run.record_every_steps=0", "tasks.num_tasks=1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


def tiny(tmp_path: Path, data: Path, name: str, *overrides: str) -> Config:
    return configured(tmp_path, *TINY, f"model.name={architecture(3, 3)}", f"data.root={data}", f"run.name={name}", *overrides)


def folder_of(cfg: Config) -> Path:
    return cfg.run.folder


def equal(one: Config, other: Config) -> bool:
    a, b = (checkpoint.load_newest(folder_of(cfg)).tensors for cfg in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def plain(world: World, cfg: Config, stop_at: int | None = None) -> str:
    architecture(3, 3)  # make it known in this process
    return run_once(world, cfg, stop_at)


def with_step(change):
    """Have `change(step object, number of the call)` done before every step of this process."""
    whole, calls = HybridStep.__call__, []

    def changed(self, *arguments, **options):
        calls.append(1)
        change(self, len(calls))
        return whole(self, *arguments, **options)

    HybridStep.__call__ = changed  # type: ignore[method-assign]


def flipped(world: World, cfg: Config, order: str) -> str:
    """Train; one bit of rank 1's parameters flips before its third step."""
    architecture(3, 3)

    def flip(step: HybridStep, number: int) -> None:
        if number == 3 and world.rank == 1:
            unit = next(unit for id, unit in step.towers.units.items() if step.orders[id].value == order)
            unit.tensors()["down_weight"].detach().view(torch.int32)[0, 0, 0] ^= 1

    with_step(flip)
    try:
        return "finished" if train(cfg, world) else "known"
    except ReplicaDivergedError as error:
        return str(error)


@pytest.mark.parametrize("order", ["zeroth", "first"])
def test_one_flipped_bit_stops_the_run_with_rank_and_tensor_and_a_new_start_leaves_no_trace_of_it(tmp_path, data, order):
    """The step after the flip is taken, its journal line is written, and a checkpoint is due: none of them may survive."""
    options = ["orders=dual_all" if order == "zeroth" else "orders=dual_hop_odd", "train.check_every_steps=2", "run.save_every_steps=1"]
    whole, stopped = tiny(tmp_path, data, "whole", *options), tiny(tmp_path, data, "stopped", *options)
    assert run_ranks(plain, 2, whole) == ["finished"] * 2
    for message in run_ranks(flipped, 2, stopped, order):
        layer = 1 if order == "zeroth" else 2
        assert message.startswith("the adapters after step 3: ranks [1] differ from rank 0: rank 1 (")
        assert f"language.{layer}/down_weight" in message
    assert [record["step"] for record in records(stopped, "journal.jsonl")] == [1, 2]
    assert run_ranks(plain, 2, stopped) == ["finished"] * 2
    assert equal(whole, stopped)
    assert records(whole, "journal.jsonl") == records(stopped, "journal.jsonl")


def with_a_full_disk(world: World, cfg: Config, first: int) -> str:
    """Train; from step `first` on no file of rank 0 can grow beyond a few bytes, as on a full disk."""
    architecture(3, 3)
    for descriptor in (1, 2):  # the tests' own record of what is printed is a file, too
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)

    def fill(step: HybridStep, number: int) -> None:
        if world.rank == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, -1) if number >= first else (-1, -1))

    with_step(fill)
    try:
        train(cfg, world)
    except (OSError, RuntimeError) as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        world.collectives.stopped(error)
        world.close()
        return str(error)
    return "finished"


def on_a_disk_that_cannot_be_written(world: World, cfg: Config) -> str | None:
    """Return the error of train if the run's folder is mounted read-only, in this process alone; None if this process may not mount."""
    architecture(3, 3)
    folder = str(folder_of(cfg))
    new_mounts = 0x00020000  # CLONE_NEWNS of <sched.h>
    if ctypes.CDLL(None).unshare(new_mounts):
        return None
    for command in (["--make-rprivate", "/"], ["--bind", folder, folder], ["-o", "remount,bind,ro", folder]):
        if subprocess.run(["mount", *command], capture_output=True).returncode:
            return None
    try:
        train(cfg, world)
    except RunRefused as error:
        return str(error)
    return "trained"


def test_a_run_whose_folder_has_become_read_only_is_refused_on_every_rank_and_left_as_it_is(tmp_path, data):
    cfg = tiny(tmp_path, data, "mine", "orders=dual_all")
    assert run_ranks(plain, 1, cfg, 2) == ["requeued"]
    before = {path: path.read_bytes() for path in folder_of(cfg).rglob("*") if path.is_file()}
    said = run_ranks(on_a_disk_that_cannot_be_written, 2, cfg)
    if None in said:
        pytest.skip("mount a folder read-only: this needs root (CAP_SYS_ADMIN), whom file modes do not bind")
    assert said[0] == said[1] and said[0].startswith(f"run folder {folder_of(cfg)}: ") and "Read-only file system" in said[0]
    assert {path: path.read_bytes() for path in folder_of(cfg).rglob("*") if path.is_file()} == before


def test_a_full_disk_stops_the_run_and_a_resume_loses_nothing(tmp_path, data):
    options = ["orders=dual_hop_odd", "run.save_every_steps=1"]
    whole, full = tiny(tmp_path, data, "whole", *options), tiny(tmp_path, data, "full", *options)
    first, second = run_ranks(with_a_full_disk, 2, full, 3, ends_apart=True)
    assert "File too large" in first and "metrics.jsonl" in first and "rank 0 (" in second and "had stopped: OSError" in second
    assert checkpoint.load_newest(folder_of(full)).step == 2
    assert run_ranks(plain, 2, full) == run_ranks(plain, 2, whole) == ["finished"] * 2
    assert equal(whole, full)
    assert [{**r, "name": ""} for r in records(whole)] == [{**r, "name": ""} for r in records(full)]


def twenty_tasks(world: World) -> list[int]:
    towers = tiny_clip()
    orders = assign(towers.units, OrderPlan("dual", "hop_odd"))
    step = HybridStep(towers, orders, STRATEGIES["mozo"], lambda model: FirstOrder(world, FirstOrderConfig(), model), world)
    memory = []
    for task in range(20):
        step.begin(NAMES)
        step(part_of(world, 0, 8), Key(task, 0), lr=1e-3)
        memory.append(psutil.Process().memory_info().rss)
    return memory


def test_twenty_tasks_take_no_more_memory_than_five():
    """A wrapper and an optimiser that a task left behind would be 37 MiB and more."""
    for memory in run_ranks(twenty_tasks, 2, timeout_s=200):
        assert memory[19] - memory[4] < 20 << 20


def test_a_run_moves_from_one_rank_to_two_and_four(tmp_path, data):
    """In the middle of a task, with first-order units, whose sums are rounded in another way."""
    options = ["orders=dual_hop_odd", "train.batch_size=16"]  # eighteen steps
    whole, moved = tiny(tmp_path, data, "whole", *options), tiny(tmp_path, data, "moved", *options)
    assert run_ranks(plain, 1, whole) == ["finished"]
    assert run_ranks(plain, 1, moved, 4) == ["requeued"]
    assert run_ranks(plain, 2, moved, 4) == ["requeued"] * 2
    assert run_ranks(plain, 4, moved) == ["finished"] * 4
    expected, got = (checkpoint.load_newest(folder_of(cfg)).tensors for cfg in (whole, moved))
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_other_data_under_the_same_name_are_refused_on_resume(tmp_path):
    cfg = tiny(tmp_path, tmp_path / "data", "mine", "orders=dual_all")
    assert run_ranks(plain, 1, cfg, 2) == ["requeued"]
    index = tmp_path / "data/digits/index.json"
    content = json.loads(index.read_text().replace("digit zero", "digit nought"))
    del content["digest"]  # an index that was made so, not a damaged one
    index.write_text(json.dumps(content))
    assert "nought" in index.read_text()
    with pytest.raises(RunRefused, match="was started on other data"):
        train(cfg, World.alone())


@pytest.mark.parametrize("start", [0, 2], ids=["before the first checkpoint", "after a checkpoint"])
def test_the_journal_s_steps_of_another_kind_of_device_are_taken_again(tmp_path, data, capsys, start):
    """Normal directions differ in their last bits between devices. Here the GPU's steps have other seeds: replaying them would show."""
    plan = ["orders=dual_all", "run.save_every_steps=2"]
    whole, moved = tiny(tmp_path, data, "whole", *plan), tiny(tmp_path, data, "moved", *plan)
    train(whole, World.alone())
    assert run_ranks(plain, 1, moved, 3) == ["requeued"]
    for step in checkpoint.saved_steps(folder_of(moved)):
        if step > start:
            (folder_of(moved) / f"checkpoints/step-{step:08d}.safetensors").unlink()
    journal = [{k: v for k, v in line.items() if k != "crc"} for line in records(moved, "journal.jsonl")]
    for line in journal[start + 1 :]:  # the first step after the checkpoint was taken here, the others on a GPU
        line |= {"device": "cuda", "seed": line["seed"] + 1}
    (folder_of(moved) / "journal.jsonl").write_text("".join(to_line(seal(line)) for line in journal))
    train(moved, World.alone())
    said = capsys.readouterr().out
    assert f"the steps from {start + 2} on were taken on cuda, this start is on cpu" in said
    assert "1 steps after the checkpoint were restored from the journal" in said
    assert equal(whole, moved)
    assert records(whole, "journal.jsonl") == records(moved, "journal.jsonl")
    lines = [json.loads(line) for line in (folder_of(moved) / "metrics.jsonl").read_text().splitlines()]
    seconds = json.loads((folder_of(moved) / "accuracy.json").read_text())["seconds"]
    assert seconds == pytest.approx(sum(line["seconds"] for line in lines if line["kind"] == "step"), abs=0.01)  # of all starts


SECRETS = {"WANDB_API_KEY": "hush-1" + "0" * 34, "HF_TOKEN": "hush-2", "AWS_SECRET_ACCESS_KEY": "hush-3"}


def test_no_secret_reaches_a_file_or_the_terminal(tmp_path, data):
    """Neither of the environment nor of an address: in a run with wandb, in its help, and in the words of its failure."""
    environment = {**SECRETS, "WANDB_MODE": "offline", "no_proxy": "*"}
    options = [*TINY, "model=small", "train.max_steps=1", f"run.root={tmp_path}/runs", f"data.root={data}", "cluster.threads=1"]
    by_http = "data.url='http://127.0.0.1:9/{}?token=hush-4'"
    by_pipe = "data.url=\"pipe:curl -H 'Authorization: Bearer hush-5' http://127.0.0.1:9/{}\""

    def said_by(*more: str) -> str:
        done = run_module("dist_vlcl.train", *options, *more, cwd=tmp_path, environment=environment)
        return done.stdout + done.stderr

    finished = said_by("orders=zero_shot", "run.name=secret")
    failed = [said_by(url, "run.name=secret", "data.allow_pipe=true", "data.timeout_s=1") for url in (by_http, by_pipe)]
    assert "Done." in finished and all("cannot" in said or "error on rank 0" in said for said in failed)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"hush" not in written and "hush" not in "".join([finished, said_by("--help"), *failed])


def test_an_evaluation_that_fails_tells_the_other_ranks_why(tmp_path, monkeypatch, capsys):
    cfg = configured(tmp_path, "data=cifar100")  # which is not there
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(cfg.as_dict()))
    world, told = World.alone(), []
    monkeypatch.setattr(World, "from_environment", lambda _: world)
    monkeypatch.setattr(world.collectives, "stopped", told.append)
    monkeypatch.setattr(sys, "argv", ["evaluate", str(tmp_path), f"data.root={tmp_path}"])
    with pytest.raises(SystemExit, match="2"):
        evaluate.main()
    assert "error on rank 0 of 1: " in (error := capsys.readouterr().err) and "index.json is missing" in error
    assert "index.json is missing" in str(told[0])


def by_command_line(world: World, options: list[str]) -> int:
    """The exit status of `python -m dist_vlcl.train`."""
    architecture(3, 3)
    sys.argv = ["train", *options]
    try:
        main()
    except SystemExit as ended:
        return ended.code
    return 0


def test_a_run_that_skips_too_many_steps_fails_for_good(tmp_path, data):
    """Its losses are infinite, in every start anew: the word for the batch script is the one that does not queue the job again."""
    plan = ["orders=dual_all", "zo.epsilon={language:1e300,vision:1e300}", "train.max_skips=2", "run.name=skips"]
    where = [f"run.root={tmp_path}/runs", f"data.root={data}", f"model.name={architecture(3, 3)}"]
    said = {"DIST_VLCL_STATUS": str(tmp_path / "status")}
    assert run_ranks(by_command_line, 1, [*TINY, *where, *plan, "run.trackers=[]"], environment=said) == [2]
    assert (tmp_path / "status").read_text() == "failed\n"
    (first,) = [record for record in records(tiny(tmp_path, data, "skips")) if record["kind"] == "note"]
    assert first["text"] == "step 1 was skipped: the loss is not finite, or too large, on rank [0]"


def test_a_damaged_shard_fails_for_good_and_one_that_cannot_be_read_does_not(tmp_path, data):
    open_index(tiny(tmp_path, data, "run").data)  # is built, if no test has had it yet
    shutil.copytree(data / "digits", tmp_path / "data/digits")
    shards = sorted((tmp_path / "data/digits/train").glob("000[01]-*.tar"))  # of the first task; whichever rank reads them
    options = [*TINY, f"run.root={tmp_path}/runs", f"data.root={tmp_path}/data", f"model.name={architecture(3, 3)}", "run.trackers=[]"]
    said = {"DIST_VLCL_STATUS": str(tmp_path / "status")}
    for damage, word in [(lambda path: path.write_bytes(path.read_bytes()[:-600]), "failed\n"), (Path.unlink, "training\n")]:
        (tmp_path / "status").write_text("")
        for path in shards:
            damage(path)
        assert run_ranks(by_command_line, 1, options, environment=said) == [2]
        assert (tmp_path / "status").read_text() == word


def test_a_configuration_that_would_run_code_runs_none(tmp_path, data):
    cfg = tiny(tmp_path, data, "mine", "orders=zero_shot")
    train(cfg, World.alone())
    (folder_of(cfg) / "config.yaml").write_text(f"seed: !!python/object/apply:os.system ['touch {tmp_path}/hacked']\n")
    with pytest.raises(RunRefused, match="python/object"):
        train(cfg, World.alone())
    for command in ("evaluate", "replay"):
        done = run_module("dist_vlcl", command, str(folder_of(cfg)), cwd=tmp_path)
        assert done.returncode != 0
    assert not (tmp_path / "hacked").exists()


TINY_RANK = """
import sys
from tests.helpers.tiny_clip import architecture
sys.argv.append("model.name=" + architecture(3, 3))
from dist_vlcl.train import main
main()
"""


def test_a_rank_whose_cpu_draws_other_numbers_is_found_at_the_start(tmp_path, data):
    script, python = tmp_path / "rank.py", tmp_path / "python"
    script.write_text(TINY_RANK)
    other = f"ATEN_CPU_CAPABILITY=default exec {shlex.quote(sys.executable)}"
    python.write_text(f'#!/bin/sh\n[ "$RANK" = 0 ] && exec {warm_python()} "$@"\n{other} "$@"\n')
    python.chmod(0o755)
    options = [*TINY, "orders=dual_all", "run.trackers=[]", f"run.root={tmp_path}/runs", f"data.root={data}", "cluster.timeout_s=60"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), *options],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5",
            "PYTHON_EXEC": str(python),
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode != 0
    # torch's random weights differ here; our directions, which are compared with them, may not
    assert "ranks [1] differ from rank 0" in done.stderr and "the code" not in done.stderr


def on_its_own_disk(world: World, folders: list[Path], cfg: Config) -> str:
    architecture(3, 3)
    os.chdir(folders[world.rank])
    try:
        train(cfg, world)
    except RuntimeError as error:
        return str(error)
    return ""


def test_ranks_with_other_data_do_not_start(tmp_path, data):
    """Each has the set on a disk of its own, under the same name; the second's has another shard."""
    open_index(tiny(tmp_path, data, "run").data)  # is built, if no test has had it yet
    folders = [tmp_path / "node1", tmp_path / "node2"]
    for folder in folders:
        shutil.copytree(data / "digits", folder / "data/digits")
    index = folders[1] / "data/digits/index.json"
    content = json.loads(index.read_text())
    content["shards"]["train"][0][0]["sha256"] = "0" * 64
    del content["digest"]  # which would show the edit
    index.write_text(json.dumps(content))
    messages = run_ranks(on_its_own_disk, 2, folders, tiny(tmp_path, Path("data"), "run"))
    assert all("the data set: ranks [1] differ from rank 0" in message for message in messages), messages
    assert not (tmp_path / "runs").exists()


def test_the_soak_survives_a_few_faults(tmp_path):
    command = [sys.executable, str(ROOT / "tools/soak.py"), "--faults", "3", "--folder", str(tmp_path / "soak")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    faults = [json.loads(line) for line in (tmp_path / "soak/faults.jsonl").read_text().splitlines()]
    assert sum(fault["fault"] is not None for fault in faults) >= 3 and not any(fault["problem"] for fault in faults)
