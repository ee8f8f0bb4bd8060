"""Where a model's weights are that no tensor refers to: oneDNN's handlers own packed ones (vllm/_custom_ops.py).

vLLM packs the weight of a linear layer when the model is loaded, and drops the weight. The copy belongs to a C++ object
that does not tell where it is. It is the block of memory that appears while the object is made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from vllm import _custom_ops as ops

from vllm_adrenaline.system import malloc, pages

MAKERS = ("create_onednn_mm", "create_onednn_scaled_mm")

Packed = tuple[tuple[int, ...], torch.dtype, int, int]
"""The shape [K, N] and dtype of a weight before it was packed; the address and bytes of the packed one."""


@contextlib.contextmanager
def followed() -> Iterator[Callable[[Any], Packed | None]]:
    """A context in which a model is loaded, so that its weights can be shared.

    Each large weight begins at the same place in a page in every process (system/malloc.py). The value of the context
    is a function that tells where the weight of a handler is, and returns None for what is no handler. It finds blocks
    that have mappings of their own, and misses others.
    """
    found: dict[int, Packed] = {}
    real = {name: getattr(ops, name) for name in MAKERS}

    def locate(owner: Any) -> Packed | None:
        return found.get(int(owner.handler_tensor)) if isinstance(owner, ops.CPUDNNLGEMMHandler) else None

    with malloc.own_mappings():
        for name, make in real.items():
            setattr(ops, name, _recording(make, found))
        try:
            yield locate
        finally:
            for name, make in real.items():
                setattr(ops, name, make)


def _recording(make: Callable[..., Any], found: dict[int, Packed]) -> Callable[..., Any]:
    """Return `make`, which also notes the smallest new block that can hold the weight."""

    def record(weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        before = pages.anonymous()
        handler = make(weight, *args, **kwargs)
        new = malloc.blocks(pages.grown(before, pages.anonymous()))
        if large := [(size, address) for address, size in new if size >= weight.nbytes]:
            size, address = min(large)
            found[int(handler.handler_tensor)] = tuple(weight.shape), weight.dtype, address, size
        return handler

    return record
