"""A run and its folder: configuration, state, checkpoints, signals and logs."""
