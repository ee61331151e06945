"""How fast the method runs, and in how much memory, beside the usual libraries in one run.

    python bench.py             # t5-base's width, 6 + 6 layers, one thread: 25 minutes on one core
    python bench.py --quick     # a small shape, in under 3 minutes; its ratios are rough
    python bench.py --json result.json --threads 2 --dtype bfloat16 --device cuda

It prints the machine and the sizes; this machine's rate at matrix products, and which part of it a
step reaches; one line for each contender (median seconds of all repetitions, their spread, peak
memory above what was there once model and data were loaded); the ratios between them beside what
they should be at most; and how an exact step's cost grows. Each contender runs in a process of
its own, and they take turns, so that a noisy machine is unfair to none. What is not installed
(transformers, peft, scikit-learn, faiss) is "not run". Weights and token ids are random; the
tokenizer reads tiny/'s corpus. --dtype is of all contenders that are not named "bf16".
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import data
import t5 as T
from kmeans import kmeans
from supmer import (Method, cosine, gradient_and_hessian, init_prompt, init_regularizer, init_state,
                    inner_step, gate_input, meta_gradient, meta_step, mix, prompt_gradient, stand_in)
from train import pick_device

RATE, LAM = 50.0, 0.3               # an inner rate at which the second-order part is not noise


@dataclass(frozen=True)
class Sizes:
    """What a contender is given. A row is a support, a query or a partner's query example."""
    layers: int = 6                 # of the encoder, and of the decoder
    d: int = 768
    ff: int = 3072
    heads: int = 12
    support: int = 8
    query: int = 8
    shortest: int = 64              # tokens of a text, uniform between the two
    longest: int = 192
    padded: int = 412               # to which the released code pads
    prompt: int = 100
    tasks: int = 1
    micro_tokens: int = 512
    batch: int = 32                 # few-shot examples, of a quarter of the tokens
    sentences: int = 96             # of 25 tokens on average, embedded with twice the layers
    points: int = 50_000
    clusters: int = 250
    documents: int = 100            # of tiny/'s corpus, tokenized
    dtype: str = "float32"
    device: str = "cpu"


QUICK = Sizes(layers=2, d=512, ff=2048, heads=8, support=4, query=4, shortest=32, longest=96,
              padded=206, prompt=50, micro_tokens=256, batch=16, points=10_000, clusters=64,
              documents=20)


# ---------------------------------------------------------------- what all contenders are given

def random_t5(s, layers=None):
    """A T5 v1.0 with random weights of a size at which activations stay of order 1."""
    layers, generator = layers or s.layers, torch.Generator().manual_seed(0)
    config = T.T5Config(s.d, 64, s.ff, layers, layers, s.heads, 32128, False, True, True, 32, 128,
                        1e-6)
    weights = {name: torch.ones(shape) if "norm" in name else
               torch.randn(shape, generator=generator) * (0.7 * shape[-1] ** -0.5)
               for name, shape in T.expected_shapes(config).items()}
    weights = {name: w.to(s.device, getattr(torch, s.dtype)) for name, w in weights.items()}
    return T.T5(config, {"lm_head.weight": weights["shared.weight"], **weights})


def random_examples(n, seed, s, share=1.0):
    """n texts of s.shortest .. s.longest tokens, times share, with two label words of T5's."""
    rng = np.random.default_rng(seed)
    lengths = (rng.integers(s.shortest, s.longest + 1, n) * share).astype(int)
    ids = [rng.integers(3, 32_000, length).tolist() for length in lengths]
    return data.Examples(ids, [[]] * n, torch.zeros(n, 0, s.d), torch.arange(n) % 2,
                         [[32099, 4273], [32099, 150]])


def random_pairs(s):
    """s.tasks pairs (task, partner)."""
    sets = [[random_examples(n, (i, j), s) for j, n in enumerate((s.support, s.query, s.query))]
            for i in range(s.tasks)]
    return [(data.Task("sp-cluster", (0,), a, b), data.Task("sp-cluster", (0,), a, c))
            for a, b, c in sets]


