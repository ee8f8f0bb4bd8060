"""What it costs that the executor is on another host: a layer's round trip, and serving. Needs root for the latter.

    python benchmarks/hosts.py [--quick] [--serve] [--json FILE]

Layers: rows of 32 query heads, 8 KV heads, head size 128, bfloat16, without attention, both ends pinned to a core each.
`shared` is shared memory, `group` a process group over loopback, then the same with 0.2 and 1 ms of delay in what the
decode worker receives. Serving (--serve): the same load on two engines on this host, then on two hosts made of
namespaces, with no delay and with these. Placement decides by load, and what it decided is counted.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
import fleet as one_host  # noqa: E402
import report  # noqa: E402
from data_plane import activations, batch, shape_of  # noqa: E402
from data_plane import native as shared  # noqa: E402

from tests.engine import hosts  # noqa: E402
from vllm_adrenaline.bench import figures  # noqa: E402
from vllm_adrenaline.compat.worker_cores import CORES_ENV  # noqa: E402
from vllm_adrenaline.control import keys  # noqa: E402
from vllm_adrenaline.engine.setup import PEERS_START_TOO  # noqa: E402
from vllm_adrenaline.launch.engine_metrics import EngineMetrics  # noqa: E402
from vllm_adrenaline.proxy.server import ServerThread, bind, url_of  # noqa: E402
from vllm_adrenaline.system.statistics import percentile  # noqa: E402
from vllm_adrenaline.transport.collective import CollectiveDecodeChannel, CollectiveExecutorChannel  # noqa: E402
from vllm_adrenaline.transport.pair import Pair  # noqa: E402
from vllm_adrenaline.transport.steps import Steps  # noqa: E402
from vllm_adrenaline.workload import client  # noqa: E402
from vllm_adrenaline.workload.load import Load, from_trace  # noqa: E402
from vllm_adrenaline.workload.tiny_model import make_model  # noqa: E402

DELAYS_MS = (0.0, 0.2, 1.0)
LAYERS, WARM_UP = 200, 20
LOAD = Load("full", "more than the decode engine's memory holds", 48, from_trace(3.0, 0.5, (64, 800), 0.5, (32, 160)))
PREFILL_BLOCKS, DECODE_BLOCKS = 200, 40


def executor(line: Connection, rows: int, core: int) -> None:
    """The executor's process."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    epoch, contact = line.recv()
    channel = CollectiveExecutorChannel(shape_of(rows), "lo", epoch, LAYERS, 30.0)
    line.send(channel.contact)
    channel.connect(contact)
    while channel.next_step() is not None:
        while channel.next_layer() is not None:
            pass


def group(rows: int, core: int, delay_ms: float) -> list[float]:
    """Return microseconds of round trips over a process group."""
    shape, times, receive = shape_of(rows), [], Pair.receive
    line, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=executor, args=(theirs, rows, core), daemon=True)
    process.start()
    decode = CollectiveDecodeChannel(shape, "lo", LAYERS)
    line.send((decode.epoch, decode.contact))
    decode.connect(line.recv())

    def later(expected: Any, timeout_s: float) -> None:
        receive(expected, timeout_s)
        time.sleep(delay_ms / 1000)

    if delay_ms:
        Pair.receive = staticmethod(later)
    steps, (query, key, value, output) = Steps(shape), activations(rows)
    try:
        steps.begin(batch(rows).handle, {0: decode}, (10.0, 10.0))
        for layer in range(LAYERS):
            begin = time.perf_counter_ns()
            steps.send(layer, query, key, value)
            if steps.receive(layer, output):
                raise SystemExit("the executor did not answer")
            times.append((time.perf_counter_ns() - begin) / 1000)
    finally:
        Pair.receive = staticmethod(receive)
        decode.close()
        process.join()
    return times[WARM_UP:]


def layers(quick: bool) -> dict[str, dict[str, float]]:
    """Return microseconds of a layer by transport, then by rows and percentile."""
    os.sched_setaffinity(0, {0})
    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {}
    for rows in (1, 16, 64):
        runs = {"shared": lambda rows=rows: shared(rows, 1)}
        for delay in DELAYS_MS:
            runs[f"group, {delay:g} ms"] = lambda rows=rows, delay=delay: group(rows, 1, delay)
        for name, run in runs.items():
            times = [each for _ in range(1 if quick else 5) for each in run()]
            of = {f"{rows} rows, p{p}": round(percentile(times, p / 100), 1) for p in (50, 99)}
            found.setdefault(name, {}).update(of)
            print(f"{name:16}{rows:4} rows {' '.join(f'{each:9.1f}' for each in of.values())} us (p50, p99)")
    return found


