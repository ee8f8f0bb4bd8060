"""Where a prefill worker's KV cache is, as executors and decode workers on the same host are told."""

from __future__ import annotations

from typing import Annotated

import msgspec

Text = Annotated[str, msgspec.Meta(max_length=512)]
Natural = Annotated[int, msgspec.Meta(ge=0, le=1 << 50)]
Four = Annotated[list[Natural], msgspec.Meta(min_length=4, max_length=4)]


class LayerSpec(msgspec.Struct, frozen=True):
    """One attention layer.

    Attributes:
        name: the layer's name in vLLM.
        offset: where its KV cache begins in the memory file, in bytes.
        scale: of the softmax.
    """

    name: Text
    offset: Natural
    scale: float


class KVExport(msgspec.Struct, frozen=True):
    """One prefill worker's KV cache: a memory file of `size` bytes, and how to read it.

    Attributes:
        size: of the file, in bytes.
        shape, strides: of a layer's view [blocks, KV heads, 2 * block size, head size]; strides in elements. Keys are
            in the first half of the third axis, values in the second, both packed as `isa` wants.
        dtype: torch's name of it, as "bfloat16".
        isa: vLLM's name of the layout.
        num_heads: query heads.
        layers: the attention layers, in the order of their numbers.
        cpus, threads: the cores that the worker may use, and the number of its threads.
    """

    size: Natural
    shape: Four
    strides: Four
    dtype: Text
    isa: Text
    num_heads: Natural
    layers: Annotated[list[LayerSpec], msgspec.Meta(min_length=1, max_length=4096)]
    cpus: Annotated[list[Natural], msgspec.Meta(max_length=4096)]
    threads: Natural
