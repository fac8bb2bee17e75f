"""What one step computes: the tokens of several sequences, flat.

The engine builds one per step, the decoder reads it. No behaviour.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    """N tokens of S sequences; each sequence's rows are contiguous and in order.

    ids, positions, slots [N] int64 (slots: where each token's keys and values are written, page *
    page_tokens + offset); query_starts: S + 1 row offsets; context_tokens: per sequence, its
    tokens after this step (positions 0..c-1 are attended causally); page_tables [S, max_pages]
    int64, padded with 0; logit_rows [R] int64, the rows whose logits are wanted.
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    query_starts: tuple[int, ...]
    context_tokens: tuple[int, ...]
    page_tables: Tensor
    logit_rows: Tensor
