"""Layer C, one case: compiled for a target without a GPU, and what the binary says of itself.

Called by `worker.py` and by tests, in a process where Triton does not interpret kernels.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from kernels.triton.case import Case
from kernels.triton.launch import parameters
from kernels.triton.targets import Target
from kernels.triton.verify.offsets import narrow_offsets

DEADLINE_S = 60.0  # for a tool of the CUDA toolkit, which takes milliseconds


class Compiled(NamedTuple):
    """registers: of a thread. shared_bytes: of a program. spilled: bytes of a thread's stack on
    NVIDIA's, registers kept in memory on AMD's. matrix: the matrix instruction it uses, or "".
    narrow: addresses whose offset is a product of 32 bits."""

    registers: int
    shared_bytes: int
    spilled: int
    matrix: str
    narrow: tuple[str, ...] = ()


def compile_case(case: Case, target: Target) -> Compiled:
    """Whatever Triton raises for a kernel that does not compile, it raises too."""
    binary = build(case, target)
    used = _of_cubin(binary) if target.backend == "cuda" else _of_amdgcn(binary)
    text = binary.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    found = ""
    if case.matrix and (match := re.search(target.matrix[case.matrix], text)):
        found = match.group(0).rstrip(".")
    shared = binary.metadata.shared
    return Compiled(used.registers, shared, used.spilled, found, narrow_offsets(binary.asm["ttir"]))


def build(case: Case, target: Target) -> Any:
    """What triton.compile gives: .asm by stage, .metadata."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [parameter.name for parameter in parameters(case.kernel)]
    missing = set(names) ^ {*case.signature, *case.constants}
    if missing:
        raise ValueError(f"{case.name}: {', '.join(sorted(missing))} are given and taken unalike.")
    source = ASTSource(
        fn=case.kernel,
        signature={name: case.signature.get(name, "constexpr") for name in names},
        constexprs=dict(case.constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible},
    )
    options = {
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
        "enable_fp_fusion": case.fp_fusion,
    }
    made = GPUTarget(target.backend, target.arch, target.warp_threads)
    return triton.compile(source, target=made, options=options)


class _Used(NamedTuple):
    registers: int
    spilled: int


def _of_cubin(binary: Any) -> _Used:
    """From the resource usage that cuobjdump, which comes with Triton, prints for the kernel."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).with_name("bin") / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        told = subprocess.run(
            [tool, "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
            timeout=DEADLINE_S,
        )
    said = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", told.stdout + told.stderr))
    return _Used(int(said["REG"]), int(said["STACK"]) + int(said["LOCAL"]))


def _of_amdgcn(binary: Any) -> _Used:
    """From the notes that the assembler leaves for the loader."""
    said = {
        key: int(value)
        for key, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", binary.asm["amdgcn"], re.MULTILINE)
    }
    spilled = said["vgpr_spill_count"] + said["private_segment_fixed_size"] // 4
    return _Used(said["vgpr_count"], spilled)


def faults(case: Case, target: Target, made: Compiled) -> list[str]:
    """What keeps a case from shipping on the target, as sentences without their subject."""
    found = []
    if made.spilled:
        unit = "bytes of stack" if target.backend == "cuda" else "registers"
        found.append(f"spills {made.spilled} {unit}")
    if made.shared_bytes > target.shared_limit_bytes:
        found.append(
            f"needs {made.shared_bytes} bytes of shared memory, the card has "
            f"{target.shared_limit_bytes}"
        )
    if case.matrix and not made.matrix:
        found.append(f"has no matrix instruction for {case.matrix} operands")
    found += [f"addresses with a product of 32 bits: {where}" for where in made.narrow]
    return found
