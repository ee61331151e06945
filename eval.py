"""Few-shot prompt tuning: T5 stays frozen, only a soft prompt learns, from 16 examples per label (3.4, 4.1, C.1).

    python eval.py --task movie                      # the newest finished run of the embedded T5, and a random prompt
    python eval.py --task movie tweets --prompt runs/tiny-1 released random vocab
    python eval.py --task sst2 --data FOLDER         # FOLDER/original/SST-2/{train,dev}.tsv, as LM-BFF has them
    python eval.py --quick                           # a demonstration of about a minute, NOT the protocol

It prints the settings with their sources, a bar (stderr), and a table per task; every seed, rate, validation and choice
goes to runs/eval/<model>-<task>.json. With the embedded T5 a prompt takes 5 seeds x 3 rates x 200 steps, some 12
minutes on one core. Rate and step are chosen by validation; the test file is opened after all tuning of a task.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data import TASKS, TINY, atomic_write, few_shot, load_tokenizer, model_folder, task_examples, test_rows, train_rows
from supmer import Method, init_prompt, knob, load_prompt, measure, prompt_gradient, regularize, score
from t5 import InputError, load_t5
from train import pick_device, read_run


@dataclass(frozen=True)
class Settings:
    """What an evaluation is made of; the command line is made from it."""
    model: str = knob("tiny", "tiny, t5-small, t5-base, t5-large, a hub id, or a folder with a T5")
    task: tuple = knob(("movie",), f"one or several of {', '.join(TASKS)}")
    data: str = knob(os.environ.get("SUPMER_DATA", "data"), "folder of tasks that are not embedded; SUPMER_DATA names it too")
    prompt: tuple = knob(("newest", "random"), "RUN (its folder or a prompt.safetensors), released, random, vocab, or "
                         "newest: the run of this model that finished last")
    prompt_length: int = knob(100, "P, vectors of the soft prompt (section 4.1)")
    shots: int = knob(16, "examples per label to tune on, and as many to validate on (section 4.1)")
    seeds: tuple = knob((10, 20, 30, 40, 50), "each samples its examples, batches and random prompts (C.1)")
    rates: tuple = knob((0.1, 0.2, 0.3), "AdamW's rates to choose from (C.1)")
    rate_scale: str = knob("absolute", "absolute (C.1), or rms: in units of the embedding table's RMS")
    epochs: int = knob(200, "passes over the examples; the rate falls linearly to 0 over them (C.1)")
    batch: int = knob(32, "examples of a step (C.1)")
    validate_every: int = knob(10, "steps between validations (C.1)")
    words_only: bool = knob(False, "loss over the task's label words, not the whole vocabulary")
    test_rows: int = knob(0, "test on the first so many rows in a fixed random order; 0: on all")
    micro_batch: int = knob(8, "examples encoded together: memory and speed, never the result")
    dtype: str = knob("float32", "of the frozen T5: float32 or bfloat16; prompts are float32 always")
    device: str = knob("auto", "auto, cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")
    out: str = knob("", "the JSON file, runs/eval/<model>-<task>.json without it")

    @property
    def method(self):
        """The numbers that prompt_gradient and score ask for."""
        return Method(words_only=self.words_only, micro_batch=self.micro_batch)

    def steps(self, n):
        """Steps of one tuning run on n examples."""
        return self.epochs * math.ceil(n / self.batch)


CHOICES = {"task": TASKS, "rate_scale": ("absolute", "rms"), "dtype": ("float32", "bfloat16")}
# What the embedded T5 needs instead of the paper's numbers, and why.
FOR_TINY = {"prompt_length": (20, "100 vectors are worse on a model this small, see tiny/README.md"),
            "rate_scale": ("rms", "its embeddings are far smaller than an official T5's, see tiny/README.md")}
# What --quick stands for; but for the prompts, none of it may be given as well.
QUICK = "--prompt random vocab newest released --task movie --seeds 10 --rates 0.2 --epochs 60 --test-rows 300".split()
# Table 1 of the paper; backbone: name, d_model, layers, gated.
PAPER = {("t5-base", 768, 12, False): {"sst2": {"learned": "87.3 +- 0.5 (SUPMER)", "random": "71.9 +- 3.4 (PT)"}},
         ("flan-t5-xl", 2048, 24, True): {"sst2": {"learned": "95.5 +- 0.4 (SUPMER)", "random": "88.2 +- 9.2 (PT)"}}}


# ------------------------------------------------------------------------------------------- tuning (3.4, C.1)

def batch_rows(n, step, seed, size):
    """The rows of a step, counted from 0: each epoch is a permutation of the n rows, cut into batches.

    A pure function of its arguments. n 5, size 2: steps 0, 1, 2 -> for example [3, 0], [4, 1], [2]
    """
    epoch, place = divmod(step, math.ceil(n / size))
    return np.random.default_rng((seed, epoch, 0, 11)).permutation(n)[place * size:(place + 1) * size].tolist()


def validate(t5, theta, examples, step, settings):
    """-> {"step", "accuracy" in %, "loss", of the kind that tuning lowers}. Raises InputError if it is not finite."""
    found = measure(score(t5, theta, examples, settings.method), examples.labels)
    loss = found["word_loss" if settings.words_only else "loss"]
    if not math.isfinite(loss):
        raise InputError(f"the validation loss is {loss} at step {step}: try smaller --rates, or --dtype float32")
    return {"step": step, "accuracy": 100 * found["correct"] / len(examples.ids), "loss": loss}


def rank(validation):
    """The lowest is chosen: the highest accuracy, then the lowest loss, then the earliest step."""
    return -validation["accuracy"], validation["loss"], validation["step"]


def tune(t5, start, phi, sample, seed, rate, settings, report=lambda loss, accuracy: None):
    """Tune a prompt on one sample at one rate -> validation curve, its best entry, theta (P, d) at that step.

    In each step the gradient g of a batch (Eq. 1) becomes psi(g) (Eq. 5), phi frozen, the gate's H from that batch
    (phi None: g itself); its norm is clipped; AdamW takes it, with a rate that falls linearly from `rate` to 0.
    start (P, d) is not changed and counts as step 0. sample: (training, validation) Examples. report(loss, best
    accuracy so far) is called after each step. Raises InputError when a loss or gradient is not finite.
    """
    train, validation = sample
    theta, steps = start.clone(), settings.steps(len(train.ids))
    optimizer = torch.optim.AdamW([theta], rate, eps=1e-8, weight_decay=0.0)
    best, kept = validate(t5, theta, validation, 0, settings), start
    curve = [best]
    for step in range(1, steps + 1):
        rows = batch_rows(len(train.ids), step - 1, seed, settings.batch)
        batch = train._replace(ids=[train.ids[r] for r in rows], slots=[train.slots[r] for r in rows],
                               vectors=train.vectors[rows], labels=train.labels[rows])
        g, H, loss = prompt_gradient(t5, theta, batch, settings.method)
        theta.grad = g if phi is None else regularize(phi, g, H)
        if not (math.isfinite(loss) and bool(theta.grad.isfinite().all())):
            raise InputError(f"step {step}, rate {rate:.3g}, seed {seed}: the loss ({float(loss)}) or its gradient is not "
                             "finite: try smaller --rates, or --dtype float32")
        torch.nn.utils.clip_grad_norm_([theta], settings.method.clip)
        optimizer.param_groups[0]["lr"] = rate * (1 - (step - 1) / steps)
        optimizer.step()
        if step % settings.validate_every == 0 or step == steps:
            curve.append(validate(t5, theta, validation, step, settings))
            if rank(curve[-1]) < rank(best):
                best, kept = curve[-1], theta.clone()
        report(float(loss), best["accuracy"])
    return curve, best, kept


def choose(runs):
    """Of one seed's runs [{"rate", "best", ...}, ...] the index of the best: by rank, then the smaller rate."""
    return min(range(len(runs)), key=lambda i: (*rank(runs[i]["best"]), runs[i]["rate"]))


