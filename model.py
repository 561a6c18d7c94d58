"""
Qwen3-VL by hand: the network, its words (tokenizer) and its eyes (picture -> patches), in plain PyTorch.

The idea. A vision tower turns 16x16-pixel patches into vectors, a merger folds every 2x2 of them into one visual token, and
these tokens take the places of <|image_pad|> in an ordinary decoder-only transformer. Three details carry Qwen3-VL:
  * DeepStack: intermediate layers of the vision tower are merged too and added to the first text layers at the visual places;
  * interleaved M-RoPE: every token has three positions (time, row, column) that share the rotary frequencies in turn T H W T H W;
  * q/k RMS-norm per head before the rotation.
Tensor names and shapes are those of the published checkpoints, so `load` and `save` are a loop over names.

What serves embedding and RL, and is ours:
  * a row may hold one prompt and several *branches* that continue it: `branch` says which token belongs to which; a token sees
    its prompt and its own branch only. So the direct embedding, the decision and K rationales cost one prompt (see `tree_mask`);
  * `generate`: G rollouts share the prompt's keys and values (never copied G times), finished rollouts are retired.
  * `add_lora`, `shard`, `merge_lora`: large models in training, and the way back to a plain checkpoint.

Shape vocabulary of all files:
  B rows (queries or targets)   G rollouts or branches of a row   S tokens of a row   T generated tokens
  H text width   D vision width   A heads   C kv heads   d head size   N patches   M = N/4 visual tokens   V vocabulary
  a *segment* is one picture or one group of two video frames: a grid of (h, w) patches, i.e. h*w/4 visual tokens.

How to run: nothing to run here. `python test_all.py -k parity` compares it with transformers' own implementation.

Left out: mixture-of-experts variants, quantisation, custom kernels (SDPA only), tensor parallelism, beam search.
Sources: transformers' modeling_qwen3_vl.py (v4.57, v5) and Qwen's published configs for facts; every line here is our own.
"""

import json
import math
import os
import re
import unicodedata
from dataclasses import dataclass

import numpy as np
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

# ---------------------------------------------------------------------------------------------------------------------
# Configuration: one flat dataclass, one row per size


@dataclass
class Config:
    """Everything that decides a shape. Defaults are what all published dense Qwen3-VL models share."""
    vocab: int = 151936             # rows of the embedding; the tokenizer uses 151,669 of them
    hidden: int = 2048              # H
    mlp: int = 6144
    layers: int = 28
    heads: int = 16                 # A
    kv_heads: int = 8               # C
    head_dim: int = 128             # d; heads * head_dim need not equal hidden (4B: 4096 against 2560)
    tie: bool = True                # output head = input embedding
    rope_theta: float = 5e6
    mrope_section: tuple = (24, 20, 20)   # frequencies for time, row, column; they sum to head_dim / 2
    eps: float = 1e-6
    v_hidden: int = 1024            # D
    v_mlp: int = 4096
    v_layers: int = 24
    v_heads: int = 16
    v_positions: int = 2304         # a 48 x 48 table, interpolated to any grid
    v_deepstack: tuple = (5, 11, 17)      # vision layers that are also fed to text layers 0, 1, 2
    image_token: int = 151655
    video_token: int = 151656
    vision_start: int = 151652
    vision_end: int = 151653


PATCH, TEMPORAL, MERGE = 16, 2, 2         # pixels of a patch's side, frames in a patch, patches merged per side
FACTOR = PATCH * MERGE                    # 32: picture sides are rounded to this, so one visual token covers 32 x 32 pixels
PATCH_DIM = 3 * TEMPORAL * PATCH * PATCH  # 1536 numbers in a patch

CONFIGS = {
    # hidden 128 x 4 layers reads 3x3-tile pictures; ids and vocab are filled in by the pocket tokenizer
    "pocket": Config(vocab=0, hidden=128, mlp=384, layers=4, heads=4, kv_heads=2, head_dim=32, mrope_section=(8, 4, 4),
                     rope_theta=1e4, v_hidden=128, v_mlp=256, v_layers=2, v_heads=4, v_positions=144, v_deepstack=(0,)),
    "2b": Config(),
    "4b": Config(hidden=2560, mlp=9728, layers=36, heads=32),
    "8b": Config(hidden=4096, mlp=12288, layers=36, heads=32, tie=False,
                 v_hidden=1152, v_mlp=4304, v_layers=27, v_deepstack=(8, 16, 24)),
}


def config_from_hf(c, where="config.json"):
    """A Hugging Face config dict (transformers 4 or 5 spelling) -> Config. ValueError names what we do not implement."""
    kind = c.get("model_type") if isinstance(c, dict) else type(c).__name__
    if kind != "qwen3_vl":
        raise ValueError(f"{where}: model_type is {kind!r}; only dense 'qwen3_vl' models are implemented here")
    try:
        t, v = c["text_config"], c["vision_config"]
        rope = t.get("rope_parameters") or t.get("rope_scaling") or {}           # v5 / v4
        out = Config(
            vocab=t["vocab_size"], hidden=t["hidden_size"], mlp=t["intermediate_size"], layers=t["num_hidden_layers"],
            heads=t["num_attention_heads"], kv_heads=t["num_key_value_heads"],
            head_dim=t.get("head_dim") or t["hidden_size"] // t["num_attention_heads"],
            tie=bool(c.get("tie_word_embeddings", t.get("tie_word_embeddings", False))),
            rope_theta=float(rope["rope_theta"] if "rope_theta" in rope else t["rope_theta"]),
            mrope_section=tuple(rope.get("mrope_section") or (24, 20, 20)), eps=float(t.get("rms_norm_eps", 1e-6)),
            v_hidden=v["hidden_size"], v_mlp=v["intermediate_size"], v_layers=v["depth"], v_heads=v["num_heads"],
            v_positions=v["num_position_embeddings"], v_deepstack=tuple(v["deepstack_visual_indexes"]),
            image_token=c.get("image_token_id", 151655), video_token=c.get("video_token_id", 151656),
            vision_start=c.get("vision_start_token_id", 151652), vision_end=c.get("vision_end_token_id", 151653))
    except KeyError as e:
        raise ValueError(f"{where}: the key {e} is missing") from None
    except (TypeError, AttributeError, ValueError) as e:
        raise ValueError(f"{where}: a value is of the wrong type ({e})") from None
    check_config(out, t, v, rope, where)
    return out


def check_config(out, t, v, rope, where):
    """Of a Config and what it was read from (text_config, vision_config, rope): ValueError for what cannot be, or is not implemented here."""
    for name in ("vocab", "hidden", "mlp", "layers", "heads", "kv_heads", "head_dim", "v_hidden", "v_mlp", "v_layers", "v_heads", "v_positions"):
        if type(n := getattr(out, name)) is not int or n < 1:
            raise ValueError(f"{where}: {name} ({'vision' if name[:2] == 'v_' else 'text'}_config) is {n!r}, expected a whole number above 0")
    fixed = [("text_config.hidden_act", t.get("hidden_act", "silu"), "silu"), ("attention_bias", t.get("attention_bias") or False, False),
             ("mrope_interleaved", rope.get("mrope_interleaved", True), True), ("length of mrope_section", len(out.mrope_section), 3),
             ("rope_type", rope.get("rope_type", rope.get("type", "default")), ("default", "mrope")),
             ("vision rope_theta", float((v.get("rope_parameters") or {}).get("rope_theta", 1e4)), 1e4),
             ("deepstack_visual_indexes (distinct layers of the tower)",
              [i for i in out.v_deepstack if type(i) is not int or not 0 <= i < out.v_layers or out.v_deepstack.count(i) > 1], []),
             ("mrope_section (whole numbers)", [n for n in out.mrope_section if type(n) is not int or n < 0], []),
             ("number of layers, a thousand at most", max(out.layers, out.v_layers) <= 1000, True),
             ("rope_theta above 0", out.rope_theta > 0, True), ("rms_norm_eps above 0", out.eps > 0, True),
             ("vision hidden_act", v.get("hidden_act", "gelu_pytorch_tanh"), "gelu_pytorch_tanh"),
             ("patch_size", v.get("patch_size", 16), PATCH), ("temporal_patch_size", v.get("temporal_patch_size", 2), TEMPORAL),
             ("spatial_merge_size", v.get("spatial_merge_size", 2), MERGE), ("in_channels", v.get("in_channels", 3), 3),
             ("out_hidden_size", v.get("out_hidden_size", out.hidden), out.hidden),
             ("num_attention_heads modulo num_key_value_heads", out.heads % out.kv_heads, 0),
             ("vision hidden_size modulo 4 * num_heads", out.v_hidden % (4 * out.v_heads), 0),
             ("num_position_embeddings (a square)", math.isqrt(out.v_positions) ** 2, out.v_positions)]
    for name, got, want in fixed:
        if got != want and not (isinstance(want, tuple) and got in want):
            raise ValueError(f"{where}: {name} is {got!r}, this code implements {want!r}")


