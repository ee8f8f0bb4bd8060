"""Every message of the control plane, its bounds, and the only place where they are encoded and decoded.

They are msgpack through msgspec: typed, validated while they are decoded, no pickle. A frame that is no valid message
raises `msgspec.DecodeError`. Socket loops count it and go on.
"""

from typing import Annotated

import msgspec

from vllm_adrenaline.control.kv_export import GpuKVExport, KVExport
from vllm_adrenaline.system.device_handle import Handle

PROTOCOL = 13
"""Raised whenever a message or the layout of the shared-memory channel changes; peers must be equal."""

MAX_FRAME = 1 << 20
"""Bytes of the largest control frame a socket accepts."""

MAX_NAME = 512
"""Characters of the longest name. A prompt has the name of its request, which clients may choose."""

MAX_REASON = 4096
"""Characters of the longest reason for a refusal."""

Name = Annotated[str, msgspec.Meta(max_length=MAX_NAME)]
BlockIndex = Annotated[int, msgspec.Meta(ge=0, lt=1 << 24)]
Blocks = Annotated[list[BlockIndex], msgspec.Meta(max_length=1 << 16)]
Names = Annotated[list[Name], msgspec.Meta(max_length=4096)]
MAX_COUNT = 1 << 24
"""The largest number that a message says."""
Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_COUNT)]
Bytes = Annotated[int, msgspec.Meta(ge=0, lt=1 << 50)]
Cpus = Annotated[list[Count], msgspec.Meta(max_length=4096)]
Token = Annotated[bytes, msgspec.Meta(max_length=16)]
"""Under which the sender has deposited descriptors with the receiver (system/descriptors.py); empty for none."""


class Message(msgspec.Struct, frozen=True, tag=True, gc=False):
    """The base of all control messages. The class name is the tag on the wire."""


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
    """Decode to prefill engine: the first message of a connection.

    Attributes:
        identity: what must be equal on both sides.
        borrows: whether the sender will claim and lease. A start-up check does not, nor does a worker that asks where
            its executor listens.
        engine: names this life of the decode engine, as its workers do in Attach.
        process: the pidfd of the process whose end is the end of the decode engine (its engine core). Empty until the
            sender knows that the receiver is on the same host; it says hello again then.
    """

    identity: Identity
    borrows: bool
    engine: Name = ""
    process: Token = b""


class Welcome(Message, frozen=True):
    """Prefill to decode engine: we fit.

    Attributes:
        engine_id: names this life of the prefill engine.
        nixl_host, nixl_port: its NIXL side channel.
        num_blocks: blocks of its KV cache.
        executors: where its attention executors listen, by rank; empty for one that does not serve yet. An engine
            without executors names none.
        executor_share: in words, what its executors run on. Profiles of decode engines are kept by it.
        lease_seconds: a decode engine that is silent for so long loses its claims and leases. One whose workers have
            this engine's KV cache mapped does not, for it could still write into them.
        vicinity: equal where descriptors can be passed to this engine and got from it (control/addresses.py). Elsewhere
            no memory of it can be mapped, and its end cannot be seen.
        member: names what the decode engine has here, from this hello on until it is parted with. Empty for one that
            does not borrow.
        key: with which this life of the engine signs what it says of prompts (kv/stamp.py). Empty for one that does not
            borrow.
    """

    engine_id: Name
    nixl_host: Name
    nixl_port: Count
    num_blocks: Count
    executors: Names
    executor_share: Name
    lease_seconds: Annotated[float, msgspec.Meta(gt=0, le=1e6)]
    member: Name = ""
    vicinity: Name = ""
    key: Annotated[bytes, msgspec.Meta(max_length=64)] = b""


class Refused(Message, frozen=True):
    """The answer to a Hello, an Attach or any message of an unknown sender: no, and why.

    Where the two sides do not fit, the reason names both.
    """

    reason: Annotated[str, msgspec.Meta(max_length=MAX_REASON)]


class Claim(Message, frozen=True):
    """Decode to prefill engine: keep the KV of this finished prompt for me until I release it."""

    request: Name


class Claimed(Message, frozen=True):
    """Prefill to decode engine: the claim is granted. Says the prompt's blocks in order, its tokens, and their hash."""

    request: Name
    blocks: Blocks
    num_tokens: Count
    prompt_hash: bytes


class ClaimRejected(Message, frozen=True):
    """Prefill to decode engine: the prompt of this request cannot be claimed here, or not any more."""

    request: Name


