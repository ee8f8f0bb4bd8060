"""No decoder is at fault, whatever it is given: the corpus once more, and a little of what tools/fuzz.py does."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.unit.fuzz_decoders import decoders
from tools import fuzz


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Decoders say in the log what they refuse."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", decoders())
def test_what_was_found_before_is_survived(name: str) -> None:
    kept = [path.read_bytes() for path in sorted((fuzz.CORPUS / name).glob("*"))]
    assert kept, "there is no corpus"
    for raw in kept:
        decoders()[name].take(raw)


@pytest.mark.parametrize("name", decoders())
def test_examples_are_taken_and_what_is_made_of_them_is_survived(name: str) -> None:
    assert fuzz.fuzz(name, decoders()[name], runs=1000, seconds=60, seed=1, keeps=False)


def test_a_decoder_that_is_at_fault_is_found(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    from pathlib import Path

    from tests.unit.fuzz_decoders import Decoder

    def fragile(raw: bytes) -> str:
        assert b"\xff" not in raw
        return ""

    monkeypatch.setattr(fuzz, "CORPUS", Path(str(tmp_path)))
    assert not fuzz.fuzz("fragile", Decoder(fragile, [b"abc"]), runs=10_000, seconds=60, seed=0, keeps=False)
    (kept,) = (Path(str(tmp_path)) / "fragile").iterdir()
    assert b"\xff" in kept.read_bytes()
