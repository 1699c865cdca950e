#!/usr/bin/env bash
# Train on this machine. See --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'TEXT'
Train on this machine:  launch/local.sh [OPTION ...] [TRAINER_OPTION=VALUE ...]

  --processes N   number of ranks (default: one per GPU, or 2)
  --engine NAME   engine of first-order units: ddp (default), or DeepSpeed: zero0, zero1, zero2, zero3, zero3_offload
  --module NAME   Python module to run (default: dist_vlcl.train)
  --dry-run       print the command and do not run it; secrets in it are not hidden
  --help          this text; `python -m dist_vlcl.train --help` lists the trainer's options

  launch/local.sh orders=dual_hop_odd zo=mozo
  launch/local.sh --engine zero2 --processes 2 orders=first
TEXT
}

processes="" module=dist_vlcl.train dry_run=no
while (($#)); do
    case $1 in
        --help | -h) usage; exit 0 ;;
        --dry-run) dry_run=yes; shift ;;
        --processes | --engine | --module)
            (($# > 1)) || fail "$1 needs a value"
            declare "${1#--}=$2"
            shift 2 ;;
        --) shift; break ;;
        --*) fail "$1: no such option; --help lists them" ;;
        *) break ;;
    esac
done
processes=${processes:-$(default_processes 2)}
number --processes "$processes" 1
check_engine
check_options "$@"
find_python
engine_arguments
[[ $processes != 1 || $engine != ddp ]] || run "$python" -m "$module" "$@" # with one process, accelerate's launcher does not wait for the save after SIGTERM
run "$python" -m accelerate.commands.launch "${arguments[@]}" --num_machines 1 --num_processes "$processes" \
    --main_process_port "${MASTER_PORT:-0}" -m "$module" "$@"
