"""The protocol of the channels in shared memory (csrc/shm) and through GPU memory (csrc/cuda/channel.h), in all orders.

A model, not the code: it says that the order of stores and waits in which a channel works is right, whatever the speed
of the processes, and that each part of it is needed. Rows have two words, so that half a message is seen as such.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.unit.protocol_search import (
    Await,
    Check,
    Drain,
    Goto,
    Label,
    Once,
    Operation,
    Put,
    Read,
    Reset,
    Sleep,
    Value,
    Wake,
    World,
)

STEPS, LAYERS = 2, 2
DECODE, EXECUTOR, SECOND = 0, 1, 2
Sees = Callable[[Value], str]
Stamp = tuple[int, int, int]
"""Epoch, step, layer. The last announcement of a life has step 0."""


class Channel:
    """How a channel works, with a fault planted or none.

    Attributes:
        inbox: what the memory that the executor writes is called in a life: another name is other memory.
    """

    def __init__(self, fault: str = "", same_inbox: bool = False) -> None:
        self.fault, self.same_inbox = fault, same_inbox

    def inbox(self, epoch: int) -> str:
        return "out" if self.same_inbox else f"out{epoch}"

    def sees(self, wanted: Stamp) -> Sees:
        raise NotImplementedError

    def announce(self, place: str, stamp: Value) -> list[Operation]:
        raise NotImplementedError

    def message(self, rows: str, flag: str, stamp: Stamp) -> list[Operation]:
        """Store rows, and announce them."""
        stores: list[Operation] = [Put(f"{rows}{word}", (rows[:1], *stamp, word)) for word in range(2)]
        announced = self.announce(flag, stamp)
        return announced + stores if self.fault == "announced before rows" else stores + announced

    def taken(self, rows: str, flag: str, stamp: Stamp, otherwise: str) -> list[Operation]:
        """Wait for rows, and read them."""
        wait = Await(flag, self.sees(stamp), otherwise)
        read = Read((f"{rows}0", f"{rows}1"))
        check = Check(tuple((rows[:1], *stamp, word) for word in range(2)))
        return [read, wait, check] if self.fault == "rows read before the announcement" else [wait, read, check]

    def layer(self, stamp: Stamp, otherwise: str) -> list[Operation]:
        """The decode worker's layer."""
        epoch = stamp[0]
        send = self.message(f"q{epoch}_", f"sent{epoch}", stamp)
        return send + self.taken(f"{self.inbox(epoch)}_", f"done_{self.inbox(epoch)}", stamp, otherwise)

    def attended(self, stamp: Stamp, otherwise: str) -> list[Operation]:
        """The executor's layer."""
        epoch = stamp[0]
        answer = self.message(f"{self.inbox(epoch)}_", f"done_{self.inbox(epoch)}", stamp)
        return [*self.taken(f"q{epoch}_", f"sent{epoch}", stamp, otherwise), Once(stamp), *answer]

    def begin(self, stamp: Stamp) -> list[Operation]:
        return []

    def await_step(self, stamp: Stamp) -> list[Operation]:
        return []

    def life(self, epoch: int, otherwise: str) -> list[Operation]:
        """A decode worker's life of the channel."""
        made: list[Operation] = []
        for step in range(1, STEPS + 1):
            made += self.begin((epoch, step, 0))
            for layer in range(1, LAYERS + 1):
                stamp = (epoch, step, layer)
                if self.fault == "slot used again too early" and layer < LAYERS:
                    made += self.message(f"q{epoch}_", f"sent{epoch}", stamp)  # and the next one at once
                    continue
                # A wait that was given up: another layer of the same life.
                goes_on = self.fault == "a failed life goes on"
                made += self.layer(stamp, f"on{stamp}" if goes_on else otherwise)
                made += [Label(f"on{stamp}"), Reset()] if goes_on else []
        return made

    def service(self, epoch: int) -> list[Operation]:
        """An executor's life of the channel."""
        made: list[Operation] = []
        for step in range(1, STEPS + 1):
            made += self.await_step((epoch, step, 0))
            for layer in range(1, LAYERS + 1):
                made += self.attended((epoch, step, layer), "failed")
        return [*made, Goto("end"), Label("failed"), *self.closing(f"done_{self.inbox(epoch)}", epoch), Label("end")]

    def closing(self, flag: str, epoch: int) -> list[Operation]:
        """Say that nothing comes any more."""
        return self.announce(flag, (epoch, 0, 0))


