"""
How fast: ours beside transformers' own Qwen3-VL, in one process, on the same weights, inputs, dtype and device.

The idea. Random weights are saved in the Hugging Face layout and opened twice, by model.py and by transformers. Each task then runs in turns,
ours, theirs, ours, theirs ..., and a row compares the medians: ratio > 1 = ours is faster. Before a task is timed both sides must give the same
result (equal greedy tokens, equal losses, vectors and pixels within rounding), or the bench stops with an error.

    embed       vectors of mixed items (text, pictures of several sizes, several pictures, video); "end to end" also reads texts and pictures
    generate    rationales for 64 queries x 8 rollouts x 64 tokens
    grpo        one GRPO step (rl.py): half the rollouts of each query reason, log-probabilities, losses, backward
    contrastive one contrastive step: queries and targets, InfoNCE, backward
    preprocess  pictures -> patches

The peer is what users of transformers write today: its processor, batches of 16 as they come, padded, SDPA, `generate` with a KV cache and
num_return_sequences, logits of the written tokens only; the losses are ours over its model. Patches of video are given to it for free.

How cost grows (--growth; time in seconds, peak memory beyond the weights). Linear: batch, corpus, pictures per item (attention stays within a
picture in the vision tower, but see length). Better than linear: rollouts per query (their prompt is computed once). Worse than linear: length,
because in attention every token looks at every earlier one (S² products of d numbers, beside S x parameters: the square overtakes near
S = 6 x H tokens), and whatever fills a row, several pictures among it, is length.

How to run:
    python bench.py --out results/bench_cpu.json
    python bench.py --out FILE.json --queries 8 --rollouts 4 --tokens 16      smaller
    python bench.py --out FILE.json --device cuda --size 2b,4b                also FLOP/s and bytes/s as shares of what the device reaches

Left out: vLLM and TRL (other processes, other pins); pictures are noise and weights random, so speed is real and content is not.
"""

import argparse
import dataclasses
import gc
import json
import math
import os
import platform
import sys
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import rl
import train
from embed import Embedder, Reader, collate, find_device, info_nce, pool
from eval import rank
from model import CONFIGS, SPECIALS, Config, Qwen3VL, Tokenizer, byte_letters, generate, levels, tokenizer_spec, write_json

SIZES = {                                                        # configuration, and the largest picture in pixels
    "tiny": (dataclasses.replace(CONFIGS["pocket"], hidden=64, mlp=96, layers=2, v_hidden=32, v_mlp=64, heads=2, kv_heads=1), 16384),
    "pocket": (CONFIGS["pocket"], 65536),
    "mid": (Config(hidden=512, mlp=1536, layers=8, heads=8, kv_heads=4, head_dim=64, mrope_section=(12, 10, 10), v_hidden=384, v_mlp=1536,
                   v_layers=6, v_heads=6, v_deepstack=(1, 3, 5)), 262144),
    "2b": (CONFIGS["2b"], 262144), "4b": (CONFIGS["4b"], 262144),
}


# ---------------------------------------------------------------------------------------------------------------------
# The same model for both, and what is put into it


def make_model(size, folder, dtype, device, seed=0):
    """Random weights in the shapes of `size`, saved in `folder` -> Embedder. The words are made-up too: pairs and triples of bytes."""
    c, max_pixels = SIZES[size]
    n = (c.vocab or 1024) - 268 - 256 - len(SPECIALS) + (1 if c.vocab else 0)                 # 151,936 rows: 151,669 tokens, as published
    letters = list(byte_letters())
    pairs = [(a, b) for a in letters for b in letters]
    merges = (pairs + [(a + b, x) for a, b in pairs[:1000] for x in letters])[:n]
    words = letters + [a + b for a, b in merges]
    tokenizer = Tokenizer(tokenizer_spec({w: i for i, w in enumerate(words)}, [list(m) for m in merges]))
    s = tokenizer.special
    c = dataclasses.replace(c, vocab=c.vocab or tokenizer.size + 267, image_token=s["<|image_pad|>"], video_token=s["<|video_pad|>"],
                            vision_start=s["<|vision_start|>"], vision_end=s["<|vision_end|>"])
    torch.manual_seed(seed)
    with torch.device(device):
        model = Qwen3VL(c).to(dtype).init_weights().eval()
    e = Embedder(model, Reader(tokenizer, c, min_pixels=4096, max_pixels=max_pixels))
    e.save(folder)
    return e


