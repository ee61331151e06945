"""The labeled few-shot tasks: where their files are, and how rows are read, sampled and posed.

A file of one's own: candidates.plans -> own_task (labels) -> tables.read_table; then as all:
    train, validation = few_shot(load_train(TASKS["sst2"]), shots=16, seed=10)
    examples = task_examples(tokenizer, TASKS["sst2"], train)
"""

import re
import shlex
import string
from collections import Counter
from dataclasses import dataclass, fields
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import torch

from common import TINY, InputError, text_sha256
from data import Examples
from download import locate
from settings import knob
from tables import check_header, read_table
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
    groups: tuple[str, ...] = ()        # all: Table 1, dg: Table 2, offline: inside tiny/, evidence
    header: bool | None = None          # see read_table
    encoding: str = "utf-8-sig"
    urls: tuple[str, ...] = ()          # of the files, or of archives with them; tried in turn
    sha256: tuple[str, str] = ("", "")  # how those of train and test begin, where they are known
    hub: tuple = ()     # a second form of it, as JSON lines: repository, split of the paper's test
                        # set, names of label and texts there, its labels in the words' order
    parts: tuple[str, ...] = ()         # tasks whose rows these are: label k has the k-th one's


@dataclass(frozen=True)
class OwnTable:
    """How a user's own table is read: options of train.py and eval.py alike."""
    words: str = knob("", "of your own labels, \"spam=junk,ham=fine\"; for numbers in rising "
                      "order, \"terrible,great\"")
    label_column: str = knob("label", "of your own table")
    text_column: str = knob("text", "of your own table: the template's {text}")
    header: bool = knob(True, "whether your own table begins with its columns' names; if not, the "
                        "label comes first, then the template's texts")
    encoding: str = knob("utf-8-sig", "of your own table: cp1252, utf-16, ...")


