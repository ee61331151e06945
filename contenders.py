"""The work that bench.py measures: ours, and the same work by transformers, PEFT, scikit-learn.

Each contender makes its model and data from Sizes, and gives the function to measure. Weights and
token ids are random.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

import corpus
import data
import t5 as T
from baselines import BASELINES, tuning_gradient
from common import InputError
from kmeans import kmeans
from supmer import Method, init_prompt, init_state, inner_step, meta_gradient, mix, pool

RATE, LAM = 50.0, 0.3               # an inner rate at which the second-order part is not noise


@dataclass(frozen=True)
class Sizes:
    """What a contender is given. A row is a support, a query or a partner's query example."""
    layers: int = 3                 # of the encoder, and of the decoder
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
    sentences: int = 96             # of 25 tokens on average, embedded by twice the layers
    points: int = 50_000
    clusters: int = 250
    dtype: str = "float32"
    device: str = "cpu"


WARM = dict(layers=1, d=64, ff=64, heads=1, support=2, query=2, shortest=12, longest=20, padded=22,
            prompt=2, batch=2, sentences=4, points=100, clusters=4)
QUICK = Sizes(layers=2, d=512, ff=2048, heads=8, support=4, query=4, shortest=32, longest=96,
              padded=206, prompt=50, micro_tokens=256, batch=16, points=10_000, clusters=64)


# ---------------------------------------------------------------- what all contenders are given

def shape(s):
    """A T5Config of v1.0."""
    return T.T5Config(d_model=s.d, d_kv=64, d_ff=s.ff, num_layers=s.layers,
                      num_decoder_layers=s.layers, num_heads=s.heads, vocab_size=32128, gated=False,
                      tied=True, scaled=True)


def random_t5(s):
    """A T5 with random weights of a size at which activations stay of order 1."""
    config, generator = shape(s), torch.Generator().manual_seed(0)
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
    pairs = []
    for i in range(s.tasks):
        support = random_examples(s.support, (i, 0), s)
        pairs.append([data.Task("sp-cluster", (0,), support, random_examples(s.query, (i, j), s))
                      for j in (1, 2)])
    return pairs


def hf_model(t5):
    """transformers' T5, frozen, with eager attention and these weights, unless on "meta"."""
    from transformers import T5Config, T5ForConditionalGeneration
    c, table = t5.config, t5.weights["shared.weight"]
    with torch.device("meta" if table.is_meta else "cpu"):
        model = T5ForConditionalGeneration(T5Config(
            d_model=c.d_model, d_kv=c.d_kv, d_ff=c.d_ff, num_layers=c.num_layers,
            num_decoder_layers=c.num_decoder_layers, num_heads=c.num_heads, dropout_rate=0.0,
            vocab_size=c.vocab_size, relative_attention_num_buckets=c.num_buckets,
            relative_attention_max_distance=c.max_distance, tie_word_embeddings=c.tied,
            decoder_start_token_id=0, feed_forward_proj="gated-gelu" if c.gated else "relu",
            attn_implementation="eager"))
    if not table.is_meta:
        found = model.load_state_dict(t5.weights, strict=False)     # it has the table three times
        if found.unexpected_keys or not set(found.missing_keys) <= set(T.ALIASES[1:3]):
            raise InputError(f"transformers' T5 has other tensors than ours: {found}")
    return model.to(table.device, table.dtype).eval().requires_grad_(False)


def hf_states(model, theta, examples, padded):
    """The encoder's last hidden states of [theta ; text], mask, labels, padded to that length."""
    batch = data.collate(examples, range(len(examples.ids)), theta.device)
    extra = max(0, padded - batch.ids.shape[1])
    text = model.get_input_embeddings()(F.pad(batch.ids, (0, extra)))
    x = torch.cat([theta.to(text.dtype).expand(len(text), -1, -1), text], 1)
    mask = F.pad(F.pad(batch.mask, (0, extra)), (len(theta), 0), value=True)
    H = model.encoder(inputs_embeds=x, attention_mask=additive(mask, model.dtype))[0]
    return H, mask, batch.targets.to(theta.dtype)


def additive(mask, dtype):
    """What transformers makes of a mask (B, S), whose values it reads: "meta" has none."""
    return (~mask[:, None, None]).to(dtype) * torch.finfo(dtype).min


def hf_loss(model, words, H, mask, Y):
    """The mean loss over the full vocabulary (Eq. 1)."""
    start = torch.tensor([[T.PAD, words[0][0]]], device=H.device).expand(len(H), -1)
    logits = model(encoder_outputs=(H.to(model.dtype),), decoder_input_ids=start,
                   attention_mask=additive(mask, model.dtype)).logits[:, 1]
    log_p = torch.log_softmax(logits.to(Y.dtype), -1)[:, [word[1] for word in words]]
    return -(Y * log_p).sum() / len(Y)


