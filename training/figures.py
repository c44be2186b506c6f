"""Draws pictures of plain arrays. Each function returns a matplotlib Figure; `figure.savefig(path)` keeps it.

Colours are one hue from light to dark, or viridis and inferno, whose lightness only rises, so that they read the same
in print and for every kind of colour vision. Classes, which have no order, have the colours of Okabe and Ito, which
everyone can tell apart. Images are (H, W, C) with values from 0 to 1; three channels are shown in colour, and any other
number as their mean in grey. Boxes are left, top, right and bottom as fractions of the image.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure  # not pyplot: no window system, no global state
from matplotlib.patches import Rectangle

from training.run.log import read_metrics

GREY_TEXT = "0.35"
COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def curves(metrics_file: str | Path) -> Figure:
    """Draws the losses of a run, its accuracy or average precision if there is one, and its learning rate.

    Args:
        metrics_file: JSON lines with "step" and any of "loss", "learning_rate", "eval_loss", "eval_accuracy",
            "eval_map". A torn last line, left by a run that was killed while writing, is ignored.

    Raises:
        ValueError: no line has a loss.
    """
    lines = read_metrics(metrics_file)
    score = "eval_map" if any("eval_map" in line for line in lines) else "eval_accuracy"
    names = ("loss", "learning_rate", "eval_loss", score)
    losses, rates, evaluations, scores = (_series(lines, key) for key in names)
    if not losses[0] and not evaluations[0]:
        raise ValueError(f"{metrics_file}: no line has a loss, nothing to draw")

    heights = [4, 2, 1] if scores[0] else [4, 1]
    figure = Figure(figsize=(7, 1.2 + 0.68 * sum(heights)), dpi=150, layout="constrained")
    upper, *middle, lower = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    if losses[0]:
        steps, values = losses
        upper.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.8)
        upper.plot(steps, _smooth(values), color="tab:blue", linewidth=1.6, label="training (smoothed)")
    for axes, (steps, values) in zip((upper, *middle), (evaluations, scores), strict=False):
        if steps:
            axes.plot(steps, values, color="tab:orange", marker="o", markersize=4, linewidth=1.2, label="evaluation")
            # The number is on the side away from the curve of the training loss.
            below = axes is upper and bool(losses[0]) and values[-1] < losses[1][-1]
            offset = (0, -14 if below else 7)
            axes.annotate(f"{values[-1]:.3f}", (steps[-1], values[-1]), offset, textcoords="offset points", ha="center")
    upper.set_ylabel("loss")
    upper.legend(frameon=False)
    for axes in middle:
        axes.set_ylabel("AP" if score == "eval_map" else "accuracy")
    for axes in (upper, *middle):
        axes.margins(y=0.12)  # room for the number
    lower.plot(*rates, color="tab:gray", linewidth=1.2)
    lower.set_ylim(bottom=0)
    lower.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    lower.set_ylabel("learning rate")
    lower.set_xlabel("step")
    for axes in (upper, *middle, lower):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.2)
    figure.align_ylabels()
    return figure


def confusion_matrix(counts: np.ndarray, label_names: list[str]) -> Figure:
    """Draws which class (row) was taken for which (column).

    Shades are fractions of a row, so that rare classes count as much as frequent ones. The numbers are counts; they are
    left out if there are more than 30 classes.

    Args:
        counts: (C, C) whole numbers, [true class, predicted class].
    """
    counts = np.asarray(counts)
    if counts.shape != (len(label_names), len(label_names)):
        raise ValueError(f"counts of shape {counts.shape} do not fit {len(label_names)} label_names")
    num_labels, totals = len(counts), counts.sum(axis=1, keepdims=True)
    fractions = counts / np.maximum(totals, 1)
    size = float(np.clip(0.42 * num_labels, 2.8, 9))
    longest = min(max(map(len, label_names)), 24) * 0.075
    figure = Figure(figsize=(size + longest + 0.7, size + longest + 0.9), dpi=150, layout="constrained")
    axes = figure.subplots()
    # Errors are few compared to right answers; under a square root they still show.
    axes.imshow(fractions, cmap="Blues", norm=PowerNorm(0.5, 0, 1))
    axes.set_title(f"{np.trace(counts) / max(totals.sum(), 1):.2%} of {totals.sum():,} are right", fontsize=10)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    ticks = np.arange(0, num_labels, -(-num_labels // 60))  # at most 60 classes are named
    names = [_shorten(label_names[tick]) for tick in ticks]
    rotation = 0 if max(map(len, names)) <= 3 else 90
    axes.set_xticks(ticks, names, rotation=rotation, fontsize=8, parse_math=False)
    axes.set_yticks(ticks, names, fontsize=8, parse_math=False)
    axes.tick_params(length=0)
    axes.spines[:].set_color("0.8")
    if num_labels <= 30:
        digits = len(str(counts.max()))
        fontsize = min(8, 72 * size / num_labels / (0.75 * digits + 0.5))
        for (row, column), count in np.ndenumerate(counts):
            if count:
                color = "white" if fractions[row, column] > 0.3 else "0.15"
                axes.text(column, row, f"{count}", color=color, fontsize=fontsize, ha="center", va="center")
    return figure


def image_attention(images: np.ndarray, rollout: np.ndarray, heads: np.ndarray) -> Figure:
    """Draws what a model attends to in each image, as light on it: attention rollout, and the heads of one layer.

    Every map has a scale of its own, from its least to its greatest value.

    Args:
        images: (B, H, W, C).
        rollout: (B, rows, columns), over the patches.
        heads: (B, N, rows, columns), over the patches.
    """
    num_heads, (height, width) = heads.shape[1], images.shape[1:3]
    lines = 1 if num_heads <= 4 else 2 if num_heads <= 16 else 3
    columns = -(-num_heads // lines)
    cell = 1.9 if lines == 1 else 1.15  # inches of the longer side
    cell_width, cell_height = cell * width / max(height, width), cell * height / max(height, width)
    gap, title = 0.06, 0.22
    wraps = lines > 1  # then every image needs titles
    step = cell_height + title * wraps
    big_height = (lines - 1) * step + cell_height
    big_width = big_height * width / height
    block = big_height + gap + title * wraps
    left = 2 * (big_width + gap) + 0.1 + gap
    figure = Figure(figsize=(left + columns * (cell_width + gap), title + len(images) * block), dpi=150)
    for number, (image, whole, maps) in enumerate(zip(images, rollout, heads, strict=True)):
        top, is_titled = title + number * block, wraps or number == 0
        _show(_add_axes(figure, gap, top, big_width, big_height, "image" * is_titled), image)
        frame = (gap + big_width + gap, top, big_width, big_height)
        _show_map(_add_axes(figure, *frame, "rollout of all layers" * is_titled), image, whole)
        for head, map in enumerate(maps):
            line, column = divmod(head, columns)
            frame = (left + column * (cell_width + gap), top + line * step, cell_width, cell_height)
            _show_map(_add_axes(figure, *frame, f"head {head + 1}" * is_titled), image, map)
    return figure


def reconstruction_triples(images: np.ndarray, visible: np.ndarray, reconstructed: np.ndarray) -> Figure:
    """Draws each image, its visible part, and the image that a model made of that (He et al. 2022, figure 2).

    Args:
        images, visible, reconstructed: (B, H, W, C); NaN where nothing is visible.
    """
    height, width = images.shape[1:3]
    across = min(2, len(images))  # triples side by side
    cell_width, cell_height = 1.5 * width / max(height, width), 1.5 * height / max(height, width)
    gap, margin, title = 0.05, 0.3, 0.24
    lines = -(-len(images) // across)
    triple = 3 * cell_width + 2 * gap
    size = (across * triple + (across - 1) * margin + 2 * gap, title + lines * (cell_height + gap))
    figure = Figure(figsize=size, dpi=150)
    for number, parts in enumerate(zip(images, visible, reconstructed, strict=True)):
        line, block = divmod(number, across)
        for column, (part, name) in enumerate(zip(parts, ("image", "visible", "reconstructed"), strict=True)):
            left = gap + block * (triple + margin) + column * (cell_width + gap)
            top = title + line * (cell_height + gap)
            axes = _add_axes(figure, left, top, cell_width, cell_height, "" if line else name)
            _show(axes, part)
    return figure


def similarity_of_positions(vectors: np.ndarray) -> Figure:
    """Draws the cosine similarity of each patch's position to all others (Dosovitskiy et al. 2021, figure 7, centre).

    The tile in row r and column c compares the patch at (r, c) with the whole grid. If the grid has more than 14 rows
    or columns, 14 of them are shown, evenly spread.

    Args:
        vectors: (rows, columns, D).
    """
    rows, columns = vectors.shape[:2]
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    chosen = [np.unique(np.linspace(0, size - 1, min(size, 14)).round().astype(int)) for size in (rows, columns)]
    similarities = np.einsum("rcd,hwd->rchw", unit[np.ix_(*chosen)], unit)
    tall, wide = len(chosen[0]), len(chosen[1])
    space = max(1, round(0.08 * max(rows, columns)))
    board = np.full((tall * (rows + space) - space, wide * (columns + space) - space), np.nan)
    for row in range(tall):
        for column in range(wide):
            top, left = row * (rows + space), column * (columns + space)
            board[top : top + rows, left : left + columns] = similarities[row, column]

    height, width = (5.2 * side / max(board.shape) for side in board.shape)
    left, top, bar = 0.55, 0.1, 0.9
    figure = Figure(figsize=(left + width + bar, top + height + 0.45), dpi=150)
    axes = _add_axes(figure, left, top, width, height)
    picture = axes.imshow(board, cmap="viridis", vmin=-1, vmax=1, interpolation="nearest", aspect="auto")
    axes.set_yticks(np.arange(tall) * (rows + space) + (rows - 1) / 2, chosen[0] + 1)
    axes.set_xticks(np.arange(wide) * (columns + space) + (columns - 1) / 2, chosen[1] + 1)
    axes.set_ylabel("row of the patch", fontsize=9)
    axes.set_xlabel("column of the patch", fontsize=9)
    axes.tick_params(length=0, labelsize=8)
    _color_bar(figure, picture, left + width + 0.1, top, min(height, 3), "cosine similarity", [-1, -0.5, 0, 0.5, 1])
    return figure


def principal_filters(weight: np.ndarray, num_filters: int = 28) -> Figure:
    """Draws the first principal components of the filters of a first layer (Dosovitskiy et al. 2021, figure 7, left).

    They show which patches the layer tells apart, the greatest differences first. Each is scaled to the full range,
    with 0 in the middle.

    Args:
        weight: (D, C, height, width), as a convolution has it.
    """
    filters = weight.reshape(len(weight), -1)
    _, sizes, components = np.linalg.svd(filters - filters.mean(axis=0), full_matrices=False)
    num_filters = min(num_filters, int((sizes > 1e-6 * sizes[0]).sum()))
    if num_filters == 0:
        raise ValueError("all filters of the first layer are the same, so they have no principal components")
    components = components[:num_filters] * np.sign(components[:num_filters].sum(axis=1, keepdims=True))
    components = components.reshape(-1, *weight.shape[1:]).transpose(0, 2, 3, 1)
    columns = 7 if num_filters % 7 == 0 else math.ceil(num_filters**0.5)
    lines, cell, gap = -(-num_filters // columns), 0.8, 0.06
    figure = Figure(figsize=(columns * (cell + gap) + gap, lines * (cell + gap) + gap), dpi=150)
    for number, component in enumerate(components):
        line, column = divmod(number, columns)
        axes = _add_axes(figure, gap + column * (cell + gap), gap + line * (cell + gap), cell, cell)
        component = component if component.shape[-1] == 3 else component.mean(axis=-1, keepdims=True)
        _show(axes, 0.5 + 0.5 * component / max(np.abs(component).max(), 1e-12))
    return figure


def detections(
    images: Sequence[np.ndarray], found: Sequence[dict], label_names: Sequence[str], true: Sequence[dict] | None = None
) -> Figure:
    """Draws the boxes found in each image, to the right of the true boxes if these are given.

    Args:
        found, true: for each image `boxes` (n, 4) and `labels` (n,), class ids; for found boxes also `scores` (n,).
    """
    kinds = [("found", found)] if true is None else [("true", true), ("found", found)]
    across = min(len(images), 3 if true is None else 2)  # images side by side
    cell, gap, margin, title = 2.3, 0.05, 0.2, 0.24
    sizes = [_fit(image, cell) for image in images]
    lines = [sizes[first : first + across] for first in range(0, len(sizes), across)]
    tops = np.cumsum([title] + [max(height for _, height in line) + 2 * gap for line in lines])
    step = len(kinds) * (cell + gap) + margin
    figure = Figure(figsize=(across * step - margin + gap, tops[-1]), dpi=150)
    for number, (image, size) in enumerate(zip(images, sizes, strict=True)):
        line, block = divmod(number, across)
        for column, (name, objects) in enumerate(kinds):
            left = gap + block * step + column * (cell + gap)
            axes = _add_axes(figure, left, tops[line], *size, "" if line else name)
            _show(axes, image)
            _outline(axes, image, **objects[number], label_names=label_names)
    return figure


def query_slots(boxes: np.ndarray) -> Figure:
    """Draws where each query of a DETR looks (Carion et al. 2020, figure 7).

    Each query has a panel with the centres of its boxes, in which all images are squares. Of more than 100 queries 100
    are shown, evenly spread.

    Args:
        boxes: (B, Q, 4), NaN where a query has no box.
    """
    chosen = np.unique(np.linspace(0, boxes.shape[1] - 1, min(boxes.shape[1], 100)).round().astype(int))
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    x, y = boxes[..., 0] + width / 2, boxes[..., 1] + height / 2
    is_small = width * height < 0.04  # a fifth of each side
    kinds = {
        "small": is_small,
        "large, wide": ~is_small & (width >= height),
        "large, tall": ~is_small & (width < height),
    }
    columns = math.ceil(len(chosen) ** 0.5)
    lines, cell, gap, title = -(-len(chosen) // columns), 0.85, 0.07, 0.3
    size = max(columns * (cell + gap) + gap, 3.2), title + lines * (cell + gap)
    figure = Figure(figsize=size, dpi=150)
    point = float(np.clip(300 / len(boxes), 0.3, 12))
    for number, query in enumerate(chosen):
        line, column = divmod(number, columns)
        axes = _add_axes(figure, gap + column * (cell + gap), title + line * (cell + gap), cell, cell)
        axes.spines[:].set(visible=True, color="0.8", linewidth=0.5)
        axes.set(xlim=(0, 1), ylim=(1, 0))
        for color, (name, is_kind) in zip(("#009e73", "#d55e00", "#0072b2"), kinds.items(), strict=True):
            shown = is_kind[:, query]
            axes.scatter(x[shown, query], y[shown, query], s=point, color=color, linewidths=0, alpha=0.7, label=name)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="upper left", ncols=3, frameon=False, fontsize=8, handletextpad=0, markerscale=2)
    return figure


def box_attention(
    image: np.ndarray, found: dict, maps: np.ndarray, label_names: Sequence[str], reach: Sequence[float] = (1, 1)
) -> Figure:
    """Draws an image with all boxes, and then what a decoder looks at for each box (Carion et al. 2020, figure 6).

    Every map has a scale of its own, from its least to its greatest value.

    Args:
        found: as for `detections`.
        maps: (n, rows, columns).
        reach: height and width of a map as fractions of the image's.
    """
    width, height = _fit(image, 2.3)
    columns = min(4, 1 + len(maps))
    lines, gap, title = -(-(1 + len(maps)) // columns), 0.06, 0.24
    size = columns * (width + gap) + gap, lines * (height + title)
    figure = Figure(figsize=size, dpi=150)
    for number, map in enumerate([None, *maps]):
        line, column = divmod(number, columns)
        frame = (gap + column * (width + gap), title + line * (height + title), width, height)
        if map is None:
            axes = _add_axes(figure, *frame)
            _show(axes, image)
            _outline(axes, image, **found, label_names=label_names)
        else:
            box, label, score = (found[name][number - 1] for name in ("boxes", "labels", "scores"))
            axes = _add_axes(figure, *frame, _shorten(label_names[label], 16) + f" {score:.0%}")
            _show_map(axes, image, map, reach)
            _outline(axes, image, [box], [label])
    return figure


def token_attention_overview(attentions: np.ndarray) -> Figure:
    """Draws every head of every layer as a small map of which token (row) looks at which (column).

    Args:
        attentions: (L, N, T, T); the weights of a row add up to 1.
    """
    num_layers, num_heads = attentions.shape[:2]
    step = float(np.clip(9 / max(num_layers, num_heads), 0.6, 1.5))
    cell, margin, bar = step - 0.06, 0.3, 0.75
    figure = Figure(figsize=(margin + num_heads * step + bar, margin + max(num_layers * step, 1.5)), dpi=150)
    for layer, head in np.ndindex(num_layers, num_heads):
        axes = _add_axes(figure, margin + head * step, margin + layer * step, cell, cell)
        picture = _show_weights(axes, attentions[layer, head])
        if layer == 0:
            axes.set_title(f"head {head + 1}" if step > 0.7 else f"{head + 1}", fontsize=8, pad=3)
        if head == 0:
            axes.set_ylabel(f"layer {layer + 1}" if step > 0.7 else f"{layer + 1}", fontsize=8, labelpad=3)
    _color_bar(figure, picture, margin + num_heads * step + 0.06, margin, min(max(num_layers * step, 1.5), 3) - 0.06)
    return figure


def token_attention_heads(attention: np.ndarray, tokens: list[str]) -> Figure:
    """Draws the heads of one layer with the tokens' names: how much each token (row) takes from each (column).

    Args:
        attention: (N, T, T); the weights of a row add up to 1.
    """
    num_heads, num_tokens = attention.shape[:2]
    columns = min(num_heads, 4 if num_tokens <= 16 else 3)
    lines = -(-num_heads // columns)
    label, bar = 0.06 * max(map(len, tokens)) + 0.12, 0.75
    cell, gap, title = max(1.6, 0.115 * num_tokens), 0.14, 0.26
    figure = Figure(figsize=(label + columns * (cell + gap) + bar, label + lines * (cell + title)), dpi=150)
    for head, weights in enumerate(attention):
        line, column = divmod(head, columns)
        axes = _add_axes(figure, label + column * (cell + gap), label + line * (cell + title), cell, cell)
        picture = _show_weights(axes, weights)
        axes.set_xlabel(f"head {head + 1}", fontsize=8, color=GREY_TEXT, labelpad=3)
        if column == 0:
            axes.set_yticks(range(num_tokens), tokens, fontsize=7, parse_math=False)
        if line == 0:
            axes.xaxis.tick_top()
            axes.set_xticks(range(num_tokens), tokens, fontsize=7, rotation=90, parse_math=False)
    _color_bar(figure, picture, label + columns * (cell + gap) + 0.06, label, min(cell, 3))
    return figure


# -------------------------------------------------------------------------------------------------------- parts


def _add_axes(figure: Figure, left: float, top: float, width: float, height: float, title: str = ""):
    """Adds axes for a picture, in inches from the top left of the figure; matplotlib's layouts leave uneven gaps."""
    whole_width, whole_height = figure.get_size_inches()
    bottom = whole_height - top - height
    axes = figure.add_axes(
        (left / whole_width, bottom / whole_height, width / whole_width, height / whole_height), xticks=[], yticks=[]
    )
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=8, color=GREY_TEXT, pad=3, parse_math=False)
    return axes


