"""A real decode or prefill scheduler without an engine: its worker and the other side are played by the test.

The test speaks as vLLM's engine core does (arrive, schedule, update, abort) and as the peer does, in control messages
over a real socket. Nothing else of the plugin is touched.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import zmq

from vllm_adrenaline.control import addresses, messages, sockets
from vllm_adrenaline.kv.stamp import TICKET
from vllm_adrenaline.prefill import executor_pool
from vllm_adrenaline.prefill.executor_pool import ExecutorPool
from vllm_adrenaline.system import descriptors
from vllm_adrenaline.workload.tiny_model import make_model

M = TypeVar("M", bound=messages.Message)
BLOCK, LOCAL_BLOCKS, REMOTE_BLOCKS = 16, 65, 1000
ENGINE = "prefill-engine"
KEY = b"of the scripted prefill engine"
PROMPT = list(range(10, 10 + 3 * BLOCK + 5))
KEEP = {"do_remote_decode": True}


class Prefill:
    """A prefill engine as decode engines see it: answers hello and beats by itself, all else as the test says."""

    def __init__(self, address: str) -> None:
        self._socket, self.address = sockets.bind(address)
        self.welcome: messages.Welcome | None = None
        self.refusal: str | None = None
        self.lease_seconds = 60.0
        self.answers_beats = True
        self.load = messages.Load(total=REMOTE_BLOCKS, free=REMOTE_BLOCKS - 100, reserve=0)
        self.inbox: queue.Queue[messages.AnyMessage] = queue.Queue()
        self.heard: list[messages.AnyMessage] = []
        self.decode = b""
        self.beat = messages.Heartbeat()
        self.greetings = 0
        self.key = KEY
        self._passing: descriptors.Server | None = None
        self._outbox: queue.Queue[list[bytes]] = queue.Queue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.is_set():
            while not self._outbox.empty():
                self._socket.send_multipart([self.decode, *self._outbox.get()])
            if not self._socket.poll(5):
                continue
            name, frame = self._socket.recv_multipart()
            message = messages.decode(frame)
            if isinstance(message, messages.Hello):
                if message.borrows and not message.process:  # else it says whom to watch, and was greeted before
                    self.decode = name
                    self.refusal = None
                    self.greetings += 1
                member = f"member {self.greetings}" if message.borrows else ""
                self._socket.send_multipart([name, messages.encode(self._welcome(member))])
            elif isinstance(message, messages.Heartbeat):
                self.beat = message
                if self.refusal is not None:
                    self._socket.send_multipart([name, messages.encode(messages.Refused(self.refusal))])
                elif self.answers_beats:
                    self._socket.send_multipart([name, messages.encode(self.load)])
            else:
                self.heard.append(message)
                self.inbox.put(message)
        sockets.unbind(self._socket, self.address)

    def _welcome(self, member: str) -> messages.Welcome:
        lease = self.lease_seconds
        return messages.Welcome(
            ENGINE,
            "127.0.0.1",
            5600,
            REMOTE_BLOCKS,
            ["ipc:///x"],
            "one thread",
            lease,
            member,
            addresses.vicinity(self.address),
            self.key,
        )

    def be(self, pid: int) -> None:
        """Be the process `pid` from now on. Without it none is seen."""
        self._passing = descriptors.Server(addresses.for_descriptors(self.address))
        folder = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY)
        self._passing.offers[descriptors.PROCESS] = [os.pidfd_open(pid), folder]
        self._passing.start()

    def say(self, *said: messages.Message) -> None:
        """Send messages to the decode engine, in one go."""
        for message in said:
            self._outbox.put([messages.encode(message)])

    def say_bytes(self, frame: bytes) -> None:
        """Send what need not be a message."""
        self._outbox.put([frame])

    def expect(self, kind: type[M], seconds: float = 5.0) -> M:
        """Return the next message from the decode engine, which is of this kind."""
        message = self.inbox.get(timeout=seconds)
        assert isinstance(message, kind), f"{message} came, and not a {kind.__name__}"
        return message

    def silent(self, seconds: float = 0.1) -> bool:
        """Say whether the decode engine says nothing for so long, but for its beats."""
        time.sleep(seconds)
        return self.inbox.empty()

    def forget(self) -> None:
        """Refuse the decode engine, as if it had been silent for too long; return when it knows us again."""
        greetings, self.refusal = self.greetings, "unknown decode engine"
        eventually(lambda: self.greetings > greetings)
        self.beat = None
        eventually(lambda: self.beat is not None)  # it beats only when it has heard our welcome

    def stop(self) -> None:
        """End."""
        self._stopping.set()
        self._thread.join()
        if self._passing is not None:
            self._passing.stop()


def eventually(condition: Callable[[], object], seconds: float = 5.0) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.002)


class Engine:
    """A scheduler, and what its worker would answer: token 7 for every request whose prompt is done."""

    def __init__(self, scheduler: type[Any], config: Any, kv_cache_config: Any) -> None:
        from vllm.v1.structured_output import StructuredOutputManager

        self.scheduler = scheduler(
            vllm_config=config,
            kv_cache_config=kv_cache_config,
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
            hash_block_size=BLOCK,
            include_finished_set=False,
            log_stats=True,
        )
        self.free = self.free_blocks
        self.made = 0
        self._counts: dict[str, float] = {}

    @property
    def free_blocks(self) -> int:
        """How many local blocks are free."""
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def arrive(
        self, prompt: list[int], params: dict[str, Any] | None = None, name: str | None = None, max_tokens: int = 8
    ) -> Any:
        """A request arrives; return vLLM's object for it."""
        from vllm.sampling_params import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher
        from vllm.v1.request import Request

        self.made += 1
        extra = {"kv_transfer_params": params} if params is not None else None
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=extra)
        sampling.update_from_generation_config({}, 2)
        request = Request(
            request_id=name or f"r{self.made}",
            prompt_token_ids=prompt,
            sampling_params=sampling,
            pooling_params=None,
            block_hasher=get_request_block_hasher(BLOCK, sha256),
        )
        self.scheduler.add_request(request)
        return request

    def abort(self, request: Any) -> None:
        """The client goes away."""
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests([request.request_id], RequestStatus.FINISHED_ABORTED)

    def schedule(self) -> Any:
        """Return what vLLM would have its worker do."""
        return self.scheduler.schedule()

    def update(
        self,
        scheduled: Any,
        report: Any = None,
        received: set[str] | None = None,
        sent: set[str] | None = None,
    ) -> Any:
        """The worker did it. `report`: of its executors; `received`: requests whose KV NIXL has pulled; `sent`: those
        whose KV it need not keep for anybody to pull."""
        from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

        names = list(scheduled.num_scheduled_tokens)
        done = []
        for name in names:
            request = self.scheduler.requests.get(name)
            ends = request is None or request.num_computed_tokens >= request.num_tokens
            done.append([7] if ends else [])
        output = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=done,
            kv_connector_output=KVConnectorOutput(
                finished_recving=received, finished_sending=sent, kv_connector_worker_meta=report
            ),
        )
        outputs = self.scheduler.update_from_output(scheduled, output)
        for each in outputs.values():
            self._note(each.scheduler_stats.kv_connector_stats if each.scheduler_stats else None)
        return outputs

    def step(self, report: Any = None, received: set[str] | None = None) -> Any:
        """One step; return what was scheduled."""
        scheduled = self.schedule()
        self.update(scheduled, report, received)
        return scheduled

    def count(self, name: str) -> float:
        """Return one of the plugin's counters."""
        stats = self.scheduler.connector.get_kv_connector_stats()
        self._note(stats.data if stats is not None else None)
        return self._counts.get(name, 0.0)

    def _note(self, stats: dict[str, Any] | None) -> None:
        for counter, increment in (stats or {"counts": {}})["counts"].items():
            self._counts[counter] = self._counts.get(counter, 0) + increment

    def pulls(self, scheduled: Any) -> dict[str, list[int]]:
        """Return what NIXL is to read in a step: by request, the prefill engine's blocks."""
        wanted = scheduled.kv_connector_metadata.reqs_to_recv
        return {name: list(meta.remote.block_ids[0]) for name, meta in wanted.items()}

    def until_pull(self, arrives: bool = False) -> dict[str, list[int]]:
        """Do steps until NIXL is to read something; return what, as `pulls` does.

        `arrives`: whether it is there by the end of that step.
        """
        wanted: dict[str, list[int]] = {}

        def told() -> bool:
            scheduled = self.schedule()
            wanted.update(self.pulls(scheduled))
            self.update(scheduled, received=set(wanted) if arrives and wanted else None)
            return bool(wanted)

        eventually(told)
        return wanted

    def stop(self) -> None:
        """End, as an engine core does that is told to."""
        self.scheduler.shutdown()


