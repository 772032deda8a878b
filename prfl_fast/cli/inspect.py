"""Print the content of a dataset, the folder of a command, a checkpoint or a model."""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prfl_fast.cli.inspect_runs import print_run_of
from prfl_fast.cli.tables import print_facts, print_table
from prfl_fast.data.inspect import DatasetReport, describe_dataset
from prfl_fast.data.manifest import MANIFEST, LatentDataset
from prfl_fast.data.reference_lists import SUFFIX, open_latents
from prfl_fast.models.conditions import TEXT
from prfl_fast.models.conversion import OFFICIAL_FOLDERS
from prfl_fast.models.experts import FOLDERS
from prfl_fast.models.loading import expert_folders, transformer_class, transformer_folder
from prfl_fast.models.lora_files import lora_file, read_lora
from prfl_fast.planning.presets import vae_stride
from prfl_fast.rewards.latent import FORMAT
from prfl_fast.rewards.reference_checkpoint import read_blocks, read_settings, reference_parts
from prfl_fast.training.checkpoint import list_checkpoints, read_checkpoint
from prfl_fast.training.reward_losses import label_of
from prfl_fast.utils.checks import check
from prfl_fast.utils.digests import DIGESTS, check_digests
from prfl_fast.utils.io import digest_of, read_json
from prfl_fast.utils.progress import count_progress
from prfl_fast.utils.shards import read_weights
from prfl_fast.utils.units import plural

_KINDS = (
    f"a dataset folder ({MANIFEST}), a list of HY-Video-PRFL (*{SUFFIX}), the folder of a training "
    "run, of sample, compare or evaluate, a checkpoint, a reward model, an adapter or a generator"
)
_MOTION = "motion_quality"
_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_DIGEST = "SHA-256, first 16 digits"
_VALUES, _LETTERS = 4, 40  # of a label that are shown


def run_inspect(path: str) -> int:
    """Print the content of a path; return the exit code."""
    source = Path(path)
    check(source.exists(), "PATH", path, "a file or folder that exists")
    if source.suffix == SUFFIX or (source / MANIFEST).is_file():
        # Nothing of the files is shown but shapes and statistics, so they may be anywhere.
        dataset = open_latents(source, allow_outside=True)
        _print_dataset(path, dataset, describe_dataset(dataset))
    elif (source / "checkpoint.json").is_file():
        _print_checkpoint(source, read_checkpoint(source))
    elif (checkpoints := list_checkpoints(source)) or (source / "log.jsonl").is_file():
        _print_run(source, checkpoints)
    elif source.is_dir() and (parts := reference_parts(source)) is not None:
        _print_reference_reward(source, parts)
    elif not print_run_of(source):
        _print_weights(source)
    return 0


def _print_weights(source: Path) -> None:
    """Print a reward model, an adapter or a generator; ``ValueError`` if there is none."""
    folders = [path for path in _models(source) if path.is_dir()]
    readable = source.suffix in _WEIGHTS if source.is_file() else any(map(_has_weights, folders))
    check(readable, "PATH", str(source), _KINDS)
    try:
        if read_settings(source).get("format") == FORMAT:
            _print_reward(source)
            return
        adapters = [file for path in _models(source) if (file := lora_file(path)) is not None]
        generators = [] if adapters else _generators(source)
    except (ValueError, OSError) as error:
        raise ValueError(f"PATH: {error}; expected {_KINDS}") from error
    for file in adapters:
        _print_adapter(file)
    for folder, kind, config in generators:
        _print_generator(folder, kind, config)


def _has_weights(folder: Path) -> bool:
    return any(path.suffix in _WEIGHTS or path.suffix == ".json" for path in folder.iterdir())


