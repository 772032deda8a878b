"""Metric log and progress bar of a training run."""

import contextlib
import json
import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from prfl_fast.data.video import write_image
from prfl_fast.utils.checks import plain
from prfl_fast.utils.io import write_atomic
from prfl_fast.utils.optional import need

LOG, WANDB_ID = "log.jsonl", "wandb-id"
_log = logging.getLogger("prfl_fast")


def check_loggers(tensorboard: bool, wandb: bool) -> None:
    """Raise :class:`MissingExtraError` if a log is wanted whose package is not installed."""
    if tensorboard:
        need("tensorboard")  # a missing one is reported by this name, not by torch.utils'
    if wandb:
        need("wandb", "wandb")


class TrainingLog:
    """Append records to ``log.jsonl`` and, on request, to TensorBoard's files and to wandb.

    Records after ``step`` are removed; -1 removes all. Step 0 is an evaluation before the first.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool, wandb: bool = False) -> None:
        self._folder, path = folder, folder / LOG
        # A resumed run repeats the steps after its checkpoint, so their records are removed.
        # A log of mixed runs may have several records of a step; the last one is kept.
        kept = {at: line for at, line in self._lines(path) if 0 <= at <= step}
        with write_atomic(path) as temporary:
            temporary.write_bytes(b"".join(kept[at] for at in sorted(kept)))
        # Unbuffered: each record is one write, so a killed run leaves complete lines.
        self._file = open(path, "ab", buffering=0)
        self._board = None
        if tensorboard:
            writer = need("torch.utils.tensorboard").SummaryWriter
            self._board = writer(str(folder / "tensorboard"), purge_step=step + 1)
        self._wandb = _wandb_run(folder) if wandb else None

    @staticmethod
    def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
        """Yield the step and the text of each record; lines without a whole step are dropped."""
        for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                step = json.loads(line)["step"]
                if isinstance(step, int) and not isinstance(step, bool) and line.endswith(b"\n"):
                    yield step, line

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one step's record."""
        record = {name: plain(value) for name, value in record.items()}
        self._file.write(json.dumps(record).encode() + b"\n")
        if self._board is not None:
            for name, value in record.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._board.add_scalar(name, value, record["step"])
        if self._wandb is not None:
            # It leaves out the steps that a resumed run repeats, whose numbers are the same.
            shown = {name: value for name, value in record.items() if value is not None}
            self._wandb.log(shown, step=record["step"])

    def write_sheet(self, step: int, sheet: torch.Tensor) -> None:
        """Write a contact sheet, uint8 ``[height, width, 3]``, to ``samples/step-<step>.png``."""
        path = self._folder / "samples" / f"step-{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        write_image(path, sheet)
        if self._board is not None:
            self._board.add_image("eval/samples", sheet, step, dataformats="HWC")
        if self._wandb is not None:
            image = need("wandb", "wandb").Image(sheet.numpy())
            self._wandb.log({"eval/samples": image}, step=step)

    def flush(self) -> None:
        """Flush all records to disk."""
        os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _wandb_run(folder: Path) -> Any:
    """Return the run of Weights & Biases that belongs to a folder, new or resumed.

    If wandb cannot start it, return None: a training must not end because of a service. wandb's
    environment variables choose the project (``WANDB_PROJECT``), the server and the mode.
    """
    wandb = need("wandb", "wandb")
    try:
        name = folder / WANDB_ID
        if not name.is_file():
            with write_atomic(name) as temporary:
                temporary.write_text(secrets.token_hex(8))
        where = {"project": os.environ.get("WANDB_PROJECT", "prfl_fast"), "dir": str(folder)}
        known = {"id": name.read_text(), "name": folder.name, "resume": "allow"}
        return wandb.init(**where, **known)
    except Exception as error:  # noqa: BLE001 - of any type: no key, no network
        _log.warning("run.wandb has no effect: %s", str(error).partition("\n")[0])
        return None


def show_record(bar: Any, record: Mapping[str, Any]) -> None:
    """Count a step on a progress bar, and show its metrics."""
    # Loss and reward first, because a terminal of 80 columns shows no more.
    ordered = sorted(record, key=lambda k: "loss" not in k and "reward" not in k)
    shown = {k: f"{record[k]:.4g}" for k in ordered if "/" in k and record[k] is not None}
    with contextlib.suppress(OSError):  # the terminal may be gone, after SIGHUP
        bar.set_postfix({**shown, "skipped": record["skipped"]}, refresh=False)
        bar.update()
