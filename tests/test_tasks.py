"""Tests of tasks."""

import corpus as corpus_module
import csv
import data
import hashlib
import json
import numpy as np
import os
import pickle
import pytest
import re
import tasks
from collections import Counter
from common import InputError
from data import MASK
from pathlib import Path
from tasks import TASKS, load_test
from tokenizers import Tokenizer
from conftest import (Evil, FORMATS, SUPMER_DATA, TEMPLATE_WORDS, by_topic, needs_data,
    write_model, write_task)


# ------------------------------------------------------------------------------ data: labeled tasks

def write_sst2(folder, train, dev=None):
    (folder / "original" / "SST-2").mkdir(parents=True, exist_ok=True)
    for name, content in (("train", train), ("dev", dev)):
        if content is not None:
            (folder / "original" / "SST-2" / f"{name}.tsv").write_bytes(content)


def test_labeled_files_literally(tmp_path):
    """LM-BFF's tsv, where a quote is a character, and label,text csv, where it is a quote; training
    and test apart."""
    write_sst2(tmp_path, b'sentence\tlabel\n"fine film\t1\nno , thanks\t0\n',
               b"sentence\tlabel\nok .\t1\n")
    assert tasks.load_train(tasks.TASKS["sst2"], tmp_path) == [tasks.Row(1, {"text": '"fine film'}),
                                                             tasks.Row(0, {"text": "no , thanks"})]
    assert tasks.load_test(tasks.TASKS["sst2"], tmp_path) == [tasks.Row(1, {"text": "ok ."})]
    (tmp_path / "tasks" / "movie").mkdir(parents=True)
    content = '1,"It works, and ""well"".\nTwice."\r\n0,caf\u00e9\n'
    (tmp_path / "tasks" / "movie" / "train.csv").write_text(content)
    found = tasks.load_train(tasks.TASKS["movie"], tmp_path)
    assert found == [tasks.Row(1, {"text": 'It works, and "well".\nTwice.'}),
                     tasks.Row(0, {"text": "caf\u00e9"})]
    with pytest.raises(InputError, match="test.csv is missing"):
        tasks.read_rows(tmp_path / "tasks" / "movie" / "test.csv", tasks.TASKS["movie"])


@pytest.mark.parametrize("content, says", [
    (b"", "no rows"), (b"text\tlabel\nok\t1\n", "line 1"), (b"sentence\tlabel\n", "no rows"),
    (b"sentence\tlabel\nok\t1\nok\t2\n", "line 3"),
    (b"sentence\tlabel\nok\tpositive\n", "line 2"),
    (b"sentence\tlabel\nok\t1\textra\n", "line 2"), (b"sentence\tlabel\nok\n", "line 2"),
    (b"sentence\tlabel\n \t1\n", "line 2"),
    (b"sentence\tlabel\ncaf\xe9\t1\n", "table in UTF-8"),
    ("sentence\tlabel\nok\t1\n".encode("utf-16"), "table in UTF-8"),
])
def test_bad_labeled_rows_are_refused_with_file_and_line(tmp_path, content, says):
    """A wrong header, label, number of columns, a blank text, other encodings: an InputError of one
    line."""
    write_sst2(tmp_path, content)
    with pytest.raises(InputError, match=says) as error:
        tasks.load_train(tasks.TASKS["sst2"], tmp_path)
    assert "train.tsv" in str(error.value) and "\n" not in str(error.value)


def test_a_csv_with_an_open_quote_is_refused(tmp_path):
    """It would swallow the rest of the file as one text."""
    (tmp_path / "tasks" / "nyt").mkdir(parents=True)
    (tmp_path / "tasks" / "nyt" / "train.csv").write_text('1,"never closed\n0,text\n')
    with pytest.raises(InputError, match="well quoted"):
        tasks.load_train(tasks.TASKS["nyt"], tmp_path)


def labeled_rows(counts):
    return [tasks.Row(label, {"text": f"text {label} {i}"})
            for label, n in enumerate(counts) for i in range(n)]


