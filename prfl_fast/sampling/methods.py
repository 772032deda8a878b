"""Uses of a reward while sampling by name, with their hyperparameters and their cost."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from prfl_fast.models.adapter import Conditions
from prfl_fast.rewards.functions import Reward
from prfl_fast.rollout.sampler import Sampler
from prfl_fast.rollout.schedulers import FlowEuler
from prfl_fast.sampling.candidates import Forwards
from prfl_fast.sampling.gradient import guide, optimize_noise
from prfl_fast.sampling.search import beam_search, prune, survivors
from prfl_fast.utils.checks import check, check_choice, check_count
from prfl_fast.utils.choices import METHODS

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "best-of": prune,
    "prune": prune,
    "beam": beam_search,
    "reno": optimize_noise,
    "guide": guide,
}
_OPTIONS = {
    "best-of": ("candidates",),
    "prune": ("candidates", "keep", "reward_at"),
    "beam": ("beams", "candidates", "eta", "lookahead"),
    "reno": ("iterations", "learning_rate", "momentum", "max_grad_norm", "prior"),
    "guide": ("weight",),
}
# TTSnap (arXiv 2511.22242) keeps these fractions after steps 2, 6 and 11 of 20.
_TTSNAP = {0.1: 0.4, 0.3: 0.4, 0.55: 0.5}


class Method(NamedTuple):
    """Name a use of a reward while sampling; :func:`make_method` checks it."""

    name: str
    options: Mapping[str, Any]

    def run(
        self,
        sampler: Sampler,
        reward: Reward,
        noise: torch.Tensor,
        conditions: Conditions,
        generator: torch.Generator,
        progress: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Forwards]:
        """Sample one video of each of B prompts, of which ``noise`` is the first candidate.

        With ``progress``, a tqdm bar counts the forwards.

        Returns:
            The latents ``[B, C, F, H, W]``, their rewards at timestep 0 ``[B]`` (None for
            ``guide``, which does not compute them), and the cost of all B.
        """
        function = _FUNCTIONS[self.name]
        options = dict(self.options)
        if self.name in ("best-of", "prune", "beam"):
            options["generator"] = generator
        result = function(sampler, reward, noise, conditions, progress=progress, **options)
        return result.latents, getattr(result, "scores", None), result.forwards

    def cost(self, num_inference_steps: int, branches: int = 1) -> Forwards:
        """Return the forwards and backwards of one video; ``branches`` is 2 with guidance."""
        steps, o = num_inference_steps, self.options
        if self.name == "reno":
            n = o["iterations"]
            again = (n - 1) * (steps - 1)  # recomputed in the backward
            return Forwards(branches * (n * steps + again), n, branches * (n - 1) * steps, n - 1)
        if self.name == "guide":
            return Forwards(branches * steps, steps - 1, 0, steps - 1)
        if self.name == "beam":
            children = (steps - 1) * o["beams"] * o["candidates"]
            generated = o["beams"] * steps + children * o["lookahead"]
            return Forwards(branches * generated, children + o["beams"])
        left = survivors(o["keep"], o["candidates"], steps)
        running, stops = [o["candidates"], *left.values()], [*(s + 1 for s in left), steps]
        taken = [stop - start for start, stop in zip([0, *stops[:-1]], stops, strict=True)]
        generated = sum(n * count for n, count in zip(running, taken, strict=True))
        return Forwards(branches * generated, sum(running))


def make_method(name: str, given: Mapping[str, Any], num_inference_steps: int) -> Method:
    """Return a method with the defaults of its options filled in.

    Args:
        name: one of ``METHODS``.
        given: keyword arguments of :func:`prune` (``best-of`` takes ``candidates``, ``prune`` also
            ``keep`` and ``reward_at``), :func:`beam_search`, :func:`optimize_noise` (``reno``) or
            :func:`guide`. Keys of ``keep`` may be strings of digits, as JSON has them.
        num_inference_steps: solver steps of the schedule.

    Raises:
        ValueError: if the name or an option is unknown, a required one is missing, or a value is
            out of range.
    """
    check_choice("method", name, METHODS)
    known = _OPTIONS[name]
    for key in given:
        check(key in known, f"an option of method {name}", key, f"one of {', '.join(known)}")
    parameters = inspect.signature(_FUNCTIONS[name]).parameters
    defaults = {key: parameters[key].default for key in known}
    if name in ("best-of", "prune"):
        defaults["candidates"] = 4
        defaults["keep"] = {}
    if name == "prune":
        spread = {int(at * num_inference_steps): part for at, part in _TTSNAP.items()}
        defaults["keep"] = {step: v for step, v in spread.items() if step < num_inference_steps - 1}
    options = {**defaults, **given}
    for key, value in options.items():
        missing = value is inspect.Parameter.empty
        check(not missing, f"{key} of method {name}", None, f"a value, as {key}=50")
        if key in ("candidates", "beams", "iterations"):
            check_count(key, value)
    if isinstance(options.get("keep"), Mapping):
        options["keep"] = {
            int(k) if isinstance(k, str) and k.isdigit() else k: v
            for k, v in options["keep"].items()
        }
    method = Method(name, options)
    _try(method, num_inference_steps)
    return method


def _try(method: Method, num_inference_steps: int) -> None:
    """Run a method on a flow of one number, so that its own checks come before any long work."""

    def velocity(x: torch.Tensor, timestep: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        return -x

    def reward(x: torch.Tensor, timestep: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        return x.flatten(1).sum(1)

    short = {"iterations": 1} if "iterations" in method.options else {}
    method = Method(method.name, {**method.options, **short})
    sampler = Sampler(velocity, FlowEuler(), num_inference_steps)
    x = torch.ones(1, 1, 1, 1, 1, device="cpu")
    method.run(sampler, reward, x, {"text": x[0, 0, 0]}, torch.Generator())
