"""The one error that crosses the HTTP edge, in OpenAI's shape, and the wording of refusals.

`RequestError` is raised by validation, admission and the service; http.py turns it into a response
or, once bytes have gone out, into an SSE event. It pickles, so it may come from another process.
"""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

ErrorType = Literal["invalid_request_error", "rate_limit_error", "server_error"]


class RequestError(Exception):
    """A refusal or failure of one request.

    status: HTTP status. type, param, message, code: the fields of OpenAI's error object; `message`
    is a full sentence. retry_after_s: sent as Retry-After, rounded up to whole seconds.
    """

    def __init__(
        self,
        status: int,
        type: ErrorType,
        param: str | None,
        message: str,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        assert 400 <= status <= 599, f"{status} is not an error status"
        super().__init__(status, type, param, message, code, retry_after_s)  # what pickle restores
        self.status = status
        self.type = type
        self.param = param
        self.message = message
        self.code = code
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, dict[str, str | None]]:
        """{"error": {message, type, param, code}}."""
        fields = {"message": self.message, "type": self.type, "param": self.param}
        return {"error": {**fields, "code": self.code}}


def refuse(message: str, param: str | None, code: str | None = None) -> RequestError:
    """A 400: the request itself has to change."""
    return RequestError(400, "invalid_request_error", param, message, code)


def unsupported(text: str, suffix: str = "") -> PydanticCustomError:
    """For validators: well-formed, but not done here. suffix: path within the field."""
    return PydanticCustomError("unsupported_value", "{text}", {"text": text, "suffix": suffix})


def mistyped(text: str, suffix: str = "") -> PydanticCustomError:
    """For validators: not of the form that is accepted."""
    return PydanticCustomError("wrong_type", "{text}", {"text": text, "suffix": suffix})


def explain(error: ValidationError, body: Any, known: Mapping[str, Sequence[str]]) -> RequestError:
    """The first error of a validation as a 400 that names the field and what would be accepted.

    body: the parsed JSON, to tell fields from the names of union members in the error's location.
    known: field names of the object under each key ("" is the body itself), for the nearest name.
    """
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return refuse(f"The body is not valid JSON: {first['ctx']['error']}.", None, "invalid_json")
    path = _fields(first["loc"], body)
    param = (_dotted(path) + first.get("ctx", {}).get("suffix", "")).removeprefix(".")
    match first["type"]:
        case "missing":
            return refuse(f"Missing required parameter: '{param}'.", param, "missing_parameter")
        case "extra_forbidden":
            near = _nearest(path, known)
            text = f"Unknown parameter: '{param}'. The nearest known one is '{near}'."
            return refuse(text, param, "unknown_parameter")
        case "unsupported_value":
            return refuse(f"'{param}': {first['msg']}", param, "unsupported_value")
    if not param:
        return refuse("The body should be a JSON object.", None, "invalid_type")
    code = "invalid_type" if first["type"].endswith("type") else "invalid_value"
    return refuse(f"Invalid value for '{param}': {_sentence(first['msg'])}", param, code)


def _fields(location: tuple[int | str, ...], body: Any) -> list[int | str]:
    """The location without pydantic's names of union members, which are not in the body."""
    path: list[int | str] = []
    here = body
    for place, step in enumerate(location):
        inside = isinstance(here, list) and isinstance(step, int)
        inside = inside or (isinstance(here, dict) and step in here)
        if inside:
            here = here[step]
        if inside or place == len(location) - 1:
            path.append(step)
    return path


def _dotted(path: list[int | str]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)


def _nearest(path: list[int | str], known: Mapping[str, Sequence[str]]) -> str:
    owner = next((step for step in reversed(path[:-1]) if isinstance(step, str)), "")
    return get_close_matches(str(path[-1]), known[owner], n=1, cutoff=0.0)[0]


def _sentence(message: str) -> str:
    text = message.removeprefix("Value error, ").removeprefix("Input ")
    return text if text.endswith(".") else f"{text}."
