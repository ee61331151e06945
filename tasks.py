"""The labeled few-shot tasks: where their files are, and how rows are read, sampled and posed.

    train, validation = few_shot(load_train(TASKS["sst2"]), shots=16, seed=10)
    examples = task_examples(tokenizer, TASKS["sst2"], train)
"""

import re
import string
from collections import Counter
from decimal import Decimal
from typing import NamedTuple

import torch

from common import TINY, InputError, text_sha256
from data import Examples
from download import locate
from tables import read_table
from templates import (compile_template, decoder_targets, examples_as_text, fill_template,
                       template_fields, tokenize)


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
    groups: tuple[str, ...] = ()        # all: Table 1, dg: Table 2, offline: inside tiny/
    header: bool | None = None          # see read_table
    encoding: str = "utf-8-sig"
    urls: tuple[str, ...] = ()          # of the files, or of archives with them; tried in turn
    sha256: tuple[str, ...] = ()        # how those of train and test begin, where they are known
    hub: tuple = ()     # a second form of it, as JSON lines: repository, split of the paper's test
                        # set, names of label and texts there, its labels in the words' order
    parts: tuple[str, ...] = ()         # tasks whose rows these are: label k has the k-th one's


LMBFF = "https://nlp.cs.princeton.edu/projects/lm-bff/datasets.tar"
GLUE = "https://dl.fbaipublicfiles.com/glue/data/"      # its own SST-2 is another, of 67,349
SUPERGLUE = "https://dl.fbaipublicfiles.com/glue/superglue/data/v2/"
PERL = "https://raw.githubusercontent.com/eyalbd2/PERL/"
ENTAILMENT = '" {hypothesis} " ? <X> , " {premise} "'
SAME = "Do {a} and {b} have the same meaning? <X> ."


def original(folder, sizes, *sha256, test="test.csv", urls=(), **how):
    """A data set of LM-BFF's archive."""
    train = f"train{test[-4:]}"
    return LabeledTask(
        f"original/{folder}/{train}", f"original/{folder}/{test}", sizes=sizes, sha256=sha256,
        urls=(LMBFF, *urls), groups=("all",), **how)


def superglue(folder, sizes, *sha256, **how):
    """A data set of SuperGLUE's."""
    return LabeledTask(
        f"superglue/{folder}/train.jsonl", f"superglue/{folder}/val.jsonl", sizes=sizes,
        sha256=sha256, urls=(f"{SUPERGLUE}{folder}.zip",), max_tokens=256, groups=("all",), **how)


def domain(folder, *sha256, urls=(), train="train", test="test"):
    """A domain of the sentiment transfer, whose `test` is the whole pool."""
    return LabeledTask(
        f"domain/{folder}/{train}", f"domain/{folder}/{test}", sizes=(0, 2000), sha256=sha256,
        urls=tuple(PERL + url for url in urls), max_tokens=256, groups=("dg",))


