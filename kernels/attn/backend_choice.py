"""Choose the attention backend: the tensors and chips each one takes, and the current setting."""

import os
from dataclasses import dataclass
from typing import NamedTuple

import torch

from prfl_fast.kernels.attn.backends import PACKAGES, absent, deterministic, load
from prfl_fast.kernels.runtime.checks import require
from prfl_fast.kernels.runtime.registry import Choice, forget_calls

ALIGNMENT = 16  # bytes of the vectors that the GPU's kernels load
HALF = (torch.bfloat16, torch.float16)
FLOAT_32 = (*HALF, torch.float32)
AMPERE_ON = (8, 9, 10, 11, 12)


@dataclass(frozen=True)
class Limits:
    """The tensors and chips that a backend takes; ``majors`` are those of compute capabilities."""

    device: str = "cuda"
    majors: tuple[int, ...] = AMPERE_ON
    dtypes: tuple[torch.dtype, ...] = HALF
    max_head_dim: int = 256
    lengths: bool = True


# Some versions of cuDNN, and of FlashAttention 4 on Blackwell, have a backward for more head sizes
# than these.
LIMITS = {
    "flash_attn_4": Limits(majors=(9, 10, 11, 12), max_head_dim=128),
    "flash_attn_3": Limits(majors=(9,)),
    "flash_attn_2": Limits(),
    "cudnn": Limits(max_head_dim=128, lengths=False),
    "flash": Limits(),
    "efficient": Limits(majors=(7, *AMPERE_ON), dtypes=FLOAT_32),
    "xformers": Limits(majors=(7, *AMPERE_ON), dtypes=FLOAT_32, lengths=False),
    "cpu": Limits(device="cpu", dtypes=(*FLOAT_32, torch.float64)),
}
BACKENDS = (*LIMITS, "plain")
_ON_CPU = LIMITS["cpu"].dtypes


class Case(NamedTuple):
    """The properties that the choice depends on; ``single``: there is one query or one key."""

    device: str
    capability: tuple[int, int] | None
    dtype: torch.dtype
    head_dim: int
    single: bool = False
    lengths: bool = False
    aligned: bool = True
    deterministic: bool = False


def preference(case: Case) -> tuple[str, ...]:
    """Return the backends, best first."""
    # This order is not measured. Kernels written for a chip's own matrix instructions come first,
    # and the flash-attn package comes before PyTorch's copy of it.
    if case.device != "cuda" or case.capability is None:
        return ("cpu", "plain")
    last = ("xformers", "efficient", "plain")
    if case.capability[0] == 9:
        return ("flash_attn_3", "cudnn", "flash_attn_4", "flash_attn_2", "flash", *last)
    if case.capability[0] in (10, 11):
        return ("flash_attn_4", "cudnn", "flash_attn_2", "flash", *last)
    # Consumer Blackwell, 12, multiplies with the instructions of Ampere.
    return ("flash_attn_2", "flash", "cudnn", "flash_attn_4", *last)


def unsupported_reason(name: str, case: Case) -> str | None:
    """Return the reason why a backend does not take these tensors; None if it does."""
    if name == "plain":
        return None
    limits, dtype = LIMITS[name], str(case.dtype).removeprefix("torch.")
    missing = absent(name) if name in PACKAGES else None
    if missing is not None:
        return missing
    if case.device != limits.device:
        return f"it takes {limits.device} tensors, these are on {case.device}"
    if case.dtype not in limits.dtypes:
        taken = ", ".join(str(d).removeprefix("torch.") for d in limits.dtypes)
        return f"it takes {taken}, not {dtype}"
    if case.device == "cpu":
        return None
    return _reason_by_gpu(name, case) or (load(name)[1] if name in PACKAGES else None)


def _reason_by_gpu(name: str, case: Case) -> str | None:
    limits, head_dim = LIMITS[name], case.head_dim
    if torch.version.hip is not None or case.capability is None:
        return "it needs an NVIDIA GPU"
    (major, minor), multiple = case.capability, 8 if case.dtype in HALF else 4
    chip = f"capability {major}.{minor}"
    if major not in limits.majors:
        return f"{chip}, it runs on {', '.join(f'{m}.x' for m in limits.majors)}"
    if head_dim > limits.max_head_dim:
        return f"head dim {head_dim} > {limits.max_head_dim}"
    if head_dim % multiple:
        return f"head dim {head_dim} is not a multiple of {multiple}"
    small = major == 12 or (major, minor) in ((8, 6), (8, 9))  # 99 KiB of shared memory
    if name in ("flash", "flash_attn_2") and small and 192 < head_dim <= 224:
        return f"head dim {head_dim} has no backward on {chip}"
    if case.lengths and not limits.lengths:
        return "it takes no key_lengths"
    if not case.aligned:
        return f"rows of a tensor do not start at multiples of {ALIGNMENT} bytes"
    if name == "cudnn" and case.single:
        return "a single query or a single key"
    if name == "cudnn" and os.environ.get("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", "0") != "0":
        return "TORCH_CUDNN_SDPA_AVOID_RECOMPILE stores lse another way"
    fixed_order = {
        "cudnn": False,
        "xformers": False,
        "flash_attn_3": head_dim <= 192,
        "flash_attn_4": major != 12,
    }
    if case.deterministic and not fixed_order.get(name, True):
        return "torch.use_deterministic_algorithms(True) excludes its backward"
    switches = {
        "flash": torch.backends.cuda.flash_sdp_enabled,
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled,
    }
    if name in switches and not switches[name]():
        return "it is switched off in torch.backends.cuda"
    if name == "cudnn" and not torch.backends.cudnn.is_available():
        return "PyTorch has no cuDNN here"
    if name == "flash" and not torch.backends.cuda.is_flash_attention_available():
        return "this PyTorch was built without it"
    return None