def test_few_shot_samples_are_balanced_disjoint_and_fixed():
    """16 + 16 a label, no text twice, the same for the same seed in whatever order rows come,
    another for another seed."""
    rows = labeled_rows([100, 50, 40])
    train, validation = tasks.few_shot(rows, 16, 10, 3)
    for part in (train, validation):
        assert Counter(row.label for row in part) == {0: 16, 1: 16, 2: 16}
    assert len({r.fields["text"] for r in train + validation}) == 96
    assert tasks.few_shot(rows[::-1], 16, 10, 3) == (train, validation)
    assert tasks.few_shot(rows, 16, 20, 3)[0] != train
    by_hash = sorted(rows[100:150],
                     key=lambda r: hashlib.sha256(f"10\t1\t{r.fields['text']}".encode()).digest())
    assert train[16:32] == by_hash[:16] and validation[16:32] == by_hash[16:32]


def test_few_shot_with_small_classes_duplicates_and_contradictions():
    """A class of 7 texts gives 3 and 3; a text that comes often, even under both labels, is used
    once."""
    train, validation = tasks.few_shot(labeled_rows([40, 7]), 16, 0)
    assert Counter(r.label for r in train) == Counter(r.label for r in validation) == {0: 16, 1: 3}
    rows = [tasks.Row(label, {"text": f"text {i}"}) for i in range(20) for label in (0, 1, 1)]
    for seed in range(20):
        sample = [r.fields["text"] for part in tasks.few_shot(rows, 4, seed) for r in part]
        assert len(set(sample)) == len(sample)
    for bad in (labeled_rows([5, 1]), labeled_rows([5]),
                labeled_rows([5]) + [tasks.Row(1, {"text": "same"})] * 3):
        with pytest.raises(InputError, match="label 1 has"):
            tasks.few_shot(bad, 16, 0)
    with pytest.raises(InputError, match="label 2 has 0"):
        tasks.few_shot(labeled_rows([5, 5]), 16, 0, 3)


def test_task_examples_literally(tmp_path):
    """`s It was <X> ?`, terrible and great; a long text is cut to the task's 128 tokens, the
    template stays."""
    _, tokenizer = write_model(tmp_path, "A fine film. It was ? terrible great".split())
    rows = [tasks.Row(1, {"text": "A fine film."}), tasks.Row(0, {"text": "A " * 300})]
    examples = tasks.task_examples(tokenizer, tasks.TASKS["sst2"], rows)
    end = "It was <extra_id_0> ?</s>"
    shown = [data.examples_as_text(tokenizer, examples, row) for row in (0, 1)]
    assert shown == [(f"A fine film. {end}", "great"), ("A " * 123 + end, "terrible")]
    assert len(examples.ids[1]) == 128 and examples.labels.tolist() == [1, 0]
    assert data.collate(examples, [0, 1]).ids.shape == (2, 128)


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_literally(tmp_path, name):
    """Quotes, tabs, byte-order mark, label words and the hypothesis' last point as each format has
    them; of CR's blank texts the last one is left out, of QQP's ragged rows all; both are said, and
    so is a size that is not the paper's."""
    written, read = FORMATS[name]
    said = []
    write_task(tmp_path, name, written)
    assert tasks.load_train(TASKS[name], tmp_path, said.append) == [tasks.Row(*row) for row in read]
    size = TASKS[name].sizes[0]
    told = [f"{len(read):,} rows, the paper has {size:,}"] if size else []
    told = {"cr": ["last row", "1 rows without"], "qqp": ["2 rows with"]}.get(name, []) + told
    assert len(said) == len(told) and all(b in a for a, b in zip(said, told))


def test_texts_without_labels_literally(tmp_path):
    """A line of a .txt is a text, tabs and all; other formats name the template's texts, which are
    prepared as in training; a blank one is refused with its line."""
    (tmp_path / "new.txt").write_text("What a\tjoy.\n\ufeffNo.")
    assert tasks.load_texts(tmp_path / "new.txt", TASKS["mr"]) == [
        tasks.Row(0, {"text": "What a\tjoy."}), tasks.Row(0, {"text": "\ufeffNo."})]
    (tmp_path / "new.csv").write_text('id,premise,hypothesis\n7,"It rains, he said.",It rains!\n')
    assert tasks.load_texts(tmp_path / "new.csv", TASKS["cb"]) == [
        tasks.Row(0, {"hypothesis": "It rains", "premise": "It rains, he said."})]
    for content, says in (("ok\n\n", "new.txt, line 2"), ("", "no texts")):
        (tmp_path / "new.txt").write_text(content)
        with pytest.raises(InputError, match=says):
            tasks.load_texts(tmp_path / "new.txt", TASKS["mr"])