class CudaChannel(Channel):
    """Rows, then a release. A wait ends for anything that is of no use."""

    def announce(self, place: str, stamp: Value) -> list[Operation]:
        return [Put(place, stamp, releases=self.fault != "no fence")]

    def sees(self, wanted: Stamp) -> Sees:
        def look(seen: Value) -> str:
            if seen is None:
                return "wait"
            assert isinstance(seen, tuple)
            if seen == wanted or (self.fault == "epoch not compared" and seen[1:] == wanted[1:]):
                return "ready"
            if seen[0] != wanted[0] or seen[1] == 0:
                return "stale or closed"
            return "ahead" if seen > wanted else "wait"

        return look


class ShmChannel(Channel):
    """Every announcement is sequentially consistent. A wait goes on until it sees what it waits for, or is given up.

    A step begins with a plan. An executor that gave up a step waits for the next plan, and a decode worker that gave up
    leaves the channel.
    """

    def announce(self, place: str, stamp: Value) -> list[Operation]:
        return [Put(place, stamp, releases=self.fault != "no fence"), Drain()]

    def sees(self, wanted: Stamp) -> Sees:
        def look(seen: Value) -> str:
            if seen == wanted:
                return "ready"
            is_like = isinstance(seen, tuple) and seen[1:] == wanted[1:]
            return "ready" if is_like and self.fault == "epoch not compared" else "wait"

        return look

    def begin(self, stamp: Stamp) -> list[Operation]:
        return self.message(f"p{stamp[0]}_", f"plan{stamp[0]}", stamp)

    def await_step(self, stamp: Stamp) -> list[Operation]:
        return self.taken(f"p{stamp[0]}_", f"plan{stamp[0]}", stamp, "failed")


CHANNELS = pytest.mark.parametrize("kind", [ShmChannel, CudaChannel])


def one_life(channel: Channel) -> World:
    """A decode worker and an executor."""
    decode = (*channel.life(1, "failed"), Goto("end"), Label("failed"), *channel.closing("sent1", 1), Label("end"))
    return World((decode, tuple(channel.service(1))))


def two_lives(channel: Channel, after: int | None = None, clears: bool = True) -> World:
    """A decode worker that attaches to another executor when its first life fails.

    Args:
        channel: what they use.
        after: the process that must have ended before its inbox is used again; None: it need not.
        clears: whether the inbox is emptied then.
    """
    inbox = channel.inbox(2)
    places = (f"done_{inbox}", f"{inbox}_0", f"{inbox}_1") if clears else ()
    decode = (
        *channel.life(1, "failed"),
        Goto("end"),
        Label("failed"),
        *channel.closing("sent1", 1),
        Reset(places, after),
        Put("attach", 2, releases=True),
        *channel.life(2, "failed again"),
        Label("failed again"),
        Label("end"),
    )
    second = (Await("attach", lambda seen: "ready" if seen else "wait", "end"), *channel.service(2))
    return World((decode, tuple(channel.service(1)), second))


@CHANNELS
def test_all_layers_are_answered_when_nothing_fails(kind: type[Channel]) -> None:
    states, wrong = one_life(kind()).search()
    assert not wrong
    assert states > 50


@CHANNELS
def test_no_wrong_row_is_taken_whoever_gives_up_or_ends_when(kind: type[Channel]) -> None:
    for mortal in (set(), {DECODE}, {EXECUTOR}):
        assert not one_life(kind()).allowing({DECODE, EXECUTOR}, mortal).search()[1]


def test_through_gpu_memory_an_end_that_gives_up_ends_the_waits_of_the_other() -> None:
    for impatient in (DECODE, EXECUTOR):
        assert not one_life(CudaChannel()).allowing({impatient}).search()[1]


