"""What an attention executor is told when it starts, as JSON on its stdin: its KV cache, its cores, its address."""

import msgspec

from vllm_adrenaline.control.kv_export import GpuKVExport, KVExport
from vllm_adrenaline.control.messages import Identity

READY = "adrenaline-executor-ready"
"""The word on stdout that says that the executor serves. The address at which it listens follows."""


class ExecutorSpec(msgspec.Struct, frozen=True):
    """Everything that one attention executor needs to know.

    Attributes:
        rank: the tensor-parallel rank whose KV cache it attends.
        address: where to listen for Attach and Revoke.
        identity: of its prefill engine; a decode worker's must be equal.
        kv: the prefill worker's KV cache.
        kv_file: its memory file, open in the process that starts the executor, which inherits it under this number; -1
            for one in GPU memory.
        cpus, threads: the executor's own cores, and the number of its threads.
        idle_timeout: how long it waits for the next layer of a step before it drops the step, in seconds. On a GPU: for
            all layers of a step together.
        share: of its cores' time, when others want them as well (system/priority.py). On a GPU: of its multiprocessors.
        key, allow: files with the keys of its prefill engine (control/keys.py); empty for none.
        interface: over which decode workers on other hosts are served; empty for none.
    """

    rank: int
    address: str
    identity: Identity
    kv: KVExport | GpuKVExport
    kv_file: int
    cpus: list[int]
    threads: int
    idle_timeout: float
    share: float = 1.0
    key: str = ""
    allow: str = ""
    interface: str = ""
