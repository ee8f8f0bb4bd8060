"""Mapping a prefill worker's KV cache, a memory file: in the worker itself and in its attention executor."""

import contextlib
import mmap


def map_kv(fd: int, size: int) -> mmap.mmap:
    """Map the file, in huge pages where the system allows (/sys/kernel/mm/transparent_hugepage/shmem_enabled: advise).

    Attention reads the whole cache once a step, so it misses the TLB on every page: worth 2 to 5 % of its time
    (docs/performance.md). Where huge pages are not to be had, the mapping is an ordinary one.
    """
    mapped = mmap.mmap(fd, size)
    with contextlib.suppress(OSError):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    return mapped
