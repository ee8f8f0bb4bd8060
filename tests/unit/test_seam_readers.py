"""A vLLM is read from wherever it is, of one on a server only what is looked at; and what the command says of it."""

from __future__ import annotations

import http.server
import io
import random
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_adrenaline import cli
from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.seams import command, readers

TREE = {"vllm/__init__.py": "", "vllm/a.py": "def f(): ..."}
BALLAST = 8 << 20
"""Bytes of a wheel's libraries."""


def make_folder(path: Path) -> Path:
    for name, text in TREE.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


def make_wheel(path: Path) -> Path:
    with zipfile.ZipFile(path / "vllm-9.9.0-py3-none-any.whl", "w") as archive:
        archive.writestr("vllm/_C.so", random.Random(1).randbytes(BALLAST))
        for name, text in TREE.items():
            archive.writestr(name, text)
    return path / "vllm-9.9.0-py3-none-any.whl"


def make_sdist(path: Path) -> Path:
    with tarfile.open(path / "vllm-9.9.0.tar.gz", "w:gz") as archive:
        for name, text in {**TREE, "tests/test.py": ""}.items():
            info = tarfile.TarInfo(f"vllm-9.9.0/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return path / "vllm-9.9.0.tar.gz"


@pytest.mark.parametrize("make", [make_folder, make_wheel, make_sdist])
def test_a_tree_is_read_from(make: object, tmp_path: Path) -> None:
    assert callable(make)
    assert dict(readers.local(make(tmp_path))) == TREE


def test_a_folder_without_vllm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdrenalineError, match="no source tree of vLLM"):
        readers.local(tmp_path)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves one file, by ranges unless told otherwise."""

    data = b""
    gives_ranges = True

    def do_GET(self) -> None:
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        data = self.data[first : last + 1] if self.gives_ranges else b""
        self.send_response(206 if self.gives_ranges else 200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(self.data)}")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, type[Handler]]]:
    class Serving(Handler):
        data = make_wheel(tmp_path).read_bytes()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Serving) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/vllm.whl", Serving
        server.shutdown()
        thread.join()


def test_of_a_wheel_on_a_server_little_is_read(served: tuple[str, type[Handler]]) -> None:
    remote = readers.Remote(served[0])
    assert dict(readers.wheel(remote, "it")) == TREE
    assert 0 < remote.fetched <= 2 * readers.CHUNK < BALLAST


def test_a_server_that_gives_no_ranges_is_refused(served: tuple[str, type[Handler]]) -> None:
    url, handler = served
    handler.gives_ranges = False
    with pytest.raises(OSError, match="gives no parts"):
        readers.wheel(readers.Remote(url), "it")


def test_the_command_says_what_a_tree_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check-seams", str(make_folder(tmp_path))]) == 1
    said = capsys.readouterr().out
    assert "vllm.v1.core.sched.scheduler:Scheduler" in said
    assert "is gone: there is no module vllm.v1.core.sched.scheduler" in said
    assert "used by compat/scheduler.py" in said


def test_the_command_compares_two_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check-seams", "0.32", "0.33"]) == 0
    said = capsys.readouterr().out
    assert "takes `error`, too" in said
    assert "vllm.v1.core.sched.scheduler:Scheduler().schedule" in said
    assert "vLLM 0.33: all" in said


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nothing/here"], "neither a file, nor a folder, nor a version"),
        (["0.32", "0.33", "0.33"], "at most two versions"),
    ],
)
def test_what_is_no_version_is_refused(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check-seams", *argv]) == 1
    assert said in capsys.readouterr().err


def test_without_pip_s_answer_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(AdrenalineError, match=r"pip finds no wheel of vllm==9\.9\.\*"):
        command.subject("9.9")