def _aligned(t: torch.Tensor) -> bool:
    axes = zip(t.shape[:-1], t.stride()[:-1], strict=True)
    steps = (t.data_ptr(), *(step * t.element_size() for size, step in axes if size > 1))
    return all(step % ALIGNMENT == 0 for step in steps)


def describe_case(
    heads: int, lengths: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, *more: torch.Tensor
) -> Case:
    """Return the case of these tensors, ``[B, L, D]``."""
    single = q.shape[1] == 1 or k.shape[1] == 1
    if q.device.type != "cuda":
        return Case(q.device.type, None, q.dtype, q.shape[2] // heads, single, lengths is not None)
    return Case(
        device="cuda",
        capability=torch.cuda.get_device_capability(q.device),
        dtype=q.dtype,
        head_dim=q.shape[2] // heads,
        single=single,
        lengths=lengths is not None,
        aligned=all(_aligned(t) for t in (q, k, *more)),
        deterministic=deterministic(),
    )


def choose_fast(q: torch.Tensor) -> str | None:
    """Return the backend if ``q`` alone decides it, else None.

    The search of :func:`choose` takes as long as a small matrix product.
    """
    return "cpu" if _current == "auto" and q.is_cpu and q.dtype in _ON_CPU else None


def choose(case: Case) -> str:
    """Return the backend for these tensors.

    Raises:
        ValueError: if the backend given to :func:`set_attention_backend` does not take them.
    """
    if _current == "auto":
        return next(name for name in preference(case) if unsupported_reason(name, case) is None)
    _accept(_current, unsupported_reason(_current, case))
    return _current


def _accept(name: str, reason: str | None) -> None:
    if reason is not None:
        advice = "Call set_attention_backend('auto') for the best one that takes these tensors"
        raise ValueError(f"attention: backend {name!r} was refused: {reason}. {advice}")


def _checked(name: str, argument: str) -> str:
    expected = f"one of auto, {', '.join(BACKENDS)}"
    require(name in ("auto", *BACKENDS), "attention", argument, name, expected)
    return name


def set_attention_backend(name: str) -> None:
    """Set the backend of ``attention`` in this process.

    Until the first call it is the value of ``PRFL_FAST_ATTENTION``, or ``auto``. ``auto`` chooses
    the best backend that takes the tensors on this chip. With any other name, ``attention`` raises
    ``ValueError`` for tensors that this backend does not take. ``prfl-fast doctor`` lists the
    backends and the reasons against them.

    Raises:
        ValueError: if the name is unknown, or its package is not installed or does not import.
    """
    global _current
    checked = _checked(name, "backend")
    if name in PACKAGES:
        _accept(name, absent(name) or load(name)[1])
    _current = checked
    forget_calls()


def get_attention_backend() -> str:
    """Return the name given to :func:`set_attention_backend`; until then the default."""
    return _current


_current = _checked(os.environ.get("PRFL_FAST_ATTENTION", "auto"), "PRFL_FAST_ATTENTION")


def report(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16, head_dim: int = 128
) -> dict[str, str | None]:
    """Return every backend, best first, and the reason against it (None if there is none)."""
    case = _nominal(torch.device(device), dtype, head_dim)
    names = dict.fromkeys((*preference(case), *BACKENDS))
    return {name: unsupported_reason(name, case) for name in names}


def explain(choice: Choice, device: torch.device, dtype: torch.dtype) -> Choice:
    """Return ``choice`` with the attention backend for heads of 128 channels, for the doctor."""
    name = choose(_nominal(device, dtype, 128))
    how = "best for heads of 128" if _current == "auto" else "set by name"
    return Choice(choice.backend, f"attention backend {name}, {how}")


def _nominal(device: torch.device, dtype: torch.dtype, head_dim: int) -> Case:
    cuda = device.type == "cuda" and torch.cuda.is_available()
    chip = torch.cuda.get_device_capability(device) if cuda else None
    return Case(device.type, chip, dtype, head_dim, deterministic=deterministic())
