"""One TOML file -> frozen settings, resolved once per process.

`resolve()` merges defaults < file < environment < flags and remembers where each value came from;
`Settings()` is the defaults. Nothing here imports torch or Ray.
"""

from cluster.settings.errors import SettingsError
from cluster.settings.resolve import Resolved, resolve
from cluster.settings.sections import (
    ControllerSettings,
    DecodeSettings,
    EngineSettings,
    HandoffSettings,
    HttpSettings,
    RaySettings,
    RoleSettings,
    Settings,
)

__all__ = [
    "ControllerSettings",
    "DecodeSettings",
    "EngineSettings",
    "HandoffSettings",
    "HttpSettings",
    "RaySettings",
    "Resolved",
    "RoleSettings",
    "Settings",
    "SettingsError",
    "resolve",
]
