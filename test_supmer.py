"""The evidence that this repository does what it says; each test's docstring is its claim.

    pytest                       # needs nothing but requirements.txt
    SUPMER_DATA=FOLDER pytest    # against transformers and scikit-learn, too, and on real data
"""

import contextlib
import copy
import doctest
import inspect
import math
import os
import re
import shutil
import signal
import socket
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import islice, permutations, product, repeat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import baselines
import corpus
import data
import eval as evaluation
import jobs
import kmeans as km
import measure
import onednn
import report
import supmer
import t5 as T
import tasks
import templates
import train
from candidates import Plan, open_candidate
from common import InputError
from conftest import (
    BOTH, SENTINEL, SMALL, SUPMER_DATA, V10, V11, WORDS, accuracies, affine_start, ended,
    eval_settings, held_out_documents, logits, make_run, model, needs_data, needs_sklearn,
    needs_transformers, on_ranks, outcome_of, parsed, random_examples, random_t5, random_task,
    relative, rows_of, sklearn, small_examples, small_state, small_t5, start_train, transformers,
    tune, write_model, write_rows)
from data import TaskIndex, VARIANTS, meta_task
from ranks import SOLO
from supmer import Method
from tasks import TASKS, load_test
from templates import MASK, fill_template


# ------------------------------------------------------------------------ T5: against transformers

KINDS = {"v1.0": ("relu", 4, 16), "v1.1": ("gated-gelu", 4, 16),
         "3 heads x 24 for d 64": ("gated-gelu", 3, 24)}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """A random model of transformers, and what load_t5 makes of the folder that it saves."""
    if transformers is None:
        pytest.skip("transformers is not installed: pip install transformers")
    torch.manual_seed(0)
    form, heads, d_kv = KINDS[request.param]
    config = transformers.T5Config(
        d_model=64, d_ff=96, num_layers=3, num_decoder_layers=2, vocab_size=120, dropout_rate=0.,
        tie_word_embeddings=form == "relu", feed_forward_proj=form, num_heads=heads, d_kv=d_kv)
    theirs = transformers.T5ForConditionalGeneration(config).eval()
    if form != "relu":                  # transformers 5 ties the head whatever the config says
        theirs.lm_head.weight = torch.nn.Parameter(torch.randn(120, 64) * 0.3)
    with torch.no_grad():
        for parameter in theirs.parameters():   # at 0.1 the float32 of both is 1.6e-5 off
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return theirs, T.load_t5(folder)


def apart(theirs, ours, prompt, text, target):
    """How far the states, logits and input gradients of three examples, two of them padded, are
    from transformers'."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 120, (3, text), generator=generator)
    mask = torch.arange(prompt + text) < prompt + torch.tensor([[text], [text // 2], [1]])
    tokens = T.embed_tokens(ours, ids)
    vectors = 3 * torch.randn(3, prompt, ours.config.d_model, generator=generator)
    x = torch.cat([vectors.to(tokens), tokens], dim=1).requires_grad_()
    targets = torch.randint(2, 120, (3, target), generator=generator)
    targets[:, 0] = T.PAD
    out = theirs(inputs_embeds=x, attention_mask=mask.long(), decoder_input_ids=targets)
    H = T.encode(ours, x, mask)
    found = T.next_token_logits(ours, T.decode(ours, targets, H, mask))
    gradient, reference = (torch.autograd.grad(y.log_softmax(-1)[:, 1, 11].sum(), x,
                                               retain_graph=True)[0] for y in (found, out.logits))
    return (relative(H[mask], out.encoder_last_hidden_state[mask]), relative(found, out.logits),
            relative(gradient, reference))


@pytest.mark.parametrize("lengths", [(0, 12, 2), (20, 15, 2), (100, 180, 150)])
def test_equals_transformers(pair, lengths):
    """In float32, encoder states and logits equal transformers' to 1e-5: in both families, with
    and without prompt vectors and padding, and beyond the 128 positions of the last bucket."""
    assert max(apart(*pair, *lengths)[:2]) < 1e-5


def test_bfloat16_is_nearer_than_transformers(pair):
    """In bfloat16 our logits are within 5 % of the float32 model's, and nearer to them than those
    of transformers, whose residual stream is bfloat16, too."""
    theirs, ours = pair
    ids = torch.randint(2, 120, (4, 30), generator=torch.Generator().manual_seed(2))
    mask, targets = torch.ones_like(ids).bool(), ids[:, :8]
    exact = logits(ours, T.embed_tokens(ours, ids), mask, targets)
    narrow = T.T5(ours.config, {name: w.bfloat16() for name, w in ours.weights.items()})
    out = logits(narrow, T.embed_tokens(narrow, ids), mask, targets)
    with torch.no_grad():
        halved = copy.deepcopy(theirs).bfloat16()
        reference = halved(input_ids=ids, decoder_input_ids=targets).logits
    error = (out - exact).norm() / exact.norm()
    assert 1e-4 < error < (reference.float() - exact).norm() / exact.norm()
    assert error < 0.05


@needs_transformers
@pytest.mark.parametrize("name, d, d_ff, heads, form", [
    ("t5-small", 512, 2048, 8, "relu"), ("t5-v1_1-base", 768, 2048, 12, "gated-gelu")])
def test_official_shapes_equal_transformers(name, d, d_ff, heads, form, tmp_path):
    """One block of an official shape as transformers saves it, in shards and in one bfloat16 file:
    states, logits and the gradient in the prompt are transformers' to 1e-5. Computed in float64,
    because float32 rounding can flip a ReLU, and with it a part of the gradient."""
    torch.manual_seed(0)
    theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(
        d_model=d, d_kv=64, d_ff=d_ff, num_heads=heads, num_layers=1, vocab_size=256,
        feed_forward_proj=form, tie_word_embeddings=form == "relu", dropout_rate=0.)).eval()
    if form != "relu":                  # transformers 5 ties the head whatever the config says
        theirs.lm_head.weight = torch.nn.Parameter(torch.randn(256, d) * d ** -0.5)
    theirs.requires_grad_(False).save_pretrained(tmp_path / "shards", max_shard_size="20MB")
    theirs.bfloat16().save_pretrained(tmp_path / "single")
    theirs.double()                     # the bfloat16 values, widened
    ours = T.load_t5(tmp_path / "single", torch.float64)
    whole = T.load_t5(tmp_path / "shards").weights
    assert len(T.weight_files(tmp_path / "shards")) > 1
    assert all(torch.equal(w, whole[name].bfloat16().double()) for name, w in ours.weights.items())
    assert max(apart(theirs, ours, 10, 14, 3)) < 1e-5


def batch(config):
    """Literal inputs: x (2, 24, d), mask (the second example has 9 positions), ids (2, 7)."""
    x = torch.sin(2.1 * torch.arange(2 * 24 * config.d_model, dtype=torch.float64) ** 1.5)
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[1, 9:] = False
    ids = torch.tensor([[0, 10, 3, 7, 1, 2, 9], [0, 5, 5, 8, 4, 6, 1]])
    return x.view(2, 24, config.d_model), mask, ids


# transformers' logits of formula() and batch() in float64, of example 1 at position 6.
GOLDEN = {
    V10: [0.1063094, -0.1494143, 0.04365874, 0.07935473, 0.07689534, 0.1448229, -0.1696267,
          0.1893235, -0.4808096, 0.2163185, 0.5828813],
    V11: [-0.2497816, -1.811349, -1.832764, -0.6611977, 1.901316, -0.5169874, 0.3336447, -1.757097,
          1.652492, 2.422858, 2.403443]}


@BOTH
def test_golden_logits(config):
    """The logits of formula weights are transformers' literals above to 1e-6: with inner width not
    d_model, padding, and distances in every bucket."""
    golden = torch.tensor(GOLDEN[config], dtype=torch.float64)
    assert relative(logits(model(config), *batch(config))[1, 6], golden) < 1e-6


# ------------------------------------------------------------------ T5: against a textbook in numpy

def textbook_attention(c, w, name, x, memory, kept):
    """One head and one query at a time: x (L, d) reads memory (S, d) where kept (S,) -> (L, d)."""
    itself, stack = "SelfAttention" in name, name.split(".")[0]
    table = w[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    prefix = w.get(f"{name}.prefix", np.zeros((2, c.num_heads, 0, c.d_kv)))
    heads = []
    for h in range(c.num_heads):
        rows = slice(h * c.d_kv, (h + 1) * c.d_kv)
        q, key, value = (y @ w[f"{name}.{m}.weight"][rows].T
                         for m, y in (("q", x), ("k", memory), ("v", memory)))
        out = np.zeros_like(q)
        for i in range(len(x)):
            keys = [j for j in np.flatnonzero(kept) if j <= i or not itself or stack == "encoder"]
            scores = key[keys] @ q[i]
            if itself:
                scores += table[T.relative_position_bucket(
                    torch.tensor(keys) - i, stack == "encoder", c.num_buckets, c.max_distance), h]
            scores = np.append(prefix[0, h] @ q[i], scores)
            p = np.exp(scores - scores.max())
            out[i] = p / p.sum() @ np.concatenate([prefix[1, h], value[keys]])
        heads.append(out)
    return np.concatenate(heads, -1) @ w[f"{name}.o.weight"].T


def textbook(t5, x, mask, ids):
    """One example at a time; keys and values formed, absent keys left out -> logits (B, L, V)."""
    c, w = t5.config, {name: weight.double().numpy() for name, weight in t5.weights.items()}

    def norm(x, name):
        return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + c.eps) * w[f"{name}layer_norm.weight"]

    def forward(x, name):
        if not c.gated:
            return np.maximum(x @ w[f"{name}.wi.weight"].T, 0) @ w[f"{name}.wo.weight"].T
        u, v = x @ w[f"{name}.wi_0.weight"].T, x @ w[f"{name}.wi_1.weight"].T
        gelu = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u ** 3)))
        return gelu * v @ w[f"{name}.wo.weight"].T

    result = []
    for m, kept, y in zip(x.double().numpy(), mask.numpy(), w["shared.weight"][ids.numpy()]):
        for n in range(c.num_layers):
            at = f"encoder.block.{n}.layer."
            z = norm(m, f"{at}0.")
            m = m + textbook_attention(c, w, f"{at}0.SelfAttention", z, z, kept)
            m = m + forward(norm(m, f"{at}1."), f"{at}1.DenseReluDense")
        m = norm(m, "encoder.final_")
        for n in range(c.num_decoder_layers):
            at = f"decoder.block.{n}.layer."
            z = norm(y, f"{at}0.")
            y = y + textbook_attention(c, w, f"{at}0.SelfAttention", z, z, np.ones(len(y)))
            z = norm(y, f"{at}1.")
            y = y + textbook_attention(c, w, f"{at}1.EncDecAttention", z, m, kept)
            y = y + forward(norm(y, f"{at}2."), f"{at}2.DenseReluDense")
        y = norm(y, "decoder.final_")
        result.append((y * c.d_model ** -0.5 if c.scaled else y) @ w["lm_head.weight"].T)
    return torch.from_numpy(np.stack(result))


@BOTH
def test_equals_the_textbook_in_float64(config):
    """Absorbed cross attention, additive masks, shared biases and prefixes are the textbook's
    formulas: logits equal those of loops in numpy to 1e-12, so nothing is narrower than float64."""
    t5, (x, mask, ids) = model(config), batch(config)
    out = logits(t5, x, mask, ids)
    assert out.dtype == torch.float64
    assert relative(out, textbook(t5, x, mask, ids)) < 1e-12
    narrow = logits(model(config, torch.float32), x.float(), mask, ids)
    assert 1e-9 < relative(narrow.double(), out) < 1e-5        # anything in float32 would show
    prefix = torch.sin(torch.arange(2 * 2 * 3 * 4, dtype=torch.float64)).view(2, 2, 3, 4)
    t5 = t5._replace(weights=t5.weights | {
        f"{block}.layer.0.SelfAttention.prefix": prefix
        for block in ("encoder.block.1", "decoder.block.0")})
    prefixed = logits(t5, x, mask, ids)
    assert relative(prefixed, textbook(t5, x, mask, ids)) < 1e-12 < relative(prefixed, out)


# ------------------------------------------------------------------------------ T5: its properties

def test_buckets_by_hand():
    """32 buckets, 128 positions. Decoder: 0..15 exact, the last bucket 31 holds everything from 113
    back (16 + floor(16 ln(113/16) / ln 8) = 31), and keys to come share bucket 0. Encoder: exact
    below 8, and keys to come are 16 higher. The docstrings' literal examples are true."""
    def buckets(distance, bidirectional):
        return T.relative_position_bucket(torch.tensor(distance), bidirectional, 32, 128).tolist()
    assert buckets([0, -1, -15, -16, -112, -113, -128, -1000, 1, 50], False) == [
        0, 1, 15, 16, 30, 31, 31, 31, 0, 0]
    assert buckets([0, -7, -8, -90, -91, -1000], True) == [0, 7, 8, 14, 15, 15]
    assert buckets([7, 8, 90, 91, 1000], True) == [23, 24, 30, 31, 31]
    assert doctest.testmod(T) == doctest.testmod(km) == (0, 1)


@needs_transformers
def test_buckets_equal_transformers():
    """Every distance from -600 to 600 has transformers' bucket, for four sizes of the table."""
    theirs = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket
    distance = torch.arange(-600, 601)
    for sizes in product((True, False), (32, 8), (128, 256)):
        assert torch.equal(T.relative_position_bucket(distance, *sizes), theirs(distance, *sizes))