def tune_task(t5, tokenizer, task, folder, prompts, settings):
    """Search the rates for every prompt and seed, with a bar; of the files only the training one is opened.

    -> {prompt's name: [a seed's record for the JSON file, ...]}, {prompt's name: [a seed's chosen theta, ...]}
    """
    table, rows = t5.weights["shared.weight"].float(), train_rows(task, folder)
    unit = float(table.square().mean().sqrt()) if settings.rate_scale == "rms" else 1.0
    samples = {seed: [task_examples(tokenizer, task, part) for part in few_shot(rows, settings.shots, seed)]
               for seed in settings.seeds}
    total = sum(settings.steps(len(train.ids)) for train, _ in samples.values()) * len(prompts) * len(settings.rates)
    records, chosen = ({prompt.name: [] for prompt in prompts} for _ in range(2))
    with tqdm(total=total, unit="step", dynamic_ncols=True, leave=False) as bar:
        def report(loss, accuracy):
            bar.set_postfix(loss=f"{loss:.3f}", validation=f"{accuracy:.0f} %", refresh=False)
            bar.update()
        for prompt in prompts:
            for seed, sample in samples.items():
                bar.set_description(f"{prompt.name}, seed {seed}")
                runs, thetas, began = [], [], time.perf_counter()
                for rate in settings.rates:
                    curve, best, theta = tune(t5, prompt.start(seed), prompt.phi, sample, seed, rate * unit, settings, report)
                    runs.append({"rate": rate, "adamw_rate": rate * unit, "best": best, "curve": curve})
                    thetas.append(theta)
                i = choose(runs)
                records[prompt.name].append({"seed": seed, "rate": runs[i]["rate"], **runs[i]["best"], "runs": runs,
                                             "time": {"seconds": time.perf_counter() - began}})
                chosen[prompt.name].append(thetas[i])
    return records, chosen


