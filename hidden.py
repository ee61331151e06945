"""Hidden classes: does a meta-learned start adapt faster in a few steps, on unseen clusters?

    python hidden.py                                # 3 seeds of meta-training, 150 steps each
    python hidden.py --steps 1500 --seeds 0         # ten times as long
    python hidden.py --task subj nyt --shots 4 8    # the same starts on labeled tasks

In each task two clusters of sentences get "yes" and "no" at random. Only the support set shows
which is which, so no prompt solves such a task without adapting. The paper's five variants have
fixed label words: a prompt can solve them as it is.

Meta-training sees one third of the clusters. Another third chooses the rates. The last third
stays sealed until then. These two thirds hold sentences of held-out documents only. Finished
work is kept in runs/hidden: the same command resumes.
"""

import json
import shlex
import statistics
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from baselines import normal_prompt
from common import TINY, bar, run_script, whole_file
from corpus import build_store
from data import Task, TaskIndex, meta_task
from measure import measure, score
from report import standard_error
from settings import Parser
from studies import as_many_examples
from supmer import Method, inner_step, init_prompt, prompt_gradient
from supmer import REGULARIZERS
from t5 import load_t5, model_fingerprint
from tasks import TASKS, few_shot, first_rows, load_test, load_train, task_examples
from templates import load_tokenizer
from train import Run, Training

FOLDER = Path("runs/hidden")
LEARNED = {     # each one's settings that are not SUPMER's
    "SUPMER": {}, "PPT": {"regularizer": "none"}, "first order": {"first_order": True},
    "no psi": {"regularizer": "none"}, "no mixing": {"augmentation": False}}
GIVEN = {"vocabulary": lambda t5, seed: init_prompt(t5, 10, seed),
         "random": lambda t5, seed: normal_prompt(t5, seed, 10)["theta"]}
WAYS = [(way, rate) for way in ("relative", "AdamW") for rate in (0.05, 0.15, 0.45)]
TRAINED, CHOICE, SEALED = range(3)      # cluster c is of the third c % 3


# --------------------------------------------------------------------------------- meta-training

def index_of(store, tokenizer, third, query=16):
    """A TaskIndex whose training tasks are of the first third of the clusters, and whose held-out
    ones are of the given third."""
    index = TaskIndex(store, tokenizer, support=8, query=query // 2, variants=("hidden",),
                      max_tokens=24, mixing=True)
    index.sizes = 16, query             # two clusters share a set: each needs half of it
    for split, name in index.usable:
        usable = index.usable[split, name]
        wanted = TRAINED if split == "train" else third
        index.usable[split, name] = usable[usable % 3 == wanted]
    return index


def meta_train(name, seed, steps, t5, index):
    """theta and phi after the last step; a run that was stopped resumes, a finished one is read.
    All methods draw as many examples as SUPMER in its steps."""
    training = Training(prompt_length=10, max_tokens=24, variants=("hidden",), support=16,
                        query=16, seed=seed, method="ppt" if name == "PPT" else "supmer",
                        validation_tasks=20)
    method = Method(relative_step=0.1, prompt_rate=0.03, words_only=True, steps=steps)
    method = as_many_examples(training, replace(method, **LEARNED[name]))
    training = replace(training, validate_every=min(method.steps, 150))
    folder = FOLDER / f"{name.replace(' ', '-')}-{steps}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(folder, training, method, t5, [(meta_task, index)],
              {"model": model_fingerprint(TINY)})
    run.train()
    return run.state.theta.detach(), run.state.phi, method.regularizer


# ------------------------------------------------------------------------------------- adapting

def adapt(t5, start, task, way, rate, unit, steps):
    """Adapt a start to a task's support set -> {step: accuracy in % on its query set}.

    way: "relative", steps of a share `rate` of theta's length, as in meta-training; or "AdamW", at
    the rate in `unit`s. Both follow psi(g)."""
    theta, phi, form = start
    theta, found = theta.clone(), {}
    method = Method(words_only=True, regularizer=form, relative_step=rate)
    adam = torch.optim.AdamW([theta], lr=rate * unit, weight_decay=0.0)
    for step in range(steps[-1] + 1):
        if step in steps:
            scores = score(t5, theta, task.query, method)
            right = measure(scores, task.query.labels)["correct"]
            found[step] = 100 * right / len(task.query.labels)
        if step < steps[-1]:
            g, pooled, _ = prompt_gradient(t5, theta, task.support, method)
            if way == "AdamW":
                theta.grad = REGULARIZERS[form].psi(phi, g, pooled)
                adam.step()
            else:
                theta.copy_(inner_step(theta, phi, g, pooled, method))
    return found


def measured(path, t5, start, tasks, ways, unit, steps):
    """adapt() to each task in each way -> {way and rate: [{step: accuracy}]}, kept as JSON."""
    found = json.loads(path.read_text()) if path.exists() else {}
    for way, rate in ways:
        name = f"{way} {rate}"
        if name not in found:
            found[name] = [adapt(t5, start, task, way, rate, unit, steps)
                           for task in bar(tasks, desc=f"{path.stem}, {name}", unit="task")]
            with whole_file(path) as file:
                file.write(json.dumps(found).encode())
    return json.loads(json.dumps(found))        # steps as text, whether read or just made


# --------------------------------------------------------------------------------- what to adapt to

def hidden_tasks(store, tokenizer, third, number):
    """Tasks of one third of the clusters, of held-out documents: 16 support, 32 query examples."""
    index = index_of(store, tokenizer, third, query=32)
    return [meta_task(index, 0, 0, i, split="validation", stream="validation")
            for i in range(number)]


