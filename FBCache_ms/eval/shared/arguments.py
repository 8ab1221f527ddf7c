"""What the programs' command lines share: the options, their checks, and the device they choose."""

import argparse
import errno
import math
import os
import shlex
import sys
import textwrap
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path

from FBCache_ms.cache.gates import check_steps
from FBCache_ms.config import OPTIONS, PRESETS, CacheConfig
from FBCache_ms.eval.shared.files import Into, check_folder
from FBCache_ms.eval.shared.ranks import group_and_groups
from FBCache_ms.predict.sharing import SCHEMES
from FBCache_ms.rules.options import did_you_mean, value_text
from FBCache_ms.rules.schedules import MAX_STEPS
from FBCache_ms.runtime.checkpoint import TINY_FLUX, block_counts, check_checkpoint, family_of, image_unit
from FBCache_ms.runtime.quantize import QUANT_TYPES, QuantizeConfig, check_parts


class AUTO:
    """Stands for the user's own folder of compiled graphs, in every process."""


TYPED = ContextVar("TYPED", default=None)
"""What a person typed to start a program, where it is another one that starts it, as fbcache does."""


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help that tells every default; a description's paragraphs are filled, its indented lines stay."""

    def _fill_text(self, text, width, indent):
        parts = text.strip().split("\n\n")
        return "\n\n".join(part if part[0] == " " else textwrap.fill(" ".join(part.split()), width) for part in parts)

    def _get_help_string(self, action):
        text, default = action.help or "", action.default
        if isinstance(action, argparse.BooleanOptionalAction):
            # Pythons before 3.13 tell the default of these alone, as Python writes it.
            return f"{text.split(' (default: ')[0]} (default: {'yes' if default else 'no'})"
        if action.nargs == 0 or action.required or "default: " in text:
            return text
        values = default if isinstance(default, (list, tuple)) else [default]
        shown = "none" if default in (None, []) else " ".join(map(str, values)).replace("%", "%%")
        return f"{text} (default: {shown})".strip()


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose usage is what a person types, and whose errors are one line without it.

    Args:
        module: ``__name__`` of the program's module.
        name: the program's own, before an error.
        usage: what is typed behind the program.
    """

    def __init__(self, module, name, usage="[options]", **settings):
        self.name, self.given = name, []
        usage = f"%(prog)s {usage}"
        super().__init__(typed(module, name), usage, formatter_class=Formatter, allow_abbrev=False, **settings)

    def error(self, message):
        self.exit(2, f"{self.name}: error: {one_line(message)}\n")

    def parse_args(self, args=None, namespace=None):
        self.given = sys.argv[1:] if args is None else args
        args, unknown = self.parse_known_args(args, namespace)
        if unknown:
            names = [name for action in self._actions for name in action.option_strings]
            self.error(f"unrecognized arguments: {' '.join(unknown)}{did_you_mean(unknown[0].split('=')[0], names)}")
        return args

    def _check_value(self, action, value):
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(value, action.choices)
            raise


def typed(module, name):
    """What a person typed to start the program of this module: its name, unless it was started as a file."""
    if TYPED.get() or module != "__main__":
        return TYPED.get() or name
    spec, started, here = sys.modules["__main__"].__spec__, Path(sys.argv[0]), Path.cwd()
    started = started.relative_to(here) if started.is_relative_to(here) else started
    return f"{Path(sys.executable).name} {f'-m {spec.name}'.removesuffix('.__main__') if spec else started}"


def one_line(error):
    """An error's message as one line."""
    return " ".join(str(error).split())


def add_context_parallel(add):
    """--context_parallel and its scheme, for programs whose pictures several devices may share."""
    add(
        "--context_parallel",
        type=int,
        default=1,
        metavar="N",
        help="how many devices share a picture, under msrun (default: 1)",
    )
    add(
        "--context_parallel_scheme",
        choices=SCHEMES,
        default=SCHEMES[0],
        help="what they exchange in attention: keys and values (default), or heads there and back",
    )


