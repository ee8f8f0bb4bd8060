"""vLLM's CPU attention operators, with what is the same in all our calls: causal, and no window, slopes, cap or sinks.

Checked against vllm/_custom_ops.py and vllm/v1/attention/backends/cpu_attn.py of 0.32 (run) and 0.33 (read).
"""

from __future__ import annotations

import torch
from vllm import _custom_ops as ops

from vllm_adrenaline.compat.cpu_attention import scratch_lock

append = ops.cpu_attn_reshape_and_cache


def schedule(
    num_heads: int, keys: torch.Tensor, query_start_loc: torch.Tensor, seq_lens: torch.Tensor, isa: str, split_kv: bool
) -> torch.Tensor:
    """Return the schedule of a step over KV caches like `keys` [blocks, KV heads, block size, head size]."""
    with scratch_lock:
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
    with scratch_lock:
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
