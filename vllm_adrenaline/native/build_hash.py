"""The digest of the native sources, built into the library and compared when it is loaded. Standard library only."""

import hashlib
from pathlib import Path

SUFFIXES = {".h", ".cpp"}
OTHERS = {"tests", "cuda"}


def build_hash(folder: Path) -> str:
    """Return 16 hexadecimal digits that change with every source below `folder`, but not with those in OTHERS."""
    result = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in SUFFIXES and not OTHERS.intersection(path.relative_to(folder).parts):
            result.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return result.hexdigest()[:16]
