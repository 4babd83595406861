"""No test may reach the network, and none is the faster for more threads than cores."""

import os

import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton decides at its import whether kernels run on a GPU or, interpreted, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
