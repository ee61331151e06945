"""Tests of corpus."""

import common
import corpus as corpus_module
import data
import gzip
import lzma
import numpy as np
import os
import pytest
import re
import t5 as T
import tarfile
import threading
import torch
from collections import Counter
from common import InputError
from corpus import documents, split_sentences
from functools import partial
from hypothesis import given, settings, strategies as st
from pathlib import Path
from types import SimpleNamespace
from conftest import (SUPMER_DATA, by_topic, held_out_documents, needs_data, openwebtext_tar,
    planted_paths, sentence, tar_of, write_model)


# ---------------------------------------------------------------------------------- data: sentences

@pytest.mark.parametrize("text", [
    # each sentence is parted from the next by " | "
    "It rained. | We left.", "It rained! | We left? | Yes.", "What?! | No!", "Really?? | Yes.",
    "One.", "no stop at all",
    "Mr. Fox met Dr. Hall and Mrs. Dean. | They sat.", "St. Paul came. | He spoke.",
    "Messrs. Smith and Co. were there.",
    "He read Tolkien, i.e. J. R. R. Tolkien, with joy. | Then he slept.",
    "See e.g. Plato. | He knew.",
    "J. Smith left. | R. Jones stayed.", "The U.S. Army won. | It was 1945.",
    "He lives in the U.S. | He likes it.",
    "Pi is 3.14 or so. | We use 3.1.", "It cost $5.50. | Ten came.",
    "At 5 p.m. Tom left. | At 6 p.m. | He was back.",
    "On Jan. 5 he came. | On Feb. 7 he left.", "Apples, pears, etc. were sold.",
    "Apples, pears, etc. | The end.",
    "Ford Inc. sued Jones Ltd. over it. | They won.", "See No. 5 and vol. 3, p. 12. | Read on.",
    "I said no. | He left.",
    '"Why?" he said. | "Go."', '"Why? | Because," he said.', '"It rained." | We left.',
    '"It rained," he said. | "Yes."',
    "'Go,' said I. | 'Now!' | He went.", "“It rained.” | “So?” | “We left.”",
    "(It rained.) | We left.",
    "It rained (a lot). | We left.", "He said [sic.]. | We left.",
    "It rained (U.S. time). | We left.",
    "Well... maybe not.", "Well... | We left.", "Well… | We left.", "He was . . . not here.",
    "He left. . . . | She stayed.",
    "it rained. and then we left.", "eBay fell. iPhones rose.",
    "1. The first point. | 2. The second.",
    "In 1842. | In 1843 too.", "Vitamin C. | The study ended.", "It was I. | He knew.",
    "Stop. | — He ran.",
    "Der Weg ist weit. | Über uns nichts.", "It rained. | 5 left.",
    "Smith et al. proved it. | We use it.",
    "He met Gen. Grant vs. Lee. | They fought.", "Plain v. Fancy was the case.",
    "Version 2.0.1 is out. | Get it at a.b.com.",
])
def test_sentences_are_split_where_a_reader_would(text):
    """Abbreviations, initials, decimals, quotes, brackets, ellipses: every case is cut exactly at
    its bars."""
    assert split_sentences(text.replace(" | ", " ")) == text.split(" | ")


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="aB. ?!\"'()…1\n\t“”Mr", max_size=60) | st.text(max_size=60))
def test_splitting_loses_no_text(text):
    """The sentences of any text, joined by spaces, are that text with its white space normalized;
    none is empty."""
    sentences = split_sentences(text)
    assert " ".join(sentences) == " ".join(text.split())
    assert all(s == s.strip() != "" for s in sentences)


@needs_data
def test_sentences_of_novels_look_like_sentences():
    """Of a million characters of real novels: 97 % of the sentences end in a stop, 3 to 60 words
    hold 93 %."""
    files = [Path(SUPMER_DATA) / "text" / "english_novels_100.jsonl.gz"]
    sentences = [s for d in documents(files, max_bytes=1_000_000) for p in d
                 for s in split_sentences(p)]
    assert np.mean([s.rstrip("\"'”’)]")[-1:] in ".!?…:" for s in sentences]) > 0.97
    assert np.mean([3 <= len(s.split()) <= 60 for s in sentences]) > 0.93


