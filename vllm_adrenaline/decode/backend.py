"""The decode engine's attention backend: vLLM's CPU backend, with the offloaded rows attended elsewhere meanwhile.

Per layer: send the offloaded rows, run the stock kernel on the local rows, take the executors' output. Checked against
vllm/v1/attention/backends/cpu_attn.py of 0.32 (run) and 0.33 (read).
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_adrenaline.decode import remote

QUALNAME = "vllm_adrenaline.decode.backend.AdrenalineCPUBackend"


class AdrenalineCPUBackend(CPUAttentionBackend):
    """Keeps the stock name: NIXL compares the names of both engines' backends."""

    @staticmethod
    def get_impl_cls() -> type[AdrenalineImpl]:
        return AdrenalineImpl

    @staticmethod
    def get_builder_cls() -> type[AdrenalineBuilder]:
        return AdrenalineBuilder


class AdrenalineBuilder(CPUAttentionMetadataBuilder):
    """Masks remote rows and hangs the step plan on the metadata that all layers of a step share."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        site = remote.active()
        plan = None
        if site is not None:
            common_attn_metadata, plan = site.split(common_attn_metadata)
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.remote_plan = plan
        return metadata


class AdrenalineImpl(CPUAttentionBackendImpl):
    """One attention layer."""

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        plan = attn_metadata.remote_plan if attn_metadata is not None else None
        if plan is None:
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output)
        index = plan.layer_index[layer.layer_name]
        plan.send(index, query, key, value)
        if plan.has_local:
            super().forward(layer, query, key, value, kv_cache, attn_metadata, output)
        plan.receive(index, output)
        return output
