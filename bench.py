"""
How fast: ours beside transformers' own Qwen3-VL, in one process, on the same weights and inputs.

The idea. A model of random weights is saved in the Hugging Face layout and opened twice: by
model.py and by transformers. First both must give the same result (vectors and patches within
rounding, equal losses, equal greedy tokens), or the bench stops with an error. Then they take
turns, and a row compares the medians: ratio > 1 means that ours is faster.

    embed        direct vectors of mixed items: short and long texts, one image, two images
    preprocess   images -> patches
    generate     rationales: Q queries x K rollouts x T tokens
    contrastive  one contrastive step: queries and targets, InfoNCE, backward
    grpo         one GRPO step: rollouts, policy gradient and InfoNCE, backward

The peer is what users of transformers write: batches of 16 as they come, padded, SDPA, `generate`
with a KV cache and num_return_sequences, logits of the sampled tokens only. It is spared what would
cost it next to nothing: our collate makes its batches, and its GRPO step has no rewards to compute.

How to run:
    python bench.py --out FILE.json                     on a CPU: pocket and large size
    python bench.py --out FILE.json --queries 4 --tokens 16 --items 12 --batch 6
    python bench.py --device cuda                       on a GPU: our rates at 2B in bf16, the peak
                                                        of its memory, and whether it was compiled

Left out: clips; vLLM (another process, other pins); TRL (it generates with transformers).
Images are noise and weights are random: the speed is real, the content is not.
"""

import argparse
import dataclasses
import os
import platform
import sys
import tempfile
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

import pocket
import propose
import rl
import scale
import train
from embed import Embedder, contrastive_step, info_nce
from model import CONFIGS, Qwen3VL, generate, write_json
from processor import Processor, Tokenizer, collate, normalize_pixels

PEER_NAME = f"transformers {transformers.__version__}"
# "large" is a cut of 2B that a CPU can bear: 8 of its 28 layers, a quarter of its width.
LARGE = dataclasses.replace(
    CONFIGS["2b"],
    vocab=0,  # the tokenizer's
    hidden=512,
    mlp=1536,
    layers=8,
    heads=4,
    kv_heads=2,
    v_hidden=384,
    v_mlp=1536,
    v_layers=6,
    v_heads=6,
    v_deepstack=(1, 3, 5),
)
SIZES = {**CONFIGS, "large": LARGE}

# --------------------------------------------------------------------------------------------------
# The same model and the same inputs for both


