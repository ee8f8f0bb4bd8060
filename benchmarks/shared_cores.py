"""How OpenMP threads should wait when two engines share cores: a decode-like step alone, and beside prompts.

    python benchmarks/shared_cores.py

Two processes with two threads each multiply matrices on the same two cores: one as few rows as a decode step has, with
a short pause between steps, the other as many as a prompt has, without a pause.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

SECONDS = 5.0
WIDTH, LAYERS = 512, 12
POLICIES: dict[str, dict[str, str]] = {
    "default (threads spin)": {},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
}


def multiply(rows: int, pause_s: float) -> None:
    """Print the median milliseconds of a step, and how many there were."""
    import torch

    weights = [torch.randn((3 + i % 2) * WIDTH, WIDTH) for i in range(8)]
    x = torch.randn(rows, WIDTH)
    times: list[float] = []
    end = time.monotonic() + SECONDS
    while time.monotonic() < end or not times:
        began = time.perf_counter()
        for _ in range(LAYERS):
            for weight in weights:
                torch.nn.functional.linear(x, weight)
        times.append(time.perf_counter() - began)
        time.sleep(pause_s)
    print(f"{1000 * statistics.median(times):.0f} {len(times)}")


def measured(policy: dict[str, str], jobs: list[tuple[int, float]]) -> list[str]:
    """Return what each of the jobs printed, run at once."""
    environment = os.environ | policy | {"OMP_NUM_THREADS": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(rows), str(pause)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for rows, pause in jobs
    ]
    return [process.communicate()[0].split()[0] for process in started]


def main() -> None:
    decode, prompt = (8, 0.002), (512, 0.0)
    print(
        "| threads wait by | decode step alone, ms | beside prompts, ms | a prompt beside it, ms |\n|---|---|---|---|"
    )
    for name, policy in POLICIES.items():
        (alone,), (beside, prompts) = measured(policy, [decode]), measured(policy, [decode, prompt])
        print(f"| {name} | {alone} | {beside} | {prompts} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        multiply(int(sys.argv[1]), float(sys.argv[2]))
    else:
        main()
