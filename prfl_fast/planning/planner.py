"""Choose the fastest memory policies of a PRFL step that fit a budget, without a GPU.

See :mod:`prfl_fast.planning.simulation` for the simulated step, :mod:`prfl_fast.planning.search`
for the comparison of candidates, and :mod:`prfl_fast.planning.report` for the output.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from prfl_fast.planning.gpu_specs import GPUS, GpuSpecs, find_gpu
from prfl_fast.planning.layout_search import LayoutSearch
from prfl_fast.planning.plan import Plan
from prfl_fast.planning.presets import Model
from prfl_fast.planning.search import Search, Tier, received_in_step, step_seconds
from prfl_fast.planning.workload import Workload
from prfl_fast.utils.checks import check, check_choice
from prfl_fast.utils.interrupts import interrupts_held
from prfl_fast.utils.progress import count_progress
from prfl_fast.utils.units import size_of

# Both are in order of accuracy. The search takes the first entry with which any policy fits.
WEIGHTS = ("bf16", "fp8", "nf4")
OPTIMIZERS = ("adamw", "adamw-sr", "adamw8bit", "adamw-cpu")


def plan_memory(
    workload: Workload | Model,
    *,
    budget: int | str | None = None,
    host_budget: int | str | None = None,
    weight_dtype: str = "auto",
    optimizer: str = "auto",
    gpu: str | GpuSpecs = "h200",
    expandable_segments: bool = True,
    progress: bool = False,
) -> Plan:
    """Choose the memory policies of reward feedback training by simulation.

    Nothing is allocated. The search picks weights and optimizer by accuracy, the rest by time: bf16
    weights if anything fits with them, else FP8, else NF4 (LoRA only); with ``train="full"``, AdamW
    with float32 masters, else bf16 with stochastic rounding, else 8-bit states, else states in host
    memory. On several GPUs it also chooses what ``workload.parallel`` leaves as ``"auto"``: the
    layout with the fewest seconds of a GPU per video, see :mod:`prfl_fast.planning.layout_search`.

    Args:
        workload: the training run; a model stands for a :class:`Workload` of it with defaults.
        budget: device memory, in bytes, as ``"24GiB"``, or as the name of a GPU like
            ``"rtx4090"``; None is the memory of ``gpu``.
        host_budget: host memory for offloaded tensors and states; None is unlimited.
        weight_dtype: ``"auto"``, ``"bf16"``, ``"fp8"`` or ``"nf4"``, for both models.
        optimizer: ``"auto"``, ``"adamw"``, ``"adamw-sr"``, ``"adamw8bit"`` or ``"adamw-cpu"``.
        gpu: rates for the time estimate, see :mod:`prfl_fast.planning.gpu_specs`.
        expandable_segments: the setting of PyTorch's allocator that the run will have.
        progress: show a tqdm bar on a terminal, a line every 30 seconds elsewhere.

    Returns:
        See :class:`Plan`. ``feasible`` is False if no policy fits.

    Raises:
        ValueError: if an argument is out of range, or quantized weights are to train in full.
        TypeError: if the model is not supported.
        MissingExtraError: if diffusers or peft is not installed.
    """
    specs = find_gpu(gpu)
    work = workload if isinstance(workload, Workload) else Workload(workload)
    tiers = _tiers(work, weight_dtype, optimizer)
    size = specs.memory if budget is None else budget_of(budget, "budget")
    host_size = None if host_budget is None else size_of(host_budget, "host_budget")
    limits: Any = {"budget": size, "host_budget": host_size, "expandable": expandable_segments}
    tried = LayoutSearch(lambda laid_out: Search(laid_out, specs, **limits))
    with _progress(progress) as tried.show:
        search, found = tried.best(work, tiers)
    work, notes = search.workload, tried.notes
    unused = ", ".join(f"{tier.weight_dtype} with {tier.optimizer}" for tier in found.unused)
    if unused:
        notes.append(f"not considered, since an earlier choice fits: {unused}")
    run, chosen = found.simulation, found.chosen
    return Plan(
        memory=chosen.memory,
        reward_memory=chosen.reward_memory,
        feasible=found.feasible,
        peak=run.peak,
        peak_phase=run.peak_phase,
        categories=dict(run.categories),
        fragmentation=found.fragmentation,
        expandable_segments=expandable_segments,
        host=run.host,
        seconds=step_seconds(run.costs, specs, work),
        received=received_in_step(run.costs, work),
        timeline=run.timeline,
        candidates=found.candidates,
        notes=notes,
        workload=work,
        gpu=specs,
        budget=size,
        host_budget=host_size,
    )


@contextlib.contextmanager
def _progress(progress: bool) -> Iterator[Callable[[str], object]]:
    """Yield a function that shows the next simulation; Ctrl-C ends the search there."""
    bar: Any = count_progress("plan", "simulations") if progress else contextlib.nullcontext(str)
    # In this order, so that the bar is closed before the interrupt is raised.
    with interrupts_held() as interrupt, bar as show:

        def next_simulation(text: str) -> None:
            interrupt()
            show(text)

        yield next_simulation


def budget_of(value: int | str, name: str) -> int:
    """Return the memory of a GPU by its name, or the bytes of a size."""
    return GPUS[value].memory if isinstance(value, str) and value in GPUS else size_of(value, name)


def _tiers(workload: Workload, weight_dtype: str, optimizer: str) -> list[Tier]:
    """Return pairs of weight dtype and optimizer in order of preference."""
    check_choice("weight_dtype", weight_dtype, ("auto", *WEIGHTS))
    check_choice("optimizer", optimizer, ("auto", *OPTIMIZERS))
    adapters = workload.train == "lora"
    quantized = adapters and workload.reward_loss is None  # LoRA of a reward model is merged
    quantized = quantized and not workload.fp8_linears
    ok = quantized or weight_dtype in ("auto", "bf16")
    hint = "Quantized weights cannot train: set train to lora"
    if workload.fp8_linears:
        hint = "fp8_linears quantizes the weights of each product itself"
    expected = "auto or bf16 with train full, with fp8_linears, and for a reward model"
    check(ok, "weight_dtype", weight_dtype, expected, hint=hint)
    every = WEIGHTS if quantized else ("bf16",), ("adamw",) if adapters else OPTIMIZERS
    weights = every[0] if weight_dtype == "auto" else (weight_dtype,)
    optimizers = every[1] if optimizer == "auto" else (optimizer,)
    return [Tier(*pair) for pair in itertools.product(weights, optimizers)]
