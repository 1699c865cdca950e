"""A world of one process, and one that plays a rank without writing."""

from typing import Any


class Alone:
    rank, size, is_main = 0, 1, True

    def share(self, value: Any) -> Any:
        return value

    def barrier(self) -> None:
        pass


class Follower(Alone):
    """Rank 1 of two, which is told what rank 0 has shared."""

    rank, size, is_main = 1, 2, False

    def __init__(self, told: Any = None) -> None:
        self.told = told

    def share(self, value: Any) -> Any:
        assert value is None
        return self.told
