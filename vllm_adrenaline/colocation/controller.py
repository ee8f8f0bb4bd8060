"""The controller of the shares of a device: the SLO-aware algorithm of semi-PD (arXiv 2504.19867, Algorithm 1). Pure.

Prefill has the share x, and decode the share y. They move separately, each up to 1: what each may use, of a device that
both use. x + y may be above 1. Then they compete, and what each gets is x' = x / (x + y) and y' = y / (x + y).

Once a window, TTFT and TPOT at a percentile are compared with their objectives. If one alone is violated, the share of
its phase grows, until its model (model.py) says that this is enough. A share that is at 1 cannot grow: then the other
one shrinks, but not so far that the other objective would be violated by its own model. If both objectives are violated
or both are met, the shares are kept.

The same controller serves a prefill engine against a decode engine, and against its attention executors, whose work is
decode as well.
"""

from __future__ import annotations

from enum import Enum

import msgspec

from vllm_adrenaline.colocation.model import LAMBDAS, Model, Point
from vllm_adrenaline.system.statistics import percentile


class Phase(Enum):
    """Who has a share."""

    PREFILL = "prefill"
    DECODE = "decode"

    @property
    def other(self) -> Phase:
        """The other one."""
        return Phase.DECODE if self is Phase.PREFILL else Phase.PREFILL


class Shares(msgspec.Struct, frozen=True):
    """What each phase may use of a device, 0 to 1. Together that may be more than 1.

    Attributes:
        prefill, decode: x and y of semi-PD.
    """

    prefill: float
    decode: float

    @classmethod
    def dividing(cls, decode: float, low: float) -> Shares:
        """Return the largest shares of which decode gets a part `decode` of the device; none is below `low`."""
        part = min(max(decode, 1e-6), 1 - 1e-6)
        return cls(prefill=min(1.0, max(low, (1 - part) / part)), decode=min(1.0, max(low, part / (1 - part))))

    def of(self, phase: Phase) -> float:
        """Return what a phase may use: x or y."""
        return self.prefill if phase is Phase.PREFILL else self.decode

    def part(self, phase: Phase) -> float:
        """Return what a phase gets while both want the device: x' or y', which add up to 1."""
        return self.of(phase) / (self.prefill + self.decode)

    def moved(self, phase: Phase, by: float, low: float) -> Shares:
        """Return the shares with that of a phase moved by `by`, but not below `low`, nor above 1."""
        share = min(1.0, max(low, round(self.of(phase) + by, 6)))
        return Shares(share, self.decode) if phase is Phase.PREFILL else Shares(self.prefill, share)


class Objectives(msgspec.Struct, frozen=True):
    """What is to be met.

    Attributes:
        ttft, tpot: time to first token and time per output token, in seconds; None for no objective.
        percentile: the one at which they are to be met, 0 to 1.
    """

    ttft: float | None = None
    tpot: float | None = None
    percentile: float = 0.9

    def of(self, phase: Phase) -> float | None:
        """Return the objective that a phase has to meet."""
        return self.ttft if phase is Phase.PREFILL else self.tpot


class Limits(msgspec.Struct, frozen=True):
    """How far and how fast the controller moves the shares.

    Attributes:
        low: the smallest share. The largest is 1.
        step, max_steps: a decision moves a share by `step`, at most `max_steps` times.
        window: observations between two decisions.
        margin, patience: for `patience` windows after the other objective was violated, a phase gets more only if it is
            beyond its own objective by more than the part `margin` of it. Objectives that are violated by turns cannot
            both be met, and swinging helps neither.
    """

    low: float = 0.1
    step: float = 0.05
    max_steps: int = 3
    window: int = 32
    margin: float = 0.2
    patience: int = 8


class Change(Enum):
    """What a decision did."""

    KEPT = "the shares are kept"
    MORE_PREFILL = "more for prefill"
    MORE_DECODE = "more for decode"


