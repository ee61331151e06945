"""T5, the encoder-decoder (Raffel et al. 2020, arXiv 1910.10683), as pure functions over tensors.

    t5 = load_t5("tiny")                     # a folder with config.json and model.safetensors
    x = embed_tokens(t5, ids)                # put soft prompts or any other vectors in here
    memory = encode(t5, x, mask)             # (B, S, d)
    y = decode(t5, target_ids, memory, mask) # (B, L, d)
    logits = next_token_logits(t5, y)        # (B, L, V)
    $ python t5.py      # the model in tiny/ fills two blanks: the five likeliest words; seconds

Both families load: v1.0 (t5-small .. 11b: ReLU, tied head) and v1.1 (LM-adapted, Flan: gated GELU,
untied head). They differ from the textbook Transformer: an RMS norm without mean or bias before
each branch; attention scores NOT divided by sqrt(d_kv); no biases; and positions as a learned score
per bucket of relative distance, one table for all blocks of a stack.

The residual stream has the dtype of the embedded input, float32 or wider; only matrix products run
in the weights' dtype. The weights are frozen: torch.func differentiates twice in the input.

B batch, S encoder positions, L decoder positions, d d_model, h heads, k d_kv, V vocabulary.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open

import onednn
from common import InputError, fingerprint, read_json, reading

PAD, EOS = 0, 1  # in every T5 vocabulary; the decoder starts with PAD


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
    num_buckets: int = 32       # of relative positions; this and what follows in every official T5
    max_distance: int = 128
    eps: float = 1e-6


class T5(NamedTuple):
    """A frozen model: its shape and its weights under the official checkpoint's names."""
    config: T5Config
    weights: dict[str, torch.Tensor]


# ------------------------------------------------------------------------- the building blocks

