"""The collective transport: the channel of a decode worker and an executor on two hosts, over a process group of two.

Each end keeps memory of its own that is laid out like a channel in shared memory (csrc/shm/layout.h). What the other
end of such a channel would read there is sent instead. So on the decode worker's side the native code plans, packs, and
takes outputs as it always does, and a step may have executors on this host and on others.

A step is: head and plan, to the executor; then for each layer q, k, v to the executor, and the output back. Each
message ends with the announcement that it stands for: life, step and layer. So none is taken for another, nor one that
is too short for a whole one. Both ends know from the head how long the messages of the step are.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch

from vllm_adrenaline.control.messages import Contact
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.native.library import library
from vllm_adrenaline.transport.pair import Disconnected, Pair
from vllm_adrenaline.transport.shape import Shape
from vllm_adrenaline.transport.shm import StepTensors, draw_epoch
from vllm_adrenaline.transport.stamp import stamp, step_of
from vllm_adrenaline.transport.step_messages import (
    ALL_BITS,
    HEAD_WORDS,
    Message,
    Messages,
    StepMessages,
    private_memory,
)

logger = logging.getLogger("vllm.adrenaline")


class CollectiveDecodeChannel:
    """The decode worker's end of a channel to an executor on another host.

    A failure of the connection ends the channel: the native end then says that the executor is gone.

    Attributes:
        epoch: the number of this channel's life, drawn at random.
        end: the native end.
        is_failed: whether the connection has failed, which ends the channel.
        counters: what the executor says that it attended: rows x layers, layers, and nanoseconds spent on them.
    """

    def __init__(self, shape: Shape, interface: str, num_layers: int) -> None:
        """Listen at a network interface. Raises AdrenalineError if that is not possible."""
        self.epoch = draw_epoch()
        self.is_failed = False
        self.counters = (0, 0, 0)
        self._num_layers = num_layers
        self._memory = memory = private_memory(shape)
        self.end = library.DecodeEnd(memory.address, shape.sizes, self.epoch)
        self._planned, self._sent, self._done = (memory.array(n, (1,), torch.int64) for n in ("plan", "sent", "done"))
        self._counts = memory.array("counts", (3,), torch.int32)
        self._closed = memory.array("closed", (1,), torch.int32)
        self._tokens = memory.array("query_start_loc", (shape.max_rows + 1,), torch.int32)
        self._head = Message(memory, [], HEAD_WORDS)
        self._steps = StepMessages(memory, shape)
        self._step: Messages
        self._next_layer = num_layers  # that is to be received
        self._expected: Any = None
        self._sending: list[Any] = []
        self._pair = Pair(0, interface)

    @property
    def contact(self) -> Contact:
        """What the executor has to be told."""
        return self._pair.contact

    def connect(self, contact: Contact) -> None:
        """Connect to the executor, as it said. Raises Disconnected if it does not answer."""
        self._pair.connect(contact)
        self.end.watch(-1, -1, True)

    @property
    def is_closed(self) -> bool:
        """False: only the executor itself can say so, over the control plane (Link.is_let_go_of)."""
        return False

    def begin(self) -> None:
        """Send the plan that the native end has just made."""
        if self.is_failed:
            return
        if self._next_layer != self._num_layers:
            self._fail(Disconnected("the step before was left"))
            return
        rows, padded_rows, padded_tokens = self._counts.tolist()
        tokens = int(self._tokens[rows])
        self._step = step = self._steps.of_size(padded_rows, tokens, padded_tokens)
        self._head.words[:4] = torch.tensor([rows, padded_rows, padded_tokens, tokens])
        self._head.pack(self._planned)
        step.plan.pack(self._planned)
        self._next_layer = 0
        try:
            self._sending = [self._pair.send(self._head.whole), self._pair.send(step.plan.whole)]
        except Disconnected as error:
            self._fail(error)

    def send(self) -> None:
        """Send the layer that the native end has just packed."""
        if self.is_failed:
            return
        layer = self._step.layer
        layer.pack(self._sent)
        try:
            self._expected = self._pair.expect(self._step.output.whole)
            self._sending.append(self._pair.send(layer.whole))
        except Disconnected as error:
            self._fail(error)

    def receive(self, deadline: float) -> None:
        """Wait for the layer's output until `deadline` (seconds, monotonic), and give it to the native end."""
        if self.is_failed:
            return
        output = self._step.output
        try:
            Pair.receive(self._expected, deadline - time.monotonic())
            if output.announcement != int(self._sent) & ALL_BITS:
                raise Disconnected("it answers what it was not asked")
        except Disconnected as error:
            self._fail(error)
            return
        self._sending.clear()  # it has all of it, for it has answered
        rows, layers, busy_ns, _ = output.words.tolist()
        self.counters = (rows, layers, busy_ns)
        output.unpack()
        self._next_layer += 1
        self._done.copy_(self._sent)

    def leave(self) -> None:
        if not self.is_failed:
            self._fail(Disconnected("it is left"))

    def _fail(self, error: Disconnected) -> None:
        """End the channel. The native end finds it closed."""
        logger.warning("an attention executor on another host is given up: %s", error)
        self.is_failed = True
        self._closed.fill_(1)
        self._pair.abort()

    def close(self) -> None:
        """Let go of the process group."""
        self._expected = None
        self._sending = []
        self._pair.close()


