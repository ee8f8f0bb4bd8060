"""Where files are kept."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_adrenaline.system.folders import cache_folder, make_private, runtime_folder


def test_the_cache_is_where_xdg_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("models") == tmp_path / "vllm-adrenaline" / "models"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("unset", [True, False])
def test_without_xdg_the_cache_is_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unset: bool
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False) if unset else monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder("logs") == tmp_path / ".cache" / "vllm-adrenaline" / "logs"


def test_a_runtime_folder_is_private_and_its_sockets_have_short_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for parent in (tmp_path, tmp_path / ("long" * 20)):
        parent.mkdir(exist_ok=True)
        monkeypatch.setattr("tempfile.tempdir", str(parent))
        folder = runtime_folder()
        assert folder.stat().st_mode & 0o777 == 0o700
        assert len(f"{folder}/prefill") < 107
        shutil.rmtree(folder)


MAKES_ONE = """
import sys, tempfile, time
from vllm_adrenaline.system.folders import runtime_folder
tempfile.tempdir = sys.argv[1]
print(runtime_folder(), flush=True)
time.sleep(60)
"""


def test_what_a_killed_process_left_is_removed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    makers = [
        subprocess.Popen([sys.executable, "-c", MAKES_ONE, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    lives, killed = (Path(maker.stdout.readline().strip()) for maker in makers if maker.stdout)
    (killed / "prefill").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "owner").touch()
    (tmp_path / "adrenaline-link").symlink_to(tmp_path / "elsewhere")  # not a folder
    (tmp_path / "adrenaline-young").mkdir()  # whose maker has not locked it yet
    makers[1].kill()
    makers[1].communicate()
    mine = runtime_folder()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {lives.name, mine.name, "elsewhere", "adrenaline-link", "adrenaline-young"}
    assert (tmp_path / "elsewhere" / "owner").exists()
    makers[0].kill()
    makers[0].communicate()


def test_private_folders_are_private_under_any_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = make_private(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (made.parent, made)] == [0o700, 0o700]
    assert make_private(made) == made