def linear(x, weight):
    """x (..., in) times weight (out, in), in the weight's dtype -> (..., out). T5 has no biases."""
    return onednn.linear(x.to(weight.dtype), weight)


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 or wider."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def relative_position_bucket(distance, bidirectional, num_buckets, max_distance):
    """The bucket of each distance key - query: exact when near, logarithmic up to max_distance.
    distance: long tensor of any shape. Bidirectional (encoder): half of the buckets for each sign.
    Causal (decoder): keys after the query share bucket 0.
    >>> relative_position_bucket(torch.tensor([-200, -8, -1, 0, 1, 8]), True, 32, 128)
    tensor([15,  8,  1,  0, 17, 24])
    """
    offset = 0
    if bidirectional:
        num_buckets //= 2
        offset = (distance > 0).long() * num_buckets
    distance = distance.abs() if bidirectional else (-distance).clamp(min=0)
    exact = num_buckets // 2
    # The reference's order of operations, in float32: rounding at the buckets' edges depends on it.
    octaves = torch.log(distance.clamp(min=exact).float() / exact) / math.log(max_distance / exact)
    far = (exact + (octaves * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return offset + torch.where(distance < exact, distance, far)


def position_bias(t5, stack, length):
    """The learned score per relative position of a stack, encoder or decoder -> (1, h, S, S)."""
    c = t5.config
    table = t5.weights[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    position = torch.arange(length, device=table.device)
    distance = position[None, :] - position[:, None]                           # (query, key)
    buckets = relative_position_bucket(distance, stack == "encoder", c.num_buckets, c.max_distance)
    return table[buckets].permute(2, 0, 1)[None]                               # (1, h, query, key)


def padding_bias(mask, dtype):
    """mask (B, S), true where attended -> bias (B, 1, 1, S): 0 there, else the lowest number."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill(~mask, torch.finfo(dtype).min)[:, None, None, :]


def attention_weights(scores, bias):
    """softmax(scores + bias) over the keys, in float32 or wider, back in the scores' dtype.
    Written out: the fused kernels have no second derivative, which the meta-gradient needs."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return torch.softmax(wide + bias.to(wide.dtype), dim=-1).to(scores.dtype)


# The branches of a block. Each norms its input first; name is such as "encoder.block.3.layer.0".

def self_attention(t5, name, x, bias):
    """Multi-head attention of x (B, S, d) over itself; bias (B or 1, h or 1, S, S) -> (B, S, d).
    The weights may hold a prefix (2, h, P, k): keys and values before x's own, without position."""
    w = t5.weights
    h, k = t5.config.num_heads, t5.config.d_kv
    B, S, _ = x.shape
    x = rms_norm(x, w[f"{name}.layer_norm.weight"], t5.config.eps)
    at = f"{name}.SelfAttention"
    query, key, value = (linear(x, w[f"{at}.{part}.weight"]).view(B, S, h, k).transpose(1, 2)
                         for part in "qkv")                                    # (B, h, S, k)
    if f"{at}.prefix" in w:
        prefix = w[f"{at}.prefix"].to(key.dtype)[:, None].expand(-1, B, -1, -1, -1)
        key = torch.cat([prefix[0], key], dim=2)                               # (B, h, P + S, k)
        value = torch.cat([prefix[1], value], dim=2)                           # (B, h, P + S, k)
        bias = F.pad(bias, (prefix.shape[3], 0))                               # (.., S, P + S)
    p = attention_weights(query @ key.mT, bias)              # (B, h, S, S), NOT scaled by k^-0.5
    read = (p @ value).transpose(1, 2).reshape(B, S, h * k)
    return linear(read, w[f"{at}.o.weight"])                                   # (B, S, d)


def cross_attention(t5, name, y, memory, bias):
    """Multi-head attention of y (B, L, d) over memory (B, S, d), absorbed -> (B, L, d).
    Keys and values are never formed: q (Wk m) = (q Wk) m and p (Wv m) = Wv (p m). So the two
    projections move from S encoder positions to L decoder positions: exact, and cheap at L = 2."""
    w = t5.weights
    h, k = t5.config.num_heads, t5.config.d_kv
    B, L, d = y.shape
    y = rms_norm(y, w[f"{name}.layer_norm.weight"], t5.config.eps)
    at = f"{name}.EncDecAttention"
    wk = w[f"{at}.k.weight"].view(h, k, d)
    wv = w[f"{at}.v.weight"].view(h, k, d)
    memory = memory.to(wk.dtype)
    query = linear(y, w[f"{at}.q.weight"]).view(B, L, h, k)
    query = torch.einsum("blhk,hkd->bhld", query, wk)                          # (B, h, L, d)
    scores = (query.reshape(B, h * L, d) @ memory.mT).view(B, h, L, -1)        # (B, h, L, S)
    p = attention_weights(scores, bias)
    read = (p.reshape(B, h * L, -1) @ memory).view(B, h, L, d)                 # (B, h, L, d)
    read = torch.einsum("bhld,hkd->blhk", read, wv)                            # (B, L, h, k)
    return linear(read.reshape(B, L, h * k), w[f"{at}.o.weight"])              # (B, L, d)


def feed_forward(t5, name, x):
    """x (B, S, d) -> wo relu(wi x), or wo (gelu(wi_0 x) * wi_1 x) with the tanh form of GELU."""
    w = t5.weights
    x = rms_norm(x, w[f"{name}.layer_norm.weight"], t5.config.eps)
    at = f"{name}.DenseReluDense"
    if t5.config.gated:
        gate = F.gelu(linear(x, w[f"{at}.wi_0.weight"]), approximate="tanh")
        inner = gate * linear(x, w[f"{at}.wi_1.weight"])
    else:
        inner = F.relu(linear(x, w[f"{at}.wi.weight"]))
    return linear(inner, w[f"{at}.wo.weight"])


# ------------------------------------------------------------------------------ the two stacks

def embed_tokens(t5, ids):
    """ids (B, S) long -> their embeddings (B, S, d), float32 or wider."""
    table = t5.weights["shared.weight"]
    return F.embedding(ids, table).to(torch.promote_types(table.dtype, torch.float32))


def encode(t5, x, mask):
    """x (B, S, d) embeddings, mask (B, S) true where there is input -> H (B, S, d), normed.
    What stands at padding is meaningless: mask it wherever H is used."""
    bias = position_bias(t5, "encoder", x.shape[1]) + padding_bias(mask, x.dtype)
    for block in range(t5.config.num_layers):
        x = x + self_attention(t5, f"encoder.block.{block}.layer.0", x, bias)
        x = x + feed_forward(t5, f"encoder.block.{block}.layer.1", x)
    return rms_norm(x, t5.weights["encoder.final_layer_norm.weight"], t5.config.eps)


def decode(t5, ids, memory, mask):
    """ids (B, L), PAD first, reading memory (B, S, d) where mask (B, S) -> (B, L, d), normed.
    Output position l has seen ids[:, :l + 1]: it predicts ids[:, l + 1]. Or K targets a row, which
    do not see each other: ids (B, K, L) -> (B, K, L, d)."""
    y = embed_tokens(t5, ids)
    y = y.to(torch.promote_types(y.dtype, memory.dtype))
    each, row = y.flatten(0, -3).shape, (len(ids), -1, y.shape[-1])     # (B K, L, d), (B, K L, d)
    length = ids.shape[-1]
    causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()   # (query, key)
    bias = position_bias(t5, "decoder", length) + padding_bias(causal, y.dtype).transpose(0, 2)
    cross_bias = padding_bias(mask, y.dtype)                          # no positions across stacks
    for block in range(t5.config.num_decoder_layers):
        y = y.reshape(each)
        y = y + self_attention(t5, f"decoder.block.{block}.layer.0", y, bias)
        y = y.reshape(row)
        y = y + cross_attention(t5, f"decoder.block.{block}.layer.1", y, memory, cross_bias)
        y = y + feed_forward(t5, f"decoder.block.{block}.layer.2", y)
    y = rms_norm(y, t5.weights["decoder.final_layer_norm.weight"], t5.config.eps)
    return y.reshape(*ids.shape, -1)


def next_token_logits(t5, y):
    """The head: y (..., d) from decode -> logits (..., V), float32 or wider."""
    y = y * t5.config.d_model ** -0.5 if t5.config.scaled else y
    logits = linear(y, t5.weights["lm_head.weight"])
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


# ----------------------------------------------------------------------------- reading weights

# Exporters store the embedding once or more, under any of these names; the head's only when tied.
ALIASES = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight",
           "lm_head.weight")
STRAY = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"   # unused, v1.0
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# What is saved in another way: pytorch_model.bin; an encoder alone, or PREFIX before all names.
PYTHON = 'python -c "from transformers import T5ForConditionalGeneration as T5; {}"'
CONVERT = PYTHON.format("T5.from_pretrained('FOLDER').save_pretrained('FOLDER')")
COMPLETE = PYTHON.format(
    "from safetensors.torch import load_file as load; m = T5.from_pretrained('BASE'); "
    "m.load_state_dict({n.removeprefix('PREFIX'): x for n, x in "
    "load('FOLDER/model.safetensors').items()}, strict=False); m.save_pretrained('FOLDER')")


def read_config(folder):
    """config.json of a folder -> T5Config. What a file omits is as in the first release.
    Raises InputError for a missing or damaged file, another model than T5, and impossible sizes."""
    path = Path(folder) / "config.json"
    sizes = ("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "vocab_size")
    with reading(path, "the config.json of a T5", remedy="take the one of the weights"):
        values = read_json(path)
        kind, form = values.get("model_type", "t5"), values.get("feed_forward_proj", "relu")
        if kind != "t5" or form not in ("relu", "gated-gelu"):
            raise ValueError(f"its model_type is {kind}, its feed_forward_proj {form}")
        tied = values.get("tie_word_embeddings", True)
        config = T5Config(
            **{name: values[name] for name in sizes},
            num_decoder_layers=values.get("num_decoder_layers", values["num_layers"]),
            gated=form == "gated-gelu", tied=tied, scaled=values.get("scale_decoder_outputs", tied),
            num_buckets=values.get("relative_attention_num_buckets", 32),
            max_distance=values.get("relative_attention_max_distance", 128),
            eps=values.get("layer_norm_epsilon", 1e-6))
        for name, value in config._asdict().items():
            expected = T5Config.__annotations__[name]
            most = 1000 if name.endswith("layers") else 2 ** 20     # expected_shapes lists them all
            if type(value) is not expected or expected is not bool and not 0 < value < most:
                raise ValueError(f"{name} is {value!r}")
        if not 1 < config.num_buckets // 2 < config.max_distance:
            raise ValueError(f"{config.num_buckets} buckets for {config.max_distance} positions")
    return config


def expected_shapes(config):
    """Every tensor that a checkpoint of this config must hold: official name -> shape."""
    c, inner = config, config.num_heads * config.d_kv
    attention = dict.fromkeys("qkv", (inner, c.d_model)) | {"o": (c.d_model, inner)}
    forward = dict.fromkeys(("wi_0", "wi_1") if c.gated else ("wi",), (c.d_ff, c.d_model))
    encoder = {"SelfAttention": attention, "DenseReluDense": forward | {"wo": (c.d_model, c.d_ff)}}
    decoder = {"SelfAttention": attention, "EncDecAttention": attention, **encoder}
    tables = ("shared.weight",) if c.tied else ("shared.weight", "lm_head.weight")
    shapes = dict.fromkeys(tables, (c.vocab_size, c.d_model))
    for stack, branches, blocks in (("encoder", encoder, c.num_layers),
                                    ("decoder", decoder, c.num_decoder_layers)):
        shapes[f"{stack}.final_layer_norm.weight"] = (c.d_model,)
        table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        shapes[table] = (c.num_buckets, c.num_heads)
        for block in range(blocks):
            for number, (branch, matrices) in enumerate(branches.items()):
                layer = f"{stack}.block.{block}.layer.{number}"
                shapes[f"{layer}.layer_norm.weight"] = (c.d_model,)
                shapes |= {f"{layer}.{branch}.{m}.weight": matrices[m] for m in matrices}
    return shapes


def count_weights(config):
    """How many numbers a T5 of this config holds, a tied head once."""
    return sum(map(math.prod, expected_shapes(config).values()))


def weight_files(folder, name=None):
    """model.safetensors of a folder, or else the shards of its index -> [path], or InputError.
    name: what the hub calls the model."""
    single, index = Path(folder) / SINGLE, Path(folder) / INDEX
    if single.is_file():
        return [single]
    if index.is_file():
        with reading(index, "an index of weights"):
            names = read_json(index)["weight_map"].values()
            return [index.with_name(name) for name in sorted(set(names))]
    raise InputError(f"{name or folder} has no {SINGLE}, and no other weights are read: look for a "
                     "revision with it, --model OWNER/NAME@refs/pr/1, or convert it: "
                     + CONVERT.replace("FOLDER", str(name or folder)))


def model_fingerprint(folder):
    """sha256 of a model folder's config.json and weights: what a prompt or a store belongs to."""
    return fingerprint([Path(folder) / "config.json", *weight_files(folder)])


def read_tensors(paths):
    """Yield each (name, tensor) of safetensors files, which are mapped into memory in turn."""
    for path in paths:
        with reading(path, "a safetensors file"), safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)


def load_t5(folder, dtype=torch.float32, device="cpu"):
    """Read config.json and the safetensors weights of a folder -> T5 in dtype on device.
    dtype: float32 or bfloat16, or float64 for proofs; T5's feed-forward overflows in float16.
    The peak of memory is the model in dtype and one file. Raises InputError unless the weights are
    finite and exactly those that config.json implies."""
    config = read_config(folder)
    # transformers 5 writes v1.1 as tied, too, but not scaled: there the file's head is its own
    copies = ALIASES if config.tied and config.scaled else ALIASES[:3]
    weights, wrong = {}, []
    for name, stored in read_tensors(weight_files(folder)):
        name = "shared.weight" if name in copies else name
        weight = stored.to(device=device, dtype=dtype)
        if not (stored.is_floating_point() and weight.sum().isfinite()):
            wrong.append(f"{name} holds {stored.dtype} that are not finite numbers")
        if not torch.equal(weight, weights.setdefault(name, weight)):
            wrong.append(f"copies of {name} differ")
    weights.pop(STRAY, None)
    config = config._replace(tied=config.tied and "lm_head.weight" not in weights)
    expected = expected_shapes(config)
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    wrong += [f"{name} is {found.get(name, 'missing')}, not {expected.get(name, 'absent')}"
              for name in sorted(expected | found) if expected.get(name) != found.get(name)]
    if wrong:
        whole = any(name.startswith("decoder.block") for name in found)
        line = COMPLETE.replace("FOLDER", str(folder))
        raise InputError(f"{folder} has {len(wrong)} faults, such as {'; '.join(wrong[:3])}: take "
                         "config.json and weights from one intact model folder" + (
                             "" if whole else f"; or, where BASE is a whole model and PREFIX stands"
                             f" before all names, if anything: {line}"))
    weights = {name: weights[name] for name in expected}
    weights.setdefault("lm_head.weight", weights["shared.weight"])             # the tied head
    return T5(config, weights)


if __name__ == "__main__":
    import show
    show.main(show.filled_blanks)
