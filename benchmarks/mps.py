"""What benchmarks of two processes on one GPU have in common: their options, and an MPS daemon of their own.

Without MPS the processes take turns of some milliseconds. The daemon sets nothing on the GPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import report
import torch

UNDER_MPS = "ADRENALINE_MPS"
"""Environment variable that is set where the daemon runs."""


def options_of(program: str, description: str, quick: str) -> argparse.Namespace:
    """Return the options of a program, which is run again, and ends, if they ask for MPS. Ends it without a GPU."""
    parser = report.parser(description, quick)
    parser.add_argument("library", type=Path)
    parser.add_argument("--mps", action="store_true", help="have both processes on the GPU at once")
    options = parser.parse_args()
    if options.mps:
        raise SystemExit(_again(program, [argument for argument in sys.argv[1:] if argument != "--mps"]))
    if not torch.cuda.is_available():
        raise SystemExit("needs a GPU, and torch with CUDA")
    return options


def is_on() -> bool:
    """Say whether this program was run again with MPS."""
    return UNDER_MPS in os.environ


def _again(program: str, arguments: list[str]) -> int:
    """Run a program with an MPS daemon of its own; return its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        try:
            subprocess.run(["nvidia-cuda-mps-control", "-d"], env=environment, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(f"no MPS: {error}") from None
        try:
            command = [sys.executable, program, *arguments]
            return subprocess.run(command, env={**environment, UNDER_MPS: "1"}, check=False).returncode
        finally:
            subprocess.run(["nvidia-cuda-mps-control"], input=b"quit\n", env=environment, check=False)
