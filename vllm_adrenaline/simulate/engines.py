"""What engines do in time: a prefill engine with an attention executor beside it, and the books of a decode engine.

Times are seconds, memory is blocks. The loop that moves them is in run.py.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from vllm_adrenaline.placement.batch import Progress
from vllm_adrenaline.placement.costs import Costs, Seconds
from vllm_adrenaline.placement.policy import Decision
from vllm_adrenaline.placement.prefill_admission import Blocks, should_defer_prefill
from vllm_adrenaline.system.arithmetic import cdiv, neighbours, on_line


@dataclass(eq=False)
class Row:
    """One request on its way through a prefill and a decode engine.

    Attributes:
        arrived: When it arrived (seconds).
        prompt: Tokens of its prompt.
        output: Tokens that it generates.
        prefill: Number of its prefill engine, and of the executor beside that.
        decode: Number of its decode engine.
        made: Tokens that it has generated.
        where: The prefill engine in whose memory its KV stays; None for the decode engine's.
        is_mapped: Whether the decode engine attends it there.
        blocks: Blocks that it holds: of the decode engine if its KV is there, else of the prefill engine.
        recompute: Whether its KV is lost.
        moving: Whether it was offloaded and waits for local blocks.
        decision: Why it may take local memory, if it may.
        waited: Whether it was counted as one that has to wait.
        starved_since: Since when it lacks a block to grow into (seconds).
        first_at: When it had its first token (seconds).
        last_at: When it had its last token so far (seconds).
    """

    arrived: float
    prompt: int
    output: int
    prefill: int
    decode: int
    made: int = 0
    where: int | None = None
    is_mapped: bool = False
    blocks: int = 0
    recompute: bool = False
    moving: bool = False
    decision: Decision | None = None
    waited: bool = False
    starved_since: float | None = None
    first_at: float = 0.0
    last_at: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens of its context so far."""
        return self.prompt + self.made

    # What admission asks (placement/admission.py, Pending)

    @property
    def executor(self) -> int:
        """Number of the executor beside its prompt."""
        return self.prefill

    @property
    def progress(self) -> Progress:
        """How far it is."""
        return Progress(self.prompt, self.made, self.output)

    @property
    def only_local(self) -> None:
        """No simulated request refuses cached KV, and no simulated prompt ends early."""


@dataclass
class Model:
    """What things cost. `costs`: the truth about decode steps; `overhead`, `row_overhead`: of the engine and its API
    around each step and each row of it; `prefill`: prompts by tokens; `pull`: seconds per token of moving KV; `shared`:
    whether executors run on their prefill engine's cores; `batch_tokens`: prompts computed together."""

    costs: Costs
    prefill: list[tuple[int, Seconds]]
    overhead: float = 0.0
    row_overhead: float = 0.0
    pull: float = 0.0
    shared: bool = True
    batch_tokens: int = 2048

    def prompt_seconds(self, tokens: int) -> float:
        """Return the seconds to compute a prompt: between measured sizes, and beyond them, on a line."""
        points = self.prefill
        if len(points) == 1:
            return points[0][1] * tokens / points[0][0]
        return max(on_line(*neighbours(points, tokens), tokens), 1e-6)


@dataclass(eq=False)
class Prefill:
    """A prefill engine: first come first served, as many prompts together as fit into `batch_tokens`.

    `waiting`: blocks of finished prompts that are not placed yet.
    """

    model: Model
    total: int
    block_size: int
    reserve: float = 0.05
    growth_reserve: float = 0.2
    free: int = 0
    held: int = 0
    waiting: int = 0
    queue: deque[Row] = field(default_factory=deque)
    batch: list[Row] = field(default_factory=list)
    done_at: float = 0.0
    busy: float = 0.0
    attended: float = 0.0
    _spans: deque[tuple[float, float]] = field(default_factory=deque)
    _began: float = 0.0

    def __post_init__(self) -> None:
        self.free = self.total

    def begin(self, now: float) -> bool:
        """Start computing what waits and fits; say whether there is something to compute now."""
        if self.batch:
            return False
        tokens, seconds = 0, 0.0
        while self.queue:
            row = self.queue[0]
            needed = cdiv(row.prompt, self.block_size)
            reserve = int(self.total * self.growth_reserve)
            lent, offers = self.held > self.waiting, self.held > 0
            blocks = Blocks(self.total, self.free, reserve, self.waiting, lent, offers)
            is_full = bool(self.batch) and tokens + row.prompt > self.model.batch_tokens
            if is_full or needed > self.free or should_defer_prefill(blocks, needed):
                break
            self.free -= needed
            self.held += needed
            row.blocks = needed
            tokens += row.prompt
            seconds += self.model.prompt_seconds(row.prompt)
            self.batch.append(self.queue.popleft())
        if not self.batch:
            return False
        self._began, self.done_at = now, now + seconds
        return True

    def end(self, now: float) -> list[Row]:
        """The batch is computed; return it."""
        done, self.batch = self.batch, []
        self._spans.append((self._began, now))
        self.busy += now - self._began
        self.waiting += sum(row.blocks for row in done)
        return done

    def release(self, blocks: int) -> None:
        """Blocks come back."""
        self.free += blocks
        self.held -= blocks

    def attend(self, seconds: float) -> None:
        """The executor attends for so long: on shared cores, prompts wait meanwhile."""
        self.attended += seconds
        if self.batch and self.model.shared:
            self.done_at += seconds

    def busy_share(self, now: float) -> float:
        """Return the share of the last second in which prompts were computed."""
        while self._spans and self._spans[0][1] < now - 1:
            self._spans.popleft()
        spans = [*self._spans, (self._began, now)] if self.batch else list(self._spans)
        return min(1.0, sum(end - max(begin, now - 1) for begin, end in spans if end > now - 1))

    @property
    def reserved(self) -> int:
        """Blocks that are never lent."""
        return int(self.total * self.reserve)

    @property
    def recalls(self) -> bool:
        """Whether a prompt waits for memory."""
        return bool(self.queue) and cdiv(self.queue[0].prompt, self.block_size) > self.free
