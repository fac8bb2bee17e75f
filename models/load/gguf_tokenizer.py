"""Builds a tokenizer from the metadata of a GGUF file.

Two families: "gpt2", byte-level BPE whose way of splitting text is named by tokenizer.ggml.pre,
and "llama", SentencePiece BPE whose merges follow from the scores. The splits are those of the
models' own tokenizer.json files. A file may also hold a whole tokenizer.json, which then is what
counts. Imports no torch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from models.config import ModelConfig
from models.load.fields import Fields
from models.load.json_tokenizer import build, read_backend
from models.tokenizer import Tokenizer as ModelTokenizer

CONTROL, USER_DEFINED = 3, 4
# Longer than any real piece; recovering merges is quadratic in it.
LONGEST_PIECE = 1024
WHOLE = "tokenizer.huggingface.json"
SPECIAL_KEYS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


class Split(NamedTuple):
    """How a byte-level vocabulary cuts text before merging: GPT-2's own expression when pattern
    is None; digits: every digit stands alone first; whole_words: a word that is a token is never
    built from merges; compose: text is brought to NFC first."""

    pattern: str | None = None
    digits: bool = False
    whole_words: bool = False
    compose: bool = False


_GPT2, _DIGITS = Split(), Split(digits=True)
_LLAMA3 = Split(_LLAMA3_SPLIT, whole_words=True)
SPLITS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": Split(_QWEN2_SPLIT, compose=True),
}


def build_tokenizer(
    source: str, metadata: Mapping[str, Any], config: ModelConfig
) -> ModelTokenizer:
    """The tokenizer of a file's metadata. ValueError naming `source` when it has none, is of an
    unknown kind or contradicts itself."""
    fields = Fields(source, metadata)
    if WHOLE in fields:
        return _whole(fields, config)
    kind = fields.text("tokenizer.ggml.model", "")
    if kind not in BUILDERS:
        known = " and ".join(repr(known) for known in BUILDERS)
        raise ValueError(f"{source}: tokenizer {kind!r} is not accepted; {known} are.")
    tokens = fields.items("tokenizer.ggml.tokens", str)
    if not 0 < len(tokens) <= config.vocab or len(set(tokens)) != len(tokens):
        raise ValueError(
            f"{source}: tokenizer.ggml.tokens must be 1 to {config.vocab} different tokens, "
            f"got {len(tokens)}."
        )
    for number in (config.bos_token_id, *config.eos_token_ids):
        if number is not None and not 0 <= number < len(tokens):
            raise ValueError(f"{source}: special token id {number} is not below {len(tokens)}.")
    backend = BUILDERS[kind](fields, tokens)
    _add_tokens(backend, fields, tokens)
    prefixed = fields.flag("tokenizer.ggml.add_bos_token", kind == "llama")
    bos = config.bos_token_id
    return ModelTokenizer(
        backend,
        source=source,
        bos_token_id=bos,
        eos_token_ids=config.eos_token_ids,
        special_texts=_special_texts(fields, tokens),
        prompt_prefix=(bos,) if prefixed and bos is not None else (),
    )


def _whole(fields: Fields, config: ModelConfig) -> ModelTokenizer:
    """A Hugging Face folder's tokenizer.json, all of it in one line of the metadata."""
    place = f"{fields.source}: {WHOLE}"
    backend = read_backend(place, fields.text(WHOLE))
    texts = {}
    for name, key in SPECIAL_KEYS.items():
        if key in fields:
            number = fields.integer(key)
            token = backend.id_to_token(number) if 0 <= number < config.vocab else None
            if token is None:
                raise fields.refuse(key, "a token of the vocabulary")
            texts[name] = token
    return build(place, backend, config, texts)


def _byte_level(fields: Fields, tokens: Sequence[str]) -> Tokenizer:
    name = fields.text("tokenizer.ggml.pre", "default")
    if name not in SPLITS:
        known = ", ".join(SPLITS)
        raise ValueError(f"{fields.source}: tokenizer.ggml.pre {name!r} is not one of {known}.")
    split = SPLITS[name]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = []
    for merge in fields.items("tokenizer.ggml.merges", str):
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise ValueError(f"{fields.source}: merge {merge!r} is not made of known tokens.")
        merges.append((left, right))
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=split.whole_words))
    steps: list[Any] = []
    if split.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if split.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(split.pattern), behavior="isolated"))
    use_regex = split.pattern is None
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if split.compose:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(fields: Fields, tokens: Sequence[str]) -> Tokenizer:
    scores = fields.items("tokenizer.ggml.scores", float)
    if len(scores) != len(tokens):
        raise fields.refuse("tokenizer.ggml.scores", f"{len(tokens)} numbers")
    unknown = fields.integer("tokenizer.ggml.unknown_token_id", 0)
    if not 0 <= unknown < len(tokens):
        raise fields.refuse("tokenizer.ggml.unknown_token_id", f"below {len(tokens)}")
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = _merges(fields.source, vocab, scores)
    backend = Tokenizer(
        models.BPE(vocab, merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    )
    prefix = fields.flag("tokenizer.ggml.add_space_prefix", True)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="first" if prefix else "never", split=False
    )
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    backend.decoder = decoders.Sequence(steps)
    return backend


def _merges(
    source: str, vocab: Mapping[str, int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """SentencePiece joins the pair whose result scores best: that order, as a list of merges."""
    ranked = []
    for token, index in vocab.items():
        if len(token) > LONGEST_PIECE:
            raise ValueError(f"{source}: token {index} is longer than {LONGEST_PIECE} characters.")
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                ties = (len(left), len(right), -vocab[left], -vocab[right])
                ranked.append((scores[index], ties, left, right))
    ranked.sort(key=lambda entry: entry[:2], reverse=True)
    return [(left, right) for _, _, left, right in ranked]


BUILDERS: dict[str, Callable[[Fields, Sequence[str]], Tokenizer]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
}


def _add_tokens(backend: Tokenizer, fields: Fields, tokens: Sequence[str]) -> None:
    """Control tokens are special; user-defined ones are only matched whole."""
    if "tokenizer.ggml.token_type" not in fields:
        return
    kinds = fields.items("tokenizer.ggml.token_type", int)
    if len(kinds) != len(tokens):
        raise fields.refuse("tokenizer.ggml.token_type", f"{len(tokens)} numbers")
    pairs = [pair for pair in zip(tokens, kinds, strict=True) if pair[0]]
    control = [AddedToken(t, normalized=False, special=True) for t, k in pairs if k == CONTROL]
    user = [AddedToken(t, normalized=False, special=False) for t, k in pairs if k == USER_DEFINED]
    backend.add_special_tokens(control)
    backend.add_tokens(user)


def _special_texts(fields: Fields, tokens: Sequence[str]) -> dict[str, str]:
    texts = {}
    for name, key in SPECIAL_KEYS.items():
        if key in fields:
            number = fields.integer(key)
            if not 0 <= number < len(tokens):
                raise fields.refuse(key, f"below {len(tokens)}")
            texts[name] = tokens[number]
    return texts
