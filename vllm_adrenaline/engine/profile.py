"""Profiles: what was measured when an engine started, kept on disk for the next start.

They are JSON files in $XDG_CACHE_HOME/vllm-adrenaline/profiles (or ~/.cache/vllm-adrenaline/profiles). A user may write
one and name it with --adrenaline-profile. Every figure in it is then taken as it is.
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
"""What a profile depends on, by name, in words (engine/profiling.py, key)."""


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an engine's work takes.

    Attributes:
        key: what it was measured for.
        costs: of a step of decodes; None for a prefill engine that does not decode.
        prefill: of a prefill engine that does nothing else: (tokens of a prompt, seconds to compute it), ascending.
    """

    key: Key
    costs: Costs | None = None
    prefill: Annotated[list[tuple[int, Seconds]], msgspec.Meta(max_length=256)] = []


def folder() -> Path:
    """Return the folder in which profiles are kept. It need not be there."""
    return cache_folder("profiles")


def path_of(key: Key) -> Path:
    """Return the file of a key. It need not be there."""
    digest = hashlib.sha256(msgspec.json.encode(sorted(key.items()))).hexdigest()[:16]
    return folder() / f"{key['role']}-{digest}.json"


def load(path: Path) -> Profile:
    """Return the profile in a file. Raises AdrenalineError when it cannot be read or is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Profile)
    except (OSError, msgspec.ValidationError, msgspec.DecodeError) as error:
        raise AdrenalineError(f"cannot read the profile {path}: {error}") from None


def cached(key: Key) -> Profile | None:
    """Return the profile that was stored for `key`; None when there is none that this version understands."""
    with contextlib.suppress(AdrenalineError):
        return load(path_of(key))
    return None


def store(profile: Profile) -> Path:
    """Write a profile and return its file, which appears whole or not at all. Raises AdrenalineError if it cannot."""
    path = path_of(profile.key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(msgspec.json.format(msgspec.json.encode(profile), indent=1))
        os.replace(file.name, path)
    except OSError as error:
        raise AdrenalineError(f"cannot keep the profile: {error}; set XDG_CACHE_HOME to a folder to write in") from None
    return path
