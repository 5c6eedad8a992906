"""What a character reads as, whatever it is written with."""

import re
import unicodedata
from functools import lru_cache

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
INVISIBLE = regex.compile(r"[\p{Mn}\p{Me}\p{Cf}\p{DI}]|(?!\s)\p{Cc}")


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
