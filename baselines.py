"""Every method that SUPMER is compared with (appendix B, C), on the same T5, data and protocol.

    python baselines.py     # tunable parameters of each method on t5-base

What they learn from a downstream task's few examples:
    prompt          P vectors in front of the text, all else frozen     Lester et al. 2021
    prefix-tuning   keys and values in every layer, made by an MLP      Li & Liang 2021
    p-tuning-v2     keys and values in every layer, directly            Liu et al. 2022
    ft              every weight of T5                                  (full fine-tuning)
    zero-shot, few-shot    nothing: instructions, demonstrations in the input
Where the prompt starts, if not at random: how it is meta-trained or pre-trained on other data,
    ppt, unified-ppt       by the plain loss on the same meta tasks     Gu et al. 2022
    metapt                 by MAML on labeled sentiment data            Huang et al. 2022
    supmer without a part of it: the ablations of Table 4
each a set of train.py's numbers and, for the first two, another step than supmer.meta_step.

Letters: P prompt or prefix tokens, d model width, h heads, k d_kv, m the MLP's width.
"""

import math
import string
from bisect import bisect_right
from functools import partial
from itertools import accumulate, chain, zip_longest
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from common import SOLO
from data import MASK, WORDS, compile_template, fill_template, template_fields, tokenize
from tasks import task_examples
from supmer import (first_derivative, init_prompt, loss_share, micro_batches, prompt_gradient,
    share_tasks)
from common import InputError
from t5 import T5, T5Config, count_weights, expected_shapes, linear, rms_norm

PREFIX_LENGTH = 20          # of both prefix methods; the paper gives none (ours)
PREFIX_WIDTH = 512          # m, the reparametrizing MLP's hidden width, as Li & Liang's (4.3)
ORDERS = 4                  # of the demonstrations, to show what their order does
CONTEXT = 512               # tokens of an input with demonstrations: T5's own (Table 6)


def pose(tokenizer, name, task, rows, shown, seed):
    """How a method puts a task's rows to the model -> [Examples], one; few-shot: one an order.
    name: the task's, shown: the training sample, both for instructions; this one: the template."""
    return [task_examples(tokenizer, task, rows)]


class Baseline(NamedTuple):
    """A way to use a task's few examples, as functions of parameters {name: tensor}, float32."""
    start: Callable | None  # (t5, seed, length) -> parameters to begin with; None: they are given
    model: Callable         # (t5, what is kept) -> T5, theta (P, d): the model to be tuned
    rates: tuple = ()       # AdamW's, to be chosen from on validation; (): nothing is tuned
    length: int = 0         # P, where it is not a setting
    pose: Callable = pose   # how a task's rows are put to the model
    fold: Callable = lambda t5, parameters: parameters      # -> what is kept when tuning is done


# ------------------------------------------------------------------------- what all of them share

def without_prompt(t5, kept):
    """The frozen T5 and a soft prompt of no vectors (0, d)."""
    table = t5.weights["shared.weight"]
    return t5, table.new_zeros(0, table.shape[1],
                               dtype=torch.promote_types(table.dtype, torch.float32))


def tuning_gradient(t5, baseline, parameters, examples, method):
    """Gradient of the mean loss over n Examples with respect to every parameter (Eq. 1).

    -> {name: tensor} like parameters, the gate's H (d,). For a prompt that is
    supmer.prompt_gradient's; no gradient of what is not among the parameters is computed.
    """
    def tuned(parameters):
        return baseline.model(t5, baseline.fold(t5, parameters))

    total, H = {name: torch.zeros_like(x) for name, x in parameters.items()}, 0.0
    for _, batch, _ in micro_batches(examples, tuned(parameters)[1], method):
        share, (_, H_part) = first_derivative(lambda parameters: loss_share(
            *tuned(parameters), batch, None, 0.0, examples.words, len(examples.ids), method),
            parameters)
        for name, x in share.items():
            total[name] += x
        H = H + H_part
    return total, H


