"""`adrenaline bench`: workloads, figures, and a report that tells only what the runs tell."""

from __future__ import annotations

import html
import json
import re
import time
from pathlib import Path

import msgspec
import pytest

from vllm_adrenaline import cli
from vllm_adrenaline.bench import figures, page, report, systems
from vllm_adrenaline.bench.command import QUICK_COUNTS
from vllm_adrenaline.bench.conditions import Conditions, default_dtype
from vllm_adrenaline.bench.run import Plan, Progress, Run, _Bench, groups_of, in_turns
from vllm_adrenaline.bench.sampler import Sampler
from vllm_adrenaline.bench.systems import engines_of
from vllm_adrenaline.bench.workloads import COMMON, LOADS, MODELS, RATES, VOCABULARY, at_rate, seed_of
from vllm_adrenaline.config import FLAG_PREFIX, Options
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.proxy.snapshot import Snapshot
from vllm_adrenaline.system import machine
from vllm_adrenaline.workload.client import Answer
from vllm_adrenaline.workload.load import Load

ANSWERS = [
    Answer(sent=0.0, times=[0.5, 0.6, 0.7, 0.8], tokens=[1, 2, 3, 4]),
    Answer(sent=0.2, times=[1.2, 1.4], tokens=[5, 6]),
]


CEILING = {"rows": 7, "context": 340, "local_ms": 20.0, "local_attention_ms": 10.0, "twice_ms": 22.0}
CEILING |= {"ratio": 1.7, "native_ratio": 1.8}


def made(
    system: str, repeat: int, speed: float, tokens: list[list[int]] | None = None, load: str = "light", met: float = 1.0
) -> Run:
    found = dict.fromkeys(report.SHOWN, 1.0) | {"output_tok_s": speed, "tpot_ms_p50": 20.0, "goodput_share": met}
    del found["same_tokens"]
    usage = {"prefill": [0.0, 0.5, 0.2], "decode": [0.1, 0.9, 0.3]}
    placements = {"offloaded: local_full": 3.0} if system.startswith("adrenaline") else {}
    return Run("mha", load, system, repeat, 2, found, tokens or [[1, 2, 3], [4]], usage, placements)


def test_the_ceiling_and_how_near_a_system_comes_are_told() -> None:
    runs = [made(systems.BASELINE, 0, 100, load="reasoning"), made("adrenaline_auto", 0, 171, load="reasoning")]
    found = report.summary(runs, {}, {"mha": CEILING})
    assert found["models"]["mha"]["attention_share"] == 0.5
    assert found["models"]["mha"]["reached_of_ceiling"] == {"adrenaline_auto": 0.95}
    text = report.markdown(found)
    assert "50 % of it attention" in text
    assert "| output throughput | 1.68 x | 1.71 x |" in text
    assert "adrenaline_auto decided: offloaded: local_full 3" in text


def test_goodput_is_the_highest_rate_that_still_has_it() -> None:
    runs = [
        made("adrenaline_auto", 0, 100, load=f"ramp@{rate}", met=met) for rate, met in ((2, 1.0), (3, 0.9), (4, 0.8))
    ]
    runs.append(made(systems.BASELINE, 0, 100, load="ramp@2", met=0.5))
    found = report.summary(runs, {})
    assert found["goodput_req_s"] == {"mha": {"adrenaline_auto": 3.0, systems.BASELINE: 0.0}}
    assert found["cells"] == []
    assert "adrenaline_auto 3, vllm_pd 0" in report.markdown(found)


@pytest.mark.parametrize("name", LOADS)
def test_a_workload_is_the_same_for_every_system_and_differs_between_repeats(name: str) -> None:
    load = LOADS[name]
    first, again, other = load.requests(2048, 1), load.requests(2048, 1), load.requests(2048, 2)
    assert first == again
    assert first != other
    assert len(first) == load.count
    assert [request.at for request in first] == sorted(request.at for request in first)
    longest = max(len(request.prompt) + request.tokens for request in first)
    assert longest <= min(1536, 128 * (min(size.decode_blocks for size in MODELS.values()) - 1)), "it fits nowhere"


