"""Tests of tasks."""

import hashlib
import re
import shlex
from collections import Counter

import numpy as np
import pytest

import labeled
import tasks
import templates
from common import InputError
from conftest import FORMATS, SUPMER_DATA, by_topic, needs_data, write_model, write_task
from own import SENTIMENT, OwnTable, load_texts, match_words, own_task
from settings import settings_parser
from tasks import TASKS, LabeledTask, Row, load_test, load_train
from templates import MASK


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_literally(tmp_path, name):
    """What is left out is said, and a size that is not the paper's."""
    (written, read), said, size = FORMATS[name], [], TASKS[name].sizes[0]
    write_task(tmp_path, name, written)
    assert load_train(TASKS[name], tmp_path, said.append) == [Row(*row) for row in read]
    wanted = {"cr": ["last row"], "qqp": ["2 rows without"]}.get(name, [])
    wanted += [f"{len(read):,} rows, the paper has {size:,}"] if size else []
    assert len(said) == len(wanted) and all(b in a for a, b in zip(said, wanted))


def test_a_task_of_parts_has_as_many_rows_of_each():
    """source: label k has the first rows of the k-th task's file, whatever their labels there."""
    task = TASKS["source"]
    for load in (load_train, load_test):
        texts = [[row.fields for row in load(TASKS[name])] for name in task.parts]
        n = min(map(len, texts))
        assert [(row.label, row.fields) for row in load(task)] == [
            (k, fields) for k, part in enumerate(texts) for fields in part[:n]]


def test_templates_and_words_literally():
    """What T5 reads of an example of each task, as the authors released their templates."""
    row = {"hypothesis": "h", "premise": "p", "text": "s", "sentence": "s", "question": "q",
           "sentence1": "s1", "sentence2": "s2", "word": "w", "a": "a", "b": "b"}
    known = {name: task for name, task in TASKS.items() if task.groups}
    shown = {name: (task.template.replace("<X>", "X").format(**row), " ".join(task.words))
             for name, task in known.items()}
    sentiment = ("s It was X ?", "terrible great")
    assert shown == {
        **dict.fromkeys(("sst2", "mr", "cr", *tasks.GROUPS["dg"], *tasks.GROUPS["offline"]),
                        sentiment),
        "sst5": ("s It was X ?", "terrible bad okay good great"),
        "subj": ("s This is X .", "subjective objective"),
        "trec": ("s X :", "description entity expression human location number"),
        "cb": ('" h " ? X , " p "', "yes no maybe"), "rte": ('" h " ? X , " p "', "yes no"),
        "qnli": ("s . Question: q ? Answer: X .", "Yes No"),
        "wic": ('" s1 " / " s2 " Similar sense of "w"? X .', "No Yes"),
        "mrpc": ("Do a and b have the same meaning? X .", "No Yes"),
        "qqp": ("Do a and b have the same meaning? X .", "No Yes")}
    longer = {name for name, task in known.items() if task.max_tokens == 256}
    assert longer == {"cr", "subj", "cb", "rte", "wic", *tasks.GROUPS["dg"]}


@needs_data
@pytest.mark.parametrize("name", ["sst2", "sst5", "mr", "cr", "subj", "cb", "rte", "mrpc",
                                  "airlines", "books", "electronics", "restaurants"])
def test_real_tasks_are_read_whole(name, tokenizer):
    """The paper's sizes, but for Restaurants, which is said; a cut text keeps its one mask."""
    said, task = [], TASKS[name]
    train, test = (load(task, SUPMER_DATA, said.append) for load in (load_train, load_test))
    ours = {"restaurants": (1000, 1000)}.get(name, (task.sizes[0] or 1700, task.sizes[1]))
    assert (len(train), len(test)) == ours
    for rows in (train, test):
        assert {row.label for row in rows} == set(range(len(task.words)))
    assert sum("the paper has" in line for line in said) == (name == "restaurants")
    longest = sorted(test, key=lambda row: -max(map(len, row.fields.values())))[:5]
    examples, mask = tasks.task_examples(tokenizer, task, longest), tokenizer.token_to_id(MASK)
    assert all(ids.count(mask) == 1 and len(ids) <= task.max_tokens for ids in examples.ids)