def hf_model(t5):
    """transformers' T5, frozen, with eager attention and these weights."""
    from transformers import T5Config, T5ForConditionalGeneration
    c, table = t5.config, t5.weights["shared.weight"]
    model = T5ForConditionalGeneration(T5Config(
        d_model=c.d_model, d_kv=c.d_kv, d_ff=c.d_ff, num_layers=c.num_layers,
        num_decoder_layers=c.num_decoder_layers, num_heads=c.num_heads, vocab_size=c.vocab_size,
        relative_attention_num_buckets=c.num_buckets, dropout_rate=0.0, decoder_start_token_id=0,
        relative_attention_max_distance=c.max_distance, tie_word_embeddings=c.tied,
        feed_forward_proj="gated-gelu" if c.gated else "relu", attn_implementation="eager"))
    model.load_state_dict(t5.weights, strict=False)
    return model.to(table.device, table.dtype).eval().requires_grad_(False)


def hf_meta_gradient(model, theta, phi, task, partner, lam, method, padded=0):
    """meta_gradient without L_reg by autograd through transformers: create_graph, the whole batch
    at once, padded to its longest text, or to `padded` tokens -> d theta, d phi."""
    theta = theta.detach().requires_grad_()
    phi = {name: x.detach().requires_grad_() for name, x in phi.items()}

    def states(theta, examples):
        batch = data.collate(examples, range(len(examples.ids)), theta.device)
        ids, mask = (F.pad(x, (0, max(0, padded - x.shape[1]))) for x in (batch.ids, batch.mask))
        text = model.get_input_embeddings()(ids)
        x = torch.cat([theta.to(text.dtype).expand(len(ids), -1, -1), text], 1)
        mask = F.pad(mask, (len(theta), 0), value=True)
        return model.encoder(inputs_embeds=x, attention_mask=mask)[0], mask, batch.targets

    def loss(examples, H, mask, Y):
        start = torch.tensor([[T.PAD, examples.words[0][0]]], device=H.device).expand(len(H), -1)
        logits = model(encoder_outputs=(H.to(model.dtype),), attention_mask=mask,
                       decoder_input_ids=start).logits[:, 1]
        log_p = torch.log_softmax(logits.to(theta.dtype), -1)[:, [w[1] for w in examples.words]]
        return -(Y.to(theta.dtype) * log_p).sum() / len(Y)

    support = states(theta, task.support)
    g, = torch.autograd.grad(loss(task.support, *support), theta,
                             create_graph=not method.first_order)
    H = gate_input(support[0], support[1]).mean(0).detach().to(theta.dtype)
    adapted = inner_step(theta, phi, g, H, method)
    mixed = mix(*states(adapted, task.query), *states(adapted, partner.query), lam)
    d_theta, *d_phi = torch.autograd.grad(loss(task.query, *mixed), [theta, *phi.values()])
    return d_theta, dict(zip(phi, d_phi))


# ---------------------------------------- the contenders: sizes -> a function to measure, over and over

def our_step(s, **how):
    """An exact step by this repository (or first order, or with graphs kept)."""
    t5, pairs = random_t5(s), random_pairs(s)
    method = Method(inner_rate=RATE, micro_tokens=s.micro_tokens, **how)
    theta = init_prompt(t5, s.prompt, 0)
    phi = init_regularizer(s.d, device=theta.device)
    return lambda: [meta_gradient(t5, theta, phi, *pair, LAM, 0.5, method) for pair in pairs]


def our_step_kept(s):
    return our_step(s, keep_gib=64.0)


def our_first_order(s):
    return our_step(s, first_order=True)


def hf_step(s, padded=0, first_order=False):
    """The same step by transformers and autograd."""
    t5, pairs = random_t5(s), random_pairs(s)
    model, theta = hf_model(t5), init_prompt(t5, s.prompt, 0)
    phi = init_regularizer(s.d, device=theta.device)
    method = Method(inner_rate=RATE, first_order=first_order)
    return lambda: [hf_meta_gradient(model, theta, phi, *pair, LAM, method, padded)
                    for pair in pairs]


def hf_released(s):
    return hf_step(s, padded=s.padded, first_order=True)


def sentences(s):
    lengths = np.random.default_rng(5).poisson(25, s.sentences).clip(3)
    offsets = np.concatenate([[0], lengths.cumsum()])
    return np.random.default_rng(6).integers(3, 32_000, offsets[-1]).astype(np.uint16), offsets


