# SPDX-License-Identifier: Apache-2.0
"""`plot_trace`: one decode as a picture, position by step. The import takes matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .config import DecodeConfig, Rule
from .redundancy import RedundantCells, redundant_cells
from .rule_looks import RULE_COLORS
from .trace import Trace

try:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection, PatchCollection
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch, Rectangle
    from matplotlib.ticker import MaxNLocator
    from matplotlib.transforms import ScaledTranslation, Transform
except ImportError as error:
    raise ImportError("a picture needs matplotlib: pip install 'r2dllm_ext[plot]'") from error

_INK, _MUTED, _PAPER = "#22262e", "#6b7280", "#ffffff"
_UNREACHED, _UNSURE, _SURE = "#fbfbfb", "#faf6ee", "#cfb98f"
_AFTERGLOW, _AFTERGLOW_LATER = 0.42, 0.20  # of a commit's colour: in its block, in later blocks


def plot_trace(
    trace: Trace,
    *,
    row: int = 0,
    labels: Sequence[str] | None = None,
    config: DecodeConfig | None = None,
    title: str | None = None,
) -> Figure:
    """Draw one row of a trace: x = generated position, y = step, colour = rule of the commit, from
    the step of an edit on that of the edit.

    A masked cell is the darker the surer its prediction. Three marks show the cells that
    `redundant_cells` finds, each in the colour of the rule that removes them: a dot where the
    prediction already was the final token and stayed so, a bar under a confident window, a frame
    around cells that compete with a surer neighbour for one token.

    Args:
        trace: of `generate(..., trace=True)`.
        row: of the batch.
        labels: texts of the G generated positions, for the axis; left out where too narrow.
        config: whose windows, runs and thresholds judge what is redundant. Default:
            `DecodeConfig.r2`.
        title: first line bold, the others small. Default: forwards and tokens.

    Returns:
        A `matplotlib.figure.Figure` of its own (pyplot is not touched); save it with `savefig`.

    Raises:
        ValueError: an empty trace, a row or a number of labels that do not fit it.

    >>> model, config = load_model("ledger"), DecodeConfig.r2(2)
    >>> out = generate(model, torch.tensor([[33, 14]]), gen_length=32, config=config, trace=True)
    >>> figure = plot_trace(out.trace, config=config)  # figure.savefig("trace.png", dpi=150)
    """
    batch, positions = trace.commit_step.shape
    if not 0 <= row < batch:
        raise ValueError(f"plot_trace: row takes 0..{batch - 1}, got {row}")
    if labels is not None and len(labels) != positions:
        raise ValueError(f"plot_trace: labels takes {positions} texts, got {len(labels)}")
    history = _history(trace, redundant_cells(trace, config or DecodeConfig.r2(0)), row)
    if not history.steps:
        raise ValueError("plot_trace: the trace has no step of this row")
    return _draw(history, labels, title)


@dataclass(frozen=True)
class _History:
    """The steps in which a row was decoded. Arrays are [S, G], empty outside the active block."""

    block: np.ndarray  # [S], the active one
    cells: np.ndarray  # [S, L], its positions
    full_pass: np.ndarray  # [S]
    confidence: np.ndarray
    masked: np.ndarray  # before the step
    rule: np.ndarray
    final: np.ndarray  # [G] tokens
    commit_step: np.ndarray  # [G], counted in these steps; -1 = never
    commit_rule: np.ndarray  # [G]
    redundant: dict[Rule, np.ndarray]  # by the rule that removes it

    @property
    def steps(self) -> int:
        return len(self.block)

    @property
    def positions(self) -> int:
        return len(self.final)


def _history(trace: Trace, redundant: RedundantCells, row: int) -> _History:
    positions, length = trace.commit_step.shape[1], trace.block_length
    own = trace.is_active()[:, row]
    block = trace.block[own].numpy()
    cells = block[:, None] * length + np.arange(length)

    def spread(values: torch.Tensor, empty) -> np.ndarray:
        narrow = values[own, row].numpy()
        wide = np.full((len(block), positions), empty, dtype=narrow.dtype)
        np.put_along_axis(wide, cells, narrow, axis=1)
        return wide

    committed = trace.commit_step[row]
    renumbered = torch.where(committed < 0, -1, (own.cumsum(0) - 1)[committed.clamp(min=0)])
    return _History(
        block=block,
        cells=cells,
        full_pass=trace.full_pass[own].numpy(),
        confidence=np.nan_to_num(spread(trace.confidence, 0)),
        masked=spread(trace.masked, False),
        rule=spread(trace.rule, int(Rule.NONE)),
        final=trace.sequences[row, trace.prompt_length :].numpy(),
        commit_step=renumbered.numpy(),
        commit_rule=trace.commit_rule[row].numpy(),
        redundant={
            Rule.STABILITY: spread(redundant.stability, False),
            Rule.WINDOW: spread(redundant.window, False),
            Rule.AMBIGUITY: spread(redundant.ambiguity, False),
        },
    )


def _draw(history: _History, labels: Sequence[str] | None, title: str | None) -> Figure:
    if title is None:
        decoded = int((history.commit_step >= 0).sum())
        title = f"{history.steps} forwards for {decoded} tokens"
    longest = max(map(len, labels), default=0) if labels else 0
    layout = _Layout(history.positions, history.steps, min(longest, _LABEL_LENGTH), title)
    figure = Figure(figsize=(layout.width, layout.height), facecolor=_PAPER)
    axes = figure.add_axes(layout.box(_LEFT, layout.bottom, layout.grid_width, layout.grid_height))
    _draw_cells(axes, history)
    _draw_grid(axes, history, layout)
    _draw_marks(axes, history, layout)
    _draw_axes(axes, history, layout, labels)
    left = _LEFT + layout.grid_width + _GAP
    side = figure.add_axes(layout.box(left, layout.bottom, _SIDE, layout.grid_height))
    _draw_counts(side, history)
    _draw_head(figure, history, layout, title)
    return figure


# Inches.
_LEFT, _GAP, _SIDE, _RIGHT = 0.75, 0.15, 1.6, 0.3
_LINE, _LABEL_LENGTH = 0.24, 14
_FRAME = 1.6  # points


class _Layout:
    """Sizes in inches; cells shrink before the picture grows beyond a page."""

    def __init__(self, positions: int, steps: int, label_length: int, title: str) -> None:
        self.grid_width = min(max(0.26 * positions, 8.0), 13.5)
        self.grid_height = min(max(0.19 * steps, 1.8), 11.0)
        self.cell = (self.grid_width / positions, self.grid_height / steps)
        self.font = min(9.0, 72 * self.cell[0] * 0.86)
        self.labelled = label_length > 0 and self.font >= 5.5
        label_height = label_length * self.font * 0.62 / 72 if self.labelled else 0.15
        self.bottom = 0.55 + label_height
        self.head = 1.4 + _LINE * title.count("\n")
        self.width = _LEFT + self.grid_width + _GAP + _SIDE + _RIGHT
        self.height = self.bottom + self.grid_height + self.head

    @property
    def small_cell(self) -> float:
        """The shorter side of a cell, in points."""
        return 72 * min(self.cell)

    def box(
        self, left: float, bottom: float, width: float, height: float
    ) -> tuple[float, float, float, float]:
        return left / self.width, bottom / self.height, width / self.width, height / self.height


Color = tuple[float, float, float]


def _rgb(color: str) -> np.ndarray:
    return np.array(to_rgb(color))


def _mix(color: str, other: str, share: float) -> Color:
    red, green, blue = (share * _rgb(color) + (1 - share) * _rgb(other)).tolist()
    return red, green, blue


def _draw_cells(axes: Axes, history: _History) -> None:
    image = np.broadcast_to(_rgb(_UNREACHED), (history.steps, history.positions, 3)).copy()
    sure = history.confidence[..., None]
    masked = sure * _rgb(_SURE) + (1 - sure) * _rgb(_UNSURE)
    image[history.masked] = masked[history.masked]
    for step, position in np.argwhere(history.rule != Rule.NONE):  # by step: an edit comes later
        rule = history.rule[step, position]
        color = RULE_COLORS[Rule(rule)]
        in_block = history.block[step:] == history.block[step]
        image[step:, position] = np.where(
            in_block[:, None],
            _mix(color, _PAPER, _AFTERGLOW),
            _mix(color, _PAPER, _AFTERGLOW_LATER),
        )
        image[step, position] = _rgb(color)
    axes.imshow(image, aspect="auto", interpolation="nearest")


def _draw_grid(axes: Axes, history: _History, layout: _Layout) -> None:
    if layout.small_cell > 4:
        for lines, count, end in (
            (axes.vlines, history.positions, history.steps),
            (axes.hlines, history.steps, history.positions),
        ):
            width = min(1.0, layout.small_cell / 12)
            places = np.arange(count + 1) - 0.5
            lines(places, -0.5, end - 0.5, color=_PAPER, linewidth=width, zorder=2)
    length = history.cells.shape[1]
    for start in range(0, history.positions, length):
        axes.text(
            start + length / 2 - 0.5,
            -0.5,
            f"block {start // length}",
            ha="center",
            va="bottom",
            fontsize=9,
            color=_MUTED,
            transform=_offset(axes, 0, 4),
        )
        if start:
            axes.axvline(start - 0.5, color=_INK, linewidth=1.1, zorder=3)
    axes.set_xlim(-0.5, history.positions - 0.5)
    axes.set_ylim(history.steps - 0.5, -0.5)


def _offset(axes: Axes, right: float, up: float) -> Transform:
    """Data coordinates moved by some points."""
    return axes.transData + ScaledTranslation(right / 72, up / 72, axes.figure.dpi_scale_trans)


def _draw_marks(axes: Axes, history: _History, layout: _Layout) -> None:
    small, thickness = layout.small_cell, max(0.8, 72 * layout.cell[1] * 0.16)
    bars = [
        [(first - 0.5, step + 0.36), (end - 0.5, step + 0.36)]
        for step, marked in enumerate(history.redundant[Rule.WINDOW])
        for first, end in _stretches(marked)
    ]
    window = _mark(Rule.WINDOW)
    axes.add_collection(
        LineCollection(bars, colors=[window], linewidths=thickness, capstyle="butt", zorder=4)
    )
    frames = [
        Rectangle((position - 0.42, step - 0.42), 0.84, 0.84)
        for step, position in np.argwhere(history.redundant[Rule.AMBIGUITY]).tolist()
    ]
    axes.add_collection(
        PatchCollection(
            frames,
            facecolor="none",
            edgecolor=_mark(Rule.AMBIGUITY),
            linewidth=min(_FRAME, small / 6),
            zorder=5,
        )
    )
    steps, positions = np.nonzero(history.redundant[Rule.STABILITY])
    axes.scatter(
        positions, steps, s=(small * 0.36) ** 2, color=_mark(Rule.STABILITY), linewidths=0, zorder=6
    )


def _stretches(marked: np.ndarray) -> list[list[int]]:
    """[first, end) of each stretch of neighbours that are marked."""
    edges = np.diff(np.concatenate([[0], marked, [0]]).astype(np.int8))
    return np.flatnonzero(edges).reshape(-1, 2).tolist()


def _mark(rule: Rule) -> Color:
    """The rule's colour, dark enough for small marks and text."""
    return _mix(RULE_COLORS[rule], "#000000", 0.78)


