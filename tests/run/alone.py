"""A rank that does not write, and gets the value that rank 0 shares."""

from typing import Any

from dist_vlcl.dist.world import World


class Follower(World):
    """Rank 1 of two."""

    def __init__(self, shared: Any = None) -> None:
        super().__init__(rank=1, size=2)
        self.shared = shared

    def on_main(self, work: Any, what: str) -> Any:
        if isinstance(self.shared, Exception):
            raise self.shared
        return self.shared