def _fit(image: np.ndarray, side: float) -> tuple[float, float]:
    """Width and height at which the longer side of an image is `side`; a thin image is made thick enough to see."""
    height, width = image.shape[:2]
    return tuple(side * max(length / max(height, width), 0.02) for length in (width, height))


def _outline(axes, image: np.ndarray, boxes, labels, scores=None, label_names: Sequence[str] | None = None):
    """Draws boxes over an image, coloured by class, with names and scores if these are given."""
    height, width = image.shape[:2]
    for number, ((left, top, right, bottom), label) in enumerate(zip(boxes, labels, strict=True)):
        color, corner = COLORS[label % len(COLORS)], (left * width - 0.5, top * height - 0.5)
        across, down = (right - left) * width, (bottom - top) * height
        axes.add_patch(Rectangle(corner, across, down, fill=False, edgecolor=color, linewidth=1.2))
        if label_names is not None:
            name = _shorten(label_names[label], 16) + ("" if scores is None else f" {scores[number]:.0%}")
            frame = {"boxstyle": "square,pad=0.1", "facecolor": color, "edgecolor": "none"}
            style = {"fontsize": 5, "color": "white", "va": "top", "clip_on": True, "parse_math": False}
            axes.text(max(corner[0], -0.5), max(corner[1], -0.5), name, bbox=frame, **style)


