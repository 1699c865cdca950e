"""Claims about a network that drops and ranks that freeze or die: a bounded time, messages that name rank and collective, and a restart."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from dist_vlcl.config import Config
from dist_vlcl.data.settings import DataConfig
from dist_vlcl.data.shards import open_index
from dist_vlcl.dist.collectives import CollectiveError, Collectives
from dist_vlcl.dist.world import World
from dist_vlcl.run import checkpoint
from tests.helpers.hosts import hosts
from tests.helpers.ranks import Python, free_port, run_ranks, warm_python
from tests.helpers.tiny_clip import architecture
from tests.test_train import configured, run_once

ROOT = Path(__file__).parents[2]
TINY = """
import sys
from tests.helpers.tiny_clip import architecture
sys.argv.append("model.name=" + architecture(3, 3))
from dist_vlcl.train import main
main()
"""
TIMEOUT_S = 20
OPTIONS = ["tasks.num_tasks=1", "train.batch_size=16", "train.epochs=4", "run.save_every_steps=10", "run.trackers=[]", "run.progress=false"]
OPTIONS += ["model.pretrained=random", "eval.zero_shot=false", f"cluster.timeout_s={TIMEOUT_S}", "run.record_every_steps=0"]
OPTIONS += ["run.plots=false", "cluster.threads=1", "train.warmup_steps=2"]


def trainer(root: Path, data: Path, name: str, *options: str) -> list[str]:
    return ["-c", TINY, *OPTIONS, f"run.root={root}/runs", f"run.name={name}", f"data.root={data}", *options]


def environment(**more: object) -> dict[str, str]:
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return {**os.environ, **own, **{name: str(value) for name, value in more.items()}}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Shards, so that no rank has to wait while another builds them."""
    folder = tmp_path_factory.mktemp("data")
    open_index(DataConfig(root=str(folder)))
    return folder


def wait_for_steps(folder: Path, steps: int, timeout_s: float = 200) -> None:
    deadline = time.monotonic() + timeout_s
    while not (folder / "journal.jsonl").exists() or (folder / "journal.jsonl").read_bytes().count(b"\n") < steps:
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.05)


def trained(world: World, cfg: Config) -> str:
    architecture(3, 3)  # make it known in this process
    return run_once(world, cfg)


def test_a_network_that_drops_is_named_on_both_sides_and_a_restart_ends_with_the_same_numbers(tmp_path, data):
    plan = ["orders=dual_hop_odd"]  # losses and gradients travel
    with hosts() as pair:

        def start() -> subprocess.Popen:
            command = pair.command("run", "--timeout", 280, "--", warm_python(), *trainer(tmp_path, data, "broken", *plan))
            return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

        broken = start()
        wait_for_steps(tmp_path / "runs/broken", 12)
        pair.tool("link", "h2", "blackhole")
        cut = time.monotonic()
        said = broken.communicate(timeout=200)[0]
        assert broken.returncode == 2 and time.monotonic() - cut < TIMEOUT_S + 60
        errors = [line for line in said.splitlines() if "error on rank" in line]
        assert len(errors) == 2, said[-3000:]
        for line, (rank, other, host) in zip(sorted(errors), [(0, 1, "h2"), (1, 0, "h1")], strict=True):
            assert (
                f"error on rank {rank} of 2: all-reduce of" in line and f"rank {other} ({host}) did not answer within {TIMEOUT_S} s" in line
            )
            assert "all-reduce of losses at step" in line or "all-reduce of gradients at step" in line
        pair.tool("link", "h2", "up")
        again = start()
        assert again.wait(300) == 0, again.stdout.read()[-3000:]
    whole = configured(tmp_path, *OPTIONS, *plan, f"model.name={architecture(3, 3)}", f"data.root={data}", "run.name=whole")
    assert run_ranks(trained, 2, whole) == ["finished"] * 2
    expected, got = (checkpoint.load_newest(tmp_path / "runs" / name).tensors for name in ("whole", "broken"))
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.parametrize(("fault", "rank"), [(signal.SIGSTOP, 1), (signal.SIGKILL, 0)], ids=["frozen", "killed with the store"])
def test_a_rank_that_freezes_or_dies_is_named_by_the_other_in_a_bounded_time(tmp_path, data, fault, rank):
    shared = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = trainer(tmp_path, data, "run", "orders=dual_all", "zo=mozo")
    ranks = [Python(command, tmp_path, environment(RANK=r, **shared)) for r in (0, 1)]
    try:
        wait_for_steps(tmp_path / "runs/run", 5)
        os.kill(ranks[rank].pid, fault)
        struck = time.monotonic()
        assert ranks[1 - rank].wait(120) == 2
        assert time.monotonic() - struck < (TIMEOUT_S if fault is signal.SIGSTOP else 0) + 40
        how = f"did not answer within {TIMEOUT_S} s" if fault is signal.SIGSTOP else "has died or closed the connection"
        (line,) = [line for line in "".join(ranks[1 - rank].printed()).splitlines() if "error on rank" in line]
        assert f"error on rank {1 - rank} of 2: all-reduce of losses at step" in line and f": rank {rank} (" in line and how in line
    finally:
        for process in ranks:
            process.end()


