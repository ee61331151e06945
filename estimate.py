"""Memory, time and disk of a run, estimated before it starts."""

import math
import os
import resource
import time
import weakref
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import corpus
import data
import hub
from baselines import PLAIN, mixes
from common import GIB, InputError
from hub import corpus_paths, fetch_list
from supmer import gradient_and_hessian, init_phi, init_prompt, meta_gradient, prompt_gradient
from t5 import T5, T5Config, count_weights, expected_shapes, load_t5


# --------------------------------------------------------------------- what a run needs, beforehand

# Official shapes (d_model, d_kv, d_ff, layers, heads, gated), to estimate without any download.
SHAPES = {"t5-small": (512, 64, 2048, 6, 8, False), "t5-base": (768, 64, 3072, 12, 12, False),
          "t5-large": (1024, 64, 4096, 24, 16, False), "t5-3b": (1024, 128, 16384, 24, 32, False)}
SHAPES |= {family.format(size): (*shape, True) for size, shape in {
    "small": (512, 64, 1024, 8, 6), "base": (768, 64, 2048, 12, 12),
    "large": (1024, 64, 2816, 24, 16), "xl": (2048, 64, 5120, 24, 32),
    "xxl": (4096, 64, 10240, 24, 64)}.items()
    for family in ("t5-v1_1-{}", "t5-{}-lm-adapt", "flan-t5-{}")}
LIBRARIES = 110 << 20           # measured on shapes of 3 and 6 layers, see the tests


def prepare(training, method, device, control):
    """Say what a run needs, fetches and takes; InputError if that is out of the question. A dry run
    needs no network for an official model, and no machine that could hold it."""
    config = model_shape(training.model)
    needed, too_much = memory_lines(config, training, method, device)
    print(needed)
    if too_much and not control.dry_run:
        raise InputError(too_much)
    try:
        lines = fetch_list(training.model)
    except InputError as error:
        if not control.dry_run:
            raise
        lines = [f"download: {error}"]
    for line in lines:
        print(line)
    if too_much:
        print(f"time:     cannot be measured here: {too_much}")
        return
    how = getattr(torch, training.dtype), device
    t5 = load_t5(hub.model_folder(training.model), *how) if hub.is_local(training.model) else \
        stand_in(config, *how)
    lines, hours = time_lines(t5, training, method)
    print("\n".join(lines))
    long = hours > 1 or not hub.CORPORA.keys().isdisjoint(training.corpus)
    if long and device.type == "cpu" and not (control.yes or control.dry_run):
        raise InputError("there is no GPU here: add --yes to start all the same, "
                         "or begin with the embedded model: python train.py")


def model_shape(name):
    """The T5Config of a model: one of SHAPES, or read."""
    if name not in SHAPES or Path(name).is_dir():
        return hub.model_config(name)
    d, k, f, layers, heads, gated = SHAPES[name]
    return T5Config(d, k, f, layers, layers, heads, hub.OFFICIAL_ROWS, gated, not gated,
                    not gated, 32, 128, 1e-6)


def stand_in(config, dtype, device):
    """A T5 of a shape, with constant weights; on the device "meta" with none."""
    weights = {name: torch.full(shape, 0.01, dtype=dtype, device=device)
               for name, shape in expected_shapes(config).items()}
    return T5(config, {"lm_head.weight": weights["shared.weight"], **weights})


def stand_in_task(d, rows, tokens):
    """A task of `rows` texts of `tokens` tokens, for a T5 of width d."""
    examples = data.Examples([[3] * tokens] * rows, [[]] * rows, torch.zeros(rows, 0, d),
                             torch.zeros(rows, dtype=torch.long), [[3, 4], [3, 5]])
    return data.Task("sp-cluster", (0,), examples, examples)


