"""Benchmarks of dist_vlcl. Each is a separate script: `python -m benchmarks.step --help`, from the checkout."""