def make_model(size, device, dtype):
    """Random weights in the shapes of `size`, with the pocket world's tokenizer -> Embedder."""
    tokenizer = Tokenizer(pocket.train_tokenizer(pocket.vocabulary_texts()))
    special = tokenizer.special
    # The shapes are Qwen's, the numbers of the special tokens are those of this vocabulary.
    shapes = SIZES[size]
    config = dataclasses.replace(
        shapes,
        vocab=shapes.vocab or tokenizer.size,
        image_token=special["<|image_pad|>"],
        video_token=special["<|video_pad|>"],
        vision_start=special["<|vision_start|>"],
        vision_end=special["<|vision_end|>"],
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3VL(config).to(dtype).init_weights().eval()
    side = 256 if config.hidden <= 128 else 512
    processor = Processor(tokenizer, config, max_pixels=side * side)
    return Embedder(model, processor)


def random_text(rng, n):
    """n words, each of which is a token."""
    words = rng.choice(list(pocket.COLOURS), n)
    return " ".join(words)


def random_image(rng, processor, height, width):
    """Noise of height x width times the side of the largest square."""
    side = processor.max_pixels**0.5
    shape = (int(height * side), int(width * side), 3)
    noise = rng.integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(noise)


def make_items(n, processor, seed):
    """n items: five kinds in turn."""
    rng = np.random.default_rng(seed)
    image = partial(random_image, rng, processor)
    items = []
    while len(items) < n:
        items += [
            {"text": random_text(rng, 10), "image": [image(0.9, 1.2)]},
            {"text": random_text(rng, 20)},
            {"text": random_text(rng, 400)},
            {"image": [image(0.4, 0.7)]},
            {"text": random_text(rng, 10), "image": [image(0.5, 0.5), image(0.6, 0.3)]},
        ]
    return items[:n]


def make_prompts(n, processor, seed):
    return [processor(item) for item in make_items(n, processor, seed)]


def make_pairs(n, processor):
    """Pairs as the steps take them, without hard negatives."""
    queries = make_prompts(n, processor, 1)
    targets = make_prompts(n, processor, 2)
    pairs = []
    for i in range(n):
        pair = {
            "id": str(i),
            "dataset": "bench",
            "query": queries[i],
            "target": targets[i],
            "answer": str(i),
            "negatives": [],
        }
        pairs.append(pair)
    return pairs


# --------------------------------------------------------------------------------------------------
# The tasks, twice: two classes with the same methods

BATCH = 16


class Ours:
    """The project's functions as a user calls them."""

    def __init__(self, embedder, cfg):
        self.embedder = embedder
        self.model = embedder.model
        self.processor = embedder.processor
        self.cfg = cfg

    @torch.no_grad()
    def embed(self, prompts):
        """Direct vectors (n, H), as Embedder.encode computes them once it has read the items."""
        never = ("never", 0.5, 1, 0.0, None)  # four numbers that are not used then
        lengths = [len(prompt["ids"]) + 1 for prompt in prompts]
        width = self.model.c.hidden
        vectors = torch.empty(len(prompts), width, device=self.model.device)
        for rows in self.embedder.batches(lengths, BATCH):
            batch = [prompts[i] for i in rows]
            states, _ = self.embedder.embed_prompts(batch, *never)
            vectors[rows] = F.normalize(states, dim=-1)
        return vectors

    def preprocess(self, images):
        """Patches (N, 1536), read by Embedder.encode's threads."""
        windows = self.embedder.windows(images, None, batch_size=len(images))
        pixels = [prompt["pixel_values"][0] for prompt in next(windows)]
        return normalize_pixels(np.concatenate(pixels))

    def write(self, prompts, K, T, temperature=1.0):
        """Ids [B * K] of the sampled tokens, query by query."""
        batch = collate(prompts, self.processor, device=self.model.device)
        settings = {**self.processor.generation, "temperature": temperature}
        out = generate(self.model, batch, T, K, **settings)
        start = len(self.processor.prefix)
        sampled = []
        for branches, counts in zip(out.tokens, out.num_sampled.tolist()):  # a query's K
            for ids, count in zip(branches, counts):
                sampled.append(ids[start : start + count])
        return sampled

    def contrastive(self, pairs):
        """The loss of one step on the direct path."""
        rationales = [None] * len(pairs)
        labels = [-1] * len(pairs)
        metrics = contrastive_step(self.model, self.processor, pairs, rationales, labels, self.cfg)
        self.model.zero_grad(set_to_none=True)
        return metrics["loss"]

    def grpo(self, prompts, targets, duplicates):
        """One step of rl.py."""
        rl.grpo_step(self.model, self.processor, prompts, targets, duplicates, self.cfg, None)
        self.model.zero_grad(set_to_none=True)


class Peer:
    """transformers' model and image processor, opened from a folder that ours has saved.

    Its model is made for causal language modelling: `model.model` gives states, `model.lm_head`
    logits, and the loss that it would compute by itself is not the one that is compared.
    """

    def __init__(self, folder, processor, cfg):
        transformers.utils.logging.disable_progress_bar()
        loader = transformers.Qwen3VLForConditionalGeneration
        self.model = loader.from_pretrained(folder, attn_implementation="sdpa").eval()
        self.images = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.processor = processor
        self.cfg = cfg

    def preprocess(self, images):
        return self.images(images=images, return_tensors="pt")["pixel_values"]

    def inputs(self, prompts, left=False):
        """Prompts, each followed by <|endoftext|> -> padded inputs of transformers' model.

        left: padded on the left and without <|endoftext|>. `generate` continues the last column,
        so that all prompts have to end there.
        """
        batch = collate(prompts, self.processor)
        ids = batch["ids"]  # (B, S)
        lengths = batch["lengths"][:, None]
        if left:
            lengths = lengths - 1
        place = torch.arange(ids.shape[1])
        mask = place < lengths
        if left:  # turn each row, so that its padding comes first
            turned = (place + lengths) % ids.shape[1]
            ids = ids.gather(1, turned)
            mask = mask.gather(1, turned)
        is_image = ids == self.processor.config.image_token
        inputs = {
            "input_ids": ids,
            "attention_mask": mask.long(),
            "mm_token_type_ids": is_image.long(),
        }
        if batch["image_grid"]:
            grids = [(1, *grid) for grid in batch["image_grid"]]
            inputs["image_grid_thw"] = torch.tensor(grids)
            inputs["pixel_values"] = batch["pixel_values"]
        return inputs

    def forward(self, prompts):
        """-> unit vectors (B, H), states (B, S, H)."""
        inputs = self.inputs(prompts)
        h = self.model.model(**inputs).last_hidden_state
        last = inputs["attention_mask"].sum(1) - 1
        rows = torch.arange(len(h))
        vectors = F.normalize(h[rows, last], dim=-1)
        return vectors, h

    @torch.no_grad()
    def embed(self, prompts):
        """Direct vectors (n, H), in batches as they come."""
        parts = []
        for i in range(0, len(prompts), BATCH):
            vectors, _ = self.forward(prompts[i : i + BATCH])
            parts.append(vectors)
        return torch.cat(parts)

    @torch.no_grad()
    def write(self, prompts, K, T, temperature=1.0):
        """Ids [B * K] of the sampled tokens, query by query."""
        processor = self.processor
        opened = [continued(prompt, processor.prefix) for prompt in prompts]
        inputs = self.inputs(opened, left=True)
        out = self.model.generate(
            **inputs,
            do_sample=temperature > 0,
            top_k=0 if temperature else None,  # the default would be 50
            num_return_sequences=K,
            max_new_tokens=T,
            suppress_tokens=processor.suppress_tokens,
            eos_token_id=processor.think_end_id,
            pad_token_id=processor.eos_id,
        )
        start = inputs["input_ids"].shape[1]
        sampled = []
        for row in out[:, start:].tolist():
            sampled.append([token for token in row if token != processor.eos_id])
        return sampled

    def contrastive(self, pairs):
        """The loss of one step on the direct path, the batch as one pass for each side."""
        self.model.train()
        queries = [pair["query"] for pair in pairs]
        targets = [pair["target"] for pair in pairs]
        q, _ = self.forward(queries)
        t, _ = self.forward(targets)
        column = torch.arange(len(pairs))  # of each query's target
        loss = info_nce(q, t, column, self.cfg.temperature)
        loss.backward()
        self.model.zero_grad(set_to_none=True)
        return float(loss.detach())

    def grpo(self, prompts, targets, duplicates):
        """Rollouts, the policy gradient of their tokens, InfoNCE on both paths.

        Every rollout is a row of its own, which computes its prompt again. All advantages are 1,
        and nothing is decided: what is left out of rl.py's step are sums over a few numbers.
        """
        temperature, K = self.cfg.temperature, self.cfg.rl_rollouts
        # 1) Roll out: K rationales per query.
        self.model.eval()
        sampled = self.write(prompts, K, self.cfg.max_new_tokens)
        self.model.train()

        # 2) Vectors and log-probabilities again, with gradient.
        repeated = [prompt for prompt in prompts for _ in range(K)]
        reasoned, logprobs = self.follow(repeated, sampled)
        q, _ = self.forward(prompts)
        t, _ = self.forward(targets)

        # 3) InfoNCE on both paths, and the policy gradient.
        column = torch.arange(len(prompts))
        query = column.repeat_interleave(K)  # of each rollout
        direct = info_nce(q, t, column, temperature, duplicates)
        thinking = info_nce(reasoned, t, query, temperature, duplicates[query])
        loss = direct + thinking - logprobs.mean()
        loss.backward()
        self.model.zero_grad(set_to_none=True)

    def follow(self, prompts, sampled):
        """N prompts, the tokens sampled after each -> unit vectors behind them (N, H), and the
        log-probabilities of all tokens, from the states that predict them."""
        processor = self.processor
        rollouts, places = [], []
        for prompt, ids in zip(prompts, sampled):
            branch = [*processor.prefix, *ids, *processor.tail]
            rollouts.append(continued(prompt, branch[:-1]))  # collate appends <|endoftext|>
            start = len(prompt["ids"]) + len(processor.prefix) - 1
            places.append(slice(start, start + len(ids)))
        vectors, h = self.forward(rollouts)
        states = [row[place] for row, place in zip(h, places)]
        logits = self.model.lm_head(torch.cat(states))
        logits[:, processor.suppress_tokens] = float("-inf")
        tokens = torch.tensor([token for ids in sampled for token in ids])
        logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])
        return vectors, logprobs


