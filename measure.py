"""Measure a prompt: log-probabilities of label words, losses, accuracy, the use of an inner step.

    scores = score(t5, theta, examples, method)     # (n, K)
    measure(scores, examples.labels)                # {"loss", "word_loss", "correct"}
"""

from collections import defaultdict

import torch
import torch.nn.functional as F

from common import bar
from ranks import SOLO
from supmer import (encode_with_prompt, inner_step, micro_batches, prompt_gradient, word_log_probs)


@torch.no_grad()
def score(t5, theta, examples, method):
    """log p of every label word for n examples, in their order -> (n, K), over the full vocabulary,
    whatever method.words_only says."""
    scores = theta.new_empty(len(examples.ids), len(examples.words))
    for rows, batch, _ in micro_batches(examples, theta, method):
        H, mask = encode_with_prompt(t5, theta, batch)
        scores[rows] = word_log_probs(t5, H, mask, examples.words).to(scores)
    return scores


def measure(scores, labels):
    """Log-probabilities (n, K), labels (n,) -> the loss over the full vocabulary, that over
    the label words, and how often the likeliest word is right."""
    labels = labels.to(scores.device)
    return {"loss": float(F.nll_loss(scores, labels)),
            "word_loss": float(F.cross_entropy(scores, labels)),
            "correct": int((scores.argmax(-1) == labels).sum())}


def validate_task(t5, theta, phi, task, method):
    """measure() the query set before and after an inner step -> {"loss_before": ...}, "correct" as
    a share; step_size: |a1 psi(g)| / |theta|; ways: how many label words there are."""
    g, pooled, _ = prompt_gradient(t5, theta, task.support, method)
    adapted = inner_step(theta, phi, g, pooled, method)
    figures = {"step_size": float((adapted - theta).norm() / theta.norm()),
               "ways": len(task.query.words)}
    for when, prompt in (("before", theta), ("after", adapted)):
        found = measure(score(t5, prompt, task.query, method), task.query.labels)
        found["correct"] /= len(task.query.ids)
        figures |= {f"{name}_{when}": value for name, value in found.items()}
    return figures


def validate(t5, state, tasks, method, ranks=SOLO):
    """validate_task() of each held-out task -> dict of means: "loss" is the one after the inner
    step; "variants" has each variant's own means. The ranks share the tasks."""
    def measured(task):
        return validate_task(t5, state.theta, state.phi, task, method)

    def means(results):
        return {name: sum(x[name] for x in results) / len(results) for name in results[0]}
    results = ranks.map(measured, bar(tasks, ranks.rank > 0, desc="validation", unit="task"))
    by_variant = defaultdict(list)
    for task, figures in zip(tasks, results):
        by_variant[task.variant].append(figures)
    whole = means(results)
    return {"loss": whole["loss_after"], "loss_before": whole["loss_before"],
            "step_size": whole["step_size"], "queries": sum(len(x.query.ids) for x in tasks),
            "variants": {variant: means(found) for variant, found in by_variant.items()}}
