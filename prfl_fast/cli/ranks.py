"""Ranks of a training run: join them, check how they share a model, read and share it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from prfl_fast.cli import loading
from prfl_fast.cli.config import TrainFile, TrainRewardFile
from prfl_fast.cli.plan import note, planned
from prfl_fast.cli.reward_sections import ReferenceReward
from prfl_fast.memory.policy import MemoryConfig
from prfl_fast.models.registry import patch
from prfl_fast.parallel.launch import check_same_settings, join_ranks
from prfl_fast.parallel.mesh import make_mesh
from prfl_fast.parallel.ranks import Ranks
from prfl_fast.utils.checks import check
from prfl_fast.utils.folder_lock import hold_folder

# Modules of FSDP2 take 1.7 s to import, so functions of a run on one GPU do not import them.


class Job(NamedTuple):
    """Hold the ranks of a run, this rank's device, and the configuration."""

    ranks: Ranks
    device: torch.device
    config: TrainFile | TrainRewardFile

    @property
    def shards_weights(self) -> bool:
        """Return True if several ranks hold one copy of the weights together."""
        return self.ranks.several and self.config.parallel.shard != 1

    def device_for(self, memory: MemoryConfig) -> torch.device | None:
        """Return the device to which a policy moves a model; None if ``shard`` moves its parts."""
        narrow = memory.weight_dtype in ("fp8", "nf4")  # quantized layer by layer on the device
        return None if self.shards_weights and not narrow else self.device

    def check_policy(self, name: str, memory: MemoryConfig) -> None:
        """Raise ``ValueError`` if a policy of section ``name`` does not fit sharded weights."""
        streams, key = memory.stream_weights, f"{name}.stream_weights"
        hint = "A sharded block has its weights on the GPU only while it runs"
        ok = streams is None or not self.shards_weights
        check(ok, key, streams, "null, or parallel.shard: 1", hint=hint)

    def check_sequence(self, folders: Sequence[str]) -> None:
        """Raise ``ValueError`` if the ranks cannot share a sample of the models in folders."""
        mesh = self.ranks.mesh
        sequence = 1 if mesh is None else mesh["sp"].size()
        if mesh is None or sequence == 1:
            return
        from prfl_fast.parallel.sequence import shard_sequence

        patched = self.config.hardware.patch
        check(patched, "hardware.patch", patched, f"true with parallel.sequence: {sequence}")
        for folder in folders:
            try:
                shard_sequence(patch(loading.empty_model(folder)), mesh)
            except (TypeError, ValueError) as error:
                raise ValueError(f"parallel.sequence is {sequence}, but {error}") from error

    def distribute(self, model: nn.Module, memory: MemoryConfig) -> None:
        """Share a model's tokens and weights among the ranks, as the configuration says."""
        if self.ranks.mesh is None:
            return
        from prfl_fast.parallel.distribution import distribute

        precision = self.config.hardware.precision
        distribute(model, self.ranks.mesh, self.config.parallel.build(), memory, precision)

    def load_parts(
        self, folder: str, memory: MemoryConfig, prepare: Callable[[nn.Module], object]
    ) -> nn.Module:
        """Return the model of a folder, of which this rank reads its parts only.

        ``prepare`` gets the model without values, before its tokens and weights are shared.
        """
        from prfl_fast.parallel.distribution import shard_options
        from prfl_fast.parallel.loading import load_sharded
        from prfl_fast.parallel.sequence import shard_sequence

        mesh, parallel = self.ranks.mesh, self.config.parallel.build()
        assert mesh is not None

        def prepared(model: nn.Module) -> None:
            prepare(model)
            if mesh["sp"].size() > 1:
                shard_sequence(model, mesh)

        dtype = torch.float32 if memory.weight_dtype == "fp32" else torch.bfloat16
        options: Any = shard_options(parallel, memory, self.config.hardware.precision)
        try:
            return load_sharded(folder, mesh, dtype, prepare=prepared, **options)
        except (ValueError, OSError) as error:
            raise ValueError(f"model: {error}") from error


@contextlib.contextmanager
def join(config: TrainFile | TrainRewardFile, *, check_only: bool) -> Iterator[Job]:
    """Join the ranks of torchrun, and lock the folder of the run before it is read.

    On several ranks ``memory: auto`` is planned here, as the plan decides their mesh. With
    ``check_only`` nothing is locked.

    Raise ``ValueError`` if the ranks differ in their settings, or a size of the section
    ``parallel`` does not divide their number.
    """
    loading.check_writable(Path(config.out), "out")
    device = loading.device_of(config.hardware)
    with join_ranks(device.type) as own:
        device = device if own is None else own
        check_same_settings(config.model_dump(mode="json"))
        ranks = Ranks(None if own is None else make_mesh(None, device.type))
        with contextlib.ExitStack() as stack:
            if not check_only:
                ranks.on_main(stack.enter_context, hold_folder(config.out))
            if own is not None:
                try:
                    config.parallel.build().sizes(ranks.size)
                except ValueError as error:
                    raise ValueError(f"parallel.{error}") from error
                if config.memory == "auto":
                    config = planned(config, ranks, device)  # type: ignore[type-var]
                shard, sequence = config.parallel.build().sizes(ranks.size)
                sizes = {"shard": shard, "sequence": sequence}  # config.yaml says what auto was
                parallel = config.parallel.model_copy(update=sizes)
                config = config.model_copy(update={"parallel": parallel})
                ranks = Ranks(make_mesh(parallel.build(), device.type))
            yield Job(ranks, device, config)


def reads_parts(job: Job, config: TrainFile, memory: MemoryConfig, experts: bool) -> bool:
    """Return True if each rank reads only its parts of the generator; print the choice."""
    if not job.shards_weights:
        return False
    sources = [source for reward in config.rewards() for source in reward.paths]
    reasons = {
        "it has two experts": experts,
        f"its weights become {memory.weight_dtype}": memory.weight_dtype in ("fp8", "nf4"),
        "a reward is built from it": any(isinstance(s, ReferenceReward) for s in sources),
    }
    reason = next((text for text, holds in reasons.items() if holds), None)
    whole = "each rank reads the whole generator into host memory, as"
    parts = "each rank reads its parts of the generator"
    note(parts if reason is None else f"{whole} {reason}", "train")
    return reason is None
