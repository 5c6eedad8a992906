"""Finds forbidden words in text, also in text that is still being written."""

import re
import unicodedata
from bisect import bisect_left
from functools import lru_cache
from itertools import groupby

import regex

# By shape, so case matters: Cyrillic capital EN reads as H, small en does not.
LOOK_ALIKES = str.maketrans(
    "аеорсухіјѕһԁԛԝѵткӏВМНІӀαβενικορτυχγωηΗΜΝΖΥΙհօսոցզյɑɩə℮"  # noqa: RUF001
    "ᎪᏴᏟᎠᎬᎻᎫᏦᏞᎷᏢᏚᎢᏙᎳᏃᎡᏂᎥⲁⲃⲉⲏⲓⲕⲙⲛⲟⲣⲥⲧⲩⲭꓮꓐꓚꓓꓰꓝꓖꓧꓲꓙꓗꓡꓟꓠꓳꓑꓣꓢꓔꓴꓦꓪꓫꓬꓜ",
    "aeopcyxijshdqwvtklbmhIIabevikoptuxywnhmnzyIhounqqjaiee"
    "abcdehjklmpstvwzrhiabehikmnopctyxabcdefghIjklmnoprstuvwxyz",
)
# Latin letters that Unicode does not decompose (ø, small capitals, 🅷), read off their names.
LOOK_ALIKES |= {
    code: ord(name[1].lower())
    for first, last in ((0xE0, 0x2AF), (0x1D00, 0x1DBF), (0x2C60, 0x2C7F), (0xA720, 0xA7FF),
                        (0xAB30, 0xAB6F), (0x1F150, 0x1F189))
    for code in range(first, last + 1)
    if code not in LOOK_ALIKES and not unicodedata.decomposition(chr(code))
    if (name := re.search(r"LATIN .*\b([A-Z])(?: WITH .*)?$", unicodedata.name(chr(code), "")))
}  # fmt: skip
# Digits and signs read as letters. They stay themselves in canonical text, as they are numbers
# and punctuation too: "1hate" holds a word, a price of $455 does not.
STAND_INS = {
    "a": "4@", "b": "8", "c": "¢", "e": "3€", "g": "69", "i": "I1!|¡", "l": "I1|",
    "o": "0", "s": "5$", "t": "7+", "z": "2",
}  # fmt: skip
FLAGS = "\U0001f1e6-\U0001f1ff"  # regional indicators: letters in a word, else part of a flag
LETTER = r"\p{L}\p{Mc}"
INVISIBLE = regex.compile(r"[\p{Mn}\p{Me}\p{Cf}\p{DI}]|(?!\s)\p{Cc}")
WORD = regex.compile(r"[\p{L}\p{M}\p{Nd}]+(?:[-'’][\p{L}\p{M}\p{Nd}]+)*\*?")  # noqa: RUF001


@lru_cache(maxsize=1 << 16)
def fold(char: str) -> str:
    """What one source character reads as: lower-case letters without marks; may be empty.

    Accents are seen through, so French "hâte" reads as the forbidden "hate". "I" stays a
    capital, since it passes for "l" too.
    """
    shapes = INVISIBLE.sub("", unicodedata.normalize("NFKD", char.translate(LOOK_ALIKES)))
    shapes = shapes.translate(LOOK_ALIKES)
    folded = "I".join(map(str.casefold, shapes.split("I"))).translate(LOOK_ALIKES)
    return folded.strip("()") or folded  # U+24A3 decomposes to "(h)"


def spell(word: str) -> list[tuple[str, int]]:
    """Runs of equal letters in word: (regex class of what passes for the letter, count)."""
    classes = []
    for char in word:
        cases = {fold(char.lower()), fold(char.upper())}
        for letters in [cases] if {len(c) for c in cases} == {1} else map(set, fold(char)):
            flags = {chr(0x1F1E6 + ord(c) - ord("a")) for c in letters if "a" <= c <= "z"}
            stand_ins = {s for c in letters for s in STAND_INS.get(c, "")}
            classes.append("".join(map(regex.escape, sorted(letters | flags | stand_ins))))
    return [(f"[{letters}]", len(list(run))) for letters, run in groupby(classes)]


def any_of(paths: list[list[str]]) -> str:
    """One pattern for several sequences of patterns, what they begin with in common once."""
    branches: dict[str, list[list[str]]] = {}
    for head, *tail in filter(None, paths):
        branches.setdefault(head, []).append(tail)
    if not branches:
        return ""
    return f"(?:{'|'.join(head + any_of(tails) for head, tails in branches.items())})"


