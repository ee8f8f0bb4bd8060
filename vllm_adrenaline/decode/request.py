"""A request whose prompt's KV cache is with a prefill engine: its states, and the only ways from one to the next.

    arrives ─> CLAIMING ─> WAITING ─> OFFLOADED ─> MIGRATING
                              │                        │
                              └──────> PULLING <───────┘
                                          │
                                       RECEIVED               and from every state: LEFT

What becomes of it when its prefill engine is lost: CLAIMING, WAITING and MIGRATING ones are computed here, OFFLOADED
ones are preempted and recomputed here, what a PULLING one has received is thrown away and recomputed, and a RECEIVED
one goes on, for its KV is here.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from vllm_adrenaline.kv import space
from vllm_adrenaline.placement.batch import Progress
from vllm_adrenaline.system.arithmetic import cdiv

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_adrenaline.control.messages import Welcome
    from vllm_adrenaline.decode.blocks import RemoteBlock, RemotePool
    from vllm_adrenaline.placement.policy import Decision

logger = logging.getLogger("vllm.adrenaline")

STRICT = "ADRENALINE_STRICT"
"""Environment variable under which an illegal transition raises; tests set it."""
READ_BY_NOBODY = "HB:"
"""Sent by NIXL to the prefill engine as the name of what was read. A claimed prompt is not NIXL's any more, so its name
would be an error there; this is a heartbeat for no request, which it takes and forgets."""


class State(Enum):
    """Where the request is on its way."""

    CLAIMING = "claiming"
    """The prefill engine was asked to keep its prompt for us."""
    WAITING = "waiting"
    """Its prompt is kept for us; it is not decided where it decodes."""
    OFFLOADED = "offloaded"
    """Its KV cache stays there, and an attention executor attends."""
    MIGRATING = "migrating"
    """It was offloaded, and waits for local blocks into which its KV can be pulled."""
    PULLING = "pulling"
    """NIXL copies its KV here. What is copied is kept there until that is over."""
    RECEIVED = "received"
    """Its prompt's KV is here; its first step is not scheduled yet."""
    LEFT = "left"
    """Nothing of it is elsewhere: it ended, or is a request like any other."""


NEXT = {
    State.CLAIMING: {State.WAITING, State.LEFT},
    State.WAITING: {State.OFFLOADED, State.PULLING, State.LEFT},
    State.OFFLOADED: {State.MIGRATING, State.LEFT},
    State.MIGRATING: {State.PULLING, State.LEFT},
    State.PULLING: {State.RECEIVED, State.LEFT},
    State.RECEIVED: {State.LEFT},
    State.LEFT: set(),
}


def progress_of(request: Request) -> Progress:
    """Return how far a request of vLLM's is."""
    return Progress(request.num_prompt_tokens, request.num_output_tokens, request.max_tokens)


@dataclass(eq=False)
class RemoteRequest:
    """One of them. `claim`: the prompt's name at the prefill engine. `claimed_at`: when it was asked for (seconds).

    `blocks`: remote blocks that vLLM's books do not have, because it has not allocated yet or because they are pulled.
    `held`: how many remote blocks vLLM's books have. `decision`: why it may take local memory in this step, if it may.
    `waited`: whether it was counted as waiting. `starved_since`: since when it lacks a block to grow into (seconds).
    `is_intact`: whether all that was pulled is known to have arrived.
    """

    request: Request
    pool: RemotePool
    claim: str
    claimed_at: float = 0.0
    state: State = State.CLAIMING
    blocks: list[RemoteBlock] = field(default_factory=list)
    held: int = 0
    decision: Decision | None = None
    waited: bool = False
    starved_since: float | None = None
    is_intact: bool = True

    @property
    def name(self) -> str:
        """The request's id on this engine."""
        return self.request.request_id

    # What admission asks (placement/admission.py, Pending)

    @property
    def executor(self) -> int:
        """Number of the executor beside its prompt."""
        return self.pool.executor

    @property
    def progress(self) -> Progress:
        """How far it is."""
        return progress_of(self.request)

    @property
    def local_only(self) -> bool:
        """Whether a cached prompt is of no use to it."""
        return bool(self.request.skip_reading_prefix_cache)

    def become(self, state: State) -> None:
        """Go on to another state. An illegal way is a mistake of ours: it raises in tests, and is logged otherwise."""
        if state not in NEXT[self.state]:
            message = f"request {self.name} cannot become {state.value}: it is {self.state.value}"
            if STRICT in os.environ:
                raise AssertionError(message)
            logger.error("%s", message)
        self.state = state

    # Everything that is ever written into a request's kv_transfer_params; NIXL acts on them.

    def pull_nothing(self) -> None:
        """NIXL has no business with this request, whatever a client wrote."""
        self.request.kv_transfer_params = None

    def pull(self, peer: Welcome, num_tokens: int, block_size: int, tensor_parallel_size: int) -> None:
        """NIXL is to copy the KV of the first `num_tokens` tokens from `blocks`, once the request has local ones.

        Fields: vllm/distributed/kv_transfer/kv_connector/v1/nixl/pull_scheduler.py of 0.32 (run) and 0.33 (read).
        """
        used = cdiv(num_tokens, block_size)
        self.request.kv_transfer_params = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_engine_id": peer.engine_id,
            "remote_request_id": READ_BY_NOBODY,
            "remote_host": peer.nixl_host,
            "remote_port": peer.nixl_port,
            "remote_block_ids": [[space.index_of(block.block_id) for block in self.blocks[:used]]],
            "tp_size": tensor_parallel_size,
        }
