"""A change of shares that takes new processes: semi-PD's delayed and asynchronous switch (arXiv 2504.19867). Pure.

A process on a GPU keeps the share with which it started (a CUDA MPS percentage). So a change starts a new worker, which
binds the weights and the KV cache that are there, while the old one serves: the switch is delayed. Each phase goes over
to its new worker after an iteration of its own: the switch is asynchronous, and for a moment one phase may have its new
share and the other one its old.

Nothing calls this yet, for no worker here runs on a GPU (docs/gpu-status.md). It is the order of the events, and has
been seen with fakes only.
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

from vllm_adrenaline.colocation.controller import Phase, Shares


class State(Enum):
    """Where a phase is in a change."""

    IDLE = "idle"
    """It keeps its share."""
    PREPARING = "preparing"
    """Its new worker starts; the old one serves."""
    READY = "ready"
    """Its new worker could serve; the old one is in an iteration."""
    SWITCHED = "switched"
    """Its new worker serves."""


class Workers(Protocol):
    """The workers of both phases, one in use each."""

    def prepare(self, phase: Phase, share: float) -> None:
        """Begin to start a worker with this share, beside the one that serves."""

    def is_ready(self, phase: Phase) -> bool:
        """Whether the worker that was prepared has the weights and the KV cache, and could serve."""

    def switch(self, phase: Phase) -> None:
        """Let the worker that was prepared serve from now on, and end the one that served."""


class DelayedSwitch:
    """Carries a change of shares out by replacing workers (tuner.py, Device).

    Attributes:
        states: of each phase.
    """

    def __init__(self, workers: Workers, shares: Shares) -> None:
        """Begin with workers that have these shares."""
        self._workers, self._shares = workers, shares
        self.states = dict.fromkeys(Phase, State.IDLE)

    def take(self, shares: Shares) -> str:
        """Prepare a new worker for each phase whose share changes. The last change must be in force."""
        assert self._is_over(), "one change after the other"
        for phase in Phase:
            changes = shares.of(phase) != self._shares.of(phase)
            self.states[phase] = State.PREPARING if changes else State.IDLE
            if changes:
                self._workers.prepare(phase, shares.of(phase))
        self._shares = shares
        return ", ".join(f"{phase.value}: {self.states[phase].value}" for phase in Phase)

    def advance(self) -> bool:
        """Note which workers are ready; return whether the shares taken last are in force."""
        for phase, state in self.states.items():
            if state is State.PREPARING and self._workers.is_ready(phase):
                self.states[phase] = State.READY
        return self._is_over()

    def end_iteration(self, phase: Phase) -> None:
        """Let a phase go over to its new worker, if that is ready. Its own loop calls this after each iteration."""
        if self.states[phase] is State.READY:
            self._workers.switch(phase)
            self.states[phase] = State.SWITCHED

    def _is_over(self) -> bool:
        return all(state in (State.IDLE, State.SWITCHED) for state in self.states.values())
