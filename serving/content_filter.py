"""Finds forbidden words in text, also in text that is still being written."""

from itertools import groupby

import regex

from serving.look_alikes import STAND_INS, fold
from serving.reading import Reading
from serving.word_automaton import LETTER, MAX_RUN, Letter, Word, WordAutomaton

WORD = regex.compile(r"[\p{L}\p{M}\p{Nd}]+(?:[-'’][\p{L}\p{M}\p{Nd}]+)*\*?")  # noqa: RUF001
MAX_LETTERS = 100  # of a word
HYPHEN = regex.compile("[-'’]")  # noqa: RUF001


class ContentFilter:
    """Finds forbidden words in text, also in text that is still being written.

    forbidden_words: "hate*,violence": comma-separated; a trailing * matches any ending.
    Raises: ValueError for a word of other than letters, digits, inner hyphens and apostrophes.

    A word is not preceded, an exact one not followed, by a letter. It may be written with look-
    alikes, with its letters set apart by one separator of 1 to 3 non-letters, "h.a.t.e", and with
    repetitions: a letter three times or more, and then any other twice, or every letter twice. A
    single doubled letter makes another word: "hatted". Where letters are set apart a letter before
    the word shields it, as in "w h a t e v e r", unless that is a word itself: "I h a t e".
    """

    def __init__(self, forbidden_words: str) -> None:
        words = list(dict.fromkeys(filter(None, map(str.strip, forbidden_words.split(",")))))
        for word in words:
            if not WORD.fullmatch(word) or not fold(word[0]):
                raise ValueError(
                    f"forbidden word {word!r}: allowed are letters, digits, inner hyphens and "
                    "apostrophes, and one * at the end"
                )
        parts = [list(map(spell, HYPHEN.split(word.rstrip("*")))) for word in words]
        for word, each in zip(words, parts, strict=True):
            runs = [len(list(run)) for part in each for _, run in groupby(part)]
            if max(runs) > MAX_RUN or sum(runs) > MAX_LETTERS:
                raise ValueError(
                    f"forbidden word {word!r}: at most {MAX_LETTERS} letters are allowed, and the "
                    f"same one {MAX_RUN} times in a row"
                )
        self.automaton = WordAutomaton(map(compile_word, words, parts))
        firsts = {character for each in parts for character in each[0][0]}
        listed = "".join(map(regex.escape, sorted(firsts))) or r"\0"
        # A word begins after a non-letter and not inside a number.
        self.candidate = regex.compile(rf"(?<![{LETTER}])(?<!\d(?=\d))[{listed}]")

    def find(self, text: str, final: bool = True) -> tuple[int, int] | None:
        """Span in text of a forbidden word, the one that ends first; final=False: that no further
        text undoes."""
        reading = Reading(self.automaton, self.candidate)
        reading.append(text)
        return reading.scan(final=final)[0]

    def read(self, text: str) -> Reading:
        """A text that will be read on, such as a prompt. What can be no part of a word that ends
        in what follows is forgotten."""
        reading = Reading(self.automaton, self.candidate)
        reading.append(text)
        reading.forget(reading.scan()[1])
        return reading


def spell(part: str) -> list[frozenset[str]]:
    """For each letter of a word, what passes for it."""
    letters = []
    for char in filter(fold, part):  # a combining mark reads as nothing
        cases = {fold(char.lower()), fold(char.upper())}
        for passing in [cases] if {len(c) for c in cases} == {1} else map(set, fold(char)):
            flags = {chr(0x1F1E6 + ord(c) - ord("a")) for c in passing if "a" <= c <= "z"}
            stand_ins = {s for c in passing for s in STAND_INS.get(c, "")}
            letters.append(frozenset(passing | flags | stand_ins))
    return letters


def compile_word(word: str, parts: list[list[frozenset[str]]]) -> tuple[Word, list[Letter]]:
    """A word, and its letters with a separator between its parts."""
    letters: list[Letter] = []
    for part in parts:
        letters += [Letter(None)] if letters else []
        for characters, run in groupby(part):
            length = len(list(run))
            letters += [Letter(characters, length > 1, n == length) for n in range(1, length + 1)]
    num_letters = sum(map(len, parts))
    is_number = not any(map(str.isalpha, word))
    return Word(num_letters, word.endswith("*"), is_number, word[-1].isdigit()), letters
