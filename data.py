"""
MMEB, whole: the training sources of VLM2Vec-V2 and the 78 test sets of MMEB-V2, as two tables of rows over a handful of parsers.

The idea. A benchmark is not code, it is a table: where the rows lie, which columns they have, what is said before the picture. So every dataset is
one row of TRAIN or EVAL below, every kind of file one parser of a few lines, and the model only ever sees items:

    item = {"text": str, "image": ref | [ref, ...], "video": {"frames": [ref, ...], "fps": float}, "instruction": str}   (absent: omitted)
    ref  = an absolute path, or a Picture(table, row, column) inside a parquet file; load_picture(ref) decodes either

Strings are VLM2Vec's to the byte with its visual placeholder taken out (our chat template puts pictures first, so nothing is lost) and all other
white space kept: it is worth 1.7 points on VisDial. prompts="qwen" instead moves the instruction to item["instruction"].

The sampler's maths. A global batch of B pairs is B/b sub-batches of b; each draws a dataset d with p(d) = w_d / Σw and takes the next b rows of
d's own shuffled walk. In-batch negatives of one sub-batch so share a source, which makes them hard. Every draw is a function of (seed, step), every
shuffle of (seed, dataset, epoch): workers and ranks cannot change the stream, and its state is {"step", "taken"}.

How to run:
    python data.py --check ROOT [--train | --eval] [--names A,B] [--on_bad skip]     what is found, missing, short or broken
    python data.py --check ROOT --fetch [--names A,B]                                the same after `hf download` of what is missing
    python data.py --bench [--out FILE.json]                                         the scale figures, on generated tables
ROOT mirrors hub ids: ROOT/<hub id>/... as `hf download ID --repo-type dataset --local-dir ROOT/ID` leaves it (then unpack the archives).
Your own data needs no code: put pairs in MMEB's columns (qry, qry_image_path, pos_text, pos_image_path, optional neg_text, neg_image_path) into
ROOT/train.jsonl and ROOT/test.jsonl (or .parquet), pictures beside them; or write ROOT/datasets.json (see "The row").

Left out: decoding videos (the published frame folders are read), audio, the agent and text-only tasks of MMEB-V3, the English-only copies of
ViDoRe-V2 that the leaderboard does not count. Sources: VLM2Vec @ 6e1e1d4 and the dataset cards; where the reference is wrong we say so.
"""

import argparse
import collections        # Counter, deque, defaultdict
import contextlib
import copy               # a sampler that runs ahead
import dataclasses        # Picture
import functools          # caches
import glob               # tables by pattern
import hashlib            # names of cached tables, VisRAG's page names
import importlib.metadata # versions, for the record of the bench
import io                 # pictures inside tables
import itertools          # zip_longest, chain, count
import json
import mmap               # what worker processes write and their maker reads
import multiprocessing    # pipes; the bench
import os
import pickle             # their answers
import platform           # the bench
import re
import signal
import sys
import tempfile           # no half-written cache
import time               # the bench
import traceback
import warnings
import weakref            # when shared memory is free again
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

IMG = "<|image_1|>"          # Phi-3.5-V's token, hard-coded in MMEB's text; we strip it, also where no picture follows (WebQA)
SMALL = 1 << 20              # bytes of a parquet file that is simply read; larger ones are memory-mapped through CACHE
CACHE = os.environ.get("NANOMMEMB_CACHE", os.path.expanduser("~/.cache/nanommemb"))      # never inside the user's data
FRAMES, FPS = 8, 2.0         # VLM2Vec looks at 8 frames of a video (Qwen3-VL-Embedding at 64); 2 per second is what Qwen assumes
warnings.simplefilter("error", Image.DecompressionBombWarning)         # Pillow's limit stays on (89 Mpx) and is an error, not a warning


class BadData(ValueError):
    """Something in the data is not what it should be: one line that names dataset, row or file. all: the single complaints, where it sums up."""

    def __init__(self, text, all=()):
        # what Pillow, Arrow or the hub say may have several lines, what a row says may be no text that can be printed
        super().__init__(str(text).replace("\n", " ").encode("utf-8", "backslashreplace").decode())
        self.all = list(all) or [str(self)]


class Missing(BadData):
    """The root has no table of this dataset: not broken, just not there."""


def named(error, where):
    """The error with dataset and row before it, unless they are there already: the code that reads cells need not know where it is."""
    return error if str(error).startswith(where) else BadData(f"{where}: {error}")


# ---------------------------------------------------------------------------------------------------------------------
# Items and pictures

def item(text="", image=None, video=None, instruction=None):
    """Only what is there; a side with nothing at all (OK-VQA has blank answers) is {"text": ""}."""
    out = {"text": text, "image": image, "video": video, "instruction": instruction}
    return {k: v for k, v in out.items() if v not in (None, "")} or {"text": ""}


def listed(value):
    """None, a value or a list -> a list."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def refs(item):
    """Every picture reference of an item, frames last."""
    return listed(item.get("image")) + (list(item["video"]["frames"]) if "video" in item else [])


def decoded(item):
    """The item with its references replaced by pictures; a new dict, the old one is untouched."""
    load = lambda refs: [load_picture(ref) for ref in refs] if isinstance(refs, list) else load_picture(refs)
    make = {"image": load, "video": lambda video: {**video, "frames": load(list(video["frames"]))}}
    return {key: make[key](value) if key in make else value for key, value in item.items()}


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture inside a parquet file (its bytes, or the hub's {"bytes", "path"}), read when wanted."""
    table: str
    row: int
    column: str

    def read(self):
        """The encoded bytes."""
        value = parquet(self.table).column(self.column)[self.row].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(value, bytes) or not value:
            raise BadData(f"{self}: no picture bytes there")
        return value

    def __str__(self):
        return f"{self.table} row {self.row} column {self.column}"


def load_picture(ref, draft=False):
    """path | bytes | {"bytes", "path"} | Picture | PIL -> RGB picture; BadData for anything else, for image bombs and for strips beyond 200 to 1.

    As in the reference (Image.open(...).convert("RGB")) the EXIF orientation is NOT applied. Unlike it, alpha is laid on white (convert drops it,
    which turns transparent black letters into a black page) and 16-bit grey is scaled (convert clips it to white). draft: only to find faults, at an
    eighth of a JPEG's size: cheap, and all its entropy-coded bytes are still read.
    """
    ref = (ref.get("bytes") or ref.get("path")) if isinstance(ref, dict) else ref
    name = ("picture" if isinstance(ref, Image.Image) else f"{len(ref)} bytes" if isinstance(ref, bytes)
            else str(ref) if isinstance(ref, (str, os.PathLike, Picture)) else f"a {type(ref).__name__}")
    body, fault = ref.read() if isinstance(ref, Picture) else ref, "not a picture"
    try:
        im = body if isinstance(body, Image.Image) else Image.open(io.BytesIO(body) if isinstance(body, bytes) else body)
        if im.width * im.height > (Image.MAX_IMAGE_PIXELS or sys.maxsize):          # the header says so, before a byte is decoded
            raise Image.DecompressionBombError(f"{im.width}x{im.height}, the limit is {Image.MAX_IMAGE_PIXELS} in all")
        if max(im.size) > 200 * min(im.size):        # as model.smart_resize, which knows no row to name
            fault = "not a picture that Qwen's processors take"
            raise ValueError(f"{im.width}x{im.height} pixels: expected sides that differ by no more than 200 to 1")
        fault = "broken picture"
        if draft:
            im.draft("RGB", (1, 1))
        im.load()
        if im.mode.startswith("I;16") or im.mode == "I":
            return Image.fromarray((np.clip(np.asarray(im, np.int64), 0, 65535) // 257).astype(np.uint8)).convert("RGB")
        if im.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in im.info:
            return Image.alpha_composite(Image.new("RGBA", im.size, "white"), im.convert("RGBA")).convert("RGB")
        return im if im.mode == "RGB" else im.convert("RGB")
    except FileNotFoundError:
        web = isinstance(ref, str) and re.match("https?://", ref)
        raise BadData(f"{name}: " + ("an address, and nothing is fetched from the web here: save the picture first" if web else "no such picture")) from None
    except Exception as e:               # Pillow raises nearly anything (SyntaxError, struct.error, IndexError, ...) at mutilated bytes
        if isinstance(ref, str) and os.path.isfile(ref):
            sound(ref)                   # has a better reason, where there is one
        raise BadData(f"{name}: {'too many pixels' if 'omb' in type(e).__name__ else fault} ({e})") from None


def fault_of(ref):
    """What is wrong with a picture, in words, or None."""
    try:
        load_picture(ref, draft=True)
    except BadData as e:
        return str(e)


def look(item, fault):
    """The item, if none of its pictures is broken by fault(ref), a cached fault_of: a picture of many rows is decoded once. fault=None: no look."""
    if why := next(filter(None, map(fault, refs(item))), None) if fault else None:
        raise BadData(why)
    return item


def natural(name):
    """frame_2 before frame_10: digits compare as numbers."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part.lower()) for part in re.split(r"(\d+)", name)]


def frames_of(folder, n):
    """Paths of a clip's frames: all in natural order, or n of them at np.linspace(0, last, n) where there are at least n (VLM2Vec's rule).

    Fewer than n are taken as they are; upstream pads with the last frame since June 2026, which costs Qwen3 2.3 points on HMDB51.
    """
    names = sorted((f for f in os.listdir(folder) if f.lower().endswith((".jpg", ".jpeg", ".png")) and f[0] != "."), key=natural)
    if not names:
        raise BadData(f"clip folder {folder} has no frames")
    if n and n <= len(names):
        names = [names[i] for i in np.linspace(0, len(names) - 1, n, dtype=int)]
    return [os.path.join(folder, name) for name in names]


# ---------------------------------------------------------------------------------------------------------------------
# Files: parquet and JSON lines as rows by number. Whatever cannot be read is a BadData that says which file and why.

def sound(path):
    """BadData if a file's first bytes say that it cannot be what it should be."""
    with open(path, "rb") as f:
        head = f.read(64)
    if not head:
        raise BadData(f"{path} is empty (zero bytes)")
    if head.startswith(b"version https://git-lfs"):
        raise BadData(f"{path} is a git-lfs pointer, not the file: run `git lfs pull` or download it again")


@functools.lru_cache(maxsize=None)
def _parquet(path, size, changed):
    """One parquet file as an Arrow table that costs no memory: large ones are unpacked once into CACHE and mapped from there.

    Parquet is compressed by the row group: a random row costs a thousand. HF `datasets` unpacks to Arrow for the same reason.
    """
    sound(path)
    try:
        file = pq.ParquetFile(path, memory_map=True)
        if size <= SMALL:
            return file.read()
        flat = os.path.join(CACHE, hashlib.sha256(f"{path}|{size}|{changed}".encode()).hexdigest()[:24] + ".arrow")
        if not os.path.exists(flat):
            os.makedirs(CACHE, exist_ok=True)
            rows = 1024 if file.metadata.num_rows * 1024 < size else 65536       # of a batch: few where rows are pictures, many of text
            plain = pa.schema([f.with_type(f.type.value_type) if pa.types.is_dictionary(f.type) else f for f in file.schema_arrow])
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:               # so that no half-written file ever has the final name
                with pa.OSFile(part := os.path.join(folder, "part"), "wb") as sink, pa.ipc.new_file(sink, plain) as out:
                    for batch in file.iter_batches(batch_size=rows):                # a dictionary may differ from batch to batch, which a file cannot hold
                        out.write_table(pa.Table.from_batches([batch]).cast(plain))
                os.replace(part, flat)
        return pa.ipc.open_file(pa.memory_map(flat)).read_all()
    except (pa.ArrowException, OSError) as e:
        raise BadData(f"{path} cannot be read: {str(e).splitlines()[0]}") from None


def parquet(path):
    """The file as it is now; opened once per process as long as it does not change."""
    stat = os.stat(path)
    return _parquet(path, stat.st_size, stat.st_mtime_ns)


class Lines:
    """A JSONL file (or a JSON list) as rows: only where the lines start is held, so a million rows are 8 MB."""

    def __init__(self, path):
        sound(path)
        self.path, self.file = path, open(path, "rb")
        sizes = np.fromiter((len(line) if line.strip() else -len(line) for line in self.file), np.int64)      # < 0: blank, no row
        ends = np.cumsum(abs(sizes))
        self.starts = np.append((ends - sizes)[sizes > 0], ends[-1])
        self.rows = self.parse(0, ends[-1], 0) if os.pread(self.file.fileno(), 4096, 0).lstrip()[:1] == b"[" else None

    def __len__(self):
        return len(self.starts) - 1 if self.rows is None else len(self.rows)

    def parse(self, start, end, i):
        """The JSON value in these bytes; pread, so that threads may share the file."""
        try:
            return json.loads(os.pread(self.file.fileno(), int(end - start), int(start)).decode("utf-8-sig"))
        except (ValueError, RecursionError) as e:
            raise BadData(f"{self.path} row {i}: not JSON ({e})") from None

    def __getitem__(self, i):
        row = self.parse(self.starts[i], self.starts[i + 1], i) if self.rows is None else self.rows[i]
        if not isinstance(row, dict):
            raise BadData(f"{self.path} row {i}: a JSON object is wanted, this is {type(row).__name__}")
        return row


def filled(path, name, column):
    """Arrow column -> (rows,) bool: is anything in the cell? Of texts only the offsets are read; numbers and dates are no side of a pair."""
    column = column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
    if column.null_count == len(column):                         # pandas writes a column of nothing as numbers
        return np.zeros(len(column), bool)
    if pa.types.is_primitive(column.type):
        raise BadData(f"{path}: column {name} holds {column.type}, not text")
    if pa.types.is_struct(column.type):                          # the hub's {"bytes", "path"}
        return np.any([filled(path, name, pc.struct_field(column, f.name)) for f in column.type], 0) & np.asarray(column.is_valid())
    textual = any(yes(column.type) for yes in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary))
    if pa.types.is_string_view(column.type) or pa.types.is_binary_view(column.type):
        column, textual = column.cast(pa.large_binary()), True
    return pc.fill_null(pc.greater(pc.binary_length(column), 0) if textual else column.is_valid(), False)


