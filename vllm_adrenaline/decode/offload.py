"""Everything the decode engine's scheduler knows about offloaded requests: claims, remote blocks, leases, moves.

The scheduler is the only caller, from one thread. No decision is made here: the placer asks the policy, and vLLM's own
allocation and freeing drive the blocks.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_adrenaline.control import messages
from vllm_adrenaline.decode.blocks import RemoteBlock, RemotePool
from vllm_adrenaline.decode.borrower import Borrower
from vllm_adrenaline.decode.growth import LOOKAHEAD, growth, lease_change
from vllm_adrenaline.decode.moves import Moves
from vllm_adrenaline.decode.peers import find_peer
from vllm_adrenaline.decode.placer import Batch, Placer
from vllm_adrenaline.decode.remote import Report
from vllm_adrenaline.decode.waiting import Waiting
from vllm_adrenaline.digest import token_digest

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

    from vllm_adrenaline.placement.policy import Observed

logger = logging.getLogger("vllm.adrenaline")

CLAIM_WAIT_S = 0.002
"""How long a step waits for claims under way: an answer takes a tenth of that, a missed step much more."""
STARVE_S = 1.0
"""How long a request waits for a growth block before it moves to the decode engine."""


@dataclass
class Offloaded:
    """One offloaded request. `adopted`: its prompt's blocks between the grant and vLLM's first allocation."""

    request: Request
    pool: RemotePool
    claim: str
    granted: bool = False
    adopted: list[RemoteBlock] = field(default_factory=list)
    held: int = 0
    starved_since: float | None = None


class Offload:
    """See the module."""

    def __init__(self, borrowers: list[Borrower], placer: Placer, block_size: int, tensor_parallel_size: int) -> None:
        self.pools = [RemotePool(executor, borrower) for executor, borrower in enumerate(borrowers)]
        self.placer = placer
        self.waiting = Waiting(placer, block_size)
        self.requests: dict[str, Offloaded] = {}
        self.pulled: dict[str, Request] = {}
        self.moves = Moves(block_size, tensor_parallel_size)
        self._block_size, self._tp = block_size, tensor_parallel_size
        self._cancelled: dict[str, RemotePool] = {}
        self.down: frozenset[int] = frozenset()
        self._counts: dict[str, float] = defaultdict(float)

    # A request's way through

    def arrived(self, request: Request) -> None:
        """Note a new request; `place_waiting` decides about it once it could run."""
        if not request.kv_transfer_params:
            return
        found = find_peer(request.kv_transfer_params, self.pools, self._tp, self._blocks(request.num_prompt_tokens))
        if found is None:
            logger.warning("request %s names no prefill engine of ours: computing its prompt here", request.request_id)
            self._counts["refused_params"] += 1
            request.kv_transfer_params = None
            return
        self.waiting.add(request, *found)

    def batch(self, running: Iterable[Request]) -> Batch:
        """Return what is attended where; requests on their way (being claimed or pulled) count as there."""
        batch, add = Batch(), self.placer.add
        for request in running:
            name = request.request_id
            if name not in self.requests and name not in self.pulled and name not in self.moves:
                add(batch, request, None)
        for request in (*self.pulled.values(), *self.moves.requests):
            add(batch, request, None)
        for offloaded in self.requests.values():
            add(batch, offloaded.request, offloaded.pool.executor)
        return batch

    def place_waiting(self, batch: Batch, free: int, max_rows: int) -> None:
        """Decide about requests that could run now, and claim those that are offloaded; `free`: local blocks."""

        def observe(free: int) -> Observed:
            return self.placer.observed(batch, free, self.pools, self.down)

        for undecided in self.waiting.place(observe, batch, free, max_rows):
            request, pool = undecided.request, undecided.pool
            # Not NIXL's business any more, even if the claim fails: what is gone there must not be read.
            request.kv_transfer_params["do_remote_prefill"] = False
            self.requests[request.request_id] = Offloaded(request, pool, undecided.claim)
            pool.borrower.claim(undecided.claim)

    def matched_tokens(self, request: Request, num_local: int) -> tuple[int | None, bool] | None:
        """Answer for KVConnector.get_num_new_matched_tokens; None when NIXL is to answer."""
        name = request.request_id
        if name in self.moves:
            return self.moves.matched_tokens(request, num_local)
        if name in self.waiting:
            return None if self.waiting.may_go_local(name) else (None, False)
        offloaded = self.requests.get(name)
        if offloaded is None:
            return None
        if not offloaded.granted:
            return None, False
        return max(0, request.num_tokens - 1 - num_local), False

    def allocated(self, request: Request, num_external_tokens: int) -> None:
        """vLLM gave a request blocks (KVConnector.update_state_after_alloc)."""
        name = request.request_id
        if name in self.requests:
            return
        self._counts["local_requests"] += self.waiting.goes_local(name)
        if num_external_tokens == 0:
            self.moves.ended([name])  # all of it was in the prefix cache: there is nothing to pull
        elif name not in self.moves:
            self.pulled[name] = request

    def is_offloaded(self, request_id: str) -> bool:
        """Whether the request's KV lives with a prefill engine (or is about to)."""
        return request_id in self.requests

    def blocks_for(self, request_id: str, held: int, needed: int) -> list[RemoteBlock]:
        """Return the blocks that bring a request from `held` to `needed`; `reserve_growth` made sure they are there."""
        offloaded = self.requests[request_id]
        new: list[RemoteBlock] = []
        if held == 0:
            new, offloaded.adopted = offloaded.adopted, []
        missing = needed - held - len(new)
        if missing > 0:
            new += offloaded.pool.take(missing)
        offloaded.held = held + len(new)
        return new

    def finished(self, request_id: str) -> None:
        """The request ends, in whatever way. vLLM frees the blocks it was given; the rest is let go here."""
        self.pulled.pop(request_id, None)
        self.waiting.drop(request_id)
        self.moves.ended([request_id])
        offloaded = self.requests.pop(request_id, None)
        if offloaded is None:
            return
        if not offloaded.granted and not offloaded.pool.dead:
            self._cancelled[offloaded.claim] = offloaded.pool
        offloaded.pool.free_blocks(offloaded.adopted)

    def begin_move(self, request: Request, blocks: list[RemoteBlock]) -> None:
        """The request goes on locally with its KV pulled; `blocks` are its remote ones, taken out of vLLM's books."""
        offloaded = self.requests.pop(request.request_id)
        self.moves.begin(request, offloaded.pool, blocks)
        self._counts["moved_requests"] += 1

    def movable(self) -> list[tuple[Request, int]]:
        """Return the requests that may move: they have run, so all their KV but the last token's is there."""
        return [
            (o.request, o.pool.executor)
            for o in self.requests.values()
            if o.granted and o.request.num_output_tokens and o.pool.borrower.welcome is not None
        ]

    def to_local(self, request_id: str) -> None:
        """The request goes on in the decode engine's own memory; its blocks are freed already."""
        if request_id in self.requests:
            self.finished(request_id)
            self._counts["fallback_requests"] += 1

    # Once a step

    def poll(self) -> list[str]:
        """Take the prefill engines' answers; return the requests that have lost their blocks."""
        lost: list[str] = []
        for index, pool in enumerate(list(self.pools)):
            if any(not o.granted and o.pool is pool for o in self.requests.values()):
                pool.borrower.answered.wait(CLAIM_WAIT_S)
            for message in pool.borrower.take_answers():
                if isinstance(message, messages.Leased):
                    pool.add_leased(message.blocks)
                elif isinstance(message, messages.Claimed):
                    self._granted(pool, message)
                elif isinstance(message, messages.Gone):
                    self._gone(pool, message.request)
                elif isinstance(message, messages.Refused) and not pool.dead:
                    lost += [name for name, o in self.requests.items() if o.pool is pool]
                    self._counts["fallback_requests"] += self.waiting.lose(pool)
                    self._cancelled = {claim: of for claim, of in self._cancelled.items() if of is not pool}
                    pool.dead = True
                    self.pools[index] = RemotePool(index, pool.borrower)
        return lost

    def reserve_growth(self, running: list[Request]) -> tuple[list[Request], list[Request]]:
        """Return the offloaded requests that must wait for a block in this step, and those that have waited enough."""
        waiting, leaving = [], []
        now = time.monotonic()
        spare = {id(pool): len(pool.free) for pool in self.pools}
        for request in running:
            offloaded = self.requests.get(request.request_id)
            if offloaded is None:
                continue
            needed = self._blocks(request.num_tokens_with_spec) - offloaded.held
            key = id(offloaded.pool)
            if needed <= spare.get(key, 0):
                spare[key] = spare.get(key, 0) - max(0, needed)
                offloaded.starved_since = None
            elif offloaded.starved_since is None or now - offloaded.starved_since < STARVE_S:
                offloaded.starved_since = offloaded.starved_since or now
                waiting.append(request)
            else:
                leaving.append(request)
        return waiting, leaving

    def adjust_leases(self) -> None:
        """Ask for blocks that will be needed soon, give back what will not be."""
        for pool in self.pools:
            mine = [o for o in self.requests.values() if o.pool is pool and o.granted]
            near = [self._growth(o, LOOKAHEAD) for o in mine]
            far = [self._growth(o, 2 * LOOKAHEAD) for o in mine]
            change = lease_change(len(pool.free), pool.asked, near, far)
            if change > 0 and pool.borrower.welcome is not None:
                pool.asked = change
                pool.borrower.lease(change)
            elif change < 0:
                pool.give_back(-change)

    @property
    def unsettled(self) -> bool:
        """Whether answers are awaited or leases must go back: the engine loop stays awake until then."""
        return bool(self._cancelled) or any(pool.asked or (pool.leased and not self.requests) for pool in self.pools)

    def received(self, scheduler_output: SchedulerOutput) -> frozenset[str]:
        """Return the requests of this step that recompute the last token of a prompt whose KV was received.

        That token's k and v are in the cache already, perhaps in a block that other requests read: they are not
        written again, neither locally nor remotely.
        """
        result = set()
        for new in scheduler_output.scheduled_new_reqs:
            name = new.req_id
            if name not in self.requests and name not in self.pulled:
                continue
            self.pulled.pop(name, None)
            last = len(new.prompt_token_ids or ()) - 1
            if new.num_computed_tokens == last and scheduler_output.num_scheduled_tokens[name] == 1:
                result.add(name)
        return frozenset(result)

    def observe(self, output: KVConnectorOutput) -> None:
        """Take what the workers report at the end of a step."""
        self.moves.ended({*(output.finished_recving or ()), *(output.failed_recving or ())})
        if output.invalid_block_ids or output.failed_recving:
            self.pulled.clear()  # a failed pull writes what it recomputes; so may, harmlessly, the others
        if isinstance(report := output.kv_connector_worker_meta, Report):
            self.down = report.down
            self._counts["local_attention_seconds"] += report.local
            self._counts["remote_attention_seconds"] += max(report.remote.values(), default=0.0)
            self._counts["exposed_wait_seconds"] += report.exposed

    def observe_step(self, batch: Batch, report: Report | None, seconds: float) -> None:
        """Take what a step took; `seconds` is 0 when it computed prompts as well."""
        self.placer.observe(batch, report, seconds, len(self.pools))
        tpot = self.placer.tpot(seconds)
        for pool in self.pools:
            pool.borrower.tpot = tpot

    def failed(self, report: Report, scheduled: Any) -> list[str]:
        """Executors did not answer in this step; return the scheduled requests whose tokens are worthless.

        The prefill engine is told first: it kills its executors before any block that is released after this is reused.
        """
        for executor in report.failed:
            self._counts["executor_failures"] += 1
            self.pools[executor].borrower.report_fault(report.pids)
        self.down |= report.failed
        return [n for n in scheduled if (o := self.requests.get(n)) is not None and o.pool.executor in report.failed]

    def take_counts(self) -> dict[str, float]:
        """Return what was counted since the last call."""
        counts, self._counts = self._counts, defaultdict(float)
        return {**counts, **self.placer.take_counts()}

    def gauges(self) -> dict[str, float]:
        """Return what placement believes at present, and what is held of the prefill engines' memory."""
        borrowed = sum(pool.borrowed for pool in self.pools)
        waiting = sum(pool.borrower.waiting for pool in self.pools)
        return self.placer.gauges | {"borrowed_blocks": borrowed, "waiting_blocks": waiting}

    # Details

    def _granted(self, pool: RemotePool, message: messages.Claimed) -> None:
        if self._cancelled.pop(message.request, None) is not None:
            pool.borrower.release([message.request], [])
            return
        for name, offloaded in self.requests.items():
            if offloaded.pool is pool and offloaded.claim == message.request and not offloaded.granted:
                request = offloaded.request
                prompt = request.all_token_ids[: request.num_prompt_tokens]
                if message.num_tokens != len(prompt) or message.digest != token_digest(prompt):
                    logger.error("request %s was sent with the KV cache of another prompt: computing it here", name)
                    del self.requests[name]
                    break
                offloaded.adopted = pool.adopt(message.request, message.blocks)
                offloaded.granted = True
                self._counts["offloaded_requests"] += 1
                return
        pool.borrower.release([message.request], [])

    def _gone(self, pool: RemotePool, claim: str) -> None:
        self._cancelled.pop(claim, None)
        for name, offloaded in list(self.requests.items()):
            if offloaded.pool is pool and offloaded.claim == claim and not offloaded.granted:
                del self.requests[name]  # computed here from its first token
                self._counts["fallback_requests"] += 1

    def _growth(self, offloaded: Offloaded, ahead: int) -> int:
        request = offloaded.request
        held = offloaded.held + len(offloaded.adopted)
        final = request.num_prompt_tokens + request.max_tokens
        return growth(request.num_tokens, final, held, self._block_size, ahead)

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)
