# The settings of this site. The environment takes precedence, so a single submission can differ: MAX_RESTARTS=3 sbatch slurm/train.sbatch ...

# Defaults for sbatch, in its own variables. Run `. slurm/site.sh` before sbatch.
# export SBATCH_PARTITION=${SBATCH_PARTITION:-gpu}
# export SBATCH_ACCOUNT=${SBATCH_ACCOUNT:-project}
# export SBATCH_GPUS_PER_NODE=${SBATCH_GPUS_PER_NODE:-4}
# export SBATCH_TIMELIMIT=${SBATCH_TIMELIMIT:-8:00:00}

# Settings of the job.
PYTHON=${PYTHON:-}            # the interpreter that has dist_vlcl; if empty, the .venv of the checkout
PROCESSES=${PROCESSES:-}      # ranks on a node; if empty, one per GPU of the job, or 1
MAX_RESTARTS=${MAX_RESTARTS:-20}

# Runs on the first node before the trainer; exported variables reach every node.
setup() {
    : # module load cuda/12.8 || return
    # export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 # if host names resolve to a slow network
}

# A prefix of the command on each node, such as a container. It must see this folder under the same path.
container=() # container=(apptainer exec --nv --bind "$PWD" /shared/dist_vlcl.sif)
