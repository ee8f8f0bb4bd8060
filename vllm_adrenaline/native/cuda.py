"""Calls of the CUDA kernels (csrc/cuda): their arguments as C structures, made of tensors.

No engine has run with them yet (docs/gpu-status.md). The same structures serve the emulator of
tests/unit, so what describes a call is tested without a GPU.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_adrenaline.native.cuda_binding import CudaBinding, Signatures

HEAD_SIZES = (64, 96, 128, 256)
STAGES = (2, 3, 4)


class Batch(ctypes.Structure):
    """A step's rows, as in csrc/cuda/work.h."""

    _fields_ = [
        ("query_start_loc", c_void_p),
        ("seq_lens", c_void_p),
        *((name, c_int32) for name in ("rows", "group", "kv_heads", "window")),
    ]


class Call(ctypes.Structure):
    """One launch, as in csrc/cuda/call.h."""

    _fields_ = [
        ("batch", Batch),
        *((name, c_void_p) for name in ("q", "k", "v")),
        *((name, c_int64) for name in ("q_stride", "k_stride", "v_stride")),
        *((name, c_void_p) for name in ("out", "out_rows")),
        ("out_stride", c_int64),
        *((name, c_void_p) for name in ("keys", "values")),
        *((name, c_int64) for name in ("block_stride", "token_stride", "head_stride")),
        ("block_table", c_void_p),
        ("table_stride", c_int64),
        *((name, c_void_p) for name in ("slot_mapping", "sinks")),
        *((name, c_float) for name in ("scale", "soft_cap", "k_scale", "v_scale")),
        *((name, c_void_p) for name in ("first_tile", "partials", "counters")),
        *((name, c_int32) for name in ("block_size", "stages")),
    ]


class Kind(ctypes.Structure):
    """Which kernel: the type of the message, whether the cache is fp8, and the head size."""

    _fields_ = [(name, c_int32) for name in ("is_half", "is_fp8", "head_size")]


class Resources(ctypes.Structure):
    """What a kernel needs of a device, and how many of its blocks fit a multiprocessor."""

    _fields_ = [
        (name, c_int32)
        for name in ("multiprocessors", "stages", "shared_bytes", "blocks_each", "registers", "spilled_bytes")
    ]


@dataclass(frozen=True)
class Layer:
    """One attention layer.

    Attributes:
        keys, values: its cache, [blocks, block size, Hk, D], with whatever strides; equal ones. fp8 is float8_e4m3fn.
        scale: of the softmax.
        soft_cap: of the logits; 0: none.
        window: tokens that a token attends, itself included; 0: all.
        k_scale, v_scale: what a number of the cache is multiplied by.
        sinks: float32 [Hq], or None.
    """

    keys: torch.Tensor
    values: torch.Tensor
    scale: float
    soft_cap: float = 0.0
    window: int = 0
    k_scale: float = 1.0
    v_scale: float = 1.0
    sinks: torch.Tensor | None = None


@dataclass(frozen=True)
class Workspace:
    """Working memory for launches of one grid, one after the other.

    Attributes:
        first_tile: int32 [R + 1] or more: the plan of the step.
        partials: float32, as many as the library's partial_floats says.
        counters: int32, one for each block of the grid, all zero.
    """

    first_tile: torch.Tensor
    partials: torch.Tensor
    counters: torch.Tensor


def kind_of(q: torch.Tensor, keys: torch.Tensor) -> Kind:
    """Return the kernel for a message and a cache. Raises ValueError if there is none."""
    if q.dtype not in (torch.bfloat16, torch.float16) or keys.dtype not in (q.dtype, torch.float8_e4m3fn):
        raise ValueError(f"no kernel for {q.dtype} over a cache of {keys.dtype}")
    if q.shape[-1] not in HEAD_SIZES:
        raise ValueError(f"no kernel for head size {q.shape[-1]}")
    return Kind(q.dtype == torch.float16, keys.dtype != q.dtype, q.shape[-1])


