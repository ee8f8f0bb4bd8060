"""Where a request's decode attention runs: one pure function from observed state to a placement.

Today a fixed share. The load-aware bounds of the paper (section 1.5 of the Adrenaline paper: OB_mem, OB_comp, C1, C2)
take the same place: more fields in `Observed`, the same function.
"""

from enum import Enum

import msgspec


class Placement(Enum):
    """Where the KV cache of a request lives, and so where its attention runs."""

    LOCAL = "local"
    OFFLOADED = "offloaded"


class Observed(msgspec.Struct, frozen=True):
    """What the decision may depend on.

    `offload_ratio`: the share to offload, 0 to 1. `decided`, `offloaded`: requests placed so far, and how many of them
    were offloaded. `executor_ready`: the executor beside the prefill engine that holds this prompt answers.
    """

    offload_ratio: float
    decided: int
    offloaded: int
    executor_ready: bool


def place(observed: Observed) -> Placement:
    """Return the placement that keeps the share of offloaded requests as close below `offload_ratio` as it can be.

    Deterministic: with ratio 0.5 every second request is offloaded, whatever the load.
    """
    if not observed.executor_ready:
        return Placement.LOCAL
    quota = observed.offload_ratio * (observed.decided + 1)
    return Placement.OFFLOADED if observed.offloaded + 1 <= quota + 1e-9 else Placement.LOCAL
