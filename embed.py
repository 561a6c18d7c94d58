r"""
Embeddings: one prompt, one pooled token, one space for direct and reasoned vectors.

The idea. An item is written as a chat turn, and the model answers in one of two ways:

    <|im_start|>system\n{instruction}<|im_end|>\n
    <|im_start|>user\n{video}{image}{text}<|im_end|>\n<|im_start|>assistant\n
        direct:  <|endoftext|>                                      e(x, ∅): the state HERE
        reason:  <think>\n{rationale}\n</think>\n\n<|endoftext|>    e(x, r): the state HERE

The state is the final-norm state, scaled to length 1. The answer's first token is the decision:
    p_reason = softmax over the logits of <|endoftext|> and <think> at the prompt's last token.
A prefill that ends in <|endoftext|> holds both the direct vector and, one token earlier, the
decision: not to reason costs nothing over an embedder that cannot.

The maths. s(q, t) = e(q)·e(t), the cosine. InfoNCE = −log softmax over candidates of s/temperature,
at the target; both directions averaged. One update of stage embed minimises
    L = NCE(direct) + NCE(reasoned) + λ·CE(rationale tokens) + μ·CE(decision token)
with λ = 1 and μ = 2. Select's evaluators learn only the NCEs, the second weighted.

How to run: python embed.py --model runs/pocket/rl --input items.jsonl --output vectors.npy
From Python: see Embedder.

Sources: Qwen3-VL-Embedding (arXiv 2601.04720) for the template, the pooled token and the mask of
false negatives; InfoNCE, arXiv 1807.03748; Matryoshka prefixes, arXiv 2205.13147.
Left out: several vectors per item, audio, and pooling other than the last token (it would change
pool, embed_prompts and rl.rollouts, and generate would have to keep all states).
"""

import argparse
import contextlib
import itertools
import math
import numbers
import os
import sys
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import scale
from model import (
    Cache,
    generate,
    load_model,
    numbered_lines,
    parse_json,
    save_model,
    write_json,
    write_rows,
)
from processor import Processor, collate, prompt_key, refuse_seeking, require, require_number

# --------------------------------------------------------------------------------------------------
# From final states to vectors, decisions and log-probabilities.
# A row of a batch is one packed sequence: a prompt, then its branches. The first branch is direct,
# <|endoftext|> alone; the others are rationales 1 ... K. A branch sees the prompt and itself.
# B rows, S tokens, H numbers of a state. Here p p is a prompt, e <|endoftext|>, a b e a rationale:
#     ids     p p e a b e
#     branch  0 0 1 2 2 2     (B, S); -1 in padding; None where no row has a rationale
#     ends        2     5     (B, 1 + K): where each branch ends; -1 where there is none


def states_at(h, places):
    """States h (B, S, H) at places (B, K) -> (B, K, H)."""
    return h.gather(1, places[..., None].expand(-1, -1, h.shape[-1]))


def pool(h, ends):
    """States (B, S, H), ends (B, 1 + K) -> unit vectors (B, 1 + K, H), fp32; zeros where absent."""
    vectors = F.normalize(states_at(h, ends.clamp(min=0)).float(), dim=-1)
    return vectors * (ends >= 0)[..., None]


def row_lengths(prompts, branches=None):
    """Tokens of each row that collate makes of a prompt and its rationales, before padding."""
    branches = branches or [[]] * len(prompts)
    # + 1 is the direct branch, <|endoftext|> alone.
    return [len(p["ids"]) + 1 + sum(map(len, b)) for p, b in zip(prompts, branches)]


@torch.no_grad()
def branch_vectors(model, processor, prompts, budget, branches=None):
    """Unit vectors e(x, ∅), e(x, r) ... of every prompt and its branches -> list of (1 + K, H).

    branches: of each prompt a list of rationales, as ids. budget: tokens of a pass.
    """
    if branches is None:
        branches = [[]] * len(prompts)
    vectors = [None] * len(prompts)
    lengths = processor.padded(row_lengths(prompts, branches))
    for rows in scale.chunks_of(lengths, budget):
        rationales = [branches[i] for i in rows]
        batch = collate([prompts[i] for i in rows], processor, rationales, model.device)
        pooled = pool(model(batch), batch["ends"])  # (B, 1 + K, H), zeros where a row has fewer
        for i, v in zip(rows, pooled):
            vectors[i] = v[: 1 + len(branches[i])]
    return vectors


