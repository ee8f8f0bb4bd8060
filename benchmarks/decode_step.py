"""One decode step at equal batch: all attention local, against half of the rows in an attention executor.

    python benchmarks/decode_step.py [--quick] [--json FILE]

The layers' GEMMs on weights that do not fit the cache, vLLM's own attention operators, this plugin's split, step plan
and data plane, and a real attention executor process on the second core, whose prefill engine is idle. No engine around
it: scheduling, sampling and HTTP are the same either way. Both kinds of step take turns.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import report


def options() -> object:
    parser = report.parser(__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16, help="requests in the batch")
    parser.add_argument("--context", type=int, default=512, help="tokens of context of each")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--heads", type=int, default=16, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=16)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--cores", default="0,1", help="cores of the decode worker and of the executor")
    return parser.parse_args()


ARGS = options()
DECODE_CORE, EXECUTOR_CORE = (int(core) for core in ARGS.cores.split(","))
# Before torch is imported: its thread pools look at both when they start.
os.sched_setaffinity(0, {DECODE_CORE})
os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402
from torch.nn.functional import linear, silu  # noqa: E402
from vllm.platforms import current_platform  # noqa: E402
from vllm.utils.math_utils import cdiv  # noqa: E402
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa  # noqa: E402

from vllm_adrenaline.attention.kernels import CpuAttention  # noqa: E402
from vllm_adrenaline.attention.spec import ExecutorSpec  # noqa: E402
from vllm_adrenaline.control.kv_export import KVExport, LayerSpec  # noqa: E402
from vllm_adrenaline.control.messages import PROTOCOL, Identity  # noqa: E402
from vllm_adrenaline.decode.link import Link  # noqa: E402
from vllm_adrenaline.decode.remote_attention import RemoteAttention, StepPlan  # noqa: E402
from vllm_adrenaline.kv import space  # noqa: E402
from vllm_adrenaline.kv.memory import map_kv  # noqa: E402
from vllm_adrenaline.placement.patience import Patience  # noqa: E402
from vllm_adrenaline.prefill.executor_pool import ExecutorProcess  # noqa: E402
from vllm_adrenaline.system import memory_file  # noqa: E402
from vllm_adrenaline.transport.shape import Shape  # noqa: E402
from vllm_adrenaline.transport.shm import ShmSteps  # noqa: E402
from vllm_adrenaline.transport.split import split_rows  # noqa: E402

BLOCK = 128
DTYPE = torch.bfloat16
NAMES = [f"layer{index}" for index in range(ARGS.layers)]
WIDTH = cdiv(ARGS.context, BLOCK)


class KV:
    """One engine's KV cache: a memory file as the prefill worker's, filled with noise."""

    def __init__(self, cpu: int) -> None:
        self.blocks = ARGS.rows * WIDTH + 1
        shape = [self.blocks, ARGS.kv_heads, 2 * BLOCK, ARGS.head_size]
        strides = [ARGS.kv_heads * 2 * BLOCK * ARGS.head_size, 2 * BLOCK * ARGS.head_size, ARGS.head_size, 1]
        layer_bytes = self.blocks * strides[0] * DTYPE.itemsize
        size = layer_bytes * ARGS.layers
        self.file = fd = memory_file.create("kv", size)
        noise = torch.randn(1 << 20).to(DTYPE)
        flat = torch.frombuffer(map_kv(fd, size), dtype=DTYPE)
        for begin in range(0, len(flat), len(noise)):
            part = flat[begin : begin + len(noise)]
            part.copy_(noise[: len(part)])
        isa = _get_attn_isa(DTYPE, BLOCK, ARGS.head_size)
        layers = [LayerSpec(name, index * layer_bytes, ARGS.head_size**-0.5) for index, name in enumerate(NAMES)]
        self.export = KVExport(size, shape, strides, "bfloat16", isa, ARGS.heads, layers, [cpu], 1)


class LocalLink(Link):
    """A link to an executor without a prefill engine to ask for it."""

    def _find(self) -> str:
        return self.address


class Model:
    """The GEMMs of a Llama's decode step, and the attention between them."""

    def __init__(self, local: CpuAttention, remote: RemoteAttention) -> None:
        self.local, self.remote = local, remote
        q, kv = ARGS.heads * ARGS.head_size, ARGS.kv_heads * ARGS.head_size
        hidden, inter = ARGS.hidden, ARGS.intermediate
        shapes = [(q + 2 * kv, hidden), (hidden, q), (2 * inter, hidden), (hidden, inter)]
        self.weights = [[torch.randn(shape).to(DTYPE) / 32 for shape in shapes] for _ in range(ARGS.layers)]
        self.split_at = [ARGS.heads, ARGS.kv_heads, ARGS.kv_heads]
        rows = ARGS.rows
        self.lens = torch.full((rows,), ARGS.context, dtype=torch.int32)
        self.starts = torch.arange(rows + 1, dtype=torch.int32)
        self.table = torch.arange(1, rows * WIDTH + 1, dtype=torch.int32).view(rows, WIDTH)
        self.slots = self.table[:, -1].long() * BLOCK + (ARGS.context - 1) % BLOCK
        self.attention_s = self.plan_s = 0.0

    def step(self, offloaded: int) -> float:
        """Return the seconds of one step whose first `offloaded` rows are the executor's."""
        hidden = torch.ones((ARGS.rows, ARGS.hidden), dtype=DTYPE)
        out = torch.empty((ARGS.rows, ARGS.heads, ARGS.head_size), dtype=DTYPE)
        self.attention_s = 0.0
        began = time.perf_counter()
        plan, table, lens, slots = None, self.table, self.lens, self.slots
        if offloaded:
            table = table.clone()
            table[:offloaded] |= space.remote_id(0, 0)
            slots = slots.clone()
            split = split_rows(table, self.starts, lens, slots, [], BLOCK)
            self.remote._split = split
            plan = StepPlan(self.remote, split)
            table, lens = split.local_block_table, split.local_seq_lens
            self.plan_s = time.perf_counter() - began
        schedule = self.local.schedule(self.starts, lens)
        arrays = {"query_start_loc": self.starts, "seq_lens": lens, "block_table": table, "slot_mapping": slots}
        for layer, (qkv_w, out_w, up_w, down_w) in enumerate(self.weights):
            qkv = linear(hidden, qkv_w).view(ARGS.rows, -1, ARGS.head_size)
            query, key, value = qkv.split(self.split_at, dim=1)
            if plan is not None:
                plan.send(layer, query, key, value)
            if plan is None or plan.has_local:
                at = time.perf_counter()
                self.local.layer(layer, {**arrays, "q": query, "k": key, "v": value, "out": out}, schedule)
                self.attention_s += time.perf_counter() - at
            if plan is not None:
                plan.receive(layer, out)
            hidden = hidden + linear(out.view(ARGS.rows, -1), out_w)
            gate, up = linear(hidden, up_w).chunk(2, dim=1)
            hidden = torch.nn.functional.layer_norm(hidden + linear(silu(gate) * up, down_w), (ARGS.hidden,))
        return time.perf_counter() - began


