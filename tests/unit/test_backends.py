"""Our attention backends around vLLM's own: FlashInfer's package is made up, for it does not exist for CPU."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import vllm.utils.flashinfer
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec

from tests.unit.split_cases import BLOCK, HEAD, HEADS, LOCAL_BLOCKS, MOST_ROWS, Batch, Row, attended, remote_of
from vllm_adrenaline.decode import backend, remote_attention
from vllm_adrenaline.decode.backend import OffloadingBuilder, OffloadingLayer

BUILT = ("FLASH_ATTN", "TRITON_ATTN")
"""Those whose builders can be made without a GPU."""


class MadeUp(ModuleType):
    """A module that has every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """vLLM's own FlashInfer backend can be imported, though FlashInfer is not installed."""
    for name in ("flashinfer", "flashinfer.decode", "flashinfer.prefill", "flashinfer.utils"):
        module = MadeUp(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    yield
    for name in ("vllm.v1.attention.backends.flashinfer", "vllm_adrenaline.decode.backends.flashinfer"):
        sys.modules.pop(name, None)
    vllm.utils.flashinfer.has_flashinfer.cache_clear()


@pytest.fixture(params=sorted(backend.OURS))
def overridden(request: pytest.FixtureRequest) -> Iterator[tuple[str, Any, Any]]:
    """A stock backend's name, the stock backend, and what vLLM takes for it once ours are to be used."""
    if request.param == "FLASHINFER":
        request.getfixturevalue("flashinfer")
    member = AttentionBackendEnum[request.param]
    stock = member.get_class()
    backend.override(request.param)
    yield request.param, stock, member.get_class()
    member.clear_override()


def test_ours_has_the_name_of_the_stock_backend_and_all_else_that_it_says(overridden: tuple[str, Any, Any]) -> None:
    name, stock, ours = overridden
    assert ours.get_name() == stock.get_name() == name
    assert issubclass(ours, stock)
    for said in ("get_supported_kernel_block_sizes", "supports_head_size", "supports_kv_cache_dtype", "customize_spec"):
        assert getattr(ours, said).__qualname__ == getattr(stock, said).__qualname__


def test_ours_has_one_wrapper_before_the_stock_layer_and_builder(overridden: tuple[str, Any, Any]) -> None:
    _, stock, ours = overridden
    assert ours.get_impl_cls().__bases__ == (OffloadingLayer, stock.get_impl_cls())
    assert ours.get_builder_cls().__bases__ == (OffloadingBuilder, stock.get_builder_cls())
    assert ours.get_impl_cls().do_kv_cache_update is stock.get_impl_cls().do_kv_cache_update


def test_no_graph_holds_a_layer_and_no_fusion_keeps_q_k_v_or_the_output_from_it(
    overridden: tuple[str, Any, Any],
) -> None:
    _, _, ours = overridden
    builder, layer = ours.get_builder_cls(), ours.get_impl_cls()
    config: Any = None
    assert builder.get_cudagraph_support(config, config) is AttentionCGSupport.NEVER
    assert not builder.supports_update_block_table
    assert not ours.forward_includes_kv_cache_update
    assert not ours.supports_kv_cache_update_bypass
    assert not layer.fused_output_quant_supported(config, config)
    assert not layer.fused_rope_kvcache_supported(config)


class Plan:
    """A step's plan that notes what is done."""

    def __init__(self, done: list[str], has_local: bool) -> None:
        self.has_local, self.layer_index, self._done = has_local, {"a": 0}, done

    def send(self, layer: int, *qkv: torch.Tensor) -> None:
        self._done.append(f"send {layer}")

    def receive(self, layer: int, output: torch.Tensor) -> None:
        self._done.append(f"receive {layer}")


@pytest.fixture
def calls(overridden: tuple[str, Any, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls one layer of a backend with a plan, or with no metadata at all, and returns what was done."""
    _, stock, ours = overridden
    done: list[str] = []

    def forward(self: Any, *args: Any) -> torch.Tensor:
        done.append("stock")
        return args[6]

    monkeypatch.setattr(stock.get_impl_cls(), "forward", forward)
    layer, cache, out = object.__new__(ours.get_impl_cls()), torch.zeros(1), torch.zeros(1)
    layer._kv_cache = cache

    def call(metadata: Any) -> list[str]:
        done.clear()
        q = k = v = torch.zeros(1)
        assert layer.forward(SimpleNamespace(layer_name="a"), q, k, v, cache, metadata, out) is out
        return done.copy()

    def run(has_local: bool | None) -> list[str]:
        plan = None if has_local is None else Plan(done, has_local)
        return call(SimpleNamespace(remote_plan=plan, decode_length=9))

    return SimpleNamespace(call=call, run=run, layer=layer)


def test_offloaded_rows_are_on_their_way_while_the_stock_layer_attends_the_others(calls: Any) -> None:
    assert calls.run(has_local=True) == ["send 0", "stock", "receive 0"]


def test_the_stock_layer_is_left_alone_where_no_row_is_local(calls: Any) -> None:
    assert calls.run(has_local=False) == ["send 0", "receive 0"]


def test_a_step_without_offloaded_rows_and_a_warm_up_are_the_stock_layers(calls: Any) -> None:
    assert calls.run(has_local=None) == ["stock"]
    assert calls.call(None) == ["stock"]


def test_a_layer_that_the_native_library_may_attend_is_attended_by_it(
    calls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    attended = MagicMock()
    monkeypatch.setattr("vllm_adrenaline.decode.backend.library", SimpleNamespace(attend=attended))
    calls.layer._native, calls.layer._longest = "cache", 9
    metadata = SimpleNamespace(remote_plan=None, decode_length=9, block_table=1, seq_lens=2, query_start_loc=3)
    assert calls.call(metadata) == []
    assert attended.call_args.args[0] == "cache"
    assert attended.call_args.args[3:] == (1, 2, 3)
    metadata.decode_length = 10
    assert calls.call(metadata) == ["stock"]


def builder_of(name: str) -> Any:
    """One of our builders around vLLM's, for as much of a configuration as that reads."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            get_num_attention_heads=lambda _: HEADS,
            get_num_kv_heads=lambda _: HEADS,
            get_head_size=lambda: HEAD,
            hf_config=SimpleNamespace(model_type="llama"),
            rswa_window=None,
            is_mm_prefix_lm=False,
        ),
        parallel_config=SimpleNamespace(cp_kv_cache_interleave_size=1, decode_context_parallel_size=1),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        compilation_config=SimpleNamespace(
            cudagraph_mode=CUDAGraphMode.PIECEWISE, max_cudagraph_capture_size=64, static_forward_context={}
        ),
        attention_config=SimpleNamespace(),
        kernel_config=SimpleNamespace(enable_jit_warmup=False),
        scheduler_config=SimpleNamespace(max_num_seqs=MOST_ROWS, max_num_batched_tokens=64),
        speculative_config=None,
    )
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=HEADS, head_size=HEAD, dtype=torch.bfloat16)
    module, _, ours = backend.OURS[name].rpartition(".")
    built = getattr(importlib.import_module(module), ours).get_builder_cls()
    return built(spec, ["a"], config, torch.device("cpu"))


