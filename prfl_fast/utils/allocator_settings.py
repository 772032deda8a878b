"""Read the setting of PyTorch's CUDA allocator that reduces fragmentation."""

import os

EXPANDABLE = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"


def expandable_segments() -> bool:
    """Return True if the environment turns expandable segments on."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    parts = ",".join(os.environ.get(name, "") for name in names).lower().split(",")
    return "expandable_segments:true" in [part.replace(" ", "") for part in parts]
