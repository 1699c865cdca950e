#!/usr/bin/env python3
"""A fake Python interpreter for jobs: records its arguments and signals, trains nothing, and stops after a signal if $STANDIN_STOPS."""

import json
import os
import signal
import sys
import time
from pathlib import Path

if sys.argv[1:2] == ["-c"] or "--check" in sys.argv:
    sys.exit()  # the job looks for the trainer's packages, and validates its options
start, task = os.environ.get("SLURM_RESTART_COUNT", "0"), os.environ.get("SLURM_ARRAY_TASK_ID", "")
told = ("CUDA_VISIBLE_DEVICES", "MASTER_ADDR", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "SLURM_CPUS_PER_TASK", "SLURM_STEP_NUM_TASKS")


def say(word: str, **what: object) -> None:
    Path(os.environ["DIST_VLCL_STATUS"]).write_text(word + "\n")
    with open(f"said{task}-{start}.jsonl", "a") as file:
        print(json.dumps({"time": time.time(), **what}), file=file)


def note(number: int, _: object) -> None:
    stops = bool(os.environ.get("STANDIN_STOPS"))
    say("requeue" if stops else "training", signal=signal.Signals(number).name.removeprefix("SIG"))
    if stops:
        sys.exit()


signal.signal(signal.SIGUSR1, note)
signal.signal(signal.SIGTERM, note)
say("training" if start == "0" else "complete", arguments=sys.argv[1:], **{name: os.environ.get(name) for name in told})
while start == "0":
    time.sleep(0.1)