def decision_logits(model, h, batch, processor):
    """fp32 logits (B, 2) of [direct, reason] at the prompt's last token."""
    last = batch["ends"][:, :1] - 1  # the direct branch is one token, right after the prompt
    state = states_at(h, last).squeeze(1)
    # Two rows of the head are enough. All 151,936 would cost a small model more than its layers.
    two_rows = model.lm_head.weight[[processor.eos_id, processor.think_id]]
    return F.linear(state, two_rows.to(state.dtype)).float()


LOGITS_AT_ONCE = 1024  # tokens: with Qwen's vocabulary 0.6 GB in fp32


def rationale_logprobs(model, h, batch, processor):
    r"""log π of a rationale's tokens: after <think>\n, up to </think> inclusive.

    h (B, S, H) -> (n,) in the order of rows, then of their text. At least one row has a rationale.
    π is the sampled distribution, without the ids that are never sampled.
    """
    ends = batch["ends"]
    places = torch.arange(h.shape[1], device=h.device)
    # Rationale k: prefix <think>\n | text\n </think> | tail \n\n<|endoftext|>. It begins behind the
    # branch before it, at ends[k - 1] + 1, and ends at ends[k].
    first = ends[:, :-1, None] + 1 + len(processor.prefix)  # (B, K, 1)
    last = ends[:, 1:, None] - len(processor.tail)  # below 0 where a row has no rationale k
    chosen = ((first <= places) & (places <= last)).any(1)  # (B, S)
    row, place = chosen.nonzero(as_tuple=True)

    states = h[row, place - 1]  # (n, H): what predicts each token
    ids = batch["ids"][row, place]
    logp = []
    # Logits are large. They are not kept for backward, which computes them again: checkpoint().
    for part in zip(states.split(LOGITS_AT_ONCE), ids.split(LOGITS_AT_ONCE)):
        args = model, *part, processor.suppress_tokens
        logp.append(checkpoint(token_logprobs, *args, use_reentrant=False))
    return torch.cat(logp)


def token_logprobs(model, states, ids, suppress_tokens):
    """States (n, H) and the ids (n,) that follow them -> log-probabilities (n,)."""
    logits = model.logits(states)
    logits[:, suppress_tokens] = float("-inf")
    return logits.log_softmax(-1).gather(1, ids[:, None]).squeeze(1)


# --------------------------------------------------------------------------------------------------
# Contrastive learning

# A candidate that scores so far above the target is probably right, too (Qwen3-VL-Embedding).
FALSE_NEGATIVE_MARGIN = 0.1


def one_direction(scores, positive, temperature, also_right=None):
    """−log softmax of scores / temperature at the positive -> (n,).

    scores (n, m) cosines; positive (n,) the right column of each row. Columns that are right, too,
    are not pushed away: those that score far above the positive, and those that also_right (n, m)
    marks.
    """
    target = positive[:, None]
    false_negative = scores > scores.gather(1, target) + FALSE_NEGATIVE_MARGIN
    if also_right is not None:
        false_negative = false_negative | also_right
    false_negative = false_negative.scatter(1, target, False)  # the target itself stays
    logits = (scores / temperature).masked_fill(false_negative, float("-inf"))
    return F.cross_entropy(logits, positive, reduction="none")


def info_nce(q, t, positive, temperature=0.02, weights=None, dims=()):
    """InfoNCE in both directions: the target among all candidates, the query among all queries.

    q (n, H), t (m, H) unit vectors, every candidate one row of t; positive (n,) the row of t that
    is each query's target. -> scalar, the mean over queries, weighted by weights (n,).
    dims: the loss is summed over the full vectors and over these prefixes of them, each scaled to
    length 1 again. So a vector's first numbers are a vector too (Matryoshka).
    """
    H = q.shape[1]
    if max(dims, default=0) > H:
        raise ValueError(f"matryoshka_dims {dims}: this model's vectors have {H} numbers")
    same_target = positive[:, None] == positive  # (n, n): which queries have the same target
    diagonal = torch.arange(len(q), device=q.device)
    losses = torch.zeros_like(q[:, 0])
    for d in {*dims, H}:
        q_d = F.normalize(q[:, :d], dim=-1)
        t_d = F.normalize(t[:, :d], dim=-1)
        s = q_d @ t_d.T  # (n, m) cosines
        losses = losses + one_direction(s, positive, temperature) / 2
        # Target to query: row i is query i's target, column j is query j. The positives are on the
        # diagonal; other queries with the same target are right, too.
        losses = losses + one_direction(s[:, positive].T, diagonal, temperature, same_target) / 2
    if weights is None:
        weights = torch.ones_like(losses)
    return (losses * weights).sum() / weights.sum()