class ContentFilter:
    """Finds forbidden words in text, also in text that is still being written.

    forbidden_words: "hate*,violence": comma-separated; a trailing * matches any ending.
    Raises: ValueError for a word of other than letters, digits, inner hyphens and apostrophes.

    A word is not preceded, an exact one not followed, by a letter. Its letters may be repeated,
    or set apart by one separator of 1 to 3 non-letters: "h.a.t.e". There a letter before it
    shields it, as in "w h a t e v e r", unless that is a word itself: "I h a t e".
    """

    def __init__(self, forbidden_words: str) -> None:
        words = {}
        for word in filter(None, map(str.strip, forbidden_words.split(","))):
            if not WORD.fullmatch(word) or not fold(word[0]):
                raise ValueError(
                    f"forbidden word {word!r}: allowed are letters, digits, inner hyphens and "
                    "apostrophes, and one * at the end"
                )
            words[word] = [spell(part) for part in regex.split("[-'’]", word.rstrip("*"))]  # noqa: RUF001
        # Longer runs of one character are cut to this, so that every quantifier is bounded.
        self.max_run = max([3, *(n for parts in words.values() for runs in parts for _, n in runs)])
        # Canonical characters that a word may take, with what its end looks at.
        self.max_span = 12 * self.max_run * max(map(len, words), default=0)
        paths = [path for word, parts in words.items() for path in self._paths(word, parts)]
        # A word begins after a non-letter and not inside a number.
        begin = rf"(?<![{LETTER}])(?<!\d(?=\d))"
        self.pattern = regex.compile(begin + any_of(paths), regex.DOTALL) if words else None

    def _paths(self, word: str, parts: list[list[tuple[str, int]]]) -> list[list[str]]:
        """Patterns to match in turn for word as it is, and for word set apart."""
        letters = [letter for part in parts for letter, n in part for _ in range(n)]
        is_prefix, is_number = word.endswith("*"), not any(map(str.isalpha, word))
        # Stand-ins alone are a number: "113" is no "lie".
        spelled = "" if is_number else rf"(?<![^{LETTER}{FLAGS}]{{{len(letters)}}})"
        joined: list[str] = []
        for part in parts:
            joined += [rf"[^{LETTER}\d]?"] if joined else []  # for a hyphen or an apostrophe
            joined += [f"{letter}{{{n},{self.max_run}}}" for letter, n in part]
        # An end needs to see what follows it, so that it does not match while more may follow.
        digit = r"\d" if word[-1].isdigit() else ""
        joined += [spelled if is_prefix else rf"{spelled}(?=[^{LETTER}{digit}])"]
        if len(letters) < 3 or is_number:  # "a b" and "1 9 8 4" are no words
            return [joined]
        first, *middle, last = letters
        gap = "(?P=gap)"
        apart = [  # the gap is greedy: regex loses partial matches of a lazy one
            rf"{first}(?P<gap>[^{LETTER}]{{1,3}})"
            rf"(?<!(?<![{LETTER}])(?![aiouI])[{LETTER}]{gap}.{gap})(?:{first}{gap}){{0,2}}",
            *(f"{letter}(?:{gap}{letter}){{0,2}}{gap}" for letter in middle),
            rf"{last}(?:{gap}{last}){{0,2}}",
            rf"{spelled}(?=[^{LETTER}])",
            "" if is_prefix else rf"(?!{gap}[{LETTER}][^{LETTER}])(?=.{{5}})",
        ]
        return [joined, apart]

    def find(self, text: str, final: bool = True) -> tuple[int, int] | None:
        """Span in text of the first forbidden word; final=False: that no further text undoes."""
        return self.scan(text, final=final)[0]

    def scan(
        self, text: str, start: int = 0, final: bool = False
    ) -> tuple[tuple[int, int] | None, int]:
        """Span of the first forbidden word that begins at or after start, and the safe length.

        final: no text follows. Without a hit the safe length never shrinks as text grows, so the
        last one may be passed as start: then only what follows start is read, and max_run + 5
        canonical characters before it.
        """
        if self.pattern is None:
            return None, len(text)
        chars, source = self._read(text, start)
        if final:
            chars += "\0" * 5  # what ends look at; canonical text itself holds no NUL
        source += [len(text)] * 6
        first = bisect_left(source, start)
        if match := self.pattern.search(chars, first):
            return (source[match.start()], source[match.end()]), source[match.start()]
        if final:
            return None, len(text)
        match = self.pattern.search(chars, max(first, len(chars) - self.max_span), partial=True)
        return None, source[match.start()] if match else len(text)

    def _read(self, text: str, start: int) -> tuple[str, list[int]]:
        """Canonical text from shortly before start on, and the source index of each character."""
        first, before = start, ""
        while first and len(before) < self.max_run + 5:
            first -= 1
            for char in reversed(fold(text[first])):
                if before[-self.max_run :] != char * self.max_run:
                    before += char
        chars: list[str] = []
        source: list[int] = []
        last, run = "", 0
        for index in range(first, len(text)):
            for char in fold(text[index]):
                run = run + 1 if char == last else 1
                last = char
                if run <= self.max_run:
                    chars.append(char)
                    source.append(index)
        return "".join(chars), source
