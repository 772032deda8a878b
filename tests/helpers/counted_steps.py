"""Bytes of PRFL steps on real tensors, counted, to compare with those that the planner predicts."""

import torch
from plans import prepared

from prfl_fast.feedback.step import PRFL
from prfl_fast.memory.ledger import Ledger
from prfl_fast.memory.optimizers import make_optimizer, state_bytes
from prfl_fast.memory.stream import waiting_weights
from prfl_fast.planning.built_models import build, stream_models
from prfl_fast.rollout.schedulers import FlowUniPC
from prfl_fast.training.objectives import reward_call, velocity_call


def latest_draw(plan, steps):
    """Return the points of a plan's latest and deepest draw."""
    return max((p for _, p in plan.outcomes(steps)), key=lambda p: (p[-1].step, p[-1].depth))


def counted(workload, memory, reward_memory):
    """Return the device bytes at the peak of a PRFL step, before the optimizer's own step."""
    generator, reward = prepared(*build(workload, memory, reward_memory))
    stream_models(generator, reward, memory, reward_memory)
    parameters = [p for p in generator.parameters() if p.requires_grad]
    kind = memory.optimizer
    make_optimizer(kind, parameters, learning_rate=1e-5, gradient_dtype=memory.gradient_dtype)
    velocity, score = velocity_call(generator, "fp32"), reward_call(reward, "fp32")
    plan, steps = workload.gradient_plan, workload.num_inference_steps
    options = {"num_inference_steps": steps, "divergence": float(workload.divergence)}
    prfl = PRFL(velocity, score, FlowUniPC(), plan=plan, **options)
    text = (1, workload.text_tokens, workload.config["text_dim"])
    conditions = {"encoder_hidden_states": torch.randn(text)}
    held = [*conditions.values()]
    waiting = set()
    for model in (generator, reward):
        held += [*model.parameters(), *model.buffers()]
    if memory.stream_weights is not None:
        streamed = [*waiting_weights(generator), *waiting_weights(reward.backbone)]
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
