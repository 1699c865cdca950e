"""Continual learning of CLIP on many nodes with hybrid zeroth- and first-order optimisation."""

__version__ = "0.2.0"
