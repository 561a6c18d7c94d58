"""
How fast: ours beside transformers' own Qwen3-VL, in one process, on the same weights, inputs, dtype and device.

The idea. Random weights are saved in the Hugging Face layout and opened twice, by model.py and by transformers. Each task runs in turns, ours,
theirs, ours, theirs ..., and a row compares the medians: ratio > 1 = ours is faster. First both sides must give the same result (vectors and
pixels within rounding, equal losses, equal greedy tokens), or the bench stops with an error.

    embed       vectors of mixed items (text, pictures of several sizes, two pictures, video); "end to end" also reads texts and pictures
    generate    rationales: 64 queries x 8 rollouts x 64 tokens
    grpo        one GRPO step (rl.py): half the rollouts of each query reason; log-probabilities, losses, backward
    contrastive one contrastive step: queries and targets, InfoNCE, backward
    preprocess  pictures -> patches
    grpo given  where TRL is installed: the loss of given rollouts and its gradient, beside TRL's GRPOTrainer (dr_grpo, the same loss)

The peer is what users of transformers write today: its processor, batches of 16 as they come, padded, SDPA, `generate` with a KV cache and
num_return_sequences, logits of the written tokens only; the losses are ours. Patches of video are given to it for free.

How cost grows (--growth). Linear: batch, corpus, pictures per item. Better than linear: rollouts of a query, whose prompt is computed once.
Worse than linear: length, for every token looks at every earlier one (S² x layers x heads x d beside S x parameters; at the real sizes the
square overtakes beyond some 20,000 tokens), and pictures are length, once there are many in one item.

How to run:
    python bench.py --out FILE.json                                                         pocket and mid size
    python bench.py --out FILE.json --queries 4 --tokens 16 --items 12 --batch 6            smaller
    python bench.py --out FILE.json --device cuda --compile --size 2b                       a GPU
    python bench.py --out FILE.json --device cuda --compile --size 4b --train 1024 --lora 32         one whole training step on it, and what it needs
    python bench.py --out FILE.json --growth                                                and FILE.png
    python bench.py --out FILE.json --size 2b,4b --cost                                     what a full run takes at the rates that FILE.json holds

Left out: vLLM (another process, other pins), TRL's own generation (transformers', compared above), and clips beside TRL (its trainer takes none).
Pictures are noise and weights random: speed is real, content is not.
"""

import argparse
import copy
import ctypes
import dataclasses
import importlib.util
import math
import os
import platform
import sys
import tempfile
import time
import types

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import rl
from embed import Embedder, Reader, branch_logp, collate, contrastive_step, find_device, info_nce
from eval import rank
from model import CONFIGS, Config, Qwen3VL, Tokenizer, byte_letters, for_training, generate, levels, linear, read_json, tokenizer_spec, write_json

# what a step is told, as train.py's Config has it
STEP = types.SimpleNamespace(temperature=0.02, negatives=1, lm_weight=1.0, decision_weight=0.2, chunk_tokens=16384, rl_temperature=1.0, rl_price=0.1, rl_beta=0.1,
                             rl_decision=1.0, rl_rationale=1.0, rl_nce=0.1, rl_one_loss=False)
SIZES = {                                                        # configuration, and the largest picture in pixels
    "tiny": (dataclasses.replace(CONFIGS["pocket"], hidden=64, mlp=96, layers=2, v_hidden=32, v_mlp=64, heads=2, kv_heads=1), 16384),
    "pocket": (CONFIGS["pocket"], 65536),
    "mid": (Config(hidden=512, mlp=1536, layers=8, heads=8, kv_heads=4, head_dim=64, mrope_section=(12, 10, 10), v_hidden=384, v_mlp=1536,
                   v_layers=6, v_heads=6, v_deepstack=(1, 3, 5)), 262144),
    "2b": (CONFIGS["2b"], 262144), "4b": (CONFIGS["4b"], 262144),
}


# What torch's counter does not know, as functions of shapes: oneDNN's product (model.linear), and attention on a CPU or with fewer keys than queries.
# Attention is two products forward and five backward.
attention, attention_backward = lambda q, k, *_, **more: 4 * math.prod(q) * k[-2], lambda g, q, k, *_, **more: 10 * math.prod(q) * k[-2]
COUNTED = {getattr(torch.ops.aten, f"_scaled_dot_product_{kind}{way}"): f for kind in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
           for way, f in (("", attention), ("_backward", attention_backward))}
if torch.backends.mkldnn.is_available():
    COUNTED[torch.ops.mkldnn._linear_pointwise] = lambda x, w, *_, **more: 2 * math.prod(x) * w[0]


# ---------------------------------------------------------------------------------------------------------------------
# The same model for both, and what is put into it


