r"""An item becomes tokens and patches: everything that happens before the network runs.

The idea. An item is any mix of instruction, text, images and video frames. It is written as a chat
in Qwen3-VL's format. These lines are broken for the reader; only \n is a line break:

    <|im_start|>system\nRepresent the user's input.<|im_end|>\n                     if instructed
    <|im_start|>user\n<|vision_start|><|image_pad|>...<|vision_end|>What is this?<|im_end|>\n
    <|im_start|>assistant\n

embed.py shows the two ways in which the model goes on.

The arithmetic. A patch is 16 x 16 pixels of two frames; an image counts as two equal ones. 2 x 2
patches make one visual token. So an image of h x w pixels costs h * w / 1024 tokens. Its sides are
multiples of 32, its area is within limits: 750 x 1000 pixels are read as 736 x 992, 713 tokens.

    Tokenizer   text -> ids
    Processor   item -> prompt: ids, patches and their grids; the files of a checkpoint folder
    collate     prompts and their rationales -> the batch of model.Qwen3VL

    processor = Processor.from_folder(folder, model.c)
    prompts = [processor({"image": "cat.jpg", "text": "What is this?"}), processor("a cat")]
    states = model(collate(prompts, processor))

How to run: nothing runs here. `python embed.py --input items.jsonl ...` turns items into vectors.
Left out: audio, video files (a video is a list of frames), images from the web; that qwen-vl-utils
first resizes the frames of a list to sides of multiples of 64: its grids differ from ours a little.
Sources (facts; every line is ours): template, limits and order of parts are those of
Qwen3-VL-Embedding's wrapper (2601.04720), frame limits those of qwen-vl-utils 0.0.14, time stamps
those of transformers 4.57. Byte-level BPE: Sennrich et al. 2016 (1508.07909), GPT-2.
"""

import base64
import hashlib
import itertools
import json
import math
import numbers
import os
import unicodedata
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers
import torch
from PIL import Image

from data import is_text, listed, load_image, short
from model import FACTOR, MERGE, PATCH, TEMPORAL, read_json, rope_positions, write_json

# --------------------------------------------------------------------------------------------------
# Text -> ids


