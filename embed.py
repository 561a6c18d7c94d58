"""
Pooling an MLLM into embeddings: one prompt, one token to pool, one space for direct and reasoned vectors.

The idea. A query (or target) is written as a chat turn and the model answers in one of two ways:

    <|im_start|>system\\n{instruction}<|im_end|>\\n<|im_start|>user\\n{video}{image}{text}<|im_end|>\\n<|im_start|>assistant\\n
        direct:   <|endoftext|>                                       e(x, ∅) = unit(final-norm state HERE)
        reason:   <think>\\n{rationale}\\n</think>\\n\\n<|endoftext|>      e(x, r) = unit(final-norm state HERE)

The decision is the first assistant token: p_reason = softmax over the logits of `<think>` and `<|endoftext|>` at the last prompt
token. A prefill that ends in <|endoftext|> therefore yields the direct vector and the decision at once: deciding not to reason
costs nothing over a plain embedder. The direct path is Qwen3-VL-Embedding's own format, so its weights are a valid start.

The maths. s(q, t) = e(q)·e(t);  InfoNCE = −log softmax_t( s(q, t) / 0.02 )[its target], both directions averaged; a negative that
equals the target, or that scores above the positive by more than 0.1, is masked as a probable false negative.

How to run:
    python embed.py --model runs/pocket/rl --input items.jsonl --output vectors.npy --reason auto

Left out: pooling other than the last token, multi-vector output, audio.
Sources: template, limits and video rules as in Qwen3-VL-Embedding, qwen-vl-utils 0.0.14 and transformers 4.57 (facts; every line is ours).
"""

import argparse
import base64
import binascii
import collections
import hashlib
import itertools
import json
import numbers
import os
import sys
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from PIL import Image
from tqdm import tqdm

from data import listed, load_picture
from model import FACTOR, Cache, Tokenizer, generate, levels, load, patchify, read_json, resize, rope_positions, save, smart_resize
from model import write_json

# ---------------------------------------------------------------------------------------------------------------------
# Reading: item -> prompt

MIN_PIXELS, MAX_PIXELS = 4 * 32 * 32, 1800 * 32 * 32             # a picture's area, as Qwen3-VL-Embedding looks at it
TOTAL_PIXELS = 10 * 768 * 32 * 32                                # a whole video's area, counted once per group of two frames
VIDEO_MIN, VIDEO_MAX = 128 * 32 * 32, 768 * 32 * 32              # one frame's area (qwen-vl-utils 0.0.14)


class Words(str):
    """Ordinary text of an item, as opposed to the template's: what `max_length` may cut."""


