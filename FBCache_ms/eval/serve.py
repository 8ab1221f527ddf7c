"""Serves pictures over HTTP, by OpenAI's interface: compiles what is served, then draws what is asked for."""

import asyncio
import importlib
import importlib.util
import logging
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

from FBCache_ms.cache.gates import check_steps
from FBCache_ms.config import PRESETS, CacheConfig
from FBCache_ms.eval.shared.arguments import Parser, add_model_options, check_quantized, check_range, exit_status
from FBCache_ms.rules.schedules import MAX_STEPS
from FBCache_ms.runtime.checkpoint import block_counts, check_checkpoint, family_of, image_size, image_unit

KEYS = "FBCACHE_API_KEYS"
"""Environment variable with API keys, commas between them."""

MODEL = ("ckpt", "quantize", "device", "dtype", "jit_level", "lazy_inline", "deterministic", "compile_cache")


def parse_arguments(argv=None):
    """The command line, checked before anything is loaded; exits with 2 and one line if it is off."""
    parser = Parser(__name__, "serve", "[--sizes WxH ...] [--presets NAME ...] [options]", description=__doc__)
    add = parser.add_argument_group("model").add_argument
    # The same seed is to give the same bytes.
    add_model_options(add, deterministic=True, compile_cache=True)
    add = parser.add_argument_group("what is served").add_argument
    add("--name", metavar="NAME", help="the model's, as clients call it (default: the checkpoint's folder)")
    add("--sizes", nargs="+", metavar="WxH", help="in pixels, the default one first (default: the model's own)")
    add(
        "--presets",
        nargs="+",
        default=["balanced"],
        metavar="TAG|PRESET",
        help=f"the default one first: tags, or {', '.join(PRESETS)}",
    )
    add("--negative_prompts", action="store_true", help="also compile true classifier-free guidance")
    add("--prompt_tokens", type=int, metavar="N", help="that a prompt may have (default: as many as the model reads)")
    add(
        "--batch_sizes",
        nargs="+",
        type=int,
        default=[1],
        metavar="N",
        help="also draw so many pictures at once, of requests without a seed under schedules (default: 1)",
    )
    add("--num_inference_steps", type=int, default=28, metavar="N", help="where a client does not say")
    add("--max_steps", type=int, default=100, metavar="N", help="that a client may ask for")
    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", help="address to listen at; any but this machine's own needs a key")
    add("--port", type=int, default=8000, metavar="N", help="port to listen at; 0: a free one")
    add("--api_keys", type=Path, metavar="FILE", help=f"API keys, one a line; those of ${KEYS} are taken, too")
    add("--no_key", action="store_true", help="listen beyond this machine without asking for a key")
    add("--replicas", type=int, default=1, metavar="N", help="processes that draw, each on an NPU of its own")
    add("--ray", metavar="ADDRESS", help="have these on the hosts of a Ray cluster; local: one of this host alone")
    add("--batch_wait_ms", type=float, default=50.0, metavar="MS", help="that a request waits for others to its batch")
    add("--queue", type=int, default=8, metavar="N", help="requests that may wait")
    add("--timeout", type=float, default=600.0, metavar="S", help="seconds after which a request is given up")
    add(
        "--painter_timeout",
        type=float,
        default=120.0,
        metavar="S",
        help="seconds without a word after which the drawing process is started anew",
    )
    add("--start_timeout", type=float, default=3600.0, metavar="S", help="the same while it compiles")
    add(
        "--moderation",
        metavar="MODULE",
        help="Python module with check_prompt(text) and check_picture(pixels), each giving a reason to refuse or None",
    )
    args = parser.parse_args(argv)
    try:
        args.settings = settings_of(args)
    except (OSError, TypeError, ValueError) as error:
        parser.error(error)
    return args