def picture_cell(table, row, column, value):
    """Arrow scalar of a picture column -> a Picture where there are bytes, else the path that stands there, or None."""
    parts = dict(value.items()) if pa.types.is_struct(value.type) and value.is_valid else {"bytes": value}                # the hub's {"bytes", "path"}
    for part in (parts.get("bytes"), parts.get("path")):
        if part is not None and part.is_valid:
            if not isinstance(part, pa.BinaryScalar) or isinstance(part, pa.StringScalar):
                return part.as_py() or None
            if part.as_buffer().size:
                return Picture(table, row, column)
    return None


class Table:
    """The first `cap` rows of a dataset's shards by number: table[i] -> {column: value}, None where a shard lacks an optional column.

    Pictures (column "image") stay where they are, as Picture references (see picture_cell).
    """

    def __init__(self, files, required, optional, cap=None):
        self.required, self.columns, self.parts = required, [*required, *optional], []            # parts: (path, Lines or Arrow table, the columns it has)
        for path in files:
            part = parquet(path) if path.endswith(".parquet") else Lines(path)
            have = part.column_names if isinstance(part, pa.Table) else list(part[0]) if len(part) else required
            if lost := [c for c in required if c not in have]:
                raise BadData(f"{path} has no column {', '.join(lost)} (it has {', '.join(have)})")
            if twice := [c for c in self.columns if have.count(c) > 1]:
                raise BadData(f"{path} has the column {twice[0]} {have.count(twice[0])} times")
            self.parts.append((path, part, [c for c in self.columns if c in have]))
        self.ends = np.cumsum([len(part) for _, part, _ in self.parts])            # shard k holds rows ends[k - 1] ... ends[k] - 1
        self.length = int(min(self.ends[-1], cap or self.ends[-1]))

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        path, part, have = self.parts[k := int(np.searchsorted(self.ends, i, "right"))]
        i -= int(self.ends[k - 1]) if k else 0                     # now the row inside its shard
        if isinstance(part, Lines):
            row = self.line(part, i)
            return {c: row.get(c) for c in self.columns}
        cells = {c: part.column(c)[i] for c in have}               # of the mapped file; nothing else is read
        try:
            return dict.fromkeys(self.columns) | {c: picture_cell(path, i, c, v) if c == "image" else v.as_py() for c, v in cells.items()}
        except ValueError as e:                                    # text that is not UTF-8
            raise BadData(f"{path} row {i} cannot be read: {e}") from None

    def line(self, part, i):
        """Row i of a JSONL file; unlike a parquet file's, each may lack a column."""
        row = part[i]
        if lost := [c for c in self.required if c not in row]:
            raise BadData(f"{part.path} row {i} has no column {', '.join(lost)} (it has {', '.join(row)})")
        return row

    def empty(self, sides, on_bad="stop"):
        """(rows,) bool: has one of the sides (lists of columns) nothing in any of its columns?"""
        def line(part, i):
            """Line i is whole. So is, under "skip", one that is not JSON: it is met, and counted, when it is read."""
            try:
                return all(any(map(self.line(part, i).get, side)) for side in sides)
            except BadData:
                if on_bad == "stop":
                    raise
                return True

        column = lambda path, part, side: np.any([filled(path, c, part.column(c)) for c in side], 0)
        whole = [[line(part, i) for i in range(len(part))] if isinstance(part, Lines) else np.all([column(path, part, side) for side in sides], 0)
                 for path, part, _ in self.parts]
        return ~np.concatenate(whole).astype(bool)[:len(self)]


def cell(row, column, kind="text"):
    """A checked cell. kind: text; text? (null is "", as everywhere in training); texts (a list with something in it);
    id (int or str -> str: hubs store ids as either, and qrels not always as the corpus does; pandas makes 7.0 of a 7 beside a null)."""
    value, text = row[column], lambda v: isinstance(v, str)
    value = int(value) if kind == "id" and isinstance(value, float) and value.is_integer() else value
    if kind == "text?" and value is None:
        return ""
    good = {"texts": isinstance(value, list) and len(value) > 0 and all(map(text, value)),
            "id": type(value) is int or text(value) and value != ""}
    if not good.get(kind, text(value)):
        got = "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
        raise BadData(f"column {column} is {got}, {dict(texts='a list of texts', id='an id').get(kind, 'text')} is wanted")
    return str(value) if kind == "id" else value


# ---------------------------------------------------------------------------------------------------------------------
# The row. TRAIN, EVAL and ROOT/datasets.json = {"train": [rows], "eval": [rows]}, which takes their place where it exists, have these keys.
# A row may be short: only name is needed, the rest is filled in by complete().
#
#   name      str          unique; the key of every score and id
#   parser    str          a key of TRAIN_PARSERS or EVAL_PARSERS below
#   hub       str          hub id = folder under ROOT ("" = ROOT itself)
#   table     [glob]       where in ROOT the rows lie; the first glob that matches wins; {hub} {repo} {name} {split} {config} {part} are
#                          filled in (repo = the hub id's last part; part = queries, corpus or qrels)
#   split     str          "original" / "test" ...        config  str | [str]     hub config(s); several are read one after the other
#   cap       int          so many first rows are used
#   media     [folder]     where in ROOT pictures and frame folders are looked for, in this order, file by file
#   frames    int          frames per video               fps     float           what the item says about them
#   fetch     [[hub, glob, shell command that unpacks it]]   what `hf download` must bring besides the hub
#   train only:  rows int (published), weight float
#   eval only:   modality image | video | visdoc, scope local | global, queries int (published), family str, ood bool (image sets: MMEB-train has no
#                such subset), inst str and tgt str (the parser's prompts), tail str (what ends a query), columns [id, caption] of video_ret, labels (a key of LABELS, or a
#                list), language str (filter), original {...} (keys that page_labels="original" replaces)

COMMON = dict(hub="", table=None, config="", media=None, fps=FPS, fetch=[], cap=None)
NUMBERS = {"weight", "cap", "frames", "fps", "rows", "queries"}
DEFAULTS = {
    "train": dict(COMMON, parser="mmeb", split=None, frames=FRAMES, rows=None, weight=1.0),
    "eval": dict(COMMON, parser="pairs", split="test", frames=None, modality="image", scope=None, queries=None, family="own", ood=None,
                 inst="", tgt="", tail="\n", columns=["video_id", "caption"], labels=None, language=None, original=None)}
# how the hub lays tables out: one folder per config, everything in data/, the config in the file name, or plain json
TABLES = ["{hub}/" + t for t in (
    "{config}/{split}-*.parquet", "data/{config}/{split}-*.parquet", "data/{split}-*.parquet", "{config}/{split}*.parquet",
    "{config}-{split}*.parquet", "{config}/{split}*.json*", "json/{config}.json*", "{split}*.json*", "{config}.json*", "*_{config}.json*")]
V2 = "TIGER-Lab/MMEB-V2"
PAGES = f"{V2}/visdoc-tasks"
BEIR = [place + t for place in ("{hub}/", PAGES + "/data/{repo}/", PAGES + "/data/{hub}/") for t in (
    "{part}/{split}-*.parquet", "data/{part}/{split}-*.parquet", "{part}/{split}*.parquet", "{part}-{split}*.parquet",
    "{part}/{split}*.json*", "{part}*.parquet", "{part}.json*")]

MMEB = "TIGER-Lab/MMEB-train"
MMEB_TRAIN = [  # name (underscores; the test sets have hyphens), rows of one split, cap and weight of VLM2Vec's train_alltasks.yaml.
    # None: only known to about 1 % (39.5k, 24.0k, 28.3k, 70k, 123k, 100k, 100k, 100k, 113k, 15.9k, 17.2k, 100k): never called "short"
    ("ImageNet_1K", 100000, 100000, 1.0),   ("N24News", 48988, 50000, 1.0),         ("HatefulMemes", 8500, 10000, 0.5),
    ("VOC2007", 7844, 10000, 0.5),          ("SUN397", 19850, 20000, 0.5),          ("OK-VQA", 9009, 10000, 0.5),
    ("A-OKVQA", 17056, 20000, 0.5),         ("DocVQA", None, 40000, 1.0),           ("InfographicsVQA", None, 25000, 0.5),
    ("ChartQA", None, 28000, 0.5),          ("Visual7W", None, 70000, 1.0),         ("VisDial", None, 130000, 1.0),
    ("CIRR", 26116, 30000, 0.5),            ("VisualNews_t2i", None, 100000, 1.0),  ("VisualNews_i2t", None, 100000, 1.0),
    ("MSCOCO_t2i", None, 100000, 1.0),      ("MSCOCO_i2t", None, 120000, 1.0),      ("NIGHTS", None, 20000, 0.5),
    ("WebQA", None, 20000, 0.5),            ("MSCOCO", None, 100000, 1.0)]
SHARE = "ShareGPTVideo/train_video_and_instruction"
TRAIN = [  # paths in MMEB-train start with images/<subset>/Train/: the folder that CONTAINS images/ is wanted, not VLM2Vec's .../image
    dict(name=name, hub=MMEB, table=["{hub}/{name}/{split}-*.parquet"], rows=rows, cap=cap, weight=weight,
         media=[MMEB, f"{MMEB}/image", f"{MMEB}/images"],
         fetch=[[MMEB, f"images_zip/{name}.zip", f"unzip -qn images_zip/{name}.zip -d images"]]) for name, rows, cap, weight in MMEB_TRAIN]