def _show(axes, image: np.ndarray):
    """Draws an image (H, W, C) with values from 0 to 1, grey where it is NaN."""
    if image.shape[-1] != 3:
        image = image.mean(axis=-1, keepdims=True).repeat(3, axis=-1)
    axes.imshow(np.clip(np.where(np.isnan(image), 0.6, image), 0, 1), aspect="auto")


def _show_map(axes, image: np.ndarray, map: np.ndarray, reach: Sequence[float] = (1, 1)):
    """Draws a map (rows, columns) in colour over the image, which stays visible in grey.

    Args:
        reach: height and width of the map as fractions of the image's; they may be above 1.
    """
    height, width = image.shape[:2]
    axes.imshow(image.mean(axis=-1), cmap="gray", vmin=0, vmax=1, aspect="auto")
    extent = (-0.5, width * reach[1] - 0.5, height * reach[0] - 0.5, -0.5)
    # "bicubic" would lower the peak of a single patch; "hermite" is as smooth and keeps every value.
    axes.imshow(map, cmap="inferno", alpha=0.65, extent=extent, interpolation="hermite", aspect="auto")
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))


def _show_weights(axes, weights: np.ndarray):
    """Draws weights (T, T), white for 0 and dark for 1, by their square root, so that small weights still show."""
    axes.spines[:].set(visible=True, color="0.8", linewidth=0.5)
    axes.tick_params(length=0, pad=2)
    return axes.imshow(weights, cmap="Blues", norm=PowerNorm(0.5, 0, 1), aspect="auto", interpolation="nearest")


def _color_bar(
    figure: Figure, picture, left: float, top: float, height: float, label: str = "attention", ticks=(0, 0.1, 0.5, 1)
):
    bar = figure.colorbar(picture, cax=_add_axes(figure, left, top, 0.1, height), ticks=ticks)
    bar.outline.set_visible(False)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=8, length=2)


def _shorten(name: str, length: int = 24) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _series(lines: list[dict], key: str) -> tuple[list[int], list[float]]:
    """The steps that have `key`, in order, and its values. The last value counts for a step repeated by a resume."""
    series = {line["step"]: line[key] for line in lines if key in line}
    steps = sorted(series)
    return steps, [series[step] for step in steps]


def _smooth(values: list[float]) -> np.ndarray:
    """Averages over a twentieth of the curve around each point, over less at its ends, so that it does not lag."""
    index = np.arange(len(values))
    half = np.minimum(np.minimum(index, index[::-1]), len(values) // 40)
    totals = np.concatenate([[0.0], np.cumsum(values)])
    return (totals[index + half + 1] - totals[index - half]) / (2 * half + 1)
