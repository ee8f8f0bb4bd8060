"""vLLM's CPU backend. Checked against vllm/v1/attention/backends/cpu_attn.py of 0.32 (run) and 0.33 (read)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from vllm_adrenaline.attention import native_decode
from vllm_adrenaline.decode.backend import OffloadingBackend, OffloadingBuilder, OffloadingLayer

if TYPE_CHECKING:
    from vllm.model_executor.layers.attention import Attention


class AdrenalineCPUBackend(OffloadingBackend, CPUAttentionBackend):
    """vLLM's CPU backend, which does not know of offloaded rows."""

    @staticmethod
    def get_impl_cls() -> type[AdrenalineCPULayer]:
        return AdrenalineCPULayer

    @staticmethod
    def get_builder_cls() -> type[AdrenalineCPUBuilder]:
        return AdrenalineCPUBuilder


class AdrenalineCPUBuilder(OffloadingBuilder, CPUAttentionMetadataBuilder):
    """Its builder."""


class AdrenalineCPULayer(OffloadingLayer, CPUAttentionBackendImpl):
    """One layer of it."""

    def open(self, layer: Attention, kv_cache: torch.Tensor) -> None:
        """Take this layer's KV cache, and find out whether it can be attended natively.

        Args:
            layer: vLLM's attention layer.
            kv_cache: its KV cache as vLLM keeps it, [blocks, KV heads, block size, 2 * head size].

        The first time in a process this takes a moment.
        """
        super().open(layer, kv_cache)
        self._longest = 0
        blocks, heads, block_size, double = kv_cache.shape
        keys, values = kv_cache.view(blocks, heads, 2 * block_size, double // 2).chunk(2, dim=2)
        is_plain = self.alibi_slopes is None and self.sinks is None and not self.logits_soft_cap
        if is_plain and self.sliding_window == -1 and self.attn_type == AttentionType.DECODER:
            self._longest = native_decode.longest_row(self.num_heads, keys, layer.isa)
        if self._longest:
            self._native = native_decode.open_cache(keys, values, self.num_heads, self.scale)
