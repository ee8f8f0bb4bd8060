"""The work of a prefill engine that moves: prompts that the decode side computes, and requests that are decoded here.

What moves is decided in placement/elastic.py. Here is what that needs to be told, in vLLM's terms: the queue of prompts
and what they take, what decode engines say of themselves, and what has just moved and is not in what they say. The
scheduler is the only caller, from one thread.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from vllm_adrenaline.compat.progress import decodes
from vllm_adrenaline.config import Options
from vllm_adrenaline.control.messages import Slack
from vllm_adrenaline.engine.profile import Profile
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.kv.stamp import STAY
from vllm_adrenaline.placement import elastic
from vllm_adrenaline.placement.elastic import Cause, Outcome, Prompt
from vllm_adrenaline.placement.feedback import Feedback, Step
from vllm_adrenaline.placement.memory import Memory
from vllm_adrenaline.placement.output_length import OutputLengths
from vllm_adrenaline.system.arithmetic import cdiv

if TYPE_CHECKING:
    from vllm.v1.request import Request

MAX_PROMPTS_PER_STEP = 16
"""How many prompts are looked at in a step."""
ON_THE_WAY_S = 0.5
"""For how long what moved is counted as on its way: until decode engines have it, and have said so (two heartbeats)."""
WEIGHT = 0.2
"""Weight of the last step with prompts in how much longer they are believed to take than the profile says."""
STAY_SEATS = 0.75
"""Part of the requests that may run at the same time which may be such that stay: the rest is for prompts."""
TYPICAL_ROWS = 8
"""The batch by which the cost of one row more is taken."""
NO_LIMIT = 1 << 20
"""Stands for the output limit of a request of which it is not known."""
STRETCH = 3.0
"""How much longer a step gets by prompts, at most, while requests are decoded here: prompts come first."""


def _is_for_decode_side(request: Request) -> bool:
    """Whether nothing is wanted here but a prompt, which a decode engine goes on with."""
    params = request.kv_transfer_params or {}
    is_all = request.max_tokens == 1 and request.sampling_params.prompt_logprobs is None
    return bool(params.get("do_remote_decode")) and is_all


class OnTheWay(NamedTuple):
    """What has moved a moment ago, so that nobody counts it yet.

    Attributes:
        until: when it is taken to be there (seconds, by the clock).
        outcome: what became of it.
        row: its tokens, and the expected growth of a request that stays.
        seconds: what its prompt takes here, if it stays.
    """

    until: float
    outcome: Outcome
    row: tuple[int, int]
    seconds: float


@dataclass(frozen=True)
class Moved:
    """A request that moves: vLLM's object, and why."""

    request: Request
    outcome: Outcome
    cause: Cause