def settings_of(args):
    """The Settings of a command line. Raises ValueError or OSError, naming the option, for what cannot work."""
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{missing[0]} is not installed; install FBCache_ms[serve]")
    from FBCache_ms.serve.child import VISIBLE
    from FBCache_ms.serve.settings import MOST_GRAPHS, MOST_PICTURES, Settings, is_loopback

    check_range("num_inference_steps", args.num_inference_steps, 1, MAX_STEPS)
    check_range("max_steps", args.max_steps, args.num_inference_steps, MAX_STEPS)
    if args.prompt_tokens is not None:
        check_range("prompt_tokens", args.prompt_tokens, 1)
    check_range("port", args.port, 0, 65535)
    check_range("queue", args.queue, 1)
    check_range("replicas", args.replicas, 1)
    check_range("batch_wait_ms", args.batch_wait_ms, 0)
    for size in args.batch_sizes:
        check_range("batch_sizes", size, 1, MOST_PICTURES)
    devices = os.environ.get(VISIBLE)
    if devices is not None and args.ray is None and args.replicas > len(devices.split(",")):
        raise ValueError(f"--replicas {args.replicas}: {VISIBLE} names {devices} alone")
    if args.ray is not None and importlib.util.find_spec("ray") is None:
        raise ValueError("--ray needs ray; install FBCache_ms[ray]")
    for name in ("timeout", "painter_timeout", "start_timeout"):
        check_range(name, getattr(args, name), 1)
    check_quantized(args, check_checkpoint(args.ckpt))
    family, blocks = family_of(args.ckpt), block_counts(args.ckpt)
    # Clients need not know where a preset file lies.
    presets = {name_of(preset): CacheConfig.named(preset) for preset in args.presets}
    if len(presets) < len(args.presets):
        raise ValueError(f"--presets {' '.join(args.presets)}: two have the same name, by which clients ask for them")
    for name, config in presets.items():
        config.check_blocks(*blocks)
        check_steps(config, args.num_inference_steps)
    if args.negative_prompts and "true_cfg_scale" not in family.GUIDANCE:
        raise ValueError(f"--negative_prompts is not for this checkpoint: a {family.PIPELINE} takes none")
    if max(args.batch_sizes) > 1 and all(config.rules for config in presets.values()):
        raise ValueError("--batch_sizes needs a preset of a schedule alone: a gate would decide for a whole batch")
    settings = Settings(
        model=SimpleNamespace(**{name: getattr(args, name) for name in MODEL}),
        name=args.name or args.ckpt.resolve().name,
        pipeline=family.PIPELINE,
        guidance=family.GUIDANCE,
        blocks=blocks,
        sizes=sizes_of(args),
        presets=presets,
        negative_prompts=args.negative_prompts,
        prompt_tokens=args.prompt_tokens,
        batch_sizes=tuple(sorted({1, *args.batch_sizes})),
        batch_wait=args.batch_wait_ms / 1000,
        replicas=args.replicas,
        steps=args.num_inference_steps,
        max_steps=args.max_steps,
        queue=args.queue,
        timeout=args.timeout,
        painter_timeout=args.painter_timeout,
        start_timeout=args.start_timeout,
        keys=keys_of(args),
        loopback=is_loopback(args.host),
        moderation=moderation_of(args.moderation),
    )
    if settings.graphs > MOST_GRAPHS:
        raise ValueError(f"--sizes and --presets need {settings.graphs} graphs, and {MOST_GRAPHS} are kept at most")
    if not (settings.loopback or settings.keys or args.no_key):
        raise ValueError(f"--host {args.host} is open to others: give --api_keys or ${KEYS}, or say --no_key")
    return settings


def name_of(preset):
    """What clients call a preset: its name, its tag, or its file's name."""
    return Path(preset).stem if preset.endswith(".json") else preset


def sizes_of(args):
    """(width, height) of every size."""
    unit = image_unit(args.ckpt)
    if args.sizes is None:
        return ((image_size(args.ckpt),) * 2,)
    sizes = []
    for text in args.sizes:
        found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
        size = tuple(map(int, found.groups())) if found else (0, 0)
        if min(size) < 1 or any(each % unit for each in size):
            raise ValueError(f"--sizes must be like 1024x1024, in multiples of {unit}, not {text}")
        sizes.append(size)
    return tuple(dict.fromkeys(sizes))


def keys_of(args):
    """SHA-256 of each API key of the file and the environment."""
    from FBCache_ms.serve.settings import digest

    keys = os.environ.get(KEYS, "").split(",")
    if args.api_keys is not None:
        try:
            keys += args.api_keys.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise OSError(f"--api_keys {args.api_keys} cannot be read: {error.strerror}") from None
    keys = [key.strip() for key in keys if key.strip()]
    if args.api_keys is not None and not keys:
        raise ValueError(f"--api_keys {args.api_keys} has no key in it")
    return tuple(map(digest, dict.fromkeys(keys)))


def moderation_of(name):
    """The moderation hook. Raises ValueError for a module that is none."""
    if name is None:
        return None
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"--moderation {name} cannot be imported: {error}") from None
    for check in ("check_prompt", "check_picture"):
        if not callable(getattr(module, check, None)):
            raise ValueError(f"--moderation {name} has no function {check}")
    return module


def main(argv=None):
    """The command fbcache serve; returns its exit status."""
    args = parse_arguments(argv)
    from FBCache_ms.serve.child import Child
    from FBCache_ms.serve.program import listening, serve

    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("FBCache_ms").setLevel(logging.INFO)

    def work():
        start = Child.start
        if args.ray is not None:
            from FBCache_ms.serve.ray_child import RayChild, join

            join(args.ray, args.settings)
            start = RayChild.start
        listener = listening(args.host, args.port)
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"serving {args.settings.name} on http://{host}:{listener.getsockname()[1]}", flush=True)
        asyncio.run(serve(args.settings, listener, start))

    return exit_status("serve", work)


if __name__ == "__main__":
    sys.exit(main())
