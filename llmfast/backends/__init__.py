"""A backend is a module with one `Op` for each operation it has; the first in ORDER that supports a problem runs it.

`supports(*inputs, spec, extras)` returns None or the reason as a sentence, which serves the error, `explain`, test
skips and the support table. Falling through is by order, never by `except`; a backend that the user named runs or
raises.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from types import MappingProxyType
from typing import Any, NamedTuple

ORDER = ("cuda", "triton", "cpu", "reference")
_ORDER_ON_CPU = ("cpu", "reference")  # the others take a CPU tensor only when named; asking them would take 1.4 us


class Op(NamedTuple):
    """One operation of one backend. `backward` is None where only the forward exists."""

    supports: Callable
    forward: Callable
    backward: Callable | None
    rowdot: Callable | None = None  # attention: (o, do) -> rowsum(o * do)
    decode: Callable | None = (
        None  # attention: forward's arguments, for few queries and no gradient; forward serves where it is None
    )
    only_named: Callable | None = None  # supports' arguments: None, or why the backend must be asked for by its name
    kernel: Callable | None = None  # supports' arguments, grad -> which of its kernels runs, and why not another
    makes_delta: bool = False  # attention: backward takes delta=None where it is rowsum(o * do), one call less


class Explanation(NamedTuple):
    """Which backend runs a call, and why each other one does not."""

    operation: str
    chosen: str | None
    reasons: dict[str, str | None]
    kernels: Mapping[str, str] = MappingProxyType({})  # of the backends that choose among several

    def __str__(self) -> str:
        head = f"{self.operation} runs on {self.chosen}" if self.chosen else f"no backend runs this {self.operation}"
        by = {name: f"supported, by {kernel}" for name, kernel in self.kernels.items()}
        return "\n".join([head, *(f"  {b}: {why or by.get(b, 'supported')}" for b, why in self.reasons.items())])


class Explained(Exception):
    """Raised in place of the kernel while `explain` listens."""


class OnlyReference(Exception):
    """Raised in place of the reference where `instead` names something better."""


_forced: ContextVar[str | None] = ContextVar("llmfast_backend", default=None)
_explaining: ContextVar[bool] = ContextVar("llmfast_explaining", default=False)
instead: ContextVar[str | None] = ContextVar("llmfast_instead", default=None)
_warned: set[tuple[str, str]] = set()
_ops: dict[tuple[str, str], Op] = {}


def op(operation: str, backend: str) -> Op:
    """The Op of a backend; one that lacks the operation says so in `supports`."""
    found = _ops.get((operation, backend))
    if found is None:
        module = import_module(f"{__name__}.{backend}")
        found = getattr(module, operation, None) or Op(lambda *_: f"has no {operation}", None, None)
        _ops[operation, backend] = found
    return found


def check_name(name: str | None) -> str | None:
    if name is not None and name not in ORDER:
        raise ValueError(f"backend: expected one of {', '.join(ORDER)}, got {name!r}")
    return name


def forced() -> str | None:
    """The backend of the `use_backend` around this call."""
    return _forced.get()


def unforced() -> bool:
    """No `use_backend` or `explain` is around this call."""
    return _forced.get() is None and not _explaining.get()


def pick(operation: str, inputs: tuple, name: str | None = None, grad: bool = False) -> Op:
    """The Op that runs a problem; inputs are its tensors, spec and extras."""
    name = name or _forced.get()
    if _explaining.get():
        raise Explained(_explain(operation, inputs, name, grad))
    if name is None:
        for backend in _ORDER_ON_CPU if inputs[0].is_cpu else ORDER:
            found = _ops.get((operation, backend)) or op(operation, backend)
            if _why_not(found, inputs, grad, named=False) is None:
                if backend == "reference":
                    _warn(operation, inputs, grad)
                    if instead.get():
                        raise OnlyReference
                return found
    else:
        found = op(operation, name)
        if (why_not := _why_not(found, inputs, grad, named=True)) is None:
            return found
        others = {b: _why_not(op(operation, b), inputs, grad, named=False) for b in ORDER if b != name}
        able = [b for b, why in others.items() if why is None]
        raise NotImplementedError(
            f"{operation} on {name}: {why_not}. "
            + (f"Supported by: {', '.join(able)}" if able else "; ".join(f"{b}: {why}" for b, why in others.items()))
        )
    raise NotImplementedError(str(_explain(operation, inputs, None, grad)))


def _why_not(found: Op, inputs: tuple, grad: bool, named: bool) -> str | None:
    if (reason := found.supports(*inputs)) is not None:
        return reason
    if grad and found.backward is None:
        return "has no backward yet"
    return None if named or found.only_named is None else found.only_named(*inputs)


def _explain(operation: str, inputs: tuple, name: str | None, grad: bool) -> Explanation:
    reasons = {b: _why_not(op(operation, b), inputs, grad, named=b == name) for b in ORDER}
    if name is None and instead.get():
        reasons["reference"] = f"{instead.get()} runs in its place"
    candidates = [name] if name else ORDER
    chosen = next((b for b in candidates if reasons[b] is None), None if name else instead.get())
    able = {b: op(operation, b).kernel for b in ORDER if reasons[b] is None}
    return Explanation(operation, chosen, reasons, {b: kernel(*inputs, grad) for b, kernel in able.items() if kernel})


def _warn(operation: str, inputs: tuple, grad: bool) -> None:
    reasons = "; ".join(f"{b}: {_why_not(op(operation, b), inputs, grad, named=False)}" for b in ORDER[:-1])
    _warn_once(operation, instead.get() or "the slow reference", reasons)


def _warn_once(operation: str, where: str, why: str) -> None:
    if (where, why) not in _warned:
        _warned.add((where, why))
        warnings.warn(f"{operation} runs on {where} ({why})", stacklevel=7)


def elsewhere(operation: str, where: str, why: str) -> None:
    """Says once that a call leaves the library, or tells `explain`."""
    if _explaining.get():
        raise Explained(Explanation(operation, where, dict.fromkeys(ORDER, why)))
    _warn_once(operation, where, why)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Every llmfast call inside runs on this backend or raises NotImplementedError.

    >>> with llmfast.use_backend("reference"):
    ...     o = llmfast.attention(q, k, v)
    """
    token = _forced.set(check_name(name))
    try:
        yield
    finally:
        _forced.reset(token)


def explain(fn: Callable, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend `fn(*args, **kwargs)` would run on, and why each other one would not. Nothing is computed.

    >>> print(llmfast.explain(llmfast.attention, q, k, v, causal=True))
    attention runs on cpu
      cuda: needs a CUDA tensor, got cpu
      ...
    """
    token = _explaining.set(True)
    try:
        fn(*args, **kwargs)
    except Explained as found:
        return found.args[0]
    finally:
        _explaining.reset(token)
    raise ValueError(f"{getattr(fn, '__name__', fn)} called no llmfast operation")
