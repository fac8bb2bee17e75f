"""Perplexity of a text under a model as it is served: through the engine, its pages and kernels.

The text is cut into windows that know nothing of each other; in each, every token but the first is
scored. What a lossy setting costs is the ratio of two perplexities and how often both models think
the same token likeliest. Called by `sanderling eval ppl`.

The integer-only decoder has no engine: it scores whole windows, on the same scale.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.settings import Settings
from serve import build
from serve.engine.engine import Engine
from serve.engine.sequence import Limits, Request, Sampling, Sequence, TokenLogprob
from serve.kv.prefix import CacheKey

if TYPE_CHECKING:
    from models.integer import IntegerDecoder

Windows = list[tuple[int, ...]]

# Of the text that a decoder's integers are fitted to.
FITTED_WINDOWS, FITTED_WINDOW_TOKENS = 2, 512


@dataclass(frozen=True)
class Scored:
    """Every scored token of a text: its log-probability, and the likeliest in its place."""

    logprobs: tuple[float, ...]
    likeliest: tuple[int, ...]

    @property
    def perplexity(self) -> float:
        """e to the mean of -ln p."""
        return math.exp(-math.fsum(self.logprobs) / len(self.logprobs))


@dataclass(frozen=True)
class Loss:
    """What one setting costs against another, over the same tokens."""

    ratio: float  # of perplexities; 1 costs nothing
    agreement: float  # share of places with the same likeliest token


def windows(ids: list[int], count: int, window_tokens: int) -> Windows:
    """The first `count` windows of a text. ValueError when it is too short for them."""
    assert count > 0 and window_tokens > 1
    if len(ids) < count * window_tokens:
        raise ValueError(
            f"the text has {len(ids)} tokens; {count} windows of {window_tokens} need "
            f"{count * window_tokens} (--windows, --window-tokens)"
        )
    starts = range(0, count * window_tokens, window_tokens)
    return [tuple(ids[start : start + window_tokens]) for start in starts]


def score(settings: Settings, model: build.Model, texts: Windows) -> Scored:
    """Scores windows on an engine of these settings. ValueError when one does not fit its pages."""
    engine, storage = build.engine(settings, model, None)
    try:
        entries = [entry for text in texts for entry in _window(engine, text)]
    finally:
        storage.close()
    return Scored(
        tuple(entry.logprob for entry in entries), tuple(entry.top[0][0] for entry in entries)
    )


def integer_decoder(model: build.Model, text: str) -> "IntegerDecoder":
    """The model's float32 decoder in integers, their ranges taken from the end of a text."""
    from models.decoder import Decoder
    from models.integer_build import build as in_integers
    from models.integer_build import observe

    assert isinstance(model.decoder, Decoder), "made of the float32 reference"
    tokens = min(FITTED_WINDOW_TOKENS, model.decoder.config.context_tokens)
    ids = model.text.tokenizer.encode(text)[-FITTED_WINDOWS * tokens :]
    seen = observe(model.decoder, windows(ids, FITTED_WINDOWS, tokens))
    return in_integers(model.decoder, seen)


def score_integer(decoder: "IntegerDecoder", texts: Windows) -> Scored:
    """Scores windows by integer logits, which become floats here. ValueError for one beyond the
    model's context."""
    import torch

    logprobs, likeliest = [], []
    for text in texts:
        ids = torch.tensor([text])
        logits = decoder(ids)[0][0, :-1]
        real = torch.log_softmax(logits.double() * 2.0**-decoder.logit_point, -1)
        logprobs += real.gather(1, ids[0, 1:, None]).flatten().tolist()
        likeliest += logits.argmax(-1).tolist()
    return Scored(tuple(logprobs), tuple(likeliest))


def loss(of: Scored, against: Scored) -> Loss:
    """Both over the same windows."""
    same = [a == b for a, b in zip(of.likeliest, against.likeliest, strict=True)]
    return Loss(of.perplexity / against.perplexity, sum(same) / len(same))


def _window(engine: Engine, text: tuple[int, ...]) -> tuple[TokenLogprob, ...]:
    request = Request(
        request_id="window",
        prompt=text,
        sampling=Sampling(temperature=0.0),
        limits=Limits(1),
        cache_key=CacheKey("", "", ""),
        score=1,
    )
    engine.add(Sequence(request))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    [output] = outputs
    return output.delta.scores
