"""Counter-based randomness: a draw is a pure function of (seed, position, stream).

Nothing has to move with a sequence when it goes on elsewhere, and a token never depends on what
else was in the batch. Called by the sampler; later by speculative verification (other streams).
"""

import hashlib
import struct

_SCALE = 2.0**-53


def derived_seed(seed: int, index: int) -> int:
    """The seed of choice `index` of a request: the request's own for the first, 63 bits that
    depend on both for the others."""
    if index == 0:
        return seed
    message = struct.pack("<QQ", seed & 0xFFFF_FFFF_FFFF_FFFF, index)
    digest = hashlib.blake2b(message, digest_size=8, person=b"sanderling-n").digest()
    return int.from_bytes(digest, "little") >> 1


def uniform(seed: int, position: int, stream: int = 0) -> float:
    """A number in [0, 1) with 53 random bits for the token at `position` of a sequence.

    `stream` separates independent draws at one position. `seed` may be any 64-bit integer, signed
    or not. BLAKE2b is used as the keyed counter function: it is in the standard library, equal on
    every machine, and costs about a microsecond.
    """
    message = struct.pack("<QQQ", seed & 0xFFFF_FFFF_FFFF_FFFF, position, stream)
    digest = hashlib.blake2b(message, digest_size=8, person=b"sanderling").digest()
    return float((int.from_bytes(digest, "little") >> 11) * _SCALE)
