"""Tests of weights."""

import common
import json
import math
import os
import pytest
import t5 as T
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from t5 import load_t5
from conftest import (BOTH, V10, V11, formula, model, needs_data, peak_of, refused, save_model, save_shards)


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
    with pytest.raises(common.InputError, match="float16.*choose float32 or bfloat16"):
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
