"""Here because who outgrows one GPU should not outgrow the method: TRL's trainer runs it.

    torchrun --nproc_per_node 2 -m extras.train_trl --processes 2 --pool RUN/pool.jsonl

Model, task, failures and settings are those of the run that wrote the pool; sampling, loss,
optimizer and processes are GRPOTrainer's (accelerate, DeepSpeed, FSDP, vLLM), and so are
all other options. --output_dir becomes a run, as eval.py reads it. Where the two losses
differ: tests/test_witness_trl.py. TRL warms up from a rate of 0.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import transformers
import trl
from datasets import Dataset

from config import Config, open_task, plain_errors
from model import Chat, check, explain, read_json, resolve
from rrr import Episode, Rollout, Turn
from train import append, read_failures

SAME = {  # an option of ours: TRL's
    "group_size": "num_generations",
    "reflection_tokens": "max_completion_length",
    "temperature": "temperature",
    "kl_beta": "beta",
    "clip_low": "epsilon",
    "clip_high": "epsilon_high",
    "updates_per_batch": "num_iterations",
    "steps": "max_steps",
    "lr": "learning_rate",
    "warmup_ratio": "warmup_steps",  # below 1 it is a share there, too
    "checkpointing": "gradient_checkpointing",
    "save_every": "save_steps",
    "seed": "seed",
}
ALWAYS = {  # what ours does, in TRL's words
    "loss_type": "dapo",  # --loss_norm token; grpo is our sequence, dr_grpo our constant
    "use_bias_correction_kl": False,
    "lr_scheduler_type": "cosine",
    "adam_beta2": 0.99,
    "logging_steps": 1,
    "save_total_limit": 1,
    "ddp_find_unused_parameters": False,  # there are none, and the search takes time
}


class Reflections:
    """TRL's rollout_func. It trains completion_ids: these are the reflections alone. Of the
    retry, one more turn of the same engine, only the reward comes back."""

    def __init__(self, failures: list[Episode], rollout: Rollout):
        self.failures, self.rollout = failures, rollout

    def __call__(self, prompts: list[str], trainer) -> dict[str, list]:
        """prompts: this process's failures, by index, each as often as it has siblings."""
        chat, task, config = self.rollout.chat, self.rollout.task, self.rollout.config
        failures = [self.failures[int(prompt)] for prompt in prompts]
        before_reflection, before_retry, rewards = [], [], []
        for e in failures:  # the attempt is the pool's
            glue = chat.glue(task.reflect, e.attempt.ids[-1])
            before_reflection.append(e.attempt.prompt_ids + e.attempt.ids + glue)
        G, cap = trainer.num_generations, trainer.max_completion_length
        reflections, logps = write(trainer, before_reflection, cap, siblings=G)
        for ids, reflection in zip(before_reflection, reflections):
            before_retry.append(ids + reflection + chat.glue(task.retry, reflection[-1]))
        retries, _ = write(trainer, before_retry, config.retry_tokens, siblings=1)
        for e, ids in zip(failures, retries):
            retry = Turn(ids, [], True, [], chat.decode(ids))
            rewards.append(float(self.rollout.verify(e.problem, retry)["ok"]))
        trained = {"prompt_ids": before_reflection, "completion_ids": reflections}
        return trained | {"logprobs": logps, "retry_reward": rewards}


def write(trainer, conversations: list[list[int]], cap: int, siblings: int):
    """The next turns, by the trainer's own engine: ids, and log-probs (of vLLM, else None).
    It has one cap for all turns: I set it before each. siblings: equal ones in a row."""
    if trainer.use_vllm:
        trainer.vllm_generation.max_completion_length = cap
    else:
        trainer.generation_config.max_new_tokens = cap
    return trainer._generate_single_turn(conversations, None, {}, siblings)


def reward(retry_reward: list[float], **_) -> list[float]:
    return retry_reward


class Log(transformers.TrainerCallback):
    def on_log(self, args, state, control, logs, **_):
        """TRL's metrics to RUN/metrics.jsonl, and a line to the terminal."""
        if state.is_world_process_zero and "reward" in logs:
            step, seconds = state.global_step, logs["step_time"]
            append(Path(args.output_dir) / "metrics.jsonl", [{"step": step} | logs])
            print(f"step {step}: reward {logs['reward']:.2f}, {seconds:.1f} s", flush=True)


