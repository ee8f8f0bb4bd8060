"""A range of addresses into which pieces of memory files are mapped, one behind the other."""

from __future__ import annotations

import ctypes
import mmap

from vllm_adrenaline.system.pages import FIXED, map_pages

_NONE, _NO_RESERVE = 0x0, 0x4000  # PROT_NONE, MAP_NORESERVE of Linux


class AddressRange:
    """Addresses that belong to this process until it ends. What is not mapped must not be touched.

    Attributes:
        buffer: all of it, as a ctypes array. Whatever is made of it must not outlive the process's mappings.
    """

    def __init__(self, size: int) -> None:
        """Take `size` bytes of addresses, whole pages. Raises OSError when there are not so many."""
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        self._begin = map_pages(None, size, _NONE, private, -1, 0)
        self._size = size
        self.buffer = (ctypes.c_char * size).from_address(self._begin)

    def map(self, at: int, fd: int, offset: int, size: int) -> None:
        """Map bytes of a memory file, instead of what was mapped there before.

        Args:
            at: where in the range; like the others in bytes, and whole pages.
            fd: of the file; the caller may close it afterwards.
            offset, size: of the piece of the file.

        Raises:
            ValueError: the piece does not lie in the range, or is not whole pages.
            OSError: it cannot be mapped.
        """
        if any(each % mmap.PAGESIZE for each in (at, offset, size)) or not 0 <= at <= at + size <= self._size:
            raise ValueError(f"{size} bytes at {at}, from {offset} of a file, in a range of {self._size}")
        map_pages(self._begin + at, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | FIXED, fd, offset)

    def unmap(self, at: int, size: int) -> None:
        """Let go of what is mapped there; the addresses stay ours. Arguments and errors are as for `map`."""
        if any(each % mmap.PAGESIZE for each in (at, size)) or not 0 <= at <= at + size <= self._size:
            raise ValueError(f"{size} bytes at {at} in a range of {self._size}")
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        map_pages(self._begin + at, size, _NONE, private | FIXED, -1, 0)
