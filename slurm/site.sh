# This site's settings, in one place: read when a job is submitted (SBATCH_*, which sbatch knows itself) and in the job (the rest).
# A variable that is set already wins, so one submission can differ: SBATCH_TIMELIMIT=30 python -m dist_vlcl.run.submit train ...

# export SBATCH_PARTITION=${SBATCH_PARTITION:-gpu}
# export SBATCH_ACCOUNT=${SBATCH_ACCOUNT:-project}
# export SBATCH_GPUS_PER_NODE=${SBATCH_GPUS_PER_NODE:-4}
# export SBATCH_TIMELIMIT=${SBATCH_TIMELIMIT:-8:00:00}

PYTHON=${PYTHON:-}            # the interpreter that has dist_vlcl; empty: the checkout's .venv
PROCESSES=${PROCESSES:-}      # ranks on a node; empty: one per GPU of the job, or 1
MAX_RESTARTS=${MAX_RESTARTS:-20}

# Before the trainer starts, on the first node; what it exports reaches every node.
setup() {
    : # module load cuda/12.8
}

# In front of the command of each node, such as a container.
container=() # container=(apptainer exec --nv /shared/dist_vlcl.sif)