def test_a_shared_prompt_is_shared() -> None:
    load = LOADS["chat"]
    prompts = [request.prompt for request in load.requests(2048, 1)]
    assert len({tuple(prompt[: load.shared]) for prompt in prompts}) == 1
    assert len({tuple(prompt) for prompt in prompts}) == len(prompts)


def test_figures_of_two_answers() -> None:
    found = figures.of(ANSWERS, prompt_tokens=14)
    assert found["output_tok_s"] == pytest.approx(6 / 1.4)
    assert found["total_tok_s"] == pytest.approx(20 / 1.4)
    assert found["ttft_ms_mean"] == pytest.approx(750)
    assert found["tpot_ms_p99"] == pytest.approx(200)
    assert figures.attended_tokens(ANSWERS, [10, 4]) == (11 + 12 + 13) + 5
    assert figures.goodput_share(ANSWERS, 600, 1000) == 0.5
    assert figures.goodput_share(ANSWERS, 2000, 150) == 0.5


def test_a_ratio_is_told_only_when_the_effect_is_larger_than_the_spread() -> None:
    clear = [made(systems.BASELINE, i, 100) for i in range(3)]
    clear += [made("adrenaline_auto", i, speed) for i, speed in enumerate((150, 160, 155))]
    (cell,) = report.summary(clear, {})["cells"]
    assert cell["ratios"]["adrenaline_auto_over_vllm_pd"]["output_tok_s"] == {"ratio": 1.55, "spread": 0.05}
    noisy = [made(systems.BASELINE, i, 100) for i in range(3)]
    noisy += [made("adrenaline_auto", i, speed) for i, speed in enumerate((80, 105, 140))]
    (cell,) = report.summary(noisy, {})["cells"]
    assert cell["ratios"]["adrenaline_auto_over_vllm_pd"]["output_tok_s"]["ratio"] is None
    assert "not told" in report.markdown(report.summary(noisy, {}))


def test_tokens_count_as_equal_up_to_the_first_that_differs() -> None:
    runs = [made(systems.BASELINE, 0, 100), made("adrenaline_auto", 0, 100, [[1, 9, 3], [4]])]
    (cell,) = report.summary(runs, {})["cells"]
    assert cell["systems"]["adrenaline_auto"]["same_tokens"] == 0.5


def test_the_page_is_one_file_that_needs_nothing_else() -> None:
    shown = page.page(report.summary([made(systems.BASELINE, 0, 100), made("adrenaline_0.5", 0, 150)], {"cpu": "<x>"}))
    assert not [each for each in ("src=", "@import", "url(", 'href="h', 'href="/') if each in shown]
    assert "&lt;x&gt;" in shown
    assert "<!-- " not in shown


