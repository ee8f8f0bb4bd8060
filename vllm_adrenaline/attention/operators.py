"""vLLM's CPU attention operators as we call them: causal, without window, ALiBi slopes, soft cap or sinks.

Checked against vllm/_custom_ops.py and vllm/v1/attention/backends/cpu_attn.py of 0.32 (run) and 0.33 (read).
"""

from __future__ import annotations

import torch
from vllm import _custom_ops as ops

from vllm_adrenaline.compat.cpu_attention import scratch_lock

append = ops.cpu_attn_reshape_and_cache
"""append(key, value, key cache, value cache, slot_mapping, isa): writes a step's k and v into a layer's KV cache."""


def schedule(
    num_heads: int, keys: torch.Tensor, query_start_loc: torch.Tensor, seq_lens: torch.Tensor, isa: str, split_kv: bool
) -> torch.Tensor:
    """Return how the operator divides a step's work: its scheduler metadata, which all layers share.

    Args:
        num_heads: query heads.
        keys: of any layer, [blocks, KV heads, block size, head size].
        query_start_loc: int32 [R + 1].
        seq_lens: int32 [R], tokens.
        isa: vLLM's name of the cache's layout.
        split_kv: whether the operator may cut long rows.
    """
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
    step: dict[str, torch.Tensor], keys: torch.Tensor, values: torch.Tensor, scale: float, metadata: torch.Tensor
) -> None:
    """Attend q of `step` over one layer; the output goes to step["out"].

    Args:
        step: tensors by name, as for CpuAttention.layer; k, v and slot_mapping are not read.
        keys, values: [blocks, KV heads, block size, head size].
        scale: of the softmax.
        metadata: what `schedule` returned for this step.
    """
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
            scheduler_metadata=metadata,
            s_aux=None,
        )
