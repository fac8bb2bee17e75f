"""The default model against the `gguf` library and transformers in fp32."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from models.decoder import Decoder
from models.load import TextModel
from models.load.gguf import stored_name
from models.load.weights import parts
from models.packed import PackedDecoder
from tests.models.oracle import agreement, reference_logits
from tests.models.sequences import Sequences
from tests.models.texts import texts

PROMPTS = [
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "def fibonacci(n):",
]


def prompt_ids(text: TextModel, words: str) -> list[int]:
    assert text.chat_template is not None
    return text.tokenizer.encode(text.chat_template.render([{"role": "user", "content": words}]))


def greedy(
    decoder: Decoder | PackedDecoder, prompt: list[int], tokens: int
) -> tuple[list[int], torch.Tensor]:
    """Generated ids (ended by the model or at `tokens`) and the logits they were taken from."""
    sequences = Sequences(decoder, 1, len(prompt) + tokens)
    rows, ids = [sequences.step([(0, prompt)])[-1]], []
    while True:
        ids.append(int(rows[-1].argmax()))
        if len(ids) == tokens or ids[-1] in decoder.config.eos_token_ids:
            return ids, torch.stack(rows)
        rows.append(sequences.step([(0, [ids[-1]])])[-1])


def test_every_tensor_is_bit_equal_to_the_gguf_library(smollm2: Decoder, smollm2_path: Path):
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2_path).tensors}
    parameters = dict(smollm2.named_parameters())
    heads = {"attn_q": smollm2.config.heads, "attn_k": smollm2.config.kv_heads}
    seen = set()
    for part in parts(smollm2.config):
        name = stored_name(part.source)
        seen.add(name)
        tensor = tensors[name]
        wanted = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        kind = name.split(".")[-2]
        if kind in heads:
            halves = wanted.reshape(heads[kind], -1, 2, wanted.shape[1])
            wanted = halves.swapaxes(1, 2).reshape(wanted.shape)
        rows = parameters[part.parameter][part.start : part.start + part.rows]
        assert torch.equal(rows, torch.tensor(wanted)), name
    assert seen == set(tensors)


def test_logits_equal_transformers(
    smollm2: Decoder, smollm2_text: TextModel, smollm2_reference: Any
):
    """Prefill, chunked prefill and decode: a bound 10 times below the promised 1e-3."""
    for words in PROMPTS:
        prompt = prompt_ids(smollm2_text, words)
        ids, logits = greedy(smollm2, prompt, 24)
        found = agreement(smollm2_reference, prompt, ids, logits)
        assert found.agreeing == found.tokens
        assert found.max_logit_difference <= 1e-4


def test_long_prompt_logits_equal_transformers(smollm2: Decoder, smollm2_reference: Any):
    ids = torch.randint(0, 49152, (530,), generator=torch.Generator().manual_seed(0)).tolist()
    sequences = Sequences(smollm2, 1, 530)
    ours = torch.cat([sequences.step([(0, ids[start : start + 256])]) for start in (0, 256, 512)])
    wanted = reference_logits(smollm2_reference, ids[:1], ids[1:])
    assert (ours[:-1] - wanted).abs().max().item() <= 1e-4


def test_it_says_paris(smollm2: Decoder, smollm2_text: TextModel):
    ids, _ = greedy(smollm2, prompt_ids(smollm2_text, PROMPTS[0]), 16)
    assert "Paris" in smollm2_text.tokenizer.decode(ids)
    assert ids[-1] == smollm2_text.tokenizer.eos_token_ids[0]


def published(tokenizer: Any) -> Any:
    """transformers does not read tokenizer.ggml.pre = smollm and so leaves out that every digit
    stands alone, as the model's published tokenizer.json has it; here it is put in."""
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return tokenizer


@pytest.fixture
def oracle(smollm2_reference_tokenizer: Any) -> Any:
    """The oracle as transformers builds it, put back afterwards."""
    before = smollm2_reference_tokenizer.backend_tokenizer.pre_tokenizer
    yield smollm2_reference_tokenizer
    smollm2_reference_tokenizer.backend_tokenizer.pre_tokenizer = before


def test_tokens_equal_transformers_untouched(smollm2_text: TextModel, oracle: Any):
    for text in texts(500, without=("digits", "code"), seed=1):
        wanted = oracle.encode(text, add_special_tokens=False)
        assert smollm2_text.tokenizer.encode(text) == wanted, text


def test_tokens_and_text_equal_transformers(smollm2_text: TextModel, oracle: Any):
    oracle, ours = published(oracle), smollm2_text.tokenizer
    for text in texts(500):
        wanted = oracle.encode(text, add_special_tokens=False)
        assert ours.encode(text) == wanted, text
        assert ours.decode(wanted) == oracle.decode(wanted, skip_special_tokens=True), text
        assert ours.decode(wanted, skip_special=False) == oracle.decode(wanted), text


def test_chat_prompts_equal_transformers(smollm2_text: TextModel, oracle: Any):
    template = smollm2_text.chat_template
    assert template is not None
    for index, text in enumerate(texts(500, seed=2)):
        messages = [{"role": "user", "content": text}]
        if index % 3 == 0:
            messages.insert(0, {"role": "system", "content": text[::-1]})
        if index % 4 == 0:
            messages.append({"role": "assistant", "content": "yes"})
        prompt = bool(index % 2)
        wanted = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert template.render(messages, add_generation_prompt=prompt) == wanted
