"""The demonstration's model and requests: reproducible files that transformers reads, diverse greedy tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_adrenaline.bench import demo, demo_report
from vllm_adrenaline.workload.client import Answer
from vllm_adrenaline.workload.text import words
from vllm_adrenaline.workload.tiny_model import make_model


def tiny(folder: Path, seed: int = 0) -> Path:
    return make_model(folder, seed=seed, layers=2, hidden=64, heads=2, kv_heads=1, vocab=512, max_position=256)


def test_same_parameters_same_bytes_and_reused(tmp_path: Path) -> None:
    first, second = tiny(tmp_path / "a"), tiny(tmp_path / "b")
    assert first.name == second.name
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes()
    before = (first / "model.safetensors").stat().st_mtime_ns
    assert tiny(tmp_path / "a") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == before
    assert tiny(tmp_path / "a", seed=1) != first
    assert [path.name for path in (tmp_path / "b").iterdir()] == [second.name], "unfinished folders are removed"


def test_greedy_tokens_are_diverse_and_depend_on_the_prompt(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tiny(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    outputs = []
    for prompt in ("Who wrote this?", " ".join(words()[:30])):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        output = model.generate(ids, max_new_tokens=40, min_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
        outputs.append(output.tolist())
        assert len(set(outputs[-1])) > 15
    assert outputs[0] != outputs[1]


def test_tokenizer_round_trip_and_chat(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny(tmp_path))
    text = "Seven boats, é and 日本."
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) == 512
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|user|>\nhi\n<|assistant|>\n"


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ({"hidden": 64, "heads": 4}, "head_dim is 16"),
        ({"kv_heads": 3}, "8 heads cannot"),
        ({"vocab": 100}, "vocab is 100"),
    ],
)
def test_impossible_sizes_are_refused(tmp_path: Path, sizes: dict[str, int], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        make_model(tmp_path, **sizes)
    assert list(tmp_path.glob("*/model.safetensors")) == []


def test_config_is_what_was_asked(tmp_path: Path) -> None:
    config = json.loads((tiny(tmp_path) / "config.json").read_text())
    assert (config["num_hidden_layers"], config["head_dim"], config["vocab_size"]) == (2, 32, 512)


def test_requests_are_mixed_and_the_same_every_time() -> None:
    requests = demo.mixed_requests()
    assert requests == demo.mixed_requests()
    lengths = [len(str(request.prompt).split()) for request in requests]
    assert (min(lengths), max(lengths), len(requests)) == (3, 330, 24)
    assert {request.chat for request in requests} == {True, False}
    assert all(10 <= request.tokens <= 150 for request in requests)


def test_report_counts_tokens_up_to_the_first_difference() -> None:
    def result(name: str, offloaded: int, *tokens: list[int]) -> demo_report.Result:
        answers = [Answer(0.0, [0.1 + 0.01 * at for at in range(len(mine))], mine) for mine in tokens]
        return demo_report.Result(name, offloaded, answers, 0.5, 10)

    plain = result("plain", 0, [1, 2, 3], [4, 5])
    good, bad = result("good", 1, [1, 2, 3], [4, 5]), result("bad", 0, [1, 9, 3], [4, 5])
    assert demo_report.problems([plain, good]) == []
    assert demo_report.problems([plain, bad]) == [
        "bad: 2 tokens differ from plain vLLM's",
        "bad: no request was offloaded",
    ]
    assert "3 of 5" in demo_report.table([plain, bad])
    assert "5 of 10" in demo_report.table([plain, bad])
    assert "0.10/0.10/0.10" in demo_report.table([plain, bad]), "time to the first token"
    assert "10/10/10" in demo_report.table([plain, bad]), "time between tokens"
