"""What a command tells its user while it works."""

import sys

import pytest

from vllm_adrenaline.system.terminal import StatusLine


def test_in_a_log_the_line_is_repeated_seldom_and_what_stays_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    line = StatusLine(every_s=1000)
    line.show("working")
    line.keep("done")
    assert capsys.readouterr().out == "[adrenaline] done\n"
    line = StatusLine(every_s=0)
    line.show("one")
    line.show("two")
    assert capsys.readouterr().out == "[adrenaline] one\n[adrenaline] two\n"


def test_on_a_terminal_the_line_is_rewritten_and_fits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr("vllm_adrenaline.system.terminal.REFRESH_S", 0.0)
    monkeypatch.setenv("COLUMNS", "40")
    line = StatusLine(every_s=1000)
    line.show("x" * 100)
    line.keep("done")
    assert capsys.readouterr().out == f"\r\033[K{'[adrenaline] ' + 'x' * 26}\r\033[K[adrenaline] done\n"
