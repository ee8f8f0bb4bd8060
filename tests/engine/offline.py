"""A program that uses `LLM(...)`: it answers each line of JSON on its input with one, until a line is empty.

Run as a process of its own, as users do: engines are its children.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from vllm_adrenaline import LLM, SamplingParams


def main(model: str, arguments: str) -> None:
    with LLM(model, **json.loads(arguments)) as llm:
        say({"children": descendants(os.getpid())})
        for line in map(str.strip, sys.stdin):
            if not line:
                break
            asked = json.loads(line)
            prompts = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
            params = [SamplingParams(ignore_eos=True, max_tokens=n, **asked["sampling"]) for n in asked["tokens"]]
            answers = llm.generate(prompts, params, use_tqdm=False)
            counted = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
            say(
                {
                    "tokens": [[list(each.token_ids) for each in answer.outputs] for answer in answers],
                    "offloaded": counted["vllm:adrenaline_offloaded_requests"],
                    "pulled": counted["vllm:adrenaline_local_requests"],
                }
            )


def descendants(pid: int) -> dict[int, str]:
    """Return the command lines of all processes below one, by process id."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found[child] = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            found |= descendants(child)
    return found


def say(what: dict[str, Any]) -> None:
    print(f"answer {json.dumps(what)}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
