"""
The pocket world: a small, drawn world in MMEB's own layouts. The whole method runs in it on a
laptop, and is marked against the truth.

An image is a 3x3 grid of 32-pixel tiles, one visual token each: coloured shapes, digits or nothing.
Twelve families of query-target pairs cover MMEB-V2's kinds. Eight need one look. Four are mixed:
all their queries have the same form, and only the content says how many steps a query needs. Half
of them need none; the others 1 to 4, drawn evenly:

    Walk   "start at nw and follow the colours": until a purple thing                        (image)
    Sum    "add the numbers from ne on , w and so on": until a cell without a number         (image)
    Tally  the same over a clip: until a blank place                                         (video)
    Total  an account of one to five lines, whose page is wanted                             (page)

A few layers cannot chain several look-ups in one pass; a rationale writes them down one by one.
Scripted proposers of known quality write rationales, see write_rationales. select.pocket_truth says
which of them help.

Words of this file. A *step* is a move of a walk, or an addition: three numbers are two steps. A
tile shows a *kind*: a thing ("red", "star"), a digit 3, a word "tea", a flat patch (r, g, b), or
None, which is blank. A *scene* is the list of an image's nine kinds in reading order; a *cell* is
an index 0 to 8 into it, and its name is CELLS[cell].

How to run (training pairs and test queries of a family):
    python pocket.py --out DIR [--seed 0] [--train 300] [--test 100]

Left out: natural images, fonts other than Pillow's, noise in the labels.
Source: the layouts are those of TIGER-Lab/MMEB-train and MMEB-V2 (see data.py); the world is ours.
"""

import argparse
import io
import itertools
import os
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from data import count
from model import write_json, write_rows

TILE = 32  # pixels
COLOURS = {  # RGB
    "red": (214, 40, 40),
    "blue": (40, 80, 220),
    "green": (30, 150, 60),
    "yellow": (235, 190, 20),
    "purple": (140, 50, 170),
}
SHAPES = "circle square triangle star cross ring diamond bar moon frame".split()
THINGS = list(itertools.product(COLOURS, SHAPES))  # the 50 things: ("red", "circle") ...
CELLS = "nw n ne w mid e sw s se".split()  # in reading order; one token each
MOVES = {  # from each cell, 0 to 8, to the next one; None is out of the image
    "right": (1, 2, None, 4, 5, None, 7, 8, None),
    "left": (None, 0, 1, None, 3, 4, None, 6, 7),
    "down": (3, 4, 5, 6, 7, 8, None, None, None),
    "up": (None, None, None, 0, 1, 2, 3, 4, 5),
}
RULE = {"red": "right", "blue": "left", "green": "down", "yellow": "up"}  # purple ends a walk
TIMES = "first second third".split()  # the states of a clip; each shows two tiles side by side
PLACES = [f"{time} {side}" for time in TIMES for side in ("left", "right")]  # of a clip's kinds
NUMBERS = (  # up to 18, the most that two digits make
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen"
).split()
DIGITS = NUMBERS[:10]
TENS = "no ten twenty thirty forty fifty sixty seventy eighty ninety".split()  # "no" for no ten
WORDS = "sun map tea fox ink oak gem jar bee hat cup key".split()  # on pages
ITEMS = "rent food heat tax fare wage".split()  # of an account, in this order
VOCABULARY = [*CELLS, *MOVES, *TIMES, *NUMBERS, *TENS, *WORDS, *ITEMS, *COLOURS, *SHAPES]
PARROT = (  # rationales that look like reasoning and say nothing
    "let me think step by step . first look , then go on , so the answer is clear",
    "step by step : start , go , look , add , so the answer is found",
    "first look at the picture . then think . then the answer is clear",
    "let me look , then go step by step , then say the answer",
)
LONGEST = 4  # steps of a query in training; clips and accounts have room for one more


def pick(values, rng, but=None):
    """One of the values, but not that one: pick("abc", rng, but="b") -> "a" or "c"."""
    values = [value for value in values if value != but]
    return values[rng.integers(len(values))]


def draw_digits(n, rng):
    """n digits, evenly: [3, 0, 7]."""
    return rng.integers(0, 10, n).tolist()  # Python's ints: isinstance(kind, int) tells a digit


def sample(values, n, rng):
    """n of the values in any order, each at most once."""
    return rng.permutation(values)[:n].tolist()


# --------------------------------------------------------------------------------------------------
# Drawing