# ------------------------------------------------------------ prompt tuning (Lester et al. 2021)

def normal_prompt(t5, seed, length):
    """PT: theta (P, d), normal with the embedding table's standard deviation. 76,800 numbers at
    t5-base with P = 100."""
    table = t5.weights["shared.weight"].float().cpu()       # the same to the last bit on a GPU
    drawn = np.random.default_rng((seed, 0, 0, 12)).standard_normal((length, table.shape[1]))
    return given_prompt(t5, table.std() * torch.from_numpy(drawn).float())


def vocabulary_prompt(t5, seed, length):
    """PT from rows of T5's embedding table (Lester et al.'s "sampled vocabulary")."""
    return {"theta": init_prompt(t5, length, seed)}


def given_prompt(t5, theta):
    """A prompt that was learned before."""
    return {"theta": theta.to(t5.weights["shared.weight"].device)}


def with_prompt(t5, kept):
    """The frozen T5 and the prompt."""
    return t5, kept["theta"]


# ------------------------- prefixes in every layer: P-Tuning-v2 (Liu et al. 2022), Prefix-Tuning

def prefix_names(t5):
    """Where t5.self_attention looks for a prefix (2, h, P, k): every block of both stacks."""
    c = t5.config
    return [f"{stack}.block.{block}.layer.0.SelfAttention.prefix" for stack, blocks in (
        ("encoder", c.num_layers), ("decoder", c.num_decoder_layers)) for block in range(blocks)]


def p_tuning_v2_start(t5, seed, length):
    """P-Tuning-v2 (Liu et al. 2022): P keys and values of each layer's self-attention, directly.

    They start as each layer's keys and values of rows of the embedding table (near to Li & Liang's
    start from the model's activations on real words, without running it). Cross-attention gets
    none. 2 P h k numbers a layer: 737,280 at t5-base with P = 20.
    """
    c, w, rows, parameters = t5.config, t5.weights, init_prompt(t5, length, seed), {}
    for name in prefix_names(t5):
        layer = name.removesuffix(".SelfAttention.prefix")
        x = rms_norm(rows, w[f"{layer}.layer_norm.weight"], c.eps)                      # (P, d)
        both = [linear(x, w[f"{layer}.SelfAttention.{part}.weight"]) for part in "kv"]
        both = torch.stack(both).view(2, length, c.num_heads, c.d_kv)               # (2, P, h, k)
        parameters[name] = both.transpose(1, 2).float().contiguous()                # (2, h, P, k)
    return parameters


def with_prefix(t5, kept):
    """The frozen T5 with keys and values beside those of its own, and no soft prompt."""
    return without_prompt(t5._replace(weights=t5.weights | kept), {})


def prefix_tuning_start(t5, seed, length):
    """Prefix-Tuning (Li & Liang 2021, 4.3): the same keys and values come out of an MLP,
    tanh(E W1 + b1) W2 + b2, which is tuned in their place and folded away when that is done.

    E (P, d), W1 (d, m), W2 (m, layers 2 h k): 19,320,320 numbers at t5-base with P = 20. W2 is such
    that keys and values start at the size of P-Tuning-v2's.
    """
    c, rng, m = t5.config, np.random.default_rng((seed, 0, 0, 13)), PREFIX_WIDTH
    size = torch.stack([x.square().mean((1, 2, 3)).sqrt()
                        for x in p_tuning_v2_start(t5, seed, length).values()])     # (layers, 2)
    size = size.flatten().repeat_interleave(c.num_heads * c.d_kv)                   # (layers 2 h k)

    def normal(*shape):
        return torch.from_numpy(rng.standard_normal(shape)).float().to(size.device)
    return {"E": normal(length, c.d_model), "W1": normal(c.d_model, m) * c.d_model ** -0.5,
            "b1": torch.zeros(m, device=size.device),
            "W2": normal(m, len(size)) * m ** -0.5 * size / 0.63,   # tanh of a normal has RMS 0.63
            "b2": torch.zeros_like(size)}


