"""Every option, once: each field of Config is an option, of train.py and of eval.py.

`--help` prints them as they stand here; `defaults_for` has what depends on model or device.
"""

import argparse
import difflib
import inspect
import os
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import partial
from hashlib import sha256
from math import ceil, inf, nan
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import torch

from model import UserError, check, load, read_json
from rrr import TRAINED_TURNS
from tasks import task_class

# Numbers with their ranges: type, lowest, highest.
AtLeast0 = Annotated[int, 0, 1_000_000]
AtLeast1 = Annotated[int, 1, 1_000_000]
AtLeast2 = Annotated[int, 2, 1_000_000]
NotNegative = Annotated[float, 0.0, inf]
Share = Annotated[float, 0.0, 1.0]


@dataclass
class Config:
    # what to run
    model: str = "tiny"  # tiny, a name like qwen2.5-1.5b, owner/name, a folder, a run
    task: str = "countdown"  # countdown or function_calling
    data: str = ""  # problems from a .json, .jsonl or .parquet file, or owner/name:path
    difficulty: str = ""  # of the task's own problems; 3x12: three numbers up to 12
    tools: Literal["auto", "words"] = "auto"  # words: never by the chat template
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes a GPU where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 if fast
    context: AtLeast0 = 0  # tokens of a whole conversation (0: the model's, up to 4096)
    seed: Annotated[int, 0, inf] = 0  # of whatever is drawn
    out: str = ""  # the folder to write (default: named after task, model and seed)

    # sampling
    attempt_tokens: AtLeast1 = 512  # a first attempt is cut at so many tokens
    reflection_tokens: AtLeast1 = 256  # and a reflection
    retry_tokens: AtLeast1 = 512  # and a retry
    temperature: NotNegative = 1.0  # of sampling, and divided out in the loss as well
    sample_rows: AtLeast1 = 256  # conversations sampled side by side (fewer save memory)
    eval_n: AtLeast1 = 500  # held-out problems of an evaluation

    # failures (training only, like all below)
    failures: Literal["pool", "online"] = "pool"  # before training, or fresh each step
    pool: str = ""  # take the pool.jsonl of another run in place of building one
    pool_problems: AtLeast1 = 2000  # training problems that the pool attempts
    pool_attempts: AtLeast1 = 1  # attempts at each of them (the paper: up to 64)

    # the method
    reflect: str = ""  # what the user says after a failure (default: the task's words)
    retry: str = ""  # and after the reflection
    group_size: AtLeast2 = 8  # reflections for each failure (GRPO's G)
    retries_per_reflection: AtLeast1 = 1  # the reward is their mean (the paper: 1)
    train_on: Literal[*TRAINED_TURNS] = "reflection"  # the turns whose tokens are trained
    scale_advantages: bool = True  # divide by the group's deviation (false: Dr. GRPO)
    loss_norm: Literal["token", "sequence", "constant"] = "token"  # see rrr.denominator
    kl_beta: NotNegative = 0.001  # weight of the KL term (0 loads no reference model)
    clip_low: Share = 0.2  # the ratio is clipped below 1 - clip_low
    clip_high: NotNegative = 0.2  # and above 1 + clip_high
    updates_per_batch: AtLeast1 = 1  # optimizer steps on the same episodes

    # optimization
    steps: AtLeast0 = 200  # steps, each a batch of failures (0: only the pool)
    batch_size: AtLeast1 = 32  # failures in a step (the paper: 256)
    lr: NotNegative = 5e-7  # peak learning rate of AdamW (the paper's)
    warmup_ratio: Share = 0.03  # share of the steps in which the rate rises
    max_grad_norm: NotNegative = 1.0  # gradients are clipped to this norm
    optimizer_device: Literal["same", "cpu"] = "same"  # cpu: masters in main memory
    micro_batch_tokens: AtLeast1 = 16384  # ids of one training pass, padding included
    checkpointing: bool = False  # recompute activations in the backward pass: less memory
    eval_every: AtLeast0 = 0  # steps between evaluations on 64 problems (0: none)
    save_every: AtLeast1 = 50  # steps between checkpoints (the last step has one, too)
    resume: str = ""  # go on with a run's folder; other options must be the run's own


def defaults_for(config: Config) -> dict:
    """What differs from the defaults above. config.device is resolved."""
    stored = read_json(Path(config.model) / "config.json", optional=True)
    if "reflection_tokens" in stored:  # a run: what it was trained with
        names = stored.keys() - {"model", "device", "seed", "out", "pool", "resume"}
        kept = [field for field in fields(Config) if field.name in names]
        return {field.name: convert(field, str(stored[field.name])) for field in kept}
    if config.model == "tiny":
        changed = {"attempt_tokens": 48, "reflection_tokens": 160, "retry_tokens": 48}
        changed |= {"sample_rows": 512, "micro_batch_tokens": 4096, "dtype": "float32"}
        own = {"countdown": "3x12", "function_calling": "mini"}
        changed["difficulty"] = "" if config.data else own.get(config.task, "")
        return changed | {"steps": 36, "lr": 3e-4, "eval_every": 9}
    if config.device == "cuda":  # results/gpu.md says why
        changed = {"checkpointing": True, "micro_batch_tokens": 8192}
        return changed | {"steps": 600, "lr": 1e-6, "pool_problems": 8000, "eval_every": 50}
    # On a CPU: enough to look at what happens, too little to learn from.
    changed = {"attempt_tokens": 128, "reflection_tokens": 96, "retry_tokens": 128}
    changed |= {"sample_rows": 32, "batch_size": 4, "group_size": 4}
    changed |= {"micro_batch_tokens": 2048, "pool_problems": 16, "eval_n": 16}
    return changed | {"steps": 10, "save_every": 5}


