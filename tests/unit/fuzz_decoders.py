"""Every decoder of what others send or write, as a function that takes any bytes: for tools/fuzz.py and test_fuzz.py.

Such a function says in a word what became of the bytes, and raises only where the decoder is at fault.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import torch
import uvicorn
from starlette.datastructures import Headers as ClientHeaders
from uvicorn.server import ServerState

from tests.unit.test_control import HANDLE, IDENTITY
from tests.unit.test_leases import FakePool
from vllm_adrenaline.attention.server import check_plan
from vllm_adrenaline.control import client as client_module
from vllm_adrenaline.control import messages
from vllm_adrenaline.control.client import PrefillClient
from vllm_adrenaline.control.keys import Keys
from vllm_adrenaline.control.server import ControlServer
from vllm_adrenaline.decode import params
from vllm_adrenaline.decode.blocks import RemotePool
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.kv.prompt_hash import prompt_hash
from vllm_adrenaline.kv.stamp import stamped
from vllm_adrenaline.prefill.leases import LeaseManager, Offer
from vllm_adrenaline.prefill.lending import Lending
from vllm_adrenaline.proxy import bodies
from vllm_adrenaline.proxy.apis import APIS
from vllm_adrenaline.proxy.connections import Connections
from vllm_adrenaline.proxy.counts import Counts
from vllm_adrenaline.proxy.errors import Refused
from vllm_adrenaline.proxy.guard import name_of
from vllm_adrenaline.proxy.limits import Limits
from vllm_adrenaline.proxy.upstream import FOR_ENGINES, engine_headers
from vllm_adrenaline.system import memory_file
from vllm_adrenaline.transport.shape import Shape
from vllm_adrenaline.transport.shm import Memory, ShmExecutorChannel

PROMPT = list(range(10, 50))
KEY = b"k" * 32
WELCOME = messages.Welcome("prefill", "127.0.0.1", 5600, 20, ["ipc:///x"], "words", 30.0, "member", "vicinity", KEY)


@dataclass(frozen=True)
class Decoder:
    """What takes bytes, and examples of what it is meant for. `form`: how these are written: msgpack, json or none."""

    take: Callable[[bytes], str]
    seeds: list[bytes]
    form: str = ""


def _words(error: BaseException) -> str:
    """Return what kind of error it is: its text without what was wrong."""
    return re.sub(r"[^a-z ]+", "", re.sub(r"[`'$].*", "", str(error).lower()))[:60]


# Control frames


def control(frame: bytes) -> str:
    """A frame is a message, which is written as it was read, or it is refused as none."""
    try:
        message = messages.decode(frame)
    except msgspec.DecodeError as error:
        return _words(error)
    assert messages.decode(messages.encode(message)) == message
    return type(message).__name__


@dataclass
class _Prefill:
    """A prefill engine's control server without its socket, and the books behind it."""

    pool: FakePool = field(default_factory=FakePool)
    said: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        import threading

        self.leases = LeaseManager(self.pool, 2, 10.0, lambda: 0.0)
        self.control = ControlServer.__new__(ControlServer)
        threading.Thread.__init__(self.control)
        self.control.identity, self.control._engines, self.control._processes = IDENTITY, {}, {}
        self.control.address = "ipc:///prefill"
        self.control._poller = SimpleNamespace(register=lambda *_: None, unregister=lambda *_: None)  # type: ignore[assignment]
        self.control.handler = Lending(
            self.leases,
            threading.RLock(),
            make_welcome=lambda member: msgspec.structs.replace(WELCOME, member=member),
            make_load=messages.Load,
            adjust_share=lambda: None,
            kill_executors=lambda pids: None,
            revoke=lambda engine: None,
        )
        self.leases.join(b"peer")
        kept = self.pool.get_new_blocks(3)
        self.leases.offer("prompt", Offer(kept, 3, b""))


def prefill(frame: bytes) -> str:
    """No message of a decode engine raises in the prefill engine, or makes it lend a block twice."""
    try:
        message = messages.decode(frame)
    except msgspec.DecodeError:
        return "none"
    if isinstance(message, messages.Hello):
        message = msgspec.structs.replace(message, process=b"")  # descriptors of processes are not what is tried
    if isinstance(message, messages.Map):
        return "map"
    played = _Prefill()
    answer = played.control._answer(b"peer", message)
    if isinstance(answer, messages.Message):
        messages.decode(messages.encode(answer))
    assert played.pool.get_num_free_blocks() >= 0
    return f"{type(message).__name__}: {type(answer).__name__}"


