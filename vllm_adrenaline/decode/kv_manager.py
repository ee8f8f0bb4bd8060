"""The KV cache manager of a decode engine. It gives remote blocks to an offloaded request.

Checked against vllm/v1/core/single_type_kv_cache_manager.py of 0.32 (run) and 0.33 (read).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

    from vllm_adrenaline.decode.request_table import RequestTable


class KVSpaceManager(FullAttentionManager):
    """vLLM's manager of full-attention KV blocks. An offloaded request gets none of them: all of its blocks are remote.

    Attributes:
        table: knows which requests are offloaded, and has their blocks. The scheduler sets it.
    """

    table: RequestTable

    def _is_offloaded(self, request_id: str) -> bool:
        return self.table.is_offloaded(request_id)

    def get_num_blocks_to_allocate(self, request_id: str, *args: Any, **kwargs: Any) -> int:
        if self._is_offloaded(request_id):
            return 0
        return super().get_num_blocks_to_allocate(request_id, *args, **kwargs)

    def add_local_computed_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> None:
        if not self._is_offloaded(request_id):
            super().add_local_computed_blocks(request_id, *args, **kwargs)

    def allocate_external_computed_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> None:
        if not self._is_offloaded(request_id):
            super().allocate_external_computed_blocks(request_id, *args, **kwargs)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        if not self._is_offloaded(request_id):
            return super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        blocks = self.req_to_blocks[request_id]
        new = self.table.blocks_for(request_id, len(blocks), cdiv(num_tokens, self.block_size))
        blocks.extend(new)
        # vLLM takes a request that is in here for a running one, which has no prefix to look up.
        self.num_cached_block.setdefault(request_id, 0)
        return new

    def cache_blocks(self, request: Request, *args: Any, **kwargs: Any) -> None:
        if not self._is_offloaded(request.request_id):
            super().cache_blocks(request, *args, **kwargs)
