"""Few-shot prompt tuning: T5 stays frozen, a soft prompt learns from 16 examples per label (C.1).

    python eval.py --task movie             # the newest finished run beside a random prompt
    python eval.py --task all --data FOLDER --prompt released random vocab      # Table 1
    python eval.py --study dg               # Table 2; python studies.py lists the others
    python eval.py --data my.csv --template "{text} It was <X> ." --words terrible,great
    python eval.py --predict new.txt --prompt runs/eval/tuned/NAME.safetensors > labels.csv
    python eval.py --quick                  # a demonstration of about a minute, NOT the protocol

For each task, prompt and seed: sample the examples, tune at each rate, let the validation examples
choose rate and step. After the last tuning run of a task its test file is opened, and each choice
is tested once. Every result is a row of one flat list in runs/eval/<model>-<task>.json:
    {"task", "target", "shots", "prompt", "seed", "rate", "step", "split", "kind", "loss", ...}
The table is a selection of those rows. Finished work is kept in runs/eval/tuned under a hash of its
inputs: the same command resumes. On the embedded T5 a prompt takes some 15 minutes of one core.
"""

import hashlib
import json
import os
import shlex
import signal
import statistics
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Callable, NamedTuple

import torch

from baselines import BASELINES, pose, with_prompt
from candidates import (Candidate, NAMES, candidates, newest_run, open_candidate, own_words,
                        plans)
from common import (InputError, fingerprint, from_settings, knob, one_process, run_script,
                    settings_parser, whole_file)
from data import load_tokenizer
from hub import fetch_list, model_folder, tokenizer_file
from jobs import TUNED, find_devices, make_job, read_result, workers
from predict import predict
from studies import PRETRAINED, STUDIES, draw, import_pyplot, paper_lines
from t5 import load_t5, model_fingerprint
from tasks import GROUPS, TASKS, few_shot, load_test, load_train
from tuning import Tuning, loss_and_accuracy, preference, score_job, tune_job


@dataclass(frozen=True)
class Settings:
    """The options of an evaluation, with the paper's values."""
    model: str = knob("tiny", "tiny, a short name such as flan-t5-xl, a hub id, or a T5's folder",
                      first=True)
    task: tuple = knob(("movie",), "names, or groups: all (Table 1), dg (Table 2)", first=True)
    prompt: tuple = knob(("newest", "random"), "a run; a prompt's file or folder, PEFT's and the "
                         "authors' too; or newest (this model's last finished run), "
                         f"{', '.join(NAMES)}", first=True)
    study: str = knob("", "of the paper, see studies.py", first=True, choices=tuple(STUDIES))
    data: tuple = knob((os.environ.get("SUPMER_DATA") or "data",), "folder of the tasks' files, "
                       "others are fetched; for a task of your own its file, and a second one to "
                       "test on (or the rows that are not sampled)", first=True)
    template: str = knob("", "of your own task: \"{text} It was <X> .\"; a file without a header "
                         "has the label first, then the template's texts", first=True)
    words: str = knob("", "of your own task, by label 0, 1, ...: terrible,great", first=True)
    predict: str = knob("", "only label this file's texts with one tuned --prompt", first=True)
    quick: bool = knob(False, "a demonstration: one seed, one rate, 60 epochs", first=True)
    max_minutes: float = knob(0.0, "then stop tuning, the same command resumes; 0: never",
                              zero=True, first=True)
    labeled: str = knob("", "folder of labeled sentiment sets, for metapt")
    prompt_length: int = knob(100, "P, vectors of the soft prompt (section 4.1)", most=10_000)
    shots: tuple = knob((16,), "examples per label to tune on, as many to validate on (4.1)")
    seeds: tuple = knob((10, 20, 30, 40, 50), "of examples, batches and random prompts (C.1)",
                        zero=True)
    same_examples: bool = knob(False, "the first seed's examples and batches for all seeds")
    rates: tuple = knob((0.0,), "AdamW's rates to choose from; 0: each method's own, for prompts "
                        "0.1 0.2 0.3, for ft 1e-5 2e-5 3e-5 (C.1)", zero=True)
    rate_scale: str = knob("absolute", "of prompts' rates: absolute (C.1), or in units of the "
                           "embedding table's RMS", choices=("absolute", "rms"))
    epochs: int = knob(200, "passes over the examples, while the rate falls linearly to 0 (C.1)")
    batch: int = knob(32, "examples of a step (C.1)")
    validate_every: int = knob(10, "steps between validations (C.1)")
    words_only: bool = knob(False, "loss over the task's label words, not the whole vocabulary")
    test_rows: int = knob(0, "test on so many rows, always the same ones; 0: on all", zero=True)
    predictions: bool = knob(False, "write each test row's predicted label, too")
    plot: bool = knob(False, "a PNG beside the JSON file (needs matplotlib)")
    jobs: int = knob(0, "processes; the result is the same; 0: one for each GPU or core",
                     zero=True)
    dtype: str = knob("float32", "of the frozen T5", choices=("float32", "bfloat16"))
    device: str = knob("auto", "auto (all GPUs if there are any), cpu, cuda, cuda:1, ...")
    out: str = knob("", "of predictions; or the JSON file [runs/eval/<model>-<task>.json]")


