"""The executor's kernel on a mapped KV cache against attention written out, for query lengths of one and more."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch

from vllm_adrenaline.attention.kernels import CpuAttention
from vllm_adrenaline.attention.server import check_plan
from vllm_adrenaline.control.kv_export import KVExport, LayerSpec
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.kv.sharing import SharedKVCache
from vllm_adrenaline.system import memory_file

BLOCKS, KV_HEADS, HEADS, BLOCK, HEAD = 6, 2, 4, 32, 32
SHAPE = [BLOCKS, KV_HEADS, 2 * BLOCK, HEAD]
STRIDES = [KV_HEADS * 2 * BLOCK * HEAD, 2 * BLOCK * HEAD, HEAD, 1]
SCALE = HEAD**-0.5


@pytest.fixture
def attention() -> CpuAttention:
    layer_bytes = 4 * BLOCKS * STRIDES[0]
    fd = memory_file.create("kv", 2 * layer_bytes)
    layers = [LayerSpec("a", 0, SCALE), LayerSpec("b", layer_bytes, SCALE)]
    kv = KVExport(2 * layer_bytes, SHAPE, STRIDES, "float32", "vec", HEADS, layers, [0], 1)
    made = CpuAttention.mapped(kv, fd, split_kv=True)
    os.close(fd)
    return made


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of q [Q, H, D] at the end of k, v [S, Hk, D]."""
    group = HEADS // KV_HEADS
    scores = torch.einsum("qhd,shd->hqs", q, k.repeat_interleave(group, 1)) * SCALE
    queries, length = len(q), len(k)
    mask = torch.arange(length)[None, :] > torch.arange(length - queries, length)[:, None]
    weights = scores.masked_fill(mask, -torch.inf).softmax(-1)
    return torch.einsum("hqs,shd->qhd", weights, v.repeat_interleave(group, 1))


