"""An engine's identity: what must be equal on two engines that work together, read from vLLM's configuration.

Checked against vllm/v1/attention/backends/cpu_attn.py and vllm/config of 0.32 (run on CPU) and 0.33 (read).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_adrenaline.compat import versions
from vllm_adrenaline.config import Options
from vllm_adrenaline.control.messages import PROTOCOL, Identity

if TYPE_CHECKING:
    from vllm.config import VllmConfig


CUDA_LAYOUT = "as NIXL finds it"
"""The KV layout of an engine on CUDA. vLLM settles it once it has workers, and engines compare before. It need not be
equal for executors, which are told it (prefill/gpu_export.py), and NIXL compares it itself."""


def identity_of(vllm_config: VllmConfig) -> Identity:
    """Return the identity of the engine that has this configuration. Raises AdrenalineError for an unchecked vLLM."""
    model, parallel, cache = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config
    is_cuda = Options.of(vllm_config).experimental_cuda
    layout, isa, split_kv = (CUDA_LAYOUT, "cuda", False) if is_cuda else _of_cpu(vllm_config)
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
        head_size=model.get_head_size(),
        block_size=cache.block_size,
        kv_layout=layout,
        isa=isa,
        split_kv=split_kv,
        tensor_parallel_size=parallel.tensor_parallel_size,
    )


def _of_cpu(vllm_config: VllmConfig) -> tuple[str, str, bool]:
    """Return the KV layout of an engine on CPU, its instruction sets, and whether its attention cuts long rows."""
    import torch
    from vllm import envs
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    model, cache = vllm_config.model_config, vllm_config.cache_config
    isa = _get_attn_isa(model.dtype, cache.block_size, model.get_head_size(), cache.cache_dtype)
    return "LBHNC", f"{isa}/{torch.backends.cpu.get_cpu_capability()}", bool(envs.VLLM_CPU_ATTN_SPLIT_KV)
