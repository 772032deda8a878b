"""Read a transformer's weights so that each rank holds its own parts only."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from prfl_fast.models.loading import read_wan, transformer_class, transformer_folder
from prfl_fast.parallel.sharding import shard
from prfl_fast.utils.io import check_fit
from prfl_fast.utils.sharded import like_sharded, own_rows
from prfl_fast.utils.shards import read_weights

logger = logging.getLogger(__name__)


def load_sharded(
    path: str | os.PathLike[str],
    mesh: DeviceMesh,
    dtype: torch.dtype = torch.float32,
    *,
    prepare: Callable[[nn.Module], object] = lambda model: None,
    **options: Any,
) -> nn.Module:
    """Read a transformer so that each rank reads and holds only its parts; return it in eval mode.

    Add LoRA afterwards: its weights then are whole on each rank, and
    :func:`prfl_fast.parallel.average_gradients` averages their gradients.

    Args:
        path, dtype: see :func:`prfl_fast.models.loading.load_transformer`.
        mesh, options: see :func:`prfl_fast.parallel.shard`.
        prepare: called with the model before it is sharded, when its parameters have no values yet,
            e.g. ``prfl_fast.patch``.

    Raises:
        ValueError: if the files cannot be read, or tensors are missing, unexpected or of another
            shape.
        MissingExtraError: if diffusers is not installed.
    """
    kind, config = transformer_class(path)
    weights: Any
    if kind.__name__ == "WanTransformer3DModel":
        weights = read_wan(path).weights
    else:
        weights = read_weights(transformer_folder(path))
    with _parameters_on_meta():
        model: Any = kind.from_config(config)
    check_fit(model.state_dict(), weights, path)
    wide = set(model._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        target = torch.float32 if wide & set(name.split(".")) else dtype
        parameter.data = parameter.data.to(target)
    prepare(model)
    shard(model, mesh, **options)
    device = torch.device(mesh.device_type)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    state, nbytes = {}, 0
    for name, tensor in model.state_dict().items():
        part = own_rows(weights[name], tensor)
        nbytes += part.nbytes
        # Tensors in a mapped file are not aligned, so they are copied even in the same dtype.
        part = part.to(device, tensor.dtype, copy=True)
        state[name] = like_sharded(tensor, part)
    logger.info("%s: this rank read %d bytes", path, nbytes)
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    model.load_state_dict(state, assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains[name])
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    return model.eval()  # type: ignore[no-any-return]


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Make parameters of new modules without memory; buffers get their values."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
