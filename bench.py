"""
How fast: ours beside transformers' own Qwen3-VL, in one process, on the same weights and inputs.

The idea. A model of random weights is saved in the Hugging Face layout and opened twice: by
model.py and by transformers. First both must give the same result, or the bench stops with
an error: vectors, patches and the contrastive loss within rounding, equal greedy tokens. Then they
take turns, and a row compares the medians: ratio > 1 means that ours is faster.

    embed        direct vectors of mixed items: short and long texts, one image, two images
    preprocess   images -> patches
    generate     rationales: Q queries x K rollouts x T tokens at most
    propose      candidate rationales, as the stage writes them (on a GPU alone)
    contrastive  one contrastive step: queries and targets, InfoNCE, backward
    grpo         one GRPO step: rollouts, policy gradient and InfoNCE, backward

The peer is what users of transformers write: batches of 16 as they come, padded, SDPA, `generate`
with a KV cache and num_return_sequences, logits of the sampled tokens only. Cheap work is done for
it: it gets our token ids and patches, and its GRPO step has no rewards to compute.

How to run:
    python bench.py --out FILE.json                     on a CPU: pocket and large size
    python bench.py --out FILE.json --queries 4 --tokens 16 --items 12 --batch 6
    python bench.py --device cuda                       on a GPU: our rates at 2B in bf16, the peak
                                                        of its memory, and whether it was compiled

FILE.json. A CPU fills rows, a GPU rates:
    {"device": "CPU, 2 of 2 cores", "versions": {"torch": "2.13.0+cpu", ...},
     "rows": [{"name": "embed mixed, pocket", "ours": 135.4, "peer": 50.2, "ratio": 2.70,
               "unit": "items/s", "peer_name": "transformers 5.23.0"}, ...],
     "rates": [{"name": "embed mixed, 2b", "rate": ..., "unit": "items/s", "peak_gb": ...,
                "graphs": 0}, ...]}

Left out: clips; vLLM (another process, other pins); TRL (it generates with transformers); on a GPU
the GRPO step. Images are noise and weights are random: the speed is real, the content is not.
"""

import os

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as in train.py

import argparse
import dataclasses
import itertools
import sys
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

import data
import pocket
import pretrain
import propose
import rl
import scale
import train
from embed import Embedder, contrastive_step, info_nce
from model import CONFIGS, generate, write_json
from processor import Processor, collate, normalize_pixels

# "large" is a cut of 2B that a CPU can bear: 8 of its 28 layers, a quarter of its width.
# vocab 0: the tokenizer's.
TEXT = {"vocab": 0, "hidden": 512, "mlp": 1536, "layers": 8, "heads": 4, "kv_heads": 2}
VISION = {"v_hidden": 384, "v_mlp": 1536, "v_layers": 6, "v_heads": 6, "v_deepstack": (1, 3, 5)}
LARGE = dataclasses.replace(CONFIGS["2b"], **TEXT, **VISION)
SIZES = {**CONFIGS, "large": LARGE}
# Default options. On a GPU rationales are as the large presets have them, and a batch has more
# tokens than a pass, so that GradCache takes both of its passes.
CPU_DEFAULTS = {"size": ["pocket", "large"], "batch": 16, "rollouts": 8, "tokens": 64}
GPU_DEFAULTS = {"size": ["2b"], "batch": 64, "rollouts": 4, "tokens": 128}

# --------------------------------------------------------------------------------------------------
# The same model and the same inputs for both. An item is what a user gives: texts and images. A
# prompt is what the Processor makes of it: "ids" (S,), "pixel_values" and "image_grid" per image.


class ReadyProcessor(Processor):
    """It also takes prompts, which have been read before: so encode is timed without reading."""

    def __call__(self, item, instruction=None):
        is_prompt = isinstance(item, dict) and "ids" in item
        return item if is_prompt else super().__call__(item, instruction)


def make_model(size, device, dtype):
    """Random weights in the shapes of `size`, with the pocket world's tokenizer -> Embedder."""
    with torch.device(device):  # they are drawn there
        model, given = pretrain.new_model(0, device, SIZES[size])
    # At most 64 tokens of an image, 256, and 489: nearly the presets' 490 (501,760 pixels).
    side = {"pocket": 256, "large": 512}.get(size, 708)
    processor = ReadyProcessor(given.tokenizer, given.config, max_pixels=side * side)
    return Embedder(model.to(dtype).eval(), processor)


