"""The KV caches of prefill engines on the same device, mapped behind this worker's own.

In each layer one range of addresses holds the worker's own blocks, then those of every prefill engine. So the stock
kernel takes local and mapped rows in one call, as rows of one cache. Nothing is copied, and nothing is written here but
by the rows of a step. Who owns which block is in docs/architecture.md.
"""

from __future__ import annotations

import contextlib
import logging
import math
import mmap
import os
import select
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import zmq

from vllm_adrenaline.control import addresses, messages, sockets
from vllm_adrenaline.control.kv_export import KVExport
from vllm_adrenaline.decode.link import ANSWER_S, NoAnswer, until_answered
from vllm_adrenaline.engine.setup import cannot_be_mapped, is_far
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.system import descriptors, memory_file
from vllm_adrenaline.system.address_range import AddressRange

logger = logging.getLogger("vllm.adrenaline")


class MappedMemory:
    """The memory of all prefill engines of one decode worker.

    Attributes:
        bases: by prefill engine, the number of its first block for the stock kernel.
        caches: the KV cache of each layer, own and mapped blocks: [blocks, KV heads, block size, 2 * head size].
    """

    def __init__(self, addresses: Sequence[str], identity: messages.Identity, rank: int) -> None:
        self._addresses, self._identity, self._rank = addresses, identity, rank
        self._members = [""] * len(addresses)
        self._own: dict[str, torch.Tensor] = {}
        self._exports: list[KVExport] = []
        self._lock = threading.Lock()  # guards what follows: threads that wait for the end of prefill workers change it
        self._used: set[int] = set()
        self._mapped = [0] * len(addresses)  # the number of the memory file that is mapped; 0 for none
        self._ended: set[int] = set()  # prefill engines whose memory is mapped, and whose worker has ended
        self._ranges: list[AddressRange] = []
        self._page = 0
        self.bases: list[int] = []
        self.caches: dict[str, torch.Tensor] = {}

    def open(self, own: dict[str, torch.Tensor], fd: int, offsets: Sequence[int], deadline: float) -> None:
        """Ask every prefill engine for its memory, and lay out the ranges.

        Args:
            own: this worker's KV cache by layer, [blocks, KV heads, block size, 2 * head size].
            fd: the memory file in which all of them lie.
            offsets: where each of them begins in it, in bytes.
            deadline: until when prefill engines are waited for, in seconds (monotonic).

        Raises:
            AdrenalineError: a prefill engine does not answer, refuses, or its memory cannot be mapped behind ours.
            OSError: there are not enough addresses.
        """
        first = next(iter(own.values()))
        blocks = first.shape[0]
        self._page = first[0].numel() * first.element_size()
        if not all(cache.is_contiguous() for cache in own.values()):
            raise AdrenalineError("this vLLM lays out its KV cache in a way that cannot be mapped (--adrenaline-pool)")
        if self._page % mmap.PAGESIZE:
            raise AdrenalineError(
                f"a KV block of a layer has {self._page} bytes, and only whole pages of {mmap.PAGESIZE} can be mapped: "
                "use a larger --block-size, or --adrenaline-pool remote"
            )
        self._own = own
        found = [until_answered(partial(self._ask, address, ""), deadline) for address in self._addresses]
        self._exports = [each.kv for each in found]
        for address, kv in zip(self._addresses, self._exports, strict=True):
            if reason := _mismatch(kv, own, self._page):
                raise AdrenalineError(f"the KV cache of the prefill engine at {address} cannot be mapped: {reason}")
        total = blocks
        for kv in self._exports:
            self.bases.append(total)
            total += kv.shape[0]
        for (name, cache), offset in zip(own.items(), offsets, strict=True):
            whole = AddressRange(total * self._page)
            whole.map(0, fd, offset, blocks * self._page)
            self._ranges.append(whole)
            self.caches[name] = torch.frombuffer(whole.buffer, dtype=cache.dtype).view(total, *cache.shape[1:])
        for engine, each in enumerate(found):
            try:
                self._map(engine, each)
            except OSError as error:
                raise AdrenalineError(
                    f"the memory of the prefill engine at {self._addresses[engine]} cannot be mapped: {error}"
                ) from None
            finally:
                each.close()
        logger.info("%d blocks of prefill engines are mapped behind %d own ones", total - blocks, blocks)

    def use(self, members: dict[int, str]) -> dict[int, bool]:
        """Have mapped what we have as these members, by prefill engine, and nothing of prefill engines that ended.

        Returns:
            What `ensure` returns for each of them.
        """
        with self._lock:
            self._used = set(members)
            for engine in self._ended - self._used:
                self._unmap(engine)
        return {engine: self.ensure(engine, member) for engine, member in members.items()}

    def ensure(self, engine: int, member: str) -> bool:
        """Make sure that what we have as `member` at prefill engine `engine` is mapped, and is not taken back.

        Returns:
            False if it is not: the prefill engine is gone, or has parted with us. That is in the log.
        """
        if self._members[engine] == member:
            return True
        address = self._addresses[engine]
        try:
            with contextlib.closing(self._ask(address, member)) as found:
                kv = found.kv
                if kv.shape != self._exports[engine].shape or _mismatch(kv, self._own, self._page):
                    raise AdrenalineError("it has come back with another KV cache: start this engine again to map it")
                self._map(engine, found)
        except (AdrenalineError, OSError, zmq.ZMQError) as error:
            logger.error("the memory of the prefill engine at %s is not mapped: %s", address, error)
            return False
        self._members[engine] = member
        return True

    def _map(self, engine: int, found: Found) -> None:
        """Map the memory of a prefill engine where it belongs."""
        kv = found.kv
        memory_file.check(found.memory, kv.size, "the prefill worker's KV cache")
        for layer, each in zip(kv.layers, self._ranges, strict=True):
            each.map(self.bases[engine] * self._page, found.memory, layer.offset, kv.shape[0] * self._page)
        number = os.fstat(found.memory).st_ino
        with self._lock:
            is_watched, self._mapped[engine] = self._mapped[engine] == number, number
            if not is_watched:
                self._ended.discard(engine)
        if not is_watched:
            args = (engine, number, os.dup(found.process))
            threading.Thread(target=self._await_end, args=args, name="adrenaline-mapped", daemon=True).start()

    def _await_end(self, engine: int, number: int, process: int) -> None:
        """Wait for the end of a prefill worker. Its memory, which would not come back to the system, goes when unused.

        A prefill engine that is started in its place may need the memory to start at all.
        """
        poller = select.poll()
        poller.register(process, select.POLLIN)
        poller.poll()
        os.close(process)
        with self._lock:
            if self._mapped[engine] != number:
                return
            self._ended.add(engine)
            if engine not in self._used:
                self._unmap(engine)

    def _unmap(self, engine: int) -> None:
        """Let go of the memory of a prefill engine that ended. The lock is held, and no row uses it."""
        self._ended.discard(engine)
        self._mapped[engine], self._members[engine] = 0, ""
        for each in self._ranges:
            each.unmap(self.bases[engine] * self._page, self._exports[engine].shape[0] * self._page)
        logger.info("the memory of the prefill engine that was at %s is let go", self._addresses[engine])

    def _ask(self, address: str, member: str) -> Found:
        return ask_to_map(address, self._identity, self._rank, member)


