"""The prefill engine's worker on CPU: vLLM's CPU worker, which can tell where its KV cache and its weights are.

Checked against vllm/v1/worker/cpu_worker.py of 0.32 (run) and 0.33 (read).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_adrenaline.compat import weight_memory
from vllm_adrenaline.compat.cpu_attention import allow_amx
from vllm_adrenaline.compat.sampling import without_generators
from vllm_adrenaline.compat.worker_cores import settle_worker
from vllm_adrenaline.config import Options
from vllm_adrenaline.control.kv_export import KVExport, LayerSpec
from vllm_adrenaline.control.messages import SharedWeights
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.prefill import offered_weights, profiling
from vllm_adrenaline.prefill.worker_base import ExportingWorker
from vllm_adrenaline.system.priority import come_first
from vllm_adrenaline.weights import sharing
from vllm_adrenaline.weights.regions import regions_of

if TYPE_CHECKING:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl


class PrefillWorker(ExportingWorker, CPUWorker):
    """vLLM's CPU worker with one more remote call, `export_memory`.

    It also stays on its cores (compat/worker_cores.py), measures a profile when it starts, and samples as described in
    compat/sampling.py.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        settle_worker()
        allow_amx()
        super().__init__(*args, **kwargs)
        self._weights: sharing.Moved | None = None

    def load_model(self, **kwargs: Any) -> None:
        """Load the model. Then move its weights to where decode engines can map them."""
        options = Options.of(self.vllm_config)
        if not options.uses_executors:
            come_first()  # as decode workers do, with which it shares the device: else it would hardly get it
        if not options.shares_weights:
            super().load_model(**kwargs)
            return
        with weight_memory.followed() as locate:
            super().load_model(**kwargs)
        self._weights = offered_weights.move(regions_of(self.model_runner.get_model(), locate), options)

    def compile_or_warm_up_model(self) -> Any:
        """Measure, then warm up. In this order, for vLLM ends its warm-up with a fresh random seed."""
        profiling.measure(self.vllm_config, Options.of(self.vllm_config), self.model_runner)
        return super().compile_or_warm_up_model()

    def sample_tokens(self, grammar_output: Any) -> Any:
        with without_generators(self.model_runner):
            return super().sample_tokens(grammar_output)

    def export_memory(self) -> bytes:
        settle_worker()
        kv, files = self._export_kv()
        weights = None
        if (moved := self._weights) is not None:
            weights = SharedWeights(moved.size, moved.table)
            files.append(moved.fd)
        return self.introduce(kv, weights, files)

    def _export_kv(self) -> tuple[KVExport, list[int]]:
        """Return how this worker's KV cache is read, and its memory file."""
        connector, layers, caches = self.attention()
        shared = connector.shared_kv
        assert shared is not None, "vLLM has allocated the KV cache"
        for layer in layers.values():
            impl: CPUAttentionBackendImpl = layer.impl
            if (
                impl.alibi_slopes is not None
                or impl.sinks is not None
                or impl.logits_soft_cap
                or impl.sliding_window != -1
            ):
                raise AdrenalineError(
                    f"{layer.layer_name} uses ALiBi, sinks, soft-capping or a window: not supported yet"
                )
        first, cache = next(iter(layers.values())), next(iter(caches.values()))
        blocks, heads, block_size, double = cache.shape
        view = cache.view(blocks, heads, 2 * block_size, double // 2)
        export = KVExport(
            size=shared.size,
            shape=list(view.shape),
            strides=list(view.stride()),
            dtype=str(view.dtype).removeprefix("torch."),
            isa=first.isa,
            num_heads=first.impl.num_heads,
            layers=[LayerSpec(name, shared.offset(caches[name]), layer.impl.scale) for name, layer in layers.items()],
            cpus=sorted(os.sched_getaffinity(0)),
            threads=torch.get_num_threads(),
        )
        return export, [shared.fd]
