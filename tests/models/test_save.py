"""Models written as GGUF: what the `gguf` library reads is what it would have made itself, and what
is computed of it is what transformers computes of the same numbers."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from models.load import load_for_cpu, load_model, load_text
from models.load.gguf_file import open_gguf
from models.save import WEIGHT_FORMATS, open_source, weight_format, write_gguf
from models.save.source import REWRITTEN
from tests.models.sequences import Sequences
from tests.models.test_folder import LLAMA3, YARN, add_tokenizer
from tests.models.texts import texts
from tests.models.tiny import save_folder, write_byte_level

IDS = torch.randint(0, 160, (40,), generator=torch.Generator().manual_seed(1)).tolist()
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-untied": ("Llama", {"tie_word_embeddings": False}),
    "llama-bias": ("Llama", {"attention_bias": True}),
    "llama-linear": ("Llama", {"rope_parameters": LINEAR}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "qwen2": ("Qwen2", {}),
}
QUANTISED = ("q8_0", "q5_0", "q4_1", "q4_0")


def saved(folder: Path, tiny: Path, kind: str = "Llama", **settings: Any) -> Any:
    """A random model with the tokenizer of a tiny one; transformers' own object."""
    text = load_text(str(tiny))
    oracle = save_folder(folder, kind, vocab_size=272, **settings)
    add_tokenizer(folder, text)
    return oracle