def rows_of(training, method, tokens):
    """Texts of so many tokens in a micro-batch."""
    return max(1, method.micro_tokens // (training.prompt_length + tokens))


class LiveBytes(TorchDispatchMode):
    """While it is on: the bytes of all tensors that operations have made and that are still used.
    On meta tensors, which have a shape and no data, that tells a computation's memory without
    computing it. known: tensors that are not to be counted. peak: the most bytes at one time."""

    def __init__(self, known):
        super().__init__()
        self.bytes, self.peak = 0, 0
        self.known = {x.untyped_storage()._cdata for x in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        tensors = (x for x in tree_leaves(made) if isinstance(x, torch.Tensor))
        for storage in (x.untyped_storage() for x in tensors):
            if storage._cdata not in self.known:                # a view shares its base's
                self.known.add(storage._cdata)
                self.bytes += storage.nbytes()
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return made

    def _freed(self, key, size):
        self.known.discard(key)
        self.bytes -= size


def micro_batch_bytes(config, training, method):
    """The most bytes of a micro-batch, and of a graph that is kept of one for the Hessian. Counted
    operation by operation, for the longest texts and for texts that just fill one: the
    Hessian-vector product, or the gradient of a mixed one."""
    t5 = stand_in(config, getattr(torch, training.dtype), "meta")
    P, longest, peaks, graphs = training.prompt_length, training.max_tokens, [], []
    theta = torch.empty(P, config.d_model, device="meta")
    rows = rows_of(training, method, longest)
    for rows, tokens in ((rows, longest), (rows + 1, method.micro_tokens // (rows + 1) - P)):
        if tokens > 0:
            task = stand_in_task(config.d_model, rows, tokens)
            with LiveBytes([*t5.weights.values(), theta]) as live:
                prompt_gradient(t5, theta, task.query, method, task.query, 0.5)
                *_, hessian = gradient_and_hessian(t5, theta, task.support,
                                                   replace(method, keep_graphs=1))
                graphs.append(live.bytes)
                hessian(theta)
            peaks.append(live.peak)
    return max(peaks), max(graphs)


def graphs_that_fit(config, training, method):
    """The Method with as many keep_graphs as --keep-gib has room for. InputError if it has none."""
    if not training.keep_gib or method.first_order or training.method in PLAIN:
        return method
    _, graph = micro_batch_bytes(config, training, method)
    if training.keep_gib * GIB < graph:
        raise InputError(f"--keep-gib {training.keep_gib}: a graph takes {graph / GIB:.2g} GiB")
    return replace(method, keep_graphs=int(training.keep_gib * GIB / graph))


def memory_needed(config, training, method):
    """The most bytes that meta-training will hold, part by part -> dict. LIBRARIES is what CPU
    libraries take beside the tensors. The C library's allocator can keep more than is in use: where
    it does, MALLOC_MMAP_THRESHOLD_=65536 in the environment gives it back."""
    peak, graph = micro_batch_bytes(config, training, method)
    kept = min(method.keep_graphs,             # of a support set's micro-batches, at most so many
               math.ceil(training.support / rows_of(training, method, training.max_tokens)))
    learned = 4 * config.d_model * (training.prompt_length + 2 * config.d_model + 2)
    return {"weights": count_weights(config) * getattr(torch, training.dtype).itemsize,
            "micro-batch": peak, f"{kept} kept graphs": kept * graph,
            "theta, phi, Adam's moments, each task's gradients": (4 + training.tasks) * learned,
            "program": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + LIBRARIES}


def memory_lines(config, training, method, device):
    """memory_needed() as text, and what would fit, "" where it does, if the device has less."""
    parts, longest = memory_needed(config, training, method), \
        training.prompt_length + training.max_tokens
    size, total = max(method.micro_tokens, longest), sum(parts.values())
    there = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else \
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fits = int(size * (there - total + parts["micro-batch"]) / parts["micro-batch"])
    advice = f"--micro-tokens {fits}" if fits >= longest else "--dtype bfloat16 or a smaller model"
    sum_of = f"{total / GIB:.1f} GiB with micro-batches of {size} positions"
    return (f"memory:   {sum_of}: " + ", ".join(
                f"{part / GIB:.2f} {name}" for name, part in parts.items() if part),
            f"{training.model} needs {sum_of}, {device} has {there / GIB:.1f}: try {advice}"
            if total > there else "")


def time_lines(t5, training, method):
    """What a run will take, measured on a T5 or on a stand-in of its shape -> lines to print, its
    hours. A set of n micro-batches takes n times as long as one."""
    theta = init_prompt(t5, training.prompt_length, 0)
    phi = init_phi(theta, method)
    ids = torch.full((32, 25), 3, device=theta.device)              # sentences of 25 tokens
    tokens = min(128, training.max_tokens)
    rows = rows_of(training, method, tokens)

    def seconds_of(function, *arguments):
        began = time.perf_counter()
        function(*arguments)
        if theta.is_cuda:
            torch.cuda.synchronize(theta.device)
        return time.perf_counter() - began

    def step(rows):                                                 # of one task, the method's own
        task = stand_in_task(t5.config.d_model, rows, tokens)
        if training.method in PLAIN:
            for examples in (task.support, task.query):
                prompt_gradient(t5, theta, examples, method)
        else:
            lam = 0.5 * mixes(training, method)
            meta_gradient(t5, theta, phi, task, task, lam, 0.5, method)
    step(1)                                                         # the first time is a slow one
    sets = training.tasks * (training.support + training.query) / (2 * rows)
    seconds = seconds_of(step, rows) * sets
    per_token = seconds_of(corpus.embed_sentences, t5, ids, ids > 0) / ids.numel()
    web = [name for name in training.corpus if name in hub.CORPORA]
    text = training.bytes if web else min(training.bytes, sum(
        file.stat().st_size for file in corpus.corpus_files(corpus_paths(training))))
    hours, clustering = seconds * method.steps / 3600, per_token * text / 4 / 3600
    lines = [f"time:     {seconds:.1f} s a step, {hours:,.1f} hours for {method.steps:,} "
             f"steps, measured on this {theta.device.type} with texts of {tokens} tokens",
             f"          {clustering:,.1f} hours before that, to embed and cluster "
             f"{text / 1e9:.3g} GB of text once (4 bytes a token); validation is not counted",
             f"disk:     {0.8 * text / 1e9:.3g} GB for the corpus's sentences in cache/"]
    for name in web:
        count = hub.corpus_count(name, training.bytes)
        lines.append(f"download: {count} file(s) of {name}, about "
                     f"{count * hub.CORPORA[name].archive / 1e9:.1f} GB of archives for "
                     f"{text / 1e9:.3g} GB of text, if not cached yet")
    return lines, hours + clustering