def step(attention: CpuAttention, layer: int, rows: list[tuple[list[int], int, torch.Tensor, torch.Tensor]]) -> dict:
    """Append and attend for rows of (blocks, tokens before, new k, new v); return the step with q and out."""
    counts = [len(k) for _, _, k, _ in rows]
    slots = [
        blocks[(past + i) // BLOCK] * BLOCK + (past + i) % BLOCK for blocks, past, k, _ in rows for i in range(len(k))
    ]
    made = {
        "query_start_loc": torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32),
        "seq_lens": torch.tensor([past + len(k) for _, past, k, _ in rows], dtype=torch.int32),
        "block_table": torch.tensor([blocks for blocks, _, _, _ in rows], dtype=torch.int32),
        "slot_mapping": torch.tensor(slots),
        "q": torch.randn(sum(counts), HEADS, HEAD),
        "k": torch.cat([k for _, _, k, _ in rows]),
        "v": torch.cat([v for _, _, _, v in rows]),
        "out": torch.empty(sum(counts), HEADS, HEAD),
    }
    check_plan(made, BLOCKS, BLOCK)
    attention.layer(layer, made, attention.schedule(made["query_start_loc"], made["seq_lens"]))
    return made


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("queries", [1, 3, 40])
def test_it_attends_over_what_was_appended(attention: CpuAttention, layer: int, queries: int) -> None:
    torch.manual_seed(queries)
    past = 20
    keys = [torch.randn(past + queries, KV_HEADS, HEAD) for _ in range(2)]
    values = [torch.randn(past + queries, KV_HEADS, HEAD) for _ in range(2)]
    tables = [[1, 4], [2, 5]]
    step(attention, layer, [(t, 0, k[:past], v[:past]) for t, k, v in zip(tables, keys, values, strict=True)])
    new = [(t, past, k[past:], v[past:]) for t, k, v in zip(tables, keys, values, strict=True)]
    done = step(attention, layer, new)
    wanted = torch.cat([reference(done["q"][i * queries : (i + 1) * queries], keys[i], values[i]) for i in range(2)])
    torch.testing.assert_close(done["out"], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("tokens", [0, 9])
def test_rows_and_tokens_of_padding_change_no_bit(attention: CpuAttention, rows: int, tokens: int) -> None:
    key, value = torch.randn(40, KV_HEADS, HEAD), torch.randn(40, KV_HEADS, HEAD)
    done = step(attention, 0, [([3, 0], 0, key, value), ([1, 2], 0, key[:33], value[:33])])
    before = [cache.clone() for cache in (attention._key_caches[0], attention._value_caches[0])]

    def padded(name: str, count: int, fill: float) -> torch.Tensor:
        array = done[name]
        return torch.cat([array, torch.full((count, *array.shape[1:]), fill, dtype=array.dtype)])

    again = {name: padded(name, tokens, 7.0) for name in ("q", "k", "v", "out")}
    again |= {"slot_mapping": padded("slot_mapping", tokens, -1), "seq_lens": padded("seq_lens", rows, 0)}
    again |= {"block_table": padded("block_table", rows, 0), "query_start_loc": padded("query_start_loc", rows, 73)}
    check_plan(again, BLOCKS, BLOCK)
    again["out"].fill_(7.0)
    attention.layer(0, again, attention.schedule(again["query_start_loc"], again["seq_lens"]))
    assert torch.equal(again["out"][:73], done["out"])
    assert (again["out"][73:] == 7).all()
    after = [attention._key_caches[0], attention._value_caches[0]]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_slot_of_minus_one_is_not_written(attention: CpuAttention) -> None:
    key, value = torch.randn(5, KV_HEADS, HEAD), torch.randn(5, KV_HEADS, HEAD)
    step(attention, 0, [([3, 0], 0, key, value)])
    again = {
        "query_start_loc": torch.tensor([0, 1], dtype=torch.int32),
        "seq_lens": torch.tensor([5], dtype=torch.int32),
        "block_table": torch.tensor([[3, 0]], dtype=torch.int32),
        "slot_mapping": torch.tensor([-1]),
        "q": torch.randn(1, HEADS, HEAD),
        "k": torch.full((1, KV_HEADS, HEAD), 100.0),
        "v": torch.full((1, KV_HEADS, HEAD), 100.0),
        "out": torch.empty(1, HEADS, HEAD),
    }
    attention.layer(0, again, attention.schedule(again["query_start_loc"], again["seq_lens"]))
    torch.testing.assert_close(again["out"], reference(again["q"], key, value), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("block_table", BLOCKS),
        ("block_table", -1),
        ("slot_mapping", BLOCKS * BLOCK),
        ("slot_mapping", -2),
        ("seq_lens", 0),
        ("seq_lens", 1000),
        ("query_start_loc", 1),
    ],
)
def test_a_plan_that_points_outside_the_cache_is_refused(name: str, value: int) -> None:
    plan = {
        "query_start_loc": torch.tensor([0, 1], dtype=torch.int32),
        "seq_lens": torch.tensor([3], dtype=torch.int32),
        "block_table": torch.tensor([[1, 2]], dtype=torch.int32),
        "slot_mapping": torch.tensor([34]),
    }
    check_plan(plan, BLOCKS, BLOCK)
    plan[name].view(-1)[0] = value
    with pytest.raises(AdrenalineError, match="outside the KV cache"):
        check_plan(plan, BLOCKS, BLOCK)


def test_a_kv_cache_that_could_shrink_is_not_mapped_and_ours_cannot() -> None:
    """Whoever shrinks it would end the executor that has it mapped."""
    with SharedKVCache() as shared:
        cache = torch.zeros(1 << 16, dtype=torch.int8)
    assert shared.offset(cache) == 0
    with pytest.raises(PermissionError):
        os.ftruncate(shared.fd, 4096)
    fd, size = os.memfd_create("kv"), 4 * BLOCKS * STRIDES[0]
    os.ftruncate(fd, size)
    kv = KVExport(size, SHAPE, STRIDES, "float32", "vec", HEADS, [LayerSpec("a", 0, SCALE)], [0], 1)
    with pytest.raises(AdrenalineError, match="F_SEAL_SHRINK"):
        CpuAttention.mapped(kv, fd, split_kv=True)
    for each in (fd, shared.fd):
        os.close(each)


