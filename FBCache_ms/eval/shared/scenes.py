"""The little world that the embedded checkpoint draws: captions, pictures of them, and a score for a picture.

A caption names one object or two and a background, for instance ``"a big red circle in the center, blue
background"`` or ``"a small green square on the left and a big yellow triangle on the right, black background"``.
"""

import zlib
from dataclasses import asdict, dataclass, fields
from itertools import permutations

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 215, 50),
    "purple": (140, 60, 180),
    "orange": (245, 130, 30),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
}
SIZES = {"big": 10.0 / 64, "small": 5.8 / 64}
PLACES = {
    "on the left": (12 / 64, 0.5),
    "on the right": (52 / 64, 0.5),
    "at the top": (0.5, 12 / 64),
    "at the bottom": (0.5, 52 / 64),
    "in the center": (0.5, 0.5),
}
SHAPES = ("circle", "square", "triangle", "diamond")
JITTER = 1.2 / 64
"""How far an object may lie from its place, as a share of the picture's side."""


@dataclass(frozen=True)
class Thing:
    """One object of a scene; each field is a key of the table of that name."""

    size: str
    colour: str
    shape: str
    place: str

    def __str__(self):
        return f"a {self.size} {self.colour} {self.shape} {self.place}"


@dataclass(frozen=True)
class Scene:
    """What a caption says: one or two things, drawn in order, and the colour of the background."""

    things: tuple
    background: str

    def __str__(self):
        return f"{' and '.join(map(str, self.things))}, {self.background} background"


def parse_caption(caption):
    """The scene that a caption names.

    Raises ValueError, naming the part that is not understood, for a caption outside the grammar.
    """
    body, comma, background = caption.strip().rpartition(", ")
    colour = background.removesuffix(" background")
    if not comma or colour == background or colour not in COLOURS:
        raise ValueError(f"caption {caption!r} must end in ', COLOUR background' with one of {', '.join(COLOURS)}")
    things = tuple(_parse_thing(part) for part in body.split(" and "))
    if len(things) > 2:
        raise ValueError(f"caption {caption!r} names {len(things)} objects; one or two are allowed")
    return Scene(things, colour)


def _parse_thing(text):
    words = text.split(" ", 4)
    if len(words) == 5 and words[0] == "a":
        thing = Thing(*words[1:])
        allowed = {"size": SIZES, "colour": COLOURS, "shape": SHAPES, "place": PLACES}
        if all(value in allowed[name] for name, value in asdict(thing).items()):
            return thing
    raise ValueError(
        f"object {text!r} must read 'a SIZE COLOUR SHAPE PLACE' with a size of {', '.join(SIZES)}; a colour of "
        f"{', '.join(COLOURS)}; a shape of {', '.join(SHAPES)}; a place of {', '.join(PLACES)}"
    )


def random_scene(rng):
    """A scene drawn from ``rng`` (numpy.random.Generator): places differ, no object has the background's colour."""
    background, *colours = rng.choice(list(COLOURS), size=2, replace=False)
    number = int(rng.integers(1, 3))
    if number == 2:
        colours.append(rng.choice([colour for colour in COLOURS if colour != background]))
    places = rng.choice(list(PLACES), size=number, replace=False)
    things = (
        Thing(str(rng.choice(list(SIZES))), str(colour), str(rng.choice(SHAPES)), str(place))
        for colour, place in zip(colours, places)
    )
    return Scene(tuple(things), str(background))


def is_held_out(caption):
    """Whether training never sees this caption: one in ten, told by its checksum."""
    return zlib.crc32(caption.encode()) % 10 == 0


def held_out_captions(number, seed=0):
    """``number`` different captions that training never saw, the same for the same seed."""
    rng, captions = np.random.default_rng(seed), {}
    while len(captions) < number:
        caption = str(random_scene(rng))
        if is_held_out(caption):
            captions[caption] = None
    return list(captions)


def _outline(shape, x, y, radius):
    if shape == "square":
        corners = ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9))
    elif shape == "diamond":
        corners = ((0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0))
    else:
        corners = ((0, -1.15), (1.2, 0.85), (-1.2, 0.85))
    return [(x + radius * dx, y + radius * dy) for dx, dy in corners]


