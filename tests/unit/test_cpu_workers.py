"""Workers on CPU around a model runner that is made up: what they have in common with those on CUDA ends in vLLM's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from tests.unit.split_cases import BLOCK, HEAD, HEADS, WIDTH
from tests.unit.test_control import IDENTITY
from tests.unit.test_gpu_workers import LAYERS, FakeLink, RunnerV1, config_of, kv_cache_config, metadata
from vllm_adrenaline.control.kv_export import KVExport
from vllm_adrenaline.control.messages import WorkerExport
from vllm_adrenaline.decode import remote_attention, worker, worker_base
from vllm_adrenaline.decode.remote_attention import RemoteAttention
from vllm_adrenaline.decode.worker import DecodeWorker
from vllm_adrenaline.decode.worker_base import OffloadingWorker
from vllm_adrenaline.kv.sharing import SharedKVCache
from vllm_adrenaline.prefill import worker as prefill_worker
from vllm_adrenaline.prefill import worker_base as prefill_worker_base
from vllm_adrenaline.prefill.worker import PrefillWorker
from vllm_adrenaline.prefill.worker_base import ExportingWorker
from vllm_adrenaline.system import descriptors

BLOCKS = 6


@pytest.mark.parametrize(("ours", "common"), [(DecodeWorker, OffloadingWorker), (PrefillWorker, ExportingWorker)])
def test_the_common_part_stands_between_our_worker_and_vllms_for_cpu(ours: type, common: type) -> None:
    assert ours.__mro__[:4] == (ours, common, CPUWorker, Worker)


@pytest.fixture
def attached(monkeypatch: pytest.MonkeyPatch) -> Iterator[DecodeWorker]:
    """The worker of a decode engine with one prefill engine, attached."""
    made = object.__new__(DecodeWorker)
    made.vllm_config = config_of("decode", experimental_cuda=False, peers="ipc:///x")
    opened: list[Any] = []
    for name in LAYERS:
        impl = SimpleNamespace(open=lambda layer, cache: opened.append((layer, cache)))
        made.vllm_config.compilation_config.static_forward_context[name] = SimpleNamespace(
            bind_kv_cache=opened.append, impl=impl
        )
    made.model_runner, made.use_v2_model_runner = RunnerV1(), False
    made.parallel_config, made.rank, made.remote = None, 0, None
    cache = torch.zeros(BLOCKS, HEADS, BLOCK, 2 * HEAD)
    connector = SimpleNamespace(connector_worker=SimpleNamespace(kv_caches=dict.fromkeys(LAYERS, cache), remote=None))
    for module in (worker, worker_base):
        monkeypatch.setattr(module, "get_kv_transfer_group", lambda: connector)
    for name in ("settle_worker", "come_first"):
        monkeypatch.setattr(worker, name, lambda: None)
    monkeypatch.setattr(worker_base, "Link", FakeLink)
    monkeypatch.setattr(worker_base, "identity_of", lambda _: IDENTITY)
    monkeypatch.setattr(Worker, "initialize_from_config", lambda *_: None)
    made.initialize_from_config(kv_cache_config())
    assert [each[1] is cache if isinstance(each, tuple) else each is cache for each in opened] == [True] * 4
    yield made
    remote_attention.activate(None)


def test_a_decode_worker_is_attached_and_begins_its_steps(
    attached: DecodeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = attached.remote
    assert type(remote) is RemoteAttention
    assert remote_attention.active() is remote
    (link,) = remote.links
    *_, shape, _, interface, kernels = link.args  # type: ignore[attr-defined]
    assert (shape.max_blocks, interface, kernels) == (WIDTH, "", None)
    begun: list[Any] = []
    monkeypatch.setattr(remote, "begin_step", lambda *args: begun.append(args))
    monkeypatch.setattr(Worker, "execute_model", lambda *_: "done")
    assert attached.execute_model(metadata(frozenset("r"))) == "done"
    assert begun == [(frozenset("r"), {}, {})]


def test_a_prefill_worker_passes_the_file_of_its_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shared = SharedKVCache()
    with shared:
        flat = torch.zeros(2 * len(LAYERS) * BLOCKS * HEADS * BLOCK * 2 * HEAD, dtype=torch.int8)
    whole = flat.view(torch.bfloat16).view(len(LAYERS), BLOCKS, HEADS, BLOCK, 2 * HEAD)
    caches = {name: whole[index] for index, name in enumerate(LAYERS)}
    impl = {"alibi_slopes": None, "sinks": None, "logits_soft_cap": 0, "sliding_window": -1, "scale": 0.5}
    layer = SimpleNamespace(impl=SimpleNamespace(**impl, num_heads=HEADS), isa="vec", layer_name="a")
    made = object.__new__(PrefillWorker)
    made.vllm_config = config_of("prefill", experimental_cuda=False, listen=f"ipc://{tmp_path}/p")
    made.vllm_config.compilation_config.static_forward_context = dict.fromkeys(LAYERS, layer)
    made.model_runner, made._weights = SimpleNamespace(kv_cache_config=kv_cache_config()), None
    connector = SimpleNamespace(shared_kv=shared, connector_worker=SimpleNamespace(kv_caches=caches))
    monkeypatch.setattr(prefill_worker_base, "get_kv_transfer_group", lambda: connector)
    monkeypatch.setattr(prefill_worker, "settle_worker", lambda: None)
    server = descriptors.Server(f"{tmp_path}/p.fd")
    server.start()
    told = msgspec.msgpack.decode(made.export_memory(), type=WorkerExport)
    descriptors.close(server.take(told.descriptors, 2))
    server.stop()
    assert isinstance(told.kv, KVExport)
    assert told.kv.shape == [BLOCKS, HEADS, 2 * BLOCK, HEAD]
    assert [spec.offset for spec in told.kv.layers] == [0, flat.numel() // 2]
    assert (told.kv.isa, told.kv.num_heads, told.weights) == ("vec", HEADS, None)
