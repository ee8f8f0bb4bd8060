"""The set-up of an engine by its role: vLLM's classes to use, what is refused, and the start-up checks.

Runs in the process that parses the command line, before there is any engine process. So every refusal is one sentence,
without a traceback. Checked against vllm/engine/arg_utils.py and vllm/config of 0.32 (run) and 0.33 (read).
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_adrenaline.compat import versions
from vllm_adrenaline.config import Options
from vllm_adrenaline.control import addresses, messages, sockets
from vllm_adrenaline.engine import cuda, resources
from vllm_adrenaline.engine.identity import identity_of
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.kv.space import MAX_EXECUTORS
from vllm_adrenaline.native import loader
from vllm_adrenaline.system import cores
from vllm_adrenaline.system.network import address_of

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs

UCX_INTERFACES = "UCX_NET_DEVICES"
"""Environment variable that names the network interfaces at which UCX, and so NIXL, listens."""
LOOPBACK = "lo"
SIDE_CHANNEL_HOST = "VLLM_NIXL_SIDE_CHANNEL_HOST"
"""Environment variable with the address of NIXL's side channel, as in vLLM: there others ask how memory is read."""
WAIT_POLICY = "OMP_WAIT_POLICY"
"""Environment variable that says whether OpenMP's threads spin between two parallel regions, which they do by default,
or sleep. Those that spin take the cores from the other engine (docs/performance.md). Workers inherit it."""
CONNECTOR = "NixlConnector"
"""The name of our connectors, as that of vLLM's which they extend."""
PEERS_START_TOO = "ADRENALINE_PEERS_START_TOO"
"""Environment variable that is set by whoever starts prefill and decode engines together. A decode engine then loads
and compiles its model while its peers do, and waits for them only when it attaches to their executors."""

ENDS_WITH_STARTER = "ADRENALINE_ENDS_WITH_STARTER"
"""Environment variable with the process of LLM(...), which sets it. Its engine core ends with it, however that ends;
vLLM's own goes on when that is killed."""


def check_model(model: str) -> None:
    """Raise AdrenalineError for a local path at which there is nothing. vLLM looks any other name up itself."""
    looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_local and not Path(model).expanduser().exists():
        raise AdrenalineError(f"there is no model at {model}")


def check_nixl() -> None:
    """Raise AdrenalineError if NIXL is not installed."""
    if importlib.util.find_spec("nixl") is None:
        raise AdrenalineError(
            "local requests pull their KV cache through NIXL, which is not installed: pip install nixl"
        )


def apply(args: EngineArgs, options: Options) -> None:
    """Set on `args` what the role needs, and in the environment what NIXL needs.

    Raises:
        AdrenalineError: this vLLM, machine or installation cannot serve, or the user chose what excludes the plugin.
    """
    from vllm.platforms import current_platform

    versions.check_vllm(versions.installed_vllm())
    cuda.check_platform(current_platform, options)
    check_nixl()
    loader.load()
    cores.check(options.executor_cores, args.tensor_parallel_size)
    check_model(args.model)
    taken = {
        "--scheduler-cls": args.scheduler_cls is not None,
        "--worker-cls": args.worker_cls != "auto",
        "--distributed-executor-backend": args.distributed_executor_backend not in (None, "mp"),
        "--data-parallel-size": args.data_parallel_size > 1,
        "--pipeline-parallel-size": args.pipeline_parallel_size > 1,
        "--speculative-config": args.speculative_config is not None,
        "--enable-lora": bool(args.enable_lora),
    }
    for flag, given in taken.items():
        if given:
            raise AdrenalineError(f"{flag} does not go together with --plugin adrenaline, which sets or excludes it")
    if options.experimental_cuda:
        cuda.prepare(args, options)
    prefill = options.role == "prefill"
    package = "vllm_adrenaline.prefill" if prefill else "vllm_adrenaline.decode"
    args.scheduler_cls = f"{package}.scheduler.{'Prefill' if prefill else 'Decode'}Scheduler"
    worker = "gpu_worker.Gpu" if options.experimental_cuda else "worker."
    args.worker_cls = f"{package}.{worker}{'Prefill' if prefill else 'Decode'}Worker"
    if prefill:
        args.distributed_executor_backend = "vllm_adrenaline.prefill.executor.PrefillExecutor"
    args.kv_transfer_config = _kv_transfer_config(args.kv_transfer_config, options)
    # Else NIXL's UCX listens on every interface of the machine, five ports a worker. An operator who serves other
    # machines names the interface; workers inherit it.
    os.environ.setdefault(UCX_INTERFACES, options.interface or LOOPBACK)
    if options.interface:
        os.environ.setdefault(SIDE_CHANNEL_HOST, address_of(options.interface))
    if options.maps:  # two engines share their cores
        os.environ.setdefault(WAIT_POLICY, "passive")


