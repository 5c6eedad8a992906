"""Words that are found, words that are left alone, streams that never leak, and the time taken."""

import random
import time

import pytest

from serving.content_filter import ContentFilter

HITS = [
    "I hate you", "HATED it from day one", "a hateful speech", "full of hate-filled posts",
    "No more violence", "Stop the violence!", "violence, they said", "(Violence)", "'hate'",
    "#hate #love", "1hate this so much", "the tag is _hate_", "xx_hate_xx joined the chat",
    "I h4te Mondays", "ha7e is a strong word", "h@t3 speech", "ha+e", "hat€",
    "V10LENCE is the answer", "v!o|ence", "vioIence with a capital I", "viol3nce",
    "haaaaaate school", "hhhhaaaatttteeee", "vvviolencee everywhere", "h.a.t.e",
    "I h a t e you", "a h a t e crime", "all the h a t e", "h--a--t--e", "h_a_t_e",
    "h\na\nt\ne", "h...a...t...e...", "h😡a😡t😡e", "h.4.t.3",
    "so much h a t r e d? no, H A T E D", "h a a a t e", "v-i-o-l-e-n-c-e",
    "v i o l e n c e is bad", "7 h a t e 7", "\uff48\uff41\uff54\uff45", "𝐡𝐚𝐭𝐞 𝒽𝒶𝓉ℯ",  # noqa: RUF001
    "ⓗⓐⓣⓔ", "⒣⒜⒯⒠", "🅷🅰🆃🅴", "🅗ate", "🇭 🇦 🇹 🇪", "🇺🇸violence🇺🇸", "ʜᴀᴛᴇ in small capitals",
    "h\u0430t\u0435", "\u041d\u0410\u0422\u0415", "\u0397\u0391\u03a4\u0395", "\u0570ate",
    "ꓧꓮꓔꓰ", "vi\u00f8\u0142ence", "h\u0251te v\u0131olence", "h\u0336a\u0336t\u0336e\u0336",  # noqa: RUF001
    "h\u00e1\u0308te", "la h\u00e2te", "h\u200ba\u200dt\u2060e", "ha\u00adte \ufeff",
    "h\u034fa\u115ft\u3164e\ufe0f", "ha\U000e0061te", "ha\x00te",
]  # fmt: skip

PASSES = [
    "", "whatever", "the chateau on the hill", "phosphate and sulphate", "Manhattan",
    "Hatfield House", "a shattered glass", "nonviolence", "two violences",
    "a violent storm, violently", "violets, 3 violets", "a viola and a violin", "the hatch",
    "hat e", "h ate a sandwich, he ate two", "w h a t e v e r", "c.h.a.t.e.a.u",
    "p h o s p h a t e", "c-h-a-t e-mail", "what e-mail?", "that e-book", "A. T. E. Hall",
    "T.H.A.T. Enterprise", "H.A.T. Enterprises", "H A T Enterprises", "hat, eel",
    "h. a. Team", "H. A. Teller", "ha, te deum", "hat-eating dog", "h.a-t.e",
    "v i o l e n c e s", "n-o-n-v-i-o-l-e-n-c-e", "h8 is a grid square", "h = a + t + e",
    "4 473 people, $7.30", "v1.0 lence", "v 1.0 l e n c e", "1984 and 10/10/2010",
    "ha ha ha, that ended well", "oh, at Easter", "Ah a tea", "with a tease",
    "heat, heath, had, hat", "the ate of hubris", "I ate. What else?",
    "https://chat.example/what?e=1", "\u043d\u0430\u0442\u0435\u0440\u0435\u0442\u044c",
    "Stra\u00dfe, \u00e9t\u00e9, na\u00efve, \u65e5\u672c\u8a9e", "🎩 + e, 👨‍👩‍👧‍👦 🇺🇸",
    "\u200b\u0301\n\t ",
]  # fmt: skip

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