class Drop(Message, frozen=True):
    """Decode to prefill engine: nobody will claim or read these finished prompts. Claimed ones stay as they are."""

    requests: Names


class Leave(Message, frozen=True):
    """Decode to prefill engine: I end now. All that I have claimed or leased is yours again."""


class Release(Message, frozen=True):
    """Decode to prefill engine: these claims and these leased blocks are no longer needed."""

    requests: Names
    blocks: Blocks


class Lease(Message, frozen=True):
    """Decode to prefill engine: lend me up to `want` free blocks for growing requests."""

    want: Count


class Leased(Message, frozen=True):
    """Prefill to decode engine: the blocks lent. They may be fewer than asked for, or none, when memory is scarce."""

    blocks: Blocks


class KillExecutors(Message, frozen=True):
    """Decode to prefill engine: these attention executor processes of yours failed me, and do not let go. Kill them.

    One that only sleeps would wake up, and write into blocks. I keep mine until it has ended.
    """

    pids: Annotated[list[Count], msgspec.Meta(max_length=1024)]


class Slack(msgspec.Struct, frozen=True):
    """What a decode engine could do of a prefill engine's work beside its own (placement/elastic.py).

    Attributes:
        prompt_rate: tokens of prompts that it could compute in a second; 0: none.
        prompt_backlog: tokens of prompts that it has to compute already.
        prompt_room: tokens of the longest prompt for which it has memory until everybody ends.
        work: how long all its requests take until the last one ends, in seconds.
        is_full: whether requests wait there for memory.
    """

    prompt_rate: Annotated[float, msgspec.Meta(ge=0, le=1e9)] = 0.0
    prompt_backlog: Count = 0
    prompt_room: Count = 0
    work: Annotated[float, msgspec.Meta(ge=0, le=1e9)] = 0.0
    is_full: bool = False


class Heartbeat(Message, frozen=True):
    """Decode to prefill engine: I am alive. A decode engine that stays silent loses its claims and leases.

    Attributes:
        tpot: what my steps took lately, in seconds: the 90th percentile; 0 when there was none.
        waiting: KV blocks of your prompts whose requests wait here to be placed.
        offloads: whether any of your blocks are attended for me, by your executors or by myself.
        slack: what I could do of your work. None: I take nothing over (--adrenaline-elastic is off).
    """

    tpot: Annotated[float, msgspec.Meta(ge=0, le=1e6)] = 0.0
    waiting: Count = 0
    offloads: bool = False
    slack: Slack | None = None


class Load(Message, frozen=True):
    """Prefill to decode engine: the answer to a Heartbeat.

    Attributes:
        total: KV blocks of the prefill engine.
        free: those of them that are free.
        reserve: how many of the free ones are never lent.
        busy: the share of the last second in which it computed prompts.
        recalls: whether its next prompt does not fit into the free blocks.
    """

    total: Count = 0
    free: Count = 0
    reserve: Count = 0
    busy: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    recalls: bool = False


class Map(Message, frozen=True):
    """Decode worker to prefill engine: let me map the KV cache of your worker `rank`.

    Attributes:
        identity: what must be equal on both sides.
        rank: the worker's tensor-parallel rank, which must be the same on both sides.
        member: what the decode engine has there, as in Welcome. Whatever belongs to it is not taken back before this
            worker has ended, or the decode engine says LetGo. Empty: only tell me how large it is and how it is read.
        process: the pidfd of the worker's process.
    """

    identity: Identity
    rank: Count
    member: Name
    process: Token


class SharedWeights(msgspec.Struct, frozen=True):
    """A prefill worker's weights, in a frozen memory file that decode workers may map.

    Attributes:
        size: of the file, in bytes.
        table: where the file says which weight is where, in bytes from its begin (weights/sharing.py).
    """

    size: Bytes
    table: Bytes


class WorkerExport(msgspec.Struct, frozen=True):
    """What a prefill worker tells its engine core of its memory. It is no message of the control plane.

    Attributes:
        kv, weights: as in Mappable.
        descriptors: what the engine core is to offer of it (`offer_of`).
    """

    kv: KVExport | GpuKVExport
    weights: SharedWeights | None
    descriptors: Token


class Mappable(Message, frozen=True):
    """Prefill engine to decode worker: the answer to Map. The memory files themselves are an offer (`offer_of`).

    Attributes:
        kv: the worker's KV cache.
        weights: its weights; None if it does not share them.
    """

    kv: KVExport
    weights: SharedWeights | None = None


