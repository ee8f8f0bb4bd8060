"""A worker's KV cache in memory that its attention executor, or another engine, can map.

vLLM allocates the whole KV cache with one `torch.zeros(bytes, dtype=torch.int8)`, inside the context that the connector
gives it (vllm/v1/worker/utils.py, allocate_kv_cache; 0.32 run, 0.33 read). That call is answered with the memory of a
memfd. It has no name, so nothing is left behind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.kv.memory import map_kv
from vllm_adrenaline.system import memory_file


class SharedKVCache(TorchFunctionMode):
    """A context in which the one torch.zeros of int8 becomes a tensor in a memory file. Other calls are left alone.

    Attributes:
        fd: the memory file; -1 before the KV cache is allocated.
        size: of the file, in bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fd = -1
        self.size = 0
        self._pointer = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.zeros or kwargs.get("dtype") is not torch.int8:
            return func(*args, **kwargs)
        if self.fd >= 0:
            raise AdrenalineError("vLLM allocates its KV cache in more than one piece, which cannot be shared yet")
        self.size = int(args[0])
        self.fd = memory_file.create("adrenaline-kv", self.size)
        tensor = torch.frombuffer(map_kv(self.fd, self.size), dtype=torch.int8)
        self._pointer = tensor.data_ptr()
        return tensor

    def offset(self, tensor: torch.Tensor) -> int:
        """Return where `tensor` begins in the memory file, in bytes. Raises AdrenalineError when it is not in it."""
        offset = tensor.data_ptr() - self._pointer
        if self.fd < 0 or not 0 <= offset < self.size:
            raise AdrenalineError("the KV cache was not allocated in shared memory: this vLLM allocates it differently")
        return offset
