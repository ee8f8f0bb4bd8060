"""CUDA MPS: several processes share a GPU's SMs, each limited to a percentage.

By NVIDIA's documentation ("Multi-Process Service", sections on nvidia-cuda-mps-control and
CUDA_MPS_ACTIVE_THREAD_PERCENTAGE); tested against fakes of it, not run on a GPU yet (docs/gpu-status.md).
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from vllm_adrenaline.errors import AdrenalineError

CONTROL = "nvidia-cuda-mps-control"
PIPES = "CUDA_MPS_PIPE_DIRECTORY"
PERCENTAGE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
DEFAULT_PIPES = "/tmp/nvidia-mps"
TIMEOUT_S = 5.0
ADVICE = f"start it with `{CONTROL} -d`, as the user that runs the engines"

Ask = Callable[[str, Mapping[str, str]], str]
"""Sends one command to the control daemon; returns its answer or raises OSError or subprocess.SubprocessError."""


def ask_daemon(command: str, env: Mapping[str, str]) -> str:
    """Ask the MPS control daemon, as a shell would: the command on its standard input."""
    done = subprocess.run(
        [CONTROL], input=command + "\n", capture_output=True, text=True, timeout=TIMEOUT_S, check=True, env=dict(env)
    )
    return done.stdout


def preflight(env: Mapping[str, str], ask: Ask = ask_daemon) -> None:
    """Raise AdrenalineError, saying what to do, unless the control daemon answers."""
    pipes = Path(env.get(PIPES, DEFAULT_PIPES))
    if not (pipes / "control").exists():
        raise AdrenalineError(f"CUDA MPS is not running (no daemon at {pipes}): {ADVICE}")
    try:
        ask("get_server_list", env)
    except FileNotFoundError:
        raise AdrenalineError(f"{CONTROL} is not installed: it comes with the NVIDIA driver") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise AdrenalineError(f"the CUDA MPS daemon at {pipes} does not answer ({error}): {ADVICE}") from None


def environment(share: float) -> dict[str, str]:
    """Return what a process needs in its environment, before CUDA starts in it, to get a share of the SMs."""
    if not 0 < share <= 1:
        raise AdrenalineError(f"a share of a GPU is more than 0 and at most 1, not {share:g}")
    return {PERCENTAGE: str(max(1, round(100 * share)))}
