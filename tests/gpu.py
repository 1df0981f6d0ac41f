"""Half an hour with a GPU: is it right, how fast is it, what does it hold, does it learn?

    python tests/gpu.py --model FOLDER --out DIR                  all four stages
    python tests/gpu.py --model FOLDER --out DIR --stage speed    one, in under 9 minutes
    python tests/gpu.py --model FOLDER --out DIR --stage learn    again, until it is done

FOLDER holds real weights, or is a name like tiny; speed takes random weights, too, in one
of bench.py's shapes (qwen2.5-1.5b-shapes). Each table is printed and written to
DIR/STAGE.json as soon as it is there: a call that is cut loses nothing, and `learn` goes on
where it stood. On a CPU all of it runs at toy sizes, so that no stage fails for a silly
reason when the GPU is there. Nothing is asserted: the tables are to be read.
"""

import argparse
import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import bench
import memory
import torch

import rrr
from config import chunks, open_model, parse, seeded
from eval import is_mended, percent
from extras import cuda_graphs
from model import load, resolve
from rrr import Rollout
from sampler import KVCache
from tasks import task_class
from train import read_rows

ROOT = Path(__file__).resolve().parent.parent
RUNGS = [  # task, difficulty, tools: from the easiest to the hardest of each task
    ("countdown", "3x12", "auto"),
    ("countdown", "3x20", "auto"),
    ("countdown", "3-4x99", "auto"),
    ("function_calling", "easy", "words"),
    ("function_calling", "easy", "auto"),
    ("function_calling", "normal", "words"),
    ("function_calling", "normal", "auto"),
]
ENOUGH = 0.1  # of the failures must be mended by the model's own reflections


class Report:
    """The tables of a stage: printed, and written to DIR/STAGE.json at once."""

    def __init__(self, out: Path, stage: str):
        self.path, self.tables = out / f"{stage}.json", {}
        if self.path.exists():
            self.tables = json.loads(self.path.read_text())
        self.tables["about"] = {"torch": torch.__version__, "command": " ".join(sys.argv)}
        if torch.cuda.is_available():
            self.tables["about"]["machine"] = torch.cuda.get_device_name()

    def keep(self, title: str, rows: list[dict]):
        bench.show(title, rows)
        self.tables[title] = rows
        self.path.write_text(json.dumps(self.tables, indent=1) + "\n")


def sizes(options, on_gpu: str, on_cpu: str, dtype=None) -> argparse.Namespace:
    """Options of bench.py for this model, by the device."""
    chosen = on_gpu if options.device == "cuda" else on_cpu
    same = ["--model", options.model, "--device", options.device]
    return bench.parse([*same, "--dtype", dtype or options.dtype, *chosen.split()])


