"""Workers on CUDA around model runners that are made up, on tensors of the CPU: what is wired to what, and refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backends.composite import MMPrefixAttentionRouting, create_composite_attention_backend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.worker.gpu_worker import Worker

from tests.unit.split_cases import (
    BLOCK,
    HEAD,
    HEADS,
    MOST_ROWS,
    MOST_TOKENS,
    WIDTH,
    Batch,
    Row,
    Transport,
    block_tables,
)
from tests.unit.test_control import IDENTITY
from tests.unit.test_gpu_export import layers_of as vllms_layers
from tests.unit.test_gpu_export import shared, views  # noqa: F401 - a fixture
from vllm_adrenaline.attention.spec import ExecutorSpec
from vllm_adrenaline.control.kv_export import GpuKVExport
from vllm_adrenaline.control.messages import WorkerExport
from vllm_adrenaline.decode import backend, gpu_worker, remote_attention, worker_base
from vllm_adrenaline.decode.connector import DecodeConnector
from vllm_adrenaline.decode.device_split import DeviceRemoteAttention
from vllm_adrenaline.decode.gpu_worker import GpuDecodeWorker
from vllm_adrenaline.engine import cuda
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.kv import space
from vllm_adrenaline.kv.sharing import GpuKVCache, SharedKVCache
from vllm_adrenaline.prefill import executor as prefill_executor
from vllm_adrenaline.prefill import worker_base as prefill_worker_base
from vllm_adrenaline.prefill.connector import PrefillConnector
from vllm_adrenaline.prefill.executor import PrefillExecutor
from vllm_adrenaline.prefill.gpu_worker import GpuPrefillWorker
from vllm_adrenaline.system import descriptors

MEMBERS: dict[int, str] = {}
LAYERS = ["a", "b"]


class FakeLink:
    """A link to an executor that is there at once."""

    is_writing, channel = False, object()

    def __init__(self, address: str, *args: Any) -> None:
        self.address, self.args = address, args

    def attach_until(self, deadline: float) -> None:
        pass

    def close(self) -> None:
        self.channel = None


def group_of(path: str, kernel_block_size: int | None = None) -> Any:
    """An attention group of vLLM's, with the backend of this path."""
    module, _, name = path.rpartition(".")
    found = SimpleNamespace(full_cls_name=lambda: (module, name), get_name=lambda: "SOME_ATTN")
    return SimpleNamespace(backend=found, kernel_block_size=kernel_block_size)


class RunnerV1:
    """What is looked at of model runner V1."""

    def __init__(self) -> None:
        self.table = torch.zeros((MOST_ROWS, WIDTH), dtype=torch.int32)
        block_table = SimpleNamespace(get_cpu_tensor=lambda: self.table, max_num_blocks_per_req=WIDTH)
        self.input_batch = SimpleNamespace(num_reqs=0, block_table=[block_table], req_id_to_index={}, generators={})
        self.discard_request_mask = SimpleNamespace(np=np.zeros(MOST_ROWS, dtype=bool))
        self.attn_groups = [[group_of(backend.OURS["TRITON_ATTN"])]]

    def take(self, batch: Batch) -> None:
        """Have the requests of a batch come."""
        self.table[: len(batch.rows)] = batch.table[: len(batch.rows)]
        self.input_batch.num_reqs = len(batch.rows)
        self.input_batch.req_id_to_index |= {str(row): row for row in range(len(batch.rows))}


class RunnerV2:
    """What is looked at of model runner V2."""

    def __init__(self) -> None:
        self.block_tables = block_tables()
        self.req_states = SimpleNamespace(req_id_to_index={})
        self.attn_groups = [[group_of(backend.OURS["FLASHINFER"])]]

    def take(self, batch: Batch) -> None:
        """Have the requests of a batch come."""
        for row, index in enumerate(batch.index):
            self.block_tables.append_block_ids(int(index), (batch.table[row].tolist(),), overwrite=True)
            self.req_states.req_id_to_index[str(row)] = int(index)


RUNNERS = [RunnerV1, RunnerV2]


