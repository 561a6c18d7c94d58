"""
The pocket world: a small, drawn world in MMEB's own layouts. The whole method runs in it on a
laptop, and is marked against the truth.

An image is a 3x3 grid of 32-pixel tiles, one visual token each: coloured shapes, digits or nothing.
Twelve families of query-target pairs cover MMEB-V2's kinds. Eight need one look. Four are mixed:
the prompt is the same for all their queries, and only the content says how many steps a query
needs. Half of them need none; the others 1 to 4, drawn evenly:

    Walk   "start at nw and follow the colours": until a purple thing                        (image)
    Sum    "add the numbers from ne on , w and so on": until a cell without a number         (image)
    Tally  the same over a clip: until a blank place                                         (video)
    Total  an account of one to five lines, whose page is wanted                             (page)

A few layers cannot chain several look-ups in one pass; a rationale writes them down one by one.
Scripted proposers of known quality write rationales, see write_rationales. The truth that selection
is marked against: a rationale whose statements are all right helps a query of two or more steps;
one step is left unmarked; every other text does not help.

How to run (training pairs and test queries of a family):
    python pocket.py --out DIR [--seed 0] [--train 300] [--test 100]

Left out: natural images, fonts other than Pillow's, noise in the labels.
Source: the layouts are those of TIGER-Lab/MMEB-train and MMEB-V2 (see data.py); the world is ours.
"""

import argparse
import io
import json
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

import scale
from model import CONFIGS, Qwen3VL
from processor import Processor, Tokenizer, collate

TILE = 32  # pixels
COLOURS = {
    "red": (214, 40, 40),
    "blue": (40, 80, 220),
    "green": (30, 150, 60),
    "yellow": (235, 190, 20),
    "purple": (140, 50, 170),
}
SHAPES = "circle square triangle star cross ring diamond bar moon frame".split()
KINDS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
CELLS = "nw n ne w mid e sw s se".split()  # in reading order; one token each
MOVES = {  # from each cell, 0 to 8, to the next one; None is out of the image
    "right": (1, 2, None, 4, 5, None, 7, 8, None),
    "left": (None, 0, 1, None, 3, 4, None, 6, 7),
    "down": (3, 4, 5, 6, 7, 8, None, None, None),
    "up": (None, None, None, 0, 1, 2, 3, 4, 5),
}
RULE = {"red": "right", "blue": "left", "green": "down", "yellow": "up"}  # purple ends a walk
TIMES = ("first", "second", "third")
PLACES = [f"{time} {side}" for time in TIMES for side in ("left", "right")]  # of a clip
DIGITS = "zero one two three four five six seven eight nine".split()
TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen".split()
NUMBERS = DIGITS + TEENS
TENS = "no ten twenty thirty forty fifty sixty seventy eighty ninety".split()
WORDS = "sun map tea fox ink oak gem jar bee hat cup key".split()
ITEMS = "rent food heat tax fare wage".split()  # of an account, in this order
PARROT = (
    "let me think step by step . first look , then go on , so the answer is clear",
    "step by step : start , go , look , add , so the answer is found",
    "first look at the picture . then think . then the answer is clear",
    "let me look , then go step by step , then say the answer",
)
LONGEST = 4  # steps of a query in training; clips and accounts have room for one more
ERRORS = 0.1  # chance that one statement of careful is wrong
TRIES = 4  # rationales that careful writes about a pair
CANDIDATES = 20  # of a test query, where they are its own
PIXELS = (1024, 65536)  # of an image: at least, at most; a visual token covers 32 x 32 of them
LOOK_STEPS = 240  # of pretraining: nothing but description, before anything is asked
SKILL_WANTED = 0.93  # held-out token accuracy of every skill in STEP_SKILLS


def pick(values, rng, but=None):
    """One of the values, but not that one."""
    values = [value for value in values if value != but]
    return values[rng.integers(len(values))]


def draw_digits(n, rng):
    """n digits, evenly."""
    return rng.integers(0, 10, n).tolist()


# --------------------------------------------------------------------------------------------------
# Drawing

INK = (25, 25, 25)  # of text
ANGLES = [i * np.pi / 5 for i in range(10)]
REACHES = [1.15, 0.45] * 5
CORNERS = {  # in radii from the middle
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "bar": [(-1, -0.4), (1, -0.4), (1, 0.4), (-1, 0.4)],
    "triangle": [(0, -1), (-1, 1), (1, 1)],
    "diamond": [(0, -1), (1, 0), (0, 1), (-1, 0)],
    "star": [(r * np.sin(a), -r * np.cos(a)) for a, r in zip(ANGLES, REACHES)],
}


def draw_shape(pen, colour, shape, paper, x, y, rng):
    """A shape around (x, y) in a shade of the colour, a little larger or smaller."""
    ink = tuple((COLOURS[colour] + rng.integers(-18, 19, 3)).tolist())
    r = int(rng.integers(8, 12))
    box = (x - r, y - r, x + r, y + r)
    if shape in CORNERS:
        pen.polygon([(x + r * dx, y + r * dy) for dx, dy in CORNERS[shape]], ink)
    elif shape == "cross":
        pen.rectangle((x - r, y - r / 3, x + r, y + r / 3), ink)
        pen.rectangle((x - r / 3, y - r, x + r / 3, y + r), ink)
    elif shape == "frame":
        pen.rectangle(box, outline=ink, width=3)
    elif shape == "ring":
        pen.ellipse(box, outline=ink, width=3)
    else:
        pen.ellipse(box, ink)
    if shape == "moon":  # a disc with a bite
        bite = (x - r / 4, y - r - 1, x + r * 1.6, y + r - r / 4)
        pen.ellipse(bite, paper)


def draw_tile(kind, rng):
    """kind: (colour, shape) | digit | word | (r, g, b) | None for a blank -> an image."""
    paper = (int(rng.integers(228, 250)),) * 3
    tile = Image.new("RGB", (TILE, TILE), paper)
    pen = ImageDraw.Draw(tile)
    x, y = (16 + rng.integers(-2, 3, 2)).tolist()
    if isinstance(kind, int):
        font = ImageFont.load_default(int(rng.integers(20, 25)))
        pen.text((x, y), str(kind), INK, font, anchor="mm")
    elif isinstance(kind, str):
        pen.text((16, y), kind, INK, ImageFont.load_default(14), anchor="mm")
    elif kind in KINDS:
        draw_shape(pen, *kind, paper, x, y, rng)
    elif kind is not None:
        tile.paste(kind, (0, 0, TILE, TILE))
    return tile