@cache
def _client() -> PrefillClient:
    return PrefillClient("ipc:///tmp/nobody", IDENTITY, "decode")


def decode(frame: bytes) -> str:
    """Nothing that a prefill engine says raises in the decode engine, or gives it a block that cannot be."""
    client = _client()
    client.welcome, client._life, client.answers = WELCOME, 0, deque()
    client_module.RETRY_S = 0.0  # it waits for a while when it is refused
    try:
        client._hear(SimpleNamespace(recv_multipart=lambda: [frame]))  # type: ignore[arg-type]
    except AdrenalineError as error:  # the line is made anew (PrefillClient.run)
        return _words(error)
    said = ""
    for _, message in client.take_answers():
        said += type(message).__name__
        pool = RemotePool(0, client)
        pool.asked = 3
        pool._leased = {1}
        try:
            if isinstance(message, messages.Leased):
                pool.add_leased(message.blocks)
            if isinstance(message, messages.Claimed):
                pool.adopt(message.request, message.blocks, len(message.blocks))
        except ValueError as error:
            return f"{said}: {_words(error)}"
        if isinstance(message, messages.Leased | messages.Claimed):
            assert len(set(message.blocks)) == len(message.blocks)
            assert all(0 <= block < WELCOME.num_blocks and block != 1 for block in message.blocks)
    return said


def kv_params(raw: bytes) -> str:
    """Whatever a client writes, a prompt's KV is taken only for that prompt, from a prefill engine of ours."""
    try:
        written = json.loads(raw)
    except (ValueError, RecursionError):
        return "none"
    client = _client()
    client.welcome, client._life = WELCOME, 0
    pool = RemotePool(0, client)
    found = params.find(written, [pool], 1, PROMPT)
    if found.pool is not None and found.refusal is None:
        stamp = written["adrenaline"]
        covered = stamp["num_tokens"]
        assert written["remote_engine_id"] == WELCOME.engine_id
        assert stamp["prompt_hash"] == prompt_hash(PROMPT[:covered]).hex()
        assert covered == len(PROMPT) or not written["do_remote_prefill"]
        return "taken"
    return _words(ValueError(found.refusal))


# Step plans

SHAPE = Shape(4, 8, 3, num_heads=2, num_kv_heads=1, head_size=8, dtype=torch.float32)
NUM_BLOCKS, BLOCK_SIZE, EPOCH, LAYERS = 6, 16, 7, 2
PLAN = ("query_start_loc", "seq_lens", "block_table", "slot_mapping")
SIZES = {"counts": 12, "query_start_loc": 20, "seq_lens": 16, "block_table": 48, "slot_mapping": 64}


@cache
def _executor() -> tuple[Memory, ShmExecutorChannel]:
    from vllm_adrenaline.native.library import library

    fd = memory_file.create("fuzz", library.layout(*SHAPE.sizes)["total"])
    memory = Memory(fd, SHAPE)
    library.DecodeEnd(memory.address, SHAPE.sizes, EPOCH)
    return memory, ShmExecutorChannel(fd, SHAPE, EPOCH, True, LAYERS, 0.001)


@cache
def _plan_parts() -> list[torch.Tensor]:
    memory, _ = _executor()
    return [memory.array(name, (size,), torch.uint8) for name, size in SIZES.items()]


_step = 0


