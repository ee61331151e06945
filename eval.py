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
Finished work is kept: the same command resumes. A prompt of the embedded T5 takes 15 core-minutes.
"""

import json
import math
import os
import shlex
import statistics
from collections import Counter, defaultdict, namedtuple
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch

from baselines import BASELINES, pose, tuning_gradient, with_prompt
from candidates import (NAMES, PRETRAINED, Candidate, candidates, newest_run, open_candidate,
                        plans)
from common import (InputError, fingerprint, interrupt_after, one_process, pick_device, rng,
                    run_script, whole_file)
from hub import fetch_list, model_folder, tokenizer_file
from jobs import TUNED, make_job, read_result, workers
from measure import measure, score
from own import OwnTable
from pictures import import_pyplot
from predict import predict
from report import keep_earlier, result_lines, results_file, show
from settings import from_settings, knob, settings_parser, show_settings
from studies import QUICK, STUDIES
from supmer import Method, cosine
from t5 import load_t5, model_fingerprint
from tasks import few_shot, first_rows, load_test, load_train, print_cut, task_lines
from templates import load_tokenizer


@dataclass(frozen=True)
class Settings(OwnTable):
    """The options of an evaluation, with the paper's values."""
    model: str = knob("tiny", "tiny, flan-t5-xl, ..., a hub id, or a T5's folder", first=True)
    task: tuple = knob(("movie",), "names, or groups: all (Table 1), dg (Table 2)", first=True)
    prompt: tuple = knob(("newest", "random"), "runs, prompt files (ours, tuned, PEFT's), "
                         f"newest (your last SUPMER run), or {', '.join(NAMES)}", first=True)
    study: str = knob("", "a table, figure or comparison; see studies.py", first=True,
                       choices=tuple(STUDIES))
    data: tuple = knob((os.environ.get("SUPMER_DATA") or "data",), "folder of the tasks' files; or "
                       "your own task's file, and a second one to test on", first=True)
    template: str = knob("", "of your own task: \"{text} It was <X> .\", each {} a column",
                         first=True)
    max_tokens: int = knob(256, "tokens of a text of your own task at most (ours)")
    predict: str = knob("", "only label this file's texts with one tuned --prompt", first=True)
    quick: bool = knob(False, "a demonstration: the task source, one rate, 10 steps", first=True)
    max_minutes: float = knob(0.0, "after which tuning stops; 0: never", zero=True, first=True)
    labeled: str = knob("", "folder of labeled sentiment sets, for metapt")
    prompt_length: int = knob(100, "P, vectors of the soft prompt (section 4.1)")
    shots: tuple = knob((16,), "examples per label to tune on, as many to validate on (4.1)")
    seeds: tuple = knob((10, 20, 30, 40, 50), "of examples, batches, prompts (C.1)", zero=True)
    same_examples: bool = knob(False, "the first seed's examples and batches for all seeds")
    rates: tuple = knob((0.0,), "AdamW's, to choose from; 0: each method's own (C.1)", zero=True)
    rate_scale: str = knob("absolute", "of prompts' rates: absolute (C.1), or in units of the "
                           "embedding table's RMS", choices=("absolute", "rms"))
    epochs: int = knob(200, "passes over the examples, while the rate falls linearly to 0 (C.1)")
    batch: int = knob(32, "examples of a step (C.1)")
    validate_every: int = knob(10, "steps between validations (C.1)")
    words_only: bool = knob(False, "loss over the task's label words, not the whole vocabulary")
    test_rows: int = knob(0, "rows to test on, always the same ones; 0: all", zero=True)
    predictions: bool = knob(False, "write each test row's predicted label, too")
    plot: bool = knob(False, "a PNG beside the JSON file (needs matplotlib)")
    jobs: int = knob(0, "processes; 0: one for each GPU or core", zero=True)
    dtype: str = knob("float32", "of the frozen T5", choices=("float32", "bfloat16"))
    device: str = knob("auto", "auto (all GPUs if there are any), cpu, cuda, cuda:1, ...")
    out: str = knob("", "file of predictions, or of results [runs/eval/<model>-<task>.json]")

    @property
    def over_steps(self):
        """Whether each validation's state is tested, too: for a picture over steps."""
        return self.study == "steps" or self.quick and self.plot


# What the embedded T5 needs instead of the paper's numbers, and why.
FOR_TINY = {"prompt_length": (20, "100 vectors would outnumber the tokens of its texts"),
            "rate_scale": ("rms", "its embeddings are small, see tiny/README.md")}
