"""T5, the encoder-decoder (Raffel et al. 2020, arXiv 1910.10683), as pure functions over a dict of tensors.

    t5 = load_t5("tiny")                     # a folder with config.json and model.safetensors
    x = embed_tokens(t5, ids)                # put soft prompts or any other vectors in here
    memory = encode(t5, x, mask)             # (B, S, d)
    y = decode(t5, target_ids, memory, mask) # (B, L, d)
    logits = next_token_logits(t5, y)        # (B, L, V)

Both families are read: v1.0 (t5-small .. 11b: ReLU, tied head) and v1.1 (LM-adapted, Flan: gated GELU, untied
head). What T5 does differently from the textbook Transformer, each at its place below: an RMS norm without mean or
bias, before each branch; attention scores NOT divided by sqrt(d_kv); no biases anywhere; a learned bias per bucket
of relative distance instead of position embeddings, one table shared by all blocks of a stack.

Numbers: the residual stream has the dtype of the embedded input, float32 or wider; only the matrix products run in
the weights' dtype. So bfloat16 weights keep a float32 prompt exact, and float64 passes through untouched. The weights
are frozen here: nothing requires grad, and gradients are asked for with respect to the input (torch.func).

Dimension letters: B batch, S encoder positions, L decoder positions, d d_model, h heads, k d_kv, f d_ff, V vocabulary.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

PAD, EOS = 0, 1  # in every T5 vocabulary; the decoder starts with PAD


class InputError(ValueError):
    """Something that the user gave is wrong; the message says what, and what to do about it."""


class T5Config(NamedTuple):
    """The shape of a T5. Inner attention width is num_heads * d_kv, which need not be d_model."""
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    vocab_size: int
    gated: bool         # feed-forward: gated GELU (v1.1) or ReLU (v1.0)
    tied: bool          # the head is the embedding table (v1.0), not a matrix of its own (v1.1)
    scaled: bool        # the head's input is scaled by d_model^-0.5 (v1.0)
    num_buckets: int
    max_distance: int
    eps: float


class T5(NamedTuple):
    """A frozen model: its shape and its weights under the official checkpoint's names."""
    config: T5Config
    weights: dict[str, torch.Tensor]


# ------------------------------------------------------------------------- the building blocks

