"""Say what a dataset, a run, a checkpoint, a reward, an adapter or a generator holds."""

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prfl_fast.cli.tables import print_table
from prfl_fast.data.inspect import DatasetReport, describe_dataset
from prfl_fast.data.manifest import MANIFEST, TEXT, LatentDataset
from prfl_fast.data.reference_lists import SUFFIX, open_latents
from prfl_fast.models.loading import expert_folders, transformer_class, transformer_folder
from prfl_fast.models.lora_files import lora_file, read_lora
from prfl_fast.planning.presets import vae_stride
from prfl_fast.rewards.latent import FORMAT
from prfl_fast.rewards.reference_checkpoint import read_settings, reference_parts
from prfl_fast.training.checkpoint import list_checkpoints, read_checkpoint
from prfl_fast.training.reward_losses import label_of
from prfl_fast.utils.checks import check
from prfl_fast.utils.digests import DIGESTS, check_digests
from prfl_fast.utils.io import digest_of, open_tensors, read_json
from prfl_fast.utils.progress import count_progress

_KINDS = (
    f"a dataset folder ({MANIFEST}), a list of HY-Video-PRFL (*{SUFFIX}), a run's folder, a "
    "checkpoint, a reward model, an adapter or a generator"
)
_MOTION = "motion_quality"


def run_inspect(path: str) -> int:
    """Print what a path holds; return the exit code."""
    source = Path(path)
    check(source.exists(), "PATH", path, "a file or folder that exists")
    if source.suffix == SUFFIX or (source / MANIFEST).is_file():
        # Nothing of the files is shown but shapes and statistics, so they may be anywhere.
        dataset = open_latents(source, allow_outside=True)
        _print_dataset(path, dataset, describe_dataset(dataset))
    elif (source / "checkpoint.json").is_file():
        _print_checkpoint(source)
    elif checkpoints := list_checkpoints(source):
        _print_run(source, checkpoints)
    elif read_settings(source).get("format") == FORMAT:
        _print_reward(source)
    elif source.is_dir() and (parts := reference_parts(source)) is not None:
        _print_facts({"reward model of HY-Video-PRFL": path})
        _print_files(parts)
    else:
        try:
            file = lora_file(source)
            generators = [] if file else _generators(source)
        except (ValueError, OSError) as error:
            raise ValueError(f"PATH is {path}, expected {_KINDS} ({error})") from error
        if file is not None:
            _print_adapter(file)
        for folder, kind, config in generators:
            _print_generator(folder, kind, config)
    return 0


def _print_facts(facts: Mapping[str, object]) -> None:
    for name, value in facts.items():
        print(f"{name}: {value}")


def _print_dataset(path: str, dataset: LatentDataset, report: DatasetReport) -> None:
    kind = "pairs" if report.pairs else "videos"
    rows, width = dataset.shapes[TEXT]
    extra = sorted(dataset.shapes.keys() - {"latents", TEXT})
    facts: dict[str, object] = {"dataset": path, kind: report.samples}
    facts["text"] = f"up to {rows} rows of {width}{', short captions' if dataset.short else ''}"
    empty = dataset.empty_prompt_file()
    facts["empty prompt"] = empty if empty.is_file() else "none, so text_drop must be 0"
    facts["conditions beside text"] = ", ".join(extra) or "none"
    _print_facts(facts | {"SHA-256 of the manifest": report.digest})
    sizes = []
    for bucket in report.buckets:
        channels, *latent = bucket.shapes["latents"]
        video = "?"
        with contextlib.suppress(ValueError):  # latents of an unknown VAE
            frames, *size = (n * s for n, s in zip(latent, vae_stride(channels), strict=True))
            video = "×".join(map(str, (frames - vae_stride(channels)[0] + 1, *size)))
        share = f"{len(bucket.indices) / report.samples:.0%}"
        size_of_latents = "×".join(map(str, (channels, *latent)))
        sizes.append((size_of_latents, video, str(len(bucket.indices)), share))
    columns = ("latents C×F×H×W", "video F×H×W", kind, "share")
    print_table(sizes, columns, numbers=columns[2:])
    _print_labels(dataset, report)
    channels_of = zip(report.channels.means, report.channels.stds, strict=True)
    values = [(str(i), f"{mean:.3f}", f"{std:.3f}") for i, (mean, std) in enumerate(channels_of)]
    names = ("channel", "mean", "standard deviation")
    print_table(values, names, numbers=names)
    fine = "latents are scaled as normalized latents are, about 1"
    source = f"from {report.read} of {report.samples} {kind}"
    print(f"{report.channels.problem() or fine} ({source})")


def _print_labels(dataset: LatentDataset, report: DatasetReport) -> None:
    counts = dict(report.labels)
    if _MOTION not in counts and {"physics_quality", "human_quality"} & counts.keys():
        counts[f"{_MOTION} (both)"] = Counter(_motion(record) for _, record in dataset.labels())
    rows = []
    for name, found in counts.items():
        missing = found[None]
        given = {value: count for value, count in found.items() if value is not None}
        total = sum(given.values())
        numbers = [v for v in given if not isinstance(v, str)]
        if len(given) > 4 and len(numbers) == len(given):
            mean = sum(float(v) * count for v, count in given.items()) / total
            text = f"{min(numbers):g} to {max(numbers):g}, mean {mean:.4g}"
        else:
            ordered = sorted(given.items(), key=lambda item: -item[1])
            text = ", ".join(f"{v}: {count} ({count / total:.0%})" for v, count in ordered[:4])
        rows.append((name, text, str(missing)))
    if rows:
        print_table(rows, ("label", "values", "missing"), numbers=("missing",))
    else:
        print("labels: none")


