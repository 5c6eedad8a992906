"""How many parts a body may have."""

import json
from typing import Any

import pytest
from fastapi.routing import APIRoute, iter_route_contexts
from hypothesis import given
from hypothesis import strategies as st

import main
from serving.bodies import BoundedRoute, count_parts

texts = st.text(alphabet='a"\\{[.,:eN\n', max_size=8)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
)


def parts_of(value: Any) -> int:
    """Counted in what was parsed."""
    if isinstance(value, dict):
        return 1 + len(value) + sum(map(parts_of, value.values()))
    if isinstance(value, list):
        return 1 + sum(map(parts_of, value))
    return isinstance(value, str | bool)


@given(values)
def test_parts_are_counted_as_if_they_were_parsed(value: Any) -> None:
    assert count_parts(json.dumps(value)) == parts_of(value)


@pytest.mark.parametrize("number", ["1.5", "1e9", "1E9"])
def test_fractions_count_as_parts_and_whole_numbers_do_not(number: str) -> None:
    assert count_parts(f"[1,{number},-3,{number}]") == 3


def test_every_route_with_a_body_counts_its_parts() -> None:
    with_body = [
        context.original_route
        for context in iter_route_contexts(main.app.routes)
        if isinstance(context.original_route, APIRoute) and context.original_route.body_field
    ]
    assert len(with_body) >= 6
    assert all(isinstance(route, BoundedRoute) for route in with_body)