def continued(prompt, ids):
    """The prompt with these ids behind it."""
    longer = np.concatenate([prompt["ids"], ids])
    return {**prompt, "ids": longer}


# --------------------------------------------------------------------------------------------------
# Measuring


def seconds(task):
    """Wall time of one call. A GPU goes on after the call has returned, so it is waited for."""
    start = time.perf_counter()
    task()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def race(name, ours, peer, amount, unit, repeats):
    """Both sides take turns -> a row of the file: units a second, by the medians.

    A first turn, which is not counted, pays for what happens once: buffers, kernels, caches.
    """
    turns = []
    for _ in range(1 + repeats):
        turns.append((seconds(ours), seconds(peer)))
    medians = np.median(turns[1:], axis=0)
    our_rate, peer_rate = (amount / medians).tolist()
    ratio = our_rate / peer_rate
    print(f"{name:<30}{our_rate:>12.2f}{peer_rate:>12.2f} {unit:<10}{ratio:>6.2f}x", flush=True)
    return {
        "name": name,
        "ours": our_rate,
        "peer": peer_rate,
        "ratio": ratio,
        "unit": unit,
        "peer_name": PEER_NAME,
    }


def agree(name, ours, peer, tolerance):
    """ValueError unless both sides have computed the same, to a tolerance of absolute size."""
    difference = torch.as_tensor(ours) - torch.as_tensor(peer)
    gap = float(difference.abs().max())
    if not gap <= tolerance:  # a NaN is not
        raise ValueError(
            f"{name}: ours and transformers differ by {gap:.2g}, more than {tolerance:.2g}: "
            "not the same computation"
        )