def byte_letters():
    """{letter: byte}: the printable letters that stand for bytes in a byte-level tokenizer.json.

    GPT-2's choice: a printable Latin-1 character stands for itself; the others, in order, are
    the letters from U+0100 on. So a space is spelled "Ġ" and a newline "Ċ".
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + i): byte for i, byte in enumerate(rest)}


MARKERS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
}


class Tokenizer:
    """Text -> ids. Markers such as <|im_end|> inside a text are spelled out, never special.

    spec     the parsed tokenizer.json
    special  {content: id} of its added tokens
    markers  {field of model.Config: id} of those around and in the place of an image
    size     number of ids
    """

    def __init__(self, spec):
        # Another normalizer or splitter would give other ids, and nobody would know.
        steps = spec["pre_tokenizer"].get("pretokenizers", [])
        patterns = [step["pattern"]["Regex"] for step in steps if step["type"] == "Split"]
        if spec["normalizer"] != {"type": "NFC"} or len(patterns) != 1:
            raise ValueError("expected the normalizer NFC and one pattern that splits text")
        # A merge is "a b" or ["a", "b"]; no letter is a blank.
        merged = ["".join(merge).replace(" ", "") for merge in spec["model"]["merges"]]
        vocab = spec["model"]["vocab"]
        letters = byte_letters()
        # tiktoken merges what has the lowest id first: ids have to rise with the merges.
        ranks = {}
        for token in [*letters, *merged]:
            ranks[bytes(letters[ch] for ch in token)] = vocab[token]
        self.spec = spec
        self.special = {token["content"]: token["id"] for token in spec["added_tokens"]}
        self.markers = {field: self.special.get(name) for field, name in MARKERS.items()}
        self.bpe = tiktoken.Encoding(
            "qwen3-vl", pat_str=patterns[0], mergeable_ranks=ranks, special_tokens=self.special
        )
        self.size = self.bpe.n_vocab
        self.nfc = tokenizers.normalizers.NFC()

    def encode(self, text):
        """Text -> list of ids. NFC first, as for Qwen."""
        return self.bpe.encode_ordinary(self.nfc.normalize_str(text))

    def decode(self, ids):
        return self.bpe.decode(list(ids))


def append_eos(spec):
    """A copy of a tokenizer.json that appends <|endoftext|> by itself.

    sentence-transformers and vLLM pool the last token that the tokenizer returns. Qwen3-Embedding's
    file does the same.
    """
    library = tokenizers.Tokenizer.from_str(json.dumps(spec))
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <|endoftext|>",
        pair="$A $B <|endoftext|>",
        special_tokens=[("<|endoftext|>", library.token_to_id("<|endoftext|>"))],
    )
    return json.loads(library.to_str())


# --------------------------------------------------------------------------------------------------
# Images -> patches


def smart_resize(height, width, min_pixels, max_pixels):
    """The (height, width) in which Qwen looks at an image: multiples of 32, the area within limits.

    With limits of 4,096 and 1,843,200: (750, 1000) -> (736, 992); (3000, 4000) -> (1152, 1536).
    Sides are rounded. If the area is then outside, both are scaled by one factor and rounded down
    or up instead. Python's round goes to the even number at a tie, as in the original.
    """
    h = max(1, round(height / FACTOR))  # h and w count visual tokens
    w = max(1, round(width / FACTOR))
    if h * w * FACTOR**2 > max_pixels:
        pixels_per_token = math.sqrt(height * width / max_pixels) * FACTOR  # along a side
        h = max(1, math.floor(height / pixels_per_token))
        w = max(1, math.floor(width / pixels_per_token))
    elif h * w * FACTOR**2 < min_pixels:
        tokens_per_pixel = math.sqrt(min_pixels / (height * width)) / FACTOR
        h = math.ceil(height * tokens_per_pixel)
        w = math.ceil(width * tokens_per_pixel)
    return h * FACTOR, w * FACTOR


def patchify(frames):
    """frames (F, height, width, 3) uint8 -> patches (N, 1536) uint8 and their grid (h, w).

    F = 1 is an image, an even F a video. Order of patches: frame group, blocks of 2 x 2 in raster
    order, the four patches of a block: what becomes one visual token stands together. Inside a
    patch: channel, frame, row, column.
    """
    depth = min(len(frames), TEMPORAL)  # frames of a group
    t = len(frames) // depth  # groups
    h = frames.shape[1] // PATCH  # patches
    w = frames.shape[2] // PATCH
    x = frames.reshape(t, depth, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH, 3)
    x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)  # (t, h/2, w/2, 2, 2, channel, frame, row, column)
    x = np.broadcast_to(x, (*x.shape[:6], TEMPORAL, PATCH, PATCH))  # a single frame becomes two
    return x.reshape(t * h * w, -1), (h, w)


def read_pixels(images, min_pixels, max_pixels):
    """PIL images -> patches and their grid. All are shown in the first one's size."""
    height, width = smart_resize(images[0].height, images[0].width, min_pixels, max_pixels)
    frames = [image.resize((width, height), Image.Resampling.BICUBIC) for image in images]
    return patchify(np.stack(frames))


def normalize_pixels(patches, device="cpu"):
    """uint8 numpy -> fp32 tensor in -1 ... 1. Bytes travel to the device, floats are made there."""
    return torch.from_numpy(patches).to(device).float().mul_(2 / 255).sub_(1)


# --------------------------------------------------------------------------------------------------
# Items -> prompts

CLIP_PIXELS = 10 * 768 * 32 * 32  # of a whole video, counted once per group of two frames
DEFAULT_INSTRUCTION = "Represent the user's input."  # what Qwen3VLEmbedder writes without one
PIXEL_LIMITS = ("min_pixels", "max_pixels", "frame_min_pixels", "frame_max_pixels")
ITEM_KEYS = ("text", "image", "video", "fps", "instruction", "messages")
# Where a part of a message may hold an image; the last three are transformers'.
IMAGE_KEYS = ("image", "image_url", "url", "path", "base64")
PART_KEYS = ("type", "text", "video", "fps", *IMAGE_KEYS)


