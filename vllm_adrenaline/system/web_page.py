"""HTML pages that need nothing else: scripts and styles are in them, and a browser is told to load no others.

uPlot draws their charts (system/web/uPlot.*, 53 KB, MIT; version 1.6.32, unchanged).
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

WEB = Path(__file__).parent / "web"
STYLES = ("uPlot.min.css", "base.css")
SCRIPTS = ("uPlot.iife.min.js",)
HEAD = "<!-- styles and scripts of system/web -->"
"""Where a page wants them."""


def complete(page: str) -> str:
    """Return a page with what system/web has in the place of HEAD."""
    parts = [f"<style>{(WEB / name).read_text()}</style>" for name in STYLES]
    parts += [f"<script>{(WEB / name).read_text()}</script>" for name in SCRIPTS]
    assert HEAD in page
    return page.replace(HEAD, "\n".join(parts))


def content_security_policy(page: str) -> str:
    """Return the header by which a browser runs this page's own scripts only, and talks to its own server only."""
    hashes = {kind: " ".join(_hashes(page, kind)) for kind in ("script", "style")}
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hashes(page: str, tag: str) -> Iterator[str]:
    for text in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL):
        yield f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
