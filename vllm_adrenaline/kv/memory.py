"""How a prefill worker's KV cache is read, in the worker itself and in its attention executor: mapping and type."""

import contextlib
import mmap

import torch


def map_kv(fd: int, size: int) -> mmap.mmap:
    """Return the mapping of a memory file of `size` bytes, in huge pages where the system allows.

    It allows them if /sys/kernel/mm/transparent_hugepage/shmem_enabled says `advise`. Otherwise the mapping is an
    ordinary one. Attention reads all KV of its requests once a step, so it misses the TLB on every page: huge pages
    save 2 to 5 % of its time (docs/performance.md).
    """
    mapped = mmap.mmap(fd, size)
    with contextlib.suppress(OSError):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    return mapped


def dtype_of(name: str) -> torch.dtype:
    """Return torch's dtype of this name. Raises ValueError if there is none."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} is no dtype")
    return dtype
