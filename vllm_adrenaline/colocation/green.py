"""Green contexts: a process limits itself to some SMs, with no daemon (CUDA 12.4; torch.cuda.green_contexts).

Tested against a fake of torch's interface, not run on a GPU yet (docs/gpu-status.md).
"""

from __future__ import annotations

from typing import Any

from vllm_adrenaline.errors import AdrenalineError

GRANULARITY = 8
"""SMs are split in groups of so many from Hopper on (CUDA driver API, cuDevSmResourceSplitByCount)."""


def sms_of(share: float, total: int) -> int:
    """Return how many of `total` SMs a share is: whole groups, at least one, never more than there are."""
    if not 0 < share <= 1:
        raise AdrenalineError(f"a share of a GPU is more than 0 and at most 1, not {share:g}")
    return min(total, max(GRANULARITY, round(share * total / GRANULARITY) * GRANULARITY))


def is_available(cuda: Any) -> bool:
    """Whether this torch.cuda offers green contexts."""
    return hasattr(getattr(cuda, "green_contexts", None), "GreenContext")


def enter(share: float, device: int, cuda: Any) -> Any:
    """Make this thread's CUDA work run on a share of a device's SMs; return the context, to be kept alive."""
    if not is_available(cuda):
        raise AdrenalineError("this torch has no green contexts (torch.cuda.green_contexts): use CUDA MPS instead")
    total = cuda.get_device_properties(device).multi_processor_count
    context = cuda.green_contexts.GreenContext.create(num_sms=sms_of(share, total), device_id=device)
    context.set_context()
    return context
