"""glibc's malloc: blocks that have mappings of their own, so that they begin at the same place in a page everywhere.

glibc maps a block of M_MMAP_THRESHOLD bytes and more on its own. That begins at 128 KiB, and grows with each such block
that is freed: what is allocated later lies anywhere in the heap. Other allocators are asked in vain: tcmalloc does
nothing, and begins large blocks at whole pages anyhow.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterator

from vllm_adrenaline.system.pages import Range, libc

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
OWN_MAPPING = 128 << 10
"""Bytes of the smallest block that has a mapping of its own meanwhile: where glibc itself begins."""
STAYS = 32 << 20
"""Bytes of that block afterwards: where glibc would have let the threshold grow at most."""
_LEADS = (mmap.PAGESIZE, 256, 128, 64, 32, 16)
"""Where a block may begin in its own mapping: where posix_memalign puts it, or after its header. The largest first:
posix_memalign leaves the header of a block that would begin after 16 bytes."""
_IS_MAPPED, _FLAGS = 2, 7


@contextlib.contextmanager
def own_mappings() -> Iterator[None]:
    """A context in which every block of OWN_MAPPING bytes and more has a mapping of its own.

    glibc cannot be told to go on growing the threshold afterwards. So it is set to where it ends: else blocks of a step
    would be mapped and unmapped each time. Free memory at the end of the heap stays up to twice that.
    """
    libc.mallopt(_MMAP_THRESHOLD, OWN_MAPPING)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, STAYS)
        libc.mallopt(_TRIM_THRESHOLD, 2 * STAYS)


def blocks(ranges: list[Range]) -> Iterator[tuple[int, int]]:
    """Yield (address, bytes) of glibc's blocks that have mappings of their own in these ranges.

    The ranges must be readable. A block is known by its header, whose two words must agree with the mapping. What fits
    into free memory of the heap has no mapping of its own.
    """
    for begin, end in ranges:
        at = begin
        while at < end:
            for lead in _LEADS:
                if at + lead > end:
                    continue
                before, size = (ctypes.c_uint64 * 2).from_address(at + lead - 16)
                total = (size & ~_FLAGS) + lead - 16
                fits = total % mmap.PAGESIZE == 0 and lead < total <= end - at
                if before == lead - 16 and size & _FLAGS == _IS_MAPPED and fits:
                    yield at + lead, total - lead
                    at += total
                    break
            else:
                at += mmap.PAGESIZE
