"""T5, the encoder-decoder (Raffel et al. 2020, arXiv 1910.10683), as pure functions over tensors.

    t5 = load_t5("tiny")                     # a folder with config.json and model.safetensors
    x = embed_tokens(t5, ids)                # put soft prompts or any other vectors in here
    memory = encode(t5, x, mask)             # (B, S, d)
    y = decode(t5, target_ids, memory, mask) # (B, L, d)
    logits = next_token_logits(t5, y)        # (B, L, V)

    python t5.py    # the model in tiny/ fills two blanks: the five likeliest words; seconds

Both families are read: v1.0 (t5-small .. 11b: ReLU, tied head) and v1.1 (LM-adapted, Flan: gated
GELU, untied head). What differs from the textbook Transformer, each at its place below: an RMS norm
without mean or bias, before each branch; attention scores NOT divided by sqrt(d_kv); no biases; and
for positions a learned score per bucket of relative distance, one table for all blocks of a stack.

Numbers: the residual stream has the dtype of the embedded input, float32 or wider; only the matrix
products run in the weights' dtype. So bfloat16 weights keep a float32 prompt exact, and float64
passes through untouched. The weights are frozen: nothing here requires grad; gradients are taken
with respect to the input (torch.func).

B batch, S encoder positions, L decoder positions, d d_model, h heads, k d_kv, V vocabulary.
"""

import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from common import InputError, fingerprint, read_json

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
    x = x.to(weight.dtype)
    if ONEDNN and weight.dtype == torch.float32 and weight.is_cpu and weight.numel() > 2 ** 18 \
            and not weight.requires_grad:
        return OneDNNLinear.apply(x, weight)
    return F.linear(x, weight)


