"""Where a prefill worker's KV cache is, as executors and decode workers on the same host are told.

It is in a memory file, or in the memory of a GPU.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from vllm_adrenaline.system.device_handle import Handle

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


class KVExport(msgspec.Struct, frozen=True, tag=True):
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


class GpuLayerSpec(msgspec.Struct, frozen=True):
    """One attention layer whose KV cache is in GPU memory.

    Attributes:
        name: the layer's name in vLLM.
        memory: which of the memories it is in.
        keys, values: where its keys and values begin there, in bytes.
        scale: of the softmax.
        soft_cap: of the logits; 0: none.
        window: tokens that a token attends, itself included; 0: all.
        k_scale, v_scale: what a number of an fp8 cache is multiplied by.
    """

    name: Text
    memory: Natural
    keys: Natural
    values: Natural
    scale: float
    soft_cap: float = 0.0
    window: Natural = 0
    k_scale: float = 1.0
    v_scale: float = 1.0


class GpuKVExport(msgspec.Struct, frozen=True, tag=True):
    """One prefill worker's KV cache in GPU memory, and how to read it.

    Attributes:
        device: the GPU's number, as the worker and its executor count.
        memories: the GPU's memory that it is in; one, if vLLM allocates it at once.
        shape, strides: of a layer's keys, or values: [blocks, block size, KV heads, head size]; strides in elements.
        dtype, message: torch's names of the types of the cache, and of q, k, v and output.
        num_heads: query heads.
        layers: the attention layers, in the order of their numbers.
        cpus, threads: as in KVExport.
    """

    device: Natural
    memories: Annotated[list[Handle], msgspec.Meta(min_length=1, max_length=4096)]
    shape: Four
    strides: Four
    dtype: Text
    message: Text
    num_heads: Natural
    layers: Annotated[list[GpuLayerSpec], msgspec.Meta(min_length=1, max_length=4094)]
    cpus: Annotated[list[Natural], msgspec.Meta(max_length=4096)]
    threads: Natural
