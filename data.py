r"""
MMEB as two tables: the training sources of VLM2Vec-V2 and the 78 test sets of MMEB-V2.

The idea. A benchmark is a table, not code. Every dataset is a row of mmeb.json (see Row below):
where its files lie, which columns they have, which prompts go with them. Every kind of file has
a parser of a few lines, and the model only ever sees items:

    item = {"text": str, "image": ref | [ref, ...], "video": {"frames": [ref, ...], "fps": float},
            "instruction": str}                                        absent keys are left out
    ref  = an absolute path, or a TableImage inside a parquet file; load_image(ref) decodes either
    e.g.   {"text": "\nWhat is the man by the bags awaiting?\n", "image": "/ROOT/.../image_0.jpg"}

Strings are VLM2Vec's to the byte, without its visual placeholder: our chat template puts images
first. prompts="qwen" moves a test query's instruction to item["instruction"].

Two things are called a row: a dataset's row of mmeb.json (with every default filled in, it is
called spec), and a row of the dataset's own files.

    mmeb.json --expand()--> short rows --complete()--> spec
    spec, ROOT --Source----> a training row --mmeb_pair() ...--> query, target, hard negatives
    spec, ROOT --EvalSet---> a test row ------image_set() ...--> query, candidates, positives

The sampler's maths. A batch of B pairs is B/b sub-batches of b pairs. Each draws a dataset d with
p(d) = w_d / Σw and takes the next b rows of d's own shuffled walk. So its pairs share a dataset,
which makes in-batch negatives hard. A draw is a function of (seed, step), a shuffle of (seed,
dataset, epoch): neither workers nor ranks change the stream, and its state is the step, up to which
a resumed run draws again.

How to run:
    python data.py --check ROOT [--names A,B]     what is found, missing (how to fetch it) or broken
ROOT mirrors hub ids: ROOT/<hub id>/... as `hf download ID --repo-type dataset --local-dir ROOT/ID`
leaves it (then unpack the archives); no link may lead out of ROOT. Your pairs need no code: put
them, in MMEB's columns (qry, qry_image_path, pos_text, pos_image_path, optional neg_text,
neg_image_path), into ROOT/train.jsonl and ROOT/test.jsonl (or .parquet, which may hold the images
themselves), images next to them; or describe your files in ROOT/datasets.json (see Row).

In training a row that cannot be read is named, counted and replaced by the next one. It stops an
evaluation, whose score would be that of another test. --check names them all.

Left out: decoding videos (the published frame folders are read), audio, the agent and text-only
tasks of MMEB-V3, the English-only copies of ViDoRe-V2 that the leaderboard does not count.
Sources: the dataset cards and VLM2Vec @ 6e1e1d4, "the reference" or "upstream" below.
"""

import argparse
import glob
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from tqdm import tqdm

# Phi-3.5-V's token in MMEB's text: "<|image_1|>\nWhat?\n". In WebQA no image follows it.
IMG = "<|image_1|>"
TABLE_FILES = (".parquet", ".jsonl", ".json")

# labels: class names of test sets whose candidates are all classes, also those that no clip shows:
#     {"K700": ["abseiling", "acting_in_play", ...]}, from VLM2Vec's video_classification_utils.py.
# visrag: VLM2Vec's prompts for VisRAG's training pages, {source: [before query, before page]}.
# tables: patterns of where a row's table lies if it names none, "beir" those of sets of pages.
# train, eval: the rows, in groups (see expand()).
MMEB = json.loads(Path(__file__).with_name("mmeb.json").read_bytes())


class BadData(ValueError):
    """Something in the data is not what it should be. The message is one line:
    BadData("CIRR/7", error) -> "CIRR/7: ...", also if the error began so already."""

    def __init__(self, where, why=""):
        text = f"no column {why.args[0]}" if isinstance(why, KeyError) else str(why or where)
        if not text.startswith(str(where)):
            text = f"{where}: {text}"
        super().__init__(" ".join(text.splitlines()))  # a library's may span lines


class Missing(BadData):
    """The root has no table of this dataset: not broken, just not there."""


# What a parser may raise at a row that is not as it should be; BadData is a ValueError.
ROW_FAULTS = (ValueError, TypeError, LookupError, AttributeError, OSError, RecursionError)


def is_text(value):
    """Is it text that a file can hold? Half an emoji (a lone surrogate, legal in JSON) is not."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def count(text):
    """argparse's type of a number of things, one at least."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return int(text)


def short(value):
    """A value as it may stand in a message: null, 3, 'a text', else its type: "a list"."""
    if value is None:
        return "null"
    if not isinstance(value, (str, int, float)):
        return f"a {type(value).__name__}"
    return repr(value)[:60]


# --------------------------------------------------------------------------------------------------
# Items and images


def make_item(text="", image=None, video=None, instruction=None):
    """make_item("a cat", image="/a.jpg") -> {"text": "a cat", "image": "/a.jpg"}: what is there. A
    side with nothing at all (OK-VQA has blank answers) is {"text": ""}."""
    parts = {"text": text, "image": image, "video": video, "instruction": instruction}
    return {key: value for key, value in parts.items() if value} or {"text": ""}


