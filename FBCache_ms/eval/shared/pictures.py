"""A folder of pictures that survives being killed: each whole or not at all, with its settings beside it."""

import json
import os
import time
from pathlib import Path

from FBCache_ms.eval.shared.files import clear, json_bytes, naming, write_file


class PictureFolder:
    """The pictures of one setting: ``00000.png`` with ``00000.json`` beside it, by the number of the prompt.

    Both are the same to the last bit whoever draws them and however often the drawing was interrupted. What is not, the
    seconds it took, is a line in ``seconds.RANK.jsonl`` of the process that drew it.

    Args:
        path: the folder; it need not be there.
        settings: all that the pictures depend on but the prompt, as a flat dictionary.

    Raises OSError if pictures lie there that were made with other settings or that do not tell theirs.
    """

    def __init__(self, path, settings):
        self.path, self.settings = Path(path), settings
        self.path.mkdir(parents=True, exist_ok=True)
        clear(self.path)
        for picture in self.path.glob("[0-9]*.png"):
            if not picture.with_suffix(".json").is_file():
                raise OSError(
                    f"{picture} has no {picture.stem}.json beside it that tells how it was made; move it away"
                )
        for record in sorted(self.path.glob("[0-9]*.json")):
            self._check(record)

    def _check(self, path):
        found = read_record(path)["settings"]
        for name in {**self.settings, **found}:
            wanted, there = (json.dumps(settings.get(name)) for settings in (self.settings, found))
            if wanted != there:
                raise OSError(
                    f"{self.path} holds pictures made with {name} {there}, not {wanted}: "
                    "choose another --save_path, or move them away"
                )

    def __str__(self):
        return str(self.path)

    def file(self, index, suffix="png"):
        """A picture's path, or that of another file of the same number."""
        return self.path / f"{index:05d}.{suffix}"

    def missing(self, prompts):
        """The numbers of the prompts whose picture is not there.

        Raises OSError if a picture of that number was made of another prompt.
        """
        missing = self.absent(len(prompts))
        for index in sorted(set(range(len(prompts))) - set(missing)):
            prompt = prompts[index]
            if self.record(index)["prompt"] != prompt:
                raise OSError(
                    f"{self.file(index)} was made of {self.record(index)['prompt']!r}, not of {prompt!r}: "
                    "choose another --save_path, or move the pictures away"
                )
        return missing

    def absent(self, number):
        """Which of the first ``number`` pictures are not there."""
        return [index for index in range(number) if not self.file(index).is_file()]

    def add(self, index, prompt, picture, facts, seconds, rank=0):
        """Writes a picture (H, W, 3) of uint8, what is known of it, and the seconds it took.

        The picture comes last: once it is there, all of it is.
        """
        from PIL import Image

        self._append(rank, {"index": index, **seconds})
        record = {"index": index, "prompt": prompt, **facts, "settings": self.settings}
        write_file(self.file(index, "json"), lambda stream: stream.write(json_bytes(record)))
        image = Image.fromarray(picture)
        write_file(self.file(index), lambda stream: image.save(stream, format="PNG"))

    def _append(self, rank, line):
        path = self.path / f"seconds.{rank}.jsonl"
        # Begins a line of its own, since a process that was killed may have left half a one.
        with naming(path), open(path, "ab") as stream:
            stream.write(b"\n" + json.dumps({**line, "when": time.time()}).encode())
            stream.flush()
            os.fsync(stream.fileno())

    def record(self, index):
        """What is known of a picture: its prompt, settings and decisions. Raises OSError if it cannot be read."""
        return read_record(self.file(index, "json"))

    def seconds(self, number):
        """[what the drawing took, in seconds] of the first ``number`` pictures; of several drawings the last counts.

        Raises OSError if a picture has no such line.
        """
        lines = []
        for path in sorted(self.path.glob("seconds.*.jsonl")):
            for text in path.read_text(encoding="utf-8").splitlines():
                try:
                    lines.append(json.loads(text))
                except ValueError:
                    continue  # left unfinished by a process that was killed
        last = {line["index"]: line for line in sorted(lines, key=lambda line: line["when"])}
        for index in range(number):
            if index not in last:
                raise OSError(
                    f"{self.path} does not tell how long {self.file(index).name} took; move that picture away"
                )
        return [last[index] for index in range(number)]


def check_numbers(pipe, config, what="the picture"):
    """Raises ValueError unless all that a pipeline has drawn last, with a CacheConfig, are numbers."""
    # None where mindone's pipeline has drawn it.
    if pipe.finite is False:
        raise ValueError(
            f"{what} is not a number, drawn with --cache {config}: another --dtype or another --cache may help"
        )


def read_record(path):
    """The JSON object beside a picture. Raises OSError if it is damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        dict(record["settings"]), record["prompt"]
    except (KeyError, TypeError, ValueError):
        raise OSError(f"{path} is damaged; move it and its picture away, and they are made anew") from None
    return record
