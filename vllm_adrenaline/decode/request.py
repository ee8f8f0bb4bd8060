"""A request whose prompt's KV is with a prefill engine: its states, and the only ways from one to the next.

    arrives ─> CLAIMING ─> WAITING ─> OFFLOADED ─> MIGRATING
                              │                        │
                              └──────> PULLING <───────┘
                                          │
                                       RECEIVED               and from every state: LEFT

What becomes of a request when its prefill engine is lost depends on its state:

    CLAIMING, WAITING, MIGRATING    it is computed on this engine
    OFFLOADED, remote               it is preempted, and recomputed on this engine
    OFFLOADED, mapped               it goes on, for its memory is still there; without a block to grow into it is
                                    preempted, and recomputed on this engine
    PULLING                         what it has received is thrown away, and it is recomputed on this engine
    RECEIVED                        it goes on, for its KV is here

When only its attention executor is lost, an OFFLOADED remote one is preempted and recomputed on this engine. The others
do not notice: what they read is with the prefill engine.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from vllm_adrenaline.decode.spans import Spans
from vllm_adrenaline.kv import space
from vllm_adrenaline.placement.batch import Progress
from vllm_adrenaline.placement.policy import Reason
from vllm_adrenaline.system.arithmetic import cdiv

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_adrenaline.control.messages import Welcome
    from vllm_adrenaline.decode.blocks import RemoteBlock, RemotePool
    from vllm_adrenaline.placement.policy import Decision

logger = logging.getLogger("vllm.adrenaline")

STRICT = "ADRENALINE_STRICT"
"""Environment variable. Where it is set, as in tests, an illegal transition raises."""
READ_BY_NOBODY = "HB:"
"""The name of what was read, which NIXL sends to the prefill engine afterwards. A claimed prompt is not NIXL's, so
its own name would be an error there. This one is a heartbeat for no request, which NIXL takes and forgets."""


class State(Enum):
    """The state of a request."""

    CLAIMING = "claiming"
    """The prefill engine was asked to keep its prompt for us, and has not answered."""
    WAITING = "waiting"
    """Its prompt is kept for us. It is not decided yet where it decodes, or it waits for local memory."""
    OFFLOADED = "offloaded"
    """Its KV stays on the prefill engine. It is remote: an attention executor attends; or mapped: this engine does."""
    MIGRATING = "migrating"
    """It was offloaded, and waits for local blocks into which its KV can be pulled."""
    PULLING = "pulling"
    """NIXL copies its KV here. The prefill engine keeps what is copied until that is over."""
    RECEIVED = "received"
    """Its prompt's KV is here; its first step is not scheduled yet."""
    LEFT = "left"
    """Nothing of it is on a prefill engine: it ended, or is a request like any other."""


NEXT = {
    State.CLAIMING: {State.WAITING, State.LEFT},
    State.WAITING: {State.OFFLOADED, State.PULLING, State.LEFT},
    State.OFFLOADED: {State.MIGRATING, State.LEFT},
    State.MIGRATING: {State.PULLING, State.LEFT},
    State.PULLING: {State.RECEIVED, State.LEFT},
    State.RECEIVED: {State.LEFT},
    State.LEFT: set(),
}
"""The states that may follow a state."""


def progress_of(request: Request) -> Progress:
    """Return how far a request of vLLM's is."""
    return Progress(request.num_prompt_tokens, request.num_output_tokens, request.max_tokens)


@dataclass(eq=False)
class RemoteRequest:
    """A request whose prompt's KV is with a prefill engine. Times are in seconds (monotonic).

    Attributes:
        request: vLLM's.
        pool: of the prefill engine.
        claim: the prompt's name there.
        claimed_at: when the claim was asked for.
        unfinished: tokens at the end of its prompt that are not there, once the claim was granted: the prefill engine
            ended it early. They are computed here.
        state: changed by `become` alone.
        blocks: remote blocks that vLLM's books do not have: it has not allocated yet, or they are pulled.
        held: how many remote blocks vLLM's books have.
        decision: why it may take local memory in this step; None if it may not.
        waited: whether it was counted as waiting.
        is_mapped: once it is offloaded, whether this engine attends it.
        starved_since: since when it lacks a block to grow into; None if it lacks none.
        is_intact: False once something that is pulled may not have arrived.
        spans: of the trace that its client began; None if nobody traces it.
    """

    request: Request
    pool: RemotePool
    claim: str
    claimed_at: float = 0.0
    unfinished: int = 0
    state: State = State.CLAIMING
    blocks: list[RemoteBlock] = field(default_factory=list)
    held: int = 0
    decision: Decision | None = None
    waited: bool = False
    is_mapped: bool = False
    starved_since: float | None = None
    is_intact: bool = True
    spans: Spans | None = None

    def __post_init__(self) -> None:
        self.spans = Spans.of(self.request)

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
    def block_pool(self) -> int:
        """The pool of its blocks (kv/space.py), once it is offloaded."""
        return space.mapped_pool(self.executor) if self.is_mapped else space.remote_pool(self.executor)

    @property
    def progress(self) -> Progress:
        """How far it is."""
        return progress_of(self.request)

    @property
    def only_local(self) -> Reason | None:
        """Why it can be nowhere but here; None if it can be elsewhere."""
        if self.request.skip_reading_prefix_cache:  # a cached prompt is of no use to it
            return Reason.NO_CACHE
        return Reason.UNFINISHED if self.unfinished else None

    def become(self, state: State) -> None:
        """Go on to another state.

        An illegal transition is a mistake of ours. It raises AssertionError in tests (STRICT), and is logged otherwise.
        """
        if state not in NEXT[self.state]:
            message = f"request {self.name} cannot become {state.value}: it is {self.state.value}"
            if STRICT in os.environ:
                raise AssertionError(message)
            logger.error("%s", message)
        if self.spans is not None:
            self.spans.change(self, self.state.value, state.value)
        self.state = state

    # Everything that is ever written into a request's kv_transfer_params on this engine. NIXL acts on them.

    @staticmethod
    def take_params(request: Request) -> Any:
        """Return what a client wrote into a request's kv_transfer_params, and leave none of it to NIXL."""
        params, request.kv_transfer_params = request.kv_transfer_params, None
        return params

    def pull_nothing(self) -> None:
        """Have NIXL do nothing for this request."""
        self.request.kv_transfer_params = None

    def pull(self, peer: Welcome, num_tokens: int, block_size: int, tensor_parallel_size: int) -> None:
        """Have NIXL copy the KV of the first `num_tokens` tokens from `blocks`, once the request has local blocks.

        The fields are those of vllm/distributed/kv_transfer/kv_connector/v1/nixl/pull_scheduler.py of 0.32 (run) and
        0.33 (read).

        Args:
            peer: what the prefill engine said of itself.
            num_tokens: how many tokens to copy.
            block_size: tokens of a block.
            tensor_parallel_size: of both engines.
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