class CollectiveExecutorChannel:
    """The executor's end of a channel to a decode worker on another host."""

    def __init__(self, shape: Shape, interface: str, epoch: int, num_layers: int, timeout_s: float) -> None:
        """Listen at a network interface.

        Args:
            shape, epoch: as on the decode worker's end.
            interface: the network interface.
            num_layers: of the model.
            timeout_s: how long a layer is waited for at most, in seconds.

        Raises:
            AdrenalineError: it cannot be listened to.
        """
        self._shape, self._epoch, self._num_layers, self._timeout_s = shape, epoch, num_layers, timeout_s
        self._memory = memory = private_memory(shape)
        self._tensors, self._steps = StepTensors.of(memory, shape), StepMessages(memory, shape)
        self._head = Message(memory, [], HEAD_WORDS)
        self._step: Messages
        self._announced = torch.zeros(1, dtype=torch.int64)
        self._number = self._rows = 0
        self._layer = num_layers  # awaited, or attended; as many as there are: no step is served
        self._attends = self._stopped = False
        self._counters, self._ready_ns = [0, 0, 0], 0
        self._expected: Any = None
        self._sending: Any = None
        self._pair = Pair(1, interface)

    @property
    def contact(self) -> Contact:
        """What the decode worker has to be told."""
        return self._pair.contact

    def connect(self, contact: Contact) -> None:
        """Connect to the decode worker. Raises Disconnected if it does not answer."""
        self._pair.connect(contact)
        self._expected = self._pair.expect(self._head.whole)

    def next_step(self) -> tuple[int, int, dict[str, torch.Tensor]] | None:
        """Sleep until a step's plan comes.

        Returns:
            The step's number, its rows, and its tensors by name, as ShmExecutorChannel.next_step. None: the channel was
            stopped, or the decode worker has gone.

        Raises:
            AdrenalineError: the plan does not fit the channel. Nothing of it may be believed then.
        """
        if self._stopped:
            return None
        if self._layer < self._num_layers:
            raise Disconnected("the decode worker left a step")
        try:
            Pair.receive(self._expected)
        except Disconnected as error:
            logger.info("a decode worker on another host is not served any more: %s", error)
            return None
        rows, padded_rows, padded_tokens, tokens, _ = self._head.words.tolist()
        announced, shape = self._head.announcement, self._shape
        self._number = step_of(announced)
        fits = (
            announced == self._stamp(0)
            and 0 < rows <= padded_rows <= shape.max_rows
            and 0 < tokens <= padded_tokens <= shape.max_tokens
        )
        if not fits:
            raise AdrenalineError("step plan does not fit its channel")
        self._step = step = self._steps.of_size(padded_rows, tokens, padded_tokens)
        plan = self._pair.expect(step.plan.whole)
        self._expected = self._pair.expect(step.layer.whole)
        Pair.receive(plan, self._timeout_s)
        if step.plan.announcement != announced:
            raise AdrenalineError("a step's plan is not that of its head")
        step.plan.unpack()
        self._rows, self._layer, self._attends = rows, 0, False
        return self._number, rows, self._tensors.view(padded_rows, padded_tokens)

    def _stamp(self, layer_plus_1: int) -> int:
        """Return the announcement of a layer of this step, as 64 bits without a sign."""
        return stamp(self._epoch, self._number, layer_plus_1)

    def next_layer(self) -> int | None:
        """Send the output of the layer before, if there is one, and wait until q, k, v of the next are in their slots.

        Returns:
            The next layer's number. None: that was the last one, or the channel was stopped.

        Raises:
            Disconnected: the decode worker is gone, or was too late.
        """
        try:
            if self._attends:
                self._reply()
            if self._layer == self._num_layers:
                return None
            Pair.receive(self._expected, self._timeout_s)
        except Disconnected:
            if self._stopped:
                return None
            raise
        layer = self._step.layer
        if layer.announcement != self._stamp(self._layer + 1):
            raise Disconnected("the decode worker left a step")
        layer.unpack()
        self._announced.copy_(layer.words)
        self._attends, self._ready_ns = True, time.perf_counter_ns()
        return self._layer

    def _reply(self) -> None:
        """Send the layer's output. What comes next is expected before, so that it need not wait for that."""
        self._attends = False
        self._layer += 1
        is_last = self._layer == self._num_layers
        self._expected = self._pair.expect(self._head.whole if is_last else self._step.layer.whole)
        counters, output = self._counters, self._step.output
        counters[0] += self._rows
        counters[1] += 1
        counters[2] += time.perf_counter_ns() - self._ready_ns
        for index, count in enumerate(counters):
            output.words[index] = count
        output.pack(self._announced)
        self._sending = self._pair.send(output.whole)

    def stop(self) -> None:
        """End the waits of this end, from any thread."""
        self._stopped = True
        self._pair.abort()

    def close(self) -> None:
        """Let go of the process group. Only the thread that serves the channel may say so; it writes nothing then."""
        self._expected = self._sending = None
        self._pair.close()
