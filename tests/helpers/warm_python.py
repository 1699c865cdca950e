"""A Python whose imports are done: `warm_python()` is a program that a test calls in place of sys.executable.

Torch, open_clip and the trainer take ten seconds of CPU to import. This program asks a server, which has imported them, for a fork of
itself. The fork has the caller's arguments, environment, folder, streams, priority, cores and namespaces (those of a node of Slurm, or of
a network host). The caller forwards its signals and ends with the fork's status; if it is killed, the fork is killed too. SIGSTOP
stops the caller alone. Launchers (accelerate, torchrun) are real processes, so that Slurm sees their ranks; these are warm.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

TYPE_CHECKING = False  # typing takes as long to import as all of this
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, NoReturn

NAMESPACES = ("uts", "net", "pid", "mnt")
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
LAUNCHERS = ("accelerate.commands.launch", "torch.distributed.run")


def call(path: str, program: str, arguments: list[str]) -> int:
    """Be the caller: have these arguments of Python run by the server at this path; return the exit status."""
    if LAUNCHERS[0] in arguments or LAUNCHERS[1] in arguments:
        os.environ["PYTHON_EXEC"] = program
        os.execv(sys.executable, [sys.executable, *arguments])
    content = json.dumps(request(arguments, dict(os.environ), os.getcwd(), program)).encode()
    server = socket.socket(socket.AF_UNIX)
    server.connect(path)
    for number in FORWARDED:
        signal.signal(number, lambda number, _: server.send(bytes([number])))
    spaces = [os.open(f"/proc/self/ns/{name}", os.O_RDONLY) for name in NAMESPACES]
    socket.send_fds(server, [len(content).to_bytes(4, "big")], [0, 1, 2, *spaces])
    server.sendall(content)
    status = int.from_bytes(server.recv(4) or b"\1", "big", signed=True)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def request(arguments: list[str], environment: Mapping[str, str], folder: str | os.PathLike, program: str) -> dict[str, Any]:
    """Return what `do` needs to know of this process, with these arguments of Python, environment and folder."""
    ignored = [number for number in FORWARDED if signal.getsignal(number) is signal.SIG_IGN]
    how = {"ignored": ignored, "nice": os.nice(0), "cores": list(os.sched_getaffinity(0)), "program": program}
    return {"arguments": arguments, "environment": dict(environment), "folder": str(folder), **how}


def serve(path: str) -> None:
    """Be the server: fork for every caller, until killed."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    running: set[int] = set()
    while True:
        caller, _ = listener.accept()
        running -= {pid for pid in running if os.waitpid(pid, os.WNOHANG)[0]}
        running.add(pid := os.fork())
        if pid == 0:
            listener.close()
            _attend(caller)
            os._exit(0)
        caller.close()


def _attend(caller: socket.socket) -> None:
    """Fork once more, into the caller's namespaces; pass on its signals, and the fork's status to it."""
    import ctypes
    import select

    size, files, _, _ = socket.recv_fds(caller, 4, 3 + len(NAMESPACES))
    asked = json.loads(caller.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
    for name, file in zip(NAMESPACES, files[3:], strict=True):
        if os.fstat(file).st_ino != os.stat(f"/proc/self/ns/{name}").st_ino and ctypes.CDLL(None, use_errno=True).setns(file, 0):
            raise OSError(ctypes.get_errno(), f"setns {name}")
    if (pid := os.fork()) == 0:
        caller.close()
        do(asked, files)
    ended = os.pidfd_open(pid)
    while True:
        ready, _, _ = select.select([caller, ended], [], [])
        if ended in ready:
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            caller.sendall(status.to_bytes(4, "big", signed=True))
            return
        numbers = caller.recv(64)
        for number in numbers or [signal.SIGKILL]:  # nothing: the caller is dead
            os.kill(pid, number)
        if not numbers:
            os.waitpid(pid, 0)
            return


def do(asked: dict[str, Any], files: list[int]) -> NoReturn:
    """Do what `python ARGUMENTS` does, with these files as streams."""
    import atexit
    import runpy
    import traceback
    import types

    for target, file in enumerate(files):
        if target < 3:
            os.dup2(file, target)
        os.close(file)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115, multiprocessing has put another in its place
    for number in FORWARDED:
        signal.signal(number, signal.SIG_IGN if number in asked["ignored"] else signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    os.nice(asked["nice"] - os.nice(0))
    os.sched_setaffinity(0, asked["cores"])
    sys.executable = asked["program"]
    sys.path[:0] = [asked["folder"], *filter(None, os.environ.get("PYTHONPATH", "").split(":"))]
    arguments = [word for word in asked["arguments"] if word != "-u"]
    code = 0
    try:
        if arguments[0] == "-m":
            sys.modules.pop(arguments[1], None)
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif arguments[0] == "-c":
            sys.argv, sys.modules["__main__"] = ["-c", *arguments[2:]], types.ModuleType("__main__")
            exec(compile(arguments[1], "<string>", "exec"), vars(sys.modules["__main__"]))
        else:
            sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.abspath(arguments[0]))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(call(sys.argv[1], sys.argv[2], sys.argv[3:]))
