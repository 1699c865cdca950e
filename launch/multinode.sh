#!/usr/bin/env bash
# Train on several machines: start this on each of them. See --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'TEXT'
Train on several machines: start this on every machine, each with its own --rank:

  launch/multinode.sh --nodes N --rank R --address HOST [OPTION ...] [TRAINER_OPTION=VALUE ...]

  --nodes N        number of machines                                 (default in a Slurm step: its nodes)
  --rank R         number of this machine, from 0                     (default in a Slurm step: its node)
  --address HOST   name or address of machine 0 that all can reach    (default: MASTER_ADDR)
  --port P         a free port on machine 0                           (default: MASTER_PORT, or 29500)
  --processes N    ranks on each machine (default: one per GPU, or 1)
  --engine NAME    engine of first-order units: ddp (default), or DeepSpeed: zero0, zero1, zero2, zero3, zero3_offload
  --launcher NAME  accelerate (default) or torchrun
  --restarts N     torchrun starts all ranks again, up to N times, when one of them dies (default 0)
  --module NAME    Python module to run (default: dist_vlcl.train)
  --dry-run        print the command and do not run it; secrets in it are not hidden
  --help           this text; `python -m dist_vlcl.train --help` lists the trainer's options

The run folder and the data must be on a file system that all machines share.

  launch/multinode.sh --nodes 2 --rank 0 --address node1 orders=dual_hop_odd     # on node1
  launch/multinode.sh --nodes 2 --rank 1 --address node1 orders=dual_hop_odd     # on node2
TEXT
}

nodes=${SLURM_STEP_NUM_NODES:-${SLURM_NNODES:-}} rank=${SLURM_NODEID:-} address=${MASTER_ADDR:-} port=${MASTER_PORT:-29500}
processes="" launcher=accelerate restarts=0 module=dist_vlcl.train dry_run=no
while (($#)); do
    case $1 in
        --help | -h) usage; exit 0 ;;
        --dry-run) dry_run=yes; shift ;;
        --nodes | --rank | --address | --port | --processes | --engine | --launcher | --restarts | --module)
            (($# > 1)) || fail "$1 needs a value"
            declare "${1#--}=$2"
            shift 2 ;;
        --) shift; break ;;
        --*) fail "$1: no such option; --help lists them" ;;
        *) break ;;
    esac
done
[[ -n $nodes ]] || fail "--nodes is missing: how many machines take part?"
[[ -n $rank ]] || fail "--rank is missing: which machine is this, from 0?"
[[ -n $address ]] || fail "--address is missing: a name or address of machine 0"
processes=${processes:-$(default_processes 1)}
number --nodes "$nodes" 1
number --rank "$rank" 0 $((nodes - 1))
number --port "$port" 1 65535
number --processes "$processes" 1
number --restarts "$restarts" 0
check_engine
[[ $launcher == accelerate || $launcher == torchrun ]] || fail "--launcher $launcher: choose from accelerate, torchrun"
[[ $launcher == torchrun || $restarts == 0 ]] ||
    fail "--restarts $restarts: accelerate's rendezvous cannot start ranks again on several machines; use --launcher torchrun"
[[ $address =~ ^[A-Za-z0-9._:-]+$ ]] && getent hosts "$address" >/dev/null || fail "--address $address: this machine cannot find it"
check_options "$@"
find_python
total=$((nodes * processes))
engine_arguments

if [[ $launcher == accelerate ]]; then
    [[ $total != 1 || $engine != ddp ]] || run "$python" -m "$module" "$@" # with one process, accelerate's launcher does not wait for the save after SIGTERM
    run "$python" -m accelerate.commands.launch "${arguments[@]}" --num_machines "$nodes" --machine_rank "$rank" --num_processes "$total" \
        --main_process_ip "$address" --main_process_port "$port" --rdzv_backend static --max_restarts 0 -m "$module" "$@"
fi

settings=()
if [[ $engine == zero* ]]; then # accelerate's launcher would set these variables
    settings+=(ACCELERATE_USE_DEEPSPEED=true "ACCELERATE_DEEPSPEED_CONFIG_FILE=$here/deepspeed/$engine.json")
    settings+=(ACCELERATE_CONFIG_DS_FIELDS=deepspeed_config_file)
fi
if ((restarts == 0)); then
    meeting=(--master_addr "$address" --master_port "$port")
else
    # Otherwise the addresses of dead ranks stay in the store, and new ranks fail to connect.
    settings+=(TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1)
    meeting=(--rdzv_backend c10d --rdzv_endpoint "$address:$port" --rdzv_id "$port" --rdzv_conf "is_host=$((rank == 0))" --max_restarts "$restarts")
fi
run env "${settings[@]}" "$python" -m torch.distributed.run --nnodes "$nodes" --node_rank "$rank" --nproc_per_node "$processes" "${meeting[@]}" -m "$module" "$@"