TRAIN += [
    dict(name="colpali_train_set", parser="page_qa", hub="vidore/colpali_train_set", table=["{hub}/data/train-*.parquet"], rows=118195,
         weight=10.0),
    dict(name="visrag-indomain", parser="page", hub="openbmb/VisRAG-Ret-Train-In-domain-data", rows=122752, weight=12.0,
         table=["{hub}/data/train-*.parquet", "{hub}/train-*.parquet"])]
TRAIN += [
    dict(name=name, parser=parser, hub=SHARE, table=[f"{SHARE}/video_instruction/train/sft/{file}.jsonl", f"{SHARE}/{file}.jsonl"],
         rows=rows, cap=rows, weight=5.0, media=[f"{SHARE}/train_300k", f"{SHARE}/video_frames/train_300k", SHARE])
    for name, parser, file, rows in [("video_caption_300k", "video_caption", "video_caption_300k", 300000),
                                     ("video_caption_300k-video", "video_retrieval", "video_caption_300k", 300000),
                                     ("video_qa_240k", "video_qa", "video_240k_caption_15k", 240000)]]

IMAGE_SETS = [  # family, parser, in domain (MMEB-train has the same set), out of domain; 1000 queries each, hit@1, positive = candidate 0
    ("I-CLS", "image_cls", "ImageNet-1K N24News HatefulMemes VOC2007 SUN397", "Place365 ImageNet-A ImageNet-R ObjectNet Country211"),
    ("I-QA", "image_qa", "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W", "ScienceQA VizWiz GQA TextVQA"),
    ("I-RET", "image_t2i", "VisDial VisualNews_t2i MSCOCO_t2i WebQA", "Wiki-SS-NQ EDIS"),
    ("I-RET", "image_i2t", "VisualNews_i2t MSCOCO_i2t", ""),
    ("I-RET", "image_i2i_vg", "CIRR NIGHTS", "FashionIQ OVEN"),
    ("I-VG", "image_i2i_vg", "MSCOCO", "RefCOCO RefCOCO-Matching Visual7W-Pointing")]
EVAL = [
    dict(name=name, modality="image", parser=parser, family=family, ood=name in other.split(), scope="local", queries=1000,
         hub="ziyjiang/MMEB_Test_Instruct", table=["{hub}/{name}/test-*.parquet"],
         tail="\n\n" if name == "VisDial" else "\n",              # "to be consistent with v1", says VLM2Vec
         media=[f"{V2}/image-tasks", f"{V2}/image-tasks/MMEB", "TIGER-Lab/MMEB-eval/images", "TIGER-Lab/MMEB-eval"],
         fetch=[[V2, "image-tasks/*", "cd image-tasks && tar -xzf mmeb_v1.tar.gz && mv MMEB/* ."]])
    for family, parser, own, other in IMAGE_SETS for name in f"{own} {other}".split()]

ASK = ("Given a video and a question, select the most accurate answer from the provided candidates. "
       "Return only the exact text of your chosen answer. Question: ")
MOMENT = "Find the clip that corresponds to the described scene in the given video:"
MVBENCH = ("episodic_reasoning action_sequence action_prediction action_antonym fine_grained_action unexpected_action object_existence "
           "object_interaction object_shuffle moving_direction action_localization scene_transition action_count moving_count "
           "moving_attribute state_change fine_grained_pose character_order egocentric_navigation counterfactual_inference").split()
VIDEO_SETS = [  # name, parser, queries, prompt (the space that ends Breakfast's is theirs), and what differs from the rule in video_row
    ("K700", "video_cls", 1000, "Recognize the category of the video content.", dict(hub="VLM2Vec/Kinetics-700", labels="K700")),
    ("SmthSmthV2", "video_cls", 1000, "What actions or object interactions are being performed by the person in the video?",
     dict(folders=["SSv2"], cap=1000)),
    ("HMDB51", "video_cls", 1000, "What actions or objects interactions are the person in the video doing?", dict(labels="HMDB51")),
    ("UCF101", "video_cls", 1000, "What activities or sports are being performed by the person in the video?", dict(labels="UCF101")),
    ("Breakfast", "video_cls", 433, "Recognize the breakfast type that the person is cooking in the video. ", dict(labels="Breakfast")),
    ("MVBench", "mvbench", 4000, ASK, dict(config=MVBENCH, split="train")),
    ("Video-MME", "videomme", 2700, ASK, {}),
    ("NExTQA", "nextqa", 8564, ASK, dict(config="MC")),
    ("EgoSchema", "egoschema", 500, ASK, dict(config="Subset", folders=["egoschema", "EgoSchema"])),
    ("ActivityNetQA", "activitynetqa", 1000, ASK, {}),
    ("DiDeMo", "video_ret", 1004, "Find a video that includes the following described scenes:", dict(columns=["video", "caption"])),
    ("MSR-VTT", "video_ret", 1000, "Find a video that contains the following visual content:", dict(config="test_1k")),
    ("MSVD", "video_ret", 670, "Find the video snippet that corresponds to the given summary:", {}),
    ("VATEX", "video_ret", 4478, "Select a video that fits the description provided:", dict(columns=["videoID", "enCap"])),
    ("YouCook2", "video_ret", 3179, "Find a video that demonstrates the following action while making a recipe:",
     dict(hub="lmms-lab/YouCook2", columns=["id", "sentence"], split="val")),
    ("QVHighlight", "moment", 1083, MOMENT, {}),
    ("Charades-STA", "moment", 727, MOMENT, dict(folders=["Charades-STA", "Charades_STA"])),
    ("MomentSeeker", "momentseeker", 1602, "", dict(tgt="Understand the content of the provided video clip."))]


def video_row(name, parser, queries, inst, folders=None, **more):
    """A line of VIDEO_SETS -> a row of EVAL: VLM2Vec/NAME or its offline mirror, and every place where its frames are known to end up."""
    kind = {"video_cls": "cls", "video_ret": "ret", "moment": "mret", "momentseeker": "mret"}.get(parser, "qa")
    base, folders = f"{V2}/video-tasks/frames", folders or [name]
    mirrors = dict.fromkeys([*(f.lower().replace("-", "_") for f in folders), name.lower()])
    # VLM2Vec's yaml, Qwen's yaml (= the archives as packed), and two third parties'
    deep = [f"{base}/{d}data/ziyan/video_retrieval/{f}/frames" for d in ("video_ret/", "") for f in folders] if kind == "ret" else []
    flat = [f"{base}/{d}/{f}" for f in folders for d in (f"video_{kind}", f"video_{kind}/video_{kind}", ".")]
    unpack = {"qa": "cat video_qa.tar.gz-0? | tar -xz", "mret": "tar -xzf video_mret.tar.gz"}.get(
        kind, f"mkdir -p video_{kind} && tar -xzf video_{kind}.tar.gz -C video_{kind}")
    return dict(dict(name=name, parser=parser, queries=queries, inst=inst, modality="video", family=f"V-{kind.upper()}",
                     scope="global" if kind == "ret" or "labels" in more else "local", hub=f"VLM2Vec/{name}", media=deep + flat,
                     tgt="Understand the content of the provided video.",
                     table=TABLES + ["{hub}/data/{split}.json*", "{hub}/*_{split}.json*"]                 # as SmthSmthV2's hub has it, and MSVD's
                     + ["{hub}/*/{split}-*.parquet"] * ("config" not in more)                              # VATEX, Video-MME: a folder of any name
                     + [f"{V2}/video-tasks/data/{mirror}.jsonl" for mirror in mirrors],
                     fetch=[[V2, f"video-tasks/frames/video_{kind}*", f"cd video-tasks/frames && {unpack}"]]), **more)


PAGE_SETS = [  # family, name, hub id, {what {} stands for: queries}, the rest; all global, graded, ndcg_linear@5
    ("ViDoRe-V1", "ViDoRe_{}", "vidore/{}_test_subsampled_beir", dict(arxivqa=500, docvqa=451, infovqa=494, tabfquad=280), {}),
    ("ViDoRe-V1", "ViDoRe_{}", "vidore/{}_test_beir", dict(tatdqa=1646, shiftproject=100), {}),
    ("ViDoRe-V1", "ViDoRe_syntheticDocQA_{}", "vidore/syntheticDocQA_{}_test_beir",
     dict(artificial_intelligence=100, energy=100, government_reports=100, healthcare_industry=100), {}),
    ("ViDoRe-V2", "ViDoRe_{}", "vidore/{}", dict(esg_reports_human_labeled_v2=52), {}),
    ("ViDoRe-V2", "ViDoRe_{}_multilingual", "vidore/{}", dict(biomedical_lectures_v2=640, economics_reports_v2=232, esg_reports_v2=228), {}),
    ("VisRAG", "VisRAG_{}", "openbmb/VisRAG-Ret-Test-{}", {"ArxivQA": 816, "ChartQA": 63, "MP-DocVQA": 591, "SlideVQA": 556, "InfoVQA": 718,
                                                           "PlotQA": 863}, dict(split="train")),
    # the page sets had wrong labels until November 2025: the -fixed data is the default, page_labels="original" reads the old ones
    ("VisDoc-OOD", "{}-page", "VLM2Vec/{}-page-fixed", dict(ViDoSeek=1142), dict(original={"hub": "VLM2Vec/ViDoSeek-page"})),
    ("VisDoc-OOD", "{}-doc", "VLM2Vec/{}", dict(ViDoSeek=1142), {}),
    ("VisDoc-OOD", "{}-page", "VLM2Vec/{}-page-fixed", dict(MMLongBench=838), dict(original={"hub": "VLM2Vec/MMLongBench"})),
    ("VisDoc-OOD", "{}-doc", "VLM2Vec/{}-doc", dict(MMLongBench=838), {})]
EVAL += [video_row(*line, **more) for *line, more in VIDEO_SETS]
EVAL += [
    dict(more, name=(full := name.format(key)), modality="visdoc", parser="beir", family=family, scope="global", queries=queries,
         hub=hub.format(key), table=BEIR, inst="Find a document image that matches the given query:",
         tgt="Understand the content of the provided document image.", media=[f"{PAGES}/images/{full}", f"{PAGES}/{full}"] +
         [f"{PAGES}/{d}{full.removeprefix('ViDoRe_')}" for d in ("images/", "")] * (family == "ViDoRe-V2"))
    for family, name, hub, sets, more in PAGE_SETS for key, queries in sets.items()]


def complete(row, kind):
    """A short row -> a whole one. An unknown key is an error: a typing mistake must not become a default."""
    name = row.get("name") if isinstance(row, dict) else None
    if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]{1,200}", name) or name in (".", ".."):
        raise BadData(f"datasets.json: a row of {kind!r} needs a name that can name a file, got {str(row)[:80]}")
    if unknown := sorted(set(row) - set(DEFAULTS[kind]) - {"name"}):
        raise BadData(f"{name}: unknown key {unknown[0]!r} in its row; known: {', '.join(DEFAULTS[kind])}")
    row = {**DEFAULTS[kind], **row}
    known = {"parser": TRAIN_PARSERS if kind == "train" else EVAL_PARSERS, "modality": ("image", "video", "visdoc"), "labels": LABELS, "scope": ("local", "global")}
    texts = lambda v: all(isinstance(x, str) for x in v)
    for key, value in row.items():
        wants, optional = "text", key != "name" and DEFAULTS[kind][key] is None
        if value is None and optional or key in ("ood", "fetch", "original"):
            good = True
        elif key in NUMBERS:
            whole = (int,) if key in ("cap", "frames", "rows", "queries") else (int, float)
            good, wants = type(value) in whole and 0 <= value < 1e18, f"a {'whole ' * (whole == (int,))}number from 0 up"
        elif key == "columns":
            good, wants = isinstance(value, list) and len(value) == 2 and texts(value), "a list of two texts"
        elif key in known and not (key == "labels" and isinstance(value, list)):
            good, wants = isinstance(value, str) and value in known[key], "one of " + ", ".join(known[key])
        else:
            good = value is not None and texts(value if isinstance(value, list) and (key in ("table", "media", "labels") or key == "config" and kind == "eval") else [value])
        if not good:
            raise BadData(f"{name}: {key} {value!r}: {wants} is wanted")
    row["table"] = listed(row["table"]) or (BEIR if row["parser"] == "beir" else TABLES)
    row["media"] = listed(row["media"]) or [row["hub"]]
    if kind == "eval":
        row["scope"] = row["scope"] or ("global" if row["parser"] in ("pairs", "beir", "video_ret") else "local")
    return row