def config_to_hf(c, dtype, eos, pad):
    """Config -> a config.json that transformers 4.57 and 5 both open (both rope spellings are written)."""
    rope = {"mrope_interleaved": True, "mrope_section": list(c.mrope_section), "rope_type": "default"}
    text = dict(model_type="qwen3_vl_text", vocab_size=c.vocab, hidden_size=c.hidden, intermediate_size=c.mlp, num_hidden_layers=c.layers,
                num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_dim, hidden_act="silu", rms_norm_eps=c.eps,
                max_position_embeddings=262144, attention_bias=False, attention_dropout=0.0, tie_word_embeddings=c.tie, use_cache=True,
                bos_token_id=pad, eos_token_id=eos, dtype=dtype, rope_theta=c.rope_theta, rope_scaling=dict(rope),
                rope_parameters=dict(rope, rope_theta=c.rope_theta))
    vision = dict(model_type="qwen3_vl_vision", depth=c.v_layers, hidden_size=c.v_hidden, intermediate_size=c.v_mlp, num_heads=c.v_heads,
                  in_channels=3, patch_size=PATCH, temporal_patch_size=TEMPORAL, spatial_merge_size=MERGE, out_hidden_size=c.hidden,
                  num_position_embeddings=c.v_positions, deepstack_visual_indexes=list(c.v_deepstack), hidden_act="gelu_pytorch_tanh")
    return dict(architectures=["Qwen3VLForConditionalGeneration"], model_type="qwen3_vl", dtype=dtype, tie_word_embeddings=c.tie,
                image_token_id=c.image_token, video_token_id=c.video_token, vision_start_token_id=c.vision_start,
                vision_end_token_id=c.vision_end, text_config=text, vision_config=vision)


# ---------------------------------------------------------------------------------------------------------------------
# Matrix products. On a CPU torch gives fp32 ones to MKL. oneDNN, in the same wheel, is about twice as fast on an AMD EPYC with AVX-512
# (results/tuning.txt) and applies the activation on the way out. Small products stay with MKL: it starts faster.

FOR_ONEDNN = 1 << 21          # multiplications of a product that oneDNN gets; the two are level somewhat below
HAS_ONEDNN = torch.backends.mkldnn.is_available()
ACT = {"none": lambda y: y, "swish": F.silu, "gelu": F.gelu, "gelu tanh": lambda y: F.gelu(y, approximate="tanh")}    # by oneDNN's names


def onednn(x, w, b=None, act="none"):
    return torch.ops.mkldnn._linear_pointwise(x, w, b, act.split()[0], [], "tanh" if "tanh" in act else "none")


class OneDNN(torch.autograd.Function):
    """The same with its gradients, again by oneDNN."""

    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        return onednn(x, w, b)

    @staticmethod
    def backward(ctx, g):
        (x, w), (need_x, need_w, need_b) = ctx.saved_tensors, ctx.needs_input_grad
        g, flat = g.contiguous(), g.reshape(-1, g.shape[-1]).contiguous()
        return onednn(g, w.T) if need_x else None, onednn(flat.T, x.reshape(-1, x.shape[-1]).T) if need_w else None, flat.sum(0) if need_b else None


def linear(x, w, b=None, act="none"):
    """act(x w^T + b) for x (..., n), w (m, n)."""
    fp32 = x.device.type == "cpu" and x.dtype == w.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if not fp32 or x.numel() * len(w) < FOR_ONEDNN or torch.compiler.is_compiling() or not (HAS_ONEDNN and torch.backends.mkldnn.enabled):
        return ACT[act](F.linear(x, w, b))
    x = x.contiguous()                                           # other strides fall to slow reference code
    return ACT[act](OneDNN.apply(x, w, b)) if torch.is_grad_enabled() else onednn(x, w, b, act)


class Linear(nn.Linear):
    def forward(self, x, act="none"):
        return linear(x, self.weight, self.bias, act)


# ---------------------------------------------------------------------------------------------------------------------
# The vision tower


def rotate(x, cos, sin):
    """Rotary embedding. x (..., d), cos and sin broadcastable to it; dimension i is paired with i + d/2, and sin is negative up to d/2."""
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((b, a), dim=-1), sin)


class VisionAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads = c.v_heads
        self.qkv = Linear(c.v_hidden, 3 * c.v_hidden)
        self.proj = Linear(c.v_hidden, c.v_hidden)

    def forward(self, x, cos, sin, buckets):
        """x (N, D); cos, sin (N, 1, d) fp32; buckets [(n, index or None)]: the segments of n patches each, attended in one call."""
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)                       # (N, A, d) each
        q, k = rotate(q.float(), cos, sin).to(v.dtype), rotate(k.float(), cos, sin).to(v.dtype)
        y = torch.empty_like(q) if len(buckets) > 1 else None
        for n, index in buckets:                                 # attention stays within a segment: one picture, one frame group
            pick = lambda z: (z if index is None else z[index]).view(-1, n, self.heads, z.shape[-1]).transpose(1, 2)
            o = F.scaled_dot_product_attention(pick(q), pick(k), pick(v))                     # (segments, A, n, d)
            o = o.transpose(1, 2).reshape(-1, self.heads, q.shape[-1])
            y = o if index is None else y.index_copy(0, index, o)
        return self.proj(y.reshape(len(x), -1))


class VisionBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.v_hidden, eps=1e-6)
        self.norm2 = nn.LayerNorm(c.v_hidden, eps=1e-6)
        self.attn = VisionAttention(c)
        self.mlp = nn.ModuleDict({"linear_fc1": Linear(c.v_hidden, c.v_mlp), "linear_fc2": Linear(c.v_mlp, c.v_hidden)})

    def forward(self, x, cos, sin, buckets):
        x = x + self.attn(self.norm1(x), cos, sin, buckets)
        return x + self.mlp["linear_fc2"](self.mlp["linear_fc1"](self.norm2(x), "gelu tanh"))


class Merger(nn.Module):
    """Four neighbouring patches -> one visual token. The main merger norms each patch, the DeepStack ones the four together."""

    def __init__(self, c, norm_after):
        super().__init__()
        wide = c.v_hidden * MERGE**2
        self.norm_after = norm_after
        self.norm = nn.LayerNorm(wide if norm_after else c.v_hidden, eps=1e-6)
        self.linear_fc1 = Linear(wide, wide)
        self.linear_fc2 = Linear(wide, c.hidden)

    def forward(self, x):                                        # (N, D) -> (M, H)
        wide = self.linear_fc1.in_features
        x = self.norm(x.view(-1, wide)) if self.norm_after else self.norm(x).view(-1, wide)
        return self.linear_fc2(self.linear_fc1(x, "gelu"))