INK = (25, 25, 25)  # of text
ANGLES = [i * np.pi / 5 for i in range(10)]  # of a star's ten corners, from the top
REACHES = [1.15, 0.45] * 5  # their distances from the middle: a tip, a notch, ...
SQUARE = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
CORNERS = {  # (x, y) in radii from the middle; y grows downwards
    "square": SQUARE,
    "frame": SQUARE,
    "bar": [(-1, -0.4), (1, -0.4), (1, 0.4), (-1, 0.4)],
    "triangle": [(0, -1), (-1, 1), (1, 1)],
    "diamond": [(0, -1), (1, 0), (0, 1), (-1, 0)],
    "star": [(r * np.sin(a), -r * np.cos(a)) for a, r in zip(ANGLES, REACHES)],
}


def draw_shape(pen, colour, shape, paper, x, y, rng):
    """A shape around (x, y) in a shade of the colour, a little larger or smaller. paper: the colour
    behind it."""
    shade = COLOURS[colour] + rng.integers(-18, 19, 3)
    ink = tuple(shade.tolist())
    inside = None if shape in ("frame", "ring") else ink
    r = rng.integers(8, 12)  # radius, pixels
    if shape in CORNERS:
        corners = [(x + r * dx, y + r * dy) for dx, dy in CORNERS[shape]]
        pen.polygon(corners, inside, ink, width=3)
    elif shape == "cross":
        pen.rectangle((x - r, y - r / 3, x + r, y + r / 3), ink)
        pen.rectangle((x - r / 3, y - r, x + r / 3, y + r), ink)
    else:  # a circle, a ring, a moon
        pen.circle((x, y), r, inside, ink, width=3)
    if shape == "moon":  # the bite is a disc of paper at the upper right
        pen.circle((x + 0.69 * r, y - 0.15 * r), 0.92 * r, paper)


def draw_tile(kind, rng):
    """An image that shows a kind. Paper, place and size vary."""
    paper = (int(rng.integers(228, 250)),) * 3  # nearly white
    tile = Image.new("RGB", (TILE, TILE), paper)
    pen = ImageDraw.Draw(tile)
    x, y = rng.integers(14, 19, 2).tolist()  # at most two pixels from the middle
    if isinstance(kind, int):
        font = ImageFont.load_default(rng.integers(20, 25))
        pen.text((x, y), str(kind), INK, font, anchor="mm")  # mm: (x, y) is the text's middle
    elif isinstance(kind, str):
        font = ImageFont.load_default(14)
        pen.text((16, y), kind, INK, font, anchor="mm")
    elif kind in THINGS:
        draw_shape(pen, *kind, paper, x, y, rng)
    elif kind is not None:
        tile = Image.new("RGB", tile.size, kind)  # a flat patch
    return tile


class Bank:
    """Tiles drawn once and used again: `copies` of each kind, in other places, sizes, shades."""

    def __init__(self, rng, copies=40):
        # Nobody asks for these six patches. Without them every seed would draw another world.
        patches = rng.integers(40, 230, (6, 3)).tolist()
        self.tiles = {}  # {kind: [tiles]}
        for kind in [*THINGS, *range(10), None, *WORDS, *map(tuple, patches)]:
            self.tiles[kind] = [draw_tile(kind, rng) for _ in range(copies)]

    def tile(self, kind, rng):
        if kind not in self.tiles:  # a flat patch may have any colour
            return draw_tile(kind, rng)
        return pick(self.tiles[kind], rng)

    def grid(self, kinds, rng, columns=3):
        """Kinds in reading order -> an image: 9 kinds make 96 x 96 pixels."""
        rows = len(kinds) // columns
        image = Image.new("RGB", (TILE * columns, TILE * rows))
        for i, kind in enumerate(kinds):
            row, column = divmod(i, columns)
            image.paste(self.tile(kind, rng), (TILE * column, TILE * row))
        return image

    def clip(self, kinds, rng):
        """Kinds in the order of PLACES -> frames. Two kinds at a time are shown for two frames,
        which Qwen3-VL's patches join: one visual token for each kind."""
        frames = []
        for i in range(0, len(kinds), 2):
            frame = self.grid(kinds[i : i + 2], rng, columns=2)
            frames += [frame, frame]
        return frames

    def page(self, words, marks, rng):
        """4 rows of 3 tiles: one or two words on top, two digits (`marks`) at the bottom, lines of
        unreadable text between."""
        blank = [None] * (9 - len(words))
        page = self.grid([*words, *blank, *marks, None], rng)
        for y in range(TILE + 6, 3 * TILE, 8):
            end = rng.integers(50, 90)  # of a line, in pixels
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
    """The number on a page: (4, 4) -> "forty four", (0, 8) -> "no eight". Tens and ones use
    different words, because pretraining learns a page's words without their order: 48 is not 84."""
    return f"{TENS[tens]} {DIGITS[ones]}"


