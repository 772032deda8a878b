"""Drop-in: run a foreign model on prfl_fast's kernels, and back."""

from typing import TypeVar

from torch import nn

from prfl_fast.adapters import find_adapter

Model = TypeVar("Model", bound=nn.Module)


def patch(model: Model) -> Model:
    """Make this instance run on fused kernels: same outputs, same parameters, same ``state_dict``.

    Only this instance changes, importing prfl_fast changes nothing. Patching twice is patching
    once. Adapters
    (peft) may be added before or after; ``gradient_checkpointing`` keeps working.

    Args:
        model: a supported transformer, possibly wrapped by peft, torch.compile or
            DistributedDataParallel.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: the model is not supported; the message lists what is.
        ValueError: the model is in a state that patching would break (the message says which and
            what to do).
    """
    find_adapter(model).patch(model)
    return model


def unpatch(model: Model) -> Model:
    """Undo :func:`patch`; a model that is not patched is left as it is.

    Raises:
        TypeError: the model is not supported.
    """
    find_adapter(model).unpatch(model)
    return model
