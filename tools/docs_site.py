"""What mkdocs needs to know of this repository: pages that lie outside docs/, and links to them (mkdocs.yml, hooks).

README, CONTRIBUTING and the like stay where GitHub shows them, and are pages of the site, too. All pages lie side by
side. A link to a file that is no page, such as a source, becomes its text: the site has no repository to point at.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security-policy.md",
    "examples/README.md": "examples.md",
    "deploy/README.md": "deploy.md",
    "patches/README.md": "patches.md",
}
"""Pages by the file that they are, and how the site calls them."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")
SOURCES = {page: source for source, page in OUTSIDE.items()}


def rewrite(markdown: str, source: str) -> str:
    """Return the text of a file, by its path in the repository, with links as they are on the site."""

    def link(found: re.Match[str]) -> str:
        picture, text, path, anchor = found.groups(default="")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if target in OUTSIDE:
            return f"{picture}[{text}]({OUTSIDE[target]}{anchor})"
        if target.startswith("docs/"):
            return f"{picture}[{text}]({target.removeprefix('docs/')}{anchor})"
        if not (ROOT / target).exists():
            raise FileNotFoundError(f"{source} links to {path}, which is not there")
        return text

    return LINK.sub(link, markdown)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie outside docs/."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page's text with links as they are on the site."""
    return rewrite(markdown, SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}"))
