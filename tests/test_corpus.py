"""Tests of corpus.py: the store, its resuming, its ranks."""

import fcntl
import threading
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch

import corpus
import data
import t5 as T
from common import InputError
from conftest import (by_topic, contents, held_out_documents, on_ranks, planted_paths, random_t5,
                      sentence, write_model)
from documents import ends_fingerprint
from ranks import SOLO


def test_short_sentences_join_their_neighbours():
    """The docstring's cases; nothing is lost unless the whole document is too short."""
    join = corpus.join_short
    assert join([[7, 5], [1, 2, 3, 4], [6, 7, 8, 9], [3]]) == [[7, 5, 1, 2, 3, 4], [6, 7, 8, 9, 3]]
    assert join([[1], [2], [3], [4], [5]]) == [[1, 2, 3, 4, 5]]
    assert join([[3]]) == join([]) == []


def test_a_store_holds_the_text_and_the_planted_clusters(planted):
    """Decoded it is the corpus; 5 % of the documents are held out; topics are its clusters."""
    tokenizer, store, _ = planted
    texts = tokenizer.decode_batch([store.sentence(i).tolist() for i in range(11200)])
    assert texts == [sentence(d, s) for d in range(280) for s in range(40)]
    assert store.first.tolist() == list(range(0, 11200, 40)) and store.anchor.all()
    held_out, counts = store.held_out.reshape(280, 40), store.meta["counts"]
    assert (counts["sentences"], counts["documents"]) == (11200, 280)
    assert held_out.all(1).sum() == held_out.any(1).sum() == counts["documents held out"] == 10
    topics = np.array([(7 * d + s) % 5 for d in range(280) for s in range(40)])
    assert len(store.cluster) == len(store.centroids) == len(data.FORMATS)
    for cluster, centroids in zip(store.cluster, store.centroids):
        assert np.allclose(centroids[cluster], np.eye(5)[topics])


def test_a_document_is_held_out_by_its_own_hash():
    """Below 0.05, in any part of a corpus that has two below; else the two lowest."""
    shares = np.random.default_rng(0).random(400)
    assert corpus.hold_out(shares).tolist() == (shares < 0.05).tolist()
    assert corpus.hold_out(np.array([0.3, 0.06, 0.9, 0.02])).tolist() == [0, 1, 0, 1]


@pytest.fixture
def build(planted, tmp_path):
    """build(cache, **changes) -> a store of tmp_path/text: 2 files of 10 planted documents."""
    lines = planted_paths(tmp_path, 20)[0].read_text().splitlines()
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.jsonl").write_text("\n".join(lines[:10]))
    (tmp_path / "text/b.jsonl").write_text("\n".join(lines[10:]))
    write_model(tmp_path / "m", [])
    usual = {"clusters": 3, "seed": 0, "model": tmp_path / "m", "embed": by_topic(planted[0])}
    return lambda cache="cache", **changes: corpus.build_store(
        tmp_path / cache, [tmp_path / "text"], planted[0], None, **usual | changes)


def test_one_clustering_per_format_has_its_own_seed(build):
    """Each sentence's cluster is the nearest; the first format's seed is the store's."""
    noise = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    how = {"clusters": 7, "embed": lambda ids, mask: noise[ids].mean(1)}
    store = build(one_per_format=True, **how)
    assert not np.array_equal(store.cluster[0], store.cluster[1])
    assert np.array_equal(store.cluster[0], build(**how).cluster[0])
    points = noise[torch.from_numpy(store.tokens.astype(int)).view(-1, 4)].mean(1).numpy()
    for centroids, cluster in zip(store.centroids, store.cluster):
        distances = ((points[:, None] - centroids) ** 2).sum(-1)
        assert np.allclose(distances.min(1), distances[np.arange(800), cluster], atol=1e-5)


def test_kmeans_sees_no_held_out_document_and_no_text_is_an_anchor_twice(planted, tmp_path, build):
    """Eq. 16 is fitted on training documents; of equal sentences the first can be an anchor."""
    seen, stages, embed = set(), Counter(), by_topic(planted[0])

    def spy(ids, mask):
        if "assigning clusters" not in stages:
            seen.update(ids[:, 1].tolist())
        return embed(ids, mask)
    store = build(embed=spy, progress=lambda stage, done, total: stages.update({stage: done}))
    held_out = {planted[0].token_to_id(f"d{d}") for d in held_out_documents(store)}
    assert len(held_out) == 2 and len(seen) == 18 and not seen & held_out
    again = " ".join(sentence(*place) for place in ((0, 3), (25, 3), (25, 3)))
    (tmp_path / "text/c.txt").write_text(again)
    assert np.flatnonzero(~build().anchor).tolist() == [800, 802]


