"""theta and phi on the disk: ours, the authors', Hugging Face PEFT's."""

import json
import shutil
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

import hub
from common import InputError, LONGEST, atomic_write, read_json
from estimate import model_shape
from hub import RELEASED
from supmer import REGULARIZERS, Regularizer


# ------------------------------------------------------ the authors' released regularizer

def init_released(P, d):
    """phi of the authors' released regularizer: names and shapes of their file, all 0."""
    r = min(1920, d)
    shapes = {"layers.0.u": (d, r), "layers.0.v": (r, d), "layers.0.bias": (d,),
              "layers.1.u": (d, r), "layers.1.v": (r, d), "layers.1.bias": (d,),
              "linear_1.weight": (24, d), "linear_1.bias": (24,),
              "linear_2.weight": (1, 24), "linear_2.bias": (1,)}
    return {f"mlp.{name}": torch.zeros(shape) for name, shape in shapes.items()}


def regularize_released(phi, g, pooled):
    """psi as released: (1 - z) h(g) + z g, ONE gate z for all, h of two factored ReLU layers.
    h's rows get the length of g's. There the mean state counted padding, too: with ours psi is approximate."""
    hidden = F.relu(phi["mlp.linear_1.weight"] @ pooled + phi["mlp.linear_1.bias"])          # (24,)
    z = torch.sigmoid(phi["mlp.linear_2.weight"] @ hidden + phi["mlp.linear_2.bias"])   # (1,)
    h = g
    for i in (0, 1):
        u, v, bias = (phi[f"mlp.layers.{i}.{name}"] for name in ("u", "v", "bias"))
        h = F.relu(h @ v.T @ u.T + bias)                                                # (P, d)
    of_g, of_h = (x.norm(dim=-1, keepdim=True) + 1e-8 for x in (g, h))                  # (P, 1)
    return (1 - z) * h / of_h * of_g + z * g


REGULARIZERS["released"] = Regularizer(init_released, regularize_released)


# --------------------------------------------------------------------- theta and phi on the disk

def save_prompt(path, theta, phi, metadata):
    """Write theta, phi if there is one and metadata {str: str} as safetensors, atomically."""
    tensors = {"theta": theta, **{f"phi.{name}": x for name, x in (phi or {}).items()}}
    payload = save({name: x.detach().cpu().contiguous() for name, x in tensors.items()},
                   {"regularizer": "affine" if phi else "none", **metadata})
    atomic_write(path, lambda file: file.write(payload))


def load_prompt(path, d):
    """Read a prompt for a T5 of width d -> theta (P, d), phi or None, metadata {str: str}.

    path: save_prompt's file or its run's folder; a folder of Hugging Face PEFT's; or a folder with
    the authors' released files. metadata["regularizer"]: one of REGULARIZERS.
    Raises InputError for anything else, another width, another form, values that are not finite.
    """
    path = Path(path)
    if (path / "adapter_config.json").is_file():
        theta, phi, metadata = _load_peft(path)
    elif any(path.glob("prompt_*.pt")):
        theta, phi, metadata = _load_released(path, d)
    else:
        path = path / "prompt.safetensors" if path.is_dir() else path
        phi, metadata = _read_safetensors(path)
        form = metadata.get("regularizer")
        metadata["regularizer"] = "none" if form == "" else form    # "": of an earlier version
        if metadata["regularizer"] not in REGULARIZERS:
            raise InputError(f"{path}: its regularizer is {form!r}, this code reads "
                             f"{', '.join(REGULARIZERS)}: give the prompt.safetensors of a run")
        theta = phi.pop("theta", torch.zeros(0))
        phi = {name.removeprefix("phi."): x for name, x in phi.items()} or None
    tensors = {"theta": theta, **(phi or {})}
    wanted = {"theta": theta.new_empty(*theta.shape[:1], d)}
    wanted |= REGULARIZERS[metadata["regularizer"]].init(len(theta) if theta.dim() else 0, d)
    found, wanted = ({name: list(x.shape) for name, x in one.items()} for one in (tensors, wanted))
    if found != wanted or not 0 < len(theta) <= LONGEST:
        raise InputError(f"{path} holds {found}: no prompt and regularizer for a T5 of width {d}; "
                         "give the prompt of a run on this model")
    if not all(x.is_floating_point() and x.float().isfinite().all() for x in tensors.values()):
        raise InputError(f"{path} has values that are not finite: its run went wrong, use another")
    tensors = {name: x.detach().float().contiguous() for name, x in tensors.items()}
    return tensors.pop("theta"), tensors or None, metadata


