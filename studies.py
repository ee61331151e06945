"""The paper's tables and figures as commands; pictures."""

import math
import shlex
import statistics
import time
from pathlib import Path

import numpy as np

from baselines import ABLATIONS, METHODS
from common import InputError, atomic_write, read_log, read_run


def import_pyplot():
    """matplotlib.pyplot, without a screen. InputError if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("a picture needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    return pyplot


PANELS = {"loss": ("support_loss", "query_loss"), "normalized inner product (Fig. 5)": ("s",),
          "gate, mean entry": ("gate_mean",), "lambda over b": (),
          "validation": ("loss_before", "loss")}


def plot(folder):
    """Draw a run's log, finished or not, as log.png beside it -> the picture's path.

    Dots are steps, or tasks' lambdas; a line is the mean of 19 steps."""
    pyplot, path = import_pyplot(), folder / "log.png"
    read_run(folder)
    picture, axes = pyplot.subplots(1, len(PANELS), figsize=(17, 3.2), layout="constrained")
    try:
        lines = [entry | entry.get("validation", {}) for _, entry in read_log(folder)]
        for axis, (title, names) in zip(axes, PANELS.items()):
            _draw_panel(axis, title, names, lines)
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"{folder / 'log.jsonl'} is not the log of a run ({error!r}): give one "
                         "that train.py wrote") from None
    atomic_write(path, lambda file: picture.savefig(file, format="png", dpi=90))
    pyplot.close(picture)
    return path


def _draw_panel(axis, title, names, lines):
    """One of PANELS: the log's lines {name: value} as dots, and their mean."""
    near, size, faint = (1, 5, 1.0) if title == "validation" else (10, 3, 0.3)
    for color, name in zip(("C0", "C1"), names):                    # PPT has its loss alone
        x, y = (np.array([line[key] for line in lines if name in line], dtype=float)
                for key in ("step", name))
        axis.plot(x, y, ".", markersize=size, alpha=faint, color=color)
        means = [np.mean(y[max(0, i + 1 - near):i + near]) for i in range(len(y))]
        axis.plot(x, means, color=color, label=name)
    if not names:
        mixed = np.array([(x["b"], lam) for x in lines if x.get("b") for lam in x["lambda"]], float)
        axis.plot(*mixed.reshape(-1, 2).T, ".", markersize=3, alpha=0.5, label="a task")
        axis.plot(b := np.linspace(0, 1), b / (1 + b), label="mean, b / (1 + b)")
    axis.set_title(title)
    axis.set_xlabel("meta step" if names else "b (Eq. 10)")
    axis.legend()

PRETRAINED = {**{name: "--method" for name in METHODS}, **dict.fromkeys(ABLATIONS, "--ablation")}
STUDIES = {     # the paper's figures, and Table 2
    "steps": {"task": ("cb", "mrpc"), "plot": True},
    "shots": {"task": ("sst5", "subj"), "shots": (4, 8, 16, 32, 64), "plot": True},
    "dg": {"task": ("dg",), "plot": True},
    "spread": {"task": ("mrpc", "cb", "subj"), "prompt": ("random", "vocab"), "plot": True,
               "seeds": tuple(range(10, 110, 10)), "same_examples": True},
    "comparison": {"prompt": ("zero-shot", "few-shot", "random", "vocab", "prefix-tuning",
                              "p-tuning-v2", "ft", "supmer", "ppt", "unified-ppt", "metapt")},
    "ablation": {"prompt": ("supmer", *ABLATIONS)},
    "evidence": {"task": ("evidence",), "rates": (0.03, 0.3), "epochs": 60, "words_only": True,
                 "dtype": "bfloat16",
                 "prompt": ("random", "vocab", "ppt", "supmer", "metapt", "first-order",
                            "no-curriculum", "no-mgr", "no-ta")}}
STUDY_RUN = ("--bytes", "10000000", "--examples", "23040", "--validate-every", "30",
             "--validation-tasks", "13")        # what a comparison pre-trains on the embedded T5

COMPARED = Path("runs/compared")


def compared_folder(name, model):
    """Where train.py's run of a method or ablation on a model is, or will be."""
    return COMPARED / f"{Path(model).name}-{name}"


def pretrained_run(name, settings, ends):
    """The folder under runs/compared of a method's or ablation's run, which train.py makes, or goes
    on with, until a time.monotonic(). KeyboardInterrupt if it was stopped, InputError if it cannot
    be. All of a model's have the same numbers but for the method's own."""
    folder = compared_folder(name, settings.model)
    begun = folder.exists()
    if not (begun and read_run(folder)["finished"]):
        argv = ["--resume", str(folder)] if begun else [
            "--model", settings.model, PRETRAINED[name], name, "--run", str(folder),
            *(STUDY_RUN if settings.model == "tiny" else ()),
            *(["--labeled", settings.labeled] if name == "metapt" else [])]
        if ends < math.inf:
            argv += ["--max-minutes", f"{max(0.01, (ends - time.monotonic()) / 60):.2f}"]
        print(f"{name} comes first: {shlex.join(['python', 'train.py', *argv])}")
        import train
        train.main(argv)
        if not read_run(folder)["finished"]:
            raise KeyboardInterrupt
    return str(folder)


def draw(written, settings, path):
    """A study as a PNG: lines over steps (Fig. 3) or shots (Fig. 4), else each seed's accuracy. Of
    what a stop left undone there is nothing in it."""
    pyplot, panels, steps = import_pyplot(), {}, settings.study == "steps"
    for result in written["results"]:
        for target, test in result["test"].items():
            panels.setdefault(target, []).append((result, test["prompts"]))
    picture, axes = pyplot.subplots(1, len(panels), squeeze=False, sharey=len(panels) > 2,
                                    figsize=(max(4 * len(panels), 5), 4), layout="constrained")
    for axis, (target, found) in zip(axes[0], panels.items()):
        names = [name for name in settings.prompt if name in found[0][1]]
        for place, name in enumerate(names):
            ours = [(result, test[name]) for result, test in found if name in test]
            if steps:
                x = [one["step"] for one in ours[0][0]["tuning"][name][0]["validations"][0]]
                y = list(zip(*ours[0][1]["steps"]))
            elif len(found) > 1:
                x, y = [result["shots"] for result, _ in ours], [one["tuned"] for _, one in ours]
                axis.set_xscale("log", base=2)
                axis.set_xticks(x, x)
            else:
                y = ours[0][1]["tuned"]
                axis.boxplot([y], positions=[place], widths=0.5, showfliers=False)
                axis.plot([place] * len(y), y, "o", alpha=0.6)
                axis.set_xticks(range(len(names)), names, rotation=20)
                continue
            spread = [statistics.stdev(values) if len(values) > 1 else 0 for values in y]
            axis.errorbar(x, [statistics.mean(values) for values in y], spread, label=name,
                          marker="o", markersize=3, capsize=2)
            axis.set_xlabel("tuning steps" if steps else "samples per label")
            axis.legend()
        axis.set_title(target)
    axes[0][0].set_ylabel(f"test accuracy in %, {len(settings.seeds)} seeds, {settings.model}")
    atomic_write(path, lambda file: picture.savefig(file, format="png", dpi=120))
    pyplot.close(picture)
