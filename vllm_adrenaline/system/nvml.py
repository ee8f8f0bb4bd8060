"""A GPU as NVML sees it: how busy it is, and how much of its memory is used. On CUDA alone.

NVML's figures are of the whole GPU, whoever uses it. They come through the package nvidia-ml-py, which is imported when
a GPU is opened. Written after NVML's reference and the source of pynvml; not run on a GPU.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

from vllm_adrenaline.errors import AdrenalineError

logger = logging.getLogger("vllm.adrenaline")

PERIOD_S = 0.5
"""How long what was read is good. NVML itself looks back over 1/6 s to 1 s."""
GPU, INSTANCE = "GPU-", "MIG-"
"""How NVML's names begin: of a whole GPU, and of an instance of one that MIG divides."""


class Gpu:
    """One GPU, or one instance of a GPU that MIG divides.

    Attributes:
        name: what NVML calls it, e.g. GPU-1b5cf9bc-...
    """

    def __init__(self, uuid: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Open it, once for the life of the process.

        Args:
            uuid: as CUDA tells it, without NVML's prefix. An index would not do: CUDA_VISIBLE_DEVICES and
                CUDA_DEVICE_ORDER number CUDA's devices, and NVML follows neither.
            clock: seconds, monotonic.

        Raises:
            AdrenalineError: NVML is not there, does not know the GPU, or knows it as one that MIG divides.
        """
        try:
            import pynvml
        except ImportError:
            raise AdrenalineError("there is no pynvml here (pip install nvidia-ml-py)") from None
        self._nvml: Any = pynvml
        self._clock, self._next = clock, -math.inf
        self._told: set[str] = set()  # figures that there were
        self._refused: set[str] = set()  # questions whose refusal was said
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise AdrenalineError(f"NVML does not start ({error})") from None
        self.name, self._handle = self._find(uuid)
        # CUDA may name the whole GPU where this process has an instance. What others do in theirs is not asked for.
        if self.name.startswith(GPU) and self._is_divided():
            raise AdrenalineError(f"MIG divides {self.name}, and CUDA does not tell which instance is used here")

    def _find(self, uuid: str) -> tuple[str, Any]:
        refusals = []
        for name in (f"{GPU}{uuid}", f"{INSTANCE}{uuid}"):
            try:
                return name, self._nvml.nvmlDeviceGetHandleByUUID(name)
            except self._nvml.NVMLError as error:
                refusals.append(f"{name}: {error}")
        raise AdrenalineError(f"NVML does not give the GPU that CUDA uses here ({', '.join(refusals)})")

    def _is_divided(self) -> bool:
        try:
            current, _pending = self._nvml.nvmlDeviceGetMigMode(self._handle)
        except self._nvml.NVMLError:  # most GPUs know no MIG
            return False
        return bool(current == self._nvml.NVML_DEVICE_MIG_ENABLE)

    def read(self) -> dict[str, float]:
        """Return what NVML tells now; nothing if it was asked within the last half second.

        Returns:
            `busy_share`: of NVML's last period, with a kernel on the GPU. `memory_busy_share`: with its memory being
            read or written. `memory_used_bytes`: by all processes and the driver. What NVML does not tell is left out.
            What it has told before is NaN then, so that nobody takes the last value for the present one.
        """
        now = self._clock()
        if now < self._next:
            return {}
        self._next = now + PERIOD_S
        found = self._ask("utilization", self._utilization) | self._ask("memory", self._memory)
        lost = self._told - found.keys()
        self._told |= found.keys()
        return found | dict.fromkeys(lost, math.nan)

    def _ask(self, what: str, question: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Return the answer, or nothing. It is asked again next time, for some errors pass; they are logged once."""
        try:
            return question()
        except self._nvml.NVMLError as error:
            if what not in self._refused:
                self._refused.add(what)
                logger.warning("NVML does not tell the %s of %s: %s", what, self.name, error)
            return {}

    def _utilization(self) -> dict[str, float]:
        percent = self._nvml.nvmlDeviceGetUtilizationRates(self._handle)
        return {"busy_share": percent.gpu / 100, "memory_busy_share": percent.memory / 100}

    def _memory(self) -> dict[str, float]:
        return {"memory_used_bytes": float(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)}