def _kv_transfer_config(given: KVTransferConfig | None, options: Options) -> KVTransferConfig:
    """Return vLLM's configuration of our connector, which goes by the name of the one that it extends.

    Routers and vLLM itself ask for that name (smg, Dynamo; vllm/config/vllm.py). Of what an operator gave, the engine's
    name and NIXL's own settings are kept. Raises AdrenalineError for one that says something else than we do.
    """
    from vllm.config import KVTransferConfig

    role = "kv_producer" if options.role == "prefill" else "kv_consumer"
    extra: dict[str, Any] = {}
    engine: dict[str, str] = {}
    if given is not None:
        if given.kv_connector != CONNECTOR or given.kv_connector_module_path:
            raise AdrenalineError(
                f"--kv-transfer-config names the connector {given.kv_connector!r}, and --plugin adrenaline has its "
                f"own: leave the flag out, or name {CONNECTOR}"
            )
        if given.kv_role not in (None, "kv_both", role):
            raise AdrenalineError(
                f"--kv-transfer-config says {given.kv_role}, and --adrenaline-role {options.role}: kv_both fits both"
            )
        extra = dict(given.kv_connector_extra_config)
        engine = {"engine_id": given.engine_id} if given.engine_id else {}
    if options.role == "prefill":
        extra["kv_lease_duration"] = int(options.claim_seconds)
    return KVTransferConfig(
        kv_connector=CONNECTOR,
        kv_connector_module_path=f"vllm_adrenaline.{options.role}.connector",
        kv_role=role,
        kv_buffer_device="cuda" if options.experimental_cuda else "cpu",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config=extra,
        **engine,
    )


def _unsupported(config: VllmConfig, options: Options) -> Iterator[tuple[str, bool]]:
    """Yield what the plugin does not support, in words, and whether the configuration asks for it."""
    model, parallel = config.model_config, config.parallel_config
    text = model.hf_text_config
    layer_types = set(getattr(text, "layer_types", None) or ())
    yield "context parallelism", max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1
    yield "speculative decoding (--speculative-config)", config.speculative_config is not None
    yield "MLA attention", model.use_mla
    yield "sliding-window attention", bool(model.get_sliding_window()) or bool(layer_types - {"full_attention"})
    yield "models with recurrent state or several KV groups", model.is_hybrid or model.has_inner_state
    yield "encoder-decoder models", model.is_encoder_decoder
    yield "multimodal models", model.is_multimodal_model
    yield "pooling models", model.runner_type != "generate"
    yield "attention logit soft-capping", bool(getattr(text, "attn_logit_softcapping", None))
    yield (
        f"a quantized KV cache (--kv-cache-dtype {config.cache_config.cache_dtype})",
        (config.cache_config.cache_dtype not in ("auto", str(model.dtype).removeprefix("torch."))),
    )
    yield "priority scheduling (--scheduling-policy priority)", config.scheduler_config.policy != "fcfs"
    yield "asynchronous scheduling (--async-scheduling)", bool(config.scheduler_config.async_scheduling)
    yield "dual-batch overlap (--enable-dbo)", parallel.enable_dbo
    if options.experimental_cuda:
        yield from cuda.unsupported(config, options)
    else:
        yield "vLLM's V2 model runner (VLLM_USE_V2_MODEL_RUNNER)", config.use_v2_model_runner


def check_supported(config: VllmConfig, options: Options) -> None:
    """Raise AdrenalineError naming everything in `config` that the plugin does not support."""
    refused = [name for name, present in _unsupported(config, options) if present]
    if refused:
        raise AdrenalineError(f"vllm-adrenaline does not support {', '.join(refused)} yet")


def check_resources(options: Options, config: VllmConfig, warn: Any) -> None:
    """Raise AdrenalineError naming everything of which this machine has too little; `warn` of what makes it slower."""
    wanted, found = resources.wanted(options, config), resources.read()
    for sentence in resources.warnings(wanted, found):
        warn(sentence)
    if refused := resources.refusals(wanted, found):
        raise AdrenalineError("; ".join(refused))


