"""
Everything in order. A stage is a function below; the maths stands in the files named here.

    base     a model that sees and writes: trained from nothing, or --model
    propose  candidate rationales of every query                                        propose.py
    select   which of them explain why the query has its target: the E-step             select.py
    embed    learn the direct and the reasoned vector from those: the M-step            embed.py
    rl       learn the prior, whose first choice is whether to reason at all            rl.py
    eval     never, always, when needed: quality and tokens                             eval.py

    python train.py --stage all                         the pocket world, from nothing to a report
    python train.py --stage all --scale 0.05            the world's size and all steps times 0.05
    python train.py --stage all --preset qwen3vl-2b --model Qwen/Qwen3-VL-2B-Instruct --data ROOT
    torchrun --nproc_per_node=8 train.py ... --preset qwen3vl-8b --lora 0 --lr 1e-5 \\
        --rl_lr_factor 0.1 --fsdp true --compile false

The run folder:

    config.json  stages.json  metrics.jsonl     options; stages that are done; the log
    data/                                       the pocket world, unless --data is given
    base/  embed/  rl/                          checkpoints in the Hugging Face layout
    propose/rationales.jsonl                    all rationales that were written
    select/judge0/  judged0.jsonl ...           each fold's evaluator, a checkpoint; what it judged
    select/judged.jsonl  selected.jsonl         all rationales with their gains; those that are kept
    select/audit.json                           how often selection is right
    eval/summary.json ...                       scores, see eval.py
    report.json  report.md  report.html         the same for people

--stage all skips finished stages, up to a folder that was taken away; --stage NAME does one again.
For an ablation, copy the folder first (README.md, "Fork it"). Another select_fdr, a higher
select_margin, or the rules no_placebo and none need no new evaluators: cp -r RUN/select
RUN/select.part, then --stage select --resume auto. A run at --scale 0.05 keeps few rationales or
none; with --select_rule none each stage has something to learn.
Options that differ from the folder's are refused, but for those of the machine, of the stage that
is done again and of stages still to do. A stage works in STAGE.part, which takes its place when it
is finished. With --resume auto a stage that broke off goes on from its last checkpoint or window
(eval starts again); on a CPU it ends with the same bits as if nothing had happened.
SIGTERM ends a run with exit code 143 (torchrun: 1); a training loop writes a checkpoint first.
`python -X dev train.py ...` shows where an error came from.

Randomness: every draw has a generator of its own, made from --seed and what is drawn (Run.rng). So
nothing has to be saved, and a stage does not depend on what was drawn before it.
Precision: trained weights are fp32; frozen ones and all arithmetic are in --dtype (autocast). A
base from nothing is all fp32.
Left out: experiment trackers (metrics.jsonl is open to any), sweeps, a "best" checkpoint (no stage
keeps pairs for validation, and the loss of a batch depends on the batch).
"""

import os

# libgomp's threads spin while they wait. Beside another busy process that makes a step many times
# as long; passive waiting costs a sixth on idle cores (results/speed.md). torch reads it at import.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A batch's shapes vary, which fragments CUDA's memory pool unless its segments may grow.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import argparse
import ctypes
import fcntl
import gc
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import re
import resource
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

import data
import eval as evaluation
import pocket
import pretrain
import propose
import report
import rl
import scale
from embed import Embedder, contrastive_step, prefix_dims
from model import Rows, read_json, sdpa_kernels, write_json, write_rows
from processor import prompt_key

# select.py as a module. `import select` would give the standard library's; see select.py.
select_path = Path(__file__).with_name("select.py")
spec = importlib.util.spec_from_file_location("nanommemb_select", select_path)
selection = importlib.util.module_from_spec(spec)
spec.loader.exec_module(selection)

STAGES = ("base", "propose", "select", "embed", "rl", "eval")
# A row of selected.jsonl: {"id": "PocketWalk/7", "proposer": "careful", "text": "nw red star ...",
# "gain": 2.1, "gain_placebo": -0.3, "weight": 0.6}. A pair's weights add up to 1.
SELECTED = ("id", "proposer", "text", "gain", "gain_placebo", "weight")
RL_SUB_BATCH = 8  # queries of one dataset side by side: the reward compares their targets

# --------------------------------------------------------------------------------------------------
# Configuration

# The presets for Qwen3-VL's own checkpoints, each value with its source. Ours are arithmetic for a
# day of 2B on eight GPUs, one to two of 4B and 8B (docs/full_scale.md), and were never tried.
LARGE = {
    "dtype": "bfloat16",  # that of Qwen's weights
    "optimizer": "adamw",  # VLM2Vec-V2
    "lr": 1e-5,  # ours: between UME-R1's 5e-5 (SFT) and 1e-6 (RL)
    "warmup": 100,  # VLM2Vec-V2
    "max_pixels": 501760,  # ours: 490 tokens of 32 x 32 pixels, half of VLM2Vec-V2's
    "max_new_tokens": 128,  # ours
    "workers": 8,  # VLM2Vec-V2
    "num_candidates": 4,  # ours
    "select_steps": 500,  # ours: a tenth of embed's
    # A stage's peak rate is lr times its factor; ours. The pocket model's are smaller: tuned.
    "select_lr_factor": 1.0,
    "embed_steps": 5000,  # VLM2Vec-V2
    "embed_lr_factor": 1.0,
    "batch": 1024,  # VLM2Vec-V2
    "sub_batch": 64,  # VLM2Vec-V2
    "rl_steps": 500,  # ours: a tenth of embed's
    "rl_batch": 64,  # ours
    "rl_lr_factor": 0.1,  # so 1e-6: UME-R1
    "rl_holdout": 0.05,  # ours: more pairs than rl visits
    "save_every": 200,  # ours
    "checkpointing": True,  # ours: memory for time
    "compile": True,  # ours
}
LORA = {  # 4B in full needs 71 GB before an activation
    "lora": 32,  # Qwen3-VL-Embedding
    "lr": 5e-5,  # VLM2Vec-V2
    # So 1e-5: below that the updates of rl's merged bf16 copy get lost in rounding.
    "rl_lr_factor": 0.2,
}
PRESETS = {
    "pocket": {},
    "qwen3vl-2b": LARGE,
    "qwen3vl-4b": LARGE | LORA,
    "qwen3vl-8b": LARGE | LORA,
}


def opt(group, default, least=0, choices=None):
    """A field of Config. least: the smallest number that makes sense; choices: all that do.

    rl_batch: int = opt("rl", 32, 1) is --rl_batch of --help's group "rl", 32 by default.
    """
    return field(default=default, metadata={"group": group, "least": least, "choices": choices})


