"""What is the same for every system in all runs of a folder of `adrenaline bench`: dtype, objectives, request counts.

Results under other conditions do not compare, so the folder keeps them, and others are refused there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from vllm_adrenaline.bench.workloads import GOODPUT, RATES
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.system import machine
from vllm_adrenaline.workload.load import Load

OPTIONS = {
    "dtype": "--dtype",
    "most": "--requests",
    "counts": "--quick",
    "ttft_slo_ms": "--ttft-slo-ms",
    "tpot_slo_ms": "--tpot-slo-ms",
    "are_told": "--tell-objectives",
}
"""The options of `adrenaline bench` by the condition that they set."""
BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16")
"""Processors that multiply bfloat16 say one of these (/proc/cpuinfo of x86 and of Arm)."""
ITEM_BYTES = {"bfloat16": 2, "float32": 4}


def default_dtype() -> str:
    """Return what models compute in on this machine: bfloat16 where it has instructions for that.

    Elsewhere bfloat16 takes several times longer than float32, and nobody would serve in it.
    """
    return "bfloat16" if machine.cpu_flags() & set(BFLOAT16) else "float32"


class Conditions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The conditions of a run.

    Attributes:
        dtype: of models and KV cache, one of ITEM_BYTES.
        most: at most so many requests of a workload, 0 for all.
        counts: at most so many of the workload of this name; the smaller number counts.
        ttft_slo_ms, tpot_slo_ms: objectives in milliseconds.
        are_told: whether this plugin's engines on one device know the objectives, and keep their shares by them.
    """

    dtype: str = "bfloat16"
    most: int = 0
    counts: dict[str, int] = {}
    ttft_slo_ms: float = 2000.0
    tpot_slo_ms: float = 40.0
    are_told: bool = False

    @property
    def item_bytes(self) -> int:
        """Return the bytes of a number."""
        return ITEM_BYTES[self.dtype]

    @property
    def flags(self) -> dict[str, list[str]]:
        """Return the flags by which engines know the objectives, by role: first tokens are a matter of prefill."""
        if not self.are_told:
            return {"prefill": [], "decode": []}
        decode = ["--adrenaline-tpot-slo-ms", f"{self.tpot_slo_ms:g}"]
        return {"prefill": ["--adrenaline-ttft-slo-ms", f"{self.ttft_slo_ms:g}", *decode], "decode": decode}

    def count(self, load: Load) -> int:
        """Return how many requests of a workload are sent."""
        return min(load.count, self.counts.get(load.name, load.count), self.most or load.count)

    @property
    def about_ramp(self) -> str:
        """Return in words what goodput is."""
        return (
            f"Highest rate of the ramp ({RATES[0]:g} to {RATES[-1]:.1f} requests a second, in steps of 1.1 x) at which "
            f"{100 * GOODPUT:.0f} % have their first token in {self.ttft_slo_ms:g} ms and a TPOT of at most "
            f"{self.tpot_slo_ms:g} ms"
        )

    def keep(self, folder: Path) -> None:
        """Note these conditions in a folder.

        Raises AdrenalineError if its results were made under others, or by a version that did not note any.
        """
        file = folder / "conditions.json"
        if any((folder / "runs").glob("*.json")):
            try:
                known = msgspec.json.decode(file.read_bytes(), type=Conditions)
            except (FileNotFoundError, msgspec.DecodeError):
                raise AdrenalineError(
                    f"{folder} has results of another version: name another folder with --out"
                ) from None
            if others := _differences(known, self):
                raise AdrenalineError(f"{folder} has results made {others}: name another folder with --out")
        folder.mkdir(parents=True, exist_ok=True)
        file.write_bytes(msgspec.json.format(msgspec.json.encode(self)))


def _differences(known: Conditions, wanted: Conditions) -> str:
    """Return in words what is different, "" if nothing is."""
    before, now = (dict[str, Any](msgspec.structs.asdict(each)) for each in (known, wanted))
    return ", ".join(_in_words(name, value, now[name]) for name, value in before.items() if value != now[name])


def _in_words(name: str, before: Any, now: Any) -> str:
    option = OPTIONS[name]
    if name in ("counts", "are_told"):
        return f"with {option}" if before else f"without {option}"
    return f"with {option} {before} (not {now})"
