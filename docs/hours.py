"""What a full run is made of: the arithmetic behind full_scale.md's table. Nothing is measured.

    python docs/hours.py

A query counts as an image of max_pixels and 64 words, a test video as four such queries, a target
as 64 words, a candidate of the test sets as a query, which is too much for most. The output head,
at 2B two percent of a step, is not counted. A forward pass takes 2 FLOPs for each weight and
token, and 4 for each number of each key that a token looks at: 2 for the product with the key, 2
for adding the value. A training step is five forward passes: GradCache's first, forward, forward
again (checkpointing), and twice as much backward. Hours = FLOPs / SPEED + written tokens / WRITING;
both rates are guesses, and so is HARD.
"""

import sys
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from model import CONFIGS, Qwen3VL  # noqa: E402
from report import table  # noqa: E402
from train import PRESETS, Config, selection  # noqa: E402

PAIRS = 2_170_000  # of VLM2Vec-V2's training
QUERIES, VIDEOS, CANDIDATES = 48_590, 34_940, 250_000  # of MMEB-V2; the videos are queries, too
HARD = 0.22  # share of the pairs; measured in the pocket world alone
SPEED = 8 * 0.4 * 989e12  # FLOPs a second: 40 % of the bf16 peak of eight H100s
WRITING = 8 * 5000  # tokens a second
SIZES = ("2b", "4b", "8b")


def weights(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def stages(size):
    """-> {stage: (FLOPs, tokens written)}"""
    c = CONFIGS[size]
    o = Config(**PRESETS[f"qwen3vl-{size}"])
    with torch.device("meta"):
        model = Qwen3VL(c)
    v = model.visual
    num_patches = o.max_pixels // 16**2
    num_tokens = num_patches // 4 + 64  # of a query

    def text(new, before=0):
        """FLOPs of the text layers for `new` tokens behind `before` others."""
        looking = 4 * c.layers * c.heads * c.head_dim * (before + new / 2)
        return new * (2 * weights(model.text.layers) + looking)

    of_a_patch = 2 * weights(v.patch_embed, v.blocks) + 4 * c.v_layers * c.v_hidden * num_patches
    of_a_patch += 2 * weights(v.merger, v.deepstack_merger_list) / 4  # one token for four patches
    query = num_patches * of_a_patch + text(num_tokens)
    target = text(64)
    rationale = text(o.max_new_tokens, num_tokens)

    step = 5 * (query + target + rationale)  # of training, for a pair
    # A hard pair's query is read again, with each rationale, its placebo and perhaps a second one.
    judged = query + (2 + selection.AUDITED) * o.num_candidates * rationale
    rl_pairs = o.rl_steps * o.rl_batch
    rl_rationales = rl_pairs * o.rl_rollouts
    read = QUERIES + 4 * VIDEOS  # in eval, directly and again to reason
    length = o.max_new_tokens
    # Of rl a sixth pass, without gradients: the rollouts start from it, the rewards need it.
    return {
        "propose": (PAIRS * query, PAIRS * o.num_candidates * length),
        "select: evaluators": (2 * o.select_steps * o.batch * step, 0),
        "select: the rest": (PAIRS * (query + target + HARD * judged), 0),
        "embed": (o.embed_steps * o.batch * step, 0),
        "rl": (
            rl_pairs * 6 * (query + target) + rl_rationales * 5 * rationale,
            rl_rationales * length,
        ),
        "eval": ((2 * read + CANDIDATES) * query, (QUERIES + VIDEOS) * length),
    }


def main():
    by_size = [stages(size) for size in SIZES]
    rows = []
    total = [0.0] * len(SIZES)
    for stage, (_, tokens) in by_size[0].items():
        cells = [stage, f"{tokens / 1e6:,.0f}"]
        for i, costs in enumerate(by_size):
            flops, tokens = costs[stage]
            hours = (flops / SPEED + tokens / WRITING) / 3600
            total[i] += hours
            cells += [f"{flops / 1e15:,.0f}", f"{hours:.1f}"]
        rows.append(cells)
    sums = [f"{hours:.1f}" for hours in total]
    rows.append(["sum", "", "", sums[0], "", sums[1], "", sums[2]])
    names = ["stage", "million tokens written"]
    for size in SIZES:
        names += [f"{size.upper()}, PFLOP", "hours"]
    print(table(names, rows), end="")


if __name__ == "__main__":
    main()