@dataclass(frozen=True)
class Found:
    """A prefill worker's memory that may be mapped.

    Attributes:
        kv, weights: how its KV cache and its weights are read (messages.Mappable).
        process: the pidfd of the worker.
        memory, weights_file: the memory files; -1 for weights that are not shared.
    """

    kv: KVExport
    weights: messages.SharedWeights | None
    process: int
    memory: int
    weights_file: int = -1

    def close(self) -> None:
        """Close the descriptors."""
        descriptors.close([each for each in (self.process, self.memory, self.weights_file) if each >= 0])


def ask_to_map(address: str, identity: messages.Identity, rank: int, member: str) -> Found:
    """Return the memory of a prefill engine's worker (messages.Map). The caller closes it.

    Raises:
        AdrenalineError: it refuses, or is on another host; NoAnswer: it does not answer.
    """
    where, wanted = addresses.for_descriptors(address), messages.offer_of(rank)
    try:
        token, theirs = descriptors.introduce(where, wanted=wanted)
    except descriptors.Unreachable as error:
        raise _why_not(address, identity, str(error)) from None
    # Whoever knows the token is who has given us his descriptors, and no prefill engine that came after him.
    try:
        answer = sockets.ask_once(address, messages.Map(identity, rank, member, token), ANSWER_S)
        if isinstance(answer, messages.Refused):
            raise AdrenalineError(answer.reason)
        if not isinstance(answer, messages.Mappable):
            raise NoAnswer(f"no prefill engine answers at {address}")
        if len(theirs) != (2 if answer.weights is None else 3):
            raise AdrenalineError(f"the prefill engine at {address} has passed {len(theirs)} descriptors")
        return Found(answer.kv, answer.weights, *theirs)
    except BaseException:
        descriptors.close(theirs)
        raise


def _why_not(address: str, identity: messages.Identity, why: str) -> AdrenalineError:
    """Return why a prefill engine does not pass the descriptors of its memory."""
    answer = sockets.ask_once(address, messages.Hello(identity, borrows=False), ANSWER_S)
    if isinstance(answer, messages.Refused):
        return AdrenalineError(answer.reason)
    if isinstance(answer, messages.Welcome) and is_far(address, answer):
        return cannot_be_mapped(address, answer)
    return NoAnswer(f"no prefill engine answers at {address}: {why}")


def _mismatch(kv: KVExport, own: dict[str, torch.Tensor], page: int) -> str:
    """Return why a prefill worker's KV cache cannot lie behind ours; nothing if it can. `page`: bytes of a block."""
    _, heads, block_size, double = next(iter(own.values())).shape
    wanted = [heads, 2 * block_size, double // 2]
    if kv.shape[1:] != wanted or kv.strides[0] != math.prod(wanted):
        return f"a block there is {kv.shape[1:]} with {kv.strides[0]} elements between blocks, and here {wanted}"
    if [layer.name for layer in kv.layers] != list(own):
        return "it has other layers than this engine"
    if any(layer.offset % mmap.PAGESIZE for layer in kv.layers):
        return "its layers do not begin at whole pages"
    if any(layer.offset + kv.shape[0] * page > kv.size for layer in kv.layers):
        return "its layers are not in its memory file"
    return ""