class Decode(Engine):
    """A decode engine's."""

    def __init__(self, config: Any, kv_cache_config: Any) -> None:
        from vllm_adrenaline.decode.scheduler import DecodeScheduler

        super().__init__(DecodeScheduler, config, kv_cache_config)


class PrefillEngine(Engine):
    """A prefill engine's, and a decode engine's line to it."""

    def __init__(self, config: Any, kv_cache_config: Any, address: str) -> None:
        from vllm_adrenaline.prefill.scheduler import PrefillScheduler

        super().__init__(PrefillScheduler, config, kv_cache_config)
        self.line: zmq.Socket[bytes] = sockets.connect(address)
        identity = self.scheduler.control.identity
        welcome = self.ask(messages.Hello(identity, True, "decode"))
        assert isinstance(welcome, messages.Welcome)
        self.welcome = welcome

    def ask(self, message: messages.Message) -> messages.AnyMessage | None:
        """Ask as the decode engine."""
        return sockets.ask(self.line, message, 5)

    def finish(self, name: str | None = None, ticket: str = "") -> dict[str, Any] | None:
        """Compute a prompt to be kept; return what its client is told of where it is."""
        request = self.arrive(PROMPT, KEEP | {TICKET: ticket}, name=name, max_tokens=1)
        for _ in range(5):
            scheduled = self.schedule()
            for outputs in self.update(scheduled).values():
                for output in outputs.outputs:
                    if output.request_id == request.request_id:
                        return dict(output.kv_transfer_params) if output.kv_transfer_params else None
        raise AssertionError("the prompt is not done")

    def let_go(self) -> None:
        """A step in which the worker ends NIXL's hold on what it is told."""
        scheduled = self.schedule()
        self.update(scheduled, sent=set(scheduled.kv_connector_metadata.let_go))