def our_embedding(s):
    """The batches of the corpus's own pass over its sentences."""
    t5, (tokens, offsets) = random_t5(s, 2 * s.layers), sentences(s)
    return lambda: [H for _, H in data._embedded(
        tokens, offsets, np.arange(s.sentences),
        lambda ids, mask: data.embed_sentences(t5, ids, mask), data.BATCH_TOKENS[s.device[:4]])]


def hf_embedding(s):
    """Sorted by length, 32 at a time."""
    model, (tokens, offsets) = hf_model(random_t5(s, 2 * s.layers)).encoder, sentences(s)
    texts = sorted((torch.from_numpy(part.astype(np.int64))
                    for part in np.split(tokens, offsets[1:-1])), key=len)

    @torch.no_grad()
    def run():
        for start in range(0, len(texts), 32):
            batch = texts[start:start + 32]
            ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True).to(model.device)
            mask = (ids > 0)[..., None]
            (model(input_ids=ids, attention_mask=mask[..., 0])[0] * mask).sum(1) / mask.sum(1)
    return run


def our_tuning(s):
    """A step of few-shot prompt tuning: gradient, clip, AdamW."""
    t5, examples = random_t5(s), random_examples(s.batch, 7, s, 0.25)
    theta, method = init_prompt(t5, s.prompt, 0), Method()
    optimizer = torch.optim.AdamW([theta], 0.1)

    def run():
        theta.grad, _, _ = prompt_gradient(t5, theta, examples, method)
        torch.nn.utils.clip_grad_norm_([theta], 1.0)
        optimizer.step()
    return run


def peft_tuning(s):
    """The same by PEFT: the batch as one, padded to its longest text."""
    from peft import PromptTuningConfig, get_peft_model
    examples = random_examples(s.batch, 7, s, 0.25)
    model = get_peft_model(hf_model(random_t5(s)), PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=s.prompt))
    batch = data.collate(examples, range(s.batch), s.device)
    labels = torch.tensor(examples.words, device=s.device)[examples.labels]
    parameters = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 0.1)

    def run():
        model(input_ids=batch.ids, attention_mask=batch.mask.long(), labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return run


def cloud(s):
    """Points around s.clusters centers, and the points to start from."""
    rng = np.random.default_rng(8)
    centers = rng.standard_normal((s.clusters, s.d), dtype=np.float32)
    points = centers[rng.integers(0, s.clusters, s.points)]
    points += 2 * rng.standard_normal(points.shape, dtype=np.float32)
    return points, points[:s.clusters].copy()


def our_kmeans(s):
    """10 of Lloyd's iterations -> the inertia; the other two take the same start."""
    points, start = (torch.from_numpy(x).to(s.device) for x in cloud(s))
    return lambda: kmeans(points, s.clusters, 0, 10, centroids=start).inertia[-1]


def sklearn_kmeans(s):
    from sklearn.cluster import KMeans
    points, start = cloud(s)
    return lambda: KMeans(s.clusters, init=start, n_init=1, max_iter=10, tol=0).fit(points).inertia_


def faiss_kmeans(s):
    import faiss
    points, start = cloud(s)
    faiss.omp_set_num_threads(torch.get_num_threads())

    def run():
        found = faiss.Kmeans(s.d, s.clusters, niter=10, max_points_per_centroid=s.points)
        found.train(points, init_centroids=start)
        return float(found.index.search(points, 1)[0].astype(np.float64).sum())
    return run


def texts_to_tokenize(s):
    documents = data.documents([data.TINY / "corpus.jsonl.gz"])
    tokenizer = data.load_tokenizer(data.TINY, T.read_config(data.TINY))
    return tokenizer, [sentence for _, document in zip(range(s.documents), documents)
                       for paragraph in document for sentence in data.split_sentences(paragraph)]


def our_tokens(s):
    tokenizer, texts = texts_to_tokenize(s)
    return lambda: data.tokenize(tokenizer, texts)


def tokenizers_tokens(s):
    tokenizer, texts = texts_to_tokenize(s)
    return lambda: [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