def makes(total):
    """8 -> "makes eight"; 17 -> "makes seventeen keep seven". The full sum comes first: one summand
    alone says something about it, but nothing about the last digit, which is slow to learn."""
    keep = f" keep {DIGITS[total - 10]}" if total >= 10 else ""
    return f"makes {NUMBERS[total]}{keep}"


def confuse(kind, rng):
    """Something else of the same sort. Colour and shape both differ: ("red", "star") -> ("blue",
    "bar"). So all that is said about it is wrong."""
    if isinstance(kind, int):
        return int((kind + rng.integers(1, 10)) % 10)
    if isinstance(kind, str):
        return pick(WORDS, rng, but=kind)  # a clip's "blank", too, becomes a word
    colour, shape = kind
    another_colour = pick(COLOURS, rng, but=colour)
    return another_colour, pick(SHAPES, rng, but=shape)


@dataclass
class Eyes:
    """A rationale's writer reads the kinds one by one through these. So an error is made where it
    is read, and what is written next follows from it."""

    rng: np.random.Generator = None  # not needed where nothing errs
    errors: float = 0.0  # chance that a reading errs
    wrong: int = None  # or: the one reading that errs, counted from 0
    readings: int = 0  # so far

    def read(self, kind):
        errs = self.readings == self.wrong
        if self.errors:
            errs = self.rng.random() < self.errors
        self.readings += 1
        return confuse(kind, self.rng) if errs else kind


SHARP = Eyes()  # never err; shared: `readings` means nothing here


def describe(kinds, places=CELLS, eyes=SHARP, between=" "):
    """What is not blank: "nw red star n three"."""
    text = []
    for place, kind in zip(places, kinds):
        if kind is not None:
            text.append(f"{place} {name(eyes.read(kind))}".strip())  # a place may be ""
    return between.join(text)


def onwards(cell, kind):
    """Where a thing at a cell sends a walk -> ("right", next cell), or ("right out", None) where
    that is outside, or ("stay", None) if it is purple."""
    move = RULE.get(kind[0])  # kind[0]: its colour
    if move is None:
        return "stay", None
    there = MOVES[move][cell]
    if there is None:
        move += " out"
    return move, there


def explain_walk(scene, start, eyes):
    """ "nw red star . right n purple ring . stay": each statement acts on what was read last."""
    text = []
    move, cell = "", start
    while cell is not None and len(text) < 9:  # a misread colour may lead in a circle
        kind = eyes.read(scene[cell])
        text.append(f"{move} {CELLS[cell]} {name(kind)}".strip())  # the start has no move
        move, cell = onwards(cell, kind)
    return " . ".join([*text, move])  # "stay"; after a misread colour "left out", or a move


def explain_sum(places, kinds, eyes, tens=""):
    """ "n five . ne nine makes fourteen keep four . w red star . four": digits, then perhaps what
    ends them, and the sum modulo ten. tens: a word that stands before it."""
    total = 0
    text = []
    for place, kind in zip(places, map(eyes.read, kinds)):
        statement = f"{place} {name(kind)}"
        if isinstance(kind, int):
            if text:  # the first number is added to nothing
                statement += f" {makes(total + kind)}"
            total = (total + kind) % 10
        text.append(statement)
    return " . ".join([*text, tens + DIGITS[total]])


# --------------------------------------------------------------------------------------------------
# Families. Each maker draws one pair. Makers of mixed families are told the number of steps.


@dataclass
class Pair:
    """A query and its target. What is shown is an image, a video, a page or nothing."""

    explain: callable  # explain(eyes) writes a rationale
    caption: str  # true words about what is shown
    text: str = ""  # what is asked
    image: Image.Image | str = ""  # of the query; "" is none
    video: list = ()  # of frames
    page: tuple = ()  # (words, digits): it is drawn when it is written, and it is the target
    answer: Image.Image | str = ""  # the target, where that is no page
    wrong: list = ()  # hard negatives, texts or images like the answer
    end: str = ""  # the words to which the steps lead; a rationale without them is wrong
    steps: int = 0


def draw_things(n, rng):
    """n things of different shapes, in any colours: [("red", "star"), ("red", "bar")]."""
    colours = rng.choice(list(COLOURS), n).tolist()
    return list(zip(colours, sample(SHAPES, n, rng)))


