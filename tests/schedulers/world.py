"""A prefill and a decode engine in one process, in time that the test makes: for state machines.

Schedulers, lease manager, handlers and both ends of the control plane are the real ones. Played are the wire, the
clock, the workers, NIXL and the executor. Memory holds what would be wrong: a cell, the k and v of one token in one
block, is a number that stands for all tokens up to that one. So a row that attends a stale, foreign or unwritten cell
is noticed.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from tests.schedulers.conftest import BLOCK, Engine
from vllm_adrenaline.control import messages, server, sockets
from vllm_adrenaline.control.client import PrefillClient
from vllm_adrenaline.control.server import ControlServer
from vllm_adrenaline.engine.setup import PEERS_START_TOO
from vllm_adrenaline.prefill import executor_pool
from vllm_adrenaline.prefill.executor_pool import ExecutorPool

TOKENS = 500
"""Tokens that the played model makes are below this number, so that WORTHLESS is none of them."""
WORTHLESS = 511
"""The token of a row whose executor failed."""
LATE, OTHERS = -1, -2
"""What is in cells that an executor wrote too late, and in blocks of another decode engine."""


def marks(tokens: Sequence[int]) -> list[int]:
    """Return what the cells of these tokens hold."""
    made, mark = [], 0
    for token in tokens:
        mark = hash((mark, token))
        made.append(mark)
    return made


def next_token(tokens: Sequence[int]) -> int:
    """Return what the played model says after these tokens."""
    return marks(tokens)[-1] % TOKENS


def answer_to(prompt: Sequence[int], length: int) -> list[int]:
    """Return what plain vLLM would answer with the played model."""
    tokens = list(prompt)
    for _ in range(length):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class Memory(defaultdict[int, list[int]]):
    """The KV cache of one worker: the cells of each block."""

    def __init__(self) -> None:
        super().__init__(lambda: [0] * BLOCK)


@dataclass
class Row:
    """A request in a step: its tokens so far, of which [start, end) are computed, and its block table."""

    name: str
    tokens: list[int]
    start: int
    end: int
    table: list[int]

    def cells(self, memory: Callable[[int], list[int]], begin: int = 0) -> list[tuple[list[int], int, int]]:
        """Return block, offset in it and what belongs there, for all cells from `begin` to the end of the step."""
        expected = marks(self.tokens[: self.end])
        return [(memory(self.table[at // BLOCK]), at % BLOCK, expected[at]) for at in range(begin, self.end)]


class Tables:
    """The block tables of a worker, as its scheduler tells them step by step."""

    def __init__(self) -> None:
        self._tables: dict[str, list[int]] = {}

    def rows(self, scheduled: Any, requests: dict[str, Any]) -> list[Row]:
        """Take what was scheduled; return the rows of the step."""
        for name in scheduled.finished_req_ids:
            self._tables.pop(name, None)
        starts = {}
        for new in scheduled.scheduled_new_reqs:
            self._tables[new.req_id] = list(new.block_ids[0])
            starts[new.req_id] = new.num_computed_tokens
        cached = scheduled.scheduled_cached_reqs
        for name, blocks, start in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True):
            if name in cached.resumed_req_ids:
                self._tables[name] = []
            self._tables[name] += blocks[0] if blocks is not None else []
            starts[name] = start
        return [
            Row(name, list(requests[name].all_token_ids), start, start + count, list(self._tables[name]))
            for name, count in scheduled.num_scheduled_tokens.items()
            for start in [starts[name]]
        ]


class Wire:
    """What one prefill engine and its decode engines say to each other, which stays under way until it is delivered."""

    def __init__(self) -> None:
        self.to_prefill: deque[tuple[bytes, bytes]] = deque()
        self.to_decode: dict[bytes, deque[bytes]] = {}
        self.peers = 0

    def connect(self) -> bytes:
        """Return the name of a new connection."""
        self.peers += 1
        name = b"peer %d" % self.peers
        self.to_decode[name] = deque()
        return name


class Line(PrefillClient):
    """A decode engine's line to a prefill engine, without a thread: `turn` does what the thread does when it wakes."""

    def __init__(self, wire: Wire, address: str, identity: messages.Identity, engine: str) -> None:
        super().__init__(address, identity, engine)
        self._wire = wire
        self.peer_name = b""

    def start(self) -> None:
        self._connect()

    def _connect(self) -> None:
        self._wire.to_decode.pop(self.peer_name, None)
        self.peer_name = self._wire.connect()
        self._said.clear()
        self._heard_at = self._say(self, self._hello)  # type: ignore[arg-type]

    def send(self, frame: bytes) -> None:
        """Send a frame, as a socket does."""
        self._wire.to_prefill.append((self.peer_name, frame))

    def recv_multipart(self) -> list[bytes]:
        """Receive a frame, as a socket does."""
        return [self._wire.to_decode[self.peer_name].popleft()]

    def turn(self, now: float, beats: bool) -> None:
        """Hear what has arrived, send what was posted, and perhaps a heartbeat or hello."""
        while self._wire.to_decode[self.peer_name]:
            self._heard_at = now
            if not self._hear(self):  # type: ignore[arg-type]
                self._connect()
                return
        while self.welcome is not None and self._outbox:
            life, message = self._outbox.popleft()
            if life is None or life == self._life:
                self.send(messages.encode(message))
        if beats:
            beat = messages.Heartbeat(self.tpot, self.waiting, self.offloads, self.slack)
            self._say(self, beat if self.welcome is not None else self._hello)  # type: ignore[arg-type]
        if self.welcome is not None and now - self._heard_at > self.welcome.lease_seconds:
            self.end(f"is silent for {self.welcome.lease_seconds} s")

    def end(self, why: str) -> None:
        """The present life of the prefill engine has ended, or seems to."""
        self._end_life(why)
        self._connect()


