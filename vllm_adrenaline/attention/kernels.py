"""Attention over a KV cache, bit for bit as vLLM's own CPU operators compute it, so that tokens can be equal.

The operators themselves attend. Where no row has more than one token, the native library may (native_decode.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_adrenaline.attention import native_decode, operators
from vllm_adrenaline.compat.cpu_attention import allow_amx
from vllm_adrenaline.control.kv_export import KVExport
from vllm_adrenaline.kv.memory import dtype_of, map_kv
from vllm_adrenaline.system import memory_file


class CpuAttention:
    """The attention layers of one worker over its KV cache.

    It holds no state of requests or steps, so threads may share one.

    Attributes:
        dtype: of the KV cache, and of q, k, v and output.
        num_heads, num_kv_heads: query heads and KV heads of this worker.
        num_blocks, block_size: blocks of the cache; tokens of a block.
        head_size: elements of a head.
    """

    def __init__(
        self,
        caches: Sequence[torch.Tensor],
        scales: Sequence[float],
        num_heads: int,
        isa: str,
        split_kv: bool,
        native: bool = True,
    ) -> None:
        """Take the KV cache of every layer.

        Args:
            caches: one [blocks, KV heads, 2 * block size, head size] for each layer. Keys are in the first half of the
                third axis, values in the second.
            scales: the softmax scale of each layer.
            num_heads: query heads.
            isa: vLLM's name of the cache's layout.
            split_kv: what vLLM's operator is given as `enable_kv_split`.
            native: whether the native library may attend.

        Raises:
            AdrenalineError: the kernel refuses AMX tiles (compat/cpu_attention.py).
        """
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
        """Return the attention over a KV cache that a prefill worker exports.

        Args:
            kv: where each layer lies in the file, and how it is read.
            fd: the open file; the caller may close it afterwards.
            split_kv: as for the constructor.

        Raises:
            AdrenalineError: the file has another size, or can shrink.
            ValueError: `kv.dtype` is the name of something else.
        """
        dtype = dtype_of(kv.dtype)
        memory_file.check(fd, kv.size, "the prefill worker's KV cache")
        flat = torch.frombuffer(map_kv(fd, kv.size), dtype=dtype)
        caches = [flat.as_strided(kv.shape, kv.strides, layer.offset // dtype.itemsize) for layer in kv.layers]
        return cls(caches, [layer.scale for layer in kv.layers], kv.num_heads, kv.isa, split_kv)

    @property
    def num_layers(self) -> int:
        """The number of attention layers."""
        return len(self._scales)

    def schedule(self, query_start_loc: torch.Tensor, seq_lens: torch.Tensor) -> torch.Tensor | None:
        """Return how vLLM's operator divides a step's work. All layers of the step share it.

        Args:
            query_start_loc: int32 [R + 1], where each row's tokens begin.
            seq_lens: int32 [R], tokens of each row.

        Returns:
            The schedule; None when the native library attends the step, which needs none.
        """
        if int(seq_lens.max()) <= self._longest and int(query_start_loc.diff().max()) <= 1:
            return None
        keys = self._key_caches[0]
        return operators.schedule(self.num_heads, keys, query_start_loc, seq_lens, self._isa, self._split_kv)

    def layer(self, index: int, step: dict[str, torch.Tensor], schedule: torch.Tensor | None) -> None:
        """Write k and v of `step` into layer `index`, then attend q; the output goes to step["out"].

        Args:
            index: the layer's number, from 0.
            step: tensors by name. q, out: [T, Hq, D]. k, v: [T, Hk, D]. slot_mapping: int64 [T], -1 for a token whose
                k and v are not written. block_table: int32 [R, W]. seq_lens: int32 [R]. query_start_loc: int32 [R + 1].
            schedule: what `schedule` returned for this step.
        """
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
