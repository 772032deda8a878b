"""Python frames from a PRFL call down to a kernel: what a traceback or a debugger walks through."""

import os
import sys

import pytest
from wan import inputs, tiny_wan

import prfl_fast
from prfl_fast import kernels

MOST = 10
PACKAGE, KERNELS = (os.path.dirname(m.__file__) + os.sep for m in (prfl_fast, kernels))


def deepest(run):
    """Return the longest chain of our frames from the first one to the call of a kernel.

    Opening a cached rollout is left out: it runs once for many steps.
    """
    longest = []

    def profile(frame, event, argument):
        nonlocal longest
        if event != "call" or not frame.f_code.co_filename.startswith(KERNELS):
            return
        chain, here = [frame.f_code.co_qualname], frame.f_back
        if here.f_code.co_filename.startswith(KERNELS):
            return
        while here is not None:
            if here.f_code.co_filename.startswith(PACKAGE):
                chain.append(here.f_code.co_qualname)
            here = here.f_back
        if len(chain) > len(longest) and "RolloutEngine.open" not in chain:
            longest = chain[::-1]

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return longest


@pytest.mark.parametrize("cache", [False, True], ids=["plain", "cached"])
def test_at_most_ten_frames_from_a_step_to_a_kernel(cache):
    model = prfl_fast.patch(tiny_wan(layers=1))
    reward = prfl_fast.LatentRewardModel.from_backbone(model, num_blocks=1).freeze()
    config = prfl_fast.RolloutConfig(cache=cache)
    scheduler = prfl_fast.FlowUniPC()
    step = prfl_fast.PRFL(model, reward, scheduler, num_inference_steps=4, rollout=config)
    x, _, conditions = inputs()
    chain = deepest(lambda: step(x, conditions, indices=(2,)))
    print(f"{len(chain)} frames: {' > '.join(chain)}")
    assert chain[0] == "PRFL.__call__" and len(chain) <= MOST
