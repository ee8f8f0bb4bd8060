"""How one process tells another where GPU memory is (system/device_memory.py). Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

HANDLE_BYTES = 64


@dataclass(frozen=True)
class Handle:
    """Where exported memory is. Raises ValueError if it cannot be what `device_memory.export` made.

    Attributes:
        data: what CUDA calls the memory.
        offset, size: the part of it that is meant, in bytes.
    """

    data: bytes
    offset: int
    size: int

    def __post_init__(self) -> None:
        if len(self.data) != HANDLE_BYTES or not 0 <= self.offset < 1 << 50 or not 0 < self.size < 1 << 50:
            raise ValueError("this is no handle of device memory")
