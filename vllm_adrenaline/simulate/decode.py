"""A decode engine in simulation: continuous batching over local and remote blocks.

Who is placed where is decided by the code that decides it in a real engine (placement/admission.py). A step does what
a real one does, in the same order: pending requests are admitted, starved ones leave, running ones grow, and then
waiting ones start (decode/scheduler.py, and vLLM's scheduler below it).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from vllm_adrenaline.colocation.recent_steps import RecentSteps
from vllm_adrenaline.control.messages import Slack
from vllm_adrenaline.decode.own_prompts import OwnPrompts
from vllm_adrenaline.placement.admission import Admission, Settings
from vllm_adrenaline.placement.batch import Batch
from vllm_adrenaline.placement.policy import Placement, Reason
from vllm_adrenaline.placement.pools import ExecutorPool, LocalPool, Pools
from vllm_adrenaline.placement.starvation import reserve_growth
from vllm_adrenaline.simulate.prefill import Prefill
from vllm_adrenaline.simulate.row import Row
from vllm_adrenaline.simulate.setup import Setup
from vllm_adrenaline.system.arithmetic import cdiv

ANY_LENGTH = 1 << 20
"""Stands for the longest answer."""
IDLE_S = 0.001
"""How long an engine with nothing to run waits before it looks again."""


class Decode:
    """A decode engine in simulated time.

    `pull(now, row, remote_blocks)` starts a transfer; `pulled` tells of its end. `tpot` is what it last told prefill
    engines of its steps, in seconds.
    """

    def __init__(self, setup: Setup, prefills: Sequence[Prefill], pull: Callable[[float, Row, int], None]) -> None:
        self.setup, self.prefills, self._pull = setup, prefills, pull
        settings = Settings(setup.block_size, setup.max_rows, setup.rule, setup.tpot_slo)
        self.admission = Admission(settings, setup.believed or setup.model.costs, setup.ratio)
        self.free = setup.decode_blocks
        self.stepping = False
        self.preemptions = self.moved = self.steps = self.row_steps = 0
        self.exposed = self.tpot = 0.0
        self._recent_steps, self._began = RecentSteps(), 0.0
        self._pending: dict[Row, None] = {}  # an ordered set
        self._waiting: deque[Row] = deque()
        self._pulling: list[Row] = []
        self._received: deque[Row] = deque()
        self._running: list[Row] = []
        self._active: list[Row] = []
        self._batch = Batch()
        self._took: tuple[float, float, list[float], float] = (0.0, 0.0, [], 0.0)
        self._own: OwnPrompts | None = None
        self._chunks: list[tuple[Row, int]] = []  # tokens of prompts that the present step computes
        if setup.elastic != "off":
            takes_over = setup.elastic in ("prompts", "both")
            self._own = OwnPrompts(self.admission.feedback.costs, setup.tpot_slo, setup.model.batch_tokens, takes_over)

    def arrive(self, row: Row) -> None:
        """A row's prompt is computed, or it is to be computed here."""
        if row.is_handed_over or not self.prefills:
            row.own = row.prompt
        else:
            self._pending[row] = None
        self._waiting.append(row)

    def pulled(self, row: Row) -> None:
        """A row's KV is here."""
        self._pulling.remove(row)
        self._received.append(row)

    @property
    def computes(self) -> bool:
        """Whether the present step computes anything: else the engine only waits for something to do."""
        return bool(self._active or self._chunks)

    @property
    def slack(self) -> Slack:
        """What this engine could do of a prefill engine's work, as it tells it (decode/scheduler.py, _tell_slack)."""
        assert self._own is not None
        own = [row for row in (*self._running, *self._waiting) if row.own]
        batch, admission = self._load(), self.admission
        for row in self._waiting:
            if row.own:
                batch.add(row.progress, None)
        unborn = sum(self._blocks(row.tokens) for row in own if not row.blocks)
        return self._own.slack(
            step=admission.step_seconds(self._decoding(), len(self.prefills)),
            work=admission.work_seconds(batch, [row.progress for row in self._pending]),
            memory=admission.own_memory(self.free - unborn, batch),
            growth=admission.lengths.expected_growth(0, ANY_LENGTH),
            missing=sum(row.own for row in own),
            is_full=any(row.waited for row in self._pending) or len(self._running) >= self.setup.max_rows,
        )

    def begin_step(self, now: float) -> float:
        """Place what waits and start a step; return its seconds, 0 when there is nothing to do until somebody comes."""
        self._admit(now)
        starved = self._starve(now)
        preemptions = self.preemptions
        self._active = self._grow(starved)
        if self.preemptions == preemptions:
            self._active += self._start(now)
        self._chunks = self._next_chunks()
        if not self.computes:
            self.stepping = bool(self._running or self._received)
            return IDLE_S if self.stepping else 0.0
        self.stepping, self._began = True, now
        self._batch = self._load()
        return self._seconds()

    def end_step(self, now: float) -> list[Row]:
        """Every row has one more token; return those that are done."""
        self.stepping = False
        done = []
        for row, tokens in self._chunks:
            row.own -= tokens
            if not row.own:  # its last token makes the next one
                self._active.append(row)
        for row in self._active:
            row.made += 1
            row.last_at = now
            if row.made == 1:
                row.first_at = now
            if row.made == row.output:
                done.append(row)
                self.admission.lengths.ended(row.output)
                self._give_back(row)
        if done:
            self._running = [row for row in self._running if row.made < row.output]
        if self._active and self.prefills:
            total, local, remote, exposed = self._took
            # As a real engine, it sees how long a step took from its start to its end, on a shared device as well.
            total = now - self._began if total else 0.0
            self.tpot = self._recent_steps.note(total)
            self.admission.observe_step(self._batch, total, local, remote, exposed)
        return done

    def _seconds(self) -> float:
        """Return what the step takes, and note what is observed of it."""
        model, executors = self.setup.model, len(self.prefills)
        local = sum(row.tokens for row in self._active if row.where is None or row.is_mapped)
        rows, tokens = [0] * executors, [0] * executors
        for row in self._active:
            if row.where is not None and not row.is_mapped:
                rows[row.where] += 1
                tokens[row.where] += row.tokens
        costs, remote = model.costs, list(zip(rows, tokens, strict=True))
        seconds = costs.seconds(len(self._active), local, remote)
        seconds += model.overhead + model.row_overhead * len(self._active)
        attended = [costs.remote_seconds(e, r, t) if r else 0.0 for e, (r, t) in enumerate(remote)]
        # An executor says how long it computed. A link to another host keeps neither it nor its prompts busy.
        busy = [seconds - costs.link_seconds(e) if seconds else 0.0 for e, seconds in enumerate(attended)]
        for engine, computed in zip(self.prefills, busy, strict=True):
            engine.attend(computed)
        exposed = max(0.0, max(attended, default=0.0) - costs.local * local)
        recomputed = [row for row in self._active if row.recompute]
        for row in recomputed:
            seconds += model.prompt_seconds(row.tokens)
            row.recompute = False
        for row, chunk in self._chunks:
            seconds += model.rest_seconds(row.tokens - row.own, row.tokens - row.own + chunk)
            recomputed.append(row)
        if self._chunks and self._own is not None:
            believed = self.admission.step_seconds(self._decoding(), executors)
            self._own.observe(seconds, believed, [chunk for _, chunk in self._chunks])
        self.exposed += exposed
        self.steps += 1
        self.row_steps += len(self._active)
        self._took = (0.0 if recomputed else seconds, costs.local * local if any(rows) else 0.0, busy, exposed)
        return seconds

    def _decoding(self) -> Batch:
        """Return the rows that decode."""
        batch = Batch()
        for row in self._running:
            if not row.own:
                batch.add(row.progress, row.where, row.is_mapped)
        return batch

    def _next_chunks(self) -> list[tuple[Row, int]]:
        """Return the rows of whose prompts this step computes something, and how many tokens of each.

        With elastic work it is one (compat/scheduler.py, prompts_in_chunks). An aggregated engine computes as many as
        fit, after a token of each row that decodes.
        """
        own = [row for row in self._running if row.own]
        if not own:
            return []
        if self._own is not None:
            step = self.admission.step_seconds(self._decoding(), len(self.prefills))
            return [(own[0], min(own[0].own, self._own.chunk(step)))]
        left, chunks = self.setup.model.batch_tokens - len(self._active), []
        for row in own:
            if left > 0:
                chunks.append((row, min(row.own, left)))
                left -= row.own
        return chunks

    # Placement: admission in this engine's terms

    def _admit(self, now: float) -> None:
        """Decide about pending rows, and whether a running one moves."""
        admission = self.admission
        admission.begin_step(any(row.where is not None for row in self._placed()))
        if not admission.is_move_due and not self._pending:
            return
        batch, pools = self._load(), self._pools(now)
        if admission.is_move_due:
            movable = [row for row in self._running if row.where is not None and row.made]
            if found := admission.choose_move(pools, batch, movable):
                self._move(*found)
                pools = pools.with_local_taken(self._blocks(found[0].tokens))
        for row, decision in admission.admit(self._pending, pools, batch):
            if decision.placement in (Placement.OFFLOADED, Placement.MAPPED):
                self._leave_queue(row)
                row.where, row.is_mapped = row.prefill, decision.placement is Placement.MAPPED

    def _placed(self) -> Iterator[Row]:
        """Yield the rows that hold memory here or beside a prefill engine, or are on their way to it."""
        yield from self._running
        yield from self._pulling
        yield from self._received
        for row in self._waiting:
            if row.moving or row.where is not None:
                yield row

    def _load(self) -> Batch:
        batch = Batch()
        for row in self._placed():
            batch.add(row.progress, row.where, row.is_mapped)
        return batch

    def _pools(self, now: float) -> Pools:
        executors = [
            ExecutorPool(
                total=engine.total,
                free=engine.free,
                reserve=engine.reserved,
                available=self.setup.pool != "mapped",
                mappable=self.setup.pool != "remote",
                busy=engine.busy_share(now),
                recalls=engine.recalls,
            )
            for engine in self.prefills
        ]
        return Pools(LocalPool(self.setup.decode_blocks, self.free), executors)

    def _leave_queue(self, row: Row) -> None:
        del self._pending[row]
        self.prefills[row.prefill].waiting -= row.blocks

    def _move(self, row: Row, reason: Reason) -> None:
        """An offloaded row goes on here as soon as it has local blocks, its KV pulled."""
        self.moved += 1
        self.admission.count_move(reason)
        self._running.remove(row)
        row.where, row.is_mapped, row.moving = None, False, True
        self._waiting.appendleft(row)

    # Memory, as vLLM's scheduler and decode/leases.py give it

    def _blocks(self, tokens: int) -> int:
        return cdiv(tokens, self.setup.block_size)

    def _missing(self, row: Row) -> int:
        return self._blocks(row.tokens) - row.blocks

    def _give_back(self, row: Row) -> None:
        if row.where is None:
            self.free += row.blocks
        else:
            self.prefills[row.where].release(row.blocks)
        row.blocks = 0

    def _starve(self, now: float) -> set[Row]:
        """Return the offloaded rows that lack a block in this step. Who has lacked one for long goes on here."""
        growing = [(row, row.where, self._missing(row)) for row in self._running if row.where is not None]
        free = {number: max(0, engine.free - engine.reserved) for number, engine in enumerate(self.prefills)}
        waiting, leaving = reserve_growth(growing, free, now)
        for row in leaving:
            if self._blocks(row.tokens) <= self.free:
                self._move(row, Reason.STARVED)
            else:
                self._preempt(row)
        return set(waiting)

    def _grow(self, starved: set[Row]) -> list[Row]:
        """Give running rows the blocks they need for this step; return those that run."""
        # Offloaded ones first: preempting one of them would free no local memory.
        self._running.sort(key=lambda row: row.where is None)
        active: list[Row] = []
        for row in list(self._running):
            if row in starved or row.recompute or row.own:
                continue
            missing = self._missing(row)
            if missing <= 0:
                active.append(row)
                continue
            if row.where is not None:
                engine = self.prefills[row.where]
                engine.free -= missing
                engine.held += missing
            else:
                while self.free < missing and row.blocks:
                    self._preempt(self._running[-1])  # in the end it is the row itself
                if not row.blocks:
                    break
                self.free -= missing
            row.blocks += missing
            active.append(row)
        return active

    def _start(self, now: float) -> list[Row]:
        """Let waiting rows start, first come first served; return those that decode in this step."""
        active: list[Row] = []
        own: list[Row] = []
        while self._received and len(self._running) + len(active) < self.setup.max_rows:
            active.append(self._received.popleft())
        for row in list(self._waiting):
            if len(self._running) + len(active) + len(own) >= self.setup.max_rows:
                break
            if row in self._pending and row.decision is None:
                continue
            needed = self._blocks(row.tokens) if row.where is None else 0
            if needed > self.free:
                break
            self.free -= needed
            self._waiting.remove(row)
            if row in self._pending:
                self._leave_queue(row)
                self.admission.count_local(row)
            if row.own:
                own.append(row)
            elif row.where is None and not row.recompute:
                self._pulling.append(row)
                self._pull(now, row, row.blocks)
            else:
                active.append(row)
            row.moving = False
            if row.where is None:
                row.blocks = needed
        self._running += active + own
        return active

    def _preempt(self, row: Row) -> None:
        self.preemptions += 1
        self._give_back(row)
        row.where, row.is_mapped = None, False
        if self._own is not None or not self.prefills:
            row.own = row.tokens
        else:
            row.recompute = True
        self._running.remove(row)
        self._waiting.appendleft(row)
