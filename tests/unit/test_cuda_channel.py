"""The kernels of a channel through GPU memory, run on the emulator: what arrives, how waits end, what a failure leaves.

Their source is the one that nvcc compiles. The order of stores and announcements, with processes that run at any speed,
is in test_channel_protocol.py.
"""

from __future__ import annotations

import multiprocessing
import re
import shutil
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.cuda_channel_ends import EPOCH, OPTIONS, ROOM, SENTINEL, End, Pair, some, stamp
from tests.unit.cuda_emulator import ROOT, build, kept_programs
from vllm_adrenaline.native.cuda_channel import (
    ChannelEnd,
    ChannelKernels,
    ChannelStatus,
    ChannelWork,
    message_of,
)


@pytest.fixture(scope="module")
def kernels(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> ChannelKernels:
    return ChannelKernels(build(kept_programs(pytestconfig, tmp_path_factory), "emulated_channel.cpp", OPTIONS))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.integers(1, ROOM), padding=st.sets(st.integers(0, ROOM - 1)), gap=st.integers(0, 3), most=st.integers(1, 9)
)
def test_rows_arrive_and_come_back_bit_for_bit(
    rows: int, padding: set[int], gap: int, most: int, kernels: ChannelKernels
) -> None:
    pair, chosen = Pair(kernels), torch.randperm(300)[:rows]
    chosen[[row for row in padding if row < rows]] = -1
    used = (chosen >= 0).nonzero()[:, 0]
    sent = [some(300, heads, gap) for heads in (4, 2, 2)]
    for inbox in pair.inboxes():
        inbox.fill_(SENTINEL)
    pair.begin()
    pair.send(0, sent, chosen, rows, most)
    pair.await_layer(pair.executor, 0)
    for inbox, tensor in zip(pair.executor.rows(), sent, strict=True):
        wanted = torch.full_like(inbox, SENTINEL)
        wanted[used] = tensor[chosen[used]]
        assert torch.equal(inbox, wanted)
    pair.decode.rows()[0].copy_(pair.executor.rows()[0].flip(1))
    pair.kernels.publish(pair.executor.end, 0, 0)
    out = some(300, 4, gap)
    wanted = out.clone()
    wanted[chosen[used]] = sent[0][chosen[used]].flip(1)
    pair.await_layer(pair.decode, 0)
    pair.take(0, out, chosen, rows)
    assert torch.equal(out, wanted)
    assert pair.decode.health() == pair.executor.health() == (ChannelStatus.READY, 1, 0)


def test_without_tokens_the_first_rows_are_meant(kernels: ChannelKernels) -> None:
    pair = Pair(kernels)
    sent = [some(5, heads) for heads in (4, 2, 2)]
    pair.begin()
    pair.send(0, sent, None, 5)
    assert all(torch.equal(inbox[:5], x) for inbox, x in zip(pair.executor.rows(), sent, strict=True))
    assert not any(inbox[5:].any() for inbox in pair.executor.rows())


def test_a_wait_that_is_late_ends_in_time_and_stays_late(kernels: ChannelKernels) -> None:
    pair = Pair(kernels, timeout_s=0.05)
    pair.begin()
    work = torch.arange(7, dtype=torch.int32)
    began = time.monotonic()
    pair.await_layer(pair.executor, 3, work)
    took = time.monotonic() - began
    assert 0.05 <= took < 0.5
    assert pair.executor.health() == (ChannelStatus.LATE, 1, stamp(EPOCH, 1, 3))
    assert not work.any(), "work was left to an end that failed"
    # What it awaited comes: nothing of this life is believed any more.
    pair.executor.inbox[0] = stamp(EPOCH, 1, 3)
    work.fill_(1)
    began = time.monotonic()
    pair.kernels.begin(pair.executor.end, 0)
    pair.await_layer(pair.executor, 4, work)
    assert time.monotonic() - began < 0.05
    assert pair.executor.health() == (ChannelStatus.LATE, 2, stamp(EPOCH, 1, 3))
    assert not work.any()


def announce_later(pair: Pair, step: int, layer: int) -> threading.Timer:
    """Announce a layer to the decode worker in 20 ms."""
    timer = threading.Timer(0.02, pair.decode.inbox[:1].fill_, [stamp(EPOCH, step, layer)])
    timer.start()
    return timer