def add_model_options(add, deterministic=False, compile_cache=False):
    """--ckpt, and where and how it runs; ``deterministic`` is that option's default.

    With ``compile_cache`` a CPU's graphs are kept in the user's folder for them unless the options say otherwise.
    """
    add(
        "--ckpt",
        type=Path,
        default=TINY_FLUX,
        metavar="PATH",
        help="folder in diffusers layout (default: the embedded checkpoint)",
    )
    add(
        "--quantize",
        nargs="+",
        metavar=("KIND", "COMPONENT"),
        help=f"round weights to int8 while loading: {' or '.join(QUANT_TYPES)} (its layers' inputs, too), and which "
        "components (default: the transformer), such as transformer text_encoder_2",
    )
    add("--device", choices=("auto", "Ascend", "CPU"), default="auto", help="auto: Ascend where there is one")
    add(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        help="auto: bfloat16 on Ascend, float32 on CPU; there bfloat16 is that of the blocks' matrices alone",
    )
    add(
        "--jit_level",
        choices=("auto", "O0", "O1"),
        default="auto",
        help="how far a graph is optimised: O0 launches its operators one by one, O1 fuses neighbouring ones, which "
        "saves launches and memory traffic; auto: O1 on Ascend, MindSpore's own choice on CPU, where it gains nothing",
    )
    add(
        "--lazy_inline",
        action="store_true",
        help="compile a block once for all its copies, which takes a fraction of the time and half the memory at "
        "FLUX.1's 57 blocks; on Ascend alone",
    )
    add(
        "--deterministic",
        action=argparse.BooleanOptionalAction,
        default=deterministic,
        help="the same bits at every run: an NPU's fastest kernels sum in any order, a CPU's do not",
    )
    add(
        "--compile_cache",
        type=Path,
        default=AUTO if compile_cache else None,
        metavar="FOLDER",
        help="keep compiled graphs there, a folder for all that shapes one, so that another process starts from them "
        f"(default: {'on a CPU FBCache_ms in $XDG_CACHE_HOME or ~/.cache, else none' if compile_cache else 'none'})",
    )
    add(
        "--no-compile_cache",
        dest="compile_cache",
        action="store_const",
        const=None,
        help="compile every graph anew and keep none",
    )


def add_picture_options(add):
    """--negative_prompt, --image_size, --num_inference_steps, --guidance_scale, --true_cfg_scale and --seed."""
    add("--negative_prompt", metavar="TEXT", help="what not to show; takes effect with --true_cfg_scale above 1")
    add("--image_size", type=int, nargs=2, metavar=("H", "W"), help="pixels (default: the model's own size)")
    add("--num_inference_steps", type=int, default=28, metavar="N", help="steps of the denoise loop")
    add("--guidance_scale", type=float, metavar="G", help="of the guidance embedding (default: 3.5, FLUX.2 4)")
    add(
        "--true_cfg_scale",
        type=float,
        metavar="G",
        help="of true classifier-free guidance; 1: none (default: 1, Qwen-Image 4 with a negative prompt)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the noise that a picture begins as")


PROMPTS = "a prompt a line, JSON, DrawBench's CSV or MSCOCO's captions (default: prompts of our own)"


def add_drawing_options(parser, limit, save_path, deterministic=True, context_parallel=True, prompts=PROMPTS):
    """The options of every program that draws many prompts; the rest of the arguments are their defaults.

    ``context_parallel`` says whether several devices may share a picture, ``prompts`` what the file of them holds.
    """
    add = parser.add_argument_group("model").add_argument
    add_model_options(add, deterministic)
    if context_parallel:
        add_context_parallel(add)
    add = parser.add_argument_group("pictures").add_argument
    add(
        "--prompts",
        type=Path,
        metavar="FILE",
        help=prompts,
    )
    add("--limit", type=int, default=limit, metavar="N", help="how many prompts")
    add_picture_options(add)
    add_save_path(parser.add_argument_group("output").add_argument, save_path)


def add_save_path(add, save_path, what="tables and pictures"):
    """--save_path, a folder."""
    add("--save_path", type=Path, default=Path(save_path), metavar="FOLDER", help=f"where {what} are written")


def add_into_option(parser):
    """--into; files.check_into and files.put_into take what it gives, an Into or None."""

    def into(file):
        title = parser.name.replace("_", " ").capitalize()
        return Into(Path(file), title, f"{parser.prog} {shlex.join(parser.given)}")

    parser.add_argument(
        "--into",
        type=into,
        metavar="FILE",
        help="also write what it found into this Markdown file, with the command, the date and the machine",
    )


