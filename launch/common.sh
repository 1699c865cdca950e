# Functions that local.sh, multinode.sh and the scripts of slurm/ share. They source this file.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
engine=ddp engines="ddp zero0 zero1 zero2 zero3 zero3_offload"
# Ranks save after SIGTERM; after so many seconds their launcher kills them. Allow at least twice the time of a save and the longest step.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-90}

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# number NAME VALUE MIN [MAX]: accept a whole number within the bounds. No leading zeros, which bash would read as octal.
number() {
    [[ $2 =~ ^(0|[1-9][0-9]{0,5})$ ]] && (($2 >= $3 && $2 <= ${4:-999999})) || fail "$1 $2: give a whole number from $3${4:+ to $4}"
}

# Set $python to $PYTHON, or to the interpreter in the .venv of the checkout.
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

# Accept OPTION=VALUE, each option once. The shell expands an unquoted {a,b} into two options, and the last one would win.
check_options() {
    local option key
    local -A seen=()
    for option in "$@"; do
        [[ $option == -* ]] && continue
        [[ $option == ?*=* ]] || fail "$option: options of the trainer are OPTION=VALUE"
        key=${option%%=*}
        [[ -z ${seen[$key]:-} ]] || fail "$key is given twice; quote values with { } [ ] or *"
        seen[$key]=yes
    done
}

# Print the first port from $1 on that nobody listens on at this machine.
free_port() {
    local port=$1
    while (: <>"/dev/tcp/localhost/$port") 2>/dev/null; do port=$((port + 1)); done
    echo "$port"
}

default_processes() {
    local gpus
    gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU') || true
    ((gpus == 0)) || [[ -z ${CUDA_VISIBLE_DEVICES+x} ]] || gpus=$(tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .) || true
    echo "$((gpus > 0 ? gpus : $1))"
}

# Set $arguments to the options of accelerate that select the engine.
engine_arguments() {
    if [[ $engine == zero* ]]; then
        arguments=(--use_deepspeed --deepspeed_config_file "$here/deepspeed/$engine.json" --deepspeed_multinode_launcher standard --zero3_init_flag false)
    else
        arguments=(--multi_gpu --mixed_precision no)
    fi
    arguments+=(--dynamo_backend no)
}

# Print the command, quoted for a shell, or replace this process with it.
run() {
    if [[ $dry_run == yes ]]; then
        printf '%q ' "$@"
        printf '\n'
        exit 0
    fi
    trap '' USR1 # meant for the ranks; it would kill a launcher
    exec "$@"
}