def log_target_prob(q, t, target, temperature=0.02):
    """log p(t|q) = log softmax over candidates of s/temperature, at the target: no candidate is
    left out. q (..., H), t (m, H), target (...) -> (...)"""
    s = torch.einsum("...h,mh->...m", q, t)
    return (s / temperature).log_softmax(-1).gather(-1, target[..., None]).squeeze(-1)


NEGATIVES = 1  # hard negatives of each pair that join the candidates of the batch


def candidates_of(pairs, device):
    """The targets and hard negatives of the joined batch, which is the batches of all processes
    together (gather_objects joins their lists). Each distinct one is a column of the scores, in
    the order of the keys: two queries with the same target share a column.

    -> documents: prompts, this process' distinct ones; row_of_column: for each column its place
    among the documents of all processes; positive (N,): the column of each pair's target.
    Two processes with two pairs each: targets (keys) c, a and a, b, no negatives. Documents are
    [c, a] and [a, b], columns a, b, c, row_of_column [1, 3, 0], positive [2, 0, 0, 1].
    """
    candidates = {pair["target_key"]: pair["target"] for pair in pairs}
    for pair in pairs:
        for negative in pair["negatives"][:NEGATIVES]:
            candidates.setdefault(prompt_key(negative), negative)
    keys, row_of_column = np.unique(scale.gather_objects(list(candidates)), return_index=True)
    target_keys = scale.gather_objects([pair["target_key"] for pair in pairs])
    positive = torch.from_numpy(np.searchsorted(keys, target_keys)).to(device)
    return list(candidates.values()), row_of_column, positive


def gradcache_step(
    model, processor, queries, rationales, K, documents, query_loss, contrast, budget
):
    """Leaves gradients of a loss on all vectors and of one on each query's tokens (GradCache).

    queries     this process' prompts; rationales: of each a list, as ids, at most K
    documents   this process' candidates, prompts
    query_loss  (rows, h, batch) -> loss of queries[rows], metrics; h (b, S, H)
    contrast    {"query": (N, 1 + K, H), "document": (M, 1, H)} of all processes -> loss
    budget      tokens of a pass
    -> contrast + all query losses; metrics, summed over the rows of all processes
    """
    prompts = {"query": queries, "document": documents}
    branches = {"query": rationales, "document": [[]] * len(documents)}

    # scale.backward calls this on chunks of rows: first for the vectors alone; then, when it knows
    # the gradient of `contrast` in each vector, with the losses. If all rows fit in one budget, the
    # queries pass once and the documents once, and each pass does both.
    def forward(kind, rows, with_loss):
        chunk = [prompts[kind][i] for i in rows]
        chunk_branches = [branches[kind][i] for i in rows]
        batch = collate(chunk, processor, chunk_branches, model.device)
        h = model(batch)
        vectors = pool(h, batch["ends"])
        if kind == "query":  # zeros where no row of the chunk has K rationales
            vectors = F.pad(vectors, (0, 0, 0, 1 + K - vectors.shape[1]))
            if with_loss:
                return vectors, *query_loss(rows, h, batch)
        return vectors, None, {}

    lengths = {}
    for kind in prompts:
        lengths[kind] = processor.padded(row_lengths(prompts[kind], branches[kind]))
    return scale.backward(lengths, forward, contrast, budget)


