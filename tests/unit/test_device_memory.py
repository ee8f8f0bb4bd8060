"""Handles of GPU memory travel in messages, and are bounded. What they open is tested on a GPU (tests/gpu)."""

from __future__ import annotations

import msgspec
import pytest

from vllm_adrenaline.system.device_memory import HANDLE_BYTES, Handle


class Offer(msgspec.Struct, frozen=True):
    """A message that has a handle."""

    memory: Handle


def test_a_handle_comes_out_of_a_message_as_it_went_in() -> None:
    offer = Offer(Handle(bytes(range(HANDLE_BYTES)), 4096, 1 << 40))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(offer), type=Offer) == offer


@pytest.mark.parametrize(
    ("data", "offset", "size"),
    [
        (b"", 0, 1),
        (bytes(HANDLE_BYTES - 1), 0, 1),
        (bytes(HANDLE_BYTES + 1), 0, 1),
        (bytes(HANDLE_BYTES), -1, 1),
        (bytes(HANDLE_BYTES), 1 << 50, 1),
        (bytes(HANDLE_BYTES), 0, 0),
        (bytes(HANDLE_BYTES), 0, 1 << 50),
    ],
    ids=["no data", "too little", "too much", "offset below 0", "offset too large", "no bytes", "too many bytes"],
)
def test_what_is_no_handle_is_no_message(data: bytes, offset: int, size: int) -> None:
    frame = msgspec.msgpack.encode({"memory": {"data": data, "offset": offset, "size": size}})
    with pytest.raises(msgspec.ValidationError, match="no handle"):
        msgspec.msgpack.decode(frame, type=Offer)
