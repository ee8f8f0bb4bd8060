"""Steps for the kernels of csrc/cuda, and what must come of them, in double precision.

`python -m tests.unit.cuda_cases LIBRARY some KERNEL...` runs some with a library that was built otherwise, with ASan
for example; with "beyond" for "some" it reads memory that it must not.
"""

from __future__ import annotations

import math
import random
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from tests.unit.cuda_emulator import Emulator
from vllm_adrenaline.native import cuda

FP8 = torch.float8_e4m3fn
TYPES = {"Bf16": torch.bfloat16, "Half": torch.float16, "Fp8": FP8}
NO_BLOCK = 1 << 30
"""What stands in a block table where nothing may be read."""
ERROR = {torch.bfloat16: 1.25 * 2**-7, torch.float16: 1.25 * 2**-10}
"""Of an output, as a share of the sum of weight |value|: a weight and the output are each rounded once to the message's
type, which is half of this; the rest is for sums and exponentials of single precision."""


@dataclass(frozen=True)
class Case:
    """A step.

    Attributes:
        kernel: types of message and cache by name, and the head size.
        rows: of each row its tokens in the sequence, and how many of them are new.
        received: rows whose new tokens are in the cache already.
        padding: rows without tokens, and tokens without a row, behind those.
        flat: queries are 0 and values tell the tokens apart, so that one token more or less is seen in any length.
        grid, stages, seed: of the launch.
    """

    kernel: tuple[str, str, int] = ("Bf16", "Bf16", 128)
    rows: tuple[tuple[int, int], ...] = ((65, 1),)
    kv_heads: int = 2
    group: int = 4
    block_size: int = 16
    is_hnd: bool = False
    received: frozenset[int] = field(default_factory=frozenset)
    padding: int = 2
    window: int = 0
    soft_cap: float = 0.0
    has_sinks: bool = False
    scales: tuple[float, float] = (1.0, 1.0)
    flat: bool = False
    moves_output: bool = False
    grid: int = 3
    stages: int = 3
    seed: int = 0


@dataclass(frozen=True)
class Made:
    step: dict[str, torch.Tensor]
    layer: cuda.Layer
    spans: list[tuple[int, int, int, list[int]]]  # of each row: first token, length, first token read, blocks


def bits(x: torch.Tensor) -> torch.Tensor:
    """Return a view that compares and copies as bits: nothing is not a number there, and every type is known."""
    return x.view(torch.uint8 if x.itemsize == 1 else torch.int16)


