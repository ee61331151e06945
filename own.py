"""A user's own labeled table as a task: its columns, and a word for each of its labels.

    task = own_task("mine.csv", OwnTable(words="spam=junk,ham=fine"), "{text} It was <X> .")
    rows = load_train(task)                         # of tasks.py, as of any other task
"""

import re
import shlex
from collections import Counter
from dataclasses import dataclass, fields
from decimal import Decimal

from common import InputError
from settings import knob
from tables import check_header, read_table
from tasks import LabeledTask, is_whole, label_value, read_rows
from templates import template_fields


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


def own_task(path, options, template, *, test=None, max_tokens=256):
    """A user's labeled file -> LabeledTask. options: an OwnTable. template: each {column} is one of
    the file's, {text} that of options.text_column. test: of it the header alone is read.
    Raises InputError for a column that is missing, and where labels and words do not match."""
    template = template.replace("{text}", f"{{{options.text_column}}}")
    columns = (options.label_column, *template_fields(template))
    rest = re.sub("{[^{}]*}", "", template)
    if len({*columns}) < max(2, len(columns)) or {*"{}"} & {*rest}:
        raise InputError(f"the template {template!r} shows no {{column}} of {path}, or its label, "
                         "or other braces: mend it")
    rows = read_table(path, columns, options.header, options.encoding)
    found = [values[0].strip() for _, values in rows if is_whole(values)]
    names = {label_value(label): label for label in reversed(found)}
    counts = Counter(names[label_value(label)] for label in found)
    if not found:
        raise InputError(f"{path} has no row with a text in each of {', '.join(columns)}")
    if test:
        check_header(test, columns, options.header, options.encoding)
    matched = match_words(path, counts, options.words)
    return LabeledTask(str(path), str(test or path), template, tuple(matched.values()), max_tokens,
                       labels=tuple(matched), columns=columns, incomplete="left",
                       header=options.header, encoding=options.encoding)


SENTIMENT = {2: ("terrible", "great"), 5: ("terrible", "bad", "okay", "good", "great")}


def match_words(path, counts, words):
    """{label: how often a file has it} and OwnTable's words -> {label: word}, in label order.
    words: "spam=junk,ham=fine"; "junk,fine" if these are the labels, or for numbers (or true and
    false), in rising order; "": the labels are the words, or two or five numbers, SENTIMENT."""
    values = {label_value(label): label for label in counts}
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
    pairs = list(pairs)
    matched = {values.get(label_value(label), label): word.strip() for label, word in pairs}
    different = {*matched.values()} - {""}
    if not set(labels) <= set(matched) or len(different) < max(2, len(pairs)):
        found = ", ".join(f"{label} ({counts[label]:,} rows)" for label in labels[:20])
        line = shlex.quote(",".join(f"{label}=WORD" for label in labels))
        raise InputError(f"{path} has {len(labels)} labels, {found}: give each a word of its "
                         f"own, two at least (merge labels in the file): --words={line}")
    return matched


def load_texts(path, task, options=OwnTable(), say=lambda line: None):
    """Unlabeled rows -> [Row], of label 0; a .txt's line `A joy.` -> Row(0, {"text": "A joy."})"""
    names = template_fields(task.template)
    columns = [options.text_column if name == "text" else name for name in names]
    task = task._replace(columns=("", *columns), incomplete="left", header=options.header,
                         encoding=options.encoding)
    return read_rows(path, task, say=say, labeled=False)