@pytest.mark.parametrize("content", [
    pickle.dumps(Evil()), pickle.dumps((["a", "b"], [0, Evil()])), pickle.dumps((["a"], [0, 1])),
    pickle.dumps((["a"], ["0"])), pickle.dumps((["a", "b"], [0, 1]))[:-4], b"", b"text\t1\n",
    pickle.dumps((["a", "b"], [0, 2]))])
def test_a_pickle_is_data_or_it_is_refused(tmp_path, monkeypatch, content):
    """Code in it, a wrong shape or label, damage: an InputError of one line, and nothing is run."""
    monkeypatch.chdir(tmp_path)
    write_task(tmp_path, "books", content)
    with pytest.raises(InputError, match="domain/books/train") as error:
        tasks.load_train(TASKS["books"], tmp_path)
    assert "\n" not in str(error.value) and not Path("executed").exists()


def test_templates_and_words_literally():
    """What T5 reads of an example of each task, as the authors released their templates."""
    row = {"hypothesis": "h", "premise": "p", "text": "s", "sentence": "s", "question": "q",
           "sentence1": "s1", "sentence2": "s2", "word": "w", "a": "a", "b": "b"}
    shown = {name: (task.template.replace("<X>", "X").format(**row), " ".join(task.words))
             for name, task in TASKS.items()}
    sentiment = ("s It was X ?", "terrible great")
    assert shown == {
        **dict.fromkeys(("sst2", "mr", "cr", *tasks.GROUPS["dg"], "movie", "amazon", "nyt",
                         "tweets"), sentiment),
        "sst5": ("s It was X ?", "terrible bad okay good great"),
        "subj": ("s This is X .", "subjective objective"),
        "trec": ("s X :", "description entity expression human location number"),
        "cb": ('" h " ? X , " p "', "yes no maybe"), "rte": ('" h " ? X , " p "', "yes no"),
        "qnli": ("s . Question: q ? Answer: X .", "Yes No"),
        "wic": ('" s1 " / " s2 " Similar sense of "w"? X .', "No Yes"),
        "mrpc": ("Do a and b have the same meaning? X .", "No Yes"),
        "qqp": ("Do a and b have the same meaning? X .", "No Yes")}
    longer = {name for name, task in TASKS.items() if task.max_tokens == 256}
    assert longer == {"cr", "subj", "cb", "rte", "wic", *tasks.GROUPS["dg"]}


@needs_data
def test_label_words_are_one_piece_of_the_official_t5():
    """Each task's words, word-initial, differ in their one piece; a template's quotes and points
    are pieces that T5 knows, its mask is <extra_id_0>."""
    tokenizer = Tokenizer.from_file(os.path.join(SUPMER_DATA, "t5_tokenizer", "tokenizer.json"))
    for name, task in TASKS.items():
        targets = data.decoder_targets(tokenizer, task.words)
        assert len({piece for _, piece in targets}) == len(task.words)
        parts = data.compile_template(tokenizer, task.template)
        literal = [part for part in parts if isinstance(part, list)]
        assert [32099] in literal and data.UNK not in sum(literal, [])
    assert data.decoder_targets(tokenizer, ["yes", "no"]) == [[32099, 4273], [32099, 150]]


def test_jsonl_of_other_things_is_refused(tmp_path):
    """A null, a list, a missing key, no JSON: the line is named."""
    row = '{"premise": "p", "hypothesis": "h", "label": "neutral"}\n'
    for bad in ('{"premise": null, "hypothesis": "h", "label": "neutral"}', "[]", "{", "7",
                '{"premise": ["p"], "hypothesis": "h", "label": "neutral"}', '{"label": true}'):
        write_task(tmp_path, "cb", row + bad + "\n")
        with pytest.raises(InputError, match="train.jsonl, line 2"):
            tasks.load_train(TASKS["cb"], tmp_path)


