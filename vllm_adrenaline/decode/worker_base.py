"""What decode workers on CPU and on a GPU have in common: links to the attention executors, and a step's begin and end.

Checked against vllm/v1/worker/gpu_worker.py of 0.32 (run on CPU, whose worker extends it) and 0.33 (read).
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.worker.gpu_worker import Worker

from vllm_adrenaline.compat.sampling import without_generators
from vllm_adrenaline.config import Options
from vllm_adrenaline.control import messages, sockets
from vllm_adrenaline.decode import remote_attention
from vllm_adrenaline.decode.link import Link
from vllm_adrenaline.engine.identity import identity_of
from vllm_adrenaline.engine.layers import layers_of
from vllm_adrenaline.native.cuda_channel import ChannelKernels
from vllm_adrenaline.transport.shape import Shape

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from vllm_adrenaline.decode.connector import DecodeConnector
    from vllm_adrenaline.decode.remote_attention import RemoteAttention


@dataclass(frozen=True)
class Attached:
    """What a worker has of its executors.

    Attributes:
        links: to each of them, attached; none if this engine uses none.
        layers: names of the attention layers, in the order of their numbers.
        shape: of the channels.
        identity: of this engine.
        deadline: until when prefill engines are waited for that start as this one does, in seconds (monotonic).
    """

    links: list[Link]
    layers: list[str]
    shape: Shape
    identity: messages.Identity
    deadline: float


class OffloadingWorker(Worker):
    """A worker of vLLM whose attention runs partly elsewhere. What it runs on, a subclass says.

    Attributes:
        remote: its remote attention; None before it is attached to the executors, and has mapped what it maps.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.remote: RemoteAttention | None = None

    def row_of(self) -> dict[str, int]:
        """Return the model runner's live map of request to row, or to what else it knows a request by."""
        rows: dict[str, int] = self.model_runner.input_batch.req_id_to_index
        return rows

    def attach(
        self, kv_cache_config: KVCacheConfig, block_table_width: int, kernels: ChannelKernels | None = None
    ) -> Attached:
        """Attach to the executor of this rank behind each prefill engine, if this engine uses executors.

        Args:
            kv_cache_config: of this engine, allocated.
            block_table_width: columns of the model runner's block table.
            kernels: of channels through GPU memory, on a GPU.

        Raises:
            AdrenalineError: an executor does not answer, or does not fit, or the model has several groups of layers.
        """
        options, config, model = Options.of(self.vllm_config), self.vllm_config, self.vllm_config.model_config
        sockets.use_keys(options.load_keys())
        layers = layers_of(kv_cache_config)
        shape = Shape(
            max_rows=config.scheduler_config.max_num_seqs,
            max_tokens=config.scheduler_config.max_num_batched_tokens,
            max_blocks=block_table_width,
            num_heads=model.get_num_attention_heads(self.parallel_config),
            num_kv_heads=model.get_num_kv_heads(self.parallel_config),
            head_size=model.get_head_size(),
            dtype=model.dtype,
        )
        identity, engine = identity_of(config), config.kv_transfer_config.engine_id
        timeout, interface = options.executor_timeout, options.interface
        links = [
            Link(address, identity, engine, self.rank, layers, shape, timeout, interface, kernels)
            for address in (options.peer_addresses if options.uses_executors else [])
        ]
        deadline = time.monotonic() + max(options.connect_timeout, 1.0)
        for link in links:
            link.attach_until(deadline)
        return Attached(links, layers, shape, identity, deadline)

    def begin_to_offload(self, remote: RemoteAttention) -> None:
        """Have steps split from now on."""
        connector: DecodeConnector = get_kv_transfer_group()
        self.remote = remote
        remote_attention.activate(remote)
        connector.connector_worker.remote = remote

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        meta = scheduler_output.kv_connector_metadata
        if self.remote is not None and meta is not None:  # None: vLLM warms up with a step that no scheduler made
            self.remote.begin_step(meta.received, meta.members, self.row_of())
        return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        if self.use_v2_model_runner:  # it draws by seed and position: who draws once more draws the same
            return super().sample_tokens(grammar_output)
        failed: Collection[int] = ()
        # Without generators no rank asks: a step costs nothing for it then.
        if self.remote is not None and self.model_runner.input_batch.generators:
            failed = self.remote.agree_on_failed_rows(get_tp_group())
        with without_generators(self.model_runner, failed):
            return super().sample_tokens(grammar_output)

    def shutdown(self) -> None:
        if self.remote is not None:
            remote_attention.activate(None)
            self.remote.close()
        super().shutdown()