# ---- the command line ----
def parse(argv: list[str], description: str, program: str) -> tuple[Config, set[str]]:
    """The options, and the names of those given. UserError names one that is wrong."""
    parser = argparse.ArgumentParser(
        program,
        usage=f"python {program} [--option value]",
        description=f"{description}\n\n{inspect.getsource(Config)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    options = {f"--{field.name}": field for field in fields(Config)}
    for flag, field in options.items():
        parser.add_argument(flag, type=partial(convert, field), help=argparse.SUPPRESS)
    given, rest = parser.parse_known_args(argv)
    if rest:
        nearest = difflib.get_close_matches(rest[0], options, 1) or ["--help"]
        raise UserError(f"there is no option {rest[0]}; did you mean {nearest[0]}?")
    config = Config(**vars(given))
    if config.device == "auto":  # a run's config.json tells what was used
        config.device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.dtype == "auto":
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        config.dtype = "bfloat16" if fast or config.device == "cuda" else "float32"
    defaults = defaults_for(config)
    if "task" in given and defaults.get("task", config.task) != config.task:
        for name in ("data", "difficulty", "reflect", "retry"):  # of the run's own task
            defaults.pop(name, "")
    for name, value in defaults.items():
        if name not in given:
            setattr(config, name, value)
    task = task_class(config.task)  # its words are part of a run
    config.reflect = config.reflect or task.reflect
    config.retry = config.retry or task.retry
    return config, set(vars(given))


def convert(field, text: str):
    """The value of an option's text. UserError where it is of another kind or range."""
    if field.type is str:
        return text
    if get_origin(field.type) is Annotated:
        number, low, high = get_args(field.type)
        try:
            value = number(text)
        except ValueError:
            value = nan
        kind = "a whole number" if number is int else "a number"
        fits = low <= value <= high and value < inf
        check(fits, f"--{field.name} must be {kind} from {low} to {high}, found '{text}'.")
        return value
    choices = ["true", "false"] if field.type is bool else get_args(field.type)
    text = text.lower()
    wanted = " or ".join(choices)
    check(text in choices, f"--{field.name} must be {wanted}, found '{text}'.")
    return text == "true" if field.type is bool else text


# ---- what both programs do first ----
def open_model(config: Config):
    """(model, chat, task) as the options ask for; prints what was chosen."""
    task = open_task(config)
    check(task.problems("test", 1, 0), "the data is too small: none is left to test on.")
    # In bfloat16 fast, and exact: what is multiplied in float32 are bfloat16 factors.
    level = "medium" if config.dtype == "bfloat16" else "highest"
    torch.set_float32_matmul_precision(level)
    # cuDNN's attention plans anew, up to seconds, for the shape of each micro-batch.
    torch.backends.cuda.enable_cudnn_sdp(False)
    dtype = getattr(torch, config.dtype)
    model, chat = load(config.model, config.device, dtype, config.context)
    with suppress(ImportError):  # faster sampling, which is no part of the method
        from extras import cuda_graphs, fast_cpu

        speed_up = fast_cpu.pack if config.device == "cpu" else cuda_graphs.sample_by_graphs
        speed_up(model)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{config.model}: {millions:,.1f} M weights, {config.dtype} on {config.device}")
    return model, chat, task


def open_task(config: Config):
    """The task with its problems, and the words that the options have for it."""
    clash = config.data and config.difficulty
    check(not clash, "--difficulty is for a task's own problems, not for those of --data.")
    task = task_class(config.task)(config.data, config.difficulty)
    task.reflect = config.reflect or task.reflect
    task.retry = config.retry or task.retry
    return task


@contextmanager
def plain_errors(program: str):
    """What the user can mend ends the program with a sentence, not with a traceback."""
    try:
        yield
    except UserError as error:
        sys.exit(f"{program}: {error}")
    except torch.OutOfMemoryError:
        sys.exit(f"{program}: no GPU memory: lower --sample_rows, --micro_batch_tokens.")
    except BrokenPipeError:
        os._exit(1)  # quietly: what read our output has ended
    except KeyboardInterrupt:
        sys.exit(f"{program}: stopped. A run that was begun goes on with --resume.")


def write_page(folder: Path):
    """FOLDER/report.html, where extras/ stands: to look at what was done."""
    with suppress(ImportError):
        from extras.report import at_the_end

        at_the_end(folder)


def seeded(model, *names):
    """A generator seeded by `names` alone: to resume a run, no state need be stored."""
    seed = int.from_bytes(sha256(repr(names).encode()).digest()[:7])
    return torch.Generator(next(model.parameters()).device).manual_seed(seed)


def chunks(items: list, size: int):
    """Parts of at most `size` items and of about equal length."""
    n, parts = len(items), ceil(len(items) / size)
    return [items[n * i // parts : n * (i + 1) // parts] for i in range(parts)]
