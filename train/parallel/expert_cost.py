"""What a mixture of experts costs a worker of a mesh, by count; `mesh_cost` has all else.

A token is sent to `per_token` experts. Which ones is not known before: of a layer's rows each
sharer is taken to get as many as it sends, which a router comes near to that sees all alike.
"""

from dataclasses import dataclass

from models.config import ModelConfig

INDEX_BYTES = 8
"""Of a row's place among others."""


@dataclass(frozen=True)
class Mixture:
    """experts: of each layer; per_token: that a token sees; sharers: workers over whom they lie;
    weights_travel: to the tokens, instead of tokens to the experts."""

    experts: int
    per_token: int
    sharers: int = 1
    weights_travel: bool = False

    @property
    def moves_weights(self) -> bool:
        """Whether a pass puts all experts together."""
        return self.weights_travel and self.sharers > 1


def own_matrices(config: ModelConfig, mixture: Mixture) -> tuple[tuple[int, int], ...]:
    """(rows, width) of gate, up and down of a layer, each over all of a worker's experts."""
    held = mixture.experts // mixture.sharers
    inner, out = (held * config.ff, config.hidden), (held * config.hidden, config.ff)
    return inner, inner, out


def own_elements(config: ModelConfig, mixture: Mixture) -> int:
    """Weights of a worker's experts, of all layers."""
    return config.layers * sum(rows * width for rows, width in own_matrices(config, mixture))


def kept_bytes(config: ModelConfig, mixture: Mixture, tokens: int, narrow: int, wide: int) -> int:
    """That a layer's mixture keeps of so many tokens for its backward pass.

    A row: what came to its expert, gate and up, the opened gate, the product, and what came back,
    with its weight; its expert's number and its places (in the order of experts, among a token's
    choices, among those that came). A token: the router's probabilities, and the sum of those
    chosen. Where weights travel, all experts as they were put together, and one place less. The
    router computes in wide numbers, so what it sees is kept wide (instead of narrow, as counted for
    other layers), and so is it.
    """
    there = mixture.sharers > 1 and not mixture.moves_weights
    row = narrow * (4 * config.ff + 2 * config.hidden + 1)
    row += wide + INDEX_BYTES * (3 + there)
    kept = tokens * (mixture.per_token * row + wide * (mixture.experts + 1))
    if narrow != wide:
        kept += config.hidden * (tokens * (wide - narrow) + mixture.experts * wide)
    if mixture.moves_weights:
        kept += narrow * mixture.experts * 3 * config.ff * config.hidden
    return kept


def sent_bytes(
    config: ModelConfig, mixture: Mixture, tokens: int, passes: int, narrow: int
) -> float:
    """To the other sharers in a step of so many tokens and passes, over all layers: rows there and
    back, forward and backward; or each worker's experts to all, and their gradients home."""
    crosses = (mixture.sharers - 1) / mixture.sharers
    if mixture.moves_weights:
        weights = mixture.experts * 3 * config.ff * config.hidden
        return 2 * crosses * passes * narrow * config.layers * weights
    return 4 * crosses * narrow * config.layers * tokens * mixture.per_token * config.hidden
