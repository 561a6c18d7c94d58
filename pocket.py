"""
The pocket world: a small, drawn world in MMEB's own layouts, so that the whole method runs on a laptop and can be marked against the truth.

The idea. A picture is a 3x3 grid of 32-pixel tiles (one visual token each): coloured shapes, digits, words. Sixteen families of
query-target pairs cover MMEB-V2's kinds: classification, visual questions, caption retrieval in both directions, composed retrieval,
grounding, near-duplicates, videos and pages. Twelve are solvable at one look. Four need steps, because their answer is a function
of several look-ups that a few layers cannot chain in one pass:
    Walk   "start at nw and follow the colours three times"         each thing's colour says where next (image)
    Sum    "add four from ne on"                                    a running sum modulo ten            (image)
    Tally  add all digits of a clip                                 the same over time                  (video)
    Total  "the account with rent three , food five ..."            the same, from words alone          (page)

Scripted proposers of known quality write rationales: careful (right steps), captioner (true words about the picture, no steps), sloppy
(right form, one wrong fact, hence a wrong end) and parrot (form only). The truth that selection is marked against: a careful
rationale on a family that needs steps helps, every other does not. Where careful is made to err (`misread`), what it got wrong does not help.

How to run:
    python pocket.py --out DIR [--seed 1] [--train 300] [--test 100] [--style plain|night] [--steps 3]

Left out: natural images, fonts other than Pillow's, noise in the labels.
Source: the layouts are those of TIGER-Lab/MMEB-train and MMEB-V2 (see data.py); the world is ours.
"""

import argparse
import dataclasses
import io
import json
import os
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

import scale
from model import CONFIGS, Qwen3VL
from processor import Processor, Tokenizer, collate

MIN_PIXELS, MAX_PIXELS = 1024, 65536  # one visual token covers 32 x 32 pixels
LOOK_STEPS = 240  # steps of nothing but description, before anything is asked
SKILL_WANTED = 0.93  # held-out token accuracy of every skill in STEP_SKILLS

TILE = 32
COLOURS = {
    "red": (214, 40, 40),
    "blue": (40, 80, 220),
    "green": (30, 150, 60),
    "yellow": (235, 190, 20),
    "purple": (140, 50, 170),
}
SHAPES = (
    "circle",
    "square",
    "triangle",
    "star",
    "cross",
    "ring",
    "diamond",
    "bar",
    "moon",
    "frame",
)
KINDS = [(c, s) for c in COLOURS for s in SHAPES]  # 50 kinds of glyph
CELLS = (
    "nw",
    "n",
    "ne",
    "w",
    "mid",
    "e",
    "sw",
    "s",
    "se",
)  # a 3x3 picture in reading order; one token each
MOVES = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}
RULE = {
    "red": "right",
    "blue": "left",
    "green": "down",
    "yellow": "up",
}  # where a colour sends you in Walk; purple nowhere
ROWS = ("top", "middle", "bottom")
TIMES = ("first", "second", "third")
NUMBERS = (
    "zero one two three four five six seven eight nine "
    "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen"
).split()  # words: one token each
DIGITS = NUMBERS[:10]
TENS = (
    "no ten twenty thirty forty fifty sixty seventy eighty ninety".split()
)  # of a page's number: "fifty eight", "no three"
WORDS = ("sun", "map", "tea", "fox", "ink", "oak", "gem", "jar", "bee", "hat", "cup", "key")
ITEMS = ("rent", "food", "heat", "tax", "fare", "wage")  # of an account, in this order
PARROT = (
    "let me think step by step . first look , then go on , so the answer is clear",
    "step by step : start , go , look , add , so the answer is found",
    "first look at the picture . then think . then the answer is clear",
    "let me look , then go step by step , then say the answer",
)

# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def font(size):
    return ImageFont.load_default(size=size)  # ships with Pillow: no file to look for


def shape_points(shape, x, y, r):
    """Corners of a polygon shape around (x, y)."""
    if shape == "triangle":
        return [(x, y - r), (x - r, y + r), (x + r, y + r)]
    if shape == "star":
        a = np.arange(10) * np.pi / 5 - np.pi / 2
        k = np.where(np.arange(10) % 2 == 0, r * 1.15, r * 0.45)
        return list(zip(x + k * np.cos(a), y + k * np.sin(a)))
    if shape == "cross":
        t = r / 3
        return [
            (x + a, y + b)
            for a, b in (
                (-t, -r),
                (t, -r),
                (t, -t),
                (r, -t),
                (r, t),
                (t, t),
                (t, r),
                (-t, r),
                (-t, t),
                (-r, t),
                (-r, -t),
                (-t, -t),
            )
        ]
    if shape == "diamond":
        return [(x, y - r), (x + r, y), (x, y + r), (x - r, y)]
    t = r / 2.5 if shape == "bar" else r  # a bar is a flat square
    return [(x - r, y - t), (x + r, y - t), (x + r, y + t), (x - r, y + t)]


def draw_tile(kind, rng, style="plain"):
    """One 32x32 tile. kind: (colour, shape) | int digit | str word | None blank | a plain RGB triple of ints -> uint8 (32, 32, 3)."""
    paper, black = (
        (int(rng.integers(228, 250)), 25) if style == "plain" else (int(rng.integers(20, 50)), 235)
    )  # "night": light on dark
    im = Image.new("RGB", (TILE, TILE), (paper,) * 3)
    d, (dx, dy) = ImageDraw.Draw(im), rng.integers(-2, 3, 2)
    if isinstance(kind, tuple) and len(kind) == 2:
        ink = tuple(
            int(v) for v in np.clip(np.array(COLOURS[kind[0]]) + rng.integers(-18, 19, 3), 0, 255)
        )
        x, y, r = 16 + int(dx), 16 + int(dy), int(rng.integers(8, 12))
        hollow = kind[1] in ("ring", "frame")
        how = dict(outline=ink, width=3) if hollow else dict(fill=ink)
        if kind[1] in ("circle", "ring", "moon"):
            d.ellipse((x - r, y - r, x + r, y + r), **how)
            if kind[1] == "moon":  # a disc with a bite
                d.ellipse((x - r / 4, y - r - 1, x + r * 1.6, y + r - r / 4), fill=(paper,) * 3)
        else:
            d.polygon(shape_points(kind[1], x, y, r), **how)
    elif isinstance(kind, tuple):
        d.rectangle((0, 0, TILE, TILE), fill=kind)
    elif isinstance(kind, (int, np.integer)):
        d.text(
            (16 + int(dx), 16 + int(dy)),
            str(kind),
            font=font(int(rng.integers(20, 25))),
            fill=(black,) * 3,
            anchor="mm",
        )
    elif kind:
        d.text((16, 16 + int(dy)), kind, font=font(14), fill=(black,) * 3, anchor="mm")
    return np.asarray(im)


def draw(grid, rng, style="plain"):
    """grid: rows of kinds -> one picture, uint8 (32 * rows, 32 * columns, 3)."""
    return np.concatenate(
        [np.concatenate([draw_tile(k, rng, style) for k in row], axis=1) for row in grid], axis=0
    )


