"""A short real run for tests of what starts runs: zeroth order alone, restarted at the last block, ten steps of handwritten digits."""

QUICK_RUN = ["tasks.num_tasks=1", "train.epochs=2", "train.batch_size=60", "train.warmup_steps=2", "run.progress=false"]
QUICK_RUN += ["eval.zero_shot=false", "orders.layers=[12]", "orders.rest=frozen"]
