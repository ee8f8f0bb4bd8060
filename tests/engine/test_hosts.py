"""Statements about engines on two hosts: the tokens of plain vLLM, over the network alone, and whatever fails."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.engine import hosts
from tests.engine.conftest import (
    BLOCK_BYTES,
    PLUGINS,
    Client,
    Engine,
    Plain,
    Ratio,
    Work,
    eventually,
    kv_bytes,
    replace,
    tokens,
    workload,
)
from tests.engine.hosts import Host
from vllm_adrenaline.compat.worker_cores import CORES_ENV
from vllm_adrenaline.control import keys
from vllm_adrenaline.engine.setup import PEERS_START_TOO
from vllm_adrenaline.proxy.server import ServerThread, bind, url_of

reason = hosts.why_not()
pytestmark = [pytest.mark.extended, pytest.mark.skipif(bool(reason), reason=reason)]

LAYERS = 2
ROW_BYTES = (4 + 2 * 2) * 32 * 4 + 4 * 32 * 4
"""Of a row and layer in float32: q, k, v there, output back."""
COMMON = ["--served-model-name", "m", "--enforce-eager", "--max-model-len", "1024", "--dtype", "float32"]


class Hosts:
    """A prefill engine on one host, a decode engine on another, and a proxy that reaches both."""

    def __init__(self, prefill: Host, decode: Host, engine: Engine, door: Client, knob: Path) -> None:
        self.prefill, self.decode, self.engine, self._door, self._knob = prefill, decode, engine, door, knob

    def door(self, ratio: Ratio) -> Client:
        """Return the proxy. From now on the decode engine offloads this share of its requests."""
        replace(self._knob, str(ratio))
        return self._door

    def executor(self) -> int:
        """Return the attention executor."""
        (found,) = self.prefill.processes("vllm_adrenaline.attention")
        return found

    def offloads_again(self) -> bool:
        """Say whether the decode engine, after a failure, comes to offload again."""
        count = self.engine.counting()

        def offloaded() -> bool:
            self.door(1).complete(workload(1, seed=43, prompts=[40], outputs=[5]))
            return count["remote_attention_rows"] > 0

        return eventually(offloaded, seconds=90)


@pytest.fixture(scope="module")
def fleet(plain: Plain, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Two engines on two hosts, with keys."""
    folder = tmp_path_factory.mktemp("hosts")
    public = {role: keys.generate(folder / role) for role in ("prefill", "decode")}
    (folder / "allow").write_text(f"{public['decode']} the decode engine\n")
    with ExitStack() as stack:
        prefill, decode = stack.enter_context(hosts.two_hosts())
        common = ["--model", str(model), *COMMON, "--max-num-seqs", "64", "--kv-cache-memory-bytes", kv_bytes(400)]
        common += ["--plugin", "adrenaline", "--adrenaline-interface", "data0"]
        address = f"{prefill.data}:7000"
        p = ["--adrenaline-role", "prefill", "--adrenaline-listen", f"tcp://{address}"]
        p += ["--adrenaline-key", str(folder / "prefill"), "--adrenaline-allow", str(folder / "allow")]
        p += ["--adrenaline-lease-seconds", "30"]
        d = ["--adrenaline-role", "decode", "--adrenaline-peers", f"tcp://{public['prefill']}@{address}"]
        d += ["--adrenaline-key", str(folder / "decode"), "--adrenaline-offload-ratio", "1"]
        knob = folder / "ratio"
        replace(knob, "1")
        path = os.pathsep.join([*map(str, PLUGINS), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {PEERS_START_TOO: "1", "PYTHONPATH": path, "ADRENALINE_KNOB": str(knob), CORES_ENV: "0"}
        urls = [
            stack.enter_context(prefill.engine([*common, *p], {CORES_ENV: "1"}, folder / "prefill.log")),
            stack.enter_context(decode.engine([*common, *d], environment, folder / "decode.log")),
        ]
        prefill.await_ready(folder / "prefill.log")
        decode.await_ready(folder / "decode.log")
        listener = stack.enter_context(bind("127.0.0.1", 0))
        door = ServerThread(listener, urls[:1], urls[1:])
        door.start()
        stack.callback(door.stop)
        yield Hosts(prefill, decode, Engine(urls[1], 0), Client(url_of(listener)), knob)


@pytest.fixture(scope="module")
def requests() -> list[Work]:
    return workload(16, seed=1, prompts=[1, 31, 127, 128, 129, 300, 555, 600], outputs=[1, 2, 5, 20, 40, 80])


def test_offloaded_requests_have_the_tokens_of_plain_vllm_and_their_rows_crossed_the_wire(
    fleet: Hosts, plain: Plain, requests: list[Work]
) -> None:
    count, before = fleet.engine.counting(), fleet.decode.crossed()
    assert tokens(fleet.door(1).complete(requests)) == plain.tokens(requests)
    rows = LAYERS * sum(work.tokens for work in requests)
    assert count["remote_attention_rows"] == rows
    assert count["fallback_requests"] == 0
    crossed = fleet.decode.crossed() - before
    print(f"{crossed} bytes crossed; {rows * ROW_BYTES} of them rows")
    assert crossed > rows * ROW_BYTES


def test_local_requests_have_the_tokens_of_plain_vllm_and_their_kv_crossed_the_wire(fleet: Hosts, plain: Plain) -> None:
    some = workload(8, seed=5, prompts=[300, 555, 600], outputs=[5, 20])
    count, before = fleet.engine.counting(), fleet.decode.crossed()
    assert tokens(fleet.door(0).complete(some)) == plain.tokens(some)
    assert count["remote_attention_rows"] == 0
    kv = sum(len(work.prompt) // 128 for work in some) * BLOCK_BYTES
    crossed = fleet.decode.crossed() - before
    print(f"{crossed} bytes crossed; {kv} of them KV")
    assert crossed > kv


def test_nothing_listens_on_every_interface(fleet: Hosts) -> None:
    listening = fleet.prefill.run("cat", "/proc/net/tcp")
    ours = [line.split()[1] for line in listening.splitlines()[1:] if line.split()[3] == "0A"]
    assert any(address.startswith("01004E0A") for address in ours), "that is how 10.78.0.1 is written"
    assert not [address for address in ours if address.startswith("00000000")], "nothing listens on every interface"


@contextmanager
def while_it_generates(fleet: Hosts, work: list[Work]) -> Iterator[Callable[[], list[list[int]]]]:
    """Have offloaded requests generate meanwhile; give a function that returns their tokens."""
    answers: list[list[list[int]]] = []
    count = fleet.engine.counting()
    thread = threading.Thread(target=lambda: answers.append(tokens(fleet.door(1).complete(work))))
    thread.start()
    assert eventually(lambda: count["remote_attention_rows"] > 20)

    def result() -> list[list[int]]:
        thread.join()
        return answers[0]

    yield result
    thread.join()


LONG = workload(4, seed=9, prompts=[200, 130], outputs=[400])


def test_an_executor_that_is_killed_costs_a_recomputation(fleet: Hosts, plain: Plain) -> None:
    count = fleet.engine.counting()
    with while_it_generates(fleet, LONG) as result:
        os.kill(fleet.executor(), signal.SIGKILL)
        assert result() == plain.tokens(LONG)
    assert count["fallback_requests"] == len(LONG)
    assert fleet.offloads_again()


def test_a_link_that_is_cut_costs_a_recomputation(fleet: Hosts, plain: Plain) -> None:
    count = fleet.engine.counting()
    with while_it_generates(fleet, LONG) as result:
        began = time.monotonic()
        with fleet.decode.cut():
            assert result() == plain.tokens(LONG)
            assert time.monotonic() - began < 30
    assert count["fallback_requests"] == len(LONG)
    assert fleet.offloads_again()
    assert tokens(fleet.door(1).complete(LONG)) == plain.tokens(LONG)


def test_a_connection_whose_other_end_is_gone_without_a_word_is_noticed(fleet: Hosts, plain: Plain) -> None:
    """Half open: the executor ends while the link is cut, so nothing of that reaches the decode engine."""
    count = fleet.engine.counting()
    with while_it_generates(fleet, LONG) as result:
        with fleet.decode.cut():
            os.kill(fleet.executor(), signal.SIGKILL)
            time.sleep(1)
        assert result() == plain.tokens(LONG)
    assert count["fallback_requests"] == len(LONG)
    assert fleet.offloads_again()


def test_a_link_that_stays_cut_longer_than_the_lease_gives_the_prefill_engine_its_blocks_back(
    fleet: Hosts, plain: Plain
) -> None:
    with while_it_generates(fleet, LONG) as result, fleet.decode.cut():
        assert result() == plain.tokens(LONG)
        time.sleep(35)
    assert fleet.offloads_again()
    assert tokens(fleet.door(1).complete(LONG)) == plain.tokens(LONG)