@pytest.fixture
def cuda_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything of CUDA and of vLLM's own worker is played, and our backends have taken the place of vLLM's."""
    backend.override(*cuda.BACKENDS)
    monkeypatch.setattr(Worker, "initialize_from_config", lambda *_: None)
    monkeypatch.setattr(gpu_worker.cuda_library, "load", lambda: SimpleNamespace(path="library"))
    monkeypatch.setattr(gpu_worker, "ChannelKernels", lambda path: f"kernels of {path}")
    monkeypatch.setattr(gpu_worker, "GpuSteps", lambda *_: Transport())
    monkeypatch.setattr(worker_base, "Link", FakeLink)
    monkeypatch.setattr(worker_base, "identity_of", lambda _: IDENTITY)
    yield
    remote_attention.activate(None)
    for name in cuda.BACKENDS:
        AttentionBackendEnum[name].clear_override()


def config_of(role: str, **values: Any) -> Any:
    model = SimpleNamespace(
        get_num_attention_heads=lambda _: HEADS,
        get_num_kv_heads=lambda _: HEADS,
        get_head_size=lambda: HEAD,
        dtype=torch.bfloat16,
    )
    return SimpleNamespace(
        additional_config={"adrenaline": {"role": role, "experimental_cuda": True} | values},
        model_config=model,
        scheduler_config=SimpleNamespace(max_num_seqs=MOST_ROWS, max_num_batched_tokens=MOST_TOKENS),
        kv_transfer_config=SimpleNamespace(engine_id="engine"),
        cache_config=SimpleNamespace(block_size=BLOCK),
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.PIECEWISE, static_forward_context={}),
    )


def decode_worker(monkeypatch: pytest.MonkeyPatch, runner: Any, block_size: int = BLOCK) -> GpuDecodeWorker:
    """A worker of a decode engine with two prefill engines, whose KV cache vLLM has not allocated yet."""
    worker = object.__new__(GpuDecodeWorker)
    worker.vllm_config = config_of("decode", offload_ratio="1", peers="ipc:///x,ipc:///y")
    worker.model_runner, worker.use_v2_model_runner = runner, isinstance(runner, RunnerV2)
    worker.parallel_config, worker.rank, worker.device, worker.remote = None, 0, torch.device("cpu"), None
    cache = torch.zeros(4, HEADS, block_size, 2 * HEAD)
    side = SimpleNamespace(kv_caches=dict.fromkeys(LAYERS, cache), remote=None)
    for module in (gpu_worker, worker_base):
        monkeypatch.setattr(module, "get_kv_transfer_group", lambda: SimpleNamespace(connector_worker=side))
    return worker


def kv_cache_config(groups: int = 1) -> Any:
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=LAYERS)] * groups)


def metadata(received: frozenset[str] = frozenset()) -> Any:
    meta = SimpleNamespace(received=received, members=MEMBERS)
    return SimpleNamespace(kv_connector_metadata=meta)


@pytest.mark.usefixtures("cuda_parts")
@pytest.mark.parametrize("make", RUNNERS)
def test_steps_are_split_by_what_the_model_runner_has(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make()
    worker = decode_worker(monkeypatch, runner)
    worker.initialize_from_config(kv_cache_config())
    remote = worker.remote
    assert isinstance(remote, DeviceRemoteAttention)
    assert remote_attention.active() is remote is gpu_worker.get_kv_transfer_group().connector_worker.remote
    assert [link.address for link in remote.links] == ["ipc:///x", "ipc:///y"]
    identity, engine, rank, layers, shape, *_, kernels = remote.links[0].args  # type: ignore[attr-defined]
    assert (identity, engine, rank, layers, kernels) == (IDENTITY, "engine", 0, LAYERS, "kernels of library")
    assert (shape.max_rows, shape.max_tokens, shape.max_blocks) == (MOST_ROWS, MOST_TOKENS, WIDTH)

    batch = Batch([Row(0, 9), Row(space.remote_pool(1), 7), Row(0, 5, is_received=True), Row(space.MAPPED, 3)])
    runner.take(batch)
    split: list[Any] = []
    monkeypatch.setattr(Worker, "execute_model", lambda *_: split.extend(remote.split(batch.common)))
    worker.execute_model(metadata(batch.received))
    common, plan = split
    assert common.block_table_tensor[:, 0].tolist() == [int(batch.table[0, 0]), 0, int(batch.table[2, 0]), 0]
    assert common.seq_lens.tolist() == [9, 1, 5, 1]
    assert batch.common.slot_mapping.tolist() == [int(batch.slots[0]), -1, -1, -1]
    assert plan is not None
    assert remote.transport.began == [{1: [1]}]  # type: ignore[attr-defined]

    monkeypatch.setattr(Worker, "shutdown", lambda _: None)
    worker.shutdown()
    assert remote_attention.active() is None
    assert {link.channel for link in remote.links} == {None}


@pytest.mark.usefixtures("cuda_parts")
def test_the_log_says_why_attention_is_in_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(gpu_worker.logger, "info", lambda text, *words: said.append(text % words))
    decode_worker(monkeypatch, RunnerV2()).initialize_from_config(kv_cache_config())
    assert [text.split(" (")[0] for text in said] == [
        "CUDA graphs: PIECEWISE, without attention: in each step it sends other rows to executors"
    ]


@pytest.mark.usefixtures("cuda_parts")
@pytest.mark.parametrize("make", RUNNERS)
def test_steps_with_which_vllm_warms_up_are_not_the_schedulers(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = decode_worker(monkeypatch, make())
    worker.initialize_from_config(kv_cache_config())
    monkeypatch.setattr(Worker, "execute_model", lambda *_: "done")
    assert worker.execute_model(SimpleNamespace(kv_connector_metadata=None)) == "done"  # type: ignore[arg-type]


@pytest.mark.usefixtures("cuda_parts")
def test_runner_v1_hides_the_generators_of_rows_that_draw_nothing_and_v2_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []
    one = RunnerV1()
    one.input_batch.num_reqs, one.input_batch.generators = 2, {0: "first", 1: "second"}
    one.discard_request_mask.np[1] = True
    monkeypatch.setattr(worker_base, "get_tp_group", lambda: SimpleNamespace(world_size=1))
    monkeypatch.setattr(Worker, "sample_tokens", lambda *_: seen.append(dict(one.input_batch.generators)))
    for runner in (one, RunnerV2()):
        worker = decode_worker(monkeypatch, runner)
        worker.initialize_from_config(kv_cache_config())
        worker.sample_tokens(None)
    assert seen == [{0: "first"}, {0: "first", 1: "second"}]


def backends_of(*paths: str) -> list[list[Any]]:
    return [[group_of(path) for path in paths]]


@pytest.mark.usefixtures("cuda_parts")
@pytest.mark.parametrize("make", RUNNERS)
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"groups": backends_of("vllm.v1.attention.backends.flex_attention.FlexAttentionBackend")}, "SOME_ATTN .*Flex"),
        ({"groups": backends_of(backend.OURS["FLASH_ATTN"], "x.Other")}, r"SOME_ATTN \(x\.Other\)"),
        ({"groups": [[group_of(backend.OURS["FLASH_ATTN"], 2)]]}, "give both engines --block-size 2"),
        ({"block_size": 16}, "blocks have 4 tokens, and those of the attention kernels 16"),
        ({"mode": CUDAGraphMode.FULL_AND_PIECEWISE}, "in CUDA graphs .*FULL_AND_PIECEWISE.*: give PIECEWISE"),
        ({"kv_groups": 2}, "2 KV cache groups; one is supported"),
    ],
)
def test_a_decode_worker_refuses_what_its_split_does_not_fit(
    make: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str
) -> None:
    runner = make()
    runner.attn_groups = changes.get("groups", runner.attn_groups)
    worker = decode_worker(monkeypatch, runner, changes.get("block_size", BLOCK))
    if mode := changes.get("mode"):
        worker.vllm_config.compilation_config.cudagraph_mode = mode
    with pytest.raises(AdrenalineError, match=said):
        worker.initialize_from_config(kv_cache_config(changes.get("kv_groups", 1)))
    assert worker.remote is None


@pytest.mark.usefixtures("cuda_parts")
def test_a_composite_of_two_backends_is_none_of_ours() -> None:
    parts = AttentionBackendEnum.TRITON_ATTN.get_class(), AttentionBackendEnum.FLASH_ATTN.get_class()
    names = {"name": "Both", "backend_name": "FLASH_ATTN", "module": "vllm.v1.attention.backends.both"}
    made = create_composite_attention_backend(*parts, **names, routing_policy=MMPrefixAttentionRouting)
    group: Any = SimpleNamespace(backend=made, kernel_block_size=None)
    with pytest.raises(AdrenalineError, match="each by itself"):
        cuda.check_cache([[group]], [torch.zeros(1, 1, BLOCK, 2)], BLOCK)


@pytest.mark.parametrize("name", ["FLASH_ATTN", "TRITON_ATTN"])
def test_a_worker_takes_ours_for_vllms_backends_and_knows_them_again(name: str, cuda_parts: None) -> None:
    group: Any = SimpleNamespace(backend=AttentionBackendEnum[name].get_class(), kernel_block_size=None)
    assert issubclass(group.backend, backend.OffloadingBackend)
    cuda.check_cache([[group]], [torch.zeros(1, 1, BLOCK, 2)], BLOCK)
    AttentionBackendEnum[name].clear_override()
    with pytest.raises(AdrenalineError, match="each by itself"):
        cuda.check_cache([[group]], [torch.zeros(1, 1, BLOCK, 2)], BLOCK)


# Prefill


def prefill_worker(monkeypatch: pytest.MonkeyPatch, memory: GpuKVCache, address: str) -> GpuPrefillWorker:
    caches = views(memory, is_nhd=True)
    worker = object.__new__(GpuPrefillWorker)
    worker.vllm_config = config_of("prefill", listen=address)
    worker.vllm_config.compilation_config.static_forward_context = vllms_layers(caches)
    worker.cache_config = SimpleNamespace(block_size=next(iter(caches.values())).shape[2])
    worker.model_config = worker.vllm_config.model_config
    groups = SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=list(caches))])
    path = AttentionBackendEnum.FLASH_ATTN.get_path()
    worker.model_runner = SimpleNamespace(kv_cache_config=groups, attn_groups=[[group_of(path)]])
    connector = SimpleNamespace(gpu_kv=memory, connector_worker=SimpleNamespace(kv_caches=caches))
    monkeypatch.setattr(prefill_worker_base, "get_kv_transfer_group", lambda: connector)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    return worker


@pytest.fixture
def server(tmp_path: Path) -> Iterator[descriptors.Server]:
    made = descriptors.Server(f"{tmp_path}/p.fd")
    made.start()
    yield made
    made.stop()


def test_a_prefill_worker_tells_where_its_cache_is_and_passes_no_file(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    shared: GpuKVCache,  # noqa: F811
    server: descriptors.Server,
) -> None:
    worker = prefill_worker(monkeypatch, shared, f"ipc://{tmp_path}/p")
    told = msgspec.msgpack.decode(worker.export_memory(), type=WorkerExport)
    assert isinstance(told.kv, GpuKVExport)
    assert (told.kv.device, told.kv.memories, told.kv.message) == (3, [shared.handle], "bfloat16")
    assert told.weights is None
    descriptors.close(server.take(told.descriptors, 1))


def test_a_prefill_worker_refuses_blocks_that_its_kernels_cut(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    shared: GpuKVCache,  # noqa: F811
) -> None:
    worker = prefill_worker(monkeypatch, shared, f"ipc://{tmp_path}/p")
    worker.cache_config.block_size *= 4
    with pytest.raises(AdrenalineError, match="give both engines --block-size 16"):
        worker.export_memory()


@pytest.mark.parametrize("cores", ["", "0"])
def test_executors_on_a_gpu_get_the_export_one_thread_and_the_cores_of_their_worker(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    shared: GpuKVCache,  # noqa: F811
    cores: str,
) -> None:
    address = f"ipc://{tmp_path}/p"
    worker = prefill_worker(monkeypatch, shared, address)
    pools: list[Any] = []
    monkeypatch.setattr(MultiprocExecutor, "initialize_from_config", lambda *_: None)
    monkeypatch.setattr(prefill_executor, "identity_of", lambda _: IDENTITY)
    monkeypatch.setattr(prefill_executor, "ExecutorPool", lambda *args: args)
    monkeypatch.setattr(prefill_executor.executor_pool, "activate", pools.append)
    executor = object.__new__(PrefillExecutor)
    executor.vllm_config = config_of("prefill", listen=address, executor_share=0.3, executor_cores=cores)
    executor.collective_rpc = lambda name: [getattr(worker, name)()]
    executor.initialize_from_config([])
    ((specs, mappable, weights, passing),) = pools
    passing.stop()
    (spec,) = specs
    assert isinstance(spec, ExecutorSpec)
    assert isinstance(spec.kv, GpuKVExport)
    assert (spec.kv_file, spec.threads, spec.share) == (-1, 1, 0.3)
    assert spec.cpus == ([0] if cores else list(spec.kv.cpus))
    assert (mappable, weights) == ([], [None])


# Connectors


def connector_of(kind: Any, **values: Any) -> Any:
    made = object.__new__(kind)
    made._vllm_config = config_of("prefill" if kind is PrefillConnector else "decode", **values)
    return made


def test_a_prefill_engine_allocates_its_cache_to_be_exported_and_a_decode_engine_as_vllm_does() -> None:
    prefill = connector_of(PrefillConnector)
    assert isinstance(prefill.get_mem_pool_context(), GpuKVCache)
    assert prefill.gpu_kv is not None
    assert prefill.shared_kv is None
    assert connector_of(DecodeConnector).get_mem_pool_context() is None
    on_cpu = connector_of(PrefillConnector, experimental_cuda=False)
    assert isinstance(on_cpu.get_mem_pool_context(), SharedKVCache)
    assert on_cpu.gpu_kv is None


def test_only_a_decode_engine_keeps_attention_out_of_graphs() -> None:
    assert DecodeConnector.requires_piecewise_for_cudagraph({})
    assert not PrefillConnector.requires_piecewise_for_cudagraph({})
