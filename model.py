"""
Qwen3-VL in plain PyTorch: vision tower, text tower, generation, checkpoints, JSON files.

The idea. A vision tower turns patches of 16 x 16 pixels into vectors. A merger folds every 2 x 2 of
them into one visual token. The visual tokens take the places of <|image_pad|> in an ordinary
decoder-only transformer. Three details make it Qwen3-VL:
  * DeepStack: features of intermediate vision layers are added to the visual tokens after the first
    text layers;
  * interleaved M-RoPE: a token has three positions (time, row, column), and the rotary frequency i
    turns with axis i mod 3 (the slowest with time);
  * queries and keys pass an RMS norm per head before the rotation.

Two things serve embedding and reinforcement learning:
  * a row may hold a prompt and branches that continue it. A token sees its prompt and its branch
    (`tree_mask`), so the direct embedding, the decision and K rationales cost one prompt;
  * `generate` continues a prompt K times. The prompt's keys and values are stored once, for all K.

Shapes:
  B rows (queries or targets)   S tokens of a row   K rationales of a row   T generated tokens
  H text width   A heads   C key heads   d head size   V vocabulary
  D vision width   N patches   M = N / 4 visual tokens
  In attention S or, with a cache, Q tokens look at L columns: keys and values side by side.
  A segment is one image or one group of two video frames: a grid of (h, w) patches.

How to run: nothing runs here. `pytest test_all.py -k parity` compares it with transformers.
Sources: the Qwen3-VL technical report (arXiv 2511.21631), Qwen's published configs. Tensors are
named as in transformers (modeling_qwen3_vl.py).
Left out: mixture of experts, quantisation, own kernels, tensor parallelism, beam search.
"""

import json
import math
import os
import shutil
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import groupby, product
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

# --------------------------------------------------------------------------------------------------
# Configuration: one flat dataclass, one entry per size


def hf(key, default):
    """A field of Config, with its place in a config.json of Hugging Face."""
    return field(default=default, metadata={"key": key})


@dataclass
class Config:
    """The numbers of a config.json. The defaults are those of the published 2B model."""

    vocab: int = hf("text_config.vocab_size", 151936)  # V; the tokenizer uses 151,669 of them
    hidden: int = hf("text_config.hidden_size", 2048)  # H
    mlp: int = hf("text_config.intermediate_size", 6144)  # width inside an MLP
    layers: int = hf("text_config.num_hidden_layers", 28)  # blocks of the text tower
    heads: int = hf("text_config.num_attention_heads", 16)  # A, query heads
    kv_heads: int = hf("text_config.num_key_value_heads", 8)  # C; each serves A / C query heads
    head_dim: int = hf("text_config.head_dim", 128)  # d; A * d need not be H (4B: 4096, 2560)
    tie: bool = hf("tie_word_embeddings", True)  # the output head is the input embedding
    # The slowest rotary angle takes about 5 times this many tokens to turn.
    rope_theta: float = hf("text_config.rope_parameters.rope_theta", 5e6)
    # How many of the d / 2 rotary frequencies turn with time, row, column.
    mrope_section: tuple = hf("text_config.rope_parameters.mrope_section", (24, 20, 20))
    eps: float = hf("text_config.rms_norm_eps", 1e-6)
    v_hidden: int = hf("vision_config.hidden_size", 1024)  # D
    v_mlp: int = hf("vision_config.intermediate_size", 4096)
    v_layers: int = hf("vision_config.depth", 24)  # blocks of the vision tower
    v_heads: int = hf("vision_config.num_heads", 16)
    # A learned table of 48 x 48 positions, stretched over any grid.
    v_positions: int = hf("vision_config.num_position_embeddings", 2304)
    # Vision layers whose features are added after text layers 0, 1, 2.
    v_deepstack: tuple = hf("vision_config.deepstack_visual_indexes", (5, 11, 17))
    image_token: int = hf("image_token_id", 151655)  # <|image_pad|>, a visual token of an image
    video_token: int = hf("video_token_id", 151656)  # <|video_pad|>, one of a video frame
    vision_start: int = hf("vision_start_token_id", 151652)  # <|vision_start|>
    vision_end: int = hf("vision_end_token_id", 151653)  # <|vision_end|>


PATCH = 16  # pixels of a patch's side
TEMPORAL = 2  # frames in a patch; an image counts as two equal frames
MERGE = 2  # patches per side of a visual token
FACTOR = PATCH * MERGE  # image sides are multiples of this

# The pocket model's vocabulary size and the ids of its image tokens come with its tokenizer.
POCKET_TEXT = {"vocab": 0, "hidden": 128, "mlp": 384, "layers": 4, "heads": 4, "kv_heads": 2}
POCKET_ROPE = {"head_dim": 32, "rope_theta": 1e4, "mrope_section": (8, 4, 4)}
POCKET_VISION = {"v_hidden": 128, "v_mlp": 256, "v_layers": 2, "v_heads": 4, "v_positions": 144}
LARGE_VISION = {"v_hidden": 1152, "v_mlp": 4304, "v_layers": 27, "v_deepstack": (8, 16, 24)}
CONFIGS = {
    "pocket": Config(**POCKET_TEXT, **POCKET_ROPE, **POCKET_VISION, v_deepstack=(0,)),
    "2b": Config(),
    "4b": Config(hidden=2560, mlp=9728, layers=36, heads=32),
    "8b": Config(hidden=4096, mlp=12288, layers=36, heads=32, tie=False, **LARGE_VISION),
}