def own(folder, content, template="{text} It was <X> .", test=None, **options):
    """own_task() of a new file -> the task, its rows as (label word, text, ...), what was said."""
    path, said = folder / "a.csv", []
    path.write_bytes(content if type(content) is bytes else content.encode())
    task = own_task(path, OwnTable(**options), template, test=test)
    rows = [(task.words[row.label], *row.fields.values())
            for row in load_train(task, say=said.append)]
    return task, rows, said


@pytest.mark.parametrize("labels, words, matched", [
    ("0 1", "1,0", "1=1 0=0"), ("1 2 3 4 5", "5,4,3,2,1", "5=5 4=4 3=3 2=2 1=1"),
    ("-1 1", "bad,good", "-1=bad 1=good"), ("10 9", "a,b", "9=a 10=b"),
    ("spam ham", "spam=junk, ham = fine", "spam=junk ham=fine"), ("spam ham", "junk,fine", ""),
    ("0.0 1.0", "", "0.0=terrible 1.0=great"), ("0.0 1.0", "1,0", "1.0=1 0.0=0"),
    ("0 1", "true,false", "1=true 0=false"), ("true false", "no,yes", "false=no true=yes"),
    ("True False", "", "False=terrible True=great"), ("no yes", "", "no=no yes=yes"),
    ("yes", "no,yes,maybe", "no=no yes=yes maybe=maybe"), ("no", "", ""), ("0 1 2", "", ""),
    ("False True", "1=good,false=bad", "True=good False=bad"), ("spam ham", "spam=junk", ""),
    ("0 1", "0=good,1=good", ""),
    ("spam ham", "spam=a,ham=b,spam=c", ""), ("0 1", "0=a,1=b,true=c", ""),
    ("0 1", "0=good,1", ""), (".5 1", "bad,good", ".5=bad 1=good"),
    ("11111111111111111111 11111111111111111112", "a,b",        # equal as floats
     "11111111111111111111=a 11111111111111111112=b")])
def test_labels_are_matched_by_name_or_refused(labels, words, matched):
    """By the words given, their names, or as rising numbers; what does not fit is listed."""
    counts = dict.fromkeys(labels.split(), 7)
    if matched:
        found = match_words("a.csv", counts, words)
        assert " ".join(f"{label}={word}" for label, word in found.items()) == matched
        return
    last = labels.split()[-1]
    listed = f"{len(counts)} labels, .*{last} .7 rows.*--words=.*{last}=WORD"
    with pytest.raises(InputError, match=listed):
        match_words("a.csv", counts, words)


def test_the_words_to_copy_can_be_pasted():
    """Into a shell, whatever is in the labels."""
    counts = dict.fromkeys(("-1", "it's", "a,b", "a", "b", "a=b", "x = y", "$(c) d", "e\u200bf"), 7)
    with pytest.raises(InputError) as error:
        match_words("a.csv", counts, "x")
    option, = shlex.split(str(error.value).partition("file): ")[2])
    words = "".join(part + str(k) for k, part in enumerate(option.split("WORD")))
    given = settings_parser("", [OwnTable], {}).parse_args([words[:-1]])
    matched = match_words("a.csv", counts, given.words)
    assert matched == {label: str(k) for k, label in enumerate(sorted(counts))}


@pytest.mark.parametrize("content, options, rows, said", [
    ("kind,body\nspam,Caf\u00e9!\nham,Hi.\n ,x\nham,\n".encode("cp1252"),
     {"label_column": "kind", "text_column": "body", "words": "spam=junk,ham=fine",
      "encoding": "cp1252"}, [("junk", "Caf\u00e9!"), ("fine", "Hi.")],
     ["4 rows in 5 lines; columns kind, body; delimiter ','",
      "2 rows without kind or body are left out"]),
    ("label;text\n0;a\n1;b\n".encode("utf-16"), {"encoding": "utf-16"},
     [("terrible", "a"), ("great", "b")],
     ["2 rows in 3 lines; columns label, text; delimiter ';'"]),
    ("0,a\n1\u200b,b\ntrue,c\n1.0,d\n", {"header": False},
     [("terrible", "a"), ("great", "b"), ("great", "c"), ("great", "d")],
     ["4 rows in 4 lines; columns label, text; delimiter ','"])])