class VisionTower(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, c.v_hidden, (TEMPORAL, PATCH, PATCH), (TEMPORAL, PATCH, PATCH))})
        self.pos_embed = nn.Embedding(c.v_positions, c.v_hidden)
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.v_layers))
        self.merger = Merger(c, norm_after=False)
        self.deepstack_merger_list = nn.ModuleList(Merger(c, norm_after=True) for _ in c.v_deepstack)
        self.checkpointing = False

    def places(self, grids):
        """Row and column of every patch, in the order of `patchify` (2x2 blocks in raster order, then the four inside): (N,) each."""
        rows, cols = [], []
        for h, w in grids:
            r = torch.arange(h).view(h // 2, 1, 2, 1).expand(h // 2, w // 2, 2, 2).reshape(-1)
            k = torch.arange(w).view(1, w // 2, 1, 2).expand(h // 2, w // 2, 2, 2).reshape(-1)
            rows.append(r), cols.append(k)
        return torch.cat(rows), torch.cat(cols)

    def positions(self, grids, row, col):
        """The learned 48x48 table, bilinearly stretched over each grid (corners aligned): (N, D)."""
        side = math.isqrt(self.c.v_positions)
        n = torch.tensor([h * w for h, w in grids])
        h = torch.tensor([h for h, _ in grids]).repeat_interleave(n)
        w = torch.tensor([w for _, w in grids]).repeat_interleave(n)
        y = row * (side - 1) / (h - 1).clamp(min=1)
        x = col * (side - 1) / (w - 1).clamp(min=1)
        y0, x0 = y.long(), x.long()
        y1, x1 = (y0 + 1).clamp(max=side - 1), (x0 + 1).clamp(max=side - 1)
        fy, fx = y - y0, x - x0
        dev, dtype = self.pos_embed.weight.device, self.pos_embed.weight.dtype
        corners = [(y0, x0, (1 - fy) * (1 - fx)), (y0, x1, (1 - fy) * fx), (y1, x0, fy * (1 - fx)), (y1, x1, fy * fx)]
        return sum(self.pos_embed((a * side + b).to(dev)) * f[:, None].to(dev, dtype) for a, b, f in corners)

    def forward(self, pixels, grids):
        """pixels (N, 1536), grids [(h, w)] of every segment -> visual tokens (M, H), DeepStack features [(M, H)]."""
        # by halves, so that a layer finds in the processor's cache what the one before left there (2048: results/tuning.txt)
        if pixels.device.type == "cpu" and len(pixels) > 2048 and len(grids) > 1:
            k = len(grids) // 2
            n = sum(h * w for h, w in grids[:k])
            (a, deep_a), (b, deep_b) = self(pixels[:n], grids[:k]), self(pixels[n:], grids[k:])
            return torch.cat((a, b)), [torch.cat(z) for z in zip(deep_a, deep_b)]
        w = self.patch_embed["proj"]
        # A convolution whose stride is its kernel is a matrix product; Conv3d itself is 10-20x slower on some machines.
        x = linear(pixels.to(w.weight.dtype), w.weight.view(len(w.weight), -1), w.bias)       # (N, D)
        row, col = self.places(grids)
        x = x + self.positions(grids, row, col)
        d = self.c.v_hidden // self.c.v_heads
        inv = 1e4 ** -(torch.arange(0, d // 2, 2) / (d // 2))
        angle = torch.cat((row[:, None] * inv, col[:, None] * inv), dim=1)                    # (N, d/2)
        angle = torch.cat((angle, angle), dim=1)[:, None].to(x.device)                        # (N, 1, d)
        cos, sin = angle.cos(), angle.sin()
        sin[..., : d // 2].neg_()
        buckets = self.buckets(grids, x.device)
        deep = []
        for i, block in enumerate(self.blocks):
            run = (lambda *a: checkpoint(block, *a, use_reentrant=False)) if self.checkpointing and self.training else block
            x = run(x, cos, sin, buckets)
            if i in self.c.v_deepstack:
                deep.append(self.deepstack_merger_list[self.c.v_deepstack.index(i)](x))
        return self.merger(x), deep

    @staticmethod
    def buckets(grids, device):
        """Segments of equal length share one attention call. One length in the batch (the usual case) needs no index."""
        lengths = [h * w for h, w in grids]
        if len(set(lengths)) == 1:
            return [(lengths[0], None)]
        starts = np.cumsum([0] + lengths[:-1])
        out = []
        for n in sorted(set(lengths)):
            index = np.concatenate([np.arange(s, s + n) for s, m in zip(starts, lengths) if m == n])
            out.append((n, torch.from_numpy(index).to(device)))
        return out


# ---------------------------------------------------------------------------------------------------------------------
# The text tower


class RMSNorm(nn.Module):
    def __init__(self, n, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.eps = eps

    def forward(self, x):                                        # fp32 inside, cast back, then the weight (as published)
        y = x.float()
        mean = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square() / y.shape[-1]       # of the squares, in one pass
        y = y * torch.rsqrt(mean + self.eps)
        return self.weight * y.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.q_proj = Linear(c.hidden, c.heads * c.head_dim, bias=False)
        self.k_proj = Linear(c.hidden, c.kv_heads * c.head_dim, bias=False)
        self.v_proj = Linear(c.hidden, c.kv_heads * c.head_dim, bias=False)
        self.o_proj = Linear(c.heads * c.head_dim, c.hidden, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.eps)
        self.k_norm = RMSNorm(c.head_dim, c.eps)

    def forward(self, x, cos, sin, mask, past):
        """x (B, S, H); cos, sin (B, 1, S, d); mask None (causal) or bool (B, 1, S, S), True = may look; past: None, or what Cache.past
        gives while rollouts are written -> (B, S, H), and the keys and values (B, C, S, d) of these tokens."""
        B, S, d = x.shape[0], x.shape[1], self.c.head_dim
        q = self.q_norm(self.q_proj(x).view(B, S, -1, d)).transpose(1, 2)                     # (B, A, S, d)
        k = self.k_norm(self.k_proj(x).view(B, S, -1, d)).transpose(1, 2)                     # (B, C, S, d)
        v = self.v_proj(x).view(B, S, -1, d).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if past is None:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.c.heads != self.c.kv_heads)
        else:
            y = attend(q, k, v, *past)
        return self.o_proj(y.transpose(1, 2).reshape(B, S, -1)), k, v


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden, c.eps)
        self.post_attention_layernorm = RMSNorm(c.hidden, c.eps)
        self.self_attn = Attention(c)
        self.mlp = nn.ModuleDict({"gate_proj": Linear(c.hidden, c.mlp, bias=False), "up_proj": Linear(c.hidden, c.mlp, bias=False),
                                  "down_proj": Linear(c.mlp, c.hidden, bias=False)})

    def forward(self, x, cos, sin, mask, past):
        y, k, v = self.self_attn(self.input_layernorm(x), cos, sin, mask, past)
        x = x + y
        y = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](self.mlp["gate_proj"](y, "swish") * self.mlp["up_proj"](y)), k, v


class TextTower(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab, c.hidden)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.hidden, c.eps)
        self.checkpointing = False

    def rope(self, pos, dtype):
        """pos (3, B, S) -> cos, sin (B, 1, S, d). Frequency i turns with time, row or column by i mod 3 (interleaved M-RoPE)."""
        half = self.c.head_dim // 2
        inv = self.c.rope_theta ** -(torch.arange(half, device=pos.device, dtype=torch.float32) / half)
        i, (_, row, col) = torch.arange(half, device=pos.device), self.c.mrope_section
        axis = ((i % 3 == 1) & (i < 3 * row)) + 2 * ((i % 3 == 2) & (i < 3 * col))            # 0 = time, also beyond 3 * section
        angle = (pos[axis].permute(1, 2, 0).float() * inv)[:, None]                           # (B, 1, S, d/2)
        sin = torch.cat((-angle.sin(), angle.sin()), dim=-1)
        return torch.cat((angle, angle), dim=-1).cos().to(dtype), sin.to(dtype)               # the cast is transformers' too: bf16 parity needs it

    def forward(self, x, pos, mask=None, cache=None, deep=(), where=None):
        """x (B, S, H) embedded tokens, pos (3, B, S); deep: features for the places `where` (M,) of the flattened batch -> (B, S, H), final
        norm done."""
        cos, sin = self.rope(pos, x.dtype)
        for i, layer in enumerate(self.layers):
            past = cache and cache.past(i)
            if self.checkpointing and self.training:
                x = checkpoint(lambda layer, *a: layer(*a)[0], layer, x, cos, sin, mask, past, use_reentrant=False)
            else:
                x, k, v = layer(x, cos, sin, mask, past)
                if cache and not past:                           # a prefill: its keys and values are kept
                    cache.k.append(k), cache.v.append(v)
            if i < len(deep):                                    # DeepStack: only the first layers, only visual places
                x = x.flatten(0, 1).index_add(0, where, deep[i].to(x.dtype)).view_as(x)
        return self.norm(x)


# ---------------------------------------------------------------------------------------------------------------------
# The whole model


def tree_mask(branch):
    """branch (B, S): 0 prompt, k >= 1 the k-th continuation of the prompt, -1 padding -> bool (B, 1, S, S), True = may look.

    A token sees what stands before it in the prompt or in its own branch. Padding sees itself alone (no NaN) and nobody sees it.
    """
    q, k = branch[:, :, None], branch[:, None, :]
    S = branch.shape[1]
    causal = torch.ones(S, S, dtype=torch.bool, device=branch.device).tril()
    same = ((k == 0) | (k == q)) & (k >= 0)
    return ((causal & same) | torch.eye(S, dtype=torch.bool, device=branch.device))[:, None]


class Qwen3VL(nn.Module):
    """A *batch* is a dict of tensors, made by embed.collate:
        ids (B, S) int64            pos (3, B, S) int64 from `rope_positions`       lengths (B,) tokens of each row
        branch None or (B, S)       None: every row is one plain sequence, padded on the right (the quick causal path)
        pixels None or (N, 1536)    grids [(h, w)] of every segment, in the order in which the rows use them
    """

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.model = nn.ModuleDict({"visual": VisionTower(c), "language_model": TextTower(c)})
        self.lm_head = Linear(c.hidden, c.vocab, bias=False)
        if c.tie:
            self.lm_head.weight = self.model["language_model"].embed_tokens.weight
        self.compiled = False                                    # see compile_layers
        self.has_head = True                                     # False for embedding checkpoints that were published without one

    @property
    def visual(self):
        return self.model["visual"]

    @property
    def text(self):
        return self.model["language_model"]

    @property
    def device(self):
        return self.text.norm.weight.device

    @property
    def dtype(self):
        return self.text.norm.weight.dtype

    def init_weights(self, std=0.02):
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Embedding, nn.Conv3d)):
                nn.init.normal_(m.weight, std=std)
                if getattr(m, "bias", None) is not None:
                    nn.init.zeros_(m.bias)
        return self

    def set_checkpointing(self, on):
        self.visual.checkpointing = self.text.checkpointing = on

    def compile_layers(self, **options):
        """torch.compile (with its options) of a text layer: all layers share its code, so one compilation serves a model of any depth. On a
        GPU `generate` then records its step as a CUDA graph besides. The vision tower's segments change with every batch; it stays eager."""
        torch._dynamo.config.recompile_limit = 64                # 8 by default, then silently eager: training, prefill, decoding and endings
        for layer in self.text.layers:                           # each want their own code, first for one shape and then for any
            layer.compile(**options)
        self.compiled = True
        return self

    def forward(self, batch, cache=None):
        """-> (B, S, H) states after the final norm: pool these (the ones before it are a well-known silent mistake)."""
        ids, branch = batch["ids"], batch.get("branch")
        x = self.text.embed_tokens(ids)                          # (B, S, H)
        deep, where = (), None
        if batch.get("pixels") is not None:
            where = ((ids == self.c.image_token) | (ids == self.c.video_token)).flatten().nonzero().squeeze(1)
            seen, deep = self.visual(batch["pixels"], batch["grids"])
            if len(where) != len(seen):
                raise ValueError(f"{len(where)} image or video tokens in the rows, but {len(seen)} visual tokens from the pictures")
            x = x.flatten(0, 1).index_copy(0, where, seen.to(x.dtype)).view_as(x)
        mask = None if branch is None else tree_mask(branch)
        return self.text(x, batch["pos"], mask, cache, deep, where)

    def logits(self, h):
        """h (..., H) -> fp32 logits (..., V)."""
        if not self.has_head:
            raise ValueError("this checkpoint has no lm_head (some embedding checkpoints are published without one): it can embed "
                             "directly (reason='never') but neither decide nor write rationales")
        return self.lm_head(h).float()


