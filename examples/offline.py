"""Generate without a server: `python examples/offline.py MODEL`."""

import sys

from vllm_adrenaline import LLM, SamplingParams


def main(model: str) -> None:
    """Print the answers to two prompts, sampled with a seed."""
    prompts = ["Once upon a time", "The capital of France is"]
    with LLM(model, offload_ratio="auto", max_model_len=2048) as llm:
        for answer in llm.generate(prompts, SamplingParams(max_tokens=32, temperature=0.8, seed=1)):
            print(f"{answer.prompt!r}: {answer.outputs[0].text!r}")


if __name__ == "__main__":  # engines are child processes, which import this file
    main(*sys.argv[1:])