def plan(raw: bytes) -> str:
    """A plan that points outside the KV cache, or that does not fit the channel, is refused; others are attended."""
    from vllm_adrenaline.transport.stamp import stamp

    global _step
    memory, channel = _executor()
    raw = raw[: sum(SIZES.values())].ljust(sum(SIZES.values()), b"\0")
    for part in _plan_parts():
        part.copy_(torch.frombuffer(bytearray(raw[: len(part)]), dtype=torch.uint8))
        raw = raw[len(part) :]
    _step += 1
    memory.array("plan", (1,), torch.int64).fill_(stamp(EPOCH, _step % 60000, 0))
    try:
        found = channel.next_step()
        assert found is not None
        check_plan(found[2], NUM_BLOCKS, BLOCK_SIZE)
    except (RuntimeError, AdrenalineError) as error:
        return _words(error)
    starts, lens, table, slots = (found[2][name].tolist() for name in PLAN)
    assert starts[0] == 0
    for row, length in enumerate(lens):
        assert 0 <= starts[row + 1] - starts[row] <= length
        used = -(-length // BLOCK_SIZE)
        assert used <= SHAPE.max_blocks
        assert all(0 <= block < NUM_BLOCKS for block in table[row][:used])
    assert starts[-1] <= len(slots)
    assert all(-1 <= slot < NUM_BLOCKS * BLOCK_SIZE for slot in slots)
    return f"{found[1]} rows"


def _plan_bytes() -> bytes:
    parts = ([2, 2, 2], [0, 1, 2, 2, 2], [20, 5, 0, 0], [1, 2, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0])
    ints = b"".join(value.to_bytes(4, "little") for part in parts for value in part)
    return ints + b"".join(value.to_bytes(8, "little", signed=True) for value in [35, -1] + 6 * [-1])


# HTTP heads and bodies, key files


def body(raw: bytes) -> str:
    """A body becomes one for each engine, or is refused with a reason, whatever its API."""
    try:
        parsed = bodies.parse(raw)
        fit = 0
        for api in APIS.values():
            fit += bodies.can_disaggregate(api, parsed)
            made = bodies.encode(bodies.for_prefill(api, parsed, "t"))
            try:
                sent = json.loads(made)
            except UnicodeDecodeError:  # what is not looked at goes on as it came
                return "no UTF-8"
            assert not sent["stream"]
            assert {sent[name] for name in api.limits if name in sent} == {1}
            assert sent["kv_transfer_params"]["do_remote_decode"] is True
        return f"fit for {fit}"
    except Refused as error:
        return _words(error)


def prefill_answer(raw: bytes) -> str:
    """A prefill engine's answer says where the prompt is, or it is refused."""
    try:
        found = bodies.params_of(raw)
    except Refused as error:
        return _words(error)
    assert found is None or isinstance(found, dict)
    return f"{type(found).__name__} {bodies.stays(found)}"


class _Loop:
    """An event loop that begins nothing."""

    def call_later(self, *_: Any) -> Any:
        return SimpleNamespace(cancel=lambda: None)

    def create_task(self, coroutine: Any) -> _Loop:
        coroutine.close()
        return self

    def add_done_callback(self, _: Any) -> None:
        pass


class _Transport:
    """A connection; what is written to it is kept."""

    def __init__(self) -> None:
        self.written, self.is_closed = b"", False

    def get_extra_info(self, name: str) -> Any:
        return ("127.0.0.1", 5) if name.endswith("name") else None

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.is_closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.is_closed

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading


async def _app(scope: Any, receive: Any, send: Any) -> None:
    """Never begun."""


@cache
def _http() -> tuple[Limits, Connections, Any, Any]:
    limits = Limits(max_header_bytes=2048)
    config = uvicorn.Config(_app, h11_max_incomplete_event_size=limits.max_header_bytes, log_config=None, ws="none")
    config.load()
    return limits, Connections(limits, Counts()), config, ServerState()


def head(raw: bytes) -> str:
    """What a client sends becomes a request of bounded size, whose headers can go on to engines, or it is refused."""
    limits, connections, config, state = _http()
    protocol = connections.protocol(config=config, server_state=state, app_state={}, _loop=_Loop())
    transport = _Transport()
    protocol.connection_made(transport)  # type: ignore[arg-type]
    step = 1 + len(raw) // 5  # a head comes in pieces
    for begin in range(0, len(raw), step):
        if not transport.is_closed:
            protocol.data_received(raw[begin : begin + step])
    found = protocol.scope
    protocol.connection_lost(None)
    if found is None:
        return transport.written[:12].decode() or "waits"
    headers = [*found["headers"]]
    assert sum(len(name) + len(value) for name, value in headers) <= limits.max_header_bytes + step
    given = ClientHeaders(raw=headers)
    for name, value in engine_headers(given, name_of(given)):
        assert name.lower() in {*FOR_ENGINES, "authorization", "x-request-id"}
        assert not set(value) & set("\r\n\0")
    return f"{found['method'] in ('GET', 'POST')} {found['path'] in ('/v1/completions', '/health')}"


@cache
def _folder() -> Path:
    memory = Path("/dev/shm")  # a million files are written there
    return Path(tempfile.mkdtemp(prefix="adrenaline-fuzz-", dir=memory if memory.is_dir() else None))


def key_file(raw: bytes) -> str:
    """A file is a key, a list is one of keys, or AdrenalineError says which it is not, and not what it holds."""
    is_list = raw[:1] != b"k"
    key, allowed = _folder() / "key", _folder() / "allowed"
    key.write_bytes(b"5" * 64 if is_list else raw[1:])
    key.chmod(0o600)
    allowed.write_bytes(raw[1:] if is_list else b"")
    try:
        keys = Keys.load(str(key), str(allowed))
    except AdrenalineError as error:
        if is_list and len(raw) >= 60 and raw[1:].decode(errors="replace") in str(error):
            raise AssertionError("it tells what the file holds") from error
        return _words(error)
    assert all(len(each) == 32 for each in keys.allowed)
    return f"{min(len(keys.allowed), 4)} keys"


# All of them


def _message_seeds() -> list[bytes]:
    """Return one frame of each message."""
    contact = messages.Contact("127.0.0.1", 5, {"a": b"b"})
    made: list[messages.Message] = [
        messages.Hello(IDENTITY, True, "decode", b"token"),
        WELCOME,
        messages.Refused("no"),
        messages.Claim("prompt"),
        messages.Claimed("prompt", [2, 3], 20, b"0" * 16),
        messages.ClaimRejected("prompt"),
        messages.Drop(["prompt"]),
        messages.Leave(),
        messages.Release(["prompt"], [1]),
        messages.Lease(3),
        messages.Leased([2, 3]),
        messages.KillExecutors([7]),
        messages.Heartbeat(0.1, 1, True, messages.Slack(1.0, 2, 3, 4.0, True)),
        messages.Load(20, 3, 1, 0.5, True),
        messages.Map(IDENTITY, 0, "member", b"token"),
        messages.LetGo("member"),
        messages.Attach(IDENTITY, "decode", 0, messages.MemoryFile(b"token", [0]), 1, 4, 4, 2),
        messages.Attach(IDENTITY, "decode", 0, messages.Group(contact), 1, 4, 4, 2),
        messages.Attach(
            IDENTITY, "decode", 0, messages.GpuMemory(messages.MemoryFile(b"token", [0]), HANDLE), 1, 4, 4, 2
        ),
        messages.Attached(["layer"], 1, [0], contact),
        messages.Attached(["layer"], 1, [0], inbox=HANDLE),
        messages.Revoke("decode", 1),
        messages.Revoked("decode", 1),
    ]
    return [messages.encode(each) for each in made]


def _heads() -> list[bytes]:
    """Return some requests with their headers."""
    fields = (
        b"Host: x\r\nContent-Type: application/json\r\nX-Request-Id: a\r\ntraceparent: 00-1-1-01\r\n"
        b"Authorization: Bearer k\r\nx-api-key: k\r\n"
    )
    return [
        b"POST /v1/completions HTTP/1.1\r\n" + fields + b"Content-Length: 2\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\n" + fields + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: keep-alive\r\nUpgrade: websocket\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /health HTTP/1.0\r\n\r\n",
    ]


def _json(*objects: Any) -> list[bytes]:
    return [json.dumps(each).encode() for each in objects]


def _params_seed() -> dict[str, Any]:
    where = {
        "do_remote_prefill": True,
        "remote_engine_id": WELCOME.engine_id,
        "remote_request_id": "prompt",
        "tp_size": 1,
    }
    return stamped(where, prompt_hash(PROMPT), len(PROMPT), KEY)


def _decoders() -> dict[str, Decoder]:
    frames = _message_seeds()
    part = stamped(_params_seed() | {"do_remote_prefill": False}, prompt_hash(PROMPT[:16]), 16, KEY)
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 5, "n": 1, "stream": True}
    text = {
        "model": "m",
        "prompt": [1, 2],
        "max_tokens": 7,
        "echo": False,
        "vllm_xargs": {"a": 1},
        "prompt_logprobs": 0,
    }
    keys = [b"k" + b"a1" * 32, b"a" + b"a1" * 32 + b" who\n# note\n\n" + b"B2" * 32]
    return {
        "control": Decoder(control, frames, "msgpack"),
        "prefill": Decoder(prefill, frames, "msgpack"),
        "decode": Decoder(decode, frames, "msgpack"),
        "params": Decoder(kv_params, _json(_params_seed(), part), "json"),
        "plan": Decoder(plan, [_plan_bytes()]),
        "body": Decoder(body, _json(chat, text, {"prompt": ["a", "b"]}), "json"),
        "answer": Decoder(
            prefill_answer, _json({"kv_transfer_params": _params_seed()}, {"kv_transfer_params": None}), "json"
        ),
        "head": Decoder(head, _heads()),
        "keys": Decoder(key_file, keys),
    }


decoders = cache(_decoders)
