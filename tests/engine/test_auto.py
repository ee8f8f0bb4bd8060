"""Load-aware placement on real engines, and little local memory: the tokens stay those of plain vLLM, whatever is
decided, and nothing is preempted. What else is decided by load: test_pressure.py."""

from __future__ import annotations

from tests.engine.conftest import SMALL_BLOCKS, Fleet, Plain, run, tokens, watched, workload


def test_light_load_stays_local(standard: Fleet, plain: Plain) -> None:
    count = standard["small"].counting()
    for item in workload(3, seed=51, prompts=[200], outputs=[30]):
        assert tokens(standard.door("small", "auto").complete([item])) == plain.tokens([item])
    assert count.placements() == {("local", "fits"): 3}


def test_what_local_memory_does_not_hold_is_offloaded_and_nothing_is_preempted(standard: Fleet, plain: Plain) -> None:
    decode = standard["small"]
    count = decode.counting()
    work = workload(8, seed=52, prompts=[400], outputs=[100])  # 4 blocks each at their end; 16 are there
    assert tokens(standard.door("small", "auto").complete(work)) == plain.tokens(work)
    made = count.placements()
    assert count["vllm:num_preemptions_total"] == 0, made
    assert made["offloaded", "local_full"] > 0
    assert sum(number for (kind, _), number in made.items() if kind != "wait") == len(work)
    assert standard["prefill"].settle() == decode.settle() == 0


def test_twice_the_requests_that_local_memory_holds_run_without_a_preemption(standard: Fleet, plain: Plain) -> None:
    decode = standard["small"]
    count = decode.counting()
    per_request = 4  # 400 + 100 tokens
    fitting = (SMALL_BLOCKS - 1) // per_request
    work = workload(2 * fitting, seed=4, prompts=[400], outputs=[100])
    answers, usage, running = run(watched(decode, standard.door("small", 0.5), work))
    assert tokens(answers) == plain.tokens(work)
    # How many of them are seen at once depends on how fast they come and go; none is ever taken its memory.
    assert 1 < running <= 2 * fitting
    assert 0 < usage <= fitting * per_request / (SMALL_BLOCKS - 1)
    assert count["vllm:num_preemptions_total"] == 0
    assert count["offloaded_requests"] == fitting
    assert count["local_requests"] == len(work) - fitting