def test_documents_of_each_format_literally(tmp_path):
    """.txt, .jsonl with either field, .jsonl.gz, tars as OpenWebText's and of plain texts, C4's
    .json.gz, and a folder of them, in order."""
    (tmp_path / "a.txt").write_text("It rained.\nWe left.\n\n \nThe sun rose.")
    (tmp_path / "b.jsonl").write_text('{"text": "One.\\nTwo."}\n\n'
                                      '{"paragraphs": ["Three.", "Four."], "id": 7}\n')
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write('{"text": "Five."}')
    openwebtext_tar(tmp_path / "d.tar", [[b"Six.\n\nSeven.", b"Eight."], ["N\u00efne.".encode()]])
    with tarfile.open(tmp_path / "e.tar.xz", "w:xz") as plain:
        for name in ("a.txt", "LICENSE"):
            plain.add(tmp_path / "a.txt", name)
    with gzip.open(tmp_path / "f.json.gz", "wt") as file:                       # as C4's
        file.write('{"text": "Ten.", "url": "x"}\n{"text": "Eleven."}\n')
    (tmp_path / "README.md").write_text("not a corpus")
    expected = [["It rained. We left."], ["The sun rose."], ["One.", "Two."], ["Three.", "Four."],
                ["Five."],
                ["Six.", "", "Seven."], ["Eight."], ["N\u00efne."],
                ["It rained.", "We left.", "", " ", "The sun rose."], ["Ten."], ["Eleven."]]
    assert list(documents([tmp_path])) == expected
    found = list(documents([tmp_path / "d.tar", tmp_path / "b.jsonl"]))
    assert found == expected[5:8] + expected[2:4]


def test_reading_stops_after_max_bytes(tmp_path):
    """Documents are whole: the one that reaches the limit is the last, and a limit of 0 reads
    nothing."""
    (tmp_path / "a.txt").write_text("12345\n\n67890\n\nabc")
    found = [len(list(documents([tmp_path], max_bytes=limit))) for limit in (0, 1, 5, 6, 11, 99)]
    assert found == [0, 1, 1, 2, 3, 3]


def test_no_document_is_held_beyond_a_limit(tmp_path, monkeypatch):
    """A text that never ends comes in parts, which are counted and lose nothing; so does one line;
    a JSON line is refused."""
    monkeypatch.setattr(corpus_module, "LONGEST", 8)
    (tmp_path / "a.txt").write_text("1234\n5678\n90\n\nabcdefghijkl\n\nok")
    (tmp_path / "b.txt").write_text("0123456789abcdefgh")
    with tarfile.open(tmp_path / "c.tar", "w") as plain:
        plain.add(tmp_path / "b.txt", "b.txt")
    counts = Counter()
    found = [text for [text] in documents([tmp_path], counts=counts)]
    parts = ["01234567", "89abcdef", "gh"]
    assert found == ["1234 5678", "90", "abcdefgh", "ijkl", "ok",
                                                *parts, *parts]
    assert counts["long documents parted"] == 1 + 1 + 2 + 2
    (tmp_path / "d.jsonl").write_text('{"text": ""}')
    with pytest.raises(InputError, match="d.jsonl, line 1: 8 bytes or more"):
        list(documents([tmp_path / "d.jsonl"]))


