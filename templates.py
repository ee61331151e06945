"""Templates: how texts and label words become the token ids that T5 reads.

    parts = compile_template(tokenizer, "{text} It was <X> .")
    ids, slots = fill_template(parts, {"text": tokenize(tokenizer, ["A fine film."])[0]})

A source is put together from token ids, never by tokenizing a joined string: no text can merge with
the mask.
"""

import re
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer

from common import InputError, reading
from t5 import EOS, PAD

MASK = "<extra_id_0>"       # <X> of the templates
UNK = 2                     # <unk>; it also holds the place of a vector
MAX_TOKENS = 412            # of text: with 100 prompt vectors they make T5's 512 (Table 6)


def load_tokenizer(path, config):
    """A tokenizer.json, or that of a model folder. Raises InputError if its vocabulary is not that
    of the T5Config."""
    path = Path(path, "tokenizer.json") if Path(path).is_dir() else Path(path)
    with reading(path, "the tokenizer of this T5", "take the tokenizer.json and the weights of one "
                 "model", damage=BaseException):         # the tokenizers package may panic
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        tokenizer.encode("\ue000")          # fails without <unk>
        vocabulary, rows = tokenizer.get_vocab(), config.vocab_size
        pieces = max(vocabulary.values()) + 1
        special = [vocabulary.get(piece) for piece in ("<pad>", "</s>", "<unk>", MASK)]
        # T5 pads its rows to a multiple of 128, and a store keeps ids in 16 bits.
        if not pieces <= rows < min(pieces + 128, 2 ** 16):
            raise ValueError(f"{pieces:,} pieces for {rows:,} embeddings")
        if special[:3] != [PAD, EOS, UNK] or special[3] is None:
            raise ValueError(f"<pad>, </s>, <unk>, {MASK} are {special}")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenize(tokenizer, texts):
    """Texts -> token ids, no </s>. Markers written in a text (`</s>`, `<extra_id_0>`) are left out.
    ["That is good."] -> [[466, 19, 207, 5]] at T5"""
    added = tokenizer.get_added_tokens_decoder()
    markers = {id for id, token in added.items() if token.special} - {UNK}
    encoded = (e.ids for e in tokenizer.encode_batch(list(texts), add_special_tokens=False))
    return [ids if markers.isdisjoint(ids) else [id for id in ids if id not in markers]
            for ids in encoded]


def decoder_targets(tokenizer, words):
    """K label words -> what the decoder is asked for (Eq. 1); pieces are word-initial.
    ["yes"] -> [[32099, 4273]], <extra_id_0> and a piece, at T5. Raises InputError for <unk>, and
    for a word that begins another, which could never win: its pieces are a part of the other's."""
    pieces = tokenize(tokenizer, words)
    for word, ids in zip(words, pieces):
        if not ids or UNK in ids:
            raise InputError(f"label word {word!r} is not in the model's vocabulary: choose "
                             "another")
    for (short, word), (long, other) in pairwise(sorted(zip(pieces, words))):
        if long[:len(short)] == short:
            raise InputError(f"label word {other!r} begins with, or equals, the pieces of {word!r} "
                             "and can never be likelier: choose another")
    return [[tokenizer.token_to_id(MASK), *ids] for ids in pieces]


def template_fields(template):
    """The names of a template's texts. "{a} and {b}? <X> {a}" -> ("a", "b")"""
    return tuple(dict.fromkeys(re.findall(r"\{([^{}]*)\}", template)))


def compile_template(tokenizer, template):
    """A template as parts: token ids of its literal text, names of its fields. Raises InputError
    unless it has one <X>. "{text} It was <X> ?" -> ["text", [94, 47], [32099], [3, 58]] at T5"""
    if template.count("<X>") != 1:
        raise InputError(f"the template {template!r} must hold the mask <X> exactly once")
    parts = []
    for part in re.split(r"(\{[^{}]*\}|<X>)", template):
        if part == "<X>":
            parts.append([tokenizer.token_to_id(MASK)])
        elif template_fields(part):
            parts += template_fields(part)
        elif part.strip():
            parts += tokenize(tokenizer, [part])
    return parts


def fill_template(parts, fields, max_tokens=MAX_TOKENS):
    """Put texts into a compiled template -> (ids, slots).

    fields: name -> token ids, or None where a vector is to stand (its position goes to slots). If
    the source is too long, the longest texts are cut to one length; template and mask never are.
    ["a", [5], "b"], {"a": [7, 8, 9], "b": [4]}, max_tokens 5 -> [7, 8, 5, 4, 1], []
    """
    lengths = [len(fields[p]) for p in parts if isinstance(p, str) and fields[p] is not None]
    fixed = sum(1 if isinstance(p, str) else len(p) for p in parts) - len(lengths) + 1    # and </s>
    if max_tokens - fixed < len(lengths):
        raise InputError(f"a template of {fixed} tokens leaves no room in {max_tokens}: "
                         "shorten it, or allow more tokens")
    cap = max(lengths, default=0)
    while sum(min(n, cap) for n in lengths) > max_tokens - fixed:
        cap -= 1
    ids, slots = [], []
    for part in parts:
        if isinstance(part, str) and fields[part] is None:
            slots.append(len(ids))
            ids.append(UNK)
        else:
            ids += fields[part][:cap] if isinstance(part, str) else part
    return ids + [EOS], slots


def examples_as_text(tokenizer, examples, row, clusters=()):
    """One example, to be read: (source, target). A vector is the centroid of one of the clusters.

    ("It rained. <extra_id_0> . We left.</s>", "yes") or ("It rained. ? A. [centroid 3] B. ..", "C")
    """
    ids, vector = list(examples.ids[row]), "<extra_id_1>"           # something that decode keeps
    for slot in examples.slots[row]:
        ids[slot] = tokenizer.token_to_id(vector)
    text = tokenizer.decode(ids, skip_special_tokens=False).replace(MASK, f" {MASK} ")
    for cluster in clusters:
        text = text.replace(vector, f" [centroid {cluster}] ", 1)
    target = tokenizer.decode(examples.words[int(examples.labels[row])][1:])
    return " ".join(text.split()).replace(" </s>", "</s>"), target
