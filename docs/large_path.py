"""The path of --preset qwen3vl-2b, walked to its end on a cut-down checkpoint of random weights.

    python docs/large_path.py                     in fp32; minutes: results/times.txt
    python docs/large_path.py --device cuda       the same on GPUs in bf16, with nccl where there
                                                  are two; not yet run

It shows that what the preset switches on works together from base to report: the full vocabulary,
recomputed activations, GradCache, torch.compile, FSDP2, SIGTERM and --resume. It takes 8 GB of
memory and 7 GB of the disk, which it gives back unless something fails. What stands in:

    checkpoint    Qwen3-VL's layout, its 151,936 ids, its markers' ids and its sizes of a head, but
                  two layers in each tower, hidden 512, random weights in bf16. The file by which
                  we know our own checkpoints is taken away: it is opened as a stranger's
    tokenizer     Qwen's format and size: merges learnt from LICENSE, then a token and a letter
    data          32 training pairs and 8 test queries, every fourth with an image of 64 x 64
    rationales    a file with a line for every pair, beside what the checkpoint itself writes: noise

Steps, batches and rationales are tiny. The learning rate is high, as bf16 would round steps of 1e-5
away, and selection keeps nearly everything, so that every part of the losses has work. Scores mean
nothing. Left out: data too large for memory, which --workers read.
"""

import argparse
import itertools
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import pretrain  # noqa: E402
from embed import Embedder  # noqa: E402
from model import Config, Qwen3VL, Rows, read_json, write_rows  # noqa: E402
from processor import Processor, Tokenizer, byte_letters  # noqa: E402

FIRST_MARKER = 151643  # the id of <|endoftext|>; text has the ids before it
OPTIONS = (
    "--preset qwen3vl-2b --stage all --lr 1e-3 --batch 4 --sub_batch 4 --chunk_tokens 256 "
    "--max_new_tokens 4 --num_candidates 1 --select_steps 2 --select_margin -9 --select_fdr 99 "
    "--embed_steps 3 --rl_steps 2 --rl_batch 8 --rl_rollouts 2 --rl_holdout 0.25 --rl_lr_factor 1"
).split()
# A CPU without bf16 instructions takes 37 s for a product of (40, V) and (V, 512), in fp32 0.2 s.
ON = {"cpu": ["--device", "cpu", "--dtype", "float32"], "cuda": ["--device", "cuda"]}


def full_tokenizer():
    """A tokenizer of Qwen's size, whose markers have the ids that Qwen gives them."""
    texts = (REPO / "LICENSE").read_text("utf-8").split("\n")
    texts.append("system user assistant Represent the user's input. what follows it is add to?")
    spec = pretrain.train_tokenizer(texts)
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    for pair in itertools.product(list(vocab), byte_letters()):
        if len(vocab) < FIRST_MARKER and "".join(pair) not in vocab:
            vocab["".join(pair)] = len(vocab)
            merges.append(list(pair))
    for i, marker in enumerate(spec["added_tokens"], FIRST_MARKER):
        marker["id"] = i
    return Tokenizer(spec)


def prepare(root, device):
    """checkpoint and data"""
    small = {"hidden": 512, "mlp": 256, "layers": 2, "heads": 4, "kv_heads": 2}
    small |= {"v_hidden": 256, "v_mlp": 256, "v_layers": 2, "v_heads": 4, "v_deepstack": (0, 1)}
    config = Config(**small)
    torch.manual_seed(0)
    model = Qwen3VL(config).init_weights().to(torch.bfloat16)
    Embedder(model, Processor(full_tokenizer(), config)).save(str(root / "model"))
    (root / "model" / "embedder_config.json").unlink()
    rows = []
    for i in range(40):
        image = f"{i}.png" if i % 4 == 0 else ""
        if image:
            pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / image)
        row = {"qry": f"what follows {i}?", "qry_image_path": image}
        rows.append(row | {"pos_text": f"it is {i + 1}", "pos_image_path": ""})
    texts = [{"id": f"own/{i}", "proposer": "file", "text": f"add 1 to {i}"} for i in range(32)]
    write_rows(root / "train.jsonl", rows[:32])
    write_rows(root / "test.jsonl", rows[32:])
    write_rows(root / "rationales.jsonl", texts)


