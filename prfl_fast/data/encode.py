"""Encode clips and captions to a dataset of latents and conditions, one model at a time.

A run may be killed at any moment: every file is written atomically, the manifest last, and the same
call continues. Batches do not depend on where a run was interrupted, so files have the same bytes.
"""

import json
import shutil
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from prfl_fast.data.clip_lists import Clip
from prfl_fast.data.codec import load_codec, load_image_encoder, load_prompt_encoder
from prfl_fast.data.codec_base import Codec
from prfl_fast.data.codec_files import FILES, Device, find_part, has_part
from prfl_fast.data.encode_plan import (
    Crop,
    EncodePlan,
    EncodeSettings,
    needs_images,
    ordered_map,
    read_object,
)
from prfl_fast.data.families import find_family
from prfl_fast.data.manifest import (
    EMPTY_PROMPT,
    LATENT_SIZE,
    MANIFEST,
    NEGATIVE_PROMPT,
    SHORT,
)
from prfl_fast.data.video import VideoFileError, contact_sheet, read_clip, write_image
from prfl_fast.models.adapter import Conditions
from prfl_fast.models.conditions import IMAGE, TEXT
from prfl_fast.utils.checks import check
from prfl_fast.utils.digests import write_digests
from prfl_fast.utils.io import (
    clean_temporaries,
    digest_of,
    load_tensors,
    open_tensors,
    save_tensors,
    write_atomic,
    write_json,
)
from prfl_fast.utils.modules import free_memory
from prfl_fast.utils.progress import step_progress

RECORD = "encode.json"  # settings, models and clips of a dataset
PREVIEW = "preview"
TEXT_BATCH = 8
PREVIEWS = 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def model_identity(model: Path) -> dict[str, Any]:
    """Return names and sizes of the files of a pipeline's parts, and digests of their settings."""
    found: dict[str, Any] = {}
    parts = [part for part in FILES if part != "image_encoder" or has_part(model, part)]
    if find_family(model) is not None:
        folders = sorted(path.name for path in model.iterdir() if path.is_dir())
        parts = [name for name in folders if name != "transformer"]
    for part in parts:
        place = model / part if (model / part).is_dir() else find_part(model, part)
        files = [place] if place.is_file() else sorted(p for p in place.iterdir() if p.is_file())
        found[part] = {
            file.name: digest_of(file) if file.suffix == ".json" else file.stat().st_size
            for file in files
        }
    return found


