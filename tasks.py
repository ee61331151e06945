"""The labeled few-shot tasks: where they are, how rows are read, sampled and posed.

    rows = load_train(TASKS["sst2"])                # [Row(1, {"text": "a fine film ."}), ...]
    train, validation = few_shot(rows, shots=16, seed=10)
    examples = task_examples(tokenizer, TASKS["sst2"], train)
"""

import hashlib
import re
import string
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import common
from common import SOLO, TINY, InputError, text_sha256, whole_file
from corpus import Document, build_from, hash_share
from data import (MAX_TOKENS, Examples, Task, balanced, compile_template, decoder_targets,
                  fill_template, shuffled, template_fields, tokenize, usable_clusters)
from hub import archive_member, download
from tables import read_table


# --------------------------------------------------------------------------- the tasks

class Row(NamedTuple):
    """A labeled example."""
    label: int
    fields: dict[str, str]      # by their names in the template


class LabeledTask(NamedTuple):
    """A few-shot task: where its rows are, and how the prompted model reads them."""
    train: str                  # inside the data folder; its suffix names the format
    test: str
    template: str = "{text} It was <X> ?"
    words: tuple[str, ...] = ("terrible", "great")      # in label order
    max_tokens: int = 128       # of a source, template and all (C.1)
    sizes: tuple[int, int] = (0, 0)     # rows of train and test in the paper (Table 5, A.5); 0: any
    labels: tuple[str, ...] = ()        # as the file writes them, unless 0, 1, ... or the words
    columns: tuple[str, ...] = ()       # the file's names of label and fields, where they differ
    incomplete: str = "refused"         # rows without a text: refused, kept (but a last one), left
    bare: str = ""              # the field that loses its final punctuation
    groups: tuple[str, ...] = ()        # all: Table 1, dg: Table 2, offline: inside tiny/, evidence
    header: str = "known"       # see own_task, read_table
    encoding: str = "utf-8-sig"
    urls: tuple[str, ...] = ()          # of the files, or of archives with them; tried in turn
    sha256: tuple[str, str] = ("", "")  # how those of train and test begin, where they are known


LMBFF = "https://nlp.cs.princeton.edu/projects/lm-bff/datasets.tar"
GLUE = "https://dl.fbaipublicfiles.com/glue/data/"      # its own SST-2 is another, of 67,349
SUPERGLUE = "https://dl.fbaipublicfiles.com/glue/superglue/data/v2/"
PERL = "https://raw.githubusercontent.com/eyalbd2/PERL/"
ENTAILMENT = '" {hypothesis} " ? <X> , " {premise} "'
SAME = "Do {a} and {b} have the same meaning? <X> ."


def original(folder, sizes, *sha256, test="test.csv", urls=(), evidence=True, **how):
    """A data set of LM-BFF's archive."""
    return LabeledTask(f"original/{folder}/train{test[-4:]}", f"original/{folder}/{test}",
                       sizes=sizes, sha256=sha256 or ("", ""), urls=(LMBFF, *urls),
                       groups=("all", "evidence") if evidence else ("all",), **how)


def superglue(folder, sizes, *sha256, **how):
    """A data set of SuperGLUE's."""
    return LabeledTask(f"superglue/{folder}/train.jsonl", f"superglue/{folder}/val.jsonl",
                       sizes=sizes, sha256=sha256 or ("", ""), urls=(f"{SUPERGLUE}{folder}.zip",),
                       max_tokens=256, groups=("all",), **how)


def domain(folder, *sha256, urls=(), file="", groups=("dg",)):
    """A domain of the sentiment transfer, whose `test` is the whole pool."""
    return LabeledTask(f"domain/{folder}/{file or 'train'}", f"domain/{folder}/{file or 'test'}",
                       max_tokens=256, sizes=(0, 2000), sha256=sha256 or ("", ""),
                       urls=tuple(PERL + url for url in urls), groups=groups)


