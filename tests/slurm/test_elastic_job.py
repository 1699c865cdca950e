"""Claim about slurm/train.sbatch with ELASTIC: a job whose node dies goes on with the node that is left."""

from tests.helpers.ranks import warm_python
from tests.helpers.runs import QUICK_RUN
from tests.helpers.slurm import cluster
from tests.slurm.test_slurm import steps, submit


def test_a_job_whose_node_dies_goes_on_with_the_node_that_is_left(tmp_path):
    quick = [option for option in QUICK_RUN if not option.startswith("train.epochs")]
    options = [*quick, "train.epochs=4000", "run.trackers=[]", "run.name=left", "cluster.timeout_s=15"]
    with cluster() as slurm:
        sbatch, python = ["--nodes=2", "--no-kill"], warm_python()
        job = submit(slurm, tmp_path, "train", *options, sbatch=sbatch, python=python, ELASTIC="1", GLOO_SOCKET_IFNAME="eth0")
        run, log = tmp_path / "runs/left", tmp_path / f"dist_vlcl-{job}.out"
        slurm.until(lambda: steps(run) > 3, "two nodes to train", 200)
        assert "2 x cpu" in log.read_text()
        slurm.tool("crash", "node2")
        slurm.until(lambda: "1 x cpu" in log.read_text(), "node1 to train alone", 200)
        reached = steps(run)
        slurm.until(lambda: steps(run) > reached + 3, "further steps", 200)
        facts = slurm.job(job)
        assert facts["JobState"] == "RUNNING" and facts["Restarts"] == "0"