@needs_data
@pytest.mark.parametrize("name, first", [
    ("sst2", "a stirring , funny and finally transporting re-imagining of beauty and the beast "),
    ("sst5", "a stirring , funny and finally transporting re-imagining of beauty and the beast "),
    ("mr", ' " analyze that " is one of those crass'), ("cr", "it 's not as stylized as a sony"),
    ("subj", "gangs , despite the gravity of its subject matter"),
    ("cb", "the language was peeled down"), ("rte", "Weapons of Mass Destruction Found in Iraq"),
    ("mrpc", 'Amrozi accused his brother , whom he called " the witness "'),
    ("airlines", "WAW-SKJ Economy. No free snacks"), ("books", "Horrible book, horrible.\n\tTHis"),
    ("electronics", "bad\n\tcons\ntips extremely"), ("restaurants", "Wow... Loved this place.")])
def test_real_tasks_are_read_whole(name, first, tokenizer):
    """The sizes of the paper's Table 5 and of the domains, all labels, how the first row begins;
    the only thing that is told of sizes is Restaurants'. The embedded model can read all of them:
    the longest texts are cut to the limit, none loses the mask."""
    said, task = [], TASKS[name]
    train, test = (load(task, SUPMER_DATA, said.append) for load in (tasks.load_train, load_test))
    ours = {"restaurants": (1000, 1000)}.get(name, (task.sizes[0] or 1700, task.sizes[1]))
    assert (len(train), len(test)) == ours and [*train[0].fields.values()][0].startswith(first)
    for rows in (train, test):
        assert {row.label for row in rows} == set(range(len(task.words)))
    assert [line for line in said if "the paper has" in line] == [
        f"{SUPMER_DATA}/{task.test}: 1,000 rows, the paper has 2,000"] * (name == "restaurants")
    assert any("the last row" in line for line in said) == (name == "cr")
    longest = sorted(test, key=lambda row: -max(map(len, row.fields.values())))[:5]
    examples, mask = tasks.task_examples(tokenizer, task, longest), tokenizer.token_to_id(MASK)
    assert all(ids.count(mask) == 1 and len(ids) <= task.max_tokens for ids in examples.ids)
    assert len(set(map(tuple, examples.words))) == len(task.words)


def labeled_store(folder, rows, clusters=3):
    """A .csv of (label, text), each text's first word its topic, T0.., as a labeled store."""
    known = [f"T{i}" for i in range(5)] + [word for row in rows for word in " ".join(row).split()]
    model, tokenizer = write_model(folder / "m", [*known, *tasks.SENTIMENT[5], "It", "was", "?"])
    with open(folder / "set.csv", "w", newline="") as file:
        csv.writer(file).writerows([("label", "text"), *rows])
    return tasks.build_labeled(folder / "cache", folder / "set.csv", tokenizer, None, clusters, 0,
                              model=model, embed=by_topic(tokenizer)), tokenizer


def test_long_documents_are_whole(tmp_path, monkeypatch):
    """Documents of more sentences than are tokenized together, between short ones, and text that is
    gone on with after a stop between two saved states: the store's sentences are the corpus's."""
    words = [f"w{i}" for i in range(60)] + ["end."]
    model, tokenizer = write_model(tmp_path / "model", words + TEMPLATE_WORDS)
    rng = np.random.default_rng(0)
    lengths = (4, 50, 4, 30, 6, 5, 21)
    documents = [[" ".join([*(f"w{j}" for j in rng.permutation(60)[:5]), "end."])
                  for _ in range(length)] for length in lengths]
    for number in range(2):
        lines = [json.dumps({"paragraphs": d}) for d in documents[number::2]]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    expected = [data.tokenize(tokenizer, d) for number in range(2) for d in documents[number::2]]
    monkeypatch.setattr(corpus_module, "SLICE", 7)
    monkeypatch.setattr(corpus_module, "SAVED", 1)
    original, calls = corpus_module.join_short, []

    def stopped(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*arguments)
    monkeypatch.setattr(corpus_module, "join_short", stopped)

    def build(cache="cache"):
        return corpus_module.build_store(tmp_path / cache, [tmp_path / "0.jsonl", tmp_path / "1.jsonl"],
                                tokenizer, None, 3, 0, model=model,
                                embed=lambda ids, mask: ids[:, :4].float())
    with pytest.raises(KeyboardInterrupt):
        build()
    store = build()
    assert len(calls) == len(lengths) + 2               # those of the stopped slice twice
    found = [[store.sentence(i).tolist() for i in range(begin, end)]
             for begin, end in zip(store.first, [*store.first[1:], len(store.anchor)])]
    assert found == expected and store.meta["counts"]["documents"] == len(lengths)
    assert build("unbroken").meta == store.meta