@dataclass
class Config:
    """Options by group; the comments are what --help says."""

    preset: str = opt("run", "pocket", choices=PRESETS)  # default values of the other options
    model: str = opt("run", "")  # start from this Qwen3-VL folder or hub id; empty: from nothing
    revision: str = opt("run", "")  # commit or tag of the model on the hub
    data: str = opt("run", "")  # training and test root, see data.py; empty: the pocket world
    seed: int = opt("run", 1)  # of the world, the weights, the order and the sampling
    scale: float = opt("run", 1.0, 1e-6)  # times the world's sizes and all step counts
    dtype: str = opt("run", "float32", choices=("float32", "bfloat16"))  # arithmetic, saved weights
    max_pixels: int = opt("run", 65536, 1024)  # area of an image; a token covers 32 x 32
    max_frames: int = opt("run", 8, 1)  # of a user's video without fps; datasets have their own
    max_new_tokens: int = opt("run", 48, 1)  # longest rationale; T of the latency penalty

    stage: str = opt("machine", "all", choices=("all", *STAGES))  # one of them, or all not done
    out: str = opt("machine", "")  # run folder; empty: runs/PRESET
    resume: str = opt("machine", "", choices=("", "auto"))  # auto: go on inside a stage
    device: str = opt("machine", "")  # cpu, cuda or cuda:N; empty: cuda where there is one
    workers: int = opt("machine", 0)  # processes that read; 0: the main one, which keeps 1 GB
    chunk_tokens: int = opt("machine", 16384, 1)  # tokens of one forward pass (GradCache)
    save_every: int = opt("machine", 100, 1)  # steps between checkpoints inside a stage
    checkpointing: bool = opt("machine", False)  # recompute activations: less memory, slower by 1/3
    compile: bool = opt("machine", False)  # torch.compile of the layers
    fsdp: bool = opt("machine", False)  # shard the text layers over the GPUs

    world_train: int = opt("world", 750, 4)  # training pairs of each pocket family
    world_test: int = opt("world", 100, 4)  # test queries of each pocket family

    optimizer: str = opt("training", "muon", choices=("muon", "adamw"))  # of matrices; AdamW: rest
    lr: float = opt("training", 0.002)  # peak rate; a stage's factor multiplies it
    warmup: int = opt("training", 30)  # steps, a quarter of the stage at most
    batch: int = opt("training", 32, 1)  # pairs of a contrastive step
    sub_batch: int = opt("training", 8, 1)  # of one dataset, which makes negatives hard
    temperature: float = opt("training", 0.02, 1e-4)  # of every softmax over targets
    lora: int = opt("training", 0)  # rank of LoRA; 0 trains all weights
    train_vision: bool = opt("training", True)  # the vision tower, too
    rl_holdout: float = opt("training", 0.2)  # share of each dataset's pairs that rl alone sees

    base_steps: int = opt("base", 450, 1)  # up to twice as many until the skills are there

    num_candidates: int = opt("propose", 1)  # rationales of a query by the base model
    rationales: str = opt("propose", "")  # a file of rationales that were written elsewhere
    hard: str = opt("propose", "")  # a judged.jsonl: only its pairs with p(target) < 1/2

    select_rule: str = opt("select", "full", choices=selection.RULES)  # which rationales are kept
    select_steps: int = opt("select", 300)  # updates of each evaluator
    select_lr_factor: float = opt("select", 0.5)  # times lr; at 1 evaluators learn pairs by heart
    select_margin: float = opt("select", 0.7, -math.inf)  # least gain; log 2 doubles p(target)
    select_fdr: float = opt("select", 0.1)  # share of the kept that may be luck
    select_folds: int = opt("select", 2, choices=(1, 2))  # 2: nobody judges what he learnt

    embed_steps: int = opt("embed", 400)  # updates
    embed_lr_factor: float = opt("embed", 0.5)  # times lr
    embed_proposers: str = opt("embed", "")  # learn from these authors (a,b or none); empty: all
    lm_weight: float = opt("embed", 1.0)  # of the rationale's cross-entropy
    decision_weight: float = opt("embed", 2.0)  # of the decision's cross-entropy
    matryoshka_dims: str = opt("embed", "")  # prefixes trained besides the full vector: 64,128

    rl_steps: int = opt("rl", 60)  # updates; a warning says where they meet pairs too often
    rl_batch: int = opt("rl", 32, 1)  # queries of an update
    rl_rollouts: int = opt("rl", 4)  # rationales of a query; 0: InfoNCE alone
    rl_lr_factor: float = opt("rl", 0.05)  # times lr
    latency_penalty: float = opt("rl", 0.6)  # reward charged for max_new_tokens tokens
    rl_decision_weight: float = opt("rl", 1.0)  # weight of the decision's loss
    rl_one_loss: bool = opt("rl", False)  # ablation: decision and rationale in one mean

    threshold: float = opt("eval", 0.5, -math.inf)  # reason when p_reason exceeds it


class UsageError(ValueError):
    """A mistake of the caller's."""

    exit_code = 2


class Interrupted(InterruptedError):
    """SIGTERM ended the training loop."""

    exit_code = 143  # as a shell has it


def true_or_false(text):
    """argparse's type of a bool. `bool("false")` is True."""
    if text not in ("true", "1", "false", "0"):
        raise ValueError(text)
    return text in ("true", "1")


def parse(argv):
    """Command line -> Config. A preset's values hold unless an option says otherwise.

    parse(["--seed=7", "--rl_steps", "9"]) -> Config(seed=7, rl_steps=9, out="runs/pocket")
    """
    # {"seed": "of the world, the weights, the order and the sampling"}: Config's own comments.
    source = inspect.getsource(Config)
    why = dict(re.findall(r"^    (\w+): .*  # (.*)$", source, re.M))
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # a wrong option ends in one line
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,  # leaves the docstring's lines
        allow_abbrev=False,
    )
    for title, options in itertools.groupby(fields(Config), lambda f: f.metadata["group"]):
        group = parser.add_argument_group(title)
        for f in options:
            group.add_argument(
                f"--{f.name}",
                type=true_or_false if f.type is bool else f.type,
                choices=f.metadata["choices"],
                default=argparse.SUPPRESS,  # so `given` has what the caller wrote, nothing else
                help=f"{why[f.name]} ({f.default!r})",
            )
    given = vars(parser.parse_args(argv))  # {"seed": 7, "rl_steps": 9}
    preset = given.get("preset", "pocket")
    cfg = Config(**PRESETS[preset] | given)
    if not cfg.out:
        cfg.out = f"runs/{preset}"
    check(cfg)
    return cfg


