"""The decode engine's scheduler: vLLM's, with offloaded requests whose blocks live elsewhere.

An offloaded request is scheduled like any other; only its blocks come from another place. What is added: answers and
leases before each step, and the way back to local memory. Checked against vllm/v1/core/sched/scheduler.py of 0.32 (run)
and 0.33 (read).
"""

from __future__ import annotations

import time
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request, RequestStatus

from vllm_adrenaline import identity
from vllm_adrenaline.config import Options
from vllm_adrenaline.cores import wait_without_yield
from vllm_adrenaline.decode.blocks import KVSpaceManager
from vllm_adrenaline.decode.borrower import Borrower
from vllm_adrenaline.decode.offload import Offload
from vllm_adrenaline.decode.remote import Report
from vllm_adrenaline.errors import AdrenalineError


class DecodeScheduler(Scheduler):
    """See the module."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        wait_without_yield()
        super().__init__(*args, **kwargs)
        options = Options.of(self.vllm_config)
        us = identity.of(self.vllm_config)
        self.borrowers = [Borrower(address, us) for address in options.peer_addresses]
        for borrower in self.borrowers:
            borrower.start()
        self._wait_for_peers(options.connect_timeout)
        tensor_parallel_size = self.vllm_config.parallel_config.tensor_parallel_size
        self.offload = Offload(self.borrowers, options.offload_ratio, self.block_size, tensor_parallel_size)
        self.connector.offload = self.offload
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            if type(manager) is not FullAttentionManager:
                raise AdrenalineError(f"{type(manager).__name__} is not supported: full attention only")
            # Not through vLLM's spec registry: the spec stays the stock one, which NIXL and others look at.
            manager.__class__ = KVSpaceManager
            manager.offload = self.offload

    def _wait_for_peers(self, timeout_s: float) -> None:
        deadline = time.monotonic() + max(timeout_s, 1.0)
        while missing := [b.address for b in self.borrowers if b.welcome is None]:
            if time.monotonic() > deadline:
                raise AdrenalineError(f"no prefill engine answers at {', '.join(missing)}")
            time.sleep(0.01)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        offload = self.offload
        for name in offload.poll():
            self._move_to_local(offload.requests[name].request)
        if offload.requests:
            waiting, leaving = offload.reserve_growth(self.running)
            for request in leaving:
                self._move_to_local(request)
            for request in waiting:
                # vLLM's own way to leave a running request out of one step (it counts the step up first).
                request.next_decode_eligible_step = self.current_step + 2
            # When local memory runs out vLLM preempts from the end: preempting an offloaded request would free none.
            self.running.sort(key=lambda request: request.request_id not in offload.requests)
        offload.adjust_leases()
        return super().schedule(*args, **kwargs)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        output = model_runner_output.kv_connector_output
        report = output.kv_connector_worker_meta if output is not None else None
        failed: frozenset[int] = frozenset()
        if isinstance(report, Report) and report.failed:
            failed = report.failed
            for name in self.offload.failed(report, scheduler_output.num_scheduled_tokens):
                model_runner_output.sampled_token_ids[model_runner_output.req_id_to_index[name]] = []
        result = super().update_from_output(scheduler_output, model_runner_output)
        for offloaded in list(self.offload.requests.values()) if failed else ():
            if offloaded.pool.executor in failed:
                self._move_to_local(offloaded.request)
        return result

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
        for borrower in self.borrowers:
            borrower.stop()
        super().shutdown()
