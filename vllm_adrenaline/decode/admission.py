"""A decode engine's admission: the pure one, told in plain numbers what vLLM's scheduler, pools and reports say.

What is decided, and when, is in placement/admission.py. The scheduler is the only caller, from one thread.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from vllm_adrenaline.colocation.recent_steps import RecentSteps
from vllm_adrenaline.placement.admission import Admission, Settings
from vllm_adrenaline.placement.batch import Batch
from vllm_adrenaline.placement.pools import ExecutorPool, LocalPool, Pools

if TYPE_CHECKING:
    from vllm_adrenaline.config import Options
    from vllm_adrenaline.decode.blocks import RemotePool
    from vllm_adrenaline.decode.report import Report
    from vllm_adrenaline.placement.costs import Costs


class EngineAdmission(Admission):
    """Admission with the eyes of a decode engine, and with the metrics that it reports.

    Attributes:
        maps: whether this engine maps the memory of prefill engines.
        recent_steps: the lengths of the last steps.
    """

    def __init__(self, options: Options, costs: Costs, local_blocks: int, block_size: int, max_rows: int) -> None:
        settings = Settings(block_size, max_rows, options.offload_rule, options.tpot_slo_ms / 1000 or None)
        super().__init__(settings, costs, options.ratio)
        self._local_blocks = local_blocks
        self.maps, self._uses_executors = options.maps, options.uses_executors
        self.recent_steps = RecentSteps()
        self._last_batch = Batch()
        self._remote_tokens = 0

    def pools(
        self, free: int, remote: Sequence[RemotePool], unavailable: Collection[int], mappable: Collection[int]
    ) -> Pools:
        """Return the memory of all engines as it is now.

        An executor is available if it answers, and if its prefill engine cannot have taken back what we have there.

        Args:
            free: Free local blocks.
            remote: What we have of each prefill engine. The place in the list is the executor's number.
            unavailable: Executors that did not answer.
            mappable: Prefill engines whose memory may be mapped.
        """
        now = time.monotonic()
        executors = [
            ExecutorPool(
                total=pool.client.load.total,
                free=pool.client.load.free,
                reserve=pool.client.load.reserve,
                leased=len(pool.free),
                available=self._uses_executors and pool.executor not in unavailable and pool.holds(now),
                mappable=self.maps and pool.executor in mappable and pool.holds(now),
                busy=pool.client.load.busy,
                recalls=pool.client.load.recalls,
            )
            for pool in remote
        ]
        return Pools(LocalPool(self._local_blocks, free), executors)

    @property
    def gauges(self) -> dict[str, float]:
        """What is believed at present (vllm_adrenaline/engine/metrics.py, GAUGES)."""
        costs, batch = self.feedback.costs, self._last_batch
        return {
            "local_attention_seconds_per_token": costs.local,
            "remote_attention_seconds_per_token": max(costs.remote, default=0.0),
            "step_seconds_without_attention": costs.other(batch.rows),
            "offload_bound_ratio": self.bound,
            "local_rows": batch.local.rows,
            "mapped_rows": batch.mapped_rows,
            "offloaded_rows": batch.rows - batch.local.rows - batch.mapped_rows,
        }

    def observe(self, batch: Batch, report: Report | None, seconds: float, executors: int) -> None:
        """Take a step that decoded `batch`; `seconds` is 0 when it computed prompts as well."""
        self._last_batch = batch
        self._remote_tokens += sum(batch.remote_tokens(executors))
        times: Mapping[int, float] = report.remote if report is not None else {}
        self.observe_step(
            batch,
            total=seconds,
            local=report.local if report is not None else 0.0,
            remote=[times.get(executor, 0.0) for executor in range(executors)],
            exposed=report.exposed if report is not None else 0.0,
        )

    def take_metrics(self) -> dict[str, float]:
        """Return what was decided and attended since the last call, as counters (vllm_adrenaline/engine/metrics.py)."""
        tokens, self._remote_tokens = self._remote_tokens, 0
        counts = self.take_counts()
        decided = {f"placements/{placement}/{reason}": float(count) for (placement, reason), count in counts.items()}
        return decided | {"remote_attention_tokens": float(tokens)}