def written(source: Path, folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.gguf"
    return write_gguf(open_source(source), path, weight_format(kind)).path


def logits(decoder: Any) -> torch.Tensor:
    return Sequences(decoder, 1, 64).step([(0, IDS)])


def rounded(oracle: Any, kind: str) -> torch.Tensor:
    """Logits of transformers' model with its matrices quantised and decoded by the library."""
    number = gguf.GGMLQuantizationType[kind.upper()]
    for parameter in oracle.parameters():
        if parameter.dim() == 2:
            blocks = gguf.quants.quantize(parameter.detach().numpy(), number)
            values = gguf.quants.dequantize(blocks, number)
            parameter.data = torch.from_numpy(np.array(values, np.float32)).view_as(parameter)
    with torch.no_grad():
        found: torch.Tensor = oracle(torch.tensor([IDS])).logits[0]
    return found


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_rounded_is_the_same_to_the_bit(tmp_path: Path, tiny_gguf: Path, case: str):
    kind, settings = CASES[case]
    saved(tmp_path / "m", tiny_gguf, kind, **settings)
    made = written(tmp_path / "m", tmp_path, "f32")
    before, after = load_model(str(tmp_path / "m")), load_model(str(made))
    for (name, one), other in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert torch.equal(logits(before), logits(after))


def test_llama3_frequencies_become_factors(tmp_path: Path, tiny_gguf: Path):
    saved(tmp_path / "m", tiny_gguf, rope_parameters=LLAMA3)
    made = written(tmp_path / "m", tmp_path, "f32")
    assert load_text(str(made)).config.rope.kind == "factors"
    wanted, found = (logits(load_model(str(path))) for path in (tmp_path / "m", made))
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_half_precision_weights_keep_their_bits(tmp_path: Path, tiny_gguf: Path, kind: str):
    from safetensors.torch import load_file, save_file

    saved(tmp_path / "m", tiny_gguf)
    file, dtype = tmp_path / "m" / "model.safetensors", {"f16": torch.float16}
    halves = {n: t.to(dtype.get(kind, torch.bfloat16)) for n, t in load_file(file).items()}
    save_file(halves, file)
    before = load_model(str(tmp_path / "m"))
    result = write_gguf(open_source(tmp_path / "m"), tmp_path / "x.gguf", weight_format(kind))
    assert result.error == 0.0
    assert torch.equal(logits(before), logits(load_model(str(result.path))))


@pytest.mark.parametrize("kind", QUANTISED)
def test_logits_are_those_of_transformers_on_the_rounded_numbers(
    tmp_path: Path, tiny_gguf: Path, kind: str
):
    oracle = saved(tmp_path / "m", tiny_gguf, head_dim=32)
    exact = logits(load_model(str(tmp_path / "m")))
    made = written(tmp_path / "m", tmp_path, kind)
    wanted = rounded(oracle, kind)
    scale = wanted.abs().max()
    by_torch, by_kernels = load_model(str(made)), load_for_cpu(str(made), "float32")
    assert (logits(by_torch) - wanted).abs().max() <= 1e-5 * scale
    assert (logits(by_kernels) - wanted).abs().max() <= 1e-5 * scale
    assert (exact - wanted).abs().max() > 1e-3 * scale, "rounding acts"


@pytest.mark.parametrize("kind", QUANTISED)
def test_the_library_reads_what_it_would_have_made(tmp_path: Path, tiny_gguf: Path, kind: str):
    """Of a GGUF file: rows stay where they are, blocks in the wanted format are copied, vectors
    kept; values that we decode are the library's."""
    made = written(tiny_gguf, tmp_path, kind)
    before = {t.name: t for t in gguf.GGUFReader(tiny_gguf).tensors}
    after = {t.name: t for t in gguf.GGUFReader(made).tensors}
    assert list(before) == list(after)
    for name, tensor in after.items():
        old = before[name]
        if len(tensor.shape) == 1 or old.tensor_type.name == kind.upper():
            assert np.array_equal(np.asarray(old.data), np.asarray(tensor.data)), name
            continue
        values = gguf.quants.dequantize(old.data, old.tensor_type)
        wanted = gguf.quants.quantize(np.ascontiguousarray(values), tensor.tensor_type)
        assert tensor.tensor_type.name == kind.upper()
        assert np.array_equal(wanted, np.asarray(tensor.data)), name
        mine = open_source(made)
        (entry,) = [each for each in mine.tensors if each.name == name]
        theirs = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        assert np.array_equal(mine.values(entry), theirs.reshape(entry.shape))


def test_a_value_moves_by_half_a_step_at_most(tmp_path: Path, tiny_gguf: Path):
    """By arithmetic alone: q8_0's step is a group's largest value over 127, kept as a half."""
    oracle = saved(tmp_path / "m", tiny_gguf)
    made = load_model(str(written(tmp_path / "m", tmp_path, "q8_0")))
    exact = oracle.model.layers[0].mlp.down_proj.weight.detach().view(-1, 32)
    found = made.get_parameter("layers.0.feedforward.down.weight").detach().view(-1, 32)
    step = exact.abs().amax(1, keepdim=True) / 127
    assert ((found - exact).abs() <= step * (0.5 + 127 * 2**-11)).all()
    assert (found != exact).any()


def test_metadata_of_a_file_is_kept(tmp_path: Path, tiny_gguf: Path):
    made = written(tiny_gguf, tmp_path, "q4_0")
    old, new = open_gguf(tiny_gguf).metadata, open_gguf(made).metadata
    assert {k: v for k, v in new.items() if k not in REWRITTEN} == {
        k: v for k, v in old.items() if k not in REWRITTEN
    }
    types = [
        {n: f.types for n, f in gguf.GGUFReader(path).fields.items() if n in old}
        for path in (tiny_gguf, made)
    ]
    assert types[0] == {name: types[1][name] for name in types[0]}
    assert new["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0


def test_text_sides_are_the_same(tmp_path: Path, tiny_gguf: Path):
    saved(tmp_path / "m", tiny_gguf)
    refuse_another_text(tmp_path / "m", written(tmp_path / "m", tmp_path, "q8_0"))


def test_so_are_those_of_a_real_tokenizer(tmp_path: Path, smollm2_text: Any):
    vocab = smollm2_text.tokenizer.vocab_size
    save_folder(tmp_path / "m", "Llama", vocab_size=vocab, bos_token_id=1, eos_token_id=2)
    add_tokenizer(tmp_path / "m", smollm2_text)
    refuse_another_text(tmp_path / "m", written(tmp_path / "m", tmp_path, "q4_0"))


def refuse_another_text(one: Path, other: Path) -> None:
    before, after = load_text(str(one)), load_text(str(other))
    assert before.chat_template and after.chat_template
    for text in texts(60):
        ids = before.tokenizer.encode(text)
        assert after.tokenizer.encode(text) == ids
        assert after.tokenizer.decode(ids) == before.tokenizer.decode(ids)
        message = [{"role": "user", "content": text}]
        assert after.chat_template.render(message) == before.chat_template.render(message)
    for name in ("eos_token_ids", "bos_token_id", "prompt_prefix", "special_ids"):
        assert getattr(after.tokenizer, name) == getattr(before.tokenizer, name), name
    assert before.tokenizer.special_texts == after.tokenizer.special_texts


def test_a_folder_with_one_file_is_a_model(tmp_path: Path):
    made = write_byte_level(tmp_path / "tiny.gguf")
    assert load_text(str(tmp_path)).config == load_text(str(made)).config
    write_byte_level(tmp_path / "other.gguf")
    with pytest.raises(ValueError, match="no config.json"):
        load_text(str(tmp_path))


def test_groups_that_do_not_divide_rows_are_refused(tmp_path: Path, tiny_gguf: Path):
    saved(tmp_path / "m", tiny_gguf, intermediate_size=80)
    with pytest.raises(ValueError, match=r"ffn_down.*rows of 80.*groups of 32.*are f32, f16, bf16"):
        written(tmp_path / "m", tmp_path, "q4_0")
    assert written(tmp_path / "m", tmp_path, "bf16").is_file()


@pytest.mark.parametrize("value, kind, said", [(1e6, "f16", "too large"), (np.nan, "q8_0", "not")])
def test_values_that_cannot_be_kept_are_refused(
    tmp_path: Path, tiny_gguf: Path, value: float, kind: str, said: str
):
    from safetensors.torch import load_file, save_file

    saved(tmp_path / "m", tiny_gguf)
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"blk.1.ffn_up.weight has values.*{said}"):
        written(tmp_path / "m", tmp_path / "out", kind)
    assert list((tmp_path / "out").iterdir()) == [], "nothing half written stays"


def test_what_exists_and_what_is_unknown_is_refused(tmp_path: Path, tiny_gguf: Path):
    made = written(tiny_gguf, tmp_path, "q8_0")
    before = made.read_bytes()
    with pytest.raises(ValueError, match="exists: give another --out"):
        written(tiny_gguf, tmp_path, "q8_0")
    assert made.read_bytes() == before
    with pytest.raises(ValueError, match="'q3_x' is not known; accepted are.*q4_0"):
        weight_format("q3_x")
    assert {weight_format(kind).form for kind in WEIGHT_FORMATS} == {
        kind.upper() for kind in WEIGHT_FORMATS
    }


def test_rows_in_another_order_would_be_seen(
    tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch
):
    """The mutation: queries and keys stay half-split in a file that says they are in pairs."""
    saved(tmp_path / "m", tiny_gguf)
    monkeypatch.setattr("models.save.source.interleaved", lambda values, heads: values)
    made = written(tmp_path / "m", tmp_path, "f32")
    exact = logits(load_model(str(tmp_path / "m")))
    assert (logits(load_model(str(made))) - exact).abs().max() > 1e-2 * exact.abs().max()
