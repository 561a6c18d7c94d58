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
TEXT = {"vocab": 0, "hidden": 512, "mlp": 1536, "layers": 8, "heads": 4, "kv_heads": 2}
VISION = {"v_hidden": 384, "v_mlp": 1536, "v_layers": 6, "v_heads": 6, "v_deepstack": (1, 3, 5)}
SIZES = {**CONFIGS, "large": dataclasses.replace(CONFIGS["2b"], **TEXT, **VISION)}

# --------------------------------------------------------------------------------------------------
# The same model and the same inputs for both


def make_model(size, device, dtype):
    """Random weights in the shapes of `size`, with the pocket world's tokenizer -> Embedder."""
    tokenizer = Tokenizer(pocket.train_tokenizer(pocket.vocabulary_texts()))
    special = tokenizer.special
    config = dataclasses.replace(
        SIZES[size],
        vocab=SIZES[size].vocab or tokenizer.size,
        image_token=special["<|image_pad|>"],
        video_token=special["<|video_pad|>"],
        vision_start=special["<|vision_start|>"],
        vision_end=special["<|vision_end|>"],
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3VL(config).to(dtype).init_weights().eval()
    max_pixels = 256 * 256 if config.hidden <= 128 else 512 * 512
    return Embedder(model, Processor(tokenizer, config, max_pixels=max_pixels))


def random_image(rng, side, height, width):
    """Noise of height x width times the side of the largest square."""
    shape = int(height * side), int(width * side), 3
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))


def make_items(n, processor, seed):
    """n items: five kinds in turn. A word is a token."""
    rng, words = np.random.default_rng(seed), list(pocket.COLOURS)
    image = partial(random_image, rng, processor.max_pixels**0.5)
    items = []
    while len(items) < n:
        items += [
            {"text": " ".join(rng.choice(words, 10)), "image": [image(0.9, 1.2)]},
            {"text": " ".join(rng.choice(words, 20))},
            {"text": " ".join(rng.choice(words, 400))},
            {"image": [image(0.4, 0.7)]},
            {"text": " ".join(rng.choice(words, 10)), "image": [image(0.5, 0.5), image(0.6, 0.3)]},
        ]
    return items[:n]


def make_prompts(n, processor, seed):
    return [processor(item) for item in make_items(n, processor, seed)]


def make_pairs(n, processor):
    """Pairs as the steps take them, without hard negatives."""
    queries = make_prompts(n, processor, 1)
    targets = make_prompts(n, processor, 2)
    pairs = []
    for i, (query, target) in enumerate(zip(queries, targets)):
        pair = {"id": str(i), "dataset": "bench", "query": query, "target": target}
        pairs.append({**pair, "answer": str(i), "negatives": []})
    return pairs


