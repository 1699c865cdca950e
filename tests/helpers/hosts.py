"""Real network hosts for tests: `netns-pair`, from $CLUSTER_TOOLS, ../shared/tools or PATH, makes namespaces with a network of their own.

Where there is none, tests skip with its reason; REQUIRE_REAL_CLUSTER=1 makes that a failure: no machine passes by testing nothing.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class Hosts:
    """Two hosts, h1 and h2, that see each other and nothing else."""

    def __init__(self, tool: str):
        self._tool, self._name = tool, f"t{os.getpid()}"

    def tool(self, verb: str, *arguments: object) -> str:
        done = subprocess.run(self.command(verb, *arguments), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def command(self, verb: str, *arguments: object) -> list[str]:
        return [sys.executable, self._tool, verb, "--name", self._name, *map(str, arguments)]


@contextmanager
def hosts(*options: str) -> Iterator[Hosts]:
    """Two hosts, made with these options of `netns-pair up`."""
    folders = [os.environ.get("CLUSTER_TOOLS"), str(ROOT.parent / "shared" / "tools"), *os.environ.get("PATH", "").split(os.pathsep)]
    tool = next((str(Path(folder) / "netns-pair") for folder in folders if folder and (Path(folder) / "netns-pair").is_file()), None)
    why = "netns-pair is not here: set CLUSTER_TOOLS to the folder that holds it"
    if tool:
        check = subprocess.run([sys.executable, tool, "check"], capture_output=True, text=True)
        why = f"netns-pair: {(check.stdout + check.stderr).strip()}" if check.returncode else ""
    if why:
        (pytest.fail if os.environ.get("REQUIRE_REAL_CLUSTER") == "1" else pytest.skip)(why)
    assert tool is not None
    pair = Hosts(tool)
    pair.tool("up", *options)
    try:
        yield pair
    finally:
        pair.tool("down")
