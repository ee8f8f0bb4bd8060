"""A vLLM plugin of the tests: a decode worker's transport whose messages come late, twice, reordered or not at all.

It is found through PYTHONPATH and does its work at the announcements themselves (csrc/shm/layout.h). ADRENALINE_FAULTS
names the file that counts what was done. As long as there is another one beside it, with the suffix `.wanted`, there
are faults; that file says how many messages to lose. Else the transport is the one that it always is.

With ADRENALINE_EARLY a prefill engine that may hand prompts over does so with every one that it has begun.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SENT, DONE = (64 + 8) // 8, 128 // 8  # words of the header
LATE_S = 0.003


def end_prompts_early() -> None:
    """Have a prompt that takes several steps ended after the first, whatever is sooner."""
    if "ADRENALINE_EARLY" not in os.environ:
        return
    from vllm_adrenaline.placement import elastic

    usual = elastic.hand_over

    def hand_over(prompt: elastic.Prompt, *others: Any) -> elastic.Cause | None:
        return elastic.Cause.SOONER if prompt.missing < prompt.tokens else usual(prompt, *others)

    elastic.hand_over = hand_over


def register() -> None:
    """Replace the transport before the decode worker imports it."""
    if "ADRENALINE_FAULTS" not in os.environ:
        return
    import torch

    from vllm_adrenaline.transport import shm

    counted = Path(os.environ["ADRENALINE_FAULTS"])
    wanted = counted.with_suffix(".wanted")

    class FaultySteps(shm.ShmSteps):
        def __init__(self, shape: shm.Shape) -> None:
            super().__init__(shape)
            self.whole_send, self.whole_receive = self.send, self.receive
            self.random = random.Random(1)
            self.done: Counter[str] = Counter()
            self.to_lose = 0

        def begin(
            self, split: Any, channels: Mapping[int, shm.ShmDecodeChannel | None], budget_s: tuple[float, float]
        ) -> None:
            """Begin a step; whether the next one has faults is decided now, for a plan has `send` before it begins."""
            super().begin(split, channels, budget_s)
            faulty = wanted.exists()
            if faulty == (self.send == self.bad_send):
                return
            self.send, self.receive = self.whole_send, self.whole_receive
            if faulty:
                self.send, self.receive = self.bad_send, self.bad_receive
                self.to_lose = int(wanted.read_text())

        def words(self) -> list[torch.Tensor]:
            maps = [channel._memory._map for channel in self._channels if channel is not None]
            return [torch.frombuffer(each, dtype=torch.int64, count=512) for each in maps]

        def note(self, kind: str) -> None:
            self.done[kind] += 1
            new = counted.with_name(f"{counted.name}.new")
            new.write_text(json.dumps(self.done))
            new.rename(counted)

        def bad_send(self, layer: int, *qkv: torch.Tensor) -> None:
            kind = self.random.choice(["whole"] * 10 + ["late", "twice", "reordered", "lost"])
            before = [int(words[SENT]) for words in self.words()]
            if (
                kind == "lost"
                and self.to_lose > 0
                and min(self.done[each] for each in ("late", "twice", "reordered", "stale")) > 5
            ):
                self.to_lose -= 1
                self.note(kind)
                return
            if kind == "late":
                time.sleep(LATE_S)
            self.whole_send(layer, *qkv)
            if kind == "twice":
                self.whole_send(layer, *qkv)
            if kind == "reordered":
                after = [int(words[SENT]) for words in self.words()]
                for words, old in zip(self.words(), before, strict=True):
                    words[SENT] = old
                time.sleep(LATE_S)
                for words, new in zip(self.words(), after, strict=True):
                    words[SENT] = new
                self.whole_send(layer, *qkv)
            if kind not in ("whole", "lost"):
                self.note(kind)

        def bad_receive(self, layer: int, output: torch.Tensor) -> int:
            """An answer that was there already comes again, or one of another step or life, before the right one."""
            for words in self.words():
                wanted, found = int(words[SENT]), int(words[DONE])
                if found != wanted and self.random.random() < 0.5:
                    words[DONE] = self.random.choice([found, wanted - 1, wanted - (1 << 12), wanted ^ 1 << 50])
                    self.note("stale")
            return self.whole_receive(layer, output)

    shm.ShmSteps = FaultySteps
