"""Write weights in other layouts: ``prfl-fast convert`` and ``prfl-fast merge``."""

import argparse
from pathlib import Path

from prfl_fast.models.conversion import (
    FILE,
    FOLDER,
    check_output,
    check_single,
    convert_wan,
    merge_lora,
)
from prfl_fast.models.lora_files import lora_file, read_lora, write_lora
from prfl_fast.rewards.latent import FORMAT, LatentRewardModel
from prfl_fast.rewards.reference_checkpoint import read_settings, reference_parts
from prfl_fast.utils.checks import check
from prfl_fast.utils.io import clean_temporaries_of
from prfl_fast.utils.progress import count_progress


def run_convert(options: argparse.Namespace) -> int:
    """Write a generator, a LoRA or a reward model in another layout; return the exit code."""
    source, out, layout = Path(options.source), Path(options.out), options.layout
    check(source.exists(), "IN", str(source), "a file or folder that exists")
    check_single(source, "IN")
    clean_temporaries_of(out)
    parts = reference_parts(source) if source.is_dir() else None
    if parts is not None or read_settings(source).get("format") == FORMAT:
        kind = "reward model"
        check(layout in ("diffusers", "official"), "--layout", layout, "diffusers or official")
        check_output(out, FOLDER)
        if parts is None:
            reward = LatentRewardModel.load(source)
        else:
            reward = LatentRewardModel.load_reference(None, *parts)
        (reward.save if layout == "diffusers" else reward.save_reference)(out)
    elif lora_file(source) is not None:
        kind = "adapter"
        lora = read_lora(source)
        check_output(out, FILE)
        write_lora(lora, out, layout)
    else:
        kind = "generator"
        expected = "diffusers, official or comfyui for a generator"
        check(layout != "kohya", "--layout", layout, expected, hint="Layout kohya holds only LoRA")
        with count_progress("convert", "tensors") as show:
            convert_wan(source, out, layout, show=show)
    print(f"{kind}: {out}")
    return 0


def run_merge(options: argparse.Namespace) -> int:
    """Add a LoRA to the weights of a generator; return the exit code."""
    clean_temporaries_of(options.out)
    with count_progress("merge", "tensors") as show:
        merge_lora(options.source, options.adapter, options.out, options.layout, show=show)
    print(f"generator: {options.out}")
    return 0