def test_the_layers_of_a_step_are_waited_for_together(kernels: ChannelKernels) -> None:
    """Many slow layers exhaust the step's time as a stuck one does, and the next step has all of it again."""
    pair = Pair(kernels, timeout_s=0.8)
    for step, (layers, status) in enumerate(((3, ChannelStatus.READY), (60, ChannelStatus.LATE)), 1):
        pair.begin()
        for layer in range(layers):
            announcing = announce_later(pair, step, layer)
            pair.await_layer(pair.decode, layer)
            announcing.join()
        assert pair.decode.health()[0] == status
    assert 0.8e9 <= pair.decode.step_ns()[1] < 1.2e9


def test_a_step_knows_how_long_it_waited_and_what_it_did_meanwhile(kernels: ChannelKernels) -> None:
    pair, tokens = Pair(kernels), torch.tensor([0])
    for step in (1, 2):  # a step counts itself, not those before
        pair.begin()
        for layer in range(2):
            pair.send(layer, [some(1, heads) for heads in (4, 2, 2)], tokens, 1)
            time.sleep(0.03)
            announcing = announce_later(pair, step, layer)
            pair.await_layer(pair.decode, layer)
            announcing.join()
        local_ns, waited_ns = pair.decode.step_ns()
        assert 0.06e9 <= local_ns < 0.5e9
        assert 0.02e9 <= waited_ns < 0.5e9


@pytest.mark.parametrize(
    ("seen", "status"),
    [
        (stamp(EPOCH, 0, 4094), ChannelStatus.CLOSED),
        (stamp(EPOCH - 1, 2, 1), ChannelStatus.STALE),
        (stamp(EPOCH + 1, 2, 1), ChannelStatus.STALE),
        (stamp(EPOCH - 1, 0, 4094), ChannelStatus.STALE),
        (stamp(EPOCH, 2, 2), ChannelStatus.AHEAD),
        (stamp(EPOCH, 3, 0), ChannelStatus.AHEAD),
    ],
)
def test_a_wait_ends_at_once_for_what_is_of_no_use(seen: int, status: ChannelStatus, kernels: ChannelKernels) -> None:
    pair = Pair(kernels, timeout_s=60)
    pair.begin()
    pair.begin()
    pair.executor.inbox[0] = seen
    work = torch.ones(3, dtype=torch.int32)
    pair.await_layer(pair.executor, 1, work)
    assert pair.executor.health() == (status, 2, stamp(EPOCH, 2, 1))
    assert not work.any()


@pytest.mark.parametrize("seen", [0, stamp(EPOCH, 1, 1), stamp(EPOCH, 2, 0), stamp(EPOCH, 1, 4093)])
def test_what_was_announced_before_is_waited_through(seen: int, kernels: ChannelKernels) -> None:
    pair = Pair(kernels, timeout_s=0.01)
    pair.begin()
    pair.begin()
    pair.executor.inbox[0] = seen
    pair.await_layer(pair.executor, 1)
    assert pair.executor.health() == (ChannelStatus.LATE, 2, stamp(EPOCH, 2, 1))


def test_an_end_that_failed_stores_no_rows_takes_none_and_says_so(kernels: ChannelKernels) -> None:
    pair = Pair(kernels, timeout_s=0.01)
    pair.begin()
    for inbox in pair.inboxes():
        inbox.fill_(SENTINEL)
    pair.await_layer(pair.decode, 0)
    out = some(12, 4)
    before = out.clone()
    tokens = torch.tensor([3, -1, 8])
    pair.take(0, out, tokens, 3)
    before[[3, 8]] = 0
    assert torch.equal(out, before)
    pair.send(1, [some(12, heads) for heads in (4, 2, 2)], tokens, 3)
    assert all((inbox == SENTINEL).all() for inbox in pair.executor.rows())
    pair.await_layer(pair.executor, 1)
    assert pair.executor.health()[0] == ChannelStatus.CLOSED
    pair.kernels.publish(pair.executor.end, 1, 0)
    assert pair.decode.inbox[0] == stamp(EPOCH, 0, 4094)


def test_an_end_that_closes_says_so(kernels: ChannelKernels) -> None:
    pair = Pair(kernels)
    pair.begin()
    pair.kernels.close(pair.executor.end, 0)
    pair.await_layer(pair.decode, 0)
    assert pair.decode.health() == (ChannelStatus.CLOSED, 1, stamp(EPOCH, 1, 0))


