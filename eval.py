"""Few-shot prompt tuning: T5 stays frozen, a soft prompt learns from 16 examples per label (C.1).

    python eval.py --task movie             # the newest finished run beside a random prompt
    python eval.py --task movie tweets --prompt runs/tiny-1 released random vocab
    python eval.py --task sst2 --data FOLDER     # FOLDER/original/SST-2/{train,dev}.tsv of LM-BFF
    python eval.py --quick                  # a demonstration of about a minute, NOT the protocol

Prints the settings with their sources, a bar (on stderr) and a table per task; every seed, rate,
validation and choice goes to runs/eval/<model>-<task>.json. With the embedded T5 a prompt takes 5
seeds x 3 rates x 200 steps, some 15 minutes on one core. Validation examples choose rate and step;
the test file is opened when all tuning of the task is done.
"""

import hashlib
import json
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data import (RELEASED, TASKS, TINY, atomic_write, few_shot, load_test, load_tokenizer,
                  load_train, model_fingerprint, model_folder, released_folder, task_examples)
from supmer import (REGULARIZERS, Method, init_prompt, knob, load_prompt, measure, prompt_gradient,
                    score)
from t5 import InputError, load_t5
from train import TINY_VALUES, fetch_list, knob_parser, pick_device, read_run


@dataclass(frozen=True)
class Settings:
    """What an evaluation is made of, with the paper's values; the command line is made from it."""
    model: str = knob("tiny", "tiny, a short name such as flan-t5-xl, a hub id, or a T5's folder")
    task: tuple = knob(("movie",), f"one or several of {', '.join(TASKS)}")
    data: str = knob(os.environ.get("SUPMER_DATA") or "data", "folder of the tasks not in tiny/")
    prompt: tuple = knob(("newest", "random"), "RUN (its folder or prompt.safetensors), a folder "
                         "of PEFT's or with the authors' files, released (tiny's, or the authors' "
                         "for t5-base and flan-t5-xl), random, vocab, or newest: this model's last "
                         "finished run")
    prompt_length: int = knob(100, "P, vectors of the soft prompt (section 4.1)")
    shots: int = knob(16, "examples per label to tune on, as many to validate on (section 4.1)")
    seeds: tuple = knob((10, 20, 30, 40, 50), "of the examples, batches and random prompts (C.1)")
    rates: tuple = knob((0.1, 0.2, 0.3), "AdamW's rates to choose from (C.1)")
    rate_scale: str = knob("absolute", "absolute (C.1), or rms: x RMS of the embedding table")
    epochs: int = knob(200, "passes over the examples, while the rate falls linearly to 0 (C.1)")
    batch: int = knob(32, "examples of a step (C.1)")
    validate_every: int = knob(10, "steps between validations (C.1)")
    words_only: bool = knob(False, "loss over the task's label words, not the whole vocabulary")
    test_rows: int = knob(0, "test on so many rows only, always the same ones; 0: on all")
    dtype: str = knob("float32", "of the frozen T5: float32 or bfloat16; prompts are float32")
    device: str = knob("auto", "auto, cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")
    out: str = knob("", "the JSON file, instead of runs/eval/<model>-<task>.json")


CHOICES = {"task": TASKS, "rate_scale": ("absolute", "rms"), "dtype": ("float32", "bfloat16")}
# What the embedded T5 needs instead of the paper's numbers, and why.
FOR_TINY = {"prompt_length": TINY_VALUES["prompt_length"],
            "rate_scale": ("rms", "its embeddings are small, see tiny/README.md")}
QUICK = {"prompt": ("random", "vocab", "newest", "released"), "task": ("movie",), "seeds": (10,),
         "rates": (0.2,), "epochs": 60, "test_rows": 300}
PAPER = {   # Table 1, by name, d_model and layers of the backbone, and task: SUPMER's and PT's
    ("t5-base", 768, 12, "sst2"): {"learned": "87.3 +- 0.5", "random": "71.9 +- 3.4"},
    ("flan-t5-xl", 2048, 24, "sst2"): {"learned": "95.5 +- 0.4", "random": "88.2 +- 9.2"}}


