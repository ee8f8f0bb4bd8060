"""The decode worker's remote attention: splits each step's rows by place and runs the offloaded ones elsewhere.

`split` runs once a step, in the metadata builder; `StepPlan.send` and `receive` once a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata

from vllm_adrenaline import kv_space
from vllm_adrenaline.data.plan import RowsPlan

if TYPE_CHECKING:
    from vllm_adrenaline.data.shm import ShmDecodeChannel
    from vllm_adrenaline.decode.link import Link


@dataclass
class Report(KVConnectorWorkerMetadata):
    """What a worker tells the scheduler at the end of a step.

    `failed`: executors that failed in it. `pids`: their processes. `down`: executors that are away.
    """

    failed: frozenset[int]
    pids: frozenset[int]
    down: frozenset[int]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Report:
        assert isinstance(other, Report)
        return Report(self.failed | other.failed, self.pids | other.pids, self.down | other.down)


@dataclass(frozen=True)
class SplitRows:
    """A batch split by place. `local_*` are what vLLM's stock kernel may see; `remote` maps executor to its rows."""

    local_block_table: torch.Tensor
    local_seq_lens: torch.Tensor
    masked_tokens: torch.Tensor
    remote: dict[int, RowsPlan]
    remote_rows: dict[int, np.ndarray]
    has_local: bool