def start(root, out, *more, launcher=()):
    """train.py as a process of its own. What it says goes to OUT.log."""
    files = ["--data", root, "--model", root / "model", "--rationales", root / "rationales.jsonl"]
    command = [sys.executable, *launcher, "train.py", *OPTIONS, *files, "--out", root / out, *more]
    with open(root / f"{out}.log", "a", encoding="utf-8") as log:
        return subprocess.Popen(list(map(str, command)), cwd=REPO, stdout=log, stderr=log)


def expect(code, process, log):
    """Wait for its end, which must have this exit code."""
    if process.wait() != code:
        end = log.read_text("utf-8")[-2000:]
        sys.exit(f"{end}\n{log}: exit code {process.returncode}, expected {code}")


def weights(root, out, stage):
    return load_file(root / out / stage / "model.safetensors")


def require_alike(root, a, b):
    """As many rationales were judged, scores differ by at most two of the eight queries, and losses
    by 5 %, before rl, whose rollouts are others."""
    judged, scores, losses = [], [], []  # of a and of b
    for out in (a, b):
        report = read_json(root / out / "report.json")
        log = Rows(root / out / "metrics.jsonl")
        judged.append(report["selection"]["candidates"])
        scores.append([mode["overall"] for mode in report["modes"].values()])
        losses.append([row["loss"] for row in log if "loss" in row and row["stage"] != "rl"])
    near = np.allclose(*scores, rtol=0, atol=0.25) and np.allclose(*losses, rtol=0.05)
    if judged[0] != judged[1] or not near:
        sys.exit(f"{a} and {b} differ: judged {judged}, scores {scores}, losses {losses}")


def eager(root, device):
    """one process"""
    process = start(root, "eager", *ON[device], "--compile", "false")
    expect(0, process, root / "eager.log")
    before, after = weights(root, "eager", "base"), weights(root, "eager", "rl")
    if all(torch.equal(before[name], after[name]) for name in after):
        sys.exit("eager: nothing was trained")


def compiled(root, device):
    """one process, compiled"""
    process = start(root, "compiled", *ON[device], "--compile", "true")
    expect(0, process, root / "compiled.log")
    require_alike(root, "eager", "compiled")


TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def parallel(root, device):
    """two processes, compiled"""
    process = start(root, "parallel", *ON[device], "--compile", "true", launcher=TWO)
    expect(0, process, root / "parallel.log")
    require_alike(root, "eager", "parallel")


def sharded(root, device):
    """two processes, FSDP2"""
    more = (*ON[device], "--compile", "false", "--fsdp", "true")
    expect(0, start(root, "sharded", *more, launcher=TWO), root / "sharded.log")
    require_alike(root, "eager", "sharded")


def interrupted(root, device):
    """SIGTERM in embed, --resume auto"""
    out, log = root / "interrupted", root / "interrupted.log"
    more = (*ON[device], "--compile", "false", "--save_every", "1", "--resume", "auto")
    process = start(root, out.name, *more)
    while not (out / "embed.part/embed.state").exists() and process.poll() is None:
        time.sleep(0.02)
    process.terminate()
    expect(143, process, log)
    expect(0, start(root, out.name, *more), log)
    # A GPU adds up in no fixed order: there the weights are only close.
    limit = 0 if device == "cpu" else 3e-2  # bf16's step near 1 is 0.008
    for stage in ("embed", "rl"):
        a, b = weights(root, "eager", stage), weights(root, out.name, stage)
        if not all(torch.allclose(a[name], b[name], rtol=0, atol=limit) for name in a):
            sys.exit(f"{stage}: other weights than those of the undisturbed run")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    device = parser.parse_args().device
    root = Path(tempfile.mkdtemp(prefix="large_path."))
    print(root)
    walks = [prepare, eager, compiled, parallel, sharded, interrupted]
    if device == "cuda" and torch.cuda.device_count() < 2:
        print("two processes: left out, there is one GPU")
        walks = [prepare, eager, compiled, interrupted]
    for walk in walks:
        started = time.time()
        walk(root, device)
        print(f"{walk.__doc__:32s}{time.time() - started:6.0f} s  ok", flush=True)
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
