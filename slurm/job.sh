# The scripts beside this file source it. It prints their help, sets up the rendezvous, runs the step, and decides whether to requeue the job.

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
MASTER_PORT=$(free_port $((10000 + SLURM_JOB_ID % 20000))) # this shell runs on the node of rank 0
# Rank 0, on this node, writes a status word here, since launchers do not pass on the exit codes of ranks. A rank that meets a damaged shard does,
# too. Not in /tmp, which a container may not share.
DIST_VLCL_STATUS=$PWD/.slurm-$job.status
: >"$DIST_VLCL_STATUS" || fail "$PWD: the job cannot write here; submit from a folder where it can"
rm -f "$DIST_VLCL_STATUS.first"
export MASTER_ADDR MASTER_PORT MAX_RESTARTS DIST_VLCL_STATUS

# Run a Python command on one node, by the interpreter that has dist_vlcl.
with_python='source "$0/launch/common.sh"; find_python; trap "" USR1; exec "$python" "$@"'
run_python() {
    ((SLURM_NNODES == 1)) || fail "$SLURM_NNODES nodes: this job takes one node; slurm/train.sbatch trains on several"
    run_step bash -c "$with_python" "$repository" "$@"
}

# Validate the trainer's options on one node before ranks start on all of them. A restart has the options of the first start.
check_trainer() {
    ((restarts == 0)) || return 0
    local word options=()
    for word in "$@"; do
        [[ $word == -* && $word != --config-dir=* || $word != *=* ]] || options+=("$word") # the others belong to the launcher
    done
    srun --nodes=1 --ntasks=1 --export=ALL --mpi=none "${container[@]}" bash -c "$with_python" "$repository" -m dist_vlcl.train --check "${options[@]}" && return
    rm -f "$DIST_VLCL_STATUS"
    fail "the job does not start: see the message above"
}

# Run a command on each node of an elastic job; $0 is the job. If the first node dies, this script and the store are lost with it. With --no-kill,
# Slurm then takes that node out of the job (after SlurmdTimeout), and leaves the job RUNNING. The first node that is left queues the job again.
# As long as the job's first node lives, this script decides.
on_each_node='trap : TERM USR1 # the command handles them
"$@"; status=$?
trap - TERM USR1
((SLURM_NODEID > 0)) || : >"$DIST_VLCL_STATUS.first"
until ((status == 0)) || [[ -e $DIST_VLCL_STATUS.first ]] || ((++checks > 60)); do # 10 minutes: then the first node lives, and this script decides
    nodes=$(squeue --noheader --jobs="$0" --states=RUNNING --format=%N)
    if [[ $(scontrol show hostnames "$nodes" | head -n 1) == "$SLURMD_NODENAME" ]]; then
        if ((${SLURM_RESTART_COUNT:-0} < MAX_RESTARTS)); then scontrol requeue "$0"; else scancel "$0"; fi
    fi
    sleep 10
done
exit "$status"'

# Run a command once on each node, then end the job: done, failed, or requeued.
run_step() {
    local step status state reason word since is_queued=no
    trap : TERM USR1 # Slurm signals the steps, too; this shell waits for them
    say "start $restarts of job $job on $SLURM_JOB_NODELIST: ${*%%=*}" # names of options only: values may hold secrets
    # srun does not inherit from sbatch: the CPUs (since Slurm 22.05), and the environment (if a site sets --export=NONE). No MPI: accelerate would
    # read its variables.
    local loss=(--kill-on-bad-exit=1) wrapper=()
    if [[ -n ${ELASTIC:-} ]]; then
        loss=(--kill-on-bad-exit=0 --no-kill) # the other nodes go on
        wrapper=(bash -c "$on_each_node" "$job")
    fi
    srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
        --export=ALL --mpi=none "${loss[@]}" "${wrapper[@]}" "${container[@]}" "$@" &
    step=$!
    while wait "$step"; status=$?; kill -0 "$step" 2>/dev/null; do # a signal ends a wait
        trap '' TERM USR1 # bash 5.2 may fail to parse $(...) while a trap runs
        since=$SECONDS
        ask_slurm
        ((SECONDS - since < 5)) || ask_slurm # the answer may have changed by a signal that was ignored meanwhile
        [[ $reason != TimeLimit || $is_queued == yes ]] || ! wants_to_go_on || queue_again # at once: this shell may be killed with its step
        trap : TERM USR1
    done
    trap '' TERM USR1
    word=$(<"$DIST_VLCL_STATUS")
    say "the step ended with status $status (${word:-before training})"
    ask_slurm
    if [[ $is_queued == no ]] && wants_to_go_on; then
        if [[ $state == RUNNING || $reason == TimeLimit ]]; then
            queue_again
        else
            say "Slurm ends this job ($state); the same command continues the run"
        fi
    fi
    rm -f "$DIST_VLCL_STATUS" "$DIST_VLCL_STATUS.first"
    exit "$status"
}

say() {
    printf '%(%F %T)T %s\n' -1 "$*"
}

# Run one of Slurm's commands, for at most 20 s. A signal to this shell reaches the command, too, and must not end it.
ask() {
    timeout --signal=KILL 20 bash -c 'trap "" TERM USR1; exec "$@"' - "$@"
}

# Ask Slurm for the state of this job. After scancel or preemption Slurm itself ends or requeues it; we requeue only a running job, or one out of time.
ask_slurm() {
    local attempt
    for attempt in 1 2 3 4 5 6; do # near a time limit the controller may be busy
        read -r state reason < <(ask squeue --noheader --jobs="$job" --format='%T %r') && return
        ((attempt == 6)) || sleep 5
    done
    state=RUNNING reason="" # no answer: we ask to requeue, so a job that was cancelled at this moment may run again
}

# Whether to requeue: the run stopped after a signal and saved; or a rank died while steps were taken, or an evaluation took longer than the time that
# was left; or a restart ended before training without a refusal (status 2).
wants_to_go_on() {
    word=$(<"$DIST_VLCL_STATUS")
    [[ $word == requeue || $word == training || $status == 75 || (-z $word && $restarts -gt 0 && $status != 0 && $status != 2) ]]
}

queue_again() {
    ((restarts < MAX_RESTARTS)) || { status=1; say "error: not started again: MAX_RESTARTS=$MAX_RESTARTS (slurm/site.sh)" >&2; return; }
    if ask scontrol requeue "$job"; then
        is_queued=yes
    else
        status=1
        say "error: Slurm did not requeue this job; if it does not start again, submit it: the same command continues the run" >&2
    fi
}