def picture(scene, rng, style="plain"):
    """scene: nine kinds in reading order -> 96x96."""
    return draw([scene[0:3], scene[3:6], scene[6:9]], rng, style)


def clip(states, rng, style="plain"):
    """Every state (a row of kinds) is shown for two frames, so that one frame group is one state -> list of pictures."""
    return [f for s in states for f in [draw([s], rng, style)] * 2]


def page_grid(title, marks):
    """A page is 3x4 tiles: title words on top, marks (digits) at the bottom, text between them (`print_lines`)."""
    return [[*title, None, None][:3], [None] * 3, [None] * 3, [*marks, None, None, None][:3]]


def print_lines(page, rng):
    """Lines of unreadable text, ragged on the right, on the two empty rows of a page -> a new page."""
    out = page.copy()
    for y in range(TILE + 6, 3 * TILE, 8):
        out[y : y + 3, 6 : int(rng.integers(50, 90))] = 120
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Words for what is seen


def name(kind):
    return (
        " ".join(kind)
        if isinstance(kind, tuple)
        else kind
        if isinstance(kind, str)
        else DIGITS[kind]
    )


def describe(scene, between=" "):
    """The whole picture in words: "nw red star n three ..."; blanks are not mentioned. A caption has commas between."""
    return between.join(f"{c} {name(k)}" for c, k in zip(CELLS, scene) if k is not None)


def makes(total):
    """ "makes eight", "makes seventeen keep seven". The full sum comes first because a + b mod 10 alone cannot be learned from either
    digit by itself (each says nothing about it), and training then waits on a plateau for longer than this whole run."""
    return f"makes {NUMBERS[total]}" + (f" keep {DIGITS[total - 10]}" if total >= 10 else "")


def number(marks):
    """A page's two digits as one number. Each word says its place: a vector that sums up words (see train.document_losses) does not keep their
    order, and took 58 for 85."""
    return f"{TENS[marks[0]]} {DIGITS[marks[1]]}"


def running_sum(labels, digits, total=None):
    """ "nw three . n five makes eight . ne nine makes seventeen keep seven": the steps of a sum modulo ten -> text and result."""
    out = []
    for label, x in zip(labels, digits):
        step = f"{label} {DIGITS[x]}".strip()
        if total is not None:  # the first of all is only read
            step += f" {makes(total + x)}"
        out.append(step)
        total = x if total is None else (total + x) % 10
    return " . ".join(out), total


def add_up(labels, digits):
    """The running sum with a head and the result at the end -> text and answer."""
    text, total = running_sum(labels, digits)
    return f"add {text} . {DIGITS[total]}", DIGITS[total]


def spoil(digits, rng):
    """The same digits with one of them misread: the sum ends wrong."""
    out = list(digits)
    j = rng.integers(len(out))
    out[j] = int((out[j] + rng.integers(1, 10)) % 10)
    return out


def walk(scene, start, moves):
    """Follow the moves from a cell (None: where the colour of the thing there sends you) -> steps in words and the cells visited; None when a
    move leaves the picture or a colour has no rule."""
    r, c = divmod(start, 3)
    text, cells = [f"{CELLS[start]} {name(scene[start])}"], [start]
    for m in moves:
        m = m or RULE.get(scene[3 * r + c][0])
        r, c = (r + MOVES[m][0], c + MOVES[m][1]) if m else (-1, -1)
        if not (0 <= r < 3 and 0 <= c < 3):
            return None
        cells.append(3 * r + c)
        text.append(f"{m} {CELLS[cells[-1]]} {name(scene[cells[-1]])}")
    return " . ".join(text), cells


# ---------------------------------------------------------------------------------------------------------------------
# Families. Each makes one pair: query and target parts, what the proposers know, and special wrong candidates


def glyphs(rng, n):
    """n glyphs (at most ten) of different shapes, in any colours: a shape names one thing of a picture."""
    return list(zip(rng.choice(list(COLOURS), n).tolist(), rng.permutation(SHAPES)[:n].tolist()))


def other(kind, rng):
    """A kind that differs in colour or in shape."""
    c, s = kind
    return (
        (rng.choice([x for x in COLOURS if x != c]).item(), s)
        if rng.random() < 0.5
        else (c, rng.choice([x for x in SHAPES if x != s]).item())
    )


def make_kind(rng, style, steps):
    k, cell = glyphs(rng, 1)[0], rng.integers(9)
    scene = [k if i == cell else None for i in range(9)]
    return dict(
        image=picture(scene, rng, style),
        answer=name(k),
        caption=describe(scene),
        careful=f"{CELLS[cell]} {name(k)}",
        sloppy=f"{CELLS[cell]} {name(other(k, rng))}",
    )


def make_colour(rng, style, steps):
    c = rng.choice(list(COLOURS)).item()
    scene = [(c, s) if rng.random() < 0.7 else None for s in rng.choice(SHAPES, 9).tolist()]
    scene[int(rng.integers(9))] = (c, rng.choice(SHAPES).item())
    scene[int(rng.integers(9))] = KINDS[rng.integers(len(KINDS))]  # one stranger
    count = {x: sum(k is not None and k[0] == x for k in scene) for x in COLOURS}
    c = max(count, key=count.get)
    return dict(
        image=picture(scene, rng, style),
        answer=c,
        caption=describe(scene),
        careful=f"mostly {c}",
        sloppy=f"mostly {rng.choice([x for x in COLOURS if x != c])}",
    )


def make_at(rng, style, steps):
    scene, i = glyphs(rng, 9), rng.integers(9)
    return dict(
        image=picture(scene, rng, style),
        question=f"what is at {CELLS[i]} ?",
        answer=name(scene[i]),
        wrong_answers=[name(k) for k in scene if k != scene[i]],
        caption=describe(scene),
        careful=f"{CELLS[i]} {name(scene[i])}",
        sloppy=f"{CELLS[i]} {name(other(scene[i], rng))}",
    )


def make_beside(rng, style, steps):
    scene = glyphs(rng, 9)
    while True:
        i, m = int(rng.integers(9)), rng.choice(list(MOVES)).item()
        found = walk(scene, i, [m])
        if found:
            break
    text, (_, j) = found
    return dict(
        image=picture(scene, rng, style),
        question=f"what is {m} of {CELLS[i]} ?",
        answer=name(scene[j]),
        wrong_answers=[name(k) for k in scene if k != scene[j]],
        caption=describe(scene),
        careful=text,
        sloppy=text[: -len(name(scene[j]))] + name(other(scene[j], rng)),
    )


