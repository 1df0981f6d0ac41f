"""Every option, once: a field is a command-line option, the comment behind it is its help.

train.py and eval.py share this one Config; a section that is for one of them says so.
`defaults_for` is what changes with the model and the device. Below: what both programs do
first, which is to read the command line and to open the model and the task.
"""

import argparse
import difflib
import inspect
import math
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import torch

from model import UserError, check, load, read_json
from rrr import TRAINED_TURNS
from tasks import get_task

# Numbers with their ranges: (type, lowest, highest).
AtLeast0 = Annotated[int, 0, math.inf]
AtLeast1 = Annotated[int, 1, math.inf]
AtLeast2 = Annotated[int, 2, math.inf]
NotNegative = Annotated[float, 0.0, math.inf]
Share = Annotated[float, 0.0, 1.0]


@dataclass
class Config:
    # what to run
    model: str = "tiny"  # tiny, a name like qwen2.5-1.5b, owner/name, a folder, a run
    task: str = "countdown"  # countdown or function_calling
    data: str = ""  # problems from a .json, .jsonl or .parquet file, or owner/name:path
    difficulty: str = ""  # of the task's own problems; 3x12: three numbers up to 12
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes a GPU where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 if fast
    context: AtLeast0 = 0  # tokens of a whole conversation (0: the model's, up to 4096)
    seed: AtLeast0 = 0  # of problems and sampling
    out: str = ""  # the folder to write (default: named after task, model and seed)

    # sampling
    attempt_tokens: AtLeast1 = 512  # cap of a first attempt, in tokens
    reflection_tokens: AtLeast1 = 256  # cap of a reflection, in tokens
    retry_tokens: AtLeast1 = 512  # cap of a retry, in tokens
    temperature: NotNegative = 1.0  # of sampling, and divided out in the loss as well
    sample_rows: AtLeast1 = 256  # conversations sampled side by side (fewer save memory)
    eval_n: AtLeast1 = 500  # held-out problems of an evaluation

    # failures (train.py)
    failures: Literal["pool", "online"] = "pool"  # before training, or fresh each step
    pool: str = ""  # take the pool.jsonl of another run in place of building one
    pool_problems: AtLeast1 = 2000  # training problems that the pool attempts
    pool_attempts: AtLeast1 = 1  # attempts at each of them (the paper: up to 64)

    # the method (train.py)
    group_size: AtLeast2 = 8  # reflections for each failure (GRPO's G)
    retries_per_reflection: AtLeast1 = 1  # the reward is their mean (the paper: 1)
    train_on: Literal[*TRAINED_TURNS] = "reflection"  # the mask
    scale_advantages: bool = True  # divide by the group's deviation (false: Dr. GRPO)
    loss_norm: Literal["token", "sequence", "constant"] = "token"  # the denominator
    kl_beta: NotNegative = 0.001  # weight of the KL term (0 loads no reference model)
    clip_low: Share = 0.2  # the ratio is clipped below 1 - clip_low
    clip_high: NotNegative = 0.2  # and above 1 + clip_high
    updates_per_batch: AtLeast1 = 1  # optimizer steps on the same episodes

    # optimization (train.py)
    steps: AtLeast0 = 200  # steps, each a batch of failures (0: only the pool)
    batch_size: AtLeast1 = 32  # failures in a step (the paper: 256)
    lr: NotNegative = 5e-7  # peak learning rate of AdamW (the paper's)
    warmup_ratio: Share = 0.03  # share of the steps in which the rate rises
    weight_decay: NotNegative = 0.0  # of AdamW
    max_grad_norm: NotNegative = 1.0  # gradients are clipped to this norm
    optimizer_device: Literal["same", "cpu"] = "same"  # cpu: masters in main memory
    micro_batch_tokens: AtLeast1 = 16384  # ids of one training pass, padding included
    checkpointing: bool = False  # recompute activations in the backward pass: less memory
    save_every: AtLeast1 = 50  # steps between checkpoints (the last step has one, too)
    resume: str = ""  # go on with a run's folder; other options must be the run's own


def defaults_for(config: Config) -> dict:
    """Where the defaults above do not fit: runs, tiny, real models on a GPU or a CPU."""
    stored = read_json(Path(config.model) / "config.json", optional=True)
    if "reflection_tokens" in stored:  # a run: what it was trained with
        names = {field.name for field in fields(Config)} & stored.keys()
        names -= {"model", "device", "seed", "out", "pool", "resume"}
        return {name: stored[name] for name in names}
    if config.model == "tiny":
        turns = {"attempt_tokens": 48, "reflection_tokens": 160, "retry_tokens": 48}
        sizes = {"sample_rows": 512, "micro_batch_tokens": 4096, "dtype": "float32"}
        own_problems = config.task == "countdown" and not config.data
        level = {"difficulty": "3x12"} if own_problems else {}
        return turns | sizes | level | {"steps": 45, "lr": 3e-4}
    if pick_device(config.device) == "cuda":  # 1.5B in 80 GB: tests/memory.py counts
        return {"checkpointing": True, "micro_batch_tokens": 8192}
    # On a CPU: enough to look at what happens, too little to learn from.
    turns = {"attempt_tokens": 128, "reflection_tokens": 96, "retry_tokens": 128}
    sizes = {
        "sample_rows": 32,
        "batch_size": 4,
        "group_size": 4,
        "micro_batch_tokens": 2048,
    }
    return turns | sizes | {"pool_problems": 16, "eval_n": 16, "steps": 10, "save_every": 5}


