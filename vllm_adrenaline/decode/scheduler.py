"""The decode engine's scheduler: vLLM's, with offloaded requests whose blocks live elsewhere.

An offloaded request is scheduled like any other; only its blocks come from another place. What is added: answers and
leases before each step, and the way back to local memory. Checked against vllm/v1/core/sched/scheduler.py of 0.32 (run)
and 0.33 (read).
"""

from __future__ import annotations

import logging
import time
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request, RequestStatus

from vllm_adrenaline.compat.engine_threads import come_first, wait_without_spinning
from vllm_adrenaline.config import Options
from vllm_adrenaline.control.client import PrefillClient
from vllm_adrenaline.decode import leases
from vllm_adrenaline.decode.blocks import KVSpaceManager
from vllm_adrenaline.decode.placer import Batch, Placer
from vllm_adrenaline.decode.remote_attention import Report
from vllm_adrenaline.decode.request_table import Offload
from vllm_adrenaline.engine import profiling
from vllm_adrenaline.engine.identity import identity_of
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.placement.policy import Reason

logger = logging.getLogger("vllm.adrenaline")


class DecodeScheduler(Scheduler):
    """See the module."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        wait_without_spinning()
        come_first()
        super().__init__(*args, **kwargs)
        options = Options.of(self.vllm_config)
        identity = identity_of(self.vllm_config)
        engine = self.vllm_config.kv_transfer_config.engine_id
        self.clients = [PrefillClient(address, identity, engine) for address in options.peer_addresses]
        for client in self.clients:
            client.start()
        self._wait_for_peers(options.connect_timeout)
        tensor_parallel_size = self.vllm_config.parallel_config.tensor_parallel_size
        blocks = self.kv_cache_manager.block_pool.num_gpu_blocks
        shares = [b.welcome.executor_share for b in self.clients if b.welcome is not None]
        costs = profiling.decode_costs(self.vllm_config, options, shares)
        placer = Placer(options, costs, blocks, self.block_size, self.max_num_running_reqs)
        self.offload = Offload(self.clients, placer, self.block_size, tensor_parallel_size)
        self.connector.offload = self.offload
        self._began, self._batch = 0.0, Batch()
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            if type(manager) is not FullAttentionManager:
                raise AdrenalineError(f"{type(manager).__name__} is not supported: full attention only")
            # Not through vLLM's spec registry: the spec stays the stock one, which NIXL and others look at.
            manager.__class__ = KVSpaceManager
            manager.offload = self.offload

    def _wait_for_peers(self, timeout_s: float) -> None:
        deadline = time.monotonic() + max(timeout_s, 1.0)
        while missing := [b.address for b in self.clients if b.welcome is None]:
            if time.monotonic() > deadline:
                raise AdrenalineError(f"no prefill engine answers at {', '.join(missing)}")
            time.sleep(0.01)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        offload = self.offload
        self._began = time.monotonic()
        lost = offload.poll()
        for request in lost.offloaded:
            self._move_to_local(request)
        for request in lost.pulled:
            self._recompute_pulled(request)
        self._place()
        if offload.any_offloaded:
            waiting, leaving = leases.reserve(offload.requests, offload.pools, self.running, self.block_size)
            for request in leaving:
                if self._blocks(request) > self._spare() or not self._pull(request, Reason.STARVED):
                    self._move_to_local(request)
            for request in waiting:
                # vLLM's own way to leave a running request out of one step (it counts the step up first).
                request.next_decode_eligible_step = self.current_step + 2
            # When local memory runs out vLLM preempts from the end: preempting an offloaded request would free none.
            self.running.sort(key=lambda request: not offload.is_offloaded(request.request_id))
        leases.adjust(offload.requests, offload.pools, self.block_size)
        offload.settle()
        output = super().schedule(*args, **kwargs)
        self._batch = offload.batch(self.running)
        return output

    def _spare(self) -> int:
        return int(self.kv_cache_manager.block_pool.get_num_free_blocks())

    def _blocks(self, request: Request) -> int:
        return -(-int(request.num_tokens) // self.block_size)

    def _place(self) -> None:
        """Decide about waiting requests, and whether a running one moves; once a step, before vLLM schedules."""
        offload, placer = self.offload, self.offload.placer
        looks_for_move = offload.any_offloaded and placer.is_time_to_move()
        if not looks_for_move and not offload.waiting:
            return
        free = self._spare()
        batch = offload.batch(self.running)
        if looks_for_move:
            observed = placer.observed(batch, free, offload.pools, offload.down)
            request = placer.move(observed, offload.movable())
            if request is not None and self._pull(request):
                free -= self._blocks(request)
        offload.place_waiting(batch, free, self.max_num_running_reqs)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        offload, output = self.offload, model_runner_output.kv_connector_output
        report = output.kv_connector_worker_meta if output is not None else None
        report = report if isinstance(report, Report) else None
        failed = report.failed if report is not None else frozenset()
        if report is not None and failed:
            offload.report_failures(report)
            for request in offload.of_executors(failed):
                if request.request_id in scheduler_output.num_scheduled_tokens:  # its token is worthless
                    row = model_runner_output.req_id_to_index[request.request_id]
                    model_runner_output.sampled_token_ids[row] = []
        if output is not None and (doubtful := offload.doubtful(output.finished_recving or ())):
            logger.warning("pulled KV of %d request(s) may have been reused: recomputing it here", len(doubtful))
            output.failed_recving = {*(output.failed_recving or ()), *doubtful}
        if not failed and (tokens := scheduler_output.total_num_scheduled_tokens):
            only_decodes = tokens == len(scheduler_output.num_scheduled_tokens)
            seconds = time.monotonic() - self._began if only_decodes else 0.0
            offload.observe_step(self._batch, report, seconds)
        result = super().update_from_output(scheduler_output, model_runner_output)
        for request in offload.of_executors(failed) if failed else ():
            self._move_to_local(request)
        offload.settle()
        return result

    def _recompute_pulled(self, request: Request) -> None:
        """What NIXL reads for the request, or has read, is not to be believed: vLLM's own way for a failed load, which
        keeps the blocks until NIXL is done with them (_handle_failed_recving)."""
        if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
            request.num_computed_tokens = 0
            self.failed_recving_kv_req_ids.add(request.request_id)

    def _pull(self, request: Request, reason: Reason | None = None) -> bool:
        """Let an offloaded request go on in local memory with its KV pulled there, if it can be; say whether."""
        offload = self.offload
        if request not in self.running or all(request is not other for other, _ in offload.movable()):
            return False
        # Out of vLLM's books, so that preempting frees none of them: they are what is pulled.
        manager = self.kv_cache_manager.coordinator.single_type_managers[0]
        blocks = manager.req_to_blocks.pop(request.request_id)
        manager.num_cached_block.pop(request.request_id, None)
        offload.begin_move(request, blocks)
        if reason is not None:
            offload.placer.moved(reason)
        self.running.remove(request)
        super()._preempt_request(request, time.monotonic(), drop_stale_output=True)
        if self.log_stats:
            request.events.pop()  # nothing is lost or recomputed: it is counted as a move, not as a preemption
        return True

    def _move_to_local(self, request: Request) -> None:
        """Let a request go on in local memory: its KV is recomputed here, as after any preemption."""
        if request.status == RequestStatus.RUNNING and request in self.running:
            self.running.remove(request)
            self._preempt_request(request, time.monotonic(), drop_stale_output=True)
        self.offload.to_local(request.request_id)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        self.offload.to_local(request.request_id)

    def has_requests(self) -> bool:
        return super().has_requests() or self.offload.unsettled

    def shutdown(self) -> None:
        for client in self.clients:
            client.stop()
        super().shutdown()
