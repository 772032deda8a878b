"""Measure the variance of reward gradients in the small world, by method and by points.

Model, reward and prompts are those of the suite ``alignment``. An estimate ĝ of a gradient g is
random in its noise, prompt and drawn steps; its relative variance is ``E‖ĝ - g‖² / ‖g‖²``, over all
parameters. Estimates may be averaged, so at equal compute what counts is variance times cost.

For PRFL the gradient at every step of some trajectories gives the variance of every plan at once.
With A = E[w wᵀ] over the plan's draws of weights w by step, a batch of B trajectories that share a
draw has ``E‖ĝ‖² = ⟨A, W/B + (1 - 1/B)·C⟩``: W[m, n] is the mean of ⟨g_m, g_n⟩ on one trajectory, C
that between two trajectories, and ‖g‖² is the mean of C.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import harness
import method_specs as plans
import numpy
import report
import torch
from harness import Context, SuiteResult, Table
from torch import nn

from experiments import small_world, world
from prfl_fast import FlowUniPC, GradientPlan
from prfl_fast.rollout import Sampler, Trajectory

DRAWS = ("systematic", "independent")
TARGET = 2.0  # of the hinge, as in PRFL
CLIPS = 256  # sent to every process


@dataclass(frozen=True)
class Settings:
    """Set the sizes of the study."""

    groups: int = 6
    trajectories: int = 4  # of a group
    calls: int = 16  # of a method
    num_inference_steps: int = plans.SOLVER_STEPS
    points: tuple[int, ...] = tuple(range(1, 9))
    batches: tuple[int, ...] = (1, 16)


SETTINGS, WORLD = Settings(), small_world.Settings(clips=CLIPS)


@dataclass(frozen=True)
class Estimate:
    """Hold a relative variance, and its standard error if there is one."""

    value: float
    error: float | None

    def __str__(self) -> str:
        value = report.number(self.value, 1)
        return value if self.error is None else f"{value} ± {report.number(self.error, 1)}"


def jackknife(left: Sequence[float]) -> float:
    """Return the jackknife standard error, from estimates that leave one part of the data out."""
    values = torch.tensor(left, dtype=torch.float64)
    return ((len(values) - 1) * values.var(correction=0)).sqrt().item()


class Products:
    """Hold inner products of the gradients by step ``g_b`` ``[M, P]`` of trajectories b, by groups.

    Args:
        sums: by group, Σ_b g_b. within: by group, Σ_b g_b·g_bᵀ, ``[M, M]``. count: trajectories of
            a group.
    """

    def __init__(
        self, sums: Sequence[torch.Tensor], within: Sequence[torch.Tensor], count: int
    ) -> None:
        self.within, self.count = list(within), count
        self._across = [[(a @ b.T).double() for b in sums] for a in sums]

    def moments(self, leave: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return W and C ``[M, M]`` of all groups, or of all but one, without bias."""
        kept = [i for i in range(len(self.within)) if i != leave]
        total = len(kept) * self.count
        own = torch.stack([self.within[i] for i in kept]).sum(0)
        every = torch.stack([self._across[i][j] for i in kept for j in kept]).sum(0)
        return own / total, (every - own) / (total * (total - 1))


def second_moment(plan: GradientPlan, num_inference_steps: int) -> torch.Tensor:
    """Return E[w wᵀ] over the plan's draws, ``[M, M]`` float64; every point has depth 1."""
    steps = plan.steps(num_inference_steps)
    count = len(steps)
    if plan.draws == "independent":  # outcomes() has billions of those
        same = torch.eye(count, dtype=torch.float64) / (plan.points * count)
        return same + (1 - 1 / plan.points) / count**2
    found = torch.zeros(count, count, dtype=torch.float64)
    for probability, points in plan.outcomes(num_inference_steps):
        w = torch.zeros(count, dtype=torch.float64)
        for point in points:
            w[point.step - steps[0]] += point.weight
        found += float(probability) * w.outer(w)
    return found


def variance(draws: torch.Tensor, w: torch.Tensor, c: torch.Tensor, batch: int) -> float:
    """Return the relative variance of a batch's gradient; ``draws`` is E[w wᵀ]."""
    mean = c.mean().item()
    second = (draws * (w / batch + (1 - 1 / batch) * c)).sum().item()
    return second / mean - 1


