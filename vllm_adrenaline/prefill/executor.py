"""The prefill engine's executor in vLLM's sense: vLLM's own, with an attention executor process beside each worker.

Runs in the engine core process. Checked against vllm/v1/executor/multiproc_executor.py of 0.32 (run) and 0.33 (read).
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import msgspec
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from vllm_adrenaline.attention.spec import ExecutorSpec
from vllm_adrenaline.config import Options
from vllm_adrenaline.control import addresses, sockets
from vllm_adrenaline.control.kv_export import GpuKVExport, KVExport
from vllm_adrenaline.control.messages import WorkerExport, offer_of
from vllm_adrenaline.engine.identity import identity_of
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.prefill import executor_pool
from vllm_adrenaline.prefill.executor_pool import ExecutorPool
from vllm_adrenaline.system import descriptors, priority
from vllm_adrenaline.system.cores import parse

logger = logging.getLogger("vllm.adrenaline")


def _cores_of(export: KVExport | GpuKVExport, share: float) -> list[int]:
    """Return an executor's cores: its share of those of its prefill worker. On a GPU the share is not one of cores."""
    if not isinstance(export, KVExport):
        return export.cpus
    return export.cpus[-priority.threads_of(share, len(export.cpus)) :]


def _threads_of(export: KVExport | GpuKVExport, options: Options, cores: int) -> int:
    """Return how many threads an executor has on so many cores. On a GPU it needs one, which launches."""
    if not isinstance(export, KVExport):
        return 1
    return options.executor_threads or (cores if options.executor_cores else min(cores, export.threads))


class PrefillExecutor(MultiprocExecutor):
    """vLLM's multi-process executor, which starts attention executors once the workers have allocated KV caches."""

    def initialize_from_config(self, kv_cache_configs: list[Any]) -> None:
        super().initialize_from_config(kv_cache_configs)
        options = Options.of(self.vllm_config)
        sockets.use_keys(options.load_keys())
        identity = identity_of(self.vllm_config)
        passing = descriptors.Server(addresses.for_descriptors(options.listen_address))
        passing.start()
        told = [msgspec.msgpack.decode(each, type=WorkerExport) for each in self.collective_rpc("export_memory")]
        exports, weights = [each.kv for each in told], [each.weights for each in told]
        for rank, each in enumerate(told):
            # Its process; the memory files of the KV cache, which is none in GPU memory, and of the weights.
            count = 1 + isinstance(each.kv, KVExport) + (each.weights is not None)
            passing.offers[offer_of(rank)] = passing.take(each.descriptors, count)
        cores = parse(options.executor_cores) or [_cores_of(export, options.executor_share) for export in exports]
        specs = [
            ExecutorSpec(
                rank=rank,
                address=addresses.sibling(options.listen_address, f"executor{rank}"),
                identity=identity,
                kv=export,
                kv_file=passing.offers[offer_of(rank)][1] if isinstance(export, KVExport) else -1,
                cpus=cores[rank],
                threads=_threads_of(export, options, len(cores[rank])),
                idle_timeout=options.lease_seconds,
                share=options.executor_share,
                key=options.key,
                allow=options.allow,
                interface=options.interface,
            )
            for rank, export in enumerate(exports)
            if options.uses_executors
        ]
        logger.info("starting %d attention executor(s)", len(specs))
        mappable = [kv for kv in exports if isinstance(kv, KVExport)]
        executor_pool.activate(ExecutorPool(specs, mappable, weights, passing))

    def shutdown(self) -> None:
        with contextlib.suppress(AdrenalineError):  # the workers ended before there were any executors
            executor_pool.active().stop()  # it stays the active one: the control thread serves for a moment more
        super().shutdown()
