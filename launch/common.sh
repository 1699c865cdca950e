# Sourced by local.sh, multinode.sh and the scripts of slurm/: what they share. Not a command.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
engine=ddp engines="ddp zero0 zero1 zero2 zero3 zero3_offload"
# Ranks save after SIGTERM; so many seconds later their launcher kills them. At least twice a save and the longest step (docs/reliability.md).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-90}

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# A whole number from $3 on, without the leading zeros that bash would take for octal: number NAME VALUE LEAST [MOST]
number() {
    [[ $2 =~ ^(0|[1-9][0-9]{0,5})$ ]] && (($2 >= $3 && $2 <= ${4:-999999})) || fail "$1 $2: give a whole number from $3${4:+ to $4}"
}

# The interpreter of the checkout's .venv, or of $PYTHON.
find_python() {
    python=${PYTHON:-$here/../.venv/bin/python}
    [[ -n ${PYTHON:-} || -x $python ]] || python=python3
    command -v "$python" >/dev/null || fail "there is no $python: run 'make install' first, or set PYTHON"
    "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("accelerate") is None)' ||
        fail "$python has no accelerate: run 'make install' first, or set PYTHON to the interpreter that has dist_vlcl"
    [[ $engine != zero* ]] || "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("deepspeed") is None)' ||
        fail "--engine $engine needs DeepSpeed: $python -m pip install 'dist-vlcl[deepspeed]'"
}

check_engine() {
    [[ " $engines " == *" $engine "* ]] || fail "--engine $engine: choose from ${engines// /, }"
}

# Options of the trainer: OPTION=VALUE, each once. An unquoted {a,b} is expanded by the shell into two, of which the last would win.
check_options() {
    local option key
    local -A seen=()
    for option in "$@"; do
        [[ $option == -* ]] && continue
        [[ $option == *=* ]] || fail "$option: options of the trainer are OPTION=VALUE"
        key=${option%%=*}
        [[ -z ${seen[$key]:-} ]] || fail "$key is given twice; quote values with { } [ ] or *"
        seen[$key]=yes
    done
}

default_processes() {
    local gpus
    gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU') || true
    echo "$((gpus > 0 ? gpus : $1))"
}

# accelerate's words for the engine.
engine_arguments() {
    if [[ $engine == zero* ]]; then
        arguments=(--use_deepspeed --deepspeed_config_file "$here/deepspeed/$engine.json" --deepspeed_multinode_launcher standard --zero3_init_flag false)
    else
        arguments=(--multi_gpu --mixed_precision no)
    fi
    arguments+=(--dynamo_backend no)
}

# Print the command, quoted as a shell wants it, or become it.
run() {
    if [[ $dry_run == yes ]]; then
        printf '%q ' "$@"
        printf '\n'
        exit 0
    fi
    trap '' USR1 # it is for the ranks alone: it kills a launcher
    exec "$@"
}
