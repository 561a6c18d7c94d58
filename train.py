"""
Everything in order: base -> propose -> select -> embed -> rl -> eval, each a function below, each leaving a folder behind.

    python train.py --stage all                                            the pocket world, from nothing to the report, on a laptop CPU
    python train.py --stage all --scale 0.05                               the same in a minute: every size and step count times 0.05
    cp -r runs/pocket runs/dear                                            fork a finished run, then do one stage again with
    python train.py --stage rl --rl_price 0.3 --out runs/dear              one of its options changed, and what follows from it
    python train.py --stage all --rl_price 0.3 --out runs/dear
    python train.py --stage study --study_seeds 5                          does thinking when needed pay? Every ablation, and what the seeds say
    python train.py --stage all --preset qwen3vl-2b --model Qwen/Qwen3-VL-2B-Instruct --data MMEB_ROOT       on a CUDA GPU

A run folder holds config.json, data/, base/, propose/, select/, embed/, rl/, eval/, metrics.jsonl, report.json, report.md and pictures.
A finished stage is skipped; one that broke off starts again, or with --resume auto from its last checkpoint. A folder of another
configuration is refused. Options are the fields of Config: --key=value or --key value; an unknown one is an error.

The method's maths stands in embed.py, select.py and rl.py; the order of the stages and why in design section 3: select is the E-step of
an EM over the latent rationale, embed the M-step, rl learns the prior over rationales, the empty one among them.

Left out: experiment trackers (metrics.jsonl is plain), sweeps, hyper-parameter schedules beyond warm-up, flat, cool-down.
"""

import dataclasses
import glob
import hashlib
import importlib.util
import json
import math
import os
import pickle
import shutil
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data as loader
import eval as evaluation
import pocket
import rl
import study
from embed import Embedder, Reader, branch_logp, collate, decision_logits, grad_cache, info_nce, pool
from model import CONFIGS, Qwen3VL, Tokenizer, generate, read_json, write_json


