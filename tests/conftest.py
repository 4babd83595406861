"""No test may reach the network, and none is the faster for more threads than cores."""

import gc
import importlib.util
import os
import signal

import torch

os.environ["HF_HUB_OFFLINE"] = "1"
# Imports create a million objects that stay; looking at them again and again takes minutes in all.
gc.set_threshold(100_000, 20, 50)
# On a busy machine an example may take any time. A bare environment does not have hypothesis.
if importlib.util.find_spec("hypothesis") is not None:
    import hypothesis

    hypothesis.settings.register_profile("without deadline", deadline=None)
    hypothesis.settings.load_profile("without deadline")
# As the command line does: the same bits wherever memory is aligned. MKL reads it at its first use.
os.environ.setdefault("MKL_CBWR", "AUTO")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Inductor compiles a test program for every vector width and keeps idle workers, in each process.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# A shell starts what it sends to the background deaf to Ctrl-C, and children would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Triton decides at its import whether kernels run on a GPU or, interpreted, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