# --------------------------------------------------------------------------------------------------
# The vision tower
#
#     patches (N, 1536) -> linear + learned positions (N, D) -> blocks -> merger -> (M, H)
#                                                               |  |  |
#                                     after v_deepstack[0], [1], [2]: a merger each -> DeepStack
#
# Attention is full, not causal, and stays within a segment.


def rotate(x, cos, sin):
    """Rotary embedding of x (..., d); cos and sin broadcast to it.

    Dimensions i and i + d/2 are a pair, turned by the i-th angle.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def merge_order(x):
    """(h, w, n) -> (h * w, n) in the order in which patches arrive.

    Blocks of 2 x 2 in raster order, then the four of a block; so a merger only has to reshape.
    """
    h, w, n = x.shape
    x = x.view(h // MERGE, MERGE, w // MERGE, MERGE, n)
    return x.transpose(1, 2).reshape(h * w, n)


def attend_segments(q, k, v, lengths):
    """Attention within each segment: q, k, v (N, A, d), lengths in patches -> (N, A, d).

    Neighbours of equal length (a video's frames, images of one size) share a call.
    """
    out = []
    start = 0  # of the first patch of a group of neighbours
    for n, equal in groupby(lengths):
        end = start + sum(equal)
        segments = []
        for x in (q, k, v):
            x = x[start:end].unflatten(0, (-1, n))  # (count, n, A, d)
            segments.append(x.transpose(1, 2))
        y = F.scaled_dot_product_attention(*segments)  # (count, A, n, d)
        out.append(y.transpose(1, 2).flatten(0, 1))  # (count * n, A, d)
        start = end
    return torch.cat(out)


class VisionBlock(nn.Module):
    """Pre-norm attention and MLP, with biases. In two halves because of `compile_layers`."""

    def __init__(self, c):
        super().__init__()
        D = c.v_hidden
        self.heads = c.v_heads
        self.norm1 = nn.LayerNorm(D, eps=1e-6)
        self.norm2 = nn.LayerNorm(D, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(D, 3 * D), "proj": nn.Linear(D, D)})
        fc1 = nn.Linear(D, c.v_mlp)
        fc2 = nn.Linear(c.v_mlp, D)
        self.mlp = nn.ModuleDict({"linear_fc1": fc1, "linear_fc2": fc2})

    def before(self, x, cos, sin):
        """x (N, D) -> queries, keys and values (N, A, d). The rotation is in fp32, as published."""
        qkv = self.attn["qkv"](self.norm1(x))  # (N, 3 D)
        q, k, v = qkv.unflatten(1, (3, self.heads, -1)).unbind(1)
        q = rotate(q.float(), cos, sin).to(v.dtype)
        k = rotate(k.float(), cos, sin).to(v.dtype)
        return q, k, v

    def after(self, x, y):
        """x (N, D) and what attention makes of it, y (N, A, d) -> (N, D)."""
        x = x + self.attn["proj"](y.flatten(1))
        wide = self.mlp["linear_fc1"](self.norm2(x))
        return x + self.mlp["linear_fc2"](F.gelu(wide, approximate="tanh"))

    def forward(self, x, cos, sin, lengths):
        """x (N, D); cos, sin (N, 1, d); lengths: patches of each segment -> (N, D)."""
        q, k, v = self.before(x, cos, sin)
        return self.after(x, attend_segments(q, k, v, lengths))


class Merger(nn.Module):
    """Four neighbouring patches become one visual token: (N, D) -> (M, H).

    The final merger normalises each patch. Those of DeepStack normalise the four patches together.
    """

    def __init__(self, c, deepstack):
        super().__init__()
        self.width = c.v_hidden * MERGE**2
        self.norm = nn.LayerNorm(self.width if deepstack else c.v_hidden, eps=1e-6)
        self.linear_fc1 = nn.Linear(self.width, self.width)
        self.linear_fc2 = nn.Linear(self.width, c.hidden)

    def forward(self, x):
        x = self.norm(x.view(-1, *self.norm.normalized_shape))
        wide = self.linear_fc1(x.view(-1, self.width))  # (M, 4 D)
        return self.linear_fc2(F.gelu(wide))


class VisionTower(nn.Module):
    """Patches -> visual tokens of the text's width, and DeepStack features for the same tokens."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        size = (TEMPORAL, PATCH, PATCH)
        proj = nn.Conv3d(3, c.v_hidden, size, stride=size)
        self.patch_embed = nn.ModuleDict({"proj": proj})  # Conv3d: the checkpoint's shape
        self.pos_embed = nn.Embedding(c.v_positions, c.v_hidden)
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.v_layers))
        self.merger = Merger(c, deepstack=False)
        mergers = [Merger(c, deepstack=True) for _ in c.v_deepstack]
        self.deepstack_merger_list = nn.ModuleList(mergers)
        self.checkpointing = False

    def position_embedding(self, h, w):
        """The learned table, stretched bilinearly until its corners meet the grid's: (h * w, D)."""
        side = math.isqrt(self.c.v_positions)
        table = self.pos_embed.weight.T.view(1, -1, side, side)  # (1, D, side, side)
        stretched = F.interpolate(table, (h, w), mode="bilinear", align_corners=True)
        return merge_order(stretched[0].permute(1, 2, 0))  # from (D, h, w)

    def angles(self, h, w):
        """Rotary angles (h * w, d/2): d/4 frequencies turn with the row, d/4 with the column."""
        device = self.pos_embed.weight.device
        quarter = self.c.v_hidden // self.c.v_heads // 4
        i = torch.arange(quarter, device=device).float()
        frequency = 1e4 ** -(i / quarter)  # (d/4,)
        places = torch.tensor(np.indices((h, w)), device=device)  # (2, h, w)
        angles = merge_order(places.permute(1, 2, 0))[..., None] * frequency  # (h * w, 2, d/4)
        return angles.flatten(1)

    def forward(self, pixel_values, image_grid):
        """pixel_values (N, 1536), image_grid [(h, w)] -> tokens (M, H), DeepStack's [(M, H)]."""
        # What depends on the grid alone is computed once for each distinct grid.
        distinct = set(image_grid)
        positions = {grid: self.position_embedding(*grid) for grid in distinct}
        angles = {grid: self.angles(*grid) for grid in distinct}
        angle = torch.cat([angles[grid] for grid in image_grid])  # (N, d/2)
        angle = angle.repeat(1, 2)[:, None]  # (N, 1, d): the same for both numbers of a pair
        cos, sin = angle.cos(), angle.sin()
        # A convolution whose stride is its kernel is a matrix product; on CPUs that is much faster.
        conv = self.patch_embed["proj"]
        pixels = pixel_values.to(conv.weight.dtype)
        x = F.linear(pixels, conv.weight.flatten(1), conv.bias)
        x = x + torch.cat([positions[grid] for grid in image_grid])  # (N, D)
        lengths = [h * w for h, w in image_grid]
        deep = []
        for i, block in enumerate(self.blocks):
            if self.checkpointing and self.training:  # computed again in the backward pass
                block = partial(checkpoint, block, use_reentrant=False)
            x = block(x, cos, sin, lengths)
            if i in self.c.v_deepstack:
                merger = self.deepstack_merger_list[self.c.v_deepstack.index(i)]
                deep.append(merger(x))
        return self.merger(x), deep


