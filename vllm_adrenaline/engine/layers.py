"""The attention layers of a model, as both roles count them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_adrenaline.errors import AdrenalineError

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig


def layers_of(kv_cache_config: KVCacheConfig) -> list[str]:
    """Return the names of the layers that have a KV cache, in the order of their numbers.

    Raises:
        AdrenalineError: they are of several groups, as with windows or recurrent state.
    """
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise AdrenalineError(f"the model has {len(groups)} KV cache groups; one is supported")
    return list(groups[0].layer_names)
