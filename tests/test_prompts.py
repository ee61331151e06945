"""Tests of prompts."""

import contextlib
import copy
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import download as downloads
import eval as evaluation
import jobs
import prompts
import supmer
import t5 as T
import train
from eval import open_candidate
from common import InputError
from conftest import (SMALL, V11, Evil, affine_start, logits, peft, relative, released_files,
                      rows_of, save_model, small_config, small_t5, transformers, write_run)
from t5 import load_t5


def refused(path, d, says):
    """load_prompt refuses it in one line that names it."""
    with pytest.raises(InputError, match=says) as caught:
        prompts.load_prompt(path, d)
    assert path.name in str(caught.value) and "\n" not in str(caught.value)


def test_ours_are_read_and_others_refused(tmp_path):
    """theta, phi and the metadata come back, a prompt without psi too, also of an earlier version,
    which called that ""; another width, an unknown or lacking form, a phi of another form, NaN, too
    many vectors and damage are refused."""
    path, phi = tmp_path / "prompt.safetensors", affine_start(8)
    prompts.save_prompt(path, torch.ones(3, 8), phi, {"model": "m"})
    theta, read, about = prompts.load_prompt(tmp_path, 8)
    assert torch.equal(theta, torch.ones(3, 8)) and read.keys() == phi.keys()
    assert all(torch.equal(read[name], phi[name]) for name in phi)
    assert about == {"model": "m", "regularizer": "affine"}
    refused(path, 16, "not a prompt for a T5 of width 16 .it holds")
    ones = torch.ones(3, 8)
    for theta, form, says in ((ones, "affine", "it holds"), (ones, "other", "not one of"),
                              (ones * math.nan, "none", "finite"), (ones[0], "none", "holds"),
                              (torch.ones(10_001, 8), "none", "10,001 vectors")):
        save_file({"theta": theta}, path, {"regularizer": form})
        refused(path, 8, says)
    for form in ("none", ""):
        save_file({"theta": ones.half()}, path, {"regularizer": form})
        theta, phi, about = prompts.load_prompt(path, 8)
        assert theta.dtype == torch.float32 and phi is None and about["regularizer"] == "none"
    for metadata in ({}, {"regularizer": "none", "model": "m\nforged"}):
        save_file({"theta": ones}, path, metadata)
        refused(path, 8, "regularizer|line breaks")
    path.write_bytes(b"<html>404</html>")
    refused(path, 8, "is not a prompt's safetensors")


# ------------------------------------------------------------------- the authors' files

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
    assert torch.equal(read, theta) and about == {"model": name, "regularizer": "released"}
    assert read_phi.keys() == phi.keys() and all(torch.equal(read_phi[n], phi[n]) for n in phi)
    psi = supmer.REGULARIZERS["released"].psi(read_phi, theta / 1e6, theta.mean(0))
    assert psi.isfinite().all() and not torch.allclose(psi, theta / 1e6)


def test_the_authors_files_are_fetched_once(place, monkeypatch):
    """`eval.py --prompt released` fetches both and starts from their theta, through their psi; no
    other model's shape gets them."""
    theta, phi = released_files(place / "theirs", "t5base", 16)
    monkeypatch.setitem(downloads.RELEASED, (16, 32), "t5base")
    monkeypatch.setattr(downloads, "RELEASED_URL", (place / "theirs").as_uri() + "/")
    settings, _ = evaluation.parse([*SMALL, "--prompt-length", "100", "--prompt", "released"])
    for _ in range(2):
        prompt = open_candidate("released", small_config(), settings)
        assert torch.equal(prompt.starts[0](small_t5())["theta"], theta)
        g, pooled = theta.flip(0) / 1e4, theta[0]
        assert torch.equal(prompt.psi(g, pooled), prompts.regularize_released(phi, g, pooled))
        monkeypatch.setattr(downloads, "RELEASED_URL", "file:///nowhere/")    # they are there
    monkeypatch.delitem(downloads.RELEASED, (16, 32))
    with pytest.raises(InputError, match="for t5-base and flan-t5-xl only"):
        open_candidate("released", small_config(), settings)


