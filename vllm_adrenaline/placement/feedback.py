"""Costs corrected while serving: what steps really took replaces what the profile said. Pure bookkeeping.

Every `WINDOW` steps the observed cost is compared with the assumed one. Within `DEADBAND` nothing changes, so that
noise moves nothing; beyond it the assumption follows, by at most a factor `LARGEST`: one odd window moves little.

How long a link to another host takes can be seen where decode steps wait for one executor. Where they do not wait, it
takes no longer than what hides it: what is believed of it then stands, unless it is more than that. Over a link that
became too slow nothing is sent any more, so its cost goes back to what was measured at the start, by a factor
`FORGOTTEN` each window, until somebody tries again.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from vllm_adrenaline.placement.costs import Costs

WINDOW = 16
DEADBAND = 0.05
LARGEST = 1.25
FORGOTTEN = 1.01


class Step(msgspec.Struct, frozen=True):
    """One decode step as it was. Seconds; `total` is 0 for a step that also computed prompts. `local_seconds` and
    `exposed` are 0 in steps with no offloaded row, where nobody measures them. `remote_seconds` are those that each
    executor computed. `remote_rows` has the rows of each, and is empty if nobody says."""

    rows: int
    local_tokens: int
    remote_tokens: Sequence[int]
    total: float
    local_seconds: float
    remote_seconds: Sequence[float]
    exposed: float
    remote_rows: Sequence[int] = ()


class Feedback:
    """Holds `costs`, the present belief; `corrections` counts the changes."""

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.corrections = 0
        self._links = list(costs.link)  # as they were measured at the start
        self._begin()

    def observe(self, step: Step) -> None:
        """Take one step; every WINDOW steps the costs follow."""
        costs = self.costs
        if step.local_seconds > 0:
            self._local.add(step.local_seconds, costs.local * step.local_tokens)
        for executor, tokens in enumerate(step.remote_tokens):
            if tokens and step.remote_seconds[executor] > 0:
                self._remote[executor].add(step.remote_seconds[executor], costs.remote[executor] * tokens)
        self._observe_link(step)
        if step.total > 0 and step.rows:
            measured = step.local_seconds + step.exposed
            attention = measured + costs.plan if measured else costs.local * step.local_tokens
            self._other.add(max(0.0, step.total - attention), costs.other(step.rows))
        self._steps += 1
        if self._steps == WINDOW:
            self._correct()
            self._begin()

    def _observe_link(self, step: Step) -> None:
        """Take what a step with rows of one executor says of the link to it."""
        if not self.costs.link:  # all executors are on this host
            return
        used = [executor for executor, tokens in enumerate(step.remote_tokens) if tokens]
        self._used.update(used)
        if len(used) != 1 or not (assumed := self.costs.link_seconds(used[0])) or not step.remote_seconds[used[0]]:
            return
        whole = step.local_seconds + step.exposed
        # What rows take on the way has a cost of its own, and counts once.
        rows = self.costs.exchange * (step.remote_rows[used[0]] if step.remote_rows else 0)
        most = max(whole - step.remote_seconds[used[0]] - rows, 1e-9)
        waits = step.exposed > DEADBAND * whole
        self._link[used[0]].add(most if waits else min(most, assumed), assumed)

    def _begin(self) -> None:
        self._steps = 0
        self._local, self._other = _Sums(), _Sums()
        self._remote = [_Sums() for _ in self.costs.remote]
        self._link, self._used = [_Sums() for _ in self.costs.link], set[int]()

    def _correct(self) -> None:
        old = self.costs
        by = self._other.factor()
        self.costs = Costs(
            step=[(rows, seconds * by) for rows, seconds in old.step],
            local=old.local * self._local.factor(),
            remote=[each * sums.factor() for each, sums in zip(old.remote, self._remote, strict=True)],
            exchange=old.exchange,
            plan=old.plan,
            link=[self._link_after(e, seconds) for e, seconds in enumerate(old.link)],
        )
        self.corrections += self.costs != old

    def _link_after(self, executor: int, assumed: float) -> float:
        """Return what a link is believed to take after this window."""
        if executor not in self._used:
            return max(assumed / FORGOTTEN, min(assumed, self._links[executor]))
        return assumed * self._link[executor].factor()


class _Sums:
    def __init__(self) -> None:
        self._seen = self._assumed = 0.0

    def add(self, seen: float, assumed: float) -> None:
        self._seen += seen
        self._assumed += assumed

    def factor(self) -> float:
        if self._assumed <= 0 or self._seen <= 0:
            return 1.0
        ratio = self._seen / self._assumed
        if abs(ratio - 1) <= DEADBAND:
            return 1.0
        return min(max(ratio, 1 / LARGEST), LARGEST)