def test_labeled_sets_become_meta_tasks(tmp_path):
    """Table 3: a task is one cluster (here: one topic) of one set; labels are the set's own words
    and what the file says of each text, balanced in both sets, which share no text."""
    label = {}
    for i in range(900):
        label[f"T{i % 3} d{i}"] = ("good", "bad", "so-so")[i // 3 % 3]
    store, tokenizer = labeled_store(tmp_path, [(word, text) for text, word in label.items()])
    index = tasks.LabeledIndex({"set": store}, tokenizer, support=7, query=3)
    for step in range(20):
        split = ("train", "validation")[step % 2]
        task = tasks.labeled_task(index, 0, step, 0, stream=1, split=split)
        partner = tasks.labeled_task(index, 0, step, 0, stream=2, variant="set", avoid=task.clusters)
        assert task.variant == "set" and partner.clusters != task.clusters
        sources = []
        for examples, n in ((task.support, 7), (task.query, 3)):
            shown = [data.examples_as_text(tokenizer, examples, row) for row in range(n)]
            for source, target in shown:
                text = re.fullmatch(r"(T\d d\d+) It was <extra_id_0> \?</s>", source).group(1)
                assert label[text] == target
                sources.append(text)
            counts = Counter(target for _, target in shown)
            assert set(counts) == {"good", "bad", "so-so"} and max(counts.values()) <= n // 3 + 1
        assert len(set(sources)) == 10 and len({text[:2] for text in sources}) == 1
    again = tasks.labeled_task(tasks.LabeledIndex({"set": store}, tokenizer, support=7, query=3),
                              0, 19, 0, stream=1, split="validation")
    assert again.support.ids == task.support.ids and again.query.ids == task.query.ids
    says = r"set: validation texts: .* 40 of each label, each one lacks (\d+, ){2}\d+: give more"
    with pytest.raises(InputError, match=says):
        tasks.LabeledIndex({"set": store}, tokenizer, support=60, query=60)
    one = {"set": store._replace(cluster=np.zeros_like(store.cluster))}
    tasks.LabeledIndex(one, tokenizer, support=7, query=3)
    with pytest.raises(InputError, match="set: train texts: at least 2 .* lacks 0, 12, 12"):
        tasks.LabeledIndex(one, tokenizer, support=7, query=3, mixing=True)
    with pytest.raises(InputError, match="set: one usable train cluster, mixing needs two"):
        tasks.labeled_task(index, 0, 0, 0, stream=2, variant="set", avoid=tuple(range(99)))


@pytest.mark.parametrize("row", [("", "T0 d1"), ("bad", " ")])
def test_labeled_sets_have_a_label_and_a_text_in_each_row(tmp_path, row):
    """What has none is told with its line."""
    rows = [(("good", "bad")[i % 2], f"T{i % 3} d{i}") for i in range(60)]
    with pytest.raises(InputError, match="set.csv, line 6.: .*a row is a label .* and text"):
        labeled_store(tmp_path, [*rows, row])


@pytest.mark.parametrize("labels, known", [
    ("14523", ("terrible", "bad", "okay", "good", "great")), ("01", ("terrible", "great")),
    (("yes", "no"), ("no", "yes")), ("012", None), (("no",), None)])
def test_words_of_labeled_sets(tmp_path, labels, known):
    """Words stand for themselves; numbers are sentiment's words, lowest first."""
    rows = [(labels[i % len(labels)], f"T{i % 3} d{i}") for i in range(60)]
    if known is None:
        with pytest.raises(InputError, match="set.csv has the labels"):
            labeled_store(tmp_path, rows)
        return
    store, _ = labeled_store(tmp_path, rows)
    place = {label: i for i, label in enumerate(known if labels[0] in known else sorted(labels))}
    assert tuple(store.meta["made_of"]["options"]["words"]) == known
    assert store.label.tolist() == [place[label] for label, _ in rows]
