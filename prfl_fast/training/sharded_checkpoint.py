"""Save and load the tensors of sharded weights with torch.distributed.checkpoint.

Each rank writes its parts as safetensors into the folder ``sharded`` of a checkpoint, and reads the
parts of its own shards back, on any number of ranks or in one process. Nothing is unpickled but
plain values and tensors. The names of tensors begin with ``model.``, ``optimizer.`` or ``ema.``.

States of 8 bits share scales among the elements of a rank's part, so they belong to that part:
each rank has a file of them, and they are read on the same mesh only.
"""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from prfl_fast.parallel.ranks import Ranks
from prfl_fast.utils.checks import check
from prfl_fast.utils.io import check_fit, digest_of, load_pickled
from prfl_fast.utils.sharded import is_dtensor, like_sharded, local_part, own_rows, sharding_of
from prfl_fast.utils.shards import SHARD_BYTES, write_tensors

FOLDER = "sharded"
MODEL, OPTIMIZER, EMA = "model.", "optimizer.", "ema."
_QUANTIZED = "quantized-{:05d}.pt"


def any_sharded(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Return True if a tensor is sharded over ranks."""
    return any(map(is_dtensor, tensors.values()))


def copy_into(
    tensors: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor], source: object
) -> None:
    """Copy ``tensors`` into ``targets`` in place; errors name the file ``source``.

    Raises:
        ValueError: if names, shapes or dtypes differ. No target is changed then.
    """
    check_fit(targets, tensors, source, dtypes=True)
    with torch.no_grad():
        for name, target in targets.items():
            tensor = tensors[name]
            for dim, stride in enumerate(target.stride()):
                if stride == 0 and target.shape[dim] > 1:  # expanded, which copy_ cannot write
                    target, tensor = target.narrow(dim, 0, 1), tensor.narrow(dim, 0, 1)
            local_part(target).copy_(own_rows(tensor, target))


def write_gathered(
    tensors: Mapping[str, torch.Tensor],
    path: Path,
    ranks: Ranks,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write whole tensors to one safetensors file on rank 0, gathered one by one.

    No rank holds more than one whole tensor. All ranks call it with the same names.

    Raises:
        OSError: if rank 0 cannot write the file; the other ranks know of it.
    """
    left, error = dict(tensors), None
    if ranks.main:
        try:
            write_tensors(left, path, lambda name, tensor: whole(tensor), metadata)
        except OSError as raised:  # the other ranks wait for this one in the next gather
            error = raised
    for name in sorted(left, key=lambda name: -left[name].element_size()):
        whole(left[name])
    ranks.agree(error=error)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the parts of all ranks, which all call it."""
    with torch.no_grad():
        return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined, no-any-return]


def split_optimizer(
    saved: Mapping[str, Any], ranks: Ranks
) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Split an optimizer's ``state_dict`` into the rest, sharded tensors, and those of 8 bits."""
    rest: dict[Any, dict[str, Any]] = {}
    parts: dict[str, torch.Tensor] = {}
    for index, state in saved["state"].items():
        rest[index] = {n: v for n, v in state.items() if not is_dtensor(v)}
        parts |= {f"{OPTIMIZER}{index}.{n}": v for n, v in state.items() if is_dtensor(v)}
    # A small part may have full precision on one rank, and a large one 8 bits on another.
    own = {n for n, v in parts.items() if is_traceable_wrapper_subclass(local_part(v))}
    narrow = set().union(*ranks.gather(own))
    quantized = {n: local_part(parts.pop(n)) for n in sorted(narrow)}
    return {**saved, "state": rest}, parts, quantized


def plan_parts(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    quantized: Mapping[str, torch.Tensor],
    ranks: Ranks,
    copied: bool = False,
) -> Callable[[], dict[str, str]]:
    """Agree on the files of all ranks; return a function that writes this rank's into ``folder``.

    The function returns the digests of the files, raises ``OSError`` if it cannot write, and calls
    no other rank. With ``copied`` it writes copies in host memory that are made now.

    Raises:
        OSError: on every rank, if one of them cannot plan.
    """
    files, nbytes, parts = {}, 0, 1
    for name, tensor in tensors.items():
        sharding = sharding_of(tensor)
        if sharding is not None:
            mesh, placements = sharding
            sizes = (mesh.size(d) for d, p in enumerate(placements) if p.is_shard())
            parts = next(iter(sizes), 1)
        nbytes += tensor.numel() * tensor.element_size() // parts
        # A rank holds a file's bytes in memory while it writes them, so files are small.
        files[name] = 1 + nbytes // SHARD_BYTES
    ranks.on_main(folder.mkdir)
    numbers = {number: i for i, number in enumerate(sorted(set(files.values())), 1)}
    mapping = {name: numbers[number] for name, number in files.items()}
    with _dcp(folder, "written") as dcp:
        writer, write_parts = _planning_writer(dcp, folder, mapping, copied)
        dcp.save(dict(tensors), storage_writer=writer, process_group=ranks.group)
    states = io.BytesIO()
    if quantized:
        torch.save(dict(quantized), states)

    def write() -> dict[str, str]:
        digests = {}
        try:
            write_parts()
            if quantized:
                (folder / _QUANTIZED.format(ranks.rank)).write_bytes(states.getbuffer())
            for pattern in (f"shard-{ranks.rank + 1:05d}-*", _QUANTIZED.format(ranks.rank)):
                for path in sorted(folder.glob(pattern)):
                    digests[f"{FOLDER}/{path.name}"] = digest_of(path)
        except Exception as error:  # safetensors and torch have errors of their own
            raise OSError(f"{folder}: cannot be written: {error}") from error
        return digests

    return write


def _planning_writer(
    dcp: Any, folder: Path, mapping: dict[str, int], copied: bool
) -> tuple[Any, Callable[[], None]]:
    """Return a writer that plans within DCP's save, and a function that then writes the files."""
    planned: list[tuple[Any, Any]] = []

    class Writer(dcp.HuggingFaceStorageWriter):  # type: ignore[misc]
        def write_data(self, plan: Any, planner: Any) -> Any:
            planned.append((plan, _Copies(plan, planner) if copied else planner))
            done: Any = torch.futures.Future()
            done.set_result([])
            return done

    writer = Writer(str(folder), mapping, save_distributed=True)
    if copied:
        writer.per_thread_copy_ahead = 0  # no GPU stream: a thread begins on GPU 0

    def write() -> None:
        for plan, planner in planned:
            super(Writer, writer).write_data(plan, planner).wait()

    return writer, write


class _Copies:
    """Hold copies in host memory of the values that a DCP planner gives to its writer."""

    def __init__(self, plan: Any, planner: Any) -> None:
        found = ((item.index, planner.resolve_data(item)) for item in plan.items)
        self._values = {index: value.detach().to("cpu", copy=True) for index, value in found}

    def resolve_data(self, item: Any) -> torch.Tensor:
        return self._values[item.index]


@contextlib.contextmanager
def _dcp(folder: Path, done: str) -> Iterator[Any]:
    """Yield DCP's module; raise a rank's error in place of DCP's own, which is no ``Exception``.

    The error says that the folder cannot be ``done``, which is read or written.
    """
    import torch.distributed.checkpoint as dcp  # a run on one GPU has no use for it
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            # It warns that one process reads the parts.
            warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)
            yield dcp
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise OSError(f"{folder}: cannot be {done}: rank {rank}: {cause}") from cause