# Templates and words as the authors released them; test sets as the paper's (of GLUE: dev; of
# SuperGLUE: val).
TASKS = {
    **{name: LabeledTask(f"tasks/{name}/train.csv", f"tasks/{name}/test.csv",
                         groups=("offline",))
       for name in ("movie", "amazon", "nyt", "tweets")},
    # Ours: which of the four is a text from? As many rows of each.
    "source": LabeledTask(
        "tasks/amazon/train.csv", "tasks/amazon/test.csv", max_tokens=64,
        template="{text} ? A. product B. movie C. newspaper D. message . Answer: <X>",
        words=("A", "B", "C", "D"),
        parts=("amazon", "movie", "nyt", "tweets")),
    "sst2": original(
        "SST-2", (6920, 872), "0e2eb9cad237f8bc", "628b5f860a1584f1", test="dev.tsv",
        columns=("label", "sentence"),
        hub=("SetFit/sst2", "dev", ("label", "text"), "01")),
    "sst5": original(
        "sst-5", (8544, 2210), "8801a7029ccdf549", "3efa2c4190831c21",
        words=("terrible", "bad", "okay", "good", "great"),
        hub=("SetFit/sst5", "test", ("label", "text"), "01234")),
    "mr": original("mr", (8662, 2000), "c1e2cc34d7d271f2", "11884f83ada1fbec"),
    "cr": original(
        "cr", (1774, 2000), "0eb8e119ee76f8cc", "7fab6959f8ce0d76", max_tokens=256,
        incomplete="kept",
        hub=("SetFit/CR", "test", ("label", "text"), "01")),
    "subj": original(
        "subj", (8000, 2000), "d281041f21d4d033", "33ce3835e915977e", max_tokens=256,
        template="{text} This is <X> .",
        words=("subjective", "objective"),
        hub=("SetFit/subj", "test", ("label", "text"), "10")),
    "trec": original(
        "trec", (5452, 500),
        template="{text} <X> :",
        words=("description", "entity", "expression", "human", "location", "number"),
        hub=("SetFit/TREC-QC", "test", ("label_coarse_original", "text"),
             ("DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM"))),
    "cb": superglue(
        "CB", (250, 56), "32017480d3a10508", "c6125587e9601560",
        template=ENTAILMENT,
        bare="hypothesis",
        words=("yes", "no", "maybe"),
        labels=("entailment", "contradiction", "neutral")),
    "rte": original(
        "RTE", (2490, 277), "41e3a9b063433392", "80230dfa1347282e", test="dev.tsv",
        urls=(GLUE + "RTE.zip",), max_tokens=256,
        template=ENTAILMENT,
        bare="hypothesis",
        words=("yes", "no"),
        labels=("entailment", "not_entailment"),
        columns=("label", "sentence2", "sentence1"),
        hub=("SetFit/rte", "validation", ("label", "text2", "text1"), "01")),
    "qnli": original(
        "QNLI", (104743, 5463), test="dev.tsv", urls=(GLUE + "QNLIv2.zip",),
        template="{sentence} . Question: {question} ? Answer: <X> .",
        words=("Yes", "No"),
        labels=("entailment", "not_entailment"),
        hub=("SetFit/qnli", "validation", ("label", "text2", "text1"), "01")),
    "wic": superglue(
        "WiC", (5428, 638),
        template='" {sentence1} " / " {sentence2} " Similar sense of "{word}"? <X> .',
        words=("No", "Yes"),
        labels=("False", "True")),
    "mrpc": original(
        "MRPC", (3668, 408), "69abcedee3cf738c", "9e8f284788040f7c", test="dev.tsv",
        template=SAME,
        words=("No", "Yes"),
        columns=("Quality", "#1 String", "#2 String"),
        hub=("SetFit/mrpc", "validation", ("label", "text1", "text2"), "01")),
    "qqp": original(
        "QQP", (363846, 40430), test="dev.tsv", urls=(GLUE + "QQP-clean.zip",),
        incomplete="left",
        template=SAME,
        words=("No", "Yes"),
        columns=("is_duplicate", "question1", "question2"),
        hub=("SetFit/qqp", "validation", ("label", "text1", "text2"), "01")),
    "airlines": domain("airline", "b08470f5d334d3b9", "d85588256f052153", urls=(
        "03fb83d677be7a51d0a83973024b2624c2b39f77/data/airline/train",
        "3f4995487e820bff574232d27ac5c95c91e3aae1/5-fold_data/airline/test")),
    "books": domain("books", "", "e139c133cae66c6c", urls=(
        "3f4995487e820bff574232d27ac5c95c91e3aae1/5-fold_data/books/test",)),
    "dvd": domain("dvd", urls=("95db6bc374e80ae575f3faa9d4f84a8cea682e5e/dvd/test",)),
    "electronics": domain("electronics", "", "adf96b0275ac369e", urls=(
        "7e97408fa9eaa25bed2d2d3f16b7a76b3534962c/data/electronics/test",)),
    "kitchen": domain("kitchen", urls=(
        "7e97408fa9eaa25bed2d2d3f16b7a76b3534962c/data/kitchen/test",)),
    "restaurants": domain("restaurants", train="yelp_labelled.txt", test="yelp_labelled.txt"),
}
GROUPS = {group: tuple(name for name, task in TASKS.items() if group in task.groups)
          for group in ("all", "dg", "offline")}
GROUPS["evidence"] = (*GROUPS["offline"], "sst2", "mr", "cr", "subj", "trec", "mrpc", "airlines")


# --------------------------------------------------------------------------- reading rows

def load_train(task, folder=TINY, say=lambda line: None):
    """A LabeledTask's training split -> [Row]. say(line) is called about anything unexpected.
    a line `1,"It works, and well."` of a .csv -> Row(1, {"text": "It works, and well."})"""
    if task.parts:
        return by_part(task, load_train, folder, say)
    return read_rows(locate(task, "train", folder), task, task.sizes[0], say)


def load_test(task, folder=TINY, say=lambda line: None):
    """Its test split. Apart from load_train, so that tuning can be shown never to open the file."""
    if task.parts:
        return by_part(task, load_test, folder, say)
    return read_rows(locate(task, "test", folder), task, task.sizes[1], say)


def by_part(task, load, folder, say):
    """The rows of a task's parts, the first ones, as many of each; label k has the k-th one's."""
    parts = [load(TASKS[name], folder, say) for name in task.parts]
    fewest = min(map(len, parts))
    return [Row(k, row.fields) for k, part in enumerate(parts) for row in part[:fewest]]


def label_value(text):
    """1 of "1", "1.0", "True", " 1\u200b"; what is no number stays a text, as one can type it."""
    text = " ".join("".join(x if x.isprintable() else " " for x in text).split())
    text = {"false": "0", "true": "1"}.get(text.lower(), text)
    return Decimal(text) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", text) else text


def is_whole(values):
    """Whether a table's row has all its columns, and a text in each."""
    return values is not None and all(map(str.strip, values))


