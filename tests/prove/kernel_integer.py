"""Proof rows of the integer-only decoder, on the default model: no float in a layer's graph, the
bits of the NumPy model, the errors of its functions, and perplexity on two texts."""

import argparse
import inspect
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F

from cluster.settings import Settings
from kernels.reference import integer
from models.integer import IntegerDecoder, Rotation
from serve import build
from serve.eval_command import help_topics
from serve.perplexity import integer_decoder, loss, score, score_integer, windows
from tests.models import integer_numpy
from tests.models.integer_walk import floats_in, graph_of
from tests.prove import table
from tests.prove.row import Row

WINDOWS, WINDOW_TOKENS = 4, 512
MOST_RATIO = 1.03
FEW = 12  # tokens that a layer is traced and compared with
LAYERS = (0, 14, 29)


def rows() -> Iterator[Row]:
    """Every row of this module, as it is measured; about three minutes."""
    yield from errors()
    # What it is made of, and compared with.
    settings = Settings.model_validate({"engine": {"kernels": "reference"}})
    model = build.load(settings)
    decoder = integer_decoder(model, help_topics())
    encode = model.text.tokenizer.encode
    texts = {"Python's help": help_topics(), "Python's argparse": inspect.getsource(argparse)}
    ids = encode(texts["Python's argparse"])
    yield no_floats(decoder, ids)
    yield same_bits(decoder, ids)
    for name, text in texts.items():
        cut = windows(encode(text), WINDOWS, WINDOW_TOKENS)
        against = score(settings, model, cut)
        lost = loss(score_integer(decoder, cut), against)
        measured = f"x {lost.ratio:.4f} of {against.perplexity:.2f}, {lost.agreement:.1%} likeliest"
        check = f"perplexity, integer only: {name}"
        yield Row(check, f"<= x {MOST_RATIO}", measured, lost.ratio <= MOST_RATIO)


def no_floats(decoder: IntegerDecoder, ids: list[int]) -> Row:
    """From ids to logits with one layer between them, since all are computed alike."""
    short = replace(decoder, layers=decoder.layers[:1])
    graph = graph_of(lambda given: short(given)[0], torch.tensor([ids[:FEW]]))
    found, nodes = floats_in(graph), len(graph.graph.nodes)
    check = "integer only: floats in the graph of embedding, a layer and head"
    return Row(check, "0", f"{len(found)} of {nodes} nodes", not found)


def same_bits(decoder: IntegerDecoder, ids: list[int]) -> Row:
    """Some layers one after the other, on the residual stream that reaches the first."""
    turned = Rotation(*(table[:FEW] for table in decoder.tables))
    cos, sin = (integer_numpy.array(table[:, 0]) for table in turned)
    x, wrong = decoder.embed.rows(torch.tensor([ids[:FEW]])), 0
    for index in LAYERS:
        made, _ = decoder.layers[index](x, turned)
        wanted = integer_numpy.layer(integer_numpy.array(x[0]), decoder.layers[index], cos, sin)
        wrong += int((made[0].long() != torch.tensor(wanted)).sum())
        x = made
    check = f"integer only: values of layers {LAYERS} that differ from the int64 NumPy model"
    return Row(check, "0", f"{wrong} of {len(LAYERS) * x.numel()}", wrong == 0)


def errors() -> Iterator[Row]:
    """Against float64, over every number at point 14 in -32..32."""
    point = integer.EXP_POINT
    x = torch.arange(-32 << point, (32 << point) + 1, dtype=torch.int32)
    real = x.double() / (1 << point)
    below = x[x <= 0]
    made = {
        "i-exp": (integer.exp(below).double() / integer.EXP_ONE, real[x <= 0].exp(), 1.95e-3),
        "i-SiLU": (integer.silu(x, point).double() / (1 << point), F.silu(real), 1e-3),
        "i-GELU": (integer.gelu(x, point).double() / (1 << point), F.gelu(real), 0.0183),
    }
    for name, (ours, wanted, most) in made.items():
        error = float((ours - wanted).abs().max())
        yield Row(f"{name}: largest error", f"<= {most}", f"{error:.3g}", error <= most)


if __name__ == "__main__":
    sys.exit(table.main("kernel_integer", ("kernel_integer",)))
