"""The labeled few-shot tasks: where they are, how rows are read, sampled and posed."""

import csv
import hashlib
import io
import json
import pickle
import re
import string
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import InputError, SOLO, TINY
from corpus import _build, hash_share
from data import (Examples, MAX_TOKENS, Task, _balanced, _shuffled, _usable, compile_template,
    decoder_targets, fill_template, template_fields, tokenize)
from hub import archive_member, download, keep
# What two and five classes are called whose labels are mere numbers.
SENTIMENT = {2: ("terrible", "great"), 5: ("terrible", "bad", "okay", "good", "great")}


def build_labeled(cache, path, tokenizer, t5, clusters, seed, *, model, embed=None,
                  progress=lambda stage, done, total: None, ranks=SOLO):
    """A labeled file, of `label` and `text` as read_table has them -> Store, as build_store's.
    A sentence of it is a whole text, cut at MAX_TOKENS, and a document; `label` is the place of its
    word in meta["made_of"]["options"]["words"]. The file's labels are those words, or integers of
    two or five values, which are SENTIMENT's in rising order."""
    path = Path(path)
    labels = {row[0] for _, row in read_table(path, ("label", "text")) if row and row[0]}
    numbers = all(re.fullmatch(r"\d+", label) for label in labels)
    places = sorted(labels, key=int if numbers else None)
    words = list(SENTIMENT.get(len(labels), ())) if numbers else places
    if len(words) < 2:
        raise InputError(f"{path} has the labels {', '.join(sorted(labels)[:9])}: write two "
                         "label words or more, or numbers of two or five classes of sentiment")
    task = LabeledTask("", "", words=tuple(words), labels=tuple(places))

    def read(counts):
        for label, fields in read_rows(path, task):
            counts["bytes"] += len(fields["text"].encode())
            yield hash_share([fields["text"]]), [fields["text"]], label
    options = {"words": words, "clusters": clusters, "seed": seed}
    return _build(cache, [path], read, options, tokenizer, t5, model, embed, progress, ranks)


# --------------------------------------------------------------------------- labeled tasks
class Row(NamedTuple):
    label: int
    fields: dict[str, str]      # by their names in the template


class LabeledTask(NamedTuple):
    """A few-shot task: where its rows are, and how the prompted model reads them."""
    train: str                  # inside the data folder; a name's end tells its format, see ROWS
    test: str
    template: str = "{text} It was <X> ?"
    words: tuple[str, ...] = ("terrible", "great")      # in label order
    max_tokens: int = 128       # of a source, template and all (C.1)
    sizes: tuple[int, int] = (0, 0)     # rows of train and test in the paper (Table 5, A.5); 0: any
    labels: tuple[str, ...] = ()        # as the file writes them, unless 0, 1, ... or the words
    columns: tuple[str, ...] = ()       # as the file calls label and fields, unless by their names
    incomplete: str = "refused"         # rows without a text: refused, kept (but a last one), left
    bare: str = ""              # the field that loses its final punctuation


def few_shot(rows, shots, seed, classes=2):
    """Sample `shots` rows a label for training, as many for validation (section 4.1) -> both lists.

    Ordered by sha256 of seed and row: the same on every machine. No text comes twice. A class of
    fewer than 2 * shots texts gives half to each; InputError for fewer than two texts in a class.
    rows [Row(0, a), Row(1, b), Row(0, c), Row(1, d)], shots 1 -> [Row(0, c), Row(1, b)],
    [Row(0, a), Row(1, d)]
    """
    def key(row):
        parts = (str(seed), str(row.label), *row.fields.values())
        return hashlib.sha256("\t".join(parts).encode()).digest()
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
                self.usable[split, name] = _usable(
                    f"{name}: {split} texts", lacking, f"{need} of each label",
                    1 + (mixing and split == "train"))


