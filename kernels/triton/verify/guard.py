"""Layer B: every access of a kernel in Triton's interpreter is watched.

Found are lanes outside the tensors that the kernel was given, gaps between the rows of a view
among them; two programs that store to one byte, or one that loads what another stores, in
whatever order they happen to run; and two lanes that store different values to one place. Lanes
of a load that are masked off and have no `other` are NaN, and so is what torch.empty gives, so
that whoever uses them is seen in the result. Not seen: races inside one program.
Called by tests.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

NOBODY, SEVERAL = 0, -1
FILLER = 0x5A  # bytes of undefined integers


class Fault(AssertionError):
    """What a kernel did wrong, and which of its programs."""


class _Memory:
    """One storage that a launch was given: which of its bytes belong to the tensors, and which
    program, counted from 1, has loaded and stored each."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.start, size = storage.data_ptr(), storage.nbytes()
        self.given = np.zeros(size, bool)
        self.loaded = np.full(size, NOBODY, np.int32)
        self.stored = np.full(size, NOBODY, np.int32)

    def give(self, tensor: torch.Tensor) -> None:
        mine = torch.from_numpy(self.given).as_strided(
            (*tensor.shape, tensor.element_size()),
            (*(stride * tensor.element_size() for stride in tensor.stride()), 1),
            tensor.storage_offset() * tensor.element_size(),
        )
        mine.fill_(True)


class Watch:
    """The memory of one launch. Programs are named by their ids."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.memory: dict[int, _Memory] = {}
        self.programs: list[tuple[int, ...]] = []
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if tensor.numel():
                self.memory.setdefault(storage.data_ptr(), _Memory(storage)).give(tensor)

    def number(self, program: tuple[int, ...]) -> int:
        if not self.programs or self.programs[-1] != program:
            self.programs.append(program)
        return len(self.programs)

    def _name(self, number: int) -> str:
        return "several programs" if number == SEVERAL else f"program {self.programs[number - 1]}"

    def access(self, what: str, addresses: Any, width: int, program: tuple[int, ...]) -> None:
        """addresses [lanes] of `width` bytes each, all of them unmasked. Fault if that is wrong."""
        number, inside = self.number(program), 0
        for memory in self.memory.values():
            offsets = addresses - memory.start
            here = offsets[(offsets >= 0) & (offsets + width <= memory.given.size)]
            places = (here[:, None] + np.arange(width)).ravel()
            owned = memory.given[places].reshape(-1, width).all(axis=1)
            inside += int(owned.sum())
            if what != "atomic":
                touched = np.unique(places.reshape(-1, width)[owned])
                self._race(what, memory, touched, number)
        if inside < addresses.size:
            raise Fault(
                f"{what}: {addresses.size - inside} of {addresses.size} lanes are out of bounds in "
                f"program {program}"
            )

    def _race(self, what: str, memory: _Memory, places: Any, number: int) -> None:
        stored, loaded = memory.stored[places], memory.loaded[places]
        other = stored[(stored != NOBODY) & (stored != number)]
        if other.size:
            verb = "loads" if what == "load" else "stores to"
            raise Fault(f"race: {self._name(number)} {verb} what {self._name(other[0])} stored")
        if what == "store":
            other = loaded[(loaded != NOBODY) & (loaded != number)]
            if other.size:
                raise Fault(
                    f"race: {self._name(number)} stores to what {self._name(other[0])} loaded"
                )
            memory.stored[places] = number
        else:
            first = loaded == NOBODY
            memory.loaded[places] = np.where(first | (loaded == number), number, SEVERAL)


def same_place(addresses: Any, values: Any) -> bool:
    """Whether two lanes store different values to one address."""
    order = np.argsort(addresses, kind="stable")
    addresses, values = addresses[order], values[order]
    again = addresses[1:] == addresses[:-1]
    return bool((again & (values[1:] != values[:-1])).any())


class _Lanes(NamedTuple):
    addresses: Any
    width: int
    mask: Any


def _lanes(pointers: Any, mask: Any) -> _Lanes:
    shape = np.broadcast_shapes(np.shape(pointers.data), np.shape(mask.data))
    kept = np.broadcast_to(mask.data, shape).astype(bool)
    addresses = np.broadcast_to(pointers.data, shape)[kept].ravel().astype(np.int64)
    return _Lanes(addresses, max(1, pointers.get_element_ty().primitive_bitwidth // 8), kept)


@contextmanager
def guarded() -> Iterator[None]:
    """Within it, launches in the interpreter are watched, and torch.empty gives NaN. What a kernel
    does wrong is raised as Fault by its launch."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    watches: list[Watch] = []
    changes: list[tuple[Any, str, Callable[..., Any]]] = [
        (builder, "create_masked_load", _load(interpreter, watches)),
        (builder, "create_masked_store", _store(interpreter, watches)),
        (builder, "create_atomic_rmw", _atomic(interpreter, watches)),
        (interpreter.GridExecutor, "__call__", _launch(interpreter, watches)),
        (torch, "empty", _poisoned(torch.empty)),
        (torch, "empty_like", _poisoned(torch.empty_like)),
        (torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty)),
    ]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, made in changes:
        setattr(owner, name, made)
    try:
        yield
    finally:
        for owner, name, was in kept:
            setattr(owner, name, was)


