"""A reader of the output that goes away does not end the run."""

import subprocess
import sys

LOG = """
import sys
from dist_vlcl.run.log import Terminal
console = Terminal(width=80)
for number in range(20_000):
    console.print("line", number)
print("done", file=sys.stderr)
"""


def test_a_reader_that_closes_the_pipe_does_not_end_the_process():
    with subprocess.Popen([sys.executable, "-c", LOG], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "line 0\n"
        process.stdout.close()
        assert process.stderr.read() == "done\n"
    assert process.returncode == 0
