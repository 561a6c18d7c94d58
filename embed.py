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
Sources: design.md sections 2, 3 and 7; template and limits as in Qwen3-VL-Embedding.
"""

import math
import unicodedata

import numpy as np
import torch
import torch.nn.functional as F

from data import load_picture
from model import FACTOR, LEVELS, patchify, resize, rope_positions, smart_resize

# ---------------------------------------------------------------------------------------------------------------------
# Reading: item -> prompt

MIN_PIXELS, MAX_PIXELS = 4 * 32 * 32, 1800 * 32 * 32             # a picture's area, as Qwen3-VL-Embedding looks at it
TOTAL_PIXELS = 10 * 768 * 32 * 32                                # a whole video's area, times two frames a group
VIDEO_MIN, VIDEO_MAX = 128 * 32 * 32, 768 * 32 * 32              # one frame's area (qwen-vl-utils 0.0.14)


class Reader:
    """Turns items into prompts: {"ids": (S,) int64, "pixels": [(n, 1536) uint8 per segment group], "grids": [(h, w) per segment]}.

    limits are in pixels; fps is assumed for frames that come without; max_length cuts text (never markers or pictures).
    """

    def __init__(self, tokenizer, config, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS, max_frames=64, fps=1.0, max_length=8192):
        self.tok, self.c = tokenizer, config
        self.min_pixels, self.max_pixels, self.max_frames, self.fps, self.max_length = min_pixels, max_pixels, max_frames, fps, max_length
        s = tokenizer.special
        self.start, self.stop, self.end = s["<|im_start|>"], s["<|im_end|>"], s["<|endoftext|>"]
        self.think, self.unthink = s["<think>"], s["</think>"]
        self.prefix = [self.think, *tokenizer.encode("\n")]      # what opens a rationale ...
        self.tail = [*tokenizer.encode("\n\n"), self.end]        # ... and what follows </think>
        self.close = [*tokenizer.encode("\n"), self.unthink]     # forced on a rationale that ran out of tokens
        # never sampled: picture markers, padding and the like; of the added tokens only </think> may be written
        self.ban = sorted(set(s.values()) - {self.unthink}) + list(range(tokenizer.size, config.vocab))

    def rationale(self, text):
        """Rationale text -> its branch: ids from <think> to <|endoftext|>. The text is stripped; the parts are those of generation."""
        return [*self.prefix, *self.tok.encode(text.strip() + "\n"), self.unthink, *self.tail]

    def rationale_text(self, ids):
        """The inverse: ids of a branch -> the text between <think> and </think>."""
        inner = ids[len(self.prefix):]
        return self.tok.decode(inner[: inner.index(self.unthink)] if self.unthink in inner else inner).strip()

    def read(self, item, instruction=None):
        """item: str, PIL picture, path or dict (design.md section 7) -> prompt. The item's own instruction wins over the call's."""
        if not isinstance(item, dict):
            item = {"text": item} if isinstance(item, str) else {"image": item}
        many = lambda x: [] if x is None else list(x) if isinstance(x, (list, tuple)) else [x]
        videos = item.get("video")
        videos = [] if videos is None else videos if isinstance(videos, list) and videos and isinstance(videos[0], (list, tuple, dict)) else [videos]
        pieces = self.system(item.get("instruction") or instruction) + [self.start, "user\n"]
        pixels, grids = [], []
        for v in videos:
            pieces += self.video(v, pixels, grids)
        for picture in many(item.get("image")):
            pieces += self.picture(picture, pixels, grids)
        texts = "".join(many(item.get("text")))
        if not texts and not pixels:
            texts = "NULL"                                       # Qwen3-VL-Embedding's word for an empty item
        return self.finish(pieces + [texts, self.stop, "\n", self.start, "assistant\n"], pixels, grids)

    def system(self, instruction):
        """The system turn; there only with an instruction, which ends in punctuation (Unicode category P*)."""
        text = (instruction or "").strip()
        if not text:
            return []
        text += "" if unicodedata.category(text[-1]).startswith("P") else "."
        return [self.start, "system\n" + text, self.stop, "\n"]

    def picture(self, ref, pixels, grids):
        pic = load_picture(ref)
        h, w = smart_resize(pic.height, pic.width, self.min_pixels, self.max_pixels)
        patches, grid = patchify(resize(pic, h, w)[None])
        pixels.append(patches), grids.append(grid)
        return [self.c.vision_start, *[self.c.image_token] * (len(patches) // 4), self.c.vision_end]

    def video(self, v, pixels, grids):
        """Two frames make a group: `<1.5 seconds>` and a picture's markers around it (transformers 4.57's wrapper)."""
        frames, fps = (v["frames"], v.get("fps") or self.fps) if isinstance(v, dict) else (v, self.fps)
        pics = [load_picture(f) for f in frames]
        if not pics:
            raise ValueError("a video without frames")
        pics += pics[-1:] * (len(pics) % 2)                      # an odd last frame is shown twice
        top = max(min(VIDEO_MAX, TOTAL_PIXELS / len(pics) * 2), int(1.05 * VIDEO_MIN))
        low = min(VIDEO_MIN, self.min_pixels) if self.min_pixels != MIN_PIXELS else VIDEO_MIN
        h, w = smart_resize(pics[0].height, pics[0].width, low, min(top, self.max_pixels))
        patches, grid = patchify(np.stack([resize(p, h, w) for p in pics]))
        n, pieces = grid[0] * grid[1] // 4, []
        times = [min(i, len(frames) - 1) / fps for i in range(len(pics))]
        for g in range(len(pics) // 2):
            pieces += [f"<{(times[2 * g] + times[2 * g + 1]) / 2:.1f} seconds>", self.c.vision_start, *[self.c.video_token] * n, self.c.vision_end]
            grids.append(grid)
        pixels.append(patches)
        return pieces

    def finish(self, pieces, pixels, grids):
        """Neighbouring texts are tokenised as one, so that "user\\n" + "\\nWhat" merges as it does in transformers."""
        ids, words = [], ""
        for p in [*pieces, None]:
            if isinstance(p, str):
                words += p
            else:
                ids += self.tok.encode(words) + ([] if p is None else [p])
                words = ""
        return {"ids": np.array(ids, dtype=np.int64), "pixels": pixels, "grids": grids}


# ---------------------------------------------------------------------------------------------------------------------
# Collating: prompts and their branches -> a batch


def collate(prompts, reader, branches=None, device="cpu", pad_left=False):
    """Prompts (of Reader.read) and, per row, a list of rationale branches -> the batch dict of model.Qwen3VL, and beside it
        ends (B, 1 + G) int64   where each branch ends: column 0 the direct <|endoftext|>, then the rationales; -1 where there is none
        prev (B, S) int64       the place whose logits predict this token (for a branch's first token: the last of the prompt); -1 in the prompt
    Row layout: prompt, <|endoftext|> (branch 1), rationale 1 (branch 2), rationale 2 (branch 3), ...
    """
    branches = branches or [[] for _ in prompts]
    rows = [[[reader.end], *b] for b in branches]
    n = [len(p["ids"]) + sum(map(len, r)) for p, r in zip(prompts, rows)]
    B, S, G = len(prompts), max(n), max(map(len, rows))
    ids, pos = np.full((B, S), reader.end), np.ones((3, B, S), dtype=np.int64)
    branch, prev, ends = np.full((B, S), -1), np.full((B, S), -1), np.full((B, G), -1)
    for b, (p, row) in enumerate(zip(prompts, rows)):
        o, m = (S - n[b] if pad_left else 0), len(p["ids"])
        ids[b, o : o + m], branch[b, o : o + m] = p["ids"], 0
        pos[:, b, o : o + m] = at = rope_positions(p["ids"], p["grids"], reader.c)
        i, first = o + m, at.max() + 1                           # every branch starts where the prompt stops
        for g, tokens in enumerate(row):
            j = i + len(tokens)
            ids[b, i:j], branch[b, i:j], pos[:, b, i:j] = tokens, g + 1, first + np.arange(j - i)
            prev[b, i:j] = [o + m - 1, *range(i, j - 1)]
            ends[b, g], i = j - 1, j
    pixels = [x for p in prompts for x in p["pixels"]]
    plain = G == 1 and not pad_left                              # nothing but prompt + <|endoftext|>, padded right: causal is enough
    tensor = lambda x: torch.from_numpy(x).to(device)
    return {"ids": tensor(ids), "pos": tensor(pos), "lengths": torch.tensor(n, device=device), "branch": None if plain else tensor(branch),
            "pixels": tensor(LEVELS[np.concatenate(pixels)]) if pixels else None, "grids": [g for p in prompts for g in p["grids"]],
            "ends": tensor(ends), "prev": tensor(prev)}


def pool(h, ends):
    """States (B, S, H) and places (B, G) -> unit vectors (B, G, H) in fp32; absent places (-1) give zeros."""
    at = h.gather(1, ends.clamp(min=0)[..., None].expand(-1, -1, h.shape[-1]))
    return F.normalize(at.float(), dim=-1) * (ends >= 0)[..., None]


def decision_logits(model, h, batch, reader):
    """fp32 logits (B, 2) of [<|endoftext|>, <think>] at the last prompt token."""
    at = batch["prev"].gather(1, batch["ends"][:, :1])           # (B, 1): the place that predicts the direct <|endoftext|>
    state = h.gather(1, at[..., None].expand(-1, -1, h.shape[-1])).squeeze(1)
    if not model.has_head:
        return None
    rows = model.lm_head.weight[[reader.end, reader.think]]      # two rows of the head are enough
    return F.linear(state, rows.to(state.dtype)).float()


def branch_logp(model, h, batch, reader, first=2):
    """Log-probabilities of the rationale tokens that the policy chooses: after the forced opening, up to and including </think>.

    -> logp (n,), row (n,), branch (n,): which row and which branch (0 = the first rationale) each token belongs to.
    `first` is the number of forced opening tokens. Banned ids have probability 0 here as they do in sampling.
    """
    branch, prev, ids = batch["branch"], batch["prev"], batch["ids"]
    if branch is None:
        return h.new_zeros(0), prev.new_zeros(0), prev.new_zeros(0)
    start = torch.where(branch >= 2, torch.arange(ids.shape[1], device=ids.device), ids.shape[1])
    step = torch.zeros_like(ids)                                 # index of a token within its branch
    for g in range(2, int(branch.max()) + 1):
        mine = branch == g
        step = torch.where(mine, start - start.masked_fill(~mine, ids.shape[1]).min(1, keepdim=True).values, step)
    after = (ids == reader.unthink).int()                        # everything behind </think> is forced
    closed = torch.zeros_like(ids)
    for g in range(2, int(branch.max()) + 1):
        mine = branch == g
        closed = torch.where(mine, (after * mine).cumsum(1) - after, closed)
    row, col = ((branch >= 2) & (step >= first) & (closed == 0)).nonzero(as_tuple=True)
    logits = model.logits(h[row, prev[row, col]])                # (n, V): only where it matters
    ban = torch.tensor(reader.ban, device=h.device)
    logp = logits.index_fill(1, ban, float("-inf")).log_softmax(-1).gather(1, ids[row, col][:, None]).squeeze(1)
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


def info_nce(q, t, positive, temperature=0.02, same=None, margin=0.1, rows=None):
    """Symmetric InfoNCE. q (n, H) unit queries, t (m, H) unit targets and negatives, positive (n,) column of each query's target.

    Both directions: queries against all of t, and each positive target against all queries. same (n, m): see false_negatives.
    rows (n,) optional weights of the queries (they are normalised). -> scalar.
    """
    s = q @ t.T                                                  # (n, m) cosines
    mask = false_negatives(s.detach(), positive, same, margin)
    forward = F.cross_entropy((s / temperature).masked_fill(mask, float("-inf")), positive, reduction="none")
    back = s[:, positive].T                                      # (n, n): row i = the target of query i against all queries
    own = torch.arange(len(q), device=q.device)
    mask = false_negatives(back.detach(), own, None if same is None else same[:, positive].T, margin)
    backward = F.cross_entropy((back / temperature).masked_fill(mask, float("-inf")), own, reduction="none")
    w = torch.ones_like(forward) if rows is None else rows
    return ((forward + backward) / 2 * w).sum() / w.sum()


def margin_score(q, t, target, temperature=0.02):
    """m(q, r) = log softmax over candidates of s/temperature, at the target. q (..., H), t (..., m, H), target (...) -> (...)."""
    return (torch.einsum("...h,...mh->...m", q, t) / temperature).log_softmax(-1).gather(-1, target[..., None]).squeeze(-1)


def grad_cache(chunks, encode, loss_fn):
    """GradCache: the gradient of a loss over ALL vectors with the memory of one chunk.

    encode(chunk) -> (vectors (n, H), extra scalar loss or None); loss_fn(all vectors (sum n, H)) -> scalar loss.
    Once without gradients to get the vectors, then d loss / d vectors, then chunk by chunk again with gradients; the extra
    losses are added on the second pass. -> (loss, sum of extras) as floats. Leaves gradients in the parameters.
    """
    if len(chunks) == 1:                                         # everything fits: the plain way is the same and half the work
        v, extra = encode(chunks[0])
        loss = loss_fn(v)
        (loss if extra is None else loss + extra).backward()
        return float(loss.detach()), float(extra.detach()) if extra is not None else 0.0
    with torch.no_grad():
        parts = [encode(c)[0] for c in chunks]
    v = torch.cat(parts).requires_grad_()
    loss, total = loss_fn(v), 0.0
    loss.backward()
    for c, g in zip(chunks, v.grad.split([len(p) for p in parts])):
        w, extra = encode(c)
        surrogate = (w * g).sum()                                # its gradient is the chain rule's
        (surrogate if extra is None else surrogate + extra).backward()
        total += float(extra.detach()) if extra is not None else 0.0
    return float(loss.detach()), total