def _print_dataset(path: str, dataset: LatentDataset, report: DatasetReport) -> None:
    kind = "pairs" if report.pairs else "prompts" if dataset.prompts_only else "videos"
    rows, width = dataset.shapes[TEXT]
    extra = sorted(dataset.shapes.keys() - {"latents", TEXT})
    facts: dict[str, object] = {"dataset": path, kind: report.samples}
    facts["text"] = f"up to {rows} rows of {width}{', short captions' if dataset.short else ''}"
    empty = dataset.empty_prompt_file()
    facts["empty prompt"] = empty if empty.is_file() else "none, so text_drop must be 0"
    facts["conditions beside text"] = ", ".join(extra) or "none"
    captions = list(filter(None, dataset.captions()))
    facts["captions"] = f"{len(captions)}, such as {_short(captions[0])!r}" if captions else "none"
    print_facts(facts | {f"manifest ({_DIGEST})": report.digest[:16]})
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
    if dataset.prompts_only:
        print("no latents: objectives: [prfl] trains on it, and eval.prompts samples it")
        return
    channels_of = zip(report.channels.means, report.channels.stds, strict=True)
    values = [(str(i), f"{mean:.3f}", f"{std:.3f}") for i, (mean, std) in enumerate(channels_of)]
    names = ("channel", "mean", "standard deviation")
    print_table(values, names, numbers=names)
    fine = "latents are scaled as normalized latents are, about 1"
    source = f"from {report.read} of {plural(report.samples, kind[:-1])}"
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
            shown = ((_short(v), count) for v, count in ordered[:_VALUES])
            text = ", ".join(f"{v}: {count} ({count / total:.0%})" for v, count in shown)
            more = len(ordered) - _VALUES
            text += f", and {more} more values" if more > 0 else ""
        rows.append((name, text, str(missing)))
    if rows:
        print_table(rows, ("label", "values", "missing"), numbers=("missing",))
    else:
        print("labels: none")


def _motion(record: Mapping[str, Any]) -> float | None:
    with contextlib.suppress(ValueError):
        return label_of(record, _MOTION)
    return None


def _short(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else " ".join(str(value).split())
    return text if len(text) <= _LETTERS else text[: _LETTERS - 1] + "…"


def _parameters(path: Path) -> str:
    """Return the number of parameters and of tensors in a file or folder, and their dtypes."""
    state, sizes = read_weights(path), Counter[str]()
    for tensor in state.values():
        sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    dtypes = ", ".join(name for name, _ in sizes.most_common())
    return f"{sizes.total():,} in {plural(len(state), 'tensor')}, {dtypes}"


def _print_files(root: Path, paths: Iterable[Path]) -> None:
    """Print sizes and digests of files, and of the files in folders, by their name in ``root``."""
    files = [f for p in paths for f in (sorted(p.rglob("*")) if p.is_dir() else [p]) if f.is_file()]
    rows = []
    with count_progress("digests", "files", len(files)) as show:
        for path in files:
            show(path.name)
            name = str(path.relative_to(root))
            rows.append((name, f"{path.stat().st_size:,}", digest_of(path)[:16]))
    print_table(rows, ("file", "bytes", _DIGEST), numbers=("bytes",))


def _print_checkpoint(folder: Path, content: Mapping[str, Any]) -> None:
    print_facts({"checkpoint": folder, "step": content["step"], "format": content["format"]})
    digests = content.get("sha256", {})
    rows = [(n, f"{size:,}", digests.get(n, "none")[:16]) for n, size in content["files"].items()]
    print_table(rows, ("file", "bytes", _DIGEST), numbers=("bytes",))
    print(f"{'digests' if digests else 'sizes'} of all files are as written")
    for model in _models(folder / "model"):
        if (file := lora_file(model)) is not None:
            _print_adapter(file)
        else:
            print_facts({"model": model, "parameters": _parameters(model)})
    for name in ("inputs", "settings"):
        given = content.get(name, {}).items()
        values = [(key, json.dumps(value)) for key, value in given if value not in (None, [])]
        if values:
            print_table(values, (name, "value"))


def _models(folder: Path) -> list[Path]:
    """Return the folders of a saved model: itself, or those of experts."""
    names = (*FOLDERS.values(), *OFFICIAL_FOLDERS)
    parts = [folder / name for name in names if (folder / name).is_dir()]
    return parts or [folder]


def _print_run(folder: Path, checkpoints: list[tuple[int, Path]]) -> None:
    print_facts({"run": folder})
    rows, problems, good = [], [], None
    with count_progress("inspect", "checkpoints", len(checkpoints)) as show:
        for step, path in checkpoints:
            show(path.name)
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            try:
                good = path, read_checkpoint(path)
            except ValueError as error:
                problems.append(f"{path.name} is damaged: {error}")
            state = "whole" if good is not None and good[0] == path else "damaged"
            rows.append((path.name, str(step), f"{size:,}", state))
    if rows:
        columns = ("checkpoint", "step", "bytes", "state")
        print_table(rows, columns, numbers=("step", "bytes"))
    else:
        print("no checkpoint yet")
    for problem in problems:
        print(problem)
    log = folder / "log.jsonl"
    if log.is_file() and (lines := log.read_text(encoding="utf-8").splitlines()):
        record = json.loads(lines[-1])
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in record.items()}
        print("last line of the log: " + ", ".join(f"{k} {v}" for k, v in shown.items()))
    if (folder / "reward").is_dir() and read_settings(folder / "reward").get("format") == FORMAT:
        _print_reward(folder / "reward")
    if good is not None:
        _print_checkpoint(*good)


