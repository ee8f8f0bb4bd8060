"""The decode engine's worker on CPU: vLLM's CPU worker with our attention backend and links to the attention executors.

Checked against vllm/v1/worker/cpu_worker.py of 0.32 (run) and 0.33 (read).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_adrenaline.compat import weight_memory
from vllm_adrenaline.compat.cpu_attention import allow_amx
from vllm_adrenaline.compat.worker_cores import settle_worker
from vllm_adrenaline.config import Options
from vllm_adrenaline.decode import backend, profiling, remote_attention, shared_weights
from vllm_adrenaline.decode.mapped_memory import MappedMemory
from vllm_adrenaline.decode.worker_base import OffloadingWorker
from vllm_adrenaline.placement.patience import Patience
from vllm_adrenaline.system.priority import come_first
from vllm_adrenaline.transport.steps import Steps
from vllm_adrenaline.weights.regions import Region, regions_of

if TYPE_CHECKING:
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from vllm_adrenaline.decode.connector import DecodeConnector


class DecodeWorker(OffloadingWorker, CPUWorker):
    """vLLM's CPU worker whose attention runs partly in attention executors, or over memory of prefill engines."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        settle_worker()
        allow_amx()
        # CPU_ATTN itself is overridden: vLLM's CPU platform takes no other backend (vllm/platforms/cpu.py).
        backend.override("CPU_ATTN")
        super().__init__(*args, **kwargs)
        self._weights: list[Region] = []

    def load_model(self, **kwargs: Any) -> None:
        """Load the model, and note where its weights are if they are to be shared."""
        if not Options.of(self.vllm_config).shares_weights:
            super().load_model(**kwargs)
            return
        with weight_memory.followed() as locate:
            super().load_model(**kwargs)
        self._weights = regions_of(self.model_runner.get_model(), locate)

    def determine_available_memory(self) -> int:
        """Return the bytes for our own KV cache.

        With --adrenaline-pool mapped they are enough for one longest request: some must leave their prefill engine. All
        other memory is for the prefill engine to use.
        """
        found = int(super().determine_available_memory())
        if Options.of(self.vllm_config).uses_executors or self.cache_config.kv_cache_memory_bytes is not None:
            return found
        specs = self.model_runner.get_kv_cache_spec().values()
        # A block more than the longest request fills: vLLM keeps one for itself.
        enough = sum(spec.max_memory_usage_bytes(self.vllm_config) + spec.page_size_bytes for spec in specs)
        return min(found, enough)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        settle_worker()
        come_first()
        options, config = Options.of(self.vllm_config), self.vllm_config
        width = self.model_runner.input_batch.block_table[0].max_num_blocks_per_req
        attached = self.attach(kv_cache_config, width)
        connector: DecodeConnector = get_kv_transfer_group()
        caches = {name: connector.connector_worker.kv_caches[name] for name in attached.layers}
        mapped = None
        if options.maps:
            mapped = MappedMemory(options.peer_addresses, attached.identity, self.rank)
            shared = connector.shared_kv
            assert shared is not None, "vLLM has allocated the KV cache"
            mapped.open(caches, shared.fd, [shared.offset(cache) for cache in caches.values()], attached.deadline)
            caches = mapped.caches
        if options.shares_weights:
            shared_weights.share(self._weights, options, attached.identity, self.rank)
            self._weights = []
        remote = remote_attention.RemoteAttention(
            attached.links,
            Steps(attached.shape),
            mapped,
            attached.layers,
            config.cache_config.block_size,
            counts_rows=self.rank == 0,
            patience=Patience(options.executor_timeout),
        )
        self.begin_to_offload(remote)
        for name, cache in caches.items():
            layer: Attention = config.compilation_config.static_forward_context[name]
            layer.bind_kv_cache(cache)
            impl: backend.OffloadingLayer = layer.impl
            impl.open(layer, cache)  # now, not in the first request's first step

    def compile_or_warm_up_model(self) -> Any:
        """Measure, then warm up. In this order, for vLLM ends its warm-up with a fresh random seed."""
        if self.remote is not None:
            profiling.measure(self.vllm_config, Options.of(self.vllm_config), self.model_runner, self.remote)
        return super().compile_or_warm_up_model()
