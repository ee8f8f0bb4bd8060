"""Processor cores: lists of them as a user writes them, and halves for two engines."""

import pytest

from vllm_adrenaline.errors import AdrenalineError
from vllm_adrenaline.system import cores


@pytest.mark.parametrize(
    ("text", "ranks"),
    [
        ("", []),
        ("3", [[3]]),
        ("2-4", [[2, 3, 4]]),
        ("4,0-1", [[0, 1, 4]]),
        ("0|1", [[0], [1]]),
        ("0-1|2, 3", [[0, 1], [2, 3]]),
    ],
)
def test_lists_of_cores(text: str, ranks: list[list[int]]) -> None:
    assert cores.parse(text) == ranks


@pytest.mark.parametrize("text", ["x", "1-", "1..2", "|", "0|", "-1", "3-2", "5000"])
def test_what_is_no_list_of_cores_is_refused(text: str) -> None:
    with pytest.raises(AdrenalineError):
        cores.parse(text)


def test_cores_must_be_there_and_be_as_many_lists_as_ranks() -> None:
    cores.check("", 2)
    cores.check("0", 1)
    with pytest.raises(AdrenalineError, match="this machine has no core 4000"):
        cores.check("4000", 1)
    with pytest.raises(AdrenalineError, match=r"1 rank\(s\); there are 2"):
        cores.check("0", 2)


@pytest.mark.parametrize(
    ("all_cores", "halves"),
    [([0, 1], ("0", "1")), ([0, 1, 2], ("0,1", "2")), ([5], ("5", "5")), ([0, 2, 4, 6], ("0,2", "4,6"))],
)
def test_cores_are_halved(all_cores: list[int], halves: tuple[str, str]) -> None:
    assert cores.split_cores(all_cores) == halves