def test_broken_utf8_is_replaced_and_counted(tmp_path):
    """A corpus survives bytes that are not UTF-8: they become U+FFFD, their lines are counted;
    U+FFFD itself is not."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfcaf\xe9\n\nok \xef\xbf\xbd\n\n\xff\xfe")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\\ud800 half"}')
    counts = Counter()
    found = list(documents([tmp_path], counts=counts))
    assert found == [["caf\ufffd"], ["ok \ufffd"], ["\ufffd\ufffd"], ["? half"]]
    assert counts["broken UTF-8"] == 2


def test_a_block_of_zeros_is_broken_bytes_not_another_encoding(tmp_path):
    """What a torn disk leaves in a file, a line of NULs or some behind a text, ends no build of a
    corpus: it is counted as any broken bytes are. UTF-16 is refused (below)."""
    for zeros in (b"\0", b"\0" * 4096, b"It fell." + b"\0" * 4096):
        (tmp_path / "a.txt").write_bytes(b"It rained.\n\n" + zeros + b"\n\nWe left.")
        counts = Counter()
        found = list(documents([tmp_path / "a.txt"], counts=counts))
        assert found == [["It rained."], [zeros.decode().replace("\0", "\ufffd")], ["We left."]]
        assert counts["broken UTF-8"] == 1


@pytest.mark.parametrize("name, content, says", [
    ("a.jsonl", b'{"text": "ok"}\n{"text": ', "a.jsonl, line 2: not JSON"),
    ("a.jsonl", b'{"body": "ok"}', "line 1: no `text`"),
    ("a.jsonl", b'["ok"]', "line 1: no `text`"),
    ("a.jsonl", b'{"text": 5}', "line 1: no `text`"),
    ("a.jsonl", b'{"paragraphs": "ok"}', "line 1: no `text`"),
    ("a.jsonl", b'{"paragraphs": ["ok"]}\n{"paragraphs": [1]}', "line 2"),
    ("a.txt", "not UTF-8".encode("utf-16"), "a.txt: NUL"),
    ("a.jsonl.gz", b"not gzip", "damaged or incomplete"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "ok"}' * 99)[:-9], "damaged or incomplete"),
    ("a.tar", b"not a tar", "damaged or incomplete"),
    ("a.tar", tar_of({"b.jsonl": b'{"text": "ok"}'}), "a.tar has no document: its files must be"),
    ("a.tar", tar_of({"b.xz": lzma.compress(b"x" * 999)[:-9]}), "a.tar, b.xz is damaged"),
    ("a.csv", b"1,ok", "a.csv: no text there"),
    ("a.parquet", b"PAR1", "a.parquet: parquet is not read; take the corpus's .tar"),
])
def test_bad_corpus_files_are_refused_with_file_and_reason(tmp_path, name, content, says):
    """Each is an InputError of one line that names the file, and the line where there is one."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=re.escape(says)) as error:
        list(documents([tmp_path / name]))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_parquet_in_a_folder_is_refused_as_it_is_alone(tmp_path):
    """Beside files that are read: nothing is skipped in silence."""
    (tmp_path / "a.txt").write_text("It rained.")
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="b.parquet: parquet is not read; take the corpus's .tar"):
        list(documents([tmp_path]))


def test_blank_lines_are_no_documents(tmp_path):
    """At the beginning, between and at the end of a .txt and of a .jsonl."""
    (tmp_path / "a.txt").write_text("\n\nIt rained.\n\n\n\nWe left.\n\n\n")
    (tmp_path / "b.jsonl").write_text('\n{"text": "Yes."}\n\n \n')
    assert list(documents([tmp_path])) == [["It rained."], ["We left."], ["Yes."]]


def test_a_truncated_openwebtext_subset_is_refused(tmp_path):
    """Cut anywhere inside its data, a tar is an InputError, never a shorter corpus."""
    openwebtext_tar(tmp_path / "a.tar", [[os.urandom(3000).hex().encode()] * 2,
                                         [os.urandom(3000).hex().encode()]])
    whole = (tmp_path / "a.tar").read_bytes()
    for cut in (600, 2000, 4000, 5000, 8000):
        (tmp_path / "b.tar").write_bytes(whole[:cut])
        with pytest.raises(InputError, match="damaged or incomplete"):
            list(documents([tmp_path / "b.tar"]))


# ---------------------------------------------------------------------------------- data: the store

def test_short_sentences_join_their_neighbours():
    """The docstring's cases; nothing is lost or reordered unless the whole document is too
    short."""
    assert corpus_module.join_short([[7, 5], [1, 2, 3, 4], [6, 7, 8, 9], [3]]) == [[7, 5, 1, 2, 3, 4],
                                                                          [6, 7, 8, 9, 3]]
    assert corpus_module.join_short([[1], [2], [3], [4], [5]]) == [[1, 2, 3, 4, 5]]
    assert corpus_module.join_short([[3]]) == corpus_module.join_short([]) == []


