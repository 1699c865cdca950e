"""One run: its folder, state, checkpoints, logs and signals. Rank 0 writes; no module here knows the model."""
