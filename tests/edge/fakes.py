"""A model of bytes and a service of known tokens, so that the edge is tested without weights.

The tokenizer is a real byte-level BPE with a handful of merges: token ids below 256 are bytes (so
an emoji is four tokens), then merges, then the control tokens of a ChatML template.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

import tokenizers
import uvicorn
from tokenizers.models import BPE

from models.chat_template import ChatTemplate
from models.config import ModelConfig
from models.detokenize import BYTE_OF_CHARACTER
from models.load.text import TextModel
from models.tokenizer import Tokenizer
from serve.engine.sequence import Delta, Request
from serve.http import EdgeSettings, build_app
from serve.service import Service

MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ċ", "Ċ"), ("Ġ", "w"), ("<", "|")]
CONTROLS = ("<|im_start|>", "<|im_end|>", "<|end|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MODEL = "tiny"
CONTEXT_TOKENS = 200


def tiny_tokenizer() -> Tokenizer:
    vocab = {character: byte for character, byte in BYTE_OF_CHARACTER.items()}
    for left, right in MERGES:
        vocab[left + right] = len(vocab)
    backend = tokenizers.Tokenizer(BPE(vocab=vocab, merges=MERGES))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(CONTROLS))
    end = len(vocab) + CONTROLS.index("<|im_end|>")
    assert backend.token_to_id("<|im_end|>") == end
    return Tokenizer(
        backend, source="tiny", bos_token_id=None, eos_token_ids=(end,), special_texts={}
    )


def tiny_text_model(template: str | None = CHATML) -> TextModel:
    tokenizer = tiny_tokenizer()
    config = ModelConfig(
        name=MODEL,
        layers=1,
        hidden=8,
        heads=2,
        kv_heads=1,
        head_dim=4,
        ff=8,
        vocab=tokenizer.vocab_size,
        context_tokens=CONTEXT_TOKENS,
        rms_eps=1e-5,
        eos_token_ids=tokenizer.eos_token_ids,
    )
    chat = ChatTemplate(template, {}, source="tiny") if template is not None else None
    return TextModel(config, tokenizer, chat)


Step = Delta | Exception | float  # a float is a pause in seconds


class ScriptedService:
    """Plays `script` for every request; `hang` after it, as a model that never ends would."""

    def __init__(self, script: Sequence[Step] = (), *, hang: bool = False) -> None:
        self.script = list(script)
        self.hang = hang
        self.requests: list[Request] = []
        self.ready: bool | Exception = True
        self.metrics: dict[str, float] = {}
        self.delivered = threading.Event()
        self.closed = threading.Event()

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        self.requests.append(request)
        try:
            for step in self.script:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, float):
                    await asyncio.sleep(step)
                    continue
                yield step
            if self.hang:
                self.delivered.set()
                await asyncio.Event().wait()
        finally:
            self.closed.set()

    async def probe(self) -> bool:
        if isinstance(self.ready, Exception):
            raise self.ready
        return self.ready

    async def status(self) -> dict[str, Any]:
        if isinstance(self.ready, Exception):
            raise self.ready
        return {"replicas": [], "metrics": self.metrics}


def spoken(text: str, *, finish: str = "stop", cached_tokens: int = 0) -> list[Delta]:
    """One delta per byte of the text, then the end of the sequence (or nothing, at the length)."""
    ids = list(text.encode())
    end = tiny_tokenizer().eos_token_ids[0]
    if finish == "stop":
        rows = [Delta((token,), None, None, cached_tokens) for token in ids]
        return [*rows, Delta((end,), "stop", None, cached_tokens)]
    rows = [Delta((token,), None, None, cached_tokens) for token in ids[:-1]]
    return [*rows, Delta((ids[-1],), "length", None, cached_tokens)]


@contextlib.contextmanager
def serving(service: Service, text: TextModel | None = None, **settings: Any) -> Iterator[str]:
    """The edge on a real uvicorn on a free loopback port; yields its base URL."""
    app = build_app(service, text or tiny_text_model(), EdgeSettings(model=MODEL, **settings))
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    sock = config.bind_socket()
    sock.listen()  # connections made before the loop runs wait in the backlog
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(timeout=20)
        sock.close()
        assert not thread.is_alive(), "the server did not stop"