def options(argv: list[str]) -> tuple[Path, Config, trl.GRPOConfig]:
    """The pool, the options of its run, and TRL's, which begin as the run's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--pool", type=Path, default=Path("pool.jsonl"))
    parser.add_argument("--processes", type=int)
    parser.add_argument("--per_device_train_batch_size", type=int, default=8)
    ours, theirs = parser.parse_known_args(argv)
    hint = "python train.py --steps 0 --out RUN writes RUN/pool.jsonl"
    check(ours.pool.is_file(), f"--pool '{ours.pool}' is no file; {hint}.")
    with explain(f"{ours.pool.parent} is not the folder of a run", TypeError):
        config = Config(**read_json(ours.pool.parent / "config.json"))

    processes = int(os.environ.get("WORLD_SIZE", 1))  # says torchrun
    asked, hint = ours.processes, f"start with torchrun --nproc_per_node {ours.processes}"
    check(asked in (None, processes), f"--processes {asked}, but {processes} run: {hint}.")
    rows = ours.per_device_train_batch_size
    episodes, at_once = config.batch_size * config.group_size, processes * rows
    hint = f"{processes} processes with --per_device_train_batch_size {rows}"
    check(episodes % at_once == 0, f"{episodes} episodes a step do not divide into {hint}.")
    values = ALWAYS | {theirs: getattr(config, ours) for ours, theirs in SAME.items()}
    values["per_device_train_batch_size"] = rows
    values["gradient_accumulation_steps"] = episodes // at_once
    values["output_dir"] = f"{ours.pool.parent}-trl"
    values["use_cpu"] = config.device == "cpu"
    values["bf16"] = config.dtype == "bfloat16"  # the weights themselves stay float32
    parser = transformers.HfArgumentParser(trl.GRPOConfig, description=__doc__)
    parser.set_defaults(**values)
    with explain("TRL refuses these options", ValueError):
        (settings,) = parser.parse_args_into_dataclasses(theirs)
    check(settings.max_steps > 0, f"{ours.pool.parent} has no steps: say --max_steps.")
    return ours.pool, config, settings


def make_trainer(pool: Path, config: Config, settings: trl.GRPOConfig) -> trl.GRPOTrainer:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func is experimental
    folder = resolve(config.model)
    task = open_task(config)
    model = SimpleNamespace(context=config.context or 4096)  # all that a prompt asks of it
    rollout = Rollout(model, Chat(folder), task, config)
    _, failures = read_failures(pool, rollout)
    # AutoTokenizer may put a model type's own pre-tokenizer in place of the folder's.
    kind = transformers.PreTrainedTokenizerFast
    trainer = trl.GRPOTrainer(
        str(folder),
        reward,
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(len(failures))]}),
        processing_class=kind.from_pretrained(folder, padding_side="left"),
        rollout_func=Reflections(failures, rollout),
        callbacks=[Log()],
    )
    trainer.remove_callback(transformers.ProgressCallback)
    theirs, ours = sorted(trainer.eos_token_ids), sorted(rollout.chat.stop_ids)
    check(theirs == ours, f"TRL ends a turn at the ids {theirs}, ours ends it at {ours}.")
    return trainer


def main(argv=None):
    with plain_errors("extras.train_trl"):
        check(trl.__version__ == "1.16.0", "pip install trl==1.16.0: its hooks may change.")
        pool, config, settings = options(sys.argv[1:] if argv is None else argv)
        run, resume = Path(settings.output_dir), settings.resume_from_checkpoint
        check(resume or not run.exists(), f"{run} exists: choose another --output_dir.")
        settings.distributed_state.wait_for_everyone()  # before one of them writes it
        trainer = make_trainer(pool, config, settings)
        if trainer.is_world_process_zero():
            print(f"{run}: {settings.world_size} processes, {settings.max_steps} steps")
        trainer.train(resume_from_checkpoint=resume)
        folder = run / f"step-{settings.max_steps:06}"
        trainer.processing_class = None  # the source's own files take its place
        trainer.save_model(folder)  # by all processes: each may hold a part
        if trainer.is_world_process_zero():
            for name, content in Chat(resolve(config.model)).files.items():
                (folder / name).write_bytes(content)
            (run / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")


if __name__ == "__main__":
    main()
