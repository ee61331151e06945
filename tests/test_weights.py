"""The loader of t5.py: it reads what the hub's T5s are made of, and refuses what is not the model.
"""

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
    """load_t5 raises InputError in one line that holds the fragments; the line is returned."""
    with pytest.raises(InputError) as caught:
        T.load_t5(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    for fragment in fragments:
        assert fragment in message, (fragment, message)
    return message


@BOTH
def test_round_trip(config, tmp_path):
    """One file, or two shards and an index, load as they were saved, in each dtype. A file in
    float16 is widened; transformers 5 saves v1.1 with tie_word_embeddings true and
    scale_decoder_outputs false: the head in the file counts."""
    save_model(tmp_path / "whole", config)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert equal(T.load_t5(tmp_path / "whole", dtype), config, dtype)
    assert equal(T.load_t5(save_shards(tmp_path / "shards", config)), config)
    halves = {name: weight.half() for name, weight in formula(config).items()}
    widened = T.load_t5(save_model(tmp_path / "halves", config, halves)).weights
    assert all(torch.equal(widened[name], half.float()) for name, half in halves.items())
    if config == V11:
        save_model(tmp_path, V11, tie_word_embeddings=True, scale_decoder_outputs=False)
        assert equal(T.load_t5(tmp_path), V11)


def test_loading_needs_the_model_and_one_file(tmp_path):
    """bfloat16 shards read as float32: the peak of a fresh process grows by the float32 model and
    at most one shard (and 10 MB), not by the largest tensor, of 31 MB in float32."""
    config = V11._replace(d_model=512, d_kv=64, d_ff=1024, num_heads=8, vocab_size=16000)
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
    """The embedding may have any of its names, or all, the head's only if tied; v1.0's files hold
    a bias that no T5 reads. The model is the same. Copies that differ in one number are refused."""
    weights = formula(config) | {T.STRAY: torch.ones(8, 2)}
    table = weights.pop(SHARED)
    weights |= {name: table.clone() for name in names}
    assert equal(T.load_t5(save_model(tmp_path, config, weights)), config)
    if len(names) > 1:
        weights[names[-1]][4, 4] += 1e-3
        refused(save_model(tmp_path, config, weights), "copies of shared.weight differ", "intact")


@BOTH
def test_every_tensor_is_needed_as_it_is(config, tmp_path):
    """Without any one tensor, with one row less of it, with a NaN or an infinity in it, and with
    a tensor that the config does not imply, the model is refused and the tensor named."""
    weights = formula(config)

    def faulty(changed, *fragments):
        save_model(tmp_path, config, {n: w for n, w in {**weights, **changed}.items()
                                      if w is not None})
        refused(tmp_path, *fragments)
    for i, (name, weight) in enumerate(weights.items()):
        faulty({name: None}, f"{name} is missing, not {tuple(weight.shape)}")
        if i % 2:
            faulty({name: weight[1:].clone()}, f"not {tuple(weight.shape)}", "intact model")
        else:
            wrong = weight.clone()
            wrong.view(-1)[-1] = (math.nan, math.inf, -math.inf)[i % 3]
            faulty({name: wrong}, name, "holds torch.float64 that are not finite")
    for name in ("extra.weight", "encoder.block.2.layer.0.layer_norm.weight", "lm_head.bias"):
        faulty({name: torch.ones(6)}, f"{name} is (6,), not absent", "1 fault")
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    faulty({name: (127 * weights[name]).to(torch.int8)}, f"{name} holds torch.int8")


@needs_transformers
def test_what_is_saved_in_another_way_can_be_mended(tmp_path):
    """The refusal's line of Python makes the folder a model: of a pytorch_model.bin, of names with
    a prefix beside a classifier's, of an encoder alone, with the decoder of a whole T5."""
    weights = model(V11, torch.float32).weights
    save_model(tmp_path / "base", V11)
    for name, stored, prefix in (
            ("bin", None, ""),
            ("prefix", {f"model.{name}": weight for name, weight in weights.items()} | {
                "head": torch.ones(2)}, "model."),
            ("encoder", {name: w for name, w in weights.items()
                         if name.startswith(("encoder", "shared"))}, "")):
        folder = save_model(tmp_path / name, V11, stored)
        if stored is None:
            (folder / T.SINGLE).unlink()
            torch.save(weights, folder / "pytorch_model.bin")
        with pytest.raises(InputError) as refusal:
            T.load_t5(folder)
        line, = re.findall('python -c "(.*)"', str(refusal.value))
        exec(line.replace("BASE", str(tmp_path / "base")).replace("PREFIX", prefix))
        assert equal(T.load_t5(folder), V11)


def test_missing_files_are_named(tmp_path):
    """The config, a shard, all weights; test_damage.py tries what is damaged."""
    refused(tmp_path, "config.json is missing")
    folder = save_shards(tmp_path / "m", V11)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.unlink()
    refused(folder, f"{shard} is missing")
    (folder / T.INDEX).unlink()
    refused(folder, "has no model.safetensors, and no other weights are read")


def test_configs(tmp_path):
    """A first-release config names neither decoder layers, positions, feed-forward nor head: those
    of t5-small hold. Another model, and sizes that no T5 has, are refused by key and value."""
    old = V10._replace(num_buckets=32, max_distance=128)
    save_model(tmp_path, old, **dict.fromkeys([
        "num_decoder_layers", "feed_forward_proj", "model_type", "tie_word_embeddings",
        "layer_norm_epsilon", "relative_attention_num_buckets", "relative_attention_max_distance"]))
    assert T.load_t5(tmp_path).config == old
    buckets, distance = "relative_attention_num_buckets", "relative_attention_max_distance"
    for words, changes in {
            "its model_type is mt5": {"model_type": "mt5"},
            "feed_forward_proj gated-silu": {"feed_forward_proj": "gated-silu"},
            "'d_kv'": {"d_kv": None}, "d_model is 0": {"d_model": 0},
            "d_model is True": {"d_model": True}, "d_ff is '6'": {"d_ff": "6"},
            "num_heads is 1048576": {"num_heads": 2 ** 20}, "eps is nan": {
                "layer_norm_epsilon": math.nan}, "tied is 'no'": {"tie_word_embeddings": "no"},
            "2 buckets": {buckets: 2}, "for 16 positions": {buckets: 32, distance: 16}}.items():
        refused(save_model(tmp_path, V10, **changes), "config.json of a T5", words, "take the")
