"""The arguments of the control API: anything but the documented ones is refused with a sentence."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dockerproxy.admin.arguments import Argument, InvalidArguments, parse_body, parse_pairs
from dockerproxy.admin.control import CHECK, COLLECT, IMPORT, LIST, REMOVE

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=10,
)


@pytest.mark.parametrize(
    ("known", "content", "arguments"),
    [
        (COLLECT, b"", {}),
        (COLLECT, b'{"grace": 120, "dry_run": true}', {"grace": 120, "dry_run": True}),
        (COLLECT, b'{"grace": 1e3}', {"grace": 1000.0}),
        (REMOVE, b'{"names": ["a", "b:c"], "where": "hosted"}', {"names": ["a", "b:c"], "where": "hosted"}),
        (IMPORT, b'{"directory": "/srv/caf\\udce9"}', {"directory": "/srv/caf\udce9"}),
    ],
)
def test_documented_arguments(known: Mapping[str, Argument], content: bytes, arguments: object) -> None:
    assert parse_body(content, known) == arguments


@pytest.mark.parametrize(
    ("known", "content", "message"),
    [
        (COLLECT, b'{"grace": NaN}', "not a JSON object"),
        (COLLECT, b'{"grace": Infinity}', "not a JSON object"),
        (COLLECT, b'{"grace": -Infinity}', "not a JSON object"),
        (COLLECT, b'{"grace": 1e999}', "'grace' is not a number of seconds"),
        (COLLECT, b'{"grace": -1}', "'grace' is not a number of seconds"),
        (COLLECT, b'{"grace": true}', "'grace' is not a number of seconds"),
        (COLLECT, b'{"grace": "120"}', "'grace' is not a number of seconds"),
        (COLLECT, b'{"grace": ' + b"9" * 400 + b"}", "'grace' is not a number of seconds"),
        (COLLECT, b'{"grace": ' + b"9" * 5000 + b"}", "not a JSON object"),
        (COLLECT, b'{"dry_run": 1}', "'dry_run' is not true or false"),
        (COLLECT, b'{"dry_run": true, "dry_run": false}', "not a JSON object"),
        (COLLECT, b'{"root": "/etc"}', "'root' is unknown"),
        (COLLECT, b"[" * 30_000, "not a JSON object"),
        (COLLECT, b'{"a":' * 10_000, "not a JSON object"),
        (COLLECT, b"[]", "not a JSON object"),
        (COLLECT, b"\xff", "not a JSON object"),
        (COLLECT, b'{"' + b"x" * 60_000 + b'": 1}', "is unknown"),
        (CHECK, b'{"cached": null}', "'cached' is not true or false"),
        (REMOVE, b'{"names": []}', "'names' is not a list of 1 to 1000 names"),
        (REMOVE, b'{"names": "a"}', "'names' is not a list"),
        (REMOVE, b'{"names": ["a", 1]}', "'names' is not a list"),
        (REMOVE, b'{"names": ["a\\u0000"]}', "'names' is not a list"),
        (REMOVE, b'{"names": [' + b'"a",' * 1000 + b'"a"]}', "'names' is not a list"),
        (REMOVE, b'{"names": ["a"], "where": "elsewhere"}', "'where' is not hosted or cached"),
        (REMOVE, b"{}", "'names' is missing"),
        (IMPORT, b'{"directory": "a/b"}', "'directory' is not an absolute path"),
        (IMPORT, b'{"directory": "/\\ud800"}', "'directory' is not an absolute path"),
        (IMPORT, b'{"directory": "/' + b"x" * 5000 + b'"}', "'directory' is not an absolute path"),
    ],
)  # fmt: skip
def test_other_arguments(known: Mapping[str, Argument], content: bytes, message: str) -> None:
    required = {id(REMOVE): "names", id(IMPORT): "directory"}.get(id(known))
    with pytest.raises(InvalidArguments) as raised:
        parse_body(content, known, required)
    assert message in str(raised.value)
    assert len(str(raised.value)) < 200


@given(st.dictionaries(st.sampled_from([*COLLECT, *REMOVE, *IMPORT, "other"]), JSON))
def test_whatever_is_accepted_has_its_type(document: dict[str, object]) -> None:
    for known in (COLLECT, REMOVE, IMPORT):
        try:
            arguments = parse_body(json.dumps(document).encode(), known)
        except InvalidArguments:
            continue
        assert set(arguments) <= set(known)
        assert type(arguments.get("grace", 0)) in (int, float)
        assert {type(arguments[name]) for name in ("dry_run", "list", "force") if name in arguments} <= {bool}


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("where", "elsewhere")], "'where' is not hosted or cached"),
        ([("name", "a"), ("name", "b")], "twice"),
        ([("name", "")], "'name' is not a name"),
        ([("names", "a")], "'names' is unknown"),
    ],
)
def test_a_query_has_no_other_arguments(pairs: list[tuple[str, str]], message: str) -> None:
    assert parse_pairs([("name", "a"), ("where", "cached")], LIST) == {"name": "a", "where": "cached"}
    with pytest.raises(InvalidArguments, match=message):
        parse_pairs(pairs, LIST)