def check(cfg):
    """UsageError for options that cannot be meant."""
    for f in fields(Config):
        value = getattr(cfg, f.name)
        least = f.metadata["least"]
        if f.type in (int, float) and not (least <= value and math.isfinite(value)):  # nor NaN
            raise UsageError(f"--{f.name} {value}: expected a number, at least {least:g}")
    processes = int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets it
    no_checkpoint = cfg.preset != "pocket" and not (cfg.model and cfg.data)
    no_rationales = cfg.data and not cfg.rationales and not cfg.num_candidates
    whole_only = cfg.optimizer == "muon" or cfg.lora or cfg.compile or processes == 1
    cannot_shard = cfg.fsdp and whole_only
    numbers = re.fullmatch(r"([1-9]\d*(,[1-9]\d*)*)?", cfg.matryoshka_dims)  # "64,128" or ""
    mistakes = {  # {what is said: whether it is the case}
        f"--preset {cfg.preset} needs --model and --data": no_checkpoint,
        "--batch is not a multiple of --sub_batch": cfg.batch % cfg.sub_batch,
        f"--batch is not a multiple of the {processes} processes": cfg.batch % processes,
        f"--rl_batch is not a multiple of the {processes} processes": cfg.rl_batch % processes,
        f"--rl_batch is not a multiple of {RL_SUB_BATCH}": cfg.rl_batch % RL_SUB_BATCH,
        "--rl_rollouts 1: two at least are compared; 0 makes none": cfg.rl_rollouts == 1,
        "--rl_holdout leaves no pair for the other stages": cfg.rl_holdout >= 1,
        "--num_candidates 0, and no --rationales": no_rationales,
        "--fsdp needs torchrun, --optimizer adamw --lora 0 --compile false": cannot_shard,
        "--matryoshka_dims: expected 64,128": not numbers,
    }
    for mistake, is_made in mistakes.items():
        if is_made:
            raise UsageError(mistake)


# --------------------------------------------------------------------------------------------------
# The run folder


class Run:
    """A run folder and its options: which stages are done, the log, and all random numbers."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.device = scale.join_processes(cfg.device)  # "cpu", "cuda:3"
        self.dtype = getattr(torch, cfg.dtype)
        self.data_root = cfg.data or self.path("data")
        self.pairs_read = {}  # {(for_rl, question): Pairs}
        os.makedirs(cfg.out, exist_ok=True)
        if scale.is_main():
            lock = os.open(self.path(".lock"), os.O_RDWR | os.O_CREAT)  # until this process ends
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"{cfg.out}: another train.py works in this folder") from None
            except OSError as error:  # some clusters' file systems have no locks
                self.say(f"{cfg.out}: not locked ({error}); let no other run use this folder")
        self.stages = {}  # that are done, in order: {"base": {"seconds": 269.0}, ...}
        for stage, done in self.read("stages.json").items():
            if not os.path.lexists(self.path(stage)):  # taken away, to be done again
                break
            self.stages[stage] = done
        todo = set(STAGES) - set(self.stages)
        self.same_options({"machine", cfg.stage, *todo}, "config.json")

    def path(self, name):
        """run.path("select/judged.jsonl") -> "runs/pocket/select/judged.jsonl"."""
        return os.path.join(self.cfg.out, name)

    def read(self, name):
        """A JSON file of the folder; {} where there is none."""
        path = self.path(name)
        return read_json(path) if os.path.exists(path) else {}

    def same_options(self, free, name, remedy="use another --out"):
        """Refuse what was made with other options, as noted in the folder's file `name`, if it is
        there. Groups in `free` may differ."""
        before = self.read(name)  # {"preset": "pocket", "seed": 1, "lr": 0.002, ...}
        if not before:
            return
        for f in fields(Config):
            value = getattr(self.cfg, f.name)
            then = before.get(f.name, f.default)  # the option may be younger than the folder
            if f.metadata["group"] in free or then == value:
                continue
            change = f"was made with {f.name}={then!r}, this call says {value!r}"
            raise UsageError(f"{self.path(name)} {change}: repeat the option, or {remedy}")

    def rng(self, *key):
        """numpy's generator; it depends on seed and key alone.
        run.rng("embed", 17, "OK-VQA/3") draws the rationale of that pair in embed's step 17."""
        name = repr((self.cfg.seed, *key))  # "(1, 'embed', 17, 'OK-VQA/3')"
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        return np.random.default_rng(int.from_bytes(digest, "little"))

    def torch_seed(self, *key):
        """rng() as a number, for what takes a seed."""
        return int(self.rng(*key).integers(2**31))

    def generator(self, *key):
        """rng() as torch's generator."""
        seed = int(self.rng(*key).integers(2**62))
        return torch.Generator(self.device).manual_seed(seed)

    def scaled(self, n, least=2):
        """A number of steps or pairs under --scale: never less than `least`, unless it is 0."""
        return max(least, round(n * self.cfg.scale)) if n else 0

    def say(self, text):
        """Of several processes one speaks."""
        if scale.is_main():
            print(text, flush=True)

    def log(self, stage, step, steps, metrics):
        """A line on the screen and a row of metrics.jsonl:

        embed 10/400 loss 5.18 nce_direct 0.228
        {"stage": "embed", "step": 10, "loss": 5.178912281990051, "nce_direct": 0.227520033717155}
        """
        numbers = []
        for name, value in metrics.items():
            if isinstance(value, (int, float)):  # texts and tables are in the file alone
                numbers.append(f"{name} {value:.3g}")
        self.say(f"{stage} {step}/{steps} " + " ".join(numbers))
        if scale.is_main():
            with open(self.path("metrics.jsonl"), "a", encoding="utf-8") as f:
                f.write(json.dumps({"stage": stage, "step": step, **metrics}) + "\n")

    def forget(self, stage, step=0):
        """Take a stage's rows after this step out of metrics.jsonl: they will be written again.
        Those of "base skills" are rows of "base", too."""
        path = self.path("metrics.jsonl")
        if not scale.is_main() or not os.path.exists(path):
            return
        kept = []
        for row in Rows(path, may_be_cut=True):
            if not row["stage"].startswith(stage) or row["step"] <= step:
                kept.append(row)
        write_rows(path, kept)

    def begin(self, stage):
        """-> STAGE.part, the folder in which an unfinished stage works."""
        part = self.path(f"{stage}.part")
        if scale.is_main():
            if not self.cfg.resume:
                shutil.rmtree(part, ignore_errors=True)
            if not os.path.exists(part):  # it starts from the beginning
                self.forget(stage)
            os.makedirs(part, exist_ok=True)
            if os.listdir(part) == ["options.json"]:  # nothing was done with those options
                os.remove(f"{part}/options.json")
        scale.barrier()  # what is left of an earlier try is gone, before anybody looks
        later = STAGES[STAGES.index(stage) + 1 :]
        options = f"{stage}.part/options.json"
        self.same_options({"machine", *later}, options, "leave out --resume")
        if scale.is_main():
            write_json(f"{part}/options.json", asdict(self.cfg))
        return part

    def finish(self, stage, part, seconds):
        """Put a finished stage's folder in its place. What follows from it is no longer done.

        stages.json is never ahead of the folders: a kill between two lines costs a stage at most.
        """
        scale.barrier()  # all processes have written into `part`
        number = STAGES.index(stage)
        earlier = {name: self.stages[name] for name in STAGES[:number]}
        self.stages = earlier | {stage: {"seconds": seconds}}
        if scale.is_main():
            write_json(self.path("stages.json"), earlier)  # as long as folders change
            for name in ("report.json", "report.md", "report.html"):  # of the model before
                Path(self.path(name)).unlink(missing_ok=True)
            final = Path(self.path(stage))
            if final.is_symlink():  # of a study's fork: its parent's stays
                final.unlink()
            shutil.rmtree(final, ignore_errors=True)
            os.replace(part, final)
            for file in (*final.glob("*.state*"), final / "options.json"):
                file.unlink()  # only a stage that is resumed needs checkpoints and its options
            for folder in final.glob("*.windows"):  # a kill came before by_window removed it
                shutil.rmtree(folder)
            for later in STAGES[number + 1 :]:  # begun on what was there before
                shutil.rmtree(self.path(f"{later}.part"), ignore_errors=True)
            write_json(self.path("config.json"), asdict(self.cfg))
            write_json(self.path("stages.json"), self.stages)
        scale.barrier()

    def embedder(self, folder):
        """The checkpoint that a stage left: in "base", "select/judge0" ..."""
        c = self.cfg
        path = os.path.abspath(self.path(folder))  # runs/x alone could be a hub's id
        limits = {"max_pixels": c.max_pixels, "max_frames": c.max_frames}
        return Embedder.from_pretrained(path, self.device, c.dtype, **limits)

    def trainee(self, *folders):
        """A stage's checkpoint, ready to be trained. Of several it has the mean weights."""
        c = self.cfg
        embedder = self.embedder(folders[0])
        model = embedder.model
        for n, folder in enumerate(folders[1:], 2):  # from the mean of n - 1 to that of n
            other = self.embedder(folder).model
            for p, q in zip(model.parameters(), other.parameters()):
                p.data.lerp_(q.data, 1 / n)  # p += (q - p) / n
        torch.manual_seed(self.torch_seed("lora"))
        scale.prepare(model, self.dtype, c.lora, c.checkpointing, c.compile, c.train_vision)
        if c.compile:
            embedder.processor.pad_to = 128  # few lengths to compile for
        if c.fsdp:
            scale.shard(model, self.dtype)
        return embedder

    def pairs(self, processor, for_rl=False, question=None):
        """The training pairs. Neighbouring stages share what was read: processors are alike."""
        kind = (for_rl, question)
        if kind not in self.pairs_read:
            self.pairs_read = {kind: Pairs(self, processor, for_rl, question)}  # others are freed
        return self.pairs_read[kind]