# --------------------------------------------------------------------------------------------------
# The text tower: pre-norm blocks of grouped-query attention and SwiGLU, as in Qwen3


def tree_mask(branch, columns=None):
    """Who may look at whom: branch (B, L) -> bool (B, 1, Q, L), one row per token that looks.

    branch is 0 for the prompt, k >= 1 for its k-th branch, -1 for padding. (In collate's batches
    branch 1 is <|endoftext|>, the others are rationales; in generate all are.) A token looks at
    itself and at what comes before it in the prompt or in its own branch. Nobody looks at padding,
    which itself looks at the prompt: the softmax over nothing would be NaN. For 0 0 1 1 2 -1:

        1 . . . . .     prompt
        1 1 . . . .
        1 1 1 . . .     branch 1
        1 1 1 1 . .
        1 1 . . 1 .     branch 2: the prompt and itself
        1 1 . . . .     padding

    columns (Q,): the tokens that look, by default all L.
    """
    place = torch.arange(branch.shape[1], device=branch.device)
    if columns is None:
        columns = place
    looking = branch[:, columns, None]  # (B, Q, 1)
    seen = branch[:, None, :]  # (B, 1, L)
    related = (seen == 0) | ((seen == looking) & (seen > 0))  # (B, Q, L)
    earlier = place <= columns[:, None]  # (Q, L)
    return (related & earlier)[:, None]


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis. In fp32 whatever the type of x."""

    def forward(self, x):
        y = F.rms_norm(x.float(), self.normalized_shape, eps=self.eps)
        return self.weight * y.to(x.dtype)  # first the cast, then the weight: as published


def attend(q, k, v, bias):
    """q (B, A, S, d); k, v (B, C, L, d); bias None (causal) or (B, 1, A/C * S, L) -> as q.

    A/C query heads share a key head. With a bias and `enable_gqa`, SDPA on CUDA would silently take
    its slow kernel, "math". So the query heads of a key head become one longer list of queries:
    then the memory-efficient kernel serves it, and no key is copied. See `sdpa_kernels`.
    """
    if bias is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    B, C, _, d = k.shape
    folded = q.reshape(B, C, -1, d)  # (B, C, A/C * S, d)
    y = F.scaled_dot_product_attention(folded, k, v, attn_mask=bias)
    return y.reshape(q.shape)


class Attention(nn.Module):
    """Grouped-query attention with a norm of each query and key head before the rotation."""

    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        q_width = c.heads * c.head_dim
        kv_width = c.kv_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden, q_width, bias=False)
        self.k_proj = nn.Linear(c.hidden, kv_width, bias=False)
        self.v_proj = nn.Linear(c.hidden, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, c.hidden, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.eps)
        self.k_norm = RMSNorm(c.head_dim, c.eps)

    def forward(self, x, cos, sin, bias, past):
        """x (B, S, H); cos, sin (B, 1, S, d) -> (B, S, H), and the keys and values looked at.

        past: None, or a cache's keys and values (B, C, L, d) and the columns (S,) to write to.
        """
        by_head = (-1, self.head_dim)
        q = self.q_norm(self.q_proj(x).unflatten(2, by_head))  # (B, S, A, d)
        k = self.k_norm(self.k_proj(x).unflatten(2, by_head))  # (B, S, C, d)
        v = self.v_proj(x).unflatten(2, by_head)  # (B, S, C, d)
        q = rotate(q.transpose(1, 2), cos, sin)  # (B, A, S, d)
        k = rotate(k.transpose(1, 2), cos, sin)  # (B, C, S, d)
        v = v.transpose(1, 2)
        if past is not None:
            keys, values, columns = past
            k = keys.index_copy_(2, columns, k)  # in place: the cache is written, not copied
            v = values.index_copy_(2, columns, v)
        y = attend(q, k, v, bias)
        return self.o_proj(y.transpose(1, 2).flatten(2)), k, v


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden, c.mlp, bias=False)
        self.up_proj = nn.Linear(c.hidden, c.mlp, bias=False)
        self.down_proj = nn.Linear(c.mlp, c.hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)). Also returns keys and values for a cache."""

    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden, c.eps)
        self.post_attention_layernorm = RMSNorm(c.hidden, c.eps)
        self.self_attn = Attention(c)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, bias, past):
        y, k, v = self.self_attn(self.input_layernorm(x), cos, sin, bias, past)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), k, v


