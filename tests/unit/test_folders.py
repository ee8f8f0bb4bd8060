"""Where files are kept."""

from pathlib import Path

import pytest

from vllm_adrenaline.system.folders import cache_folder, runtime_folder


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
        folder.rmdir()