# What the embedded T5 needs instead of the paper's numbers, and why.
FOR_TINY = {"prompt_length": (20, "100 vectors would outnumber the tokens of its texts"),
            "rate_scale": ("rms", "its embeddings are small, see tiny/README.md")}
QUICK = {"prompt": ("random", "vocab", "newest"), "seeds": (10,), "rates": (0.2,),
         "epochs": 60, "test_rows": 300}
CODE = ("eval", "tuning", "baselines", "supmer", "tasks", "tables", "data", "t5")   # results' own
PLACES = {"model", "data", "labeled", "jobs", "device", "out", "plot", "quick", "study"}


# ------------------------------------------------------------- the protocol: a task, tuned, tested

class Sample(NamedTuple):
    """The rows that are drawn from a task's training file."""
    seed: int
    train: list
    held_out: list


class Context(NamedTuple):
    """What all tasks of a call share."""
    settings: Settings
    tokenizer: object
    work: Callable          # of jobs.workers()
    made_of: dict           # what every result depends on
    unit: float             # of a prompt's rates


def evaluate(context, plan, candidates):
    """Tune every Candidate, then open the test files -> rows, whether Ctrl-C stopped the tuning.
    What is tuned by then is tested."""
    samples = draw_samples(context.settings, plan)
    rows, tuned, stopped = [], [], False
    try:
        for candidate in candidates:
            rows += tune_candidate(context, plan, candidate, samples)
            tuned.append(candidate)
    except KeyboardInterrupt:
        stopped = True
    chosen = {(row["prompt"], row["seed"]): row for row in rows if row["kind"] == "tuned"}
    for target in plan.targets if tuned else ():
        rows += evaluate_target(context, plan, target, tuned, chosen, samples)
    return rows, stopped


def draw_samples(settings, plan):
    """A Sample for each seed; of the files only the training one is opened."""
    task, samples = plan.task, []
    rows = load_train(task, plan.folder, print)
    for seed in settings.seeds:
        seed = settings.seeds[0] if settings.same_examples else seed
        try:
            samples.append(Sample(seed, *few_shot(rows, plan.shots, seed, len(task.words))))
        except InputError as error:
            raise InputError(f"{task.train}: {error}") from None
    found = Counter(row.label for row in samples[0].train)
    counts = [found[label] for label in range(len(task.words))]
    if min(counts) < plan.shots:
        print(f"{plan.name}: {counts} examples by label instead of {plan.shots}, as many for "
              "validation: smaller classes give half to each")
    return samples