class OneDNNLinear(torch.autograd.Function):
    """F.linear with a frozen float32 weight on a CPU, by oneDNN: equal up to rounding.
    F.linear calls MKL, which is slower on some AMD processors; bench.py prints both rates. There
    are no packed copies of the weight. Small ones lose more to autograd.Function than they gain."""
    @staticmethod
    def forward(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.weight = inputs[1]

    @staticmethod
    def backward(ctx, g):
        return OneDNNLinear.apply(g, ctx.weight.T), None

    @staticmethod
    def jvp(ctx, x_tangent, _):
        return OneDNNLinear.apply(x_tangent, ctx.weight)


ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


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
    if bidirectional:
        num_buckets //= 2
        offset, distance = (distance > 0).long() * num_buckets, distance.abs()
    else:
        offset, distance = 0, (-distance).clamp(min=0)
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


# The branches of a block, which the stacks add to the residual stream. Each norms its input first;
# name is where its weights are: "encoder.block.3.layer.0".

def self_attention(t5, name, x, bias):
    """Multi-head attention of x (B, S, d) over itself; bias (B or 1, h or 1, S, S) -> (B, S, d).
    Weights may hold a prefix (2, h, P, k), keys and values before x's own, without position."""
    w, (B, S, _), h, k = t5.weights, x.shape, t5.config.num_heads, t5.config.d_kv
    wq, wk, wv, wo = (w[f"{name}.SelfAttention.{part}.weight"] for part in "qkvo")
    x = rms_norm(x, w[f"{name}.layer_norm.weight"], t5.config.eps)
    q, key, value = (linear(x, m).view(B, S, h, k).transpose(1, 2)             # (B, h, S, k)
                     for m in (wq, wk, wv))
    prefix = w.get(f"{name}.SelfAttention.prefix")
    if prefix is not None:
        prefix = prefix.to(q.dtype)[:, None].expand(-1, B, -1, -1, -1)         # (2, B, h, P, k)
        both = zip(prefix, (key, value))
        key, value = (torch.cat(pair, dim=2) for pair in both)                 # (B, h, P + S, k)
        bias = F.pad(bias, (prefix.shape[3], 0))                               # (.., S, P + S)
    p = attention_weights(q @ key.mT, bias)                  # (B, h, S, S), NOT scaled by k^-0.5
    return linear((p @ value).transpose(1, 2).reshape(B, S, h * k), wo)        # (B, S, d)


def cross_attention(t5, name, y, memory, bias):
    """Multi-head attention of y (B, L, d) over memory (B, S, d), absorbed -> (B, L, d).
    Keys and values are never formed: q (Wk m) = (q Wk) m and p (Wv m) = Wv (p m), so the two
    projections move from S encoder positions to L decoder positions: exact, and cheap at L = 2."""
    w, (B, L, d), h, k = t5.weights, y.shape, t5.config.num_heads, t5.config.d_kv
    wq, wk, wv, wo = (w[f"{name}.EncDecAttention.{part}.weight"] for part in "qkvo")
    memory = memory.to(wq.dtype)
    q = linear(rms_norm(y, w[f"{name}.layer_norm.weight"], t5.config.eps), wq).view(B, L, h, k)
    q = torch.einsum("blhk,hkd->bhld", q, wk.view(h, k, d))                    # (B, h, L, d)
    scores = (q.reshape(B, h * L, d) @ memory.mT).view(B, h, L, -1)            # (B, h, L, S)
    p = attention_weights(scores, bias)
    read = (p.reshape(B, h * L, -1) @ memory).view(B, h, L, d)                 # (B, h, L, d)
    read = torch.einsum("bhld,hkd->blhk", read, wv.view(h, k, d))              # (B, L, h, k)
    return linear(read.reshape(B, L, h * k), wo)                               # (B, L, d)


def feed_forward(t5, name, x):
    """x (B, S, d) -> wo relu(wi x), or wo (gelu(wi_0 x) * wi_1 x) with the tanh form of GELU."""
    w, x = t5.weights, rms_norm(x, t5.weights[f"{name}.layer_norm.weight"], t5.config.eps)
    name = f"{name}.DenseReluDense"
    if t5.config.gated:
        inner = F.gelu(linear(x, w[f"{name}.wi_0.weight"]), approximate="tanh")
        inner = inner * linear(x, w[f"{name}.wi_1.weight"])
    else:
        inner = F.relu(linear(x, w[f"{name}.wi.weight"]))
    return linear(inner, w[f"{name}.wo.weight"])


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
    Output position l has seen ids[:, :l + 1]: it predicts ids[:, l + 1]."""
    y = embed_tokens(t5, ids)
    y = y.to(torch.promote_types(y.dtype, memory.dtype))
    length = ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()   # (query, key)
    bias = position_bias(t5, "decoder", length) + padding_bias(causal, y.dtype).transpose(0, 2)
    cross_bias = padding_bias(mask, y.dtype)                          # no positions across stacks
    for block in range(t5.config.num_decoder_layers):
        y = y + self_attention(t5, f"decoder.block.{block}.layer.0", y, bias)
        y = y + cross_attention(t5, f"decoder.block.{block}.layer.1", y, memory, cross_bias)
        y = y + feed_forward(t5, f"decoder.block.{block}.layer.2", y)
    return rms_norm(y, t5.weights["decoder.final_layer_norm.weight"], t5.config.eps)


def next_token_logits(t5, y):
    """The head: y (..., d) from decode -> logits (..., V), float32 or wider."""
    y = y * t5.config.d_model ** -0.5 if t5.config.scaled else y
    logits = linear(y, t5.weights["lm_head.weight"])
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


# ----------------------------------------------------------------------------- reading weights

def read_config(folder):
    """config.json of a folder -> T5Config. What old files omit is as in the first release.
    Raises InputError for a missing or broken file, another model than T5, impossible sizes."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise InputError(f"{path} is missing: put the model's config.json there")
    values = read_json(path)
    if not isinstance(values, dict) or values.get("model_type", "t5") != "t5":
        raise InputError(f"{path} does not describe a T5: take a model whose model_type is t5")
    form = values.get("feed_forward_proj", "relu")
    if form not in ("relu", "gated-gelu"):
        raise InputError(f"{path}: feed_forward_proj is {form!r}; take a T5 of relu or gated-gelu")

    def get(key, default=None, kind=int, below=2 ** 20):
        value = values.get(key, default)
        if type(value) is not kind or not (value is False or 0 < value < below):
            raise InputError(f"{path}: {key} is {value!r}, not a sensible {kind.__name__}; take the"
                             " config.json that belongs to the weights")
        return value

    layers, tied = get("num_layers", below=1000), get("tie_word_embeddings", True, bool)
    config = T5Config(
        get("d_model"), get("d_kv"), get("d_ff"), layers,
        get("num_decoder_layers", layers, below=1000), get("num_heads"), get("vocab_size"),
        gated=form == "gated-gelu", tied=tied, scaled=get("scale_decoder_outputs", tied, bool),
        num_buckets=get("relative_attention_num_buckets", 32),
        max_distance=get("relative_attention_max_distance", 128),
        eps=get("layer_norm_epsilon", 1e-6, float, below=1))
    if config.num_buckets < 4 or config.max_distance <= config.num_buckets // 2:
        raise InputError(f"{path}: {config.num_buckets} buckets of relative_attention do not fit "
                         f"{config.max_distance} positions; T5 has 32 and 128")
    return config


def expected_shapes(config):
    """Every tensor that a checkpoint of this config must hold: official name -> shape."""
    c, inner = config, config.num_heads * config.d_kv
    attention = {m: (inner, c.d_model) for m in "qkv"} | {"o": (c.d_model, inner)}
    forward = {m: (c.d_ff, c.d_model) for m in (("wi_0", "wi_1") if c.gated else ("wi",))}
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


# Exporters store the embedding once or more, under any of these names; the last one when tied.
# STRAY: v1.0 files carry a bias that no T5 ever reads.
ALIASES = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight",
           "lm_head.weight")
