"""The embedded model and its data: kept apart, conventional, and good enough to learn on."""

import csv
import gzip
import json
import re
from itertools import product

import numpy as np
import pytest
import torch

import corpus as corpus_module
import measure
import supmer
import train
from common import InputError
from conftest import TINY, logits, needs_transformers
from corpus import hash_share
from t5 import EOS, PAD, embed_tokens, load_t5
from tasks import GROUPS, TASKS, load_test, task_examples
from templates import MASK
from tiny import build
from tiny.build import forbidden_grams, grams, words_of

LABEL_WORDS = ("yes no maybe Yes No A B C D terrible great bad okay good subjective objective "
               "description entity expression human location number").split()
UNSEEN = 0.07       # documents of a smaller hash_share were kept out of the T5's training


@pytest.fixture(scope="module")
def corpus():
    """Its documents, each a list of paragraphs."""
    with gzip.open(TINY / "corpus.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["paragraphs"] for line in file]


def test_splits_are_disjoint_and_unknown_to_the_corpus(corpus, tmp_path):
    """No text comes twice, and no row shares 8 words in a row with the corpus. What must not be
    shared is read from every file of the test sets, which must be there, and from all rated
    sentences."""
    with pytest.raises(InputError, match="has no original/, whose sentences must stay out"):
        build.main(["--data", str(tmp_path), "--out", str(tmp_path)])
    (tmp_path / "original/sst").mkdir(parents=True)
    (tmp_path / "original/sst/test.csv").write_text("1,B C d: E f g h\"I j")
    assert forbidden_grams({"movie": [(2.0, "S t u v w x y Z.")]}, tmp_path) == {
        "1 b c d e f g h", "b c d e f g h i", "c d e f g h i j", "s t u v w x y z"}
    found, keys = set().union(*(grams(" ".join(paragraphs)) for paragraphs in corpus)), []
    assert not found.isdisjoint(grams("IN THE BEGINNING, God created the heaven and the earth."))
    for task, split in product(GROUPS["offline"], ("train", "dev", "test")):
        with open(TINY / f"tasks/{task}/{split}.csv", newline="", encoding="utf-8") as file:
            labels, texts = zip(*csv.reader(file))
        assert set(labels) == {"0", "1"}
        assert all(found.isdisjoint(grams(text)) for text in texts)
        keys += [(task, *words_of(text)) for text in texts]
    assert len(keys) == len(set(keys)) == 15658


def test_what_is_held_out_was_never_trained_on(corpus):
    """What train.py holds out of the corpus is among the 7 % that the T5 never learned from."""
    assert hash_share(["It rained."]) == 0.5438340513254594
    shares = np.array([hash_share(paragraphs) for paragraphs in corpus])
    read = np.cumsum([sum(len(p.encode()) for p in paragraphs) for paragraphs in corpus])
    for part in (shares, shares[read <= train.TINY_VALUES["bytes"][0]]):
        chosen = corpus_module.hold_out(part)
        assert chosen.sum() >= 2 and (part[chosen] < UNSEEN).all()
    assert 0.05 < (shares < UNSEEN).mean() < 0.09


def test_tokenizer_keeps_t5s_conventions(tokenizer):
    """Special tokens are where T5 has them; each label word is one piece; odd text comes back."""
    last = tokenizer.get_vocab_size() - 1
    names = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in range(100))]
    assert [tokenizer.token_to_id(name) for name in names] == [
        PAD, EOS, 2, *range(last, last - 100, -1)]
    ids = tokenizer.encode(f"It was {MASK} ?").ids
    assert ids.index(last) == 2 and ids[-1] == EOS and len(ids) == 5
    for word in LABEL_WORDS:
        ids = tokenizer.encode(word, add_special_tokens=False).ids
        assert [tokenizer.id_to_token(i) for i in ids] == ["▁" + word]
    assert tokenizer.token_to_id("▁A") != tokenizer.token_to_id("▁a")
    for text in ("naïve café", "日本語 и кириллица", "😀 x^2 ≠ 3", "\tA  b\nc", "“Don’t!”"):
        ids = tokenizer.encode(text).ids
        plain = re.sub("[“”]", '"', text).replace("’", "'")
        assert 2 not in ids and "".join(tokenizer.decode(ids).split()) == "".join(plain.split())
    spaced, natural = "it 's n't bad , does n't it .", "it'sn't bad, doesn't it."
    assert tokenizer.encode(spaced).ids == tokenizer.encode(natural).ids


def test_model_is_small_and_knows_sentiment(tokenizer):
    """At most 20 MB; on 200 movie sentences it beats the majority by 3 standard errors untuned."""
    assert (TINY / "model.safetensors").stat().st_size <= 20_000_000
    t5 = load_t5(TINY)
    examples = task_examples(tokenizer, TASKS["movie"], load_test(TASKS["movie"])[:200])
    none = torch.zeros(0, t5.config.d_model)
    found = measure.score(t5, none, examples, supmer.Method()).argmax(1)
    majority = torch.bincount(examples.labels).max() / 200
    assert (found == examples.labels).float().mean() > majority + 3 * (0.25 / 200) ** 0.5


@needs_transformers
def test_transformers_loads_the_folder(tokenizer):
    """AutoTokenizer gives the same ids, AutoModelForSeq2SeqLM the same logits to 1e-4."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
    theirs, model = AutoTokenizer.from_pretrained(TINY), AutoModelForSeq2SeqLM.from_pretrained(
        TINY, dtype=torch.float32)
    for text in (f"A fine film. It was {MASK} ?", "naïve 日本", ""):
        assert theirs(text).input_ids == tokenizer.encode(text).ids
    ids = torch.tensor([theirs(f"A fine film. It was {MASK} ?").input_ids])
    start, mask = torch.tensor([[0, tokenizer.token_to_id(MASK)]]), torch.ones_like(ids).bool()
    t5 = load_t5(TINY)
    ours = logits(t5, embed_tokens(t5, ids), mask, start)
    assert torch.allclose(ours, model(input_ids=ids, decoder_input_ids=start).logits, atol=1e-4)