def test_tensors_that_the_kernels_cannot_read_are_refused() -> None:
    end, good = ChannelEnd(), some(4, 2)
    tokens = torch.zeros(4, dtype=torch.int64)
    for tensor, inbox, its_tokens, rows in (
        (good.transpose(1, 2), 0, tokens, 4),
        (good, 8, tokens, 4),
        (good[..., :8], 0, tokens, 4),
        (good, 0, tokens.int(), 4),
        (good, 0, tokens, 3),
        (good, 0, None, 5),
        (good, 0, None, 0),
        (good, 0, torch.zeros(ROOM + 1, dtype=torch.int64), ROOM + 1),
    ):
        with pytest.raises(ValueError, match=r"contiguous|16 bytes|int64|rows"):
            message_of(end, 0, [(tensor, inbox)], its_tokens, rows, ROOM)
    with pytest.raises(ValueError, match="of 3"):
        message_of(end, 0, [(good, 0)] * 4, None, 4, ROOM)


def be_executor(library: Path, decode: End, executor: End, steps: int, layers: int) -> None:
    """Serve steps whose output is q with its heads in reverse order."""
    kernels = ChannelKernels(library)
    executor.connect(decode)
    for _ in range(steps):
        kernels.begin(executor.end, 0)
        for layer in range(layers):
            kernels.await_layer(executor.end, layer, ChannelWork(), 0)
            decode.rows()[0].copy_(executor.rows()[0].flip(1))
            kernels.publish(executor.end, layer, 0)
    assert executor.health() == (ChannelStatus.READY, steps, 0)


def test_two_processes_exchange_steps(
    kernels: ChannelKernels, pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> None:
    library = build(kept_programs(pytestconfig, tmp_path_factory), "emulated_channel.cpp", OPTIONS)
    pair, steps, layers = Pair(kernels, timeout_s=60), 4, 3
    decode, executor = End([4], 60), End([4, 2, 2], 60)
    decode.inbox, executor.inbox = pair.decode.inbox, pair.executor.inbox
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=be_executor, args=(library, decode, executor, steps, layers), daemon=True)
    process.start()
    for _ in range(steps):
        kernels.begin(pair.decode.end, 0)
        for layer in range(layers):
            sent, out = [some(30, heads) for heads in (4, 2, 2)], torch.zeros(30, 4, 16, dtype=torch.int16)
            tokens = torch.randperm(30)[:20]
            pair.send(layer, sent, tokens, 20)
            pair.await_layer(pair.decode, layer)
            pair.take(layer, out, tokens, 20)
            assert torch.equal(out[tokens], sent[0][tokens].flip(1))
    process.join(30)
    assert process.exitcode == 0
    assert pair.decode.health() == (ChannelStatus.READY, steps, 0)


class Fault(NamedTuple):
    """A fault: what stands in channel.h, what stands there instead, and what the emulator says then."""

    there: str
    instead: str
    seen: str


FAULTS = {
    "no barrier before the rows are released": Fault(
        "device::barrier();  // the block's rows", "//", "does not wait for rows"
    ),
    "no fence before blocks count": Fault("device::fence_system();  // releases them", "//", "does not wait for rows"),
    "no fence after blocks count": Fault("device::fence_system();  // acquires", "//", "no fence after the atomic"),
    "the first block announces": Fault("if (!is_last) return;", "if (is_last) return;", "wait for rows|after it was"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_kernels_would_be_seen(fault: str, tmp_path: Path) -> None:
    planted = FAULTS[fault]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    source = tmp_path / "csrc" / "cuda" / "channel.h"
    text = source.read_text()
    assert text.count(planted.there) == 1, "the source has changed: plant the fault anew"
    source.write_text(text.replace(planted.there, planted.instead))
    pair = Pair(ChannelKernels(build(tmp_path, "emulated_channel.cpp", OPTIONS, tmp_path / "csrc")))
    pair.begin()
    found = set()
    for layer in range(8):  # the order of blocks is drawn
        try:
            pair.send(layer, [some(ROOM, heads) for heads in (4, 2, 2)], None, ROOM)
        except RuntimeError as error:
            found.add(str(error))
    assert any(re.search(planted.seen, each) for each in found), found
