"""Starts a session and its front in a process of its own, says "ready" and waits to be killed.

Arguments: data folder, http.port, http.proxy.
"""

import os
import sys
import time
from functools import partial

from cluster.raylocal.actors import start_named
from cluster.raylocal.front import front_environment, start_front
from cluster.raylocal.session import RaySession
from cluster.settings import resolve
from tests.cluster_ray.app import ingress


class Replica:
    def ping(self) -> int:
        return os.getpid()


def main(data_dir: str, port: str, proxy: str) -> None:
    import ray

    settings = resolve(
        flags={
            "data_dir": data_dir,
            "http.port": port,
            "http.proxy": proxy,
            "ray.object_store_bytes": str(100 << 20),
        }
    ).settings
    os.environ["EVENTS_FILE"] = os.path.join(data_dir, "events")
    RaySession(settings, cpus=2, environment=partial(front_environment, settings)).start()
    front = start_front(ingress(), settings)
    ray.get(start_named(Replica, "replica").ping.remote())
    print("ready", front.proxy, f"{front.start_s:.2f}", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main(*sys.argv[1:])