def few_things(rng):
    """A scene of three things; the other cells are blank: [None, None, ("red", "star"), ...]."""
    scene = [None] * 9
    cells = sample(range(9), 3, rng)
    for cell, thing in zip(cells, draw_things(3, rng)):
        scene[cell] = thing
    return scene


def put(scene, cell, kind):
    """The scene with another kind at one cell."""
    return [*scene[:cell], kind, *scene[cell + 1 :]]


def image_pair(bank, scene, rng, explain, text="", **more):
    """A pair whose query has an image of nine cells. more: other fields of Pair."""
    image = bank.grid(scene, rng)
    return Pair(explain, describe(scene), text, image, **more)


def make_colour(bank, rng):
    """Which colour is it? Things of one colour, some blanks, a stranger. -> "red"; rationale: "mid
    red star", for the middle always has that colour."""
    colour = pick(COLOURS, rng)
    scene = []
    for shape in rng.choice(SHAPES, 9).tolist():
        scene.append((colour, shape) if rng.random() < 0.8 else None)
    scene[4] = (colour, pick(SHAPES, rng))
    scene[rng.integers(4)] = pick(THINGS, rng)  # the stranger, at nw, n, ne or w
    explain = partial(describe, [scene[4]], ["mid"])
    return image_pair(bank, scene, rng, explain, answer=colour)


def make_at(bank, rng):
    """What is at a cell of a full image?

    "what is at nw ?" -> "red star"; rationale: "nw red star"
    """
    scene = draw_things(9, rng)
    cell = rng.integers(9)
    names = [name(thing) for thing in scene]  # nine different ones: no shape comes twice
    answer = names.pop(cell)
    text = f"what is at {CELLS[cell]} ?"
    explain = partial(describe, [scene[cell]], [CELLS[cell]])
    return image_pair(bank, scene, rng, explain, text, answer=answer, wrong=names)


def draw_way(rng, steps):
    """A walk that never crosses itself -> its start, {cell: colour} on the way, its end.

    steps = 2, and red and green are drawn: 0, {0: "red", 1: "green"}, 4
    """
    start = cell = rng.integers(9)
    way = {}  # cells that the walk has left
    for colour in rng.choice(list(RULE), steps).tolist():
        way[cell] = colour
        cell = MOVES[RULE[colour]][cell]
        if cell is None or cell in way:  # out of the image, or back on its own way
            return draw_way(rng, steps)  # another one
    return start, way, cell


def make_walk(bank, rng, steps):
    """A purple thing ends a walk. More than half of what is off the way is purple, too: the end
    cannot be recognised without walking. No step: the start is purple. No walk leaves the image: it
    would end in a second way, and "out" in a rationale is thus a misread colour.

    "start at nw and follow the colours . what is at the end ?" -> "purple ring"
    """
    start, way, end = draw_way(rng, steps)  # cell, {cell: colour}, cell
    scene = []
    for cell, (colour, shape) in enumerate(draw_things(9, rng)):
        if cell in way:
            colour = way[cell]
        elif cell == end or rng.random() < 0.5:  # the end, or one that looks like it
            colour = "purple"
        scene.append((colour, shape))
    names = [name(thing) for thing in scene]  # nine different ones
    answer = names.pop(end)
    text = f"start at {CELLS[start]} and follow the colours . what is at the end ?"
    explain = partial(explain_walk, scene, start)
    return image_pair(bank, scene, rng, explain, text, answer=answer, wrong=names, end=answer)


def summed(digits):
    """What the pairs share that ask for a sum modulo ten: [5, 9] -> the answer "four" and so on."""
    wrong = DIGITS.copy()
    answer = wrong.pop(sum(digits) % 10)
    return {"answer": answer, "wrong": wrong, "end": f". {answer}"}


def make_sum(bank, rng, steps):
    """steps + 1 numbers in reading order (after se comes nw); the other cells show things.

    "add the numbers from n on , ne and so on" -> "four"
    rationale of one step: "n five . ne nine makes fourteen keep four . w red star . four"
    """
    start = rng.integers(9)
    way = [(start + i) % 9 for i in range(steps + 2)]  # cells; the last one has no number
    scene = draw_things(9, rng)
    digits = draw_digits(steps + 1, rng)
    for cell, digit in zip(way, digits):
        scene[cell] = digit
    labels = [CELLS[cell] for cell in way]  # ["n", "ne", "w"]
    text = f"add the numbers from {labels[0]} on , {labels[1]} and so on"
    explain = partial(explain_sum, labels, [*digits, scene[way[-1]]])
    return image_pair(bank, scene, rng, explain, text, **summed(digits))


