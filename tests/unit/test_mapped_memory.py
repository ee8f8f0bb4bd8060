"""A decode worker's view of its own KV cache with those of prefill engines behind it."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from tests.unit.test_control import IDENTITY, eventually
from vllm_adrenaline.control import addresses, messages, sockets
from vllm_adrenaline.control.kv_export import KVExport, LayerSpec
from vllm_adrenaline.decode.link import NoAnswer
from vllm_adrenaline.decode.mapped_memory import MappedMemory, ask_to_map
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.kv.memory import map_kv
from vllm_adrenaline.system import descriptors, machine, memory_file
from vllm_adrenaline.system.process import pid_of

LAYERS = ["a", "b"]
HEADS, BLOCK, SIZE = 2, 128, 32
PAGE = HEADS * 2 * BLOCK * SIZE * 4


class Cache:
    """A worker's KV cache in a memory file, float32."""

    def __init__(self, blocks: int, layers: list[str] = LAYERS, size: int = SIZE) -> None:
        self.page = HEADS * 2 * BLOCK * size * 4
        self.bytes = len(layers) * blocks * self.page
        self.fd = memory_file.create("test", self.bytes)
        self.offsets = [index * blocks * self.page for index in range(len(layers))]
        flat = torch.frombuffer(map_kv(self.fd, self.bytes), dtype=torch.float32)
        shape = (blocks, HEADS, BLOCK, 2 * size)
        count = blocks * self.page // 4
        self.layers = {name: flat[i * count : (i + 1) * count].view(shape) for i, name in enumerate(layers)}
        self.export = KVExport(
            size=self.bytes,
            shape=[blocks, HEADS, 2 * BLOCK, size],
            strides=[HEADS * 2 * BLOCK * size, 2 * BLOCK * size, size, 1],
            dtype="float32",
            isa="vec",
            num_heads=4,
            layers=[LayerSpec(name, offset, 1.0) for name, offset in zip(layers, self.offsets, strict=True)],
            cpus=[0],
            threads=1,
        )


class Prefill:
    """A prefill engine that lets workers of one member map its cache. Its worker is the process `pid`.

    `asked`: what they asked, and `askers`: their processes.
    """

    def __init__(self, address: str, cache: Cache) -> None:
        self.member = "we"
        self.asked: list[messages.Map] = []
        self.askers: list[int] = []
        self._passing = descriptors.Server(addresses.for_descriptors(address))
        self.serve(cache)
        self._passing.start()
        self._socket, self.address = sockets.bind(address)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.is_set():
            if not self._socket.poll(5):
                continue
            peer, frame = self._socket.recv_multipart()
            message = messages.decode(frame)
            assert isinstance(message, messages.Map)
            self.asked.append(message)
            try:
                (process,) = self._passing.take(message.process, 1)
            except AdrenalineError as error:
                self._socket.send_multipart([peer, messages.encode(messages.Refused(str(error)))])
                continue
            self.askers.append(pid_of(process))
            os.close(process)
            ours = message.member in ("", self.member)
            answer = messages.Mappable(self.cache.export) if ours else messages.Refused("not ours")
            self._socket.send_multipart([peer, messages.encode(answer)])
        sockets.unbind(self._socket, self.address)

    def serve(self, cache: Cache, pid: int = 0) -> None:
        """Have another cache from now on, of the process `pid`; 0: of this one."""
        self.cache = cache
        self._passing.offers[messages.offer_of(0)] = [os.pidfd_open(pid or os.getpid()), cache.fd]

    def stop(self) -> None:
        if not self._stopping.is_set():
            self._stopping.set()
            self._thread.join()
            self._passing.stop()


@pytest.fixture
def prefills(tmp_path: Path) -> Iterator[list[Prefill]]:
    made = [Prefill(f"ipc://{tmp_path}/{number}", Cache(blocks)) for number, blocks in enumerate((7, 5))]
    yield made
    for each in made:
        each.stop()


def opened(prefills: list[Prefill], own: Cache, patience: float = 5.0) -> MappedMemory:
    memory = MappedMemory([each.address for each in prefills], IDENTITY, rank=0)
    memory.open(own.layers, own.fd, own.offsets, time.monotonic() + patience)
    return memory


def test_own_and_mapped_blocks_are_one_cache_in_every_layer(prefills: list[Prefill]) -> None:
    own = Cache(3)
    memory = opened(prefills, own)
    assert memory.bases == [3, 10]
    for number, (name, cache) in enumerate(memory.caches.items()):
        assert cache.shape == (15, HEADS, BLOCK, 2 * SIZE)
        for base, part in [(0, own), (3, prefills[0].cache), (10, prefills[1].cache)]:
            blocks = part.layers[name].shape[0]
            part.layers[name].copy_(torch.randn(part.layers[name].shape))
            assert torch.equal(cache[base : base + blocks], part.layers[name]), "what they write is read here"
            cache[base : base + blocks] = number + base
            assert (part.layers[name] == number + base).all(), "and what is written here is there"


def test_mapping_changes_nothing_that_is_there(prefills: list[Prefill]) -> None:
    for each in prefills:
        for layer in each.cache.layers.values():
            layer.fill_(7)
    opened(prefills, Cache(3))
    assert all((layer == 7).all() for each in prefills for layer in each.cache.layers.values())


def test_a_member_is_named_once_and_not_again(prefills: list[Prefill]) -> None:
    memory = opened(prefills, Cache(3))
    assert [each.member for each in prefills[0].asked] == [""]
    assert memory.ensure(0, "we")
    assert memory.ensure(0, "we")
    assert [each.member for each in prefills[0].asked] == ["", "we"]
    assert prefills[0].askers == [os.getpid()] * 2
    assert not prefills[1].asked[1:], "the other one is not asked"


