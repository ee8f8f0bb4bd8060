"""What is said of signatures is what Python does with them: calls are made, and compared."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_adrenaline.seams.signature import Call, Signature, differences, signature_of

NAMES = ("a", "b", "c")
calls = st.builds(
    Call,
    st.integers(0, 4),
    st.lists(st.sampled_from([*NAMES, "d"]), unique=True, max_size=3).map(lambda names: tuple(sorted(names))),
)


@st.composite
def signatures(draw: st.DrawFn) -> Signature:
    """Return any signature of up to three parameters, in any order, with or without * and **."""
    names = draw(st.permutations(NAMES))[: draw(st.integers(0, 3))]
    only_position = draw(st.integers(0, len(names)))
    only_name = draw(st.integers(only_position, len(names)))
    optional_from = draw(st.integers(0, only_name))
    written = []
    for index, name in enumerate(names[:only_name]):
        written.append(f"{name}=0" if index >= optional_from else name)
        if index == only_position - 1:
            written.append("/")
    takes_any = draw(st.booleans())
    if takes_any or only_name < len(names):
        written.append("*args" if takes_any else "*")
    written += [f"{name}=0" if draw(st.booleans()) else name for name in names[only_name:]]
    if draw(st.booleans()):
        written.append("**kwargs")
    return Signature(f"({', '.join(written)})")


def takes(signature: Signature, call: Call) -> bool:
    """Return whether Python calls a function of this signature so."""
    names: dict[str, Any] = {}
    exec(f"def f{signature.text}: ...", names)
    try:
        names["f"](*range(call.positional), **dict.fromkeys(call.keywords, 0))
    except TypeError:
        return False
    return True


@given(signatures(), calls)
def test_a_call_lacks_something_exactly_if_python_refuses_it(signature: Signature, call: Call) -> None:
    assert (list(signature.lacks(call)) == []) == takes(signature, call)


@given(signatures(), signatures(), calls)
def test_what_can_replace_a_function_takes_every_call_of_it(ours: Signature, base: Signature, call: Call) -> None:
    """Every call that gives what the function names; by position, where ours takes the rest by `*` alone."""
    if list(ours.does_not_replace(base)) or not takes(base, call):
        return
    if call.positional > len(base.parameters) or not {*call.keywords} <= {
        each.name for each in base.parameters if each.by_name
    }:
        return
    by_position = {each.name for each in base.parameters if each.by_position}
    if ours.takes_any_position and not ours.takes_any_name and by_position & {*call.keywords}:
        return
    assert takes(ours, call)


@given(signatures())
def test_a_signature_replaces_itself_and_differs_in_nothing(signature: Signature) -> None:
    assert list(signature.does_not_replace(signature)) == []
    assert list(differences(signature, signature)) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("(a)", "()", ["takes no `a` any more"]),
        ("()", "(a)", ["takes `a`, too, which is required"]),
        ("()", "(a=1)", ["takes `a`, too"]),
        ("(a)", "(a=1)", ["takes `a` in another way: required, by position or by name before, optional, by position "]),
        ("(a, b)", "(b, a)", ["takes its parameters in another order: b, a"]),
        ("()", "(*args)", ["takes *args too"]),
        ("(**kwargs)", "()", ["takes **kwargs no more"]),
        ("() -> int", "() -> str", ["returns str, and before int"]),
    ],
)
def test_what_differs_in_two_signatures_is_said(old: str, new: str, said: list[str]) -> None:
    found = list(differences(Signature(old), Signature(new)))
    assert len(found) == len(said)
    assert all(each.startswith(start) for each, start in zip(found, said, strict=True))


def test_a_signature_is_read_without_annotations_and_self() -> None:
    import ast

    (node,) = ast.parse("def f(self, a: int, *b: str, c: 'X' = 1, **d: Any) -> None: ...").body
    assert isinstance(node, ast.FunctionDef)
    assert signature_of(node.args, node.returns, drop_first=True).text == "(a, *b, c=1, **d) -> None"
    assert signature_of(node.args, None, drop_first=False).text == "(self, a, *b, c=1, **d)"