def test_what_was_read_is_printed(tmp_path, content, options, rows, said):
    """Columns, delimiter and what is left out. Labels of one value are one."""
    _, found, lines = own(tmp_path, content, **options)
    assert found == rows and [line.partition(": ")[2] for line in lines] == said


def test_a_template_names_columns(tmp_path):
    """An unknown one, or none, is refused, also of the test file, whose rows are not read."""
    content, template = "label,my-text,the title\n0,a,b\n1,c,d\n", "{the title}: {my-text} <X>"
    test = tmp_path / "test.csv"
    test.write_bytes(b"\xef\xbb\xbfsep=;\nmy-text;the title;label\n\xff\xfe;1;2")
    task, rows, _ = own(tmp_path, content, template, test=test)
    assert rows == [("terrible", "b", "a"), ("great", "d", "c")]
    for template, header, says in (
            ("{my-text} {other-col} <X>", "", "columns label, my-text, the title, .* other-col"),
            ("my-text <X>", "", "shows no {column}"), ("{my-text} {label} <X>", "", "or its label"),
            (template, "label,my-text\n", "test.csv has the columns label, my-text, and not"),
            ("{{my-text}} <X>", "", "other braces"), ("{my-text} {a <X>", "", "other braces"),
            (template, "label\n", "test.csv has the columns label, and not all of")):
        test.write_text(header)
        with pytest.raises(InputError, match=says):
            own(tmp_path, content, template, test=test)
    with pytest.raises(InputError, match="test.txt: give .csv, .tsv, .jsonl, .json$"):
        own(tmp_path, content, template, test="test.txt")


def test_each_label_is_shown_with_a_source(tokenizer, capsys):
    """As T5 reads it, with its rows and its target; a text is counted that is cut."""
    task = LabeledTask("", "", max_tokens=9, labels=("0.0", "1.0"))
    rows = [Row(1, {"text": "A fine film."}), Row(0, {"text": "bad " * 99}), Row(1, {"text": "b"})]
    assert list(tasks.task_lines(tokenizer, task, rows)) == [
        "  1 rows of label 0.0: bad bad bad bad It was <extra_id_0> ?</s> -> terrible",
        "  2 rows of label 1.0: A fine film . It was <extra_id_0> ?</s> -> great"]
    for most in (9, 999):
        tasks.print_cut(tokenizer, "t", task._replace(max_tokens=most), rows)
    assert capsys.readouterr().out == "t: of 3 texts 1 are cut to 9 tokens\n"


def test_label_words_that_cannot_win_are_refused(tokenizer):
    """A word that begins another in pieces, or that equals it after normalization."""
    for words in (["good", "bad", "good enough"], ["terrible", "good", " good"]):
        with pytest.raises(InputError, match="label word .*good.* begins with.*good.*choose"):
            templates.decoder_targets(tokenizer, words)
    assert len(templates.decoder_targets(tokenizer, ["good enough", "good at it", "bad"])) == 3


@pytest.mark.parametrize("name, content, task, texts, says", [
    ("a.txt", "What a\tjoy.\n\n\ufeffNo.", "mr", [["What a\tjoy."], ["\ufeffNo."]], "1 rows with"),
    ("a.csv", 'id;premise;hypothesis\n7;"It rains, he said.";It rains!\n', "cb",
     [["It rains", "It rains, he said."]], "1 rows in 2 lines; columns id, premise, hypothesis; "),
    ("a.csv", "text\nok, he said\nno; |\tyes\n", "mr", [["ok, he said"], ["no; |\tyes"]],
     "2 rows in 3 lines; columns text$"),
    ("a.csv", 'text\n"Good, really.\nA joy."\n"No, no."\n', "mr", [["Good, really.\nA joy."],
                                                                 ["No, no."]], "2 rows in 4"),
    ("a.txt", "", "mr", [], "a.txt has no rows of text"),
    ("a.txt", "a", "cb", [], "a.txt: give .csv"),
    ("a.csv", "id,premise\n1,2\n", "mr", [], "columns id, premise, and not all of text")])
def test_texts_without_labels_literally(tmp_path, name, content, task, texts, says):
    """A line of a .txt, or the template's columns, prepared as in training."""
    said, rows = [], []
    (tmp_path / name).write_text(content)
    try:
        rows = load_texts(tmp_path / name, TASKS[task], say=said.append)
    except InputError as error:
        said.append(str(error))
    assert [[*row.fields.values()] for row in rows] == texts and re.search(says, " ".join(said))


