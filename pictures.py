"""Pictures of a run's log and of an evaluation's rows; they need matplotlib.

    python train.py --plot runs/tiny-1          # plot(): a log
    python eval.py --study steps                # draw(): accuracy over steps, shots or prompts
"""

import statistics
from collections import defaultdict
from itertools import cycle

import numpy as np

from common import InputError, reading, whole_file
from run_folder import read_log


def import_pyplot():
    """matplotlib.pyplot, without a screen. InputError if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("a picture needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


# A method has one color in all pictures: red learned by MAML with psi, blue by plain pre-training,
# grey learned nothing.
COLORS = {"supmer": "C3", "shipped": "C3", "MAML and psi": "C3", "first order and psi": "C1",
          "MAML without psi": "C4", "MAML and psi, psi off in tuning": "C6", "ppt": "C0",
          "shipped-ppt": "C0", "PPT, same examples": "C0", "PPT, query sets alone": "C9",
          "random": "0.35", "small random": "0.5", "vocab": "0.65", "vocabulary": "0.65"}
OTHERS = ["C2", "C5", "C8"]
PANELS = {"loss": ("support_loss", "query_loss"), "normalized inner product (Fig. 5)": ("s",),
          "gate, mean entry": ("gate_mean",), "lambda over b": (),
          "validation": ("loss_before", "loss")}


def plot(folder):
    """Draw a run's log, finished or not, as log.png beside it -> the picture's path.

    Dots are steps, or tasks' lambdas; a line is the mean of 19 steps."""
    entries = [entry | entry.get("validation", {}) for entry in read_log(folder)]
    pyplot = import_pyplot()
    picture, axes = pyplot.subplots(1, len(PANELS), figsize=(17, 3.2), layout="constrained")
    with reading(folder / "log.jsonl", "the log of a run", remedy="give a run's folder"):
        for axis, (title, names) in zip(axes, PANELS.items()):
            draw_panel(axis, title, names, entries)
    return save_picture(picture, folder / "log.png", dpi=90)


def moving_mean(y, near):
    """The mean of each value and the near - 1 values to either side."""
    return [np.mean(y[max(0, i + 1 - near):i + near]) for i in range(len(y))]


def name_lines(axis, ends, gap):
    """Write {name: (x, y, color)} beside the curves' ends, at least gap apart."""
    place = np.inf
    for name, (x, y, color) in sorted(ends.items(), key=lambda item: -item[1][1]):
        place = min(y, place - gap)
        axis.annotate(name, (x, place), (6, 0), textcoords="offset points", color=color,
                      va="center", annotation_clip=False)


def draw_panel(axis, title, names, entries):
    """One of PANELS: the log's entries {name: value} as dots, and their mean."""
    near, size, faint = (1, 5, 1.0) if title == "validation" else (10, 3, 0.3)
    for color, name in zip(("C0", "C1"), names):                    # PPT has its loss alone
        x, y = (np.array([entry[key] for entry in entries if name in entry], dtype=float)
                for key in ("step", name))
        axis.plot(x, y, ".", markersize=size, alpha=faint, color=color)
        axis.plot(x, moving_mean(y, near), color=color, label=name)
    if not names:
        mixed = [(entry["b"], lam) for entry in entries if entry.get("b")
                 for lam in entry["lambda"]]
        axis.plot(*np.array(mixed, float).reshape(-1, 2).T, ".", markersize=3, alpha=0.5,
                  label="a task")
        b = np.linspace(0, 1)
        axis.plot(b, b / (1 + b), label="mean, b / (1 + b)")
    axis.set_title(title)
    axis.set_xlabel("meta step" if names else "b (Eq. 10)")
    axis.legend()


def draw(rows, settings, path):
    """The rows of a study as a PNG: each seed's test accuracy, mean and deviation, over steps
    (Fig. 3), shots (Fig. 4) or prompts (Fig. 1a)."""
    along = "shots" if len(settings.shots) > 1 else "prompt"
    along = "step" if settings.over_steps else along
    found = defaultdict(lambda: defaultdict(list))      # (target, prompt): {step or shots: [%]}
    for row in rows:
        if row["split"] == "test" and row["prompt"] in settings.prompt and (
                row["kind"] == "tuned" or along == row["kind"]):
            found[row["target"], row["prompt"]][row[along]].append(row["accuracy"])
    targets = [*dict.fromkeys(target for target, _ in found)]
    picture, axes = import_pyplot().subplots(
        1, len(targets), squeeze=False, sharey=len(targets) > 2,
        figsize=(max(4 * len(targets), 5), 4), layout="constrained")
    names = [name for name in settings.prompt if name not in COLORS]
    colors = dict(zip(names, cycle(OTHERS))) | COLORS
    for (target, name), points in found.items():
        axis = axes[0][targets.index(target)]
        x, y = zip(*sorted(points.items()))
        spread = [statistics.stdev(one) if len(one) > 1 else 0 for one in y]
        axis.errorbar(x, [statistics.mean(one) for one in y], spread, label=name, marker="o",
                      markersize=3, capsize=2, color=colors[name])
        if along == "prompt":
            axis.plot([name] * len(y[0]), y[0], "o", alpha=0.4, color=colors[name])
            axis.tick_params(axis="x", rotation=20)
        else:
            axis.legend()
        if along == "shots":
            axis.set_xscale("log", base=2)
            axis.set_xticks(settings.shots, settings.shots)
        axis.set_xlabel({"step": "tuning steps", "shots": "samples per label"}.get(along, ""))
        axis.set_title(target)
    axes[0][0].set_ylabel(f"test accuracy in %, {len(settings.seeds)} seeds, {settings.model}")
    save_picture(picture, path, dpi=120)


def save_picture(picture, path, dpi):
    """Write a figure as a PNG, and close it -> path."""
    with whole_file(path) as file:
        picture.savefig(file, format="png", dpi=dpi)
    import_pyplot().close(picture)
    return path
