"""An engine's identity: what must be equal on two engines that work together, read from vLLM's configuration.

Checked against vllm/v1/attention/backends/cpu_attn.py and vllm/config of 0.32 (run) and 0.33 (read).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_adrenaline.compat import versions
from vllm_adrenaline.control.messages import PROTOCOL, Identity

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def identity_of(vllm_config: VllmConfig) -> Identity:
    """Return the identity of the engine that has this configuration. Raises AdrenalineError for an unchecked vLLM."""
    import torch
    from vllm import envs
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    model, parallel, cache = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config
    head_size = model.get_head_size()
    isa = _get_attn_isa(model.dtype, cache.block_size, head_size, cache.cache_dtype)
    return Identity(
        protocol=PROTOCOL,
        vllm=versions.check_vllm(versions.installed_vllm()),
        model=f"{model.model}@{model.revision or 'default'}",
        architecture=",".join(model.architectures),
        dtype=str(model.dtype).removeprefix("torch."),
        kv_cache_dtype=str(cache.cache_dtype),
        num_layers=model.get_num_layers(parallel),
        num_heads=model.get_num_attention_heads(parallel),
        num_kv_heads=model.get_num_kv_heads(parallel),
        head_size=head_size,
        block_size=cache.block_size,
        kv_layout="LBHNC",
        isa=f"{isa}/{torch.backends.cpu.get_cpu_capability()}",
        split_kv=bool(envs.VLLM_CPU_ATTN_SPLIT_KV),
        tensor_parallel_size=parallel.tensor_parallel_size,
    )
