"""Fused kernels and a training engine for latent-space reward feedback learning (PRFL).

    prfl_fast.patch(transformer)
    reward = prfl_fast.LatentRewardModel.from_backbone(transformer, num_blocks=8).freeze()
    plan = prfl_fast.GradientPlan.prfl(points=5)
    step = prfl_fast.PRFL(transformer, reward, prfl_fast.FlowUniPC(), plan)
    loss = step(noise, conditions).loss  # gradients are in .grad

To fit a GPU, before adapters and the optimizer:

    found = prfl_fast.plan_memory(transformer, budget="48GiB")
    prfl_fast.apply_memory(transformer, found.memory)
    prfl_fast.apply_memory(reward, found.reward_memory)
"""

import importlib
import importlib.util
import pathlib
from typing import TYPE_CHECKING, Any

# Python started in a checkout imports this folder, but the kernels are beside it (an installation
# maps ../kernels to prfl_fast.kernels).
if importlib.util.find_spec("prfl_fast.kernels") is None:
    _checkout = pathlib.Path(__file__).resolve().parents[1]
    if not (_checkout / "kernels" / "__init__.py").exists():
        raise ImportError(
            f"prfl_fast at {_checkout / 'prfl_fast'} has no kernels: install it with pip install ."
        )
    __path__.append(str(_checkout))

from prfl_fast.utils.version import __version__ as __version__

if TYPE_CHECKING:
    from prfl_fast.feedback import PRFL, GradientPlan
    from prfl_fast.memory import MemoryConfig, apply_memory
    from prfl_fast.models import is_patched, patch, unpatch
    from prfl_fast.planning import plan_memory
    from prfl_fast.rewards import LatentRewardModel
    from prfl_fast.rollout import FlowEuler, FlowUniPC, Guidance, RolloutConfig
    from prfl_fast.training import TrainConfig, Trainer

# torch is imported at the first use of a name, so that the command line can handle Ctrl-C before
# that, and answers --help in a tenth of a second.
_PACKAGES = ("feedback", "memory", "models", "planning", "rewards", "rollout", "training")

__all__ = [
    "FlowEuler",
    "FlowUniPC",
    "GradientPlan",
    "Guidance",
    "LatentRewardModel",
    "MemoryConfig",
    "PRFL",
    "RolloutConfig",
    "TrainConfig",
    "Trainer",
    "apply_memory",
    "is_patched",
    "patch",
    "plan_memory",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        for package in _PACKAGES:
            module = importlib.import_module(f"prfl_fast.{package}")
            if name in module.__all__:
                return globals().setdefault(name, getattr(module, name))
    if not name.startswith("_") and importlib.util.find_spec(f"prfl_fast.{name}"):
        return importlib.import_module(f"prfl_fast.{name}")
    raise AttributeError(f"module 'prfl_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
