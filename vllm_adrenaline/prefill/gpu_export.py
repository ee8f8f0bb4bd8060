"""How a prefill worker's KV cache in GPU memory is read: what its attention executor is told.

vLLM's layers have views [blocks, KV heads, block size, 2 * head size] of one allocation, keys before values in the last
axis; FlashAttention, FlashInfer and Triton attention read them so (vllm/v1/worker/utils.py, allocate_kv_cache; 0.32 and
0.33, read).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vllm_adrenaline.control.kv_export import GpuKVExport, GpuLayerSpec
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.kv.sharing import GpuKVCache
from vllm_adrenaline.native.cuda import HEAD_SIZES


def describe(
    shared: GpuKVCache,
    caches: Mapping[str, torch.Tensor],
    layers: Mapping[str, Any],
    message: torch.dtype,
    device: int,
    cpus: Sequence[int],
) -> GpuKVExport:
    """Return how the KV cache is read.

    Args:
        shared: the allocation.
        caches: each layer's view, by name, in the order of the layers' numbers.
        layers: vLLM's attention layers, by name; each has `impl`, and scales of the cache if it is fp8.
        message: the type of q, k and v.
        device: the number of the GPU.
        cpus: cores that the worker may use.

    Raises:
        AdrenalineError: the kernels cannot read such a cache, or the layers' attention is of a kind they do not have.
    """
    first = next(iter(caches.values()))
    if first.dim() != 4 or first.shape[3] // 2 not in HEAD_SIZES or first.shape[2] % 16 or first.stride(3) != 1:
        raise AdrenalineError(f"executors on a GPU cannot read a KV cache of views {tuple(first.shape)}")
    blocks, heads, block_size, double = first.shape
    head_size = double // 2
    specs = []
    for name, cache in caches.items():
        layer = layers[name]
        impl = layer.impl
        if cache.shape != first.shape or cache.stride() != first.stride():
            raise AdrenalineError(f"the KV cache of {name} lies otherwise than that of other layers: not supported yet")
        if impl.alibi_slopes is not None or getattr(impl, "sinks", None) is not None:
            raise AdrenalineError(f"{name} uses ALiBi or sinks: not supported yet")
        begin = shared.offset(cache)
        specs.append(
            GpuLayerSpec(
                name,
                0,
                begin,
                begin + head_size * cache.itemsize,
                impl.scale,
                soft_cap=float(impl.logits_soft_cap or 0.0),
                window=_window(impl.sliding_window),
                k_scale=_scale(layer, "_k_scale_float", cache.dtype),
                v_scale=_scale(layer, "_v_scale_float", cache.dtype),
            )
        )
    return GpuKVExport(
        device=device,
        memories=[shared.handle],
        shape=[blocks, block_size, heads, head_size],
        strides=[first.stride(0), first.stride(2), first.stride(1), 1],
        dtype=str(first.dtype).removeprefix("torch."),
        message=str(message).removeprefix("torch."),
        num_heads=next(iter(layers.values())).impl.num_heads,
        layers=specs,
        cpus=list(cpus),
        threads=1,
    )


def _window(window: Any) -> int:
    """Return how many tokens a token attends, itself included; 0: all. vLLM has one less, or a pair of that and 0."""
    left = window[0] if isinstance(window, tuple) else window
    return 0 if left is None or left < 0 else int(left) + 1


def _scale(layer: Any, name: str, dtype: torch.dtype) -> float:
    """Return a scale of a layer's cache; 1 where it has none."""
    return float(getattr(layer, name, 1.0)) if dtype.itemsize == 1 else 1.0