@pytest.fixture(autouse=True)
def in_this_process_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What engines do to their own process is not done to the one of all tests: its priority, its environment."""
    monkeypatch.setattr("vllm_adrenaline.decode.scheduler.come_first", lambda: None)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Any]]:
    """Return how to make the configuration of an engine with a tiny model, and of its KV cache."""
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import init_none_hash
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    from vllm_adrenaline import plugin

    init_none_hash(sha256)
    plugin.register()
    folder = make_model(tmp_path_factory.mktemp("model"), layers=2, hidden=64, heads=2, kv_heads=1, vocab=512)

    def make(blocks: int = LOCAL_BLOCKS, **options: Any) -> tuple[Any, Any]:
        args = EngineArgs(
            model=str(folder),
            dtype="float32",
            max_model_len=1024,
            max_num_seqs=16,
            block_size=BLOCK,
            enforce_eager=True,
            kv_cache_memory_bytes=1 << 20,  # so that it does not matter how much is free here
            additional_config={"adrenaline": options},
        )
        config = args.create_engine_config()
        config.cache_config.num_gpu_blocks = blocks
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32)
        layers = ["model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn"]
        return config, KVCacheConfig(blocks, [], [KVCacheGroupSpec(layers, spec)])

    return make


@pytest.fixture
def prefill(tmp_path: Path) -> Iterator[Prefill]:
    """A scripted prefill engine."""
    scripted = Prefill(f"ipc://{tmp_path}/p")
    yield scripted
    scripted.stop()


DEAR = {"key": {}, "costs": {"step": [[1, 0.001]], "local": 1e-3, "remote": [1e-9], "exchange": 0.0}}
"""Believed costs under which offloading shortens every step."""


@pytest.fixture
def decode(base: Callable[..., tuple[Any, Any]], prefill: Prefill, tmp_path: Path) -> Iterator[Callable[..., Decode]]:
    """Return how to start a decode scheduler against the scripted prefill engine."""
    started: list[Decode] = []

    def start(blocks: int = LOCAL_BLOCKS, ratio: str = "auto", **options: Any) -> Decode:
        if ratio == "auto":
            profile = tmp_path / "profile.json"
            profile.write_text(json.dumps(DEAR))
            options["profile"] = str(profile)
        config, kv_cache = base(blocks, role="decode", peers=prefill.address, offload_ratio=ratio, **options)
        started.append(Decode(config, kv_cache))
        return started[-1]

    yield start
    for each in started:
        each.stop()


@pytest.fixture
def prefill_engine(
    base: Callable[..., tuple[Any, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., PrefillEngine]]:
    """Return how to start a prefill scheduler. The test speaks for a decode engine."""
    monkeypatch.setattr(executor_pool, "_active", ExecutorPool([]))
    started: list[PrefillEngine] = []

    def start(**options: Any) -> PrefillEngine:
        address = f"ipc://{tmp_path}/p"
        config, kv_cache = base(role="prefill", listen=address, **options)
        passing = descriptors.Server(addresses.for_descriptors(address))
        passing.start()
        executor_pool.active().passing = passing
        started.append(PrefillEngine(config, kv_cache, address))
        return started[-1]

    yield start
    for each in started:
        each.line.close()
        each.stop()
