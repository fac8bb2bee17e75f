"""Layer D, offsets: addresses that are computed with a product of 32 bits, which may overflow.

Works on TTIR, the first form that Triton gives a kernel, as text. Numbers that come from
arguments, program ids, loops or memory may be large; a product of two of them, or of one with a
constant above a tile's size, that is taken in 32 bits and reaches an address is reported. It is
too late to widen it afterwards. Called by `compiled.py` with every kernel it compiles.
"""

import re
from typing import NamedTuple

LARGEST_TILE = 4096  # a constant up to this times a number of tiles stays within the tensor's size
_NAME = r"%[\w$.-]+(?:#\d+)?"
_DEFINED = re.compile(rf"^\s*({_NAME})(?::\d+)? = (\S+) ?(.*)$")
_CARRIED = re.compile(rf"({_NAME}) = ({_NAME})")
# What hands a number on, perhaps in another shape or width, or next to a smaller one.
_PASSING = {
    "arith.addi", "arith.subi", "arith.extsi", "arith.extui", "arith.select", "arith.maxsi",
    "arith.minsi", "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans",
    "ttg.convert_layout", "tt.unsplat", "arith.divsi", "arith.trunci", "arith.fptosi",
}  # fmt: skip
_LARGE = {"tt.get_program_id", "tt.get_num_programs", "tt.load"}


class _Value(NamedTuple):
    """large: may be any number. overflown: where a product of 32 bits went into it, or "".
    constant: its value if it is known."""

    large: bool = False
    overflown: str = ""
    constant: int | None = None

    def __or__(self, other: "_Value") -> "_Value":
        return _Value(self.large or other.large, self.overflown or other.overflown)


def narrow_offsets(ttir: str) -> tuple[str, ...]:
    """Where addresses are computed so, as "file.py:line"; nothing when all is well."""
    lines = ttir.splitlines()
    places = _places(lines)
    values: dict[str, _Value] = {}
    while True:
        before = dict(values)
        found = _pass(lines, values, places)
        if values == before:
            return tuple(dict.fromkeys(found))


def _pass(lines: list[str], values: dict[str, _Value], places: dict[str, str]) -> list[str]:
    """One reading from top to bottom; numbers that loops carry need several."""
    found: list[str] = []
    open_results: list[tuple[str, list[str]]] = []  # of scf.for, scf.if: result, carried names
    for line in lines:
        text, _, place = line.partition(" loc(")
        if "tt.func" in line:
            for name in re.findall(rf"({_NAME}): (?:i32|i64)\b", line):
                values[name] = _Value(large=True)
            continue
        defined = _DEFINED.match(text)
        if text.lstrip().startswith(("scf.yield", "scf.condition")):
            _yield(text, open_results, values)
        elif text.strip() == "}" and open_results:
            open_results.pop()
        elif "scf.for" in text or "scf.if" in text or "scf.while" in text:
            open_results.append(_enter(text, defined.group(1) if defined else "", values))
        elif text.lstrip().startswith("^bb"):
            for name in re.findall(_NAME, text):
                values[name] = values.get(name, _Value()) | _Value(large=True)
        elif defined:
            name, op, rest = defined.groups()
            where = places.get(place.strip(" )"), "?")
            made = _define(op, rest, values, where)
            if op == "tt.addptr":
                found += [made.overflown] if made.overflown else []
                made = _Value()
            values[name] = made
    return found


def _define(op: str, rest: str, values: dict[str, _Value], where: str) -> _Value:
    operands = [values.get(name, _Value()) for name in re.findall(_NAME, rest.split(" : ")[0])]
    if op == "arith.constant":
        number = re.match(r"(?:dense<)?(-?\d+)\b(?!\.)", rest)
        return _Value(constant=int(number.group(1)) if number else None)
    if op in _LARGE:
        return _Value(large=True)
    if op == "arith.muli":
        return _product(operands, rest, where)
    if op == "arith.remsi" and operands[1].constant is not None:
        return _Value()
    if op == "tt.addptr":
        return operands[1]
    if op == "arith.select":
        operands = operands[1:]
    if op in ("tt.splat", "tt.broadcast", "tt.expand_dims", "arith.extsi") and len(operands) == 1:
        return operands[0]
    if op in _PASSING or op == "arith.remsi":
        made = _Value()
        for each in operands:
            made = made | each
        return made
    return _Value()


def _product(operands: list[_Value], rest: str, where: str) -> _Value:
    left, right = operands
    made = left | right
    is_narrow = bool(re.search(r"(?:^|x)i32>?$", rest.strip().rsplit(" ", 1)[-1]))
    constant = max(abs(each.constant or 0) for each in operands)
    if is_narrow and ((left.large and right.large) or (made.large and constant > LARGEST_TILE)):
        made = made._replace(overflown=made.overflown or where)
    return made


def _enter(text: str, result: str, values: dict[str, _Value]) -> tuple[str, list[str]]:
    """A loop's counter may be large; what it carries starts as what it is given."""
    if counter := re.search(rf"scf\.for ({_NAME}) =", text):
        values[counter.group(1)] = _Value(large=True)
    carried = []
    head = text.partition("iter_args(")[2] or text.partition("scf.while (")[2]
    for name, given in _CARRIED.findall(head):
        values[name] = values.get(name, _Value()) | values.get(given, _Value())
        carried.append(name)
    return result, carried


def _yield(text: str, open_results: list[tuple[str, list[str]]], values: dict[str, _Value]) -> None:
    if not open_results:
        return
    result, carried = open_results[-1]
    names = re.findall(_NAME, text.split(" : ")[0])
    for at, given in enumerate(names[1:] if "scf.condition" in text else names):
        made = values.get(given, _Value())
        targets = [f"{result}#{at}", *([result] if len(names) == 1 else []), *carried[at : at + 1]]
        for name in targets:
            values[name] = values.get(name, _Value()) | made


def _places(lines: list[str]) -> dict[str, str]:
    """ "#loc12" -> "file.py:34", through names and calls to where the innermost code stands."""
    written = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", "\n".join(lines), re.MULTILINE))

    def resolve(text: str, depth: int = 0) -> str:
        if at := re.match(r'"([^"]*)":(\d+):', text):
            return f"{at.group(1).rsplit('/', 1)[-1]}:{at.group(2)}"
        inner = re.search(r"#loc\d*", text)
        return resolve(written.get(inner.group(0), ""), depth + 1) if inner and depth < 20 else "?"

    return {name: resolve(text) for name, text in written.items()}