def rope_positions(ids, grids, c):
    """M-RoPE positions of one row. ids (S,) numpy, grids [(h, w)] its segments in order -> (3, S) int64.

    Text counts up on all three axes; a segment at position p puts its token (r, k) at (p, p + r, p + k) and then counts on from
    p + max(rows, columns): a picture is as "long" as its longer side.
    """
    pos = np.ones((3, len(ids)), dtype=np.int64)
    visual = (ids == c.image_token) | (ids == c.video_token)
    grids, i, p, S = list(grids), 0, 0, len(ids)
    places = np.flatnonzero(visual)
    while i < S:
        if visual[i]:
            if not grids:
                raise ValueError("more image or video tokens than pictures in a row")
            h, w = (n // MERGE for n in grids.pop(0))
            r, k = np.divmod(np.arange(h * w), w)
            pos[:, i : i + h * w] = p + np.stack([np.zeros_like(r), r, k])
            p, i = p + max(h, w), i + h * w
        else:                                                    # a run of text, up to the next picture
            later = places[places > i]
            j = int(later[0]) if len(later) else S
            pos[:, i:j] = p + np.arange(j - i)
            p, i = p + j - i, j
    return pos


# ---------------------------------------------------------------------------------------------------------------------
# Generation: one prefill per row, G rollouts on top of it


class Cache:
    """Keys and values of B prompts, and of the G rollouts that continue each of them.

    k, v per layer (B, C, P, d): the prompts, read by all G rollouts in one matrix product; seen (B, P) bool: not padding.
    ks, vs per layer (B, C, G, T, d): each rollout's own tokens, all rollouts in step. `own` and `at` belong to the present step: see `step`.
    """

    def __init__(self):
        self.k, self.v, self.ks, self.vs = [], [], None, None
        self.seen = self.own = self.at = None

    def past(self, layer):
        """What `attend` needs of one layer; None during the prefill."""
        return self.ks and (self.k[layer], self.v[layer], self.ks[layer], self.vs[layer], self.seen, self.own, self.at)

    def take(self, rows, lengths):
        """A new cache that continues the first lengths[b] tokens of these rows; this one stays as it is (a slice shares the memory)."""
        new = Cache()
        new.k, new.v = [x[rows] for x in self.k], [x[rows] for x in self.v]
        new.seen = torch.arange(new.k[0].shape[2], device=lengths.device) < lengths[:, None]
        return new

    def room(self, G, T):
        """Room for G rollouts of T tokens. What a single rollout has written before becomes part of its prompt."""
        if self.ks:
            self.k = [torch.cat((x, y[:, :, 0]), 2) for x, y in zip(self.k, self.ks)]
            self.v = [torch.cat((x, y[:, :, 0]), 2) for x, y in zip(self.v, self.vs)]
            self.seen = F.pad(self.seen, (0, self.ks[0].shape[3]), value=True)
        B, C, _, d = self.k[0].shape
        self.ks, self.vs = ([x.new_zeros(B, C, G, T, d) for x in y] for y in (self.k, self.v))

    def pick(self, rows, slots):
        """A new cache of rows (B',) and of each the rollouts slots (B', G')."""
        new = Cache()
        cut = lambda x: x[rows[:, None], :, slots].transpose(1, 2).contiguous()               # (B', G', C, T, d) -> (B', C, G', T, d)
        new.ks, new.vs = [cut(x) for x in self.ks], [cut(x) for x in self.vs]
        new.k, new.v, new.seen = self.k, self.v, self.seen
        if len(rows) < len(self.seen):
            new.k, new.v, new.seen = [x[rows] for x in self.k], [x[rows] for x in self.v], self.seen[rows]
        return new


def attend(q, k, v, prompt_k, prompt_v, ks, vs, seen, own, at):
    """q (B, A, G*m, d), k, v (B, C, G*m, d): the next m tokens of G rollouts, written to the columns at (m,) of ks, vs (B, C, G, T, d)
    -> (B, A, G*m, d). own (B or 1, G or 1, m, W): which of the first W columns each token sees. One softmax over prompt and own tokens."""
    B, A, S, d = q.shape
    C, P, m, W, G, R = k.shape[1], seen.shape[1], own.shape[2], own.shape[3], S // own.shape[2], A // k.shape[1]
    ks.index_copy_(3, at, k.reshape(B, C, G, m, d)), vs.index_copy_(3, at, v.reshape(B, C, G, m, d))
    q = q.view(B, C, R, S, d).transpose(2, 3).reshape(B, C, S * R, d) * d**-0.5               # the R query heads of a kv head side by side
    prompt = (q @ prompt_k.transpose(2, 3)).masked_fill(~seen[:, None, None], float("-inf"))  # (B, C, S*R, P)
    mine = (q.view(B, C, G, m * R, d) @ ks[..., :W, :].transpose(3, 4)).view(B, C, G, m, R, W)
    mine = mine.masked_fill(~own[:, None, :, :, None], float("-inf"))
    w = torch.cat((prompt, mine.view(B, C, S * R, W)), dim=-1).softmax(-1, dtype=torch.float32).to(v.dtype)
    y = w[..., :P] @ prompt_v + (w[..., P:].reshape(B, C, G, m * R, W) @ vs[..., :W, :]).view(B, C, S * R, d)
    return y.view(B, C, S, R, d).transpose(2, 3).reshape(B, A, S, d)


def step(model, cache, ids, pos, own, at):
    """The next m tokens ids (B, G, m) of every rollout at positions pos (B, G, m), alike on all three axes -> states (B, G, m, H)."""
    cache.own, cache.at = own, at
    x = model.text.embed_tokens(ids.flatten(1))                  # to the network a row's G*m tokens are just a longer row
    return model.text(x, pos.flatten(1).expand(3, -1, -1), cache=cache).view(*ids.shape, -1)


class Recorded:
    """A function of tensors recorded as a CUDA graph: hundreds of kernels are started by one call, so that small batches are not bound by
    Python. Shapes and what the function has closed over stay as they are; the result is overwritten by the next call."""

    possible = staticmethod(lambda device: device.type == "cuda")
    sides = {}                                                   # one stream per device: cuBLAS keeps 32 MB of workspace for each

    def __init__(self, f, *args):
        self.args, self.device = [a.clone() for a in args], args[0].device
        with torch.cuda.device(self.device):
            side = self.sides.setdefault(self.device, torch.cuda.Stream())
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):                        # a first run compiles and allocates, which a recording must not
                f(*self.args)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=side):
                self.out = f(*self.args)

    def __call__(self, *args):
        with torch.cuda.device(self.device):
            for mine, new in zip(self.args, args):
                mine.copy_(new)
            self.graph.replay()
        return self.out


