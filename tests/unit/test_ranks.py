"""What all ranks of a tensor-parallel decode engine must agree on: which rows of a step are worthless."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_adrenaline.decode.remote_attention import RemoteAttention
from vllm_adrenaline.kv.space import mapped_id, mapped_pool, remote_id
from vllm_adrenaline.placement.patience import Patience

BLOCK = 32


class Ranks:
    """Two ranks of a decode engine that ask at once; `away`: by rank, the executors that are not there."""

    def __init__(self, away: list[set[int]]) -> None:
        self._barrier, self._asked = threading.Barrier(2), [torch.zeros(0)] * 2
        self._rank = threading.local()
        self.remotes = [self._remote(executors) for executors in away]
        self.members: list[dict[int, str]] = [{}, {}]
        self.group: Any = SimpleNamespace(world_size=2, cpu_group="of the processors")

    def _remote(self, away: set[int]) -> RemoteAttention:
        links: list[Any] = [
            SimpleNamespace(
                channel=None if e in away else object(), is_writing=False, attended=(0, 0, 0), take_hung=lambda: 0
            )
            for e in range(3)
        ]
        transport: Any = SimpleNamespace(send=None, receive=None, begin=lambda *_: None, end=lambda: 0, times_ns=(0, 0))
        mapped: Any = SimpleNamespace(
            bases=[100, 200], use=lambda members: {engine: member != "gone" for engine, member in members.items()}
        )
        return RemoteAttention(links, transport, mapped, ["a"], BLOCK, counts_rows=False, patience=Patience(1.0))

    def all_reduce(self, tensor: torch.Tensor, op: Any, group: Any) -> None:
        assert (op, group) == (torch.distributed.ReduceOp.MAX, self.group.cpu_group)
        self._asked[self._rank.number] = tensor.clone()
        self._barrier.wait(5)
        tensor.copy_(torch.maximum(*self._asked))

    def failed_rows(self, executor_of: list[int | None], mapped: bool = False) -> list[list[int]]:
        """Return what each rank takes for failed in a step whose rows are attended by these executors, or locally.

        `mapped`: the rows beside executors are attended by the decode engine itself.
        """
        block = mapped_id if mapped else remote_id
        answers: list[list[int]] = [[], []]

        def run(rank: int) -> None:
            self._rank.number = rank
            remote, rows = self.remotes[rank], len(executor_of)
            table = torch.tensor([[1 if e is None else block(e, 1)] * 2 for e in executor_of], dtype=torch.int32)
            common = SimpleNamespace(
                num_reqs=rows,
                block_table_tensor=table,
                query_start_loc=torch.arange(rows + 1, dtype=torch.int32),
                seq_lens=torch.full((rows,), 5, dtype=torch.int32),
                slot_mapping=torch.zeros(rows, dtype=torch.int64),
                replace=lambda **_: None,
            )
            remote.begin_step(frozenset(), self.members[rank], {})
            remote.split(common)
            answers[rank] = remote.agree_on_failed_rows(self.group)

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers


@pytest.mark.parametrize(
    ("away", "failed"),
    [([set(), set()], []), ([set(), {1}], [1, 4]), ([{0}, {1}], [0, 1, 4]), ([{2}, set()], []), ([{1}, {1}], [1, 4])],
)
def test_all_ranks_agree_on_the_rows_that_failed_on_any_of_them(
    monkeypatch: pytest.MonkeyPatch, away: list[set[int]], failed: list[int]
) -> None:
    """Or one rank's random generators would be a number ahead for ever."""
    ranks = Ranks(away)
    monkeypatch.setattr(torch.distributed, "all_reduce", ranks.all_reduce)
    assert [sorted(rows) for rows in ranks.failed_rows([0, 1, None, None, 1])] == [failed, failed]
    ranks.remotes = [ranks._remote(set()) for _ in range(2)]
    assert ranks.failed_rows([None, None]) == [[], []], "nobody asks about a step that is local"


def test_rows_whose_memory_one_rank_could_not_map_are_worthless_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks([set(), set()])
    ranks.members = [{0: "here", 1: "here"}, {0: "here", 1: "gone"}]
    monkeypatch.setattr(torch.distributed, "all_reduce", ranks.all_reduce)
    assert ranks.failed_rows([0, 1, None, 1], mapped=True) == [[1, 3], [1, 3]]
    ranks.members = [{0: "here"}] * 2
    assert ranks.failed_rows([0, None], mapped=True) == [[], []]


def test_memory_that_could_not_be_mapped_is_told_even_if_no_row_of_this_step_is_there() -> None:
    """Else every step would ask again, and wait."""
    ranks = Ranks([{0, 1, 2}, set()])
    ranks.remotes[0].begin_step(frozenset(), {0: "here", 1: "gone"}, {})
    report = ranks.remotes[0].take_report()
    assert report is not None
    assert report.failed == {mapped_pool(1)}