def tune_candidate(context, plan, candidate, samples):
    """Tune with each seed's sample at each rate; no file is opened. -> a row for each validation;
    that of each seed's choice has the "kind" tuned. No rows where there is nothing to tune."""
    settings, baseline = context.settings, BASELINES[candidate.baseline]
    rates = settings.rates if any(settings.rates) and baseline.rates else baseline.rates
    about = {"task": plan.task._asdict(), "model": settings.model,
             "model_sha256": context.made_of["model"]}
    row = {"task": plan.name, "target": plan.name, "shots": plan.shots, "prompt": candidate.name,
           "split": "validation", "kind": "step", "examples": len(samples[0].train)}
    tuning = Tuning(*(getattr(settings, name) for name in Tuning._fields))
    jobs, rows = {}, []
    for seed, sample, start in zip(settings.seeds, samples, candidate.starts):
        posed = [baseline.pose(context.tokenizer, plan.name, plan.task, part, (), 0)[0]
                 for part in (sample.train, sample.held_out)]
        for rate in rates:
            jobs[seed, rate] = make_job(
                context.made_of, f"{plan.name}-{candidate.name}-{plan.shots}-{seed}-{rate}",
                tune_job, baseline=candidate.baseline, start=start, psi=candidate.psi,
                sample=posed, seed=sample.seed, rate=rate, unit=context.unit, about=about,
                tuning=tuning, all_steps=settings.study == "steps")
    context.work(jobs.values(), f"tune {plan.name}")
    for (seed, _), job in jobs.items():
        _, result = read_result(job.path, tensors=False)
        rows += [{**row, "seed": seed, **record, "file": str(job.path)}
                 for record in result["validations"]]
    for seed in settings.seeds if rows else ():
        best = min((row for row in rows if row["seed"] == seed), key=preference)
        best["kind"] = "tuned"
    return rows


def evaluate_target(context, plan, target, tuned, chosen, samples):
    """Open a test file, score every choice once -> rows. A seed is not tested on texts that it has
    sampled. chosen: {(a Candidate's name, seed): the row of its choice}."""
    settings = context.settings
    all_rows = load_test(plan.targets[target], plan.folder, print)
    rows = first_rows(all_rows, settings.test_rows or len(all_rows))
    labels, unseen = torch.tensor([row.label for row in rows]), []
    for sample in samples:
        texts = [row.fields for row in sample.train + sample.held_out]
        unseen.append(torch.tensor([row.fields not in texts for row in rows]))
    left_out = [int((~mask).sum()) for mask in unseen]
    if any(left_out):
        print(f"{target}: {left_out} test rows, by seed, are left out: they were sampled")
    if max(left_out) == len(rows):
        print(f"{target}: no row is left: it is tuned, not tested")
        return []
    jobs = test_jobs(context, plan, target, rows, tuned, chosen, samples)
    context.work([job for _, job in jobs], f"test {target}")
    usual = labels.bincount(minlength=len(plan.task.words)).float().expand(len(rows), -1)
    found = [({"prompt": "most frequent label", "seed": None, "kind": "untuned"}, usual)]
    found += [(row, read_result(job.path)[0]["scores"]) for row, job in jobs]
    result = []
    for row, scores in found:
        masks = [mask for seed, mask in zip(settings.seeds, unseen) if row["seed"] in (seed, None)]
        measured = [loss_and_accuracy(scores[mask], labels[mask], settings.words_only)
                    for mask in masks]
        loss, accuracy = map(statistics.mean, zip(*measured))
        result.append({"task": plan.name, "target": target, "shots": plan.shots, "split": "test",
                       **row, "loss": loss, "accuracy": accuracy, "rows": len(rows),
                       "of": len(all_rows)})
        if settings.predictions:
            result[-1] |= {"labels": labels.tolist(), "predictions": scores.argmax(-1).tolist()}
    result[0]["loss"] = None        # counts are no log-probabilities
    return result


