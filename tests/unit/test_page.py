"""The proxy's page in a browser: what it shows of a cluster, in both themes, on a large screen and on a phone.

Skipped where there is no Chromium (on Debian: apt-get install chromium).
"""

from __future__ import annotations

from pathlib import Path

import aiohttp
import pytest

from tests.unit.browser import CHROMIUM, browser
from tests.unit.page_cases import busy_decode, busy_prefill
from tests.unit.proxy_cases import FakeEngine, with_proxy

pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium"),
    pytest.mark.extended,
]
TEXT = "document.body.innerText"
LOOKED = "typeof times !== 'undefined' && times.length >= %d"


def url_of(client: aiohttp.ClientSession) -> str:
    return str(client._base_url)


def test_it_shows_what_the_engines_do(tmp_path: Path) -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        async with browser(tmp_path) as tab:
            await tab.show(url_of(client))
            await tab.until(LOOKED % 3)
            text = await tab.value(TEXT)
            picture = await tab.value("document.querySelector('#topology svg').textContent")
            charts = await tab.value("document.querySelectorAll('canvas').length")
            filled = await tab.value("charts.every(c => c.made.data[0].length >= 3)")
            assert tab.errors == []
        for part in ("prefill-0", "2 running, 1 waiting", "decode-0", "12 running, 3 waiting", "executor: 5 requests"):
            assert part in picture
        assert "7 local" in picture
        assert "5 offloaded" in picture
        assert "368 of 400" in text, "what the decode side has in use"
        assert "678 of 400" in text, "and would have without offloading"
        assert "local full" in text
        assert "<b>no room</b>" in text, "names are text, whatever they are"
        assert (charts, filled) == (4, True)

    with_proxy(busy_prefill, busy_decode, test, seconds=300)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_it_fits_into_the_window_and_has_the_colours_of_the_theme(tmp_path: Path, width: int, theme: str) -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        async with browser(tmp_path) as tab:
            await tab.show(url_of(client), width=width, theme=theme)
            await tab.until(LOOKED % 1)
            assert await tab.value("document.documentElement.scrollWidth") <= width
            colour = await tab.value("getComputedStyle(document.body).backgroundColor")
            brightness = sum(map(int, colour.removeprefix("rgb(").rstrip(")").split(",")))
            assert (brightness > 384) == (theme == "light")
            assert tab.errors == []

    with_proxy(busy_prefill, busy_decode, test, seconds=300)


def test_it_asks_for_the_key_and_shows_everything_with_it(tmp_path: Path) -> None:
    async def test(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        async with browser(tmp_path) as tab:
            await tab.show(url_of(client))
            await tab.until(f"{TEXT}.includes('the proxy wants its API key')")
            assert "running" not in await tab.value(TEXT)
            await tab.value("at('secret').value = 'k', at('key').requestSubmit()")
            await tab.until(f"{TEXT}.includes('368 of 400')")

    with_proxy(busy_prefill, busy_decode, test, api_key="k", seconds=300)


def test_it_says_when_the_proxy_is_gone(tmp_path: Path) -> None:
    async def run(client: aiohttp.ClientSession, p: FakeEngine, d: FakeEngine) -> None:
        async with browser(tmp_path) as tab:
            await tab.show(url_of(client))
            await tab.until(LOOKED % 1)
            cut = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
            await tab.do("Network.enable")
            await tab.do("Network.emulateNetworkConditions", **cut)
            await tab.until(f"{TEXT}.includes('the proxy does not answer')")

    with_proxy(busy_prefill, busy_decode, run, seconds=300)