def check_peers(options: Options, config: VllmConfig, say: Any) -> None:
    """Check the other side at start-up.

    A prefill engine's address must be free. A decode engine's peers must answer within `options.connect_timeout`, and
    fit; with PEERS_START_TOO in the environment they are not asked yet.

    Args:
        options: of the engine that starts.
        config: vLLM's, of the same engine.
        say: called with a sentence now and then while peers are waited for.

    Raises:
        AdrenalineError: the check fails.
    """
    sockets.use_keys(options.load_keys())
    if options.role == "prefill":
        sockets.check_free(options.listen_address)
        return
    if len(options.peer_addresses) > MAX_EXECUTORS:
        raise AdrenalineError(f"at most {MAX_EXECUTORS} prefill engines can be peers of one decode engine")
    hello = messages.Hello(identity_of(config), borrows=False)
    for address in options.peer_addresses:
        if PEERS_START_TOO in os.environ:
            continue
        welcome = _await_welcome(address, hello, options.connect_timeout, say)
        if options.uses_executors and not welcome.executors:
            raise no_executors(address)
        if is_far(address, welcome) and options.maps:
            raise cannot_be_mapped(address, welcome)
        if is_far(address, welcome) and options.experimental_cuda:
            raise too_far_for_gpu(address, welcome)
        if is_far(address, welcome) and not options.interface:
            raise out_of_sight(address, welcome)
        sockets.check_welcome(welcome, address, listens_beyond_loopback())


def listens_beyond_loopback() -> bool:
    """Whether NIXL of this process talks to other hosts: the operator named an interface."""
    return os.environ.get(UCX_INTERFACES, LOOPBACK) != LOOPBACK


def no_executors(address: str) -> AdrenalineError:
    """Return the error of a decode engine that needs attention executors where its prefill engine runs none."""
    return AdrenalineError(
        f"the prefill engine at {address} runs no attention executors: start it with --adrenaline-pool remote or both, "
        "or this engine with --adrenaline-pool mapped"
    )


def is_far(address: str, welcome: messages.Welcome) -> bool:
    """Whether the end of the prefill engine at `address` cannot be seen, nor its memory mapped, as on another host."""
    return welcome.vicinity != addresses.vicinity(address)


def executors_of(address: str, welcome: messages.Welcome) -> str:
    """Return in words what a prefill engine's executors run on, and whether that is out of sight."""
    where = addresses.where_is(welcome.vicinity)
    return f"{welcome.executor_share}, {where}" if is_far(address, welcome) else welcome.executor_share


def cannot_be_mapped(address: str, welcome: messages.Welcome) -> AdrenalineError:
    """Return the error of a decode engine that is to map the memory of a prefill engine that is far."""
    return AdrenalineError(
        f"the prefill engine at {address} is {addresses.where_is(welcome.vicinity)}, and its memory cannot be mapped "
        "here: start both with --adrenaline-pool remote, and without --adrenaline-share-weights"
        f"{addresses.how_to_share_memory(welcome.vicinity)}"
    )


def too_far_for_gpu(address: str, welcome: messages.Welcome) -> AdrenalineError:
    """Return the error of a decode engine on a GPU whose prefill engine is far: nothing goes from a GPU to there."""
    return AdrenalineError(
        f"the prefill engine at {address} is {addresses.where_is(welcome.vicinity)}, and from a GPU executors of this "
        f"host alone are used{addresses.how_to_share_memory(welcome.vicinity)}"
    )


def out_of_sight(address: str, welcome: messages.Welcome) -> AdrenalineError:
    """Return the error of a decode engine that names no network to a prefill engine whose processes it cannot see."""
    return AdrenalineError(
        f"the prefill engine at {address} is {addresses.where_is(welcome.vicinity)}: name the network between the two "
        f"with --adrenaline-interface, here and there{addresses.how_to_share_memory(welcome.vicinity)}"
    )


def _await_welcome(address: str, hello: messages.Hello, timeout_s: float, say: Any) -> messages.Welcome:
    started = time.monotonic()
    while True:
        answer = sockets.ask_once(address, hello, timeout_s=min(2.0, max(timeout_s, 0.1)))
        if isinstance(answer, messages.Welcome):
            return answer
        if isinstance(answer, messages.Refused):
            raise AdrenalineError(f"the prefill engine at {address} does not fit this decode engine: {answer.reason}")
        waited = time.monotonic() - started
        if waited >= timeout_s:
            raise AdrenalineError(
                f"no prefill engine answers at {address} (waited {waited:.0f} s): start one with --adrenaline-role "
                f"prefill --adrenaline-listen {address}, or correct --adrenaline-peers"
            )
        say(f"waiting for the prefill engine at {address} ({waited:.0f} s)")