def first_rows(rows, number):
    """The first rows by sha256 of their texts, whatever their order in the file."""
    def key(row):
        return hashlib.sha256("\t".join(row.fields.values()).encode()).digest()
    return sorted(rows, key=key)[:number] if number < len(rows) else rows


def test_jobs(context, plan, target, rows, tuned, chosen, samples):
    """What is scored on test rows -> [(the beginning of its result's row, Job)].

    A seed of None: one for all seeds. "kind": untuned (a prompt's start), tuned (the choice), step
    (the state at another validation), order (few-shot: the demonstrations in another order)."""
    jobs = []

    @cache
    def posed(how, i):
        sample = samples[i]
        return how(context.tokenizer, target, plan.targets[target], rows, sample.train, sample.seed)

    def add(name, seed, kind, baseline, kept, examples, rate=None, step=0):
        job = make_job(context.made_of, f"{target}-scores", score_job, baseline=baseline,
                       kept=kept, examples=examples)
        jobs.append(({"prompt": name, "seed": seed, "rate": rate, "step": step, "kind": kind}, job))

    add("no prompt", None, "untuned", "zero-shot", {}, posed(pose, 0)[0])
    for name, method, starts, _, about in tuned:
        baseline = BASELINES[method]
        for i, (seed, start) in enumerate(zip(context.settings.seeds, starts)):
            several = posed(baseline.pose, 0 if baseline.rates else i)
            if baseline.model is with_prompt and not (i and about):
                add(name, None if about else seed, "untuned", method, start, several[0])
            if baseline.rates:
                best = chosen[name, seed]
                for step, kept in kept_of(best).items():
                    kind = "tuned" if step == best["step"] else "step"
                    add(name, seed, kind, method, kept, several[0], best["rate"], step)
            else:
                for order, examples in enumerate(several[:1] if i else several):
                    add(name, seed, "order" if order else "tuned", method, {}, examples)
    return jobs


def kept_of(row):
    """A choice's file -> {its step: {name: tensor}}; with --study steps of all validations."""
    kept = {}
    for key, x in read_result(row["file"])[0].items():
        step, _, name = key.rpartition(":")
        kept.setdefault(int(step or row["step"]), {})[name] = x
    return dict(sorted(kept.items()))


# ---------------------------------------------------------------------------------- the script

def main(argv):
    """Print what differs from the paper; for each task tune, test, write and print."""
    settings, differences = parse(argv)
    if settings.predict:
        return predict(settings)
    print("\n  ".join(["differs from the paper's protocol (C.1):",
                          *(differences or ["nothing"])]))
    if settings.plot:
        import_pyplot()                         # now, not after hours
    signal.signal(signal.SIGALRM, signal.default_int_handler)       # as Ctrl-C
    signal.setitimer(signal.ITIMER_REAL, 60 * settings.max_minutes)
    devices = find_devices(settings.device)     # before anything is fetched
    planned, not_run = plans(settings)
    for line in fetch_list(settings.model):
        print(line)
    folder = model_folder(settings.model)
    load = partial(load_t5, folder, getattr(torch, settings.dtype))
    cores = torch.get_num_threads() if devices == ["cpu"] else len(devices)
    number = settings.jobs or cores
    t5 = load(device=torch.device(devices[0] if number == 1 else "cpu"))
    opened = {name: open_candidate(name, t5.config, settings) for name in settings.prompt
              if name not in PRETRAINED}
    made_of = {"model": model_fingerprint(folder), "dtype": settings.dtype,
               "device": devices[0].partition(":")[0], "torch": torch.__version__,
               "code": fingerprint(Path(__file__).with_name(f"{name}.py") for name in CODE)}
    rms = t5.weights["shared.weight"].float().cpu().square().mean().sqrt()
    unit = float(rms) if settings.rate_scale == "rms" else 1.0
    tokenizer = load_tokenizer(tokenizer_file(folder), t5.config)
    written = {"command": shlex.join(["python", "eval.py", *argv]), "settings": asdict(settings),
               "not_run": not_run, "prompts": {}, "rows": []}
    out = output_path(settings, planned)
    with workers(t5, load, devices, number) as work, one_process(TUNED / out.name):
        context = Context(settings, tokenizer, work, made_of, unit)
        work_through(context, planned, opened, t5.config, written, out)
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(f"details: {out}")
    if any(row["split"] == "test" for row in written["rows"]):
        show(written, settings, t5.config, out, argv)