def make_walk(rng, style, steps):
    """Every step depends on what the one before found, so the moves cannot be added up beforehand."""
    while True:  # a way that never stands on a cell twice; its colours are painted to lead there
        scene, start = glyphs(rng, 9), int(rng.integers(9))
        moves = rng.choice(list(MOVES), steps).tolist()
        found = walk(scene, start, moves)
        if found and len(set(found[1])) == steps + 1:
            break
    colour = {move: c for c, move in RULE.items()}
    for cell, move in zip(found[1], moves):
        scene[cell] = (colour[move], scene[cell][1])
    text, cells = walk(scene, start, [None] * steps)
    end = scene[cells[-1]]
    wrong = [walk(scene, s, [None] * steps) for s in rng.permutation(9).tolist() if s != start]
    wrong = [
        w for w in wrong if w and scene[w[1][-1]][0] != end[0] and scene[w[1][-1]][1] != end[1]
    ]
    if (
        wrong and rng.random() < 0.5
    ):  # sloppy: started in the wrong place, or misread the last thing
        sloppy = wrong[0][0]
    else:
        c, s = (
            rng.choice([x for x in COLOURS if x != end[0]]),
            rng.choice([x for x in SHAPES if x != end[1]]),
        )
        sloppy = text[: -len(name(end))] + f"{c} {s}"
    return dict(
        image=picture(scene, rng, style),
        question=f"start at {CELLS[start]} and follow the colours {NUMBERS[steps]} times . what is there ?",
        answer=name(end),
        wrong_answers=[name(k) for k in scene if k != end],
        caption=describe(scene),
        careful=text,
        sloppy=sloppy,
        cells=cells,
    )


def make_sum(rng, style, steps):
    """One digit more than steps, in reading order from some cell on (after se comes nw)."""
    start, n = int(rng.integers(9)), steps + 1
    cells = [(start + i) % 9 for i in range(n)]
    scene = [
        int(rng.integers(10)) if i in cells else KINDS[rng.integers(len(KINDS))] for i in range(9)
    ]
    labels, digits = [CELLS[i] for i in cells], [scene[i] for i in cells]
    text, answer = add_up(labels, digits)
    return dict(
        image=picture(scene, rng, style),
        question=f"add {NUMBERS[n]} from {CELLS[start]} on",
        answer=answer,
        wrong_answers=[d for d in DIGITS if d != answer],
        caption=describe(scene),
        careful=text,
        sloppy=add_up(labels, spoil(digits, rng))[0],
    )


def few(rng, n):
    """A picture of n things, the other cells blank -> scene."""
    at = dict(zip(rng.permutation(9)[:n].tolist(), glyphs(rng, n)))
    return [at.get(i) for i in range(9)]


def make_caption(rng, style, steps):
    scene = few(rng, 3)
    text = describe(scene, " , ")
    return dict(
        image=picture(scene, rng, style),
        text=text,
        caption=describe(scene),
        careful=text,
        sloppy=describe(few(rng, 3), " , "),
    )


def make_change(rng, style, steps):
    scene = few(rng, 3)
    free = [i for i, k in enumerate(scene) if k is None]
    i, j = rng.permutation(free)[:2].tolist()
    new, nope = glyphs(rng, 2)
    after = lambda at, k: picture([k if n == at else x for n, x in enumerate(scene)], rng, style)
    return dict(
        image=picture(scene, rng, style),
        text=f"put a {name(new)} at {CELLS[i]}",
        target_image=after(i, new),
        wrong=[after(j, new), after(i, nope), picture(scene, rng, style)],
        caption=describe(scene),
        careful=f"{CELLS[i]} {name(new)}",
        sloppy=f"{CELLS[j]} {name(nope)}",
    )


def make_point(rng, style, steps):
    scene, i = glyphs(rng, 9), int(rng.integers(9))
    crops = [draw_tile(k, rng, style) for k in scene]
    return dict(
        image=picture(scene, rng, style),
        text=f"the thing at {CELLS[i]}",
        target_image=crops[i],
        wrong=[x for n, x in enumerate(crops) if n != i],
        caption=describe(scene),
        careful=f"{CELLS[i]} {name(scene[i])}",
        sloppy=f"{CELLS[i]} {name(other(scene[i], rng))}",
    )


def make_twin(rng, style, steps):
    """Nine flat patches of continuous colours: what no words carry. The twin is a little darker or lighter, and noisy."""
    rgb = rng.integers(40, 230, (9, 3))
    tint = lambda: np.clip(rgb + rng.integers(-12, 13) + rng.integers(-6, 7, (9, 3)), 0, 255)
    show = lambda colours: picture([tuple(int(v) for v in c) for c in colours], rng, style)
    near = [np.clip(rgb + rng.integers(-45, 46, (9, 3)), 0, 255) for _ in range(2)]
    return dict(
        image=show(rgb),
        target_image=show(tint()),
        wrong=[show(x) for x in near],
        caption="a picture of nine patches",
        careful="nine patches",
        sloppy="nine dark patches",
    )


def motion(rng):
    """One thing in a clip of two tiles, that moves or stays -> states, kind, and which."""
    k, how = glyphs(rng, 1)[0], rng.choice(["moves right", "moves left", "stays"]).item()
    turn, side = int(rng.integers(1, 3)), int(rng.integers(2))  # when it moves; where it stays
    at = {
        "moves right": [0] * turn + [1] * (3 - turn),
        "moves left": [1] * turn + [0] * (3 - turn),
        "stays": [side] * 3,
    }[how]
    return [[k if i == x else None for i in range(2)] for x in at], k, how


def make_motion(rng, style, steps):
    states, k, how = motion(rng)
    wrong = rng.choice([w for w in ("moves right", "moves left", "stays") if w != how]).item()
    return dict(
        video=clip(states, rng, style),
        answer=f"{k[1]} {how}",
        caption=f"a {name(k)}",
        careful=f"the {k[1]} {how}",
        sloppy=f"the {k[1]} {wrong}",
    )


def make_sequence(rng, style, steps):
    ks = glyphs(rng, 3)
    text = " then ".join(name(k) for k in ks)
    return dict(
        video=clip([[k] for k in ks], rng, style),
        text=text,
        caption=text,
        careful=text,
        sloppy=" then ".join(name(k) for k in glyphs(rng, 3)),
    )


def make_tally(rng, style, steps):
    """One digit more than steps, two at a time."""
    digits = rng.integers(0, 10, steps + 1).tolist()
    states = [[*digits[i : i + 2], None][:2] for i in range(0, len(digits), 2)]
    labels = [f"{t} {side}" for t in TIMES for side in ("left", "right")]
    text, answer = add_up(labels, digits)
    return dict(
        video=clip(states, rng, style),
        answer=answer,
        wrong_answers=[d for d in DIGITS if d != answer],
        caption=describe_clip(states),
        careful=text,
        sloppy=add_up(labels, spoil(digits, rng))[0],
    )


def describe_clip(states):
    """ "first left four right two , second …" for clips of two tiles; one tile has no side."""
    sides = ("left", "right") if len(states[0]) == 2 else ("",) * len(states[0])
    return " , ".join(
        " ".join([t, *(f"{s} {name(k)}".strip() for s, k in zip(sides, row) if k is not None)])
        for t, row in zip(TIMES, states)
    )


def make_topic(rng, style, steps):
    a, b = rng.permutation(WORDS)[:2].tolist()
    d = rng.integers(0, 10, 2).tolist()
    say = number(d)
    return dict(
        page=((a, b), tuple(d)),
        text=f"the page {say} about {a} and {b}",
        caption=f"{a} {b}",
        careful=f"{a} {b} {say}",
        sloppy=f"{a} {rng.choice([w for w in WORDS if w not in (a, b)])} {say}",
    )


