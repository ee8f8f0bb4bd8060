"""The tuner of the shares of a device: it feeds the controller (controller.py), and has its decisions carried out.

Runs in the prefill engine's control thread. Without an objective no share is moved after the first ones.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol, Self

from vllm_adrenaline.colocation.controller import Change, Limits, Objectives, ShareController, Shares
from vllm_adrenaline.colocation.model import smallest_prefill_share

logger = logging.getLogger("vllm.adrenaline")

TYPICAL_PROMPT = 512
"""Tokens of the prompt by which the first shares are chosen."""
BESIDE_PROMPTS = 0.15
"""Decode's part, to begin with, of a device that both engines have all of, while prompts want it. Prompts that are done
sooner join the batch sooner, and every step less is one fixed cost less (docs/performance.md)."""
PARTS = tuple(part / 20 for part in range(1, 21))
"""Parts of the device from which prefill's first one is chosen."""


class Device(Protocol):
    """A device that prefill and decode share, and how their shares are changed.

    A change may take a while, and each phase may change at a moment of its own. On CPU it is done at once (cpu.py). A
    process on a GPU keeps the share with which it started, so there a new one is prepared first (delayed_switch.py).
    """

    def take(self, shares: Shares) -> str:
        """Begin to give each phase its share; return in words what that did. PermissionError: it may not be done."""

    def advance(self) -> bool:
        """Go on with what was begun; return whether the shares taken last are in force. Called at every update."""


def first_shares(prefill: Sequence[tuple[int, float]], ttft_s: float | None, decode: float, limits: Limits) -> Shares:
    """Return the shares to begin with: the smallest part for prefill that meets the objective, the rest for decode.

    Args:
        prefill: (tokens of a prompt, seconds to compute it) of an engine that does nothing else. With a part x of the
            device it is taken to need 1 / x of that time (semi-PD, equation 1).
        ttft_s: the objective for the time to first token, in seconds.
        decode: decode's part of the device without an objective or a profile, and its largest one.
        limits: within which the shares are.
    """
    if ttft_s is not None and prefill:
        _, seconds = min(prefill, key=lambda point: abs(point[0] - TYPICAL_PROMPT))
        decode = min(decode, 1 - smallest_prefill_share({each: seconds / each for each in PARTS}, ttft_s))
    return Shares.dividing(decode, limits.low)


class ShareTuner:
    """Moves the shares of prefill and decode on one device, so that their objectives are met.

    Attributes:
        shares: those in force that were decided here; None until the first are.
    """

    def __init__(
        self,
        objectives: Objectives,
        decode: float,
        prefill: Sequence[tuple[int, float]],
        device: Device,
        limits: Limits = Limits(window=16),  # noqa: B008 - frozen
        settle: int = 6,
        divides: bool = False,
    ) -> None:
        """Take the objectives and what there is to begin with.

        Args:
            objectives: what is to be met.
            decode: decode's part of the device to begin with, if `prefill` or an objective is missing.
            prefill: what a prefill engine takes that does nothing else (Profile.prefill).
            device: what is shared.
            limits: of the controller.
            settle: updates after a change until what is observed counts. What a decode engine says of its steps is of
                the last 64 (recent_steps.py). Steps of 50 ms are 3 s then, and two updates are a second.
            divides: whether the first shares are carried out without an objective, too.
        """
        self.shares: Shares | None = None
        self._is_on = divides or objectives.ttft is not None or objectives.tpot is not None
        self._device = device
        self._controller = ShareController(objectives, limits, first_shares(prefill, objectives.ttft, decode, limits))
        self._settle, self._settling = settle, 0
        self._has_begun = False
        self._ttft: deque[float] = deque(maxlen=4096)

    @classmethod
    def of_two_engines(cls, objectives: Objectives, prefill: Sequence[tuple[int, float]], device: Device) -> Self:
        """Return the tuner of a device that a prefill and a decode engine have all of.

        It is divided from the beginning, and prompts come first. If that is too little for the TPOT, one window tells.
        What is too little for prompts is seen only when they have piled up. So decode begins with half only where the
        TPOT alone has an objective.
        """
        decode = 0.5 if objectives.tpot is not None and objectives.ttft is None else BESIDE_PROMPTS
        return cls(objectives, decode, prefill, device, divides=True)

    def observe_ttft(self, seconds: float) -> None:
        """Note that a prompt was done so many seconds after its request came. The scheduler's thread calls this."""
        self._ttft.append(seconds)

    def update(self, tpots: Iterable[float]) -> None:
        """Let the controller decide, and have its decision carried out. To be called now and then.

        `tpots`: what decode engines said last of their steps, in seconds. The slowest counts.
        """
        if not self._is_on:
            return
        try:
            self._update(max(tpots, default=0.0))
        except PermissionError as error:
            self._is_on = False
            logger.warning("the shares of prefill and decode stay as they are: %s", error)

    def _update(self, tpot: float) -> None:
        if not self._has_begun:
            self._has_begun = True
            self._carry_out("the first shares")
        if not self._is_observing():
            self._ttft.clear()
            self._controller.discard()
            return
        while self._ttft:
            self._controller.observe_ttft(self._ttft.popleft())
        if tpot:
            self._controller.observe_tpot(tpot)
        change = self._controller.update()
        if change is not Change.KEPT:
            self._carry_out(change.value)

    def _carry_out(self, why: str) -> None:
        """Have the controller's shares carried out."""
        shares = self._controller.shares
        words = self._device.take(shares)
        logger.info(
            "%s: prefill may use %.2f of the device, decode %.2f (%s)", why, shares.prefill, shares.decode, words
        )
        self._settling = self._settle
        self._note_in_force()

    def _is_observing(self) -> bool:
        """Go on with a change; return whether the shares are in force for long enough that observations are of them."""
        if not self._note_in_force():
            self._settling = self._settle
            return False
        self._settling = max(0, self._settling - 1)
        return not self._settling

    def _note_in_force(self) -> bool:
        is_in_force = self._device.advance()
        if is_in_force:
            self.shares = self._controller.shares
        return is_in_force