# ---- the command line ----
def parse(argv: list[str], description: str, program: str) -> tuple[Config, set[str]]:
    """The options of `program` (train.py or eval.py), and the names of the given ones.
    UserError, by name, for unknown options and for values of another kind or range."""
    parser = argparse.ArgumentParser(
        program,
        usage=f"python {program} [--option value ...]",
        description=description,
        epilog="For tiny, and on a CPU, some defaults differ: defaults_for in config.py.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    kinds = {field.name: field.type for field in fields(Config)}
    flags = []
    for section, options in sections().items():
        if section.endswith(".py)") and program not in section:
            continue
        group = parser.add_argument_group(section)
        for name, words in options.items():
            how = {"type": partial(convert, name, kinds[name]), "help": words}
            if get_origin(kinds[name]) is Literal:
                how["metavar"] = "|".join(get_args(kinds[name]))
            flags.append(f"--{name}")
            group.add_argument(flags[-1], **how)
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        nearest = difflib.get_close_matches(unknown[0], flags, 1) or ["--help"]
        raise UserError(f"there is no option {unknown[0]}; did you mean {nearest[0]}?")
    given = vars(given)

    config = Config(**(defaults_for(Config(**given)) | given))
    # config.json of a run says what `auto` stood for.
    config.device = pick_device(config.device)
    config.dtype = pick_dtype(config.dtype, config.device)
    return config, set(given)


def sections() -> dict[str, dict[str, str]]:
    """{section: {option: its help}}, as they stand in Config's source."""
    result = {}
    for line in inspect.getsource(Config).splitlines():
        if match := re.match(r"    # (.*)", line):
            options = result[match[1]] = {}
        elif match := re.match(r"    (\w+): .* = (.*?)  # (.*)", line):
            name, default, words = match.groups()
            options[name] = f"{words} [{default}]".replace("%", "%%")
    return result


def convert(name: str, kind, text: str):
    """The value of an option's text. UserError where it is of another kind or range."""
    if kind is str:
        return text
    if get_origin(kind) is Annotated:
        number, low, high = get_args(kind)
        try:
            value = number(text)
        except ValueError:
            value = math.nan
        what = "a whole number" if number is int else "a number"
        bounds = f"from {low} to {high}" if high < math.inf else f"of at least {low}"
        right = low <= value <= high and value < math.inf
        check(right, f"--{name} must be {what} {bounds}, found '{text}'.")
        return value
    choices = ("true", "false") if kind is bool else get_args(kind)
    check(text in choices, f"--{name} must be {' or '.join(choices)}, found '{text}'.")
    return text == "true" if kind is bool else text


def pick_device(device: str) -> str:
    """auto: a GPU where there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def pick_dtype(dtype: str, device: str) -> str:
    """auto: bfloat16 on a GPU, and on a CPU that computes in it."""
    if dtype == "auto":
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return "bfloat16" if device == "cuda" or fast else "float32"
    return dtype


# ---- what both programs do first ----
def open_model(config: Config):
    """(model, chat, task) as the options ask for; prints what was chosen."""
    task = get_task(config.task, config.data, config.difficulty)
    if config.dtype == "bfloat16":
        # The head multiplies bfloat16 factors at float32 precision: "medium" keeps that
        # exact and lets a processor use its bfloat16 units.
        torch.set_float32_matmul_precision("medium")
    dtype = getattr(torch, config.dtype)
    model, chat = load(config.model, config.device, dtype, config.context)
    if config.device == "cpu":
        try:  # samples faster, and is no part of the method
            from extras.fast_cpu import pack
        except ImportError:
            pass
        else:
            pack(model)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    where = f"{config.dtype} on {config.device}"
    print(f"{config.model}: {millions:,.1f} M parameters, {where}; {config.task}")
    return model, chat, task


@contextmanager
def plain_errors(program: str):
    """What the user can mend ends the program with a sentence, not with a traceback."""
    try:
        yield
    except UserError as error:
        sys.exit(f"{program}: {error}")
    except torch.OutOfMemoryError:
        hint = "lower --sample_rows, --micro_batch_tokens or the --*_tokens limits"
        sys.exit(f"{program}: out of GPU memory: {hint}.")
    except KeyboardInterrupt:
        sys.exit(f"{program}: stopped at once; what was saved before is untouched.")


def held_out(task, config: Config) -> list[dict]:
    """The test problems: the same for every seed, so that runs are compared on one set."""
    problems = task.problems("test", config.eval_n, 0)
    check(problems, "the data is too small: none is left to test on (one in five is).")
    return problems


def seeded(model, *names) -> torch.Generator:
    """A generator whose seed is a function of `names` alone. The draws of a step then do
    not depend on the steps before it, and a resumed run needs no stored state."""
    seed = int.from_bytes(sha256(repr(names).encode()).digest()[:7])
    return torch.Generator(next(model.parameters()).device).manual_seed(seed)


def chunks(items: list, size: int) -> list[list]:
    """Parts of at most `size` items and of about equal length."""
    n, parts = len(items), math.ceil(len(items) / size)
    return [items[n * i // parts : n * (i + 1) // parts] for i in range(parts)]
