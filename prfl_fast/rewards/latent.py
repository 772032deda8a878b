"""Latent reward model (PAVRM, arXiv 2511.21541): scores noisy video latents without decoding.

A copy of the generator's embeddings and first blocks reads the latents, a query pool reads the
tokens after the last of these blocks, and a small network maps the pooled vector to one number per
video. The model is saved as one folder, or in the layout of HY-Video-PRFL, the paper's code.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from prfl_fast.models.adapter import Adapter
from prfl_fast.models.loading import build_headless_wan
from prfl_fast.models.other import VelocityAdapter
from prfl_fast.models.registry import adapter_by_name, find_adapter
from prfl_fast.models.sequence import shards_of
from prfl_fast.models.velocity import check_finite, checks_values
from prfl_fast.rewards.pooling import QueryAttentionPool, RewardHead
from prfl_fast.rewards.reference_checkpoint import (
    POOL_HEADS,
    RETURN_TYPES,
    check_replaceable,
    read_blocks,
    read_settings,
)
from prfl_fast.utils.checks import check, plain
from prfl_fast.utils.digests import DIGESTS, check_folder, write_digests
from prfl_fast.utils.io import (
    check_fit,
    load_tensors,
    read_json,
    save_checkpoint_dir,
    save_tensors,
    write_atomic,
)
from prfl_fast.utils.modules import unwrap
from prfl_fast.utils.optional import need
from prfl_fast.utils.shards import SHARD_BYTES, SHARD_FILES, read_state, save_shards
from prfl_fast.utils.version import __version__

FORMAT = "prfl_fast reward 1"
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"

_Path = str | os.PathLike[str]


@contextlib.contextmanager
def _configuration(path: Path) -> Iterator[None]:
    """Name the file in errors of its content."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        text = f"{path}: not the configuration of a reward model: {reason}"
        raise ValueError(text) from error


def check_saved(folder: _Path) -> dict[str, Any]:
    """Return the configuration of a saved reward model, without reading its weights.

    Raises:
        FileNotFoundError: if the folder or a file in it is missing.
        ValueError: if the configuration is not that of a reward model.
    """
    path, weights = Path(folder) / _CONFIG, Path(folder) / _WEIGHTS
    if not path.is_file():
        inside = Path(folder) / "reward"  # a run of train-reward has it there
        hint = f", but {inside} is" if (inside / _CONFIG).is_file() else ""
        what = f"{folder} is not a saved reward model{hint}"
        raise FileNotFoundError(f"{path}: no such file. {what}")
    with _configuration(path):
        config = read_json(path)
        check(config["format"] == FORMAT, "format", config["format"], repr(FORMAT))
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: no such file")
    return config  # type: ignore[no-any-return]