def tables(root, kind):
    """The whole rows that hold for this root: its datasets.json, else train.jsonl / test.jsonl beside the pictures, else TRAIN / EVAL."""
    listing, own = os.path.join(root, "datasets.json"), {"train": "train", "eval": "test"}
    if not os.path.isdir(root):
        raise BadData(f"{root}: no such folder")
    files = {k: [f for f in (f"{name}.jsonl", f"{name}.parquet") if os.path.exists(os.path.join(root, f))] for k, name in own.items()}
    rows = TRAIN if kind == "train" else EVAL
    if twice := next((fs for fs in files.values() if len(fs) > 1), None):
        raise BadData(f"{root} has {' and '.join(twice)}: which one is meant?")
    if not os.path.realpath(listing).startswith(os.path.join(os.path.realpath(root), "")):
        raise BadData(f"{listing} leaves the root (it is {os.path.realpath(listing)})")
    if os.path.exists(listing):
        try:
            with open(listing, encoding="utf-8") as f:
                found = json.load(f)
        except (OSError, ValueError, RecursionError) as e:
            raise BadData(f"{listing}: not readable as JSON ({e})") from None
        if not isinstance(found, dict) or set(found) - set(own) or not all(isinstance(rows, list) for rows in found.values()):
            raise BadData(f"{listing}: wants {{\"train\": [rows], \"eval\": [rows]}}")
        rows = found.get(kind, [])
    elif any(files.values()):
        rows = [dict(name="own", table=files[kind])] if files[kind] else []
    rows = [complete(row, kind) for row in rows]
    if twice := [name for name, n in collections.Counter(row["name"] for row in rows).items() if n > 1]:
        raise BadData(f"{listing}: {kind} dataset {twice[0]!r} is listed twice")
    return rows


def wanted(rows, names):
    """The rows of these names, in this order (None: all); an unknown name is an error."""
    by_name = {row["name"]: row for row in rows}
    if twice := [name for name, n in collections.Counter(names or []).items() if n > 1]:
        raise BadData(f"dataset {twice[0]!r} is asked for twice")
    if lost := [name for name in names or [] if name not in by_name]:
        raise BadData(f"no dataset {lost[0]!r} in the table; there are {', '.join(by_name)}")
    return rows if names is None else [by_name[name] for name in names]


_real = functools.lru_cache(maxsize=1 << 16)(os.path.realpath)           # of folders only: a row costs no walk up the tree


def whole_shards(files):
    """BadData where shards NAME-00000-of-00003 are not all there, or those of an older division lie beside them."""
    found = collections.defaultdict(set)
    for path in files:
        if m := re.fullmatch(r"(.*)-(\d+)-of-(\d+)(?:-[0-9a-f]{16})?\.\w+", path):
            found[m[1]].add((int(m[3]), int(m[2])))
    for name, shards in found.items():
        of = sorted({n for n, _ in shards})
        if len(of) > 1:
            raise BadData(f"{name}: shards of {' and of '.join(map(str, of))} lie side by side")
        if lost := sorted(set(range(of[0])) - {i for _, i in shards}):
            raise BadData(f"{name}: of {of[0]} shards {len(lost)} are missing, the first is {lost[0]}")


class Media:
    """A row of TRAIN or EVAL on a root: opens its tables and finds what they refer to, pictures and clips, in its media folders.

    ROOT cannot be left: not by '..', not by an absolute path, not through a symbolic link. (So a hub cache, whose snapshots link to blobs
    elsewhere, is no root; `hf download --local-dir` writes real files.)
    """

    def __init__(self, spec, root, frames=None):
        self.spec, self.root, self.name = spec, os.path.realpath(root), spec["name"]
        self.frames = frames or spec["frames"] or FRAMES           # the caller's, the row's, VLM2Vec's

    def inside(self, relative, folder=""):
        """A path relative to a folder of ROOT -> the absolute one; BadData if it is empty, absolute or leads out."""
        if not isinstance(relative, str) or not relative or re.search("[\0\ud800-\udc7f\udd00-\udfff]", relative):        # no file has such a name
            raise BadData(f"{relative!r} is not a path")
        path = os.path.normpath(os.path.join(self.root, folder, relative))
        real = os.path.join(_real(os.path.dirname(path)), os.path.basename(path))
        real = os.path.realpath(real) if os.path.islink(real) else real            # only a link needs the walk
        out = os.path.isabs(relative) or ".." in re.split(r"[/\\]", relative)
        if out or not os.path.join(real, "").startswith(os.path.join(self.root, "")):
            raise BadData(f"path {relative!r} leaves the root (it is {real})")
        return path

    def find(self, relative, what="picture"):
        """Absolute path of a picture (or "clip folder") in the first of the media folders that has it (or it by another name, for a list)."""
        folders, there = self.spec["media"], os.path.isdir if what == "clip folder" else os.path.isfile
        names = relative if isinstance(relative, list) else [relative]
        for folder, name in itertools.product(folders, names):
            if there(path := self.inside(name, folder)):
                return path
        raise BadData(f"{what} {' or '.join(map(repr, names))} is missing (looked in {', '.join(f or '.' for f in folders[:3])}{', ...' * (len(folders) > 3)})")

    def picture(self, ref):
        """A path of the data -> an absolute one; None or "" -> None; a Picture is one already."""
        if ref is None or ref == "" or isinstance(ref, Picture):
            return ref or None
        if not isinstance(ref, str):
            raise BadData(f"{ref!r} is not a path")
        return self.find(ref)

    def clip(self, video, n=0):
        """Video name -> {"frames", "fps"}; n = None takes every frame there is."""
        frames = frames_of(self.find(video, "clip folder"), self.frames if n == 0 else n)
        for path in filter(os.path.islink, frames):
            self.inside(os.path.relpath(path, self.root))
        return {"frames": frames, "fps": self.spec["fps"]}

    def table(self, required, optional, split, config="", part=""):
        """The Table of a config or part: the shards, sorted, of the first pattern that matches any ('*' matches no dot files such as
        AppleDouble's). Missing where the root has none; BadData where another part of it was there."""
        hub = self.spec["hub"]
        fill = dict(hub=hub, repo=os.path.basename(hub), name=self.name, split=split, config=config, part=part)
        fill = {key: glob.escape(value) for key, value in fill.items()}
        for pattern in self.spec["table"]:
            try:
                pattern = os.path.normpath("./" + pattern.format(**fill))
            except (LookupError, ValueError) as e:
                raise BadData(f"{self.name}: table {pattern!r} is no pattern ({type(e).__name__}: {e}); it may hold {', '.join(fill)}") from None
            files = [f for f in sorted(glob.glob(pattern, root_dir=self.root)) if f.endswith((".parquet", ".jsonl", ".json"))]
            try:
                if files := [f for f in map(self.inside, files) if os.path.isfile(f)]:
                    whole_shards(files)
                    return Table(files, required, optional, self.spec["cap"])
            except BadData as e:
                raise named(e, self.name) from None
        parts, configs = ("corpus", "qrels", "queries") if part else [""], map(glob.escape, listed(self.spec["config"]) or [""])
        others = [{**fill, "part": p, "config": c} for p, c in itertools.product(parts, configs)]                # is another part of it there?
        there = any(glob.glob(os.path.normpath("./" + pattern.format(**other)), root_dir=self.root) for pattern in self.spec["table"] for other in others)
        raise (BadData if there else Missing)(
            f"{self.name}: no {part or config or 'table'} in {self.root} (looked for {self.spec['table'][0].format(**fill)})")


# ---------------------------------------------------------------------------------------------------------------------
# Training: one parser per kind of source, row -> (query item, target item, [hard negative items])

def mmeb_pair(m, row):
    """MMEB's own columns. Hard negatives (text, picture or both; one, or lists of them) are kept: VLM2Vec reads and drops them."""
    side = lambda row, text, path: item(cell(row, text, "text?").replace(IMG, ""), m.picture(row[path]))
    texts, paths = listed(row.get("neg_text")), listed(row.get("neg_image_path"))
    if texts and paths and len(texts) != len(paths):
        raise BadData(f"{len(texts)} neg_text for {len(paths)} neg_image_path")
    negatives = itertools.zip_longest(texts, paths)
    return side(row, *PAIR[:2]), side(row, *PAIR[2:]), [side(dict(neg_text=text, path=path), "neg_text", "path")
                                                        for text, path in negatives if text or path]


def video_pair(m, row):
    """LLaVA-Hound's conversation about a clip, used in three ways: clip -> caption, caption -> clip, clip and question -> answer."""
    turns, kind = row["conversations"], m.spec["parser"]
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(t, dict) and isinstance(t.get("value"), str) for t in turns[:2]):
        raise BadData("conversations is not a list of two turns with a value")
    asked, answer, clip = turns[0]["value"].replace("<video>", ""), turns[1]["value"], m.clip(cell(row, "video"))
    if not answer:
        raise BadData("conversations: the answer is empty")
    if kind == "video_retrieval":
        return (item("Find a video that contains the following visual content: " + answer),
                item("Understand the content of the provided video: ", video=clip), [])
    return item("Answer a question based on the content of a video. " * (kind == "video_qa") + asked, video=clip), item(answer), []


def page_pair(m, row):
    """Pages. colpali_train_set is used as question answering: page and question -> answer (its own long prompts are left out, as VLM2Vec does);
    VisRAG as text -> page. The odd spaces are VLM2Vec's: f"{prompt} {query} {token}" of a prompt ending in a space, token or query empty."""
    query, page = cell(row, "query", "text?"), m.picture(row["image"])
    if m.spec["parser"] == "page_qa":
        return item(" " + query, page), item(cell(row, "answer", "text?")), []
    before, after = VISRAG.get(cell(row, "source", "text?"), ("", ""))
    return item(f"{before}  {query} " if before else f"{query} "), item(f"{after}  " if after else " ", page), []


PAIR, TALK = ["qry", "qry_image_path", "pos_text", "pos_image_path"], ["video", "conversations"]
TRAIN_PARSERS = {  # name: (row -> pair, columns that must be there, columns that may be, columns of each side: all empty = row dropped)
    "mmeb":    (mmeb_pair, PAIR, ["neg_text", "neg_image_path"], [PAIR[:2], PAIR[2:]]),
    "page_qa": (page_pair, ["query", "image", "answer"], [], [["query", "image"], ["answer"]]),
    "page":    (page_pair, ["query", "image"], ["source"], [["query"], ["image"]]),
    **{kind: (video_pair, TALK, [], [TALK[:1], TALK[1:]]) for kind in ("video_caption", "video_retrieval", "video_qa")}}