def test_the_page_has_the_comparison_first_and_every_figure_in_tables_behind_it() -> None:
    runs = [made(systems.BASELINE, 0, 100, load="reasoning"), made("adrenaline_auto", 0, 171, load="reasoning")]
    shown = page.page(report.summary(runs, {}, {"mha": CEILING}))
    tables = [
        [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", html.unescape(row)) for row in re.findall("<tr>(.*?)</tr>", table)]
        for table in re.findall("<table>(.*?)</table>", shown)
    ]
    comparison, figures_of_load = tables[:2]
    assert comparison[0][:3] == ["workload, model", "system", "output tok/s"]
    assert comparison[1][:2] == ["reasoning, mha", "adrenaline_auto"]
    assert '<span class="better">x 1.71 (one run)</span>' in comparison[1][2]
    assert figures_of_load[0] == ["", systems.BASELINE, "adrenaline_auto"]
    assert ["output tok/s", "100", "171"] in figures_of_load
    assert [row[0] for row in figures_of_load[1:]] == list(report.SHOWN.values())
    assert ["adrenaline_auto", "offloaded: local_full", "3"] in tables[2]
    assert ["output throughput", "1.68 x", "x 1.71 (one run)"] in tables[3]
    assert "50 % of it attention" in shown
    assert shown.count("data-usage=") == 2


@pytest.mark.parametrize(
    ("ratio", "spread", "said"), [(1.5, 0.1, "better"), (0.8, 0.1, "worse"), (1.05, 0.1, ""), (0.99, 0.0, "")]
)
def test_the_page_calls_better_only_what_is_beyond_the_spread(ratio: float, spread: float, said: str) -> None:
    assert f'<span class="{said}">' in page._ratio({"ratio": ratio, "spread": spread}, more_is_better=True)


def test_systems_take_turns_and_the_order_is_reversed_every_second_time() -> None:
    plan = Plan(["mha"], ["light"], ["a", "b"], 2)
    assert [(repeat, system) for repeat, _, system in plan.wanted("mha")] == [(0, "a"), (0, "b"), (1, "b"), (1, "a")]
    assert plan.runs == 4
    assert Plan(["mha"], ["light", "ramp"], ["a", "b"], 2).runs == 4 + 2 * 9, "a search among forty rates takes nine"


@pytest.mark.parametrize("highest", [-1, 0, 3, 7, 8, 9, 13, 14, 20, 37, 38, 39])
def test_a_search_finds_the_highest_rate_and_has_rates_in_common_with_all_others(
    highest: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench = _Bench(Plan(["mha"], ["ramp"], ["a"], 1), "mha", tmp_path, Progress(9, lambda text: None), None)
    seen: list[int] = []

    def once(repeat: int, load: Load, name: str) -> Run:
        seen.append([at_rate(rate).name for rate in RATES].index(load.name))
        return made(name, repeat, 100, load=load.name, met=1.0 if seen[-1] <= highest else 0.5)

    monkeypatch.setattr(bench, "once", once)
    runs = list(bench.ramp("a"))
    assert max((step for step, run in zip(seen, runs, strict=True) if run.has_goodput), default=-1) == highest
    assert len(set(seen)) == len(seen) <= 9
    tried = [step for step in COMMON if step <= highest]
    assert seen[: len(tried)] == tried


def test_systems_run_in_groups_whose_engines_fit_beside_each_other() -> None:
    names = ["vllm_pd", "vllm_one", "vllm_two", "adrenaline_auto", "semi_pd", "adrenaline_elastic", "adrenaline_0.5"]
    groups = groups_of(names)
    assert [name for group in groups for name in group] == names
    assert [engines_of(group) for group in groups] == [7, 6]
    assert engines_of(["adrenaline_auto", "adrenaline_0.5"]) == 3, "they share their prefill engine"
    wanted = list(Plan(["mha"], ["light", "chat"], names, 2).wanted("mha"))
    assert [system for _, _, system in wanted[:8]] == groups[0] * 2
    assert [system for _, _, system in wanted[-8:]] == groups[0][::-1] * 2
    assert len(wanted) == 2 * 2 * len(names)


def test_a_name_that_is_no_system_is_refused() -> None:
    assert systems.about("adrenaline_0.3") == "this plugin, 0.3 of the requests offloaded"
    for wrong in ("vllm", "adrenaline_2", "adrenaline_x", "0.5"):
        with pytest.raises(AdrenalineError, match="is no system"):
            systems.about(wrong)


@pytest.mark.parametrize(("flag", "said"), [("--workloads=x", "x is no workload"), ("--models=x", "x is no model")])
def test_mistakes_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, said: str) -> None:
    assert cli.main(["bench", flag, "--out", str(tmp_path)]) == 1
    assert said in capsys.readouterr().err


def test_what_is_known_already_is_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Conditions(default_dtype(), counts=QUICK_COUNTS).keep(tmp_path)
    for system in (systems.BASELINE, "adrenaline_auto"):
        file = tmp_path / "runs" / f"mha-light-0-{system}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(msgspec.json.encode(made(system, 0, 100 if system == systems.BASELINE else 168)))
    (tmp_path / "runs" / "mha-ceiling.json").write_text(json.dumps(CEILING))
    assert cli.main(["bench", "--quick", "--workloads", "light", "--out", str(tmp_path), "--json"]) == 0
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert last["cells"][0]["ratios"]["adrenaline_auto_over_vllm_pd"]["output_tok_s"]["ratio"] == 1.68
    assert {"report.json", "report.md", "report.html"} <= {path.name for path in tmp_path.iterdir()}
    assert cli.main(["bench", "--quick", "--workloads", "light", "--out", str(tmp_path), "--tpot-slo-ms", "50"]) == 1
    assert "has results made with --tpot-slo-ms 40.0 (not 50.0): name another folder" in capsys.readouterr().err
    assert cli.main(["bench", "--workloads", "light", "--out", str(tmp_path)]) == 1
    assert "has results made with --quick: name another folder" in capsys.readouterr().err


def test_results_of_a_version_that_noted_no_conditions_are_not_taken_for_ours(tmp_path: Path) -> None:
    Conditions(tpot_slo_ms=50).keep(tmp_path)
    Conditions().keep(tmp_path)  # nothing was measured under the others
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mha-light-0-vllm_pd.json").write_bytes(b"{}")
    Conditions().keep(tmp_path)
    for noted in (None, b"{", b'{"seed":1}'):
        if noted is None:
            (tmp_path / "conditions.json").unlink()
        else:
            (tmp_path / "conditions.json").write_bytes(noted)
        with pytest.raises(AdrenalineError, match="has results of another version"):
            Conditions().keep(tmp_path)


@pytest.mark.parametrize(
    "mistake", [["--requests", "-1"], ["--repeats", "-1"], ["--ttft-slo-ms", "0"], ["--tpot-slo-ms", "nan"]]
)
def test_numbers_that_make_no_sense_are_refused_before_anything_starts(
    mistake: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "--out", str(tmp_path / "out"), *mistake]) == 1
    assert mistake[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_processor_that_does_not_multiply_bfloat16_is_measured_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, dtype in (({"avx2"}, "float32"), ({"avx512f", "avx512_bf16"}, "bfloat16"), ({"bf16"}, "bfloat16")):
        monkeypatch.setattr(machine, "cpu_flags", lambda flags=flags: flags)
        assert default_dtype() == dtype
    assert MODELS["gqa"].block_bytes(Conditions("float32").item_bytes) == 2 * 12 * 2 * 64 * 128 * 4


def test_processors_of_arm_say_what_they_can_do_in_other_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: "processor\t: 0\nFeatures\t: fp asimd i8mm bf16\n")
    assert default_dtype() == "bfloat16"