def make_tally(bank, rng, steps):
    """Numbers in the first steps + 1 of the six places of a clip; the other places are blank.

    rationale of one step:
    "first left two . first right three makes five . second left blank . five"
    """
    digits = draw_digits(steps + 1, rng)
    blank = [None] * (6 - len(digits))  # none after five steps, which only study.py draws
    video = bank.clip(digits + blank, rng)
    # The first blank is read, too, if there is one. It is a word here, so that it can be misread.
    explain = partial(explain_sum, PLACES, [*digits, "blank"])
    return Pair(explain, describe(digits, PLACES), video=video, **summed(digits))


def make_total(bank, rng, steps):
    """An account of one to five lines. Its page bears the last digit of the sum.

    "the account of tea and ink with rent three , food five" -> page "no eight"
    rationale of one step: "rent three . food five makes eight . no eight"
    """
    digits = draw_digits(steps + 1, rng)
    total = (0, sum(digits) % 10)  # the page says "no eight", never "ten eight"
    owners = " and ".join(sample(WORDS, 2, rng))  # "tea and ink"
    lines = describe(digits, ITEMS, between=" , ")  # "rent three , food five"
    text = f"the account of {owners} with {lines}"
    page = (("sun",), total)  # one title for all: the number decides
    explain = partial(explain_sum, ITEMS, digits, tens="no ")
    return Pair(explain, lines, text, page=page, end=f". {number(*total)}")


def make_topic(bank, rng):
    """ "the page ten four about tea and ink" -> the page that says so; rationale: "tea ink"."""
    words = tuple(sample(WORDS, 2, rng))
    digits = tuple(draw_digits(2, rng))
    text = f"the page {number(*digits)} about {words[0]} and {words[1]}"
    explain = partial(describe, words, ["", ""])  # words without places
    return Pair(explain, " ".join(words), text, page=(words, digits))


def make_caption(bank, rng):
    """From an image to its caption, which is its rationale, too.

    "nw red star , e blue moon , s green bar"
    """
    scene = few_things(rng)
    explain = partial(describe, scene, CELLS, between=" , ")
    return image_pair(bank, scene, rng, explain, answer=explain())


def make_search(bank, rng):
    """From a caption to its image: the pair of make_caption the other way round."""
    pair = make_caption(bank, rng)
    return replace(pair, text=pair.answer, answer=pair.image, image="")


def make_change(bank, rng):
    """The image after a change. Wrong ones: another cell, another thing, no change.

    "put a red star at nw"; rationale: "nw red star"
    """
    scene = few_things(rng)
    blank = [cell for cell, kind in enumerate(scene) if kind is None]
    cell, elsewhere = sample(blank, 2, rng)
    thing, another = draw_things(2, rng)
    answer = bank.grid(put(scene, cell, thing), rng)
    misplaced = bank.grid(put(scene, elsewhere, thing), rng)
    mistaken = bank.grid(put(scene, cell, another), rng)
    image = bank.grid(scene, rng)
    wrong = [misplaced, mistaken, bank.grid(scene, rng)]  # the last one is drawn anew
    text = f"put a {name(thing)} at {CELLS[cell]}"
    explain = partial(describe, [thing], [CELLS[cell]])
    return Pair(explain, describe(scene), text, image, answer=answer, wrong=wrong)


def make_point(bank, rng):
    """The crop that shows the thing at a cell. The others are the wrong ones.

    "the thing at nw"; rationale: "nw red star"
    """
    scene = draw_things(9, rng)
    cell = rng.integers(9)
    crops = [bank.tile(thing, rng) for thing in scene]  # other drawings than in the image
    answer = crops.pop(cell)
    text = f"the thing at {CELLS[cell]}"
    explain = partial(describe, [scene[cell]], [CELLS[cell]])
    return image_pair(bank, scene, rng, explain, text, answer=answer, wrong=crops)


def make_twin(bank, rng):
    """Nine flat patches of any colour, beyond words: the rationale is "nine patches". The twin is a
    little darker or brighter; two wrong images are further off."""
    rgb = rng.integers(40, 230, (9, 3))
    shift = rng.integers(-12, 13)  # the same for all patches
    twin = rgb + shift + rng.integers(-6, 7, (9, 3))
    further = rgb + rng.integers(-45, 46, (2, 9, 3))
    images = []
    for patches in np.clip([rgb, twin, *further], 0, 255).tolist():
        kinds = [tuple(patch) for patch in patches]
        images.append(bank.grid(kinds, rng))
    image, answer, *wrong = images
    explain = partial(describe, ["patches"], ["nine"])
    caption = "a picture of nine patches"
    return Pair(explain, caption, image=image, answer=answer, wrong=wrong)


