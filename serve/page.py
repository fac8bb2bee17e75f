"""The page at /: one HTML file, sent with a policy that lets it run only what it holds itself.

The policy names the hashes of its script and style, so nothing that a model writes could run, and
lets it talk only to the server it came from. Called by http.py when it makes its routes.
"""

import base64
import hashlib
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

FILE = Path(__file__).with_name("page.html")


def policy(html: str) -> str:
    """The Content-Security-Policy of a page with one script and one style element."""
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    (style,) = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    return (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


def page_route() -> Callable[[Request], Awaitable[Response]]:
    """The handler; the file is read once."""
    html = FILE.read_text(encoding="utf-8")
    headers = {
        "content-security-policy": policy(html),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }

    async def page(http: Request) -> Response:
        return Response(html, 200, headers, "text/html; charset=utf-8")

    return page


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