class TextTower(nn.Module):
    """Embedded tokens -> states after the final norm."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab, c.hidden)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.hidden, c.eps)
        self.checkpointing = False

    def rope(self, positions, dtype):
        """Interleaved M-RoPE: positions (3, B, S) of time, row, column -> cos, sin (B, 1, S, d).

        Frequency i turns with axis i mod 3: T H W T H W ... Where the section of rows or columns is
        used up, time takes its place: sections (24, 20, 20) end in ... T H W T T T T.
        """
        half = self.c.head_dim // 2
        i = torch.arange(half, device=positions.device)
        _, rows, columns = self.c.mrope_section
        is_row = (i % 3 == 1) & (i < 3 * rows)
        is_column = (i % 3 == 2) & (i < 3 * columns)
        axis = is_row + 2 * is_column  # (d/2,): 0 time, 1 row, 2 column
        frequency = self.c.rope_theta ** -(i.float() / half)  # (d/2,) in fp32
        angle = positions[axis].permute(1, 2, 0) * frequency  # from (d/2, B, S) to (B, S, d/2)
        angle = angle.repeat(1, 1, 2)[:, None]  # (B, 1, S, d)
        return angle.cos().to(dtype), angle.sin().to(dtype)  # the published code casts here, too

    def forward(self, x, positions, mask=None, past=None, cache=None, deep=(), where=None):
        """Embedded tokens x (B, S, H), positions (3, B, S) -> (B, S, H) after the final norm.

        mask: None (causal) or bool (B, 1, S, L).
        past: of each layer what `Attention` takes, when `read` continues a cache.
        cache: in a prefill, the empty Cache that is to keep the keys and values.
        deep: DeepStack features [(M, H)] for the places `where` (M,) of the flattened batch.
        """
        cos, sin = self.rope(positions, x.dtype)
        bias = None
        if mask is not None:  # made once for all layers, in the form that `attend` wants
            bias = x.new_zeros(mask.shape).masked_fill(~mask, float("-inf"))
            bias = bias.repeat(1, 1, self.c.heads // self.c.kv_heads, 1)  # (B, 1, A/C * S, L)
        for i, layer in enumerate(self.layers):
            if self.checkpointing and self.training:
                layer = partial(checkpoint, layer, use_reentrant=False)
            x, k, v = layer(x, cos, sin, bias, past[i] if past else None)
            if cache is not None:
                cache.layers.append(torch.stack((k, v)))
            if i < len(deep):  # only after the first layers, only at visual places
                flat = x.flatten(0, 1)  # (B * S, H)
                x = flat.index_add(0, where, deep[i].to(x.dtype)).view_as(x)
        return self.norm(x)


# --------------------------------------------------------------------------------------------------
# The model


class Qwen3VL(nn.Module):
    """Both towers and the output head. Its batch is a dict of tensors, made by processor.collate:

    ids (B, S) int64                 lengths (B,): tokens of each row; the rest is padding
    positions (3, B, S) int64        of `rope_positions`
    branch None or (B, S) int64      of `tree_mask`; None: every row is one sequence (causal)
    pixel_values None or (N, 1536)   image_grid [(h, w)] of all segments, in the order of the rows
    ends (B, 1 + K) int64            the last token of each branch; not read here, see embed.py
    """

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.model = nn.ModuleDict({"visual": VisionTower(c), "language_model": TextTower(c)})
        self.lm_head = nn.Linear(c.hidden, c.vocab, bias=False)
        if c.tie:
            self.lm_head.weight = self.text.embed_tokens.weight
        self.has_head = True  # False for embedding checkpoints that were published without one

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

    def init_weights(self):
        """Normal weights and zero biases; norms stay at one."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv3d)):
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        return self

    def set_checkpointing(self, on):
        """Whether the backward pass of training recomputes a layer instead of keeping it."""
        self.visual.checkpointing = on
        self.text.checkpointing = on

    def compile_layers(self, **options):
        """torch.compile of the layers of both towers; those of a tower share one compilation.

        The vision tower's attention stays out of it: its segments change with every batch.
        """
        # Training, prefill, decoding and several shapes want a compilation each; 8 are the default.
        torch._dynamo.config.recompile_limit = 64
        for block in self.visual.blocks:
            block.before = torch.compile(block.before, **options)
            block.after = torch.compile(block.after, **options)
        for layer in self.text.layers:
            layer.compile(**options)

    def forward(self, batch, cache=None):
        """-> (B, S, H) states after the final norm. An empty Cache is given keys and values."""
        ids, branch = batch["ids"], batch["branch"]
        x = self.text.embed_tokens(ids)
        deep, where = (), None
        if batch["pixel_values"] is not None:
            is_visual = (ids == self.c.image_token) | (ids == self.c.video_token)
            where = is_visual.flatten().nonzero().squeeze(1)  # (M,)
            visual, deep = self.visual(batch["pixel_values"], batch["image_grid"])
            flat = x.flatten(0, 1)  # (B * S, H)
            x = flat.index_copy(0, where, visual.to(x.dtype)).view_as(x)
        mask = None if branch is None else tree_mask(branch)
        return self.text(x, batch["positions"], mask, cache=cache, deep=deep, where=where)

    def logits(self, h):
        """h (..., H) -> fp32 logits (..., V). ValueError for a model without a head."""
        if not self.has_head:
            raise ValueError("this checkpoint has no lm_head: it only embeds (reason='never')")
        return self.lm_head(h).float()