def test_released_files_of_another_kind(tmp_path):
    """A T5 of another width, a file that is missing or cut, a pickle with code, another form, a
    tensor without data: refused, and nothing is executed."""
    released_files(tmp_path, "t5base", 768)
    prompt, edit = tmp_path / "prompt_t5base.pt", tmp_path / "gradient_edit_t5base.pt"
    refused(tmp_path, 512, "of widths 768 and 2048")
    refused(tmp_path, 2048, "prompt_flant5xl.pt is missing")
    whole = prompt.read_bytes()
    for content in (whole[:-100], b"<html>no</html>", pickle.dumps(Evil(tmp_path / "executed"))):
        prompt.write_bytes(content)
        with pytest.raises(InputError, match="prompt_t5base.pt is not a file of github.com"):
            prompts.load_prompt(tmp_path, 768)
    assert not (tmp_path / "executed").exists()
    for value in ({"a": 1}, torch.ones(100, 768, device="meta"), torch.eye(768).to_sparse()):
        torch.save(value, prompt)
        refused(tmp_path, 768, "is not a prompt for a T5 of width 768")
    prompt.write_bytes(whole)
    torch.save({"mlp.linear_1.weight": torch.zeros(2)}, edit)
    refused(tmp_path, 768, "is not a prompt for a T5 of width 768")


# ---------------------------------------------------------------------------------- PEFT

def test_export_for_peft_and_back(tmp_path, capsys):
    """train.py --export-peft RUN DIR writes the two files of PEFT's format, once; load_prompt reads
    them back, also where PEFT stored a second set for the decoder."""
    model = save_model(tmp_path / "model", V11)
    theta = write_run(tmp_path / "run", model, P=5, d=V11.d_model)
    out = tmp_path / "adapter"
    assert train.main(["--export-peft", str(tmp_path / "run"), str(out)]) == 0
    assert f"5 vectors for peft.PeftModel.from_pretrained on {model}" in capsys.readouterr().out
    with pytest.raises(InputError, match="exists: name another folder"):
        train.main(["--export-peft", str(tmp_path / "run"), str(out)])
    values = json.loads((out / "adapter_config.json").read_text())
    assert (values["num_virtual_tokens"], values["num_transformer_submodules"]) == (5, 1)
    read, phi, about = prompts.load_prompt(out, V11.d_model)
    assert torch.equal(read, theta) and phi is None and about["model"] == str(model)
    file = out / "adapter_model.safetensors"
    save_file({"prompt_embeddings": torch.cat([theta, -theta])}, file)
    assert torch.equal(prompts.load_prompt(out, V11.d_model)[0], theta)
    for tensors in ({"prompt_embeddings": theta, "x": theta + 0}, {"prompt_embeddings": theta[:4]}):
        save_file(tensors, file)
        refused(out, V11.d_model, "must hold 5 vectors")
    (out / "adapter_config.json").write_text(json.dumps(values | {"peft_type": "LORA"}))
    refused(out, V11.d_model, "it is LORA for SEQ_2_SEQ_LM, not PROMPT_TUNING")


def test_a_tuned_prompt_can_leave(place, capsys):
    """A file that eval.py tuned is a --prompt of another task, with the tuned vectors and without
    psi, and goes to PEFT and back; to the --model that PEFT names, and to no other."""
    evaluation.main([*SMALL, "--prompt", "vocab", "--seeds", "10", "--rates", "0.1"])
    tuned = rows_of("runs/eval/small-planted.json", kind="tuned")[0]["file"]
    theta, config = jobs.read_result(tuned)[0]["theta"], small_config()
    settings, _ = evaluation.parse([*SMALL, "--prompt", tuned])
    prompt = open_candidate(tuned, config, settings)
    assert torch.equal(prompt.starts[0](small_t5())["theta"], theta) and prompt.psi is None
    train.main(["--export-peft", tuned, "adapter"])
    assert f"adapter: {len(theta)} vectors" in capsys.readouterr().out
    prompt = open_candidate("adapter", config, settings)
    assert torch.equal(prompt.starts[0](small_t5())["theta"], theta)
    for name, says in (("t5-base", "was learned on another t5-base than small"), (None, None),
                       ("elsewhere/small/", None)):
        values = json.loads(Path("adapter/adapter_config.json").read_text())
        Path("adapter/adapter_config.json").write_text(
            json.dumps(values | {"base_model_name_or_path": name}))
        with pytest.raises(InputError, match=says) if says else contextlib.nullcontext():
            open_candidate("adapter", config, settings)
    evaluation.main([*SMALL, "--prompt", tuned, "--seeds", "20", "--out", "again.json"])
    assert rows_of("again.json", kind="tuned", split="test")


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
    theta = write_run(tmp_path / "run", tmp_path / "model", P=5, d=32)
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
