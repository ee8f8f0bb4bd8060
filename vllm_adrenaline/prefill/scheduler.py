"""The prefill engine's scheduler: vLLM's, under a lock, so that the control thread can lend blocks between its steps.

Checked against vllm/v1/core/sched/scheduler.py of 0.32 (run) and 0.33 (read).
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from vllm_adrenaline.colocation.controller import Objectives
from vllm_adrenaline.colocation.cpu import ExecutorShares, WorkerShares
from vllm_adrenaline.colocation.tuner import ShareTuner
from vllm_adrenaline.compat import scheduler as compat
from vllm_adrenaline.compat.message_queue import wait_without_spinning
from vllm_adrenaline.compat.progress import decodes
from vllm_adrenaline.config import Options
from vllm_adrenaline.control import addresses, messages
from vllm_adrenaline.control.server import ControlServer
from vllm_adrenaline.engine import profile, profiling
from vllm_adrenaline.engine.identity import identity_of
from vllm_adrenaline.kv.stamp import GIVES_UP, MAX_TICKET, STAY
from vllm_adrenaline.placement.elastic import Outcome
from vllm_adrenaline.placement.prefill_admission import Blocks, should_defer_prefill
from vllm_adrenaline.prefill import executor_pool
from vllm_adrenaline.prefill.elastic import ElasticPrefill
from vllm_adrenaline.prefill.leases import LeaseManager
from vllm_adrenaline.prefill.lending import Lending
from vllm_adrenaline.prefill.utilization import PrefillUtilization

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

    from vllm_adrenaline.prefill.connector import PrefillConnector


class PrefillScheduler(Scheduler):
    """vLLM's scheduler with a lease manager and a control server.

    Every method that may touch the block pool holds `kv_lock`. Where nobody else wants it, that costs next to nothing.

    Attributes:
        kv_lock: guards the block pool.
        leases: the lease manager.
        lending: the handler of the control server.
        control: the control server.
    """

    connector: PrefillConnector

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        wait_without_spinning()
        super().__init__(*args, **kwargs)
        options = Options.of(self.vllm_config)
        pool = self.kv_cache_manager.block_pool
        self.kv_lock = threading.RLock()
        self.leases = LeaseManager(
            pool,
            reserve=int(pool.num_gpu_blocks * options.prefill_reserve),
            expiry_s=options.lease_seconds,
            clock=time.monotonic,
        )
        self._growth_reserve = int(pool.num_gpu_blocks * options.growth_reserve)
        connector = self.connector.connector_scheduler
        connector.leases = self.leases
        self._executors = executor_pool.active()
        self.lending = Lending(
            self.leases,
            self.kv_lock,
            make_welcome=self._welcome,
            make_load=self._load,
            adjust_share=self._adjust_share,
            kill_executors=self._executors.kill,
            revoke=self._executors.revoke,
            exports=self._executors.exports,
            weights=self._executors.weights,
        )
        passing = self._executors.passing
        assert passing is not None, "vLLM's executor has started it"
        self.control = ControlServer(options.listen_address, identity_of(self.vllm_config), self.lending, passing)
        self._utilization = PrefillUtilization(time.monotonic)
        known = profile.cached(profiling.key(self.vllm_config, options, ()))
        connector.tuner = self._make_tuner(options, known)
        self._elastic: ElasticPrefill | None = None
        if options.elastic != "off":
            cached = functools.partial(compat.cached_tokens, self)
            self._elastic = ElasticPrefill(options, known, self.block_size, self.max_num_running_reqs, cached)
        connector.elastic = self._elastic
        self._early: list[tuple[int, EngineCoreOutput]] = []  # by client: of prompts that ended early
        self._observe: Callable[[float], None] = lambda seconds: None  # takes what the present step took
        self._began = 0.0
        self.control.start()

    def _make_tuner(self, options: Options, known: profile.Profile | None) -> ShareTuner:
        """Return the tuner of the shares of this engine's cores.

        With `--adrenaline-pool both` the prefill workers share them with executors and may share them with mapping
        decode workers. One TPOT would then have to be answered by two ratios, which move each other. Executors are the
        choice: by default they run on these very cores, and they are this engine's own. Without an objective nothing
        is moved, and it is the decode workers that prompts come before.
        """
        objectives = Objectives(options.ttft_slo_ms / 1000 or None, options.tpot_slo_ms / 1000 or None)
        prefill = known.prefill if known is not None else []
        if options.uses_executors and (objectives != Objectives() or not options.maps):
            executors = ExecutorShares(self._executors.set_share)
            return ShareTuner(objectives, options.executor_share, prefill, executors)
        workers = WorkerShares(self._executors.worker_pids, self.lending.mappers.pids)
        return ShareTuner.of_two_engines(objectives, prefill, workers)

    def _welcome(self, member: str) -> messages.Welcome:
        nixl, executors = self.connector.connector_scheduler, self._executors
        return messages.Welcome(
            engine_id=nixl.engine_id,
            nixl_host=nixl.side_channel_host,
            nixl_port=nixl.side_channel_port,
            num_blocks=self.kv_cache_manager.block_pool.num_gpu_blocks,
            executors=executors.addresses,
            executor_share=executors.share_in_words,
            lease_seconds=self.leases.expiry_s,
            member=member,
            vicinity=addresses.vicinity(self.control.address),
            key=nixl.key if member else b"",
        )

    def _adjust_share(self) -> None:
        """Let the tuner adjust the shares. The control thread calls it, which alone changes `heartbeats`."""
        beats = self.lending.heartbeats.values()
        self.connector.connector_scheduler.tuner.update(beat.tpot for beat in beats)

    def _load(self) -> messages.Load:
        """Return what this engine says of its load. The control thread calls it, and holds the lock."""
        pool = self.kv_cache_manager.block_pool
        free = pool.get_num_free_blocks()
        return messages.Load(
            total=pool.num_gpu_blocks,
            free=free,
            reserve=self.leases.reserve,
            busy=self._utilization.share(),
            recalls=self._needed_by_next() > free,
        )

    def _needed_by_next(self) -> int:
        """Return how many blocks the next waiting prompt needs; 0 when none waits."""
        return cdiv(self.waiting.peek_request().num_tokens, self.block_size) if self.waiting else 0

    def _pause_for_growth(self, asked: PauseState) -> PauseState:
        """Return the pause state of the next step: vLLM's own pause of new prompts, if they are to wait.

        Whether they are is decided in placement/prefill_admission.py. `asked` is the state that vLLM was told to be in.
        """
        needed = self._needed_by_next()
        if asked != PauseState.UNPAUSED or not needed or self._comes_back(self.waiting.peek_request()):
            return asked
        pool = self.kv_cache_manager.block_pool
        beats = self._beats()
        waiting = [beat.waiting for beat in beats]
        claims, _ = self.leases.lent
        blocks = Blocks(
            total=pool.num_gpu_blocks,
            free=pool.get_num_free_blocks(),
            growth_reserve=self._growth_reserve,
            waiting=sum(waiting) if all(waiting) else 0,  # a decode engine without any may want the next
            lent=self._lends(beats),
            offers=claims > 0 or bool(self.leases.offers),
        )
        return PauseState.PAUSED_NEW if should_defer_prefill(blocks, needed) else asked

    def _beats(self) -> list[messages.Heartbeat]:
        """Return what decode engines said last."""
        return list(self.lending.heartbeats.copy().values())

    def _lends(self, beats: Iterable[messages.Heartbeat]) -> bool:
        """Whether decode engines have some of this engine's memory for offloaded requests."""
        _, leased = self.leases.lent
        return leased > 0 or any(beat.offloads for beat in beats)

    # Work that moves

    def _move_work(self) -> None:
        """End prompts early that the decode side is to compute, and those of requests that are to be decoded here."""
        if self._elastic is None or self.pause_state != PauseState.UNPAUSED:
            return
        if not self.waiting and all(map(decodes, self.running)):
            return
        beats = self._beats()
        kept = self.leases.reserve + (self._growth_reserve if self._lends(beats) else 0)
        free = self.kv_cache_manager.block_pool.get_num_free_blocks() - kept
        slacks = [beat.slack for beat in beats]
        for moved in list(self._elastic.decide(self.running, self.waiting, slacks, free)):
            self._end_early(moved.request, moved.outcome)

    def _end_early(self, request: Request, outcome: Outcome) -> None:
        """End a request of which the prompt is not computed, and tell its router who goes on with it."""
        stays = outcome is Outcome.STAYS
        keep = not stays and request.num_computed_tokens >= self.block_size
        compat.end_early(self, request, keep)
        params = {STAY: True} if stays else self.connector.connector_scheduler.unfinished.pop(request.request_id, None)
        self._early.append((request.client_index, compat.early_output(request, params)))

    def add_request(self, request: Request) -> None:
        """Add a request. One that comes back because it was told to stay waits no second time.

        It may say, beside, that another one's prompt will not be taken.
        """
        ticket = (request.kv_transfer_params or {}).get(GIVES_UP)
        super().add_request(request)
        if ticket is not None:
            if isinstance(ticket, str) and 0 < len(ticket) <= MAX_TICKET:
                with self.kv_lock:
                    self.leases.give_up(ticket)
            return
        if self._elastic is not None and not request.kv_transfer_params and self._elastic.note_arrival(request):
            compat.move_to_front(self, request)

    def _comes_back(self, request: Request) -> bool:
        """Whether a waiting request was told to stay here. It has nowhere else to go."""
        return self._elastic is not None and request.request_id in self._elastic.returned

    # A step

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        with self.kv_lock:
            self._move_work()
            pause = self._pause_for_growth(self.pause_state)
            chunk = None if self._elastic is None else self._elastic.chunk(self.running)
            with compat.paused(self, pause), compat.prompts_in_chunks(self, chunk, starting=0):
                output = super().schedule(*args, **kwargs)
        if output.total_num_scheduled_tokens:
            self._utilization.begin()
            if self._elastic is not None:
                self._began, self._observe = time.monotonic(), self._observer(self._elastic, output)
        return output

    def _observer(self, elastic: ElasticPrefill, output: SchedulerOutput) -> Callable[[float], None]:
        """Return what takes the seconds of a step that was just scheduled: nothing, if it decodes and prefills."""
        scheduled = {name: tokens for name, tokens in output.num_scheduled_tokens.items() if name in self.requests}
        decoding = [self.requests[name] for name, tokens in scheduled.items() if tokens == 1]
        if len(decoding) == len(scheduled):
            tokens = sum(int(request.num_tokens) for request in decoding)
            return functools.partial(elastic.observe_decodes, len(decoding), tokens)
        if decoding:
            return lambda seconds: None
        # They count as computed as soon as they are scheduled.
        ends = {name: int(self.requests[name].num_computed_tokens) for name in scheduled}
        return functools.partial(elastic.observe_prompts, [(ends[name] - scheduled[name], ends[name]) for name in ends])

    def update_from_output(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        self._utilization.end()
        if scheduler_output.total_num_scheduled_tokens:
            self._observe(time.monotonic() - self._began)
        with self.kv_lock:
            outputs = super().update_from_output(scheduler_output, *args, **kwargs)
        for client, early in self._early:
            outputs.setdefault(client, EngineCoreOutputs()).outputs.append(early)
        self._early = []
        return outputs

    def has_requests(self) -> bool:
        return super().has_requests() or bool(self._early)

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        with self.kv_lock:
            return super().finish_requests(request_ids, finished_status)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        with self.kv_lock:
            return super().reset_prefix_cache(*args, **kwargs)

    def shutdown(self) -> None:
        self.control.stop()
        super().shutdown()