def hf_meta_gradient(model, theta, phi, task, partner, lam, method, padded=0):
    """meta_gradient without L_reg by autograd through transformers: create_graph, the whole batch
    at once, padded to its longest text, or to `padded` tokens -> d theta, d phi."""
    theta = theta.detach().requires_grad_()
    phi = {name: x.detach().requires_grad_() for name, x in phi.items()}
    H, mask, Y = hf_states(model, theta, task.support, padded)
    loss = hf_loss(model, task.support.words, H, mask, Y)
    g, = torch.autograd.grad(loss, theta, create_graph=not method.first_order)
    pooled = pool(H, mask).mean(0).detach().to(theta.dtype)
    adapted = inner_step(theta, phi, g, pooled, method)
    mixed = mix(*hf_states(model, adapted, task.query, padded),
                *hf_states(model, adapted, partner.query, padded), lam)
    loss = hf_loss(model, task.query.words, *mixed)
    d_theta, *d_phi = torch.autograd.grad(loss, [theta, *phi.values()])
    return d_theta, dict(zip(phi, d_phi))


# ---------------------------------------------- the contenders: sizes -> a function to measure

def step(s, hf=False, padded=False, **how):
    """An exact step by this repository, or by transformers and autograd; with first_order and
    padded as the released code does it."""
    t5, pairs = random_t5(s), random_pairs(s)
    method = Method(inner_rate=RATE, micro_tokens=s.micro_tokens, **how)
    state = init_state(init_prompt(t5, s.prompt, 0), method)
    if hf:
        one, model = partial(hf_meta_gradient, padded=s.padded if padded else 0), hf_model(t5)
        return lambda: [one(model, state.theta, state.phi, *pair, LAM, method) for pair in pairs]
    return lambda: [meta_gradient(t5, state.theta, state.phi, *pair, LAM, 0.5, method)
                    for pair in pairs]


def embedding(s, hf=False):
    """Random sentences in the batches of the corpus's own pass, or sorted by length, 32 at a time.
    """
    t5, lengths = random_t5(s), np.random.default_rng(5).poisson(25, s.sentences).clip(3)
    offsets = np.concatenate([[0], lengths.cumsum()])                       # (n + 1,)
    tokens = np.random.default_rng(6).integers(3, 32_000, offsets[-1]).astype(np.uint16)
    if not hf:
        embed, at_once = partial(corpus.embed_sentences, t5), corpus.BATCH_TOKENS[s.device[:4]]
        return lambda: corpus.embed_rows(tokens, offsets, embed, at_once, np.arange(s.sentences))
    model = hf_model(t5).encoder
    texts = sorted((torch.from_numpy(part.astype(np.int64))
                    for part in np.split(tokens, offsets[1:-1])), key=len)

    @torch.no_grad()
    def run():
        for start in range(0, len(texts), 32):
            ids = torch.nn.utils.rnn.pad_sequence(texts[start:start + 32], batch_first=True)
            ids = ids.to(model.device)
            mask = (ids > 0)[..., None]                                     # (32, T, 1)
            (model(input_ids=ids, attention_mask=mask[..., 0])[0] * mask).sum(1) / mask.sum(1)
    return run


def tuning(s, peft=False):
    """A step of few-shot prompt tuning, ours or PEFT's, which pads the batch to its longest text:
    gradient, clip, AdamW."""
    t5, examples = random_t5(s), random_examples(s.batch, 7, s, 0.25)
    if peft:
        from peft import PromptTuningConfig, get_peft_model
        model = get_peft_model(hf_model(t5), PromptTuningConfig(
            task_type="SEQ_2_SEQ_LM", num_virtual_tokens=s.prompt))
        batch = data.collate(examples, range(s.batch), s.device)
        labels = torch.tensor(examples.words, device=s.device)[examples.labels]
        parameters = [x for x in model.parameters() if x.requires_grad]

        def gradient():
            model(input_ids=batch.ids, attention_mask=batch.mask.long(),
                  labels=labels).loss.backward()
    else:
        theta, prompt = init_prompt(t5, s.prompt, 0), BASELINES["learned"]
        parameters = [theta]

        def gradient():
            found, _ = tuning_gradient(t5, prompt, {"theta": theta}, examples, Method())
            theta.grad = found["theta"]
    optimizer = torch.optim.AdamW(parameters, 0.1)

    def run():
        gradient()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return run


def clustering(s, sklearn=False):
    """10 of Lloyd's iterations on points around s.clusters centers, from the first of them -> the
    inertia."""
    rng = np.random.default_rng(8)
    centers = rng.standard_normal((s.clusters, s.d), dtype=np.float32)
    points = centers[rng.integers(0, s.clusters, s.points)]
    points += 2 * rng.standard_normal(points.shape, dtype=np.float32)
    start = points[:s.clusters].copy()
    if sklearn:
        from sklearn.cluster import KMeans
        one = KMeans(s.clusters, init=start, n_init=1, max_iter=10, tol=0)
        return lambda: one.fit(points).inertia_
    points, start = (torch.from_numpy(x).to(s.device) for x in (points, start))
    return lambda: kmeans(points, s.clusters, 0, 10, centroids=start).inertia[-1]
