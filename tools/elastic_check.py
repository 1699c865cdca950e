"""Train on hosts that join, leave, die and lose their links, and compare the end bit for bit with a run that nothing disturbed.

    sudo python tools/elastic_check.py                            three hosts, twenty random changes
    sudo python tools/elastic_check.py --rendezvous etcd          with etcd (etcd-server and python-etcd) in place of torch's own store
    sudo python tools/elastic_check.py --changes join,kill,join,leave --stop

Hosts are network namespaces of this machine. They start launch/elastic.sh, as a user would. A further host is the login node: it holds the
store and is never lost. The run is dual MoZO on handwritten digits. Needs root and iproute2. Exit status 0 if every change was survived and
the bits are equal, 1 if not, 3 if this machine cannot make namespaces.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from dist_vlcl.commands.replay import rebuild
from dist_vlcl.run import checkpoint

ROOT = Path(__file__).parents[1]
KINDS = ("join", "leave", "kill", "power", "rank", "agent", "cut")
TIMEOUT_S = 6  # of a collective
OPTIONS = [
    "orders=dual_all",
    "zo=mozo",
    "tasks.num_tasks=1",
    "train.batch_size=24",
    "cluster.exact_bits=true",
    "train.warmup_steps=10",
    "eval.zero_shot=false",
]
OPTIONS += ["run.trackers=[]", "run.progress=false", "run.plots=false", "run.record_every_steps=0", "cluster.threads=1"]
OPTIONS += [f"cluster.timeout_s={TIMEOUT_S}", "cluster.device=cpu", "run.save_every_steps=100"]


def ip(*words: object) -> str:
    return subprocess.run(["ip", *map(str, words)], capture_output=True, text=True, check=True).stdout


class Net:
    """Network namespaces around a bridge: number 0 is the login node. Nothing is connected to the machine's own network."""

    def __init__(self, size: int):
        self.name, self.size = f"ec{os.getpid()}", size

    def __enter__(self) -> "Net":
        ip("netns", "add", self.space("switch"))
        ip("-n", self.space("switch"), "link", "add", "bridge", "up", "type", "bridge")
        for k in range(self.size + 1):
            ip("netns", "add", self.space(k))
            ip("-n", self.space(k), "link", "add", "eth0", "type", "veth", "peer", "name", f"port{k}", "netns", self.space("switch"))
            ip("-n", self.space(k), "addr", "add", f"{self.address(k)}/24", "dev", "eth0")
            ip("-n", self.space("switch"), "link", "set", f"port{k}", "master", "bridge", "up")
            for device in ("lo", "eth0"):
                ip("-n", self.space(k), "link", "set", device, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for k in ("switch", *range(self.size + 1)):
            self.kill(k)
            subprocess.run(["ip", "netns", "del", self.space(k)], check=False)

    def space(self, k: object) -> str:
        return f"{self.name}-{k}"

    def address(self, k: int) -> str:
        return f"198.18.9.{k + 1}"

    def link(self, k: int, state: str) -> None:
        ip("-n", self.space("switch"), "link", "set", f"port{k}", state)

    def pids(self, k: object) -> list[int]:
        done = subprocess.run(["ip", "netns", "pids", self.space(k)], capture_output=True, text=True, check=False)
        return [int(pid) for pid in done.stdout.split()]

    def kill(self, k: object) -> None:
        for pid in self.pids(k):
            end(pid)


def end(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def journalled(run: Path) -> int:
    file = run / "journal.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


class Check:
    """The run, its hosts, and what happened to them."""

    def __init__(self, args: argparse.Namespace, net: Net, folder: Path):
        self.args, self.net, self.folder = args, net, folder
        self.run, self.log = folder / "runs/elastic", folder / "elastic.log"
        self.agents: dict[int, subprocess.Popen] = {}  # by host
        self.expected: set[int] = set()  # hosts that should take part
        self.started_again = 0
        self.rows: list[tuple[str, int, float]] = []

    def options(self, name: str) -> list[str]:
        epochs = -(-self.args.steps // 12)  # digits: 12 batches of 24 in a task of two classes
        own = [f"train.epochs={epochs}", f"run.root={self.folder}/runs", f"run.name={name}", f"data.root={self.folder}/data"]
        return [*OPTIONS, *own, *self.args.options]

    def execute(self, k: int, *command: object) -> subprocess.Popen:
        """Start a command on a host. All hosts write to one log."""
        own = {"PYTHON": self.args.python, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "15"}
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        line = ["ip", "netns", "exec", self.net.space(k), *map(str, command)]
        with open(self.log, "a") as log:
            environment = {**os.environ, **own, "PYTHONPATH": paths}
            return subprocess.Popen(line, stdout=log, stderr=log, env=environment, cwd=self.folder, start_new_session=True)

    def start_store(self) -> None:
        home = self.net.address(0)
        if self.args.rendezvous == "c10d":
            self.execute(0, ROOT / "launch/elastic.sh", "--serve", "--store", f"{home}:29400")
        else:
            url = f"http://{home}:29400"
            flags = ["--listen-client-urls", url, "--advertise-client-urls", url, "--data-dir", self.folder / "etcd"]
            self.execute(0, "etcd", "--enable-v2", "--logger", "zap", "--log-level", "error", *flags)

    def start(self, k: int) -> None:
        where = ["--store", f"{self.net.address(0)}:29400", "--host", self.net.address(k), "--rendezvous", self.args.rendezvous]
        sizes = ["--nodes", f"1:{self.net.size}", "--wait", 2, "--processes", 1]
        self.agents[k] = self.execute(k, ROOT / "launch/elastic.sh", *where, *sizes, *self.options("elastic"))
        self.expected.add(k)

    def is_complete(self) -> bool:
        file = self.run / "accuracy.json"
        return file.exists() and json.loads(file.read_text()).get("complete") is True

    def change(self, kind: str, k: int) -> None:
        """Do something to host k, and wait until the hosts that are left take steps together."""
        begin, seen = time.monotonic(), self.log.stat().st_size
        if kind == "cut" and len(self.expected) == 1:
            seen = 0  # one host needs no link to train, so nothing starts anew
        if kind == "join":
            self.start(k)
        elif kind == "leave":
            end(self.agents[k].pid, signal.SIGTERM)
        elif kind == "rank":
            for process in self.ranks(k):
                process.kill()
        elif kind == "agent":
            end(self.agents[k].pid)
        else:
            if kind in ("cut", "power"):
                self.net.link(k, "down")
            if kind in ("kill", "power"):
                self.net.kill(k)
            time.sleep(0 if kind == "kill" else TIMEOUT_S + 4)
            if kind != "kill":
                self.net.link(k, "up")
        if kind in ("leave", "kill", "power", "agent"):
            self.expected.discard(k)
            self.agents.pop(k).wait(60)
        parts = []
        if kind == "join":
            while not self.ranks(k) and time.monotonic() < begin + self.args.patience:
                time.sleep(0.05)
            parts = [time.monotonic() - begin]
        parts.append(self.wait_for_steps(seen, begin + self.args.patience) - begin)
        detail = f" (its rank started after {parts[0]:.1f} s, was ready to train after {parts[1]:.1f} s)" if kind == "join" else ""
        self.rows.append((f"{kind} h{k}", len(self.expected), time.monotonic() - begin))
        print(f"{len(self.rows):3} {kind:6} h{k}: {len(self.expected)} hosts train after {self.rows[-1][2]:.0f} s{detail}", flush=True)

    def ranks(self, k: int) -> list[psutil.Process]:
        found = []
        for child in psutil.Process(self.agents[k].pid).children(recursive=True):
            with suppress(psutil.Error):  # it has ended
                words = child.cmdline()  # a fork of the agent has the agent's words
                found += [child] if "dist_vlcl.train" in words and "torch.distributed.run" not in words else []
        return found

    def wait_for_steps(self, seen: int, deadline: float) -> float:
        """Wait until the newest start in the log, after `seen` bytes, is one of all expected hosts and has taken five steps.

        Return the moment at which that start was ready to train.
        """
        since: int | None = None
        ready = time.monotonic()
        while not self.is_complete():
            if time.monotonic() > deadline:
                raise TimeoutError(f"hosts {sorted(self.expected)} do not train together; see {self.log}")
            for k in self.expected:
                if self.agents[k].poll() is not None:  # its agent has lost the store: what starts jobs on a host starts it again
                    self.started_again += 1
                    self.start(k)
            said = self.log.read_bytes()[seen:].decode(errors="replace")
            sizes = [line.partition(" x cpu (ddp)")[0].split()[-1] for line in said.splitlines() if " x cpu (ddp)" in line]
            is_new = bool(sizes) and sizes[-1] == str(len(self.expected))
            ready = ready if since is not None else time.monotonic()
            since = (since if since is not None else journalled(self.run)) if is_new else None
            if since is not None and journalled(self.run) >= since + 5:
                break
            time.sleep(0.1)
        return ready

    def draw(self, source: random.Random) -> tuple[str, int]:
        """Return a random change. At least one host stays."""
        absent, present = sorted(set(range(1, self.net.size + 1)) - self.expected), sorted(self.expected)
        kind = source.choice([kind for kind in KINDS if (absent if kind == "join" else len(present) > 1 or kind in ("rank", "cut"))])
        return kind, source.choice(absent if kind == "join" else present)

    def disturb(self) -> None:
        source = random.Random(self.args.seed)
        self.start_store()
        time.sleep(1)
        self.start(1)
        self.wait_for_steps(0, time.monotonic() + self.args.patience)
        fixed = [] if self.args.changes.isdigit() else self.args.changes.split(",")
        for number in range(int(self.args.changes) if not fixed else len(fixed)):
            kind, k = self.draw(source)
            while fixed and kind != fixed[number]:
                kind, k = self.draw(source)
            if self.is_complete():
                raise RuntimeError(f"the run was complete after {number} changes: use more --steps")
            self.change(kind, k)
        if self.args.stop:
            for k in self.expected:
                end(self.agents[k].pid, signal.SIGTERM)
            for k in self.expected:
                self.agents[k].wait(60)
            return
        deadline = time.monotonic() + 60 * self.args.minutes
        while not self.is_complete():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the run does not end; see {self.log}")
            self.wait_for_steps(self.log.stat().st_size, deadline) if any(a.poll() for a in self.agents.values()) else time.sleep(0.2)

    def compare(self) -> list[str]:
        """Return what differs from a run on one rank that nothing disturbed."""
        whole = self.folder / "runs/whole"
        command = [self.args.python, "-m", "dist_vlcl.train", *self.options("whole"), "run.save_every_steps=5", "run.keep=100"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        lines = (self.run / "journal.jsonl").read_text().splitlines()
        self.steps = len(lines)
        with subprocess.Popen(command, cwd=self.folder, env=environment, stdout=subprocess.DEVNULL) as reference:
            while reference.poll() is None and (not self.args.stop or journalled(whole) < self.steps + 1):
                time.sleep(0.1)
            reference.terminate()
        got = checkpoint.load_newest(self.run)
        assert got is not None and got.step == self.steps
        expected = rebuild(whole, stop=self.steps).tensors
        self.tensors = len(expected)
        names = [name for name, tensor in expected.items() if not torch.equal(tensor, got.tensors[name])]
        others = (whole / "journal.jsonl").read_text().splitlines()
        keep = ("step", "seed", "lr", "moves")
        mine, other = ([[json.loads(line)[key] for key in keep] for line in part[: self.steps]] for part in (lines, others))
        return names + (["the journal"] if mine != other else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", default="20", help=f"a number of random changes, or kinds with commas: {', '.join(KINDS)}")
    parser.add_argument("--hosts", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3000, help="steps of the run, more than the changes take (default: %(default)s)")
    parser.add_argument("--rendezvous", choices=("c10d", "etcd"), default="c10d", help="(default: %(default)s)")
    parser.add_argument("--stop", action="store_true", help="stop after the last change and compare there, not at the end of the run")
    parser.add_argument("options", nargs="*", metavar="OPTION=VALUE", help="further options of the trainer")
    parser.add_argument("--seed", type=int, default=0, help="of the changes (default: %(default)s)")
    parser.add_argument("--patience", type=float, default=180, help="seconds after a change until the hosts train (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=30, help="from the last change to the end of the run (default: %(default)s)")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has dist_vlcl (default: this one)")
    parser.add_argument("--folder", type=Path, help="where run and log stay (default: a temporary folder, removed if all is well)")
    args = parser.parse_intermixed_args()
    if os.geteuid() or not shutil.which("ip"):
        print("needs root and iproute2's `ip`: it makes network namespaces")
        return 3
    folder = args.folder or Path(tempfile.mkdtemp(prefix="elastic-"))
    folder.mkdir(parents=True, exist_ok=True)
    with Net(args.hosts) as net:
        check = Check(args, net, folder)
        try:
            check.disturb()
        except (TimeoutError, RuntimeError) as error:
            print(f"error: {error}")
            return 1
    differing = check.compare()
    bits = (
        f"{len(differing)} differ from the undisturbed run: {differing[:3]}" if differing else "the bits of the undisturbed run on one rank"
    )
    print(f"{len(check.rows)} changes; agents started again after they had lost the store: {check.started_again}")
    print(f"{check.steps} steps, {check.tensors} tensors: {bits}")
    if not differing and args.folder is None:
        shutil.rmtree(folder)
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
