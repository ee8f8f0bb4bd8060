"""Attention over a KV cache in GPU memory, by the kernels of csrc/cuda (docs/gpu-kernel.md)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_adrenaline.control.kv_export import GpuKVExport, GpuLayerSpec
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.kv.memory import dtype_of
from vllm_adrenaline.native.cuda import Call, CudaLibrary, Layer, Workspace, call_of, kind_of
from vllm_adrenaline.native.cuda_channel import ChannelKernels
from vllm_adrenaline.system import device_memory


class GpuAttention:
    """The attention layers of one worker over its KV cache, on the current GPU.

    It holds no state of requests or steps, so threads may share one.

    Attributes:
        library: the kernels.
        dtype: of q, k, v and output.
        num_heads, num_kv_heads, head_size: of this worker.
        num_blocks, block_size: blocks of the cache; tokens of a block.
        layers: the attention layers, in the order of their numbers; so many are num_layers.
    """

    def __init__(
        self, library: CudaLibrary, layers: Sequence[Layer], num_heads: int, dtype: torch.dtype, share: float = 1.0
    ) -> None:
        """Take the KV cache of every layer.

        Args:
            library: the kernels.
            layers: in the order of their numbers; all caches lie alike.
            num_heads: query heads.
            dtype: of q, k, v and output.
            share: of the GPU's multiprocessors that a launch may fill.

        Raises:
            ValueError: there is no kernel for them.
            RuntimeError: CUDA fails.
        """
        self.library, self.dtype, self.num_heads, self.num_layers = library, dtype, num_heads, len(layers)
        self.num_blocks, self.block_size, self.num_kv_heads, self.head_size = layers[0].keys.shape
        self.layers = list(layers)
        self.kind = kind_of(torch.empty(0, self.head_size, dtype=dtype), layers[0].keys)
        self._resources = library.prepare(self.kind)
        self.blocks = library.blocks(self._resources, share)
        self._channels: ChannelKernels | None = None

    @classmethod
    def mapped(cls, kv: GpuKVExport, library: CudaLibrary, share: float) -> GpuAttention:
        """Return the attention over a KV cache that a prefill worker exports. Makes its GPU the current one.

        Raises:
            AdrenalineError: the memory cannot be opened, or is too small for the cache.
            ValueError: `kv` names what is no dtype, or there is no kernel for it.
        """
        torch.cuda.set_device(kv.device)
        dtype, message = (dtype_of(name) for name in (kv.dtype, kv.message))
        memories = [device_memory.open_handle(handle).tensor() for handle in kv.memories]
        layers = [_layer_of(spec, kv, memories, dtype) for spec in kv.layers]
        return cls(library, layers, kv.num_heads, message, share)

    @property
    def channels(self) -> ChannelKernels:
        """The kernels of channels, loaded."""
        if self._channels is None:
            self._channels = ChannelKernels(self.library.path)
        return self._channels

    def workspace(self, rows: int) -> Workspace:
        """Return working memory for steps of up to `rows` rows, one after the other."""
        return self.library.workspace(self.kind, self.blocks, rows, "cuda")

    def calls(self, step: dict[str, torch.Tensor], work: Workspace) -> list[Call]:
        """Return the launches of a step, one for each layer. The caller keeps all tensors alive.

        Args:
            step: tensors by name, on the GPU, as for CpuAttention.layer.
            work: working memory.
        """
        return [call_of(step, layer, work, self._resources.stages) for layer in self.layers]

    def plan(self, call: Call, stream: int) -> None:
        """Divide the work of a step, for all its layers with the same window."""
        self.library.plan(call, stream)

    def attend(self, call: Call, stream: int) -> None:
        """Write k and v of the step into the layer's cache, then attend q."""
        self.library.attend(call, self.kind, self.blocks, stream)


def _layer_of(spec: GpuLayerSpec, kv: GpuKVExport, memories: Sequence[torch.Tensor], dtype: torch.dtype) -> Layer:
    """Return a layer over memory that was opened. Raises AdrenalineError if its cache lies outside of that."""
    last = sum((size - 1) * stride for size, stride in zip(kv.shape, kv.strides, strict=True))
    found = []
    for begin in (spec.keys, spec.values):
        end = begin + (last + 1) * dtype.itemsize
        if (
            spec.memory >= len(memories)
            or min(kv.shape) < 1
            or begin % dtype.itemsize
            or end > len(memories[spec.memory])
        ):
            raise AdrenalineError(f"the KV cache of {spec.name} is not inside the memory that is shared")
        found.append(memories[spec.memory][begin:end].view(dtype).as_strided(kv.shape, kv.strides))
    keys, values = found
    return Layer(keys, values, spec.scale, spec.soft_cap, spec.window, spec.k_scale, spec.v_scale)
