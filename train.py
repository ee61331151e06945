"""Meta-train a soft prompt and a gradient regularizer on unlabeled text (Alg. 1).

    python train.py                         # the embedded T5 and corpus: a demonstration
    python train.py --model t5-base         # the paper's setting: OpenWebText, 100,000 steps, a GPU
    python train.py --resume runs/tiny-1    # continue after Ctrl-C or a crash, bit by bit
    torchrun --nproc_per_node 4 train.py    # the same run on 4 GPUs (or CPUs)
    python train.py --plot runs/tiny-1      # a run's log as a picture, also while it runs
    python train.py --method ppt            # a baseline of the paper; --ablation: Table 4

A run is a folder, runs/<model>-<number>; see run_folder.py. Its prompt is theta and phi at the
lowest validation loss; eval.py takes it. cache/ keeps each corpus's tokens and clusters.
"""

import json
import math
import os
import signal
import time
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import corpus
import data
import hub
import labeled
import own
import templates
from baselines import (ABLATIONS, METHODS, PLAIN, UNIFIED, examples_per_step, mixes, name_of,
                       ppt_step)
from common import (InputError, bar, interrupt_after, one_process, pick_device, remove_torn, rng,
                    run_script)
from documents import KINDS, SHAPES
from estimate import prepare
from measure import validate
from pictures import plot
from prompts import export_peft, save_prompt
from ranks import SOLO, join_ranks
from report import outcome
from run_folder import (check_free, check_origin, end_run, load_state, new_run, next_free,
                        open_log, own_settings, save_state, write_run)
from settings import from_settings, knob, number, settings_parser, show_settings
from studies import as_many_examples
from supmer import Method, init_prompt, init_state, meta_step
from t5 import load_t5


@dataclass(frozen=True)
class Training(own.OwnTable):
    """A run's settings beside the method's own: data, sizes, when to validate and save."""
    model: str = knob("tiny", "tiny, a name such as flan-t5-xl, a hub id, or a folder", first=True)
    corpus: tuple = knob(("openwebtext",), "openwebtext, c4, embedded, or files and folders of "
                         f"{', '.join(KINDS)}", first=True)
    documents: str = knob("", f"what separates documents: {', '.join(SHAPES)} (else "
                          "blank-lines for .txt, files for .md and .tar)", choices=("", *SHAPES))
    field: str = knob("", "of JSON lines: the one with the text (else paragraphs or text)")
    bytes: int = knob(10 ** 10, "of text to read at most (section 4.1: 10 GB)")
    clusters: int = knob(250, "K-means clusters of each format (Table 6)")
    one_per_format: bool = knob(False, "a clustering for each format, not one for all")
    labeled: str = knob("", "folder of labeled sets (label, text; .csv, .tsv, .jsonl; Table 3)")
    labeled_share: float = knob(1 / 3, "share of labeled tasks (Table 3); 1: no corpus")
    labeled_clusters: int = knob(10, "K-means clusters of each labeled set (MetaPT's)")
    prompt_length: int = knob(100, "P, vectors of the soft prompt (section 4.1)")
    max_tokens: int = knob(412, "text tokens of an example (Table 6: 512 with P)")
    method: str = knob("supmer", "SUPMER or a baseline", choices=tuple(METHODS), first=True)
    variants: tuple = knob(data.PAPER_VARIANTS, "kinds of meta task; hidden is ours",
                           choices=tuple(data.VARIANTS))
    tasks: int = knob(4, "n, tasks in a batch (Table 6)")
    support: int = knob(32, "examples of a support set (Table 6)")
    query: int = knob(32, "examples of a query set (Table 6)")
    seed: int = knob(0, "of the prompt, the clusters and every task", zero=True, first=True)
    validate_every: int = knob(2000, "steps between validations (Table 6)")
    patience: int = knob(0, "stop after N validations without a lower loss; 0: never", zero=True)
    validation_tasks: int = knob(20, "fixed held-out tasks of each variant (ours)")
    save_seconds: float = knob(60.0, "seconds between saved states (ours)", zero=True)
    dtype: str = knob("float32", "of T5's weights", choices=("float32", "bfloat16"), first=True)
    device: str = knob("auto", "auto (a GPU if there is one), cpu, cuda, cuda:1, ...", first=True)


# The embedded T5's values where they differ from the paper's, and why.
TINY_VALUES = {
    "corpus": (("embedded",), "see tiny/README.md"),
    "prompt_length": (20, "its texts have some 30 tokens: 100 vectors would outnumber them"),
    "relative_step": (0.03, "a1 = 0.1 moves it by 1e-4 of its length, see docs/ledger.md"),
    "exact_cosine": (True, "at this relative step v is a poor stand-in, see docs/ledger.md"),
    "prompt_rate": (0.02, "about 0.1 of the embedding table's RMS"),
    "keep_graphs": (99, "all fit into memory, and a step takes a fifth less"),
}
DEMONSTRATION = {"bytes": 500_000, "clusters": 8, "max_tokens": 64, "support": 8, "query": 8,
                 "steps": 10, "validate_every": 10, "validation_tasks": 3}