def test_as_many_requests_are_sent_as_a_workload_has_unless_fewer_are_asked_for() -> None:
    chat, light = LOADS["chat"], LOADS["light"]
    assert Conditions().count(chat) == 32
    assert Conditions(most=16).count(chat) == 16
    assert Conditions(most=16).count(light) == 10
    assert Conditions(most=16, counts={"light": 5}).count(light) == 5
    assert Conditions(most=3, counts={"light": 5}).count(light) == 3


def test_objectives_are_told_to_engines_on_one_device_if_that_is_asked_for() -> None:
    assert Conditions().flags == {"prefill": [], "decode": []}
    told = Conditions(tpot_slo_ms=50, are_told=True)
    assert told.flags["prefill"] == ["--adrenaline-ttft-slo-ms", "2000", "--adrenaline-tpot-slo-ms", "50"]
    assert told.flags["decode"] == ["--adrenaline-tpot-slo-ms", "50"]
    for role, more in {"prefill": {"listen": "ipc:///tmp/x"}, "decode": {"peers": "ipc:///tmp/x"}}.items():
        names = [flag.removeprefix(FLAG_PREFIX).replace("-", "_") for flag in told.flags[role][::2]]
        values = dict(zip(names, map(float, told.flags[role][1::2]), strict=True))
        assert Options.parse({"role": role, "pool": "mapped", **more, **values}), "it is taken by that role"
    assert "a TPOT of at most 50 ms" in told.about_ramp


