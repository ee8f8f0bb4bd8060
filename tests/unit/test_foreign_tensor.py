"""Tensors over memory of others: what is there is seen, and the memory is let go of with the last view."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import weakref

import torch

from vllm_adrenaline.system import foreign_tensor


class Memory:
    """Memory of ours."""

    def __init__(self, size: int) -> None:
        self.bytes = (ctypes.c_uint8 * size)(*range(size))

    def tensor(self) -> torch.Tensor:
        address = ctypes.addressof(self.bytes)
        return foreign_tensor.bytes_at(address, len(self.bytes), foreign_tensor.CPU, 0, self)


def test_it_is_the_memory_itself() -> None:
    memory = Memory(64)
    tensor = memory.tensor()
    assert tensor.tolist() == list(range(64))
    tensor[3] = 200
    assert memory.bytes[3] == 200
    memory.bytes[8:16] = list(range(100, 108))
    assert tensor.view(torch.int64)[1] == int.from_bytes(range(100, 108), "little")


def test_the_memory_stays_as_long_as_a_view() -> None:
    memory = Memory(64)
    ended = weakref.ref(memory)
    view = memory.tensor()[16:32].view(torch.int16).view(2, 4)
    del memory
    gc.collect()
    assert ended() is not None
    assert view[0, 0] == 16 + 17 * 256
    del view
    gc.collect()
    assert ended() is None
    assert not foreign_tensor._kept


def test_a_process_may_end_with_one() -> None:
    code = "import tests.unit.test_foreign_tensor as t; x = t.Memory(64).tensor(); t.torch.kept = x[1:]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
