"""The evidence that this repository does what it says; each test's docstring is its claim.

    pytest                       # needs nothing but requirements.txt
    SUPMER_DATA=FOLDER pytest    # with transformers and scikit-learn installed: against them, too,
                                 # and on real data
"""

import ast
import contextlib
import copy
import csv
import doctest
import gzip
import hashlib
import http.server
import importlib
import inspect
import io
import json
import lzma
import math
import multiprocessing
import os
import pickle
import re
import resource
import runpy
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import threading
import time
import traceback
import urllib.parse
import zipfile
from collections import Counter
from dataclasses import asdict, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import bench
import data
import baselines
import eval as evaluation
import exercises
import kmeans as km
import supmer
import t5 as T
import tiny as maker
import train
from data import (MASK, TASKS, TaskIndex, VARIANTS, collate, documents, fill_template, hash_share,
                  load_test, load_tokenizer, meta_task, split_sentences, task_examples)
from supmer import Method
from t5 import EOS, InputError, PAD, load_t5, read_config
from tiny import grams, held_out, jargon_entries, make_tasks, read_records


try:
    import transformers
except ImportError:
    transformers = None
try:
    import peft
except ImportError:
    peft = None
try:
    import sklearn.cluster
except ImportError:
    sklearn = None

needs_transformers = pytest.mark.skipif(
    transformers is None, reason="transformers is not installed: pip install transformers")
needs_sklearn = pytest.mark.skipif(
    sklearn is None, reason="scikit-learn is not installed: pip install scikit-learn")
needs_data = pytest.mark.skipif(
    not os.environ.get("SUPMER_DATA"), reason="SUPMER_DATA does not name the folder of real data")

# A T5 that fits a screen, in both families. Inner width 2 x 4 is not d_model; 8 buckets up to 16.
V10 = T.T5Config(6, 4, 10, 2, 2, 2, 11, gated=False, tied=True, scaled=True, num_buckets=8,
                 max_distance=16, eps=1e-6)
V11 = V10._replace(gated=True, tied=False, scaled=False)
BOTH = pytest.mark.parametrize("config", [V10, V11], ids=["v1.0", "v1.1"])


def relative(a, b):
    """max|a - b| / max|b|, which is what every "relative" in this file means."""
    return ((a - b).abs().max() / b.abs().max()).item()


def formula(config):
    """Weights from no random generator: element i of all tensors, by sorted name, is 0.7 sin(1.3
    i^1.5), + 1 in norms."""
    weights, count = {}, 0
    for name, shape in sorted(T.expected_shapes(config).items()):
        i = np.arange(count, count + math.prod(shape), dtype=np.float64)
        values = torch.from_numpy(0.7 * np.sin(1.3 * i ** 1.5)).view(shape)
        weights[name] = values + 1 if "layer_norm" in name else values
        count += math.prod(shape)
    return weights


def model(config, dtype=torch.float64):
    """The T5 of these weights, without a file."""
    weights = {name: w.to(dtype) for name, w in formula(config).items()}
    return T.T5(config, {"lm_head.weight": weights["shared.weight"], **weights})


def batch(config):
    """Literal inputs: x (2, 24, d), mask (the second example has 9 positions), ids (2, 7)."""
    x = torch.sin(2.1 * torch.arange(2 * 24 * config.d_model, dtype=torch.float64) ** 1.5)
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[1, 9:] = False
    ids = torch.tensor([[0, 10, 3, 7, 1, 2, 9], [0, 5, 5, 8, 4, 6, 1]])
    return x.view(2, 24, config.d_model), mask, ids


def logits(t5, x, mask, ids):
    return T.next_token_logits(t5, T.decode(t5, ids, T.encode(t5, x, mask), mask))


# ----------------------------------------------------------------------------- against transformers

KINDS = {"v1.0": dict(feed_forward_proj="relu", num_heads=4, d_kv=16),
         "v1.1": dict(feed_forward_proj="gated-gelu", num_heads=4, d_kv=16),
         "3 heads x 24 for d 64": dict(feed_forward_proj="gated-gelu", num_heads=3, d_kv=24)}


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """A random model of transformers, and what load_t5 makes of the folder that it saves."""
    if transformers is None:
        pytest.skip("transformers is not installed: pip install transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=64, d_ff=96, num_layers=3, num_decoder_layers=2, vocab_size=120, dropout_rate=0.,
        tie_word_embeddings=request.param == "v1.0", **KINDS[request.param])
    theirs = transformers.T5ForConditionalGeneration(config).eval()
    if request.param != "v1.0":         # transformers 5 ties the head whatever the config says
        theirs.lm_head.weight = torch.nn.Parameter(torch.randn(120, 64) * 0.3)
    with torch.no_grad():
        for parameter in theirs.parameters():   # at 0.1 the float32 of both is 1.6e-5 off
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return theirs, T.load_t5(folder)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("prompt, text, target", [(0, 12, 2), (20, 15, 2), (100, 180, 150)])
def test_states_and_logits_equal_transformers(pair, prompt, text, target, padded):
    """Encoder states and logits equal transformers' within 1e-5 relative in float32, with and
    without padding and prompt vectors in front, below and beyond the 128 positions where the last
    bucket begins."""
    theirs, ours = pair
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 120, (3, text), generator=generator)
    mask = torch.ones(3, prompt + text, dtype=torch.bool)
    if padded:
        for row, kept in ((1, text // 2), (2, 1)):
            ids[row, kept:], mask[row, prompt + kept:] = T.PAD, False
    vectors = 3 * torch.randn(3, prompt, 64, generator=generator)
    x = torch.cat([vectors, T.embed_tokens(ours, ids)], dim=1)
    targets = torch.randint(2, 120, (3, target), generator=generator)
    targets[:, 0] = T.PAD
    source = dict(inputs_embeds=x) if prompt else dict(input_ids=ids)
    with torch.no_grad():
        reference = theirs(**source, attention_mask=mask.long(), decoder_input_ids=targets)
    H = T.encode(ours, x, mask)
    assert relative(H[mask], reference.encoder_last_hidden_state[mask]) < 1e-5
    assert relative(logits(ours, x, mask, targets), reference.logits) < 1e-5


def test_bfloat16_is_nearer_than_transformers(pair):
    """In bfloat16 our logits are nearer to the float32 model's than those of transformers, whose
    residual stream is bfloat16 too, and within 5 % of them."""
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


@torch.no_grad()
def greedy(t5, memory, mask, length):
    """The likeliest token, one after the other: memory (B, S, d), mask (B, S) -> ids (B, length).
    After </s> comes PAD."""
    ids = torch.full((len(memory), 1), T.PAD, device=memory.device)
    for _ in range(length):
        best = T.next_token_logits(t5, T.decode(t5, ids, memory, mask)[:, -1]).argmax(-1)
        ended = (ids == T.EOS).any(1)
        ids = torch.cat([ids, torch.where(ended, T.PAD, best)[:, None]], dim=1)
    return ids[:, 1:]


def test_greedy_decoding_equals_transformers(pair):
    """The likeliest tokens of 50 texts, 12 each, are those of transformers' generate; they differ
    from text to text."""
    theirs, ours = pair
    ids = torch.randint(2, 120, (50, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids).bool()
    out = greedy(ours, T.encode(ours, T.embed_tokens(ours, ids), mask), mask, 12)
    reference = theirs.generate(input_ids=ids, attention_mask=mask.long(), do_sample=False,
                                num_beams=1, max_new_tokens=12, decoder_start_token_id=T.PAD,
                                eos_token_id=T.EOS, pad_token_id=T.PAD)[:, 1:]
    assert torch.equal(out[:, :reference.shape[1]], reference) and len(out.unique(dim=0)) > 3
    assert (out[:, reference.shape[1]:] == T.PAD).all()


# d_model, d_kv, d_ff, heads, feed-forward of the official models; two layers, a small vocabulary
OFFICIAL = {"t5-small": (512, 64, 2048, 8, "relu"), "t5-base": (768, 64, 3072, 12, "relu"),
            "t5-large": (1024, 64, 4096, 16, "relu"),
            "t5-v1_1-base": (768, 64, 2048, 12, "gated-gelu"),
            "flan-t5-xl": (2048, 64, 5120, 32, "gated-gelu")}


@needs_transformers
@pytest.mark.parametrize("name", OFFICIAL)
def test_official_shapes_equal_transformers(name, tmp_path):
    """Every official shape, cut to two layers, as transformers saves it, in float32 shards and in
    one bfloat16 file: encoder states, logits and the gradient of a loss with respect to the prompt
    are transformers' to 1e-5 relative, and the likeliest tokens behind 50 prompts are the same."""
    d, d_kv, d_ff, heads, form = OFFICIAL[name]
    torch.manual_seed(0)
    theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(
        d_model=d, d_kv=d_kv, d_ff=d_ff, num_heads=heads, num_layers=2, vocab_size=256,
        feed_forward_proj=form, tie_word_embeddings=form == "relu", dropout_rate=0.)).eval()
    if form != "relu":                  # transformers 5 ties the head whatever the config says
        theirs.lm_head.weight = torch.nn.Parameter(torch.randn(256, d) * d ** -0.5)
    else:                               # with its 1.0 every token is followed by itself
        theirs.shared.weight.data *= 0.02
    theirs.requires_grad_(False).save_pretrained(tmp_path / "shards", max_shard_size="30MB")
    assert len(T.weight_files(tmp_path / "shards")) > 1
    check_against(theirs, T.load_t5(tmp_path / "shards"))
    theirs.bfloat16().save_pretrained(tmp_path / "single")
    assert len(T.weight_files(tmp_path / "single")) == 1
    check_against(theirs.float(), T.load_t5(tmp_path / "single"))


def check_against(theirs, ours):
    """States, logits, prompt gradients to 1e-5, and greedy decoding behind 50 prompts."""
    d = ours.config.d_model
    ids = torch.randint(2, 256, (2, 14), generator=torch.Generator().manual_seed(4))
    target = torch.tensor([[0, 7, 9], [0, 200, 3]])
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[1, 17:] = False
    prompts = 3 * torch.randn(50, 10, d, generator=torch.Generator().manual_seed(5))
    prompt = prompts[0].clone()

    def loss(prompt, model=None):
        x = torch.cat([prompt.expand(2, -1, -1), T.embed_tokens(ours, ids)], 1)
        if model:
            out = model(inputs_embeds=x, attention_mask=mask.long(), decoder_input_ids=target)
            states, logits = out.encoder_last_hidden_state, out.logits
        else:
            states = T.encode(ours, x, mask)
            logits = T.next_token_logits(ours, T.decode(ours, target, states, mask))
        return F.cross_entropy(logits[:, 1], torch.tensor([11, 12])), (states[mask], logits)
    gradient, (states, logits) = torch.func.grad(loss, has_aux=True)(prompt)
    prompt.requires_grad_()
    reference, (their_states, their_logits) = loss(prompt, theirs)
    reference.backward()
    assert relative(states, their_states) < 1e-5 and relative(logits, their_logits) < 1e-5
    assert relative(gradient, prompt.grad) < 1e-5
    x = torch.cat([prompts, T.embed_tokens(ours, ids[:1]).expand(50, -1, -1)], 1)
    mask = mask[:1].expand(50, -1)
    likeliest = greedy(ours, T.encode(ours, x, mask), mask, 4)
    reference = theirs.generate(inputs_embeds=x, attention_mask=mask.long(), do_sample=False,
                                num_beams=1, max_new_tokens=4, decoder_start_token_id=T.PAD,
                                eos_token_id=T.EOS, pad_token_id=T.PAD)[:, 1:]
    assert torch.equal(likeliest, reference) and len(likeliest.unique(dim=0)) > 3


@needs_transformers
@pytest.mark.parametrize("buckets, furthest", [(32, 128), (8, 16), (32, 256)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_equal_transformers(bidirectional, buckets, furthest):
    """relative_position_bucket equals transformers' for every distance from -600 to 600, in both
    directions."""
    distance = torch.arange(-600, 601)
    theirs = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket
    reference = theirs(distance, bidirectional, buckets, furthest)
    ours = T.relative_position_bucket(distance, bidirectional, buckets, furthest)
    assert torch.equal(ours, reference)


# What transformers 5 computes in float64 from formula() and batch(), by transformers_logits below:
# the logits of example 0 at position 1 and of example 1 at position 6 (its norm takes the variance
# in float32).
GOLDEN = {
    V10: [[0.1976496, -0.4147722, -0.1470962, -0.09055217, 0.09269696, 0.4522177, -0.5474502,
           0.6151549, -0.7505313, -0.1235337, 0.424087],
          [0.1063094, -0.1494143, 0.04365874, 0.07935473, 0.07689534, 0.1448229, -0.1696267,
           0.1893235, -0.4808096, 0.2163185, 0.5828813]],
    V11: [[-0.454249, -1.164439, -1.151857, -0.6712845, 1.018401, 0.03848129, -0.1255734, -1.245551,
           1.562117, 2.132065, 2.118499],
          [-0.2497816, -1.811349, -1.832764, -0.6611977, 1.901316, -0.5169874, 0.3336447, -1.757097,
           1.652492, 2.422858, 2.403443]]}


def transformers_logits(config):
    theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(
        d_model=6, d_kv=4, d_ff=10, num_layers=2, num_decoder_layers=2, num_heads=2, vocab_size=11,
        relative_attention_num_buckets=8, relative_attention_max_distance=16, dropout_rate=0.,
        feed_forward_proj="gated-gelu" if config.gated else "relu",
        tie_word_embeddings=config.tied)).double().eval()
    weights, (x, mask, ids) = formula(config), batch(config)
    if not config.tied:                 # transformers 5 ties the head whatever the config says
        theirs.lm_head.weight = torch.nn.Parameter(weights["lm_head.weight"].clone())
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and all("embed_tokens" in n or n == "lm_head.weight" for n in missing)
    with torch.no_grad():
        return theirs(inputs_embeds=x, attention_mask=mask.long(), decoder_input_ids=ids).logits


@BOTH
def test_golden_logits(config):
    """Without transformers: the logits of formula weights are those that transformers gave, within
    1e-6 relative, with inner width not d_model, padding, and distances in every bucket."""
    out = logits(model(config), *batch(config))
    assert relative(out[[0, 1], [1, 6]], torch.tensor(GOLDEN[config], dtype=torch.float64)) < 1e-6


@needs_transformers
@BOTH
def test_golden_literals_are_of_transformers(config):
    """The golden literals are what the installed transformers computes."""
    out = transformers_logits(config)[[0, 1], [1, 6]]
    assert relative(out, torch.tensor(GOLDEN[config], dtype=torch.float64)) < 1e-6


# ------------------------------------------------------------------ against a textbook T5, in numpy

def textbook(t5, x, mask, ids):
    """One example, one head, one query at a time; keys and values formed, absent keys left out. ->
    (B, L, V)"""
    c, w = t5.config, {name: weight.double().numpy() for name, weight in t5.weights.items()}

    def norm(x, name):
        return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + c.eps) * w[f"{name}layer_norm.weight"]

    def attend(x, memory, kept, name, stack, causal):
        heads = []
        for h in range(c.num_heads):
            rows = slice(h * c.d_kv, (h + 1) * c.d_kv)
            q, key, value = (y @ w[f"{name}.{m}.weight"][rows].T
                             for m, y in (("q", x), ("k", memory), ("v", memory)))
            out = np.zeros_like(q)
            for i in range(len(x)):
                keys = [j for j in np.flatnonzero(kept) if j <= i or not causal]
                scores = np.array([q[i] @ key[j] for j in keys])
                if stack:
                    buckets = T.relative_position_bucket(
                        torch.tensor(keys) - i, stack == "encoder", c.num_buckets, c.max_distance)
                    table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
                    scores = scores + w[table][buckets.numpy(), h]
                p = np.exp(scores - scores.max())
                out[i] = p / p.sum() @ value[keys]
            heads.append(out)
        return np.concatenate(heads, -1) @ w[f"{name}.o.weight"].T

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
            m = m + attend(z, z, kept, f"{at}0.SelfAttention", "encoder", False)
            m = m + forward(norm(m, f"{at}1."), f"{at}1.DenseReluDense")
        m = norm(m, "encoder.final_")
        for n in range(c.num_decoder_layers):
            at = f"decoder.block.{n}.layer."
            z = norm(y, f"{at}0.")
            y = y + attend(z, z, np.ones(len(y)), f"{at}0.SelfAttention", "decoder", True)
            y = y + attend(norm(y, f"{at}1."), m, kept, f"{at}1.EncDecAttention", None, False)
            y = y + forward(norm(y, f"{at}2."), f"{at}2.DenseReluDense")
        y = norm(y, "decoder.final_")
        result.append((y * c.d_model ** -0.5 if c.scaled else y) @ w["lm_head.weight"].T)
    return torch.from_numpy(np.stack(result))


@BOTH
def test_equals_the_textbook_in_float64(config):
    """Absorbed cross attention, additive masks and shared biases are the textbook's formulas:
    logits equal those of loops in numpy to 1e-12, so that nothing on the way is narrower than
    float64."""
    t5, inputs = model(config), batch(config)
    out = logits(t5, *inputs)
    assert out.dtype == torch.float64
    assert relative(out, textbook(t5, *inputs)) < 1e-12
    x, mask, ids = inputs
    narrow = logits(model(config, torch.float32), x.float(), mask, ids)
    assert 1e-9 < relative(narrow.double(), out) < 1e-5        # anything in float32 would show


# --------------------------------------------------------------------------------------- properties

def test_docstring_examples():
    """The literal examples in the docstrings of t5.py and kmeans.py are true, and there are
    some."""
    for module in (T, km):
        outcome = doctest.testmod(module)
        assert outcome.attempted > 0 and outcome.failed == 0


def test_buckets_by_hand():
    """32 buckets, 128 positions. Decoder: 0..15 exact, the last bucket 31 holds everything from 113
    back (16 + floor(16 ln(113/16) / ln 8) = 31), and keys to come share bucket 0. Encoder: exact
    below 8, and keys to come are 16 higher."""
    def buckets(distance, bidirectional):
        return T.relative_position_bucket(torch.tensor(distance), bidirectional, 32, 128).tolist()
    assert buckets([0, -1, -15, -16, -112, -113, -128, -1000, 1, 50], False) == [
        0, 1, 15, 16, 30, 31, 31, 31, 0, 0]
    assert buckets([0, -7, -8, -90, -91, -1000], True) == [0, 7, 8, 14, 15, 15]
    assert buckets([7, 8, 90, 91, 1000], True) == [23, 24, 30, 31, 31]


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_masked_keys_get_nothing(dtype):
    """However large its score, a masked key weighs 0; the others share 1, in the scores' dtype."""
    scores = torch.tensor([[[[1e9, 2., 2., -1e9]]]], dtype=dtype)
    bias = T.padding_bias(torch.tensor([[False, True, True, False]]), torch.float32)
    p = T.attention_weights(scores, bias)
    assert p.dtype == dtype and p.flatten().tolist() == [0, 0.5, 0.5, 0]


@BOTH
def test_decoder_is_causal_and_encoder_is_not(config):
    """Another token at position 4 leaves the decoder's positions 0..3 as they were and changes
    4..6; another last vector changes the encoder's first state."""
    t5, (x, mask, ids) = model(config), batch(config)
    other = ids.clone()
    other[:, 4] = (ids[:, 4] + 1) % 11
    difference = (logits(t5, x, mask, other) - logits(t5, x, mask, ids)).abs().amax(-1)
    assert difference[:, :4].max() < 1e-13 and difference[:, 4:].min() > 1e-6
    moved = x.clone()
    moved[0, -1] += 1
    assert (T.encode(t5, moved, mask) - T.encode(t5, x, mask))[0, 0].abs().max() > 1e-6


def test_bfloat16_weights_keep_a_float32_stream():
    """With bfloat16 weights whose branches put out 0 the encoder is its final norm in float32: a
    change of the input far below a bfloat16 ulp (0.125 at 18) reaches the output whole."""
    t5 = model(V11, torch.bfloat16)
    for name, weight in t5.weights.items():
        if name.endswith(("Attention.o.weight", "wo.weight")):
            weight.zero_()
    x, mask, ids = batch(V11)
    x = 18 + x.float()
    finer = x + 1e-4 * torch.arange(6)
    weight = t5.weights["encoder.final_layer_norm.weight"].float()
    for value in (x, finer):
        H = T.encode(t5, value, mask)
        by_hand = value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        assert H.dtype == torch.float32 and relative(H, by_hand) < 1e-6
    assert relative(T.encode(t5, x, mask), T.encode(t5, finer, mask)) > 5e-6
    y = T.decode(t5, ids, H, mask)
    for value in (y, T.embed_tokens(t5, ids), T.next_token_logits(t5, y)):
        assert value.dtype == torch.float32


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_of_1e5_stay_finite(config, dtype, monkeypatch):
    """Feed-forward activations beyond 1e5, which are infinite in float16, leave logits and the
    gradient in the input finite, in bfloat16 within 5 % of the logits in float64."""
    t5, (x, mask, ids), linear, seen = model(config, dtype), batch(config), T.linear, []

    def large(t5):
        return t5._replace(weights={name: 2e5 * w if "DenseReluDense.wi" in name and "wi_1" not in
                                    name else w for name, w in t5.weights.items()})

    def watched(x, weight):
        seen.append(x.detach().abs().max() if weight.shape == (config.d_model, config.d_ff) else 0)
        return linear(x, weight)
    reference = logits(large(model(config)), x, mask, ids)
    monkeypatch.setattr(T, "linear", watched)
    out = logits(large(t5), x.float(), mask, ids)
    assert max(seen) > 1e5 and torch.tensor(1e5).half().isinf()
    assert out.isfinite().all() and (out - reference).norm() < 0.05 * reference.norm()
    monkeypatch.setattr(T, "linear", linear)
    gradient = torch.func.grad(lambda x: logits(large(t5), x, mask, ids).logsumexp(-1).mean())(
        x.float())
    assert gradient.isfinite().all() and gradient.abs().max() > 0


@BOTH
def test_float64_prompt_in_front_of_any_weights(config):
    """The residual stream has the input's dtype when that is wider than the weights'."""
    t5, (x, mask, ids) = model(config, torch.float32), batch(config)
    H = T.encode(t5, x, mask)
    assert H.dtype == T.decode(t5, ids, H, mask).dtype == torch.float64


def test_onednn_is_the_plain_linear(monkeypatch):
    """float32 on a CPU: the product by oneDNN, its gradient and its Hessian-vector product under
    torch.func, reverse and forward over reverse, are F.linear's to 1e-5; so is the gradient of a
    weight, for full tuning. It is not asked for float64, nor for small weights."""
    g = torch.Generator().manual_seed(0)
    x, u, w = (torch.randn(*shape, generator=g) for shape in ((2, 5, 640), (2, 5, 640), (640, 640)))
    w, asked = w / 25, []

    def results():
        gradient = torch.func.grad(lambda x: T.linear(x, w).sin().sum())
        return (T.linear(x, w), gradient(x), torch.func.vjp(gradient, x)[1](u)[0],
                torch.func.jvp(gradient, (x,), (u,))[1],
                torch.func.grad(lambda w: T.linear(x, w).sin().sum())(w))
    ours = results()
    monkeypatch.setattr(T.OneDNNLinear, "apply", lambda *inputs: asked.append(inputs))
    T.linear(x.double(), w.double()), T.linear(x, w[:9])
    assert not asked
    T.linear(x, w)
    assert len(asked) == T.ONEDNN
    monkeypatch.setattr(T, "ONEDNN", False)
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


# --------------------------------------------------------------------------------------- the loader

def save_model(folder, config, weights=None, **changes):
    """A model folder as a user has it; changes: keys of config.json, None drops one."""
    values = dict(config._asdict(), model_type="t5",
                  feed_forward_proj="gated-gelu" if config.gated else "relu",
                  tie_word_embeddings=config.tied, layer_norm_epsilon=config.eps,
                  relative_attention_num_buckets=config.num_buckets,
                  relative_attention_max_distance=config.max_distance)
    for key in ("gated", "tied", "scaled", "num_buckets", "max_distance", "eps"):
        del values[key]
    folder.mkdir(exist_ok=True)
    values = {key: value for key, value in {**values, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))
    save_file(formula(config) if weights is None else weights, folder / "model.safetensors")
    return folder


def refused(folder, *fragments):
    """load_t5 raises InputError in one line that holds the fragments; the line is returned."""
    with pytest.raises(T.InputError) as caught:
        T.load_t5(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    for fragment in fragments:
        assert fragment in message, (fragment, message)
    return message


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_round_trip(config, dtype, tmp_path):
    """What is saved is what is loaded: the config, and every weight, converted to the dtype that is
    asked for."""
    loaded = T.load_t5(save_model(tmp_path, config), dtype)
    assert loaded.config == config
    expected = model(config, dtype).weights
    assert loaded.weights.keys() == expected.keys()
    assert all(torch.equal(loaded.weights[name], expected[name]) for name in expected)


def test_float16(tmp_path):
    """A file in float16 is widened; a model in float16 is refused."""
    halves = {name: weight.half() for name, weight in formula(V10).items()}
    loaded = T.load_t5(save_model(tmp_path, V10, halves))
    assert all(w.dtype == torch.float32 for w in loaded.weights.values())
    with pytest.raises(T.InputError, match="float16.*choose float32 or bfloat16"):
        T.load_t5(tmp_path, torch.float16)


@BOTH
def test_shards_are_the_model(config, tmp_path):
    """A model in two shards and an index is the one of the single file, every weight of it."""
    sharded = load_t5(save_shards(tmp_path / "sharded", config))
    whole = load_t5(save_model(tmp_path / "whole", config))
    assert sharded.config == whole.config and sharded.weights.keys() == whole.weights.keys()
    assert all(torch.equal(sharded.weights[name], whole.weights[name]) for name in whole.weights)


def test_damaged_shards_and_indexes(tmp_path):
    """A missing or truncated shard, a tensor that two shards have, an index that is none or leads
    out of its folder: each is told by its file."""
    folder = save_shards(tmp_path / "m", V11)
    index, shard = folder / T.INDEX, folder / "model-00002-of-00002.safetensors"
    whole, listed = shard.read_bytes(), index.read_text()
    shard.write_bytes(whole[:-9])
    refused(folder, f"{shard} cannot be read", "fetch it again")
    save_file(load_file(folder / "model-00001-of-00002.safetensors"), shard)
    refused(folder, f"{shard} repeats tensors of another file: decoder.block.0", "and 21 more")
    shard.unlink()
    refused(folder, f"{index} names files that are not there: {shard.name}")
    for text in ("{", "[]", '{"weight_map": {}}', '{"weight_map": ["a"]}', "<html>",
                 '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../model.safetensors"}}',
                 '{"weight_map": {"a": "/etc/passwd"}}', '{"weight_map": {"a": ".."}}'):
        index.write_text(text)
        refused(folder, f"{index} is no index of weights", "fetch it again")
    index.write_text(listed.replace("00002-of", "00003-of"))
    refused(folder, "names files that are not there: model-00003-of-00002.safetensors")
    index.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    refused(folder, "model.safetensors is missing", "pytorch_model.bin is not read here",
            "OWNER/NAME@refs/pr/1")


@pytest.mark.parametrize("start, what", [
    (b"<!DOCTYPE html><html>", "it is a web page"), (b"\n <html>", "it is a web page"),
    (b"version https://git-lfs.github.com/spec/v1", "it is Git LFS's pointer to the file")])
def test_other_things_saved_as_weights(start, what, tmp_path):
    """A web page or a Git LFS pointer under the weights' name is called what it is."""
    save_model(tmp_path, V10)
    (tmp_path / "model.safetensors").write_bytes(start + b" and more" * 9)
    refused(tmp_path, f"model.safetensors cannot be read ({what})", "fetch it again")


def peak_of(before, code, **environment):
    """By how many MiB the peak of a fresh process grows through the code (Linux's count)."""
    script = f"""import re, sys
{before}
def MiB(key):
    return int(re.search(key + r':\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024
start = MiB('VmRSS')
{code}
print(MiB('VmHWM') - start)"""
    return float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                                cwd=Path(T.__file__).parent, env=os.environ | environment,
                                check=True).stdout)


def test_loading_needs_the_model_and_one_file(tmp_path):
    """bfloat16 shards read as float32: the peak of a fresh process grows by the float32 model and
    at most one shard (and 10 MB of whatever), no more for the largest tensor, 31 MB in float32."""
    config = V11._replace(d_model=512, d_kv=64, d_ff=1024, num_heads=8, vocab_size=16000)
    weights = {name: torch.ones(shape, dtype=torch.bfloat16)
               for name, shape in T.expected_shapes(config).items()}
    save_model(tmp_path, config, weights)
    (tmp_path / "model.safetensors").unlink()
    names = sorted(weights, key=lambda name: weights[name].numel())
    for k in range(8):
        save_file({name: weights[name] for name in names[k::8]}, tmp_path / f"{k}.safetensors")
    (tmp_path / T.INDEX).write_text(json.dumps({"weight_map": {
        name: f"{k}.safetensors" for k in range(8) for name in names[k::8]}}))
    grown = peak_of("import t5", f"t5.load_t5({str(tmp_path)!r})")
    whole = sum(w.numel() for w in weights.values()) * 4 / 2 ** 20
    shard = max(path.stat().st_size for path in tmp_path.glob("*.safetensors")) / 2 ** 20
    assert 0.9 * whole < grown < whole + shard + 10, (grown, whole, shard)


def test_defaults_of_old_configs(tmp_path):
    """A first-release config names neither decoder layers, positions, feed-forward nor head: those
    of t5-small hold."""
    config = V10._replace(num_buckets=32, max_distance=128)
    save_model(tmp_path, config, **dict.fromkeys([
        "num_decoder_layers", "feed_forward_proj", "model_type", "tie_word_embeddings",
        "layer_norm_epsilon", "relative_attention_num_buckets", "relative_attention_max_distance"]))
    assert T.load_t5(tmp_path).config == config


@BOTH
def test_every_tensor_is_needed_in_its_shape(config, tmp_path):
    """Without any one tensor of the file, or with one row less of it, the model is refused and the
    tensor named."""
    for name, weight in formula(config).items():
        rest = {n: w for n, w in formula(config).items() if n != name}
        save_model(tmp_path, config, rest)
        refused(tmp_path, "model.safetensors lacks", name, "one intact model")
        changed = rest | {name: weight[1:].clone()}
        refused(save_model(tmp_path, config, changed), "another shape", name, "one intact model")


@pytest.mark.parametrize("name", [
    "extra.weight", "encoder.block.2.layer.0.layer_norm.weight", "lm_head.bias",
    "encoder.block.0.layer.1.DenseReluDense.wi.weight"])
def test_extra_tensor(name, tmp_path):
    """A tensor that the config does not call for is refused and named."""
    weights = formula(V11) | {name: torch.ones(6)}
    refused(save_model(tmp_path, V11, weights), "does not call for", name, "one intact model")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite(value, tmp_path):
    """One NaN or infinity among the weights is refused and its tensor named."""
    weights = formula(V11)
    weights["decoder.block.1.layer.2.DenseReluDense.wo.weight"][3, 2] = value
    refused(save_model(tmp_path, V11, weights), "not finite", "layer.2.DenseReluDense.wo.weight")


def test_integer_weights(tmp_path):
    """Quantized integers are not taken for weights."""
    weights = formula(V11)
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    weights[name] = (127 * weights[name]).to(torch.int8)
    refused(save_model(tmp_path, V11, weights), "no floating-point numbers", name)


def test_damaged_files(tmp_path):
    """A weights file cut anywhere, in the length, the header or the data, with a byte too many, or
    of garbage, is refused with the advice to fetch it again."""
    save_model(tmp_path, V10)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    cuts = [0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(whole) // 2, -1]
    others = [whole + b"x", b"<html>Not found</html>" * 20, bytes(4096)]
    for damaged in [whole[:cut] for cut in cuts] + others:
        path.write_bytes(damaged)
        refused(tmp_path, "model.safetensors cannot be read", "fetch it again")
    path.write_bytes(whole)
    T.load_t5(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files(name, tmp_path):
    """A folder without one of the two files, and no folder at all, is refused by the missing file's
    name."""
    save_model(tmp_path, V10)
    (tmp_path / name).unlink()
    refused(tmp_path, f"{name} is missing", "put the model's")
    refused(tmp_path / "nowhere", "config.json is missing")


@pytest.mark.parametrize("text", ["", "{", "not json", '{"d_model": 6,}', b"\xff\xfe\x00{"])
def test_broken_json(text, tmp_path):
    """A config.json that is no JSON is refused, with the advice to fetch it again."""
    save_model(tmp_path, V10)
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(tmp_path, "config.json is not JSON", "fetch it again")


@pytest.mark.parametrize("text", [
    "[]", "3", "null", '{"model_type": "bert", "d_model": 6}', '{"model_type": "mt5"}'])
def test_other_models(text, tmp_path):
    """A config.json of something other than a T5 is refused."""
    save_model(tmp_path, V10)
    (tmp_path / "config.json").write_text(text)
    refused(tmp_path, "config.json does not describe a T5", "take a model")


@pytest.mark.parametrize("key, value", [
    ("d_model", 0), ("d_model", -6), ("d_model", 6.0), ("d_model", "6"), ("d_model", True),
    ("d_model", None), ("d_kv", 10 ** 9), ("d_ff", [10]), ("num_layers", 10 ** 6),
    ("num_decoder_layers", 0), ("num_heads", 2 ** 40), ("vocab_size", -1),
    ("layer_norm_epsilon", 0), ("layer_norm_epsilon", -1e-6), ("layer_norm_epsilon", "1e-6"),
    ("layer_norm_epsilon", math.nan), ("layer_norm_epsilon", 1e6),
    ("relative_attention_num_buckets", 0), ("relative_attention_max_distance", 0),
    ("tie_word_embeddings", "no"), ("feed_forward_proj", "gated-silu"),
    ("feed_forward_proj", "gelu"), ("feed_forward_proj", 3)])
def test_absurd_configs(key, value, tmp_path):
    """An absurd size or an unknown kind in config.json is refused by its key and value, before
    weights are read."""
    save_model(tmp_path, V10, **{key: value})
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, f"config.json: {key} is {value!r}", "take ")


@pytest.mark.parametrize("buckets, distance", [(2, 16), (3, 16), (8, 4), (32, 16)])
def test_impossible_buckets(buckets, distance, tmp_path):
    """Buckets that leave no room for the logarithmic half (the formula would divide by 0) are
    refused."""
    save_model(tmp_path, V10, relative_attention_num_buckets=buckets,
               relative_attention_max_distance=distance)
    refused(tmp_path, "config.json", "relative_attention", "T5 has 32 and 128")


@pytest.mark.parametrize("names", [
    ["encoder.embed_tokens.weight"], ["decoder.embed_tokens.weight"], ["lm_head.weight"],
    ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight",
     "lm_head.weight"]])
def test_tied_table_under_any_name(names, tmp_path):
    """The table of a tied model may be stored under any of its names, or all: the model is the
    same."""
    weights = formula(V10)
    table = weights.pop("shared.weight")
    save_model(tmp_path, V10, weights | {name: table.clone() for name in names})
    loaded = T.load_t5(tmp_path, torch.float64)
    expected = model(V10).weights
    assert loaded.config == V10 and loaded.weights.keys() == expected.keys()
    assert all(torch.equal(loaded.weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("config, name", [
    (V10, "encoder.embed_tokens.weight"), (V10, "lm_head.weight"),
    (V11, "decoder.embed_tokens.weight")])
def test_copies_must_be_equal(config, name, tmp_path):
    """A copy of the table that differs from it in one number is refused: nobody can tell which one
    is meant."""
    weights = formula(config)
    weights[name] = weights["shared.weight"].clone()
    weights[name][4, 4] += 1e-3
    refused(save_model(tmp_path, config, weights), "differ", name)


def test_untied_under_a_tied_config(tmp_path):
    """transformers 5 saves v1.1 with tie_word_embeddings true and scale_decoder_outputs false: the
    head in the file counts."""
    save_model(tmp_path, V11, tie_word_embeddings=True, scale_decoder_outputs=False)
    loaded = T.load_t5(tmp_path, torch.float64)
    assert loaded.config == V11
    assert torch.equal(loaded.weights["lm_head.weight"], formula(V11)["lm_head.weight"])


def test_stray_bias_of_v10_is_ignored(tmp_path):
    """The cross-attention bias in v1.0's files, which no T5 reads, is left out of the model."""
    weights = formula(V10) | {T.STRAY: torch.ones(8, 2)}
    assert T.load_t5(save_model(tmp_path, V10, weights)).weights.keys() == model(V10).weights.keys()


@needs_data
@pytest.mark.parametrize("name, sizes, parameters", [
    ("t5-small", (512, 64, 2048, 6, 6, 8, 32128), 60_506_624),
    ("t5-base", (768, 64, 3072, 12, 12, 12, 32128), 222_903_552),
    ("t5-large", (1024, 64, 4096, 24, 24, 16, 32128), 737_668_096)])
def test_real_configs(name, sizes, parameters, tmp_path):
    """The published configs parse to the published sizes, and expected_shapes counts the published
    parameters."""
    source = Path(os.environ["SUPMER_DATA"]) / "t5_tokenizer" / "configs" / f"{name}.config.json"
    (tmp_path / "config.json").write_bytes(source.read_bytes())
    config = T.read_config(tmp_path)
    assert config == T.T5Config(*sizes, gated=False, tied=True, scaled=True, num_buckets=32,
                                max_distance=128, eps=1e-6)
    assert sum(math.prod(shape) for shape in T.expected_shapes(config).values()) == parameters


# ------------------------------------------------------------------------------------------ K-means

def cloud(n=300, d=4, seed=0, dtype=torch.float64):
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def planted_points(dtype=torch.float64, clusters=6, each=40, d=5):
    """Points 100 apart with noise 1 around -> points (n, d), their clusters (n,) in mixed order."""
    generator = torch.Generator().manual_seed(3)
    label = torch.arange(clusters).repeat(each)
    centres = torch.cat([100 * torch.eye(d), torch.zeros(1, d)])[:clusters]
    return (centres[label] + torch.randn(len(label), d, generator=generator)).to(dtype), label


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finds_planted_clusters(dtype):
    """From every one of ten seeds: one cluster per planted one, its centroid the mean of its
    points, in the points' dtype."""
    points, label = planted_points(dtype)
    for seed in range(10):
        found = km.kmeans(points, 6, seed)
        assert found.centroids.dtype == dtype and found.assignments.dtype == torch.long
        pairs = set(zip(label.tolist(), found.assignments.tolist()))
        assert len(pairs) == 6
        for truth, cluster in pairs:
            mean = points[label == truth].mean(0)
            assert relative(found.centroids[cluster], mean) < {4: 1e-5, 8: 1e-12}[dtype.itemsize]


def test_inertia_never_rises_and_is_equation_16():
    """Over 30 starts, half with centroids that no point is near to: the inertia falls from
    iteration to iteration, its last value is the sum of squared distances that Eq. 16 defines, and
    the end is a fixed point with no cluster empty."""
    refilled = 0
    for seed in range(30):
        points = cloud(seed=seed)
        start = km.plus_plus(points, 12, seed)
        if seed % 2:
            start[3:9] += 50
            refilled += len(km.nearest(points, start)[0].unique()) < 12
        centroids, assignments, inertia = km.kmeans(points, 12, seed, 200, centroids=start)
        assert all(b <= a * (1 + 1e-12) for a, b in zip(inertia, inertia[1:]))
        assert 2 < len(inertia) < 200
        squared = ((points[:, None] - centroids) ** 2).sum(-1)                 # (n, K)
        assert torch.equal(squared.argmin(1), assignments)
        assert inertia[-1] == pytest.approx(squared.min(1).values.sum().item(), rel=1e-12)
        means = torch.stack([points[assignments == j].mean(0) for j in range(12)])
        assert relative(centroids, means) < 1e-12
    assert refilled == 15


@needs_sklearn
@pytest.mark.parametrize("seed", range(5))
def test_equals_scikit_learn(seed):
    """From the same start scikit-learn's Lloyd ends with the same assignments, centroids and
    inertia, 1e-9 relative."""
    points = cloud(500, 6, seed)
    start = km.plus_plus(points, 9, seed)
    ours = km.kmeans(points, 9, seed, iterations=300, centroids=start)
    theirs = sklearn.cluster.KMeans(9, init=start.numpy(), n_init=1, max_iter=300, tol=0,
                                    algorithm="lloyd")
    theirs.fit(points.numpy())
    assert ours.assignments.tolist() == theirs.labels_.tolist()
    assert relative(ours.centroids, torch.from_numpy(theirs.cluster_centers_)) < 1e-9
    assert ours.inertia[-1] == pytest.approx(theirs.inertia_, rel=1e-9)


def test_one_chunk_equals_many():
    """Chunks of 1, 7 or 128 points give what one chunk of all gives: assignments, and centroids and
    inertia to 1e-12."""
    points = cloud()
    whole = km.kmeans(points, 10, 0, chunk=len(points))
    for chunk in (1, 7, 128):
        parts = km.kmeans(points, 10, 0, chunk=chunk)
        assert torch.equal(parts.assignments, whole.assignments)
        assert relative(parts.centroids, whole.centroids) < 1e-12
        assert parts.inertia == pytest.approx(whole.inertia, rel=1e-12)


def test_a_seed_fixes_the_result():
    """The same seed gives the same bits whatever the global generators hold, and leaves them alone;
    another seed, and a seed of several numbers, start elsewhere."""
    points = cloud()
    torch.manual_seed(1)
    np.random.seed(1)
    first = km.kmeans(points, 10, 5)
    torch.manual_seed(2)
    np.random.seed(2)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    second = km.kmeans(points, 10, 5)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(first.centroids, second.centroids) and first.inertia == second.inertia
    for seed in (6, (5, 1)):
        assert not torch.equal(km.plus_plus(points, 10, seed), km.plus_plus(points, 10, 5))


def test_plus_plus_draws_by_squared_distance():
    """Of the points 0, 1, 3 the second centroid is, after 0, 3 with probability 9/10, after 1 4/5,
    after 3 9/13 (for 0): the frequencies over 3,000 seeds are within 4 standard errors, and no
    point is drawn twice."""
    points = torch.tensor([[0.], [1.], [3.]])
    drawn = [tuple(km.plus_plus(points, 2, seed)[:, 0].tolist()) for seed in range(3000)]
    for first, second, p in ((0, 3, 9 / 10), (1, 3, 4 / 5), (3, 0, 9 / 13)):
        after = [pair for pair in drawn if pair[0] == first]
        share = sum(pair[1] == second for pair in after) / len(after)
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / len(after))
        assert abs(len(after) / 3000 - 1 / 3) < 4 * math.sqrt(2 / 9 / 3000)
    assert all(a != b for a, b in drawn)


def test_empty_clusters_by_hand():
    """Points 0, 1, 2, 10; centroids 1, 100, 200. All go to the first (inertia 1 + 0 + 1 + 81); the
    farthest, 10, fills the second; of 0 and 2, as far, 0 fills the third. Means 1.5, 10, 0; inertia
    0.25 + 0.25; nothing changes then."""
    points = torch.tensor([[0.], [1.], [2.], [10.]], dtype=torch.float64)
    start = torch.tensor([[1.], [100.], [200.]], dtype=torch.float64)
    found = km.kmeans(points, 3, 0, centroids=start)
    assert found.centroids.tolist() == [[1.5], [10.], [0.]]
    assert found.assignments.tolist() == [2, 0, 0, 1]
    assert found.inertia == pytest.approx([83, 0.5], abs=1e-9)
    assert km.kmeans(points, 3, 0, 0, centroids=start).assignments.tolist() == [0, 0, 0, 0]


def test_ties_among_the_farthest():
    """Of 1,000 points equally far the first ones fill the empty clusters, whatever sorts them."""
    filled = km.fill_empty(torch.zeros(1000, dtype=torch.long), torch.ones(1000), 4)
    assert filled[:3].tolist() == [1, 2, 3] and filled[3:].eq(0).all()


def test_distances_are_never_negative():
    """The distance of a point that is a centroid is 0 up to rounding, in float32, and not below."""
    points = cloud(200, 50, dtype=torch.float32)
    assignments, distances = km.nearest(points, points)
    assert assignments.tolist() == list(range(200))
    assert distances.min() >= 0 and distances.max() < 1e-5


def test_fewer_distinct_points_than_clusters():
    """All points equal, or two distinct ones for four clusters: it ends, at inertia 0, every
    centroid one of the points."""
    for points in (torch.full((6, 2), 3.5), torch.tensor([[1., 2.], [4., 6.]]).repeat(3, 1)):
        found = km.kmeans(points, 4, 0)
        assert found.inertia[-1] == pytest.approx(0, abs=1e-10) and len(found.inertia) < 5
        assert all((points == centroid).all(1).any() for centroid in found.centroids)


def test_as_many_clusters_as_points_and_one():
    """k = n: every point alone, inertia 0. k = 1: the centroid is the mean."""
    points = cloud(40)
    assert sorted(km.kmeans(points, 40, 0).assignments.tolist()) == list(range(40))
    one = km.kmeans(points, 1, 0)
    assert relative(one.centroids[0], points.mean(0)) < 1e-14 and one.assignments.eq(0).all()


def test_the_limit_on_iterations():
    """At most `iterations` updates; 0 assigns to the start; what is returned belongs together at
    any limit."""
    points = cloud()
    start = km.plus_plus(points, 12, 0)
    for limit in (0, 1, 2):
        found = km.kmeans(points, 12, 0, iterations=limit)
        assert len(found.inertia) == limit + 1
        assignments, distances = km.nearest(points, found.centroids)
        assert torch.equal(found.assignments, assignments)
        assert found.inertia[-1] == distances.sum().item()
        assert torch.equal(found.centroids, start) == (limit == 0)


def test_a_shared_component_costs_no_digits():
    """Clusters 1 apart at a distance of 5,000 from 0, in float32: |x|^2 is 2.5e7, its ulp 2, yet
    all are found and the distances are true."""
    points, label = planted_points(torch.float32)
    points = points / 100 + 5000
    centroids = torch.stack([points[label == j].double().mean(0).float() for j in range(6)])
    assignments, distances = km.nearest(points, centroids)
    assert torch.equal(assignments, label)
    assert relative(distances, (points - centroids[label]).square().sum(1)) < 1e-4


def test_sums_are_wider_than_float32():
    """The mean of 20,000 float32 points near 10,000 is the exact one, rounded once: float32 sums,
    of 2e8, would miss it."""
    points = 10_000 + 10 * cloud(20_000, 3, dtype=torch.float32)
    exact = points.double().mean(0).float()
    assert torch.equal(km.kmeans(points, 1, 0).centroids[0], exact)


def test_kmeans_errors():
    """Fewer points than clusters, no cluster, no points, NaN or infinity, and centroids that do not
    fit are ValueErrors that say the numbers."""
    points = cloud(5)
    for k in (0, -1, 6):
        with pytest.raises(ValueError, match=f"{k} clusters of 5 points"):
            km.kmeans(points, k, 0)
    with pytest.raises(ValueError, match="1 clusters of 0 points"):
        km.kmeans(points[:0], 1, 0)
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="NaN or infinity"):
            km.kmeans(torch.where(points == points[3, 1], value, points), 2, 0)
        with pytest.raises(ValueError, match="2 finite rows of width 4"):
            km.kmeans(points, 2, 0, centroids=torch.full((2, 4), value, dtype=torch.float64))
    with pytest.raises(ValueError, match="2 finite rows of width 4"):
        km.kmeans(points, 2, 0, centroids=points[:3])


# ------------------------------------------------------------------------- the method: small worlds


def random_t5(d=8, gated=True, dtype=torch.float64, vocabulary=40, seed=0, scale=0.3):
    """A T5 of two tiny blocks a stack with random weights, heads x d_kv != d_model."""
    config = T.T5Config(
        d_model=d,
        d_kv=6,
        d_ff=12,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        vocab_size=vocabulary,
        gated=gated,
        tied=False,
        scaled=False,
        num_buckets=32,
        max_distance=128,
        eps=1e-6,
    )
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: (1.0 if "layer_norm" in name else 0.0)
        + scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in T.expected_shapes(config).items()
    }
    return T.T5(config, {name: w.to(dtype) for name, w in weights.items()})


SENTINEL, WORDS = 39, [[39, 5], [39, 6], [39, 7]]


def random_examples(n, seed, d=8, slots=0, shortest=3, longest=9, words=WORDS):
    """n examples of unequal length, labels in turn; with slots, vectors stand at positions
    1..slots.
    """
    rng = np.random.default_rng(seed)
    ids = [
        [*rng.integers(8, 38, rng.integers(max(shortest, slots + 1), longest)), SENTINEL, 1]
        for _ in range(n)
    ]
    return data.Examples(
        [list(map(int, row)) for row in ids],
        [list(range(1, slots + 1))] * n,
        torch.from_numpy(rng.normal(size=(n, slots, d))).float(),
        torch.arange(n) % len(words),
        words,
    )


def random_task(seed, n=5, **options):
    return data.Task(
        "sp-next",
        (0,),
        random_examples(n, seed, **options),
        random_examples(n, seed + 100, **options),
    )


@pytest.fixture(scope="module")
def world():
    """A gated float64 T5, a prompt, a phi away from its start, a task and a partner, lambda, b and
    a large a1.
    """
    generator = torch.Generator().manual_seed(3)
    d, P = 8, 3
    phi = {
        name: value + 0.3 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for name, value in supmer.init_regularizer(d, torch.float64).items()
    }
    return SimpleNamespace(
        t5=random_t5(d),
        theta=torch.randn(P, d, generator=generator, dtype=torch.float64),
        phi=phi,
        task=random_task(1),
        partner=random_task(2),
        lam=0.3,
        b=0.4,
        method=Method(inner_rate=20.0, micro_tokens=24, gate_weight=0.7),
    )


def plain_loss(t5, theta, examples, partner=None, lam=0.0):
    """The (mixed) loss, written again the plainest way: one example at a time, nothing padded but
    the shorter of a pair.
    """
    total = 0.0
    for row in range(len(examples.ids)):

        def states(e):
            batch = data.collate(e, [row], "cpu")
            return (
                supmer.encode_with_prompt(t5, theta, batch)[0][0],
                F.one_hot(e.labels[row], len(e.words)).double(),
            )

        H, Y = states(examples)
        if partner is not None:
            H_j, Y_j = states(partner)
            S = max(len(H), len(H_j))
            H = (1 - lam) * F.pad(H, (0, 0, 0, S - len(H))) + lam * F.pad(
                H_j, (0, 0, 0, S - len(H_j))
            )
            Y = (1 - lam) * Y + lam * Y_j
        everywhere = torch.ones(1, len(H), dtype=torch.bool)
        y = T.decode(t5, torch.tensor([[0, SENTINEL]]), H[None], everywhere)[0, 1]
        log_p = torch.log_softmax(T.next_token_logits(t5, y), -1)
        total = total - sum(Y[k] * log_p[word[1]] for k, word in enumerate(examples.words))
    return total / len(examples.ids)


def meta_loss(w, theta, phi, method, frozen_H):
    """L_q(theta - a1 psi(grad L_s(theta))) + lambda_reg L_reg, from plain_loss; the gate's H is
    frozen.
    """
    g = torch.func.grad(lambda x: plain_loss(w.t5, x, w.task.support))(theta)
    adapted = supmer.inner_step(theta, phi, g, frozen_H, method)
    return plain_loss(
        w.t5, adapted, w.task.query, w.partner.query, w.lam
    ) + method.gate_weight * supmer.gate_loss(phi, frozen_H, w.b)


def finite_differences(w, method, step=1e-5, directions=4):
    """Central differences of meta_loss along random directions: {name: [(direction, derivative),
    ...]}.
    """
    _, H, _ = supmer.prompt_gradient(w.t5, w.theta, w.task.support, method)
    parameters, generator = {"theta": w.theta, **w.phi}, torch.Generator().manual_seed(5)

    def along(name, direction):
        with torch.no_grad():
            ends = [
                {**parameters, name: parameters[name] + sign * step * direction} for sign in (1, -1)
            ]
            up, down = (meta_loss(w, p["theta"], {k: p[k] for k in w.phi}, method, H) for p in ends)
        return float((up - down) / (2 * step))

    found = {}
    for name, value in parameters.items():
        drawn = [
            torch.randn(value.shape, generator=generator, dtype=value.dtype)
            for _ in range(directions)
        ]
        found[name] = [(direction, along(name, direction)) for direction in drawn]
    return found


def disagreement(gradient, differences):
    """max |<gradient, direction> - derivative| / max |derivative|."""
    errors = [
        abs(float((gradient * direction).sum()) - derivative)
        for direction, derivative in differences
    ]
    return max(errors) / max(abs(derivative) for _, derivative in differences)


def computed(w, method):
    part = supmer.meta_gradient(w.t5, w.theta, w.phi, w.task, w.partner, w.lam, w.b, method)
    return {"theta": part.d_theta, **part.d_phi}


@pytest.fixture(scope="module")
def differences(world):
    return finite_differences(world, world.method)


# ----------------------------------------------------------- the method: the meta-gradient is exact


def test_meta_gradient_equals_finite_differences(world, differences):
    """d theta and d phi are the derivative of the meta-loss: mixing, psi, L_reg and the Hessian all
    on, to 1e-6.
    """
    found = computed(world, world.method)
    for name, reference in differences.items():
        assert (
            max(abs(derivative) for _, derivative in reference) > 1e-4
        ), f"the test must move {name}"
        assert disagreement(found[name], reference) < 1e-6, name


def test_meta_gradient_through_a_relative_step(world):
    """With relative_step the rate depends on theta, phi and g, and the gradient knows it."""
    method = Method(relative_step=0.3, micro_tokens=36, gate_weight=0.7)
    found = computed(world, method)
    for name, reference in finite_differences(world, method, directions=2).items():
        assert disagreement(found[name], reference) < 1e-6, name


@pytest.mark.parametrize("removed", ["hessian", "dpsi/dg", "mixing", "L_reg", "zeroed padding"])
def test_each_part_of_the_meta_gradient_is_needed(world, differences, monkeypatch, removed):
    """Take one part away and the gradient is no longer the derivative: the proof above can fail."""
    method, w = world.method, SimpleNamespace(**vars(world))
    if removed == "hessian":
        method = Method(**{**vars(method), "first_order": True})
    elif removed == "dpsi/dg":
        monkeypatch.setattr(supmer, "regularize", _without_derivative_in_g(supmer.regularize))
    elif removed == "mixing":
        w.lam = 0.0
    elif removed == "L_reg":
        method = Method(**{**vars(method), "gate_weight": 0.0})
    else:
        monkeypatch.setattr(supmer, "mix", _careless(supmer.mix))
    found = computed(w, method)
    worst = max(disagreement(found[name], reference) for name, reference in differences.items())
    assert worst > 1e-3, f"without {removed} nothing changed"


def _without_derivative_in_g(regularize):
    """psi with the right value whose derivative in g is the identity: what forgetting (dpsi/dg)^T
    computes.
    """

    def forgetful(phi, g, H):
        return regularize(phi, g.detach(), H) + g - g.detach()

    return forgetful


def _careless(mix):
    """Mixing that leaves at padding whatever the encoder put there."""

    def careless(H_i, mask_i, Y_i, H_j, mask_j, Y_j, lam):
        _, mask, Y = mix(H_i, mask_i, Y_i, H_j, mask_j, Y_j, lam)
        everywhere_i, everywhere_j = torch.ones_like(mask_i), torch.ones_like(mask_j)
        return mix(H_i, everywhere_i, Y_i, H_j, everywhere_j, Y_j, lam)[0], mask, Y

    return careless


def test_micro_batches_by_hand():
    """Behind a prompt of 2, texts of 3, 9, 4 and 5 tokens are 5, 11, 6 and 7 positions: sorted, two
    fit into 13 (2 x 6), the third (7) does not, nor beside the last (2 x 11). One example may be
    more than the budget; a partner's row stays with its own and counts where it is longer."""
    texts = data.Examples([[3] * n for n in (3, 9, 4, 5)], [[]] * 4, torch.zeros(4, 0, 8),
                          torch.zeros(4, dtype=torch.long), WORDS)
    partner = texts._replace(ids=[[4] * n for n in (9, 1, 1, 1)])

    def rows(tokens, partner=None):
        found = supmer.micro_batches(texts, torch.zeros(2, 8), Method(micro_tokens=tokens), partner)
        return [rows for rows, _, _ in found]
    assert rows(13) == [[0, 2], [3], [1]] and rows(1) == [[0], [2], [3], [1]]
    assert rows(44) == [[0, 2, 3, 1]] and rows(14, partner) == [[2, 3], [0], [1]]


@pytest.mark.parametrize(
    "change", ["micro-batch", "one graph kept", "all graphs kept", "order", "padding"]
)
def test_meta_gradient_does_not_depend_on_how_it_is_computed(world, monkeypatch, change):
    """Micro-batch size, keeping graphs or making them again, order of the examples and extra
    padding leave the gradient unchanged to 1e-12.
    """
    reference, w, method = (
        computed(world, world.method),
        SimpleNamespace(**vars(world)),
        world.method,
    )
    if change == "micro-batch":
        method = replace(method, micro_tokens=640)
    elif "kept" in change:
        first, *more = supmer.micro_batches(w.task.support, w.theta, method)
        assert first and more
        method = replace(method, keep_graphs=1 if "one" in change else 9)
    elif change == "order":

        def reordered(e, order):
            return data.Examples(
                [e.ids[r] for r in order],
                [e.slots[r] for r in order],
                e.vectors[order],
                e.labels[order],
                e.words,
            )

        order = [3, 0, 4, 2, 1]
        w.task, w.partner = (
            data.Task(
                t.variant, t.clusters, reordered(t.support, order[::-1]), reordered(t.query, order)
            )
            for t in (world.task, world.partner)
        )
    else:

        def padded(examples, rows, device, collate=data.collate):
            batch = collate(examples, rows, device)
            return batch._replace(
                ids=F.pad(batch.ids, (0, 5), value=9), mask=F.pad(batch.mask, (0, 5))
            )

        monkeypatch.setattr(supmer, "collate", padded)
    for name, value in computed(w, method).items():
        assert relative(value, reference[name]) < 1e-12, name


def test_first_order_keeps_everything_but_the_hessian(world):
    """first_order: d theta is v itself, d phi is unchanged (it needs no second derivative)."""
    first = computed(world, Method(**{**vars(world.method), "first_order": True}))
    exact = computed(world, world.method)
    g, H, _ = supmer.prompt_gradient(world.t5, world.theta, world.task.support, world.method)
    adapted = supmer.inner_step(world.theta, world.phi, g, H, world.method)
    v, _, _ = supmer.prompt_gradient(
        world.t5, adapted, world.task.query, world.method, world.partner.query, world.lam
    )
    assert torch.equal(first["theta"], v)
    assert relative(first["theta"], exact["theta"]) > 1e-2
    assert all(torch.equal(first[name], exact[name]) for name in world.phi)


def test_inserted_vectors_carry_through(world):
    """Slots: the vector replaces the token, so the token's id there is irrelevant and the vector is
    not.
    """
    examples = random_examples(4, 5, slots=2)
    loss = supmer.prompt_gradient(world.t5, world.theta, examples, world.method)[2]
    other_ids = examples._replace(ids=[[row[0], 9, 9, *row[3:]] for row in examples.ids])
    assert torch.equal(
        loss, supmer.prompt_gradient(world.t5, world.theta, other_ids, world.method)[2]
    )
    moved = examples._replace(vectors=examples.vectors + 1)
    assert loss != supmer.prompt_gradient(world.t5, world.theta, moved, world.method)[2]


# ---------------------------------------------------------------- the method: Eq. 1, loss and words


def test_loss_is_the_full_vocabulary_cross_entropy(world):
    """Eq. 1: the batched loss equals the plainest computation, and g its gradient."""
    g, _, loss = supmer.prompt_gradient(world.t5, world.theta, world.task.support, world.method)
    reference_g, reference = torch.func.grad_and_value(
        lambda x: plain_loss(world.t5, x, world.task.support)
    )(world.theta)
    assert abs(loss - reference) < 1e-12 and relative(g, reference_g) < 1e-12


def test_words_of_several_pieces_are_scored_by_their_sum(world):
    """log p("6 7 8") = log p(6) + log p(7 | 6) + log p(8 | 6 7), each from a decoder run of its
    own.
    """
    H, mask = supmer.encode_with_prompt(
        world.t5, world.theta, data.collate(world.task.support, [0, 1], "cpu")
    )
    found = supmer.word_log_probs(world.t5, H, mask, [[SENTINEL, 5], [SENTINEL, 6, 7, 8]])

    def log_p(prefix, token):
        ids = torch.tensor([[0, SENTINEL, *prefix]] * 2)
        return torch.log_softmax(
            T.next_token_logits(world.t5, T.decode(world.t5, ids, H, mask)), -1
        )[:, -1, token]

    by_hand = torch.stack([log_p([], 5), log_p([], 6) + log_p([6], 7) + log_p([6, 7], 8)], 1)
    assert relative(found, by_hand) < 1e-12
    only = supmer.word_log_probs(
        world.t5, H, mask, [[SENTINEL, 5], [SENTINEL, 6, 7, 8]], words_only=True
    )
    assert torch.allclose(only.exp().sum(-1), torch.ones(2, dtype=torch.float64))


# -------------------------------------------------------------------------- the method: psi (Eq. 5)


def test_psi_is_the_identity_at_the_start():
    """A = I, a = 0, W = 0, c = 0: psi(g) = g, so meta-training begins as plain MAML."""
    g, H = torch.randn(5, 16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    assert relative(supmer.regularize(supmer.init_regularizer(16, torch.float64), g, H), g) < 1e-14


def test_psi_by_hand():
    """d = 2, one row: g = (3, 4), A a quarter turn, a = 0: h = (-4, 3); z = (sigmoid(1), 1/2)."""
    phi = {
        "A": torch.tensor([[0.0, -1.0], [1.0, 0.0]]),
        "a": torch.zeros(2),
        "W": torch.tensor([[1.0, 0.0], [0.0, 0.0]]),
        "c": torch.zeros(2),
    }
    g, H, z = (
        torch.tensor([[3.0, 4.0]]),
        torch.tensor([1.0, 7.0]),
        torch.tensor([1 / (1 + math.exp(-1)), 0.5]),
    )
    assert torch.allclose(supmer.affine(phi, g), torch.tensor([[-4.0, 3.0]]))
    assert torch.allclose(supmer.gate(phi, H), z)
    assert torch.allclose(supmer.regularize(phi, g, H), z * torch.tensor([-4.0, 3.0]) + (1 - z) * g)


def test_affine_keeps_row_lengths_and_zero_rows_have_finite_gradients(world):
    """|h(g)| = |g| for rows from 1e-30 to 1e3 (psi need not keep it); a zero row stays zero and no
    derivative is NaN.
    """
    phi = {name: value.float() for name, value in world.phi.items()}
    g = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1.0], [1e-30], [1e3], [0.0], [1e-7]]
    )
    h = supmer.affine(phi, g)
    lengths = (h.double().norm(dim=-1), g.double().norm(dim=-1))
    assert torch.allclose(*lengths, rtol=1e-5, atol=0)
    assert torch.equal(h[3], torch.zeros(8))
    psi, pull_back = torch.func.vjp(lambda phi, g: supmer.regularize(phi, g, torch.ones(8)), phi, g)
    d_phi, d_g = pull_back(torch.ones_like(psi))
    assert all(x.isfinite().all() for x in (psi, d_g, *d_phi.values()))
    assert not torch.allclose(psi[0].norm(), g[0].norm(), rtol=1e-3)


@pytest.mark.parametrize("size", [0.0, 1e4, -1e4])
def test_gate_stays_in_its_range_with_finite_gradients(size):
    """However extreme W H is, 0 <= z <= 1 and L_reg's gradient is finite."""
    phi = supmer.init_regularizer(4)
    phi["c"] = phi["c"] + size
    z = supmer.gate(phi, torch.ones(4))
    assert ((0 <= z) & (z <= 1)).all()
    assert all(
        x.isfinite().all()
        for x in torch.func.grad(supmer.gate_loss)(phi, torch.ones(4), 0.3).values()
    )


def test_gate_input_ignores_padding():
    """Each example's mean over its own positions only: literal numbers."""
    H = torch.tensor([[[1.0], [3.0], [100.0]], [[2.0], [4.0], [6.0]]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert torch.equal(supmer.gate_input(H, mask), torch.tensor([[2.0], [4.0]]))


# ----------------------------------------------------------- the method: the curriculum (Eq. 4, 10)


@pytest.mark.parametrize(
    "s, curve, b",
    [(-1, 2, 0.0), (0, 2, math.sqrt(2) - 1), (1, 2, 1.0), (0, 1, 0.5), (0.5, 4, (4**0.75 - 1) / 3)],
)
def test_curriculum_by_hand(s, curve, b):
    """Eq. 10 at s = -1, 0, 1, its limit at m = 1, and one more."""
    assert supmer.curriculum(s, curve) == pytest.approx(b, abs=1e-15)


def test_lambda_is_zero_at_b_zero_and_has_the_beta_mean():
    """lambda ~ Beta(b alpha, alpha): 0 at b = 0, mean b / (1 + b), in [0, 1], one number per (seed,
    step, task).
    """
    assert supmer.draw_lambda(0.0, 1.0, 1, 2, 3) == 0.0
    for b in (0.05, 0.5, 1.0):
        draws = np.array([supmer.draw_lambda(b, 1.0, 10, step, 0) for step in range(4000)])
        assert ((0 <= draws) & (draws <= 1)).all()
        assert abs(draws.mean() - b / (1 + b)) < 4 * draws.std() / math.sqrt(len(draws))
    assert (
        supmer.draw_lambda(0.5, 1.0, 1, 2, 3)
        == supmer.draw_lambda(0.5, 1.0, 1, 2, 3)
        != supmer.draw_lambda(0.5, 1.0, 1, 2, 4)
    )


def test_mix_by_hand():
    """Eq. 4 on literal states: padding zeroed before mixing, the union of the masks, label weights
    added.
    """
    H, mask, Y = supmer.mix(
        torch.tensor([[[2.0], [4.0], [50.0]]]),
        torch.tensor([[True, True, False]]),
        torch.tensor([[1.0, 0.0]]),
        torch.tensor([[[10.0], [20.0], [30.0], [40.0]]]),
        torch.tensor([[True] * 4]),
        torch.tensor([[0.0, 1.0]]),
        0.25,
    )
    assert torch.equal(H, torch.tensor([[[4.0], [8.0], [7.5], [10.0]]]))
    assert torch.equal(mask, torch.tensor([[True] * 4])) and torch.equal(
        Y, torch.tensor([[0.75, 0.25]])
    )


def test_equal_labels_mix_to_one_hot():
    """Label weights are added: two examples of one class stay a certain example of it."""
    one = (torch.zeros(1, 2, 1), torch.ones(1, 2, dtype=torch.bool), torch.tensor([[0.0, 1.0]]))
    assert torch.equal(supmer.mix(*one, *one, 0.3)[2], torch.tensor([[0.0, 1.0]]))


def test_no_mixing_encodes_no_partner(world, monkeypatch):
    """At lambda = 0 the query gradient equals that of the unmixed query, to the last bit, and takes
    half the encodings.
    """
    rows = []
    monkeypatch.setattr(
        supmer,
        "encode",
        lambda t5, x, mask, encode=supmer.encode: rows.append(len(x)) or encode(t5, x, mask),
    )
    v, _, _ = supmer.prompt_gradient(
        world.t5, world.theta, world.task.query, world.method, world.partner.query, 0.0
    )
    assert sum(rows) == len(world.task.query.ids)
    g, _, _ = supmer.prompt_gradient(world.t5, world.theta, world.task.query, world.method)
    assert torch.equal(v, g)


# -------------------------------------------------------------------------- the method: whole steps


def small_state(method, dtype=torch.float32, P=3, d=8):
    t5 = random_t5(d, dtype=dtype)
    return t5, supmer.init_state(supmer.init_prompt(t5, P, 0), supmer.init_regularizer(d), method)


def test_meta_step_is_adam_on_the_mean_with_clip_and_linear_decay():
    """The step equals Adam by hand: mean over tasks, norm clipped at 1, rate (1 - step/steps)
    b1; s is the mean cosine.
    """
    method = Method(inner_rate=5.0, steps=10, micro_tokens=40, clip=0.01)
    t5, state = small_state(method)
    state.step, state.s = 4, 0.2
    theta, phi = state.theta.clone(), {name: value.clone() for name, value in state.phi.items()}
    tasks = [(random_task(1), random_task(2)), (random_task(3), random_task(4))]
    b = supmer.curriculum(0.2, 2.0)
    parts = [
        supmer.meta_gradient(
            t5, theta, phi, task, partner, supmer.draw_lambda(b, 1.0, 7, 4, i), b, method
        )
        for i, (task, partner) in enumerate(tasks)
    ]
    gradient = (parts[0].d_theta + parts[1].d_theta) / 2
    gradient = gradient * (0.01 / (gradient.norm() + 1e-6))
    supmer.meta_step(t5, state, tasks, method, seed=7)
    # Adam's first step from zero moments is rate * g / (|g| + eps), whatever the betas
    by_hand = theta - 0.1 * (1 - 4 / 10) * gradient / (gradient.abs() + 1e-8)
    assert torch.allclose(state.theta, by_hand, atol=1e-6)
    assert state.s == pytest.approx(float(parts[0].s + parts[1].s) / 2) and state.step == 5
    a = (parts[0].d_phi["a"] + parts[1].d_phi["a"]) / 2
    assert torch.allclose(state.phi["a"], phi["a"] - 1e-4 * 0.6 * a.sign(), atol=1e-7)


def test_ablations_leave_out_what_they_name():
    """Table 4's rows by step: without the regularizer phi stays the identity; without augmentation
    lambda is 0 and L_reg is no part of phi's gradient; without the curriculum lambda is drawn at
    b = 0 as well, where the curriculum has 0.
    """
    tasks = [(random_task(1), random_task(2))]

    def step(**choices):
        t5, state = small_state(method := Method(inner_rate=5.0, gate_weight=1e6, **choices))
        return supmer.meta_step(t5, state, tasks, method, seed=7), state.phi
    log, phi = step()
    start = supmer.init_regularizer(8)
    assert log["lambda"] == [0.0] and not torch.equal(phi["c"], start["c"])
    log, phi = step(regularizer=False)
    assert all(torch.equal(phi[name], start[name]) for name in phi)
    log, _ = step(augmentation=False)
    assert log["lambda"] == [0.0] and log["phi_gradient_gate"] == 0 < log["gate_loss"]
    log, _ = step(curriculum=False)
    assert log["b"] == 0 and 0 < log["lambda"][0] < 1
    assert log["lambda"][0] == supmer.draw_lambda(1.0, 1.0, 7, 0, 0)


def test_meta_step_stops_on_numbers_that_are_not_finite():
    """A NaN in the weights stops the step with its number and a remedy, and changes nothing."""
    method = Method()
    t5, state = small_state(method)
    t5.weights["lm_head.weight"][0, 0] = float("nan")
    before = state.theta.clone()
    with pytest.raises(T.InputError, match="step 0.*not finite.*inner_rate"):
        supmer.meta_step(t5, state, [(random_task(1), random_task(2))], method, 0)
    assert torch.equal(state.theta, before) and state.step == 0


def test_meta_training_lowers_the_loss_after_adaptation():
    """Forty steps on one planted task: the query loss falls, and the inner step lowers it further.
    """
    method = Method(relative_step=0.05, prompt_rate=0.2, steps=40)
    t5, state = small_state(method)
    planted = random_examples(9, 3, longest=6)
    task = data.Task(
        "sp-next", (0,), planted, planted._replace(ids=[row[:1] + row for row in planted.ids])
    )
    before = supmer.validate_task(t5, state.theta, state.phi, task, method)
    for _ in range(40):
        supmer.meta_step(t5, state, [(task, task)], method, 0)
    after = supmer.validate_task(t5, state.theta, state.phi, task, method)
    assert after["after"]["loss"] < before["after"]["loss"] - 1
    assert after["after"]["loss"] < after["before"]["loss"]
    assert after["step_size"] == pytest.approx(0.05, rel=1e-3)


def test_validation_measures_the_query_set_before_and_after():
    """measure() on literal scores: nll over the vocabulary, cross entropy over the words, number
    correct.
    """
    scores = torch.log(torch.tensor([[0.2, 0.6], [0.3, 0.1]]))
    found = supmer.measure(scores, torch.tensor([1, 1]))
    assert found["correct"] == 1
    assert found["loss"] == pytest.approx(-(math.log(0.6) + math.log(0.1)) / 2)
    assert found["word_loss"] == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)


def test_bfloat16_weights_do_not_swallow_the_inner_step():
    """A step of 1/300 of the prompt's length, below bfloat16's resolution, still lowers the loss as
    in float32.
    """
    wide = random_t5(32, dtype=torch.float32, gated=False)
    narrow = T.T5(wide.config, {name: w.bfloat16() for name, w in wide.weights.items()})
    rounded = T.T5(wide.config, {name: w.float() for name, w in narrow.weights.items()})
    theta, examples = supmer.init_prompt(wide, 3, 0) * 20, random_examples(24, 1, d=32)
    g, _, _ = supmer.prompt_gradient(rounded, theta, examples, Method())
    adapted = theta - theta.norm() / 300 * g / g.norm()

    def drop(t5):
        return float(
            supmer.prompt_gradient(t5, adapted, examples, Method())[2]
            - supmer.prompt_gradient(t5, theta, examples, Method())[2]
        )

    assert drop(rounded) < -0.02
    assert drop(narrow) == pytest.approx(drop(rounded), rel=0.5)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here: torch.cuda.is_available() is false"
)
def test_meta_gradient_on_a_gpu_equals_the_cpus(world):
    """The same float64 task on CUDA gives the same gradients: nothing in the kernel assumes a CPU.
    """
    there = T.T5(world.t5.config, {name: w.cuda() for name, w in world.t5.weights.items()})
    part = supmer.meta_gradient(
        there,
        world.theta.cuda(),
        {name: x.cuda() for name, x in world.phi.items()},
        world.task,
        world.partner,
        world.lam,
        world.b,
        world.method,
    )
    reference = computed(world, world.method)
    assert relative(part.d_theta.cpu(), reference["theta"]) < 1e-9
    assert all(relative(part.d_phi[name].cpu(), reference[name]) < 1e-9 for name in world.phi)


SUPMER_DATA = os.environ.get("SUPMER_DATA")


# ------------------------------------------------------------------------------ data: a small world

def write_model(folder, words):
    """A model folder with a tokenizer of one piece a word, weights never read -> both."""
    pieces = ["<pad>", "</s>", "<unk>", *dict.fromkeys(words),
              *(f"<extra_id_{i}>" for i in range(9, -1, -1))]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)},
                                           unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {piece for piece in pieces if piece[0] == "<"} - {"<unk>"}
    tokenizer.add_special_tokens(sorted(special))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    config = SimpleNamespace(vocab_size=len(pieces))
    return folder, data.load_tokenizer(folder, config)


TEMPLATE_WORDS = [".", "?", "A.", "B.", "C.", "D.", "Answer:", "yes", "no", "maybe", "A", "B", "C",
                  "D"]


def sentence(document, number):
    """A sentence of the planted corpus; its first word is its topic, one of five."""
    return f"T{(7 * document + number) % 5} d{document} s{number} end."


def by_topic(tokenizer):
    """An embedding that tells only topics apart: (B, 5), one-hot of the sentence's first word."""
    first = tokenizer.token_to_id("T0")
    return lambda ids, mask: torch.eye(5)[ids[:, 0] - first]


def planted_paths(folder, documents=200, length=40):
    path = folder / "corpus.jsonl"
    lines = [json.dumps({"text": " ".join(sentence(d, s) for s in range(length))})
             for d in range(documents)]
    path.write_text("\n".join(lines))
    return [path]


def held_out_documents(store):
    return np.flatnonzero(store.held_out[store.first]).tolist()


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    """200 documents of 40 sentences on five topics -> (tokenizer, store, index)."""
    folder = tmp_path_factory.mktemp("planted")
    words = [*(f"T{i}" for i in range(5)), *(f"d{i}" for i in range(200)),
             *(f"s{i}" for i in range(40)), "end."]
    model, tokenizer = write_model(folder / "model", words + TEMPLATE_WORDS)
    store = data.build_store(folder / "store", planted_paths(folder), tokenizer, None, 5, 0,
                             model=model,
                             embed=by_topic(tokenizer))
    return tokenizer, store, TaskIndex(store, tokenizer)


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


# ---------------------------------------------------------------------------------- data: documents

def tar_of(members):
    """A tar {name: bytes}, as bytes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def openwebtext_tar(path, parts):
    """A tar of .xz files, each a tar.xz of documents, as the subsets of OpenWebText are."""
    with tarfile.open(path, "w") as outer:
        for i, texts in enumerate(parts):
            inner_file = io.BytesIO()
            with tarfile.open(fileobj=inner_file, mode="w:xz") as inner:
                for j, text in enumerate(texts):
                    member = tarfile.TarInfo(f"{j:07}-abc.txt")
                    member.size = len(text)
                    inner.addfile(member, io.BytesIO(text))
            member = tarfile.TarInfo(f"openwebtext/urlsf_subset00-{i}_data.xz")
            member.size = inner_file.tell()
            inner_file.seek(0)
            outer.addfile(member, inner_file)


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
    monkeypatch.setattr(data, "LONGEST", 8)
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


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=5), st.integers(16, 80))
def test_truncation_keeps_the_template_and_as_much_text_as_fits(lengths, limit):
    """Never over the limit; each text keeps its beginning; one more token for the texts that were
    cut would not fit."""
    parts = [part for i in range(len(lengths)) for part in (str(i), [100 + i])] + [[99]]
    ids, _ = fill_template(parts, {str(i): [10 + i] * n for i, n in enumerate(lengths)}, limit)
    kept = [ids.count(10 + i) for i in range(len(lengths))]
    cap = max(kept)
    template = [i for i in ids if i >= 99]
    assert len(ids) <= limit and template == [100 + i for i in range(len(lengths))] + [99]
    assert kept == [min(n, cap) for n in lengths]
    assert kept == lengths or sum(min(n, cap + 1) for n in lengths) > limit - 2 - len(lengths)


def test_text_cannot_put_in_markers(tmp_path):
    """A corpus or a review that contains `<extra_id_0>` or `</s>` adds no second mask and no early
    end."""
    _, tokenizer = write_model(tmp_path, ["a", "b", "It", "was", "?"])
    task = data.LabeledTask("", "", words=("a", "b"))
    rows = [data.Row(0, {"text": "a <extra_id_0> b </s> a <pad>"})]
    examples = data.task_examples(tokenizer, task, rows)
    source, target = data.examples_as_text(tokenizer, examples, 0)
    assert (source, target) == ("a b a It was <extra_id_0> ?</s>", "a")


def test_a_label_word_outside_the_vocabulary_is_refused(tmp_path):
    """Neither <unk> nor an empty word can be scored."""
    _, tokenizer = write_model(tmp_path, ["great"])
    assert data.decoder_targets(tokenizer, ["great"]) == [[tokenizer.token_to_id(MASK), 3]]
    for word in ("unseen", ""):
        with pytest.raises(InputError, match=f"{word!r} is not in the model's vocabulary"):
            data.decoder_targets(tokenizer, ["great", word])


def test_a_template_has_one_mask(tmp_path):
    """Without a mask, or with two, there is nothing to predict."""
    _, tokenizer = write_model(tmp_path, ["a"])
    for template in ("{text} a", "<X> {text} <X>"):
        with pytest.raises(InputError, match="exactly once"):
            data.compile_template(tokenizer, template)


def test_tokenizers_that_do_not_fit_the_model_are_refused(tmp_path):
    """Missing, broken, of another size in either direction, without sentinels, with other special
    ids."""
    def refused(says, vocab_size=13):
        with pytest.raises(InputError, match=says):
            data.load_tokenizer(tmp_path, SimpleNamespace(vocab_size=vocab_size))
    refused("is missing")
    path = write_model(tmp_path, [])[0] / "tokenizer.json"
    good = path.read_text()
    for vocab_size in (12, 141, 32128):
        refused("13 pieces", vocab_size)
    for broken in (good[:-20], "{}", "[]", "text"):
        path.write_text(broken)
        refused("is not a tokenizer")
    path.write_bytes(b"\xff\xfe")
    refused("is not a tokenizer")
    for old, new in (("<extra_id_0>", "<mask>"), ("</s>", "<eos>"), ("<pad>", "[PAD]")):
        path.write_text(good.replace(old, new))
        refused("take a T5's")


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
    plain = data.collate(data.Examples([[3, 1]], [[]], torch.empty(1, 0, 0), torch.tensor([1]),
                                       [[5, 6], [5, 7]]), [0])
    assert plain.slots.shape == (1, 0) and plain.slots.dtype == torch.long


@needs_data
def test_ids_equal_those_of_transformers():
    """1,000 sources from real sentences with the official tokenizer: ids put together from parts
    equal what transformers gives for the whole string, sentinel and </s> included; and the label
    words are single, word-initial pieces."""
    transformers = pytest.importorskip("transformers")
    folder = Path(SUPMER_DATA) / "t5_tokenizer"
    tokenizer = data.load_tokenizer(folder, SimpleNamespace(vocab_size=32128))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"),
                                                  eos_token="</s>")
    files = sorted((Path(SUPMER_DATA) / "text").glob("*.jsonl.gz"))
    paragraphs = (p for file in files for d in documents([file], max_bytes=500_000) for p in d)
    texts = [s for paragraph in paragraphs for s in split_sentences(paragraph)]
    texts = np.random.default_rng(0).choice(texts, 2000, replace=False).tolist()
    parts = {form: data.compile_template(tokenizer, data.TEMPLATES[form]) for form in ("sp", "mc")}
    encoded = data.tokenize(tokenizer, texts)
    for i in range(1000):
        form, use = ("sp", 2) if i % 2 else ("mc", 5)
        rows = [i, *np.random.default_rng(i).choice(2000, use - 1, replace=False)]
        joined = data.TEMPLATES[form].replace("<X>", data.MASK).format(*(texts[r] for r in rows))
        ours, _ = fill_template(parts[form], dict(zip("01234", (encoded[r] for r in rows))),
                                max_tokens=10**6)
        assert ours == theirs(joined).input_ids, joined
    targets = data.decoder_targets(tokenizer, ["yes", "no", "maybe", *"ABCD"])
    assert targets == [[32099, piece] for piece in (4273, 150, 2087, 71, 272, 205, 309)]
    assert data.tokenize(tokenizer, ["translate English to German: That is good."]) == \
        [[13959, 1566, 12, 2968, 10, 466, 19, 207, 5]]


# ---------------------------------------------------------------------------------- data: the store

def test_short_sentences_join_their_neighbours():
    """The docstring's cases; nothing is lost or reordered unless the whole document is too
    short."""
    assert data.join_short([[7, 5], [1, 2, 3, 4], [6, 7, 8, 9], [3]]) == [[7, 5, 1, 2, 3, 4],
                                                                          [6, 7, 8, 9, 3]]
    assert data.join_short([[1], [2], [3], [4], [5]]) == [[1, 2, 3, 4, 5]]
    assert data.join_short([[3]]) == data.join_short([]) == []


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
    new = data.build_store(tmp_path / "s", planted_paths(tmp_path, 30), tokenizer, None, 7, 3,
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
    new = data.build_store(tmp_path / "s", paths, tokenizer, None, 5, 0,
                           model=write_model(tmp_path / "m", [])[0],
                           embed=spy, progress=progress)
    held_out = {tokenizer.token_to_id(f"d{d}") for d in held_out_documents(new)}
    assert len(held_out) == 10 and len(seen) > 150 and not seen & held_out
    assert done["embedding a sample"] == 5 * data.SAMPLE and done["assigning clusters"] == 8000


def test_repeated_texts_are_no_anchors(planted, tmp_path):
    """Of equal sentences only the first can be an anchor."""
    tokenizer = planted[0]
    text = " ".join(sentence(0, number) for number in (0, 1, 0))
    others = [sentence(document, document) for document in range(5)]
    (tmp_path / "a.txt").write_text("\n\n".join([text, text, *others]))
    store = data.build_store(tmp_path / "s", [tmp_path / "a.txt"], tokenizer, None, 1, 0,
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
    H = data.embed_sentences(t5, ids, torch.arange(5) < torch.tensor([[3], [1], [5]]))
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
    for positions, H in data._embedded(tokens, offsets, rows, embed, 200):
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
    return data.build_store(tmp_path / cache, [tmp_path / "corpus.jsonl"], tokenizer, None,
                            **arguments)


@pytest.mark.parametrize("left", [None, 0, 9])
def test_a_half_made_store_that_lost_text_is_dropped(planted, tmp_path, left):
    """Where a crash of the machine cost a file its end, no zeros take its place: it is told, and
    the next call makes the whole store anew."""
    def stop(stage, done, total):
        if stage == "assigning clusters":
            raise KeyboardInterrupt
    whole = build_again(planted, tmp_path, "whole")
    for name in {*data.TEXT} - {"label"}:
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
    data.build_store(tmp_path, [tmp_path / "text"], planted[0], None, 3, 0, model=model,
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
    monkeypatch.setattr(data, "CHUNK", 64)
    lines = planted_paths(tmp_path, 10)[0].read_text().splitlines()
    for name, part in (("a", lines[:5]), ("b", lines[5:])):     # of 200 sentences each
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part))
    model, read, embed = write_model(tmp_path / "m", [])[0], data.documents, by_topic(planted[0])
    did, stop = Counter(), ("", 0, None)

    def spy(key, function, *arguments):
        did[key] += len(arguments[0])
        return function(*arguments)

    def progress(stage, done, total):
        if stage == stop[0] and done > stop[1]:
            raise stop[2]
    monkeypatch.setattr(data, "documents", partial(spy, "files", read))

    def build(cache):
        return data.build_store(tmp_path / cache, [tmp_path / "a.jsonl", tmp_path / "b.jsonl"],
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
        data.build_store(tmp_path / "s", [tmp_path / "a.txt"], tokenizer, None, clusters, 0,
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
    data.atomic_write(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half")
        raise OSError("no space left on device")
    with pytest.raises(OSError, match="no space"):
        data.atomic_write(path, fail)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with open(path, "rb") as reader:
        data.atomic_write(path, lambda file: file.write(b"new"))
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
            found[rank] = work(data.Ranks(rank, world))
        except InputError as error:
            found[rank] = error
    monkeypatch.setattr(data, "distributed", SimpleNamespace(
        all_reduce=lambda total: total.copy_(sum(x.clone() for x in exchange(total.clone()))),
        all_gather_object=gather, barrier=exchange))
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("world", [2, 3, 7])
def test_a_step_is_the_same_on_any_number_of_ranks(world, monkeypatch):
    """theta, phi, s and the log of a step over two tasks, a micro-batch an example: in float64 to
    1e-12 what one rank finds, bit by bit alike on all, and no micro-batch is computed twice; with
    seven ranks, more than tasks and than a set has examples."""
    t5, counted = random_t5(), Counter()
    pairs = [(random_task(i), random_task(9 + i)) for i in range(2)]
    method = Method(micro_tokens=1, relative_step=0.1, exact_cosine=True)
    share = supmer.loss_share

    def step(ranks):
        theta = supmer.init_prompt(t5, 3, 0).double()
        state = supmer.init_state(theta, supmer.init_regularizer(8, torch.float64), method)
        state.s = 0.3
        log = supmer.meta_step(t5, state, pairs, method, 0, ranks)
        return torch.cat([state.theta.flatten(), *(x.flatten() for x in state.phi.values())]), log

    def count(*arguments):
        counted[threading.current_thread() is threading.main_thread()] += 1
        return share(*arguments)
    monkeypatch.setattr(supmer, "loss_share", count)
    alone, log = step(data.SOLO)
    found = on_ranks(monkeypatch, world, step)
    assert counted[True] == counted[False]
    for learned, their_log in found:
        assert torch.equal(learned, found[0][0]) and relative(learned, alone) < 1e-12
        assert set(their_log) == set(log) and abs(their_log["s"] - log["s"]) < 1e-12


def test_ranks_make_one_store(planted, tmp_path, monkeypatch):
    """Three ranks share the embedding, each sentence once, and the store is byte for byte one
    rank's, though an embedding's last bits depend on what is in its batch; so it is with more ranks
    than batches. Ranks with other corpora, or that see another store, are told so."""
    monkeypatch.setattr(data, "CHUNK", 64)
    embedded = Counter()

    def build(ranks, cache="together"):
        def count(ids, mask):
            embedded[ranks.rank] += len(ids)
            return by_topic(planted[0])(ids, mask) + 1e-4 * (ids.sum() % 97)
        return build_again(planted, tmp_path, cache, embed=count, ranks=ranks)
    alone = build(data.SOLO, "alone")
    embedded.clear()
    stores = on_ranks(monkeypatch, 3, build)
    for file in sorted(alone.folder.iterdir()):
        assert file.read_bytes() == (stores[2].folder / file.name).read_bytes(), file
    assert sum(embedded.values()) == 18 * 40 + 800 + 3 and min(embedded.values()) > 400
    monkeypatch.setattr(data, "CHUNK", 10 ** 4)
    monkeypatch.setitem(data.BATCH_TOKENS, "cpu", 10 ** 6)          # two ranks find no batch
    few = [build(data.SOLO, "few"), *on_ranks(monkeypatch, 3, lambda ranks: build(ranks, "fewer"))]
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
    held = data.lock(building / "lock", lambda owner: pytest.fail("nobody has it"))

    def progress(stage, done, total):
        said.append(stage)
        store.folder.rename(tmp_path / "cache" / store.folder.name)
        held.close()
    again = build_again(planted, tmp_path, progress=progress)
    assert said == [f"waiting for process {os.getpid()}, which makes the same store"]
    assert again.meta == store.meta and not building.exists()


# --------------------------------------------------------------------------------- data: meta tasks

def parsed(source):
    """The planted sentences of a source as (topic, document, number), in order."""
    return [tuple(map(int, found)) for found in re.findall(r"T(\d) d(\d+) s(\d+) end\.", source)]


def relation(a, b):
    """What b is to a in the planted corpus, read off the text alone."""
    (_, document, number), (_, other, following) = a, b
    return "far" if document != other else "next" if following == number + 1 else \
        "adjacent" if following == number - 1 else "self" if following == number else "near"


PAIR = r"T\d d\d+ s\d+ end\. <extra_id_0> \. T\d d\d+ s\d+ end\.</s>"
CHOICE = r"T\d d\d+ s\d+ end\. \? A\. {0} B\. {0} C\. {0} D\. {0} \. Answer: <extra_id_0></s>"
SENTENCES, VECTORS = CHOICE.format(r"T\d d\d+ s\d+ end\."), CHOICE.format(r"\[vector\]")


@pytest.mark.parametrize("variant, source, target", [
    ("sp-next", PAIR, "yes no maybe"), ("sp-cluster", PAIR, "yes no"),
    ("mc-next", SENTENCES, "A B C D"),
    ("mc-cluster", SENTENCES, "A B C D"), ("ss-cluster", VECTORS, "A B C D"),
])
def test_each_variant_says_what_the_corpus_says(planted, variant, source, target):
    """Eq. 17-19 and section 3.2: over ten tasks each source has the exact form, and its label is
    what the sentences' places in the planted corpus (read off the text) make it."""
    tokenizer, store, index = planted
    topic_of = {int(store.cluster[0][i]): (7 * d + s) % 5 for i, (d, s) in
                enumerate((d, s) for d in range(200) for s in range(40))}
    for step in range(10):
        task = meta_task(index, 0, step, 0, variant=variant, stream=1)
        for examples in (task.support, task.query):
            for row in range(32):
                text, answer = data.examples_as_text(tokenizer, examples, row)
                assert re.fullmatch(source, text) and answer in target.split()
                anchor, *others = parsed(text)
                relations = [relation(anchor, other) for other in others]
                same = [anchor[0] == other[0] for other in others]
                if variant == "sp-next":
                    assert {"next": "yes", "far": "no", "near": "maybe"}[relations[0]] == answer
                elif variant == "sp-cluster":
                    assert same == [answer == "yes"] and relations != ["self"]
                elif variant == "mc-next":
                    assert sorted(relations) == ["far", "far", "near", "next"]
                    assert "ABCD"[relations.index("next")] == answer
                elif variant == "mc-cluster":
                    assert sum(same) == 1 and "ABCD"[same.index(True)] == answer
                else:
                    assert topic_of[task.clusters["ABCD".index(answer)]] == anchor[0]
                assert len({anchor, *others}) == 1 + len(others)
                assert variant[:2] == "ss" or topic_of[task.clusters[0]] == anchor[0]


LITERAL = {     # target -> source: the first of each label, at most three, in the first task
    "sp-next": {
        "yes": "T4 d130 s4 end. <extra_id_0> . T0 d130 s5 end.</s>",
        "no": "T4 d47 s30 end. <extra_id_0> . T1 d50 s36 end.</s>",
        "maybe": "T4 d182 s15 end. <extra_id_0> . T3 d182 s9 end.</s>",
    },
    "sp-cluster": {
        "yes": "T4 d48 s38 end. <extra_id_0> . T4 d51 s22 end.</s>",
        "no": "T4 d187 s35 end. <extra_id_0> . T2 d13 s6 end.</s>",
    },
    "mc-next": {
        "A": "T4 d115 s29 end. ? A. T0 d115 s30 end."
             " B. T3 d96 s16 end. C. T3 d144 s5 end. D. T2 d115 s7 end."
             " . Answer: <extra_id_0></s>",
        "B": "T4 d164 s31 end. ? A. T4 d93 s23 end."
             " B. T0 d164 s32 end. C. T4 d74 s21 end. D. T4 d164 s16 end."
             " . Answer: <extra_id_0></s>",
        "C": "T4 d43 s8 end. ? A. T4 d43 s38 end."
             " B. T2 d152 s28 end. C. T0 d43 s9 end. D. T4 d112 s25 end."
             " . Answer: <extra_id_0></s>",
    },
    "mc-cluster": {
        "A": "T4 d95 s39 end. ? A. T4 d172 s0 end."
             " B. T1 d157 s17 end. C. T1 d191 s34 end. D. T3 d194 s10 end."
             " . Answer: <extra_id_0></s>",
        "B": "T4 d91 s12 end. ? A. T0 d107 s36 end."
             " B. T4 d76 s37 end. C. T0 d127 s36 end. D. T2 d191 s20 end."
             " . Answer: <extra_id_0></s>",
        "C": "T4 d44 s6 end. ? A. T3 d20 s18 end."
             " B. T1 d9 s3 end. C. T4 d198 s28 end. D. T0 d56 s8 end."
             " . Answer: <extra_id_0></s>",
    },
    "ss-cluster": {
        "A": "T0 d61 s23 end. ? A. [centroid 3]"
             " B. [centroid 4] C. [centroid 2] D. [centroid 0] . Answer: <extra_id_0></s>",
        "B": "T3 d198 s32 end. ? A. [centroid 3]"
             " B. [centroid 4] C. [centroid 2] D. [centroid 0] . Answer: <extra_id_0></s>",
        "C": "T2 d114 s34 end. ? A. [centroid 3]"
             " B. [centroid 4] C. [centroid 2] D. [centroid 0] . Answer: <extra_id_0></s>",
    },
}


@pytest.mark.parametrize("variant, literal", LITERAL.items())
def test_each_variant_literally(planted, variant, literal):
    """Whole strings out of the planted corpus, to be checked by eye: topic, document, place."""
    tokenizer, _, index = planted
    task = meta_task(index, 0, 0, 0, variant=variant, stream=1)
    shown = {}
    for row in range(32):
        names = task.clusters if variant[:2] == "ss" else ()
        source, target = data.examples_as_text(tokenizer, task.support, row, names)
        shown.setdefault(target, source)
    assert {target: shown[target] for target in literal} == literal


def test_centroids_stand_at_the_letters(planted):
    """ss: four slots, each right after its letter, holding this task's centroids unscaled, shown by
    their cluster."""
    tokenizer, store, index = planted
    task = meta_task(index, 0, 3, 0, variant="ss-cluster", stream=1)
    letters = [tokenizer.token_to_id(letter) for letter in ("A.", "B.", "C.", "D.")]
    for examples in (task.support, task.query):
        centroids = torch.from_numpy(store.centroids[2][list(task.clusters)])
        assert torch.equal(examples.vectors, centroids.expand(32, 4, 5))
        for ids, slots in zip(examples.ids, examples.slots):
            assert [ids[slot - 1] for slot in slots] == letters
            assert [ids[slot] for slot in slots] == [data.UNK] * 4
    source, _ = data.examples_as_text(tokenizer, task.support, 0, task.clusters)
    assert [int(c) for c in re.findall(r"\[centroid (\d)\]", source)] == list(task.clusters)


def test_a_thousand_tasks_are_balanced_and_honest(planted):
    """Over 1,000 tasks of both splits: labels balanced within one in each set, the extra one and
    the right answer's place uniform; anchors of one cluster; support and query share no anchor and
    no example; training tasks hold no held-out document, validation tasks no other; all five
    variants come up alike."""
    tokenizer, store, index = planted
    document_of = {tokenizer.token_to_id(f"d{d}"): d for d in range(200)}
    held_out = set(held_out_documents(store))
    topics = {tokenizer.token_to_id(f"T{i}") for i in range(5)}
    variants, labels, extras = Counter(), Counter(), Counter()
    for step in range(1000):
        split = "validation" if step % 5 == 0 else "train"
        task = meta_task(index, 7, step, step % 4, split=split, stream=1)
        variants[task.variant] += 1
        for examples in (task.support, task.query):
            counts = np.bincount(examples.labels, minlength=len(examples.words))
            assert counts.sum() == 32 and counts.max() - counts.min() <= 1
            assert len(counts) == len(data.WORDS[task.variant])
            labels.update((task.variant, int(label)) for label in examples.labels[:8])
            extras.update([int(counts.argmin())] if task.variant == "sp-next" else [])
            shown = {document_of[id] for ids in examples.ids for id in ids if id in document_of}
            assert shown <= held_out if split == "validation" else not shown & held_out
            assert all(ids.count(tokenizer.token_to_id(data.MASK)) == 1 and ids[-1] == 1
                       for ids in examples.ids)
        anchors = [tuple(ids[:4]) for ids in task.support.ids + task.query.ids]
        assert len(set(anchors)) == 64 and {anchor[0] for anchor in anchors} <= topics
        ways = 4 if task.variant == "ss-cluster" else 1
        assert len({anchor[0] for anchor in anchors}) == len(task.clusters) == ways
    assert min(variants.values()) > 150 and len(variants) == 5
    for variant in VARIANTS:
        found = [labels[variant, k] for k in range(len(data.WORDS[variant]))]
        assert max(found) < 1.25 * min(found), (variant, found)     # of the first eight rows
    assert min(extras[k] for k in range(3)) > 0.6 * max(extras.values())


def test_a_task_is_a_pure_function_of_its_arguments(planted):
    """Whatever was drawn before, and for a variant drawn or given; any other number gives another
    task."""
    _, store, index = planted
    task = meta_task(index, 1, 2, 3, stream=4)
    np.random.seed(0)
    for step in range(5):
        meta_task(index, 1, step, 3, stream=4)
    fresh = TaskIndex(store, planted[0])
    for other in (meta_task(index, 1, 2, 3, stream=4),
                  meta_task(fresh, 1, 2, 3, stream=4, variant=task.variant)):
        assert other.support.ids == task.support.ids and other.query.ids == task.query.ids
        assert torch.equal(other.query.labels, task.query.labels)
    for seed, step, i, stream in ((0, 2, 3, 4), (1, 1, 3, 4), (1, 2, 2, 4), (1, 2, 3, 5)):
        other = meta_task(index, seed, step, i, stream=stream, variant=task.variant)
        assert other.support.ids != task.support.ids


def synthetic_store(folder, n):
    """A store of n sentences of 12 random tokens, 25 a document, in up to 250 random clusters."""
    rng, K = np.random.default_rng(0), min(250, n // 4000)
    columns = {"tokens": rng.integers(3, 2000, 12 * n, dtype=np.uint16),
               "offsets": np.arange(n + 1, dtype=np.int64) * 12,
               "first": np.arange(0, n, 25), "label": np.empty(0, np.int16),
               "held_out": np.repeat(rng.random(n // 25) < 0.05, 25), "anchor": np.ones(n, bool),
               "cluster": rng.integers(0, K, n, dtype=np.int32)}
    columns["order"], bounds = data.group_anchors(*(columns[name] for name in (
        "cluster", "held_out", "anchor", "first")), K)
    folder.mkdir()
    for name, values in columns.items():
        values.tofile(folder / f"{name}.bin")
    np.save(folder / "bounds.npy", bounds[None])
    np.save(folder / "centroids.npy", np.zeros((1, K, 8), np.float32))
    (folder / "meta.json").write_text(json.dumps({"made_of": {}, "counts": {
        "sentences": n, "documents": n // 25}}))
    return data.open_store(folder)


def time_sampling(n, folder="cache/synthetic"):
    """Print how long opening a synthetic store of n sentences and drawing from it take: cold (its
    pages not in memory) and warm. From a command line, see README.md; not a test."""
    model, tokenizer = write_model(Path(folder) / "m", TEMPLATE_WORDS + list(map(str, range(2000))))
    store = synthetic_store(Path(folder) / str(n), n)
    for path in store.folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.perf_counter()
    index = TaskIndex(data.open_store(store.folder), tokenizer)
    print(f"{n:,} sentences: opened in {time.perf_counter() - began:.3f} s", end="")
    for name, steps in (("cold", range(20)), ("warm", [*range(20)] * 5)):
        began = time.perf_counter()
        for step in steps:
            meta_task(index, 0, step, 0, stream=1)
        print(f", {name} {(time.perf_counter() - began) / len(steps) * 1e3:.1f} ms a task", end="")
    print()
    shutil.rmtree(folder)


def test_an_index_does_not_grow_with_the_sentences(tmp_path):
    """What it holds beside the mapped store is a few numbers a document and a cluster."""
    tokenizer = write_model(tmp_path / "m", TEMPLATE_WORDS)[1]
    held = []
    for n in (50_000, 100_000):
        store = synthetic_store(tmp_path / str(n), n)
        index = TaskIndex(store, tokenizer)
        own = [index.first, *(x for pair in index.documents.values() for x in pair),
               *(x for pool in index.pools.values() for x in (pool.start, *pool.count.values()))]
        assert all(np.may_share_memory(x.order, store.order) for x in index.pools.values())
        assert set(vars(index)) == {"store", "sizes", "max_tokens", "variants", "parts", "words",
                                    "first", "documents", "pools", "usable"}
        held.append(sum(x.nbytes for x in own) / (n // 25))
    assert max(held) < 30 and held[1] < 1.01 * held[0]              # bytes a document


def test_the_partner_is_another_task(planted):
    """avoid: never the same anchor cluster again, in ss never the same four in the same order."""
    tokenizer, store, _ = planted
    index = TaskIndex(store, tokenizer, support=4, query=4)
    for variant in VARIANTS:
        for step in range(40):
            task = meta_task(index, 0, step, 0, variant=variant, stream=1)
            partner = meta_task(index, 0, step, 0, variant=variant, stream=2, avoid=task.clusters)
            assert partner.clusters != task.clusters


def test_variants_can_be_chosen(planted):
    """An index of some variants draws only those."""
    tokenizer, store, _ = planted
    index = TaskIndex(store, tokenizer, support=4, query=6, variants=("mc-next", "ss-cluster"),
                      max_tokens=20)
    tasks = [meta_task(index, 0, step, 0, stream=1) for step in range(40)]
    choices = [task for task in tasks if task.variant == "mc-next"]
    assert {len(ids) for task in choices for ids in task.query.ids} == {19}     # of 20
    assert {task.variant for task in tasks} == {"mc-next", "ss-cluster"}
    assert {(len(task.support.ids), len(task.query.ids)) for task in tasks} == {(4, 6)}


def test_mask_and_letters_survive_very_long_sentences(planted, tmp_path):
    """Of sentences of 412 tokens every source has at most 412, its whole template, and </s>."""
    words = [f"w{i}" for i in range(3000)]
    model, tokenizer = write_model(tmp_path / "m", words + TEMPLATE_WORDS)
    rng = np.random.default_rng(0)
    texts = [[" ".join(rng.choice(words, 500)) for _ in range(8)] for _ in range(80)]
    lines = [json.dumps({"paragraphs": paragraphs}) for paragraphs in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    store = data.build_store(tmp_path / "s", [tmp_path / "a.jsonl"], tokenizer, None, 4, 0,
                             model=model,
                             embed=lambda ids, mask: torch.eye(4)[ids[:, 0] % 4])
    assert store.meta["counts"]["long sentences cut"] == 640
    index = TaskIndex(store, tokenizer, support=2, query=2)
    mask = tokenizer.token_to_id(data.MASK)
    letters = [tokenizer.token_to_id(letter) for letter in ("A.", "B.", "C.", "D.")]
    for variant in VARIANTS:
        for step in range(20):
            for ids in meta_task(index, 0, step, 0, variant=variant, stream=1).support.ids:
                assert 405 < len(ids) <= 412 and ids.count(mask) == 1 and ids[-1] == 1
                assert variant[:2] == "sp" or [id for id in ids if id in letters] == letters
                assert ids[-2] == mask or variant[:2] == "sp" and mask in ids[200:-200]


def reclustered(store, cluster, K):
    """A store with other clusters, of which it is not said where they came from."""
    order, bounds = data.group_anchors(cluster[0], store.held_out, store.anchor, store.first, K)
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
    order, bounds = data.group_anchors(cluster, held_out, anchor, first, K)
    assert order.dtype == np.uint32 and len(bounds) == 4 * K + 1
    assert [order[a:b].tolist() for a, b in zip(bounds, bounds[1:])] == expected


def test_small_clusters_are_skipped(planted):
    """A cluster of 63 anchors is never drawn for tasks of 32 + 32, one of 64 is; their sentences
    still stand elsewhere."""
    tokenizer, store, _ = planted
    cluster, training = store.cluster.copy(), np.flatnonzero(~store.held_out)
    cluster[:, training[:63]], cluster[:, training[63:127]] = 5, 6
    small = reclustered(store, cluster, 7)
    index = TaskIndex(small, tokenizer, variants=("mc-cluster", "ss-cluster"))
    drawn = {c for step in range(150) for c in meta_task(index, 0, step, 0, stream=1).clusters}
    assert drawn == {0, 1, 2, 3, 4, 6}


def test_too_few_sentences_for_the_tasks_are_counted(planted):
    """The message says which variant and split, and how many sentences each cluster lacks."""
    tokenizer, store, _ = planted
    held_out = held_out_documents(store)
    last = np.bincount([(7 * d + 39) % 5 for d in held_out], minlength=5)   # nothing follows them
    says = "sp-next: validation sentences: .* have 100 usable ones, each one lacks (.*): give more"
    with pytest.raises(InputError, match=says) as caught:
        TaskIndex(store, tokenizer, support=50, query=50)
    found = re.match(says, str(caught.value)).group(1)
    assert sorted(map(int, found.split(", "))) == sorted(20 + last)
    says = r"at least 4 .* 100 usable ones, each one lacks 20, 20, 20, 20, 20: .* fewer clusters"
    with pytest.raises(InputError, match=says):
        TaskIndex(store, tokenizer, support=50, query=50, variants=("ss-cluster",))
    one = reclustered(store, np.zeros_like(store.cluster), 1)
    with pytest.raises(InputError, match="ask for more clusters"):
        TaskIndex(one, tokenizer, variants=("mc-cluster",))
    index = TaskIndex(one, tokenizer, variants=("sp-next",))
    with pytest.raises(InputError, match="mixing needs two"):
        meta_task(index, 0, 0, 0, stream=1, avoid=(0,))
    says = "sp-next: train .* at least 2 .* 64 usable ones, each one lacks 0: .* 2 clusters or more"
    with pytest.raises(InputError, match=says):
        TaskIndex(one, tokenizer, variants=("sp-next",), mixing=True)


def test_what_mixing_lacks_is_told_before_a_run_begins(small_world):
    """A partner task is of another cluster: with one, train.py says so before the first step."""
    with pytest.raises(InputError, match="sp-next: train .* 2 clusters or more"):
        make_run(small_world, "unmixed", clusters=1)


def test_a_corpus_of_one_sentence_repeated_is_refused_not_looped_over(planted):
    """Where all that can stand beside an anchor reads like it, drawing stops with an InputError."""
    tokenizer, store, _ = planted
    same = store._replace(tokens=np.full(len(store.tokens), 5, dtype=np.uint16))
    index = TaskIndex(same, tokenizer, variants=("sp-next",))
    with pytest.raises(InputError, match="too few different sentences"):
        meta_task(index, 0, 0, 0, stream=1)


def test_words_of_several_pieces_cannot_be_meta_labels(planted, tmp_path):
    """A tokenizer that cuts `maybe` in two is refused before any task is drawn."""
    model, tokenizer = write_model(tmp_path, [*TEMPLATE_WORDS, "ma", "be", "es"])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(),
                                                       pre_tokenizers.Split("y", "removed")])
    with pytest.raises(InputError, match="maybe, A, B, C, D must be a piece each"):
        TaskIndex(planted[1], tokenizer)


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
    assert data.load_train(data.TASKS["sst2"], tmp_path) == [data.Row(1, {"text": '"fine film'}),
                                                             data.Row(0, {"text": "no , thanks"})]
    assert data.load_test(data.TASKS["sst2"], tmp_path) == [data.Row(1, {"text": "ok ."})]
    (tmp_path / "tasks" / "movie").mkdir(parents=True)
    content = '1,"It works, and ""well"".\nTwice."\r\n0,caf\u00e9\n'
    (tmp_path / "tasks" / "movie" / "train.csv").write_text(content)
    found = data.load_train(data.TASKS["movie"], tmp_path)
    assert found == [data.Row(1, {"text": 'It works, and "well".\nTwice.'}),
                     data.Row(0, {"text": "caf\u00e9"})]
    with pytest.raises(InputError, match="test.csv is missing"):
        data.read_rows(tmp_path / "tasks" / "movie" / "test.csv", data.TASKS["movie"])


@pytest.mark.parametrize("content, says", [
    (b"", "no rows"), (b"text\tlabel\nok\t1\n", "line 1"), (b"sentence\tlabel\n", "no rows"),
    (b"sentence\tlabel\nok\t1\nok\t2\n", "line 3"),
    (b"sentence\tlabel\nok\tpositive\n", "line 2"),
    (b"sentence\tlabel\nok\t1\textra\n", "line 2"), (b"sentence\tlabel\nok\n", "line 2"),
    (b"sentence\tlabel\n \t1\n", "line 2"),
    (b"sentence\tlabel\ncaf\xe9\t1\n", "must be UTF-8"),
    ("sentence\tlabel\nok\t1\n".encode("utf-16"), "must be UTF-8"),
])
def test_bad_labeled_rows_are_refused_with_file_and_line(tmp_path, content, says):
    """A wrong header, label, number of columns, a blank text, other encodings: an InputError of one
    line."""
    write_sst2(tmp_path, content)
    with pytest.raises(InputError, match=says) as error:
        data.load_train(data.TASKS["sst2"], tmp_path)
    assert "train.tsv" in str(error.value) and "\n" not in str(error.value)


def test_a_csv_with_an_open_quote_is_refused(tmp_path):
    """It would swallow the rest of the file as one text."""
    (tmp_path / "tasks" / "nyt").mkdir(parents=True)
    (tmp_path / "tasks" / "nyt" / "train.csv").write_text('1,"never closed\n0,text\n')
    with pytest.raises(InputError, match="well quoted"):
        data.load_train(data.TASKS["nyt"], tmp_path)


def labeled_rows(counts):
    return [data.Row(label, {"text": f"text {label} {i}"})
            for label, n in enumerate(counts) for i in range(n)]


def test_few_shot_samples_are_balanced_disjoint_and_fixed():
    """16 + 16 a label, no text twice, the same for the same seed in whatever order rows come,
    another for another seed."""
    rows = labeled_rows([100, 50, 40])
    train, validation = data.few_shot(rows, 16, 10, 3)
    for part in (train, validation):
        assert Counter(row.label for row in part) == {0: 16, 1: 16, 2: 16}
    assert len({r.fields["text"] for r in train + validation}) == 96
    assert data.few_shot(rows[::-1], 16, 10, 3) == (train, validation)
    assert data.few_shot(rows, 16, 20, 3)[0] != train
    by_hash = sorted(rows[100:150],
                     key=lambda r: hashlib.sha256(f"10\t1\t{r.fields['text']}".encode()).digest())
    assert train[16:32] == by_hash[:16] and validation[16:32] == by_hash[16:32]


def test_few_shot_with_small_classes_duplicates_and_contradictions():
    """A class of 7 texts gives 3 and 3; a text that comes often, even under both labels, is used
    once."""
    train, validation = data.few_shot(labeled_rows([40, 7]), 16, 0)
    assert Counter(r.label for r in train) == Counter(r.label for r in validation) == {0: 16, 1: 3}
    rows = [data.Row(label, {"text": f"text {i}"}) for i in range(20) for label in (0, 1, 1)]
    for seed in range(20):
        sample = [r.fields["text"] for part in data.few_shot(rows, 4, seed) for r in part]
        assert len(set(sample)) == len(sample)
    for bad in (labeled_rows([5, 1]), labeled_rows([5]),
                labeled_rows([5]) + [data.Row(1, {"text": "same"})] * 3):
        with pytest.raises(InputError, match="label 1 has"):
            data.few_shot(bad, 16, 0)
    with pytest.raises(InputError, match="label 2 has 0"):
        data.few_shot(labeled_rows([5, 5]), 16, 0, 3)


def test_task_examples_literally(tmp_path):
    """`s It was <X> ?`, terrible and great; a long text is cut to the task's 128 tokens, the
    template stays."""
    _, tokenizer = write_model(tmp_path, "A fine film. It was ? terrible great".split())
    rows = [data.Row(1, {"text": "A fine film."}), data.Row(0, {"text": "A " * 300})]
    examples = data.task_examples(tokenizer, data.TASKS["sst2"], rows)
    end = "It was <extra_id_0> ?</s>"
    shown = [data.examples_as_text(tokenizer, examples, row) for row in (0, 1)]
    assert shown == [(f"A fine film. {end}", "great"), ("A " * 123 + end, "terrible")]
    assert len(examples.ids[1]) == 128 and examples.labels.tolist() == [1, 0]
    assert data.collate(examples, [0, 1]).ids.shape == (2, 128)


# A file of each format, by its task: what is written, what is read.
FORMATS = {
    "sst5": ('4,"so ""good"" ."\n0,bad\n', [(4, {"text": 'so "good" .'}), (0, {"text": "bad"})]),
    "cr": ("1,good\n0, \n1,\n", [(1, {"text": "good"}), (0, {"text": " "})]),
    "trec": ("3,Who is he ?\n5,How many ?\n",
             [(3, {"text": "Who is he ?"}), (5, {"text": "How many ?"})]),
    "cb": ('{"premise": "It rains, he said.", "hypothesis": "it rains?!", "label": "neutral"}\n',
           [(2, {"hypothesis": "it rains", "premise": "It rains, he said."})]),
    "rte": ("index\tsentence1\tsentence2\tlabel\n7\tA \"dog\" ran.\tIt ran.\tnot_entailment\n",
            [(1, {"hypothesis": "It ran", "premise": 'A "dog" ran.'})]),
    "qnli": ("index\tquestion\tsentence\tlabel\n0\tWho?\tHe did.\tentailment\n",
             [(0, {"sentence": "He did.", "question": "Who?"})]),
    "wic": ('{"word": "bed", "sentence1": "A bed.", "sentence2": "Go to bed.", "idx": 0, "label": '
            'true, "start1": 2}\n',
            [(1, {"sentence1": "A bed.", "sentence2": "Go to bed.", "word": "bed"})]),
    "mrpc": ("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t8\t9\tHe \"ran .\tNo .\n",
             [(1, {"a": 'He "ran .', "b": "No ."})]),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\tWhy?\tHow?\t0\n"
            "1\t3\t4\tWhat\n2\t5\t6\tWho?\t\t1\n", [(0, {"a": "Why?", "b": "How?"})]),
    "kitchen": (pickle.dumps((["A pan.\n\tGood.", "Rust."], [1, 0]), 3),
                [(1, {"text": "A pan.\n\tGood."}), (0, {"text": "Rust."})]),
    "restaurants": ("Wow... \"Loved it.\t1\nNo.\t0\n",
                    [(1, {"text": 'Wow... "Loved it.'}), (0, {"text": "No."})]),
}


def write_task(folder, name, train, test=None):
    for file, content in ((TASKS[name].train, train), (TASKS[name].test, test)):
        if content is not None:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(content if type(content) is bytes else content.encode())


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_literally(tmp_path, name):
    """Quotes, tabs, byte-order mark, label words and the hypothesis' last point as each format has
    them; of CR's blank texts the last one is left out, of QQP's ragged rows all; both are said, and
    so is a size that is not the paper's."""
    written, read = FORMATS[name]
    said = []
    write_task(tmp_path, name, written)
    assert data.load_train(TASKS[name], tmp_path, said.append) == [data.Row(*row) for row in read]
    size = TASKS[name].sizes[0]
    told = [f"{len(read):,} rows, the paper has {size:,}"] if size else []
    told = {"cr": ["last row", "1 rows without"], "qqp": ["2 rows with"]}.get(name, []) + told
    assert len(said) == len(told) and all(b in a for a, b in zip(said, told))


def test_texts_without_labels_literally(tmp_path):
    """A line of a .txt is a text, tabs and all; other formats name the template's texts, which are
    prepared as in training; a blank one is refused with its line."""
    (tmp_path / "new.txt").write_text("What a\tjoy.\n\ufeffNo.")
    assert data.load_texts(tmp_path / "new.txt", TASKS["mr"]) == [
        data.Row(0, {"text": "What a\tjoy."}), data.Row(0, {"text": "\ufeffNo."})]
    (tmp_path / "new.csv").write_text('id,premise,hypothesis\n7,"It rains, he said.",It rains!\n')
    assert data.load_texts(tmp_path / "new.csv", TASKS["cb"]) == [
        data.Row(0, {"hypothesis": "It rains", "premise": "It rains, he said."})]
    for content, says in (("ok\n\n", "new.txt, line 2"), ("", "no texts")):
        (tmp_path / "new.txt").write_text(content)
        with pytest.raises(InputError, match=says):
            data.load_texts(tmp_path / "new.txt", TASKS["mr"])


class Evil:
    """Unpickled without care it makes a file."""

    def __init__(self, path=Path("executed")):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("content", [
    pickle.dumps(Evil()), pickle.dumps((["a", "b"], [0, Evil()])), pickle.dumps((["a"], [0, 1])),
    pickle.dumps((["a"], ["0"])), pickle.dumps((["a", "b"], [0, 1]))[:-4], b"", b"text\t1\n",
    pickle.dumps((["a", "b"], [0, 2]))])
def test_a_pickle_is_data_or_it_is_refused(tmp_path, monkeypatch, content):
    """Code in it, a wrong shape or label, damage: an InputError of one line, and nothing is run."""
    monkeypatch.chdir(tmp_path)
    write_task(tmp_path, "books", content)
    with pytest.raises(InputError, match="domain/books/train") as error:
        data.load_train(TASKS["books"], tmp_path)
    assert "\n" not in str(error.value) and not Path("executed").exists()


def test_templates_and_words_literally():
    """What T5 reads of an example of each task, as the authors released their templates."""
    row = {"hypothesis": "h", "premise": "p", "text": "s", "sentence": "s", "question": "q",
           "sentence1": "s1", "sentence2": "s2", "word": "w", "a": "a", "b": "b"}
    shown = {name: (task.template.replace("<X>", "X").format(**row), " ".join(task.words))
             for name, task in TASKS.items()}
    sentiment = ("s It was X ?", "terrible great")
    assert shown == {
        **dict.fromkeys(("sst2", "mr", "cr", *data.GROUPS["dg"], "movie", "amazon", "nyt",
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
    assert longer == {"cr", "subj", "cb", "rte", "wic", *data.GROUPS["dg"]}


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
            data.load_train(TASKS["cb"], tmp_path)


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
    train, test = (load(task, SUPMER_DATA, said.append) for load in (data.load_train, load_test))
    ours = {"restaurants": (1000, 1000)}.get(name, (task.sizes[0] or 1700, task.sizes[1]))
    assert (len(train), len(test)) == ours and [*train[0].fields.values()][0].startswith(first)
    for rows in (train, test):
        assert {row.label for row in rows} == set(range(len(task.words)))
    assert [line for line in said if "the paper has" in line] == [
        f"{SUPMER_DATA}/{task.test}: 1,000 rows, the paper has 2,000"] * (name == "restaurants")
    assert any("the last row" in line for line in said) == (name == "cr")
    longest = sorted(test, key=lambda row: -max(map(len, row.fields.values())))[:5]
    examples, mask = data.task_examples(tokenizer, task, longest), tokenizer.token_to_id(MASK)
    assert all(ids.count(mask) == 1 and len(ids) <= task.max_tokens for ids in examples.ids)
    assert len(set(map(tuple, examples.words))) == len(task.words)


def labeled_store(folder, rows, clusters=3):
    """A .csv of (label, text), each text's first word its topic, T0.., as a labeled store."""
    known = [f"T{i}" for i in range(5)] + [word for row in rows for word in " ".join(row).split()]
    model, tokenizer = write_model(folder / "m", [*known, *data.SENTIMENT[5], "It", "was", "?"])
    with open(folder / "set.csv", "w", newline="") as file:
        csv.writer(file).writerows([("label", "text"), *rows])
    return data.build_labeled(folder / "cache", folder / "set.csv", tokenizer, None, clusters, 0,
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
    monkeypatch.setattr(data, "SLICE", 7)
    monkeypatch.setattr(data, "SAVED", 1)
    original, calls = data.join_short, []

    def stopped(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*arguments)
    monkeypatch.setattr(data, "join_short", stopped)

    def build(cache="cache"):
        return data.build_store(tmp_path / cache, [tmp_path / "0.jsonl", tmp_path / "1.jsonl"],
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
    index = data.LabeledIndex({"set": store}, tokenizer, support=7, query=3)
    for step in range(20):
        split = ("train", "validation")[step % 2]
        task = data.labeled_task(index, 0, step, 0, stream=1, split=split)
        partner = data.labeled_task(index, 0, step, 0, stream=2, variant="set", avoid=task.clusters)
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
    again = data.labeled_task(data.LabeledIndex({"set": store}, tokenizer, support=7, query=3),
                              0, 19, 0, stream=1, split="validation")
    assert again.support.ids == task.support.ids and again.query.ids == task.query.ids
    says = r"set: validation texts: .* 40 of each label, each one lacks (\d+, ){2}\d+: give more"
    with pytest.raises(InputError, match=says):
        data.LabeledIndex({"set": store}, tokenizer, support=60, query=60)
    one = {"set": store._replace(cluster=np.zeros_like(store.cluster))}
    data.LabeledIndex(one, tokenizer, support=7, query=3)
    with pytest.raises(InputError, match="set: train texts: at least 2 .* lacks 0, 12, 12"):
        data.LabeledIndex(one, tokenizer, support=7, query=3, mixing=True)
    with pytest.raises(InputError, match="set: one usable train cluster, mixing needs two"):
        data.labeled_task(index, 0, 0, 0, stream=2, variant="set", avoid=tuple(range(99)))


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


# --------------------------------------------------------------------- data: where tasks come from

def zip_of(members):
    """A zip {name: bytes}, as bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


class Files(http.server.BaseHTTPRequestHandler):
    """Serves `files` {path: bytes}; `cut`: the line goes dead after so many bytes."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Not on the test's output."""

    def do_GET(self):
        """A file, or 404."""
        self.server.asked.append(self.path)
        body = self.server.files.get(self.path)
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write((body or b"")[:self.server.cut])
        self.close_connection = True


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A server of archives that stands in for the real ones, and an empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    server.files, server.asked, server.cut = {}, [], None
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    monkeypatch.setattr(data, "SOURCES", {
        "original/QQP/": (url + "datasets.tar", url + "QQP-clean.zip"),
        "original/": (url + "datasets.tar",), "superglue/CB/": (url + "CB.zip",),
        "domain/kitchen/test": (url + "kitchen/test",)})
    monkeypatch.setattr(data, "CHECKSUMS", {})
    yield server
    server.shutdown()
    server.server_close()


def test_missing_tasks_are_fetched_once(files, monkeypatch):
    """Out of LM-BFF's tar (whose GLUE-SST-2 is another data set), a zip, the second address where
    the first fails, or as a file; the archive is not fetched again; a checksum is held against."""
    cb, kitchen = FORMATS["cb"][0].encode(), FORMATS["kitchen"][0]
    sst = b"sentence\tlabel\nok\t1\n"
    files.files = {
        "/datasets.tar": tar_of({"original/GLUE-SST-2/dev.tsv": b"other", "original/mr/a": b"",
                                 "original/trec/test.csv": b"1,x\n",
                                 "original/SST-2/dev.tsv": sst}),
        "/CB.zip": zip_of({"CB/val.jsonl": cb, "__MACOSX/CB/._val.jsonl": b"?"}),
        "/QQP-clean.zip": zip_of({"QQP-clean/dev.tsv": FORMATS["qqp"][0]}),
        "/kitchen/test": kitchen}
    assert load_test(TASKS["sst2"], "none") == [data.Row(1, {"text": "ok"})]
    assert load_test(TASKS["trec"], "none") == [data.Row(1, {"text": "x"})]
    for name in ("cb", "qqp", "kitchen"):
        assert load_test(TASKS[name], "none") == [data.Row(*row) for row in FORMATS[name][1]]
    assert files.asked == [
        "/datasets.tar", "/CB.zip", "/QQP-clean.zip", "/kitchen/test"]
    for name in ("cb", "kitchen"):
        (data.FETCHED / TASKS[name].test).unlink()
        monkeypatch.setitem(data.CHECKSUMS, TASKS[name].test, "0" * 32)
        with pytest.raises(InputError, match="has another checksum than it should"):
            load_test(TASKS[name], "none")
        assert not (data.FETCHED / TASKS[name].test).exists()


def test_a_download_is_whole_or_not_there(files, capsys):
    """The line goes dead, within a file or an archive: one error with what to do, and nothing that
    looks whole; the next call gets it, and takes away what a killed one left. In a log there is no
    bar."""
    files.files = {"/kitchen/test": FORMATS["kitchen"][0],
                   "/CB.zip": zip_of({"CB/val.jsonl": b"x"})}
    files.cut = 10
    for file in ("domain/kitchen/test", "superglue/CB/val.jsonl"):
        with pytest.raises(InputError, match="put it there.*stopped at 10 of .* bytes") as error:
            data.locate(file, "none")
        assert "\n" not in str(error.value) and not list(Path().rglob("*"))
    files.cut = None
    killed = forked(lambda: None)
    assert ended(killed) == 0
    torn = data.FETCHED / f"domain/kitchen/.test.{killed}.tmp"
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"half")
    assert data.locate("domain/kitchen/test").read_bytes() == FORMATS["kitchen"][0]
    assert not torn.exists() and capsys.readouterr().err == ""


@pytest.mark.parametrize("name, content, says", [
    ("CB.zip", zip_of({"../CB/val.jsonl": b"x"}), "leads outside"),
    ("CB.zip", zip_of({"CB/val.jsonl": b"x", "/etc/passwd": b"x"}), "leads outside"),
    ("CB.zip", zip_of({"CB/val.jsonl": b"x" * 99})[:-40], "damaged or incomplete"),
    ("CB.zip", b"", "damaged or incomplete"),
    ("CB.zip", zip_of({"WiC/val.jsonl": b"x"}), "has no CB/val.jsonl"),
    ("datasets.tar", tar_of({"original/../../mr/test.csv": b"x"}), "leads outside"),
    ("datasets.tar", tar_of({"original/mr/test.csv": b"x" * 9999})[:2000], "damaged or incomplete"),
    ("datasets.tar", b"<html>", "damaged or incomplete"),
    ("datasets.tar", tar_of({"original/MRPC/test.csv": b"x"}), "has no mr/test.csv")])
def test_archives_that_cannot_be_trusted(files, name, content, says):
    """A truncated one, one with ../ in it, one without the task: an InputError of one line that
    names it; nothing is written anywhere."""
    Path("given").mkdir()
    (Path("given") / name).write_bytes(content)
    task = TASKS["cb" if name == "CB.zip" else "mr"]
    with pytest.raises(InputError, match=f"{name}.*{says}|{says}.*{name}") as error:
        load_test(task, "given")
    assert "\n" not in str(error.value)
    assert [path for path in Path().rglob("*") if path.is_file()] == [Path("given") / name]


def test_a_task_that_nobody_has_says_where_to_put_it(files):
    """Nothing to fetch it from, or a server that lacks it: the file and the option are named."""
    for name in ("dvd", "mr"):
        with pytest.raises(InputError, match=f"{TASKS[name].test} is not in none.*--data FOLDER"):
            load_test(TASKS[name], "none")


# ---------------------------------------------------------------------------- data: what is fetched

class Hub(http.server.BaseHTTPRequestHandler):
    """A model hub on this machine: as much of its protocol as the client asks for. Its server has
    repos {name: {revision: (commit, {file: bytes})}}, `asked` (method, repository, file) and `cut`:
    after how many bytes of a file the line goes dead."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Not on the test's output."""

    def do_HEAD(self):
        """Headers only."""
        self.do_GET()

    def do_GET(self):
        """A file (/owner/name/resolve/revision/file) or the list of revisions."""
        hub, path = self.server, urllib.parse.unquote(self.path).split("?")[0]
        if path.startswith("/api/models/") and path.endswith("/refs"):
            found = [*hub.repos[path.removeprefix("/api/models/").removesuffix("/refs")]]
            refs = [{"name": name, "ref": name, "targetCommit": "0" * 40} for name in found]
            return self.send(200, json.dumps({
                "branches": refs[:1], "pullRequests": refs[1:], "converts": [], "tags": []}))
        repo, _, rest = path[1:].partition("/resolve/")
        for revision, (commit, files) in hub.repos.get(repo, {}).items():
            for name in (revision, commit):
                if rest.startswith(name + "/"):
                    file = rest[len(name) + 1:]
                    hub.asked.append((self.command, repo, file))
                    if file not in files:
                        return self.send(404, "", ("X-Error-Code", "EntryNotFound"),
                                         ("X-Repo-Commit", commit))
                    return self.send(200, files[file], ("X-Repo-Commit", commit), (
                        "ETag", f'"{hashlib.sha256(files[file]).hexdigest()}"'))
        self.send(404, "", ("X-Error-Code", "RevisionNotFound" if repo in hub.repos
                            else "RepoNotFound"))

    def send(self, status, body, *headers):
        """Answer; the body may break off."""
        body = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in (*headers, ("Content-Length", str(len(body)))):
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:self.server.cut])
            if self.server.cut is not None and len(body) > self.server.cut:
                self.close_connection = True


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that the client takes for the real one, and an empty cache."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos, server.asked, server.cut = {}, [], None
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                        server.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield server
    server.shutdown()
    server.server_close()


def hub_files(folder, *names):
    """{name: contents} of a folder."""
    return {name: (folder / name).read_bytes() for name in names}


def save_shards(folder, config):
    """A model of a config in two shards and an index, in place of its single file."""
    save_model(folder, config)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2],
             "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {
        name: file for file, part in parts.items() for name in part}}))
    return folder


ANY = "x/model"
COMMIT = "c" * 40


def test_only_the_needed_files_are_fetched(tmp_path, hub):
    """Of a repository that has everything twice: config, tokenizer and the single file of weights.
    A second time nothing is asked for; what is fetched is what is loaded."""
    folder = save_shards(tmp_path / "sharded", V11)
    save_model(folder, V11)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    junk = {name: b"junk" for name in ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack",
                                       "spiece.model", "README.md")}
    hub.repos[ANY] = {"main": (COMMIT, files | junk | {"tokenizer.json": b"{}"})}
    listed = [(part.file, part.bytes) for part in data.model_downloads(ANY)]
    assert listed == [(name, len(hub.repos[ANY]["main"][1][name]))
                      for name in ("config.json", "model.safetensors", "tokenizer.json")]
    fetched = data.model_folder(ANY)
    assert {file for method, _, file in hub.asked if method == "GET"} == {
        "config.json", "model.safetensors", "tokenizer.json"}
    assert data.tokenizer_file(fetched) == fetched / "tokenizer.json"
    assert load_t5(fetched).config == V11
    hub.asked.clear()
    assert data.model_folder(f"{ANY}@{COMMIT}") == fetched and not hub.asked


def test_shards_are_fetched_where_there_is_no_single_file(tmp_path, hub):
    """The index and the shards that it names; a repository without a tokenizer takes t5-base's."""
    files = hub_files(save_shards(tmp_path / "m", V10), "config.json", T.INDEX,
                      "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    config = json.loads(files["config.json"]) | {"vocab_size": data.OFFICIAL_ROWS}
    hub.repos[ANY] = {"main": (COMMIT, files)}
    hub.repos["google-t5/t5-base"] = {
        data.MODELS["t5-base"].split("@")[1]: ("d" * 40, {"tokenizer.json": b'"base"'})}
    fetched = data.model_folder(ANY)
    assert sorted(path.name for path in fetched.iterdir()) == sorted(files)
    assert load_t5(fetched).config == V10
    hub.repos["x/official"] = {"main": ("f" * 40, files | {
        "config.json": json.dumps(config).encode()})}
    assert train.fetch_list("x/official")[0].endswith("tokenizer.json of google-t5/t5-base")
    hub.asked.clear()
    data.model_downloads(f"{ANY}@{COMMIT}")      # the hub has said that two files are not there
    assert not hub.asked
    other = tmp_path / "official"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config))
    assert data.tokenizer_file(other).read_bytes() == b'"base"'
    with pytest.raises(InputError, match="tokenizer.json is missing: put the model's"):
        data.tokenizer_file(fetched)            # its vocabulary is not the official one
    del hub.repos["google-t5/t5-base"], files["model-00002-of-00002.safetensors"]
    with pytest.raises(InputError, match="tokenizer.json is missing, put t5-base's there"):
        data.tokenizer_file(save_config(tmp_path / "again", config))
    hub.repos[ANY] = {"main": ("e" * 40, files)}
    with pytest.raises(InputError, match="lacks model-00002-of-00002.safetensors, which its index"):
        data.model_folder(ANY)


def save_config(folder, values):
    """A folder with a config.json."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_short_names_are_hub_ids_with_their_commit():
    """t5-base, Flan, v1.1 and LM-adapted: each short name is a repository; the ones that can be
    cited are pinned to a whole commit; OWNER/NAME@REVISION is taken as it is."""
    assert data.hub_source("t5-base") == {
        "repo_id": "google-t5/t5-base", "revision": "a9723ea7f1b39c1eae772870f3b547bf6ef7e6c1"}
    assert data.hub_source("t5-v1_1-xxl") == {"repo_id": "google/t5-v1_1-xxl"}
    assert data.hub_source("me/mine@v2") == {"repo_id": "me/mine", "revision": "v2"}
    names = ("t5-small t5-base t5-large t5-3b flan-t5-small flan-t5-base flan-t5-large flan-t5-xl "
             "flan-t5-xxl t5-v1_1-small t5-v1_1-base t5-v1_1-large t5-v1_1-xl t5-v1_1-xxl "
             "t5-small-lm-adapt t5-base-lm-adapt t5-large-lm-adapt t5-xl-lm-adapt t5-xxl-lm-adapt")
    assert sorted(data.MODELS) == sorted(names.split())
    for name in data.MODELS:
        revision = data.hub_source(name).get("revision", "refs/pr/0")
        assert re.fullmatch(r"[0-9a-f]{40}|refs/pr/\d", revision), name
        assert len(revision) == 40 or "v1_1" in name or "lm-adapt" in name
    with pytest.raises(InputError, match="no model 't5-huge': give tiny, t5-small, t5-base"):
        data.model_folder("t5-huge")


def test_without_safetensors_the_revision_that_has_them_is_named(tmp_path, hub):
    """Only pytorch_model.bin on main: the pull requests are looked through."""
    config = hub_files(save_model(tmp_path / "m", V11), "config.json", "model.safetensors")
    hub.repos[ANY] = {"main": (COMMIT, {"config.json": config["config.json"], "x.bin": b""}),
                      "refs/pr/3": ("3" * 40, {"README.md": b""}),
                      "refs/pr/7": ("7" * 40, config)}
    with pytest.raises(InputError) as caught:
        data.model_folder(ANY)
    assert "no safetensors at main" in str(caught.value)
    assert str(caught.value).endswith(f"take --model {ANY}@refs/pr/7")
    assert load_t5(data.model_folder(f"{ANY}@refs/pr/7")).config == V11


def test_what_cannot_be_fetched_says_what_to_do(tmp_path, hub, monkeypatch):
    """A wrong name, revision or file, a line that breaks: one line with the way out, and no file
    that looks whole; the next try gets it."""
    for name, says in (("x/none", "x/none was not fetched .the hub has no such repository"),
                       ("too/many/parts", "was not fetched .Repo id must"),
                       (f"{ANY}@v9", "not fetched .the repository has no such revision")):
        hub.repos[ANY] = {"main": (COMMIT, hub_files(save_model(tmp_path / str(len(name)), V11),
                                                     "config.json", "model.safetensors"))}
        with pytest.raises(InputError, match=says) as caught:
            data.model_folder(name)
        assert str(caught.value).endswith("check name, revision and network, or put its files into "
                                          "a folder and give --model FOLDER")
        assert "\n" not in str(caught.value)
    hub.cut = 10_000
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda _: None)
    with pytest.raises(InputError, match="model.safetensors of x/model.*was not fetched"):
        data.model_folder(ANY)
    assert not list((tmp_path / "hub").rglob("snapshots/*/model.safetensors"))
    hub.cut = None
    assert load_t5(data.model_folder(ANY)).config == V11


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_nothing_broken_stays_in_the_cache(name, tmp_path, hub):
    """A web page in place of a file, or a file that its author uploaded half, is refused by name
    and not kept: when the hub is well again, so is the next try. What a killed download left is
    swept away then."""
    files = hub_files(save_model(tmp_path / "m", V11), "config.json", "model.safetensors")
    for wrong in (b"<html>Sign in</html>", files[name][:-9]):
        hub.repos[ANY] = {"main": (COMMIT, files | {name: wrong})}
        with pytest.raises(InputError, match=f"{name} .*fetch it again .it was taken out"):
            data.model_folder(ANY)
        blobs = [path.read_bytes() for path in (tmp_path / "hub").rglob("blobs/*")]
        assert wrong not in blobs and not list((tmp_path / "hub").rglob(f"snapshots/*/{name}"))
    hub.repos[ANY] = {"main": (COMMIT, files)}
    killed = tmp_path / "hub/models--x--model/blobs" / (
        hashlib.sha256(files[name]).hexdigest() + ".0123abcd.incomplete")
    killed.write_bytes(files[name][:100])
    assert load_t5(data.model_folder(ANY)).config == V11 and not killed.exists()


def test_the_hubs_own_settings_are_honoured(tmp_path, hub, monkeypatch):
    """$HF_ENDPOINT, $HF_HOME and $HF_HUB_OFFLINE: fetched into that folder from there; offline it
    is found again, and what is not there is told, both without asking. Without a network train.py
    ends in one line, whatever the client does meanwhile."""
    hub.repos[ANY] = {"main": (COMMIT, hub_files(
        save_model(tmp_path / "m", V11), "config.json", "model.safetensors"))}
    home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url}

    def python(code, **more):
        return subprocess.run([sys.executable, "-c", code], cwd=Path(data.__file__).parent,
                              env=os.environ | home | more, text=True, capture_output=True)
    fetch = f"import data; print(data.model_folder({ANY!r}))"
    ended = python(f"""{fetch}
import huggingface_hub, runpy, sys, time
huggingface_hub.constants.ENDPOINT = "http://127.0.0.1:9"                   # nobody is there
huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE = huggingface_hub.constants.ENDPOINT + (
    "/{{repo_id}}/resolve/{{revision}}/{{filename}}")
time.sleep = lambda _: None
sys.argv[1:] = ["--model", "x/no"]
runpy.run_path("train.py", run_name="__main__")""")
    first = ended.stdout.partition("\n")[0]
    assert first.startswith(str(tmp_path / "home")) and (Path(first) / "config.json").is_file()
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("error: config.json of x/no was not fetched (the hub was not re")
    hub.asked.clear()
    assert python(fetch, HF_HUB_OFFLINE="1").stdout.strip() == first
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="was not reached, and it is not in the cache.: check"):
        data.model_folder("x/no")
    assert not hub.asked


def test_an_evaluation_tells_what_it_fetches(place, hub, capsys):
    """eval.py --model OWNER/NAME names the files and their size, and that they are not pinned."""
    hub.repos[ANY] = {"main": (COMMIT, hub_files(
        place / "small", "config.json", "model.safetensors", "tokenizer.json"))}
    evaluation.main([*SMALL, "--model", ANY, "--prompt", "random"])
    assert (f"download: 0 MB of {ANY} at {COMMIT}, not pinned: config.json (cached), "
            "model.safetensors, tokenizer.json\n") in capsys.readouterr().out


def test_a_corpus_is_fetched_as_far_as_it_is_wanted(monkeypatch):
    """As many of its files as hold the bytes; OpenWebText's of the revision that has tars."""
    asked = []

    def download(filename, **source):
        asked.append((source, filename))
        return filename
    monkeypatch.setattr(data, "hf_hub_download", download)
    counts = [len(data.fetch_corpus("openwebtext", size)) for size in (10**10, 10**12)]
    assert counts == [6, 21] and len(data.fetch_corpus("c4", 10**9)) == 2
    assert asked[5] == ({"repo_id": "Skylion007/openwebtext", "repo_type": "dataset",
                         "revision": "f3808c30e817981b845ec549c43e82bb467d8144"},
                         "subsets/urlsf_subset05.tar")


def test_the_demonstration_without_the_embedded_model(tmp_path, capsys):
    """`python data.py` beside no tiny/ ends with status 2 and says how to build it."""
    (tmp_path / "data.py").write_bytes(Path(data.__file__).read_bytes())
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(tmp_path / "data.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "python tiny.py" in error and error.count("\n") == 1


@pytest.mark.skipif(not (data.TINY / "model.safetensors").is_file(),
                    reason="tiny/ has not been built: python tiny.py")
@pytest.mark.parametrize("lost", ["tokenizer.json", "model.safetensors"])
def test_the_models_demonstration_with_a_damaged_file(tmp_path, lost, capsys):
    """`python t5.py` ends with status 2 and says how to build tiny/."""
    (tmp_path / "t5.py").write_bytes(Path(T.__file__).read_bytes())
    (tmp_path / "tiny").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "tiny" / name).symlink_to(data.TINY / name)
    (tmp_path / "tiny" / lost).unlink()
    (tmp_path / "tiny" / lost).write_text("{")
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(tmp_path / "t5.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "python tiny.py" in error and error.count("\n") == 1


@pytest.mark.skipif(not (data.TINY / "model.safetensors").is_file(),
                    reason="tiny/ has not been built: python tiny.py")
def test_each_module_shows_its_concept(capsys):
    """Run alone: the second-order gradient is its finite difference and the first-order one is not;
    blanks are filled with words, likeliest first; a task of each variant is text, source -> target;
    inertia falls."""
    shown = {}
    for name in ("supmer.py", "t5.py", "data.py", "kmeans.py"):
        runpy.run_path(str(HERE / name), run_name="__main__")
        shown[name] = capsys.readouterr().out
    table = np.array([line.split() for line in shown["supmer.py"].splitlines()[2:]], dtype=float)
    second, difference, first = table.T
    assert len(table) == 3 and np.allclose(second, difference, rtol=0, atol=1e-7)
    assert (abs(first - difference) > 1e-3).all()
    for line in shown["t5.py"].splitlines():
        *words, _ = re.split(r" 0\.\d\d ?", line.partition("<extra_id_0>. ")[2])
        shares = list(map(float, re.findall(r"0\.\d\d", line)))
        assert len(words) == 5 and all(map(str.isalpha, words))
        assert shares == sorted(shares, reverse=True) and shares[0] > 0.2
    assert shown["t5.py"].count("\n") == 2
    assert all(f"{variant}, anchors of cluster" in shown["data.py"] for variant in VARIANTS)
    assert [shown["data.py"].count(part) for part in (
        "<extra_id_0>", "</s> -> ", "  support: ", "  query: ")] == [20, 20, 15, 5]
    assert "[centroid " in shown["data.py"]
    assert README.read_text() == refilled(README.read_text(), shown["data.py"]), REFILL
    inertia = [float(line.rpartition(" ")[2]) for line in shown["kmeans.py"].splitlines()]
    assert len(inertia) > 3 and all(b < a for a, b in zip(inertia, inertia[1:]))
    assert inertia[-1] == pytest.approx(2, abs=0.05)      # of two unit normals around each centre


# ------------------------------------------------------ each equation of the paper has its function

@pytest.fixture(scope="module")
def stepped(world):
    """world after one meta_step from s = 0.2, by plain gradient descent, without clip and L_reg:
    the changes of theta and phi, the log, and the same loss's slopes from finite differences."""
    method = replace(world.method, gate_weight=0.0, clip=math.inf)
    theta, phi = world.theta.clone(), {name: x.clone() for name, x in world.phi.items()}
    state = supmer.MetaState(theta, phi, torch.optim.SGD([theta]),
                             torch.optim.SGD([*phi.values()]), s=0.2)
    log = supmer.meta_step(world.t5, state, [(world.task, world.partner)], method, seed=7)
    w = SimpleNamespace(**{**vars(world), "lam": supmer.draw_lambda(2 ** 0.6 - 1, 1.0, 7, 0, 0)})
    g, H, _ = supmer.prompt_gradient(w.t5, w.theta, w.task.support, method)
    return SimpleNamespace(
        log=log, s=state.s, lam=w.lam, adapted=supmer.inner_step(w.theta, w.phi, g, H, method),
        psi=supmer.regularize(w.phi, g, H), slopes=finite_differences(w, method, directions=1),
        moved={"theta": theta - world.theta, **{k: phi[k] - world.phi[k] for k in phi}})


def by_hand():
    """d = 2, one row: A a quarter turn, the gate half open, theta (1, 1), g (3, 4)."""
    turn = torch.tensor([[0., -1.], [1., 0.]])
    phi = {**supmer.init_regularizer(2), "A": turn}
    return torch.ones(1, 2), phi, torch.tensor([[3., 4.]]), torch.zeros(2), Method()


def along(gradient, differences):
    """The slope that a gradient gives and the one measured, along the first direction."""
    (u, slope), *_ = differences
    return float((gradient * u).sum()), slope


def mixed_loss(w):
    return plain_loss(w.world.t5, w.stepped.adapted, w.world.task.query, w.world.partner.query,
                      w.stepped.lam)


def posed(w, variant):
    """An example of the planted corpus with s for each sentence, and the task's label words."""
    tokenizer, _, index = w.planted
    task = meta_task(index, 0, 0, 0, variant=variant, stream=1)
    source, _ = data.examples_as_text(tokenizer, task.support, 0)
    words = (tokenizer.decode(word[1:]) for word in task.support.words)
    return re.sub(r"T\d d\d+ s\d+ end\.", "s", source), *words


EQUATIONS = {   # the function that names and computes it; a value of it, and what it should be
    "Eq. 1": (supmer.loss_share, lambda w: (
        supmer.prompt_gradient(w.world.t5, w.world.theta, w.world.task.query, Method())[2].item(),
        plain_loss(w.world.t5, w.world.theta, w.world.task.query).item())),
    "Eq. 2": (supmer.inner_step, lambda w: (
        supmer.inner_step(torch.ones(1, 2), supmer.init_regularizer(2), *by_hand()[2:]).tolist()[0],
        [1 - 0.1 * 3, 1 - 0.1 * 4])),
    "Eq. 3": (supmer.meta_step, lambda w: (
        along(w.stepped.moved["theta"], w.stepped.slopes["theta"])[0],
        -0.1 * w.stepped.slopes["theta"][0][1])),
    "Eq. 4": (supmer.mix, lambda w: (
        supmer.mix(torch.tensor([[[2.]]]), torch.ones(1, 1) > 0, torch.tensor([[1., 0.]]),
                   torch.tensor([[[10.]]]), torch.ones(1, 1) > 0, torch.tensor([[0., 1.]]),
                   0.25)[2].tolist()[0], [0.75, 0.25])),
    "Eq. 5": (supmer.regularize, lambda w: (
        supmer.regularize(*by_hand()[1:4]).tolist()[0], [(-4 + 3) / 2, (3 + 4) / 2])),
    "Eq. 6": (supmer.inner_step, lambda w: (
        supmer.inner_step(*by_hand()).tolist()[0], [1 - 0.1 * -0.5, 1 - 0.1 * 3.5])),
    "Eq. 7": (supmer.meta_step, lambda w: (
        [along(w.stepped.moved[name], w.stepped.slopes[name])[0] for name in w.world.phi],
        [-1e-4 * w.stepped.slopes[name][0][1] for name in w.world.phi])),
    "Eq. 8": (supmer.meta_gradient, lambda w: along(
        computed(w.world, w.world.method)["theta"], w.differences["theta"])),
    "Eq. 10": (supmer.curriculum, lambda w: (supmer.curriculum(0.0, 2.0), math.sqrt(2) - 1)),
    "Eq. 16": (km.kmeans, lambda w: (
        km.kmeans(torch.tensor([[0.], [1.], [10.], [12.]]), 2, 0).inertia[-1],
        2 * 0.5 ** 2 + 2 * 1 ** 2)),
    "Eq. 17": (data.meta_task, lambda w: (
        posed(w, "sp-next"), ("s <extra_id_0> . s</s>", "yes", "no", "maybe"))),
    "Eq. 18": (data.meta_task, lambda w: (posed(w, "mc-next"), (
        "s ? A. s B. s C. s D. s . Answer: <extra_id_0></s>", *"ABCD"))),
    "Eq. 19": (data.meta_task, lambda w: (posed(w, "ss-cluster"), (
        "s ? A. [vector] B. [vector] C. [vector] D. [vector] . Answer: <extra_id_0></s>",
        *"ABCD"))),
    "Eq. 20": (supmer.meta_gradient, lambda w: along(
        computed(w.world, w.world.method)["c"], w.differences["c"])),
    "Alg. 1": (supmer.meta_step, lambda w: (w.stepped.s, F.cosine_similarity(
        supmer.prompt_gradient(w.world.t5, w.stepped.adapted, w.world.task.query, Method(),
                               w.world.partner.query, w.stepped.lam)[0].flatten(),
        w.stepped.psi.flatten(), dim=0).item())),
    "Alg. 2": (supmer.draw_lambda, lambda w: (
        [w.stepped.log["b"], *w.stepped.log["lambda"], w.stepped.log["query_loss"]],
        [2 ** 0.6 - 1, w.stepped.lam, mixed_loss(w).item()]))}


@pytest.mark.parametrize("name", EQUATIONS)
def test_each_equation_has_its_function(name, world, stepped, differences, planted):
    """The function that computes an equation or algorithm names it, and gives a value that was
    worked out by hand, by finite differences or by the plainest code."""
    function, values = EQUATIONS[name]
    kind, number = name.split()
    named = set()
    for numbers in re.findall(re.escape(kind) + r" (\d+(?:(?:-|, | and )\d+)*)",
                              inspect.getsource(function)):
        for part in re.split(", | and ", numbers):
            first, _, last = part.partition("-")
            named |= set(range(int(first), int(last or first) + 1))
    assert int(number) in named, f"{function.__name__} does not name {name}"
    found, wanted = values(SimpleNamespace(world=world, stepped=stepped, differences=differences,
                                           planted=planted))
    assert found == (wanted if isinstance(wanted, tuple) else pytest.approx(wanted, rel=1e-6))


def test_analysis_of_equations_9_and_15(world):
    """Eq. 9: L_q(theta') = L_q(theta) - a1 <grad L_q, psi(g)>; Eq. 15: its gradients are the exact
    ones, d theta = grad L_q - a1 d/dtheta <grad L_q, psi(g)> and d phi = -a1 d/dphi of it. All up
    to O(a1^2): with half of a1 a quarter of the error is left, without the inner product half."""
    w, grad = world, torch.func.grad
    _, H, _ = supmer.prompt_gradient(w.t5, w.theta, w.task.support, w.method)

    def query(theta):
        return plain_loss(w.t5, theta, w.task.query)

    def psi(theta, phi):
        g = grad(lambda theta: plain_loss(w.t5, theta, w.task.support))(theta)
        return supmer.regularize(phi, g, H)

    def product(theta, phi):
        return (grad(query)(theta) * psi(theta, phi)).sum()

    d_theta, d_phi = grad(product, argnums=(0, 1))(w.theta, w.phi)
    start, errors = grad(query)(w.theta), []
    for rate in (0.01, 0.005):
        exact = computed(SimpleNamespace(**{**vars(w), "lam": 0.0}),
                         Method(inner_rate=rate, gate_weight=0.0))
        loss = query(w.theta - rate * psi(w.theta, w.phi))
        errors.append([
            abs(loss - query(w.theta) + rate * product(w.theta, w.phi)),
            (exact["theta"] - start + rate * d_theta).norm(),
            *((exact[name] + rate * d_phi[name]).norm() for name in w.phi),
            (exact["theta"] - start).norm()])
    *quarters, half = (float(a / b) for a, b in zip(*errors))
    assert quarters == pytest.approx([4] * len(quarters), rel=0.02)
    assert half == pytest.approx(2, rel=0.02)


# -------------------------------------------------------- exercises.py: solutions, right and wrong

def inner(support, psi, rate):
    return lambda theta: theta - rate * psi(torch.func.grad(support)(theta))


def which_first(documents, words, mask, end, n, seed, *, answerable=True, balanced=True, shift=0):
    """The right solution, or with another keyword a wrong one."""
    rng, ids = np.random.default_rng(seed), []
    pairs = [[(a, b) for i, a in enumerate(d) for j, b in enumerate(d) if i < j and (
        not answerable or len(d) - 1 - d[::-1].index(a) < d.index(b))] for d in documents]
    pairs = [p for p in pairs if p]
    labels = rng.permutation(np.arange(n) % 2) if balanced else rng.integers(2, size=n)
    for label in labels:
        k = rng.integers(len(pairs))
        a, b = pairs[k][rng.integers(len(pairs[k]))]
        b = pairs[k - shift][0][1] if shift else b
        a, b = (b, a) if label else (a, b)
        ids.append([*a, mask, *b, end])
    return data.Examples(ids, [[]] * n, torch.zeros(n, 0, 0), torch.from_numpy(labels), words)


def beta(first, second, mean, seeded=True):
    """A solution of the fifth exercise: the two parameters and the mean, functions of b, alpha."""
    def draw(b, alpha, *numbers):
        rng = np.random.default_rng(numbers if seeded else None)
        return rng.beta(first(b, alpha), second(b, alpha)) if b > 0 else 1.0, mean(b)
    return draw


def row_steps(start, step, columns=False):
    """A solution of the fourth exercise: phi's numbers at the start, and what makes steps of them.
    """
    def solve(P, d):
        shape = (1, d) if columns else (P, 1)
        return {"x": torch.full(shape, start, dtype=torch.float64)}, \
            lambda phi, g, H: step(phi["x"]) * g
    return solve


def two_steps(support, query, psi, theta, rate):
    first = theta - rate * psi(torch.func.grad(support)(theta))
    second = first - rate * psi(torch.func.grad(support)(first))
    v = torch.func.grad(query)(second)
    for point in (first, theta):
        u, = torch.func.vjp(psi, torch.func.grad(support)(point))[1](v)
        v = v - rate * RIGHT["hessian_vector"](support, point, u)
    return v


grad = torch.func.grad
RIGHT = {
    "first_order": lambda s, q, psi, x, a: grad(q)(x - a * psi(grad(s)(x))),
    "hessian_vector": lambda loss, x, u: torch.func.jvp(grad(loss), (x,), (u,))[1],
    "which_first": which_first,
    "row_steps": row_steps(0.0, torch.exp),
    "lambda_as_printed": beta(lambda b, alpha: alpha, lambda b, alpha: b * alpha,
                              lambda b: 1 / (1 + b)),
    "two_steps": two_steps}
WRONG = {
    "first_order: the second order": lambda s, q, psi, x, a: grad(
        lambda x: q(inner(s, psi, a)(x)))(x),
    "first_order: taken at theta": lambda s, q, psi, x, a: grad(q)(x),
    "first_order: psi forgotten": lambda s, q, psi, x, a: grad(q)(x - a * grad(s)(x)),
    "first_order: uphill": lambda s, q, psi, x, a: grad(q)(x + a * psi(grad(s)(x))),
    "hessian_vector: a finite difference": lambda loss, x, u: (
        grad(loss)(x + 1e-4 * u) - grad(loss)(x - 1e-4 * u)) / 2e-4,
    "hessian_vector: the gradient": lambda loss, x, u: grad(loss)(x),
    "hessian_vector: u' Hess u": lambda loss, x, u: (
        u * RIGHT["hessian_vector"](loss, x, u)).sum(),
    "hessian_vector: theta and u exchanged": lambda loss, x, u: RIGHT["hessian_vector"](loss, u, x),
    "which_first: labels turned": lambda *args: which_first(*args)._replace(
        labels=1 - which_first(*args).labels),
    "which_first: labels in turn": lambda documents, words, mask, end, n, seed: which_first(
        documents, words, mask, end, n, seed)._replace(labels=torch.arange(n) % 2),
    "which_first: unbalanced": partial(which_first, balanced=False),
    "which_first: a sentence that comes twice": partial(which_first, answerable=False),
    "which_first: of two documents": partial(which_first, shift=1),
    "which_first: one document": lambda documents, *rest: which_first(documents[-1:], *rest),
    "which_first: not from the seed": lambda *args: which_first(
        *args[:5], np.random.SeedSequence().entropy),
    "which_first: no </s>": lambda *args: which_first(*args)._replace(
        ids=[ids[:-1] for ids in which_first(*args).ids]),
    "row_steps: nothing at the start": row_steps(0.0, lambda x: x),
    "row_steps: half at the start": row_steps(0.0, torch.sigmoid),
    "row_steps: steps below 0": row_steps(1.0, lambda x: x),
    "row_steps: cannot learn": row_steps(0.0, lambda x: 1 + F.relu(x)),
    "row_steps: a step per column": row_steps(0.0, torch.exp, columns=True),
    "row_steps: one step for all": row_steps(0.0, lambda x: torch.exp(x.mean())),
    "lambda_as_printed: as it was meant": beta(
        lambda b, alpha: b * alpha, lambda b, alpha: alpha, lambda b: b / (1 + b)),
    "lambda_as_printed: the mean that was meant": beta(
        lambda b, alpha: alpha, lambda b, alpha: b * alpha, lambda b: b / (1 + b)),
    "lambda_as_printed: alpha forgotten": beta(
        lambda b, alpha: 1.0, lambda b, alpha: b, lambda b: 1 / (1 + b)),
    "lambda_as_printed: not from the seed": beta(
        lambda b, alpha: alpha, lambda b, alpha: b * alpha, lambda b: 1 / (1 + b), seeded=False),
    "lambda_as_printed: the draw as its mean": lambda *numbers: (
        RIGHT["lambda_as_printed"](*numbers)[0],) * 2,
    "two_steps: the first order": lambda s, q, psi, x, a: grad(q)(
        inner(s, psi, a)(inner(s, psi, a)(x))),
    "two_steps: one step": lambda s, q, psi, x, a: grad(lambda x: q(inner(s, psi, a)(x)))(x),
    "two_steps: the first step's factor is missing": lambda s, q, psi, x, a: grad(
        lambda x: q(inner(s, psi, a)(x)))(inner(s, psi, a)(x)),
    "two_steps: the Jacobian not transposed": lambda s, q, psi, x, a: torch.func.jvp(
        lambda x: inner(s, psi, a)(inner(s, psi, a)(x)), (x,),
        (WRONG["two_steps: the first order"](s, q, psi, x, a),))[1],
    "two_steps: both factors at theta": lambda s, q, psi, x, a: torch.func.vjp(
        inner(s, psi, a), x)[1](torch.func.vjp(inner(s, psi, a), x)[1](
            WRONG["two_steps: the first order"](s, q, psi, x, a))[0])[0]}


@pytest.mark.parametrize("name", exercises.CHECKS)
def test_each_check_accepts_the_solution(name):
    """The solution above is right by a wide margin (of the sampled one: by chance's)."""
    check, allowed = exercises.CHECKS[name]
    assert check(RIGHT[name]) <= allowed / (1 if name == "lambda_as_printed" else 10)


@pytest.mark.parametrize("mistake", WRONG)
def test_each_check_refuses_what_is_wrong(mistake):
    """A typical mistake is off by more than is allowed, or is told what it breaks."""
    check, allowed = exercises.CHECKS[mistake.partition(":")[0]]
    try:
        error = check(WRONG[mistake])
    except ValueError as broken:
        assert str(broken).startswith(("not ", "the same numbers", "the shape is"))
    else:
        assert not error <= 2 * allowed


def test_the_printed_curriculum_begins_with_the_strongest_mixing():
    """What the fifth exercise shows: as Eq. 10 is printed the mean of lambda falls from 1 to 1/2 as
    b grows from 0 to 1, as it is built here it rises from 0 to 1/2."""
    for b, printed, built in ((0.0, 1.0, 0.0), (0.5, 2 / 3, 1 / 3), (1.0, 0.5, 0.5)):
        draws = [(*RIGHT["lambda_as_printed"](b, 1.0, 0, step, 0),
                  supmer.draw_lambda(b, 1.0, 0, step, 0)) for step in range(3000)]
        assert np.mean(draws, axis=0) == pytest.approx([printed, printed, built], abs=0.02)


def test_the_exercises_as_a_student_meets_them(monkeypatch, capsys):
    """As they are none is done, and the status is 1; with all solutions it is 0; a solution that
    raises is one line, and NaN is not right."""
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(exercises.__file__, run_name="__main__")
    assert ended.value.code == 1 and capsys.readouterr().out.count("not done yet\n") == 6
    for name, solution in RIGHT.items():
        monkeypatch.setattr(exercises, name, solution)
    assert exercises.main() == 0 and capsys.readouterr().out.count(" right, off by ") == 6
    monkeypatch.setattr(exercises, "CHECKS", {"first_order": (lambda solve: 1 / 0, 1.0)})
    assert exercises.main() == 1
    assert capsys.readouterr().out.split(maxsplit=1)[1] == \
        "WRONG, ZeroDivisionError: division by zero\n"
    monkeypatch.setattr(exercises, "CHECKS", {"first_order": (lambda solve: math.nan, 1.0)})
    assert exercises.main() == 1 and "WRONG, off by nan" in capsys.readouterr().out


# ------------------------------------------------------------------ eval.py: few-shot prompt tuning


POSITIVE, NEGATIVE = "good fine nice warm".split(), "bad poor dull cold".split()
FILLER = "the a film food day place and with of very".split()
PIECES = [
    "<pad>",
    "</s>",
    "<unk>",
    "It",
    "was",
    "?",
    "terrible",
    "great",
    *POSITIVE,
    *NEGATIVE,
    *FILLER,
    "<extra_id_0>",
]


def small_config(**changes):
    config = T.T5Config(
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_layers=2,
        num_decoder_layers=1,
        num_heads=4,
        vocab_size=len(PIECES),
        gated=True,
        tied=False,
        scaled=False,
        num_buckets=32,
        max_distance=128,
        eps=1e-6,
    )
    return config._replace(**changes)


def small_t5(dtype=torch.float32, seed=0, scale=0.4):
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: (1.0 if "layer_norm" in name else 0.0)
        + scale * torch.randn(shape, generator=generator)
        for name, shape in T.expected_shapes(small_config()).items()
    }
    return T.T5(small_config(), {name: w.to(dtype) for name, w in weights.items()})


def small_examples(n, seed=0):
    """n sentences of three words; the label, which word of two classes is among them, in turn."""
    rng, mask = np.random.default_rng(seed), len(PIECES) - 1
    ids = [
        [
            int(rng.integers(16, 26)),
            int(rng.integers(8, 12) + 4 * (1 - i % 2)),
            int(rng.integers(16, 26)),
            3,
            4,
            mask,
            5,
            1,
        ][i % 3 == 0 :]
        for i in range(n)
    ]
    return data.Examples(
        ids, [[]] * n, torch.zeros(n, 0, 0), torch.arange(n) % 2, [[mask, 6], [mask, 7]]
    )


def tune(t5, start, *rest):
    """evaluation.tune() of a prompt from start (P, d) -> its records, theta at each (n, P, d)."""
    found = [(record, kept["theta"].clone()) for record, kept in evaluation.tune(
        t5, "learned", partial(baselines.given_prompt, theta=start), *rest)]
    records, thetas = zip(*found)
    return list(records), torch.stack(thetas)


def eval_settings(**changes):
    return evaluation.Settings(**{"epochs": 2, "batch": 4, "prompt_length": 3, **changes})


def write_rows(path, n, seed, flip=False):
    """n distinct labeled sentences as a CSV file of label,text."""
    rng, lines = np.random.default_rng(seed), set()
    while len(lines) < n:
        label = int(len(lines) % 2)
        words = [*rng.choice(FILLER, 5), str(rng.choice((NEGATIVE, POSITIVE)[label]))]
        lines.add(f"{label ^ flip},{' '.join(rng.permutation(words))}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(sorted(lines)) + "\n")


def write_place(tmp_path):
    """Into a folder: a model folder `small`, a labeled task `planted` in `data`."""
    t5 = small_t5()
    folder = tmp_path / "small"
    folder.mkdir()
    c = t5.config
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "t5",
                "d_model": c.d_model,
                "d_kv": c.d_kv,
                "d_ff": c.d_ff,
                "num_layers": c.num_layers,
                "num_decoder_layers": c.num_decoder_layers,
                "num_heads": c.num_heads,
                "vocab_size": c.vocab_size,
                "feed_forward_proj": "gated-gelu",
                "tie_word_embeddings": False,
            }
        )
    )
    save_file(
        {name: w.contiguous() for name, w in t5.weights.items()}, folder / "model.safetensors"
    )
    tokenizer = Tokenizer(
        models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", "<extra_id_0>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_rows(tmp_path / "data/planted/train.csv", 60, 1)
    write_rows(tmp_path / "data/planted/test.csv", 40, 2)


PLANTED = data.LabeledTask("planted/train.csv", "planted/test.csv")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to run in, with what write_place puts there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(data.TASKS, "planted", PLANTED)
    write_place(tmp_path)
    return tmp_path


SMALL = (
    "--data data --model small --task planted --prompt-length 3 --shots 4 --batch 8 --epochs 3 "
    "--validate-every 2 "
    "--seeds 10 20 --rates 0.1 0.3 --jobs 1"
).split()


def run_script(argv, monkeypatch):
    """python eval.py ARGV, in this process -> its exit status."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *argv])
    try:
        runpy.run_path(str(Path(evaluation.__file__)), run_name="__main__")
    except SystemExit as stop:
        return stop.code
    return 0


def write_run(folder, model="small", finished=True, ended=1.0, P=3, d=16, name="supmer"):
    """A run's folder as train.py leaves it."""
    Path(folder).mkdir(parents=True)
    (Path(folder) / "run.json").write_text(
        json.dumps(
            {
                "model": model,
                "name": name,
                "training": {},
                "method": {},
                "finished": finished,
                "ended": ended if finished else None,
            }
        )
    )
    generator = torch.Generator().manual_seed(1)
    phi = {
        k: v + 0.2 * torch.randn(v.shape, generator=generator)
        for k, v in supmer.init_regularizer(d).items()
    }
    train.save_prompt(
        Path(folder) / "prompt.safetensors",
        torch.randn(P, d, generator=generator),
        phi,
        {
            "model": model,
            "method": name,
            "corpus": "embedded",
            "step": "7",
            "steps": "9",
            "seed": "0",
            "model_sha256": data.model_fingerprint(model) if Path(model).is_dir() else "another",
        },
    )


def tuning_record(path):
    """The tuning part of a JSON file as bytes, without its times."""
    return json.dumps(
        without_times(first_result(path)["tuning"])
    ).encode()


def first_result(path):
    return json.loads(Path(path).read_text())["results"][0]


def without_times(record):
    if isinstance(record, dict):
        return {key: without_times(value) for key, value in record.items() if key != "time"}
    return [without_times(value) for value in record] if isinstance(record, list) else record


# ----------------------------------------------------------------------------------- worked by hand


def test_tuning_step_by_hand():
    """Three tuning steps equal AdamW, written out here, on the clipped psi(g) of each batch, with
    psi's H from that batch and a rate that falls linearly; the gradient here is autograd's, example
    by example.
    """
    t5, generator = small_t5(torch.float64), torch.Generator().manual_seed(2)
    start = torch.randn(3, 16, generator=generator, dtype=torch.float64)
    phi = {
        key: value + 0.3 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for key, value in supmer.init_regularizer(16, torch.float64).items()
    }
    train, rate, steps = small_examples(6), 0.2, 3
    curve, thetas = tune(
        t5,
        start,
        partial(supmer.regularize, phi),
        (train, small_examples(4, 9)),
        10,
        rate,
        eval_settings(epochs=1, batch=2, validate_every=1),
    )
    theta, m, v, clipped = start.clone(), 0.0, 0.0, 0
    for step in range(steps):
        rows = evaluation.batch_rows(6, step, 10, 2)
        leaf, losses, states = theta.clone().requires_grad_(), [], []
        for row in rows:
            batch = data.collate(train, [row])
            H, mask = supmer.encode_with_prompt(t5, leaf, batch)
            y = T.decode(t5, torch.tensor([[0, train.words[0][0]]]), H, mask)[0, 1]
            log_p = torch.log_softmax(T.next_token_logits(t5, y), -1)
            losses.append(-log_p[train.words[int(train.labels[row])][1]])
            states.append(H[0].mean(0))
        (g,) = torch.autograd.grad(sum(losses) / 2, leaf)
        psi = supmer.regularize(phi, g, (sum(states) / 2).detach())
        clipped += float(psi.norm()) > 1
        psi = psi * min(1.0, 1.0 / (float(psi.norm()) + 1e-6))
        m, v = 0.9 * m + 0.1 * psi, 0.999 * v + 0.001 * psi**2
        unbiased, square = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
        theta = theta - rate * (1 - step / steps) * unbiased / (square.sqrt() + 1e-8)
    assert [entry["step"] for entry in curve] == [0, 1, 2, 3] and torch.equal(thetas[0], start)
    assert torch.allclose(thetas[3], theta, rtol=1e-9, atol=1e-9) and not torch.equal(theta, start)


def test_clipping_acts(monkeypatch):
    """A long gradient reaches AdamW with norm 1."""
    seen = []
    original = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.nn.utils,
        "clip_grad_norm_",
        lambda parameters, limit: (
            seen.append(limit),
            original(parameters, limit),
            seen.append(float([*parameters][0].grad.norm())),
        ),
    )
    g = torch.ones(3, 16)
    monkeypatch.setattr(
        evaluation,
        "tuning_gradient",
        lambda *_: ({"theta": 50 * g}, None),
    )
    tune(
        small_t5(),
        torch.zeros(3, 16),
        None,
        (small_examples(4), small_examples(4)),
        10,
        0.1,
        eval_settings(),
    )
    assert seen[0::2] == [1.0] * 2 and all(abs(norm - 1) < 1e-5 for norm in seen[1::2])


def scripted(monkeypatch, values):
    """Let validations return these (correct, loss) pairs in turn."""
    values = iter(values)
    monkeypatch.setattr(
        evaluation,
        "measure",
        lambda scores, labels: dict(zip(("correct", "loss", "word_loss"), [*next(values), 99.0])),
    )


@pytest.mark.parametrize(
    "values, chosen",
    [
        (
            [(2, 1.0), (3, 1.0), (3, 0.5), (3, 0.5), (1, 0.1)],
            4,
        ),  # accuracy, then loss, then the earlier step
        ([(3, 1.0), (3, 1.0), (2, 0.1), (3, 1.0), (3, 1.0)], 0),  # step 0 counts, and wins ties
        ([(0, 1.0), (1, 9.0), (1, 9.0), (2, 9.0), (2, 8.0)], 8),
    ],
)
def test_step_is_chosen_by_hand(monkeypatch, values, chosen):
    """Of the validations at steps 0, 2, 4, 6, 8 the one of highest accuracy is chosen; ties go to
    the lower loss, then to the earlier step. Each one's prompt is the one that was measured.
    """
    measured = []
    original = evaluation.score
    monkeypatch.setattr(
        evaluation,
        "score",
        lambda t5, theta, examples, method: (
            measured.append(theta.clone()),
            original(t5, theta, examples, method),
        )[1],
    )
    scripted(monkeypatch, values)
    sample = small_examples(4), small_examples(4, 1)
    curve, thetas = tune(
        small_t5(),
        torch.ones(3, 16),
        None,
        sample,
        10,
        0.1,
        eval_settings(epochs=8, validate_every=2),
    )
    assert [entry["step"] for entry in curve] == [0, 2, 4, 6, 8]
    assert min(curve, key=evaluation.rank)["step"] == chosen
    assert torch.equal(thetas, torch.stack(measured))
    assert [entry["accuracy"] for entry in curve] == [25 * correct for correct, _ in values]


def test_rate_is_chosen_by_hand():
    """Between rates: accuracy, loss, earlier step, and only then the smaller rate."""

    def entry(accuracy, loss, step, rate):
        return {"accuracy": accuracy, "loss": loss, "step": step, "rate": rate}

    order = [
        entry(90.0, 2.0, 50, 0.3),
        entry(80.0, 1.0, 20, 0.3),
        entry(80.0, 1.5, 10, 0.2),
        entry(80.0, 1.5, 10, 0.3),
        entry(80.0, 1.5, 20, 0.1),
    ]
    assert sorted(reversed(order), key=evaluation.rank) == order


def test_standard_deviation_is_the_samples():
    """Accuracies of 60, 70, 80 % have mean 70 and standard deviation 10 (n - 1), not 8.16."""
    assert evaluation.figure([60.0, 70.0, 80.0]) == "70.0 ± 10.0"
    assert evaluation.figure([60.0]) == "60.0"


# -------------------------------------------------------------------------- properties, determinism


def test_batches_are_a_pure_function():
    """Each epoch holds every row once, in batches of at most `size`; the same arguments give the
    same rows, another epoch or seed others.
    """
    epochs = [
        [evaluation.batch_rows(70, 3 * epoch + k, 10, 32) for k in range(3)] for epoch in range(2)
    ]
    for epoch in epochs:
        assert [len(rows) for rows in epoch] == [32, 32, 6] and sorted(sum(epoch, [])) == list(
            range(70)
        )
    assert epochs[0] != epochs[1] and epochs[0][1] == evaluation.batch_rows(70, 1, 10, 32)
    assert evaluation.batch_rows(70, 1, 20, 32) != epochs[0][1]


def test_tuning_repeats_exactly():
    """The same start, sample, seed and rate give the same curve and the same prompt, bit for bit;
    start is unchanged; another seed gives another curve.
    """
    start, sample = torch.ones(3, 16), (small_examples(10), small_examples(6, 1))
    first, again, other = (
        tune(small_t5(), start, None, sample, seed, 0.1, eval_settings())
        for seed in (10, 10, 20)
    )
    assert (
        first[0] == again[0]
        and torch.equal(first[1], again[1])
        and torch.equal(start, torch.ones(3, 16))
    )
    assert first[0] != other[0]


def test_identity_regularizer_is_plain_tuning():
    """A learned start whose psi is the identity is tuned exactly as the same start without psi;
    another psi is not.
    """
    t5, start = small_t5(torch.float64), torch.ones(3, 16, dtype=torch.float64)
    sample = small_examples(10), small_examples(6, 1)
    phi = supmer.init_regularizer(16, torch.float64)
    turned = {**phi, "A": phi["A"].flip(0)}
    plain, identity, other = (
        tune(t5, start, p, sample, 10, 0.1, eval_settings())[0]
        for p in (None, partial(supmer.regularize, phi), partial(supmer.regularize, turned))
    )

    def losses(curve):
        return np.array([entry["loss"] for entry in curve])

    assert np.allclose(losses(plain), losses(identity), rtol=1e-8) and not np.allclose(
        losses(plain), losses(other), rtol=1e-4
    )


def test_untuned_prompts(place):
    """random has the embedding table's deviation and vocab rows of the table; both differ from seed
    to seed and repeat.
    """
    t5 = small_t5()
    choices = eval_settings(prompt_length=2000, seeds=(10, 20))
    table = t5.weights["shared.weight"]
    for name in ("random", "vocab"):
        first, second = (start(t5)["theta"] for start in
                         evaluation.open_candidate(name, t5.config, choices).starts)
        assert (
            first.shape == (2000, 16)
            and first.dtype == torch.float32
            and not torch.equal(first, second)
        )
        assert torch.equal(first, evaluation.open_candidate(
            name, t5.config, choices).starts[0](t5)["theta"])
        if name == "random":
            assert (
                abs(float(first.std() / table.std()) - 1) < 0.02 and abs(float(first.mean())) < 0.02
            )
        else:
            assert ((first[:, None] - table).abs().sum(-1) == 0).any(1).all()


def test_learns_a_planted_task():
    """16 examples per label of a planted task (which of two classes of words is in the sentence)
    teach a prompt of a frozen RANDOM T5 to classify new sentences; the untuned prompt is near
    chance.
    """
    t5 = small_t5(seed=3)
    start = baselines.normal_prompt(t5, 10, 8)["theta"]
    sample, new = (small_examples(32), small_examples(32, 1)), small_examples(200, 2)
    curve, thetas = tune(
        t5, start, None, sample, 10, 0.1, eval_settings(epochs=80, batch=32, words_only=True)
    )
    best = curve.index(min(curve, key=evaluation.rank))

    def accuracy(theta):
        return (
            supmer.measure(supmer.score(t5, theta, new, supmer.Method()), new.labels)["correct"]
            / 200
        )

    # 0.77 to 0.89 with the order of batches, or a last bit; 0.7 is chance and 5 standard errors
    assert accuracy(start) < 0.6 and accuracy(thetas[best]) > 0.7 and best > 0


# ------------------------------------------------------------ the test set is not seen while tuning


@contextlib.contextmanager
def context(t5, choices):
    """What evaluation.main() gives its functions, in this process, nothing kept from before."""
    shutil.rmtree(evaluation.TUNED, ignore_errors=True)
    with evaluation.workers(t5, "small", torch.float32, ["cpu"], 1) as work:
        yield evaluation.Context(choices, data.load_tokenizer("small", t5.config), work, 1,
                                 {"model": "this"}, 1.0, math.inf)


def planted_plan():
    return evaluation.Plan("planted", TASKS["planted"], {"planted": TASKS["planted"]}, "data")


def test_tuning_needs_no_test_file(place):
    """With the test file absent the tuning record is the same, byte for byte, as with it."""
    t5, choices = small_t5(), eval_settings(shots=(4,), seeds=(10,), rates=(0.1,))
    prompt = evaluation.open_candidate("vocab", t5.config, choices)

    def record():
        with context(t5, choices) as c:
            samples = evaluation.draw_samples(c, planted_plan(), 4)
            records, kept = evaluation.tune_task(c, planted_plan(), prompt, samples, 4)
        return json.dumps(without_times(records)), kept[0]["tuned"]["theta"].numpy().tobytes()

    present = record()
    os.remove("data/planted/test.csv")
    assert record() == present


def test_test_labels_do_not_reach_tuning(place, monkeypatch):
    """With every label of the test file turned round, the tuning record of a whole evaluation is
    byte-identical, while the test accuracies become 100 % minus what they were; and load_test is
    called after the last tuning run.
    """
    order, files = [], ("one.json", "two.json")
    for name in ("tune", "load_test"):
        original = getattr(evaluation, name)
        monkeypatch.setattr(
            evaluation,
            name,
            lambda *a, _name=name, _original=original: (order.append(_name), _original(*a))[1],
        )
    evaluation.main([*SMALL, "--prompt", "vocab", "random", "--out", "one.json"])
    assert order == ["tune"] * 8 + ["load_test"]
    write_rows(place / "data/planted/test.csv", 40, 2, flip=True)
    shutil.rmtree(evaluation.TUNED)
    evaluation.main([*SMALL, "--prompt", "vocab", "random", "--out", "two.json"])
    assert order == (["tune"] * 8 + ["load_test"]) * 2
    assert tuning_record("one.json") == tuning_record("two.json")
    one, two = (first_result(name)["test"]["planted"]["prompts"] for name in files)
    for name in ("vocab", "random"):
        assert np.allclose(np.array(one[name]["tuned"]) + two[name]["tuned"], 100)


def test_sampled_texts_are_not_tested(place, monkeypatch, capsys):
    """A test file that is the training file and one row more (a domain's pool): each seed is tested
    on the rows that it has not sampled, and how many were left out is said."""
    train = Path("data/planted/train.csv").read_text()
    Path("data/planted/test.csv").write_text(train + "1,good film\n")
    t5, choices = small_t5(), eval_settings(shots=(4,), seeds=(10, 20), rates=(0.1,))
    prompt = evaluation.open_candidate("vocab", t5.config, choices)
    with context(t5, choices) as c:
        samples = evaluation.draw_samples(c, planted_plan(), 4)
        records, kept = evaluation.tune_task(c, planted_plan(), prompt, samples, 4)
        # predict the label of every row that a seed has sampled wrongly, the others rightly
        rows = load_test(TASKS["planted"], "data")
        sampled = [[row.fields for row in sample.train + sample.held_out] for sample in samples]
        wrong = [[row.fields in texts for row in rows] for texts in sampled]
        answers, found = [[], *(answer for answer in wrong for _ in "ut")], {}
        def scores(jobs, title):                # no prompt; untuned, tuned
            for job, answer in zip(jobs, answers, strict=True):
                right = torch.tensor([row.label ^ bool(answer and answer[i])
                                      for i, row in enumerate(rows)])
                found[job.path] = {"scores": F.one_hot(right, 2).float()}, {}
        monkeypatch.setattr(evaluation, "read_result", found.__getitem__)
        test = evaluation.test_task(c._replace(work=scores), "planted", TASKS["planted"], "data",
                                    [(prompt, records, kept)], samples)
    assert [len(texts) for texts in sampled] == [16, 16] == test["left_out"]
    assert test["prompts"]["vocab"]["tuned"] == [100, 100] and test["no_prompt"] == 100
    assert test["prompts"]["vocab"]["untuned"] == [100, 100]
    assert "[16, 16] test rows, by seed, are left out" in capsys.readouterr().out


# -------------------------------------------------------------------------- what comes out of a run


def test_without_a_run_the_released_prompt_is_taken(place):
    """`python eval.py` is worth running on a fresh clone: beside random, tiny's released prompt
    stands in for a run of one's own, once."""
    assert evaluation.parse([])[0].prompt == ("released", "random")
    assert evaluation.parse(["--quick"])[0].prompt == ("random", "vocab", "released")
    write_run("runs/small-1")
    with pytest.raises(InputError, match="given twice"):        # a run of one's own is no stand-in
        evaluation.parse(["--model", "small", "--prompt", "newest", "runs/small-1", "released"])


def test_json_is_complete(place, capsys):
    """The JSON file holds each seed, rate and validation, and what was chosen is the best of the
    seed's validations; the test results are one per seed; the learned prompt's metadata stand
    there; and the printed table agrees.
    """
    write_run("runs/small-1")
    evaluation.main(SMALL)  # the newest finished run, and random
    written = json.loads(Path("runs/eval/small-planted.json").read_text())
    assert set(written) == {"command", "settings", "prompts", "not_run", "results"}
    assert written["prompts"]["runs/small-1"] == {
        "method": "supmer",
        "file": "runs/small-1",
        "model": "small",
        "corpus": "embedded",
        "step": "7",
        "steps": "9",
        "seed": "0",
        "model_sha256": data.model_fingerprint("small"),
        "regularizer": "affine",
    }
    result = written["results"][0]
    tests = result["test"]["planted"]["prompts"]
    for name in ("runs/small-1", "random"):
        records, tested = result["tuning"][name], tests[name]
        assert [record["seed"] for record in records] == [10, 20] and len(tested["tuned"]) == 2
        for record in records:
            assert [[(e["rate"], e["step"]) for e in curve] for curve in record["validations"]] == [
                [(rate, step) for step in (0, 2, 3)] for rate in (0.1, 0.3)
            ]
            assert record["best"] == min(sum(record["validations"], []), key=evaluation.rank)
        assert tested["mean"] == pytest.approx(np.mean(tested["tuned"]))
        assert tested["sample_std"] == pytest.approx(np.std(tested["tuned"], ddof=1))
    assert len(tests["runs/small-1"]["untuned"]) == 1  # one prompt, whatever the seed
    printed = capsys.readouterr().out
    for name, found in tests.items():
        assert f"| {name} | {found['mean']:.1f} ± {found['sample_std']:.1f} |" in printed
        assert f"| {name}, untuned | {statistics.mean(found['untuned']):.1f}" in printed
    assert "40 of 40 test rows of planted" in printed
    assert "| most frequent label | 50.0 |" in printed
    assert "the paper" not in printed.split("seconds of tuning")[-1]
    assert "file runs/small-1" in printed and "embedded" in printed
    table = Path("runs/eval/small-planted.md").read_text()
    assert table in printed and table.startswith("| accuracy in % | planted |\n| --- | --- |\n")


def test_first_test_rows_are_fixed(place):
    """--test-rows takes the same rows whatever the file's order; --predictions adds what was
    predicted for each."""
    path = Path("data/planted/test.csv")
    for name in ("one", "two"):
        evaluation.main([*SMALL, "--prompt", "vocab", "--seeds", "10", "--rates", "0.1",
                         "--test-rows", "7", "--predictions", "--out", f"{name}.json"])
        path.write_text("\n".join(reversed(path.read_text().splitlines())))
    one, two = (first_result(f"{name}.json")["test"]["planted"] for name in ("one", "two"))
    assert one == two and (one["rows"], one["of"], len(one["labels"])) == (7, 40, 7)
    predicted, = one["prompts"]["vocab"]["predictions"]
    right = sum(a == b for a, b in zip(predicted, one["labels"], strict=True))
    assert one["prompts"]["vocab"]["tuned"] == [pytest.approx(100 * right / 7)]


def test_papers_figures_are_those_of_the_same_backbone():
    """Under t5-base itself all of Table 1's methods stand; under the embedded model, or a small
    model in a folder that is called t5-base, PT and SUPMER, as another model's; beside a task that
    the table has not, or other numbers of shots, nothing. The mean is over what was run."""
    tested = {"untuned": [50.0], "tuned": [60.0, 80.0], "mean": 70.0}
    test = {"no_prompt": 50.0, "majority": 55.0, "prompts": {"random": tested}}
    base = small_config(d_model=768, num_layers=12, gated=False)

    def shown(tasks, model, config, shots=(16,)):
        written = {"not_run": {"trec": "why"} if len(tasks) > 1 else {}, "results": [
            {"task": task, "shots": n, "test": {task: test}} for n in shots for task in tasks]}
        text = evaluation.table(written, config, eval_settings(
            model=model, prompt=("random",), shots=shots))
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]

    beside = shown(("sst2", "mr"), "google-t5/t5-base", base)
    assert beside[0] == ["accuracy in %", "sst2", "mr", "trec", "mean of 2"]
    assert ["random", "70.0 ± 14.1", "70.0 ± 14.1", "not run", "70.0"] in beside
    assert beside[-1] == ["the paper's t5-base: supmer", "87.3 ± 0.5", "84.0 ± 0.6",
                          "80.2 ± 0.9", "85.7"]
    assert len(beside) == 2 + 4 + 8
    for model, config in (("tiny", base), ("models/t5-base", small_config())):
        rows = shown(("sst2",), model, config)
        assert rows[-2:] == [["the paper's T5-base, another model: pt", "71.9 ± 3.4"],
                             ["the paper's T5-base, another model: supmer", "87.3 ± 0.5"]]
        assert len(rows) == 2 + 4 + 2
    for task, shots in (("movie", (16,)), ("sst2", (8,))):
        assert "paper" not in str(shown((task,), "t5-base", base, shots))
    several = shown(("sst2",), "t5-base", base, (8, 16))
    assert several[0] == ["accuracy in %", "sst2, 8 shots", "sst2, 16 shots"]
    assert several[-1] == ["the paper's t5-base: supmer", "", "87.3 ± 0.5"]


def test_a_stop_leaves_out_of_a_study_what_was_not_done(tmp_path):
    """Of Fig. 4 stopped in its second task: a column "not run" for each number of shots that is
    missing, a picture of what there is."""
    tested = {"tuned": [60.0], "mean": 60.0}
    test = {"no_prompt": 50.0, "majority": 55.0, "prompts": {"vocab": tested, "random": tested}}
    half = test | {"prompts": {"vocab": tested}}
    written = {"not_run": {"subj": "stopped", "sst5": "stopped"}, "results": [
        {"task": "sst5", "shots": n, "test": {"sst5": x}} for n, x in ((4, test), (8, half))]}
    shots = eval_settings(study="shots", shots=(4, 8, 16), prompt=("vocab", "random"))
    rows = [line.split(" | ") for line in
            evaluation.table(written, small_config(), shots).splitlines()]
    assert rows[0][1:] == ["sst5, 4 shots", "sst5, 8 shots", "subj, 4 shots", "subj, 8 shots",
                           "subj, 16 shots", "sst5, 16 shots |"]
    assert rows[3] == ["| random", "60.0", *["not run"] * 4, "not run |"]
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    evaluation.draw(written, shots, tmp_path / "half.png")
    assert (tmp_path / "half.png").read_bytes().startswith(b"\x89PNG")


def test_newest_finished_run(place):
    """Of the runs under runs/ the one of this model that finished last is taken: not an unfinished
    or a newer one of another model, whatever the folders' names and order.
    """
    write_run("runs/b", ended=20.0)
    write_run("runs/a", ended=30.0)
    write_run("runs/z", ended=10.0)
    write_run("runs/y", ended=99.0, model="other")
    write_run("runs/x", finished=False)
    assert evaluation.newest_run("small") == "runs/a"
    chosen, sources = evaluation.parse(SMALL)
    assert chosen.prompt == ("runs/a", "random")
    assert evaluation.newest_run("elsewhere/other") == "runs/y"


def test_quick_is_short_for_its_options(place):
    """--quick sets one seed, one rate, some 60 steps, 300 test rows and four prompts, and says so
    in its help.
    """
    write_run("runs/tiny-1", model="tiny")
    chosen, sources = evaluation.parse(["--quick"])
    assert (chosen.seeds, chosen.rates, chosen.epochs, chosen.test_rows) == ((10,), (0.2,), 60, 300)
    assert chosen.prompt == ("random", "vocab", "runs/tiny-1", "released") and chosen.task == (
        "movie",
    )
    assert chosen.prompt_length == 20 and chosen.rate_scale == "rms"
    assert evaluation.parse(["--quick", "--prompt", "random"])[0].prompt == ("random",)


def test_protocol_estimate_by_hand():
    """A demonstration of 60 s of tuning (60 epochs, 1 rate, 1 seed) and 6 s of testing 300 of 3,000
    rows: the protocol takes 60 * 200/60 * 3 * 5 = 3,000 s and 6 * 10 * 5 = 300 s, 55 minutes; what
    was cut and the command are told.
    """
    record = {"validations": [[{"step": 0}, {"step": 60}]], "time": {"seconds": 30.0}}
    result = {
        "tuning": {"random": [record], "vocab": [record]},
        "task": "movie",
        "test": {"movie": {"rows": 300, "of": 3000}},
        "test_seconds": 6.0,
        "processes": 1,
    }
    quick = eval_settings(epochs=60, task=("movie",), prompt=("random", "vocab"))
    said = evaluation.protocol(["--quick", "--dtype", "bfloat16"], result, quick)
    assert (
        "not the protocol" in said
        and "60 steps of 200" in said
        and "300 test rows of 3,000" in said
    )
    assert said.endswith(
        "55 minutes at this speed: python eval.py --task movie --dtype bfloat16 "
        "--prompt random vocab"
    )


# ------------------------------------------------------- independent work: processes, interruptions


def test_number_of_processes_changes_nothing(place):
    """Two processes and one give the same records and accuracies, bit for bit."""
    found = []
    for jobs in ("1", "2"):
        shutil.rmtree(evaluation.TUNED, ignore_errors=True)
        evaluation.main([*SMALL, "--prompt", "vocab", "--rates", "0.1", "--jobs", jobs, "--out",
                         "out.json"])
        result = first_result("out.json")
        found.append([without_times(result["tuning"]), result["test"]])
    assert found[0] == found[1]


def test_an_interrupted_evaluation_goes_on(place, monkeypatch):
    """Stopped in its third tuning run, the same command makes the runs that are missing, reads the
    other two, and ends with the record of a run that was never stopped; done once more it tunes and
    scores nothing."""
    command = [*SMALL, "--prompt", "vocab", "--out", "out.json"]
    calls, original, scored = [], evaluation.tune, evaluation.score

    def tune(*arguments):
        calls.append(arguments[5:7])                # seed, rate
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)
    monkeypatch.setattr(evaluation, "tune", tune)
    with pytest.raises(KeyboardInterrupt):
        evaluation.main(command)
    assert not Path("out.json").exists() and len(list(evaluation.TUNED.glob("*.s*"))) == 2
    evaluation.main(command)
    assert calls == [(10, 0.1), (10, 0.3), (20, 0.1), (20, 0.1), (20, 0.3)]
    record = tuning_record("out.json")
    monkeypatch.setattr(evaluation, "score", lambda *_: pytest.fail("scored again"))
    evaluation.main(command)
    assert len(calls) == 5 and tuning_record("out.json") == record
    monkeypatch.setattr(evaluation, "score", scored)
    shutil.rmtree(evaluation.TUNED)
    evaluation.main([*command[:-1], "whole.json"])
    assert tuning_record("whole.json") == record


def test_a_result_depends_on_all_that_made_it():
    """Another model, start, sample, rate or function is another file, the same ones the same."""
    def path(made_of="model", function=evaluation.tune_job, **changes):
        arguments = {"start": torch.ones(3, 16), "phi": None, "sample": [small_examples(4)] * 2,
                     "seed": 10, "rate": 0.1, **changes}
        return evaluation.make_job(made_of, "a/b c", function, **arguments).path
    assert path() == path() and path().name.startswith("a_b_c-")
    other = [path("code"), path(function=evaluation.score_job), path(start=torch.ones(4, 16)),
             path(start=torch.zeros(3, 16)), path(start=torch.ones(3, 16).double()),
             path(sample=[small_examples(4), small_examples(4, 1)]), path(seed=20), path(rate=0.2),
             path(phi={"A": torch.ones(1)})]
    assert len({path(), *other}) == 10


def test_a_damaged_result_is_refused(place, monkeypatch, capsys):
    """Cut or of something else: one line that says to delete it."""
    argv = [*SMALL, "--prompt", "vocab"]
    evaluation.main(argv)
    path = next(evaluation.TUNED.glob("planted-vocab-4-10-0.1-*"))
    path.write_bytes(path.read_bytes()[:-9])
    assert run_script(argv, monkeypatch) == 2
    assert f"{path} is no result" in capsys.readouterr().err


# --------------------------------------------------------------- groups, own tasks, labels, studies


def small_group(monkeypatch, *names):
    """Let planted's files stand for these tasks of the real names; the others are not to be had."""
    monkeypatch.setattr(data, "SOURCES", {})
    for name in names:
        monkeypatch.setitem(data.TASKS, name, TASKS["planted"])


def test_what_a_group_lacks_is_told_and_the_rest_is_run(place, monkeypatch, capsys):
    """`all`: absent tasks are named, with where to put them, and stand in the table as not run; one
    that is asked for by its name is an error."""
    small_group(monkeypatch, "sst2", "mr")
    short = [*SMALL, "--prompt", "vocab", "--seeds", "10", "--rates", "0.1", "--task"]
    evaluation.main([*short, "all", "--out", "all.json"])
    written, printed = json.loads(Path("all.json").read_text()), capsys.readouterr().out
    assert [result["task"] for result in written["results"]] == ["sst2", "mr"]
    assert set(written["not_run"]) == set(data.GROUPS["all"]) - {"sst2", "mr"}
    assert "trec: not run; original/trec/train.csv is not in data" in printed
    row = next(line for line in printed.splitlines() if line.startswith("| vocab |"))
    assert row.count("not run") == 10 and "mean of 2" in printed
    for name in ("trec", "dg"):
        with pytest.raises(InputError, match="is not in data.*give --data FOLDER"):
            evaluation.main([*short, name])
    with pytest.raises(InputError, match="--data empty: there is no such folder"):
        evaluation.main([*short, "all", "--data", "empty"])
    Path("empty").mkdir()
    with pytest.raises(InputError, match="none of these tasks is at hand, see above"):
        evaluation.main([*short, "all", "--data", "empty"])


def test_domain_generalization_tunes_on_airlines_alone(place, monkeypatch, capsys):
    """`dg`: one tuning for all domains, whose training files are not needed; each domain is tested
    with the same prompts."""
    small_group(monkeypatch, "airlines")
    for name, seed in (("books", 3), ("kitchen", 4)):
        write_rows(place / f"data/{name}.csv", 30, seed)
        monkeypatch.setitem(data.TASKS, name, data.LabeledTask("absent.csv", f"{name}.csv"))
    argv = "--task dg --prompt vocab --rates 0.1 --out dg.json".split()
    evaluation.main([*SMALL, *argv])
    written = json.loads(Path("dg.json").read_text())
    result, = written["results"]
    assert list(result["test"]) == ["airlines", "books", "kitchen"] and len(result["tuning"]) == 1
    assert set(written["not_run"]) == {"dvd", "electronics", "restaurants"}
    assert [test["of"] for test in result["test"].values()] == [40, 30, 30]
    assert len(list(evaluation.TUNED.glob("dg-vocab-*"))) == 2


OWN = ["--template", "{text} It was <X> ?", "--model", "small", "--prompt-length", "3", "--epochs",
       "2", "--seeds", "10", "--rates", "0.1", "--prompt", "vocab", "--shots", "2", "--jobs", "1"]


@pytest.mark.parametrize("header", ["label,id,text\n", "text,label\n", ""])
def test_a_task_of_ones_own_and_its_labels(place, monkeypatch, capsys, header):
    """A CSV file with a header or without, three labels as words or numbers, a label word of two
    pieces: tuned, tested on the rows that were not sampled. The tuned prompt then labels texts,
    with probabilities over the three; those of the two pieces are multiplied."""
    labels = {"bad": "terrible", "good": "1", "warm": "good warm"}
    rows = [(f"{word} {a} {b}", label) for word, label in labels.items()
            for a in FILLER[:3] for b in FILLER[3:6]]
    written = {"label,id,text\n": [f"{label},7,{text}" for text, label in rows],
               "text,label\n": [f"{text},{label}" for text, label in rows],
               "": [f"{label},{text}" for text, label in rows]}[header]
    Path("my.csv").write_text(header + "\n".join(written) + "\n")
    argv = ["--data", "my.csv", "--words", "terrible, great,good warm", *OWN]
    evaluation.main(argv)
    result = first_result("runs/eval/small-my.json")
    test, record = result["test"]["my"], result["tuning"]["vocab"][0]
    assert (test["of"], test["left_out"], record["examples"]) == (27, [12], 6)
    Path("new.txt").write_text("a good film\nvery dull food\n")
    capsys.readouterr()
    predict = ["--model", "small", "--predict", "new.txt", "--prompt", record["file"]]
    evaluation.main([*predict, "--out", "labels.csv"])
    evaluation.main(predict)
    assert capsys.readouterr().out == Path("labels.csv").read_text()
    found = list(csv.DictReader(open("labels.csv")))
    assert [line["text"] for line in found] == ["a good film", "very dull food"]
    t5 = load_t5(Path("small"))
    tokenizer = data.load_tokenizer("small", t5.config)
    theta = evaluation.read_result(record["file"])[0]["theta"]
    ids = tokenizer.encode("a good film It was <extra_id_0> ?").ids + [1]
    H, mask = supmer.encode_with_prompt(t5, theta, data.Batch(
        torch.tensor([ids]), torch.ones(1, len(ids), dtype=bool), torch.zeros(1, 0, dtype=int),
        torch.zeros(1, 0, 16), None))
    good, warm = (tokenizer.token_to_id(word) for word in ("good", "warm"))
    decoded = T.decode(t5, torch.tensor([[0, len(PIECES) - 1, good]]), H, mask)
    p = torch.log_softmax(T.next_token_logits(t5, decoded)[0], -1)
    sums = torch.stack([p[1, 6], p[1, 7], p[1, good] + p[2, warm]]).softmax(-1)
    words = ["terrible", "great", "good warm"]
    assert [float(found[0][word]) for word in words] == pytest.approx(sums.tolist(), abs=1e-4)
    assert found[0]["label"] == words[int(sums.argmax())]


@pytest.mark.parametrize("damage", [
    lambda kept: {"theta": kept["theta"][:, :-1].contiguous()},
    lambda kept: {"theta": kept["theta"] * float("nan")},
    lambda kept: {"theta": kept["theta"].long()},
    lambda kept: {"theta": torch.zeros(0, 16)},
    lambda kept: {"theta": torch.zeros(())},
    lambda kept: {"theta": torch.zeros(train.LONGEST + 1, 16)},
    lambda kept: {**kept, "more": torch.zeros(1)},
    lambda kept: {},
], ids=["width", "nan", "integers", "empty", "number", "long", "more", "none"])
def test_labels_are_not_made_with_a_damaged_tuned_prompt(place, capsys, damage):
    """A tuned file whose tensors are not what was tuned is refused by name, before any label; of
    one that is whole, what other steps left in it does no harm."""
    Path("my.csv").write_text("0,bad film\n0,dull food\n1,good film\n1,warm food\n")
    evaluation.main(["--words", "terrible,great", *OWN, "--data", "my.csv"])
    path = first_result("runs/eval/small-my.json")["tuning"]["vocab"][0]["file"]
    kept, result = evaluation.read_result(path)
    Path("new.txt").write_text("a good film\n")
    predict = ["--model", "small", "--predict", "new.txt", "--prompt", path, "--out", "labels.csv"]
    data.atomic_write(path, lambda file: file.write(save(
        {**kept, "10:theta": kept["theta"].clone()}, {"result": json.dumps(result)})))
    evaluation.main(predict)
    Path("labels.csv").unlink()
    data.atomic_write(path, lambda file: file.write(save(
        damage(kept), {"result": json.dumps(result)})))
    with pytest.raises(InputError, match=f"{path} does not hold what was tuned"):
        evaluation.main(predict)
    for other, says in (({"model_sha256": "0"}, "was tuned on another model, small, than small is"),
                        ({"task": result["task"] | {"words": ["a"]}}, "is no tuned prompt")):
        data.atomic_write(path, lambda file: file.write(save(
            kept, {"result": json.dumps(result | other)})))
        with pytest.raises(InputError, match=f"{path} {says}"):
            evaluation.main(predict)
    assert not Path("labels.csv").exists()


def test_workers_that_memory_does_not_allow(place, monkeypatch):
    """Too many bytes for one are told beforehand; one that dies, with what to try."""
    monkeypatch.setattr(evaluation, "ft_memory", lambda _: 10 ** 18)
    with pytest.raises(InputError, match="a process needs some .* GiB, there are"):
        evaluation.processes(evaluation.Settings(prompt=("ft",)), ["cpu"], Path("small"))
    with pytest.raises(InputError, match="a process ended .* Try fewer --jobs than 2"):
        with evaluation.workers(None, "small", torch.float32, ["cpu"], 2) as work:
            work([evaluation.Job(Path("x"), Dies(), {})], "")


def test_own_rows_that_are_all_sampled_are_tuned_not_tested(place, capsys):
    """Two rows a label leave nothing to test on: said, and the tuned prompt is there all the same;
    with a file to test on behind it, it is tested."""
    Path("my.csv").write_text("0,bad film\n0,dull food\n1,good film\n1,warm food\n")
    argv = ["--words", "terrible,great", *OWN, "--data", "my.csv"]
    evaluation.main(argv)
    printed = capsys.readouterr().out
    for said in ("it is tuned, not tested", "[1, 1] examples by label instead of 2"):
        assert said in printed
    assert Path(first_result("runs/eval/small-my.json")["tuning"]["vocab"][0]["file"]).exists()
    evaluation.main([*argv, "data/planted/test.csv"])
    assert first_result("runs/eval/small-my.json")["test"]["my"]["rows"] == 40


@pytest.mark.parametrize("study", ["steps", "shots", "dg", "spread"])
def test_each_study_is_one_command(place, monkeypatch, study):
    """JSON and PNG: accuracy at every validation for steps, for each number of shots, domain, or
    start; in the spread only the starts differ, not the examples."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    small_group(monkeypatch, "cb", "mrpc", "sst5", "subj", *data.GROUPS["dg"])
    settings = [word for word in SMALL if word not in ("--task", "planted")]
    wanted = ["--prompt", "vocab", "random"] + ["--shots", "2", "4"] * (study == "shots")
    seen, original = [], evaluation.tune
    monkeypatch.setattr(evaluation, "tune", lambda *a: (seen.append(a), original(*a))[1])
    evaluation.main([*settings, *wanted, "--study", study, "--rates", "0.1"])
    written = json.loads(Path(f"runs/eval/small-{study}.json").read_text())
    assert Path(f"runs/eval/small-{study}.png").read_bytes().startswith(b"\x89PNG")
    shown = [(result["shots"], name) for result in written["results"] for name in result["test"]]
    assert shown == {"steps": [(4, "cb"), (4, "mrpc")], "dg": [(4, n) for n in data.GROUPS["dg"]],
                     "shots": [(n, task) for n in (2, 4) for task in ("sst5", "subj")],
                     "spread": [(4, "mrpc"), (4, "cb"), (4, "subj")]}[study]
    for result in written["results"]:
        for test in result["test"].values():
            for name, found in test["prompts"].items():
                if study == "steps":
                    curves = [r["validations"][0] for r in result["tuning"][name]]
                    best = [curve.index(r["best"]) for curve, r in
                            zip(curves, result["tuning"][name])]
                    assert [len(c) for c in found["steps"]] == [len(c) for c in curves] == [3, 3]
                    assert found["tuned"] == [c[i] for c, i in zip(found["steps"], best)]
    samples = {json.dumps(a[4], default=lambda x: x.tolist()) for a in seen if a[5] == seen[0][5]}
    starts = {a[2](small_t5())["theta"].numpy().tobytes() for a in seen}
    assert len(starts) == 4 and (len({a[5] for a in seen}) == 1) == (study == "spread")
    assert study != "spread" or len(samples) == 1


# ----------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--task", "sst3"], "sst2"),
        (["--prompt", "random", "random"], "twice"),
        (["--prompt", "random", "--seeds", "10", "10"], "twice"),
        (["--prompt", "random", "--shots", "0"], "it must be more than 0"),
        (["--prompt", "random", "--rates", "nan"], "--rates nan: it must be 0 or more"),
        (["--prompt", "random", "--seeds", "-1"], "--seeds -1: it must be 0 or more"),
        (["--epochs", "many"], "invalid int"),
        (["--dtype", "float16"], "bfloat16"),
        (["--quick", "--epochs", "60"], "sets --epochs"),
        (["--quick", "--seeds=20"], "sets --seeds"),
        (["--nonsense"], "--nonsense"),
        (["--model", "elsewhere"], "RUN|released|random|vocab"),  # no finished run
        ([*SMALL, "--prompt", "released"], "RUN|random|vocab"),
        ([*SMALL, "--prompt", "runs/none"], "runs/none"),
        ([*SMALL, "--prompt", "runs/other"], "other"),
        ([*SMALL, "--prompt", "runs/long"], "--prompt-length 5"),
        ([*SMALL, "--prompt", "runs/wide"], "width 16"),
        ([*SMALL, "--prompt", "random", "--data", "nowhere"], "nowhere"),
        ([*SMALL, "--prompt", "random", "--data", "a", "b"], "--template and --words"),
        (["--task", "sst3"], "Without a network: movie, amazon, nyt, tweets"),
        (["--task", "dg", "books"], "leave their names away"),
        (["--study", "depth"], "spread"),
        (["--quick", "--study", "steps"], "sets --study"),
        (["--quick", "--prompt", "ft"], "leave ft away"),
        (["--study", "steps", "--prompt", "vocab", "few-shot"], "leave few-shot away"),
        ([*OWN, "--data", "my.csv", "--words", "a,b", "--prompt", "zero-shot"], "leave them out"),
        ([*OWN, "--data", "my.csv"], "--words"),
        ([*OWN, "--data", "my.csv", "--words", "bad"], "two or more"),
        ([*OWN, "--data", "my.csv", "--words", "bad,bad"], "two or more"),
        ([*OWN, "--data", "none.csv", "--words", "bad,good"], "none.csv"),
        ([*OWN, "--data", "small", "--words", "bad,good"], ".jsonl"),
        ([*OWN, "--data", "my.csv", "--words", "bad,good", "--task", "mr"], "leave them away"),
        ([*OWN, "--data", "my.csv", "--words", "bad,good"], "my.csv, line 3"),
        ([*OWN, "--data", "one.csv", "--words", "bad,good"], "one.csv: label 1 has 0 different"),
        ([*OWN, "--data", "few.csv", "--words", "bad,good"], "few.csv: label 1 has 1 different"),
        ([*OWN, "--data", "latin.csv", "--words", "bad,good"], "latin.csv must be UTF-8"),
        ([*OWN, "--data", "few.csv", "--words", "bad,good", "--template", "It was"], "<X>"),
        (["--predict", "few.csv"], "one tuned --prompt"),
        (["--predict", "few.csv", "--prompt", "few.csv"], "no result of eval.py"),
        ([*SMALL, "--prompt", "random", "--rates", "1e39"], "and 1e+30 at most"),
        ([*SMALL, "--prompt", "random", "--prompt-length", "10001"], "and 10,000 at most"),
        ([*SMALL, "--prompt", "random", "--model", "no_such_model"], "no_such_model"),
        (["--prompt", "randm", "--model", "none"], "randm is missing: give RUN, newest, released, "
         "random, vocab, prefix-tuning, p-tuning-v2, ft, zero-shot, few-shot, supmer, ppt, "),
        ([*SMALL, "--prompt", "random", "--device", "gpu", "--task", "sst2"], "--device gpu: choo"),
        (["--prompt", "random", "--predict", ""], "predict '': it is empty"),
        (["--prompt", "random", "--data", ""], "data '': it is empty"),
        (["--prompt", "random", "--rates", "0", "0.1"], "0 is each method's own"),
        (["--prompt", "random", "--labeled", "small"], "--labeled small: give a folder, with"),
        (["--prompt", "metapt", "--labeled", "none"], "--labeled none: give a folder"),
        (["--prompt", "random", "metapt"], "metapt learns from labeled sentiment"),
        (["--prompt", "random", "--out", "small"], "--out small: name a .json file"),
        (["--prompt", "random", "--out", "my.md"], "--out my.md: name a .json file"),
        (["--prompt", "random", "--out", "folder.json"], "folder.json: it would replace what is"),
        (["--predict", "my.csv", "--prompt", "one.csv", "--out", "my.csv"], "it would replace"),
        (["--predict", "my.csv", "--prompt", "one.csv", "--out", "one.csv"], "it would replace"),
        (["--prompt", "random", "--model", "caf\udce9"], r"['caf\udce9'] are not UTF-8"),
    ],
)
def test_mistakes_end_in_one_line(place, monkeypatch, capsys, argv, said):
    """What the user got wrong is told in one line on stderr that names it, with exit status 2."""
    write_run("runs/other", model="other", finished=False)
    write_run("runs/long", finished=False, P=5)
    write_run("runs/wide", finished=False, d=24)
    Path("folder.json").mkdir()
    for name, content in (("my", b"0,a\n1,b\n2,c\n"), ("one", b"0,a\n0,b\n"),
                          ("few", b"0,a\n0,b\n1,c\n"), ("latin", b"0,caf\xe9\n1,b\n")):
        Path(f"{name}.csv").write_bytes(content)
    assert run_script(argv, monkeypatch) == 2
    error = capsys.readouterr().err.split("\r")[-1]
    line = error[error.index("error: ") :]
    assert line.count("\n") == 1 and said in line


def test_a_folder_that_cannot_be_written_to_is_told_before_tuning(place, monkeypatch):
    """--out in a read-only folder, as it looks to a user who is not root."""
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "ro" and access(
        path, mode))
    monkeypatch.setattr(evaluation, "tune", lambda *_: pytest.fail("it tunes"))
    with pytest.raises(InputError, match="ro cannot be written to: give another --out"):
        evaluation.main([*SMALL, "--prompt", "vocab", "--out", "ro/out.json"])


def test_loss_that_is_not_finite_is_told(monkeypatch):
    """A loss that is not finite, at once or through a gradient of a later step, stops tuning and
    names step and rate.
    """
    sample, start = (small_examples(4), small_examples(4)), torch.ones(3, 16)
    broken = small_t5()
    broken.weights["lm_head.weight"][0] = float("nan")
    with pytest.raises(InputError, match=r"nan at step 0, rate 0\.1, seed 10.*--rates"):
        tune(broken, start, None, sample, 10, 0.1, eval_settings())
    monkeypatch.setattr(
        evaluation,
        "tuning_gradient",
        lambda t5, baseline, parameters, *_: (
            {"theta": parameters["theta"] * float("nan")},
            None,
        ),
    )
    with pytest.raises(InputError, match=r"nan at step 2, rate 0\.1"):
        tune(small_t5(), start, None, sample, 10, 0.1, eval_settings(validate_every=2))


def test_interrupt_is_one_line(place, monkeypatch, capsys):
    """Ctrl-C while tuning: one line, exit status 130, no file."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(baselines, "tuning_gradient", interrupt)
    assert run_script([*SMALL, "--prompt", "random"], monkeypatch) == 130
    assert "stopped" in capsys.readouterr().err
    assert [path.name for path in place.glob("runs/eval/**/[!.]*")] == ["tuned"]


@needs_data
def test_real_sst2(place):
    """A micro evaluation on the real SST-2: its 872 test sentences, of which 444 are positive."""
    argv = "--task sst2 --prompt random vocab --seeds 10 --rates 0.1 --epochs 2".split()
    evaluation.main([*SMALL, *argv, "--data", os.environ["SUPMER_DATA"], "--out", "sst2.json"])
    test = first_result("sst2.json")["test"]["sst2"]
    assert (test["rows"], test["of"]) == (872, 872) and test["majority"] == pytest.approx(
        100 * 444 / 872
    )


# ---------------------------------------------------------------------------- train.py: a whole run


HERE = Path(train.__file__).parent


@pytest.fixture(scope="session", autouse=True)
def counted_once():
    """Every train.main() counts a micro-batch's memory operation by operation, which takes most of
    a second whatever the model: here the same shape, texts and method are counted once."""
    count, counted = train.micro_batch_bytes, {}

    def once(config, training, method):
        key = (config, training.dtype, training.prompt_length, training.max_tokens,
               replace(method, steps=0))
        if key not in counted:
            counted[key] = count(config, training, method)
        return counted[key]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "micro_batch_bytes", once)
        yield


def write_small_world(folder):
    """Into a folder: a random T5 `model` of one piece a word, a corpus of 60 planted documents ->
    (folder, options).
    """
    words = [
        *(f"T{i}" for i in range(5)),
        *(f"d{i}" for i in range(60)),
        *(f"s{i}" for i in range(30)),
        "end.",
    ]
    model, tokenizer = write_model(folder / "model", words + TEMPLATE_WORDS)
    t5 = random_t5(16, dtype=torch.float32, vocabulary=tokenizer.get_vocab_size())
    c = t5.config
    (model / "config.json").write_text(
        json.dumps(
            {
                "d_model": c.d_model,
                "d_kv": c.d_kv,
                "d_ff": c.d_ff,
                "num_layers": c.num_layers,
                "num_heads": c.num_heads,
                "vocab_size": c.vocab_size,
                "feed_forward_proj": "gated-gelu",
                "tie_word_embeddings": False,
            }
        )
    )
    save_file(t5.weights, model / "model.safetensors")
    planted_paths(folder, documents=60, length=30)
    options = [
        "--model",
        "model",
        "--corpus",
        "corpus.jsonl",
        "--clusters",
        "6",
        "--prompt-length",
        "4",
        "--tasks",
        "2",
        "--support",
        "4",
        "--query",
        "4",
        "--validation-tasks",
        "1",
        "--validate-every",
        "2",
        "--steps",
        "6",
        "--relative-step",
        "0.05",
        "--device",
        "cpu",
        "--yes",                        # on a busy machine it may seem to take hours
    ]
    return folder, options


@pytest.fixture(scope="session")
def small_world(tmp_path_factory):
    """A small world to train in."""
    return write_small_world(tmp_path_factory.mktemp("train"))


AS_A_SCRIPT = """import os, resource, runpy, sys
os.dup2(out.fileno(), 1)
os.dup2(err.fileno(), 2)
sys.stdout = open(1, "w", closefd=False)        # the old one takes it for the file that it was
os.chdir(folder)
os.environ.update(environment)
resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
sys.argv = argv
runpy.run_path(argv[0], run_name="__main__")"""


class Started:
    """train.py in a process of its own, as subprocess.Popen has it. It is forked from a process
    that imported train, and what torch imports when it differentiates, once: a new Python would
    take seconds for that each time."""

    def __init__(self, folder, *options, environment=(), file_size=-1):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["pytest", "train", "torch._dynamo"])
        (self.out, out), (self.err, err) = context.Pipe(False), context.Pipe(False)
        names = {"argv": [str(HERE / "train.py"), *map(str, options)], "folder": str(folder),
                 "out": out, "err": err, "environment": environment, "file_size": file_size}
        with contextlib.chdir(HERE):            # where the first one to be started finds train
            self.process = context.Process(target=exec, args=(AS_A_SCRIPT, names))
            self.process.start()
        out.close()
        err.close()

    @property
    def returncode(self):
        return self.process.exitcode

    def end(self, number=None):
        """Send it a signal, if one is given, and wait -> what it wrote to stdout and stderr."""
        if number:
            os.kill(self.process.pid, number)
        self.process.join(60)
        assert self.returncode is not None, "it hangs"
        said = []
        for end in (self.out, self.err):
            with open(os.dup(end.fileno())) as file:
                said.append(file.read())
            end.close()
        return said


def wait_for_steps(run, steps, process):
    """Until the run's log has so many steps, or the process ended."""
    deadline = time.monotonic() + 60
    while process.returncode is None and time.monotonic() < deadline:
        if (run / "log.jsonl").exists() and (run / "log.jsonl").read_text().count(
            '"query_loss"'
        ) >= steps:
            return
        time.sleep(0.002)


def log_without_times(run):
    return [
        {key: value for key, value in json.loads(line).items() if key != "time"}
        for line in (run / "log.jsonl").read_text().splitlines()
    ]


def test_a_killed_run_goes_on_bit_by_bit(small_world, monkeypatch, capsys):
    """Ctrl-C, --resume, kill -9, --resume: theta, phi, s, optimizer states, prompt and log lines
    equal an unbroken run's.
    """
    folder, options = small_world
    broken = Started(folder, *options, "--run", "broken", "--save-seconds", "0")
    wait_for_steps(folder / "broken", 1, broken)
    said, _ = broken.end(signal.SIGINT)
    assert broken.returncode == 130 and "python train.py --resume broken" in said
    done = len([line for line in log_without_times(folder / "broken") if "query_loss" in line])
    assert done < 6, "the interrupt came too late to show anything"
    killed = Started(folder, "--resume", "broken")
    wait_for_steps(folder / "broken", done + 1, killed)
    killed.end(signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL, "the kill came too late to show anything"
    resumed = Started(folder, "--resume", "broken")
    code, said = run_train(folder, monkeypatch, capsys, *options, "--run", "unbroken")
    assert code == 0, said
    _, said = resumed.end()
    assert resumed.returncode == 0, said
    for name in ("state.safetensors", "prompt.safetensors"):
        first, second = (load_file(folder / run / name) for run in ("unbroken", "broken"))
        assert set(first) == set(second) and all(
            torch.equal(first[key], second[key]) for key in first
        ), name
    assert any(
        key.startswith("adam.phi.A.exp_avg")
        for key in load_file(folder / "broken" / "state.safetensors")
    )
    assert log_without_times(folder / "unbroken") == log_without_times(folder / "broken")
    assert json.loads((folder / "broken" / "run.json").read_text())["finished"]
    assert not list(folder.glob("broken/.*"))


def test_a_rank_that_dies_ends_all_and_any_number_goes_on(small_world, tmp_path):
    """Two processes share a step of one task; when one is killed the other says so and ends with
    status 2. One process goes on, and in the end has, bit by bit, what one process has that was
    never stopped: the number of ranks changes nothing."""
    folder, options = small_world
    options = [*options, "--steps", "5", "--tasks", "1", "--micro-tokens", "1",
               "--save-seconds", "0"]
    unfinished_run((folder, options), "shared")
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    ranks = [Started(folder, "--resume", "shared", environment={
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
        "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}) for rank in range(2)]
    wait_for_steps(folder / "shared", 2, ranks[0])
    ranks[1].end(signal.SIGKILL)
    _, said = ranks[0].end()
    assert ranks[0].returncode == 2 and "Traceback" not in said
    assert "error: rank 0: another rank ended" in said.splitlines()[-1]
    done = json.loads((folder / "shared" / "log.jsonl").read_text().splitlines()[-1])["step"]
    assert done < 5, "the kill came too late to show anything"
    run = make_run((folder, options), "shared")
    run.train()
    alone = make_run((folder, options), "one rank")
    alone.train()
    first, second = (train.state_tensors(run.state) for run in (run, alone))
    assert all(torch.equal(first[name], second[name]) for name in first) and run.state.step == 5
    assert log_without_times(folder / "shared") == log_without_times(folder / "one rank")


def test_a_run_belongs_to_one_process(small_world, monkeypatch, capsys):
    """A second process on a run's folder is refused, with the id of the first."""
    folder, options = small_world
    code, _ = run_train(folder, monkeypatch, capsys, *options, "--steps", "1", "--run", "mine")
    assert code == 0
    code, said = run_train(folder, monkeypatch, capsys, "--resume", "mine")
    assert code == 2 and "mine is finished already: start a new run" in said
    for there in ("mine", "corpus.jsonl"):
        code, said = run_train(folder, monkeypatch, capsys, *options, "--run", there)
        assert code == 2 and f"{there} exists: name another --run" in said
    train.write_run(folder / "mine", train.read_run(folder / "mine") | {"finished": False})
    with data.lock(folder / "mine" / "lock", lambda owner: pytest.fail("nobody has it")):
        code, said = run_train(folder, monkeypatch, capsys, "--resume", "mine")
    assert code == 2 and f"mine: process {os.getpid()} is at work on this run" in said


def test_labeled_sets_are_mixed_in(small_world, tmp_path, monkeypatch, capsys):
    """Table 3: a third of the tasks is labeled and has a partner of its set; each set is validated
    beside the variants; with --labeled-share 1 there is no corpus. Resumed bit by bit."""
    folder, options = small_world
    (tmp_path / "sets").mkdir()
    rows = [(("yes", "no")[i % 2], sentence(i // 30, i % 30)) for i in range(1800)]
    with open(tmp_path / "sets" / "topics.csv", "w", newline="") as file:
        csv.writer(file).writerows([("label", "text"), *rows])
    options = [*options, "--labeled", tmp_path / "sets", "--labeled-clusters", "2"]
    code, _ = run_train(folder, monkeypatch, capsys, *options, "--steps", "10", "--run", "mixed")
    log = log_without_times(folder / "mixed")
    variants = [variant for line in log for variant in line.get("variants", ())]
    assert code == 0 and len(variants) == 20 and 2 <= variants.count("topics.csv") <= 12
    assert set(log[0]["validation"]["variants"]) == {*VARIANTS, "topics.csv"}
    (folder / "mixed" / "state.safetensors").unlink()
    train.write_run(folder / "mixed", train.read_run(folder / "mixed") | {"finished": False})
    assert run_train(folder, monkeypatch, capsys, "--resume", "mixed")[0] == 0
    assert log_without_times(folder / "mixed") == log
    code, _ = run_train(folder, monkeypatch, capsys, *options, "--labeled-share", "1", "--steps",
                        "1", "--corpus", "nowhere", "--run", "labeled")
    log = log_without_times(folder / "labeled")
    assert code == 0 and [line["variants"] for line in log if "s" in line] == [["topics.csv"] * 2]
    made = train.read_run(folder / "labeled")
    assert "corpus" in made["made_of"]
    assert [*made["versions"]] == ["python", "torch", "numpy", "tokenizers", "safetensors"]
    assert (made["processes"], made["threads"]) == (1, torch.get_num_threads())


def test_a_resumed_run_keeps_as_many_graphs(small_world, monkeypatch):
    """--keep-gib is turned into a number of graphs once: what run.json holds is gone on with."""
    folder, options = small_world
    monkeypatch.chdir(folder)
    assert train.main([*options, "--steps", "1", "--keep-gib", "0.1", "--run", "graphs"]) == 0
    kept = train.read_run(folder / "graphs")
    assert kept["method"]["keep_graphs"] > 0
    train.write_run(folder / "graphs", kept | {"finished": False})
    monkeypatch.setattr(train, "graphs_that_fit", lambda *_: pytest.fail("counted again"))
    seen, run = [], train.Run
    monkeypatch.setattr(train, "Run", lambda *a: (seen.append(a[2]), run(*a))[1])
    assert train.main(["--resume", "graphs"]) == 0
    assert seen[0].keep_graphs == kept["method"]["keep_graphs"]


def test_a_log_becomes_a_picture(small_world, monkeypatch, capsys):
    """--plot draws what is there, of a run that is still at work as well: its last line is torn."""
    pytest.importorskip("matplotlib")
    folder, _ = small_world
    run = make_run(small_world, "drawn")
    train.write_run(run.folder, {"training": {}, "method": {}, "finished": False, "ended": None})
    run.step()
    with open(run.folder / "log.jsonl", "a") as file:
        file.write('{"step": 2, "s"')
    assert train.main(["--plot", str(run.folder)]) == 0
    assert str(run.folder / "log.png") in capsys.readouterr().out
    assert (run.folder / "log.png").read_bytes().startswith(b"\x89PNG")
    for line in ('{"step": 1, "s": "x"}', '{"step": 1, "validation": 3}', '{"step": 1, "b": 1}',
                 '{"step": "one"}'):
        (run.folder / "log.jsonl").write_text(line + "\n")
        with pytest.raises(T.InputError, match="log.jsonl"):
            train.plot(run.folder)


def make_run(small_world, name, **changes):
    """A train.Run in this process, in a new folder."""
    folder, options = small_world
    training, method, _, _ = train.parse(options)
    training = replace(
        training, model=str(folder / "model"), corpus=(str(folder / "corpus.jsonl"),), **changes
    )
    with contextlib.chdir(folder):
        t5 = T.load_t5("model")
        index, _, _ = train.open_indexes(
            training, method, Path("model"), data.load_tokenizer("model", t5.config), t5
        )
        (folder / name).mkdir(exist_ok=True)
        return train.Run(folder / name, training, method, t5, index)


def unfinished_run(small_world, name):
    """The same, with the run.json by which it is resumed."""
    run = make_run(small_world, name)
    train.write_run(run.folder, {
        "name": "supmer", "training": asdict(run.training), "method": asdict(run.method),
        "made_of": run.made_of, "finished": False, "ended": None})
    return run


def test_what_came_after_the_last_save_is_replayed_exactly(small_world):
    """Steps whose state was never saved, and a torn log line, leave no trace: the resumed run
    repeats them bit by bit.
    """
    first = make_run(small_world, "replayed")
    entries = [first.step() for _ in range(3)]
    first.log.write('{"step": 4, "torn')
    first.log.close()
    second = make_run(small_world, "replayed")
    assert second.state.step == 0 and len(log_without_times(second.folder)) == 1
    again = [second.step() for _ in range(3)]
    assert [{**e, "time": 0} for e in entries] == [{**e, "time": 0} for e in again]
    assert torch.equal(first.state.theta, second.state.theta)


@pytest.mark.parametrize("method", ["ppt", "supmer"])
def test_a_run_without_a_regularizer_is_resumed_as_well(small_world, method):
    """phi is never stepped there, so Adam has nothing of it to save: the state is read all the
    same, and the next step is that of a run that went on.
    """
    def begin():
        run = make_run(small_world, f"plain-{method}", method=method)
        run.method = replace(run.method, regularizer=False)
        return run
    first = begin()
    first.step()
    first.save()
    second = begin()
    assert second.state.step == 1
    ours, theirs = first.step(), second.step()
    assert {**ours, "time": 0} == {**theirs, "time": 0}
    assert torch.equal(first.state.theta, second.state.theta)


def test_each_step_is_logged_with_what_explains_it(small_world):
    """A line a step has losses, s, b, lambda, the step's size, the second-order share, gate, phi's
    two gradients, |A - I|.
    """
    run = make_run(small_world, "logged")
    run.step()
    run.step()
    line = log_without_times(run.folder)[-1]
    assert set(line) == {
        "step",
        "variants",
        "s",
        "b",
        "lambda",
        "theta_gradient",
        "A_minus_I",
        "support_loss",
        "query_loss",
        "gate_loss",
        "step_size",
        "second_order",
        "gate_mean",
        "phi_gradient_meta",
        "phi_gradient_gate",
    }
    assert (
        line["step"] == 2 and line["step_size"] == pytest.approx(0.05, rel=1e-3) and line["b"] > 0
    )
    first = log_without_times(run.folder)[1]
    assert first["b"] == 0 and first["lambda"] == [0.0, 0.0]
    validation = log_without_times(run.folder)[0]["validation"]
    assert set(validation["variants"]) == set(VARIANTS) and validation["queries"] == 20


def test_the_lowest_validation_loss_is_kept(small_world, monkeypatch):
    """prompt.safetensors holds theta and phi of the validation with the lowest loss after
    adaptation, and says which step.
    """
    run, losses = make_run(small_world, "kept"), iter([0.5, 0.7])
    result = {"loss_before": 9.0, "step_size": 0.05, "queries": 1, "variants": {}}
    monkeypatch.setattr(train, "validate", lambda *_: result | {"loss": next(losses)})
    run.step()
    run.validate()
    kept = run.state.theta.clone()
    run.step()
    run.validate()
    theta, phi, about = train.load_prompt(run.folder / "prompt.safetensors", 16)
    assert (
        torch.equal(theta, kept) and about["step"] == "1" and about["validation_loss"] == "0.500000"
    )
    assert not torch.equal(theta, run.state.theta) and set(phi) == {"A", "a", "W", "c"}


def test_an_inner_step_without_effect_is_told(small_world, monkeypatch, capsys):
    """A drop under 1e-4 of the loss is reported with the size of the step and the options that
    help.
    """
    run = make_run(small_world, "warned")
    result = {"loss_before": 1.0, "loss": 0.99995, "step_size": 2e-6, "queries": 1, "variants": {}}
    monkeypatch.setattr(train, "validate", lambda *_: result)
    run.validate()
    said = capsys.readouterr()
    assert "2.0e-06" in said.out + said.err and "--relative-step" in said.out + said.err


def run_train(folder, monkeypatch, capsys, *argv):
    """train.py's main() as its script calls it, in this process -> (exit status, the last line on
    stderr)."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
    with pytest.raises(SystemExit) as ended:
        train.run_script(train.main, "stopped")
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return ended.value.code, ("\n" + said.err.strip()).splitlines()[-1]


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
        (["--inner-rate", "inf"], "--inner-rate inf: it must be more than 0, and 1e+30 at most"),
        (["--prompt-rate", "1e38"], "--prompt-rate 1e+38: it must be 0 or more, and 1e+30 at most"),
        (["--tasks", "0"], "--tasks 0: it must be more than 0"),
        (["--seed", "-1"], "--seed -1: it must be 0 or more"),
        (["--dtype", "float16"], "--dtype float16: choose float32 or bfloat16"),
        (["--device", "nonsense"], "--device nonsense: choose auto, cpu, cuda or"),
        (["--device", "meta"], "--device meta: choose auto, cpu, cuda or"),
        (["--device", ""], "--device : choose auto, cpu, cuda or"),
        (["--device", "cuda:99"], "--device cuda:99 is not to be had here"),
        (["--prompt-length", "10001"], "--prompt-length 10001: it must be more than 0, and 10,000"),
        (["--max-tokens", "1" + 20 * "0"], "and 100,000 at most"),
        (["--corpus", ""], "--corpus '': it is empty"),
        (["--resume", "nowhere"], "nowhere holds no run"),
        (["--resume", "nowhere", "--steps", "3"], "nothing but --yes"),
        (["--model", "no-such-folder"], "no-such-folder"),
    ],
)
def test_mistakes_on_the_command_line_end_with_status_2(
    small_world, monkeypatch, capsys, argv, says
):
    """Each mistake: one line that says what was wrong, no traceback, exit status 2."""
    status, line = run_train(small_world[0], monkeypatch, capsys, *argv)
    assert status == 2 and says in line, line


@pytest.mark.parametrize(
    "options, says",
    [
        (["--corpus", "empty"], "no text there"),
        (["--corpus", "nowhere"], "nowhere does not exist"),
        (["--clusters", "5000"], "fewer clusters"),
        (["--support", "5000"], "give more data, or ask for fewer clusters"),
        (["--labeled", "empty"], "--labeled empty: no folder with .csv"),
        (["--labeled-share", "1.5"], "it must be 1 at most"),
        (["--relative-step", "0", "--inner-rate", "1e29"], "not finite"),
    ],
)
def test_input_that_cannot_work_ends_with_status_2(small_world, monkeypatch, capsys, options, says):
    """An empty corpus, too few sentences, an inner rate that overflows: one line that says what to
    do.
    """
    folder, defaults = small_world
    (folder / "empty").mkdir(exist_ok=True)
    status, line = run_train(folder, monkeypatch, capsys, *defaults, *options)
    assert status == 2 and says in line, line


def test_an_official_model_without_a_gpu_says_what_it_would_cost_and_stops(
    small_world, monkeypatch, capsys
):
    """Memory by part, hours and downloads are printed before anything is fetched; without a GPU it
    ends there unless --yes is given."""
    monkeypatch.setitem(train.SHAPES, "t5-small", (16, 4, 32, 1, 2, False))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train, "fetch_list", lambda _: ["download: 242 MB of t5-small"])
    with pytest.raises(InputError, match="no GPU here: add --yes"):
        train.main(["--model", "t5-small", "--bytes", "1000000000"])
    said = capsys.readouterr().out
    assert re.search(r"memory: +[\d.]+ GiB with micro-batches of 2048 positions: "
                     r"[\d.]+ weights, [\d.]+ micro-b"
                     r".*\ndownload: 242 MB of t5-small\n", said)
    assert re.search(r"[\d.]+ s a step, [\d,.]+ hours for 100,000 steps", said)
    assert "1 file(s) of openwebtext, about 0.6 GB of archives for 1 GB of text" in said
    monkeypatch.setattr(train, "time_lines", lambda *_: (["time: 7 s a step"], 194.0))
    with contextlib.chdir(small_world[0]):
        for model in ("t5-small", "model"):
            with pytest.raises(InputError, match="no GPU here: add --yes"):
                train.main(["--model", model])
            assert "7 s a step" in capsys.readouterr().out


def test_a_dry_run_stops_before_anything_is_fetched_or_made(
        small_world, tmp_path, hub, capsys, monkeypatch):
    """--dry-run prints memory, time and each file with its size, and fetches config.json only; for
    an official model it needs no hub that answers, and no machine that has the memory."""
    folder = save_model(tmp_path / "m", V11)
    hub.repos[ANY] = {"main": (COMMIT, hub_files(folder, "config.json", "model.safetensors"))}
    with contextlib.chdir(tmp_path):
        corpus = str(small_world[0] / "corpus.jsonl")
        assert train.main(["--model", ANY, "--corpus", corpus, "--dry-run"]) == 0
        assert not Path("runs").exists() and not Path("cache").exists()
    said = capsys.readouterr().out
    assert f"of {ANY} at {COMMIT}, not pinned: config.json (cached), model.safetensors" in said
    assert {file for method, _, file in hub.asked if method == "GET"} == {"config.json"}
    monkeypatch.setitem(train.SHAPES, "t5-small", (16, 4, 32, 1, 2, False))
    has = {"SC_PAGE_SIZE": 2 ** 20}
    monkeypatch.setattr(train.os, "sysconf", has.get)
    for has["SC_PHYS_PAGES"], seconds in ((1 << 20, r"[\d.]+ s a step"), (16, "cannot be")):
        assert train.main(["--model", "t5-small", "--device", "cpu", "--dry-run"]) == 0
        assert re.search(r"memory: .* weights.*\ndownload: config.json of google-t5/t5-small@\w+ "
                         f"was not fetched .*\ntime: +{seconds}", capsys.readouterr().out)


def test_official_shapes_have_the_published_sizes():
    """Every short name's shape is known, to count without a network: its parameters are as many as
    the model cards say."""
    counts = {"t5-small": 60_506_624, "t5-base": 222_903_552, "t5-large": 737_668_096,
              "t5-3b": 2_851_598_336}
    counts |= {family.format(size): count for size, count in {
        "small": 76_961_152, "base": 247_577_856, "large": 783_150_080, "xl": 2_849_757_184,
        "xxl": 11_135_332_352}.items() for family in ("t5-v1_1-{}", "t5-{}-lm-adapt", "flan-t5-{}")}
    assert counts == {name: sum(map(math.prod, T.expected_shapes(train.model_shape(name)).values()))
                      for name in train.SHAPES} and counts.keys() == data.MODELS.keys()


@needs_data
def test_flan_t5_xl_fits_24_gigabytes():
    """In bfloat16, two examples at a time, exact second order, texts of 412 tokens: by the
    estimate, which a test below holds against what is measured."""
    training, method, _, _ = train.parse(
        ["--model", "flan-t5-xl", "--dtype", "bfloat16", "--micro-tokens", "1024"])
    parts = train.memory_needed(train.model_shape("flan-t5-xl"), training, method)
    assert parts["weights"] == pytest.approx(2 * 2.85e9, rel=0.01)
    assert parts["micro-batch"] > 5e9 and sum(parts.values()) < 24e9


def test_memory_that_is_not_there_is_told_with_what_would_do(monkeypatch):
    """Before anything is allocated: a run that needs more than the device has is refused, with the
    micro-batch that would fit, or with the advice to take less of a model."""
    training, method, _, control = train.parse(["--model", "m", "--micro-tokens", "3072"])
    parts = {"weights": 8 << 30, "micro-batch": 12 << 30, "program": 1 << 30}
    has = {"SC_PAGE_SIZE": 2 ** 20, "SC_PHYS_PAGES": 16 << 10}
    monkeypatch.setattr(train, "memory_needed", lambda *_: parts)
    monkeypatch.setattr(train, "model_shape", lambda _: None)
    monkeypatch.setattr(train, "fetch_list", None)                      # it does not come so far
    monkeypatch.setattr(train.os, "sysconf", has.get)
    for there, advice in ((16, "--micro-tokens 1792"), (11, "--micro-tokens 512"),
                          (10, "--dtype bfloat16 or a smaller model")):
        has["SC_PHYS_PAGES"] = there << 10
        with pytest.raises(InputError) as caught:
            train.prepare(training, method, torch.device("cpu"), control)
        assert str(caught.value) == ("m needs 21.0 GiB with micro-batches of 3072 positions, "
                                     f"cpu has {there}.0: try {advice}")
    has["SC_PHYS_PAGES"] = 21 << 10
    assert train.memory_lines(None, training, method, torch.device("cpu")) == (
        "memory:   21.0 GiB with micro-batches of 3072 positions: 8.00 weights, 12.00 micro-batch, "
        "1.00 program", "")


def test_memory_does_not_grow_with_the_support_set():
    """Counted operation by operation: four times the support examples take the same peak, up to
    1 %, when graphs are made again; kept, they take at least twice as much. A budget of two and a
    half graphs keeps two, whose bytes are what was counted, up to 2 %; half of one is refused."""
    t5 = train.stand_in(V11._replace(d_model=64, d_ff=96, num_layers=1, num_decoder_layers=1),
                        torch.float32, "meta")
    theta = torch.empty(20, 64, device="meta")

    def peak_and_kept(examples, graphs):
        support = train.stand_in_task(64, examples, 60).support
        with train.LiveBytes([*t5.weights.values(), theta]) as live:
            *_, hessian = supmer.gradient_and_hessian(t5, theta, support,
                                                      Method(micro_tokens=160, keep_graphs=graphs))
            kept = live.bytes
            hessian(theta)
        return live.peak, kept
    again, kept = peak_and_kept(8, 0)[0], peak_and_kept(8, 4)[0]
    assert again == pytest.approx(peak_and_kept(2, 0)[0], rel=0.01) and kept > 2 * again
    training, method = train.settings({"prompt_length": 20, "max_tokens": 60, "micro_tokens": 160})
    for tokens, graphs in ((160, 16), (120, 32), (40, 32)):        # of 32 texts, 2, 1 and 1 at once
        parts = train.memory_needed(t5.config, training, replace(method, micro_tokens=tokens,
                                                                 keep_graphs=99))
        assert f"{graphs} kept graphs" in parts
    graph = train.micro_batch_bytes(t5.config, training, method)[1]
    for graphs in (2.5, 0.5):
        budget = replace(training, keep_gib=graphs * graph / 2 ** 30)
        if graphs < 1:
            with pytest.raises(InputError, match="a graph takes"):
                train.graphs_that_fit(t5.config, budget, method)
        else:
            count = train.graphs_that_fit(t5.config, budget, method).keep_graphs
            assert count == 2 and peak_and_kept(8, 2)[1] == pytest.approx(2 * graph, rel=0.02)


def test_the_time_is_that_of_the_methods_own_step(monkeypatch, small_world):
    """A dry run measures PPT's two gradients, MetaPT's meta-gradient without a partner to mix in,
    SUPMER's with one."""
    t5, seen = train.stand_in(V11, torch.float32, "cpu"), []
    monkeypatch.setattr(train, "prompt_gradient", lambda *_: seen.append("gradient"))
    monkeypatch.setattr(train, "meta_gradient", lambda *a: seen.append(a[5]))
    for name, of_a_task in (("ppt", ["gradient"] * 2), ("metapt", [0]), ("supmer", [0.5])):
        training, method, _, _ = train.parse(["--method", name, "--labeled", "sets"])
        training = replace(training, corpus=(str(small_world[0] / "corpus.jsonl"),))
        train.time_lines(t5, training, method)
        assert seen == of_a_task * 2
        seen.clear()


def test_a_gpu_that_is_named_is_the_current_one(monkeypatch):
    """--device cuda:1: what names no GPU goes there as well."""
    current = []
    monkeypatch.setattr(torch, "empty", lambda *_, device: SimpleNamespace(
        device=torch.device(device)))
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert train.pick_device("cuda:1") == torch.device("cuda:1") and train.pick_device("cpu")
    assert current == [torch.device("cuda:1")]


@pytest.mark.parametrize("layers, tokens", [(2, 412), pytest.param(12, 90, marks=needs_data)])
def test_the_memory_estimate_is_what_a_step_takes(layers, tokens):
    """t5-base's widths, for which nothing was calibrated, of two layers and the longest texts, and
    with SUPMER_DATA, for its time, of all twelve layers: an exact second-order meta-gradient in a
    fresh process takes within 15 % of what memory_needed says for one task, the weights aside. The
    activations are most of it. The allocator gives back what it does not use."""
    training, method, _, _ = train.parse([
        "--model", "t5-base", "--micro-tokens", str(100 + tokens), "--max-tokens", str(tokens),
        "--tasks", "1"])
    depth = f"num_layers={layers}, num_decoder_layers={layers}"
    config = train.model_shape("t5-base")._replace(num_layers=layers, num_decoder_layers=layers)
    parts = train.memory_needed(config, training, method)
    assert parts["weights"] == 4 * sum(map(math.prod, T.expected_shapes(config).values()))
    said = sum(parts.values()) - parts["weights"] - parts["program"] + train.LIBRARIES
    assert parts["micro-batch"] > said / 2
    tidy = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    grown = peak_of(f"""
import supmer, torch, train
config = train.model_shape("t5-base")._replace({depth})
t5 = train.stand_in(config, torch.float32, "cpu")
task = train.stand_in_task(config.d_model, 1, {tokens})
method = supmer.Method(micro_tokens={100 + tokens})""", """
theta, phi = supmer.init_prompt(t5, 100, 0), supmer.init_regularizer(t5.config.d_model)
supmer.meta_gradient(t5, theta, phi, task, task, 0.5, 0.5, method)""", **tidy)
    assert grown * 2 ** 20 == pytest.approx(said, rel=0.15)


def test_max_minutes_ends_a_run_that_can_go_on(small_world, monkeypatch, capsys):
    """--max-minutes stops after the step in which the time is over, with status 0 and the command
    to go on; going on gives the run that was never stopped. Over before the first step it is a
    Ctrl-C."""
    folder, defaults = small_world
    monkeypatch.chdir(folder)
    assert train.main([*defaults, "--run", "whole"]) == 0
    with pytest.raises(KeyboardInterrupt):
        train.main([*defaults, "--run", "none", "--max-minutes", "1e-9"])
    step = train.meta_step

    def slow(*arguments):                                   # the time is over within this one
        signal.setitimer(signal.ITIMER_REAL, 1e-6)
        time.sleep(0.01)
        return step(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(train, "meta_step", slow)
        assert train.main([*defaults, "--run", "short", "--max-minutes", "9"]) == 0
    said = capsys.readouterr().out
    assert "stopped after step 1, nothing is lost" in said and "--resume short" in said
    assert train.main(["--resume", "short", "--max-minutes", "9"]) == 0
    assert log_without_times(folder / "short") == log_without_times(folder / "whole")
    with pytest.raises(InputError, match="--max-minutes 0.0: it must be more than 0"):
        train.main([*defaults, "--max-minutes", "0"])


def test_a_full_disk_ends_with_status_2_and_the_run_can_be_resumed(
        small_world, monkeypatch, capsys):
    """A limit on file sizes stands in for a full disk: one line, nothing half-written, and the run
    goes on later.
    """
    folder, options = small_world
    run = unfinished_run((folder, [*options, "--save-seconds", "0"]), "full")
    run.step()
    run.save()
    size = (run.folder / "state.safetensors").stat().st_size            # the log is half as long
    ended = Started(folder, "--resume", "full", file_size=size - 1)
    _, said = ended.end()
    assert ended.returncode == 2 and "Traceback" not in said, said
    assert "File too large" in said.strip().splitlines()[-1]
    assert not list(run.folder.glob(".*.tmp"))
    code, said = run_train(folder, monkeypatch, capsys, "--resume", "full")
    assert code == 0, said


def test_a_run_is_not_resumed_on_other_data(small_world):
    """run.json keeps what the run is made of; another corpus, model, tokenizer or option is refused
    by name.
    """
    folder, _ = small_world
    train.write_run(folder, {"name": "supmer", "training": {}, "method": {}, "finished": False,
                            "ended": None, "made_of": {"corpus": "a", "model": "b"}})
    train.check_origin(folder, {"corpus": "a", "model": "b"})
    with pytest.raises(InputError, match="made with another model than is there now"):
        train.check_origin(folder, {"corpus": "a", "model": "c"})


def test_a_validation_that_is_not_finite_stops_the_run(small_world, monkeypatch):
    """NaN compares as neither lower nor higher: it must not pass for a finished run without a
    prompt.
    """
    run = make_run(small_world, "nan")
    monkeypatch.setattr(
        train, "validate", lambda *_: {"loss_before": 1.0, "loss": math.nan, "step_size": 0.1}
    )
    with pytest.raises(InputError, match="validation loss is nan"):
        run.validate()


def test_damaged_states_are_refused(small_world):
    """A truncated state, a state of other shapes, a run.json that is none: InputError naming the
    file.
    """
    run = make_run(small_world, "damaged")
    run.step()
    run.save()
    path = run.folder / "state.safetensors"
    whole = path.read_bytes()
    for cut in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError, match="state.safetensors cannot be resumed from"):
            make_run(small_world, "damaged")
    path.write_bytes(whole)
    with pytest.raises(InputError, match="state.safetensors cannot be resumed from"):
        make_run(small_world, "damaged", prompt_length=5)
    (run.folder / "run.json").write_text("{}")
    with pytest.raises(InputError, match="holds no run"):
        train.read_run(run.folder)


def test_prompt_files_of_others_are_refused(tmp_path):
    """load_prompt wants theta and phi of one width, finite, of a known form: each other file is
    named with what it holds.
    """
    path, phi = tmp_path / "prompt.safetensors", supmer.init_regularizer(8)
    train.save_prompt(path, torch.ones(3, 8), phi, {"model": "m"})
    theta, read, about = train.load_prompt(path, 8)
    assert (
        torch.equal(theta, torch.ones(3, 8))
        and torch.equal(read["A"], torch.eye(8))
        and about["model"] == "m"
    )
    with pytest.raises(InputError, match="for a T5 of width 16"):
        train.load_prompt(path, 16)
    save_file({"theta": torch.ones(3, 8)}, path)
    with pytest.raises(InputError, match="its regularizer is None"):
        train.load_prompt(path, 8)
    save_file({"theta": torch.ones(3, 8)}, path, {"regularizer": "affine"})
    with pytest.raises(InputError, match="no prompt and regularizer"):
        train.load_prompt(path, 8)
    train.save_prompt(path, torch.full((3, 8), torch.nan), phi, {})
    with pytest.raises(InputError, match="not finite"):
        train.load_prompt(path, 8)
    path.write_bytes(b"<html>404</html>")
    with pytest.raises(InputError, match="cannot be read as a prompt"):
        train.load_prompt(path, 8)


# --------------------------------------------------------- prompts of others: the authors', PEFT's

def test_released_regularizer_by_hand():
    """Width 2, rank 2: gate sigmoid(1 * relu(24 * (1 + 3) / 4) - 24) = 1/2; h is relu(relu(g)
    swapped - (0, 1)), rescaled to |g|; psi is their mean."""
    phi = baselines.init_released_regularizer(2)
    for i in (0, 1):
        phi[f"mlp.layers.{i}.u"] = torch.eye(2)
        phi[f"mlp.layers.{i}.v"] = torch.eye(2)
    phi["mlp.layers.1.v"] = torch.tensor([[0., 1.], [1., 0.]])
    phi["mlp.layers.1.bias"] = torch.tensor([0., -1.])
    phi["mlp.linear_1.weight"] = torch.ones(24, 2) / 4
    phi["mlp.linear_2.weight"] = torch.ones(1, 24)
    phi["mlp.linear_2.bias"] = torch.tensor([-24.])
    g = torch.tensor([[3., 4.], [-3., 4.], [0., 0.], [-3., -4.]])
    # relu(g): (3, 4), (0, 4), (0, 0), (0, 0); swapped, - 1: (4, 2), (4, 0), (0, 0), (0, 0)
    h = torch.tensor([[4., 2.], [5., 0.], [0., 0.], [0., 0.]])
    h[0] *= 5 / 20 ** 0.5
    psi = baselines.regularize_released(phi, g, torch.tensor([1., 3.]))
    assert torch.allclose(psi, (g + h) / 2, rtol=1e-6)
    closed = phi | {"mlp.linear_2.bias": torch.tensor([100.])}
    assert torch.allclose(baselines.regularize_released(closed, g, torch.tensor([1., 3.])), g)


def released_files(folder, name, d):
    """The authors' two files for a T5 of width d, with random numbers and NaN in the buffers that
    are not used, as theirs."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(100, d, generator=generator)
    phi = {name: torch.randn(x.shape, generator=generator) / 9
           for name, x in baselines.init_released_regularizer(d).items()}
    buffers = {"grad_mean": torch.full((d,), math.nan), "grad_std": torch.full((d,), math.nan),
               "grad_s": torch.zeros(d), "k": torch.zeros(1)}
    folder.mkdir(exist_ok=True)
    torch.save(theta, folder / f"prompt_{name}.pt")
    torch.save(phi | buffers, folder / f"gradient_edit_{name}.pt")
    return theta, phi


@pytest.mark.parametrize("name, d", [("t5base", 768), ("flant5xl", 2048)])
def test_released_prompts_are_read(name, d, tmp_path):
    """Both sizes of the authors' files, buffers ignored by name; psi is finite."""
    theta, phi = released_files(tmp_path, name, d)
    read, read_phi, about = train.load_prompt(tmp_path, d)
    assert torch.equal(read, theta) and about["regularizer"] == "released"
    assert read_phi.keys() == phi.keys() and all(torch.equal(read_phi[n], phi[n]) for n in phi)
    psi = baselines.REGULARIZERS["released"][1](read_phi, theta / 1e6, theta.mean(0))
    assert psi.isfinite().all() and not torch.allclose(psi, theta / 1e6)


def test_tuning_with_the_authors_files(place, monkeypatch):
    """`eval.py --prompt released` fetches both files, once, and tunes as with a folder that has
    them: from their theta, through their form of psi, which no other model's shape gets."""
    theta, phi = released_files(place / "theirs", "t5base", 16)
    monkeypatch.setitem(data.RELEASED, (16, 32), "t5base")
    monkeypatch.setattr(data, "RELEASED_URL", (place / "theirs").as_uri() + "/")
    evaluation.main([*SMALL, "--prompt-length", "100", "--prompt", "released", "theirs"])
    assert {path.name for path in (place / "cache/released").glob("[!.]*")} == {
        path.name for path in (place / "theirs").iterdir()}
    tuning = json.loads(Path("runs/eval/small-planted.json").read_text())["results"][0]["tuning"]
    curves = {name: [record["validations"] for record in tuning[name]] for name in tuning}
    assert curves["released"] == curves["theirs"]
    monkeypatch.setattr(data, "RELEASED_URL", "file:///nowhere/")       # they are there already
    settings, _ = evaluation.parse([*SMALL, "--prompt-length", "100", "--prompt", "released"])
    prompt = evaluation.open_candidate("released", small_config(), settings)
    g, H = theta.flip(0) / 1e4, theta[0]
    assert torch.equal(prompt.starts[0](small_t5())["theta"], theta)
    assert torch.equal(prompt.psi(g, H), baselines.regularize_released(phi, g, H))
    with_psi, without = (tune(small_t5(), theta, psi, (small_examples(8),) * 2, 10, 0.3,
                                         settings)[0] for psi in (prompt.psi, None))
    assert with_psi[-1]["loss"] != pytest.approx(without[-1]["loss"], rel=1e-4)
    monkeypatch.delitem(data.RELEASED, (16, 32))
    with pytest.raises(InputError, match="for t5-base and flan-t5-xl only"):
        evaluation.open_candidate("released", small_config(), settings)


def test_damaged_released_prompts(tmp_path):
    """A T5 of another width, a file that is missing, cut, a web page, of something else, of another
    form or a pickle with code: refused by name, and nothing is executed."""
    released_files(tmp_path, "t5base", 768)
    prompt, edit = tmp_path / "prompt_t5base.pt", tmp_path / "gradient_edit_t5base.pt"
    with pytest.raises(InputError, match="for t5-base and flan-t5-xl, of widths 768 and 2048, not"):
        train.load_prompt(tmp_path, 512)
    with pytest.raises(InputError, match="prompt_flant5xl.pt cannot be read.*pretrain_prompt"):
        train.load_prompt(tmp_path, 2048)
    whole = prompt.read_bytes()
    evil = pickle.dumps(Evil(tmp_path / "executed"))
    for content in (whole[:-100], whole[:3], b"", b"<html>no</html>", evil):
        prompt.write_bytes(content)
        with pytest.raises(InputError, match="prompt_t5base.pt cannot be read") as caught:
            train.load_prompt(tmp_path, 768)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()
    torch.save({"a": 1}, prompt)
    with pytest.raises(InputError, match="does not hold a tensor and a dict of tensors"):
        train.load_prompt(tmp_path, 768)
    prompt.write_bytes(whole)
    phi = torch.load(edit, weights_only=True)
    for changed in ({n: x for n, x in phi.items() if "linear_1" not in n},
                    phi | {"mlp.linear_2.bias": torch.zeros(2)}, phi | {"extra": torch.zeros(2)}):
        torch.save(changed, edit)
        with pytest.raises(InputError, match="no prompt and regularizer for a T5 of width 768"):
            train.load_prompt(tmp_path, 768)


def run_with_prompt(folder, config, model):
    """A run's folder as train.py leaves it, with a random prompt of 5 vectors -> theta."""
    theta = torch.randn(5, config.d_model, generator=torch.Generator().manual_seed(6))
    folder.mkdir()
    train.save_prompt(folder / "prompt.safetensors", theta,
                       supmer.init_regularizer(config.d_model), {"model": str(model)})
    return theta


def test_export_for_peft_and_back(tmp_path, capsys):
    """train.py --export-peft RUN DIR writes the two files of PEFT's format, once; load_prompt reads
    them back, also where PEFT stored a second set for the decoder."""
    model = save_model(tmp_path / "model", V11)
    theta = run_with_prompt(tmp_path / "run", V11, model)
    out = tmp_path / "adapter"
    assert train.main(["--export-peft", str(tmp_path / "run"), str(out)]) == 0
    assert f"5 vectors for peft.PeftModel.from_pretrained on {model}" in capsys.readouterr().out
    values = json.loads((out / "adapter_config.json").read_text())
    assert (values["num_virtual_tokens"], values["num_transformer_submodules"]) == (5, 1)
    read, phi, about = train.load_prompt(out, V11.d_model)
    assert torch.equal(read, theta) and phi is None and about["model"] == str(model)
    file = out / "adapter_model.safetensors"
    save_file({"prompt_embeddings": torch.cat([theta, -theta])}, file)
    assert torch.equal(train.load_prompt(out, V11.d_model)[0], theta)
    for changed, says in (({"x": theta}, "must hold 5 vectors"), ({}, "must hold 5 vectors"),
                          ({"prompt_embeddings": theta[:4]}, "must hold 5 vectors"),
                          ({"prompt_embeddings": theta * math.nan}, "not finite"),
                          ({"prompt_embeddings": theta.repeat(1, 2)}, "no prompt and regularizer")):
        save_file(changed, file)
        with pytest.raises(InputError, match=says):
            train.load_prompt(out, V11.d_model)
    file.unlink()
    with pytest.raises(InputError, match="adapter_model.safetensors cannot be read"):
        train.load_prompt(out, V11.d_model)
    for key, value in (("peft_type", "LORA"), ("task_type", "CAUSAL_LM"),
                       ("num_virtual_tokens", "5")):
        (out / "adapter_config.json").write_text(json.dumps(values | {key: value}))
        with pytest.raises(InputError, match="PROMPT_TUNING for SEQ_2_SEQ_LM is what can be read"):
            train.load_prompt(out, V11.d_model)
    for text in ("{", "[]", "{}", "7"):
        (out / "adapter_config.json").write_text(text)
        with pytest.raises(InputError, match="adapter_config.json cannot be read"):
            train.load_prompt(out, V11.d_model)
    with pytest.raises(InputError, match="exists: name another folder"):
        train.main(["--export-peft", str(tmp_path / "run"), str(out)])


@pytest.mark.skipif(peft is None, reason="peft is not installed: pip install peft")
def test_peft_reads_our_prompt_and_we_read_theirs(tmp_path):
    """A T5 of transformers with our exported prompt, loaded by PEFT, has our logits to 1e-5
    relative, with padding; a prompt that PEFT saved gives us PEFT's logits."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=2, vocab_size=60, dropout_rate=0.,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0)
    theirs = transformers.T5ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path / "model")
    ours = load_t5(tmp_path / "model")
    theta = run_with_prompt(tmp_path / "run", ours.config, tmp_path / "model")
    train.export_peft(tmp_path / "run", tmp_path / "adapter")
    adapter = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    peft.get_peft_model(copy.deepcopy(theirs), adapter).save_pretrained(tmp_path / "of peft")
    read, _, _ = train.load_prompt(tmp_path / "of peft", 32)
    assert read.shape == (3, 32)
    ids = torch.randint(2, 60, (2, 9), generator=torch.Generator().manual_seed(7))
    mask, target = torch.ones_like(ids).bool(), torch.tensor([[0, 5, 6], [0, 7, 8]])
    mask[1, 5:] = False
    for folder, prompt in ((tmp_path / "adapter", theta), (tmp_path / "of peft", read)):
        wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), folder).eval()
        with torch.no_grad():
            reference = wrapped(input_ids=ids, attention_mask=mask.long(),
                                decoder_input_ids=target).logits
        x = torch.cat([prompt.expand(2, -1, -1), T.embed_tokens(ours, ids)], 1)
        out = logits(ours, x, F.pad(mask, (len(prompt), 0), value=True), target)
        assert relative(out, reference) < 1e-5


# ------------------------------------------------------- baselines.py: what SUPMER is compared with


TUNED_BY = ("vocab", "prefix-tuning", "p-tuning-v2", "ft")


def wider_t5(d=32, scale=0.3, seed=3):
    """A random T5 whose states are rich enough for a tuned prompt to read two words together."""
    config, generator = small_config(d_model=d, d_kv=8, d_ff=2 * d), torch.Generator()
    generator.manual_seed(seed)
    return T.T5(config, {
        name: (1.0 if "layer_norm" in name else 0.0)
        + (1.0 if "relative" in name else scale) * torch.randn(shape, generator=generator)
        for name, shape in T.expected_shapes(config).items()})


def agreeing_examples(n, seed):
    """A filler, then `good film`, `bad food` (label 1) or `good food`, `bad film` (label 0): every
    word is as frequent in one label as in the other."""
    rng, mask, ids = np.random.default_rng(seed), len(PIECES) - 1, []
    for i in range(n):
        first = int(rng.integers(2))
        second = first if i % 2 else 1 - first
        ids.append([int(rng.integers(16, 26)), (8, 12)[first], (18, 19)[second], mask, 1])
    return data.Examples(ids, [[]] * n, torch.zeros(n, 0, 0), torch.arange(n) % 2,
                         [[mask, 6], [mask, 7]])


def begin(name, seed=0, length=8):
    return partial(baselines.BASELINES[name].start, seed=seed, length=length)


def accuracy_of(t5, name, kept, examples):
    model = baselines.BASELINES[name].model
    found = supmer.measure(supmer.score(*model(t5, kept), examples, supmer.Method()),
                           examples.labels)
    return found["correct"] / len(examples.ids)


@pytest.mark.parametrize("name, rate", [*zip(TUNED_BY, (0.3, 3e-3, 0.1, 3e-3))])
def test_each_method_learns_what_no_word_alone_tells(name, rate):
    """16 examples per label of a task whose words are equally frequent in both labels, so that a
    constant and every rule on one word stay at chance: each method learns it on a frozen random T5,
    which is afterwards what it was, and a step touches nothing but the parameters."""
    t5 = wider_t5()
    before = {key: w.clone() for key, w in t5.weights.items()}
    new, sample = agreeing_examples(200, 2), (agreeing_examples(32, 0), agreeing_examples(32, 1))
    for token in range(len(PIECES)):
        there = torch.tensor([token in ids for ids in new.ids])
        rule = (there.long() == new.labels).float().mean()
        assert 0.4 < rule < 0.6
    best, curve = None, []
    settings = eval_settings(epochs=80, batch=32, words_only=True, validate_every=10)
    for record, kept in evaluation.tune(t5, name, begin(name), None, sample, 10, rate, settings):
        curve.append(record)
        if min(curve, key=evaluation.rank) is record:
            best = {key: x.clone() for key, x in kept.items()}
    untuned = baselines.BASELINES[name].fold(t5, begin(name)(t5))
    assert accuracy_of(t5, name, untuned, new) < 0.65 < 0.68 < accuracy_of(t5, name, best, new)
    assert all(torch.equal(w, before[key]) for key, w in t5.weights.items())
    assert not any(w.requires_grad or w.grad is not None for w in t5.weights.values())


def test_tunable_parameters_are_the_published_ones():
    """PT 76,800 at t5-base (C.1: 77 K); P-Tuning-v2 two vectors a layer and position; Prefix-Tuning
    its MLP's; FT all 222.9 million; on another T5 what each method's start holds."""
    base = baselines.parameters_at(train.model_shape("t5-base"), 100)
    assert base["random"] == base["vocab"] == 76_800 and base["ft"] == 222_903_552
    assert base["p-tuning-v2"] == 24 * 2 * 20 * 768
    m, out = baselines.PREFIX_WIDTH, 24 * 2 * 768
    assert base["prefix-tuning"] == 20 * 768 + 768 * m + m + m * out + out
    t5 = small_t5()
    for name, number in baselines.parameters_at(t5.config, 3).items():
        one = baselines.BASELINES[name]
        assert number == sum(x.numel() for x in one.start(t5, 0, one.length or 3).values())


def test_a_prefix_is_keys_and_values_put_in_by_hand():
    """Self-attention of both stacks with a prefix equals softmax over prefix keys (no position) and
    own keys (the stack's bias), written out head by head; another prefix gives something else."""
    t5 = small_t5(torch.float64)
    made = begin("p-tuning-v2", length=5)(t5)
    generator = torch.Generator().manual_seed(1)
    prefixes = {key: torch.randn(x.shape, generator=generator, dtype=torch.float64)
                for key, x in made.items()}
    assert set(prefixes) == {f"{stack}.block.{i}.layer.0.SelfAttention.prefix" for stack, i in (
        ("encoder", 0), ("encoder", 1), ("decoder", 0))}
    prefixed, theta = baselines.with_prefix(t5, prefixes)
    assert theta.shape == (0, 16) and set(t5.weights) == set(prefixed.weights) - set(prefixes)
    x = torch.randn(2, 6, 16, generator=generator, dtype=torch.float64)
    for stack in ("encoder", "decoder"):
        layer, w = f"{stack}.block.0.layer.0", t5.weights
        bias = T.position_bias(t5, stack, 6)
        found = T.self_attention(prefixed, layer, x, bias)
        normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        normed = normed * w[f"{layer}.layer_norm.weight"]
        heads = []
        for h in range(4):
            q, k, v = (normed @ w[f"{layer}.SelfAttention.{part}.weight"][4 * h:4 * h + 4].T
                       for part in "qkv")                                           # (2, 6, 4)
            pk, pv = prefixes[f"{layer}.SelfAttention.prefix"][:, h]                # (5, 4)
            scores = torch.cat([q @ pk.T, q @ k.mT + bias[0, h]], -1)               # (2, 6, 11)
            heads.append(scores.softmax(-1) @ torch.cat([pv.expand(2, 5, 4), v], 1))
        by_hand = torch.cat(heads, -1) @ w[f"{layer}.SelfAttention.o.weight"].T
        assert torch.allclose(found, by_hand, rtol=1e-10, atol=1e-12)
        assert not torch.allclose(T.self_attention(t5, layer, x, bias), by_hand, rtol=1e-3)


def test_the_folded_mlp_is_p_tuning_v2():
    """What Prefix-Tuning keeps has P-Tuning-v2's names and shapes, keys and values of the same size
    at the start, and gives the same scores and, through the MLP, gradients: those by the chain rule
    from P-Tuning-v2's. The MLP's formula is written out for one entry."""
    t5, examples = small_t5(torch.float64), small_examples(6)
    mlp = {key: x.double() for key, x in begin("prefix-tuning", length=5)(t5).items()}
    kept = baselines.fold_prefix(t5, mlp)
    direct = begin("p-tuning-v2", length=5)(t5)
    assert {key: x.shape for key, x in kept.items()} == {key: x.shape for key, x in direct.items()}
    for key in kept:
        assert 0.5 < kept[key].square().mean().sqrt() / direct[key].square().mean().sqrt() < 2
    hidden = torch.tanh(mlp["E"][3] @ mlp["W1"] + mlp["b1"])
    column = (2 * 2 + 1) * 16 + 2 * 4 + 1           # decoder's block, value, head 2, entry 1
    last = kept["decoder.block.0.layer.0.SelfAttention.prefix"]
    assert torch.allclose(last[1, 2, 3, 1], hidden @ mlp["W2"][:, column] + mlp["b2"][column])
    method = supmer.Method(micro_tokens=40)
    g, _ = baselines.tuning_gradient(t5, baselines.BASELINES["prefix-tuning"], mlp, examples,
                                     method)
    g_direct, _ = baselines.tuning_gradient(t5, baselines.BASELINES["p-tuning-v2"], kept,
                                               examples, method)
    _, pull_back = torch.func.vjp(lambda mlp: baselines.fold_prefix(t5, mlp), mlp)
    chained, = pull_back(g_direct)
    assert all(torch.allclose(g[key], chained[key], rtol=1e-8, atol=1e-14) for key in g)
    assert max(float(x.abs().max()) for x in g.values()) > 1e-6


@pytest.mark.parametrize("tied", [False, True])
def test_ft_differentiates_every_weight(tied):
    """FT's gradient is autograd's with respect to all weights, in float64; a tied head is one."""
    t5 = small_t5(torch.float64)
    if tied:
        t5 = T.T5(small_config(tied=True, scaled=True), {
            **t5.weights, "lm_head.weight": t5.weights["shared.weight"]})
    one, examples = baselines.BASELINES["ft"], small_examples(6)
    parameters = {key: x.double() for key, x in one.start(t5, 0, 0).items()}
    assert len(parameters) == len(t5.weights) - tied
    g, _ = baselines.tuning_gradient(t5, one, parameters, examples, supmer.Method(micro_tokens=40))
    leaves = {key: x.clone().requires_grad_() for key, x in parameters.items()}
    scores = supmer.word_log_probs(*(lambda made, theta: (made, *supmer.encode_with_prompt(
        made, theta, data.collate(examples, range(6)))))(*one.model(t5, leaves)), examples.words)
    by_hand = -scores[range(6), examples.labels].mean()
    by_hand.backward()
    assert all(torch.allclose(g[key], leaf.grad, rtol=1e-9, atol=1e-13)
               for key, leaf in leaves.items())


def test_prompts_gradient_is_the_kernels():
    """For a prompt, tuning_gradient is supmer.prompt_gradient, up to the rounding of its sum."""
    t5, examples = small_t5(), small_examples(10)
    theta = baselines.normal_prompt(t5, 1, 3)["theta"]
    g, H = baselines.tuning_gradient(t5, baselines.BASELINES["random"], {"theta": theta}, examples,
                                     supmer.Method(micro_tokens=40))
    expected = supmer.prompt_gradient(t5, theta, examples, supmer.Method(micro_tokens=40))
    for one, other in zip((g["theta"], H), expected):
        assert relative(one, other) < 1e-6


def test_inputs_of_each_kind_literally(place, monkeypatch):
    """Multiple choice; an instruction; an instruction and solved examples, labels in turn, every
    order of the same ones, as many as fit with the row in CONTEXT tokens, not one fewer."""
    monkeypatch.setitem(baselines.INSTRUCTIONS, "planted", "the film was good ?")
    tokenizer = data.load_tokenizer("small", small_config())
    task = TASKS["planted"]
    rows = [data.Row(1, {"text": "nice food"})]
    shown = [data.Row(i % 2, {"text": f"{FILLER[i]} {(NEGATIVE, POSITIVE)[i % 2][i // 2]}"})
             for i in range(6)]

    def read(name, seed=0):
        return [tokenizer.decode(posed.ids[0], skip_special_tokens=False) for posed in
                baselines.BASELINES[name].pose(tokenizer, "planted", task, rows, shown, seed)]
    row = "nice food It was <extra_id_0> ? </s>"
    assert read("vocab") == [row] and read("zero-shot") == [f"the film was good ? {row}"]
    assert baselines.as_choice("{a} . {b}", ("yes", "no", "maybe")) == (
        "{a} . {b} ? A. yes B. no C. maybe . Answer: <X>")
    solved = {f"{r.fields['text']} It was {task.words[r.label]} ?" for r in shown}

    def parts(text):
        middle = text.removeprefix("the film was good ? ").removesuffix(row).strip()
        return re.findall(r"\S+ \S+ It was \S+ \?", middle)
    orders = [parts(text) for text in read("few-shot")]
    assert len(orders) == baselines.ORDERS and len({tuple(order) for order in orders}) > 1
    assert all(set(order) == solved and len(order) == 6 for order in orders)
    assert read("few-shot") == read("few-shot") != read("few-shot", 1)
    monkeypatch.setattr(baselines, "CONTEXT", 5 + 7 + 3 * 6)     # instruction, row, three of six
    few = [parts(text) for text in read("few-shot")]
    assert all(len(order) == 3 and set(order) == set(few[0]) for order in few)
    counts = Counter(line.split()[4] for line in few[0])
    assert max(counts.values()) - min(counts.values()) == 1      # labels take turns
    monkeypatch.setattr(baselines, "CONTEXT", 5 + 7 + 3 * 6 - 1)
    assert all(len(parts(text)) == 2 for text in read("few-shot"))
    assert set(TASKS) - {"planted"} <= set(baselines.INSTRUCTIONS)
    with pytest.raises(InputError, match="mine has no instruction"):
        baselines.pose_instructed(tokenizer, "mine", task, rows, shown, 0)


def test_unified_meta_tasks_literally(planted):
    """Unified-PPT's pairs are multiple choice among their words, the same sentences as ever; the
    other variants are as ever."""
    tokenizer, store, plain = planted
    index = TaskIndex(store, tokenizer, recast=baselines.UNIFIED)
    for variant in VARIANTS:
        unified, task = (meta_task(one, 0, 0, 0, variant=variant, stream=1)
                         for one in (index, plain))
        assert torch.equal(unified.query.labels, task.query.labels)
        source, target = data.examples_as_text(tokenizer, unified.query, 0)
        usual, word = data.examples_as_text(tokenizer, task.query, 0)
        if variant[:2] != "sp":
            assert (source, target) == (usual, word)
            continue
        words = data.WORDS[variant]
        options = " ".join(f"{letter}. {word}" for letter, word in zip("ABC", words))
        first, second = usual.removesuffix("</s>").split(" <extra_id_0> . ")
        assert source == f"{first} . {second} ? {options} . Answer: <extra_id_0></s>"
        assert target == "ABC"[words.index(word)]


# ---------------------------------------------------- train.py: what it is compared with, ablations


def test_ppt_step_by_hand(small_world):
    """Three steps of PPT equal Adam on the clipped gradient of the mean loss over all support and
    query examples of the tasks as one set, at the rate prompt_rate / sqrt(t); phi and s stay."""
    run = make_run(small_world, "ppt-by-hand", method="ppt")
    t5, method = run.t5, run.method
    theta, m, v = run.state.theta.clone(), 0.0, 0.0
    for t in (1, 2, 3):
        sets = [part for task, _ in run.batch() for part in (task.support, task.query)]
        assert sum(len(part.ids) for part in sets) == 16
        leaf = theta.clone().requires_grad_()
        losses = [-supmer.word_log_probs(t5, *supmer.encode_with_prompt(
            t5, leaf, data.collate(part, [row])), part.words)[0, part.labels[row]]
            for part in sets for row in range(len(part.ids))]
        g, = torch.autograd.grad(sum(losses) / 16, leaf)
        g = g * min(1.0, method.clip / (float(g.norm()) + 1e-6))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g ** 2
        theta = theta - method.prompt_rate / math.sqrt(t) * (m / (1 - 0.9 ** t)) / (
            (v / (1 - 0.999 ** t)).sqrt() + 1e-8)
        entry = run.step()
        assert entry["query_loss"] == pytest.approx(float(sum(losses)) / 16, rel=1e-5)
    assert torch.allclose(run.state.theta, theta, rtol=1e-4, atol=1e-5) and run.state.s == -1
    run.method = replace(method, regularizer=False)
    run.best = float("inf")
    run.validate()
    kept, phi, about = train.load_prompt(run.folder / "prompt.safetensors", 16)
    assert about["examples"] == f"{3 * 16} of {16 * method.steps}" and phi is None
    assert torch.equal(kept, run.state.theta)
    assert about["method"] == "ppt" and about["regularizer"] == ""


def test_ppt_step_stops_on_numbers_that_are_not_finite():
    """A NaN in the weights stops the step with its number and a remedy, and changes nothing."""
    t5, state = small_state(Method())
    t5.weights["lm_head.weight"][0, 0] = float("nan")
    before = state.theta.clone()
    with pytest.raises(InputError, match="step 0: the loss is nan.*smaller prompt_rate"):
        baselines.ppt_step(t5, state, [(random_task(1), random_task(1))], Method(), 0)
    assert torch.equal(state.theta, before) and state.step == 0


@pytest.mark.parametrize("method", ["ppt", "unified-ppt"])
def test_plain_pretraining_lowers_the_loss(small_world, method):
    """Forty steps on one batch of tasks lower its loss by a tenth."""
    run = make_run(small_world, f"{method}-learns", method=method)
    pairs = run.batch()
    state, settings = run.state, replace(run.method, prompt_rate=0.3)
    losses = [run.advance(run.t5, state, pairs, settings, 0)["query_loss"] for _ in range(40)]
    assert losses[-1] < 0.9 * losses[0] and state.step == 40


METAPT = ["--method", "metapt", "--labeled", "sets"]


def test_every_method_draws_as_many_examples():
    """SUPMER's step of n tasks draws n (support + query) examples and the partners' n query: 384
    with the paper's sizes, 38.4 million in its 100,000 steps; PPT, Unified-PPT and MetaPT, of 256 a
    step, get 150,000 steps; --examples sets any method's steps; with --steps they are as given."""
    base = ["--model", "t5-base"]
    for argv, steps, per_step in (
            ([], 100_000, 384), (["--method", "ppt"], 150_000, 256),
            (["--method", "unified-ppt"], 150_000, 256), (METAPT, 150_000, 256),
            (["--ablation", "no-ta"], 150_000, 256), (["--ablation", "no-mgr"], 100_000, 384),
            (["--examples", "3840"], 10, 384), (["--method", "ppt", "--examples", "3840"], 15, 256),
            (["--method", "ppt", "--steps", "7"], 7, 256)):
        training, method, _, _ = train.parse([*base, *argv])
        assert method.steps == steps
        assert baselines.examples_per_step(training, method) == per_step


def test_the_recipes_are_the_papers():
    """MetaPT: inner 0.08, outer 0.025, patience 6, no regularizer, no augmentation (C.2); PPT: rate
    0.1; Table 4's rows, and first-order, leave out what their names say, and nothing else."""
    def recipe(*argv):
        training, method, _, control = train.parse(["--model", "t5-base", *argv])
        return asdict(training) | asdict(method), control
    usual, _ = recipe()

    def differs(*argv):
        found, _ = recipe(*argv)
        return {key: value for key, value in found.items() if value != usual[key]}
    metapt = differs(*METAPT)
    assert metapt.items() >= {
        "method": "metapt", "inner_rate": 0.08, "prompt_rate": 0.025, "patience": 6,
        "regularizer": False, "augmentation": False, "steps": 150_000, "corpus": (),
        "labeled_share": 1.0}.items() and usual["labeled_clusters"] == 10
    assert differs("--method", "ppt") == {"method": "ppt", "regularizer": False,
                                          "steps": 150_000}
    assert {name: differs("--ablation", name) for name in baselines.ABLATIONS} == {
        "only-sp": {"only": "sp"}, "only-mc": {"only": "mc"}, "only-ss": {"only": "ss"},
        "no-ta": {"augmentation": False, "steps": 150_000},
        "no-curriculum": {"curriculum": False}, "no-mgr": {"regularizer": False},
        "first-order": {"first_order": True}}
    assert usual["prompt_rate"] == 0.1


@pytest.mark.parametrize("argv, says", [
    (["--ablation", "no-mgr", "--method", "ppt"], "leave those options away"),
    (["--ablation", "only-sp", "--only", "mc"], "leave those options away"),
    (["--ablation", "no-psi"], "no-mgr"), (["--method", "pt"], "unified-ppt"),
    (["--method", "metapt"], "give --labeled FOLDER"),
    (["--method", "unified-ppt", "--labeled", "sets"], "leave --labeled away"),
    (["--examples", "100", "--steps", "3"], "without --steps"),
    (["--examples", "0"], "more than 0")])
def test_contradicting_methods_are_refused(argv, says):
    """One line that names what to leave away or the valid names."""
    with pytest.raises(InputError, match=says):
        train.parse(argv)


def test_plain_pretraining_is_chosen_without_an_inner_step(small_world, monkeypatch):
    """PPT's kept prompt is that of the lowest loss before an inner step, SUPMER's after one."""
    for method, kept in (("ppt", "2"), ("supmer", "1")):
        run = make_run(small_world, f"{method}-chosen", method=method)
        losses, run.best = iter([(0.4, 0.1), (0.3, 0.2)]), float("inf")
        with monkeypatch.context() as patch:
            patch.setattr(train, "validate", lambda *_: dict(
                zip(("loss_before", "loss"), next(losses)), step_size=1, queries=1, variants={}))
            for _ in range(2):
                run.step()
                run.validate()
        assert train.prompt_metadata(run.folder / "prompt.safetensors")["step"] == kept


def test_only_prompts_follow_the_tables_scale():
    """With a unit of 0 a prompt stays where it is; the other methods' rates have no unit."""
    t5, sample = small_t5(), (small_examples(4), small_examples(4))
    for name in TUNED_BY:
        records = [record["loss"] for record, _ in evaluation.tune(
            t5, name, begin(name), None, sample, 10, 0.01, eval_settings(), 0.0)]
        assert (records[0] == records[-1]) == (name == "vocab")


def test_fts_memory_is_what_it_takes():
    """Tuning all of 12 million weights on short texts, for which activations are nothing: the peak
    of a fresh process grows by what ft_memory says, within a quarter."""
    config = V11._replace(d_model=256, d_kv=64, d_ff=1024, num_heads=4, vocab_size=20_000)
    grown = peak_of(f"""
import torch, baselines, data, t5 as T, train
from eval import Tuning, tune_job
t5 = train.stand_in(T.T5Config(*{tuple(config)}), torch.float32, "cpu")
sample = [train.stand_in_task(256, 2, 4).support] * 2""", """
tune_job(t5, "ft", lambda t5: baselines.ft_start(t5, 0, 0), None, sample, 0, 1e-5,
         Tuning(4, 2, 2, False), 1.0, False, {})""", MALLOC_MMAP_THRESHOLD_="65536")
    said = baselines.ft_memory(config) / 2 ** 20
    assert grown - train.LIBRARIES / 2 ** 20 < 1.25 * said and grown > 0.75 * said


@pytest.mark.parametrize("options, name", [
    ([], "supmer"), (["--method", "ppt"], "ppt"), (["--ablation", "no-mgr"], "no-mgr"),
    (["--no-regularizer"], "no-mgr"), (["--only", "mc"], "only-mc"),
    (["--first-order"], "first-order"), (["--no-regularizer", "--first-order"], "variant"),
    (["--no-regularizer", "--no-curriculum"], "variant")])
def test_what_is_not_supmer_is_not_called_so(options, name):
    """A run without a part has the ablation's name, however it was asked for; none is "newest"."""
    training, method, _, _ = train.parse(options)
    assert baselines.name_of(training, method) == name


def test_patience_ends_a_run(small_world, monkeypatch):
    """After so many validations without a lower loss the run ends, is saved, and is not resumed."""
    run = make_run(small_world, "patient", patience=2)
    losses = iter([0.5, 0.6, 0.7, 0.1])
    result = {"loss_before": 9.0, "step_size": 0.05, "queries": 1, "variants": {}}
    monkeypatch.setattr(train, "validate", lambda *_: result | {"loss": next(losses)})
    run.method = replace(run.method, steps=10)
    assert run.train() is None and run.state.step == 6          # validated at 2, 4, 6
    assert train.prompt_metadata(run.folder / "prompt.safetensors")["step"] == "2"
    again = make_run(small_world, "patient", patience=2)
    assert again.state.step == 6 and again.train() is None and again.state.step == 6


# -------------------------------------------------------- eval.py: the comparison, on small things


EVERY = ("zero-shot", "few-shot", "vocab", "prefix-tuning", "p-tuning-v2", "ft")


def test_every_method_in_one_table(place, monkeypatch, capsys):
    """One command: a row for each method with its number of parameters; zero-shot and few-shot tune
    nothing and open no more than the others; the effect of the demonstrations' order is told; done
    again, nothing is tuned or scored anew; a kept state gives the table's predictions."""
    monkeypatch.setitem(baselines.INSTRUCTIONS, "planted", "the film was good ?")
    argv = [*SMALL, "--prompt", *EVERY, "--predictions"]
    evaluation.main(argv)
    printed, result = capsys.readouterr().out, first_result("runs/eval/small-planted.json")
    test = result["test"]["planted"]["prompts"]
    assert list(test) == list(EVERY)
    for name in EVERY:
        assert f"| {name} | {evaluation.figure(test[name]['tuned'])} |" in printed
    assert result["tuning"]["zero-shot"] == result["tuning"]["few-shot"] == []
    assert [name for name in EVERY if "untuned" in test[name]] == ["vocab"]
    orders = test["few-shot"]["orders"]
    assert len(orders) == baselines.ORDERS and test["few-shot"]["tuned"][0] == orders[0]
    assert f"few-shot: the first seed's demonstrations in {baselines.ORDERS} orders: " in printed
    assert "ft: 0.00 GiB in each process" in printed and "1 process(es)" in printed
    t5, tokenizer = load_t5(Path("small")), data.load_tokenizer("small", small_config())
    examples = task_examples(tokenizer, TASKS["planted"], load_test(TASKS["planted"], "data"))
    for name in EVERY[2:]:
        for i, record in enumerate(result["tuning"][name]):
            tensors, about = evaluation.read_result(record["file"])
            found = supmer.score(*baselines.BASELINES[name].model(t5, tensors), examples,
                                 supmer.Method()).argmax(-1)
            assert about["baseline"] == name
            assert found.tolist() == test[name]["predictions"][i]
    for name in ("tune", "score"):
        monkeypatch.setattr(evaluation, name, lambda *_: pytest.fail("done again"))
    evaluation.main(argv)
    assert tuning_record("runs/eval/small-planted.json") == tuning_record(
        "runs/eval/small-planted.1.json")


def test_unified_prompts_are_tuned_as_multiple_choice(place, monkeypatch):
    """A prompt that Unified-PPT made meets the task as it met its meta tasks; another does not."""
    for name in ("unified-ppt", "ppt"):
        write_run(f"runs/compared/small-{name}", name=name)
    monkeypatch.setattr(baselines, "LETTERS", ("nice", "warm"))     # pieces of this tokenizer
    seen, original = [], evaluation.tune
    monkeypatch.setattr(evaluation, "tune", lambda *a: (seen.append(a), original(*a))[1])
    evaluation.main([*SMALL, "--prompt", "unified-ppt", "ppt", "--seeds", "10", "--rates", "0.1",
                     "--task", "planted"])
    unified, plain = ([a[4][0] for a in seen if a[1] == name][0] for name in ("unified", "learned"))
    names = ["terrible", "great"], ["nice", "warm"]
    assert [[PIECES[word[1]] for word in one.words] for one in (plain, unified)] == [*names]
    assert all(6 in ids and 7 in ids for ids in unified.ids)        # its words are options there
    assert not any(6 in ids for ids in plain.ids)


def test_a_study_makes_the_runs_that_are_missing(place, monkeypatch, capsys):
    """A method of the comparison is trained when it is its turn, all with the same numbers, or gone
    on with, whatever other runs there are; what cannot be is "not run" in the table, for the reason
    told; when one is stopped, those before it are tested and the others are not run."""
    write_run("runs/by-hand", name="ppt")
    write_run("runs/compared/small-ppt", name="ppt", finished=False)
    called = []

    def made(argv):
        called.append(argv)
        if "metapt" in argv:
            raise InputError("no labeled data here")
        if "--resume" in argv:
            shutil.rmtree("runs/compared/small-ppt")
            write_run("runs/compared/small-ppt", name="ppt")
        else:
            write_run("runs/compared/small-supmer", finished=False)
    monkeypatch.setattr(train, "main", made)
    study = [word for word in SMALL if word not in ("--rates", "0.1", "0.3")]
    study += ["--study", "comparison", "--rates", "0.1", "--prompt"]
    evaluation.main([*study, "ppt", "metapt", "vocab", "--max-minutes", "5"])
    left = [float(argv[-1]) for argv in called]
    assert 4 < left[1] <= left[0] <= 5
    assert [argv[:-2] for argv in called] == [["--resume", "runs/compared/small-ppt"], [
        "--model", "small", "--method", "metapt", "--run", "runs/compared/small-metapt",
        "--labeled", ""]]
    written = json.loads(Path("runs/eval/small-comparison.json").read_text())
    assert written["prompts"]["metapt"] == {"not_run": "no labeled data here"}
    assert "| metapt | not run |" in capsys.readouterr().out
    assert written["prompts"]["ppt"]["file"] == "runs/compared/small-ppt"
    evaluation.main([*study, "vocab", "supmer", "random"])          # supmer is stopped at once
    printed = capsys.readouterr().out
    assert "| supmer | not run |" in printed and "| random | not run |" in printed
    assert re.search(r"\| vocab \| \d+", printed) and "the same command goes on" in printed
    with pytest.raises(InputError, match="no labeled data"):        # by its name alone: an error
        evaluation.main([*SMALL, "--prompt", "metapt", "--labeled", "small"])


def test_what_time_did_not_allow_is_not_run(place, monkeypatch, capsys):
    """Stopped in the second task, the table shows the first, and "not run" for the second."""
    small_group(monkeypatch, "sst2", "mr")
    original = evaluation.load_train

    def stop(task, *rest):
        if stop.calls == 1:
            raise KeyboardInterrupt
        stop.calls += 1
        return original(task, *rest)
    stop.calls = 0
    monkeypatch.setattr(evaluation, "load_train", stop)
    short = [*SMALL, "--prompt", "vocab", "--seeds", "10", "--rates", "0.1", "--task", "sst2", "mr"]
    evaluation.main(short)
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("| vocab |"))
    assert row.count("not run") == 1 and "the same command goes on" in printed


def test_only_a_stop_tests_what_is_tuned(place, monkeypatch):
    """An error while the second prompt is tuned ends the call at once, no result is written; a
    Ctrl-C there leaves the first prompt's test."""
    small_group(monkeypatch, "sst2")
    original, out = evaluation.tune_task, Path("out.json")
    short = [*SMALL, "--prompt", "vocab", "random", "--seeds", "10", "--rates", "0.1", "--task",
             "sst2", "--out", str(out)]
    for error in (InputError("refused"), KeyboardInterrupt()):
        def second_fails(context, plan, candidate, *rest):
            if candidate.name == "random":
                raise error
            return original(context, plan, candidate, *rest)
        monkeypatch.setattr(evaluation, "tune_task", second_fails)
        if isinstance(error, InputError):
            with pytest.raises(InputError, match="refused"):
                evaluation.main(short)
            assert not out.exists()
        else:
            evaluation.main(short)
            result, = json.loads(out.read_text())["results"]
            assert [*result["test"]["sst2"]["prompts"]] == ["vocab"]


# ------------------------------------------------------------------------ bench.py compares fairly

@needs_transformers
@pytest.mark.parametrize("first_order", [False, True])
def test_benchs_transformers_compute_the_same_gradient(first_order):
    """Autograd with create_graph through transformers' T5 gives our meta-gradient to 1e-5 (its
    norms are float32), padded or not, so that what bench.py times is the same; the other order's
    differs a hundred times as much."""
    s = bench.Sizes(**bench.WARM, dtype="float64")
    t5, (pair,) = bench.random_t5(s), bench.random_pairs(s)
    theta, phi = supmer.init_prompt(t5, 2, 0).double(), supmer.init_regularizer(64, torch.float64)
    method = Method(inner_rate=1000.0, micro_tokens=40, gate_weight=0.0, first_order=first_order)
    theirs = [bench.hf_meta_gradient(bench.hf_model(t5), theta, phi, *pair, 0.3, method, padded)
              for padded in (0, 40)]
    ours = supmer.meta_gradient(t5, theta, phi, *pair, 0.3, 0.5, method)
    for d_theta, d_phi in theirs:
        assert relative(ours.d_theta, d_theta) < 1e-5
        assert relative(ours.d_phi["A"], d_phi["A"]) < 1e-5
    other = replace(method, first_order=not first_order)
    assert relative(supmer.meta_gradient(t5, theta, phi, *pair, 0.3, 0.5, other).d_theta,
                    theirs[0][0]) > 1e-3


def test_benchs_ratios_by_hand():
    """Medians are compared, peaks for memory; twice the work for twice the time is 1; what was not
    run has no ratio."""
    found = {"exact, recomputed": [(9.0, 10.0, None), (2.0, 30.0, None), (3.0, 20.0, None)],
             "first order": [(2.0, 5.0, None)], "transformers, create_graph": [],
             "1 layer": [(2.0, 1.0, None)], "1 layer, 2 x tasks": [(4.0, 1.0, None)]}
    assert bench.summary(found["exact, recomputed"]) == (3.0, pytest.approx(7 / 3), 30.0, None)
    ratios = {row[:3]: row[3] for row in bench.ratios(found)}
    assert ratios.pop(("exact, recomputed", "first order", "seconds")) == 1.5
    assert ratios.pop(("1 layer, 2 x tasks", "1 layer", "half the seconds")) == 1.0
    assert ratios and set(ratios.values()) == {None}
    names = {name for group in bench.groups(bench.QUICK) for name in group}
    assert all({row[0], row[1]} <= names for row in bench.RATIOS)


class Dies:
    """What reads this from a pickle, as a contender's process does, ends."""
    def __reduce__(self):
        return os._exit, (1,)


def test_a_contender_that_dies_loses_no_others_figures():
    """It is told as not run, with the reason; its neighbour's run is there."""
    s = replace(bench.QUICK, documents=1)
    found, failed = bench.measure_group({"dies": (Dies(), s), "tokens": (bench.token_ids, s)}, 1, 1)
    assert found["dies"] == [] and list(failed) == ["dies"]
    assert failed["dies"].startswith("BrokenProcessPool: A process in the process pool was")
    (seconds, mb, value), = found["tokens"]
    assert seconds > 0 and mb >= 0 and value is None


@pytest.mark.parametrize("argv, says", [
    (["--threads", "0"], "1 or more"), (["--threads", "100000"], "at most"),
    (["--json", "no/such/file"], "no such folder"), (["--json", "tiny.py/file"], "no such folder"),
    (["--json", "tiny"], "name another"), (["--json", ""], "name another")])
def test_benchs_mistakes(argv, says, monkeypatch):
    """Told in one line before anything is measured."""
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(bench, "product_rates", lambda s: pytest.fail("it measures"))
    with pytest.raises(InputError, match=says):
        bench.main(argv)


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
        train.run_script(lambda argv: print("70.0 \u00b1 10.0"), "stopped")
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
    model = data.model_folder("tiny")
    t5 = T.load_t5(model)
    tokenizer = data.load_tokenizer(model, t5.config)
    store = data.build_store(
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
        supmer.init_prompt(t5, 20, 0), supmer.init_regularizer(t5.config.d_model), method
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


TINY = Path(__file__).resolve().parent / "tiny"
LABEL_WORDS = ("yes no maybe Yes No A B C D terrible great bad okay good subjective objective "
               "description entity expression human location number").split()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY, read_config(TINY))


def rows_of(task, split):
    with open(TINY / "tasks" / task / f"{split}.csv", newline="", encoding="utf-8") as file:
        return [(int(label), text) for label, text in csv.reader(file)]


def corpus():
    with gzip.open(TINY / "corpus.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


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
        chosen = data.hold_out(part)
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


# ------------------------------------------------------------ README.md and figures/ are the code's

README, REFILL = HERE / "README.md", "python test_supmer.py writes these parts of README.md anew"
MODULES = (supmer, T, km, data, train, evaluation, baselines)
FLOW = (("text", "your files, OpenWebText"), ("data.py", "sentences, token ids"),
        ("t5.py", "sentence vectors"), ("kmeans.py", "clusters of sentences"),
        ("data.py", "meta tasks of five kinds"), ("supmer.py, train.py", "second-order MAML"),
        ("theta, phi", "a prompt and its psi"), ("eval.py", "16 examples a label"),
        ("accuracy", "beside baselines.py"))


def flow():
    """figures/flow.svg: five boxes to the right, four back to the left, an arrow between each."""
    places = [(20 + 190 * (i if i < 5 else 9 - i), 20 if i < 5 else 120) for i in range(9)]
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 200" '
             'font-family="sans-serif" text-anchor="middle">',
             '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" '
             'orient="auto"><path d="M0 0 L8 4 L0 8 z"/></marker></defs>',
             '<rect width="960" height="200" fill="white"/>']
    for (x, y), (title, what) in zip(places, FLOW):
        fill = "#dbe9f6" if ".py" in title else "#f3f3f3"
        parts += [f'<rect x="{x}" y="{y}" width="160" height="60" rx="6" fill="{fill}" '
                  'stroke="black"/>',
                  f'<text x="{x + 80}" y="{y + 26}" font-size="14" font-weight="bold">{title}'
                  '</text>',
                  f'<text x="{x + 80}" y="{y + 46}" font-size="12">{what}</text>']
    for (x, y), (to_x, to_y) in zip(places, places[1:]):
        line = (x + 160, y + 30, to_x - 2, y + 30) if to_x > x else \
            (x, y + 30, to_x + 162, y + 30) if to_x < x else (x + 80, y + 60, x + 80, to_y - 2)
        parts.append('<line x1="{}" y1="{}" x2="{}" y2="{}" stroke="black" '
                     'marker-end="url(#tip)"/>'.format(*line))
    return "\n".join([*parts, "</svg>", ""])


def refilled(readme, tasks=None):
    """README.md with what is made of the project: line counts, the algorithm and, if it is given,
    what data.py prints."""
    def block(readme, heading, text):
        return re.sub(rf"(## {heading}\n.*?\n```\n).*?(```)", lambda m: m[1] + text + m[2], readme,
                      count=1, flags=re.DOTALL)
    readme = re.sub(r"^\| `(\w+\.py)` \| [\d,]+ \|", lambda m: "| `{}` | {:,} |".format(
        m[1], len((HERE / m[1]).read_text().splitlines())), readme, flags=re.MULTILINE)
    algorithm = next(p for p in supmer.__doc__.split("\n\n") if p.startswith("    "))
    readme = block(readme, "The algorithm", textwrap.dedent(algorithm) + "\n")
    return block(readme, "One meta task of each kind", tasks) if tasks else readme


def tables(heading):
    """The rows of the tables in a section of README.md, each a list of cells, without heads."""
    section = README.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = re.sub(r"^\|.*\n\|(-+\|)+\n", "", section, flags=re.MULTILINE)
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
            for row in rows.splitlines() if row.startswith("|")]


def test_the_reading_order_is_true():
    """Every file stands in README's reading order with its number of lines, every exercise in its
    table; the algorithm there is supmer.py's."""
    assert README.read_text() == refilled(README.read_text()), REFILL
    found = {cells[0].strip("`") for cells in tables("Reading order")}
    assert found == {path.name for path in HERE.glob("*.py")}
    assert [cells[0].strip("`") for cells in tables("Exercises")] == [*exercises.CHECKS]


def test_the_flow_and_the_pictures():
    """figures/flow.svg is flow()'s, its files exist; README's pictures and links do, too."""
    assert (HERE / "figures/flow.svg").read_text() == flow(), REFILL
    readme = README.read_text()
    for name in re.findall(r"[\w/]+\.py", flow()) + re.findall(r"\]\(([\w/.-]+)\)", readme):
        assert (HERE / name).is_file(), name
    assert all(path.stat().st_size <= 150_000 for path in (HERE / "figures").iterdir())
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
               for title in re.findall(r"^#+ (.*)", readme, flags=re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", readme)) <= anchors


def test_symbols_have_their_names_and_defaults():
    """Each symbol's name is in the code, or a knob with that default; Table 6 is whole."""
    defaults = {entry.name: entry for cls in (train.Training, Method, supmer.MetaState)
                for entry in fields(cls)}
    known, shown = {*vars(supmer), *vars(data)}, set()
    for function in vars(supmer).values():
        known |= set(getattr(function, "__code__", supmer.meta_step.__code__).co_varnames)
    for _, name, _, default, _ in tables("The algorithm"):
        name = name.strip("`")
        assert default == str(defaults[name].default) if default else name in known, name
        shown.add(name)
    assert {name for name, entry in defaults.items()
            if "Table 6" in entry.metadata.get("help", "")} <= shown


def test_the_ledger_names_functions_that_exist():
    """Whatever the ledger's last column names is in one of the files."""
    rows = tables("The ledger: paper, released code, here")
    assert all(len(cells) == 6 and all(cells) for cells in rows), rows
    names = {name for cells in rows for name in re.findall(r"`(\w+)`", cells[-1])}
    assert all(any(hasattr(module, name) for module in MODULES) for name in names), names


def test_troubleshooting_quotes_what_is_said():
    """Each message in README's troubleshooting occurs in the code, "…" standing for a value."""
    def text(node):
        return node.value if isinstance(node, ast.Constant) else "…"
    said = []
    for module in MODULES:
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            if isinstance(node, ast.JoinedStr):
                said.append("".join(map(text, node.values)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
    for message, _ in tables("Troubleshooting"):
        assert any(message.strip("`") in one for one in said), message


def test_readme_gives_options_that_exist():
    """Every --option of a command in README is one of train.py, eval.py or the other scripts."""
    code = "".join((HERE / name).read_text() for name in ("train.py", "eval.py", "bench.py",
                                                         "tiny.py"))
    known = {entry.name for cls in (train.Training, Method, evaluation.Settings)
             for entry in fields(cls)} | {"nproc_per_node", "no_exact_cosine",
                                          "no_words_only"}
    for option in set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", README.read_text())):
        assert option.replace("-", "_") in known or f'"--{option}"' in code, option


def test_papers_figures_in_readme():
    """README's rows of the paper are those of results/paper_tables.json."""
    paper = json.loads((HERE / "results/paper_tables.json").read_text())["t5-base"]
    table = README.read_text().partition("| accuracy in %, T5-base")[2].partition("\n\n")[0]
    rows = [re.split(r" *\| *", line)[1:4] for line in table.splitlines()[2:]]
    assert rows == [[name, *(str(paper[method][name][0]) for method in ("supmer", "pt"))]
                    for group in ("all", "dg") for name in data.GROUPS[group]]


# ------------------------------------------- damaged inputs: one line, which file, what to do then

REMEDY = re.compile(r"fetch it |[Tt]ake |delete|[Gg]ive |mend|drop|put|start a new run|do not use"
                    r"|use another|export it again|name a |do not fit|[Tt]ry |must ")
MISFITS = [None, True, -1, 0, 3, 2 ** 40, 10 ** 30, 1e300, math.nan, "", "x\ny\x1b[2J", "\ud800",
           [], {}, [1], {"a": 1}, [[[]]], "long " * 999]


def damages(whole, n, seed=0):
    """n damaged versions of some bytes: cut, bits flipped, a part zeroed, doubled, lost, random, or
    alone."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        way, b = rng.integers(7), bytearray(whole)
        i, j = sorted(rng.integers(0, len(b) + 1, 2))
        j = min(j, i + 9) if rng.random() < 0.5 else j
        if way == 1:
            for place in rng.integers(0, len(b), rng.integers(1, 5)):
                b[place] ^= 1 << int(rng.integers(8))
        else:
            b[i:j] = (b"", b"", bytes(j - i), b[i:j] * 2, b"", rng.bytes(j - i), b[i:j])[way]
            b = (b[:i], b, b, b, b, b, b[i:j])[way]
        yield bytes(b)


def variants(value):
    """JSON with something MISFITS in each of its places, or without it; nested too deep."""
    def places(x, path=()):
        yield path
        items = x.items() if isinstance(x, dict) else enumerate(x if isinstance(x, list) else ())
        for key, part in islice(items, 12):
            yield from places(part, (*path, key))
    for number, path in enumerate(places(value)):
        for wrong in MISFITS[number % 3::3]:
            changed = copy.deepcopy(value)
            if not path:
                yield json.dumps(wrong).encode()
                continue
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = wrong
            yield json.dumps(changed).encode()
            if isinstance(inner, dict):
                del inner[path[-1]]
                yield json.dumps(changed).encode()
    yield b"[" * 10 ** 5


def tries(path, call, content=damages, n=16):
    """A family's member: (file, call, its contents to try), of the file as it is."""
    whole = path.read_bytes()
    return path, call, [*(variants(json.loads(whole)) if content is variants else
                          content(whole, n) if whole else [])], whole


def of_weights(folder, _):
    """model.safetensors, also with anything in its header; its index; config.json."""
    model, sharded = save_model(folder / "m", V10), save_shards(folder / "s", V10)
    whole = (model / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])
    first = next(iter(header))
    headers = []
    for text in variants({first: header[first]}):
        changed = json.loads(text) if text[1:2] != b"[" else None
        text = json.dumps(header | changed).encode() if isinstance(changed, dict) else text
        headers.append(len(text).to_bytes(8, "little") + text + whole[end:])
    path, call, contents, _ = tries(model / "model.safetensors", lambda: load_t5(model))
    yield path, call, contents + headers, whole
    yield tries(model / "config.json", lambda: load_t5(model), variants)
    yield tries(model / "config.json", lambda: load_t5(model))
    for content in (damages, variants):
        yield tries(sharded / T.INDEX, lambda: load_t5(sharded), content)


def of_tokenizers(folder, _):
    """tokenizer.json, of one piece a word."""
    model, _ = write_model(folder / "m", ["a", "b", "c"])

    def call():
        tokenizer = load_tokenizer(model, SimpleNamespace(vocab_size=16))
        found = data.tokenize(tokenizer, ["a b <extra_id_0> zz", "", "\u65e5 \0"])
        assert all(id < 16 for ids in found for id in ids)
    for content in (damages, variants):
        yield tries(model / "tokenizer.json", call, content)


def of_corpora(folder, _):
    """Each format, and what a JSON line may hold."""
    texts = [f"It rained {i}. We left." for i in range(30)]
    (folder / "a.txt").write_text("\n\n".join(texts))
    (folder / "b.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress((folder / "b.jsonl").read_bytes()))
    openwebtext_tar(folder / "d.tar", [[text.encode() for text in texts[:5]], [b"x"]])
    with tarfile.open(folder / "e.tar.xz", "w:xz") as packed:
        packed.add(folder / "a.txt", "a.txt")
    for path in sorted(folder.iterdir()):
        yield tries(path, lambda path=path: list(documents([path])))
    (folder / "f.jsonl").write_text('{"text": "a", "paragraphs": ["a", "b"]}')
    yield tries(folder / "f.jsonl", lambda: list(documents([folder / "f.jsonl"])), variants)


def of_tasks(folder, _):
    """Every data set's format, a pickle in each protocol."""
    _, tokenizer = write_model(folder / "m", ["a"])
    for name, (written, _) in FORMATS.items():
        write_task(folder, name, written)

        def call(task=TASKS[name]):
            for row in data.load_train(task, folder):
                data.tokenize(tokenizer, row.fields.values())
        yield tries(folder / TASKS[name].train, call)
        if name in ("cb", "wic"):
            yield tries(folder / TASKS[name].train, call, variants)
    for protocol in range(6):
        path = folder / f"{protocol}"
        path.write_bytes(pickle.dumps((["A pan.", "Rust."] * 4, [1, 0] * 4), protocol))
        yield tries(path, lambda path=path: list(data.read_table(path, ("label", "text"))))


def of_archives(folder, _):
    """tar and zip, packed and plain."""
    members = {"original/CB/x": b"1", "CB/val.jsonl": b"text " * 99, "\u00fc/x": b""}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    for name, content in (("a.zip", packed.getvalue()), ("b.zip", zip_of(members)),
                          ("c.tar", tar_of(members)), ("d.tar", gzip.compress(tar_of(members)))):
        (folder / name).write_bytes(content)
        yield tries(folder / name, lambda path=folder / name: data.archive_member(
            path, "superglue/CB/val.jsonl"))


def of_prompts(folder, _):
    """prompt.safetensors, PEFT's two files, the authors' two, and the pickle in one of these."""
    path, peft_folder = folder / "prompt.safetensors", folder / "peft"
    train.save_prompt(path, torch.ones(3, 8), supmer.init_regularizer(8), {"model": "m"})
    yield tries(path, lambda: train.load_prompt(path, 8))
    train.save_peft(peft_folder, torch.ones(3, 8), V10, "m")
    for name, content in (("adapter_model.safetensors", damages), ("adapter_config.json", variants),
                          ("adapter_config.json", damages)):
        yield tries(peft_folder / name, lambda: train.load_prompt(peft_folder, 8), content)
    theirs = folder / "theirs"
    released_files(theirs, "t5base", 768)
    for theta, name in ((torch.ones(3, 768), "prompt_t5base.pt"),
                        ({"a": torch.ones(2)}, "gradient_edit_t5base.pt")):
        torch.save(theta, theirs / name)
        path, call, contents, whole = tries(theirs / name, lambda: train.load_prompt(theirs, 768))
        parts = {part.filename: zipfile.ZipFile(path).read(part)
                 for part in zipfile.ZipFile(path).filelist}
        inner = next(part for part in parts if part.endswith("data.pkl"))
        contents += [zip_of(parts | {inner: content}) for content in damages(parts[inner], 40)]
        yield path, call, [*contents, zip_of(parts | {inner: pickle.dumps(Evil())})], whole


def of_runs(folder, small_world):
    """state.safetensors, run.json, log.jsonl; the files of a store; a tuned prompt."""
    run = make_run(small_world, "fuzzed")
    run.step()
    run.save()
    training, method, _, _ = train.parse(small_world[1])
    train.write_run(run.folder, {
        "model": "m", "name": "supmer", "training": asdict(training), "method": asdict(method),
        "made_of": run.made_of, "finished": False, "ended": None})
    t5, store = run.t5, run.sources[0][1].store

    def resumed():
        train.load_state(run.folder, supmer.init_state(
            supmer.init_prompt(t5, 4, 0), supmer.init_regularizer(16), method))

    def parsed():
        train.parse(["--resume", str(run.folder)])
        train.check_origin(run.folder, run.made_of)
    yield tries(run.folder / "state.safetensors", resumed)
    yield tries(run.folder / "log.jsonl", lambda: list(train.read_log(run.folder)))
    for content in (damages, variants):
        yield tries(run.folder / "run.json", parsed, content)
    shutil.copytree(small_world[0] / store.folder, folder / "store")
    tokenizer = load_tokenizer(small_world[0] / "model", t5.config)
    for path in sorted((folder / "store").iterdir()):
        yield tries(path, lambda: data.open_store(folder / "store"), n=12)
    yield tries(folder / "store/first.bin", lambda: TaskIndex(
        data.open_store(folder / "store"), tokenizer, support=4, query=4), n=12)
    path = folder / "tuned.safetensors"
    (folder / "new.txt").write_text("a\n")
    settings = evaluation.Settings(model=str(small_world[0] / "model"), prompt=(str(path),),
                                   predict=str(folder / "new.txt"), device="cpu")
    values = {"task": TASKS["movie"]._replace(words=("A", "B"))._asdict(), "baseline": "learned",
              "model": "m", "model_sha256": data.model_fingerprint(settings.model)}
    save_file({"theta": torch.ones(3, 16)}, path, {"result": json.dumps(values)})
    path, call, contents, whole = tries(path, lambda: evaluation.predict(settings), n=10)
    for text in variants({name: values[name] for name in ("task", "baseline")}):
        save_file({"theta": torch.ones(3, 16)}, path, {"result": text.decode()})
        contents.append(path.read_bytes())
    for theta in (torch.tensor(1.0), torch.ones(3, 17), torch.ones(16)):
        save_file({"theta": theta}, path, {"result": json.dumps(values)})
        contents.append(path.read_bytes())
    yield path, call, contents, whole


@pytest.mark.parametrize("family", [of_weights, of_tokenizers, of_corpora, of_tasks, of_archives,
                                    of_prompts, of_runs])
def test_damage_is_told_or_harmless(family, tmp_path, small_world, monkeypatch):
    """Whatever has happened to a file: it is read, or refused in one line that can be printed,
    names it or its folder, and says what to do. Nothing in it is run."""
    monkeypatch.chdir(small_world[0])
    for path, call, contents, whole in family(tmp_path, small_world):
        refused = 0
        for content in contents:
            path.write_bytes(content)
            try:
                call()
            except InputError as error:
                line, refused = str(error), refused + 1
                assert line.isprintable() and len(line) < 4100, content
                assert path.name in line or path.parent.name in line, (line, content)
                assert REMEDY.search(line), line
            except OSError as error:        # such as a name that is too long: the system's words
                assert path.parent.name in str(error) and str(error).isprintable()
            except Exception as error:
                raise AssertionError((path.name, content[:500])) from error
        path.write_bytes(whole)
        assert refused >= min(10, len(contents) // 4) or path.suffix in (".bin", ".txt"), path
    assert not list(tmp_path.rglob("executed")) and not Path("executed").exists()


def bent(kind, target="", size=0, name="CB/val.jsonl", packed=False):
    """A tar of one entry that is no plain file, or says that it is larger than it is."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz" if packed else "w") as archive:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname, entry.size = kind, target, size
        archive.addfile(entry, io.BytesIO(bytes(size)) if size else None)
    return out.getvalue()


def with_bit(content, place):
    """Some bytes with another one in a place."""
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1:]


PHI = {f"phi.{name}": x for name, x in supmer.init_regularizer(8).items()}
TWO = tar_of({"CB/a.txt": b"It rained.", "CB/val.jsonl": b"It rained."})


def prompt_of(theta, metadata=None, **more):
    """A prompt's file, as bytes."""
    return safetensors.torch.save({"theta": theta, **PHI, **more},
                                  {"regularizer": "affine", **(metadata or {})})


def saved(value):
    """torch.save, as bytes."""
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def read_tar(path):
    """What both readers of tars do with one."""
    if path.name[0] == "c":
        return list(documents([path]))
    return data.archive_member(path, "superglue/CB/val.jsonl")


def read_pickle(path):
    """A task's rows."""
    return list(data.read_table(path, ("label", "text")))


def read_prompt(path):
    """A prompt for a T5 of width 8; a file of the authors' stands for both of theirs."""
    if path.suffix == ".pt":
        shutil.copy(path, path.with_name("gradient_edit_t5base.pt"))
        return train.load_prompt(path.parent, 768)
    return train.load_prompt(path, 8)


@pytest.mark.parametrize("read, name, content, says", [
    (read_tar, "a.tar", bent(tarfile.SYMTYPE, "/etc/passwd"), "is a link, a folder or a device"),
    (read_tar, "a.tar", bent(tarfile.SYMTYPE, "CB/val.jsonl"), "is a link, a folder or a device"),
    (read_tar, "a.tar", bent(tarfile.LNKTYPE, "nowhere"), "is a link, a folder or a device"),
    (read_tar, "a.tar", bent(tarfile.CHRTYPE), "is a link, a folder or a device"),
    (read_tar, "a.tar", bent(tarfile.FIFOTYPE), "is a link, a folder or a device"),
    (read_tar, "a.tar", bent(tarfile.GNUTYPE_LONGNAME, size=1 << 21), "damaged or incomplete"),
    (read_tar, "c.tar.xz", bent(tarfile.XHDTYPE, size=1 << 26, packed=True), "a header of 67,108,"),
    (read_tar, "c.tar", with_bit(TWO, 1024 + 150), "damaged or incomplete"),
    (read_tar, "a.tar", with_bit(TWO, 1024 + 150), "damaged or incomplete"),
    (read_tar, "c.tar", TWO[:1024], "damaged or incomplete"),
    (read_pickle, "p", b"\x80\x02r\xff\xff\xff\x7f.", "no pickle of"),
    (read_pickle, "p", b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".", "labels.: 150;"),
    (read_pickle, "p", pickle.dumps((["\ud800"], [0])), "no pickle of .*surrogates"),
    (read_prompt, "a.safetensors", prompt_of(torch.tensor(1.0)), "no prompt and regularizer"),
    (read_prompt, "a.safetensors", prompt_of(torch.zeros(0, 8)), "no prompt and regularizer"),
    (read_prompt, "a.safetensors", prompt_of(torch.zeros(10_001, 8)), "no prompt and regularizer"),
    (read_prompt, "a.safetensors", prompt_of(torch.ones(3, 8).int()), "not finite"),
    (read_prompt, "a.safetensors", prompt_of(torch.ones(3, 8).double() * 1e300), "not finite"),
    (read_prompt, "a.safetensors", prompt_of(torch.full((3, 8), math.nan).to(torch.float8_e5m2)),
     "not finite"),
    (read_prompt, "a.safetensors", prompt_of(torch.ones(3, 8), {"model": "m\nerror: fine"}),
     "line breaks in its metadata"),
    (read_prompt, "a.safetensors", prompt_of(torch.ones(3, 8), {"\x1b[2J": "m"}), "line breaks in"),
    (read_prompt, "prompt_t5base.pt", saved(torch.ones(1).as_strided((2 ** 40, 768), (0, 0))),
     "does not hold a tensor and a dict"),
    (read_prompt, "prompt_t5base.pt", saved({"a": torch.ones(3, 8).to_sparse()}), "does not hold"),
    (read_prompt, "prompt_t5base.pt", saved({"a": torch.ones(3, device="meta")}), "does not hold")])
def test_each_guard_is_needed(tmp_path, read, name, content, says):
    """Links, devices, headers and pickles that claim to be large, a damaged header that would pass
    for an archive's end, halves of surrogates, numbers that are none, forged lines: each is
    told."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        read(path)
    assert str(caught.value).isprintable() and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("change, says", [
    ({"a": 60_000}, "pieces, the model 16 embeddings"), ({"<unk>": None}, "Missing .UNK."),
    ({"<pad>": 3}, "must be 0, 1, 2")])
def test_a_vocabulary_fits_its_model(tmp_path, change, says):
    """An id beyond the embeddings, whatever the number of pieces; no <unk>, which fails only with
    the first text that needs it; another <pad>."""
    path = write_model(tmp_path / "m", ["a", "b", "c"])[0] / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"] | change
    values["model"]["vocab"] = {piece: id for piece, id in vocabulary.items() if id is not None}
    values["added_tokens"] = [token for token in values["added_tokens"]
                              if token["content"] not in change]
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=says):
        load_tokenizer(tmp_path / "m", SimpleNamespace(vocab_size=16))


@pytest.mark.parametrize("name, value", [
    ("s", math.nan), ("s", 1.5), ("step", -1), ("step", 1.5), ("step", math.inf), ("step", [1, 2]),
    ("best", math.nan), ("theta", math.nan), ("theta", None), ("adam.theta.exp_avg", math.inf)])
def test_a_state_is_one_that_a_run_can_have(small_world, name, value):
    """No NaN or infinity, a whole step, a cosine, one number where one is wanted; else the file is
    named. A line of the log that is none, or a prompt that is not the run's, is refused as well."""
    shutil.rmtree(small_world[0] / "stateful", ignore_errors=True)
    run = make_run(small_world, "stateful")
    run.step()
    run.save()
    path = run.folder / "state.safetensors"
    tensors = load_file(path)
    whole = path.read_bytes()
    like = tensors[name].double()
    tensors[name] = like.int() if value is None else torch.tensor(value).double() \
        if type(value) is list else torch.full_like(like, value)
    save_file(tensors, path)
    with pytest.raises(InputError, match="state.safetensors cannot be resumed from.*start a new"):
        make_run(small_world, "stateful")
    path.write_bytes(whole)
    for line in (b"{}\n", b"[]\n", b"nonsense\n", b"[" * 9999 + b"\n", b'{"step": "1"}\n'):
        (run.folder / "log.jsonl").write_bytes(line)
        with pytest.raises(InputError, match="log.jsonl, line 1: no line of a run's log.*drop it"):
            list(train.read_log(run.folder))
    (run.folder / "log.jsonl").write_bytes(b"")
    train.save_prompt(run.folder / "prompt.safetensors", run.state.theta, None, {})
    with pytest.raises(InputError, match="prompt.safetensors is not this run's"):
        make_run(small_world, "stateful")


def test_memory_is_bounded_whatever_a_file_claims(tmp_path):
    """A line of 100 MB as text, of 32 as JSON, also one that gzip made small, a million empty
    documents, a member of a zip, a config.json of absurd sizes: read or refused within 400 MB more
    than the process has."""
    (tmp_path / "line.txt").write_bytes(b"a" * 10 ** 8)
    (tmp_path / "line.jsonl").write_bytes(b'{"text": "' + b"a" * 2 ** 25)
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(b" " * 2 ** 25, 1))
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb:
        bomb.writestr("CB/val.jsonl", bytes(9 * data.LONGEST))
    model = save_model(tmp_path / "m", V10, d_model=2 ** 20 - 1, vocab_size=2 ** 20 - 1)

    def told(call, *arguments):
        with pytest.raises(InputError):
            call(*arguments)

    def work():
        assert sum(len(text) for text, in documents([tmp_path / "line.txt"])) == 10 ** 8
        for name in ("line.jsonl", "bomb.jsonl.gz"):
            told(list, documents([tmp_path / name]))
        told(data.archive_member, tmp_path / "bomb.zip", "superglue/CB/val.jsonl")
        told(load_t5, model)

    def empty():
        data._write_text(tmp_path, lambda counts: ((0.5, [], None) for _ in range(10 ** 6)),
                         tokenizer, lambda *_: None)

    def limited(more):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    assert ended(forked(work, lambda: limited(400_000_000))) == 0
    _, tokenizer = write_model(tmp_path / "words", ["a"])
    assert ended(forked(empty, lambda: limited(50_000_000))) == 0


def test_what_is_too_large_or_too_much_is_refused(tmp_path):
    """JSON of 64 MB, unread; a PEFT file with a second tensor; released tensors without data."""
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(1 << 26)
    with pytest.raises(InputError, match="config.json is not JSON .it is too large"):
        T.read_json(tmp_path / "config.json")
    train.save_peft(tmp_path / "peft", torch.ones(2, 6), V10, "m")
    save_file({"prompt_embeddings": torch.ones(2, 6), "more": torch.ones(2)},
              tmp_path / "peft" / "adapter_model.safetensors")
    with pytest.raises(InputError, match="must hold 2 vectors as prompt_embeddings, it has"):
        train.load_prompt(tmp_path / "peft", 6)
    name = next(name for (width, _), name in data.RELEASED.items() if width == 768)
    for kind, what in (("prompt", torch.ones(2, 768, device="meta")), ("gradient_edit", {})):
        torch.save(what, tmp_path / f"{kind}_{name}.pt")
    with pytest.raises(InputError, match="does not hold a tensor and a dict of tensors"):
        train.load_prompt(tmp_path, 768)


def test_nothing_in_a_file_is_run():
    """By the syntax of every module: no eval or exec, no shell, no pickle but the one that looks
    nothing up, torch.load of weights only, numpy's files without objects, no code from a hub."""
    for path in {*HERE.glob("*.py")} - {Path(__file__)}:
        for call in (node for node in ast.walk(ast.parse(path.read_text()))
                     if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            words = {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert name not in ("eval", "exec", "os.system", "os.popen", "pickle.load",
                                "pickle.loads", "pickle.Unpickler", "marshal.loads"), path
            assert name != "torch.load" or words.get("weights_only") == "True", path
            assert not words.keys() & {"shell", "allow_pickle", "trust_remote_code"}, (path, name)


def test_files_have_the_users_mode_and_no_company(tmp_path):
    """A file is made with the umask; its temporary one lies in its folder and is gone afterwards;
    one that a kill left is swept, but not one of a process that lives."""
    before, seen = os.umask(0o027), []
    try:
        data.atomic_write(tmp_path / "a", lambda file: seen.append(Path(file.name).parent))
        train.save_peft(tmp_path / "peft", torch.ones(2, 6), V10, "m")
    finally:
        os.umask(before)
    assert seen == [tmp_path]
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"a": 0o640, "peft": 0o750, "adapter_model.safetensors": 0o640,
                     "adapter_config.json": 0o640}
    gone = forked(lambda: None)
    assert ended(gone) == 0
    for pid in (gone, os.getpid(), "mine"):
        (tmp_path / f".a.{pid}.tmp").touch()
    data.sweep(tmp_path)
    assert {path.name for path in tmp_path.glob(".*")} == {f".a.{os.getpid()}.tmp", ".a.mine.tmp"}


def test_one_process_at_a_time(place):
    """A second evaluation of the same file is refused with the first one's id; what a process that
    has died has written there stops nobody."""
    evaluation.TUNED.mkdir(parents=True)
    (evaluation.TUNED / ".out.json.lock").write_text("12345")
    argv = [*SMALL, "--prompt", "vocab", "--rates", "0.1", "--seeds", "10", "--out", "out.json"]
    with data.lock(evaluation.TUNED / ".out.json.lock", lambda _: pytest.fail("it has died")):
        with pytest.raises(InputError, match=f"out.json: process {os.getpid()} is at work on it"):
            evaluation.main(argv)
    evaluation.main(argv)


# Five steps of Alg. 1 on random tasks: s, the query loss, the length of theta after it.
GOLDEN_RUN = [(-0.057357, 4.838695, 1.171528), (0.043455, 4.777033, 1.321654),
              (0.026119, 4.092736, 1.422618), (-0.048968, 5.018450, 1.485282),
              (-0.014996, 4.081985, 1.545177)]


@pytest.mark.parametrize("threads, micro_tokens", [(1, 2048), (2, 2048), (1, 24)])
def test_golden_run(threads, micro_tokens):
    """Five steps have these numbers to 1e-4, on any machine, whatever the threads or micro-batches.
    Not bit by bit, since a product's sums are split otherwise; and in float64, since Adam divides
    by tiny gradients: in float32 rounding has grown to 5e-4 by the fifth step."""
    method = Method(inner_rate=5.0, steps=9, micro_tokens=micro_tokens)
    t5 = random_t5(8)
    state = supmer.init_state(supmer.init_prompt(t5, 3, 0).double(),
                              supmer.init_regularizer(8, torch.float64), method)
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    try:
        for step in range(5):
            pairs = [(random_task(4 * step + i), random_task(4 * step + i + 2)) for i in (0, 1)]
            log = supmer.meta_step(t5, state, pairs, method, 3)
            found.append((log["s"], log["query_loss"], float(state.theta.norm())))
    finally:
        torch.set_num_threads(before)
    assert np.allclose(found, GOLDEN_RUN, rtol=0, atol=1e-4), found


@pytest.mark.parametrize("rate", [1e-4, 1e-2, 1.0, 1e3, 1e29])
@pytest.mark.parametrize("n, P", [(1, 1), (2, 3)])
def test_inner_rates_stay_finite_or_say_so(rate, n, P):
    """From 1e-4 to 1e3, a prompt of one vector, a set of one example: all is finite. Beyond, the
    step, the task and what to try are told, and nothing has changed."""
    method = Method(inner_rate=rate, steps=3)
    t5, state = small_state(method, P=P)
    before = state.theta.clone()
    pairs = [(random_task(1, n), random_task(2, n))]
    if rate > 1e20:
        with pytest.raises(InputError, match="step 0: .* sp-next task is not finite.*inner_rate"):
            supmer.meta_step(t5, state, pairs, method, 0)
        assert torch.equal(state.theta, before)
    else:
        log = supmer.meta_step(t5, state, pairs, method, 0)
        assert all(map(math.isfinite, [*(x for x in log.values() if type(x) is float)]))
        assert state.theta.isfinite().all() and all(x.isfinite().all() for x in state.phi.values())


@pytest.mark.parametrize("options", [
    {}, {"relative_step": 0.03, "exact_cosine": True}, {"first_order": True}, {"words_only": True}])
@pytest.mark.parametrize("case", ["flat", "certain", "tiny", "gate 0", "gate 1", "A 0", "equal"])
def test_extremes_of_a_step_are_no_errors(case, options):
    """A gradient that is zero for every row, or whose squares are, by a loss that is flat or at its
    end; a gate driven to 0 or 1; an A that makes every row zero; equal texts with one label, mixed
    with themselves, a prompt of one vector: two steps are finite, and so is their log."""
    method, n = Method(steps=9, **options), 1 + (case != "equal")
    t5, state = small_state(method, P=n)
    pairs = [(random_task(1, n), random_task(2, n))]
    head = t5.weights["lm_head.weight"]
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
    if case == "A 0":
        state.phi["A"].zero_()
    if case.startswith("gate"):
        state.phi["c"].fill_(1e4 if case == "gate 1" else -1e4)
    for _ in range(2):
        log = supmer.meta_step(t5, state, pairs, method, 0)
        assert all(math.isfinite(x) for x in log.values() if type(x) is float), log
        assert state.theta.isfinite().all() and all(x.isfinite().all() for x in state.phi.values())
    if case in ("flat", "certain"):
        assert log["second_order"] == log["theta_gradient"] == 0
    if case.startswith("gate"):
        assert log["gate_mean"] == float(case[-1])


@pytest.mark.parametrize("script, argv, says", [
    (train, ["--inner-rate", "0.5"], "--inner-rate has no effect with --relative-step 0.03"),
    (train, ["--keep-gib", "1", "--keep-graphs", "2"], "--keep-graphs has no effect with --keep-"),
    (train, ["--keep-gib", "1", "--first-order"], "--keep-gib has no effect with --first-order"),
    (train, ["--labeled-share", "1"], "--labeled-share has no effect with no --labeled"),
    (train, ["--labeled-clusters", "3"], "--labeled-clusters has no effect with no --labeled"),
    (train, ["--plot", "a", "--steps", "3"], "--plot are of a run that is there"),
    (train, ["--export-peft", "a", "b", "--plot", "c"], "add nothing to them"),
    (train, ["--export-peft", "a", "b", "--dry-run"], "add nothing to them"),
    (train, ["--stepz", "3"], "--stepz 3: the options are --model, --corpus, .*--export-peft"),
    (evaluation, ["--nope"], "--nope: the options are --model, --task, .*--quick"),
    (evaluation, ["--predict", "a", "--prompt", "b", "--epochs", "3"], "leave --epochs away"),
    (bench, ["--dtype", "int8"], "--dtype int8: the options are --quick, --threads, --device, ")])
def test_options_without_effect_are_refused(script, argv, says):
    """What would be ignored or does not exist is told, with what there is, before anything is
    read."""
    with pytest.raises(InputError, match=says) as caught:
        (script.main if script is bench else script.parse)(argv)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("script", [train, evaluation])
def test_help_tells_defaults_and_sources(script, capsys):
    """Each number has its default in brackets, and tiny's; the help says whose it is that names no
    source; the paper's numbers name their place."""
    with pytest.raises(SystemExit):
        script.parse(["--help"])
    text = "".join(capsys.readouterr().out.split())         # it is broken at hyphens, too
    assert text.endswith("Whatnamesnosourceisours.")
    classes = (train.Training, Method) if script is train else (evaluation.Settings,)
    for entry in (entry for cls in classes for entry in fields(cls)):
        values = entry.default if type(entry.default) is tuple else [entry.default]
        told = "".join(entry.metadata["help"].split()) + "[" + "".join(map(str, values))
        assert told in text, entry.name
        assert type(values[0]) not in (int, float) or re.search(
            r"Table|section|Alg|Fig|4\.1|C\.1|MetaPT|ours|released|of the prompt|0: (on|one|never)",
            entry.metadata["help"]), entry.name


# -------------------------------------------- a kill at any moment: python test_supmer.py kills

def forked(work, before=lambda: None):
    """Begin work() in a process of its own, which has all modules loaded -> its id. It ends with 0,
    with 2 for what a user would be told, with 1 for anything else, which it shows."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    status, said = 1, io.StringIO()
    try:
        torch.set_num_threads(1)
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            before()
            work()
            status = 0
    except (InputError, OSError):
        status = 2
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(pid):
    """Wait for a process -> its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def contents(folder, *ends):
    """{path in the folder: bytes} of all files, or of those that end so."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name.endswith(ends or "")}


class Killable:
    """A program to be killed: it works in `folder`, begin() does it or goes on with it, result() is
    what must be equal, bit by bit, whatever was killed."""

    def __init__(self, place, options):
        self.folder, self.place, self.options = place / type(self).__name__, place, options


    def tidy(self):
        """An empty folder, the working directory."""
        os.chdir(self.place)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        os.chdir(self.folder)


class Training(Killable):
    """Meta-training, 6 steps. Saved after each."""

    def begin(self):
        if not Path("run/run.json").exists():
            train.main([*self.options, "--run", "run", "--save-seconds", "0"])
        elif not train.read_run(Path("run"))["finished"]:
            train.main(["--resume", "run"])

    def result(self):
        files = [train._read_safetensors(Path("run") / f"{name}.safetensors")
                 for name in ("state", "prompt")]       # a file's metadata have no fixed order
        return log_without_times(Path("run")), contents(Path("run"), ".tmp"), [
            ({name: x.numpy().tobytes() for name, x in tensors.items()}, metadata)
            for tensors, metadata in files]


class Corpus(Killable):
    """Corpus building."""

    def begin(self):
        t5 = load_t5(self.place / "model")
        data.build_store(Path("cache"), [self.place / "corpus.jsonl"], load_tokenizer(
            self.place / "model", t5.config), t5, 6, 0, model=self.place / "model")

    def result(self):
        return contents(Path("cache"))


class Evaluation(Killable):
    """Evaluation of two seeds and two rates."""

    def begin(self):
        evaluation.main([*SMALL, "--data", str(self.place / "data"), "--model",
                         str(self.place / "small"), "--prompt", "vocab", "--out", "out.json"])

    def result(self):
        found = first_result("out.json")
        return (without_times(found["tuning"]), found["test"], contents(Path(), ".tmp"),
                Path("out.md").read_bytes())


class Export(Killable):
    """Export for PEFT."""

    def begin(self):
        if not Path("adapter").exists():
            train.main(["--export-peft", str(self.place / "exported"), "adapter"])

    def result(self):
        return contents(Path())


class Download(Killable):
    """Download of a model and a task's file."""

    def begin(self):
        data.model_folder(ANY)
        data.locate("domain/kitchen/test", "none")

    def result(self):
        return contents(Path("hub"), "config.json", ".safetensors", ".incomplete"), contents(
            Path("cache"), "test", ".tmp")


def survives(program, kills, rng):
    """Kill a program at so many random moments, go on with it, and hold what it has in the end
    against what an unbroken run has; once with too small a disk (a limit on a file's size) and once
    in a read-only folder, which must end with status 2 -> ends that were equal, of how many."""
    program.tidy()
    began, equal = time.monotonic(), []
    assert ended(forked(program.begin)) == 0
    whole, seconds = program.result(), time.monotonic() - began
    largest = max(map(len, contents(Path()).values()))

    def go_on():
        equal.append(ended(forked(program.begin)) == 0 and program.result() == whole)
        program.tidy()

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, largest // 2))

    def read_only():
        os.getuid() or os.setuid(65534)         # root may write anywhere
    program.tidy()
    while kills:
        pid = forked(program.begin)
        time.sleep(rng.random() * seconds)
        os.kill(pid, signal.SIGKILL)
        status = ended(pid)
        assert status in (0, -signal.SIGKILL), status
        kills -= status != 0
        if status == 0 or not kills:
            go_on()
    assert ended(forked(program.begin, full)) == 2
    go_on()
    program.folder.chmod(0o555)
    assert ended(forked(program.begin, read_only)) == 2 and not contents(Path())
    program.folder.chmod(0o755)
    go_on()
    return sum(equal), len(equal)


PROGRAMS = (Training, Corpus, Evaluation, Export, Download)


@contextlib.contextmanager
def killable(place):
    """The PROGRAMS, ready to be begun in folders of a place."""
    importlib.import_module("torch._dynamo")    # torch would do it in each process
    with contextlib.ExitStack() as stack:
        place.chmod(0o755)
        hub, files = (stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind))
                      for kind in (Hub, Files))
        for server in (hub, files):
            server.asked, server.cut, server.handle_error = [], None, lambda *_: None
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            stack.callback(server.shutdown)
        folder = save_model(place / "large", V11._replace(vocab_size=9000, d_model=64))
        hub.repos = {ANY: {"main": (COMMIT, hub_files(folder, "config.json", "model.safetensors"))}}
        files.files = {"/test": bytes(4_000_000)}
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        constants, url = huggingface_hub.constants, f"http://127.0.0.1:{hub.server_port}"
        patch.setattr(constants, "ENDPOINT", url)
        patch.setattr(constants, "HF_HUB_CACHE", "hub")
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                      url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(data, "SOURCES", {"domain/kitchen/test": (
            f"http://127.0.0.1:{files.server_port}/test",)})
        patch.setattr(data, "CHECKSUMS", {})
        patch.setattr(data, "CHUNK", 256)           # so that a small store is saved in parts, too
        patch.setitem(data.TASKS, "planted", PLANTED)
        write_place(place)
        _, options = write_small_world(place)
        options = [str(place / word) if word in ("model", "corpus.jsonl") else word
                   for word in options]
        run_with_prompt(place / "exported", small_config(), place / "small")
        stack.enter_context(contextlib.chdir(place))
        yield [program(place, options) for program in PROGRAMS]


def test_what_is_killed_goes_on(tmp_path):
    """Corpus building, evaluation, export and download, each killed at a random moment, on a full
    disk and in a read-only folder: nothing is torn, and the same command ends with what
    an unbroken run has, bit by bit."""
    rng = np.random.default_rng(0)
    with killable(tmp_path) as programs:
        for program in programs[1:]:        # meta-training has tests of its own
            equal, of = survives(program, 1, rng)
            assert equal == of, program


def kill_all(kills):
    """python test_supmer.py kills: print how each program survives so many of them."""
    with tempfile.TemporaryDirectory() as new, killable(Path(new)) as programs:
        rng = np.random.default_rng(0)
        print("| program | kills | ends equal to an unbroken one's | of | seconds |\n"
              "| --- | --- | --- | --- | --- |")
        for program in programs:
            began = time.monotonic()
            equal, of = survives(program, kills, rng)
            print(f"| {type(program).__doc__.partition('.')[0]} | {kills} | {equal} | {of} | "
                  f"{time.monotonic() - began:.0f} |", flush=True)


if __name__ == "__main__" and sys.argv[1:] == ["kills"]:
    kill_all(20)
elif __name__ == "__main__":    # what of README.md and figures/ is made of the project
    (HERE / "figures").mkdir(exist_ok=True)
    (HERE / "figures/flow.svg").write_text(flow())
    shown = subprocess.run([sys.executable, HERE / "data.py"], capture_output=True, text=True,
                           check=True).stdout
    README.write_text(refilled(README.read_text(), shown))
