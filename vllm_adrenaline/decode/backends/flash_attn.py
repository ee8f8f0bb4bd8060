"""FlashAttention. Read in vllm/v1/attention/backends/flash_attn.py of 0.32 and 0.33; never run on a GPU."""

from __future__ import annotations

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from vllm_adrenaline.decode.backend import OffloadingBackend, OffloadingBuilder, OffloadingLayer


class AdrenalineFlashAttentionBackend(OffloadingBackend, FlashAttentionBackend):
    """FlashAttention, which does not know of offloaded rows."""

    @staticmethod
    def get_impl_cls() -> type[AdrenalineFlashAttentionLayer]:
        return AdrenalineFlashAttentionLayer

    @staticmethod
    def get_builder_cls() -> type[AdrenalineFlashAttentionBuilder]:
        return AdrenalineFlashAttentionBuilder


class AdrenalineFlashAttentionBuilder(OffloadingBuilder, FlashAttentionMetadataBuilder):
    """Its builder."""


class AdrenalineFlashAttentionLayer(OffloadingLayer, FlashAttentionImpl):
    """One layer of it."""
