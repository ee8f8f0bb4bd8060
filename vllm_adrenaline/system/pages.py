"""Pages of this process: what is mapped where, and mapping something else there."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
FIXED = 0x10
"""MAP_FIXED of Linux: map at this very address, instead of what is there."""
POPULATE_READ = 22
"""MADV_POPULATE_READ of Linux 5.14: map all pages now, so that nobody waits for a page fault later."""
_FAILED = ctypes.c_void_p(-1).value


class Range(NamedTuple):
    """Addresses from `begin` to before `end`."""

    begin: int
    end: int


def map_pages(address: int | None, size: int, access: int, flags: int, fd: int, offset: int) -> int:
    """Call mmap(2), and return the address. Raises OSError when it fails."""
    found = libc.mmap(address, size, access, flags, fd, offset)
    if found is None or found == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot map {size} bytes: {os.strerror(number)}")
    return int(found)


def unmap(pages: Range) -> None:
    """Call munmap(2)."""
    libc.munmap(pages.begin, pages.end - pages.begin)


def replace_by_file(pages: Range, fd: int, offset: int) -> None:
    """Map a piece of a file over pages of this process, privately: what is written there later, only this process sees.

    The piece must hold what the pages hold. The caller may close the file. Raises OSError when it cannot be mapped; the
    pages are as they were then.
    """
    access = mmap.PROT_READ | mmap.PROT_WRITE
    map_pages(pages.begin, pages.end - pages.begin, access, mmap.MAP_PRIVATE | FIXED, fd, offset)
    with contextlib.suppress(OSError):
        advise(pages, POPULATE_READ)


def advise(pages: Range, advice: int) -> None:
    """Call madvise(2). Raises OSError when it fails."""
    if libc.madvise(pages.begin, pages.end - pages.begin, advice):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def are_equal(address: int, other: int, size: int) -> bool:
    """Say whether so many bytes at two addresses are equal. Both must be mapped."""
    return libc.memcmp(address, other, size) == 0


def inner_pages(address: int, size: int) -> Range:
    """Return the whole pages that hold nothing but the `size` bytes at `address`; an empty range if there are none."""
    begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    return Range(begin, max(begin, (address + size) // mmap.PAGESIZE * mmap.PAGESIZE))


def anonymous() -> list[Range]:
    """Return the mappings of this process that are private, writable and of no file, in the order of addresses."""
    found: list[Range] = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if fields[1] == "rw-p" and fields[4] == "0":
            begin, _, end = fields[0].partition("-")
            found.append(Range(int(begin, 16), int(end, 16)))
    return found


def in_huge_pages(ranges: Sequence[Range]) -> int:
    """Return how many bytes of the mappings in which these ranges lie are in huge pages."""
    starts, total, counts = sorted(each.begin for each in ranges), 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        word = line.split(maxsplit=1)[0]
        if word == "AnonHugePages:":
            total += 1024 * int(line.split()[1]) if counts else 0
        elif not word.endswith(":"):
            begin, end = (int(each, 16) for each in word.split("-"))
            counts = bisect_right(starts, end - 1) > bisect_right(starts, begin - 1)
    return total


def is_inside(pages: Range, ranges: Sequence[Range]) -> bool:
    """Say whether `pages` are inside one of `ranges`, or of several without a gap. They are in order."""
    begin, at = pages.begin, bisect_right(ranges, pages.begin, key=lambda each: each.begin) - 1
    while begin < pages.end:
        if not 0 <= at < len(ranges) or not ranges[at].begin <= begin < ranges[at].end:
            return False
        begin, at = ranges[at].end, at + 1
    return True


def grown(before: Sequence[Range], after: Sequence[Range]) -> list[Range]:
    """Return what is in `after` and not in `before`. Both are in the order of addresses."""
    found: list[Range] = []
    for begin, end in after:
        at = begin
        for old in before[max(0, bisect_right(before, begin, key=lambda each: each.begin) - 1) :]:
            if old.begin >= end:
                break
            if old.end <= at:
                continue
            if old.begin > at:
                found.append(Range(at, old.begin))
            at = old.end
        if at < end:
            found.append(Range(at, end))
    return found