CODE = ("eval", "baselines", "prompts", "released", "supmer", "measure", "tasks", "tables", "data",
        "templates", "t5", "onednn", "common")                          # results depend on it


# ------------------------------------------------------------------------------ one tuning run

Tuning = namedtuple("Tuning", "epochs batch validate_every words_only")      # of the Settings


def batch_rows(n, step, seed, size):
    """A step's rows, steps counted from 0: each epoch is a permutation of n rows, cut into batches.
    A pure function. n 5, size 2: steps 0, 1, 2 -> for example [3, 0], [4, 1], [2]"""
    epoch, place = divmod(step, math.ceil(n / size))
    order = rng(seed, epoch, 0, "batches").permutation(n)
    return order[place * size:(place + 1) * size].tolist()


def preference(validation):
    """A sort key, lowest first: best accuracy, lowest loss, earliest step, smallest rate."""
    return -validation["accuracy"], validation["loss"], validation["step"], validation["rate"]


def tune(t5, baseline, start, psi, sample, seed, rate, tuning, unit=1.0):
    """Tune at one rate. Yields at each validation its record and {name: tensor} to keep, which is
    valid until the next step.

    A step: the gradient g of a batch (Eq. 1) -> psi(g, H) (Eq. 5; phi frozen, the gate's H from
    that batch; psi None: g itself) -> norm clipped -> AdamW, whose rate falls linearly to 0.
    baseline: a name of BASELINES. start: t5 -> parameters, which count as step 0. sample: training
    and validation Examples. unit: a prompt's rate is in units of it. Raises InputError for a loss
    that is not finite; a gradient that is not finite shows in the next loss.
    """
    examples, held_out = sample
    method = Method(words_only=tuning.words_only)
    baseline, n = BASELINES[baseline], len(examples.ids)
    parameters, psi_cosine = {name: x.clone() for name, x in start(t5).items()}, None
    steps = tuning.epochs * math.ceil(n / tuning.batch)
    optimizer = torch.optim.AdamW(parameters.values(), eps=1e-8, weight_decay=0.0)
    largest_rate = rate * unit if baseline.model is with_prompt else rate
    for step in range(steps + 1):
        if step % tuning.validate_every == 0 or step == steps:
            kept = baseline.fold(t5, parameters)
            scores = score(*baseline.model(t5, kept), held_out, method)
            loss, accuracy = loss_and_accuracy(scores, held_out.labels, tuning.words_only)
            if not math.isfinite(loss):
                raise InputError(f"the loss is {loss} at step {step}, rate {rate}, seed {seed}: "
                                 "try smaller --rates")
            yield {"rate": rate, "step": step, "loss": loss, "accuracy": accuracy,
                   "psi_cosine": psi_cosine}, kept
        if step < steps:
            batch = select(examples, batch_rows(n, step, seed, tuning.batch))
            gradient, H = tuning_gradient(t5, baseline, parameters, batch, method)
            for name, x in parameters.items():
                x.grad = psi(gradient[name], H) if psi else gradient[name]
                psi_cosine = float(cosine(x.grad, gradient[name])) if psi else None
            torch.nn.utils.clip_grad_norm_(parameters.values(), method.clip)
            optimizer.param_groups[0]["lr"] = largest_rate * (1 - step / steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def loss_and_accuracy(scores, labels, words_only):
    """Log-probabilities of the label words (n, K), labels (n,) -> mean loss, accuracy in %."""
    found = measure(scores, labels)
    return found["word_loss" if words_only else "loss"], 100 * found["correct"] / len(labels)


def select(examples, rows):
    """The Examples of these rows."""
    return examples._replace(
        ids=[examples.ids[row] for row in rows],
        slots=[examples.slots[row] for row in rows],
        vectors=examples.vectors[rows],
        labels=examples.labels[rows])


def tune_job(t5, baseline, start, psi, sample, seed, rate, tuning, unit, all_steps, about):
    """tune() -> {name: tensor} of its best validation, with all_steps also of each as "step:name";
    the validations, and about: what a reader of the file needs to use it."""
    device = t5.weights["shared.weight"].device
    if psi:
        psi = partial(psi.func, {name: x.to(device) for name, x in psi.args[0].items()})
    records, best, every = [], {}, {}
    for record, kept in tune(t5, baseline, start, psi, sample, seed, rate, tuning, unit):
        records.append(record)
        copied = {name: x.cpu().clone().contiguous() for name, x in kept.items()}
        if min(records, key=preference) is record:
            best = copied
        if all_steps:
            every |= {f"{record['step']}:{name}": x.clone() for name, x in copied.items()}
    return best | every, {"validations": records, "baseline": baseline, **about}


def score_job(t5, baseline, kept, examples):
    """score() of what tune() kept, or of a start -> {"scores": log p of each label word (n, K)}."""
    device = t5.weights["shared.weight"].device
    kept = kept(t5) if callable(kept) else {name: x.to(device) for name, x in kept.items()}
    return {"scores": score(*BASELINES[baseline].model(t5, kept), examples, Method()).cpu()}, {}


# ------------------------------------------------------------- the protocol: a task, tuned, tested

Sample = namedtuple("Sample", "seed train held_out")        # rows of a task's training file
# What all tasks of a call share. config: the T5's; work: of jobs.workers(); made_of: what every
# result depends on; unit: of a prompt's rates.
Context = namedtuple("Context", "settings config tokenizer work made_of unit")


def evaluate(context, plan, groups):
    """Tune every Candidate, then open the test files -> rows, whether Ctrl-C stopped the tuning.
    Candidates that are tuned by then are tested."""
    samples, stopped = draw_samples(context, plan), False
    planned, tuned, rows = [], [], []
    try:
        for group in groups:
            new = [(one, tuning_jobs(context, plan, one, samples)) for one in group]
            planned += new
            jobs = [job for _, some in new for job in some.values()]
            context.work(jobs, f"tune {plan.name}")
    except KeyboardInterrupt:
        stopped = True
    for candidate, some in planned:
        if all(job.path.is_file() for job in some.values()):
            tuned.append(candidate)
            rows += tuning_rows(context, plan, candidate, some, samples)
    chosen = {(row["prompt"], row["seed"]): row for row in rows if row["kind"] == "tuned"}
    for target in plan.targets if tuned else ():
        rows += evaluate_target(context, plan, target, tuned, chosen, samples)
    return rows, stopped


def draw_samples(context, plan):
    """A Sample for each seed; of the files only the training one is opened. What is learned is
    printed: each label's word, and one source."""
    settings, task, samples = context.settings, plan.task, []
    rows = load_train(task, plan.folder, print)
    print("\n".join([f"{plan.name}:", *task_lines(context.tokenizer, task, rows)]))
    for seed in settings.seeds:
        seed = settings.seeds[0] if settings.same_examples else seed
        parts = few_shot(rows, plan.shots, seed, len(task.words), task.labels)
        samples.append(Sample(seed, *parts))
    fewest = min(Counter(row.label for row in samples[0].train).values())
    if fewest < plan.shots:
        print(f"{plan.name}: a label has only {fewest} examples, and as many for validation")
    print_cut(context.tokenizer, plan.name, task, samples[0].train + samples[0].held_out)
    return samples


def tuning_jobs(context, plan, candidate, samples):
    """-> {(seed, rate): the Job that tunes}; none where there is nothing to tune."""
    settings, baseline = context.settings, BASELINES[candidate.baseline]
    rates = baseline.rates                      # (): nothing is tuned
    if rates and any(settings.rates):
        rates = settings.rates
    about = {"task": plan.task._asdict(), "model": settings.model,
             "model_sha256": context.made_of["model"]}
    tuning = Tuning(*(getattr(settings, name) for name in Tuning._fields))
    jobs = {}
    for seed, sample, start in zip(settings.seeds, samples, candidate.starts):
        posed = [baseline.pose(context.tokenizer, plan.name, plan.task, part, (), 0)[0]
                 for part in (sample.train, sample.held_out)]
        for rate in rates:
            name = f"{plan.name}-{candidate.name}-{plan.shots}-{seed}-{rate}"
            jobs[seed, rate] = make_job(
                context.made_of, name, tune_job, baseline=candidate.baseline, start=start,
                psi=candidate.psi, sample=posed, seed=sample.seed, rate=rate, unit=context.unit,
                about=about, tuning=tuning, all_steps=settings.over_steps)
    return jobs


def tuning_rows(context, plan, candidate, jobs, samples):
    """A row for each validation of finished Jobs; each seed's choice has the "kind" tuned."""
    row = {"task": plan.name, "target": plan.name, "shots": plan.shots, "prompt": candidate.name,
           "split": "validation", "kind": "step", "examples": len(samples[0].train)}
    rows = []
    for (seed, _), job in jobs.items():
        _, result = read_result(job.path, tensors=False)
        rows += [{**row, "seed": seed, **record, "file": str(job.path)}
                 for record in result["validations"]]
    for seed in {row["seed"] for row in rows}:
        validations = (row for row in rows if row["seed"] == seed)
        best = min(validations, key=preference)
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
    print_cut(context.tokenizer, f"{target}, test", plan.targets[target], rows)
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
    kept = defaultdict(dict)
    for key, x in read_result(row["file"])[0].items():
        step, _, name = key.rpartition(":")
        kept[int(step or row["step"])][name] = x
    return dict(sorted(kept.items()))


# ------------------------------------------------------------------------------------ the script

def parse(argv):
    """Command line -> Settings, {name of one that is not the paper's: why}."""
    given = vars(settings_parser(__doc__, [Settings], FOR_TINY).parse_args(argv))
    tiny = FOR_TINY if given.get("model", "tiny") == "tiny" else {}
    study = given.get("study", "")
    preset, why = STUDIES.get(study, {}), f"--study {study}"
    if given.get("quick"):
        preset, why = QUICK, "--quick"
        if not tiny:
            preset = QUICK | {"prompt": ("newest", "vocab", "random")}
    values = {name: value for name, (value, _) in tiny.items()} | preset | given
    whys = {name: why for name, (_, why) in tiny.items()}
    whys |= dict.fromkeys(preset, why) | dict.fromkeys(given, "given")
    settings = from_settings(Settings, values)
    prompts = (newest_run(settings.model) if name == "newest" else name for name in settings.prompt)
    return replace(settings, prompt=tuple(dict.fromkeys(prompts))), whys


def main(argv):
    """Show the changed settings, then tune and test the prompts on each task; print the table."""
    settings, whys = parse(argv)
    if settings.predict:
        return predict(settings)
    show_settings([settings], whys)
    if settings.plot:
        import_pyplot()                         # now, not after hours
    interrupt_after(settings.max_minutes)
    device = pick_device(settings.device)       # before anything is fetched
    planned, not_run = plans(settings)
    for line in fetch_list(settings.model):
        print(line)
    folder = model_folder(settings.model)
    load = partial(load_t5, folder, getattr(torch, settings.dtype))
    code = fingerprint(Path(__file__).with_name(f"{name}.py") for name in CODE)
    made_of = {"model": model_fingerprint(folder), "dtype": settings.dtype, "device": device.type,
               "torch": torch.__version__, "code": code}
    out = results_file(settings, planned)
    written = {"command": shlex.join(["python", "eval.py", *argv]), "settings": asdict(settings),
               "not_run": not_run, "prompts": {}, "rows": []}
    with workers(load, settings.device, settings.jobs) as (t5, work):
        tokenizer = load_tokenizer(tokenizer_file(folder), t5.config)
        ready = [name for name in settings.prompt if name not in PRETRAINED]
        opened = {name: open_candidate(name, t5.config, settings) for name in ready}
        unit = 1.0
        if settings.rate_scale == "rms":
            table = t5.weights["shared.weight"].float().cpu()
            unit = float(table.square().mean().sqrt())
        context = Context(settings, t5.config, tokenizer, work, made_of, unit)
        with one_process(TUNED / out.name):
            work_through(context, planned, opened, written, out)
    interrupt_after(0)
    print(f"details: {out}")
    if any(row["split"] == "test" for row in written["rows"]):
        show(written, settings, t5.config, out)


def work_through(context, planned, opened, written, out):
    """Evaluate each Plan; print and write its rows. KeyboardInterrupt if a stop left no row."""
    for plan in planned:
        groups = candidates(opened, context.config, context.settings)
        rows, stopped = evaluate(context, plan, groups)
        if rows and not written["rows"]:
            keep_earlier(out)
        written["rows"] += rows
        for name, one in opened.items():
            about = one.about if isinstance(one, Candidate) else {"not_run": one}
            written["prompts"][name] = about
        if stopped:
            done = {(row["task"], row["shots"]) for row in written["rows"]}
            written["not_run"] |= {one.name: "stopped before it was done" for one in planned
                                   if (one.name, one.shots) not in done}
        for line in result_lines(rows, preference):
            print(line)
        if written["rows"]:
            with whole_file(out) as file:
                file.write(json.dumps(written, indent=1).encode())
        if stopped:
            print("stopped: the same command resumes")
            break
    if not written["rows"]:
        raise KeyboardInterrupt if stopped else InputError("no prompt can be run, see above")


if __name__ == "__main__":
    run_script(main, "stopped; what is finished is kept, the same command resumes")
