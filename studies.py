"""The paper's tables and figures: as commands, the runs that they need, tables and pictures.

    python studies.py               # lists the studies: python eval.py --study NAME
"""

import json
import shlex
import signal
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from baselines import ABLATIONS, METHODS
from common import InputError, read_json, reading, whole_file

# What a name of --prompt has train.py make.
PRETRAINED = {**{name: "--method" for name in METHODS}, **dict.fromkeys(ABLATIONS, "--ablation")}
STUDIES = {     # the Settings of eval.py
    "steps": {"task": ("cb", "mrpc"), "plot": True},                                    # Fig. 3
    "shots": {"task": ("sst5", "subj"), "shots": (4, 8, 16, 32, 64), "plot": True},     # Fig. 4
    "dg": {"task": ("dg",), "plot": True},                                              # Table 2
    "spread": {"task": ("mrpc", "cb", "subj"), "prompt": ("random", "vocab"), "plot": True,
               "seeds": tuple(range(10, 110, 10)), "same_examples": True},              # Fig. 1a
    "comparison": {"prompt": ("zero-shot", "few-shot", "random", "vocab", "prefix-tuning",
                              "p-tuning-v2", "ft", "supmer", "ppt", "unified-ppt", "metapt")},
    "ablation": {"prompt": ("supmer", *ABLATIONS)},     # Table 4, and first-order
    "evidence": {"task": ("evidence",), "rates": (0.03, 0.3), "epochs": 60, "words_only": True,
                 "dtype": "bfloat16",                   # docs/results.md
                 "prompt": ("random", "vocab", "ppt", "supmer", "metapt", "first-order",
                            "no-curriculum", "no-mgr", "no-ta")}}
TRAIN = Path(__file__).with_name("train.py")
STUDY_RUN = ("--bytes", "10000000", "--examples", "23040", "--validate-every", "30",
             "--validation-tasks", "13")        # what a comparison pre-trains on the embedded T5


# ---------------------------------------------------------------------------- runs that are needed

def pretrained_run(name, settings):
    """The folder of a method's or ablation's run under runs/compared, which train.py makes or
    resumes. All of a model's have the same numbers but for the method's own.

    Ctrl-C, and the time that is left until SIGALRM, are passed on. Raises KeyboardInterrupt if the
    run was stopped, InputError if train.py refuses."""
    folder = Path("runs/compared") / f"{Path(settings.model).name}-{name}"
    if is_finished(folder):
        return folder
    argv = ["--resume", str(folder)] if folder.exists() else [
        "--model", settings.model, PRETRAINED[name], name, "--run", str(folder),
        *(STUDY_RUN if settings.model == "tiny" else ()),
        *(("--labeled", settings.labeled) if name == "metapt" else ())]
    seconds, _ = signal.getitimer(signal.ITIMER_REAL)
    if seconds:
        argv += ["--max-minutes", f"{max(seconds / 60, 0.01):.2f}"]
    print(f"{name} comes first: {shlex.join(['python', 'train.py', *argv])}", flush=True)
    process = subprocess.Popen([sys.executable, str(TRAIN), *argv])
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()                  # it saves its last step
        raise
    if status == 2:
        raise InputError("train.py refused, see its message above")
    if not is_finished(folder):
        raise KeyboardInterrupt
    return folder


def is_finished(folder):
    """Whether a folder holds a finished run."""
    path = folder / "run.json"
    if not path.exists():
        return False
    run = read_json(path)
    with reading(path, "a run's record", remedy="move the folder away"):
        return bool(run["finished"])


# ------------------------------------------------------------------------------ the paper's figures

BACKBONES = {("t5-base", 768, 12): "t5-base", ("flan-t5-xl", 2048, 24): "flan-t5-xl"}


def paper_lines(columns, settings, config):
    """The paper's lines of a table. Under its own backbone all of its methods; under another one
    T5-base's PT and SUPMER, and the title says so."""
    ours = BACKBONES.get((Path(settings.model).name, config.d_model, config.num_layers))
    paper, lines = read_json(Path(__file__).with_name("results") / "paper_tables.json"), []
    for method, figures in paper[ours or "t5-base"].items():
        pairs = [figures.get(target) if shots == 16 else None for target, shots in columns]
        if any(pairs) and (ours or method in ("pt", "supmer")):
            cells = ["{} ± {}".format(*pair).replace(" ± None", "") if pair else ""
                     for pair in pairs]
            lines.append((f"the paper's {ours or 'T5-base, another model'}: {method}", cells,
                          [pair and pair[0] for pair in pairs]))
    return lines


