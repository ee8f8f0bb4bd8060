"""A device that a prefill and a decode engine share, in simulation: both go on, each at its part of the speed.

The parts are those that the tuner of real engines decides (colocation/tuner.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from vllm_adrenaline.colocation.controller import Phase, Shares

DONE_S = 1e-9
"""What may be left of work that is done, in seconds: sums of times are not exact."""


@dataclass
class Device:
    """The work in progress on a shared device.

    While one phase alone has work it gets all of the device. While both have, prefill gets `prefill_part` of it.

    Attributes:
        clock: Returns the simulated time.
        prefill_part: 0 to 1.
        version: Grows with every start and end of work, and with every change of the parts: who foresaw an end before
            that was wrong.
    """

    clock: Callable[[], float]
    prefill_part: float = 0.5
    version: int = 0
    _left: dict[Phase, float] = field(default_factory=dict)  # seconds of work, alone on the device
    _now: float = 0.0

    def start(self, phase: Phase, seconds: float, now: float) -> None:
        """A phase begins work that takes so long alone."""
        self._advance(now)
        self._left[phase] = seconds
        self.version += 1

    def finish(self, now: float) -> list[Phase]:
        """Return the phases whose work is done; it is no longer in progress."""
        self._advance(now)
        done = [phase for phase, seconds in self._left.items() if seconds <= DONE_S]
        for phase in done:
            del self._left[phase]
        self.version += 1
        return done

    def take(self, shares: Shares) -> str:
        """Give each phase its part from now on."""
        self._advance(self.clock())
        self.prefill_part = shares.part(Phase.PREFILL)
        self.version += 1
        return "simulated"

    def advance(self) -> bool:
        """Say that the shares taken last are in force."""
        return True

    def next_end(self) -> float | None:
        """Return when the next work is done if none begins before, None if there is none."""
        ends = [self._now + seconds / self._speed(phase) for phase, seconds in self._left.items()]
        return min(ends, default=None)

    def _advance(self, now: float) -> None:
        passed, self._now = now - self._now, now
        speeds = {phase: self._speed(phase) for phase in self._left}
        for phase, speed in speeds.items():
            self._left[phase] = max(0.0, self._left[phase] - passed * speed)

    def _speed(self, phase: Phase) -> float:
        if len(self._left) == 1:
            return 1.0
        return self.prefill_part if phase is Phase.PREFILL else 1 - self.prefill_part
