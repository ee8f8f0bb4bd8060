"""The native decode attention gives vLLM's bits: for every shape it takes, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from vllm.utils.math_utils import cdiv

from vllm_adrenaline.attention import native_decode
from vllm_adrenaline.attention.kernels import CpuAttention
from vllm_adrenaline.native.library import library

pytestmark = pytest.mark.skipif(not library.can_attend(), reason="needs AVX-512 with bfloat16")
LENGTHS = [1, 5, 31, 32, 33, 100, 127, 128, 129, 300]
SHAPES = [(8, 8, 64, 128), (8, 2, 64, 128), (8, 4, 32, 32), (16, 2, 128, 128), (4, 4, 96, 64), (2, 1, 256, 32)]
"""Query heads, KV heads, head size, block size."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def attention(shape: tuple[int, int, int, int], dtype: torch.dtype, native: bool) -> CpuAttention:
    heads, kv_heads, head, block = shape
    torch.manual_seed(1)
    cache = torch.randn(64, kv_heads, 2 * block, head).to(dtype)
    made = CpuAttention([cache], [head**-0.5], heads, "vec", split_kv=True, native=native)
    assert bool(made._longest) == native
    return made


def step(on: CpuAttention, lengths: list[int], seed: int) -> dict[str, torch.Tensor]:
    """Rows of one token at the end of `lengths`; blocks belong to one row each."""
    torch.manual_seed(seed)
    rows, size = len(lengths), on.block_size
    width = cdiv(max(lengths), size)
    used = torch.randperm(64)[: sum(cdiv(n, size) for n in lengths)].tolist()
    table = torch.zeros(rows, width, dtype=torch.int32)
    for row, length in enumerate(lengths):
        for i in range(cdiv(length, size)):
            table[row, i] = used.pop()
    slots = [int(table[r, (n - 1) // size]) * size + (n - 1) % size if n else -1 for r, n in enumerate(lengths)]
    heads = {"q": on.num_heads, "k": on.num_kv_heads, "v": on.num_kv_heads, "out": on.num_heads}
    made = {name: (2 * torch.randn(rows, n, on.head_size)).to(on.dtype) for name, n in heads.items()}
    return made | {
        "query_start_loc": torch.arange(rows + 1, dtype=torch.int32),
        "seq_lens": torch.tensor(lengths, dtype=torch.int32),
        "block_table": table,
        "slot_mapping": torch.tensor(slots),
    }


def run(on: CpuAttention, given: dict[str, torch.Tensor]) -> torch.Tensor:
    schedule = on.schedule(given["query_start_loc"], given["seq_lens"])
    assert (schedule is None) == bool(on._longest), "the step was attended by the other one"
    on.layer(0, given, schedule)
    return given["out"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_bit_is_vllms(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    lengths = LENGTHS if shape[3] >= 64 else LENGTHS[:-2]
    ours, theirs = (attention(shape, dtype, native) for native in (True, False))
    for seed in range(3):
        assert torch.equal(run(ours, step(ours, lengths, seed)), run(theirs, step(theirs, lengths, seed)))


def test_rows_that_are_not_local_keep_what_stands_in_their_output() -> None:
    ours = attention(SHAPES[0], torch.bfloat16, native=True)
    alone = run(ours, step(ours, [200], 5))
    given = step(ours, [200], 5)
    mixed = {name: torch.cat([x, x]) for name, x in given.items() if name != "query_start_loc"}
    mixed |= {"query_start_loc": torch.arange(3, dtype=torch.int32)}
    mixed["seq_lens"][0], mixed["slot_mapping"][0] = 0, -1
    mixed["out"][0] = 7
    done = run(ours, mixed)
    assert (done[0] == 7).all()
    assert torch.equal(done[1:], alone)


def test_a_step_with_a_prompt_is_left_to_vllm() -> None:
    ours = attention(SHAPES[0], torch.float32, native=True)
    assert (
        ours.schedule(torch.tensor([0, 1, 4], dtype=torch.int32), torch.tensor([9, 3], dtype=torch.int32)) is not None
    )
    too_long = torch.tensor([ours._longest + 1], dtype=torch.int32)
    assert ours.schedule(torch.tensor([0, 1], dtype=torch.int32), too_long) is not None


def test_it_is_not_used_where_it_would_give_other_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_decode, "attend", lambda cache, q, out, *_: out.zero_())
    native_decode._try_out.cache_clear()
    keys = torch.zeros(2, 8, 128, 64)
    assert native_decode.longest_row(8, keys, "vec") == 0
    native_decode._try_out.cache_clear()


@pytest.mark.parametrize(
    ("heads", "sizes", "dtype", "isa"),
    [
        (8, (2, 8, 128, 64), torch.float32, "amx"),
        (12, (2, 4, 128, 64), torch.float32, "vec"),
        (8, (2, 8, 16, 64), torch.float32, "vec"),
        (8, (2, 8, 128, 80), torch.float32, "vec"),
        (8, (2, 8, 128, 64), torch.float16, "vec"),
    ],
)
def test_it_is_not_used_for_what_it_does_not_know(
    heads: int, sizes: tuple[int, ...], dtype: torch.dtype, isa: str
) -> None:
    assert native_decode.longest_row(heads, torch.zeros(*sizes, dtype=dtype), isa) == 0


def test_several_threads_are_left_to_vllm() -> None:
    torch.set_num_threads(2)
    assert native_decode.longest_row(8, torch.zeros(2, 8, 128, 64), "vec") == 0


def test_a_cache_it_cannot_read_is_refused() -> None:
    keys = torch.zeros(2, 8, 128, 64)
    with pytest.raises(ValueError, match="KV cache"):
        library.KVCache(keys.transpose(2, 3), keys, 8, 1.0)
    with pytest.raises(RuntimeError, match="differ"):
        library.KVCache(keys, torch.zeros(3, 8, 128, 64), 8, 1.0)
    with pytest.raises(RuntimeError, match="query heads"):
        library.KVCache(keys, keys, 12, 1.0)
