"""The decode engine's connector: it says what NIXL is to pull, and what executors did in a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm.v1.request import RequestStatus

from vllm_adrenaline.compat.connector_metadata import attach
from vllm_adrenaline.config import Options
from vllm_adrenaline.engine.connector import AdrenalineConnector, SchedulerSide, WorkerSide

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

    from vllm_adrenaline.decode.remote_attention import RemoteAttention
    from vllm_adrenaline.decode.request_table import RequestTable


class DecodeSchedulerSide(SchedulerSide):
    """The scheduler side of a decode engine's connector. It asks the request table first, then NIXL.

    Attributes:
        table: the scheduler's, which sets it.
    """

    table: RequestTable

    def on_new_request(self, request: Request) -> None:
        self.table.arrived(request)
        super().on_new_request(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        answer = self.table.matched_tokens(request, num_computed_tokens)
        return answer if answer is not None else super().get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        self.table.allocated(request, num_external_tokens)
        super().update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Any:
        meta = attach(super().build_connector_meta(scheduler_output), "members", self.table.members())
        return attach(meta, "received", self.table.take_received(scheduler_output))

    def request_finished(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        self.table.finished(request.request_id)
        is_answered = request.status in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)
        if is_answered and request.max_tokens > 1:  # by those of one token engines are looked at
            self.table.admission.lengths.ended(request.num_output_tokens)
        return super().request_finished(request, block_ids)

    def take_counts(self) -> Mapping[str, float]:
        return self.table.take_counts()

    def gauges(self) -> Mapping[str, float]:
        return self.table.gauges()


class DecodeWorkerSide(WorkerSide):
    """The worker side of a decode engine's connector. It counts what executors did.

    Attributes:
        remote: the worker's remote attention, which it sets once it is attached to the executors.
    """

    remote: RemoteAttention | None = None

    def take_counts(self) -> Mapping[str, float]:
        return self.remote.take_counts() if self.remote is not None else {}


class DecodeConnector(AdrenalineConnector):
    """The connector of a decode engine. Its worker's report of a step (report.Report) travels with vLLM's."""

    scheduler_side, worker_side = DecodeSchedulerSide, DecodeWorkerSide
    connector_scheduler: DecodeSchedulerSide
    connector_worker: DecodeWorkerSide

    @property
    def shares_kv(self) -> bool:  # type: ignore[override]
        """Whether our own KV cache is to lie in a memory file: to map others' behind it."""
        return Options.of(self._vllm_config).maps

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Have vLLM capture what is between attention layers only (decode/backend.py). On CPU it captures nothing."""
        return True

    def build_connector_worker_meta(self) -> Any:
        remote = self.connector_worker.remote
        return remote.take_report() if remote is not None else None


NixlConnector = DecodeConnector
"""The name by which vLLM finds it (engine/setup.py, CONNECTOR)."""
