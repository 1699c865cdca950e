"""Claims about slurm/train.sbatch with ELASTIC: a job goes on with the nodes that are left, and is queued again if its first node dies."""

import os
import subprocess
import time

import pytest

from tests.helpers.ranks import warm_python
from tests.helpers.runs import QUICK_RUN
from tests.helpers.slurm import ASK_S, ROOT, cluster
from tests.slurm.test_slurm import steps, submit, took


def test_a_job_goes_on_without_a_node_and_is_queued_again_without_its_first_node(tmp_path):
    quick = [option for option in QUICK_RUN if not option.startswith("train.epochs")]
    options = [*quick, "train.epochs=4000", "run.trackers=[]", "run.name=left", "cluster.timeout_s=15"]
    with cluster(nodes=3) as slurm:
        sbatch, python = ["--nodes=3", "--no-kill"], warm_python()
        job = submit(slurm, tmp_path, "train", *options, sbatch=sbatch, python=python, ELASTIC="1", GLOO_SOCKET_IFNAME="eth0")
        run, log = tmp_path / "runs/left", tmp_path / f"dist_vlcl-{job}.out"
        slurm.until(lambda: steps(run) > 3, "three nodes to train", 200)
        assert "3 x cpu" in log.read_text()
        slurm.tool("crash", "node3")
        slurm.until(lambda: "2 x cpu" in log.read_text(), "two nodes to train", 200)
        reached = steps(run)
        slurm.until(lambda: steps(run) > reached + 3, "further steps", 200)
        facts = slurm.job(job)
        assert facts["JobState"] == "RUNNING" and facts["Restarts"] == "0"
        since = time.time()
        slurm.tool("crash", "node1")  # and with it the batch script and the store
        slurm.until(lambda: slurm.job(job)["Restarts"] == "1", "node2 to queue the job again", 120, ASK_S)
        took("death of the first node to queued again", time.time() - since)
        slurm.wait(job, {"PENDING"}, 60)


ENDS = "kill $PPID"  # the wait of a wrapper ends it


@pytest.mark.parametrize(
    ("nodes", "first_of_job", "sleep", "restarts", "said"),
    [
        ("node1 node2", "node1", ENDS, 0, "node1 failed, node2 failed, 1"),  # an error of training: the batch script decides
        ("node2", "node1", ENDS, 0, "node2 failed, 143"),  # node1 goes on, or Slurm does not know yet that it is dead: wait
        ("node2", "node1", "", 0, "node2 failed, 1"),  # not for ever
        ("node2", "node2", ENDS, 0, "node2 failed, requeue 7, 143"),
        ("node2", "node2", ENDS, 3, "node2 failed, scancel 7, 1"),  # no restart is left
    ],
)
def test_another_node_queues_the_job_again_only_if_slurm_has_taken_the_first_node_out(nodes, first_of_job, sleep, restarts, said, tmp_path):
    """The batch script itself. Slurm's commands only answer. The agents of these nodes end with an error, their first wait ends them."""
    fakes = {
        "srun": f"""case "$*" in *--check*) exit;; esac
            while [ "$1" != bash ]; do shift; done
            for SLURMD_NODENAME in {nodes}; do export SLURMD_NODENAME; SLURM_NODEID=$((${{SLURMD_NODENAME#node}} - 1)) "$@"; done""",
        "python": 'case "$*" in *distributed.run*) echo $SLURMD_NODENAME failed >>said; exit 1;; esac',
        "scontrol": 'case $1 in show) echo $3;; *) echo "$@" >>said;; esac',
        "squeue": f'case "$*" in *%N*) echo {first_of_job};; *) echo RUNNING None;; esac',
        "scancel": 'echo scancel "$@" >>said',
        "sleep": sleep,
    }
    for name, answer in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{answer}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"), "DIST_VLCL_HOME": str(ROOT)}
    environment |= {"ELASTIC": "1", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node1"}
    environment |= {"SLURM_RESTART_COUNT": str(restarts), "MAX_RESTARTS": "3"}
    done = subprocess.run([ROOT / "slurm/train.sbatch"], env=environment, cwd=tmp_path, capture_output=True)
    assert [*(tmp_path / "said").read_text().splitlines(), str(done.returncode)] == said.split(", ")
    assert not list(tmp_path.glob(".slurm-*"))