SAFE = [("the dog ", 8), ("the dog", 7), ("xh", 2), ("what", 4), ("ha, ", 4), ("w h a", 5)]
SAFE += [
    ("hat e", 5),
    ("I ha", 2),
    ("h. a. t", 0),
    ("no violence", 3),
    ("oh h a t e", 3),
    ("v!", 0),
]


@pytest.mark.parametrize(("text", "safe"), SAFE)
def test_safe_length_holds_back_what_may_become_a_word(text: str, safe: int) -> None:
    assert DEFAULT.scan(text)[1] == safe


@pytest.mark.parametrize(
    ("text", "more"), [("violence", "s"), ("h a t e", "el"), ("v i o l e n c e", " s ")]
)
def test_end_of_text_is_not_yet_the_end_of_a_word(text: str, more: str) -> None:
    assert DEFAULT.find(text, final=False) is None
    assert DEFAULT.find(text) is not None
    assert DEFAULT.find(text + more) is None
    assert DEFAULT.find(text + " and then", final=False) is not None


def assert_no_leak(content_filter: ContentFilter, text: str) -> None:
    """Feed text one character at a time, each scan from the last safe length."""
    shown, hit = 0, None
    for end in range(len(text) + 1):
        hit, safe = content_filter.scan(text[:end], start=shown)
        assert hit == content_filter.find(text[:end], final=False)
        if hit:
            break
        assert shown <= safe <= end
        assert safe == content_filter.scan(text[:end])[1]
        shown = safe
    final = content_filter.find(text)
    assert (final is None) == ((hit or content_filter.scan(text, shown, final=True)[0]) is None)
    assert all(span[0] >= shown for span in (hit, final) if span), (text, shown, hit, final)


@pytest.mark.parametrize("text", HITS + PASSES)
def test_stream_never_leaks(text: str) -> None:
    assert_no_leak(DEFAULT, text)


@pytest.mark.parametrize("words", ["hate*,violence", "hi,ill,kkk*,88,a-e*", "vi*,violet,h4h"])
def test_random_stream_never_leaks(words: str) -> None:
    rng, content_filter = random.Random(words), ContentFilter(words)
    pieces = [*"hatevilnck 4.-18I", "\u200b", "\u0301", "\u0435", "\ufb01", "🇭", "hate", "h.a.t.e"]
    pieces += ["violence", "v i o l e n c e", "ill", "88", "k k k"]
    for _ in range(800):
        assert_no_leak(content_filter, "".join(rng.choices(pieces, k=rng.randint(1, 14))))


PIECES = ["h", "ha", "h.", "h a t h a t ", "i h ", "h! ", "\u200b", "\u0301", "1", "12", "4@", " "]
PIECES += [
    "viiioooleeen ",
    "v i o l e n c ",
    "i1|!I ",
    "😀",
    "🇭",
    "The quick brown fox had a hat. ",
]
STEMS = ["hat", "vio", "ill", "kill", "ha", "has", "vil", "int", "the", "qui"]
FIFTY = ",".join(stem + end for stem in STEMS for end in ("ed*", "lence", "ler", "k", "ing*"))


@pytest.mark.parametrize("words", ["hate*,violence", FIFTY], ids=["two", "fifty"])
@pytest.mark.parametrize("piece", PIECES)
def test_time_is_linear(piece: str, words: str) -> None:
    """A million characters take about a second; a quadratic scan would take hours."""
    content_filter, text = ContentFilter(words), (piece * 1_000_000)[:1_000_000]
    start = time.perf_counter()
    content_filter.scan(text)
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize("letters", ["hat", "vi", "violenc"])
def test_time_is_linear_in_long_runs(letters: str) -> None:
    text = "".join(letter * (1_000_000 // len(letters)) for letter in letters)
    start = time.perf_counter()
    assert DEFAULT.find(text) is None
    assert DEFAULT.scan(text)[1] == 0
    assert time.perf_counter() - start < 20