@pytest.fixture
def active(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes the remote attention of a worker in the step of a batch the active one."""

    def activate(batch: Batch) -> remote_attention.RemoteAttention:
        remote = remote_of(batch)
        remote_attention.activate(remote)
        return remote

    yield activate
    remote_attention.activate(None)


@pytest.mark.parametrize("name", BUILT)
def test_the_stock_builder_is_given_the_masked_batch(name: str, active: Any) -> None:
    batch = Batch([Row(0, 9), Row(1, 7), Row(0, 5)])
    active(batch)
    metadata = builder_of(name).build(0, batch.common)
    assert metadata.seq_lens.tolist() == [9, 1, 5]
    assert metadata.block_table[1].tolist() == [0] * 5
    assert metadata.block_table[0].tolist() == batch.table[0].tolist()
    assert metadata.slot_mapping.tolist() == [batch.slots[0], -1, batch.slots[2]]
    assert (metadata.max_seq_len, metadata.decode_length) == (9, 9)
    assert metadata.remote_plan.has_local


@pytest.mark.parametrize("name", BUILT)
def test_without_offloaded_rows_the_stock_builder_is_given_what_the_runner_has(name: str, active: Any) -> None:
    batch = Batch([Row(0, 9), Row(0, 7, 2)])
    active(batch)
    metadata = builder_of(name).build(0, batch.common)
    assert metadata.block_table is batch.common.block_table_tensor
    assert metadata.seq_lens is batch.common.seq_lens
    assert (metadata.remote_plan, metadata.decode_length) == (None, 0)


@pytest.mark.parametrize("name", BUILT)
def test_warm_up_metadata_has_no_plan(name: str) -> None:
    assert builder_of(name).build_for_cudagraph_capture(Batch([Row(0, 1)]).common).remote_plan is None


class Reference:
    """A stock layer that attends by its metadata alone."""

    def __init__(self, keys: torch.Tensor) -> None:
        self.keys = keys

    def forward(self, layer: Any, query: Any, key: Any, value: Any, cache: Any, metadata: Any, output: Any) -> Any:
        return output.copy_(attended(metadata, query, self.keys))


class ReferenceLayer(OffloadingLayer, Reference):
    """The wrapper before it."""


def test_a_layer_gives_every_row_the_attention_over_its_own_pool(active: Any) -> None:
    """Executors are played by the same attention over other keys."""
    batch = Batch([Row(0, 9), Row(1, 7), Row(0, 6, 2), Row(2, 5), Row(1, 3)])
    tokens = len(batch.slots)
    random = torch.Generator().manual_seed(0)
    q = torch.randn(tokens, HEADS, HEAD, generator=random, dtype=torch.float64)
    pools = torch.randn(3, LOCAL_BLOCKS, BLOCK, HEADS, HEAD, generator=random, dtype=torch.float64)
    of_pool = [attended(batch.in_pool(pool), q, pools[pool]) for pool in range(3)]

    remote = active(batch)
    sent: list[torch.Tensor] = []

    def receive(layer: int, output: torch.Tensor) -> int:
        for executor, rows in remote.transport.began[-1].items():
            for row in rows:
                token = int(batch.common.query_start_loc_cpu[row])
                output[token] = of_pool[executor + 1][token]
        return 0

    remote.transport.receive, remote.transport.send = receive, lambda _, *qkv: sent.extend(qkv)
    common, plan = remote.split(batch.common)
    common.remote_plan, common.decode_length = plan, 0  # type: ignore[attr-defined]
    output = torch.full_like(q, float("nan"))
    layer: Any = SimpleNamespace(layer_name="a")
    ReferenceLayer(pools[0]).forward(layer, q, q, q, pools[0], common, output)

    assert len(sent) == 3
    assert all(each is q for each in sent)
    for number, row in enumerate(batch.rows):
        begin, end = batch.common.query_start_loc_cpu[number : number + 2].tolist()
        assert torch.equal(output[begin:end], of_pool[row.pool][begin:end])
