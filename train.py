"""
Everything in order: base -> propose -> select -> embed -> rl -> eval, each a function below, each leaving a folder behind.

    python train.py --stage all                                            the pocket world, from nothing to the report, on a laptop CPU
    python train.py --stage all --scale 0.05                               the same in a minute or three: every size and step count times 0.05
    cp -r runs/pocket runs/dear                                            fork a finished run, then do one stage again with
    python train.py --stage rl --rl_price 3 --out runs/dear                one of its options changed, and what follows from it
    python train.py --stage all --rl_price 3 --out runs/dear               (with a run's other options, such as --scale, in every call)
    python train.py --stage study --study_seeds 5                          does thinking when needed pay? Every ablation, and what the seeds say
    python train.py --stage all --preset qwen3vl-2b --model Qwen/Qwen3-VL-2B-Instruct --data MMEB_ROOT       on a CUDA GPU
    torchrun --nproc_per_node=8 train.py ... --preset qwen3vl-8b --lora 0 --lr 5e-6 --compile false --fsdp true      on the GPUs of a node, in full

A run folder holds config.json, data/, base/, propose/, select/, embed/, rl/, eval/, metrics.jsonl, report.json, report.md and pictures.
A finished stage is skipped; one that broke off starts again, or with --resume auto from its last checkpoint. SIGTERM writes one first.
A folder of another configuration is refused. Options are the fields of Config: --key=value or --key value; an unknown one is an error.

Precision: what is trained is fp32, what is frozen and all arithmetic are in --dtype (autocast). bf16 weights with fp32 masters beside them
would cost the same 16 bytes per weight, and GradCache adds up dozens of chunks' gradients, which bf16 would round away.
Ranks: each reads its share of every batch; vectors are gathered, the loss is that of the joined batch (embed.grad_cache), gradients add up.

The method's maths stands in embed.py, select.py and rl.py; the order of the stages: select is the E-step of
an EM over the latent rationale, embed the M-step, rl learns the prior over rationales, the empty one among them.

Left out: experiment trackers (metrics.jsonl is plain), sweeps, hyper-parameter schedules beyond warm-up, flat, cool-down; a "best"
checkpoint: nothing is held out inside a stage, and what the loss says of a batch depends on the batch.
"""

import collections
import ctypes
import dataclasses
import datetime
import gc
import glob
import hashlib
import importlib.util
import json
import math
import os
import pickle
import resource
import shutil
import signal
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import data as loader
import eval as evaluation
import pocket
import rl
import study
from embed import Embedder, Reader, chunks_of, collate, contrastive_step, direct_vectors, key_of
from embed import add_gradients, clip_gradients, gather_objects, is_sharded, like, rank, ranks, whole
from model import CONFIGS, Qwen3VL, Tokenizer, for_training, generate, merge_lora, read_json, shard, write_json


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
    dtype: str = "float32"          # of the arithmetic and of what is saved; what is trained is fp32 while it is trained
    leave_out: str = ""             # datasets (commas) that no stage after base trains on or judges; the tests keep them
    # study
    study_seeds: int = 5            # seed, seed + 1, ...
    study_variants: str = ""        # only these (commas) and those that they are forked from; empty: all of VARIANTS
    # world
    world_train: int = 375          # training pairs per family
    world_test: int = 100           # test queries per family
    world_style: str = "plain"
    world_steps: int = 3            # moves of a Walk
    hold_back: float = 0.2          # of every dataset's training pairs: rl's, which no other stage sees (a single pair serves all); 0: all on all
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
    keep: int = 2                   # the last so many of them are kept
    chunk_tokens: int = 16384       # tokens of one forward pass; a larger batch goes through GradCache
    on_bad: str = "stop"            # skip: rows of --data that are broken are left out, named and counted
    workers: int = 0                # processes that read pairs (data that does not fit in memory): decode, resize, tokenise
    # full scale, all stages but base
    train_vision: bool = True       # false: the vision tower stays as it is
    lora: int = 0                   # rank of the updates of all linear layers; 0 trains every weight
    lora_alpha: float = 64.0        # an update counts alpha / rank times
    checkpointing: bool = False     # keep no activations inside layers, compute them again: a third more time, a fraction of the memory
    compile: bool = False           # the text layers, in training
    pad_to: int = 1                 # rows are padded to a multiple of so many tokens: few shapes to compile
    fsdp: bool = False              # shard the text layers over the ranks, where one cannot hold weights and optimizer states
    # base (pocket only)
    base_text: float = 0.3          # weight of the documents without pictures
    base_summary: float = 0.5       # weight of "<|endoftext|> sums up the answer"
    base_look: int = 240            # steps of nothing but description, before it is asked to look things up
    base_steps: int = 450           # at least; it goes on until its skills are there ...
    base_steps_max: int = 900       # ... at most to here, and says so if they are not
    base_batch: int = 32            # documents about pictures per step, and half as many of text alone
    base_skill: float = 0.93        # held-out token accuracy wanted of every skill in STEP_SKILLS; cooling down begins at 0.05 less, and adds that
    # propose
    sides: str = "query"            # who may reason: query, or both (targets too, offline: nobody waits for them)
    propose_k: int = 1              # rationales per query by the base model itself, and by a scripted worker that errs
    propose_temperature: float = 0.7
    propose_max_new: int = 40
    propose_errors: float = 0.0     # pocket world: chance that a statement of its best worker, who is right otherwise, is wrong (pocket.misread)
    rationales: str = ""            # a JSONL of rationales written elsewhere; the pocket world brings workers.jsonl
    # contrastive steps: select's evaluators and embed (temperature: rl too)
    batch: int = 64                 # pairs per step
    sub_batch: int = 16             # of one dataset, so that in-batch negatives are hard
    negatives: int = 1              # hard negatives used per pair
    temperature: float = 0.02       # of every softmax over candidates
    # select
    select_rule: str = "full"       # full, positive_only, no_placebo, none
    select_steps: int = 220         # warm-up of each of the two evaluators
    select_lr: float = 0.3          # times the learning rates above: at 1.0 the evaluators learn their own pairs by heart and judge worse
    select_margin: float = 0.7      # just above log 2: a rationale must at least double the target's probability
    select_fdr: float = 0.1         # at most this share of what one worker's shelf keeps may be luck, as its placebos measure it
    select_candidates: int = 16
    select_folds: int = 2           # 2 = cross-fitted; 1 = the evaluator has seen the pair (ablation)
    select_weight_temperature: float = 1.0
    select_judged: str = ""         # a finished run whose judgements of the same rationales serve here too: another rule then costs seconds
    # embed
    embed_steps: int = 450
    embed_lr: float = 0.5           # times the learning rates above
    embed_workers: str = ""         # only these workers' rationales (commas), "none": nobody's (ablations)
    embed_rest: bool = False        # pairs with nothing kept train the reasoned path too, on words of whoever wrote most kept ones; decision: direct
    embed_unsure: bool = False      # true: where the direct path fails and nothing was kept, the decision is not learnt; false: it is "direct"
    lm_weight: float = 1.0          # of the rationale's cross-entropy
    decision_weight: float = 0.2    # of the decision token's cross-entropy
    # rl
    rl_steps: int = 60
    rl_batch: int = 32              # queries per step
    rl_group: int = 8               # rollouts per query: half reason, half direct; 0: no rollouts, the same steps of InfoNCE alone (ablation)
    rl_max_new: int = 48            # T_max of the price, too
    rl_temperature: float = 1.0
    rl_price: float = 0.1           # reward charged for a rationale of T_max tokens: THE latency price
    rl_beta: float = 0.1            # temperature of the decision: p_reason learns to be sigmoid(gain / beta)
    rl_decision: float = 1.0        # weight of the decision loss
    rl_rationale: float = 1.0       # weight of the rationale loss
    rl_nce: float = 0.1             # weight of InfoNCE beside
    rl_lr: float = 0.03             # times the learning rates above (results/tuning.txt)
    rl_one_loss: bool = False       # ablation: decision and rationale tokens in one mean
    # eval
    tau: float = 0.5                # reason when p_reason > tau
    eval_batch: int = 64
    eval_max_new: int = 48


