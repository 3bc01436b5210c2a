"""The pictures of `llsa explain`: one query's way down the levels, and the levels with what was selected from them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

import llsa_np as llsa
from llsa_np.cli.descent import Step, dense, descend, received, spread
from llsa_np.cli.faithfulness import popularity
from llsa_np.cli.tokens import Tokens
from llsa_np.cli.words import count
from llsa_np.options import AttendOptions

Doubles = NDArray[np.float64]
HEAT = colormaps["plasma"]
QUERY = "#39ff5a"
KEPT = "white"
ZOOM = "#5cd6ff"
DPI = 80
COLUMNS = 4
HEADING = 0.75
"""Height of a heading, in inches."""
SMALL = 1600
"""Blocks of less than 1 / SMALL of the picture are drawn enlarged, too."""


class Canvas(NamedTuple):
    """A picture whose cells are keys: where each key lies, and how the levels divide it."""

    photo: Doubles
    """(H, W, 3) in 0..1."""
    place: NDArray[np.int64]
    """(H, W): the key in each cell."""
    keys: llsa.Hierarchy

    @property
    def faded(self) -> Doubles:
        """The photograph in dark grey, for colours to stand out from."""
        grey = self.photo.mean(axis=2, keepdims=True)
        dark: Doubles = np.repeat(0.12 + 0.45 * grey, 3, axis=2)
        return dark

    def owners(self, level: int) -> NDArray[np.int64]:
        """(H, W): the token of a level that stands for each cell."""
        owners: NDArray[np.int64] = self.place // self.keys.block_size**level
        return owners

    def block(self, level: int) -> str:
        """What a token of a level stands for, in words."""
        if level == 0:
            return "1 pixel"
        owners = self.owners(level)
        rows, columns = np.nonzero(owners == 0)
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        regular = all(side % part == 0 for side, part in zip(owners.shape, (height, width), strict=True))
        if regular and height * width == rows.size and (self.keys.counts(level) == rows.size).all():
            return f"{height} × {width} pixels"
        return f"up to {self.keys.block_size**level:,} pixels"

    def tinted(self, shares: Doubles, seen: NDArray[np.bool_], norm: LogNorm) -> Doubles:
        """(H, W, 3): the faded photograph, coloured by shares (N,) where seen (N,)."""
        image = self.faded
        colour = HEAT(norm(np.maximum(shares, norm.vmin or 0.0)))[:, :3]
        here = seen[self.place]
        grey = self.photo.mean(axis=2, keepdims=True)[here]
        image[here] = 0.75 * colour[self.place][here] + 0.3 * grey
        return image


def draw(
    tokens: Tokens, selection: llsa.Selection, options: AttendOptions, at: list[tuple[int, int]], out: Path
) -> list[Path]:
    """Write overview.png and, where the keys have a grid, query-1.png, query-2.png, ... and return their paths.

    options: of the attention that is drawn. at: the cells (row, column) whose queries are drawn, each for another head.
    Of a batch, its first entry.
    """
    keys = selection.key_hierarchy
    if tokens.grid is None or tokens.photo is None or tokens.place is None:
        return [save(_overview_of_sequence(tokens, selection), out / "overview.png")]
    canvas = Canvas(tokens.photo.astype(np.float64), tokens.place.reshape(tokens.grid), keys)
    paths = [save(_overview(tokens, selection, canvas), out / "overview.png")]
    for number, (row, column) in enumerate(at, 1):
        head = (number - 1) % len(tokens.heads)
        query = int(canvas.place[row, column]) * tokens.q.shape[2] // keys.tokens
        figure = _journey(tokens, selection, options, canvas, head, query, (row, column))
        paths.append(save(figure, out / f"query-{number}.png"))
    return paths


def save(figure: Figure, path: Path) -> Path:
    """As a PNG; one that holds a photograph in 256 colours, which takes a third of the size."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    if image.getcolors(2**12) is not None:  # a drawing
        image.save(path, optimize=True)
        return path
    palette = image.quantize(256, method=Image.Quantize.MAXCOVERAGE)
    colours = np.reshape(palette.getpalette() or [], (-1, 3))
    colours[colours.sum(axis=1).argmax()] = 255  # the page is white, not nearly white
    palette.putpalette(colours.ravel().tolist())
    image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
    return path


