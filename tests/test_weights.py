"""t5.py's loader reads what the hub's T5s are made of, and refuses what is not the model."""

import json
import math
import re

import pytest
import torch
from safetensors.torch import save_file

import t5 as T
from common import InputError
from conftest import (BOTH, V10, V11, formula, model, needs_transformers, peak_of, save_model,
                      save_shards)

SHARED, HEAD = "shared.weight", "lm_head.weight"
ENCODERS, DECODERS = "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"


def equal(loaded, config, dtype=torch.float32):
    """Whether a T5 is the formula's, in its config and in every bit of its weights."""
    expected = model(config, dtype).weights
    return loaded.config == config and loaded.weights.keys() == expected.keys() and all(
        torch.equal(weight, expected[name]) for name, weight in loaded.weights.items())


def refused(folder, *fragments):
    """load_t5 raises InputError in one line that names the folder and holds the fragments."""
    with pytest.raises(InputError) as caught:
        T.load_t5(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    assert all(fragment in message for fragment in fragments), (fragments, message)


@BOTH
def test_round_trip(config, tmp_path):
    """One file, or two shards and an index, load as they were saved; float16 is widened."""
    save_model(tmp_path / "whole", config)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert equal(T.load_t5(tmp_path / "whole", dtype), config, dtype)
    assert equal(T.load_t5(save_shards(tmp_path / "shards", config)), config)
    halves = {name: weight.half() for name, weight in formula(config).items()}
    widened = T.load_t5(save_model(tmp_path / "halves", config, halves)).weights
    assert all(torch.equal(widened[name], half.float()) for name, half in halves.items())
    if config == V11:                           # as transformers 5 saves it: the head counts
        save_model(tmp_path, V11, tie_word_embeddings=True, scale_decoder_outputs=False)
        assert equal(T.load_t5(tmp_path), V11)


def test_loading_needs_the_model_and_one_file(tmp_path):
    """Reading bfloat16 shards as float32 takes the model and at most one shard (and 10 MB)."""
    config = V11._replace(d_model=512, d_kv=64, d_ff=1024, num_heads=8, vocab_size=16000)   # 31 MB
    weights = {name: torch.ones(shape, dtype=torch.bfloat16)
               for name, shape in T.expected_shapes(config).items()}
    save_model(tmp_path, config, {})
    (tmp_path / T.SINGLE).unlink()
    names = sorted(weights, key=lambda name: weights[name].numel())
    files = {name: f"{i % 8}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in names if files[name] == file}, tmp_path / file)
    (tmp_path / T.INDEX).write_text(json.dumps({"weight_map": files}))
    grown = peak_of("import t5", f"t5.load_t5({str(tmp_path)!r})")
    whole = sum(w.numel() for w in weights.values()) * 4 / 2 ** 20
    shard = max(path.stat().st_size for path in tmp_path.glob("*.safetensors")) / 2 ** 20
    assert 0.9 * whole < grown < whole + shard + 10, (grown, whole, shard)


@pytest.mark.parametrize("config, names", [
    (V10, [ENCODERS]), (V10, [HEAD]), (V10, [SHARED, ENCODERS, DECODERS, HEAD]),
    (V11, [DECODERS]), (V11, [SHARED, ENCODERS, DECODERS])])
def test_the_embedding_has_many_names(config, names, tmp_path):
    """Under any of its names, or all of them, it is the same model; copies must be equal."""
    weights = formula(config) | {T.STRAY: torch.ones(8, 2)}
    table = weights.pop(SHARED)
    weights |= {name: table.clone() for name in names}
    assert equal(T.load_t5(save_model(tmp_path, config, weights)), config)
    if len(names) > 1:
        weights[names[-1]][4, 4] += 1e-3
        refused(save_model(tmp_path, config, weights), "copies of shared.weight differ", "intact")


@BOTH
def test_every_tensor_is_needed_as_it_is(config, tmp_path):
    """A tensor that is missing, too small, not finite, of integers or one too many is named."""
    weights, faults = formula(config), []
    for i, (name, weight) in enumerate(weights.items()):
        wrong = weight.clone()
        wrong.view(-1)[-1] = (math.nan, math.inf, -math.inf)[i % 3]
        faults += [(name, None, f"missing, not {tuple(weight.shape)}"),
                   (name, weight[1:].clone(), f"not {tuple(weight.shape)}"),
                   (name, wrong, "float64 that are not finite")]
    faults += [(name, torch.ones(6), "(6,), not absent") for name in (
        "extra.weight", "encoder.block.2.layer.0.layer_norm.weight", "lm_head.bias")]
    faults.append((SHARED, (127 * weights[SHARED]).to(torch.int8), "torch.int8"))
    for name, tensor, says in faults:
        changed = {n: w for n, w in {**weights, name: tensor}.items() if w is not None}
        refused(save_model(tmp_path, config, changed), name, says, "intact model")


@needs_transformers
def test_what_is_saved_in_another_way_can_be_mended(tmp_path):
    """The refusal's line of Python makes a model of a .bin, prefixed names, an encoder alone."""
    weights = model(V11, torch.float32).weights
    save_model(tmp_path / "base", V11)
    prefixed = {f"model.{name}": weight for name, weight in weights.items()}
    encoder = {n: w for n, w in weights.items() if n.startswith(("encoder", "shared"))}
    for name, stored, prefix in (("bin", None, ""), ("encoder", encoder, ""),
                                 ("prefix", prefixed | {"head": torch.ones(2)}, "model.")):
        folder = save_model(tmp_path / name, V11, stored)
        if stored is None:
            (folder / T.SINGLE).unlink()
            torch.save(weights, folder / "pytorch_model.bin")
        with pytest.raises(InputError) as refusal:
            T.load_t5(folder)
        line, = re.findall('python -c "(.*)"', str(refusal.value))
        exec(line.replace("BASE", str(tmp_path / "base")).replace("PREFIX", prefix))
        assert equal(T.load_t5(folder), V11)


def test_configs(tmp_path):
    """What a first-release config omits is t5-small's; another model and sizes are refused."""
    buckets, distance, tie = ("relative_attention_num_buckets", "relative_attention_max_distance",
                              "tie_word_embeddings")
    old, eps = V10._replace(num_buckets=32, max_distance=128), "layer_norm_epsilon"
    save_model(tmp_path, old, **dict.fromkeys(
        ["num_decoder_layers", "feed_forward_proj", "model_type", tie, eps, buckets, distance]))
    assert T.load_t5(tmp_path).config == old
    for says, changes in (
            ("its model_type is mt5", {"model_type": "mt5"}), ("'d_kv'", {"d_kv": None}),
            ("feed_forward_proj gated-silu", {"feed_forward_proj": "gated-silu"}),
            ("d_model is 0", {"d_model": 0}), ("d_model is True", {"d_model": True}),
            ("d_ff is '6'", {"d_ff": "6"}), ("num_heads is 1048576", {"num_heads": 2 ** 20}),
            ("eps is nan", {eps: math.nan}), ("tied is 'no'", {tie: "no"}),
            ("2 buckets", {buckets: 2}), ("16 positions", {buckets: 32, distance: 16})):
        refused(save_model(tmp_path, V10, **changes), "config.json of a T5", says, "take the")