class UserText(str):
    """Text that is not the template's, instructions included: what `max_length` may cut."""


@dataclass(eq=False)
class Processor:
    """Turns items into prompts. What cannot be read is an error; Embedder makes it a ValueError.

    The fields are settings; beside them it knows the ids of the chat format:
        eos_id (<|endoftext|>, where vectors are; the tokenizer's eos_token is <|im_end|>, a turn's
        end), im_start_id, im_end_id, think_id, think_end_id
        generation: arguments of model.generate for a rationale
    """

    tokenizer: Tokenizer
    config: object  # model.Config: its image markers must be the tokenizer's
    min_pixels: int = 4 * 32 * 32  # area of an image; these two do not hold for a video's frames
    max_pixels: int = 1800 * 32 * 32
    frame_min_pixels: int = 128 * 32 * 32  # area of a frame; see frame_limits
    frame_max_pixels: int = 768 * 32 * 32
    max_frames: int = 64  # a video without fps is thinned to so many; one with fps never is
    fps: float = 2.0  # assumed where a video has none, as in qwen-vl-utils
    max_length: int = 8192  # tokens with <|endoftext|>: text is cut at its end, images never are
    default_instruction: str | None = None  # of items without one; None writes no system turn
    trained_here: bool = True  # False: not by our code. propose asks in words, "auto" never reasons

    # Without an annotation it is no setting. train.py sets it.
    pad_to = 1  # collate pads to a multiple of so many tokens: a compiled model meets few shapes

    def __post_init__(self):
        for name in PIXEL_LIMITS:
            require_number("finite", **{name: getattr(self, name)})
            setattr(self, name, int(getattr(self, name)))  # JSON holds no numpy numbers
        image_limits = self.min_pixels, self.max_pixels
        frame_limits = self.frame_min_pixels, self.frame_max_pixels
        for low, high in (image_limits, frame_limits):
            if max(low, FACTOR**2) > high:
                raise ValueError(f"pixel limits {low} to {high}: expected min <= max, max >= 1024")
        require_number("whole", max_frames=self.max_frames, max_length=self.max_length)
        require_number("finite", fps=self.fps)
        self.max_frames = int(self.max_frames)
        self.max_length = int(self.max_length)
        self.fps = float(self.fps)
        default = self.default_instruction
        require(default is None or is_text(default), "default_instruction", default, "text")
        special = self.tokenizer.special
        self.eos_id = special["<|endoftext|>"]
        self.im_start_id = special["<|im_start|>"]
        self.im_end_id = special["<|im_end|>"]
        self.think_id = special["<think>"]
        self.think_end_id = special["</think>"]
        ids = self.tokenizer.markers
        model = {name: getattr(self.config, name) for name in ids}
        if ids != model:  # they are of two checkpoints
            raise ValueError(f"markers of images: the tokenizer has {ids}, the model {model}")
        # A rationale is prefix, sampled tokens, </think>, tail; closing ends one that was cut off.
        self.prefix = [self.think_id, *self.tokenizer.encode("\n")]
        self.tail = [*self.tokenizer.encode("\n\n"), self.eos_id]
        self.closing = [*self.tokenizer.encode("\n"), self.think_end_id]
        # Never sampled: special tokens but </think>, which ends a rationale, and ids of no token.
        unused = range(self.tokenizer.size, self.config.vocab)
        self.suppress_tokens = sorted({*special.values(), *unused} - {self.think_end_id})
        self.generation = {
            "prefix": self.prefix,
            "stop_ids": (self.think_end_id,),
            "closing": self.closing,
            "tail": self.tail,
            "suppress_tokens": self.suppress_tokens,
        }

    def __call__(self, item, instruction=None):
        """item -> prompt: a dict of

        ids (S,) int64           up to "assistant\\n": <|endoftext|> is what a model may write next
        pixel_values, image_grid of each segment (an image, or two frames of a video) its patches
                                 (h * w, 1536) uint8 and its (h, w)

        embed.Embedder says what an item is. Its parts are shown in the order video, image, text.
        Its instruction wins over the call's, the call's over the default; "" writes none.
        """
        item = as_dict(item)
        refuse_seeking([item])
        messages = messages_of(item)
        given = item.get("instruction", instruction)
        require(given is None or is_text(given), "instruction", given, "text")
        if messages[0]["role"] != "system":
            text = as_sentence(given if given is not None else self.default_instruction or "")
            if text:
                messages.insert(0, {"role": "system", "content": text})
        elif given:
            warnings.warn("an instruction is not read: messages have a system turn", stacklevel=2)
        pieces = []
        for message in messages:
            pieces += [self.im_start_id, message["role"] + "\n"]
            for part in listed(message["content"]):
                pieces += self.part(part)
            pieces += [self.im_end_id, "\n"]
        return self.finish([*pieces, self.im_start_id, "assistant\n"])

    def part(self, part):
        """One part of a message -> pieces: texts and segments.

            "a text"    {"text": t}    {"image": ref}    {"image_url": ref or {"url": ref}}
            {"url" or "path" or "base64": ref}    {"video": clip, "fps": f}

        Each may have a "type", which is not read. All that is not None is shown.
        """
        part = {"text": part} if isinstance(part, str) else part
        part = checked("a part of content", part, PART_KEYS)
        pieces = []
        if "video" in part:
            pieces += self.video(part["video"], part.get("fps"))
        for key in IMAGE_KEYS:
            if key in part:
                image = open_image(key, part[key])
                pixels = read_pixels([image], self.min_pixels, self.max_pixels)
                pieces += self.segment(self.config.image_token, *pixels)
        if "text" in part:
            text = part["text"]
            require(is_text(text), "text", text, "a string of whole characters")
            # It is never opened as a file, but the name of one is most likely a mistake.
            if os.path.isfile(text):
                warnings.warn(f'read as text: to show it, give {{"image": {text!r}}}', stacklevel=2)
            pieces.append(UserText(text))
        if not pieces:
            raise ValueError("a part of content: expected text, video or image")
        return pieces

    def segment(self, token, patches, grid):
        """-> [<|vision_start|>, an id for every 2 x 2 patches, <|vision_end|>, (patches, grid)]."""
        visual = [token] * (len(patches) // MERGE**2)
        return [self.config.vision_start, *visual, self.config.vision_end, (patches, grid)]

    def video(self, video, fps=None):
        """One clip -> for each two frames their mean time and a segment (transformers 4.57):

        <0.2 seconds><|vision_start|><|video_pad|>...<|vision_end|><1.2 seconds>...
        """
        clip = video if isinstance(video, dict) else {"frames": video}
        clip = checked("a video", clip, ("frames", "fps"))
        frames, fps = clip.get("frames"), clip.get("fps", fps)
        if not isinstance(frames, (list, tuple)) or not frames:
            given = type(frames).__name__
            raise ValueError(f"a video without frames ({given}): expected a list of frames")
        if fps is None:
            fps = self.fps
            if len(frames) > self.max_frames:
                at = np.linspace(0, len(frames) - 1, self.max_frames, dtype=int)
                frames = [frames[i] for i in at]
        require_number("finite", fps=fps)
        images = [open_image("image", frame) for frame in frames]
        times = [i / float(fps) for i in range(len(images))]  # PyAV's fps is a Fraction
        if len(images) % TEMPORAL:  # an odd last frame is shown twice
            images.append(images[-1])
            times.append(times[-1])
        patches, grid = read_pixels(images, *self.frame_limits(len(images)))
        groups = np.split(patches, len(images) // TEMPORAL)
        pieces = []
        for first, second, group in zip(times[::2], times[1::2], groups):
            pieces.append(f"<{(first + second) / 2:.1f} seconds>")
            pieces += self.segment(self.config.video_token, group, grid)
        return pieces

    def frame_limits(self, n):
        """(min, max) area of each of n frames.

        A long video's frames shrink to their share of CLIP_PIXELS, but not below 1.05 times the
        least area (qwen-vl-utils' numbers). By default 20 frames are 10 segments of at most 768
        tokens each, 64 frames 32 segments of 240.
        """
        share = max(CLIP_PIXELS * TEMPORAL / n, int(1.05 * self.frame_min_pixels))
        return self.frame_min_pixels, min(self.frame_max_pixels, share)

    def finish(self, pieces):
        """Pieces (texts, ids, and (patches, grid) of segments) -> prompt.

        Neighbouring texts are tokenised as one, so that "user\\n" and "\\nWhat" merge as they do in
        transformers, which tokenises the whole chat. What is too long then loses user text.
        """
        ids, user_places = [], []
        for are_texts, group in itertools.groupby(pieces, lambda piece: isinstance(piece, str)):
            group = list(group)
            if not are_texts:
                ids += [piece for piece in group if isinstance(piece, int)]
                continue
            tokens = self.tokenizer.encode("".join(group))
            user = [i for i, text in enumerate(group) if isinstance(text, UserText)]
            if user:  # tokens of the template before and after the user's text
                before = self.tokenizer.encode("".join(group[: user[0]]))
                after = self.tokenizer.encode("".join(group[user[-1] + 1 :]))
                stop = len(ids) + len(tokens) - len(after)
                user_places += range(len(ids) + len(before), stop)
            ids += tokens
        surplus = max(0, len(ids) + 1 - self.max_length)
        if user_places and surplus >= len(user_places):  # two such items are told apart by nothing
            long = f"an item of {len(ids) + 1} tokens, max_length is {self.max_length}"
            warnings.warn(f"all text is cut: {long}", stacklevel=2)
        segments = [piece for piece in pieces if isinstance(piece, tuple)]
        return {
            # The last text is cut first, the instruction last.
            "ids": np.delete(ids, user_places[::-1][:surplus]),
            "pixel_values": [patches for patches, _ in segments],
            "image_grid": [grid for _, grid in segments],
        }

    def rationale(self, text):
        """Text -> the ids of its branch, <think> to <|endoftext|>.

        Tokenised in the parts of generation: what a model writes after the prefix, up to </think>.
        """
        sampled = self.tokenizer.encode(text.strip() + "\n")
        return [*self.prefix, *sampled, self.think_end_id, *self.tail]

    def rationale_text(self, ids):
        """Ids of a branch -> the text between <think> and </think>."""
        end = ids.index(self.think_end_id)
        return self.tokenizer.decode(ids[len(self.prefix) : end]).strip()

    def padded(self, lengths):
        """How long `collate` makes rows of so many tokens."""
        return [-(-n // self.pad_to) * self.pad_to for n in lengths]

    @classmethod
    def from_folder(cls, folder, config, **settings):
        """The processor of a checkpoint. A setting is the argument unless that is None, else what a
        checkpoint of ours says, else Qwen's."""
        spec = read_json(Path(folder, "tokenizer.json"))
        given = {name: value for name, value in settings.items() if value is not None}
        try:
            return cls(Tokenizer(spec), config, **(saved_settings(folder) | given))
        except (AttributeError, KeyError, TypeError) as e:
            raise ValueError(f"{folder}: not a tokenizer and settings as ours ({e!r})") from None

    def save(self, folder):
        """Writes what from_folder and transformers' AutoProcessor read."""
        image = {**VISION_CONFIG, "image_processor_type": "Qwen2VLImageProcessorFast"}
        image["size"] = {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels}
        video = {**VISION_CONFIG, "video_processor_type": "Qwen3VLVideoProcessor"}
        video["frame_min_pixels"] = self.frame_min_pixels
        video["frame_max_pixels"] = self.frame_max_pixels
        # Nearly the same in transformers' words: the area of a whole clip, and a cap on each frame.
        # transformers' least area is a clip's, ours a frame's: it may show small frames smaller.
        clip_pixels = CLIP_PIXELS * TEMPORAL
        video["size"] = {"shortest_edge": self.frame_min_pixels, "longest_edge": clip_pixels}
        video["max_video_tokens"] = self.frame_max_pixels // FACTOR**2
        video["cap_pixels_per_frame"] = True
        files = {
            "tokenizer.json": append_eos(self.tokenizer.spec),
            "tokenizer_config.json": {**TOKENIZER_CONFIG, "model_max_length": self.max_length},
            "preprocessor_config.json": image,
            "video_preprocessor_config.json": video,
            "embedder_config.json": {name: getattr(self, name) for name in OUR_SETTINGS},
        }
        os.makedirs(folder, exist_ok=True)
        for name in OLDER_FILES:
            Path(folder, name).unlink(missing_ok=True)
        for name, value in files.items():
            write_json(Path(folder, name), value)
        # A JSON string is a Jinja string, too, but for escaped emojis: Jinja leaves them in halves.
        instruction = as_sentence(self.default_instruction or "")
        instruction = json.dumps(instruction, ensure_ascii=False)
        template = TEMPLATE.replace("DEFAULT", instruction)
        Path(folder, "chat_template.jinja").write_text(template, encoding="utf-8")


def as_dict(item):
    """An item in any of its forms -> a dict with some of ITEM_KEYS."""
    if isinstance(item, str):
        return {"text": item}
    if item is None or isinstance(item, (list, tuple, numbers.Number)):
        raise ValueError(f"a {type(item).__name__}: expected a string, an image, a path or a dict")
    if not isinstance(item, Mapping):
        return {"image": item}  # load_image refuses what is no image
    return checked("an item", item, ITEM_KEYS)


def messages_of(item):
    """The chat messages of an item. Without "messages": one turn of the user."""
    if "messages" not in item:
        return [{"role": "user", "content": content_of(item)}]
    if item.keys() & {"text", "image", "video", "fps"}:
        raise ValueError("an item has messages, or text, image, video and fps, but not both")
    messages = item["messages"]
    is_list = isinstance(messages, (list, tuple))
    require(is_list and messages, "messages", messages, "a list of one at least")
    for message in messages:
        is_message = isinstance(message, Mapping) and {"role", "content"} <= message.keys()
        require(is_message, "message", message, 'a dict of "role" and "content"')
        require(is_text(message["role"]), "role", message["role"], "text")
    return list(messages)


def content_of(item):
    """An item's videos, images and texts -> parts of a message, in the order of Qwen's wrapper.

    A list of frames is one video; a list of lists, or of {"frames", "fps"}, is several.
    """
    video = item.get("video")
    clips = [] if video is None else [video]
    if isinstance(video, (list, tuple)) and video:
        first = video[0]  # a clip or a frame. A frame may be a dict, too: {"bytes", "path"}
        has_frames = isinstance(first, dict) and "frames" in first
        if has_frames or isinstance(first, (list, tuple)):
            clips = video
    parts = [{"video": clip, "fps": item.get("fps")} for clip in clips]
    images = listed(item.get("image"))
    parts += [{"image": image} for image in images]
    texts = [text for text in listed(item.get("text")) if text is not None]
    if not parts and not texts:
        texts = ["NULL"]  # Qwen3-VL-Embedding's word for nothing; "" is an empty turn
    return parts + [{"text": text} for text in texts]


def refuse_seeking(items):
    """list(ImageSequence.Iterator(gif)) is one object many times, left at its last frame."""
    seen = set()  # images that were moved on to a later frame
    todo = list(items)
    while todo:
        value = todo.pop()
        if isinstance(value, Mapping):
            todo += value.values()
        elif isinstance(value, (list, tuple)):
            todo += value
        elif isinstance(value, Image.Image) and value.tell():
            if id(value) in seen:
                raise ValueError("the frames are one image that seeks: expected a copy of each")
            seen.add(id(value))


def as_sentence(instruction):
    """An instruction as Qwen's wrapper writes it; an empty one stays empty."""
    text = instruction.strip()
    if text and not unicodedata.category(text[-1]).startswith("P"):  # punctuation
        text += "."
    return text


def open_image(name, ref):
    """What stands under one of IMAGE_KEYS, also data:image/png;base64,iVBO... -> RGB image."""
    if isinstance(ref, dict) and "url" in ref:  # {"image_url": {"url": ...}}
        ref = ref["url"]
    if isinstance(ref, str) and ref.startswith("data:"):
        name = "base64"
        ref = ref.rpartition(",")[2]
    if name == "base64":
        ref = base64.b64decode("".join(ref.split()), validate=True)  # it may come in lines
    return load_image(ref)


def checked(what, given, known):
    """`given` without what is None (Arrow fills every column of a struct). A key that nobody reads
    may be a typing mistake: it is a warning, and an error where no other key is there."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{what} is a {type(given).__name__}, expected a dict")
    given = {name: value for name, value in given.items() if value is not None}
    unread = [name for name in given if name not in known]
    names = ", ".join(map(repr, unread))
    if unread and len(unread) == len(given):
        raise ValueError(f"{what} with the keys {names}: expected {', '.join(known)}")
    if unread:
        warnings.warn(f"{what}: {names} is not read; what is: {', '.join(known)}", stacklevel=3)
    return given


def require(holds, name, value, wanted):
    """Refuses the value of an option in one line."""
    if not holds:
        raise ValueError(f"{name}={short(value)}: expected {wanted}")


def require_number(kind, **options):
    """Each is a "finite" or a "whole" number above 0. True is none, though Python says so."""
    wanted = {"finite": numbers.Real, "whole": numbers.Integral}[kind]
    for name, value in options.items():
        is_number = isinstance(value, wanted) and value is not True
        require(is_number and 0 < value < 2**60, name, value, f"a {kind} number above 0")


# --------------------------------------------------------------------------------------------------
# The files of a checkpoint folder

OUR_SETTINGS = ("max_frames", "fps", "max_length", "default_instruction", "trained_here")
TOKENIZER_CONFIG = {"tokenizer_class": "Qwen2Tokenizer", "padding_side": "right"}
TOKENIZER_CONFIG |= {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
VISION_CONFIG = {"patch_size": PATCH, "temporal_patch_size": TEMPORAL, "merge_size": MERGE}
VISION_CONFIG |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
VISION_CONFIG |= {"processor_class": "Qwen3VLProcessor"}
# A save removes what transformers would prefer to our files, and a template that may be a link
# into a hub's cache.
OLDER_FILES = ["processor_config.json", "chat_template.json", "special_tokens_map.json"]
OLDER_FILES += ["added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"]

# Processor.__call__ for other programs. They hand over images apart, so a part may have no more
# than its type, "image" or "video"; they add the markers around a video's frames. The loop goes
# over message.content itself: where vLLM finds none it joins the parts by line breaks beforehand.
TEMPLATE = r"""
{%- set instruction = DEFAULT -%}
{%- if instruction and messages[0].role != 'system' -%}
{{- '<|im_start|>system\n' + instruction + '<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' -}}
{%- if message.content is string -%}{{- message.content -}}{%- else -%}
{%- for content in message.content -%}
{%- set part = {'text': content} if content is string else content -%}
{%- set video = part.type == 'video' or part.get('video') is not none -%}
{%- set image = part.type in ('image', 'image_url') or part.get('image') is not none
       or part.get('image_url') is not none -%}
{%- if not (video or image or part.text is string) -%}
{{- raise_exception('a part of content: expected text, video or image') -}}
{%- endif -%}
{%- if video -%}{{- '<|video_pad|>' -}}{%- endif -%}
{%- if image -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}{%- endif -%}
{{- part.text or '' -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""


def saved_settings(folder):
    """What a checkpoint folder says of Processor's settings.

    An Instruct model's limits are for chatting. So Qwen3-VL-Embedding's hold where we did not save.
    """
    path = Path(folder, "embedder_config.json")  # which only Processor.save writes
    if not path.exists():
        return {"default_instruction": DEFAULT_INSTRUCTION, "trained_here": False}
    embedder = read_json(path)
    image = read_json(Path(folder, "preprocessor_config.json"))
    video = read_json(Path(folder, "video_preprocessor_config.json"))
    return {
        **{name: embedder[name] for name in OUR_SETTINGS if name in embedder},
        "min_pixels": image["size"]["shortest_edge"],
        "max_pixels": image["size"]["longest_edge"],
        "frame_min_pixels": video["frame_min_pixels"],
        "frame_max_pixels": video["frame_max_pixels"],
    }


# --------------------------------------------------------------------------------------------------
# Prompts -> a batch


def collate(prompts, processor, rationales=None, device="cpu"):
    """Prompts, and for each a list of rationales (ids) -> the batch of model.Qwen3VL, a dict of

    ids (B, S), positions (3, B, S), lengths (B,), pixel_values (N, 1536), image_grid [(h, w)]
    branch (B, S)    0 in the prompt, 1, 2 ... in its branches, -1 in padding; None if K = 0
    ends (B, 1 + K)  the place of each branch's last token, -1 where there is none
    K                the most rationales of a prompt

    A row: prompt, <|endoftext|> (branch 1, column 0 of ends), rationale 1 (branch 2, column 1) ...
    All branches start at the same position, as if the others were not there. Padding is on the
    right. K = 0 needs no branch: a causal model never looks to the right.
    """
    rationales = rationales or [[]] * len(prompts)
    rows = []
    for prompt, branches in zip(prompts, rationales):
        rows.append(lay_out(prompt, [[processor.eos_id], *branches], processor.config))
    # The five lines of a row are padded together: ids, three positions, branch.
    lengths = [table.shape[1] for table, _ in rows]
    S = max(processor.padded(lengths))
    K = max(len(branches) for branches in rationales)
    padding = np.array([processor.eos_id, 1, 1, 1, -1])  # at any position: nobody looks at it
    batch = np.tile(padding[:, None, None], (1, len(rows), S))  # (5, B, S)
    ends = np.full((len(rows), 1 + K), -1)
    for b, (table, last) in enumerate(rows):
        batch[:, b, : lengths[b]] = table
        ends[b, : len(last)] = last
    batch = torch.from_numpy(batch).to(device)
    patches = [x for prompt in prompts for x in prompt["pixel_values"]]
    return {
        "ids": batch[0],
        "positions": batch[1:4],
        "branch": batch[4] if K else None,
        "lengths": torch.tensor(lengths, device=device),
        "ends": torch.from_numpy(ends).to(device),
        "pixel_values": normalize_pixels(np.concatenate(patches), device) if patches else None,
        "image_grid": [grid for prompt in prompts for grid in prompt["image_grid"]],
    }


def lay_out(prompt, branches, config):
    """One row -> table (5, n) of ids, three positions and branch; ends of its branches. embed.py
    draws one: p p e a b e, whose positions are 0 1 2 2 3 4 on all axes."""
    ids = prompt["ids"]
    positions = rope_positions(ids, prompt["image_grid"], config)  # (3, n)
    first = positions.max() + 1
    table = [np.stack([ids, *positions, np.zeros_like(ids)])]
    for k, tokens in enumerate(branches, 1):
        position = first + np.arange(len(tokens))
        branch = np.full(len(tokens), k)
        table.append(np.stack([tokens, position, position, position, branch]))
    ends = np.cumsum([part.shape[1] for part in table])[1:] - 1
    return np.concatenate(table, axis=1), ends


def prompt_key(prompt):
    """Equal prompts have equal keys. White images of 2 x 4 and 4 x 2 patches have the same bytes
    and differ in the grid."""
    digest = hashlib.blake2b(prompt["ids"], digest_size=12)
    digest.update(str(prompt["image_grid"]).encode())
    for patches in prompt["pixel_values"]:
        digest.update(patches)
    return digest.hexdigest()
