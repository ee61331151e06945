"""The paper's tables and figures as commands: the runs that they need, and tables.

    python studies.py               # lists the studies: python eval.py --study NAME
"""

import shlex
import signal
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from baselines import ABLATIONS, METHODS
from common import InputError, read_json, reading, whole_file
from pictures import draw

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
# What a comparison pre-trains on the embedded T5.
STUDY_RUN = ("--bytes", "10000000", "--clusters", "16", "--support", "16", "--query", "16",
             "--examples", "23040", "--validate-every", "30", "--validation-tasks", "13")


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
        print("\n".join(differences(written["rows"], settings.prompt)))
        if settings.task == ("source",):
            print(MEANING)
        print("A DEMONSTRATION, not the protocol, which is: python eval.py --task "
              f"{' '.join(settings.task)} --prompt {' '.join(settings.prompt)}")


MEANING = """It shows what a start that learned from unlabeled text is worth on one small task.
It does not show what meta-learning adds, unless shipped leads shipped-ppt by two errors."""


def differences(rows, prompts):
    """A line for each later prompt: how far the first one is ahead on the same samples."""
    tuned = defaultdict(dict)                   # {prompt: {(target, seed): %}}
    for row in rows:
        if (row["split"], row["kind"]) == ("test", "tuned"):
            tuned[row["prompt"]][row["target"], row["seed"]] = row["accuracy"]
    first = prompts[0]
    for name in prompts[1:] if len(tuned[first]) > 1 else ():
        gaps = [tuned[first][key] - accuracy for key, accuracy in tuned[name].items()]
        error = statistics.stdev(gaps) / len(gaps) ** 0.5
        yield (f"{first} is {statistics.mean(gaps):+.1f} points from {name}, standard error "
               f"{error:.1f} ({len(gaps)} samples)")


if __name__ == "__main__":
    for name, chosen in STUDIES.items():
        print(f"python eval.py --study {name:11} {chosen}")
