"""Tensors over memory that torch did not allocate, of a GPU or not, through DLPack.

torch also reads `__cuda_array_interface__`, but needs numpy for that, and knows it for GPUs only.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_uint8, c_uint16, c_uint64, c_void_p, py_object
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

CPU, CUDA = 1, 2
"""kDLCPU and kDLCUDA."""
_UNSIGNED = 1


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("device_type", c_int32),
        ("device_id", c_int32),
        ("ndim", c_int32),
        ("code", c_uint8),
        ("bits", c_uint8),
        ("lanes", c_uint16),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
    ]


class _DLManagedTensor(ctypes.Structure):
    _fields_ = [("tensor", _DLTensor), ("context", c_void_p), ("deleter", c_void_p)]


_kept: dict[int, tuple[Any, ...]] = {}
"""What tensors need, by the address of the structure that describes them."""


_let_go = ctypes.CFUNCTYPE(None, c_void_p)(_kept.__delitem__)
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = py_object, [c_void_p, c_char_p, c_void_p]


def bytes_at(address: int, size: int, device_type: int, device: int, owner: object) -> torch.Tensor:
    """Return uint8 [size] over memory at `address`. It keeps `owner` alive, and so does every view of it."""
    shape = (c_int64 * 1)(size)
    described = _DLTensor(address, device_type, device, 1, _UNSIGNED, 8, 1, shape, None, 0)
    managed = _DLManagedTensor(described, None, ctypes.cast(_let_go, c_void_p))
    _kept[ctypes.addressof(managed)] = managed, shape, owner
    tensor: torch.Tensor = from_dlpack(_new_capsule(ctypes.addressof(managed), b"dltensor", None))
    return tensor