# ---------------------------------------------------------------------------------------------------- the test

def test_task(t5, tokenizer, task, folder, prompts, chosen, settings):
    """Open the test file and score each chosen prompt once, and each untuned one -> accuracies in %, for the JSON file.

    The first --test-rows are always the same: they are ordered by the sha256 of their text.
    """
    everything = test_rows(task, folder)
    ordered = sorted(everything, key=lambda row: hashlib.sha256("\t".join(row.fields.values()).encode()).digest())
    examples = task_examples(tokenizer, task, ordered[:settings.test_rows or None])
    n, counts, began, known = len(examples.ids), examples.labels.bincount(), time.perf_counter(), {}

    def accuracy(theta):
        key = theta.cpu().numpy().tobytes()                     # a learned prompt is the same one for every seed
        if key not in known:
            known[key] = 100 * measure(score(t5, theta, examples, settings.method), examples.labels)["correct"] / n
        return known[key]

    result = {"rows": n, "of": len(everything), "majority": 100 * int(counts.max()) / n,
              "no_prompt": accuracy(prompts[0].start(0)[:0]), "prompts": {}}    # (0, d): the template alone
    for prompt in prompts:
        tuned = [accuracy(theta) for theta in chosen[prompt.name]]
        result["prompts"][prompt.name] = {
            "untuned": [accuracy(prompt.start(seed)) for seed in settings.seeds], "tuned": tuned,
            "mean": statistics.mean(tuned), "sample_std": statistics.stdev(tuned) if len(tuned) > 1 else None}
    return result | {"time": {"seconds_per_row": (time.perf_counter() - began) / len(known) / n}}


# ----------------------------------------------------------------------------------------------------- prompts

class Prompt(NamedTuple):
    """Where tuning starts."""
    name: str
    start: Callable[[int], torch.Tensor]    # downstream seed -> theta (P, d) float32
    phi: dict | None                        # a learned prompt's regularizer, frozen; None for the others
    about: dict                             # a learned prompt's file and its metadata


def normal_prompt(t5, length, seed):
    """theta (P, d) float32 from a normal distribution with the standard deviation of the embedding table."""
    table = t5.weights["shared.weight"].float()
    drawn = np.random.default_rng((seed, 0, 0, 12)).standard_normal((length, table.shape[1]))
    return table.std() * torch.from_numpy(drawn).float().to(table.device)


def newest_run(model):
    """The run of this model under runs/ that finished last -> its folder's name. Raises InputError without one."""
    runs = [(read_run(path.parent), str(path.parent)) for path in Path("runs").glob("*/run.json")]
    ended = [(run["ended"], name) for run, name in runs if run["finished"] and Path(run["model"]).name == Path(model).name]
    if not ended:
        raise InputError(f"runs/ has no finished run of {model}: make one (python train.py), or give "
                         "--prompt RUN|released|random|vocab, RUN being a run's folder or a prompt.safetensors")
    return max(ended)[1]


