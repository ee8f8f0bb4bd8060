"""The report of a decode worker to its scheduler, at the end of a step.

Checked against vllm/distributed/kv_transfer/kv_connector/v1/base.py of 0.32 (run) and 0.33 (read).
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata


@dataclass
class Report(KVConnectorWorkerMetadata):
    """What a worker tells the scheduler at the end of a step.

    Times are seconds since the worker's last report. A step without remote rows adds nothing to them.

    Attributes:
        failed: pools whose rows are worthless in the step: their executor failed, or their memory is not mapped.
        writing: executors that failed and may still write for us: blocks of theirs are nobody's until they let go.
        hung: those of them that are to be killed, for they do not let go, each with its process.
        unavailable: executors to which the worker is not attached.
        local: local attention of steps with remote rows.
        remote: attention of each executor that had any.
        exposed: waiting for executors with nothing else to do.
    """

    failed: frozenset[int]
    writing: frozenset[int]
    hung: frozenset[tuple[int, int]]
    unavailable: frozenset[int]
    local: float
    remote: dict[int, float]
    exposed: float

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Report:
        assert isinstance(other, Report)
        return Report(
            self.failed | other.failed,
            self.writing | other.writing,
            self.hung | other.hung,
            self.unavailable | other.unavailable,
            max(self.local, other.local),
            {e: max(self.remote.get(e, 0.0), other.remote.get(e, 0.0)) for e in {*self.remote, *other.remote}},
            max(self.exposed, other.exposed),
        )
