"""A vLLM plugin of benchmarks and tests: a decode engine's offload ratio is in a file, to change it between runs.

Engines take a minute to start, so what is to be compared in turns shares one. Found through PYTHONPATH;
ADRENALINE_KNOB names the file: `auto` or a ratio.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def register() -> None:
    """Let admission look at the file whenever it decides."""
    file = os.environ.get("ADRENALINE_KNOB")
    if not file:
        return
    from vllm_adrenaline.placement.admission import Admission

    admit = Admission.admit

    def with_knob(self: Admission, *args: Any) -> Any:
        text = Path(file).read_text().strip()
        ratio = None if text == "auto" else float(text)
        if ratio != self.ratio:
            self.set_ratio(ratio)
        return admit(self, *args)

    Admission.admit = with_knob
