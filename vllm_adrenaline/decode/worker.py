"""The decode engine's worker: vLLM's CPU worker with our attention backend and links to the attention executors.

Checked against vllm/v1/worker/cpu_worker.py of 0.32 (run) and 0.33 (read).
"""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_adrenaline.compat import weight_memory
from vllm_adrenaline.compat.cpu_attention import allow_amx
from vllm_adrenaline.compat.sampling import without_generators
from vllm_adrenaline.compat.worker_cores import settle_worker
from vllm_adrenaline.config import Options
from vllm_adrenaline.control import sockets
from vllm_adrenaline.decode import backend, profiling, remote_attention, shared_weights
from vllm_adrenaline.decode.link import Link
from vllm_adrenaline.decode.mapped_memory import MappedMemory
from vllm_adrenaline.engine.identity import identity_of
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.placement.patience import Patience
from vllm_adrenaline.system.priority import come_first
from vllm_adrenaline.transport.shape import Shape
from vllm_adrenaline.transport.steps import Steps
from vllm_adrenaline.weights.regions import Region, regions_of

if TYPE_CHECKING:
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from vllm_adrenaline.decode.connector import DecodeConnector


class DecodeWorker(CPUWorker):
    """vLLM's CPU worker whose attention runs partly in attention executors, or over memory of prefill engines.

    Attributes:
        remote: its remote attention; None before it is attached to the executors, and has mapped what it maps.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        settle_worker()
        allow_amx()
        # CPU_ATTN itself is overridden: vLLM's CPU platform takes no other backend (vllm/platforms/cpu.py).
        backend.override("CPU_ATTN")
        super().__init__(*args, **kwargs)
        self.remote: remote_attention.RemoteAttention | None = None
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
        groups = kv_cache_config.kv_cache_groups
        if len(groups) != 1:
            raise AdrenalineError(f"the model has {len(groups)} KV cache groups; one is supported")
        options, config, model = Options.of(self.vllm_config), self.vllm_config, self.vllm_config.model_config
        sockets.use_keys(options.load_keys())
        layers = list(groups[0].layer_names)
        shape = Shape(
            max_rows=config.scheduler_config.max_num_seqs,
            max_tokens=config.scheduler_config.max_num_batched_tokens,
            max_blocks=self.model_runner.input_batch.block_table[0].max_num_blocks_per_req,
            num_heads=model.get_num_attention_heads(self.parallel_config),
            num_kv_heads=model.get_num_kv_heads(self.parallel_config),
            head_size=model.get_head_size(),
            dtype=model.dtype,
        )
        identity = identity_of(config)
        engine = config.kv_transfer_config.engine_id
        addresses = options.peer_addresses
        links = [
            Link(address, identity, engine, self.rank, layers, shape, options.executor_timeout, options.interface)
            for address in (addresses if options.uses_executors else [])
        ]
        deadline = time.monotonic() + max(options.connect_timeout, 1.0)
        for link in links:
            link.attach_until(deadline)
        connector: DecodeConnector = get_kv_transfer_group()
        caches = {name: connector.connector_worker.kv_caches[name] for name in layers}
        mapped = None
        if options.maps:
            mapped = MappedMemory(addresses, identity, self.rank)
            shared = connector.shared_kv
            assert shared is not None, "vLLM has allocated the KV cache"
            mapped.open(caches, shared.fd, [shared.offset(cache) for cache in caches.values()], deadline)
            caches = mapped.caches
        if options.shares_weights:
            shared_weights.share(self._weights, options, identity, self.rank)
            self._weights = []
        self.remote = remote_attention.RemoteAttention(
            links,
            Steps(shape),
            mapped,
            layers,
            config.cache_config.block_size,
            counts_rows=self.rank == 0,
            patience=Patience(options.executor_timeout),
        )
        remote_attention.activate(self.remote)
        connector.connector_worker.remote = self.remote
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

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        if self.remote is not None:
            meta = scheduler_output.kv_connector_metadata
            self.remote.begin_step(meta.received, meta.members, self.model_runner.input_batch.req_id_to_index)
        return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        failed: Collection[int] = ()
        # Without generators no rank asks: a step costs nothing for it then.
        if self.remote is not None and self.model_runner.input_batch.generators:
            failed = self.remote.agree_on_failed_rows(get_tp_group())
        with without_generators(self.model_runner, failed):
            return super().sample_tokens(grammar_output)

    def shutdown(self) -> None:
        if self.remote is not None:
            remote_attention.activate(None)
            self.remote.close()
        super().shutdown()
