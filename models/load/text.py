"""What a model needs to turn messages into tokens and back, without its weights."""

from dataclasses import dataclass

from models.chat_template import ChatTemplate
from models.config import ModelConfig
from models.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextModel:
    """A model's shape, tokenizer and chat template; chat_template is None when it has none."""

    config: ModelConfig
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