def _draw_axes(
    axes: Axes, history: _History, layout: _Layout, labels: Sequence[str] | None
) -> None:
    full = np.nonzero(history.full_pass)[0]
    cached = len(full) < history.steps
    note = " (\N{BLACK LEFT-POINTING SMALL TRIANGLE} reads everything)" if cached else ""
    axes.set_ylabel(f"step{note}", fontsize=10, color=_INK)
    axes.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.set_xlabel("position in the answer", fontsize=10, color=_INK)
    axes.tick_params(length=0, labelsize=9, labelcolor=_MUTED)
    axes.tick_params(axis="y", pad=9 if cached else 4)
    if labels is not None and layout.labelled:
        axes.set_xticks(range(history.positions))
        texts = axes.set_xticklabels([_shown(text) for text in labels])
        for label, rule in zip(texts, history.commit_rule.tolist(), strict=True):
            label.set(rotation=90, fontsize=layout.font, parse_math=False)
            label.set_color(_mark(Rule(rule)) if rule else "#c4c8d0")
    else:
        axes.set_xticks(range(0, history.positions, history.cells.shape[1]))
    axes.spines[:].set_visible(False)
    if cached:
        axes.plot(
            [-0.5] * len(full),
            full,
            marker="<",
            linestyle="",
            markersize=4.5,
            color=_INK,
            clip_on=False,
            transform=_offset(axes, -5, 0),
        )


