"""vLLM's NixlConnector, wrapped: NIXL moves the KV of local requests, offloaded requests go past it.

One class for both engines, scheduler and worker side. On the prefill engine it offers finished prompts to the lender
and allocates the KV cache in shared memory; on the decode engine it asks `offload` first. Checked against
vllm/distributed/kv_transfer/kv_connector/v1/nixl of 0.32 (run) and 0.33 (read).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlPullConnector
from vllm.v1.request import RequestStatus

from vllm_adrenaline.compat.nixl_progress import pause_progress_thread
from vllm_adrenaline.compat.side_channel import SideChannel
from vllm_adrenaline.config import Options
from vllm_adrenaline.control.messages import MAX_NAME
from vllm_adrenaline.engine.metrics import AdrenalinePromMetrics, AdrenalineStats
from vllm_adrenaline.kv.prompt_hash import prompt_hash
from vllm_adrenaline.kv.stamp import stamped
from vllm_adrenaline.prefill.leases import LeaseManager, Offer

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from vllm_adrenaline.colocation.tuner import ShareTuner
    from vllm_adrenaline.decode.remote_attention import RemoteAttention
    from vllm_adrenaline.decode.request_table import Offload


class AdrenalineConnector(NixlPullConnector):
    """See the module. `lender`, `keeper`, `offload` and `remote` are set by what the role brings."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        pause_progress_thread()
        super().__init__(vllm_config, role, kv_cache_config)
        self.is_prefill = Options.of(vllm_config).role == "prefill"
        self.leases: LeaseManager | None = None
        self.tuner: ShareTuner | None = None
        self.offload: Offload | None = None
        self.remote: RemoteAttention | None = None
        self.shared_kv: Any = None
        self.side_channel: SideChannel | None = None
        if self.connector_scheduler is not None:
            self.side_channel = SideChannel(self.connector_scheduler.side_channel_host)
            self.connector_scheduler.side_channel_port = self.side_channel.port
        self.kv_caches: dict[str, torch.Tensor] = {}
        self._block_pool: Any = None

    # Scheduler side, both engines

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Any]) -> None:
        assert self.side_channel is not None
        self.side_channel.serve({rank: msgspec.msgpack.encode(each) for rank, each in metadata.items()})

    def shutdown(self) -> None:
        if self.side_channel is not None:
            self.side_channel.stop()
        super().shutdown()

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        super().bind_gpu_block_pool(gpu_block_pool)
        self._block_pool = gpu_block_pool

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        if self.offload is not None:
            self.offload.finished(request.request_id)
            if request.status in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED):
                self.offload.placer.lengths.ended(request.num_output_tokens)
        delay, params = super().request_finished_all_groups(request, block_ids)
        if delay and self.tuner is not None:
            self.tuner.prefilled(time.time() - request.arrival_time)
        if delay and self.leases is not None:
            blocks = [self._block_pool.blocks[index] for index in block_ids[0]]
            digest = prompt_hash(request.all_token_ids[: request.num_prompt_tokens])
            self.leases.offer(request.request_id, Offer(blocks, request.num_prompt_tokens, digest))
            params = stamped(params, digest, request.num_prompt_tokens)
        return delay, params

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        super().update_connector_output(connector_output)
        if self.leases is not None:
            self.leases.withdraw(connector_output.finished_sending or ())
        if self.offload is not None:
            self.offload.observe(connector_output)

    # Scheduler side, decode engine

    def on_new_request(self, request: Request) -> None:
        params = request.kv_transfer_params
        if self.is_prefill and params:
            # Whatever else a client asks of NIXL here (to read from some host, say) is not ours to do. A prompt whose
            # name is too long for a control message could not be claimed: it is not kept.
            keep = params.get("do_remote_decode") is True and len(request.request_id) <= MAX_NAME
            request.kv_transfer_params = {"do_remote_decode": True} if keep else None
        elif self.offload is not None:
            self.offload.arrived(request)
        super().on_new_request(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        if (
            self.offload is not None
            and (answer := self.offload.matched_tokens(request, num_computed_tokens)) is not None
        ):
            return answer
        return super().get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        if self.offload is not None:
            self.offload.allocated(request, num_external_tokens)
        super().update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Any:
        meta = super().build_connector_meta(scheduler_output)
        # Attributes, not a subclass: NIXL makes this object itself and checks its type.
        meta.received = self.offload.take_received(scheduler_output) if self.offload is not None else frozenset()
        meta.let_go = self.leases.take_let_go() if self.leases is not None else frozenset()
        return meta

    # Worker side

    def get_mem_pool_context(self) -> Any:
        if not self.is_prefill:
            return super().get_mem_pool_context()
        from vllm_adrenaline.kv.sharing import SharedKVCache

        self.shared_kv = SharedKVCache()
        return self.shared_kv

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self.kv_caches = kv_caches
        super().register_kv_caches(kv_caches)

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """NIXL's own hold ends on a prompt that is claimed (its claim holds it) and on one that is dropped. No message
        and no handshake is needed."""
        results = super().get_transfer_results(finished_req_ids)
        worker = self.connector_worker
        for request_id in self._connector_metadata.let_go:
            if worker._reqs_to_send.pop(request_id, None) is not None:
                worker._reqs_to_process.discard(request_id)
                results.finished_sending.add(request_id)
        return results

    def build_connector_worker_meta(self) -> Any:
        return self.remote.take_report() if self.remote is not None else super().build_connector_worker_meta()

    # Metrics

    def get_kv_connector_stats(self) -> AdrenalineStats | None:
        ours = self.offload or self.remote
        nixl = super().get_kv_connector_stats()
        counts = ours.take_counts() if ours is not None else {}
        gauges = self.offload.gauges() if self.offload is not None else {}
        if self.tuner is not None:
            gauges["executor_share"] = self.tuner.share
        return AdrenalineStats.merged(nixl, counts, gauges)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> AdrenalineStats:
        return AdrenalineStats(data=data) if data is not None else AdrenalineStats()

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> AdrenalinePromMetrics:
        return AdrenalinePromMetrics(*args)
