"""A vLLM plugin of the tests: a decode worker's transport whose messages come late, twice, reordered or not at all.

It is found through PYTHONPATH and does its work at the announcements themselves (csrc/shm/layout.h). Environment:
ADRENALINE_FAULTS names the file that counts what was done; ADRENALINE_FAULTS_LOSE is how many messages to lose.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from pathlib import Path

SENT, DONE = (64 + 8) // 8, 128 // 8  # words of the header
LATE_S = 0.003


def register() -> None:
    """Replace the transport before the decode worker imports it."""
    import torch

    from vllm_adrenaline.transport import shm

    class FaultySteps(shm.ShmSteps):
        def __init__(self, shape: shm.Shape) -> None:
            super().__init__(shape)
            self.whole_send, self.whole_receive = self.send, self.receive
            self.send, self.receive = self.bad_send, self.bad_receive
            self.random = random.Random(1)
            self.done: Counter[str] = Counter()
            self.to_lose = int(os.environ["ADRENALINE_FAULTS_LOSE"])

        def words(self) -> list[torch.Tensor]:
            maps = [channel._memory._map for channel in self._channels if channel is not None]
            return [torch.frombuffer(each, dtype=torch.int64, count=512) for each in maps]

        def note(self, kind: str) -> None:
            self.done[kind] += 1
            file = Path(os.environ["ADRENALINE_FAULTS"])
            file.with_suffix(".new").write_text(json.dumps(self.done))
            file.with_suffix(".new").rename(file)

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

    if "ADRENALINE_FAULTS" in os.environ:
        shm.ShmSteps = FaultySteps