LARGE = dict(dtype="bfloat16", optimizer="adamw", lr=1e-5, warmup=100, min_pixels=4096, max_pixels=1003520, world_train=0, world_test=0, workers=8,
             propose_k=4, propose_max_new=256, select_steps=500, embed_steps=5000, batch=1024, sub_batch=64, rl_steps=500, rl_batch=64,
             rl_max_new=128, hold_back=0.05, eval_batch=16, eval_max_new=128, save_every=200, checkpointing=True, compile=True, pad_to=128)
RL_SUB_BATCH = 8                    # rl's queries of one dataset side by side (sub_batch elsewhere): the reward compares their targets
LORA = dict(lora=32, lr=1e-4)       # 16 bytes per weight: 4B in full is 71 GB before the first activation
PRESETS = {"pocket": {}, "qwen3vl-2b": LARGE, "qwen3vl-4b": {**LARGE, **LORA}, "qwen3vl-8b": {**LARGE, **LORA}}
FREE = ("stage", "resume", "out", "device", "workers", "log_every", "save_every", "keep", "chunk_tokens", "checkpointing", "compile", "pad_to",
        "fsdp", "study_seeds", "study_variants", "select_judged")                 # may differ when a folder is reused


CHOICES = {"resume": ("", "auto"), "world_style": ("plain", "night"), "dtype": ("float32", "bfloat16"), "optimizer": ("muon", "adamw"),
           "on_bad": ("stop", "skip"), "select_rule": selection.RULES, "sides": ("query", "both")}
OWN = {"propose": ("sides", "rationales"), "embed": ("lm_weight", "decision_weight"), "eval": ("tau",)}     # a stage's, by another name
MAY_BE_ZERO = ("seed", "world_train", "world_test", "hold_back", "warmup", "workers", "lora", "base_text", "base_look", "base_skill", "propose_k",
               "propose_temperature", "propose_errors", "negatives", "lm_weight", "decision_weight", "rl_steps", "rl_group", "rl_price", "rl_decision",
               "rl_rationale", "rl_nce")
ANY_NUMBER = ("select_margin", "tau")


class UsageError(Exception):
    """A mistake of the caller's: printed as one line, exit code 2."""


class Interrupted(Exception):
    """SIGTERM: printed as one line, exit code 143."""


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
    if cfg.propose_errors > 1 or cfg.propose_errors and (cfg.data or cfg.rationales):
        raise UsageError(f"--propose_errors {cfg.propose_errors}: a chance, at most 1, of the pocket world's own workers: no --data, no --rationales")
    if preset != "pocket" and not (cfg.model and cfg.data):
        raise UsageError(f"--preset {preset} needs --model (a Qwen3-VL folder or hub id) and --data (an MMEB root)")
    if cfg.batch % cfg.sub_batch or cfg.rl_group % 2 or cfg.rl_group == 2 or cfg.rl_batch % RL_SUB_BATCH:
        raise UsageError("batch must be a multiple of sub_batch, rl_group 0 or an even number from 4 on (two rationales to compare), "
                         f"rl_batch a multiple of {RL_SUB_BATCH}")
    if cfg.fsdp and (cfg.optimizer == "muon" or cfg.lora or cfg.compile):
        raise UsageError("--fsdp goes with --optimizer adamw, --lora 0 and --compile false: Muon needs whole matrices, "
                         "a rank can hold what LoRA trains, and sharded layers were never compiled here")
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
        self.cfg, self.out, self.device, self.stopping, self.looping = cfg, cfg.out, join(cfg), False, False
        os.makedirs(cfg.out, exist_ok=True)
        self.before = read_json(self.path("config.json")) if os.path.exists(self.path("config.json")) else {}
        remedy = "say so too (options that belong to no stage are repeated in every call), or use another --out"
        self.same_configuration(self.path("config.json"), remedy, self.owns)
        self.data_root = cfg.data or self.path("data")
        self.stages = read_json(self.path("stages.json")) if os.path.exists(self.path("stages.json")) else {}

    def same_configuration(self, path, remedy, owns=lambda key: False):
        """Refuse what was made under other options, FREE ones aside; note ours where nothing is noted yet, or where they are the stage's own."""
        gather_objects(None)                                     # rank 0 alone writes, when all have come here and before any goes on
        mine = {k: v for k, v in dataclasses.asdict(self.cfg).items() if k not in FREE}
        theirs = {**dataclasses.asdict(Config()), **read_json(path)} if os.path.exists(path) else {}         # an option it lacks is newer than it
        other = [k for k in mine if theirs and theirs[k] != mine[k]]
        alien = [k for k in other if not owns(k)]
        gather_objects(None)
        if alien:
            raise UsageError(f"{path} was made with {alien[0]}={theirs[alien[0]]!r}, this call says {mine[alien[0]]!r}; {remedy}")
        if (other or not theirs) and rank() == 0:
            write_json(path, dataclasses.asdict(self.cfg))

    def partial(self, name):
        """The folder of what is left of an unfinished stage; emptied unless --resume auto goes on with it."""
        folder = self.path("partial", name)
        if rank() == 0:
            if self.cfg.resume != "auto":
                shutil.rmtree(folder, ignore_errors=True)
            os.makedirs(folder, exist_ok=True)
        self.same_configuration(os.path.join(folder, "config.json"), "without --resume the stage starts again")
        return folder

    def owns(self, key):
        """May this call change the option in a folder that exists? Yes if it runs one stage again and the option is that stage's own."""
        return self.cfg.stage != "all" and key.startswith((self.cfg.stage + "_", *OWN.get(self.cfg.stage, ())))

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
        if rank() == 0:
            with open(self.path("metrics.jsonl"), "a", encoding="utf-8") as f:
                f.write(json.dumps({"stage": stage, "step": step, **metrics}, ensure_ascii=False) + "\n")
            numbers = " ".join(f"{k} {v:.3g}" for k, v in metrics.items() if isinstance(v, (int, float)))
            self.say(f"{stage} {step}/{steps} {numbers}")

    def say(self, text):
        if rank() == 0:
            tqdm.write(text)

    def forget(self, stage, step=0):
        """Take a stage's rows after this step out of metrics.jsonl: they will be written again. And half a line, which a kill may leave."""
        path = self.path("metrics.jsonl")
        if rank() == 0 and os.path.exists(path):
            with open(path, encoding="utf-8") as f:
                rows = [json.loads(line) for line in f if line.endswith("\n")]
            selection.write_rows(path, [r for r in rows if r["step"] <= step or r["stage"] not in (stage, f"{stage} skills")])

    def begin(self, stage):
        """From now on the stage and what follows from it count as not done: what an interrupted repetition leaves must not pass for its result.
        -> the stages as they were, for undo()."""
        before = dict(self.stages)
        for later in STAGES[STAGES.index(stage) :]:
            self.stages.pop(later, None)
        if rank() == 0 and before != self.stages:
            write_json(self.path("stages.json"), self.stages)
        return before

    def undo(self, before):
        """The repetition failed: what was done stays done, under the options that it was done with (its rows of metrics.jsonl aside, once
        steps were made)."""
        if rank() == 0 and before != self.stages:
            write_json(self.path("config.json"), self.before)
            write_json(self.path("stages.json"), before)
        self.stages = before

    def finish(self, stage, folder, seconds):
        """Put a finished stage's folder in its place and note it."""
        gather_objects(None)                                     # when all ranks are done
        if rank() == 0:
            final = self.path(stage)
            flush(*glob.glob(os.path.join(folder, "**"), recursive=True))
            if os.path.isdir(final) and not os.path.islink(final):
                shutil.rmtree(final)
            elif os.path.lexists(final):
                os.unlink(final)
            os.replace(folder, final)
            write_json(self.path("stages.json"), {**self.stages, stage: {"seconds": round(seconds, 1)}})
            for left in (x for name in STAGES[STAGES.index(stage) :] for x in glob.glob(self.path("partial", f"{name}*"))):
                shutil.rmtree(left)
        gather_objects(None)
        self.stages[stage] = {"seconds": round(seconds, 1)}

    def terminate(self, *_):
        """SIGTERM: inside a training loop at the next step boundary, elsewhere at once."""
        self.stopping = True
        if not self.looping:
            raise Interrupted("stopped by SIGTERM; --resume auto goes on")

    def embedder(self, stage):
        """The checkpoint that a stage left, as an Embedder on the device."""
        c = self.cfg
        if stage not in self.stages:
            raise UsageError(f"stage {stage} has not finished in {self.out}; run --stage {stage} (or all) first")
        return Embedder.from_pretrained(self.path(stage), self.device, c.dtype, c.max_pixels, c.min_pixels, c.max_frames)

    def trainee(self, stage):
        """The same, ready to be trained: LoRA, what is frozen, fp32 masters, checkpointing, length buckets, compiled layers, shards."""
        c, e = self.cfg, self.embedder(stage)
        dtype, e.reader.pad_to = getattr(torch, c.dtype), c.pad_to
        torch.manual_seed(int(self.rng("lora").integers(2**31)))
        for_training(e.model, dtype, c.lora, c.lora_alpha, c.train_vision, c.checkpointing, c.compile)
        if c.fsdp:
            shard(e.model, dtype)
        return e

    def plain(self, model, into=None):
        """What was trained as an ordinary model of --dtype: to judge with, to write rollouts with, to save."""
        c = self.cfg
        return merge_lora(model, getattr(torch, c.dtype), into) if c.lora or c.fsdp or c.compile or c.dtype != "float32" else model.eval()

    def save(self, e, out, card):
        """The checkpoint that a stage leaves: plain, in the Hugging Face layout, written once."""
        if rank() == 0:
            need_space(out, sum(p.nbytes for p in e.model.parameters()))
            e.save(out, base=self.cfg.model or None, card=card)


