"""API keys: who may ask, and as whom. Only hashes are kept, in files and in memory.

A key is 32 random characters, so a plain SHA-256 cannot be searched. Every key is compared in
constant time with all that are known. The tenant it belongs to becomes the salt of the prefix
cache, which a request cannot choose. Called by the edge; `sanderling key` makes keys.
"""

import hashlib
import hmac
import secrets
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from cluster.settings.sections import HttpSettings
from serve.admit import Caller
from serve.errors import RequestError

KEY_PREFIX = "sk-sanderling-"
KEY_BYTES = 24
ONLY_TENANT = "default"  # of the key that is given by http.api_key


class KeyEntry(BaseModel):
    """One key of a file: the tenant it speaks for, its hash, how urgent and how large a share."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    tenant: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    share: Annotated[float, Field(gt=0, le=1000)] = 1.0


class KeyRing:
    """The keys of one service. Empty: nobody is asked for one."""

    def __init__(self, entries: Sequence[KeyEntry] = ()) -> None:
        self.entries = tuple(entries)

    def caller(self, authorization: str | None) -> Caller:
        """Who asks, by the Authorization header; RequestError 401 when no key matches."""
        if not self.entries:
            return Caller()
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise _unauthorized("No API key was sent; send 'Authorization: Bearer <key>'.")
        given, found = digest(key.strip()), None
        for entry in self.entries:  # all of them, so that the time does not tell which matched
            if hmac.compare_digest(entry.sha256, given):
                found = entry
        if found is None:
            raise _unauthorized("The API key is not known to this server.")
        return Caller(f"tenant:{found.tenant}", found.priority, found.share)

    def to_json(self) -> str:
        """The hashed entries, for another process."""
        return _ENTRIES.dump_json(list(self.entries)).decode()

    @classmethod
    def from_json(cls, text: str) -> "KeyRing":
        return cls(_ENTRIES.validate_json(text))


_ENTRIES = TypeAdapter(list[KeyEntry])


def digest(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def new_key() -> str:
    """A key nobody has."""
    return KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)


def load_keys(http: HttpSettings) -> KeyRing:
    """The keys that the settings name; ValueError with the file and what is wrong in it."""
    entries = []
    if http.api_key:
        hashed = http.api_key.removeprefix("sha256:")
        entries.append(KeyEntry(tenant=ONLY_TENANT, sha256=hashed))
    if http.api_keys_file:
        entries += _read(Path(http.api_keys_file))
    return KeyRing(entries)


def _read(path: Path) -> list[KeyEntry]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"http.api_keys_file = {str(path)!r} cannot be read: {error}") from error
    unknown = set(table) - {"key"}
    rows = table.get("key")
    if unknown or not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: [[key]] tables, at least one, and nothing else are accepted")
    try:
        return _ENTRIES.validate_python(rows)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(step) for step in first["loc"][1:])
        raise ValueError(
            f"{path}: [[key]] number {int(first['loc'][0]) + 1}, {place}: {first['msg']}"
        ) from error


def _unauthorized(text: str) -> RequestError:
    return RequestError(401, "invalid_request_error", None, text, "invalid_api_key")
