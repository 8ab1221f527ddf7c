"""The prompts that the programs draw: of our own, or from a file in any of the forms in which they are published."""

import csv
import io
import json
from pathlib import Path

from FBCache_ms.eval.shared.scenes import held_out_captions
from FBCache_ms.runtime.checkpoint import TINY_FLUX

OWN_PROMPTS = (
    "a lighthouse on a rocky coast at dawn, waves breaking below",
    "an old tram climbing a steep street in Lisbon, morning light",
    "a red bicycle leaning against a whitewashed wall",
    "three pears and a knife on a wooden table, oil painting",
    "a fox asleep in fresh snow, seen from above",
    "a glass of water with a slice of lemon, macro photograph",
    "a mountain village under the Milky Way, long exposure",
    "a violin maker at her workbench, wood shavings on the floor",
    "a paper boat floating in a puddle, rain falling",
    "a street market at night, steam rising from the food stalls",
    "a grey cat looking out of a round window",
    "two chairs facing each other in an empty room, afternoon sun",
    "a wooden sign that says OPEN on a bakery door",
    "a hot-air balloon over a field of lavender",
    "an astronaut reading a newspaper on a park bench",
    "a bowl of ramen with a soft egg, top view",
    "a steam locomotive crossing a stone viaduct in autumn",
    "a child drawing with chalk on the pavement",
    "a blue vase to the left of a stack of four books",
    "an owl made of folded paper, studio light",
    "a desert road running straight to the horizon, storm clouds",
    "a potter's hands shaping wet clay",
    "a greenhouse full of orchids, glass fogged by breath",
    "a chess board in the middle of a game, black to move",
    "a fishing boat pulled up on a beach, painted yellow and green",
    "a portrait of an elderly man laughing, black and white film",
    "a kingfisher diving into a river, frozen motion",
    "a city skyline made of stacked books, watercolour",
    "a snow globe with a tiny forest inside",
    "a staircase winding down into a library, seen from the top",
    "a green apple on top of a red cube",
    "a herd of horses galloping through shallow water",
    "a robot watering tomato plants on a balcony",
    "a map of an imaginary island, ink on parchment",
    "a slice of chocolate cake with one candle",
    "a lone tree on a hill, half in bloom and half bare",
    "a tailor's shop window with five hats on display",
    "an underwater photograph of a sea turtle above a coral reef",
    "a neon sign of a crescent moon above a wet alley",
    "a pencil sketch of a suspension bridge in fog",
    "a red umbrella left open on an empty pier",
    "two otters holding hands in a calm bay",
    "a clock tower with its hands at ten past ten",
    "a stone bridge mirrored in a green river, summer haze",
    "a jar of honey, a spoon and a slice of bread, still life",
    "a beekeeper lifting a frame from a wooden hive",
    "a night train crossing a snowy plain, windows lit",
    "an orange tent under tall pines, mist between the trunks",
    "a small dragon made of stained glass",
    "a marble statue of a dancer in a sunlit courtyard",
    "a white rabbit wearing a blue waistcoat, children's book illustration",
    "a row of seven coloured doors in a narrow alley",
    "an open laptop beside a cup of coffee and a yellow notebook",
    "a glacier breaking into a dark fjord, aerial view",
    "a blacksmith striking glowing iron, sparks in the dark",
    "a carousel at dusk, long exposure",
    "a fern leaf unrolling, extreme close-up",
    "a black sports car on a wet road, reflections of the city",
    "a shelf with four glass bottles, the second one broken",
    "an isometric drawing of a tiny coffee shop",
    "a scarecrow in a field of sunflowers, low sun",
    "a sailor's knot of thick rope on a white background",
    "a group of penguins walking in single file over ice",
    "a chalkboard with the words SOUP OF THE DAY",
)
"""For models that know the world."""

_COLUMNS = ("prompt", "prompts", "caption", "captions", "text")