def labeled_task(index, seed, step, i, *, variant=None, split="train", stream, avoid=()):
    """As meta_task, of a LabeledIndex: one cluster of one labeled set, which is the variant.
    Labels are balanced in each set, no text is in both.
    `A fine film. It was <extra_id_0> ?</s>` -> `great`"""
    rng = np.random.default_rng((seed, step, i, stream))
    drawn = index.variants[rng.integers(len(index.variants))]
    variant = variant or drawn
    store, words = index.stores[variant], index.words[variant]
    usable = np.setdiff1d(index.usable[split, variant], avoid)
    if not len(usable):
        raise InputError(f"{variant}: one usable {split} cluster, mixing needs two: give more rows")
    cluster, K = int(rng.choice(usable)), len(words)
    texts = [_shuffled(rng, rows)
             for rows in index.rows[split, variant][cluster * K:(cluster + 1) * K]]
    sets = []
    for n in index.sizes:
        labels = _balanced(rng, K, n)
        rows = [next(texts[label]) for label in labels]
        ids = [fill_template(index.parts, {"text": store.sentence(r).tolist()}, index.max_tokens)[0]
               for r in rows]
        sets.append(Examples(ids, [[]] * n, torch.empty(n, 0, 0), torch.from_numpy(labels), words))
    return Task(variant, (cluster,), *sets)


# --------------------------------------------------------------------------- data sets
ENTAILMENT = '" {hypothesis} " ? <X> , " {premise} "'
SAME = "Do {a} and {b} have the same meaning? <X> ."
# Templates and words as the authors released them; test sets as the paper's (of GLUE: dev; of
# SuperGLUE: val). The six domains' `test` is their whole pool.
TASKS = {
    "sst2": LabeledTask("original/SST-2/train.tsv", "original/SST-2/dev.tsv", sizes=(6920, 872),
                        columns=("label", "sentence")),
    "sst5": LabeledTask("original/sst-5/train.csv", "original/sst-5/test.csv", sizes=(8544, 2210),
                        words=("terrible", "bad", "okay", "good", "great")),
    "mr": LabeledTask("original/mr/train.csv", "original/mr/test.csv", sizes=(8662, 2000)),
    "cr": LabeledTask("original/cr/train.csv", "original/cr/test.csv", sizes=(1774, 2000),
                      max_tokens=256, incomplete="kept"),
    "subj": LabeledTask("original/subj/train.csv", "original/subj/test.csv",
                        "{text} This is <X> .", ("subjective", "objective"), 256, (8000, 2000)),
    "trec": LabeledTask("original/trec/train.csv", "original/trec/test.csv", "{text} <X> :",
                        ("description", "entity", "expression", "human", "location", "number"),
                        sizes=(5452, 500)),
    "cb": LabeledTask("superglue/CB/train.jsonl", "superglue/CB/val.jsonl", ENTAILMENT,
                      ("yes", "no", "maybe"), 256, (250, 56),
                      ("entailment", "contradiction", "neutral"), bare="hypothesis"),
    "rte": LabeledTask("original/RTE/train.tsv", "original/RTE/dev.tsv", ENTAILMENT, ("yes", "no"),
                       256, (2490, 277), ("entailment", "not_entailment"),
                       ("label", "sentence2", "sentence1"), bare="hypothesis"),
    "qnli": LabeledTask("original/QNLI/train.tsv", "original/QNLI/dev.tsv",
                        "{sentence} . Question: {question} ? Answer: <X> .", ("Yes", "No"),
                        sizes=(104743, 5463), labels=("entailment", "not_entailment")),
    "wic": LabeledTask("superglue/WiC/train.jsonl", "superglue/WiC/val.jsonl",
                       '" {sentence1} " / " {sentence2} " Similar sense of "{word}"? <X> .',
                       ("No", "Yes"), 256, (5428, 638), ("False", "True")),
    "mrpc": LabeledTask("original/MRPC/train.tsv", "original/MRPC/dev.tsv", SAME, ("No", "Yes"),
                        sizes=(3668, 408), columns=("Quality", "#1 String", "#2 String")),
    "qqp": LabeledTask("original/QQP/train.tsv", "original/QQP/dev.tsv", SAME, ("No", "Yes"),
                       sizes=(363846, 40430), columns=("is_duplicate", "question1", "question2"),
                       incomplete="left"),
    **{name: LabeledTask(f"domain/{folder}/train", f"domain/{folder}/test", max_tokens=256,
                         sizes=(0, 2000))
       for name, folder in (("airlines", "airline"), ("books", "books"), ("dvd", "dvd"),
                            ("electronics", "electronics"), ("kitchen", "kitchen"))},
    "restaurants": LabeledTask("domain/restaurants/yelp_labelled.txt",
                               "domain/restaurants/yelp_labelled.txt", max_tokens=256,
                               sizes=(0, 2000)),
    **{name: LabeledTask(f"tasks/{name}/train.csv", f"tasks/{name}/test.csv")     # inside tiny/
       for name in ("movie", "amazon", "nyt", "tweets")},
}
GROUPS = {"all": tuple(TASKS)[:12], "dg": tuple(TASKS)[12:18],      # Tables 1 and 2
          "evidence": ("movie", "amazon", "nyt", "tweets", "subj", "sst2", "cr", "mr", "trec",
                       "mrpc", "airlines")}