def _paint(canvas, shape, x, y, radius, colour):
    if shape == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    else:
        canvas.polygon(_outline(shape, x, y, radius), fill=colour)


def draw(scene, image_size=64, rng=None):
    """A picture of a scene, ``image_size`` pixels square, smooth at the edges.

    With ``rng``, each object lies up to JITTER beside its place; without, right on it.
    """
    fine = 4 * image_size
    picture = Image.new("RGB", (fine, fine), COLOURS[scene.background])
    canvas = ImageDraw.Draw(picture)
    for thing in scene.things:
        dx, dy = (0, 0) if rng is None else rng.uniform(-JITTER, JITTER, 2)
        x, y = PLACES[thing.place]
        _paint(canvas, thing.shape, fine * (x + dx), fine * (y + dy), fine * SIZES[thing.size], COLOURS[thing.colour])
    return picture.resize((image_size, image_size), Image.Resampling.BOX)


def find_scene(picture):
    """What a picture shows: the background's colour and the things found, as a Scene with any number of things.

    The picture is looked at in 64x64. The commonest palette colour is the background. Each other colour's connected
    pixels, thin edges left out, are one object: its place is the nearest to its centre of mass, its shape and size
    those of the drawing that overlaps it best (intersection over union).
    """
    pixels = np.asarray(picture.convert("RGB").resize((64, 64), Image.Resampling.BOX), np.float32)
    names, palette = list(COLOURS), np.array(list(COLOURS.values()), np.float32)
    distance = np.linalg.norm(pixels[:, :, None] - palette, axis=-1)
    nearest = distance.argmin(-1)
    background = int(np.bincount(nearest.ravel(), minlength=len(names)).argmax())
    things = []
    for colour in range(len(names)):
        if colour == background:
            continue
        cores = ndimage.binary_opening((nearest == colour) & (distance[..., colour] < 70), np.ones((3, 3)))
        labels, number = ndimage.label(cores)
        contrast = palette[colour] - palette[background]
        coverage = np.clip((pixels - palette[background]) @ contrast / (contrast @ contrast), 0, 1)
        for label in range(1, number + 1):
            core = labels == label
            if core.sum() < 12:
                continue
            nearby = ndimage.binary_dilation(core, np.ones((3, 3)), iterations=2)
            things.append(_recognise(np.where(nearby, coverage, 0), names[colour]))
    return Scene(tuple(things), names[background])


def _recognise(coverage, colour):
    y, x = ndimage.center_of_mass(coverage)
    place = min(PLACES, key=lambda name: np.hypot(PLACES[name][0] * 64 - x - 0.5, PLACES[name][1] * 64 - y - 0.5))

    def overlap(size, shape):
        template = Image.new("L", (256, 256))
        _paint(ImageDraw.Draw(template), shape, 128, 128, 256 * SIZES[size], 255)
        template = np.asarray(template.resize((64, 64), Image.Resampling.BOX), np.float32) / 255
        centre_y, centre_x = ndimage.center_of_mass(template)
        template = ndimage.shift(template, (y - centre_y, x - centre_x), order=1)
        return np.minimum(template, coverage).sum() / np.maximum(template, coverage).sum()

    size, shape = max(((size, shape) for size in SIZES for shape in SHAPES), key=lambda pair: overlap(*pair))
    return Thing(size, colour, shape, place)


def score_picture(picture, scene):
    """Which attributes of a scene a picture shows: a list of (attribute, right) pairs.

    The background gives one pair, each object of the scene four: colour, size, place and shape, compared with the
    object found that fits it best; an object that is not there gives four wrong ones.
    """
    found = find_scene(picture)
    candidates = [*found.things, *[None] * len(scene.things)]

    def compare(pairing):
        return [
            (field.name, got is not None and getattr(got, field.name) == getattr(wanted, field.name))
            for wanted, got in zip(scene.things, pairing)
            for field in fields(Thing)
        ]

    best = max(map(compare, permutations(candidates, len(scene.things))), key=lambda pairs: sum(ok for _, ok in pairs))
    return [("background", found.background == scene.background), *best]