# --------------------------------------------------------------------------------------------------
# The tasks, twice: two classes with the same methods


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
        settings = "never", 0.5, 1, 0.0, None  # reason, and four numbers that are not used then
        vectors = torch.empty(len(prompts), self.model.c.hidden, device=self.model.device)
        for rows in self.embedder.batches([len(prompt["ids"]) + 1 for prompt in prompts], 16):
            states, _ = self.embedder.embed_prompts([prompts[i] for i in rows], *settings)
            vectors[rows] = F.normalize(states, dim=-1)
        return vectors

    def preprocess(self, images):
        """Patches (N, 1536), read by Embedder.encode's threads."""
        prompts = next(self.embedder.windows(images, None, batch_size=len(images)))
        return normalize_pixels(np.concatenate([p["pixel_values"][0] for p in prompts]))

    def write(self, prompts, K, T, temperature=1.0):
        """Ids [B * K] of the sampled tokens, query by query."""
        batch = collate(prompts, self.processor, device=self.model.device)
        settings = {**self.processor.generation, "temperature": temperature}
        out = generate(self.model, batch, T, K, **settings)
        opening = len(self.processor.prefix)
        rollouts = [ids[opening:] for row in out.tokens for ids in row]
        return [ids[:n] for ids, n in zip(rollouts, out.num_sampled.flatten().tolist())]

    def contrastive(self, pairs):
        """The loss of one step on the direct path."""
        rationales, labels = [None] * len(pairs), [-1] * len(pairs)
        step = pairs, rationales, labels, self.cfg
        metrics = contrastive_step(self.model, self.processor, *step)
        self.model.zero_grad(set_to_none=True)
        return metrics["loss"]

    def grpo(self, prompts, targets, duplicates):
        """One step of rl.py."""
        step = prompts, targets, duplicates, self.cfg, None
        rl.grpo_step(self.model, self.processor, *step)
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
        ids, lengths = batch["ids"], batch["lengths"][:, None] - int(left)
        place = torch.arange(ids.shape[1])
        mask = place < lengths
        if left:  # turn each row, so that its padding comes first
            turned = (place + lengths) % ids.shape[1]
            ids, mask = ids.gather(1, turned), mask.gather(1, turned)
        inputs = {"input_ids": ids, "attention_mask": mask.long()}
        inputs["mm_token_type_ids"] = (ids == self.processor.config.image_token).long()
        if batch["image_grid"]:
            inputs["pixel_values"] = batch["pixel_values"]
            inputs["image_grid_thw"] = torch.tensor([(1, *grid) for grid in batch["image_grid"]])
        return inputs

    def forward(self, prompts):
        """-> unit vectors (B, H), states (B, S, H)."""
        inputs = self.inputs(prompts)
        h = self.model.model(**inputs).last_hidden_state
        last = inputs["attention_mask"].sum(1) - 1
        return F.normalize(h[torch.arange(len(h)), last], dim=-1), h

    @torch.no_grad()
    def embed(self, prompts):
        """Direct vectors (n, H), in batches of 16 as they come."""
        batches = [prompts[i : i + 16] for i in range(0, len(prompts), 16)]
        return torch.cat([self.forward(batch)[0] for batch in batches])

    @torch.no_grad()
    def write(self, prompts, K, T, temperature=1.0):
        """Ids [B * K] of the sampled tokens, query by query."""
        processor = self.processor
        inputs = self.inputs([continued(prompt, processor.prefix) for prompt in prompts], left=True)
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
        rows = out[:, inputs["input_ids"].shape[1] :].tolist()
        return [[token for token in row if token != processor.eos_id] for row in rows]

    def contrastive(self, pairs):
        """The loss of one step on the direct path, the batch as one pass for each side."""
        self.model.train()
        q, _ = self.forward([pair["query"] for pair in pairs])
        t, _ = self.forward([pair["target"] for pair in pairs])
        loss = info_nce(q, t, torch.arange(len(q)), self.cfg.temperature)
        loss.backward()
        self.model.zero_grad(set_to_none=True)
        return float(loss.detach())

    def grpo(self, prompts, targets, duplicates):
        """Rollouts, the policy gradient of their tokens, InfoNCE on both paths.

        Every rollout is a row of its own, which computes its prompt again. All advantages are 1,
        and nothing is decided: what is left out of rl.py's step are sums over a few numbers.
        """
        processor, K = self.processor, self.cfg.rl_rollouts
        self.model.eval()
        sampled = self.write(prompts, K, self.cfg.max_new_tokens)
        self.model.train()

        # 1) Log-probabilities of the sampled tokens, from the states that predict them.
        prompts_BK = [prompt for prompt in prompts for _ in range(K)]
        rollouts, places = [], []
        for prompt, ids in zip(prompts_BK, sampled):
            branch = [*processor.prefix, *ids, *processor.tail]
            rollouts.append(continued(prompt, branch[:-1]))  # collate appends <|endoftext|>
            start = len(prompt["ids"]) + len(processor.prefix) - 1
            places.append(range(start, start + len(ids)))
        reasoned, h = self.forward(rollouts)
        states = torch.cat([row[list(place)] for row, place in zip(h, places)])
        logits = self.model.lm_head(states)
        logits[:, processor.suppress_tokens] = float("-inf")
        tokens = torch.tensor([token for ids in sampled for token in ids])
        logprobs = logits.log_softmax(-1).gather(1, tokens[:, None])

        # 2) Losses.
        q, _ = self.forward(prompts)
        t, _ = self.forward(targets)
        column = torch.arange(len(prompts))
        query = column.repeat_interleave(K)
        loss = info_nce(q, t, column, self.cfg.temperature, duplicates)
        loss = loss + info_nce(reasoned, t, query, self.cfg.temperature, duplicates[query])
        (loss - logprobs.mean()).backward()
        self.model.zero_grad(set_to_none=True)


def continued(prompt, ids):
    """The prompt with these ids behind it."""
    return {**prompt, "ids": np.concatenate([prompt["ids"], ids])}


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
    turns = [(seconds(ours), seconds(peer)) for _ in range(1 + repeats)]
    our_rate, peer_rate = (amount / np.median(turns[1:], axis=0)).tolist()
    row = {
        "name": name,
        "ours": our_rate,
        "peer": peer_rate,
        "ratio": our_rate / peer_rate,
        "unit": unit,
        "peer_name": PEER_NAME,
    }
    print("{name:<30}{ours:>12.2f}{peer:>12.2f} {unit:<10}{ratio:>6.2f}x".format(**row), flush=True)
    return row


