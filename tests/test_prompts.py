"""Tests of prompts."""

import baselines
import copy
import eval as evaluation
import hub as hubs
import json
import math
import pickle
import prompts
import pytest
import supmer
import t5 as T
import torch
import torch.nn.functional as F
import train
from common import InputError
from pathlib import Path
from safetensors.torch import save_file
from t5 import load_t5
from conftest import (Evil, SMALL, V11, affine_start, logits, peft, relative, released_files, run_with_prompt,
    save_model, small_config, small_examples, small_t5, transformers, tune)


def test_prompt_files_of_others_are_refused(tmp_path):
    """load_prompt wants theta and phi of one width, finite, of a known form: each other file is
    named with what it holds.
    """
    path, phi = tmp_path / "prompt.safetensors", affine_start(8)
    prompts.save_prompt(path, torch.ones(3, 8), phi, {"model": "m"})
    theta, read, about = prompts.load_prompt(path, 8)
    assert (
        torch.equal(theta, torch.ones(3, 8))
        and torch.equal(read["A"], torch.eye(8))
        and about["model"] == "m"
    )
    with pytest.raises(InputError, match="for a T5 of width 16"):
        prompts.load_prompt(path, 16)
    save_file({"theta": torch.ones(3, 8)}, path)
    with pytest.raises(InputError, match="its regularizer is None"):
        prompts.load_prompt(path, 8)
    save_file({"theta": torch.ones(3, 8)}, path, {"regularizer": "affine"})
    with pytest.raises(InputError, match="no prompt and regularizer"):
        prompts.load_prompt(path, 8)
    prompts.save_prompt(path, torch.full((3, 8), torch.nan), phi, {})
    with pytest.raises(InputError, match="not finite"):
        prompts.load_prompt(path, 8)
    path.write_bytes(b"<html>404</html>")
    with pytest.raises(InputError, match="cannot be read as a prompt"):
        prompts.load_prompt(path, 8)


# --------------------------------------------------------- prompts of others: the authors', PEFT's

def test_released_regularizer_by_hand():
    """Width 2, rank 2: gate sigmoid(1 * relu(24 * (1 + 3) / 4) - 24) = 1/2; h is relu(relu(g)
    swapped - (0, 1)), rescaled to |g|; psi is their mean."""
    phi = prompts.init_released(3, 2)
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
    psi = prompts.regularize_released(phi, g, torch.tensor([1., 3.]))
    assert torch.allclose(psi, (g + h) / 2, rtol=1e-6)
    closed = phi | {"mlp.linear_2.bias": torch.tensor([100.])}
    assert torch.allclose(prompts.regularize_released(closed, g, torch.tensor([1., 3.])), g)


@pytest.mark.parametrize("name, d", [("t5base", 768), ("flant5xl", 2048)])
def test_released_prompts_are_read(name, d, tmp_path):
    """Both sizes of the authors' files, buffers ignored by name; psi is finite."""
    theta, phi = released_files(tmp_path, name, d)
    read, read_phi, about = prompts.load_prompt(tmp_path, d)
    assert torch.equal(read, theta) and about["regularizer"] == "released"
    assert read_phi.keys() == phi.keys() and all(torch.equal(read_phi[n], phi[n]) for n in phi)
    psi = supmer.REGULARIZERS["released"].psi(read_phi, theta / 1e6, theta.mean(0))
    assert psi.isfinite().all() and not torch.allclose(psi, theta / 1e6)


def test_tuning_with_the_authors_files(place, monkeypatch):
    """`eval.py --prompt released` fetches both files, once, and tunes as with a folder that has
    them: from their theta, through their form of psi, which no other model's shape gets."""
    theta, phi = released_files(place / "theirs", "t5base", 16)
    monkeypatch.setitem(hubs.RELEASED, (16, 32), "t5base")
    monkeypatch.setattr(hubs, "RELEASED_URL", (place / "theirs").as_uri() + "/")
    evaluation.main([*SMALL, "--prompt-length", "100", "--prompt", "released", "theirs"])
    assert {path.name for path in (place / "cache/released").glob("[!.]*")} == {
        path.name for path in (place / "theirs").iterdir()}
    tuning = json.loads(Path("runs/eval/small-planted.json").read_text())["results"][0]["tuning"]
    curves = {name: [record["validations"] for record in tuning[name]] for name in tuning}
    assert curves["released"] == curves["theirs"]
    monkeypatch.setattr(hubs, "RELEASED_URL", "file:///nowhere/")       # they are there already
    settings, _ = evaluation.parse([*SMALL, "--prompt-length", "100", "--prompt", "released"])
    prompt = evaluation.open_candidate("released", small_config(), settings)
    g, H = theta.flip(0) / 1e4, theta[0]
    assert torch.equal(prompt.starts[0](small_t5())["theta"], theta)
    assert torch.equal(prompt.psi(g, H), prompts.regularize_released(phi, g, H))
    with_psi, without = (tune(small_t5(), theta, psi, (small_examples(8),) * 2, 10, 0.3,
                                         settings)[0] for psi in (prompt.psi, None))
    assert with_psi[-1]["loss"] != pytest.approx(without[-1]["loss"], rel=1e-4)
    monkeypatch.delitem(hubs.RELEASED, (16, 32))
    with pytest.raises(InputError, match="for t5-base and flan-t5-xl only"):
        evaluation.open_candidate("released", small_config(), settings)