def test_a_store_holds_the_text_in_order(planted):
    """Decoding every sentence gives the corpus back; documents, first occurrences and counts are
    right."""
    tokenizer, store, index = planted
    texts = tokenizer.decode_batch([index.store.sentence(i).tolist() for i in range(8000)])
    assert texts == [sentence(d, s) for d in range(200) for s in range(40)]
    assert store.first.tolist() == list(range(0, 8000, 40)) and store.anchor.all()
    counts = store.meta["counts"]
    assert (counts["sentences"], counts["documents"]) == (8000, 200)
    assert counts["documents held out"] == 10


def test_five_percent_of_the_documents_are_held_out_whole(planted):
    """10 of 200 documents, each with all its sentences, and not simply the first or the last
    ones."""
    store = planted[1]
    held_out = store.held_out.reshape(200, 40)
    assert held_out.all(1).sum() == 10 and held_out.any(1).sum() == 10
    assert not held_out[:10].any(1).all() and not held_out[-10:].any(1).all()


def test_clusters_are_those_planted(planted):
    """The five topics are found, and centroids are their means; one clustering serves the three
    formats."""
    tokenizer, store, _ = planted
    topics = np.array([(7 * d + s) % 5 for d in range(200) for s in range(40)])
    for row in range(3):
        assert len(set(zip(topics, store.cluster[row]))) == 5
        assert np.allclose(store.centroids[row][store.cluster[row]], np.eye(5)[topics])


def test_one_clustering_per_format_has_three_seeds(planted, tmp_path):
    """With noisy points three seeds give three clusterings: each row of cluster belongs to its own
    centroids."""
    tokenizer, store, _ = planted
    noise = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    embed = lambda ids, mask: noise[ids].mean(1)
    model = write_model(tmp_path / "m", [])[0]
    new = corpus_module.build_store(tmp_path / "s", planted_paths(tmp_path, 30), tokenizer, None, 7, 3,
                           model=model,
                           one_per_format=True, embed=embed)
    assert new.centroids.shape == (3, 7, 6) and not np.array_equal(new.cluster[0], new.cluster[1])
    for row in range(3):
        points = np.stack([noise[torch.from_numpy(new.tokens[a:b].astype(int))].mean(0).numpy()
                           for a, b in zip(new.offsets, new.offsets[1:])])
        distances = ((points[:, None] - new.centroids[row]) ** 2).sum(-1)
        assert np.allclose(distances.min(1), distances[np.arange(len(points)), new.cluster[row]],
                           atol=1e-5)


def test_kmeans_never_sees_a_held_out_document(planted, tmp_path):
    """Eq. 16 is fitted on training documents: what is embedded before the assignment comes from
    none other."""
    tokenizer, store, _ = planted
    seen, stages, embed = set(), [], by_topic(tokenizer)

    def spy(ids, mask):
        if "assigning clusters" not in stages:
            seen.update(ids[:, 1].tolist())
        return embed(ids, mask)
    done = Counter()

    def progress(stage, count, total):
        done[stage] = count
        if stage == "embedding a sample" and count == total:
            stages.append("assigning clusters")
    paths = planted_paths(tmp_path)
    new = corpus_module.build_store(tmp_path / "s", paths, tokenizer, None, 5, 0,
                           model=write_model(tmp_path / "m", [])[0],
                           embed=spy, progress=progress)
    held_out = {tokenizer.token_to_id(f"d{d}") for d in held_out_documents(new)}
    assert len(held_out) == 10 and len(seen) > 150 and not seen & held_out
    assert done["embedding a sample"] == 5 * corpus_module.SAMPLE and done["assigning clusters"] == 8000


def test_repeated_texts_are_no_anchors(planted, tmp_path):
    """Of equal sentences only the first can be an anchor."""
    tokenizer = planted[0]
    text = " ".join(sentence(0, number) for number in (0, 1, 0))
    others = [sentence(document, document) for document in range(5)]
    (tmp_path / "a.txt").write_text("\n\n".join([text, text, *others]))
    store = corpus_module.build_store(tmp_path / "s", [tmp_path / "a.txt"], tokenizer, None, 1, 0,
                             embed=by_topic(tokenizer),
                             model=write_model(tmp_path / "m", [])[0])
    assert np.flatnonzero(store.anchor).tolist() == [0, 1, 7, 8, 9, 10]