# ------------------------------------------------------------------------------------- prompts

class Prompt(NamedTuple):
    """Where tuning starts."""
    name: str
    starts: list[torch.Tensor]  # for each seed theta (P, d) float32
    psi: Callable | None        # a learned prompt's regularizer (g, H) -> g; None for the others
    about: dict                 # a learned prompt's file and its metadata


def newest_run(model):
    """The folder of this model's run under runs/ that finished last. InputError without one."""
    runs = {str(path.parent): read_run(path.parent) for path in Path("runs").glob("*/run.json")}
    ended = [(run["ended"], name) for name, run in runs.items()
             if run["finished"] and Path(run["model"]).name == Path(model).name]
    if not ended:
        raise InputError(f"runs/ has no finished run of {model}: make one (python train.py), or "
                         "give --prompt RUN|released|random|vocab")
    return max(ended)[1]


def normal_prompt(t5, length, seed):
    """theta (P, d), normal with the embedding table's standard deviation."""
    table = t5.weights["shared.weight"].float()
    drawn = np.random.default_rng((seed, 0, 0, 12)).standard_normal((length, table.shape[1]))
    return table.std() * torch.from_numpy(drawn).float().to(table.device)


def belongs(about, config, model):
    """Whether a prompt's metadata is of this model. PEFT's says nothing that could be checked."""
    if about["regularizer"] == "affine":
        return about.get("model_sha256") == model_fingerprint(model_folder(model))
    shape = (config.d_model, config.d_ff)
    return about["regularizer"] != "released" or RELEASED.get(shape) == about["model"]


def open_prompt(name, t5, settings):
    """random, vocab, released, RUN -> Prompt. InputError unless it is of this model and length."""
    P, model, device = settings.prompt_length, settings.model, t5.weights["shared.weight"].device
    if name in ("random", "vocab"):
        make = normal_prompt if name == "random" else init_prompt
        return Prompt(name, [make(t5, P, seed) for seed in settings.seeds], None, {})
    path = Path(name)
    if name == "released":
        path = TINY if model == "tiny" else released_folder(t5.config)
    if not path.exists():
        raise InputError(f"{path} is missing: give --prompt RUN|released|random|vocab")
    theta, phi, about = load_prompt(path, t5.config.d_model)
    if not belongs(about, t5.config, model):
        raise InputError(f"{path} was learned on another {about.get('model')} than {model} is now:"
                         " take a prompt of this model")
    if len(theta) != P:
        raise InputError(f"{path} has {len(theta)} vectors, not {P}: --prompt-length {len(theta)}?")
    psi = phi and partial(REGULARIZERS[about["regularizer"]][1],
                          {key: value.to(device) for key, value in phi.items()})
    return Prompt(name, [theta.to(device)] * len(settings.seeds), psi, {"file": str(path), **about})


# -------------------------------------------------------------------------------- tuning (C.1)

def batch_rows(n, step, seed, size):
    """A step's rows, steps counted from 0: each epoch is a permutation of n rows, cut into batches.

    A pure function. n 5, size 2: steps 0, 1, 2 -> for example [3, 0], [4, 1], [2]
    """
    epoch, place = divmod(step, math.ceil(n / size))
    order = np.random.default_rng((seed, epoch, 0, 11)).permutation(n)
    return order[place * size:(place + 1) * size].tolist()


def rank(validation):
    """What is lowest is chosen: best accuracy, lowest loss, earliest step, smallest rate."""
    return -validation["accuracy"], validation["loss"], validation["step"], validation["rate"]