def listed(value):
    """None, a value or a list -> a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def refs(item):
    """Every image reference of an item, frames last."""
    return listed(item.get("image")) + listed(item.get("video", {}).get("frames"))


def open_images(*items):
    """Open every image of these items; BadData names the first that is broken."""
    for item in items:
        for ref in refs(item):
            load_image(ref)


@dataclass(frozen=True)
class TableImage:
    """Where an image lies inside a parquet file: it is read when it is wanted, not before. The cell
    holds its encoded bytes, or what the hub writes: {"bytes": b"...", "path": "a.jpg"}."""

    path: str
    file: object  # what open_table(path) gave
    row: int
    column: str
    index: int | None = None  # where the cell is a list of images

    def read(self):
        """The encoded bytes (of a JPEG, PNG ...)."""
        # data: the Arrow table as `datasets` wraps it; a slice of it copies nothing.
        value = self.file.data.fast_slice(self.row, 1).column(self.column)[0]
        if self.index is not None:
            value = value.values[self.index]  # the others of a list are not copied
        value = value.as_py()
        return value["bytes"] if isinstance(value, dict) else value

    def __str__(self):
        return f"{self.path} row {self.row} column {self.column}"


# Threads may share a PIL image that was opened lazily: the first to load it closes its file.
SHARED = threading.Lock()


def load_image(ref):
    """path | bytes | {"bytes", "path"} | TableImage | PIL image -> RGB image, else BadData. As in
    the reference the EXIF orientation is not applied."""
    if isinstance(ref, dict):
        ref = ref.get("bytes") or ref.get("path")
    kinds = str, os.PathLike, bytes, TableImage, Image.Image
    if not isinstance(ref, kinds) or ref == "":
        wanted = "a path, bytes or a PIL image (Image.fromarray makes one)"
        raise BadData("image", f"{wanted} is wanted, got {short(ref)}")
    name = "image" if isinstance(ref, (bytes, Image.Image)) else str(ref)[:200]  # for messages
    try:
        if isinstance(ref, Image.Image):
            image = ref
            with SHARED:
                image.load()
        else:
            image = Image.open(io.BytesIO(image_bytes(ref)))
            image.load()  # Image.open() has read the header only
        if not 0 < max(image.size) <= 200 * min(image.size):  # Qwen's processors refuse it, too
            size = f"{image.width}x{image.height} pixels"
            raise ValueError(f"{size}: expected sides that differ by no more than 200 to 1")
        return to_rgb(image)
    except Exception as error:  # Pillow raises nearly anything at mutilated bytes
        why = re.sub(" <_io.*>", "", str(error))  # a buffer's address
        raise BadData(name, f"cannot be read as an image ({why[:200]})") from error


def image_bytes(ref):
    """The encoded bytes of a path, bytes or a TableImage."""
    if isinstance(ref, bytes):
        return ref
    return ref.read() if isinstance(ref, TableImage) else Path(ref).read_bytes()


def to_rgb(image):
    """An image of any mode -> RGB as a viewer shows it: alpha is laid on white, 16-bit grey scaled.
    The reference's convert("RGB") turns transparent pages black, and cuts grey off at 255."""
    if image.mode.startswith("I;16"):
        grey = np.asarray(image) * (255 / 65535)  # 0 ... 65535 -> 0 ... 255
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):  # a mask, a depth map: no file says which level is white
        raise ValueError(f"mode {image.mode}: expected grey levels of 8 or 16 bits, or colours")
    if image.has_transparency_data:  # alpha, a transparent colour, a palette with alpha
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def visible(folder):
    """The names in a folder, frame_2 before frame_10, without those that begin with a dot.
    VisDial's archive holds AppleDouble files, ._x.jpg (VLM2Vec's issue 108)."""

    def natural(name):  # "frame_2.jpg" -> ["frame_", 2, ".jpg"]
        return [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", name.lower())]

    return sorted((name for name in os.listdir(folder) if name[0] != "."), key=natural)


# --------------------------------------------------------------------------------------------------
# Tables: rows by number out of parquet files, JSON lines and JSON lists


OPENING = threading.Lock()  # --check opens tables in threads, `datasets` was not made for that


def open_table(path):
    """A parquet or JSON file -> a datasets.Dataset: a mapped Arrow copy in the cache of `datasets`.

    Of JSON the Dataset has one column, "line", parsed when a row is read: Arrow wants columns of
    one type (neg_text is text or a list), takes text for dates, and does not name a bad line.
    """
    import datasets  # takes seconds, which load_image alone need not wait for

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs, it also raises
    changed = str(os.stat(path).st_ctime_ns)  # mtime may be what an archive says
    try:
        with OPENING:
            if path.endswith(".parquet"):
                pattern = glob.escape(path)  # a folder may be called run[1]
                # `description` is a part of the Arrow copy's name: a changed file is read anew.
                return datasets.Dataset.from_parquet(pattern, batch_size=1000, description=changed)
            features = datasets.Features({"line": datasets.Value("binary")})
            given = {"path": path, "changed": changed}
            return datasets.Dataset.from_generator(json_lines, features, gen_kwargs=given)
    except Exception as error:  # of pyarrow, fsspec ...
        cause = error.__cause__ or error  # what one of `datasets` hides
        if getattr(cause, "errno", None) and path not in str(cause):  # its disk is full
            where = f"HF_DATASETS_CACHE {datasets.config.HF_DATASETS_CACHE}"
            raise BadData(where, cause) from error
        raise BadData(path, f"cannot be read: {cause}") from error


def json_lines(path, changed):
    """Lines of a JSONL file, or the elements of a JSON list: {"line": b'{"qry": "a cat"}'}, ... A
    hash of the arguments names the Arrow copy: a changed file is read anew."""
    with open(path, "rb") as file:
        start = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")  # a byte order mark, white space
        file.seek(0)
        lines = file
        if start.startswith(b"["):
            lines = (json.dumps(value).encode() for value in json.load(file))
        line = None
        for line in filter(bytes.strip, lines):  # no blank ones
            yield {"line": line}
        if line is None:  # `datasets` would say that "train" corresponds to no data
            raise ValueError("it has no rows")


class Table:
    """The first `cap` rows of some files: table[i] -> {"qry": "a cat", "neg_text": None, ...}."""

    def __init__(self, paths, cap):
        # NAME-00000-of-00003.parquet without its siblings is refused.
        match = re.search(r"-\d+-of-(\d+)", os.path.basename(paths[0]))
        if match and int(match[1]) != len(paths):
            raise BadData(paths[0], f"{len(paths)} shards are there, of {match[1]} that are wanted")
        self.files = [(path, open_table(path)) for path in paths]
        rows = sum(len(file) for _, file in self.files)
        self.length = min(rows, cap or rows)

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        for path, file in self.files:
            if i < len(file):
                return read_row(path, file, i)
            i -= len(file)  # row 12 of files of 10 and 5 rows is row 2 of the second


def read_row(path, file, i):
    row = file.data.fast_slice(i, 1)  # column(name)[i] would walk through all pieces of the table
    if not path.endswith(".parquet"):
        value = json.loads(row.column("line")[0].as_py())
        if not isinstance(value, dict):
            raise ValueError(f"an object is wanted, got {short(value)}")
        return value
    cells = {}
    for name in row.column_names:
        cells[name] = arrow_value(row.column(name)[0], TableImage(path, file, i, name))
    return cells


def arrow_value(cell, image):
    """An Arrow cell as Python. Images are bytes, the hub's {"bytes", "path"} (one may be absent) or
    a list of those. Their bytes stay where they are: `image` refers to them. A list of texts is
    read in one go: a row of MMEB has a thousand candidates."""
    if not cell.is_valid:  # null
        return None
    if isinstance(cell, pa.ListScalar) and not pa.types.is_string(cell.type.value_type):
        return [arrow_value(part, replace(image, index=k)) for k, part in enumerate(cell.values)]
    if isinstance(cell, pa.StructScalar) and {"bytes", "path"} & set(cell):
        parts = {name: arrow_value(part, image) for name, part in cell.items()}
        return parts.get("bytes") or parts.get("path")
    if re.match("(large_|fixed_size_)?binary", str(cell.type)):
        # as_buffer() looks at the mapped file without copying it.
        return image if cell.as_buffer().size else None
    return cell.as_py()


def cell(row, column, kind="text"):
    """A row's text. With kind "text?" null is "". With kind "id" a number becomes text: hubs store
    ids as either, and pandas makes 7.0 of a 7 next to a null."""
    value = row[column]
    if kind == "text?" and value is None:
        return ""
    if kind == "id" and (type(value) is int or type(value) is float and value.is_integer()):
        return str(int(value))  # 7, 7.0 -> "7"; True is no int here
    if not is_text(value):
        raise BadData(f"column {column}", f"text is wanted, got {short(value)}")
    return value


def text_list(row, column):
    """A row's list of texts, with something in it."""
    values = row[column]
    if not isinstance(values, list) or not values:
        raise BadData(f"column {column}", f"a list of texts is wanted, got {str(values)[:60]}")
    return [cell({column: value}, column) for value in values]


# --------------------------------------------------------------------------------------------------
# Rows of the two tables


@dataclass
class Row:
    """A dataset, as mmeb.json describes it. ROOT/datasets.json, where it exists, takes the place of
    mmeb.json. It gives of each dataset the name and what differs from these defaults:

    {"train": [{"name": "shop", "table": "shop.jsonl", "media": ["photos"], "weight": 2}],
     "eval": [{"name": "manual", "parser": "beir", "hub": "m"},  # m/corpus.jsonl, qrels, queries
              {"name": "clips", "parser": "video_ret", "table": "clips.jsonl", "media": "frames"}]}
    """

    name: str  # unique, without /; the key of every score and id
    parser: str  # of TRAIN_PARSERS (default mmeb) or EVAL_PARSERS (default pairs)
    split: str  # "original" (default in training), "test" (default) ...
    hub: str = ""  # hub id = folder under ROOT; "": ROOT itself
    # Where in ROOT the rows lie: patterns of which the first that matches wins (default: a list in
    # mmeb.json). Files.paths() says what "{hub}/{config}/{split}-*.parquet" and the like mean.
    table: str | list | None = None
    config: str | list = ""  # the hub's config; a test set may have several, read in turn (MVBench)
    cap: int | None = None  # only so many first rows are used, as in VLM2Vec's train_alltasks.yaml
    media: str | list | None = None  # folders where images and clips are looked for, in this order
    frames: int = 8  # frames per video: VLM2Vec looks at 8
    fps: int | float = 2.0  # what the item says of their rate; Qwen assumes 2 per second
    fetch: list = field(default_factory=list)  # [[hub id, pattern, command to unpack]]
    rows: int | None = None  # as published; of a test set queries. None: only roughly known
    weight: int | float = 1.0  # of a draw in training
    # Test sets only.
    modality: str | None = None  # image, video, visdoc (pages); default: what the parser reads
    family: str = "own"  # a column of the leaderboard: I-CLS, V-QA, ViDoRe-V1 ...
    # "local": a row lists its candidates. "global": every query has all of them (pairs, pages,
    # video_ret; the default where labels are given).
    scope: str | None = None
    inst: str = ""  # videos, pages: said before a query, e.g. "Select a video that fits ...:"
    tgt: str = ""  # and before a candidate, e.g. "Understand the content of the provided video."
    tail: str = "\n"  # what ends a query of an image set; two in VisDial
    columns: list = field(default_factory=lambda: ["video_id", "caption"])  # video_ret
    labels: str | list | None = None  # of video_cls: all classes, or their key in mmeb.json


DEFAULTS = {
    "train": {"parser": "mmeb", "split": "original"},
    "eval": {"parser": "pairs", "split": "test"},
}


def complete(row, kind):
    """A short row of kind "train" or "eval" -> its spec, a dict of all keys of Row.

    {"name": "own", "table": "test.jsonl"} -> {"name": "own", "table": ["test.jsonl"],
    "parser": "pairs", "scope": "global", ...}. A typing mistake must not become a default.
    """
    given = {key: value for key, value in row.items() if value is not None}
    try:
        spec = asdict(Row(**(DEFAULTS[kind] | given)))
    except TypeError as error:  # a key that no Row has, or no name
        raise BadData(f"datasets.json: {kind} dataset {row.get('name')}", error) from None
    for key in fields(Row):
        if not isinstance(spec[key.name], key.type):  # of table: str | list | None
            raise BadData(spec["name"], f"{key.name}: {short(spec[key.name])} is no {key.type}")
    for key in ("weight", "frames", "fps", "cap"):
        if spec[key] is not None and not 0 < spec[key] < math.inf:
            raise BadData(spec["name"], f"{key}: {spec[key]} is not above 0")
    if set(spec["name"]) & set("/|\n"):  # it names files, and a row of report.md
        raise BadData(spec["name"], "a name without /, | and line breaks is wanted")
    parser = spec["parser"]
    retrieval = parser in ("pairs", "video_ret", "beir")
    has_labels = parser == "video_cls" and spec["labels"]
    spec["scope"] = spec["scope"] or ("global" if retrieval or has_labels else "local")
    is_video = parser in (*VIDEO_QA, "video_cls", "video_ret", "moment", "momentseeker")
    reads = "video" if is_video else "image"
    spec["modality"] = spec["modality"] or ("visdoc" if parser == "beir" else reads)
    spec["media"] = listed(spec["media"]) or [spec["hub"]]
    spec["table"] = listed(spec["table"]) or MMEB["tables"]["beir" if parser == "beir" else "hub"]
    choices = {
        "modality": ["image", "video", "visdoc"],
        "scope": ["global"] if retrieval else ["local", "global"],
        "parser": TRAIN_PARSERS if kind == "train" else EVAL_PARSERS,
    }
    for key, values in choices.items():
        if spec[key] not in values:
            why = f"one of {', '.join(values)} is wanted"
            raise BadData(spec["name"], f"{key} {spec[key]!r}: {why}")
    return spec


def expand(groups):
    """mmeb.json's groups -> short rows: what a group has in common, then each one's own keys.

    [{"common": {"hub": "VLM2Vec/{name}"}, "datasets": [{"name": "MSVD", "rows": 670}]}]
    -> [{"hub": "VLM2Vec/MSVD", "name": "MSVD", "rows": 670}]
    """
    rows = []
    for group in groups:
        for row in group["datasets"]:
            common = json.dumps(group["common"]).replace("{name}", row["name"])  # in all texts
            rows.append(json.loads(common) | row)
    return rows


def tables(root, kind):
    """A root's datasets of kind "train" or "eval" -> their specs: those of its datasets.json, else
    its train.jsonl and test.jsonl (or .parquet), else those of mmeb.json, there or not."""
    if not os.path.isdir(root):
        raise BadData(root, "no such folder")
    listing = os.path.join(root, "datasets.json")
    files = os.listdir(root)
    users = [file for file in files if re.fullmatch(r"(train|test)\.(jsonl|parquet)", file)]
    if os.path.exists(listing):
        rows = read_listing(listing, kind)
    elif users:
        part = "train." if kind == "train" else "test."  # of train.jsonl alone: no test
        rows = [{"name": "own", "table": file} for file in users if file.startswith(part)]
    else:
        rows = expand(MMEB[kind])  # 25 and 78 short rows
    specs = [complete(row, kind) for row in rows]
    names = [spec["name"] for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise BadData(root, f"{kind} dataset {name!r} is there twice")
    return specs


def read_listing(path, kind):
    """The rows of a kind in datasets.json; either kind may be absent."""
    try:
        listing = json.loads(Path(path).read_bytes())
        unknown = listing.keys() - {"train", "eval"}
        rows = [dict(row) for row in listing.get(kind, [])]
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        form = '{"train": [rows], "eval": [rows]}'
        raise BadData(path, f"expected JSON of the form {form} ({error})") from error
    if unknown:
        raise BadData(path, f"unknown key {min(unknown)!r}, train and eval are known")
    return rows


def wanted(specs, names):
    """The specs of these names, in this order (None: all); an unknown name is an error."""
    if names is None:
        return specs
    by_name = {spec["name"]: spec for spec in specs}
    for name in names:
        if name not in by_name:
            raise BadData(f"no dataset {name!r} in the table; there are {', '.join(by_name)}")
    return [by_name[name] for name in dict.fromkeys(names)]  # a name given twice counts once


# --------------------------------------------------------------------------------------------------
# Files of a root


class Files:
    """A dataset (spec) on a root: its tables, and the images and clips that they refer to."""

    def __init__(self, spec, root, frames=None):
        self.spec = spec
        self.name = spec["name"]
        self.parser = spec["parser"]  # its name
        self.configs = listed(spec["config"]) or [""]
        if self.parser == "beir":  # a set of pages has these three, read in this order
            self.configs = ["corpus", "qrels", "queries"]
        self.root = os.path.realpath(root)
        self.frames = frames or spec["frames"]

    def inside(self, *parts):
        """A path in ROOT. No path may lead out of it, not even by a symbolic link. So a hub cache,
        whose snapshots are links, is no root; `hf download --local-dir` writes real files."""
        path = os.path.normpath(os.path.join(self.root, *parts))
        if not Path(os.path.realpath(path)).is_relative_to(self.root):
            raise BadData(f"path {os.path.join(*parts)!r}", "leaves the root")
        return path

    def find(self, *names, clip=False):
        """Path of an image (or a clip's folder) in the first media folder that has one of these
        names. mmeb.json lists several: archives unpack otherwise than VLM2Vec's settings say."""
        there = os.path.isdir if clip else os.path.isfile
        for folder, name in itertools.product(self.spec["media"], names):
            path = self.inside(folder, name)
            if there(path):
                return path
        folders = ", ".join(folder or "." for folder in self.spec["media"])
        what = "clip folder" if clip else "image"
        raise BadData(f"{what} {' or '.join(map(repr, names))}", f"missing, looked in {folders}")

    def image(self, value):
        """A cell -> a reference (a path, a TableImage), a list of them, or None for nothing."""
        if isinstance(value, list):
            return [self.image(part) for part in value if part] or None
        if not value:
            return None
        if isinstance(value, TableImage):
            return value
        if not is_text(value):
            raise BadData("an image", f"its path is wanted, got {short(value)}")
        return self.find(value)

    def clip(self, name):
        """Name of a video, whose frames are a folder's files -> {"frames": [paths], "fps": 2.0}.

        n frames at np.linspace(0, last, n), all of MomentSeeker's; fewer are taken as they are."""
        folder = self.find(name, clip=True)
        endings = (".jpg", ".jpeg", ".png")  # that the reference accepts
        frames = [file for file in visible(folder) if file.lower().endswith(endings)]
        if not frames:
            raise BadData(f"clip folder {folder}", f"has no frames ({', '.join(endings)})")
        if self.parser != "momentseeker" and self.frames <= len(frames):
            places = np.linspace(0, len(frames) - 1, self.frames, dtype=int)
            frames = [frames[i] for i in places]  # 8 of 64: 0, 9, 18, 27, 36, 45, 54, 63
        frames = [self.inside(folder, file) for file in frames]
        return {"frames": frames, "fps": self.spec["fps"]}

    def table(self, config):
        """The Table of a config, else Missing. A dataset without one of its parts is broken."""
        paths = self.paths(config)
        if paths:
            return Table(paths, self.spec["cap"])
        kind = BadData if self.all_paths() else Missing
        looked = f"looked for {', '.join(self.spec['table'])} ({', '.join(TABLE_FILES)} are read)"
        raise kind(self.name, f"no {config or 'table'} in {self.root}, {looked}")

    def all_paths(self):
        """The files of every config."""
        return [path for config in self.configs for path in self.paths(config)]

    def paths(self, config):
        """The sorted files of the first pattern that matches any; '*' matches no ._x.parquet.

        "{hub}/{config}/{split}-*.parquet" for the config "MC" of NExTQA
        -> ["/ROOT/VLM2Vec/NExTQA/MC/test-00000-of-00001.parquet"]
        """
        # A pattern may use the spec's keys, such as {hub}, {name} and {split}, and {lower}, {under}
        # and {repo}. {config} is the one at hand; of sets of pages it is called {part}.
        lower = self.name.lower()  # "charades-sta"
        fill = self.spec | {"lower": lower, "under": lower.replace("-", "_")}
        fill["repo"] = os.path.basename(fill["hub"])  # "vidore/x_beir" -> "x_beir"
        fill["part" if self.parser == "beir" else "config"] = config
        for pattern in self.spec["table"]:
            try:
                pattern = "./" + pattern.format(**fill)  # not /data/..., where hub is ""
            except (AttributeError, LookupError, ValueError) as error:
                raise BadData(f"{self.name}: table {pattern!r}", f"no pattern ({error})") from error
            names = sorted(glob.glob(pattern, root_dir=self.root))
            paths = [self.inside(name) for name in names if name.endswith(TABLE_FILES)]
            if paths:
                return paths
        return []


# --------------------------------------------------------------------------------------------------
# Training: a parser per kind of source, row -> (query item, target item, [hard negative items])

# Text and image of a side.
QUERY, TARGET = ["qry", "qry_image_path"], ["pos_text", "pos_image_path"]
NEGATIVE = ["neg_text", "neg_image_path"]


def mmeb_pair(files, row):
    r"""MMEB-train's columns. A row of A-OKVQA

        {"qry": "<|image_1|>\nRepresent the given image with the following question: What ...?\n",
         "qry_image_path": "images/A-OKVQA/Train/A-OKVQA_image_0.jpg", "pos_text": "cab",
         "pos_image_path": "", "neg_text": "train", "neg_image_path": ""}

    -> {"text": "\nRepresent the ...?\n", "image": "/ROOT/.../A-OKVQA_image_0.jpg"},
       {"text": "cab"}, [{"text": "train"}]

    Hard negatives (none, a value, or lists as in mmE5's columns) are kept: VLM2Vec drops them.
    """
    for column in row:  # neg_texts would be no negatives, without a word
        if column.startswith("neg") and column not in NEGATIVE:
            raise BadData(f"column {column}", f"{' or '.join(NEGATIVE)} is wanted")
    texts = listed(row.get("neg_text") or None)  # "" and null: none
    images = listed(row.get("neg_image_path") or None)
    if texts and images and len(texts) != len(images):
        raise BadData("negatives", f"{len(texts)} neg_text for {len(images)} neg_image_path")
    negatives = []
    for text, image in itertools.zip_longest(texts, images):
        if text or image:
            cells = {"neg_text": text, "neg_image_path": image}  # one negative, as if it were a row
            negatives.append(mmeb_side(files, cells, *NEGATIVE))
    return mmeb_side(files, row, *QUERY), mmeb_side(files, row, *TARGET), negatives


def mmeb_side(files, row, text, image):
    """The item of two columns, by their names."""
    return make_item(cell(row, text, "text?").replace(IMG, ""), files.image(row[image]))


def video_pair(files, row):
    r"""LLaVA-Hound's conversation about a clip, used in three ways. The prompts are VLM2Vec's.

        {"video": "v_1", "conversations": [{"from": "human", "value": "<video>\nDescribe."},
                                           {"from": "gpt", "value": "A cat sleeps."}]}

    video_caption    clip, "\nDescribe." -> "A cat sleeps."
    video_retrieval  "Find a video that ... visual content: A cat sleeps." -> clip, "Understand ..."
    video_qa         clip, "Answer a question ... of a video. \nDescribe." -> "A cat sleeps."
    """
    question, answer = [cell(turn, "value") for turn in row["conversations"][:2]]
    question = question.replace("<video>", "")
    clip = files.clip(cell(row, "video"))
    if files.parser == "video_retrieval":
        query = make_item("Find a video that contains the following visual content: " + answer)
        return query, make_item("Understand the content of the provided video: ", video=clip), []
    if files.parser == "video_qa":
        question = "Answer a question based on the content of a video. " + question
    return make_item(question, video=clip), make_item(answer), []


def page_pair(files, row):
    """Pages. The odd spaces are VLM2Vec's: it joins prompt, query and token, which may be empty.

    page_qa  colpali_train_set: {"image", "query": "what?", "answer": "7"} -> page and " what?"; "7"
    page     VisRAG, with prompts of its source: {"image", "query": "x", "source": "PlotQA"} ->
             "This query relates to ...:  x "; page and "A numerical data visualization, ...  "
    """
    query, page = cell(row, "query", "text?"), files.image(row["image"])
    if files.parser == "page_qa":
        return make_item(" " + query, page), make_item(cell(row, "answer", "text?")), []
    for_query, for_page = MMEB["visrag"].get(str(row.get("source")), ("", ""))
    query = f"{for_query}  {query} " if for_query else f"{query} "
    return make_item(query), make_item(f"{for_page}  " if for_page else " ", page), []


# name: (parser, the columns of each side)
TRAIN_PARSERS = {
    "mmeb": (mmeb_pair, [QUERY, TARGET]),
    "page_qa": (page_pair, [["query", "image"], ["answer"]]),
    "page": (page_pair, [["query"], ["image"]]),
    "video_caption": (video_pair, [["video"], ["conversations"]]),
    "video_retrieval": (video_pair, [["video"], ["conversations"]]),
    "video_qa": (video_pair, [["video"], ["conversations"]]),
}


class Source(Files):
    """A training dataset opened. Of the first `cap` rows those with an empty side are dropped, as
    in the reference: usable row 1 may be the table's row 4."""

    def __init__(self, spec, root):
        super().__init__(spec, root)
        self.parse, self.sides = TRAIN_PARSERS[self.parser]
        self.rows = self.table(self.configs[0])
        full = [i for i in range(len(self.rows)) if self.is_full(i)]
        self.keep = np.array(full, np.int32)  # (usable rows,): usable row -> row of the table
        if not len(self.keep):
            raise BadData(self.name, "no usable row: each has an empty side")

    def is_full(self, i):
        """Has each side of the table's row i something? One that cannot be read is for pair()."""
        try:
            row = self.rows[i]
            for side in self.sides:
                values = [value for c in side for value in listed(row[c])]
                if all(value in ("", None) for value in values):  # 0 and false are for pair()
                    return False
            return True
        except ROW_FAULTS:
            return True

    def id(self, row):
        """Usable row -> "Name/row of its table", e.g. "CIRR/7"."""
        return f"{self.name}/{self.keep[row]}"

    def pair(self, row):
        """Usable row -> {"id", "dataset", "query": item, "target": item, "negatives": [items]}. No
        image is read yet."""
        pair = {"id": self.id(row), "dataset": self.name}
        try:
            sides = self.parse(self, self.rows[int(self.keep[row])])
        except ROW_FAULTS as error:
            raise BadData(pair["id"], error) from error
        return pair | dict(zip(["query", "target", "negatives"], sides))


def pair_key(pair):
    """A short hash of a pair's texts and images' bytes. A rationale finds its pair by the id, which
    has a row's number; by this hash it is checked to be the same pair still."""
    digest = hashlib.sha256()
    for side in (pair["query"], pair["target"], *pair["negatives"]):
        texts = {key: value for key, value in side.items() if key in ("text", "instruction")}
        digest.update(json.dumps(texts, sort_keys=True).encode())
        for ref in refs(side):
            digest.update(hashlib.sha256(image_bytes(ref)).digest())
    return digest.hexdigest()[:16]


def opened(pair):
    """The pair, if every image of it can be opened."""
    open_images(pair["query"], pair["target"], *pair["negatives"])
    return pair


class TrainData:
    """Sources by number, their usable rows by number; a pair is built when it is asked for."""

    def __init__(self, sources, missing):
        self.sources = sources
        self.missing = missing  # names that the root does not have
        self.names = [source.name for source in sources]
        self.sizes = [len(source.keep) for source in sources]  # usable rows
        self.weights = [float(source.spec["weight"]) for source in sources]
        # Shared with worker processes, a byte a row: has it been named as broken?
        self.named = [multiprocessing.RawArray("b", size) for size in self.sizes]

    def id(self, source, row):
        return self.sources[source].id(row)

    def pair(self, source, row):
        return self.sources[source].pair(row)

    def fetch(self, source, row, read=opened, rows=None):
        """read(pair) of this row, or of the next row that can be read. rows: the range to choose
        from (None: all). A row at which ValueError is raised is named once, whichever process
        meets it."""
        rows = rows or range(self.sizes[source])
        named = self.named[source]
        errors = {}  # row: BadData. They are printed when a sound row follows.
        for i in itertools.chain(range(row, rows.stop), range(rows.start, row)):
            if named[i]:  # a run of broken rows is not read again at every visit
                continue
            try:
                pair = read(self.pair(source, i))
            except ValueError as error:
                errors[i] = BadData(self.id(source, i), error)
                continue
            for broken, error in errors.items():
                if not named[broken]:
                    named[broken] = 1
                    tqdm.write(f"skipped ({self.skipped} so far): {error}")
            return pair
        why = next(iter(errors.values()), "all are named above")
        raise BadData(self.names[source], f"none of {len(rows)} rows can be read; the first: {why}")

    @property
    def skipped(self):
        """How many broken rows have been met."""
        return sum(sum(rows) for rows in self.named)


def train_sets(root):
    """TrainData of what a root has. A dataset without a single sound row is refused here."""
    sources, missing = [], []
    for spec in tables(root, "train"):
        try:
            sources.append(Source(spec, root))
        except Missing:
            missing.append(spec["name"])
    if not sources:
        raise BadData(root, f"none of its {len(missing)} training datasets is there")
    data = TrainData(sources, missing)
    for source in range(len(sources)):
        data.fetch(source, 0)  # fails where nothing can be read, before anything is trained
    return data


def sampler(sizes, weights, batch, sub_batch, seed=0, rank=0, world=1, first=None, is_wanted=None):
    """Endless batches [(source, row), ...]. The state is the step: islice() skips what is done.

    Every rank draws the global batch. It is dealt out in parts of gcd(sub_batch, batch / world)
    pairs: a batch of 32 in sub-batches of 8 goes to 8 ranks in parts of 4. A walk that ends inside
    a sub-batch goes on with the next epoch's order.

    next(sampler(sizes=[100, 37], weights=[1, 2], batch=4, sub_batch=2))
    -> [(1, 12), (1, 27), (0, 48), (0, 8)]
    batch: pairs of all ranks, a multiple of sub_batch and of world; a rank gets batch / world.
    first: where in each source its `sizes` rows begin, so that stages can have rows of their own.
    is_wanted(source, row): the other pairs drop out, and what is left is dealt out pair by pair. A
    batch that keeps fewer pairs than there are ranks is left out; BadData after 1,000 in a row.
    """
    p = np.array(weights, np.float64) / np.sum(weights)  # (sources,), sums to 1
    starts = first or [0] * len(sizes)
    left_out = 0  # batches, since the last one that was not
    walks = [walk(s, size, starts[s], seed) for s, size in enumerate(sizes)]
    part = 1 if is_wanted else math.gcd(sub_batch, batch // world)
    for step in itertools.count():
        rng = np.random.default_rng([0, seed, step])  # walk() has the streams of 1
        drawn = rng.choice(len(p), batch // sub_batch, p=p)  # (sub-batches,)
        pairs = []  # of the global batch
        for source in drawn:
            pairs += itertools.islice(walks[source], sub_batch)
        if is_wanted:
            pairs = [pair for pair in pairs if is_wanted(*pair)]
        if len(pairs) >= world:
            left_out = 0
            parts = [pairs[at : at + part] for at in range(0, len(pairs), part)]
            yield list(itertools.chain(*parts[rank::world]))
            continue
        left_out += 1
        if left_out == 1000:
            why = f"no batch has a pair to learn for each of {world} processes: too few pairs"
            raise BadData(why)


def walk(source, size, start, seed):
    """The rows of a source without end, in each epoch in another order."""
    for epoch in itertools.count():
        rng = np.random.default_rng([1, seed, source, epoch])
        for row in rng.permutation(size).astype(np.int32):  # 4 bytes a row
            yield source, start + int(row)


# --------------------------------------------------------------------------------------------------
# Evaluation: a parser per kind of test set, row -> a query, its candidates, its positives


class EvalSet(Files):
    """A test set opened and filled by its parser. Two rows list the options "yes" and "no"; the
    first row's answer is yes, the second's no. Then candidates are [{"text": "yes"},
    {"text": "no"}], local [[0, 1], [0, 1]], positives [[0], [1]]."""

    def __init__(self, spec, root, frames, prompts, problems):
        super().__init__(spec, root, frames)
        self.prompts = prompts
        self.inst = spec["inst"]
        self.tgt = "" if prompts == "qwen" else spec["tgt"]  # Qwen's say nothing before a candidate
        self.problems = problems  # a list takes every complaint; None: the first is raised
        self.modality = spec["modality"]
        self.metric = "ndcg_linear@5" if self.modality == "visdoc" else "hit@1"  # the leaderboard's
        # What a score is computed from. A candidate of many queries is embedded once.
        self.queries = []  # items
        self.query_ids = []
        self.candidates = []  # items
        self.cand_where = []  # the row that had each first
        self.index = {}  # key of a candidate: its number
        self.local = []  # per query an array of candidate numbers (repeats kept), or None: all
        self.positives = []  # per query candidate numbers
        self.grades = []  # per query the positives' grades, or None
        # While it is filled:
        self.rows = 0  # rows of queries
        self.asked = {}  # of pairs(): query -> its positives
        self.relevant = {}  # of pages: {query id: {page id: grade}}

    def read(self, limit):
        """Its rows through their parser. An error names the row that it is about."""
        parse = EVAL_PARSERS[self.parser]
        for config in self.configs:
            self.config = config
            table = self.table(config)
            for i in range(len(table)):
                if limit and len(self.queries) == limit:
                    break
                place = f"{config} row {i}" if len(self.configs) > 1 else i
                self.where = f"{self.name}/{place}"  # "NExTQA/7", "MVBench/action_count row 7"
                try:
                    parse(self, table[i])
                except ROW_FAULTS as error:
                    error = BadData(self.where, error)
                    if self.problems is None:
                        raise error from None
                    self.problems.append(str(error))
            if self.parser == "beir":
                self.rows = 0  # of its three tables the last holds the queries
            self.rows += len(table)

    def say(self, inst, content=None, image=None, clip=None, full=None):
        """The item of an instruction and a content, with the image and the clip of these names.
        say("About:", "why?", "a.jpg") -> {"text": " About: why?", "image": ...}, or with Qwen's
        prompts {"text": "why?", "instruction": "About:", "image": ...}.

        VLM2Vec joins visual token, instruction and content by spaces (`full`: another rule). The
        token goes, as our chat template places images. Its space stays.
        """
        image = self.find(image) if isinstance(image, str) else image  # or a TableImage, or None
        video = None if clip is None else self.clip(clip)
        if self.prompts == "qwen":
            inst = inst.strip().removesuffix("Question:").strip()  # that ends the prompt of V-QA
            if self.modality != "image" and inst.endswith(":"):
                inst = inst[:-1] + "."
            return make_item(content, image, video, inst)
        if full is None:
            full = inst if content is None else f"{inst} {content}"
            if image or video:
                full = " " + full
        return make_item(full, image, video)

    def cand(self, key, make, *args, **more):
        """The number of the candidate with this key: es.cand("yes", make_item, "yes") -> 0. It is
        made when its key comes first: frames are looked for once, not per query."""
        if key not in self.index:
            self.candidates.append(self.checked(make(*args, **more)))
            self.cand_where.append(self.where)
            self.index[key] = len(self.index)
        return self.index[key]

    def query(self, item, cands, positives, grades=None, qid=None):
        """A query with the numbers of its candidates and positives."""
        if not positives:
            raise BadData("query", "it has no positive, or that is broken")
        self.queries.append(self.checked(item))
        self.query_ids.append(qid or self.where)  # "Name/row in its table" where there is no id
        self.local.append(np.array(cands, np.int64))
        self.positives.append(list(dict.fromkeys(positives)))  # MomentSeeker lists clips twice
        self.grades.append(grades)

    def checked(self, item):
        """--check opens every image; a run does when it embeds them."""
        if self.problems is not None:
            open_images(item)
        return item


def image_set(es, row):
    r"""The 36 image sets, of which VLM2Vec has five parsers (src/data/eval_dataset).

        {"qry_inst": "<|image_1|>\nAbout: ", "qry_text": "why?", "qry_img_path": "a.jpg",
         "tgt_text": ["yes", "no"]}
    image_qa  -> query {"text": "\nAbout: why?\n", "image": "/ROOT/.../a.jpg"},
                 candidates {"text": "yes"}, {"text": "no"}; key = the text
    image_cls, image_i2t: the same, but the instruction keeps its last space: "About:  why?"

        {"qry_inst": "<|image_1|>\nFind:", "qry_text": "A cat.", "qry_img_path": "b.jpg",
         "tgt_inst": "<|image_1|>\nIt:", "tgt_img_path": ["a.jpg", "c.jpg"], "tgt_text": ["", ""]}
    image_t2i -> query {"text": "\nFind: A cat.\n"}, candidates as in image_targets()
    image_i2i_vg: the same, and b.jpg goes with the query

    The positive is always the first, so eval.py ranks it last among equal scores.
    """
    kind = es.parser
    inst = cell(row, "qry_inst").replace(IMG, "")
    text = cell(row, "qry_text", "text?")
    if kind in ("image_t2i", "image_i2i_vg"):
        cands = image_targets(es, row)
    else:
        cands = [es.cand(answer, make_item, answer) for answer in text_list(row, "tgt_text")]
    if kind == "image_t2i":  # without image, though a stray token may be there (WebQA)
        image, full = None, f"{inst} {text}"
    else:
        image = cell(row, "qry_img_path")
        # VLM2Vec's parsers differ.
        lead = inst if kind in ("image_cls", "image_i2t") else "\n" + inst.strip()
        full = f" {lead} {text}" if text else f" {lead}"
        full = full.replace(" \n", "\n")
    query = es.say(inst, text, image, full=full + es.spec["tail"])
    es.query(query, cands, cands[:1])


def image_targets(es, row):
    r"""The numbers of candidates that are images: {"text": "\nIt:\n", "image": path}. If the first
    caption is not blank (WebQA, EDIS, OVEN, ...), captions follow: "\nIt: a caption\n".
    Without captions the text of image_i2i_vg has no line break at its end.

    In image_t2i the key is the path alone, so a path with another caption collapses; in
    image_i2i_vg it is path:caption (several objects of an image are targets in RefCOCO-Matching).
    """
    inst = cell(row, "tgt_inst").replace(IMG, "")
    paths = text_list(row, "tgt_img_path")
    captions = [""] * len(paths)
    if row.get("tgt_text") not in (None, [], [""]):
        captions = text_list(row, "tgt_text")
    cands = []
    blank = not captions[0].strip()
    grounding = es.parser == "image_i2i_vg"
    end = "" if blank and grounding else "\n"  # VLM2Vec's two parsers differ here
    for path, caption in zip(paths, captions, strict=True):
        full = f" {inst}" if blank else f" {inst} {caption}"
        full = full.replace(" \n", "\n") + end
        content = "" if blank else caption.strip()
        key = path + ":" + caption.strip('"') if grounding else path
        cands.append(es.cand(key, es.say, "", content, path, full=full))
    return cands


def video_cls(es, row):
    """A clip's class, of all labels (global) or of those in neg_text (local: SmthSmthV2).

    {"video_id": "v_1", "pos_text": "archery"} of K700 -> " Recognize the category of the video
    content." and the clip; 700 labels, positive {"text": "archery"}.
    """
    label, labels = cell(row, "pos_text"), es.spec["labels"]
    if es.spec["scope"] == "local":
        options = text_list(row, "neg_text")
    else:  # of mmeb.json, or a user's list, or what the rows have
        options = MMEB["labels"][labels] if isinstance(labels, str) else labels or [label]
    if label not in options:
        raise BadData("column pos_text", f"{label!r} is not among its {len(options)} options")
    cands = [es.cand(text, make_item, text) for text in options]
    query = es.say(es.inst, clip=cell(row, "video_id", "id"))
    es.query(query, cands, [es.index[label]])


# How VLM2Vec's multiple-choice sets differ:
# 1 the column of the clip's name; 2 what its folder's name has before that
# 3 columns of the options: one with a list, one for each, or none (then yes and no)
# 4 the letters by which the answer names an option; "": by the option itself
# 5 the question: {lines} joins the options by "\n", {words} by " ", {lettered} adds "(A) " ...
LETTERED = "{question}\nOptions:\n{lettered}"
VIDEO_QA = {
    "videomme": ("videoID", "", ["options"], "ABCDEFGH", "{question}\n{lines}"),
    "egoschema": ("video_idx", "", ["option"], "01234567", "{question}{words}"),  # no space
    "nextqa": ("video", "", ["a0", "a1", "a2", "a3", "a4"], "01234567", LETTERED),
    "mvbench": ("video", "{config}/", ["candidates"], "", LETTERED),
    "activitynetqa": ("video_name", "v_", [], "", "{question}? (A) yes; (B) no."),
}


def video_qa(es, row):
    r"""Multiple choice about a clip; key = the option as listed (MVBench: with its letter), text =
    what is embedded.

        {"videoID": "v", "question": "Which?", "options": ["A. Apples.", "B. Figs."], "answer": "B"}
    of Video-MME -> the prompt, then " Which?\nA. Apples.\nB. Figs." and the clip; candidates
    {"text": "Apples"}, {"text": "Figs"}; positive the second.
    """
    column, before, columns, letters, form = VIDEO_QA[es.parser]
    if len(columns) == 1:
        options = text_list(row, columns[0])
    else:
        options = [cell(row, name) for name in columns] or ["yes", "no"]
    names = list(letters[: len(options)]) or options  # ["A", "B"]
    answer = cell(row, "answer", "id")  # "B"; NExTQA has numbers
    answer = answer.strip() if letters else answer
    if answer not in names:
        raise BadData("column answer", f"{answer!r} is not among {', '.join(names)}")
    lettered = [f"({chr(65 + i)}) {option}" for i, option in enumerate(options)]  # "(A) Apples."
    with_letters = ["mvbench"]  # candidates are "(A) Apples." here
    if es.prompts == "qwen":  # Qwen3-VL-Embedding @ 8ce3aab
        form = form.replace("{question}{words}", "{question} {words}")
        with_letters = ["mvbench", "nextqa"]
    question = form.format(
        question=cell(row, "question"),
        lines="\n".join(options),
        words=" ".join(options),
        lettered="\n".join(lettered).rstrip(),
    )
    cands = []
    for key in lettered if es.parser in with_letters else options:
        text = key
        if es.parser in ("videomme", "egoschema"):  # "C. Berries." -> "Berries"
            text = (key.partition(". ")[2] or key).strip(". ")
        cands.append(es.cand(key, make_item, text))
    clip = before.format(config=es.config) + cell(row, column, "id")
    query = es.say(es.inst, question, clip=clip)
    # Where an answer stands twice (MVBench) the last is right, as upstream.
    right = dict(zip(names, cands))[answer]
    es.query(query, cands, [right])


def stem(path):
    """Name of a video without folders and ending: "x/v.m4v" -> "v", but "AB_210.0" stays."""
    return re.sub(r"\.(?=\d*[a-z])[a-z\d]{2,4}$", "", os.path.basename(path), flags=re.I)


def video_ret(es, row):
    """Caption -> video among all; key = the video's id. The first of several captions is taken.

    {"video_id": "v_1", "caption": "a cat"} of MSR-VTT -> "Find a video that contains the following
    visual content: a cat"; candidate " Understand the content of the provided video." and the clip.
    """
    column, caption = es.spec["columns"]  # ["video_id", "caption"]
    video = cell(row, column, "id")
    video = stem(video) if column == "video" else video  # DiDeMo names a file, the others have ids
    several = isinstance(row[caption], list)  # MSVD, VATEX
    text = text_list(row, caption)[0] if several else cell(row, caption)
    target = es.cand(video, es.say, es.tgt, clip=video)
    es.query(es.say(es.inst, text), [target], [target])


def moment(es, row):
    """QVHighlight, Charades-STA: which clip of a video shows it? {"query": "a man runs",
    "video_path": "x/AB.mp4"} -> the clip AB/query goes with the text, AB/positive is right, and
    AB/negative_0, AB/negative_1 ... are the other candidates.
    """
    text = cell(row, "query")
    video = stem(cell(row, "video_path", "id"))
    folder = es.find(video, clip=True)
    cands, right = [], []
    for name in visible(folder):
        if name == "query" or not os.path.isdir(os.path.join(folder, name)):
            continue
        key = os.path.relpath(os.path.join(folder, name), es.root)
        cands.append(es.cand(key, es.say, es.tgt, clip=f"{video}/{name}"))
        if name.startswith("positive"):
            right.append(cands[-1])  # of several VLM2Vec takes the last alone
    es.query(es.say(es.inst, text, clip=f"{video}/query"), cands, right)


SEEK = {  # ending of what is shown with the query: VLM2Vec's prompt
    ".mp4": "Find the clip that corresponds to the given sentence and video segment:",
    ".jpg": "Select the video clip that aligns with the given text and image:",
    "": "Find the clip that corresponds to the given text:",
}


def momentseeker(es, row):
    """The query is text, text and image, or text and clip; several candidates are right.

        {"query": "a man runs", "input_frames": "1.jpg", "positive_frames": [{"output_path":
         "m/a.mp4"}], "negative_frames": [{"output_path": "m/b.mp4"}, ...]}
    -> " Select the video clip ...: a man runs" and query_1.jpg; clips video_frames/m_a, ..._b.
    """
    text = cell(row, "query", "text?")
    given = cell(row, "input_frames", "text?")  # "", "1.jpg" or "m/a.mp4"
    kind = os.path.splitext(given)[1]  # "", ".jpg" or ".mp4"
    if kind not in SEEK:
        raise BadData("column input_frames", f"{given!r}: .jpg, .mp4 or nothing is wanted")
    image = f"query_{given}" if kind == ".jpg" else None
    clip = flat(given) if kind == ".mp4" else None
    right = listed(row["positive_frames"])
    cands = []
    for shown in right + listed(row["negative_frames"]):
        path = flat(shown["output_path"])
        cands.append(es.cand(path, es.say, es.tgt, clip=path))
    es.query(es.say(SEEK[kind], text or None, image, clip), cands, cands[: len(right)])


def flat(path):
    """MomentSeeker's clips lie in folders side by side: a/b.mp4 is video_frames/a_b."""
    return "video_frames/" + path.replace("/", "_").split(".mp4")[0]


def pairs(es, row):
    """A user's test set in MMEB-train's columns. All targets and hard negatives are candidates, and
    equal queries are one with several positives."""
    query, target, negatives = mmeb_pair(es, row)
    if {"text": ""} in (query, target):
        raise BadData("a side", "is empty")
    number = es.cand(side_key(es, target), make_item, **target)
    for item in negatives:
        es.cand(side_key(es, item), make_item, **item)
    key = side_key(es, query)
    if key not in es.asked:
        es.query(query, [number], [number])
        es.asked[key] = es.positives[-1]  # the list itself: what is added to it counts
    if number not in es.asked[key]:
        es.asked[key].append(number)


def side_key(es, item):
    """The text and the images that tell a side from others: '["a cat", "pics/a.jpg"]', however its
    row spells them. An image inside a table has no name: a hash of its bytes."""
    key = [item.get("text", "")]
    for ref in refs(item):
        if isinstance(ref, TableImage):
            key.append(hashlib.sha256(ref.read()).hexdigest())
        else:
            key.append(os.path.relpath(ref, es.root))
    if len(key) == 1:
        key.append("")
    return json.dumps(key, ensure_ascii=False)


def beir(es, row):
    """Pages in the three tables of the BEIR benchmark, read in this order: corpus {"corpus-id": 4,
    "image": ...}, qrels {"query-id": 7, "corpus-id": 4, "score": 3}, queries {"query-id": 7,
    "query": "what?"}. So page 4 is relevant for query 7, with grade 3.

    An image is in the table, or lies in the media folders as the table says, as NAME.png (ViDoRe)
    or as short_name(NAME) (VisRAG). Grades are 0 (not at all) ... 3; a duplicate keeps the higher.
    """
    if es.config == "queries":
        qid = cell(row, "query-id", "id")
        grades = es.relevant.get(qid, {})  # {page id: grade}
        right = [es.index[key] for key in grades]
        query = es.say(es.inst, cell(row, "query"))
        es.query(query, [], right, list(grades.values()), qid)
        return
    key = cell(row, "corpus-id", "id")
    if es.config == "corpus":
        if key in es.index:
            raise BadData("column corpus-id", f"{key!r} occurs twice")
        image = row.get("image")
        if not isinstance(image, TableImage):
            image = es.find(*listed(image or None), f"{key}.png", short_name(key))
        es.cand(key, es.say, es.tgt, image=image)
    else:
        if key not in es.index:
            raise BadData("column corpus-id", f"{key!r} names no document of the corpus")
        grade = row["score"]
        if grade > 0:
            grades = es.relevant.setdefault(cell(row, "query-id", "id"), {})
            grades[key] = max(grades.get(key, 0), grade)


def short_name(page):
    """VisRAG's page ids are longer than a file name may be: VLM2Vec cuts them and adds a hash."""
    base, ending = os.path.splitext(page)
    return f"{base[:50]}_{hashlib.md5(page.encode()).hexdigest()[:8]}{ending}"


EVAL_PARSERS = {
    **dict.fromkeys(["image_cls", "image_i2t", "image_qa", "image_t2i", "image_i2i_vg"], image_set),
    **dict.fromkeys(VIDEO_QA, video_qa),
    "video_cls": video_cls,
    "video_ret": video_ret,
    "moment": moment,
    "momentseeker": momentseeker,
    "pairs": pairs,
    "beir": beir,
}


def load_eval(root, spec, limit=None, frames=None, prompts="vlm2vec", problems=None):
    """A spec of a test set (or its name) -> EvalSet. Missing where the root has none of it.

    limit: so many queries (a global set of pages or labels stays complete). frames: 8 as VLM2Vec
    (default), 64 as Qwen3-VL-Embedding. prompts: "vlm2vec" or "qwen". problems: a list that takes
    all that is broken, images included; without it the first stops the evaluation.
    """
    if isinstance(spec, str):
        [spec] = wanted(tables(root, "eval"), [spec])
    es = EvalSet(spec, root, frames, prompts, problems)
    es.read(limit)
    es.cand_ids = list(es.index)  # the candidates' keys
    if es.parser != "beir":
        es.grades = None  # only pages are graded
    if spec["scope"] == "global":
        es.local = None
    es.protocol = f"{prompts} prompts"  # what a score must be quoted with
    if limit:
        es.protocol += f", {limit} queries at most"
    if es.modality == "video":
        es.protocol = f"{es.frames} frames, {es.protocol}"  # "8 frames, vlm2vec prompts"
    return es


# --------------------------------------------------------------------------------------------------
# python data.py --check ROOT


def check_one(task, root):
    """A dataset from end to end, every image and frame -> (status, lines for the reader), e.g.
    ("found", ["found    train CIRR   26,116 of    26116 rows, ..."]). task: (spec, "train")."""
    spec, kind = task
    status = "found"
    rows = empty = usable = 0
    problems = []
    commands = downloads(spec, root)
    try:
        if kind == "eval":
            es = load_eval(root, spec, frames=sys.maxsize, problems=problems)  # every frame
            rows, usable = es.rows, len(es.queries)
        else:
            source = Source(spec, root)
            rows = len(source.rows)
            empty = rows - len(source.keep)
            for row in range(len(source.keep)):
                try:
                    opened(source.pair(row))
                    usable += 1
                except BadData as error:
                    problems.append(str(BadData(source.id(row), error)))
    except Missing as error:
        status = "missing"
        commands = commands or [str(error)]  # a user's own has no download
    except (BadData, OSError) as error:
        problems.append(str(error))
    if problems:
        status = "broken"
    line = f"{status:8s} {kind:5s} {spec['name']:48s} {rows:>8,} of {spec['rows'] or '?':>8} rows"
    line += f", {usable:,} usable" + (" queries" if kind == "eval" else "")
    line += f", {empty:,} with an empty side" if empty else ""
    if not usable and len(problems) > 20:  # images that were never fetched
        problems[20:] = [f"... and {len(problems) - 20} more: no row is usable"]
    return status, [line] if status == "found" else [line, *problems, *commands]


def downloads(spec, root):
    """The commands that bring a dataset: ["hf download ID --repo-type dataset ...", ...]."""
    parts = list(spec["fetch"])
    is_users = os.path.exists(os.path.join(root, "datasets.json"))  # they are on no hub
    if not is_users and spec["hub"] not in ["", *(hub for hub, _, _ in parts)]:
        parts.insert(0, [spec["hub"], None, ""])  # all of it
    commands = []
    for hub, pattern, unpack in parts:  # unpack: "cd image-tasks && tar -xzf mmeb_v1.tar.gz ..."
        folder = shlex.quote(os.path.join(root, hub))
        command = f"hf download {hub} --repo-type dataset --local-dir {folder}"
        command += f" --include '{pattern}'" if pattern else ""
        command += f" && (cd {folder} && {unpack})" if unpack else ""
        commands.append(command)
    return commands


def check(root, names=None):
    """Print a line per dataset, and every broken row. Exit code: 1 = something is broken, 2 = no
    dataset at all is there, 0 = else, also if some are missing."""
    todo = [(spec, kind) for kind in DEFAULTS for spec in tables(root, kind)]
    if names:
        wanted([spec for spec, _ in todo], names)  # an unknown name is an error
        todo = [(spec, kind) for spec, kind in todo if spec["name"] in names]
    tally = dict.fromkeys(["found", "missing", "broken"], 0)
    with ThreadPoolExecutor() as pool:
        verdicts = pool.map(check_one, todo, itertools.repeat(root))
        for status, lines in tqdm(verdicts, total=len(todo), disable=None):
            tally[status] += 1
            tqdm.write("\n         ".join(lines))
    print(", ".join(f"{status}: {number}" for status, number in tally.items()))
    if tally["broken"]:
        return 1
    return 0 if tally["found"] else 2


def main():
    """The command line; the exit code is check()'s."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,  # without it a wrong option ends in one line
    )
    parser.add_argument("--check", metavar="ROOT", required=True, help="look at all datasets")
    parser.add_argument("--names", help="only these datasets, with commas")
    args = parser.parse_args()
    return check(args.check, args.names.split(",") if args.names else None)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"data.py: {error}")
