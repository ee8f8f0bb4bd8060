"""A search through everything that processes with shared memory can do: each order of their steps, and of their stores.

A process is a list of operations. What it stores is pending at first, and becomes visible in any order, save that a
release waits for all stores before it. Loads are in the order of the program. A process may end between any two
operations: each store that is pending then becomes visible, or does not.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

Value = Hashable


class Store(NamedTuple):
    """A store that the others may not see yet."""

    place: str
    value: Value
    releases: bool


class Process(NamedTuple):
    """Where a process is: its next operation, what it has stored and read, what it has done once for ever."""

    at: int = 0
    pending: tuple[Store, ...] = ()
    registers: tuple[Value, ...] = ()
    done: frozenset[Value] = frozenset()
    is_alive: bool = True
    sleeps: bool = False


class State(NamedTuple):
    """What everybody can see, and the processes. Places that nobody has stored to are None."""

    memory: tuple[tuple[str, Value], ...]
    processes: tuple[Process, ...]

    def load(self, place: str) -> Value:
        return dict(self.memory).get(place)

    def visible(self, place: str, value: Value) -> State:
        return self._replace(memory=tuple(sorted({**dict(self.memory), place: value}.items())))

    def with_process(self, number: int, process: Process) -> State:
        return self._replace(processes=(*self.processes[:number], process, *self.processes[number + 1 :]))


class WrongError(Exception):
    """What must never happen has happened."""


@dataclass(frozen=True)
class Put:
    """Store a value. `releases`: it becomes visible after all that was stored before."""

    place: str
    value: Value
    releases: bool = False


@dataclass(frozen=True)
class Drain:
    """Go on when all stores are visible, as a sequentially consistent store does before a load."""


@dataclass(frozen=True)
class Await:
    """Wait until `sees` says "ready" of a place. It may also say "wait", or anything else: then go to `otherwise`, as
    does a wait that is given up, where that can happen."""

    place: str
    sees: Callable[[Value], str]
    otherwise: str = ""


@dataclass(frozen=True)
class Read:
    """Load places into registers."""

    places: tuple[str, ...]


@dataclass(frozen=True)
class Check:
    """All registers must hold these values. They are empty afterwards."""

    expected: tuple[Value, ...]


@dataclass(frozen=True)
class Once:
    """Do something that must not be done twice."""

    what: Value


@dataclass(frozen=True)
class Reset:
    """Give up what was read, and empty places at once, when the process `after`, if one is named, can store no more."""

    places: tuple[str, ...] = ()
    after: int | None = None


@dataclass(frozen=True)
class Goto:
    """Go to a label, if the last register holds `value`; always if it is None. That register is dropped."""

    label: str
    value: Value = None


@dataclass(frozen=True)
class Label:
    """A place in the program."""

    name: str


@dataclass(frozen=True)
class Sleep:
    """Sleep, if a place still holds what the last register says, until somebody wakes this process. Drops it."""

    place: str


@dataclass(frozen=True)
class Wake:
    """Change a place, atomically, and wake a process."""

    place: str
    process: int


Operation = Put | Drain | Await | Read | Check | Once | Reset | Goto | Label | Sleep | Wake
OWN = (Put, Check, Once, Goto, Label)
"""Operations that nobody else sees or hinders: when they happen among those of others changes nothing."""


@dataclass(frozen=True)
class World:
    """Programs of the processes, by number, and what may go wrong: whose waits are given up, and who may end."""

    programs: tuple[tuple[Operation, ...], ...]
    impatient: frozenset[int] = frozenset()
    mortal: frozenset[int] = frozenset()

    def search(self) -> tuple[int, str]:
        """Return how many states there are, and what went wrong in one of them; empty if nothing can.

        A process that waits for ever is told only if nothing worse is found.
        """
        first = State((), tuple(Process() for _ in self.programs))
        seen, stack, stuck = {first}, [first], ""
        while stack:
            state = stack.pop()
            try:
                following = list(self._after(state))
            except WrongError as error:
                return len(seen), str(error)
            if not following:
                stuck = stuck or self._stuck(state)
            # A set would be walked in another order in every run.
            fresh = [each for each in dict.fromkeys(following) if each not in seen]
            seen.update(fresh)
            stack.extend(fresh)
        return len(seen), stuck

    def _stuck(self, state: State) -> str:
        for number, process in enumerate(state.processes):
            if process.is_alive and not self._is_over(number, process):
                return f"process {number} waits for ever at {self.programs[number][process.at]}"
        return ""

    def _after(self, state: State) -> Iterator[State]:
        for number, process in enumerate(state.processes):
            is_running = process.is_alive and not self._is_over(number, process)
            if is_running and isinstance(self.programs[number][process.at], OWN):
                yield from self._step(state, number, process)
                return
        for number, process in enumerate(state.processes):
            for i, store in enumerate(process.pending):
                before = process.pending[:i]
                if any(store.releases or other.place == store.place for other in before):
                    continue
                rest = process._replace(pending=before + process.pending[i + 1 :])
                yield state.visible(store.place, store.value).with_process(number, rest)
            if not process.is_alive:
                if process.pending:
                    yield state.with_process(number, process._replace(pending=()))
                continue
            if self._is_over(number, process):
                continue
            if number in self.mortal:
                yield state.with_process(number, process._replace(is_alive=False))
            if not process.sleeps:
                yield from self._step(state, number, process)

    def _is_over(self, number: int, process: Process) -> bool:
        return process.at == len(self.programs[number])

    def _step(self, state: State, number: int, process: Process) -> Iterator[State]:
        operation = self.programs[number][process.at]
        on = process._replace(at=process.at + 1)
        match operation:
            case Put(place, value, releases):
                yield state.with_process(number, on._replace(pending=(*on.pending, Store(place, value, releases))))
            case Drain():
                if not process.pending:
                    yield state.with_process(number, on)
            case Await(place, sees, otherwise):
                found = sees(state.load(place))
                if found == "ready":
                    yield state.with_process(number, on)
                elif found != "wait":
                    yield state.with_process(number, self._to(number, process, otherwise))
                if found != "ready" and number in self.impatient and otherwise:
                    yield state.with_process(number, self._to(number, process, otherwise))
            case Read(places):
                loaded = tuple(state.load(place) for place in places)
                yield state.with_process(number, on._replace(registers=process.registers + loaded))
            case Check(expected):
                if process.registers != expected:
                    raise WrongError(f"process {number} took {process.registers}, which should be {expected}")
                yield state.with_process(number, on._replace(registers=()))
            case Once(what):
                if what in process.done:
                    raise WrongError(f"process {number} did {what} twice")
                yield state.with_process(number, on._replace(done=process.done | {what}))
            case Reset(places, after):
                if after is not None:
                    other = state.processes[after]
                    if other.pending or (other.is_alive and not self._is_over(after, other)):
                        return
                for place in places:
                    state = state.visible(place, None)
                yield state.with_process(number, on._replace(registers=()))
            case Goto(label, value):
                kept = on if value is None else on._replace(registers=process.registers[:-1])
                goes = value is None or process.registers[-1] == value
                yield state.with_process(number, self._to(number, kept, label) if goes else kept)
            case Label():
                yield state.with_process(number, on)
            case Sleep(place):
                sleeps = state.load(place) == process.registers[-1]
                yield state.with_process(number, on._replace(registers=process.registers[:-1], sleeps=sleeps))
            case Wake(place, who):
                count = state.load(place)
                assert count is None or isinstance(count, int)
                woken = state.processes[who]._replace(sleeps=False)
                yield state.visible(place, (count or 0) + 1).with_process(number, on).with_process(who, woken)

    def _to(self, number: int, process: Process, label: str) -> Process:
        return process._replace(at=self.programs[number].index(Label(label)))

    def allowing(self, impatient: set[int] = frozenset(), mortal: set[int] = frozenset()) -> World:
        """Return the same world, in which more may go wrong."""
        return replace(self, impatient=frozenset(impatient), mortal=frozenset(mortal))
