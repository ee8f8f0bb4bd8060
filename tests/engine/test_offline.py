"""`LLM(...)` with offloading: the answers of plain vLLM, and nothing is left behind however its process ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import BLOCK_BYTES, Plain, Work, eventually, workload

pytestmark = pytest.mark.extended

ARGUMENTS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "disable_log_stats": False,
    "kv_cache_memory_bytes": 200 * BLOCK_BYTES,
}
PROGRAM = str(Path(__file__).with_name("offline.py"))


class Program:
    """offline.py as a process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.children: dict[str, str] = self.next()["children"]

    @property
    def prefill_engine(self) -> int:
        """Its prefill engine, which leads a process group."""
        return next(int(pid) for pid, command in self.children.items() if "--adrenaline-role prefill" in command)

    def next(self) -> dict[str, Any]:
        """Return its next answer."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise AssertionError("the program has ended")

    def generate(self, work: Sequence[Work], **sampling: Any) -> dict[str, Any]:
        """Have it generate, and return its answer."""
        assert self.process.stdin is not None
        asked = {"prompts": [w.prompt for w in work], "tokens": [w.tokens for w in work], "sampling": sampling}
        self.process.stdin.write(f"{json.dumps(asked)}\n")
        self.process.stdin.flush()
        return self.next()

    def end(self) -> None:
        """Have it end by itself."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        assert self.process.wait(timeout=60) == 0

    def are_children_gone(self) -> bool:
        """Say whether no engine process is left."""
        return not any(Path(f"/proc/{pid}").exists() for pid in self.children)


@contextmanager
def program(model: Path, **arguments: Any) -> Iterator[Program]:
    command = [sys.executable, PROGRAM, str(model), json.dumps(ARGUMENTS | arguments)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            yield Program(process)
        finally:
            process.kill()


def test_llm_answers_as_plain_vllm_and_leaves_nothing_behind(model: Path, plain: Plain) -> None:
    work = workload(12, seed=31, prompts=[1, 100, 128, 300, 500], outputs=[20, 60, 100])
    seeded = {"temperature": 0.8, "seed": 4}
    with program(model, offload_ratio=0.5) as started:
        for sampling in ({"temperature": 0}, seeded):
            answer = started.generate(work, **sampling)
            assert [tokens for (tokens,) in answer["tokens"]] == plain.tokens(work, **sampling)
        assert (answer["offloaded"], answer["pulled"]) == (len(work), len(work)), "half of each"
        several = started.generate(work[1:3], n=3, **seeded)["tokens"]
        assert [len({tuple(tokens) for tokens in each}) for each in several] == [3, 3]
        os.killpg(started.prefill_engine, signal.SIGKILL)
        answer = started.generate(work, temperature=0)
        assert [tokens for (tokens,) in answer["tokens"]] == plain.tokens(work), "it serves alone"
        started.end()
        assert eventually(started.are_children_gone, seconds=20)


def test_when_the_process_is_killed_both_engines_end(model: Path) -> None:
    with program(model) as started:
        assert not started.are_children_gone()
        started.process.kill()
        assert eventually(started.are_children_gone, seconds=30)