def advance(model, cache, recorded, columns, ids, pos, at):
    """One step of every slot, the first `columns` written or being written: ids, pos (B, G, 1), at (1,) -> states (B, G, H).
    Of a compiled model on a GPU it is recorded, once for each number of columns: recorded {columns: CUDA graph}."""
    move = lambda ids, pos, at: step(model, cache, ids, pos, (torch.arange(columns, device=at.device) <= at)[None, None, None], at)[:, :, 0]
    if not (Recorded.possible(at.device) and model.compiled):
        return move(ids, pos, at)
    if columns not in recorded:
        recorded[columns] = Recorded(move, ids, pos, at)
    return recorded[columns](ids, pos, at)


def opened(model, batch, prefill, rows, prefix):
    """The prefill of these rows and, on a cache of its own that goes on from there, the forced prefix ids (p,)
    -> hidden (B, S, H) of the prefill, cache, state (B, 1, H) of the last token, pos (B, 1, 1) of the next one, alike on all axes."""
    if prefill is None:
        cache = Cache()
        prefill = model(batch, cache), cache
    hidden, device, p = prefill[0][rows], prefill[0].device, len(prefix)
    n = batch["lengths"].to(device)[rows] - 1                                                 # prompt without the extra token
    pos = batch["pos"][0].to(device)[rows].gather(1, n[:, None])[:, None]
    cache, h = prefill[1].take(rows, n), hidden.gather(1, (n - 1).view(-1, 1, 1).expand(-1, 1, hidden.shape[-1]))
    if p:
        cache.room(1, p)
        place, causal = torch.arange(p, device=device), torch.ones(1, 1, p, p, dtype=torch.bool, device=device).tril()
        h = step(model, cache, prefix.expand(len(hidden), 1, p), pos + place, causal, place)[:, :, -1]
    return hidden, cache, h, pos + p