def labeled_rows(*counts):
    return [Row(label, {"text": f"text {label} {i}"})
            for label, n in enumerate(counts) for i in range(n)]


def test_few_shot_samples_are_balanced_disjoint_and_fixed():
    """By a hash of seed, label and text; half of a small class is for each part."""
    rows = labeled_rows(100, 50, 40)
    train, validation = tasks.few_shot(rows, 16, 10, 3)
    for label, part in enumerate((rows[:100], rows[100:150], rows[150:])):
        part = sorted(part, key=lambda r: hashlib.sha256(
            f"10\t{label}\t{r.fields['text']}".encode()).digest())
        assert train[16 * label:16 * label + 16] == part[:16]
        assert validation[16 * label:16 * label + 16] == part[16:32]
    assert tasks.few_shot(rows[::-1], 16, 10, 3) == (train, validation)
    for part in tasks.few_shot(labeled_rows(40, 7), 16, 0):
        assert [row.label for row in part] == [0] * 16 + [1] * 3
    rows = [Row(label, {"text": f"text {i}"}) for i in range(20) for label in (0, 1, 1)]
    for seed in range(20):
        sample = [r.fields["text"] for part in tasks.few_shot(rows, 4, seed) for r in part]
        assert len(set(sample)) == len(sample)
    for rows, classes, says in (
            (labeled_rows(5, 1), 2, "1 has 1"), (labeled_rows(5, 5), 3, "2 has 0"),
            (labeled_rows(5) + [Row(1, {"text": "same"})] * 3, 2, "1 has 1")):
        with pytest.raises(InputError, match=f"label {says} different texts"):
            tasks.few_shot(rows, 16, 0, classes)


def test_labeled_sets_become_meta_tasks(tmp_path, capsys):
    """Table 3: a task is a cluster of one set, with the file's labels, balanced."""
    label = {f"T{i % 3} d{i}": ("good", "bad", "so-so")[i // 3 % 3] for i in range(900)}
    words = [*" ".join(label).split(), "T3", "T4", *SENTIMENT[5], "so-so", "It", "was", "?"]
    model, tokenizer = write_model(tmp_path / "m", words)
    lines = [f"{word},{text}" for text, word in label.items()]
    (tmp_path / "set.csv").write_text("\n".join(["label,text", *lines]))
    store = labeled.build_labeled(tmp_path / "cache", tmp_path / "set.csv", tokenizer, None, 3, 0,
                                  model=model, max_tokens=6, embed=by_topic(tokenizer))
    assert "set.csv: of 900 texts 900 are cut to 6 tokens" in capsys.readouterr().out
    index = labeled.LabeledIndex({"set": store}, tokenizer, support=7, query=3)
    for step in range(20):
        split, sources = ("train", "validation")[step % 2], []
        task = labeled.labeled_task(index, 0, step, 0, split=split)
        partner = labeled.labeled_task(index, 0, step, 0, stream="partner", avoid=task.clusters)
        assert task.variant == "set" and partner.clusters != task.clusters
        for examples, n in ((task.support, 7), (task.query, 3)):
            counts = Counter()
            for row in range(n):
                source, target = templates.examples_as_text(tokenizer, examples, row)
                text = re.fullmatch(r"(T\d d\d+) It was <extra_id_0> \?</s>", source).group(1)
                assert label[text] == target
                sources.append(text)
                counts[target] += 1
            assert len(counts) == 3 and max(counts.values()) <= n // 3 + 1
        assert len(set(sources)) == 10 and len({text[:2] for text in sources}) == 1
    again = labeled.labeled_task(index, 0, 19, 0, split="validation")
    assert again.support.ids == task.support.ids and again.query.ids == task.query.ids
    one = store._replace(cluster=np.zeros_like(store.cluster))
    labeled.LabeledIndex({"set": one}, tokenizer, support=7, query=3)
    for wrong, support, query, says in (
            (store, 58, 59, "validation texts of each label: 1 .* must have 40, .* no --label"),
            (one, 7, 3, "train texts .* 2 .* the largest have 280, 0: no")):
        with pytest.raises(InputError, match=f"set: {says}"):
            labeled.LabeledIndex({"set": wrong}, tokenizer, support=support, query=query,
                                 mixing=wrong is one)