TINY_VALUES |= {name: (value, "a demonstration") for name, value in DEMONSTRATION.items()}
KNOBS = {entry.name for cls in (Training, Method) for entry in fields(cls)}


# ------------------------------------------------------------------------------- the training loop

class Run:
    """A run: its folder, state, log and best prompt. Every rank has one; the first rank writes."""

    def __init__(self, folder, training, method, t5, sources, made_of, ranks=SOLO):
        """Load the folder's state, or make that of step 0 and validate it.
        sources, made_of: as open_sources() returns them."""
        self.folder, self.training, self.method, self.t5 = folder, training, method, t5
        self.sources, self.made_of, self.ranks = sources, made_of, ranks
        self.advance = ppt_step if training.method in PLAIN else meta_step
        self.best, self.kept = math.inf, 0          # the lowest validation loss, and its step
        self.held_out = [
            draw(source, training.seed, 0, i, variant=variant, stream="validation",
                 split="validation")
            for draw, source in sources
            for variant in source.variants
            for i in range(training.validation_tasks)]
        theta = init_prompt(t5, training.prompt_length, training.seed)
        self.state = init_state(theta, method)
        resumed = ranks.gather((folder / "state.pt").exists())[0]
        if resumed:
            self.best, self.kept = load_state(folder, self.state)
        if not ranks.rank:
            remove_torn(folder)
            self.log = open_log(folder, self.state.step if resumed else -1)
        if not resumed:
            self.validate()
            self.save()

    def batch(self):
        """The step's n (task, partner) pairs: a pure function of (seed, step)."""
        where, pairs = (self.training.seed, self.state.step), []
        for i in range(self.training.tasks):
            chance = rng(*where, i, "labeled").random()
            draw, source = self.sources[-1 if chance < self.training.labeled_share else 0]
            task = partner = draw(source, *where, i)
            if mixes(self.training, self.method):
                partner = draw(source, *where, i, variant=task.variant, stream="partner",
                               avoid=task.clusters)
            pairs.append((task, partner))
        return pairs

    def step(self):
        """Take and log one step of the method -> its log entry."""
        began, pairs = time.perf_counter(), self.batch()
        entry = self.advance(self.t5, self.state, pairs, self.method, self.training.seed,
                             self.ranks)
        seconds = time.perf_counter() - began
        tokens = sum(len(ids) for pair in pairs for task in pair
                     for ids in (*task.support.ids, *task.query.ids))
        entry |= {"time": {"seconds": seconds, "tokens_per_second": tokens / seconds}}
        variants = [task.variant for task, _ in pairs]
        self.write({"step": self.state.step, "variants": variants, **entry})
        return entry

    def finished(self):
        """Are all steps done, or is the lowest validation loss `patience` validations old?"""
        limit = self.training.patience * self.training.validate_every
        step = self.state.step
        return step >= self.method.steps or 0 < limit <= step - self.kept

    def train(self, caught=()):
        """Step until finished or until a rank has `caught` a signal, a list of their numbers; save.
        -> the signal, or None."""
        last, saved, signals = self.method.steps, time.monotonic(), []
        with bar(None, self.ranks.rank > 0, total=last, initial=self.state.step,
                 unit="step") as shown:
            while not (signals or self.finished()):
                entry = self.step()
                shown.set_postfix(loss=f"{entry['query_loss']:.2f}", b=f"{entry.get('b', 0):.2f}",
                                  tokens_s=f"{entry['time']['tokens_per_second']:.0f}")
                shown.update()
                step = self.state.step
                if step == last or step % self.training.validate_every == 0:
                    self.validate()
                signals = sum(self.ranks.gather([*caught]), [])
                late = time.monotonic() - saved > self.training.save_seconds
                if signals or late or self.finished():
                    self.save()
                    saved = time.monotonic()
        self.ranks.gather(None)             # no rank ends before the first one has saved
        return signals[0] if signals and not self.finished() else None

    def validate(self):
        """Measure the held-out tasks and log it; write the prompt if its loss is the lowest yet.
        That is the loss over the full vocabulary, after the inner step (PPT: before). Raises
        InputError for a loss that is not finite, which no comparison would notice."""
        step, plain = self.state.step, self.training.method in PLAIN
        result = validate(self.t5, self.state, self.held_out, self.method, self.ranks)
        before, after = result["loss_before"], result["loss"]
        if not math.isfinite(before + after):
            raise InputError(f"step {step}: the validation loss is {after}; try a smaller "
                             "--inner-rate, --relative-step or --prompt-rate")
        self.write({"step": step, "validation": result})
        change = after / before - 1
        if not (plain or self.ranks.rank) and change > -1e-4:
            advice = "smaller" if change > 1e-4 else "larger"
            option = "--relative-step" if self.method.relative_step else "--inner-rate"
            tqdm.write(f"step {step}: the inner step changes the held-out loss by "
                       f"{100 * change:+.2g} %; it moves the prompt by {result['step_size']:.1e} "
                       f"of its length. Try a {advice} {option}.")
        loss = before if plain else after           # PPT is not learned for an inner step
        if loss < self.best:
            self.best, self.kept = loss, step
            if not self.ranks.rank:
                self.save_prompt()

    def save_prompt(self):
        """Write theta, phi and their origin: what eval.py reads."""
        training, method, step = self.training, self.method, self.state.step
        per_step = examples_per_step(training, method)
        about = {"regularizer": method.regularizer, "model": training.model,
                 "corpus": " ".join(training.corpus), "method": name_of(training, method),
                 "examples": f"{per_step * step} of {per_step * method.steps}",
                 "step": str(step), "steps": str(method.steps), "seed": str(training.seed),
                 "validation_loss": f"{self.best:.6f}", "model_sha256": self.made_of["model"]}
        save_prompt(self.folder / "prompt.safetensors", self.state.theta, self.state.phi, about)

    def save(self):
        """Write all that the next step depends on beside (seed, step)."""
        if not self.ranks.rank:
            save_state(self.folder, self.state, self.best, self.kept)

    def write(self, entry):
        """Append a line to the log; it is on the disk when this returns."""
        if not self.ranks.rank:
            self.log.write(json.dumps(entry) + "\n")
            self.log.flush()
            os.fsync(self.log.fileno())