@BOTH
def test_padding_changes_nothing(config):
    """An example alone and the same example padded, with garbage at the padding: equal states and
    logits, 1e-12."""
    t5, (x, mask, ids) = model(config), batch(config)
    x = torch.where(mask[..., None], x, 1e6)
    alone, kept = x[1:, :9], torch.ones(1, 9, dtype=torch.bool)
    assert relative(T.encode(t5, x, mask)[1:, :9], T.encode(t5, alone, kept)) < 1e-12
    assert relative(logits(t5, x, mask, ids)[1:], logits(t5, alone, kept, ids[1:])) < 1e-12
    unmasked = logits(t5, x, torch.ones_like(mask), ids)[1:]
    assert relative(unmasked, logits(t5, alone, kept, ids[1:])) > 1e-3     # the mask does it


def test_masked_keys_get_nothing():
    """However large its score, a masked key weighs 0. The others share 1, in the scores' dtype. A
    bias is not rounded to it."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        scores = torch.tensor([[[[1e9, 2., 2., -1e9]]]], dtype=dtype)
        bias = T.padding_bias(torch.tensor([[False, True, True, False]]), torch.float32)
        p = T.attention_weights(scores, bias)
        assert p.dtype == dtype and p.flatten().tolist() == [0, 0.5, 0.5, 0]
    narrow, bias = torch.zeros(2).bfloat16(), torch.tensor([100., 100.2])      # its ulp is 0.5
    assert relative(T.attention_weights(narrow, bias).float(), bias.softmax(0)) < 1e-2


@BOTH
def test_decoder_is_causal_and_encoder_is_not(config):
    """Another token at position 4 leaves the decoder's positions 0..3 as they were and changes
    4..6. Another last vector changes the encoder's first state."""
    t5, (x, mask, ids) = model(config), batch(config)
    other = ids.clone()
    other[:, 4] = (ids[:, 4] + 1) % 11
    difference = (logits(t5, x, mask, other) - logits(t5, x, mask, ids)).abs().amax(-1)
    assert difference[:, :4].max() < 1e-13 and difference[:, 4:].min() > 1e-6
    moved = x.clone()
    moved[0, -1] += 1
    assert (T.encode(t5, moved, mask) - T.encode(t5, x, mask))[0, 0].abs().max() > 1e-6


def test_the_residual_stream_is_wide():
    """The stream has float32 or the input's dtype, whatever the weights' dtype. With bfloat16
    weights whose branches output 0, the encoder is its final norm: a change of the input far below
    a bfloat16 ulp (0.125 at 18) comes through whole."""
    t5, (x, mask, ids) = model(V11, torch.bfloat16), batch(V11)
    H = T.encode(t5, x, mask)
    assert H.dtype == T.decode(t5, ids, H, mask).dtype == torch.float64
    for name, weight in t5.weights.items():
        if name.endswith(("Attention.o.weight", "wo.weight")):
            weight.zero_()
    for value in (18 + x.float(), 18 + x.float() + 1e-4 * torch.arange(6)):
        H = T.encode(t5, value, mask)
        by_hand = value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        by_hand = by_hand * t5.weights["encoder.final_layer_norm.weight"].float()
        assert H.dtype == torch.float32 and relative(H, by_hand) < 1e-6
    y = T.decode(t5, ids, H, mask)
    for value in (y, T.embed_tokens(t5, ids), T.next_token_logits(t5, y)):
        assert value.dtype == torch.float32


def test_onednn_is_the_plain_linear(monkeypatch):
    """oneDNN's float32 product, its gradient, its Hessian-vector products under torch.func and the
    gradient of a weight are F.linear's to 1e-5. float64 and small weights take F.linear."""
    g = torch.Generator().manual_seed(0)
    x, u, w = (torch.randn(*shape, generator=g) for shape in ((9, 520), (9, 520), (520, 520)))

    def results():
        gradient = torch.func.grad(lambda x: T.linear(x, w / 25).sin().sum())
        return (T.linear(x, w), gradient(x), torch.func.vjp(gradient, x)[1](u)[0],
                torch.func.jvp(gradient, (x,), (u,))[1],
                torch.func.grad(lambda w: T.linear(x, w / 25).sin().sum())(w))
    monkeypatch.setattr(onednn, "ONEDNN", hasattr(torch.ops.mkldnn, "_linear_pointwise"))
    ours, asked = results(), []
    monkeypatch.setattr(onednn.Linear, "apply", lambda *inputs: asked.append(inputs))
    assert T.linear(x.double(), w.double()).dtype == torch.float64 and T.linear(x, w[:9]).any()
    assert not asked
    T.linear(x, w)
    assert len(asked) == onednn.ONEDNN
    monkeypatch.setattr(onednn, "ONEDNN", False)
    assert all(relative(a, b) < 1e-5 for a, b in zip(ours, results()))


@BOTH
def test_second_derivatives(config):
    """Through encode and decode, torch.func's gradient and Hessian-vector product of a loss in the
    encoder's input equal central differences in float64 to 1e-6, on the smooth gated GELU and on
    ReLU away from its kinks."""
    t5, (x, mask, ids) = model(config), batch(config)
    direction = torch.sin(7.3 * torch.arange(x.numel(), dtype=torch.float64) ** 1.5).view(x.shape)

    def loss(x):
        log_p = torch.log_softmax(logits(t5, x, mask, ids[:, :3]), dim=-1)
        return -log_p[:, -1, 5].mean()

    gradient = torch.func.grad(loss)
    value, product = torch.func.jvp(gradient, (x,), (direction,))
    step = 1e-5
    ahead, behind = x + step * direction, x - step * direction
    slope = (loss(ahead) - loss(behind)) / (2 * step)
    assert abs((value * direction).sum() - slope) < 1e-6 * abs(slope)
    assert relative(product, (gradient(ahead) - gradient(behind)) / (2 * step)) < 1e-6
    assert product.abs().max() > 1e-3
    assert value[1, 9:].eq(0).all() and product[1, 9:].eq(0).all()         # nothing at the padding


# ------------------------------------------------------------------------------------------ K-means

def cloud(n=300, d=4, seed=0, dtype=torch.float64):
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finds_planted_clusters(dtype):
    """From every one of ten seeds: one cluster per planted one, its centroid the mean of its
    points, in the points' dtype."""
    label = torch.arange(6).repeat(40)
    centres = torch.cat([100 * torch.eye(4), 100 * torch.ones(1, 4), torch.zeros(1, 4)])
    points = (centres[label] + cloud(240)).to(dtype)
    for seed in range(10):
        found = km.kmeans(points, 6, seed)
        assert found.centroids.dtype == dtype and found.assignments.dtype == torch.long
        pairs = set(zip(label.tolist(), found.assignments.tolist()))
        assert len(pairs) == 6
        for truth, cluster in pairs:
            mean = points[label == truth].mean(0)
            assert relative(found.centroids[cluster], mean) < {4: 1e-5, 8: 1e-12}[dtype.itemsize]


def test_inertia_never_rises_and_is_equation_16():
    """Over 20 starts, half of them with centroids that no point is near: the inertia falls at each
    update, its last value is the sum of squared distances of Eq. 16, and the end is a fixed point
    without an empty cluster."""
    for seed in range(20):
        points = cloud(seed=seed)
        start = km.plus_plus(points, 12, seed)
        if seed % 2:
            start[3:9] += 50
            assert len(km.nearest(points, start)[0].unique()) < 12
        centroids, assignments, inertia = km.kmeans(points, 12, seed, 200, centroids=start)
        assert all(b <= a * (1 + 1e-12) for a, b in zip(inertia, inertia[1:]))
        assert 2 < len(inertia) < 200
        squared = ((points[:, None] - centroids) ** 2).sum(-1)                 # (n, K)
        assert torch.equal(squared.argmin(1), assignments)
        assert inertia[-1] == pytest.approx(squared.min(1).values.sum().item(), rel=1e-12)
        means = torch.stack([points[assignments == j].mean(0) for j in range(12)])
        assert relative(centroids, means) < 1e-12


@needs_sklearn
def test_equals_scikit_learn():
    """From the same start scikit-learn's Lloyd ends with the same assignments, centroids and
    inertia, 1e-9 relative."""
    for seed in range(5):
        points = cloud(500, 6, seed)
        start = km.plus_plus(points, 9, seed)
        ours = km.kmeans(points, 9, seed, iterations=300, centroids=start)
        theirs = sklearn.cluster.KMeans(9, init=start.numpy(), n_init=1, max_iter=300, tol=0,
                                        algorithm="lloyd").fit(points.numpy())
        assert ours.assignments.tolist() == theirs.labels_.tolist()
        assert relative(ours.centroids, torch.from_numpy(theirs.cluster_centers_)) < 1e-9
        assert ours.inertia[-1] == pytest.approx(theirs.inertia_, rel=1e-9)


def test_chunks_and_global_seeds_change_nothing():
    """Chunks of 7 or 128 points give the assignments of one chunk, and its centroids and inertia to
    1e-12. One seed gives the same bits and leaves the global generators alone. Another seed, and a
    seed of several numbers, start elsewhere."""
    points = cloud()
    whole = km.kmeans(points, 10, 5, chunk=len(points))
    for chunk in (7, 128):
        parts = km.kmeans(points, 10, 5, chunk=chunk)
        assert torch.equal(parts.assignments, whole.assignments)
        assert relative(parts.centroids, whole.centroids) < 1e-12
        assert parts.inertia == pytest.approx(whole.inertia, rel=1e-12)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    again = km.kmeans(points, 10, 5, chunk=len(points))
    assert torch.equal(again.centroids, whole.centroids) and again.inertia == whole.inertia
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    starts = [km.plus_plus(points, 10, seed).sum().item() for seed in (5, 6, (5, 1))]
    assert len(set(starts)) == 3


def test_plus_plus_draws_by_squared_distance():
    """Of the points 0, 1, 3 the second centroid is, after 0, 3 with probability 9/10, after 1 4/5,
    after 3 9/13 (for 0). The frequencies over 2,000 seeds are within 4 standard errors, and no
    point is drawn twice."""
    points = torch.tensor([[0.], [1.], [3.]])
    drawn = [tuple(km.plus_plus(points, 2, seed)[:, 0].tolist()) for seed in range(2000)]
    for first, second, p in ((0, 3, 9 / 10), (1, 3, 4 / 5), (3, 0, 9 / 13)):
        after = [pair for pair in drawn if pair[0] == first]
        share = sum(pair[1] == second for pair in after) / len(after)
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / len(after))
        assert abs(len(after) / 2000 - 1 / 3) < 4 * math.sqrt(2 / 9 / 2000)
    assert all(a != b for a, b in drawn)


def test_empty_clusters_by_hand():
    """Points 0, 1, 2, 10; centroids 1, 100, 200. All go to the first (inertia 1 + 0 + 1 + 81). The
    farthest, 10, fills the second; of 0 and 2, as far, 0 fills the third. Means 1.5, 10, 0; inertia
    0.25 + 0.25; then nothing changes. No update leaves the start. Of 1,000 points equally far the
    first fill the clusters."""
    points = torch.tensor([[0.], [1.], [2.], [10.]], dtype=torch.float64)
    start = torch.tensor([[1.], [100.], [200.]], dtype=torch.float64)
    found = km.kmeans(points, 3, 0, centroids=start)
    assert found.centroids.tolist() == [[1.5], [10.], [0.]]
    assert found.assignments.tolist() == [2, 0, 0, 1]
    assert found.inertia == pytest.approx([83, 0.5], abs=1e-9)
    for limit in (0, 1):
        stopped = km.kmeans(points, 3, 0, limit, centroids=start)
        assert torch.equal(stopped.centroids, start if limit == 0 else found.centroids)
    filled = km.fill_empty(torch.zeros(1000, dtype=torch.long), torch.ones(1000), 4)
    assert filled[:3].tolist() == [1, 2, 3] and filled[3:].eq(0).all()


def test_extremes_of_k():
    """k = n: every point alone, inertia 0. k = 1: the mean. All points equal, or two distinct ones
    for four clusters: it ends at inertia 0, every centroid one of the points."""
    points = cloud(40)
    assert sorted(km.kmeans(points, 40, 0).assignments.tolist()) == list(range(40))
    one = km.kmeans(points, 1, 0)
    assert relative(one.centroids[0], points.mean(0)) < 1e-14 and one.assignments.eq(0).all()
    for points in (torch.full((6, 2), 3.5), torch.tensor([[1., 2.], [4., 6.]]).repeat(3, 1)):
        found = km.kmeans(points, 4, 0)
        assert found.inertia[-1] == pytest.approx(0, abs=1e-10) and len(found.inertia) < 5
        assert all((points == centroid).all(1).any() for centroid in found.centroids)


def test_float32_costs_no_digits():
    """Float32 points 1 apart at 5,000, where |x|^2 has an ulp of 128, find their nearest centroids
    at the true distances. A point's distance to itself is 0, never below. The
    mean of 20,000 points near 10,000 is the exact one: float32 sums, of 2e8, would miss it."""
    points = 5000 + cloud(240, 50, dtype=torch.float32)
    centroids = points[:40]
    squared = (points[:, None] - centroids).square().sum(-1)                   # (n, K)
    assignments, distances = km.nearest(points, centroids)
    assert torch.equal(assignments, squared.argmin(1))
    assert (distances - squared.amin(1)).abs().max() < 1e-3
    assignments, distances = km.nearest(points, points)
    assert assignments.tolist() == list(range(240))
    assert distances.min() >= 0 and distances.max() < 1e-5
    points = 10_000 + 10 * cloud(20_000, 3, dtype=torch.float32)
    assert torch.equal(km.kmeans(points, 1, 0).centroids[0], points.double().mean(0).float())


