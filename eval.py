"""Few-shot prompt tuning: T5 stays frozen, a soft prompt learns from 16 examples per label (C.1).

    python eval.py --task movie             # the newest finished run beside a random prompt
    python eval.py --task all --data FOLDER --prompt released random vocab      # Table 1
    python eval.py --study dg               # Table 2; also steps, shots, spread: Fig. 3, 4, 1a
    python eval.py --data my.csv --template "{text} It was <X> ." --words terrible,great
    python eval.py --predict new.txt --prompt runs/eval/tuned/NAME.safetensors > labels.csv
    python eval.py --quick                  # a demonstration of about a minute, NOT the protocol
    python eval.py --study comparison       # every method of the paper; ablation: Table 4

Prints the settings with their sources, a bar (on stderr) and a Markdown table; every seed, rate,
validation and choice goes to runs/eval/<model>-<task>.json. With the embedded T5 a prompt takes 5
seeds x 3 rates x 200 steps, some 15 minutes on one core. Validation examples choose rate and step;
a test file is opened when all tuning of its task is done. What is finished is kept in
runs/eval/tuned and not done again: the same command goes on where it was stopped.
"""

import contextlib
import csv
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import statistics
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from baselines import (BASELINES, ft_memory, given_prompt, normal_prompt, pose, tuning_gradient,
    with_prompt)
from common import (GIB, InputError, LONGEST, TINY, atomic_write, check_knob, fingerprint, knob, knob_parser,
    lock, option, pick_device, read_run, run_script, sweep)
from data import load_tokenizer, template_fields
from hub import RELEASED, fetch_list, model_folder, released_folder, tokenizer_file
from prompts import load_prompt
from studies import PRETRAINED, STUDIES, compared_folder, draw, import_pyplot, pretrained_run
from supmer import Method, REGULARIZERS, cosine, measure, score
from t5 import load_t5, model_fingerprint, read_config, weight_files
from tasks import (FORMATS, GROUPS, LabeledTask, TASKS, few_shot, load_test, load_texts, load_train, locate)


@dataclass(frozen=True)
class Settings:
    """What an evaluation is made of, with the paper's values; the command line is made from it."""
    model: str = knob("tiny", "tiny, a short name such as flan-t5-xl, a hub id, or a T5's folder")
    task: tuple = knob(("movie",), f"one or several of {', '.join(TASKS)}; all: the first twelve "
                       "(Table 1); dg: tuned on airlines, tested on the six domains (Table 2)")
    study: str = knob("", "steps (Fig. 3), shots (Fig. 4), dg (Table 2), spread (Fig. 1a), "
                      "comparison (every method), ablation (Table 4, and first-order), evidence "
                      "(README): sets what it needs, unless that is given")
    data: tuple = knob((os.environ.get("SUPMER_DATA") or "data",), "folder with the tasks' files "
                       "or archives, what is missing is fetched into cache/data; for a task of "
                       "your own its file, .csv, .tsv, .jsonl, .txt, and one to test on (or its "
                       "rows that are not sampled)")
    template: str = knob("", "of your own task: \"{text} It was <X> .\"; a file without a header "
                         "has the label first, then the template's texts")
    words: str = knob("", "of your own task, by label 0, 1, ...: terrible,great")
    prompt: tuple = knob(("newest", "random"), "RUN (its folder or prompt.safetensors), a folder "
                         "of PEFT's or with the authors' files, released (tiny's, or the authors' "
                         "for t5-base and flan-t5-xl), random, vocab, or newest: this model's last "
                         "finished run; without one, released; what has no prompt to start from: "
                         "prefix-tuning, p-tuning-v2, ft, zero-shot, few-shot; or what train.py "
                         f"makes, and is called for if there is none: {', '.join(PRETRAINED)}")
    predict: str = knob("", "only label this file's texts with one tuned --prompt; to --out or "
                        "stdout, with probabilities")
    labeled: str = knob("", "folder of labeled sentiment sets, for metapt; see train.py --labeled")
    prompt_length: int = knob(100, "P, vectors of the soft prompt (section 4.1)", most=LONGEST)
    shots: tuple = knob((16,), "examples per label to tune on, as many to validate on (4.1)")
    seeds: tuple = knob((10, 20, 30, 40, 50), "of the examples, batches and random prompts (C.1)",
                        zero=True)
    same_examples: bool = knob(False, "the first seed's examples and batches for all seeds: only "
                               "the random prompts differ")
    rates: tuple = knob((0.0,), "AdamW's rates to choose from; 0: each method's own, for "
                        "prompts 0.1 0.2 0.3, for ft 1e-5 2e-5 3e-5 (C.1)", zero=True)
    rate_scale: str = knob("absolute", "of prompts' rates: absolute (C.1), or rms: x RMS of the "
                           "embedding table")
    epochs: int = knob(200, "passes over the examples, while the rate falls linearly to 0 (C.1)")
    batch: int = knob(32, "examples of a step (C.1)")
    validate_every: int = knob(10, "steps between validations (C.1)")
    words_only: bool = knob(False, "loss over the task's label words, not the whole vocabulary")
    test_rows: int = knob(0, "test on so many rows only, always the same ones; 0: on all",
                         zero=True)
    predictions: bool = knob(False, "each test row's predictions into the JSON file as well")
    max_minutes: float = knob(0.0, "stop so many minutes from now; what is not done is \"not "
                              "run\", the same command goes on; 0: never", zero=True)
    plot: bool = knob(False, "a PNG beside the JSON file (needs matplotlib)")
    jobs: int = knob(0, "processes of 1 thread each, whose number changes no result; 0: one for "
                     "each GPU or core, as far as memory goes", zero=True, most=1000)
    dtype: str = knob("float32", "of the frozen T5: float32 or bfloat16; prompts are float32")
    device: str = knob("auto", "auto, cpu, cuda, cuda:1, ...; auto takes all GPUs if there are any")
    out: str = knob("", "the JSON file, instead of runs/eval/<model>-<task>.json")


# What the embedded T5 needs instead of the paper's numbers, and why.
FOR_TINY = {"prompt_length": (20, "its texts have some 30 tokens: 100 vectors would outnumber them"),
            "rate_scale": ("rms", "its embeddings are small, see tiny/README.md")}
