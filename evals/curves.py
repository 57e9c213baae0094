"""
The curves of a run: one picture (with matplotlib, the extra `plot`), a column per stage and a row per quantity.

The rows of log.jsonl have the keys that plumbing.common.Progress and the stages log: step, loss, tokens_per_second,
val_bpb, val_loss, reward, pass@1. Missing ones leave a panel out, a null (a number that was not finite) a gap.
"""
import itertools
import statistics

from plumbing.common import atomic_write

COLORS = ["#2f66a9", "#b5651d", "#2f855a", "#7b3f8c"]   # base, mid, sft, rl; told apart in grey too
MOST_POINTS = 2000             # faint points in a panel: more are a blot, and slow to draw
LOSS, BPB, SPEED = "loss\n(nats per token)", "validation\n(bits per byte)", "speed\n(1,000 tokens/s)"
REWARD = "reward\n(share of right answers)"
# row of panels: what is drawn there, as (measured at every step, measured on held-out data now and then)
KEYS = {LOSS: ("loss", "val_loss"), REWARD: ("reward", "pass@1"), BPB: ("", "val_bpb"), SPEED: ("tokens_per_second", "")}


def series(log, key):
    """The (steps, values) of one quantity, in the order of the log; rows without it are left out."""
    points = [(row["step"], row[key]) for row in log if isinstance(row.get(key), (int, float)) and "step" in row]
    return [step for step, _ in points], [float(value) for _, value in points]


def smooth(values):
    """Moving average over about a fiftieth of the run, centred so as not to lag, shorter at both ends."""
    sums, half = [0.0, *itertools.accumulate(values)], max(2, len(values) // 100)
    reach = [min(i, len(values) - 1 - i, half) for i in range(len(values))]
    return [(sums[i + r + 1] - sums[i - r]) / (2 * r + 1) for i, r in enumerate(reach)]


def at_end(values):
    """The mean of the last fiftieth, of five values at least, but of no more than half, rounded up: a single step says little."""
    return statistics.fmean(values[-max(min(5, (len(values) + 1) // 2), len(values) // 50):])


def medians(steps, values, count=60):
    """Middle step and median value of up to `count` nearly equal runs of neighbours: a pause to save does not show."""
    count = min(count, len(values))
    edges = [i * len(values) // count for i in range(count + 1)] if count else []
    return ([steps[(a + b) // 2] for a, b in zip(edges, edges[1:])],
            [statistics.median(values[a:b]) for a, b in zip(edges, edges[1:])])


def draw(stages, path):
    """
    Write the curves to path as a PNG, 1600 pixels wide, made for being shown at 800 -> "", or why there is no picture.

    stages  list of (title, rows of log.jsonl), in the order in which they were trained
    """
    try:
        from matplotlib.figure import Figure  # no pyplot: needs no display, keeps no state
    except ImportError:
        return "matplotlib is not installed (pip install matplotlib)"
    stages = [(title, log, color) for (title, log), color in zip(stages, COLORS)
              if series(log, "loss")[0] or series(log, "reward")[0]]
    if not stages:
        return "no step was logged yet"
    rows = [name for name, keys in KEYS.items() if any(series(log, key)[0] for _, log, _ in stages for key in keys)]
    # 8 inches at 200 dots; letters of 9 points are then 12 pixels high where it is shown 800 wide
    heights = [1.5 if name == LOSS else 1 for name in rows]
    figure = Figure(figsize=(8, 0.6 + 1.8 * sum(heights)), dpi=200, layout="constrained")
    panels = figure.subplots(len(rows), len(stages), sharex="col", sharey="row", squeeze=False, height_ratios=heights)
    for name, line in zip(rows, panels):
        for panel, (_, log, color) in zip(line, stages):
            draw_panel(panel, name, log, color)
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
    lines = [value for _, log, _ in stages for value in smooth(series(log, "loss")[1]) + series(log, "val_loss")[1]]
    if lines and min(lines) > 0:
        first, low, high = panels[LOSS][0], min(lines), max(lines)
        first.set_yscale("log")                             # 8 at the start, 0.1 at the end: both to be read
        first.set_ylim(0.7 * low, 1.5 * high)
        first.yaxis.set_major_locator(LogLocator(subs=[1, 2, 5]))
        first.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        first.yaxis.set_minor_formatter(NullFormatter())
    if REWARD in panels:
        panels[REWARD][0].set_ylim(0, 1)
    if SPEED in panels:
        fastest = max(max(medians(*series(log, "tokens_per_second"))[1], default=0) for _, log, _ in stages)
        panels[SPEED][0].set_ylim(0, 1.3 * fastest / 1000)  # from 0, so that a tenth looks like a tenth


def thin(points):
    """Every n-th, so that MOST_POINTS are left."""
    return points[::-(-len(points) // MOST_POINTS) or 1]


def draw_panel(panel, name, log, color):
    """
    One quantity of a stage: a faint point per step and a line that smooths them; what was measured on
    held-out data as a line with at most 20 rings, the last value among them; a remark in the upper right corner.
    """
    (steps, values), (held_out_steps, held_out) = (series(log, key) for key in KEYS[name])
    average, remark = (thin(steps), thin(smooth(values))), ""
    if not values and not held_out:
        remark = "not measured\nin this stage"
    elif name in (LOSS, REWARD):
        remark = (f"training {at_end(values):.2f}" if values else "") + (f"\nvalidation {held_out[-1]:.2f}" if held_out else "")
    elif name == BPB:
        remark = f"{held_out[-1]:.3f}"
    elif values:
        values = [value / 1000 for value in values]
        average, middle, mfu = medians(steps, values), statistics.median(values), series(log, "mfu")[1]
        share = f", MFU {100 * statistics.median(mfu):.0f} %" if mfu else ""
        remark = f"median {middle:,.{0 if middle >= 100 else 1}f}{share}"
    dots = dict(alpha=0.25, markersize=3, markeredgewidth=0)
    panel.plot(thin(steps), thin(values), ".", color=color, **dots, label="one step")
    panel.plot(*average, color=color, linewidth=1.5, label="average of about 2 % of the steps")
    every = len(held_out) // 20 + 1
    panel.plot(held_out_steps, held_out, "o-", color=color, markerfacecolor="white", markersize=5, linewidth=1.5,
               markevery=((len(held_out) - 1) % every, every), label="on held-out data")
    panel.text(0.97, 0.95, remark, transform=panel.transAxes, ha="right", va="top", fontsize=8,
               bbox=dict(facecolor="white", edgecolor="none", alpha=0.75, pad=1))
    panel.grid(alpha=0.25, linewidth=0.5)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