def labeled_tasks(tokenizer, name, shots, folder, sealed):
    """A labeled task's samples of three seeds, beside their validation examples or, sealed, 300
    rows of the test file."""
    task, rows, made = TASKS[name], load_train(TASKS[name], folder), []
    for seed in (10, 20, 30):
        support, query = few_shot(rows, shots, seed, len(task.words))
        if sealed:
            query = first_rows(load_test(task, folder), 300)
        made.append(Task(name, (), *(task_examples(tokenizer, task, part)
                                     for part in (support, query))))
    return made


# ---------------------------------------------------------------------------------- the comparison

def compare(title, starts, choice, sealed, t5, steps):
    """Choose each start's way and rate, for each number of steps, on the tasks `choice`; then open
    the sealed ones. starts: {(name, seed): (theta, phi, form)}; choice, sealed: () -> [Task].
    -> rows, printed as a table: mean and standard error over the tasks of the seeds' means."""
    unit = float(t5.weights["shared.weight"].square().mean().sqrt())
    accuracy = defaultdict(list)            # (name, way and rate, step): of each seed and task
    for (name, seed), start in starts.items():
        path = FOLDER / f"{title}-choice-{name}-{seed}.json"
        for way, found in measured(path, t5, start, choice(), WAYS, unit, steps).items():
            for step in steps:
                accuracy[name, way, step] += [one[str(step)] for one in found]
    best = {(name, step): max((f"{way} {rate}" for way, rate in WAYS),
                              key=lambda way: statistics.mean(accuracy[name, way, step]))
            for name, _ in starts for step in steps}
    rows = []
    for (name, seed), start in starts.items():
        path = FOLDER / f"{title}-sealed-{name}-{seed}.json"
        chosen = [(way, rate) for way, rate in WAYS
                  if f"{way} {rate}" in [best[name, step] for step in steps]]
        found = measured(path, t5, start, sealed(), chosen, unit, steps)
        rows += [{"tasks": title, "start": name, "seed": seed, "step": step,
                  "rate": best[name, step],
                  "accuracy": [one[str(step)] for one in found[best[name, step]]]}
                 for step in steps]
    return rows


def over_seeds(rows, name, step):
    """A start's accuracy on each task after a number of steps, the mean over its seeds."""
    found = [row["accuracy"] for row in rows if (row["start"], row["step"]) == (name, step)]
    return [statistics.mean(column) for column in zip(*found)]


def with_error(values):
    """Mean and standard error over tasks: [60, 70, 80] -> 70.0 ± 5.8"""
    return f"{statistics.mean(values):.1f} ± {standard_error(values):.1f}"


def table(rows, steps):
    """Rows of one comparison as Markdown; in brackets the difference to SUPMER, task by task."""
    lines = [f"| {rows[0]['tasks']}: steps | {' | '.join(map(str, steps))} |",
             "|---" * (len(steps) + 1) + "|"]
    for name in dict.fromkeys(row["start"] for row in rows):
        cells = []
        for step in steps:
            ours, theirs = over_seeds(rows, "SUPMER", step), over_seeds(rows, name, step)
            behind = with_error([a - b for a, b in zip(theirs, ours)])
            cells.append(with_error(theirs) + f" ({behind})" * (name != "SUPMER"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


@torch.no_grad()
def main(argv):
    """Meta-train, choose, open the sealed clusters, print -> exit status."""
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--steps", type=int, default=150, help="of meta-training [150]")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of meta-training [0 1 2]")
    add("--methods", nargs="+", default=[*LEARNED], choices=LEARNED)
    add("--number", type=int, default=24, help="of sealed tasks [24]")
    add("--task", nargs="+", default=[], choices=TASKS, help="labeled tasks instead")
    add("--shots", type=int, nargs="+", default=[4, 8, 16], help="of labeled tasks [4 8 16]")
    add("--data", default=TINY, help="folder of the labeled tasks")
    options = parser.parse_args(argv)
    FOLDER.mkdir(parents=True, exist_ok=True)
    t5 = load_t5(TINY)
    tokenizer = load_tokenizer(TINY, t5.config)
    store = build_store(Path("cache"), [TINY / "corpus.jsonl.gz"], tokenizer, t5, 32, 0,
                        model=TINY)
    index, starts = index_of(store, tokenizer, CHOICE), {}
    for name in options.methods:
        for seed in options.seeds:
            print(f"{name}, seed {seed}", flush=True)
            starts[name, seed] = meta_train(name, seed, options.steps, t5, index)
    starts |= {(name, seed): (start(t5, seed), {}, "none") for name, start in GIVEN.items()
               for seed in options.seeds}
    if not options.task:
        groups = {f"hidden-{options.steps}": [partial(hidden_tasks, store, tokenizer, *what)
                                              for what in ((CHOICE, 6), (SEALED, options.number))]}
    else:
        groups = {f"{name}-{shots}-{options.steps}": [
            partial(labeled_tasks, tokenizer, name, shots, options.data, sealed)
            for sealed in (False, True)] for name in options.task for shots in options.shots}
    steps, rows = (0, 1, 2, 5, 10, 20) if options.task else (0, 1, 2, 5), []
    for title, sets in groups.items():
        new = compare(title, starts, *sets, t5, steps)
        rows += new
        print(table(new, steps), flush=True)
    out = FOLDER / f"{'-'.join(groups)}.json"
    with whole_file(out) as file:
        file.write(json.dumps({"command": shlex.join(["python", "hidden.py", *argv]),
                               "rows": rows}).encode())
    print(f"details: {out}")
    return 0


if __name__ == "__main__":
    run_script(main, "stopped; what is finished is kept, the same command resumes")