# Templates and words as the authors released them; test sets as the paper's (of GLUE: dev; of
# SuperGLUE: val).
TASKS = {
    **{name: LabeledTask(f"tasks/{name}/train.csv", f"tasks/{name}/test.csv",
                         groups=("offline", "evidence"))
       for name in ("movie", "amazon", "nyt", "tweets")},
    "sst2": original("SST-2", (6920, 872), "0e2eb9cad237f8bc", "628b5f860a1584f1", test="dev.tsv",
                     columns=("label", "sentence")),
    "sst5": original("sst-5", (8544, 2210), "8801a7029ccdf549", "3efa2c4190831c21", evidence=False,
                     words=("terrible", "bad", "okay", "good", "great")),
    "mr": original("mr", (8662, 2000), "c1e2cc34d7d271f2", "11884f83ada1fbec"),
    "cr": original("cr", (1774, 2000), "0eb8e119ee76f8cc", "7fab6959f8ce0d76", max_tokens=256,
                   incomplete="kept"),
    "subj": original("subj", (8000, 2000), "d281041f21d4d033", "33ce3835e915977e", max_tokens=256,
                     template="{text} This is <X> .", words=("subjective", "objective")),
    "trec": original("trec", (5452, 500), template="{text} <X> :",
                     words=("description", "entity", "expression", "human", "location", "number")),
    "cb": superglue("CB", (250, 56), "32017480d3a10508", "c6125587e9601560", template=ENTAILMENT,
                    words=("yes", "no", "maybe"), bare="hypothesis",
                    labels=("entailment", "contradiction", "neutral")),
    "rte": original("RTE", (2490, 277), "41e3a9b063433392", "80230dfa1347282e", test="dev.tsv",
                    urls=(GLUE + "RTE.zip",), evidence=False, template=ENTAILMENT, max_tokens=256,
                    words=("yes", "no"), labels=("entailment", "not_entailment"),
                    columns=("label", "sentence2", "sentence1"), bare="hypothesis"),
    "qnli": original("QNLI", (104743, 5463), test="dev.tsv", urls=(GLUE + "QNLIv2.zip",),
                     evidence=False, template="{sentence} . Question: {question} ? Answer: <X> .",
                     words=("Yes", "No"), labels=("entailment", "not_entailment")),
    "wic": superglue("WiC", (5428, 638), words=("No", "Yes"), labels=("False", "True"), template=
                     '" {sentence1} " / " {sentence2} " Similar sense of "{word}"? <X> .'),
    "mrpc": original("MRPC", (3668, 408), "69abcedee3cf738c", "9e8f284788040f7c", test="dev.tsv",
                     template=SAME, words=("No", "Yes"),
                     columns=("Quality", "#1 String", "#2 String")),
    "qqp": original("QQP", (363846, 40430), test="dev.tsv", urls=(GLUE + "QQP-clean.zip",),
                    evidence=False, template=SAME, words=("No", "Yes"), incomplete="left",
                    columns=("is_duplicate", "question1", "question2")),
    "airlines": domain("airline", "b08470f5d334d3b9", "d85588256f052153", urls=(
        "03fb83d677be7a51d0a83973024b2624c2b39f77/data/airline/train",
        "3f4995487e820bff574232d27ac5c95c91e3aae1/5-fold_data/airline/test"),
        groups=("dg", "evidence")),
    "books": domain("books", "", "e139c133cae66c6c", urls=(
        "3f4995487e820bff574232d27ac5c95c91e3aae1/5-fold_data/books/test",)),
    "dvd": domain("dvd", urls=("95db6bc374e80ae575f3faa9d4f84a8cea682e5e/dvd/test",)),
    "electronics": domain("electronics", "", "adf96b0275ac369e", urls=(
        "7e97408fa9eaa25bed2d2d3f16b7a76b3534962c/data/electronics/test",)),
    "kitchen": domain("kitchen", urls=(
        "7e97408fa9eaa25bed2d2d3f16b7a76b3534962c/data/kitchen/test",)),
    "restaurants": domain("restaurants", file="yelp_labelled.txt"),
}
GROUPS = {group: tuple(name for name, task in TASKS.items() if group in task.groups)
          for group in ("all", "dg", "offline", "evidence")}


# --------------------------------------------------------------------------- reading rows

def load_train(task, folder=TINY, say=lambda line: None):
    """A LabeledTask's training split -> [Row]. say(line) is called about anything unexpected.
    a line `1,"It works, and well."` of a .csv -> Row(1, {"text": "It works, and well."})"""
    return read_rows(locate(task, "train", folder), task, task.sizes[0], say)


def load_test(task, folder=TINY, say=lambda line: None):
    """Its test split. Apart from load_train, so that tuning can be shown never to open the file."""
    return read_rows(locate(task, "test", folder), task, task.sizes[1], say)