def contrastive_step(model, processor, pairs, rationales, labels, cfg, posterior_weights=False):
    """L = NCE(direct) + NCE(reasoned) + λ·CE(rationale) + μ·CE(decision). Leaves gradients.

    pairs       this process' share of a batch. "query", "target", "negatives": prompts;
                "target_key": its prompt_key; "id"
    rationales  of each pair: token ids as of Processor.rationale, or None: no reasoned path.
                train.py (Lessons) draws one of the kept by its weight (select.py)
    labels      of each pair the right decision: 1 to reason, 0 to answer directly, -1 unknown.
                A pair with label 0 may have a rationale: NCE(reasoned) and CE(rationale) then learn
                how to think if forced, and the decision learns not to
    cfg         temperature, lm_weight λ, decision_weight μ, chunk_tokens, matryoshka_dims
    posterior_weights   the rationales are guesses, good and bad (evaluators of select): in the mean
                NCE(reasoned) each weighs p(t|q,r) / (p(t|q,r) + p(t|q,∅)), its posterior against ∅
    -> metrics: loss, nce_direct and, where they are learnt, nce_reason, lm, decision,
       decision_right (share of labels)
    """
    model.train()
    documents, row_of_column, positive = candidates_of(pairs, model.device)

    # 1) What the losses need of all N pairs of the joined batch
    has_rationale = scale.gather_objects([bool(rationale) for rationale in rationales])
    has_rationale = torch.tensor(has_rationale, device=model.device)  # (N,)
    num_forced = len(processor.prefix) + len(processor.tail)
    num_rationale_tokens = sum(scale.gather_objects([len(r) - num_forced for r in rationales if r]))
    num_labels = sum(scale.gather_objects([label >= 0 for label in labels]))
    dims = prefix_dims(cfg.matryoshka_dims)

    # 2) λ·CE(rationale) + μ·CE(decision) of some queries, as parts of the batch's means
    def query_loss(rows, h, batch):
        loss = torch.zeros((), device=h.device)
        metrics = {}
        if cfg.lm_weight and batch["branch"] is not None:  # None: none of these has a rationale
            lm = -rationale_logprobs(model, h, batch, processor).sum() / num_rationale_tokens
            loss = loss + cfg.lm_weight * lm
            metrics["lm"] = lm.item()
        if cfg.decision_weight and num_labels:
            label = torch.tensor([labels[i] for i in rows], device=h.device)
            logits = decision_logits(model, h, batch, processor)
            decision = F.cross_entropy(logits, label, ignore_index=-1, reduction="sum")
            decision = decision / num_labels
            loss = loss + cfg.decision_weight * decision
            metrics["decision"] = decision.item()
            metrics["decision_right"] = (logits.argmax(1) == label).sum().item() / num_labels
        return loss, metrics

    # 3) NCE(direct) + NCE(reasoned), on the vectors of the joined batch
    log = {}

    def contrast(vectors):
        direct, reasoned = vectors["query"].unbind(1)  # (N, H)
        t = vectors["document"][row_of_column, 0]  # (columns, H)
        weights = None
        if posterior_weights:  # constants
            # a / (a + b) = sigmoid(log a − log b), with a = p(t|q,r) and b = p(t|q,∅)
            after = log_target_prob(reasoned, t, positive, cfg.temperature)
            before = log_target_prob(direct, t, positive, cfg.temperature)
            posterior = (after - before).detach().sigmoid()
            weights = posterior[has_rationale].clamp(min=1e-30)  # their sum must not be 0
        nce_direct = info_nce(direct, t, positive, cfg.temperature, dims=dims)
        log["nce_direct"] = nce_direct.item()
        if not has_rationale.any():
            return nce_direct
        reasoned, column = reasoned[has_rationale], positive[has_rationale]
        nce_reason = info_nce(reasoned, t, column, cfg.temperature, weights, dims)
        log["nce_reason"] = nce_reason.item()
        return nce_direct + nce_reason

    # 4) Gradients
    queries = [pair["query"] for pair in pairs]
    branches = [[rationale] if rationale else [] for rationale in rationales]
    loss, metrics = gradcache_step(
        model, processor, queries, branches, 1, documents, query_loss, contrast, cfg.chunk_tokens
    )
    return {"loss": loss, **log, **metrics}


def prefix_dims(text):
    """Config.matryoshka_dims as numbers: "64,128" -> (64, 128)."""
    return tuple(int(d) for d in text.split(",") if d)


# --------------------------------------------------------------------------------------------------
# The Embedder: items in, vectors out


class ItemError(ValueError):
    """What is wrong with an item; `index` counts the items of the call from 0."""

    def __init__(self, index, why):
        super().__init__(f"item {index}: {why}")
        self.index = index
        self.why = why