def _print_reward(folder: Path) -> None:
    config = read_settings(folder)
    facts: dict[str, object] = {"reward model": folder}
    facts |= {
        name.replace("_", " "): config.get(name)
        for name in ("class", "num_blocks", "num_heads", "num_queries", "add_query")
    }
    facts["parameters"] = _parameters(folder / "model.safetensors")
    if (folder / DIGESTS).is_file():
        hint = "Copy the reward model again"
        check_digests(folder, read_json(folder / DIGESTS), hint)
        facts["digests"] = f"of all files as written in {DIGESTS}"
    print_facts(facts)
    _print_files(folder, [folder])


def _print_reference_reward(folder: Path, parts: tuple[Path, Path, Path]) -> None:
    """Print a reward model in the folder of a run of HY-Video-PRFL."""
    backbone, head, pool = parts
    facts: dict[str, object] = {"reward model of HY-Video-PRFL": folder}
    facts["step"] = backbone.name.rpartition("-")[2]
    facts["num blocks"] = read_blocks(backbone, None)[1]
    facts |= {f"parameters of {path.name}": _parameters(path) for path in (backbone, head, pool)}
    print_facts(facts)
    _print_files(folder, parts)


def _print_adapter(file: Path) -> None:
    facts: dict[str, object] = {"adapter": file, "parameters": _parameters(file)}
    facts["first tensor"] = min(read_weights(file))
    try:
        layers = read_lora(file)
    except ValueError as error:  # LoHa and the like, or of a model that is not Wan
        facts["not a LoRA of Wan"] = error
    else:
        of = next(iter(layers.values()))
        parts = {"DoRA": of.magnitude, "bias": of.bias}
        facts["kind"] = " with ".join(["LoRA", *(n for n, v in parts.items() if v is not None)])
        kinds = sorted({re.sub(r"^blocks\.\d+\.", "", name) for name in layers})
        facts["layers"] = f"{len(layers)}, of {', '.join(kinds)}"
        facts["rank"] = _counted(len(layer.down) for layer in layers.values())
        scales = (f"{layer.alpha / len(layer.down):g}" for layer in layers.values())
        facts["alpha / rank"] = _counted(scales)
    print_facts(facts | {"SHA-256": digest_of(file)})


def _counted(values: Iterable[object]) -> str:
    """Return the values in words, each with the number of layers that have it."""
    return ", ".join(
        f"{value} ({plural(n, 'layer')})" for value, n in Counter(values).most_common()
    )


def _generators(source: Path) -> list[tuple[Path, type, Mapping[str, Any]]]:
    """Return folder, class and configuration of a generator, or of its two experts."""
    official = [source / name for name in OFFICIAL_FOLDERS]
    if all(folder.is_dir() for folder in official):
        folders = official
    else:
        experts = expert_folders(source)
        folders = [transformer_folder(source)] if experts is None else list(experts[:2])
    return [(folder, *transformer_class(folder)) for folder in folders]


def _print_generator(folder: Path, kind: type, config: Mapping[str, Any]) -> None:
    names = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "text_dim")
    known = {n.replace("_", " "): config[n] for n in names if n in config}
    name = "generator" if "Transformer" in kind.__name__ else "model"
    print_facts({name: folder, "class": kind.__name__, **known})
    with contextlib.suppress(ValueError, OSError):  # weights in another form
        print(f"parameters: {_parameters(folder)}")
    files = [folder] if folder.is_file() else [p for p in folder.iterdir() if p.is_file()]
    _print_files(folder.parent if folder.is_file() else folder, sorted(files))
