"""The form that an answer must have, as it is part of a request.

A frozen value that crosses between replicas with its request. formats.py makes it of what a client
sent, compiler.py gives it meaning; engine/sequence.py carries it.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["json_object", "json_schema", "regex", "ebnf"]


@dataclass(frozen=True)
class Grammar:
    """source: a JSON schema as JSON text, a regular expression, or a grammar in Lark's or GBNF's
    notation; empty for json_object, which is any JSON object."""

    kind: Kind
    source: str = ""
