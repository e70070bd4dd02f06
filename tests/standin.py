"""A stand-in for a GPU: tensors that lie on the CPU but pass for another device's, so that tests see on any machine
where devices are mixed up, where the host waits for the device, and how much it asks of it.

PyTorch's own place for a device that it does not know (PrivateUse1) carries it. Importing this makes it a device of the
whole process, so tests start one of their own for it.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration

import memoir

HOUSE = str(Path(memoir.__file__).parent)
aten = torch.ops.aten

# On CUDA the host waits in these: what they give, or its size, is known only once they are done.
WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "bincount",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "repeat_interleave",
    "_linalg_svd",
    "_linalg_eigh",
    "_linalg_solve_ex",
    "linalg_qr",
    "linalg_cholesky_ex",
}
NO_KERNEL = {"detach", "alias", "empty", "empty_strided", "_local_scalar_dense"}
RESHAPES = {"squeeze_", "unsqueeze_", "t_", "transpose_"}
# What `torch.tensor` makes one on a device with; it passes by the fallback for all others.
MADE_WITH = [aten.empty.memory_format, aten.empty_strided.default, aten.copy_.default]


@dataclass
class Traffic:
    """What the host asked of the device meanwhile.

    waits    how often it waited, by the line of the house that made it
    kernels  how many it started
    """

    waits: Counter = field(default_factory=Counter)
    kernels: int = 0

    def wait(self) -> None:
        frame = sys._getframe()
        while frame and not frame.f_code.co_filename.startswith(HOUSE):
            frame = frame.f_back
        self.waits[f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "elsewhere"] += 1


_watched: list[Traffic] = []


@contextlib.contextmanager
def traffic() -> Iterator[Traffic]:
    """Counts what is asked of the device inside."""
    _watched.append(Traffic())
    try:
        yield _watched[-1]
    finally:
        _watched.pop()


class OnStandin(torch.Tensor):
    """A tensor of the stand-in; `there` is what it holds."""

    is_cuda = True  # the house's own branches for CUDA are to be taken

    @staticmethod
    def __new__(cls, there: Tensor) -> OnStandin:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            there.size(),
            strides=there.stride(),
            storage_offset=there.storage_offset(),
            dtype=there.dtype,
            device=GPU,
        )
        made.there = there
        return made

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:
        return f"OnStandin({self.there!r})"

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        return run(op, args, kwargs or {})


def run(op: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """One of PyTorch's operators, of which some tensor is on the stand-in, or its result is to be."""
    name, asked = op.overloadpacket.__name__, kwargs.get("device")
    tensors: list[Tensor] = []
    plain = [_each(arg, lambda tensor: tensors.append(tensor) or getattr(tensor, "there", tensor)) for arg in args]
    named = {key: _each(arg, lambda tensor: getattr(tensor, "there", tensor)) for key, arg in kwargs.items()}
    there = [isinstance(tensor, OnStandin) for tensor in tensors]
    target = torch.device(asked).type if asked is not None else (GPU.type if any(there) else "cpu")
    indexing = name.lstrip("_").startswith("index") and there[:1] == [True]
    if not (indexing or name in ("copy_", "_to_copy")):
        _check(op, tensors, there)
    if _watched and (any(there) or target != "cpu"):
        # A copy to another device or from it makes the host wait, unless it need not; so does an index of the host's
        # or a mask in the place of one, of which the places are counted first.
        moves = (name == "copy_" and there[0] != there[1]) or (name == "_to_copy" and target == "cpu")
        moves = moves and not (kwargs.get("non_blocking") or args[2:3] == (True,))
        by = tensors[1:] if indexing else []
        stops = name in WAITS or moves or any(i.dtype == torch.bool or not isinstance(i, OnStandin) for i in by)
        for watched in _watched:
            watched.kernels += not (op.is_view or name in NO_KERNEL)
            if stops:
                watched.wait()
    if asked is not None:
        named["device"] = torch.device("cpu")
    found = op(*plain, **named)
    if op._schema.is_mutable and name.endswith("_"):
        if name in RESHAPES:
            with torch._C._DisableTorchDispatch():
                op(*args, **kwargs)
        return args[0] if op._schema.returns else None
    return found if target == "cpu" or name == "_local_scalar_dense" else _each(found, OnStandin)


def _each(value: Any, made: Any) -> Any:
    """The same with made(tensor) in the place of every tensor in it."""
    if isinstance(value, Tensor):
        return made(value)
    return type(value)([_each(part, made) for part in value]) if type(value) in (list, tuple) else value


def _check(op: Any, tensors: list[Tensor], there: list[bool]) -> None:
    """RuntimeError where devices are mixed. As on CUDA, a single number may be the CPU's."""
    if any(there) and any(tensor.dim() for tensor, on in zip(tensors, there, strict=True) if not on):
        shapes = [(tuple(tensor.shape), str(tensor.device)) for tensor in tensors]
        raise RuntimeError(f"{op} of tensors on two devices: {shapes}")


class _Module(backend_registration._DummyBackendModule):
    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.empty(0)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None: ...


backend_registration._setup_privateuseone_for_python_backend("standin", backend_module=_Module())
torch.__future__.set_overwrite_module_params_on_conversion(True)
GPU = torch.device("standin:0")
_library, _fallback = torch.library.Library("aten", "IMPL", "PrivateUse1"), torch.library.Library("_", "IMPL")
for made_with in MADE_WITH:
    _library.impl(made_with, lambda *args, op=made_with, **kwargs: run(op, args, kwargs))
_fallback.fallback(lambda op, *args, **kwargs: run(op, args, kwargs), "PrivateUse1")
