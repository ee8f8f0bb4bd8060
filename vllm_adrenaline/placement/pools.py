"""The KV memory that requests can be placed in, as it is at one moment."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class LocalPool(msgspec.Struct, frozen=True):
    """KV memory of the decode engine, in blocks: `total`, and `free` now."""

    total: int
    free: int


class ExecutorPool(msgspec.Struct, frozen=True):
    """KV memory of a prefill engine, as its executor or the decode engine can use it. All sizes are blocks.

    Attributes:
        total: What the prefill engine has.
        free: What is free there now.
        reserve: What it never lends.
        leased: Blocks that are lent to us already and that no request uses yet.
        available: Whether the executor answers.
        mappable: Whether the decode engine may attend it itself.
        busy: Share of its time, 0 to 1, that the prefill engine computes.
        recalls: Whether the prefill engine asks for memory back.
    """

    total: int
    free: int
    reserve: int
    leased: int = 0
    available: bool = True
    mappable: bool = False
    busy: float = 0.0
    recalls: bool = False

    @property
    def room(self) -> int:
        """Blocks into which offloaded requests can grow."""
        return self.leased + max(0, self.free - self.reserve)


class Pools(msgspec.Struct, frozen=True):
    """The memory of all engines as it is now. The place of an executor in the list is its number."""

    local: LocalPool
    executors: Sequence[ExecutorPool]

    def with_local_taken(self, blocks: int) -> Pools:
        """Return the same with fewer free local blocks."""
        return Pools(LocalPool(self.local.total, self.local.free - blocks), self.executors)
