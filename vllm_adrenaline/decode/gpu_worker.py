"""The decode engine's worker on CUDA: vLLM's GPU worker, whose attention runs partly in attention executors.

Checked against vllm/v1/worker/gpu_worker.py, gpu_model_runner.py and gpu/model_runner.py of 0.32 and 0.33: read, not
run. It must not import vLLM's CPU worker, which takes parts of torch.cuda away.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer import get_kv_transfer_group

from vllm_adrenaline.compat.block_tables import BlockTablesOnHost
from vllm_adrenaline.config import Options
from vllm_adrenaline.decode import backend
from vllm_adrenaline.decode.device_split import BatchTables, DeviceRemoteAttention, HostTables, RequestTables
from vllm_adrenaline.decode.masked_batch import MaskedBatch
from vllm_adrenaline.decode.worker_base import OffloadingWorker
from vllm_adrenaline.engine import cuda
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.native import cuda_library
from vllm_adrenaline.native.cuda_channel import ChannelKernels
from vllm_adrenaline.placement.patience import Patience
from vllm_adrenaline.transport.channel import StepTransport
from vllm_adrenaline.transport.gpu import GpuSteps

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from vllm_adrenaline.decode.connector import DecodeConnector

logger = logging.getLogger("vllm.adrenaline")


def _v2(runner: Any) -> GPUModelRunner:
    """Return a model runner that is V2. vLLM's worker says of both that they are V1."""
    return runner


class GpuDecodeWorker(OffloadingWorker):
    """vLLM's GPU worker whose attention runs partly in attention executors. It maps no memory of prefill engines."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        backend.override(*cuda.BACKENDS)
        super().__init__(*args, **kwargs)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Have the KV cache allocated, attach to the executors, and have steps split."""
        super().initialize_from_config(kv_cache_config)
        options, config = Options.of(self.vllm_config), self.vllm_config
        connector: DecodeConnector = get_kv_transfer_group()
        block_size = config.cache_config.block_size
        cuda.check_cache(self.model_runner.attn_groups, connector.connector_worker.kv_caches.values(), block_size)
        self._check_graphs()
        tables, width = self._host_tables()
        kernels = ChannelKernels(cuda_library.load().path)
        attached = self.attach(kv_cache_config, width, kernels)
        shape = attached.shape
        steps: StepTransport[Any] = GpuSteps(shape, len(attached.layers))
        remote = DeviceRemoteAttention(
            attached.links,
            steps,
            None,
            attached.layers,
            block_size,
            counts_rows=self.rank == 0,
            patience=Patience(options.executor_timeout),
            tables=tables,
            masked=MaskedBatch(shape.max_rows, shape.max_tokens, width, self.device),
        )
        self.begin_to_offload(remote)

    def _host_tables(self) -> tuple[HostTables, int]:
        """Return the model runner's block tables on the host, and their columns. No request may have come yet."""
        if not self.use_v2_model_runner:
            width: int = self.model_runner.input_batch.block_table[0].max_num_blocks_per_req
            return BatchTables(self.model_runner), width
        on_host = BlockTablesOnHost(_v2(self.model_runner).block_tables)
        return RequestTables(on_host), on_host.ids.shape[1]

    def row_of(self) -> dict[str, int]:
        if not self.use_v2_model_runner:
            return super().row_of()
        rows: dict[str, int] = _v2(self.model_runner).req_states.req_id_to_index
        return rows

    def _check_graphs(self) -> None:
        """Make sure that attention stays outside of CUDA graphs, and say so.

        What is captured would send the rows of the step in which it was captured, ever again. vLLM settles the mode
        once it knows that our backends are not to be captured (decode/backend.py).

        Raises:
            AdrenalineError: attention is to be captured all the same.
        """
        mode = self.vllm_config.compilation_config.cudagraph_mode
        if mode.has_full_cudagraphs():
            raise AdrenalineError(
                f"attention would be in CUDA graphs (cudagraph_mode {cuda.name_of(mode)}): give PIECEWISE"
            )
        logger.info(
            "CUDA graphs: %s, without attention: in each step it sends other rows to executors (docs/gpu-engine.md)",
            cuda.name_of(mode),
        )
