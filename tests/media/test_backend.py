"""What a backend makes of a request's fields before it queues them; the worker only says what its
model takes."""

from types import SimpleNamespace
from typing import Any

import pytest

from backends.base import Client, ForbiddenPrompt, InvalidField
from media.backend import Bounds, MediaBackend
from media.messages import Loaded
from serving.content_filter import ContentFilter

ALL = frozenset({"steps", "guidance", "size", "num_frames", "seconds", "grid_size"})
DEFAULTS = {"steps": 50, "size": (512, 768), "num_frames": 16}


def new_backend(takes: frozenset[str] = ALL, **bounds: int) -> MediaBackend:
    worker: Any = SimpleNamespace(loaded=Loaded(takes, DEFAULTS, multiple=8))
    most = {"steps": 100, "size": 1024, "seconds": 30, "num_frames": 64, "grid_size": 128} | bounds
    content_filter = ContentFilter("hate*")
    return MediaBackend("model", worker, content_filter, Bounds(**most), 60, lambda prompt: None)


def test_fields_that_were_left_out_are_filled_in() -> None:
    complete = new_backend().complete({"steps": None, "guidance": None, "seed": 7})
    assert complete == {**DEFAULTS, "seconds": 10, "seed": 7}


def test_seed_is_drawn_where_none_is_named() -> None:
    seeds = {new_backend().complete({"seed": None})["seed"] for _ in range(5)}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_size_is_read_as_width_and_height() -> None:
    assert new_backend().complete({"size": "640x480"})["size"] == (640, 480)


@pytest.mark.parametrize(
    ("fields", "field", "reason"),
    [
        ({"steps": 101}, "steps", "at most 100 here"),
        ({"seconds": 30.5}, "seconds", "at most 30 here"),
        ({"size": "64x1032"}, "size", "at most 1024 here"),
        ({"size": "64x100"}, "size", "this model takes multiples of 8"),
        ({"num_frames": 65}, "num_frames", "at most 64 here"),
        ({"grid_size": 129}, "grid_size", "at most 128 here"),
    ],
)
def test_field_out_of_bounds_is_refused(fields: Any, field: str, reason: str) -> None:
    with pytest.raises(InvalidField) as refused:
        new_backend().complete(fields)
    assert (refused.value.field, refused.value.reason) == (field, reason)


def test_field_that_the_model_does_not_take_is_refused() -> None:
    with pytest.raises(InvalidField) as refused:
        new_backend(takes=frozenset({"steps"})).complete({"seconds": 3, "steps": 3})
    assert (refused.value.field, refused.value.reason) == ("seconds", "the model takes none")


def test_defaults_above_a_bound_are_lowered_to_it() -> None:
    complete = new_backend(steps=20, size=700, seconds=5).complete({})
    assert (complete["steps"], complete["size"], complete["seconds"]) == (20, (512, 696), 5)


def test_forbidden_prompt_is_refused_by_the_field_it_came_in() -> None:
    with pytest.raises(ForbiddenPrompt) as refused:
        new_backend().submit("I h.a.t.e it", {}, client=Client("a"), field="input")
    assert refused.value.field == "input"
