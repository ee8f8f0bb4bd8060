"""What the docs tell a newcomer to type is typed here, as it stands there, on real engines.

Each page's blocks of bash run one after the other in one shell, in a network namespace of their own: port 8000 is free
there. `MODEL` is a link to the tests' model, unless the page makes its own.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MAKES_ITS_MODEL = "docs/quickstart.md"
pytestmark = pytest.mark.extended


def blocks(page: str, language: str) -> list[str]:
    """Return a page's blocks of code in this language."""
    return [code for kind, code in BLOCK.findall((ROOT / page).read_text()) if kind == language]


def run(folder: Path, script: str, timeout_s: float) -> str:
    """Run a script of bash as a user of this environment would, and return all that it printed."""
    if shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("a network namespace needs unshare, and root")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["unshare", "--net", "bash", "-c", f"ip link set lo up\nset -e\n{script}\nwait"]
    with (folder / "printed").open("w+") as printed:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout_s)
        finally:
            with contextlib.suppress(ProcessLookupError):  # a script that fails leaves what it has started
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)
        printed.seek(0)
        said = printed.read()
    assert status == 0, said[-3000:]
    return said


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    """A folder as the docs have it: with a model, and the examples."""
    (tmp_path / "MODEL").symlink_to(model)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


@pytest.mark.parametrize(
    ("page", "printed"),
    [
        (MAKES_ITS_MODEL, r'"completion_tokens":16(.|\n)*local +fits +1\n'),
        ("docs/up.md", r"/engines/decode-0: 0 running"),
        ("docs/by-hand.md", r'"completion_tokens":16'),
        ("examples/README.md", r"\n'Once upon a time': ['\"].+['\"]\n'The capital of France is': ['\"].+['\"]"),
    ],
)
def test_the_commands_of_a_page_do_what_it_says(folder: Path, page: str, printed: str) -> None:
    if page == MAKES_ITS_MODEL:
        (folder / "MODEL").unlink()
    said = run(folder, "".join(blocks(page, "bash")), 500)
    assert re.search(printed, said), said[-3000:]


def test_the_program_of_the_docs_generates(folder: Path) -> None:
    (program,) = blocks("docs/python.md", "python")
    assert blocks("README.md", "python") == [program]
    (folder / "program.py").write_text(program)
    assert "CompletionOutput(" in run(folder, "python program.py", 300)


def test_the_demo_compares(folder: Path) -> None:
    assert "adrenaline, ratio 0.5" in run(folder, "adrenaline demo", 580)


@pytest.mark.timeout(1300)
def test_the_benchmark_compares(folder: Path) -> None:
    assert "report.html" in run(folder, "adrenaline bench --quick", 1200)
