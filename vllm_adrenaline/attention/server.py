"""The attention executor process (`python -m vllm_adrenaline.attention`).

It maps the prefill worker's KV cache, and serves up to MAX_CHANNELS decode workers with a thread and a channel each.
Between steps it keeps nothing of any request: every step plan brings the block table and the lengths that it needs. So
no abort, preemption or crash can leak anything here. Idle threads sleep, in poll() or on their channels.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import zmq

from vllm_adrenaline.attention.gpu import GpuAttention
from vllm_adrenaline.attention.gpu_steps import GpuStepServer
from vllm_adrenaline.attention.spec import READY, ExecutorSpec
from vllm_adrenaline.attention.steps import CpuStepServer, StepServer
from vllm_adrenaline.control import addresses, messages, sockets
from vllm_adrenaline.control.kv_export import KVExport
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.native import cuda_library
from vllm_adrenaline.system import descriptors
from vllm_adrenaline.system.device_handle import Handle
from vllm_adrenaline.transport.channel import ExecutorChannel
from vllm_adrenaline.transport.collective import CollectiveExecutorChannel
from vllm_adrenaline.transport.gpu import GpuExecutorChannel
from vllm_adrenaline.transport.pair import Disconnected
from vllm_adrenaline.transport.shape import Shape
from vllm_adrenaline.transport.shm import ShmExecutorChannel

if TYPE_CHECKING:
    from vllm_adrenaline.attention.kernels import CpuAttention

logger = logging.getLogger("vllm.adrenaline")

MAX_CHANNELS = 64
"""How many decode workers may be attached at a time."""
REVOKE_POLL_MS = 2
"""How often a revocation under way is looked at: whether the last step has been left."""


def open_attention(spec: ExecutorSpec) -> CpuAttention | GpuAttention:
    """Return the attention over the KV cache that an executor is told of.

    Raises:
        AdrenalineError, OSError, ValueError, RuntimeError: it is not there, or cannot be attended here.
    """
    if not isinstance(spec.kv, KVExport):
        return GpuAttention.mapped(spec.kv, cuda_library.load(), spec.share)
    from vllm_adrenaline.attention.kernels import CpuAttention  # needs vLLM, which GPUs do not

    attention = CpuAttention.mapped(spec.kv, spec.kv_file, spec.identity.split_kv)
    os.close(spec.kv_file)
    return attention


class ChannelThread(threading.Thread):
    """The thread that serves one decode worker, of decode engine `engine`. Between steps it sleeps on the channel."""

    def __init__(
        self,
        attention: CpuAttention | GpuAttention,
        channel: ExecutorChannel,
        make_steps: Callable[[], StepServer],
        message: messages.Attach,
    ) -> None:
        """Take what the thread needs.

        Args:
            attention: what is attended.
            channel: the decode worker's.
            make_steps: makes in the thread what serves its steps. Raises Disconnected if the decode worker is away.
            message: of the decode worker.
        """
        super().__init__(name="adrenaline-channel", daemon=True)
        self.channel, self.engine, self._epoch = channel, message.engine, message.epoch
        self._attention, self._make_steps = attention, make_steps

    def is_meant(self, revoke: messages.Revoke) -> bool:
        """Whether a revocation is of this channel."""
        return revoke.engine == self.engine and revoke.epoch in (0, self._epoch)

    def run(self) -> None:
        attention, steps = self._attention, None
        try:
            steps = self._make_steps()
            while (found := self.channel.next_step()) is not None:
                number, _, step = found
                check_plan(step, attention.num_blocks, attention.block_size)
                steps.serve(number, step)
        except Disconnected as error:
            logger.warning("decode engine %s is not attended for over this connection: %s", self.engine, error)
        except Exception:
            # The decode engine learns it at once and recomputes; it attaches anew. Others are served as before.
            logger.exception("a step of decode engine %s failed: its channel is closed", self.engine)
        finally:
            self._let_go(steps)

    def _let_go(self, steps: StepServer | None) -> None:
        try:
            if steps is not None:
                steps.close()
            self.channel.close()
        except Exception:
            # On a GPU an error of a kernel is one of the whole process, for good: nobody is served any more, and nobody
            # could be told that nothing is written. The end of the process tells it at once, and another is started.
            logger.exception("decode engine %s cannot be let go of: the attention executor ends", self.engine)
            os._exit(1)


def check_plan(step: dict[str, torch.Tensor], num_blocks: int, block_size: int) -> None:
    """Raise AdrenalineError unless every block and slot that a kernel will touch is inside the KV cache.

    Args:
        step: query_start_loc int32 [R + 1], seq_lens int32 [R], block_table int32 [R, W], slot_mapping int64 [T].
        num_blocks: blocks of the KV cache.
        block_size: tokens of a block.
    """
    starts, lens, table, slots = (step[k] for k in ("query_start_loc", "seq_lens", "block_table", "slot_mapping"))
    used = torch.arange(table.shape[1]) * block_size < lens[:, None]
    blocks = table[used]
    fits = (
        int(starts[0]) == 0
        and int(starts[-1]) <= len(slots)
        and bool((starts.diff() >= 0).all())
        and bool((lens >= starts.diff()).all())
        and int(lens.max()) <= table.shape[1] * block_size
        and int(blocks.min()) >= 0
        and int(blocks.max()) < num_blocks
        and int(slots.min()) >= -1
        and int(slots.max()) < num_blocks * block_size
    )
    if not fits:
        raise AdrenalineError("step plan points outside the KV cache")


class Server:
    """The executor's control socket and its channels.

    It answers Attach and Revoke on one ROUTER socket, and drops a channel when its decode worker ends. `bad_frames`
    counts what was no message.
    """

    def __init__(self, spec: ExecutorSpec) -> None:
        """Map the KV cache and bind the socket.

        Raises:
            AdrenalineError: the KV cache does not fit `spec`, or the address cannot be bound.
            OSError: the memory file is not there.
        """
        self._spec = spec
        self._attention = open_attention(spec)
        self._socket, self._address = sockets.bind(spec.address)
        self._passing = descriptors.Server(addresses.for_descriptors(self._address))
        self._passing.start()
        self._threads: dict[int, ChannelThread] = {}  # by the pidfd of the decode worker; negative on another host
        self._far = 0  # channels to other hosts so far
        self._ending: list[ChannelThread] = []  # told to end; perhaps still in a step
        self._revoking: list[tuple[bytes, messages.Revoke]] = []  # who waits for the end of which channels
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self.bad_frames = 0

    def serve(self) -> None:
        """Serve until the process is told to end. No message or frame ends it."""
        print(f"{READY} {self._address}", flush=True)
        try:
            while True:
                ready = dict(self._poller.poll(REVOKE_POLL_MS if self._revoking else None))
                # Before messages: one may revoke a channel whose worker has ended, too.
                for key in self._threads.keys() & ready.keys():
                    self._drop(key)
                if self._socket in ready:
                    self._serve_one()
                self._acknowledge()
        finally:
            self._passing.stop()
            sockets.unbind(self._socket, self._address)

    def _serve_one(self) -> None:
        received = sockets.receive(self._socket)
        if received is None:
            self.bad_frames += 1
            return
        peer, message = received
        if isinstance(message, messages.Attach):
            try:
                answer: messages.Message = self._attach(message)
            except (AdrenalineError, OSError, RuntimeError, ValueError) as error:
                logger.warning("a worker of decode engine %s is refused: %s", message.engine, error)
                answer = sockets.refusal(str(error), self._address)
            except Exception:
                logger.exception("cannot attach a worker of decode engine %s", message.engine)
                answer = messages.Refused("the attention executor failed; its log says how")
            sockets.answer(self._socket, peer, answer)
        elif isinstance(message, messages.Revoke):
            for key in [key for key, thread in self._threads.items() if thread.is_meant(message)]:
                self._drop(key)
            self._revoking.append((peer, message))

    def _acknowledge(self) -> None:
        """Answer the revocations of channels whose threads have all left their last step."""
        self._ending = [thread for thread in self._ending if thread.is_alive()]
        waiting = []
        for peer, revoke in self._revoking:
            if any(thread.is_meant(revoke) for thread in self._ending):
                waiting.append((peer, revoke))
                continue
            logger.info("decode engine %s is not attended for any more", revoke.engine)
            sockets.answer(self._socket, peer, messages.Revoked(revoke.engine, revoke.epoch))
        self._revoking = waiting

    def _attach(self, message: messages.Attach) -> messages.Attached:
        reason = messages.mismatch(self._spec.identity, message.identity, "attention executor", "decode worker")
        if reason is None and message.rank != self._spec.rank:
            ours, theirs = self._spec.rank, message.rank
            reason = f"tensor-parallel rank is {ours} on the attention executor and {theirs} on the decode worker"
        for ended in [fd for fd, thread in self._threads.items() if not thread.is_alive()]:
            self._drop(ended)
        if reason is None and len(self._threads) >= MAX_CHANNELS:
            reason = f"{MAX_CHANNELS} decode workers are attached already"
        if reason is not None:
            raise AdrenalineError(reason)
        attention = self._attention
        shape = Shape(
            message.max_rows,
            message.max_tokens,
            message.max_blocks,
            attention.num_heads,
            attention.num_kv_heads,
            attention.head_size,
            attention.dtype,
        )
        contact = inbox = None
        if isinstance(message.channel, messages.Group):
            contact = self._join(message, message.channel, shape)
        else:
            inbox = self._map(message, message.channel, shape)
        layers = [layer.name for layer in self._spec.kv.layers]
        return messages.Attached(layers, os.getpid(), self._spec.cpus, contact, inbox)

    def _map(
        self, message: messages.Attach, memory: messages.MemoryFile | messages.GpuMemory, shape: Shape
    ) -> Handle | None:
        """Serve a channel in shared memory, or also in GPU memory; return where the decode worker stores there."""
        plans = memory.plans if isinstance(memory, messages.GpuMemory) else memory
        pidfd, fd = self._passing.take(plans.descriptors, 2)
        try:
            try:
                channel, make_steps = self._channel(fd, shape, message.epoch, memory)
            finally:
                os.close(fd)
        except Exception:
            os.close(pidfd)
            raise
        self._begin(pidfd, ChannelThread(self._attention, channel, make_steps, message))
        self._poller.register(pidfd, zmq.POLLIN)
        return channel.inbox if isinstance(channel, GpuExecutorChannel) else None

    def _channel(
        self, fd: int, shape: Shape, epoch: int, memory: messages.MemoryFile | messages.GpuMemory
    ) -> tuple[ExecutorChannel, Callable[[], StepServer]]:
        """Return a channel to a decode worker on this host, and what makes the server of its steps."""
        attention, count, timeout = self._attention, len(self._spec.kv.layers), self._spec.idle_timeout
        if isinstance(attention, GpuAttention):
            if not isinstance(memory, messages.GpuMemory):
                raise AdrenalineError("the KV cache is in GPU memory, and the decode engine is on no GPU")
            gpu = GpuExecutorChannel(fd, shape, epoch, memory.inbox, count, timeout, attention.channels)
            return gpu, lambda: GpuStepServer(attention, gpu, shape)
        if not isinstance(memory, messages.MemoryFile):
            raise AdrenalineError("the KV cache is in no GPU's memory, and the decode engine is on a GPU")
        # Whether spinning keeps the prefill worker, or the decode worker itself, from this core.
        shared = bool(set(self._spec.cpus) & {*self._spec.kv.cpus, *memory.cpus})
        channel = ShmExecutorChannel(fd, shape, epoch, shared, count, timeout)
        return channel, lambda: CpuStepServer(attention, channel)

    def _join(self, message: messages.Attach, group: messages.Group, shape: Shape) -> messages.Contact:
        """Serve a channel to another host; return what its decode worker has to be told."""
        attention = self._attention
        if isinstance(attention, GpuAttention):
            raise AdrenalineError("a decode engine on another host is not served from a GPU yet")
        if not self._spec.interface:
            raise AdrenalineError(
                "the decode engine is on another host, or as far away: start the prefill engine with "
                "--adrenaline-interface, the network between the two"
            )
        layers, timeout = self._spec.kv.layers, self._spec.idle_timeout
        channel = CollectiveExecutorChannel(shape, self._spec.interface, message.epoch, len(layers), timeout)
        self._far += 1

        def connected() -> StepServer:
            channel.connect(group.contact)
            return CpuStepServer(attention, channel)

        self._begin(-self._far, ChannelThread(attention, channel, connected, message))
        return channel.contact

    def _begin(self, key: int, thread: ChannelThread) -> None:
        try:
            thread.start()
        except RuntimeError:  # there are too many threads
            thread.channel.close()
            if key >= 0:
                os.close(key)
            raise
        self._threads[key] = thread

    def _drop(self, key: int) -> None:
        if key >= 0:
            self._poller.unregister(key)
            os.close(key)
        thread = self._threads.pop(key)
        thread.channel.stop()
        self._ending.append(thread)
