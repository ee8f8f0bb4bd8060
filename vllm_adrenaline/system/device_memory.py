"""GPU memory that processes of one host share: allocated, exported by a CUDA IPC handle, opened by another process.

The CUDA driver is called through ctypes. Whoever has opened a memory must close it before its owner frees it (CUDA
calls the rest undefined), and nobody can be kept from writing into what it has opened.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from functools import cache
from typing import Any

import torch

from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.system import foreign_tensor
from vllm_adrenaline.system.arithmetic import cdiv
from vllm_adrenaline.system.device_handle import HANDLE_BYTES, Handle

GRANULE = 2 << 20
"""Smaller allocations may lie in one piece of memory with others, and a handle gives the whole piece away."""
_CAN_BE_EXPORTED = 10
"""CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE."""
_PEER_ACCESS = 1
"""CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS."""


class _IpcHandle(ctypes.Structure):
    _fields_ = [("bytes", c_ubyte * HANDLE_BYTES)]


@cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    signatures: dict[str, list[Any]] = {
        "cuCtxGetCurrent": [POINTER(c_void_p)],
        "cuGetErrorString": [c_int, POINTER(c_char_p)],
        "cuIpcCloseMemHandle": [c_uint64],
        "cuIpcGetMemHandle": [POINTER(_IpcHandle), c_uint64],
        "cuIpcOpenMemHandle_v2": [POINTER(c_uint64), _IpcHandle, c_uint],
        "cuMemAlloc_v2": [POINTER(c_uint64), c_size_t],
        "cuMemFree_v2": [c_uint64],
        "cuMemGetAddressRange_v2": [POINTER(c_uint64), POINTER(c_size_t), c_uint64],
        "cuMemsetD8_v2": [c_uint64, c_ubyte, c_size_t],
        "cuPointerGetAttribute": [c_void_p, c_int, c_uint64],
        "cuStreamSynchronize": [c_void_p],
    }
    for name, arguments in signatures.items():
        function = getattr(driver, name)
        function.restype, function.argtypes = c_int, arguments
    return driver


def _call(name: str, *arguments: Any) -> None:
    """Call the driver with torch's context of this thread. Raises AdrenalineError with what it says."""
    driver, context = _driver(), c_void_p()
    if driver.cuCtxGetCurrent(byref(context)) or not context.value:
        torch.cuda.synchronize()  # makes the context
    if error := getattr(driver, name)(*arguments):
        found = c_char_p()
        driver.cuGetErrorString(error, byref(found))
        text = (found.value or b"unknown error").decode()
        raise AdrenalineError(f"CUDA: {name.removesuffix('_v2')}: {text} ({error})")


class DeviceMemory:
    """Memory of the current device. It is freed, or closed, with the last tensor over it.

    Attributes:
        address, size: where it is in this process, and how large; in bytes.
    """

    def __init__(self, address: int, size: int, release: str, released: int) -> None:
        """`release`: the driver's function that ends it, called with `released`."""
        self.address, self.size = address, size
        # Not at the end of the process, when CUDA may be gone; it frees everything then.
        weakref.finalize(self, getattr(_driver(), release), released).atexit = False

    def tensor(self) -> torch.Tensor:
        """Return its bytes, uint8 [size]. The tensor keeps the memory alive."""
        device = torch.cuda.current_device()
        return foreign_tensor.bytes_at(self.address, self.size, foreign_tensor.CUDA, device, self)


def allocate(size: int) -> DeviceMemory:
    """Return new memory of at least `size` bytes, all zero, that can be exported and has nothing else in it.

    Raises AdrenalineError when there is none.
    """
    size = cdiv(size, GRANULE) * GRANULE
    address = c_uint64()
    _call("cuMemAlloc_v2", byref(address), size)
    memory = DeviceMemory(address.value, size, "cuMemFree_v2", address.value)
    _call("cuMemsetD8_v2", memory.address, 0, size)
    _call("cuStreamSynchronize", None)
    return memory


def export(memory: DeviceMemory | torch.Tensor) -> Handle:
    """Return a handle by which another process can open this memory; of a tensor, the bytes from its first element on.

    The handle opens the whole allocation that the memory is in.

    Raises:
        AdrenalineError: it cannot be exported. The message says which allocator made it, and what to set.
    """
    if isinstance(memory, DeviceMemory):
        address, size = memory.address, memory.size
    else:
        address = memory.data_ptr()
        size = int(memory.untyped_storage().nbytes()) - int(memory.storage_offset()) * memory.itemsize
    can_be_exported = c_uint()
    _call("cuPointerGetAttribute", byref(can_be_exported), _CAN_BE_EXPORTED, address)
    if not can_be_exported.value:
        raise AdrenalineError(f"this GPU memory cannot be shared by a CUDA IPC handle: {_cause()}")
    base, whole, handle = c_uint64(), c_size_t(), _IpcHandle()
    _call("cuMemGetAddressRange_v2", byref(base), byref(whole), address)
    _call("cuIpcGetMemHandle", byref(handle), base.value)
    return Handle(bytes(handle.bytes), address - base.value, size)


def _cause() -> str:
    """Say which allocator made memory that cannot be exported, and what to set."""
    if torch.cuda.get_allocator_backend() != "native":
        return "torch allocates with cudaMallocAsync; unset backend:cudaMallocAsync in PYTORCH_CUDA_ALLOC_CONF"
    settings = "".join(os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    if "expandable_segments:true" in settings.lower():
        return "torch allocates expandable segments; set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False"
    return (
        "it is virtual memory or of a memory pool, as vLLM's sleep mode (--enable-sleep-mode) allocates it; "
        "allocate it with cudaMalloc"
    )


def open_handle(handle: Handle) -> DeviceMemory:
    """Return memory that another process has exported.

    Raises AdrenalineError if it cannot be opened (the process has ended, or is this one), or is smaller than it says.
    """
    base, found, whole = c_uint64(), c_uint64(), c_size_t()
    _call("cuIpcOpenMemHandle_v2", byref(base), _IpcHandle((c_ubyte * HANDLE_BYTES)(*handle.data)), _PEER_ACCESS)
    memory = DeviceMemory(base.value + handle.offset, handle.size, "cuIpcCloseMemHandle", base.value)
    _call("cuMemGetAddressRange_v2", byref(found), byref(whole), base.value)
    if handle.offset + handle.size > whole.value:
        raise AdrenalineError(f"a handle is of {handle.size} bytes behind {handle.offset}, and opens {whole.value}")
    return memory