def fold_prefix(t5, parameters):
    """The MLP's output, as P-Tuning-v2's parameters."""
    E, W1, b1, W2, b2 = (parameters[name] for name in ("E", "W1", "b1", "W2", "b2"))
    names, c = prefix_names(t5), t5.config
    made = torch.tanh(E @ W1 + b1) @ W2 + b2                            # (P, layers 2 h k)
    made = made.view(len(E), len(names), 2, c.num_heads, c.d_kv)        # (P, layers, 2, h, k)
    return dict(zip(names, made.permute(1, 2, 3, 0, 4)))                            # (2, h, P, k)


# ---------------------------------------------------------------------------- full fine-tuning

def ft_start(t5, seed, length):
    """FT (C.1): every weight of T5, float32 whatever the frozen one's dtype; a tied head once."""
    return {name: w.float().clone() for name, w in t5.weights.items()
            if not (t5.config.tied and name == "lm_head.weight")}


def with_weights(t5, kept):
    """A T5 of these weights, and no soft prompt."""
    weights = {"lm_head.weight": kept["shared.weight"], **kept}
    return without_prompt(t5._replace(weights=weights), {})


def ft_memory(config):
    """Bytes that one process of FT holds beside the frozen weights and a step's activations: the
    tuned weights, a set's and a micro-batch's gradient, Adam's two moments, the best so far."""
    return 6 * 4 * count_weights(config)


# ------------------------------------------------ inputs: the template, options, instructions

LETTERS = tuple(string.ascii_uppercase)


def as_choice(texts, words):
    """A template of multiple choice among words; its answers are LETTERS.

    "{text}", ("terrible", "great") -> "{text} ? A. terrible B. great . Answer: <X>"
    """
    options = " ".join(f"{letter}. {word}" for letter, word in zip(LETTERS, words))
    return f"{texts} ? {options} . Answer: <X>"


def pose_unified(tokenizer, name, task, rows, shown, seed):
    """pose() as multiple choice among the task's words (Unified-PPT; Gu et al. 2022, 3.3)."""
    texts = " . ".join(f"{{{field}}}" for field in template_fields(task.template))
    return pose(tokenizer, name, task._replace(
        template=as_choice(texts, task.words), words=LETTERS[:len(task.words)]), rows, shown, seed)


INSTRUCTIONS = {
    **dict.fromkeys(("sst2", "mr", "movie"), "Is this opinion of a film terrible or great?"),
    **dict.fromkeys(("cr", "amazon", "books", "dvd", "electronics", "kitchen"),
                    "Is this opinion of a product terrible or great?"),
    "airlines": "Is this opinion of an airline terrible or great?",
    "restaurants": "Is this opinion of a restaurant terrible or great?",
    "nyt": "Is the feeling of this sentence from a newspaper terrible or great?",
    "tweets": "Is the feeling of this short message terrible or great?",
    "sst5": "Is this opinion of a film terrible, bad, okay, good or great?",
    "subj": "Is this sentence about a film subjective, an opinion, or objective, the plot?",
    "trec": "Does this question ask for a description, an entity, an expression, a human, a "
            "location or a number?",
    "cb": "Does the premise say that the hypothesis is true? Answer yes, no or maybe.",
    "rte": "Does the hypothesis follow from the premise? Answer yes or no.",
    "qnli": "Does the sentence answer the question? Answer Yes or No.",
    "wic": "Does the word have the same meaning in both sentences? Answer No or Yes.",
    "mrpc": "Do both sentences say the same? Answer No or Yes.",
    "qqp": "Do both questions ask the same? Answer No or Yes.",
}