def rope_positions(ids, image_grid, config):
    """M-RoPE positions of one row: ids (S,) numpy, image_grid [(h, w)] in order -> (3, S) int64.

    Text counts up on all three axes. A segment that begins at position p has its token of row r and
    column k at (p, p + r, p + k). After it, counting goes on at p + max(rows, columns): an image is
    as long as its longer side. Two tokens of text, an image of 2 x 3 tokens, one of text:

        time     0 1   2 2 2 2 2 2   5
        row      0 1   2 2 2 3 3 3   5
        column   0 1   2 3 4 2 3 4   5
    """
    visual = (ids == config.image_token) | (ids == config.video_token)
    positions = np.tile(np.arange(len(ids)), (3, 1))  # as if all were text
    end = 0  # of the last segment
    for h, w in image_grid:
        rows, columns = h // MERGE, w // MERGE
        start = end + int(visual[end:].argmax())  # the first visual token from there on
        end = start + rows * columns
        place = np.indices((1, rows, columns)).reshape(3, -1)
        positions[:, start:end] = positions[0, start] + place
        positions[:, end:] += max(rows, columns) - rows * columns
    return positions


def sdpa_kernels(model, dtype):
    """SDPA's choice on this device for each form of attention, to be logged; MATH is the slow one.

    {"causal": "FLASH_ATTENTION", "branches": "EFFICIENT_ATTENTION", "vision": "FLASH_ATTENTION"}
    """
    c = model.c
    q = torch.empty(1, c.heads, 8, c.head_dim, dtype=dtype, device=model.device)
    k = q[:, : c.kv_heads]
    bias = q.new_zeros(1, 1, 8, 8)
    v = q.new_empty(1, c.v_heads, 8, c.v_hidden // c.v_heads)
    choose = torch._fused_sdp_choice
    choices = {
        "causal": choose(q, k, k, is_causal=True, enable_gqa=True),
        "branches": choose(k, k, k, attn_mask=bias),  # `attend` folds the query heads
        "vision": choose(v, v, v),
    }
    return {form: torch.nn.attention.SDPBackend(choice).name for form, choice in choices.items()}


# --------------------------------------------------------------------------------------------------
# Generation: one prefill per row, K continuations on top of it
#
# The K continuations of a row are read in one step, as if they were one longer row. The columns of
# the cache, by branch (0: the prompt, seen by all), for 3 prompt tokens, a prefix of 2 and K = 2:
#
#     prompt   extra   prefix   step 0   step 1   step 2 ...   ending
#     0 0 0    -1      0 0      1 2      1 2      1 2          1 2 1 2 1 2 ...
#
# The extra tokens, <|endoftext|> and padding, are seen by nobody. `tree_mask` says who looks at
# whom, as in training. Columns that are not written yet are not read (see `read`).


@dataclass
class Cache:
    """What has been read. `model(batch, cache)` fills an empty one with the prompts' layers."""

    layers: list = field(default_factory=list)  # of each keys and values (2, B, C, L, d)
    branch: torch.Tensor | None = None  # (B, L) of each column; set by `extended`
    used: int = 0  # columns that are written, so where `read` goes on; set by `extended`

    def extended(self, rows, lengths, new):
        """A copy of the rows (B,) that hides what follows their first `lengths` (B,) tokens, with
        room for new columns. new: their branches."""
        room = (0, 0, 0, len(new))  # behind the last column
        layers = [F.pad(layer[:, rows], room) for layer in self.layers]
        S = self.layers[0].shape[3]
        place = torch.arange(S, device=lengths.device)
        prompt = torch.where(place < lengths[:, None], 0, -1)  # (B, S)
        branch = torch.cat((prompt, new.expand(len(rows), -1)), dim=1)
        return Cache(layers, branch, S)


def read(model, cache, ids, positions):
    """Read ids (B, Q) at positions (B, Q), alike on all axes, into the next Q columns of the cache
    -> their states (B, Q, H)."""
    start = cache.used
    cache.used += ids.shape[1]
    columns = torch.arange(start, cache.used, device=ids.device)
    past = []
    for layer in cache.layers:
        keys, values = layer[:, :, :, : cache.used]
        past.append((keys, values, columns))
    mask = tree_mask(cache.branch[:, : cache.used], columns)
    x = model.text.embed_tokens(ids)  # (B, Q, H)
    return model.text(x, positions.expand(3, -1, -1), mask, past)


def sample(logits, suppress, temperature, generator):
    """logits (B, K, V), which it changes -> sampled ids and their log-probabilities, (B, K) each.

    Ids are drawn from softmax(logits / temperature) without the suppressed ones. Temperature 0
    takes the likeliest id, and its log-probability at temperature 1.
    """
    logits[..., suppress] = float("-inf")
    logp = (logits / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        ids = logp.argmax(-1)
    else:
        p = logp.flatten(0, 1).exp()  # (B * K, V)
        ids = torch.multinomial(p, 1, generator=generator).view(logp.shape[:2])
    return ids, logp.gather(-1, ids[..., None]).squeeze(-1)


@dataclass
class Rollouts:
    """K continuations of each of B prompts."""

    hidden: torch.Tensor  # (B, S, H) states of the prefill
    tokens: list  # [B][K] lists of ids: prefix, sampled ones, closing where truncated, tail
    num_sampled: torch.Tensor  # (B, K) int64, on the CPU; a stop token counts
    logprobs: torch.Tensor  # (B, K, T) of the sampled tokens (see `sample`), zero after them
    truncated: torch.Tensor  # (B, K) bool, on the CPU: no stop token came
    last: torch.Tensor  # (B, K, H) state of the last token


@torch.no_grad()
def generate(
    model,
    batch,
    max_new_tokens,
    num_return=1,
    prefix=(),
    stop_ids=(),
    closing=(),
    tail=(),
    suppress_tokens=(),
    temperature=0.0,
    generator=None,
    prefill=None,
    rows=None,
):
    """Continue each row of the batch K = num_return times -> Rollouts.

    Rows are padded on the right and end in an extra token (<|endoftext|>) that continuations do not
    see. A continuation is `prefix`, up to T = max_new_tokens sampled tokens that end with one of
    stop_ids, `closing` where none of these came, and `tail`. All four are sequences of ids.
    prefill: (hidden, cache) of an earlier `model(batch, cache)` to go on from; it stays as it is.
    rows: indices (B,) of the rows to continue, all by default.
    """
    if prefill is None:
        cache = Cache()
        prefill = model(batch, cache), cache
    hidden, cache = prefill
    T, K, device = max_new_tokens, num_return, model.device
    arange = partial(torch.arange, device=device)
    as_ids = partial(torch.tensor, dtype=torch.long, device=device)
    if rows is None:
        rows = range(len(hidden))
    rows = torch.as_tensor(rows, device=device)
    hidden = hidden[rows]
    B, _, H = hidden.shape

    # 1) Make room, and read the prefix once per row.
    lengths = batch["lengths"][rows] - 1  # without the extra token
    new = arange(1, K + 1).repeat(T + len(closing) + len(tail))  # K columns for each token
    new = F.pad(new, (len(prefix), 0))  # branch 0: the prefix is seen by all K
    cache = cache.extended(rows, lengths, new)
    position = batch["positions"][0, rows, lengths][:, None]  # (B, 1), of the next token
    h = hidden[arange(B), lengths - 1][:, None]
    if prefix:
        ids = as_ids(prefix).expand(B, -1)
        h = read(model, cache, ids, position + arange(len(prefix)))[:, -1:]
        position = position + len(prefix)
    h = h.expand(B, K, H)
    first = cache.used

    # 2) Sample a token of each continuation, read it, and so on. Those that have ended go on idly.
    stop = as_ids(stop_ids)
    suppress = as_ids(suppress_tokens)
    live = torch.ones(B, K, dtype=torch.bool, device=device)  # no stop token so far
    num_sampled = torch.zeros(B, K, dtype=torch.long, device=device)
    tokens = []  # (B, K) each
    logprobs = torch.zeros(B, K, T, device=device)
    for t in range(T):
        ids, logp = sample(model.logits(h), suppress, temperature, generator)
        tokens.append(ids)
        logprobs[..., t] = logp * live
        num_sampled += live
        live = live & ~torch.isin(ids, stop)
        if t == T - 1 or not live.any():
            break
        h = read(model, cache, ids, (position + t).expand(B, K))
    tokens = torch.stack(tokens, dim=1)  # (B, t + 1, K)
    steps_read = t  # the tokens of step t are not read yet

    # 3) Read all endings in one forward: the last sampled token, `closing` where it is due, `tail`.
    # Steps before num_sampled - 1 stay visible: a continuation's last sampled token is read again
    # in the ending, and later steps were idle. K = 2, sampled [a </think>] and [b c d], steps 0 and
    # 1 were read: </think> is hidden.
    idle = arange(steps_read)[:, None] >= num_sampled[:, None] - 1  # (B, steps_read, K)
    cache.branch[:, first : cache.used].masked_fill_(idle.flatten(1), -1)
    ended = [*tail, *[0] * len(closing)]  # as long as the other; what follows `tail` is not used
    cut_off = [*closing, *tail]
    endings = as_ids([ended, cut_off])[live.long()]  # (B, K, closing + tail)
    last_id = tokens.gather(1, num_sampled[:, None] - 1)  # (B, 1, K)
    ids = torch.cat((last_id, endings.transpose(1, 2)), dim=1)  # (B, 1 + closing + tail, K)
    place = arange(ids.shape[1])[:, None]
    positions = (position + num_sampled - 1)[:, None] + place  # as ids
    states = read(model, cache, ids.flatten(1), positions.flatten(1))
    states = states.view(*ids.shape, H)  # (B, 1 + closing + tail, K, H)
    final = len(tail) + len(closing) * live  # (B, K): where in its ending a continuation ends
    last = states[arange(B)[:, None], final, arange(K)]  # (B, K, H)

    # 4) Lists without padding.
    num_sampled, truncated = num_sampled.cpu(), live.cpu()  # live: no stop token came
    tokens = tokens.transpose(1, 2).tolist()
    for b, k in product(range(B), range(K)):
        sampled = tokens[b][k][: num_sampled[b, k]]
        forced = closing if truncated[b, k] else ()
        tokens[b][k] = [*prefix, *sampled, *forced, *tail]
    return Rollouts(hidden, tokens, num_sampled, logprobs, truncated, last)


# --------------------------------------------------------------------------------------------------
# config.json, with flat names: {"a": {"b": 1}} is {"a.b": 1}

# Settings that have one value here.
FIXED = {
    "model_type": "qwen3_vl",
    "text_config.hidden_act": "silu",
    "text_config.attention_bias": False,
    "text_config.rope_parameters.rope_type": "default",
    "text_config.rope_parameters.mrope_interleaved": True,
    "vision_config.hidden_act": "gelu_pytorch_tanh",
    "vision_config.in_channels": 3,
    "vision_config.patch_size": PATCH,
    "vision_config.temporal_patch_size": TEMPORAL,
    "vision_config.spatial_merge_size": MERGE,
}


def flatten(settings, name=""):
    if not isinstance(settings, dict):
        return {name: settings}
    flat = {}
    for key, value in settings.items():
        flat |= flatten(value, f"{name}.{key}".removeprefix("."))
    return flat


def nest(flat):
    settings = {}
    for name, value in flat.items():
        *path, key = name.split(".")
        place = settings
        for part in path:
            place = place.setdefault(part, {})
        place[key] = value
    return settings


def config_from_hf(path):
    """A config.json, as transformers 4 or 5 writes it -> Config.

    ValueError names a setting that is missing, or not implemented here.
    """
    flat = flatten(read_json(path))
    for key in list(flat):  # version 4 says rope_scaling for rope_parameters
        flat.setdefault(key.replace("rope_scaling", "rope_parameters"), flat[key])
    if "text_config.rope_theta" in flat:
        flat["text_config.rope_parameters.rope_theta"] = flat["text_config.rope_theta"]
    tied = "tie_word_embeddings"  # transformers 5 goes by this one, 4.57 by text_config's
    flat[tied] = flat.get(tied) or flat.get(f"text_config.{tied}", False)
    for key, value in FIXED.items():
        if flat.get(key, value) != value:
            raise ValueError(f"{path}: {key} is {flat[key]!r}, this code implements {value!r}")
    values = {}
    for f in fields(Config):
        key = f.metadata["key"]
        if flat.get(key) is None:
            raise ValueError(f"{path}: {key} is missing")
        values[f.name] = f.type(flat[key])  # tuple([24, 20, 20]), float(5000000)
    return Config(**values)


def config_to_hf(c, dtype, eos_id, pad_id):
    """Config -> a config.json for transformers 4.57 and 5; it has both spellings of the rope."""
    flat = {f.metadata["key"]: getattr(c, f.name) for f in fields(c)}
    flat |= FIXED
    for key in ("rope_type", "mrope_interleaved", "mrope_section"):
        flat[f"text_config.rope_scaling.{key}"] = flat[f"text_config.rope_parameters.{key}"]
    flat |= {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "dtype": dtype,
        "text_config.model_type": "qwen3_vl_text",
        "text_config.dtype": dtype,
        "text_config.rope_theta": c.rope_theta,
        "text_config.max_position_embeddings": 262144,
        "text_config.tie_word_embeddings": c.tie,
        "text_config.bos_token_id": pad_id,  # as Qwen's config has it
        "text_config.eos_token_id": eos_id,
        "vision_config.model_type": "qwen3_vl_vision",
        "vision_config.out_hidden_size": c.hidden,
    }
    return nest(flat)


# --------------------------------------------------------------------------------------------------
# Files: JSON, and checkpoints in the Hugging Face layout


def parse_json(text, place):
    """The value of a JSON text, str or bytes. ValueError names the place where it stands."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a hundred thousand [
        raise ValueError(f"{place}: not valid JSON ({error})") from None


def read_json(path):
    """The value in a JSON file. ValueError names the file and what is wrong with it."""
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    return parse_json(text, path)


def write_json(path, value):
    """Written aside and renamed: nobody reads half a file. ValueError for NaN and infinities."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    Path(f"{path}.tmp").write_bytes(text.encode())
    os.replace(f"{path}.tmp", path)


def write_rows(path, rows):
    """A file of JSON lines, written aside and renamed. Half an emoji is escaped: \\ud83d."""
    with open(f"{path}.part", "w", encoding="utf-8", errors="backslashreplace") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    os.replace(f"{path}.part", path)


def numbered_lines(paths):
    """(place, line) of files. A line is bytes, so that one that is no UTF-8 has a number, too."""
    for path in paths:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield f"{path} line {number}", line


class Rows:
    """Files of JSON lines, read anew by each loop over them. Memory holds one row.

    may_be_cut: half a line at the end, left by a kill, is skipped. ValueError names any other line
    that is no JSON.
    """

    def __init__(self, *paths, may_be_cut=False):
        self.paths = paths
        self.may_be_cut = may_be_cut

    def __iter__(self):
        for place, line in numbered_lines(self.paths):
            if self.may_be_cut and not line.endswith(b"\n"):
                continue
            yield parse_json(line, place)


def load_model(folder, dtype=None, device="cpu"):
    """A Qwen3VL from a folder in the Hugging Face layout. dtype None: as it was saved.

    ValueError names what is missing, unexpected, of another shape or not implemented. Tensors are
    memory-mapped and move one by one: there are never two copies of the weights. Only safetensors
    are opened, never pickled weights.
    """
    if Path(folder, "adapter_config.json").exists():  # beside a base model it would be overlooked
        raise ValueError(f"{folder}: a LoRA adapter: merge it into its base model first")
    c = config_from_hf(Path(folder, "config.json"))
    files = ["model.safetensors"]
    index = Path(folder, "model.safetensors.index.json")
    if index.exists() and not Path(folder, files[0]).exists():  # in shards, which an index names
        files = sorted(set(read_json(index)["weight_map"].values()))
    state = {}
    for file in files:
        try:
            state |= load_file(Path(folder, file))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder}/{file}: cannot be read ({error})") from None
    # Embedding checkpoints come without the first part of the names.
    if not any(key.startswith("model.") for key in state):
        state = {f"model.{key}": tensor for key, tensor in state.items()}
    with torch.device("meta"):  # shapes without memory
        model = Qwen3VL(c)
    own_head = "lm_head.weight" in state
    model.has_head = c.tie or own_head
    if not own_head:
        state["lm_head.weight"] = state.get("model.language_model.embed_tokens.weight")
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:  # names every tensor at fault, in as many lines
        why = " ".join(str(error).split())
        raise ValueError(f"{folder}: {why[:300]}") from None
    embedding = model.text.embed_tokens.weight
    # Two that differ are not tied, whatever the config says; transformers keeps both, too.
    c.tie = c.tie and (not own_head or torch.equal(model.lm_head.weight, embedding))
    if c.tie or not model.has_head:  # a missing head costs no memory and is never used
        model.lm_head.weight = embedding
    del state  # what model.to has converted is then free
    return model.to(device=device, dtype=dtype or model.dtype).eval()


def save_model(model, folder, eos_id, pad_id):
    """config.json, generation_config.json and model.safetensors. eos_id, pad_id: as Qwen calls
    them, <|im_end|> and <|endoftext|>.

    A tied head is not written, nor is a missing one. The weights are written aside and renamed:
    nobody reads half of them, and a memory map of the old ones stays valid.
    """
    os.makedirs(folder, exist_ok=True)
    path = Path(folder, "model.safetensors")
    state = {}
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight" or (model.has_head and not model.c.tie):
            state[name] = tensor.detach().contiguous().cpu()
    try:
        save_file(state, f"{path}.tmp", metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk; it is no OSError
        raise OSError(f"{path}: not written ({error})") from None
    os.replace(f"{path}.tmp", path)
    # Shards, their index or an adapter of an earlier save would be taken for a part of this one.
    for pattern in ("model-*.safetensors", "model.safetensors.index.json", "adapter_*"):
        for stale in Path(folder).glob(pattern):
            stale.unlink()
    dtype = str(model.dtype).removeprefix("torch.")
    config = config_to_hf(model.c, dtype, eos_id, pad_id)
    write_json(Path(folder, "config.json"), config)
    shutil.copymode(Path(folder, "config.json"), path)  # safetensors lets the owner alone read
    generation = {"eos_token_id": [eos_id, pad_id], "pad_token_id": pad_id, "do_sample": False}
    write_json(Path(folder, "generation_config.json"), generation)
