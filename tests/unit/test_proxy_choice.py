"""Which of several engines a request goes to: the rules alone, with any state, and the file that names the engines."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.proxy import choice, engine_file
from vllm_adrenaline.proxy.choice import Candidate, Memory, beginnings, order

candidates = st.lists(
    st.builds(Candidate, st.sampled_from("abcdefgh"), st.integers(0, 100_000), st.booleans()),
    max_size=8,
    unique_by=lambda each: each.key,
)
seeds = st.integers(0, 2**32)
cached = st.dictionaries(st.sampled_from("abcdefghij"), st.integers(0, 20_000))
sessions = st.none() | st.text("xyz", max_size=5)


def draws(seed: int) -> choice.Callable[[int], int]:
    return random.Random(seed).randrange


# The order


@given(candidates, seeds, cached, sessions)
def test_every_engine_is_asked_once_and_those_that_are_away_last(
    engines: list[Candidate], seed: int, known: dict[str, int], session: str | None
) -> None:
    found = order(engines, draws(seed), known, session)
    assert sorted(found) == list(range(len(engines)))
    there = [engines[index].available for index in found]
    assert there == sorted(there, reverse=True)


@given(candidates, seeds)
def test_the_first_is_never_the_busiest_of_several(engines: list[Candidate], seed: int) -> None:
    there = [each.outstanding for each in engines if each.available]
    if len(there) > 1:
        first = engines[order(engines, draws(seed))[0]].outstanding
        assert sum(each >= first for each in there) > 1


@given(candidates, seeds, st.lists(st.none() | st.integers(0, 200), min_size=8, max_size=8))
def test_an_engine_without_room_comes_after_those_that_have_some(
    engines: list[Candidate], seed: int, rooms: list[int | None]
) -> None:
    engines = [replace(each, room=room) for each, room in zip(engines, rooms, strict=False)]
    found = [engines[index] for index in order(engines, draws(seed), tokens=100) if engines[index].available]
    hold = [each.room is None or each.room >= 100 or not each.outstanding for each in found]
    assert hold == sorted(hold, reverse=True)


@given(candidates, seeds, cached)
def test_an_engine_that_knows_the_beginning_gets_it_unless_it_is_busier_by_more_than_it_saves(
    engines: list[Candidate], seed: int, known: dict[str, int]
) -> None:
    there = [each for each in engines if each.available]
    if there:
        first = engines[order(engines, draws(seed), known)[0]]
        for each in there:
            if each.key in known:
                saves = known[each.key] - known.get(first.key, 0)
                assert first.outstanding <= each.outstanding - saves


@given(candidates, st.text("xyz"), seeds, seeds, cached, st.data())
def test_a_session_stays_where_it_is_whatever_the_load_until_its_engine_goes(
    engines: list[Candidate], session: str, one: int, other: int, known: dict[str, int], data: st.DataObject
) -> None:
    def first(some: list[Candidate], seed: int) -> str | None:
        found = order(some, draws(seed), known, session)
        return some[found[0]].key if found else None

    there = [Candidate(each.key, each.outstanding) for each in engines]
    home = first(there, one)
    busier = [Candidate(each.key, data.draw(st.integers(0, 10**6))) for each in there]
    assert first(data.draw(st.permutations(busier)), other) == home
    fewer = [each for each in there if each.key == home or data.draw(st.booleans())]
    assert first(fewer, other) == home, "another engine that goes moves no session of this one"


def test_equal_engines_get_equal_shares() -> None:
    rng = random.Random(1)
    counts = [0] * 4
    for _ in range(4000):
        counts[order([Candidate(key) for key in "abcd"], rng.randrange)[0]] += 1
    assert all(900 < count < 1100 for count in counts)


def test_sessions_are_spread_over_the_engines() -> None:
    engines = [Candidate(key) for key in "abcd"]
    counts = [0] * 4
    for number in range(4000):
        counts[order(engines, random.randrange, session=f"s{number}")[0]] += 1
    assert all(900 < count < 1100 for count in counts)


# Beginnings


@given(st.lists(st.binary(max_size=700), max_size=6), st.data())
def test_beginnings_depend_on_the_bytes_and_not_on_their_parts(parts: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(parts)
    found = beginnings(parts)
    assert found == beginnings([whole])
    sizes = [256, 512, 1024, 2048, 4096]
    assert [size for size, _ in found] == [size for size in sizes if size <= len(whole)]
    shorter = data.draw(st.integers(0, len(whole)))
    assert beginnings([whole[:shorter]]) == [each for each in found if each[0] <= shorter]


@given(st.binary(min_size=600, max_size=600), st.integers(0, 599))
def test_prompts_share_the_beginnings_before_the_first_byte_that_differs(prompt: bytes, at: int) -> None:
    other = prompt[:at] + bytes([prompt[at] ^ 1]) + prompt[at + 1 :]
    same = [one == two for one, two in zip(beginnings([prompt]), beginnings([other]), strict=True)]
    assert same == [at >= 256, at >= 512]


def test_a_large_prompt_is_not_read_to_its_end() -> None:
    assert beginnings([b"x" * (1 << 20)])[-1][0] == choice.LONGEST


def test_what_engines_have_computed_is_known_by_the_longest_beginning_of_each() -> None:
    memory = Memory()
    short, long = beginnings([b"a" * 300]), beginnings([b"a" * 2100])
    memory.remember(long, "p1")
    assert memory.cached(long) == {"p1": 512}
    memory.remember(short, "p2")
    assert memory.cached(long) == {"p2": 64, "p1": 512}
    assert memory.cached(beginnings([b"b" * 3000])) == {}


@given(st.lists(st.tuples(st.binary(min_size=256, max_size=520), st.sampled_from("ab"))), st.integers(1, 5))
def test_memory_is_bounded_and_keeps_what_was_used_last(prompts: list[tuple[bytes, str]], most: int) -> None:
    memory = Memory(most)
    for prompt, key in prompts:
        memory.remember(beginnings([prompt]), key)
        assert len(memory._engines) <= most
        assert memory.cached(beginnings([prompt])).get(key)


# The file

TOML = """
[[prefill]]
url = "http://10.0.0.1:8001/"
[[decode]]
url = "unix:/run/d.http"
name = "big"
[[decode]]
url = "https://d:8002"
"""


def test_a_file_names_engines_in_toml_or_json(tmp_path: Path) -> None:
    (tmp_path / "e.toml").write_text(TOML)
    found = engine_file.load(tmp_path / "e.toml")
    assert found.of("prefill") == [("prefill-0", "http://10.0.0.1:8001")]
    assert found.of("decode") == [("big", "unix:/run/d.http"), ("decode-1", "https://d:8002")]
    decode = [{"url": "unix:/run/d.http", "name": "big"}, {"url": "https://d:8002"}]
    (tmp_path / "e.json").write_text(json.dumps({"prefill": [{"url": "http://10.0.0.1:8001/"}], "decode": decode}))
    assert engine_file.load(tmp_path / "e.json") == found


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "missing required field `decode`"),
        ("decode = []", "no decode engine"),
        ("decode = [{url = 1}]", "Expected `str`, got `int`"),
        ('decode = [{url = "10.0.0.1:80"}]', "is no URL"),
        ('decode = [{url = "http://a", weight = 2}]', "unknown field `weight`"),
        ('decode = [{url = "http://a", name = "a/b"}]', "'a/b' is no name"),
        ('decode = [{url = "http://a", name = "x"}, {url = "http://b", name = "x"}]', "'x' is the name of 2 engines"),
        ('decode = [{url = "http://a"}, {url = "http://a/"}]', "a decode engine is named twice"),
        ('decodes = [{url = "http://a"}]', "decode"),
        ("[[decode", "at the end of an array declaration"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "e.toml"
    file.write_text(text)
    with pytest.raises(AdrenalineError, match="--engines ") as raised:
        engine_file.load(file)
    assert why in str(raised.value)
    assert "\n" not in str(raised.value)


@given(st.binary(max_size=60))
def test_any_content_is_engines_or_one_sentence(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    for ending in ("toml", "json"):
        file = tmp_path_factory.getbasetemp() / f"any.{ending}"
        file.write_bytes(content)
        with pytest.raises(AdrenalineError):
            engine_file.load(file)


def test_a_watched_file_changes_the_engines_and_bad_content_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine_file, "WATCH_S", 0.01)
    one, two, link = tmp_path / "1.toml", tmp_path / "2.toml", tmp_path / "e.toml"
    one.write_text('decode = [{url = "http://a"}]')
    two.write_text('decode = [{url = "http://b"}]')
    link.symlink_to(one)
    seen: list[str] = []

    async def run() -> None:
        known = engine_file.load(link)
        task = asyncio.create_task(engine_file.watch(link, known, lambda new: seen.append(new.decode[0].url)))
        await asyncio.sleep(0.05)
        assert not seen, "it says what it said before"
        link.unlink()
        await asyncio.sleep(0.05)
        assert "the engines stay as they were" in caplog.text
        link.symlink_to(two)  # as Kubernetes does it with a mounted ConfigMap
        await asyncio.sleep(0.05)
        assert seen == ["http://b"]
        two.write_text("decode = []")
        await asyncio.sleep(0.05)
        assert "no decode engine; the engines stay as they were" in caplog.text
        two.write_text('decode = [{url = "http://c"}]')
        await asyncio.sleep(0.05)
        assert seen == ["http://b", "http://c"]
        task.cancel()

    with caplog.at_level(logging.WARNING):
        asyncio.run(run())
