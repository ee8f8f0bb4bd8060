"""Everything the decode engine's scheduler knows about requests whose prompt is with a prefill engine.

One table of them (decode/request.py says what can become of one), their claims and their leases. The scheduler is the
only caller, from one thread. No decision is made here: admission asks the policy, and vLLM's own allocation and
freeing drive the blocks.

Every prompt is claimed as soon as its request arrives: from then on it is kept as long as we live, and we know what it
holds, whatever is decided about it.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm_adrenaline.control import messages
from vllm_adrenaline.control.client import PrefillClient
from vllm_adrenaline.decode import params
from vllm_adrenaline.decode.admission import EngineAdmission
from vllm_adrenaline.decode.blocks import RemoteBlock, RemotePool
from vllm_adrenaline.decode.placement_queue import PlacementQueue
from vllm_adrenaline.decode.report import Report
from vllm_adrenaline.decode.request import RemoteRequest, State, progress_of
from vllm_adrenaline.kv import space
from vllm_adrenaline.kv.prompt_hash import prompt_hash
from vllm_adrenaline.placement.batch import Batch, Progress
from vllm_adrenaline.placement.pools import Pools
from vllm_adrenaline.system.arithmetic import cdiv

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = logging.getLogger("vllm.adrenaline")

CLAIM_WAIT_S = 0.002
"""How long a step waits for claims that were just made: an answer takes a tenth of that, a missed step much more."""
CLAIM_S = 0.5
"""For how long a prefill engine that hangs is asked for a prompt, until that is computed here."""
MAP_AGAIN_S = 10.0
"""How long nothing more is mapped of a prefill engine whose memory could not be: every attempt costs a prompt."""


@dataclass
class Lost:
    """Requests of prefill engines that are gone, or took everything back. `offloaded`: to be recomputed. `pulled`: what
    NIXL reads, or has read, is not to be believed."""

    offloaded: list[Request] = field(default_factory=list)
    pulled: list[Request] = field(default_factory=list)


class RequestTable:
    """All requests of this engine whose prompt is with a prefill engine, by id.

    `pools`: what we have of each prefill engine's memory, in the order of `--adrenaline-peers`. `queue`: requests that
    are not placed yet. `unavailable`: attention executors that did not answer in the last step.
    """

    def __init__(
        self, clients: list[PrefillClient], admission: EngineAdmission, block_size: int, tensor_parallel_size: int
    ) -> None:
        self.pools = [RemotePool(executor, client) for executor, client in enumerate(clients)]
        self.admission = admission
        self.queue = PlacementQueue(admission, block_size)
        self.requests: dict[str, RemoteRequest] = {}
        self._claims: dict[tuple[int, str], RemoteRequest] = {}  # asked for, or in use
        self._outlived: list[RemotePool] = []  # pools whose life is over, and of which mapped requests use blocks
        self._block_size, self._tp = block_size, tensor_parallel_size
        self.unavailable: frozenset[int] = frozenset()
        self._counts: dict[str, float] = defaultdict(float)

    # A request's way through

    def arrived(self, request: Request) -> None:
        """Note a new request and claim its prompt; nothing of it is read or attended before the claim is granted."""
        raw = RemoteRequest.take_params(request)
        if not raw:
            return
        prompt = request.all_token_ids[: request.num_prompt_tokens]
        found = params.find(raw, self.pools, self._tp, prompt)
        refusal = found.refusal
        if found.pool is not None and (found.pool.executor, found.claim) in self._claims:
            refusal = "its kv_transfer_params are another request's already"
        elif found.pool is not None and refusal is not None and found.is_signed:
            found.pool.post(messages.Drop([found.claim]))
        if found.pool is None or refusal is not None:
            logger.warning("request %s: %s; its prompt is computed here", request.request_id, refusal)
            self._counts["refused_params"] += 1
            self._counts["unsigned_params"] += not found.is_signed
            return
        made = RemoteRequest(request, found.pool, found.claim, claimed_at=time.monotonic())
        self.requests[made.name] = self._claims[found.pool.executor, found.claim] = made
        found.pool.post(messages.Claim(found.claim))

    def batch(self, running: Iterable[Request]) -> Batch:
        """Return what is attended where; requests on their way count as there."""
        batch, known = Batch(), self.requests
        for request in running:
            if request.request_id not in known:
                batch.add(progress_of(request), None)
        for each in known.values():
            if each.state is State.OFFLOADED:
                batch.add(each.progress, each.pool.executor, each.is_mapped)
            elif each.state in (State.MIGRATING, State.PULLING, State.RECEIVED):
                batch.add(each.progress, None)
        return batch

    def unplaced(self) -> list[Progress]:
        """Return how far the requests are that are not placed yet."""
        return [each.progress for each in self.requests.values() if each.state in (State.CLAIMING, State.WAITING)]

    @property
    def unfinished_tokens(self) -> int:
        """How many tokens of prompts that ended early are still to be computed here, of requests that do not run."""
        return sum(each.unfinished for each in self.requests.values())

    def admit_pending(self, pools: Pools, batch: Batch) -> None:
        """Decide about requests that could run now."""
        for placed, is_mapped in self.queue.admit(pools, batch):
            placed.pull_nothing()
            placed.is_mapped = is_mapped
            placed.become(State.OFFLOADED)
            self._counts["mapped_requests" if is_mapped else "offloaded_requests"] += 1

    def matched_tokens(self, request: Request, num_local: int) -> tuple[int | None, bool] | None:
        """Answer for KVConnector.get_num_new_matched_tokens; None when NIXL is to answer."""
        known = self.requests.get(request.request_id)
        if known is None:
            return None
        if known.state is State.WAITING and known.decision is not None:
            if not known.unfinished:
                return None
            missing = request.num_prompt_tokens - known.unfinished - num_local
            return (missing, True) if missing > 0 else (0, False)
        if known.state is State.OFFLOADED:
            return max(0, request.num_tokens - 1 - num_local), False
        if known.state is State.MIGRATING:  # everything but the last token, which is not computed
            missing = request.num_tokens - 1 - num_local
            return (missing, True) if missing > 0 else (0, False)
        if known.state is State.RECEIVED:  # what was pulled was of no use, down to the first block
            return None
        return None, False

    def allocated(self, request: Request, num_external_tokens: int) -> None:
        """vLLM gave a request blocks (KVConnector.update_state_after_alloc)."""
        known = self.requests.get(request.request_id)
        if known is None or known.state not in (State.WAITING, State.MIGRATING):
            return
        if known.state is State.WAITING:
            self.queue.drop(known.name)
            self.admission.count_local(known)
            self._counts["local_requests"] += 1
        if num_external_tokens == 0:
            self._leave(known)  # all of it was in the prefix cache: there is nothing to pull
        else:
            known.become(State.PULLING)

    def is_offloaded(self, request_id: str) -> bool:
        """Whether the request's KV lives with a prefill engine."""
        known = self.requests.get(request_id)
        return known is not None and known.state is State.OFFLOADED

    @property
    def any_offloaded(self) -> bool:
        """Whether there is an offloaded request."""
        return any(each.state is State.OFFLOADED for each in self.requests.values())

    def blocks_for(self, request_id: str, held: int, needed: int) -> list[RemoteBlock]:
        """Return the blocks that bring a request from `held` to `needed`; leases.reserve made sure they are there."""
        offloaded = self.requests[request_id]
        new: list[RemoteBlock] = []
        if held == 0:
            new, offloaded.blocks = offloaded.blocks, []
        missing = needed - held - len(new)
        if missing > 0:
            new += offloaded.pool.take(missing)
        if offloaded.is_mapped:
            for block in new:
                block.block_id = space.mapped_id(offloaded.executor, space.index_of(block.block_id))
        offloaded.held = held + len(new)
        return new

    def finished(self, request_id: str) -> None:
        """The request ends, in whatever way. vLLM frees the blocks it was given; the rest is let go here."""
        known = self.requests.get(request_id)
        if known is not None:
            self._leave(known)

    def begin_migration(self, request: Request, blocks: list[RemoteBlock]) -> None:
        """The request goes on locally with its KV pulled; `blocks` are its remote ones, taken out of vLLM's books."""
        migrating = self.requests[request.request_id]
        peer = migrating.pool.peer
        assert peer is not None
        migrating.become(State.MIGRATING)
        migrating.blocks += blocks
        migrating.pull(peer, request.num_tokens - 1, self._block_size, self._tp)
        self._counts["moved_requests"] += 1

    def migratable(self) -> list[RemoteRequest]:
        """Return the requests that may migrate: they have run, so all their KV but the last token's is there."""
        return [
            each
            for each in self.requests.values()
            if each.state is State.OFFLOADED and each.request.num_output_tokens and each.pool.peer is not None
        ]

    def to_local(self, request_id: str) -> None:
        """An offloaded request goes on in the decode engine's own memory; its blocks are freed already."""
        if self.is_offloaded(request_id):
            self.finished(request_id)
            self._counts["fallback_requests"] += 1

    # Once a step

    @property
    def has_lost(self) -> bool:
        """Whether a prefill engine is gone, or took all back, and `poll` has not said so yet."""
        return any(pool.client.is_over(pool.life) for pool in self.pools)

    def poll(self) -> Lost:
        """Take the prefill engines' answers; return the requests that have lost what they had there."""
        lost = Lost()
        patience = time.monotonic() + CLAIM_WAIT_S
        for index in range(len(self.pools)):
            pool = self.pools[index]
            # Only for what was just asked for: a prefill engine that does not answer must not slow every step.
            if any(e.claimed_at + CLAIM_WAIT_S >= patience - CLAIM_WAIT_S for e in self._claiming(pool)):
                pool.client.answered.wait(max(0.0, patience - time.monotonic()))
            for life, message in pool.client.take_answers():
                if life != pool.life:
                    continue
                if isinstance(message, messages.Leased):
                    self._leased(pool, message)
                elif isinstance(message, messages.Claimed):
                    self._granted(pool, message)
                elif isinstance(message, messages.ClaimRejected):
                    self._gone(pool, message.request)
                elif isinstance(message, messages.Refused):
                    self._lose(pool, lost)
                    pool = self.pools[index] = RemotePool(index, pool.client, pool.life + 1)
            self._give_up_claims(pool)
        return lost

    def _give_up_claims(self, pool: RemotePool) -> None:
        """Have prompts computed here for which a prefill engine that hangs was asked. What it grants is released."""
        now = time.monotonic()
        old = [each for each in self._claiming(pool) if now >= each.claimed_at + CLAIM_S]
        if not old or not pool.client.hangs(now):
            return
        logger.warning("the prefill engine at %s hangs: %d prompt(s) are computed here", pool.client.address, len(old))
        for each in old:
            self._leave(each)
            self._counts["fallback_requests"] += 1

    def settle(self) -> None:
        """Tell the prefill engines what they may reuse. The last step's failures are reported by now."""
        used = {id(each.pool) for each in self.requests.values()}
        for pool in [pool for pool in self._outlived if id(pool) not in used]:
            self._outlived.remove(pool)
            pool.client.post(None, messages.LetGo(pool.member))  # whichever life hears it: blocks are kept until then
        for pool in self.pools:
            pool.settle()

    def members(self) -> dict[int, str]:
        """Return what the mapped requests of each prefill engine belong to there. Only one of its lives has any."""
        return {
            each.executor: each.pool.member
            for each in self.requests.values()
            if each.state is State.OFFLOADED and each.is_mapped
        }

    def can_map(self, pool: RemotePool) -> bool:
        """Whether new requests of a pool may be mapped. A worker maps one life of a prefill engine at a time."""
        is_single = all(other.executor != pool.executor for other in self._outlived)
        return pool.available and is_single and time.monotonic() >= pool.unmapped_until

    @property
    def unsettled(self) -> bool:
        """Whether answers are awaited, or something must go back: the engine loop stays awake until then."""
        return (
            any(each.state is State.LEFT for each in self._claims.values())
            or any(pool.unsettled for pool in self.pools)
            or bool(self._outlived)
            or any(pool.leased and not self.any_offloaded for pool in self.pools)
        )

    def take_received(self, scheduler_output: SchedulerOutput) -> frozenset[str]:
        """Return the requests of this step that recompute the last token of a prompt whose KV was received.

        That token's k and v are in the cache already, perhaps in a block that other requests read: they are not
        written again, neither locally nor remotely.
        """
        result = set()
        for new in scheduler_output.scheduled_new_reqs:
            known = self.requests.get(new.req_id)
            if known is None or known.state not in (State.OFFLOADED, State.RECEIVED):
                continue
            last = len(new.prompt_token_ids or ()) - 1
            is_last = new.num_computed_tokens == last and scheduler_output.num_scheduled_tokens[new.req_id] == 1
            if is_last and known.is_intact and not known.unfinished:
                result.add(new.req_id)
            if known.state is State.RECEIVED:
                self._leave(known)
        return frozenset(result)

    def consume(self, output: KVConnectorOutput | None, report: Report | None) -> list[Request]:
        """Take everything that the workers say at the end of a step. The only place that does.

        Args:
            output: vLLM's part of it: which pulls ended, and how. Pulls that are not to be believed are added to those
                that failed, before vLLM looks at them.
            report: ours: what executors did. None for a step without offloaded rows.

        Returns:
            The offloaded requests whose executor failed, or whose memory could not be mapped: their token of this step
            is worthless.
        """
        if output is not None:
            self._consume_pulls(output)
        if report is None:
            return []
        self._counts["executor_returns"] += len(self.unavailable - report.unavailable)
        self.unavailable = report.unavailable
        self._keep_what_is_written(report)
        self._counts["local_attention_seconds"] += report.local
        self._counts["remote_attention_seconds"] += max(report.remote.values(), default=0.0)
        self._counts["exposed_wait_seconds"] += report.exposed
        return self._consume_failures(report) if report.failed else []

    def _consume_pulls(self, output: KVConnectorOutput) -> None:
        if output.invalid_block_ids:
            # Not said whose they are: from now on all write what they recompute, which is harmless.
            for each in self.requests.values():
                each.is_intact = each.is_intact and each.state not in (State.PULLING, State.RECEIVED)
        received = set(output.finished_recving or ())
        now = time.monotonic()
        ended = {name: self.requests.get(name) for name in received | set(output.failed_recving or ())}
        pulled = {name: each for name, each in ended.items() if each is not None and each.state is State.PULLING}
        # The prefill engine may have taken the blocks back before they were read.
        doubtful = {name for name, each in pulled.items() if name in received and not each.pool.holds(now)}
        if doubtful:
            logger.warning("pulled KV of %d request(s) may have been reused: recomputing it here", len(doubtful))
            output.failed_recving = {*(output.failed_recving or ()), *doubtful}
        failed = output.failed_recving or ()
        for name, each in pulled.items():
            if name in failed or each.request.num_output_tokens:
                self._leave(each)
            else:
                each.pool.free_blocks(each.blocks)
                each.blocks = []
                each.become(State.RECEIVED)

    def _keep_what_is_written(self, report: Report) -> None:
        """Keep blocks into which an executor may still write, and have executors killed that do not let go of them."""
        for pool in self.pools:
            pool.keep_from_use(pool.executor in report.writing)
        for executor in sorted({executor for executor, _ in report.hung}):
            self.pools[executor].post(messages.KillExecutors(sorted(p for e, p in report.hung if e == executor)))

    def _consume_failures(self, report: Report) -> list[Request]:
        """Return the requests whose pools failed in the step."""
        failed = [executor for executor in range(len(self.pools)) if space.remote_pool(executor) in report.failed]
        self._counts["executor_failures"] += len(failed)
        self.unavailable |= frozenset(failed)
        lost = [e for e in self.requests.values() if e.state is State.OFFLOADED and e.block_pool in report.failed]
        for each in lost:
            if each.is_mapped:
                each.pool.unmapped_until = time.monotonic() + MAP_AGAIN_S
        return [each.request for each in lost]

    def observe_step(self, batch: Batch, report: Report | None, seconds: float) -> None:
        """Take what a step took; `seconds` is 0 when it computed prompts as well."""
        self.admission.observe(batch, report, seconds, len(self.pools))
        tpot = self.admission.recent_steps.note(seconds)
        for pool in self.pools:
            pool.client.tpot = tpot

    def take_counts(self) -> dict[str, float]:
        """Return what was counted since the last call."""
        counts, self._counts = self._counts, defaultdict(float)
        return {**counts, **self.admission.take_metrics()}

    def gauges(self) -> dict[str, float]:
        """Return what placement believes at present, and what is held of the prefill engines' memory."""
        borrowed = sum(pool.borrowed for pool in self.pools)
        waiting = sum(pool.client.waiting for pool in self.pools)
        mappable = [pool.executor for pool in self.pools if self.can_map(pool)]
        executors = self.admission.pools(0, self.pools, self.unavailable, mappable).executors
        return self.admission.gauges | {
            "borrowed_blocks": borrowed,
            "waiting_blocks": waiting,
            "lendable_blocks": sum(each.room for each in executors if each.available or each.mappable),
            "unavailable_executors": len(self.unavailable),
        }

    # Details

    def _claiming(self, pool: RemotePool) -> Iterable[RemoteRequest]:
        return (e for e in self._claims.values() if e.pool is pool and e.state is State.CLAIMING)

    def _leave(self, known: RemoteRequest) -> None:
        """Nothing of the request is elsewhere any more. A claim under way is released when it is granted."""
        if known.state is not State.CLAIMING:
            del self._claims[known.pool.executor, known.claim]
        if known.state is not State.OFFLOADED and (known.request.kv_transfer_params or {}).get("do_remote_prefill"):
            known.pull_nothing()
        self.queue.drop(known.name)
        known.become(State.LEFT)
        known.pool.free_blocks(known.blocks)
        known.blocks = []
        del self.requests[known.name]

    def _granted(self, pool: RemotePool, message: messages.Claimed) -> None:
        claimed = self._claims.get((pool.executor, message.request))
        if claimed is None or claimed.state not in (State.CLAIMING, State.LEFT):
            logger.error("the prefill engine at %s granted what was not asked for", pool.client.address)
            return
        if claimed.state is State.LEFT:
            del self._claims[pool.executor, message.request]
            pool.release(message.request)
            return
        request = claimed.request
        prompt = request.all_token_ids[: request.num_prompt_tokens]
        try:
            covered = message.num_tokens
            is_part = 0 < covered < len(prompt) and covered % self._block_size == 0
            if not (is_part or covered == len(prompt)) or message.prompt_hash != prompt_hash(prompt[:covered]):
                raise ValueError("it is the KV cache of another prompt")
            peer = pool.peer
            if peer is None:
                raise ValueError("the prefill engine is not there")
            claimed.blocks = pool.adopt(message.request, message.blocks, self._blocks(covered))
        except ValueError as error:
            logger.error("request %s: its claim is of no use (%s); its prompt is computed here", claimed.name, error)
            pool.release(message.request)
            self._counts["fallback_requests"] += 1
            claimed.become(State.WAITING)
            self._leave(claimed)
            return
        claimed.unfinished = len(prompt) - covered
        claimed.become(State.WAITING)
        claimed.pull(peer, covered, self._block_size, self._tp)
        self.queue.add(claimed)

    def _gone(self, pool: RemotePool, claim: str) -> None:
        claimed = self._claims.get((pool.executor, claim))
        if claimed is None or claimed.state not in (State.CLAIMING, State.LEFT):
            return
        if claimed.state is State.CLAIMING:
            self._leave(claimed)  # computed here from its first token
            self._counts["fallback_requests"] += 1
        del self._claims[pool.executor, claim]

    def _leased(self, pool: RemotePool, message: messages.Leased) -> None:
        try:
            pool.add_leased(message.blocks)
        except ValueError as error:
            logger.error("the prefill engine at %s lent what cannot be: %s", pool.client.address, error)

    def _lose(self, pool: RemotePool, lost: Lost) -> None:
        """The prefill engine is gone, or has taken everything back (decode/request.py says what becomes of whom)."""
        pool.available = False
        if pool.member and self.admission.maps:
            self._outlived.append(pool)  # until nobody uses it, which `settle` finds out
        for known in [each for each in self._claims.values() if each.pool is pool]:
            if known.state is State.OFFLOADED:
                if not known.is_mapped:
                    lost.offloaded.append(known.request)  # leaves when its blocks are freed
                continue
            if known.state is State.PULLING:
                lost.pulled.append(known.request)
            if known.state in (State.CLAIMING, State.WAITING, State.MIGRATING, State.PULLING):
                self._counts["fallback_requests"] += 1
                self._leave(known)
        # What is still here was asked for and not answered.
        self._claims = {k: e for k, e in self._claims.items() if e.pool is not pool or e.name in self.requests}

    def _blocks(self, num_tokens: int) -> int:
        return cdiv(num_tokens, self._block_size)
