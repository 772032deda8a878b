"""Bytes of PRFL steps on real tensors, counted, to compare with those that the planner predicts."""

import torch
from plans import prepared

from prfl_fast.feedback.step import PRFL
from prfl_fast.memory.ledger import Ledger
from prfl_fast.memory.optimizers import make_optimizer, state_bytes
from prfl_fast.memory.stream import waiting_weights
from prfl_fast.planning.built_models import build, stream_models
from prfl_fast.rewards.functions import RewardEnsemble
from prfl_fast.rollout.guidance import Guidance
from prfl_fast.rollout.schedulers import FlowUniPC
from prfl_fast.training.objectives import reward_call, velocity_call


def latest_draw(plan, steps):
    """Return the points of a plan's latest and deepest draw."""
    return max((p for _, p in plan.outcomes(steps)), key=lambda p: (p[-1].step, p[-1].depth))


def counted(workload, memory, reward_memory):
    """Return the device bytes at the peak of a PRFL step, before the optimizer's own step."""
    generator, rewards = prepared(*build(workload, memory, reward_memory))
    stream_models(generator, rewards, memory, reward_memory)
    parameters = [p for p in generator.parameters() if p.requires_grad]
    kind = memory.optimizer
    make_optimizer(kind, parameters, learning_rate=1e-5, gradient_dtype=memory.gradient_dtype)
    models = iter(rewards)
    calls = [[reward_call(next(models), "fp32") for _ in names] for names in workload.rewards]
    scores = {
        f"{n}": RewardEnsemble(members, "worst") if len(members) > 1 else members[0]
        for n, members in enumerate(calls)
    }
    plan, steps = workload.gradient_plan, workload.num_inference_steps
    options = {"num_inference_steps": steps, "divergence": float(workload.divergence)}
    text = (workload.text_tokens, workload.config["text_dim"])
    conditions = {"encoder_hidden_states": torch.randn(workload.batch_size, *text)}
    held = [*conditions.values()]
    if workload.guidance is not None:
        negative = {"encoder_hidden_states": torch.randn(1, *text)}
        held += negative.values()
        options["guidance"] = Guidance(5.0, negative, workload.guidance == "batched")
    prfl = PRFL(velocity_call(generator, "fp32"), scores, FlowUniPC(), plan=plan, **options)
    waiting = set()
    for model in (generator, *rewards):
        held += [*model.parameters(), *model.buffers()]
    if memory.stream_weights is not None:
        bases = (generator, *(reward.backbone for reward in rewards))
        streamed = [weights for base in bases for weights in waiting_weights(base)]
        waiting = {id(p) for weights in streamed for p in weights.parameters()}
        held += [slot.memory for slot in streamed[0].slots.order]
    states = sum(state_bytes(kind, p.shape, p.dtype)[0] for p in parameters)
    before = states + sum(t.nbytes for t in held if id(t) not in waiting)
    points, shape = latest_draw(plan, steps), workload.latent_shape
    with Ledger(open_operations=True) as ledger:
        for _ in range(workload.gradient_accumulation_steps):
            noise = torch.randn(shape)
            latents = torch.randn(shape) if plan.start == "data" else None
            assert prfl(noise, conditions, latents=latents, indices=points).finite
            del noise, latents
    return before + ledger.peak
