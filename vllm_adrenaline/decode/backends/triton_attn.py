"""vLLM's Triton kernels. Read in vllm/v1/attention/backends/triton_attn.py of 0.32 and 0.33; never run on a GPU."""

from __future__ import annotations

from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from vllm_adrenaline.decode.backend import OffloadingBackend, OffloadingBuilder, OffloadingLayer


class AdrenalineTritonBackend(OffloadingBackend, TritonAttentionBackend):
    """vLLM's Triton attention, which does not know of offloaded rows."""

    @staticmethod
    def get_impl_cls() -> type[AdrenalineTritonLayer]:
        return AdrenalineTritonLayer

    @staticmethod
    def get_builder_cls() -> type[AdrenalineTritonBuilder]:
        return AdrenalineTritonBuilder


class AdrenalineTritonBuilder(OffloadingBuilder, TritonAttentionMetadataBuilder):
    """Its builder."""


class AdrenalineTritonLayer(OffloadingLayer, TritonAttentionImpl):
    """One layer of it."""
