# Sourced by the scripts beside it: their help, the rendezvous, the step, and whether the job wants to be started again. Not a command.

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    sed -n '2,/^$/s/^#\( \|$\)//p' "$0"
    exit
fi
source "$repository/launch/common.sh"
[[ -n ${SLURM_JOB_ID:-} ]] || fail "this is a batch script: sbatch $0 ... (--help tells more)"
source "$repository/slurm/site.sh" || fail "slurm/site.sh ended with status $?"
setup || fail "setup in slurm/site.sh ended with status $?"
number MAX_RESTARTS "$MAX_RESTARTS" 0
[[ -z $PYTHON ]] || export PYTHON
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} # the last task of an array has the array's own SLURM_JOB_ID
job=${job:-$SLURM_JOB_ID}
restarts=${SLURM_RESTART_COUNT:-0}
processes=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
number PROCESSES "$processes" 1
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
# Rank 0, on this node, writes a word here (and a rank that meets a damaged shard): exit codes of ranks do not get through their launcher. Not in /tmp, which a container may not share.
DIST_VLCL_STATUS=$PWD/.slurm-$job.status
: >"$DIST_VLCL_STATUS" || fail "$PWD: the job cannot write here; submit from a folder where it can"
export MASTER_ADDR MASTER_PORT DIST_VLCL_STATUS

# A command on one node, by the interpreter that has dist_vlcl.
run_python() {
    ((SLURM_NNODES == 1)) || fail "$SLURM_NNODES nodes: this job takes one; slurm/train.sbatch trains on several"
    run_step bash -c 'source "$0/launch/common.sh"; find_python; trap "" USR1; exec "$python" "$@"' "$repository" "$@"
}

# Run a command once on each node, and leave the job: done, failed, or to be started again.
run_step() {
    local step status state reason word is_queued=no
    trap : TERM USR1 # Slurm signals the steps as well; this shell waits for them
    say "start $restarts of job $job on $SLURM_JOB_NODELIST: ${*%%=*}" # names of options only: values may hold secrets
    # srun has to be told what sbatch was: CPUs (since Slurm 22.05), and the environment (where a site says --export=NONE). And no MPI: accelerate
    # reads its variables.
    srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
        --export=ALL --mpi=none --kill-on-bad-exit=1 "${container[@]}" "$@" &
    step=$!
    while wait "$step"; status=$?; kill -0 "$step" 2>/dev/null; do # a signal ends a wait
        ask_slurm
        [[ $reason != TimeLimit || $is_queued == yes ]] || ! wants_to_go_on || queue_again # at once: this shell may be killed with its step
    done
    word=$(<"$DIST_VLCL_STATUS")
    say "the step ended with status $status (${word:-before training})"
    ask_slurm
    if [[ $is_queued == no ]] && wants_to_go_on; then
        if [[ $state == RUNNING || $reason == TimeLimit ]]; then
            queue_again
        else
            say "Slurm ends this job itself ($state); the same command goes on with the run"
        fi
    fi
    rm -f "$DIST_VLCL_STATUS"
    exit "$status"
}

say() {
    printf '%(%F %T)T %s\n' -1 "$*"
}

# What Slurm does with this job. scancel and preemption end it for good or queue it themselves: only a running job, or one out of time, is ours.
ask_slurm() {
    local attempt
    for attempt in 1 2 3 4 5 6; do # near a time limit the controller may be busy
        read -r state reason < <(squeue --noheader --jobs="$job" --format='%T %r') && return
        ((attempt == 6)) || sleep 5
    done
    state=RUNNING reason="" # it does not answer: to ask for a start too many is the lesser evil, and it refuses for a job that has ended
}

# Stopped by a signal and saved; or steps were being taken, and a rank has died, or an evaluation was longer than the time that was left. Or a start
# has ended before that, without a refusal (2), of a job that had got further once.
wants_to_go_on() {
    word=$(<"$DIST_VLCL_STATUS")
    [[ $word == requeue || $word == training || $status == 75 || (-z $word && $restarts -gt 0 && $status != 0 && $status != 2) ]]
}

queue_again() {
    ((restarts < MAX_RESTARTS)) || { status=1; say "error: not started again: MAX_RESTARTS=$MAX_RESTARTS (slurm/site.sh)" >&2; return; }
    if scontrol requeue "$job"; then
        is_queued=yes
    else
        status=1
        say "error: Slurm does not queue this job again; submit it once more: the same command goes on with the run" >&2
    fi
}