def add_clip_option(parser):
    """--clip; after parsing, ``args.clip`` is the folder, None for no CLIP score."""
    parser.add_argument(
        "--clip",
        type=Path,
        metavar="FOLDER",
        help="a CLIPModel in transformers layout, such as openai/clip-vit-large-patch14, for the CLIP score (default: "
        "a small one for the embedded checkpoint, none for others)",
    )


def check_model_and_size(args):
    """Raises ValueError or OSError for a checkpoint, a seed or a size that cannot work."""
    check_range("num_inference_steps", args.num_inference_steps, 1, MAX_STEPS)
    check_range("seed", args.seed, 0)
    check_quantized(args, check_checkpoint(args.ckpt))
    if hasattr(args, "context_parallel"):
        check_range("context_parallel", args.context_parallel, 1)
        scheme = args.context_parallel_scheme
        if args.context_parallel == 1 and scheme != SCHEMES[0]:
            raise ValueError(f"--context_parallel_scheme {scheme} needs a --context_parallel above 1")
        group_and_groups(args.context_parallel)
        if args.context_parallel > 1 and os.environ.get("MS_ROLE") == "MS_SCHED":
            # msrun's scheduler draws nothing; it serves the cluster until that ends.
            device_of(args)
            sys.exit(0)
    check_guidance(args)
    if args.image_size is not None:
        unit = image_unit(args.ckpt)
        if min(args.image_size) < 1 or any(size % unit for size in args.image_size):
            raise ValueError(
                f"--image_size must be positive multiples of {unit}, not {' '.join(map(str, args.image_size))}"
            )


def check_quantized(args, tensors):
    """Sets args.quantize to a QuantizeConfig, or None; ``tensors`` are the checkpoint's.

    Raises ValueError for an unknown kind or component, or one that is quantised already.
    """
    if args.quantize is not None:
        kind, *components = args.quantize
        chosen = {"components_to_quantize": components} if components else {}
        args.quantize = QuantizeConfig(kind, **chosen)
        check_parts(args.ckpt, tensors, args.quantize)


def check_guidance(args):
    """Sets the scales that the command line does not give: None where the pipeline takes none, 1 for no true CFG.

    Raises ValueError for what is no finite number, or is not taken, and for true CFG without a negative prompt.
    """
    if args.true_cfg_scale is not None and args.true_cfg_scale > 1 and args.negative_prompt is None:
        raise ValueError("--true_cfg_scale above 1 needs a --negative_prompt")
    family = family_of(args.ckpt)
    for name in ("guidance_scale", "true_cfg_scale"):
        given = getattr(args, name)
        if given is None:
            setattr(args, name, family.GUIDANCE.get(name))
        elif name not in family.GUIDANCE:
            taken = ", ".join(family.GUIDANCE)
            raise ValueError(f"--{name} is not for this checkpoint: a {family.PIPELINE} takes {taken}")
        elif not math.isfinite(given):
            raise ValueError(f"--{name} must be a finite number, not {given}")
    if args.negative_prompt is None and args.true_cfg_scale is not None:
        args.true_cfg_scale = 1.0
    elif args.negative_prompt is not None and args.true_cfg_scale is None:
        raise ValueError(f"--negative_prompt is not for this checkpoint: a {family.PIPELINE} takes none")


def guidance_of(args):
    """The scales that a pipeline's call takes, by name."""
    return {name: getattr(args, name) for name in family_of(args.ckpt).GUIDANCE}


def branches_of(args):
    """How many branches a step has: 2 under true classifier-free guidance, which takes the negative prompt too."""
    return 2 if args.negative_prompt is not None and args.true_cfg_scale > 1 else 1


def check_range(name, value, low, high=None):
    """Raises ValueError, naming the option, for a number outside [low, high], an infinite one, or what is none."""
    if high is None and value == math.inf:
        raise ValueError(f"--{name} must be finite, not {value}")
    if not value >= low or high is not None and not value <= high:
        allowed = f"{low} or more" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"--{name} must be {allowed}, not {value}")


