"""The decode engine's attention backend: vLLM's CPU backend, while executors attend the offloaded rows.

In each layer it sends the offloaded rows, attends the local ones, and takes the executors' output. vLLM's operator
attends the local rows, or with the same bits the native library (attention/native_decode.py). Checked against
vllm/v1/attention/backends/cpu_attn.py of 0.32 (run) and 0.33 (read).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from vllm_adrenaline.attention import native_decode
from vllm_adrenaline.decode import remote_attention

if TYPE_CHECKING:
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backend import CommonAttentionMetadata

QUALNAME = "vllm_adrenaline.decode.backend.AdrenalineCPUBackend"


class AdrenalineCPUBackend(CPUAttentionBackend):
    """vLLM's CPU backend with our builder and layers. It keeps its name: NIXL compares the names of both engines'."""

    @staticmethod
    def get_impl_cls() -> type[AdrenalineImpl]:
        return AdrenalineImpl

    @staticmethod
    def get_builder_cls() -> type[AdrenalineBuilder]:
        return AdrenalineBuilder


class AdrenalineBuilder(CPUAttentionMetadataBuilder):
    """The builder of a step's metadata, which all its layers share.

    It masks offloaded rows for the stock kernel, and adds two attributes. `remote_plan` is the step's StepPlan, None
    without offloaded rows. `decode_length` is the longest sequence (tokens) of a pure-decode step, else 0.
    """

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        remote = remote_attention.active()
        plan = None
        if remote is not None:
            common_attn_metadata, plan = remote.split(common_attn_metadata)
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.remote_plan = plan
        # Longest sequence in a pure-decode step; 0 if the step contains prefill.
        metadata.decode_length = common_attn_metadata.max_seq_len if common_attn_metadata.max_query_len == 1 else 0
        return metadata


class AdrenalineImpl(CPUAttentionBackendImpl):
    """One attention layer."""

    _kv_cache: torch.Tensor | None = None
    _native: Any = None
    _longest = 0

    def forward(
        self,
        layer: Attention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attn_metadata is None:  # vLLM warms up
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output)
        plan = attn_metadata.remote_plan
        if plan is not None:
            index = plan.layer_index[layer.layer_name]
            plan.send(index, query, key, value)
        if plan is None or plan.has_local:
            if kv_cache is not self._kv_cache:
                self.open(layer, kv_cache)
            if 0 < attn_metadata.decode_length <= self._longest:
                table, lens = attn_metadata.block_table, attn_metadata.seq_lens
                native_decode.attend(self._native, query, output, table, lens, attn_metadata.query_start_loc)
            else:
                super().forward(layer, query, key, value, kv_cache, attn_metadata, output)
        if plan is not None:
            plan.receive(index, output)
        return output

    def open(self, layer: Attention, kv_cache: torch.Tensor) -> None:
        """Take this layer's KV cache, and find out whether it can be attended natively.

        Args:
            layer: vLLM's attention layer.
            kv_cache: its KV cache as vLLM keeps it, [blocks, KV heads, block size, 2 * head size].

        The first time in a process this takes a moment.
        """
        self._kv_cache, self._longest = kv_cache, 0
        blocks, heads, block_size, double = kv_cache.shape
        keys, values = kv_cache.view(blocks, heads, 2 * block_size, double // 2).chunk(2, dim=2)
        is_plain = self.alibi_slopes is None and self.sinks is None and not self.logits_soft_cap
        if is_plain and self.sliding_window == -1 and self.attn_type == AttentionType.DECODER:
            self._longest = native_decode.longest_row(self.num_heads, keys, layer.isa)
        if self._longest:
            self._native = native_decode.open_cache(keys, values, self.num_heads, self.scale)
