"""A pause for NIXL's progress thread between polls: as it comes, it takes a whole core, idle or not.

Every NIXL agent has a thread that polls its transports. How long it sleeps in between (`pthrDelay`, microseconds) is a
setting of the agent, which NIXL's Python API fixes to 0 (nixl 1.5.1, nixl_cu13/_api.py). Measured on two cores: one
core per agent at 0, 2 % of a core at 1000 (docs/vllm-notes.md). To do without the thread is no way out: connections are
then made only while vLLM happens to poll, and were seen to hang for half a minute.
Removal condition: NIXL's nixl_agent_config takes the delay.
"""

import functools
import sys
from typing import Any

PAUSE_US = 1000
"""The pause, in microseconds."""


@functools.cache
def pause_progress_thread() -> None:
    """Make every NIXL agent that is created from now on pause for PAUSE_US between polls. Idempotent."""
    from vllm.distributed.nixl_utils import NixlWrapper

    if NixlWrapper is None:
        return  # vLLM says what is missing when it needs it
    bindings = sys.modules[NixlWrapper.__module__].nixlBind

    class PausingConfig(bindings.nixlAgentConfig):  # type: ignore[name-defined]
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, PAUSE_US if name == "pthrDelay" else value)

    bindings.nixlAgentConfig = PausingConfig
