"""Attention over a KV cache with the bits of vLLM's own CPU operators, so that tokens can be equal: by those operators,
or where all rows have one token by the native library (native_decode.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_adrenaline.attention import native_decode, operators
from vllm_adrenaline.attention.spec import KVExport
from vllm_adrenaline.compat.cpu_attention import allow_amx
from vllm_adrenaline.kv.memory import map_kv
from vllm_adrenaline.system import memory_file


class CpuAttention:
    """Appends to and attends over the KV cache of one prefill worker. Holds no state of requests or steps."""

    def __init__(
        self,
        caches: Sequence[torch.Tensor],
        scales: Sequence[float],
        num_heads: int,
        isa: str,
        split_kv: bool,
        native: bool = True,
    ) -> None:
        """`caches`: one [blocks, KV heads, 2 * block size, head size] a layer; `scales`: of the softmax; `native`:
        whether the native library may be used."""
        allow_amx()
        self.dtype = caches[0].dtype
        self._isa, self._split_kv = isa, split_kv
        self.num_heads = num_heads
        self.num_blocks, self.num_kv_heads, double, self.head_size = caches[0].shape
        self.block_size = double // 2
        self._scales = list(scales)
        self._key_caches, self._value_caches = zip(*(cache.chunk(2, dim=2) for cache in caches), strict=True)
        self._longest = native_decode.longest_row(num_heads, self._key_caches[0], isa) if native else 0
        self._native = [
            native_decode.open_cache(keys, values, num_heads, scale)
            for keys, values, scale in zip(self._key_caches, self._value_caches, scales, strict=True)
            if self._longest
        ]

    @classmethod
    def mapped(cls, kv: KVExport, fd: int, split_kv: bool) -> CpuAttention:
        """Return one over the KV cache that a prefill worker exports."""
        dtype = getattr(torch, kv.dtype)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{kv.dtype} is no dtype")
        memory_file.check(fd, kv.size, "the prefill worker's KV cache")
        flat = torch.frombuffer(map_kv(fd, kv.size), dtype=dtype)
        caches = [flat.as_strided(kv.shape, kv.strides, layer.offset // dtype.itemsize) for layer in kv.layers]
        return cls(caches, [layer.scale for layer in kv.layers], kv.num_heads, kv.isa, split_kv)

    @property
    def num_layers(self) -> int:
        """How many layers there are."""
        return len(self._scales)

    def schedule(self, query_start_loc: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor | None:
        """Return the operators' schedule for a step, which all its layers share; None for the native library."""
        if int(seq_lens.max()) <= self._longest and int(query_start_loc.diff().max()) <= 1:
            return None
        keys = self._key_caches[0]
        return operators.schedule(self.num_heads, keys, query_start_loc, seq_lens, self._isa, self._split_kv)

    def layer(self, index: int, step: dict[str, torch.Tensor], schedule: torch.Tensor | None) -> None:
        """Append k, v of `step` to layer `index` and attend q; the result goes to step["out"]."""
        keys, values = self._key_caches[index], self._value_caches[index]
        operators.append(step["k"], step["v"], keys, values, step["slot_mapping"], self._isa)
        if schedule is None:
            native_decode.attend(
                self._native[index],
                step["q"],
                step["out"],
                step["block_table"],
                step["seq_lens"],
                step["query_start_loc"],
            )
            return
        operators.attend(step, keys, values, self._scales[index], schedule)