# -------------------------------------------------------------------------------------- pictures

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
    pyplot, path = import_pyplot(), folder / "log.jsonl"
    picture, axes = pyplot.subplots(1, len(PANELS), figsize=(17, 3.2), layout="constrained")
    with reading(path, "the log of a run", remedy="give a folder that train.py made"):
        text = path.read_text(encoding="utf-8")
        whole, _, _ = text.rpartition("\n")             # a last line may be on its way
        entries = [json.loads(line) for line in whole.splitlines()]
        entries = [entry | entry.get("validation", {}) for entry in entries]
        for axis, (title, names) in zip(axes, PANELS.items()):
            draw_panel(axis, title, names, entries)
    return save_picture(picture, folder / "log.png", dpi=90)


def draw_panel(axis, title, names, entries):
    """One of PANELS: the log's entries {name: value} as dots, and their mean."""
    near, size, faint = (1, 5, 1.0) if title == "validation" else (10, 3, 0.3)
    for color, name in zip(("C0", "C1"), names):                    # PPT has its loss alone
        x, y = (np.array([entry[key] for entry in entries if name in entry], dtype=float)
                for key in ("step", name))
        axis.plot(x, y, ".", markersize=size, alpha=faint, color=color)
        means = [np.mean(y[max(0, i + 1 - near):i + near]) for i in range(len(y))]
        axis.plot(x, means, color=color, label=name)
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
    """The rows of a study as a PNG: lines over steps (Fig. 3) or shots (Fig. 4), else each seed's
    accuracy."""
    along = "step" if settings.study == "steps" else "shots"
    kinds = ("tuned", "step") if along == "step" else ("tuned",)
    lines = along == "step" or len(settings.shots) > 1
    found = defaultdict(lambda: defaultdict(list))      # (target, prompt): {step or shots: [%]}
    for row in rows:
        if row["split"] == "test" and row["kind"] in kinds:
            found[row["target"], row["prompt"]][row[along]].append(row["accuracy"])
    targets = [*dict.fromkeys(target for target, _ in found)]
    picture, axes = import_pyplot().subplots(
        1, len(targets), squeeze=False, sharey=len(targets) > 2,
        figsize=(max(4 * len(targets), 5), 4), layout="constrained")
    for axis, target in zip(axes[0], targets):
        names = [name for name in settings.prompt if (target, name) in found]
        for place, name in enumerate(names):
            points = sorted(found[target, name].items())
            if lines:
                x, y = zip(*points)
                spread = [statistics.stdev(one) if len(one) > 1 else 0 for one in y]
                axis.errorbar(x, [statistics.mean(one) for one in y], spread, label=name,
                              marker="o", markersize=3, capsize=2)
                axis.legend()
            else:
                (_, y), = points
                axis.boxplot([y], positions=[place], widths=0.5, showfliers=False)
                axis.plot([place] * len(y), y, "o", alpha=0.6)
        if not lines:
            axis.set_xticks(range(len(names)), names, rotation=20)
        elif along == "shots":
            axis.set_xscale("log", base=2)
            axis.set_xticks(settings.shots, settings.shots)
        axis.set_xlabel("" if not lines else "tuning steps" if along == "step" else
                        "samples per label")
        axis.set_title(target)
    axes[0][0].set_ylabel(f"test accuracy in %, {len(settings.seeds)} seeds, {settings.model}")
    save_picture(picture, path, dpi=120)


def save_picture(picture, path, dpi):
    """Write a figure as a PNG, and close it -> path."""
    with whole_file(path) as file:
        picture.savefig(file, format="png", dpi=dpi)
    import_pyplot().close(picture)
    return path


if __name__ == "__main__":
    for name, chosen in STUDIES.items():
        print(f"python eval.py --study {name:11} {chosen}")