# ---------------------------------------------------------------------------- what it learns from

def open_sources(training, method, model_folder, tokenizer, t5, ranks=SOLO):
    """What tasks are drawn from: the corpus, then the labeled sets, if they are asked for.
    -> [(meta_task or labeled_task, its index)], {name: fingerprint} of what they are made of."""
    def store_of(what, build, source, clusters, **options):
        began, stages = time.perf_counter(), set()
        with bar(None, ranks.rank > 0) as shown:
            store = build(Path("cache"), source, tokenizer, t5, clusters, training.seed,
                          model=model_folder, ranks=ranks,
                          progress=partial(show_stage, shown, what, stages), **options)
        counts = [f"{count:,} {name}" for name, count in store.meta["counts"].items() if count]
        seconds = f" (made in {time.perf_counter() - began:.1f} s)" if stages else ""
        print(f"{what}: {', '.join(counts)}{seconds}")
        return store
    sources, made_of = [], {}
    sizes = {"support": training.support, "query": training.query,
             "max_tokens": training.max_tokens, "mixing": mixes(training, method)}
    if training.corpus:
        followed = any(data.VARIANTS[name].followed for name in training.variants)
        store = store_of("corpus", corpus.build_store, hub.corpus_paths(training),
                         training.clusters, max_bytes=training.bytes, shape=training.documents,
                         field=training.field, one_per_format=training.one_per_format,
                         followed=followed * (training.support + training.query))
        recast = UNIFIED if training.method == "unified-ppt" else {}
        index = data.TaskIndex(store, tokenizer, variants=training.variants, recast=recast, **sizes)
        sources.append((data.meta_task, index))
        made_of |= store.meta["made_of"]
    if training.labeled:
        stores = {path.name: store_of(path.name, labeled.build_labeled, path,
                                      training.labeled_clusters, table=training,
                                      max_tokens=training.max_tokens)
                  for path in labeled.find_sets(training.labeled)}
        index = labeled.LabeledIndex(stores, tokenizer, **sizes)
        sources.append((labeled.labeled_task, index))
        for name, store in stores.items():
            made_of = store.meta["made_of"] | made_of | {f"labeled {name}": store.folder.name}
    return sources, made_of


def show_stage(shown, what, begun, stage, done, total):
    """Show a stage of a store's making in a bar; say when it begins."""
    if stage not in begun:
        print(f"{what}: {stage} ...")
    begun.add(stage)
    shown.n, shown.total = done, total
    shown.set_description(stage)


# ------------------------------------------------------------------------------------ the settings

