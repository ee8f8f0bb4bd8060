"""The prefill engine's worker on CUDA: vLLM's GPU worker, which can tell where its KV cache is.

Its attention is vLLM's own, in CUDA graphs or not. Checked against vllm/v1/worker/gpu_worker.py of 0.32 and 0.33: read,
not run. It must not import vLLM's CPU worker, which takes parts of torch.cuda away.
"""

from __future__ import annotations

import os

import torch

from vllm_adrenaline.engine import cuda
from vllm_adrenaline.prefill.gpu_export import describe
from vllm_adrenaline.prefill.worker_base import ExportingWorker


class GpuPrefillWorker(ExportingWorker):
    """vLLM's GPU worker with `export_memory`. The KV cache is told by the GPU's handle: no file is passed for it."""

    def export_memory(self) -> bytes:
        connector, layers, caches = self.attention()
        cuda.check_cache(self.model_runner.attn_groups, caches.values(), self.cache_config.block_size)
        shared = connector.gpu_kv
        assert shared is not None, "vLLM has allocated the KV cache"
        cpus, device = sorted(os.sched_getaffinity(0)), torch.cuda.current_device()
        kv = describe(shared, caches, layers, self.model_config.dtype, device, cpus)
        return self.introduce(kv, None, [])