def parted(world: World, what: str) -> str:
    """Three ranks, one of which stops for a reason of its own; the others say so."""
    world.collectives.where = "step 7"
    try:
        if what == f"{world.rank} stops":
            world.collectives.stopped(ValueError("train/0003-000.tar: the index says 3 samples"))
            world.close()
            return ""
        if what.endswith("stops"):
            time.sleep(1)  # comes when that rank is gone, and the store with it if nothing holds that back
        world.sum_exact(torch.zeros(3, dtype=torch.int64), "losses")
    except CollectiveError as error:
        torch.distributed.destroy_process_group()
        return str(error)
    return "no error"


@pytest.mark.parametrize("rank", [0, 1], ids=["the store's host", "another"])
def test_a_rank_that_stops_leaves_a_note_for_the_others(rank):
    for message in (message for other, message in enumerate(run_ranks(parted, 3, f"{rank} stops", ends_apart=True)) if other != rank):
        assert message.startswith(f"all-reduce of losses at step 7: rank {rank} (")
        assert "had stopped: ValueError: train/0003-000.tar: the index says 3 samples" in message


class Store(dict):
    """Notes of others, as they would lie in the process group's store."""

    def check(self, keys):
        return all(key in self for key in keys)

    def get(self, key):
        return self[key]

    def set(self, key, value):
        self[key] = value


@pytest.mark.parametrize(
    ("places", "error", "words"),
    [
        ({}, "gloo: Timed out waiting 20ms", "rank 1 (b), rank 2 (c) did not answer within 1 s"),
        ({1: "losses at step 3"}, "gloo: Timed out waiting", "rank 2 (c) did not answer within 1 s"),
        ({1: "losses at step 3"}, "gloo: Connection closed by peer", "rank 2 (c) has died or closed the connection"),
        ({1: "losses at step 3", 2: "barrier at step 9"}, "gloo: Timed out waiting", "rank 2 (c) was in barrier at step 9"),
        ({2: "barrier at step 9"}, "gloo: Timed out", "rank 1 (b) did not answer within 1 s; rank 2 (c) was in barrier at step 9"),
        ({1: "losses at step 3", 2: "losses at step 3"}, "gloo: Timed out waiting", "the network between them stalled"),
    ],
)
def test_the_blame_follows_the_notes(monkeypatch, places, error, words):
    store = Store({f"dist_vlcl/stopped/{rank}": json.dumps({"place": place}) for rank, place in places.items()})
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    collectives = Collectives(0, ["a", "b", "c"], 1)
    collectives.where = "step 3"
    with pytest.raises(CollectiveError, match=r"^losses at step 3: ") as failed, collectives("losses"):
        raise RuntimeError(error)
    assert words in str(failed.value)


def test_an_error_that_is_not_of_the_network_passes_as_it_is():
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), Collectives(0, ["a", "b"], 1)("losses"):
        raise RuntimeError("shapes differ")
