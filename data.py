"""
MMEB as two tables: the training sources of VLM2Vec-V2 and the 78 test sets of MMEB-V2.

The idea. A benchmark is not code but a table: where the rows lie, which columns they have, what is
said before the image. Every dataset is a row of mmeb.json (see Row below), every kind of file has
a parser of a few lines, and the model only ever sees items:

    item = {"text": str, "image": ref | [ref, ...], "video": {"frames": [ref, ...], "fps": float},
            "instruction": str}                                        absent keys are left out
    ref  = an absolute path, or a TableImage inside a parquet file; load_image(ref) decodes either

Strings are VLM2Vec's to the byte, without its visual placeholder (our chat template puts images
first, so nothing is lost) and with all other white space: that is worth 1.7 points on VisDial.
prompts="qwen" moves the instruction of a test query to item["instruction"] instead.

The sampler's maths. A batch of B pairs is B/b sub-batches of b pairs. Each draws a dataset d with
p(d) = w_d / Σw and takes the next b rows of d's own shuffled walk. In-batch negatives of a
sub-batch so share a dataset, which makes them hard. A draw is a function of (seed, step), a shuffle
of (seed, dataset, epoch): neither workers nor ranks change the stream, and its state is the step.

How to run:
    python data.py --check ROOT [--train | --eval] [--names A,B]     found, missing, short, broken
    python data.py --check ROOT --fetch [--revision REV]             the same after a download
ROOT mirrors hub ids: ROOT/<hub id>/... as `hf download ID --repo-type dataset --local-dir ROOT/ID`
leaves it (then unpack the archives). Your pairs need no code: put them, in MMEB's columns (qry,
qry_image_path, pos_text, pos_image_path, optional neg_text, neg_image_path), into ROOT/train.jsonl
and ROOT/test.jsonl (or .parquet, which may hold the images themselves), images next to them; or
describe your files in ROOT/datasets.json (see Row).

Broken rows. In training a row that cannot be read is named, counted and replaced by the next one.
It stops an evaluation, whose score would be that of another test. --check names them all.

Left out: decoding videos (the published frame folders are read), audio, the agent and text-only
tasks of MMEB-V3, the English-only copies of ViDoRe-V2 that the leaderboard does not count.
Sources: VLM2Vec @ 6e1e1d4 and the dataset cards; comments say where the reference is wrong.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from tqdm import tqdm

IMG = "<|image_1|>"  # Phi-3.5-V's token in MMEB's text; it also stands where no image follows
FRAMES, FPS = 8, 2.0  # VLM2Vec looks at 8 frames of a video; 2 per second is what Qwen assumes

# labels: class names of test sets whose candidates are all classes, also those that no clip shows.
# visrag: VLM2Vec's prompts for VisRAG's training pages, {source: [before query, before page]}.
# tables: lists of patterns that a row may name. train, eval: the rows, in groups.
with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "mmeb.json"), "rb") as words:
    WORDS = json.load(words)
LABELS = WORDS["labels"]


class BadData(ValueError):
    """Something in the data is not what it should be: one line of at most 300 characters."""

    def __init__(self, text):
        # A library's message may span lines; a row may hold text that cannot be printed.
        line = " ".join(str(text).encode("utf-8", "backslashreplace").decode().splitlines())
        super().__init__(line if len(line) <= 300 else f"{line[:190]} ... {line[-105:]}")


class Missing(BadData):
    """The root has no table of this dataset: not broken, just not there."""


def fail(where, why):
    """Raise BadData("where: why"), or why alone where it says so already."""
    raise named(where, why) from None


def named(where, why):
    """The error that fail() raises."""
    return BadData(why if str(why).startswith(str(where)) else f"{where}: {why}")


def is_text(value):
    """Is it text that a file can hold? Half an emoji (a lone surrogate, legal in JSON) is not."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def short(value):
    """A value as it may stand in a message."""
    if value is None:
        return "null"
    if not isinstance(value, (str, int, float)):
        return f"a {type(value).__name__}"
    half = isinstance(value, str) and not is_text(value)  # repr() may be cut before it shows
    return repr(value)[:60] + " with half an emoji (a lone surrogate)" * half


# --------------------------------------------------------------------------------------------------
# Items and images


def item(text="", image=None, video=None, instruction=None):
    """Only what is there; a side with nothing at all (OK-VQA has blank answers) is {"text": ""}."""
    parts = {"text": text, "image": image, "video": video, "instruction": instruction}
    return {key: value for key, value in parts.items() if value not in (None, "")} or {"text": ""}


def listed(value):
    """None, a value or a list -> a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def refs(item):
    """Every image reference of an item, frames last."""
    frames = item["video"]["frames"] if "video" in item else []  # a list or a tuple
    return listed(item.get("image")) + list(frames)


def look(*items):
    """Open every image of these items; BadData names the first that is broken."""
    for item in items:
        for ref in refs(item):
            load_image(ref)


@dataclasses.dataclass(frozen=True)
class TableImage:
    """An image inside a parquet file: bytes, or the hub's {"bytes", "path"}; read when wanted."""

    table: str
    row: int
    column: str
    index: int | None = None  # where the cell is a list

    def read(self):
        """The encoded bytes."""
        value = open_table(self.table).data.fast_slice(self.row, 1).column(self.column)[0]
        value = (value if self.index is None else value.values[self.index]).as_py()
        return value["bytes"] if isinstance(value, dict) else value

    def __str__(self):
        place = f"{self.table} row {self.row} column {self.column}"
        return place if self.index is None else f"{place} image {self.index}"


# A PIL image that was opened lazily may be shared by several items, and by threads: whoever loads
# it first reads and closes its file, so only one thread at a time may try.
SHARED = threading.Lock()
# Pillow refuses images of more than twice its limit (89 Mpx) and only warns before; we refuse both.
warnings.simplefilter("error", Image.DecompressionBombWarning)
FAULTS = {
    "FileNotFoundError": "no such image",
    "UnidentifiedImageError": "not an image",
    "DecompressionBombError": "too many pixels",
    "DecompressionBombWarning": "too many pixels",
}


def load_image(ref):
    """path | bytes | {"bytes", "path"} | TableImage | PIL image -> RGB image, else BadData.

    As in the reference the EXIF orientation is NOT applied. Threads may share the references.
    """
    if isinstance(ref, dict):
        ref = ref.get("bytes") or ref.get("path")
    name = f"{len(ref)} bytes" if isinstance(ref, bytes) else str(ref)[:250]  # for messages
    if isinstance(ref, Image.Image):
        name = "image"
    elif not isinstance(ref, (str, os.PathLike, bytes, TableImage)):
        fail("image", f"a path, bytes or an image is wanted, got {short(ref)}")
    elif re.match("https?://", name):
        fail(name, "an address, and nothing is fetched from the web here: save the image first")
    try:
        image = ref if isinstance(ref, Image.Image) else Image.open(io.BytesIO(image_bytes(ref)))
        size = f"{image.width}x{image.height} pixels"  # as the header has it
        if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
            fail(name, f"too many pixels ({size}, the limit is {Image.MAX_IMAGE_PIXELS} in all)")
        if max(image.size) > 200 * min(image.size):  # Qwen's processors do not take it either
            fail(name, f"{size}: expected sides that differ by no more than 200 to 1")
        # What was opened here belongs to this thread.
        with SHARED if image is ref else contextlib.nullcontext():
            image.load()
        return to_rgb(image)
    except BadData as error:
        fail(name, error)
    except Exception as error:  # Pillow raises nearly anything at mutilated bytes
        fail(name, FAULTS.get(type(error).__name__, f"broken image ({error})"))


def image_bytes(ref):
    """The encoded bytes of a path, bytes or a TableImage."""
    if isinstance(ref, bytes):
        return ref
    if isinstance(ref, TableImage):
        return ref.read()
    check_file(ref)
    with open(ref, "rb") as file:
        return file.read()


