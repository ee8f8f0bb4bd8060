"""The decode engine's attention backends: vLLM's own, while executors attend the offloaded rows.

In each layer they send the offloaded rows, attend the local ones, and take the executors' output. One wrapper does that
for every stock backend; `backends/` puts it around each. The stock backend attends the local rows. On CPU the native
library does, where it gives the same bits (attention/native_decode.py).

Checked against vllm/v1/attention/backend.py of 0.32 (run on CPU) and 0.33 (read). On a GPU nothing of it has run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_adrenaline.decode import remote_attention
from vllm_adrenaline.native.library import library

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import KVCacheSpec

OURS = {
    "CPU_ATTN": "vllm_adrenaline.decode.backends.cpu.AdrenalineCPUBackend",
    "FLASH_ATTN": "vllm_adrenaline.decode.backends.flash_attn.AdrenalineFlashAttentionBackend",
    "FLASHINFER": "vllm_adrenaline.decode.backends.flashinfer.AdrenalineFlashInferBackend",
    "TRITON_ATTN": "vllm_adrenaline.decode.backends.triton_attn.AdrenalineTritonBackend",
}
"""Our backends, by vLLM's name of the stock one. Each keeps that name: NIXL compares the names of both engines'."""


def override(*names: str) -> None:
    """Have vLLM take our backends for the stock ones of these names, in this process, from now on."""
    for name in names:
        register_backend(AttentionBackendEnum[name], OURS[name])


class OffloadingBackend:
    """What stands before a stock backend. Each of `backends/` adds its builder and its layer."""

    supports_kv_cache_update_bypass = False
    """A model may not leave out k and v because it has written them itself: executors need them (0.33)."""


class OffloadingBuilder:
    """What stands before a stock builder of a step's metadata, which all layers of the step share.

    It masks offloaded rows for the stock kernel, and adds two attributes. `remote_plan` is the step's StepPlan, None
    without offloaded rows. `decode_length` is the longest sequence (tokens) of a pure-decode step, else 0.
    """

    supports_update_block_table = False
    """Metadata is always built: another block table would be one with offloaded rows."""

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec) -> AttentionCGSupport:
        """Have attention run between the pieces of a graph. What is captured would send for one step's rows only."""
        return AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        remote = remote_attention.active()
        plan = None
        if remote is not None:
            common_attn_metadata, plan = remote.split(common_attn_metadata)
        metadata: Any = super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        metadata.remote_plan = plan
        # Longest sequence in a pure-decode step; 0 if the step contains prefill.
        metadata.decode_length = common_attn_metadata.max_seq_len if common_attn_metadata.max_query_len == 1 else 0
        return metadata


class OffloadingLayer:
    """What stands before a stock attention layer."""

    _kv_cache: torch.Tensor | None = None
    _native: Any = None  # the KV cache, for the native library
    _longest = 0  # row that it may attend

    def forward(
        self,
        layer: Attention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attn_metadata is None:  # vLLM warms up
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output)  # type: ignore[misc]
        plan = attn_metadata.remote_plan
        if plan is not None:
            index = plan.layer_index[layer.layer_name]
            plan.send(index, query, key, value)
        if plan is None or plan.has_local:
            if kv_cache is not self._kv_cache:
                self.open(layer, kv_cache)
            if 0 < attn_metadata.decode_length <= self._longest:
                table, lens = attn_metadata.block_table, attn_metadata.seq_lens
                library.attend(self._native, query, output, table, lens, attn_metadata.query_start_loc)
            else:
                super().forward(layer, query, key, value, kv_cache, attn_metadata, output)  # type: ignore[misc]
        if plan is not None:
            plan.receive(index, output)
        return output

    def open(self, layer: Attention, kv_cache: torch.Tensor) -> None:
        """Take this layer's KV cache, as vLLM keeps it."""
        self._kv_cache = kv_cache

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Have the output written as it is: executors' rows are not quantized."""
        return False

    def fused_rope_kvcache_supported(self) -> bool:
        """Have q, k and v computed before this layer, for executors need them."""
        return False
