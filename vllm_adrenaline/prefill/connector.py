"""The prefill engine's connector: it stamps and offers finished prompts, and puts the KV cache into shared memory."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm.v1.engine import FinishReason

from vllm_adrenaline.compat.connector_metadata import attach
from vllm_adrenaline.compat.nixl_hold import end_hold
from vllm_adrenaline.control.messages import MAX_NAME
from vllm_adrenaline.engine.connector import AdrenalineConnector, SchedulerSide, WorkerSide
from vllm_adrenaline.kv.prompt_hash import prompt_hash
from vllm_adrenaline.kv.stamp import MAX_TICKET, STAY, TICKET, stamped
from vllm_adrenaline.prefill import executor_pool
from vllm_adrenaline.prefill.elastic import ElasticPrefill
from vllm_adrenaline.prefill.leases import LeaseManager, Offer

ANSWERED = (FinishReason.STOP, FinishReason.LENGTH)
"""How a request ends whose answer is complete."""
MAX_TOKENS = 1 << 24
"""The largest `max_tokens` of a request that may stay."""
KEY_BYTES = 32

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlConnectorMetadata
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from vllm_adrenaline.colocation.tuner import ShareTuner


class PrefillSchedulerSide(SchedulerSide):
    """The scheduler side of a prefill engine's connector. It offers finished prompts for claiming.

    Attributes:
        leases, tuner, elastic: the scheduler's, which makes and sets them.
        key: with which this life of the engine signs what it says of prompts.
        unfinished: what routers are to be told of prompts that ended early, by name, until the scheduler takes it.
    """

    leases: LeaseManager
    tuner: ShareTuner
    elastic: ElasticPrefill | None = None

    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        self.unfinished: dict[str, dict[str, Any]] = {}
        self.key = secrets.token_bytes(KEY_BYTES)

    def on_new_request(self, request: Request) -> None:
        params = request.kv_transfer_params
        if params:
            # Whatever else a client asks of NIXL here (to read from some host, say) is not ours to do. A prompt whose
            # name is too long for a control message could not be claimed: it is not kept.
            keep = params.get("do_remote_decode") is True and len(request.request_id) <= MAX_NAME
            request.kv_transfer_params = {"do_remote_decode": True} if keep else None
            if keep and type(limit := params.get(STAY)) is int and 0 < limit <= MAX_TOKENS:
                request.kv_transfer_params[STAY] = limit
            if keep and isinstance(ticket := params.get(TICKET), str) and len(ticket) <= MAX_TICKET:
                request.kv_transfer_params[TICKET] = ticket
        super().on_new_request(request)

    def request_finished(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        is_held, params = super().request_finished(request, block_ids)
        if not is_held:
            self._note_answer(request)
            return is_held, params
        tokens, ids = int(request.num_prompt_tokens), block_ids[0]
        params = dict(params or {})
        is_unfinished = request.num_computed_tokens < tokens
        if not is_unfinished:
            self.tuner.observe_ttft(time.time() - request.arrival_time)
        else:
            ids = ids[: request.num_computed_tokens // self.block_size]
            tokens = len(ids) * self.block_size
            params["do_remote_prefill"] = False  # nobody is to take it for the whole prompt (decode/params.py)
        proof = prompt_hash(request.all_token_ids[:tokens])
        blocks = [self.leases.pool.blocks[index] for index in ids]
        ticket = (request.kv_transfer_params or {}).get(TICKET, "")
        self.leases.offer(request.request_id, Offer(blocks, tokens, proof, ticket))
        params = stamped(params, proof, tokens, self.key)
        if is_unfinished:
            self.unfinished[request.request_id] = params
        return is_held, params

    def _note_answer(self, request: Request) -> None:
        """Note how long the answer of a request got that was decoded here."""
        if self.elastic is None or request.kv_transfer_params:
            return
        self.elastic.returned.discard(request.request_id)
        # By requests for one token prompts are given up.
        if request.get_finished_reason() in ANSWERED and request.max_tokens > 1:
            self.elastic.lengths.ended(request.num_output_tokens)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        super().update_connector_output(connector_output)
        self.leases.withdraw(connector_output.finished_sending or ())

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Any:
        return attach(super().build_connector_meta(scheduler_output), "let_go", self.leases.take_let_go())

    def take_counts(self) -> Mapping[str, float]:
        return self.elastic.take_counts() if self.elastic is not None else {}

    def gauges(self) -> Mapping[str, float]:
        shares = self.tuner.shares
        in_force = {} if shares is None else {"prefill_share": shares.prefill, "decode_share": shares.decode}
        return {"executor_share": executor_pool.active().share, **in_force}


class PrefillWorkerSide(WorkerSide):
    """The worker side of a prefill engine's connector. It ends NIXL's hold on prompts that were claimed or dropped."""

    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        self._let_go: set[str] = set()

    def start_load_kv(self, metadata: NixlConnectorMetadata) -> None:
        self._let_go |= metadata.let_go
        super().start_load_kv(metadata)

    def get_transfer_results(self) -> Any:
        results = super().get_transfer_results()
        results.finished_sending |= end_hold(self, self._let_go)
        self._let_go = set()
        return results


class PrefillConnector(AdrenalineConnector):
    """The connector of a prefill engine. Its KV cache is shared with executors, and with decode engines that map it."""

    scheduler_side, worker_side = PrefillSchedulerSide, PrefillWorkerSide
    connector_scheduler: PrefillSchedulerSide
    connector_worker: PrefillWorkerSide


NixlConnector = PrefillConnector
"""The name by which vLLM finds it (engine/setup.py, CONNECTOR)."""