def demonstrations(tokenizer, task, shown, seed):
    """The training sample as solved examples, token ids without </s>, labels taking turns.
    Row(1, {"text": "A fine film."}) -> the ids of `A fine film. It was great ?`"""
    parts, rng = compile_template(tokenizer, task.template), np.random.default_rng((seed, 0, 0, 15))
    mask, names, by_label = [tokenizer.token_to_id(MASK)], template_fields(task.template), {}
    for row in (shown[i] for i in rng.permutation(len(shown))):
        word = tokenize(tokenizer, [task.words[row.label]])[0]
        fields = dict(zip(names, tokenize(tokenizer, [row.fields[name] for name in names])))
        ids, _ = fill_template([word if part == mask else part for part in parts], fields,
                               task.max_tokens)
        by_label.setdefault(row.label, []).append(ids[:-1])
    return [ids for turn in zip_longest(*by_label.values()) for ids in turn if ids is not None]


def pose_instructed(tokenizer, name, task, rows, shown, seed, orders=0):
    """Zero-shot and few-shot inference (B): the instruction, for few-shot as many demonstrations as
    fit, and the row in its template; in CONTEXT tokens -> [Examples], one, or one an order.
    All orders show a row the same demonstrations. InputError for a task without an instruction."""
    if name not in INSTRUCTIONS:
        raise InputError(f"{name} has no instruction: leave zero-shot and few-shot away")
    instruction, = tokenize(tokenizer, [INSTRUCTIONS[name]])
    examples = task_examples(tokenizer, task, rows)
    solved = demonstrations(tokenizer, task, shown, seed) if orders else []
    ends = list(accumulate(map(len, solved)))
    posed = []
    for order in range(orders or 1):
        rng, ids = np.random.default_rng((seed, order, 0, 16)), []
        ranks = rng.permutation(len(solved))
        for row in examples.ids:
            fits = bisect_right(ends, CONTEXT - len(instruction) - len(row))
            ids.append([*instruction, *chain(*(solved[i] for i in ranks if i < fits)), *row])
        posed.append(examples._replace(ids=ids))
    return posed


PROMPT = Baseline(None, with_prompt, (0.1, 0.2, 0.3))                   # C.1
ZERO_SHOT = Baseline(lambda t5, seed, length: {}, without_prompt, pose=pose_instructed)
BASELINES = {
    "learned": PROMPT,                                  # begins with a given_prompt
    "unified": PROMPT._replace(pose=pose_unified),
    "random": PROMPT._replace(start=normal_prompt),
    "vocab": PROMPT._replace(start=vocabulary_prompt),
    "prefix-tuning": Baseline(prefix_tuning_start, with_prefix, (1e-4, 3e-4, 1e-3), PREFIX_LENGTH,
                              fold=fold_prefix),        # the paper gives none of these rates (ours)
    "p-tuning-v2": Baseline(p_tuning_v2_start, with_prefix, (3e-3, 1e-2, 3e-2), PREFIX_LENGTH),
    "ft": Baseline(ft_start, with_weights, (1e-5, 2e-5, 3e-5)),         # C.1
    "zero-shot": ZERO_SHOT,
    "few-shot": ZERO_SHOT._replace(pose=partial(pose_instructed, orders=ORDERS)),
}


# -------------------------------------------------- pre-training: PPT, Unified-PPT, MetaPT

