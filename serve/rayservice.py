"""The service as a RayService of KubeRay deploys it: `import_path: serve.rayservice:application`.

    applications:
      - import_path: serve.rayservice:application
        args: {config: /etc/sanderling/settings/sanderling.toml, front: 2}

There is no host process: whoever builds the application starts the controller, an actor that
outlives its starter, and Ray Serve keeps the ingress. An ingress counts as up when a token can be
made, and KubeRay moves traffic to a new cluster when its ingress is up: so there is no gap.
"""

import asyncio
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cluster.raylocal.actors import find
from cluster.settings import Settings, resolve
from serve.app import IngressDeployment
from serve.app import application as service
from serve.host import new_run_id, start_controller

FRONT_LABELS = {"sanderling/role": "front"}
LOOK_S = 1.0


class Arguments(BaseModel):
    """What serveConfigV2 hands over. config: the settings file, where each pod has it. front: how
    many ingresses, one on each node with the front's labels. machines_key_file: holds
    http.machines_key in plain; empty: none."""

    model_config = ConfigDict(extra="forbid")

    config: str = Field("/etc/sanderling/settings/sanderling.toml", min_length=1)
    front: int = Field(1, ge=1, le=64)
    machines_key_file: str = ""
    labels: dict[str, str] = Field(default_factory=lambda: dict(FRONT_LABELS))


class ReadyIngress(IngressDeployment):
    """An ingress that is not there before somebody computes behind it."""

    # Ray Serve awaits it.
    async def __init__(self, settings_json: str, keys_json: str) -> None:  # type: ignore[misc]
        super().__init__(settings_json, keys_json)
        while not await self.ingress.probe():
            await asyncio.sleep(LOOK_S)


def application(args: Arguments) -> Any:
    """The bound application; the controller is started unless one lives, as after a redeployment.

    ValueError when the settings are not accepted, or start a Ray of their own.
    """
    arguments = Arguments.model_validate(args.model_dump() if isinstance(args, BaseModel) else args)
    flags = {"http.machines_key": machines_key(arguments.machines_key_file)}
    settings = resolve(Path(arguments.config), flags=flags).settings
    refuse_own_ray(settings)
    ensure_controller(settings)
    options = {"num_cpus": 0, "label_selector": arguments.labels}
    return service(settings, ReadyIngress, replicas=arguments.front, options=options)


def machines_key(file: str) -> str | None:
    """The key in a file of its own, since a Secret is no part of a settings file."""
    if not file:
        return None
    key = Path(file).read_text(encoding="utf-8").strip()
    if not key:
        raise ValueError(f"{file} is empty; a random text is accepted as http.machines_key")
    return key


def refuse_own_ray(settings: Settings) -> None:
    """ValueError where the settings are those of one machine."""
    if settings.ray.address == "local":
        raise ValueError(
            "ray.address = 'local' starts a Ray of its own, and a RayService runs in one that is "
            "there; 'auto' is accepted"
        )


def ensure_controller(settings: Settings) -> None:
    """Start the controller actor if none lives. Of two who try, one is told so and is content."""
    from serve.actors import CONTROLLER

    if find(CONTROLLER) is None:
        try:
            start_controller(settings, new_run_id())
        except ValueError:
            if find(CONTROLLER) is None:
                raise
