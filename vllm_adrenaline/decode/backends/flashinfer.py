"""FlashInfer. Read in vllm/v1/attention/backends/flashinfer.py of 0.32 and 0.33; never run on a GPU."""

from __future__ import annotations

from vllm.v1.attention.backends.flashinfer import FlashInferBackend, FlashInferImpl, FlashInferMetadataBuilder

from vllm_adrenaline.decode.backend import OffloadingBackend, OffloadingBuilder, OffloadingLayer


class AdrenalineFlashInferBackend(OffloadingBackend, FlashInferBackend):
    """FlashInfer, which does not know of offloaded rows."""

    @staticmethod
    def get_impl_cls() -> type[AdrenalineFlashInferLayer]:
        return AdrenalineFlashInferLayer

    @staticmethod
    def get_builder_cls() -> type[AdrenalineFlashInferBuilder]:
        return AdrenalineFlashInferBuilder


class AdrenalineFlashInferBuilder(OffloadingBuilder, FlashInferMetadataBuilder):
    """Its builder."""


class AdrenalineFlashInferLayer(OffloadingLayer, FlashInferImpl):
    """One layer of it."""
