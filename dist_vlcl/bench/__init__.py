"""Measurements: `python -m dist_vlcl.bench --help`."""
