"""Tuning on a task's few examples (C.1): T5 stays frozen, a prompt, or what stands for it, learns.

A step: the gradient g of a batch (Eq. 1) -> psi(g, H) (Eq. 5) -> AdamW. Validation examples are
measured every few steps; eval.py chooses among those states.
"""

import math
import time
from functools import partial
from typing import NamedTuple

import torch

from baselines import BASELINES, tuning_gradient, with_prompt
from common import InputError, rng
from supmer import Method, cosine, measure, score


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
    and validation Examples. unit: a prompt's rate is in units of it. A record has the distance
    that a prompt has moved, relative to its start, and cos(psi(g), g) of the last step.
    Raises InputError for a loss that is not finite; a gradient that is not shows in the next one.
    """
    examples, held_out = sample
    method = Method(words_only=tuning.words_only)
    baseline, n = BASELINES[baseline], len(examples.ids)
    parameters = {name: x.clone() for name, x in start(t5).items()}
    theta, moved, psi_cosine = parameters.get("theta"), None, None
    begun = None if theta is None else theta.clone()
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
            if theta is not None:
                moved = float((theta - begun).norm() / begun.norm())
            yield {"rate": rate, "step": step, "loss": loss, "accuracy": accuracy, "moved": moved,
                   "psi_cosine": psi_cosine}, kept
        if step < steps:
            batch = select(examples, batch_rows(n, step, seed, tuning.batch))
            gradient, H = tuning_gradient(t5, baseline, parameters, batch, method)
            for name, x in parameters.items():
                x.grad = psi(gradient[name], H) if psi else gradient[name]
            if psi:
                psi_cosine = float(cosine(theta.grad, gradient["theta"]))
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
    ids, slots = ([part[row] for row in rows] for part in (examples.ids, examples.slots))
    return examples._replace(ids=ids, slots=slots, vectors=examples.vectors[rows],
                             labels=examples.labels[rows])


# ------------------------------------------------------- as jobs: see jobs.py

def tune_job(t5, baseline, start, psi, sample, seed, rate, tuning, unit, all_steps, about):
    """tune() -> {name: tensor} of its best validation, with all_steps also of each as "step:name";
    the validations, and about: what a reader of the file needs to use it."""
    device = t5.weights["shared.weight"].device
    if psi:
        psi = partial(psi.func, {name: x.to(device) for name, x in psi.args[0].items()})
    began, records, best, every = time.perf_counter(), [], {}, {}
    for record, kept in tune(t5, baseline, start, psi, sample, seed, rate, tuning, unit):
        records.append(record | {"seconds": time.perf_counter() - began})
        chosen = min(records, key=preference) is records[-1]
        if chosen or all_steps:
            kept = {name: x.cpu().clone(memory_format=torch.contiguous_format)
                    for name, x in kept.items()}
        if all_steps:
            every |= {f"{record['step']}:{name}": x.clone() for name, x in kept.items()}
        best = kept if chosen else best
    return best | every, {"validations": records, "baseline": baseline, **about}


def score_job(t5, baseline, kept, examples):
    """score() of what tune() kept, or of what a Candidate starts from -> {"scores": log p of each
    label word (n, K)}."""
    device = t5.weights["shared.weight"].device
    kept = kept(t5) if callable(kept) else {name: x.to(device) for name, x in kept.items()}
    return {"scores": score(*BASELINES[baseline].model(t5, kept), examples, Method()).cpu()}, {}
