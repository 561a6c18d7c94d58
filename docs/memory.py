"""How much memory do propose and select hold beside the model, when there are many pairs?

    python docs/memory.py 100000; python docs/memory.py 200000

A root of so many pairs of texts, with four rationales of some 300 letters each, goes through
train.py's own stages, with worker processes that read, as the large presets have them. What
belongs to the model is replaced by what costs nothing: training by 200 batches that are read,
judging by random gains, of which a quarter is kept. results/memory.txt has the figures. Left out:
what the workers hold, each about as much as Python and torch do.
"""

import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import pretrain  # noqa: E402
import train  # noqa: E402
from embed import Embedder  # noqa: E402
from model import write_rows  # noqa: E402


def texts(n):
    """Rows of a training table."""
    for i in range(n):
        query = {"qry": f"what follows {i} in the row of numbers?", "qry_image_path": ""}
        yield query | {"pos_text": f"it is {i + 1}, which comes next", "pos_image_path": ""}


def rationales(n):
    for i in range(n):
        for k in range(4):
            text = f"add 1 to {4 * i + k} . " * 17
            yield {"id": f"own/{i}", "proposer": f"writer{k}", "text": text}


def read_only(run, name, part, embedder, stream, *others):
    """In place of train.fit."""
    batches = stream(0)
    for _ in range(200):
        next(batches)
    report(f"{name}, 200 batches")


def judge(model, processor, pairs, texts, cfg, rng):
    """In place of select.judge: every pair is hard."""
    for pair in pairs:
        for proposer, text in texts[pair["id"]].items():
            gain = rng.normal()
            row = {"id": pair["id"], "dataset": pair["dataset"], "proposer": proposer, "text": text}
            row |= {"direct": -2.3, "gain": gain, "gain_placebo": rng.normal() / 10 - 1}
            row |= {"gain_second": None, "gain_guess": -0.5, "audited": False}
            yield row | {"similarity_gain": [gain, -0.1, None]}


def report(what):
    status = Path("/proc/self/status").read_text()
    now, peak = (int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("VmRSS", "VmHWM"))
    print(f"{what}: {now / 1000:.0f} MB, peak {peak / 1000:.0f} MB", flush=True)


def main():
    n = int(sys.argv[1])
    root = Path(tempfile.mkdtemp())
    report("imported")
    write_rows(root / "train.jsonl", texts(n))
    write_rows(root / "test.jsonl", texts(4))
    write_rows(root / "rationales.jsonl", rationales(n))
    Embedder(*pretrain.new_model(0)).save(root / "model")

    options = f"--data {root} --model {root}/model --rationales {root}/rationales.jsonl"
    options += f" --out {root}/run --num_candidates 0 --rl_holdout 0 --max_new_tokens 512"
    options += " --batch 32 --workers 1 --device cpu"
    run = train.Run(train.parse(options.split()))
    run.say = lambda text: None
    train.fit = read_only
    train.selection.judge = judge
    for stage in ("base", "propose", "select"):
        started = time.time()
        part = run.begin(stage)
        embedder = getattr(train, f"{stage}_stage")(run, part)
        if embedder:
            embedder.save(part)
        run.finish(stage, part, 0.0)
        report(f"{stage}, {time.time() - started:.0f} s")

    embedder = run.embedder("base")
    pairs = run.pairs(embedder.processor)
    lessons = train.Lessons(run)
    for i, batch in zip(range(100), pairs.stream("embed", 32, 8, 0)):
        for pair in batch:
            lessons.draw(pair, np.random.default_rng(i))
    kept = lessons.kept.authors.total()
    report(f"{n} pairs: 3,200 draws of embed's lessons, {kept} rationales kept")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
