"""The other process of the hand-off measurement: owns KV storage and lends pages on request.

Reads lines: a number of tokens asks for an offer of so many, -1 acknowledges it, 0 ends.
"""

import json
import sys
from dataclasses import asdict

from serve.kv.pool import PagePool
from serve.kv.storage import KVShape, KVStorage
from serve.transport import Offer, open_transport


def read_offer(line: bytes) -> Offer:
    """An offer as `main` writes it."""
    body = json.loads(line)
    body["pages"], body["generations"] = tuple(body["pages"]), tuple(body["generations"])
    return Offer(**body)


def main(name: str, shape: KVShape) -> None:
    storage = KVStorage(shape, "float32", name)
    storage.tensor.normal_()
    pool = PagePool(shape.pages, shape.page_tokens, storage)
    transport = open_transport("shared_memory")
    lent: list[int] = []
    for line in sys.stdin:
        tokens = int(line)
        if tokens == 0:
            break
        if tokens < 0:
            pool.release(lent)
            print("freed", flush=True)
            continue
        lent = pool.allocate(-(-tokens // shape.page_tokens)) or []
        print(json.dumps(asdict(transport.offer("lease", storage, lent, 0, tokens))), flush=True)
    storage.close()


if __name__ == "__main__":
    main(sys.argv[1], KVShape(*map(int, sys.argv[2:])))