def identity() -> Identity:
    """Return what both sides agree in."""
    text = "benchmark"
    heads = (ARGS.layers, ARGS.heads, ARGS.kv_heads, ARGS.head_size)
    return Identity(PROTOCOL, text, text, text, "bfloat16", "auto", *heads, BLOCK, text, text, True, 1)


def main() -> None:
    torch.set_num_threads(1)
    current_platform.import_kernels()
    repeats = 10 if ARGS.quick else 60
    ours, theirs = KV(DECODE_CORE), KV(EXECUTOR_CORE)
    shape = Shape(ARGS.rows, ARGS.rows, WIDTH, ARGS.heads, ARGS.kv_heads, ARGS.head_size, DTYPE)
    with tempfile.TemporaryDirectory() as folder:
        address = f"ipc://{folder}/executor"
        spec = ExecutorSpec(0, address, identity(), theirs.export, theirs.file, [EXECUTOR_CORE], 1, 60.0)
        executor = ExecutorProcess(spec)
        try:
            executor.wait_ready()
            link = LocalLink(address, identity(), "benchmark", 0, NAMES, shape, 60.0)
            link.attach()
            remote = RemoteAttention(
                [link], ShmSteps(shape), None, NAMES, BLOCK, counts_rows=True, patience=Patience(60.0)
            )
            model = Model(CpuAttention.mapped(ours.export, ours.file, split_kv=True), remote)
            measure(model, repeats)
            link.close()
        finally:
            executor.stop()


def measure(model: Model, repeats: int) -> None:
    """Run both kinds of step in turns and print the result."""
    half = ARGS.rows // 2
    figures: dict[str, list[float]] = {}

    def note(**values: float) -> None:
        for name, value in values.items():
            figures.setdefault(name, []).append(1000 * value)

    for repeat in range(repeats + 3):
        local = model.step(0)
        attention = model.attention_s
        model.remote.take_report()
        offloaded = model.step(half)
        at = time.perf_counter()
        times = model.remote.take_report()
        note_s = time.perf_counter() - at
        if times is None or times.failed:
            raise SystemExit("the executor did not answer")
        if repeat >= 3:  # the first steps touch the memory
            note(step_local=local, attention=attention, step_offloaded=offloaded, local_attention=model.attention_s)
            note(remote_attention=times.remote[0], exposed_wait=times.exposed, plan=model.plan_s, report=note_s)
    ms = {name: report.median(values) for name, values in figures.items()}
    bound = ms["step_local"] - ms["attention"] + ms["attention"] / 2
    result = {
        "step_local_ms": ms["step_local"],
        "step_offloaded_ms": ms["step_offloaded"],
        "exposed_wait_share": ms["exposed_wait"] / ms["step_offloaded"],
        "attention_all_local_ms": ms["attention"],
        "attention_local_half_ms": ms["local_attention"],
        "attention_remote_half_ms": ms["remote_attention"],
        "exposed_wait_ms": ms["exposed_wait"],
        "plan_ms": ms["plan"],
        "times_taken_ms": ms["report"],
        "gemm_and_half_attention_ms": bound,
        "offloaded_over_bound_ratio": ms["step_offloaded"] / bound,
        "rows_count": float(ARGS.rows),
        "context_tokens": float(ARGS.context),
    }
    report.finish(report.table(result), ARGS.json)


if __name__ == "__main__":
    main()
