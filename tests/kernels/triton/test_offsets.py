"""Layer D, offsets: products of 32 bits are seen on their way to an address, and nothing else is.

Broken kernels that are compiled: test_aot.py.
"""

import pytest

from kernels.triton.verify.offsets import narrow_offsets

HEAD = 'tt.func public @k(%x: !tt.ptr<f32> loc("x"(#loc)), %n: i32 loc("n"(#loc)), %s: i32) {\n'
TAIL = '  %p = tt.addptr %x, {at} : !tt.ptr<f32>, {kind} loc(#loc2)\n#loc1 = loc("/a/k.py":7:3)\n'


def lint(body: str, at: str = "%at", kind: str = "i32") -> tuple[str, ...]:
    lines = [f"  {line.strip()} loc(#loc1)" for line in body.strip().splitlines()]
    return narrow_offsets(HEAD + "\n".join(lines) + "\n" + TAIL.format(at=at, kind=kind))


ROW = "%row = tt.get_program_id x : i32\n"
NARROW = {
    "program times stride": ROW + "%at = arith.muli %row, %s : i32",
    "argument times argument": "%at = arith.muli %n, %s : i32",
    "in a tile": """
        %a = tt.make_range {end = 16 : i32, start = 0 : i32} : tensor<16xi32>
        %b = tt.splat %n : i32 -> tensor<16xi32>
        %c = arith.addi %a, %b : tensor<16xi32>
        %d = tt.splat %s : i32 -> tensor<16xi32>
        %at = arith.muli %c, %d : tensor<16xi32>""",
    "widened too late": ROW
    + """%a = arith.muli %row, %s : i32
        %at = arith.extsi %a : i32 to i64""",
    "after additions": ROW
    + """%a = arith.muli %row, %s : i32
        %at = arith.addi %a, %n : i32""",
    "a large constant": """
        %c = arith.constant 65536 : i32
        %at = arith.muli %n, %c : i32""",
    "from memory": """
        %v = tt.load %x : !tt.ptr<i32>
        %at = arith.muli %v, %s : i32""",
    "carried by a loop": """
        %c0 = arith.constant 0 : i32
        %c1 = arith.constant 1 : i32
        %at = scf.for %i = %c0 to %n step %c1 iter_args(%b = %c0) -> (i32)  : i32 {
        %a = arith.muli %i, %s : i32
        scf.yield %a : i32
        }""",
    "used in the loop that carries it": """
        %c0 = arith.constant 0 : i32
        %r = scf.for %i = %c0 to %n step %c0 iter_args(%b = %c0) -> (i32)  : i32 {
        %q = tt.addptr %x, %b : !tt.ptr<f32>, i32
        %a = arith.muli %i, %s : i32
        scf.yield %a : i32
        }
        %at = arith.constant 0 : i32""",
    "one way of two": """
        %c0 = arith.constant 0 : i32
        %at = scf.if %t -> (i32) {
        %a = arith.muli %n, %s : i32
        scf.yield %a : i32
        } else {
        scf.yield %c0 : i32
        }""",
}


@pytest.mark.parametrize("name", NARROW)
def test_a_narrow_product_is_seen(name):
    assert lint(NARROW[name]) == ("k.py:7",)


WIDE = {
    "widened first": ROW
    + """%a = arith.extsi %row : i32 to i64
        %b = arith.extsi %s : i32 to i64
        %at = arith.muli %a, %b : i64""",
    "a tile's size": ROW
    + """%c = arith.constant 128 : i32
        %at = arith.muli %row, %c : i32""",
    "two constants": """
        %c = arith.constant 65536 : i32
        %at = arith.muli %c, %c : i32""",
    "a remainder": ROW
    + """%c = arith.constant 16 : i32
        %r = arith.remsi %row, %c : i32
        %at = arith.muli %r, %s : i32""",
    "a sum": ROW + "%at = arith.addi %row, %s : i32",
    "a product that is no address": "%a = arith.muli %n, %s : i32\n%at = arith.addi %n, %n : i32",
}


@pytest.mark.parametrize("name", WIDE)
def test_what_cannot_overflow_is_let_pass(name):
    assert lint(WIDE[name]) == ()
