"""Round trip of one layer through the data plane, without attention: rows of 32 query heads, 8 KV heads, head size 128.

    python benchmarks/data_plane.py [--quick] [--json FILE]

native: what engines use (csrc/), driven from Python on both ends as they do: from within an operator, for that is how
vLLM calls attention. python: the pure-Python channel before it. channel: the native one driven from C++. floor: a flag
there and back in shared memory, and the bytes by memcpy. All four take turns in one run, the decode worker's end pinned
to the first core and the executor's to the second.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import python_channel
import report

from vllm_adrenaline.kv import space
from vllm_adrenaline.system.statistics import percentile
from vllm_adrenaline.transport.shape import Shape
from vllm_adrenaline.transport.shm import ShmDecodeChannel, ShmExecutorChannel, ShmSteps
from vllm_adrenaline.transport.split import SplitRows, split_rows

ROOT = Path(__file__).parent.parent
HEADS, KV_HEADS, HEAD = 32, 8, 128
LAYERS = 1000
WARM_UP = 100


_body: Callable[..., None]
_operators = torch.library.Library("adrenaline_benchmark", "DEF")
_operators.define("run(Tensor query, Tensor key, Tensor value, Tensor(a!) output) -> ()")


@torch.library.impl(_operators, "run", "CPU")
def _run(*tensors: torch.Tensor) -> None:
    _body(*tensors)


def in_operator(body: Callable[..., None], *tensors: torch.Tensor) -> None:
    """Call `body` with q, k, v and output as vLLM calls attention, from the dispatcher of torch, which holds them.

    That makes a difference: to read a tensor that only Python holds makes a second reference to it, and torch takes
    the interpreter's lock for the first and the last of those (99 instead of 21 ns).
    """
    global _body
    _body = body
    torch.ops.adrenaline_benchmark.run(*tensors)


@contextmanager
def forked(core: int, body: Callable[[], None]) -> Iterator[None]:
    """Run `body` in a child pinned to `core`, killed at the end."""
    pid = os.fork()
    if pid == 0:
        os.sched_setaffinity(0, {core})
        try:
            body()
        finally:
            os._exit(1)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def batch(rows: int) -> SplitRows:
    """Return the split of a batch whose rows are all the first executor's."""
    table = torch.full((rows, 1), space.remote_id(0, 0), dtype=torch.int32)
    starts, lens = torch.arange(rows + 1, dtype=torch.int32), torch.ones(rows, dtype=torch.int32)
    return split_rows(table, starts, lens, torch.zeros(rows, dtype=torch.int64), [], 128)


def python_plan(rows: int) -> python_channel.RowsPlan:
    """Return the same as a plan of the pure-Python channel."""
    return python_channel.RowsPlan(
        tokens=torch.arange(rows),
        query_start_loc=torch.arange(rows + 1, dtype=torch.int32),
        seq_lens=torch.ones(rows, dtype=torch.int32),
        block_table=torch.zeros((rows, 1), dtype=torch.int32),
        slot_mapping=torch.zeros(rows, dtype=torch.int64),
    )


def activations(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q, k, v as views of one projection, as in a model, and an output."""
    qkv = torch.zeros((rows, HEADS + 2 * KV_HEADS, HEAD), dtype=torch.bfloat16)
    query, key, value = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    return query, key, value, torch.zeros((rows, HEADS, HEAD), dtype=torch.bfloat16)


def shape_of(rows: int) -> Shape:
    """Return a channel's shape."""
    return Shape(rows, rows, 1, HEADS, KV_HEADS, HEAD, torch.bfloat16)


def native(rows: int, core: int) -> list[float]:
    """Return microseconds of LAYERS round trips through the channel that engines use."""
    shape = shape_of(rows)
    decode, steps = ShmDecodeChannel(shape), ShmSteps(shape)
    decode.watch(-1, -1, shared_core=False)
    executor = ShmExecutorChannel(decode.fd, shape, decode.epoch, shared_core=False, num_layers=LAYERS, timeout_s=10)

    def serve() -> None:
        next_layer = executor.next_layer
        while executor.next_step() is not None:
            while next_layer() is not None:
                pass

    times = []

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor) -> None:
        clock, send, receive = time.perf_counter_ns, steps.send, steps.receive
        for layer in range(LAYERS):
            begin = clock()
            send(layer, query, key, value)
            failed = receive(layer, output)
            times.append((clock() - begin) / 1000)
            if failed:
                raise SystemExit("the executor did not answer")

    with forked(core, serve):
        steps.begin(batch(rows).handle, {0: decode}, (10.0, 10.0))
        in_operator(attend, *activations(rows))
    decode.close()
    return times[WARM_UP:]