def open_prompt(name, t5, settings):
    """random, vocab, released or RUN -> Prompt. Raises InputError unless it is there and of this model and length."""
    table, P, d = t5.weights["shared.weight"], settings.prompt_length, t5.config.d_model
    if name == "random":
        return Prompt(name, lambda seed: normal_prompt(t5, P, seed), None, {})
    if name == "vocab":
        return Prompt(name, lambda seed: init_prompt(t5, P, seed), None, {})
    if name == "released" and settings.model != "tiny":
        raise InputError(f"the authors' files cannot be read yet, so for {settings.model} choose --prompt RUN|random|vocab")
    path = TINY if name == "released" else Path(name)
    path = path / "prompt.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"--prompt {name}: {path} is missing; choose among RUN|released|random|vocab")
    theta, phi, metadata = load_prompt(path, d)
    if Path(metadata.get("model", "")).name != Path(settings.model).name:
        raise InputError(f"{path} was learned on {metadata.get('model')}, not on {settings.model}: take a prompt of this model")
    if len(theta) != P:
        raise InputError(f"{path} has {len(theta)} vectors, not {P}: give --prompt-length {len(theta)}")
    theta, phi = theta.to(table.device), {key: value.to(table.device) for key, value in phi.items()}
    return Prompt(name, lambda seed: theta, phi, {"file": str(path), **metadata})


# ------------------------------------------------------------------------------------------------- the script

def parse(argv):
    """Command line -> Settings, {name: source of its value}, quick. Raises InputError for any mistake in it."""
    def fail(message):
        raise InputError(f"{message}; python eval.py --help explains")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--quick", action="store_true", help=f"a demonstration, short for {' '.join(QUICK)}")
    for entry in fields(Settings):
        many = isinstance(entry.default, tuple)
        kind = type(entry.default[0] if many else entry.default)
        how = {"type": kind, "nargs": "+" if many else None, "choices": CHOICES.get(entry.name), "metavar": kind.__name__}
        tiny = f"; tiny: {FOR_TINY[entry.name][0]}" if entry.name in FOR_TINY else ""
        parser.add_argument("--" + entry.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=f"{entry.metadata['help']} [{text(entry.default)}{tiny}]".replace("%", "%%"),
                            **({"action": "store_true"} if kind is bool else how))
    given = vars(parser.parse_args(argv))
    quick, meant = given.pop("quick"), vars(parser.parse_args(QUICK))
    clash = [name for name in given if quick and name in meant and name != "prompt"]
    if clash:
        fail(f"--quick sets --{clash[0].replace('_', '-')} itself: leave one of the two away")
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in ({**meant, **given} if quick else given).items()}
    given.pop("quick", None)
    tiny = FOR_TINY if given.get("model", "tiny") == "tiny" else {}
    settings = Settings(**{name: value for name, (value, _) in tiny.items()} | given)
    settings = replace(settings, prompt=tuple(newest_run(settings.model) if p == "newest" else p for p in settings.prompt))
    for name, value in asdict(settings).items():
        values, least = value if isinstance(value, tuple) else (value,), 0 if name in ("seeds", "test_rows") else 1e-9
        if len(set(values)) < len(values) or any(type(x) in (int, float) and not least <= x < math.inf for x in values):
            fail(f"--{name.replace('_', '-')} {text(value)}: numbers are {'at least 0' if least == 0 else 'above 0'} and "
                 "nothing is given twice")
    sources = {entry.name: entry.metadata["help"] for entry in fields(Settings)}
    return settings, sources | {name: why for name, (_, why) in tiny.items()} | dict.fromkeys(given, "given"), quick