def _shown(text: str) -> str:
    text = text.strip(" ").replace("\n", "\\n").replace("\t", "\\t")
    cut = text[: _LABEL_LENGTH - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return text if len(text) <= _LABEL_LENGTH else cut


def _draw_counts(axes: Axes, history: _History) -> None:
    """Commits of each step, stacked by rule."""
    left = np.zeros(history.steps)
    for rule, color in RULE_COLORS.items():
        committed = (history.rule == rule).sum(1)
        steps = committed.nonzero()[0]
        axes.barh(steps, committed[steps], left=left[steps], height=0.82, color=color)
        left += committed
    axes.set_ylim(history.steps - 0.5, -0.5)
    axes.set_xlim(0, max(left.max(), 1) * 1.12)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.tick_params(length=0, labelsize=9, labelcolor=_MUTED)
    axes.grid(axis="x", color="#e4e6ea", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel("tokens a step", fontsize=10, color=_INK)
    axes.spines[:].set_visible(False)


def _draw_head(figure: Figure, history: _History, layout: _Layout, title: str) -> None:
    def down(inches: float) -> float:
        return 1 - inches / layout.height

    left = _LEFT / layout.width
    first, *others = title.split("\n")
    text: dict[str, Any] = {"ha": "left", "va": "top", "parse_math": False}
    figure.text(left, down(0.2), first, fontsize=14, weight="bold", color=_INK, **text)
    for line, words in enumerate(others):
        figure.text(left, down(0.52 + line * _LINE), words, fontsize=9.5, color=_MUTED, **text)

    top = 0.58 + _LINE * len(others)
    counts = {rule: int((history.commit_rule == rule).sum()) for rule in RULE_COLORS}
    commits: list[Artist] = [
        Patch(facecolor=color, label=f"{rule.name.lower()} {counts[rule]}")
        for rule, color in RULE_COLORS.items()
        if counts[rule] or rule <= Rule.BASE  # later ones where they fired
    ]
    waiting = {rule: f"({int(cells.sum())} cells)" for rule, cells in history.redundant.items()}
    redundancies: list[Artist] = [
        Line2D(
            [],
            [],
            marker="o",
            linestyle="",
            markersize=4.5,
            color=_mark(Rule.STABILITY),
            label=f"final already, not committed {waiting[Rule.STABILITY]}",
        ),
        Line2D(
            [],
            [],
            linewidth=3,
            color=_mark(Rule.WINDOW),
            label=f"in a confident window {waiting[Rule.WINDOW]}",
        ),
        Patch(
            facecolor="none",
            edgecolor=_mark(Rule.AMBIGUITY),
            linewidth=_FRAME,
            label=f"competes with a surer neighbour {waiting[Rule.AMBIGUITY]}",
        ),
    ]
    for line, (name, handles) in enumerate((("committed", commits), ("redundant", redundancies))):
        y = down(top + line * 0.27)
        figure.text(left, y, name, fontsize=9.5, weight="bold", color=_INK, ha="left", va="top")
        figure.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(left + 0.95 / layout.width, y),
            ncols=len(handles),
            frameon=False,
            fontsize=9.5,
            labelcolor=_INK,
            borderpad=0,
            borderaxespad=0,
            handlelength=1.1,
            handleheight=0.9,
            handletextpad=0.5,
            columnspacing=1.5,
        )
    _draw_ramp(figure, layout, down(top + 0.14))


def _draw_ramp(figure: Figure, layout: _Layout, y: float) -> None:
    """What the greys of masked cells mean, at the right edge."""
    width, height = 0.9, 0.13
    right = layout.width - _RIGHT
    axes = figure.add_axes(layout.box(right - width, y * layout.height - height / 2, width, height))
    share = np.linspace(0, 1, 64)[None, :, None]
    axes.imshow(share * _rgb(_SURE) + (1 - share) * _rgb(_UNSURE), aspect="auto")
    axes.set_xticks([0, 63], ["0", "1"])
    axes.set_yticks([])
    axes.tick_params(length=0, labelsize=8.5, labelcolor=_MUTED, pad=2)
    axes.set_title("masked: confidence", fontsize=9, color=_INK, pad=3)
    axes.spines[:].set(color="#d4d7dd", linewidth=0.6)
