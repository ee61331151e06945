"""What a run and an evaluation have found, as text: the end of a run, tables, errors of means."""

import statistics
from collections import defaultdict
from itertools import count
from pathlib import Path

import numpy as np

from common import read_json, whole_file
from pictures import draw
from run_folder import read_log


def figure(values):
    """Mean and sample standard deviation: [60, 70, 80] -> 70.0 ± 10.0, [60] -> 60.0."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def standard_error(values):
    """Of the mean of two or more numbers, or of arrays: [60, 70, 80] -> 5.8."""
    return np.std(values, 0, ddof=1) / len(values) ** 0.5


def outcome(folder, model, best):
    """A run's validations of step 0 and of the end, a row for each variant; what to do next."""
    ends = [entry for entry in read_log(folder) if "validation" in entry]
    ends = ends[0], ends[-1]
    first, last = (end["validation"] for end in ends)
    lines = [f"{first['queries']} held-out queries: accuracy in %, loss over label words",
             f"{'':17}step 0, unadapted -> adapted    step {ends[1]['step']}, unadapted -> adapted"]
    for variant, figures in first["variants"].items():
        chance = f"(chance {100 / figures['ways']:.0f})"
        line = f"{variant:11}{chance:>12}"
        for x in (figures, last["variants"][variant]):
            before, after = (f"{100 * x[f'correct_{when}']:5.1f} {x[f'word_loss_{when}']:6.3f}"
                             for when in ("before", "after"))
            line += f"  {before} -> {after}  "
        lines.append(line)
    gains = (statistics.mean(x["word_loss_before"] - x["word_loss_after"]
                             for x in end["variants"].values()) for end in (first, last))
    lines.append("one inner step lowers the loss by {:.3f} at the start, by {:.3f} at the end"
                 .format(*gains))
    if model == "tiny":
        lines.append("A demonstration: the embedded T5 knew such tasks before, see tiny/README.md.")
    lines += [f"lowest validation loss {best:.4f} (full vocabulary): {folder}/prompt.safetensors",
              f"tune it on a task: python eval.py --prompt {folder}"]
    return "\n".join(lines)


def results_file(settings, planned):
    """Where the results go; its folder is made."""
    what = planned[0].name if settings.template else "-".join(settings.task)
    stem = f"{Path(settings.model).name}-{settings.study or what}"
    if settings.quick:
        stem += "-quick"
    out = Path(settings.out or f"runs/eval/{stem}.json").with_suffix(".json")
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def keep_earlier(out):
    """Rename an earlier call's results, if there are any: out.1.json, out.2.json, ..."""
    if out.exists():
        names = (out.with_suffix(f".{number}.json") for number in count(1))
        out.rename(next(path for path in names if not path.exists()))


def result_lines(rows, preference):
    """One line for each prompt of a task: accuracies, what each seed chose, the best's file.
    preference: eval.py's sort key of validations."""
    for prompt in dict.fromkeys(row["prompt"] for row in rows if row["kind"] == "tuned"):
        ours = [row for row in rows if row["prompt"] == prompt and row["kind"] != "step"]
        tests = defaultdict(list)
        for row in ours:
            tests[row["split"], row["target"], row["kind"]].append(row["accuracy"])
        parts = [f"{' '.join(key[1:])} {figure(found)}" for key, found in tests.items()
                 if key[0] == "test"]
        chosen = [row for row in ours if row["split"] == "validation"]
        if chosen:
            steps = " ".join(f"{row['rate']}/{row['step']}" for row in chosen)
            best = min(chosen, key=preference)
            parts += [f"rate/step {steps}", f"best on validation: {best['file']}"]
        yield f"{prompt}, {ours[0]['shots']} shots: {'; '.join(parts)}"


# ------------------------------------------------------------- tables, the paper's figures beside

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
        yield (f"{first} is {statistics.mean(gaps):+.1f} points from {name}, standard error "
               f"{standard_error(gaps):.1f} ({len(gaps)} samples)")