def sibling(name):
    """A file beside this one as a module of another name: `select` belongs to the standard library, see the top of select.py."""
    spec = importlib.util.spec_from_file_location(f"nanommemb_{name}", os.path.join(os.path.dirname(os.path.abspath(__file__)), f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


selection = sibling("select")
STAGES = ("base", "propose", "select", "embed", "rl", "eval")

# ---------------------------------------------------------------------------------------------------------------------
# Configuration: one dataclass, presets as rows, typed overrides


@dataclass
class Config:
    preset: str = "pocket"          # a row of PRESETS
    stage: str = "all"              # all, or one of STAGES; study: all VARIANTS for several seeds
    out: str = ""                   # run folder; empty: runs/<preset>
    model: str = ""                 # start from this Qwen3-VL folder or hub id; empty: pretrain the pocket model from nothing
    data: str = ""                  # training and test root (see data.py); empty: draw the pocket world
    seed: int = 1                   # of everything: world, weights, order, sampling
    scale: float = 1.0              # times the world's sizes and every step count
    resume: str = ""                # "auto": go on inside a stage from its last checkpoint
    device: str = ""                # empty: CUDA when there is one
    dtype: str = "float32"
    leave_out: str = ""             # datasets (commas) that select, embed and rl never see; the tests keep them
    # study
    study_seeds: int = 5            # seed, seed + 1, ...
    study_variants: str = ""        # only these (commas) and those that they are forked from; empty: all of VARIANTS
    # world
    world_train: int = 300          # training pairs per family
    world_test: int = 100           # test queries per family
    world_style: str = "plain"
    world_steps: int = 3            # moves of a Walk
    # reading
    min_pixels: int = 1024          # a picture's area in pixels: one visual token covers 32 x 32
    max_pixels: int = 65536
    max_frames: int = 8
    # optimisation, all stages
    optimizer: str = "muon"         # muon (matrices; AdamW for the rest) or adamw
    lr_matrix: float = 0.002        # Muon's; scaled so that its updates have AdamW's size (match_rms_adamw)
    lr: float = 0.002               # AdamW's
    clip: float = 1.0               # gradient norm
    warmup: int = 30                # steps
    log_every: int = 10
    save_every: int = 100           # steps between checkpoints inside a stage
    chunk_tokens: int = 16384       # tokens of one forward pass; a larger batch goes through GradCache
    workers: int = 0                # threads that decode pictures (data that does not fit in memory)
    # base (pocket only)
    base_text: float = 0.3          # weight of the documents without pictures
    base_summary: float = 0.5       # weight of "<|endoftext|> sums up the answer"
    base_look: int = 240            # steps of nothing but description, before it is asked to look things up
    base_steps: int = 450           # at least; it goes on until its skills are there ...
    base_steps_max: int = 900       # ... at most to here, and says so if they are not
    base_batch: int = 32            # documents about pictures per step, and half as many of text alone
    base_skill: float = 0.93        # every skill's held-out token accuracy before it cools down
    # propose
    sides: str = "query"            # who may reason: query, or both (targets too, offline: nobody waits for them)
    propose_k: int = 1              # rationales by the base model itself per query
    propose_temperature: float = 0.7
    propose_max_new: int = 40
    rationales: str = ""            # a JSONL of rationales written elsewhere; the pocket world brings workers.jsonl
    # select
    select_rule: str = "full"       # full, positive_only, no_placebo, none
    select_steps: int = 160         # warm-up of each of the two evaluators
    select_lr: float = 0.3          # times the learning rates above: at 1.0 the evaluators learn their own pairs by heart and judge worse
    select_margin: float = 1.1      # log 3: a rationale must at least treble the target's probability
    select_candidates: int = 16
    select_folds: int = 2           # 2 = cross-fitted; 1 = the evaluator has seen the pair (ablation)
    select_weight_temperature: float = 1.0
    # embed
    embed_steps: int = 450
    embed_lr: float = 0.5           # times the learning rates above
    embed_workers: str = ""         # only these workers' rationales (commas), "none": nobody's (ablations)
    batch: int = 64                 # pairs per step
    sub_batch: int = 16             # of one dataset, so that in-batch negatives are hard
    negatives: int = 1              # hard negatives used per pair
    temperature: float = 0.02       # of every softmax over candidates
    lm_weight: float = 1.0          # of the rationale's cross-entropy
    decision_weight: float = 0.2    # of the decision token's cross-entropy
    # rl
    rl_steps: int = 60
    rl_batch: int = 32              # queries per step
    rl_group: int = 8               # rollouts per query: half reason, half direct; 0: no rollouts, the same steps of InfoNCE alone (ablation)
    rl_max_new: int = 48            # T_max of the price, too
    rl_temperature: float = 1.0
    rl_price: float = 0.1           # reward charged for a rationale of T_max tokens: THE latency price
    rl_decision: float = 1.0        # weight of the decision loss
    rl_rationale: float = 1.0       # weight of the rationale loss
    rl_nce: float = 0.1             # weight of InfoNCE beside
    rl_lr: float = 0.1              # times the learning rates above
    rl_one_loss: bool = False       # ablation: decision and rationale tokens in one mean
    # eval
    tau: float = 0.5                # reason when p_reason > tau
    eval_batch: int = 64
    eval_max_new: int = 48


LARGE = dict(dtype="bfloat16", optimizer="adamw", lr=1e-5, warmup=100, min_pixels=4096, max_pixels=1003520, world_train=0, world_test=0, workers=8,
             propose_k=4, propose_max_new=256, select_steps=500, embed_steps=5000, batch=1024, sub_batch=64, rl_steps=500, rl_batch=64, rl_max_new=128,
             rl_price=0.1, eval_batch=16, eval_max_new=128, save_every=200)
PRESETS = {"pocket": {}, "qwen3vl-2b": dict(LARGE), "qwen3vl-4b": dict(LARGE), "qwen3vl-8b": dict(LARGE, lr=5e-6)}
FREE = ("stage", "resume", "out", "device", "workers", "log_every", "save_every", "chunk_tokens", "study_seeds", "study_variants")     # may differ when a folder is reused


CHOICES = {"resume": ("", "auto"), "world_style": ("plain", "night"), "dtype": ("float32", "bfloat16", "float16"), "optimizer": ("muon", "adamw"),
           "select_rule": selection.RULES, "sides": ("query", "both")}
MAY_BE_ZERO = ("seed", "world_train", "world_test", "warmup", "workers", "base_look", "base_skill", "propose_k", "propose_temperature", "negatives", "lm_weight",
               "decision_weight", "base_text", "rl_price", "rl_steps", "rl_group", "rl_decision", "rl_rationale", "rl_nce")
ANY_NUMBER = ("select_margin", "tau")


class UsageError(Exception):
    """A mistake of the caller's: printed as one line, exit code 2."""


def parse(argv):
    """--key=value or --key value for every field of Config -> Config. Unknown keys and wrong types are errors."""
    fields = {f.name: f for f in dataclasses.fields(Config)}
    given, i = {}, 0
    while i < len(argv):
        key, eq, value = argv[i].removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if not argv[i].startswith("--") or key not in fields:
            close = [k for k in fields if key[:4] and k.startswith(key[:4])]
            raise UsageError(f"unknown option {argv[i]!r}" + (f"; did you mean --{close[0]}?" if close else "; --help lists them"))
        if not eq:
            i += 1
            if i == len(argv):
                raise UsageError(f"--{key} needs a value")
            value = argv[i]
        given[key] = cast(key, value, fields[key].type)
        i += 1
    preset = given.get("preset", "pocket")
    if preset not in PRESETS:
        raise UsageError(f"unknown preset {preset!r}; there are {', '.join(PRESETS)}")
    cfg = Config(**{**PRESETS[preset], **given})
    if cfg.stage not in ("all", "study", *STAGES):
        raise UsageError(f"unknown stage {cfg.stage!r}; there are all, study, {', '.join(STAGES)}")
    for key, among in CHOICES.items():
        if getattr(cfg, key) not in among:
            raise UsageError(f"--{key} {getattr(cfg, key)!r}: there are {', '.join(filter(None, among))}")
    for key, f in fields.items():
        value = getattr(cfg, key)
        if f.type in (int, float) and not (math.isfinite(value) and (key in ANY_NUMBER or value > 0 or value == 0 and key in MAY_BE_ZERO)):
            raise UsageError(f"--{key} {value}: expected a number {'of at least' if key in MAY_BE_ZERO else 'above'} 0")
    if cfg.world_steps > 5:
        raise UsageError(f"--world_steps {cfg.world_steps}: a walk that never crosses itself has 1 to 5 moves here")
    if preset != "pocket" and not (cfg.model and cfg.data):
        raise UsageError(f"--preset {preset} needs --model (a Qwen3-VL folder or hub id) and --data (an MMEB root)")
    if cfg.batch % cfg.sub_batch or cfg.rl_group % 2 or cfg.rl_batch % 8:
        raise UsageError("batch must be a multiple of sub_batch, rl_group even, rl_batch a multiple of 8")
    cfg.out = cfg.out or os.path.join("runs", preset)
    return cfg


def cast(key, value, kind):
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        return kind(value)
    except (ValueError, KeyError):
        raise UsageError(f"--{key} {value!r}: expected {kind.__name__}") from None


def usage():
    """The options with their defaults and the comments that stand beside them above."""
    rows = []
    for line in open(__file__, encoding="utf-8").read().split("class Config:")[1].split("\n\n")[0].splitlines():
        if ":" in line and "=" in line.partition("#")[0]:
            code, _, comment = line.strip().partition("#")
            rows.append(f"  --{code.split(':')[0]:26s}{code.partition('=')[2].strip():14s}{comment.strip()}")
    return __doc__.strip() + "\n\nOptions and their defaults:\n" + "\n".join(rows) + f"\n\nPresets: {', '.join(PRESETS)}"


# ---------------------------------------------------------------------------------------------------------------------
# The run folder


class Run:
    """Paths, the log, finished stages, and the few things that stages share."""

    def __init__(self, cfg):
        self.cfg, self.out = cfg, cfg.out
        self.device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
        os.makedirs(cfg.out, exist_ok=True)
        mine = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in FREE}
        path = self.path("config.json")
        if os.path.exists(path):
            theirs = {k: v for k, v in read_json(path).items() if k not in FREE}
            other = [k for k in mine if theirs.get(k) != mine[k] and not self.owns(k)]
            if other:
                raise UsageError(f"{path} was made with {other[0]}={theirs.get(other[0])!r}, this call says {mine[other[0]]!r}; use another --out")
            if theirs != mine:
                write_json(path, dataclasses.asdict(cfg))
        else:
            write_json(path, dataclasses.asdict(cfg))
        self.data_root = cfg.data or self.path("data")
        self.stages = read_json(self.path("stages.json")) if os.path.exists(self.path("stages.json")) else {}

    def owns(self, key):
        """May this call change the option in a folder that exists? Yes if it runs one stage again and the option is that stage's own."""
        return self.cfg.stage != "all" and key.startswith(("tau", "eval_") if self.cfg.stage == "eval" else self.cfg.stage + "_")

    def path(self, *parts):
        return os.path.join(self.out, *parts)

    def steps(self, n):
        """A step count under --scale: never less than 2, unless it is 0."""
        return max(2, round(n * self.cfg.scale)) if n else 0

    def rng(self, *key):
        """A numpy generator that depends on the seed and the key alone: nothing to save, nothing to restore."""
        digest = hashlib.blake2b(repr((self.cfg.seed, *key)).encode(), digest_size=8).digest()
        return np.random.default_rng(int.from_bytes(digest, "little"))

    def generator(self, *key):
        return torch.Generator(self.device).manual_seed(int(self.rng(*key).integers(2**62)))

    def log(self, stage, step, steps, metrics):
        """One line on the screen, one JSON object in metrics.jsonl."""
        row = {"stage": stage, "step": step, **{k: v for k, v in metrics.items()}}
        with open(self.path("metrics.jsonl"), "a", encoding="utf-8") as f:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
        numbers = " ".join(f"{k} {v:.3g}" for k, v in metrics.items() if isinstance(v, (int, float)))
        tqdm.write(f"{stage} {step}/{steps} {numbers}")

    def finish(self, stage, folder, seconds):
        """Put a finished stage's folder in its place and note it."""
        final = self.path(stage)
        if os.path.islink(final) or os.path.isfile(final):
            os.unlink(final)
        elif os.path.isdir(final):
            shutil.rmtree(final)
        os.replace(folder, final)
        for later in STAGES[STAGES.index(stage) + 1 :]:          # they were made from what has just changed
            self.stages.pop(later, None)
        self.stages[stage] = {"seconds": round(seconds, 1)}
        write_json(self.path("stages.json"), self.stages)
        for left in glob.glob(self.path("partial", f"{stage}*")):
            shutil.rmtree(left)

    def embedder(self, stage):
        """The checkpoint that a stage left, as an Embedder on the device."""
        c = self.cfg
        if stage not in self.stages:
            raise UsageError(f"stage {stage} has not finished in {self.out}; run --stage {stage} (or all) first")
        return Embedder.from_pretrained(self.path(stage), self.device, c.dtype, max_pixels=c.max_pixels, min_pixels=c.min_pixels, max_frames=c.max_frames)


class Optimizer:
    """Muon for the matrices and AdamW for the rest, or AdamW alone; warm-up, flat, linear cool-down over the last 40 % (or `cool`).

    Muon takes every learning jump of the pocket world several times sooner than AdamW, and at about the same step for any seed.
    """

    def __init__(self, model, cfg, steps, scale=1.0, cool=0.4):
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        matrix = [p for n, p in named if cfg.optimizer == "muon" and p.ndim == 2 and "embed" not in n and "lm_head" not in n]
        inside = set(map(id, matrix))
        rest = [p for _, p in named if id(p) not in inside]
        self.parts = [torch.optim.AdamW(rest, lr=cfg.lr * scale, betas=(0.9, 0.98), weight_decay=0.0)]
        if matrix:
            self.parts.append(torch.optim.Muon(matrix, lr=cfg.lr_matrix * scale, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
        self.peak = [g["lr"] for o in self.parts for g in o.param_groups]
        self.params, self.clip, self.warmup, self.steps, self.cool = [p for _, p in named], cfg.clip, min(cfg.warmup, steps // 4), steps, cool * steps

    def step(self, i):
        """Update number i (from 0); -> gradient norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.params, self.clip)
        if not math.isfinite(norm):
            return float(norm)                                   # nothing moves; train_loop stops
        rate = min(1.0, (i + 1) / max(1, self.warmup)) * max(0.02, min(1.0, (self.steps - i) / max(1, self.cool)))
        for g, lr in zip((g for o in self.parts for g in o.param_groups), self.peak):
            g["lr"] = lr * rate
        for o in self.parts:
            o.step()
            o.zero_grad(set_to_none=True)
        return float(norm)

    def state_dict(self):
        return [o.state_dict() for o in self.parts]

    def load_state_dict(self, states):
        for o, s in zip(self.parts, states):
            o.load_state_dict(s)


def train_loop(run, stage, model, optimizer, steps, one_step, sampler=None, until=None):
    """The loop of every trained stage. one_step(i) leaves gradients and returns metrics ("loss" and "ids" among them).

    A non-finite loss stops the run with the step and the batch's ids. Checkpoints are written aside and renamed. `until(i)` may end the
    flat part early: it returns the final number of steps once it knows it.
    """
    state, start, t0 = run.path("partial", stage, "state.pt"), 0, time.time()
    if run.cfg.resume == "auto" and os.path.exists(state):
        try:
            saved = torch.load(state, map_location=run.device, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as e:
            raise ValueError(f"{state}: damaged ({type(e).__name__}); without it, or without --resume, the stage starts again") from None
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        optimizer.steps, start, steps = saved["steps"], saved["step"], saved["steps"]
        if sampler is not None:
            sampler.load(json.loads(saved["sampler"]))
    bar = tqdm(total=steps, initial=start, desc=stage, disable=None)
    i = start
    while i < steps:
        metrics = one_step(i)
        ids = metrics.pop("ids", [])
        if math.isfinite(metrics["loss"]):
            metrics["grad_norm"] = optimizer.step(i)
        for what in ("loss", "grad_norm"):
            if not math.isfinite(metrics[what]):
                raise FloatingPointError(f"stage {stage}, step {i}: {what} is {metrics[what]}; batch: {', '.join(ids[:8])} ...")
        i += 1
        bar.update()
        if i % run.cfg.log_every == 0 or i == steps:
            run.log(stage, i, steps, dict(metrics, seconds=round(time.time() - t0, 1)))
        if until is not None and (end := until(i, steps)) != steps:
            steps = optimizer.steps = bar.total = end
        if i % run.cfg.save_every == 0 and i < steps:
            os.makedirs(os.path.dirname(state), exist_ok=True)
            value = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), step=i, steps=steps,
                         sampler=json.dumps(sampler.state()) if sampler is not None else "")
            try:
                torch.save(value, state + ".part")
            except RuntimeError as e:                            # torch's word for a full disk
                raise OSError(f"{state}: not written ({e})") from None
            os.replace(state + ".part", state)
    bar.close()
    model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1, base: pretrain a tiny Qwen3-VL on "describe what you see", or link a real one


def base_stage(run, out):
    c = run.cfg
    if c.model:
        source = Embedder.from_pretrained(c.model, "cpu", "bfloat16")     # opens it whole: a broken checkpoint is refused here, not in an hour
        if not source.model.has_head:
            raise UsageError(f"{c.model} has no lm_head: it can neither decide nor write rationales; start from an Instruct checkpoint")
        source.save(out, base=c.model)
        return
    torch.manual_seed(int(run.rng("weights").integers(2**31)))
    tok = Tokenizer(pocket.pocket_tokenizer(pocket.vocabulary_texts()))
    special = tok.special
    config = dataclasses.replace(CONFIGS["pocket"], vocab=tok.size, image_token=special["<|image_pad|>"], video_token=special["<|video_pad|>"],
                                 vision_start=special["<|vision_start|>"], vision_end=special["<|vision_end|>"])
    model = Qwen3VL(config).init_weights().to(run.device)
    reader = Reader(tok, config, c.min_pixels, c.max_pixels, c.max_frames)
    bank = pocket.Bank(run.rng("bank"), style=c.world_style)
    steps, most = run.steps(c.base_steps), run.steps(c.base_steps_max)
    optimizer = Optimizer(model, c, steps, cool=0.25)
    look = lambda i: 1.0 if i < run.steps(c.base_look) else 0.4    # first learn to see, then to look things up

    def one_step(i):
        model.train()
        rng = run.rng("base", i)
        loss, summary, acc = document_loss(model, reader, [pocket.base_document(bank, rng, look(i)) for _ in range(c.base_batch)])
        table, table_summary, table_acc = document_loss(model, reader, [pocket.text_document(rng) for _ in range(c.base_batch // 2)])
        total = loss + c.base_text * table + c.base_summary * (summary + table_summary)
        total.backward()
        return dict(loss=total.item(), summary=summary.item(), text_summary=table_summary.item(), accuracy=acc, text_accuracy=table_acc)

    probe = pocket.Bank(run.rng("probe bank"), style=c.world_style)        # other drawings than those it learns from

    def until(i, steps):
        """At the end of the flat part: are the skills there? If not, stay flat for another tenth."""
        if i != steps - round(optimizer.cool) or steps >= most:
            return steps
        skills = measure_skills(run, model, reader, probe)
        run.log("base skills", i, steps, skills)
        return steps if min(v for k, v in skills.items() if k in STEP_SKILLS) >= c.base_skill - 0.05 else min(most, steps + run.steps(c.base_steps) // 10)

    train_loop(run, "base", model, optimizer, steps, one_step, until=until)
    skills = measure_skills(run, model, reader, probe)
    run.log("base skills", optimizer.steps, optimizer.steps, skills)
    weak = {k: round(skills[k], 3) for k in STEP_SKILLS if skills.get(k, 0) < c.base_skill}
    if weak:
        tqdm.write(f"base: these skills are below {c.base_skill} after {optimizer.steps} steps: {weak}; expect weaker rationales")
    write_json(os.path.join(out, "skills.json"), skills)
    Embedder(model, reader).save(out, base=None, card="Pretrained on the pocket world's documents (stage base).")


STEP_SKILLS = ("at", "move", "clip", "table")                    # what the steps are made of; the rest is learnt on the way


def document_batch(reader, docs, device):
    """Documents (item, [(text, learn)]) -> batch, a mask (B, S) of the tokens to learn, and summaries [(row, column, answer ids)].

    A document is a branch of its prompt, beside the direct <|endoftext|>; it ends in <|im_end|>. Each <|endoftext|>, the direct one and the
    one after a thought, sums up the answer.
    """
    prompts = [reader.read(pil_item(item)) for item, _ in docs]
    branches, learnt = [], []
    for _, parts in docs:
        pieces = [(piece(reader, text), yes) for text, yes in parts] + [([reader.stop], True)]
        branches.append([sum((ids for ids, _ in pieces), [])])
        learnt.append([yes for ids, yes in pieces for _ in ids])
    batch = collate(prompts, reader, branches, device)
    mask, sums = torch.zeros_like(batch["ids"], dtype=torch.bool), []
    for b, ((item, _), p, learn) in enumerate(zip(docs, prompts, learnt)):
        at = len(p["ids"]) + 1
        mask[b, at : at + len(learn)] = torch.tensor(learn, device=device)
        if "answer" in item:
            words = sorted(set(reader.tok.encode(item["answer"])) | set(reader.tok.encode(" " + item["answer"])[:1]))
            inside = [at + i for i, t in enumerate(branches[b][0]) if t == reader.end]
            sums += [(b, col, words) for col in [at - 1, *inside]]
    return batch, mask, sums


def pil_item(item):
    """A pocket document's arrays as pictures, and the request that all of them answer."""
    from PIL import Image
    show = Image.fromarray
    return dict(text=item.get("text", "describe"), **({"image": show(item["image"])} if "image" in item else {"video": [show(f) for f in item["video"]]} if "video" in item else {}))


def piece(reader, text):
    """A fragment's ids; the think markers are the special tokens."""
    return [reader.tok.special[text]] if text in ("<think>", "</think>", "<|endoftext|>") else reader.tok.encode(text)


def document_loss(model, reader, docs):
    """Next-token loss, summary loss, token accuracy. The summary loss asks the state at <|endoftext|> for all words of the answer at once
    (multi-token prediction in one place): a base model's last token would else know only how the answer begins, and contrastive
    learning, which pools that token, would have to teach it the rest."""
    batch, mask, sums = document_batch(reader, docs, model.device)
    h = model(batch)
    row, col = mask.nonzero(as_tuple=True)
    logits, want = model.logits(h[row, batch["prev"][row, col]]), batch["ids"][row, col]
    summary = h.new_zeros(())
    if sums:
        logp = model.logits(torch.stack([h[b, c] for b, c, _ in sums])).log_softmax(-1)       # (n, V)
        summary = -torch.stack([logp[i, words].mean() for i, (_, _, words) in enumerate(sums)]).mean()
    return F.cross_entropy(logits, want), summary, (logits.argmax(-1) == want).float().mean().item()


@torch.no_grad()
def measure_skills(run, model, reader, bank, n=48):
    """Held-out token accuracy of each skill that the steps are made of: {"describe", "at", "move", "answer", "clip", ...}."""
    model.eval()
    rng, seen = run.rng("skills"), {}
    docs = [pocket.base_document(bank, rng, look) for look in (1.0, 0.0) for _ in range(n)] + [pocket.text_document(rng) for _ in range(n // 2)]
    for at in range(0, len(docs), 32):
        batch, _, _ = document_batch(reader, docs[at : at + 32], model.device)
        h = model(batch)
        for b, (item, parts) in enumerate(docs[at : at + 32]):
            i = int(batch["ends"][b, 0]) + 1
            for n_part, (text, learn) in enumerate(parts):
                m = len(piece(reader, text))
                if learn:
                    right = (model.logits(h[b, batch["prev"][b, i : i + m]]).argmax(-1) == batch["ids"][b, i : i + m]).float().mean().item()
                    seen.setdefault(pocket.skill_of(item, parts, n_part), []).append(right)
                i += m
    return {k: float(np.mean(v)) for k, v in sorted(seen.items())}


# ---------------------------------------------------------------------------------------------------------------------
# Reading training pairs


class Pairs:
    """Training pairs as prompts. A small world is read once and kept; a large one is streamed by threads."""

    def __init__(self, run, reader):
        c = run.cfg
        self.data, self.reader, self.workers = loader.train_sets(run.data_root), reader, c.workers
        self.kept = {} if sum(self.data.sizes) <= 20000 else None         # 20,000 pairs of pocket pictures are about 1 GB
        self.left_out = set(filter(None, c.leave_out.split(",")))
        if unknown := sorted(self.left_out - set(self.data.names)):
            raise UsageError(f"--leave_out {unknown[0]}: no such dataset; there are {', '.join(self.data.names)}")
        if self.data.missing:
            tqdm.write(f"training data: missing {', '.join(self.data.missing)}")

    def read(self, pair):
        """-> {"id", "dataset", "query", "target", "negatives"} as prompts, and "answer": a key that equal targets share."""
        target = self.reader.read(pair["target"])
        return dict(id=pair["id"], dataset=pair["dataset"], query=self.reader.read(pair["query"]), target=target, answer=key_of(target),
                    negatives=[self.reader.read(n) for n in pair["negatives"]])

    def get(self, source, row):
        if self.kept is None:
            return self.read(self.data.pair(source, row))
        if (source, row) not in self.kept:
            self.kept[source, row] = self.read(self.data.pair(source, row))
        return self.kept[source, row]

    def sampler(self, cfg, seed, batch):
        """Batches of (source, row)."""
        weights = [0.0 if n in self.left_out else w for n, w in zip(self.data.names, self.data.weights)]
        return loader.Sampler(self.data.sizes, weights, batch, min(cfg.sub_batch, batch), seed)

    def stream(self, sampler):
        if self.kept is not None:
            for refs in sampler:
                yield [self.get(*r) for r in refs]
        for pairs in loader.batches(self.data, sampler, self.workers):
            yield [self.read(p) for p in pairs]

    def all(self, limit=None):
        """Every pair (at most `limit` per dataset), in order."""
        for s, size in enumerate(self.data.sizes):
            for row in range(0 if self.data.names[s] in self.left_out else min(size, limit or size)):
                yield self.get(s, row)


def key_of(prompt):
    """Equal prompts have equal keys."""
    h = hashlib.blake2b(prompt["ids"].tobytes(), digest_size=12)
    for x in prompt["pixels"]:
        h.update(np.ascontiguousarray(x).tobytes())
    return h.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# The contrastive step, shared by the warm-up of select and by embed


def chunks_of(lengths, budget):
    """Indices sorted by length and cut where a chunk would exceed the budget of padded tokens, or pad by more than a half."""
    order, out = np.argsort(lengths, kind="stable")[::-1].tolist(), []
    for i in order:
        if out and (len(out[-1]) + 1) * lengths[out[-1][0]] <= budget and lengths[i] * 1.5 >= lengths[out[-1][0]]:
            out[-1].append(i)
        else:
            out.append([i])
    return out


def contrastive_step(model, reader, pairs, branches, labels, cfg):
    """L = NCE(direct) + NCE(reasoned) + λ·CE(rationale tokens) + μ·CE(decision token), one update's gradients.

    pairs [B] of Pairs; branches [B]: a rationale branch or None (no reasoned path for this pair); labels [B]: 1 reason, 0 direct,
    -1 no decision to learn. Equal targets are embedded once and never serve as each other's negatives. -> metrics.
    """
    model.train()
    columns, positive = {}, []
    for p in pairs:
        positive.append(columns.setdefault(p["answer"], (len(columns), p["target"]))[0])
    for p in pairs:
        for n in p["negatives"][: cfg.negatives]:
            columns.setdefault(key_of(n), (len(columns), n))
    targets = [t for _, t in columns.values()]
    device = model.device
    positive = torch.tensor(positive, device=device)
    n_tokens = max(1, sum(len(b) - len(reader.prefix) - len(reader.tail) for b in branches if b))
    n_labels = max(1, sum(l >= 0 for l in labels))
    q_len = [len(p["query"]["ids"]) + 1 + len(b or []) for p, b in zip(pairs, branches)]
    chunks = [("query", rows) for rows in chunks_of(q_len, cfg.chunk_tokens)] + [("target", rows) for rows in chunks_of([len(t["ids"]) + 1 for t in targets], cfg.chunk_tokens)]
    where = [(kind, i, g) for kind, rows in chunks for i in rows for g in (range(2) if kind == "query" and branches[i] else range(1))]
    at = lambda kind, g: torch.tensor([n for n, (k, _, b) in enumerate(where) if k == kind and b == g], dtype=torch.long, device=device)
    row = lambda kind, g: torch.tensor([i for k, i, b in where if k == kind and b == g], dtype=torch.long, device=device)
    parts = dict(lm=0.0, decision=0.0, decision_right=0.0)

    def encode(chunk):
        kind, rows = chunk
        if kind == "target":
            batch = collate([targets[i] for i in rows], reader, device=device)
            return pool(model(batch), batch["ends"])[:, 0], None
        batch = collate([pairs[i]["query"] for i in rows], reader, [[branches[i]] if branches[i] else [] for i in rows], device)
        h = model(batch)
        v = pool(h, batch["ends"])
        extra = h.new_zeros(())
        if torch.is_grad_enabled() and cfg.lm_weight and any(branches[i] for i in rows):
            logp, _, _ = branch_logp(model, h, batch, reader, len(reader.prefix))
            extra = extra - cfg.lm_weight * logp.sum() / n_tokens
            parts["lm"] -= float(logp.detach().sum()) / n_tokens
        want = torch.tensor([labels[i] for i in rows], device=device)
        if torch.is_grad_enabled() and cfg.decision_weight and bool((want >= 0).any()):
            logits = decision_logits(model, h, batch, reader)
            ce = F.cross_entropy(logits, want, ignore_index=-1, reduction="sum") / n_labels
            extra = extra + cfg.decision_weight * ce
            parts["decision"] += float(ce.detach())
            parts["decision_right"] += float(((logits.argmax(1) == want) & (want >= 0)).sum()) / n_labels
        return v[batch["ends"] >= 0], extra

    losses = {}

    def loss_fn(v):
        t = v[at("target", 0)].new_empty(len(targets), v.shape[1]).index_copy(0, row("target", 0), v[at("target", 0)])
        total = v.new_zeros(())
        for name, g in (("direct", 0), ("reason", 1)):
            rows = row("query", g)
            if len(rows):
                same = F.one_hot(positive[rows], len(targets)).bool()
                losses[name] = info_nce(v[at("query", g)], t, positive[rows], cfg.temperature, same)
                total = total + losses[name]
        return total

    fits = sum(q_len) + sum(len(t["ids"]) for t in targets) <= cfg.chunk_tokens
    loss, extra = grad_cache(chunks, encode, loss_fn, fits)
    return dict(loss=loss + extra, nce_direct=float(losses["direct"].detach()), nce_reason=float(losses["reason"].detach()) if "reason" in losses else 0.0,
                **parts, ids=[p["id"] for p in pairs])


# ---------------------------------------------------------------------------------------------------------------------
# Stage 2, propose: K candidate rationales per query. No worker sees the target


@torch.no_grad()
def propose_stage(run, out):
    c = run.cfg
    e = run.embedder("base")
    pairs = Pairs(run, e.reader)
    source = c.rationales or (run.path("data", "workers.jsonl") if not c.data else "")
    rows = selection.read_rationales(source) if source else []
    parts = []
    for side in ("query", "target") if c.sides == "both" else ("query",):
        todo = sorted(pairs.all() if c.propose_k else (), key=lambda p: len(p[side]["ids"]))
        parts += [(side, todo[at : at + 64]) for at in range(0, len(todo), 64)]
    for n, (side, part) in enumerate(tqdm(parts, desc="propose", disable=None)):
        batch = collate([p[side] for p in part], e.reader, device=run.device)
        got = generate(e.model, batch, c.propose_max_new, c.propose_k, e.reader.prefix, (e.reader.unthink,), e.reader.tail, e.reader.close,
                       e.reader.ban, c.propose_temperature, run.generator("propose", n))
        for p, tokens in zip(part, got["tokens"]):
            for k, ids in enumerate(tokens):
                text = e.reader.rationale_text(ids)
                if text:
                    rows.append(dict(id=p["id"], side=side, worker="base" if c.propose_k == 1 else f"base-{k}", text=text))
    if not rows:
        raise UsageError("no rationale was proposed: --propose_k is 0 and no --rationales file was given")
    selection.write_rows(os.path.join(out, "rationales.jsonl"), rows)


# ---------------------------------------------------------------------------------------------------------------------
# Stage 3, select: two cross-fitted evaluators, one counterfactual per rationale


def select_stage(run, out):
    c = run.cfg
    texts = {}
    for r in selection.read_rationales(run.path("propose", "rationales.jsonl")):
        if r["side"] == "query":
            texts.setdefault(r["id"], {})[r["worker"]] = r["text"]
    results, audits = [], []
    for fold in range(c.select_folds):
        e = run.embedder("base")
        pairs = Pairs(run, e.reader)
        mine = lambda p: fold_of(p["id"], c.select_folds) == fold          # this evaluator judges these ...
        branch = {i: {w: e.reader.rationale(t) for w, t in ws.items()} for i, ws in texts.items()}
        warm_up(run, e, pairs, branch, (lambda p: not mine(p)) if c.select_folds > 1 else (lambda p: True), f"select{fold}")   # ... and learnt from the others
        judged = [p for p in pairs.all() if mine(p) and p["id"] in texts]
        results += judge(run, e, judged, texts, branch, fold, audits)
    kept = selection.choose(results, c.select_rule, c.select_margin, c.select_weight_temperature)
    truth = read_json(run.path("data", "pocket.json"))["steps"] if not c.data else None
    report = selection.audit(results, kept, truth, audits)
    selection.write_rows(os.path.join(out, "selected.jsonl"), [{k: r[k] for k in ("id", "worker", "text", "delta", "delta_placebo", "weight")} for r in kept])
    selection.write_rows(os.path.join(out, "judged.jsonl"), results)
    write_json(os.path.join(out, "audit.json"), report)
    run.log("select", 1, 1, {k: v for k, v in report.items() if not isinstance(v, dict)})


def fold_of(pair_id, folds):
    return hashlib.blake2b(pair_id.encode(), digest_size=4).digest()[0] % folds


def warm_up(run, e, pairs, branch, train_on, name):
    """Train an evaluator on both paths with any candidate rationale of its own fold: it learns to read rationales, good and bad."""
    c = run.cfg
    cfg = dataclasses.replace(c, lm_weight=0.0, decision_weight=0.0)
    sampler = pairs.sampler(c, int(run.rng(name).integers(2**31)), 2 * c.batch if c.select_folds > 1 else c.batch)
    stream = pairs.stream(sampler)

    def one_step(i):
        batch, rng = [p for p in next(stream) if train_on(p)], run.rng(name, i)
        options = [list(branch.get(p["id"], {}).values()) for p in batch]
        return contrastive_step(e.model, e.reader, batch, [o[rng.integers(len(o))] if o else None for o in options], [-1] * len(batch), cfg)

    steps = run.steps(c.select_steps)
    train_loop(run, name, e.model, Optimizer(e.model, c, steps, c.select_lr), steps, one_step, sampler)


def judge(run, e, judged, texts, branch, fold, audits):
    """Δ and Δ_placebo of every rationale of these pairs; audits gets, for a quarter of the pairs, whether their placebos pass as their own."""
    c, rng = run.cfg, run.rng("judge", fold)
    targets, index = [], {}
    for p in judged:
        for key, t in [(p["answer"], p["target"]), *((key_of(n), n) for n in p["negatives"])]:
            if key not in index:
                index[key] = len(targets)
                targets.append(t)
    vectors = torch.empty(len(targets), e.model.c.hidden, device=run.device)
    with torch.no_grad():
        for rows in chunks_of([len(t["ids"]) + 1 for t in targets], c.chunk_tokens):
            batch = collate([targets[i] for i in rows], e.reader, device=run.device)
            vectors[rows] = pool(e.model(batch), batch["ends"])[:, 0]
    table = [dict(id=p["id"], dataset=p["dataset"], answer=p["answer"], target=index[p["answer"]], negatives=[index[key_of(n)] for n in p["negatives"]]) for p in judged]
    candidates = selection.candidate_sets(table, rng, c.select_candidates)
    mine = {p["id"]: texts[p["id"]] for p in judged}
    placebo, second = selection.choose_placebos(table, mine, rng), selection.choose_placebos(table, mine, rng)
    checked = {p["id"] for p in judged if rng.random() < 0.25}
    plan = []                                                    # per pair: (worker, kind) of every branch
    for p in judged:
        own = [(w, "own") for w in mine[p["id"]]]
        false = [(w, "placebo") for w in mine[p["id"]] if placebo[p["id"]][w]]
        again = [(w, "second") for w in mine[p["id"]] if p["id"] in checked and second[p["id"]][w]]
        plan.append(own + false + again)
    words = {"own": mine, "placebo": placebo, "second": second}
    branches = [[e.reader.rationale(words[kind][p["id"]][w]) for w, kind in plan_p] for p, plan_p in zip(judged, plan)]
    m = selection.margins(e.model, e.reader, [p["query"] for p in judged], branches, vectors, candidates, c.temperature,
                          positive_only=c.select_rule == "positive_only", title=f"judge fold {fold}")
    results = []
    for p, plan_p, row in zip(judged, plan, m):
        gain = {slot: float(x - row[0]) for slot, x in zip(plan_p, row[1:])}
        for w in mine[p["id"]]:
            false = gain.get((w, "placebo"))
            results.append(dict(id=p["id"], worker=w, text=mine[p["id"]][w], delta=gain[w, "own"], delta_placebo=false, direct=float(row[0])))
            if (w, "second") in gain and false is not None and second[p["id"]][w] != placebo[p["id"]][w]:
                audits.append(bool(selection.keep_rule(false, gain[w, "second"], c.select_rule, c.select_margin)))
    return results


# ---------------------------------------------------------------------------------------------------------------------
# Stage 4, embed: one model, both paths, one space


def embed_stage(run, out):
    c = run.cfg
    e = run.embedder("base")
    pairs = Pairs(run, e.reader)
    kept, proposed = {}, selection.read_rationales(run.path("propose", "rationales.jsonl"))
    judged, workers = {r["id"] for r in proposed if r["side"] == "query"}, set(filter(None, c.embed_workers.split(",")))
    if unknown := sorted(workers - {r["worker"] for r in proposed} - {"none"}):
        raise UsageError(f"--embed_workers {unknown[0]}: no rationale is by such a worker; there are {', '.join(sorted({r['worker'] for r in proposed}))}")
    for r in selection.read_rationales(run.path("select", "selected.jsonl"), numbers=("weight",)):
        if not workers or r["worker"] in workers:
            kept.setdefault(r["id"], []).append((e.reader.rationale(r["text"]), r["weight"]))
    kept = {i: [(b, w / sum(w for _, w in options)) for b, w in options] for i, options in kept.items()}
    offline = {}                                                 # what targets may say; nothing judges it, so it only serves --sides both
    for r in proposed:
        if r["side"] == "target" and c.sides == "both":
            offline.setdefault(r["id"], []).append(e.reader.rationale(r["text"]))
    if c.sides == "both" and not offline:
        raise UsageError("--sides both: propose left no rationale of a target (propose_k is 0, and the file given has none)")
    sampler = pairs.sampler(c, int(run.rng("embed").integers(2**31)), c.batch)
    stream = pairs.stream(sampler)

    def one_step(i):
        batch, rng, branches, labels = next(stream), run.rng("embed", i), [], []
        if c.sides == "both" and i % 2:                          # every other step targets reason: pairs turned round, each target once
            batch = list({p["answer"]: dict(p, query=p["target"], target=p["query"], answer=key_of(p["query"]), negatives=[]) for p in batch}.values())
            options = [offline.get(p["id"], [None]) for p in batch]
            return contrastive_step(e.model, e.reader, batch, [o[rng.integers(len(o))] for o in options], [-1] * len(batch), c)
        for p in batch:                                          # one rationale per visit, drawn from the posterior
            options = kept.get(p["id"])
            branches.append(options[rng.choice(len(options), p=[w for _, w in options])][0] if options else None)
            labels.append(1 if options else 0 if p["id"] in judged else -1)
        return contrastive_step(e.model, e.reader, batch, branches, labels, c)

    steps = run.steps(c.embed_steps)
    train_loop(run, "embed", e.model, Optimizer(e.model, c, steps, c.embed_lr), steps, one_step, sampler)
    e.save(out, base=c.model or None, card="Joint training of the direct and the reasoned path on selected rationales (stage embed).")


# ---------------------------------------------------------------------------------------------------------------------
# Stage 5, rl: when to reason, and what to write (rl.py)


def rl_stage(run, out):
    c = run.cfg
    e = run.embedder("embed")
    pairs = Pairs(run, e.reader)
    sampler = pairs.sampler(dataclasses.replace(c, sub_batch=8), int(run.rng("rl").integers(2**31)), c.rl_batch)
    stream = pairs.stream(sampler)

    def encode_targets(targets):
        batch = collate(targets, e.reader, device=run.device)
        return pool(e.model(batch), batch["ends"])[:, 0]

    def one_step(i):
        batch = next(stream)
        if not c.rl_group:
            return contrastive_step(e.model, e.reader, batch, [None] * len(batch), [-1] * len(batch), c)
        keys = np.array([p["answer"] for p in batch])
        same = torch.from_numpy(keys[:, None] == keys[None]).to(run.device)
        m = rl.grpo_step(e.model, e.reader, [p["query"] for p in batch], [p["target"] for p in batch], same, c, run.generator("rl", i), encode_targets)
        m["sample"]["id"] = batch[m["sample"].pop("row")]["id"]
        return dict(m, loss=m["nce_direct"] + m["nce_reason"], ids=[p["id"] for p in batch])

    steps = run.steps(c.rl_steps)
    train_loop(run, "rl", e.model, Optimizer(e.model, c, steps, c.rl_lr), steps, one_step, sampler)
    e.save(out, base=c.model or None, card="Adaptive reasoning learnt by GRPO with a price on latency (stage rl).")


# ---------------------------------------------------------------------------------------------------------------------
# Stage 6, eval, and the report


def eval_stage(run, out):
    c = run.cfg
    e = run.embedder("rl")
    found = evaluation.evaluate(e, run.data_root, out, tau=c.tau, batch_size=c.eval_batch, options=dict(max_new_tokens=c.eval_max_new))
    write_json(os.path.join(out, "modes.json"), dict(modes=found["modes"], curve=found["curve"]))


def report(run):
    """report.json, report.md, the pictures, and the grep-able block at the end."""
    found, audit = read_json(run.path("eval", "modes.json")), read_json(run.path("select", "audit.json"))
    keys = ("candidates", "kept", "precision", "recall", "placebo_accepted", "by_worker", "by_dataset", "sloppy_kept")
    out = dict(preset=run.cfg.preset, seed=run.cfg.seed, seconds={k: v["seconds"] for k, v in run.stages.items()}, modes=found["modes"],
               selection={k: audit[k] for k in keys if k in audit}, curve=found["curve"])
    write_json(run.path("report.json"), out)
    evaluation.pictures(run.out, run.data_root)
    lines = {"seconds": round(sum(out["seconds"].values()), 1)}
    for mode in ("never", "always", "adaptive", "random", "oracle"):
        lines |= {mode: round(out["modes"][mode]["overall"], 4), f"{mode}_tokens": round(out["modes"][mode]["tokens_per_query"], 2)}
    lines |= {f"selection_{k}": audit[k] for k in ("precision", "recall", "placebo_accepted") if audit[k] is not None}
    print("\n".join(f"{k}: {v}" for k, v in {**lines, "report": run.path("report.json")}.items()))


# ---------------------------------------------------------------------------------------------------------------------


def world(cfg, final, **change):
    """Draw the pocket world once."""
    if os.path.exists(os.path.join(final, "datasets.json")):
        return
    aside, c = final + ".part", dataclasses.replace(cfg, **change)
    shutil.rmtree(aside, ignore_errors=True)
    os.makedirs(aside)
    pocket.write_world(aside, c.seed, max(4, round(c.world_train * c.scale)), max(4, round(c.world_test * c.scale)), c.world_style, c.world_steps)
    os.replace(aside, final)


def run_stages(cfg):
    """The stages that this call asks for, in one run folder -> its Run."""
    run = Run(cfg)
    if not cfg.data:
        world(cfg, run.path("data"))
    for stage in STAGES if cfg.stage == "all" else (cfg.stage,):
        if cfg.stage == "all" and stage in run.stages:
            tqdm.write(f"{stage}: done before")
            continue
        t0, aside = time.time(), run.path(f"{stage}.part")
        shutil.rmtree(aside, ignore_errors=True)
        os.makedirs(aside)
        {"base": base_stage, "propose": propose_stage, "select": select_stage, "embed": embed_stage, "rl": rl_stage, "eval": eval_stage}[stage](run, aside)
        run.finish(stage, aside, time.time() - t0)
        tqdm.write(f"{stage}: {time.time() - t0:.0f} s")
    if "eval" in run.stages:
        report(run)
    return run


# ---------------------------------------------------------------------------------------------------------------------
# The study: does thinking when needed pay? Variants are run folders forked from one another, so they share every stage
# before the first that differs: data, base and proposals always, the embedder where only rl does. What the seeds say: study.py

VARIANTS = {                                                     # name: (forked from, first stage done again, what differs)
    "full": ("", "base", {}),
    # VLM2Vec-style: contrastive without a rationale, as many updates of embed and rl on batches of the same size
    "never": ("full", "embed", dict(embed_workers="none", decision_weight=0.0, rl_group=0, tau=1.0)),
    "no_selection": ("full", "select", dict(select_rule="none", select_weight_temperature=1e6)),          # a huge T: all candidates alike
    # UME-R1-style: a rationale on every query in training (the best worker's, or any) and in use, no decision, no price
    "always": ("no_selection", "embed", dict(embed_workers="careful", decision_weight=0.0, rl_decision=0.0, rl_price=0.0, tau=-1.0)),
    "always_any": ("no_selection", "embed", dict(decision_weight=0.0, rl_decision=0.0, rl_price=0.0, tau=-1.0)),
    "positive_only": ("full", "select", dict(select_rule="positive_only")),
    "no_placebo": ("full", "select", dict(select_rule="no_placebo")),
    "no_crossfit": ("full", "select", dict(select_folds=1)),
    "supervised": ("full", "rl", dict(rl_steps=0)),              # the decision as selection labelled it
    "no_price": ("full", "rl", dict(rl_price=0.0)),
    "one_loss": ("full", "rl", dict(rl_one_loss=True)),
    "both_sides": ("full", "propose", dict(sides="both")),
    "without_tally": ("full", "select", dict(leave_out="PocketTally")),                                   # never seen, then tested
}
ELSEWHERE = {"hard": dict(world_steps=5), "night": dict(world_style="night")}                             # test worlds that nobody trained on ...
TRAVELLERS = ("full", "never", "always")                                                                  # ... and who goes there


def lineage(name):
    """The variant's forebears, "full" first, and itself."""
    return [*lineage(VARIANTS[name][0]), name] if name else []


def fork(parent, out, stages):
    """A run folder whose data and first stages are links to its parent's."""
    if os.path.exists(os.path.join(out, "stages.json")):
        return
    os.makedirs(out, exist_ok=True)
    for name in ("data", *stages):
        if not os.path.lexists(os.path.join(out, name)):
            os.symlink(os.path.relpath(os.path.join(parent, name), out), os.path.join(out, name))
    with open(os.path.join(parent, "metrics.jsonl"), encoding="utf-8") as f:
        selection.write_rows(os.path.join(out, "metrics.jsonl"), [row for row in map(json.loads, f) if row["stage"].startswith(stages)])
    done = read_json(os.path.join(parent, "stages.json"))
    write_json(os.path.join(out, "stages.json"), {k: done[k] for k in stages})


def run_variant(cfg, name, seed):
    """One variant under one seed, and what is measured of it beside its report; whatever is there already is not done again."""
    parent, first, _ = VARIANTS[name]
    place = lambda name: os.path.join(cfg.out, "study", f"seed{seed}", name)
    c = dataclasses.replace(cfg, stage="all", seed=seed, out=place(name), **{k: v for n in lineage(name) for k, v in VARIANTS[n][2].items()})
    if parent:
        fork(place(parent), c.out, STAGES[: STAGES.index(first)])
    run = Run(c)                                                 # refuses a folder of another configuration
    if not os.path.exists(run.path("report.json")):
        run = run_stages(c)

    def measure(folder, root, max_new, **how):
        if not os.path.exists(run.path(folder, "modes.json")):
            found = evaluation.evaluate(run.embedder("rl"), root, run.path(folder), tau=c.tau, batch_size=c.eval_batch,
                                        options=dict(max_new_tokens=max_new), **how)
            write_json(run.path(folder, "modes.json"), dict(modes=found["modes"], curve=found["curve"]))

    for where, how in ELSEWHERE.items() if name in TRAVELLERS else ():
        world(c, place(f"world_{where}"), world_train=1, seed=seed + 1000, **how)
        measure(where, place(f"world_{where}"), 2 * c.eval_max_new)                                       # longer paths take more words
    if c.sides == "both":
        measure("reasoned_documents", run.data_root, c.eval_max_new, targets="always")
    if name == "full" and not os.path.exists(run.path("analysis.json")):
        write_json(run.path("analysis.json"), study.analyse(run.embedder("rl"), run.data_root, run.rng("analysis"), c.tau, c.temperature, c.eval_max_new, c.eval_batch))


def study_stage(cfg):
    chosen = cfg.study_variants.split(",") if cfg.study_variants else list(VARIANTS)
    if unknown := [n for n in chosen if n not in VARIANTS]:
        raise UsageError(f"--study_variants {unknown[0]!r}: there are {', '.join(VARIANTS)}")
    if cfg.data or cfg.model:
        raise UsageError("--stage study draws its own worlds and pretrains its own models: no --data, no --model")
    wanted = {n for name in chosen for n in lineage(name)}
    for seed in range(cfg.seed, cfg.seed + cfg.study_seeds):
        for name in filter(wanted.__contains__, VARIANTS):
            tqdm.write(f"study: seed {seed}, {name}")
            run_variant(cfg, name, seed)
        print(study.summarise(os.path.join(cfg.out, "study")))


def main(argv):
    if {"--help", "-h"} & set(argv):
        print(usage())
        return 0
    try:
        cfg = parse(argv)
        study_stage(cfg) if cfg.stage == "study" else run_stages(cfg)
        return 0
    except UsageError as e:
        print(f"train.py: {e}", file=sys.stderr)
        return 2
    except (ValueError, OSError, FloatingPointError) as e:
        print(f"train.py: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
