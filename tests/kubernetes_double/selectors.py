"""Label and field selectors."""

import re
from collections.abc import Mapping
from typing import Any

_SET = re.compile(r"^(\S+)\s+(in|notin)\s+\(([^)]*)\)$")
_COMMA = re.compile(r",(?![^()]*\))")


def labels_match(selector: str | None, labels: Mapping[str, str]) -> bool:
    """Whether labels fit `a=b,c!=d,e in (f,g),h,!i`."""
    terms = (term.strip() for term in _COMMA.split(selector or ""))
    return all(_label(term, labels) for term in terms if term)


def _label(term: str, labels: Mapping[str, str]) -> bool:
    found = _SET.match(term)
    if found:
        listed = labels.get(found[1]) in [value.strip() for value in found[3].split(",")]
        return listed == (found[2] == "in")
    if "=" in term:
        key, value = re.split(r"!=|==?", term, maxsplit=1)
        return (labels.get(key.strip()) == value.strip()) != ("!=" in term)
    return term[1:] not in labels if term.startswith("!") else term in labels


def selector_matches(selector: Mapping[str, Any] | None, labels: Mapping[str, str]) -> bool:
    """Whether labels fit a LabelSelector object; an empty one fits all, none fits nothing."""
    if selector is None:
        return False
    if any(labels.get(k) != v for k, v in (selector.get("matchLabels") or {}).items()):
        return False
    return all(_expression(e, labels) for e in selector.get("matchExpressions") or ())


def _expression(expression: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    key, operator = expression["key"], expression["operator"]
    listed = labels.get(key) in (expression.get("values") or ())
    results = {
        "In": listed,
        "NotIn": not listed,
        "Exists": key in labels,
        "DoesNotExist": key not in labels,
    }
    return results[operator]


def fields_match(selector: str | None, body: Mapping[str, Any]) -> bool:
    """Whether an object fits `metadata.name=x,spec.nodeName!=y`."""
    for term in filter(None, (selector or "").split(",")):
        path, wanted = re.split(r"!=|==?", term, maxsplit=1)
        place: Any = body
        for key in path.strip().split("."):
            place = place.get(key) if isinstance(place, Mapping) else None
        text = (
            "" if place is None else str(place).lower() if isinstance(place, bool) else str(place)
        )
        if (text == wanted) == ("!=" in term):
            return False
    return True