def test_kmeans_errors():
    """Fewer points than clusters, no cluster, and an inertia that is not finite are ValueErrors
    that name the numbers."""
    points, bad = cloud(5), torch.full((2, 4), math.nan, dtype=torch.float64)
    alone = torch.cat([points[:4], points[4:] * math.inf])
    for words, x, k, start in (
            ("0 clusters of 5 points", points, 0, None), ("6 clusters of 5", points, 6, None),
            ("inertia is nan", alone, 2, None), ("inertia is nan", bad, 2, None),
            ("inertia is inf|nan", points.float() * 1e25, 2, None),
            ("inertia is nan", points, 2, bad)):
        with pytest.raises(ValueError, match=words):
            km.kmeans(x, k, 0, centroids=start)


# --------------------------------------------------- the method: the definition is what it says

@pytest.fixture(scope="module")
def world():
    """A gated float64 T5, a prompt, a phi away from its start, a task and a partner, lambda, b and
    a large a1."""
    generator = torch.Generator().manual_seed(3)
    phi = {name: value + 0.3 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
           for name, value in affine_start(8, torch.float64).items()}
    return SimpleNamespace(
        t5=random_t5(), theta=torch.randn(3, 8, generator=generator, dtype=torch.float64), phi=phi,
        task=random_task(1), partner=random_task(2), lam=0.3, b=0.4,
        method=Method(inner_rate=20.0, micro_tokens=24, gate_weight=0.7))


def plain_loss(t5, theta, examples, method, partner=None, lam=0.0):
    """Eq. 1 and 4 written again, an example at a time, nothing padded but the shorter of a pair."""
    def states(examples, row):
        alone = data.collate(examples, [row], "cpu")
        H, _ = supmer.encode_with_prompt(t5, theta, alone)
        return H[0], F.one_hot(examples.labels[row], len(examples.words)).double()

    losses = []
    for row in range(len(examples.ids)):
        H, Y = states(examples, row)
        if partner is not None:
            H_j, Y_j = states(partner, row)
            S = max(len(H), len(H_j))
            H = (1 - lam) * F.pad(H, (0, 0, 0, S - len(H))) + lam * F.pad(
                H_j, (0, 0, 0, S - len(H_j)))
            Y = (1 - lam) * Y + lam * Y_j
        everywhere = torch.ones(1, len(H), dtype=torch.bool)
        last = T.decode(t5, torch.tensor([[0, SENTINEL]]), H[None], everywhere)[0, 1]
        log_p = torch.log_softmax(T.next_token_logits(t5, last), -1)
        scores = torch.stack([log_p[word[1]] for word in examples.words])
        losses.append(-(Y * (scores.log_softmax(0) if method.words_only else scores)).sum())
    return torch.stack(losses).mean()


def meta_loss(w, theta, phi, method):
    """supmer.meta_loss() of the world's task."""
    return supmer.meta_loss(w.t5, theta, phi, w.task, w.partner, w.lam, w.b, method)


def defined(w, method):
    """The derivative of the definition, by autograd -> {"theta": ..., and phi's}."""
    d_theta, d_phi = torch.func.grad(meta_loss, argnums=(1, 2))(w, w.theta, w.phi, method)
    return {"theta": d_theta, **d_phi}


def computed(w, method):
    """The same from the function that training uses."""
    part = supmer.meta_gradient(w.t5, w.theta, w.phi, w.task, w.partner, w.lam, w.b, method)
    return {"theta": part.d_theta, **part.d_phi}


def changed(w, **values):
    """The world with other values."""
    return SimpleNamespace(**{**vars(w), **values})


def test_the_definition_is_the_papers(world):
    """meta_loss is L_q(theta - a1 psi(grad L_s)) with the query sets mixed, + lambda_reg L_reg,
    when each piece is written again in the plainest way."""
    w, method = world, replace(world.method, inner_rate=3.0)
    g = torch.func.grad(lambda theta: plain_loss(w.t5, theta, w.task.support, method))(w.theta)
    states = []
    for row in range(5):
        H, _ = supmer.encode_with_prompt(
            w.t5, w.theta, data.collate(w.task.support, [row], "cpu"))
        states.append(H[0].mean(0))
    z = torch.sigmoid(w.phi["W"] @ torch.stack(states).mean(0) + w.phi["c"])
    turned = g / g.norm(dim=1, keepdim=True) @ w.phi["A"].T + w.phi["a"]
    h = g.norm(dim=1, keepdim=True) * turned / turned.norm(dim=1, keepdim=True)
    adapted = w.theta - 3.0 * (z * h + (1 - z) * g)
    loss = plain_loss(w.t5, adapted, w.task.query, method, w.partner.query, w.lam)
    wanted = loss + 0.7 * (z - w.b).square().mean()
    assert meta_loss(w, w.theta, w.phi, method).item() == pytest.approx(wanted.item(), rel=1e-12)


def slope(function, x, u, step=1e-5):
    """The derivative of a function: x -> number, along u, from values alone."""
    return float((function(x + step * u) - function(x - step * u)) / (2 * step))


def slopes(w, method, monkeypatch):
    """{name: (direction, slope of meta_loss along it)} for theta and each tensor of phi, from its
    values alone. The gate's input is frozen, as the definition has it a constant."""
    _, pooled, _ = supmer.prompt_gradient(w.t5, w.theta, w.task.support, method)
    monkeypatch.setattr(supmer, "pool", lambda H, mask: pooled.expand(len(H), -1))
    generator, found = torch.Generator().manual_seed(5), {}

    def loss(name, x):
        moved = {**w.phi, name: x}
        return meta_loss(w, moved.pop("theta", w.theta), moved, method)
    for name, x in {"theta": w.theta, **w.phi}.items():
        u = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        found[name] = u, slope(partial(loss, name), x, u)
    monkeypatch.undo()
    return found


@pytest.mark.parametrize("relative_step", [0.0, 0.3])
def test_meta_gradient_equals_finite_differences(world, relative_step, monkeypatch):
    """d theta and d phi have the slopes that values alone show, to 1e-6: mixing, psi, L_reg and the
    Hessian all on; with relative_step a1 depends on theta, phi and g, and the gradient knows it."""
    method = replace(world.method, relative_step=relative_step, micro_tokens=36)
    found = computed(world, method)
    for name, (u, wanted) in slopes(world, method, monkeypatch).items():
        assert abs(wanted) > 1e-4, f"the test must move {name}"
        assert float((found[name] * u).sum()) == pytest.approx(wanted, rel=1e-6), name


# ------------------------------------------------ the method: the meta-gradient is its derivative

KERNELS = {     # what is computed: changes of world.method, and of the world
    "as the paper": ({}, {}), "unmixed": ({}, {"lam": 0.0}),
    "one micro-batch": ({"micro_tokens": 640}, {}), "one graph kept": ({"keep_graphs": 1}, {}),
    "all graphs kept": ({"keep_graphs": 9}, {}), "first order": ({"first_order": True}, {}),
    "first order, graphs kept": ({"first_order": True, "keep_graphs": 9}, {}),
    "relative step": ({"relative_step": 0.3}, {}),
    "relative step, first order": ({"relative_step": 0.3, "first_order": True}, {}),
    "label words only": ({"words_only": True}, {}), "no L_reg": ({"augmentation": False}, {}),
    "released psi, unmixed": ({"regularizer": "released"}, {"lam": 0.0}),
    "released psi, first order": ({"regularizer": "released", "first_order": True}, {}),
    **{name: ({"regularizer": name}, {}) for name in supmer.REGULARIZERS},
    "centroids": ({}, {"task": random_task(3, slots=2), "partner": random_task(4, slots=2)})}


@pytest.mark.parametrize("case", KERNELS)
def test_meta_gradient_is_the_definitions_derivative(world, case):
    """The function whose memory one micro-batch bounds equals torch.func.grad of the definition, to
    1e-10 in float64, in each of its forms."""
    choices, changes = KERNELS[case]
    w, method = changed(world, **changes), replace(world.method, **choices)
    if method.regularizer != "affine":
        generator = torch.Generator().manual_seed(1)
        start = supmer.REGULARIZERS[method.regularizer].init(*w.theta.shape)
        w.phi = {name: torch.randn(x.shape, generator=generator, dtype=torch.float64) / 2
                 for name, x in start.items()}
    found, wanted = computed(w, method), defined(w, method)
    assert found.keys() == wanted.keys() == {"theta", *w.phi}
    for name, value in wanted.items():
        assert relative(found[name], value) < 1e-10, name


@pytest.fixture(scope="module")
def derivative(world):
    return defined(world, world.method)


def forgets_to_zero_padding(mix):
    """Mixing that leaves at padding whatever the encoder put there."""
    def careless(H_i, mask_i, Y_i, H_j, mask_j, Y_j, lam):
        _, mask, Y = mix(H_i, mask_i, Y_i, H_j, mask_j, Y_j, lam)
        whole_i, whole_j = torch.ones_like(mask_i), torch.ones_like(mask_j)
        return mix(H_i, whole_i, Y_i, H_j, whole_j, Y_j, lam)[0], mask, Y
    return careless


@pytest.mark.parametrize("removed", ["the Hessian", "dpsi/dg", "psi", "mixing", "L_reg", "padding"])
def test_each_part_of_the_meta_gradient_is_needed(world, derivative, monkeypatch, removed):
    """Take one part away and the gradient is no longer the derivative: the proofs can fail."""
    method, w, affine = world.method, changed(world), supmer.REGULARIZERS["affine"]
    if removed == "the Hessian":
        method = replace(method, first_order=True)
    elif removed == "dpsi/dg":          # the right value; as a function of g, the identity
        monkeypatch.setitem(supmer.REGULARIZERS, "affine", affine._replace(
            psi=lambda phi, g, pooled: affine.psi(phi, g.detach(), pooled) + g - g.detach()))
    elif removed == "psi":
        w.phi = {name: x.double() for name, x in affine.init(*w.theta.shape).items()}
    elif removed == "mixing":
        w.lam = 0.0
    elif removed == "L_reg":
        method = replace(method, gate_weight=0.0)
    else:
        monkeypatch.setattr(supmer, "mix", forgets_to_zero_padding(supmer.mix))
    found = computed(w, method)
    assert max(relative(found[name], derivative[name]) for name in derivative) > 1e-3


@pytest.mark.parametrize("change", ["order", "padding"])
def test_order_and_padding_change_nothing(world, derivative, monkeypatch, change):
    """Another order of the examples and extra padding leave the gradient unchanged to 1e-12."""
    w = changed(world)
    if change == "order":
        def reordered(e, order):
            return data.Examples([e.ids[r] for r in order], [e.slots[r] for r in order],
                                 e.vectors[order], e.labels[order], e.words)
        order = [3, 0, 4, 2, 1]
        w.task, w.partner = (
            task._replace(support=reordered(task.support, order[::-1]),
                          query=reordered(task.query, order)) for task in (w.task, w.partner))
    else:
        def padded(examples, rows, device, collate=data.collate):
            batch = collate(examples, rows, device)
            return batch._replace(ids=F.pad(batch.ids, (0, 5), value=9),
                                  mask=F.pad(batch.mask, (0, 5)))
        monkeypatch.setattr(supmer, "collate", padded)
    for name, value in computed(w, world.method).items():
        assert relative(value, derivative[name]) < 1e-12, name


def test_the_log_of_a_task_is_what_it_says(world):
    """Each number of a task's log, and its cosine, worked out from the definition's pieces; with
    exact_cosine q is taken at theta instead of v at theta'."""
    w, method = world, world.method
    part = supmer.meta_gradient(w.t5, w.theta, w.phi, w.task, w.partner, w.lam, w.b, method)
    g, pooled, support_loss = supmer.prompt_gradient(w.t5, w.theta, w.task.support, method)
    psi = supmer.regularize(w.phi, g, pooled)
    query = partial(supmer.prompt_gradient, w.t5, examples=w.task.query, method=method,
                    partner=w.partner.query, lam=w.lam)
    v, _, query_loss = query(w.theta - 20 * psi)
    d_gate = torch.func.grad(supmer.gate_loss)(w.phi, pooled, w.b)

    def norm(tensors):
        return torch.cat([x.flatten() for x in tensors.values()]).norm()
    plain = {name: x - 0.7 * d_gate[name] for name, x in part.d_phi.items()}
    wanted = {
        "support_loss": support_loss, "query_loss": query_loss,
        "gate_loss": supmer.gate_loss(w.phi, pooled, w.b),
        "step_size": 20 * psi.norm() / w.theta.norm(),
        "second_order": (part.d_theta - v).norm() / part.d_theta.norm(),
        "phi_gradient_meta": norm(plain), "phi_gradient_gate": 0.7 * norm(d_gate),
        "gate_mean": torch.sigmoid(w.phi["W"] @ pooled + w.phi["c"]).mean(),
        "A_minus_I": (w.phi["A"] - torch.eye(8)).norm()}
    assert part.log == pytest.approx({name: float(x) for name, x in wanted.items()}, rel=1e-9)
    for exact, gradient in ((False, v), (True, query(w.theta)[0])):
        method = replace(method, exact_cosine=exact)
        part = supmer.meta_gradient(w.t5, w.theta, w.phi, w.task, w.partner, w.lam, w.b, method)
        cosine = F.cosine_similarity(gradient.flatten(), psi.flatten(), dim=0)
        assert part.s.item() == pytest.approx(cosine.item(), rel=1e-9)