def test_embedding_is_the_mean_of_the_encoders_states():
    """Padding changes nothing: a batch gives each sentence what it gets alone, without prompt and
    without </s>."""
    config = T.T5Config(d_model=8, d_kv=6, d_ff=12, num_layers=2, num_decoder_layers=1,
                                num_heads=2, vocab_size=40,
                                gated=True, tied=False, scaled=False, num_buckets=32,
                                max_distance=128, eps=1e-6)
    generator = torch.Generator().manual_seed(0)
    t5 = T.T5(config, {name: torch.randn(shape, generator=generator, dtype=torch.float64)
                               for name, shape in T.expected_shapes(config).items()})
    sentences = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    ids = torch.tensor([s + [0] * (5 - len(s)) for s in sentences])
    H = corpus_module.embed_sentences(t5, ids, torch.arange(5) < torch.tensor([[3], [1], [5]]))
    for row, s in zip(H, sentences):
        alone = T.encode(t5, T.embed_tokens(t5, torch.tensor([s])),
                                 torch.ones(1, len(s), dtype=torch.bool))
        assert (row - alone[0].mean(0)).abs().max() < 1e-12 * row.abs().max()


def test_batches_keep_to_their_budget_and_lose_no_sentence():
    """Sorted by length, padded batches hold at most the budget (or one sentence), and every
    sentence once, intact."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 50, 500)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = rng.integers(3, 900, offsets[-1]).astype(np.uint16)
    rows, shapes = rng.permutation(500)[:300], []

    def embed(ids, mask):
        shapes.append(ids.shape)
        assert not ids[~mask].any()
        return torch.stack([ids.sum(1), mask.sum(1)], 1)
    found = {}
    for positions, H in corpus_module._embedded(tokens, offsets, rows, embed, 200):
        found.update(zip(positions.tolist(), H.tolist()))
    sums = np.add.reduceat(tokens.astype(int), offsets[:-1])
    assert found == {i: [sums[r], lengths[r]] for i, r in enumerate(rows)}
    assert max(a * b for a, b in shapes) <= 200 and len(shapes) < 60


def build_again(planted, tmp_path, cache="cache", **changes):
    tokenizer = planted[0]
    if not (tmp_path / "corpus.jsonl").exists():
        planted_paths(tmp_path, 20)
        write_model(tmp_path / "m", [])
    arguments = {"clusters": 3, "seed": 0, "model": tmp_path / "m",
                 "embed": by_topic(tokenizer)} | changes
    return corpus_module.build_store(tmp_path / cache, [tmp_path / "corpus.jsonl"], tokenizer, None,
                            **arguments)


@pytest.mark.parametrize("left", [None, 0, 9])
def test_a_half_made_store_that_lost_text_is_dropped(planted, tmp_path, left):
    """Where a crash of the machine cost a file its end, no zeros take its place: it is told, and
    the next call makes the whole store anew."""
    def stop(stage, done, total):
        if stage == "assigning clusters":
            raise KeyboardInterrupt
    whole = build_again(planted, tmp_path, "whole")
    for name in {*corpus_module.TEXT} - {"label"}:
        with pytest.raises(KeyboardInterrupt):
            build_again(planted, tmp_path, name, progress=stop)
        building, = (tmp_path / name).iterdir()
        path = building / f"{name}.bin"
        path.unlink() if left is None else os.truncate(path, left)
        with pytest.raises(InputError, match=f"{name}.bin has lost what it held.*: start again"):
            build_again(planted, tmp_path, name)
        again = build_again(planted, tmp_path, name)
        for file in whole.folder.iterdir():
            assert file.read_bytes() == (again.folder / file.name).read_bytes(), file


@pytest.mark.parametrize("file, content, says", [
    ("read.json", "{", "damaged .*: start again"), ("read.json", "7", "damaged .*: start again"),
    ("read.json", "[1, 2]", "damaged .*: start again"),
    ("centroids.npy", "xxxxxx", "damaged .*: delete")])
def test_a_half_made_store_whose_notes_are_damaged(planted, tmp_path, file, content, says):
    """What a stop left, and something else damaged: told in one line, nothing is computed of it."""
    def stop(stage, done, total):
        if stage == "assigning clusters":
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        build_again(planted, tmp_path, progress=stop)
    building, = (path for path in tmp_path.rglob(".building-*"))
    (building / file).write_text(content)
    with pytest.raises(InputError, match=f"{file} is {says}"):
        build_again(planted, tmp_path)


def test_each_stage_is_told_when_it_is_done(planted, tmp_path, monkeypatch):
    """What train.py takes the times from: the last documents are tokenized before reading text is
    told for the last time, not after it, in the time of the stage behind."""
    told, tokenize = [], data.tokenize
    monkeypatch.setattr(data, "tokenize", lambda *given: (told.append("work"), tokenize(*given))[1])
    build_again(planted, tmp_path, progress=lambda stage, done, total: told.append(stage))
    assert told[told.index("embedding a sample") - 1] == "reading text, bytes"
    assert "work" in told and told[told.index("embedding a sample") - 2] == "work"


def test_a_store_is_made_once_for_the_same_things(planted, tmp_path):
    """The same corpus, model and options: no work. Another of any of them: another store."""
    def forbidden(ids, mask):
        raise AssertionError("embedded again")
    first = build_again(planted, tmp_path)
    again = build_again(planted, tmp_path, embed=forbidden)
    assert all(np.array_equal(a, b) for a, b in zip(first[1:-1], again[1:-1]))
    assert first.meta == again.meta and first.folder == again.folder
    folders = {build_again(planted, tmp_path, **changes).folder for changes in (
        {}, {"seed": 1}, {"clusters": 4}, {"max_bytes": 9000}, {"one_per_format": True})}
    for file in ("corpus.jsonl", "m/tokenizer.json", "m/model.safetensors", "m/config.json"):
        content = (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(content + b" ")
        folders.add(build_again(planted, tmp_path).folder)
        (tmp_path / file).write_bytes(content)
    assert len(folders) == 9 and sorted(folders) == sorted((tmp_path / "cache").iterdir())


def test_what_a_corpus_folder_has_beside_text_is_told(planted, tmp_path):
    """By name, before the text is read."""
    (tmp_path / "text").mkdir()
    planted_paths(tmp_path / "text", 20)
    (tmp_path / "text" / "notes.csv").write_text("1,ok")
    model, said = write_model(tmp_path / "m", [])[0], []
    corpus_module.build_store(tmp_path, [tmp_path / "text"], planted[0], None, 3, 0, model=model,
                     embed=by_topic(planted[0]), progress=lambda stage, *_: said.append(stage))
    assert said[0] == "not read, 1 other file(s): notes.csv"


def test_a_store_of_other_things_is_not_opened(planted, tmp_path):
    """Under whatever name: made of another corpus, tokenizer, model or options is an InputError
    that says which."""
    store = build_again(planted, tmp_path)
    assert data.open_store(store.folder, store.meta["made_of"]).meta == store.meta
    for key in ("corpus", "tokenizer", "model", "options"):
        with pytest.raises(InputError, match=f"built with another {key}: delete it"):
            data.open_store(store.folder, store.meta["made_of"] | {key: "other"})


def test_building_is_deterministic(planted, tmp_path):
    """The same call with another cache gives the same bytes."""
    stores = [build_again(planted, tmp_path, cache=name) for name in "ab"]
    for file in sorted(p.name for p in stores[0].folder.iterdir()):
        a, b = ((store.folder / file).read_bytes() for store in stores)
        assert a == b, file


def test_a_stopped_build_goes_on_where_it_was(planted, tmp_path, monkeypatch):
    """Stopped in its text, by a full disk in the sample, and in its second part of
    assignments: each time what was done is not done again, and the store is byte for byte an
    unbroken one's."""
    monkeypatch.setattr(corpus_module, "CHUNK", 64)
    lines = planted_paths(tmp_path, 10)[0].read_text().splitlines()
    for name, part in (("a", lines[:5]), ("b", lines[5:])):     # of 200 sentences each
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part))
    model, read, embed = write_model(tmp_path / "m", [])[0], corpus_module.documents, by_topic(planted[0])
    did, stop = Counter(), ("", 0, None)

    def spy(key, function, *arguments):
        did[key] += len(arguments[0])
        return function(*arguments)

    def progress(stage, done, total):
        if stage == stop[0] and done > stop[1]:
            raise stop[2]
    monkeypatch.setattr(corpus_module, "documents", partial(spy, "files", read))

    def build(cache):
        return corpus_module.build_store(tmp_path / cache, [tmp_path / "a.jsonl", tmp_path / "b.jsonl"],
                                planted[0], None, 3, 0, model=model, progress=progress,
                                embed=partial(spy, "embedded", embed))
    whole = build("whole")
    assert dict(did) == {"files": 2, "embedded": 1 + 320 + 400}      # one tells the width
    did.clear()
    for stop in (("reading text, bytes", 5000, KeyboardInterrupt()),
                 ("embedding a sample", 0, OSError(28, "No space left on device")),
                 ("assigning clusters", 64, KeyboardInterrupt())):
        with pytest.raises(type(stop[2])):
            build("broken")
        building, = (tmp_path / "broken").iterdir()     # and what a kill can leave beside that:
        for name in ("tokens.bin", "first.bin", "cluster.bin", ".centroids.npy.1.tmp"):
            with open(building / name, "ab") as file:
                file.write(b"half")
    stop = ("", 0, None)
    broken = build("broken")
    assert did["files"] == 4 and 320 + 400 < did["embedded"] < 2 * 321 + 400 + 64
    for file in sorted(whole.folder.iterdir()):
        assert file.read_bytes() == (broken.folder / file.name).read_bytes(), file
    assert [path.name for path in (tmp_path / "broken").iterdir()] == [whole.folder.name]


