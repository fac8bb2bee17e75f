"""The size of a model: what its weights, keys and values and activations take. Pure numbers; read
from a workload file, used by memory checks and by the roofline."""

from dataclasses import dataclass

BITS = 8  # of a byte
ACTIVATION_BYTES = 2  # 16-bit activations, whatever the weights are stored in
LOGIT_BYTES = 4


@dataclass(frozen=True)
class ModelSize:
    """A decoder of `layers` alike layers. feed_forward: inner width; feed_forward_matrices: 3 for a
    gated one (Llama), 2 for a plain one (OPT). kv_bits: of a stored key or value."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocab: int
    feed_forward_matrices: int = 3
    tied_head: bool = False
    kv_bits: int = 16

    def __post_init__(self) -> None:
        counts = ("layers", "hidden", "heads", "kv_heads", "head_dim", "feed_forward", "vocab")
        for name in (*counts, "feed_forward_matrices", "kv_bits"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"model.{name} = {getattr(self, name)} is not accepted; it is >= 1"
                )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"model.heads = {self.heads} has to be a multiple of kv_heads = {self.kv_heads}"
            )

    @property
    def layer_parameters(self) -> int:
        """Of the matrices of one layer; norms and biases are left out (below 0.1 %)."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden * (2 * queries + 2 * keys)
        return attention + self.feed_forward_matrices * self.hidden * self.feed_forward

    @property
    def embedding_parameters(self) -> int:
        """Of the embedding, and of the head alike."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        tables = 1 if self.tied_head else 2
        return self.layers * self.layer_parameters + tables * self.embedding_parameters

    def layer_weight_bytes(self, bits: int = 16) -> float:
        return self.layer_parameters * bits / BITS

    def weight_bytes(self, bits: int = 16) -> float:
        """Of all layers in `bits`, and of embedding and head, which stay in 16 bits at least."""
        tables = self.parameters - self.layers * self.layer_parameters
        return self.layers * self.layer_weight_bytes(bits) + tables * max(bits, 16) / BITS

    @property
    def kv_layer_bytes_per_token(self) -> float:
        return 2 * self.kv_heads * self.head_dim * self.kv_bits / BITS

    @property
    def kv_bytes_per_token(self) -> float:
        return self.layers * self.kv_layer_bytes_per_token

    def activation_bytes(self, tokens: int, sequences: int = 1) -> float:
        """Alive at once in a step of so many tokens, one layer after the other: the residual
        stream, a layer's own activations, and the logits of the sequences that are sampled."""
        width = 4 * self.hidden + 2 * self.feed_forward
        return tokens * width * ACTIVATION_BYTES + sequences * self.vocab * LOGIT_BYTES
