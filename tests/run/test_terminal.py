"""A reader of the output that goes away does not end the run."""

import subprocess

from tests.helpers.ranks import warm_python

LOG = """
import sys
from dist_vlcl.run.log import Terminal
console = Terminal(width=80)
console.print("the first line")
for _ in range(200):
    console.print("x" * 1000)  # more than a pipe holds
print("done", file=sys.stderr)
"""


def test_a_reader_that_closes_the_pipe_does_not_end_the_process():
    with subprocess.Popen([warm_python(), "-c", LOG], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "the first line\n"
        process.stdout.close()
        assert process.stderr.read() == "done\n"
    assert process.returncode == 0
