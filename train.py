"""Meta-train a soft prompt and a gradient regularizer on unlabeled text (Alg. 1).

    python train.py                         # the embedded T5 and corpus: a demonstration, 2 minutes
    python train.py --model t5-base         # the paper's setting: OpenWebText, 100,000 steps, a GPU
    python train.py --corpus my/texts       # your text; --help lists every number with its source
    python train.py --resume runs/tiny-1    # go on after Ctrl-C or a crash, bit by bit the same run
    torchrun --nproc_per_node 4 train.py    # the same on 4 GPUs (or CPUs); all its options hold
    python train.py --plot runs/tiny-1      # a run's log as a picture, also while it runs
    python train.py --method ppt            # what it is compared with; --ablation no-mgr: Table 4

All of a run is in one folder, runs/<model>-<number>: run.json (what was asked for), log.jsonl (a
line a step), state.safetensors (to resume from) and prompt.safetensors (theta and phi at the lowest
validation loss: what eval.py takes). A corpus's tokens and clusters are kept in cache/.
"""

import argparse
import json
import math
import os
import platform
import resource
import shlex
import signal
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tqdm import tqdm

import common
import corpus
import data
import hub
import tasks
from baselines import (ABLATIONS, METHODS, PLAIN, UNIFIED, examples_per_step, mixes, name_of, ppt_step)
from common import (InputError, LONGEST, SOLO, atomic_write, bar, check_knob, join_ranks, knob, knob_parser,
    option, pick_device, read_log, read_run, run_script)
from data import TaskIndex, VARIANTS, meta_task
from estimate import prepare
from hub import corpus_paths
from prompts import export_peft, prompt_metadata, save_prompt
from studies import plot
from supmer import Method, REGULARIZERS, init_prompt, init_state, meta_step, validate_task
from t5 import load_t5
from tasks import LabeledIndex, labeled_task


@dataclass(frozen=True)
class Training:
    """What a run needs beside the method's numbers: data, sizes, when to validate and save."""
    model: str = knob("tiny", "tiny, a short name such as flan-t5-xl, a hub id, or a T5's folder")
    corpus: tuple = knob(
        ("openwebtext",), "openwebtext, c4, embedded, or files and folders of "
        f"{', '.join(corpus.READERS)}")
    bytes: int = knob(10 ** 10, "text read at most (section 4.1: 10 GB)")
    clusters: int = knob(250, "K-means clusters of each format (Table 6)")
    one_per_format: bool = knob(False, "three clusterings, one for each format, not one for all")
    labeled: str = knob("", "a folder of labeled sets (label, text; .csv, .tsv, .jsonl), each of "
                            "which is clustered into meta tasks (Table 3)")
    labeled_share: float = knob(1 / 3, "of the tasks, if there are labeled sets (Table 3: 1 : 2); "
                                       "1: no corpus is used")
    labeled_clusters: int = knob(10, "K-means clusters of each labeled set (MetaPT's)")
    prompt_length: int = knob(100, "P, vectors of the soft prompt (section 4.1)", most=LONGEST)
    max_tokens: int = knob(412, "text tokens of an example (Table 6: 512 with the prompt)",
                           most=10 ** 5)
    method: str = knob("supmer", "supmer, or what it is compared with: ppt, unified-ppt, metapt")
    only: str = knob("", "sp, mc or ss: tasks of this format alone (Table 4)")
    tasks: int = knob(4, "n, tasks in a batch (Table 6)")
    support: int = knob(32, "examples of a support set (Table 6)")
    query: int = knob(32, "examples of a query set (Table 6)")
    seed: int = knob(0, "of the prompt, the clusters and every task", zero=True)
    validate_every: int = knob(2000, "steps between validations (Table 6)")
    patience: int = knob(0, "stop after so many validations without a lower loss; 0: never",
                         zero=True)
    validation_tasks: int = knob(20, "fixed held-out tasks of each variant (ours)")
    save_seconds: float = knob(60.0, "seconds between saved states (ours)", zero=True)
    dtype: str = knob("float32", "of the frozen T5: float32 or bfloat16 (theta and phi: float32)")
    device: str = knob("auto", "auto, cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")