# --------------------------------------------------------------------------------------------------
# Training pairs


class Pairs:
    """The training pairs of a stage, as prompts: pairs[source, row], the dataset and the row in it.

    A prompt is what the Processor makes of an item: "ids" (S,) and patches. pairs[0, 3] is
        {"id": "PocketColour/3", "dataset": "PocketColour", "query": prompt, "target": prompt,
         "negatives": [prompt, ...], "key": a hash of the pair, "target_key": a hash of the target}
    for_rl: the pairs that rl alone sees. question: None, or how a query is put to a proposer
    (propose.question).

    What was read is kept, up to MAX_BYTES; with --workers worker processes read, and keep nothing.
    The last rl_holdout of every dataset belongs to rl alone: on pairs that embed knows by heart the
    direct embedding is so good that thinking never seems to pay.
    """

    MAX_BYTES = 2**30

    def __init__(self, run, processor, for_rl=False, question=None):
        self.run = run
        self.processor = processor
        self.question = question
        self.tables = data.train_sets(run.data_root)  # all datasets of the root
        if self.tables.missing:
            run.say(f"training data: missing {', '.join(self.tables.missing)}")
        # A range of rows of each dataset: [range(0, 600), range(0, 600), ...]
        self.rows = [self.share_of(n, for_rl) for n in self.tables.sizes]
        for source, n in enumerate(self.tables.sizes):
            rls = self.share_of(n, True)
            self.tables.fetch(source, rls.start, rows=rls)  # fails now, not hours later in rl
        self.cache = {}  # {(source, row): pair}
        self.cached_bytes = 0
        # One loader, and one crew of workers, for all passes: load() says what is to be read.
        workers = run.cfg.workers
        self.order = Order()
        self.loader = DataLoader(
            self,
            batch_size=None,
            sampler=self.order,
            collate_fn=dict,  # a pair stays as it is
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=64 if workers else None,  # pairs of each worker
            # Forked: self.order, which may hold a generator, cannot be sent to a new process.
            multiprocessing_context="fork" if workers else None,
            worker_init_fn=leave_group,
        )

    def share_of(self, n, for_rl):
        """A dataset has n rows: which of them are this stage's?
        With --rl_holdout 0.2, of 750: range(600), for rl range(600, 750). An only row is both's."""
        share = self.run.cfg.rl_holdout
        if not share or n == 1:
            return range(n)
        num_held = max(1, round(n * share))
        first_held = max(1, n - num_held)  # at least one pair on either side
        return range(first_held, n) if for_rl else range(first_held)

    def warn_of_visits(self):
        """Say so where rl meets a dataset's pairs too often: at 1.1 visits all was well, at 4.3 the
        family Walk ceased to reason, in all runs without labels and one of two with them
        (results/rl.txt)."""
        c = self.run.cfg
        queries = self.run.scaled(c.rl_steps) * c.rl_batch
        total = sum(self.tables.weights)
        for source, n in enumerate(self.tables.sizes):
            held = len(self.share_of(n, True))
            visits = queries * self.tables.weights[source] / total / held
            if c.rl_rollouts and visits > 4:
                self.run.say(
                    f"WARNING: rl meets each of the {held} pairs that it has of "
                    f"{self.tables.names[source]} {visits:.1f} times. Known by heart they seem to "
                    "need no thinking: lower --rl_steps, or start anew with a higher --rl_holdout"
                )

    def __getitem__(self, ref):
        """ref (source, row) -> its pair. A broken row's place is taken by the share's next one."""
        if ref in self.cache:
            return self.cache[ref]
        source, row = ref
        pair = self.tables.fetch(source, row, self.prompts, self.rows[source])
        if not self.run.cfg.workers and self.cached_bytes < self.MAX_BYTES:
            self.cache[ref] = pair
            self.cached_bytes += 2500  # of a pair of short texts
            for prompt in (pair["query"], pair["target"], *pair["negatives"]):
                self.cached_bytes += sum(patches.nbytes for patches in prompt["pixel_values"])
        return pair

    def prompts(self, pair):
        """A pair of items (texts, places of images) -> the pair as the docstring above has it."""
        target = self.processor(pair["target"])
        query = pair["query"]
        if self.question:
            query = self.question(query)
        return {
            "id": pair["id"],
            "dataset": pair["dataset"],
            "query": self.processor(query),
            "target": target,
            "negatives": [self.processor(item) for item in pair["negatives"]],
            "target_key": prompt_key(target),  # equal targets are no negatives of each other
            "key": data.pair_key(pair),  # ties a rationale to the pair
        }

    def load(self, lists):
        """Lists of (source, row) -> yields lists of pairs. An earlier call must be over. Workers
        read ahead, pair by pair: whole windows of pages would take 3 GB each."""
        lists, to_read = itertools.tee(lists)
        self.order.refs = itertools.chain.from_iterable(to_read)
        loaded = iter(self.loader)
        for refs in lists:
            yield [next(loaded) for _ in refs]

    def windows(self, is_wanted):
        """(source, row) of the pairs whose id is_wanted(id) accepts, dataset by dataset, in lists
        of at most selection.WINDOW. Of two datasets with 1500 and 20 pairs, WINDOW being 1024:

        [[(0, 0), ... (0, 1023)], [(0, 1024), ... (0, 1499)], [(1, 0), ... (1, 19)]]
        """
        size = selection.WINDOW
        windows = []
        for source, rows in enumerate(self.rows):
            refs = []
            for row in rows:
                if is_wanted(self.tables.id(source, row)):
                    refs.append((source, row))
            for start in range(0, len(refs), size):
                windows.append(refs[start : start + size])
        return windows

    def stream(self, name, batch, sub_batch, first_step, is_learnt=None):
        """Endless batches from this step on: lists of pairs, this process' share of `batch`, in
        runs of `sub_batch` pairs of one dataset. A step uses the first hard negative of a pair, so
        each visit shuffles them. is_learnt(source, row): None, or which pairs do not drop out."""
        sampler = data.sampler(
            sizes=[len(rows) for rows in self.rows],
            weights=self.tables.weights,  # of the datasets
            batch=batch,
            sub_batch=sub_batch,
            seed=self.run.torch_seed(name),
            rank=scale.rank(),
            world=scale.world_size(),
            first=[rows.start for rows in self.rows],
            is_wanted=is_learnt,
        )
        todo = itertools.islice(sampler, first_step, None)  # without the steps that are done
        for step, pairs in enumerate(self.load(todo), first_step):
            shuffled = []
            for pair in pairs:
                rng = self.run.rng(name, "negatives", step, pair["id"])
                negatives = list(pair["negatives"])  # the pair itself may be kept
                rng.shuffle(negatives)
                shuffled.append(pair | {"negatives": negatives})
            yield shuffled


