"""Benchmarks of dist_vlcl. Each is a script of its own: `python -m benchmarks.step --help`, from the checkout."""