def check_cache(config, ckpt, steps):
    """Raises ValueError for a CacheConfig that this checkpoint or this number of steps does not allow."""
    config.check_blocks(*block_counts(ckpt))
    check_steps(config, steps)


GROUPS = {
    "gate": "what decides",
    "limits": "limits",
    "schedule": "steps known before",
    "span": "blocks",
    "forecast": "what is added on a reused step",
}
"""Of CacheConfig's fields."""


def add_cache_options(parser):
    """--cache, and an option for each field of CacheConfig, in its groups."""
    add = parser.add_argument_group("cache").add_argument
    add(
        "--cache",
        metavar="TAG|PRESET",
        help=f"a tag like F1B0_W4M0MC0_T1O2_R0.12, a preset file (.json), or one of {', '.join(PRESETS)}; the options "
        f"below change it (default: {CacheConfig()})",
    )
    groups = {group: parser.add_argument_group(f"cache: {title}") for group, title in GROUPS.items()}
    for name, option in OPTIONS.items():
        default = "" if option.default is None else f" (default: {value_text(option.default)})"
        choices = option.allowed if option.kind is str else None
        groups[option.group].add_argument(
            f"--{name}",
            metavar=None if choices else name.split("_")[-1].upper(),
            choices=choices,
            help=(option.text + default).replace("%", "%%"),
        )


def cache_config(args):
    """The CacheConfig of the cache options."""
    config = CacheConfig() if args.cache is None else CacheConfig.named(args.cache)
    given = {name: getattr(args, name) for name in OPTIONS}
    changes = {name: OPTIONS[name].parse(name, text) for name, text in given.items() if text is not None}
    return config.changed(**changes)


def quiet():
    """Keeps MindSpore's and transformers' warnings off the terminal, unless the user has set their levels.

    They are about a graph's compilation and prompts that mindone says itself that it cuts short.
    """
    os.environ.setdefault("GLOG_v", "3")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def device_of(args):
    """Sets the process to the device that the options name and returns its Device.

    Where devices share a picture, msrun's scheduler process stays here.

    Raises ValueError for what cannot be, OSError for a --compile_cache that cannot be written to.
    """
    from FBCache_ms.runtime.device import choose_device
    from FBCache_ms.runtime.imports import quick_imports

    automatic = args.compile_cache is AUTO
    compile_cache = None if automatic else args.compile_cache
    if compile_cache is not None:
        check_folder(compile_cache, "compile_cache")
    options = args.device, args.dtype, args.jit_level, args.lazy_inline, args.deterministic, compile_cache
    with quick_imports():
        device = choose_device(*options)
    if getattr(args, "context_parallel", 1) > 1:
        from FBCache_ms.runtime.parallel import begin_communication

        begin_communication()
    # Nobody has tried it on an NPU yet, where it has to be asked for.
    return replace(device, compile_cache=users_compile_cache()) if automatic and device.name == "CPU" else device


def users_compile_cache():
    """The user's folder of compiled graphs; None where there can be none, or MindSpore's own cache is on."""
    if os.environ.get("MS_COMPILER_CACHE_ENABLE") == "1":
        return None
    from FBCache_ms.runtime.compile_cache import users_folder

    try:
        check_folder(users_folder())
    except OSError:
        return None
    return users_folder()


def reason(error):
    """What went wrong, and what to do about a full disk."""
    if not isinstance(error, OSError) or error.filename is None:
        return str(error)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    hint = "; what is made stays: free some space and start again, it goes on" if full else ""
    return f"{error.filename}: {error.strerror}{hint}"


def exit_status(program, work):
    """Runs ``work()`` and returns the exit status; a user's mistake is one line on stderr and status 2."""
    quiet()
    try:
        work()
    except KeyboardInterrupt:
        print(f"{program}: interrupted; what is made stays", file=sys.stderr)
        return ended(130)
    except (OSError, TypeError, ValueError) as error:
        print(f"{program}: error: {one_line(reason(error))}", file=sys.stderr)
        return ended(2)
    return 0


def ended(status):
    """The status; a process that others wait for ends here."""
    parallel = sys.modules.get("FBCache_ms.runtime.parallel")
    return status if parallel is None else parallel.leave(status)
