"""Print the content of the folders of ``sample``, ``compare``, ``evaluate`` and ``encode``."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from prfl_fast.cli.compare import BASE, FIGURES, print_figures
from prfl_fast.cli.evaluate import METRICS, print_metrics
from prfl_fast.cli.page import PAGE
from prfl_fast.cli.sample import RECORD
from prfl_fast.cli.tables import print_facts
from prfl_fast.data.encode import RECORD as ENCODE_RECORD
from prfl_fast.data.encode_plan import read_object
from prfl_fast.sampling.generate import LATENTS, SHEET
from prfl_fast.utils.checks import check
from prfl_fast.utils.units import plural

_PROMPTS = 3  # prompts that are shown


def print_run_of(folder: Path) -> bool:
    """Print the folder of ``sample``, ``compare`` or ``evaluate``, or of an unfinished ``encode``.

    Return False for another folder. Raise ``ValueError`` if its record is damaged.
    """
    kinds = (
        (RECORD, _print_samples),
        (f"{BASE}/{RECORD}", _print_comparison),
        (METRICS, _print_evaluation),
        (ENCODE_RECORD, _print_unfinished),
    )
    for name, show in kinds:
        if (folder / name).is_file():
            try:
                show(folder, read_object(folder / name))
            except (KeyError, TypeError, AttributeError) as error:
                expected = f"one that prfl-fast has written ({type(error).__name__}: {error})"
                check(False, "PATH", str(folder / name), expected)
            return True
    return False


def _count(folder: Path, record: Mapping[str, Any]) -> str:
    """Return the number of videos of a record, and how many of them are in its folder."""
    videos, names = record["videos"], [Path(v["file"]) for v in record["videos"]]
    sampled = sum((folder / LATENTS / f"{name.stem}.safetensors").is_file() for name in names)
    decoded = sum((folder / name).is_file() for name in names)
    return f"{len(videos)} ({sampled} sampled, {decoded} decoded)"


def _print_samples(folder: Path, record: Mapping[str, Any]) -> None:
    settings, videos = record["settings"], record["videos"]
    facts: dict[str, object] = {"samples": folder, "videos": _count(folder, record)}
    facts |= _settings(settings)
    facts["generator"] = settings["weights"] or settings["model"]
    if settings.get("pipeline"):
        facts["sampled by"] = "the pipeline of diffusers"
    if settings["method"] is not None:
        name, options = settings["method"]
        listed = ", ".join(f"{key} {value}" for key, value in options.items())
        facts["method"] = f"{name} ({listed})"
    rewards = [video["reward"] for video in videos if video.get("reward") is not None]
    if rewards:
        text = f"{mean(rewards):.4f}, from {min(rewards):.4f} to {max(rewards):.4f}"
        facts["mean reward"] = text
    if (folder / SHEET).is_file():
        facts["contact sheet"] = folder / SHEET
    print_facts(facts)


def _settings(record: Mapping[str, Any]) -> dict[str, object]:
    """Return the settings that ``sample`` and ``compare`` share, by their printed names."""
    found: dict[str, object] = {"model": record["model"]}
    if record["data"] is not None:
        found["conditions of"] = record["data"]
    else:
        texts = list(dict.fromkeys(record["prompts: text"]))
        more = f", and {len(texts) - _PROMPTS} more" if len(texts) > _PROMPTS else ""
        shown = ", ".join(json.dumps(text[:80], ensure_ascii=False) for text in texts[:_PROMPTS])
        height, width = record["size"]
        found["prompts"] = shown + more
        found["size"] = f"{height}x{width}, {plural(record['frames'], 'frame')}"
    scale = record["guidance_scale"]
    scales = ", ".join(f"{s:g}" for s in (scale if isinstance(scale, list) else [scale]))
    steps = plural(record["num_inference_steps"], "step")
    found["sampler"] = f"{steps}, shift {record['shift']:g}, guidance scale {scales}"
    if record["negative"]:
        found["negative prompt"] = json.dumps(record["negative"], ensure_ascii=False)
    found["weight dtype"] = record["weight_dtype"]
    return found


def _print_comparison(folder: Path, record: Mapping[str, Any]) -> None:
    facts = {"comparison": folder, **_settings(record["settings"])}
    for path in sorted(folder.glob(f"*/{RECORD}"), key=lambda p: (p.parent.name != BASE, p)):
        facts[f"videos of {path.parent.name}"] = _count(path.parent, read_object(path))
    print_facts(facts)
    if not (folder / FIGURES).is_file():
        print("no figures yet: the same call of prfl-fast compare continues")
        return
    print_figures(read_object(folder / FIGURES))
    print(f"page: {folder / PAGE}")


def _print_unfinished(folder: Path, record: Mapping[str, Any]) -> None:
    done = len(list((folder / "samples").glob("*.safetensors")))
    facts = {"unfinished dataset": folder, "clips": len(record["clips"]), "samples so far": done}
    print_facts(facts)
    print("the same call of prfl-fast encode continues")


def _print_evaluation(folder: Path, record: Mapping[str, Any]) -> None:
    facts = {"evaluation": folder, "reward model": record["reward"], "data": record["data"]}
    names = ("label", "shift", "seed", "precision")
    print_facts(facts | {name: record[name] for name in names})
    print_metrics({int(t): values for t, values in record["metrics"].items()})
