"""What prefill workers on CPU and on a GPU have in common: one more remote call, which tells where their memory is.

Checked against vllm/v1/worker/gpu_worker.py of 0.32 (run on CPU, whose worker extends it) and 0.33 (read).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec
import torch
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.v1.worker.gpu_worker import Worker

from vllm_adrenaline.config import Options
from vllm_adrenaline.control import addresses
from vllm_adrenaline.control.kv_export import GpuKVExport, KVExport
from vllm_adrenaline.control.messages import SharedWeights, WorkerExport
from vllm_adrenaline.engine.layers import layers_of
from vllm_adrenaline.system import descriptors

if TYPE_CHECKING:
    from vllm.model_executor.layers.attention import Attention

    from vllm_adrenaline.prefill.connector import PrefillConnector


class ExportingWorker(Worker):
    """A worker of vLLM that can tell where its memory is. What it runs on, a subclass says."""

    def export_memory(self) -> bytes:
        """Return the WorkerExport of this worker as msgpack, for it crosses vLLM's own worker RPC.

        The engine core has the descriptors by then.

        Raises:
            AdrenalineError: the model's attention or its KV cache is of a kind that executors cannot attend, or nobody
                takes the descriptors.
        """
        raise NotImplementedError

    def attention(self) -> tuple[PrefillConnector, dict[str, Attention], dict[str, torch.Tensor]]:
        """Return our connector, and by name, in the order of their numbers: the attention layers, and their KV caches.

        Raises AdrenalineError for a model with several groups of layers.
        """
        connector: PrefillConnector = get_kv_transfer_group()
        names = layers_of(self.model_runner.kv_cache_config)
        context = self.vllm_config.compilation_config.static_forward_context
        layers: dict[str, Attention] = {name: context[name] for name in names}
        return connector, layers, {name: connector.connector_worker.kv_caches[name] for name in names}

    def introduce(self, kv: KVExport | GpuKVExport, weights: SharedWeights | None, files: Sequence[int]) -> bytes:
        """Pass this process's pidfd and `files` to the engine core; return the WorkerExport, as `export_memory` does.

        Raises AdrenalineError if nobody takes them.
        """
        address = addresses.for_descriptors(Options.of(self.vllm_config).listen_address)
        token, theirs = descriptors.introduce(address, files)
        descriptors.close(theirs)
        return msgspec.msgpack.encode(WorkerExport(kv, weights, token))