def make_items(n, max_pixels, seed=0):
    """n mixed items: short and long texts, one picture, two pictures, a video of four frames."""
    rng = np.random.default_rng(seed)
    side = math.sqrt(max_pixels)
    text = lambda k: " ".join("".join(chr(97 + x) for x in rng.integers(0, 26, rng.integers(2, 9))) for _ in range(k))
    picture = lambda a, b: Image.fromarray(rng.integers(0, 256, (int(a * side), int(b * side), 3), dtype=np.uint8))
    kinds = [lambda: {"text": text(6)}, lambda: {"image": picture(0.9, 1.2), "text": text(8)}, lambda: {"text": text(60)},
             lambda: {"image": picture(0.4, 0.7)}, lambda: {"image": [picture(0.5, 0.5), picture(0.6, 0.3)], "text": text(5)},
             lambda: {"video": {"frames": [picture(0.4, 0.5) for _ in range(4)], "fps": 2.0}, "text": text(4)}]
    return [kinds[i % len(kinds)]() for i in range(n)]


class Peer:
    """transformers' Qwen3VLForConditionalGeneration, its tokenizer and its picture processor on the same folder."""

    def __init__(self, folder, reader, dtype, device):
        from transformers import AutoImageProcessor, AutoTokenizer, Qwen3VLForConditionalGeneration
        self.model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(device).eval()
        self.tok, self.eyes, self.reader, self.device = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder), reader, device

    def read(self, items):
        """Items of text and pictures -> prompts like Reader.read's, by transformers' tokenizer and picture processor."""
        pictures = [[] if "image" not in x else x["image"] if isinstance(x["image"], list) else [x["image"]] for x in items]
        out = self.eyes(images=sum(pictures, []), return_tensors="pt")
        grids = [(h, w) for _, h, w in out["image_grid_thw"].tolist()]
        patches = iter(zip(grids, out["pixel_values"].split([h * w for h, w in grids])))
        prompts, texts = [], []
        for x, own in zip(items, pictures):
            seen = [next(patches) for _ in own]
            eyes = "".join("<|vision_start|>" + "<|image_pad|>" * (len(p) // 4) + "<|vision_end|>" for _, p in seen)
            texts.append(f"<|im_start|>user\n{eyes}{x.get('text', '')}<|im_end|>\n<|im_start|>assistant\n")
            prompts.append(dict(pixels=[p for _, p in seen], grids=[g for g, _ in seen]))
        return [dict(p, ids=np.array(ids)) for p, ids in zip(prompts, self.tok(texts, add_special_tokens=False).input_ids)]

    def inputs(self, prompts, more=None, left=False):
        """Prompts and the ids `more` [B] that follow each -> padded inputs of transformers."""
        rows = [np.r_[p["ids"], m] for p, m in zip(prompts, more or [[self.reader.end]] * len(prompts))]
        S, c = max(map(len, rows)), self.reader.c
        ids, mask = np.full((len(rows), S), self.reader.end), np.zeros((len(rows), S), dtype=np.int64)
        for b, row in enumerate(rows):
            at = slice(S - len(row), S) if left else slice(0, len(row))
            ids[b, at], mask[b, at] = row, 1
        out = dict(input_ids=ids, attention_mask=mask, mm_token_type_ids=(ids == c.image_token) + 2 * (ids == c.video_token))
        out = {k: torch.from_numpy(v).to(self.device) for k, v in out.items()}
        seen = {"image": ([], []), "video": ([], [])}
        for p in prompts:
            kinds = p["ids"][np.flatnonzero(p["ids"] == c.vision_start) + 1]                  # of each segment
            i = 0
            for x in p["pixels"]:
                h, w = p["grids"][i]
                pixels, grids = seen["image" if kinds[i] == c.image_token else "video"]
                pixels.append(x if torch.is_tensor(x) else levels(x)), grids.append([len(x) // (h * w), h, w])
                i += len(x) // (h * w)
        for kind, key in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if seen[kind][0]:
                out[key] = torch.cat(seen[kind][0]).to(self.device, self.model.dtype)
                out[kind + "_grid_thw"] = torch.tensor(seen[kind][1], device=self.device)
        return out

    def states(self, prompts, more=None):
        """-> states (B, S, H) and the place of each row's last token (B,)."""
        inputs = self.inputs(prompts, more)
        return self.model.model(**inputs).last_hidden_state, inputs["attention_mask"].sum(1) - 1

    def embed(self, prompts, more=None):
        h, last = self.states(prompts, more)
        return F.normalize(h[torch.arange(len(h), device=h.device), last].float(), dim=-1)

    @torch.no_grad()
    def embed_all(self, prompts, batch=16):
        return torch.cat([self.embed(prompts[i : i + batch]) for i in range(0, len(prompts), batch)])

    def generate(self, prompts, G, tokens, sample=True):
        """-> [B*G] lists of written ids, query by query."""
        r = self.reader
        inputs = self.inputs(prompts, [r.prefix] * len(prompts), left=True)
        how = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=G) if sample else dict(do_sample=False)
        out = self.model.generate(**inputs, **how, max_new_tokens=tokens, suppress_tokens=r.ban, eos_token_id=r.unthink, pad_token_id=r.end)
        rows = out[:, inputs["input_ids"].shape[1]:].tolist()
        return [x[: x.index(r.unthink) + 1] if r.unthink in x else [t for t in x if t != r.end] for x in rows]

    def contrastive(self, pairs, cfg):
        self.model.train()
        q, t = self.embed([p["query"] for p in pairs]), self.embed([p["target"] for p in pairs])
        loss = info_nce(q, t, torch.arange(len(q), device=q.device), cfg.temperature)
        loss.backward()
        self.model.zero_grad(set_to_none=True)
        return float(loss.detach())

    def grpo(self, prompts, targets, same, cfg):
        """rl.grpo_step's losses over transformers: rollouts by `generate`, then every rollout is a row of its own."""
        self.model.eval()
        r, B, half = self.reader, len(prompts), cfg.rl_group // 2
        with torch.no_grad():
            written = self.generate(prompts, half, cfg.rl_max_new)
        self.model.train()
        closed = [r.unthink not in w for w in written]
        more = [[*r.prefix, *w, *(r.close if c else []), *r.tail] for w, c in zip(written, closed)]
        wide = [p for p in prompts for _ in range(half)]
        h, last = self.states(wide, more)
        row = np.repeat(np.arange(len(wide)), list(map(len, written)))
        col = np.concatenate([len(p["ids"]) + len(r.prefix) - 1 + np.arange(len(w)) for p, w in zip(wide, written)])
        logits = self.model.lm_head(h[row, col]).float().index_fill(1, torch.tensor(r.ban, device=h.device), float("-inf"))
        logp = logits.log_softmax(-1).gather(1, torch.tensor(np.concatenate(written), device=h.device, dtype=torch.long)[:, None]).squeeze(1)
        reasoned = F.normalize(h[torch.arange(len(h)), last].float(), dim=-1).view(B, half, -1)
        hd, last = self.states(prompts)
        direct, own = F.normalize(hd[torch.arange(B), last].float(), dim=-1), torch.arange(B, device=h.device)
        decision = F.linear(hd[torch.arange(B), last - 1], self.model.lm_head.weight[[r.end, r.think]]).float()
        t, q = self.embed(targets), torch.cat((direct[:, None], reasoned), 1)
        with torch.no_grad():
            quality = (torch.einsum("bgh,ch->bgc", q, t) / cfg.temperature).softmax(-1)[own, :, own]
            spent = torch.tensor(list(map(len, written)), device=h.device).view(B, half)
            reward = rl.rewards(quality[:, 1:], spent, ~torch.tensor(closed, device=h.device).view(B, half), cfg.rl_price, cfg.rl_max_new)
            base = rl.rewards(quality[:, 0], torch.zeros(B, device=h.device), torch.ones(B, device=h.device), cfg.rl_price, cfg.rl_max_new)
            adv, _ = rl.advantages(reward, base)
        loss, _ = rl.policy_loss(logp, logp.detach(), adv.flatten()[torch.from_numpy(row).to(h.device)], B * half * cfg.rl_max_new)
        nce = info_nce(direct, t, own, cfg.temperature, same) + info_nce(reasoned.flatten(0, 1), t, own.repeat_interleave(half), cfg.temperature,
                                                                         same.repeat_interleave(half, 0))
        (cfg.rl_rationale * loss + cfg.rl_decision * rl.decision_loss(decision, reward.mean(1) - base) + cfg.rl_nce * nce).backward()
        self.model.zero_grad(set_to_none=True)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


CLOCK = time.perf_counter                                        # --clock cpu: processor seconds, for a machine that others use too


def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(f, device):
    sync(device)
    t = CLOCK()
    f()
    sync(device)
    return CLOCK() - t


def race(rows, name, ours, peer, amount, unit, o):
    """Both warm up, then take turns; a row of medians is appended and printed."""
    both = (ours, peer)
    for f in both:
        seconds(f, o.device)
    times = [[seconds(f, o.device) for f in both] for _ in range(o.repeats)]
    mine, theirs = (amount / float(np.median([t[i] for t in times])) for i in (0, 1))
    rows.append(dict(name=name, ours=mine, peer=theirs, ratio=mine / theirs, unit=unit, peer_name=o.peer_name))
    print(f"{name:<34}{mine:>12.2f}{theirs:>12.2f} {unit:<12}{mine / theirs:>7.2f}x", flush=True)


def agree(what, a, b, tolerance):
    """Both sides must have computed the same thing."""
    gap = float((torch.as_tensor(a).float().cpu() - torch.as_tensor(b).float().cpu()).abs().max())
    if not gap <= tolerance:
        raise ValueError(f"{what}: ours and transformers differ by {gap:.2g}, more than {tolerance:.2g}: not the same computation")


def embed_all(e, prompts, batch=16):
    """What `encode` does after reading: batches of similar length, in the order of the prompts."""
    out = torch.empty(len(prompts), e.model.c.hidden)
    with torch.no_grad():
        for rows in e.batches([len(p["ids"]) + 1 for p in prompts], batch):
            out[rows] = e.embed([prompts[i] for i in rows], "never", 0.5, 1)[0].cpu()
    return F.normalize(out, dim=-1)


def make_cfg(o):
    return dataclasses.replace(train.Config(), rl_group=2 * max(1, o.rollouts // 2), rl_max_new=o.tokens, chunk_tokens=1 << 40)


def make_pairs(e, n, seed):
    a, b = (make_items(n, e.reader.max_pixels, s) for s in (seed, seed + 1))
    return [dict(id=str(i), query=e.reader.read(x), target=e.reader.read(y), answer=str(i), negatives=[]) for i, (x, y) in enumerate(zip(a, b))]


def compare(size, rows, o):
    """All tasks on one size, ours beside the peer's."""
    with tempfile.TemporaryDirectory() as folder:
        e = make_model(size, folder, o.dtype, o.device)
        peer = Peer(folder, e.reader, o.dtype, o.device)
    if o.compile:
        e.model.compile_layers()
    r, tol = e.reader, 1e-4 if o.dtype == torch.float32 else 0.05
    items = make_items(o.items, r.max_pixels)
    prompts, still = [r.read(x) for x in items], [x for x in items if "video" not in x]
    agree(f"embed, {size}", embed_all(e, prompts), peer.embed_all(prompts), tol)
    race(rows, f"embed mixed, {size}", lambda: embed_all(e, prompts), lambda: peer.embed_all(prompts), len(items), "items/s", o)
    race(rows, f"embed end to end, {size}", lambda: e.encode(still, reason="never"), lambda: peer.embed_all(peer.read(still)), len(still), "items/s", o)
    texts = [p for p in prompts if not p["grids"]] * 2
    race(rows, f"embed text, {size}", lambda: embed_all(e, texts), lambda: peer.embed_all(texts), len(texts), "items/s", o)

    pictures = sum((x["image"] if isinstance(x["image"], list) else [x["image"]] for x in still if "image" in x), [])
    mine = lambda: levels(np.concatenate([p["pixels"][0] for window in e.windows(pictures, None, 1 << 20) for p in window]))
    agree(f"preprocess, {size}", mine(), peer.eyes(images=pictures, return_tensors="pt")["pixel_values"], 1e-5)
    race(rows, f"preprocess, {size}", mine, lambda: peer.eyes(images=pictures, return_tensors="pt"), len(pictures), "pictures/s", o)

    few = prompts[:6]
    write = lambda ps, G, tokens, t: generate(e.model, collate(ps, r, device=o.device), tokens, G, r.prefix, (r.unthink,), r.tail, r.close, r.ban, t,
                                              torch.Generator(o.device).manual_seed(0))
    if o.dtype == torch.float32:                                 # in bf16 a near tie may fall either way
        got = write(few, 1, 12, 0.0)
        if [t[0][len(r.prefix) :][:n] for t, n in zip(got["tokens"], got["new"][:, 0])] != peer.generate(few, 1, 12, sample=False):
            raise ValueError(f"generate, {size}: greedy tokens differ from transformers': not the same computation")
    queries = [r.read(x) for x in make_items(o.queries, r.max_pixels, 2)]
    amount = o.queries * o.rollouts * o.tokens
    race(rows, f"generate {o.queries}x{o.rollouts}x{o.tokens}, {size}", lambda: write(queries, o.rollouts, o.tokens, 1.0),
         lambda: peer.generate(queries, o.rollouts, o.tokens), amount, "tokens/s", o)
    train_rows(size, rows, o, e, peer)
    return e


def train_rows(size, rows, o, e, peer):
    """One GRPO step and one contrastive step; gradients are dropped, weights stay."""
    cfg, pairs = make_cfg(o), make_pairs(e, o.batch, 4)

    def clear(x):
        e.model.zero_grad(set_to_none=True)
        return x

    contrastive = lambda: clear(train.contrastive_step(e.model, e.reader, pairs, [None] * o.batch, [-1] * o.batch, cfg))["loss"]
    agree(f"contrastive, {size}", contrastive(), peer.contrastive(pairs, cfg), 1e-3 if o.dtype == torch.float32 else 0.1)
    race(rows, f"contrastive {o.batch} pairs, {size}", contrastive, lambda: peer.contrastive(pairs, cfg), o.batch, "pairs/s", o)

    B = max(2, o.queries // 8)                                   # activations of B x rollouts rows must fit
    pairs, same = make_pairs(e, B, 6), torch.eye(B, dtype=torch.bool, device=o.device)
    q, t = [p["query"] for p in pairs], [p["target"] for p in pairs]

    def vectors(targets):
        batch = collate(targets, e.reader, device=o.device)
        return pool(e.model(batch), batch["ends"])[:, 0]

    step = lambda: clear(rl.grpo_step(e.model, e.reader, q, t, same, cfg, torch.Generator(o.device).manual_seed(0), vectors))
    race(rows, f"grpo {B}x{cfg.rl_group}x{o.tokens}, {size}", step, lambda: peer.grpo(q, t, same, cfg), B, "queries/s", o)
    e.model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Against the device itself


def speed_limits(o):
    """What this device reaches, measured: FLOP/s of a large matrix product and bytes/s (read and written) of a large copy."""
    n, size = (8192, 1 << 30) if o.device.type == "cuda" else (768, 1 << 26)
    a, x = torch.randn(n, n, device=o.device).to(o.dtype), torch.zeros(size, dtype=torch.uint8, device=o.device)
    y = torch.empty_like(x)
    best = lambda f: min(seconds(f, o.device) for _ in range(10))
    return 2 * n**3 / best(lambda: a @ a), 2 * size / best(lambda: y.copy_(x))


def limit_rows(size, e, o):
    """Direct embedding and a contrastive step as shares of the matrix rate, decoding one row as a share of the copy bandwidth."""
    flops, bandwidth = speed_limits(o)
    prompts, pairs, r, rows = [e.reader.read(x) for x in make_items(o.items, e.reader.max_pixels)], make_pairs(e, o.batch, 4), e.reader, []
    both = {"embed": lambda: embed_all(e, prompts),
            "contrastive": lambda: train.contrastive_step(e.model, r, pairs, [None] * o.batch, [-1] * o.batch, make_cfg(o))}
    for name, f in both.items():
        with FlopCounterMode(display=False) as counter:          # padding counts as work: it is computed
            f()
        if o.compile:
            e.model.compile_layers()
            f()
        t = float(np.median([seconds(f, o.device) for _ in range(o.repeats)]))
        rows.append(dict(name=f"{name}, {size}", value=counter.get_total_flops() / t, unit="FLOP/s", limit=flops, peak_mb=peak_mb(f, o.device)))
        e.model.zero_grad(set_to_none=True)
    e.model.eval()
    batch = collate(prompts[:1], r, device=o.device)
    write = lambda T: generate(e.model, batch, T, 1, r.prefix, (), r.tail, r.close, r.ban)
    write(2 * o.tokens)
    t = [float(np.median([seconds(lambda: write(T), o.device) for _ in range(o.repeats)])) for T in (o.tokens, 2 * o.tokens)]
    c, width = e.model.c, e.model.lm_head.weight.element_size()
    weights = sum(p.numel() for p in (*e.model.text.layers.parameters(), e.model.lm_head.weight))                         # read for every token
    cache = 2 * c.layers * c.kv_heads * c.head_dim * (len(prompts[0]["ids"]) + 1.5 * o.tokens)
    rows.append(dict(name=f"decode batch 1, {size}", value=(weights + cache) * width * o.tokens / max(t[1] - t[0], 1e-9), unit="bytes/s", limit=bandwidth,
                     peak_mb=peak_mb(lambda: write(o.tokens), o.device)))
    for x in rows:
        x["share"] = x["value"] / x["limit"]
        print(f"{x['name']:<34}{x['value']:>12.3g} {x['unit']:<8} of {x['limit']:.3g}: {x['share']:.0%}, peak {x['peak_mb']:,.0f} MB", flush=True)
    return rows


def whole_step(size, o):
    """One training step with its optimizer on o.train pairs through GradCache, with checkpointing; --lora trains adapters only."""
    if o.lora and not hasattr(train, "add_lora"):
        print(f"train, {size}: left out, train.py has no add_lora")
        return []
    with tempfile.TemporaryDirectory() as folder:
        e = make_model(size, folder, o.dtype, o.device)
    if o.lora:
        train.add_lora(e.model, o.lora)
    e.model.set_checkpointing(True)
    cfg, pairs = dataclasses.replace(make_cfg(o), optimizer="adamw", chunk_tokens=16384, batch=o.train), make_pairs(e, o.train, 8)
    optimizer = train.Optimizer(e.model, cfg, 10)

    def f():
        train.contrastive_step(e.model, e.reader, pairs, [None] * o.train, [-1] * o.train, cfg)
        optimizer.step(0)

    f()                                                          # the optimizer's states come to be
    peak, t = peak_mb(f, o.device), seconds(f, o.device)
    how = f"LoRA {o.lora}" if o.lora else "full"
    print(f"train {how}, {size}: {o.train} pairs in {t:.1f} s, peak {peak:,.0f} MB", flush=True)
    return [dict(name=f"train {how}, {size}", value=o.train / t, unit="pairs/s", peak_mb=peak)]


# ---------------------------------------------------------------------------------------------------------------------
# How cost grows


def peak_mb(f, device):
    """Peak memory of f() in MB: all of it on a GPU; on the CPU what it adds (Linux keeps the resident peak, and resets it on request)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        f()
        return torch.cuda.max_memory_allocated() / 1e6
    status = lambda key: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1e3
    with open("/proc/self/clear_refs", "w") as w:
        w.write("5")
    before = status("VmRSS")
    f()
    return max(0.0, status("VmHWM") - before)


def growth_cases(e, size):
    """{axis: (values, value -> a function to time)}: one thing grows, the others stay."""
    r, rng = e.reader, np.random.default_rng(0)
    prompt = lambda n: {"ids": rng.integers(0, 250, n), "pixels": [], "grids": []}
    side = int(math.sqrt(r.max_pixels)) // 2
    seen = lambda n: r.read({"image": [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(n)]})
    unit = lambda n: F.normalize(torch.from_numpy(rng.standard_normal((n, 128), dtype=np.float32)), dim=1).numpy()
    one = lambda prompts: lambda: e.embed(prompts, "never", 0.5, 1)
    write = lambda G: lambda: generate(e.model, collate([seen_once] * 2, r, device=e.model.device), 16, G, r.prefix, (), r.tail, r.close, r.ban, 1.0)
    rows = lambda n: lambda: rank(queries, unit(n), [[0]] * len(queries))
    queries, seen_once, k = unit(32), seen(1), (1 if size == "tiny" else 4)
    with_grad = lambda B: lambda: train.contrastive_step(e.model, r, [dict(id=i, query=prompt(64), target=prompt(64), answer=i, negatives=[])
                                                                      for i in range(B)], [None] * B, [-1] * B, train.Config())
    return {"batch (rows of 128 tokens)": ([k * x for x in (1, 2, 4, 8)], lambda n: one([prompt(128) for _ in range(n)])),
            "length (tokens of a row)": ([k * x for x in (128, 256, 512, 1024)], lambda n: one([prompt(n)])),
            "pictures per item": ([k * x for x in (1, 2, 4, 8)], lambda n: one([seen(n)])),
            "group size (rollouts)": ([k * x for x in (1, 2, 4, 8)], write),
            "training batch (pairs)": ([k * x for x in (2, 4, 8, 16)], with_grad),
            "corpus (vectors ranked)": ([k * x for x in (1000, 4000, 16000, 64000)], rows)}


def growth(o, png):
    """-> rows {axis, value, seconds, peak_mb, exponent}: time ~ value^exponent between this value and the one before; a plot beside the JSON."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with tempfile.TemporaryDirectory() as folder:
        e = make_model(o.size.split(",")[0], folder, o.dtype, o.device)
    rows, cases = [], growth_cases(e, o.size.split(",")[0])
    figure, axes = plt.subplots(2, 3, figsize=(12, 6))
    for (axis, (values, make)), ax in zip(cases.items(), axes.flat):
        for v in values:
            f = make(v)
            f()
            t = float(np.median([seconds(f, o.device) for _ in range(o.repeats)]))
            last = rows[-1] if v != values[0] else None
            rows.append(dict(axis=axis, value=v, seconds=t, peak_mb=peak_mb(f, o.device),
                             exponent=last and math.log(t / last["seconds"]) / math.log(v / last["value"])))
            e.model.zero_grad(set_to_none=True)
            power = "" if last is None else f"  ~ value^{rows[-1]['exponent']:.2f}"
            print(f"{axis:<30}{v:>8}{t:>10.4f} s{rows[-1]['peak_mb']:>10.1f} MB{power}", flush=True)
        mine = rows[-len(values):]
        ax.loglog(values, [x["seconds"] for x in mine], "o-", label="seconds")
        ax.loglog(values, [mine[0]["seconds"] * v / values[0] for v in values], ":", color="grey", label="linear")
        ax.set_title(axis)
        twin = ax.twinx()
        twin.plot(values, [x["peak_mb"] for x in mine], "s--", color="tab:orange")
        twin.set_ylabel("peak MB")
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(png, dpi=80)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def parse(argv):
    a = argparse.ArgumentParser(description="Side by side with transformers: embedding, generation, GRPO and contrastive steps, preprocessing.")
    a.add_argument("--out", required=True, help="JSON file; --growth draws a .png beside it")
    a.add_argument("--device", help="CUDA when there is one")
    a.add_argument("--dtype", choices=["float32", "bfloat16"], help="float32 on the CPU, bfloat16 on a GPU")
    a.add_argument("--size", default="pocket,mid", help=f"some of {','.join(SIZES)}")
    a.add_argument("--compile", action="store_true", help="torch.compile our layers, and CUDA graphs for our decoding")
    a.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: processor seconds, for a machine that others use too")
    for name, value, what in (("queries", 64, "of the generation row"), ("rollouts", 8, "per query"), ("tokens", 64, "per rollout"), ("items", 48, "to embed"),
                              ("batch", 16, "pairs of the contrastive row"), ("repeats", 5, "in turns; medians are reported")):
        a.add_argument("--" + name, type=int, default=value, help=f"{what} ({value})")
    a.add_argument("--train", type=int, default=0, help="also one whole training step of each size on so many pairs")
    a.add_argument("--lora", type=int, default=0, help="... by LoRA of this rank instead of in full")
    a.add_argument("--growth", action="store_true", help="how cost grows (first size only) instead of the comparison")
    o = a.parse_args(argv)
    o.device = find_device(o.device)
    o.dtype = getattr(torch, o.dtype or ("bfloat16" if o.device.type == "cuda" else "float32"))
    if bad := [s for s in o.size.split(",") if s not in SIZES]:
        raise ValueError(f"--size {bad[0]}: expected some of {', '.join(SIZES)}")
    if low := [n for n in ("queries", "rollouts", "tokens", "items", "batch", "repeats") if getattr(o, n) < (6 if n == "items" else 1)]:
        raise ValueError(f"--{low[0]} {getattr(o, low[0])}: expected at least {6 if low[0] == 'items' else 1}")
    if not os.path.isdir(os.path.dirname(os.path.abspath(o.out))):
        raise ValueError(f"--out {o.out}: no such folder")
    return o


def main(argv=None):
    global CLOCK
    try:
        o = parse(argv)
        CLOCK = time.process_time if o.clock == "cpu" else time.perf_counter
        import transformers
        transformers.utils.logging.disable_progress_bar()
        o.peer_name = f"transformers {transformers.__version__}"
        name = torch.cuda.get_device_name(o.device) if o.device.type == "cuda" else f"CPU, {torch.get_num_threads()} of {os.cpu_count()} cores"
        out = dict(device=name, dtype=str(o.dtype).removeprefix("torch."), clock=o.clock, compiled=o.compile, repeats=o.repeats, rows=[], limits=[],
                   versions=dict(python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__, numpy=np.__version__))
        if o.growth:
            out["growth"] = growth(o, os.path.splitext(o.out)[0] + ".png")
        for size in [] if o.growth else o.size.split(","):
            e = compare(size, out["rows"], o)
            out["limits"] += limit_rows(size, e, o)
            del e
            out["limits"] += whole_step(size, o) if o.train else []
            write_json(o.out, out)                               # after each size: a long run may be stopped
        write_json(o.out, out)
    except torch.OutOfMemoryError as e:
        sys.exit(f"bench.py: out of memory with --size {o.size}: try smaller --queries, --rollouts, --tokens, --batch, or --lora ({str(e).splitlines()[0]})")
    except ValueError as e:
        sys.exit(f"bench.py: {e}")
    print(f"device {name}; {o.out} written")


if __name__ == "__main__":
    main()