class Source(Media):
    """A row of TRAIN opened. Rows with an empty side are dropped and counted, as the reference does: out of the first `cap`, not before."""

    def __init__(self, spec, root, split, on_bad="stop"):
        super().__init__(spec, root)
        self.parse, required, optional, sides = TRAIN_PARSERS[spec["parser"]]
        self.rows = self.table(required, optional, spec["split"] or split, spec["config"])
        try:
            empty = self.rows.empty(sides, on_bad)
        except BadData as e:
            raise named(e, self.name) from None
        self.keep, self.dropped = np.flatnonzero(~empty).astype(np.int32), int(empty.sum())          # keep: usable rows, 4 bytes each
        if not len(self.keep):
            raise BadData(f"{self.name}: no usable row in {self.rows.parts[0][0]} ({len(empty)} rows, all with an empty side)")

    def id(self, row):
        """Usable row -> "Name/row in its table"."""
        return f"{self.name}/{self.keep[row]}"

    def pair(self, row):
        """-> {"id", "dataset", "query": item, "target": item, "negatives": [items]}, pictures as references."""
        if not 0 <= row < len(self.keep):
            raise IndexError(f"{self.name} has {len(self.keep)} usable rows, row {row} was asked for")
        try:
            query, target, negatives = self.parse(self, self.rows[int(self.keep[row])])
            if {"text": ""} in (query, target, *negatives):
                raise BadData("a side is empty but for the marker of a picture that is not given")
        except BadData as e:
            raise named(e, self.id(row)) from None
        return {"id": self.id(row), "dataset": self.name, "query": query, "target": target, "negatives": negatives}


def as_it_is(pair):
    return pair


class TrainData:
    """Sources by number, their usable rows by number; pairs are built when asked for.

    names, sizes (usable rows) and weights by source; dropped {name: rows with an empty side}; missing [names the root does not have];
    bad {id or name: why it was skipped}, filled under on_bad="skip" while the data is read.
    """

    def __init__(self, sources, missing, bad, on_bad):
        self.sources, self.missing, self.bad, self.on_bad = sources, missing, bad, on_bad
        self.names, self.sizes = [s.name for s in sources], [len(s.keep) for s in sources]
        self.weights, self.dropped = [float(s.spec["weight"]) for s in sources], {s.name: s.dropped for s in sources}

    def pair(self, source, row):
        """One pair, pictures as references (see Source.pair)."""
        return self.sources[source].pair(row)

    def usable(self, source, row, found, load=True, read=as_it_is):
        """read() of one pair, its pictures decoded or not. A bad one stops the run, or (on_bad="skip") goes into found {id: why}, and the table's next
        row takes its place."""
        for at in itertools.chain(range(row, self.sizes[source]), range(row)):
            try:
                pair = self.pair(source, at)
                if load:
                    pair |= {"query": decoded(pair["query"]), "target": decoded(pair["target"]), "negatives": [*map(decoded, pair["negatives"])]}
                return read(pair)
            except ValueError as e:                               # BadData, or what read() could not use
                error = named(e, name := self.sources[source].id(at))
                if self.on_bad == "stop":
                    raise error from None
                found[name] = str(error)
        raise BadData(f"{self.names[source]}: not one usable row; first: {next(iter(found.values()))}", found.values())

    def fetch(self, source, row, load=True, read=as_it_is):
        """usable(), what it finds noted."""
        found = {}
        pair = self.usable(source, row, found, load, read)
        self.note(found)
        return pair

    def note(self, found):
        """Each bad row is counted and named once."""
        for name, error in found.items():
            if name not in self.bad:
                self.bad[name] = error
                tqdm.write(f"skipped ({len(self.bad)} so far): {error}")

    def stream(self, lists, workers=0, ahead=1, load=True, read=as_it_is):
        """Lists of (source, row) -> lists of read(pair), see in_order(). read: what else is to be done where a pair is decoded (train.py: resizing,
        tokenising), that is beside whatever the caller does meanwhile; without torch, whose threads a forked process does not have."""
        def work(refs):
            found = {}
            return [self.usable(*ref, found, load, read) for ref in refs], found

        for pairs, bad in in_order(work, lists, workers, ahead):
            self.note(bad)
            yield pairs


def train_sets(root, names=None, split="original", on_bad="stop", caps=None, weights=None):
    """TrainData of a root. names=None takes what is there and lists the rest in .missing; a name asked for must be there.

    caps and weights ({name: number}) replace the table's. on_bad="skip" leaves out what is broken, counted and named in .bad.
    """
    rows, sources, missing, bad = wanted(tables(root, "train"), names), [], [], {}
    for row in rows:
        own = {key: given[row["name"]] for key, given in (("cap", caps), ("weight", weights)) if row["name"] in (given or {})}
        try:
            source = Source({**row, **own}, root, split, on_bad)
            if on_bad == "skip":                                  # of a table without its pictures nothing can take a broken row's place
                TrainData([source], [], {}, on_bad).usable(0, 0, {})
            sources.append(source)
        except Missing:
            if names is not None:
                raise
            missing.append(row["name"])
        except BadData as e:
            if on_bad == "stop":
                raise
            bad[row["name"]] = str(e)
            tqdm.write(f"skipped: {e}")
    if not sources:
        raise BadData(f"{root}: none of the {len(rows)} training datasets can be used" + "".join(f"; {why}" for why in [*bad.values()][:1]))
    return TrainData(sources, missing, bad, on_bad)