def make_total(rng, style, steps):
    """One digit more than steps, each with its label: the page bears the sum of the first half and, going on, of all, as one number."""
    digits = rng.integers(0, 10, steps + 1).tolist()
    half, labels = len(digits) // 2, ITEMS[: steps + 1]

    def work(digits):
        (first, a), later = running_sum(labels[:half], digits[:half]), labels[half:]
        rest, b = running_sum(later, digits[half:], a)
        return f"add {first} . {TENS[a]} . {rest} . {number((a, b))}", (
            a,
            b,
        )  # noted down where it is found: no looking back

    text, sums = work(digits)
    say = account(labels, digits)
    return dict(
        page=((WORDS[0],), sums),
        text=f"the account with {say}",
        caption=say,
        careful=text,  # all have one title: the sums decide
        sloppy=work([*spoil(digits[:half], rng), *digits[half:]])[0],
    )  # a slip at first: both sums end wrong


def account(labels, digits):
    return " , ".join(f"{label} {DIGITS[x]}" for label, x in zip(labels, digits))


# name, maker, needs steps, kind of pair, query instruction, target instruction. Kinds: see LAYOUT below
FAMILIES = [
    ("PocketKind", make_kind, False, "cls", "Represent the given image for classification", ""),
    (
        "PocketColour",
        make_colour,
        False,
        "cls",
        "Identify the colour that most of the image has",
        "",
    ),
    (
        "PocketAt",
        make_at,
        False,
        "vqa",
        "Represent the given image with the following question: ",
        "",
    ),
    (
        "PocketBeside",
        make_beside,
        False,
        "vqa",
        "Represent the given image with the following question: ",
        "",
    ),
    (
        "PocketWalk",
        make_walk,
        True,
        "vqa",
        "Represent the given image with the following question: ",
        "",
    ),
    (
        "PocketSum",
        make_sum,
        True,
        "vqa",
        "Represent the given image with the following question: ",
        "",
    ),
    (
        "PocketCaption_t2i",
        make_caption,
        False,
        "t2i",
        "Find me an everyday image that matches the given caption: ",
        "Represent the given image.",
    ),
    (
        "PocketCaption_i2t",
        make_caption,
        False,
        "i2t",
        "Find an image caption describing the given everyday image.",
        "",
    ),
    (
        "PocketChange",
        make_change,
        False,
        "i2i",
        "Given an image, find a similar everyday image with the described changes: ",
        "Represent the given image.",
    ),
    (
        "PocketPoint",
        make_point,
        False,
        "i2i",
        "Select the portion of the image that follows the language expressions: ",
        "Represent the given cropped image of the object.",
    ),
    (
        "PocketTwin",
        make_twin,
        False,
        "i2i",
        "Find a day-to-day image that looks similar to the provided image.",
        "Represent the given image.",
    ),
    (
        "PocketMotion",
        make_motion,
        False,
        "vcls",
        "What activities are being performed in the video?",
        "",
    ),
    ("PocketTally", make_tally, True, "vcls", "What do all the numbers add up to?", ""),
    (
        "PocketSequence",
        make_sequence,
        False,
        "t2v",
        "Find a video that contains the following visual content: ",
        "Understand the content of the provided video.",
    ),
    (
        "PocketTopic",
        make_topic,
        False,
        "page",
        "Find a document image that matches the given query: ",
        "Understand the content of the provided document image.",
    ),
    (
        "PocketTotal",
        make_total,
        True,
        "page",
        "Find a document image that matches the given query: ",
        "Understand the content of the provided document image.",
    ),
]

# ---------------------------------------------------------------------------------------------------------------------
# Writing the world in MMEB's layouts (data.py reads it with the parsers that read the real thing)

TRAIN_HUB, TEST_HUB, V2 = "TIGER-Lab/MMEB-train", "ziyjiang/MMEB_Test_Instruct", "TIGER-Lab/MMEB-V2"
CLIP_HUB = "ShareGPTVideo/train_video_and_instruction"
PARSERS = {
    "cls": "image_cls",
    "vqa": "image_qa",
    "t2i": "image_t2i",
    "i2t": "image_i2t",
    "i2i": "image_i2i_vg",
}


