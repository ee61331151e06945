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

import eval as evaluation
import jobs
import prompts
import released
import supmer
import t5 as T
import train
from candidates import open_candidate
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
    which called that ""; another width, an unknown or lacking form, a phi of another form, NaN and
    too many vectors are refused."""
    path, phi, ones = tmp_path / "prompt.safetensors", affine_start(8), torch.ones(3, 8)
    prompts.save_prompt(path, ones, phi, {"model": "m"})
    theta, read, about = prompts.load_prompt(tmp_path, 8)
    assert torch.equal(theta, ones) and read.keys() == phi.keys()
    assert all(torch.equal(read[name], phi[name]) for name in phi)
    assert about == {"model": "m", "regularizer": "affine"}
    refused(path, 16, "not a prompt for a T5 of width 16 .it holds")
    none = {"regularizer": "none"}
    for theta, metadata, says in (
            (ones, {"regularizer": "affine"}, "it holds"), (ones, {"regularizer": "x"}, "not one"),
            (ones, {}, "regularizer"), (ones, none | {"model": "m\nforged"}, "line breaks"),
            (ones * math.nan, none, "finite"), (ones[0], none, "holds"),
            (torch.ones(10_001, 8), none, "10,001 vectors")):
        save_file({"theta": theta}, path, metadata)
        refused(path, 8, says)
    for form in ("none", ""):
        save_file({"theta": ones.half()}, path, {"regularizer": form})
        theta, phi, about = prompts.load_prompt(path, 8)
        assert theta.dtype == torch.float32 and phi is None and about["regularizer"] == "none"


# ------------------------------------------------------------------- the authors' files

def test_released_regularizer_by_hand():
    """Width 2, rank 2: gate sigmoid(1 * relu(24 * (1 + 3) / 4) - 24) = 1/2; h is relu(relu(g)
    swapped - (0, 1)), rescaled to |g|; psi is their mean."""
    phi = released.init_released(3, 2)
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
    psi = released.regularize_released(phi, g, torch.tensor([1., 3.]))
    assert torch.allclose(psi, (g + h) / 2, rtol=1e-6)
    closed = phi | {"mlp.linear_2.bias": torch.tensor([100.])}
    assert torch.allclose(released.regularize_released(closed, g, torch.tensor([1., 3.])), g)


def test_released_prompts_are_read(tmp_path):
    """Both sizes of the authors' files, buffers ignored by name. A T5 of another width, a file that
    is missing or cut, a pickle with code, another form, a tensor without data are refused, and
    nothing is executed."""
    for name, d in (("t5base", 768), ("flant5xl", 2048)):
        theta, phi = released_files(tmp_path / name, name, d)
        read, read_phi, about = prompts.load_prompt(tmp_path / name, d)
        assert torch.equal(read, theta) and about == {"model": name, "regularizer": "released"}
        assert read_phi.keys() == phi.keys()
        assert all(torch.equal(x, read_phi[name]) for name, x in phi.items())
        psi = supmer.REGULARIZERS["released"].psi(read_phi, theta / 1e6, theta.mean(0))
        assert psi.isfinite().all() and not torch.allclose(psi, theta / 1e6)
    folder = tmp_path / "t5base"
    prompt, edit = folder / "prompt_t5base.pt", folder / "gradient_edit_t5base.pt"
    refused(folder, 512, "of widths 768 and 2048")
    refused(folder, 2048, "prompt_flant5xl.pt is missing")
    whole = prompt.read_bytes()
    for content in (whole[:-100], pickle.dumps(Evil(tmp_path / "executed"))):
        prompt.write_bytes(content)
        with pytest.raises(InputError, match="prompt_t5base.pt is not a file of github.com"):
            prompts.load_prompt(folder, 768)
    assert not (tmp_path / "executed").exists()
    for value in ({"a": 1}, torch.ones(100, 768, device="meta"), torch.eye(768).to_sparse()):
        torch.save(value, prompt)
        refused(folder, 768, "is not a prompt for a T5 of width 768")
    prompt.write_bytes(whole)
    torch.save({"mlp.linear_1.weight": torch.zeros(2)}, edit)
    refused(folder, 768, "is not a prompt for a T5 of width 768")


def test_the_authors_files_are_fetched_once(place, monkeypatch):
    """`eval.py --prompt released` fetches both and starts from their theta, through their psi; no
    other model's shape gets them."""
    theta, phi = released_files(place / "theirs", "t5base", 16)
    monkeypatch.setitem(released.RELEASED, (16, 32), "t5base")
    monkeypatch.setattr(released, "RELEASED_URL", (place / "theirs").as_uri() + "/")
    settings, _ = evaluation.parse([*SMALL, "--prompt-length", "100", "--prompt", "released"])
    for _ in range(2):
        prompt = open_candidate("released", small_config(), settings)
        assert torch.equal(prompt.starts[0](small_t5())["theta"], theta)
        g, pooled = theta.flip(0) / 1e4, theta[0]
        assert torch.equal(prompt.psi(g, pooled), released.regularize_released(phi, g, pooled))
        monkeypatch.setattr(released, "RELEASED_URL", "file:///nowhere/")    # they are there
    monkeypatch.delitem(released.RELEASED, (16, 32))
    with pytest.raises(InputError, match="for t5-base and flan-t5-xl only"):
        open_candidate("released", small_config(), settings)


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
    file = out / "adapter_model.safetensors"
    for _ in range(2):
        read, phi, about = prompts.load_prompt(out, V11.d_model)
        assert torch.equal(read, theta) and phi is None and about["model"] == str(model)
        save_file({"prompt_embeddings": torch.cat([theta, -theta])}, file)
    for tensors in ({"prompt_embeddings": theta, "x": theta + 0}, {"prompt_embeddings": theta[:4]}):
        save_file(tensors, file)
        refused(out, V11.d_model, "must hold 5 vectors")
    (out / "adapter_config.json").write_text(json.dumps(values | {"peft_type": "LORA"}))
    refused(out, V11.d_model, "it is LORA for SEQ_2_SEQ_LM, not PROMPT_TUNING")


def test_a_tuned_prompt_can_leave(place):
    """A file that eval.py tuned is a --prompt of another task, with the tuned vectors and without
    psi, and goes to PEFT and back; to the --model that PEFT names, and to no other."""
    evaluation.main([*SMALL, "--prompt", "vocab", "--seeds", "10", "--rates", "0.1"])
    tuned = rows_of("runs/eval/small-planted.json", kind="tuned")[0]["file"]
    theta = jobs.read_result(tuned)[0]["theta"]
    settings, _ = evaluation.parse([*SMALL, "--prompt", tuned])
    train.main(["--export-peft", tuned, "adapter"])
    for name in (tuned, "adapter"):
        prompt = open_candidate(name, small_config(), settings)
        assert torch.equal(prompt.starts[0](small_t5())["theta"], theta) and prompt.psi is None
    values = json.loads(Path("adapter/adapter_config.json").read_text())
    for name, says in (("t5-base", "was learned on t5-base with other weights"), (None, None),
                       ("elsewhere/small/", None)):
        values["base_model_name_or_path"] = name
        Path("adapter/adapter_config.json").write_text(json.dumps(values))
        with pytest.raises(InputError, match=says) if says else contextlib.nullcontext():
            open_candidate("adapter", small_config(), settings)


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
