"""The prefill engine's books: no block is lost, none is given twice, whatever decode engines do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vllm_adrenaline.prefill.leases import GIVEN_UP_KEPT, LeaseManager, Offer

BLOCKS, RESERVE, EXPIRY = 20, 3, 10.0


@dataclass(eq=False)
class Block:
    block_id: int
    ref_cnt: int = 0


class FakePool:
    """vLLM's block pool, reduced to reference counts that must never become negative."""

    def __init__(self) -> None:
        self.blocks = [Block(i) for i in range(BLOCKS)]

    def get_num_free_blocks(self) -> int:
        return sum(block.ref_cnt == 0 for block in self.blocks)

    def get_new_blocks(self, num_blocks: int) -> list[Block]:
        free = [block for block in self.blocks if block.ref_cnt == 0][:num_blocks]
        assert len(free) == num_blocks
        self.touch(free)
        return free

    def touch(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            block.ref_cnt += 1

    def free_blocks(self, ordered_blocks: Iterable[Block]) -> None:
        for block in ordered_blocks:
            block.ref_cnt -= 1
            assert block.ref_cnt >= 0, "freed twice"


holders = st.sampled_from([b"a", b"b", b"c"])
prompts = st.sampled_from(["p", "q", "r", "s"])
tickets = st.sampled_from(["", "t", "u"])


class LeaseMachine(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.now = 0.0
        self.pool = FakePool()
        self.leases = LeaseManager(self.pool, RESERVE, EXPIRY, lambda: self.now)
        self.kept: dict[str, list[Block]] = {}

        self.given_up: set[str] = set()

    @rule(name=prompts, size=st.integers(1, 4), ticket=tickets)
    def a_prompt_finishes(self, name: str, size: int, ticket: str) -> None:
        if name not in self.kept and self.pool.get_num_free_blocks() >= size:
            self.kept[name] = self.pool.get_new_blocks(size)
            self.leases.offer(name, Offer(self.kept[name], size, b"", ticket))
            assert (name in self.leases.offers) == (ticket not in self.given_up)
            assert (name in self.leases.take_let_go()) == (ticket in self.given_up)

    @rule(ticket=tickets.filter(bool))
    def a_prompt_is_given_up(self, ticket: str) -> None:
        named = {name for name, offer in self.leases.offers.items() if offer.ticket == ticket}
        self.leases.take_let_go()
        self.leases.give_up(ticket)
        assert self.leases.take_let_go() == named
        assert not named & self.leases.offers.keys()
        if not named:
            self.given_up.add(ticket)

    @rule(name=prompts)
    def its_own_hold_ends(self, name: str) -> None:
        if name in self.kept:
            self.leases.withdraw([name])
            self.pool.free_blocks(self.kept.pop(name))
            assert self.leases.claim(b"a", name) is None

    @rule(who=holders)
    def hello(self, who: bytes) -> None:
        self.leases.join(who)

    @rule(who=holders, name=prompts)
    def claim(self, who: bytes, name: str) -> None:
        known = who in self.leases.holders
        offered = name in self.leases.offers
        assert (self.leases.claim(who, name) is not None) == (known and offered)

    @rule(who=holders, want=st.integers(0, 30))
    def lease(self, who: bytes, want: int) -> None:
        free = self.pool.get_num_free_blocks()
        got = self.leases.lease(who, want)
        assert len(got) <= want
        assert not got or self.pool.get_num_free_blocks() >= min(free, RESERVE)

    @rule(who=holders, names=st.lists(prompts), blocks=st.lists(st.integers(0, BLOCKS)))
    def release(self, who: bytes, names: list[str], blocks: list[int]) -> None:
        self.leases.release(who, names, blocks)

    @rule(seconds=st.floats(0, 2 * EXPIRY))
    def time_goes_by(self, seconds: float) -> None:
        self.now += seconds
        for name in self.leases.silent():
            had = self.leases.holders[name].has_blocks
            left = self.leases.leave(name)
            assert (left is not None) == had
            if left is not None:
                self.leases.evict(left)
        assert not self.leases.silent()

    @rule(who=holders)
    def beat(self, who: bytes) -> None:
        assert self.leases.note_sign_of_life(who) == (who in self.leases.holders)

    @invariant()
    def every_reference_has_an_owner(self) -> None:
        owners = list(self.kept.values())
        for holder in self.leases.holders.values():
            owners += [*holder.claims.values(), list(holder.leased.values())]
        for block in self.pool.blocks:
            assert block.ref_cnt == sum(owned.count(block) for owned in owners)

    @invariant()
    def no_block_is_leased_twice(self) -> None:
        leased = [index for holder in self.leases.holders.values() for index in holder.leased]
        assert len(leased) == len(set(leased))


LeaseMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLeases = LeaseMachine.TestCase


def test_only_so_many_prompts_are_remembered_as_given_up() -> None:
    leases = LeaseManager(FakePool(), RESERVE, EXPIRY, lambda: 0.0)
    for ticket in range(GIVEN_UP_KEPT + 1):
        leases.give_up(str(ticket))
    leases.offer("first", Offer([], 1, b"", "0"))
    leases.offer("last", Offer([], 1, b"", str(GIVEN_UP_KEPT)))
    assert list(leases.offers) == ["first"]
