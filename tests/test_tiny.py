"""Tests of tiny."""

import common
import corpus as corpus_module
import csv
import data
import hub as hubs
import importlib
import io
import json
import math
import numpy as np
import os
import pytest
import re
import supmer
import sys
import t5 as T
import tiny as maker
import torch
import train
import zipfile
from common import InputError
from corpus import hash_share
from data import MASK, TaskIndex, collate, meta_task
from pathlib import Path
from t5 import EOS, PAD, load_t5
from tasks import TASKS, load_test, task_examples
from tiny import grams, held_out, jargon_entries, make_tasks, read_records
from conftest import TINY, corpus


@pytest.mark.parametrize("argv, says", [
    ([], "give --data FOLDER"), (["--data", ""], "give --data FOLDER"),
    (["--data", "none"], "none has no text"), (["--data", "text", "--steps", "0"], "--steps 0: 1"),
    (["--data", "text", "--steps", "9" * 30], "at most"), (["--stepz"], "the options are --data"),
    (["--data", "text", "--out", "ro"], "ro cannot be written to"),
    (["--data", "text", "--work", "ro"], "ro cannot be written to"),
    (["--data", "text", "--work", "old"], "old was made of other text")])
def test_mistakes_in_building_tiny(argv, says, tmp_path, monkeypatch):
    """Told before anything is fetched or trained; tiny/ is not touched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SUPMER_DATA", raising=False)
    monkeypatch.setattr(maker, "fetch", lambda folder: pytest.fail("it fetches"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "ro" and access(
        path, mode))
    for name in ("text", "ro", "old"):
        Path(name).mkdir()
    Path("text/a.txt").write_text("It rained.")
    Path("old/made_of").write_bytes(b"\xff")
    with pytest.raises(InputError, match=says):
        maker.main(argv)
    assert not any(Path(name).exists() for name in ("tiny/config.json", "text/config.json"))


def test_a_damaged_package_of_tinys_is_told(tmp_path, monkeypatch):
    """With the folder that is to be deleted."""
    monkeypatch.setattr(maker, "build", lambda *_: zipfile.ZipFile(io.BytesIO(b"none")))
    with pytest.raises(InputError, match="a package is damaged .*: delete w/packages"):
        maker.main(["--data", str(tmp_path), "--work", "w"])


def test_a_terminal_without_the_signs_does_not_stop_a_result(monkeypatch):
    """What stdout's encoding lacks, such as a table's \u00b1, is escaped."""
    shown = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "argv", ["eval.py"])
    with pytest.raises(SystemExit):
        common.run_script(lambda argv: print("70.0 \u00b1 10.0"), "stopped")
    shown.flush()
    assert shown.buffer.getvalue() == b"70.0 \\xb1 10.0\n"


# ------------------------------------------------------------ the embedded T5: meta-training learns

THEMES = [
    "soup bread onion butter oven knife salt plate",
    "ship sail captain harbor wave anchor storm sailor",
    "judge court lawyer crime prison police trial witness",
    "song piano singer concert drum melody band guitar",
    "cow horse sheep barn wheat farmer field pig",
    "soldier army battle gun general enemy sword tank",
]


@pytest.fixture(scope="module")
def themes(tmp_path_factory):
    """The embedded T5 and a planted corpus: 180 documents, each of 14 sentences on one of six
    themes -> (t5, index).
    """
    folder, rng = tmp_path_factory.mktemp("themes"), np.random.default_rng(0)
    forms = [
        "The {} and the {} were near the {}.",
        "He saw a {}, then a {} and a {}.",
        "Where the {} is, the {} and the {} are not far.",
        "They spoke of the {}, the {} and the {}.",
    ]
    lines = [
        json.dumps(
            {
                "text": " ".join(
                    forms[rng.integers(4)].format(
                        *rng.choice(THEMES[d % 6].split(), 3, replace=False)
                    )
                    for _ in range(14)
                )
            }
        )
        for d in range(180)
    ]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    model = hubs.model_folder("tiny")
    t5 = T.load_t5(model)
    tokenizer = data.load_tokenizer(model, t5.config)
    store = corpus_module.build_store(
        folder / "cache", [folder / "corpus.jsonl"], tokenizer, t5, 6, 0, model=model
    )
    return t5, TaskIndex(
        store, tokenizer, support=8, query=8, variants=("sp-cluster", "mc-cluster")
    )


def test_meta_training_on_a_planted_corpus(themes):
    """From a vocabulary prompt, three meta-steps: held-out loss after adaptation falls, adaptation
    lowers it, and on both same-cluster variants the adapted prompt beats chance by three standard
    errors, its label-word loss ln K.
    """
    t5, index = themes
    training, method, _, _ = train.parse(["--steps", "3", "--support", "8", "--query", "8"])
    state = supmer.init_state(
        supmer.init_prompt(t5, 20, 0), method
    )
    held_out = [
        meta_task(index, 0, 0, i, variant=variant, split="validation", stream=3)
        for variant in ("sp-cluster", "mc-cluster")
        for i in range(6)
    ]
    before = train.validate(t5, state, held_out, method)
    for step in range(3):
        tasks = [
            meta_task(index, 0, step, i, variant=v, stream=1)
            for i, v in enumerate(("sp-cluster", "mc-cluster"))
        ]
        pairs = [
            (
                task,
                meta_task(index, 0, step, i, variant=task.variant, stream=2, avoid=task.clusters),
            )
            for i, task in enumerate(tasks)
        ]
        supmer.meta_step(t5, state, pairs, method, 0)
    after = train.validate(t5, state, held_out, method)
    assert after["loss"] < before["loss"] and after["loss"] < after["loss_before"]
    for variant, K in (("sp-cluster", 2), ("mc-cluster", 4)):
        found, error = after["variants"][variant], math.sqrt((1 / K) * (1 - 1 / K) / (6 * 8))
        assert found["correct_after"] > 1 / K + 3 * error, (variant, found)
        assert found["word_loss_after"] < math.log(K), (variant, found)
LABEL_WORDS = ("yes no maybe Yes No A B C D terrible great bad okay good subjective objective "
               "description entity expression human location number").split()


def rows_of(task, split):
    with open(TINY / "tasks" / task / f"{split}.csv", newline="", encoding="utf-8") as file:
        return [(int(label), text) for label, text in csv.reader(file)]


def overlap(documents, texts):
    """How many texts share an 8-gram with the documents."""
    found = set().union(*(grams(" ".join(document["paragraphs"])) for document in documents))
    return sum(not found.isdisjoint(grams(text)) for text in texts)


def test_corpus_shares_no_8_gram_with_any_committed_split():
    """Nothing that is tested on can be learned from the corpus: 0 of the committed rows share 8
    words in a row with it. A planted row is found."""
    documents = corpus()
    texts = [text for path in (TINY / "tasks").glob("*/*.csv")
             for _, text in rows_of(path.parent.name, path.stem)]
    assert len(texts) == 15658
    assert overlap(documents, texts) == 0
    planted = next(text for text in texts if len(text.split()) > 12)
    documents.append({"paragraphs": [f"He said that {planted.upper()} And so on."]})
    assert overlap(documents, texts) >= 1


def test_corpus_is_what_the_card_says():
    """One entry or chapter a line, sentences in order; the numbers of tiny/README.md."""
    documents = corpus()
    card = (TINY / "README.md").read_text(encoding="utf-8")
    assert f"{len(documents):,} documents" in card
    assert all(set(d) == {"id", "title", "paragraphs"} and all(d["paragraphs"]) for d in documents)
    genesis = next(d for d in documents if d["id"] == "kjv/Ge1")
    assert genesis["paragraphs"][0].startswith("In the beginning God created the heaven and the")


def test_what_is_held_out_was_never_trained_on():
    """The documents that train.py holds out of the embedded corpus, whole or its default part, are
    among those that tiny.py kept out of the T5's training; a document's place depends on its text
    alone."""
    assert hash_share(["It rained."]) == 0.5438340513254594
    shares = np.array([hash_share(document["paragraphs"]) for document in corpus()])
    bytes_read = np.cumsum([sum(len(p.encode()) for p in document["paragraphs"])
                            for document in corpus()])
    for part in (shares, shares[bytes_read <= train.TINY_VALUES["bytes"][0]]):
        chosen = corpus_module.hold_out(part)
        assert chosen.sum() == round(0.05 * len(part))
        assert held_out(part[chosen]).all() and 0.05 < held_out(part).mean() < 0.09


def test_splits_are_disjoint_and_counted():
    """No text is in two splits or twice in one, by its words; counts are those of the card."""
    card = (TINY / "README.md").read_text(encoding="utf-8")
    for task in ("movie", "amazon", "nyt", "tweets"):
        keys = []
        for split in ("train", "dev", "test"):
            rows = rows_of(task, split)
            assert {label for label, _ in rows} == {0, 1}
            positive = sum(label for label, _ in rows)
            cell = rf"\| {task} \|.*\b{len(rows):,} \({positive:,}\)"
            assert re.search(cell, card), (task, split)
            keys += [" ".join(re.findall("[a-z0-9]+", text.lower())) for _, text in rows]
        assert len(keys) == len(set(keys))


def test_tasks_keep_clear_ratings_once(tmp_path):
    """Ratings under 1 in size go, a copy goes, 0 is negative."""
    counts = make_tasks({"movie": [(-1.0, "bad one"), (0.9, "so so"), (2.0, "Fine, it is!"),
                                   (3.0, "fine it is")]}, tmp_path)
    written = "".join((tmp_path / f"movie/{s}.csv").read_text() for s in ("train", "dev", "test"))
    assert sorted(written.splitlines()) == ['0,bad one', '1,"Fine, it is!"']
    assert sum(n for n, _ in counts.values()) == 2 and sum(p for _, p in counts.values()) == 1


def test_label_words_are_single_pieces(tokenizer):
    """Each label word is one word-initial piece, and A is not the article."""
    for word in LABEL_WORDS:
        ids = tokenizer.encode(word, add_special_tokens=False).ids
        assert [tokenizer.id_to_token(i) for i in ids] == ["▁" + word]
    assert tokenizer.token_to_id("▁A") != tokenizer.token_to_id("▁a")
    assert len({tokenizer.token_to_id("▁" + word) for word in LABEL_WORDS}) == len(LABEL_WORDS)


def test_tokenizer_keeps_t5s_conventions(tokenizer):
    """<pad> 0, </s> 1, <unk> 2, </s> appended, 100 sentinels counting down from the last id."""
    assert [tokenizer.token_to_id(t) for t in ("<pad>", "</s>", "<unk>")] == [PAD, EOS, 2]
    last = tokenizer.get_vocab_size() - 1
    ids = [tokenizer.token_to_id(f"<extra_id_{i}>") for i in range(100)]
    assert ids == list(range(last, last - 100, -1))
    ids = tokenizer.encode(f"It was {MASK} ?").ids
    assert ids.count(last) == 1 and ids[-1] == EOS and ids.index(last) == 2 and len(ids) == 5


@pytest.mark.parametrize(
    "text", ["naïve café", "日本語 и кириллица", "😀 x^2 ≠ 3", "\tA  b\nc", "“Don’t!”", ""]
)
def test_odd_text_comes_back(tokenizer, text):
    """No text becomes <unk>; decoding gives it back but for spaces and the form of quotes."""
    ids = tokenizer.encode(text).ids
    assert 2 not in ids
    plain = text.replace("“", '"').replace("”", '"').replace("’", "'")
    assert "".join(tokenizer.decode(ids).split()) == "".join(plain.split())


def test_spaced_and_natural_text_are_one(tokenizer):
    """LM-BFF's files are spaced (it 's good .), reviews are not: the model sees the same pieces."""
    spaced, natural = "it 's n't bad , does n't it .", "it'sn't bad, doesn't it."
    assert tokenizer.encode(spaced).ids == tokenizer.encode(natural).ids


def test_model_is_small_and_knows_sentiment(tokenizer):
    """At most 20 MB; on 200 movie sentences it beats the majority by 3 standard errors untuned."""
    assert (TINY / "model.safetensors").stat().st_size <= 20_000_000
    t5 = load_t5(TINY)
    examples = task_examples(tokenizer, TASKS["movie"], load_test(TASKS["movie"], TINY)[:200])
    batch = collate(examples, range(200))
    with torch.no_grad():
        H, mask = supmer.encode_with_prompt(t5, torch.zeros(0, t5.config.d_model), batch)
        found = supmer.word_log_probs(t5, H, mask, examples.words).argmax(1)
    majority = torch.bincount(examples.labels).max() / 200
    assert (found == examples.labels).float().mean() > majority + 3 * (0.25 / 200) ** 0.5


def test_jargon_entries():
    """A dictd entry, literally."""
    text = ("00-database-info\n    not prose at all here\nhack\n n.\n\n"
            "    1. A quick job that works,\n    or {kluge}.\n")
    assert jargon_entries(text) == [("hack", ["A quick job that works, or kluge."])]


def test_jargon_prose_only():
    """What a dictionary says of a word's grammar goes, and what is drawn is no prose."""
    text = ("bletch\n\n    [very common] n. obs. The sound of disgust.\n\n    adj.\n\n"
            "    o----)||(--+--|<----+   +---------o + D O\n")
    assert jargon_entries(text) == [("bletch", ["The sound of disgust."])]


def test_records_of_any_text(tmp_path):
    """tiny.py learns from lines of text with a rating or a category, or of paragraphs; another
    line ends with its number."""
    path = tmp_path / "mine.jsonl"
    path.write_text('{"text": "Fine.<br /><br />Buy it.", "rating": 9}\n'
                    '{"question": "Who?", "category": "people"}\n{"paragraphs": ["It rained."]}\n')
    assert list(read_records(path)) == [(9, "", ["Fine.", "Buy it."]), (0, "people", ["Who?"]),
                                        (0, "", ["It rained."])]
    for line in (b'["no record"]', b'{"text": "f\xfcr"}', b'{"paragraphs": "abc"}', b"[" * 10 ** 5,
                 b'{"paragraphs": [1]}', b'{"text": "ok", "rating": 99}'):
        path.write_bytes(b'{"text": "Fine."}\n' + line + b"\n")
        with pytest.raises(InputError, match="mine.jsonl, line [012]: no record with `paragraphs`"):
            list(read_records(path))
