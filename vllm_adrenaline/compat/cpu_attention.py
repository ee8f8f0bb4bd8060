"""Workarounds for two faults of vLLM's CPU attention operators: a shared scratch memory, and AMX without permission."""

import threading

import torch

from vllm_adrenaline.errors import AdrenalineError

scratch_lock = threading.Lock()
"""Held around both attention operators. They share one scratch memory in a process (csrc/cpu/cpu_attn_impl.hpp of vLLM,
ScratchPadManager). Making a schedule may move it, attending writes it, and both release the interpreter's lock. An
executor has a thread for each decode worker: without this lock a quarter of the outputs were wrong (0.32, run). A
schedule stays valid whatever other threads make meanwhile."""


def allow_amx() -> None:
    """Ask the kernel for AMX tiles where the processor has them. Without that, the first AMX instruction is a SIGILL.

    vLLM's AMX attention relies on oneDNN to have asked. oneDNN asks in its first bfloat16 GEMM, and a small model
    attends before that (0.32, run). The permission is for the whole process; asking twice does no harm.

    Raises:
        AdrenalineError: the kernel refuses.
    """
    if torch.cpu._is_amx_tile_supported() and not torch.cpu._init_amx():
        raise AdrenalineError("this processor has AMX, but the kernel grants its tiles to no process: see prctl(2)")