STRAY = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
FLOATS = ("F16", "BF16", "F32", "F64")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def load_t5(folder, dtype=torch.float32, device="cpu"):
    """Read config.json and the safetensors weights of a folder -> T5 in dtype on device.

    dtype: float32 or bfloat16, float64 for proofs; float16 is refused, T5's feed-forward overflows
    in it. The files are mapped, and read one after the other: the peak is the model in dtype and
    one file. Every tensor of the config must be there, finite and with its shape, and every tensor
    that is there must be used. Raises InputError otherwise.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float64):
        raise InputError(f"T5 does not run in {dtype}: choose float32 or bfloat16")
    config, paths, weights = read_config(folder), weight_files(folder), {}
    named = paths[0] if len(paths) == 1 else folder
    config, source = _match(named, _files_of_tensors(paths), config)
    for path in paths:
        with _open(path) as file:
            there = set(file.keys())
            weights |= {name: file.get_tensor(stored).to(device=device, dtype=dtype)
                        for name, stored in source.items() if stored in there}
    _complain(named, "has values that are not finite in",
              [name for name, w in weights.items()          # aminmax makes no copy and keeps NaN
               if not all(map(math.isfinite, w.aminmax()))])
    weights.setdefault("lm_head.weight", weights["shared.weight"])             # the tied head
    return T5(config, weights)


def shard_names(index):
    """The files that a model.safetensors.index.json lists. InputError if it is no such index."""
    try:
        names = sorted(set(read_json(Path(index))["weight_map"].values()))
        if not names or any(Path(name).name != name or name[:1] in ("", ".") for name in names):
            raise ValueError("its weight_map must name files of its own folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is no index of weights ({error!r}): fetch it again") from None
    return names


def weight_files(folder):
    """The safetensors files of a model folder: model.safetensors or else the shards of its index.
    Raises InputError if one is missing."""
    folder = Path(folder)
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        return [single]
    if index.is_file():
        paths = [folder / name for name in shard_names(index)]
        _complain(index, "names files that are not there:",
                  [path.name for path in paths if not path.is_file()])
        return paths
    other = "".join(f"; {path.name} is not read here: take a revision of the model that has "
                    "safetensors, such as --model OWNER/NAME@refs/pr/1"
                    for path in sorted(folder.glob("pytorch_model*"))[:1])
    raise InputError(f"{single} is missing: put the model's safetensors weights there{other}")


def check_file(path):
    """Raise InputError unless a .json or .safetensors file is one, and whole."""
    if path.suffix == ".json":
        read_json(path)
    elif path.suffix == ".safetensors":
        _open(path)


def _open(path):
    """A safetensors file, mapped into memory. InputError, with what the file is, if it is none."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        with open(path, "rb") as file:
            start = file.read(7)
        what = "it is a web page" if start.lstrip()[:1] == b"<" else \
            "it is Git LFS's pointer to the file" if start == b"version" else str(error)
        raise InputError(f"{path} cannot be read ({what}): fetch it again") from None


