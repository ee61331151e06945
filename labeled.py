"""Labeled sets as meta tasks (Table 3): a task is one cluster of a set, and asks for its labels.

    store = build_labeled(cache, "reviews.csv", tokenizer, t5, clusters=10, seed=0, model=folder)
    index = LabeledIndex({"reviews.csv": store}, tokenizer)
    task = labeled_task(index, seed=0, step=7, i=2)     # a pure function of its arguments
"""

from pathlib import Path

import numpy as np
import torch

from common import InputError, fingerprint, rng
from corpus import Document, build_from, hash_share
from data import Examples, Task, balanced, check_clusters, shuffled
from own import OwnTable, own_task
from ranks import SOLO
from tables import TABLES
from tasks import LabeledTask, print_cut, read_rows, task_lines
from templates import MAX_TOKENS, compile_template, decoder_targets, fill_template

TEMPLATE = LabeledTask("", "").template


def find_sets(folder):
    """The labeled files of a folder. Raises InputError if there are none."""
    found = sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in TABLES)
    if not found:
        raise InputError(f"--labeled {folder}: no folder with {', '.join(TABLES)}")
    return found


def build_labeled(cache, path, tokenizer, t5, clusters, seed, *, model, table=OwnTable(),
                  max_tokens=MAX_TOKENS, embed=None,
                  progress=lambda stage, done, total: None, ranks=SOLO):
    """A labeled file -> Store, as build_store's; it is read, and labels become words, as in
    own_task. A sentence of it is a whole text, cut at MAX_TOKENS, and a document; `label` is the
    place of its word in meta["made_of"]["options"]["words"]."""
    task = own_task(path, table, TEMPLATE, max_tokens=max_tokens)
    rows = read_rows(path, task, say=print)
    print("\n".join(task_lines(tokenizer, task, rows)))
    print_cut(tokenizer, path, task, rows)

    def read(path, counts):
        for label, fields in rows:
            text, = fields.values()
            counts["bytes"] += len(text.encode())
            yield Document(hash_share([text]), [text], label)
    how = [*task.labels, *task.columns, task.header, task.encoding, fingerprint([path])]
    options = {"words": list(task.words), "clusters": clusters, "seed": seed, "table": how}
    return build_from(cache, [Path(path)], read, options, tokenizer, t5, model, embed, progress,
                      ranks)


class LabeledIndex:
    """What drawing a meta task from labeled sets needs (Table 3: labeled data as meta tasks).
    stores: {name: build_labeled's}. A cluster is usable if it has ceil(support / K) +
    ceil(query / K) different texts of each label. InputError unless each set has a usable one in
    training (mixing: two, see TaskIndex) and in held-out texts: see check_clusters."""

    def __init__(self, stores, tokenizer, *, support=32, query=32, max_tokens=MAX_TOKENS,
                 mixing=False):
        self.stores = stores
        self.sizes = (support, query)
        self.max_tokens = max_tokens
        self.variants = tuple(stores)
        self.parts = compile_template(tokenizer, TEMPLATE)
        self.words = {}
        self.rows = {}
        self.usable = {}
        for name, store in stores.items():
            words = store.meta["made_of"]["options"]["words"]
            self.words[name] = decoder_targets(tokenizer, words)
            K = len(words)
            need = sum(-(-size // K) for size in self.sizes)
            clusters = store.centroids.shape[1]
            found = {}
            for split, inside in (("train", ~store.held_out), ("validation", store.held_out)):
                rows = np.flatnonzero(inside & store.anchor)
                group = store.cluster[0][rows] * K + store.label[rows]
                counts = np.bincount(group, minlength=clusters * K)
                rows = rows[np.argsort(group, kind="stable")]
                self.rows[split, name] = np.split(rows, np.cumsum(counts)[:-1])
                enough = counts.reshape(clusters, K).min(1)
                self.usable[split, name] = np.flatnonzero(enough >= need)
                ways = 1 + (mixing and split == "train")
                found[f"{name}: {split} texts of each label"] = enough, ways
            check_clusters("--labeled-clusters", need, 1 + mixing, found)


def labeled_task(index, seed, step, i, *, variant=None, split="train", stream="task", avoid=()):
    """As meta_task, of a LabeledIndex: one cluster of one labeled set, which is the variant.
    Labels are balanced in each set, no text is in both.
    `A fine film. It was <extra_id_0> ?</s>` -> `great`"""
    draw = rng(seed, step, i, stream)
    drawn = index.variants[draw.integers(len(index.variants))]      # also if it is given
    variant = variant or drawn
    store = index.stores[variant]
    words = index.words[variant]
    K = len(words)
    cluster = int(draw.choice(np.setdiff1d(index.usable[split, variant], avoid)))
    groups = index.rows[split, variant][cluster * K:(cluster + 1) * K]
    texts = [shuffled(draw, rows) for rows in groups]
    sets = []
    for n in index.sizes:
        labels = balanced(draw, K, n)
        rows = [next(texts[label]) for label in labels]
        ids = [fill_template(index.parts, {"text": store.sentence(r).tolist()}, index.max_tokens)[0]
               for r in rows]
        sets.append(Examples(ids, [[]] * n, torch.empty(n, 0, 0), torch.from_numpy(labels), words))
    return Task(variant, (cluster,), *sets)