def tune(t5, start, psi, sample, seed, rate, settings, unit=1.0, report=lambda loss, best: None):
    """Tune a prompt at one rate -> its validations, the best of them, theta (P, d) of that step.

    A step: the gradient g of a batch (Eq. 1) -> psi(g, H) (Eq. 5; phi frozen, the gate's H from
    that batch; psi None: g itself) -> norm clipped -> AdamW, whose rate falls linearly to 0.
    start (P, d), kept as it is, counts as step 0. sample: (training, validation) Examples. rate is
    in units of unit. report(loss, best validation) follows each step. InputError: a loss is not
    finite (a gradient that was not shows in the next validation at the latest).
    """
    (train, held_out), method = sample, Method(words_only=settings.words_only)
    theta, n, curve = start.clone(), len(train.ids), []
    steps = settings.epochs * math.ceil(n / settings.batch)
    optimizer = torch.optim.AdamW([theta], eps=1e-8, weight_decay=0.0)
    for step in range(steps + 1):
        if step % settings.validate_every == 0 or step == steps:
            found = measure(score(t5, theta, held_out, method), held_out.labels)
            loss = found["word_loss" if method.words_only else "loss"]
            if not math.isfinite(loss):
                raise InputError(f"the loss is {loss} at step {step}, rate {rate}, seed {seed}: "
                                 "try smaller --rates")
            curve.append({"rate": rate, "step": step, "loss": loss,
                          "accuracy": 100 * found["correct"] / len(held_out.ids)})
            if curve[-1] is min(curve, key=rank):
                best, kept = curve[-1], theta.clone()
        if step < steps:
            rows = batch_rows(n, step, seed, settings.batch)
            batch = train._replace(
                ids=[train.ids[row] for row in rows], slots=[train.slots[row] for row in rows],
                vectors=train.vectors[rows], labels=train.labels[rows])
            g, H, loss = prompt_gradient(t5, theta, batch, method)
            theta.grad = psi(g, H) if psi else g
            torch.nn.utils.clip_grad_norm_([theta], method.clip)
            optimizer.param_groups[0]["lr"] = rate * unit * (1 - step / steps)
            optimizer.step()
            report(float(loss), best)
    return curve, best, kept


def tune_task(t5, tokenizer, task, folder, prompts, settings):
    """Tune every prompt, seed and rate, with a bar; of the files only the training one is opened.

    -> {prompt's name: [a seed's record for the JSON file]}, {prompt's name: [a seed's best theta]}
    """
    table, rows = t5.weights["shared.weight"].float(), load_train(task, folder)
    unit = float(table.square().mean().sqrt()) if settings.rate_scale == "rms" else 1.0
    samples = [[task_examples(tokenizer, task, r) for r in few_shot(rows, settings.shots, seed)]
               for seed in settings.seeds]
    records, thetas = ({prompt.name: [] for prompt in prompts} for _ in range(2))
    steps = settings.epochs * math.ceil(len(samples[0][0].ids) / settings.batch)
    total = steps * len(prompts) * len(settings.seeds) * len(settings.rates)
    with tqdm(total=total, unit="step", dynamic_ncols=True, leave=False,
              disable=None) as bar:
        def report(loss, best):
            bar.set_postfix(loss=f"{loss:.3f}", best=f"{best['accuracy']:.0f} %", refresh=False)
            bar.update()
        for prompt in prompts:
            for seed, start, sample in zip(settings.seeds, prompt.starts, samples, strict=True):
                bar.set_description(f"{prompt.name}, seed {seed}")
                began = time.perf_counter()
                tuned = [tune(t5, start, prompt.psi, sample, seed, rate, settings, unit, report)
                         for rate in settings.rates]
                _, best, theta = min(tuned, key=lambda run: rank(run[1]))
                records[prompt.name].append({
                    "seed": seed, "examples": len(sample[0].ids), "best": best,
                    "validations": [curve for curve, _, _ in tuned],
                    "time": {"seconds": time.perf_counter() - began}})
                thetas[prompt.name].append(theta)
    return records, thetas