def own_task(path, template, words="", *, test=None, label_column="label", header="either",
             max_tokens=256, encoding="utf-8-sig", say=print):
    """A user's labeled file -> LabeledTask, of which what was read and one source a label is said.

    template: each {column} is a column of the file. words: "spam=junk,ham=fine", a word for each
    label; or "junk,fine" if these are the labels, or for labels that are numbers, in rising order;
    or "": the labels are the words, or two or five numbers, SENTIMENT. header: "yes", "no", or
    "either", where a first row that lacks a column is a row. test: the file to test on.
    Raises InputError, with the labels and a --words to copy, if labels and words do not match.
    """
    columns = (label_column, *template_fields(template))
    odd = set(re.findall(r"\{([^{}]*)\}", template)) - set(columns)
    if odd:
        raise InputError(f"{template!r}: rename the columns {', '.join(odd)}: a template's are of "
                         "letters, digits and _")
    task = LabeledTask(str(path), str(test or path), template, (), max_tokens, columns=columns,
                       incomplete="left", header=header, encoding=encoding)
    counts = Counter(values[0] for _, values in read_table(path, columns, header, encoding)
                     if values and all(map(str.strip, values)))
    matched = match_words(path, counts, words)
    task = task._replace(words=tuple(matched.values()), labels=tuple(matched))
    shown = {row.label: row.fields for row in reversed(read_rows(path, task, say=say))}
    for k, (label, word) in enumerate(matched.items()):
        source = template if k in shown else "-"
        for name, text in shown.get(k, {}).items():
            source = source.replace(f"{{{name}}}", text[:80])
        say(f"{path}: {counts[label]:,} rows of label {label} -> {word}: {source}")
    return task


def match_words(path, counts, words):
    """{label: how often a file has it} and own_task's words -> {label: word}, in label order."""
    numbers = all(re.fullmatch(r"[+-]?\d+(\.\d*)?", label) for label in counts)
    labels = sorted(counts, key=float if numbers else None)
    given = [word.strip() for word in words.split(",")] if words else []
    if "=" in words:
        matched = {label: word for label, _, word in (word.partition("=") for word in given)}
    elif numbers and not given:
        matched = dict(zip(labels, SENTIMENT.get(len(labels), ())))
    elif set(labels) <= set(given or labels):
        matched = {word: word for word in given or labels}
    else:
        matched = dict(zip(labels, given)) if numbers and len(labels) == len(given) else {}
    different = len(set(matched.values()) - {""})
    if not set(labels) <= set(matched) or different < max(2, len(matched)):
        found = ", ".join(f"{label} ({counts[label]:,} rows)" for label in labels[:20])
        raise InputError(f"{path} has the labels {found}; give two or more a word each: "
                         f"--words {','.join(f'{label}=WORD' for label in labels[:20])}")
    return matched


def read_rows(path, task, size=0, say=lambda line: None):
    """Labeled rows of a file -> [Row]. Raises InputError (file, line) for a row that is not one.
    RTE's `0 TAB A dog ran. TAB It moved. TAB entailment` under its header ->
    Row(0, {"hypothesis": "It moved", "premise": "A dog ran."})"""
    columns, rows, skipped = task.columns or ("label", *template_fields(task.template)), [], 0
    places = {label: k for k, label in enumerate(task.labels or task.words)}
    if not task.labels:
        places |= {str(k): k for k in range(len(task.words))}
    for where, values in read_table(path, columns, task.header, task.encoding):
        whole = values is not None and all(map(str.strip, values))
        if not whole and task.incomplete == "left":
            skipped += 1
        elif values and values[0] in places and (whole or task.incomplete == "kept"):
            rows.append(make_row(task, places[values[0]], values[1:]))
        else:
            raise InputError(f"{where}: {values or 'too few or too many columns'}; a row is "
                             f"{', '.join(columns)}, its label one of {', '.join(places)}: mend or "
                             "drop it")
    if task.incomplete == "kept":
        blank = [not any(map(str.strip, row.fields.values())) for row in rows]
        if blank and blank.pop():
            rows.pop()
            say(f"{path}: the last row, which has no text, is left out")
        say(f"{path}: {sum(blank)} rows without text are kept")
    if skipped:
        say(f"{path}: {skipped:,} rows without a label or a text are left out")
    if not rows:
        raise InputError(f"{path} has no rows of {', '.join(columns)}: fetch or mend it")
    if size not in (0, len(rows)):
        say(f"{path}: {len(rows):,} rows, the paper has {size:,}")
    return rows