@pytest.mark.parametrize("file", ["tokens.bin", "offsets.bin", "first.bin", "cluster.bin",
                                  "order.bin", "centroids.npy", "meta.json"])
def test_a_damaged_store_is_refused(planted, tmp_path, file):
    """Missing or cut short: an InputError that says what to do."""
    path = build_again(planted, tmp_path).folder / file
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="not a whole store.*delete it"):
        build_again(planted, tmp_path)
    path.unlink()
    with pytest.raises(InputError, match="not a whole store.*delete it"):
        build_again(planted, tmp_path)


@pytest.mark.parametrize("text, clusters, says", [
    ("", 2, "0 sentences in 0 documents"), ("\n\n \n", 2, "0 sentences"),
    ("a a a a\n\nb b b b\n\na b a b", 2, "4 documents"),
    ("\n\n".join(["a a a a", "b b b b", "a b b b", "b a a a"]), 5,
     "4 sentences in 4 documents, of them 2 different ones to train on; 5 clusters"),
    ("\n\n".join(["a a a a"] * 9), 2, "9 documents, of them 0 different .*; 2 clusters and 4"),
])
def test_too_small_a_corpus_is_refused(tmp_path, text, clusters, says):
    """Empty, fewer sentences than clusters, one document, all sentences equal: what is there and
    what is wanted."""
    model, tokenizer = write_model(tmp_path / "m", ["a", "b"])
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(InputError, match=says):
        corpus_module.build_store(tmp_path / "s", [tmp_path / "a.txt"], tokenizer, None, clusters, 0,
                         model=model,
                         embed=lambda ids, mask: ids[:, :2].float())
    assert not list((tmp_path / "s").iterdir())


