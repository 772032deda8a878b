"""List values that the command line shares with functions below it, without importing torch."""

from typing import Literal, get_args

# Frames that image-to-video models get.
Condition = Literal["none", "first", "first-last"]
CONDITIONS = get_args(Condition)
# Uses of a reward while sampling.
METHODS = ("best-of", "prune", "beam", "reno", "guide")
# Accuracy of rewards falls along them, from 0.915 to 0.536 in the small world (bench/RESULTS.md).
EVALUATION_TIMESTEPS = (201, 400, 600, 800, 1000)