class LetGo(Message, frozen=True):
    """Decode to prefill engine: what I had as `member`, before you parted with me, is attended and written no more."""

    member: Name


class MemoryFile(msgspec.Struct, frozen=True, tag=True):
    """A channel in shared memory (transport/shm.py), for two processes on one host.

    Attributes:
        descriptors: the pidfd of the decode worker's process, and the memory file.
        cpus: the cores that the worker may use.
    """

    descriptors: Token
    cpus: Cpus


class Contact(msgspec.Struct, frozen=True):
    """Where one end of a process group listens (transport/pair.py).

    Attributes:
        host, port: of the connection between both ends, should this end be the one that listens.
        values: what the library that connects them has to say to the other end, by its names for that.
    """

    host: Name
    port: Annotated[int, msgspec.Meta(ge=1, lt=1 << 16)]
    values: Annotated[dict[Name, Annotated[bytes, msgspec.Meta(max_length=4096)]], msgspec.Meta(max_length=8)]


class Group(msgspec.Struct, frozen=True, tag=True):
    """A channel over a process group (transport/collective.py), for two processes on two hosts."""

    contact: Contact


class GpuMemory(msgspec.Struct, frozen=True, tag=True):
    """A channel whose layers go through GPU memory, and whose plans go through shared memory (transport/gpu.py).

    Attributes:
        plans: the shared memory.
        inbox: the decode worker's GPU memory, into which the executor stores outputs.
    """

    plans: MemoryFile
    inbox: Handle


class Attach(Message, frozen=True):
    """Decode worker to attention executor: join this channel and serve it.

    Attributes:
        identity: what must be equal on both sides.
        engine: the decode engine's life, as in Hello.
        rank: the worker's tensor-parallel rank, which must be the executor's.
        channel: where the channel is.
        epoch: the life of the channel, 1 to MAX_EPOCH.
        max_rows, max_tokens, max_blocks: what the channel is sized for: rows, tokens, and blocks in a row.
    """

    identity: Identity
    engine: Name
    rank: Count
    channel: MemoryFile | Group | GpuMemory
    epoch: Count
    max_rows: Count
    max_tokens: Count
    max_blocks: Count


class Attached(Message, frozen=True):
    """Attention executor to decode worker: I serve the channel.

    Attributes:
        layers: names of the attention layers, in the order of their numbers.
        pid: the executor's process, as its prefill engine knows it.
        cpus: its cores.
        contact: its end of the process group; None where there is none.
        inbox: its GPU memory, into which the decode worker stores q, k and v; None for a channel that has none.
    """

    layers: Names
    pid: Count
    cpus: Cpus
    contact: Contact | None = None
    inbox: Handle | None = None


class Revoke(Message, frozen=True):
    """Prefill engine, or decode worker, to attention executor: serve this decode engine's channels no more.

    `epoch`: of the one channel that is meant; 0 for all of them.
    """

    engine: Name
    epoch: Count = 0


class Revoked(Message, frozen=True):
    """Attention executor to whoever sent Revoke: from now on nothing is written there for that decode engine."""

    engine: Name
    epoch: Count = 0


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
    | Map
    | Mappable
    | LetGo
    | Attach
    | Attached
    | Revoke
    | Revoked
)


def offer_of(rank: int) -> int:
    """Return under which number a prefill engine offers descriptors of its worker `rank` to those who may map.

    They are the pidfd of its process, the memory file with its KV cache, and that with its weights if it shares them.
    """
    return 1 + rank


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: Message) -> bytes:
    """Return the message as one frame."""
    return _encoder.encode(message)


def decode(frame: bytes) -> AnyMessage:
    """Return the message in `frame`. Raises msgspec.DecodeError, and nothing else, when it is none."""
    try:
        return _decoder.decode(frame)
    except (RecursionError, ValueError) as error:
        # Deep nesting and broken text are no DecodeError of msgspec's; its own are ValueErrors, too.
        raise error if isinstance(error, msgspec.DecodeError) else msgspec.DecodeError(str(error)) from None


def mismatch(ours: Identity, theirs: Identity, our_name: str, their_name: str) -> str | None:
    """Return a sentence that names every field that differs, with both values; None when the two fit."""
    different = [
        f"{field.replace('_', ' ')} is {getattr(ours, field)} on the {our_name} "
        f"and {getattr(theirs, field)} on the {their_name}"
        for field in Identity.__struct_fields__
        if getattr(ours, field) != getattr(theirs, field)
    ]
    return "; ".join(different) or None
