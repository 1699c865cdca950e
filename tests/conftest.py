"""Every test runs on one thread: the machine may be busy, and sums on one thread have one order."""

import torch

torch.set_num_threads(1)