def make_model(size, folder, o):
    """Random weights in the shapes of `size`, saved in `folder` -> Embedder. Its words are made up: pairs and triples of bytes."""
    c, max_pixels = SIZES[size]
    n = 151643 if c.vocab else 500                               # ordinary tokens; the specials follow, in their published places
    letters = list(byte_letters())
    pairs = [(a, b) for a in letters for b in letters]
    merges = (pairs + [(a + b, x) for a, b in pairs[:1000] for x in letters])[: n - 256]
    words = letters + [a + b for a, b in merges]
    tokenizer = Tokenizer(tokenizer_spec({w: i for i, w in enumerate(words)}, [list(m) for m in merges]))
    s = tokenizer.special
    c = dataclasses.replace(c, vocab=c.vocab or tokenizer.size + 2, image_token=s["<|image_pad|>"], video_token=s["<|video_pad|>"],
                            vision_start=s["<|vision_start|>"], vision_end=s["<|vision_end|>"])
    torch.manual_seed(0)
    with torch.device(o.device):
        model = Qwen3VL(c).to(o.dtype).init_weights().eval()
    e = Embedder(model, Reader(tokenizer, c, min_pixels=4096, max_pixels=max_pixels))
    e.save(folder)
    return e


def make_items(n, max_pixels, seed=0):
    """n mixed items: short and long texts, one picture, two pictures, a video of four frames."""
    rng = np.random.default_rng(seed)
    side = math.sqrt(max_pixels)
    text = lambda k: " ".join("".join(chr(97 + x) for x in rng.integers(0, 26, rng.integers(2, 9))) for _ in range(k))
    picture = lambda a, b: Image.fromarray(rng.integers(0, 256, (int(a * side), int(b * side), 3), dtype=np.uint8))
    kinds = [lambda: {"text": text(6)}, lambda: {"image": [picture(0.9, 1.2)], "text": text(8)}, lambda: {"text": text(60)},
             lambda: {"image": [picture(0.4, 0.7)]}, lambda: {"image": [picture(0.5, 0.5), picture(0.6, 0.3)], "text": text(5)},
             lambda: {"video": {"frames": [picture(0.4, 0.5) for _ in range(4)], "fps": 2.0}, "text": text(4)}]
    return [kinds[i % len(kinds)]() for i in range(n)]