class Mapping:
    """Who has a prefill engine's memory mapped: as prefill/mappers.py, without processes."""

    def __init__(self) -> None:
        self.members: set[str] = set()

    def may_write(self, member: str) -> bool:
        """Whether this member could still write."""
        return member in self.members

    def wait(self, member: str) -> None:
        """Return when it cannot: the test calls this only then."""
        assert not self.may_write(member)

    def let_go(self, member: str) -> None:
        """It has let go."""
        self.members.discard(member)

    forget = let_go


class Prefill:
    """A life of a prefill engine: its scheduler, its worker, its control server, and what NIXL holds for it."""

    def __init__(self, start: Callable[[], Engine], engine_id: str) -> None:
        self.engine, self.engine_id = start(), engine_id
        self.memory, self._tables, self.mapping = Memory(), Tables(), Mapping()
        self.scheduler = self.engine.scheduler
        self.scheduler.lending.mappers = self.mapping
        self.control: ControlServer = self.scheduler.control
        self.held: set[str] = set()
        self.finished: dict[str, dict[str, Any]] = {}

    def step(self, let_go: set[str]) -> None:
        """One step. `let_go`: prompts that NIXL holds no longer, besides those that it is told of."""
        scheduled = self.engine.schedule()
        rows = self._tables.rows(scheduled, self.scheduler.requests)
        for row in rows:
            for block, offset, mark in row.cells(self.memory.__getitem__, row.start):
                block[offset] = mark
        for row in rows:
            check(row, self.memory.__getitem__, "prefill")
        sent = self.held & (let_go | set(scheduled.kv_connector_metadata.let_go))
        self.held -= sent
        tokens = {row.name: [next_token(row.tokens)] if row.end >= len(row.tokens) else [] for row in rows}
        outputs = self.engine.scheduler.update_from_output(scheduled, model_output(tokens, finished_sending=sent))
        for each in outputs.values():
            for output in each.outputs:
                if output.kv_transfer_params:
                    self.finished[output.request_id] = dict(output.kv_transfer_params)
                    self.held.add(output.request_id)


def check(row: Row, memory: Callable[[int], list[int]], where: str) -> None:
    """Assert that a row attends its own tokens and nothing else."""
    for at, (block, offset, mark) in enumerate(row.cells(memory)):
        assert block[offset] == mark, f"{where}: token {at} of {row.name} is attended as {block[offset]}, not {mark}"


