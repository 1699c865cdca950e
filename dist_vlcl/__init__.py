"""Continual learning of CLIP on many nodes with hybrid zeroth- and first-order optimisation."""

import os

# Before torch is imported: its C++ code logs warnings that need no action, such as DDP's about find_unused_parameters (dist/world.py).
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

__version__ = "0.2.0"