def load_train(task, folder=TINY, say=lambda line: None):
    """A LabeledTask's training split -> [Row]. What was odd is said: say(line).
    a line `1,"It works, and well."` of a .csv -> Row(1, {"text": "It works, and well."})"""
    return read_rows(locate(task.train, folder), task, task.sizes[0], say)


def load_test(task, folder=TINY, say=lambda line: None):
    """Its test split. Apart from load_train, so that tuning can be shown never to open the file."""
    return read_rows(locate(task.test, folder), task, task.sizes[1], say)


def read_rows(path, task, size=0, say=lambda line: None):
    """Labeled rows of a file. InputError (file, line) for what is not a task's row.
    RTE's `0 TAB A dog ran. TAB It moved. TAB entailment` under its header ->
    Row(0, {"hypothesis": "It moved", "premise": "A dog ran."})"""
    fields, rows, left = template_fields(task.template), [], 0
    known = {label: k for k, label in enumerate(task.labels or task.words)}
    known |= {} if task.labels else {str(k): k for k in range(len(task.words))}
    for where, values in read_table(path, task.columns or ("label", *fields)):
        label, *texts = values or [""]
        whole = values is not None and all(text.strip() for text in texts)
        if not whole and task.incomplete == "left":
            left += 1
            continue
        if label not in known or not (whole or values and task.incomplete == "kept"):
            raise InputError(f"{where}: {values or 'too few or too many columns'}; a row is a label"
                             f" ({', '.join(known)}) and {', '.join(fields)}, without a header in "
                             "this order: mend or drop it")
        rows.append(make_row(task, known[label], texts))
    if task.incomplete == "kept":
        blank = [not any(map(str.strip, row.fields.values())) for row in rows]
        if blank and blank.pop():
            rows.pop()
            say(f"{path}: the last row, which has no text, is left out")
        say(f"{path}: {sum(blank)} rows without text are kept")
    if left:
        say(f"{path}: {left:,} rows with missing texts are left out")
    if not rows:
        raise InputError(f"{path} has no rows: fetch it again")
    if size not in (0, len(rows)):
        say(f"{path}: {len(rows):,} rows, the paper has {size:,}")
    return rows


def load_texts(path, task):
    """Rows without labels, to be predicted: the template's texts only -> [Row], all of label 0.
    a line `What a joy.` of a .txt -> Row(0, {"text": "What a joy."})"""
    fields, rows, path = template_fields(task.template), [], Path(path)
    for where, texts in read_table(path, fields):
        if not texts or not all(text.strip() for text in texts):
            raise InputError(f"{where}: not the texts {', '.join(fields)}: mend or drop it")
        rows.append(make_row(task, 0, texts))
    if not rows:
        raise InputError(f"{path} has no texts: give some")
    return rows