class Bank:
    """Tiles drawn once and used again: `copies` of each kind, in other places, sizes, shades."""

    def __init__(self, rng, copies=40):
        patches = map(tuple, rng.integers(40, 230, (6, 3)).tolist())
        kinds = [*KINDS, *range(10), None, *WORDS, *patches]
        self.tiles = {kind: [draw_tile(kind, rng) for _ in range(copies)] for kind in kinds}

    def tile(self, kind, rng):
        if kind not in self.tiles:  # a flat patch may have any colour
            return draw_tile(kind, rng)
        return pick(self.tiles[kind], rng)

    def grid(self, kinds, rng, columns=3):
        """Kinds in reading order -> an image."""
        image = Image.new("RGB", (TILE * columns, TILE * len(kinds) // columns))
        for i, kind in enumerate(kinds):
            row, column = divmod(i, columns)
            image.paste(self.tile(kind, rng), (TILE * column, TILE * row))
        return image

    def clip(self, kinds, rng):
        """Two kinds at a time, shown for two frames: a frame group."""
        frames = []
        for i in range(0, len(kinds), 2):
            frames += [self.grid(kinds[i : i + 2], rng, 2)] * 2
        return frames

    def page(self, words, marks, rng):
        """3 x 4 tiles: words on top, two digits at the bottom, lines of unreadable text between."""
        blank = [None] * (9 - len(words))
        page = self.grid([*words, *blank, *marks, None], rng)
        for y in range(TILE + 6, 3 * TILE, 8):
            end = int(rng.integers(50, 90))
            page.paste((120, 120, 120), (6, y, end, y + 3))
        return page


# --------------------------------------------------------------------------------------------------
# Words for what is seen, and eyes that may err


def name(kind):
    """("red", "star") -> "red star"; 3 -> "three"; a word is itself; None -> "blank"."""
    if isinstance(kind, int):
        return DIGITS[kind]
    if isinstance(kind, tuple):
        return " ".join(kind)
    return kind or "blank"


def number(tens, ones):
    """Two digits as one number: each word says its place, as a bag of words must."""
    return f"{TENS[tens]} {DIGITS[ones]}"


def makes(total):
    """ "makes eight", "makes seventeen keep seven". The full sum comes first: the last digit alone
    cannot be learnt from either summand, and training would wait on a plateau."""
    keep = f" keep {DIGITS[total - 10]}" if total >= 10 else ""
    return f"makes {NUMBERS[total]}{keep}"


def confuse(kind, rng):
    """Something else of the same sort: it differs in all that is said about it."""
    if isinstance(kind, int):
        return int((kind + rng.integers(1, 10)) % 10)
    if isinstance(kind, str):
        return pick(WORDS, rng, but=kind)
    colour, shape = kind
    return pick(COLOURS, rng, but=colour), pick(SHAPES, rng, but=shape)


@dataclass
class Eyes:
    """Reads one thing after the other. A reading errs with chance `errors`; the wrong-th does."""

    rng: np.random.Generator = None
    errors: float = 0.0
    wrong: int = None
    readings: int = 0

    def read(self, kind):
        """-> the thing, or what it is taken for."""
        errs = self.readings == self.wrong
        if self.errors:
            errs = self.rng.random() < self.errors
        self.readings += 1
        return confuse(kind, self.rng) if errs else kind


SHARP = Eyes()


def describe(kinds, places=CELLS, eyes=SHARP, between=" "):
    """What is not blank: "nw red star n three"."""
    text = []
    for place, kind in zip(places, kinds):
        if kind is not None:
            text.append(f"{place} {name(eyes.read(kind))}".strip())
    return between.join(text)


def onwards(cell, kind):
    """What a thing at a cell does to a walk -> ("right", next cell), or ("right out", None) where
    that is outside, or ("stay", None) if it is purple."""
    move = RULE.get(kind[0])
    if move is None:
        return "stay", None
    there = MOVES[move][cell]
    return (f"{move} out" if there is None else move), there


def explain_walk(scene, start, eyes):
    """ "nw red star . right n purple bar . stay": each statement acts on what the last one read."""
    text, move, cell = [], "", start
    while cell is not None and len(text) < 9:  # a misread colour may lead in a circle
        kind = eyes.read(scene[cell])
        text.append(f"{move} {CELLS[cell]} {name(kind)}".strip())
        move, cell = onwards(cell, kind)
    return " . ".join([*text, move])


def explain_sum(places, kinds, eyes, tens=""):
    """ "n five . ne nine makes fourteen keep four . e red star . four": digits, then perhaps what
    ends them, and the sum modulo ten. tens: a word that stands before it."""
    total, text = 0, []
    for place, kind in zip(places, kinds):
        kind = eyes.read(kind)
        statement = f"{place} {name(kind)}"
        if isinstance(kind, int):
            if text:
                statement += f" {makes(total + kind)}"
            total = (total + kind) % 10
        text.append(statement)
    return " . ".join([*text, tens + DIGITS[total]])


# --------------------------------------------------------------------------------------------------
# Families. Each maker draws one pair, a mixed one of so many steps.


@dataclass
class Pair:
    """A query and its target. What is shown is an image, a video, a page or nothing."""

    explain: callable  # explain(eyes) writes a rationale
    caption: str  # true words about what is shown
    text: str = ""  # what is asked
    image: Image.Image | str = ""
    video: list = ()  # of frames
    page: tuple = ()  # (words, digits): it is drawn when it is written, and it is the target
    answer: Image.Image | str = ""  # the target, where that is no page
    wrong: list = ()  # hard negatives
    end: str = ""  # the words to which the steps lead
    steps: int = 0


def glyphs(rng, n):
    """n things of different shapes, in any colours."""
    colours = rng.choice(list(COLOURS), n).tolist()
    shapes = rng.permutation(SHAPES)[:n].tolist()
    return list(zip(colours, shapes))


def few_things(rng):
    """A scene of three things; the other cells are blank."""
    scene = [None] * 9
    for cell, kind in zip(rng.permutation(9)[:3], glyphs(rng, 3)):
        scene[cell] = kind
    return scene


def put(scene, cell, kind):
    """The scene with another kind at one cell."""
    return [*scene[:cell], kind, *scene[cell + 1 :]]


def look(place, kind):
    """A rationale of one look: "nw red star"."""
    return partial(describe, [kind], [place])


def shown(bank, scene, rng, explain, text="", **more):
    """A pair whose query has an image of nine cells."""
    image = bank.grid(scene, rng)
    return Pair(explain, describe(scene), text, image=image, **more)


def make_colour(bank, rng):
    """Which colour is it? Things of one colour, some blanks, a stranger."""
    colour = pick(COLOURS, rng)
    scene = []
    for shape in rng.choice(SHAPES, 9).tolist():
        scene.append((colour, shape) if rng.random() < 0.8 else None)
    scene[4] = (colour, pick(SHAPES, rng))
    stranger = pick(KINDS, rng)
    scene[pick(range(4), rng)] = stranger
    return shown(bank, scene, rng, look("mid", scene[4]), answer=colour)


def make_at(bank, rng):
    """What is at a cell of a full image?

    "what is at nw ?" -> "red star"; rationale: "nw red star"
    """
    scene, cell = glyphs(rng, 9), pick(range(9), rng)
    names = [name(kind) for kind in scene]
    text = f"what is at {CELLS[cell]} ?"
    explain = look(CELLS[cell], scene[cell])
    return shown(bank, scene, rng, explain, text, answer=names[cell], wrong=names)


def draw_way(rng, steps):
    """A walk that never crosses itself -> its start, {cell: colour} on the way, its end.

    steps = 2, and red and green are drawn: 0, {0: "red", 1: "green"}, 4
    """
    start = cell = pick(range(9), rng)
    way = {}
    for colour in rng.choice(list(RULE), steps).tolist():
        way[cell] = colour
        cell = MOVES[RULE[colour]][cell]
        if cell is None or cell in way:
            return draw_way(rng, steps)  # another one
    return start, way, cell


def make_walk(bank, rng, steps):
    """A purple thing ends a walk. So is half of what is not on the way: the end cannot be
    recognised without walking.

    "start at nw and follow the colours . what is at the end ?" -> "purple ring"
    rationale of one step: "nw red star . right n purple ring . stay"
    """
    start, way, end = draw_way(rng, steps)
    scene = []
    for cell, (colour, shape) in enumerate(glyphs(rng, 9)):
        if cell in way:
            colour = way[cell]
        elif cell == end or rng.random() < 0.5:
            colour = "purple"
        scene.append((colour, shape))
    names = [name(kind) for kind in scene]
    text = f"start at {CELLS[start]} and follow the colours . what is at the end ?"
    explain = partial(explain_walk, scene, start)
    target = {"answer": names[end], "wrong": names, "end": names[end]}
    return shown(bank, scene, rng, explain, text, **target)


def summed(digits):
    """What the pairs share that ask for a sum modulo ten."""
    total = DIGITS[sum(digits) % 10]
    return {"answer": total, "wrong": DIGITS, "end": f". {total}"}


def make_sum(bank, rng, steps):
    """steps + 1 numbers in reading order (after se comes nw), then a cell without one; elsewhere
    numbers that do not count.

    "add the numbers from n on , ne and so on" -> "four"
    rationale of one step: "n five . ne nine makes fourteen keep four . w red star . four"
    """
    start = pick(range(9), rng)
    way = [(start + i) % 9 for i in range(steps + 2)]
    scene = []
    for cell, thing in enumerate(glyphs(rng, 9)):
        is_number = cell in way[:-1] or (cell != way[-1] and rng.random() < 0.5)
        scene.append(pick(range(10), rng) if is_number else thing)
    kinds = [scene[cell] for cell in way]
    labels = [CELLS[cell] for cell in way]
    text = f"add the numbers from {labels[0]} on , {labels[1]} and so on"
    explain = partial(explain_sum, labels, kinds)
    return shown(bank, scene, rng, explain, text, **summed(kinds[:-1]))


def make_tally(bank, rng, steps):
    """Numbers in the first steps + 1 of the six places of a clip; the other places are blank.

    rationale of one step:
    "first left two . first right three makes five . second left blank . five"
    """
    digits = draw_digits(steps + 1, rng)
    blank = [None] * (len(PLACES) - len(digits))
    video = bank.clip(digits + blank, rng)
    explain = partial(explain_sum, PLACES, [*digits, "blank"])
    return Pair(explain, describe(digits, PLACES), video=video, **summed(digits))


def make_total(bank, rng, steps):
    """An account of one to five lines. Its page bears the last digit of the sum; whose account it
    is does not count. "the account of tea and ink with rent three , food five" -> page "no eight"
    """
    digits = draw_digits(steps + 1, rng)
    total = (0, sum(digits) % 10)
    owners = " and ".join(rng.permutation(WORDS)[:2])
    lines = describe(digits, ITEMS, between=" , ")
    text = f"the account of {owners} with {lines}"
    page = (("sun",), total)  # one title for all: the number decides
    explain = partial(explain_sum, ITEMS, digits, tens="no ")
    return Pair(explain, lines, text, page=page, end=f". {number(*total)}")


def make_topic(bank, rng):
    """ "the page ten four about tea and ink" -> the page that says so."""
    words = tuple(rng.permutation(WORDS)[:2].tolist())
    digits = tuple(draw_digits(2, rng))
    text = f"the page {number(*digits)} about {words[0]} and {words[1]}"
    explain = partial(describe, words, ["", ""])
    return Pair(explain, " ".join(words), text, page=(words, digits))


def make_caption(bank, rng):
    """From an image to its caption: "nw red star , e blue moon , s green bar"."""
    scene = few_things(rng)
    explain = partial(describe, scene, CELLS, between=" , ")
    return shown(bank, scene, rng, explain, answer=explain())


def make_search(bank, rng):
    """From a caption to its image."""
    pair = make_caption(bank, rng)
    return replace(pair, text=pair.answer, answer=pair.image, image="")


def make_change(bank, rng):
    """The image after a change. Wrong ones: another cell, another thing, no change.

    "put a red star at nw"; rationale: "nw red star"
    """
    scene = few_things(rng)
    blank = [cell for cell, kind in enumerate(scene) if kind is None]
    cell, elsewhere = rng.permutation(blank)[:2].tolist()
    thing, another = glyphs(rng, 2)
    changes = [(cell, thing), (elsewhere, thing), (cell, another)]
    answer, *wrong = [bank.grid(put(scene, *change), rng) for change in changes]
    text = f"put a {name(thing)} at {CELLS[cell]}"
    pair = shown(bank, scene, rng, look(CELLS[cell], thing), text, answer=answer)
    return replace(pair, wrong=[*wrong, bank.grid(scene, rng)])


def make_point(bank, rng):
    """The crop that shows the thing at a cell. The others are the wrong ones.

    "the thing at nw"; rationale: "nw red star"
    """
    scene, cell = glyphs(rng, 9), pick(range(9), rng)
    crops = [bank.tile(kind, rng) for kind in scene]
    answer = crops.pop(cell)
    text = f"the thing at {CELLS[cell]}"
    explain = look(CELLS[cell], scene[cell])
    return shown(bank, scene, rng, explain, text, answer=answer, wrong=crops)


def make_twin(bank, rng):
    """Nine flat patches of any colour, which no words carry. The twin is a little darker or not."""
    rgb = rng.integers(40, 230, (9, 3))
    darker = rng.integers(-12, 13)
    tinted = rgb + darker + rng.integers(-6, 7, (9, 3))
    near = [rgb + rng.integers(-45, 46, (9, 3)) for _ in range(2)]
    images = []
    for patches in np.clip([rgb, tinted, *near], 0, 255).tolist():
        images.append(bank.grid(list(map(tuple, patches)), rng))
    image, answer, *wrong = images
    caption = "a picture of nine patches"
    return Pair(look("nine", "patches"), caption, image=image, answer=answer, wrong=wrong)


@dataclass
class Family:
    """A dataset: how its pairs are drawn, and what is said around them."""

    name: str
    draw: callable
    parser: str  # of its test set, see data.py
    asks: str  # the query's instruction
    wants: str = ""  # the target's

    def make(self, bank, rng, longest):
        """Half of a mixed family's queries need no step, the others 1 to `longest`, evenly."""
        if self.name not in MIXED:
            return self.draw(bank, rng)
        steps = 0 if rng.random() < 0.5 else int(rng.integers(1, longest + 1))
        return replace(self.draw(bank, rng, steps), steps=steps)


COLOUR = "Identify the colour that most of the image has"
QUESTION = "Represent the given image with the following question: "
FIND_IMAGE = "Find me an everyday image that matches the given caption: "
FIND_CAPTION = "Find an image caption describing the given everyday image."
CHANGED = "Given an image, find a similar everyday image with the described changes: "
PORTION = "Select the portion of the image that follows the language expressions: "
SIMILAR = "Find a day-to-day image that looks similar to the provided image."
ADD = "What do all the numbers add up to?"
FIND_PAGE = "Find a document image that matches the given query: "
IMAGE = "Represent the given image."
CROP = "Represent the given cropped image of the object."
PAGE = "Understand the content of the provided document image."

FAMILIES = [
    Family("PocketColour", make_colour, "image_cls", COLOUR),
    Family("PocketAt", make_at, "image_qa", QUESTION),
    Family("PocketWalk", make_walk, "image_qa", QUESTION),
    Family("PocketSum", make_sum, "image_qa", QUESTION),
    Family("PocketCaption_t2i", make_search, "image_t2i", FIND_IMAGE, IMAGE),
    Family("PocketCaption_i2t", make_caption, "image_i2t", FIND_CAPTION),
    Family("PocketChange", make_change, "image_i2i_vg", CHANGED, IMAGE),
    Family("PocketPoint", make_point, "image_i2i_vg", PORTION, CROP),
    Family("PocketTwin", make_twin, "image_i2i_vg", SIMILAR, IMAGE),
    Family("PocketTally", make_tally, "video_cls", ADD),
    Family("PocketTopic", make_topic, "beir", FIND_PAGE, PAGE),
    Family("PocketTotal", make_total, "beir", FIND_PAGE, PAGE),
]
MIXED = ("PocketWalk", "PocketSum", "PocketTally", "PocketTotal")

# --------------------------------------------------------------------------------------------------
# Writing the world in MMEB's layouts: data.py reads it with the parsers that read the real thing

TRAIN_HUB = "TIGER-Lab/MMEB-train"
TEST_HUB = "ziyjiang/MMEB_Test_Instruct"
TEST_IMAGES = "TIGER-Lab/MMEB-V2/image-tasks"
CLIP_HUB = "ShareGPTVideo/train_video_and_instruction"
TRAIN_CLIPS = f"{CLIP_HUB}/train_300k"
TEST_CLIPS = "TIGER-Lab/MMEB-V2/video-tasks/frames/video_cls"
TOKEN = "<|image_1|>\n"  # MMEB's place-holder of an image


def new_file(*parts):
    """A path whose folder is there."""
    path = Path(*parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_table(columns, rows, *shard):
    """rows: tuples in the order of the columns."""
    names = columns.split()
    table = pa.Table.from_pylist([dict(zip(names, row)) for row in rows])
    pq.write_table(table, f"{new_file(*shard)}-00000-of-00001.parquet")


def write_lines(rows, *path):
    """A file of JSON lines."""
    lines = [json.dumps(row) + "\n" for row in rows]
    new_file(*path).write_text("".join(lines))


def save(value, folder, name):
    """An image -> its name, relative to the folder that the layout joins to. A text stays."""
    if isinstance(value, str):
        return value
    value.save(new_file(folder, name), compress_level=1)
    return name


def save_images(pair, folder, name, i, most=None):
    """-> the query's image, and the target with at most so many wrong ones, each once."""
    image = save(pair.image, folder, f"{name}/query_{i}.png")
    options = [save(pair.answer, folder, f"{name}/target_{i}.png")]
    for k, wrong in enumerate(pair.wrong[:most]):
        options.append(save(wrong, folder, f"{name}/wrong_{i}_{k}.png"))
    return image, list(dict.fromkeys(options))


def save_clip(pair, *folder):
    """A clip's frames, as frame_0001.png and so on."""
    for i, frame in enumerate(pair.video):
        save(frame, Path(*folder), f"frame_{i + 1:04d}.png")


def draw_pages(pairs, bank, rng):
    """{page: its drawing inside a table}. Equal pages are one target."""
    pages = {}
    for page in dict.fromkeys(pair.page for pair in pairs):
        buffer = io.BytesIO()
        bank.page(*page, rng).save(buffer, "PNG", compress_level=1)
        pages[page] = {"bytes": buffer.getvalue(), "path": None}
    return pages


# Each layout writes a family's training and test set -> what datasets.json says about them.


def write_images(root, family, learn, held_out, bank, rng):
    """MMEB-V2's image tasks: tables that name image files beside them. The target is an image where
    the family says what it `wants`, else a text. A test query has candidates of its own: the right
    one first, then the hard ones, then answers of other queries.
    """
    marked = f"{TOKEN}{family.wants}\n" if family.wants else ""
    most = 3 if family.wants else None  # of wrong images; texts cost nothing
    rows = []
    folder = f"images/{family.name}/Train"
    for i, pair in enumerate(learn):
        image, options = save_images(pair, Path(root, TRAIN_HUB), folder, i, most)
        answer, *wrong = options
        query = (TOKEN if image else "") + f"{family.asks}{pair.text}\n"
        target = (marked, answer) if family.wants else (answer, "")
        rows.append((query, image, *target, wrong, [marked] * len(wrong)))
    wrong = "neg_image_path neg_text" if family.wants else "neg_text neg_image_path"
    columns = f"qry qry_image_path pos_text pos_image_path {wrong}"
    write_table(columns, rows, root, TRAIN_HUB, family.name, "original")
    train = {"parser": "mmeb", "hub": TRAIN_HUB, "table": "{hub}/{name}/{split}-*.parquet"}

    stored = []
    for i, pair in enumerate(held_out):
        stored.append(save_images(pair, Path(root, TEST_IMAGES), family.name, i))
    pool = dict.fromkeys(options[0] for _, options in stored)
    rows = []
    for pair, (image, options) in zip(held_out, stored):
        asks = (TOKEN if image else "") + family.asks.strip()
        more = [answer for answer in pool if answer not in options]
        options += rng.permutation(more)[: CANDIDATES - len(options)].tolist()
        blank = [""] * len(options)
        targets = (blank, options) if family.wants else (options, blank)
        rows.append((asks, pair.text, image, marked.strip(), *targets))
    columns = "qry_inst qry_text qry_img_path tgt_inst tgt_text tgt_img_path"
    write_table(columns, rows, root, TEST_HUB, family.name, "test")
    return train, train | {"parser": family.parser, "hub": TEST_HUB, "media": TEST_IMAGES}


def write_clips(root, family, learn, held_out, bank, rng):
    """Video classification. A clip is a folder of frames. Training has the layout of LLaVA-Hound:
    conversations, one a line; the test set names all classes as candidates."""
    rows = []
    for i, pair in enumerate(learn):
        video = f"{family.name}_{i}"
        save_clip(pair, root, TRAIN_CLIPS, video)
        asks = {"from": "human", "value": f"<video> {family.asks}"}
        says = {"from": "gpt", "value": pair.answer}
        rows.append({"id": video, "video": video, "conversations": [asks, says]})
    write_lines(rows, root, CLIP_HUB, f"{family.name}.jsonl")
    train = {"parser": "video_caption", "hub": CLIP_HUB, "table": "{hub}/{name}.jsonl"}
    train["media"] = TRAIN_CLIPS

    hub, media = f"VLM2Vec/{family.name}", f"{TEST_CLIPS}/{family.name}"
    rows = []
    for i, pair in enumerate(held_out):
        save_clip(pair, root, media, f"clip_{i}")
        options = list(dict.fromkeys([pair.answer, *pair.wrong]))
        rows.append((f"clip_{i}", pair.answer, options))
    write_table("video_id pos_text neg_text", rows, root, hub, "data/test")
    test = {"parser": family.parser, "hub": hub, "modality": "video", "media": media}
    return train, test | {"inst": family.asks}


def write_pages(root, family, learn, held_out, bank, rng):
    """Visual documents. Tables hold the pages themselves. Training has the layout of ViDoRe's and
    VisRAG's sets; the test set is that of BEIR: queries, a corpus, and qrels, which join them."""
    hub = f"pocket/{family.name}-train"
    pages = draw_pages(learn, bank, rng)
    rows = [(family.asks + pair.text, pages[pair.page], "pocket") for pair in learn]
    write_table("query image source", rows, root, hub, "data/train")
    train = {"parser": "page", "hub": hub, "split": "train"}

    hub = f"pocket/{family.name}-test"
    pages = draw_pages(held_out, bank, rng)
    places = list(pages)
    queries = [(i, pair.text) for i, pair in enumerate(held_out)]
    qrels = [(i, places.index(pair.page), 1) for i, pair in enumerate(held_out)]
    write_table("query-id query", queries, root, hub, "queries/test")
    write_table("corpus-id image", enumerate(pages.values()), root, hub, "corpus/test")
    write_table("query-id corpus-id score", qrels, root, hub, "qrels/test")
    test = {"parser": family.parser, "hub": hub, "modality": "visdoc"}
    return train, test | {"inst": family.asks.strip(), "tgt": family.wants}


WRITERS = {"video_cls": write_clips, "beir": write_pages}


def distinct_pairs(family, n, bank, rng, longest):
    """n pairs whose queries all differ, so that training and test share none."""
    pairs = {}
    for _ in range(20 * n + 100):
        pair = family.make(bank, rng, longest)
        pixels = np.array(pair.video or pair.image)
        pairs.setdefault((pair.text, pixels.tobytes()), pair)
        if len(pairs) == n:
            return list(pairs.values())
    raise ValueError(f"{family.name} has no {n} different pairs: a smaller world is wanted")


def write_rationales(pair, rng):
    """What the scripted proposers say about a pair: [(proposer, text)].

    careful    right steps, but each statement may err, and what follows from it follows
    captioner  true words about what is shown, no steps
    sloppy     right form, one wrong fact
    parrot     form only
    """
    sharp = Eyes()
    right = pair.explain(sharp)
    texts = []
    while len(texts) < TRIES:
        text = pair.explain(Eyes(rng, ERRORS))
        # What errs and yet comes to the right end is drawn again: who can say whether it helps?
        if text == right or not pair.end or pair.end not in text:
            texts.append(("careful", text))
    wrong = rng.integers(sharp.readings)
    texts.append(("captioner", pair.caption))
    texts.append(("sloppy", pair.explain(Eyes(rng, wrong=wrong))))
    texts.append(("parrot", pick(PARROT, rng)))
    return texts


def write_world(root, seed, train, test, longest=LONGEST, names=None):
    """The world under `root`, or that of some families only:

    TIGER-Lab/... and more  training and test sets
    datasets.json           what data.py has to know of them
    proposers.jsonl         rationales by the scripted proposers
    pocket.json             the truth: {"train": {pair id: {"steps", "rationale" without an error}},
                            "test": {"family/query id": steps} of the mixed families}
    """
    bank = Bank(np.random.default_rng([seed, len(FAMILIES)]))
    listing = {"train": [], "eval": []}
    truth = {"train": {}, "test": {}}
    rationales = []
    for n, family in enumerate(FAMILIES):
        if names and family.name not in names:
            continue
        rng = np.random.default_rng([seed, n])
        pairs = distinct_pairs(family, train + test, bank, rng, longest)
        learn, held_out = pairs[:train], pairs[train:]
        write = WRITERS.get(family.parser, write_images)
        about_train, about_test = write(root, family, learn, held_out, bank, rng)
        listing["train"].append({"name": family.name} | about_train)
        listing["eval"].append({"name": family.name} | about_test)
        if family.name in MIXED:
            for i, pair in enumerate(held_out):
                truth["test"][f"{family.name}/{i}"] = pair.steps
        for i, pair in enumerate(learn):
            id = f"{family.name}/{i}"
            truth["train"][id] = {"steps": pair.steps, "rationale": pair.explain(SHARP)}
            for proposer, text in write_rationales(pair, rng):
                rationales.append({"id": id, "side": "query", "proposer": proposer, "text": text})
    write_lines(rationales, root, "proposers.jsonl")
    Path(root, "pocket.json").write_text(json.dumps(truth, indent=1))
    Path(root, "datasets.json").write_text(json.dumps(listing, indent=1))


# --------------------------------------------------------------------------------------------------
# Pretraining documents: "describe what you see", and the look-ups that steps are made of.
# A document is (item, parts, summary); parts are [(text, skill)]: the model learns the texts that
# have a skill (its name), the others only ask. The summary is what <|endoftext|> sums up.
# Skills: describe, clip, page, crop and change say what is seen or would be; at, follow and move
# look one thing up in an image; account does so in a text; table adds two digits; answer and repeat
# say again what was read last; form closes a <think> block.


def says(item, text, skill):
    """A document that says one thing, and whose summary that is."""
    return item, [(text, skill)], text


def thinks(steps, answer, skill):
    """A <think> block of these parts, and what follows from it."""
    form = [(text, "form") for text in ("\n", "</think>", "\n\n")]
    after = [("<|endoftext|>", None), (answer, skill)]
    return [("<think>", None), ("\n", None), *steps, *form, *after]


def answers(item, facts, rng):
    """facts [(question, cue, statement, answer, skill)], of which the user asks the last: it is
    answered at once, or after a <think> block that looks up all of them.

    ("what is right of nw ?", "nw red star . right", "n blue moon", "blue moon", "move")
    """
    question, _, _, answer, _ = facts[-1]
    steps = []
    for _, cue, statement, _, skill in facts:
        steps += [(f" . {cue}", None), (f" {statement}", skill)]
    if rng.random() >= 0.5:
        parts = [(answer, "answer"), *steps[:-2]]
    else:
        steps[0] = (facts[0][1], None)
        parts = thinks(steps, answer, "answer")
    return item | {"text": question}, parts, answer


def base_document(bank, rng, look):
    """About something seen. look: the share of images that are described, not asked about.

    of a hundred  5  an image and "put a red star at nw"  ->  what it then shows
                 55  an image: described, or asked about
                 26  a clip: the same
                 11  a page                               ->  "tea ink ten four"
                  3  a single thing                       ->  "red star"
    """
    kind = rng.random()
    if kind < 0.05:  # what the image shows after a change
        scene = few_things(rng)
        cell = pick(range(9), rng)
        thing = glyphs(rng, 1)[0]
        item = {"image": bank.grid(scene, rng), "text": f"put a {name(thing)} at {CELLS[cell]}"}
        return says(item, describe(put(scene, cell, thing)), "change")
    if kind < 0.60:
        return scene_document(bank, rng, look)
    if kind < 0.86:
        return clip_document(bank, rng)
    if kind < 0.97:
        words = rng.permutation(WORDS).tolist()
        count = 1 if rng.random() >= 0.5 else 2
        words = words[:count]
        marks = draw_digits(2, rng)
        text = " ".join([*words, number(*marks)])
        return says({"image": bank.page(words, marks, rng)}, text, "page")
    thing = pick([*KINDS, *range(10)], rng)
    return says({"image": bank.tile(thing, rng)}, name(thing), "crop")


def scene_document(bank, rng, look):
    """Nine things, or things, digits and blanks: described, or asked about."""
    scene = glyphs(rng, 9)
    if rng.random() < 0.4:
        scene = [mixed_thing(rng, 0.4, 0.4) for _ in range(9)]
    asked = rng.random() > look
    if asked and rng.random() < 0.6:  # few things are easier to find than nine
        kept = rng.permutation(9)[: rng.integers(1, 6)]
        scene = [kind if cell in kept else None for cell, kind in enumerate(scene)]
    item = {"image": bank.grid(scene, rng)}
    facts = scene_facts(scene, rng) if asked else []
    if facts:
        return answers(item, facts, rng)
    return says(item, describe(scene) or "blank", "describe")


def mixed_thing(rng, things, digits):
    """A thing, a digit or a blank. things, digits: their chances."""
    draw = rng.random()
    if draw < things:
        return pick(KINDS, rng)
    return pick(range(10), rng) if draw < things + digits else None


def scene_facts(scene, rng):
    """Up to eight look-ups, as answers() wants them:

    at      what is at a cell                 nw -> "red star"
    follow  where the thing there sends one   nw red star . -> "right n blue moon"
    move    what is next to it                nw red star . down -> "w green bar"
    """
    cells = [cell for cell, kind in enumerate(scene) if kind is not None]
    facts = []
    for cell in rng.choice(cells, 8).tolist() if cells else []:
        label, thing = CELLS[cell], name(scene[cell])
        draw = rng.random()
        question = f"what is at {label} ?" if rng.random() < 0.6 else f"the thing at {label}"
        if draw < 0.3:
            facts.append((question, label, thing, thing, "at"))
            continue
        move = pick(MOVES, rng)
        there = MOVES[move][cell]
        if draw < 0.65 and isinstance(scene[cell], tuple):
            leads, there = onwards(cell, scene[cell])
            if there is not None:
                leads += f" {CELLS[there]} {name(scene[there])}"
            facts.append((question, f"{label} {thing} .", leads, thing, "follow"))
        elif there is not None and scene[there] is not None:
            question = f"what is {move} of {label} ?"
            answer = name(scene[there])
            statement = f"{CELLS[there]} {answer}"
            facts.append((question, f"{label} {thing} . {move}", statement, answer, "move"))
    return facts


def clip_document(bank, rng):
    """Two or three states: described, or asked about."""
    kinds = [mixed_thing(rng, 0.25, 0.6) for _ in PLACES]
    if rng.random() < 0.3:
        kinds = kinds[:4]
    item = {"video": bank.clip(kinds, rng)}
    things = describe(kinds, PLACES)
    if not things or rng.random() < 0.5:
        return says(item, things or "blank", "clip")
    facts = []
    for i in rng.permutation(len(kinds)).tolist():
        thing = name(kinds[i])
        facts.append((f"what is {PLACES[i]} ?", PLACES[i], thing, thing, "clip"))
    return answers(item, facts, rng)


def text_document(rng):
    """Without an image: look things up in an account, add, or repeat. No summary but the last's.

    "rent three , food five"  ->  " . food" " five" " . rent" " three" ...
    "add"                     ->  " . three five" " makes eight" ...
    """
    kind = rng.random()
    parts = []
    if kind < 0.3:
        digits = draw_digits(rng.integers(1, len(ITEMS) + 1), rng)
        for i in rng.integers(0, len(digits), 6).tolist():
            parts += [(f" . {ITEMS[i]}", None), (f" {DIGITS[digits[i]]}", "account")]
        return {"text": describe(digits, ITEMS, between=" , ")}, parts, ""
    if kind < 0.45:
        for a, b in draw_digits((12, 2), rng):
            parts += [(f" . {DIGITS[a]} {DIGITS[b]}", None), (f" {makes(a + b)}", "table")]
        return {"text": "add"}, parts, ""
    return repeat_document(rng)


def repeat_document(rng):
    """A phrase is repeated, and summed up: what a target's or a rationale's end says.

    "red star"        ->  "red star"
    "repeat the end"  ->  <think> three . five makes eight . red star </think> red star
    """
    things, digits = glyphs(rng, 3), draw_digits(8, rng)
    caption = describe(few_things(rng), between=" , ")
    cell = pick(CELLS, rng)
    words = rng.permutation(WORDS)[: rng.integers(3)]
    page = " ".join([*words, number(*digits[1:3])])
    phrases = [name(things[0]), DIGITS[digits[0]], caption, things[0][0], cell, page]
    phrase = pick(phrases, rng)
    if rng.random() < 0.5:
        return says({"text": phrase}, phrase, "repeat")
    names = [DIGITS[digit] for digit in digits[3:]]
    addition = f"{names[0]} . {names[1]} {makes(pick(range(19), rng))}"
    steps = [name(things[1]), " . ".join(names), addition]
    before = (f"{pick(steps, rng)} . {phrase}", None)
    return {"text": "repeat the end"}, thinks([before], phrase, "repeat"), phrase


def vocabulary_texts():
    """Every sentence form of the world, so that the tokenizer meets every word."""
    rng = np.random.default_rng([0, 7])
    bank = Bank(rng, copies=1)
    words = [*CELLS, *MOVES, *TIMES, *NUMBERS, *TENS, *WORDS, *ITEMS, *COLOURS, *SHAPES]
    texts = [*words, *(f" {word}" for word in words), *PARROT, "describe", "blank"]
    for family in FAMILIES:
        texts += [family.asks, family.wants]
        for _ in range(8):
            pair = family.make(bank, rng, LONGEST)
            texts += [value for value in vars(pair).values() if isinstance(value, str)]
            texts.append(pair.explain(SHARP))
    for _ in range(50):
        for item, parts, _ in (base_document(bank, rng, 0.35), text_document(rng)):
            texts.append(item.get("text", ""))
            texts.append("".join(text for text, _ in parts))
    return texts


# --------------------------------------------------------------------------------------------------
# The tokenizer and the model that start from nothing

# Qwen's split of text into words, and its added tokens in their published order.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> "
    "<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
    "<|image_pad|> <|video_pad|> <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> "
    "<|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> <tool_response> </tool_response> "
    "<think> </think>"
).split()


def train_tokenizer(texts):
    """A byte-level BPE with Qwen's pattern and added tokens, merged until every word of the texts
    is one token -> its tokenizer.json as a dict."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    # The size is never reached: merging stops when nothing is left to merge.
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=10**6, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator([*texts, "\n\n"], trainer)
    for token in SPECIALS:  # for Qwen only those with bars are special
        added = tokenizers.AddedToken(token, special="|" in token, normalized=False)
        tokenizer.add_tokens([added])
    return json.loads(tokenizer.to_str())


def new_model(seed, device="cpu"):
    """A pocket-sized Qwen3-VL of random weights, and the Processor of its items."""
    tokenizer = Tokenizer(train_tokenizer(vocabulary_texts()))
    special = tokenizer.special
    config = replace(
        CONFIGS["pocket"],
        vocab=tokenizer.size,
        image_token=special["<|image_pad|>"],
        video_token=special["<|video_pad|>"],
        vision_start=special["<|vision_start|>"],
        vision_end=special["<|vision_end|>"],
    )
    torch.manual_seed(seed)
    model = Qwen3VL(config).init_weights().to(device)
    return model, Processor(tokenizer, config, *PIXELS, *PIXELS, max_frames=8)


# --------------------------------------------------------------------------------------------------
# The base stage's update: next-token prediction on documents, and a summary at <|endoftext|>

DOCUMENTS = 32  # about something seen, and half as many of text alone
TEXT_WEIGHT = 0.3  # of the text documents' loss
SUMMARY_WEIGHT = 0.5  # of "<|endoftext|> sums up the answer"

# What steps of reasoning are made of. The other skills come on the way.
STEP_SKILLS = ("at", "move", "follow", "clip", "table", "account")


def read_document(processor, item, parts, summary):
    """A document is a row of tokens: its prompt, the direct <|endoftext|> and a branch.

        prompt <|endoftext|> <think> nw red star </think> <|endoftext|> red star <|im_end|>

    -> {"prompt", "branch" ids, "length" of the row, "skills" [(skill, places in the row)], "learn"
    all these places, "ends" places of <|endoftext|>, "words" that these sum up}.
    """
    prompt = processor({"text": "describe"} | item)
    encode, special = processor.tokenizer.encode, processor.tokenizer.special
    row = prompt["ids"].tolist()
    skills = []
    for text, skill in [("<|endoftext|>", None), *parts, ("<|im_end|>", "form")]:
        begin = len(row)
        row += [special[text]] if text in special else encode(text)
        if skill:
            skills.append((skill, range(begin, len(row))))
    ends = [place for place, token in enumerate(row) if token == processor.eos_id]
    return {
        "prompt": prompt,
        "branch": row[len(prompt["ids"]) + 1 :],
        "length": len(row),
        "skills": skills,
        "learn": [place for _, places in skills for place in places],
        "ends": ends if summary else [],
        "words": {*encode(summary), *encode(" " + summary)[:1]},  # as it stands inside a text
    }


def read_batch(model, processor, documents):
    """-> the batch, and the model's states (B, S, H)."""
    prompts = [document["prompt"] for document in documents]
    branches = [[document["branch"]] for document in documents]
    batch = collate(prompts, processor, branches, model.device)
    return batch, model(batch)


def pretrain_step(model, processor, bank, rng, look, chunk_tokens):
    """Gradients of one update -> metrics. look: see base_document.

    Documents about something seen and documents of text alone are two kinds: the loss is a mean
    over the tokens of each, and over the summaries of each.

        L = token + TEXT_WEIGHT * text_token + SUMMARY_WEIGHT * (summary + text_summary)

    Rows of the tables are tokens, summaries, right tokens; columns are documents or the two kinds.
    """
    model.train()
    drawn = [base_document(bank, rng, look) for _ in range(DOCUMENTS)]
    drawn += [text_document(rng) for _ in range(DOCUMENTS // 2)]
    documents = [read_document(processor, *document) for document in drawn]
    # 1) how much each document's tokens and summaries weigh
    kind = torch.arange(len(documents)) // DOCUMENTS  # 0 seen, 1 text
    tokens = [len(document["learn"]) for document in documents]
    summaries = [len(document["ends"]) for document in documents]
    counts = torch.tensor([tokens, summaries, tokens], dtype=torch.float)
    counts = torch.zeros(3, 2).index_add(1, kind, counts).clamp(min=1)
    weight = torch.tensor([[1.0, TEXT_WEIGHT], [SUMMARY_WEIGHT, SUMMARY_WEIGHT]]) / counts[:2]
    # 2) gradients, chunk by chunk
    sums = torch.zeros(3, len(documents))
    lengths = [document["length"] for document in documents]
    for rows in scale.chunks_of(lengths, chunk_tokens):
        part = document_losses(model, processor, [documents[i] for i in rows])
        shares = weight[:, kind[rows]].to(part.device)
        loss = (part[:2] * shares).sum()
        (loss / scale.world_size()).backward()  # gradients of all processes are added up
        sums[:, rows] = part.detach().cpu()
    # 3) means over what was counted
    means = torch.zeros(3, 2).index_add(1, kind, sums) / counts
    (loss, text_loss), (summary, text_summary), (accuracy, text_accuracy) = means.tolist()
    return {
        "loss": loss + TEXT_WEIGHT * text_loss + SUMMARY_WEIGHT * (summary + text_summary),
        "summary": summary,
        "text_summary": text_summary,
        "accuracy": accuracy,
        "text_accuracy": text_accuracy,
    }


def predecessors(documents, batch):
    """The place (B, S) of the token before each token: the branch continues the prompt, not the
    direct <|endoftext|> that stands between them in the row."""
    first = torch.tensor([[len(document["prompt"]["ids"]) + 1] for document in documents])
    place = torch.arange(batch["ids"].shape[1]).expand(len(documents), -1)
    return (place - 1 - (place == first).long()).clamp(min=0).to(batch["ids"].device)


def indices(documents, key, device):
    """Rows and columns of these places of all documents."""
    pairs = [(i, place) for i, document in enumerate(documents) for place in document[key]]
    table = torch.tensor(pairs, dtype=torch.long, device=device)
    return table.reshape(-1, 2).T


def document_losses(model, processor, documents):
    """Read documents [n] -> (3, n): sums over each document's tokens of the next-token loss, over
    its <|endoftext|>s of the summary loss, and the number of tokens that were right.

    The summary loss asks the state at <|endoftext|> for all words of the answer at once. That token
    is pooled later, and would else know only how the answer begins.
    """
    batch, h = read_batch(model, processor, documents)
    zeros = torch.zeros(len(documents), device=h.device)
    row, column = indices(documents, "learn", h.device)
    logits = model.logits(h[row, predecessors(documents, batch)[row, column]])
    wanted = batch["ids"][row, column]
    losses = F.cross_entropy(logits.float(), wanted, reduction="none")
    loss = zeros.index_add(0, row, losses)
    right = zeros.index_add(0, row, (logits.argmax(-1) == wanted).float())
    share = torch.zeros(len(documents), model.c.vocab, device=h.device)
    for i, document in enumerate(documents):  # each of an answer's words counts alike
        share[i, list(document["words"])] = 1 / len(document["words"])
    row, column = indices(documents, "ends", h.device)
    logp = model.logits(h[row, column]).float().log_softmax(-1)
    summary = zeros.index_add(0, row, -(logp * share[row]).sum(-1))
    return torch.stack([loss, summary, right])


@torch.no_grad()
def measure_skills(model, processor, bank, rng):
    """Held-out token accuracy of each skill: {"describe", "at", "move", "answer", "clip", ...}."""
    model.eval()
    drawn = [base_document(bank, rng, 1.0) for _ in range(48)]
    drawn += [base_document(bank, rng, 0.0) for _ in range(48)]
    drawn += [text_document(rng) for _ in range(48)]
    scores = {}
    for at in range(0, len(drawn), 32):
        documents = [read_document(processor, *document) for document in drawn[at : at + 32]]
        batch, h = read_batch(model, processor, documents)
        guesses = model.logits(h).argmax(-1)
        right = guesses.gather(1, predecessors(documents, batch)) == batch["ids"]
        for i, document in enumerate(documents):
            for skill, places in document["skills"][:-1]:  # all but <|im_end|>
                accuracy = right[i, list(places)].float().mean().item()
                scores.setdefault(skill, []).append(accuracy)
    return {skill: float(np.mean(values)) for skill, values in sorted(scores.items())}


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=raw, usage=argparse.SUPPRESS
    )
    parser.add_argument("--out", required=True, help="a new folder")
    for option, default in {"seed": 0, "train": 300, "test": 100}.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    args = parser.parse_args()
    if args.seed < 0 or min(args.train, args.test) < 1:
        parser.error("--seed wants at least 0, --train and --test want at least 1")
    try:
        Path(args.out).mkdir(parents=True)
        write_world(args.out, args.seed, args.train, args.test)
    except (ValueError, OSError) as error:
        sys.exit(f"pocket.py: {error}")
    print(f"families: {len(FAMILIES)}\nwritten: {args.out}")


if __name__ == "__main__":
    main()
