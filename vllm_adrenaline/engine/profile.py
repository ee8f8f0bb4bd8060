"""A profile: what was measured when an engine started, kept on disk per model, machine and vLLM version.

Files are JSON below $XDG_CACHE_HOME/vllm-adrenaline/profiles (or ~/.cache). A user may write one and name it with
--adrenaline-profile: every figure in it is then taken as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Annotated

import msgspec

from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.placement.costs import Costs, Seconds
from vllm_adrenaline.system.folders import cache_folder

Key = dict[str, str]


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`key`: what it was measured for, in words. `costs`: of a decode engine's step. `prefill`: seconds to compute a
    prompt by its tokens, ascending, of a prefill engine that does nothing else."""

    key: Key
    costs: Costs | None = None
    prefill: Annotated[list[tuple[int, Seconds]], msgspec.Meta(max_length=256)] = []


def folder() -> Path:
    """Return where profiles are kept."""
    return cache_folder("profiles")


def path_of(key: Key) -> Path:
    """Return the file for a key."""
    digest = hashlib.sha256(msgspec.json.encode(sorted(key.items()))).hexdigest()[:16]
    return folder() / f"{key['role']}-{digest}.json"


def load(path: Path) -> Profile:
    """Return the profile in a file; raises AdrenalineError when it is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Profile)
    except (OSError, msgspec.ValidationError, msgspec.DecodeError) as error:
        raise AdrenalineError(f"cannot read the profile {path}: {error}") from None


def cached(key: Key) -> Profile | None:
    """Return what was measured for `key` before; None when nothing was, or the file is of another version."""
    with contextlib.suppress(AdrenalineError):
        return load(path_of(key))
    return None


def store(profile: Profile) -> Path:
    """Keep a profile; the file appears whole or not at all. Raises AdrenalineError where nothing can be written."""
    path = path_of(profile.key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(msgspec.json.format(msgspec.json.encode(profile), indent=1))
        os.replace(file.name, path)
    except OSError as error:
        raise AdrenalineError(f"cannot keep the profile: {error}; set XDG_CACHE_HOME to a folder to write in") from None
    return path