def make_row(task, label, texts):
    """A Row of the template's texts, in its order; one of them may lose its final punctuation."""
    fields = dict(zip(template_fields(task.template), texts))
    if task.bare:
        fields[task.bare] = fields[task.bare].rstrip(string.punctuation)
    return Row(label, fields)


def read_table(path, columns):
    """The columns of a file's rows -> (file and line, [a text of each column]; None if ragged).
    A .csv `text,label`, `ok,1`; columns ("label", "text") -> ("my.csv, line 2", ["1", "ok"])
    InputError for what cannot be read as its name's end says."""
    read = ROWS.get(path.suffix)
    if not read:
        raise InputError(f"{path}: give {', '.join(filter(None, ROWS))}")
    try:
        for line, values in read(path, columns):
            yield f"{path}, line {line}", values
    except FileNotFoundError:
        raise InputError(f"{path} is missing: name the folder that it is in") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} must be UTF-8 and well quoted: {error}") from None


def _csv_rows(path, columns):
    """Under a header with the columns' names, or without one, in their order."""
    tabs = path.suffix == ".tsv"                                # there quotes mean nothing
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, strict=True, delimiter="\t" if tabs else ",",
                           quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL)
        first = next(lines, [])
        header = set(columns) <= set(first)
        places = [first.index(name) for name in columns] if header else range(len(columns))
        width = len(first) if header else len(columns)
        for line in lines if header or not first else chain([first], lines):
            yield lines.line_num, [line[i] for i in places] if len(line) == width else None


def _jsonl_rows(path, columns):
    """A JSON object a line; labels may be true, false and numbers, as Python writes them."""
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                values = [record[name] for name in columns]
                if not all(isinstance(value, str | int) for value in values):
                    values = None
                "".join(map(str, values)).encode()  # half a pair of surrogates is no text
            except (ValueError, TypeError, KeyError, RecursionError):
                values = None
            yield number, values and list(map(str, values))


def _txt_rows(path, columns):
    """UCI's text TAB label; without a label a line is a text."""
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            values = line.rstrip("\r\n").rsplit("\t", len(columns) - 1)[::-1]
            yield number, values if len(values) == len(columns) else None


class Plain(pickle._Unpickler):
    """Reads lists, texts and numbers only: nothing that a file names is looked up, or run. The one
    in C, and a bytearray, would take as much memory as a file claims to need."""

    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items()
                if code != pickle.BYTEARRAY8[0]}

    def find_class(self, module, name):
        """Refuse."""
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, code that is not run here")


def _pickle_rows(path, columns):
    """PERL's (texts, labels)."""
    content = io.BytesIO(path.read_bytes())
    try:
        texts, labels = Plain(content).load()
        rows = list(zip(labels, texts, strict=True))
        if not all(type(label) is int and type(text) is str for label, text in rows):
            raise ValueError("not texts and numbers")
        "".join(texts).encode()         # half a pair of surrogates is no text
    except Exception as error:      # a damaged pickle raises almost anything
        raise InputError(f"{path} is no pickle of (texts, labels): {error}; fetch it again"
                         ) from None
    yield from ((number, [str(label), text]) for number, (label, text) in enumerate(rows, 1))


ROWS = {".csv": _csv_rows, ".tsv": _csv_rows, ".jsonl": _jsonl_rows, ".txt": _txt_rows,
        "": _pickle_rows}