class ShareController:
    """The controller of the shares of one device (semi-PD, Algorithm 1).

    Attributes:
        shares: as they were decided last.
    """

    def __init__(self, objectives: Objectives, limits: Limits, shares: Shares) -> None:
        """Begin with `shares`, moved into the limits."""
        self._objectives, self._limits = objectives, limits
        self.shares = shares.moved(Phase.PREFILL, 0, limits.low).moved(Phase.DECODE, 0, limits.low)
        self._models = {Phase.PREFILL: Model(LAMBDAS), Phase.DECODE: Model()}
        self._seen: dict[Phase, list[float]] = {phase: [] for phase in Phase}
        self._windows = 0
        self._violated: dict[Phase, int] = {}

    def observe_ttft(self, seconds: float) -> None:
        """Note that a request had its first token after so many seconds."""
        self._seen[Phase.PREFILL].append(seconds)

    def observe_tpot(self, seconds: float) -> None:
        """Note that a token took so many seconds: in a step, or as the mean of a request."""
        self._seen[Phase.DECODE].append(seconds)

    def discard(self) -> None:
        """Forget what was observed since the last decision, and begin the window anew.

        Whoever carries a change out calls this as long as it has not taken effect: what is observed until then is of
        neither the old shares nor the new ones.
        """
        self._seen = {phase: [] for phase in Phase}

    def expected(self, phase: Phase, shares: Shares) -> float:
        """Return the TTFT or TPOT that a phase's model expects with these shares, in seconds."""
        return self._models[phase].at(shares.part(phase))

    def update(self) -> Change:
        """Decide if the window is full, and begin the next one; return what changed."""
        if max(len(seen) for seen in self._seen.values()) < self._limits.window:
            return Change.KEPT
        beyond = {phase: self._beyond(phase) for phase in Phase}
        self.discard()
        self._windows += 1
        failing = [phase for phase in Phase if beyond[phase] > 0]
        before = self.shares
        if len(failing) == 1 and self._has_turn(failing[0], beyond[failing[0]]):
            self._give_more(failing[0])
        self._violated |= dict.fromkeys(failing, self._windows)
        if self.shares == before:
            return Change.KEPT
        return Change.MORE_PREFILL if failing == [Phase.PREFILL] else Change.MORE_DECODE

    def _beyond(self, phase: Phase) -> float:
        """Refit a phase's model to the window. Return by which part of it the objective is violated; else negative."""
        if not self._seen[phase]:
            return -1.0
        seconds, objective = percentile(self._seen[phase], self._objectives.percentile), self._objectives.of(phase)
        self._models[phase].add(Point(self.shares.part(phase), seconds))
        return seconds / objective - 1 if objective is not None else -1.0

    def _has_turn(self, phase: Phase, violated_by: float) -> bool:
        """Whether a phase may get more now (Limits, `margin` and `patience`)."""
        ago = self._windows - self._violated.get(phase.other, -self._limits.patience)
        return ago >= self._limits.patience or violated_by > self._limits.margin

    def _give_more(self, phase: Phase) -> None:
        """Move the shares in favour of a phase, step by step, until that is enough by its model."""
        for _ in range(self._limits.max_steps):
            self.shares = self._after_step(phase)
            if self._meets(phase, self.shares):
                return

    def _after_step(self, phase: Phase) -> Shares:
        """Return the shares one step further in favour of a phase; the same ones where there is no such step."""
        low, step = self._limits.low, self._limits.step
        if self.shares.of(phase) < 1:
            return self.shares.moved(phase, step, low)
        shrunk = self.shares.moved(phase.other, -step, low)
        return shrunk if self._meets(phase.other, shrunk) else self.shares

    def _meets(self, phase: Phase, shares: Shares) -> bool:
        """Whether a phase meets its objective with these shares, by its model."""
        objective = self._objectives.of(phase)
        return objective is None or self.expected(phase, shares) <= objective