QUICK = {"prompt": ("random", "vocab", "newest", "released"), "task": ("movie",), "seeds": (10,),
         "rates": (0.2,), "epochs": 60, "test_rows": 300}
TUNED = Path("runs/eval/tuned")


# -------------------------------------------------------------------------------- tuning (C.1)

class Tuning(NamedTuple):
    """The Settings of one tuning run."""
    epochs: int
    batch: int
    validate_every: int
    words_only: bool


def batch_rows(n, step, seed, size):
    """A step's rows, steps counted from 0: each epoch is a permutation of n rows, cut into batches.
    A pure function. n 5, size 2: steps 0, 1, 2 -> for example [3, 0], [4, 1], [2]"""
    epoch, place = divmod(step, math.ceil(n / size))
    order = np.random.default_rng((seed, epoch, 0, 11)).permutation(n)
    return order[place * size:(place + 1) * size].tolist()


def rank(validation):
    """What is lowest is chosen: best accuracy, lowest loss, earliest step, smallest rate."""
    return -validation["accuracy"], validation["loss"], validation["step"], validation["rate"]


def tune(t5, baseline, start, psi, sample, seed, rate, settings, unit=1.0):
    """Tune at one rate -> at each validation its record and what is kept, {name: tensor}, good
    until the next step. A prompt's record has how far it has moved from its start, as a share of
    that, and cos(psi(g), g) of the last step.

    A step: the gradient g of a batch (Eq. 1) -> psi(g, H) (Eq. 5; phi frozen, the gate's H from
    that batch; psi None: g itself) -> norm clipped -> AdamW, whose rate falls linearly to 0.
    baseline: one of BASELINES. start: t5 -> parameters; they count as step 0. sample: (training,
    validation) Examples. rate is in units of unit, for a prompt. settings: a Tuning. InputError: a
    loss is not finite (a gradient that was not shows in the next validation at the latest).
    """
    (examples, held_out), method = sample, Method(words_only=settings.words_only)
    baseline, n = BASELINES[baseline], len(examples.ids)
    parameters = {name: x.clone() for name, x in start(t5).items()}
    theta, cosine_psi = parameters.get("theta"), None
    steps = settings.epochs * math.ceil(n / settings.batch)
    begun = theta.clone() if theta is not None else None
    optimizer = torch.optim.AdamW(parameters.values(), eps=1e-8, weight_decay=0.0)
    for step in range(steps + 1):
        if step % settings.validate_every == 0 or step == steps:
            kept = baseline.fold(t5, parameters)
            found = measure(score(*baseline.model(t5, kept), held_out, method), held_out.labels)
            loss = found["word_loss" if method.words_only else "loss"]
            if not math.isfinite(loss):
                raise InputError(f"the loss is {loss} at step {step}, rate {rate}, seed {seed}: "
                                 "try smaller --rates")
            moved = float((theta - begun).norm() / begun.norm()) if theta is not None else None
            yield {"rate": rate, "step": step, "loss": loss, "moved": moved,
                   "psi_cosine": cosine_psi,
                   "accuracy": 100 * found["correct"] / len(held_out.ids)}, kept
        if step < steps:
            rows = batch_rows(n, step, seed, settings.batch)
            batch = examples._replace(
                ids=[examples.ids[row] for row in rows], vectors=examples.vectors[rows],
                slots=[examples.slots[row] for row in rows], labels=examples.labels[rows])
            gradient, H = tuning_gradient(t5, baseline, parameters, batch, method)
            for name, x in parameters.items():
                x.grad = psi(gradient[name], H) if psi else gradient[name]
            cosine_psi = float(cosine(theta.grad, gradient["theta"])) if psi else None
            torch.nn.utils.clip_grad_norm_(parameters.values(), method.clip)
            optimizer.param_groups[0]["lr"] = rate * (1 - step / steps) * (
                unit if baseline.model is with_prompt else 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


# ------------------------------------------------------------- the protocol: a task, tuned, tested

class Plan(NamedTuple):
    """What is tuned on one task and tested on one or several."""
    name: str
    task: LabeledTask
    targets: dict[str, LabeledTask]     # their test sets
    folder: str


class Candidate(NamedTuple):
    """What is compared: a way to use the few examples, and where it starts."""
    name: str
    baseline: str               # one of BASELINES
    starts: list[Callable]      # for each seed t5 -> parameters to start from, {name: tensor}
    psi: Callable | None        # a learned prompt's regularizer (g, H) -> g; None for the others
    about: dict                 # a learned prompt's file and its metadata


class Context(NamedTuple):
    """What all tasks of a call share."""
    settings: Settings
    tokenizer: object
    work: Callable          # of workers()
    processes: int          # that it has
    made_of: dict           # what every result depends on
    unit: float             # of the rates
    ends: float             # when --max-minutes are over, by time.monotonic(); or inf


class Sample(NamedTuple):
    """What a seed has drawn of a task's training file."""
    seed: int
    train: list             # of Rows
    held_out: list


def evaluate(context, shots, plan, take, record):
    """Tune on a plan's task, then test, and record() its part of the JSON file.
    take(name of a --prompt) -> its Candidate or None, called when it is its turn. Ctrl-C, and the
    end of --max-minutes, which is one, end tuning: what is tuned by then is tested, and the
    KeyboardInterrupt raised again."""
    began, tuned, samples = time.perf_counter(), [], draw_samples(context, plan, shots)
    stopped = None
    try:
        for one in map(take, context.settings.prompt):
            seconds = context.ends - time.monotonic()       # until SIGALRM
            signal.setitimer(signal.ITIMER_REAL, min(max(seconds, 1e-3), 1e9))
            if one:
                tuned.append((one, *tune_task(context, plan, one, samples, shots)))
    except KeyboardInterrupt as stop:
        stopped = stop
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if tuned:
        tested = time.perf_counter()
        tests = {name: test_task(context, name, task, plan.folder, tuned, samples)
                 for name, task in plan.targets.items()}
        ended = time.perf_counter()
        record({"task": plan.name, "shots": shots, "examples": len(samples[0].train),
                "tuning": {one.name: records for one, records, _ in tuned},
                "test": {name: test for name, test in tests.items() if test},
                "test_seconds": ended - tested, "minutes": (ended - began) / 60,
                "processes": context.processes})
    if stopped:
        raise stopped


def draw_samples(context, plan, shots):
    """A Sample for each seed; of the files only the training one is opened."""
    settings, task = context.settings, plan.task
    rows = load_train(task, plan.folder, print)
    seeds = [settings.seeds[0] if settings.same_examples else seed for seed in settings.seeds]
    try:
        samples = [Sample(seed, *few_shot(rows, shots, seed, len(task.words))) for seed in seeds]
    except InputError as error:
        raise InputError(f"{task.train}: {error}") from None
    labels = Counter(row.label for row in samples[0].train)
    counts = [labels[k] for k in range(len(task.words))]
    if min(counts) < shots:
        print(f"{plan.name}: {counts} examples by label instead of {shots}, as many for "
              "validation: smaller classes give half to each")
    return samples


def rates_of(settings, baseline):
    """The rates to choose from: --rates, or the Baseline's own."""
    return settings.rates if any(settings.rates) else baseline.rates


def tune_task(context, plan, candidate, samples, shots):
    """Tune a candidate with each seed's sample at each rate; no file is opened. -> [a seed's record
    for the JSON file], none if nothing is tuned; [what a seed keeps to be tested, {"tuned": {name:
    tensor} of the best step}, with --study steps also each validation's, {its step: ..}]"""
    settings, task, baseline = context.settings, plan.task, BASELINES[candidate.baseline]
    if not baseline.rates:
        return [], [{"tuned": {}}] * len(samples)
    about = {"task": task._asdict(), "model": settings.model,
             "model_sha256": context.made_of["model"]}
    tuning, jobs = Tuning(*(getattr(settings, name) for name in Tuning._fields)), []
    for seed, sample, start in zip(settings.seeds, samples, candidate.starts):
        parts = [baseline.pose(context.tokenizer, plan.name, task, part, (), 0)[0]
                 for part in (sample.train, sample.held_out)]
        jobs.append([make_job(
            context.made_of, f"{plan.name}-{candidate.name}-{shots}-{seed}-{rate}", tune_job,
            baseline=candidate.baseline, start=start, psi=candidate.psi, sample=parts,
            seed=sample.seed, rate=rate, tuning=tuning, unit=context.unit,
            all_steps=settings.study == "steps", about=about)
            for rate in rates_of(settings, baseline)])
    context.work(sum(jobs, []), f"tune {plan.name}")
    records, kept = [], []
    for seed, sample, of_rates in zip(settings.seeds, samples, jobs):
        found = {job.path: read_result(job.path, tensors=False)[1] for job in of_rates}
        path = min(found, key=lambda path: rank(found[path]["best"]))
        records.append({
            "seed": seed, "examples": len(sample.train), "best": found[path]["best"],
            "file": str(path), "validations": [result["validations"] for result in found.values()],
            "time": {"seconds": sum(result["time"]["seconds"] for result in found.values())}})
        kept.append({})
        for key, x in read_result(path)[0].items():
            step, _, name = key.rpartition(":")
            kept[-1].setdefault(int(step) if step else "tuned", {})[name] = x
    return records, kept


def test_task(context, name, task, folder, tuned, samples):
    """Open a test file, score every kept choice once, and the untuned -> for the JSON, in %. Rows
    with a text that a seed has sampled do not count for that seed; None if no others are left.
    --test-rows takes always the same: the first by sha256 of their text. tuned: [(Candidate,
    records, kept)], see tune_task."""
    settings, rows = context.settings, load_test(task, folder, print)
    of, counted = len(rows), []
    if settings.test_rows:
        rows = sorted(rows, key=lambda row: hashlib.sha256(
            "\t".join(row.fields.values()).encode()).digest())[:settings.test_rows]
    labels = torch.tensor([row.label for row in rows])
    for sample in samples:
        texts = {tuple(row.fields.values()) for row in sample.train + sample.held_out}
        counted.append(torch.tensor([tuple(row.fields.values()) not in texts for row in rows]))
    left_out = [int((~k).sum()) for k in counted]
    if any(left_out):
        print(f"{name}: {left_out} test rows, by seed, are left out: they were sampled")
    if max(left_out) == len(rows):
        print(f"{name}: none is left: it is tuned, not tested")
        return None
    chosen = predicted_labels(context, name, task, rows, tuned, samples)

    def accuracy(predicted, i):
        return 100 * float((predicted == labels)[counted[i]].float().mean())

    def usual(predicted):               # over the seeds, whose rows differ where some are left out
        return statistics.mean(accuracy(predicted, i) for i in range(len(samples)))
    results = {}
    for candidate, *_ in tuned:
        of_seeds = [chosen[candidate.name, i] for i in range(len(samples))]
        found = [{what: accuracy(first, i) for what, (first, *_) in of_seed.items()}
                 for i, of_seed in enumerate(of_seeds)]
        best, orders = [one.pop("tuned") for one in found], of_seeds[0]["tuned"]
        untuned = [one.pop("untuned") for one in found if "untuned" in one]
        results[candidate.name] = result = {
            "tuned": best, "mean": statistics.mean(best),
            "sample_std": statistics.stdev(best) if len(best) > 1 else None}
        if untuned:                     # a learned prompt is one for all seeds
            result["untuned"] = [statistics.mean(untuned)] if candidate.about else untuned
        if len(orders) > 1:
            result["orders"] = [accuracy(one, 0) for one in orders]
        if settings.study == "steps":
            result["steps"] = [[one[step] for step in sorted(one)] for one in found]
        if settings.predictions:
            result["predictions"] = [of_seed["tuned"][0].tolist() for of_seed in of_seeds]
    return {"rows": len(rows), "of": of, "left_out": left_out, "prompts": results,
            "majority": usual(labels.bincount().argmax().expand(len(rows))),
            "no_prompt": usual(chosen["", 0]["untuned"][0]),
            **({"labels": labels.tolist()} if settings.predictions else {})}


def predicted_labels(context, name, task, rows, tuned, samples):
    """Score test rows -> {(candidate's name, i): what seed i predicts}, each {what it keeps, or
    "untuned" where a prompt starts: [labels (n,), one an order of the demonstrations]}; ("", 0) has
    "untuned" alone: no prompt."""
    @cache
    def posed(how, i):
        several = how(context.tokenizer, name, task, rows, samples[i].train, samples[i].seed)
        return several[:1] if i else several    # one seed shows what the demonstrations' order does

    def score_jobs(baseline, kept, posed):
        return [make_job(context.made_of, f"{name}-scores", score_job, baseline=baseline,
                         kept=kept, examples=examples) for examples in posed]
    jobs = {("", 0): {"untuned": score_jobs("zero-shot", {}, posed(pose, 0))}}
    for candidate, _, kept in tuned:
        baseline = BASELINES[candidate.baseline]
        for i, choices in enumerate(kept):
            shown = posed(baseline.pose, 0 if baseline.rates else i)    # tuned: the same for all
            if baseline.model is with_prompt:
                choices = {"untuned": candidate.starts[i], **choices}
            jobs[candidate.name, i] = {what: score_jobs(candidate.baseline, x, shown)
                                       for what, x in choices.items()}
    context.work([job for of_seed in jobs.values() for job in chain(*of_seed.values())],
                 f"test {name}")
    return {key: {what: [read_result(job.path)[0]["scores"].argmax(-1) for job in several]
                  for what, several in of_seed.items()} for key, of_seed in jobs.items()}


def plans(settings):
    """The tasks to run, their files looked for and fetched -> [Plan], {task not run: why}.
    InputError if a task that was named itself cannot be had; those of `all` and `dg` may be
    absent."""
    if settings.template:
        name, test = Path(settings.data[0]).stem, settings.data[-1]
        task = LabeledTask(settings.data[0], test, settings.template, own_words(settings), 256)
        return [Plan(name, task, {name: task}, ".")], {}
    found, absent, folder = {}, {}, settings.data[0]
    for group in settings.task:
        targets = {}
        for name in GROUPS.get(group, (group,)):
            try:
                if group != "dg" or name == "airlines":
                    locate(TASKS[name], "train", folder)
                locate(TASKS[name], "test", folder)
                targets[name] = TASKS[name]
            except InputError as error:
                if group not in GROUPS or name == "airlines":
                    raise
                absent[name] = str(error)
        found |= {"dg": Plan("dg", TASKS["airlines"], targets, folder)} if group == "dg" else {
            name: Plan(name, task, {name: task}, folder) for name, task in targets.items()}
    return [*found.values()], absent


# -------------------------------------------------------------------- candidates: what is compared

def newest_run(model):
    """The folder of this model's run under runs/ that finished last, of SUPMER with all its parts;
    "released" without one, where that is at hand without a run of ours. InputError for other
    models."""
    name, ended = Path(model).name, []
    for path in Path("runs").glob("*/run.json"):
        run = read_run(path.parent)
        ours = run.get("name") == "supmer" and Path(run.get("model", "")).name == name
        if run["finished"] and ours:
            ended.append((run["ended"], str(path.parent)))
    if ended:
        return max(ended)[1]
    if name in ("tiny", "t5-base", "flan-t5-xl"):
        return "released"
    raise InputError(f"runs/ has no finished run of {model}: make one (python train.py), or "
                     "give --prompt RUN|released|random|vocab")


def belongs(about, config, model):
    """Whether a prompt's metadata is of this model. PEFT's says nothing that could be checked."""
    if about["regularizer"] == "affine" or "model_sha256" in about:
        return about.get("model_sha256") == model_fingerprint(model_folder(model))
    shape = (config.d_model, config.d_ff)
    return about["regularizer"] != "released" or RELEASED.get(shape) == about["model"]


def open_candidate(name, config, settings, ends=math.inf):
    """random, vocab, ft, .., released, RUN -> Candidate; see pretrained_run. InputError unless a
    learned prompt is of this model, of this T5Config, and of this length."""
    P, model = settings.prompt_length, settings.model
    if name in BASELINES and BASELINES[name].start:
        start, length = BASELINES[name].start, BASELINES[name].length or P
        return Candidate(name, name, [partial(start, seed=seed, length=length)
                                      for seed in settings.seeds], None, {})
    path = Path(pretrained_run(name, settings, ends) if name in PRETRAINED else name)
    if name == "released":
        path = TINY if model == "tiny" else released_folder(config)
    theta, phi, about = load_prompt(path, config.d_model)
    if not belongs(about, config, model):
        raise InputError(f"{path} was learned on another {about.get('model')} than {model} is now:"
                         " take a prompt of this model")
    if len(theta) != P:
        raise InputError(f"{path} has {len(theta)} vectors, not {P}: --prompt-length {len(theta)}?")
    psi = phi and partial(REGULARIZERS[about["regularizer"]].psi, phi)
    baseline = "unified" if about.get("method") == "unified-ppt" else "learned"
    return Candidate(name, baseline, [partial(given_prompt, theta=theta)] * len(settings.seeds),
                     psi, {"file": str(path), **about})


def take_up(name, config, settings, ends, about):
    """open_candidate(), told; None, and why in about, if what a study must pre-train is refused.
    about: {name: its metadata, or why it was not run}, gets this name's."""
    try:
        candidate = open_candidate(name, config, settings, ends)
    except InputError as error:
        if not settings.study or name not in PRETRAINED:
            raise
        about[name] = {"not_run": str(error)}
        print(f"{name}: not run; {error}")
        return None
    about[name] = candidate.about
    if candidate.about:
        print("\n    ".join([name, *map(" ".join, sorted(candidate.about.items()))]))
    return candidate


# ------------------------------------------------------------------------ independent work, shared
# Nothing of the encoder's work can be kept from one step to the next: the prompt stands in front,
# and everything attends to it. Shared are tokenization, and whatever is equal: the scores of an
# untuned prompt that is one for all seeds, runs that an earlier call has done. Not shared: step 0's
# validation, equal for all rates; it is 1 of some 600 forward passes of a run.

WORKER = {}     # in a worker process: its T5


class Job(NamedTuple):
    """Work that needs nothing but the T5 and its arguments. Equal jobs have equal paths."""
    path: Path              # of its result; the name ends in a hash of all that it depends on
    function: Callable      # (t5, **arguments) -> {name: tensor}, {name: for JSON}
    arguments: dict


def make_job(made_of, name, function, **arguments):
    """A Job whose path depends on made_of (model, code, ...), the function and its arguments."""
    def content(x):
        if isinstance(x, partial):
            return [x.func.__name__, x.args, x.keywords]
        x = x.detach().cpu().contiguous()
        return [str(x.dtype), list(x.shape), hashlib.sha256(x.numpy().tobytes()).hexdigest()]
    whole = json.dumps([made_of, function.__name__, arguments], sort_keys=True, default=content)
    key = hashlib.sha256(whole.encode()).hexdigest()[:16]
    name = re.sub(r"[^\w.-]+", "_", name)
    return Job(TUNED / f"{name}-{key}.safetensors", function, arguments)


def tune_job(t5, baseline, start, psi, sample, seed, rate, tuning, unit, all_steps, about):
    """tune() -> what is kept at its best validation {name: tensor}, its record; if all_steps, each
    validation's as well, as "step:name". about: what a reader of the file needs to use it."""
    device = t5.weights["shared.weight"].device
    psi = psi and partial(psi.func, {name: x.to(device) for name, x in psi.args[0].items()})
    curve, best, every = [], {}, {}
    validations = tune(t5, baseline, start, psi, sample, seed, rate, tuning, unit)
    if not WORKER:                      # the bars of several processes would mix
        steps = tuning.epochs * math.ceil(len(sample[0].ids) / tuning.batch)
        validations = tqdm(validations, f"seed {seed}, rate {rate}", unit="validation",
                           total=1 + math.ceil(steps / tuning.validate_every), leave=False,
                           dynamic_ncols=True, disable=None)
    for found, kept in validations:
        if not WORKER:
            validations.set_postfix(loss=f"{found['loss']:.3f}")
        curve.append(found)
        if min(curve, key=rank) is found:
            best = {name: x.cpu().clone(memory_format=torch.contiguous_format)
                    for name, x in kept.items()}
        if all_steps:
            every |= {f"{found['step']}:{name}": x.cpu().clone() for name, x in kept.items()}
    return best | every, {"validations": curve, "best": min(curve, key=rank), "baseline": baseline,
                          **about}


def score_job(t5, baseline, kept, examples):
    """score() of what tune() kept, or of what a Candidate starts from -> {"scores": log p of each
    label word (n, K)}."""
    device = t5.weights["shared.weight"].device
    kept = kept(t5) if callable(kept) else {name: x.to(device) for name, x in kept.items()}
    return {"scores": score(*BASELINES[baseline].model(t5, kept), examples, Method()).cpu()}, {}


def do(job, t5=None):
    """Do a job and write its result, whole or not at all. t5: None for a worker process's own."""
    began = time.perf_counter()
    tensors, values = job.function(t5 or WORKER["t5"], **job.arguments)
    values["time"] = {"seconds": time.perf_counter() - began}
    payload = save(tensors, {"result": json.dumps(values)})
    atomic_write(job.path, lambda file: file.write(payload))


def read_result(path, tensors=True):
    """A Job's file -> {name: tensor}, {name: value}; without its tensors, which may be a whole
    model's, {}. InputError if it is none."""
    try:
        with safe_open(path, framework="pt") as file:
            return ({name: file.get_tensor(name) for name in file.keys() if tensors},
                    json.loads(file.metadata()["result"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is no result of eval.py ({error}): give one from {TUNED}, or "
                         "delete it") from None


def begin_worker(folder, dtype, devices, begun):
    """Load the T5 in a new process. A worker ends with its parent, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is for the parent to tell
    torch.set_num_threads(1)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)),
                     daemon=True).start()
    with begun.get_lock():
        device = devices[begun.value % len(devices)]
        begun.value += 1
    WORKER["t5"] = load_t5(folder, dtype, pick_device(device))


@contextlib.contextmanager
def workers(t5, folder, dtype, devices, count):
    """-> work(jobs, title), which does what is not done yet in `count` processes. One process is
    this one, with t5. Each computes with one thread, so that no sum depends on their number."""
    TUNED.mkdir(parents=True, exist_ok=True)
    sweep(TUNED)
    threads, spawn, pool = torch.get_num_threads(), multiprocessing.get_context("spawn"), None

    def work(jobs, title):
        todo = {job.path: job for job in jobs if not job.path.is_file()}.values()
        if len(todo) < len(jobs):
            title += f" ({len(jobs) - len(todo)} of {len(jobs)} were done, or are one)"
        # pool.map raises what was raised there, and when it is stopped drops what has not begun.
        done = pool.map(do, todo) if pool else (do(job, t5) for job in todo)
        for _ in tqdm(done, title, len(todo), leave=False, dynamic_ncols=True, disable=None):
            pass

    try:
        if count > 1:
            pool = ProcessPoolExecutor(count, spawn, begin_worker,
                                       (folder, dtype, devices, spawn.Value("q", 0)))
        torch.set_num_threads(1)
        yield work
    except BrokenProcessPool:
        raise InputError(f"a process ended before its work was done, for lack of memory? Try fewer "
                         f"--jobs than {count}; what is finished is kept") from None
    finally:
        torch.set_num_threads(threads)
        if pool:
            for child in multiprocessing.active_children():
                child.terminate()
            pool.shutdown(cancel_futures=True)


def find_devices(name):
    """--device -> [str] to work on: for auto all GPUs there are."""
    device = str(pick_device(name))
    gpus = range(torch.cuda.device_count()) if name == "auto" else ()
    return [f"cuda:{i}" for i in gpus] or [device]


def processes(settings, devices, folder):
    """How many processes. On a CPU each holds the weights and what a step needs, taken as 4 times
    the files' size, and what ft holds, which is told. InputError if one is too many."""
    more = ft_memory(read_config(folder)) if "ft" in settings.prompt else 0
    if more:
        copies = len(rates_of(settings, BASELINES["ft"])) * len(settings.seeds)
        print(f"ft: {more / GIB:.2f} GiB in each process beside the frozen weights and a step's "
              f"activations; a task's rates and seeds take "
              f"{more / 6 / GIB * copies:.2f} GiB in {TUNED}")
    if settings.jobs or devices != ["cpu"]:
        return settings.jobs or len(devices)
    size = 4 * sum(path.stat().st_size for path in weight_files(folder)) + more
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise InputError(f"a process needs some {size / GIB:.1f} GiB, there are "
                         f"{memory / GIB:.1f}: take a smaller model, or leave ft away")
    return max(1, min(torch.get_num_threads(), memory // size))


# ---------------------------------------------------------------------------------- the script

def main(argv):
    """Parse, say what will run; then for each task tune, test, write and print."""
    settings, sources = parse(argv)
    if settings.predict:
        return predict(settings)
    for name, value in asdict(settings).items():
        print(f"{name:15} {value!s:24} {sources[name]}")
    if settings.plot:
        import_pyplot()                         # now, not after hours
    devices = find_devices(settings.device)     # before anything is fetched
    planned, absent = plans(settings)
    for name, why in absent.items():
        print(f"{name}: not run; {why}")
    if not planned:
        raise InputError("none of these tasks is at hand, see above")
    for line in fetch_list(settings.model):
        print(line)
    model, dtype = model_folder(settings.model), getattr(torch, settings.dtype)
    count = processes(settings, devices, model)
    t5 = load_t5(model, dtype, torch.device(devices[0] if count == 1 else "cpu"))
    made_of = {"model": model_fingerprint(model), "dtype": settings.dtype,
               "device": devices[0].partition(":")[0], "torch": torch.__version__,
               "code": fingerprint(Path(__file__).with_name(f"{name}.py") for name in (
                   "eval", "baselines", "supmer", "tasks", "data", "t5"))}
    unit = float(t5.weights["shared.weight"].float().cpu().square().mean().sqrt()) \
        if settings.rate_scale == "rms" else 1.0
    out = output_path(settings, argv, planned)
    written = {"command": shlex.join(["python", "eval.py", *argv]), "settings": asdict(settings),
               "prompts": {}, "not_run": absent, "results": []}
    ends = time.monotonic() + (60 * settings.max_minutes or math.inf)
    candidate = cache(lambda name: take_up(name, t5.config, settings, ends, written["prompts"]))
    for name in settings.prompt:
        if name not in PRETRAINED:              # those when it is their turn: nobody waits for them
            candidate(name)

    def in_use(owner):
        raise InputError(f"{out}: process {owner} is at work on it; wait for it, or end it")
    with workers(t5, model, dtype, devices, count) as work, \
            lock(TUNED / f".{out.name}.lock", in_use):
        work_through(Context(settings, load_tokenizer(tokenizer_file(model), t5.config), work, count, made_of,
                             unit, ends), planned, candidate, written, out)
    print(f"details: {out}")
    if any(result["test"] for result in written["results"]):
        show(written, settings, t5.config, out, argv)


def output_path(settings, argv, planned):
    """The JSON file's path, in a folder that can be written to. InputError if there is none."""
    own = [planned[0].name] if settings.template else settings.task
    stem = "-".join([Path(settings.model).name, *([settings.study] if settings.study else own),
                     *["quick"] * ("--quick" in argv)])
    out = Path(settings.out or f"runs/eval/{stem}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    sweep(out.parent)
    if not os.access(out.parent, os.W_OK):
        raise InputError(f"{out.parent} cannot be written to: give another --out")
    return out


def work_through(context, planned, candidate, written, out):
    """Evaluate each number of shots and Plan; each result is told, and written into `out`. What a
    stop leaves undone is put down as not run; with no result at all KeyboardInterrupt goes on."""
    def record(result):
        if not written["results"] and out.exists():         # an earlier call's is kept beside
            numbered = (out.with_suffix(f".{n}.json") for n in range(1, 10 ** 6))
            out.rename(next(path for path in numbered if not path.exists()))
        written["results"].append(result)
        atomic_write(out, lambda file: file.write(json.dumps(written, indent=1).encode()))
        print(details(result, context.settings))

    signal.signal(signal.SIGALRM, signal.default_int_handler)
    todo = [(shots, plan) for shots in context.settings.shots for plan in planned]
    try:
        for shots, plan in todo:
            evaluate(context, shots, plan, candidate, record)
    except KeyboardInterrupt:
        if not written["results"]:
            raise
        print("stopped: the same command goes on")
        done = [(result["shots"], result["task"]) for result in written["results"]]
        written["not_run"] |= {plan.name: "stopped before it was done"
                               for shots, plan in todo if (shots, plan.name) not in done}
    if not written["results"]:
        raise InputError("none of these prompts is to be had, see above")


def show(written, settings, config, out, argv):
    """Print and write the table; draw the picture; say what a demonstration left out."""
    text = table(written, config, settings)
    atomic_write(out.with_suffix(".md"), lambda file: file.write(f"{text}\n".encode()))
    print(f"\n{text}\n\n±: sample standard deviation (n - 1) over the seeds")
    if settings.plot:
        draw(written, settings, out.with_suffix(".png"))
        print(f"picture: {out.with_suffix('.png')}")
    if "--quick" in argv:
        print(protocol(argv, written["results"][-1], settings))


def check_kept(path, tensors, baseline, t5):
    """InputError unless {name: tensor} is what a Baseline keeps when it is tuned on this T5."""
    shapes = {name: x.shape for name, x in tensors.items()}
    P, *_ = shapes.get("theta") or [1]              # 1: any, where there is no prompt
    length = baseline.length or P
    fits = 0 < length <= LONGEST and all(
        x.is_floating_point() and x.isfinite().all() for x in tensors.values())
    if fits:
        wanted = baseline.fold(t5, (baseline.start or normal_prompt)(t5, 0, length))
        fits = shapes == {name: x.shape for name, x in wanted.items()}
    if not fits:
        raise InputError(f"{path} does not hold what was tuned on this T5, or no finite numbers: "
                         "give one that a table names")


def predict(settings):
    """Label the texts of --predict with a tuned prompt: CSV lines of texts, label and the label
    words' probabilities (they sum to 1). InputError for a prompt of another model."""
    tensors, about = read_result(settings.prompt[0])
    model = model_folder(settings.model)
    try:
        task, baseline = LabeledTask(**about["task"]), BASELINES[about["baseline"]]
        kinds = [type(tuple(x) if type(x) is list else x) for x in task]
        if kinds != [*map(type, LabeledTask("", ""))] or not all(
                type(word) is str for word in task.words) or len(task.words) < 2:
            raise TypeError("its task is none")
        about["model_sha256"], about["model"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{settings.prompt[0]} is no tuned prompt ({error!r}): give one that a "
                         "table names") from None
    if about["model_sha256"] != model_fingerprint(model):
        raise InputError(f"{settings.prompt[0]} was tuned on another model, {about['model']}, than "
                         f"{settings.model} is now: give --model")
    rows = load_texts(settings.predict, task)
    t5 = load_t5(model, getattr(torch, settings.dtype), pick_device(settings.device))
    tensors = {name: x for name, x in tensors.items() if ":" not in name}   # other steps' prompts
    check_kept(settings.prompt[0], tensors, baseline, t5)
    examples, = baseline.pose(load_tokenizer(tokenizer_file(model), t5.config), "", task, rows, (), 0)
    found, _ = score_job(t5, about["baseline"], tensors, examples)
    chances = found["scores"].softmax(-1)
    lines = io.StringIO()
    out = csv.writer(lines, lineterminator="\n")
    out.writerow([*template_fields(task.template), "label", *task.words])
    for row, best, chance in zip(rows, chances.argmax(-1).tolist(), chances.tolist()):
        out.writerow([*row.fields.values(), task.words[best], *(f"{p:.4f}" for p in chance)])
    if settings.out:
        atomic_write(settings.out, lambda file: file.write(lines.getvalue().encode()))
    else:
        print(lines.getvalue(), end="")


def parse(argv):
    """Command line -> Settings, {name: source of its value}. Raises InputError for its mistakes."""
    parser = knob_parser(__doc__, [Settings], FOR_TINY, {
        "study": tuple(STUDIES), "rate_scale": ("absolute", "rms"),
        "dtype": ("float32", "bfloat16")})
    parser.add_argument("--quick", action="store_true", help=f"a demonstration: {QUICK}")
    given = {name: tuple(value) if isinstance(value, list) else value
             for name, value in vars(parser.parse_args(argv)).items()}
    quick = given.pop("quick")
    preset = QUICK if quick else STUDIES.get(given.get("study"), {})
    tiny = FOR_TINY if given.get("model", "tiny") == "tiny" else {}
    settings = Settings(**{name: value for name, (value, _) in tiny.items()} | preset | given)
    check(settings, given, quick)
    check_tasks(settings, given)
    if settings.predict:
        return settings, {}
    newest = newest_run(settings.model) if "newest" in settings.prompt else ""
    prompts = [newest if name == "newest" else name for name in settings.prompt]
    if len(set(prompts)) < len(prompts) and newest != "released":
        raise InputError(f"--prompt {' '.join(prompts)}: the newest run is given twice")
    settings = replace(settings, prompt=tuple(dict.fromkeys(prompts)))
    sources = {entry.name: entry.metadata["help"] for entry in fields(Settings)}
    sources |= {name: why for name, (_, why) in tiny.items()}
    sources |= dict.fromkeys(preset, "--quick" if quick else f"--study {settings.study}")
    return settings, sources | dict.fromkeys(given, "given")


def check(settings, given, quick):
    """InputError for the first thing that is wrong with Settings, each value by itself and then
    together. given: {name: value} of those on the command line."""
    for entry in fields(Settings):
        value = getattr(settings, entry.name)
        check_knob(entry, value)
        if given.get(entry.name) == "":
            raise InputError(f"{option(entry.name)} '': it is empty")
        if type(value) is tuple and len(set(value)) < len(value) and entry.name != "data":
            raise InputError(f"{option(entry.name)} {' '.join(map(str, value))}: one is given "
                             "twice")
    prompts, out, labeled = settings.prompt, settings.out, settings.labeled
    clash = given.keys() & {"study", *QUICK} - {"prompt"}
    vain = given.keys() - {"predict", "prompt", "model", "out", "device", "dtype"}
    others = set(prompts) & BASELINES.keys() - {"random", "vocab"}
    known = ["newest", "released", *(name for name in BASELINES if BASELINES[name].start),
             *PRETRAINED]
    missing = [name for name in prompts if name not in known and not Path(name).exists()]
    made = compared_folder("metapt", settings.model).exists()
    for wrong, why in (
            (quick and clash,
             f"--quick sets {', '.join(map(option, sorted(clash)))} itself: leave one of the two "
             "away"),
            (others and (quick or settings.study == "steps"),
             f"--quick and --study steps are for prompts: leave {', '.join(others)} away"),
            (others & {"zero-shot", "few-shot"} and settings.template,
             "zero-shot and few-shot have no instruction for your own task: leave them out"),
            (settings.predict and vain,
             f"--predict takes all else from its prompt: leave "
             f"{', '.join(map(option, sorted(vain)))} away"),
            (settings.predict and (len(prompts) > 1 or not Path(prompts[0]).is_file()),
             f"--predict needs one tuned --prompt, a file from {TUNED}"),
            (missing, f"prompt {', '.join(missing)} is missing: give RUN, {', '.join(known)}"),
            (0 in settings.rates and any(settings.rates),
             f"--rates {settings.rates}: 0 is each method's own, give it alone or not at all"),
            (labeled and not ("metapt" in prompts and Path(labeled).is_dir()),
             f"--labeled {labeled}: give a folder, with --prompt metapt"),
            ("metapt" in prompts and not (labeled or settings.study or made),
             "metapt learns from labeled sentiment: give --labeled FOLDER"),
            (out and not settings.predict and Path(out).suffix != ".json",
             f"--out {out}: name a .json file; the table and the picture lie beside it"),
            (out and (Path(out).is_dir() or out in (settings.predict, *prompts)),
             f"--out {out}: it would replace what is there, name another file")):
        if wrong:
            raise InputError(why)


def check_tasks(settings, given):
    """As check(), of --task, or of what makes up a task of one's own."""
    offline = [name for name in TASKS if TASKS[name].train.startswith("tasks/")]
    unknown = set(settings.task) - TASKS.keys() - GROUPS.keys()
    data, template, words = settings.data, settings.template, own_words(settings)
    own, formats = bool(template or settings.words), [*filter(None, FORMATS)]
    for wrong, why in (
            (unknown, f"no task {', '.join(unknown)}. Without a network: {', '.join(offline)}; "
             "fetched, or from --data: "
             f"{', '.join(name for name in TASKS if name not in offline)}; groups: "
             f"{', '.join(GROUPS)}; or your own: --data FILE --template --words"),
            ("dg" in settings.task and set(settings.task) & set(GROUPS["dg"]),
             "dg tests on the six domains, tuned on airlines: leave their names away"),
            (not own and (len(data) > 1 or Path(data[0]).is_file()),
             "--data is a folder; of a task of your own give --template and --words, too"),
            (not own and "data" in given and not Path(data[0]).is_dir(),
             f"--data {data[0]}: there is no such folder"),
            (own and (not template or len(set(words)) < max(2, len(words)) or not all(words)),
             "a task of your own needs --template, with one <X>, and --words, two or more that "
             "differ: --template \"{text} It was <X> .\" --words terrible,great"),
            (own and given.keys() & {"task", "study"},
             "--task and --study are for the tasks that are known: leave them away"),
            (own and (len(data) > 2 or not all(
                Path(file).is_file() and Path(file).suffix in formats for file in data)),
             f"--data {' '.join(data)}: give your task's file, {', '.join(formats)}, and, if you "
             "have one, a file to test on"),
            (own and not template_fields(template),
             f"the template {template!r} names no text: \"{{text}} It was <X> .\"")):
        if wrong:
            raise InputError(why)


def own_words(settings):
    """--words as a tuple."""
    return tuple(word.strip() for word in settings.words.split(","))


# ------------------------------------------------------------------------------ tables, pictures

BACKBONES = {("t5-base", 768, 12): "t5-base", ("flan-t5-xl", 2048, 24): "flan-t5-xl"}


def figure(values):
    """Mean and sample standard deviation: [60, 70, 80] -> 70.0 ± 10.0, [60] -> 60.0."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def table(written, config, settings):
    """A call's results as a Markdown table, the paper's figures under ours. Under its own backbone
    all of its methods; under another one T5-base's, and the row says so."""
    columns = {(target, result["shots"]): test for result in written["results"]
               for target, test in result["test"].items()}
    done = columns.keys() | {(result["task"], result["shots"]) for result in written["results"]}
    absent = [(name, shots) for shots in settings.shots for name in written["not_run"]
              if (name, shots) not in done]
    names, several = [*columns, *absent], len(settings.shots) > 1
    found = {}                                  # {title: [a column's accuracies, or None]}
    for name in settings.prompt:
        tests = [test["prompts"].get(name, {}) for test in columns.values()]
        found[name] = [one.get("tuned") for one in tests]
        if all("untuned" in one for one in tests):
            found[f"{name}, untuned"] = [one["untuned"] for one in tests]
    for title, key in (("no prompt", "no_prompt"), ("most frequent label", "majority")):
        found[title] = [[test[key]] for test in columns.values()]
    rows = [(title, [figure(x) if x else "not run" for x in cells] + ["not run"] * len(absent),
             [x and statistics.mean(x) for x in cells]) for title, cells in found.items()]
    ours = BACKBONES.get((Path(settings.model).name, config.d_model, config.num_layers))
    paper = json.loads((Path(__file__).parent / "results/paper_tables.json").read_text())
    for method, tasks in paper[ours or "t5-base"].items():
        cells = [tasks.get(target) if shots == 16 else None for target, shots in names]
        if any(cells) and (ours or method in ("pt", "supmer")):
            rows.append((f"the paper's {ours or 'T5-base, another model'}: {method}",
                         ["{} ± {}".format(*x).replace(" ± None", "") if x else "" for x in cells],
                         [x and x[0] for x in cells[:len(columns)]]))
    heads = [target + f", {shots} shots" * several for target, shots in names]
    if len(columns) > 1 and not several:        # the mean over what was run here
        heads.append(f"mean of {len(columns)}")
        for _, row, means in rows:
            row.append("" if None in means else f"{statistics.mean(means):.1f}")
    lines = [["accuracy in %", *heads], ["---"] * (len(heads) + 1),
             *([title, *row] for title, row, _ in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def details(result, settings):
    """What a table does not show of one result, as text."""
    tests = ", ".join(f"{test['rows']:,} of {test['of']:,} test rows of {target}"
                      for target, test in result["test"].items())
    lines = [f"{result['task']} on {settings.model}, {result['shots']} shots, {result['examples']} "
             f"examples; {tests or 'not tested'}; {result['minutes']:.1f} minutes, "
             f"{result['processes']} process(es)"]
    for test in result["test"].values():
        lines += [f"  {name}: the first seed's demonstrations in {len(one['orders'])} orders: "
                  + " ".join(f"{accuracy:.1f}" for accuracy in one["orders"])
                  for name, one in test["prompts"].items() if "orders" in one]
    for name, records in result["tuning"].items():
        if records:
            best = min(records, key=lambda record: rank(record["best"]))
            seconds = sum(record["time"]["seconds"] for record in records)
            chosen = " ".join("{rate}/{step}".format(**record["best"]) for record in records)
            lines += [f"  {name}: {seconds:.0f} seconds of tuning; rate/step chosen for each seed "
                      f"{chosen}", f"    best on validation: {best['file']}"]
    return "\n".join(lines)


def protocol(argv, result, settings):
    """What a demonstration left out, the protocol's command, and its minutes at this speed."""
    whole, test = Settings(), result["test"][result["task"]]
    records = sum(result["tuning"].values(), [])
    steps, longer = records[0]["validations"][0][-1]["step"], whole.epochs / settings.epochs
    tuning = sum(record["time"]["seconds"] for record in records) * longer * 3      # rates
    testing = result["test_seconds"] * test["of"] / test["rows"]
    minutes = len(whole.seeds) * (tuning / result["processes"] + testing) / 60
    given = [word for word in argv if word not in ("--quick", "--task", *settings.task)]
    prompts = [] if "--prompt" in argv else ["--prompt", *settings.prompt]
    command = shlex.join(["python", "eval.py", "--task", *settings.task, *given, *prompts])
    return (f"A DEMONSTRATION, not the protocol: 1 seed of {len(whole.seeds)}, 1 rate of 3, "
            f"{steps} steps of {steps * longer:.0f}, {test['rows']} test rows "
            f"of {test['of']:,}.\nThe protocol, {minutes:.0f} minutes at this speed: {command}")


if __name__ == "__main__":
    run_script(main, "stopped; what is finished is kept, the same command goes on")
