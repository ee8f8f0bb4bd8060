"""What our connectors send from the scheduler to the workers, beside what NIXL sends."""

from __future__ import annotations

from typing import Any


def attach(metadata: Any, name: str, value: Any) -> Any:
    """Let NIXL's metadata of a step carry something of ours as an attribute of this name; return the metadata.

    Not a subclass: NIXL makes this object itself and checks its type.
    """
    setattr(metadata, name, value)
    return metadata
