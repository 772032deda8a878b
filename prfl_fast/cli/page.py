"""Write a comparison as one HTML file that needs no server and no network."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from prfl_fast.sampling.generate import Video, frame_strip
from prfl_fast.utils.io import write_atomic
from prfl_fast.utils.optional import need
from prfl_fast.utils.units import plural, short_number

PAGE = "index.html"
# Videos above this many bytes together are left out; strips of frames stand for them.
_VIDEO_BYTES = 64 << 20
_COLORS = ("#444444", "#1b6ca8", "#c8553d", "#588157", "#7b4b94", "#b08900")
_MARKERS = "os^Dv*"
_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto;
  padding: 16px; max-width: 1248px; }
h1 { font-size: 1.5rem; margin: 0 0 8px; } h2 { font-size: 1.2rem; margin: 32px 0 8px; }
p { margin: 4px 0 12px; max-width: 75ch; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid #ddd; }
td.n, th.n { text-align: right; }
.charts { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 360px),
  1fr)); }
.charts svg { width: 100%; height: auto; max-width: 560px; }
.row { display: grid; gap: 12px; margin: 0 0 16px; grid-template-columns: repeat(auto-fit,
  minmax(min(100%, 170px), 1fr)); }
figure { margin: 0; } figcaption { font-weight: 600; overflow-wrap: anywhere; }
figcaption small { font-weight: 400; color: #555; }
.seed { color: #555; font-size: 0.875rem; margin: 0 0 4px; }
video, figure img { width: 100%; max-width: 832px; display: block; background: #eee; }
figure img { margin-top: 4px; }
blockquote { margin: 24px 0 4px; padding-left: 12px; border-left: 3px solid #ccc;
  overflow-wrap: anywhere; }
@media (max-width: 600px) { table { font-size: 0.875rem; } th, td { padding-right: 8px; } }
"""


def write_page(
    out: Path, found: Mapping[str, Any], videos: Sequence[Video], prompts: Sequence[str]
) -> None:
    """Write ``index.html`` with the figures of :func:`prfl_fast.sampling.compare.compare_scores`.

    Args:
        out: folder of the comparison, with a folder of videos for each generator.
        found: the figures, with ``arms`` (weights by name), ``timesteps``, ``scores`` and
            ``settings``.
        videos: those of each generator.
        prompts: texts by number.

    Raises:
        MissingExtraError: if matplotlib or pillow is not installed.
    """
    arms, settings = found["arms"], found["settings"]
    title = f"Comparison of {_text(', '.join(arms))}"
    parts = [
        f"<h1>{title}</h1>",
        f"<p>{plural(len(prompts), 'prompt')}, {plural(len(videos), 'video')} of each generator "
        f"from the same noise, {plural(settings['num_inference_steps'], 'step')}, "
        f"shift {settings['shift']:g}, guidance scale {_numbers(settings['guidance_scale'])}.</p>",
        _generators(found),
        *_wins(found["wins"]),
        "<h2>Rewards and drift</h2>",
        "<p>A reward is the mean score of videos with noise added up to each timestep, with a "
        "95&nbsp;% interval of the mean. Low timesteps are nearly clean; at 1000 a score says "
        "nothing about the video. Drift is the relative L2 distance of the velocity from that of "
        "base, at the latents of base. A reward that rises while the videos get worse, with large "
        "drift, is being exploited.</p>",
        f'<div class="charts">{"".join(_charts(found))}</div>',
        "<h2>Videos</h2>",
        *_gallery(out, found, videos, prompts),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )
    with write_atomic(out / PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _text(value: object) -> str:
    return html.escape(str(value))


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]], numbers: int = 0) -> str:
    """Return a table whose last ``numbers`` columns are aligned at the right."""
    first = len(columns) - numbers

    def line(tag: str, cells: Sequence[object]) -> str:
        marks = (' class="n"' if i >= first else "" for i in range(len(cells)))
        inner = (f"<{tag}{m}>{_text(c)}</{tag}>" for c, m in zip(cells, marks, strict=True))
        return f"<tr>{''.join(inner)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f'<div class="scroll"><table>{line("th", columns)}{body}</table></div>'


def _numbers(value: float | Sequence[float]) -> str:
    return f"{value:g}" if isinstance(value, int | float) else ", ".join(f"{v:g}" for v in value)


def _generators(found: Mapping[str, Any]) -> str:
    """Return the table of the generators with their mean rewards and drift."""
    rows = []
    for arm, weights in found["arms"].items():
        means = [mean(by_arm[arm]["mean"]) for by_arm in found["rewards"].values()]
        drift = found["drift"].get(arm)
        drifted = "" if drift is None else short_number(mean(drift.values()))
        place = weights or found["settings"]["model"]
        rows.append((arm, place, *(f"{value:.3f}" for value in means), drifted))
    columns = ("generator", "weights", *found["rewards"], "drift")
    return _table(columns, rows, numbers=len(columns) - 2)


