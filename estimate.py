"""Memory, time and disk of a run, estimated before it starts.

Memory is counted on meta tensors, which have shapes and no data; time is measured.
"""

import math
import os
import resource
import time
import weakref
from dataclasses import replace
from functools import cache

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import corpus
import data
import hub
import supmer
from baselines import PLAIN, mixes
from common import GIB, InputError
from documents import corpus_files
from shapes import model_shape, stand_in

LIBRARIES = 110 << 20       # bytes that CPU libraries hold beside the tensors, measured


def prepare(training, method, device, control):
    """Print what a run needs -> the Method: it keeps all graphs if they fit easily.

    control: train.py's options. Raises InputError if the memory is missing, or for a long run on a
    CPU without --yes. A dry run only prints, whatever the machine and the network."""
    config = model_shape(training.model)
    fresh = training.model != "tiny" and not control.resume
    if fresh and device.type == "cpu" and not hasattr(control, "micro_tokens"):
        method = replace(method, micro_tokens=512)
        print("micro-batches: of 512 positions, which fit a CPU's cache: a quarter less time")
    if fresh and not hasattr(control, "keep_graphs"):
        everything = replace(method, keep_graphs=training.support)
        needed = sum(memory_needed(config, training, everything).values())
        if needed < free_bytes(device) / 2:
            method = everything
            print("graphs:   all are kept, which saves a pass: half of the memory holds them")
    line, lacking = memory_line(config, training, method, device)
    print(line)
    if lacking and not control.dry_run:
        raise InputError(lacking)
    for line in hub.fetch_list(training.model):
        print(line)
    if lacking:
        print(f"time:     cannot be measured: {lacking}")
        return method
    t5 = stand_in(config, getattr(torch, training.dtype), device)
    hours = print_time(t5, training, method)
    long = hours > 1 or any(name in hub.CORPORA for name in training.corpus)
    if long and device.type == "cpu" and not (control.yes or control.dry_run):
        raise InputError("there is no GPU here: add --yes to start all the same, "
                         "or begin with the embedded model: python train.py")
    return method


