"""The docs: their tables are what the code says, and the site builds with every link leading somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tools import docs
from tools.docs_site import OUTSIDE
from vllm_adrenaline import cli, config
from vllm_adrenaline.engine.metrics import ADVICE, COUNTERS, GAUGES, GPU_GAUGES, PLACED

ROOT = Path(__file__).parents[2]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in docs.DOCS.glob("*.md")) + sorted(OUTSIDE)
FENCE = re.compile(r"^```\w*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LOADED = re.compile(r"<(?:script|img|iframe)[^>]+src=\"?(?:https?:)?//|<link[^>]+href=\"?(?:https?:)?//[^>]+stylesheet")


@pytest.mark.parametrize("page", ["configuration.md", "metrics.md"])
def test_tables_are_what_the_code_says(page: str) -> None:
    text = (docs.DOCS / page).read_text()
    assert docs.PLACE.search(text)
    assert text == docs.renewed(text), "run: python tools/docs.py"


def test_every_table_is_on_a_page() -> None:
    pages = "".join(page.read_text() for page in docs.DOCS.glob("*.md"))
    assert {found[2] for found in docs.PLACE.finditer(pages)} == set(docs.TABLES)


@pytest.mark.parametrize("text", [*COUNTERS.values(), *GAUGES.values(), *GPU_GAUGES.values(), PLACED])
def test_every_metric_of_an_engine_says_what_to_do_when_it_is_high(text: str) -> None:
    meaning, _, advice = text.partition(ADVICE)
    assert re.fullmatch(r"[A-Z].{10,}[.]", meaning)
    assert re.fullmatch(r"[a-z].{10,}[.]", advice)


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    """A link or an anchor that leads nowhere, and a page that is in no menu, are errors."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=quiet)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    pages = list(tmp_path.glob("*.html"))
    assert len(pages) > len(list(docs.DOCS.glob("*.md")))
    for page in pages:
        assert not LOADED.search(page.read_text()), page.name


def commands(page: str) -> list[list[str]]:
    """Return the words of every command in a page's blocks of code, and in its text if there is more than one word."""
    text = (ROOT / page).read_text()
    lines = [line for block in FENCE.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    lines += [
        line for line in re.findall(r"`([^`\n]+)`", FENCE.sub("", text)) if line.count(" ") > 1 or line[:5] == "make "
    ]
    found = [re.sub(r"^.*\$\((.*)\)$", r"\1", line.strip()) for line in lines]
    return [
        shlex.split(line.replace("...", ""), comments=True)
        for line in found
        if line.startswith(("adrenaline ", "make ", "vllm serve ", "python ")) and line.count("'") % 2 == 0
    ]


def is_taken(program: str, words: list[str]) -> bool:
    """Return whether a command of the docs is there, and takes these words."""
    words = words[: next((at for at, word in enumerate(words) if word in ("&", ">", "|", ";")), None)]
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return {word for word in words if word.islower()} <= set(targets)
    if program == "vllm":
        given = {word for word in words if word.startswith(config.FLAG_PREFIX)}
        return given <= {flag for _, flag, _ in config.flags()}
    if program == "python":
        return not words[0].endswith(".py") or (ROOT / words[0]).exists()
    try:
        _, rest = cli.make_parser(words).parse_known_args(cli._join_values(words))
    except SystemExit as end:
        return end.code == 0  # of --help
    return not rest or words[0] == "up"


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_the_docs_is_one_that_is_taken(page: str) -> None:
    assert [words for words in commands(page) if not is_taken(words[0], words[1:])] == []
