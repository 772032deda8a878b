"""List values that the command line shares with functions below it, without importing torch."""

from typing import Literal, get_args

# Frames that image-to-video models get.
Condition = Literal["none", "first", "first-last"]
CONDITIONS = get_args(Condition)
# Uses of a reward while sampling.
METHODS = ("best-of", "prune", "beam", "reno", "guide")
# Accuracy of rewards falls along them, from 0.915 to 0.536 in the small world (bench/RESULTS.md).
EVALUATION_TIMESTEPS = (201, 400, 600, 800, 1000)
# Presets of the planner: keys of planning.presets.MODELS and planning.gpu_specs.GPUS.
PLANNED_MODELS = (
    "wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "wan2.1-i2v-14b", "wan2.1-flf2v-14b", "wan2.2-t2v-a14b",
    "wan2.2-i2v-a14b", "wan2.2-ti2v-5b", "hunyuan-video", "hunyuan-video-1.5", "ltx-video",
    "ltx-2", "mochi",
)  # fmt: skip
GPUS = (
    "h200", "h100", "a100", "a100-40gb", "b200", "h20", "l40s", "l4", "rtx3090", "a6000",
    "rtx4090", "rtx5090",
)  # fmt: skip