def _files_of_tensors(paths):
    """Every tensor of the files -> {name: the open file that has it}; only headers are read."""
    found = {}
    for path in paths:
        file = _open(path)
        _complain(path, "repeats tensors of another file:", sorted(found.keys() & file.keys()))
        found |= dict.fromkeys(file.keys(), file)
    return found


def _match(path, found, config):
    """Hold {name: open file} against the config -> (config, {official name: name in the files}).
    All copies of a tied table must be equal. transformers 5 writes tie_word_embeddings true for
    v1.1 as well (with scale_decoder_outputs false): there a head in the file makes it untied."""
    if not config.scaled and "lm_head.weight" in found:
        config = config._replace(tied=False)
    aliases = ALIASES if config.tied else ALIASES[:3]
    table, *copies = [name for name in aliases if name in found] or ["shared.weight"]
    shapes = expected_shapes(config)
    source = {name: name for name in shapes} | {"shared.weight": table}
    _complain(path, "lacks", sorted(set(source.values()) - found.keys()))
    _complain(path, "has tensors that config.json does not call for:",
              sorted(found.keys() - {*source.values(), *copies, STRAY}))
    headers = {name: found[stored].get_slice(stored) for name, stored in source.items()}
    _complain(path, "has tensors of another shape than config.json says:",
              [f"{name} {list(shape)}, found {headers[name].get_shape()}"
               for name, shape in shapes.items() if headers[name].get_shape() != list(shape)])
    _complain(path, "has no floating-point numbers in",
              [name for name in headers if headers[name].get_dtype() not in FLOATS])
    _complain(path, f"has copies of {table} that differ from it:",
              [name for name in copies if not torch.equal(found[table].get_tensor(table),
                                                          found[name].get_tensor(name))])
    return config, source


def _complain(path, what, names):
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise InputError(f"{path} {what} {', '.join(names[:5])}{more}; take config.json and weights"
                         " from one intact model folder")


if __name__ == "__main__":
    import sys
    from tokenizers import Tokenizer
    tiny = Path(__file__).with_name("tiny")
    try:
        t5, tokenizer = load_t5(tiny), Tokenizer.from_file(str(tiny / "tokenizer.json"))
    except Exception as error:      # the tokenizers package raises nothing more precise
        print(f"error: {error}; python tiny/build.py makes {tiny}", file=sys.stderr)
        sys.exit(2)
    for text in ("I loved this film. It was <extra_id_0>.", "It is boring. It was <extra_id_0>."):
        ids = torch.tensor([tokenizer.encode(text).ids])                       # (1, S)
        mask = torch.ones_like(ids, dtype=torch.bool)
        target = torch.tensor([[PAD, tokenizer.token_to_id("<extra_id_0>")]])
        y = decode(t5, target, encode(t5, embed_tokens(t5, ids), mask), mask)  # (1, 2, d)
        p, best = torch.softmax(next_token_logits(t5, y)[0, 1], dim=-1).topk(5)
        print(text, *(f"{tokenizer.decode([i])} {value:.2f}" for value, i in zip(p, best.tolist())))


def model_fingerprint(folder):
    """sha256 of a model folder's config.json and weights: what a prompt or a store belongs to."""
    return fingerprint([Path(folder) / "config.json", *weight_files(folder)])