def to_rgb(image):
    """An image of any mode -> RGB as a viewer shows it, ValueError where viewers would disagree.

    The reference says convert("RGB"), which drops alpha (a page of transparent black letters turns
    black; here alpha is laid on white) and cuts 16-bit grey off at 255 (here it is scaled).
    """
    if image.mode[0] in "IF":
        return grey_levels(image)
    if image.has_transparency_data:  # alpha, a transparent colour, a palette with alpha
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def grey_levels(image):
    """Grey of more than 8 bits -> RGB. Which level is white: I;16 says so, I and F do not.

    For them the highest level decides; in I it may be that of a mask (1) or of 10 or 12 bits.
    """
    levels = np.asarray(image).astype(np.float64)  # (h, w)
    low, high = levels.min(), levels.max()
    ranges = {"I": [(2, 255), (4096, 65535)], "F": [(0, 1), (1, 255)]}  # from ... to white
    ranges = ranges.get(image.mode, [(0, 65535)])
    whites = [white for least, white in ranges if low >= 0 and least <= high <= white]
    if not whites:  # so it is for NaN
        raise ValueError(f"mode {image.mode} with levels from {low:g} to {high:g}: which is white?")
    if getattr(image, "tag_v2", {}).get(262) == 0:  # TIFF's WhiteIsZero, which Pillow leaves so
        levels = whites[0] - levels
    shown = (levels * 255 / whites[0]).astype(np.uint8)
    # PNG names a level that is transparent: white, as everywhere here.
    if "transparency" in image.info:
        shown[levels == image.info["transparency"]] = 255
    return Image.fromarray(shown).convert("RGB")


def frames_of(folder, n):
    """Paths of a clip's frames in natural order: n of them at np.linspace(0, last, n), or all.

    Fewer than n are taken as they are (VLM2Vec's rule at 6e1e1d4). Upstream pads with the last
    frame since June 2026, which costs Qwen3 2.3 points on HMDB51.
    """
    names = [name for name in os.listdir(folder) if name[0] != "."]  # AppleDouble files: ._x.jpg
    names = [name for name in names if name.lower().endswith((".jpg", ".jpeg", ".png"))]
    if not names:
        fail(f"clip folder {folder}", "has no frames")
    names.sort(key=natural)
    if n and n <= len(names):
        names = [names[i] for i in np.linspace(0, len(names) - 1, n, dtype=int)]
    return [os.path.join(folder, name) for name in names]


def natural(name):
    """A sort key: frame_2 before frame_10."""
    parts = re.split(r"(\d+)", name)
    # isdigit() would let "\u00b2" through, which int() refuses.
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p.lower()) for p in parts]


# --------------------------------------------------------------------------------------------------
# Tables: rows by number out of parquet files, JSON lines and JSON lists


def check_file(path):
    """Refuse a file whose first bytes say that it cannot be what it should be."""
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        fail(path, "is empty (zero bytes)")
    if head.startswith(b"version https://git-lfs"):
        fail(path, "is a git-lfs pointer: run `git lfs pull` or download it again")


OPENING = threading.Lock()  # --check opens tables in threads, `datasets` was not made for that