class Embedder:
    """Items in, vectors out: a model and the Processor of its items.

        from pathlib import Path
        from PIL import Image
        from embed import Embedder

        embedder = Embedder.from_pretrained("runs/pocket/rl")  # or "Qwen/Qwen3-VL-Embedding-2B"
        queries = [{"text": "the same in red", "image": Path("cup.jpg")}, "a red cup"]
        q = embedder.encode_query(queries, instruction="Find the image.")
        d = embedder.encode_document([Path("a.jpg"), Path("b.jpg"), Image.open("c.jpg")])
        embedder.similarity(q, d)  # cosines, torch (2, 3)

    An item is a string (text); a pathlib.Path, PIL image or bytes (an image); a dict of any of
    "text", "image", "video" and "instruction" (values or lists; as an image a string is a path; a
    video is a list of frames or {"frames": [...], "fps": 2.0}); or {"messages": [...]} of a chat.
    One call may mix them. The item's instruction wins over the call's. A photo is shown as stored:
    PIL's ImageOps.exif_transpose turns it upright.

        embedder.encode(items, threshold=0.2)  # the dial: reason where p_reason > 0.2
        embedder.encode(items, dim=64)  # the first 64 numbers, scaled to length 1 (Matryoshka)
        vectors, info = embedder.encode(items, return_info=True)
        info[0]  # {"reasoned": True, "p_reason": 0.9, "rationale": "nw red star", "new_tokens": 5}
    """

    # Padded tokens of a batch: this bounds the device's memory. The patches of eight batches' items
    # are in the main memory, whatever it is.
    budget = 16384

    def __init__(self, model, processor):
        self.model = model
        self.processor = processor

    @classmethod
    def from_pretrained(
        cls,
        path_or_id,
        device=None,
        dtype=None,
        revision=None,
        max_pixels=None,
        min_pixels=None,
        frame_max_pixels=None,
        frame_min_pixels=None,
        max_frames=None,
        fps=None,
        max_length=None,
        default_instruction=None,
    ):
        """Any dense Qwen3-VL or Qwen3-VL-Embedding, and ours: a folder, or owner/name on the hub.

        device    "cpu", "cuda:1" ...; CUDA where there is one
        dtype     "bfloat16", torch.float32 ...; None: the file's
        revision  branch, tag or commit of a hub repository
        The others are settings of the Processor. None: what a checkpoint of ours says, else Qwen's.
        Raises ValueError, one line, for what cannot be opened.
        """
        if dtype is not None:
            name = str(dtype).removeprefix("torch.")
            names = ("bfloat16", "float16", "float32")
            require(name in names, "dtype", name, "bfloat16, float16 or float32")
            dtype = getattr(torch, name)
        device = scale.find_device(device)
        folder = find_folder(path_or_id, revision)
        model = load_model(folder, dtype, device)
        processor = Processor.from_folder(
            folder,
            model.c,
            max_pixels=max_pixels,
            min_pixels=min_pixels,
            frame_max_pixels=frame_max_pixels,
            frame_min_pixels=frame_min_pixels,
            max_frames=max_frames,
            fps=fps,
            max_length=max_length,
            default_instruction=default_instruction,
        )
        return cls(model, processor)

    def encode(
        self,
        items,
        instruction=None,
        reason="auto",
        threshold=0.5,
        dim=None,
        batch_size=16,
        normalize=True,
        convert_to_numpy=True,
        show_progress=None,
        return_info=False,
        max_new_tokens=128,
        temperature=0.0,
        generator=None,
        tau=None,
    ):
        """An item, or any iterable of n items (a generator is not read at once) -> (n, d) float32,
        numpy or, with convert_to_numpy=False, torch on the CPU.

        instruction    for items without one; None: the processor's default_instruction
        reason         "auto": where p_reason > threshold, but never with a checkpoint that we have
                       not trained, whose decision means nothing; "never"; "always"
        dim            keep the first dim numbers
        batch_size     at most; a batch holds at most `budget` tokens, too
        normalize      to length 1; False: the final states as they are
        show_progress  a bar of what is read; None: in a terminal, if it takes over a second
        return_info    also a list of {"reasoned", "p_reason" (None without a head), "rationale"
                       (None where nothing was reasoned), "new_tokens"}
        max_new_tokens, temperature, generator   of rationales: greedy at temperature 0; what has
                       not ended after so many tokens is closed by force
        tau            deprecated name of threshold
        Raises ItemError for an item that cannot be read, or whose numbers are not finite.
        """
        if tau is not None:
            warnings.warn("tau= is spelled threshold=", DeprecationWarning, stacklevel=2)
            threshold = tau
        H = self.model.c.hidden
        has_head = self.model.has_head
        dim = H if dim is None else dim
        require(reason in ("auto", "never", "always"), "reason", reason, "auto, never or always")
        require(has_head or reason != "always", "reason", reason, "a model with an lm_head")
        require_number("whole", batch_size=batch_size, max_new_tokens=max_new_tokens, dim=dim)
        require(dim <= H, "dim", dim, f"a whole number from 1 to {H}")
        for name, value in {"threshold": threshold, "temperature": temperature}.items():
            is_number = isinstance(value, numbers.Real) and not math.isnan(value)
            require(is_number, name, value, "a number")
        require(0 <= temperature < math.inf, "temperature", temperature, "a number from 0 on")
        if hasattr(items, "columns"):  # pandas would iterate over their names
            raise ValueError("items: a table, expected a list of its rows, as dicts")

        if reason == "auto" and not (has_head and self.processor.trained_here):
            why = "this checkpoint never learnt to decide: it embeds directly"
            warnings.warn(why, stacklevel=2)
            reason = "never"
        threshold = {"auto": threshold, "never": math.inf, "always": -math.inf}[reason]

        if isinstance(items, (str, bytes, Mapping)) or not hasattr(items, "__iter__"):
            items = [items]
        no_bar = None if show_progress is None else not show_progress
        items = tqdm(items, "encode", unit=" items", disable=no_bar, delay=1)
        sampling = dict(self.processor.generation, max_new_tokens=max_new_tokens)
        sampling |= {"temperature": temperature, "generator": generator}
        vectors = [torch.zeros(0, H, dtype=torch.float32)]
        infos = []
        for prompts in self.windows(items, instruction, batch_size):
            window_vectors = torch.empty(len(prompts), H, dtype=torch.float32)
            window_infos = [None] * len(prompts)
            for rows in self.batches(row_lengths(prompts), batch_size):
                part = [prompts[row] for row in rows]
                # A caller's autocast would not fit the cache, which is in the model's dtype.
                with torch.autocast(self.model.device.type, enabled=False):
                    of_rows = self.embed_prompts(part, threshold, sampling)
                for row, v, info in zip(rows, *of_rows):
                    if not v.norm().isfinite():
                        why = f"its vector is not finite in {self.model.dtype}"
                        raise ItemError(len(infos) + row, why)
                    window_vectors[row] = v
                    window_infos[row] = info
            vectors.append(window_vectors)
            infos += window_infos
            prompts = None  # their images are free before the next window is read

        v = torch.cat(vectors)[:, :dim]
        if normalize:
            v = F.normalize(v, dim=-1)
        if convert_to_numpy:
            v = v.numpy()
        return (v, infos) if return_info else v

    def windows(self, items, instruction, batch_size):
        """Lists of prompts, eight batches each: enough to sort by length, few enough to hold."""

        def read(numbered_item):
            index, item = numbered_item
            try:
                return self.processor(item, instruction)
            except (ValueError, TypeError, LookupError, AttributeError) as e:
                raise ItemError(index, e) from e

        numbered = enumerate(items)
        # Threads help: Pillow decodes and resizes outside Python's lock.
        with ThreadPoolExecutor(min(8, os.cpu_count())) as threads:
            while window := list(itertools.islice(numbered, 8 * batch_size)):
                refuse_seeking([item for _, item in window])
                apply = threads.map if len(window) > 1 else map  # a lone query waits for no thread
                yield list(apply(read, window))

    def batches(self, lengths, batch_size):
        """Lengths of n rows -> lists of row numbers: rows about as long, the longest first."""
        # On a CPU more than 2048 tokens are no quicker, and pad more.
        budget = min(self.budget, 2048) if self.model.device.type == "cpu" else self.budget
        for rows in scale.chunks_of(lengths, budget):
            for i in range(0, len(rows), batch_size):
                yield rows[i : i + batch_size]

    @torch.no_grad()
    def embed_prompts(self, prompts, threshold, sampling):
        """One batch of n prompts -> final states (n, H) on the CPU, fp32, and infos. One prefill
        gives the direct vector and the decision; rows that reason continue its cache."""
        model, processor = self.model, self.processor
        batch = collate(prompts, processor, device=model.device)
        cache = Cache() if threshold < 1 else None
        h = model(batch, cache)
        v = states_at(h, batch["ends"])[:, 0].float()
        p_reason = [None] * len(prompts)
        rows = []  # those that reason
        if model.has_head:
            p_reason = decision_logits(model, h, batch, processor).softmax(-1)[:, 1].tolist()
            rows = [row for row, p in enumerate(p_reason) if p > threshold]
        infos = []
        for p in p_reason:
            infos.append({"reasoned": False, "p_reason": p, "rationale": None, "new_tokens": 0})
        if rows:
            rollouts = generate(model, batch, prefill=(h, cache), rows=rows, **sampling)
            v[rows] = rollouts.last[:, 0].float()
            # One continuation of each row.
            for row, [ids], [count] in zip(rows, rollouts.tokens, rollouts.num_sampled.tolist()):
                text = processor.rationale_text(ids)
                infos[row].update(reasoned=True, rationale=text, new_tokens=count)
        return v.cpu(), infos

    def encode_query(self, items, instruction=None, **options):
        """What is searched for: it may reason. Options as of encode."""
        return self.encode(items, instruction, **options)

    def encode_document(self, items, instruction=None, **options):
        """What is searched in. Only queries pay for reasoning, unless reason= says otherwise."""
        return self.encode(items, instruction, **{"reason": "never", **options})

    def process(self, items, normalize=True, instruction=None):
        """The direct path under Qwen3VLEmbedder's name: torch (n, H) on the model's device."""
        v = self.encode(items, instruction, "never", normalize=normalize, convert_to_numpy=False)
        return v.to(self.model.device)

    def similarity(self, a, b):
        """Cosines of vectors (n, d) and (m, d), numpy or torch -> torch (n, m)."""
        a = F.normalize(torch.as_tensor(a).float(), dim=-1)
        b = F.normalize(torch.as_tensor(b).float(), dim=-1)
        return a @ b.T

    def save(self, folder):
        """A folder that opens here and in transformers; for the direct path also in
        sentence-transformers and vLLM's pooling runner."""
        save_model(self.model, folder, self.processor.im_end_id, self.processor.eos_id)
        self.processor.save(folder)
        for name, value in sentence_transformers_files(self.model.c.hidden).items():
            path = Path(folder, name)
            path.parent.mkdir(exist_ok=True)
            write_json(path, value)


