"""A decode worker's links to attention executors: waited for at the start, looked for again when they are lost."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.unit.test_control import IDENTITY, eventually
from vllm_adrenaline.control import addresses, messages, sockets
from vllm_adrenaline.decode import link
from vllm_adrenaline.decode.link import Link
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.placement import breaker
from vllm_adrenaline.transport.shape import Shape

SHAPE = Shape(4, 4, 2, num_heads=2, num_kv_heads=2, head_size=32, dtype=torch.float32)


def to(address: str) -> Link:
    return Link(address, IDENTITY, "d", 0, ["a"], SHAPE, 1.0)


@pytest.mark.parametrize("error", [RuntimeError("not foreseen"), AdrenalineError("refused"), OSError("no such file")])
def test_whatever_happens_an_executor_that_was_lost_is_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(link, "RETRY_S", 0.01)
    monkeypatch.setattr(breaker, "MIN_PAUSE_S", 0.01)
    lost, tried = to(f"ipc://{tmp_path}/p"), []

    def attach() -> None:
        tried.append(1)
        if len(tried) < 3:
            raise error
        lost.channel = SimpleNamespace()  # type: ignore[assignment]

    monkeypatch.setattr(lost, "attach", attach)
    lost.fail()
    eventually(lambda: lost.channel is not None)


def test_an_executor_that_is_lost_as_soon_as_it_is_used_again_is_looked_for_by_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "RETRY_S", 0.01)
    monkeypatch.setattr(breaker, "MIN_PAUSE_S", 0.01)
    lost, tried = to(f"ipc://{tmp_path}/p"), []
    # A step finds it gone before the thread that has attached looks: what looks for it next is begun by the step.
    monkeypatch.setattr(lost, "attach", lambda: tried.append(1))
    lost.fail()
    eventually(lambda: tried)
    time.sleep(0.1)
    assert len(tried) == 1


def test_a_worker_waits_for_an_executor_that_starts_and_not_for_one_that_refuses(tmp_path: Path) -> None:
    early = to(f"ipc://{tmp_path}/p")
    socket, address = sockets.bind(f"ipc://{tmp_path}/p")
    starting = messages.Welcome(
        "e", "h", 1, 1, executors=[""], executor_share="", lease_seconds=60.0, vicinity=addresses.vicinity(address)
    )
    said = [messages.Load(), starting, messages.Refused("another model")]
    answers = [b"\xff", *map(messages.encode, said)]

    def serve() -> None:
        for answer in answers:
            peer, _ = socket.recv_multipart()
            socket.send_multipart([peer, answer])

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    began = time.monotonic()
    with pytest.raises(AdrenalineError, match="another model"):
        early.attach_until(began + 60)
    assert time.monotonic() - began < 10
    thread.join()
    sockets.unbind(socket, address)