def text(value):
    """(10, 20) -> "10 20" """
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def table(name, result, prompts, config, settings):
    """One task's result as text. The paper's figures stand beside the paper's backbone only."""
    test, width = result["test"], max(9, *(len(prompt.name) for prompt in prompts))
    backbone = Path(settings.model).name, config.d_model, config.num_layers, config.gated
    paper = PAPER.get(backbone, {}).get(name, {})
    head = f"{'paper, Table 1':22}" if paper else ""
    lines = [f"{name} on {settings.model}: accuracy in %, {test['rows']:,} of {test['of']:,} test rows, {settings.shots} shots,"
             f" {result['steps']} steps, {result['time']['minutes']:.1f} minutes",
             f"{'prompt':{width}}  untuned  tuned           {head}seconds  rate/step chosen for the seeds {text(settings.seeds)}"]
    for prompt in prompts:
        records, scores = result["tuning"][prompt.name], test["prompts"][prompt.name]
        deviation = f" +- {scores['sample_std']:.1f}" if len(records) > 1 else " (one seed)"
        figure = f"{paper.get('learned' if prompt.phi else prompt.name, ''):22}" if paper else ""
        lines.append(f"{prompt.name:{width}}  {statistics.mean(scores['untuned']):7.1f}  {scores['mean']:5.1f}{deviation:11}{figure}"
                     f"{sum(record['time']['seconds'] for record in records):7.0f}  "
                     + " ".join(f"{record['rate']:g}/{record['step']}" for record in records))
    lines += [f"{'no prompt':{width}}  {test['no_prompt']:7.1f}", f"{'majority':{width}}  {test['majority']:7.1f}",
              "untuned: mean over the seeds; tuned: mean +- sample standard deviation (n - 1) over the seeds"]
    return "\n".join(lines + ["paper: 16 shots, seeds 10 to 50, all test rows"] if paper else lines)


def protocol(argv, result, prompts, settings):
    """What a demonstration left out, the command of the whole protocol, and its minutes at the demonstration's speed."""
    whole, test, steps = replace(settings, **PROTOCOL), result["test"], result["steps"]
    seconds = sum(record["time"]["seconds"] for records in result["tuning"].values() for record in records)
    all_steps = steps // settings.epochs * whole.epochs * len(whole.seeds) * len(whole.rates)
    tests = 2 * len(whole.seeds) * len(prompts) * test["of"] * test["time"]["seconds_per_row"]
    command = ["python", "eval.py", *(word for word in argv if word != "--quick"), "--task", *settings.task]
    command += [] if "--prompt" in argv else ["--prompt", *settings.prompt]
    return (f"This was a demonstration, NOT the protocol: one seed, one rate, {steps} steps, {test['rows']} test rows.\n"
            f"The protocol has 5 seeds, 3 rates, 200 steps: about {(seconds / steps * all_steps + tests) / 60:.0f} minutes "
            f"at this speed\n    {shlex.join(command)}")


def main(argv):
    """Parse, say what will run, tune, test, print and write."""
    began = time.perf_counter()
    settings, sources, quick = parse(argv)
    for name, value in asdict(settings).items():
        print(f"{name:15} {text(value):24} {sources[name]}")
    folders = {name: TINY if TASKS[name].train.startswith("tasks/") else Path(settings.data) for name in settings.task}
    for name, folder in folders.items():
        if not (folder / TASKS[name].test).is_file():                           # asked now, opened after the tuning
            raise InputError(f"task {name}: {folder / TASKS[name].test} is missing: give --data FOLDER, or set SUPMER_DATA")
    model = model_folder(settings.model)
    t5 = load_t5(model, getattr(torch, settings.dtype), pick_device(settings.device))
    tokenizer = load_tokenizer(model, t5.config)
    prompts = [open_prompt(name, t5, settings) for name in settings.prompt]
    for prompt in prompts:
        print(*(f"{key} {value}" for key, value in prompt.about.items()), sep=", ", end="\n" if prompt.about else "")
    stem = "-".join([Path(settings.model).name, *settings.task, *(["quick"] if quick else [])])
    out = Path(settings.out or f"runs/eval/{stem}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    written = {"command": shlex.join(["python", "eval.py", *argv]), "settings": asdict(settings), "tasks": {},
               "prompts": {prompt.name: prompt.about for prompt in prompts},
               "versions": {"python": platform.python_version(), "torch": torch.__version__}}
    for name, folder in folders.items():
        tuning, chosen = tune_task(t5, tokenizer, TASKS[name], folder, prompts, settings)
        test = test_task(t5, tokenizer, TASKS[name], folder, prompts, chosen, settings)
        result = {"tuning": tuning, "test": test, "steps": tuning[prompts[0].name][0]["steps"],
                  "time": {"minutes": (time.perf_counter() - began) / 60}}
        written["tasks"][name] = result
        atomic_write(out, lambda file: file.write(json.dumps(written, indent=1).encode() + b"\n"))
        print("", table(name, result, prompts, t5.config, settings), sep="\n")
    print(f"every seed, rate and validation: {out}")
    if quick:
        print(protocol(argv, result, prompts, settings))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the tasks that were done are written", file=sys.stderr)
        sys.exit(130)