def split_rows(
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    received_rows: list[int],
    block_size: int,
) -> SplitRows:
    """Split a batch of R requests by the place of their first block.

    block_table: int32 [R, W] of KV space ids. query_start_loc: int32 [R + 1]. seq_lens: int32 [R]. received_rows:
    rows whose (one) token's k and v are in the cache already. Masked for the stock kernel: remote rows get block 0 and
    a sequence as long as their query, remote and received tokens lose their slot.
    """
    table, starts, lens = block_table.numpy(), query_start_loc.numpy(), seq_lens.numpy()
    places = table[:, 0] >> kv_space.INDEX_BITS
    query_lens = np.diff(starts)
    keep = np.zeros(int(starts[-1]), dtype=bool)
    keep[starts[received_rows]] = True
    masked = keep.copy()
    remote, remote_rows = {}, {}
    for place in sorted(set(places.tolist()) - {kv_space.LOCAL}):
        rows = np.flatnonzero(places == place)
        counts = query_lens[rows]
        row_of_token = np.repeat(rows, counts)
        begins = np.concatenate(([0], np.cumsum(counts)))
        within = np.arange(begins[-1]) - np.repeat(begins[:-1], counts)
        tokens = starts[row_of_token] + within
        positions = (lens - query_lens)[row_of_token] + within
        blocks = table[row_of_token, positions // block_size] & (kv_space.MAX_BLOCKS - 1)
        slots = blocks.astype(np.int64) * block_size + positions % block_size
        slots[keep[tokens]] = -1
        masked[tokens] = True
        executor = place - 1
        remote_rows[executor] = rows
        remote[executor] = RowsPlan(
            tokens=torch.from_numpy(tokens.astype(np.int64)),
            query_start_loc=torch.from_numpy(begins.astype(np.int32)),
            seq_lens=torch.from_numpy(lens[rows]),
            block_table=torch.from_numpy(table[rows] & (kv_space.MAX_BLOCKS - 1)),
            slot_mapping=torch.from_numpy(slots),
        )
    elsewhere = places != kv_space.LOCAL
    local_table, local_lens = table.copy(), lens.copy()
    local_table[elsewhere] = 0
    local_lens[elsewhere] = query_lens[elsewhere]
    return SplitRows(
        local_block_table=torch.from_numpy(local_table),
        local_seq_lens=torch.from_numpy(local_lens),
        masked_tokens=torch.from_numpy(np.flatnonzero(masked)),
        remote=remote,
        remote_rows=remote_rows,
        has_local=not elsewhere.all(),
    )


class StepPlan:
    """One step's remote attention, as the attention layers see it."""

    def __init__(self, owner: RemoteAttention, split: SplitRows) -> None:
        self.has_local = split.has_local
        self._owner = owner
        self._rows = split.remote
        self._live: dict[int, ShmDecodeChannel] = {}
        for executor, plan in split.remote.items():
            channel = owner.links[executor].channel
            if channel is None:
                owner.note_failure(executor)
                continue
            channel.begin(plan)
            self._live[executor] = channel

    def send(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Send the offloaded rows of one layer to all executors; waits for none."""
        for channel in self._live.values():
            channel.send(layer, query, key, value)

    def receive(self, layer: int, output: torch.Tensor) -> None:
        """Fill the offloaded rows of `output` [T, Hq, D]; rows of an executor that failed become zero."""
        for executor, channel in list(self._live.items()):
            if not channel.receive(layer, output):
                del self._live[executor]
                self._owner.links[executor].fail()
                self._owner.note_failure(executor)
        if len(self._live) < len(self._rows):
            for executor, plan in self._rows.items():
                if executor not in self._live:
                    output.index_fill_(0, plan.tokens, 0)


class RemoteAttention:
    """All links of one decode worker. `begin_step` and `split` are called once a step."""

    def __init__(self, links: list[Link], layers: list[str], block_size: int, counts_rows: bool) -> None:
        self.links = links
        self.layer_index = {name: index for index, name in enumerate(layers)}
        self.failed_rows: list[int] = []
        self._block_size, self._counts_rows = block_size, counts_rows
        self._received: frozenset[str] = frozenset()
        self._row_of: dict[str, int] = {}
        self._split: SplitRows | None = None
        self._failed: set[int] = set()
        self._ever_failed = False
        self._attended = [0] * len(links)

    def begin_step(self, received: frozenset[str], row_of: dict[str, int]) -> None:
        """Note what the scheduler says of this step; `row_of` is vLLM's live map of request to row."""
        self._received, self._row_of, self._split = received, row_of, None
        self.failed_rows = []

    def split(self, common: Any) -> tuple[Any, StepPlan | None]:
        """Return vLLM's CommonAttentionMetadata as the stock kernel may see it, and the plan of the remote rows."""
        rows = common.num_reqs
        table = common.block_table_tensor[:rows]
        received = [self._row_of[name] for name in self._received]
        if not received and not bool((table[:, 0] >= kv_space.MAX_BLOCKS).any()):
            return common, None
        split = split_rows(table, common.query_start_loc[: rows + 1], common.seq_lens[:rows], received, self._block_size)
        # In place: the same tensor is what vLLM hands to the cache update of every layer.
        common.slot_mapping.index_fill_(0, split.masked_tokens, -1)
        if not split.remote:
            return common, None
        self._split = split
        local = common.replace(block_table_tensor=split.local_block_table, seq_lens=split.local_seq_lens)
        return local, StepPlan(self, split)

    def note_failure(self, executor: int) -> None:
        """The rows of `executor` are worthless in this step."""
        self._failed.add(executor)
        self._ever_failed = True
        if self._split is not None:
            self.failed_rows.extend(self._split.remote_rows[executor].tolist())

    def take_report(self) -> Report | None:
        """Return what the scheduler must know of this step."""
        if not self._ever_failed:
            return None
        failed, self._failed = frozenset(self._failed), set()
        pids = frozenset(self.links[executor].pid for executor in failed)
        return Report(failed, pids, frozenset(i for i, link in enumerate(self.links) if link.channel is None))

    def take_counts(self) -> dict[str, int]:
        """Return the rows x layers attended since the last call, by the executors' own count (first rank only)."""
        new = 0
        for index, link in enumerate(self.links):
            if link.channel is None:
                self._attended[index] = 0
            elif self._counts_rows:
                rows, _ = link.channel.counters
                new += max(0, rows - self._attended[index])
                self._attended[index] = rows
        return {"remote_attention_rows": new}

    def close(self) -> None:
        """Detach from all executors."""
        for link in self.links:
            link.close()


_active: RemoteAttention | None = None


def activate(remote: RemoteAttention | None) -> None:
    """Make `remote` the one of this worker process: vLLM builds the metadata builder itself and passes it nothing."""
    global _active
    _active = remote


def active() -> RemoteAttention | None:
    """Return this worker's remote attention, None before it is attached."""
    return _active