def make_items(n, processor, seed):
    """n items, five kinds in turn: [{"text": "red blue ...", "image": [PIL image]}, ...]."""
    rng = np.random.default_rng(seed)
    side = processor.max_pixels**0.5  # of the largest square

    def text(length):
        words = rng.choice(list(pocket.COLOURS), length)  # each is one token
        return " ".join(words)

    def image(height, width):  # as shares of `side`
        shape = (int(height * side), int(width * side), 3)
        return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))

    items = []
    while len(items) < n:
        items += [
            {"text": text(10), "image": [image(0.9, 1.2)]},  # a large image: it is shrunk
            {"text": text(20)},  # a question
            {"text": text(400)},  # a passage: beside it short texts are mostly padding
            {"image": [image(0.4, 0.7)]},
            {"text": text(10), "image": [image(0.5, 0.5), image(0.6, 0.3)]},
        ]
    return items[:n]


@dataclasses.dataclass
class Task:
    """What both sides do, each by its method of this name."""

    method: str  # "generate"
    name: str  # of the row: "generate 64x8x64"
    inputs: tuple  # arguments of the method: (prompts, 8, 64)
    amount: int  # of work, in units: at most 32768 tokens
    unit: str  # of the rate: "tokens/s"
    tolerance: float | None = None  # of the results, in absolute size; None: nothing to compare

    def run(self, side):
        """side: an Ours or a Peer -> what its method returns. Gradients are thrown away."""
        side.model.zero_grad()
        return getattr(side, self.method)(*self.inputs)