def _journey(
    tokens: Tokens,
    selection: llsa.Selection,
    options: AttendOptions,
    canvas: Canvas,
    head: int,
    query: int,
    cell: tuple[int, int],
) -> Figure:
    """One query: the photograph, every level from the coarsest down, and all of it beside dense attention."""
    keys = canvas.keys
    q, k = tokens.q[0, head], tokens.k[0, head // (tokens.q.shape[1] // tokens.k.shape[1])]
    steps = descend(query, q, k, [level[0, head] for level in selection], keys, options)
    total, exact = received(steps, keys) * keys.tokens, dense(query, q, k, options.scale) * keys.tokens
    most = max(10.0, np.quantile(exact, 0.999), np.quantile(total, 0.999))
    norm = LogNorm(0.1, 10.0 ** math.ceil(math.log10(most)))

    panels = keys.levels + 5
    columns = 3 if panels % 3 == 0 else COLUMNS
    rows = -(-panels // columns)
    figure = Figure(figsize=(4 * columns, HEADING + rows * _row_height(canvas)), dpi=DPI, facecolor="white")
    _heading(
        figure, f"Where does one pixel look?   {count(keys.tokens, 'pixel')}, attention head: {tokens.heads[head]}", 0
    )
    axes: list[Any] = []
    for row in range(rows):
        top = HEADING + row * _row_height(canvas)
        axes += _row(figure, top, min(columns, panels - row * columns), columns, canvas)

    on_grid = tokens.queries_on_grid
    mark = cell if on_grid else None
    asking = "The pixel at the green cross asks:" if on_grid else f"Query {query:,} asks:"
    _panel(axes[0], canvas.photo, "The query", f"{asking}\nwhich of all these pixels matter to me?", mark)

    parents, enlarged = 0, False
    attended = np.zeros(keys.tokens, bool)
    for number, (axis, step) in enumerate(zip(axes[1:], steps, strict=False), 1):
        seen = np.isin(np.arange(keys.lengths[step.level]), step.candidates)
        seen = seen[np.arange(keys.tokens) // keys.block_size**step.level]
        image = canvas.tinted(spread(step, keys) * keys.tokens, seen, norm)
        part = step.level in options.levels
        if part:
            attended |= seen
        _panel(axis, image, *_words(number, step, canvas, parents, part=part), mark)
        views = [axis]
        if keys.block_size**step.level * SMALL < image.shape[0] * image.shape[1]:
            enlarged = True
            views.append(_zoom(axis, image, spread(step, keys)[canvas.place]))
        if step.level > 0:
            owners = canvas.owners(step.level)
            for view in views:
                _outline(view, owners, np.isin(owners, step.kept), KEPT, 1.4)
                if on_grid:
                    _outline(view, owners, owners == query // keys.block_size**step.level, QUERY, 1.6)
        parents = len(step.kept)
    finest = np.isin(np.arange(keys.tokens), steps[-1].candidates)
    looked_at = count(sum(len(step.candidates) for step in steps if step.level in options.levels), "token")
    elsewhere, rest = (
        ("coarse everywhere else.", ", the rest in blocks") if attended.all() else ("grey is not seen.", "")
    )
    _panel(
        axes[-3],
        canvas.tinted(total, attended, norm),
        "LLSA: all of this together",
        f"{looked_at}: sharp where it matters,\n{elsewhere}",
        mark,
    )
    _panel(
        axes[-2],
        canvas.tinted(exact, np.ones(keys.tokens, bool), norm),
        "Dense attention instead",
        f"All {count(keys.tokens, 'pixel')}, one by one. LLSA sees\n"
        f"{exact[finest].sum() / keys.tokens:.0%} of this pixel by pixel{rest}.",
        mark,
    )
    _legend(figure, axes[-1], norm, on_grid=on_grid, enlarged=enlarged)
    return figure


def _words(number: int, step: Step, canvas: Canvas, parents: int, *, part: bool) -> tuple[str, str]:
    """Title and caption of a level's panel. part: whether the level takes part in attention."""
    seen = len(step.candidates)
    share = (
        f"{step.weights.sum():.0%} of the attention lands here." if part else "This only selects; no attention here."
    )
    title = f"{number}.  Blocks of {canvas.block(step.level)}"
    those = "that one block" if parents == 1 else f"those {parents} blocks"
    if step.level == 0:
        return f"{number}.  Single pixels", f"The {count(seen, 'pixel')} inside {those}.\n{share}"
    if parents == 0:
        best = "it" if seen == 1 else f"the best {len(step.kept)}"
        return title, f"Looks at all {seen:,}, keeps {best} (white).\n{share}"
    return title, f"{count(seen, 'block')} inside {those.removesuffix(' blocks')}. Keeps {len(step.kept)}.\n{share}"


def _panel(
    axis: Any, image: Doubles, title: str, caption: str, mark: tuple[int, int] | None, *, interpolation: str = "nearest"
) -> None:
    axis.imshow(np.clip(image, 0, 1), interpolation=interpolation)
    axis.set_title(title, fontsize=15, weight="bold", pad=7)
    axis.set_xlabel(caption, fontsize=12.5, labelpad=6)
    axis.set_xticks([])
    axis.set_yticks([])
    if mark is not None:
        row, column = mark
        reach = max(image.shape[:2]) / 28
        for width, colour in ((4.5, "black"), (2.2, QUERY)):
            for dx, dy in ((reach, 0), (-reach, 0), (0, reach), (0, -reach)):
                axis.plot([column + dx / 3, column + dx], [row + dy / 3, row + dy], color=colour, linewidth=width)
        axis.set_xlim(-0.5, image.shape[1] - 0.5)
        axis.set_ylim(image.shape[0] - 0.5, -0.5)


def _outline(axis: Any, owners: NDArray[np.int64], inside: NDArray[np.bool_], colour: str, width: float) -> None:
    """A frame around every block of cells of one owner, where `inside`."""
    framed = np.pad(np.where(inside, owners, -1), 1, constant_values=-1)
    segments: list[tuple[tuple[float, float], tuple[float, float]]] = []
    for r, c in np.argwhere(framed[1:-1, 1:] != framed[1:-1, :-1]):
        segments.append(((c - 0.5, r - 0.5), (c - 0.5, r + 0.5)))
    for r, c in np.argwhere(framed[1:, 1:-1] != framed[:-1, 1:-1]):
        segments.append(((c - 0.5, r - 0.5), (c + 0.5, r - 0.5)))
    axis.add_collection(LineCollection(segments, colors=colour, linewidths=width, capstyle="projecting"))


def _zoom(axis: Any, image: Doubles, weights: Doubles) -> Any:
    """An enlarged view of the part of a panel where most of the weight lies, in the corner farthest from it."""
    height, width = weights.shape
    side = max(4, max(height, width) // 7)
    tall, wide = min(side, height), min(side, width)
    sums = np.pad(weights.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    window = sums[tall:, wide:] - sums[:-tall, wide:] - sums[tall:, :-wide] + sums[:-tall, :-wide]
    top, left = (int(i) for i in np.unravel_index(window.argmax(), window.shape))
    inside = weights[top : top + tall, left : left + wide] + 1e-300
    rows, columns = np.indices(inside.shape)
    # The weight in the middle, as far as the picture goes.
    top += round(float((rows * inside).sum() / inside.sum())) - tall // 2
    left += round(float((columns * inside).sum() / inside.sum())) - wide // 2
    top, left = min(max(0, top), height - tall), min(max(0, left), width - wide)
    right = left + wide / 2 < width / 2
    low = top + tall / 2 < height / 2
    inset = axis.inset_axes((0.47 if right else 0.02, 0.02 if low else 0.47, 0.51, 0.51))
    inset.imshow(np.clip(image, 0, 1), interpolation="nearest")
    inset.set_xlim(left - 0.5, left + wide - 0.5)
    inset.set_ylim(top + tall - 0.5, top - 0.5)
    inset.set_xticks([])
    inset.set_yticks([])
    inset.spines[:].set_color(ZOOM)
    inset.spines[:].set_linewidth(2)
    axis.indicate_inset_zoom(inset, edgecolor=ZOOM, alpha=1, linewidth=1.5)
    return inset


def _legend(figure: Figure, axis: Any, norm: LogNorm, *, on_grid: bool, enlarged: bool) -> None:
    """The colour bar, and what frames and grey mean."""
    axis.axis("off")
    lines = [
        ("Colour: how much attention a pixel gets,", "black", "normal"),
        ("alone or as its part of a block.", "black", "normal"),
        ("Grey: not looked at on this level.", "#777777", "bold"),
        ("White frames: kept. Only what is inside", "black", "normal"),
        ("them is looked at on the next level.", "black", "normal"),
    ]
    if on_grid:
        lines += [
            ("Green frame: the pixels that choose", "#0a9a2a", "bold"),
            ("together with the one at the cross.", "#0a9a2a", "bold"),
        ]
    if enlarged:
        lines.append(("Blue frame: the same, enlarged.", "#1290c0", "bold"))
    axis.text(0.04, 0.97, "How to read this", fontsize=15, weight="bold", va="top")
    for i, (text, colour, weight) in enumerate(lines, 1):
        axis.text(0.04, 0.97 - 0.083 * i, text, fontsize=12, color=colour, weight=weight, va="top")
    _colour_bar(figure, axis.inset_axes((0.06, 0.09, 0.88, 0.06)), norm, "1× = an equal share for every pixel")


def _colour_bar(figure: Figure, axis: Any, norm: LogNorm, label: str) -> None:
    bar = figure.colorbar(ScalarMappable(norm, HEAT), cax=axis, orientation="horizontal")
    ticks = [10.0**power for power in range(-1, round(math.log10(norm.vmax or 1.0)) + 1)]
    bar.set_ticks(ticks, labels=[f"{tick:,g}×" for tick in ticks])
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=12)
    bar.set_label(label, fontsize=12)


def _overview(tokens: Tokens, selection: llsa.Selection, canvas: Canvas) -> Figure:
    """The levels as pictures of means, and how often each finest key block was selected."""
    keys = canvas.keys
    columns = max(COLUMNS, keys.levels + 1)
    shown = min(len(tokens.heads), columns)
    below = HEADING + _row_height(canvas)
    figure = Figure(figsize=(4 * columns, 2 * below + 0.95), dpi=DPI, facecolor="white")
    _heading(figure, "The levels: the same picture, coarser and coarser", 0)
    axes = _row(figure, HEADING, keys.levels + 1, columns, canvas)
    pixels = np.empty((keys.tokens, 3))
    pixels[canvas.place.ravel()] = canvas.photo.reshape(-1, 3)
    means = llsa.pool(pixels[None, None], block_size=keys.block_size, levels=keys.levels, backend="numpy")
    for level, of_level in enumerate([pixels, *(mean[0, 0] for mean in means)]):
        title = f"Level {level}: {count(keys.lengths[level], 'token')}"
        caption = "single pixels" if level == 0 else f"each the mean of {canvas.block(level)}"
        _panel(axes[keys.levels - level], of_level[canvas.owners(level)], title, caption, None)

    _heading(figure, f"What was selected: how many queries chose each block of {canvas.block(1)}", below)
    axes = _row(figure, below + HEADING, shown, columns, canvas)
    counts = popularity(selection)[0]
    fair = max(1e-12, counts.mean())
    norm = LogNorm(0.1, 10.0 ** math.ceil(math.log10(max(10.0, counts.max() / fair))))
    for head, axis in enumerate(axes):
        of_token = np.empty(keys.tokens)
        of_token[canvas.place.ravel()] = counts[head][canvas.owners(1).ravel()]
        image = canvas.tinted(of_token / fair, of_token > 0, norm)
        busiest = counts[head].max() / selection.query_hierarchy.lengths[1]
        never = f"never chosen (grey): {(counts[head] == 0).mean():.0%}"
        _panel(
            axis,
            image,
            f"Head: {tokens.heads[head]}",
            f"busiest block: chosen by {busiest:.1%} of queries\n{never}",
            None,
        )
    bar = figure.add_axes((0.3, 0.68 / figure.get_figheight(), 0.4, 0.18 / figure.get_figheight()))
    _colour_bar(figure, bar, norm, "how often chosen; 1× = as often as if all blocks were chosen equally")
    return figure


def _heading(figure: Figure, text: str, top: float) -> None:
    """A line of large text, `top` inches below the figure's upper edge."""
    y = 1 - (top + 0.25) / figure.get_figheight()
    figure.text(0.5, y, text, fontsize=21 if len(text) < 75 else 18, weight="bold", ha="center", va="top")


def _panel_height(canvas: Canvas) -> float:
    """Inches of a panel 3.75 wide; the legend needs most of them."""
    height, width = canvas.place.shape
    return 3.75 * float(np.clip(height / width, 0.9, 1.6))


def _row_height(canvas: Canvas) -> float:
    """Inches of a row of panels, with their titles and captions."""
    return 0.42 + _panel_height(canvas) + 0.62


def _row(figure: Figure, top: float, panels: int, columns: int, canvas: Canvas) -> list[Any]:
    """Axes for a row of panels, `top` inches below the figure's upper edge."""
    total, tall = figure.get_figheight(), _panel_height(canvas)
    lower = 1 - (top + 0.42 + tall) / total
    return [
        figure.add_axes(((column + 0.03) / columns, lower, 0.94 / columns, tall / total)) for column in range(panels)
    ]


def _overview_of_sequence(tokens: Tokens, selection: llsa.Selection) -> Figure:
    """Without a grid: the lengths of the levels, and how often each finest key block was selected."""
    keys = selection.key_hierarchy
    figure = Figure(figsize=(16, 7), dpi=DPI, facecolor="white")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2))
    figure.subplots_adjust(left=0.1, right=0.98, top=0.9, bottom=0.12, wspace=0.15)
    levels = range(keys.levels + 1)
    left.barh(levels, keys.lengths, color=[HEAT(0.15 + 0.7 * level / keys.levels) for level in levels])
    left.set_xscale("log")
    left.set_xlim(1, keys.tokens * 1.2)
    left.set_yticks(levels, [f"level {level}\n{count(keys.lengths[level], 'token')}" for level in levels], fontsize=13)
    left.set_title("The levels", fontsize=17, weight="bold")

    counts = popularity(selection)[0] / selection.query_hierarchy.lengths[1]
    for head, name in list(enumerate(tokens.heads))[:8]:
        right.plot(counts[head], label=f"head {name}", drawstyle="steps-mid", linewidth=1.3)
    right.set_title("What was selected", fontsize=17, weight="bold")
    right.set_xlabel(f"key block ({keys.block_size} tokens each)", fontsize=13)
    right.set_ylabel("share of query blocks that chose it", fontsize=13)
    right.margins(x=0)
    right.legend(loc="upper right", ncols=2, fontsize=11)
    return figure
