"""Read the adapters of a rollout's configuration for its model."""

from typing import Any

from torch import nn

from prfl_fast.models.adapter_files import read_adapter
from prfl_fast.models.experts import Experts, members
from prfl_fast.models.official import WanOfficialAdapter
from prfl_fast.models.registry import find_adapter
from prfl_fast.models.rollout_adapter import AdapterFile, RolloutAdapter, SharedAdapter
from prfl_fast.models.wan import WanDiffusersAdapter
from prfl_fast.rollout.config import RolloutConfig
from prfl_fast.utils.checks import check
from prfl_fast.utils.modules import unwrap

Adapters = AdapterFile | tuple[AdapterFile | None, AdapterFile | None] | None


def read_adapters(model: nn.Module | None, config: RolloutConfig) -> Adapters:
    """Return the adapter of a model, two of experts, or None; ``model`` is None for a function.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a file cannot be read or does not fit the model.
    """
    paths, scales = config.adapter, config.adapter_scale
    if paths is None:
        return None
    expected = "None for a function in place of a supported model"
    check(model is not None, "adapter", paths, expected)
    assert model is not None
    bare = unwrap(model)
    if isinstance(bare, Experts):
        high, low = (
            _read(expert, path, scale)
            for expert, path, scale in zip(members(bare), _pair(paths), _pair(scales), strict=True)
        )
        return high, low
    for name, value in (("adapter", paths), ("adapter_scale", scales)):
        check(not isinstance(value, tuple), name, value, "one value: the model has no experts")
    assert isinstance(paths, str) and not isinstance(scales, tuple)
    return _read(bare, paths, scales)


def shared_adapters(adapters: Adapters) -> Any:
    """Return the adapters for one rollout, which opens each once; see :func:`read_adapters`."""
    if isinstance(adapters, AdapterFile):
        return SharedAdapter(adapters)
    return adapters and tuple(file and SharedAdapter(file) for file in adapters)


def _pair(value: object) -> tuple:  # type: ignore[type-arg]
    return value if isinstance(value, tuple) else (value, value)


def _read(model: nn.Module, path: str | None, scale: float) -> AdapterFile | None:
    if path is None:
        return None
    bare, adapter = unwrap(model), find_adapter(model)
    kinds = (WanDiffusersAdapter, WanOfficialAdapter)
    check(isinstance(adapter, kinds), "adapter", path, f"None for {adapter.name}: Wan alone has it")
    file = read_adapter(path, scale)
    RolloutAdapter(file, bare, list(adapter.blocks(bare)))  # raises if it does not fit
    return file
