"""
The curves of a run: one picture, a column per stage and a row per quantity.

in    stages: list of (title, rows of log.jsonl), in the order in which they were trained
out   draw: a PNG (needs matplotlib, the extra `plot`)

The rows have the keys that plumbing.common.Progress and the stages log: step, loss, tokens_per_second,
val_bpb, val_loss. Missing ones leave a panel out, a null (a number that was not finite) a gap.
"""
import itertools
import statistics

from plumbing.common import atomic_write

COLORS = ["#2f66a9", "#b5651d", "#2f855a"]   # base, mid, sft; told apart in grey too
MOST_POINTS = 2000             # faint points in a panel: more are a blot, and slow to draw
LOSS, BPB, SPEED = "loss\n(nats per token)", "validation\n(bits per byte)", "speed\n(1,000 tokens/s)"


def series(log, key):
    """The (steps, values) of one quantity, in the order of the log; rows without it are left out."""
    points = [(row["step"], row[key]) for row in log if isinstance(row.get(key), (int, float)) and "step" in row]
    return [step for step, _ in points], [float(value) for _, value in points]


def smooth(values):
    """
    Moving average over about a fiftieth of the run, each value in the middle of its window.

    No lag, so the line runs through its points also where they fall steeply. Towards the ends the
    window shrinks on both sides: the first and the last value are single ones.
    """
    sums, half = [0.0, *itertools.accumulate(values)], max(2, len(values) // 100)
    reach = [min(i, len(values) - 1 - i, half) for i in range(len(values))]
    return [(sums[i + r + 1] - sums[i - r]) / (2 * r + 1) for i, r in enumerate(reach)]


def at_end(values):
    """The mean of the last fiftieth, of five values at least: a single step says little."""
    return statistics.fmean(values[-max(5, len(values) // 50):])


def medians(steps, values, count=60):
    """
    Middle step and median value of up to `count` runs of neighbours: a pause for a checkpoint does not show.

    The runs are of nearly the same length.
    """
    count = min(count, len(values))
    edges = [i * len(values) // count for i in range(count + 1)] if count else []
    return ([steps[(a + b) // 2] for a, b in zip(edges, edges[1:])],
            [statistics.median(values[a:b]) for a, b in zip(edges, edges[1:])])


def draw(stages, path):
    """
    Write the curves to path as a PNG, 1600 pixels wide, made for being shown at 800.

    returns  "" where there is a picture, else why there is none
    """
    try:
        from matplotlib.figure import Figure  # no pyplot: needs no display, keeps no state
    except ImportError:
        return "matplotlib is not installed (pip install matplotlib)"
    stages = [(title, log, color) for (title, log), color in zip(stages, COLORS) if series(log, "loss")[0]]
    if not stages:
        return "no step was logged yet"
    keys = {LOSS: "loss", BPB: "val_bpb", SPEED: "tokens_per_second"}
    rows = [name for name, key in keys.items() if any(series(log, key)[0] for _, log, _ in stages)]
    # 8 inches at 200 dots; letters of 9 points are then 12 pixels high where it is shown 800 wide
    heights = [1.5 if name == LOSS else 1 for name in rows]
    figure = Figure(figsize=(8, 0.6 + 1.8 * sum(heights)), dpi=200, layout="constrained")
    panels = figure.subplots(len(rows), len(stages), sharex="col", sharey="row", squeeze=False, height_ratios=heights)
    painters = {LOSS: draw_loss, BPB: draw_bpb, SPEED: draw_speed}
    for name, line in zip(rows, panels):
        for panel, (_, log, color) in zip(line, stages):
            panel.grid(alpha=0.25, linewidth=0.5)
            panel.tick_params(labelsize=8)
            panel.spines[["top", "right"]].set_visible(False)
            painters[name](panel, log, color)
        line[0].set_ylabel(name, fontsize=9)
    figure.align_ylabels()
    set_scales(dict(zip(rows, panels)), stages)
    for panel, (title, _, _) in zip(panels[0], stages):
        panel.set_title(title, fontsize=10 if len(stages) < 4 else 8, fontweight="bold")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    with atomic_write(path) as f:
        figure.savefig(f, format="png", metadata={"Software": None})   # the same run, the same bytes
    return ""


def set_scales(panels, stages):
    """Axes that the panels of a row share, so that the stages can be compared; panels: {row: its panels}."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
    for panel in list(panels.values())[-1]:
        panel.set_xlabel("optimizer step", fontsize=9)
        panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    first = panels[LOSS][0]
    lines = [smooth(series(log, "loss")[1]) + series(log, "val_loss")[1] for _, log, _ in stages]
    low, high = min(map(min, lines)), max(map(max, lines))
    if low > 0:                                             # a loss of reinforcement learning may be negative
        first.set_yscale("log")                             # 8 at the start, 0.1 at the end: both to be read
        first.set_ylim(0.7 * low, 1.5 * high)
        first.yaxis.set_major_locator(LogLocator(subs=[1, 2, 5]))
        first.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        first.yaxis.set_minor_formatter(NullFormatter())
    if SPEED in panels:
        fastest = max(max(medians(*series(log, "tokens_per_second"))[1], default=0) for _, log, _ in stages)
        panels[SPEED][0].set_ylim(0, 1.3 * fastest / 1000)  # from 0, so that a tenth looks like a tenth


def note(panel, text):
    """A remark in the upper right corner of a panel, over the curves."""
    panel.text(0.97, 0.95, text, transform=panel.transAxes, ha="right", va="top", fontsize=8,
               bbox=dict(facecolor="white", edgecolor="none", alpha=0.75, pad=1))


def thin(points):
    """Every n-th, so that MOST_POINTS are left."""
    return points[::-(-len(points) // MOST_POINTS) or 1]


def draw_steps(panel, steps, values, color):
    """A faint point per step."""
    panel.plot(thin(steps), thin(values), ".", color=color, alpha=0.25, markersize=3, markeredgewidth=0,
               label="one step")


def draw_held_out(panel, steps, values, color):
    """A line through the values, with at most 20 rings on it, the last value among them."""
    every = len(values) // 20 + 1
    panel.plot(steps, values, "o-", color=color, markerfacecolor="white", markersize=5, linewidth=1.5,
               markevery=((len(values) - 1) % every, every), label="on held-out data")


def draw_loss(panel, log, color):
    """Training loss, the smoothed line over the steps; where it is measured, the loss on held-out answers."""
    steps, values = series(log, "loss")
    draw_steps(panel, steps, values, color)
    panel.plot(thin(steps), thin(smooth(values)), color=color, linewidth=1.5,
               label="average of about 2 % of the steps")
    text = f"training {at_end(values):.2f}"
    steps, values = series(log, "val_loss")
    draw_held_out(panel, steps, values, color)
    note(panel, text + (f"\nvalidation {values[-1]:.2f}" if values else ""))


def draw_bpb(panel, log, color):
    """Bits per byte on text that is not trained on; a stage that measures none says so."""
    steps, values = series(log, "val_bpb")
    draw_held_out(panel, steps, values, color)
    note(panel, f"{values[-1]:.3f}" if values else "not measured\nin this stage")


def draw_speed(panel, log, color):
    """Tokens per second: single steps, and medians of groups of them."""
    steps, values = series(log, "tokens_per_second")
    if not values:
        return
    thousands = [value / 1000 for value in values]
    draw_steps(panel, steps, thousands, color)
    panel.plot(*medians(steps, thousands), color=color, linewidth=1.5)
    middle, (_, mfu) = statistics.median(thousands), series(log, "mfu")
    text = f"median {middle:,.{0 if middle >= 100 else 1}f}"
    note(panel, text + (f", MFU {100 * statistics.median(mfu):.0f} %" if mfu else ""))
