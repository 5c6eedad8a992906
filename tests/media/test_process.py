"""What the process of a model tells of its steps."""

from multiprocessing import Pipe

from media.messages import Order, Step
from media.process import Steps


def test_step_is_told_once() -> None:
    """The last one of a shape came again with each of the renderer's queries for colours."""
    ours, theirs = Pipe()
    steps = Steps(theirs, Order(1, {}, wants_steps=True))
    for step in (1, 2, 2, 2):
        steps(step, 2)
    theirs.send("the end")
    assert [ours.recv() for _ in range(3)] == [Step(1, 2), Step(2, 2), "the end"]