def test_embedding_is_the_mean_of_the_encoders_states():
    """Of each sentence alone, without padding, prompt and </s>."""
    t5, sentences = random_t5(8), [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    for row, s in zip(corpus.embed_sentences(t5, *data.padded(sentences)), sentences):
        alone = T.encode(t5, T.embed_tokens(t5, torch.tensor([s])),
                         torch.ones(1, len(s), dtype=torch.bool))
        assert torch.allclose(row, alone[0].mean(0), rtol=1e-12, atol=1e-13)


def test_batches_keep_to_their_budget_and_lose_no_sentence():
    """Of tokens with padding, or one sentence; each is embedded once, in its place."""
    rng, shapes = np.random.default_rng(0), []
    lengths = rng.integers(1, 50, 500)
    lengths[7] = 300                                    # more than the budget
    offsets = np.append(0, np.cumsum(lengths))
    tokens, rows = rng.integers(3, 900, offsets[-1]).astype(np.uint16), rng.permutation(500)

    def embed(ids, mask):
        shapes.append(ids.shape)
        return torch.stack([ids.sum(1), mask.sum(1)], 1)
    found = corpus.embed_rows(tokens, offsets, embed, 200, rows)
    sums = np.add.reduceat(tokens.astype(int), offsets[:-1])
    assert found.tolist() == [[sums[r], lengths[r]] for r in rows]
    assert max(a * b for a, b in shapes[:-1]) <= 200 and len(shapes) < 90


def test_a_store_is_made_once_for_the_same_things(tmp_path, build):
    """Of other text, model or options another one is made; a damaged one is not opened."""
    first = build()
    assert build(embed=None).folder == first.folder         # no T5 to embed with
    assert contents(first.folder) == contents(build("again").folder)
    folders = {build(**changes).folder for changes in (
        {}, {"seed": 1}, {"clusters": 4}, {"max_bytes": 9000}, {"one_per_format": True})}
    for file in ("text/b.jsonl", "m/tokenizer.json", "m/model.safetensors", "m/config.json"):
        content = (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(content + b" ")
        folders.add(build().folder)
        (tmp_path / file).write_bytes(content)
    assert len(folders) == 8 and sorted(folders) == sorted((tmp_path / "cache").iterdir())
    for key in ("corpus", "tokenizer", "model", "options"):
        with pytest.raises(InputError, match=f"built with another {key}: delete it"):
            corpus.open_store(first.folder, first.meta["made_of"] | {key: "other"})
    with open(first.folder / "bounds.npy", "ab") as file:
        file.write(b"more")
    with pytest.raises(InputError, match="not a whole store .*: delete it"):
        build()


def test_a_fingerprint_is_of_the_size_and_both_ends(tmp_path):
    """Of a file's first and last megabyte, and not what is between them."""
    path, prints = tmp_path / "a", set()
    for place in (0, (1 << 20) - 1, 3 << 19, 5 << 18, 2 << 20, (3 << 20) - 1, 3 << 20):
        path.write_bytes(bytes(place) + b"1" + bytes(max((3 << 20) - 1 - place, 0)))
        prints.add(ends_fingerprint([path]))
    assert len(prints) == 6


def test_reading_stops_after_max_bytes(tmp_path, build):
    """With the document that reaches it; what a folder has beside text is printed by name."""
    size, said = len(" ".join(sentence(0, s) for s in range(40))), []
    (tmp_path / "text/notes.csv").write_text("1,ok")
    (tmp_path / "text/c.jsonl").write_text("not JSON")
    for limit, wanted in ((4 * size, 4), (4 * size + 1, 5), (10 * size, 10)):
        store = build(max_bytes=limit, progress=lambda *at: said.append(at[0]))
        assert 0 <= store.meta["counts"]["documents"] - wanted <= 1
    assert said[0] == "not read, 1 other file(s): notes.csv"


@pytest.mark.parametrize("text, clusters, says", [
    ("", 2, "0 document.s. by blank-lines, of 0.0 .* 4 documents are needed, .* --documents"),
    ("\n\n".join(["a a a a", "b b b b", "a b b b", "b a a a"]), 5,
     "4 document.s. by blank-lines, of 1.0 .* 2 different sentences to train on for 5"),
    ("a a a a\nb b b b\na b a b\nb a b a", 1, "1 document.s. by blank-lines, of 4.0 .* 4 doc"),
    ("\n\n".join(f"{'a ' * i}b b b" for i in range(9)), 1, "8 document.s. .* lack 3 .* another one "
     "of --documents blank-lines, lines, files, a smaller --support .* or only --variants")])
def test_a_corpus_of_another_size_or_shape_is_refused_unembedded(tmp_path, text, clusters, says):
    """The message says what is there and what to do; nothing is embedded and nothing is left."""
    model, tokenizer = write_model(tmp_path / "m", ["a", "b"])
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(InputError, match=says):
        corpus.build_store(tmp_path / "s", [tmp_path / "a.txt"], tokenizer, None, clusters, 0,
                           model=model, followed=3)
    assert not list((tmp_path / "s").iterdir())


def test_embeddings_that_are_not_finite_stop_the_build(build):
    """A model that gives NaN is not clustered in silence."""
    with pytest.raises(InputError, match="embeddings .*inertia is nan.* the model's weights"):
        build(embed=lambda ids, mask: torch.full((len(ids), 2), torch.nan))


def test_an_interrupted_build_resumes(planted, tmp_path, build, monkeypatch):
    """Nothing is done again; the store is an unbroken one's to the byte, whatever is torn."""
    monkeypatch.setattr(corpus, "CHUNK", 64)
    monkeypatch.setattr(corpus, "SLICE", 7)
    did, stop, embed, read = Counter(), ("", 0, None), by_topic(planted[0]), corpus.documents
    monkeypatch.setattr(corpus, "documents", lambda path, *how: (
        did.update([path.name]), read(path, *how))[1])

    def counted(ids, mask):
        did["embedded"] += len(ids)
        return embed(ids, mask)

    def progress(stage, done, total):
        if stage == stop[0] and done > stop[1]:
            raise stop[2]
    whole = build("whole", embed=counted)
    assert did == {"a.jsonl": 1, "b.jsonl": 1, "embedded": 720 + 800}
    did.clear()
    for stop in (("reading text, bytes", whole.meta["counts"]["bytes"] // 2, KeyboardInterrupt()),
                 ("embedding a sample", 0, OSError(28, "No space left on device")),
                 ("assigning clusters", 127, KeyboardInterrupt())):
        with pytest.raises(type(stop[2])):
            build("broken", embed=counted, progress=progress)
        building, = (tmp_path / "broken").iterdir()     # and what a kill can leave beside that:
        for name in ("tokens.bin", "first.bin", "cluster.bin", ".centroids.npy.1.tmp"):
            with open(building / name, "ab") as file:
                file.write(b"half")
    broken = build("broken", embed=counted)
    assert (did["a.jsonl"], did["b.jsonl"]) == (1, 2) and did["embedded"] < 720 + 800 + 128
    assert contents(broken.folder) == contents(whole.folder)


def test_ranks_make_one_store(planted, build, monkeypatch):
    """They share the embedding; the store is one rank's to the byte; others are refused."""
    embedded = Counter()

    def work(ranks, cache):
        def count(ids, mask):
            embedded[ranks.rank] += len(ids)
            return by_topic(planted[0])(ids, mask) + 1e-4 * (ids.sum() % 97)
        return build(cache, embed=count, ranks=ranks)
    for chunk in (64, 500):
        monkeypatch.setattr(corpus, "CHUNK", chunk)
        alone = work(SOLO, f"alone{chunk}")
        embedded.clear()
        stores = on_ranks(monkeypatch, 3, partial(work, cache=f"together{chunk}"))
        assert contents(alone.folder) == contents(stores[2].folder)
        assert sum(embedded.values()) == 18 * 40 + 800
        assert chunk == 500 or min(embedded.values()) > 400
    found = on_ranks(monkeypatch, 2, lambda ranks: build(seed=5 + ranks.rank, ranks=ranks))
    assert all("the ranks have different corpora" in str(error) for error in found)


def test_a_second_process_waits_for_the_first_ones_store(tmp_path, build):
    """It takes what the other one has made; the lock file of a process that died does not count."""
    store, said = build("first"), []
    folder = tmp_path / "cache" / store.folder.name
    folder.mkdir(parents=True)
    held = open(folder / ".lock", "w")
    fcntl.flock(held, fcntl.LOCK_EX)

    def finish():
        for path in store.folder.glob("[!.]*"):
            path.rename(folder / path.name)
        held.close()

    def progress(stage, done, total):
        said.append(stage)
        threading.Timer(0.2, finish).start()
    assert build(embed=None, progress=progress).meta == store.meta
    assert said == ["waiting for the process that makes the same store"]