# What the embedded T5 takes instead of the paper's numbers, and why.
TINY_VALUES = {
    "corpus": (("embedded",), "see tiny/README.md"),
    "bytes": (2_500_000, "half of it: the store is then made in under half a minute"),
    "clusters": (16, "so that the held-out documents still fill clusters of 32 sentences"),
    "prompt_length": (20, "its texts have some 30 tokens: 100 vectors would outnumber them"),
    "max_tokens": (64, "a demonstration: short examples are quick"),
    "support": (16, "a demonstration"),
    "query": (16, "a demonstration"),
    "relative_step": (0.03, "a1 = 0.1 moves this prompt by 1e-4 of its length, see README.md"),
    "exact_cosine": (True, "at this relative step v is a poor stand-in, see README.md"),
    "prompt_rate": (0.02, "about 0.1 of the embedding table's RMS"),
    "steps": (30, "a demonstration"),
    "validate_every": (15, "twice in the demonstration"),
    "validation_tasks": (2, "a demonstration; the paper-scale 20 makes figures steadier"),
}


# ------------------------------------------------------------------------------- the training loop

class Run:
    """A run's folder and what it holds: the log, the state, the best prompt. Ranks share its work,
    and the first one writes."""

    def __init__(self, folder, training, method, t5, index, labeled=None, made_of=None, ranks=SOLO):
        """Take up the folder's saved state, or make and validate that of step 0."""
        self.folder, self.training, self.method, self.ranks = folder, training, method, ranks
        self.t5, self.best, self.kept = t5, float("inf"), 0
        self.advance = ppt_step if training.method in PLAIN else meta_step
        self.made_of = made_of or index.store.meta["made_of"]
        self.sources = [(draw, source) for draw, source in (
            (meta_task, index), (labeled_task, labeled)) if source]
        theta = init_prompt(t5, training.prompt_length, training.seed)
        self.state = init_state(theta, method)
        self.held_out = [draw(source, training.seed, 0, i, variant=variant, stream=3,
                              split="validation") for draw, source in self.sources
                         for variant in source.variants for i in range(training.validation_tasks)]
        resumed = ranks.gather((folder / "state.safetensors").exists())[0]
        if resumed:
            self.best = load_state(folder, self.state)
            step = prompt_metadata(folder / "prompt.safetensors").get("step", "")
            if not step.isdecimal():
                raise InputError(f"{folder / 'prompt.safetensors'} is not this run's: start a new "
                                 "run")
            self.kept = int(step)
        if not ranks.rank:
            for torn in folder.glob(".*.tmp"):                          # a kill cut it off
                torn.unlink()
            self.log = open_log(folder, self.state.step if resumed else -1)
        if not resumed:
            self.validate()
            self.save()

    def batch(self):
        """The step's n (task, partner) pairs, of one variant each: made from (seed, step) alone."""
        where, pairs = (self.training.seed, self.state.step), []
        for i in range(self.training.tasks):
            chance = np.random.default_rng((*where, i, 4)).random()
            draw, source = self.sources[-1 if chance < self.training.labeled_share else 0]
            task = draw(source, *where, i, stream=1)
            pairs.append((task, draw(source, *where, i, variant=task.variant, stream=2, avoid=(
                task.clusters)) if mixes(self.training, self.method) else task))
        return pairs

    def step(self):
        """One step of the method, logged -> its log entry."""
        began, pairs = time.perf_counter(), self.batch()
        entry = self.advance(self.t5, self.state, pairs, self.method, self.training.seed,
                             self.ranks)
        seconds = time.perf_counter() - began
        tokens = sum(len(ids) for pair in pairs for task in pair
                     for ids in (*task.support.ids, *task.query.ids))
        entry |= {"time": {"seconds": seconds, "tokens_per_second": tokens / seconds}}
        self.write({"step": self.state.step, "variants": [task.variant for task, _ in pairs],
                    **entry})
        return entry

    def train(self):
        """Step until all are done, the end of patience or, on any rank, SIGINT, SIGTERM or SIGALRM:
        end the step, save -> the signal, or None."""
        caught, saved, last = [], time.monotonic(), self.method.steps
        stopped, ended = [], self.out_of_patience()         # stopped: what any rank has caught
        before = {number: signal.signal(number, lambda number, frame: caught.append(number))
                  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
        with bar(None, self.ranks, total=last, initial=self.state.step, unit="step") as shown:
            while self.state.step < last and not stopped and not ended:
                entry = self.step()
                figures = {"loss": entry["query_loss"], **{k: entry[k] for k in "sb" if k in entry}}
                shown.set_postfix({name: f"{value:.2f}" for name, value in figures.items()},
                                  tokens_s=f"{entry['time']['tokens_per_second']:.0f}")
                shown.update()
                step = self.state.step
                if step == last or step % self.training.validate_every == 0:
                    self.validate()
                    ended = self.out_of_patience()
                stopped = sum(self.ranks.gather(caught), [])
                late = time.monotonic() - saved > self.training.save_seconds
                if step == last or ended or stopped or late:
                    self.save()
                    saved = time.monotonic()
        self.ranks.gather(None)                     # none ends before the first one has saved
        for number, handler in before.items():
            signal.signal(number, handler)
        return stopped[0] if stopped and self.state.step < last and not ended else None

    def out_of_patience(self):
        """Whether the lowest validation loss is `patience` validations old."""
        limit = self.training.patience * self.training.validate_every
        return 0 < limit <= self.state.step - self.kept

    def validate(self):
        """Measure the held-out tasks, log it, keep theta and phi if their loss is the lowest.
        InputError for a loss that is not finite: it would compare as neither lower nor higher."""
        training, state = self.training, self.state
        result = validate(self.t5, state, self.held_out, self.method, self.ranks)
        loss, before = result["loss"], result["loss_before"]
        if not math.isfinite(loss + before):
            raise InputError(f"step {state.step}: the validation loss is {loss}; "
                             "try a smaller inner_rate, relative_step or prompt_rate")
        self.write({"step": state.step, "validation": result})
        if training.method in PLAIN:            # not learned for an inner step: without one
            loss = before
        elif not self.ranks.rank and before - loss < 1e-4 * before:
            tqdm.write(f"step {state.step}: the inner step lowers the held-out loss by less than "
                       f"1e-4 of it; it moves the prompt by {result['step_size']:.1e} of its "
                       "length. See --relative-step and --inner-rate.")
        if loss < self.best:
            self.best, self.kept = loss, state.step
            if not self.ranks.rank:
                self.save_prompt()

    def save_prompt(self):
        """Write theta, phi and where they come from: what eval.py takes."""
        training, method, step = self.training, self.method, self.state.step
        per_step = examples_per_step(training, method)
        save_prompt(self.folder / "prompt.safetensors", self.state.theta,
                    self.state.phi, {"regularizer": method.regularizer,
            "model": training.model, "corpus": " ".join(training.corpus),
            "method": name_of(training, method),
            "examples": f"{per_step * step} of {per_step * method.steps}",
            "step": str(step), "steps": str(method.steps), "seed": str(training.seed),
            "validation_loss": f"{self.best:.6f}", "model_sha256": self.made_of["model"]})

    def save(self):
        """Write all that the next step depends on, and the lowest validation loss so far."""
        numbers = {"s": self.state.s, "step": self.state.step, "best": self.best}
        tensors = state_tensors(self.state) | {name: torch.tensor(x, dtype=torch.float64)
                                               for name, x in numbers.items()}
        if not self.ranks.rank:
            payload = save({name: x.detach().cpu().contiguous() for name, x in tensors.items()})
            atomic_write(self.folder / "state.safetensors", lambda file: file.write(payload))

    def write(self, entry):
        """Append a line to the log; it is on the disk when this returns."""
        if not self.ranks.rank:
            self.log.write(json.dumps(entry) + "\n")
            self.log.flush()
            os.fsync(self.log.fileno())


def validate(t5, state, tasks, method, ranks=SOLO):
    """Adapt to each held-out task and measure its query set, before and after -> dict of means.
    "loss" is the loss after adaptation, which decides what is kept; "variants" has the figures of
    each variant ("correct" as a share, "ways" its label words). The ranks share the tasks."""
    own, found, size = {}, defaultdict(list), len(tasks[0].query.ids)
    for place, task in ranks.share(enumerate(bar(tasks, ranks, desc="validation", unit="task"))):
        result = validate_task(t5, state.theta, state.phi, task, method)
        own[place] = {f"{key}_{when}": result[when][key] / (size if key == "correct" else 1)
                      for when in ("before", "after") for key in result[when]}
        own[place] |= {"step_size": result["step_size"], "ways": len(task.query.words)}
    results = {place: result for part in ranks.gather(own) for place, result in part.items()}
    for place, task in enumerate(tasks):
        found[task.variant].append(results[place])

    def means(results):
        return {key: sum(result[key] for result in results) / len(results) for key in results[0]}
    everything = means(sum(found.values(), []))
    return {"loss": everything["loss_after"], "loss_before": everything["loss_before"],
            "step_size": everything["step_size"], "queries": size * len(tasks),
            "variants": {variant: means(results) for variant, results in found.items()}}


# ------------------------------------------------------------------------------ a run on the disk

def check_free(folder):
    """InputError if a new run's folder holds more than a kill leaves before run.json is there."""
    if {*folder.glob("*")} - {*folder.glob(".run.json.*.tmp")} or folder.is_file():
        raise InputError(f"{folder} exists: name another --run, or go on with --resume {folder}")


def new_run(argv, training, method, made_of, wanted, processes=1):
    """Make the folder `wanted`, or the next free runs/<model>-<number>, with its run.json. What is
    not SUPMER has its name_of in the folder's name."""
    name = name_of(training, method)
    stem = "-".join([Path(training.model).name, *[name] * (name != "supmer")])
    for folder in [wanted] if wanted else (Path(f"runs/{stem}-{n}") for n in range(1, 10 ** 6)):
        try:
            check_free(folder)
            folder.mkdir(parents=True, exist_ok=bool(wanted))
            break
        except (InputError, FileExistsError):
            if wanted:
                raise
    write_run(folder, {
        "model": training.model, "name": name,
        "training": asdict(training), "method": asdict(method),
        "made_of": made_of, "command": shlex.join(["python", "train.py", *argv]),
        "processes": processes, "threads": torch.get_num_threads(),
        "finished": False, "ended": None,
        "versions": {"python": platform.python_version(), **{
            used: version(used) for used in ("torch", "numpy", "tokenizers", "safetensors")}}})
    return folder


def write_run(folder, values):
    """Write run.json."""
    text = json.dumps(values, indent=1) + "\n"
    atomic_write(folder / "run.json", lambda file: file.write(text.encode()))


def check_origin(folder, made_of):
    """Raise InputError if the run in the folder was made of something else than made_of, the
    fingerprints of corpus, model and tokenizer and the store's options."""
    kept = read_run(folder).get("made_of", {})
    other = [key for key in made_of if kept.get(key) != made_of[key]]
    if other:
        raise InputError(f"{folder} was made with another {' and '.join(other)} than is there now: "
                         "start a new run, or put back what it was made with")


def state_tensors(state):
    """Every tensor of a MetaState by name; Adam's only exist after the first step."""
    parameters = {"theta": state.theta, **{f"phi.{name}": x for name, x in state.phi.items()}}
    adam = {f"adam.{name}.{key}": value for name, x in parameters.items()
            for optimizer in (state.theta_adam, state.phi_adam) if x in optimizer.state
            for key, value in optimizer.state[x].items()}
    return parameters | adam


def load_state(folder, state):
    """Fill a fresh MetaState from Run.save()'s file -> the lowest validation loss so far. Raises
    InputError if the file is damaged or of a run with other shapes."""
    path = folder / "state.safetensors"
    try:
        saved = load_file(path)
        if not all(x.is_floating_point() and x.float().isfinite().all() for x in saved.values()):
            raise ValueError("it holds values that are not finite")
        state.s, step, best = (saved.pop(name).item() for name in ("s", "step", "best"))
        state.step = int(step)
        if not (-1 <= state.s <= 1 and state.step == step >= 0):
            raise ValueError(f"it is of step {step}, s {state.s}")
        if state.step:          # a step of nothing makes Adam's tensors; phi may have none
            for name, x in state_tensors(state).items():
                x.grad = torch.zeros_like(x) if f"adam.{name}.step" in saved else None
            for optimizer in (state.theta_adam, state.phi_adam):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        targets = state_tensors(state)
        if {name: x.shape for name, x in saved.items()} != {n: x.shape for n, x in targets.items()}:
            raise ValueError("it holds other tensors than this run")
        for name, x in targets.items():
            x.copy_(saved[name])
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} cannot be resumed from ({error}): start a new run") from None
    return best


