"""Generated strings that tokenizers get wrong: emoji, scripts, code, whitespace, digits, marks."""

import random

PIECES = {
    "words": ["the", "Hello", "don't", "I'll", "naïve", "Straße", "façade", "ΑΒΓ", "привет"],
    "emoji": ["😀", "👩‍👩‍👧‍👦", "🇫🇷", "👍🏽", "❤️", "🏳️‍🌈", "🧑‍🚀"],
    "scripts": ["你好，世界", "こんにちは", "안녕하세요", "مرحبا", "हिन्दी", "ไทย", "𝔘𝔫𝔦"],
    "code": [
        "def f(x):\n    return x**2",
        "for (;;) {}",
        "a->b::c",
        "<div>&amp;</div>",
        "\\n",
        "#!",
    ],
    "space": [" ", "  ", "\n", "\n\n", "\t", "        ", " \n ", "\r\n", "\u00a0", "\u3000"],
    "digits": ["1", "42", "2024", "3.14159", "1,000", "½", "٣", "x1y2"],
    "marks": ["e\u0301", "\u200b", "\ufeff", "\u202e", "...", "?!", "—", "“”", "\x00", "\x7f"],
    "special": ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im", "|>"],
}


def texts(count: int, *, without: tuple[str, ...] = (), seed: int = 0) -> list[str]:
    """`count` different strings; kinds of pieces may be left out by name."""
    source = random.Random(seed)
    pool = [piece for kind, pieces in PIECES.items() if kind not in without for piece in pieces]
    found: dict[str, None] = dict.fromkeys(["", *pool][:count])
    while len(found) < count:
        parts = source.choices(pool, k=source.randint(2, 14))
        found[source.choice(["", " ", "  "]).join(parts)] = None
    return list(found)
