# This site's settings, in one place. A variable that is set already wins, so one submission can differ: MAX_RESTARTS=3 sbatch slurm/train.sbatch ...

# What sbatch is told, in variables that it knows itself. python -m dist_vlcl.run.submit reads this file; before a plain sbatch, `. slurm/site.sh` does.
# export SBATCH_PARTITION=${SBATCH_PARTITION:-gpu}
# export SBATCH_ACCOUNT=${SBATCH_ACCOUNT:-project}
# export SBATCH_GPUS_PER_NODE=${SBATCH_GPUS_PER_NODE:-4}
# export SBATCH_TIMELIMIT=${SBATCH_TIMELIMIT:-8:00:00}

# What the job reads.
PYTHON=${PYTHON:-}            # the interpreter that has dist_vlcl; empty: the checkout's .venv
PROCESSES=${PROCESSES:-}      # ranks on a node; empty: one per GPU of the job, or 1
MAX_RESTARTS=${MAX_RESTARTS:-20}

# Before the trainer starts, on the first node; what it exports reaches every node.
setup() {
    : # module load cuda/12.8 || return
    # export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 # where a host's name leads to another network than the fast one
}

# In front of the command of each node, such as a container, which has to see this folder under its own name.
container=() # container=(apptainer exec --nv --bind "$PWD" /shared/dist_vlcl.sif)