def open_log(folder, last_step):
    """log.jsonl, a line a step and a validation, to append to: lines up to last_step are kept,
    later ones dropped (they will come again). What differs between equal runs is in "time"."""
    path = folder / "log.jsonl"
    kept = [line for line, entry in read_log(folder) if entry["step"] <= last_step]
    atomic_write(path, lambda file: file.writelines(kept))
    return open(path, "a", encoding="utf-8")


def make_store(what, make, ranks):
    """make(progress) -> a store (found in cache/, or made with a bar for each stage), of which is
    told what is in it and, also when it is stopped, how fast its stages were."""
    stages, nothing, last = {}, (0, 0, 0, 0.0), time.perf_counter()
    with bar(None, ranks) as shown:
        def progress(stage, now, total):
            nonlocal last
            if stage not in stages:
                print(f"{what}: {stage} ...")
            began, _, _, seconds = stages.get(stage, (now, *nothing[1:]))
            stages[stage] = began, now, total, seconds + time.perf_counter() - last
            last, shown.n, shown.total = time.perf_counter(), now, total
            shown.set_description(stage)
        try:
            store = make(progress)
        finally:
            _, text, _, _ = stages.get("reading text, bytes", nothing)
            _, _, n, _ = stages.get("assigning clusters", nothing)
            for stage, (began, now, total, seconds) in stages.items():
                size = (now - began) * (text / n if total and n else 1) / 1e6
                speed = f", {size:.3g} MB of text, {size / seconds:.3g} MB/s"
                if size:                # of sentences only when it is known how many bytes they are
                    print(f"        {stage}: {now:,} done in {seconds:.1f} s" + (
                        speed if n or not total else ""))
    counts = ", ".join(f"{count:,} {name}" for name, count in store.meta["counts"].items())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{what}: {counts}\n        kept in {store.folder}; this process took {peak:,.0f} MB of "
          "memory so far")
    return store