# ---------------------------------------------------------- the method: each piece, worked by hand

def test_micro_batches_by_hand():
    """Behind a prompt of 2, texts of 3, 9, 4 and 5 tokens are 5, 11, 6 and 7 positions: sorted, two
    fit into 13 (2 x 6), the third (7) does not, nor beside the last (2 x 11). One example may be
    more than the budget; a partner's row stays with its own and counts where it is longer."""
    texts = data.Examples([[3] * n for n in (3, 9, 4, 5)], [[]] * 4, torch.zeros(4, 0, 8),
                          torch.zeros(4, dtype=torch.long), WORDS)
    partner = texts._replace(ids=[[4] * n for n in (9, 1, 1, 1)])

    def rows(tokens, partner=None):
        method, found = Method(micro_tokens=tokens), []
        for rows, ours, other in supmer.micro_batches(texts, torch.zeros(2, 8), method, partner):
            assert ours.mask.sum(1).tolist() == [len(texts.ids[r]) for r in rows]
            assert partner is None or other.mask.sum(1).tolist() == [
                len(partner.ids[r]) for r in rows]
            found.append(rows)
        return found
    assert rows(13) == [[0, 2], [3], [1]] and rows(1) == [[0], [2], [3], [1]]
    assert rows(12) == rows(13) and rows(11) == [[0], [2], [3], [1]]
    assert rows(44) == [[0, 2, 3, 1]] and rows(14, partner) == [[2, 3], [0], [1]]


def test_words_of_several_pieces_are_scored_by_their_sum(world, monkeypatch):
    """log p("6 7 8") = log p(6) + log p(7 | 6) + log p(8 | 6 7), as from decoder runs of their own,
    in one run for all words; over the label words alone, the probabilities add up to 1."""
    words, t5, runs = [[SENTINEL, 5], [SENTINEL, 6, 7, 8], [SENTINEL, 6, 9]], world.t5, []
    monkeypatch.setattr(supmer, "decode", lambda *a: runs.append(a) or T.decode(*a))
    H, mask = supmer.encode_with_prompt(
        t5, world.theta, data.collate(world.task.support, [0, 1], "cpu"))

    def log_p(prefix, token):
        ids = torch.tensor([[0, SENTINEL, *prefix]] * 2)
        logits = T.next_token_logits(t5, T.decode(t5, ids, H, mask)[:, -1])
        return torch.log_softmax(logits, -1)[:, token]
    wanted = torch.stack([log_p([], 5), log_p([], 6) + log_p([6], 7) + log_p([6, 7], 8),
                          log_p([], 6) + log_p([6], 9)], 1)
    assert relative(supmer.word_log_probs(t5, H, mask, words), wanted) < 1e-12 and len(runs) == 1
    only = supmer.word_log_probs(t5, H, mask, words, words_only=True)
    assert relative(only, wanted - wanted.exp().sum(1, keepdim=True).log()) < 1e-12


def test_inserted_vectors_replace_tokens(world):
    """In a slot the token's id is irrelevant and the vector is not; its neighbours' ids are not."""
    examples = random_examples(4, 5, slots=2)

    def loss(ids=lambda row: row, more=0.0):
        given = examples._replace(ids=[ids(row) for row in examples.ids],
                                  vectors=examples.vectors + more)
        return supmer.prompt_gradient(world.t5, world.theta, given, world.method)[2]
    assert loss() == loss(lambda row: [row[0], 9, 9, *row[3:]])
    assert loss() != loss(more=1.0) and loss() != loss(lambda row: [9, *row[1:]])


def test_psi_is_the_identity_at_the_start():
    """A = I, a = 0, W = 0, c = 0: psi(g) = g, so meta-training begins as plain MAML; without a
    regularizer psi is the identity for good."""
    g, pooled = torch.randn(5, 16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    assert relative(supmer.regularize(affine_start(16, torch.float64), g, pooled), g) < 1e-14
    none = supmer.REGULARIZERS["none"]
    assert none.init(5, 16) == {} and none.psi({}, g, pooled) is g
    assert none.penalty({}, pooled, 0.3) == 0 and none.log({}, pooled) == {}


def test_psi_by_hand():
    """d = 2, one row: g = (3, 4), A a quarter turn: h = (-4, 3), and with a = (0.8, 1.4) it has the
    direction of (-0.8, 0.6) + a; z = (sigmoid(1), 1/2)."""
    phi = {"A": torch.tensor([[0.0, -1.0], [1.0, 0.0]]), "a": torch.zeros(2),
           "W": torch.tensor([[1.0, 0.0], [0.0, 0.0]]), "c": torch.zeros(2)}
    g, pooled = torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 7.0])
    z = torch.tensor([1 / (1 + math.exp(-1)), 0.5])
    assert torch.allclose(supmer.affine(phi, g), torch.tensor([[-4.0, 3.0]]))
    assert torch.allclose(supmer.gate(phi, pooled), z)
    wanted = z * torch.tensor([-4.0, 3.0]) + (1 - z) * g
    assert torch.allclose(supmer.regularize(phi, g, pooled), wanted)
    moved = {**phi, "a": torch.tensor([0.8, 1.4]), "c": torch.tensor([-1.0, 0.0])}
    assert torch.allclose(supmer.affine(moved, g), torch.tensor([[0.0, 5.0]]), atol=1e-6)
    assert torch.allclose(supmer.gate(moved, pooled), torch.tensor([0.5, 0.5]))
    assert float(supmer.gate_loss(moved, pooled, 0.2)) == pytest.approx(0.3 ** 2)


def test_lengths_are_kept_and_zero_rows_have_finite_derivatives(world):
    """|h(g)| = |g| for rows from 1e-30 to 1e3 (psi need not keep it); a zero row stays zero and no
    derivative is NaN."""
    phi = {name: value.float() for name, value in world.phi.items()}
    sizes = torch.tensor([[1.0], [1e-30], [1e3], [0.0], [1e-7]])
    g = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)) * sizes
    h = supmer.affine(phi, g)
    assert torch.allclose(h.double().norm(dim=-1), g.double().norm(dim=-1), rtol=1e-5, atol=0)
    assert torch.equal(h[3], torch.zeros(8))
    psi, pull_back = torch.func.vjp(lambda phi, g: supmer.regularize(phi, g, torch.ones(8)), phi, g)
    d_phi, d_g = pull_back(torch.ones_like(psi))
    assert all(x.isfinite().all() for x in (psi, d_g, *d_phi.values()))
    assert not torch.allclose(psi[0].norm(), g[0].norm(), rtol=1e-3)


def test_cosine_by_hand():
    """Over all rows as one vector; 1 at most, and 0 beside zeros; tiny gradients do not underflow.
    """
    a, b = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert float(supmer.cosine(a, b)) == pytest.approx(0.6)
    assert float(supmer.cosine(1e-30 * a, -1e-30 * a)) == -1 and supmer.cosine(a, 0 * a) == 0


@pytest.mark.parametrize("s, curve, b", [
    (-1, 2, 0.0), (0, 2, math.sqrt(2) - 1), (1, 2, 1.0), (0, 1, 0.5), (0.5, 4, (4**0.75 - 1) / 3)])
def test_curriculum_by_hand(s, curve, b):
    """Eq. 10 at s = -1, 0, 1, its limit at m = 1, and one more."""
    assert supmer.curriculum(s, curve) == pytest.approx(b, abs=1e-15)


def test_lambda_is_zero_at_b_zero_and_has_the_beta_mean():
    """lambda ~ Beta(b alpha, alpha): 0 at b = 0, mean b / (1 + b), variance as the formula's, in
    [0, 1], one number for each seed, step and task."""
    assert supmer.draw_lambda(0.0, 1.0, 1, 2, 3) == 0.0
    for b, alpha in ((0.05, 1.0), (0.5, 4.0), (1.0, 1.0)):
        draws = np.array([supmer.draw_lambda(b, alpha, 10, step, 0) for step in range(4000)])
        assert ((0 <= draws) & (draws <= 1)).all()
        assert abs(draws.mean() - b / (1 + b)) < 4 * draws.std() / math.sqrt(len(draws))
        variance = b / ((1 + b) ** 2 * (alpha * (1 + b) + 1))
        assert draws.var() == pytest.approx(variance, rel=0.15)
    one = supmer.draw_lambda(0.5, 1.0, 1, 2, 3)
    assert one == supmer.draw_lambda(0.5, 1.0, 1, 2, 3)
    assert one not in [supmer.draw_lambda(0.5, 1.0, *other)
                       for other in ((1, 2, 4), (1, 3, 3), (2, 2, 3))]


def test_mix_by_hand():
    """Eq. 4 on literal states: padding zeroed before mixing, the union of the masks, label weights
    added; two examples of one class stay a certain example of it."""
    short = (torch.tensor([[[2.0], [4.0], [50.0]]]), torch.tensor([[True, True, False]]),
             torch.tensor([[1.0, 0.0]]))
    long = (torch.tensor([[[10.0], [20.0], [30.0], [40.0]]]), torch.tensor([[True] * 4]),
            torch.tensor([[0.0, 1.0]]))
    H, mask, Y = supmer.mix(*short, *long, 0.25)
    assert torch.equal(H, torch.tensor([[[4.0], [8.0], [7.5], [10.0]]]))
    assert torch.equal(mask, long[1]) and torch.equal(Y, torch.tensor([[0.75, 0.25]]))
    H, _, Y = supmer.mix(*long, *short, 0.25)
    assert torch.equal(H, torch.tensor([[[8.0], [16.0], [22.5], [30.0]]]))
    assert torch.equal(Y, torch.tensor([[0.25, 0.75]]))
    assert torch.equal(supmer.mix(*long, *long, 0.3)[2], long[2])


def test_no_mixing_encodes_no_partner(world, monkeypatch):
    """At lambda = 0 the query gradient equals that of the unmixed query to the last bit, and each
    example is encoded once."""
    rows, encode, w = [], supmer.encode, world
    monkeypatch.setattr(
        supmer, "encode", lambda t5, x, mask: rows.append(len(x)) or encode(t5, x, mask))
    v, _, _ = supmer.prompt_gradient(w.t5, w.theta, w.task.query, w.method, w.partner.query, 0.0)
    assert sum(rows) == len(w.task.query.ids)
    g, _, _ = supmer.prompt_gradient(w.t5, w.theta, w.task.query, w.method)
    assert torch.equal(v, g)


def test_the_prompt_starts_from_rows_of_the_embedding_table():
    """Distinct rows among the first 5000 of the table, drawn from the seed; float32."""
    wide = random_t5(vocab_size=6000, dtype=torch.bfloat16)
    table = wide.weights["shared.weight"].float()
    theta = supmer.init_prompt(wide, 900, 0)
    rows = (theta[:, None] == table).all(2).nonzero()[:, 1]
    assert theta.dtype == torch.float32 and len(set(rows.tolist())) == 900
    assert 4000 < rows.max() < 5000 and torch.equal(theta, supmer.init_prompt(wide, 900, 0))
    assert not torch.equal(theta, supmer.init_prompt(wide, 900, 1))


# ------------------------------------------------------------------------- the method: whole steps

def test_meta_step_is_adam_on_the_mean_with_clip_and_linear_decay():
    """The step equals Adam by hand: mean over tasks, norm clipped, rate (1 - step/steps) b1; s is
    the mean cosine; the log has means over the tasks."""
    method = Method(inner_rate=5.0, steps=10, micro_tokens=40, clip=0.01, regularizer_eps=1e-6)
    t5 = random_t5()
    state = supmer.init_state(supmer.init_prompt(t5, 3, 0).double(), method)
    state.step, state.s = 4, 0.2
    theta, phi = state.theta.clone(), {name: value.clone() for name, value in state.phi.items()}
    pairs = [(random_task(1), random_task(2)), (random_task(3), random_task(4))]
    b = supmer.curriculum(0.2, 2.0)
    lams = [supmer.draw_lambda(b, 1.0, 7, 4, i) for i in range(2)]
    parts = [supmer.meta_gradient(t5, theta, phi, *pair, lam, b, method)
             for pair, lam in zip(pairs, lams)]
    log = supmer.meta_step(t5, state, pairs, method, seed=7)

    def stepped(start, gradient, norm, rate, eps):
        """Adam's first step from zero moments is rate * g / (|g| + eps), whatever the betas."""
        clipped = gradient * min(1.0, 0.01 / (norm + 1e-6))
        return start - rate * (1 - 4 / 10) * clipped / (clipped.abs() + eps)
    d_theta = (parts[0].d_theta + parts[1].d_theta) / 2
    wanted = stepped(theta, d_theta, d_theta.norm(), 0.1, 1e-8)
    assert torch.allclose(state.theta, wanted, rtol=1e-9)
    d_phi = {name: (parts[0].d_phi[name] + parts[1].d_phi[name]) / 2 for name in phi}
    norm = torch.cat([x.flatten() for x in d_phi.values()]).norm()
    for name, gradient in d_phi.items():
        wanted = stepped(phi[name], gradient, norm, 1e-4, 1e-6)
        assert torch.allclose(state.phi[name], wanted, rtol=1e-9)
    s = float(parts[0].s + parts[1].s) / 2
    assert state.s == log["s"] == pytest.approx(s) and state.step == 5
    assert log["b"] == b and log["lambda"] == lams
    assert log["theta_gradient"] == pytest.approx(float(d_theta.norm()), rel=1e-5)
    for name, value in parts[0].log.items():
        assert log[name] == pytest.approx((value + parts[1].log[name]) / 2)


