"""What the plugin leans on in vLLM that its own syntax trees do not show. Each entry says who uses it.

Everything else is derived from them (derive.py). What is patched is listed in the ledger, and taken from there.
"""

from __future__ import annotations

from collections.abc import Iterator

from vllm_adrenaline.compat.ledger import LEDGER, NIXL
from vllm_adrenaline.seams.needs import Need, Override
from vllm_adrenaline.seams.signature import Call, Signature

TYPES = {
    "vllm.config.compilation:CompilationConfig.static_forward_context[]": (
        "vllm.model_executor.layers.attention:Attention"
    ),
    "vllm.model_executor.layers.attention.attention:Attention.impl": (
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl"
    ),
    "vllm.v1.core.sched.output:SchedulerOutput.kv_connector_metadata": f"{NIXL}.metadata:NixlConnectorMetadata",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.model": (
        "vllm.model_executor.models.interfaces_base:VllmModelForTextGeneration"
    ),
    "vllm.distributed.kv_transfer.kv_connector.v1.metrics:KVConnectorStats.data[]": "",
}
"""The classes of what vLLM does not annotate, or says `Any` of: by where an attribute is defined, and with "[]" of its
elements. "" stands for data that is not vLLM's."""

ATTACHED = {
    f"{NIXL}.metadata:NixlConnectorMetadata.members": "decode/connector.py",
    f"{NIXL}.metadata:NixlConnectorMetadata.received": "decode/connector.py",
    f"{NIXL}.metadata:NixlConnectorMetadata.let_go": "prefill/connector.py",
    "vllm.model_executor.layers.attention.attention:Attention.isa": "vLLM itself, cpu_attn.py: see TEXTS",
}
"""Attributes that objects of vLLM's get and its classes do not have, and who sets them."""

BACKENDS = "vllm.v1.attention.backends"
CACHE_UPDATE = "forward_includes_kv_cache_update: bool = False"
MASKING = "decode/remote_attention.py, decode/device_split.py: what is masked before a step's metadata is built"
NIXL_PARAMS = ("remote_engine_id", "remote_request_id", "remote_host", "remote_port", "remote_block_ids", "tp_size")
METRICS = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions")
TEXTS = {
    f"{BACKENDS}.cpu_attn": {"layer.isa = ": "decode/backends/cpu.py, prefill/worker.py", CACHE_UPDATE: MASKING},
    f"{BACKENDS}.flash_attn": {CACHE_UPDATE: MASKING},
    f"{BACKENDS}.triton_attn": {CACHE_UPDATE: MASKING},
    f"{BACKENDS}.flashinfer": {
        CACHE_UPDATE: MASKING,
        "seq_lens_cpu = common_attn_metadata.seq_lens_cpu_upper_bound": MASKING,
    },
    "vllm.v1.worker.utils": {"torch.zeros(buf_size, dtype=torch.int8": "kv/sharing.py"},
    "vllm.config.vllm": {"requires_piecewise_for_cudagraph(": "decode/connector.py"},
    "vllm.config.cache": {"user_specified_block_size": "engine/cuda.py, BLOCK_SIZE: what is given is not changed"},
    "vllm.plugins": {'"vllm.general_plugins"': "pyproject.toml, the entry point"},
    "vllm.v1.metrics.loggers": {f'"vllm:{name}"': "launch/engine_metrics.py, launch/status.py" for name in METRICS},
    f"{NIXL}.pull_scheduler": {f'"{name}"': "decode/request.py, pull" for name in NIXL_PARAMS[:-1]}
    | {f'params.get("{name}")': "decode/request.py, pull" for name in ("do_remote_prefill", "do_remote_decode")},
    f"{NIXL}.base_scheduler": {f'"{NIXL_PARAMS[-1]}"': "decode/request.py, pull"},
    f"{NIXL}.pull_worker": {'startswith("HB:")': "decode/request.py, READ_BY_NOBODY"},
}
"""What stands in the source of modules and is no name there: keys, metrics, environment variables' names, calls. By
module, and by text who leans on it."""

