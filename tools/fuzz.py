"""Feed a decoder with what it was not meant for, until something is wrong with it.

    python tools/fuzz.py DECODER [--runs 1000000] [--seconds S] [--seed N] [--keep]

DECODER is one of tests/unit/fuzz_decoders.py, or `all`. Inputs are examples of its own, and those in tests/corpus,
changed at random: bytes of them, and values of what they say. Who leads to an outcome that was not seen before is
changed further; with --keep it is written to tests/corpus. An input that is at fault is written there in any case, and
ends the run with exit code 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import random
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import msgspec  # noqa: E402

from tests.unit.fuzz_decoders import Decoder, decoders  # noqa: E402

CORPUS = ROOT / "tests" / "corpus"
MOST = 4096
"""Bytes of the longest input."""
MOST_OUTCOMES = 200
"""How many inputs are changed further, besides the examples."""
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 15, 16, 17, 255, 256, 65535, 65536, 2**24 - 1, 2**24, 2**31, 2**32, 2**53,
    2**63 - 1, 2**63, 2**64 - 1, -(2**31), -(2**63), 0.0, 1.5, -1.0, 1e300, "", "a", "prompt", "\ud7ff", "\ud800",
    "x" * 513, [], [0], [0, 0], {}, {"": 0}, [[]], {"type": "Claim"},
]  # fmt: skip
WRITERS: dict[str, tuple[Callable[[bytes], Any], Callable[[Any], bytes]]] = {
    "msgpack": (msgspec.msgpack.decode, msgspec.msgpack.encode),
    "json": (json.loads, lambda value: json.dumps(value).encode()),
}


def change_bytes(raw: bytes, other: bytes, rng: random.Random) -> bytes:
    """Return `raw` with some bytes changed, left out, doubled, or those of `other`."""
    made = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        at = rng.randrange(len(made) + 1)
        kind = rng.randrange(7)
        if kind == 0 and at < len(made):
            made[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(made):
            made[at] = rng.choice((0, 1, 0x7F, 0x80, 0xC1, 0xFF, rng.randrange(256)))
        elif kind == 2:
            made[at:at] = rng.randbytes(rng.choice((1, 1, 2, 4, 8)))
        elif kind == 3:
            del made[at : at + rng.choice((1, 1, 2, 4, 16, 1 << 12))]
        elif kind == 4:
            made[at:at] = made[at : at + rng.choice((1, 4, 16))] * rng.choice((1, 2, 50))
        elif kind == 5:
            made[at:] = other[rng.randrange(len(other) + 1) :]
        else:
            width = rng.choice((2, 4, 8))
            value = rng.choice((0, 1, -1, 2, 5, 6, 16, 95, 96, 1 << 15, 1 << 31, (1 << 63) - 1)) + rng.choice((0, 0, 1))
            at -= at % 4
            made[at : at + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
    return bytes(made[:MOST])


def change_value(value: Any, rng: random.Random) -> Any:
    """Return what `value` says with something in it changed, left out or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        made = dict(value)
        kind = rng.randrange(12)
        if kind == 0:
            del made[key]
        elif kind == 1:
            made[rng.choice(("", "x", "type", "prompt", "n"))] = rng.choice(ODD)
        else:
            made[key] = change_value(value[key], rng)
        return made
    if isinstance(value, list) and value and rng.random() < 0.8:
        at, made_list = rng.randrange(len(value)), list(value)
        kind = rng.randrange(5)
        if kind == 0:
            del made_list[at]
        elif kind == 1:
            made_list[at:at] = made_list * rng.choice((1, 1, 30))
        else:
            made_list[at] = change_value(value[at], rng)
        return made_list
    if isinstance(value, int) and rng.random() < 0.4:
        return value + rng.choice((-1, 1, 2, 1 << 24))
    if isinstance(value, str) and rng.random() < 0.3:
        at = rng.randrange(len(value) + 1)
        return value[:at] + rng.choice(("", "\0", "é", "0", "/")) + value[at + 1 :]
    return rng.choice(ODD)


def make(pool: list[bytes], decoder: Decoder, rng: random.Random) -> bytes:
    """Return another input, made from those in `pool`."""
    raw = rng.choice(pool)
    if decoder.form and rng.random() < 0.7:
        read, write = WRITERS[decoder.form]
        try:
            value = read(raw)
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                value = change_value(value, rng)
            return write(value)
        except (ValueError, TypeError, OverflowError, RecursionError):  # it cannot be read or written
            pass
    return change_bytes(raw, rng.choice(pool), rng)


def write(name: str, raw: bytes) -> Path:
    """Put an input into the corpus; return where it is."""
    path = CORPUS / name / hashlib.sha256(raw).hexdigest()[:12]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    return path


def fuzz(name: str, decoder: Decoder, runs: int, seconds: float, seed: int, keeps: bool) -> bool:
    """Feed one decoder; return whether nothing was wrong."""
    rng = random.Random(f"{name} {seed}")
    pool = [*decoder.seeds, *(path.read_bytes() for path in sorted((CORPUS / name).glob("*")))]
    seen = {decoder.take(raw) for raw in pool}
    began, done = time.monotonic(), 0
    while done < runs and (done % 1000 or time.monotonic() - began < seconds):
        raw = make(pool, decoder, rng)
        done += 1
        try:
            outcome = decoder.take(raw)
        except Exception:
            traceback.print_exc()
            print(f"{name}: input {done} is at fault: {write(name, raw)}")
            return False
        if outcome not in seen and len(seen) < MOST_OUTCOMES:
            seen.add(outcome)
            pool.append(raw)
            if keeps:
                write(name, raw)
    print(f"{name}: {done} inputs, {len(seen)} outcomes, {time.monotonic() - began:.0f} s, no fault", flush=True)
    return True


def main() -> int:
    """Read the command line and fuzz."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("decoder", choices=["all", *decoders()])
    parser.add_argument("--runs", type=int, default=1_000_000, help="inputs of each decoder")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end a decoder's turn after that")
    parser.add_argument("--seed", type=int, default=0, help="another one makes other inputs")
    parser.add_argument("--keep", action="store_true", help="write inputs with new outcomes to tests/corpus")
    given = parser.parse_args()
    logging.disable(logging.CRITICAL)
    names = list(decoders()) if given.decoder == "all" else [given.decoder]
    found = [fuzz(n, decoders()[n], given.runs, given.seconds, given.seed, given.keep) for n in names]
    return 0 if all(found) else 1


if __name__ == "__main__":
    sys.exit(main())