def leave_group(worker):
    """A worker leaves the process group, so that SIGTERM to the group reaches the main process
    alone, which saves first. On Linux it ends with that process, also one that was killed."""
    os.setpgrp()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


class Order:
    """A sampler whose references may be exchanged between two passes."""

    refs = ()  # (source, row); see Pairs.load

    def __iter__(self):
        return iter(self.refs)


# --------------------------------------------------------------------------------------------------
# The training loop


def train_loop(run, name, part, model, optimizer, one_step, stream=None, after_step=None):
    """The loop of every trained stage.

    one_step(i, batch) leaves gradients and returns metrics, among them "loss"
    stream(first) yields the batches of the steps first, first + 1 ...; None: one_step needs none
    after_step(step) may prolong the stage, by raising optimizer.steps
    It goes on from the checkpoint PART/NAME.state, if begin() left one.
    """
    state = f"{part}/{name}.state"
    step = scale.load_state(state, model, optimizer)  # steps done; 0 without a checkpoint
    if step == 0:  # a full disk is noticed now, not hours later
        # Two states, the last one and the one that is being written: of each weight itself and at
        # most two moments.
        weights = sum(p.nbytes for p in scale.trainable(model).values())
        scale.need_space(part, 2 * 3 * weights, "checkpoints")
    run.forget(name, step)  # rows of steps after the checkpoint
    batches = stream(step) if stream else itertools.repeat([])
    started = time.time()
    signals = []  # that came; outside of this loop SIGTERM ends the process, as kill -9
    signal.signal(signal.SIGTERM, lambda *_: signals.append("SIGTERM"))
    stop = False
    while step < optimizer.steps and not stop:
        batch = next(batches)
        metrics = one_step(step, batch)
        metrics["grad_norm"] = optimizer.step(step)  # before clipping
        # The weights would be NaN from now on.
        if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
            figures = f"loss {metrics['loss']}, grad_norm {metrics['grad_norm']}"
            ids = ", ".join(pair["id"] for pair in batch[:8])
            raise ValueError(f"{name}, step {step}: {figures}; batch: {ids}")
        step += 1
        if step % 10 == 0 or step == optimizer.steps:
            metrics["seconds"] = round(time.time() - started, 1)
            run.log(name, step, optimizer.steps, metrics)
        if after_step:
            after_step(step)
        stop = bool(scale.gather_objects(signals))  # all processes after the same step
        at_end = step == optimizer.steps  # saved, too: select still has to judge
        if stop or at_end or step % run.cfg.save_every == 0:
            scale.save_state(state, step, model, optimizer)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if stop or signals:  # or one came just now
        raise Interrupted(f"stopped by SIGTERM after step {step} of {name}, which can be resumed")
    model.eval()


def fit(run, name, part, embedder, stream, one_step, steps, factor):
    """Train an Embedder on pairs, and leave it as a model of --dtype.

    name: of the log's rows and the checkpoint. stream, one_step: as in train_loop. steps: at
    --scale 1. factor: times lr.
    """
    optimizer = scale.Optimizer(embedder.model, run.cfg, run.scaled(steps), factor)
    train_loop(run, name, part, embedder.model, optimizer, one_step, stream)
    embedder.model = scale.merge(embedder.model, run.dtype)  # to judge with, or to save
    embedder.processor.trained_here = True
    embedder.processor.pad_to = 1  # it is not compiled
    gc.collect()  # of what was trained: autocast's wrapper is in a circle with its model


# --------------------------------------------------------------------------------------------------
# The stages. Each opens what earlier ones left, loops over batches or windows, and saves into
# `part`, the folder STAGE.part. An Embedder that it returns is saved there, too.


def base_stage(run, part):
    """A tiny Qwen3-VL, pretrained on "describe what you see" (pretrain.py), or --model."""
    c = run.cfg
    if not c.model:
        return pretrain_base(run, part)
    # A copy of --model in the run folder. A broken one is refused in a minute, not in an hour.
    embedder = Embedder.from_pretrained(c.model, "cpu", c.dtype, c.revision or None)
    if not embedder.model.has_head:
        raise UsageError(f"{c.model} has no lm_head: it can neither decide nor write rationales")
    return embedder


