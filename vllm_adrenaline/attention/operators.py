"""vLLM's CPU attention operators, with what is the same in all our calls: causal, and no window, slopes, cap or sinks.

Checked against vllm/_custom_ops.py and vllm/v1/attention/backends/cpu_attn.py of 0.32 (run) and 0.33 (read).
"""

from __future__ import annotations

import threading

import torch
from vllm import _custom_ops as ops

from vllm_adrenaline.errors import AdrenalineError

append = ops.cpu_attn_reshape_and_cache

_scratch = threading.Lock()
"""vLLM's operators have one scratch memory for the whole process (csrc/cpu/cpu_attn_impl.hpp, ScratchPadManager).

Making a schedule may move it and attending writes it, both with the interpreter's lock released, and an executor has a
thread for each decode engine: without this lock a quarter of the outputs were wrong (0.32, run). A schedule itself
stays good whatever others make meanwhile."""


def may_use_amx() -> None:
    """Ask the kernel for AMX tiles where the processor has them; before that, the first AMX instruction is a SIGILL.

    vLLM's AMX attention relies on oneDNN to have asked, which it does in its first bfloat16 GEMM: a small model attends
    before (0.32, run). For the whole process; once more does no harm. Raises AdrenalineError if the kernel refuses.
    """
    if torch.cpu._is_amx_tile_supported() and not torch.cpu._init_amx():
        raise AdrenalineError("this processor has AMX, but the kernel grants its tiles to no process: see prctl(2)")


def schedule(
    num_heads: int, keys: torch.Tensor, query_start_loc: torch.Tensor, seq_lens: torch.Tensor, isa: str, split_kv: bool
) -> torch.Tensor:
    """Return the schedule of a step over KV caches like `keys` [blocks, KV heads, block size, head size]."""
    with _scratch:
        return ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(seq_lens),
            num_heads=num_heads,
            num_kv_heads=keys.shape[1],
            head_dim=keys.shape[3],
            seq_lens=seq_lens,
            dtype=keys.dtype,
            query_start_loc=query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=split_kv,
        )


def attend(
    step: dict[str, torch.Tensor], keys: torch.Tensor, values: torch.Tensor, scale: float, made: torch.Tensor
) -> None:
    """Attend q of `step`; the result goes to step["out"]. `made`: the step's schedule."""
    with _scratch:
        ops.cpu_attention_with_kv_cache(
            query=step["q"],
            key_cache=keys,
            value_cache=values,
            output=step["out"],
            query_start_loc=step["query_start_loc"],
            seq_lens=step["seq_lens"],
            scale=scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=step["block_table"],
            softcap=0,
            scheduler_metadata=made,
            s_aux=None,
        )
