"""The docs: their tables are what the code says, and the site builds with every link leading somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import docs
from vllm_adrenaline.engine.metrics import ADVICE, COUNTERS, GAUGES, PLACED

ROOT = Path(__file__).parents[2]
LOADED = re.compile(r"<(?:script|img|iframe)[^>]+src=\"?(?:https?:)?//|<link[^>]+href=\"?(?:https?:)?//[^>]+stylesheet")


@pytest.mark.parametrize("page", ["configuration.md", "metrics.md"])
def test_tables_are_what_the_code_says(page: str) -> None:
    text = (docs.DOCS / page).read_text()
    assert docs.PLACE.search(text)
    assert text == docs.renewed(text), "run: python tools/docs.py"


def test_every_table_is_on_a_page() -> None:
    pages = "".join(page.read_text() for page in docs.DOCS.glob("*.md"))
    assert {found[2] for found in docs.PLACE.finditer(pages)} == set(docs.TABLES)


@pytest.mark.parametrize("text", [*COUNTERS.values(), *GAUGES.values(), PLACED])
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
