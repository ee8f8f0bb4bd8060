"""What is being decoded, pool by pool: how far each request is, and how much memory they fill together."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import msgspec


class Progress(msgspec.Struct, frozen=True):
    """How far a request is, in tokens.

    Attributes:
        prompt: Tokens of its prompt.
        output: Tokens that it has generated.
        max_output: Tokens that it generates at most.
    """

    prompt: int
    output: int
    max_output: int

    @property
    def tokens(self) -> int:
        """Tokens of its context now."""
        return self.prompt + self.output


@dataclass
class PlacementLoad:
    """The part of a batch whose KV is in one pool.

    Most batches are only counted. So `blocks` and `lengths` follow when a decision needs them.

    Attributes:
        requests: How far each request is.
        tokens: Tokens of context of all of them.
        blocks: Blocks that these tokens fill.
        lengths: Tokens and expected growth of each request.
    """

    requests: list[Progress] = field(default_factory=list)
    tokens: int = 0
    blocks: int = 0
    lengths: list[tuple[int, int]] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """How many requests there are."""
        return len(self.requests)


@dataclass
class Batch:
    """All requests that hold KV memory of the decode engine or of a prefill engine.

    Attributes:
        local: Those in the decode engine's own memory.
        remote: Those that executors attend, by executor.
        mapped: Those that the decode engine attends in the memory of a prefill engine, by the same number.
    """

    local: PlacementLoad = field(default_factory=PlacementLoad)
    remote: dict[int, PlacementLoad] = field(default_factory=lambda: defaultdict(PlacementLoad))
    mapped: dict[int, PlacementLoad] = field(default_factory=lambda: defaultdict(PlacementLoad))

    def add(self, request: Progress, executor: int | None, is_mapped: bool = False) -> None:
        """Add a request in the memory beside an executor or, for None, of the decode engine."""
        load = self.local if executor is None else (self.mapped if is_mapped else self.remote)[executor]
        load.requests.append(request)
        load.tokens += request.tokens

    @property
    def rows(self) -> int:
        """How many requests there are."""
        return self.local.rows + self.mapped_rows + sum(load.rows for load in self.remote.values())

    @property
    def mapped_rows(self) -> int:
        """How many of them are mapped."""
        return sum(load.rows for load in self.mapped.values())

    @property
    def attended_here(self) -> tuple[int, int]:
        """Rows and tokens of context that the decode engine attends itself: local and mapped ones."""
        return (
            self.local.rows + self.mapped_rows,
            self.local.tokens + sum(load.tokens for load in self.mapped.values()),
        )

    def remote_rows(self, executors: int) -> list[int]:
        """Return the requests of the first `executors` executors."""
        return [self.remote[e].rows if e in self.remote else 0 for e in range(executors)]

    def remote_tokens(self, executors: int) -> list[int]:
        """Return the tokens of context of the first `executors` executors."""
        return [self.remote[e].tokens if e in self.remote else 0 for e in range(executors)]