def agree(name, ours, peer, tolerance):
    """ValueError unless both sides have computed the same, to a tolerance of absolute size."""
    gap = float((torch.as_tensor(ours) - torch.as_tensor(peer)).abs().max())
    if not gap <= tolerance:  # a NaN is not
        message = f"ours and transformers differ by {gap:.2g}, more than {tolerance:.2g}"
        raise ValueError(f"{name}: {message}: not the same computation")


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

    # 1) Inputs.
    items = make_items(options.items, processor, 0)
    prompts = make_prompts(options.items, processor, 0)
    images = [image for item in items for image in item.get("image", [])]
    queries = make_prompts(Q, processor, 3)
    pairs = make_pairs(options.batch, processor)
    few = pairs[: max(2, Q // 16)]  # the peer's activations of all their rollouts must fit
    batch = [pair["query"] for pair in few], [pair["target"] for pair in few]
    duplicates = torch.eye(len(few), dtype=torch.bool)

    # 2) Both must agree. fp32 sums in another order differ by 1e-6; a loss adds up a batch of them,
    # at a temperature of 0.02. Greedy tokens are equal unless two logits are.
    agree("embed", ours.embed(prompts), peer.embed(prompts), 1e-4)
    agree("preprocess", ours.preprocess(images), peer.preprocess(images), 1e-5)
    agree("contrastive", ours.contrastive(pairs), peer.contrastive(pairs), 1e-3)
    greedy = prompts[:6], 1, 12, 0.0
    if ours.write(*greedy) != peer.write(*greedy):
        raise ValueError("generate: the greedy tokens differ: not the same computation")

    # 3) Turns.
    tasks = [
        ("embed", "embed mixed", (prompts,), len(prompts), "items/s"),
        ("preprocess", "preprocess", (images,), len(images), "images/s"),
        ("write", f"generate {Q}x{K}x{T}", (queries, K, T), Q * K * T, "tokens/s"),
        ("contrastive", f"contrastive {len(pairs)} pairs", (pairs,), len(pairs), "pairs/s"),
        ("grpo", f"grpo {len(few)}x{K}x{T}", (*batch, duplicates), len(few), "queries/s"),
    ]
    rows = []
    for method, name, inputs, amount, unit in tasks:
        our_task = partial(getattr(ours, method), *inputs)
        peer_task = partial(getattr(peer, method), *inputs)
        name = f"{name}, {size}"
        rows.append(race(name, our_task, peer_task, amount, unit, options.repeats))
    return rows


def measure(size, options):
    """Our rates, with nothing beside them -> [{name, rate, unit, peak_gb}].

    On a GPU in bf16 and compiled, as the large presets run. dynamo counts the graphs that it has
    compiled: none means that all of this ran eagerly, whatever the options say.
    """
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
    propose_all = partial(propose.propose, model, processor, pairs, cfg, generator)
    tasks = [
        ("embed", partial(ours.embed, prompts), len(prompts), "items/s"),
        (f"decode {Q}x{K}x{T}", partial(ours.write, queries, K, T), Q * K * T, "tokens/s"),
        (f"propose {len(pairs)}x{K}x{T}", propose_all, len(pairs) * K, "rationales/s"),
        ("contrastive step", partial(ours.contrastive, pairs), len(pairs), "pairs/s"),
    ]
    rows = []
    for name, task, amount, unit in tasks:
        if name == "contrastive step":  # comes last: training makes the weights fp32
            scale.prepare(model, dtype, checkpointing=True)
        seconds(task)  # warm up, compile
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        times = [seconds(task) for _ in range(options.repeats)]
        rate = amount / float(np.median(times))
        peak_gb = torch.cuda.max_memory_allocated() / 1e9 if gpu else float("nan")
        name = f"{name}, {size}"
        print(f"{name:<30}{rate:>12.2f} {unit:<14}peak {peak_gb:.1f} GB", flush=True)
        rows.append({"name": name, "rate": rate, "unit": unit, "peak_gb": peak_gb})
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    print(f"compiled path: {'used' if graphs else 'not used'}, {graphs} graphs", flush=True)
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
    parser = argparse.ArgumentParser(description="Speed, beside transformers on the same weights.")
    parser.add_argument("--out", help="JSON file; a GPU may do without")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (cuda where there is one)")
    parser.add_argument("--size", help=f"some of {','.join(SIZES)} (pocket,large; on a GPU 2b)")
    for name, (default, text) in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    options = parser.parse_args(argv)
    options.device = torch.device(scale.find_device(options.device))
    gpu = options.device.type == "cuda"
    options.size = (options.size or ("2b" if gpu else "pocket,large")).split(",")
    for name in COUNTS:
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)}: expected at least 1")
    for size in options.size:
        if size not in SIZES:
            raise ValueError(f"--size {size}: expected some of {','.join(SIZES)}")
    if not options.out and not gpu:
        raise ValueError("--out FILE.json is missing")
    if not os.path.isdir(os.path.dirname(os.path.abspath(options.out or "."))):
        raise ValueError(f"--out {options.out}: no such folder")
    return options


def main(argv=None):
    try:
        options = parse(argv)
        device = f"CPU, {torch.get_num_threads()} of {os.cpu_count()} cores"
        if options.device.type == "cuda":
            device = torch.cuda.get_device_name(options.device)
        versions = {m.__name__: m.__version__ for m in (torch, transformers, np)}
        versions["python"] = platform.python_version()
        out = {"device": device, "versions": versions, "rows": [], "rates": []}
        for size in options.size:
            if options.device.type == "cuda":
                out["rates"] += measure(size, options)
            else:
                out["rows"] += compare(size, options)
            if options.out:
                write_json(options.out, out)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"bench.py: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