class Writer:
    """Writes under one root; every picture gets a path of its own."""

    def __init__(self, root):
        self.root = root

    def picture(self, pixels, folder, name):
        """-> path relative to the folder that the layout joins to."""
        path = os.path.join(self.root, folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Image.fromarray(pixels).save(path, compress_level=1)
        return name

    def frames(self, clip, folder):
        for i, f in enumerate(clip):
            self.picture(f, folder, f"frame_{i + 1:04d}.png")

    def table(self, rows, path):
        """A list of dicts -> parquet or, by its name, JSON lines."""
        path = os.path.join(self.root, path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if path.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            with open(path, "w", encoding="utf-8") as f:
                f.writelines(json.dumps(r) + "\n" for r in rows)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}


def write_train(out, family, rows, rng, style):
    """One family's training pairs -> its row of datasets.json."""
    name, _, _, kind, inst, tgt = family
    if kind == "vcls" or kind == "t2v":
        for i, r in enumerate(rows):
            out.frames(r["video"], f"{CLIP_HUB}/train_300k/{name}_{i}")
        turn = lambda r: [
            {"from": "human", "value": f"<video> {inst}"},
            {"from": "gpt", "value": r.get("answer") or r["text"]},
        ]
        out.table(
            [
                {"id": f"{name}_{i}", "video": f"{name}_{i}", "conversations": turn(r)}
                for i, r in enumerate(rows)
            ],
            f"{CLIP_HUB}/{name}.jsonl",
        )
        return dict(
            name=name,
            parser="video_caption" if kind == "vcls" else "video_retrieval",
            hub=CLIP_HUB,
            table=["{hub}/{name}.jsonl"],
            media=[f"{CLIP_HUB}/train_300k"],
        )
    if kind == "page":
        hub, show = (
            f"pocket/{name}-train",
            lambda p: print_lines(draw(page_grid(*p), rng, style), rng),
        )
        out.table(
            [
                {"query": f"{inst}{r['text']}", "image": png(show(r["page"])), "source": "pocket"}
                for r in rows
            ],
            f"{hub}/data/train-00000-of-00001.parquet",
        )
        return dict(name=name, parser="page", hub=hub, table=["{hub}/data/train-*.parquet"])
    table = []
    for i, r in enumerate(rows):
        path = (
            ""
            if kind == "t2i"
            else out.picture(r["image"], TRAIN_HUB, f"images/{name}/Train/query_{i}.png")
        )
        say = (
            f"{inst}{r.get('question') or r.get('text') or ''}"
            if kind in ("vqa", "t2i", "i2i")
            else inst
        )
        row = dict(qry=("" if kind == "t2i" else "<|image_1|>\n") + say + "\n", qry_image_path=path)
        if kind in ("t2i", "i2i"):
            pixels = r["image"] if kind == "t2i" else r["target_image"]
            row.update(
                pos_text=f"<|image_1|>\n{tgt}\n",
                pos_image_path=out.picture(
                    pixels, TRAIN_HUB, f"images/{name}/Train/target_{i}.png"
                ),
            )
            wrong = [
                out.picture(p, TRAIN_HUB, f"images/{name}/Train/wrong_{i}_{n}.png")
                for n, p in enumerate(r.get("wrong", [])[:3])
            ]
            row.update(neg_text=[row["pos_text"]] * len(wrong), neg_image_path=wrong)
        else:
            wrong = r.get("wrong_answers", [])
            row.update(
                pos_text=r["text"] if kind == "i2t" else r["answer"],
                pos_image_path="",
                neg_text=wrong,
                neg_image_path=[""] * len(wrong),
            )
        table.append(row)
    out.table(table, f"{TRAIN_HUB}/{name}/original-00000-of-00001.parquet")
    return dict(
        name=name,
        parser="mmeb",
        hub=TRAIN_HUB,
        table=["{hub}/{name}/{split}-*.parquet"],
        media=[TRAIN_HUB],
    )


def choices(right, pool, rng, size=20, hard=()):
    """The right one first (MMEB's way), then the hard ones and up to size candidates in all, every one different."""
    hard = [x for x in dict.fromkeys(hard) if x != right]
    rest = [x for x in dict.fromkeys(pool) if x != right and x not in hard]
    return [right, *hard, *[rest[i] for i in rng.permutation(len(rest))[: size - 1 - len(hard)]]]


def write_test(out, family, rows, rng, style):
    """One family's test queries and candidates -> its row of datasets.json."""
    name, _, steps, kind, inst, tgt = family
    row = dict(name=name, queries=len(rows), family="steps" if steps else "one look", ood=False)
    if kind in ("vcls", "t2v"):
        hub, media = (
            f"VLM2Vec/{name}",
            f"{V2}/video-tasks/frames/{'video_cls' if kind == 'vcls' else 'video_ret'}/{name}",
        )
        for i, r in enumerate(rows):
            out.frames(r["video"], f"{media}/clip_{i}")
        answers = [r.get("answer") or r["text"] for r in rows]
        more = [
            dict(pos_text=a, neg_text=choices(a, answers, rng, hard=r.get("wrong_answers", [])))
            if kind == "vcls"
            else dict(caption=a)
            for a, r in zip(answers, rows)
        ]
        out.table(
            [dict(video_id=f"clip_{i}", **m) for i, m in enumerate(more)],
            f"{hub}/data/test-00000-of-00001.parquet",
        )
        return dict(
            row,
            parser="video_cls" if kind == "vcls" else "video_ret",
            hub=hub,
            modality="video",
            media=[media],
            inst=inst.strip(),
            tgt=tgt,
            **(dict(scope="local") if kind == "vcls" else dict(columns=["video_id", "caption"])),
        )
    if kind == "page":
        hub = f"pocket/{name}-test"
        pages = {
            p: i for i, p in enumerate(dict.fromkeys(r["page"] for r in rows))
        }  # every page once
        for part, table in (
            ("queries", [{"query-id": i, "query": r["text"]} for i, r in enumerate(rows)]),
            (
                "corpus",
                [
                    {
                        "corpus-id": i,
                        "image": png(print_lines(draw(page_grid(*p), rng, style), rng)),
                    }
                    for p, i in pages.items()
                ],
            ),
            (
                "qrels",
                [
                    {"query-id": i, "corpus-id": pages[r["page"]], "score": 1}
                    for i, r in enumerate(rows)
                ],
            ),
        ):
            out.table(table, f"{hub}/{part}/test-00000-of-00001.parquet")
        return dict(row, parser="beir", hub=hub, modality="visdoc", inst=inst.strip(), tgt=tgt)
    folder = f"{V2}/image-tasks"
    save = lambda pixels, tag: out.picture(pixels, folder, f"{name}/{tag}.png")
    answers = [r["text"] if kind == "i2t" else r.get("answer") for r in rows]
    targets = [
        save(r["image"] if kind == "t2i" else r["target_image"], f"target_{i}")
        if kind in ("t2i", "i2i")
        else ""
        for i, r in enumerate(rows)
    ]
    table = []
    for i, r in enumerate(rows):
        if kind in ("t2i", "i2i"):
            wrong = [save(p, f"wrong_{i}_{n}") for n, p in enumerate(r.get("wrong", []))]
            paths = [targets[i], *wrong, *choices(targets[i], targets, rng, 20 - len(wrong))[1:]]
            texts = [""] * len(paths)
        else:
            texts = choices(answers[i], answers, rng, hard=r.get("wrong_answers", []))
            paths = [""] * len(texts)
        table.append(
            dict(
                qry_inst=("" if kind == "t2i" else "<|image_1|>\n") + inst.strip(),
                qry_text=r.get("question") or (r.get("text") if kind != "i2t" else "") or "",
                qry_img_path="" if kind == "t2i" else save(r["image"], f"query_{i}"),
                tgt_inst=f"<|image_1|>\n{tgt}" if tgt else "",
                tgt_text=texts,
                tgt_img_path=paths,
            )
        )
    out.table(table, f"{TEST_HUB}/{name}/test-00000-of-00001.parquet")
    return dict(
        row,
        parser=PARSERS[kind],
        hub=TEST_HUB,
        table=["{hub}/{name}/test-*.parquet"],
        modality="image",
        scope="local",
        media=[folder],
    )


def write_world(root, seed=0, train=300, test=100, style="plain", steps=3, names=None):
    """The whole world under `root`: both splits, datasets.json, pocket.json (the truth) and proposers.jsonl (scripted rationales).

    Train and test share no query. steps: moves of a Walk (harder worlds have more). names: only these families.
    """
    out, listing, proposers = Writer(root), {"train": [], "eval": []}, []
    for n, family in enumerate(FAMILIES):
        name, make = family[:2]
        if names and name not in names:
            continue
        rng, seen, rows = np.random.default_rng([seed, n]), set(), []
        while len(rows) < train + test:
            row = make(rng, style, steps)
            key = (
                row.get("question"),
                row.get("text") if family[3] != "i2t" else None,
                *(p.tobytes() for p in [row.get("image"), *row.get("video", [])] if p is not None),
            )
            if key not in seen:
                seen.add(key)
                rows.append(row)
        listing["train"].append(write_train(out, family, rows[:train], rng, style))
        listing["eval"].append(write_test(out, family, rows[train:], rng, style))
        for i, r in enumerate(rows[:train]):
            for proposer, text in dict(
                careful=r["careful"],
                captioner=r["caption"],
                sloppy=r["sloppy"],
                parrot=rng.choice(PARROT).item(),
            ).items():
                proposers.append(
                    dict(id=f"{name}/{i}", side="query", proposer=proposer, text=text or "nothing")
                )
    out.table(proposers, "proposers.jsonl")
    for file, value in (
        ("pocket.json", dict(seed=seed, style=style, steps=[f[0] for f in FAMILIES if f[2]])),
        ("datasets.json", listing),
    ):
        with open(os.path.join(root, file), "w", encoding="utf-8") as f:
            json.dump(value, f, indent=1)


# ---------------------------------------------------------------------------------------------------------------------
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
NOT_SPECIAL = "<tool_call> </tool_call> <tool_response> </tool_response> <think> </think>".split()


def train_tokenizer(texts):
    """A byte-level BPE with Qwen's pattern and added tokens, merged until every word of the texts is
    one token -> its tokenizer.json as a dict."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=10**6,  # never reached: merging stops when nothing is left to merge
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, "\n\n"], trainer)
    for token in SPECIALS:
        added = tokenizers.AddedToken(token, special=token not in NOT_SPECIAL, normalized=False)
        tokenizer.add_tokens([added])
    return json.loads(tokenizer.to_str())


def new_model(seed, device="cpu"):
    """A pocket-sized Qwen3-VL of random weights, and the Processor of its items."""
    tokenizer = Tokenizer(train_tokenizer(vocabulary_texts()))
    special = tokenizer.special
    config = dataclasses.replace(
        CONFIGS["pocket"],
        vocab=tokenizer.size,
        image_token=special["<|image_pad|>"],
        video_token=special["<|video_pad|>"],
        vision_start=special["<|vision_start|>"],
        vision_end=special["<|vision_end|>"],
    )
    torch.manual_seed(seed)
    model = Qwen3VL(config).init_weights().to(device)
    limits = MIN_PIXELS, MAX_PIXELS
    return model, Processor(tokenizer, config, *limits, *limits, max_frames=8)


def vocabulary_texts(seed=0):
    """Every sentence form of the world, so that the tokenizer meets every word: pairs of each family, and pretraining documents."""
    rng = np.random.default_rng([seed, 7])
    out = (
        [t for f in FAMILIES for t in f[4:6]]
        + list(PARROT)
        + [
            s + w
            for w in (
                *CELLS,
                *MOVES,
                *ROWS,
                *TIMES,
                *NUMBERS,
                *TENS,
                *WORDS,
                *ITEMS,
                *COLOURS,
                *SHAPES,
            )
            for s in ("", " ")
        ]
    )
    for _, make, *_ in FAMILIES:
        for _ in range(8):
            row = make(rng, "plain", 3)
            out += [v for v in row.values() if isinstance(v, str)]
    bank = Bank(rng, copies=1)
    docs = [doc for _ in range(50) for doc in (base_document(bank, rng), text_document(rng))]
    return (
        out
        + ["describe", "blank"]
        + ["".join(t for t, _ in parts) for _, parts in docs]
        + [item.get("text", "") for item, _ in docs]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Pretraining documents for the base stage: "describe what you see", and the look-ups that steps are made of


class Bank:
    """Tiles drawn once with Pillow and recomposed by indexing: a picture costs a copy instead of nine drawings."""

    def __init__(self, rng, copies=40, style="plain"):
        rgb = [tuple(int(v) for v in c) for c in rng.integers(40, 230, (6, 3))]
        self.kinds = [*KINDS, *range(10), None, *WORDS, *rgb]
        self.tiles = {
            k: np.stack([draw_tile(k, rng, style) for _ in range(copies)]) for k in self.kinds
        }

    def draw(self, grid, rng):
        """rows of kinds -> uint8 picture."""
        one = lambda k: self.tiles[k][rng.integers(len(self.tiles[k]))]
        return np.concatenate(
            [np.concatenate([one(k) for k in row], axis=1) for row in grid], axis=0
        )


def base_document(bank, rng, look=0.35):
    """One document about something seen: (item, [(text, learn)]); the model is trained on the texts with learn=True, the others only ask.

    Pictures are described, or asked about: the user's question is answered at once, or after a <think> block of look-ups, as a thinking
    model would; or a change is asked for, and the picture described as it then would be. Clips (what is in them, or what happens), pages
    and crops likewise. item["answer"]: what <|endoftext|> is to sum up. look: the share of pictures that are described rather than asked about.
    """
    u = rng.random()
    if u < 0.06:
        scene, i, new = few(rng, 3), int(rng.integers(9)), glyphs(rng, 1)[0]
        item = {
            "image": bank.draw([scene[0:3], scene[3:6], scene[6:9]], rng),
            "text": f"put a {name(new)} at {CELLS[i]}",
        }
        return said(item, describe([new if n == i else k for n, k in enumerate(scene)]))
    if u < 0.58:
        kinds = (
            glyphs(rng, 9)
            if rng.random() < 0.6
            else [
                KINDS[rng.integers(len(KINDS))]
                if v < 0.4
                else int(rng.integers(10))
                if v < 0.8
                else None
                for v in rng.random(9)
            ]
        )
        asked = rng.random() > look
        if (
            asked and rng.random() < 0.6
        ):  # few things are easier to find than nine: the road to finding one of nine
            shown = rng.permutation(9)[: rng.integers(1, 6)]
            kinds = [k if i in shown else None for i, k in enumerate(kinds)]
        item = {"image": bank.draw([kinds[0:3], kinds[3:6], kinds[6:9]], rng)}
        found = facts(kinds, rng) if asked else []
        if found:
            return dict(item, text=found[-1][0], answer=found[-1][3]), answered(found, rng)
        return said(item, describe(kinds) or "blank")
    if u < 0.61:
        states, k, how = motion(rng)
        return said(
            {
                "video": [f for s in states for f in [bank.draw([s], rng)] * 2],
                "text": "what happens ?",
            },
            f"{k[1]} {how}",
        )
    if u < 0.80:
        two = rng.random() < 0.7
        states = [
            [
                int(rng.integers(10))
                if v < 0.6
                else KINDS[rng.integers(len(KINDS))]
                if v < 0.85
                else None
                for v in rng.random(1 + two)
            ]
            for _ in range(int(rng.integers(2, 4)))
        ]
        item = {"video": [f for s in states for f in [bank.draw([s], rng)] * 2]}
        ask = rng.permutation(
            [
                (t, side)
                for t, row in enumerate(states)
                for side, k in enumerate(row)
                if k is not None
            ]
        ).tolist()
        if rng.random() < 0.5 or not ask:
            return said(item, describe_clip(states))
        say = lambda t, side: f"{('left', 'right')[side]} {TIMES[t]}" if two else TIMES[t]
        found = [
            (
                f"what is {say(t, side)} ?",
                say(t, side),
                name(states[t][side]),
                name(states[t][side]),
            )
            for t, side in ask
        ]
        return dict(item, text=found[-1][0], answer=found[-1][3]), answered(found, rng)
    if u < 0.96:
        words, marks = (
            rng.permutation(WORDS)[: 1 + int(rng.random() < 0.5)].tolist(),
            rng.integers(0, 10, 2).tolist(),
        )
        return said(
            {"image": print_lines(bank.draw(page_grid(words, marks), rng), rng)},
            " ".join([*words, number(marks)]),
        )
    k = bank.kinds[rng.integers(60)]
    return said({"image": bank.draw([[k]], rng)}, name(k))


def said(item, text):
    """A document that says one thing, and whose summary that is."""
    return dict(item, answer=text), [(text, True)]


def answered(found, rng):
    """facts (question, asked, told, answer), of which the user asked the last -> fragments of the assistant's turn."""
    steps = [
        part
        for i, (_, asked, told, _) in enumerate(found)
        for part in ((f"{' . ' if i else ''}{asked}", False), (f" {told}", True))
    ]
    if rng.random() < 0.5:
        return [
            ("<think>", False),
            ("\n", False),
            *steps,
            ("\n", True),
            ("</think>", True),
            ("\n\n", True),
            ("<|endoftext|>", False),
            (found[-1][3], True),
        ]
    return [
        (found[-1][3], True),
        *([(" . " + steps[0][0], False), *steps[1:-2]] if len(found) > 1 else []),
    ]


def text_document(rng):
    """One document without a picture: the addition table modulo ten, an account to look things up in, or a phrase to be repeated."""
    u = rng.random()
    if u < 0.3:
        digits = rng.integers(0, 10, rng.integers(2, 7)).tolist()
        ask = rng.integers(0, len(digits), 6).tolist()
        return {"text": account(ITEMS, digits)}, [
            part
            for i in ask
            for part in ((f" . {ITEMS[i]}", False), (f" {DIGITS[digits[i]]}", True))
        ]
    if u < 0.45:
        out = []
        for a, b in rng.integers(0, 10, (12, 2)).tolist():
            out += [(f" . {DIGITS[a]} {DIGITS[b]}", False), (f" {makes(a + b)}", True)]
        return {"text": "add"}, out
    kinds = glyphs(rng, 3)
    marks = rng.integers(0, 10, 8).tolist()
    digits = [DIGITS[x] for x in marks]
    phrase = [
        name(kinds[0]),
        digits[0],
        describe(few(rng, 3), " , "),
        " then ".join(map(name, kinds)),
        f"{kinds[0][1]} {rng.choice(['moves right', 'moves left', 'stays'])}",
        rng.choice(CELLS).item(),
        " ".join([*rng.permutation(WORDS)[: rng.integers(3)], number(marks[1:3])]),
    ][rng.integers(7)]
    if rng.random() < 0.5:
        return said({"text": phrase}, phrase)
    before = [
        name(kinds[1]),
        " . ".join(digits[3:]),
        f"{digits[3]} . {digits[4]} {makes(int(rng.integers(19)))}",
    ][rng.integers(3)]  # what the end is not
    return {"text": "repeat the end", "answer": phrase}, [
        ("<think>", False),
        ("\n", False),
        (f"{before} . {phrase}", False),
        ("\n", True),
        ("</think>", True),
        ("\n\n", True),
        ("<|endoftext|>", False),
        (phrase, True),
    ]


def skill_of(item, parts, i):
    """Which skill the i-th fragment of a document shows."""
    if "video" in item:
        return "motion" if item.get("text") == "what happens ?" else "clip"
    if "image" not in item:
        return "table" if item["text"] == "add" else "account" if "answer" not in item else "repeat"
    if item["image"].shape[:2] != (96, 96):
        return "page" if item["image"].shape[0] == 128 else "crop"
    if "text" not in item or item["text"].startswith("put "):
        return "change" if "text" in item else "describe"
    if parts[i][0] in ("\n", "</think>", "\n\n"):
        return "form"
    if i == 0 or parts[i - 1][0] == "<|endoftext|>":
        return "answer"
    last = parts[i - 1][0].split()[-1]
    return "move" if last in MOVES else "at"


def facts(scene, rng, n=8):
    """Look-ups about a picture: [(question, asked, told, answer)], "asked told" being the statement, "answer" the reply to the question."""
    out = []
    seen = [i for i, k in enumerate(scene) if k is not None]
    for i in rng.choice(seen, n).tolist() if seen else []:
        if rng.random() < 0.4:
            ask = f"what is at {CELLS[i]} ?" if rng.random() < 0.6 else f"the thing at {CELLS[i]}"
            out.append((ask, CELLS[i], name(scene[i]), name(scene[i])))
        else:
            m = rng.choice(list(MOVES)).item()
            r, c = i // 3 + MOVES[m][0], i % 3 + MOVES[m][1]
            if 0 <= r < 3 and 0 <= c < 3 and scene[3 * r + c] is not None:
                j = 3 * r + c
                out.append(
                    (
                        f"what is {m} of {CELLS[i]} ?",
                        f"{CELLS[i]} {name(scene[i])} . {m}",
                        f"{CELLS[j]} {name(scene[j])}",
                        name(scene[j]),
                    )
                )
    return out


# ---------------------------------------------------------------------------------------------------------------------
# The base stage's update: next-token prediction on documents, and a summary at <|endoftext|>

DOCUMENTS = 32  # about something seen, and half as many of text alone
TEXT_WEIGHT = 0.3  # of the text documents' loss
SUMMARY_WEIGHT = 0.5  # of "<|endoftext|> sums up the answer"

# What steps of reasoning are made of; and "answer", one look-up without steps, which the evaluators
# of select would else take for reasoning's merit. The other skills come on the way.
STEP_SKILLS = ("at", "move", "clip", "table", "account", "answer")


def read_document(processor, item, parts):
    """A document (item, [(text, learn)]) -> {"prompt", "branch" ids, "learn" bool per id, "ends"
    places in the branch of its <|endoftext|>s (-1: the direct one), "words" that these sum up}.

    A document is a branch of its prompt, after the direct <|endoftext|>; it ends in <|im_end|>.
    """
    pieces = [(piece_ids(processor, text), learn) for text, learn in parts]
    pieces.append(([processor.im_end_id], True))
    branch = [i for ids, _ in pieces for i in ids]
    learn = [yes for ids, yes in pieces for _ in ids]
    words, ends = [], []
    if "answer" in item:
        encode = processor.tokenizer.encode
        words = sorted(set(encode(item["answer"])) | set(encode(" " + item["answer"])[:1]))
        ends = [-1] + [i for i, token in enumerate(branch) if token == processor.eos_id]
    query = {"text": item.get("text", "describe")}
    if "image" in item:
        query["image"] = Image.fromarray(item["image"])
    if "video" in item:
        query["video"] = [Image.fromarray(frame) for frame in item["video"]]
    return {
        "prompt": processor(query),
        "branch": branch,
        "learn": learn,
        "ends": ends,
        "words": words,
    }


def piece_ids(processor, text):
    """A fragment's ids; the think markers are the added tokens."""
    if text in ("<think>", "</think>", "<|endoftext|>"):
        return [processor.tokenizer.special[text]]
    return processor.tokenizer.encode(text)


def pretrain_step(model, processor, bank, rng, look, chunk_tokens):
    """Gradients of one update -> metrics. look: the share of images that are described rather than
    asked about.

    Documents about something seen and documents of text alone are two kinds: the loss is a mean over
    the tokens of each, and over the summaries of each.
    """
    model.train()
    documents = [base_document(bank, rng, look) for _ in range(DOCUMENTS)]
    documents += [text_document(rng) for _ in range(DOCUMENTS // 2)]
    documents = [read_document(processor, *d) for d in documents]
    kind = torch.tensor([int(i >= DOCUMENTS) for i in range(len(documents))])
    tokens = per_kind(kind, torch.tensor([sum(d["learn"]) for d in documents]))
    summaries = per_kind(kind, torch.tensor([len(d["ends"]) for d in documents])).clamp(min=1)
    share = (torch.tensor([1.0, TEXT_WEIGHT]) / tokens)[kind]
    share_summary = (SUMMARY_WEIGHT / summaries)[kind]
    sums = torch.zeros(3, len(documents))  # of each document: loss, summary loss, right tokens
    lengths = [len(d["prompt"]["ids"]) + 1 + len(d["branch"]) for d in documents]
    for rows in scale.chunks_of(lengths, chunk_tokens):
        part = document_losses(model, processor, [documents[i] for i in rows])
        loss = (part[0] * share[rows].to(part.device)).sum()
        loss = loss + (part[1] * share_summary[rows].to(part.device)).sum()
        (loss / scale.world_size()).backward()  # gradients of all processes are added up
        sums[:, rows] = part.detach().cpu()
    loss, text_loss = (per_kind(kind, sums[0]) / tokens).tolist()
    summary, text_summary = (per_kind(kind, sums[1]) / summaries).tolist()
    accuracy, text_accuracy = (per_kind(kind, sums[2]) / tokens).tolist()
    return {
        "loss": loss + TEXT_WEIGHT * text_loss + SUMMARY_WEIGHT * (summary + text_summary),
        "summary": summary,
        "text_summary": text_summary,
        "accuracy": accuracy,
        "text_accuracy": text_accuracy,
    }


def per_kind(kind, x):
    """Sums of x (n,) over each of the two kinds -> (2,)."""
    return torch.zeros(2, dtype=x.dtype).index_add(0, kind, x)


def document_losses(model, processor, documents):
    """Read documents [n] -> (3, n): sums over each document's tokens of the next-token loss, over its
    <|endoftext|>s of the summary loss, and the number of tokens that were right.

    The summary loss asks the state at <|endoftext|> for all words of the answer at once. The last
    token of a base model would else know only how the answer begins, and contrastive learning, which
    pools that token, would have to teach it the rest.
    """
    n, device = len(documents), model.device
    prompts = [d["prompt"] for d in documents]
    batch = collate(prompts, processor, [[d["branch"]] for d in documents], device)
    h = model(batch)
    begin = [len(p["ids"]) + 1 for p in prompts]  # of each branch
    learnt = [
        (i, begin[i] + j)
        for i, d in enumerate(documents)
        for j, yes in enumerate(d["learn"])
        if yes
    ]
    row, column = torch.tensor(learnt, device=device).T
    logits = model.logits(h[row, batch["previous"][row, column]])
    wanted = batch["ids"][row, column]
    zeros = h.new_zeros(n)
    next_token = F.cross_entropy(logits, wanted, reduction="none")
    loss = zeros.index_add(0, row, next_token.to(h.dtype))
    right = zeros.index_add(0, row, (logits.argmax(-1) == wanted).to(h.dtype))
    summary = zeros
    ends = [(i, begin[i] + j) for i, d in enumerate(documents) for j in d["ends"]]
    if ends:
        share = torch.zeros(len(ends), model.c.vocab, device=device)
        for k, (i, _) in enumerate(ends):  # each of an answer's words counts alike
            share[k, documents[i]["words"]] = 1 / len(documents[i]["words"])
        row, column = torch.tensor(ends, device=device).T
        logp = model.logits(h[row, column]).log_softmax(-1)
        summary = zeros.index_add(0, row, -(logp * share).sum(-1).to(h.dtype))
    return torch.stack([loss, summary, right])


@torch.no_grad()
def measure_skills(model, processor, bank, rng, n=48):
    """Held-out token accuracy of each skill: {"describe", "at", "move", "answer", "clip", ...}."""
    model.eval()
    documents = [base_document(bank, rng, look) for look in (1.0, 0.0) for _ in range(n)]
    documents += [text_document(rng) for _ in range(n)]
    scores = {}
    for at in range(0, len(documents), 32):
        part = documents[at : at + 32]
        read = [read_document(processor, *d) for d in part]
        branches = [[d["branch"]] for d in read]
        batch = collate([d["prompt"] for d in read], processor, branches, model.device)
        h = model(batch)
        for b, (item, parts) in enumerate(part):
            i = int(batch["ends"][b, 0]) + 1
            for k, (text, learn) in enumerate(parts):
                j = i + len(piece_ids(processor, text))
                if learn:
                    logits = model.logits(h[b, batch["previous"][b, i:j]])
                    right = (logits.argmax(-1) == batch["ids"][b, i:j]).float().mean().item()
                    scores.setdefault(skill_of(item, parts, k), []).append(right)
                i = j
    return {skill: float(np.mean(values)) for skill, values in sorted(scores.items())}


def misread(rows, rate, seed, tries=1):
    """Scripted rationales (rows of proposers.jsonl) if careful erred, and wrote so many for each pair (careful-0, careful-1 ...) -> new rows. Each statement
    is wrong with chance `rate`; when one is, the whole rationale is what sloppy wrote, the same at every try. Of n statements all are right with
    chance (1 - rate)^n: the longer, the less."""
    rng, sloppy = (
        np.random.default_rng([seed, 13]),
        {r["id"]: r["text"] for r in rows if r["proposer"] == "sloppy"},
    )
    right = lambda text: rng.random() < (1 - rate) ** len(re.split(r" [.,] | then ", text))
    once = lambda r, proposer: dict(
        r, proposer=proposer, text=r["text"] if right(r["text"]) else sloppy[r["id"]]
    )
    names = ["careful"] if tries < 2 else [f"careful-{k}" for k in range(tries)]
    return [
        new
        for r in rows
        for new in ([once(r, name) for name in names] if r["proposer"] == "careful" else [r])
    ]


def main():
    ap = argparse.ArgumentParser(
        description="Write the pocket world: a root that data.py --check, train.py --data and eval.py --data open."
    )
    ap.add_argument("--out", required=True)
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--train", type=int, default=300, help="training pairs per family")
    ap.add_argument("--test", type=int, default=100, help="test queries per family")
    ap.add_argument("--style", choices=("plain", "night"), default="plain")
    ap.add_argument("--steps", type=int, default=3, help="moves of a Walk")
    a = ap.parse_args()
    if a.train < 1 or a.test < 2 or not 1 <= a.steps <= 5:
        ap.error("--train wants at least 1, --test at least 2, --steps 1 to 5")
    if os.path.exists(os.path.join(a.out, "datasets.json")):
        ap.error(f"{a.out} already holds a world")
    os.makedirs(a.out, exist_ok=True)
    write_world(a.out, a.seed, a.train, a.test, a.style, a.steps)
    print(
        f"families: {len(FAMILIES)}\ntrain_pairs: {a.train * len(FAMILIES)}\ntest_queries: {a.test * len(FAMILIES)}\nwritten: {a.out}"
    )


if __name__ == "__main__":
    main()
