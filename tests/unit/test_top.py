"""`adrenaline top` shows what engines do now, and what changed since a moment ago."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from tests.unit.test_status import TEXT, serving
from vllm_adrenaline import cli
from vllm_adrenaline.launch.top import Watched, render
from vllm_adrenaline.proxy.snapshot import COUNTERS, Recent, Snapshot

TIMES = """\
vllm:cache_config_info{engine="0",num_gpu_blocks="48"} 1.0
vllm:generation_tokens_total{engine="0"} %d
vllm:inter_token_latency_seconds_sum{engine="0"} %f
vllm:inter_token_latency_seconds_count{engine="0"} %d
"""


def counters(**known: float) -> dict[str, float]:
    return dict.fromkeys(COUNTERS, 0.0) | known


def test_rates_are_of_the_last_ten_seconds() -> None:
    recent = Recent()
    assert set(recent.rates(0.0, counters(output_tokens=100)).values()) == {None}, "one look tells nothing"
    recent.rates(2.0, counters(output_tokens=120))
    found = recent.rates(4.0, counters(output_tokens=180, tpot_s=0.8, tpot_count=80, exposed_wait_s=1.0))
    assert found == {"output_tok_s": 20.0, "tpot_ms": pytest.approx(10.0), "exposed_share": 0.25, "ttft_ms": None}
    assert recent.rates(14.0, counters(output_tokens=180, tpot_s=0.8, tpot_count=80, exposed_wait_s=1.0)) == {
        "output_tok_s": 0.0,
        "tpot_ms": None,
        "exposed_share": 0.0,
        "ttft_ms": None,
    }


def test_an_engine_that_was_started_again_has_no_negative_rates() -> None:
    recent = Recent()
    recent.rates(0.0, counters(output_tokens=100))
    assert recent.rates(1.0, counters(output_tokens=5))["output_tok_s"] is None
    assert recent.rates(2.0, counters(output_tokens=10))["output_tok_s"] == 5.0


def test_an_engine_says_how_many_blocks_it_has_if_it_knows() -> None:
    assert Snapshot('vllm:cache_config_info{num_gpu_blocks="48"} 1.0\n').blocks() == 48
    assert Snapshot('vllm:cache_config_info{num_gpu_blocks="None"} 1.0\n').blocks() == 0
    assert Snapshot("").blocks() == 0


def shown(engines: list[Watched]) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(render(engines))
    return capture.get()


def test_what_changed_between_two_looks_is_beside_what_there_was_so_far() -> None:
    pages = {"/metrics": TEXT + TIMES % (100, 1.0, 100)}
    with serving(pages) as url:
        engine = Watched(url)
        engine.look()
        pages["/metrics"] = TEXT.replace('"local_full"} 70.0', '"local_full"} 75.0') + TIMES % (180, 1.8, 180)
        engine.look()
    text = shown([engine])
    rows = [line.split() for line in text.splitlines()]
    assert ["offloaded", "local_full", "5", "75"] in rows
    assert ["local", "fits", "30"] in rows
    assert re.search(r"75 % +12 +0 +7 +5 +0 .* 10\.0 +0 %$", text, re.MULTILINE), (
        "down to TPOT in ms and what was exposed"
    )
    assert "1 executor(s) failed and are not used at present" in text


def test_an_engine_that_does_not_answer_is_told_beside_those_that_do() -> None:
    with serving({"/metrics": TEXT}) as url:
        engines = [Watched(url), Watched("http://127.0.0.1:1")]
        for each in engines:
            each.look()
    assert "no engine answers at http://127.0.0.1:1/metrics" in shown(engines)
    assert "75 %" in shown(engines)


def test_where_there_is_no_terminal_it_is_written_once(capsys: pytest.CaptureFixture[str]) -> None:
    with serving({"/metrics": TEXT}) as url:
        assert cli.main(["top", url]) == 0
    assert "local_full" in capsys.readouterr().out
    assert cli.main(["top", "http://127.0.0.1:1"]) == 1
    assert "no engine answers" in capsys.readouterr().err


def test_in_a_terminal_it_is_written_again_until_ctrl_c() -> None:
    pages = {"/metrics": TEXT}
    with serving(pages) as url:
        ours, theirs = pty.openpty()
        argv = [sys.executable, "-m", "vllm_adrenaline.cli", "top", "--every", "0.05", url]
        top = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | {"TERM": "xterm"})
        os.close(theirs)
        try:
            read_until(ours, "TPOT")
            pages["/metrics"] = TEXT.replace('running{engine="0",model_name="m"} 12.0', "running 321.0")
            read_until(ours, "321")
            top.send_signal(signal.SIGINT)
            assert top.wait(10) == 128 + signal.SIGINT
        finally:
            top.kill()
            top.wait()
            os.close(ours)


def read_until(terminal: int, text: str) -> None:
    seen, deadline = "", time.monotonic() + 20
    while text not in seen:
        ready, _, _ = select.select([terminal], [], [], deadline - time.monotonic())
        assert ready, seen
        seen += os.read(terminal, 65536).decode(errors="replace")
