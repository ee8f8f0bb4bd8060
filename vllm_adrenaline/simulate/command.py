"""`adrenaline simulate`: its options and its table."""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from vllm_adrenaline.config import ratio_of
from vllm_adrenaline.engine import profile
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.simulate.row import Model
from vllm_adrenaline.simulate.run import Result, Simulation
from vllm_adrenaline.simulate.setup import Setup
from vllm_adrenaline.workload import trace

DESCRIPTION = """\
Run requests over many prefill and decode engines in simulated time, placed by the same code that places real ones.
Costs come from profiles, which engines measure and keep when they start (an `auto` decode engine and its prefill
engine). Several offload ratios are compared in one table.
"""


MOVED = "  handed over  stays"
"""Columns of a run with elastic work."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("--profile", type=Path, metavar="FILE", help="profile of a decode engine (default: the newest one kept)")
    add("--prefill-profile", type=Path, metavar="FILE", help="profile of a prefill engine (default: the newest kept)")
    add("--model", default="", metavar="TEXT", help="take kept profiles of models with this in their name only")
    add("--trace", type=Path, metavar="CSV", help="columns TIMESTAMP, ContextTokens, GeneratedTokens (default: random)")
    add("--requests", type=int, default=1000, metavar="N", help="how many requests (default: %(default)s)")
    add("--first", type=int, default=0, metavar="N", help="skip so many requests of the trace (default: %(default)s)")
    add("--rate", type=float, default=0.0, metavar="R", help="requests a second (default: the trace's own; random: 1)")
    for what in ("prompt", "output"):
        add(f"--{what}-scale", type=float, default=1.0, metavar="X", help=f"multiply {what} lengths (default: 1)")
        add(f"--max-{what}", type=int, default=1 << 20, metavar="TOKENS", help=f"longest {what} (default: no limit)")
    for kind, none in (("prefill", "; 0: decode engines compute prompts themselves, as vLLM's do"), ("decode", "")):
        add(f"--{kind}", type=int, default=1, metavar="N", help=f"{kind} engines (default: %(default)s{none})")
        add(f"--{kind}-blocks", type=int, default=1000, metavar="N", help="KV blocks of each (default: %(default)s)")
    add("--block-size", type=int, default=128, metavar="TOKENS", help="tokens in a KV block (default: %(default)s)")
    add("--max-rows", type=int, default=256, metavar="N", help="largest batch (default: %(default)s)")
    add("--offload-ratio", default="0,auto", metavar="R[,R...]", help="auto or shares, 0 to 1 (default: %(default)s)")
    add("--pool", choices=["remote", "mapped", "both"], default="remote", help="as --adrenaline-pool")
    add("--rule", choices=["or", "and", "c1", "c2"], default="or", help="as --adrenaline-offload-rule")
    add("--tpot-slo-ms", type=float, default=0.0, metavar="MS", help="as --adrenaline-tpot-slo-ms (default: none)")
    add("--ttft-slo-ms", type=float, default=0.0, metavar="MS", help="as --adrenaline-ttft-slo-ms (default: none)")
    add("--elastic", choices=["off", "prompts", "decodes", "both"], default="off", help="as --adrenaline-elastic")
    add("--overhead-ms", type=float, default=3.0, metavar="MS", help="of the engine, each step (default: %(default)s)")
    add("--row-overhead-ms", type=float, default=0.0, metavar="MS", help="of its API, each row (default: %(default)s)")
    add("--pull-us", type=float, default=2.0, metavar="US", help="moving a token's KV takes (default: %(default)s)")
    add("--isolated", action="store_true", help="executors have cores of their own, and slow no prefill engine down")
    add("--seed", type=int, default=0, help="of random requests (default: %(default)s)")
    add("--json", action="store_true", help="print one JSON object as the last line, of the last ratio")


def newest(role: str, model: str) -> profile.Profile:
    """Return the newest profile of a role, of a model with `model` in its name; raises AdrenalineError for none."""
    for path in sorted(profile.folder().glob(f"{role}-*.json"), key=lambda path: -path.stat().st_mtime):
        with contextlib.suppress(AdrenalineError):  # kept by another version
            if model in (found := profile.load(path)).key.get("model", ""):
                return found
    raise AdrenalineError(
        f"no profile of a {role} engine in {profile.folder()}: engines write them when they start; or name a file"
    )


def model_of(options: argparse.Namespace) -> Model:
    """Return what things cost, from the profiles."""
    files = {"decode": options.profile, "prefill": options.prefill_profile}
    found = {role: profile.load(file) if file else newest(role, options.model) for role, file in files.items()}
    costs, prefill = found["decode"].costs, found["prefill"].prefill
    if costs is None or not prefill:
        raise AdrenalineError("--profile must be of a decode engine, and --prefill-profile of a prefill engine")
    executors = costs.remote or [costs.local]  # an engine that maps all has measured none
    remote, link = (_by_turns(each, options.prefill) for each in (executors, costs.link))
    costs = msgspec.structs.replace(costs, remote=remote, link=link)
    overheads = (options.overhead_ms / 1000, options.row_overhead_ms / 1000)
    return Model(
        costs,
        prefill,
        *overheads,
        options.pull_us / 1e6,
        shared=not options.isolated,
        prefill_costs=found["prefill"].costs or msgspec.structs.replace(costs, remote=[]),
    )


def _by_turns(costs: Sequence[float], count: int) -> list[float]:
    """Return the costs of `count` executors, which are those of a profile by turns; none if it has none."""
    return [costs[i % len(costs)] for i in range(count)] if costs else []


def arrivals_of(options: argparse.Namespace) -> list[trace.Arrival]:
    """Return the requests."""
    scale = trace.Scale(
        options.prompt_scale, options.output_scale, options.max_prompt, options.max_output, options.rate
    )
    if options.trace is None:
        return trace.poisson(options.requests, scale, options.seed)
    return trace.read(options.trace, options.requests, scale, options.first)


def run(options: argparse.Namespace) -> int:
    """Simulate every ratio and print a table."""
    model, arrivals = model_of(options), arrivals_of(options)
    largest = max(arrival.prompt + arrival.output for arrival in arrivals)
    blocks = min(options.decode_blocks, options.prefill_blocks) if options.prefill else options.decode_blocks
    if options.pool == "both" and (options.tpot_slo_ms or options.ttft_slo_ms):
        raise AdrenalineError(
            "with --pool both, objectives move the executors' share, which is not simulated: use --pool mapped"
        )
    if largest > blocks * options.block_size:
        raise AdrenalineError(f"a request of {largest} tokens fits into no engine: more blocks, or shorter requests")
    print(
        "ratio  tok/s    TTFT p50/p90 s    TPOT p50/p90 ms  rows  offloaded  mapped  preempted  P busy  executor busy"
        f"{MOVED if options.elastic != 'off' else ''}"
    )
    for ratio in options.offload_ratio.split(","):
        began = time.monotonic()
        result = Simulation(_setup(options, model, ratio), arrivals).run()
        moved = f"  {result.handed_over:11}  {result.stays:5}" if options.elastic != "off" else ""
        print(_line(ratio, result) + moved, f"  ({time.monotonic() - began:.1f} s)", flush=True)
    if options.json:
        print(msgspec.json.encode(result).decode())
    return 0


def _setup(options: argparse.Namespace, model: Model, ratio: str) -> Setup:
    share = ratio_of("--offload-ratio", ratio)
    return Setup(
        model,
        options.prefill,
        options.decode,
        options.prefill_blocks,
        options.decode_blocks,
        options.block_size,
        options.max_rows,
        options.pool,
        share,
        options.rule,
        options.tpot_slo_ms / 1000 or None,
        options.ttft_slo_ms / 1000 or None,
        options.elastic,
    )


def _line(ratio: str, r: Result) -> str:
    ttft = f"{r.ttft_p50_ms / 1000:.2f}/{r.ttft_p90_ms / 1000:.2f}"
    tpot = f"{r.tpot_p50_ms:.1f}/{r.tpot_p90_ms:.1f}"
    busy = f"{100 * r.prefill_busy_share:5.0f} %  {100 * r.executor_busy_share:11.0f} %"
    counts = f"{r.mean_rows:5.1f} {r.offloaded:10}  {r.mapped:6}  {r.preemptions:9}"
    return f"{ratio:5} {r.throughput_tok_s:7.1f}  {ttft:>15}  {tpot:>16}  {counts}  {busy}"
