"""`python -m tests.live.drain DATA_DIR`: drains a replica of a running service at a given moment.

Prints "here" once it has reached the controller, reads a line "REPLICA DEADLINE_S" and prints
"gone" when the replica is. A process of its own, since a visit to a cluster changes Ray's
environment for good; and one that is there before the moment, since the visit takes seconds.
"""

import sys
from pathlib import Path


def main(data_dir: Path) -> None:
    """Visit, wait for the word, drain."""
    import ray

    from cluster.raylocal.actors import find
    from cluster.raylocal.session import attach
    from serve.actors import CONTROLLER

    attach(data_dir)
    controller = find(CONTROLLER)
    assert controller is not None, "the session has no controller"
    print("here", flush=True)
    replica_id, deadline_s = sys.stdin.readline().split()
    ray.get(controller.drain.remote(replica_id, float(deadline_s)))
    print("gone", flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