class TwoHosts:
    """A prefill engine on one host, a decode engine on another, whose transport receives `delay_ms` late."""

    def __init__(self, stack: ExitStack, folder: Path, delay_ms: float) -> None:
        self.prefill, self.decode = stack.enter_context(hosts.two_hosts())
        public = {role: keys.generate(folder / role) for role in ("prefill", "decode")}
        (folder / "allow").write_text(public["decode"])
        model = str(make_model(**one_host.MODEL, vocab=one_host.VOCABULARY, max_position=2048))
        common = ["--model", model, "--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "2048"]
        common += ["--served-model-name", "m", "--no-enable-prefix-caching", "--plugin", "adrenaline"]
        common += ["--adrenaline-interface", "data0"]
        address = f"{self.prefill.data}:7000"
        own = {
            "prefill": ["--adrenaline-listen", f"tcp://{address}", "--adrenaline-allow", str(folder / "allow")],
            "decode": ["--adrenaline-peers", f"tcp://{public['prefill']}@{address}"],
        }
        path = os.pathsep.join([str(Path(__file__).parent / "knob"), os.environ.get("PYTHONPATH", "")])
        env = {"PYTHONPATH": path, "ADRENALINE_DELAY_MS": str(delay_ms), PEERS_START_TOO: "1"}
        urls, machines = [], {"prefill": self.prefill, "decode": self.decode}
        for (role, host), blocks, core in zip(machines.items(), (PREFILL_BLOCKS, DECODE_BLOCKS), "10", strict=True):
            flags = [*common, "--adrenaline-role", role, "--adrenaline-key", str(folder / role), *own[role]]
            flags += ["--kv-cache-memory-bytes", str(blocks * one_host.BLOCK_BYTES)]
            urls.append(stack.enter_context(host.engine(flags, {**env, CORES_ENV: core}, folder / f"{role}.log")))
        for role, host in machines.items():
            host.await_ready(folder / f"{role}.log")
        listener = stack.enter_context(bind("127.0.0.1", 0))
        proxy = ServerThread(listener, urls[:1], urls[1:])
        proxy.start()
        stack.callback(proxy.stop)
        self.url, self.metrics = url_of(listener), EngineMetrics(urls[1])


def serve(delay_ms: float | None, count: int) -> dict[str, Any]:
    """Return throughput, and what placement decided; `delay_ms` is None for both engines on this host."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if delay_ms is None:
            engines = one_host.Fleet(stack, PREFILL_BLOCKS, DECODE_BLOCKS)
            url, metrics = engines.url, engines.decode
        else:
            two = TwoHosts(stack, folder, delay_ms)
            url, metrics = two.url, two.metrics
            client.send(url, "m", one_host.WARM_UP.requests(one_host.VOCABULARY, 0))
        before, crossed = metrics.read().placements(), 0 if delay_ms is None else two.decode.crossed()
        answers = client.send(url, "m", LOAD.requests(one_host.VOCABULARY, 1, count))
        after = metrics.read().placements()
        decided = {
            f"{where} ({why})": int(times - before.get((where, why), 0))
            for (where, why), times in after.items()
            if times > before.get((where, why), 0)
        }
        result = {"output_tok_s": round(figures.of(answers)["output_tok_s"], 1), "decided": decided}
        if delay_ms is not None:
            result["crossed_mib"] = round((two.decode.crossed() - crossed) / 2**20, 1)
        return result


def main() -> None:
    parser = report.parser(__doc__.splitlines()[0])
    parser.add_argument("--serve", action="store_true", help="start engines, too: a minute for each of four starts")
    args = parser.parse_args()
    result: dict[str, Any] = {"layer_us": layers(args.quick)}
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    if args.serve:
        if reason := hosts.why_not():
            raise SystemExit(f"no hosts can be made here: {reason}")
        for delay in (None, *DELAYS_MS):
            name = "one host" if delay is None else f"two hosts, {delay:g} ms"
            found = serve(delay, 16 if args.quick else 0)
            print(f"{name:20}{found['output_tok_s']:9.1f} tok/s  {found['decided']}")
            result[name] = found
    report.finish(result, args.json)


if __name__ == "__main__":
    main()