class Sampler:
    """Endless global batches [(source, row), ...]: an iterator whose whole state is a step and a count per source.

    A rank takes its contiguous slice of the global batch, so joining the ranks gives the stream of one. A walk that ends inside a sub-batch
    goes on with the next epoch's order; a source smaller than a sub-batch repeats rows in it (the loss masks equal targets).
    first: where in each source the `sizes` rows begin (0 by default), so that stages can have rows of their own.
    """

    def __init__(self, sizes, weights, batch, sub_batch, seed=0, rank=0, world=1, first=None):
        weights = np.asarray(weights, np.float64)
        if len(sizes) != len(weights) or not np.isfinite(weights).all() or (weights < 0).any() or not weights.sum() > 0:
            raise ValueError(f"the sampler wants a weight >= 0 per source and one above 0, got {weights.tolist()} for {len(sizes)} sources")
        if any(size < 1 for size, w in zip(sizes, weights) if w > 0):
            raise ValueError(f"a source with a weight has no rows: sizes {list(sizes)}")
        if sub_batch < 1 or batch % sub_batch or batch % world or not 0 <= rank < world:
            raise ValueError(f"batch {batch} must be a multiple of sub_batch {sub_batch} and of world {world}, and rank {rank} below world")
        self.first = list(first) if first is not None else [0] * len(sizes)
        self.sizes, self.p, self.batch, self.sub, self.seed = list(sizes), weights / weights.sum(), batch, sub_batch, seed
        self.rank, self.world, self.step, self.taken = rank, world, 0, [0] * len(self.sizes)
        self.orders = {}                                          # source: (epoch, shuffled rows); only the current epoch's, 4 bytes a row

    def order(self, source, epoch):
        """The shuffled walk over a source in one epoch."""
        if self.orders.get(source, (None,))[0] != epoch:
            walk = np.random.default_rng([1, self.seed, source, epoch]).permutation(self.sizes[source])
            self.orders[source] = (epoch, walk.astype(np.int32))
        return self.orders[source][1]

    def __iter__(self):
        return self

    def __next__(self):
        """This rank's batch / world pairs of the next global batch."""
        out = []                                                  # the global batch; every rank draws it whole
        for source in np.random.default_rng([0, self.seed, self.step]).choice(len(self.p), self.batch // self.sub, p=self.p).tolist():
            need = self.sub
            while need:
                epoch, at = divmod(self.taken[source], self.sizes[source])                # where this source's walk stands
                rows = self.order(source, epoch)[at:at + need].tolist()
                out += [(source, self.first[source] + row) for row in rows]
                need -= len(rows)                                 # > 0 when the epoch ended: on with the next one
                self.taken[source] += len(rows)
        self.step += 1
        share = self.batch // self.world
        return out[self.rank * share:(self.rank + 1) * share]

    def state(self):
        """All there is to save, as JSON; under 200 bytes for a few sources."""
        return {"seed": self.seed, "step": self.step, "taken": list(self.taken), "sizes": list(self.sizes), "batch": [self.batch, self.sub]}

    def load(self, state):
        """Goes on where state() was taken; the world size may differ, the data and the batch may not."""
        if lost := [k for k, v in self.state().items() if k not in ("step", "taken") and state.get(k) != v]:
            raise ValueError(f"this sampler state is of another run: {lost[0]} was {state.get(lost[0])}, is {self.state()[lost[0]]}")
        self.step, self.taken = int(state["step"]), [int(n) for n in state["taken"]]


def batches(data, sampler, workers=0, steps=None, load=True, read=as_it_is):
    """Batches of pairs, in the sampler's order whatever the number of workers. sampler.state() is always that of the batch last handed out.
    With workers the next batch is read while this one is used; for `read` see TrainData.stream."""
    ahead = copy.deepcopy(sampler)                                # runs before the one whose state counts
    drawn = itertools.islice(ahead, steps)
    share = sampler.batch // sampler.world
    lists, each = (refs[at : at + CHUNK] for refs in drawn for at in range(0, share, CHUNK)), -(-share // CHUNK)
    stream = data.stream(lists, workers, each + 2 * workers, load, read)
    try:
        while batch := [pair for pairs in itertools.islice(stream, each) for pair in pairs]:                    # raises here what a worker met
            next(sampler)
            yield batch
    finally:
        stream.close()


# ---------------------------------------------------------------------------------------------------------------------
# Worker processes. Threads decode as fast (Pillow works outside the interpreter lock) and hand over for nothing, but what is Python in reading and
# tokenising would take its turns with the trainer's. A pool of the standard library sends ten times a picture's file through a pipe. So: processes,
# and memory that both sides see. What each makes of the same cores: bench(), results/bench_data.json.

CHUNK = 2                    # pairs a worker is asked for at a time
ARENA = 4 << 30              # bytes of each worker's shared memory, of which only what has been written takes any


def unpacked(pixels, size):
    """uint8 (w * h * 4), Pillow's own layout -> an RGB picture on this very memory."""
    return Image.fromarrow(pa.FixedSizeListArray.from_arrays(pa.array(pixels), 4), "RGB", size)


class Packer(pickle.Pickler):
    """Pickles an RGB picture as the array that it is in memory: arrays can leave a pickle (protocol 5), so that their bytes are copied once, not thrice."""

    def reducer_override(self, x):
        if not isinstance(x, Image.Image) or x.mode != "RGB":
            return NotImplemented
        try:
            return unpacked, (np.frombuffer(pa.array(x).buffers()[-1], np.uint8), x.size)
        except ValueError:                                        # made before the fork, in several pieces of 16 MB: as Pillow pickles it
            return NotImplemented


class Worker:
    """A process that answers tasks with work(task), in order. A fork: it has what its maker has, mapped tables included, and nothing is sent for it.
    Arrays in its answers lie in memory that both see, the rest comes through a pipe. That memory is `slots` slots; an answer has one for itself until
    nothing of it is used any more. most: of answers that are asked for and unread."""

    def __init__(self, work, most, slots):
        self.work, self.most, self.free, self.asked = work, most, [*range(slots)], collections.deque()
        self.size = ARENA // slots
        self.memory = mmap.mmap(-1, ARENA)
        self.pipe, theirs = multiprocessing.Pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                self.serve(theirs)
                os._exit(0)
            except BaseException:                                 # an error in the program: said here, and the maker sees that the pipe has closed
                traceback.print_exc()
            finally:
                os._exit(1)
        theirs.close()

    def serve(self, pipe):
        """What the process does, until its maker is gone or kills it."""
        for sent_to_all in (signal.SIGINT, signal.SIGTERM):       # Ctrl-C, and batch systems, which signal whole groups: the maker may still want
            signal.signal(sent_to_all, signal.SIG_IGN)            # a batch, to finish its step and write a checkpoint
        self.pipe.close()                                         # or the maker's death would not end recv()
        Image.core.set_block_size(1 << 29)                        # every picture in one piece, up to Pillow's limit of 89 Mpx
        Image.core.set_blocks_max(4 * CHUNK)                      # whose memory serves the next: new pages are slow to get
        try:
            while True:
                self.answer(pipe, *pipe.recv())
        except (EOFError, OSError):                               # nobody is there any more
            return

    def answer(self, pipe, slot, task):
        """Does a task and sends what came of it: (whether it went well, the answer or the error), and where in the slot its arrays lie."""
        try:
            answer = True, self.work(task)
        except (ValueError, OSError) as e:                        # of the data: raised where it was asked for. Anything else ends the process
            answer = False, e
        body, spans, room = io.BytesIO(), [], np.frombuffer(self.memory, np.uint8, self.size, slot * self.size)

        def put(buffer):
            """-> whether the buffer stays in the pickle, for want of room."""
            at = -(-spans[-1][1] // 64) * 64 if spans else 0      # as aligned as memory of its own would be
            with buffer.raw() as raw:
                if at + raw.nbytes > self.size:
                    return True
                room[at : at + raw.nbytes] = raw
                spans.append((at, at + raw.nbytes))

        Packer(body, 5, buffer_callback=put).dump(answer)
        pipe.send((body.getvalue(), spans))

    def ask(self, task):
        """One more task."""
        self.asked.append(self.free.pop())
        with contextlib.suppress(OSError):                        # it has ended: next() will say so, after the answers that were still sent
            self.pipe.send((self.asked[-1], task))

    def next(self):
        """The next answer. Its arrays are the shared memory itself while there is enough of that for the answers to come, else copies."""
        try:
            body, spans = self.pipe.recv()
        except (EOFError, OSError):
            code = self.end()
            killed = " (killed, as when memory runs out: fewer --workers take less)" if code == -9 else ""
            raise OSError(f"a worker process ended with exit code {code}{killed}") from None
        slot = self.asked.popleft()
        mine = np.frombuffer(self.memory, np.uint8, self.size, slot * self.size)
        lent = len(self.free) + len(self.asked) >= self.most
        good, answer = pickle.loads(body, buffers=[mine[a:b] if lent else mine[a:b].copy() for a, b in spans])
        if lent:
            weakref.finalize(mine, self.free.append, slot)        # what was loaded keeps it alive
        else:
            self.free.append(slot)
        if good:
            return answer
        try:
            raise answer
        finally:
            del answer                                            # else a circle (error, its traceback, this frame) would hold the memory for a while

    def end(self, kill=False):
        """-> its exit code, minus the signal that ended it. It only reads: nothing is lost when it is killed."""
        if self.pid:
            if kill:
                os.kill(self.pid, signal.SIGKILL)
            self.pid, code = 0, os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            self.pipe.close()
            return code


def in_order(work, tasks, workers, ahead):
    """work(task) for each of tasks, in their order: here, or by so many processes in turn, each task begun at most `ahead` before its answer is wanted."""
    if not workers:
        yield from map(work, tasks)
        return
    ahead = min(ahead, 64 * workers)                              # so many tasks fit into a pipe
    crew, tasks, asked, most = [], iter(tasks), collections.deque(), -(-ahead // workers)
    try:
        while len(crew) < workers:
            crew.append(Worker(work, most, 3 * most))
        turns = itertools.cycle(crew)
        while True:
            for task in itertools.islice(tasks, ahead - len(asked)):
                asked.append(next(turns))
                asked[-1].ask(task)
            if not asked:
                return
            yield asked.popleft().next()
    finally:
        for worker in crew:
            worker.end(kill=True)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation: one parser per kind of test set, row -> a query, its candidates, its positives

class EvalSet(Media):
    """A row of EVAL opened and filled by its parser. With on_bad="skip" a broken candidate or query is noted and left out, else it stops.

    name, modality      as in the row, which is .spec
    metric              hit@1, or ndcg_linear@5 for visdoc
    protocol            what a score of it must be quoted with
    queries, query_ids  items and their names
    candidates          items, one per dedup key; cand_ids the keys; cand_where the rows that they were first met in; index {key: number, or None
                        for a broken one}
    local               per query an array of candidate numbers (repeats kept), or None: every candidate, for all
    positives           per query candidate numbers
    grades              per query the positives' grades, or None
    rows, dropped, bad  rows of the query table; queries left out because something of theirs is broken; every complaint, in words
    """

    def __init__(self, row, root, on_bad, frames, prompts):
        super().__init__(row, root, frames)
        self.modality, self.on_bad, self.prompts, self.protocol = row["modality"], on_bad, prompts, ""
        self.metric, self.where = "ndcg_linear@5" if self.modality == "visdoc" else "hit@1", self.name
        self.queries, self.query_ids, self.candidates, self.cand_ids, self.cand_where, self.index = [], [], [], [], [], {}
        self.local, self.positives, self.grades, self.rows, self.dropped, self.bad = [], [], [], 0, 0, []
        self.asked = {}                              # of the parser pairs: query -> its number
        self.config = self.spot = ""                 # of several tables one after the other: which is being read, and where in it
        self.fault = functools.cache(fault_of) if on_bad == "skip" else None         # a run that must not stop later looks at every picture now

    def complain(self, error):
        """Up with it, or into the notes, under the name of the row being read."""
        error = named(error, self.where + self.spot)
        if self.on_bad == "stop":
            raise error from None
        self.bad.append(str(error))

    def each(self, table, prefix, parse, limit=None, start=0):
        """parse(self, row) for every row, until there are `limit` queries -> how many rows were bad."""
        bad = 0
        for i in range(len(table)):
            if limit and len(self.queries) == limit:
                break
            self.where = f"{prefix}{start + i}"
            self.spot = f" (row {i} of {self.config})" if len(listed(self.spec["config"])) > 1 else ""
            try:
                parse(self, table[i])
            except BadData as e:
                self.complain(e)
                bad += 1
        return bad

    def say(self, full, inst, content, image=None, video=None):
        """VLM2Vec's one string, or Qwen's instruction (system turn) and content apart. Qwen's targets have no instruction."""
        if self.prompts == "vlm2vec":
            return item(full, image, video)
        return item(content, image, video, inst.strip().removesuffix("Question:").strip())

    def cand(self, key, make):
        """Index of the candidate with this dedup key, made when first met (a later one with that key is the same one); None if broken."""
        if key not in self.index:
            self.index[key] = None
            try:
                made = look(make(), self.fault)
            except BadData as e:
                self.complain(e)
                return None
            self.index[key] = len(self.candidates)
            self.candidates.append(made)
            self.cand_ids.append(key)
            self.cand_where.append(self.where + self.spot)
        return self.index[key]

    def query(self, made, cands, positives, grades=None, qid=None):
        """One query with its candidates and positives, both as what cand() gave."""
        if any(p is None for p in positives) or not positives:
            raise BadData("its positive is broken or there is none")
        self.queries.append(look(made, self.fault))
        self.query_ids.append(qid or self.where)                   # "Name/row in its table" where the data has no id
        self.local.append(np.array([c for c in cands if c is not None], np.int64))        # a broken candidate is not ranked
        self.positives.append(list(dict.fromkeys(positives)))      # a clip may be listed twice (MomentSeeker)
        self.grades.append(grades)


def image_set(b, row):
    """The 36 image sets. Query: T + " " + instruction [+ " " + text], " \\n" -> "\\n", + tail; then the token T goes.

    Candidates are raw texts (key = the text), or pictures with an instruction and, where the first one is not blank (WebQA, EDIS, OVEN,
    ...), captions: in image_t2i the key is the path alone, so one path with another caption collapses; in image_i2i_vg it is path:caption
    (several objects of one picture are targets in RefCOCO-Matching). The positive is the first.
    """
    kind, tail, squeeze = b.spec["parser"], b.spec["tail"], lambda text: text.replace(" \n", "\n")
    inst, text = cell(row, "qry_inst").replace(IMG, ""), cell(row, "qry_text", "text?")
    if kind in ("image_t2i", "image_i2i_vg"):
        told, paths = cell(row, "tgt_inst").replace(IMG, ""), cell(row, "tgt_img_path", "texts")
        captions = [""] * len(paths) if row["tgt_text"] in (None, [], [""]) else cell(row, "tgt_text", "texts")
        if len(captions) != len(paths):
            raise BadData(f"{len(captions)} tgt_text for {len(paths)} tgt_img_path")
        blank, end = not captions[0].strip(), "\n" if kind == "image_t2i" else ""         # no newline after blank captions in i2i_vg
        full = lambda caption: squeeze(f" {told}") + end if blank else squeeze(f" {told} {caption}") + "\n"
        cands = [b.cand(path if kind == "image_t2i" else path + ":" + caption.strip('"'),
                        lambda: b.say(full(caption), "", "" if blank else caption.strip(), image=b.find(path)))
                 for path, caption in zip(paths, captions)]
    else:
        cands = [b.cand(answer, lambda: b.say(answer, "", answer)) for answer in cell(row, "tgt_text", "texts")]
    if kind == "image_t2i":                          # no picture, though a stray token may be there (WebQA)
        return b.query(b.say(f"{inst} {text}{tail}", inst, text), cands, cands[:1])
    lead = inst if kind in ("image_cls", "image_i2t") else "\n" + inst.strip()         # two of VLM2Vec's parsers strip, two do not
    image = b.find(cell(row, "qry_img_path"))
    b.query(b.say(squeeze(f" {lead}" + (" " + text if text else "")) + tail, inst, text, image), cands, cands[:1])


def video_cls(b, row):
    """Global over the label list (not only the labels that occur: 1000 clips do not show all 700), or local over neg_text (SmthSmthV2)."""
    label = cell(row, "pos_text")
    texts = cell(row, "neg_text", "texts") if b.spec["scope"] == "local" else b.labels or [label]
    if label not in texts:
        raise BadData(f"the label {label!r} is not among its {len(texts)} options")
    cands = [b.cand(text, lambda: b.say(text, "", text)) for text in (texts if b.spec["scope"] == "local" else [label])]
    video = b.clip(cell(row, "video_id", "id"))
    b.query(b.say(" " + b.spec["inst"], b.spec["inst"], "", video=video), cands, [b.index[label]])


VIDEO_QA = {  # parser: (column of the clip's name, what its folder has before that name, columns of the options; none: yes or no)
    "videomme": ("videoID", "", ["options"]), "egoschema": ("video_idx", "", ["option"]), "mvbench": ("video", "{config}/", ["candidates"]),
    "nextqa": ("video", "", ["a0", "a1", "a2", "a3", "a4"]), "activitynetqa": ("video_name", "v_", [])}


def video_qa(b, row):
    """Multiple choice about a clip; key = the option as listed, text = what is embedded."""
    kind, question = b.spec["parser"], cell(row, "question")
    column, before, columns = VIDEO_QA[kind]
    options = [cell(row, c) for c in columns] if len(columns) > 1 else ["yes", "no"]
    options = cell(row, columns[0], "texts") if len(columns) == 1 else options
    # 'C. Berries.' -> 'Berries'. (Upstream takes the last letter of an option that has no '. '; we take the option.)
    bare = [(o[o.find(". "):] if ". " in o else o).strip(". ") for o in options]
    lettered = [f"({chr(65 + i)}) {o}" for i, o in enumerate(options)]
    asked, names, texts, spelled = {                 # the question, the options as keys and as texts, how the answer names each of them
        "videomme": (question + "\n" + "\n".join(options), options, bare, "ABCDEFGH"),
        "egoschema": (question + " ".join(options), options, bare, "01234567"),           # nothing before 'A.': theirs
        "nextqa": ("\n".join([question, "Options:", *lettered]).rstrip(), options, options, "01234567"),
        "mvbench": ("\n".join([question, "Options:", *lettered]).rstrip(), lettered, lettered, options),
        "activitynetqa": (question + "? (A) yes; (B) no.", options, options, options)}[kind]
    answer = cell(row, "answer", "id") if spelled is options else cell(row, "answer", "id").strip()
    if answer not in (spelled := list(spelled)[:len(options)]):
        raise BadData(f"the answer {answer!r} is not among its {len(options)} options")
    cands = [b.cand(name, lambda: b.say(text, "", text)) for name, text in zip(names, texts)]
    clip = b.clip(before.format(config=b.config) + cell(row, column, "id"))
    right = len(spelled) - 1 - spelled[::-1].index(answer)        # where it stands twice (MVBench) the last, as upstream
    b.query(b.say(f" {b.spec['inst']} {asked}", b.spec["inst"], asked, video=clip), cands, [cands[right]])


def stem(path):
    """Video name without folders and without a video ending (DiDeMo has .mov, .m4v, .3gp, ...); QVHighlight's ..._210.0 is no ending."""
    return re.sub(r"\.(?=\d*[a-z])[a-z\d]{2,4}$", "", os.path.basename(path), flags=re.I)


def target_clip(b, key, path, n=0):
    """Index of a candidate that is a clip."""
    return b.cand(key, lambda: b.say(" " + b.spec["tgt"], "", "", video=b.clip(path, n)))


def video_ret(b, row):
    """Caption -> video among all videos; key = the video's id. Where a video has several captions the first is the query."""
    (id_column, column), inst = b.spec["columns"], b.spec["inst"]
    video = cell(row, id_column, "id")
    video = stem(video) if id_column == "video" else video          # DiDeMo names a file, the others have ids
    caption = cell(row, column, "texts")[0] if isinstance(row[column], list) else cell(row, column)
    target = target_clip(b, video, video)
    b.query(b.say(f"{inst} {caption}", inst, caption), [target], [target])


def moment(b, row):
    """Clips of one video: every folder beside query/ is a candidate, positive* the right one; key = the clip's folder (ours under ROOT)."""
    video, inst, text = stem(cell(row, "video_path", "id")), b.spec["inst"], cell(row, "query")
    folder = b.find(video, "clip folder")
    clips = sorted((c for c in os.listdir(folder) if c != "query" and c[0] != "." and os.path.isdir(os.path.join(folder, c))), key=natural)
    cands = [target_clip(b, os.path.relpath(os.path.join(folder, c), b.root), f"{video}/{c}") for c in clips]
    b.query(b.say(f" {inst} {text}", inst, text, video=b.clip(f"{video}/query")), cands,
            [i for c, i in zip(clips, cands) if c.startswith("positive")])


SEEK = {".mp4": " Find the clip that corresponds to the given sentence and video segment:",
        ".jpg": " Select the video clip that aligns with the given text and image:",
        "": "Find the clip that corresponds to the given text:"}


def momentseeker(b, row):
    """Several positives; the query is text, text and picture, or text and clip; all frames there are (8) are taken."""
    text, given = cell(row, "query", "text?"), cell(row, "input_frames", "text?")
    kind = next(ending for ending in SEEK if given.endswith(ending))         # "" fits what is left: a query of text alone
    if given and not kind or not given and not text:
        raise BadData(f"input_frames {given!r} is no .mp4 and no .jpg" if given else "neither query nor input_frames")
    flat = lambda path: "video_frames/" + path.replace("/", "_").split(".mp4")[0]
    image = b.picture(f"query_{given}") if kind == ".jpg" else None
    video = b.clip(flat(given), None) if kind == ".mp4" else None
    cands = {}
    for column in ("positive_frames", "negative_frames"):
        if not all(isinstance(c, dict) and "output_path" in c for c in listed(row[column])):
            raise BadData(f"column {column} is not a list of clips with an output_path")
        paths = [flat(cell(c, "output_path")) for c in listed(row[column])]
        cands[column] = [target_clip(b, path, path, None) for path in paths]
    full = SEEK[kind] + f" {text}" * bool(text)
    b.query(b.say(full, SEEK[kind], text, image, video), sum(cands.values(), []), cands["positive_frames"])


def pairs(b, row):
    """A user's own test set in the columns of MMEB-train: all targets are candidates; equal queries are one, with several positives."""
    query, target, _ = mmeb_pair(b, row)
    if {"text": ""} in (query, target):
        raise BadData("a side is empty")
    key, name = (json.dumps([row[text] or "", row[path] or ""], ensure_ascii=False) for text, path in (PAIR[:2], PAIR[2:]))
    found = b.cand(name, lambda: target)
    if key in b.asked and found is not None:
        positives = b.positives[b.asked[key]]
        positives += [found] * (found not in positives)
    else:
        b.query(query, [found], [found])
        b.asked[key] = len(b.queries) - 1


def short_name(page):
    """VisRAG's page ids are longer than a file name may be: VLM2Vec cuts them and adds a hash."""
    base, ending = os.path.splitext(page)
    return f"{base[:50]}_{hashlib.md5(page.encode()).hexdigest()[:8]}{ending}"


def beir(b, limit):
    """queries + corpus + qrels -> text query, every page a candidate, graded positives. Ids are compared as text, whatever their type."""
    spec, pages, asked, relevant = b.spec, set(), set(), collections.defaultdict(dict)

    def corpus(b, row):
        """A page: its picture is in the table, or lies in the media folders as the table says, NAME.png (ViDoRe) or short_name(NAME) (VisRAG)."""
        page = cell(row, "corpus-id", "id")
        if page in pages:
            raise BadData(f"corpus-id {page!r} occurs twice")
        pages.add(page)                                  # also a broken one: a qrel that names it is not at fault
        find = lambda ref: ref if isinstance(ref, Picture) else b.find([*listed(ref or None), f"{page}.png", short_name(page)])
        b.cand(page, lambda: b.say(" " + spec["tgt"], "", "", image=find(row["image"])))

    def qrels(b, row):
        """How relevant a page is to a query: 0 (not at all) ... 3."""
        page, score = cell(row, "corpus-id", "id"), row["score"]
        if page not in pages:
            raise BadData(f"corpus-id {page!r} names no document of the corpus")
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not abs(score) <= 100:          # 2^grade must be a number
            raise BadData(f"score is {score!r}")
        if score > 0:                                    # a duplicate keeps the higher grade
            of = relevant[cell(row, "query-id", "id")]
            of[page] = max(of.get(page, 0), score)

    def queries(b, row):
        """A question; its pages are known by now."""
        if spec["language"] and row["language"] != spec["language"]:
            return
        qid, text = cell(row, "query-id", "id"), cell(row, "query")
        if qid in asked:
            raise BadData(f"query-id {qid!r} occurs twice")
        asked.add(qid)
        right = {b.index[page]: score for page, score in relevant[qid].items() if b.index.get(page) is not None}
        b.query(b.say(f"{spec['inst']} {text}", spec["inst"], text), [], list(right), list(right.values()), qid)

    for parse, required, optional in ((corpus, ["corpus-id"], ["image"]), (qrels, ["query-id", "corpus-id", "score"], []),
                                      (queries, ["query-id", "query"], ["language"])):
        table, part = b.table(required, optional, spec["split"], part=parse.__name__), parse.__name__         # the last one's counts stay
        b.rows, b.dropped = len(table), b.each(table, f"{b.name}/{part} row ", parse, limit if part == "queries" else None)


IMAGE = ["qry_inst", "qry_text", "qry_img_path"]
EVAL_PARSERS = {  # name: (row -> query and candidates, columns that must be there, columns that may be)
    **{kind: (image_set, [*IMAGE, "tgt_text"], []) for kind in ("image_cls", "image_i2t", "image_qa")},
    "image_t2i":    (image_set, [*IMAGE[:2], "tgt_inst", "tgt_img_path"], ["tgt_text"]),
    "image_i2i_vg": (image_set, [*IMAGE, "tgt_inst", "tgt_img_path"], ["tgt_text"]),
    "video_cls":    (video_cls, ["video_id", "pos_text"], ["neg_text"]),
    **{kind: (video_qa, [video, "question", "answer", *options], []) for kind, (video, _, options) in VIDEO_QA.items()},
    "video_ret":    (video_ret, [], []),                          # its columns are the row's
    "moment":       (moment, ["query", "video_path"], []),
    "momentseeker": (momentseeker, ["query", "positive_frames", "negative_frames", "input_frames"], []),
    "pairs":        (pairs, PAIR, []),
    "beir":         (beir, [], [])}                               # reads its three tables itself


def load_eval(root, row, on_bad="stop", limit=None, page_labels="fixed", frames=None, prompts="vlm2vec"):
    """A row of EVAL (or the name of one) -> EvalSet. limit = so many queries (a global set of pages or labels stays whole).

    frames: 8 as VLM2Vec (default), 64 as Qwen3-VL-Embedding. prompts: "vlm2vec" or "qwen". page_labels: "fixed" or "original", named in
    .protocol. Missing where the root has no table of it, else BadData for the first thing broken (on_bad="skip": when nothing is left).
    """
    if prompts not in ("vlm2vec", "qwen") or page_labels not in ("fixed", "original") or on_bad not in ("stop", "skip"):
        raise ValueError(f"prompts {prompts!r}, page_labels {page_labels!r} or on_bad {on_bad!r} is not known")
    spec = wanted(tables(root, "eval"), [row])[0] if isinstance(row, str) else complete(row, "eval")
    spec = {**spec, **(spec["original"] or {})} if page_labels == "original" else spec
    b = EvalSet(spec, root, on_bad, frames, prompts)
    parse, required, optional = EVAL_PARSERS[spec["parser"]]
    b.labels = LABELS[spec["labels"]] if isinstance(spec["labels"], str) else spec["labels"] or []
    for label in b.labels:                             # candidates 0, 1, ... whether a clip shows them or not
        b.cand(label, lambda: b.say(label, "", label))
    if parse is beir:
        beir(b, limit)
    for b.config in [] if parse is beir else listed(spec["config"]) or [""]:
        table = b.table(required or spec["columns"], optional, spec["split"], b.config)
        b.dropped += b.each(table, f"{b.name}/", parse, limit, b.rows)
        b.rows += len(table)
    if not b.queries:
        raise BadData(f"{b.name}: not one usable query in {b.rows} rows" + "".join(f"; first: {why}" for why in b.bad[:1]), b.bad)
    b.local = b.local if spec["scope"] == "local" else None            # None: everything in .candidates, for every query
    b.grades = b.grades if parse is beir else None                     # only pages are graded
    b.protocol = (f"{b.frames} frames, " * (spec["modality"] == "video") + f"{prompts} prompts"
                  + f", page labels: {page_labels}" * bool(spec["original"]))
    return b


# ---------------------------------------------------------------------------------------------------------------------
# python data.py --check ROOT

def check_one(spec, kind, root, page_labels="fixed"):
    """One dataset looked at whole, every picture decoded, of test clips every frame (a run may take fewer) -> (status, rows, usable rows, [what is
    wrong]). Its status is

    found | short (fewer rows than published) | broken | missing (no table, or a table of which not one picture is there).
    """
    bad, usable, rows, fault = [], 0, 0, functools.cache(fault_of)
    try:
        if kind == "eval":
            found = load_eval(root, spec, on_bad="skip", page_labels=page_labels, frames=sys.maxsize)           # all of a clip's
            rows, usable, bad = found.rows, len(found.queries), found.bad
        else:
            source = Source(spec, root, "original", on_bad="skip")
            rows = len(source.rows)
            for row in range(len(source.keep)):
                try:
                    pair = source.pair(row)
                    for side in (pair["query"], pair["target"], *pair["negatives"]):
                        look(side, fault)
                    usable += 1
                except BadData as e:
                    bad.append(str(named(e, source.id(row))))
    except Missing:
        return "missing", 0, 0, []
    except BadData as e:
        bad += e.all
    if bad:                                          # a table without a single one of its pictures is not broken: they were never fetched
        return "missing" if not usable and all(" is missing (looked in " in why for why in bad) else "broken", rows, usable, bad
    return "short" if rows < (spec["rows" if kind == "train" else "queries"] or 0) else "found", rows, usable, bad


def downloads(spec, root, fetch=False):
    """The commands that bring one dataset; with fetch they are run (archives are then unpacked by the printed command, not by us)."""
    mine, commands = [f"{spec['name']}/*"] if "{hub}/{name}/" in spec["table"][0] else [], []
    wants = [(spec["hub"], mine, "")] + [(hub, [pattern], unpack) for hub, pattern, unpack in spec["fetch"]]
    for hub, patterns, unpack in wants if spec["hub"] else []:
        folder = os.path.join(root, hub)
        commands.append(f"hf download {hub} --repo-type dataset --local-dir {folder}" + "".join(f" --include '{p}'" for p in patterns)
                        + f" && (cd {folder} && {unpack})" * bool(unpack))
        try:
            if fetch:
                from huggingface_hub import snapshot_download
                snapshot_download(hub, repo_type="dataset", local_dir=folder, allow_patterns=patterns or None)
        except Exception as e:           # no network, no such id, no access, no room: whatever the hub's client raises, the dataset is named
            raise BadData(f"{spec['name']}: {hub} could not be fetched ({type(e).__name__}: {e})") from None
    return commands


def check(root, kinds=("train", "eval"), names=None, on_bad="stop", fetch=False, workers=2, page_labels="fixed"):
    """Prints a line per dataset and what is wrong with it. Exit code: 1 = something would stop a run (with on_bad="skip": nothing of a
    dataset is usable), 2 = no dataset at all is there, 0 = else; a dataset of which there is no table, or that is short, is no error."""
    todo = [(spec, kind) for kind in kinds for spec in tables(root, kind) if names is None or spec["name"] in names]
    if lost := set(names or []) - {spec["name"] for spec, _ in todo}:
        raise BadData(f"no dataset {sorted(lost)[0]!r} in the table")
    count, fatal, verdict = collections.Counter(), 0, lambda job: check_one(*job, root, page_labels)
    for job in todo if fetch else []:
        if verdict(job)[0] in ("missing", "short"):
            downloads(job[0], root, fetch)
    with ThreadPoolExecutor(workers) as pool:
        verdicts = tqdm(pool.map(verdict, todo), total=len(todo), desc="checking", disable=None)
        for (spec, kind), (status, rows, usable, bad) in zip(todo, verdicts):
            count[status] += 1
            fatal += bool(bad) and (on_bad == "stop" or not usable)
            want = spec["rows" if kind == "train" else "queries"] or "?"
            tqdm.write(f"{status:8s} {kind:5s} {spec['name']:48s} {rows:>8,} of {want:>8} rows, {usable:,} usable"
                       + " queries" * (kind == "eval") + ", more than published: another version of it?" * (want != "?" and usable > want))
            alike = collections.defaultdict(list)                # by what a complaint says without its names and numbers
            for line in bad:
                alike[re.sub(r"'[^']*'|\d+", "", line)].append(line)
            for lines in alike.values():
                most = 20 if len(todo) > 1 else len(lines)
                more = [f"... and {len(lines) - most} more like these; --names {spec['name']} lists them all"] if len(lines) > most else []
                tqdm.write("\n".join(f"         {line}" for line in lines[:most] + more))
            for line in downloads(spec, root) if status != "found" else []:
                tqdm.write(f"         {line}")
    print(", ".join(f"{status}: {count[status]}" for status in ("found", "short", "missing", "broken")))
    return 1 if fatal else 2 if count["missing"] == len(todo) else 0


# ---------------------------------------------------------------------------------------------------------------------
# python data.py --bench: the scale figures, on tables and pictures made for it

def resident():
    """Resident memory of this process in MB (Linux)."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) / 1024 for line in f if line.startswith("VmRSS"))


def children():
    """CPU seconds of the processes that were started here and have ended."""
    used = os.times()
    return used.children_user + used.children_system


def record(figures, out):
    """Prints the figures; with `out` also writes them, and what they were measured on, as JSON."""
    print("\n".join(f"{name}: {figure:,}" for name, figure in figures.items()))
    if out:
        with open("/proc/cpuinfo") as f:
            cpu = next((line.partition(": ")[2].strip() for line in f if line.startswith("model name")), platform.machine())
        versions = {name: importlib.metadata.version(name) for name in ("numpy", "pillow", "pyarrow")} | {"python": platform.python_version()}
        with open(out, "w", encoding="utf-8") as f:
            json.dump({"device": f"{cpu}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f} (this program's included)",
                       "date": time.strftime("%Y-%m-%d"), "versions": versions, "figures": figures}, f, indent=1)


def pillow(path):
    return Image.open(path).convert("RGB")


def decode(paths, read, carry):
    """A batch read and handed back (carry), or each picture dropped at once. -> (seconds of CPU, pictures or None)."""
    start = time.process_time()
    held = [read(path) if carry else read(path).size for path in paths]
    return time.process_time() - start, held if carry else None


def bench_world(root, rows, pictures):
    """`rows` training rows in 20 subsets, texts of random words (real ones compress as badly, so that every table is one that is unpacked and mapped),
    and `pictures` photograph-like JPEGs (smooth noise) of 640 x 480 that they share -> the JPEGs' paths."""
    rng, files = np.random.default_rng(0), [os.path.join(root, MMEB, f"{i}.jpg") for i in range(pictures)]
    ask, n = f"{IMG}\nRepresent the given image with the following question: ", rows // len(MMEB_TRAIN)
    for name, *_ in MMEB_TRAIN:
        os.makedirs(os.path.join(root, MMEB, name))
        words = [" ".join(row) for row in (rng.integers(1 << 16, 1 << 24, (n, 8))).astype(str)]
        table = {"qry": [f"{ask}{text}?\n" for text in words], "qry_image_path": [f"{i}.jpg" for i in rng.integers(0, pictures, n)],
                 "pos_text": [text[:20] for text in words], "pos_image_path": [""] * n}
        pq.write_table(pa.table(table), os.path.join(root, MMEB, name, "original-00000-of-00001.parquet"))
    for file in files:
        Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8)).resize((640, 480), Image.BICUBIC).save(file, quality=90)
    return files


def bench(rows, out, steps=10_000, pictures=256, batch=64):
    """Time to the first batch, memory over 10,000 batches of references, and decoding. Seconds of the clock, and CPU seconds, which other people's
    jobs do not bend. Who decodes, each on all cores:
        pillow          alone: processes that do Image.open(path).convert("RGB"), drop the picture and nothing else
        pillow_keeps    the same, told to keep a freed picture's memory for the next, which spares the system's work; the loader does that too
        threads         the loader's work in threads of this process, batches handed over
        pool            the same in the standard library's pool of processes, which pickles every picture into a pipe
        loader          the loader: pairs read, pictures decoded by its worker processes, batches handed over
    "First batch" begins with nothing unpacked.
    """
    global CACHE
    cores, took = len(os.sched_getaffinity(0)), collections.defaultdict(list)
    workers = lambda keep: ProcessPoolExecutor(cores, multiprocessing.get_context("spawn"), Image.core.set_blocks_max, (keep,))
    with tempfile.TemporaryDirectory() as root, workers(0) as alone, workers(2) as keeping, workers(batch) as pool, \
            ThreadPoolExecutor(cores) as threads:
        CACHE, files, figures = os.path.join(root, "cache"), bench_world(root, rows, pictures), {}
        for again in ("first_batch", "first_batch_again"):        # the second time the tables are unpacked already
            _parquet.cache_clear()
            start, cpu = time.perf_counter(), time.process_time()
            data = train_sets(root, caps={name: None for name, *_ in MMEB_TRAIN})
            sampler = Sampler(data.sizes, data.weights, batch, batch // 4)
            next(batches(data, sampler))
            figures |= {"rows": sum(data.sizes), f"{again}_s": round(time.perf_counter() - start, 2),
                        f"{again}_cpu_s": round(time.process_time() - cpu, 2)}
        figures["mapped_mb"] = round(sum(os.path.getsize(file) for file in glob.glob(f"{CACHE}/*")) / 2**20)
        before, start = resident(), time.perf_counter()
        for _ in tqdm(batches(data, sampler, steps=steps, load=False), total=steps, disable=None):
            pass
        figures |= {"batches": steps, "reference_pairs_per_s": round(steps * batch / (time.perf_counter() - start)),
                    "resident_mb": round(resident()), "resident_growth_mb": round(resident() - before)}
        held = [files[i:i + batch] for i in range(0, pictures, batch)] * 16      # long enough for the loader to reuse memory, as in training
        work = lambda pool, read, carry: sum(seconds for seconds, _ in pool.map(decode, held, itertools.repeat(read), itertools.repeat(carry)))

        def here():
            Image.core.set_blocks_max(batch)
            work(threads, load_picture, True)
            Image.core.set_blocks_max(0)
            return 0.0                                            # what threads spend is this process's anyway

        def loader():
            before = children()
            sum(0 for _ in batches(data, sampler, cores, len(held)))
            return children() - before

        ways = {"pillow": lambda: work(alone, pillow, False), "pillow_keeps": lambda: work(keeping, pillow, False), "threads": here,
                "pool": lambda: work(pool, load_picture, True), "loader": loader}
        for name, way in [*ways.items()] * 5:                     # in turn: the machine may be busy with something else
            wall, cpu = time.perf_counter(), time.process_time()
            there = way()
            spent = time.perf_counter() - wall, there + time.process_time() - cpu
            took[name].append([1000 * seconds / (len(held) * batch) for seconds in spent])
    for name, times in took.items():
        wall, cpu = np.min(times, 0)                              # of the round that was disturbed least by whatever else the machine does
        figures |= {f"{name}_ms": round(float(wall), 2), f"{name}_cpu_ms": round(float(cpu), 2)}
    figures |= {f"{name}_of_{peer}{what}": round(figures[f"{peer}{what}_ms"] / figures[f"{name}{what}_ms"], 2)          # shares of its rate
                for name in ("threads", "pool", "loader") for peer in ("pillow", "pillow_keeps") for what in ("", "_cpu")}
    record(figures, out)


def main():
    """The command line; the exit code is check()'s."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--check", metavar="ROOT", help="look at every dataset of a root")
    add("--train", action="store_true", help="only the training sets")
    add("--eval", action="store_true", help="only the test sets")
    add("--names", help="only these datasets, with commas")
    add("--on_bad", choices=["stop", "skip"], default="stop", help="skip: broken rows are no error while the dataset is usable")
    add("--page_labels", choices=["fixed", "original"], default="fixed", help="ViDoSeek-page and MMLongBench-page")
    add("--fetch", action="store_true", help="download what is missing from the hub (needs a network)")
    add("--workers", type=int, default=os.cpu_count(), help="threads that look at pictures")
    add("--bench", action="store_true", help="measure the loader on generated tables")
    add("--rows", type=int, default=1_000_000, help="rows of the bench")
    add("--out", metavar="FILE.json", help="where the bench's figures go")
    args = parser.parse_args()
    if args.bench:
        return bench(args.rows, args.out)
    if not args.check:
        parser.error("--check ROOT or --bench is wanted")
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: at least 1")
    kinds = [kind for kind in ("train", "eval") if getattr(args, kind)] or ["train", "eval"]
    return check(args.check, kinds, args.names.split(",") if args.names else None, args.on_bad, args.fetch, args.workers, args.page_labels)


# ---------------------------------------------------------------------------------------------------------------------
# Words that are only looked up: the class names of the test sets whose candidates are the whole list, also those that no test clip shows (VLM2Vec's
# video_classification_utils.py), and VLM2Vec's prompts for VisRAG's training pages, {source: [what goes before the query, before the page]}

with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "words.json"), encoding="utf-8") as f:
    LABELS, VISRAG = json.load(f).values()

if __name__ == "__main__":
    try:
        sys.exit(main())
    except BadData as e:
        sys.exit(f"data.py: {e}")
    except BrokenPipeError:                          # `| head` has seen enough
        sys.stdout = None
        sys.exit(1)