def compare(size, options):
    """All tasks on one size, ours beside transformers', in fp32 on the CPU -> rows."""
    embedder = make_model(size, "cpu", torch.float32)
    processor = embedder.processor
    Q, K, T = options.queries, options.rollouts, options.tokens
    cfg = train.Config(max_new_tokens=T, rl_rollouts=K)
    ours = Ours(embedder, cfg)
    with tempfile.TemporaryDirectory() as folder:
        embedder.save(folder)
        peer = Peer(folder, processor, cfg)

    # 1) Inputs, the same for both.
    items = make_items(options.items, processor, 0)
    prompts = [processor(item) for item in items]
    images = []
    for item in items:
        images += item.get("image", [])
    queries = make_prompts(Q, processor, 3)
    pairs = make_pairs(options.batch, processor)
    few = pairs[: max(2, Q // 16)]  # the peer's activations of all their rollouts must fit
    few_queries = [pair["query"] for pair in few]
    few_targets = [pair["target"] for pair in few]
    duplicates = torch.eye(len(few), dtype=torch.bool)

    # 2) Both must agree. fp32 sums in another order differ by 1e-6; a loss adds up a batch of them,
    # at a temperature of 0.02. Greedy tokens are equal unless two logits are.
    agree("embed", ours.embed(prompts), peer.embed(prompts), 1e-4)
    agree("preprocess", ours.preprocess(images), peer.preprocess(images), 1e-5)
    agree("contrastive", ours.contrastive(pairs), peer.contrastive(pairs), 1e-3)
    greedy = (prompts[:6], 1, 12, 0.0)
    if ours.write(*greedy) != peer.write(*greedy):
        raise ValueError("generate: the greedy tokens differ: not the same computation")

    # 3) Turns: method, name of the row, what the method takes, how many of which unit that is.
    grpo = (few_queries, few_targets, duplicates)
    tasks = [
        ("embed", "embed mixed", (prompts,), len(prompts), "items/s"),
        ("preprocess", "preprocess", (images,), len(images), "images/s"),
        ("write", f"generate {Q}x{K}x{T}", (queries, K, T), Q * K * T, "tokens/s"),
        ("contrastive", f"contrastive {len(pairs)} pairs", (pairs,), len(pairs), "pairs/s"),
        ("grpo", f"grpo {len(few)}x{K}x{T}", grpo, len(few), "queries/s"),
    ]
    rows = []
    for method, name, inputs, amount, unit in tasks:
        our_task = partial(getattr(ours, method), *inputs)
        peer_task = partial(getattr(peer, method), *inputs)
        row = race(f"{name}, {size}", our_task, peer_task, amount, unit, options.repeats)
        rows.append(row)
    return rows


def clock(name, task, amount, unit, repeats):
    """Our rate alone -> {name, rate, unit, peak_gb}; a first turn, not counted, compiles."""
    gpu = torch.cuda.is_available()
    seconds(task)
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    times = [seconds(task) for _ in range(repeats)]
    rate = amount / float(np.median(times))
    peak_gb = torch.cuda.max_memory_allocated() / 1e9 if gpu else float("nan")
    print(f"{name:<30}{rate:>12.2f} {unit:<14}peak {peak_gb:.1f} GB", flush=True)
    return {"name": name, "rate": rate, "unit": unit, "peak_gb": peak_gb}


def measure(size, options):
    """Our rates, with nothing beside them -> rows of clock().

    On a GPU in bf16 and compiled, as the large presets run. dynamo counts the graphs that it has
    compiled: none means that all of this ran eagerly, whatever the options say.
    """
    # 1) The model and its inputs.
    gpu = options.device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    embedder = make_model(size, options.device, dtype)
    model, processor = embedder.model, embedder.processor
    Q, K, T = options.queries, options.rollouts, options.tokens
    cfg = train.Config(max_new_tokens=T, num_candidates=K)
    if gpu:
        model.compile_layers()
        processor.pad_to = 128  # few lengths are few shapes to compile
    ours = Ours(embedder, cfg)
    prompts = make_prompts(options.items, processor, 0)
    queries = make_prompts(Q, processor, 3)
    pairs = make_pairs(options.batch, processor)
    generator = torch.Generator(options.device).manual_seed(0)

    # 2) Turns. Training comes last: it makes the weights fp32.
    embed = partial(ours.embed, prompts)
    write = partial(ours.write, queries, K, T)
    propose_all = partial(propose.propose, model, processor, pairs, cfg, generator)
    contrastive = partial(ours.contrastive, pairs)
    tasks = [
        ("embed", embed, len(prompts), "items/s"),
        (f"decode {Q}x{K}x{T}", write, Q * K * T, "tokens/s"),
        (f"propose {len(pairs)}x{K}x{T}", propose_all, len(pairs) * K, "rationales/s"),
        ("contrastive step", contrastive, len(pairs), "pairs/s"),
    ]
    rows = []
    for name, task, amount, unit in tasks:
        if task is contrastive:
            scale.prepare(model, dtype, checkpointing=True)
        rows.append(clock(f"{name}, {size}", task, amount, unit, options.repeats))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    used = "used" if graphs else "not used"
    print(f"compiled path: {used}, {graphs} graphs", flush=True)
    return rows


# --------------------------------------------------------------------------------------------------
# Command line

COUNTS = {
    "queries": (64, "queries to write rationales for"),
    "rollouts": (8, "rationales of each query"),
    "tokens": (64, "tokens of each rationale"),
    "items": (48, "items to embed"),
    "batch": (16, "pairs of the contrastive step"),
    "repeats": (5, "turns, of which the median counts"),
}


def parse(argv):
    """The options; ValueError names one that is wrong."""
    parser = argparse.ArgumentParser(description="Speed, beside transformers on the same weights.")
    parser.add_argument("--out", help="JSON file; a GPU may do without")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (cuda where there is one)")
    parser.add_argument("--size", help=f"some of {','.join(SIZES)} (pocket,large; on a GPU 2b)")
    for name, (default, text) in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    options = parser.parse_args(argv)
    options.device = torch.device(scale.find_device(options.device))
    gpu = options.device.type == "cuda"
    sizes = options.size or ("2b" if gpu else "pocket,large")
    options.size = sizes.split(",")
    for name in COUNTS:
        count = getattr(options, name)
        if count < 1:
            raise ValueError(f"--{name} {count}: expected at least 1")
    for size in options.size:
        if size not in SIZES:
            raise ValueError(f"--size {size}: expected some of {','.join(SIZES)}")
    if not options.out and not gpu:
        raise ValueError("--out FILE.json is missing")
    if options.out:
        folder = os.path.dirname(os.path.abspath(options.out))
        if not os.path.isdir(folder):
            raise ValueError(f"--out {options.out}: no such folder")
    return options


def run(options):
    """All sizes. The file is written after each: a large size may not fit into the memory."""
    gpu = options.device.type == "cuda"
    if gpu:
        device = torch.cuda.get_device_name(options.device)
    else:
        device = f"CPU, {torch.get_num_threads()} of {os.cpu_count()} cores"
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    out = {"device": device, "versions": versions, "rows": [], "rates": []}
    for size in options.size:
        if gpu:
            out["rates"] += measure(size, options)
        else:
            out["rows"] += compare(size, options)
        if options.out:
            write_json(options.out, out)


def main(argv=None):
    """Run; what goes wrong is said in one line."""
    try:
        run(parse(argv))
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"bench.py: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
