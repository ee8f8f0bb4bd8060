"""The command `adrenaline bench`: its options, and what it prints and writes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vllm_adrenaline.errors import AdrenalineError

DESCRIPTION = """\
Compare this plugin with vLLM's own disaggregation (and with aggregated vLLM) on this machine: the same requests, model,
cores and KV memory; all systems run side by side and work in turns. Small models with random weights; nothing is
downloaded. Results are kept as they come, so that a run that was stopped goes on where it was; report.json, report.md
and report.html are written to the folder.
"""
QUICK_LOADS, QUICK_SYSTEMS, QUICK_COUNTS = "reasoning,light", "vllm_pd,adrenaline_auto", {"reasoning": 20, "light": 5}
LONGEST_SLO_MS = 1e6
"""The longest objective that an engine takes for the TPOT (config.py)."""
FULL_SYSTEMS = "vllm_pd,vllm_one,vllm_two,adrenaline_0.5,adrenaline_auto"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("--quick", action="store_true", help="two systems, two workloads, one model, one repeat: under 6 minutes")
    add("--systems", default="", metavar="A,B", help=f"default: {FULL_SYSTEMS}; also adrenaline_RATIO")
    add("--workloads", default="", metavar="A,B", help="default: all, of gqa some; ramp is the search for goodput")
    add("--models", default="", metavar="A,B", help="mha (multi-head) and gqa (grouped-query); default: mha,gqa")
    add("--repeats", type=int, default=0, metavar="N", help="default: 2, or 1 with --quick")
    add("--requests", type=int, default=0, metavar="N", help="at most N of each workload (default: all of it)")
    add("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16 if this processor multiplies it")
    add("--ttft-slo-ms", type=float, default=2000.0, metavar="MS", help="objective of goodput (default: %(default)g)")
    add("--tpot-slo-ms", type=float, default=40.0, metavar="MS", help="objective of goodput (default: %(default)g)")
    add("--tell-objectives", action="store_true", help="systems on one device keep their shares by these objectives")
    add("--out", type=Path, default=Path("adrenaline-bench"), metavar="FOLDER", help="default: %(default)s")
    add("--json", action="store_true", help="print the report as one JSON object, as the last line")


def run(options: argparse.Namespace) -> int:
    """Run what is missing of the grid, write the report and return 0. Raises AdrenalineError."""
    from vllm_adrenaline.bench import conditions, page, report, systems, workloads
    from vllm_adrenaline.bench.run import Plan, budget, ceiling_file
    from vllm_adrenaline.bench.run import run as run_plan
    from vllm_adrenaline.system import machine
    from vllm_adrenaline.system.terminal import say

    for name in ("requests", "repeats"):
        if getattr(options, name) < 0:
            raise AdrenalineError(f"--{name} {getattr(options, name)}: it cannot be less than 0")
    for name in ("ttft_slo_ms", "tpot_slo_ms"):
        if not 0 < getattr(options, name) <= LONGEST_SLO_MS:
            raise AdrenalineError(f"--{name.replace('_', '-')} must be more than 0 and at most {LONGEST_SLO_MS:g}")
    quick = options.quick
    given = conditions.Conditions(
        options.dtype or conditions.default_dtype(),
        options.requests,
        QUICK_COUNTS if quick else {},
        options.ttft_slo_ms,
        options.tpot_slo_ms,
        options.tell_objectives,
    )
    plan = Plan(
        models=(options.models or ("mha" if quick else "mha,gqa")).split(","),
        loads=[each for each in (options.workloads or (QUICK_LOADS if quick else "")).split(",") if each],
        systems=(options.systems or (QUICK_SYSTEMS if quick else FULL_SYSTEMS)).split(","),
        repeats=options.repeats or (1 if quick else 2),
        conditions=given,
    )
    for kind, names, known in (("workload", plan.loads, workloads.LOADS), ("model", plan.models, workloads.MODELS)):
        for name in names:
            if name not in known and (kind, name) != ("workload", workloads.RAMP):
                raise AdrenalineError(f"{name} is no {kind}; there are {', '.join(known)}")
    for name in plan.systems:
        say(f"{name}: {systems.about(name)}")
    for name in plan.models:
        b, about = budget(name, given), workloads.MODELS[name].about
        sides = {"decode": (b.decode_bytes, b.decode_cores), "prefill": (b.prefill_bytes, b.prefill_cores)}
        shares = [f"{kv / 2**20:.0f} MiB of KV on cores {cores} for {side}" for side, (kv, cores) in sides.items()]
        say(f"model {name}: {about}, {given.dtype}; {', '.join(shares)}; aggregated engines have the sum of both")
    results = run_plan(plan, options.out, say)
    ceilings = {name: json.loads(ceiling_file(options.out, name).read_text()) for name in plan.models}
    found = report.summary(results, machine.description(), ceilings, given)
    markdown = report.markdown(found)
    for name, text in {
        "report.json": json.dumps(found, indent=1) + "\n",
        "report.md": markdown,
        "report.html": page.page(found),
    }.items():
        (options.out / name).write_text(text)
    print(markdown)
    say(f"written: {options.out / 'report.html'}, report.md and report.json")
    if options.json:
        print(json.dumps(found))
    return 0
