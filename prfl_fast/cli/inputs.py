"""Describe a run's data and models, so that a resumed run notices other ones."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prfl_fast.cli import loading
from prfl_fast.cli.config import TrainFile, TrainRewardFile
from prfl_fast.cli.reward_sections import ReferenceReward
from prfl_fast.data.manifest import LatentDataset
from prfl_fast.models.experts import NAMES
from prfl_fast.models.loading import transformer_folder
from prfl_fast.utils.checks import check
from prfl_fast.utils.digests import DIGESTS

# A file of weights is read in 64 places, so 56 GB take a second, not minutes. Another training of
# the same model changes all of them.
_PLACES, _BLOCK, _HEAD = 64, 4096, 1 << 16

PATHS = ("data", "lose_data", "model")  # keys whose values are inputs, not settings; so are rewards


def inputs_of(
    config: TrainFile | TrainRewardFile, dataset: LatentDataset, losers: LatentDataset | None = None
) -> dict[str, Any]:
    """Return values that tell the datasets, the base model and the rewards of a run apart."""
    found = {name: getattr(config, name, None) for name in PATHS} | _data("data", dataset)
    if losers is not None:
        found |= _data("lose_data", losers)
    if config.text_drop > 0:
        found["empty prompt: fingerprint"] = fingerprint(dataset.empty_prompt_file())
    folders, boundary = loading.folders_of(config.model)
    if boundary is None:
        found["model: fingerprint"] = fingerprint(transformer_folder(folders[0]))
    else:
        found["model"] = [*folders, boundary]
        for name, folder in zip(NAMES, folders, strict=True):
            found[f"model {name}: fingerprint"] = fingerprint(Path(folder))
    if isinstance(config, TrainFile) and config.reads_reward:
        for name, path in _rewards(config):
            found |= {name: str(path), f"{name}: fingerprint": fingerprint(path)}
    if isinstance(config, TrainFile) and "prfl" in config.objectives:
        if config.prfl.guidance is not None:
            negative = Path(config.prfl.guidance.negative)
            found["prfl.guidance.negative: fingerprint"] = fingerprint(negative)
        given = config.rollout.adapter
        for number, adapter in enumerate(given if isinstance(given, tuple) else (given,)):
            if adapter is not None:
                label = "rollout.adapter" + (f"[{number}]" if isinstance(given, tuple) else "")
                # Before models are loaded.
                check(Path(adapter).exists(), label, adapter, "a file")
                found[f"{label}: fingerprint"] = fingerprint(Path(adapter))
    return found


def _data(name: str, dataset: LatentDataset) -> dict[str, Any]:
    sizes = hashlib.sha256()
    for path in dataset.files():
        sizes.update(f"{path.name} {path.stat().st_size}\n".encode())
    return {
        f"{name}: number of samples": len(dataset),
        f"{name}: manifest": dataset.digest()[:16],
        f"{name}: sizes of files": sizes.hexdigest()[:16],
    }


def _rewards(config: TrainFile) -> Iterator[tuple[str, Path]]:
    """Yield a name and the path of each file or folder of the rewards."""
    for reward in config.rewards():
        name = f"reward {reward.name}" if isinstance(config.reward, tuple) else "reward"
        for number, source in enumerate(reward.paths):
            label = f"{name} {number}" if len(reward.paths) > 1 else name
            if isinstance(source, ReferenceReward):
                for part in ("transformer", "mlp", "pool"):
                    yield f"{label} {part}", Path(getattr(source, part))
            else:
                yield label, Path(source)


def fingerprint(path: Path) -> str:
    """Return a digest of names, sizes, headers and a sample of the bytes of a file or folder."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        relative = file.relative_to(path)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or file.name == DIGESTS:  # such as the cache of a download
            continue
        size = file.stat().st_size
        digest.update(f"{relative.as_posix()} {size}\n".encode())
        with open(file, "rb") as opened:
            digest.update(opened.read(_HEAD))
            for place in range(_PLACES if size > _HEAD else 0):
                opened.seek(max(_HEAD, size - _BLOCK) * (place + 1) // _PLACES)
                digest.update(opened.read(_BLOCK))
    return digest.hexdigest()[:16]