def distinct_points(plan: GradientPlan, num_inference_steps: int) -> float:
    """Return the mean number of gradient steps: independent draws may repeat one."""
    if plan.draws == "systematic":
        return float(plan.points)
    count = len(plan.steps(num_inference_steps))
    return count * (1 - (1 - 1 / count) ** plan.points)


def expected_flops(
    plan: GradientPlan, num_inference_steps: int, forward: float, point: float
) -> float:
    """Return the mean FLOPs of a call from those of a step without and of one with gradient."""
    without = plan.expected_forwards(num_inference_steps) * forward
    return without + distinct_points(plan, num_inference_steps) * point


def flat_gradient(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """Return all gradients as one vector, zeros where there is none, and drop them."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return torch.cat([part.flatten() for part in parts])


def gradients_by_step(
    model: nn.Module,
    reward: Any,
    noise: torch.Tensor,
    conditions: dict[str, torch.Tensor],
    num_inference_steps: int,
) -> torch.Tensor:
    """Return PRFL's gradient at each step of one trajectory but the last, ``[M, P]``, weight 1."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    trajectory = Trajectory(Sampler(model, FlowUniPC(), num_inference_steps), noise, conditions)
    rows = []
    for index in range(num_inference_steps - 1):
        with torch.enable_grad():
            x = trajectory.solve(trajectory.velocity())
            score = reward(x, trajectory.model_timestep(index + 1), conditions)
            torch.relu(TARGET - score).mean().backward()
        rows.append(flat_gradient(parameters))
        trajectory.move_to(x)
    return torch.stack(rows)


def _draw(
    start: small_world.Start, generator: torch.Generator
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Return noise, a clip's conditions and its latents."""
    clips, device = start.clips, start.conditions["encoder_hidden_states"].device
    noise = torch.randn(1, *clips.latents.shape[1:], generator=generator)
    i = int(torch.randint(len(clips.latents), (), generator=generator))
    conditions = {"encoder_hidden_states": clips.text[i : i + 1].to(device)}
    return noise.to(device), conditions, clips.latents[i : i + 1].to(device)


def measure_group(
    start: small_world.Start, s: Settings, seed: int
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return one group's sum and inner products."""
    model, generator = small_world.copy_generator(start)[0], torch.Generator().manual_seed(seed)
    total, within = torch.zeros(()), torch.zeros((), dtype=torch.float64)
    for _ in range(s.trajectories):
        noise, conditions, _ = _draw(start, generator)
        g = gradients_by_step(model, start.reward, noise, conditions, s.num_inference_steps)
        total, within = total + g, within + (g @ g.T).double()
    # Arrays pass between processes without shared memory, of which containers have little.
    return total.cpu().numpy(), within.cpu().numpy()


def _ratio(products: torch.Tensor) -> float | None:
    """Return the relative variance from the inner products ``[n, n]`` of n gradients."""
    count, every = len(products), products.sum().item()
    spread = (products.trace().item() - every / count) / (count - 1)
    square = every / count**2 - spread / count  # without bias
    return spread / square if square > 0 else None


def sample_variance(gradients: torch.Tensor) -> Estimate | None:
    """Return the relative variance of the rows ``[n, P]``; None if their mean is lost in the noise,
    or would be without one of three rows or more.
    """
    wide = gradients.double()
    products = wide @ wide.T
    value = _ratio(products)
    if value is None:
        return None
    left = []
    for i in range(len(products) if len(products) > 2 else 0):
        kept = [j for j in range(len(products)) if j != i]
        left.append(_ratio(products[kept][:, kept]))
    if None in left:
        return None
    return Estimate(value, jackknife(left) if left else None)


def measure_method(start: small_world.Start, s: Settings, name: str, seed: int) -> Estimate | None:
    """Return the relative variance of one call's gradient, over noises, clips and draws."""
    method = next(m for m in plans.METHODS if m.name == name)
    model, generator = small_world.copy_generator(start)[0], torch.Generator().manual_seed(seed)
    parameters = list(model.parameters())
    rewards = plans.rewards(start.reward, world.decode, start.pixel)
    rows = []
    for _ in range(s.calls):
        noise, conditions, clip = _draw(start, generator)
        options = {"typical": False, "num_inference_steps": s.num_inference_steps}
        call = plans.call_of(method, model, rewards, latents=clip, generator=generator, **options)
        call(noise, conditions)
        rows.append(flat_gradient(parameters))
    return sample_variance(torch.stack(rows))


def _costs(start: small_world.Start, s: Settings) -> tuple[int, int]:
    """Count the FLOPs of a step without and with gradient, reward included, on one sample."""
    model, generator = small_world.copy_generator(start)[0], torch.Generator().manual_seed(0)
    noise, conditions, _ = _draw(start, generator)
    trajectory = Trajectory(Sampler(model, FlowUniPC(), s.num_inference_steps), noise, conditions)
    forward = harness.count_flops(lambda: trajectory.run(1))
    two = harness.count_flops(lambda: gradients_by_step(model, start.reward, noise, conditions, 3))
    return forward, two // 2


def study(context: Context, names: Sequence[str]) -> tuple[SuiteResult, dict[str, Estimate | None]]:
    """Read the small world's models, and measure PRFL's points and the named methods.

    Return the results, with table and figure of PRFL's points, and relative variances by method.
    """
    s, seed = SETTINGS, 100 * context.seed
    sampled = [name for name in names if not name.startswith("PRFL")]
    with small_world.workers(context) as pool:
        start, _ = small_world.prepare(WORLD, context, pool)

        def run(function: Any, label: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
            jobs = [small_world.submit(pool, function, start, s, *each) for each in arguments]
            return small_world.results_of(jobs, context, label)

        groups = [(7000 + seed + i,) for i in range(s.groups)]
        arrays = zip(*run(measure_group, "gradients by step", groups), strict=True)
        sums, within = ([torch.from_numpy(array) for array in each] for each in arrays)
        calls = [(name, 8000 + seed) for name in sampled]
        found = run(measure_method, "variance of methods", calls)
        costs = _costs(start, s)
    methods = dict(zip(sampled, found, strict=True))
    records = point_records(Products(sums, within, s.trajectories), s, costs)
    for method in plans.METHODS:
        if method.name in names and method.name not in sampled:
            methods[method.name] = _of_points(records, method.points)
    cases = [{"case": "variance", "forward_flops": costs[0], "point_flops": costs[1]}]
    cases[0]["points"] = records
    for name, estimate in methods.items():
        value, error = (estimate.value, estimate.error) if estimate else (None, None)
        case = {"case": "variance", "method": name, "variance": value, "variance_error": error}
        cases.append(case)
    table, problems = _table(records, s)
    figures = {"variance.png": _figure(records, s)}
    return SuiteResult([table], cases, figures, problems), methods


def _of_points(records: list[dict[str, Any]], points: int) -> Estimate | None:
    """Return the variance of one trajectory's systematic points, if it was measured."""
    wanted = (1, DRAWS[0], points)
    found = (r for r in records if (r["batch"], r["draws"], r["points"]) == wanted)
    return next((Estimate(r["variance"], r["variance_error"]) for r in found), None)


def point_records(products: Products, s: Settings, costs: tuple[int, int]) -> list[dict[str, Any]]:
    """Return variance, FLOPs, and their product over that of 1 point, by draws, points and batch.

    Standard errors come from leaving out one group of trajectories at a time.
    """
    everything = [products.moments()]
    everything += [products.moments(leave=i) for i in range(len(products.within))]
    one = GradientPlan.prfl(1)
    base = second_moment(one, s.num_inference_steps)
    unit = expected_flops(one, s.num_inference_steps, *costs)
    records: list[dict[str, Any]] = []
    for batch, draws, points in itertools.product(s.batches, DRAWS, s.points):
        plan = GradientPlan.prfl(points, draws)
        a = second_moment(plan, s.num_inference_steps)
        flops = expected_flops(plan, s.num_inference_steps, *costs)
        own = [variance(a, w, c, batch) for w, c in everything]
        ones = [variance(base, w, c, batch) for w, c in everything]
        ratios = [v * flops / (u * unit) for v, u in zip(own, ones, strict=True)]
        record = {"batch": batch, "draws": draws, "points": points, "flops": flops}
        for name, (value, *left) in (("variance", own), ("per_flop", ratios)):
            record |= {name: value, f"{name}_error": jackknife(left)}
        records.append(record)
    return records


def _table(records: list[dict[str, Any]], s: Settings) -> tuple[Table, list[str]]:
    found = {(r["batch"], r["draws"], r["points"]): r for r in records}
    body, problems = [], []
    for points in s.points:
        line = [str(points), report.flops(found[s.batches[0], DRAWS[0], points]["flops"])]
        line += [report.number(found[b, DRAWS[0], points]["variance"], 2) for b in s.batches]
        for draws, batch in itertools.product(DRAWS, s.batches):
            r = found[batch, draws, points]
            error = "" if points == 1 else f" ± {r['per_flop_error']:.2f}"
            line.append(f"{r['per_flop']:.2f}{error}")
        body.append(line)
    several = [r for r in records if r["points"] == plans.POINTS and r["draws"] == DRAWS[0]]
    for r in several:
        if not r["per_flop"] + 2 * r["per_flop_error"] < 1:
            problems.append(
                f"batch {r['batch']}: at equal FLOPs {plans.POINTS} points have "
                f"{r['per_flop']:.2f} ± {r['per_flop_error']:.2f} times the variance of 1 point, "
                "expected below 1 by two standard errors"
            )
    columns = ["points", "FLOPs", *(f"variance, batch {b}" for b in s.batches)]
    columns += [f"at equal FLOPs, batch {b}" for b in s.batches]
    columns += [f"independent draws, batch {b}" for b in s.batches]
    trajectories = s.groups * s.trajectories
    notes = [
        "The small world's trained generator and latent reward; all parameters, "
        f"{s.num_inference_steps} UniPC steps.",
        "variance: E‖ĝ - g‖² / ‖g‖² of one call, from the gradients at every step of "
        f"{trajectories} trajectories. A batch shares its drawn steps, as ranks do. FLOPs: of a "
        "call with one trajectory, on average.",
        "at equal FLOPs: variance times FLOPs, 1 point = 1, systematic draws and independent ones; "
        f"± one standard error, by leaving out {s.trajectories} trajectories at a time.",
    ]
    title = "Variance of PRFL's gradient by points per trajectory"
    return Table("variance", title, columns, body, notes), problems


def _figure(records: list[dict[str, Any]], s: Settings) -> Any:
    figure, (left, right) = report.new_figure(10, 4, ncols=2)
    styles = {"systematic": ("#0072b2", "o"), "independent": ("#e69f00", "s")}
    for batch, dashes in zip(s.batches, ("-", "--"), strict=False):
        for draws, (color, marker) in styles.items():
            rows = [r for r in records if (r["batch"], r["draws"]) == (batch, draws)]
            points = [r["points"] for r in rows]
            style = {"color": color, "marker": marker, "markersize": 4, "linestyle": dashes}
            label = f"{draws}, batch {batch}"
            left.plot(points, [r["variance"] for r in rows], label=label, **style)
            values, errors = ([r[n] for r in rows] for n in ("per_flop", "per_flop_error"))
            right.errorbar(points, values, errors, capsize=2, elinewidth=0.8, **style)
    titles = (
        "Variance of a call's gradient over its squared mean",
        "At equal FLOPs: variance × FLOPs, 1 point = 1",
    )
    left.set_yscale("log")
    right.set_ylim(bottom=0)
    for axes, title in zip((left, right), titles, strict=True):
        axes.set_xticks(list(s.points))
        report.label_axes(axes, title=title, x="gradient points of a trajectory")
    left.legend(fontsize=8)
    best = min(records, key=lambda r: r["per_flop"])
    figure.suptitle(
        f"At equal FLOPs, {best['points']} {best['draws']} points have {best['per_flop']:.2f} "
        f"times the variance of one (batch {best['batch']})\n"
        f"PRFL in the small world, {s.num_inference_steps} steps, gradients of all parameters",
        fontsize=11,
    )
    return figure
