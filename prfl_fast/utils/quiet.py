"""Silence messages of other packages in the commands."""

import logging
import os
import re
import warnings

_PACKAGES = (
    "bitsandbytes",
    "diffusers",
    "huggingface_hub",
    "peft",
    "tensorboard",
    "torchao",
    "transformers",
)


def quiet_libraries() -> None:
    """Silence warnings and bars of packages that commands import; errors and exceptions still show.

    Call this function before importing them, and in programs only: it changes loggers, warning
    filters and environment of the whole process.
    """
    for name in (*_PACKAGES, "torch.utils._pytree", "torch.utils.flop_counter"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # diffusers and transformers set the level of their loggers at import, from these variables.
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    # Bars of reading weights, which the commands' own bars would mix with.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    origin = "|".join(map(re.escape, _PACKAGES))
    warnings.filterwarnings("ignore", module=rf"({origin})(\.|$)")
    # torch's deprecation warnings are for the authors of the calling package, not its users.
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=r"torch(\.|$)")
    # Of in-place changes to a model's output, which none of our steps makes.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    # Two warnings for each objective if run.workers is more than the CPUs.
    warnings.filterwarnings("ignore", "This DataLoader will create")
