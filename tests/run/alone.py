"""A rank that does not write, and gets the value that rank 0 shares."""

from typing import Any

from dist_vlcl.dist.world import World


class Follower(World):
    """Rank 1 of two."""

    def __init__(self, shared: Any = None) -> None:
        super().__init__(rank=1, size=2)
        self.shared = shared

    def share(self, value: Any, what: str = "") -> Any:
        assert value is None
        return self.shared