def ppt_step(t5, state, pairs, method, seed, ranks=SOLO):
    """PPT (Gu et al. 2022): one step of the plain loss on the tasks that SUPMER would adapt to.

    As supmer.meta_step, of which partners, phi and the seed are not used. The batch is all support
    and query examples of the n tasks, 256 with the paper's sizes; the rate in step t, from 1 on, is
    prompt_rate / sqrt(t) ("inverse square root", C.2), without Gu et al.'s weight decay. -> a dict
    for the log.
    """
    n = sum(len(task.support.ids) + len(task.query.ids) for task, _ in pairs)

    def gradients(pair):
        parts = []
        for examples in (pair[0].support, pair[0].query):
            gradient, _, loss = prompt_gradient(t5, state.theta, examples, method)
            parts.append((len(examples.ids) / n, gradient.cpu(), loss.cpu()))
        return parts

    g, loss = 0.0, 0.0
    for parts in share_tasks(ranks, gradients, pairs):      # summed in the tasks' order
        for share, part, part_loss in parts:
            g, loss = g + share * part, loss + share * part_loss
    loss = float(loss)
    if not (math.isfinite(loss) and bool(g.isfinite().all())):
        raise InputError(f"step {state.step}: the loss is {loss} or its gradient not finite; try a "
                         "smaller prompt_rate")
    state.theta.grad = g.to(state.theta)
    log = {"query_loss": loss, "theta_gradient": float(g.norm())}
    torch.nn.utils.clip_grad_norm_([state.theta], method.clip)
    state.theta_adam.param_groups[0]["lr"] = method.prompt_rate / math.sqrt(state.step + 1)
    state.theta_adam.step()
    state.theta_adam.zero_grad(set_to_none=True)
    state.step += 1
    return log


# Unified-PPT's meta tasks: all of them multiple choice, so that a pair's words become options.
UNIFIED = {variant: (as_choice("{0} . {1}", WORDS[variant]), LETTERS[:len(WORDS[variant])])
           for variant in ("sp-next", "sp-cluster")}


# ----------------------------------------------------- what is learned before, as train.py's knobs

PLAIN = ("ppt", "unified-ppt")          # take ppt_step, the others supmer.meta_step
METHODS = {
    "supmer": {},
    "ppt": {"regularizer": "none"},
    "unified-ppt": {"regularizer": "none"},
    "metapt": {"inner_rate": 0.08, "prompt_rate": 0.025, "patience": 6, "regularizer": "none",
               "augmentation": False, "labeled_share": 1.0},     # C.2
}
ABLATIONS = {   # Table 4, and the released code's order (ours)
    "only-sp": {"only": "sp"}, "only-mc": {"only": "mc"}, "only-ss": {"only": "ss"},
    "no-ta": {"augmentation": False}, "no-curriculum": {"curriculum": False},
    "no-mgr": {"regularizer": "none"}, "first-order": {"first_order": True},
}


def name_of(training, method):
    """What a train.Training and a Method make: their method, or an ablation, or "variant", SUPMER
    with other parts left out."""
    if training.method != "supmer":
        return training.method
    chosen = vars(training) | vars(method)
    left_out = [name for name, preset in ABLATIONS.items() if preset.items() <= chosen.items()]
    if len(left_out) > 1:
        return "variant"
    return left_out[0] if left_out else "supmer"


def examples_per_step(training, method):
    """Examples that a step of a train.Training and a Method draws: SUPMER and what leaves a part of
    it out n (support + query), and the partners' query sets where tasks are mixed."""
    return training.tasks * (training.support + training.query * (1 + mixes(training, method)))


def mixes(training, method):
    """Whether a partner task is mixed in."""
    return method.augmentation and training.method not in PLAIN


def parameters_at(config, length):
    """{method: how many numbers it tunes} on a T5Config, prompts of `length` vectors."""
    made = {name: torch.empty(shape) for name, shape in expected_shapes(config).items()}
    t5 = T5(config, {"lm_head.weight": made["shared.weight"], **made})     # mostly never touched
    counted = {name: sum(x.numel() for x in one.start(t5, 0, one.length or length).values())
               for name, one in BASELINES.items()
               if one.rates and one.start not in (None, ft_start)}
    return counted | {"ft": count_weights(config)}


if __name__ == "__main__":
    base = T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_decoder_layers=12,
                    num_heads=12, vocab_size=32128, gated=False, tied=True, scaled=True)
    for name, number in parameters_at(base, 100).items():
        print(f"{name:14} {number:>12,} tunable parameters at t5-base")