def find_folder(path_or_id, revision=None):
    """A local folder as it is, without any network; else owner/name on the Hugging Face hub, of
    which only data files are fetched, no programs. Only the hub has revisions."""
    if not isinstance(path_or_id, (str, os.PathLike)):
        raise ValueError(f"{path_or_id!r}: expected a folder, or owner/name on the hub")
    path = os.fspath(path_or_id)
    if os.path.exists(f"{path}/stages.json"):
        raise ValueError(f"{path}: a run folder of train.py; its last model is {path}/rl")
    if os.path.isdir(path):
        if revision is not None:
            raise ValueError(f"{path}: a local folder has no revisions")
        return path
    from huggingface_hub import snapshot_download

    kinds = ["*.json", "*.safetensors"]  # adapter_config.json, too: load_model refuses adapters
    try:
        return snapshot_download(path, revision=revision, allow_patterns=kinds)
    except (OSError, ValueError) as e:  # the hub's, of many lines, which may not name the path
        why = " ".join(str(e).split())
        raise ValueError(f"{path}: no folder, and the hub does not give it ({why})") from e


def sentence_transformers_files(hidden):
    """{file name: value} by which sentence-transformers 6, and vLLM, open the direct path.

    tokenizer.json appends <|endoftext|> by itself, and the chat template opens the answer: so the
    last token is the one to pool.
    """
    modules = [
        {"path": "", "type": "base.modules.transformer.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformer.modules.pooling.Pooling"},
        {"path": "2_Normalize", "type": "base.modules.normalize.Normalize"},
    ]
    for i, module in enumerate(modules):
        module.update(idx=i, name=str(i), type=f"sentence_transformers.{module['type']}")
    state = {"method": "forward", "method_output_name": "last_hidden_state"}
    transformer = {
        "transformer_task": "feature-extraction",
        "modality_config": {
            "text": state,
            "image": state,
            "image+text": state,
            "message": {**state, "format": "structured"},
        },
        "module_output_name": "token_embeddings",
        "processing_kwargs": {"chat_template": {"add_generation_prompt": True}},
    }
    pooling = {"embedding_dimension": hidden, "pooling_mode": "lasttoken", "include_prompt": True}
    kind = {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"}
    return {
        "modules.json": modules,
        "sentence_bert_config.json": transformer,
        "1_Pooling/config.json": pooling,
        "2_Normalize/config.json": {},
        "config_sentence_transformers.json": {**kind, "prompts": {"query": "", "document": ""}},
    }


# --------------------------------------------------------------------------------------------------
# The command line. Its options are arguments of from_pretrained and encode, with their defaults.

OPENING = {  # type, help
    "device": (str, "cpu, cuda or cuda:N; cuda where there is one"),
    "dtype": (str, "float32, bfloat16 or float16; the checkpoint's"),
    "revision": (str, "commit or tag of a model on the hub"),
    "min_pixels": (int, "least area of an image"),
    "max_pixels": (int, "largest area of an image"),
    "frame_min_pixels": (int, "least area of a video's frame"),
    "frame_max_pixels": (int, "largest area of a video's frame"),
    "max_frames": (int, "of a video without fps"),
    "max_length": (int, "tokens of an item; text is cut"),
    "fps": (float, "frames per second of videos that do not say"),
}
ENCODING = {
    "reason": (str, "auto (where p_reason exceeds the threshold), never or always"),
    "threshold": (float, "0.5; lower reasons more often"),
    "dim": (int, "keep the first numbers of each vector"),
    "instruction": (str, "of items without one"),
    "batch_size": (int, "items at a time (16)"),
    "max_new_tokens": (int, "longest rationale (128)"),
}


def run(model, input, output, **options):
    """Files are checked first and written last: a bad item leaves those of an earlier run alone."""
    source = Path(input)
    output = Path(output)
    facts = output.with_suffix(".jsonl")
    is_folder = output.is_dir() or facts.is_dir()
    is_usable = output.suffix == ".npy" and os.access(output.parent, os.W_OK)
    if not is_usable or is_folder or facts.resolve() == source.resolve():
        expected = "a .npy file, in a folder to write to, not named like --input"
        raise ValueError(f"--output {output}: expected {expected}")
    if facts.exists() and not output.exists():  # of an earlier run both are there
        raise ValueError(f"--output {output}: {facts} is there, and would be overwritten")
    items = {}  # {"FILE line 3": item}
    for place, line in numbered_lines([source]):
        if line.strip():
            items[place] = parse_json(line, place)
    if not items:
        raise ValueError(f"{source}: no items")
    encoding = {name: options.pop(name) for name in ENCODING if name in options}
    embedder = Embedder.from_pretrained(model, **options)  # OPENING is left
    try:
        with contextlib.chdir(source.parent):  # there the paths of images start
            v, infos = embedder.encode(items.values(), return_info=True, **encoding)
    except ItemError as e:
        raise ValueError(f"{list(items)[e.index]}: {e.why}") from e
    with open(f"{output}.tmp", "wb") as file:
        np.save(file, v)
    write_rows(facts, infos)  # before the vectors: a disk that fills up leaves both as they were
    os.replace(f"{output}.tmp", output)
    reasoned = sum(info["reasoned"] for info in infos)
    print(f"{output}: {v.shape[0]} vectors of {v.shape[1]} numbers; {reasoned} reasoned")


def main():
    parser = argparse.ArgumentParser(
        description="Lines of JSON (a string or an item object; image paths start at the file) -> "
        "vectors (.npy, float32) and, beside them, a .jsonl with reasoned, p_reason, rationale "
        "and new_tokens. The docstrings of Embedder explain the options.",
        argument_default=argparse.SUPPRESS,
        usage=argparse.SUPPRESS,  # a wrong option ends in one line
    )
    parser.add_argument("--model", required=True, help="checkpoint folder or hub id")
    parser.add_argument("--input", required=True, help="items, one JSON value a line")
    parser.add_argument("--output", required=True, help="vectors, a .npy file")
    for name, (kind, about) in {**OPENING, **ENCODING}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=about)
    try:
        run(**vars(parser.parse_args()))
    except (ValueError, OSError, torch.OutOfMemoryError) as e:
        sys.exit(f"embed.py: {e}")


if __name__ == "__main__":
    main()
