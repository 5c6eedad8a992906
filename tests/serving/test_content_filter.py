"""Words that are found, and words that are left alone."""

import pytest

from serving.content_filter import ContentFilter
from tests.filter_texts import HITS, PASSES

DEFAULT = ContentFilter("hate*,violence")


@pytest.mark.parametrize("text", HITS)
def test_hit(text: str) -> None:
    assert DEFAULT.find(text) is not None


@pytest.mark.parametrize("text", PASSES)
def test_pass(text: str) -> None:
    assert DEFAULT.find(text) is None


WORD_LISTS = [
    ("", [], ["hate", "violence", ""]),
    (" , ,hate, ", ["hate", "hate!", "h a t e"], ["hated", "h a t e d", "h.a.t.e.s"]),
    ("kill", ["kill", "killll", "kiII", "K1ll", "k i l l"], ["kil", "kiln", "k i l", "skill"]),
    ("kkk", ["KKK", "k.k.k", "k k k"], ["kk", "k k", "kkkx"]),
    ("self-harm*", ["self-harming", "Self harm", "selfharm", "s.e.l.f.h.a.r.m"], ["self, harm"]),
    ("don't", ["don't", "don\u2019t", "dont"], ["don", "donut"]),
    ("lie", ["lie", "l1e", "1ie"], ["113 apples", "$113", "believe", "belie"]),
    ("88", ["88", "88!", "the 88"], ["1988", "880", "8 8", "B88"]),
    ("bad", ["8ad"], ["48ad", "B. A. Dow", "b a day"]),
    ("stra\u00dfe", ["Strasse", "STRASSE", "stra\u00dfe"], ["Strase"]),
    ("\u043d\u0435\u0442", ["\u041d\u0415\u0422", "\u043d.\u0435.\u0442"], ["net", "\u043d\u0435"]),
]  # fmt: skip


@pytest.mark.parametrize(("words", "hits", "passes"), WORD_LISTS)
def test_word_list(words: str, hits: list[str], passes: list[str]) -> None:
    content_filter = ContentFilter(words)
    assert [text for text in hits if content_filter.find(text) is None] == []
    assert [text for text in passes if content_filter.find(text) is not None] == []


@pytest.mark.parametrize(
    "word", ["two words", "*", "ha*te", "hate**", "-hate", "a--b", "h@te", "."]
)
def test_invalid_word_is_refused_by_name(word: str) -> None:
    with pytest.raises(ValueError, match="allowed are letters") as refusal:
        ContentFilter(f"hate*,{word}")
    assert repr(word) in str(refusal.value)


def test_span_is_in_the_source() -> None:
    text = "\ufb01ne: so h\u0336\u200ba\u0336te\u0301ful"
    start, end = DEFAULT.find(text) or (0, 0)
    assert text[start:end] == "h\u0336\u200ba\u0336te\u0301"


STEMS = ContentFilter("bite*,rape*,hate*,robe*,coma*,pole*,slime*,mate*,tape*,bare*,kill,violence")
# A doubled letter makes another word of each.
DOUBLED = [
    "bitten", "bitter", "bitterly", "bittern", "bitters", "bitterness", "bittersweet", "rapper",
    "rappers", "rapped", "rappel", "rappelled", "rappelling", "hatted", "hatter", "hatters",
    "Hatteras", "robbed", "robber", "robbers", "robbery", "comma", "commas", "command",
    "commander", "commando", "commandeer", "pollen", "polled", "pollex", "slimmed", "slimmer",
    "slimmest", "matted", "matter", "matters", "mattered", "mattering", "tapped", "tapper",
    "tappet", "barred", "barrel", "barrels", "barren", "kiln", "skill", "b i t t e r",
    "r-a-p-p-e-r", "c.o.m.m.a", "violeence", "MATTER", "hattér",
]  # fmt: skip
# A letter three times or more, every letter twice, or both; with look-alikes or set apart too.
REPEATED = [
    "bbbite", "biiiite", "bittte", "biteee", "bbiittee", "BBIITTEEN", "bitttten", "bbittteer",
    "rrrape", "raaape", "rappppe", "rapeee", "rraappee", "rrraped", "rappper", "rraapppeedd",
    "HHHATE", "haaate", "hatttte", "hhaattee", "HHaaTTeed", "h4444te", "haaa7e", "hhaaatteeful",
    "rooobe", "robbbber", "rroobbeed", "coooma", "commma", "ccoommaa", "sslliimmee", "mattttter",
    "kkkill", "kiiill", "killl", "kkiillll", "kkiill", "k!!!ll", "violenceee", "vviioolleennccee",
    "vvviolencee", "v i o o o l e n c e", "h h a a t t e e", "h.a.a.a.t.e", "b-i-t-t-t-e-n",
    "b b i i t t e e", "h a a a t e d", "h\u0430a\u0430te",
]  # fmt: skip


@pytest.mark.parametrize("text", DOUBLED)
def test_doubled_letter_is_another_word(text: str) -> None:
    """One doubled letter counted as a repetition: bite* refused "bitten"."""
    assert STEMS.find(text) is None


@pytest.mark.parametrize("text", REPEATED)
def test_repetition_is_seen_through(text: str) -> None:
    assert STEMS.find(text) is not None


@pytest.mark.parametrize("word", ["a" * 4, "self-haaaarm", "a" * 2 + "ba" * 50])
def test_word_that_is_too_long_is_refused_by_name(word: str) -> None:
    with pytest.raises(ValueError, match="at most 100 letters") as refusal:
        ContentFilter(f"hate*,{word}")
    assert repr(word) in str(refusal.value)


def test_combining_mark_in_a_word_counts_for_nothing() -> None:
    """A mark of its own, as macOS types them, was a letter that nothing matched."""
    assert ContentFilter("cafe\u0301").find("a cafe, a caf\u00e9") is not None