def refuse_unread(settings, *more, read=()):
    """Raise InputError for an option of OwnTable, or of `more`, that is given and not `read`."""
    names = {entry.name for entry in fields(OwnTable)}.union(more).difference(read)
    given = [f"--{'no-' * (entry.default is True)}{entry.name}" for entry in fields(settings)
             if entry.name in names and getattr(settings, entry.name) != entry.default]
    if given:
        raise InputError(f"{', '.join(given).replace('_', '-')}: for a table of your own, which is "
                         "not read here; see --help")


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
    # Ours: which of the four is a text from? As many rows of each.
    "source": LabeledTask(
        "tasks/amazon/train.csv", "tasks/amazon/test.csv", max_tokens=64, words=tuple("ABCD"),
        template="{text} ? A. product B. movie C. newspaper D. message . Answer: <X>",
        parts=("amazon", "movie", "nyt", "tweets")),
    "sst2": original("SST-2", (6920, 872), "0e2eb9cad237f8bc", "628b5f860a1584f1", test="dev.tsv",
                     columns=("label", "sentence"),
                     hub=("SetFit/sst2", "dev", ("label", "text"), "01")),
    "sst5": original("sst-5", (8544, 2210), "8801a7029ccdf549", "3efa2c4190831c21", evidence=False,
                     hub=("SetFit/sst5", "test", ("label", "text"), "01234"),
                     words=("terrible", "bad", "okay", "good", "great")),
    "mr": original("mr", (8662, 2000), "c1e2cc34d7d271f2", "11884f83ada1fbec"),
    "cr": original("cr", (1774, 2000), "0eb8e119ee76f8cc", "7fab6959f8ce0d76", max_tokens=256,
                   incomplete="kept", hub=("SetFit/CR", "test", ("label", "text"), "01")),
    "subj": original("subj", (8000, 2000), "d281041f21d4d033", "33ce3835e915977e", max_tokens=256,
                     template="{text} This is <X> .", words=("subjective", "objective"),
                     hub=("SetFit/subj", "test", ("label", "text"), "10")),
    "trec": original("trec", (5452, 500), template="{text} <X> :",
                     words=("description", "entity", "expression", "human", "location", "number"),
                     hub=("SetFit/TREC-QC", "test", ("label_coarse_original", "text"),
                          ("DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM"))),
    "cb": superglue("CB", (250, 56), "32017480d3a10508", "c6125587e9601560", template=ENTAILMENT,
                    words=("yes", "no", "maybe"), bare="hypothesis",
                    labels=("entailment", "contradiction", "neutral")),
    "rte": original("RTE", (2490, 277), "41e3a9b063433392", "80230dfa1347282e", test="dev.tsv",
                    urls=(GLUE + "RTE.zip",), evidence=False, template=ENTAILMENT, max_tokens=256,
                    words=("yes", "no"), labels=("entailment", "not_entailment"),
                    columns=("label", "sentence2", "sentence1"), bare="hypothesis",
                    hub=("SetFit/rte", "validation", ("label", "text2", "text1"), "01")),
    "qnli": original("QNLI", (104743, 5463), test="dev.tsv", urls=(GLUE + "QNLIv2.zip",),
                     evidence=False, template="{sentence} . Question: {question} ? Answer: <X> .",
                     words=("Yes", "No"), labels=("entailment", "not_entailment"),
                     hub=("SetFit/qnli", "validation", ("label", "text2", "text1"), "01")),
    "wic": superglue("WiC", (5428, 638), words=("No", "Yes"), labels=("False", "True"), template=
                     '" {sentence1} " / " {sentence2} " Similar sense of "{word}"? <X> .'),
    "mrpc": original("MRPC", (3668, 408), "69abcedee3cf738c", "9e8f284788040f7c", test="dev.tsv",
                     template=SAME, words=("No", "Yes"),
                     columns=("Quality", "#1 String", "#2 String"),
                     hub=("SetFit/mrpc", "validation", ("label", "text1", "text2"), "01")),
    "qqp": original("QQP", (363846, 40430), test="dev.tsv", urls=(GLUE + "QQP-clean.zip",),
                    evidence=False, template=SAME, words=("No", "Yes"), incomplete="left",
                    columns=("is_duplicate", "question1", "question2"),
                    hub=("SetFit/qqp", "validation", ("label", "text1", "text2"), "01")),
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


def own_task(path, options, template, *, test=None, max_tokens=256):
    """A user's labeled file -> LabeledTask. options: an OwnTable. template: each {column} is one of
    the file's, {text} that of options.text_column. test: of it the header alone is read.
    Raises InputError for a column that is missing, and where labels and words do not match."""
    path, test = Path(path), Path(test or path)
    template = template.replace("{text}", f"{{{options.text_column}}}")
    columns = (options.label_column, *template_fields(template))
    if len({*columns}) < max(2, len(columns)) or {*"{}"} & {*re.sub("{[^{}]*}", "", template)}:
        raise InputError(f"the template {template!r} shows no {{column}} of {path}, or its label, "
                         "or other braces: mend it")
    rows = read_table(path, columns, options.header, options.encoding)
    counts = Counter(values[0].strip() for _, values in rows if is_whole(values))
    check_header(test, columns, options.header, options.encoding)
    if not counts:
        raise InputError(f"{path} has no rows with {', '.join(columns)}: give some")
    matched = match_words(path, counts, options.words)
    return LabeledTask(str(path), str(test), template, tuple(matched.values()), max_tokens,
                       labels=tuple(matched), columns=columns, incomplete="left",
                       header=options.header, encoding=options.encoding)


SENTIMENT = {2: ("terrible", "great"), 5: ("terrible", "bad", "okay", "good", "great")}


