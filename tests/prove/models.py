"""Proof rows of the default model: weights, logits, tokens and text against other libraries.

The oracles: the gguf library for weights, transformers in fp32 for logits, greedy tokens,
tokenizer and chat template.
"""

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from cluster.settings import Settings
from models.decoder import Decoder
from models.device.decoder import DeviceDecoder
from models.load.gguf import stored_name
from models.load.weights import parts
from models.resolve import resolve
from serve import build
from serve.chat import ChatPrompt
from serve.engine.sequence import Limits, Request, Sampling, Sequence
from serve.kv.prefix import CacheKey
from tests.models.oracle import agreement, reference
from tests.models.sequences import Sequences
from tests.models.texts import PIECES, texts
from tests.prove.attempt import attempt
from tests.prove.row import Row

STRINGS = 500
PROMPTS = 50
TOKENS = 64
DECODED_TOKENS = 12
LOGIT_TOLERANCE = 1e-3
QUESTIONS = (
    "What is the capital of France?",
    "Explain how tides work.",
    "Write a poem about the sea.",
    "def fibonacci(n):",
    "List five birds that live at the coast, with one sentence about each.",
)


def rows(model: build.Model | None = None) -> Iterator[Row]:
    """Every row of this module, as it is measured; about ten minutes. In float32, as the oracle is;
    what the CPU kernels lose against that is measured in kernel_quality."""
    settings = Settings.model_validate({"engine": {"kernels": "reference"}})
    path = resolve(settings.model)
    model = model or build.load(settings)
    yield from attempt("tokenizer = transformers'", lambda: same_text(model, path))
    yield from attempt("GGUF tensors = gguf library", lambda: same_weights(settings, model))
    prompts = some_prompts(model)
    oracle = reference(path)
    yield from attempt("logits", lambda: close_logits(model, oracle, prompts))
    yield from attempt("greedy tokens", lambda: same_tokens(settings, model, oracle, prompts))


def same_text(model: build.Model, path: Path) -> Iterator[Row]:
    """Tokenizer and chat template against transformers' reading of the same file.

    transformers does not read tokenizer.ggml.pre ("smollm": every digit stands alone, as in the
    model's published tokenizer.json); so strings with digits are compared with that put in.
    """
    oracle = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    plain = texts(STRINGS, without=("digits", "code"), seed=1)
    yield _same_ids("tokenizer = transformers' as it is, no digits", model, oracle, plain)
    oracle.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    every = texts(STRINGS)
    yield _same_ids("tokenizer = transformers' with the model's digit split", model, oracle, every)
    yield same_chats(model, oracle)


def _same_ids(name: str, model: build.Model, oracle: Any, strings: list[str]) -> Row:
    """Ids of every string, and the text that they decode to, with special tokens and without."""
    tokenizer = model.text.tokenizer
    differ = []
    for text in strings:
        ids = tokenizer.encode(text)
        same = ids == oracle.encode(text, add_special_tokens=False)
        for skip in (True, False):
            same &= tokenizer.decode(ids, skip) == oracle.decode(ids, skip_special_tokens=skip)
        if not same:
            differ.append(text)
    first = f", first {differ[0]!r}" if differ else ""
    measured = f"{len(differ)} of {len(strings)} strings differ{first}"
    return Row(name, f"{STRINGS} equal", measured, not differ and len(strings) == STRINGS)


def same_chats(model: build.Model, oracle: Any) -> Row:
    """Rendered conversations; and the ids the edge makes of them, where nothing in them spells a
    control token (there the edge differs on purpose)."""
    assert model.text.chat_template is not None
    prompt = ChatPrompt(model.text.tokenizer, model.text.chat_template)
    chance = random.Random(5)
    strings = texts(STRINGS, seed=2)
    differ = 0
    for number, text in enumerate(strings):
        chat = _conversation(chance, strings, text)
        opened = bool(number % 2)
        wanted = oracle.apply_chat_template(chat, tokenize=False, add_generation_prompt=opened)
        same = model.text.chat_template.render(chat, add_generation_prompt=opened) == wanted
        if opened and not any(mark in m["content"] for m in chat for mark in PIECES["special"]):
            same &= prompt.ids(chat) == oracle.encode(wanted, add_special_tokens=False)
        differ += not same
    name = "chat template = transformers', edge's prompt ids too"
    measured = f"{differ} of {STRINGS} conversations differ"
    return Row(name, f"{STRINGS} equal", measured, differ == 0)


def _conversation(chance: random.Random, strings: list[str], text: str) -> list[dict[str, str]]:
    """One to six messages, with a system message at the beginning or without; `text` is last."""
    chat = [{"role": "system", "content": chance.choice(strings)}] if chance.random() < 0.5 else []
    for _ in range(chance.randrange(3)):
        chat.append({"role": "user", "content": chance.choice(strings)})
        chat.append({"role": "assistant", "content": chance.choice(strings)})
    return [*chat, {"role": "user", "content": text}]


