"""One completion, as a client would ask for it: exit status 0 if a text came back."""

import json
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

URL = os.environ["URL"]
DEADLINE_S = float(os.environ.get("DEADLINE_S", "120"))


def call(path: str, body: dict[str, Any] | None = None) -> bytes:
    headers = {"Content-Type": "application/json"}
    if key_file := os.environ.get("KEY_FILE"):
        headers["Authorization"] = f"Bearer {Path(key_file).read_text().strip()}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(URL + path, data=data, headers=headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        content: bytes = answer.read()
        return content


def until_ready() -> None:
    end_s = time.monotonic() + DEADLINE_S
    while True:
        try:
            call("/ready")
            return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > end_s:
                sys.exit(f"{URL}/ready did not say yes within {DEADLINE_S:g} s: {error}")
            time.sleep(1)


def main() -> None:
    until_ready()
    model = json.loads(call("/v1/models"))["data"][0]["id"]
    body = {"model": model, "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    answer = json.loads(call("/v1/completions", body))
    text, tokens = answer["choices"][0]["text"], answer["usage"]["completion_tokens"]
    if not text or not tokens:
        sys.exit(f"{model} answered nothing: {answer}")
    print(f"{model}: {text!r} ({tokens} tokens)")


if __name__ == "__main__":
    main()
