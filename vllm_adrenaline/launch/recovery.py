"""Recovery: processes of a supervisor that end are started again, while the others go on."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.launch.engine_command import EngineCommand
from vllm_adrenaline.launch.restarts import LIMIT, WITHIN_S, Restarts
from vllm_adrenaline.launch.supervisor import Supervisor, is_ready
from vllm_adrenaline.system.terminal import say

GROUP_S = 1.0
"""Seconds that the rest of a process group has to end after the process that leads it."""


@dataclass
class _State:
    """Where one process stands; times are of time.monotonic. `due`: when it is to be started, None if it runs."""

    started: float
    ready: float | None
    due: float | None = None
    restarts: Restarts = field(default_factory=Restarts)


class Recovery:
    """Watches over the processes of a supervisor that are all ready."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        now = time.monotonic()
        self._states = {spec.name: _State(now, now) for spec in supervisor.specs}

    def step(self) -> None:
        """See to every process once. Raises AdrenalineError for one that has ended too often."""
        for spec in self._supervisor.specs:
            state, process = self._states[spec.name], self._supervisor.processes[spec.name]
            now = time.monotonic()
            process.bound_log()
            if state.due is not None:
                if now >= state.due:
                    self._launch(spec)
            elif process.exit_status is not None:
                self._ended(spec.name, process.failure())
            elif state.ready is None:
                if is_ready(spec.url):
                    state.ready = now
                    process.remember_shared_memory()
                    say(f"{process.label}: ready again after {now - state.started:.0f} s")
                elif why := self._supervisor.stuck(process, now - state.started):
                    process.terminate()
                    self._ended(spec.name, why)

    def _launch(self, spec: EngineCommand) -> None:
        state = self._states[spec.name]
        try:
            self._supervisor.launch(spec)
        except OSError as error:  # of memory, processes or disk there is too little at present
            self._ended(spec.name, f"the {self._supervisor.processes[spec.name].label} cannot be started: {error}")
        else:
            state.started, state.due = time.monotonic(), None

    def _ended(self, name: str, why: str) -> None:
        state, process = self._states[name], self._supervisor.processes[name]
        now = time.monotonic()
        pause = state.restarts.pause(now, 0.0 if state.ready is None else now - state.ready)
        if pause is None:
            raise AdrenalineError(
                f"the {process.label} ended more than {LIMIT} times in {WITHIN_S / 60:.0f} minutes; the last time {why}"
            )
        # What it has left, e.g. the executors of a prefill engine, holds memory that the next one needs.
        process.finish(now + GROUP_S)
        say(f"{why}\n[adrenaline] {process.label}: started again in {pause:g} s")
        state.ready, state.due = None, now + pause