class Peer:
    """transformers' Qwen3VLForConditionalGeneration, its tokenizer and its picture processor, opened from the same folder."""

    def __init__(self, folder, reader, o):
        from transformers import AutoImageProcessor, AutoTokenizer, Qwen3VLForConditionalGeneration
        self.model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=o.dtype, attn_implementation="sdpa").to(o.device).eval()
        self.tok, self.eyes, self.reader, self.device = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder, backend="pil"), reader, o.device

    def read(self, items):
        """Items of text and pictures -> prompts like the Reader's."""
        pictures = [x.get("image", []) for x in items]
        out = self.eyes(images=sum(pictures, []), return_tensors="pt")
        grids = [(h, w) for _, h, w in out["image_grid_thw"].tolist()]
        patches, texts, prompts = iter(zip(grids, out["pixel_values"].split([h * w for h, w in grids]))), [], []
        for x, own in zip(items, pictures):
            seen = [next(patches) for _ in own]
            eyes = "".join("<|vision_start|>" + "<|image_pad|>" * (len(p) // 4) + "<|vision_end|>" for _, p in seen)
            texts.append(f"<|im_start|>user\n{eyes}{x.get('text', '')}<|im_end|>\n<|im_start|>assistant\n")
            prompts.append(dict(pixels=[p for _, p in seen], grids=[g for g, _ in seen]))
        return [dict(p, ids=np.array(ids)) for p, ids in zip(prompts, self.tok(texts, add_special_tokens=False).input_ids)]

    def inputs(self, prompts, more=None, left=False):
        """Prompts and the ids `more` [B] that follow each (<|endoftext|> by default) -> padded inputs of transformers."""
        rows, c = [np.r_[p["ids"], m] for p, m in zip(prompts, more or [[self.reader.end]] * len(prompts))], self.reader.c
        S = max(map(len, rows))
        pad = lambda x, value: np.pad(x, (S - len(x), 0) if left else (0, S - len(x)), constant_values=value)
        ids, mask = np.stack([pad(x, self.reader.end) for x in rows]), np.stack([pad(np.ones(len(x), int), 0) for x in rows])
        out = dict(input_ids=ids, attention_mask=mask, mm_token_type_ids=(ids == c.image_token) + 2 * (ids == c.video_token))
        out, seen = {k: torch.from_numpy(v).to(self.device) for k, v in out.items()}, {"image": ([], []), "video": ([], [])}
        for p in prompts:
            kinds, i = p["ids"][np.flatnonzero(p["ids"] == c.vision_start) + 1], 0            # of each segment
            for x in p["pixels"]:
                (h, w), (pixels, grids) = p["grids"][i], seen["image" if kinds[i] == c.image_token else "video"]
                pixels.append(x.to(self.device) if torch.is_tensor(x) else levels(x, self.device)), grids.append([len(x) // (h * w), h, w])
                i += len(x) // (h * w)
        for kind, key in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if seen[kind][0]:
                out.update({key: torch.cat(seen[kind][0]).to(self.device, self.model.dtype), kind + "_grid_thw": torch.tensor(seen[kind][1], device=self.device)})
        return out

    def embed(self, prompts, more=None):
        """-> unit vectors (B, H), states (B, S, H), the place of each row's last token (B,)."""
        inputs = self.inputs(prompts, more)
        h, last = self.model.model(**inputs).last_hidden_state, inputs["attention_mask"].sum(1) - 1
        return F.normalize(h[torch.arange(len(h)), last].float(), dim=-1), h, last

    @torch.no_grad()
    def embed_all(self, prompts):
        return torch.cat([self.embed(prompts[i : i + 16])[0] for i in range(0, len(prompts), 16)])

    def generate(self, prompts, G, tokens, sample=True):
        """-> [B*G] lists of written ids, query by query."""
        r, inputs = self.reader, self.inputs(prompts, [self.reader.prefix] * len(prompts), left=True)
        how = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=G) if sample else dict(do_sample=False)
        out = self.model.generate(**inputs, **how, max_new_tokens=tokens, suppress_tokens=r.ban, eos_token_id=r.unthink, pad_token_id=r.end)
        return [[t for t in row if t != r.end] for row in out[:, inputs["input_ids"].shape[1]:].tolist()]

    def contrastive(self, pairs, cfg):
        self.model.train()
        q, t = (self.embed([p[side] for p in pairs])[0] for side in ("query", "target"))
        loss = info_nce(q, t, torch.arange(len(q), device=q.device), cfg.temperature)
        loss.backward()
        self.model.zero_grad(set_to_none=True)
        return float(loss.detach())

    def grpo(self, prompts, targets, same, cfg):
        """The losses of rl.grpo_step: rollouts by `generate`, then every rollout is a row of its own."""
        self.model.eval()
        r, B, half, device, own = self.reader, len(prompts), cfg.rl_group // 2, self.device, torch.arange(len(prompts), device=self.device)
        with torch.no_grad():
            written = self.generate(prompts, half, cfg.rl_max_new)
        self.model.train()
        forced, wide = [r.unthink not in w for w in written], [p for p in prompts for _ in range(half)]
        v, h, _ = self.embed(wide, [[*r.prefix, *w, *(r.close if f else []), *r.tail] for w, f in zip(written, forced)])
        row = torch.tensor(np.repeat(np.arange(B * half), list(map(len, written))), device=device)
        col = np.concatenate([len(p["ids"]) + len(r.prefix) - 1 + np.arange(len(w)) for p, w in zip(wide, written)])
        logits = self.model.lm_head(h[row, torch.tensor(col, device=device)]).float().index_fill(1, torch.tensor(r.ban, device=device), float("-inf"))
        logp = logits.log_softmax(-1).gather(1, torch.tensor(sum(written, []), device=device)[:, None]).squeeze(1)
        (direct, h, last), t = self.embed(prompts), self.embed(targets)[0]
        choice = F.linear(h[own, last - 1], self.model.lm_head.weight[[r.end, r.think]]).float()
        per_query = lambda x: np.array(x).reshape(B, half)
        with torch.no_grad():
            s = rl.score(torch.cat((direct[:, None], v.view(B, half, -1)), 1), t, same, per_query([len(w) for w in written]), per_query(forced), cfg)
        loss, _ = rl.policy_loss(logp, logp.detach(), s["adv"].flatten()[row], B * half * cfg.rl_max_new)
        again = lambda x: x.repeat_interleave(half, 0)
        nce = info_nce(direct, t, own, cfg.temperature, same) + info_nce(v, t, again(own), cfg.temperature, again(same))
        (cfg.rl_rationale * loss + cfg.rl_decision * rl.decision_loss(choice, s["gain"]) + cfg.rl_nce * nce).backward()
        self.model.zero_grad(set_to_none=True)


def seconds(f, o, repeats=1):
    """The median of so many runs."""
    now, wait, times = time.process_time if o.clock == "cpu" else time.perf_counter, torch.cuda.synchronize if o.device.type == "cuda" else int, []
    for _ in range(repeats):
        wait()
        t = now()
        f()
        wait()
        times.append(now() - t)
    return float(np.median(times))


def peak_mb(f, o):
    """Peak memory of f() in MB: all of it on a GPU; on the CPU what it adds (Linux keeps the resident peak, and resets it on request)."""
    if o.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        f()
        return torch.cuda.max_memory_allocated() / 1e6
    status = lambda key: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1e3
    ctypes.CDLL(None).malloc_trim(0)                             # memory that was freed but kept would hide the peak
    with open("/proc/self/clear_refs", "w") as w:
        w.write("5")
    before = status("VmRSS")
    f()
    return max(0.0, status("VmHWM") - before)


def save(out, o, row, to="rows"):
    """A row more, written at once: a long run may be stopped, or end."""
    out[to].append(row)
    write_json(o.out, out)


def race(out, name, ours, peer, amount, unit, o, peer_name=f"transformers {transformers.__version__}"):
    """Both warm up, then take turns; a row of medians is added and printed. What does not fit in memory costs this row alone, and says so."""
    try:
        ours(), peer()
        once = seconds(ours, o) + seconds(peer, o)
        n = max(o.repeats, min(25, int(2 / max(once, 1e-6))))    # what is short is repeated for two seconds, but no more than 25 times
        times = np.array([(seconds(ours, o), seconds(peer, o)) for _ in range(n)])
        mine, theirs = (float(x) for x in amount / np.median(times, 0))
        save(out, o, dict(name=name, ours=mine, peer=theirs, ratio=mine / theirs, unit=unit, peer_name=peer_name, repeats=n))
        print(f"{name:<34}{mine:>12.2f}{theirs:>12.2f} {unit:<12}{mine / theirs:>7.2f}x", flush=True)
    except torch.OutOfMemoryError as e:
        save(out, o, dict(name=name, unit=unit, error=f"out of memory: {str(e)[:200]}"), "failed")
        print(f"{name}: out of memory, see \"failed\" in {o.out}", flush=True)
    if o.device.type == "cuda":                                  # here: inside the except its traceback would hold the activations
        torch.cuda.empty_cache()


def agree(what, a, b, tolerance, out):
    """Both sides must have computed the same; the gap is noted."""
    gap = float((torch.as_tensor(a).float().cpu() - torch.as_tensor(b).float().cpu()).abs().max())
    out["gaps"][what] = gap
    if not gap <= tolerance:
        raise ValueError(f"{what}: ours and transformers differ by {gap:.2g}, more than {tolerance:.2g}: not the same computation")


@torch.no_grad()
def embed_all(e, prompts):
    """What `encode` does after reading."""
    out = torch.empty(len(prompts), e.model.c.hidden)
    for rows in e.batches([len(p["ids"]) + 1 for p in prompts], 16):
        out[rows] = e.embed([prompts[i] for i in rows], "never", 0.5, 1)[0].cpu()
    return F.normalize(out, dim=-1)


def write(e, prompts, G, tokens, temperature=1.0, stop=True):
    how = e.reader.how if stop else dict(e.reader.how, stop=())
    return generate(e.model, collate(prompts, e.reader, device=e.model.device), tokens, G, **how, temperature=temperature)


def read_pairs(e, n):
    a, b = (make_items(n, e.reader.max_pixels, seed) for seed in (4, 5))
    return [dict(id=str(i), query=e.reader.read(x), target=e.reader.read(y), answer=str(i), negatives=[]) for i, (x, y) in enumerate(zip(a, b))]


def contrastive(e, pairs, cfg, drop=True):
    loss = contrastive_step(e.model, e.reader, pairs, [None] * len(pairs), [-1] * len(pairs), cfg)["loss"]
    if drop:
        e.model.zero_grad(set_to_none=True)
    return loss


def compare(size, out, o):
    """All tasks on one size, ours beside transformers'; then ours against the device."""
    with tempfile.TemporaryDirectory() as folder:
        e = make_model(size, folder, o)
        peer = Peer(folder, e.reader, o)
    r, exact, items = e.reader, o.dtype == torch.float32, make_items(o.items, e.reader.max_pixels)
    prompts, still, pairs = [r.read(x) for x in items], [x for x in items if "video" not in x], read_pairs(e, o.batch)
    cfg = types.SimpleNamespace(**vars(STEP), rl_group=2 * max(1, o.rollouts // 2), rl_max_new=o.tokens)
    flops, e.model.compiled = {}, o.compile                      # compiled or not decides the padding
    for name, f in (("embed", lambda: embed_all(e, prompts)), ("contrastive", lambda: contrastive(e, pairs, cfg))):
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:          # padding counts as work: it is computed
            f()
        flops[name] = f, counter.get_total_flops()
    e.model.compiled = False
    if o.compile:
        e.model.compile_layers()
    agree(f"embed, {size}", embed_all(e, prompts), peer.embed_all(prompts), 1e-4 if exact else 0.05, out)
    race(out, f"embed mixed, {size}", lambda: embed_all(e, prompts), lambda: peer.embed_all(prompts), len(items), "items/s", o)
    race(out, f"embed end to end, {size}", lambda: e.encode(still, reason="never"), lambda: peer.embed_all(peer.read(still)), len(still), "items/s", o)
    pictures = sum((x.get("image", []) for x in still), [])
    mine = lambda: levels(np.concatenate([p["pixels"][0] for window in e.windows(pictures, None, 1 << 20) for p in window]))
    theirs = lambda: peer.eyes(images=pictures, return_tensors="pt")["pixel_values"]
    agree(f"preprocess, {size}", mine(), theirs(), 1e-5, out)
    race(out, f"preprocess, {size}", mine, theirs, len(pictures), "pictures/s", o)
    if exact:                                                    # in bf16 a near tie may fall either way
        got = write(e, prompts[:6], 1, 12, 0.0)
        if [t[0][len(r.prefix) :][:n] for t, n in zip(got["tokens"], got["new"][:, 0])] != peer.generate(prompts[:6], 1, 12, sample=False):
            raise ValueError(f"generate, {size}: greedy tokens differ from transformers': not the same computation")
    queries, (Q, G, T) = [r.read(x) for x in make_items(o.queries, r.max_pixels, 2)], (o.queries, o.rollouts, o.tokens)
    race(out, f"generate {Q}x{G}x{T}, {size}", lambda: write(e, queries, G, T), lambda: peer.generate(queries, G, T), Q * G * T, "tokens/s", o)
    agree(f"contrastive, {size}", contrastive(e, pairs, cfg), peer.contrastive(pairs, cfg), 1e-3 if exact else 1.0, out)      # bf16: one masked negative more or less
    race(out, f"contrastive {o.batch} pairs, {size}", lambda: contrastive(e, pairs, cfg), lambda: peer.contrastive(pairs, cfg), o.batch, "pairs/s", o)
    few, same = pairs[: max(2, Q // 16)], torch.eye(max(2, Q // 16), dtype=torch.bool, device=o.device)                     # their activations must fit
    q, t = [p["query"] for p in few], [p["target"] for p in few]

    def ours():
        rl.grpo_step(e.model, r, q, t, same, cfg, torch.Generator(o.device).manual_seed(0))
        e.model.zero_grad(set_to_none=True)

    race(out, f"grpo {len(q)}x{cfg.rl_group}x{T}, {size}", ours, lambda: peer.grpo(q, t, same, cfg), len(q), "queries/s", o)
    if importlib.util.find_spec("trl"):
        given_rollouts(size, e, peer, [r.read(x) for x in still[: len(q)]], cfg, out, o)
    else:
        print("grpo given: left out, TRL is not installed", flush=True)
    e.model.eval()
    against_device(size, e, peer, prompts[0], flops, out, o)


def given_rollouts(size, e, peer, prompts, cfg, out, o):
    """The policy's part of a GRPO step, beside TRL's trainer: B queries x G rollouts of random tokens with random advantages, forward and backward.

    TRL gets tensors that are ready; ours also collates. In TRL every rollout is a row of its own, with the prompt and its pictures again.
    """
    import datasets
    import trl
    r, B, G, T, device = copy.copy(e.reader), len(prompts), cfg.rl_group, cfg.rl_max_new, o.device
    r.ban, rng = [], np.random.default_rng(6)                    # TRL bans no token
    written, adv = rng.integers(0, 250, (B, G, T)), torch.from_numpy(rng.standard_normal((B, G), dtype=np.float32)).to(device)
    with tempfile.TemporaryDirectory() as folder:
        args = trl.GRPOConfig(folder, per_device_train_batch_size=2, num_generations=2, max_completion_length=T, loss_type="dr_grpo", beta=0.0,
                              gradient_checkpointing=False, bf16=False, report_to=[], use_cpu=device.type == "cpu")
        trainer = trl.GRPOTrainer(peer.model, lambda **row: [0.0], args, datasets.Dataset.from_list([{"prompt": ""}] * 2), processing_class=peer.tok)
    trainer.current_gradient_accumulation_steps = 1              # its training loop sets it
    wide = [p for p in prompts for _ in range(G)]
    x, ids = peer.inputs(wide, [r.prefix] * (B * G), left=True), torch.from_numpy(written).to(device).view(B * G, T)
    given = dict(prompt_ids=x["input_ids"], prompt_mask=x["attention_mask"], completion_ids=ids, completion_mask=torch.ones_like(ids), advantages=adv.flatten(),
                 pixel_values=x["pixel_values"], image_grid_thw=x["image_grid_thw"], num_images=[len(p["pixels"]) for p in wide],
                 mm_token_type_ids=F.pad(x["mm_token_type_ids"], (0, T)))
    branches = [[[*r.prefix, *tokens] for tokens in row] for row in written.tolist()]

    def ours():
        e.model.zero_grad(set_to_none=True)
        batch = collate(prompts, r, branches, device)
        logp, row, branch = branch_logp(e.model, e.model(batch), batch, r, len(r.prefix))
        rl.policy_loss(logp, logp.detach(), adv[row, branch], B * G * T)[0].backward()
        return e.model.text.norm.weight.grad

    def theirs():
        peer.model.zero_grad(set_to_none=True)
        trainer.compute_loss(peer.model, given).backward()
        return peer.model.model.language_model.norm.weight.grad

    e.model.train(), peer.model.train()
    scale = float(theirs().abs().max())
    agree(f"grpo given, {size}", ours() / scale, theirs() / scale, 1e-3 if o.dtype == torch.float32 else 0.1, out)
    race(out, f"grpo given {B}x{G}x{T}, {size}", ours, theirs, B * G, "rollouts/s", o, f"TRL {trl.__version__}")


def against_device(size, e, peer, prompt, flops, out, o):
    """Embedding and training as shares of the measured matrix rate, decoding one row as a share of the measured copy bandwidth."""
    n, width = (8192, 1 << 30) if o.device.type == "cuda" else (768, 1 << 26)
    a, x = torch.randn(n, n, device=o.device).to(o.dtype), torch.zeros(width, dtype=torch.uint8, device=o.device)
    y, best = torch.empty_like(x), lambda f: min(seconds(f, o) for _ in range(10))
    rate, bandwidth = 2 * n**3 / best(lambda: linear(a, a)), 2 * width / best(lambda: y.copy_(x))
    del a, x, y
    beside = sum(p.nbytes for p in peer.model.parameters()) / 1e6 if o.device.type == "cuda" else 0.0        # the peer's weights are no part of our peak
    rows = [(name, total / seconds(f, o, o.repeats), "FLOP/s", rate, peak_mb(f, o) - beside) for name, (f, total) in flops.items()]
    e.model.eval()
    decode = lambda T: write(e, [prompt], 1, T, 0.0, stop=False)
    for T in (o.tokens, 3 * o.tokens):
        decode(T)
    t, c = [seconds(lambda: decode(T), o, o.repeats) for T in (o.tokens, 3 * o.tokens)], e.model.c                                    # their difference: no prefill
    weights = sum(p.numel() for p in (*e.model.text.layers.parameters(), e.model.lm_head.weight))                         # all are read for a token
    cache = 2 * c.layers * c.kv_heads * c.head_dim * (len(prompt["ids"]) + 2 * o.tokens)
    moved = (weights + cache) * e.model.lm_head.weight.element_size() * 2 * o.tokens / max(t[1] - t[0], 1e-9)
    rows.append(("decode batch 1", moved, "bytes/s", bandwidth, peak_mb(lambda: decode(o.tokens), o) - beside))
    for name, value, unit, limit, peak in rows:
        save(out, o, dict(name=f"{name}, {size}", value=value, unit=unit, limit=limit, share=value / limit, peak_mb=peak), "limits")
        print(f"{name + ', ' + size:<34}{value:>12.3g} {unit:<8} of {limit:.3g}: {value / limit:.0%}, peak {peak:,.0f} MB", flush=True)


def whole_step(size, out, o):
    """One training step with its optimizer on o.train pairs, through GradCache and with checkpointing; --lora trains adapters only."""
    with tempfile.TemporaryDirectory() as folder:
        e = make_model(size, folder, o)
    for_training(e.model, o.dtype, o.lora, checkpointing=True)
    pairs, optimizer = read_pairs(e, o.train), torch.optim.AdamW([p for p in e.model.parameters() if p.requires_grad], lr=1e-5, fused=o.device.type == "cuda")
    step = lambda: (contrastive(e, pairs, STEP, drop=False), optimizer.step(), optimizer.zero_grad(set_to_none=True))
    step()                                                       # the optimizer's states come to be
    times = []
    peak, t, name = peak_mb(lambda: times.append(seconds(step, o)), o), times[0], f"train {f'LoRA {o.lora}' if o.lora else 'in full'}, {size}"
    save(out, o, dict(name=name, value=o.train / t, unit="pairs/s", peak_mb=peak), "limits")
    print(f"{name:<34}{o.train} pairs in {t:.1f} s, peak {peak:,.0f} MB", flush=True)


def growth(out, o):
    """One thing grows, the others stay. Rows {axis, value, seconds, peak_mb, exponent}: time ~ value^exponent since the value before."""
    with tempfile.TemporaryDirectory() as folder:
        e = make_model(o.size.split(",")[0], folder, o)
    r, rng, side = e.reader, np.random.default_rng(0), int(math.sqrt(e.reader.max_pixels)) // 2
    text = lambda n: {"ids": rng.integers(0, 250, n), "pixels": [], "grids": []}
    seen = lambda n: r.read({"image": [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(n)]})
    unit = lambda n: F.normalize(torch.from_numpy(rng.standard_normal((n, 128), dtype=np.float32)), dim=1).numpy()
    pair = lambda i: dict(id=i, query=text(64), target=text(64), answer=i, negatives=[])
    embed = lambda prompts: lambda: e.embed(prompts, "never", 0.5, 1)
    queries, once, k = unit(32), [seen(1)] * 2, 1 if o.size == "tiny" else 4
    cases = [("batch (rows of 128 tokens)", k, lambda n: embed([text(128)] * n)), ("length (tokens of a row)", 128 * k, lambda n: embed([text(n)])),
             ("pictures per item", k, lambda n: embed([seen(n)])), ("group size (rollouts)", k, lambda n: lambda: write(e, once, n, 16)),
             ("training batch (pairs)", 2 * k, lambda n: (lambda pairs: lambda: contrastive(e, pairs, STEP))([pair(i) for i in range(n)])),
             ("corpus (vectors ranked)", 1000 * k, lambda n: (lambda corpus: lambda: rank(queries, corpus, [[0]] * 32))(unit(n)))]
    figure, axes = plt.subplots(2, 3, figsize=(12, 6))
    for (axis, first, make), ax in zip(cases, axes.flat):
        mine = []
        for value in (first, 2 * first, 4 * first, 8 * first):
            f, last = make(value), mine[-1:] or [None]
            f()
            t = seconds(f, o, o.repeats)
            mine.append(dict(axis=axis, value=value, seconds=t, peak_mb=peak_mb(f, o), exponent=last[0] and math.log2(t / last[0]["seconds"])))
            print(f"{axis:<30}{value:>8}{t:>10.4f} s{mine[-1]['peak_mb']:>10.1f} MB   exponent {mine[-1]['exponent'] or math.nan:.2f}", flush=True)
        x, y = [m["value"] for m in mine], [m["seconds"] for m in mine]
        ax.loglog(x, y, "o-", label="seconds"), ax.loglog(x, [y[0] * v / x[0] for v in x], ":", color="grey", label="linear"), ax.set_title(axis)
        ax.twinx().plot(x, [m["peak_mb"] for m in mine], "s--", color="tab:orange")
        out["growth"] += mine
    axes[0, 0].legend(title="orange: peak MB"), figure.tight_layout(), figure.savefig(os.path.splitext(o.out)[0] + ".png", dpi=80)


# One full run of train.py's presets (a test holds the numbers together): VLM2Vec-V2's training pairs and MMEB-V2's queries, by data.py's tables
FULL = types.SimpleNamespace(pairs=2_170_000, queries=48_590, videos=34_940, candidates=250_000, batch=1024, propose_k=4, propose_max_new=256, select_folds=2,
                             select_steps=500, embed_steps=5000, rl_steps=500, rl_batch=64, rl_group=8, rl_max_new=128, eval_max_new=128, max_pixels=1003520)


def work(c, r=FULL):
    """{stage: (FLOPs apart from writing, tokens written)}, by arithmetic. A query is a picture of max_pixels and 64 words, a target 64 words, a video
    four such pictures, a candidate one; a rationale has propose_max_new tokens. So this is rather too much than too little.

    A forward pass: 2 per weight and token, and 4 x width per token for each one that it looks at. A training step is five of them: GradCache's first
    look, forward, forward again (checkpointing), and twice as much backward.
    """
    with torch.device("meta"):
        m = Qwen3VL(c)
    weights = lambda *parts: sum(p.numel() for part in parts for p in part.parameters())
    v, n = m.visual, r.max_pixels // 16**2                       # n patches; a fourth of them become tokens
    text = lambda new, before=0: new * (2 * weights(m.text.layers) + 4 * c.layers * c.heads * c.head_dim * (before + new / 2))
    picture = n * (2 * weights(v.patch_embed, v.blocks) + weights(v.merger, v.deepstack_merger_list) / 2 + 4 * c.v_layers * c.v_hidden * n)
    q, t, thought = picture + text(n // 4 + 64), text(64), lambda new: text(new, n // 4 + 64)
    learnt, judged = q + t + thought(r.propose_max_new), q + t + 3 * r.propose_k * thought(r.propose_max_new)             # own, and two placebos for each
    rollouts = r.rl_steps * r.rl_batch * r.rl_group // 2
    return {"propose": (r.pairs * q, r.pairs * r.propose_k * r.propose_max_new),
            "select": (5 * r.select_folds * r.select_steps * r.batch * learnt + r.pairs * judged, 0), "embed": (5 * r.embed_steps * r.batch * learnt, 0),
            "rl": (r.rl_steps * r.rl_batch * (6 * q + 5 * t) + 5 * rollouts * thought(r.rl_max_new), rollouts * r.rl_max_new),
            "eval": ((2 * (r.queries + 4 * r.videos) + r.candidates) * q, (r.queries + r.videos) * r.eval_max_new),          # queries directly, and reasoned
            "a billion pictures": (1e9 * q, 0)}


def cost(o):
    """Prints work() of each size and, from the rates measured on it that o.out holds, hours: FLOPs / rate + tokens / rate."""
    out = read_json(o.out)
    print("| size | stage | PFLOP | million tokens written | hours |\n| --- | --- | ---: | ---: | ---: |")
    for size in o.size.split(","):
        rate = {x["name"].split(",")[0]: x["value"] for x in out["limits"] if x["name"].endswith(f", {size}")}
        rate |= {x["name"].split()[0]: x["ours"] for x in out["rows"] if x["name"].endswith(f", {size}") and x["name"].startswith("generate")}
        for stage, (flops, tokens) in work(SIZES[size][0]).items():
            key = "contrastive" if stage in ("select", "embed", "rl") else "embed"
            hours = f"{(flops / rate[key] + tokens / rate['generate']) / 3600:,.1f}" if {key, "generate"} <= set(rate) else "not measured"
            print(f"| {size} | {stage} | {flops / 1e15:,.0f} | {tokens / 1e6:,.0f} | {hours} |")
    print(f"\nRates: {o.out}, {out['device']}, {out['dtype']}")


def parse(argv):
    a = argparse.ArgumentParser(description="Side by side with transformers: embedding, generation, GRPO and contrastive steps, preprocessing.")
    a.add_argument("--out", required=True, help="JSON file; --growth draws a .png beside it")
    a.add_argument("--device", help="CUDA when there is one")
    a.add_argument("--dtype", choices=["float32", "bfloat16"], help="float32 on the CPU, bfloat16 on a GPU")
    a.add_argument("--size", default="pocket,mid", help=f"some of {','.join(SIZES)}")
    a.add_argument("--compile", action="store_true", help="torch.compile our layers; on a GPU CUDA graphs for our decoding")
    a.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: processor seconds, for a machine that others use too")
    for name, value, what in (("queries", 64, "to write rationales for"), ("rollouts", 8, "per query"), ("tokens", 64, "per rollout"), ("items", 48, "to embed"),
                              ("batch", 16, "pairs of the contrastive row"), ("repeats", 5, "in turns, at least; medians are reported"),
                              ("train", 0, "instead: one whole training step of each size on so many pairs"), ("lora", 0, "... by LoRA of this rank")):
        a.add_argument("--" + name, type=int, default=value, help=f"{what} ({value})")
    a.add_argument("--growth", action="store_true", help="how cost grows (first size only) instead of the comparison")
    a.add_argument("--cost", action="store_true", help="measure nothing: what a full run takes, at the rates that --out holds from an earlier call")
    o = a.parse_args(argv)
    o.device = find_device(o.device)
    o.dtype = getattr(torch, o.dtype or ("bfloat16" if o.device.type == "cuda" else "float32"))
    if bad := [s for s in o.size.split(",") if s not in SIZES]:
        raise ValueError(f"--size {bad[0]}: expected some of {', '.join(SIZES)}")
    if low := [n for n in ("queries", "rollouts", "tokens", "items", "batch", "repeats") if getattr(o, n) < 1 + (n == "items")]:
        raise ValueError(f"--{low[0]} {getattr(o, low[0])}: too few")
    if not os.path.isdir(os.path.dirname(os.path.abspath(o.out))):
        raise ValueError(f"--out {o.out}: no such folder")
    return o


def main(argv=None):
    try:
        o = parse(argv)
        if o.cost:
            return cost(o)
        transformers.utils.logging.disable_progress_bar()
        name = torch.cuda.get_device_name(o.device) if o.device.type == "cuda" else f"CPU, {torch.get_num_threads()} of {os.cpu_count()} cores"
        versions = dict(python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__, numpy=np.__version__)
        out = dict(device=name, date=time.strftime("%Y-%m-%d"), dtype=str(o.dtype)[6:], clock=o.clock, compiled=o.compile, repeats=o.repeats, versions=versions, rows=[], limits=[], growth=[], gaps={}, failed=[])
        for size in o.size.split(",")[: 1 if o.growth else None]:
            growth(out, o) if o.growth else whole_step(size, out, o) if o.train else compare(size, out, o)
            write_json(o.out, out)
    except torch.OutOfMemoryError as e:
        sys.exit(f"bench.py: out of memory with --size {o.size}: lower --queries, --tokens, --items, --batch or --train, or use --lora ({str(e)[:200]!r})")
    except (ValueError, OSError) as e:
        sys.exit(f"bench.py: {e}")
    print(f"{name}; {o.out} written")


if __name__ == "__main__":
    main()
