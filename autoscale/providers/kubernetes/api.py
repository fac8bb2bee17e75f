"""The API server, as far as the provider asks it: plain objects over the official client's
connection (its credentials, TLS and retries), and errors by what they mean.

Calls block; the provider makes them in threads.
"""

import contextlib
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from autoscale.providers.kubernetes.rights import RIGHTS, Right
from cluster.settings.kubernetes import KubernetesSettings

Body = dict[str, Any]
MANAGER = "sanderling-autoscale"
OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
CONNECT_S, ANSWER_S = 3.0, 8.0
MERGE, OPERATIONS = "application/merge-patch+json", "application/json-patch+json"


class ApiFailed(Exception):
    """The server said no, or nothing. code: HTTP's, 0 where the connection failed."""

    def __init__(self, code: int, message: str, retry_s: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.retry_s = retry_s

    @property
    def transient(self) -> bool:
        """Whether the same may work in a moment. Everything that is asked of this API may be asked
        twice: writes name the version they were made from, or change nothing the second time."""
        return self.code in (0, 410, 429) or self.code >= 500


class Conflict(ApiFailed):
    """Somebody else was faster: read again. Nothing was done."""


class Missing(ApiFailed):
    """There is no such object."""


class Expired(ApiFailed):
    """A watch's version is too old: list again."""


KINDS: Mapping[int, type[ApiFailed]] = {404: Missing, 409: Conflict, 410: Expired}


class Api:
    """One namespace of one cluster. client: kubernetes.client.ApiClient."""

    def __init__(self, client: Any, namespace: str) -> None:
        self.client, self.namespace = client, namespace

    def get(self, resource: str, name: str) -> Body:
        """One object."""
        return self._json("GET", f"{self._path(resource)}/{name}")

    def list(self, resource: str, **query: str) -> Body:
        """All objects of a kind: items, and the version they are of."""
        return self._json("GET", self._path(resource), query)

    def create(self, resource: str, body: Body) -> Body:
        """Conflict where there is one."""
        return self._json("POST", self._path(resource), {"fieldManager": MANAGER}, body)

    def replace(self, resource: str, body: Body) -> Body:
        """Conflict where the object is not the one that was read."""
        path = f"{self._path(resource)}/{body['metadata']['name']}"
        return self._json("PUT", path, {"fieldManager": MANAGER}, body)

    def patch(self, resource: str, name: str, body: Body | Sequence[Body]) -> Body:
        """A merge patch, or the operations of a JSON patch; Conflict as for `replace` where it
        sets metadata.resourceVersion."""
        path = f"{self._path(resource)}/{name}"
        kind = MERGE if isinstance(body, dict) else OPERATIONS
        return self._json("PATCH", path, {"fieldManager": MANAGER}, body, kind)

    def evict(self, pod: str) -> None:
        """Ask for a pod's end. ApiFailed 429 where a disruption budget forbids it now; a pod that
        is gone is no error."""
        path = f"{self._path('pods')}/{pod}/eviction"
        metadata = {"name": pod, "namespace": self.namespace}
        body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata}
        with contextlib.suppress(Missing):
            self._json("POST", path, {}, body)

    def watch(self, resource: str, since: str, lasts_s: int, **query: str) -> Iterator[Body]:
        """Events since a version, for so long at most. Expired where that is too long ago."""
        query = {
            **query,
            "watch": "true",
            "resourceVersion": since,
            "timeoutSeconds": str(lasts_s),
            "allowWatchBookmarks": "true",
        }
        answer = self._call("GET", self._path(resource), query, None, "", lasts_s + ANSWER_S)
        try:
            for line in _lines(answer):
                event = json.loads(line)
                if event["type"] == "ERROR":
                    status = event["object"]
                    kind = KINDS.get(int(status.get("code") or 0), ApiFailed)
                    raise kind(int(status.get("code") or 0), str(status.get("message")))
                yield event
        except (OSError, ValueError) as error:
            raise ApiFailed(0, f"the watch of {resource} broke off: {error}") from None
        finally:
            answer.close()

    def _path(self, resource: str) -> str:
        right: Right = RIGHTS[resource]
        where = f"/namespaces/{self.namespace}" if right.namespaced else ""
        return f"{right.path}{where}/{resource}"

    def _json(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Body | Sequence[Body] | None = None,
        kind: str = "application/json",
    ) -> Body:
        answer = self._call(method, path, dict(query or {}), body, kind, ANSWER_S)
        try:
            content = json.loads(answer.data)
        except (OSError, ValueError) as error:
            raise ApiFailed(0, f"{method} {path}: the answer broke off: {error}") from None
        assert isinstance(content, dict)
        return content

    def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Body | Sequence[Body] | None,
        kind: str,
        answer_s: float,
    ) -> Any:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        headers = {"Accept": "application/json", "User-Agent": f"{MANAGER}/1"}
        if body is not None:
            headers["Content-Type"] = kind
        try:
            return self.client.call_api(
                path,
                method,
                query_params=list(query.items()),
                header_params=headers,
                body=body,
                auth_settings=["BearerToken"],
                _preload_content=False,
                _return_http_data_only=True,
                _request_timeout=(CONNECT_S, answer_s),
            )
        except ApiException as error:
            code = int(error.status or 0)
            retry = (error.headers or {}).get("Retry-After")
            kind_of = KINDS.get(code, ApiFailed)
            said = _said(error.body) or str(error.reason)
            raise kind_of(
                code, f"{method} {path}: {said}", float(retry) if retry else None
            ) from None
        except (HTTPError, OSError) as error:
            raise ApiFailed(0, f"{method} {path}: {error}") from None


def connect(settings: KubernetesSettings) -> Api:
    """ValueError, with what would be accepted, where there is no way to an API server."""
    try:
        from kubernetes import client, config
    except ImportError:
        raise ValueError(
            "autoscale.provider = 'kubernetes' needs the package kubernetes: "
            "pip install 'sanderling[kubernetes]'"
        ) from None
    made = client.Configuration()
    try:
        if settings.kubeconfig:
            config.load_kube_config(settings.kubeconfig, client_configuration=made)
        else:
            config.load_incluster_config(made)
    except (config.ConfigException, OSError) as error:
        raise ValueError(
            f"autoscale.kubernetes.kubeconfig = {settings.kubeconfig!r} leads to no API server "
            f"({error}); a kubeconfig file is accepted, or nothing inside a pod with an account"
        ) from None
    made.retries = False  # whoever calls knows what may be asked again
    return Api(client.ApiClient(made), settings.namespace or own_namespace())


def own_namespace() -> str:
    """The pod's, or `default` outside one."""
    if OWN_NAMESPACE.is_file():
        return OWN_NAMESPACE.read_text(encoding="utf-8").strip()
    return "default"


def own_name() -> str:
    """The pod's name (POD_NAME by the downward API), or the machine's."""
    return os.environ.get("POD_NAME") or socket.gethostname()


def _said(body: Any) -> str:
    try:
        return str(json.loads(body)["message"])
    except (TypeError, ValueError, KeyError):
        return ""


def _lines(answer: Any) -> Iterator[bytes]:
    """Whole lines of a chunked answer. OSError where it ends before its last chunk."""
    from urllib3.exceptions import HTTPError

    rest = b""
    try:
        for chunk in answer.stream(amt=None, decode_content=False):
            *lines, rest = (rest + chunk).split(b"\n")
            yield from filter(None, lines)
    except HTTPError as error:
        raise OSError(str(error)) from None
