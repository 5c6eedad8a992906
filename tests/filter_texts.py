"""Texts for the filter of hate* and violence: those that it finds, and those it leaves alone."""

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
