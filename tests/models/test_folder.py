"""Hugging Face folders: random models saved by transformers, loaded by us, the same logits."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.load import load_model, load_text
from tests.models.sequences import Sequences
from tests.models.texts import texts
from tests.models.tiny import TEMPLATE, save_folder

IDS = torch.randint(0, 160, (60,), generator=torch.Generator().manual_seed(0)).tolist()
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-untied": ("Llama", {"tie_word_embeddings": False}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-bias": ("Llama", {"attention_bias": True}),
    "llama-wide-heads": ("Llama", {"head_dim": 32}),
    "llama-linear-rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama-llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-yarn-rope": ("Llama", {"rope_parameters": YARN}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(tmp_path: Path, case: str):
    kind, settings = CASES[case]
    oracle = save_folder(tmp_path, kind, **settings)
    sequences = Sequences(load_model(str(tmp_path)), 1, 64)
    ours = torch.cat([sequences.step([(0, IDS[:41])]), sequences.step([(0, IDS[41:])])])
    with torch.no_grad():
        wanted = oracle(torch.tensor([IDS])).logits[0]
    assert wanted.std() > 0.3
    assert (ours - wanted).abs().max().item() <= 1e-4


def test_the_older_spelling_of_rope_means_the_same(tmp_path: Path):
    save_folder(tmp_path, "Llama", rope_parameters=LLAMA3)
    new = load_text_config(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    path.write_text(json.dumps(config))
    assert load_text_config(tmp_path) == new


def load_text_config(path: Path) -> Any:
    from models.load.folder import read_config

    return read_config(path)


def test_shards_equal_one_file(tmp_path: Path):
    save_folder(tmp_path / "one", "Llama")
    save_folder(tmp_path / "many", "Llama", shard="60KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = load_model(str(tmp_path / "one")), load_model(str(tmp_path / "many"))
    for (name, ours), theirs in zip(one.named_parameters(), many.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_half_precision_files_become_the_dtype_asked_for(tmp_path: Path):
    save_folder(tmp_path, "Llama")
    file = tmp_path / "model.safetensors"
    save_file({name: value.half() for name, value in load_file(file).items()}, file)
    decoder = load_model(str(tmp_path))
    wanted = load_file(file)["model.embed_tokens.weight"].float()
    assert torch.equal(decoder.embed.weight, wanted)
    assert load_model(str(tmp_path), dtype="bfloat16").dtype == torch.bfloat16


def add_tokenizer(path: Path, text: Any, *, template: Any = TEMPLATE, jinja: str = "") -> None:
    """The default model's tokenizer, cut off from its GGUF file."""
    text.tokenizer._backend.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"},
        "chat_template": template,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    if jinja:
        (path / "chat_template.jinja").write_text(jinja)


@pytest.fixture
def folder(tmp_path: Path, smollm2_text: Any) -> Path:
    save_folder(tmp_path, "Llama")
    config = json.loads((tmp_path / "config.json").read_text())
    config["vocab_size"] = smollm2_text.tokenizer.vocab_size
    (tmp_path / "config.json").write_text(json.dumps(config))
    add_tokenizer(tmp_path, smollm2_text)
    return tmp_path


def test_tokenizer_and_template_equal_transformers(folder: Path):
    from transformers import PreTrainedTokenizerFast

    ours, oracle = load_text(str(folder)), PreTrainedTokenizerFast.from_pretrained(folder)
    assert ours.chat_template is not None
    for text in texts(120):
        ids = oracle.encode(text, add_special_tokens=False)
        assert ours.tokenizer.encode(text) == ids
        assert ours.tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
        messages = [{"role": "user", "content": text}]
        wanted = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ours.chat_template.render(messages) == wanted
    assert ours.tokenizer.special_texts["eos_token"] == "<|im_end|>"


def test_where_a_template_may_come_from(folder: Path, smollm2_text: Any):
    def rendered() -> str:
        template = load_text(str(folder)).chat_template
        assert template is not None
        return template.render([])

    add_tokenizer(folder, smollm2_text, template=[{"name": "default", "template": "list"}])
    assert rendered() == "list"
    add_tokenizer(folder, smollm2_text, template="text", jinja="{{ bos_token }} file")
    assert rendered() == "<|im_start|> file"
    (folder / "chat_template.jinja").unlink()
    add_tokenizer(folder, smollm2_text, template=None)
    assert load_text(str(folder)).chat_template is None


def test_generation_config_names_the_ends(folder: Path):
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    assert load_text(str(folder)).tokenizer.eos_token_ids == (2, 0)


def edit(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = json.loads((path / "config.json").read_text()) | changes
        (path / "config.json").write_text(json.dumps(config))

    return change


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / name).write_bytes(content)

    return change


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def reshape(path: Path) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = torch.ones(63)
    save_file(tensors, file)


def drop(path: Path) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file)


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "foreign architecture": (edit(architectures=["MambaForCausalLM"]), "LlamaForCausalLM"),
    "no architecture": (edit(architectures=None), "LlamaForCausalLM"),
    "wrong activation": (edit(hidden_act="gelu"), "silu"),
    "text for a number": (edit(hidden_size="big"), "hidden_size must be a whole number"),
    "huge": (edit(hidden_size=1 << 50), "hidden must be in"),
    "negative": (edit(num_hidden_layers=-1), "layers"),
    "many layers": (edit(num_hidden_layers=4000), "layers.2.*missing"),
    "unknown rope": (edit(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "yarn"),
    "quantised": (edit(quantization_config={"quant_method": "gptq"}), "plain weights"),
    "no json": (write("config.json", b"{"), "not valid JSON"),
    "deep json": (write("config.json", b"[" * 100_000), "not valid JSON"),
    "a list": (write("config.json", b"[]"), "JSON object"),
    "truncated": (truncate, "not a safetensors file"),
    "empty": (write("model.safetensors", b""), "not a safetensors file"),
    "wrong shape": (reshape, r"model.norm.weight has shape \(63,\), \(64,\) is wanted"),
    "missing tensor": (drop, "up_proj.weight' is missing"),
    "escaping index": (
        write("model.safetensors.index.json", b'{"weight_map": {"a": "../a.safetensors"}}'),
        "files of the folder",
    ),
    "index without shards": (
        write(
            "model.safetensors.index.json",
            b'{"weight_map": {"model.embed_tokens.weight": "gone.safetensors"}}',
        ),
        "gone.safetensors is not a safetensors file",
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good")
    save_folder(path, "Llama")
    return path


@pytest.mark.parametrize("case", WRONG)
def test_wrong_folders_are_refused_with_a_sentence(good: Path, tmp_path: Path, case: str):
    change, words = WRONG[case]
    path = tmp_path / "copy"
    shutil.copytree(good, path)
    change(path)
    with pytest.raises(ValueError, match=words) as refusal:
        load_model(str(path))
    assert str(path) in str(refusal.value)


def test_a_folder_without_what_it_needs_is_refused(good: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="no config.json"):
        load_model(str(tmp_path))
    with pytest.raises(ValueError, match="no tokenizer.json"):
        load_text(str(good))
    shutil.copy(good / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="no model.safetensors"):
        load_model(str(tmp_path))


def test_a_tokenizer_larger_than_the_model_is_refused(
    good: Path, tmp_path: Path, smollm2_text: Any
):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    add_tokenizer(tmp_path, smollm2_text)
    with pytest.raises(ValueError, match="vocab_size is 160"):
        load_text(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer"):
        load_text(str(tmp_path))