def linear(x, weight):
    """x (..., in) times weight (out, in), in the weight's dtype -> (..., out). No T5 layer has a bias."""
    return F.linear(x.to(weight.dtype), weight)


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 or wider: no mean is subtracted, no bias added."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def relative_position_bucket(distance, bidirectional, num_buckets, max_distance):
    """The bucket of a distance key - query: exact for near ones, logarithmic up to max_distance, then one for all.

    distance: long tensor of any shape. Bidirectional (encoder): half of the buckets for each sign. Causal (decoder):
    keys after the query share bucket 0.
    >>> relative_position_bucket(torch.tensor([-200, -8, -1, 0, 1, 8]), True, 32, 128)
    tensor([15,  8,  1,  0, 17, 24])
    """
    if bidirectional:
        num_buckets //= 2
        offset = (distance > 0).long() * num_buckets
        distance = distance.abs()
    else:
        offset = 0
        distance = (-distance).clamp(min=0)
    exact = num_buckets // 2
    # The reference's order of operations, in float32: the rounding at the buckets' edges depends on it.
    octaves = torch.log(distance.clamp(min=exact).float() / exact) / math.log(max_distance / exact)
    far = (exact + (octaves * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return offset + torch.where(distance < exact, distance, far)


def position_bias(t5, stack, length):
    """The learned relative position bias of one stack ("encoder" or "decoder") -> (1, h, length, length)."""
    c, table = t5.config, t5.weights[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    position = torch.arange(length, device=table.device)
    buckets = relative_position_bucket(position[None, :] - position[:, None], stack == "encoder",
                                       c.num_buckets, c.max_distance)          # (query, key)
    return table[buckets].permute(2, 0, 1)[None]                               # (1, h, query, key)


def attention_weights(scores, bias):
    """softmax(scores + bias) over the keys, in float32 or wider, back in the scores' dtype.

    Written out, never a fused kernel: those have no second derivative, and the meta-gradient needs one.
    """
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return torch.softmax(wide + bias.to(wide.dtype), dim=-1).to(scores.dtype)


def padding_bias(mask, dtype):
    """mask (B, S), true where attended -> additive bias (B, 1, 1, S): 0 there, else the lowest number."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill(~mask, torch.finfo(dtype).min)[:, None, None, :]


def self_attention(t5, name, x, bias):
    """Multi-head attention of x (B, S, d) over itself; bias (B or 1, h or 1, S, S) holds positions and mask."""
    w, (B, S, _), h, k = t5.weights, x.shape, t5.config.num_heads, t5.config.d_kv
    q, key, value = (linear(x, w[f"{name}.{part}.weight"]).view(B, S, h, k).transpose(1, 2)    # (B, h, S, k)
                     for part in "qkv")
    p = attention_weights(q @ key.mT, bias)                                    # (B, h, S, S), NOT scaled by k^-0.5
    return linear((p @ value).transpose(1, 2).reshape(B, S, h * k), w[f"{name}.o.weight"])     # (B, S, d)


def cross_attention(t5, name, y, memory, bias):
    """Multi-head attention of y (B, L, d) over memory (B, S, d), absorbed: keys and values are never formed.

    q (Wk m) = (q Wk) m and p (Wv m) = Wv (p m): the projections move from the S encoder positions to the L decoder
    positions. Exact, and with L = 2 far cheaper.
    """
    w, (B, L, d), h, k = t5.weights, y.shape, t5.config.num_heads, t5.config.d_kv
    memory = memory.to(w[f"{name}.q.weight"].dtype)
    q = linear(y, w[f"{name}.q.weight"]).view(B, L, h, k)
    q = torch.einsum("blhk,hkd->bhld", q, w[f"{name}.k.weight"].view(h, k, d))
    scores = (q.reshape(B, h * L, d) @ memory.mT).view(B, h, L, -1)            # (B, h, L, S)
    p = attention_weights(scores, bias)
    read = (p.reshape(B, h * L, -1) @ memory).view(B, h, L, d)
    read = torch.einsum("bhld,hkd->blhk", read, w[f"{name}.v.weight"].view(h, k, d))
    return linear(read.reshape(B, L, h * k), w[f"{name}.o.weight"])            # (B, L, d)


def feed_forward(t5, name, x):
    """relu(x wi) wo, or gelu(x wi_0) * (x wi_1) wo with the tanh form of GELU: (B, S, d) -> (B, S, d)."""
    w = t5.weights
    if t5.config.gated:
        inner = F.gelu(linear(x, w[f"{name}.wi_0.weight"]), approximate="tanh") * linear(x, w[f"{name}.wi_1.weight"])
    else:
        inner = F.relu(linear(x, w[f"{name}.wi.weight"]))
    return linear(inner, w[f"{name}.wo.weight"])


# ------------------------------------------------------------------------------ the two stacks

def embed_tokens(t5, ids):
    """ids (B, S) long -> their embeddings (B, S, d), float32 or wider."""
    table = t5.weights["shared.weight"]
    return F.embedding(ids, table).to(torch.promote_types(table.dtype, torch.float32))


def encode(t5, x, mask):
    """Run the encoder. x (B, S, d) embeddings, mask (B, S) true where there is input -> H (B, S, d), after the final norm.

    What stands at padding is meaningless: mask it wherever H is used.
    """
    w, eps = t5.weights, t5.config.eps
    bias = position_bias(t5, "encoder", x.shape[1]) + padding_bias(mask, x.dtype)
    for block in range(t5.config.num_layers):
        layer = f"encoder.block.{block}.layer"
        normed = rms_norm(x, w[f"{layer}.0.layer_norm.weight"], eps)
        x = x + self_attention(t5, f"{layer}.0.SelfAttention", normed, bias)
        normed = rms_norm(x, w[f"{layer}.1.layer_norm.weight"], eps)
        x = x + feed_forward(t5, f"{layer}.1.DenseReluDense", normed)
    return rms_norm(x, w["encoder.final_layer_norm.weight"], eps)


def decode(t5, ids, memory, mask):
    """Run the decoder over ids (B, L), PAD first, reading memory (B, S, d) where mask (B, S) -> (B, L, d), after the final norm.

    Output position l has seen ids[:, :l + 1]: it predicts ids[:, l + 1].
    """
    w, eps = t5.weights, t5.config.eps
    y = embed_tokens(t5, ids)
    y = y.to(torch.promote_types(y.dtype, memory.dtype))
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
    self_bias = position_bias(t5, "decoder", ids.shape[1]) + padding_bias(causal, y.dtype).view(1, 1, *causal.shape)
    cross_bias = padding_bias(mask, y.dtype)                                   # no positions across the stacks
    for block in range(t5.config.num_decoder_layers):
        layer = f"decoder.block.{block}.layer"
        normed = rms_norm(y, w[f"{layer}.0.layer_norm.weight"], eps)
        y = y + self_attention(t5, f"{layer}.0.SelfAttention", normed, self_bias)
        normed = rms_norm(y, w[f"{layer}.1.layer_norm.weight"], eps)
        y = y + cross_attention(t5, f"{layer}.1.EncDecAttention", normed, memory, cross_bias)
        normed = rms_norm(y, w[f"{layer}.2.layer_norm.weight"], eps)
        y = y + feed_forward(t5, f"{layer}.2.DenseReluDense", normed)
    return rms_norm(y, w["decoder.final_layer_norm.weight"], eps)


def next_token_logits(t5, y):
    """The head: y (..., d) decoder outputs -> logits (..., V), float32 or wider. v1.0 scales its input by d^-0.5."""
    logits = linear(y * t5.config.d_model ** -0.5 if t5.config.scaled else y, t5.weights["lm_head.weight"])
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


# ----------------------------------------------------------------------------- reading weights

def read_config(folder):
    """config.json of a folder -> T5Config. Old files omit keys: the defaults are those of the first release.

    Raises InputError for a missing or broken file, a model that is no T5, and feed-forwards other than the two known.
    """
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing: a model folder holds config.json, model.safetensors, tokenizer.json") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): fetch it again") from None
    if not isinstance(values, dict) or values.get("model_type", "t5") != "t5":
        raise InputError(f"{path} does not describe a T5 (model_type must be t5)")
    form = values.get("feed_forward_proj", "relu")
    if form not in ("relu", "gated-gelu"):
        raise InputError(f"{path}: feed_forward_proj is {form!r}; relu (v1.0) and gated-gelu (v1.1) are known")

    def size(key, default=None):
        value = values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2 ** 20:
            raise InputError(f"{path}: {key} is {value!r}, not a positive integer of sensible size")
        return value

    eps = values.get("layer_norm_epsilon", 1e-6)
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise InputError(f"{path}: layer_norm_epsilon is {eps!r}, not a number between 0 and 1")
    layers, tied = size("num_layers"), bool(values.get("tie_word_embeddings", True))
    return T5Config(size("d_model"), size("d_kv"), size("d_ff"), layers, size("num_decoder_layers", layers),
                    size("num_heads"), size("vocab_size"), form == "gated-gelu",
                    tied, bool(values.get("scale_decoder_outputs", tied)),
                    size("relative_attention_num_buckets", 32), size("relative_attention_max_distance", 128), eps)


def expected_shapes(config):
    """Every tensor that a checkpoint of this config must hold: name -> shape, in the official layout."""
    c = config
    inner = c.num_heads * c.d_kv
    shapes = {"shared.weight": (c.vocab_size, c.d_model)}
    if not c.tied:
        shapes["lm_head.weight"] = (c.vocab_size, c.d_model)
    for stack, blocks in (("encoder", c.num_layers), ("decoder", c.num_decoder_layers)):
        shapes[f"{stack}.final_layer_norm.weight"] = (c.d_model,)
        shapes[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (c.num_buckets, c.num_heads)
        branches = ("SelfAttention", "DenseReluDense") if stack == "encoder" else \
                   ("SelfAttention", "EncDecAttention", "DenseReluDense")
        for block in range(blocks):
            for number, branch in enumerate(branches):
                layer = f"{stack}.block.{block}.layer.{number}"
                shapes[f"{layer}.layer_norm.weight"] = (c.d_model,)
                if branch == "DenseReluDense":
                    for part in ("wi_0", "wi_1") if c.gated else ("wi",):
                        shapes[f"{layer}.{branch}.{part}.weight"] = (c.d_ff, c.d_model)
                    shapes[f"{layer}.{branch}.wo.weight"] = (c.d_model, c.d_ff)
                else:
                    for part in "qkv":
                        shapes[f"{layer}.{branch}.{part}.weight"] = (inner, c.d_model)
                    shapes[f"{layer}.{branch}.o.weight"] = (c.d_model, inner)
    return shapes


# Exporters repeat the embedding under these names; v1.0 files carry a cross-attention bias that no T5 ever reads.
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
STRAY = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def load_t5(folder, dtype=torch.float32, device="cpu"):
    """Read config.json and model.safetensors of a folder -> T5 in dtype (float32, bfloat16; float64 for proofs) on device.

    Strict both ways: every tensor of the config must be in the file with its shape, finite, and every tensor of the
    file must be used. Raises InputError otherwise. float16 is refused: T5's feed-forward overflows in it.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise InputError(f"T5 does not run in {dtype}: choose float32 or bfloat16 (float16 overflows)")
    config, path = read_config(folder), Path(folder) / "model.safetensors"
    if not path.is_file():
        raise InputError(f"{path} is missing: put the model's safetensors weights there")
    try:
        with safe_open(path, framework="pt") as file:
            config, source = _match(path, file, config)
            weights = {name: file.get_tensor(stored).to(device=device, dtype=dtype) for name, stored in source.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}): it is damaged or incomplete, fetch it again") from None
    _complain(path, "has values that are not finite in", [n for n, w in weights.items() if not w.isfinite().all()])
    weights.setdefault("lm_head.weight", weights["shared.weight"])             # the tied head
    return T5(config, weights)


def _match(path, file, config):
    """Hold an open safetensors file against the config -> (config, {official name: name in the file}).

    A tied table may be stored once, under any of its names, or repeated; then all copies must be equal.
    transformers 5 writes tie_word_embeddings true for v1.1 as well (and scale_decoder_outputs false): there a head
    that differs from the table makes the model untied.
    """
    names = set(file.keys())
    table = next((name for name in ("shared.weight", *COPIES) if name in names), "shared.weight")
    copies = [name for name in (*COPIES, *(["lm_head.weight"] if config.tied else [])) if name in names]
    differing = [name for name in copies
                 if table in names and not torch.equal(file.get_tensor(name), file.get_tensor(table))]
    if differing == ["lm_head.weight"] and not config.scaled:
        config, differing = config._replace(tied=False), []
    _complain(path, f"has copies of {table} that differ from it:", differing)
    shapes = expected_shapes(config)
    source = {name: name for name in shapes} | {"shared.weight": table}
    _complain(path, "lacks", sorted(set(source.values()) - names))
    _complain(path, "has tensors that this config does not use:", sorted(names - {*source.values(), *copies, STRAY}))
    _complain(path, "has tensors of another shape:",
              [f"{name} {file.get_slice(source[name]).get_shape()} instead of {list(shape)}"
               for name, shape in shapes.items() if file.get_slice(source[name]).get_shape() != list(shape)])
    return config, source


def _complain(path, what, names):
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise InputError(f"{path} {what} {', '.join(names[:5])}{more}; config.json and weights must be of one model")