class LatentRewardModel(nn.Module):
    """Score noisy latents: ``r(x_σ, t, c)`` in (0, 1).

    A new model has frozen embeddings and trainable blocks, pool and head. :meth:`freeze` makes it a
    fixed reward. A cast to half precision applies to the backbone only; pool and head stay float32.
    ``prfl_fast.patch(reward.backbone)`` runs the backbone on fused kernels.

    Args:
        backbone: embeddings and blocks of a supported transformer, not copied.
        pool, head: modules of the backbone's width.

    Raises:
        TypeError: if the backbone is not supported.
        ValueError: if the widths differ.
    """

    def __init__(self, backbone: nn.Module, pool: QueryAttentionPool, head: RewardHead) -> None:
        super().__init__()
        self._adapter: Adapter = find_adapter(backbone)
        dim = self._adapter.hidden_size(backbone)
        for name, width in (("pool", pool.queries.shape[1]), ("head", head.fc1.in_features)):
            check(width == dim, f"width of {name}", width, f"the backbone's {dim}")
        self.backbone, self.pool, self.head = backbone, pool, head
        for part in (pool, head):
            if next(part.parameters()).dtype.itemsize < 4:
                part.float()
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        for module in self._adapter.embedding_modules(backbone):
            module.requires_grad_(False)

    @classmethod
    def from_backbone(
        cls, transformer: nn.Module, num_blocks: int = 8, num_heads: int = 8, num_queries: int = 1
    ) -> "LatentRewardModel":
        """Copy the embeddings and first blocks of a generator; pool and head start at random.

        The generator does not change. The copy has its dtypes and device, and is patched if the
        generator is.

        Args:
            num_blocks: blocks to copy.
            num_heads, num_queries: heads and learned queries of the pool.

        Raises:
            TypeError: if the transformer is not supported.
            ValueError: if ``num_blocks`` is not between 1 and the generator's number of blocks, or
                ``num_heads`` does not divide the width.
        """
        adapter = find_adapter(transformer)
        dim = adapter.hidden_size(transformer)
        device = next(transformer.parameters()).device
        pool = QueryAttentionPool(dim, num_heads, num_queries).to(device)
        return cls(
            adapter.backbone(transformer, plain(num_blocks)), pool, RewardHead(dim).to(device)
        )

    @property
    def num_blocks(self) -> int:
        """Number of blocks in the backbone; the pool reads the residual stream after the last."""
        return len(self._adapter.blocks(self.backbone))

    def logits(
        self, x: torch.Tensor, timestep: torch.Tensor, conditions: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return scores before the sigmoid, ``[B]``, float32 (float64 if pool and head are).

        Args:
            x: noisy latents ``[B, C, F, H, W]``, any floating dtype.
            timestep: 1000·σ, in [0, 1000], ``[B]`` or 0-d for all.
            conditions: ``encoder_hidden_states`` ``[B, T, C]``, and for image-to-video models
                ``encoder_hidden_states_image`` ``[B, 257, 1280]`` and ``latent_condition`` ``[B,
                C', F, H, W]``.

        Raises:
            ValueError: if the backbone does not take the shapes or dtypes, or values are not finite
                or out of range. Values are not checked if ``x`` requires a gradient.
        """
        conditions = dict(conditions) if isinstance(conditions, Mapping) else conditions
        self._adapter.check_latents(self.backbone, x, conditions)
        ok = isinstance(timestep, torch.Tensor) and timestep.shape in ((), x.shape[:1])
        check(ok, "timestep", timestep, f"a tensor [{len(x)}] or 0-d, 1000 times sigma")
        # Latents that require a gradient come from a generator: the training loop must see a
        # non-finite loss to skip the step.
        if checks_values() and not x.requires_grad:
            check_finite("x", x)
            if not bool(((timestep >= 0) & (timestep <= 1000)).all()):
                values = timestep.flatten().tolist()[:5]
                check(False, "timestep", values, "1000 times sigma, in [0, 1000]")
        features = self._adapter.features(self.backbone, x, timestep, conditions, self.num_blocks)
        features = features.contiguous()  # unpatched blocks keep a transposed stream
        shards = shards_of(unwrap(self.backbone))
        part: tuple[Any, ...] = (features,)
        if shards is not None:  # padding is at the end
            part = (features[:, : shards.own_length], shards.group)
        # The caller's autocast applies to the blocks; pool and head keep their own dtype.
        with torch.autocast(x.device.type, enabled=False):
            return self.head(self.pool(*part))

    def forward(
        self, x: torch.Tensor, timestep: torch.Tensor, conditions: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return scores ``[B]`` in (0, 1); arguments and errors of :meth:`logits`."""
        return torch.sigmoid(self.logits(x, timestep, conditions))

    def freeze(self) -> "LatentRewardModel":
        """Stop training every parameter, switch to eval mode, and return the model itself."""
        return self.requires_grad_(False).eval()

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> "LatentRewardModel":
        # All moves and casts of a module call _apply. Pool and head move but stay float32: they are
        # under 1 % of the work, and bf16 would round the score, one number, to 8 bits.
        def keep_wide(tensor: torch.Tensor) -> torch.Tensor:
            out = fn(tensor)
            narrowed = out.is_floating_point() and out.dtype.itemsize < 4
            return tensor.to(out.device) if narrowed else out

        self.backbone._apply(fn, recurse)
        self.pool._apply(keep_wide, recurse)
        self.head._apply(keep_wide, recurse)
        return self

    def save(self, folder: _Path, *, write: Callable[[Any, Path], object] | None = None) -> None:
        """Write ``config.json``, ``model.safetensors`` and ``digests.json``, all or nothing.

        An earlier reward model in ``folder`` is replaced. :meth:`load` reads it back. ``write``
        writes a state dict to a file; that of a sharded model gathers the tensors.

        Raises:
            ValueError: if ``folder`` holds other files, or the backbone has tensors that its class
                does not have (``prfl_fast.training.merge_lora(reward.backbone)`` first; save before
                quantizing).
            OSError: if it cannot be written.
        """
        config = self.check_savable(folder)
        state = self.state_dict()
        with save_checkpoint_dir(folder) as temporary:
            (write or save_tensors)(state, temporary / _WEIGHTS)
            (temporary / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            write_digests(temporary, (_CONFIG, _WEIGHTS))

    def check_savable(self, folder: _Path) -> dict[str, Any]:
        """Return the configuration that :meth:`save` writes; raise its ``ValueError`` if any."""
        need("safetensors.torch")
        check_replaceable(folder, *map(re.escape, (_CONFIG, _WEIGHTS, DIGESTS)))
        config = {
            "format": FORMAT,
            "prfl_fast": __version__,
            "torch": torch.__version__,
            "class": self._adapter.name,
            "num_blocks": self.num_blocks,
            "num_heads": self.pool.multihead_attn.num_heads,
            "num_queries": self.pool.queries.shape[0],
            "add_query": self.pool.add_query,
            "backbone": self._adapter.backbone_config(self.backbone),
        }
        if config["class"] == VelocityAdapter.name:  # only the caller of load can rebuild it
            modules = self.backbone.named_modules()
            extra = [n for n, m in modules if hasattr(m, "base_layer") or hasattr(m, "qweight")]
            hint = "Merge adapters first, and save before quantizing"
            check(not extra, "adapted or quantized layers", extra[:3], "none", hint=hint)
            return config
        with torch.device("meta"):
            expected = _from_config(config).state_dict()
        check_fit(expected, self.state_dict(), "this reward model cannot be saved")
        return config

    @classmethod
    def load(cls, folder: _Path, transformer: nn.Module | None = None) -> "LatentRewardModel":
        """Read a folder of :meth:`save` to the CPU, in the saved dtypes, as a new unpatched model.

        Args:
            transformer: a generator of the same size, left unchanged, from which the backbone is
                rebuilt. Only a reward of a :class:`prfl_fast.models.VelocityModel` needs it.

        Raises:
            FileNotFoundError: if the folder or a file in it is missing.
            ValueError: if the configuration is not that of a reward model, the tensors do not fit
                it, or a file is damaged.
        """
        config, weights = check_saved(folder), Path(folder) / _WEIGHTS
        with _configuration(Path(folder) / _CONFIG):
            reward = _from_config(config, transformer)
        tensors = load_tensors(weights)
        check_fit(reward.state_dict(), tensors, weights)
        check_folder(Path(folder), (_CONFIG, _WEIGHTS), "reward model")
        # Tensors inside the file's buffer are not aligned, and matrix products of unaligned weights
        # can differ in the last bit, so the weights are cloned.
        reward.load_state_dict({n: t.clone() for n, t in tensors.items()}, assign=True)
        return reward

    def save_reference(
        self, folder: _Path, step: int = 0, *, shard_bytes: int = SHARD_BYTES
    ) -> tuple[Path, Path, Path]:
        """Write the layout of HY-Video-PRFL, for its trainers and for :meth:`load_reference`.

        ``checkpoints/checkpoint-<step>/`` holds the backbone as safetensors under official Wan's
        names, ``mlp/mlp_step_<step>.ckpt`` the head, ``mlp/query_attention_step_<step>.ckpt`` the
        pool. Each of the three is written atomically.

        Args:
            folder: folder of the training run.
            step: training step; HY-Video-PRFL reads it from the names when it resumes.
            shard_bytes: largest size of a file; a larger backbone is split and gets an index.

        Returns:
            The paths of backbone, head and pool.

        Raises:
            ValueError: if the backbone's folder holds other files.
            OSError: if it cannot be written.
        """
        checkpoint = Path(folder) / "checkpoints" / f"checkpoint-{step}"
        check_replaceable(checkpoint, re.escape(_CONFIG), SHARD_FILES)
        state = self._adapter.to_reference(self.backbone.state_dict())
        config = self._adapter.reference_config(self.backbone)
        config["return_type"] = RETURN_TYPES[not self.pool.add_query]
        config[POOL_HEADS] = self.pool.multihead_attn.num_heads
        with save_checkpoint_dir(checkpoint) as temporary:
            save_shards(state, temporary, shard_bytes)
            (temporary / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        head, pool = (
            Path(folder) / "mlp" / f"{name}_step_{step}.ckpt" for name in ("mlp", "query_attention")
        )
        head.parent.mkdir(parents=True, exist_ok=True)
        for path, part in ((head, self.head), (pool, self.pool)):
            with write_atomic(path) as file:
                torch.save({k: v.detach().cpu() for k, v in part.state_dict().items()}, file)
        return checkpoint, head, pool

    @classmethod
    def load_reference(
        cls,
        transformer: nn.Module | None,
        transformer_folder: _Path,
        mlp_file: _Path,
        pool_file: _Path,
        *,
        num_blocks: int | None = None,
        num_heads: int | None = None,
        return_type: Literal["query", "attention"] | None = None,
    ) -> "LatentRewardModel":
        """Read a reward model trained by HY-Video-PRFL (``pool: q_attn``).

        Args:
            transformer: a generator of the same size, left unchanged; the reward has its structure,
                dtypes and device. None takes structure and dtypes from the folder.
            transformer_folder: safetensors under official Wan's names; a head is ignored.
            mlp_file: the head's ``fc1``, ``fc2``, ``fc3``; safetensors, or a state dict of
                ``torch.save``, plain or under the key ``"state_dict"``.
            pool_file: the pool's ``queries`` and ``multihead_attn``, in the same formats.
            num_blocks: number of blocks to read; None reads all blocks of the folder.
            num_heads: heads of the pool; None reads it where :meth:`save_reference` writes it, else
                takes 8, as in published configurations.
            return_type: of the pool: ``"query"`` adds the query to the attention's result, as all
                published configurations do, ``"attention"`` does not. None reads it from the
                folder's ``config.json``, where :meth:`save_reference` writes it.

        Raises:
            TypeError: if the transformer is not supported.
            FileNotFoundError: if a file or folder is missing.
            ValueError: if a file is not a state dict, a tensor is missing, unexpected or has the
                wrong shape, or ``return_type`` is neither given nor stored.
        """
        folder = Path(transformer_folder)
        state, found = read_blocks(folder, num_blocks)
        settings = read_settings(folder)
        if transformer is None:
            transformer = build_headless_wan(state, settings, folder)
        adapter = find_adapter(transformer)
        kind = return_type or settings.get("return_type")
        num_heads = num_heads or int(settings.get(POOL_HEADS, 8))
        expected = "'query' or 'attention'"
        hint = "The files do not tell; published configurations have return_type: query"
        check(kind in RETURN_TYPES, "return_type", kind, expected, hint=hint)
        head_state, pool_state = read_state(mlp_file), read_state(pool_file)
        queries = pool_state.get("queries")
        # A pool file of another form fails in check_fit below, which names its tensors.
        num_queries = queries.shape[0] if queries is not None and queries.ndim == 2 else 1
        reward = cls.from_backbone(transformer, found, num_heads, num_queries)
        reward.pool.add_query = kind == "query"
        loads = (
            (reward.backbone, adapter.from_reference(state), transformer_folder),
            (reward.head, head_state, mlp_file),
            (reward.pool, pool_state, pool_file),
        )
        for module, tensors, source in loads:
            check_fit(module.state_dict(), tensors, source)
        for module, tensors, _ in loads:
            module.load_state_dict(tensors)
        return reward


def _from_config(config: dict[str, Any], transformer: nn.Module | None = None) -> LatentRewardModel:
    """Build a model of a saved configuration, with random weights or those of a transformer."""
    adapter = adapter_by_name(config["class"])
    if transformer is None:
        backbone = adapter.backbone_from_config(config["backbone"])
    else:
        name = find_adapter(transformer).name
        check(name == adapter.name, "adapter of transformer", name, f"the saved {adapter.name}")
        backbone = adapter.backbone(transformer, config["num_blocks"]).cpu()
    blocks = len(adapter.blocks(backbone))
    saved = config["num_blocks"]
    check(blocks == saved, "num_blocks", saved, f"the backbone's {blocks}")
    dim = adapter.hidden_size(backbone)
    pool = QueryAttentionPool(dim, config["num_heads"], config["num_queries"])
    pool.add_query = bool(config.get("add_query", True))
    return LatentRewardModel(backbone, pool, RewardHead(dim))