@torch.no_grad()
def generate(model, batch, max_new, G=1, prefix=(), stop=(), tail=(), close=(), ban=(), temperature=0.0, generator=None,
             prefill=None, rows=slice(None)):
    """Continue every row of the batch G times. Rows are padded on the right and end in one extra token (<|endoftext|>) that the
    rollouts do not see. prefill: the (hidden, cache) of an earlier `model(batch, cache)`, continued here instead of computed again.
    rows: indices (B',) of the rows to continue, all by default; B is B' in everything below.

    Each rollout is: prefix (forced, computed once per row), up to max_new sampled tokens ending with one of `stop`; one that never
    stopped gets `close` forced on it; then `tail` is forced. temperature 0 is greedy. `ban`ned ids have probability 0.
    Returns a dict: hidden (B, S, H) of the prefill; tokens [B][G] lists of ids, prefix to tail; new (B, G) number of sampled tokens;
    logp [B][G] lists, one per sampled token; forced (B, G) True where `close` was forced; last (B, G, H) state of the last token.
    """
    if max_new < 1:
        raise ValueError(f"max_new is {max_new}, expected at least 1 token")
    device = model.device
    tensor = lambda x: torch.tensor(x, dtype=torch.long, device=device)
    ban_ids, stop_ids, place = tensor(sorted(ban)), tensor(list(stop)), torch.arange(max_new, device=device)
    hidden, cache, h, pos = opened(model, batch, prefill, rows, tensor(list(prefix)))
    cache.room(G, max_new + 1 + len(close) + len(tail))
    B, H = len(hidden), hidden.shape[-1]
    h, pos = h.expand(B, G, H), pos.expand(B, G, 1)
    ids, logp = torch.zeros(B, G, max_new, dtype=torch.long, device=device), torch.zeros(B, G, max_new, device=device)
    new, last = torch.zeros(B, G, dtype=torch.long, device=device), hidden.new_zeros(B, G, H)
    live, forced = torch.ones(B, G, dtype=torch.bool, device=device), torch.zeros(B, G, dtype=torch.bool, device=device)
    r, g = torch.arange(B, device=device)[:, None].expand(B, G), torch.arange(G, device=device).expand(B, G)              # whose slot it is
    # attention reads the written columns rounded up to a bucket, on a GPU one recording each; a look at `live` makes a GPU wait, so only now and then
    bucket, patience = (256, 8) if Recorded.possible(device) else (16, 1)
    recorded = {}                                                                             # {columns: the step as a CUDA graph}

    def retire(done):
        """done (B, G) bool, numpy: these slots get their end; the state of its last token goes to `last`."""
        rows, order = (torch.from_numpy(x).to(device) for x in rectangle(done))
        slots = rows[:, None], order
        rr, gg, over = r[slots], g[slots], torch.from_numpy(done).to(device)[slots]
        sub = cache if order.shape == live.shape else cache.pick(rows, order)
        state = finish(model, sub, ids[rr, gg], new[rr, gg], forced[rr, gg], pos[slots], close, tail)
        last[rr[over], gg[over]] = state[over]

    for t in range(max_new):
        # 1) every slot's next token. A finished one goes on idly: what it says is cut off by `new`
        pick, lp = sample_tokens(model, h, ban_ids, temperature, generator)
        ids[r, g, t], logp[r, g, t] = pick, lp
        new[r, g] += live
        live = live & ~torch.isin(pick, stop_ids)
        # 2) when a quarter of the work is idle, finished rollouts get their end and leave; sooner would copy the cache too often (results/tuning.txt)
        end = t + 1 == max_new
        if end or t % patience == patience - 1:
            alive = live.cpu().numpy() & (not end)
            rest = rectangle(alive)
            if rest[1].size <= 0.75 * alive.size:
                forced[r, g] = live
                retire(~alive)
                if not alive.any():
                    break
                keep, order = (torch.from_numpy(x).to(device) for x in rest)
                cache, recorded = cache.pick(keep, order), {}
                r, g, pick, pos, live = (x[keep[:, None], order] for x in (r, g, pick, pos, live))
        # 3) one step of the network for all slots at once
        columns = min(cache.ks[0].shape[3], -(-(t + 1) // bucket) * bucket)
        h = advance(model, cache, recorded, columns, pick[..., None], pos + t, place[t : t + 1])
    ids, logp, new, forced = (x.cpu().numpy() for x in (ids, logp, new, forced))
    said = lambda x: [[x[b, g, : new[b, g]].tolist() for g in range(G)] for b in range(B)]
    tokens = [[[*prefix, *own, *(close if over else ()), *tail] for own, over in zip(*row)] for row in zip(said(ids), forced)]
    return dict(hidden=hidden, tokens=tokens, new=new, logp=said(logp), forced=forced, last=last)


def rectangle(wanted):
    """wanted (B, G) bool -> the smallest rectangle of slots that holds all of them: rows (B',), and of each the slots (B', G')."""
    rows = np.flatnonzero(wanted.any(1))
    width = int(wanted.sum(1).max())
    return rows, np.argsort(~wanted[rows], axis=1, kind="stable")[:, :width]                 # wanted ones first


def finish(model, cache, ids, new, forced, pos, close, tail):
    """The last sampled token, `close` where it was forced, and `tail`, in one forward -> states (B, G, H) of each rollout's last token.

    ids (B, G, max_new), of which new (B, G) count; pos (B, G, 1) of the first. These tokens go to the last columns of the cache.
    """
    device, T, m = ids.device, cache.ks[0].shape[3], 1 + len(close) + len(tail)
    ends = torch.tensor([[*tail, *[0] * len(close)], [*close, *tail]], dtype=torch.long, device=device)
    chunk = torch.cat((ids.gather(2, new[..., None] - 1), ends[forced.long()]), dim=2)        # (B, G, m)
    col, step_no = torch.arange(T, device=device), torch.arange(m, device=device)
    own = (col < new[..., None, None] - 1) | ((col >= T - m) & (col - (T - m) <= step_no[:, None]))                       # (B, G, m, T)
    states = step(model, cache, chunk, pos + new[..., None] - 1 + step_no, own, col[T - m :])
    at = len(tail) + len(close) * forced.long()
    return states.gather(2, at[..., None, None].expand(-1, -1, 1, states.shape[-1])).squeeze(2)


def sample_tokens(model, h, banned, temperature, generator):
    """h (..., H) -> ids (...) and their log-probabilities (at temperature 1, whatever the sampling's) (...)."""
    parts = []
    for some in h.flatten(0, -2).split(32 if h.device.type == "cpu" else 1 << 30):            # 32 rows of Qwen's vocabulary are 19 MB
        logits = model.logits(some).index_fill_(1, banned, float("-inf"))                     # (n, V) fp32
        if temperature == 1:
            p = logits.softmax(-1)
            pick = draw(p, generator)
            logp = p.gather(1, pick).log()                       # what has been drawn did not underflow
        else:
            pick = logits.argmax(-1, keepdim=True) if temperature == 0 else draw((logits / temperature).softmax(-1), generator)
            logp = logits.gather(1, pick) - logits.logsumexp(-1, keepdim=True)
        parts.append((pick, logp))
    pick, logp = (torch.cat(x).view(h.shape[:-1]) for x in zip(*parts))
    return pick, logp


def draw(p, generator, block=128):
    """p (n, V) -> ids (n, 1), one drawn per row: first a block, then a token in it, both where the running sum passes a random number.

    One random number per row and one pass over p; torch.multinomial draws one per token of the vocabulary. fp64 sums, so that a token of
    probability 0 is never drawn. (The real vocabulary, 151,936, is a multiple of 128.)
    """
    p = F.pad(p, (0, -p.shape[1] % block)) if p.shape[1] % block else p
    p = p.view(len(p), -1, block)
    total = p.sum(-1).double().cumsum(-1)                                                     # (n, blocks)
    x = torch.rand(len(p), 1, generator=generator, device=p.device, dtype=torch.float64) * total[:, -1:] * (1 - 1e-12)
    k = torch.searchsorted(total, x, right=True)
    inside = p.gather(1, k[..., None].expand(-1, -1, block)).squeeze(1).double().cumsum(-1)   # (n, block)
    x = torch.minimum(x - F.pad(total, (1, 0)).gather(1, k), inside[:, -1:] * (1 - 1e-12))
    return k * block + torch.searchsorted(inside, x, right=True)


# ---------------------------------------------------------------------------------------------------------------------
# Words: Qwen's byte-level BPE through tiktoken

PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# The added tokens in their published order; in a Qwen vocabulary the first has id 151643.
SPECIALS = ("<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|> "
            "<|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> <tool_call> </tool_call> "
            "<|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> <tool_response> </tool_response> "
            "<think> </think>").split()


# The tokenizers library, by which the vocabulary was made and is read elsewhere, normalises by Unicode 9. Combining marks and compositions
# that came later (1 string in 10,000 of random letters has some) are plain letters to it; Python's tables know them.
LATER = re.compile("([\u07fd\u0897-\u089f\u08ca-\u08d3\u09fe\u0c3c\u0d3b\u0d3c\u0eba\u0ece\u1715\u1abf-\u1aeb\u1df6-\u1dfa\ua82c"
                   "\U000105c0-\U000105ff\U00010d24-\U00010d6d\U00010eab\U00010eac\U00010efa-\U00010eff\U00010f46-\U00010f85\U00011070"
                   "\U0001133b\U00011380-\U000113e2\U0001145e\U00011839\U0001183a\U00011930-\U00011943\U000119e0\U00011a34\U00011a47"
                   "\U00011a99\U00011d42-\U00011d97\U00011f41\U00011f42\U00016100-\U0001613f\U00016d40-\U00016d7f\U00016ff0\U00016ff1"
                   "\U0001e08f\U0001e130-\U0001e136\U0001e2ae-\U0001e2ef\U0001e4ec-\U0001e6ff])")


def nfc(text):
    """Unicode normalisation form C as of Unicode 9: e + combining acute becomes one letter."""
    return text if text.isascii() else "".join(unicodedata.normalize("NFC", part) for part in LATER.split(text))


def byte_letters():
    """GPT-2's disguise of bytes as printable letters, used inside every byte-level tokenizer.json: {letter: byte}."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    odd = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(odd)}


class Tokenizer:
    """Text -> ids. `encode` treats its text as plain words: markers such as <|im_end|> inside it are spelled out, never special.

    spec: the parsed tokenizer.json. special: {content: id} of its added tokens.
    """

    def __init__(self, spec, where="tokenizer.json"):
        model = spec.get("model") if isinstance(spec, dict) else None
        if not isinstance(model, dict) or model.get("type") != "BPE" or not model.get("merges") or not model.get("vocab"):
            kind = model.get("type") if isinstance(model, dict) else type(model).__name__
            raise ValueError(f"{where}: expected a byte-level BPE tokenizer with vocab and merges, found {kind!r}")
        if spec.get("normalizer") != {"type": "NFC"}:            # `encode` applies it; without it the ids would differ and nobody would know
            raise ValueError(f"{where}: the normalizer is {spec.get('normalizer')!r}, this code implements NFC")
        letters, vocab = byte_letters(), model["vocab"]
        raw = lambda s: bytes(letters[ch] for ch in s)
        try:
            single = [s for s in vocab if len(s) == 1 and s in letters]
            merged = ["".join(m) if isinstance(m, list) else m.replace(" ", "") for m in model["merges"]]
            # tiktoken merges by rank, i.e. by the order of the merges; ids may be numbered otherwise, so keep both.
            ranks = {raw(s): i for i, s in enumerate(single)}
            for s in merged:
                ranks.setdefault(raw(s), len(ranks))
            self.to_id = np.array([vocab[s] for s in [*single, *merged]])
        except KeyError as e:
            raise ValueError(f"{where}: vocabulary and merges disagree about {e}") from None
        if len(merged) != len(set(merged)):                      # tiktoken knows a merge by its result only
            raise ValueError(f"{where}: two merges have the same result, which is not implemented here")
        if len(single) != 256:
            raise ValueError(f"{where}: {len(single)} single-byte tokens, a byte-level vocabulary has 256")
        self.spec = spec
        self.special = {t["content"]: t["id"] for t in spec.get("added_tokens", [])}
        self.to_bytes = {int(i): b for i, b in zip(self.to_id, ranks)} | {i: s.encode() for s, i in self.special.items()}
        self.size = max(self.to_bytes) + 1
        pre = spec.get("pre_tokenizer") or {}                    # its own split pattern; Qwen's published one when the file is silent
        pattern = next((p["pattern"]["Regex"] for p in pre.get("pretokenizers", [pre]) if p.get("type") == "Split"), PATTERN)
        self.bpe = tiktoken.Encoding(name="qwen3-vl", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    @classmethod
    def load(cls, folder):
        path = os.path.join(folder, "tokenizer.json")
        try:
            return cls(read_json(path), path)
        except (TypeError, KeyError, AttributeError, IndexError) as e:
            raise ValueError(f"{path}: a value is of the wrong type or missing ({type(e).__name__}: {e})") from None

    def encode(self, text):
        """Plain text -> list of ids. NFC first: without it 15 % of hard strings differ from the published tokenizer."""
        text = nfc(text)
        try:
            return self.to_id[self.bpe.encode_ordinary(text)].tolist() if text else []
        except BaseException as e:                               # tiktoken's Rust panics, a BaseException, at a run of some 10^6 blanks
            if type(e).__name__ != "PanicException":
                raise
            raise ValueError(f"a text of {len(text):,} characters that tiktoken cannot split ({e})") from None

    def decode(self, ids):
        return b"".join(self.to_bytes.get(int(i), b"") for i in ids).decode("utf-8", errors="replace")


def tokenizer_spec(vocab, merges):
    """An ordinary tokenizer.json for a byte-level BPE with Qwen's pattern and specials; it appends <|endoftext|> by itself.

    vocab {token in byte letters: id}, merges [[left, right]]. Ids of the specials follow the vocabulary, in SPECIALS' order.
    """
    first = max(vocab.values()) + 1
    chat = {"<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"}   # published as not special
    added = [dict(id=first + i, content=s, single_word=False, lstrip=False, rstrip=False, normalized=False, special=s not in chat)
             for i, s in enumerate(SPECIALS)]
    split = dict(type="Split", pattern={"Regex": PATTERN}, behavior="Isolated", invert=False)
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
    spec = dict(version="1.0", truncation=None, padding=None, added_tokens=added, normalizer={"type": "NFC"},
                pre_tokenizer=dict(type="Sequence", pretokenizers=[split, level]), post_processor=None, decoder=dict(level),
                model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix="", end_of_word_suffix="",
                           fuse_unk=False, byte_fallback=False, ignore_merges=False, vocab=vocab, merges=merges))
    return append_end(spec)


def append_end(spec):
    """A copy of a tokenizer.json whose post-processor appends <|endoftext|>: sentence-transformers and vLLM pool that token."""
    end = {t["content"]: t["id"] for t in spec["added_tokens"]}["<|endoftext|>"]
    name = {"id": "<|endoftext|>", "type_id": 0}
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
    template = dict(type="TemplateProcessing", single=[{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": name}],
                    pair=[{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}, {"SpecialToken": name}],
                    special_tokens={"<|endoftext|>": {"id": "<|endoftext|>", "ids": [end], "tokens": ["<|endoftext|>"]}})
    return dict(spec, post_processor=dict(type="Sequence", processors=[level, template]))


# ---------------------------------------------------------------------------------------------------------------------
# Eyes: pictures -> patches

def levels(patches, device="cpu"):
    """uint8 numpy -> fp32 tensor in -1 ... 1. Bytes travel to the device, floats are made there."""
    x = torch.from_numpy(patches).to(device)
    # numpy asks the system for huge pages, torch does not: touching new memory is most of the work on a CPU
    y = torch.from_numpy(np.empty(patches.shape, np.float32)).copy_(x) if x.device.type == "cpu" else x.float()
    return y.mul_(2 / 255).sub_(1)


def smart_resize(height, width, min_pixels, max_pixels):
    """The size (multiples of 32) at which Qwen looks at a picture; areas are kept within the limits. ValueError above 200:1."""
    if min(height, width) < 1 or max(height, width) / min(height, width) > 200:
        raise ValueError(f"a picture of {width}x{height} pixels: expected sides that differ by no more than 200 to 1")
    h, w = (max(FACTOR, round(x / FACTOR) * FACTOR) for x in (height, width))
    if h * w > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        h, w = (max(FACTOR, math.floor(x / beta / FACTOR) * FACTOR) for x in (height, width))
    elif h * w < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(x * beta / FACTOR) * FACTOR for x in (height, width))
    return h, w


def patchify(frames):
    """frames (F, height, width, 3) uint8 of one size, F = 1 (a picture) or even -> patches (N, 1536) uint8 and the (h, w) grid.

    Order, as published: frame group, 2x2 merge blocks in raster order, the four patches in a block; in a patch: channel, frame,
    row, column. Bytes are shuffled before they become floats (`levels`): a quarter of the memory traffic.
    """
    f = min(len(frames), TEMPORAL)
    t, h, w = len(frames) // f, frames.shape[1] // PATCH, frames.shape[2] // PATCH
    x = frames.reshape(t, f, h // 2, 2, PATCH, w // 2, 2, PATCH, 3)
    x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)                   # (t, h/2, w/2, 2, 2, channel, frame, row, column)
    y = np.empty((*x.shape[:6], TEMPORAL, PATCH, PATCH), dtype=frames.dtype)
    y[...] = x                                                   # a picture is a video of two equal frames
    return y.reshape(t * h * w, PATCH_DIM), (h, w)


def resize(picture, h, w):
    """PIL picture (RGB) -> uint8 (h, w, 3), bicubic with antialiasing, exactly Pillow's."""
    return np.asarray(picture if picture.size == (w, h) else picture.resize((w, h), Image.Resampling.BICUBIC))


# ---------------------------------------------------------------------------------------------------------------------
# Large models in training: LoRA, shards, and the way back to a plain model


class LoRALinear(Linear):
    """y = W x + (alpha / rank) * B A x with W frozen. W keeps its name, so a checkpoint of the base still fits."""

    def forward(self, x, act="none"):
        return ACT[act](super().forward(x) + linear(linear(x, self.lora_a), self.lora_b) * self.lora_scale)


def add_lora(model, rank, alpha):
    """Freeze the model and give every linear layer of both towers' blocks a trainable update of this rank, zero at first (B = 0)."""
    model.requires_grad_(False)
    for layer in [m for tower in (model.text.layers, model.visual.blocks) for m in tower.modules() if type(m) is Linear]:
        new = lambda *shape: nn.Parameter(torch.zeros(*shape, device=layer.weight.device))                # fp32, whatever W is
        layer.__class__, layer.lora_scale = LoRALinear, alpha / rank
        layer.lora_a, layer.lora_b = new(rank, layer.in_features), new(layer.out_features, rank)
        nn.init.kaiming_uniform_(layer.lora_a, a=math.sqrt(5))
    return model


def for_training(model, dtype, lora=0, alpha=64.0, vision=True, checkpointing=False, compile=False):
    """Make a model ready to be trained, in place: what is trained is fp32 and what is frozen stays as it is, all arithmetic is in `dtype`.
    lora: the rank, 0 trains every weight; vision: the tower too."""
    if lora:
        add_lora(model, lora, alpha)
    if not vision:
        model.visual.requires_grad_(False)
    for p in model.parameters():
        p.data = p.data.float() if p.requires_grad else p.data
    model.set_checkpointing(checkpointing)
    if compile:
        model.compile_layers()
    if dtype != torch.float32:                                   # each call is an autocast of its own: weights cast without gradient must not stay
        model.forward, model.logits = (torch.autocast(model.device.type, dtype)(f) for f in (model.forward, model.logits))
    return model


def shard(model, dtype):
    """FSDP2: every rank holds its part of each text layer in fp32 and gathers a layer in `dtype` while it runs. The vision tower and the
    embeddings stay whole: which of them a batch uses differs from rank to rank, and a collective must never wait for one that stays away."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.text.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model.text, mp_policy=policy, ignored_params={model.text.embed_tokens.weight})
    for m in (model.text, *model.text.layers):
        m.set_gradient_divide_factor(1.0)                        # a sum, not a mean: each rank has the gradient of its own rows
        m.set_force_sum_reduction_for_comms(True)
    return model


@torch.no_grad()
def merge_lora(model, dtype=None, into=None):
    """What is being trained as a plain model of `dtype` (None: fp32): shards gathered, LoRA merged in fp32 and rounded once. The model
    itself stays as it is. into: the plain model of an earlier call, to be written over. On every rank alike where there are shards."""
    own, plain = dict(model.named_parameters()), into
    if plain is None:
        with torch.device("meta"):
            plain = Qwen3VL(model.c)
        plain.to(dtype or torch.float32).to_empty(device=model.device).requires_grad_(False)
        plain.has_head = model.has_head
        if "lm_head.weight" not in own:                          # tied, or absent and never used
            plain.lm_head.weight = plain.text.embed_tokens.weight
    for name, p in plain.named_parameters():
        w = own[name].full_tensor() if hasattr(own[name], "full_tensor") else own[name]
        layer = model.get_submodule(name.rpartition(".")[0])
        if type(layer) is LoRALinear and name.endswith("weight"):
            w = w.float() + layer.lora_scale * (layer.lora_b @ layer.lora_a)
        p.copy_(w)
    return plain.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints in the Hugging Face layout


def read_json(path):
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except OSError as e:
        raise ValueError(f"{path}: {e.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: not valid JSON ({e})") from None


def tensor_files(folder):
    """{tensor name: file} of a folder with model.safetensors or a sharded index. Pickled weights are refused."""
    index = os.path.join(folder, "model.safetensors.index.json")
    single = os.path.join(folder, "model.safetensors")
    if os.path.exists(index):
        table = read_json(index)
        table = table.get("weight_map") if isinstance(table, dict) else None
        if not table or not isinstance(table, dict) or not all(isinstance(f, str) for f in table.values()):
            raise ValueError(f"{index}: no weight_map in it, of tensor names to file names")
        bad = [f for f in table.values() if os.path.basename(f) != f]
        if bad:
            raise ValueError(f"{index}: {bad[0]!r} is not a plain file name")
        return {name: os.path.join(folder, f) for name, f in table.items()}
    if not os.path.exists(single):
        pickled = [f for f in sorted(os.listdir(folder)) if f.endswith((".bin", ".pt", ".pth", ".pkl"))]
        hint = f"; {pickled[0]} is pickled and is never opened" if pickled else ""
        raise ValueError(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there{hint}")
    with open_shard(single) as f:
        return {name: single for name in f.keys()}


def open_shard(path):
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ValueError(f"{path}: named by the index, but not there") from None
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path}: not a whole safetensors file ({e})") from None


def load(folder, dtype=None, device="cpu"):
    """A Qwen3VL from a folder in the Hugging Face layout. dtype None keeps the file's. Every missing, extra or mis-shaped
    tensor is a ValueError that names it. The files are memory-mapped and tensors move one by one: never two copies."""
    c = config_from_hf(read_json(os.path.join(folder, "config.json")), os.path.join(folder, "config.json"))
    with torch.device("meta"):
        model = Qwen3VL(c)
    want = {name: p.shape for name, p in model.state_dict().items()}
    files, state = tensor_files(folder), {}
    for path in sorted(set(files.values())):
        with open_shard(path) as f:
            inside, listed = set(f.keys()), {n for n, p in files.items() if p == path}
            for name in sorted(inside | listed):
                if name not in inside:
                    raise ValueError(f"{path}: the tensor {name} is missing")
                ours = name if name in want else "model." + name
                if ours not in want or ours in state:
                    raise ValueError(f"{path}: {'unexpected' if ours not in want else 'a second'} tensor {name}")
                try:
                    t = f.get_tensor(name)
                except SafetensorError as e:
                    raise ValueError(f"{path}: {name} cannot be read ({e})") from None
                if t.shape != want[ours]:
                    raise ValueError(f"{path}: {name} has shape {tuple(t.shape)}, expected {tuple(want[ours])}")
                if t.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                    raise ValueError(f"{path}: {name} is {t.dtype}, expected float32, bfloat16 or float16")
                dtype = dtype or t.dtype                         # one dtype for all, like transformers
                state[ours] = t if ours == "lm_head.weight" and c.tie else t.to(device=device, dtype=dtype)
    missing = [n for n in want if n not in state and n != "lm_head.weight"]
    if missing:
        raise ValueError(f"{folder}: the tensor {missing[0]} is missing" + (f" (and {len(missing) - 1} more)" if missing[1:] else ""))
    model.has_head = c.tie or "lm_head.weight" in state
    embedding = state["model.language_model.embed_tokens.weight"]
    alias = state.pop("lm_head.weight", None) if c.tie else None                              # of a tied head; still in the file, read in pieces
    if alias is not None and not all(torch.equal(a.to(e), e) for a, e in zip(alias.split(4096), embedding.split(4096))):
        raise ValueError(f"{folder}: tie_word_embeddings is true, but lm_head.weight differs from the embedding")
    state.setdefault("lm_head.weight", embedding)                # tied, or absent and never used
    model.load_state_dict(state, strict=True, assign=True)
    if c.tie or not model.has_head:
        model.lm_head.weight = model.text.embed_tokens.weight
    return model.eval()


def save(model, folder, tokenizer, limits):
    """config.json, model.safetensors, tokenizer.json and the preprocessor configs. limits: pixels (min, max) of a picture."""
    os.makedirs(folder, exist_ok=True)
    eos, pad = tokenizer.special["<|im_end|>"], tokenizer.special["<|endoftext|>"]
    c, dtype = model.c, str(model.dtype).split(".")[-1]
    head = model.has_head and not c.tie                          # a tied head is an alias, an absent one stays absent
    state = {k: v.detach().contiguous().cpu() for k, v in model.state_dict().items() if k != "lm_head.weight" or head}
    path = os.path.join(folder, "model.safetensors")
    try:
        save_file(state, path + ".tmp", metadata={"format": "pt"})   # aside and renamed: half a file is never seen, and a memory map
    except SafetensorError as e:
        raise OSError(f"{path}: not written ({e})") from None
    os.replace(path + ".tmp", path)                              # of the old one (`load`) stays valid
    write = lambda name, value: write_json(os.path.join(folder, name), value)
    write("config.json", config_to_hf(c, dtype, eos, pad))
    write("generation_config.json", dict(eos_token_id=[eos, pad], pad_token_id=pad, do_sample=False))
    vision = dict(processor_class="Qwen3VLProcessor", patch_size=PATCH, temporal_patch_size=TEMPORAL, merge_size=MERGE,
                  image_mean=[0.5] * 3, image_std=[0.5] * 3, do_resize=True, do_rescale=True, do_normalize=True, do_convert_rgb=True)
    size = lambda low, top: dict(size=dict(shortest_edge=low, longest_edge=top))              # areas, in spite of the names
    write("preprocessor_config.json", dict(vision, image_processor_type="Qwen2VLImageProcessorFast", **size(*limits)))
    # transformers limits a whole clip where we limit each frame; the published whole-clip limits are the nearest thing
    write("video_preprocessor_config.json", dict(vision, video_processor_type="Qwen3VLVideoProcessor", **size(4096, 25165824)))
    write("tokenizer.json", append_end(tokenizer.spec))


def write_json(path, value):
    """Written aside and renamed: a reader never sees half a file."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        json.dump(value, f, indent=2, ensure_ascii=False)
    os.replace(path + ".tmp", path)