def output_path(settings, planned):
    """The JSON file's path, in a folder that exists."""
    tasks = [planned[0].name] if settings.template else settings.task
    if settings.study:
        tasks = [settings.study]
    stem = "-".join([Path(settings.model).name, *tasks, *["quick"] * settings.quick])
    out = Path(settings.out or f"runs/eval/{stem}.json").with_suffix(".json")
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def work_through(context, planned, opened, config, written, out):
    """Evaluate each Plan; print and write its rows. What a stop leaves is not run; with no row at
    all KeyboardInterrupt."""
    settings, rows, stopped = context.settings, written["rows"], False
    for plan in planned:
        new = []
        if not stopped:
            new, stopped = evaluate(context, plan, candidates(opened, config, settings))
        if stopped and not new:
            written["not_run"][plan.name] = "stopped before it was done"
        if new and not rows and out.exists():           # an earlier call's results stay
            free = (out.with_suffix(f".{number}.json") for number in count(1))
            out.rename(next(path for path in free if not path.exists()))
        rows += new
        for line in result_lines(new):
            print(line)
        for name, one in opened.items():
            opens = isinstance(one, Candidate)
            written["prompts"][name] = one.about if opens else {"not_run": one}
        if rows:
            with whole_file(out) as file:
                file.write(json.dumps(written, indent=1).encode())
    if stopped:
        print("stopped: the same command resumes")
    if stopped and not rows:
        raise KeyboardInterrupt
    if not rows:
        raise InputError("none of these prompts can be run, see above")


def figure(values):
    """Mean and sample standard deviation: [60, 70, 80] -> 70.0 ± 10.0, [60] -> 60.0."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def result_lines(rows):
    """One line for each prompt of a task: accuracies, what each seed chose, the best's file."""
    for prompt in dict.fromkeys(row["prompt"] for row in rows if row["kind"] == "tuned"):
        ours = [row for row in rows if row["prompt"] == prompt]
        tests = defaultdict(list)
        for row in ours:
            if row["split"] == "test" and row["kind"] != "step":
                tests[row["target"], row["kind"]].append(row["accuracy"])
        parts = [f"{target} {kind} {figure(found)}" for (target, kind), found in tests.items()]
        chosen = [row for row in ours if row["split"] == "validation" and row["kind"] == "tuned"]
        if chosen:
            steps = [f"{row['rate']}/{row['step']}" for row in chosen]
            best = min(chosen, key=preference)
            parts += [f"rate/step {' '.join(steps)}", f"best on validation: {best['file']}"]
        yield f"{prompt}, {ours[0]['shots']} shots: {'; '.join(parts)}"


def table(written, settings, config):
    """A call's results as a Markdown table, the paper's figures under ours."""
    tests = [row for row in written["rows"] if row["split"] == "test"]
    columns = [*dict.fromkeys((row["target"], row["shots"]) for row in tests)]
    done = {*columns, *((row["task"], row["shots"]) for row in tests)}
    tested = len(columns)
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
    several = len(settings.shots) > 1
    heads = [f"{target}, {shots} shots" if several else target for target, shots in columns]
    if tested > 1 and not several:              # the mean over what was run here
        heads.append(f"mean of {tested}")
        for _, cells, means in lines:
            whole = None not in means[:tested]
            cells.append(f"{statistics.mean(means[:tested]):.1f}" if whole else "")
    texts = [["accuracy in %", *heads], ["---"] * (len(heads) + 1)]
    texts += [[title, *cells] for title, cells, _ in lines]
    return "\n".join(f"| {' | '.join(text)} |" for text in texts)