def test_task(t5, tokenizer, task, folder, prompts, thetas, settings):
    """Open the test file, score every chosen theta once, and the untuned -> for the JSON, in %.

    The first --test-rows are always the same: they are sorted by sha256 of their text.
    """
    rows = sorted(load_test(task, folder), key=lambda row: hashlib.sha256(
        "\t".join(row.fields.values()).encode()).digest())
    examples = task_examples(tokenizer, task, rows[:settings.test_rows or None])
    n, results = len(examples.ids), {}

    def accuracy(theta):
        return 100 * measure(score(t5, theta, examples, Method()), examples.labels)["correct"] / n
    for prompt in prompts:
        tuned = [accuracy(theta) for theta in thetas[prompt.name]]
        starts = prompt.starts[:1] if prompt.psi else prompt.starts             # they are all one
        results[prompt.name] = {"untuned": [accuracy(theta) for theta in starts], "tuned": tuned,
                                "mean": statistics.mean(tuned),
                                "sample_std": statistics.stdev(tuned) if len(tuned) > 1 else None}
    return {"rows": n, "of": len(rows), "prompts": results,
            "majority": 100 * int(examples.labels.bincount().max()) / n,
            "no_prompt": accuracy(prompts[0].starts[0][:0])}           # (0, d): the template alone


# ---------------------------------------------------------------------------------- the script

def parse(argv):
    """Command line -> Settings, {name: source of its value}. Raises InputError for its mistakes."""
    parser = knob_parser(__doc__, [Settings], FOR_TINY, CHOICES)
    parser.add_argument("--quick", action="store_true", help=f"a demonstration: {QUICK}")
    given = {name: tuple(value) if isinstance(value, list) else value
             for name, value in vars(parser.parse_args(argv)).items()}
    quick = QUICK if given.pop("quick") else {}
    for name in given.keys() & quick.keys() - {"prompt"}:
        parser.error(f"--quick sets {name} itself: leave one of the two away")
    tiny = FOR_TINY if given.get("model", "tiny") == "tiny" else {}
    settings = Settings(**{name: value for name, (value, _) in tiny.items()} | quick | given)
    for name, value in asdict(settings).items():
        values = value if isinstance(value, tuple) else (value,)
        least = 0 if name in ("seeds", "test_rows") else 1e-9
        if not all(least <= x < 1e9 for x in values if type(x) in (int, float)):
            bound = "at least" if least == 0 else "above"
            parser.error(f"{name} {value}: must be {bound} 0, below 1e9")
        if len(set(values)) < len(values):
            parser.error(f"{name} {value}: one is given twice")
    prompts = [newest_run(settings.model) if name == "newest" else name for name in settings.prompt]
    if len(set(prompts)) < len(prompts):
        parser.error(f"prompt {prompts}: the newest run is given twice")
    settings = replace(settings, prompt=tuple(prompts))
    sources = {entry.name: entry.metadata["help"] for entry in fields(Settings)}
    sources |= {name: why for name, (_, why) in tiny.items()} | dict.fromkeys(quick, "--quick")
    return settings, sources | dict.fromkeys(given, "given")


def table(task, result, prompts, config, settings):
    """One task's result as text; the paper's figures only beside the paper's backbone."""
    test, width = result["test"], max(len(name) for name in [*settings.prompt, "no prompt"])
    paper = PAPER.get((Path(settings.model).name, config.d_model, config.num_layers, task))
    examples = result["tuning"][prompts[0].name][0]["examples"]
    lines = [f"{task} on {settings.model}: accuracy in % on {test['rows']:,} of {test['of']:,} test"
             f" rows; {settings.shots} shots, {examples} examples; {result['minutes']:.1f} minutes;"
             " +-: sample standard deviation (n - 1)",
             f"{'prompt':{width}}  untuned  tuned         seconds  "
             f"{'paper, Table 1  ' * bool(paper)}rate/step chosen for seeds {settings.seeds}"]
    for prompt in prompts:
        records, found = result["tuning"][prompt.name], test["prompts"][prompt.name]
        spread = f"+- {found['sample_std']:.1f}" if len(records) > 1 else "one seed"
        figure = paper.get("learned" if prompt.psi else prompt.name, "") if paper else ""
        lines.append(f"{prompt.name:{width}}  {statistics.mean(found['untuned']):7.1f}  "
                     f"{found['mean']:5.1f} {spread:8}"
                     f"{sum(record['time']['seconds'] for record in records):7.0f}  "
                     f"{figure:{16 * bool(paper)}}"
                     + " ".join("{rate}/{step}".format(**record["best"]) for record in records))
    return "\n".join([*lines, f"{'no prompt':{width}}  {test['no_prompt']:7.1f}",
                      f"{'majority':{width}}  {test['majority']:7.1f}"])