PLACES = (
    {
        "vllm.entrypoints.openai.api_server:": "launch/engine_command.py",
        "vllm.v1.worker.utils:allocate_kv_cache": "kv/sharing.py",
        "vllm.v1.core.block_pool:BlockPool().blocks": "prefill/leases.py, prefill/connector.py",
        "vllm.v1.attention.backend:CommonAttentionMetadata()._num_computed_tokens_cache": "decode/device_split.py",
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner().attn_groups": "engine/cuda.py, check_cache, with runner V2",
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner().kv_cache_config": "prefill/worker_base.py, with runner V2",
        "vllm.v1.worker.gpu.sample.gumbel:gumbel_sample": "decode/worker_base.py, sample_tokens: by seed and position",
        f"{NIXL}.base_worker:NixlBaseConnectorWorker()._nixl_handshake": "compat/side_channel.py, which answers it",
        f"{NIXL}.base_scheduler:NixlBaseConnectorScheduler()._nixl_handshake_listener": "compat/side_channel.py",
    }
    | {
        f"vllm.engine.arg_utils:EngineArgs().{flag}": "flags of launch/, bench/"
        for flag in (
            "gpu_memory_utilization",
            "kv_cache_memory_bytes",
            "num_gpu_blocks_override",
            "max_model_len",
            "dtype",
        )
    }
    | {
        f"{BACKENDS}.cpu_attn:CPUAttentionMetadata().{name}": "decode/backend.py"
        for name in ("block_table", "seq_lens", "query_start_loc")
    }
)
"""What is used by name, or behaves as we count on, though no code of ours mentions it."""

ENGINE_ARGS = "vllm.engine.arg_utils:EngineArgs"
REPLACED = {
    f"{ENGINE_ARGS}.add_cli_args": ("staticmethod", "(parser)", "compat/engine_args.py, adding"),
    f"{ENGINE_ARGS}.from_cli_args": ("classmethod", "(args)", "compat/engine_args.py, taking"),
    f"{ENGINE_ARGS}().create_engine_config": (
        "method",
        "(usage_context=None, headless=False)",
        "compat/engine_args.py, creating",
    ),
    "vllm.distributed.device_communicators.shm_broadcast:SpinCondition().wait": (
        "method",
        "(timeout_ms=None)",
        "compat/message_queue.py, sleeping",
    ),
    "vllm.v1.worker.gpu.block_table:BlockTables().append_block_ids": (
        "method",
        "(req_index, new_block_ids, overwrite)",
        "compat/block_tables.py",
    ),
    "vllm.v1.worker.cpu_worker:CPUWorker().compile_or_warm_up_model": (
        "method",
        "()",
        "bench/baseline/adrenaline_bench_baseline.py, settled",
    ),
}
"""What is replaced while vLLM runs: the kind and the signature of what takes its place, and where that is."""

REPLACED_LATER = {
    f"{BACKENDS}.{backend}().supports_kv_cache_update_bypass"
    for backend in (
        "cpu_attn:CPUAttentionBackend",
        "flash_attn:FlashAttentionBackend",
        "flashinfer:FlashInferBackend",
        "triton_attn:TritonAttentionBackend",
    )
}
"""What versions after the one that we run with have, and ours is meant to take the place of."""

BLOCK_POOL = "vllm.v1.core.block_pool:BlockPool()"
CALLED = {
    f"{BLOCK_POOL}.{name}": Call(count)
    for name, count in (("touch", 1), ("get_num_free_blocks", 0), ("get_new_blocks", 1), ("free_blocks", 1))
}
"""The methods of vLLM's that prefill/leases.py lists in its protocol `Pool`, and how they are called."""

MADE_BY_US = {"vllm.v1.core.kv_cache_utils:KVCacheBlock"}
"""Classes of which vLLM never makes our subclass: its constructor may take what it likes."""


def declared() -> Iterator[Need]:
    """Yield what is listed here and in the ledger."""
    for module, texts in TEXTS.items():
        for text, user in texts.items():
            yield Need(f"{module}:~{text}", user)
    for path, user in PLACES.items():
        yield Need(path, user)
    for path, call in CALLED.items():
        yield Need(path, "prefill/leases.py, decode/blocks.py", call)
    for path, (kind, signature, user) in REPLACED.items():
        yield Need(path, user, override=Override(kind, Signature(signature)))
    for patch in LEDGER:
        ours = f"compat/{patch.room}.py"
        targets = [target for target in patch.targets if target.startswith("vllm.")]
        for target in targets:
            yield Need(target, ours)
        for name in patch.names:
            yield Need(f"{targets[0].partition(':')[0]}:~{name}", ours)