def show(written, settings, config, out, argv):
    """Print and write the table; draw the picture; say what a demonstration is not."""
    text = table(written, settings, config)
    with whole_file(out.with_suffix(".md")) as file:
        file.write(f"{text}\n".encode())
    print(f"\n{text}\n\n±: sample standard deviation (n - 1) over the seeds")
    if settings.plot:
        draw(written["rows"], settings, out.with_suffix(".png"))
        print(f"picture: {out.with_suffix('.png')}")
    if settings.quick:
        whole = [word for word in argv if word != "--quick"]
        prompts = [] if "--prompt" in argv else ["--prompt", *settings.prompt]
        print(f"A DEMONSTRATION, not the protocol: {len(settings.seeds)} seed of 5, 1 rate of 3, "
              f"{settings.epochs} epochs of 200, {settings.test_rows} test rows.\nThe protocol: "
              + shlex.join(["python", "eval.py", *whole, *prompts]))


def parse(argv):
    """Command line -> Settings, lines that say what differs from the paper's protocol, and why.
    Raises InputError for a user's mistakes."""
    given = vars(settings_parser(__doc__, [Settings], FOR_TINY).parse_args(argv))
    preset, why = STUDIES.get(given.get("study"), {}), f"--study {given.get('study')}"
    tiny = FOR_TINY if given.get("model", "tiny") == "tiny" else {}
    if given.get("quick"):
        ours = ("shipped",) if tiny else ()
        preset, why = QUICK | {"prompt": (*QUICK["prompt"], *ours)}, "--quick"
    values = {name: value for name, (value, _) in tiny.items()} | preset | given
    for name in ("task", "shots", "seeds", "rates"):        # no seed twice
        values[name] = tuple(dict.fromkeys(values.get(name, getattr(Settings, name))))
    settings = from_settings(Settings, values)
    check(settings, "data" in given)
    if not settings.predict:
        prompts = [newest_run(settings.model) if name == "newest" else name
                   for name in settings.prompt]
        settings = replace(settings, prompt=tuple(dict.fromkeys(prompts)))
    reasons = {name: reason for name, (_, reason) in tiny.items()}
    reasons |= dict.fromkeys(preset, why) | dict.fromkeys(given, "given")
    lines = defaultdict(list)
    for name, reason in reasons.items():
        value = getattr(settings, name)
        if name not in PLACES:
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            lines[reason].append(f"{name} {shown}")
    return settings, [f"{', '.join(found)}: {reason}" for reason, found in lines.items()]


def check(settings, data_given):
    """Raise InputError for what would otherwise fail late, or read another task than is meant."""
    unknown = set(settings.task) - TASKS.keys() - GROUPS.keys()
    missing = [name for name in settings.prompt
               if name not in ("newest", *NAMES) and not Path(name).exists()]
    own, words = bool(settings.template or settings.words), own_words(settings)
    complete = settings.template and len(set(words)) == len(words) > 1
    for wrong, why in (
            (unknown, f"no task {', '.join(unknown)}: there are {', '.join([*TASKS, *GROUPS])}; "
             "or your own: --data FILE --template --words"),
            (missing, f"prompt {', '.join(missing)} is missing: give RUN, newest, "
             f"{', '.join(NAMES)}"),
            (own and not complete, "a task of your own needs --template, with one <X>, and "
             "--words, two or more that differ: --template \"{text} It was <X> .\" --words "
             "terrible,great"),
            (not own and data_given and not Path(settings.data[0]).is_dir(),
             f"--data {settings.data[0]}: there is no such folder; of a task of your own give "
             "--template and --words, too")):
        if wrong:
            raise InputError(why)


if __name__ == "__main__":
    run_script(main, "stopped; what is finished is kept, the same command resumes")