def choose_prompts(args):
    """The first --limit prompts of the --prompts file, or of our own; the embedded checkpoint gets captions it knows.

    A file may hold fewer. Raises OSError or ValueError, naming the file, for one that cannot be read.
    """
    if args.limit < 1:
        raise ValueError(f"--limit must be 1 or more, not {args.limit}")
    if args.prompts is not None:
        return read_prompts(args.prompts)[: args.limit]
    if knows_captions_alone(args.ckpt):
        return held_out_captions(args.limit, args.seed)
    if args.limit > len(OWN_PROMPTS):
        raise ValueError(f"--limit {args.limit}: our own prompts are {len(OWN_PROMPTS)}; give --prompts a file of more")
    return list(OWN_PROMPTS[: args.limit])


def knows_captions_alone(ckpt):
    """Whether a checkpoint has the embedded one's vocabulary, as those made from it do."""
    embedded, other = (folder / "tokenizer_2" / "tokenizer.json" for folder in (TINY_FLUX, ckpt))
    return other.is_file() and other.read_bytes() == embedded.read_bytes()


def read_prompts(path):
    """The prompts of a file.

    A prompt a line; JSON or JSON lines: a list of texts, or of objects with a field such as "prompt" or "caption", or
    MSCOCO's captions, of which the first of each image is taken, in the order of the images; or a table (.csv, .tsv)
    with such a column, as DrawBench and PartiPrompts have.

    Raises OSError if it cannot be read, ValueError if it has another shape or holds no prompt.
    """
    text, kind = _read(path), path.suffix.lower()
    if kind == ".json":
        prompts = _from_json(path, _json(path, text))
    elif kind == ".jsonl":
        prompts = _from_json(path, [_json(path, line) for line in text.split("\n") if line.strip()])
    elif kind in (".csv", ".tsv"):
        prompts = _from_table(path, text)
    else:
        prompts = text.split("\n")
    prompts = [" ".join(prompt.split()) for prompt in prompts]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts


def coco_captions(path):
    """{image id: its first caption} of MSCOCO's captions_*.json, in the order of the ids, and {image id: file name}.

    Raises OSError if it cannot be read, ValueError if it has another shape.
    """
    content = _json(path, _read(path))
    try:
        annotations = sorted(content["annotations"], key=lambda entry: (int(entry["image_id"]), int(entry["id"])))
        captions = {}
        for entry in annotations:
            captions.setdefault(int(entry["image_id"]), " ".join(entry["caption"].split()))
        files = {int(image["id"]): Path(image["file_name"]).name for image in content.get("images", ())}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(
            f'{path} has another shape than MSCOCO\'s captions: an object with "annotations", a list of objects with '
            '"image_id", "id" and "caption"'
        ) from None
    return captions, files


def _read(path):
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error.reason} at byte {error.start}") from None


def _json(path, text):
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def _from_json(path, content):
    if isinstance(content, dict) and "annotations" in content:
        return list(coco_captions(path)[0].values())
    if isinstance(content, dict):
        content = next((content[name] for name in _COLUMNS if name in content), None)
    if isinstance(content, list):
        prompts = [_text(entry) for entry in content]
        if None not in prompts:
            return prompts
    raise ValueError(
        f"{path} has another shape than a list of texts, a list of objects with one of {', '.join(_COLUMNS)}, "
        "or MSCOCO's captions"
    )


def _text(entry):
    if isinstance(entry, dict):
        entry = next((value for name, value in entry.items() if name.lower() in _COLUMNS), None)
    return entry if isinstance(entry, str) else None


def _from_table(path, text):
    # Tab-separated tables do not quote.
    form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix.lower() == ".tsv" else {}
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), **form))
    except csv.Error as error:
        raise ValueError(f"{path} is no table: {error}") from None
    column = next((i for i, name in enumerate(rows[0] if rows else ()) if name.strip().lower() in _COLUMNS), None)
    if column is None:
        raise ValueError(f"{path} has no column named one of {', '.join(_COLUMNS)} in its first line")
    return [row[column] for row in rows[1:] if len(row) > column]