def _motion(record: Mapping[str, Any]) -> float | None:
    with contextlib.suppress(ValueError):
        return label_of(record, _MOTION)
    return None


def _tensors(files: Iterable[Path]) -> str:
    """Return the number of tensors, of parameters, and the dtypes in safetensors files."""
    count = size = 0
    dtypes: Counter[str] = Counter()
    for path in files:
        with open_tensors(path) as file:
            for name in file.keys():
                part, numbers = file.get_slice(name), 1
                for n in part.get_shape():
                    numbers *= n
                count, size = count + 1, size + numbers
                dtypes[part.get_dtype()] += numbers
    kinds = ", ".join(kind for kind, _ in dtypes.most_common())
    return f"{count} with {size:,} numbers, {kinds}"


def _print_files(paths: Iterable[Path], root: Path | None = None) -> None:
    """Print sizes and digests of files, and of the files in folders."""
    files = [f for p in paths for f in (sorted(p.rglob("*")) if p.is_dir() else [p]) if f.is_file()]
    rows = []
    with count_progress("digests", "files", len(files)) as show:
        for path in files:
            show(path.name)
            name = str(path if root is None else path.relative_to(root))
            rows.append((name, f"{path.stat().st_size:,}", digest_of(path)[:16]))
    columns = ("file", "bytes", "SHA-256, first 16 digits")
    print_table(rows, columns, numbers=("bytes",))


def _print_checkpoint(folder: Path) -> None:
    content = read_checkpoint(folder)
    _print_facts({"checkpoint": folder, "step": content["step"], "format": content["format"]})
    digests = content.get("sha256", {})
    rows = [(n, f"{size:,}", digests.get(n, "none")[:16]) for n, size in content["files"].items()]
    print_table(rows, ("file", "bytes", "SHA-256, first 16 digits"), numbers=("bytes",))
    print(f"{'digests' if digests else 'sizes'} of all files are as written")
    for model in _models(folder / "model"):
        _print_model(model)
    for name in ("inputs", "settings"):
        values = [(key, json.dumps(value)) for key, value in content.get(name, {}).items()]
        if values:
            print_table(values, (name, "value"))


def _models(folder: Path) -> list[Path]:
    """Return the folders of a saved model: itself, or those of experts."""
    parts = [path for path in sorted(folder.glob("transformer*")) if path.is_dir()]
    return parts or [folder]


def _print_model(folder: Path) -> None:
    if (file := lora_file(folder)) is not None:
        _print_adapter(file)
    else:
        _print_facts({"model": folder, "tensors": _tensors(sorted(folder.glob("*.safetensors")))})


def _print_run(folder: Path, checkpoints: list[tuple[int, Path]]) -> None:
    _print_facts({"run": folder})
    rows, good = [], None
    with count_progress("inspect", "checkpoints", len(checkpoints)) as show:
        for step, path in checkpoints:
            show(path.name)
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            try:
                read_checkpoint(path)
            except ValueError as error:
                state = str(error)
            else:
                state, good = "whole", path
            rows.append((str(step), f"{size:,}", state))
    print_table(rows, ("step", "bytes", "state"), numbers=("step", "bytes"))
    log = folder / "log.jsonl"
    if log.is_file() and (lines := log.read_text(encoding="utf-8").splitlines()):
        record = json.loads(lines[-1])
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in record.items()}
        print("last line of the log: " + ", ".join(f"{k} {v}" for k, v in shown.items()))
    if (folder / "reward").is_dir() and read_settings(folder / "reward").get("format") == FORMAT:
        _print_reward(folder / "reward")
    if good is not None:
        _print_checkpoint(good)


def _print_reward(folder: Path) -> None:
    config, weights = read_settings(folder), folder / "model.safetensors"
    facts: dict[str, object] = {"reward model": folder}
    facts |= {
        name.replace("_", " "): config.get(name)
        for name in ("class", "num_blocks", "num_heads", "num_queries", "add_query")
    }
    facts["tensors"] = _tensors([weights])
    if (folder / DIGESTS).is_file():
        hint = "Copy the reward model again"
        check_digests(folder, read_json(folder / DIGESTS), hint)
        facts["digests"] = f"of all files as written in {DIGESTS}"
    _print_facts(facts)
    _print_files([folder], folder)


def _print_adapter(file: Path) -> None:
    with open_tensors(file) as opened:
        shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}
    down = {n: s for n, s in shapes.items() if "lora_A" in n or "lora_down" in n}
    ranks = Counter(shape[0] for shape in down.values())
    facts: dict[str, object] = {"adapter": file, "layers": len(down)}
    facts["ranks"] = ", ".join(f"{rank} ({n} layers)" for rank, n in ranks.most_common())
    with contextlib.suppress(ValueError):  # of a model that is not Wan, or no plain LoRA
        alphas = Counter(layer.alpha for layer in read_lora(file).values())
        facts["alpha"] = ", ".join(f"{alpha:g} ({n} layers)" for alpha, n in alphas.most_common())
    facts |= {"tensors": _tensors([file]), "SHA-256": digest_of(file)}
    _print_facts(facts)


def _generators(source: Path) -> list[tuple[Path, type, Mapping[str, Any]]]:
    """Return folder, class and configuration of a generator, or of its two experts."""
    experts = expert_folders(source)
    folders = [transformer_folder(source)] if experts is None else list(experts[:2])
    return [(folder, *transformer_class(folder)) for folder in folders]


def _print_generator(folder: Path, kind: type, config: Mapping[str, Any]) -> None:
    names = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels")
    known = {n.replace("_", " "): config[n] for n in names if n in config}
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]
    _print_facts({"generator": folder, "class": kind.__name__, **known})
    with contextlib.suppress(ValueError):  # weights in files of torch.save
        print(f"tensors: {_tensors(files)}")
    _print_files(files)
