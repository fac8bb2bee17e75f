"""Strings that trip tokenizers and templates: seeded, of every kind that people send.

Shared by the tests here and by `make prove-serve`.
"""

import random
from collections.abc import Callable

WORDS = "the tide comes in twice a day and Sanderlings don't wait: they're running; we've seen'em"
ACCENTS = "naïve café Übergröße ŁÓDŹ ångström señor İstanbul ﬁne e\u0301te\u0301 ΣΊΣΥΦΟΣ"
CJK = "東京は夜の七時。汉字与漢字，한국어 문장도 있다「ｶﾀｶﾅ」！？"
SCRIPTS = "Привет мир שלום עולם مرحبا بالعالم नमस्ते दुनिया สวัสดีชาวโลก გამარჯობა"
EMOJI = ("🙂", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇫🇷", "❤️", "#️⃣", "🫠")
BLANKS = (" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\u00a0", "\u3000", "\u200b", "    \n\t")
SIGNS = ("…", "—", "“”", "€5", "½", "x²", "№7", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "\\")
CODE = (
    "def f(x):\n    return {k: v for k, v in x.items() if v >= 0x1F}\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] << 2; }  // sum\n",
    "SELECT * FROM t WHERE name LIKE '%x%' AND n<>3;\n",
    '{"key": [1, 2.5e-3, null], "s": "\\u00e9"}',
    "\t\tif err != nil {\n\t\t\treturn fmt.Errorf(\"%w\", err)\n\t\t}\n",
    "<div class='a b'>&nbsp;</div><!-- c -->",
)


def _pick(chance: random.Random, text: str) -> str:
    """A stretch of a text, cut anywhere."""
    start = chance.randrange(len(text))
    return text[start : start + chance.randrange(1, 40)]


def _number(chance: random.Random) -> str:
    number = chance.randrange(10 ** chance.randrange(1, 12))
    return chance.choice([f"{number}", f"{number:,}", f" {number / 1000}", f"-{number}", f"{number:x}"])


def _any_character(chance: random.Random) -> str:
    """A character from all of Unicode but the surrogates."""
    number = chance.randrange(0x110000 - 0x800)
    return chr(number if number < 0xD800 else number + 0x800)


KINDS: tuple[Callable[[random.Random], str], ...] = (
    lambda chance: _pick(chance, WORDS),
    lambda chance: _pick(chance, ACCENTS),
    lambda chance: _pick(chance, CJK),
    lambda chance: _pick(chance, SCRIPTS),
    lambda chance: chance.choice(EMOJI),
    lambda chance: chance.choice(BLANKS) * chance.randrange(1, 9),
    lambda chance: chance.choice(SIGNS),
    lambda chance: _pick(chance, chance.choice(CODE)),
    _number,
    _any_character,
)


def strings(count: int, seed: int = 2026) -> list[str]:
    """`count` texts, the empty one first, then one of each kind alone, then mixtures."""
    chance = random.Random(seed)
    alone = ["", *(kind(chance) for kind in KINDS), *CODE]
    mixed = (
        chance.choice(("", " ", "\n")).join(
            chance.choice(KINDS)(chance) for _ in range(chance.randrange(1, 12))
        )
        for _ in range(count)
    )
    return [*alone, *mixed][:count]