def join(c):
    """Under torchrun, meet the other ranks. -> this rank's device; UsageError where the machine or the ranks do not fit."""
    n, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    device = c.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not hasattr(torch.optim, "Muon"):
        raise UsageError(f"torch {torch.__version__} is too old: 2.9 or newer is needed")
    for key in ("batch", "rl_batch"):
        if getattr(c, key) % n:
            raise UsageError(f"--{key} {getattr(c, key)} is not a multiple of the {n} ranks")
    if c.fsdp and n == 1:
        raise UsageError("--fsdp true shards over the ranks of torchrun --nproc_per_node=N; there is one")
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise UsageError(f"--device {device}: torch {torch.__version__} sees no CUDA GPU here; --device cpu runs without")
        if local >= torch.cuda.device_count():
            raise UsageError(f"rank {local} of this node has no GPU: there are {torch.cuda.device_count()}; lower --nproc_per_node")
        torch.cuda.set_device(local) if n > 1 else None
    if n > 1 and not dist.is_initialized():                      # ranks wait for each other as long as a stage of one of them may take
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=datetime.timedelta(days=30))
    return f"cuda:{local}" if n > 1 and device.startswith("cuda") else device


def flush(*paths):
    """On the disk, not only on its way there: before a name says that a file is whole."""
    for path in filter(os.path.isfile, paths):
        with open(path, "rb+") as f:
            os.fsync(f.fileno())


def need_space(folder, size):
    """Said before anything is written: what is there stays untouched."""
    free = shutil.disk_usage(folder).free
    if free < size * 1.02 + 2**20:
        raise OSError(f"{folder}: a checkpoint of {size / 1e9:.2f} GB does not fit, {free / 1e9:.2f} GB are free; the one before is untouched")