@dataclass
class Family:
    """A dataset: how its pairs are drawn, and what is said around them."""

    name: str
    draw: callable  # draw(bank, rng), of a mixed family draw(bank, rng, steps) -> a Pair
    parser: str  # of its test set, see data.py
    asks: str  # the query's instruction
    wants: str = ""  # the target's; "" where the target is a text

    def make(self, bank, rng, longest):
        """Half of a mixed family's queries need no step, the others 1 to `longest`, evenly."""
        if self.name not in MIXED:
            return self.draw(bank, rng)
        steps = 0 if rng.random() < 0.5 else int(rng.integers(1, longest + 1))
        return replace(self.draw(bank, rng, steps), steps=steps)


# Instructions. COLOUR and ADD are ours; the others are MMEB's own, of its question answering,
# MSCOCO, CIRR, RefCOCO, NIGHTS and pages.
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

FAMILIES = [  # name, maker, parser, what the query says, what an image or page as target says
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
# Writing the world in MMEB's layouts: data.py reads it with the parsers that read the real thing.
# Their docstrings show rows: mmeb_pair and image_set, video_pair and video_cls, page_pair and beir.

TRAIN_HUB = "TIGER-Lab/MMEB-train"  # hub ids, which are folders under the root
TEST_HUB = "ziyjiang/MMEB_Test_Instruct"
TEST_IMAGES = "TIGER-Lab/MMEB-V2/image-tasks"
TOKEN = "<|image_1|>\n"  # MMEB's place-holder of an image


def write_table(columns, rows, path):
    """A parquet file, named as the hub's. columns: "qry pos_text"; rows: tuples in that order;
    path: without the ending."""
    table = pa.table(list(zip(*rows)), columns.split())
    os.makedirs(os.path.dirname(path), exist_ok=True)
    pq.write_table(table, f"{path}-00000-of-00001.parquet")


def save_images(pair, folder, name, i, most=None):
    """-> names of the query's image, the target and at most so many wrong ones:
    ["PocketPoint/query_0.png", "PocketPoint/target_0.png", "PocketPoint/wrong_0_0.png", ...]
    A text stays: ["PocketAt/query_0.png", "red star", "blue bar", ...]"""
    values = {f"query_{i}": pair.image, f"target_{i}": pair.answer}
    for k, wrong in enumerate(pair.wrong[:most]):
        values[f"wrong_{i}_{k}"] = wrong
    os.makedirs(f"{folder}/{name}", exist_ok=True)
    names = []
    for title, value in values.items():
        path = f"{name}/{title}.png"
        if not isinstance(value, str):
            value.save(f"{folder}/{path}", compress_level=1)
            value = path
        names.append(value)
    return names


def save_clip(pair, folder):
    """A clip's frames, as frame_0001.png and so on."""
    os.makedirs(folder, exist_ok=True)
    for i, frame in enumerate(pair.video, 1):
        frame.save(f"{folder}/frame_{i:04d}.png", compress_level=1)


def draw_pages(pairs, bank, rng):
    """{page: its drawing inside a table}. Equal pages are one target."""
    pages = {}
    for page in dict.fromkeys(pair.page for pair in pairs):
        buffer = io.BytesIO()
        bank.page(*page, rng).save(buffer, "PNG", compress_level=1)
        pages[page] = {"bytes": buffer.getvalue(), "path": None}  # as the hub stores images
    return pages


# Each layout writes a family's training and test set -> what datasets.json says about them, the
# keys of data.Row. learn, held_out: the pairs of the two sets. Only pages need bank.


def write_images(root, family, learn, held_out, bank, rng):
    """MMEB-V2's image tasks: tables that name image files beside them. The target is an image where
    the family says what it `wants`, else a text. A test query has candidates of its own: the right
    one first, then the wrong ones, then, up to 20, answers of other queries."""
    asks = family.asks if family.parser == "image_t2i" else TOKEN + family.asks
    marked = f"{TOKEN}{family.wants}\n" if family.wants else ""  # the text of a target's side
    most = 3 if family.wants else None  # of wrong images; texts cost nothing
    rows = []
    folder = f"images/{family.name}/Train"  # under TRAIN_HUB, as in MMEB-train
    for i, pair in enumerate(learn):
        image, answer, *wrong = save_images(pair, f"{root}/{TRAIN_HUB}", folder, i, most)
        query = f"{asks}{pair.text}\n"
        target = (marked, answer) if family.wants else (answer, "")  # text, image
        rows.append((query, image, *target, wrong, [marked] * len(wrong)))
    # `wrong` fills the column that targets use, [marked, ...] the other one.
    negatives = "neg_image_path neg_text" if family.wants else "neg_text neg_image_path"
    columns = f"qry qry_image_path pos_text pos_image_path {negatives}"
    write_table(columns, rows, f"{root}/{TRAIN_HUB}/{family.name}/original")
    # data.py fills in {hub}, {name} and {split}.
    train = {"parser": "mmeb", "hub": TRAIN_HUB, "table": "{hub}/{name}/{split}-*.parquet"}

    folder = f"{root}/{TEST_IMAGES}"
    stored = [save_images(pair, folder, family.name, i) for i, pair in enumerate(held_out)]
    pool = dict.fromkeys(answer for _, answer, *_ in stored)  # all answers, each once
    rows = []
    for pair, (image, *options) in zip(held_out, stored):  # options: the target, wrong ones
        more = [answer for answer in pool if answer not in options]
        options += sample(more, max(0, 20 - len(options)), rng)
        blank = [""] * len(options)
        targets = (blank, options) if family.wants else (options, blank)  # texts, images
        rows.append((asks.strip(), pair.text, image, marked.strip(), *targets))
    columns = "qry_inst qry_text qry_img_path tgt_inst tgt_text tgt_img_path"
    write_table(columns, rows, f"{root}/{TEST_HUB}/{family.name}/test")
    return train, train | {"parser": family.parser, "hub": TEST_HUB, "media": TEST_IMAGES}


def write_clips(root, family, learn, held_out, bank, rng):
    """Video classification. A clip is a folder of frames. Training has the layout of LLaVA-Hound:
    conversations, one a line; the test set names all classes as candidates."""
    hub = "ShareGPTVideo/train_video_and_instruction"
    media = f"{hub}/train_300k"
    rows = []
    for i, pair in enumerate(learn):
        video = f"{family.name}_{i}"  # the clip's folder
        save_clip(pair, f"{root}/{media}/{video}")
        asks = {"from": "human", "value": f"<video> {family.asks}"}
        says = {"from": "gpt", "value": pair.answer}
        rows.append({"id": video, "video": video, "conversations": [asks, says]})
    write_rows(f"{root}/{hub}/{family.name}.jsonl", rows)
    train = {"parser": "video_caption", "hub": hub, "table": "{hub}/{name}.jsonl", "media": media}

    hub = f"VLM2Vec/{family.name}"
    media = f"TIGER-Lab/MMEB-V2/video-tasks/frames/video_cls/{family.name}"
    rows = []
    for i, pair in enumerate(held_out):
        save_clip(pair, f"{root}/{media}/clip_{i}")
        rows.append((f"clip_{i}", pair.answer, [pair.answer, *pair.wrong]))
    write_table("video_id pos_text neg_text", rows, f"{root}/{hub}/data/test")
    test = {"parser": family.parser, "hub": hub, "media": media}
    return train, test | {"inst": family.asks}


def write_pages(root, family, learn, held_out, bank, rng):
    """Visual documents. Tables hold the pages themselves. Training has the layout of ViDoRe's and
    VisRAG's sets; the test set is that of BEIR: queries, a corpus, and qrels, which join them."""
    hub = f"pocket/{family.name}-train"  # the source "pocket" has no prompt of its own in data.py
    pages = draw_pages(learn, bank, rng)
    rows = [(family.asks + pair.text, pages[pair.page], "pocket") for pair in learn]
    write_table("query image source", rows, f"{root}/{hub}/data/train")
    train = {"parser": "page", "hub": hub, "split": "train"}

    hub = f"pocket/{family.name}-test"
    pages = draw_pages(held_out, bank, rng)
    corpus = list(pages)  # a page's corpus-id is its place in here
    queries = enumerate(pair.text for pair in held_out)
    qrels = [(i, corpus.index(pair.page), 1) for i, pair in enumerate(held_out)]  # 1: relevant
    write_table("query-id query", queries, f"{root}/{hub}/queries/test")
    write_table("corpus-id image", enumerate(pages.values()), f"{root}/{hub}/corpus/test")
    write_table("query-id corpus-id score", qrels, f"{root}/{hub}/qrels/test")
    test = {"parser": family.parser, "hub": hub}
    return train, test | {"inst": family.asks.strip(), "tgt": family.wants}


WRITERS = {"video_cls": write_clips, "beir": write_pages}  # of the other parsers: write_images


def distinct_pairs(family, n, bank, rng, longest):
    """n pairs whose queries all differ, so that training and test share none."""
    pairs = {}
    for _ in range(20 * n + 100):  # draws; of equal queries the first is kept
        pair = family.make(bank, rng, longest)
        pixels = np.array(pair.video or pair.image)  # "" where nothing is shown
        pairs.setdefault((pair.text, pixels.tobytes()), pair)
        if len(pairs) == n:
            return list(pairs.values())
    raise ValueError(f"{family.name} has no {n} different pairs: a smaller world is wanted")


def write_rationales(pair, rng):
    """What the scripted proposers say about a pair: [(proposer, text)]. Here "add the numbers from
    nw on , n and so on", where three and five are, then a red star:

    careful    right steps, four tries. Each reading may err; later statements build on the error:
               "nw three . n four makes seven . ne red star . seven" is one error
    captioner  true words about what is shown, no steps: "nw three n five ne red star w ..."
    sloppy     right form, one wrong fact
    parrot     form only: "let me look , then go step by step , then say the answer"
    """
    sharp = Eyes()  # counts the readings
    right = pair.explain(sharp)  # without an error
    texts = []
    while len(texts) < 4:
        text = pair.explain(Eyes(rng, errors=0.1))
        # What errs and yet comes to the right end is drawn again: who can say whether it helps?
        # Where no steps lead anywhere, `end` is "".
        by_luck = text != right and pair.end and pair.end in text
        if not by_luck:
            texts.append(("careful", text))
    one_error = Eyes(rng, wrong=rng.integers(sharp.readings))
    texts.append(("captioner", pair.caption))
    texts.append(("sloppy", pair.explain(one_error)))
    texts.append(("parrot", pick(PARROT, rng)))
    return texts


def write_world(root, seed, train, test, longest=LONGEST, names=None):
    """The world under `root`, or that of some families only:

    TIGER-Lab/... and more  training and test sets
    datasets.json           what data.py has to know of them
    proposers.jsonl         rationales by the scripted proposers
    pocket.json             the truth: {"train": {pair id: {"steps", "rationale" without an error}},
                            "test": {"family/query id": steps} of the mixed families}

    A family draws from (seed, its place in FAMILIES): it is the same without the others.
    """
    bank = Bank(np.random.default_rng([seed, 12]))  # 0 to 11 are the families'
    listing = {"train": [], "eval": []}  # rows of data.Row
    truth = {"train": {}, "test": {}}
    rationales = []  # rows of proposers.jsonl
    for n, family in enumerate(FAMILIES):
        if names and family.name not in names:
            continue
        rng = np.random.default_rng([seed, n])
        pairs = distinct_pairs(family, train + test, bank, rng, longest)
        learn, held_out = pairs[:train], pairs[train:]  # training, test
        write = WRITERS.get(family.parser, write_images)
        about_train, about_test = write(root, family, learn, held_out, bank, rng)
        listing["train"].append({"name": family.name} | about_train)
        listing["eval"].append({"name": family.name} | about_test)
        if family.name in MIXED:
            for i, pair in enumerate(held_out):
                truth["test"][f"{family.name}/{i}"] = pair.steps
        for i, pair in enumerate(learn):
            id = f"{family.name}/{i}"  # data.py's: dataset/row
            truth["train"][id] = {"steps": pair.steps, "rationale": pair.explain(SHARP)}
            for proposer, text in write_rationales(pair, rng):
                rationales.append({"id": id, "side": "query", "proposer": proposer, "text": text})
    write_rows(f"{root}/proposers.jsonl", rationales)
    write_json(f"{root}/pocket.json", truth)
    write_json(f"{root}/datasets.json", listing)


def main():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)  # a wrong option ends in one line
    add = parser.add_argument
    add("--out", required=True, help="a new folder")
    add("--seed", type=int, default=0, help="of all that is drawn (0)")
    add("--train", type=count, default=300, help="pairs of a family (300)")
    add("--test", type=count, default=100, help="queries of a family (100)")
    args = parser.parse_args()
    if args.seed < 0:
        parser.error("--seed is less than 0")
    Path(args.out).mkdir(parents=True)
    write_world(args.out, args.seed, args.train, args.test)
    print(f"families: {len(FAMILIES)}\nwritten: {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"pocket.py: {error}")