def free():
    """Gives back what the work before has held."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# ---- is it right ----


def correct(options, report: Report):
    check_logits(options, report)
    check_gradients(options, report)
    check_graphs(options, report)
    name_attention(options, report)
    check_gap(options, report)


def check_logits(options, report: Report):
    """Of three prompts, against the same weights in float32 on the CPU."""
    model, chat = load(options.model, "cpu", torch.float32)
    task = task_class("countdown")("", "3-4x99")
    prompts = [chat.prompt(task.messages(p)) for p in task.problems("test", 3, 0)]
    ids = [torch.tensor([prompt]) for prompt in prompts]  # (1, T)

    def logits_of(model, device):
        with torch.no_grad():
            for prompt in ids:
                prompt = prompt.to(device)
                positions = torch.arange(prompt.shape[1], device=device)[None]  # (1, T)
                yield model.logits(model(prompt, positions)).cpu()  # (1, T, V)

    expected, rows = torch.cat(list(logits_of(model, "cpu")), dim=1), []
    for dtype in ("float32", options.dtype):
        model, _ = load(options.model, options.device, getattr(torch, dtype))
        found = torch.cat(list(logits_of(model, options.device)), dim=1)
        worst = (found - expected).abs().max() / expected.abs().max()
        same = (found.argmax(-1) == expected.argmax(-1)).float().mean()
        gap = (found.log_softmax(-1) - expected.log_softmax(-1)).exp()
        row = {"dtype": dtype, "worst, of the largest": worst.item()}
        rows.append(row | {"same best id": same.item(), "worst ratio": gap.max().item()})
    report.keep("logits, against float32 on the CPU", rows)
    free()


def check_gradients(options, report: Report):
    """Of the whole loss, in float32 there and on the CPU."""
    small = "--groups 2 --prefix 48 --reflection 12 --micro 512"
    gradients = []
    for device in ("cpu", options.device):
        here = sizes(options, small, small, dtype="float32")
        here.device = device
        model, _ = load(options.model, device, torch.float32)
        config = rrr_config(here)
        batches = bench.training_batches(here, model.config.vocab_size, config)
        reference = [batch.sampled_logps for batch in batches]
        rrr.backward(model, batches, None, reference, config)
        gradients.append({n: p.grad.cpu() for n, p in model.named_parameters()})
    rows = []
    for name, expected in gradients[0].items():
        found = gradients[1][name]
        error = (found - expected).norm() / expected.norm()
        rows.append({"weight": name, "relative error": error.item()})
    rows.sort(key=lambda row: row["relative error"], reverse=True)
    report.keep("gradients in float32, against the CPU: the five worst of all", rows[:5])
    free()


def rrr_config(here):
    config, _ = parse(["--device", here.device, "--kl_beta", "0.01"], "", "train.py")
    return replace(config, micro_batch_tokens=here.micro, loss_norm="token")


def check_graphs(options, report: Report):
    """The same draws, by replayed graphs and without. In bfloat16 a rounding may decide
    between two ids, and from there on the texts differ."""
    rows = []
    batch, new = (64, 128) if options.device == "cuda" else (4, 12)
    for dtype in ("float32", options.dtype):
        model, _ = load(options.model, options.device, getattr(torch, dtype))
        prompts = bench.random_prompts(batch, 60, model.config.vocab_size)
        for temperature in (0.0, 1.0):
            runs = {}
            for name in ("eager", "graphs"):
                if name == "graphs" and options.device == "cuda":
                    cuda_graphs.sample_by_graphs(model)
                cache = KVCache(model, batch, 60 + new)
                cache.extend(prompts)
                draws = seeded(model, "gpu.py")
                runs[name] = cache.sample(new, bench.NO_STOP, draws, temperature)
                vars(model).pop("decoding_state", None)
            rows.append({"dtype": dtype, "temperature": temperature} | compare(**runs))
    report.keep("replayed graphs, against eager steps", rows)
    free()


def compare(eager, graphs) -> dict:
    """How many turns are the same, and the log-probs up to where they part."""
    same, worst = 0, 0.0
    for ours, theirs in zip(eager, graphs, strict=True):
        same += ours.ids == theirs.ids
        for a, b, p, q in zip(ours.ids, theirs.ids, ours.logps, theirs.logps):
            if a != b:
                break
            worst = max(worst, abs(p - q))
    return {"turns": len(eager), "the same": same, "worst logp gap": worst}


def name_attention(options, report: Report):
    """Which kernels the training pass takes."""
    here = sizes(options, "--groups 2 --prefix 300 --reflection 64", "--groups 1")
    model, _ = bench.open_model(here)
    config = rrr_config(here)
    batches = bench.training_batches(here, model.config.vocab_size, config)
    with torch.profiler.profile() as profile, torch.no_grad():
        rrr.trained_logps(model, batches[0], 1.0)
    rows = []
    for event in profile.key_averages():
        words = ("attention", "attn", "fmha", "flash", "cudnn")
        if any(word in event.key.lower() for word in words):
            rows.append({"called": event.key[:90], "times": event.count})
    backends = torch.backends.cuda
    enabled = {
        "flash": backends.flash_sdp_enabled(),
        "memory efficient": backends.mem_efficient_sdp_enabled(),
        "math": backends.math_sdp_enabled(),
        "cuDNN": backends.cudnn_sdp_enabled(),
    }
    report.keep("attention in the training pass", rows + [{"called": str(enabled)}])
    free()


def check_gap(options, report: Report):
    """Between the sampler's log-probs and the trainer's, before the weights move."""
    rows = []
    for dtype in ("float32", options.dtype):
        large = "--failures 8 --group 8 --reflection 128 --retry 16"
        here = sizes(
            options, large, "--failures 2 --group 2 --reflection 8 --retry 4", dtype
        )
        work = bench.Step(*bench.open_model(here), here)
        work.run()
        gaps = {name: work.figures[f"gap_{name}"] for name in ("mean", "max", "kl")}
        rows.append({"dtype": dtype} | gaps)
    report.keep("log-probs: the trainer's minus the sampler's", rows)
    free()


# ---- how fast is it ----


def speed(options, report: Report):
    here = sizes(options, "--new 128 --runs 3", "--new 8 --runs 1")
    lengths, batches = (128, 1024), (32, 128, 256)
    if options.device == "cpu":
        lengths, batches = (16,), (2, 4)
    rows = []
    for here.prompt in lengths:
        for batch in batches:
            rows.append({"prompt": here.prompt} | bench.sampling_row(here, batch))
            report.keep(
                "decoding, against the bandwidth of a copy measured in this run", rows
            )
            free()

    large = "--groups 16 --prefix 400 --reflection 256 --micro 8192 --checkpointing"
    here = sizes(options, large, "--groups 1 --runs 1")
    row, _, _ = bench.training_row(here, "shared prefix")
    report.keep("the training pass, 8 reflections a group", [row])
    free()

    large = "--failures 32 --group 8 --prefix 400 --reflection 256 --retry 256 --micro 8192"
    small = "--failures 2 --group 2 --prefix 16 --reflection 8 --retry 8"
    here = sizes(options, f"{large} --checkpointing", small)
    work = bench.Step(*bench.open_model(here), here)
    for run in ("first", "second"):
        clock, captures = bench.Clock(), []
        record = clock.wrap("captures", cuda_graphs.record)

        def counted(*arguments, record=record, captures=captures):
            captures.append(1)
            return record(*arguments)

        with mock.patch.object(cuda_graphs, "record", counted):
            stages = work.run()
        total = sum(stages.values())
        rows = [{"stage": k, "seconds": s, "share": s / total} for k, s in stages.items()]
        took = clock.seconds.get("captures", 0.0)
        rows.append({"stage": f"{len(captures)} captures (in the above)", "seconds": took})
        rows.append({"stage": "all", "seconds": total, "GB": held(options)})
        report.keep(f"a whole step, {run}", rows)
    del work
    free()

    here = sizes(
        options, "--batches 32 256 --rounds 2 --new 128", "--batches 2 --rounds 1 --new 8"
    )
    try:
        report.keep(
            "tokens a second, against transformers", bench.against_transformers(here)
        )
    except ImportError:
        print("transformers is not there: no comparison")


def held(options) -> float:
    return bench.peak_memory(options.device) / 1e9


# ---- what does it hold ----


def memory_row(options, name: str, more: str) -> dict:
    """One step at the sizes that memory.py counts, on random weights in this shape."""
    arguments = ["--model", name, "--device", options.device, *more.split()]
    config, _ = parse(arguments, "", "train.py")
    shape = bench.model_config(bench.SHAPES[f"{name}-shapes"])
    if options.device == "cpu":  # the same road, at a size that a laptop has
        shape = bench.model_config(bench.SMALL)
        config = replace(config, sample_rows=16, micro_batch_tokens=512)
        config = replace(config, attempt_tokens=32, reflection_tokens=16, retry_tokens=16)
    steady, sampling, training = memory.count(config, shape, memory.PROMPT)
    G = config.group_size
    here = bench.parse(["--device", options.device, "--dtype", config.dtype])
    here.failures, here.group = config.sample_rows // G, G
    here.prefix = memory.PROMPT + config.attempt_tokens
    here.reflection, here.retry = config.reflection_tokens, config.retry_tokens
    here.micro, here.checkpointing = config.micro_batch_tokens, config.checkpointing
    model, chat = bench.open_model(here, shape)
    work = bench.Step(model, chat, here, optimizer_device=config.optimizer_device)
    work.run()
    row = {"model": name, "options": more, "sampling": memory.total(steady, sampling)}
    row["training"] = memory.total(steady, training)
    row["reserved"] = held(options)
    return row | {"of counted": row["reserved"] / max(row["sampling"], row["training"])}


def memory_stage(options, report: Report):
    room = math.inf
    if options.device == "cuda":
        room = torch.cuda.get_device_properties(0).total_memory / 1e9
    rows = []
    for name, more, _ in memory.TABLE:
        try:
            rows.append(bench.alone(memory_row, options, name, more))
        except torch.OutOfMemoryError as error:
            said = str(error).partition(". ")[0]
            rows.append({"model": name, "options": more, "out of memory": said})
        report.keep(f"GB, computed and reserved; the device has {room:.0f}", rows)


# ---- does it learn ----


def config_of(options, rung: tuple):
    task, difficulty, tools = rung
    arguments = ["--model", options.model, "--device", options.device]
    arguments += ["--dtype", options.dtype, "--task", task, "--difficulty", difficulty]
    return parse([*arguments, "--tools", tools, *size(options)], "", "train.py")[0]


def rung_row(options, rung: tuple, opened: list) -> dict:
    """64 failures of the untrained model, 8 reflections on each, a retry behind each; and a
    retry behind the right answer, the ceiling."""
    wanted, problems = (64, 512) if options.device == "cuda" else (2, 6)
    config = config_of(options, rung)
    if not opened:
        opened += open_model(config)[:2]
    task = task_class(config.task)("", config.difficulty)
    rollout, began = Rollout(*opened, task, config), time.perf_counter()
    generator = seeded(opened[0], "rungs")
    failures, tried = [], 0
    for chunk in chunks(task.problems("train", problems, 0), config.sample_rows):
        attempts, _ = rollout.attempt(chunk, generator)
        tried += len(attempts)
        failures += [e for e in attempts if not e.attempt_verdict["ok"]]
        if len(failures) >= wanted:
            break
    row = {"rung": " ".join(rung), "first try": 1 - len(failures) / tried}
    failures = [replace(e, group=i) for i, e in enumerate(failures[:wanted])]
    episodes, ceiling = [], 0
    for part in chunks(failures, max(1, config.sample_rows // config.group_size)):
        cache = rollout.reread(part)
        episodes += rrr.explore(part, cache.fork(1), rollout, config, generator)
        answers = [opened[1].encode(task.answer(e.problem)) for e in part]
        answers = [ids[: config.reflection_tokens] for ids in answers]
        told, cache = rollout.give(part, cache, answers)
        told, _ = rollout.retry(told, cache, 1, generator)
        ceiling += sum(map(is_mended, told))
    groups = rrr.by_group(episodes)
    row["failures"] = len(failures)
    row["mended"] = sum(e.reward for e in episodes) / max(1, len(episodes))
    row["groups with signal"] = sum(map(rrr.has_signal, groups))
    row["ceiling"] = ceiling / max(1, len(failures))
    cut = [not e.reflection.stopped for e in episodes]
    row["reflections cut"] = sum(cut) / max(1, len(cut))
    return row | {"seconds": time.perf_counter() - began}


def learn(options, report: Report):
    """First the rungs, then a run on the hardest that has signal, in pieces."""
    deadline = time.monotonic() + 60 * options.minutes
    rungs = [RUNGS[i] for i in options.rungs]
    title = "what the untrained model mends"
    rows, opened = report.tables.get(title, []), []
    for rung in rungs[len(rows) :]:
        rows.append(rung_row(options, rung, opened))
        report.keep(title, rows)
        if time.monotonic() > deadline:
            print("call again to go on")
            return
    opened.clear()
    free()
    able = [i for i, row in enumerate(rows) if row["mended"] >= ENOUGH]
    rung = rungs[able[-1]] if able else None
    if options.rung is not None:
        rung = RUNGS[options.rung]
    if rung is None:
        report.keep(
            "no run", [{"why": f"no rung is mended in {ENOUGH:.0%}: nothing to learn"}]
        )
        return
    run = Path(options.out) / "run"
    if not train_until(deadline, options, rung, run):
        show_curves(report, run)
        print("call again to go on")
        return
    show_curves(report, run)
    for name, model in (("untrained", options.model), ("trained", str(run))):
        evaluation = Path(options.out) / name
        if not (evaluation / "eval.json").exists():
            if time.monotonic() > deadline:
                print("call again for the controls")
                return
            evaluate_alone(options, rung, model, evaluation)
        content = json.loads((evaluation / "eval.json").read_text())["report"]
        shares = {"first try": content["first_try"], "second try": content["second_try"]}
        shares |= content["controls"]
        rows = [{"what": what, "share": percent(share)} for what, share in shares.items()]
        report.keep(f"{name}, on {content['problems']} held-out problems", rows)


def program(name: str, arguments: list[str]) -> list[str]:
    return [sys.executable, str(ROOT / name), *arguments]


def size(options) -> list[str]:
    """Of the run, and of what is measured before it."""
    words = "--steps 60 --eval_n 256 --pool_problems 2000"
    if options.device == "cpu":
        words = "--steps 3 --eval_n 4 --pool_problems 8 --batch_size 2 --group_size 2"
        words += " --attempt_tokens 24 --reflection_tokens 24 --retry_tokens 24"
    return [*words.split(), *options.more.split()]


def train_until(deadline: float, options, rung: tuple, run: Path) -> bool:
    """Begins or goes on, and interrupts the program at the deadline. True: it is done."""
    arguments = ["--resume", str(run)]
    if not run.exists():
        task, difficulty, tools = rung
        arguments = ["--model", options.model, "--task", task, "--difficulty", difficulty]
        arguments += ["--tools", tools, "--device", options.device, "--out", str(run)]
        arguments += "--lr 1e-6 --kl_beta 0.001 --retries_per_reflection 2".split()
        arguments += ["--eval_every", "10", "--save_every", "10", *size(options)]
    process = subprocess.Popen(program("train.py", arguments))
    try:
        return process.wait(max(30, deadline - time.monotonic())) == 0
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        process.wait()
        return False


def evaluate_alone(options, rung: tuple, model: str, out: Path):
    task, difficulty, tools = rung
    arguments = ["--model", model, "--task", task, "--difficulty", difficulty]
    arguments += ["--tools", tools, "--device", options.device, "--out", str(out)]
    subprocess.run(program("eval.py", [*arguments, *size(options)]), check=True)


def show_curves(report: Report, run: Path):
    metrics, rows = read_rows(run / "metrics.jsonl"), []
    every = 10 if len(metrics) > 10 else 1
    for i in range(0, len(metrics), every):
        part, row = (
            metrics[i : i + every],
            {"steps up to": metrics[i : i + every][-1]["step"]},
        )
        for name in ("reward", "groups_with_signal", "reflection_tokens", "kl"):
            values = [m[name] for m in part if m.get(name) is not None]
            row[name] = sum(values) / len(values) if values else None
        row["seconds a step"] = sum(sum(m["seconds"].values()) for m in part) / len(part)
        rows.append(row | {"GB": part[-1]["memory_gb"]})
    report.keep("the run, means over its steps", rows)
    rows = []
    for evaluation in read_rows(run / "eval.jsonl"):
        row = {"step": evaluation["step"], "problems": evaluation["problems"]}
        for name in ("first_try", "second_try"):
            row[name] = percent(evaluation[name])
        rows.append(row)
    report.keep("the run, on held-out problems", rows)


STAGES = {"correct": correct, "speed": speed, "memory": memory_stage, "learn": learn}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="a folder with real weights, or a name")
    add("--out", required=True, help="the folder for the tables")
    add("--stage", choices=STAGES, help="one stage [all]")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    add("--minutes", type=float, default=8.5, help="of a piece of learn [8.5]")
    add("--rungs", type=int, nargs="+", help="measure these, counted from 0 [all]")
    add("--rung", type=int, help="train on this one [the hardest that can]")
    add(
        "--more", default="", help='options of train.py for learn, as in --more "--lr 2e-6"'
    )
    options = parser.parse_args()
    bench.resolve_auto(options)
    if options.rungs is None:
        options.rungs = range(len(RUNGS)) if options.device == "cuda" else [0, 3]
    if options.model not in bench.SHAPES:
        resolve(options.model)  # or a sentence now
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    for name in [options.stage] if options.stage else STAGES:
        print(f"\n==== {name} ====", flush=True)
        STAGES[name](options, Report(out, name))


if __name__ == "__main__":
    main()
