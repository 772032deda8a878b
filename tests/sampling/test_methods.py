"""Methods by name: their cost, printed before the work, is what they take."""

import pytest
import torch
from search_loops import seeded
from toy_flow import CONDITIONS, NEGATIVE, NOISE, reward, velocity

from prfl_fast.rollout.guidance import Guidance
from prfl_fast.rollout.sampler import Sampler
from prfl_fast.rollout.schedulers import FlowEuler
from prfl_fast.sampling.methods import METHODS, make_method

GIVEN = {
    "best-of": {"candidates": 3},
    "prune": {"candidates": 5, "keep": {"2": 0.5, "6": 1}},
    "beam": {"beams": 2, "candidates": 3, "lookahead": 2},
    "reno": {"iterations": 3},
    "guide": {"weight": 2.0},
}


@pytest.mark.cases(4)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_the_cost_is_what_the_method_takes(name, guided):
    steps = 8
    guidance = Guidance(2.0, NEGATIVE, batched=False) if guided else None
    sampler = Sampler(velocity, FlowEuler(3.0), steps, guidance)
    method = make_method(name, GIVEN[name], steps)
    latents, scores, taken = method.run(sampler, reward, NOISE, CONDITIONS, seeded())
    each = method.cost(steps, 2 if guided else 1)
    assert taken == tuple(len(NOISE) * count for count in each)
    assert latents.shape == NOISE.shape
    if name == "guide":
        assert scores is None
    else:
        zero = torch.zeros(2, dtype=torch.float64)
        assert torch.allclose(scores, reward(latents, zero, CONDITIONS))


def test_defaults_fit_any_number_of_steps():
    assert make_method("prune", {}, 20).options["keep"] == {2: 0.4, 6: 0.4, 11: 0.5}
    for steps in (1, 2, 3, 20):
        for name in METHODS[: -1 if steps == 1 else None]:
            make_method(name, {"weight": 1.0} if name == "guide" else {}, steps)
    with pytest.raises(ValueError, match="num_inference_steps is 1, expected enough"):
        make_method("guide", {"weight": 1.0}, 1)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("best", {}, "method is 'best', expected one of"),
        ("best-of", {"keep": {}}, "an option of method best-of is 'keep', expected one of cand"),
        ("best-of", {"candidates": 0}, "candidates is 0, expected a positive integer"),
        ("prune", {"keep": {"9": 1}}, "the steps of keep"),
        ("guide", {}, "weight of method guide is None"),
        ("guide", {"weight": -1}, "weight is -1"),
        ("beam", {"eta": 5}, "eta is 5"),
        ("reno", {"learning_rate": -1}, "learning_rate is -1"),
    ],
)
def test_bad_options_are_refused(name, given, message):
    with pytest.raises(ValueError, match=message):
        make_method(name, given, 8)
