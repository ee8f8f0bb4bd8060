"""A prefill engine in simulation, with an attention executor beside it.

Times are seconds, memory is blocks. The loop that moves it is in run.py.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from vllm_adrenaline.placement.prefill_admission import Blocks, should_defer_prefill
from vllm_adrenaline.simulate.elastic import Elastic
from vllm_adrenaline.simulate.row import Model, Row
from vllm_adrenaline.system.arithmetic import cdiv


@dataclass(eq=False)
class Prefill:
    """A prefill engine: first come first served, as many prompts together as fit into the model's `batch_tokens`.

    Attributes:
        free, held: Blocks that nobody has, and those of prompts for decode engines.
        waiting: Blocks of finished prompts that are not placed yet.
        elastic: What decides about prompts that move; None if none does.
        staying: Rows that are decoded here.
        handed_over, finished: Rows that decode engines are to compute, and those that ended here, until they are taken.
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
    elastic: Elastic | None = None
    staying: list[Row] = field(default_factory=list)
    handed_over: list[Row] = field(default_factory=list)
    finished: list[Row] = field(default_factory=list)
    done_at: float = 0.0
    busy: float = 0.0
    attended: float = 0.0
    _stepping: bool = False
    _prompts: list[tuple[Row, int]] = field(default_factory=list)  # and how far they get in the step
    _decodes: list[Row] = field(default_factory=list)
    _spans: deque[tuple[float, float]] = field(default_factory=deque)
    _began: float = 0.0

    def __post_init__(self) -> None:
        self.free = self.total

    def begin(self, now: float) -> bool:
        """Start a step with what waits and fits; say whether there is something to compute now."""
        if self._stepping:
            return False
        self._move_work()
        self._decodes = [row for row in self.staying if self._grow(row)]
        seconds = self._decode_seconds()
        limit = self.elastic.chunk(self._decodes) if self.elastic is not None else None
        self._prompts = self._whole_prompts() if limit is None else self._in_chunks(limit)
        if not self._prompts and not self._decodes:
            return False
        seconds += sum(self.model.rest_seconds(row.computed, end) for row, end in self._prompts)
        self._stepping, self._began, self.done_at = True, now, now + seconds
        return True

    def end(self, now: float) -> list[Row]:
        """The step is over; return the rows whose prompts are done and that decode elsewhere."""
        self._stepping = False
        self._spans.append((self._began, now))
        self.busy += now - self._began
        self._observe(now - self._began)
        done = []
        for row in self._decodes:
            self._make_token(row, now)
        for row, end in self._prompts:
            row.computed = end
            if end < row.prompt:
                continue
            self.queue.remove(row)
            if row.stays:
                row.first_at = now
                self.staying.append(row)
                self._make_token(row, now)
            else:
                done.append(row)
        self.waiting += sum(row.blocks for row in done)
        return done

    def release(self, blocks: int) -> None:
        """Blocks come back."""
        self.free += blocks
        self.held -= blocks

    def attend(self, seconds: float) -> None:
        """The executor attends for so long: on shared cores, prompts wait meanwhile."""
        self.attended += seconds
        if self._stepping and self.model.shared:
            self.done_at += seconds

    def busy_share(self, now: float) -> float:
        """Return the share of the last second in which this engine computed."""
        while self._spans and self._spans[0][1] < now - 1:
            self._spans.popleft()
        spans = [*self._spans, (self._began, now)] if self._stepping else list(self._spans)
        return min(1.0, sum(end - max(begin, now - 1) for begin, end in spans if end > now - 1))

    @property
    def reserved(self) -> int:
        """Blocks that are never lent."""
        return int(self.total * self.reserve)

    @property
    def recalls(self) -> bool:
        """Whether a prompt waits for memory."""
        next_row = next((row for row in self.queue if not row.blocks), None)
        return next_row is not None and self._blocks(next_row.prompt) > self.free

    # Prompts

    def _whole_prompts(self) -> list[tuple[Row, int]]:
        """Return the prompts of a step without decodes, and their ends."""
        found: list[tuple[Row, int]] = []
        tokens = 0
        for row in self.queue:
            missing = row.prompt - row.computed
            if (found and tokens + missing > self.model.batch_tokens) or not self._take_blocks(row):
                break
            tokens += missing
            found.append((row, row.prompt))
        return found

    def _in_chunks(self, limit: int) -> list[tuple[Row, int]]:
        """Return the prompt of a step with decodes, of which at most `limit` tokens are computed, and how far it gets.

        One prompt at a time goes on (compat/scheduler.py, prompts_in_chunks).
        """
        row = self.queue[0] if self.queue else None
        if row is None or limit < 1 or not self._take_blocks(row):
            return []
        return [(row, min(row.prompt, row.computed + limit))]

    def _take_blocks(self, row: Row) -> bool:
        """Give a row the blocks of its prompt; say whether it has them."""
        if row.blocks:
            return True
        needed = self._blocks(row.prompt)
        growth = int(self.total * self.growth_reserve)
        blocks = Blocks(self.total, self.free, growth, self.waiting, self._lends, self.held > 0)
        if needed > self.free or (not row.stays and should_defer_prefill(blocks, needed)):
            return False
        self.free -= needed
        self.held += 0 if row.stays else needed
        row.blocks = needed
        return True

    @property
    def _lends(self) -> bool:
        return self.held > self.waiting

    def _blocks(self, tokens: int) -> int:
        return cdiv(tokens, self.block_size)

    # Elastic work

    def _move_work(self) -> None:
        """Have rows of the queue go elsewhere, or decode here. Those that stay come before all that waits."""
        if self.elastic is None or not self.queue:
            return
        kept = self.reserved + (int(self.total * self.growth_reserve) if self._lends else 0)
        begun = [row for row in self.queue if row.computed]
        fresh = [row for row in self.queue if not row.computed]
        stay, leave = self.elastic.decide([*self.staying, *begun], fresh, self.free - kept)
        for row in [*stay, *leave]:
            self.queue.remove(row)
        for row in leave:
            self.release(row.blocks)
            row.blocks = row.computed = 0
            row.is_handed_over = True
        self.handed_over += leave
        for row in reversed(stay):
            self.elastic.come_back(row)
            self.queue.insert(len(begun), row)

    def _grow(self, row: Row) -> bool:
        """Give a row that is decoded here the block that it needs for a token more; say whether it has it."""
        missing = self._blocks(row.tokens) - row.blocks
        if missing > self.free:
            return False
        self.free -= max(0, missing)
        row.blocks += max(0, missing)
        return True

    def _decode_seconds(self) -> float:
        if not self._decodes:
            return 0.0
        costs = self.model.prefill_costs or self.model.costs
        step = costs.seconds(len(self._decodes), sum(row.tokens for row in self._decodes), [])
        return step + self.model.overhead + self.model.row_overhead * len(self._decodes)

    def _make_token(self, row: Row, now: float) -> None:
        row.made += 1
        row.last_at = now
        if row.made == row.output:
            self.staying.remove(row)
            self.free += row.blocks
            row.blocks = 0
            self.finished.append(row)
            if self.elastic is not None:
                self.elastic.rules.lengths.ended(row.output)

    def _observe(self, seconds: float) -> None:
        if self.elastic is None:
            return
        if not self._prompts:
            self.elastic.rules.observe_decodes(len(self._decodes), sum(row.tokens for row in self._decodes), seconds)
        elif not self._decodes:
            self.elastic.rules.observe_prompts([(row.computed, end) for row, end in self._prompts], seconds)
