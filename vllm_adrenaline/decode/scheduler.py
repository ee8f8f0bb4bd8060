"""The decode engine's scheduler: vLLM's, with offloaded requests whose blocks live elsewhere.

An offloaded request is scheduled like any other. Only its blocks come from another pool. What is added: the prefill
engines' answers and leases before each step, and the way back to local memory. Checked against
vllm/v1/core/sched/scheduler.py of 0.32 (run) and 0.33 (read).
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from typing import TYPE_CHECKING, Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from vllm_adrenaline.compat import scheduler as compat
from vllm_adrenaline.compat.message_queue import wait_without_spinning
from vllm_adrenaline.compat.progress import decodes, missing_tokens
from vllm_adrenaline.config import Options
from vllm_adrenaline.control import sockets
from vllm_adrenaline.control.client import PrefillClient
from vllm_adrenaline.decode import leases, profiling
from vllm_adrenaline.decode.admission import EngineAdmission
from vllm_adrenaline.decode.kv_manager import KVSpaceManager
from vllm_adrenaline.decode.own_prompts import OwnPrompts
from vllm_adrenaline.decode.report import Report
from vllm_adrenaline.decode.request_table import RequestTable
from vllm_adrenaline.engine.identity import identity_of
from vllm_adrenaline.engine.setup import ENDS_WITH_STARTER, executors_of, listens_beyond_loopback
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.placement.batch import Batch
from vllm_adrenaline.placement.policy import Reason
from vllm_adrenaline.system.child import end_with_parent
from vllm_adrenaline.system.priority import come_first

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput

    from vllm_adrenaline.decode.connector import DecodeConnector

logger = logging.getLogger("vllm.adrenaline")


class DecodeScheduler(Scheduler):
    """vLLM's scheduler with a table of requests whose prompt is with a prefill engine."""

    connector: DecodeConnector

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        wait_without_spinning()
        come_first()
        if starter := os.environ.get(ENDS_WITH_STARTER):
            end_with_parent(int(starter))
        super().__init__(*args, **kwargs)
        options = Options.of(self.vllm_config)
        sockets.use_keys(options.load_keys())
        identity = identity_of(self.vllm_config)
        engine = self.vllm_config.kv_transfer_config.engine_id
        far = listens_beyond_loopback()
        self.clients = [PrefillClient(address, identity, engine, far) for address in options.peer_addresses]
        for client in self.clients:
            client.start()
        self._wait_for_peers(options.connect_timeout)
        tensor_parallel_size = self.vllm_config.parallel_config.tensor_parallel_size
        blocks = self.kv_cache_manager.block_pool.num_gpu_blocks
        shares = [executors_of(client.address, client.welcome) for client in self.clients if client.welcome is not None]
        costs = profiling.costs_of(self.vllm_config, options, shares)
        admission = EngineAdmission(options, costs, blocks, self.block_size, self.max_num_running_reqs)
        self.table = RequestTable(self.clients, admission, self.block_size, tensor_parallel_size)
        self.connector.connector_scheduler.table = self.table
        self._began, self._batch = 0.0, Batch()
        self._own_prompts: OwnPrompts | None = None
        if options.moves_prompts or options.moves_decodes:
            limit = self.max_num_scheduled_tokens
            self._own_prompts = OwnPrompts(costs, options.tpot_slo_ms / 1000 or None, limit, options.moves_prompts)
        self._step_seconds = 0.0  # of the decodes of the present step, as believed
        for manager in compat.replace_kv_managers(self, KVSpaceManager):
            manager.table = self.table
        self._tell_slack()

    def _wait_for_peers(self, timeout_s: float) -> None:
        deadline = time.monotonic() + max(timeout_s, 1.0)
        while missing := [client.address for client in self.clients if client.welcome is None]:
            if time.monotonic() > deadline:
                raise AdrenalineError(f"no prefill engine answers at {', '.join(missing)}")
            time.sleep(0.01)

    def add_request(self, request: Request) -> None:
        # An idle engine has no steps in which it would hear that a prefill engine came back.
        if self.table.has_lost:
            self._take_answers()
        super().add_request(request)

    def _take_answers(self) -> None:
        """Take the prefill engines' answers. Who has lost what he had there goes on here."""
        lost = self.table.poll()
        for request in lost.offloaded:
            self._move_to_local(request)
        for request in lost.pulled:
            compat.recompute_pulled(self, request)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        table = self.table
        self._began = time.monotonic()
        self._take_answers()
        self._place()
        if table.any_offloaded:
            waiting, leaving = leases.reserve(table.requests, self.running, self.block_size)
            for request in leaving:
                if self._blocks(request) > self._spare() or not self._migrate(request, Reason.STARVED):
                    self._move_to_local(request)
            for request in waiting:
                compat.leave_out_of_step(self, request)
            # When local memory runs out vLLM preempts from the end: preempting an offloaded request would free none.
            self.running.sort(key=lambda request: not table.is_offloaded(request.request_id))
        leases.adjust(table.requests, table.pools, self.block_size)
        table.settle()
        with self._own_prompts_in_chunks():
            output = super().schedule(*args, **kwargs)
        self._batch = table.batch(self.running)
        return output

    def _own_prompts_in_chunks(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which a step is scheduled: with --adrenaline-elastic one that bounds prompts."""
        if self._own_prompts is None:
            return contextlib.nullcontext()
        table = self.table
        batch = table.batch(filter(decodes, self.running))
        self._step_seconds = table.admission.step_seconds(batch, len(table.pools))
        starting = len(table.requests.keys() - {request.request_id for request in self.running})
        return compat.prompts_in_chunks(self, self._own_prompts.chunk(self._step_seconds), starting)

    def _tell_slack(self) -> None:
        """Have prefill engines told how much of their work this engine could do."""
        if self._own_prompts is None:
            return
        table, admission, executors = self.table, self.table.admission, len(self.table.pools)
        own = [request for request in self.waiting if request.request_id not in table.requests]
        own += [request for request in self.running if not decodes(request)]
        running = list(filter(decodes, self.running))
        decoding, batch = table.batch(running), table.batch([*running, *own])
        unborn = sum(self._blocks(request) - cdiv(request.num_computed_tokens, self.block_size) for request in own)
        slack = self._own_prompts.slack(
            step=admission.step_seconds(decoding, executors),
            work=admission.work_seconds(batch, table.unplaced()),
            memory=admission.own_memory(self._spare() - unborn, batch),
            growth=admission.lengths.expected_growth(0, self.max_model_len),
            missing=sum(map(missing_tokens, own)) + table.unfinished_tokens,
            is_full=table.queue.is_stuck or len(self.running) >= self.max_num_running_reqs,
        )
        for pool in table.pools:
            pool.client.slack = slack

    def _spare(self) -> int:
        return int(self.kv_cache_manager.block_pool.get_num_free_blocks())

    def _blocks(self, request: Request) -> int:
        return cdiv(int(request.num_tokens), self.block_size)

    def _place(self) -> None:
        """Decide about waiting requests, and whether a running one migrates; once a step, before vLLM schedules."""
        table, admission = self.table, self.table.admission
        admission.begin_step(table.any_offloaded)
        if not admission.is_move_due and not table.queue:
            return
        batch = table.batch(self.running)
        mappable = [pool.executor for pool in table.pools if table.can_map(pool)]
        pools = admission.pools(self._spare(), table.pools, table.unavailable, mappable)
        if admission.is_move_due and (found := admission.choose_move(pools, batch, table.migratable())):
            migrating, reason = found
            if self._migrate(migrating.request, reason):
                pools = pools.with_local_taken(self._blocks(migrating.request))
        table.admit_pending(pools, batch)

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        table, output = self.table, model_runner_output.kv_connector_output
        report = output.kv_connector_worker_meta if output is not None else None
        report = report if isinstance(report, Report) else None
        failed = table.consume(output, report)
        for request in failed:
            if request.request_id in scheduler_output.num_scheduled_tokens:  # its token is worthless
                row = model_runner_output.req_id_to_index[request.request_id]
                model_runner_output.sampled_token_ids[row] = []
        tokens = scheduler_output.total_num_scheduled_tokens
        if tokens and (report is None or not report.failed):
            only_decodes = tokens == len(scheduler_output.num_scheduled_tokens)
            seconds = time.monotonic() - self._began
            table.observe_step(self._batch, report, seconds if only_decodes else 0.0)
            if self._own_prompts is not None and not only_decodes:
                self._own_prompts.observe(seconds, self._step_seconds, scheduler_output.num_scheduled_tokens.values())
        result = super().update_from_output(scheduler_output, model_runner_output)
        for request in failed:
            self._move_to_local(request)
        table.settle()
        self._tell_slack()
        return result

    def _migrate(self, request: Request, reason: Reason) -> bool:
        """Let an offloaded request go on in local memory with its KV pulled there, if it can be; return whether."""
        table = self.table
        if request not in self.running or all(request is not other.request for other in table.migratable()):
            return False
        table.begin_migration(request, compat.take_blocks(self, request))
        table.admission.count_move(reason)
        compat.preempt(self, request)
        compat.uncount_preemption(self, request)  # it is counted as moved
        return True

    def _move_to_local(self, request: Request) -> None:
        """Let a request go on in local memory: its KV is recomputed here, as after any preemption."""
        if request.status == RequestStatus.RUNNING and request in self.running:
            compat.preempt(self, request)
        self.table.to_local(request.request_id)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        self.table.to_local(request.request_id)

    def has_requests(self) -> bool:
        return super().has_requests() or self.table.unsettled

    def shutdown(self) -> None:
        for client in self.clients:
            client.stop()
        super().shutdown()