def test_one_device_is_compared_with_the_best_other_system() -> None:
    speeds = {"vllm_one": (100, 110, 90), "vllm_two": (80, 120, 85), "semi_pd": (97, 121, 81)}
    runs = [made(name, i, speed) for name, each in speeds.items() for i, speed in enumerate(each)]
    runs += [made("vllm_one", 0, 100, load="chat"), made("semi_pd", 0, 108, load="chat")]
    found = report.summary(runs, {})
    light, chat = found["cells"]
    assert light["over_best"] == {"semi_pd": {"best": "vllm_one", "ratio": 0.97, "ratios": [0.97, 1.1, 0.9]}}
    assert chat["over_best"]["semi_pd"]["ratio"] == 1.08
    assert found["geometric_means"] == {"semi_pd": pytest.approx((0.97 * 1.08) ** 0.5, abs=1e-3)}
    said = report.markdown(found)
    assert "| light, mha | semi_pd | vllm_one | 0.97 (0.97, 1.10, 0.90) |" in said
    assert "| geometric mean | semi_pd | | 1.024 |" in said
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", page.page(found))]
    assert ["light, mha", "semi_pd", "vllm_one", "0.97 (0.97, 1.10, 0.90)"] in rows
    assert ["geometric mean", "semi_pd", "", "1.024"] in rows


def test_mean_latency_is_told_for_every_rate_of_the_ramp() -> None:
    rates = [at_rate(RATES[step]).name for step in (1, 0)]
    runs = [made(name, 0, 100, load=rate) for rate in rates for name in ("vllm_one", "semi_pd")][:-1]
    found = report.summary(runs, {})
    assert found["latencies_s"] == {"mha": {"0.5": {"vllm_one": 0.001}, "0.55": {"vllm_one": 0.001, "semi_pd": 0.001}}}
    assert "| 0.5 | 0.00 |  |" in report.markdown(found)
    assert '<tr><td>0.5</td><td class="n">0.00</td><td class="n"></td></tr>' in page.page(found)


def test_searches_for_goodput_take_turns_whatever_the_number_of_their_rates() -> None:
    searches = [iter([made(name, 0, 1)] * count) for name, count in (("a", 1), ("b", 3), ("c", 2))]
    assert [run.system for run in in_turns(searches)] == list("abcbcb")


def test_each_rate_of_the_ramp_has_prompts_of_its_own_and_all_have_the_same_lengths() -> None:
    loads = [at_rate(rate) for rate in RATES]
    assert len({load.name for load in loads}) == len({seed_of(load, 0) for load in loads}) == len(RATES)
    one, other = (load.requests(VOCABULARY, seed_of(load, 0)) for load in loads[:2])
    assert [(len(a.prompt), a.tokens) for a in one] == [(len(a.prompt), a.tokens) for a in other]
    assert not any(a.prompt[:16] == b.prompt[:16] for a, b in zip(one, other, strict=True))
    assert seed_of(LOADS["light"], 1) == 1


class Engine:
    """Metrics of an engine that answers only every second time."""

    def __init__(self, text: str) -> None:
        self.text, self.asked = text, 0

    def blocks(self) -> int:
        return 10

    def read(self) -> Snapshot:
        self.asked += 1
        if self.asked % 2:
            raise AdrenalineError("no engine answers")
        return Snapshot(self.text)


@pytest.mark.parametrize(("borrowed", "used"), [(4.0, 0.5), (0.0, 0.25)])
def test_memory_in_use_is_sampled_whenever_engines_answer(borrowed: float, used: float) -> None:
    blocks = f"vllm:adrenaline_borrowed_blocks {borrowed}\nvllm:adrenaline_waiting_blocks {borrowed / 4}\n"
    decode, prefill = Engine(f"vllm:kv_cache_usage_perc 0.75\n{blocks}"), Engine("vllm:kv_cache_usage_perc 0.25\n")
    with Sampler(decode, prefill, every_s=0.001) as sampler:  # type: ignore[arg-type]
        deadline = time.monotonic() + 10
        while len(sampler.usage["decode"]) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert set(sampler.usage["decode"]) == {0.75}
    assert sampler.peak("decode") == 0.75
    assert sampler.mean("prefill") == used
    with Sampler(decode, every_s=1000) as sampler:  # type: ignore[arg-type]
        pass
    assert sampler.peak("prefill") == sampler.peak("decode") == 0