def part_forms(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors in the files of a folder, whole but without values."""
    forms: dict[str, torch.Tensor] = {}
    with _dcp(folder, "read") as dcp:
        metadata = dcp.HuggingFaceStorageReader(str(folder)).read_metadata()
    for name, found in metadata.state_dict_metadata.items():
        forms[name] = torch.empty(found.size, dtype=found.properties.dtype, device="meta")
    return forms


def read_parts(folder: Path, targets: Mapping[str, torch.Tensor], ranks: Ranks) -> None:
    """Read tensors into ``targets`` in place, of which each rank reads its parts.

    Raises:
        ValueError: if names, shapes or dtypes differ. No target is changed then.
    """
    prefixes = {name.partition(".")[0] for name in targets}
    forms = {n: f for n, f in part_forms(folder).items() if n.partition(".")[0] in prefixes}
    check_fit(targets, forms, folder, dtypes=True)
    options: Any = {"process_group": ranks.group, "no_dist": not ranks.several}
    with _dcp(folder, "read") as dcp:
        reader = dcp.HuggingFaceStorageReader(str(folder))
        dcp.load({n: t.detach() for n, t in targets.items()}, storage_reader=reader, **options)


def load_optimizer(
    optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], checkpoint: Path, ranks: Ranks
) -> None:
    """Load states of whole or sharded weights into an optimizer of whole or sharded weights.

    ``saved`` is a ``state_dict`` without the sharded tensors, which are in the ``checkpoint``.

    Raises:
        ValueError: if names, shapes or dtypes differ, or states of 8 bits were saved on another
            mesh or for whole weights.
    """
    numbers = [i for group in saved["param_groups"] for i in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    by_number = dict(zip(numbers, parameters, strict=True))
    states = {i: dict(state) for i, state in saved["state"].items()}
    home, folder = getattr(optimizer, "home", None), checkpoint / FOLDER
    for i, state in states.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.ndim and is_dtensor(by_number[i]):
                state[name] = _split(value, by_number[i], f"{name} of parameter {i}")
            elif isinstance(value, torch.Tensor) and ranks.several:
                state[name] = value.clone()  # the file is mapped
    if folder.is_dir():
        targets = {}
        for key, form in part_forms(folder).items():
            if key.startswith(OPTIMIZER):
                number, name = key.removeprefix(OPTIMIZER).split(".")
                p = by_number[int(number)]
                part = torch.empty_like(local_part(p), dtype=form.dtype, device=home or p.device)
                targets[key] = states.setdefault(int(number), {})[name] = like_sharded(p, part)
        if targets:
            read_parts(folder, targets, ranks)
        _load_quantized(folder, states, by_number, ranks)
    groups = [
        {**{k: old.get(k, v) for k, v in new.items()}, "params": old["params"]}
        for old, new in zip(saved["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({**saved, "state": states, "param_groups": groups})


def load_average(
    ema: Mapping[str, torch.Tensor],
    saved: Mapping[str, torch.Tensor] | None,
    checkpoint: Path,
    ranks: Ranks,
) -> None:
    """Copy the averages of a checkpoint into ``ema``: the whole ones, ``saved``, or the parts.

    Raises:
        ValueError: if names, shapes or dtypes differ.
    """
    if saved is None and (checkpoint / FOLDER).is_dir():
        read_parts(checkpoint / FOLDER, {f"{EMA}{n}": t for n, t in ema.items()}, ranks)
    else:
        copy_into(saved or {}, ema, checkpoint / "ema.safetensors")


def _split(value: torch.Tensor, p: torch.Tensor, label: str) -> torch.Tensor:
    """Return this rank's part of a whole state."""
    whole_only = is_traceable_wrapper_subclass(value)
    hint = "Resume with shard: 1, or start in a new folder"
    kind = f"{type(value).__name__} of a whole weight"
    check(not whole_only, label, kind, "a state of sharded weights, or a plain tensor", hint=hint)
    return like_sharded(p, own_rows(value, p).clone())


def _load_quantized(
    folder: Path,
    states: dict[Any, dict[str, Any]],
    parameters: Mapping[Any, torch.Tensor],
    ranks: Ranks,
) -> None:
    """Add this rank's states of 8 bits, if there are any."""
    count = len(list(folder.glob("quantized-*.pt")))
    if not count:
        return
    hint = "Resume on the mesh that saved them: their scales belong to its parts"
    label = f"ranks with 8-bit optimizer states in {folder}"
    check(count == ranks.size, label, count, f"{ranks.size}, as in this run", hint=hint)
    found = load_pickled(folder / _QUANTIZED.format(ranks.rank))
    bad = ""
    for key, value in found.items():
        number, name = key.removeprefix(OPTIMIZER).split(".")
        p = parameters[int(number)]
        if not is_dtensor(p) or value.shape != local_part(p).shape:
            bad = bad or f"{list(value.shape)} of parameter {number}"
            continue
        states.setdefault(int(number), {})[name] = like_sharded(p, value.to(p.device))
    bad = next(filter(None, ranks.gather(bad)), "")
    check(not bad, f"8-bit optimizer state in {folder}", bad, "this mesh's part", hint=hint)
