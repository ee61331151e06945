"""Label new texts with a tuned prompt: python eval.py --predict FILE --prompt TUNED.

Writes CSV lines: the template's texts, the label, and the label words' probabilities, which sum to
1. The tuned file has the task's template and words. Give --model where it is not tiny.
"""

import csv
import io
import sys
from functools import partial
from pathlib import Path

import torch

from baselines import BASELINES, normal_prompt
from common import InputError, pick_device, reading, whole_file
from hub import model_folder, tokenizer_file
from jobs import TUNED, read_result
from measure import score
from own import load_texts, refuse_unread
from supmer import Method
from t5 import load_t5, model_fingerprint
from tasks import LabeledTask, print_cut
from templates import load_tokenizer, template_fields


def predict(settings):
    """Label the texts of --predict; eval.py's Settings. Raises InputError for a prompt of another
    model, and for an --out that would replace the input."""
    refuse_unread(settings, "template", "max_tokens", read=("header", "encoding", "text_column"))
    source = Path(settings.prompt[0])
    tensors, about = read_result(source)
    if settings.out and Path(settings.out).resolve() in (
            source.resolve(), Path(settings.predict).resolve()):
        raise InputError(f"--out {settings.out} would replace the input: name another file")
    with reading(source, "a tuned prompt", remedy=f"give one from {TUNED}"):
        task, baseline = read_task(about["task"]), BASELINES[about["baseline"]]
        made_on, fingerprint = about["model"], about["model_sha256"]
    model = model_folder(settings.model)
    if fingerprint != model_fingerprint(model):
        raise InputError(f"{source} was tuned on another model, {made_on}, than {settings.model} "
                         "is now: give --model")
    say = partial(print, file=sys.stderr)
    rows = load_texts(settings.predict, task, settings, say)
    t5 = load_t5(model, getattr(torch, settings.dtype), pick_device(settings.device))
    kept = {name: x for name, x in tensors.items() if ":" not in name}  # not other steps' states
    check_kept(source, kept, baseline, t5)
    tokenizer = load_tokenizer(tokenizer_file(model), t5.config)
    print_cut(tokenizer, settings.predict, task, rows, say)
    with reading(source, "a tuned prompt", remedy=f"give one from {TUNED}"):
        examples, = baseline.pose(tokenizer, "", task, rows, (), 0)
    device = t5.weights["shared.weight"].device
    kept = {name: x.to(device) for name, x in kept.items()}
    scores = score(*baseline.model(t5, kept), examples, Method()).cpu()
    text = as_csv(task, rows, scores.softmax(-1))
    if settings.out:
        with whole_file(settings.out) as file:
            file.write(text.encode())
    else:
        print(text, end="")


def read_task(values):
    """The LabeledTask of a tuned file's JSON. Raises TypeError, ValueError for another value."""
    task = LabeledTask(**values)
    texts = all(isinstance(x, str) for x in (*task.words, *task.labels))
    labels = len(task.words) > 1 and len(task.labels) in (0, len(task.words))
    field = task.bare in ("", *template_fields(task.template))
    if not (texts and labels and field and type(task.max_tokens) is int):
        raise ValueError("its task is not one that eval.py wrote")
    return task


def check_kept(path, kept, baseline, t5):
    """Raise InputError unless {name: tensor} is what a Baseline keeps when it is tuned on t5."""
    shapes = {name: tuple(x.shape) for name, x in kept.items()}
    P, width = (*shapes.get("theta", (1, t5.config.d_model)), 0, 0)[:2]
    fits = P > 0 and width == t5.config.d_model and all(
        x.is_floating_point() and x.isfinite().all() for x in kept.values())
    if fits:
        start = baseline.start or normal_prompt
        wanted = baseline.fold(t5, start(t5, 0, baseline.length or P))
        fits = shapes == {name: tuple(x.shape) for name, x in wanted.items()}
    if not fits:
        raise InputError(f"{path} does not hold what was tuned on this T5, or no finite numbers: "
                         "give one that a table names")


def as_csv(task, rows, chances):
    """Rows and their label words' probabilities (n, K) -> CSV text. "label" is as the training file
    writes it; without names of its own there, the word."""
    lines, labels = io.StringIO(), task.labels or task.words
    out = csv.writer(lines, lineterminator="\n")
    out.writerow([*template_fields(task.template), "label", *task.words])
    for row, best, chance in zip(rows, chances.argmax(-1).tolist(), chances.tolist()):
        out.writerow([*row.fields.values(), labels[best], *(f"{p:.4f}" for p in chance)])
    return lines.getvalue()
