"""A range of addresses into which pieces of memory files are mapped, one behind the other."""

from __future__ import annotations

import ctypes
import mmap
import os

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_FAILED = ctypes.c_void_p(-1).value
_NONE, _NO_RESERVE, _FIXED = 0x0, 0x4000, 0x10  # PROT_NONE, MAP_NORESERVE, MAP_FIXED of Linux


class AddressRange:
    """Addresses that belong to this process until it ends. What is not mapped must not be touched.

    Attributes:
        buffer: all of it, as a ctypes array. Whatever is made of it must not outlive the process's mappings.
    """

    def __init__(self, size: int) -> None:
        """Take `size` bytes of addresses, whole pages. Raises OSError when there are not so many."""
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        self._begin = self._mmap(None, size, _NONE, private, -1, 0)
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
        self._mmap(self._begin + at, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _FIXED, fd, offset)

    def unmap(self, at: int, size: int) -> None:
        """Let go of what is mapped there; the addresses stay ours. Arguments and errors are as for `map`."""
        if any(each % mmap.PAGESIZE for each in (at, size)) or not 0 <= at <= at + size <= self._size:
            raise ValueError(f"{size} bytes at {at} in a range of {self._size}")
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        self._mmap(self._begin + at, size, _NONE, private | _FIXED, -1, 0)

    @staticmethod
    def _mmap(address: int | None, size: int, access: int, flags: int, fd: int, offset: int) -> int:
        found = _libc.mmap(address, size, access, flags, fd, offset)
        if found is None or found == _FAILED:
            number = ctypes.get_errno()
            raise OSError(number, f"cannot map {size} bytes: {os.strerror(number)}")
        return int(found)
