"""The prefill engine's scheduler: vLLM's, under a lock that lets the control thread lend blocks in between.

Checked against vllm/v1/core/sched/scheduler.py of 0.32 (run) and 0.33 (read).
"""

import threading
import time
from collections.abc import Iterable
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from vllm_adrenaline import identity
from vllm_adrenaline.config import Options
from vllm_adrenaline.control import messages
from vllm_adrenaline.cores import wait_without_yield
from vllm_adrenaline.prefill import executor
from vllm_adrenaline.prefill.control import ControlServer
from vllm_adrenaline.prefill.lender import Lender


class PrefillScheduler(Scheduler):
    """Every entry that may touch the block pool holds `kv_lock`; uncontended, that costs nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        wait_without_yield()
        super().__init__(*args, **kwargs)
        options = Options.of(self.vllm_config)
        pool = self.kv_cache_manager.block_pool
        self.kv_lock = threading.RLock()
        self.lender = Lender(
            pool,
            reserve=int(pool.num_gpu_blocks * options.prefill_reserve),
            expiry_s=options.lease_seconds,
            clock=time.monotonic,
        )
        self.connector.lender = self.lender
        self.control = ControlServer(
            options.listen_address,
            identity.of(self.vllm_config),
            self.lender,
            self.kv_lock,
            self._welcome,
            executor.kill,
        )
        self.control.start()

    def _welcome(self) -> messages.Welcome:
        nixl = self.connector.connector_scheduler
        return messages.Welcome(
            engine_id=nixl.engine_id,
            nixl_host=nixl.side_channel_host,
            nixl_port=nixl.side_channel_port,
            num_blocks=self.kv_cache_manager.block_pool.num_gpu_blocks,
            executors=executor.addresses(),
        )

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        with self.kv_lock:
            return super().schedule(*args, **kwargs)

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
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