def open_indexes(training, method, model_folder, tokenizer, t5, ranks=SOLO):
    """The corpus -> TaskIndex, or None; the labeled sets -> LabeledIndex, or None; made_of, what
    both are made of."""
    def store_of(what, build, source, clusters, **how):
        return make_store(what, lambda progress: build(
            Path("cache"), source, tokenizer, t5, clusters, training.seed, model=model_folder,
            progress=progress, ranks=ranks, **how), ranks)
    index, labeled, made_of = None, None, {}
    sizes = {name: getattr(training, name) for name in ("support", "query", "max_tokens")}
    sizes |= {"mixing": mixes(training, method)}
    if training.labeled:
        files = [path for path in sorted(Path(training.labeled).glob("*"))
                 if path.suffix in (".csv", ".tsv", ".jsonl")]
        if not files:
            raise InputError(f"--labeled {training.labeled}: no folder with .csv, .tsv or .jsonl")
        stores = {path.name: store_of(path.name, tasks.build_labeled, path,
                                      training.labeled_clusters) for path in files}
        labeled = LabeledIndex(stores, tokenizer, **sizes)
        for name, store in stores.items():
            made_of |= store.meta["made_of"] | {f"labeled {name}": store.folder.name}
    if training.corpus:
        store = store_of("corpus", corpus.build_store, corpus_paths(training), training.clusters,
                         max_bytes=training.bytes, one_per_format=training.one_per_format)
        index = TaskIndex(store, tokenizer, **sizes,
                          variants=[v for v in VARIANTS if v.startswith(training.only)],
                          recast=UNIFIED if training.method == "unified-ppt" else {})
        made_of |= store.meta["made_of"]
    return index, labeled, made_of