class ElasticPrefill:
    """Decides about the prompts of a prefill engine.

    Attributes:
        lengths: how long answers of requests that stay get.
        counts: what was decided since they were taken, by outcome and cause.
        returned: names of requests that came back because they were told to stay, and that have not ended.
    """

    def __init__(
        self,
        options: Options,
        known: Profile | None,
        block_size: int,
        seats: int,
        cached: Callable[[Request], int],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Begin with nothing moved.

        Args:
            options: of this engine.
            known: its profile.
            block_size: tokens of a KV block.
            seats: requests that may run at the same time.
            cached: returns how many tokens of a waiting request the prefix cache has.
            clock: returns the time, in seconds.
            wall: returns the time of day, in seconds, as requests have it for their arrival.

        Raises:
            AdrenalineError: there is no profile.
        """
        if known is None or not known.prefill or (options.moves_decodes and known.costs is None):
            raise AdrenalineError("there is no profile of this prefill engine; is the cache folder writable?")
        self._curve, self._block_size, self._clock = known.prefill, block_size, clock
        self._wall = wall
        self._seats, self._cached = int(STAY_SEATS * seats), cached
        self._moves_prompts = options.moves_prompts
        self._ttft_slo = options.ttft_slo_ms / 1000 or None
        self._feedback = Feedback(known.costs) if known.costs is not None and options.moves_decodes else None
        self._seen, self._expected = 1.0, 1.0  # seconds of the last steps with prompts, and what the profile said
        self._on_the_way: deque[OnTheWay] = deque()
        self.returned: set[str] = set()
        self.lengths = OutputLengths()
        self.counts: Counter[tuple[str, str]] = Counter()

    def decide(
        self,
        running: Iterable[Request],
        waiting: Iterable[Request],
        slacks: Sequence[Slack | None],
        free_blocks: int,
    ) -> Iterator[Moved]:
        """Decide about the prompts that decode engines are to decode; yield those that move.

        Args:
            running, waiting: vLLM's requests, in the order in which they are computed.
            slacks: what each decode engine said last.
            free_blocks: blocks that this engine may use for requests that stay.
        """
        if not slacks or any(slack is None for slack in slacks):  # a router may choose one that takes nothing over
            return
        self._forget()
        decoding = [request for request in running if decodes(request)]
        prompts = [request for request in running if not decodes(request)]
        prompts += [request for request in waiting if not request.num_output_tokens]
        # What is computed here for decode engines is work that they have not heard of.
        coming = sum(self._decode_seconds(request) for request in prompts if _is_for_decode_side(request))
        seconds = [self._seconds(request, self._computed(request)) for request in prompts[:MAX_PROMPTS_PER_STEP]]
        seconds += [self._seconds(request, 0) for request in prompts[MAX_PROMPTS_PER_STEP:]]
        staying = [each for each in self._on_the_way if each.outcome is Outcome.STAYS]
        rows = self._rows([*decoding, *(request for request in prompts if not _is_for_decode_side(request))])
        rows += [each.row for each in staying]
        ahead, waits, work = 0.0, sum(seconds) + sum(each.seconds for each in staying), self._work(rows)
        for request, own in zip(prompts[:MAX_PROMPTS_PER_STEP], seconds, strict=False):
            if not _is_for_decode_side(request) or request.num_in_flight_tokens:  # decoded here; or in a step now
                ahead += own
                continue
            row, more = self._row(request), self._decode_seconds(request)
            alone = self._work([row])
            sides = [msgspec.structs.replace(each, work=max(each.work + coming, alone)) for each in self._sides(slacks)]
            if STAY in request.kv_transfer_params and self._feedback is not None and not request.num_computed_tokens:
                cause = elastic.stay(waits + max(work + more, alone), sides)
                memory = Memory(free_blocks + self._held(decoding), self._block_size, rows)
                if cause is not None and len(rows) < self._seats and memory.fits(*row):
                    yield self._moved(request, Outcome.STAYS, cause, row, own)
                    rows.append(row)
                    coming, work = coming - more, self._work(rows)
                    continue
            if self._moves_prompts:
                # Of a prompt that was begun there are blocks to go on with. What the cache has is of use here only.
                begun = int(request.num_computed_tokens) // self._block_size * self._block_size
                missing = int(request.num_tokens) - begun
                waited = max(0.0, self._wall() - request.arrival_time)
                prompt = Prompt(missing, int(request.num_tokens), waited, ahead, own, waits + work)
                if cause := elastic.hand_over(prompt, sides, self._ttft_slo):
                    yield self._moved(request, Outcome.HANDED_OVER, cause, (int(request.num_tokens), 0), 0.0)
                    waits -= own
                    continue
            ahead += own

    def chunk(self, running: Iterable[Request]) -> int | None:
        """Return how many tokens of prompts the next step may compute; None for as many as vLLM computes."""
        decoding = [request for request in running if decodes(request)]
        if self._feedback is None or not decoding:
            return None
        step = self._feedback.costs.seconds(len(decoding), sum(int(each.num_tokens) for each in decoding), [])
        per_token = self._slower * self._curve[-1][1] / self._curve[-1][0]
        return elastic.chunk(step, per_token, STRETCH * step, NO_LIMIT)

    def note_arrival(self, request: Request) -> bool:
        """Note that a request came that is decoded here. Return whether it seems to be one that was told to stay."""
        staying = next((each for each in self._on_the_way if each.outcome is Outcome.STAYS), None)
        if staying is None:
            return False
        self._on_the_way.remove(staying)
        self.returned.add(request.request_id)
        return True

    def observe_decodes(self, rows: int, tokens: int, seconds: float) -> None:
        """Note that a step with decodes only took so long: `rows` of them, with `tokens` of context."""
        if self._feedback is not None and rows:
            self._feedback.observe(Step(rows, tokens, [], seconds, 0.0, [], 0.0))

    def observe_prompts(self, chunks: Iterable[tuple[int, int]], seconds: float) -> None:
        """Note that a step without decodes took so long. `chunks`: the first token that it computed of each prompt, and
        the first one that it left for later."""
        self._seen += WEIGHT * (seconds - self._seen)
        self._expected += WEIGHT * (
            sum(self._until(end) - self._until(begin) for begin, end in chunks) - self._expected
        )

    @property
    def _slower(self) -> float:
        """What prompts take, over what the profile says."""
        return self._seen / self._expected

    def take_counts(self) -> dict[str, float]:
        """Return what was decided since the last call, as counters (engine/metrics.py)."""
        counts, self.counts = self.counts, Counter()
        return {f"placements/{outcome}/{cause}": float(count) for (outcome, cause), count in counts.items()}

    def _moved(self, request: Request, outcome: Outcome, cause: Cause, row: tuple[int, int], seconds: float) -> Moved:
        self.counts[outcome.value, cause.value] += 1
        self._on_the_way.append(OnTheWay(self._clock() + ON_THE_WAY_S, outcome, row, seconds))
        return Moved(request, outcome, cause)

    def _forget(self) -> None:
        """Forget what has moved for so long that it is there by now."""
        now = self._clock()
        while self._on_the_way and self._on_the_way[0].until < now:
            self._on_the_way.popleft()

    def _sides(self, slacks: Sequence[Slack | None]) -> list[Slack]:
        """Return what decode engines can take over, less what is on its way to any of them."""
        tokens = sum(each.row[0] for each in self._on_the_way if each.outcome is Outcome.HANDED_OVER)
        return [
            msgspec.structs.replace(
                slack, prompt_backlog=slack.prompt_backlog + tokens, prompt_room=max(0, slack.prompt_room - tokens)
            )
            for slack in slacks
            if slack is not None
        ]

    def _computed(self, request: Request) -> int:
        """Return how many tokens of a request need not be computed here any more."""
        return int(request.num_computed_tokens) or self._cached(request)

    def _seconds(self, request: Request, computed: int) -> float:
        """Return what the rest of a prompt takes here."""
        return self._slower * (self._until(int(request.num_tokens)) - self._until(computed))

    def _until(self, tokens: int) -> float:
        """Return what a prompt takes by the profile up to so many tokens."""
        return elastic.prompt_seconds(self._curve, tokens)

    def _rows(self, decoding: Iterable[Request]) -> list[tuple[int, int]]:
        """Return tokens and expected growth of requests that are decoded here."""
        return [
            (int(each.num_tokens), self.lengths.expected_growth(int(each.num_output_tokens), each.max_tokens))
            for each in decoding
        ]

    def _row(self, request: Request) -> tuple[int, int]:
        """Return tokens and expected growth of a request whose prompt is to be computed."""
        limit = (request.kv_transfer_params or {}).get(STAY, NO_LIMIT)
        return int(request.num_tokens), self.lengths.expected_growth(0, limit)

    def _decode_seconds(self, request: Request) -> float:
        """Return what decoding a request adds to the work of an engine that decodes others already, in seconds."""
        if self._feedback is None:
            return 0.0
        costs, (tokens, growth) = self._feedback.costs, self._row(request)
        row = (costs.other(TYPICAL_ROWS) - costs.other(1)) / (TYPICAL_ROWS - 1)
        return growth * (row + costs.local * (tokens + growth / 2))

    def _held(self, decoding: Iterable[Request]) -> int:
        """Return how many blocks these requests have."""
        return sum(cdiv(int(each.num_tokens), self._block_size) for each in decoding)

    def _work(self, rows: Sequence[tuple[int, int]]) -> float:
        """Return how long requests take until the last one ends, in seconds."""
        if self._feedback is None:
            return 0.0
        seconds = elastic.work_seconds(self._feedback.costs, rows)
        # Until decodes have shown what they take, the profile is as wrong for them as it is for prompts.
        return seconds if self._feedback.corrections else self._slower * seconds
