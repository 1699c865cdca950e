#!/usr/bin/env bash
# Train on machines that come and go. See --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<'TEXT'
Train on machines that come and go: start the same command on every machine, at any time:

  launch/elastic.sh --nodes MIN:MAX --store HOST:PORT [OPTION ...] [TRAINER_OPTION=VALUE ...]

  --nodes MIN:MAX    train while at least MIN machines are there, on at most MAX
  --store HOST:PORT  where the machines find each other: machine HOST with c10d, an etcd server with etcd
  --rendezvous NAME  c10d (default): HOST is one of the machines, or runs this script with --serve; or etcd (needs python-etcd, etcd --enable-v2)
  --serve            be the store and do not train: on a login node, which outlives the machines
  --id NAME          name of this start in the store; a store that outlives the run needs a new one for each start (default: dist_vlcl)
  --host NAME        name or address of this machine that the others can reach (default: its host name)
  --wait S           seconds to wait for more machines when MIN are there (default 10)
  --restarts N       times that this machine starts its ranks again, after an error or when a machine leaves or dies (default 1000)
  --processes N      ranks on this machine (default: one per GPU, or 1)
  --module NAME      Python module to run (default: dist_vlcl.train)
  --dry-run          print the command and do not run it; secrets in it are not hidden
  --help             this text; `python -m dist_vlcl.train --help` lists the trainer's options

The run folder and the data must be on a file system that all machines share. SIGTERM takes a machine out: its ranks save, the others go on.
Set cluster.timeout_s=60 or less: a machine that is lost without a word is noticed after that time.

  launch/elastic.sh --nodes 1:4 --store node1:29400 cluster.timeout_s=60 orders=dual_all zo=mozo     # on node1, node2, ...
TEXT
}

nodes="" store="" rendezvous=c10d id=dist_vlcl host="" wait=10 restarts=1000 processes="" module=dist_vlcl.train dry_run=no serve=no
while (($#)); do
    case $1 in
        --help | -h) usage; exit 0 ;;
        --dry-run) dry_run=yes; shift ;;
        --serve) serve=yes; shift ;;
        --nodes | --store | --rendezvous | --id | --host | --wait | --restarts | --processes | --module)
            (($# > 1)) || fail "$1 needs a value"
            declare "${1#--}=$2"
            shift 2 ;;
        --) shift; break ;;
        --*) fail "$1: no such option; --help lists them" ;;
        *) break ;;
    esac
done
[[ -n $store ]] || fail "--store is missing: HOST:PORT where the machines find each other"
[[ $store =~ ^[A-Za-z0-9._-]+:[0-9]+$ ]] || fail "--store $store: give HOST:PORT"
number --store "${store##*:}" 1 65535
[[ $rendezvous == c10d || $rendezvous == etcd ]] || fail "--rendezvous $rendezvous: choose from c10d, etcd"
find_python
if [[ $serve == yes ]]; then
    [[ $rendezvous == c10d ]] || fail "--serve: only with --rendezvous c10d; start an etcd server yourself"
    run "$python" -c 'import sys, threading
from torch.distributed import TCPStore
store = TCPStore("0.0.0.0", int(sys.argv[1]), is_master=True, wait_for_workers=False)
threading.Event().wait()' "${store##*:}"
fi
[[ $nodes =~ ^[0-9]+:[0-9]+$ ]] || fail "--nodes ${nodes:-(nothing)}: give MIN:MAX, such as 1:4"
number --nodes "${nodes%:*}" 1
number --nodes "${nodes#*:}" "${nodes%:*}"
processes=${processes:-$(default_processes 1)}
number --processes "$processes" 1
number --restarts "$restarts" 0
number --wait "$wait" 1
[[ $id =~ ^[A-Za-z0-9._-]+$ ]] || fail "--id $id: use letters, digits, '.', '_' and '-' only"
[[ -z $host || $host =~ ^[A-Za-z0-9._:-]+$ ]] || fail "--host $host: give a name or an address"
check_options "$@"
[[ $rendezvous == c10d ]] || "$python" -c 'import etcd' 2>/dev/null || fail "--rendezvous etcd: $python -m pip install python-etcd"

conf=join_timeout=3600,last_call_timeout=$wait,keep_alive_interval=3 # a machine that is silent for three intervals is lost
backend=c10d
if [[ $rendezvous == etcd ]]; then
    backend=etcd-v2
elif [[ -n $host ]]; then # otherwise torch compares HOST with the names of this machine
    conf+=,is_host=$([[ ${store%:*} == "$host" ]] && echo 1 || echo 0)
fi
# With the shared store, a new machine would wait for addresses that were written in the round before (torch 2.15).
settings=(TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "DIST_VLCL_ELASTIC=${DIST_VLCL_ELASTIC:-$store/$id}")
run env "${settings[@]}" "$python" -m torch.distributed.run --nnodes "$nodes" --nproc_per_node "$processes" --rdzv_backend "$backend" \
    --rdzv_endpoint "$store" --rdzv_id "$id" --rdzv_conf "$conf" ${host:+--local_addr "$host"} --max_restarts "$restarts" -m "$module" "$@"
