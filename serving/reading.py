"""A text that is looked through for forbidden words while it is written."""

from bisect import bisect_left
from copy import copy as shallow_copy
from functools import lru_cache

import regex

from serving.look_alikes import fold
from serving.word_automaton import IS_LETTER, LETTER, MAX_RUN, Word, WordAutomaton

# Letters may stand apart, with up to three non-letters between each two of them: so many
# characters on, with the letter itself. 1: they do not.
STRIDES = (1, 2, 3, 4)
LOOK_AHEAD = 5  # so many characters after a word decide whether it is one
LOOK_BEHIND = 12  # and so many before
FLAGS = "\U0001f1e6-\U0001f1ff"  # regional indicators: letters in a word, else part of a flag
SPELLED = regex.compile(f"[{LETTER}{FLAGS}]")


@lru_cache(maxsize=1 << 16)
def is_letter(character: str) -> bool:
    return bool(IS_LETTER.match(character))


class Reading:
    """What has been read of a text: its canonical characters (what they read as, long runs cut),
    and, for each of them and each stride, the states of the automaton.

    Each character costs the same, whatever stands before it. A word that begins in what
    `forget` has forgotten is not found any more.
    """

    def __init__(self, automaton: WordAutomaton, candidate: "regex.Pattern[str]"):
        self.automaton = automaton
        self.candidate = candidate  # matches where a word may begin
        self.length = 0  # of the text until now, in source characters
        self.last, self.run = "", 0  # the last canonical character, and how often in a row
        self.characters = ""
        self.source: list[int] = []  # where in the text each of them stands
        self.begun: list[int] = []  # states of words that begin there
        self.states: list[list[int]] = [[] for _ in STRIDES]
        self.ends: list[tuple[int, int, Word, int]] = []  # words that may end: where, …, states
        self.quiet_from = 0  # from there on no state is left

    def copy(self) -> "Reading":
        """One that can be read on by itself."""
        other = shallow_copy(self)
        other.source, other.begun, other.ends = self.source[:], self.begun[:], self.ends[:]
        other.states = [states[:] for states in self.states]
        return other

    def append(self, text: str) -> None:
        """Reads on."""
        num_known = len(self.characters)
        self.characters += self._canonical(text)
        num_new = len(self.characters) - num_known
        for states in (self.begun, *self.states):
            states.extend([0] * num_new)
        at = num_known
        while at < len(self.characters):
            if at >= self.quiet_from:
                candidate = self.candidate.search(self.characters, at)
                if not candidate:
                    break
                at = candidate.start()
            self._step(at)
            at += 1

    def _canonical(self, text: str) -> str:
        characters = []
        for index, written in enumerate(text, start=self.length):
            for character in fold(written):
                self.run = self.run + 1 if character == self.last else 1
                self.last = character
                if self.run <= MAX_RUN:
                    characters.append(character)
                    self.source.append(index)
        self.length += len(text)
        return "".join(characters)

    def _step(self, at: int) -> None:
        """Moves the states on to the character there."""
        right = self.automaton.states_for(self.characters[at])
        if right & self.automaton.first and self.candidate.match(self.characters, at):
            self.begun[at] = right & self.automaton.first
            self.quiet_from = at + STRIDES[-1] + 1
        for stride, states in zip(STRIDES, self.states, strict=True):
            if before := self._before(at, stride):
                states[at] = self.automaton.follow(before) & right
            reached = states[at] | (self.begun[at] if stride == 1 else 0)
            if reached:
                self.quiet_from = max(self.quiet_from, at + stride + 1)
                for word, states_there in self.automaton.ending(reached):
                    # Stand-ins alone are a number: "113" is no "lie".
                    letters = at + 1 - word.num_letters, at + 1
                    if word.is_number or SPELLED.search(self.characters, *letters):
                        self.ends.append((at, stride, word, states_there))

    def _before(self, at: int, stride: int) -> int:
        """The states a stride before, of words that may go on at `at`."""
        start = at - stride
        if start < 0:
            return 0
        begun, going_on = self.begun[start], self.states[stride - 1][start]
        if stride == 1 or not (begun or going_on):
            return begun | going_on
        return self._apart(start, self.characters[start + 1 : at], stride)

    def _apart(self, start: int, gap: str, stride: int) -> int:
        """The states at `start` of words whose next letter stands apart, behind `gap`, of which
        as much is known as there is."""
        begun = self.begun[start] & self.automaton.first_apart
        going_on = self.states[stride - 1][start]
        if not (begun or going_on) or any(map(is_letter, gap)):
            return 0
        size = stride - 1
        if not self.characters[max(0, start - size) : start].startswith(gap):
            going_on = 0
        if begun and len(gap) == size and self._is_shielded(start, gap):
            begun = 0
        return begun | going_on

    def _is_shielded(self, start: int, gap: str) -> bool:
        """Whether a letter set apart in the same way stands before: "w h a t e v e r". One that
        is a word itself does not shield: "I h a t e"."""
        at = start - len(gap) - 1
        if at < 0 or self.characters[at + 1 : start] != gap:
            return False
        letter = self.characters[at]
        follows_letter = at > 0 and is_letter(self.characters[at - 1])
        return is_letter(letter) and letter not in "aiouI" and not follows_letter

    def scan(
        self, end: int | None = None, final: bool = False
    ) -> tuple[tuple[int, int] | None, int]:
        """(span of a forbidden word in text[:end], else None; the length of the longest prefix in
        which none can begin, whatever text follows). final: none does."""
        end = self.length if end is None else end
        num_read = bisect_left(self.source, end)
        text = self.characters[:num_read] + "\0" * (LOOK_AHEAD if final else 0)
        begins: list[int] = []
        for at, stride, word, states in self.ends:
            if at >= num_read:
                break
            is_word = is_whole(word, text, at, stride)
            if is_word is not False:
                begins.append(self._trace(at, stride, states))
            if is_word:
                stop = self.source[at + 1] if at + 1 < num_read else end
                return (self.source[begins[-1]], stop), self.source[begins[-1]]
        if final:
            return None, end
        for stride in STRIDES:
            for at in range(max(0, num_read - stride), num_read):
                if stride == 1:
                    alive = self.begun[at] | self.states[0][at]
                else:
                    alive = self._apart(at, self.characters[at + 1 : num_read], stride)
                if alive := alive & self.automaton.can_go_on:
                    begins.append(self._trace(at, stride, alive))
        return None, self.source[min(begins)] if begins else end

    def _trace(self, at: int, stride: int, states: int) -> int:
        """Where the word begins that has come to one of these states there; the first if there
        are several."""
        begin = at
        while True:
            if states & self.begun[at]:
                begin = at
            states = self._before(at, stride) & self.automaton.precede(states)
            if not states:
                return begin
            at -= stride

    def forget(self, length: int) -> None:
        """Lets go of what was read before text[length], but for what the rest looks back at."""
        num_seen = bisect_left(self.source, length) - LOOK_BEHIND
        if num_seen <= 0:
            return
        self.characters = self.characters[num_seen:]
        for kept in (self.source, self.begun, *self.states):
            del kept[:num_seen]
        self.ends = [  # the others have been decided
            (at - num_seen, stride, word, states)
            for at, stride, word, states in self.ends
            if at >= num_seen + LOOK_BEHIND
        ]
        self.quiet_from -= num_seen


def is_whole(word: Word, text: str, at: int, stride: int) -> bool | None:
    """Whether a word whose letters end at text[at] ends there; None while that is open."""
    if word.is_prefix and stride == 1:
        return True
    after = text[at + 1 : at + 1 + LOOK_AHEAD]
    if not after:
        return None
    if is_letter(after[0]) or (stride == 1 and word.ends_in_digit and after[0].isdecimal()):
        return False
    if word.is_prefix or stride == 1:
        return True
    if len(after) < LOOK_AHEAD:
        return None
    gap = text[at + 1 - stride : at]
    goes_on = after.startswith(gap) and is_letter(after[len(gap)])
    return not (goes_on and not is_letter(after[len(gap) + 1]))
