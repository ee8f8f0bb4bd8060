"""Whatever happens, in whatever order: every answer is plain vLLM's, every request ends, and every block comes back.

Both engines' real schedulers, lease manager and control plane, in time that the test makes (world.py).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.schedulers.conftest import BLOCK, DEAR, KEEP, Engine
from tests.schedulers.world import (
    LATE,
    OTHERS,
    WORTHLESS,
    Memory,
    Prefill,
    Row,
    Tables,
    World,
    answer_to,
    check,
    model_output,
    next_token,
)
from vllm_adrenaline.control import messages
from vllm_adrenaline.decode.report import Report
from vllm_adrenaline.decode.request import RemoteRequest, State
from vllm_adrenaline.kv import space

REMOTE, MAPPED = space.remote_pool(0), space.mapped_pool(0)
HEADS = (10, 11, 200)  # prompts with the same head begin alike
LENDING = {"lease_seconds": 10.0, "prefill_reserve": 0.0, "growth_reserve": 0.0}
PREFILL_BLOCKS, OTHER = 36, b"another decode engine"

EXAMPLES, SHRINK = "ADRENALINE_EXAMPLES", "ADRENALINE_SHRINK"
"""Environment variables: how many examples to run, and whether one that fails is made shorter, which takes minutes."""

KINDS = [("remote", "1"), ("remote", "0.5"), ("remote", "auto"), ("both", "1"), ("mapped", "1")]
"""Pools and offload ratios."""

prompts = st.builds(
    lambda head, length: [head, *range(20, 19 + length)],
    st.sampled_from(HEADS),
    st.sampled_from([1, 5, 16, 17, 37, 53, 64, 100]),
)
lengths = st.sampled_from([1, 20, 60, 150, 150])
faults = st.sampled_from(["none", "none", "late", "dies"])
seldom = st.sampled_from([False] * 7 + [True])


class Machine(RuleBasedStateMachine):
    """One prefill and one decode engine, a second decode engine that only leases, and everything that can happen."""

    base: ClassVar[Callable[..., tuple[Any, Any]]]
    folder: ClassVar[Path]
    pool: ClassVar[str]
    ratio: ClassVar[str]
    configs: ClassVar[dict[Any, Any]] = {}
    seen: ClassVar[Counter[str]] = Counter()

    # Start and end

    @initialize(blocks=st.sampled_from([18, 24, 65]))
    def start(self, blocks: int) -> None:
        self.patch = pytest.MonkeyPatch()
        self.world = World(killed=self._let_go_of_all, revoked=self._revoked)
        self.world.install(self.patch)
        self.changes: Counter[State] = Counter()
        self.patch.setattr(RemoteRequest, "become", self._counted(RemoteRequest.become))
        self.made = 0
        self.lives = 0
        self.prompts: dict[str, tuple[list[int], int]] = {}  # asked of the prefill engine
        self.others: set[int] = set()
        self.start_prefill()
        options = {"pool": self.pool, "offload_ratio": self.ratio}
        if self.ratio == "auto":
            options["profile"] = str(self.folder / "profile.json")
        self.blocks, self.options, self.decode_lives = blocks, options, 0
        self.orphans: dict[str, list[tuple[list[int], int]]] = {}
        self._start_decode()

    def _config(self, blocks: int, **options: Any) -> Any:
        key = (blocks, *sorted(options.items()))
        if key not in self.configs:
            self.configs[key] = type(self).base(blocks, **options)
        return self.configs[key]

    def start_prefill(self) -> None:
        self.lives += 1
        listen = f"ipc://{self.folder}/p"
        config, kv = self._config(PREFILL_BLOCKS, role="prefill", listen=listen, pool=self.pool, **LENDING)
        config.kv_transfer_config.engine_id = engine_id = f"prefill life {self.lives}"

        def start() -> Engine:
            from vllm_adrenaline.prefill.scheduler import PrefillScheduler

            return Engine(PrefillScheduler, config, kv)

        self.world.prefill = Prefill(start, engine_id)
        self.world.join(self.world.prefill.control.identity, OTHER)
        self.others = set()
        self.prefill_free = self.world.prefill.engine.free

    def _start_decode(self) -> None:
        from vllm_adrenaline.decode.scheduler import DecodeScheduler

        config, kv = self._config(self.blocks, role="decode", peers=f"ipc://{self.folder}/p", **self.options)
        self.decode_lives += 1
        config.kv_transfer_config.engine_id = self.name = f"decode life {self.decode_lives}"
        self.requests: dict[str, tuple[Any, list[int], int]] = {}
        self.aborted: set[str] = set()
        self.arrived = 0
        self.changes.clear()
        self.executor, self.writing, self.hung = self.world.prefill, False, False
        self.late: list[tuple[list[int], int]] = []
        self.mapped: Prefill | None = None
        self.member = ""
        self.decode = Engine(DecodeScheduler, config, kv)
        self.table = self.decode.scheduler.table
        self.local, self.tables = Memory(), Tables()
        self.pulls: dict[str, Any] = {}
        self.ended: dict[str, bool] = {}  # pulls that ended, and how

    def teardown(self) -> None:
        if not hasattr(self, "patch"):
            return
        try:
            if hasattr(self, "decode"):
                self._heal()
                self._check_the_end()
        finally:
            for engine in (getattr(self, "decode", None), getattr(self.world.prefill, "engine", None)):
                if engine is not None:
                    engine.stop()
            self.patch.undo()

    def _heal(self) -> None:
        """All faults are over: then everything must end."""
        if self.world.prefill is None:
            self.start_prefill()
        for _ in range(4000):
            self.all_is_well()
            if not self.decode.scheduler.has_requests() and not self.prompts:
                break
        else:
            left = [(each.request_id, each.status) for each in self.decode.scheduler.requests.values()]
            raise AssertionError(f"it does not end: {left}")

    def _check_the_end(self) -> None:
        prefill, table = self.world.prefill, self.table
        assert prefill is not None
        for _ in range(int(prefill.scheduler.leases.expiry_s) + 3):  # for decode engines that ended unseen
            self.world.now += 1
            self.converse("both")
            self.another_decode_engine_is_left_alone()
            self.take_back()
            self.prefill_step(True)
        for name, (request, prompt, length) in self.requests.items():
            expected = answer_to(prompt, length)
            got = list(request.output_token_ids)
            assert request.is_finished(), name
            assert got == (expected[: len(got)] if name in self.aborted else expected), name
        assert self.decode.free_blocks == self.decode.free, "local blocks are lost"
        assert (table.requests, table._claims, table._outlived) == ({}, {}, [])
        assert not any(pool.leased or pool.borrowed for pool in table.pools)
        assert prefill.scheduler.leases.lent == (0, len(self.others))
        assert prefill.engine.free_blocks == self.prefill_free - len(self.others), (
            "blocks of the prefill engine are lost"
        )
        count = self.decode.count
        offloaded = count("offloaded_requests") + count("mapped_requests")
        made = self.arrived - count("refused_params")
        assert offloaded == self.changes[State.OFFLOADED]
        assert count("moved_requests") == self.changes[State.MIGRATING]
        assert made == self.changes[State.LEFT], "a request that arrived has not left"
        assert self.changes[State.PULLING] <= count("local_requests") + count("moved_requests")
        if not self.aborted:
            assert made <= offloaded + count("local_requests") + count("fallback_requests")
        for name in ("offloaded_requests", "mapped_requests", "local_requests", "moved_requests", "fallback_requests"):
            self.seen[name] += int(count(name))

    def _counted(self, become: Callable[[RemoteRequest, State], None]) -> Callable[[RemoteRequest, State], None]:
        def counted(request: RemoteRequest, state: State) -> None:
            become(request, state)
            self.changes[state] += 1

        return counted

    # The decode engine's worker

    def _cells(self, block: int) -> list[int]:
        pool, index = space.pool_of(block), space.index_of(block)
        if pool == space.LOCAL:
            return self.local[index]
        life = self.executor if pool == REMOTE else self.mapped
        assert life is not None
        return life.memory[index]

    def _ensure(self, members: dict[int, str]) -> bool:
        """Map what is not mapped yet; return whether the mapped rows of this step can be attended."""
        prefill, (member,) = self.world.prefill, list(members.values()) or [""]
        if not member:
            if self.mapped is not prefill:
                self.mapped, self.member = None, ""
            return True
        if member == self.member:
            return True
        if prefill is None or not prefill.scheduler.leases.is_member(member):
            return False
        prefill.mapping.members.add(member)
        self.mapped, self.member = prefill, member
        return True

    def _step(self, fault: str, leaving: str | None) -> None:
        scheduled = self.decode.schedule()
        meta = scheduled.kv_connector_metadata
        self.pulls |= {name: wanted for name, wanted in meta.reqs_to_recv.items() if wanted.awaiting_kvs}
        rows = self.tables.rows(scheduled, self.decode.scheduler.requests)
        pools = {row.name: self._pool(row) for row in rows}
        failed = set() if self._ensure(meta.members) else {MAPPED}
        if REMOTE in pools.values() and (self.executor is None or self.writing or fault != "none"):
            failed.add(REMOTE)
            if self.executor is not None and not self.writing:
                self._fail(fault, [row for row in rows if pools[row.name] == REMOTE], meta.received)
        good = [row for row in rows if pools[row.name] not in failed]
        for row in good:
            for block, offset, mark in row.cells(self._cells, row.end if row.name in meta.received else row.start):
                block[offset] = mark
        for row in good:
            check(row, self._cells, "decode")
            self.seen[f"pool {pools[row.name]}"] += 1
        if leaving is not None:
            self.abort(leaving)
        tokens = {row.name: [next_token(row.tokens)] if row.end >= len(row.tokens) else [] for row in rows}
        for row in rows:
            if pools[row.name] in failed and tokens[row.name]:
                tokens[row.name] = [WORTHLESS]
        is_away = self.executor is None or self.writing

        def those(condition: bool) -> frozenset[int]:
            return frozenset({0} if condition else ())

        hung = frozenset({(0, 77)} if self.hung and self.writing else ())
        report = Report(frozenset(failed), those(self.writing), hung, those(is_away), 1e-4, {}, 0.0)
        ended = {name: self.ended.pop(name) for name in list(self.ended)}
        output = model_output(
            tokens,
            finished_recving=set(ended),  # NIXL says so of those that failed, too
            failed_recving={name for name, is_good in ended.items() if not is_good},
            kv_connector_worker_meta=report,
        )
        outputs = self.decode.scheduler.update_from_output(scheduled, output)
        for each in outputs.values():
            self.decode._note(each.scheduler_stats.kv_connector_stats if each.scheduler_stats else None)

    def _pool(self, row: Row) -> int:
        """Return the pool of a row, which all its blocks are of."""
        (pool,) = {space.pool_of(block) for block in row.table[: -(-row.end // BLOCK)]}
        return pool

    def _fail(self, fault: str, rows: list[Row], received: frozenset[str]) -> None:
        self.seen[fault] += 1
        if fault == "late":
            self.writing, self.hung = True, False
            for row in rows:
                begin = row.end if row.name in received else row.start
                self.late += [(block, offset) for block, offset, _ in row.cells(self._cells, begin)]
        else:
            self.executor = None

    def _let_go_of_all(self) -> None:
        self.executor, self.writing, self.late = None, False, []

    def _revoked(self, engine: str) -> None:
        self._write_late(self.orphans.pop(engine, []))
        if engine == self.name:
            self.executor_lets_go()
            self.executor = None

    def _write_late(self, cells: list[tuple[list[int], int]]) -> None:
        """The executor finishes a step that it was late in."""
        for block, offset in cells:
            block[offset] = LATE

    # Requests

    @rule(asked=st.lists(st.tuples(prompts, lengths), min_size=1, max_size=5))
    @precondition(lambda self: len(self.prompts) + len(self.requests) < 60)
    def ask(self, asked: list[tuple[list[int], int]]) -> None:
        for prompt, length in asked:
            if self.world.prefill is None:
                self.ask_without_prefill(prompt, length)
                continue
            self.made += 1
            name = f"p{self.made}"
            self.prompts[name] = (prompt, length)
            self.world.prefill.engine.arrive(prompt, dict(KEEP), name=name, max_tokens=1)

    @rule(prompt=prompts, length=lengths)
    def ask_without_prefill(self, prompt: list[int], length: int) -> None:
        self._arrive(prompt, length, None)

    def _arrive(self, prompt: list[int], length: int, params: dict[str, Any] | None) -> None:
        request = self.decode.arrive(prompt, params, max_tokens=length)
        self.requests[request.request_id] = (request, prompt, length)
        self.arrived += params is not None

    @rule(count=st.integers(1, 3))
    @precondition(lambda self: self.world.prefill is not None and self.world.prefill.finished)
    def route(self, count: int) -> None:
        """The router passes on what the prefill engine has finished."""
        prefill = self.world.prefill
        for name in list(prefill.finished if prefill is not None else ())[:count]:
            assert prefill is not None
            self._arrive(*self.prompts.pop(name), prefill.finished.pop(name))

    @property
    def live(self) -> list[str]:
        """The requests that have not ended."""
        return [name for name, (request, *_) in self.requests.items() if not request.is_finished()]

    @rule(data=st.data())
    @precondition(lambda self: self.live)
    def client_leaves(self, data: st.DataObject) -> None:
        self.abort(data.draw(st.sampled_from(self.live)))

    def abort(self, name: str) -> None:
        self.aborted.add(name)
        self.decode.abort(self.requests[name][0])

    # Time, steps and messages

    @rule(fault=faults, data=st.data(), leaves=st.sampled_from([False] * 4 + [True]))
    def step(self, fault: str, data: st.DataObject, leaves: bool) -> None:
        self._step(fault, data.draw(st.sampled_from(self.live)) if leaves and self.live else None)

    @rule(lets_go=st.booleans())
    def prefill_step(self, lets_go: bool) -> None:
        """`lets_go`: nobody has claimed what was finished, and NIXL's hold on it ends."""
        prefill = self.world.prefill
        if prefill is not None:
            prefill.step(set(prefill.held) - set(prefill.finished) if lets_go else set())

    @rule(what=st.sampled_from(["deliver", "turn", "quiet turn", "both"]))
    def converse(self, what: str) -> None:
        if what in ("deliver", "both"):
            self.world.deliver()
        if what != "deliver":
            self.world.turn(beats=what != "quiet turn")
        if what == "both":
            self.world.deliver()
            self.world.turn(beats=False)

    @rule(seconds=st.sampled_from([0.02, 0.1, 0.6, 1.1, 3.0, 40.0]))
    def time_goes_by(self, seconds: float) -> None:
        self.world.now += seconds

    @rule(steps=st.integers(1, 20), fault=faults, heals=st.booleans())
    def time_goes_by_with_steps(self, steps: int, fault: str, heals: bool) -> None:
        """And with a fault at the end. `heals`: failed executors come back, and pulls end."""
        for _ in range(steps):
            self.all_is_well(heals)
        self._step(fault, None)

    def all_is_well(self, heals: bool = True) -> None:
        """Everybody does a step."""
        self.world.now += 0.02
        if heals:
            self.executor_lets_go()
            self.executor_returns()
        self.converse("both")
        self.take_back()
        self.prefill_step(False)
        self.route(3)
        if heals:
            self.pulls_end(True)
        self._step("none", None)

    @rule(seconds=st.sampled_from([1.0, 12.0]), asked=st.lists(prompts, max_size=4), want=st.sampled_from([0, 40]))
    def decode_engine_sleeps(self, seconds: float, asked: list[list[int]], want: int) -> None:
        """The others do not, and use what its lease was about to give them. Then it does a step, before it hears."""
        if self.world.prefill is not None:
            self.world.now += seconds
            self.world.deliver()
            self.another_decode_engine_is_left_alone()
            self.take_back()
            self.another_decode_engine_leases(want)
            self.ask([(prompt, 20) for prompt in asked])
            for _ in range(3):
                self.prefill_step(True)
        self.pulls_end(True)
        self._step("none", None)

    @rule(is_good=st.sampled_from([True, True, True, False]))
    @precondition(lambda self: self.pulls)
    def pulls_end(self, is_good: bool) -> None:
        prefill = self.world.prefill
        for name in list(self.pulls):
            wanted = self.pulls.pop(name)
            arrives = is_good and prefill is not None and wanted.remote.engine_id == prefill.engine_id
            if arrives:
                local, remote = wanted.local_block_ids[0], wanted.remote.block_ids[0]
                for here, there in zip(local, remote[len(remote) - len(local) :], strict=True):
                    self.local[here][:] = prefill.memory[there]
            self.ended[name] = arrives

    # Faults

    @rule(fault=st.sampled_from(["late", "dies"]), steps=st.integers(0, 5), want=st.sampled_from([0, 40]))
    @precondition(lambda self: self.executor is not None and not self.writing and self.table.any_offloaded)
    def executor_fails(self, fault: str, steps: int, want: int) -> None:
        """In a step. The others go on, and use what comes free."""
        self._step(fault, None)
        for _ in range(steps):
            self.all_is_well(heals=False)
        self.another_decode_engine_leases(want)

    @rule()
    @precondition(lambda self: self.writing or self.orphans)
    def executor_lets_go(self) -> None:
        for cells in (self.late, *self.orphans.values()):
            self._write_late(cells)
        self.late, self.orphans = [], {}
        if self.writing:
            self.writing, self.executor = False, None

    @rule()
    @precondition(lambda self: self.writing)
    def executor_does_not_let_go(self) -> None:
        self.hung = True

    @rule()
    @precondition(lambda self: self.executor is None and self.world.prefill is not None)
    def executor_returns(self) -> None:
        if not self.writing and self.executor is None:
            self.executor = self.world.prefill

    @rule(happens=seldom, comes_back=st.booleans())
    @precondition(lambda self: self.world.prefill is not None)
    def prefill_engine_is_killed(self, happens: bool, comes_back: bool) -> None:
        if not happens:
            return
        assert self.world.prefill is not None
        self.seen["prefill engine killed"] += 1
        self.world.prefill.engine.stop()
        self.world.prefill = None
        self.world.later, self.others = [], set()
        self._let_go_of_all()
        self.orphans = {}
        for prompt, length in self.prompts.values():  # their router tries again, without it
            self._arrive(prompt, length, None)
        self.prompts = {}
        self.world.lines[0].end("has ended")
        if comes_back:
            self.start_prefill()

    @rule()
    @precondition(lambda self: self.world.prefill is None)
    def prefill_engine_comes_back(self) -> None:
        self.start_prefill()

    @rule(happens=seldom, is_seen=st.booleans())
    def decode_engine_is_killed(self, happens: bool, is_seen: bool) -> None:
        """And started again. `is_seen`: the prefill engine sees its process end; else it is silent."""
        if not happens:
            return
        self.seen["decode engine killed"] += 1
        self.decode.stop()
        self.orphans[self.name], peer = self.late, self.world.lines[0].peer_name
        if self.mapped is not None:
            self.mapped.mapping.forget(self.member)
        if is_seen and self.world.prefill is not None:
            self.world.prefill.control._part_with(peer, "has ended")
        if self.world.prefill is None:
            self.start_prefill()  # without one, it would not start
        self._start_decode()

    @rule()
    @precondition(lambda self: self.world.later)
    def take_back(self) -> None:
        """The prefill engine takes back what decode engines had that are gone."""
        prefill, later = self.world.prefill, self.world.later
        self.world.later = []
        for take in later:
            left = take.args[0].args[0]  # type: ignore[attr-defined]
            if prefill is not None and prefill.mapping.may_write(left.member):
                self.world.later.append(take)
            else:
                take()

    @rule(want=st.sampled_from([3, 40]))
    def another_decode_engine_leases(self, want: int) -> None:
        if self.world.prefill is None:
            return
        leased = self.world.prefill.control._answer(OTHER, messages.Lease(want))
        if isinstance(leased, messages.Leased):
            assert not self.others & set(leased.blocks), "leased twice"
            self.others |= set(leased.blocks)
            for block in leased.blocks:
                self.world.prefill.memory[block][:] = [OTHERS] * BLOCK  # in place: whoever is late writes there

    @rule(count=st.integers(1, 20))
    def another_decode_engine_releases(self, count: int) -> None:
        back = sorted(self.others)[:count]
        if self.world.prefill is not None and back:
            self.world.prefill.control._answer(OTHER, messages.Release([], back))
            self.others -= set(back)

    @invariant()
    def another_decode_engine_is_left_alone(self) -> None:
        prefill = self.world.prefill
        if prefill is None:
            return
        if OTHER not in prefill.scheduler.leases.holders:  # it was silent for a lease
            self.others = set()
            self.world.join(prefill.control.identity, OTHER)
        prefill.control._answer(OTHER, messages.Heartbeat())
        for block in self.others:
            assert prefill.memory[block] == [OTHERS] * BLOCK, "somebody writes into blocks of another decode engine"


@pytest.mark.parametrize("examples", [2, pytest.param(300, marks=pytest.mark.extended)])
@pytest.mark.parametrize(("pool", "ratio"), KINDS)
def test_every_answer_is_right_every_request_ends_and_every_block_comes_back(
    base: Callable[..., tuple[Any, Any]], tmp_path: Path, pool: str, ratio: str, examples: int
) -> None:
    (tmp_path / "profile.json").write_text(json.dumps(DEAR))
    Machine.base, Machine.folder = staticmethod(base), tmp_path
    Machine.pool, Machine.ratio = pool, ratio
    Machine.configs, Machine.seen = {}, Counter()
    how_many = int(os.environ.get(EXAMPLES, examples))
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=how_many,
            stateful_step_count=60,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=False,
            report_multiple_bugs=False,
            phases=[Phase.generate, *([Phase.shrink] if SHRINK in os.environ else [])],
        ),
    )
    print(dict(Machine.seen))
    served = "mapped_requests" if pool == "mapped" else "offloaded_requests"
    assert how_many < 50 or min(
        Machine.seen[each] for each in (served, "decode engine killed", "prefill engine killed")
    )
