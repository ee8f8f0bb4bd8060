"""How an executor's share of its device is enforced here: chosen once, at start-up."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from vllm_adrenaline.colocation import green, mps
from vllm_adrenaline.errors import AdrenalineError


class Mechanism(Enum):
    """The ways there are; the value is what log and metrics say."""

    PRIORITY = "priorities and core sets"
    MPS = "CUDA MPS"
    GREEN_CONTEXT = "a green context"


def choose(device: str, env: Mapping[str, str], cuda: Any = None, ask: mps.Ask = mps.ask_daemon) -> Mechanism:
    """Return the mechanism for a device type ("cpu", "cuda"); raises AdrenalineError when a GPU offers none.

    MPS limits both sides and comes first; a green context limits the executor alone, and needs no daemon.
    """
    if device == "cpu":
        return Mechanism.PRIORITY
    try:
        mps.preflight(env, ask)
        return Mechanism.MPS
    except AdrenalineError as error:
        if green.is_available(cuda):
            return Mechanism.GREEN_CONTEXT
        raise AdrenalineError(f"no way to share this GPU: {error}; and this torch has no green contexts") from None