def full_task(d, training, method, tokens):
    """A task whose sets are one full micro-batch of texts of about so many tokens, each."""
    positions = max(method.micro_tokens, training.prompt_length + tokens)
    rows = round(positions / (training.prompt_length + tokens))
    ids = [[3] * (positions // rows - training.prompt_length)] * rows
    examples = data.Examples(ids, [[]] * rows, torch.zeros(rows, 0, d),
                             torch.zeros(rows, dtype=torch.long), [[3, 4], [3, 5]])
    return data.Task("stand-in", (0,), examples, examples)


class LiveBytes(TorchDispatchMode):
    """While active: bytes of the tensors that operations made and that are alive; their peak."""

    def __init__(self):
        super().__init__()
        self.bytes, self.peak, self.alive = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else [made]:
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage and id(storage) not in self.alive:       # else x is a view
                self.alive.add(id(storage))
                self.bytes += storage.nbytes()
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self._free, id(storage), storage.nbytes())
        return made

    def _free(self, key, size):
        self.alive.remove(key)
        self.bytes -= size


@cache
def micro_batch_bytes(config, training, method):
    """Bytes of the weights; the most that a full micro-batch of the longest texts takes beside
    them, in a mixed gradient or a Hessian-vector product; its graph's, which method keeps."""
    task = full_task(config.d_model, training, method, training.max_tokens)
    with LiveBytes() as live:
        t5 = stand_in(config, getattr(torch, training.dtype), "meta")
        weights = live.bytes
        theta = torch.empty(training.prompt_length, config.d_model, device="meta")
        supmer.prompt_gradient(t5, theta, task.query, method, task.query, 0.5)
        *_, hessian = supmer.gradient_and_hessian(t5, theta, task.support, method)
        graph = live.bytes - weights
        hessian(theta)
        return weights, live.peak - weights, graph


def memory_needed(config, training, method):
    """The most bytes that meta-training will hold -> {part: bytes}. The C library's allocator can
    hold more than is used; MALLOC_MMAP_THRESHOLD_=65536 in the environment prevents that."""
    keeping = replace(method, keep_graphs=1)        # the same for every number of graphs: cached
    weights, peak, graph = micro_batch_bytes(config, training, keeping)
    at_once = max(1, method.micro_tokens // (training.prompt_length + training.max_tokens))
    kept = min(method.keep_graphs, math.ceil(training.support / at_once))
    with torch.device("meta"):
        theta = torch.empty(training.prompt_length, config.d_model)
        phi = supmer.init_state(theta, method).phi
    learned = sum(x.nbytes for x in (theta, *phi.values()))
    program = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + LIBRARIES
    return {"weights": weights, "micro-batch": peak, f"{kept} kept graphs": kept * graph,
            "theta, phi, Adam's moments, each task's gradients": (4 + training.tasks) * learned,
            "program": program}


def free_bytes(device):
    """A GPU's free memory; for a CPU the machine's whole memory, shared by torchrun's processes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return whole // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def memory_line(config, training, method, device):
    """memory_needed() as text; what would fit if the device has less, else ""."""
    parts = memory_needed(config, training, method)
    total, longest = sum(parts.values()), training.prompt_length + training.max_tokens
    size = max(method.micro_tokens, longest)
    there = free_bytes(device)
    needs = f"{total / GIB:.1f} GiB with micro-batches of {size} positions"
    named = ", ".join(f"{part / GIB:.2f} {name}" for name, part in parts.items() if part)
    fits = int(size * (there - total + parts["micro-batch"]) / parts["micro-batch"])
    advice = f"--micro-tokens {fits}" if fits >= longest else "--dtype bfloat16 or a smaller model"
    lacking = f"{training.model} needs {needs}, {device} has {there / GIB:.1f}: try {advice}"
    return f"memory:   {needs}: {named}", lacking if total > there else ""


def print_time(t5, training, method):
    """Print what a run will take, measured on a T5 -> hours."""
    theta, tokens = supmer.init_prompt(t5, training.prompt_length, 0), min(128, training.max_tokens)
    phi = supmer.init_state(theta, method).phi
    task = full_task(t5.config.d_model, training, method, tokens)
    lam = 0.5 if mixes(training, method) else 0.0
    # PPT's step is two gradients: those of a first-order step.
    own = replace(method, first_order=method.first_order or training.method in PLAIN)
    for _ in range(2):                                              # the first call is slower
        began = time.perf_counter()
        supmer.meta_gradient(t5, theta, phi, task, task, lam, 0.5, own)
        of_task = time.perf_counter() - began
    examples = training.tasks * (training.support + training.query)
    seconds = of_task * examples / (2 * len(task.support.ids))
    ids, began = torch.full((32, 25), 3, device=theta.device), time.perf_counter()
    corpus.embed_sentences(t5, ids, ids > 0).sum().item()           # sentences of 25 tokens
    per_token = (time.perf_counter() - began) / ids.numel()
    web, text = [name for name in training.corpus if name in hub.CORPORA], training.bytes
    if not web:
        files = corpus_files(hub.corpus_paths(training))
        text = min(text, sum(file.stat().st_size for file in files))
    hours, clustering = seconds * method.steps / 3600, per_token * text / 4 / 3600
    print(f"time:     {seconds:.1f} s a step, {hours:,.1f} hours for {method.steps:,} steps, "
          f"measured on this {theta.device.type} with texts of {tokens} tokens\n"
          f"          {clustering:,.1f} hours before that, to embed and cluster {text / 1e9:.3g} GB"
          " of text once (4 bytes a token); validation is not counted\n"
          f"disk:     {0.8 * text / 1e9:.3g} GB for the corpus's sentences in cache/")
    for name in web:
        files = hub.corpus_count(name, training.bytes)
        print(f"download: {files} file(s) of {name}, {files * hub.CORPORA[name].archive / 1e9:.1f} "
              f"GB of archives for {text / 1e9:.3g} GB of text, if not cached yet")
    return hours + clustering