class Encoding:
    """Encode the samples of a plan into a folder; see :func:`encode_dataset`."""

    def __init__(
        self,
        plan: EncodePlan,
        settings: EncodeSettings,
        model: Path,
        out: Path,
        *,
        device: Device = "cpu",
        workers: int = 1,
        budget: int | None = None,
    ) -> None:
        self.plan, self.settings, self.model, self.out = plan, settings, model, out
        self.device, self.workers, self.budget = device, workers, budget
        self.dtype = DTYPES[settings.dtype]
        self.parts = out / "parts"
        self.skipped = dict(plan.skipped)
        self.cut: list[str] = []  # texts with too many tokens
        self.images = needs_images(model, settings.condition)
        clips = [crop.clip for crop in plan.crops]
        texts = [t for clip in clips for t in (clip.caption, clip.short_caption) if t is not None]
        if find_family(model) is not None:  # short captions would lack masks and pooled states
            texts = [clip.caption for clip in clips]
        negative = [] if settings.negative is None else [settings.negative]
        self.texts = list(dict.fromkeys(["", *negative, *texts]))
        self._places = {text: place for place, text in enumerate(self.texts)}

    def open(self) -> bool:
        """Begin or continue in the folder; return True if it is complete.

        Raises:
            ValueError: if the folder was begun from other clips, settings or models, or has another
                dataset.
        """
        record = self.out / RECORD
        wanted = json.loads(json.dumps(self._record()))
        known = record.is_file()
        ok = known or not (self.out / MANIFEST).exists()
        check(ok, "OUT", str(self.out), f"a folder without {MANIFEST}, or one of this command")
        if known:
            self._check_record(record, wanted)
        if (self.out / MANIFEST).is_file():
            shutil.rmtree(self.parts, ignore_errors=True)
            return True
        for folder in (self.out, self.out / "samples", self.parts / "texts", self.parts / "images"):
            folder.mkdir(parents=True, exist_ok=True)
            clean_temporaries(folder)
        if not known:
            write_json(record, wanted)
        return False

    @staticmethod
    def _check_record(record: Path, wanted: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` with the first place in which a folder's record differs."""
        hint = "Call it as it was begun, or choose a new folder"
        begun, now = _flat(read_object(record)), _flat(wanted)
        for key in (*now, *begun):
            before, value = begun.get(key), now.get(key)
            check(before == value, f"{record}: {key}", before, f"{value!r} of this call", hint=hint)

    def _record(self) -> dict[str, Any]:
        clips: dict[str, Clip] = {crop.clip.id: crop.clip for crop in self.plan.crops}
        listed = [
            [clip.id, self.plan.digests[clip.id], clip.caption, clip.short_caption, clip.labels]
            for clip in clips.values()
        ]
        return {
            "settings": self.settings._asdict(),
            "model": model_identity(self.model),
            "clips": listed,
        }

    def sample_path(self, number: int) -> Path:
        """Return the file of a sample of the plan."""
        return self.out / "samples" / f"{number:06d}.safetensors"

    def encode_texts(self) -> None:
        """Write the states of all texts, a file for each batch of texts."""
        batches = [self.texts[i : i + TEXT_BATCH] for i in range(0, len(self.texts), TEXT_BATCH)]
        paths = [self.parts / "texts" / f"{i:06d}.safetensors" for i in range(len(batches))]
        todo = [i for i, path in enumerate(paths) if not _is_whole(path)]
        if not todo:
            return
        encoder = load_prompt_encoder(self.model, self.device, self.dtype, self.settings.fps)
        with step_progress("texts", len(paths) - len(todo), len(paths)) as bar:
            for i in todo:
                self.cut += filter(encoder.is_cut, batches[i])
                texts = enumerate(encoder.conditions(batches[i]))
                tensors = {f"{k}.{name}": t for k, text in texts for name, t in text.items()}
                save_tensors(tensors, paths[i])
                bar.update()
        del encoder
        free_memory()

    def text(self, text: str) -> Conditions:
        """Return the conditions of an encoded text, with its states in the dtype of the files."""
        batch, place = divmod(self._places[text], TEXT_BATCH)
        with open_tensors(self.parts / "texts" / f"{batch:06d}.safetensors") as file:
            names = [name for name in file.keys() if name.startswith(f"{place}.")]
            found = {name.partition(".")[2]: file.get_tensor(name) for name in names}
        # LTX's scale of positions would be 0.1 % off in bfloat16.
        return {name: t.to(self.dtype) if t.ndim > 1 else t for name, t in found.items()}

    def encode_images(self) -> None:
        """Write the CLIP states of the given frames of each sample."""
        if not self.images:
            return
        whole = self.settings.condition == "first-last"
        with self._videos("images", self.parts / "images", whole) as videos:
            encoder = None
            for _, path, video in videos:
                if encoder is None:
                    encoder = load_image_encoder(self.model, self.device, self.dtype)
                frames = [video[:, 0], video[:, -1]] if whole else [video[:, 0]]
                save_tensors({IMAGE: encoder(frames).to(self.dtype)}, path)
        del encoder
        free_memory()

    def encode_videos(self, preview: bool = False) -> None:
        """Write all samples, and decoded frames of three of them if ``preview``."""
        codec = None
        with self._videos("videos", self.out / "samples", True) as videos:
            for number, path, video in videos:
                if codec is None:
                    codec = load_codec(self.model, self.device, budget=self.budget)
                crop, condition = self.plan.crops[number], self.settings.condition
                tensors = {"latents": codec.encode(video[None])[0]}
                if condition != "none":
                    last = video[:, -1] if condition == "first-last" else None
                    tensors |= codec.image_condition(video[:, 0], crop.frames, last)
                tensors |= self.text(crop.clip.caption)
                short = crop.clip.short_caption
                if short in self._places and (states := self.text(short)).keys() == {TEXT}:
                    tensors[SHORT] = states[TEXT]
                if self.images:
                    tensors |= load_tensors(self.parts / "images" / path.name)
                save_tensors({n: t.to(self.dtype) for n, t in tensors.items()}, path)
        if preview:
            self.write_preview(codec)
        del codec
        free_memory()

    def write_prompts(self) -> None:
        """Write the texts of prompts without clips, with the size of their latents."""
        codec = load_codec(self.model)
        for number, crop in enumerate(self.plan.crops):
            size = ",".join(map(str, codec.latent_shape(crop.frames, *crop.size)))
            text = self.text(crop.clip.caption)
            save_tensors(text, self.sample_path(number), {LATENT_SIZE: size})

    @contextmanager
    def _videos(
        self, name: str, folder: Path, whole: bool
    ) -> Iterator[Iterator[tuple[int, Path, torch.Tensor]]]:
        """Yield an iterator over the samples that a folder lacks: number, file, frames.

        Frames are ``[3, F, H, W]``, the first one only unless ``whole``. Clips that cannot be read
        are skipped.
        """
        paths = [folder / f"{i:06d}.safetensors" for i in range(len(self.plan.crops))]
        live = [i for i, crop in enumerate(self.plan.crops) if crop.clip.id not in self.skipped]
        todo = [i for i in live if not _is_whole(paths[i])]

        def read(i: int) -> torch.Tensor | VideoFileError:
            try:
                return _read(self.plan.crops[i], self.settings.fps, whole)
            except VideoFileError as error:
                return error

        def videos() -> Generator[tuple[int, Path, torch.Tensor], None, None]:
            for i, video in ordered_map(read, todo, self.workers):
                if isinstance(video, VideoFileError):
                    self.skipped[self.plan.crops[i].clip.id] = str(video)
                else:
                    yield i, paths[i], video
                bar.update()

        if not todo:
            yield iter(())
            return
        progress = step_progress(name, len(live) - len(todo), len(live))
        # Closed at once after an error: the garbage collector would join its threads at any place.
        with progress as bar, closing(videos()) as found:
            yield found

    def write_preview(self, codec: Codec | None = None) -> None:
        """Write sheets of source frames above decoded ones, with a loaded codec or a new one."""
        codec = codec or load_codec(self.model, self.device, budget=self.budget)
        done = [i for i in range(len(self.plan.crops)) if self.sample_path(i).is_file()]
        folder = self.out / PREVIEW
        folder.mkdir(exist_ok=True)
        for i in done[:: max(1, len(done) // PREVIEWS)][:PREVIEWS]:
            latents = load_tensors(self.sample_path(i))["latents"]
            decoded = codec.decode(latents[None].to(self.device))[0].float().cpu()
            source = _read(self.plan.crops[i], self.settings.fps, True)
            write_image(folder / f"{i:06d}.png", contact_sheet([source, decoded]))

    def finish(self) -> int:
        """Write the texts beside the samples, digests and the manifest; return the samples.

        Raises:
            ValueError: if all clips were skipped.
        """
        crops = [
            (i, crop) for i, crop in enumerate(self.plan.crops) if crop.clip.id not in self.skipped
        ]
        reason = next(iter(self.skipped.values()), "")
        check(bool(crops), "clips that can be read", 0, f"at least one: {reason}")
        names = [EMPTY_PROMPT]
        save_tensors(self.text(""), self.out / EMPTY_PROMPT)
        if self.settings.negative is not None:
            names.append(NEGATIVE_PROMPT)
            save_tensors(self.text(self.settings.negative), self.out / NEGATIVE_PROMPT)
        lines = []
        for i, crop in crops:
            name = f"samples/{i:06d}.safetensors"
            names.append(name)
            record: dict[str, Any] = {"id": crop.id, "latents": name, "caption": crop.clip.caption}
            if crop.clip.labels:
                record["labels"] = dict(crop.clip.labels)
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        write_digests(self.out, tuple(names))
        with write_atomic(self.out / MANIFEST) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")
        shutil.rmtree(self.parts)
        return len(crops)


def encode_dataset(encoding: Encoding, preview: bool = False) -> int:
    """Run all stages of an encoding and return the number of samples; finished ones are skipped.

    Raises:
        ValueError: if the folder was begun from other clips, settings or models, no clip can be
            read, or a tensor of a model does not fit.
    """
    if encoding.open():
        if preview and not (encoding.out / PREVIEW).is_dir():
            encoding.write_preview()
        return (encoding.out / MANIFEST).read_text(encoding="utf-8").count("\n")
    encoding.encode_texts()
    if encoding.plan.crops[0].clip.path is None:
        encoding.write_prompts()
    else:
        encoding.encode_images()
        encoding.encode_videos(preview)
    return encoding.finish()


def _read(crop: Crop, fps: float, whole: bool) -> torch.Tensor:
    assert crop.clip.path is not None
    frames = crop.frames if whole else 1
    return read_clip(crop.clip.path, frames, crop.size, fps=fps, start=crop.start, at=crop.at)


def _is_whole(path: Path) -> bool:
    try:
        with open_tensors(path):
            return True
    except (ValueError, OSError):
        return False


def _flat(record: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a record by their dotted places."""
    if not isinstance(record, dict | list):
        return {prefix: record}
    items: Sequence[tuple[Any, Any]] = (
        list(record.items()) if isinstance(record, dict) else list(enumerate(record))
    )
    found: dict[str, Any] = {}
    for key, value in items:
        found |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found