def read_rows(path, task, size=0, say=lambda line: None, labeled=True):
    """Rows of a file -> [Row]; unless labeled, of label 0. Raises InputError with file and line.
    RTE's `0 TAB A dog ran. TAB It moved. TAB entailment` under its header ->
    Row(0, {"hypothesis": "It moved", "premise": "A dog ran."})"""
    columns = (task.columns or ("label", *template_fields(task.template)))[not labeled:]
    labels = task.labels or (*task.words, *map(str, range(len(task.words))))
    places = {label_value(label): k % len(task.words) for k, label in enumerate(labels)}
    rows, skipped, wrong = [], 0, []
    for where, values in read_table(path, columns, task.header, task.encoding, say):
        values = values if labeled or not values else [labels[0], *values]
        whole, label = is_whole(values), values and label_value(values[0])
        if not whole and task.incomplete == "left":
            skipped += 1
        elif label in places and (whole or task.incomplete == "kept"):
            rows.append(make_row(task, places[label], values[1:]))
        else:
            wrong.append(f"{where}: {values or 'too few or too many columns'}")
    if wrong:
        raise InputError(f"{wrong[0]}; a row is {', '.join(columns)}, its label one of "
                         f"{', '.join(labels)}: mend {len(wrong):,} row(s); tuned work is kept")
    if rows and not "".join(rows[-1].fields.values()).strip():
        rows.pop()
        say(f"{path}: the last row, which has no text, is left out")
    if skipped:
        say(f"{path}: {skipped:,} rows without {' or '.join(columns)} are left out")
    if not rows:
        raise InputError(f"{path} has no rows of {', '.join(columns)}: fetch or mend it")
    if size and len(rows) != size:
        say(f"{path}: {len(rows):,} rows, the paper has {size:,}")
    return rows


def make_row(task, label, texts):
    """A Row of the template's texts, in its order; task.bare loses its final punctuation."""
    fields = dict(zip(template_fields(task.template), texts))
    if task.bare:
        fields[task.bare] = fields[task.bare].rstrip(string.punctuation)
    return Row(label, fields)


# --------------------------------------------------------------------------- sampling and posing

def few_shot(rows, shots, seed, classes=2, names=()):
    """Sample `shots` rows a label for training, as many for validation (section 4.1) -> both lists.
    Ordered by sha256 of seed and row: the same on every machine, and more shots begin with the same
    rows. No text comes twice. A class of fewer than 2 * shots texts gives half to each; InputError
    for fewer than two texts in a class.
    rows [Row(0, a), Row(1, b), Row(0, c), Row(1, d)], shots 1 -> [Row(0, c), Row(1, b)],
    [Row(0, a), Row(1, d)]"""
    def key(row):
        return row_hash(row, str(seed), str(row.label))
    first = {tuple(row.fields.values()): row for row in sorted(rows, key=key, reverse=True)}
    train, validation = [], []
    for label in range(classes):
        members = sorted((row for row in first.values() if row.label == label), key=key)
        half = min(shots, len(members) // 2)
        if not half:
            raise InputError(f"label {(names or range(classes))[label]} has {len(members)} "
                             "different texts, 2 are the least: give more labeled rows")
        train += members[:half]
        validation += members[half:2 * half]
    return train, validation


def first_rows(rows, number):
    """The first rows by sha256 of their texts, whatever their order in the file."""
    return sorted(rows, key=row_hash)[:number] if number < len(rows) else rows


def row_hash(row, *before):
    """sha256 of some texts and a row's, with tabs between them."""
    return text_sha256("\t".join((*before, *row.fields.values()))).digest()


def task_examples(tokenizer, task, rows):
    """Labeled rows as Examples; long texts are cut, never the template or the mask.
    Row(1, {"text": "A fine film."}) -> `A fine film. It was <extra_id_0> ?</s>`, target `great`"""
    parts = compile_template(tokenizer, task.template)
    names = template_fields(task.template)
    texts = zip(*(tokenize(tokenizer, [row.fields[name] for row in rows]) for name in names))
    ids = [fill_template(parts, dict(zip(names, text)), task.max_tokens)[0] for text in texts]
    return Examples(ids, [[] for _ in rows], torch.empty(len(rows), 0, 0), torch.tensor(
        [row.label for row in rows]), decoder_targets(tokenizer, task.words))


def print_cut(tokenizer, name, task, rows, say=print):
    """Say how many rows' texts task_examples() cuts, if any."""
    whole = task_examples(tokenizer, task._replace(max_tokens=10 ** 9), rows)
    cut = sum(len(ids) > task.max_tokens for ids in whole.ids)
    if cut:
        say(f"{name}: of {len(rows)} texts {cut} are cut to {task.max_tokens} tokens")


def task_lines(tokenizer, task, rows):
    """What is learned -> a line to print for each label: its rows, a source (long texts shortened)
    and its word. `7 rows of label 1: A fine film. It was <extra_id_0> ?</s> -> great`"""
    counts = Counter(row.label for row in rows)
    first = {row.label: row for row in reversed(rows)}
    for k, label in enumerate(task.labels or range(len(task.words))):
        shown = task.words[k]
        if k in first:
            texts = {name: text[:200] for name, text in first[k].fields.items()}
            examples = task_examples(tokenizer, task, [Row(k, texts)])
            shown = " -> ".join(examples_as_text(tokenizer, examples, 0))
        yield f"  {counts[k]:,} rows of label {label}: {shown}"