class Optimizer:
    """Muon for the matrices and AdamW for the rest, or AdamW alone; warm-up, flat, linear cool-down over the last 40 % (or `cool`).

    Muon takes the learning jumps of the pocket world sooner than AdamW: already the mergers' first layers by AdamW delay them (V1 in
    results/tuning.txt).
    patches: Muon for the patch embedding as well, a matrix kept as a convolution's kernel. From nothing, pictures are then read sooner (V2 against
    V0 there, after 338 steps); later, on a few thousand pictures, it only disturbs.
    """

    def __init__(self, model, cfg, steps, scale=1.0, cool=0.4, patches=False):
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        is_matrix = lambda n, p: p.ndim == 2 and "embed" not in n and "lm_head" not in n or patches and "patch_embed.proj.weight" in n
        matrix = [p for n, p in named if cfg.optimizer == "muon" and is_matrix(n, p)]
        inside = set(map(id, matrix))
        rest = [[p for _, p in named if id(p) not in inside and is_sharded(p) == sharded] for sharded in (False, True)]      # which do not mix
        self.parts = [torch.optim.AdamW(ps, lr=cfg.lr * scale, betas=(0.9, 0.98), weight_decay=0.0, fused=ps[0].is_cuda) for ps in rest if ps]
        self.flat = {p: torch.nn.Parameter(p.detach().view(len(p), -1)) for p in matrix if p.ndim > 2}     # the same memory as a matrix
        if matrix:
            flat = [self.flat.get(p, p) for p in matrix]
            self.parts.append(torch.optim.Muon(flat, lr=cfg.lr_matrix * scale, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
        self.peak = [g["lr"] for o in self.parts for g in o.param_groups]
        self.params, self.clip = [p for _, p in named], cfg.clip
        self.warmup, self.steps, self.cool = min(cfg.warmup, steps // 4), steps, cool * steps

    def step(self, i):
        """Update number i (from 0); -> gradient norm before clipping."""
        add_gradients(self.params)
        norm = clip_gradients(self.params, self.clip)
        if not math.isfinite(norm):
            return float(norm)                                   # nothing moves; train_loop stops
        rate = min(1.0, (i + 1) / max(1, self.warmup)) * max(0.02, min(1.0, (self.steps - i) / max(1, self.cool)))
        for g, lr in zip((g for o in self.parts for g in o.param_groups), self.peak):
            g["lr"] = lr * rate
        for p, flat in self.flat.items():
            flat.grad, p.grad = None if p.grad is None else p.grad.view_as(flat), None
        for o in self.parts:
            o.step()
            o.zero_grad(set_to_none=True)
        return float(norm)

    def state_dict(self):
        return [o.state_dict() for o in self.parts]

    def load_state_dict(self, states):
        for o, s in zip(self.parts, states):
            params = [p for g in o.param_groups for p in g["params"]]
            s["state"] = {i: {k: like(v, params[i]) for k, v in x.items()} for i, x in s["state"].items()}
            o.load_state_dict(s)


def store(run, stage, i, steps, model, optimizer, sampler):
    """A checkpoint inside a stage: what is trained, the optimizer, the place in the data. Random numbers depend on the step alone (Run.rng).
    Written aside and renamed; the last `keep` stay."""
    weights, moments = whole([{n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, optimizer.state_dict()])
    value = dict(model=weights, optimizer=moments, step=i, steps=steps, sampler=json.dumps(sampler.state()) if sampler is not None else "")
    if rank() == 0:
        folder = run.path("partial", stage)
        path = os.path.join(folder, f"{i:08d}.state.pt")
        need_space(folder, sum(x.nbytes for x in [*weights.values(), *(x for o in moments for s in o["state"].values() for x in s.values())]))
        try:
            torch.save(value, path + ".part")
        except RuntimeError as e:                                # torch's word for a full disk
            raise OSError(f"{path}: not written ({e})") from None
        flush(path + ".part")
        os.replace(path + ".part", path)
        for old in sorted(glob.glob(os.path.join(folder, "*.state.pt")))[: -run.cfg.keep]:
            os.unlink(old)


def restore(path, model, optimizer, sampler):
    """-> step, steps of the checkpoint."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise ValueError(f"{path}: damaged ({type(e).__name__}); without it the one before is used, "
                         "without --resume the stage starts again") from None
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(like(saved["model"][n], p))
    optimizer.load_state_dict(saved["optimizer"])
    if sampler is not None:
        sampler.load(json.loads(saved["sampler"]))
    return saved["step"], saved["steps"]


def train_loop(run, stage, model, optimizer, steps, one_step, sampler=None, until=None):
    """The loop of every trained stage. one_step(i) leaves gradients and returns metrics ("loss" and "ids" among them).

    A non-finite loss stops the run with the step and the batch's ids. `until(i, steps)` may prolong the flat part: it returns the number of
    steps, the same or more.
    """
    start, t0, found = 0, time.time(), sorted(glob.glob(os.path.join(run.partial(stage), "*.state.pt")))
    if found:
        start, steps = restore(found[-1], model, optimizer, sampler)
        optimizer.steps = steps
    run.forget(stage, start)
    bar = tqdm(total=steps, initial=start, desc=stage, disable=None if rank() == 0 else True)
    i, run.looping = start, True
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
        stop = any(gather_objects(run.stopping))
        if stop or i % run.cfg.save_every == 0 and i < steps:
            store(run, stage, i, steps, model, optimizer, sampler)
        if stop:
            raise Interrupted(f"stopped by SIGTERM after step {i} of {steps} of stage {stage}; --resume auto goes on from there")
    bar.close()
    run.looping = False
    model.eval()
    release()


def release():
    """Give the memory of freed activations back to the system: glibc keeps it as holes in its heap, where what comes next rarely fits."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)       # Linux has it
    if trim:
        trim(0)


def fit(run, name, e, pairs, one_step, batch, sub_batch, steps, rate):
    """Train the Embedder on the pairs for so many steps at `rate` times the learning rates; it ends as a plain one. one_step(i, pairs)."""
    sampler, steps = pairs.sampler(int(run.rng(name).integers(2**31)), batch, sub_batch), run.steps(steps)
    stream = pairs.stream(sampler)
    visit = lambda i: [any_negative(p, run.rng(name, "negatives", i, p["id"])) for p in next(stream)]
    train_loop(run, name, e.model, Optimizer(e.model, run.cfg, steps, rate), steps, lambda i: one_step(i, visit(i)), sampler)
    e.model = run.plain(e.model)
    if run.cfg.dtype != "float32":
        gc.collect()                                             # of the trained one, which refers to itself (for_training's autocast)


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1, base: pretrain a tiny Qwen3-VL on "describe what you see", or link a real one


def base_stage(run, out):
    c = run.cfg
    if c.model:
        if rank() == 0:
            source = Embedder.from_pretrained(c.model, "cpu", "bfloat16")  # opens it whole: a broken checkpoint is refused here, not in an hour
            if not source.model.has_head:
                raise UsageError(f"{c.model} has no lm_head: it can neither decide nor write rationales; start from an Instruct checkpoint")
            source.save(out, base=c.model)
        return
    model, reader = pocket_model(run)
    bank = pocket.Bank(run.rng("bank"), style=c.world_style)
    first, most = run.steps(c.base_steps), run.steps(c.base_steps_max)
    optimizer = Optimizer(model, c, first, cool=0.25, patches=True)
    look = lambda i: 1.0 if i < run.steps(c.base_look) else 0.4    # first learn to see, then to look things up

    def one_step(i):
        model.train()
        rng = run.rng("base", i)
        docs = [pocket.base_document(bank, rng, look(i)) for _ in range(c.base_batch)] + [pocket.text_document(rng) for _ in range(c.base_batch // 2)]
        return documents_step(model, reader, [read_document(reader, *d) for d in docs], c.base_batch, c)

    probe = pocket.Bank(run.rng("probe bank"), style=c.world_style)        # other drawings than those it learns from

    def until(i, steps):
        """At the end of the flat part: are the skills there? If not, stay flat for another tenth."""
        if i != steps - round(optimizer.cool) or steps >= most:
            return steps
        skills = measure_skills(run, model, reader, probe)
        run.log("base skills", i, steps, skills)
        if min(v for k, v in skills.items() if k in STEP_SKILLS) >= c.base_skill - 0.05:
            return steps
        longer = min(most, steps + first // 10)
        if steps == first:                                       # said once; the log's "of so many steps" moves from here on
            run.say(f"base: skills not there yet, prolonged to {longer} steps, and by as much again (to {most} at most) until they are")
        return longer

    train_loop(run, "base", model, optimizer, first, one_step, until=until)
    skills = measure_skills(run, model, reader, probe)
    run.log("base skills", optimizer.steps, optimizer.steps, skills)
    weak = {k: round(skills[k], 3) for k in STEP_SKILLS if skills[k] < c.base_skill}
    if weak:
        run.say(f"base: these skills are below {c.base_skill} after {optimizer.steps} steps: {weak}; expect weaker rationales")
    run.save(Embedder(model, reader), out, "Pretrained on the pocket world's documents (stage base).")
    if rank() == 0:
        write_json(os.path.join(out, "skills.json"), skills)


def pocket_model(run):
    """A pocket-sized Qwen3-VL of random weights, and the Reader of its items."""
    c = run.cfg
    torch.manual_seed(int(run.rng("weights").integers(2**31)))
    tok = Tokenizer(pocket.pocket_tokenizer(pocket.vocabulary_texts()))
    special = tok.special
    config = dataclasses.replace(CONFIGS["pocket"], vocab=tok.size, image_token=special["<|image_pad|>"], video_token=special["<|video_pad|>"],
                                 vision_start=special["<|vision_start|>"], vision_end=special["<|vision_end|>"])
    return Qwen3VL(config).init_weights().to(run.device), Reader(tok, config, c.min_pixels, c.max_pixels, c.max_frames)


# What the steps are made of; and "answer", one look-up without steps, which the evaluators of select would else take for reasoning's merit.
# Whatever else is measured is learnt on the way.
STEP_SKILLS = ("at", "move", "clip", "table", "account", "answer")


def read_document(reader, item, parts):
    """A document (item, [(text, learn)]) -> {"prompt", "branch" ids, "learn" bool per id, "ends" places in the branch of its <|endoftext|>s
    (-1: the direct one), "words" that these sum up}. A document is a branch of its prompt, beside the direct <|endoftext|>; it ends in <|im_end|>."""
    pieces = [(piece(reader, text), yes) for text, yes in parts] + [([reader.stop], True)]
    branch, words = sum((ids for ids, _ in pieces), []), []
    if "answer" in item:
        words = sorted(set(reader.tok.encode(item["answer"])) | set(reader.tok.encode(" " + item["answer"])[:1]))
    show = {"image": Image.fromarray, "video": lambda frames: [Image.fromarray(f) for f in frames], "text": str}
    prompt = reader.read({"text": "describe", **{k: show[k](v) for k, v in item.items() if k in show}})
    return dict(prompt=prompt, branch=branch, learn=[yes for ids, yes in pieces for _ in ids], words=words,
                ends=[-1, *(i for i, t in enumerate(branch) if t == reader.end)] if words else [])


def piece(reader, text):
    """A fragment's ids; the think markers are the special tokens."""
    return [reader.tok.special[text]] if text in ("<think>", "</think>", "<|endoftext|>") else reader.tok.encode(text)


def documents_step(model, reader, docs, pictures, cfg):
    """Gradients of one step on documents of `read_document` -> metrics. The first `pictures` are about something seen, the others text alone:
    two kinds, whose losses are each a mean over its own tokens (and over its own summaries). It is tiny: every rank does the same.
    cfg: base_text, base_summary, chunk_tokens."""
    kind = torch.tensor([int(i >= pictures) for i in range(len(docs))])
    count = lambda x: torch.zeros(2, dtype=x.dtype).index_add(0, kind, x)                     # sums over each kind
    tokens = count(torch.tensor([sum(d["learn"]) for d in docs]))
    summaries = count(torch.tensor([len(d["ends"]) for d in docs])).clamp(min=1)
    share, share_summary = (torch.tensor([1.0, cfg.base_text]) / tokens)[kind], (cfg.base_summary / summaries)[kind]
    found = torch.zeros(3, len(docs))                            # sums over each document: loss, summary loss, right tokens
    for rows in chunks_of([len(d["prompt"]["ids"]) + 1 + len(d["branch"]) for d in docs], cfg.chunk_tokens):
        got = document_losses(model, reader, [docs[r] for r in rows])
        loss = (got[0] * share[rows].to(got.device)).sum() + (got[1] * share_summary[rows].to(got.device)).sum()
        (loss / ranks()).backward()                              # ranks' gradients are added up
        found[:, rows] = got.detach().cpu()
    (loss, text_loss), (summary, text_summary), (right, text_right) = ((count(x) / n).tolist() for x, n in zip(found, (tokens, summaries, tokens)))
    return dict(loss=loss + cfg.base_text * text_loss + cfg.base_summary * (summary + text_summary), summary=summary, text_summary=text_summary,
                accuracy=right, text_accuracy=text_right)


def document_losses(model, reader, docs):
    """Documents of `read_document` [n] -> (3, n): sums over each document's tokens of the next-token loss, over its <|endoftext|>s of the
    summary loss, and the number of tokens that were right.

    The summary loss asks the state at <|endoftext|> for all words of the answer at once (multi-token prediction in one place): a base
    model's last token would else know only how the answer begins, and contrastive learning, which pools that token, would have to teach
    it the rest."""
    batch = collate([d["prompt"] for d in docs], reader, [[d["branch"]] for d in docs], model.device)
    h, first = model(batch), [len(d["prompt"]["ids"]) + 1 for d in docs]                      # where each branch begins
    tensor, n = lambda x: torch.tensor(x, device=model.device), len(docs)
    row, col = tensor([(b, first[b] + i) for b, d in enumerate(docs) for i, yes in enumerate(d["learn"]) if yes]).T
    logits, want = model.logits(h[row, batch["prev"][row, col]]), batch["ids"][row, col]
    per_doc = lambda row, x: h.new_zeros(n).index_add(0, row, x.to(h.dtype))
    out = [per_doc(row, F.cross_entropy(logits, want, reduction="none")), h.new_zeros(n), per_doc(row, logits.argmax(-1) == want)]
    sums = [(b, first[b] + at) for b, d in enumerate(docs) for at in d["ends"]]
    if sums:
        row, col = tensor(sums).T
        said = torch.zeros(len(sums), reader.c.vocab, device=model.device)                    # each of an answer's k words counts 1/k
        for i, (b, _) in enumerate(sums):
            said[i, docs[b]["words"]] = 1 / len(docs[b]["words"])
        out[1] = per_doc(row, -(model.logits(h[row, col]).log_softmax(-1) * said).sum(-1))
    return torch.stack(out)


@torch.no_grad()
def measure_skills(run, model, reader, bank, n=48):
    """Held-out token accuracy of each skill that the steps are made of: {"describe", "at", "move", "answer", "clip", ...}."""
    model.eval()
    rng, seen = run.rng("skills"), {}
    docs = [pocket.base_document(bank, rng, look) for look in (1.0, 0.0) for _ in range(n)] + [pocket.text_document(rng) for _ in range(n)]
    for at in range(0, len(docs), 32):
        read = [read_document(reader, *d) for d in docs[at : at + 32]]
        batch = collate([d["prompt"] for d in read], reader, [[d["branch"]] for d in read], model.device)
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


KEPT = 2**30                                                     # bytes of pairs up to which a world is read once and kept
WINDOW = 1024                                                    # pairs of a large world that are in memory together where it is read from end to end


class Pairs:
    """Training pairs as prompts. A small world (up to 1 GB) is read once and kept; a large one is streamed by worker processes.

    The last `hold_back` of every dataset belongs to rl, the rest to propose, select and embed: on pairs that embed has learnt by heart, the direct
    embedding looks as if thinking did not pay, and rl would unlearn it (results/tuning.txt).
    """

    def __init__(self, run, reader, held=False):
        c = run.cfg
        self.data, self.reader, self.workers = loader.train_sets(run.data_root, on_bad=c.on_bad), reader, c.workers
        kept_back = [max(1, round(n * c.hold_back)) if c.hold_back and n > 1 else 0 for n in self.data.sizes]
        self.spans = [(n - k, n) if held and k else (0, n if held else n - k) for n, k in zip(self.data.sizes, kept_back)]
        self.left_out = set(filter(None, c.leave_out.split(",")))
        if unknown := sorted(self.left_out - set(self.data.names)):
            raise UsageError(f"--leave_out {unknown[0]}: no such dataset; there are {', '.join(self.data.names)}")
        if self.data.missing:
            run.say(f"training data: missing {', '.join(self.data.missing)}")
        if dropped := {name: n for name, n in self.data.dropped.items() if n}:
            run.say(f"training data: rows dropped because a side is empty: {dropped}")
        self.kept = None
        if sum((b - a) * self.weight(s, a) for s, (a, b) in enumerate(self.spans) if b > a) <= KEPT:        # as heavy as its first row, each dataset
            # now, in one piece of memory, and not in the gaps between training steps
            refs = tqdm(self.refs(), desc="reading pairs", disable=None if rank() == 0 else True, leave=False)
            self.kept = {ref: self.data.fetch(*ref, read=self.read) for ref in refs}

    def weight(self, source, row):
        """Bytes of a pair's pictures, and a thousand for its text."""
        p = self.data.fetch(source, row, read=self.read)
        return 1000 + sum(x.nbytes for side in (p["query"], p["target"], *p["negatives"]) for x in side["pixels"])

    def read(self, pair):
        """-> {"id", "dataset", "query", "target", "negatives"} as prompts, and "answer": a key that equal targets share."""
        target = self.reader.read(pair["target"])
        return dict(id=pair["id"], dataset=pair["dataset"], query=self.reader.read(pair["query"]), target=target, answer=key_of(target),
                    negatives=[self.reader.read(n) for n in pair["negatives"]])

    def get(self, refs):
        """The pairs at these (source, row), kept or read by the workers."""
        if self.kept is not None:
            return [self.kept[ref] for ref in refs]
        lists = [refs[at : at + loader.CHUNK] for at in range(0, len(refs), loader.CHUNK)]
        return [p for pairs in self.data.stream(lists, self.workers, 3 * self.workers, read=self.read) for p in pairs]

    def sampler(self, seed, batch, sub_batch):
        """This rank's share of batches of (source, row)."""
        weights = [0.0 if n in self.left_out else w for n, w in zip(self.data.names, self.data.weights)]
        return loader.Sampler([b - a for a, b in self.spans], weights, batch, sub_batch, seed, rank(), ranks(), [a for a, _ in self.spans])

    def refs(self):
        """(source, row) of every pair of these stages."""
        return [(s, row) for s, (a, b) in enumerate(self.spans) if self.data.names[s] not in self.left_out for row in range(a, b)]

    def stream(self, sampler):
        """Batch after batch of pairs; it never ends."""
        if self.kept is not None:
            yield from map(self.get, sampler)
        else:
            yield from loader.batches(self.data, sampler, self.workers, read=self.read)          # while the model computes

    def id(self, ref):
        return self.data.sources[ref[0]].id(ref[1])

    def windows(self, ids):
        """The pairs whose id is in ids, in order, as lists: a kept world in one, another WINDOW by WINDOW. A broken row is left out, not replaced."""
        refs = [r for r in self.refs() if self.id(r) in ids]
        step = max(1, len(refs)) if self.kept is not None else WINDOW
        for at in range(0, len(refs), step):
            part = refs[at : at + step]
            yield [p for r, p in zip(part, self.get(part)) if p["id"] == self.id(r)]


def any_negative(pair, rng):
    """The pair with its hard negatives in another order: every visit uses the first ones (Config.negatives)."""
    n = pair["negatives"]
    return dict(pair, negatives=[n[i] for i in rng.permutation(len(n))])


# ---------------------------------------------------------------------------------------------------------------------
# Stage 2, propose: K candidate rationales per query. No worker sees the target


def propose_stage(run, out):
    c = run.cfg
    e = run.embedder("base")
    pairs, folder = Pairs(run, e.reader), run.partial("propose")
    source = c.rationales or (run.path("data", "workers.jsonl") if not c.data else "")
    given = selection.read_rationales(source) if source else []
    if c.propose_errors:
        given = pocket.misread(given, c.propose_errors, c.seed, c.propose_k)
    known = set(map(pairs.id, pairs.refs()))
    rows = [r for r in given if r["id"] in known]
    if len(rows) < len(given):
        run.say(f"propose: {len(given) - len(rows)} of {len(given)} rationales in {source} are of pairs that are held back for rl, or of none")
    refs = pairs.refs() if c.propose_k else []
    windows = [(side, at) for side in (("query", "target") if c.sides == "both" else ("query",)) for at in range(0, len(refs), WINDOW)]
    parts = [os.path.join(folder, f"{side}_{at:09d}.jsonl") for side, at in windows]
    for n, ((side, at), path) in enumerate(zip(windows, tqdm(parts, desc="propose", disable=None))):
        if n % ranks() == rank() and not os.path.exists(path):   # each rank its windows; a finished one is not done again
            selection.write_rows(path, propose(run, e, pairs.get(refs[at : at + WINDOW]), n, side))
    gather_objects(None)
    rows += [r for path in parts for r in selection.read_rationales(path)]
    if not rows:
        raise UsageError("no rationale was proposed: --propose_k is 0 and no --rationales file was given")
    if rank() == 0:
        selection.write_rows(os.path.join(out, "rationales.jsonl"), rows)


def propose(run, e, pairs, n, side):
    """The base model's rationales for one side of one window of pairs, neighbours in length together."""
    c, rows, rng = run.cfg, [], run.generator("propose", n)
    pairs = sorted(pairs, key=lambda p: len(p[side]["ids"]))
    size = max(1, min(64, 4 * c.chunk_tokens // len(pairs[-1][side]["ids"])))             # so many caches are in memory together
    for part in (pairs[at : at + size] for at in range(0, len(pairs), size)):
        batch = collate([p[side] for p in part], e.reader, device=run.device)
        got = generate(e.model, batch, c.propose_max_new, c.propose_k, **e.reader.how, temperature=c.propose_temperature, generator=rng)
        for p, tokens in zip(part, got["tokens"]):
            for k, text in enumerate(map(e.reader.rationale_text, tokens)):
                if text:
                    rows.append(dict(id=p["id"], side=side, worker="base" if c.propose_k == 1 else f"base-{k}", text=text))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Stage 3, select: two cross-fitted evaluators, one counterfactual per rationale


def select_stage(run, out):
    """judged.jsonl: what the evaluators say of every rationale, whatever the rule; selected.jsonl: what the rule keeps."""
    c, texts = run.cfg, {}
    for r in selection.read_rationales(run.path("propose", "rationales.jsonl")):
        if r["side"] == "query":
            texts.setdefault(r["id"], {})[r["worker"]] = r["text"]
    judged = judged_before(c, texts) if c.select_judged else judge_all(run, texts)
    results = selection.seen_by(c.select_rule, judged)
    level = selection.thresholds(results, c.select_rule, c.select_margin, c.select_fdr)
    kept = selection.choose(results, level, c.select_rule, c.select_weight_temperature)
    truth = read_json(run.path("data", "pocket.json"))["steps"] if not c.data else None
    report = selection.audit(results, kept, level, c.select_rule, truth)
    run.forget("select")
    run.log("select", 1, 1, {k: v for k, v in report.items() if not isinstance(v, dict)})
    if rank() > 0:
        return
    fields = ("id", "worker", "text", "delta", "delta_placebo", "weight")
    selection.write_rows(os.path.join(out, "selected.jsonl"), [{k: r[k] for k in fields} for r in kept])
    selection.write_rows(os.path.join(out, "judged.jsonl"), judged)
    write_json(os.path.join(out, "audit.json"), report)


SHAPES_THE_JUDGE = ("model", "data", "seed", "scale", "dtype", "leave_out", "hold_back", "min_pixels", "max_pixels", "max_frames", "optimizer",
                    "lr_matrix", "lr", "clip", "warmup", "train_vision", "lora", "lora_alpha", "batch", "sub_batch", "negatives", "temperature",
                    "select_steps", "select_lr", "select_candidates", "select_folds")


def judged_before(c, texts):
    """The judgements of another run, made under the same options of the same texts {id: {worker: text}}: another rule costs seconds."""
    theirs = {**dataclasses.asdict(Config()), **read_json(os.path.join(c.select_judged, "config.json"))}
    for k, mine in dataclasses.asdict(c).items():
        if (k in SHAPES_THE_JUDGE or k.startswith(("base_", "world_"))) and theirs[k] != mine:
            raise UsageError(f"--select_judged {c.select_judged}: it was judged with {k}={theirs[k]!r}, this run says {mine!r}")
    with open(os.path.join(c.select_judged, "select", "judged.jsonl"), encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    if sorted((r["id"], r["worker"], r["text"]) for r in rows) != sorted((i, w, t) for i, ws in texts.items() for w, t in ws.items()):
        raise UsageError(f"--select_judged {c.select_judged}: other rationales were proposed there")
    return rows


def judge_all(run, texts):
    """Every proposed rationale of a query {id: {worker: text}}, judged by the evaluator that never trained on its pair -> rows of judged.jsonl."""
    c, results, pairs = run.cfg, [], None
    for fold in range(c.select_folds):
        judgement = os.path.join(run.partial(f"select{fold}"), "judged.json")
        if os.path.exists(judgement):                            # --resume auto, and this fold was through
            results += read_json(judgement)
            continue
        e = run.trainee("base")
        pairs = pairs or Pairs(run, e.reader)                    # read once: both folds see the same prompts
        # this evaluator judges its own fold's pairs and learns from the others
        mine = lambda pair_id: hashlib.blake2b(pair_id.encode(), digest_size=4).digest()[0] % c.select_folds == fold
        train_on = lambda p: c.select_folds == 1 or not mine(p["id"])
        branch = {i: {w: e.reader.rationale(t) for w, t in ws.items()} for i, ws in texts.items()}
        warm_up(run, e, pairs, branch, train_on, f"select{fold}")
        rows = judge(run, e, pairs, {i: texts[i] for i in texts if mine(i)}, fold)
        results += rows
        if rank() == 0:
            write_json(judgement, rows)
    return results


def warm_up(run, e, pairs, branch, train_on, name):
    """Train an evaluator on both paths with any candidate rationale of its own fold, good or bad, each counted by its posterior: otherwise
    the sloppy half of what looks like reasoning teaches it to believe no rationale more than half."""
    c = run.cfg
    cfg = dataclasses.replace(c, lm_weight=0.0, decision_weight=0.0)

    def one_step(i, batch):
        batch, drawn = [p for p in batch if train_on(p)], []
        if not batch:
            raise ValueError(f"stage select, step {i}: all pairs of this batch are in the other fold; --batch {c.batch} is too small")
        for p in batch:
            options = list(branch.get(p["id"], {}).values())
            drawn.append(options[run.rng(name, i, p["id"]).integers(len(options))] if options else None)
        return contrastive_step(e.model, e.reader, batch, drawn, [-1] * len(batch), cfg, latent=True)

    both = 2 if c.select_folds > 1 else 1                        # half of every batch is the other fold's and drops out: draw twice as much
    fit(run, name, e, pairs, one_step, both * c.batch, both * c.sub_batch, c.select_steps, c.select_lr)


def judge(run, e, pairs, texts, fold):
    """Δ, Δ_placebo and Δ_guess of every rationale {id: {worker: text}} -> rows; a quarter of the pairs with a second placebo, for the audit.

    Twice over the pairs: first the targets, then the queries. A large world is read in windows, so its pictures are never in memory together.
    """
    c, rng = run.cfg, run.rng("judge", fold)
    table, index, vectors = [], {}, [torch.zeros(0, e.model.c.hidden, device=run.device)]
    for window in pairs.windows(texts):
        new = []
        for p in window:
            keys = [p["answer"], *map(key_of, p["negatives"])]
            for key, t in zip(keys, [p["target"], *p["negatives"]]):
                if key not in index:
                    index[key] = len(index)
                    new.append(t)
            target, *negatives = (index[key] for key in keys)
            table.append(dict(id=p["id"], dataset=p["dataset"], answer=p["answer"], target=target, negatives=negatives))
        vectors.append(encode_shared(run, e, new))
    vectors, candidates = torch.cat(vectors), selection.candidate_sets(table, rng, c.select_candidates)
    mine = {p["id"]: texts[p["id"]] for p in table}
    placebo, second = selection.choose_placebos(table, mine, rng), selection.choose_placebos(table, mine, rng)
    second = {i: again if rng.random() < 0.25 else dict.fromkeys(again) for i, again in second.items()}
    words = {"own": mine, "placebo": placebo, "second": second}
    plan = [[(w, kind) for kind, said in words.items() for w in mine[p["id"]] if said[p["id"]][w] is not None] for p in table]       # of every branch
    branches = [[e.reader.rationale(words[kind][p["id"]][w]) for w, kind in plan_p] for p, plan_p in zip(table, plan)]
    told, n = [], 0                                              # per pair (2, 1 + branches)
    for window in pairs.windows(texts):
        share = slice(n + rank(), n + len(window), ranks())      # this rank's
        queries, title = [p["query"] for p in window[rank() :: ranks()]], f"judge fold {fold}, pairs {n} to {n + len(window)} of {len(table)}"
        m = selection.margins(e.model, e.reader, queries, branches[share], vectors, candidates[share], c.temperature, title=title)
        m, n = gather_objects(m), n + len(window)
        told += [m[i % ranks()][i // ranks()] for i in range(len(window))]
    return [row for judged in zip(table, plan, (candidates >= 0).sum(1), told) for row in judgements(*judged, mine, placebo, second)]


def encode_shared(run, e, prompts):
    """Direct unit vectors (n, H) of prompts; each rank encodes its share."""
    vectors = torch.zeros(len(prompts), e.model.c.hidden, device=run.device)
    with torch.no_grad():
        for rows in chunks_of([len(t["ids"]) + 1 for t in prompts], run.cfg.chunk_tokens)[rank() :: ranks()]:
            vectors[rows] = direct_vectors(e.model, e.reader, [prompts[i] for i in rows])
    if ranks() > 1:
        dist.all_reduce(vectors)                                 # each rank has filled in its rows
    return vectors


def judgements(p, plan, size, told, texts, placebo, second):
    """What was measured of one pair with `size` candidates (told: see selection.margins) -> its rows of judged.jsonl, one per worker."""
    m, rows = told[0], []
    gains = [{slot: float(x - row[0]) for slot, x in zip(plan, row[1:])} for row in told]
    for w, text in texts[p["id"]].items():
        own, alone = ([gain.get((w, kind)) for kind in ("own", "placebo", "second")] for gain in gains)
        if own[1] is None or second[p["id"]][w] == placebo[p["id"]][w]:
            own[2] = alone[2] = None
        rows.append(dict(id=p["id"], worker=w, text=text, delta=own[0], delta_placebo=own[1], delta_second=own[2], positive=alone,
                         delta_guess=float(-np.log(size) - m[0]), direct=float(m[0])))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Stage 4, embed: one model, both paths, one space


def embed_stage(run, out):
    c = run.cfg
    e = run.trainee("base")
    pairs = Pairs(run, e.reader)
    kept, rest, judged, offline = branches_to_learn(run, e.reader)

    def one_step(i, batch):
        branches, labels, backwards = [], [], c.sides == "both" and i % 2
        if backwards:                                            # every other step targets reason: pairs turned round, each target once
            batch = list({p["answer"]: turned(p) for p in batch}.values())
        for p in batch:                                          # one rationale per visit, a query's drawn from the posterior
            rng, options = run.rng("embed", i, p["id"]), kept.get(p["id"])
            if backwards:
                said = offline.get(p["id"], [None])
                branches.append(said[rng.integers(len(said))]), labels.append(-1)
            elif options:
                branches.append(options[rng.choice(len(options), p=[w for _, w in options])][0]), labels.append(1)
            else:
                branches.append(rest.get(p["id"])), labels.append(0 if p["id"] in judged else -1)
        return contrastive_step(e.model, e.reader, batch, branches, labels, c)

    fit(run, "embed", e, pairs, one_step, c.batch, c.sub_batch, c.embed_steps, c.embed_lr)
    run.save(e, out, "Joint training of the direct and the reasoned path on selected rationales (stage embed).")


def turned(pair):
    """A pair whose target looks for its query."""
    return dict(pair, query=pair["target"], target=pair["query"], answer=key_of(pair["query"]), negatives=[])


def branches_to_learn(run, reader):
    """-> kept {id: [(branch, probability)]}, the selected rationales of queries; rest {id: branch} for those without (--embed_rest); judged, the
    ids of queries whose decision is learnt; offline {id: [branch]}, what targets may say: nothing judges it, so it only serves --sides both."""
    c, kept, offline = run.cfg, {}, {}
    proposed = selection.read_rationales(run.path("propose", "rationales.jsonl"))
    of_queries = [r for r in proposed if r["side"] == "query"]
    everyone, workers = {r["worker"] for r in proposed}, set(filter(None, c.embed_workers.split(",")))
    if unknown := sorted(workers - everyone - {"none"}):
        raise UsageError(f"--embed_workers {unknown[0]}: no rationale is by such a worker; there are {', '.join(sorted(everyone))}")
    chosen = selection.read_rationales(run.path("select", "selected.jsonl"), numbers=("weight",))
    chosen = [r for r in chosen if not workers or r["worker"] in workers]
    for r in chosen:
        kept.setdefault(r["id"], []).append((reader.rationale(r["text"]), r["weight"]))
    kept = {i: [(b, w / sum(w for _, w in options)) for b, w in options] for i, options in kept.items()}
    trusted = [worker for worker, _ in collections.Counter(r["worker"] for r in chosen).most_common(1)] if c.embed_rest else []
    rest = {r["id"]: reader.rationale(r["text"]) for r in of_queries if r["worker"] in trusted}
    judged = {r["id"] for r in of_queries}
    if c.embed_unsure:                                           # the target has less than a half, so there was something to gain: nobody knows how
        found = selection.read_rationales(run.path("select", "judged.jsonl"), numbers=("direct",))
        judged -= {r["id"] for r in found if r["direct"] < math.log(0.5)}
    for r in proposed if c.sides == "both" else ():
        if r["side"] == "target":
            offline.setdefault(r["id"], []).append(reader.rationale(r["text"]))
    if c.sides == "both" and not offline:
        raise UsageError("--sides both: propose left no rationale of a target (propose_k is 0, and the file given has none)")
    return kept, rest, judged, offline


# ---------------------------------------------------------------------------------------------------------------------
# Stage 5, rl: when to reason, and what to write (rl.py)


def rl_stage(run, out):
    c = run.cfg
    e = run.trainee("embed")
    pairs, actor = Pairs(run, e.reader, held=True), run.plain(e.model)

    def one_step(i, batch):
        if not c.rl_group:
            return contrastive_step(e.model, e.reader, batch, [None] * len(batch), [-1] * len(batch), c)
        keys = np.array(sum(gather_objects([p["answer"] for p in batch]), []))
        same = torch.from_numpy(keys[:, None] == keys[None]).to(run.device)
        m = rl.grpo_step(e.model, e.reader, [p["query"] for p in batch], [p["target"] for p in batch], same, c, run.generator("rl", i, rank()),
                         run.plain(e.model, actor))
        m["sample"]["id"] = batch[m["sample"].pop("row")]["id"]
        return dict(m, ids=[p["id"] for p in batch])

    fit(run, "rl", e, pairs, one_step, c.rl_batch, RL_SUB_BATCH, c.rl_steps, c.rl_lr)
    run.save(e, out, "Adaptive reasoning learnt by GRPO with a price on latency (stage rl).")


# ---------------------------------------------------------------------------------------------------------------------
# Stage 6, eval, and the report


def eval_stage(run, out):
    c = run.cfg
    if rank() > 0:
        return
    e = run.embedder("rl")
    evaluation.evaluate(e, run.data_root, out, tau=c.tau, on_bad=c.on_bad, batch_size=c.eval_batch, options=dict(max_new_tokens=c.eval_max_new))


def report(run):
    """report.json, report.md, the pictures, and the grep-able block at the end."""
    found, audit = read_json(run.path("eval", "summary.json")), read_json(run.path("select", "audit.json"))
    out = dict(preset=run.cfg.preset, seed=run.cfg.seed, seconds={k: v["seconds"] for k, v in run.stages.items()}, modes=found["modes"],
               selection=audit, curve=found["curve"])
    write_json(run.path("report.json"), out)
    evaluation.pictures(run.out, run.data_root, run.cfg.on_bad)
    lines = {"seconds": round(sum(out["seconds"].values()), 1)}
    for mode in ("never", "always", "adaptive", "random", "oracle"):
        lines |= {mode: round(out["modes"][mode]["overall"], 4), f"{mode}_tokens": round(out["modes"][mode]["tokens_per_query"], 2)}
    lines |= {f"selection_{k}": audit[k] for k in ("precision", "recall", "placebo_accepted") if audit[k] is not None}
    lines["peak_memory_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20), 2)
    print("\n".join(f"{k}: {v}" for k, v in {**lines, "report": run.path("report.json")}.items()))


# ---------------------------------------------------------------------------------------------------------------------


def world(cfg, final, **change):
    """Draw the pocket world once."""
    if os.path.exists(os.path.join(final, "datasets.json")) or rank() > 0:
        return
    aside, c = final + ".part", dataclasses.replace(cfg, **change)
    shutil.rmtree(aside, ignore_errors=True)
    os.makedirs(aside)
    pocket.write_world(aside, c.seed, max(4, round(c.world_train * c.scale)), max(4, round(c.world_test * c.scale)), c.world_style, c.world_steps)
    os.replace(aside, final)


def run_stages(cfg):
    """The stages that this call asks for, in one run folder -> its Run."""
    if cfg.stage not in ("all", "base") and not os.path.exists(os.path.join(cfg.out, "stages.json")):
        raise UsageError(f"stage {STAGES[STAGES.index(cfg.stage) - 1]} has not finished in {cfg.out}: there is no run yet, --stage all makes one")
    run = Run(cfg)
    signal.signal(signal.SIGTERM, run.terminate)
    if cfg.data and cfg.stage == "all" and not loader.tables(cfg.data, "eval"):
        raise UsageError(f"--data {cfg.data} has no test set (test.jsonl beside train.jsonl), and --stage all ends with one; name the stages instead")
    if not cfg.data:
        world(cfg, run.path("data"))
    gather_objects(None)                                         # the other ranks wait for the world
    for stage in STAGES if cfg.stage == "all" else (cfg.stage,):
        if cfg.stage == "all" and stage in run.stages:
            run.say(f"{stage}: done before")
            continue
        t0, aside = time.time(), run.path(f"{stage}.part")
        if rank() == 0:
            if stage != "eval" or cfg.resume != "auto":          # what eval.part/cache holds need not be embedded again
                shutil.rmtree(aside, ignore_errors=True)
            os.makedirs(aside, exist_ok=True)
        before = run.begin(stage)
        try:
            {"base": base_stage, "propose": propose_stage, "select": select_stage,
             "embed": embed_stage, "rl": rl_stage, "eval": eval_stage}[stage](run, aside)
        except (UsageError, ValueError, OSError):                # a broken input, a full disk: not a kill, and not a training that went wrong
            run.undo(before)
            raise
        run.finish(stage, aside, time.time() - t0)
        run.say(f"{stage}: {time.time() - t0:.0f} s")
    if "eval" in run.stages and rank() == 0:
        report(run)
    return run


# ---------------------------------------------------------------------------------------------------------------------
# The study: does thinking when needed pay? Variants are run folders forked from one another, so they share every stage
# before the first that differs: data, base and proposals always, the embedder where only rl does. What the seeds say: study.py

ALWAYS = dict(select_rule="none", select_weight_temperature=1e6, decision_weight=0.0, rl_decision=0.0, rl_price=0.0, tau=-1.0)     # a huge T: all alike
VARIANTS = {                                                     # name: (forked from, first stage done again, what differs)
    "full": ("", "base", {}),
    # VLM2Vec-style: contrastive without a rationale, as many updates of embed and rl on batches of the same size
    "never": ("full", "embed", dict(embed_workers="none", decision_weight=0.0, rl_group=0, tau=1.0)),
    "no_selection": ("full", "select", dict(select_rule="none", select_weight_temperature=1e6, select_judged="full")),
    # UME-R1-style: a rationale on every query in training (the best worker's, or any) and in use, no decision, no price
    "always": ("no_selection", "embed", dict(ALWAYS, embed_workers="careful")),
    "always_any": ("no_selection", "embed", ALWAYS),
    "positive_only": ("full", "select", dict(select_rule="positive_only", select_judged="full")),
    "no_placebo": ("full", "select", dict(select_rule="no_placebo", select_judged="full")),
    "no_crossfit": ("full", "select", dict(select_folds=1)),
    "supervised": ("full", "rl", dict(rl_steps=0)),              # the decision as selection labelled it
    "no_price": ("full", "rl", dict(rl_price=0.0)),
    "one_loss": ("full", "rl", dict(rl_one_loss=True)),
    # the reasoned path learnt on every pair; rl then has to hold the space where thinking gains nothing (results/tuning.txt)
    "rest": ("full", "embed", dict(embed_rest=True, rl_nce=1.0, rl_lr=0.01)),
    "unsure": ("full", "embed", dict(embed_unsure=True)),        # no evidence, no label
    # the best worker errs, one statement in ten: the full method, and always, which is told of that worker; then with as many tries as the large
    # presets make
    "erring": ("full", "propose", dict(propose_errors=0.1)),
    "always_erring": ("erring", "select", dict(ALWAYS, select_judged="erring", embed_workers="careful")),
    "erring_supervised": ("erring", "rl", dict(rl_steps=0)),
    "erring_one_loss": ("erring", "rl", dict(rl_one_loss=True)),
    "erring_unsure": ("erring", "embed", dict(embed_unsure=True)),
    "erring_tries": ("full", "propose", dict(propose_errors=0.1, propose_k=4)),
    "always_erring_tries": ("erring_tries", "select", dict(ALWAYS, select_judged="erring_tries", embed_workers="careful-0,careful-1,careful-2,careful-3")),
    "both_sides": ("full", "propose", dict(sides="both", select_judged="full")),         # its queries' rationales are the same
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
    c.select_judged = c.select_judged and place(c.select_judged)
    if parent:
        fork(place(parent), c.out, STAGES[: STAGES.index(first)])
    run = Run(c)                                                 # refuses a folder of another configuration
    if not os.path.exists(run.path("report.json")):
        run = run_stages(c)

    def measure(folder, root, max_new, **how):
        if not os.path.exists(run.path(folder, "summary.json")):
            evaluation.evaluate(run.embedder("rl"), root, run.path(folder), tau=c.tau, batch_size=c.eval_batch,
                                options=dict(max_new_tokens=max_new), **how)

    for where, how in ELSEWHERE.items() if name in TRAVELLERS else ():
        world(c, place(f"world_{where}"), world_train=1, seed=seed + 1000, **how)
        measure(where, place(f"world_{where}"), 2 * c.eval_max_new)                                       # longer paths take more words
    if c.sides == "both":
        measure("reasoned_documents", run.data_root, c.eval_max_new, targets="always")
    if name == "full" and not os.path.exists(run.path("analysis.json")):
        found = study.analyse(run.embedder("rl"), run.data_root, run.rng("analysis"), c.tau, c.temperature, c.eval_max_new, c.eval_batch)
        write_json(run.path("analysis.json"), found)


def study_stage(cfg):
    chosen = cfg.study_variants.split(",") if cfg.study_variants else list(VARIANTS)
    if unknown := [n for n in chosen if n not in VARIANTS]:
        raise UsageError(f"--study_variants {unknown[0]!r}: there are {', '.join(VARIANTS)}")
    if cfg.data or cfg.model:
        raise UsageError("--stage study draws its own worlds and pretrains its own models: no --data, no --model")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError("--stage study runs in one process: start it without torchrun")
    wanted = {n for name in chosen for n in lineage(name)}
    for seed in range(cfg.seed, cfg.seed + cfg.study_seeds):
        for name in filter(wanted.__contains__, VARIANTS):
            tqdm.write(f"study: seed {seed}, {name}")
            run_variant(cfg, name, seed)
        study.summarise(os.path.join(cfg.out, "study"))


def main(argv):
    if {"--help", "-h"} & set(argv):
        print(usage())
        return 0
    handler = signal.getsignal(signal.SIGTERM)
    try:
        cfg = parse(argv)
        study_stage(cfg) if cfg.stage == "study" else run_stages(cfg)
        if ranks() > 1:
            dist.destroy_process_group()
        return 0
    except UsageError as e:
        return complain(e, 2)
    except Interrupted as e:
        return complain(e, 143)
    except torch.OutOfMemoryError as e:
        return complain(f"out of GPU memory ({str(e).splitlines()[0]}) with --chunk_tokens {cfg.chunk_tokens}: lower it, or --checkpointing true, "
                        "--lora 32, --fsdp true on several GPUs", 1)
    except (ValueError, OSError, FloatingPointError) as e:
        return complain(e, 1)
    finally:
        signal.signal(signal.SIGTERM, handler)


def complain(e, code):
    """One line; of what all ranks notice alike, rank 0 alone speaks."""
    n = int(os.environ.get("RANK", 0))
    if n == 0 or code == 1:
        print(f"train.py: {f'rank {n}: ' if n else ''}{e}", file=sys.stderr)
    return code


def leave(code):
    """The end of the program. A rank does not wait until the interpreter is taken apart: now and then torch's threads abort in that ("terminate called
    without an active exception"), and torchrun takes it for a failure of what is long done."""
    sys.stdout.flush(), sys.stderr.flush()
    if "RANK" in os.environ:
        os._exit(code)
    raise SystemExit(code)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