@pytest.mark.parametrize("advance", [supmer.meta_step, baselines.ppt_step])
def test_ranks_share_tasks_and_change_no_bit(advance, monkeypatch):
    """theta, phi, s, the log and the validation of a step over three tasks are equal to the bit on
    one, two and three ranks, which compute each task once."""
    t5, pairs = random_t5(dtype=torch.float32), [(random_task(i, 3), random_task(9 + i, 3))
                                                 for i in range(3)]
    method, computed, kernel = Method(relative_step=0.1), [], supmer.meta_gradient
    monkeypatch.setattr(supmer, "meta_gradient", lambda *a: computed.append(a) or kernel(*a))

    def step(ranks):
        state = supmer.init_state(supmer.init_prompt(t5, 3, 0), method)
        state.s = 0.3
        log = advance(t5, state, pairs, method, 0, ranks)
        learned = torch.cat([state.theta.flatten(), *(x.flatten() for x in state.phi.values())])
        held_out = [task for task, _ in pairs]
        return learned.tolist(), log, train.validate(t5, state, held_out, method, ranks)

    alone = step(SOLO)
    for n in (2, 3):
        computed.clear()
        assert on_ranks(monkeypatch, n, step) == [alone] * n
        assert on_ranks(monkeypatch, n, lambda ranks: ranks.map(str, range(5))) == [[*"01234"]] * n
        assert len(computed) == 3 * (advance is supmer.meta_step)


def test_ablations_leave_out_what_they_name():
    """Table 4's rows by step: without the regularizer there is no phi; without augmentation lambda
    is 0 and L_reg is no part of phi's gradient; without the curriculum lambda is drawn at b = 0 as
    well, where the curriculum has 0."""
    pairs = [(random_task(1), random_task(2))]

    def step(**choices):
        method = Method(inner_rate=5.0, gate_weight=1e6, **choices)
        t5, state = small_state(method)
        return supmer.meta_step(t5, state, pairs, method, seed=7), state
    log, state = step()
    assert log["lambda"] == [0.0] and not torch.equal(state.phi["c"], affine_start(8)["c"])
    log, state = step(regularizer="none")
    assert state.phi == {} and "gate_mean" not in log and log["phi_gradient_meta"] == 0
    log, _ = step(augmentation=False, curriculum=False)
    assert log["lambda"] == [0.0] and log["phi_gradient_gate"] == 0 < log["gate_loss"]
    log, _ = step(curriculum=False)
    assert log["b"] == 0 and log["lambda"] == [supmer.draw_lambda(1.0, 1.0, 7, 0, 0)] != [0.0]


@pytest.mark.parametrize("advance, remedy", [(supmer.meta_step, "--inner-rate"),
                                             (baselines.ppt_step, "smaller prompt_rate")])
def test_a_step_stops_on_numbers_that_are_not_finite(advance, remedy):
    """A NaN in the weights, and a rate that leaves float32's range, stop the step with its number
    and a remedy, and change nothing."""
    for rate in (0.1, 1e29):
        method = Method(inner_rate=rate)
        t5, state = small_state(method)
        if rate < 1 or advance is baselines.ppt_step:
            t5.weights["lm_head.weight"][0, 0] = float("nan")
        before = state.theta.clone()
        with pytest.raises(InputError, match=f"step 0.*(sp-next.*not finite|nan).*{remedy}"):
            advance(t5, state, [(random_task(1), random_task(2))], method, 0)
        assert torch.equal(state.theta, before) and state.step == 0


def test_meta_training_lowers_the_loss_after_adaptation():
    """Twenty steps on one planted task: the query loss falls, and the inner step lowers it further.
    """
    method = Method(relative_step=0.05, prompt_rate=0.3, steps=20)
    t5, state = small_state(method)
    planted = random_examples(9, 3, longest=6)
    longer = planted._replace(ids=[row[:1] + row for row in planted.ids])
    task = data.Task("sp-next", (0,), planted, longer)
    before = measure.validate_task(t5, state.theta, state.phi, task, method)
    for _ in range(20):
        supmer.meta_step(t5, state, [(task, task)], method, 0)
    after = measure.validate_task(t5, state.theta, state.phi, task, method)
    assert after["loss_after"] < before["loss_after"] - 1
    assert after["loss_after"] < after["loss_before"]
    assert after["step_size"] == pytest.approx(0.05, rel=1e-3)


def test_scores_and_measures(world):
    """score() is log p of each word, in the examples' order; measure() on literal scores: nll over
    the vocabulary, cross entropy over the words, number correct."""
    w, plain = world, Method()
    scores = measure.score(w.t5, w.theta, w.task.query, w.method)
    loss = plain_loss(w.t5, w.theta, w.task.query, plain).item()
    assert measure.measure(scores, w.task.query.labels)["loss"] == pytest.approx(loss)
    for r in (0, 3):
        alone = w.task.query._replace(ids=w.task.query.ids[r:r + 1], slots=[[]],
                                      vectors=w.task.query.vectors[r:r + 1])
        assert relative(measure.score(w.t5, w.theta, alone, plain)[0], scores[r]) < 1e-12
    scores = torch.log(torch.tensor([[0.2, 0.6], [0.3, 0.1], [0.1, 0.4]]))
    found = measure.measure(scores, torch.tensor([1, 1, 1]))
    assert found["correct"] == 2
    assert found["loss"] == pytest.approx(-math.log(0.6 * 0.1 * 0.4) / 3)
    assert found["word_loss"] == pytest.approx(-math.log(0.75 * 0.25 * 0.8) / 3)


def test_bfloat16_weights_do_not_swallow_the_inner_step():
    """A step of 1/300 of the prompt's length, below bfloat16's resolution, still lowers the loss as
    in float32."""
    wide = random_t5(32, dtype=torch.float32, gated=False)
    narrow = T.T5(wide.config, {name: w.bfloat16() for name, w in wide.weights.items()})
    rounded = T.T5(wide.config, {name: w.float() for name, w in narrow.weights.items()})
    theta, examples = supmer.init_prompt(wide, 3, 0) * 20, random_examples(24, 1, d=32)
    g, _, _ = supmer.prompt_gradient(rounded, theta, examples, Method())
    adapted = theta - theta.norm() / 300 * g / g.norm()

    def drop(t5):
        before, after = (supmer.set_loss(t5, x, examples, Method())[0] for x in (theta, adapted))
        return float(after - before)
    assert drop(rounded) < -0.02
    assert drop(narrow) == pytest.approx(drop(rounded), rel=0.5)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here: torch.cuda.is_available() is false")
def test_a_step_on_a_gpu_equals_the_cpus(world):
    """The same float64 task on CUDA gives the same gradient and step: nothing assumes a CPU."""
    w, found = world, []
    for device in ("cpu", "cuda"):
        there = T.T5(w.t5.config, {name: x.to(device) for name, x in w.t5.weights.items()})
        theta, phi = w.theta.to(device), {name: x.to(device) for name, x in w.phi.items()}
        part = supmer.meta_gradient(there, theta, phi, w.task, w.partner, w.lam, w.b, w.method)
        state = supmer.init_state(theta.clone(), w.method)
        supmer.meta_step(there, state, [(w.task, w.partner)], w.method, 0)
        found.append([part.d_theta, *part.d_phi.values(), state.theta, *state.phi.values()])
    assert all(relative(x.cpu(), y) < 1e-9 for x, y in zip(found[1], found[0]) if y.any())


# Five steps of Alg. 1 on random tasks: s, the query loss, the length of theta after it.
GOLDEN_RUN = [(-0.057357, 4.838695, 1.171528), (0.043455, 4.777033, 1.321654),
              (0.026119, 4.092736, 1.422618), (-0.048968, 5.018450, 1.485282),
              (-0.014996, 4.081985, 1.545177)]


def test_golden_run():
    """Five steps have these numbers to 1e-4, on any machine. Not bit by bit, since a product's sums
    are split otherwise; and in float64, since Adam divides by tiny gradients: in float32 rounding
    has grown to 5e-4 by the fifth step."""
    method, t5, found = Method(inner_rate=5.0, steps=9, micro_tokens=160), random_t5(), []
    state = supmer.init_state(supmer.init_prompt(t5, 3, 0).double(), method)
    for step in range(5):
        pairs = [(random_task(4 * step + i), random_task(4 * step + i + 2)) for i in (0, 1)]
        log = supmer.meta_step(t5, state, pairs, method, 3)
        found.append((log["s"], log["query_loss"], float(state.theta.norm())))
    assert np.allclose(found, GOLDEN_RUN, rtol=0, atol=1e-4), found


# --------------------------------------------------------------------------- the method: extremes

@pytest.mark.parametrize("options", [{}, {"relative_step": 0.03, "exact_cosine": True}])
@pytest.mark.parametrize("case", ["flat", "certain", "tiny", "gate 0", "gate 1", "A 0", "equal",
                                  "rate 1e-4", "rate 1e3"])
def test_extremes_of_a_step_are_no_errors(case, options):
    """A gradient that is zero for every row, or whose squares are, by a loss that is flat or at its
    end; a gate driven to 0 or 1; an A that makes every row zero; equal texts with one label, mixed
    with themselves, a prompt of one vector; inner rates from 1e-4 to 1e3: two steps are finite, and
    so is their log."""
    method, n = Method(steps=9, **options), 1 + (case != "equal")
    t5, state = small_state(method, P=n)
    pairs, head = [(random_task(1, n), random_task(2, n))], t5.weights["lm_head.weight"]
    if case == "flat":
        head.zero_()
    elif case == "certain":
        head.zero_()[7] = 1e4 * torch.sign(t5.weights["decoder.final_layer_norm.weight"])
    elif case == "tiny":
        head.mul_(1e-25)
    elif case == "equal":
        one = random_examples(1, 0)
        same = one._replace(ids=one.ids * 5, slots=[[]] * 5, vectors=torch.zeros(5, 0, 8),
                            labels=one.labels.expand(5).clone())
        pairs = [(data.Task("sp-next", (0,), same, same),) * 2]
    elif case == "A 0":
        state.phi["A"].zero_()
    elif case.startswith("rate"):
        method = replace(method, inner_rate=float(case[5:]))
    else:
        state.phi["c"].fill_(1e4 if case == "gate 1" else -1e4)
    for _ in range(2):
        log = supmer.meta_step(t5, state, pairs, method, 0)
        assert all(math.isfinite(x) for x in log.values() if type(x) is float), log
        assert all(x.isfinite().all() for x in (state.theta, *state.phi.values()))
    if case in ("flat", "certain"):
        assert log["second_order"] == log["theta_gradient"] == 0
    if case.startswith("gate"):
        assert log["gate_mean"] == float(case[-1])


# -------------------------------------------------------------------------- data: tokens, templates

def test_fill_template_by_hand():
    """Vectors hold their places, </s> is last, the longest texts are cut to one length, short ones
    stay whole."""
    parts = ["0", [5], "1", [6], "2", [7, 8]]
    short, mixed = {"0": [10, 11], "1": [12], "2": [13]}, {"0": [10, 11], "1": None, "2": None}
    assert fill_template(parts, short) == ([10, 11, 5, 12, 6, 13, 7, 8, 1], [])
    assert fill_template(parts, mixed) == ([10, 11, 5, 2, 6, 2, 7, 8, 1], [3, 5])
    long = {"0": [10] * 50, "1": [11] * 2, "2": [12] * 40}
    cut = [10, 10, 10, 5, 11, 11, 6, 12, 12, 12, 7, 8, 1]
    assert fill_template(parts, long, 13) == fill_template(parts, long, 14) == (cut, [])
    with pytest.raises(InputError, match="shorten it"):
        fill_template(parts, long, 7)