TWO_ENGINES = """
import sys, threading, torch
from vllm.utils.math_utils import cdiv
from vllm_adrenaline.attention.kernels import CpuAttention

torch.set_num_threads(1)
ROUNDS, BLOCKS, BLOCK, HEADS, SIZE = 100, 80, 128, 8, 64
torch.manual_seed(0)
caches = [torch.randn(BLOCKS, HEADS, 2 * BLOCK, SIZE)]
attention = CpuAttention(caches, [SIZE**-0.5], HEADS, "vec", True, native=False)


def step(rows, context):
    width = cdiv(context, BLOCK)
    return {
        "query_start_loc": torch.arange(rows + 1, dtype=torch.int32),
        "seq_lens": torch.full((rows,), context, dtype=torch.int32),
        "block_table": torch.randint(BLOCKS, (rows, width), dtype=torch.int32),
        "slot_mapping": torch.full((rows,), -1, dtype=torch.int64),
        **{name: torch.randn(rows, HEADS, SIZE) for name in ("q", "k", "v", "out")},
    }


def attend(step):
    schedule = attention.schedule(step["query_start_loc"], step["seq_lens"])
    step["out"].zero_()
    attention.layer(0, step, schedule)
    return step["out"]


def run(step, wanted, wrong):
    for _ in range(ROUNDS):
        wrong[0] += not torch.equal(attend(step), wanted)


steps = [step(4, 700), step(3, 1900)]
wanted = [attend(each).clone() for each in steps]
wrong = [[0], [0]]
for order in ([0, 1], [1, 0]):
    schedules = {i: attention.schedule(steps[i]["query_start_loc"], steps[i]["seq_lens"]) for i in order}
    for i in (0, 1, 1, 0):
        steps[i]["out"].zero_()
        attention.layer(0, steps[i], schedules[i])
        assert torch.equal(steps[i]["out"], wanted[i]), (order, i)
print("schedules stay valid", flush=True)

threads = [threading.Thread(target=run, args=each) for each in zip(steps, wanted, wrong)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(f"{wrong[0][0] + wrong[1][0]} of {2 * ROUNDS} outputs are wrong")
"""


@pytest.fixture(scope="module")
def two_engines() -> subprocess.CompletedProcess[str]:
    """Two decode engines on one executor, in a process of its own: a crash is a finding, too."""
    return subprocess.run([sys.executable, "-c", TWO_ENGINES], capture_output=True, text=True)


def test_a_schedule_stays_valid_when_another_one_is_made_before_it_is_used(
    two_engines: subprocess.CompletedProcess[str],
) -> None:
    """As in an executor of two decode engines, whose layers take turns."""
    assert two_engines.stdout.startswith("schedules stay valid\n"), two_engines.stderr[-2000:]


def test_two_decode_engines_on_one_executor_do_not_disturb_each_other(
    two_engines: subprocess.CompletedProcess[str],
) -> None:
    """vLLM's operators have one scratch memory for a process."""
    assert two_engines.returncode == 0, two_engines.stderr[-2000:]
    assert two_engines.stdout.endswith("\n0 of 200 outputs are wrong\n")


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine with AMX: what was done before and after its tiles were asked for."""
    done: list[str] = []
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: bool(done.append("asked") or True))
    return done


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_workers_ask_for_amx_tiles_before_vllm_could_attend(
    amx: list[str], role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.worker.cpu_worker import CPUWorker

    worker = importlib.import_module(f"vllm_adrenaline.{role}.worker")
    monkeypatch.setattr(worker, "settle_worker", lambda: None)
    monkeypatch.setattr(worker, "register_backend", lambda *_: None, raising=False)
    monkeypatch.setattr(CPUWorker, "__init__", lambda self: amx.append("vLLM's own worker"))
    getattr(worker, f"{role.title()}Worker")()
    assert amx == ["asked", "vLLM's own worker"]


@pytest.mark.parametrize("isa", ["vec", "amx"])
def test_an_executor_asks_for_amx_tiles_whatever_its_layout(amx: list[str], isa: str) -> None:
    CpuAttention([torch.zeros(SHAPE)], [SCALE], HEADS, isa, split_kv=True, native=False)
    assert amx == ["asked"]


def test_tiles_that_the_kernel_does_not_grant_are_a_refusal(amx: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: False)
    with pytest.raises(AdrenalineError, match="AMX"):
        CpuAttention([torch.zeros(SHAPE)], [SCALE], HEADS, "amx", split_kv=True, native=False)


def test_a_machine_without_amx_is_asked_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: pytest.fail("asked"))
    CpuAttention([torch.zeros(SHAPE)], [SCALE], HEADS, "vec", split_kv=True, native=False)
