"""A worker's KV cache in memory that its attention executor, or another engine, can map.

vLLM allocates the whole KV cache with one `torch.zeros(bytes, dtype=torch.int8)`, inside the context that the connector
gives it (vllm/v1/worker/utils.py, allocate_kv_cache; 0.32 run, 0.33 read). That call is answered with other memory: a
memfd, which has no name, so that nothing is left behind; or the GPU's, by the one handle that it takes to export it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.kv.memory import map_kv
from vllm_adrenaline.system import device_memory, memory_file
from vllm_adrenaline.system.device_handle import Handle


class _OneAllocation(TorchFunctionMode):
    """A context in which the one torch.zeros of int8 becomes a tensor elsewhere. Other calls are left alone.

    Attributes:
        size: of the tensor, in bytes; 0 before the KV cache is allocated.
    """

    def __init__(self) -> None:
        super().__init__()
        self.size = 0
        self._pointer = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.zeros or kwargs.get("dtype") is not torch.int8:
            return func(*args, **kwargs)
        if self.size:
            raise AdrenalineError("vLLM allocates its KV cache in more than one piece, which cannot be shared yet")
        self.size = int(args[0])
        tensor = self._allocate()
        self._pointer = tensor.data_ptr()
        return tensor

    def _allocate(self) -> torch.Tensor:
        """Return `size` bytes, all zero."""
        raise NotImplementedError

    def offset(self, tensor: torch.Tensor) -> int:
        """Return where `tensor` begins in the memory, in bytes. Raises AdrenalineError when it is not in it."""
        offset = tensor.data_ptr() - self._pointer
        if not 0 <= offset < self.size:
            raise AdrenalineError("the KV cache was not allocated in shared memory: this vLLM allocates it differently")
        return offset


class SharedKVCache(_OneAllocation):
    """The KV cache in a memory file.

    `fd`: the file; -1 before the KV cache is allocated.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fd = -1

    def _allocate(self) -> torch.Tensor:
        self.fd = memory_file.create("adrenaline-kv", self.size)
        return torch.frombuffer(map_kv(self.fd, self.size), dtype=torch.int8)


class GpuKVCache(_OneAllocation):
    """The KV cache in memory of the current GPU that has nothing else in it."""

    def _allocate(self) -> torch.Tensor:
        self._memory = device_memory.allocate(self.size)
        return self._memory.tensor()[: self.size].view(torch.int8)

    @property
    def handle(self) -> Handle:
        """By which another process opens it. Raises AdrenalineError before it is allocated."""
        if not self.size:
            raise AdrenalineError("the KV cache was not allocated in shared memory: this vLLM allocates it differently")
        return device_memory.export(self._memory)
