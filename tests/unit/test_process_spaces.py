"""Engines that do not see each other's processes are told so, and never take a process id for one of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.unit.test_control import IDENTITY, WELCOME, Prefill
from vllm_adrenaline.system.machine import process_space, where_is

APART = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
IN_A_CONTAINER = f"""
import os, sys
import msgspec
from vllm_adrenaline.control import messages, sockets
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.engine.setup import is_far, out_of_sight
from vllm_adrenaline.system.machine import process_space
identity = msgspec.json.decode({msgspec.json.encode(IDENTITY)!r}, type=messages.Identity)
line = sockets.connect(sys.argv[1])
welcome = sockets.ask(line, messages.Hello(identity, True, "d", os.getpid(), process_space()), 10)
print(is_far(welcome), out_of_sight(sys.argv[1], welcome))
print(sockets.ask(line, messages.Map(identity, 0, "", os.getpid(), process_space()), 10).reason, flush=True)
"""


@pytest.fixture
def prefill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Prefill]:
    monkeypatch.setattr("vllm_adrenaline.control.server.POLL_MS", 100)
    welcome = msgspec.structs.replace(WELCOME, process_space=process_space())
    monkeypatch.setattr("tests.unit.test_control.WELCOME", welcome)
    made = Prefill(f"ipc://{tmp_path}/c")
    yield made
    made.control.stop()


def can_be_apart() -> bool:
    try:
        return subprocess.run([*APART, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not can_be_apart(), reason="no PID namespace can be made here: it takes CAP_SYS_ADMIN and unshare")
def test_an_engine_in_another_pid_namespace_is_told_so_and_what_to_do(
    prefill: Prefill,
) -> None:
    command = [*APART, sys.executable, "-c", IN_A_CONTAINER, prefill.control.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as container:
        try:
            assert container.stdout is not None
            sentence, refusal = container.stdout.readline(), container.stdout.readline()
            assert sentence.startswith("True the prefill engine at ipc://")
            for said in (sentence, refusal):
                assert "in another PID namespace of this host" in said
                assert "--pid=container:NAME" in said
            assert "--adrenaline-interface" in sentence
            assert "cannot map the prefill engine's memory" in refusal
        finally:
            container.kill()


def test_what_is_said_of_the_other_tells_hosts_from_namespaces() -> None:
    boot = process_space().partition("/")[0]
    assert where_is(f"{boot}/4026500000") == "in another PID namespace of this host"
    assert where_is("00000000-0000-0000-0000-000000000000/4026531836") == "on another host"