def load_texts(path, task, header="either", encoding="utf-8-sig"):
    """Rows without labels, to be predicted: the template's texts only -> [Row], all of label 0.
    a line `What a joy.` of a .txt -> Row(0, {"text": "What a joy."})"""
    fields, rows = template_fields(task.template), []
    for where, texts in read_table(path, fields, header, encoding):
        if not texts or not all(map(str.strip, texts)):
            raise InputError(f"{where}: not the texts {', '.join(fields)}: mend or drop it")
        rows.append(make_row(task, 0, texts))
    if not rows:
        raise InputError(f"{path} has no texts: give some")
    return rows


def make_row(task, label, texts):
    """A Row of the template's texts, in its order; task.bare loses its final punctuation."""
    fields = dict(zip(template_fields(task.template), texts))
    if task.bare:
        fields[task.bare] = fields[task.bare].rstrip(string.punctuation)
    return Row(label, fields)


# --------------------------------------------------------------------------- sampling and posing

def few_shot(rows, shots, seed, classes=2):
    """Sample `shots` rows a label for training, as many for validation (section 4.1) -> both lists.

    Ordered by sha256 of seed and row: the same on every machine. No text comes twice. A class of
    fewer than 2 * shots texts gives half to each; InputError for fewer than two texts in a class.
    rows [Row(0, a), Row(1, b), Row(0, c), Row(1, d)], shots 1 -> [Row(0, c), Row(1, b)],
    [Row(0, a), Row(1, d)]
    """
    def key(row):
        parts = (str(seed), str(row.label), *row.fields.values())
        return text_sha256("\t".join(parts)).digest()
    first = {tuple(row.fields.values()): row for row in sorted(rows, key=key, reverse=True)}
    train, validation = [], []
    for label in range(classes):
        members = sorted((row for row in first.values() if row.label == label), key=key)
        half = min(shots, len(members) // 2)
        if not half:
            raise InputError(f"label {label} has {len(members)} different texts, 2 are the least:"
                             " give more labeled rows")
        train += members[:half]
        validation += members[half:2 * half]
    return train, validation


def task_examples(tokenizer, task, rows):
    """Labeled rows as Examples; long texts are cut, never the template or the mask.
    Row(1, {"text": "A fine film."}) -> `A fine film. It was <extra_id_0> ?</s>`, target `great`"""
    parts = compile_template(tokenizer, task.template)
    names = template_fields(task.template)
    texts = zip(*(tokenize(tokenizer, [row.fields[name] for row in rows]) for name in names))
    ids = [fill_template(parts, dict(zip(names, text)), task.max_tokens)[0] for text in texts]
    return Examples(ids, [[] for _ in rows], torch.empty(len(rows), 0, 0), torch.tensor(
        [row.label for row in rows]), decoder_targets(tokenizer, task.words))


# ------------------------------------------------------------- labeled sets as meta tasks

# What two and five classes are called whose labels are mere numbers.
SENTIMENT = {2: ("terrible", "great"), 5: ("terrible", "bad", "okay", "good", "great")}


def build_labeled(cache, path, tokenizer, t5, clusters, seed, *, model, embed=None,
                  progress=lambda stage, done, total: None, ranks=SOLO):
    """A labeled file with the columns `label` and `text` -> Store, as build_store's; labels become
    words as in own_task. A sentence of it is a whole text, cut at MAX_TOKENS, and a document;
    `label` is the place of its word in meta["made_of"]["options"]["words"]."""
    path = Path(path)
    task = own_task(path, LabeledTask("", "").template)

    def read(path, counts):
        for label, fields in read_rows(path, task):
            counts["bytes"] += len(fields["text"].encode())
            yield Document(hash_share([fields["text"]]), [fields["text"]], label)
    options = {"words": list(task.words), "clusters": clusters, "seed": seed}
    return build_from(cache, [path], read, options, tokenizer, t5, model, embed, progress, ranks)


class LabeledIndex:
    """What drawing a meta task from labeled sets needs (Table 3: labeled data as meta tasks).
    stores: {name: build_labeled's}. A cluster is usable if it has ceil(support / K) +
    ceil(query / K) different texts of each label. InputError, with what each cluster lacks, unless
    each set has a usable one in training (mixing: two, see TaskIndex) and in held-out texts."""

    def __init__(self, stores, tokenizer, *, support=32, query=32, max_tokens=MAX_TOKENS,
                 mixing=False):
        self.stores, self.sizes, self.max_tokens = stores, (support, query), max_tokens
        self.variants, self.words, self.rows, self.usable = tuple(stores), {}, {}, {}
        self.parts = compile_template(tokenizer, LabeledTask("", "").template)
        for name, store in stores.items():
            words = store.meta["made_of"]["options"]["words"]
            self.words[name] = decoder_targets(tokenizer, words)
            K, need = len(words), sum(-(-size // len(words)) for size in self.sizes)
            clusters = store.centroids.shape[1]
            for split, inside in (("train", ~store.held_out), ("validation", store.held_out)):
                rows = np.flatnonzero(inside & store.anchor)
                group = store.cluster[0][rows] * K + store.label[rows]
                counts = np.bincount(group, minlength=clusters * K)
                self.rows[split, name] = np.split(rows[np.argsort(group, kind="stable")],
                                                  np.cumsum(counts)[:-1])
                lacking = np.maximum(need - counts, 0).reshape(clusters, K).sum(1)
                self.usable[split, name] = usable_clusters(
                    f"{name}: {split} texts", lacking, f"{need} of each label",
                    1 + (mixing and split == "train"))


def labeled_task(index, seed, step, i, *, variant=None, split="train", stream="task", avoid=()):
    """As meta_task, of a LabeledIndex: one cluster of one labeled set, which is the variant.
    Labels are balanced in each set, no text is in both.
    `A fine film. It was <extra_id_0> ?</s>` -> `great`"""
    rng = common.rng(seed, step, i, stream)
    drawn = index.variants[rng.integers(len(index.variants))]
    variant = variant or drawn
    store, words = index.stores[variant], index.words[variant]
    usable = np.setdiff1d(index.usable[split, variant], avoid)
    if not len(usable):
        raise InputError(f"{variant}: one usable {split} cluster, mixing needs two: give more rows")
    cluster, K = int(rng.choice(usable)), len(words)
    texts = [shuffled(rng, rows)
             for rows in index.rows[split, variant][cluster * K:(cluster + 1) * K]]
    sets = []
    for n in index.sizes:
        labels = balanced(rng, K, n)
        rows = [next(texts[label]) for label in labels]
        ids = [fill_template(index.parts, {"text": store.sentence(r).tolist()}, index.max_tokens)[0]
               for r in rows]
        sets.append(Examples(ids, [[]] * n, torch.empty(n, 0, 0), torch.from_numpy(labels), words))
    return Task(variant, (cluster,), *sets)


# --------------------------------------------------------------------------- where they are

FETCHED = Path("cache/data")


def locate(task, split, folder=TINY):
    """The path of a task's "train" or "test" file: in the folder, in tiny/ or in cache/data, where
    it is fetched. A file that is there is not opened, nor hashed: the test file stays sealed.
    Raises InputError, with where to put what, if the file cannot be fetched."""
    file, sha256 = getattr(task, split), task.sha256[split == "test"]
    path, tried = find(file, folder), []
    for url in task.urls if path is None else ():
        if url.endswith((".tar", ".zip", file.rpartition("/")[2])):
            try:
                return fetch(url, file, sha256, folder)
            except InputError as error:
                tried.append(str(error))
    if path is None:
        raise InputError("; ".join([f"{file} is not in {folder}: put it there, or give --data "
                                    "FOLDER that has it", *tried]))
    return path


def find(name, folder):
    """The path of a file in the folder, in tiny/ or in cache/data; None if it is in none."""
    places = (place / name for place in (Path(folder), TINY, FETCHED))
    return next(filter(Path.is_file, places), None)


def fetch(url, file, sha256, folder):
    """Fetch a task's file from a URL, or from the archive there -> its path in cache/data."""
    path, name = FETCHED / file, url.rpartition("/")[2]
    if not name.endswith((".tar", ".zip")):
        return download(url, path, sha256)
    archive = find(name, folder) or download(url, FETCHED / name)
    content = archive_member(archive, file)
    if not hashlib.sha256(content).hexdigest().startswith(sha256):
        raise InputError(f"{file} of {archive} has another checksum: delete it, fetch it again")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as out:
        out.write(content)
    return path