def _load(interpreter: Any, watches: list[Watch]) -> Callable[..., Any]:
    original = interpreter.InterpreterBuilder.create_masked_load

    def load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **named: Any) -> Any:
        lanes = _lanes(pointers, mask)
        watches[-1].access("load", lanes.addresses, lanes.width, self.grid_idx)
        # The interpreter drops an `other` of 0 for a single lane, so that nothing is known of it.
        if other is None and lanes.mask.size > 1 and not lanes.mask.all():
            kind = pointers.get_element_ty()
            filler = undefined(lanes.mask.shape, interpreter._get_np_dtype(kind), kind.name)
            other = interpreter.TensorHandle(filler, kind)
        return original(self, pointers, mask, other, *rest, **named)

    return load


def undefined(shape: tuple[int, ...], dtype: Any, kind: str) -> Any:
    """NaN in the interpreter's form of the Triton type `kind`, or conspicuous integers."""
    if dtype.kind == "f":
        return np.full(shape, np.nan, dtype)
    quiet = {"bf16": 0x7FC0, "fp8e4nv": 0x7F, "fp8e5": 0x7F, "fp8e4b8": 0x80, "fp8e5b16": 0x80}
    return np.full(shape, quiet.get(kind, FILLER), dtype)


def _store(interpreter: Any, watches: list[Watch]) -> Callable[..., Any]:
    original = interpreter.InterpreterBuilder.create_masked_store

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        lanes = _lanes(pointers, mask)
        watches[-1].access("store", lanes.addresses, lanes.width, self.grid_idx)
        values = np.broadcast_to(value.data, lanes.mask.shape)[lanes.mask].ravel()
        if same_place(lanes.addresses, values):
            raise Fault(f"store: lanes of program {self.grid_idx} store unlike values to one place")
        return original(self, pointers, value, mask, *rest, **named)

    return store


def _atomic(interpreter: Any, watches: list[Watch]) -> Callable[..., Any]:
    original = interpreter.InterpreterBuilder.create_atomic_rmw

    def rmw(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        """Bounds only: that programs meet in one place is what it is for."""
        lanes = _lanes(pointers, mask)
        watches[-1].access("atomic", lanes.addresses, lanes.width, self.grid_idx)
        return original(self, op, pointers, value, mask, *rest)

    return rmw


def _launch(interpreter: Any, watches: list[Watch]) -> Callable[..., Any]:
    original = interpreter.GridExecutor.__call__

    def launch(self: Any, *args: Any, **named: Any) -> Any:
        given = [each for each in (*args, *named.values()) if isinstance(each, torch.Tensor)]
        watches.append(Watch(given))
        try:
            return original(self, *args, **named)
        except interpreter.InterpreterError as wrapped:
            cause: BaseException | None = wrapped
            while cause is not None and not isinstance(cause, Fault):
                cause = cause.__cause__
            raise (cause or wrapped) from None
        finally:
            watches.pop()

    return launch


def _poisoned(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def empty(*args: Any, **named: Any) -> torch.Tensor:
        made = original(*args, **named)
        if made.device.type == "cpu" and made.numel() and made.is_contiguous():
            floats = made.is_floating_point() and made.element_size() > 1
            made.fill_(torch.nan) if floats else made.view(torch.uint8).fill_(FILLER)
        return made

    return empty
