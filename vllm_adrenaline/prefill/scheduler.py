"""The prefill engine's scheduler: vLLM's, under a lock, so that the control thread can lend blocks between its steps.

Checked against vllm/v1/core/sched/scheduler.py of 0.32 (run) and 0.33 (read).
"""

import os
import threading
import time
from collections.abc import Iterable
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from vllm_adrenaline.colocation.controller import Objectives
from vllm_adrenaline.colocation.cpu import ExecutorShares, WorkerShares
from vllm_adrenaline.colocation.tuner import Device, ShareTuner
from vllm_adrenaline.compat import scheduler as compat
from vllm_adrenaline.compat.message_queue import wait_without_spinning
from vllm_adrenaline.config import Options
from vllm_adrenaline.control import messages
from vllm_adrenaline.control.server import ControlServer
from vllm_adrenaline.engine import profile, profiling
from vllm_adrenaline.engine.identity import identity_of
from vllm_adrenaline.placement.prefill_admission import Blocks, should_defer_prefill
from vllm_adrenaline.prefill import executor_pool
from vllm_adrenaline.prefill.leases import LeaseManager
from vllm_adrenaline.prefill.lending import Lending
from vllm_adrenaline.prefill.utilization import PrefillUtilization
from vllm_adrenaline.system.machine import process_space


class PrefillScheduler(Scheduler):
    """vLLM's scheduler with a lease manager and a control server.

    Every method that may touch the block pool holds `kv_lock`. Where nobody else wants it, that costs next to nothing.

    Attributes:
        kv_lock: guards the block pool.
        leases: the lease manager.
        lending: the handler of the control server.
        control: the control server.
    """

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
        self.control = ControlServer(options.listen_address, identity_of(self.vllm_config), self.lending)
        self._utilization = PrefillUtilization(time.monotonic)
        connector.tuner = self._make_tuner(options)
        self.control.start()

    def _make_tuner(self, options: Options) -> ShareTuner:
        """Return the tuner of the shares of this engine's cores.

        With `--adrenaline-pool both` the prefill workers share them with executors and may share them with mapping
        decode workers. One TPOT would then have to be answered by two ratios, which move each other. Executors are the
        choice: by default they run on these very cores, and they are this engine's own.
        """
        device: Device
        if options.uses_executors:
            device, decode = ExecutorShares(self._executors.set_share), options.executor_share
        else:
            decode = 0.5  # both sides' workers give themselves the same priority
            device = WorkerShares([export.pid for export in self._executors.exports], self.lending.mappers.pids)
        known = profile.cached(profiling.key(self.vllm_config, options, ()))
        objectives = Objectives(options.ttft_slo_ms / 1000 or None, options.tpot_slo_ms / 1000 or None)
        return ShareTuner(objectives, decode, known.prefill if known is not None else [], device)

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
            pid=os.getpid(),
            process_space=process_space(),
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
        if asked != PauseState.UNPAUSED or not needed:
            return asked
        pool = self.kv_cache_manager.block_pool
        beats = list(self.lending.heartbeats.copy().values())
        waiting = [beat.waiting for beat in beats]
        claims, leased = self.leases.lent
        blocks = Blocks(
            total=pool.num_gpu_blocks,
            free=pool.get_num_free_blocks(),
            growth_reserve=self._growth_reserve,
            waiting=sum(waiting) if all(waiting) else 0,  # a decode engine without any may want the next
            lent=leased > 0 or any(beat.offloads for beat in beats),
            offers=claims > 0 or bool(self.leases.offers),
        )
        return PauseState.PAUSED_NEW if should_defer_prefill(blocks, needed) else asked

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        with self.kv_lock, compat.paused(self, self._pause_for_growth(self.pause_state)):
            output = super().schedule(*args, **kwargs)
        if output.total_num_scheduled_tokens:
            self._utilization.begin()
        return output

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        self._utilization.end()
        with self.kv_lock:
            return super().update_from_output(*args, **kwargs)

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        with self.kv_lock:
            return super().finish_requests(request_ids, finished_status)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        with self.kv_lock:
            return super().reset_prefix_cache(*args, **kwargs)

    def shutdown(self) -> None:
        self.control.stop()
        super().shutdown()