def command_line():
    """train.py's Parser: the settings, and what to do with a run."""
    parser = settings_parser(__doc__, (Training, Method), TINY_VALUES)
    add = parser.add_argument
    add("--run", type=Path, help="the new run's folder [runs/<model>-<number>]")
    add("--resume", type=Path, metavar="RUN", help="continue this run")
    add("--dry-run", action="store_true",
        help="only print all settings, memory, time and downloads")
    add("--max-minutes", type=number(float, zero=True), default=0, metavar="N",
        help="stop after N minutes as Ctrl-C does, with status 0 [0: never]")
    add("--yes", action="store_true", help="start a long run without a GPU, too")
    add("--examples", type=number(int), metavar="N",
        help="instead of --steps: as many as draw N examples [as SUPMER in its steps]")
    add("--ablation", choices=ABLATIONS, help="SUPMER without a part (Table 4; first-order: ours)")
    add("--plot", type=Path, metavar="RUN", help="only draw RUN's log as RUN/log.png")
    add("--export-peft", type=Path, nargs=2, metavar=("RUN", "DIR"),
        help="only write RUN's prompt as a folder for Hugging Face PEFT")
    return parser


def parse(argv):
    """Command line -> Training, Method, {setting other than the paper's: why}, all options."""
    options = command_line().parse_args(argv)
    given = {name: value for name, value in vars(options).items() if name in KNOBS}
    if options.resume:
        if given or options.run or options.examples or options.ablation:
            raise InputError("--resume takes the run's own settings: add nothing but --yes, "
                             "--dry-run or --max-minutes")
        return *own_settings(options.resume, Training, Method), {}, options
    tiny = TINY_VALUES if given.get("model", "tiny") == "tiny" else {}
    usual = METHODS[given.get("method", "supmer")]
    ablated = ABLATIONS.get(options.ablation, {})       # above what is given: it always holds
    values = {name: value for name, (value, _) in tiny.items()} | usual | given | ablated
    training, method = from_settings(Training, values), from_settings(Method, values)
    if not training.labeled:
        own.refuse_unread(training)
        if training.method == "metapt":
            raise InputError("--method metapt learns from labeled sentiment: give --labeled FOLDER")
    elif training.method == "unified-ppt":
        raise InputError("--method unified-ppt does not recast labeled sets: leave --labeled away")
    elif training.labeled_share >= 1:
        training = replace(training, corpus=())
    whys = {name: why for name, (_, why) in tiny.items()}
    whys |= dict.fromkeys(usual, f"of {training.method}") | dict.fromkeys(given, "given")
    whys |= dict.fromkeys(ablated, f"of {options.ablation}")
    if options.examples or "steps" not in given:
        method = as_many_examples(training, method, options.examples)
    return training, method, whys, options


# ------------------------------------------------------------------------------------- the script

def main(argv):
    """Do what the command line asks -> exit status."""
    training, method, whys, options = parse(argv)
    if options.plot or options.export_peft:
        print(plot(options.plot) if options.plot else export_peft(*options.export_peft))
        return 0
    if options.run:
        check_free(options.run)                             # now, not after the corpus is read
    interrupt_after(options.max_minutes)    # before the first step it stops at once, then after one
    device = pick_device(training.device)
    ranks = join_ranks(device)
    if ranks.world > training.tasks:
        raise InputError(f"{ranks.world} processes share the {training.tasks} tasks of a step: "
                         f"start fewer, or give --tasks {ranks.world}")
    show_settings([training, method], whys, options.dry_run)
    if options.dry_run or training.model != "tiny" and not (options.resume or ranks.rank):
        method = prepare(training, method, device, options)
    method = ranks.gather(method)[0]
    if options.dry_run:
        return 0
    model_folder = hub.model_folder(training.model)
    t5 = load_t5(model_folder, getattr(torch, training.dtype), device)
    tokenizer = templates.load_tokenizer(hub.tokenizer_file(model_folder), t5.config)
    sources, made_of = open_sources(training, method, model_folder, tokenizer, t5, ranks)
    folder = options.resume or options.run or next_free(training.model, name_of(training, method))
    folder = ranks.gather(folder)[0]
    print(f"run:    {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    with nullcontext() if ranks.rank else one_process(folder):
        if options.resume:
            check_origin(folder, made_of)
        elif not ranks.rank:
            check_free(folder)
            write_run(folder, new_run(argv, training, method, made_of, ranks.world))
        run = Run(folder, training, method, t5, sources, made_of, ranks)
        return finish(run, run.train(catch_signals()))


def catch_signals():
    """From here on SIGINT, SIGTERM and SIGALRM only append their numbers to the list returned."""
    caught = []
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(name, lambda number, frame: caught.append(number))
    return caught


def finish(run, caught):
    """Write down that the run is finished, or say how to resume it -> exit status."""
    if caught:
        print(f"stopped after step {run.state.step}, nothing is lost; resume with: "
              f"python train.py --resume {run.folder}")
        return 0 if caught == signal.SIGALRM else 128 + caught
    if not run.ranks.rank:
        end_run(run.folder)
        print(outcome(run.folder, run.training.model, run.best))
    return 0


if __name__ == "__main__":
    run_script(main, "stopped before another step; nothing is lost: give the same command again, "
                     "or --resume RUN for a run that has a name")