def test_memory_of_a_member_that_is_not_known_any_more_is_not_used(prefills: list[Prefill]) -> None:
    memory = opened(prefills, Cache(3))
    assert not memory.ensure(0, "somebody")
    prefills[0].member = "somebody"
    assert memory.ensure(0, "somebody")


def test_a_prefill_engine_that_is_gone_is_not_mapped(prefills: list[Prefill], monkeypatch: pytest.MonkeyPatch) -> None:
    memory = opened(prefills, Cache(3))
    prefills[0].stop()
    monkeypatch.setattr("vllm_adrenaline.decode.mapped_memory.ANSWER_S", 0.1)
    assert not memory.ensure(0, "we")
    assert memory.ensure(1, "we")


def test_one_that_comes_back_is_mapped_anew_in_the_same_place(prefills: list[Prefill]) -> None:
    memory = opened(prefills, Cache(3))
    assert memory.ensure(0, "we")
    before = prefills[0].cache
    prefills[0].serve(Cache(7))
    prefills[0].member = "again"
    assert memory.ensure(0, "again")
    memory.caches["b"][4] = 9
    assert (prefills[0].cache.layers["b"][1] == 9).all()
    assert not before.layers["b"].any()
    prefills[0].serve(Cache(8))
    prefills[0].member = "larger"
    assert not memory.ensure(0, "larger"), "it would not fit in there"


def pieces(cache: Cache) -> int:
    """Return in how many places this process has a cache mapped."""
    inode = str(os.fstat(cache.fd).st_ino)
    return sum(line.split()[4] == inode for line in Path("/proc/self/maps").read_text().splitlines())


def test_memory_of_a_prefill_engine_that_ended_is_kept_while_it_is_used_and_no_longer(prefills: list[Prefill]) -> None:
    """The next prefill engine finds too little memory to start, else."""
    cache = prefills[0].cache
    alone = pieces(cache)
    with subprocess.Popen(["sleep", "100"]) as process:
        prefills[0].serve(cache, process.pid)
        memory = opened(prefills, Cache(3))
        assert memory.use({0: "we"}) == {0: True}
        process.kill()
    assert memory.use({0: "we", 1: "we"}) == {0: True, 1: True}, "it is used on"
    assert pieces(cache) == alone + len(LAYERS)
    memory.use({1: "we"})
    eventually(lambda: pieces(cache) <= alone)
    assert pieces(prefills[1].cache) == alone + len(LAYERS), "the other one is left alone"
    prefills[0].serve(Cache(7))
    assert memory.use({0: "we"}) == {0: True}
    memory.caches["a"][3] = 5
    assert (prefills[0].cache.layers["a"][0] == 5).all()


def test_an_unused_mapping_does_not_outlive_its_prefill_engine(prefills: list[Prefill]) -> None:
    cache = prefills[0].cache
    alone = pieces(cache)
    with subprocess.Popen(["sleep", "100"]) as process:
        prefills[0].serve(cache, process.pid)
        memory = opened(prefills, Cache(3))
        assert pieces(cache) == alone + len(LAYERS)
        process.kill()
    eventually(lambda: pieces(cache) <= alone)
    assert memory.bases == [3, 10]


def test_one_that_comes_back_with_layers_elsewhere_is_not_mapped(prefills: list[Prefill]) -> None:
    memory = opened(prefills, Cache(3))
    export = prefills[0].cache.export
    for offset in (export.size, 7):
        layers = [export.layers[0], msgspec.structs.replace(export.layers[1], offset=offset)]
        prefills[0].cache.export = msgspec.structs.replace(export, layers=layers)
        assert not memory.ensure(0, "we")


@pytest.mark.parametrize(
    ("cache", "reason"),
    [
        (Cache(7, ["a", "c"]), "other layers"),
        (Cache(7, size=64), "a block there is"),
    ],
)
def test_a_cache_that_does_not_fit_behind_ours_is_refused(prefills: list[Prefill], cache: Cache, reason: str) -> None:
    prefills[1].serve(cache)
    with pytest.raises(AdrenalineError, match=reason):
        opened(prefills, Cache(3))


def test_blocks_that_are_no_whole_pages_are_refused(prefills: list[Prefill]) -> None:
    small = Cache(3)
    odd = {name: cache[:, :, :1, :3].contiguous() for name, cache in small.layers.items()}
    memory = MappedMemory([each.address for each in prefills], IDENTITY, rank=0)
    with pytest.raises(AdrenalineError, match="whole pages"):
        memory.open(odd, small.fd, small.offsets, time.monotonic())


def test_memory_of_a_prefill_engine_that_came_after_the_one_that_passed_it_is_not_mapped(
    prefills: list[Prefill], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that answers does not know the token. What the other one has passed is not mapped in its name."""
    first, other = prefills
    monkeypatch.setattr(addresses, "for_descriptors", lambda _: other._passing.address)
    other.serve(Cache(7))
    with pytest.raises(AdrenalineError, match="no descriptors"):
        ask_to_map(first.address, IDENTITY, 0, "")


def test_a_prefill_engine_on_another_host_is_not_mapped_and_it_is_said_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    welcome = messages.Welcome("p", "h", 1, 7, [], "", 60.0, vicinity="another host")
    monkeypatch.setattr(sockets, "ask_once", lambda *_: welcome)
    with pytest.raises(AdrenalineError, match=r"on another host.*--adrenaline-pool remote"):
        ask_to_map("tcp://10.0.0.1:7000", IDENTITY, 0, "")
    monkeypatch.setattr(sockets, "ask_once", lambda *_: msgspec.structs.replace(welcome, vicinity=machine.boot()))
    with pytest.raises(NoAnswer):
        ask_to_map(f"ipc://{tmp_path}/p", IDENTITY, 0, "")
