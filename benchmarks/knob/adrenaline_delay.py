"""A vLLM plugin of benchmarks: what a decode worker receives over a process group comes later, by so many milliseconds.

Found through PYTHONPATH; ADRENALINE_DELAY_MS says by how many.
"""

from __future__ import annotations

import os
import time
from typing import Any


def register() -> None:
    """Delay what is received from other hosts."""
    delay_s = float(os.environ.get("ADRENALINE_DELAY_MS", "0")) / 1000
    if not delay_s:
        return
    from vllm_adrenaline.transport.pair import Pair

    receive = Pair.receive

    def later(expected: Any, timeout_s: float) -> None:
        receive(expected, timeout_s)
        time.sleep(delay_s)

    Pair.receive = staticmethod(later)