def test_embeddings_that_are_not_finite_stop_the_build(planted, tmp_path):
    """A model that gives NaN is not clustered in silence."""
    with pytest.raises(InputError, match="not finite"):
        nan = torch.full((1, 2), float("nan"))
        build_again(planted, tmp_path, embed=lambda ids, mask: nan.expand(len(ids), 2))


def test_atomic_write_is_all_or_nothing(tmp_path):
    """A failure while writing keeps the old file and leaves no other; success replaces it."""
    path = tmp_path / "state"
    common.atomic_write(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half")
        raise OSError("no space left on device")
    with pytest.raises(OSError, match="no space"):
        common.atomic_write(path, fail)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with open(path, "rb") as reader:
        common.atomic_write(path, lambda file: file.write(b"new"))
        assert reader.read() == b"old"      # replaced, not overwritten
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------------------- data: the ranks

def on_ranks(monkeypatch, world, work):
    """work(ranks) on each of `world` ranks, threads here -> what each returns or raises. What
    torch.distributed does between processes is done between the threads."""
    slots, barrier, found = [None] * world, threading.Barrier(world), [None] * world
    mine = threading.local()

    def exchange(value):
        slots[mine.rank] = value
        barrier.wait(20)
        values = list(slots)
        barrier.wait(20)
        return values

    def gather(values, value):
        values[:] = exchange(value)

    def run(rank):
        mine.rank = rank
        try:
            found[rank] = work(common.Ranks(rank, world))
        except InputError as error:
            found[rank] = error
    monkeypatch.setattr(common, "distributed", SimpleNamespace(
        all_reduce=lambda total: total.copy_(sum(x.clone() for x in exchange(total.clone()))),
        all_gather_object=gather, barrier=exchange))
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_ranks_make_one_store(planted, tmp_path, monkeypatch):
    """Three ranks share the embedding, each sentence once, and the store is byte for byte one
    rank's, though an embedding's last bits depend on what is in its batch; so it is with more ranks
    than batches. Ranks with other corpora, or that see another store, are told so."""
    monkeypatch.setattr(corpus_module, "CHUNK", 64)
    embedded = Counter()

    def build(ranks, cache="together"):
        def count(ids, mask):
            embedded[ranks.rank] += len(ids)
            return by_topic(planted[0])(ids, mask) + 1e-4 * (ids.sum() % 97)
        return build_again(planted, tmp_path, cache, embed=count, ranks=ranks)
    alone = build(common.SOLO, "alone")
    embedded.clear()
    stores = on_ranks(monkeypatch, 3, build)
    for file in sorted(alone.folder.iterdir()):
        assert file.read_bytes() == (stores[2].folder / file.name).read_bytes(), file
    assert sum(embedded.values()) == 18 * 40 + 800 + 3 and min(embedded.values()) > 400
    monkeypatch.setattr(corpus_module, "CHUNK", 10 ** 4)
    monkeypatch.setitem(corpus_module.BATCH_TOKENS, "cpu", 10 ** 6)          # two ranks find no batch
    few = [build(common.SOLO, "few"), *on_ranks(monkeypatch, 3, lambda ranks: build(ranks, "fewer"))]
    assert few[0].centroids.tobytes() == few[3].centroids.tobytes()
    found = on_ranks(monkeypatch, 2, lambda ranks: build_again(planted, tmp_path, seed=ranks.rank,
                                                              ranks=ranks))
    assert all("the ranks have different corpora" in str(error) for error in found)
    (tmp_path / "alone" / alone.folder.name / "order.bin").write_bytes(b"other")
    found = on_ranks(monkeypatch, 2, lambda ranks: build(ranks, ("alone", "together")[ranks.rank]))
    assert all("is not the same for all ranks: put cache/ on a disk" in str(e) for e in found)


def test_a_second_process_waits_for_the_first_ones_store(planted, tmp_path):
    """What another process is making is not touched: its id is told, and its store is taken. A lock
    file whose process died is none."""
    store, said = build_again(planted, tmp_path, "first"), []
    building = tmp_path / "cache" / f".building-{store.folder.name}"
    building.mkdir(parents=True)
    (building / "lock").write_text("123456")                    # of a process that was killed
    held = common.lock(building / "lock", lambda owner: pytest.fail("nobody has it"))

    def progress(stage, done, total):
        said.append(stage)
        store.folder.rename(tmp_path / "cache" / store.folder.name)
        held.close()
    again = build_again(planted, tmp_path, progress=progress)
    assert said == [f"waiting for process {os.getpid()}, which makes the same store"]
    assert again.meta == store.meta and not building.exists()
