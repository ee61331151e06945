"""The paper's tables and figures: as commands, the runs that they need, tables and pictures.

    python studies.py               # lists the studies: python eval.py --study NAME
"""

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
from run_folder import read_log

# What a name of --prompt has train.py make.
PRETRAINED = {**{name: "--method" for name in METHODS}, **dict.fromkeys(ABLATIONS, "--ablation")}
# What "newest" is without a finished run of one's own.
FALLBACK = {"tiny": "shipped", "t5-base": "released", "flan-t5-xl": "released"}
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

    Ctrl-C, and the end of --max-minutes, are passed on. Raises KeyboardInterrupt if the run was
    stopped, InputError if train.py refuses."""
    folder = Path("runs/compared") / f"{Path(settings.model).name}-{name}"
    if is_finished(folder):
        return folder
    argv = ["--resume", str(folder)] if folder.exists() else [
        "--model", settings.model, PRETRAINED[name], name, "--run", str(folder),
        *(STUDY_RUN if settings.model == "tiny" else ()),
        *(("--labeled", settings.labeled) if name == "metapt" else ())]
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


def read_record(folder):
    """A run's method or ablation, its model's name, and when it finished: 0.0 if it has not."""
    path = folder / "run.json"
    run = read_json(path)
    with reading(path, "a run's record", remedy="move the folder away"):
        return run["name"], Path(run["model"]).name, float(run["ended"]) if run["finished"] else 0.0


def is_finished(folder):
    """Whether a folder holds a finished run."""
    return (folder / "run.json").exists() and read_record(folder)[-1] > 0


def newest_run(model):
    """The folder under runs/ of this model's SUPMER run, with all its parts, that finished last;
    without one FALLBACK's. Raises InputError for other models."""
    name, ended = Path(model).name, {}
    for path in Path("runs").glob("*/run.json"):
        method, learned_on, when = read_record(path.parent)
        if (method, learned_on) == ("supmer", name) and when:
            ended[str(path.parent)] = when
    if not ended and name not in FALLBACK:
        raise InputError(f"runs/ has no finished run of {model}: make one (python train.py), or "
                         "give --prompt RUN|released|random|vocab")
    return max(ended, key=ended.get) if ended else FALLBACK[name]


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


def figure(values):
    """Mean and sample standard deviation: [60, 70, 80] -> 70.0 ± 10.0, [60] -> 60.0."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def table(written, settings, config):
    """A call's results as a Markdown table, the paper's figures under ours."""
    tests = [row for row in written["rows"] if row["split"] == "test"]
    columns = [*dict.fromkeys((row["target"], row["shots"]) for row in tests)]
    tested, several = len(columns), len(settings.shots) > 1
    done = {(row[name], row["shots"]) for row in tests for name in ("task", "target")}
    columns += [(name, shots) for shots in settings.shots for name in written["not_run"]
                if (name, shots) not in done]
    found = defaultdict(list)                   # (prompt, kind, target, shots): [%]
    for row in tests:
        found[row["prompt"], row["kind"], row["target"], row["shots"]].append(row["accuracy"])
    lines = []                                  # (title, a text and a number for each column)
    for prompt in (*settings.prompt, "no prompt", "most frequent label"):
        asked = prompt in settings.prompt
        for kind in ("tuned", "untuned"):
            values = [found.get((prompt, kind, *column)) for column in columns]
            title = f"{prompt}, untuned" if asked and kind == "untuned" else prompt
            cells = [figure(x) if x else "not run" for x in values]
            means = [x and statistics.mean(x) for x in values]
            if any(values) or asked and kind == "tuned":
                lines.append((title, cells, means))
    lines += paper_lines(columns, settings, config)
    heads = [f"{target}, {shots} shots" if several else target for target, shots in columns]
    if tested > 1 and not several:              # the mean over what was run here
        heads.append(f"mean of {tested}")
        for _, cells, means in lines:
            whole = None not in means[:tested]
            cells.append(f"{statistics.mean(means[:tested]):.1f}" if whole else "")
    texts = [["accuracy in %", *heads], ["---"] * (len(heads) + 1)]
    texts += [[title, *cells] for title, cells, _ in lines]
    return "\n".join(f"| {' | '.join(text)} |" for text in texts)


def show(written, settings, config, out):
    """Print and write the table; draw the picture; say what a demonstration is not."""
    text = table(written, settings, config)
    with whole_file(out.with_suffix(".md")) as file:
        file.write(f"{text}\n".encode())
    print(f"\n{text}\n\n±: sample standard deviation (n - 1) over the seeds")
    if settings.plot:
        draw(written["rows"], settings, out.with_suffix(".png"))
        print(f"picture: {out.with_suffix('.png')}")
    if settings.quick:
        print("A DEMONSTRATION, not the protocol, which is: python eval.py --task "
              f"{' '.join(settings.task)} --prompt {' '.join(settings.prompt)}")


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
    entries = [entry | entry.get("validation", {}) for entry in read_log(folder)]
    pyplot = import_pyplot()
    picture, axes = pyplot.subplots(1, len(PANELS), figsize=(17, 3.2), layout="constrained")
    with reading(folder / "log.jsonl", "the log of a run", remedy="give a run's folder"):
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
    """The rows of a study as a PNG: each seed's test accuracy, mean and deviation, over steps
    (Fig. 3), shots (Fig. 4) or prompts (Fig. 1a)."""
    along = "shots" if len(settings.shots) > 1 else "prompt"
    along = "step" if settings.study == "steps" else along
    found = defaultdict(lambda: defaultdict(list))      # (target, prompt): {step or shots: [%]}
    for row in rows:
        if row["split"] == "test" and row["prompt"] in settings.prompt and (
                row["kind"] == "tuned" or along == row["kind"]):
            found[row["target"], row["prompt"]][row[along]].append(row["accuracy"])
    targets = [*dict.fromkeys(target for target, _ in found)]
    picture, axes = import_pyplot().subplots(
        1, len(targets), squeeze=False, sharey=len(targets) > 2,
        figsize=(max(4 * len(targets), 5), 4), layout="constrained")
    for (target, name), points in found.items():
        axis = axes[0][targets.index(target)]
        x, y = zip(*sorted(points.items()))
        spread = [statistics.stdev(one) if len(one) > 1 else 0 for one in y]
        axis.errorbar(x, [statistics.mean(one) for one in y], spread, label=name, marker="o",
                      markersize=3, capsize=2)
        if along == "prompt":
            axis.plot([name] * len(y[0]), y[0], "o", alpha=0.4)
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


if __name__ == "__main__":
    for name, chosen in STUDIES.items():
        print(f"python eval.py --study {name:11} {chosen}")
