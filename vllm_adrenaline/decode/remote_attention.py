"""The decode worker's remote attention: it splits a step's rows by pool, and has executors attend the remote ones.

`split` is called once a step, by the metadata builder. `StepPlan.send` and `receive` are called once a layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_adrenaline.decode.report import Report
from vllm_adrenaline.kv import space
from vllm_adrenaline.native.library import library
from vllm_adrenaline.transport.split import SplitRows, split_rows

if TYPE_CHECKING:
    from vllm.distributed.parallel_state import GroupCoordinator
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from vllm_adrenaline.decode.link import Link
    from vllm_adrenaline.decode.mapped_memory import MappedMemory
    from vllm_adrenaline.placement.patience import Patience
    from vllm_adrenaline.transport.channel import StepTransport
    from vllm_adrenaline.transport.collective import CollectiveDecodeChannel
    from vllm_adrenaline.transport.shm import ShmDecodeChannel


ROWS, BUSY_NS = 0, 2
"""Indices into what an executor attended (Link.attended)."""


class StepPlan:
    """One step's remote attention, as the attention layers see it.

    Attributes:
        has_local: whether the step has local rows, too.
        layer_index: numbers of the layers, by name.
        send: sends a layer's query [T, Hq, D], key and value [T, Hk, D], by its number (transport/channel.py).
    """

    def __init__(self, owner: RemoteAttention, split: SplitRows, budget_s: tuple[float, float] | None = None) -> None:
        """Begin the step on all channels that it needs.

        `budget_s`: of waiting, as in StepTransport.begin. None: what steps have that serve requests.
        """
        self.has_local = split.has_local
        self.layer_index = owner.layer_index
        self._owner = owner
        channels = {executor: owner.links[executor].channel for executor in split.executors}
        for executor, channel in channels.items():
            if channel is None:
                owner.note_failure(executor)
        owner.transport.begin(split.handle, channels, budget_s or owner.patience.budget)
        # What they are may depend on which channels the step has.
        self.send, self._receive = owner.transport.send, owner.transport.receive

    def receive(self, layer: int, output: torch.Tensor) -> None:
        """Fill the offloaded rows of `output` [T, Hq, D]. Rows of an executor that failed become zero."""
        if failed := self._receive(layer, output):
            self._owner.note_failures(failed)


class RemoteAttention:
    """The attention of one decode worker over KV that is not its own: by executors, and over mapped memory.

    Attributes:
        links: by executor; empty if this engine uses none.
        mapped: the memory of prefill engines; None if none is mapped.
        transport: the data plane.
        layer_index: numbers of the attention layers, by name.
        patience: how long a step waits for executors.
    """

    def __init__(
        self,
        links: list[Link],
        transport: StepTransport[ShmDecodeChannel | CollectiveDecodeChannel],
        mapped: MappedMemory | None,
        layers: list[str],
        block_size: int,
        counts_rows: bool,
        patience: Patience,
    ) -> None:
        """Take what the worker has set up.

        Args:
            links: to each executor, attached.
            transport: the data plane.
            mapped: the memory of prefill engines, laid out; None for none.
            layers: names of the attention layers, in the order of their numbers.
            block_size: tokens of a block.
            counts_rows: whether this worker counts the rows that are attended, as one rank of an engine does.
            patience: how long a step waits for executors.
        """
        self.patience = patience
        self.links, self.transport, self.mapped = links, transport, mapped
        self.layer_index = {name: index for index, name in enumerate(layers)}
        self._block_size, self._counts_rows = block_size, counts_rows
        self._received: frozenset[str] = frozenset()
        self._row_of: dict[str, int] = {}
        self._members: dict[int, str] = {}
        self._are_mapped = True
        self._bases: list[int] = []
        self._split: SplitRows | None = None  # of a step with remote or lost rows
        self._first: torch.Tensor | None = None  # first block of each row, in a step whose rows are not all local
        self._failed: set[int] = set()  # pools, since the last report
        self._failed_in_step: set[int] = set()
        self._ever_failed = False
        self._mapped_rows = 0
        self._attended = [0] * len(links)
        self._busy_ns = [0] * len(links)
        self._times_ns = (0, 0)

    def begin_step(self, received: frozenset[str], members: dict[int, str], row_of: dict[str, int]) -> None:
        """Note what the scheduler says of this step.

        Args:
            received: requests whose token's k and v are in the KV cache already (RequestTable.take_received).
            members: what the mapped rows of each prefill engine belong to there (messages.Welcome, `member`).
            row_of: vLLM's live map of request to row. It is read in `split`.
        """
        self._received, self._row_of, self._split, self._first = received, row_of, None, None
        self._failed_in_step = set()
        if members != self._members or not self._are_mapped:
            self._members, self._are_mapped = members, self._map(members)

    def _map(self, members: dict[int, str]) -> bool:
        """Have the memory of these members mapped; return whether all of it is. Requests of the rest are lost.

        Also those that have no row in this step: with them the next steps would ask again, and wait for an answer.
        """
        if self.mapped is None:
            return False
        is_mapped = self.mapped.use(members)
        for engine in [engine for engine, is_there in is_mapped.items() if not is_there]:
            self._note(space.mapped_pool(engine))
        self._bases = [
            base if is_mapped.get(engine) else library.NOT_MAPPED for engine, base in enumerate(self.mapped.bases)
        ]
        return all(is_mapped.values())

    def split(self, common: CommonAttentionMetadata) -> tuple[CommonAttentionMetadata, StepPlan | None]:
        """Split a step's rows, and begin the step if there are remote ones.

        Args:
            common: vLLM's CommonAttentionMetadata. Slots of remote and received tokens are masked in place, and those
                of mapped ones replaced.

        Returns:
            The metadata as the stock kernel may see it, and the plan of the remote rows, None if there are none.
        """
        rows = common.num_reqs
        table = common.block_table_tensor[:rows]
        received = [self._row_of[name] for name in self._received]
        are_local = not bool((table[:, 0] >= space.MAX_BLOCKS).any())
        if are_local and not received:
            return common, None
        # The slot mapping is changed in place: the same tensor is what vLLM hands to every layer's cache update.
        split = split_rows(
            table,
            common.query_start_loc[: rows + 1],
            common.seq_lens[:rows],
            common.slot_mapping,
            received,
            self._block_size,
            self._bases,
        )
        if are_local:
            return common, None
        plan = self._begin(split, table[:, 0])
        local = common.replace(block_table_tensor=split.local_block_table, seq_lens=split.local_seq_lens)
        return local, plan

    def _begin(self, split: SplitRows, first: torch.Tensor) -> StepPlan | None:
        """Begin a step whose rows are not all local; return the plan of the remote rows, None if there are none.

        Args:
            split: the step's batch.
            first: the first block of each row, int32 [R], on the host.
        """
        self._first = first
        self._mapped_rows += split.num_mapped
        if not split.executors and not split.lost:
            return None
        self._split = split
        for row in split.lost:
            self._note(space.pool_of(int(first[row])))
        return StepPlan(self, split) if split.executors else None

    def _end_step(self) -> None:
        """Note which executors failed in this step, as far as that is known only now that it is over."""
        if self._split is not None and (failed := self.transport.end()):
            self.note_failures(failed)

    def note_failures(self, executors: int) -> None:
        """Note that these executors (as bits) failed in a layer, and give their channels up."""
        for executor, link in enumerate(self.links):
            if executors >> executor & 1:
                link.fail()
                self.note_failure(executor)

    def note_failure(self, executor: int) -> None:
        """Note that the rows of an executor are worthless in this step."""
        self._note(space.remote_pool(executor))

    def _note(self, pool: int) -> None:
        """Note that the rows of a pool are worthless in this step."""
        self._failed.add(pool)
        self._failed_in_step.add(pool)
        self._ever_failed = True

    def agree_on_failed_rows(self, group: GroupCoordinator) -> list[int]:
        """Agree with the other ranks of `group` on the rows of this step that are worthless, and return them.

        A row is worthless if its pool failed on any rank. All ranks must call this together: the ranks communicate.
        An executor attends for one rank. If ranks disagreed, their copies of a request's random generator would part.
        """
        if self._first is None:
            return []
        self._end_step()
        failed = torch.zeros(space.NUM_POOLS, dtype=torch.int32)
        failed[list(self._failed_in_step)] = 1
        if group.world_size > 1:
            torch.distributed.all_reduce(failed, torch.distributed.ReduceOp.MAX, group=group.cpu_group)
        pools: list[int] = (self._first >> space.INDEX_BITS).tolist()
        return [row for row, pool in enumerate(pools) if failed[pool]]

    def take_report(self) -> Report | None:
        """Return what the scheduler must know, and begin the next report.

        None for a step without remote rows, while nothing has ever failed.
        """
        if self._split is None and not self._ever_failed:
            return None
        self._end_step()
        failed, self._failed = frozenset(self._failed), set()
        # A process that is to be killed is named before its blocks come free, never after.
        writing = frozenset(i for i, link in enumerate(self.links) if link.is_writing)
        hung = frozenset((i, pid) for i, link in enumerate(self.links) if (pid := link.take_hung()))
        unavailable = frozenset(i for i, link in enumerate(self.links) if link.channel is None)
        before, self._times_ns = self._times_ns, self.transport.times_ns
        local, exposed = (now - then for now, then in zip(self._times_ns, before, strict=True))
        remote = {e: busy / 1e9 for e, busy in enumerate(self._take_growth(self._busy_ns, BUSY_NS)) if busy}
        if self._split is not None and not failed:
            self.patience.observe(exposed / 1e9)
        return Report(failed, writing, hung, unavailable, local / 1e9, remote, exposed / 1e9)

    def take_counts(self) -> dict[str, int]:
        """Return rows x layers attended since the last call; none unless we count rows.

        Remote ones are counted by the executors, mapped ones here.
        """
        if not self._counts_rows:
            return {}
        mapped, self._mapped_rows = self._mapped_rows * len(self.layer_index), 0
        remote = sum(self._take_growth(self._attended, ROWS))
        return {"remote_attention_rows": remote, "mapped_attention_rows": mapped}

    def _take_growth(self, seen: list[int], counter: int) -> list[int]:
        """Return by how much each executor's counter has grown since it was `seen`, and set `seen` to what it is now.

        They begin at 0 when an executor is used again.
        """
        before = seen.copy()
        seen[:] = [link.attended[counter] for link in self.links]
        return [max(0, now - then) for now, then in zip(seen, before, strict=True)]

    def close(self) -> None:
        """Detach from all executors."""
        for link in self.links:
            link.close()


_active: RemoteAttention | None = None


def activate(remote: RemoteAttention | None) -> None:
    """Make `remote` the remote attention of this worker process; None: it has none.

    vLLM makes the metadata builder itself, and passes it nothing of ours.
    """
    global _active
    _active = remote


def active() -> RemoteAttention | None:
    """Return the remote attention of this worker process; None before it is attached and after it ended."""
    return _active