FETCHED = Path("cache/data")
LMBFF = "https://nlp.cs.princeton.edu/projects/lm-bff/datasets.tar"
GLUE = "https://dl.fbaipublicfiles.com/glue/data/"
SUPERGLUE = "https://dl.fbaipublicfiles.com/glue/superglue/data/v2/"
PERL = "https://raw.githubusercontent.com/eyalbd2/PERL/"
# By how a task's file begins: what has it, tried in turn. GLUE's own SST-2 is another, of 67,349.
SOURCES = {
    "original/QNLI/": (LMBFF, GLUE + "QNLIv2.zip"),
    "original/QQP/": (LMBFF, GLUE + "QQP-clean.zip"),
    "original/RTE/": (LMBFF, GLUE + "RTE.zip"), "original/": (LMBFF,),
    "superglue/CB/": (SUPERGLUE + "CB.zip",), "superglue/WiC/": (SUPERGLUE + "WiC.zip",),
    "domain/airline/train": (PERL + "03fb83d677be7a51d0a83973024b2624c2b39f77/data/airline/train",),
    **{f"domain/{name}/test": (f"{PERL}{commit}/{folder}{name}/test",) for name, commit, folder in (
        ("airline", "3f4995487e820bff574232d27ac5c95c91e3aae1", "5-fold_data/"),
        ("books", "3f4995487e820bff574232d27ac5c95c91e3aae1", "5-fold_data/"),
        ("dvd", "95db6bc374e80ae575f3faa9d4f84a8cea682e5e", ""),
        ("electronics", "7e97408fa9eaa25bed2d2d3f16b7a76b3534962c", "data/"),
        ("kitchen", "7e97408fa9eaa25bed2d2d3f16b7a76b3534962c", "data/"))},
}
# The first half of the sha256 of a task's train and test file, of those that were at hand.
CHECKSUMS = {file: start for task, starts in {
    "sst2": ("0e2eb9cad237f8bc597742bdc136d338", "628b5f860a1584f172b9c7b032331553"),
    "sst5": ("8801a7029ccdf549a2900d0ce7662cc4", "3efa2c4190831c212fe618e3a35567df"),
    "mr": ("c1e2cc34d7d271f274c0e8ef24241716", "11884f83ada1fbec5ece0190e06598e5"),
    "cr": ("0eb8e119ee76f8cca33cfee9fee1ed88", "7fab6959f8ce0d761bdbb0fef247d8a8"),
    "subj": ("d281041f21d4d0336d9cd336a5490dd4", "33ce3835e915977e590e6b27b5051402"),
    "cb": ("32017480d3a10508646e3efd64502c63", "c6125587e9601560cb16ea223c33964c"),
    "rte": ("41e3a9b063433392343fad9e962cf2f5", "80230dfa1347282e7b532b06a1004a76"),
    "mrpc": ("69abcedee3cf738c6ce58d772e43e1b7", "9e8f284788040f7c9ecde2e1b3c07237"),
    "airlines": ("b08470f5d334d3b90e2e0773bb7f8546", "d85588256f052153598b2f731c028df5"),
    "books": ("", "e139c133cae66c6cf38c33cc40554f02"),
    "electronics": ("", "adf96b0275ac369e74894c1c7584878b"),
}.items() for file, start in zip(TASKS[task][:2], starts)}


def locate(file, folder=TINY):
    """The path of a task's file: in the folder, in tiny/, or fetched before into cache/data; else
    it is taken out of its archive, which lies there or is downloaded.
    InputError, with where to put what, if it cannot be had."""
    def have(name):
        places = (place / name for place in (Path(folder), TINY, FETCHED))
        return next(filter(Path.is_file, places), None)
    if found := have(file):
        return found
    tried = []
    for url in next((urls for start, urls in SOURCES.items() if file.startswith(start)), ()):
        name = url.rpartition("/")[2]
        try:
            if not name.endswith((".tar", ".zip")):
                where, content = url, download(url)
            else:
                where = have(name) or keep(FETCHED / name, download(url))
                content = archive_member(where, file)
            if not hashlib.sha256(content).hexdigest().startswith(CHECKSUMS.get(file, "")):
                raise InputError(f"{file} of {where} has another checksum than it should")
            return keep(FETCHED / file, content)
        except InputError as error:
            tried.append(str(error))
    raise InputError("; ".join([f"{file} is not in {folder}: put it there, or give --data FOLDER "
                                "that has it", *tried]))