def model_output(tokens: dict[str, list[int]], **transfers: Any) -> Any:
    """Return what vLLM's worker says at the end of a step."""
    from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

    return ModelRunnerOutput(
        req_ids=list(tokens),
        req_id_to_index={name: index for index, name in enumerate(tokens)},
        sampled_token_ids=list(tokens.values()),
        kv_connector_output=KVConnectorOutput(**transfers),
    )


@dataclass
class World:
    """Time, the wire, and what is played instead of sockets, threads and processes."""

    now: float = 1000.0
    wire: Wire = field(default_factory=Wire)
    lines: list[Line] = field(default_factory=list)
    later: list[Callable[[], None]] = field(default_factory=list)
    prefill: Prefill | None = None
    killed: Callable[[], None] = lambda: None
    revoked: Callable[[str], None] = lambda engine: None

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Put what is played into the place of what is not."""
        clock = SimpleNamespace(monotonic=lambda: self.now, perf_counter=lambda: self.now, sleep=self._sleep)
        for module in ("client", "server"):
            patch.setattr(f"vllm_adrenaline.control.{module}.time", clock)
        for module in ("scheduler", "request_table", "leases", "admission"):
            patch.setattr(f"vllm_adrenaline.decode.{module}.time", clock)
        patch.setattr("vllm_adrenaline.prefill.scheduler.time", clock)
        patch.setattr("vllm_adrenaline.decode.request_table.CLAIM_WAIT_S", 0.0)
        patch.setattr("vllm_adrenaline.decode.scheduler.PrefillClient", self._line)
        patch.setenv(PEERS_START_TOO, "1")
        patch.setattr(ControlServer, "start", lambda control: None)
        patch.setattr(ControlServer, "stop", lambda control: None)
        played = SimpleNamespace(bind=lambda address: (object(), address), unbind=lambda *_: None, answer=self._answer)
        played.refusal = sockets.refusal
        patch.setattr(server, "sockets", played)
        patch.setattr(server, "threading", SimpleNamespace(Thread=self._thread, Event=threading.Event))
        executors = ExecutorPool([], passing=SimpleNamespace())  # type: ignore[arg-type]
        patch.setattr(executors, "kill", lambda pids: self.killed())
        patch.setattr(executors, "revoke", self.revoked)
        patch.setattr(executor_pool, "_active", executors)

    def _line(self, address: str, identity: messages.Identity, engine: str, beyond_loopback: bool) -> Line:
        self.lines = [Line(self.wire, address, identity, engine)]
        return self.lines[0]

    def _answer(self, socket: object, peer: bytes, message: messages.Message) -> None:
        if peer in self.wire.to_decode:
            self.wire.to_decode[peer].append(messages.encode(message))

    def _thread(self, target: Callable[..., None], args: tuple[Any, ...], **_: Any) -> Any:
        return SimpleNamespace(start=lambda: self.later.append(partial(target, *args)))

    def _sleep(self, seconds: float) -> None:
        """Somebody waits: go on with the conversation."""
        self.now += seconds
        self.deliver()
        self.turn()

    def deliver(self) -> None:
        """Have the prefill engine answer all that is under way to it, and see who is silent."""
        if self.prefill is None:
            self.wire.to_prefill.clear()
            return
        control = self.prefill.control
        while self.wire.to_prefill:
            peer, frame = self.wire.to_prefill.popleft()
            answer = control._answer(peer, messages.decode(frame))
            if answer is not None:
                self._answer(None, peer, answer)
        control._tick()

    def turn(self, beats: bool = True) -> None:
        """Have the decode engine hear what is under way to it, and say what it has to say."""
        for line in self.lines:
            line.turn(self.now, beats)

    def join(self, identity: messages.Identity, peer: bytes) -> None:
        """Another decode engine says hello."""
        assert self.prefill is not None
        hello = messages.Hello(identity, True, peer.decode())
        assert isinstance(self.prefill.control._answer(peer, hello), messages.Welcome)
