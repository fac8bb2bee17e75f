"""`python -m tests.live.actors DATA_DIR`: the living named actors of a running service, as JSON.

A process of its own, since a visit to a cluster changes Ray's environment for good. Reads Ray's
actor table, because names and process ids are nowhere else together.
"""

import json
import sys
from pathlib import Path


def main(data_dir: Path) -> None:
    """Print {actor name: process id}; actors that are starting or restarting are left out."""
    import ray
    from ray._private import state

    from cluster.raylocal.session import NAMESPACE, attach

    attach(data_dir)
    ours = {
        name["name"]
        for name in ray.util.list_named_actors(all_namespaces=True)
        if name["namespace"] == NAMESPACE
    }
    table = state.actors().values()
    alive = {a["Name"]: a["Pid"] for a in table if a["State"] == "ALIVE" and a["Name"] in ours}
    ray.shutdown()
    print(json.dumps(alive))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