def _wins(wins: Sequence[Mapping[str, Any]]) -> list[str]:
    if not wins:
        return []
    rows = [
        (
            *(win["reward"], f"{win['arm']} against {win['against']}", f"{win['rate']:.2f}"),
            f"{win['low']:.2f} to {win['high']:.2f}",
            f"{win['wins']} / {win['losses']} / {win['ties']}",
        )
        for win in wins
    ]
    columns = ("reward", "generators", "win rate", "95 % interval", "won / lost / tied")
    return [
        "<h2>Win rates</h2>",
        "<p>Share of videos whose mean score over the timesteps is higher, a tie counting half, "
        "with Wilson's interval. A rate whose interval holds 0.5 shows no difference.</p>",
        _table(columns, rows, numbers=3),
    ]


def _charts(found: Mapping[str, Any]) -> list[str]:
    """Return a chart of each reward and one of the drift."""
    times, names = found["timesteps"], list(found["arms"])
    charts = []
    for reward, arms in found["rewards"].items():
        lines = {arm: (times, arms[arm]["mean"], arms[arm]["interval"]) for arm in arms}
        charts.append(_chart(f"score of {reward}", "timestep", lines, names))
    drift = {
        arm: ([int(step) for step in by_step], list(by_step.values()), None)
        for arm, by_step in found["drift"].items()
    }
    return [*charts, _chart("drift from base", "solver step", drift, names, floor=0.0)]


def _chart(
    title: str,
    axis: str,
    lines: Mapping[str, tuple[Sequence[int], Sequence[float], Sequence[float | None] | None]],
    names: Sequence[str],
    floor: float | None = None,
) -> str:
    """Return a line chart as inline SVG; a generator has the same color in all charts."""
    matplotlib = need("matplotlib", "video")
    text = io.StringIO()
    # Names are no formulas. Without a salt, the ids inside change from run to run.
    options = {"text.parse_math": False, "svg.hashsalt": title, "font.size": 12}
    with matplotlib.rc_context(options):
        figure = need("matplotlib.figure", "video").Figure(figsize=(5, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for arm, (x, y, halves) in lines.items():
            errors = None if halves is None else [half or 0.0 for half in halves]
            place = names.index(arm)
            # Equal lines stay visible, because later ones are thinner.
            width = max(1.5, 4.0 - 1.2 * place)
            style = {"color": _COLORS[place % len(_COLORS)], "linewidth": width, "elinewidth": 1.5}
            style |= {"marker": _MARKERS[place % len(_MARKERS)], "capsize": 3}
            # A legend leaves out labels that begin with an underscore, but not with a space.
            axes.errorbar(x, y, errors, label=f" {arm}", **style)
        axes.set(title=title, xlabel=axis)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if floor is not None:
            top = max((max(y) for _, y, _ in lines.values()), default=0.0)
            axes.set_ylim(floor, 1.1 * top if top > floor else floor + 1.0)
        axes.legend(frameon=False)
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _gallery(
    out: Path, found: Mapping[str, Any], videos: Sequence[Video], prompts: Sequence[str]
) -> list[str]:
    """Return the videos of each prompt side by side, with strips of their frames."""
    arms, parts = list(found["arms"]), []
    paths = {(arm, v.name): out / arm / f"{v.name}.mp4" for arm in arms for v in videos}
    if not all(path.is_file() for path in paths.values()):
        return ["<p>The videos were not decoded (--latents-only).</p>"]
    size = sum(path.stat().st_size for path in paths.values())
    shown = size <= _VIDEO_BYTES
    if not shown:
        parts.append(
            f"<p>The videos have {size >> 20} MiB together, so this page shows strips of frames. "
            "The files are in the folders beside it.</p>"
        )
    before = None
    for i, video in enumerate(videos):
        if video.prompt != before:
            parts.append(f"<blockquote>{_text(prompts[video.prompt])}</blockquote>")
        before = video.prompt
        parts.append(f'<p class="seed">Seed {video.seed}</p><div class="row">')
        for arm in arms:
            scores = [
                f"{name} {sum(by_arm[arm][i]) / len(by_arm[arm][i]):.3f}"
                for name, by_arm in found["scores"].items()
            ]
            caption = f"{_text(arm)} <small>{_text(', '.join(scores))}</small>"
            path = paths[arm, video.name]
            media = _strip(path)
            if shown:
                data = base64.b64encode(path.read_bytes()).decode()
                media = (
                    "<video controls autoplay loop muted playsinline "
                    f'src="data:video/mp4;base64,{data}"></video>{media}'
                )
            parts.append(f"<figure><figcaption>{caption}</figcaption>{media}</figure>")
        parts.append("</div>")
    return parts


def _strip(path: Path) -> str:
    """Return eight frames of a video in a row, as an image inside the page."""
    frames = frame_strip(path)
    buffer = io.BytesIO()
    need("PIL.Image", "video").fromarray(frames.numpy()).save(buffer, "JPEG", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="frames of {_text(path.stem)}" src="data:image/jpeg;base64,{data}">'
