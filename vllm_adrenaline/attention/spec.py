"""What an attention executor is told when it starts, as JSON on its stdin: its KV cache, its cores, its address."""

import msgspec

from vllm_adrenaline.control.messages import Identity

READY = "adrenaline-executor-ready"
"""The word on stdout that says that the executor serves. The address at which it listens follows."""


class LayerSpec(msgspec.Struct, frozen=True):
    """One attention layer.

    Attributes:
        name: the layer's name in vLLM.
        offset: where its KV cache begins in the memory file, in bytes.
        scale: of the softmax.
    """

    name: str
    offset: int
    scale: float


class KVExport(msgspec.Struct, frozen=True):
    """One prefill worker's KV cache: a memory file of `size` bytes, and how to read it.

    Attributes:
        pid, fd: the worker's process, and the number of the open file in it.
        size: of the file, in bytes.
        shape, strides: of a layer's view [blocks, KV heads, 2 * block size, head size]; strides in elements. Keys are
            in the first half of the third axis, values in the second, both packed as `isa` wants.
        dtype: torch's name of it, as "bfloat16".
        isa: vLLM's name of the layout.
        num_heads: query heads.
        layers: the attention layers, in the order of their numbers.
        cpus, threads: the cores that the worker may use, and the number of its threads.
    """

    pid: int
    fd: int
    size: int
    shape: list[int]
    strides: list[int]
    dtype: str
    isa: str
    num_heads: int
    layers: list[LayerSpec]
    cpus: list[int]
    threads: int


class ExecutorSpec(msgspec.Struct, frozen=True):
    """Everything that one attention executor needs to know.

    Attributes:
        rank: the tensor-parallel rank whose KV cache it attends.
        address: where to listen for Attach and Revoke.
        identity: of its prefill engine; a decode worker's must be equal.
        kv: the prefill worker's KV cache.
        cpus, threads: the executor's own cores, and the number of its threads.
        idle_timeout: how long it waits for the next layer of a step before it drops the step, in seconds.
        share: of its cores' time, when others want them as well (system/priority.py).
    """

    rank: int
    address: str
    identity: Identity
    kv: KVExport
    cpus: list[int]
    threads: int
    idle_timeout: float
    share: float = 1.0