def open_table(path):
    """A parquet or JSON file -> a datasets.Dataset of the file as it is now.

    `datasets` keeps an Arrow copy in its cache and maps it: a row is in memory while it is used.
    """
    check_file(path)
    stat = os.stat(path)
    with OPENING:
        return _open_table(path, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _open_table(path, size, changed):
    """size and changed are part of the name in the cache: a file that has changed is read anew.

    JSON stays text, a row a line, and is parsed when a row is read: Arrow wants columns of one type
    each (neg_text is text or a list), takes text for dates, and does not name the line at fault.
    """
    import datasets  # takes seconds, which load_image alone need not wait for
    from datasets.data_files import DataFilesDict, DataFilesList

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs, it also raises
    try:
        if path.endswith(".parquet"):
            # A bare path would be taken for a pattern, and a folder may be called run[1].
            files = DataFilesDict(train=DataFilesList([path], [(size, changed)]))
            return datasets.Dataset.from_parquet(files, split="train", batch_size=1000)
        return datasets.Dataset.from_generator(
            json_lines,
            features=datasets.Features({"line": datasets.Value("binary")}),
            gen_kwargs={"path": path, "size": size, "changed": changed},
        )
    except Exception as error:  # of pyarrow, fsspec, the file system: here they become one line
        why = error.__cause__ or error
        fail(path, f"cannot be read: {'no rows' if 'to no data' in str(why) else why}")


def json_lines(path, size, changed):
    """Lines of a JSONL file that are not blank, or the elements of a JSON list, as bytes."""
    with open(path, "rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()  # a byte order mark
        file.seek(0)
        if start.startswith(b"["):
            for value in json.load(file):
                yield {"line": json.dumps(value).encode()}
            return
        for line in file:
            if line.strip():
                yield {"line": line}


class Cells(dict):
    """A row, {column: value}, that names a column it does not have."""

    def __missing__(self, column):
        fail(f"no column {column}", f"there are {', '.join(self)}")


class Table:
    """The first `cap` rows of some files by number: table[i] -> Cells, images as TableImage."""

    def __init__(self, paths, cap=None):
        self.files = [(path, open_table(path)) for path in paths]
        rows = sum(len(file) for _, file in self.files)
        self.length = min(rows, cap or rows)

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        for path, file in self.files:
            if i < len(file):
                return read_row(path, file, i)
            i -= len(file)
        raise IndexError(i)


def read_row(path, file, i):
    """Row i of a file that open_table() gave."""
    where = f"{path} row {i}"
    row = file.data.fast_slice(i, 1)  # column(name)[i] would walk through all pieces of the table
    columns = {name: row.column(name)[0] for name in row.column_names}
    try:
        if path.endswith(".parquet"):
            refs = {name: TableImage(path, i, name) for name in columns}
            return Cells({name: arrow_value(columns[name], refs[name]) for name in columns})
        row = json.loads(columns["line"].as_py().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, nested too deeply
        fail(where, f"cannot be read ({error})")
    if not isinstance(row, dict):
        fail(where, f"a JSON object is wanted, got {short(row)}")
    return Cells(row)


def arrow_value(cell, image):
    """An Arrow cell as Python. Bytes of an image stay where they are: `image` refers to them."""
    if not cell.is_valid or not holds_images(cell.type):
        return cell.as_py()
    if isinstance(cell, pa.ListScalar):
        images = [dataclasses.replace(image, index=k) for k in range(len(cell))]
        return [arrow_value(value, ref) for value, ref in zip(cell.values, images)]
    parts = dict(cell.items()) if isinstance(cell, pa.StructScalar) else {"bytes": cell}
    encoded = parts.get("bytes", pa.scalar(None))
    if encoded.is_valid and not is_binary(encoded.type):
        fail(f"column {image.column}", f"an image's bytes are wanted, got {encoded.type}")
    # as_buffer() looks at the mapped file without copying it.
    if encoded.is_valid and encoded.as_buffer().size:
        return image
    return parts.get("path", pa.scalar(None)).as_py() or None


def holds_images(kind):
    """Is this Arrow type one of images: bytes, the hub's {"bytes", "path"} (one may be absent), or
    a list of those?"""
    types = pa.types
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return holds_images(kind.value_type)
    if types.is_struct(kind):
        return max(kind.get_field_index("bytes"), kind.get_field_index("path")) >= 0
    return is_binary(kind)


def is_binary(kind):
    """Is this Arrow type bytes, in any of its layouts?"""
    types = pa.types
    varying = types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
    return varying or types.is_fixed_size_binary(kind)


KINDS = {"text": "text", "text?": "text", "texts": "a list of texts", "id": "an id"}


def cell(row, column, kind="text"):
    """A checked cell of a row. kind: text; text? (null is "", as everywhere in training);
    texts (a list with something in it); id (int or str -> str: hubs store ids as either, and qrels
    not always as the corpus does; pandas makes 7.0 of a 7 next to a null)."""
    value = row[column]
    if kind == "text?" and value is None:
        return ""
    if kind == "id" and type(value) in (int, float) and float(value).is_integer():
        return str(int(value))
    parts = value if kind == "texts" and isinstance(value, list) and value else [value]
    wrong = [part for part in parts if not is_text(part)]
    if (kind == "texts" and parts is not value) or (kind == "id" and value == ""):
        wrong = [value]
    if wrong:
        fail(f"column {column}", f"{KINDS[kind]} is wanted, got {short(wrong[0])}")
    return value


# --------------------------------------------------------------------------------------------------
# Rows of the two tables


@dataclasses.dataclass
class Row:
    """A dataset. mmeb.json and ROOT/datasets.json = {"train": [rows], "eval": [rows]}, which takes
    its place where it exists, need only the name and what differs from these defaults."""

    name: str  # unique; the key of every score and id
    parser: str | None = None  # of TRAIN_PARSERS (default mmeb) or EVAL_PARSERS (default pairs)
    hub: str = ""  # hub id = folder under ROOT; "": ROOT itself
    # Where in ROOT the rows lie: patterns of which the first that matches wins, or the name of a
    # list of them in mmeb.json. {hub} {repo} {name} {lower} {under} {split} {config} {part} are
    # filled in: repo is the hub id's last part, lower and under are spellings of the name, part is
    # queries, corpus or qrels.
    table: str | list | None = None
    split: str | None = None  # "original", "test" ...
    config: str | list = ""  # the hub's config; a test set may have several, read in turn
    cap: int | None = None  # only so many first rows are used
    media: str | list | None = None  # folders where images and clips are looked for, in this order
    frames: int | None = None  # frames per video, and what the item says of their rate
    fps: int | float = FPS
    fetch: list = dataclasses.field(default_factory=list)  # [[hub id, pattern, command to unpack]]
    # Training only: published rows (None where they are known to about 1 %), weight of a draw.
    rows: int | None = None
    weight: int | float = 1.0
    # Test sets only. scope: the candidates are the row's (local) or all (global); ood: MMEB-train
    # has no such set; inst and tgt: the parser's prompts; tail: what ends a query.
    modality: str = "image"
    family: str = "own"
    scope: str | None = None
    queries: int | None = None  # published
    ood: bool | None = None
    inst: str = ""
    tgt: str = ""
    tail: str = "\n"
    columns: list = dataclasses.field(default_factory=lambda: ["video_id", "caption"])  # video_ret
    labels: str | list | None = None  # all classes, or their key in mmeb.json
    # What page_labels="original" replaces: the page sets had wrong labels until November 2025.
    original: dict | None = None


def complete(row, kind):
    """A short row -> all keys. A typing mistake must not become a default: BadData names it."""
    name = row.get("name") if isinstance(row, dict) else None
    if not is_text(name) or not re.fullmatch(r"[^/\\\0]{1,200}", name) or name in (".", ".."):
        fail("datasets.json", f"a row of {kind!r} needs a name that can name a file, {short(name)}")
    types = {field.name: field.type for field in dataclasses.fields(Row)}
    for key, value in row.items():
        if key not in types:
            fail(name, f"unknown key {short(key)} in its row; known: {', '.join(types)}")
        if not is_value(value, types[key]):
            kinds = getattr(types[key], "__name__", types[key])
            fail(name, f"{key}: {kinds} is wanted, got {short(value)}")
    row = dataclasses.asdict(Row(**row))
    # Retrieval among all candidates is what these are for.
    everywhere = row["parser"] in (None, "pairs", "beir", "video_ret")
    row["scope"] = row["scope"] or ("global" if everywhere else "local")
    row["parser"] = row["parser"] or {"train": "mmeb", "eval": "pairs"}[kind]
    row["split"] = row["split"] or {"train": "original", "eval": "test"}[kind]
    row["media"] = listed(row["media"]) or [row["hub"]]
    table = row["table"] or ("beir" if row["parser"] == "beir" else "hub")
    row["table"] = WORDS["tables"].get(table, [table]) if isinstance(table, str) else table
    choices = {"parser": TRAIN_PARSERS if kind == "train" else EVAL_PARSERS, "labels": LABELS}
    choices |= {"modality": ["image", "video", "visdoc"], "scope": ["local", "global"]}
    for key, values in choices.items():
        if isinstance(row[key], str) and row[key] not in values:
            fail(name, f"{key} {row[key]!r}: one of {', '.join(values)} is wanted")
    return row


def is_value(value, kind):
    """Is it of this type, a number from 0 up, text that a file can hold?"""
    if not isinstance(value, kind):
        return False
    if isinstance(value, (int, float)):
        return 0 <= value < 1e18
    if isinstance(value, (str, list)):
        return all(is_text(part) or isinstance(part, list) for part in listed(value))
    return True


def expand(groups):
    """mmeb.json's groups -> rows: what those of a group have in common, then each one's keys."""
    rows = []
    for group in groups:
        for row in group["rows"]:
            common = json.dumps(group["common"]).replace("{name}", row["name"])  # in all texts
            rows.append({**json.loads(common), **row})
    return rows


TRAIN, EVAL = expand(WORDS["train"]), expand(WORDS["eval"])


def tables(root, kind):
    """The complete rows that hold for a root: its datasets.json, else its train.jsonl and
    test.jsonl (or .parquet), else TRAIN or EVAL."""
    if not os.path.isdir(root):
        fail(root, "no such folder")
    listing = os.path.join(root, "datasets.json")
    files = ["train.jsonl", "train.parquet", "test.jsonl", "test.parquet"]
    files = [file for file in files if os.path.exists(os.path.join(root, file))]
    rows = TRAIN if kind == "train" else EVAL
    if os.path.exists(listing):
        rows = read_listing(root, listing)[kind]
    elif files:
        files = [file for file in files if file.startswith("train" if kind == "train" else "test")]
        rows = [{"name": "own", "table": file} for file in files]
        if len(rows) > 1:
            fail(root, f"{' and '.join(files)}: which is meant?")
    rows = [complete(row, kind) for row in rows]
    for name, count in collections.Counter(row["name"] for row in rows).items():
        if count > 1:
            fail(listing, f"{kind} dataset {name!r} is listed twice")
    return rows


def fingerprint(root, kind):
    """A hash of a root's "training" or "test" tables: their rows here and, of every file, name,
    size, the first and the last megabyte. A row that is put in or taken out changes it."""
    digest = hashlib.sha256()
    for row in tables(root, "train" if kind == "training" else "eval"):
        digest.update(json.dumps(row, sort_keys=True).encode())
        files = Files(row, root)
        parts = itertools.product(listed(row["config"]) or [""], ["", "corpus", "qrels", "queries"])
        for path in [path for config, part in parts for path in files.paths(config, part)]:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(f"{os.path.relpath(path, files.root)} {size}".encode())
                digest.update(file.read(2**20))
                file.seek(max(0, size - 2**20))
                digest.update(file.read())
    return digest.hexdigest()


def revisions(root):
    """{hub id: commits} of what `hf download` or --fetch brought, which note them."""
    commits = collections.defaultdict(set)
    for note in Path(root).glob("*/*/.cache/huggingface/download/**/*.metadata"):
        hub = "/".join(note.relative_to(root).parts[:2])
        commits[hub].add(note.read_text("utf-8").split("\n")[0])
    return {hub: sorted(found) for hub, found in sorted(commits.items())}


def read_listing(root, path):
    """datasets.json -> {"train": [rows], "eval": [rows]}."""
    check_inside(root, path)
    try:
        with open(path, encoding="utf-8") as file:
            rows = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        fail(path, f"not readable as JSON ({error})")
    known = {"train": [], "eval": []}
    lists = isinstance(rows, dict) and all(isinstance(value, list) for value in rows.values())
    if not lists or set(rows) - set(known):
        fail(path, '{"train": [rows], "eval": [rows]} is wanted')
    return known | rows


def wanted(rows, names):
    """The rows of these names, in this order (None: all); an unknown name is an error."""
    by_name = {row["name"]: row for row in rows}
    for name in names or []:
        if name not in by_name:
            raise BadData(f"no dataset {name!r} in the table; there are {', '.join(by_name)}")
    return [by_name[name] for name in dict.fromkeys(names)] if names is not None else rows


# --------------------------------------------------------------------------------------------------
# Files of a root


def check_inside(root, path):
    """Refuse a path that leads out of ROOT, also through a symbolic link.

    So a hub cache, whose snapshots link to blobs elsewhere, is no root; `hf download --local-dir`
    writes real files.
    """
    real = os.path.realpath(path)
    if not os.path.join(real, "").startswith(os.path.join(os.path.realpath(root), "")):
        fail(f"path {path!r}", f"leaves the root (it is {real})")


def check_shards(paths):
    """Refuse NAME-00000-of-00003 without its siblings, or next to those of another division."""
    matches = [re.search(r"-\d+-of-(\d+)(?:-[0-9a-f]{16})?\.\w+$", path) for path in paths]
    counts = {int(match[1]) for match in matches if match}
    if counts and counts != {len(paths)}:
        numbers = " and of ".join(map(str, sorted(counts)))
        fail(paths[0], f"{len(paths)} shards are there, of {numbers} that are wanted")


class Files:
    """A complete row on a root: its tables, and the images and clips that they refer to."""

    def __init__(self, spec, root, frames=None):
        self.spec = spec
        self.name = spec["name"]
        self.parser = spec["parser"]
        self.root = os.path.realpath(root)
        self.frames = frames or spec["frames"] or FRAMES  # the caller's, the row's, VLM2Vec's

    def inside(self, relative, folder=""):
        """A path relative to a folder of ROOT -> the absolute one."""
        # \udc80 ... \udcff stand for bytes that are no UTF-8: a file may be called so.
        if re.search("[\0\ud800-\udc7f\udd00-\udfff]", relative):
            fail(short(relative), "not a path")
        if not relative or os.path.isabs(relative) or ".." in re.split(r"[/\\]", relative):
            fail(f"path {relative!r}", "leaves the root" if relative else "is empty")
        path = os.path.normpath(os.path.join(self.root, folder, relative))
        check_inside(self.root, path)
        return path

    def find(self, *names, clip=False):
        """Absolute path of an image (or the folder of a clip) in the first folder of media that has
        it, under any of these names."""
        for name in names:
            if not isinstance(name, str):
                fail(short(name), "not a path")
        return self.search(names, clip)

    def search(self, names, clip):
        """What find() says of names that are text: a test set keeps it."""
        there = os.path.isdir if clip else os.path.isfile
        for folder, name in itertools.product(self.spec["media"], names):
            path = self.inside(name, folder)
            if there(path):
                return path
        folders = ", ".join(folder or "." for folder in self.spec["media"])
        what = "clip folder" if clip else "image"
        fail(f"{what} {' or '.join(map(repr, names))}", f"missing, looked in {folders}")

    def image(self, value):
        """A cell -> a reference, a list of them, or None where there is nothing."""
        cells = [cell for cell in listed(value) if cell not in (None, "")]
        images = [c if isinstance(c, TableImage) else self.find(c) for c in cells]
        if isinstance(value, list):
            return images or None
        return images[0] if images else None

    def clip(self, name, n=0):
        """Name of a video -> {"frames", "fps"}; n = None takes every frame there is."""
        frames = frames_of(self.find(name, clip=True), self.frames if n == 0 else n)
        for path in frames:
            check_inside(self.root, path)
        return {"frames": frames, "fps": self.spec["fps"]}

    def table(self, config="", part=""):
        """The Table of a config or part. Missing where the root has none of the dataset, BadData
        where it has another part of it."""
        try:
            paths = self.paths(config, part)
            if paths:
                check_shards(paths)
                return Table(paths, self.spec["cap"])
            parts = ["corpus", "qrels", "queries"] if part else [""]
            configs = listed(self.spec["config"]) or [""]
            half = any(self.paths(c, p) for c, p in itertools.product(configs, parts))
        except BadData as error:
            fail(self.name, error)
        what = f"{self.name}: no {part or config or 'table'} in {self.root}"
        raise (BadData if half else Missing)(f"{what} (looked for {self.spec['table'][0]} ...)")

    def paths(self, config, part):
        """The sorted files of the first pattern that matches any; '*' matches no ._x.parquet."""
        hub, name = self.spec["hub"], self.name
        lower = name.lower()
        fill = {"hub": hub, "repo": os.path.basename(hub), "name": name, "config": config}
        fill |= {"split": self.spec["split"], "part": part}
        fill |= {"lower": lower, "under": lower.replace("-", "_")}
        fill = {key: glob.escape(value) for key, value in fill.items()}
        for pattern in self.spec["table"]:
            try:
                pattern = os.path.normpath("./" + pattern.format(**fill))
            except (LookupError, ValueError, AttributeError) as error:
                fail(name, f"table {pattern!r} is no pattern ({error}); it may hold {list(fill)}")
            files = sorted(glob.glob(pattern, root_dir=self.root))
            files = [file for file in files if file.endswith((".parquet", ".jsonl", ".json"))]
            files = [path for path in map(self.inside, files) if os.path.isfile(path)]
            if files:
                return files
        return []


# --------------------------------------------------------------------------------------------------
# Training: a parser per kind of source, row -> (query item, target item, [hard negative items])

PAIR = ["qry", "qry_image_path", "pos_text", "pos_image_path"]


def mmeb_pair(files, row):
    """MMEB's columns. Hard negatives (text, image or both; a value or lists) are kept: VLM2Vec
    reads and drops them."""
    texts, images = listed(row.get("neg_text")), listed(row.get("neg_image_path"))
    if texts and images and len(texts) != len(images):
        fail("negatives", f"{len(texts)} neg_text for {len(images)} neg_image_path")
    negatives = [
        mmeb_side(files, {"neg_text": text, "neg_image_path": image}, "neg_text", "neg_image_path")
        for text, image in itertools.zip_longest(texts, images)
        if text or image
    ]
    return mmeb_side(files, row, *PAIR[:2]), mmeb_side(files, row, *PAIR[2:]), negatives


def mmeb_side(files, row, text, image):
    """The item of two columns."""
    return item(cell(row, text, "text?").replace(IMG, ""), files.image(row[image]))


def video_pair(files, row):
    """LLaVA-Hound's conversation about a clip, used in three ways: clip -> caption, caption ->
    clip, clip and question -> answer."""
    turns = row["conversations"]
    turns = turns[:2] if isinstance(turns, list) else []
    texts = [turn.get("value") for turn in turns if isinstance(turn, dict)]
    if len(texts) < 2 or not all(map(is_text, texts)) or not texts[1]:
        fail("column conversations", "two turns with a value are wanted, of text")
    question, answer = texts[0].replace("<video>", ""), texts[1]
    clip = files.clip(cell(row, "video"))
    if files.parser == "video_retrieval":
        query = item("Find a video that contains the following visual content: " + answer)
        return query, item("Understand the content of the provided video: ", video=clip), []
    if files.parser == "video_qa":
        question = "Answer a question based on the content of a video. " + question
    return item(question, video=clip), item(answer), []


def page_pair(files, row):
    """Pages. colpali_train_set is used as question answering: page and question -> answer (its own
    long prompts are left out, as VLM2Vec does); VisRAG as text -> page. The odd spaces are
    VLM2Vec's f"{prompt} {query} {token}" of a prompt that ends in a space, token or query empty."""
    query, page = cell(row, "query", "text?"), files.image(row["image"])
    if files.parser == "page_qa":
        return item(" " + query, page), item(cell(row, "answer", "text?")), []
    before, after = WORDS["visrag"].get(str(row.get("source")), ("", ""))
    query = f"{before}  {query} " if before else f"{query} "
    return item(query), item(f"{after}  " if after else " ", page), []


# name: (parser, the columns of each side)
TRAIN_PARSERS = {
    "mmeb": (mmeb_pair, [PAIR[:2], PAIR[2:]]),
    "page_qa": (page_pair, [["query", "image"], ["answer"]]),
    "page": (page_pair, [["query"], ["image"]]),
    "video_caption": (video_pair, [["video"], ["conversations"]]),
    "video_retrieval": (video_pair, [["video"], ["conversations"]]),
    "video_qa": (video_pair, [["video"], ["conversations"]]),
}


class Source(Files):
    """A training row opened. Rows with an empty side are dropped and counted, as the reference
    does: of the first `cap`, not before."""

    def __init__(self, spec, root):
        super().__init__(spec, root)
        self.parse, sides = TRAIN_PARSERS[self.parser]
        self.rows = self.table(spec["config"])
        keep = (i for i in range(len(self.rows)) if self.is_full(i, sides))
        self.keep = np.fromiter(keep, np.int32)  # numbers of the usable rows, 4 bytes each
        self.dropped = len(self.rows) - len(self.keep)
        if not len(self.keep):
            fail(self.name, f"no usable row in {self.rows.files[0][0]}: every side is empty")

    def is_full(self, i, sides):
        """Has each side something? A row that cannot be read counts: pair() will name it."""
        try:
            row = self.rows[i]
            return all(any(row[column] for column in side) for side in sides)
        except BadData:
            return True

    def id(self, row):
        """Usable row -> "Name/row in its table"."""
        return f"{self.name}/{self.keep[row]}"

    def pair(self, row):
        """-> {"id", "dataset", "query": item, "target": item, "negatives": [items]}, with refs."""
        try:
            query, target, negatives = self.parse(self, self.rows[int(self.keep[row])])
            if {"text": ""} in (query, target, *negatives):  # is_full() saw IMG, or an empty list
                fail("a side", f"empty but for {IMG}, and no image is given")
        except BadData as error:
            fail(self.id(row), error)
        pair = {"id": self.id(row), "dataset": self.name, "query": query, "target": target}
        return pair | {"negatives": negatives}


def pair_key(pair):
    """A short hash of what a pair is: the texts and the images' bytes of query, target and
    negatives. Unlike its row number it stays when rows are inserted, or the root is moved."""
    digest = hashlib.sha256()
    for side in (pair["query"], pair["target"], *pair["negatives"]):
        texts = {key: value for key, value in side.items() if key in ("text", "instruction")}
        digest.update(json.dumps(texts, sort_keys=True).encode())
        for ref in refs(side):
            digest.update(hashlib.sha256(image_bytes(ref)).digest())
    return digest.hexdigest()[:16]


def sound(pair):
    """The pair, if every image of it can be opened."""
    look(pair["query"], pair["target"], *pair["negatives"])
    return pair


class TrainData:
    """Sources by number, their usable rows by number; a pair is built when it is asked for.

    names, sizes (usable rows), weights by source; dropped {name: rows with an empty side}; missing:
    names the root does not have.
    """

    def __init__(self, sources, missing):
        self.sources = sources
        self.missing = missing
        self.names = [source.name for source in sources]
        self.sizes = [len(source.keep) for source in sources]
        self.weights = [float(source.spec["weight"]) for source in sources]
        self.dropped = {source.name: source.dropped for source in sources}
        # A byte per row, shared with worker processes: has it been named as broken?
        self.named = [multiprocessing.RawArray("b", size) for size in self.sizes]

    def id(self, source, row):
        return self.sources[source].id(row)

    def pair(self, source, row):
        """The pair, images as references."""
        return self.sources[source].pair(row)

    def fetch(self, source, row, read=sound):
        """read(pair). If that fails (ValueError) the next row that can be read takes its place;
        those that are left out are named, each once, whichever process meets it."""
        size = self.sizes[source]
        errors = {}
        for i in itertools.chain(range(row, size), range(row)):
            try:
                pair = read(self.pair(source, i))
            except ValueError as error:
                errors[i] = error
                continue
            for broken, error in errors.items():
                self.name_broken(source, broken, error)
            return pair
        fail(self.names[source], f"none of its {size} rows can be read; the first: {errors[row]}")

    def name_broken(self, source, row, error):
        if not self.named[source][row]:
            self.named[source][row] = 1
            line = named(self.id(source, row), error)
            tqdm.write(f"skipped ({self.skipped} so far): {line}")

    @property
    def skipped(self):
        """How many broken rows have been met."""
        return sum(sum(rows) for rows in self.named)


def train_sets(root, names=None, split=None):
    """TrainData of a root. names=None takes what is there and lists the rest in .missing; a name
    that is asked for must be there. A dataset without a single sound row is refused here."""
    sources, missing = [], []
    for row in wanted(tables(root, "train"), names):
        try:
            sources.append(Source(row | {"split": split or row["split"]}, root))
        except Missing:
            if names is not None:
                raise
            missing.append(row["name"])
    if not sources:
        fail(root, f"none of its {len(missing)} training datasets is there")
    data = TrainData(sources, missing)
    for source in range(len(sources)):
        data.fetch(source, 0)  # fails where nothing can be read, before anything is trained
    return data


class Sampler:
    """Endless batches [(source, row), ...]. The state is the step: skip(n) leaves n batches out.

    Every rank draws the global batch and takes every world-th sub-batch (or an equal part of one,
    where there are fewer sub-batches than ranks). A walk that ends inside a sub-batch goes on with
    the next epoch's order; a source smaller than a sub-batch repeats rows in it (the loss masks
    equal targets). first: where in each source its `sizes` rows begin, so that stages can have rows
    of their own.
    """

    def __init__(self, sizes, weights, batch, sub_batch, seed=0, rank=0, world=1, first=None):
        weights = np.asarray(weights, np.float64)
        if len(sizes) != len(weights) or not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
            raise ValueError(f"weights {weights.tolist()}: from 0 up, not all 0, a source each")
        if any(size < 1 for size, weight in zip(sizes, weights) if weight > 0):
            raise ValueError(f"a source with a weight has no rows: sizes {list(sizes)}")
        if sub_batch < 1 or batch % sub_batch or batch % world:
            raise ValueError(
                f"batch {batch} is no multiple of sub_batch {sub_batch}, world {world}"
            )
        self.sizes = list(sizes)
        self.p = weights / weights.sum()
        self.batch = batch
        self.sub_batch = sub_batch
        self.seed = seed
        self.rank = rank
        self.world = world
        self.first = [0] * len(self.sizes) if first is None else list(first)
        self.step = 0
        self.taken = [0] * len(self.sizes)  # rows that each source's walk has gone
        self.orders = {}  # source: (epoch, its shuffled rows); 4 bytes a row

    def __iter__(self):
        return self

    def __next__(self):
        """This rank's batch / world pairs of the next global batch."""
        pairs = [pair for source in self.draw() for pair in self.take(source)]
        size = math.gcd(self.sub_batch, self.batch // self.world)  # sub_batch, if ranks are few
        parts = [pairs[at : at + size] for at in range(0, self.batch, size)]
        return [pair for part in parts[self.rank :: self.world] for pair in part]

    def skip(self, steps):
        """Draw so many batches, and forget them."""
        for _ in range(steps):
            for source in self.draw():
                self.taken[source] += self.sub_batch

    def draw(self):
        """The sources of the next batch's sub-batches."""
        rng = np.random.default_rng([0, self.seed, self.step])  # order() has the streams of 1
        self.step += 1
        return rng.choice(len(self.p), self.batch // self.sub_batch, p=self.p).tolist()

    def take(self, source):
        """The next sub_batch rows of a source's walk."""
        pairs = []
        for at in range(self.taken[source], self.taken[source] + self.sub_batch):
            epoch, place = divmod(at, self.sizes[source])
            row = int(self.order(source, epoch)[place])
            pairs.append((source, self.first[source] + row))
        self.taken[source] += self.sub_batch
        return pairs

    def order(self, source, epoch):
        """The shuffled rows of a source in an epoch."""
        if self.orders.get(source, (None,))[0] != epoch:
            rng = np.random.default_rng([1, self.seed, source, epoch])
            rows = rng.permutation(self.sizes[source]).astype(np.int32)
            self.orders[source] = (epoch, rows)
        return self.orders[source][1]


# --------------------------------------------------------------------------------------------------
# Evaluation: a parser per kind of test set, row -> a query, its candidates, its positives


class EvalSet(Files):
    """A test row opened and filled by its parser.

    name, modality      as in the row, which is .spec
    metric              hit@1, or ndcg_linear@5 for visdoc
    protocol            what a score of it must be quoted with
    queries, query_ids  items and their names
    candidates          items, one per key; cand_ids the keys, cand_where the rows that had them
                        first, index {key: number}
    local               per query an array of candidate numbers (repeats kept), or None: all, for
                        every query
    positives           per query candidate numbers
    grades              per query the positives' grades, or None
    rows                of the table of queries
    """

    def __init__(self, spec, root, frames=None, prompts="vlm2vec", problems=None):
        super().__init__(spec, root, frames)
        self.prompts = prompts
        self.inst = spec["inst"]
        self.tgt = spec["tgt"]
        self.problems = problems  # a list takes every complaint; None: the first is raised
        self.modality = spec["modality"]
        self.metric = "ndcg_linear@5" if self.modality == "visdoc" else "hit@1"
        labels = spec["labels"]
        self.labels = LABELS[labels] if isinstance(labels, str) else listed(labels)
        self.queries = []
        self.query_ids = []
        self.candidates = []
        self.cand_ids = []
        self.cand_where = []
        self.index = {}
        self.local = []
        self.positives = []
        self.grades = []
        self.rows = 0
        self.where = self.name  # the row being read
        self.detail = ""  # and in which of several configs it is
        self.config = ""
        self.asked = {}  # of the parser pairs: query -> its number
        self.search = functools.cache(self.search)  # 1000 rows may share 1000 candidates

    @contextlib.contextmanager
    def at(self, where, detail=""):
        """What goes wrong inside is wrong with this row."""
        self.where = where
        self.detail = detail
        try:
            yield
        except BadData as error:
            error = named(where + detail, error)
            if self.problems is None:
                raise error from None
            self.problems.append(str(error))

    def say(self, full, inst, content, image=None, video=None):
        """VLM2Vec's string, or Qwen's instruction (system turn) and content apart, where targets
        have no instruction."""
        if self.prompts == "vlm2vec":
            return item(full, image, video)
        return item(content, image, video, inst.strip().removesuffix("Question:").strip())

    def cand(self, key, item):
        """The number of the candidate with this key. A later one with that key is the same one."""
        if key not in self.index:
            if not is_text(key):
                fail("candidate", f"text is wanted as its key, got {short(key)}")
            self.look(item)
            self.index[key] = len(self.candidates)
            self.candidates.append(item)
            self.cand_ids.append(key)
            self.cand_where.append(self.where + self.detail)
        return self.index[key]

    def query(self, item, cands, positives, grades=None, qid=None):
        """A query with the numbers of its candidates and positives."""
        if not positives:
            fail("query", "it has no positive, or that is broken")
        self.look(item)
        self.queries.append(item)
        self.query_ids.append(qid or self.where)  # "Name/row in its table" where there is no id
        self.local.append(np.array(cands, np.int64))
        self.positives.append(list(dict.fromkeys(positives)))  # MomentSeeker lists clips twice
        self.grades.append(grades)

    def look(self, item):
        """--check opens every image; a run does when it embeds them."""
        if self.problems is not None:
            look(item)


def image_set(b, row):
    """The 36 image sets. Query: T + " " + instruction [+ " " + text], " \n" -> "\n", + tail; then
    the token T goes.

    Candidates are raw texts (key = the text), or images with an instruction and, where the first is
    not blank (WebQA, EDIS, OVEN, ...), captions: in image_t2i the key is the path alone, so a path
    with another caption collapses; in image_i2i_vg it is path:caption (several objects of an image
    are targets in RefCOCO-Matching). The positive is the first.
    """
    kind, tail = b.parser, b.spec["tail"]
    inst, text = cell(row, "qry_inst").replace(IMG, ""), cell(row, "qry_text", "text?")
    if kind in ("image_t2i", "image_i2i_vg"):
        cands = image_targets(b, row, kind)
    else:
        answers = cell(row, "tgt_text", "texts")
        cands = [b.cand(answer, b.say(answer, "", answer)) for answer in answers]
    if kind == "image_t2i":  # without image, though a stray token may be there (WebQA)
        return b.query(b.say(f"{inst} {text}{tail}", inst, text), cands, cands[:1])
    # Two of VLM2Vec's parsers strip the instruction, two do not.
    lead = inst if kind in ("image_cls", "image_i2t") else "\n" + inst.strip()
    full = f" {lead} {text}" if text else f" {lead}"
    image = b.find(cell(row, "qry_img_path"))
    query = b.say(full.replace(" \n", "\n") + tail, inst, text, image)
    return b.query(query, cands, cands[:1])


def image_targets(b, row, kind):
    """The numbers of candidates that are images."""
    inst, paths = cell(row, "tgt_inst").replace(IMG, ""), cell(row, "tgt_img_path", "texts")
    captions = [""] * len(paths)
    if row.get("tgt_text") not in (None, [], [""]):
        captions = cell(row, "tgt_text", "texts")
    if len(captions) != len(paths):
        fail("tgt_text", f"{len(captions)} of them for {len(paths)} tgt_img_path")
    cands = []
    blank = not captions[0].strip()
    end = "" if blank and kind == "image_i2i_vg" else "\n"
    for path, caption in zip(paths, captions):
        full = f" {inst}" if blank else f" {inst} {caption}"
        image = b.find(path)
        target = b.say(full.replace(" \n", "\n") + end, "", "" if blank else caption.strip(), image)
        key = path if kind == "image_t2i" else path + ":" + caption.strip('"')
        cands.append(b.cand(key, target))
    return cands


def video_cls(b, row):
    """Global over all labels (also those that do not occur: 1000 clips do not show all 700), or
    local over neg_text (SmthSmthV2)."""
    label = cell(row, "pos_text")
    local = b.spec["scope"] == "local"
    options = cell(row, "neg_text", "texts") if local else b.labels or [label]
    if label not in options:
        fail("column pos_text", f"{short(label)} is not among its {len(options)} options")
    cands = [b.cand(text, b.say(text, "", text)) for text in (options if local else [label])]
    video = b.clip(cell(row, "video_id", "id"))
    b.query(b.say(" " + b.inst, b.inst, "", video=video), cands, [b.index[label]])


# parser: (column of the clip's name, what stands before that name, columns of the options (none:
# yes or no), how the answer names the first, second ... option ("": as it is listed))
VIDEO_QA = {
    "videomme": ("videoID", "", ["options"], "ABCDEFGH"),
    "egoschema": ("video_idx", "", ["option"], "01234567"),
    "nextqa": ("video", "", ["a0", "a1", "a2", "a3", "a4"], "01234567"),
    "mvbench": ("video", "{config}/", ["candidates"], ""),
    "activitynetqa": ("video_name", "v_", [], ""),
}


def video_qa(b, row):
    """Multiple choice about a clip; key = the option as listed, text = what is embedded."""
    column, before, columns, letters = VIDEO_QA[b.parser]
    if len(columns) == 1:
        options = cell(row, columns[0], "texts")
    else:
        options = [cell(row, name) for name in columns] or ["yes", "no"]
    names = list(letters[: len(options)]) or options
    answer = cell(row, "answer", "id")
    answer = answer.strip() if letters else answer
    if answer not in names:
        fail("column answer", f"{short(answer)} is not among its {len(options)} options")
    # Where an answer stands twice (MVBench) the last is right, as upstream.
    right = len(names) - 1 - names[::-1].index(answer)
    question, keys, texts = ask(b.parser, cell(row, "question"), options)
    cands = [b.cand(key, b.say(text, "", text)) for key, text in zip(keys, texts)]
    clip = b.clip(before.format(config=b.config) + cell(row, column, "id"))
    query = b.say(f" {b.inst} {question}", b.inst, question, video=clip)
    b.query(query, cands, [cands[right]])


def ask(kind, question, options):
    """-> the question with its options, the candidates' keys, their texts."""
    lettered = [f"({chr(65 + i)}) {option}" for i, option in enumerate(options)]
    if kind == "activitynetqa":
        return question + "? (A) yes; (B) no.", options, options
    if kind == "videomme":
        return "\n".join([question, *options]), options, [bare(option) for option in options]
    if kind == "egoschema":  # nothing stands before 'A.': theirs
        return question + " ".join(options), options, [bare(option) for option in options]
    question = "\n".join([question, "Options:", *lettered]).rstrip()
    return (question, options, options) if kind == "nextqa" else (question, lettered, lettered)


def bare(option):
    """'C. Berries.' -> 'Berries'. Upstream takes the last letter of an option without '. ', we the
    option."""
    start = option.find(". ") if ". " in option else 0
    return option[start:].strip(". ")


def stem(path):
    """Name of a video without folders and ending (DiDeMo has .mov, .m4v, .3gp, ...); the .0 of
    QVHighlight's ..._210.0 is no ending."""
    return re.sub(r"\.(?=\d*[a-z])[a-z\d]{2,4}$", "", os.path.basename(path), flags=re.I)


def target_clip(b, key, name, n=0):
    """The number of a candidate that is a clip."""
    if key in b.index:
        return b.index[key]
    return b.cand(key, b.say(" " + b.tgt, "", "", video=b.clip(name, n)))


def video_ret(b, row):
    """Caption -> video among all; key = the video's id. The first of several captions is taken."""
    column, caption = b.spec["columns"]
    video = cell(row, column, "id")
    video = stem(video) if column == "video" else video  # DiDeMo names a file, the others have ids
    text = cell(row, caption, "texts")[0] if isinstance(row[caption], list) else cell(row, caption)
    target = target_clip(b, video, video)
    b.query(b.say(f"{b.inst} {text}", b.inst, text), [target], [target])


def moment(b, row):
    """Clips of a video: every folder next to query/ is a candidate, positive* the right ones; key =
    the clip's folder (ours under ROOT)."""
    text = cell(row, "query")
    video = stem(cell(row, "video_path", "id"))
    folder = b.find(video, clip=True)
    names = [name for name in os.listdir(folder) if name != "query" and name[0] != "."]
    names = [name for name in names if os.path.isdir(os.path.join(folder, name))]
    names.sort(key=natural)
    keys = [os.path.relpath(os.path.join(folder, name), b.root) for name in names]
    cands = [target_clip(b, key, f"{video}/{name}") for key, name in zip(keys, names)]
    right = [number for name, number in zip(names, cands) if name.startswith("positive")]
    query = b.say(f" {b.inst} {text}", b.inst, text, video=b.clip(f"{video}/query"))
    b.query(query, cands, right)


SEEK = {
    ".mp4": " Find the clip that corresponds to the given sentence and video segment:",
    ".jpg": " Select the video clip that aligns with the given text and image:",
    "": "Find the clip that corresponds to the given text:",
}


def momentseeker(b, row):
    """Several positives; the query is text, text and image, or text and clip; all frames there are
    (8) are taken."""
    text, given = cell(row, "query", "text?"), cell(row, "input_frames", "text?")
    kind = os.path.splitext(given)[1] if given else ""
    if kind not in SEEK or (given and not kind):
        fail("column input_frames", f"{short(given)} is no .mp4 and no .jpg")
    if not given and not text:
        fail("query", "neither query nor input_frames")
    image = b.find(f"query_{given}") if kind == ".jpg" else None
    video = b.clip(flat(given), None) if kind == ".mp4" else None
    cands = {}
    for column in ("positive_frames", "negative_frames"):
        clips = listed(row[column])
        if not all(isinstance(clip, dict) and "output_path" in clip for clip in clips):
            fail(f"column {column}", "a list of clips with an output_path is wanted")
        paths = [flat(cell(clip, "output_path")) for clip in clips]
        cands[column] = [target_clip(b, path, path, None) for path in paths]
    full = SEEK[kind] + (f" {text}" if text else "")
    query = b.say(full, SEEK[kind], text, image, video)
    b.query(query, [*cands["positive_frames"], *cands["negative_frames"]], cands["positive_frames"])


def flat(path):
    """MomentSeeker's clips lie in folders side by side: a/b.mp4 is video_frames/a_b."""
    return "video_frames/" + path.replace("/", "_").split(".mp4")[0]


def pairs(b, row):
    """A user's test set in MMEB-train's columns: all targets are candidates; equal queries are a
    single one with several positives."""
    query, target = mmeb_side(b, row, *PAIR[:2]), mmeb_side(b, row, *PAIR[2:])
    if {"text": ""} in (query, target):
        fail("a side", "is empty")
    key = side_key(row, *PAIR[:2])
    number = b.cand(side_key(row, *PAIR[2:]), target)
    if key not in b.asked:
        b.query(query, [number], [number])
        b.asked[key] = len(b.queries) - 1
    positives = b.positives[b.asked[key]]
    if number not in positives:
        positives.append(number)


def side_key(row, text, image):
    """'["text", "path"]'; an image inside the table goes by its bytes."""
    names = [
        hashlib.sha256(ref.read()).hexdigest() if isinstance(ref, TableImage) else ref or ""
        for ref in listed(row[image])
    ]
    names = names if isinstance(row[image], list) else (names or [""])[0]
    return json.dumps([row[text] or "", names], ensure_ascii=False)


def short_name(page):
    """VisRAG's page ids are longer than a file name may be: VLM2Vec cuts them and adds a hash."""
    base, ending = os.path.splitext(page)
    return f"{base[:50]}_{hashlib.md5(page.encode()).hexdigest()[:8]}{ending}"


def beir(b, limit):
    """queries + corpus + qrels -> text query, every page a candidate, graded positives. Ids are
    compared as text, whatever their type."""
    pages = read_pages(b)
    read_queries(b, read_qrels(b, pages), limit)


def read_pages(b):
    """The corpus -> the ids of its pages. An image is in the table, or lies in the media folders as
    the table says, as NAME.png (ViDoRe) or as short_name(NAME) (VisRAG)."""
    table = b.table(part="corpus")
    pages = set()
    for i in range(len(table)):
        with b.at(f"{b.name}/corpus row {i}"):
            row = table[i]
            page = cell(row, "corpus-id", "id")
            if page in pages:
                fail("column corpus-id", f"{page!r} occurs twice")
            pages.add(page)  # also a broken one: a qrel that names it is not at fault
            image = row.get("image")
            if not isinstance(image, TableImage):
                image = b.find(*listed(image or None), f"{page}.png", short_name(page))
            b.cand(page, b.say(" " + b.tgt, "", "", image=image))
    return pages


def read_qrels(b, pages):
    """How relevant a page is to a query, 0 (not at all) ... 3 -> {query: {page: grade}}."""
    table = b.table(part="qrels")
    relevant = collections.defaultdict(dict)
    for i in range(len(table)):
        with b.at(f"{b.name}/qrels row {i}"):
            row = table[i]
            page, grade = cell(row, "corpus-id", "id"), row["score"]
            if page not in pages:
                fail("column corpus-id", f"{page!r} names no document of the corpus")
            if type(grade) not in (int, float) or not abs(grade) <= 100:  # 2^grade is a number
                fail("column score", f"a number up to 100 is wanted, got {short(grade)}")
            if grade > 0:  # a duplicate keeps the higher grade
                grades = relevant[cell(row, "query-id", "id")]
                grades[page] = max(grades.get(page, 0), grade)
    return relevant


def read_queries(b, relevant, limit):
    """The questions; their pages are known by now."""
    table = b.table(part="queries")
    b.rows = len(table)
    seen = set()
    for i in range(len(table)):
        if limit and len(b.queries) == limit:
            break
        with b.at(f"{b.name}/queries row {i}"):
            row = table[i]
            qid, text = cell(row, "query-id", "id"), cell(row, "query")
            if qid in seen:
                fail("column query-id", f"{qid!r} occurs twice")
            seen.add(qid)
            grades = {b.index[p]: g for p, g in relevant[qid].items() if p in b.index}
            query = b.say(f"{b.inst} {text}", b.inst, text)
            b.query(query, [], list(grades), list(grades.values()), qid)


IMAGE_SETS = ["image_cls", "image_i2t", "image_qa", "image_t2i", "image_i2i_vg"]
EVAL_PARSERS = dict.fromkeys(IMAGE_SETS, image_set) | dict.fromkeys(VIDEO_QA, video_qa)
EVAL_PARSERS |= {"video_cls": video_cls, "video_ret": video_ret, "moment": moment}
EVAL_PARSERS |= {"momentseeker": momentseeker, "pairs": pairs, "beir": beir}


def load_eval(
    root, row, limit=None, page_labels="fixed", frames=None, prompts="vlm2vec", problems=None
):
    """A row of EVAL (or the name of one) -> EvalSet; the first thing that is broken stops it.

    limit: so many queries (a global set of pages or labels stays complete). frames: 8 as VLM2Vec
    (default), 64 as Qwen3-VL-Embedding. prompts: "vlm2vec" or "qwen". page_labels: "fixed" or
    "original", named in .protocol. problems: a list that takes all that is broken instead, images
    included. Missing where the root has no table of the set.
    """
    if prompts not in ("vlm2vec", "qwen") or page_labels not in ("fixed", "original"):
        raise ValueError(f"prompts {prompts!r} or page_labels {page_labels!r} is not known")
    if isinstance(row, str):
        row = wanted(tables(root, "eval"), [row])[0]
    spec = complete(row, "eval")
    if page_labels == "original" and spec["original"]:
        spec = complete(spec | spec["original"], "eval")
    b = EvalSet(spec, root, frames, prompts, problems)
    for label in b.labels:  # candidates 0, 1, ... whether a clip shows them or not
        b.cand(label, b.say(label, "", label))
    if b.parser == "beir":
        beir(b, limit)
    else:
        read_rows(b, limit)
        b.grades = None  # only pages are graded
    if not b.queries and not b.problems:
        with b.at(b.name):
            fail(b.name, f"not a single query in {b.rows} rows")
    if spec["scope"] == "global":
        b.local = None
    protocol = [f"{b.frames} frames"] if b.modality == "video" else []
    protocol.append(f"{prompts} prompts")
    protocol += [f"page labels: {page_labels}"] if spec["original"] else []
    b.protocol = ", ".join(protocol)
    return b


def read_rows(b, limit):
    """The rows of all configs, through the parser."""
    parse = EVAL_PARSERS[b.parser]
    configs = listed(b.spec["config"]) or [""]
    for b.config in configs:
        table = b.table(b.config)
        for i in range(len(table)):
            if limit and len(b.queries) == limit:
                break
            detail = f" (row {i} of {b.config})" if len(configs) > 1 else ""
            with b.at(f"{b.name}/{b.rows + i}", detail):
                parse(b, table[i])
        b.rows += len(table)


# --------------------------------------------------------------------------------------------------
# python data.py --check ROOT


def check_one(spec, kind, root, page_labels="fixed"):
    """A dataset read from end to end, every image decoded, of test clips every frame (a run may
    take fewer) -> (status, rows, usable rows, [what is wrong]).

    found | short (fewer rows than published) | broken | missing (no table, or a table of which not
    a single image is there: those were never fetched).
    """
    problems, rows, usable = [], 0, 0
    try:
        if kind == "eval":
            everything = {"page_labels": page_labels, "frames": sys.maxsize}
            es = load_eval(root, spec, **everything, problems=problems)
            rows, usable = es.rows, len(es.queries)
        else:
            source = Source(spec, root)
            rows = len(source.rows)
            usable = check_pairs(source, problems)
    except Missing:
        return "missing", 0, 0, []
    except BadData as error:
        problems.append(str(error))
    if problems:
        fetched = usable or not all("missing, looked in" in line for line in problems)
        return "broken" if fetched else "missing", rows, usable, problems
    published = spec["rows" if kind == "train" else "queries"] or 0
    return "short" if rows < published else "found", rows, usable, problems


def check_pairs(source, problems):
    """How many pairs are sound; what is wrong with the others goes into problems."""
    usable = 0
    for row in range(len(source.keep)):
        try:
            sound(source.pair(row))
            usable += 1
        except BadData as error:
            problems.append(str(named(source.id(row), error)))
    return usable


def downloads(spec, root, fetch=False, revision=None):
    """The commands that bring a dataset; with fetch they are run (archives are then unpacked by the
    printed command, not by us). revision: a commit, branch or tag, of every hub id it takes."""
    # A hub id of many datasets, each in a folder of its name: only that folder is wanted.
    first = spec["table"][0].replace("{name}", spec["name"])
    only = [f"{spec['name']}/*"] if first.startswith(f"{{hub}}/{spec['name']}/") else []
    wants = [(spec["hub"], only, "")] if spec["hub"] else []
    wants += [(hub, [pattern], unpack) for hub, pattern, unpack in spec["fetch"]]
    commands = []
    for hub, patterns, unpack in wants:
        folder = os.path.join(root, hub)
        command = f"hf download {hub} --repo-type dataset --local-dir {folder}"
        command += f" --revision {revision}" if revision else ""
        command += "".join(f" --include '{pattern}'" for pattern in patterns)
        commands.append(command + (f" && (cd {folder} && {unpack})" if unpack else ""))
        if fetch:
            download(spec["name"], hub, folder, patterns, revision)
    return commands


def download(name, hub, folder, patterns, revision):
    """Files of a hub id into its folder under ROOT."""
    from huggingface_hub import snapshot_download

    options = {"repo_type": "dataset", "local_dir": folder, "revision": revision}
    try:
        snapshot_download(hub, allow_patterns=patterns or None, **options)
    except Exception as error:  # no network, no such id, no access, no room: all the hub raises
        fail(name, f"{hub} could not be fetched ({type(error).__name__}: {error})")


def check(
    root,
    kinds=("train", "eval"),
    names=None,
    fetch=False,
    revision=None,
    workers=2,
    page_labels="fixed",
):
    """Print a line per dataset, and every broken row. Exit code: 1 = something would stop a run or
    be skipped, 2 = no dataset at all is there, 0 = else; one that has no table, or fewer rows than
    published, is no error."""
    todo = [(spec, kind) for kind in kinds for spec in tables(root, kind)]
    lost = set(names or []) - {spec["name"] for spec, _ in todo}
    if lost:
        fail(root, f"no dataset {min(lost)!r} in the table")
    todo = [(spec, kind) for spec, kind in todo if names is None or spec["name"] in names]
    verdict = functools.partial(check_one, root=root, page_labels=page_labels)
    for spec, kind in todo if fetch else []:
        if verdict(spec, kind)[0] in ("missing", "short"):
            downloads(spec, root, fetch, revision)
    count = dict.fromkeys(["found", "short", "missing", "broken"], 0)
    faults = 0
    with ThreadPoolExecutor(workers) as pool:
        verdicts = pool.map(verdict, *zip(*todo)) if todo else []
        for (spec, kind), result in zip(todo, tqdm(verdicts, total=len(todo), disable=None)):
            status, _, _, problems = result
            count[status] += 1
            faults += len(problems)
            commands = downloads(spec, root, revision=revision) if status != "found" else []
            tqdm.write(describe(spec, kind, *result, commands))
    print(", ".join(f"{status}: {n}" for status, n in count.items()))
    if faults:
        return 1
    return 2 if count["missing"] == len(todo) else 0


def describe(spec, kind, status, rows, usable, problems, commands):
    """What --check prints of a dataset."""
    want = spec["rows" if kind == "train" else "queries"] or "?"
    line = f"{status:8s} {kind:5s} {spec['name']:48s} {rows:>8,} of {want:>8} rows"
    line += f", {usable:,} usable" + (" queries" if kind == "eval" else "")
    if not usable and len(problems) > 20:  # the fault is not in the rows
        problems = [*problems[:20], f"... and {len(problems) - 20} more: no row is usable"]
    return "\n         ".join([line, *problems, *commands])


def main():
    """The command line; the exit code is check()'s."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--check", metavar="ROOT", required=True, help="look at every dataset of a root")
    add("--train", action="store_true", help="only the training sets")
    add("--eval", action="store_true", help="only the test sets")
    add("--names", help="only these datasets, with commas")
    add("--page_labels", choices=["fixed", "original"], default="fixed", help="of the page sets")
    add("--fetch", action="store_true", help="download what is missing (needs a network)")
    add("--revision", help="commit, branch or tag of what is fetched; names fix its hub id")
    add("--workers", type=int, default=os.cpu_count(), help="threads that look at images")
    args = parser.parse_args()
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: at least 1")
    kinds = [kind for kind in ("train", "eval") if getattr(args, kind)] or ["train", "eval"]
    names = args.names.split(",") if args.names else None
    return check(
        args.check, kinds, names, args.fetch, args.revision, args.workers, args.page_labels
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BadData as error:
        sys.exit(f"data.py: {error}")
    except BrokenPipeError:  # `| head` has seen enough
        sys.stdout = None
        sys.exit(1)