# ------------------------------------------------------------------------------------- the script

def main(argv):
    """Say what will run, run it, say what came out -> exit status."""
    training, method, sources, control = parse(argv)
    if control.export_peft or control.plot:
        print(export_peft(*control.export_peft) if control.export_peft else plot(control.plot))
        return 0
    folder = control.resume
    if folder and read_run(folder)["finished"]:
        raise InputError(f"{folder} is finished already: start a new run")
    if control.run:
        check_free(control.run)                             # now, not after the corpus is read
    # --max-minutes is a Ctrl-C to come: it ends what is before the first step, then only steps.
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, min(60 * control.max_minutes, 1e9))
    device = pick_device(training.device)
    ranks = join_ranks(device)
    if control.dry_run or training.model != "tiny" and not (folder or ranks.rank):
        prepare(training, method, device, control)
    if control.dry_run:
        return 0
    for name, value in (asdict(training) | asdict(method)).items():
        shown = " ".join(value) if type(value) is tuple else str(value)
        print(f"  {name:17} {shown:12} {sources[name]}")
    model_folder = hub.model_folder(training.model)
    t5 = load_t5(model_folder, getattr(torch, training.dtype), device)
    tokenizer = data.load_tokenizer(hub.tokenizer_file(model_folder), t5.config)
    index, labeled, made_of = open_indexes(training, method, model_folder, tokenizer, t5, ranks)
    if folder:
        check_origin(folder, made_of)
    elif ranks.rank == 0:
        folder = new_run(argv, training, method, made_of, control.run, ranks.world)
    folder = ranks.gather(folder)[0]
    print(f"run:    {folder}")

    def in_use(owner):
        raise InputError(f"{folder}: process {owner} is at work on this run; wait for it, or end "
                         "it")
    with nullcontext() if ranks.rank else common.lock(folder / "lock", in_use):
        run = Run(folder, training, method, t5, index, labeled, made_of, ranks)
        interrupted = run.train()
    signal.setitimer(signal.ITIMER_REAL, 0)
    if interrupted:
        print(f"stopped after step {run.state.step}, nothing is lost; "
              f"go on with: python train.py --resume {folder}")
        return 0 if interrupted == signal.SIGALRM else 128 + interrupted
    if not ranks.rank:
        write_run(folder, read_run(folder) | {"finished": True, "ended": time.time()})
        print(outcome(run))
    return 0