def make_tasks(processor, options):
    """The tasks of one size. Both sides get the same prompts."""
    Q, K, T = options.queries, options.rollouts, options.tokens
    n = options.items
    B = options.batch  # pairs of the contrastive step
    items = make_items(max(n, Q, B), processor, seed=0)
    prompts = [processor(item) for item in items]
    images = [image for item in items[:n] for image in item.get("image", [])]
    pairs = []  # as train.Pairs makes them
    for i, target in enumerate(make_items(B, processor, seed=1)):
        pair = {"id": str(i), "query": prompts[i], "target": processor(target), "negatives": []}
        # All targets differ. "key" is that of rationales' files, which are not used here.
        pairs.append(pair | {"target_key": str(i), "key": ""})
    # The peer keeps the activations of every rollout, and its prompt's: they must fit.
    few = pairs[: max(2, Q // 16)]
    b = len(few)

    # The last number is the tolerance. fp32 sums in another order differ by 1e-6. A loss adds up a
    # batch of them, divided by a temperature of 0.02.
    return [
        Task("embed", "embed mixed", (prompts[:n],), n, "items/s", 1e-4),
        Task("preprocess", "preprocess", (images,), len(images), "images/s", 1e-5),
        Task("generate", f"generate {Q}x{K}x{T}", (prompts[:Q], K, T), Q * K * T, "tokens/s"),
        Task("propose", f"propose {B}x{K}x{T}", (pairs,), B * K, "rationales/s"),
        Task("contrastive", f"contrastive {B} pairs", (pairs,), B, "pairs/s", 1e-3),
        Task("grpo", f"grpo {b}x{K}x{T}", (few,), b, "queries/s"),
    ]


# --------------------------------------------------------------------------------------------------
# The tasks, twice: two classes with the same methods


class Ours:
    """The project's functions as a user calls them.

    Rows are sorted by length and cut into batches of few tokens; a query's rollouts share its
    prompt; steps go through GradCache.
    """

    def __init__(self, embedder, cfg):
        self.embedder = embedder
        self.model = embedder.model
        self.processor = embedder.processor
        self.cfg = cfg

    def embed(self, prompts):
        """Direct vectors (n, H)."""
        return self.embedder.encode(prompts, reason="never", convert_to_numpy=False)

    def preprocess(self, images):
        """Patches (N, 1536)."""
        windows = self.embedder.windows(images, None, batch_size=16)
        patches = [prompt["pixel_values"][0] for prompt in itertools.chain(*windows)]
        return normalize_pixels(np.concatenate(patches))

    def generate(self, prompts, K, T, temperature=1.0):
        """B * K lists of ids, the sampled ones, query by query."""
        batch = collate(prompts, self.processor, device=self.model.device)
        settings = self.processor.generation
        out = generate(self.model, batch, T, K, **settings, temperature=temperature)
        start = len(self.processor.prefix)  # <think>\n is given, not sampled
        sampled = []
        for branches, counts in zip(out.tokens, out.num_sampled.tolist()):  # a query's K
            for ids, count in zip(branches, counts):
                sampled.append(ids[start : start + count])
        return sampled

    def propose(self, pairs):
        """Candidate rationales, as the stage writes them."""
        generator = torch.Generator(self.model.device).manual_seed(0)
        return propose.propose(self.model, self.processor, pairs, self.cfg, generator)

    def contrastive(self, pairs, rationale=None):
        """The loss of one step, on the direct path alone or with one rationale for all pairs."""
        rationales = [rationale] * len(pairs)
        unknown = [-1] * len(pairs)  # decisions
        metrics = contrastive_step(self.model, self.processor, pairs, rationales, unknown, self.cfg)
        return metrics["loss"]

    def grpo(self, pairs):
        """One step of rl.py, whose rewards and log are computed, too."""
        rl.grpo_step(self.model, self.processor, pairs, self.cfg, None)


class Peer:
    """transformers' model and image processor, opened from a folder that ours has saved.

    `model.model` gives states, `model.lm_head` logits.
    """

    BATCH = 16  # prompts that are embedded together

    def __init__(self, folder, processor, cfg):
        transformers.utils.logging.disable_progress_bar()
        loader = transformers.Qwen3VLForConditionalGeneration
        self.model = loader.from_pretrained(folder, attn_implementation="sdpa")
        # Pillow resizes, as in ours: torchvision's bicubic differs.
        self.images = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.processor = processor
        self.cfg = cfg

    def inputs(self, prompts, branches, side="right"):
        """Prompts, each with the ids of its branch behind it -> inputs of transformers' model,
        padded on that side."""
        rows = []
        for prompt, branch in zip(prompts, branches):
            row = np.concatenate([prompt["ids"], branch])
            rows.append(torch.from_numpy(row))
        ids = pad_sequence(rows, batch_first=True, padding_value=-1, padding_side=side)  # (B, S)
        inputs = {
            "input_ids": ids.clamp(min=0),
            "attention_mask": (ids >= 0).long(),
            "mm_token_type_ids": (ids == self.processor.config.image_token).long(),  # 1: image
        }
        patches = []  # of each image (h * w, 1536)
        grids = []  # of each image (1, h, w): one frame
        for prompt in prompts:
            patches += prompt["pixel_values"]
            grids += [(1, *grid) for grid in prompt["image_grid"]]
        if patches:
            inputs["pixel_values"] = normalize_pixels(np.concatenate(patches))  # (N, 1536)
            inputs["image_grid_thw"] = torch.tensor(grids)
        return inputs

    def forward(self, prompts, branches=None):
        """-> unit vectors (B, H) at the end of the branches, states (B, S, H)."""
        if branches is None:  # the direct path
            branches = [[self.processor.eos_id]] * len(prompts)
        inputs = self.inputs(prompts, branches)
        h = self.model.model(**inputs).last_hidden_state  # (B, S, H)
        last = inputs["attention_mask"].sum(1) - 1  # (B,) places of <|endoftext|>
        vectors = F.normalize(h[torch.arange(len(h)), last], dim=-1)
        return vectors, h

    @torch.no_grad()
    def embed(self, prompts):
        """Direct vectors (n, H), in batches as they come."""
        parts = []
        for i in range(0, len(prompts), self.BATCH):
            vectors, _ = self.forward(prompts[i : i + self.BATCH])
            parts.append(vectors)
        return torch.cat(parts)

    def preprocess(self, images):
        """Patches (N, 1536)."""
        return self.images(images=images, return_tensors="pt")["pixel_values"]

    @torch.no_grad()
    def generate(self, prompts, K, T, temperature=1.0):
        """Ids [B * K] of the sampled tokens, query by query."""
        processor = self.processor
        # It continues the last column, so all prompts have to end there.
        inputs = self.inputs(prompts, [processor.prefix] * len(prompts), side="left")
        out = self.model.generate(  # (B * K, S + T)
            **inputs,
            do_sample=temperature > 0,
            top_k=0 if temperature else None,  # the default would be 50
            num_return_sequences=K,
            max_new_tokens=T,
            suppress_tokens=processor.suppress_tokens,
            eos_token_id=processor.think_end_id,  # </think> ends a rationale
            pad_token_id=processor.eos_id,  # fills a row that has ended
        )
        start = inputs["input_ids"].shape[1]
        sampled = []
        for row in out[:, start:].tolist():
            sampled.append([token for token in row if token != processor.eos_id])
        return sampled

    def contrastive(self, pairs):
        """The loss of one step on the direct path, the batch as one pass for each side."""
        q, _ = self.forward([pair["query"] for pair in pairs])
        t, _ = self.forward([pair["target"] for pair in pairs])
        column = torch.arange(len(pairs))  # of each query's target
        loss = info_nce(q, t, column, self.cfg.temperature)
        loss.backward()
        return loss.item()

    def grpo(self, pairs):
        """Rollouts, the policy gradient of their tokens, InfoNCE on both paths.

        Every rollout is a row of its own, which computes its prompt again. All advantages are 1,
        and nothing is decided: what is left out of rl.py's step are sums over a few numbers.
        """
        processor = self.processor
        K = self.cfg.rl_rollouts
        # 1) Roll out: K rationales per query.
        queries = [pair["query"] for pair in pairs]
        sampled = self.generate(queries, K, self.cfg.max_new_tokens)

        # 2) Vectors again, with gradient.
        q, _ = self.forward(queries)
        t, _ = self.forward([pair["target"] for pair in pairs])
        column = torch.arange(len(pairs))
        query = column.repeat_interleave(K)  # of each rollout: 0 0 0 1 1 1 ...
        prompts = [queries[i] for i in query]
        branches = [[*processor.prefix, *ids, *processor.tail] for ids in sampled]
        reasoned, h = self.forward(prompts, branches)  # (B * K, H), (B * K, S, H)

        # 3) Logits of the sampled tokens, from the states that predict them.
        states = []
        for row, prompt, ids in zip(h, prompts, sampled):
            start = len(prompt["ids"]) + len(processor.prefix) - 1  # one before the first token
            states.append(row[start : start + len(ids)])
        logits = self.model.lm_head(torch.cat(states))  # (n, vocab), of the sampled tokens alone
        logits[:, processor.suppress_tokens] = float("-inf")  # as when they were sampled
        tokens = torch.tensor([token for ids in sampled for token in ids])  # (n,)

        # 4) InfoNCE on both paths, and the policy gradient: log-probabilities are pushed up.
        direct = info_nce(q, t, column, self.cfg.temperature)
        thinking = info_nce(reasoned, t, query, self.cfg.temperature)
        loss = direct + thinking + F.cross_entropy(logits, tokens)
        loss.backward()


# --------------------------------------------------------------------------------------------------
# Measuring


def rates(task, sides, repeats):
    """Units a second of each side, by the medians: [135.4, 50.2].

    The sides take turns, so that a machine that slows down for a while slows both. A first
    turn, which is not counted, pays for what happens once: buffers, kernels, compiling.
    """
    turns = np.zeros((1 + repeats, len(sides)))  # seconds
    for turn in turns:  # (sides,), filled in place
        for i, side in enumerate(sides):
            start = time.perf_counter()
            task.run(side)
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # a GPU goes on after the call has returned
            turn[i] = time.perf_counter() - start
    return (task.amount / np.median(turns[1:], axis=0)).tolist()


def agree(name, ours, peer, tolerance):
    """ValueError unless both sides have computed the same. ours, peer: tensors, or numbers."""
    gap = (torch.as_tensor(ours) - torch.as_tensor(peer)).abs().max()
    if not gap <= tolerance:  # a NaN is not
        raise ValueError(f"{name}: not the same computation: ours and transformers differ by {gap}")


def compare(size, options):
    """All tasks on one size, ours beside transformers', in fp32 on the CPU -> rows of FILE.json."""
    embedder = make_model(size, "cpu", torch.float32)
    cfg = train.Config(max_new_tokens=options.tokens, rl_rollouts=options.rollouts)
    ours = Ours(embedder, cfg)
    with tempfile.TemporaryDirectory() as folder:
        embedder.save(folder)
        peer = Peer(folder, embedder.processor, cfg)
    tasks = make_tasks(embedder.processor, options)
    tasks = [task for task in tasks if task.method != "propose"]  # transformers has no such stage

    # 1) Both must agree, or their times say nothing. Losses are not compared for grpo: each side
    # samples rationales of its own. Greedy tokens are equal unless two logits are.
    for task in tasks:
        if task.tolerance:
            agree(task.method, task.run(ours), task.run(peer), task.tolerance)
    (prompts,) = tasks[0].inputs  # of embed
    greedy = (prompts[:6], 1, 12, 0.0)  # one continuation of 12 tokens, at temperature 0
    if ours.generate(*greedy) != peer.generate(*greedy):
        raise ValueError("generate: the greedy tokens differ: not the same computation")

    # 2) Their times
    rows = []
    for task in tasks:
        our_rate, peer_rate = rates(task, (ours, peer), options.repeats)
        row = {
            "name": f"{task.name}, {size}",
            "ours": our_rate,
            "peer": peer_rate,
            "ratio": our_rate / peer_rate,
            "unit": task.unit,
            "peer_name": f"transformers {transformers.__version__}",
        }
        figures = f"{our_rate:.2f} beside {peer_rate:.2f} {task.unit}, {row['ratio']:.2f}x"
        print(f"{row['name']}: {figures}", flush=True)
        rows.append(row)
    return rows


def measure(size, options):
    """Our rates, with nothing beside them -> the rows of FILE.json's "rates".

    On a GPU in bf16, as the large presets run: what is trained is compiled, all else is eager.
    dynamo counts the graphs that it has compiled: none means that training ran eagerly, too. No
    optimizer is there: AdamW's two moments, 8 bytes a weight, come on top of the peak. main() calls
    this on a GPU alone; a test runs it on a CPU.
    """
    dtype = torch.bfloat16 if options.gpu else torch.float32
    embedder = make_model(size, options.device, dtype)
    cfg = train.Config(max_new_tokens=options.tokens, num_candidates=options.rollouts)
    ours = Ours(embedder, cfg)
    tasks = make_tasks(embedder.processor, options)[:-1]  # all but the GRPO step
    rows = []
    for task in tasks:
        if task.method == "contrastive":
            # Trained weights become fp32; the arithmetic stays in dtype.
            scale.prepare(embedder.model, dtype, checkpointing=True, compile=options.gpu)
            embedder.processor.pad_to = 128 if options.gpu else 1  # few shapes to compile
            # Every pair has a rationale, as in stage embed.
            task.inputs += (embedder.processor.rationale("red " * options.tokens),)
        if options.gpu:  # each task has a peak of its own
            torch.cuda.reset_peak_memory_stats()
        (rate,) = rates(task, [ours], options.repeats)
        row = {
            "name": f"{task.name}, {size}",
            "rate": rate,
            "unit": task.unit,
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9,  # 0 on a CPU
            "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],  # compiled so far
        }
        print(f"{row['name']}: {rate:.2f} {task.unit}, {row['peak_gb']:.1f} GB", flush=True)
        rows.append(row)
    graphs = rows[-1]["graphs"]
    print(f"compiled path: {'used' if graphs else 'not used'}, {graphs} graphs")
    return rows


# --------------------------------------------------------------------------------------------------
# Command line


def parse(argv):
    """Command line -> options. Without --device or --size the machine decides; .gpu: is it one?"""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)  # a wrong option ends in one line
    add = parser.add_argument
    add("--out", help="JSON file of what is printed")
    add("--device", help="cpu, cuda or cuda:N (cuda where there is one)")
    add("--size", nargs="+", choices=SIZES, help="pocket large; on a GPU 2b")
    add("--queries", type=data.count, default=64, help="to write rationales for (64)")
    add("--rollouts", type=data.count, help="rationales of each query (8; on a GPU 4)")
    add("--tokens", type=data.count, help="of each rationale (64; on a GPU 128)")
    add("--items", type=data.count, default=48, help="to embed (48)")
    add("--batch", type=data.count, help="pairs of a contrastive step (16; on a GPU 64)")
    add("--repeats", type=data.count, default=5, help="turns, whose median counts (5)")
    options = parser.parse_args(argv)
    options.device = scale.find_device(options.device)
    options.gpu = options.device.startswith("cuda")
    sizes = GPU_DEFAULTS if options.gpu else CPU_DEFAULTS
    for name, value in sizes.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main(argv=None):
    """All sizes. The file is written after each: a large size may not fit into the memory."""
    options = parse(argv)
    device = f"CPU, {torch.get_num_threads()} of {os.cpu_count()} cores"
    if options.gpu:
        torch.cuda.set_device(torch.device(options.device).index or 0)
        device = torch.cuda.get_device_name(options.device)
    # {"torch": "2.13.0+cpu", "transformers": "5.23.0", "numpy": "2.4.6", "python": "3.11.7"}
    versions = {library.__name__: library.__version__ for library in (torch, transformers, np)}
    versions["python"] = sys.version.split()[0]
    out = {"device": device, "versions": versions, "rows": [], "rates": []}
    if options.out:
        write_json(options.out, out)  # here a wrong path costs seconds, not minutes
    for size in options.size:
        if options.gpu:
            out["rates"] += measure(size, options)
        else:
            out["rows"] += compare(size, options)
        if options.out:
            write_json(options.out, out)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"bench.py: {str(error).splitlines()[0]}")