@CHANNELS
def test_without_a_bound_an_end_waits_for_ever_for_one_that_has_ended(kind: type[Channel]) -> None:
    assert "waits for ever" in one_life(kind()).allowing(mortal={EXECUTOR}).search()[1]


@CHANNELS
def test_a_new_life_takes_nothing_of_the_old_one(kind: type[Channel]) -> None:
    everybody = {DECODE, EXECUTOR, SECOND}
    assert not two_lives(kind()).allowing(everybody, mortal={EXECUTOR}).search()[1]
    again = two_lives(kind(same_inbox=True), after=EXECUTOR)
    assert not again.allowing(everybody, mortal={EXECUTOR}).search()[1]
    not_cleared = two_lives(kind(same_inbox=True), after=EXECUTOR, clears=False)
    assert not not_cleared.allowing(everybody, mortal={EXECUTOR}).search()[1]


@CHANNELS
def test_an_inbox_whose_writer_lives_may_not_be_used_again(kind: type[Channel]) -> None:
    wrong = two_lives(kind(same_inbox=True)).allowing({DECODE, EXECUTOR, SECOND}).search()[1]
    assert "took" in wrong


@CHANNELS
@pytest.mark.parametrize("fault", ["no fence", "announced before rows", "rows read before the announcement"])
def test_rows_that_do_not_come_first_are_found(fault: str, kind: type[Channel]) -> None:
    assert "took" in one_life(kind(fault)).search()[1]


@CHANNELS
def test_a_slot_that_is_used_again_too_early_is_found(kind: type[Channel]) -> None:
    wrong = one_life(kind("slot used again too early")).allowing({DECODE, EXECUTOR}).search()[1]
    assert "took" in wrong


@CHANNELS
def test_a_life_that_goes_on_after_a_failure_is_found(kind: type[Channel]) -> None:
    wrong = one_life(kind("a failed life goes on")).allowing({DECODE}).search()[1]
    assert "took" in wrong


@CHANNELS
def test_epochs_that_are_not_compared_are_found(kind: type[Channel]) -> None:
    channel = kind("epoch not compared", same_inbox=True)
    world = two_lives(channel, after=EXECUTOR, clears=False)
    assert "took" in world.allowing({DECODE, SECOND}, mortal={EXECUTOR}).search()[1]


def sleepers(fault: str = "") -> World:
    """Shared memory: the executor sleeps on a futex until a plan is announced (csrc/shm/wait.h)."""
    drains = [] if fault == "announcement not sequentially consistent" else [Drain()]
    decode = (Put("plan", 1, releases=True), *drains, Read(("sleeps",)), Goto("ring", 1), Goto("end"))
    ring = (Label("ring"), Wake("bell", EXECUTOR), Label("end"))
    says_so = [] if fault == "sleep not sequentially consistent" else [Drain()]
    looks = (Read(("bell",)), Read(("plan",)), Goto("awake", 1))
    if fault == "plan looked at before the bell":
        looks = (Read(("plan",)), Goto("awake", 1), Read(("bell",)))
    executor = (
        Put("sleeps", 1),
        *says_so,
        Label("look"),
        *looks,
        *((Sleep("bell"),) if fault != "sleeps without looking at the bell" else (Read(("bell",)), Sleep("bell"))),
        Goto("look"),
        Label("awake"),
        Reset(),
    )
    return World(((*decode, *ring), executor))


def test_nobody_sleeps_through_an_announcement() -> None:
    states, wrong = sleepers().search()
    assert not wrong
    assert states > 20


@pytest.mark.parametrize(
    "fault",
    [
        "announcement not sequentially consistent",
        "sleep not sequentially consistent",
        "plan looked at before the bell",
        "sleeps without looking at the bell",
    ],
)
def test_a_wake_up_that_can_be_lost_is_found(fault: str) -> None:
    assert "sleep" in sleepers(fault).search()[1] or "waits for ever" in sleepers(fault).search()[1]
