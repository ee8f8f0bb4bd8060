"""vLLM's NixlConnector as both roles use it: NIXL moves KV, the side channel is ours, and our counters go along.

As in vLLM's own connector, the scheduler side and the worker side are separate classes. Each process makes one of them.
What a role adds to them is in prefill/connector.py and decode/connector.py. Checked against
vllm/distributed/kv_transfer/kv_connector/v1/nixl of 0.32 (run) and 0.33 (read).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlBaseConnector
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker

from vllm_adrenaline.compat.nixl_progress import pause_progress_thread
from vllm_adrenaline.compat.side_channel import SideChannel
from vllm_adrenaline.config import Options
from vllm_adrenaline.engine.metrics import AdrenalinePromMetrics, AdrenalineStats
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.kv.sharing import GpuKVCache, SharedKVCache
from vllm_adrenaline.system.nvml import Gpu

logger = logging.getLogger("vllm.adrenaline")


class Reporting:
    """A side of a connector that reports metrics; nothing, unless a role says otherwise."""

    def take_counts(self) -> Mapping[str, float]:
        """Return what was counted since the last call, by the names of COUNTERS (engine/metrics.py)."""
        return {}

    def gauges(self) -> Mapping[str, float]:
        """Return what is true at present, by the names of GAUGES and GPU_GAUGES (engine/metrics.py)."""
        return {}


class SchedulerSide(Reporting, NixlPullConnectorScheduler):
    """The part of a connector that lives in the engine core, beside the scheduler.

    Attributes:
        side_channel: where other engines ask how this one's memory is read.
    """

    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        self.side_channel = SideChannel(self.side_channel_host)
        self.side_channel_port = self.side_channel.port

    def set_xfer_handshake_metadata(self, metadata: Mapping[tuple[int, int], Any]) -> None:
        self.side_channel.serve({rank: msgspec.msgpack.encode(each) for rank, each in metadata.items()})

    def shutdown(self) -> None:
        self.side_channel.stop()
        super().shutdown()


def _own_gpu() -> Gpu | None:
    """Return this process's GPU as NVML knows it. If that cannot be had, log it: an engine runs without figures."""
    try:
        return Gpu(str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid))
    except AdrenalineError as error:
        logger.warning("nothing of this worker's GPU is in the metrics: %s", error)
        return None


class WorkerSide(Reporting, NixlPullConnectorWorker):
    """The part of a connector that lives in a worker. On CUDA it reports its GPU: no other process knows which it is.

    Attributes:
        kv_caches: each layer's KV cache, by the layer's name; empty until vLLM has allocated them.
    """

    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        self.kv_caches: dict[str, torch.Tensor] = {}
        self._gpu = _own_gpu() if Options.of(vllm_config).experimental_cuda else None

    def gauges(self) -> Mapping[str, float]:
        gpu = self._gpu
        return {} if gpu is None else {f"gpu_{figure}/{gpu.name}": value for figure, value in gpu.read().items()}

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self.kv_caches = kv_caches
        super().register_kv_caches(kv_caches)


class AdrenalineConnector(NixlBaseConnector):
    """The connector that vLLM makes in each process. One of its two sides answers, as in NixlBaseConnector.

    Attributes:
        scheduler_side, worker_side: the classes of the two sides, which each role sets.
        shares_kv: whether the worker's KV cache is to lie where other processes can have it.
        shared_kv, gpu_kv: the memory file, or on CUDA the GPU memory, in a worker; None before vLLM has allocated it,
            and for the other one.
    """

    scheduler_side: type[SchedulerSide]
    worker_side: type[WorkerSide]
    shares_kv: bool = True
    shared_kv: SharedKVCache | None = None
    gpu_kv: GpuKVCache | None = None
    connector_scheduler: SchedulerSide  # vLLM's names of the two; None in the processes of the other one
    connector_worker: WorkerSide

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        pause_progress_thread()
        super().__init__(vllm_config, role, kv_cache_config)
        if role is KVConnectorRole.SCHEDULER:
            self.connector_scheduler = self.scheduler_side(vllm_config, self.engine_id, kv_cache_config)
        else:
            self.connector_worker = self.worker_side(vllm_config, self.engine_id, kv_cache_config)

    def get_mem_pool_context(self) -> SharedKVCache | GpuKVCache | None:
        if not self.shares_kv:
            return None
        if Options.of(self._vllm_config).experimental_cuda:
            self.gpu_kv = GpuKVCache()
            return self.gpu_kv
        self.shared_kv = SharedKVCache()
        return self.shared_kv

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self.connector_worker.start_load_kv(self._connector_metadata)

    def get_kv_connector_stats(self) -> AdrenalineStats | None:
        side: Reporting = self.connector_scheduler or self.connector_worker
        return AdrenalineStats.merged(super().get_kv_connector_stats(), side.take_counts(), side.gauges())

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> AdrenalineStats:
        return AdrenalineStats(data=data) if data is not None else AdrenalineStats()

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> AdrenalinePromMetrics:
        return AdrenalinePromMetrics(*args)