def test_truncation_keeps_the_template_and_as_much_text_as_fits():
    """200 random templates: never over the limit; each text keeps its beginning; one more token for
    the texts that were cut would not fit."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        lengths, limit = rng.integers(0, 61, rng.integers(1, 6)).tolist(), int(rng.integers(16, 81))
        parts = [part for i in range(len(lengths)) for part in (str(i), [100 + i])] + [[99]]
        ids, _ = fill_template(parts, {str(i): [10 + i] * n for i, n in enumerate(lengths)}, limit)
        kept = [ids.count(10 + i) for i in range(len(lengths))]
        cap, fixed = max(kept), 2 + len(lengths)
        assert [i for i in ids if i >= 99] == [100 + i for i in range(len(lengths))] + [99]
        assert len(ids) <= limit and kept == [min(n, cap) for n in lengths]
        assert kept == lengths or sum(min(n, cap + 1) for n in lengths) > limit - fixed


def test_text_cannot_put_in_markers(tmp_path):
    """A corpus or a review that contains `<extra_id_0>` or `</s>` adds no second mask and no early
    end. A template has one mask, and a label word that is <unk> or empty cannot be scored."""
    _, tokenizer = write_model(tmp_path, ["a", "b", "It", "was", "?"])
    task = tasks.LabeledTask("", "", words=("a", "b"))
    rows = [tasks.Row(0, {"text": "a <extra_id_0> b </s> a <pad>"})]
    examples = tasks.task_examples(tokenizer, task, rows)
    source, target = templates.examples_as_text(tokenizer, examples, 0)
    assert (source, target) == ("a b a It was <extra_id_0> ?</s>", "a")
    a, b = templates.tokenize(tokenizer, ["a", "b"])
    assert templates.tokenize(tokenizer, ["a unseen b"]) == [[*a, templates.UNK, *b]]
    for template in ("{text} a", "<X> {text} <X>"):
        with pytest.raises(InputError, match="exactly once"):
            templates.compile_template(tokenizer, template)
    for word in ("unseen", ""):
        with pytest.raises(InputError, match=f"{word!r} is not in the model's vocabulary"):
            templates.decoder_targets(tokenizer, ["a", word])


def test_tokenizers_that_do_not_fit_the_model_are_refused(tmp_path):
    """Missing, broken, of another size in either direction, without sentinels, with other special
    ids."""
    def refused(says, vocab_size=13):
        with pytest.raises(InputError, match=says):
            templates.load_tokenizer(tmp_path, SimpleNamespace(vocab_size=vocab_size))
    refused("is missing")
    path = write_model(tmp_path, [])[0] / "tokenizer.json"
    good = path.read_text()
    for vocab_size in (12, 141, 32128):
        refused(f"13 pieces for {vocab_size:,} embeddings", vocab_size)
    for broken in (good[:-20], "{}", "[]", "text"):
        path.write_text(broken)
        refused("is not the tokenizer of this T5")
    for old, new in (("<extra_id_0>", "<mask>"), ("</s>", "<eos>"), ("<pad>", "[PAD]")):
        path.write_text(good.replace(old, new))
        refused("<pad>, </s>, <unk>, <extra_id_0> are")


def test_collate_by_hand():
    """Chosen rows, in the given order, padded to the longest of them; targets are one-hot over the
    words."""
    vectors = torch.arange(12.0).reshape(3, 2, 2)
    examples = data.Examples([[7, 2, 2, 1], [7, 8, 2, 2, 9, 1], [2, 2, 1]],
                             [[1, 2], [2, 3], [0, 1]], vectors,
                             torch.tensor([0, 2, 1]), [[5, 6], [5, 7], [5, 8]])
    batch = data.collate(examples, [2, 0])
    assert batch.ids.tolist() == [[2, 2, 1, 0], [7, 2, 2, 1]] and batch.ids.dtype == torch.long
    assert batch.mask.tolist() == [[True, True, True, False], [True] * 4]
    assert batch.slots.tolist() == [[0, 1], [1, 2]] and torch.equal(batch.vectors, vectors[[2, 0]])
    assert batch.targets.tolist() == [[0, 1, 0], [1, 0, 0]]


@needs_data
def test_ids_equal_those_of_transformers():
    """1,000 sources from real sentences with the official tokenizer: ids put together from parts
    equal what transformers gives for the whole string, sentinel and </s> included; and the label
    words are single, word-initial pieces."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = Path(SUPMER_DATA) / "t5_tokenizer"
    tokenizer = templates.load_tokenizer(folder, SimpleNamespace(vocab_size=32128))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"),
                                                  eos_token="</s>")
    files = sorted((Path(SUPMER_DATA) / "text").glob("*.jsonl.gz"))
    paragraphs = (p for file in files for d in islice(corpus.documents(file), 50) for p in d)
    texts = [s for paragraph in paragraphs for s in corpus.split_sentences(paragraph)]
    texts = np.random.default_rng(0).choice(texts, 2000, replace=False).tolist()
    encoded = templates.tokenize(tokenizer, texts)
    for i in range(1000):
        template, use = (data.PAIR, 2) if i % 2 else (data.CHOICE, 5)
        rows = [i, *np.random.default_rng(i).choice(2000, use - 1, replace=False)]
        joined = template.replace("<X>", MASK).format(*(texts[r] for r in rows))
        ours, _ = fill_template(templates.compile_template(tokenizer, template),
                                dict(zip("01234", (encoded[r] for r in rows))), max_tokens=10**6)
        assert ours == theirs(joined).input_ids, joined
    targets = templates.decoder_targets(tokenizer, ["yes", "no", "maybe", *"ABCD"])
    assert targets == [[32099, piece] for piece in (4273, 150, 2087, 71, 272, 205, 309)]
    assert templates.tokenize(tokenizer, ["translate English to German: That is good."]) == \
        [[13959, 1566, 12, 2968, 10, 466, 19, 207, 5]]


# --------------------------------------------------------------------------------- data: meta tasks

# Section 3.2 by hand: what stands beside the anchor, by label. Where a label is a letter, the first
# stands at it. Entries of data.VARIANTS that are not here are held against themselves.
BESIDE = {"sp-next": (("next",), ("far",), ("near",)), "sp-cluster": (("same",), ("other",)),
          "mc-next": (("next", "near", "far", "far"),) * 4,
          "mc-cluster": (("same", "other", "other", "other"),) * 4,
          "ss-cluster": ((),) * 4, "hidden": ((),) * 2}