def python(rows: int, core: int) -> list[float]:
    """Return microseconds of LAYERS round trips through the pure-Python channel."""
    shape = shape_of(rows)
    decode = python_channel.ShmDecodeChannel(shape, 10.0, lambda: None)
    executor = python_channel.ShmExecutorChannel(decode.fd, shape)

    def serve() -> None:
        while not executor.has_step:
            pass
        executor.take_step()
        for layer in range(LAYERS):
            executor.wait_layer(layer, 10)
            executor.reply(layer, rows)
        signal.pause()

    query, key, value, output = activations(rows)
    clock, times = time.perf_counter_ns, []
    with forked(core, serve):
        decode.begin(python_plan(rows))
        for layer in range(LAYERS):
            begin = clock()
            decode.send(layer, query, key, value)
            answered = decode.receive(layer, output)
            times.append((clock() - begin) / 1000)
            if not answered:
                raise SystemExit("the executor did not answer")
    decode.close()
    return times[WARM_UP:]


def compiled(rows: int, program: Path, cores: tuple[int, int]) -> dict[str, list[float]]:
    """Return microseconds of the C++ program's round trips, by name."""
    command = [str(program), str(rows), str(LAYERS), str(cores[0]), str(cores[1])]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    times: dict[str, list[float]] = {"floor": [], "channel": []}
    for name, value in (line.split() for line in lines):
        times[name].append(int(value) / 1000)
    return {name: values[WARM_UP:] for name, values in times.items()}


def main() -> None:
    parser = report.parser(__doc__.splitlines()[0])
    parser.add_argument("--cores", default="0,1", help="cores of the decode worker's end and of the executor's")
    args = parser.parse_args()
    first, second = (int(core) for core in args.cores.split(","))
    rows_counts = [1, 4, 16, 64] if args.quick else [1, 2, 4, 8, 16, 32, 64]
    repeats = 5 if args.quick else 21
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {first})
    times: dict[str, dict[int, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "bench_channel"
        source = ROOT / "csrc" / "tests" / "bench_channel.cpp"
        subprocess.run(["g++", "-std=c++17", "-O3", str(source), "-o", str(program)], check=True)
        for repeat in range(repeats):
            print(f"repeat {repeat + 1} of {repeats}", file=sys.stderr)
            for rows in rows_counts:
                found = {
                    **compiled(rows, program, (first, second)),
                    "native": native(rows, second),
                    "python": python(rows, second),
                }
                for name, values in found.items():
                    times.setdefault(name, {}).setdefault(rows, []).extend(values)
    print(f"{'rows':>5} {'':9}{'floor':>9}{'channel':>9}{'native':>9}{'python':>9}   us a layer; native/floor")
    result: dict[str, object] = {}
    for label, share in (("p50", 0.5), ("p99", 0.99)):
        for name in ("floor", "channel", "native", "python"):
            result[f"{name}_us_{label}"] = {
                str(rows): round(percentile(values, share), 3) for rows, values in times[name].items()
            }
        for rows in rows_counts:
            cells = [percentile(times[name][rows], share) for name in ("floor", "channel", "native", "python")]
            print(f"{rows:>5} {label:9}" + "".join(f"{cell:9.2f}" for cell in cells) + f"   {cells[2] / cells[0]:.2f}")
    report.finish(result, args.json)


if __name__ == "__main__":
    main()
