"""The latent reward model: how good is this noisy video latent (PAVRM, arXiv 2511.21541)?

Nothing is decoded. A copy of the generator's embeddings and first blocks reads the latents, a query
pool reads the tokens after the last of those blocks, a small network turns the pooled vector into
one number per video. Saved as one folder, and in the layout of HY-Video-PRFL, the paper's released
code.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prfl_fast._extras import need
from prfl_fast._version import __version__
from prfl_fast.adapters import Adapter, adapter_by_name, find_adapter
from prfl_fast.modules import QueryAttentionPool, RewardHead
from prfl_fast.training_state import load_tensors, save_checkpoint_dir, save_tensors, write_atomic

FORMAT = "prfl_fast reward 1"
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_SHARDS = "diffusion_pytorch_model"
_SHARD_BYTES = 5 * 1024**3  # what diffusers and HY-Video-PRFL split at

_Path = str | os.PathLike[str]


class LatentRewardModel(nn.Module):
    """Scores noisy latents: ``r(x_σ, t, c)`` in (0, 1).

    As built, the embeddings are frozen and the blocks, the pool and the head are trainable;
    :meth:`freeze` makes it a fixed reward whose backward computes the gradient to the latents and
    nothing else. Pool and head stay in float32 when the model is cast to a half precision; only the
    backbone is cast. ``prfl_fast.patch(reward.backbone)`` puts the backbone on fused kernels.

    Args:
        backbone: embeddings and blocks of a supported transformer; all its blocks are used. It is
            not copied.
        pool, head: as wide as the backbone.

    Raises:
        TypeError: the backbone is not supported.
        ValueError: the widths differ.
    """

    def __init__(self, backbone: nn.Module, pool: QueryAttentionPool, head: RewardHead) -> None:
        super().__init__()
        self._adapter: Adapter = find_adapter(backbone)
        dim = self._adapter.hidden_size(backbone)
        for name, width in (("pool", pool.queries.shape[1]), ("head", head.fc1.in_features)):
            if width != dim:
                raise ValueError(
                    f"{name} is made for {width} channels, expected the backbone's {dim}"
                )
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

        The generator is left as it is. The copy has its dtypes, device and, if it is patched, its
        patch.

        Raises:
            TypeError: the transformer is not supported.
            ValueError: more blocks than there are, fewer than 1, or ``num_heads`` does not divide
                the width.
        """
        adapter = find_adapter(transformer)
        dim = adapter.hidden_size(transformer)
        device = next(transformer.parameters()).device
        pool = QueryAttentionPool(dim, num_heads, num_queries).to(device)
        return cls(adapter.backbone(transformer, num_blocks), pool, RewardHead(dim).to(device))

    @property
    def num_blocks(self) -> int:
        """Blocks in the backbone; the pool reads the residual stream after the last."""
        return len(self._adapter.blocks(self.backbone))

    def logits(
        self, x: torch.Tensor, timestep: torch.Tensor, conditions: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """Scores before the sigmoid, ``[B]``, float32 (float64 if pool and head are).

        Args:
            x: noisy latents ``[B, C, F, H, W]``, any floating dtype.
            timestep: 1000·σ, in [0, 1000], ``[B]`` or 0-d for all.
            conditions: ``encoder_hidden_states`` ``[B, T, C]``, and for image-to-video models
                ``encoder_hidden_states_image`` ``[B, 257, 1280]`` and ``latent_condition`` ``[B,
                C', F, H, W]``.

        Raises:
            ValueError: a shape or dtype the backbone does not take; latents that are not finite or
                timesteps outside [0, 1000]. Values are not looked at if ``x`` carries a gradient:
                such latents come out of a generator, and a training loop has to see the non-finite
                loss to skip the step.
        """
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"latents are {type(x).__name__}, expected a tensor [B, C, F, H, W]")
        if isinstance(conditions, Mapping):
            conditions = dict(conditions)
        self._adapter.check_latents(self.backbone, x, conditions)
        if not isinstance(timestep, torch.Tensor) or timestep.shape not in ((), x.shape[:1]):
            came = list(timestep.shape) if isinstance(timestep, torch.Tensor) else repr(timestep)
            raise ValueError(
                f"timestep is {came}, expected a tensor [{x.shape[0]}] or 0-d, 1000 times sigma"
            )
        if not (x.requires_grad or torch.compiler.is_compiling()):
            _check_values(x, timestep)
        features = self._adapter.features(self.backbone, x, timestep, conditions, self.num_blocks)
        # Under the caller's autocast the blocks may be narrow; pool and head keep their own dtype.
        with torch.autocast(x.device.type, enabled=False):
            return self.head(self.pool(features))

    def forward(
        self, x: torch.Tensor, timestep: torch.Tensor, conditions: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """The score of each video, ``[B]`` in (0, 1); arguments and errors of :meth:`logits`."""
        return torch.sigmoid(self.logits(x, timestep, conditions))

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What an optimizer should hold: everything but the embeddings, or nothing once frozen."""
        return [p for p in self.parameters() if p.requires_grad]

    def freeze(self) -> "LatentRewardModel":
        """Stop training every parameter, switch to eval mode, and return the model itself."""
        return self.requires_grad_(False).eval()

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> "LatentRewardModel":
        # Everything that moves or casts a module comes through here. Pool and head move but are not
        # narrowed: they are under 1 % of the work, and a score is one number that bf16 would round
        # to 8 bits.
        def keep_wide(tensor: torch.Tensor) -> torch.Tensor:
            out = fn(tensor)
            narrowed = out.is_floating_point() and out.dtype.itemsize < 4
            return tensor.to(out.device) if narrowed else out

        self.backbone._apply(fn, recurse)
        self.pool._apply(keep_wide, recurse)
        self.head._apply(keep_wide, recurse)
        return self

    def save(self, folder: _Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` into ``folder``, both or neither.

        A reward model saved there before is replaced. :meth:`load` reads it back.

        Raises:
            ValueError: ``folder`` holds something else, or the backbone has tensors its class does
                not have (adapters of peft: merge them first; quantised layers: save before).
            OSError: it cannot be written.
        """
        _check_replaceable(folder, re.escape(_CONFIG), re.escape(_WEIGHTS))
        config = {
            "format": FORMAT,
            "prfl_fast": __version__,
            "torch": torch.__version__,
            "class": self._adapter.name,
            "num_blocks": self.num_blocks,
            "num_heads": self.pool.multihead_attn.num_heads,
            "num_queries": self.pool.queries.shape[0],
            "backbone": self._adapter.backbone_config(self.backbone),
        }
        state = self.state_dict()
        with torch.device("meta"):
            blank = _from_config(config)
        _check_fit(blank.state_dict(), state, "this reward model cannot be saved")
        with save_checkpoint_dir(folder) as temporary:
            save_tensors(state, temporary / _WEIGHTS)
            (temporary / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def load(cls, folder: _Path) -> "LatentRewardModel":
        """Read what :meth:`save` wrote, to the CPU, in the dtypes it had.

        The backbone is not patched, and parameters train as in a newly built model.

        Raises:
            FileNotFoundError: the folder or a file in it is missing.
            ValueError: the configuration is not one of a reward model, or the tensors are truncated
                or do not fit it.
        """
        path = Path(folder) / _CONFIG
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; {folder} is not a saved reward model")
        try:
            config = json.loads(path.read_text())
            if config["format"] != FORMAT:
                raise ValueError(f"format is {config['format']!r}, this version reads {FORMAT!r}")
            reward = _from_config(config)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}: not the configuration of a reward model: {what}") from error
        weights = Path(folder) / _WEIGHTS
        tensors = load_tensors(weights)
        _check_fit(reward.state_dict(), tensors, weights)
        # Clones: tensors that stay inside the file's buffer are not aligned, and the same weights
        # then give scores that differ in the last bit.
        reward.load_state_dict(
            {name: tensor.clone() for name, tensor in tensors.items()}, assign=True
        )
        return reward

    def save_reference(
        self, folder: _Path, step: int = 0, *, shard_bytes: int = _SHARD_BYTES
    ) -> tuple[Path, Path, Path]:
        """Write HY-Video-PRFL's own layout, for its trainers and for :meth:`load_reference`.

        ``checkpoints/checkpoint-<step>/`` holds the backbone as safetensors under official Wan's
        names, split with an index above ``shard_bytes`` bytes; ``mlp/mlp_step_<step>.ckpt`` and
        ``mlp/query_attention_step_<step>.ckpt`` hold the head and the pool. The reference reads
        ``step`` out of these names when it resumes. Each of the three appears whole or not at all.

        Returns:
            The paths of backbone, head and pool.

        Raises:
            ValueError: the backbone's folder exists and holds something else.
            OSError: it cannot be written.
        """
        checkpoint = Path(folder) / "checkpoints" / f"checkpoint-{step}"
        _check_replaceable(
            checkpoint, re.escape(_CONFIG), rf"{_SHARDS}[-\w]*\.safetensors(\.index\.json)?"
        )
        state = self._adapter.to_reference(self.backbone.state_dict())
        config = self._adapter.reference_config(self.backbone)
        with save_checkpoint_dir(checkpoint) as temporary:
            _save_shards(state, temporary, shard_bytes)
            (temporary / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        paths = []
        for name, part in (("mlp", self.head), ("query_attention", self.pool)):
            paths.append(Path(folder) / "mlp" / f"{name}_step_{step}.ckpt")
            paths[-1].parent.mkdir(parents=True, exist_ok=True)
            with write_atomic(paths[-1]) as file:
                torch.save({k: v.detach().cpu() for k, v in part.state_dict().items()}, file)
        return checkpoint, paths[0], paths[1]

    @classmethod
    def load_reference(
        cls,
        transformer: nn.Module,
        transformer_folder: _Path,
        mlp_file: _Path,
        pool_file: _Path,
        *,
        num_blocks: int | None = None,
        num_heads: int = 8,
    ) -> "LatentRewardModel":
        """Read a reward model trained by HY-Video-PRFL.

        Its settings ``pool: q_attn`` and ``return_type: query``, which all its configurations have.

        Args:
            transformer: a generator of the same size; gives the structure, dtypes and device, and
                is left as it is.
            transformer_folder: safetensors under official Wan's names, with or without an index; a
                head is ignored.
            mlp_file: ``fc1``, ``fc2``, ``fc3``; written by ``torch.save`` (plain or under
                ``"state_dict"``; read with ``weights_only``) or as safetensors.
            pool_file: ``queries`` and ``multihead_attn``; likewise.
            num_blocks: as many as the folder holds unless given; later blocks are ignored.
            num_heads: of the pool; the files do not tell.

        Raises:
            TypeError: the transformer is not supported.
            FileNotFoundError: a file or folder is missing.
            ValueError: a file is truncated or not a state dict, or tensors are missing, unexpected
                or misshapen.
        """
        adapter = find_adapter(transformer)
        state, found = _read_blocks(Path(transformer_folder), num_blocks)
        head_state, pool_state = _read_state(mlp_file), _read_state(pool_file)
        queries = pool_state.get("queries")
        num_queries = queries.shape[0] if queries is not None and queries.ndim == 2 else 1
        reward = cls.from_backbone(transformer, found, num_heads, num_queries)
        loads = (
            (reward.backbone, adapter.from_reference(state), transformer_folder),
            (reward.head, head_state, mlp_file),
            (reward.pool, pool_state, pool_file),
        )
        for module, tensors, source in loads:
            _check_fit(module.state_dict(), tensors, source)
        for module, tensors, _ in loads:
            module.load_state_dict(tensors)
        return reward


def _check_values(x: torch.Tensor, timestep: torch.Tensor) -> None:
    if not torch.isfinite(x).all():
        count = int((~torch.isfinite(x)).sum())
        raise ValueError(f"latents hold {count} values that are not finite, expected none")
    if not ((timestep >= 0) & (timestep <= 1000)).all():
        values = timestep.flatten().tolist()[:5]
        raise ValueError(f"timestep holds {values}, expected 1000 times sigma, in [0, 1000]")


def _from_config(config: dict[str, Any]) -> LatentRewardModel:
    """A randomly initialised model of a saved configuration."""
    adapter = adapter_by_name(config["class"])
    backbone = adapter.backbone_from_config(config["backbone"])
    blocks = len(adapter.blocks(backbone))
    if blocks != config["num_blocks"]:
        raise ValueError(f"num_blocks is {config['num_blocks']}, the backbone has {blocks}")
    dim = adapter.hidden_size(backbone)
    return LatentRewardModel(
        backbone,
        QueryAttentionPool(dim, config["num_heads"], config["num_queries"]),
        RewardHead(dim),
    )


def _check_fit(
    expected: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], source: object
) -> None:
    """Raise one ``ValueError`` naming the first missing, unexpected and misshapen tensors."""
    shapes = {name: list(tensor.shape) for name, tensor in expected.items()}
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    problems = {
        "missing": [f"{n} {s}" for n, s in shapes.items() if n not in found],
        "unexpected": [f"{n} {s}" for n, s in found.items() if n not in shapes],
        "of another shape": [
            f"{n} {s}, expected {shapes[n]}" for n, s in found.items() if shapes.get(n, s) != s
        ],
    }
    parts = [
        f"{len(names)} {kind} ({'; '.join(names[:3])}{'; …' if len(names) > 3 else ''})"
        for kind, names in problems.items()
        if names
    ]
    if parts:
        raise ValueError(f"{source}: tensors do not fit the model: {', '.join(parts)}")


def _check_replaceable(folder: _Path, *patterns: str) -> None:
    """Saving replaces the folder: refuse one with anything but the files of an earlier save."""
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file, expected a folder or a new name")
    others = [p.name for p in path.iterdir()] if path.is_dir() else []
    others = [
        name
        for name in sorted(others)
        if not any(re.fullmatch(pattern, name) for pattern in patterns)
    ]
    if others:
        raise ValueError(
            f"{path} holds {', '.join(others[:3])}, which saving would remove; choose a new folder"
        )


def _save_shards(state: Mapping[str, torch.Tensor], folder: Path, shard_bytes: int) -> None:
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = total = 0
    for name, tensor in state.items():
        nbytes = tensor.numel() * tensor.element_size()
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size, total = size + nbytes, total + nbytes
    if len(shards) == 1:
        save_tensors(shards[0], folder / f"{_SHARDS}.safetensors")
        return
    files = [f"{_SHARDS}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for shard, file in zip(shards, files, strict=True):
        save_tensors(shard, folder / file)
    weight_map = {name: file for shard, file in zip(shards, files, strict=True) for name in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{_SHARDS}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _block_index(name: str) -> int:
    match = re.match(r"blocks\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _read_blocks(folder: Path, num_blocks: int | None) -> tuple[dict[str, torch.Tensor], int]:
    """Embeddings and first ``num_blocks`` blocks in a folder of safetensors; number of blocks."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    safetensors = need("safetensors")
    files = sorted(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        try:
            files = [
                folder / name
                for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: not an index of safetensors files") from error
    if not files:
        raise FileNotFoundError(f"{folder}: holds no .safetensors file")
    place: dict[str, Path] = {}
    state = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file, but the index names it; copy it again")
        try:
            with safetensors.safe_open(file, framework="pt") as opened:
                for name in opened.keys():
                    if name in place:
                        raise ValueError(
                            f"{folder}: {name} is both in {place[name].name} and in {file.name}"
                        )
                    place[name] = file
                    if not name.startswith("head.") and (
                        num_blocks is None or _block_index(name) < num_blocks
                    ):
                        state[name] = opened.get_tensor(name)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file}: not a whole safetensors file ({error})") from error
    return state, num_blocks if num_blocks is not None else 1 + max(
        map(_block_index, state), default=-1
    )


def _read_state(file: _Path) -> dict[str, torch.Tensor]:
    """A state dict from safetensors or ``torch.save``; nothing but tensors is unpickled."""
    path = Path(file)
    if path.suffix == ".safetensors":
        return load_tensors(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling bytes that are no checkpoint raises almost anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: cannot be read as a state dict ({reason})") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(
        isinstance(v, torch.Tensor) for v in state.values()
    ):
        raise ValueError(f"{path}: holds {type(state).__name__}, expected a state dict of tensors")
    return dict(state)
