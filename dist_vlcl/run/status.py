"""One word for the batch script that has started this run: launchers do not let the exit codes of their processes through.

training   steps are being taken: when the job ends with this word, a process has died, and a new start goes on from what is saved
requeue    stopped by a signal, saved: start it again
complete   every task is done
failed     a new start would fail in the same way
           (none: the start itself has failed; a batch script that has started the run before tries again)
"""

import os
from contextlib import suppress
from pathlib import Path

VARIABLE = "DIST_VLCL_STATUS"


def report_status(word: str) -> None:
    """Write the word to the file that the batch script has named, if there is one; rank 0 calls this, or who meets a damaged shard."""
    if path := os.environ.get(VARIABLE):
        with suppress(OSError):  # on another node than the script's the folder may not be there; its own error is what counts
            Path(path).write_text(word + "\n")
