"""What is held back of a text that another server makes."""

from collections import deque
from collections.abc import Sequence

from backends.chunks import Logprobs, merge_logprobs
from engine import FinishReason, TextReading


class HeldText:
    """The text of one choice, held back while a forbidden word or a stop string may have begun in
    it: not every server knows stop strings, and TGI's leaves them in the text.

    Chunks are held back whole, so that log probabilities are withheld with the text that they
    spell. Over HTTP nothing can be rolled back: a forbidden word ends the choice.
    """

    def __init__(
        self,
        streams: bool,
        prompt_reading: TextReading | None = None,
        stop: Sequence[str] = (),
    ):
        """prompt_reading: a forbidden word may begin in the prompt; None: nothing is filtered."""
        self.streams = streams
        self.stop = stop
        self.reading = prompt_reading and prompt_reading.copy()
        self.held: deque[tuple[str, Logprobs | None]] = deque()
        self.num_held = 0  # characters of them
        self.text = ""  # passed, and not given out yet
        self.logprobs: list[Logprobs] = []
        self.finish_reason: FinishReason | None = None
        self.is_cut = False  # here, whatever the other server still sends
        self.is_ended = False  # by the other server
        self.num_received = 0  # characters
        self.last_chunk_seconds: float | None = None  # with text

    def add(
        self, text: str, logprobs: Logprobs | None, finish_reason: FinishReason | None
    ) -> tuple[str, Logprobs | None] | None:
        """What the client gains by a chunk, if it is to be told."""
        self.held.append((text, logprobs))
        self.num_held += len(text)
        self.num_received += len(text)
        self.is_ended = finish_reason is not None
        if self.reading:
            self.reading.append(text)
        self.finish_reason = finish_reason
        self._release(self._num_passed(is_last=finish_reason is not None))
        if not self.finish_reason and not (self.streams and self.text):
            return None  # a chunk without text goes out with the next text
        gained = self.text, merge_logprobs(self.logprobs)
        self.text, self.logprobs = "", []
        return gained

    def _num_passed(self, is_last: bool) -> int:
        """How many characters of the held chunks may go out; below 0: none, nor an empty chunk."""
        end = self._before_stop(is_last)
        if not self.reading:
            return end
        num_before = self.reading.length - self.num_held  # the held chunks
        hit, num_safe = self.reading.scan(num_before + end, final=is_last or self.is_cut)
        if hit:
            self.is_cut, self.finish_reason = True, "content_filter"
            num_safe = hit[0]
        self.reading.forget(num_safe)
        return num_safe - num_before

    def _before_stop(self, is_last: bool) -> int:
        """How many characters of the held chunks stand before a stop string, which ends the choice,
        or before what may become one."""
        if not self.stop:
            return self.num_held
        text = "".join(text for text, _ in self.held)
        if begins := [at for stop in self.stop if (at := text.find(stop)) >= 0]:
            self.is_cut, self.finish_reason = True, "stop"
            return min(begins)
        begun = (n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return len(text) if is_last else len(text) - max(begun, default=0)

    def _release(self, num_passed: int) -> None:
        while self.held and len(self.held[0][0]) <= num_passed:
            text, logprobs = self.held.popleft()
            num_passed -= len(text)
            self.num_held -= len(text)
            self.text += text
            if logprobs:
                self.logprobs.append(logprobs)
        if self.is_cut and self.held:
            self.text += self.held[0][0][: max(0, num_passed)]
