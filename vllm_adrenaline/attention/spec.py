"""What an attention executor is told when it is started: the prefill worker's KV cache, as JSON on its stdin."""

import msgspec

from vllm_adrenaline.control.messages import Identity

READY = "adrenaline-executor-ready"
"""The word on stdout that says the executor serves; the address it listens at follows."""


class LayerSpec(msgspec.Struct, frozen=True):
    """One attention layer: where its KV cache begins (bytes), and its softmax scale."""

    name: str
    offset: int
    scale: float


class KVExport(msgspec.Struct, frozen=True):
    """One prefill worker's KV cache: an open memfd of process `pid`, and how to read it.

    `shape` and `strides` (elements) are those of a layer's view [blocks, KV heads, 2 * block size, head size], keys
    in the first half of the third axis and values in the second, both packed as `isa` wants.
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
    """Everything one attention executor needs. `cpus` and `threads` are its own, those in `kv` the prefill worker's.
    `share`: of those cores' time, when others want them as well (vllm_adrenaline/system/priority.py)."""

    rank: int
    address: str
    identity: Identity
    kv: KVExport
    cpus: list[int]
    threads: int
    idle_timeout: float
    share: float = 1.0
