"""The embedding of a text: the final state of its last token, which has attended to all of it.

Last-token pooling is what decoders without a head of their own for it are pooled by (vLLM's default
for them). Called by Engine.step for sequences that ask for it.
"""

import torch.nn.functional as F
from torch import Tensor


def unit(state: Tensor) -> tuple[float, ...]:
    """state [hidden] scaled to Euclidean length 1, in float32."""
    scaled: list[float] = F.normalize(state.float(), dim=0).tolist()
    return tuple(scaled)
