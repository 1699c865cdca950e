# Sourced by the scripts beside it, inside of a job: rendezvous, the step, and whether the job wants to be started again. Not a command.

repository=${DIST_VLCL_HOME:-$SLURM_SUBMIT_DIR}
source "$repository/slurm/site.sh"
setup
[[ -z $PYTHON ]] || export PYTHON
export MASTER_ADDR MASTER_PORT DIST_VLCL_STATUS
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
DIST_VLCL_STATUS=$(mktemp) # rank 0, on this node, writes a word here: the exit codes of ranks do not get through their launcher
processes=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}

# Run a command once on each node, and leave the job: done, failed, or to be started again.
run_step() {
    local status step
    trap : TERM USR1 # Slurm signals the steps as well; this shell waits for them
    echo "$(date '+%F %T') start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST: $*"
    srun --ntasks-per-node=1 --kill-on-bad-exit=1 "${container[@]}" "$@" &
    step=$!
    wait "$step"
    status=$?
    while kill -0 "$step" 2>/dev/null; do # a signal ends a wait
        wait "$step"
        status=$?
    done
    local word
    word=$(cat "$DIST_VLCL_STATUS")
    rm -f "$DIST_VLCL_STATUS"
    echo "$(date '+%F %T') the step ended with status $status${word:+ ($word)}"
    # Stopped by a signal and saved, or a rank died in mid-training: go on from what was saved.
    if [[ $word == requeue || $word == training || $status == 75 ]]; then
        if ((${SLURM_RESTART_COUNT:-0} >= MAX_RESTARTS)); then
            echo "error: not started again: MAX_RESTARTS=$MAX_RESTARTS (slurm/site.sh)" >&2
            exit 1
        fi
        scontrol requeue "$SLURM_JOB_ID" # an array's task has a job id of its own
        exit
    fi
    exit "$status"
}
