"""A signed request of AWS's API as the double sees it, and errors as the API words them."""

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlencode
from xml.sax.saxutils import escape

Environ = dict[str, Any]
EC2_NAMESPACE = "http://ec2.amazonaws.com/doc/2016-11-15/"


@dataclass(frozen=True)
class Call:
    """service and operation as IAM names them ("ec2", "CreateFleet"). params: of EC2's query
    protocol; of the JSON services their body. key: who signed it."""

    service: str
    operation: str
    key: str
    params: Mapping[str, Any]
    environ: Environ = field(repr=False)

    @property
    def action(self) -> str:
        return f"{self.service}:{self.operation}"

    def listed(self, prefix: str) -> list[str]:
        """Values of PREFIX.1, PREFIX.2, ..."""
        keys = [k for k in self.params if re.fullmatch(rf"{re.escape(prefix)}\.\d+", k)]
        return [self.params[k] for k in sorted(keys, key=lambda k: int(k.rpartition(".")[2]))]

    def structures(self, prefix: str) -> list[dict[str, str]]:
        """Members of PREFIX.1.*, PREFIX.2.*, ..."""
        found: dict[int, dict[str, str]] = {}
        for key, value in self.params.items():
            matched = re.fullmatch(rf"{re.escape(prefix)}\.(\d+)\.(.+)", key)
            if matched:
                found.setdefault(int(matched[1]), {})[matched[2]] = value
        return [found[number] for number in sorted(found)]


def read(environ: Environ) -> Call | None:
    """None for what is not signed (moto's own pages)."""
    signed = re.search(
        r"Credential=([^/]+)/\d+/[^/]*/([^/]+)/", environ.get("HTTP_AUTHORIZATION", "")
    )
    if signed is None:
        return None
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    environ["wsgi.input"] = io.BytesIO(body)
    key, service = signed[1], signed[2]
    target = environ.get("HTTP_X_AMZ_TARGET")
    if target:
        return Call(service, target.rpartition(".")[2], key, json.loads(body or b"{}"), environ)
    params = dict(parse_qsl(body.decode(), keep_blank_values=True))
    return Call(service, params.get("Action", ""), key, params, environ)


def with_params(environ: Environ, params: Mapping[str, Any]) -> Environ:
    """The same request with another body."""
    body = urlencode(params).encode()
    return {**environ, "wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}


@dataclass(frozen=True)
class Reply:
    status: int
    body: bytes
    kind: str = "text/xml"


def error(call: Call, code: str, status: int = 400) -> Reply:
    """As the service words it."""
    if call.service == "ec2":
        words = f"<Error><Code>{code}</Code><Message>{code}, says the double</Message></Error>"
        body = f"<Response><Errors>{words}</Errors><RequestID>r</RequestID></Response>"
        return Reply(status, body.encode())
    answer = {"__type": code, "message": f"{code}, says the double"}
    return Reply(status, json.dumps(answer).encode(), "application/x-amz-json-1.1")


def ec2(operation: str, content: str) -> Reply:
    head = f'<{operation}Response xmlns="{EC2_NAMESPACE}"><requestId>r</requestId>'
    return Reply(200, f"{head}{content}</{operation}Response>".encode())


def element(name: str, content: Any) -> str:
    """One XML element of text."""
    return f"<{name}>{escape(str(content))}</{name}>"
