"""How a KV cache in GPU memory is described to an executor: what vLLM's views show is what the executor's layers show.

Memory of the CPU stands for the GPU's.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from vllm_adrenaline.attention.gpu import _layer_of
from vllm_adrenaline.control.kv_export import GpuKVExport
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.kv.memory import dtype_of
from vllm_adrenaline.kv.sharing import GpuKVCache
from vllm_adrenaline.prefill.gpu_export import describe
from vllm_adrenaline.system import device_memory
from vllm_adrenaline.system.device_handle import Handle

LAYERS, BLOCKS, HEADS, BLOCK, SIZE = 3, 7, 2, 16, 64
COUNT = LAYERS * BLOCKS * HEADS * BLOCK * 2 * SIZE


class HostMemory:
    """What device_memory allocates, on the host."""

    def __init__(self, size: int) -> None:
        self.bytes = torch.zeros(size, dtype=torch.uint8)

    def tensor(self) -> torch.Tensor:
        return self.bytes


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> GpuKVCache:
    monkeypatch.setattr(device_memory, "allocate", HostMemory)
    monkeypatch.setattr(device_memory, "export", lambda memory: Handle(b"h" * 64, 0, len(memory.bytes)))
    made = GpuKVCache()
    with made:
        flat = torch.zeros(2 * COUNT, dtype=torch.int8)
    flat.copy_(torch.randint(-128, 127, flat.shape, dtype=torch.int8))
    return made


def views(shared: GpuKVCache, is_nhd: bool) -> dict[str, torch.Tensor]:
    """Return the layers' views, [blocks, KV heads, block size, 2 * head size]."""
    flat = shared._memory.tensor()[: 2 * COUNT].view(torch.bfloat16)
    if is_nhd:
        whole = flat.view(LAYERS, BLOCKS, BLOCK, HEADS, 2 * SIZE).transpose(2, 3)
    else:
        whole = flat.view(LAYERS, BLOCKS, HEADS, BLOCK, 2 * SIZE)
    return {f"layer.{index}": whole[index] for index in range(LAYERS)}


def layers_of(caches: dict[str, torch.Tensor], **more: Any) -> dict[str, Any]:
    attributes = {"alibi_slopes": None, "sinks": None, "logits_soft_cap": 0, "sliding_window": (-1, -1)}
    return {
        name: SimpleNamespace(impl=SimpleNamespace(**attributes | {"scale": index + 0.5, "num_heads": 8} | more))
        for index, name in enumerate(caches)
    }


@pytest.mark.parametrize("is_nhd", [False, True], ids=["HND", "NHD"])
def test_an_executor_reads_what_the_worker_has(shared: GpuKVCache, is_nhd: bool) -> None:
    caches = views(shared, is_nhd)
    found = describe(shared, caches, layers_of(caches), torch.bfloat16, 0, [1, 2])
    found = msgspec.json.decode(msgspec.json.encode(found), type=GpuKVExport)
    assert [layer.name for layer in found.layers] == [*caches]
    assert [layer.scale for layer in found.layers] == [0.5, 1.5, 2.5]
    for spec, cache in zip(found.layers, caches.values(), strict=True):
        layer = _layer_of(spec, found, [shared._memory.tensor()], torch.bfloat16)
        keys, values = cache.transpose(1, 2).split(SIZE, dim=-1)
        assert torch.equal(layer.keys.view(torch.int16), keys.view(torch.int16))
        assert torch.equal(layer.values.view(torch.int16), values.view(torch.int16))
        assert (layer.keys.data_ptr(), layer.values.data_ptr()) == (keys.data_ptr(), values.data_ptr())


@pytest.mark.parametrize(("window", "tokens"), [((-1, -1), 0), (-1, 0), ((127, 0), 128), (None, 0)])
def test_windows_are_told_as_the_kernel_counts_them(shared: GpuKVCache, window: Any, tokens: int) -> None:
    caches = views(shared, False)
    found = describe(shared, caches, layers_of(caches, sliding_window=window), torch.bfloat16, 0, [0])
    assert {layer.window for layer in found.layers} == {tokens}


@pytest.mark.parametrize("unfit", [{"alibi_slopes": [1.0]}, {"sinks": [1.0]}])
def test_attention_that_the_kernel_does_not_have_is_refused_by_name(shared: GpuKVCache, unfit: dict[str, Any]) -> None:
    caches = views(shared, False)
    with pytest.raises(AdrenalineError, match=r"layer\.0 uses"):
        describe(shared, caches, layers_of(caches, **unfit), torch.bfloat16, 0, [0])


@pytest.mark.parametrize("shape", [(2, BLOCKS, BLOCK, HEADS, SIZE), (BLOCKS, BLOCK, 576), (BLOCKS, HEADS, BLOCK, 80)])
def test_a_cache_of_another_form_is_refused_by_its_form(shared: GpuKVCache, shape: tuple[int, ...]) -> None:
    caches = {"layer.0": torch.zeros(shape, dtype=torch.bfloat16)}
    with pytest.raises(AdrenalineError, match=f"cannot read .*{shape[-1]}"):
        describe(shared, caches, layers_of(caches), torch.bfloat16, 0, [0])


def test_a_cache_that_lies_elsewhere_or_reaches_beyond_its_memory_is_refused(shared: GpuKVCache) -> None:
    caches = views(shared, False)
    elsewhere = {name: cache.clone() for name, cache in caches.items()}
    with pytest.raises(AdrenalineError, match="not allocated in shared memory"):
        describe(shared, elsewhere, layers_of(caches), torch.bfloat16, 0, [0])
    found = describe(shared, caches, layers_of(caches), torch.bfloat16, 0, [0])
    half = [shared._memory.tensor()[:COUNT]]
    with pytest.raises(AdrenalineError, match="not inside the memory"):
        _layer_of(found.layers[-1], found, half, torch.bfloat16)
    with pytest.raises(AdrenalineError, match="not inside the memory"):
        _layer_of(msgspec.structs.replace(found.layers[0], memory=1), found, half, torch.bfloat16)
    with pytest.raises(ValueError, match="no dtype"):
        dtype_of("nn")
