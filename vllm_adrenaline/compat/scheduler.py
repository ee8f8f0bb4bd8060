"""What we do to vLLM's scheduler and its requests for which they have no method (vllm/v1/core/sched/scheduler.py)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput, FinishReason
from vllm.v1.request import RequestStatus

from vllm_adrenaline.compat.progress import decodes
from vllm_adrenaline.errors import AdrenalineError

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.core.sched.interface import PauseState
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request


def replace_kv_managers(scheduler: Scheduler, manager: type[FullAttentionManager]) -> list[Any]:
    """Make the scheduler's KV cache managers instances of `manager`, a subclass; return them.

    This does not use vLLM's registry of specs, so that the spec stays the stock one, which NIXL and others look at.

    Raises:
        AdrenalineError: there is another kind of manager than for full attention.
    """
    managers: list[Any] = list(scheduler.kv_cache_manager.coordinator.single_type_managers)
    for each in managers:
        if type(each) is not FullAttentionManager:
            raise AdrenalineError(f"{type(each).__name__} is not supported: full attention only")
        each.__class__ = manager
    return managers


def take_blocks(scheduler: Scheduler, request: Request) -> list[KVCacheBlock]:
    """Take a request's blocks out of vLLM's books and return them. To preempt the request then frees none of them."""
    manager = scheduler.kv_cache_manager.coordinator.single_type_managers[0]
    manager.num_cached_block.pop(request.request_id, None)
    blocks: list[KVCacheBlock] = manager.req_to_blocks.pop(request.request_id)
    return blocks


def preempt(scheduler: Scheduler, request: Request) -> None:
    """Preempt a running request: it leaves the batch and waits again. The token of the present step is dropped."""
    scheduler.running.remove(request)
    scheduler._preempt_request(request, time.monotonic(), drop_stale_output=True)


def uncount_preemption(scheduler: Scheduler, request: Request) -> None:
    """Take back the event that a request was preempted just now: it lost nothing, and is counted as something else."""
    if scheduler.log_stats:
        request.events.pop()


def leave_out_of_step(scheduler: Scheduler, request: Request) -> None:
    """Leave a running request out of the step that is scheduled next."""
    request.next_decode_eligible_step = scheduler.current_step + 2  # vLLM counts the step up first


def recompute_pulled(scheduler: Scheduler, request: Request) -> None:
    """Have a request recomputed whose KV was being pulled: what was read is not to be believed.

    This is vLLM's own way for a load that failed. It keeps the blocks until NIXL is done with them
    (_handle_failed_recving). A request that does not wait for a pull is left alone.
    """
    if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
        request.num_computed_tokens = 0
        scheduler.failed_recving_kv_req_ids.add(request.request_id)


def cached_tokens(scheduler: Scheduler, request: Request) -> int:
    """Return how many tokens of a waiting request the prefix cache has. Unlike vLLM's own look, it counts nowhere."""
    manager = scheduler.kv_cache_manager
    if not manager.prefix_cache_lookup_enabled(request):
        return 0
    _, found, _ = manager.coordinator.find_longest_cache_hit(request.block_hashes, request.num_tokens - 1)
    return int(found)


def move_to_front(scheduler: Scheduler, request: Request) -> None:
    """Let a request that was just added be the first of those that wait."""
    scheduler.waiting.remove_request(request)
    scheduler.waiting.prepend_request(request)


@contextlib.contextmanager
def prompts_in_chunks(scheduler: Scheduler, chunk: int | None, starting: int) -> Iterator[None]:
    """A context in which a step that is scheduled computes one running prompt, and at most `chunk` tokens of it.

    All that decodes comes first. Other running prompts are left out of the step. What the step may compute beyond that
    is for `starting` requests that begin to decode, a token each: vLLM gives running requests all that there is.

    `chunk` None: prompts are computed as vLLM does it.
    """
    if chunk is None:
        yield
        return
    scheduler.running.sort(key=lambda request: not decodes(request))
    prompts = [request for request in scheduler.running if not decodes(request)]
    for request in prompts[1:]:
        leave_out_of_step(scheduler, request)
    config = scheduler.scheduler_config
    before = scheduler.max_num_scheduled_tokens, config.long_prefill_token_threshold
    adaptive = scheduler.adaptive_long_prefill_threshold
    most = len(scheduler.running) - len(prompts) + starting + chunk
    scheduler.max_num_scheduled_tokens = min(before[0], most)
    config.long_prefill_token_threshold, scheduler.adaptive_long_prefill_threshold = chunk, False
    try:
        yield
    finally:
        scheduler.max_num_scheduled_tokens, config.long_prefill_token_threshold = before
        scheduler.adaptive_long_prefill_threshold = adaptive


def end_early(scheduler: Scheduler, request: Request, keep: bool) -> None:
    """End a request before its prompt is computed. No output goes to the client: `early_output` makes one.

    Args:
        scheduler: vLLM's.
        request: one that waits, or whose prompt was computed in part, and of which nothing is computed at present.
        keep: whether the connector is to keep the blocks that it has, as for a prompt that is finished.
    """
    if scheduler.log_stats and request.status != RequestStatus.RUNNING:
        request.record_event(EngineCoreEventType.SCHEDULED)  # else its time in the queue would be counted as negative
    status = RequestStatus.FINISHED_LENGTH_CAPPED if keep else RequestStatus.FINISHED_ABORTED
    scheduler.finish_requests([request.request_id], status)


def early_output(request: Request, params: dict[str, Any] | None) -> EngineCoreOutput:
    """Return the output for the client of a request that ended early: no token, and these kv_transfer_params."""
    return EngineCoreOutput(
        request_id=request.request_id,
        new_token_ids=[],
        finish_reason=FinishReason.LENGTH,
        events=request.take_events(),
        kv_transfer_params=params,
        trace_headers=request.trace_headers,
    )


@contextlib.contextmanager
def paused(scheduler: Scheduler, state: PauseState) -> Iterator[None]:
    """A context in which the scheduler is in the pause state `state`; afterwards it is in the one before.

    This does not use vLLM's setter, which logs a line at every call: a prefill engine steps every millisecond while one
    of its prompts is on offer.
    """
    before = scheduler._pause_state
    scheduler._pause_state = state
    try:
        yield
    finally:
        scheduler._pause_state = before