def match_words(path, counts, words):
    """{label: how often a file has it} and OwnTable's words -> {label: word}, in label order.
    words: "spam=junk,ham=fine"; "junk,fine" if these are the labels, or for numbers (or true and
    false), in rising order; "": the labels are the words, or two or five numbers, SENTIMENT."""
    values = {label_value(label): label for label in counts}
    if len(values) < len(counts):
        raise InputError(f"{path} writes a label in two ways, as 1, 1.0 and true: write it in one")
    numbers = all(isinstance(x, Decimal) for x in values)
    labels = sorted(counts, key=label_value if numbers else None)
    given = [word.strip() for word in words.split(",")] if words else []
    if "=" in words:        # a label may have "," and "="
        known = "|".join(map(re.escape, sorted(counts, key=len, reverse=True)))
        pair = re.compile(rf"\s*({known}|[^,=]+?)\s*=([^,]*)(?:,|$)")
        pairs = [] if pair.sub("", words) else pair.findall(words)
    elif not given:
        pairs = zip(labels, SENTIMENT.get(len(labels), ()) if numbers else labels)
    elif set(values) <= set(map(label_value, given)):       # by the words' own names, or values
        pairs = zip(given, given)
    else:
        pairs = zip(labels, given) if numbers and len(labels) == len(given) else ()
    pairs = [(label, word.strip()) for label, word in pairs]
    matched = {values.get(label_value(label), label): word for label, word in pairs}
    different = {label_value(label) for label, _ in pairs}, {*matched.values()} - {""}
    if not set(labels) <= set(matched) or min(map(len, different)) < max(2, len(pairs)):
        found = ", ".join(f"{label} ({counts[label]:,} rows)" for label in labels[:20])
        line = shlex.quote(",".join(f"{label}=WORD" for label in labels))
        raise InputError(f"{path} has {len(labels)} labels, {found}: give each a word of its "
                         f"own, two at least (merge labels in the file): --words={line}")
    return matched


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
    if task.incomplete == "kept":
        blank = [not any(map(str.strip, row.fields.values())) for row in rows]
        if blank and blank.pop():
            rows.pop()
            say(f"{path}: the last row, which has no text, is left out")
        say(f"{path}: {sum(blank)} rows without text are kept")
    if skipped:
        say(f"{path}: {skipped:,} rows without {' or '.join(columns)} are left out")
    if not rows:
        raise InputError(f"{path} has no rows of {', '.join(columns)}: fetch or mend it")
    if size:
        agrees = ", as in the paper" if len(rows) == size else f", the paper has {size:,}"
        say(f"{path}: {len(rows):,} rows{agrees}")
    return rows


def load_texts(path, task, options=OwnTable(), say=lambda line: None):
    """Unlabeled rows -> [Row], of label 0; a .txt's line `A joy.` -> Row(0, {"text": "A joy."})"""
    names = template_fields(task.template)
    columns = [options.text_column if name == "text" else name for name in names]
    task = task._replace(columns=("", *columns), incomplete="left", header=options.header,
                         encoding=options.encoding)
    return read_rows(path, task, say=say, labeled=False)


def make_row(task, label, texts):
    """A Row of the template's texts, in its order; task.bare loses its final punctuation."""
    fields = dict(zip(template_fields(task.template), texts))
    if task.bare:
        fields[task.bare] = fields[task.bare].rstrip(string.punctuation)
    return Row(label, fields)


# --------------------------------------------------------------------------- sampling and posing

def few_shot(rows, shots, seed, classes=2, names=()):
    """Sample `shots` rows a label for training, as many for validation (section 4.1) -> both lists.
    Ordered by sha256 of seed and row: the same on every machine. No text comes twice. A class of
    fewer than 2 * shots texts gives half to each; InputError for fewer than two texts in a class.
    rows [Row(0, a), Row(1, b), Row(0, c), Row(1, d)], shots 1 -> [Row(0, c), Row(1, b)],
    [Row(0, a), Row(1, d)]"""
    def key(row):
        parts = (str(seed), str(row.label), *row.fields.values())
        return text_sha256("\t".join(parts)).digest()
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
    def key(row):
        return text_sha256("\t".join(row.fields.values())).digest()
    return sorted(rows, key=key)[:number] if number < len(rows) else rows


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
