"""Every message of the control plane, its bounds, and the only place where they are encoded and decoded.

msgpack through msgspec: typed, validated while decoding, no pickle. A frame that is no valid message raises
`msgspec.DecodeError`; socket loops count it and go on.
"""

from typing import Annotated

import msgspec

PROTOCOL = 6
"""Raised whenever a message or the layout of the shared-memory channel changes; peers must be equal."""

MAX_FRAME = 1 << 20
"""Bytes of the largest control frame a socket accepts."""

MAX_NAME = 512
"""Characters of the longest name; prompts have the names of their requests, which clients may choose."""

MAX_REASON = 4096

Name = Annotated[str, msgspec.Meta(max_length=MAX_NAME)]
BlockIndex = Annotated[int, msgspec.Meta(ge=0, lt=1 << 24)]
Blocks = Annotated[list[BlockIndex], msgspec.Meta(max_length=1 << 16)]
Names = Annotated[list[Name], msgspec.Meta(max_length=4096)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 24)]
Cpus = Annotated[list[Count], msgspec.Meta(max_length=4096)]


class Message(msgspec.Struct, frozen=True, tag=True, gc=False):
    """Base of all control messages; the class name is the tag."""


class Identity(msgspec.Struct, frozen=True):
    """What two engines must have in common before one may attend over the other's KV cache."""

    protocol: int
    vllm: Name
    model: Name
    architecture: Name
    dtype: Name
    kv_cache_dtype: Name
    num_layers: Count
    num_heads: Count
    num_kv_heads: Count
    head_size: Count
    block_size: Count
    kv_layout: Name
    isa: Name
    split_kv: bool
    tensor_parallel_size: Count


class Hello(Message, frozen=True):
    """Decode to prefill engine: the first message of a connection. `borrows` is False for a start-up check.

    `engine` names this life of the decode engine, as its workers do in Attach. `pid` is the process whose end is the
    end of the decode engine (its engine core); 0: the prefill engine cannot see it end.
    """

    identity: Identity
    borrows: bool
    engine: Name = ""
    pid: Count = 0


class Welcome(Message, frozen=True):
    """Prefill to decode engine: we fit. Says which engine life this is, where its executors listen (by rank), and in
    words what share of its device they have. `lease_seconds`: a decode engine that is silent for so long loses what it
    has here."""

    engine_id: Name
    nixl_host: Name
    nixl_port: Count
    num_blocks: Count
    executors: Names
    executor_share: Name
    lease_seconds: Annotated[float, msgspec.Meta(gt=0, le=1e6)]


class Refused(Message, frozen=True):
    """We do not fit, and why, naming both sides."""

    reason: Annotated[str, msgspec.Meta(max_length=MAX_REASON)]


class Claim(Message, frozen=True):
    """Decode to prefill engine: keep the prompt KV of this finished prefill for me until I release it."""

    request: Name


class Claimed(Message, frozen=True):
    """The prompt KV is yours: its blocks in order, how many tokens are in them, and the hash of those tokens."""

    request: Name
    blocks: Blocks
    num_tokens: Count
    prompt_hash: bytes


class ClaimRejected(Message, frozen=True):
    """The prompt KV of this request is not held here (any more)."""

    request: Name


class Drop(Message, frozen=True):
    """Decode to prefill engine: nobody will claim or read these finished prompts. Claimed ones are not touched."""

    requests: Names


class Leave(Message, frozen=True):
    """Decode to prefill engine: I end now. Everything I have is yours again."""


class Release(Message, frozen=True):
    """Decode to prefill engine: these claims and these leased blocks are no longer needed."""

    requests: Names
    blocks: Blocks


class Lease(Message, frozen=True):
    """Decode to prefill engine: lend me up to `want` free blocks for growing requests."""

    want: Count


class Leased(Message, frozen=True):
    """The blocks lent; fewer than asked for (even none) when the prefill engine needs its memory itself."""

    blocks: Blocks


class KillExecutors(Message, frozen=True):
    """Decode to prefill engine: these attention executor processes of yours failed us. Kill them before you reuse any
    block: one that only slept would wake up and write into a block that is somebody else's by then."""

    pids: Annotated[list[Count], msgspec.Meta(max_length=1024)]


class Heartbeat(Message, frozen=True):
    """Decode to prefill engine: I am alive. `tpot`: what my steps took lately (seconds, the 90th percentile; 0: none).
    `waiting`: KV blocks of your prompts that wait here to be placed. `offloads`: whether any of your blocks is attended
    by your executors for me. A decode engine that stays silent loses its claims and leases."""

    tpot: Annotated[float, msgspec.Meta(ge=0, le=1e6)] = 0.0
    waiting: Count = 0
    offloads: bool = False


class Load(Message, frozen=True):
    """The answer to a beat. In blocks: all there are, how many are free, and how many of those are never lent. `busy`:
    share of the last second in which prompts were computed. `recalls`: prompts wait for memory."""

    total: Count = 0
    free: Count = 0
    reserve: Count = 0
    busy: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    recalls: bool = False


class Attach(Message, frozen=True):
    """Decode worker to attention executor: map this channel (an open memfd of process `pid`) and serve it.

    `engine`: the decode engine's life, as in Hello."""

    identity: Identity
    engine: Name
    rank: Count
    pid: Count
    fd: Count
    epoch: Count
    cpus: Cpus
    max_rows: Count
    max_tokens: Count
    max_blocks: Count


class Attached(Message, frozen=True):
    """The channel is mapped and served by process `pid` on `cpus`; `layers` names the attention layers in the order of
    their numbers."""

    layers: Names
    pid: Count
    cpus: Cpus


class Revoke(Message, frozen=True):
    """Prefill engine to attention executor: serve no channel of this decode engine any more."""

    engine: Name


class Revoked(Message, frozen=True):
    """Attention executor to prefill engine: nothing is written for that decode engine from now on."""

    engine: Name


AnyMessage = (
    Hello
    | Welcome
    | Refused
    | Claim
    | Claimed
    | ClaimRejected
    | Drop
    | Leave
    | Release
    | Lease
    | Leased
    | KillExecutors
    | Heartbeat
    | Load
    | Attach
    | Attached
    | Revoke
    | Revoked
)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: Message) -> bytes:
    """Return the message as one frame."""
    return _encoder.encode(message)


def decode(frame: bytes) -> AnyMessage:
    """Return the message in `frame`; raises msgspec.DecodeError, and nothing else, when it is none."""
    try:
        return _decoder.decode(frame)
    except (RecursionError, ValueError) as error:
        # Deep nesting and broken text are no DecodeError of msgspec's; its own are ValueErrors, too.
        raise error if isinstance(error, msgspec.DecodeError) else msgspec.DecodeError(str(error)) from None


def mismatch(ours: Identity, theirs: Identity, our_name: str, their_name: str) -> str | None:
    """Return one sentence that names every differing field with both values, or None when the two fit."""
    different = [
        f"{field.replace('_', ' ')} is {getattr(ours, field)} on the {our_name} "
        f"and {getattr(theirs, field)} on the {their_name}"
        for field in Identity.__struct_fields__
        if getattr(ours, field) != getattr(theirs, field)
    ]
    return "; ".join(different) or None
