"""Every test runs on one thread: the machine may be busy, and sums on one thread have one order.

Modules that wait long come first, so that the others fill in.
"""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Undo what a test before may have left: two threads on busy cores burn many times the time of one."""
    torch.set_num_threads(1)


LONG = (
    "slurm/test_slurm.py",
    "test_faults.py",
    "launch/test_launch.py",
    "dist/test_network.py",
    "benchmarks/test_scripts.py",
    "test_train.py",
    "dist/test_zero.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    assert all((here / name).is_file() for name in LONG)
    place = {here / name: index for index, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(LONG)))