def same_weights(settings: Settings, model: build.Model) -> Row:
    """Every tensor of the file, decoded by the gguf library, against the loaded decoder's memory.

    Query and key rows are stored as rotary pairs: ours are put into that order for the comparison.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    config, decoder = model.decoder.config, model.decoder
    assert isinstance(decoder, Decoder)
    stored = {tensor.name: tensor for tensor in GGUFReader(resolve(settings.model)).tensors}
    heads = {"attn_q": config.heads, "attn_k": config.kv_heads}
    differ = []
    for part in parts(config):
        tensor = stored.pop(stored_name(part.source))
        wanted = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        ours = decoder.get_parameter(part.parameter)[part.start : part.start + part.rows]
        count = heads.get(tensor.name.split(".")[-2])
        if count is not None:
            halves = ours.view(count, 2, -1, config.hidden)
            ours = halves.transpose(1, 2).reshape(ours.shape)
        if not torch.equal(ours, wanted):
            differ.append(tensor.name)
    total = sum(1 for _ in parts(config))
    measured = f"{total} tensors, {len(differ)} differ, {len(stored)} unread"
    whole = total == 272 and not differ and not stored
    return Row("GGUF tensors = gguf library, bit for bit", "272 equal", measured, whole)


def some_prompts(model: build.Model) -> list[tuple[int, ...]]:
    """Chats and raw text of 4 to about 400 tokens, some with a common beginning."""
    assert model.text.chat_template is not None
    chat = ChatPrompt(model.text.tokenizer, model.text.chat_template)
    strings = texts(PROMPTS * 8)
    made = []
    for number in range(PROMPTS):
        question = QUESTIONS[number % len(QUESTIONS)]
        tail = " ".join(strings[number * 7 : number * 7 + number % 7])
        if number % 3:
            content = f"{question} {tail} ({number})"
            made.append(chat.ids([{"role": "user", "content": content}]))
        else:
            made.append(model.text.tokenizer.encode(f"{question} {tail}"))
    return [tuple(ids) for ids in made]


def close_logits(model: build.Model, oracle: Any, prompts: list[tuple[int, ...]]) -> Row:
    """All logits of every fifth prompt: its beginnings as one batch of prefills, its last tokens
    as batched decode steps."""
    chosen = prompts[::5]
    ours: list[list[torch.Tensor]] = [[] for _ in chosen]
    assert not isinstance(model.decoder, DeviceDecoder), "computed on the CPU"
    run = Sequences(model.decoder, len(chosen), max(map(len, chosen)))
    heads = [prompt[: max(1, len(prompt) - DECODED_TOKENS)] for prompt in chosen]
    for n, rows_of in enumerate(run.step(list(enumerate(heads))).split([len(h) for h in heads])):
        ours[n].append(rows_of)
    for step in range(DECODED_TOKENS):
        at = [n for n, prompt in enumerate(chosen) if len(heads[n]) + step < len(prompt)]
        rows_of = run.step([(n, [chosen[n][len(heads[n]) + step]]) for n in at])
        for n, row in zip(at, rows_of.split(1), strict=True):
            ours[n].append(row)
    largest, positions = 0.0, 0
    for n, prompt in enumerate(chosen):
        with torch.no_grad():
            wanted = oracle(torch.tensor([prompt]), use_cache=False).logits[0]
        difference = (torch.cat(ours[n]) - wanted).abs().max().item()
        assert math.isfinite(difference)
        largest = max(largest, difference)
        positions += len(prompt)
    name = f"logits of {len(chosen)} prompts, {positions} positions, against transformers fp32"
    return Row(name, f"<= {LOGIT_TOLERANCE:g}", f"{largest:.1e}", largest <= LOGIT_TOLERANCE)


def same_tokens(
    settings: Settings, model: build.Model, oracle: Any, prompts: list[tuple[int, ...]]
) -> Row:
    """Generated in continuous batches; then transformers reads prompt and answer at once and has
    to prefer every token of the answer."""
    answers = generate(settings, model, prompts)
    total = agreeing = 0
    margin = float("inf")
    for prompt, answer in zip(prompts, answers, strict=True):
        found = agreement(oracle, prompt, answer)
        total, agreeing = total + found.tokens, agreeing + found.agreeing
        margin = min(margin, found.smallest_margin)
    name = f"greedy tokens of {PROMPTS} prompts = transformers fp32"
    measured = f"{agreeing} of {total} equal, closest decision {margin:.1e}"
    return Row(name, f"{PROMPTS * TOKENS} equal", measured, agreeing == total == PROMPTS * TOKENS)


def generate(
    settings: Settings, model: build.Model, prompts: list[tuple[int, ...]]
) -> list[list[int]]:
    """TOKENS greedy tokens for each prompt, all prompts in one engine with its prefix cache on."""
    assert settings.engine.prefix_cache
    engine, storage = build.engine(settings, model, None)
    limits, key = Limits(TOKENS, ignore_eos=True), CacheKey("", "", "")
    sequences = [
        Sequence(Request(str(number), prompt, Sampling(temperature=0.0), limits, key))
        for number, prompt in enumerate(prompts)
    ]
    for sequence in sequences:
        engine.add(sequence)
    while engine.has_work:
        engine.step()
    engine.check()
    storage.close()
    return [sequence.output for sequence in sequences]