def pretrain_base(run, part):
    """From random weights, until the skills are there that a rationale is made of: to look things
    up in a picture, a clip or an account, and to add two digits (pretrain.STEP_SKILLS)."""
    c = run.cfg
    model, processor = pretrain.new_model(run.torch_seed("weights"), run.device)
    planned = run.scaled(c.base_steps)
    describe_steps = run.scaled(pretrain.DESCRIBE_STEPS)
    # The rate falls over the last quarter of the planned steps: with 450 from step 338 on.
    optimizer = scale.Optimizer(model, c, planned, cool=0.25, patches=True)
    bank = pocket.Bank(run.rng("bank"))  # drawings of shapes, digits and words
    probe = pocket.Bank(run.rng("probe bank"))  # other drawings than those it learns from

    def one_step(i, _):
        described = 1.0 if i < describe_steps else 0.3  # first learn to see, then to look things up
        rng = run.rng("base", i)  # of all processes: they read the same documents
        return pretrain.pretrain_step(model, processor, bank, rng, described, c.chunk_tokens)

    def weakest_skill(step):
        """The lowest accuracy on held-out drawings, e.g. 0.877."""
        skills = pretrain.measure_skills(model, processor, probe, run.rng("skills"))
        run.log("base skills", step, optimizer.steps, skills)
        return min(skills[name] for name in pretrain.STEP_SKILLS)

    def after_step(step):
        """At the end of the flat part: are the skills there? If not, another tenth of the plan:
        450 steps become 495, 540 ... 900. What is missing by less than 0.05 comes while the
        learning rate falls."""
        flat_steps = optimizer.steps - round(optimizer.cool_steps)
        may_grow = step == flat_steps and optimizer.steps < 2 * planned
        if may_grow and weakest_skill(step) < pretrain.SKILL_WANTED - 0.05:
            optimizer.steps = min(2 * planned, optimizer.steps + planned // 10)

    train_loop(run, "base", part, model, optimizer, one_step, after_step=after_step)
    if weakest_skill(optimizer.steps) < pretrain.SKILL_WANTED:
        run.say(f"base: a skill is below {pretrain.SKILL_WANTED}; expect weak rationales")
    return Embedder(model, processor)


def by_window(run, path, pairs, is_wanted, rows_of, title):
    """Write the rows of all windows, in order, into one file of JSON lines.

    rows_of(n, window) -> rows (dicts) of window n, a list of pairs. is_wanted: as of Pairs.windows.
    title: of the lines on the screen.
    The windows are dealt out to the processes; each reads only its own. A window leaves a file,
    PATH.windows/000007.jsonl, and is not done again when the stage is resumed.
    """
    folder = f"{path}.windows"
    os.makedirs(folder, exist_ok=True)
    windows = pairs.windows(is_wanted)
    paths = [f"{folder}/{n:06d}.jsonl" for n in range(len(windows))]
    share = range(scale.rank(), len(windows), scale.world_size())
    mine = [n for n in share if not os.path.exists(paths[n])]  # windows that are still to do
    loaded = pairs.load([windows[n] for n in mine])
    for n, window in zip(mine, loaded):
        # Where row A/4 is broken, load() puts A/5 in its place, which also has a place of its own.
        # It counts there alone: this fold's evaluator may have learnt on A/5.
        sound = []
        for ref, pair in zip(windows[n], window):
            if pair["id"] == pairs.tables.id(*ref):
                sound.append(pair)
        write_rows(paths[n], rows_of(n, sound) if sound else [])
        run.say(f"{title}: window {n + 1} of {len(windows)}")
    scale.barrier()
    if scale.is_main():
        write_rows(path, Rows(*paths))
        shutil.rmtree(folder)
    scale.barrier()


def rows_within(given, pairs, processor, most):
    """Rows of a propose.Rationales about these pairs, and how many more there are whose text has
    too many tokens: the model could not write them to their end."""
    rows = [row for pair in pairs for row in given.of(pair)]
    num_forced = len(processor.prefix) + len(processor.tail)
    within = []
    for row in rows:
        if len(processor.rationale(row["text"])) - num_forced <= most:
            within.append(row)
    return within, len(rows) - len(within)


def propose_stage(run, part):
    """Candidate rationales of every query, window by window.

    Two sources add up: a file (--rationales, or the pocket world's own) and the base model, which
    writes --num_candidates for each query. --hard leaves out the pairs for which, at select's
    default margin and rule, no rationale can be kept. A row of rationales.jsonl:
        {"id": "PocketColour/0", "side": "query", "proposer": "careful#2", "text":
         "mid green square", "key": "cdc3e1a641d90b4f"}
    """
    c = run.cfg
    embedder = run.embedder("base")
    processor = embedder.processor
    kernels = sdpa_kernels(embedder.model, run.dtype).items()
    run.say("attention: " + ", ".join(f"{form} {kernel}" for form, kernel in kernels))
    # Without a file an empty one is read; the pocket world has its own.
    default = os.devnull if c.data else run.path("data/proposers.jsonl")
    given = propose.Rationales(c.rationales or default)
    hard = propose.hard_pairs(c.hard) if c.hard else None  # pair ids; None: all
    # Mistakes about embed are said now, not hours later.
    wanted_authors(c, {"base", *given.authors})
    if max(prefix_dims(c.matryoshka_dims), default=0) > embedder.model.c.hidden:
        raise UsageError(f"--matryoshka_dims: a vector has {embedder.model.c.hidden} numbers")
    # A foreign checkpoint was never taught to open with <think>: it is asked in words.
    ask = bool(c.model) and not processor.trained_here
    pairs = run.pairs(processor, question=propose.question if ask else None)
    pairs.warn_of_visits()  # now, not hours later in rl

    def is_wanted(pair_id):
        return hard is None or pair_id in hard

    # What is read and what is written (a token has some four bytes, a row some 200 more), twice:
    # in files of windows, and in the one that joins them.
    num_wanted = sum(map(len, pairs.windows(is_wanted)))
    if not num_wanted:
        raise UsageError(f"--hard {c.hard}: no hard pair of {run.data_root} is in it")
    size = c.num_candidates * (4 * c.max_new_tokens + 200) * num_wanted
    size += os.path.getsize(given.path)
    scale.need_space(part, 2 * size, "rationales")

    def is_about(pair_id):
        return pair_id in given.offsets

    # The stage's pairs that the file is about: none where it was written for other data.
    num_about = sum(map(len, pairs.windows(is_about)))
    if given.offsets and not num_about:
        ids = f"ids like {next(iter(given.offsets))!r}, pairs like {pairs.tables.id(0, 0)!r}"
        raise UsageError(f"{given.path}: about no pair of {run.data_root}, rl's aside ({ids})")

    def rows_of(n, window):
        rows, num_longer = rows_within(given, window, processor, c.max_new_tokens)
        if num_longer:
            run.say(f"propose: {num_longer} rationales exceed --max_new_tokens: not used")
        if c.num_candidates:
            rng = run.generator("propose", n)
            rows += propose.propose(embedder.model, processor, window, c, rng, ask)
        return rows

    path = f"{part}/rationales.jsonl"
    if not os.path.exists(path):  # else a kill came after the last window
        by_window(run, path, pairs, is_wanted, rows_of, "propose")
    written = propose.Rationales(path)
    run.say(f"propose: {written.authors.total()} rationales, {written.cut} of them cut off")
    if given.offsets or given.left_out:
        left_out = f"{given.left_out} of targets or without a word"
        others = f"those of {len(given.offsets) - num_about} ids (rl's pairs or unknown)"
        run.say(f"propose: not used: {others}, and {left_out}")
    if not written.offsets:
        raise ValueError(f"nobody wrote a rationale about a pair of {run.data_root}")


def select_stage(run, part):
    """Cross-fitted evaluators judge every rationale; the rule keeps what helps its pair.

    With two folds, judge0 trains on one half of the pairs and judges the other, judge1 the reverse.
    """
    c = run.cfg
    written = propose.Rationales(run.path("propose/rationales.jsonl"))  # by pair id
    # A judged row has some 450 bytes more than its rationale. It is written three times: into a
    # file of its window, of its fold and of all.
    size = os.path.getsize(written.path) + 450 * written.authors.total()
    scale.need_space(part, 3 * size, "judged rationales")

    # 1) The experiment: judged0.jsonl, judged1.jsonl
    paths = [f"{part}/judged{fold}.jsonl" for fold in range(c.select_folds)]
    for fold, path in enumerate(paths):
        if os.path.exists(path):  # on --resume, and in a fork by study.py
            run.say(f"{path}: taken as it is")
        else:
            judge_fold(run, part, fold, written, path)
    if not scale.is_main():
        return
    # {"id", "dataset", "proposer", "text", "gain", "gain_placebo" ...}: see selection.judge
    judged = selection.Judged(*paths)
    write_rows(f"{part}/judged.jsonl", Rows(*paths))

    # 2) The rule
    rule = (c.select_rule, c.select_margin, c.select_fdr)  # ("full", 0.7, 0.1)
    chosen = selection.choose(judged, *rule)  # the rows that are kept, each with its "weight"
    selected = f"{part}/selected.jsonl"
    short = ({key: row[key] for key in SELECTED} for row in chosen)
    write_rows(selected, short)

    # 3) The audit: against the truth, where it is known, and against placebos
    kept = Rows(selected)
    truth = selection.pocket_truth(run.data_root)
    audit = selection.audit(judged, kept, *rule, truth)
    run.forget("select audit")
    run.log("select audit", 1, 1, audit)
    warning = selection.few_kept(judged, kept)
    if warning:
        run.say(warning)
        audit["warning"] = warning  # the run's last lines and report.md repeat it
    write_json(f"{part}/audit.json", audit)


def judge_fold(run, part, fold, written, path):
    """Train an evaluator on the pairs of other folds, and judge this fold's rationales with it.

    written: propose.Rationales. path: of the file that gets selection.judge's rows.
    """
    c = run.cfg
    name = f"select{fold}"
    embedder = run.trainee("base")
    processor = embedder.processor
    pairs = run.pairs(processor)

    def one_step(i, batch):
        texts = written.texts(batch)  # {"PocketWalk/7": {"careful": "nw red star ...", ...}, ...}
        rng_of = partial(run.rng, name, i)  # rng_of(pair id) -> a generator
        return selection.evaluator_step(embedder.model, processor, batch, texts, c, fold, rng_of)

    def in_fold(pair_id):
        return selection.fold_of(pair_id, c.select_folds) == fold

    def is_learnt(source, row):
        return c.select_folds == 1 or not in_fold(pairs.tables.id(source, row))

    # Of two folds half of a batch is judged here and drops out: draw twice as much.
    times = 2 if c.select_folds > 1 else 1
    sizes = times * c.batch, times * c.sub_batch
    stream = partial(pairs.stream, name, *sizes, is_learnt=is_learnt)
    fit(run, name, part, embedder, stream, one_step, c.select_steps, c.select_lr_factor)
    if scale.is_main():
        embedder.save(f"{part}/judge{fold}")

    def rows_of(n, window):
        texts = written.texts(window)
        rng = run.rng("judge", fold, n)
        return selection.judge(embedder.model, processor, window, texts, c, rng)

    by_window(run, path, pairs, in_fold, rows_of, f"judging fold {fold}")
    if scale.is_main():  # room for the next fold's
        Path(f"{part}/{name}.state").unlink(missing_ok=True)


def embed_stage(run, part):
    """Learn both vectors, and the decision: was any rationale kept? Lessons.draw gives the texts.

    It starts from the mean of the evaluators' weights (a model soup, arXiv 2203.05482): they have
    learnt to find targets, which the base model has not.
    """
    c = run.cfg
    embedder = run.trainee(*[f"select/judge{fold}" for fold in range(c.select_folds)])
    processor = embedder.processor
    pairs = run.pairs(processor)
    lessons = Lessons(run)

    def one_step(i, batch):
        rationales = []  # of each pair: ids of <think>\n{text}\n</think>..., or None
        labels = []  # of each pair: see Lessons.draw
        for pair in batch:
            rng = run.rng("embed", i, pair["id"])
            text, label = lessons.draw(pair, rng)
            rationales.append(processor.rationale(text) if text else None)
            labels.append(label)
        return contrastive_step(embedder.model, processor, batch, rationales, labels, c)

    stream = partial(pairs.stream, "embed", c.batch, c.sub_batch)
    fit(run, "embed", part, embedder, stream, one_step, c.embed_steps, c.embed_lr_factor)
    return embedder


class Lessons:
    """What propose and select left: a rationale for each visit of a pair, and its decision."""

    def __init__(self, run):
        self.written = propose.Rationales(run.path("propose/rationales.jsonl"))
        wanted = wanted_authors(run.cfg, self.written.authors)
        self.kept = propose.Rationales(run.path("select/selected.jsonl"), ("weight",), wanted)
        counts = self.kept.authors  # rows that were kept: {"careful": 900, "sloppy": 12}
        self.trusted = max(counts, key=counts.get, default=None)
        # Pairs without a rationale, whose direct vector is so good that none could be kept.
        self.easy = set()
        for row in Rows(run.path("select/judged.jsonl")):
            if not row["text"] and not selection.can_keep(row["direct"], run.cfg):
                self.easy.add(row["id"])

    def draw(self, pair, rng):
        """-> (a text or None, the right decision: 1 to reason, 0 to answer directly, -1 unknown).

        a rationale was kept           ("nw red star . right n blue moon", 1)
        some were written, none kept   ("mid green square", 0), by the trusted author, which teaches
                                       how to think if forced; (None, 0) if there is none by it
        nobody wrote any               (None, 0) if the pair is easy, else (None, -1)
        """
        written = self.written.of(pair)  # rows of rationales.jsonl
        if not written:
            return None, 0 if pair["id"] in self.easy else -1
        kept = self.kept.of(pair)  # rows of selected.jsonl
        if kept:  # drawn from their posterior, over the rows of --embed_proposers
            weights = np.array([row["weight"] for row in kept])
            drawn = rng.choice(len(kept), p=weights / weights.sum())
            return kept[drawn]["text"], 1
        rest = [row for row in written if propose.author(row["proposer"]) == self.trusted]
        if not rest:
            return None, 0
        return rest[rng.integers(len(rest))]["text"], 0


def wanted_authors(cfg, authors):
    """--embed_proposers as a set: {"careful"}. authors: who wrote. UsageError for a stranger."""
    wanted = set(cfg.embed_proposers.split(",")) - {""}
    known = {"none", *authors}
    if wanted - known:
        raise UsageError(f"--embed_proposers: there are {', '.join(sorted(known))}")
    return wanted


def rl_stage(run, part):
    """When to reason, and what to write (rl.py), on pairs held out by --rl_holdout."""
    c = run.cfg
    embedder = run.trainee("embed")
    processor = embedder.processor
    pairs = run.pairs(processor, for_rl=True)
    pairs.warn_of_visits()
    actor = scale.merge(embedder.model, run.dtype)  # a plain copy, which writes the rollouts

    def one_step(i, batch):
        model = embedder.model  # a name outside of here would keep it after fit has merged it
        if not c.rl_rollouts:  # ablation: no rationale is written, and no decision is taught
            n = len(batch)
            return contrastive_step(model, processor, batch, [None] * n, [-1] * n, c)
        scale.merge(model, run.dtype, into=actor)  # it gets the weights of this step
        rng = run.generator("rl", i, scale.rank())
        return rl.grpo_step(model, processor, batch, c, rng, actor)

    stream = partial(pairs.stream, "rl", c.rl_batch, RL_SUB_BATCH)
    fit(run, "rl", part, embedder, stream, one_step, c.rl_steps, c.rl_lr_factor)
    return embedder


def eval_stage(run, part):
    """Every mode and what it costs (eval.py). The processes share the items."""
    c = run.cfg
    embedder = run.embedder("rl")
    # Embedder.encode holds eight batches: 8 * 16 clips of 720p take 2 GB.
    options = {"max_new_tokens": c.max_new_tokens, "batch_size": 16 if c.model else 64}
    # Steps that each query needs, {"PocketWalk/76": 3, ...}; None: not known
    truth_path = f"{run.data_root}/pocket.json"
    truth = read_json(truth_path)["test"] if os.path.exists(truth_path) else None
    evaluation.evaluate(
        embedder, run.data_root, part, threshold=c.threshold, options=options, truth=truth
    )


def write_report(run):
    """report.json, report.md and report.html, and the numbers that matter on the screen, one a
    line, for people and for grep: "adaptive: 0.9569"."""
    summary = run.read("eval/summary.json")
    for key in ("modes", "curve", "adaptivity", "threshold"):
        if key not in summary:  # eval.py has written there since
            raise UsageError(f"{run.path('eval')}: it lacks {key}; --stage eval measures it again")
    result = {
        "preset": run.cfg.preset,
        "seed": run.cfg.seed,
        "revision": run.cfg.revision,
        "model": run.cfg.model,
        "data": run.cfg.data,
        # {"base": 269.0, ...}, of a resumed stage those of its last call
        "seconds": {stage: done["seconds"] for stage, done in run.stages.items()},
        "selection": run.read("select/audit.json"),
        "modes": summary["modes"],  # {"never": {"overall": 0.827, "tokens_per_query": 0.0, ...}}
        "curve": summary["curve"],  # [{"threshold", "overall", ...}]
        "adaptivity": summary["adaptivity"],  # {"PocketWalk": {"auc", ...}}
    }
    write_json(run.path("report.json"), result)
    report.write_report(run.cfg.out, run.data_root)

    print(f"seconds: {sum(result['seconds'].values()):.1f}")
    for mode, numbers in result["modes"].items():
        print(f"{mode}: {numbers['overall']:.4f}")
        print(f"{mode}_tokens: {numbers['tokens_per_query']:.2f}")
    for name, numbers in result["adaptivity"].items():
        print(f"{name}_auc: {numbers['auc']}")
    for key in ("precision", "recall", "placebo_accepted"):
        if result["selection"].get(key) is not None:  # the truth may not be known
            print(f"selection_{key}: {result['selection'][key]}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux kilobytes
    print(f"peak_memory_gb: {peak / unit:.2f}")
    if "warning" in result["selection"]:
        print(result["selection"]["warning"])
    print(f"report: {run.path('report.html')}")


# --------------------------------------------------------------------------------------------------
# All of it


def draw_world(run):
    """The pocket world, drawn once: training pairs, test sets, rationales and the truth."""
    cfg = run.cfg
    folder = run.data_root
    if scale.is_main() and not os.path.exists(folder):
        part = folder + ".part"
        shutil.rmtree(part, ignore_errors=True)
        train = run.scaled(cfg.world_train, 4)
        test = run.scaled(cfg.world_test, 4)
        pocket.write_world(part, cfg.seed, train, test)
        write_json(run.path("config.json"), asdict(cfg))  # from now on these are the folder's
        os.replace(part, folder)
    scale.barrier()


def find_test_sets(root):
    """Specs of the test sets that a user's root has. UsageError if it lacks those of a kind."""
    for kind in ("train", "eval"):
        specs = data.tables(root, kind)
        found = [spec for spec in specs if data.Files(spec, root).all_paths()]
        if not found:
            wanted = "train.jsonl, test.jsonl (or .parquet), or tables that datasets.json names"
            raise UsageError(f"{root} has no {kind} set ({wanted}); --stage all needs one")
    return found  # of the last kind


def run_stages(cfg):
    """The stages that cfg asks for, and the report."""
    whole = cfg.stage == "all"
    test_sets = find_test_sets(cfg.data) if cfg.data and whole else []
    run = Run(cfg)
    num_done = len(run.stages)  # they are the first ones: finish() sees to it
    if cfg.stage in STAGES[num_done + 1 :]:
        raise UsageError(f"{cfg.out}: stage {STAGES[num_done]} is not done; --stage all does it")
    # What cannot be read fails now, not hours later.
    if "propose" not in run.stages:
        if cfg.rationales:
            propose.Rationales(cfg.rationales)
        if cfg.hard:
            propose.hard_pairs(cfg.hard)
    if "eval" not in run.stages:
        for spec in test_sets:
            run.say(f"reading test set {spec['name']}")
            data.load_eval(cfg.data, spec)
    if not cfg.data:
        draw_world(run)
    if whole and num_done:
        run.say(f"done before, and not again: {', '.join(run.stages)}")
    for stage in STAGES[num_done:] if whole else [cfg.stage]:
        started = time.time()
        part = run.begin(stage)
        do_stage = globals()[f"{stage}_stage"]  # embed_stage, ... above
        embedder = do_stage(run, part)
        if embedder and scale.is_main():
            embedder.save(part)
        embedder = None  # before the next stage opens its own
        seconds = round(time.time() - started, 1)
        run.finish(stage, part, seconds)
        run.say(f"{stage}: {seconds} s")
    if "eval" in run.stages and scale.is_main():
        write_report(run)


def main(argv):
    """Run, and exit: 0, or one line and 2 (a mistake), 143 (SIGTERM) or 1 (data, disk, memory)."""
    code = 0
    rank = os.environ.get("RANK", "0")  # torchrun's; scale.rank() may not be there yet
    try:
        run_stages(parse(argv))
    except (ValueError, OSError, torch.OutOfMemoryError) as e:
        if sys.flags.dev_mode:
            raise
        code = getattr(e, "exit_code", 1)
        line = " ".join(str(e).split())  # without line breaks
        line = line.rpartition("data.BadData: ")[2]  # without a DataLoader worker's traceback
        if isinstance(e, torch.OutOfMemoryError):
            line += "; lower --chunk_tokens, or --checkpointing true"
        if code == 1 or rank == "0":  # 2 and 143 are all processes'
            print(f"train.py: {line}", file=sys.stderr)
    if "RANK" in os.environ:
        if code == 2 and rank != "0":  # torchrun ends all when one ends: process 0 speaks first
            time.sleep(3)
        # A process of torchrun does not wait for the interpreter's end, in which torch's threads
        # abort now and then; torchrun would take that for a failure.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a run without a traceback
    main(sys.argv[1:])