def outcome(run):
    """The validations at step 0 and at the end, a row for each variant, and what to do next."""
    first, *_, last = [line["validation"] for _, line in read_log(run.folder)
                       if "validation" in line] * 2
    said = [f"{last['queries']} held-out queries: accuracy in %, loss over the label words",
            f"{'':17}step 0, unadapted -> adapted    step {run.state.step}, unadapted -> adapted"]
    for variant in last["variants"]:
        cells = [" -> ".join(f"{100 * v[f'correct_{when}']:5.1f} {v[f'word_loss_{when}']:6.3f}"
                             for when in ("before", "after"))
                 for v in (first["variants"][variant], last["variants"][variant])]
        chance = f"(chance {100 / last['variants'][variant]['ways']:.0f})"
        said.append(f"{variant:11}{chance:>12}  {cells[0]}    {cells[1]}")
    if run.training.model == "tiny" and run.training.corpus:
        said.append("(of documents that the embedded T5's own training did not see either; it knew "
                    "such\ntasks, see tiny/README.md)")
    steps = run.method.steps
    if run.training.model == "tiny" and steps == TINY_VALUES["steps"][0]:
        said.append(f"this was a demonstration of {steps} steps; README.md has a longer run")
    return "\n".join([*said, f"lowest validation loss {run.best:.4f}: {run.folder}/prompt."
                      f"safetensors\ntune it on a task: python eval.py --prompt {run.folder}"])


def command_line():
    """train.py's ArgumentParser: the knobs, and what is to be done with a run."""
    parser = knob_parser(__doc__, (Training, Method), TINY_VALUES, {"method": tuple(METHODS),
                                                                    "regularizer": REGULARIZERS})
    parser.add_argument("--examples", type=int, help="instead of --steps: as many as draw so many "
                        "examples [as SUPMER would in its steps]")
    parser.add_argument("--ablation", choices=ABLATIONS, help="SUPMER without a part (Table 4; "
                        "first-order: ours)")
    parser.add_argument("--run", type=Path, help="the new run's folder [runs/<model>-<number>]")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with this run")
    parser.add_argument("--yes", action="store_true", help="start a long run without a GPU as well")
    parser.add_argument("--dry-run", action="store_true",
                        help="only say what would be fetched, the memory and the time")
    parser.add_argument("--max-minutes", type=float, default=math.inf,
                        help="stop so many minutes from now, as Ctrl-C does")
    parser.add_argument("--export-peft", type=Path, nargs=2, metavar=("RUN", "DIR"), help="only "
                        "write RUN's prompt as a folder for Hugging Face PEFT")
    parser.add_argument("--plot", type=Path, metavar="RUN", help="only draw RUN's log as a PNG: "
                        "losses, s, b, lambda, the gate, validation (needs matplotlib)")
    return parser


