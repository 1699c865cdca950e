"""Continual learning of CLIP on many nodes with hybrid zeroth- and first-order optimisation."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_vlcl.inference import load

# Before torch is imported: its C++ code logs warnings that need no action, such as DDP's about find_unused_parameters (dist/world.py).
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

__version__ = "0.2.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """Return `load`, imported when it is first used: it needs torch."""
    if name != "load":
        raise AttributeError(f"module 'dist_vlcl' has no attribute {name!r}")
    from dist_vlcl.inference import load

    return load