def _read_safetensors(path):
    """A file's tensors and metadata. InputError if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if not "".join(chain(*metadata.items())).isprintable():
                raise OSError("line breaks in its metadata")
            return {name: file.get_tensor(name) for name in file.keys()}, metadata
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read as a prompt ({error}): give a run, a prompt's "
                         "safetensors, or a folder of PEFT's") from None


def prompt_metadata(path):
    """What save_prompt was given as metadata, {str: str}; InputError if the file is none of it."""
    return _read_safetensors(path)[1]


def _load_released(folder, d):
    """The authors' prompt_*.pt and gradient_edit_*.pt for a T5 of width d -> as load_prompt."""
    name = next((name for (width, _), name in RELEASED.items() if width == d), None)
    if name is None:
        raise InputError(f"{folder} has prompts for t5-base and flan-t5-xl, of widths 768 and 2048,"
                         f" not {d}: take one of those models")
    read = []
    for path in (folder / f"{kind}_{name}.pt" for kind in ("prompt", "gradient_edit")):
        try:
            read.append(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:      # a damaged pickle raises almost anything
            reason = type(error).__name__ + ": " + str(error).partition("\n")[0]
            raise InputError(f"{path} cannot be read ({reason}): fetch it from "
                             "github.com/beepkh/SUPMER, folder pretrain_prompt") from None
    theta, phi = read
    if not isinstance(phi, dict) or not all(
            isinstance(x, torch.Tensor) and x.layout is torch.strided and x.device.type == "cpu"
            for x in (theta, *phi.values())):
        raise InputError(f"{folder} does not hold a tensor and a dict of tensors: fetch both again")
    for buffer in ("grad_mean", "grad_std", "grad_s", "k"):         # psi never uses them
        phi.pop(buffer, None)
    return theta, phi, {"model": name, "regularizer": "released"}


def _load_peft(folder):
    """A soft prompt as Hugging Face PEFT saves it -> as load_prompt. PEFT may keep the encoder's
    vectors and then the decoder's: the first ones are used, as there."""
    path, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    try:
        config = read_json(path)
        length = config["num_virtual_tokens"]
        kind = (config["peft_type"], config["task_type"], type(length))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error!r}): export it again") from None
    if kind != ("PROMPT_TUNING", "SEQ_2_SEQ_LM", int):
        raise InputError(f"{path} is of {kind[0]} for {kind[1]}: PROMPT_TUNING for SEQ_2_SEQ_LM is "
                         "what can be read, give such a one")
    tensors, _ = _read_safetensors(file)
    vectors = tensors.get("prompt_embeddings", torch.zeros(0))
    if len(tensors) != 1 or vectors.shape[:1] not in ((length,), (2 * length,)):
        raise InputError(f"{file} must hold {length} vectors as prompt_embeddings, it has "
                         f"{[*tensors]}: export it again")
    return vectors[:length], None, {"model": str(config.get("base_model_name_or_path")),
                                    "regularizer": "none"}


def save_peft(folder, theta, config, model, revision=None):
    """Write theta (P, d) as a new folder, whole or not at all, that peft.PeftModel.from_pretrained
    loads on a model, a hub id or folder, of this T5Config.
    psi has no place there: only tuning as here uses it."""
    values = {"peft_type": "PROMPT_TUNING", "task_type": "SEQ_2_SEQ_LM", "inference_mode": True,
              "base_model_name_or_path": model, "revision": revision,
              "num_virtual_tokens": len(theta), "token_dim": theta.shape[1],
              "num_transformer_submodules": 1,      # else PEFT expects the decoder's vectors, too
              "num_attention_heads": config.num_heads, "num_layers": config.num_layers,
              "prompt_tuning_init": "RANDOM"}
    payload = save({"prompt_embeddings": theta.float().cpu().contiguous()}, {"format": "pt"})
    new = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(new, ignore_errors=True)              # what a kill left
    try:
        new.mkdir(parents=True)
        for name, content in (("adapter_model.safetensors", payload),
                              ("adapter_config.json", json.dumps(values, indent=2).encode())):
            atomic_write(new / name, lambda file: file.write(content))
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def export_peft(source, folder):
    """Write the prompt of a run, or of a prompt's file, as a new folder for PEFT -> what to say."""
    if folder.exists():
        raise InputError(f"{folder} exists: name another folder")
    path = source / "prompt.safetensors" if source.is_dir() else source
    name = prompt_metadata(path).get("model", "")
    config = model_shape(name)
    theta, _, _ = load_prompt(path, config.d_model)
    base = {"model": str(hub.model_folder(name))} if hub.is_local(name) else \
        dict(zip(("model", "revision"), hub.hub_source(name).values()))
    save_peft(folder, theta, config, **base)
    return (f"{folder}: {len(theta)} vectors for peft.PeftModel.from_pretrained on {base['model']};"
            " psi is left out, PEFT's format has no place for it")