def parse(argv):
    """Command line -> Training, Method, {number: where its value comes from}, the other options."""
    given = vars(command_line().parse_args(argv))
    control = argparse.Namespace(**{name: given.pop(name) for name in given.keys() - KNOBS.keys()})
    if not control.max_minutes > 0:
        raise InputError(f"--max-minutes {control.max_minutes}: it must be more than 0")
    sources = {name: entry.metadata["help"] for name, entry in KNOBS.items()}
    others = [control.run, control.resume, control.examples, control.ablation, control.dry_run]
    if (control.export_peft or control.plot) and (
            given or any(others) or control.export_peft and control.plot):
        raise InputError("--export-peft and --plot are of a run that is there: add nothing to them")
    if control.resume:
        if given or control.run or control.examples or control.ablation:
            raise InputError("--resume goes on with the run's own numbers: add nothing but --yes, "
                             "--dry-run or --max-minutes")
        return *own_settings(control.resume), dict.fromkeys(sources, "the run's own"), control
    tiny = TINY_VALUES if given.get("model", "tiny") == "tiny" else {}
    preset = METHODS[given.get("method", "supmer")] | ABLATIONS.get(control.ablation, {})
    if control.ablation and given.keys() & (preset.keys() | {"method"}):
        raise InputError(f"--ablation {control.ablation} is SUPMER with {preset}: leave those "
                         "options away")
    training, method = settings({name: value for name, (value, _) in tiny.items()} | preset | given)
    for name, without, vain in (
            ("inner_rate", f"--relative-step {method.relative_step}", method.relative_step > 0),
            ("labeled_share", "no --labeled", not training.labeled),
            ("labeled_clusters", "no --labeled", not training.labeled)):
        if vain and name in given:
            raise InputError(f"{option(name)} has no effect with {without}: change one of the "
                             "two")
    method = as_many_examples(training, method, control.examples, "steps" in given)
    return training, method, (
        sources | {name: why for name, (_, why) in tiny.items()}
        | dict.fromkeys(preset, f"of {control.ablation or given.get('method')}")
        | dict.fromkeys(given, "given")), control


def own_settings(folder):
    """A run's Training and Method. InputError if this version cannot take them."""
    values = read_run(folder)
    try:
        return settings(values["training"] | values["method"])
    except InputError as error:
        raise InputError(f"{folder}/run.json: {error}; start a new run") from None


def as_many_examples(training, method, examples, steps_given):
    """The Method with the steps that draw `examples`; without those, and without --steps, as many
    as SUPMER would draw in the steps that are there. InputError for both."""
    if examples is not None and (examples < 1 or steps_given):
        raise InputError(f"--examples {examples}: give more than 0, without --steps")
    if steps_given:
        return method
    examples = examples or method.steps * examples_per_step(
        replace(training, method="supmer"), replace(method, augmentation=True))
    return replace(method, steps=math.ceil(examples / examples_per_step(training, method)))


KNOBS = {entry.name: entry for cls in (Training, Method) for entry in fields(cls)}


def settings(chosen):
    """{number: value} -> (Training, Method). Raises InputError for values that make no sense."""
    if not chosen.keys() <= KNOBS.keys():
        raise InputError(f"{sorted(chosen.keys() - KNOBS.keys())}: this version has no such "
                         "options")
    chosen = {name: tuple(value) if isinstance(value, list) else value      # as JSON has tuples
              for name, value in chosen.items()}
    for name, value in chosen.items():
        check_knob(KNOBS[name], value)
    training, method = (cls(**{entry.name: chosen[entry.name] for entry in fields(cls)
                               if entry.name in chosen}) for cls in (Training, Method))
    for wrong, why in (
            (training.only not in ("", *data.FORMATS),
             f"--only {training.only}: choose {', '.join(data.FORMATS)}"),
            (training.method == "unified-ppt" and training.labeled,
             "--method unified-ppt does not recast labeled sets: leave --labeled away"),
            (training.labeled_share > 1,
             f"--labeled-share {training.labeled_share}: it must be 1 at most"),
            (training.method == "metapt" and not training.labeled,
             "--method metapt learns from labeled sentiment: give --labeled FOLDER"),
            (training.dtype not in ("float32", "bfloat16"),
             f"--dtype {training.dtype}: choose float32 or bfloat16")):
        if wrong:
            raise InputError(why)
    if training.labeled and training.labeled_share == 1:
        training = replace(training, corpus=())
    return training, method


if __name__ == "__main__":
    run_script(main, "stopped before another step was done; nothing is lost: the same command goes "
                     "on, or --resume RUN where a run was named")