class Reader:
    """Turns items into prompts: {"ids": (S,) int64, "pixels": [(n, 1536) uint8 per picture or video], "grids": [(h, w) per segment]}.

    min_pixels, max_pixels  area of a picture. One that differs from Qwen's also holds for video frames (see `frame_limits`)
    max_frames              a bare list of more frames is thinned out to so many; {"frames", "fps"} never is
    fps                     assumed for frames that come without; Qwen's helper assumes 2 for a list of frames
    max_length              tokens of a prompt with its <|endoftext|>: ordinary text is cut at its end, markers and pictures never are
    Whatever cannot be read is a ValueError.
    """

    pad_to = 1                                                   # collate pads rows to a multiple of so many tokens: fewer shapes to compile

    def __init__(self, tokenizer, config, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS, max_frames=64, fps=2.0, max_length=8192):
        if not FACTOR**2 <= max_pixels >= min_pixels > 0:
            raise ValueError(f"pixel limits {min_pixels} ... {max_pixels}: expected 0 < min <= max and max at least 32 x 32")
        if max_frames < 1 or fps <= 0 or max_length < 1:
            raise ValueError(f"max_frames {max_frames}, fps {fps}, max_length {max_length}: expected numbers above 0")
        missing = [t for t in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>") if t not in tokenizer.special]
        if missing:
            raise ValueError(f"the tokenizer lacks the added token {missing[0]}, which every Qwen3 tokenizer has")
        markers = {"<|image_pad|>": config.image_token, "<|video_pad|>": config.video_token, "<|vision_start|>": config.vision_start,
                   "<|vision_end|>": config.vision_end}
        for name, i in markers.items():
            if (own := tokenizer.special.get(name)) != i:
                raise ValueError(f"{name} has the id {own} in the tokenizer and {i} in the model's config: not of one checkpoint")
        if tokenizer.size > config.vocab:
            raise ValueError(f"the tokenizer has {tokenizer.size} ids, the model's vocabulary {config.vocab}: not of one checkpoint")
        self.tok, self.c = tokenizer, config
        self.min_pixels, self.max_pixels, self.max_frames, self.fps, self.max_length = min_pixels, max_pixels, max_frames, fps, max_length
        s = tokenizer.special
        self.start, self.stop, self.end = s["<|im_start|>"], s["<|im_end|>"], s["<|endoftext|>"]
        self.think, self.unthink = s["<think>"], s["</think>"]
        self.prefix = [self.think, *tokenizer.encode("\n")]      # what opens a rationale ...
        self.tail = [*tokenizer.encode("\n\n"), self.end]        # ... and what follows </think>
        self.close = [*tokenizer.encode("\n"), self.unthink]     # forced on a rationale that ran out of tokens
        # never sampled: picture markers, padding and the like; of the added tokens only </think> may be written
        self.ban = sorted((set(s.values()) | set(range(tokenizer.size, config.vocab))) - {self.unthink})
        # what model.generate is told
        self.how = dict(prefix=self.prefix, stop=(self.unthink,), tail=self.tail, close=self.close, ban=self.ban)

    def rationale(self, text):
        """Rationale text -> its branch: ids from <think> to <|endoftext|>. The text is stripped; the parts are those of generation."""
        return [*self.prefix, *self.tok.encode(text.strip() + "\n"), self.unthink, *self.tail]

    def rationale_text(self, ids):
        """The inverse: ids of a branch -> the text between <think> and </think>."""
        inner = ids[len(self.prefix):]
        return self.tok.decode(inner[: inner.index(self.unthink)] if self.unthink in inner else inner).strip()

    def read(self, item, instruction=None):
        """item -> prompt. A str is text; a path (os.PathLike), PIL picture or bytes is a picture; a dict has any of "text", "image",
        "video" (values or lists) and "instruction", or "messages". The item's own instruction wins over the call's."""
        if item is None or isinstance(item, (list, tuple, bool, int, float)):
            raise ValueError(f"a {type(item).__name__}: expected a string, a picture, a path or a dict")
        if not isinstance(item, dict):
            item = {"text": item} if isinstance(item, str) else {"image": item}
        others = sorted(str(k) for k in item.keys() - {"text", "image", "video", "fps", "instruction", "messages"})
        if item and len(others) == len(item):
            raise ValueError(f"a dict with the keys {others}: expected text, image, video, instruction or messages")
        if others:                                               # an id, or a typing mistake
            warnings.warn(f"items: {', '.join(others)} is not read; what is: text, image, video, fps, instruction, messages", stacklevel=2)
        own = item.get("instruction")
        instruction = instruction if own is None else own
        pixels, grids = [], []
        if item.get("messages") is not None:
            if any(item.get(k) is not None for k in ("text", "image", "video")):
                raise ValueError("an item has messages, or text, image and video, but not both")
            pieces = self.messages(item["messages"], instruction, pixels, grids)
        else:
            video = item.get("video")
            several = isinstance(video, (list, tuple)) and video and all(isinstance(v, (list, tuple)) or is_clip(v) for v in video)
            videos = [] if video is None else video if several else [video]
            if item.get("fps") is not None:
                videos = [v if is_clip(v) else {"frames": v, "fps": item["fps"]} for v in videos]
            parts = {"video": videos, "image": listed(item.get("image")), "text": listed(item.get("text"))}       # Qwen's order
            content = [{kind: x} for kind, values in parts.items() for x in values]
            if all(p == {"text": ""} for p in content):
                content = "NULL"                                 # Qwen3-VL-Embedding's word for an empty item
            pieces = self.system(instruction) + self.turn("user", content, pixels, grids)
        return self.finish(pieces + [self.start, "assistant\n"], pixels, grids)

    def system(self, instruction):
        """The system turn; there only with an instruction, which ends in punctuation (Unicode category P*)."""
        if instruction is not None and not isinstance(instruction, str):
            raise ValueError(f"an instruction is a string, not {type(instruction).__name__}")
        text = (instruction or "").strip()
        if not text:
            return []
        text += "" if unicodedata.category(text[-1]).startswith("P") else "."
        return [self.start, "system\n", Words(text), self.stop, "\n"]

    def messages(self, messages, instruction, pixels, grids):
        """Chat messages [{"role", "content": str or [{"text"} | {"image"} | {"image_url"} | {"video", "fps"}]}] as they stand, so that
        text and pictures interleave freely; the instruction becomes the system turn unless there is one."""
        if not isinstance(messages, (list, tuple)) or not messages or not all(isinstance(m, dict) for m in messages):
            raise ValueError('messages: expected a list of {"role": ..., "content": ...}')
        pieces = [] if messages[0].get("role") == "system" else self.system(instruction)
        for m in messages:
            if m.get("role") not in ("system", "user", "assistant") or "content" not in m:
                raise ValueError(f"messages: {str(m)[:80]!r}: expected a role (system, user or assistant) and a content")
            pieces += self.turn(m["role"], m["content"], pixels, grids)
        return pieces

    def turn(self, role, content, pixels, grids):
        """One chat turn -> pieces: strings (Words may be cut) and ids of markers; pictures are appended to pixels and grids."""
        parts = [{"text": content}] if isinstance(content, str) else content
        if not isinstance(parts, (list, tuple)):
            raise ValueError(f"content of type {type(parts).__name__}: expected a string or a list of parts")
        pieces = [self.start, role + "\n"]
        for p in parts:
            p = {"text": p} if isinstance(p, str) else p
            if not isinstance(p, dict) or not p.keys() & {"text", "image", "image_url", "video"}:
                raise ValueError(f"a part of content is {str(p)[:80]!r}: expected a dict with text, image, image_url or video")
            if "video" in p:
                v = p["video"]
                pieces += self.video({"frames": v, "fps": p["fps"]} if "fps" in p and not is_clip(v) else v, pixels, grids)
            elif "text" in p:
                if not isinstance(p["text"], str):
                    raise ValueError(f"text is a {type(p['text']).__name__}, expected a string")
                pieces.append(Words(p["text"]))
            else:
                ref = p.get("image", p.get("image_url"))
                pieces += self.picture(ref.get("url", ref) if isinstance(ref, dict) else ref, pixels, grids)
        return pieces + [self.stop, "\n"]

    def picture(self, ref, pixels, grids):
        pic = load_picture(from_data_url(ref))
        h, w = smart_resize(pic.height, pic.width, self.min_pixels, self.max_pixels)
        patches, grid = patchify(resize(pic, h, w)[None])
        pixels.append(patches), grids.append(grid)
        return [self.c.vision_start, *[self.c.image_token] * (len(patches) // 4), self.c.vision_end]

    def frame_limits(self, n):
        """(min, max) area of each of a video's n frames. Qwen's: 128 visual tokens at least, at most 768 or this frame's share of the
        whole clip's. The picture's limits, where they are smaller or were chosen, hold for frames too."""
        low = VIDEO_MIN if self.min_pixels == MIN_PIXELS and self.max_pixels > VIDEO_MIN else min(VIDEO_MIN, self.min_pixels)
        top = max(min(VIDEO_MAX, TOTAL_PIXELS / n * 2), int(1.05 * low))                      # 1.05: Qwen's, too
        return low, min(top, self.max_pixels)

    def video(self, v, pixels, grids):
        """Two frames make a group: `<1.5 seconds>` and a picture's markers around it (transformers 4.57's wrapper). Not copied: Qwen's
        helper rounds the frames of a list to multiples of 64 first, and counts on where transformers repeats an odd last frame's time."""
        frames, fps = (v["frames"], v.get("fps")) if is_clip(v) else (v, None)
        if not isinstance(frames, (list, tuple)):
            raise ValueError(f'a video of type {type(frames).__name__}: expected a list of frames or {{"frames": [...], "fps": f}}')
        if not frames:
            raise ValueError("a video without frames: expected at least one")
        fps = self.fps if fps is None else fps
        if isinstance(fps, bool) or not isinstance(fps, numbers.Real) or not 0 < fps < float("inf"):
            raise ValueError(f"a video's fps is {fps!r}, expected a number above 0")
        if not is_clip(v) and len(frames) > self.max_frames:     # as Qwen3-VL-Embedding thins out a list
            frames = [frames[i] for i in np.linspace(0, len(frames) - 1, self.max_frames, dtype=int)]
        pics = [load_picture(from_data_url(f)) for f in frames]
        pics += pics[-1:] * (len(pics) % 2)                      # an odd last frame is shown twice
        h, w = [smart_resize(p.height, p.width, *self.frame_limits(len(pics))) for p in pics][0]           # of the first; an absurd one is refused
        patches, grid = patchify(np.stack([resize(p, h, w) for p in pics]))
        n, pieces = grid[0] * grid[1] // 4, []
        times = [min(i, len(frames) - 1) / fps for i in range(len(pics))]
        for g in range(len(pics) // 2):
            when = (times[2 * g] + times[2 * g + 1]) / 2
            pieces += [f"<{when:.1f} seconds>", self.c.vision_start, *[self.c.video_token] * n, self.c.vision_end]
            grids.append(grid)
        pixels.append(patches)
        return pieces

    def finish(self, pieces, pixels, grids):
        """Neighbouring strings are tokenised as one, so that "user\\n" + "\\nWhat" merges as it does in transformers. Then max_length."""
        ids, run, free = [], [], []                              # free: the stretches of ids that may be cut
        for p in [*pieces, None]:
            if isinstance(p, str):
                run.append(p)
                continue
            if not run:                                          # a picture's many markers
                ids += [] if p is None else [p]
                continue
            new, words = self.tok.encode("".join(run)), [i for i, s in enumerate(run) if isinstance(s, Words)]
            if words:                                            # the template's own tokens before and after the words stay
                before, after = (len(self.tok.encode("".join(s))) for s in (run[: words[0]], run[words[-1] + 1 :]))
                free.append((len(ids) + before, len(ids) + len(new) - after))
            ids, run = ids + new + ([] if p is None else [p]), []
        over = len(ids) + 1 - self.max_length
        for a, b in reversed(free):
            cut = max(0, min(over, b - a))
            ids, over = ids[: b - cut] + ids[b:], over - cut
        return {"ids": np.array(ids, dtype=np.int64), "pixels": pixels, "grids": grids}


def is_clip(v):
    """{"frames": [...], "fps": f}, as opposed to a frame given as {"bytes", "path"}."""
    return isinstance(v, dict) and "frames" in v


def from_data_url(ref):
    """A data: URL (as in chat requests) -> its bytes; any other reference as it is."""
    if not isinstance(ref, str) or not ref.startswith("data:"):
        return ref
    try:
        return base64.b64decode(ref.partition("base64,")[2], validate=True)
    except binascii.Error as e:
        raise ValueError(f"{ref[:40]}...: not a base64 data URL ({e})") from None


# ---------------------------------------------------------------------------------------------------------------------
# Collating: prompts and their branches -> a batch


def collate(prompts, reader, branches=None, device="cpu", multiple=None):
    """Prompts (of Reader.read) and, per row, a list of rationale branches -> the batch dict of model.Qwen3VL, and beside it
        ends (B, 1 + G) int64   where each branch ends: column 0 the direct <|endoftext|>, then the rationales; -1 where there is none
        prev (B, S) int64       the place whose logits predict this token (a branch's first: the prompt's last); -1 in the prompt and in padding
    S is rounded up to a multiple (reader.pad_to by default), so that a compiled model meets few lengths.
    Row layout: prompt, <|endoftext|> (branch 1), rationale 1 (branch 2), rationale 2 (branch 3), ...
    """
    branches = branches or [[] for _ in prompts]
    rows = [[[reader.end], *b] for b in branches]
    n = [len(p["ids"]) + sum(map(len, r)) for p, r in zip(prompts, rows)]
    to = multiple or reader.pad_to
    B, S, G = len(prompts), -(-max(n) // to) * to, max(map(len, rows))
    ids, pos = np.full((B, S), reader.end), np.ones((3, B, S), dtype=np.int64)
    branch, prev, ends = np.full((B, S), -1), np.full((B, S), -1), np.full((B, G), -1)
    for b, (p, row) in enumerate(zip(prompts, rows)):
        i = m = len(p["ids"])
        ids[b, :m], branch[b, :m] = p["ids"], 0
        pos[:, b, :m] = at = rope_positions(p["ids"], p["grids"], reader.c)
        first = at.max() + 1                                     # every branch starts where the prompt stops
        for g, tokens in enumerate(row):
            j = i + len(tokens)
            ids[b, i:j], branch[b, i:j], pos[:, b, i:j] = tokens, g + 1, first + np.arange(j - i)
            prev[b, i:j] = [m - 1, *range(i, j - 1)]
            ends[b, g], i = j - 1, j
    pixels = [x for p in prompts for x in p["pixels"]]
    plain = G == 1                                               # nothing but prompt + <|endoftext|>, padded on the right: causal is enough
    tensor = lambda x: torch.from_numpy(x).to(device)
    return {"ids": tensor(ids), "pos": tensor(pos), "lengths": torch.tensor(n, device=device), "branch": None if plain else tensor(branch),
            "pixels": levels(np.concatenate(pixels), device) if pixels else None, "grids": [g for p in prompts for g in p["grids"]],
            "ends": tensor(ends), "prev": tensor(prev)}


def pool(h, ends):
    """States (B, S, H) and places (B, G) -> unit vectors (B, G, H) in fp32; absent places (-1) give zeros."""
    at = h.gather(1, ends.clamp(min=0)[..., None].expand(-1, -1, h.shape[-1]))
    return F.normalize(at.float(), dim=-1) * (ends >= 0)[..., None]


def direct_vectors(model, reader, prompts):
    """e(x, ∅) of prompts: (n, H)."""
    batch = collate(prompts, reader, device=model.device)
    return pool(model(batch), batch["ends"])[:, 0]


def decision_logits(model, h, batch, reader):
    """fp32 logits (B, 2) of [<|endoftext|>, <think>] at the last prompt token; None without a head."""
    if not model.has_head:
        return None
    at = batch["prev"].gather(1, batch["ends"][:, :1])           # (B, 1): the place that predicts the direct <|endoftext|>
    state = h.gather(1, at[..., None].expand(-1, -1, h.shape[-1])).squeeze(1)
    rows = model.lm_head.weight[[reader.end, reader.think]]      # two rows of the head are enough
    return F.linear(state, rows.to(state.dtype)).float()


LOGITS = 1 << 28                                                 # so many logits at a time: a gigabyte in fp32; beyond that they are computed twice


def branch_logp(model, h, batch, reader, first=2):
    """Log-probabilities of the rationale tokens that the policy chooses: after the forced opening, up to and including </think>.

    -> logp (n,), row (n,), branch (n,): which row and which branch (0 = the first rationale) each token belongs to.
    `first` is the number of forced opening tokens. Banned ids have probability 0 here as they do in sampling.
    """
    branch, prev, ids = batch["branch"], batch["prev"], batch["ids"]
    if branch is None:
        return h.new_zeros(0), prev.new_zeros(0), prev.new_zeros(0)
    place = torch.arange(ids.shape[1], device=ids.device)
    fresh = branch != F.pad(branch, (1, 0), value=-2)[:, :-1]
    begin = torch.where(fresh, place, 0).cummax(1).values        # (B, S): where each token's branch begins
    stop = (ids == reader.unthink).long()
    stops = stop.cumsum(1) - stop                                # </think>s before a token; none within its branch: not closed yet
    chosen = (branch >= 2) & (place - begin >= first) & (stops == stops.gather(1, begin))
    row, col = chosen.nonzero(as_tuple=True)
    ban = torch.tensor(reader.ban, dtype=torch.long, device=h.device)

    def score(h, ids):                                           # (n, H) states, (n,) ids; logits (n, V) only where it matters
        return model.logits(h).index_fill(1, ban, float("-inf")).log_softmax(-1).gather(1, ids[:, None]).squeeze(1)

    some = max(1, LOGITS // reader.c.vocab)
    parts = list(zip(h[row, prev[row, col]].split(some), ids[row, col].split(some)))
    logp = score(*parts[0]) if len(parts) == 1 else torch.cat([checkpoint(score, *part, use_reentrant=False) for part in parts])
    return logp, row, branch[row, col] - 2


# ---------------------------------------------------------------------------------------------------------------------
# Contrastive learning


def false_negatives(scores, positive, same=None, margin=0.1):
    """scores (n, m) cosines, positive (n,) column of each row's target, same (n, m) True where a column equals the target
    -> bool (n, m): columns to leave out. Never the positive itself."""
    own = scores.gather(1, positive[:, None])
    out = scores > own + margin
    if same is not None:
        out = out | same
    return out.scatter(1, positive[:, None], False)


def info_nce(q, t, positive, temperature=0.02, same=None, margin=0.1, weights=None):
    """Symmetric InfoNCE. q (n, H) unit queries, t (m, H) unit targets and negatives, positive (n,) column of each query's target.

    Both directions: queries against all of t, and each positive target against all queries. same (n, m): see false_negatives.
    weights (n,) of the queries, normalised here; all alike by default. -> scalar.
    """
    s = q @ t.T                                                  # (n, m) cosines
    mask = false_negatives(s.detach(), positive, same, margin)
    forward = F.cross_entropy((s / temperature).masked_fill(mask, float("-inf")), positive, reduction="none")
    back = s[:, positive].T                                      # (n, n): row i = the target of query i against all queries
    own = torch.arange(len(q), device=q.device)
    mask = false_negatives(back.detach(), own, None if same is None else same[:, positive].T, margin)
    backward = F.cross_entropy((back / temperature).masked_fill(mask, float("-inf")), own, reduction="none")
    w = torch.ones_like(forward) if weights is None else weights
    return ((forward + backward) / 2 * w).sum() / w.sum()


def margin_score(q, t, target, temperature=0.02):
    """m(q, r) = log softmax over candidates of s/temperature, at the target. q (..., H), t (..., m, H) or (m, H), target (...) -> (...)."""
    return (torch.einsum("...h,...mh->...m", q, t) / temperature).log_softmax(-1).gather(-1, target[..., None]).squeeze(-1)


def chunks_of(lengths, budget, waste=1.25):
    """Indices sorted by length and cut where a chunk would exceed the budget of padded tokens, or its longest row be more than `waste`
    times its shortest."""
    order, out = np.argsort(lengths, kind="stable")[::-1].tolist(), []
    for i in order:
        if out and (len(out[-1]) + 1) * lengths[out[-1][0]] <= budget and lengths[i] * waste >= lengths[out[-1][0]]:
            out[-1].append(i)
        else:
            out.append([i])
    return out


def passes(lengths, number, budget, multiple=1):
    """What a step computes, pass by pass. lengths {kind: [tokens of each row]}, padded to a multiple -> chunks [(kind, rows)] for grad_cache; order,
    by which its vectors, of all ranks, come to the places number(kind, row) that they have in the joined batch; and whether one budget holds all."""
    lengths = {kind: [-(-n // multiple) * multiple for n in some] for kind, some in lengths.items()}
    chunks = [(kind, rows) for kind, n in lengths.items() for rows in chunks_of(n, budget)]
    order = np.argsort(sum(gather_objects([n for kind, rows in chunks for i in rows for n in number(kind, i)]), []))
    return chunks, order, sum(map(sum, lengths.values())) <= budget


def grad_cache(chunks, encode, loss_fn, fits=False):
    """GradCache: the gradient of a loss over ALL vectors, of all chunks and all ranks, with the memory of one chunk.

    encode(chunk) -> vectors (n, H) and a function that gives the chunk's extra loss, or None; it is called after loss_fn. encode(None)
    -> no rows, from a pass that counts nothing: ranks make equally many passes, because sharded layers meet in each.
    loss_fn(all vectors: rank after rank, chunk after chunk) -> scalar loss, on every rank the same.
    Once without gradients to get the vectors, then d loss / d vectors, of which this rank takes its own rows, then chunk by chunk again
    with gradients. fits: the activations of all chunks fit in memory at once; then they are kept, which is the same and half the work.
    -> (loss, sum of extras) as floats. Leaves in the parameters this rank's part of the gradient: the ranks' parts add up to the whole.
    """
    told = gather_objects((len(chunks), fits))
    chunks = [*chunks, *[None] * (max(n for n, _ in told) - len(chunks))]
    keep, total = all(fits or n <= 1 for n, fits in told), 0.0
    with torch.set_grad_enabled(keep):
        kept = [encode(c) if keep else (encode(c)[0], None) for c in chunks]
    sizes = [len(v) for v, _ in kept]
    vectors, first = gather_rows(torch.cat([v.detach() for v, _ in kept]))
    loss = loss_fn(vectors.requires_grad_())
    loss.backward()
    for i, g in enumerate(vectors.grad[first : first + sum(sizes)].split(sizes)):
        v, extra = kept[i] if keep else encode(chunks[i])
        kept[i] = None                                           # its activations may go
        surrogate = (v * g).sum()                                # its gradient is the chain rule's
        if extra is not None:
            value = extra()
            surrogate, total = surrogate + value, total + float(value.detach())
        surrogate.backward()
    return float(loss.detach()), sum(gather_objects(total))


NOTHING = {"ids": np.zeros(1, dtype=np.int64), "pixels": [], "grids": []}                     # the prompt of encode(None)


# ---------------------------------------------------------------------------------------------------------------------
# Ranks: what the processes of one torchrun tell each other. Alone, each of these is the identity


def ranks():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    return dist.get_rank() if ranks() > 1 else 0


def gather_objects(x):
    """[x of rank 0, x of rank 1, ...]; nobody goes on before all are here."""
    out = [x] * ranks()
    if ranks() > 1:
        dist.all_gather_object(out, x)
    return out


def gather_rows(x):
    """x (n, H), n differing from rank to rank -> the rows of all ranks, and where this rank's begin. No gradient: see grad_cache."""
    n = gather_objects(len(x))
    if len(n) == 1:
        return x, 0
    out = [x.new_empty(max(n), x.shape[1]) for _ in n]
    dist.all_gather(out, F.pad(x, (0, 0, 0, max(n) - len(x))))
    return torch.cat([rows[:m] for rows, m in zip(out, n)]), sum(n[: rank()])


def add_gradients(params):
    """The sum over ranks of every gradient. One that is absent on all ranks stays absent, so that AdamW's momentum rests as it does alone;
    sharded ones were added up in the backward pass."""
    here = [p for p in params if not is_sharded(p)]
    if ranks() == 1 or not here:
        return
    there = torch.tensor([p.grad is not None for p in here], dtype=torch.int32, device=here[0].device)
    dist.all_reduce(there)
    for p, n in zip(here, there.tolist()):
        if n:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)


def clip_gradients(params, limit):
    """Scale all gradients down to this norm of all of them together, the shards of other ranks among them -> the norm before."""
    local = [p.grad.to_local() for p in params if is_sharded(p)]
    if not local:
        return torch.nn.utils.clip_grad_norm_(params, limit)
    here = [p.grad for p in params if p.grad is not None and not is_sharded(p)]
    square = torch.nn.utils.get_total_norm(local) ** 2
    dist.all_reduce(square)
    norm = (square + torch.nn.utils.get_total_norm(here) ** 2).sqrt()
    torch._foreach_mul_(here + local, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def is_sharded(p):
    return hasattr(p, "full_tensor")                             # FSDP2's parameters are DTensors


def whole(x):
    """Containers with every sharded tensor gathered, for a file; on all ranks alike."""
    if isinstance(x, (dict, list)):
        return {k: whole(v) for k, v in x.items()} if isinstance(x, dict) else [whole(v) for v in x]
    return x.full_tensor().cpu() if is_sharded(x) else x


def like(x, p):
    """A tensor of a file in shards, where the parameter p is in shards and x of its shape."""
    return dist.tensor.distribute_tensor(x.to(p.device), p.device_mesh, p.placements) if is_sharded(p) and x.shape == p.shape else x


# ---------------------------------------------------------------------------------------------------------------------
# The contrastive step, shared by the warm-up of select and by embed (train.py)


def key_of(prompt):
    """Equal prompts have equal keys."""
    h = hashlib.blake2b(prompt["ids"].tobytes(), digest_size=12)
    for x in prompt["pixels"]:
        h.update(np.ascontiguousarray(x).tobytes())
    return h.hexdigest()


def columns_of(keys):
    """keys: of every pair of the joined batch those of its target and of its negatives -> {key: (column, pair, place)}. Equal ones share a
    column, embedded by the first pair that has it as its target, else as a negative; the targets' columns come first.

    [["a", "x"], ["b", "a", "y"]] -> {"a": (0, 0, 0), "b": (1, 1, 0), "x": (2, 0, 1), "y": (3, 1, 2)}
    """
    columns, places = {}, [(i, j) for i, some in enumerate(keys) for j in range(len(some))]
    for i, j in sorted(places, key=lambda place: place[1] > 0):
        columns.setdefault(keys[i][j], (len(columns), i, j))
    return columns


def cross_entropies(model, reader, h, batch, branches, labels, cfg, n_tokens, n_labels):
    """λ·CE(rationale tokens)/n_tokens + μ·CE(decision token)/n_labels of a batch's rows, and what went into it, as numbers.
    h (B, S, H) states; branches [B], labels [B] and cfg as in contrastive_step; n_tokens and n_labels count over the joined batch."""
    extra, found = h.new_zeros(()), dict(lm=0.0, decision=0.0, decision_right=0.0)
    if cfg.lm_weight and any(branches):
        logp, _, _ = branch_logp(model, h, batch, reader, len(reader.prefix))
        extra = extra - cfg.lm_weight * logp.sum() / n_tokens
        found["lm"] = -float(logp.detach().sum()) / n_tokens
    want = torch.tensor(labels, device=h.device)
    if cfg.decision_weight and bool((want >= 0).any()):
        logits = decision_logits(model, h, batch, reader)
        ce = F.cross_entropy(logits, want, ignore_index=-1, reduction="sum") / n_labels
        extra = extra + cfg.decision_weight * ce
        found["decision"] = float(ce.detach())
        found["decision_right"] = float(((logits.argmax(1) == want) & (want >= 0)).sum()) / n_labels
    return extra, found


def contrastive_step(model, reader, pairs, branches, labels, cfg, latent=False):
    """L = NCE(direct) + NCE(reasoned) + λ·CE(rationale tokens) + μ·CE(decision token), one update's gradients.

    pairs [B] of Pairs; branches [B]: a rationale branch or None (no reasoned path for this pair); labels [B]: 1 reason, 0 direct,
    -1 no decision to learn. Equal targets are embedded once and never serve as each other's negatives. All this is one rank's share of a
    batch; the loss is that of the joined one. -> its metrics.
    latent: the rationale is a guess, good or bad; within the batch it counts in proportion to its posterior against the empty one,
    p(t|q,r) / (p(t|q,r) + p(t|q,∅)).
    cfg: temperature, negatives (hard ones used per pair), lm_weight λ, decision_weight μ, chunk_tokens.
    """
    model.train()
    device = model.device
    candidates = [[p["target"], *p["negatives"][: cfg.negatives]] for p in pairs]
    mine = [([p["answer"], *map(key_of, some[1:])], len(b or []), label) for p, some, b, label in zip(pairs, candidates, branches, labels)]
    told = gather_objects(mine)
    joined, first = sum(told, []), sum(map(len, told[: rank()]))
    columns = columns_of([keys for keys, *_ in joined])
    own = [(n, candidates[i - first][j]) for n, i, j in columns.values() if 0 <= i - first < len(pairs)]                  # what this rank embeds
    lengths = torch.tensor([length for _, length, _ in joined])
    positive, N = torch.tensor([columns[keys[0]][0] for keys, *_ in joined], device=device), len(joined)
    n_tokens = max(1, sum(n - len(reader.prefix) - len(reader.tail) for n in lengths.tolist() if n))
    n_labels = max(1, sum(label >= 0 for *_, label in joined))
    tokens = dict(query=[len(p["query"]["ids"]) + 1 + len(b or []) for p, b in zip(pairs, branches)], target=[len(t["ids"]) + 1 for _, t in own])
    # vectors are numbered: N direct ones, N reasoned ones (some absent), the columns
    number = lambda kind, i: [2 * N + own[i][0]] if kind == "target" else [first + i, N + first + i] if branches[i] else [first + i]
    chunks, order, fits = passes(tokens, number, cfg.chunk_tokens, reader.pad_to)
    parts, losses = dict(lm=0.0, decision=0.0, decision_right=0.0), {}

    def encode(chunk):
        kind, rows = chunk or ("nothing", [])
        if kind != "query":
            return direct_vectors(model, reader, [own[i][1] for i in rows] or [NOTHING])[: len(rows)], None
        batch = collate([pairs[i]["query"] for i in rows], reader, [[branches[i]] if branches[i] else [] for i in rows], device)
        h = model(batch)
        return pool(h, batch["ends"])[batch["ends"] >= 0], lambda: beside(h, batch, rows)

    def beside(h, batch, rows):
        some, own = [branches[i] for i in rows], [labels[i] for i in rows]
        extra, found = cross_entropies(model, reader, h, batch, some, own, cfg, n_tokens, n_labels)
        parts.update({key: parts[key] + x for key, x in found.items()})
        return extra

    def loss_fn(v):
        has = (lengths > 0).to(device)
        direct, reason, t = v[order].split([N, int(has.sum()), len(columns)])
        weight, m = None, lambda q, of: margin_score(q.detach(), t.detach(), of, cfg.temperature)
        if latent:                                               # E-step: how well r explains t, against ∅
            weight = (m(reason, positive[has]) - m(direct, positive)[has]).sigmoid()
        for name, q, of, w in (("direct", direct, positive, None), ("reason", reason, positive[has], weight)):
            losses[name] = info_nce(q, t, of, cfg.temperature, F.one_hot(of, len(t)).bool(), weights=w) if len(q) else v.new_zeros(())
        return losses["direct"] + losses["reason"]

    loss, extra = grad_cache(chunks, encode, loss_fn, fits)
    told = gather_objects(parts)
    return dict(loss=loss + extra, nce_direct=float(losses["direct"].detach()), nce_reason=float(losses["reason"].detach()),
                **{k: sum(x[k] for x in told) for k in parts}, ids=[p["id"] for p in pairs])


# ---------------------------------------------------------------------------------------------------------------------
# The Embedder: items in, vectors out


class ItemError(ValueError):
    """What is wrong with one of the items; `index` says which (counted from 0)."""

    def __init__(self, index, why):
        super().__init__(f"item {index}: {why}")
        self.index = index


class Embedder:
    """A model and the Reader of its items. `from_pretrained` opens any dense Qwen3-VL or Qwen3-VL-Embedding, and checkpoints of ours.

    An item is a str (text), a path or PIL picture, {"text", "image", "video", "instruction"} (values or lists; a video is a list of
    frames or {"frames": [...], "fps": f}) or {"messages": [...]}; see Reader.read. Every mixture may share a batch.
    """

    budget = 16384                                               # tokens of a padded batch: this bounds memory, not the number of items

    def __init__(self, model, reader):
        self.model, self.reader = model, reader

    @classmethod
    def from_pretrained(cls, path_or_id, device=None, dtype=None, max_pixels=None, min_pixels=None, max_frames=None, fps=None,
                        max_length=None, compile=False):
        """A folder, or the id of a repository on the Hugging Face hub. device: CUDA when there is one. dtype: "bfloat16",
        torch.float32 ...; None and "auto" keep the file's. compile: see Qwen3VL.compile_layers; pays for many batches. Limits: the argument,
        else what a checkpoint of ours says, else the Reader's."""
        folder = find_folder(path_or_id)
        dtype = None if dtype == "auto" else getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ValueError(f"dtype {dtype!r}: expected bfloat16, float16 or float32")
        limits = saved_limits(folder)
        given = dict(max_pixels=max_pixels, min_pixels=min_pixels, max_frames=max_frames, fps=fps, max_length=max_length)
        limits.update({k: v for k, v in given.items() if v is not None})
        tokenizer = Tokenizer.load(folder)
        model = load(folder, dtype, find_device(device))
        return cls(model.compile_layers() if compile else model, Reader(tokenizer, model.c, **limits))

    @torch.no_grad()
    def encode(self, items, instruction=None, reason="auto", tau=0.5, dim=None, batch_size=16, normalize=True, convert_to_numpy=True,
               show_progress=None, return_info=False, max_new_tokens=128, temperature=0.0, generator=None):
        """items: an item, or a list or any other iterable of them (a generator is read piece by piece) -> (n, d) float32, numpy or torch.

        One item alone is a list of one: (1, d).
        reason       "auto": the model decides, by p_reason > tau; "never"; "always". A checkpoint without a head can only embed directly.
        dim          the first dim numbers (Matryoshka), renormalised; normalize=False leaves the raw states, sliced only
        batch_size   at most; a batch holds at most `budget` tokens. The order of the batches is ours, that of the results is yours
        max_new_tokens, temperature, generator   of the rationales: greedy by default, closed by force when they do not end
        return_info  also [{"reasoned": bool, "p_reason": float or None without a head, "rationale": str or None, "new_tokens": int}]
        ItemError (a ValueError) names an item that cannot be read.
        """
        self.check_options(reason, tau, dim, batch_size, max_new_tokens, temperature)
        single = isinstance(items, (str, bytes, dict, os.PathLike, Image.Image))
        items = [items] if single else items
        if not hasattr(items, "__iter__") and not hasattr(items, "__getitem__"):
            raise ValueError(f"items is a {type(items).__name__}: expected an item, or a list or another iterable of them")
        total = len(items) if hasattr(items, "__len__") else None
        vectors, infos = [torch.zeros(0, self.model.c.hidden)], []
        quiet = True if total is not None and total <= batch_size else None      # None: shown in a terminal only
        with tqdm(total=total, unit="item", desc="encode", disable=quiet if show_progress is None else not show_progress) as bar:
            for prompts in self.windows(items, instruction, batch_size):
                out, info = torch.empty(len(prompts), self.model.c.hidden), {}
                for rows in self.batches([len(p["ids"]) + 1 for p in prompts], batch_size):
                    try:
                        v, facts = self.embed([prompts[i] for i in rows], reason, tau, max_new_tokens, temperature, generator)
                    except torch.OutOfMemoryError as e:
                        longest = len(prompts[rows[0]]["ids"]) + 1
                        raise torch.OutOfMemoryError(f"out of memory with {len(rows)} rows of up to {longest} tokens: lower the token budget "
                                                     f"(Embedder.budget, now {self.budget}), batch_size or max_pixels") from e
                    out[rows] = v.cpu()
                    info.update(zip(rows, facts))
                    bar.update(len(rows))
                vectors.append(out), infos.extend(info[i] for i in range(len(prompts)))
        v = torch.cat(vectors)[:, :dim]
        v = F.normalize(v, dim=-1) if normalize else v
        v = v.contiguous().numpy() if convert_to_numpy else v
        return (v, infos) if return_info else v

    def check_options(self, reason, tau, dim, batch_size, max_new_tokens, temperature):
        if reason not in ("auto", "never", "always"):
            raise ValueError(f"reason={reason!r}: expected 'auto', 'never' or 'always'")
        count = lambda x: isinstance(x, (int, np.integer)) and not isinstance(x, bool) and x > 0
        number = lambda x: isinstance(x, (int, float, np.number)) and not np.isnan(x)
        if dim is not None and not (count(dim) and dim <= self.model.c.hidden):
            raise ValueError(f"dim={dim}: this model's vectors have 1 to {self.model.c.hidden} numbers")
        if not (count(batch_size) and count(max_new_tokens) and number(temperature) and temperature >= 0):
            raise ValueError(f"batch_size={batch_size}, max_new_tokens={max_new_tokens}, temperature={temperature}: expected at least 1, 1 and 0")
        if not number(tau):
            raise ValueError(f"tau={tau}: expected a number")
        if not self.model.has_head and reason != "never":
            if reason == "always":
                self.model.logits(None)                          # raises, and says why
            warnings.warn("this checkpoint has no lm_head: it cannot decide to reason, everything is embedded directly", stacklevel=4)

    def windows(self, items, instruction, batch_size):
        """Lists of prompts, each long enough to sort and short enough to hold: up to 16 batches or 4 token budgets. 32 items
        are read ahead."""
        def read(numbered):
            try:
                return self.reader.read(numbered[1], instruction)
            except ValueError as e:
                raise ItemError(numbered[0], e) from e

        window, tokens, numbered, ahead = [], 0, enumerate(items), collections.deque()
        with ThreadPoolExecutor(torch.get_num_threads()) as readers:         # they resize outside Python's lock, also while the model computes
            while True:
                ahead.extend(readers.submit(read, x) for x in itertools.islice(numbered, 32 - len(ahead)))
                if not ahead:
                    break
                window.append(ahead.popleft().result())
                tokens += len(window[-1]["ids"])
                if len(window) == 16 * batch_size or tokens > 4 * self.budget:
                    yield window
                    window, tokens = [], 0
        if window:
            yield window

    def batches(self, lengths, batch_size):
        """Indices, longest first (what does not fit fails at once), in batches of rows x longest row <= budget; at most a third is padding.
        On a CPU 2048 tokens are enough: more are no quicker (results/tuning.txt), and pad more."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        budget = min(self.budget, 2048) if self.model.device.type == "cpu" else self.budget
        while order:
            longest = lengths[order[0]]
            n = max(1, min(batch_size, budget // longest, sum(lengths[i] * 1.5 >= longest for i in order)))
            yield order[:n]
            order = order[n:]

    def embed(self, prompts, reason, tau, max_new, temperature=0.0, generator=None):
        """One batch -> raw states (n, H) fp32 and the infos. One prefill gives the direct vector and the decision; only the rows that
        reason go on from its cache."""
        model, reader = self.model, self.reader
        batch = collate(prompts, reader, device=model.device, multiple=64 if model.compiled else None)
        cache = Cache() if reason != "never" and model.has_head else None
        h = model(batch, cache)
        v = h.gather(1, batch["ends"][..., None].expand(-1, -1, h.shape[-1]))[:, 0].float()   # (n, H) at <|endoftext|>
        logits = decision_logits(model, h, batch, reader)
        p = None if logits is None else logits.softmax(-1)[:, 1].tolist()
        info = [dict(reasoned=False, p_reason=p and p[i], rationale=None, new_tokens=0) for i in range(len(prompts))]
        rows = [i for i in range(len(prompts)) if cache is not None and (reason == "always" or p[i] > tau)]
        if rows:
            at = torch.tensor(rows, device=model.device)
            out = generate(model, batch, max_new, **reader.how, temperature=temperature, generator=generator, prefill=(h, cache), rows=at)
            v[at] = out["last"][:, 0].float()
            for j, i in enumerate(rows):
                info[i].update(reasoned=True, rationale=reader.rationale_text(out["tokens"][j][0]), new_tokens=int(out["new"][j, 0]))
        return v, info

    def encode_query(self, items, instruction=None, **options):
        """What is searched for: it may reason (reason="auto")."""
        return self.encode(items, instruction, **options)

    def encode_document(self, items, instruction=None, **options):
        """What is searched in: embedded directly unless asked otherwise, so that only queries pay for reasoning."""
        return self.encode(items, instruction, **{"reason": "never", **options})

    def process(self, items, normalize=True, instruction=None):
        """Qwen3VLEmbedder's name for the direct path: a torch tensor (n, H) on the model's device. Qwen's own wrapper writes the
        instruction "Represent the user's input." where an item has none; ours writes none unless it is given here."""
        return self.encode(items, instruction, "never", normalize=normalize, convert_to_numpy=False).to(self.model.device)

    def similarity(self, a, b):
        """Cosines of vectors (n, d) and (m, d), numpy or torch -> torch (n, m)."""
        a, b = (F.normalize(torch.as_tensor(x).float(), dim=-1) for x in (a, b))
        return a @ b.T

    def save(self, folder, base=None, card=None):
        """A folder that opens here, in transformers, in sentence-transformers and in vLLM's pooling runner (the latter two: direct path
        only). base: what it was trained from (hub id or folder), card: how (markdown); both go into the model card."""
        reader = self.reader
        save(self.model, folder, reader.tok, (reader.min_pixels, reader.max_pixels))
        for name, value in side_files(self.model.c.hidden, reader).items():
            os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
            write_json(os.path.join(folder, name), value)
        for name, text in (("chat_template.jinja", TEMPLATE), ("README.md", model_card(self, base, card))):
            with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
                f.write(text)


def find_device(name=None):
    """"cpu", "cuda", "cuda:1" ... -> torch.device; None: CUDA when there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):     # others were never tried
        raise ValueError(f"device {name!r}: expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r}: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs; use --device cpu")
    return device


def find_folder(path_or_id):
    """A local folder as it is, without any network; otherwise "owner/name" on the hub, of which only data files are fetched."""
    path = os.fspath(path_or_id)
    if os.path.isdir(path):
        return path
    if os.path.exists(path) or path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise ValueError(f"{path}: expected a checkpoint folder or the id owner/name of one on the Hugging Face hub")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(path, allow_patterns=["*.json", "*.safetensors"])
    except (OSError, ValueError) as e:                           # the hub's errors are OSErrors, of many lines
        why = " ".join(str(e).split())[:160]
        raise ValueError(f"{path}: no such folder, and the hub does not give it ({type(e).__name__}: {why})") from e


def saved_limits(folder):
    """The Reader's limits in a checkpoint of ours, which embedder_config.json tells from others. The picture limits stand in
    preprocessor_config.json, where transformers looks for them too; there an Instruct checkpoint of Qwen's has quite other ones."""
    mark = os.path.join(folder, "embedder_config.json")
    if not os.path.exists(mark):
        return {}
    where = os.path.join(folder, "preprocessor_config.json")
    try:
        size, own = read_json(where)["size"], read_json(mark)
        limits = dict({k: own[k] for k in ("max_frames", "fps", "max_length")}, min_pixels=size["shortest_edge"], max_pixels=size["longest_edge"])
        return {k: v + 0 for k, v in limits.items()}             # what is not a number is a TypeError
    except (KeyError, TypeError) as e:
        raise ValueError(f"{where} or {mark}: no limits where we write them ({type(e).__name__}: {e})") from None


# ---------------------------------------------------------------------------------------------------------------------
# What a saved folder holds beside the model, for other programs

# Qwen3-VL's chat format, as much of it as an embedder needs.
TEMPLATE = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' or part.type == 'image_url' or 'image' in part or 'image_url' in part -%}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif part.type == 'video' or 'video' in part -%}{{- '<|video_pad|>' -}}"
    "{%- elif 'text' in part -%}{{- part.text -}}{%- endif -%}{%- endfor -%}{%- endif -%}{{- '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


def side_files(hidden, reader):
    """{file name: JSON value} for sentence-transformers (which vLLM reads too) and the tokenizer's settings."""
    kind = "sentence_transformers."
    modules = [("", "base.modules.transformer.Transformer"), ("1_Pooling", "sentence_transformer.modules.pooling.Pooling"),
               ("2_Normalize", "base.modules.normalize.Normalize")]
    forward = {"method": "forward", "method_output_name": "last_hidden_state"}
    modalities = {"text": forward, "image": forward, "image+text": forward, "message": {**forward, "format": "structured"}}
    return {
        "embedder_config.json": dict(max_frames=reader.max_frames, fps=reader.fps, max_length=reader.max_length),
        "modules.json": [dict(idx=i, name=str(i), path=path, type=kind + name) for i, (path, name) in enumerate(modules)],
        "config_sentence_transformers.json": dict(model_type="SentenceTransformer", prompts={"query": "", "document": ""},
                                                  default_prompt_name=None, similarity_fn_name="cosine"),
        "sentence_bert_config.json": dict(transformer_task="feature-extraction", modality_config=modalities,
                                          module_output_name="token_embeddings",
                                          processing_kwargs={"chat_template": {"add_generation_prompt": True}}),
        "1_Pooling/config.json": dict(embedding_dimension=hidden, pooling_mode="lasttoken", include_prompt=True),
        "2_Normalize/config.json": {},
        "tokenizer_config.json": dict(tokenizer_class="Qwen2Tokenizer", pad_token="<|endoftext|>", eos_token="<|im_end|>", bos_token=None,
                                      unk_token=None, add_prefix_space=False, clean_up_tokenization_spaces=False, errors="replace",
                                      padding_side="right", model_max_length=reader.max_length),
    }


def model_card(embedder, base, card):
    """README.md of a saved folder: the YAML head that hubs index, how to use it, how it was trained."""
    reader, d = embedder.reader, embedder.model.c.hidden
    hub = base is not None and base.count("/") == 1 and not base.startswith((".", "/")) and not os.path.exists(base)
    head = ["library_name: sentence-transformers", "pipeline_tag: feature-extraction", *([f"base_model: {base}"] if hub else []),
            "tags:", "- multimodal-embedding", "- sentence-similarity", "- feature-extraction", "- qwen3_vl"]
    text = f"""
# A multimodal embedder that may reason first

Text, pictures and video to unit vectors of {d} numbers, for cosine similarity. The model decides by its first token whether to write a
rationale before it embeds. Pictures of {reader.min_pixels:,} to {reader.max_pixels:,} pixels, up to {reader.max_length:,} tokens.

```python
from embed import Embedder
model = Embedder.from_pretrained("this folder")
q = model.encode_query([{{"text": "a red cup", "image": "photo.jpg"}}], instruction="Find the picture.")
d = model.encode_document([{{"image": "cup.jpg"}}, "a text"])
model.similarity(q, d)
```

transformers (Qwen3VLForConditionalGeneration) opens this folder whole; sentence-transformers and vLLM's pooling runner open the direct
path (no rationale).

## How it was trained

{f"From {base}." if base else ""}
{card or "Not said."}
"""
    return "\n".join(["---", *head, "---", text])


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def jsonl_items(path, lines):
    """The items of a JSONL file; blank lines are skipped; `lines` collects the line number of each. Pictures are relative to the file."""
    folder = os.path.dirname(os.path.abspath(path))
    with open(path, encoding="utf-8-sig") as f:
        for n, line in enumerate(f, 1):
            if line.strip():
                lines.append(n)
                try:
                    item = json.loads(line)
                except (ValueError, RecursionError) as e:        # numbers of 5,000 digits, a thousand brackets
                    raise ValueError(f"{path}, line {n}: not valid JSON ({e})") from None
                yield rooted(item, folder) if isinstance(item, dict) else item


def rooted(x, folder, picture=False):
    """An item with the paths of its pictures taken relative to folder; a new object, the old one is untouched. picture: x is one, or some."""
    if isinstance(x, list):
        return [rooted(v, folder, picture) for v in x]
    if isinstance(x, dict):
        inside = dict(image=True, image_url=True, video=True, messages=False, content=False)
        deeper = dict.fromkeys(("frames", "path", "url"), True) if picture else inside
        return {k: rooted(v, folder, deeper[k]) if k in deeper else v for k, v in x.items()}
    return os.path.join(folder, x) if picture and isinstance(x, str) and not x.startswith("data:") else x


def checked(o):
    """What can be refused before a model is loaded -> the name of the facts' file."""
    if not o.output.endswith(".npy"):
        raise ValueError(f"--output {o.output}: expected a name that ends in .npy")
    for path, what, there in ((o.input, "input", os.path.exists), (os.path.dirname(os.path.abspath(o.output)), "output folder", os.path.isdir)):
        if not there(path):
            raise ValueError(f"{path}: no such {what}")
    if os.path.isdir(o.output):
        raise ValueError(f"--output {o.output}: a folder")
    if not np.isfinite(o.tau):
        raise ValueError(f"--tau {o.tau}: expected a number")
    facts = o.output[: -len(".npy")] + ".jsonl"
    if os.path.realpath(facts) == os.path.realpath(o.input):
        raise ValueError(f"--output {o.output}: its facts would overwrite the input {o.input}")
    return facts


def main():
    a = argparse.ArgumentParser(description="Items (JSONL: a string or an item object a line) -> vectors (.npy, float32) and, beside them, "
                                            "a .jsonl with reasoned, p_reason, rationale and new_tokens of each.")
    a.add_argument("--model", required=True, help="checkpoint folder or hub id")
    a.add_argument("--input", required=True, help="JSONL; paths of pictures are relative to it")
    a.add_argument("--output", required=True, help="vectors.npy; the facts go to vectors.jsonl")
    a.add_argument("--reason", default="auto", choices=["auto", "never", "always"])
    a.add_argument("--tau", type=float, default=0.5, help="auto: reason when p_reason > tau")
    a.add_argument("--dim", type=int, help="keep the first so many numbers, renormalised")
    a.add_argument("--instruction", help="for items that have none of their own")
    a.add_argument("--max-new-tokens", type=int, default=128)
    a.add_argument("--batch-size", type=int, default=16)
    a.add_argument("--device")
    a.add_argument("--dtype", help="bfloat16, float16 or float32; the checkpoint's by default")
    for name in ("min-pixels", "max-pixels", "max-frames", "max-length"):
        a.add_argument("--" + name, type=int)
    a.add_argument("--fps", type=float)
    o, lines = a.parse_args(), []
    try:
        facts = checked(o)
        model = Embedder.from_pretrained(o.model, o.device, o.dtype, o.max_pixels, o.min_pixels, o.max_frames, o.fps, o.max_length)
        v, infos = model.encode(jsonl_items(o.input, lines), o.instruction, o.reason, o.tau, o.dim, o.batch_size, return_info=True,
                                max_new_tokens=o.max_new_tokens)
        np.save(o.output, v)
        with open(facts, "w", encoding="utf-8") as f:
            f.writelines(json.dumps(info, ensure_ascii=False) + "\n" for info in infos)
    except ItemError as e:
        sys.exit(f"embed.py: {o.input}, line {lines[e.index]}: {e}")
    except UnicodeDecodeError as e:
        sys.exit(f"embed.py: {o.input}: not UTF-8 ({e})")
    except (ValueError, OSError, torch.OutOfMemoryError) as e:
        sys.exit(f"embed.py: {e}")
    reasoned = sum(info["reasoned"] for info in infos)
    tokens = sum(info["new_tokens"] for info in infos)
    print(f"{len(v)} vectors of {v.shape[1]} numbers in {o.output}; {reasoned} reasoned, {tokens} tokens written")


if __name__ == "__main__":
    main()