def holds(relation, a, b):
    """Is b in this relation to a, by what is written in both (topic, document, number)?"""
    step = b[2] - a[2] if a[1] == b[1] else None
    return {"next": step == 1, "near": step is not None and abs(step) > 1, "far": step is None,
            "same": a[0] == b[0] and a != b, "other": a[0] != b[0]}[relation]


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_says_what_the_corpus_says(planted, variant):
    """Eq. 17-19 and section 3.2: over five tasks each source has the template's exact form, and its
    label is what the sentences' places in the planted corpus (read off the text) make it."""
    tokenizer, store, index = planted
    topic_of = {int(c): (7 * (i // 40) + i % 40) % 5 for i, c in enumerate(store.cluster[0])}
    entry = VARIANTS[variant]
    form = re.escape(entry.template.replace("<X>", MASK)) + "</s>"
    for field in templates.template_fields(entry.template):
        vector = entry.centroids and field != "0"
        text = r"\[centroid \d+\]" if vector else r"T\d d\d+ s\d+ end\."
        form = form.replace(rf"\{{{field}\}}", text)
    beside = BESIDE.get(variant, entry.beside)
    for step in range(5):
        task = meta_task(index, 0, step, 0, variant=variant)
        for examples, row in product((task.support, task.query), range(32)):
            text, answer = templates.examples_as_text(tokenizer, examples, row, task.clusters)
            assert re.fullmatch(form.replace(r"\ ", " "), text), (form, text)
            label, (anchor, *others) = entry.words.index(answer), parsed(text)
            assert topic_of[task.clusters[label if entry.ways > 1 else 0]] == anchor[0]
            if entry.choice:
                others = [others.pop(label), *others]
            assert any(all(map(holds, beside[label], repeat(anchor), (*others[:1], *order)))
                       for order in permutations(others[1:])), text
            assert len({anchor, *others}) == 1 + len(others) == 1 + len(beside[label])


LITERAL = {     # of the first task: the first support example
    "sp-next": ("T1 d255 s31 end. <extra_id_0> . T4 d255 s9 end.</s>", "maybe"),
    "sp-cluster": ("T1 d263 s5 end. <extra_id_0> . T4 d18 s38 end.</s>", "no"),
    "mc-next": ("T1 d255 s31 end. ? A. T4 d255 s9 end. B. T4 d65 s29 end. C. T0 d69 s7 end. "
                "D. T2 d255 s32 end. . Answer: <extra_id_0></s>", "D"),
    "mc-cluster": ("T1 d263 s5 end. ? A. T0 d276 s23 end. B. T3 d113 s32 end. C. T4 d3 s33 end. "
                   "D. T1 d74 s33 end. . Answer: <extra_id_0></s>", "D"),
    "ss-cluster": ("T0 d60 s30 end. ? A. [centroid 3] B. [centroid 4] C. [centroid 2] "
                   "D. [centroid 0] . Answer: <extra_id_0></s>", "D"),
    "hidden": ("T2 d262 s23 end. <extra_id_0> .</s>", "no")}


@pytest.mark.parametrize("variant, literal", LITERAL.items())
def test_each_variant_literally(planted, variant, literal):
    """A whole string of each out of the planted corpus, to be checked by eye: topic, document,
    place. It also holds the random streams fast: a result is a function of the seed."""
    tokenizer, _, index = planted
    task = meta_task(index, 0, 0, 0, variant=variant)
    assert templates.examples_as_text(tokenizer, task.support, 0, task.clusters) == literal


def test_centroids_stand_at_the_letters(planted):
    """ss: four slots, each right after its letter, holding this task's centroids unscaled, shown by
    their cluster."""
    tokenizer, store, index = planted
    task = meta_task(index, 0, 3, 0, variant="ss-cluster")
    letters = [tokenizer.token_to_id(letter) for letter in ("A.", "B.", "C.", "D.")]
    for examples in (task.support, task.query):
        centroids = torch.from_numpy(store.centroids[2][list(task.clusters)])
        assert torch.equal(examples.vectors, centroids.expand(32, 4, 5))
        for ids, slots in zip(examples.ids, examples.slots):
            assert [ids[slot - 1] for slot in slots] == letters
            assert [ids[slot] for slot in slots] == [templates.UNK] * 4
    source, _ = templates.examples_as_text(tokenizer, task.support, 0, task.clusters)
    assert [int(c) for c in re.findall(r"\[centroid (\d)\]", source)] == list(task.clusters)


def test_tasks_are_balanced_and_honest(planted):
    """Over 60 tasks of both splits: labels balanced within one in each set, their order and the
    extra one random; support and query share no anchor; as many topics of anchors as the variant
    has ways; training tasks hold no held-out document, validation tasks no other; all variants come
    up alike."""
    tokenizer, store, index = planted
    document_of = {tokenizer.token_to_id(f"d{d}"): d for d in range(280)}
    held_out, mask = set(held_out_documents(store)), tokenizer.token_to_id(MASK)
    first_labels, extras = {}, Counter()
    for step in range(60):
        split = "validation" if step % 5 == 0 else "train"
        task = meta_task(index, 7, step, step % 4, split=split)
        entry = VARIANTS[task.variant]
        for examples in (task.support, task.query):
            counts = np.bincount(examples.labels, minlength=len(entry.words))
            assert len(examples.words) == len(counts) == len(entry.words)
            assert counts.sum() == 32 and counts.max() - counts.min() <= 1
            first_labels.setdefault(task.variant, []).extend(examples.labels[:8].tolist())
            extras[task.variant, int(counts.argmin())] += 1
            shown = {document_of[id] for ids in examples.ids for id in ids if id in document_of}
            assert shown <= held_out if split == "validation" else not shown & held_out
            assert all(ids.count(mask) == 1 for ids in examples.ids)
        anchors = [tuple(ids[:4]) for ids in task.support.ids + task.query.ids]
        assert len(set(anchors)) == 64
        assert len({anchor[0] for anchor in anchors}) == len(set(task.clusters)) == entry.ways
    assert len(first_labels) == len(VARIANTS)
    for found in first_labels.values():                     # 16 a task, of 10 tasks each
        assert 4 * 16 < len(found) < 18 * 16
        assert max(Counter(found).values()) < 1.8 * min(Counter(found).values())
    assert min(extras["sp-next", k] for k in range(3)) > 0.2 * extras.total() / len(VARIANTS) / 3


def test_hidden_classes_can_only_be_known_from_the_support_set(planted):
    """Which of two random clusters is "yes" is drawn anew for each task: over 200 tasks each of
    the 20 ordered pairs of five comes up. Sources hold the anchor alone, and a set has as many of
    each. It is off by default."""
    tokenizer, store, _ = planted
    assert "hidden" not in (*TaskIndex(store, tokenizer).variants, *train.Training().variants)
    assert train.parse(["--variants", "hidden", "sp-next"])[0].variants == ("hidden", "sp-next")
    index = TaskIndex(store, tokenizer, variants=("hidden",), support=4, query=4)
    pairs, ending = Counter(), [tokenizer.token_to_id(piece) for piece in (MASK, ".", "</s>")]
    for step in range(200):
        task = meta_task(index, 0, step, 0)
        pairs[task.clusters] += 1
        for examples in (task.support, task.query):
            assert examples.slots == [[]] * 4 and examples.labels.sum() == 2
            assert all(len(ids) == 7 and ids[4:] == ending for ids in examples.ids)
            said = {(label, ids[0]) for label, ids in zip(examples.labels.tolist(), examples.ids)}
            assert len(said) == 2
    assert len(pairs) == 20 and max(pairs.values()) < 25


def test_a_variant_is_one_entry(planted, monkeypatch):
    """A new entry, whose second label has nothing beside the anchor: only followed anchors serve
    it, and its sources are what the entry says."""
    tokenizer, store, _ = planted
    entry = data.Variant("sp", "{0} <X> . {1}", ("yes", "no"), (("next",), ()))
    monkeypatch.setitem(VARIANTS, "new", entry)
    index = TaskIndex(store, tokenizer, variants=("new",))
    assert entry.followed and index.pools["train", "sp"].counts(entry).sum() == 270 * 39
    for ids, label in zip(*meta_task(index, 0, 0, 0).support[:4:3]):
        anchor, *others = parsed(tokenizer.decode(ids))
        assert len(others) == (label == 0) and anchor[2] < 39
        assert not others or holds("next", anchor, others[0])


def test_a_task_is_a_pure_function_of_its_arguments(planted):
    """Whatever was drawn before, and for a variant drawn or given; any other number and any other
    stream gives another task."""
    tokenizer, store, index = planted
    task = meta_task(index, 1, 2, 3)
    np.random.seed(0)
    fresh = TaskIndex(store, tokenizer, variants=index.variants)
    for other in (meta_task(index, 1, 2, 3), meta_task(fresh, 1, 2, 3, variant=task.variant)):
        assert other.support.ids == task.support.ids and other.query.ids == task.query.ids
        assert torch.equal(other.query.labels, task.query.labels)
    for *numbers, stream in ((0, 2, 3, "task"), (1, 1, 3, "task"), (1, 2, 2, "task"),
                             (1, 2, 3, "partner"), (1, 2, 3, "validation")):
        other = meta_task(index, *numbers, stream=stream, variant=task.variant)
        assert other.support.ids != task.support.ids


def test_an_index_does_not_grow_with_the_sentences(planted):
    """What it holds beside the mapped store is under 30 bytes a document."""
    _, store, index = planted
    own = [index.first, *(x for pair in index.documents.values() for x in pair),
           *(x for pool in index.pools.values() for x in (pool.start, pool.followed))]
    assert all(np.may_share_memory(x.order, store.order) for x in index.pools.values())
    assert set(vars(index)) == {"first", "documents", "pools", "usable", "store", "sizes",
                                "max_tokens", "variants", "table", "parts", "words"}
    assert sum(x.nbytes for x in own) < 30 * 280


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_partner_is_another_task(planted, variant):
    """avoid: never the same anchor clusters again, unless in another order. Variants, sizes and the
    longest source are what the index was asked for, and cut sources keep their whole template."""
    tokenizer, store, _ = planted
    index = TaskIndex(store, tokenizer, support=4, query=6, variants=(variant,), max_tokens=17,
                      mixing=True)
    wanted = re.sub(r"\{\d\} ?", "", VARIANTS[variant].template).replace("<X>", MASK).split()
    reordered = 0
    for step in range(20):
        task = meta_task(index, 0, step, 0)
        partner = meta_task(index, 0, step, 0, stream="partner", avoid=task.clusters)
        assert task.variant == partner.variant == variant and partner.clusters != task.clusters
        reordered += set(partner.clusters) == set(task.clusters)
        assert (len(task.support.ids), len(task.query.ids)) == (4, 6)
        for ids in task.query.ids:
            pieces = [tokenizer.id_to_token(id) for id in ids]
            literal = [x for x in pieces if not re.fullmatch(r"[Tds]\d+|end\.|<unk>", x)]
            assert literal == [*wanted, "</s>"] and len(ids) <= 17
    assert reordered or VARIANTS[variant].ways < 4


def reclustered(store, cluster, K):
    """A store with other clusters, of which it is not said where they came from."""
    order, bounds = corpus.group_anchors(cluster[0], store.held_out, store.anchor,
                                                store.first, K)
    return store._replace(cluster=cluster, centroids=np.zeros((3, K, 5), np.float32),
                          order=np.stack([order] * 3), bounds=np.stack([bounds] * 3))


def test_anchors_are_grouped_by_split_cluster_and_use():
    """group_anchors is what its docstring says, sentence by sentence: among them some of short
    documents, and some that are no anchors."""
    rng, K = np.random.default_rng(0), 5
    lengths = rng.integers(1, 9, 60)
    first, n = np.cumsum([0, *lengths[:-1]]), lengths.sum()
    cluster, anchor = rng.integers(0, K, n, dtype=np.int32), rng.random(n) < 0.8
    held_out = np.repeat(rng.random(60) < 0.3, lengths)
    expected = [[] for _ in range(4 * K)]
    for begin, length in zip(first, lengths):
        for i in begin + np.flatnonzero(anchor[begin:begin + length]):
            alone = length < 4 or i == begin + length - 1
            expected[2 * (K * held_out[i] + cluster[i]) + alone].append(i)
    order, bounds = corpus.group_anchors(cluster, held_out, anchor, first, K)
    assert order.dtype == np.uint32 and len(bounds) == 4 * K + 1
    assert [order[a:b].tolist() for a, b in zip(bounds, bounds[1:])] == expected


def test_small_clusters_are_skipped(planted):
    """A cluster of 63 anchors is never drawn for tasks of 32 + 32, one of 64 is."""
    tokenizer, store, _ = planted
    cluster, training = store.cluster.copy(), np.flatnonzero(~store.held_out)
    cluster[:, training[:63]], cluster[:, training[63:127]] = 5, 6
    index = TaskIndex(reclustered(store, cluster, 7), tokenizer,
                      variants=("mc-cluster", "ss-cluster"))
    drawn = {c for step in range(60) for c in meta_task(index, 0, step, 0).clusters}
    assert drawn == {0, 1, 2, 3, 4, 6}


def test_the_largest_number_of_clusters_that_fits():
    """Sizes are inverse to the number: where 6 clusters that are not empty have up to 9, 5 have up
    to 10. The least of all variants and splits is printed, or that none fits and what is missing:
    no message asks for fewer clusters and the next one for more."""
    def says(wanted, least, **found):
        with pytest.raises(InputError) as caught:
            data.check_clusters("--clusters", wanted, least, found)
        return str(caught.value)
    counts = np.array([9, 0, 1, 7, 2, 4, 5])
    for wanted, ways in ((9, 1), (7, 2), (1, 6)):
        data.check_clusters("--clusters", wanted, 1, {"x": (counts, ways)})
    assert says(10, 1, x=(counts, 1)) == ("x: 1 cluster(s) must have 10, the largest have 9: "
                                          "--clusters 5 is the largest number that fits")
    assert says(10, 1, x=(counts, 1), y=(counts, 2)).endswith("--clusters 4 is the largest number "
                                                              "that fits")
    assert "no --clusters fits, it must be 6 or more: give 1.4 times as much text" in says(
        10, 6, x=(counts, 2))
    assert "give more text" in says(1, 2, x=(counts, 7)) and "give --clusters 8 or more" in says(
        1, 8, x=(counts, 1))


def test_too_few_sentences_for_the_tasks_are_named(planted, small_world):
    """The number of clusters that the message names does fit; where one cluster holds everything,
    or a partner needs a second one, more are asked for. train.py says so before the first step."""
    tokenizer, store, _ = planted
    finer = store.cluster + 5 * (np.arange(11200) % 8).astype(np.int32)         # 40 clusters
    with pytest.raises(InputError, match="sp-next: validation .* --clusters") as caught:
        TaskIndex(reclustered(store, finer, 40), tokenizer, variants=("sp-next",))
    fits = int(re.search(r"--clusters (\d+) is the largest", str(caught.value)).group(1))
    assert 5 <= fits < 20
    TaskIndex(reclustered(store, store.cluster + 5 * (np.arange(11200) % (fits // 5)).astype(
        np.int32), fits), tokenizer, variants=("sp-next",))
    one = reclustered(store, np.zeros_like(store.cluster), 1)
    TaskIndex(one, tokenizer, variants=("sp-next",))
    for variant, mixing, least in (("mc-cluster", False, 2), ("sp-next", True, 2),
                                   ("ss-cluster", False, 4), ("hidden", False, 2)):
        with pytest.raises(InputError, match=f"give --clusters {least} or more"):
            TaskIndex(one, tokenizer, variants=(variant,), mixing=mixing)
    alone = reclustered(store, np.zeros_like(store.cluster), 2)
    with pytest.raises(InputError, match="mc-cluster: train .* no --clusters fits.* more text"):
        TaskIndex(alone, tokenizer, variants=("mc-cluster",))
    with pytest.raises(InputError, match="give --clusters 4 or more"):
        make_run(small_world, "unmixed", clusters=1)


def test_an_anchor_that_cannot_serve_a_label_serves_another(planted):
    """One that reads like the sentence after it is no "yes", but it is kept for a "no"; where all
    that can stand beside an anchor reads like it, drawing stops with an InputError."""
    tokenizer, store, _ = planted
    bad, good = np.flatnonzero(~store.held_out)[[0, 2]].tolist()
    tokens = store.tokens.copy()
    tokens[store.offsets[bad + 1]:store.offsets[bad + 2]] = store.sentence(bad)
    index = TaskIndex(store._replace(tokens=tokens), tokenizer, variants=("sp-next",))
    draw = data.Draw(index, np.random.default_rng(0), "sp-next", "train", (0,))
    draw.anchors = [iter([bad, good])]
    assert draw.sentences(0) == [good, good + 1] and draw.sentences(1)[0] == bad
    same = store._replace(tokens=np.full(len(store.tokens), 5, dtype=np.uint16))
    index = TaskIndex(same, tokenizer, variants=("sp-next",))
    with pytest.raises(InputError, match="too few different sentences"):
        meta_task(index, 0, 0, 0)


# ------------------------------------------------------ each equation of the paper has its function

EQUATIONS = {   # its function; what it gives is proved above: by hand, by differences, literally
    "Eq. 1": supmer.loss_share, "Eq. 2": supmer.inner_step, "Eq. 3": supmer.meta_step,
    "Eq. 4": supmer.mix, "Eq. 5": supmer.regularize, "Eq. 6": supmer.inner_step,
    "Eq. 7": supmer.meta_step, "Eq. 8": supmer.meta_gradient, "Eq. 10": supmer.curriculum,
    "Eq. 16": km.kmeans, "Eq. 17": data.meta_task, "Eq. 18": data.meta_task,
    "Eq. 19": data.meta_task, "Eq. 20": supmer.meta_gradient, "Alg. 1": supmer.meta_step,
    "Alg. 2": supmer.draw_lambda}


@pytest.mark.parametrize("name", EQUATIONS)
def test_each_equation_has_its_function(name):
    """The function that computes an equation or algorithm names it."""
    kind, number = name.split()
    source = inspect.getsource(EQUATIONS[name])
    named = re.findall(rf"{re.escape(kind)} ((?:\d|-|, | and )+)", source)
    spans = [part.split("-") for found in named for part in re.findall(r"[\d-]+", found)]
    assert any(int(span[0]) <= int(number) <= int(span[-1]) for span in spans)


def test_analysis_of_equations_9_and_15(world):
    """Eq. 9: L_q(theta') = L_q(theta) - a1 <grad L_q, psi(g)>; Eq. 15: its gradients are the exact
    ones. Both up to O(a1^2): with half of a1 a quarter of the error is left."""
    w, grad = changed(world, lam=0.0), torch.func.grad
    _, pooled, start = supmer.prompt_gradient(w.t5, w.theta, w.task.support, w.method)
    query = partial(plain_loss, w.t5, examples=w.task.query, method=w.method)

    def product(theta, phi):
        g = grad(lambda theta: plain_loss(w.t5, theta, w.task.support, w.method))(theta)
        return (grad(query)(theta) * supmer.regularize(phi, g, pooled)).sum()
    d_theta, d_phi = grad(product, argnums=(0, 1))(w.theta, w.phi)
    start, errors = grad(query)(w.theta), []
    for rate in (0.01, 0.005):
        method = Method(inner_rate=rate, gate_weight=0.0)
        exact, loss = computed(w, method), meta_loss(w, w.theta, w.phi, method)
        errors.append([abs(loss - query(w.theta) + rate * product(w.theta, w.phi)),
                       (exact["theta"] - start + rate * d_theta).norm(),
                       *((exact[name] + rate * d_phi[name]).norm() for name in w.phi)])
    assert [float(a / b) for a, b in zip(*errors)] == pytest.approx([4] * 6, rel=0.02)


# ------------------------------------------------------------------ the protocol: worked by hand

def test_tuning_step_by_hand():
    """Three tuning steps equal AdamW, written out here, on the clipped psi(g) of each batch, with
    psi's H from that batch and a rate that falls linearly; the gradient here is autograd's, example
    by example."""
    t5, generator = small_t5(torch.float64), torch.Generator().manual_seed(2)
    start = torch.randn(3, 16, generator=generator, dtype=torch.float64)
    phi = {key: value + 0.3 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
           for key, value in affine_start(16, torch.float64).items()}
    train, rate, steps = small_examples(6), 0.2, 3
    curve, thetas = tune(t5, start, partial(supmer.regularize, phi), (train, small_examples(4, 9)),
                         10, rate, eval_settings(epochs=1, batch=2, validate_every=1))
    theta, m, v, clipped = start.clone(), 0.0, 0.0, 0
    for step in range(steps):
        leaf, losses, states = theta.clone().requires_grad_(), [], []
        for row in evaluation.batch_rows(6, step, 10, 2):
            H, mask = supmer.encode_with_prompt(t5, leaf, data.collate(train, [row]))
            y = T.decode(t5, torch.tensor([[0, train.words[0][0]]]), H, mask)[0, 1]
            log_p = torch.log_softmax(T.next_token_logits(t5, y), -1)
            losses.append(-log_p[train.words[int(train.labels[row])][1]])
            states.append(H[0].mean(0))
        g, = torch.autograd.grad(sum(losses) / 2, leaf)
        psi = supmer.regularize(phi, g, (sum(states) / 2).detach())
        clipped += psi.norm() > 1
        psi = psi * min(1.0, 1.0 / (float(psi.norm()) + 1e-6))
        m, v = 0.9 * m + 0.1 * psi, 0.999 * v + 0.001 * psi**2
        unbiased, square = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
        theta = theta - rate * (1 - step / steps) * unbiased / (square.sqrt() + 1e-8)
    assert [entry["step"] for entry in curve] == [0, 1, 2, 3] and torch.equal(thetas[0], start)
    assert clipped == 3
    assert torch.allclose(thetas[3], theta, rtol=1e-9, atol=1e-9) and not torch.equal(theta, start)
    cosine = float(F.cosine_similarity(psi.flatten(), g.flatten(), dim=0))
    assert curve[0]["psi_cosine"] is None and curve[3]["psi_cosine"] == pytest.approx(cosine)
    unit = tune(t5, start, None, (train, train), 10, 0.4, eval_settings(), 0.5)
    assert torch.equal(unit[1], tune(t5, start, None, (train, train), 10, 0.2, eval_settings())[1])


@pytest.mark.parametrize("values, chosen", [
    ([(2, 1.0), (3, 1.0), (3, 0.5), (3, 0.5), (1, 0.1)], 4),    # accuracy, loss, the earlier step
    ([(3, 1.0), (3, 1.0), (2, 0.1), (3, 1.0), (3, 1.0)], 0),    # step 0 counts, and wins ties
    ([(0, 1.0), (1, 9.0), (1, 9.0), (2, 9.0), (2, 8.0)], 8)])
def test_step_is_chosen_by_hand(monkeypatch, values, chosen):
    """Of the validations at steps 0, 2, 4, 6, 8 the one of highest accuracy is chosen; ties go to
    the lower loss, then to the earlier step. What is kept is the prompt that was measured."""
    measured, original, values_left = [], evaluation.score, iter(values)
    monkeypatch.setattr(evaluation, "score", lambda t5, theta, *rest: (
        measured.append(theta.clone()), original(t5, theta, *rest))[1])
    monkeypatch.setattr(evaluation, "measure", lambda scores, labels: dict(
        zip(("correct", "loss", "word_loss"), [*next(values_left), 99.0])))
    start = partial(baselines.given_prompt, theta=torch.ones(3, 16))
    tensors, about = evaluation.tune_job(
        small_t5(), "learned", start, None, (small_examples(4), small_examples(4, 1)), 10, 0.1,
        evaluation.Tuning(8, 4, 2, False), 1.0, False, {})
    curve = about["validations"]
    assert [entry["step"] for entry in curve] == [0, 2, 4, 6, 8]
    assert [entry["accuracy"] for entry in curve] == [25 * correct for correct, _ in values]
    assert torch.equal(tensors["theta"], measured[chosen // 2])
    assert min(curve, key=evaluation.preference)["step"] == chosen


def test_rate_is_chosen_by_hand():
    """Between rates: accuracy, loss, earlier step, and only then the smaller rate."""
    order = [dict(zip(("accuracy", "loss", "step", "rate"), values)) for values in (
        (90.0, 2.0, 50, 0.3), (80.0, 1.0, 20, 0.3), (80.0, 1.5, 10, 0.2), (80.0, 1.5, 10, 0.3),
        (80.0, 1.5, 20, 0.1))]
    assert sorted(reversed(order), key=evaluation.preference) == order


def test_validation_loss_by_hand():
    """Log p of (1, 2) and (3, 1) nats for the label's word and the other one: a loss of 2 over the
    vocabulary, and log(1 + e^-1), log(1 + e^2) over the words alone; one of two is right."""
    scores, labels = torch.tensor([[-1.0, -2.0], [-3.0, -1.0]]), torch.tensor([0, 0])
    words = (math.log1p(math.exp(-1)) + math.log1p(math.exp(2))) / 2
    assert evaluation.loss_and_accuracy(scores, labels, False) == pytest.approx((2, 50))
    assert evaluation.loss_and_accuracy(scores, labels, True) == pytest.approx((words, 50))


def test_standard_deviation_is_the_samples():
    """Accuracies of 60, 70, 80 % have mean 70 and standard deviation 10 (n - 1), not 8.16."""
    assert [report.figure(x) for x in ([60.0, 70.0, 80.0], [60.0])] == ["70.0 ± 10.0", "60.0"]


# ------------------------------------------------------- the protocol: properties, determinism

def test_batches_are_a_pure_function():
    """Each epoch holds every row once, in batches of at most `size`; the same arguments give the
    same rows, another epoch or seed others."""
    epochs = [[evaluation.batch_rows(70, 3 * epoch + k, 10, 32) for k in range(3)]
              for epoch in range(2)]
    for epoch in epochs:
        assert [len(rows) for rows in epoch] == [32, 32, 6]
        assert sorted(sum(epoch, [])) == list(range(70))
    assert epochs[0] != epochs[1] and epochs[0][1] == evaluation.batch_rows(70, 1, 10, 32)
    assert evaluation.batch_rows(70, 1, 20, 32) != epochs[0][1]


def test_tuning_repeats_exactly():
    """The same start, sample, seed and rate give the same curve and the same prompt, bit for bit;
    start is unchanged; another seed gives another curve."""
    start, sample = torch.ones(3, 16), (small_examples(10), small_examples(6, 1))
    first, again, other = (tune(small_t5(), start, None, sample, seed, 0.1, eval_settings())
                           for seed in (10, 10, 20))
    assert first[0] == again[0] and torch.equal(first[1], again[1])
    assert torch.equal(start, torch.ones(3, 16)) and first[0] != other[0]


def test_identity_regularizer_is_plain_tuning():
    """A learned start whose psi is the identity is tuned exactly as the same start without psi;
    another psi is not."""
    t5, start = small_t5(torch.float64), torch.ones(3, 16, dtype=torch.float64)
    sample = small_examples(10), small_examples(6, 1)
    phi = affine_start(16, torch.float64)
    plain, identity, other = (
        np.array([entry["loss"] for entry in tune(t5, start, psi, sample, 10, 0.1,
                                                  eval_settings())[0]])
        for psi in (None, partial(supmer.regularize, phi),
                    partial(supmer.regularize, {**phi, "A": phi["A"].flip(0)})))
    assert np.allclose(plain, identity, rtol=1e-8) and not np.allclose(plain, other, rtol=1e-4)


def test_untuned_prompts():
    """random has the embedding table's deviation and vocab rows of the table; both differ from seed
    to seed and repeat."""
    t5, choices = small_t5(), eval_settings(prompt_length=2000, seeds=(10, 20))
    table, found = t5.weights["shared.weight"], {}
    for name in ("random", "vocab"):
        first, second, again, _ = (
            start(t5)["theta"] for _ in range(2)
            for start in open_candidate(name, t5.config, choices).starts)
        assert first.shape == (2000, 16) and first.dtype == torch.float32
        assert torch.equal(first, again) and not torch.equal(first, second)
        found[name] = first
    assert float(found["random"].std() / table.std()) == pytest.approx(1, abs=0.02)
    assert abs(float(found["random"].mean())) < 0.02
    assert ((found["vocab"][:, None] - table).abs().sum(-1) == 0).any(1).all()


def test_learns_a_planted_task():
    """16 examples per label of a planted task (which of two classes of words is in the sentence)
    teach a prompt of a frozen RANDOM T5 to classify new sentences; the untuned prompt is near
    chance."""
    t5, new = small_t5(seed=1), small_examples(200, 2)
    start = baselines.normal_prompt(t5, 10, 8)["theta"]
    curve, thetas = tune(t5, start, None, (small_examples(32), small_examples(32, 1)), 10, 0.1,
                         eval_settings(epochs=40, batch=32, words_only=True))
    best = curve.index(min(curve, key=evaluation.preference))
    before, after = (measure.measure(measure.score(t5, theta, new, Method()), new.labels)["correct"]
                     / 200 for theta in (start, thetas[best]))
    # 0.76 to 0.82 with the order of batches, or a last bit; 0.7 is chance and 5 standard errors
    assert before < 0.6 and after > 0.7 and best > 0


# --------------------------------------------------------------- the protocol: the sealed test set

@contextlib.contextmanager
def context(t5, choices):
    """A Context in this process, with no results from before."""
    shutil.rmtree(jobs.TUNED, ignore_errors=True)
    with jobs.workers(lambda device: t5, "cpu", 1) as (_, work):
        tokenizer = templates.load_tokenizer("small", t5.config)
        yield evaluation.Context(choices, t5.config, tokenizer, work, {"model": "this"}, 1.0)


def test_tuning_needs_no_test_file(place):
    """With the test file absent the tuning rows and what is kept are the same, bit by bit."""
    t5, choices = small_t5(), eval_settings(shots=(4,), seeds=(10,), rates=(0.1,))
    plan = Plan("planted", 4, TASKS["planted"], {}, "data")
    found = []
    for _ in range(2):
        with context(t5, choices) as c:
            samples = evaluation.draw_samples(c, plan)
            candidate = open_candidate("vocab", t5.config, choices)
            work = evaluation.tuning_jobs(c, plan, candidate, samples)
            c.work(work.values(), "tune")
            rows = evaluation.tuning_rows(c, plan, candidate, work, samples)
            best, = (row for row in rows if row["kind"] == "tuned")
            kept = evaluation.kept_of(best)[best["step"]]["theta"].tolist()
        found.append((rows, kept))
        Path("data/planted/test.csv").unlink(missing_ok=True)
    assert found[0] == found[1]


def test_test_labels_do_not_reach_tuning(place, monkeypatch):
    """With every label of the test file turned round, the tuning rows of a whole evaluation are the
    same, while the test accuracies become 100 % minus what they were. No file of the name is opened
    before the last tuning run has ended."""
    order, original, opened = [], evaluation.tune, open
    monkeypatch.setattr(evaluation, "tune", lambda *a: (order.append("tune"), original(*a))[1])

    def note(file, *rest, **how):
        if str(file).endswith("test.csv"):
            order.append("test file")
        return opened(file, *rest, **how)
    monkeypatch.setattr("builtins.open", note)
    monkeypatch.setattr("io.open", note)            # of pathlib
    for name, flip in (("one.json", False), ("two.json", True)):
        write_rows(place / "data/planted/test.csv", 40, 2, flip)
        shutil.rmtree(jobs.TUNED, ignore_errors=True)
        order.clear()
        evaluation.main([*SMALL, "--prompt", "vocab", "random", "--out", name])
        assert order[:8] == ["tune"] * 8 and set(order[8:]) == {"test file"}
    validations = [rows_of(name, split="validation") for name in ("one.json", "two.json")]
    assert validations[0] == validations[1]
    for prompt in ("vocab", "random"):
        one, two = (accuracies(name, prompt=prompt) for name in ("one.json", "two.json"))
        assert np.add(one, two) == pytest.approx([100, 100])


def test_sampled_texts_are_not_tested(place, capsys):
    """A test file that is the training file and one row more (a domain's pool): each seed is tested
    on the rows that it has not sampled, and how many were left out is printed."""
    train = Path("data/planted/train.csv").read_text()
    Path("data/planted/test.csv").write_text(train + "1,good film\n")
    evaluation.main([*SMALL, "--prompt", "vocab", "--rates", "0.1", "--predictions", "--out",
                     "out.json"])
    assert "[16, 16] test rows, by seed, are left out" in capsys.readouterr().out
    plan = Plan("planted", 4, TASKS["planted"], {}, "data")
    with context(small_t5(), eval_settings(seeds=(10, 20))) as c:
        samples = dict(zip((10, 20), evaluation.draw_samples(c, plan)))
    rows = load_test(TASKS["planted"], "data")
    tested = rows_of("out.json", prompt="vocab", split="test")
    for row in tested:
        sample = samples[row["seed"]]
        sampled = [one.fields for one in sample.train + sample.held_out]
        right = [a == b for a, b, one in zip(row["predictions"], row["labels"], rows, strict=True)
                 if one.fields not in sampled]
        assert len(right) == 45 and row["accuracy"] == pytest.approx(100 * np.mean(right))
    assert len(tested) == 4


# --------------------------------------------- a run is resumed and shared, and not a bit changes

@pytest.fixture(scope="module")
def unbroken(small_world):
    """The outcome of a run that was never stopped."""
    folder, options = small_world
    assert ended(start_train(folder, *options, "--run", "unbroken")) == 0
    return outcome_of(folder / "unbroken")


def steps_logged(run):
    log = run / "log.jsonl"
    return log.read_text().count('"query_loss"') if log.exists() else 0


def wait_for_steps(run, steps):
    deadline = time.monotonic() + 60
    while steps_logged(run) < steps:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_killed_run_resumes_bit_by_bit(small_world, unbroken):
    """Ctrl-C, --resume, kill -9, --resume: state, prompt and log equal an unbroken run's."""
    folder, options = small_world
    broken = folder / "broken"
    first = start_train(folder, *options, "--save-seconds", "0", "--run", "broken")
    wait_for_steps(broken, 1)
    os.kill(first, signal.SIGINT)
    assert ended(first) == 130
    assert "python train.py --resume broken" in (folder / "said").read_text()
    done = steps_logged(broken)
    second = start_train(folder, "--resume", "broken")
    wait_for_steps(broken, done + 1)
    os.kill(second, signal.SIGKILL)
    assert ended(second) == -signal.SIGKILL and done < 6, "too late to show anything"
    assert ended(start_train(folder, "--resume", "broken")) == 0
    assert outcome_of(broken) == unbroken


def test_a_rank_that_dies_ends_all_and_one_process_resumes(small_world, unbroken):
    """Two processes share a run's tasks. When one is killed the other says so and ends with status
    2; one process resumes, and the result equals that of one process alone."""
    folder, options = small_world
    shared, ranks = folder / "shared", []
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    for rank in ("0", "1"):
        names = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port,
                 "TORCHELASTIC_RUN_ID": "none", "RANK": rank, "LOCAL_RANK": rank}
        ranks.append(start_train(folder, *options, "--save-seconds", "0", "--run", "shared",
                                 before=partial(os.environ.update, names)))
    wait_for_steps(shared, 2)
    os.kill(ranks[1], signal.SIGKILL)
    assert [ended(pid) for pid in reversed(ranks)] == [-signal.SIGKILL, 2]
    assert "error: rank 0: another rank stopped" in (folder / "said").read_text()
    assert steps_logged(shared) < 6, "the kill came too late to show anything"
    assert ended(start_train(folder, "--resume", "shared")) == 0
    assert outcome_of(shared) == unbroken
