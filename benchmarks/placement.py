"""Fixed offload ratios against `auto`, on real engines: throughput, TTFT and TPOT under three loads.

    python benchmarks/placement.py [--quick] [--json FILE] [--policies 0,0.5,auto] [--loads saturated,light]

A decode engine on the first core with little KV memory, a prefill engine and its attention executor on the second.
All policies use the same two engines, in turns (benchmarks/knob changes the ratio between runs). The loads are slices
of a real trace (vllm_adrenaline/workload/data), lengths scaled to the model: `saturated` fills the decode engine's KV
memory, `prefill` keeps the prefill engine busy, `light` leaves both idle most of the time.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import fleet
import report

from vllm_adrenaline.bench.figures import seconds_by_rows
from vllm_adrenaline.simulate import command
from vllm_adrenaline.simulate.row import Model
from vllm_adrenaline.simulate.run import Simulation
from vllm_adrenaline.simulate.setup import Setup
from vllm_adrenaline.workload.load import Load, from_trace
from vllm_adrenaline.workload.trace import Arrival

Runs = dict[str, dict[str, list[dict[str, Any]]]]
"""Figures of every run, by load and policy."""
POLICIES = ("0", "0.3", "0.5", "0.7", "0.9", "1", "auto")
LOADS = {
    "saturated": Load("saturated", "", 80, from_trace(12.0, 0.3, (96, 512), 1.0, (64, 192))),
    "prefill": Load("prefill", "", 32, from_trace(2.4, 0.8, (128, 1024), 0.15, (4, 32), first=50)),
    "light": Load("light", "", 12, from_trace(0.5, 0.3, (64, 512), 0.3, (16, 64), first=100)),
}
QUICK = {"saturated": 48, "prefill": 16, "light": 6}


def calibrated(found: Runs, loads: dict[str, Load], args: Any) -> Model:
    """Return what things cost here: the profiles that the engines made when they started, and what those cannot know.

    That is taken from runs with ratio 0: the time that engine, API and client add to a step and to each of its rows,
    from the time between tokens in `saturated`; and how much slower prompts are beside all of them, from `prefill`.
    """
    decode, prefill = (command.newest(role, "12x512") for role in ("decode", "prefill"))
    assert decode.costs is not None
    costs = decode.costs
    load = loads["saturated"]
    context = statistics.mean(len(r.prompt) + r.tokens / 2 for r in load.requests(fleet.VOCABULARY, 0))
    seen = seconds_by_rows(found["saturated"]["0"][0]["answers"])
    around = {rows: took - costs.other(rows) - costs.local * rows * context for rows, took in seen.items()}
    per_row, base = statistics.linear_regression(list(around), list(around.values()))
    if per_row < 0:
        per_row, base = 0.0, statistics.mean(around.values())
    slower = 1.0
    for _ in range(4):
        prompts = [(tokens, seconds * slower) for tokens, seconds in prefill.prefill]
        model = Model(costs, prompts, max(base, 0.0), per_row, pull=2e-6)
        said = simulated(model, loads["prefill"], "0", len(found["prefill"]["0"]), args)
        slower *= said / report.median([run["output_tok_s"] for run in found["prefill"]["0"]])
    print(f"\nsimulated with {1000 * base:.1f} ms a step and {1000 * per_row:.2f} ms a row around it,")
    print(f"prompts {slower:.2f} times as long as in the profile")
    return model


def simulated(model: Model, load: Load, policy: str, repeats: int, args: Any) -> float:
    """Return the throughput that the simulator says, tokens a second."""
    said = []
    for seed in range(repeats):
        arrivals = [Arrival(r.at, len(r.prompt), r.tokens) for r in load.requests(fleet.VOCABULARY, seed)]
        ratio = None if policy == "auto" else float(policy)
        # One block of each engine is vLLM's null block.
        blocks = {"prefill_blocks": args.prefill_blocks - 1, "decode_blocks": args.decode_blocks - 1}
        said.append(Simulation(Setup(model, ratio=ratio, **blocks), arrivals).run().throughput_tok_s)
    return report.median(said)


def simulate(found: Runs, loads: list[Load], policies: Sequence[str], args: Any) -> dict[str, Any]:
    """Return what the simulator says of the same runs, and print it beside what was measured."""
    model = calibrated(found, {load.name: load for load in loads}, args)
    print("| load | policy | measured, tok/s | simulated | ratio |\n|---|---|---|---|---|")
    result: dict[str, Any] = {"throughput_tok_s": {}, "simulated_over_measured": {}}
    for load in loads:
        for policy in policies:
            runs = found[load.name][policy]
            measured = report.median([run["output_tok_s"] for run in runs])
            said = simulated(model, load, policy, len(runs), args)
            result["throughput_tok_s"].setdefault(load.name, {})[policy] = round(said, 2)
            result["simulated_over_measured"].setdefault(load.name, {})[policy] = round(said / measured, 4)
            print(f"| {load.name} | {policy} | {measured:.1f} | {said:.1f} | {said / measured:.3f} |")
    return result


def main() -> None:
    parser = report.parser(__doc__.splitlines()[0], quick="one repeat of shorter loads with three ratios and auto")
    parser.add_argument("--policies", default="", help="comma separated; default: all")
    parser.add_argument("--loads", default=",".join(LOADS), help="comma separated")
    parser.add_argument("--repeats", type=int, default=0, help="interleaved repeats; 0: 3, or 1 with --quick")
    parser.add_argument("--decode-blocks", type=int, default=24, help="KV blocks of 128 tokens of the decode engine")
    parser.add_argument("--prefill-blocks", type=int, default=72, help="the same of the prefill engine")
    parser.add_argument("--svg", type=Path, default=None, help="draw throughput over the ratio under `saturated` there")
    parser.add_argument("--logs", type=Path, default=None, help="folder for the engines' logs")
    args = parser.parse_args()
    policies = args.policies.split(",") if args.policies else ["0", "0.5", "0.7", "auto"] if args.quick else POLICIES
    repeats = args.repeats or (1 if args.quick else 3)
    loads = [LOADS[name] for name in args.loads.split(",")]
    if args.quick:
        loads = [dataclasses.replace(load, count=QUICK[load.name]) for load in loads]
    found: Runs = defaultdict(lambda: defaultdict(list))
    with ExitStack() as stack:
        engines = fleet.Fleet(stack, args.prefill_blocks, args.decode_blocks, logs=args.logs)
        for repeat in range(repeats):
            for load in loads:
                for policy in policies if repeat % 2 == 0 else policies[::-1]:
                    figures = engines.run(load.requests(fleet.VOCABULARY, repeat), policy)
                    found[load.name][policy].append(figures)
                    shown = {k: round(v, 1) for k, v in figures.items() if k != "answers"}
                    print(f"{repeat} {load.name} {policy}: {shown}", file=sys.stderr, flush=True)
    result: dict[str, Any] = {"throughput_tok_s": {}, "auto_over_best_fixed": {}, "ttft_ms_p50": {}, "tpot_ms_p50": {}}
    print("\n| load | policy | tok/s | TTFT p50 / p90 | TPOT p50 / p90 / p99 | offloaded | preempted | exposed |")
    print("|---|---|---|---|---|---|---|---|")
    for load in loads:
        rows = found[load.name]
        for name, figure in {"throughput_tok_s": "output_tok_s", "ttft_ms_p50": "", "tpot_ms_p50": ""}.items():
            medians = {policy: report.median([f[figure or name] for f in rows[policy]]) for policy in policies}
            result[name][load.name] = {policy: round(value, 2) for policy, value in medians.items()}
        speeds = result["throughput_tok_s"][load.name]
        if "auto" in speeds and len(speeds) > 1:
            best = max(speed for policy, speed in speeds.items() if policy != "auto")
            result["auto_over_best_fixed"][load.name] = round(speeds["auto"] / best, 4)
        for policy in policies:
            m = {k: report.median([f[k] for f in rows[policy]]) for k in rows[policy][0] if k != "answers"}
            print(
                f"| {load.name} | {policy} | {m['output_tok_s']:.1f} | {m['ttft_ms_p50']:.0f} / "
                f"{m['ttft_ms_p90']:.0f} | {m['tpot_ms_p50']:.1f} / {m['tpot_ms_p90']:.1f} / {m['tpot_ms_p99']:.1f} | "
                f"{m['offloaded']:.0f} of {load.count} | {m['preemptions']:.0f} | {m['exposed_s']:.1f} s |"
            )
    if args.svg and "saturated" in found:
        speeds = result["throughput_tok_s"]["saturated"]
        fixed = {float(policy): speed for policy, speed in speeds.items() if policy != "auto"}
        args.svg.write_text(
            report.curve("output tokens a second, decode memory saturated", fixed, speeds["auto"], "auto")
        )
    if "0" in policies and {"saturated", "prefill"} <= found.keys():
        result["simulated"] = simulate(found, loads, policies, args)
    report.finish(result, args.json)


if __name__ == "__main__":
    main()