def protocol(argv, result, settings):
    """What a demonstration left out, the protocol's command, and its minutes at this speed."""
    whole, test = Settings(), result["test"]
    records = [record for records in result["tuning"].values() for record in records]
    steps, longer = records[0]["validations"][0][-1]["step"], whole.epochs / settings.epochs
    tuning = sum(record["time"]["seconds"] for record in records) * longer * len(whole.rates)
    testing = result["test_seconds"] * test["of"] / test["rows"]
    minutes = len(whole.seeds) * (tuning + testing) / 60
    given = [word for word in argv if word not in ("--quick", "--task", *settings.task)]
    prompts = [] if "--prompt" in argv else ["--prompt", *settings.prompt]
    command = shlex.join(["python", "eval.py", "--task", *settings.task, *given, *prompts])
    return (f"A DEMONSTRATION, not the protocol: 1 seed of {len(whole.seeds)}, 1 rate of "
            f"{len(whole.rates)}, {steps} steps of {steps * longer:.0f}, {test['rows']} test rows "
            f"of {test['of']:,}.\nThe protocol, {minutes:.0f} minutes at this speed: {command}")


def main(argv):
    """Parse, say what will run; then for each task tune, test, write and print."""
    began = time.perf_counter()
    settings, sources = parse(argv)
    for name, value in asdict(settings).items():
        print(f"{name:15} {value!s:24} {sources[name]}")
    folders = {name: TINY if TASKS[name].train.startswith("tasks/") else Path(settings.data)
               for name in settings.task}
    for name, folder in folders.items():        # looked for now, opened after the tuning
        if not (folder / TASKS[name].test).is_file():
            raise InputError(f"{name}: {folder / TASKS[name].test} is missing: give --data FOLDER")
    for line in fetch_list(settings.model):
        print(line)
    model = model_folder(settings.model)
    t5 = load_t5(model, getattr(torch, settings.dtype), pick_device(settings.device))
    tokenizer = load_tokenizer(model, t5.config)
    prompts = [open_prompt(name, t5, settings) for name in settings.prompt]
    print(*(f"{prompt.name}: {prompt.about}" for prompt in prompts if prompt.about), sep="\n")
    stem = "-".join([Path(settings.model).name, *settings.task, *["quick"] * ("--quick" in argv)])
    out = Path(settings.out or f"runs/eval/{stem}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():                            # what an earlier call found is kept beside
        numbered = (out.with_suffix(f".{number}.json") for number in range(1, 10 ** 6))
        out.rename(next(path for path in numbered if not path.exists()))
    written = {"command": shlex.join(["python", "eval.py", *argv]), "settings": asdict(settings),
               "prompts": {prompt.name: prompt.about for prompt in prompts}, "tasks": {}}
    for name, folder in folders.items():
        tuning, thetas = tune_task(t5, tokenizer, TASKS[name], folder, prompts, settings)
        tuned = time.perf_counter()
        test = test_task(t5, tokenizer, TASKS[name], folder, prompts, thetas, settings)
        result = {"tuning": tuning, "test": test, "test_seconds": time.perf_counter() - tuned,
                  "minutes": (time.perf_counter() - began) / 60}
        written["tasks"][name] = result
        atomic_write(out, lambda file: file.write(json.dumps(written, indent=1).encode() + b"\n"))
        print("", table(name, result, prompts, t5.config, settings), f"details: {out}", sep="\n")
    if "--quick" in argv:
        print(protocol(argv, result, settings))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the tasks that were done are written", file=sys.stderr)
        sys.exit(130)
