"""The forbidden words as one automaton, whose states are the bits of an integer."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import regex

# The states of a letter say how often it and those before it were written. There are no loops:
# three times stands for more, so a word is never longer than three times its letters.
PLAIN = 1 << 0  # every letter as often as the word has it
ONCE = 1 << 1  # this one is; of those before some were written twice, none three times
TWICE = 1 << 2  # this one twice; of those before none three times
TRIPLE_ONCE = 1 << 3  # this one once; of those before some three times
TRIPLE_TWICE = 1 << 4
THRICE = 1 << 5
HALF = 1 << 6  # this one once, those before twice or more
DOUBLED = 1 << 7  # this one twice, as those before
DOUBLED_THRICE = 1 << 8
NUM_STATES = 9
ALL_STATES = (1 << NUM_STATES) - 1
MAX_RUN = 3  # of equal letters in a word

LETTER = r"\p{L}\p{Mc}"
IS_LETTER = regex.compile(f"[{LETTER}]")
IS_SEPARATOR = regex.compile(rf"[^{LETTER}\d]")


@dataclass(frozen=True)
class Letter:
    """One letter of a word: what passes for it. characters: None for a separator, which stands
    for a hyphen or an apostrophe and may be left out."""

    characters: frozenset[str] | None
    is_repeated: bool = False  # in the word itself, as the l of "kill"
    ends_run: bool = True  # of equal letters

    @property
    def entry(self) -> int:
        """How a word that is written with every letter doubled goes on to this one: a letter that
        the word itself repeats needs no more."""
        return HALF if self.characters and not self.is_repeated else DOUBLED


@dataclass(frozen=True)
class Word:
    """What decides whether a word ends where its last letter stands."""

    num_letters: int
    is_prefix: bool  # any ending will do
    is_number: bool
    ends_in_digit: bool


class WordAutomaton:
    """All words at once: a set of states is an integer, and one letter of text moves all of them
    with a handful of shifts, however many there are (Baeza-Yates and Gonnet 1992; Navarro and
    Raffinot, "Flexible Pattern Matching in Strings", 2002).

    `follow` gives the states that a next letter may have, `precede` those that the letter before
    may have had; `states_for` those that a character is right for.
    """

    def __init__(self, words: Iterable[tuple[Word, list[Letter]]]) -> None:
        self.words: list[Word] = []  # by where its states begin, which `begins` says
        self.begins: list[int] = []
        self.characters: dict[str, int] = {}
        self.separators = self.first = self.first_apart = self.final = 0
        self.moves: Counter[int] = Counter()  # states that have a follower so many bits on
        num_states = 0
        for word, letters in words:
            self.words.append(word)
            self.begins.append(num_states)
            self._add(word, letters, num_states)
            num_states += NUM_STATES * len(letters)
        self.can_go_on = 0
        for states in self.moves.values():
            self.can_go_on |= states

    def _add(self, word: Word, letters: list[Letter], begin: int) -> None:
        first = PLAIN | ONCE | letters[0].entry
        self.first |= first << begin
        if word.num_letters >= 3 and not word.is_number:  # "a b" and "1 9 8 4" are no words
            self.first_apart |= first << begin
        for index, letter in enumerate(letters):
            at = begin + NUM_STATES * index
            if letter.characters is None:
                self.separators |= ALL_STATES << at
            else:
                for character in letter.characters:
                    states = self.characters.get(character, 0)
                    self.characters[character] = states | ALL_STATES << at
                if letter.ends_run:
                    self._repeat(letter, at)
            for letters_on, next_letter in enumerate(letters[index + 1 : index + 3], start=1):
                self._go_on(letters_on, next_letter, at)
                if next_letter.characters is not None:
                    break
        self.final |= (ALL_STATES & ~(ONCE | TWICE | HALF)) << at

    def _move(self, state: int, to_state: int, at: int, letters_on: int = 0) -> None:
        distance = to_state.bit_length() - state.bit_length() + NUM_STATES * letters_on
        self.moves[distance] |= state << at

    def _repeat(self, letter: Letter, at: int) -> None:
        if letter.is_repeated:
            self._move(ONCE, THRICE, at)
        else:
            self._move(ONCE, TWICE, at)
            self._move(TWICE, THRICE, at)
            self._move(HALF, DOUBLED, at)
        self._move(TRIPLE_ONCE, TRIPLE_TWICE, at)
        self._move(TRIPLE_TWICE, THRICE, at)
        self._move(DOUBLED, DOUBLED_THRICE, at)

    def _go_on(self, letters_on: int, next_letter: Letter, at: int) -> None:
        self._move(PLAIN, PLAIN, at, letters_on)
        for state in (ONCE, TWICE):
            self._move(state, ONCE, at, letters_on)
        for state in (TRIPLE_ONCE, TRIPLE_TWICE, THRICE):
            self._move(state, TRIPLE_ONCE, at, letters_on)
        for state in (DOUBLED, DOUBLED_THRICE):
            self._move(state, next_letter.entry, at, letters_on)

    def states_for(self, character: str) -> int:
        states = self.characters.get(character, 0)
        if self.separators and IS_SEPARATOR.match(character):
            states |= self.separators
        return states

    def follow(self, states: int) -> int:
        following = 0
        for distance, movable in self.moves.items():
            following |= (states & movable) << distance
        return following

    def precede(self, states: int) -> int:
        preceding = 0
        for distance, movable in self.moves.items():
            preceding |= (states >> distance) & movable
        return preceding

    def ending(self, states: int) -> Iterator[tuple[Word, int]]:
        """Each word whose last letter is among these states, with those that are."""
        states &= self.final
        while states:
            word = bisect_right(self.begins, states.bit_length() - 1) - 1
            begin = self.begins[word]
            yield self.words[word], states >> begin << begin
            states &= (1 << begin) - 1
