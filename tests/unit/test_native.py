"""The native library: built from these sources, clean under the sanitizers, refused when it is missing or stale."""

from __future__ import annotations

import ast
import hashlib
import inspect
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.kv import space
from vllm_adrenaline.native import loader
from vllm_adrenaline.native.build_hash import build_hash
from vllm_adrenaline.native.library import library

ROOT = Path(__file__).parent.parent.parent
FLAGS = ["-std=c++17", "-g1", "-Wall", "-Wextra", "-Wshadow", "-Werror"]
SANITIZERS = {
    "plain": ["-O2"],
    "address and undefined behaviour": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "threads": ["-O1", "-fsanitize=thread"],
}


PROGRAMS = {
    **{("test_channel", kind): [*options, "-pthread"] for kind, options in SANITIZERS.items()},
    **{("test_attention", kind): options for kind, options in SANITIZERS.items() if kind != "threads"},
    ("fuzz_channel", "address and undefined behaviour"): SANITIZERS["address and undefined behaviour"],
    ("bench_channel", "plain"): ["-O2"],
}
"""Options of the compiler for each program of csrc/tests."""
DIGITS = 16


@pytest.fixture(scope="module")
def programs(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """All programs, compiled at once, and kept for later runs with the same sources, options and compiler."""
    version = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(f"{version}{FLAGS}{PROGRAMS}".encode())
    for source in sorted((ROOT / "csrc").rglob("*.*")):
        digest.update(f"{source}{source.read_text()}".encode())
    cache: pytest.Cache | None = getattr(pytestconfig, "cache", None)  # none with -p no:cacheprovider
    kept = cache.mkdir("programs") if cache else tmp_path_factory.mktemp("programs")
    folder = kept / digest.hexdigest()[:DIGITS]
    made = {(name, kind): folder / f"{name}-{kind.split()[0]}" for name, kind in PROGRAMS}
    if not folder.exists():
        unfinished = Path(tempfile.mkdtemp(dir=kept))
        compile_programs({key: unfinished / path.name for key, path in made.items()})
        for old in kept.glob("?" * DIGITS):
            shutil.rmtree(old)
        unfinished.rename(folder)
    return made


def compile_programs(made: dict[tuple[str, str], Path]) -> None:
    compilers = [
        subprocess.Popen(
            ["g++", *FLAGS, *options, str(ROOT / "csrc" / "tests" / f"{name}.cpp"), "-o", str(made[name, kind])],
            stderr=subprocess.PIPE,
            text=True,
        )
        for (name, kind), options in PROGRAMS.items()
    ]
    said = [compiler.communicate()[1] for compiler in compilers]
    assert not any(compiler.returncode for compiler in compilers), "\n".join(said)


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_the_channel_works_from_cpp_and_is_clean(sanitizer: str, programs: dict[tuple[str, str], Path]) -> None:
    # TSan of GCC 12 wants the address space laid out as without randomization.
    command = ["setarch", "-R", str(programs["test_channel", sanitizer])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


@pytest.mark.extended
def test_three_executors_as_threads_are_clean_for_long(programs: dict[tuple[str, str], Path]) -> None:
    command = ["setarch", "-R", str(programs["test_channel", "threads"]), "10000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


@pytest.mark.parametrize("inputs", [100_000, pytest.param(1_000_000, marks=pytest.mark.extended)])
def test_any_bytes_in_a_channel_harm_neither_end(inputs: int, programs: dict[tuple[str, str], Path]) -> None:
    command = [str(programs["fuzz_channel", "address and undefined behaviour"]), str(inputs)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("ok\n")


@pytest.mark.parametrize("sanitizer", ["plain", "address and undefined behaviour"])
def test_attention_reads_nothing_it_should_not_and_is_right(
    sanitizer: str, programs: dict[tuple[str, str], Path]
) -> None:
    command = [str(programs["test_attention", sanitizer])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


def test_the_cpp_benchmark_measures_what_it_says(programs: dict[tuple[str, str], Path]) -> None:
    command = [str(programs["bench_channel", "plain"]), "2", "50", "0", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, _ in lines] == ["floor"] * 50 + ["channel"] * 50
    assert all(int(time) > 0 for _, time in lines)


def test_the_library_is_of_these_sources() -> None:
    assert build_hash(ROOT / "csrc") == loader.load().SOURCES


def test_a_changed_source_makes_the_library_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "build_hash", lambda folder: "0" * 16)
    with pytest.raises(AdrenalineError, match=r"other sources.*pip install"):
        loader.load()


def test_the_digest_knows_every_source_and_ignores_tests(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "a.h").write_text("1")
    before = build_hash(tmp_path)
    (tmp_path / "tests" / "t.cpp").write_text("1")
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "c.h").write_text("1")  # a library of its own
    assert build_hash(tmp_path) == before
    (tmp_path / "a.h").write_text("2")
    assert build_hash(tmp_path) != before


def test_what_is_said_of_its_types_is_true() -> None:
    """Callers are checked against the stub, so it must say what the library has: names, methods, names of arguments."""
    said: dict[str, list[str] | None] = {}

    def read(body: list[ast.stmt], within: str = "") -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                read(node.body, f"{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                said[within + node.name] = [each.arg for each in (*node.args.posonlyargs, *node.args.args)]
            elif isinstance(node, ast.AnnAssign):
                said[ast.unparse(node.target)] = None

    read(ast.parse((ROOT / "vllm_adrenaline" / "native" / "_native.pyi").read_text()).body)
    found: dict[str, list[str] | None] = {}
    for name, each in vars(library).items():
        if isinstance(each, type):
            methods = {key: method for key, method in vars(each).items() if inspect.ismethoddescriptor(method)}
            found |= {f"{name}.{key}": [*inspect.signature(method).parameters] for key, method in methods.items()}
            found |= {f"{name}.__new__": said.get(f"{name}.__new__")} if "__new__" in vars(each) else {}
        elif not name.startswith("__"):
            found[name] = [*inspect.signature(each).parameters] if callable(each) else None
    assert said == found


def test_a_block_id_means_the_same_to_the_scheduler_and_to_the_split() -> None:
    """Schedulers and simulations do without the library."""
    assert (space.INDEX_BITS, space.MAX_EXECUTORS) == (library.INDEX_BITS, library.MAX_EXECUTORS)


def test_a_missing_library_says_which_command_mends_it() -> None:
    code = (
        "import sys; sys.modules['vllm_adrenaline.native._native'] = None\n"
        "from vllm_adrenaline.errors import AdrenalineError\n"
        "from vllm_adrenaline.native import loader\n"
        "try: loader.load()\n"
        "except AdrenalineError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "does not load" in done.stdout
    assert "pip install" in done.stdout