def make(case: Case) -> Made:
    """Return the step. Whatever must not be read is not a number, or no block."""
    message, cache, head = TYPES[case.kernel[0]], TYPES[case.kernel[1]], case.kernel[2]
    made = torch.Generator().manual_seed(case.seed)
    drawn = random.Random(case.seed)
    size, heads = case.block_size, case.kv_heads * case.group

    def some(*sizes: int, spread: float = 1.0) -> torch.Tensor:
        return torch.randn(*sizes, generator=made) * spread

    tokens, rows = sum(queries for _, queries in case.rows), len(case.rows)
    used = [math.ceil(length / size) for length, _ in case.rows]
    blocks, width = sum(used) + 1, max([*used, 1])
    free = drawn.sample(range(blocks), blocks)
    shape = (blocks, case.kv_heads, size, head) if case.is_hnd else (blocks, size, case.kv_heads, head)
    store = torch.full((2, *shape), torch.nan).to(cache)
    keys, values = store.transpose(2, 3).unbind() if case.is_hnd else store.unbind()

    q = torch.zeros(tokens + case.padding, heads, head) if case.flat else some(tokens + case.padding, heads, head)
    new = {name: some(tokens + case.padding, case.kv_heads, head, spread=1.5) for name in "kv"}
    starts, slots, spans = [0], [], []
    table = torch.full((rows + case.padding, width), NO_BLOCK, dtype=torch.int32)
    lens = torch.zeros(rows + case.padding, dtype=torch.int32)
    for row, (length, queries) in enumerate(case.rows):
        its, context = [free.pop() for _ in range(used[row])], length - queries
        begin = max(0, context - case.window + 1) if case.window else 0
        old_keys, old_values = (some(length, case.kv_heads, head, spread=1.5) for _ in range(2))
        if case.flat:
            at = torch.arange(length)
            old_values = torch.zeros(length, case.kv_heads, head)
            old_values[at, :, at % head] = 1
            new["v"][starts[-1] : starts[-1] + queries] = old_values[context:]
        in_cache = length if row in case.received else context
        at = torch.arange(begin, in_cache)
        block = torch.tensor(its, dtype=torch.int64)[at // size]
        bits(keys)[block, at % size] = bits(old_keys[begin:in_cache].to(cache))
        bits(values)[block, at % size] = bits(old_values[begin:in_cache].to(cache))
        for i in range(begin // size, used[row]):
            table[row, i] = its[i]
        at_slot = [its[t // size] * size + t % size for t in range(context, length)]
        slots += [-1] * queries if row in case.received else at_slot
        spans.append((starts[-1], length, begin, its))
        starts.append(starts[-1] + queries)
        lens[row] = length
    starts += [starts[-1]] * case.padding
    order = drawn.sample(range(len(slots) + case.padding), len(slots) + case.padding)
    step = {
        "q": q.to(message),
        "k": new["k"].to(message),
        "v": new["v"].to(message),
        "out": torch.full((tokens + case.padding, heads, head), torch.nan).to(message),
        "query_start_loc": torch.tensor(starts, dtype=torch.int32),
        "seq_lens": lens,
        "block_table": table,
        "slot_mapping": torch.tensor(slots + [-1] * case.padding, dtype=torch.int64),
    }
    if case.moves_output:
        step["out_rows"] = torch.tensor(order, dtype=torch.int64)
    sinks = some(heads) if case.has_sinks else None
    scale = 2 / math.sqrt(head)
    return Made(step, cuda.Layer(keys, values, scale, case.soft_cap, case.window, *case.scales, sinks), spans)


def appended(made: Made) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the caches must be afterwards."""
    found = []
    for cache, name, scale in (
        (made.layer.keys, "k", made.layer.k_scale),
        (made.layer.values, "v", made.layer.v_scale),
    ):
        after = cache.clone()
        slots = made.step["slot_mapping"]
        new = made.step[name][slots >= 0]
        if cache.dtype == FP8:
            new = (new.float() / scale).clamp(-448, 448).to(FP8)
        slots = slots[slots >= 0]
        bits(after)[slots // cache.shape[1], slots % cache.shape[1]] = bits(new)
        found.append(after)
    return found[0], found[1]


def attended(made: Made, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output in float64, NaN where nothing is written, and the sums of weight |value|."""
    step, layer = made.step, made.layer
    out = torch.full(step["out"].shape, torch.nan, dtype=torch.float64)
    sizes = out.clone()
    group = step["q"].shape[1] // keys.shape[2]
    keys, values = keys.double() * layer.k_scale, values.double() * layer.v_scale
    for row, (start, length, begin, its) in enumerate(made.spans):
        at = torch.arange(begin, length)
        block, inside = torch.tensor(its, dtype=torch.int64)[at // keys.shape[1]], at % keys.shape[1]
        end = int(step["query_start_loc"][row + 1])
        q = step["q"][start:end].double()  # [n, Hq, D]
        k = keys[block, inside].repeat_interleave(group, 1)
        v = values[block, inside].repeat_interleave(group, 1)
        logits = torch.einsum("nhd,thd->nht", q, k) * layer.scale
        if layer.soft_cap:
            logits = layer.soft_cap * torch.tanh(logits / layer.soft_cap)
        position = torch.arange(length - (end - start), length)[:, None]
        hidden = at[None] > position
        if layer.window:
            hidden |= at[None] <= position - layer.window
        logits.masked_fill_(hidden[:, None], -torch.inf)
        if layer.sinks is not None:
            sinks = layer.sinks.double()[None, :, None].expand(end - start, -1, 1)
            logits = torch.cat([logits, sinks], 2)
        weights = logits.softmax(2)[..., : len(at)]
        for token in range(start, end):
            to = int(step["out_rows"][token]) if "out_rows" in step else token
            out[to] = torch.einsum("ht,thd->hd", weights[token - start], v)
            sizes[to] = torch.einsum("ht,thd->hd", weights[token - start], v.abs())
    return out, sizes


class Expected:
    """What must come of a step, worked out before it runs."""

    def __init__(self, made: Made) -> None:
        self.keys, self.values = appended(made)
        self._out, self._sizes = attended(made, self.keys, self.values)

    def hold(self, out: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Compare what came. The cache must be equal bit by bit, and nothing else of `out` may be written."""
        assert torch.equal(bits(keys), bits(self.keys)), "other keys in the cache"
        assert torch.equal(bits(values), bits(self.values)), "other values in the cache"
        assert torch.equal(out.isnan(), self._out.isnan()), "other rows were written"
        error = (out.double() - self._out).abs().nan_to_num() - ERROR[out.dtype] * self._sizes.nan_to_num()
        assert error.max() <= 1e-6, f"wrong by {float(error.max())} more than rounding explains"


def run(emulator: Emulator, case: Case) -> str:
    """Run the case and hold it to what must come. Return what the emulator found wrong, empty if nothing."""
    made = make(case)
    expected = Expected(made)
    kind = cuda.kind_of(made.step["q"], made.layer.keys)
    work = emulator.workspace(case.kernel[2], len(made.step["seq_lens"]), case.grid)
    call = cuda.call_of(made.step, made.layer, work, case.stages)
    emulator.plan(call, case.seed)
    if wrong := emulator.attend(call, kind, case.grid, case.seed):
        return wrong
    expected.hold(made.step["out"], made.layer.keys, made.layer.values)
    assert not work.counters.any(), "counters are not left as they were"
    return ""


def some_cases(kernels: list[tuple[str, str, int]]) -> list[Case]:
    """A few steps that together have everything."""
    rows = ((1, 1), (64, 1), (200, 3), (0, 0), (65, 1), (129, 2), (17, 1))
    plain = [Case(kernel=kernel, rows=rows, received=frozenset({4}), scales=(1.0, 1.0)) for kernel in kernels]
    first = plain[0]
    return [
        *plain,
        replace(first, window=40, has_sinks=True, moves_output=True, is_hnd=True, grid=7),
        replace(plain[-1], soft_cap=5.0, scales=(0.5, 0.25), block_size=48, grid=1, stages=2),
        replace(first, flat=True, group=16, kv_heads=1, rows=((300, 5), (130, 1)), grid=5, stages=4),
    ]


def read_beyond_the_cache(emulator: Emulator, kernel: tuple[str, str, int]) -> None:
    """Attend with a block table that names a block which is not there."""
    made = make(Case(kernel=kernel, rows=((70, 1),)))
    made.step["block_table"][0, 1] = len(made.layer.keys)
    work = emulator.workspace(kernel[2], len(made.step["seq_lens"]), 1)
    call = cuda.call_of(made.step, made.layer, work, 2)
    emulator.plan(call)
    emulator.attend(call, cuda.kind_of(made.step["q"], made.layer.keys), 1, 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    emulated = Emulator(Path(sys.argv[1]))
    compiled = [(m, c, int(d)) for m, c, d in (name.split(",") for name in sys.argv[3:])]
    if sys.argv[2] == "beyond":
        read_beyond_the_cache(emulated, compiled[0])
    else:
        for each in some_cases(compiled):
            assert not (wrong := run(emulated, each)), wrong
    print("ok")
