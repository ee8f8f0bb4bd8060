"""The simulator: engines in time, placed by the policy that serves real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_adrenaline import cli
from vllm_adrenaline.colocation.controller import Phase
from vllm_adrenaline.engine import profile
from vllm_adrenaline.placement.costs import Costs
from vllm_adrenaline.simulate.device import Device
from vllm_adrenaline.simulate.row import Model
from vllm_adrenaline.simulate.run import Result, Simulation
from vllm_adrenaline.simulate.setup import Elasticity, Pool, Setup
from vllm_adrenaline.workload import trace
from vllm_adrenaline.workload.trace import Arrival, Scale

COSTS = Costs([(1, 0.010), (8, 0.012), (64, 0.050)], 4e-6, [4e-6], 1e-4, 2e-4)
ALONE = msgspec.structs.replace(COSTS, remote=[])
ELASTIC = ("prompts", "decodes", "both")
MODEL = Model(COSTS, [(32, 0.02), (512, 0.2), (2048, 1.0)], overhead=0.002, pull=1e-6)
BURST = trace.poisson(150, Scale(0.4, 0.6, 900, 300, rate=8.0), seed=1)
TRICKLE = trace.poisson(60, Scale(0.4, 0.3, 900, 100, rate=0.5), seed=2)


def run(setup: Setup, arrivals: list[Arrival]) -> Simulation:
    simulation = Simulation(setup, arrivals)
    simulation.run()
    return simulation


def result(arrivals: list[Arrival], **setup: object) -> Result:
    sizes = {"model": MODEL, "prefill_blocks": 120, "decode_blocks": 30} | setup
    return Simulation(Setup(**sizes), arrivals).run()  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def auto() -> Result:
    """Return what becomes of BURST when it is placed by load."""
    return result(BURST)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 3),
    st.integers(1, 2),
    st.integers(8, 40),
    st.integers(12, 60),
    st.sampled_from([None, 0.0, 0.3, 0.5, 1.0]),
    st.sampled_from([*((pool, "off") for pool in get_args(Pool)), *(("remote", e) for e in ELASTIC)]),
    st.lists(st.tuples(st.floats(0, 5), st.integers(1, 500), st.integers(1, 120)), min_size=1, max_size=40),
)
def test_every_request_gets_all_its_tokens_and_every_block_comes_back(
    prefill: int,
    decode: int,
    local: int,
    remote: int,
    ratio: float | None,
    kind: tuple[Pool, Elasticity],
    requests: list[tuple[float, int, int]],
) -> None:
    model = msgspec.structs.replace(COSTS, remote=[4e-6] * prefill)
    pool, elastic = kind
    costs = Model(model, MODEL.prefill, pull=1e-6, prefill_costs=ALONE)
    ratio = ratio if elastic == "off" else None
    pool, elastic = (pool, elastic) if prefill else ("remote", "off")
    setup = Setup(costs, prefill, decode, remote, local, pool=pool, ratio=ratio, elastic=elastic)
    arrivals = sorted((Arrival(*each) for each in requests), key=lambda each: each.at)
    simulation = run(setup, arrivals)
    assert sorted((row.prompt, row.made) for row in simulation.done) == sorted((a.prompt, a.output) for a in arrivals)
    assert all(row.first_at > row.arrived for row in simulation.done)
    assert [engine.free for engine in simulation.prefills] == [remote] * prefill
    assert [engine.held for engine in simulation.prefills] == [0] * prefill
    assert [engine.free for engine in simulation.decodes] == [local] * decode


def test_an_aggregated_engine_computes_prompts_beside_its_decodes() -> None:
    alone = Arrival(0.0, 512, 2)  # 0.2 s of prompt and a token, then a step
    (one,) = run(Setup(MODEL, prefill=0), [alone]).done
    assert one.first_at == pytest.approx(0.2 + 0.012, abs=0.002)
    assert one.last_at - one.first_at == pytest.approx(0.012 + 512 * 4e-6, abs=0.001)
    beside = run(Setup(MODEL, prefill=0), [Arrival(0.0, 32, 400), Arrival(1.0, 512, 1)]).done
    prompt, other = sorted(beside, key=lambda row: -row.prompt)
    assert prompt.first_at == pytest.approx(1.22, abs=0.02), "in the very next step"
    undisturbed = run(Setup(MODEL, prefill=0), [Arrival(0.0, 32, 400)]).done[0]
    assert other.last_at - undisturbed.last_at == pytest.approx(0.2, abs=0.02), "which is so much longer"


def test_elastic_work_goes_to_the_side_that_has_the_time() -> None:
    model = msgspec.structs.replace(COSTS, step=[(1, 0.02), (64, 0.2)], local=1e-5)
    costs = Model(
        model, MODEL.prefill, overhead=0.002, pull=1e-6, prefill_costs=msgspec.structs.replace(model, remote=[])
    )
    sizes = {"model": costs, "prefill_blocks": 300, "decode_blocks": 100}
    answers = trace.poisson(60, Scale(0.05, 0.8, 100, 300, rate=20.0), seed=4)  # hardly any prompts
    prompts = trace.poisson(60, Scale(1.0, 0.02, 900, 8, rate=20.0), seed=5)  # hardly any answers
    for load, elastic, moved in ((answers, "decodes", "stays"), (prompts, "prompts", "handed_over")):
        off, on = result(load, **sizes), result(load, **sizes, elastic=elastic)
        assert getattr(off, moved) == 0
        assert 5 < getattr(on, moved) < len(load) - 5
        assert on.throughput_tok_s > 1.15 * off.throughput_tok_s
        other = result(load, **sizes, elastic="prompts" if elastic == "decodes" else "decodes")
        assert other.throughput_tok_s > 0.95 * off.throughput_tok_s, "the other way is not taken where it does not pay"


def test_what_is_believed_of_a_link_stays_what_it_is() -> None:
    far = msgspec.structs.replace(COSTS, link=[0.01])
    for decode_blocks in (20, 1000):  # most steps wait for the link, and hardly any
        simulation = run(Setup(Model(far, MODEL.prefill), ratio=0.5, decode_blocks=decode_blocks), BURST)
        believed = simulation.decodes[0].admission.feedback.costs
        assert believed.link == pytest.approx(far.link, rel=0.06)
        assert believed.remote == pytest.approx(far.remote, rel=0.06)


def test_fixed_ratios_are_kept() -> None:
    assert result(BURST, ratio=0.0).offloaded == 0
    assert result(BURST, ratio=1.0).offloaded == len(BURST)
    assert result(BURST, ratio=0.5).offloaded == len(BURST) // 2
    assert result(BURST, ratio=1.0, pool="mapped").mapped == len(BURST)
    both = result(BURST, ratio=1.0, pool="both")
    assert both.offloaded == both.mapped == len(BURST) // 2


def test_on_one_device_prompts_and_steps_take_the_device_from_each_other_and_nothing_else_does() -> None:
    alone = Arrival(0.0, 512, 1)  # 0.2 s of prompt, then a step
    (one,) = run(Setup(MODEL, pool="mapped", ratio=1.0), [alone]).done
    (two,) = run(Setup(MODEL, pool="remote", ratio=1.0), [alone]).done
    assert one.first_at == pytest.approx(two.first_at, abs=1e-3), "nobody is in the way"
    decoding = [Arrival(0.0, 32, 400), Arrival(1.0, 512, 1)]  # steps of 12 ms, and then the prompt
    objective = {"pool": "mapped", "ratio": 1.0, "tpot_slo": 10.0}  # one that is met, by which nothing moves
    shared, apart = (run(Setup(MODEL, **each), decoding) for each in (objective, {"ratio": 1.0}))  # type: ignore[arg-type]
    prompt, free = (next(row for row in each.done if row.prompt == 512) for each in (shared, apart))
    assert prompt.first_at - free.first_at == pytest.approx(0.2, abs=0.03), "each has half of the device"
    first = run(Setup(MODEL, pool="mapped", ratio=1.0), decoding)
    (prompt,) = (row for row in first.done if row.prompt == 512)
    assert prompt.first_at - free.first_at == pytest.approx(0.2 * 0.15 / 0.85, abs=0.02), "prompts come first"
    undisturbed = run(Setup(MODEL, pool="mapped", ratio=1.0), decoding[:1])
    later = shared.done[-1].last_at - undisturbed.done[-1].last_at
    assert later == pytest.approx(0.2, abs=0.03), "the prompt's work is done, once"


def test_shares_of_a_device_follow_the_objectives_as_they_do_in_real_engines() -> None:
    # Steps of 60 ms beside prompts all the time: only with most of the device do they take less than 90 ms.
    steady = msgspec.structs.replace(COSTS, step=[(1, 0.055), (64, 0.06)])
    model = Model(steady, MODEL.prefill, overhead=0.002)
    load = [Arrival(i * 0.25, 512, 1) for i in range(200)] + [Arrival(0.0, 32, 500) for _ in range(4)]
    found = {}
    for objective in (None, 0.09):
        setup = Setup(model, pool="mapped", ratio=1.0, tpot_slo=objective)
        simulation = Simulation(setup, sorted(load, key=lambda each: each.at))
        (device,) = simulation._devices
        shares, take = [], device.take
        device.take = lambda given, take=take, shares=shares: shares.append(given.decode) or take(given)  # type: ignore[method-assign]
        simulation.run()
        found[objective] = max(row.last_at for row in simulation.done if row.output > 1)
        if objective is None:
            assert len(shares) == 1
        else:
            assert len(shares) > 1
            assert simulation.tuners[0].shares.part(Phase.DECODE) > 0.5  # type: ignore[union-attr]
    assert found[0.09] < found[None]


def test_a_shared_device_gives_each_phase_its_part_while_both_want_it() -> None:
    device = Device(lambda: 0.0, prefill_part=0.25)
    device.start(Phase.PREFILL, 1.0, now=0.0)
    assert device.next_end() == pytest.approx(1.0)
    device.start(Phase.DECODE, 0.3, now=0.5)
    assert device.next_end() == pytest.approx(0.9), "0.3 s at three quarters of the speed"
    assert device.finish(0.9) == [Phase.DECODE]
    assert device.next_end() == pytest.approx(0.9 + 0.4), "0.4 of 0.5 s are left"
    assert device.finish(1.3) == [Phase.PREFILL]
    assert device.next_end() is None


def test_a_saturated_decode_engine_gains_and_is_never_far_from_the_best_fixed_ratio(auto: Result) -> None:
    fixed = {ratio: result(BURST, ratio=ratio).throughput_tok_s for ratio in (0.0, 0.3, 0.5, 0.7, 1.0)}
    assert auto.throughput_tok_s > 1.15 * fixed[0.0]
    assert auto.throughput_tok_s > 0.95 * max(fixed.values())
    assert auto.preemptions == 0


def test_a_light_load_is_no_slower_than_without_offloading() -> None:
    light, none = result(TRICKLE), result(TRICKLE, ratio=0.0)
    assert light.throughput_tok_s >= 0.98 * none.throughput_tok_s
    assert light.tpot_p50_ms <= 1.02 * none.tpot_p50_ms
    assert light.ttft_p50_ms <= 1.02 * none.ttft_p50_ms


def test_a_wrong_profile_heals_while_serving() -> None:
    long = trace.poisson(600, Scale(0.4, 0.6, 900, 300, rate=8.0), seed=3)
    right = result(long).throughput_tok_s
    for wrong in (1 / 3, 3.0):
        believed = msgspec.structs.replace(COSTS, remote=[4e-6 * wrong])
        assert result(long, believed=believed).throughput_tok_s > 0.9 * right, wrong


def test_a_slow_executor_gets_less(auto: Result) -> None:
    slow = Model(msgspec.structs.replace(COSTS, remote=[16e-6]), MODEL.prefill, 0.002, pull=1e-6)
    assert result(BURST, model=slow).offloaded < auto.offloaded


def test_of_two_executors_the_slow_one_gets_less() -> None:
    costs = msgspec.structs.replace(COSTS, remote=[4e-6, 40e-6])
    simulation = run(Setup(Model(costs, MODEL.prefill, 0.002, pull=1e-6), 2, 1, 120, 30), BURST)
    attended = [sum(row.where == executor for row in simulation.done) for executor in (0, 1)]
    assert attended[0] > attended[1]


def test_a_tpot_objective_is_kept_better_with_it_than_without() -> None:
    free = result(BURST, decode_blocks=60)
    slo = free.tpot_p90_ms * 0.8 / 1000
    assert result(BURST, decode_blocks=60, tpot_slo=slo).tpot_p90_ms < free.tpot_p90_ms


def test_the_same_run_gives_the_same_result(auto: Result) -> None:
    assert result(BURST) == auto


@pytest.mark.parametrize("ratio", [None, 0.0, 0.5, 1.0])
def test_no_batch_is_larger_than_the_largest(ratio: float | None) -> None:
    simulation = Simulation(Setup(MODEL, 1, 1, 120, 30, max_rows=4, ratio=ratio), BURST[:30])
    rows: list[int] = []
    (decode,) = simulation.decodes
    seconds = decode._seconds
    decode._seconds = lambda: rows.append(len(decode._active)) or seconds()  # type: ignore[method-assign,func-returns-value]
    simulation.run()
    assert max(rows) == 4


def test_who_cannot_grow_beside_the_prefill_engine_moves_after_a_second() -> None:
    all_at_once = [Arrival(0.0, 120, 200) for _ in range(8)]  # a block each, and another one soon
    found = result(all_at_once, prefill_blocks=10, ratio=1.0)
    assert found.placements["moved/starved"] == found.moved > 0
    assert found.preemptions == 0
    assert found.tpot_p99_ms * 199 > 1000


def test_executors_on_cores_of_their_own_slow_no_prefill_down() -> None:
    alone = Model(COSTS, MODEL.prefill, 0.002, pull=1e-6, shared=False)
    assert result(BURST, ratio=1.0, model=alone).ttft_p90_ms < result(BURST, ratio=1.0).ttft_p90_ms


CSV = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:47.6805900,1396,109
2023-11-16 18:15:50.6805900,879,55
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    profile.store(profile.Profile({"role": "decode", "model": "tiny"}, COSTS))
    profile.store(profile.Profile({"role": "prefill", "model": "tiny"}, prefill=MODEL.prefill))
    (tmp_path / "trace.csv").write_text(CSV)
    return tmp_path


def test_a_trace_is_scaled_to_lengths_and_rate(files: Path) -> None:
    read = trace.read(files / "trace.csv", 10, Scale(prompt=0.5, max_prompt=500, output=2, rate=3.0))
    assert [(a.prompt, a.output) for a in read] == [(187, 88), (500, 218), (439, 110)]
    assert [round(a.at, 3) for a in read] == [0, 0.25, 1.0]


def test_the_command_prints_a_table_and_json(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["simulate", "--trace", str(files / "trace.csv"), "--model", "tiny", "--json"]
    assert cli.main([*wanted, "--offload-ratio", "0,auto"]) == 0
    *table, last = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[0] for line in table] == ["ratio", "0", "auto"]
    assert {"throughput_tok_s", "ttft_p90_ms", "tpot_p90_ms"} <= json.loads(last).keys()


def test_executors_of_a_profile_on_another_host_are_far_however_many_are_simulated(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    far = msgspec.structs.replace(COSTS, link=[0.01])
    path = profile.store(profile.Profile({"role": "decode", "model": "far"}, far))
    wanted = ["simulate", "--trace", str(files / "trace.csv"), "--profile", str(path), "--json"]
    ends = []
    for executors in ("1", "3"):
        assert cli.main([*wanted, "--offload-ratio", "1", "--prefill", executors]) == 0
        ends.append(json.loads(capsys.readouterr().out.strip().splitlines()[-1]))
    assert [each["offloaded"] for each in ends] == [3, 3]
    assert ends[1]["tpot_p50_ms"] > 20, "steps of 12 ms, and the link"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--pool", "both", "--tpot-slo-ms", "50"], "which is not simulated: use --pool mapped"),
        (["--model", "other"], "engines write them when they start"),
        (["--offload-ratio", "2"], "a share of the requests, from 0 to 1"),
        (["--decode-blocks", "1"], "fits into no engine"),
        (["--trace", "/nowhere.csv"], "cannot read the trace"),
        (["--profile", "/nowhere.json"], "cannot read the profile"),
    ],
)
def test_mistakes_are_one_sentence(
    files: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert cli.main(["simulate", *arguments]) == 1
    assert said in capsys.readouterr().err
