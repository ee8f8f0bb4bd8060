"""A decode engine in simulation: continuous batching over local and remote blocks, placed by the real policy."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vllm_adrenaline.placement.feedback import Feedback, Step
from vllm_adrenaline.placement.memory import Memory
from vllm_adrenaline.placement.output_length import OutputLengths
from vllm_adrenaline.placement.policy import Candidate, Decision, EngineState, Observed, Placement, Reason, move, place
from vllm_adrenaline.simulate.engines import Prefill, Row

if TYPE_CHECKING:
    from vllm_adrenaline.simulate.run import Setup

MOVE_EVERY, SEEN = 32, 64
"""As in vllm_adrenaline/decode/placer.py and waiting.py."""


class Decode:
    """See the module. `pull(now, row, remote_blocks)` starts a transfer whose end is told by `pulled`."""

    def __init__(self, setup: Setup, prefills: Sequence[Prefill], pull: Callable[[float, Row, int], None]) -> None:
        self.setup, self.prefills, self._pull = setup, prefills, pull
        self.free = setup.decode_blocks
        self.feedback = Feedback(setup.believed or setup.model.costs)
        self.lengths = OutputLengths()
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []
        self.pulling: list[Row] = []
        self.stepping = False
        self.placements: Counter[str] = Counter()
        self.preemptions = self.moved = self.steps = self.row_steps = 0
        self.exposed = 0.0
        self._decided = self._offloaded = self._since_move = 0
        self._active: list[Row] = []
        self._step: Step | None = None

    def pulled(self, row: Row) -> None:
        """A row's KV is here."""
        self.pulling.remove(row)
        self.running.append(row)

    def begin_step(self, now: float) -> float:
        """Place what waits and start a step; return its seconds, 0 when there is nothing to run."""
        if self.running:
            self._move(now)
        self._place(now)
        self._active = self._grown()
        while self.running and not self._active:
            # Nobody can grow where it is: the oldest goes on here, recomputed, as a starved request does.
            self._preempt(self.running[0])
            self._place(now)
            self._active = self._grown()
        if not self._active:
            return 0.0
        recomputed = [row for row in self._active if row.recompute]
        model, executors = self.setup.model, len(self.prefills)
        local = sum(row.tokens for row in self._active if row.where is None)
        rows, tokens = [0] * executors, [0] * executors
        for row in self._active:
            if row.where is not None:
                rows[row.where] += 1
                tokens[row.where] += row.tokens
        costs, remote = model.costs, list(zip(rows, tokens, strict=True))
        seconds = costs.seconds(len(self._active), local, remote)
        seconds += model.overhead + model.row_overhead * len(self._active)
        away = [costs.remote_seconds(e, r, t) if r else 0.0 for e, (r, t) in enumerate(remote)]
        for engine, busy in zip(self.prefills, away, strict=True):
            engine.attend(busy)
        exposed = max(0.0, max(away, default=0.0) - costs.local * local)
        self.exposed += exposed
        for row in recomputed:
            seconds += model.prompt_seconds(row.tokens)
            row.recompute = False
        self.steps += 1
        self.row_steps += len(self._active)
        measured = costs.local * local if any(rows) else 0.0
        total = 0.0 if recomputed else seconds
        self._step = Step(len(self._active), local, tokens, total, measured, away, exposed)
        self.stepping = True
        return seconds

    def end_step(self, now: float) -> list[Row]:
        """Every row has one more token; return those that are done."""
        self.stepping = False
        done = []
        for row in self._active:
            row.made += 1
            row.last_at = now
            if row.made == 1:
                row.first_at = now
            if row.made == row.output:
                done.append(row)
                self.lengths.ended(row.output)
                self._give_back(row)
        if done:
            self.running = [row for row in self.running if row.made < row.output]
        if self._step is not None:
            self.feedback.observe(self._step)
        return done

    # Memory

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.setup.block_size)

    def _give_back(self, row: Row) -> None:
        if row.where is None:
            self.free += row.blocks
        else:
            self.prefills[row.where].release(row.blocks)
        row.blocks = 0

    def _grown(self) -> list[Row]:
        """Return the rows that run in this step, with the blocks they need."""
        before = self.preemptions
        active = [row for row in list(self.running) if self._grow(row)]
        if self.preemptions > before:  # some may have lost their place to those after them
            active = [row for row in active if not row.recompute or row in self.running]
        return active

    def _grow(self, row: Row) -> bool:
        """Give a row the block it needs for this step; say whether it can run."""
        if row not in self.running:
            return False
        needed = self._blocks(row.tokens) - row.blocks
        if needed <= 0:
            return True
        if row.where is not None:
            engine = self.prefills[row.where]
            if engine.free < needed:
                return False  # it sits this step out
            engine.free -= needed
            engine.held += needed
        else:
            while self.free < needed:
                last = next(r for r in reversed(self.running) if r.where is None)
                self._preempt(last)
                if last is row:
                    return False
            self.free -= needed
        row.blocks += needed
        return True

    def _preempt(self, row: Row) -> None:
        self.preemptions += 1
        self._give_back(row)
        row.where, row.recompute = None, True
        self.running.remove(row)
        self.waiting.appendleft(row)

    # Placement, as the real scheduler asks for it

    def _growth(self, row: Row) -> int:
        return self.lengths.expected_growth(row.made, row.output)

    def _candidate(self, row: Row) -> Candidate:
        return Candidate(row.prefill, row.tokens, self._growth(row), row.prompt + row.output)

    def _observed(self, now: float) -> Observed:
        size, setup = self.setup.block_size, self.setup
        lengths: defaultdict[int | None, list[tuple[int, int]]] = defaultdict(list)
        blocks: Counter[int | None] = Counter()
        tokens: Counter[int | None] = Counter()
        for row in (*self.running, *self.pulling):
            lengths[row.where].append((row.tokens, self._growth(row)))
            blocks[row.where] += self._blocks(row.tokens)
            tokens[row.where] += row.tokens
        executors = []
        for number, engine in enumerate(self.prefills):
            reserve = int(engine.total * engine.reserve)
            executors.append(
                EngineState(
                    capacity=(engine.total - reserve) * size,
                    memory=Memory(max(0, engine.free - reserve) + blocks[number], size, lengths[number]),
                    rows=len(lengths[number]),
                    tokens=tokens[number],
                    busy=engine.busy_share(now),
                    recalls=engine.recalls,
                )
            )
        memory = Memory(self.free + blocks[None], size, lengths[None])
        decode = EngineState(setup.decode_blocks * size, memory, len(lengths[None]), tokens[None])
        return Observed(
            decode,
            executors,
            self.feedback.costs,
            setup.rule,
            setup.tpot_slo,
            setup.max_rows,
            setup.ratio,
            self._decided,
            self._offloaded,
        )

    def _place(self, now: float) -> None:
        blocked, by_load = False, self.setup.ratio is None
        full: set[int] = set()
        for row in list(self.waiting)[:SEEN]:
            if len(self.running) + len(self.pulling) >= self.setup.max_rows:
                return
            if row.recompute or (row.placed and row.where is None):
                if not self._goes_local(now, row):
                    blocked = True
                    if not by_load:
                        return  # first come first served, as in vLLM
                continue
            if row.prefill in full:
                continue
            decision = place(self._observed(now), self._candidate(row))
            if decision.placement is Placement.OFFLOADED:
                self.waiting.remove(row)
                self.prefills[row.prefill].waiting -= row.blocks
                row.where = row.prefill
                self.running.append(row)
                self._count(decision)
            elif decision.placement is Placement.WAIT or blocked:
                blocked = True
                if decision.placement is Placement.WAIT:
                    full.add(row.prefill)
                    if not row.waited:
                        row.waited = True
                        self.placements[f"wait/{decision.reason.value}"] += 1
            else:
                if not by_load:
                    row.placed = True
                    self._count(decision)
                if not self._goes_local(now, row):
                    if not by_load:
                        return
                    blocked = True
                elif by_load:
                    self._count(decision)

    def _goes_local(self, now: float, row: Row) -> bool:
        needed = self._blocks(row.tokens)
        if needed > self.free:
            return False
        self.waiting.remove(row)
        self.free -= needed
        remote, row.blocks = row.blocks, needed
        if row.recompute:
            self.running.append(row)
        else:
            self.prefills[row.prefill].waiting -= remote
            self.pulling.append(row)
            self._pull(now, row, remote)
        return True

    def _count(self, decision: Decision) -> None:
        self.placements[f"{decision.placement.value}/{decision.reason.value}"] += 1
        self._decided += 1
        self._offloaded += decision.placement is Placement.OFFLOADED

    def _move(self, now: float) -> None:
        self._since_move = (self._since_move + 1) % MOVE_EVERY
        if self.setup.ratio is not None or self._since_move:
            return
        offloaded = [row for row in self.running if row.where is not None and row.made]
        found = move(self._observed(now), [self._candidate(row) for row in offloaded]) if offloaded else None
        if found is not None:
            self._take(now, offloaded[found[0]], found[1])

    def _take(self, now: float, row: Row, reason: Reason) -> None:
        needed = self._blocks(row.tokens)
        if needed > self.free:
            return
        self.moved += 1
        self.placements[f"moved/{reason.value}"] += 1
        self.running.remove(row)
        self.free -= needed
        remote, row.blocks, row.where = row.blocks, needed, None
        self.pulling.append(row)
        self._pull(now, row, remote)