def call_of(step: dict[str, torch.Tensor], layer: Layer, work: Workspace, stages: int) -> Call:
    """Return the arguments of a launch. The caller keeps all tensors alive.

    Args:
        step: tensors by name, as for CpuAttention.layer. out_rows, int64 [T], may be among them: the row of `out` that
            each token's output goes to.
        layer: what is attended.
        work: working memory.
        stages: tiles in shared memory at once.

    Raises:
        ValueError: the kernels cannot read tensors like these.
    """
    q, k, v, out, keys, values = (*(step[name] for name in ("q", "k", "v", "out")), layer.keys, layer.values)
    _, block_size, kv_heads, head = keys.shape
    if keys.stride() != values.stride() or keys.shape != values.shape or keys.stride(3) != 1:
        raise ValueError("keys and values lie differently, or their heads are not contiguous")
    if any(x.stride(1) != head or x.stride(2) != 1 for x in (q, k, v, out)):
        raise ValueError("the heads of a token are not contiguous")
    if any(x.data_ptr() % 4 or x.stride(0) % 2 for x in (q, out)):
        raise ValueError("queries or outputs do not begin at multiples of 4 bytes")
    if layer.sinks is not None and (layer.sinks.dtype != torch.float32 or layer.sinks.shape != q.shape[1:2]):
        raise ValueError("sinks are not one float32 for each query head")
    moved = (keys, values, k, v)
    if any(x.data_ptr() % 16 or any(s * x.element_size() % 16 for s in x.stride()[:-1]) for x in moved):
        raise ValueError("keys or values do not begin at multiples of 16 bytes")
    if q.shape[1] % kv_heads or q.shape[1] // kv_heads > 16:
        raise ValueError(f"{q.shape[1]} query heads over {kv_heads} KV heads")
    if block_size % 16 or stages not in STAGES:
        raise ValueError(f"blocks of {block_size} tokens, or {stages} stages")
    wanted = {"query_start_loc": torch.int32, "seq_lens": torch.int32, "block_table": torch.int32}
    wanted |= {"slot_mapping": torch.int64, "out_rows": torch.int64}
    if any(name in step and step[name].dtype != dtype for name, dtype in wanted.items()):
        raise ValueError("the step's numbers have other types")
    out_rows = step.get("out_rows")
    return Call(
        batch=Batch(
            query_start_loc=step["query_start_loc"].data_ptr(),
            seq_lens=step["seq_lens"].data_ptr(),
            rows=len(step["seq_lens"]),
            group=q.shape[1] // kv_heads,
            kv_heads=kv_heads,
            window=layer.window,
        ),
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        q_stride=q.stride(0),
        k_stride=k.stride(0),
        v_stride=v.stride(0),
        out=out.data_ptr(),
        out_rows=None if out_rows is None else out_rows.data_ptr(),
        out_stride=out.stride(0),
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        block_stride=keys.stride(0),
        token_stride=keys.stride(1),
        head_stride=keys.stride(2),
        block_table=step["block_table"].data_ptr(),
        table_stride=step["block_table"].stride(0),
        slot_mapping=step["slot_mapping"].data_ptr(),
        sinks=None if layer.sinks is None else layer.sinks.data_ptr(),
        scale=layer.scale,
        soft_cap=layer.soft_cap,
        k_scale=layer.k_scale,
        v_scale=layer.v_scale,
        first_tile=work.first_tile.data_ptr(),
        partials=work.partials.data_ptr(),
        counters=work.counters.data_ptr(),
        block_size=block_size,
        stages=stages,
    )


class CudaLibrary(CudaBinding):
    """The kernels of csrc/cuda/library.cu in the library that tools/build_cuda.py makes."""

    def __init__(self, path: Path) -> None:
        """Load it. Raises OSError if it does not load, RuntimeError if it was built of another csrc/cuda/call.h."""
        signatures: Signatures = {
            "adrenaline_partial_floats": (c_int64, [c_int, c_int]),
            "adrenaline_blocks_of": (c_int, [c_int, c_double, c_int]),
            "adrenaline_prepare": (c_int, [POINTER(Kind), POINTER(Resources)]),
            "adrenaline_plan": (c_int, [POINTER(Call), c_void_p, c_void_p]),
            "adrenaline_attend": (c_int, [POINTER(Call), POINTER(Kind), c_int, c_void_p]),
        }
        super().__init__(path, signatures, {"adrenaline_call_bytes": Call})

    def prepare(self, kind: Kind) -> Resources:
        """Return what the kernel needs of the current device, and allow it that. Its first launch comes after this."""
        found = Resources()
        self._check(self._lib.adrenaline_prepare(kind, found))
        return found

    def blocks(self, resources: Resources, share: float) -> int:
        """Return the size of the grid that fills a share (0 to 1) of the device's multiprocessors."""
        return int(self._lib.adrenaline_blocks_of(resources.multiprocessors, share, resources.blocks_each))

    def workspace(self, kind: Kind, blocks: int, rows: int, device: torch.device | str) -> Workspace:
        """Return working memory for a grid of `blocks` and steps of up to `rows` rows."""
        floats = self._lib.adrenaline_partial_floats(blocks, kind.head_size)
        return Workspace(
            first_tile=torch.zeros(rows + 1, dtype=torch.int32, device=device),
            partials=torch.empty(floats, dtype=torch.float32, device=device),
            counters=torch.zeros(blocks, dtype=torch.int32, device=device),
        )

    def plan(self, call: Call, stream: int) -> None:
        """Make the plan of a step, for all its layers with the same window."""
        self._check(self._lib.adrenaline_plan(call, call.first_tile, stream))

    def attend(self, call: Call, kind: Kind, blocks: int, stream: int) -> None:
        """Append the step's k and v to the cache, and attend q."""
        self._check(self._lib.adrenaline_attend(call, kind, blocks, stream))