def test_damaged_released_prompts(tmp_path):
    """A T5 of another width, a file that is missing, cut, a web page, of something else, of another
    form or a pickle with code: refused by name, and nothing is executed."""
    released_files(tmp_path, "t5base", 768)
    prompt, edit = tmp_path / "prompt_t5base.pt", tmp_path / "gradient_edit_t5base.pt"
    with pytest.raises(InputError, match="for t5-base and flan-t5-xl, of widths 768 and 2048, not"):
        prompts.load_prompt(tmp_path, 512)
    with pytest.raises(InputError, match="prompt_flant5xl.pt cannot be read.*pretrain_prompt"):
        prompts.load_prompt(tmp_path, 2048)
    whole = prompt.read_bytes()
    evil = pickle.dumps(Evil(tmp_path / "executed"))
    for content in (whole[:-100], whole[:3], b"", b"<html>no</html>", evil):
        prompt.write_bytes(content)
        with pytest.raises(InputError, match="prompt_t5base.pt cannot be read") as caught:
            prompts.load_prompt(tmp_path, 768)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()
    torch.save({"a": 1}, prompt)
    with pytest.raises(InputError, match="does not hold a tensor and a dict of tensors"):
        prompts.load_prompt(tmp_path, 768)
    prompt.write_bytes(whole)
    phi = torch.load(edit, weights_only=True)
    for changed in ({n: x for n, x in phi.items() if "linear_1" not in n},
                    phi | {"mlp.linear_2.bias": torch.zeros(2)}, phi | {"extra": torch.zeros(2)}):
        torch.save(changed, edit)
        with pytest.raises(InputError, match="no prompt and regularizer for a T5 of width 768"):
            prompts.load_prompt(tmp_path, 768)


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
    read, phi, about = prompts.load_prompt(out, V11.d_model)
    assert torch.equal(read, theta) and phi is None and about["model"] == str(model)
    file = out / "adapter_model.safetensors"
    save_file({"prompt_embeddings": torch.cat([theta, -theta])}, file)
    assert torch.equal(prompts.load_prompt(out, V11.d_model)[0], theta)
    for changed, says in (({"x": theta}, "must hold 5 vectors"), ({}, "must hold 5 vectors"),
                          ({"prompt_embeddings": theta[:4]}, "must hold 5 vectors"),
                          ({"prompt_embeddings": theta * math.nan}, "not finite"),
                          ({"prompt_embeddings": theta.repeat(1, 2)}, "no prompt and regularizer")):
        save_file(changed, file)
        with pytest.raises(InputError, match=says):
            prompts.load_prompt(out, V11.d_model)
    file.unlink()
    with pytest.raises(InputError, match="adapter_model.safetensors cannot be read"):
        prompts.load_prompt(out, V11.d_model)
    for key, value in (("peft_type", "LORA"), ("task_type", "CAUSAL_LM"),
                       ("num_virtual_tokens", "5")):
        (out / "adapter_config.json").write_text(json.dumps(values | {key: value}))
        with pytest.raises(InputError, match="PROMPT_TUNING for SEQ_2_SEQ_LM is what can be read"):
            prompts.load_prompt(out, V11.d_model)
    for text in ("{", "[]", "{}", "7"):
        (out / "adapter_config.json").write_text(text)
        with pytest.raises(InputError, match="adapter_config.json cannot be read"):
            prompts.load_prompt(out, V11.d_model)
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
    prompts.export_peft(tmp_path / "run", tmp_path / "adapter")
    adapter = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    peft.get_peft_model(copy.deepcopy(theirs), adapter).save_pretrained(tmp_path / "of peft")
    read, _, _ = prompts.load_prompt(tmp_path / "of peft", 32)
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
