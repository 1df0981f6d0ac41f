"""Here because who outgrows one GPU should not outgrow the method: TRL's trainer runs it.

    torchrun --nproc_per_node 2 -m extras.train_trl --processes 2 --pool RUN/pool.jsonl

Model, task, failures and settings are those of the run that wrote the pool; all the rest is
GRPOTrainer's. --output_dir becomes a run, as eval.py reads it.
"""

import json
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import transformers
import trl
from datasets import Dataset

from config import Config, open_task, plain_errors
from model import Chat, check, explain, resolve
from rrr import Episode, Rollout
from train import open_run, read_failures, rewrite

# An option of ours: TRL's. What is given for TRL's goes to the config.json of the new run.
SAME = {"group_size": "num_generations", "reflection_tokens": "max_completion_length"}
SAME |= {"temperature": "temperature", "updates_per_batch": "num_iterations"}
SAME |= {"kl_beta": "beta", "clip_low": "epsilon", "clip_high": "epsilon_high"}
SAME |= {"steps": "max_steps", "lr": "learning_rate", "max_grad_norm": "max_grad_norm"}
SAME |= {"checkpointing": "gradient_checkpointing", "seed": "seed"}
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))  # says torchrun
LOSS = {"token": "dapo", "sequence": "grpo", "constant": "dr_grpo"}  # --loss_norm


def explore(failures: list[Episode], rollout: Rollout, prompts: list[str], trainer) -> dict:
    """TRL's rollout_func. prompts: failures by index, each as often as it has siblings. TRL
    trains completion_ids, the reflections; of the retry only the reward comes back."""
    chat, task, config = rollout.chat, rollout.task, rollout.config
    failures = [failures[int(prompt)] for prompt in prompts]
    before = [e.attempt.prompt_ids + e.attempt.ids for e in failures]  # as in the pool
    before = [ids + chat.glue(task.reflect, ids[-1]) for ids in before]
    reflections, logps = write(trainer, before, config.reflection_tokens, config.group_size)
    both = [ids + reflection for ids, reflection in zip(before, reflections)]
    both = [ids + chat.glue(task.retry, ids[-1]) for ids in both]
    retries, _ = write(trainer, both, config.retry_tokens, 1)
    retries = [SimpleNamespace(text=chat.decode(ids)) for ids in retries]
    right = [rollout.verify(e.problem, turn)["ok"] for e, turn in zip(failures, retries)]
    trained = {"prompt_ids": before, "completion_ids": reflections, "logprobs": logps}
    return trained | {"retry_reward": list(map(float, right))}


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


def options(argv: list[str] | None) -> tuple[Path, Config, trl.GRPOConfig]:
    """The pool, the options of its run, and TRL's, which begin as the run's."""
    parser = transformers.HfArgumentParser(trl.GRPOConfig, description=__doc__)
    parser.add_argument("--pool", type=Path, default=Path("pool.jsonl"))
    parser.add_argument("--processes", type=int, default=PROCESSES)
    pool = parser.parse_known_args(argv)[0].pool
    check(pool.is_file(), f"--pool '{pool}' is no file: train.py --steps 0 writes one.")
    _, config = open_run(Config(resume=str(pool.parent)), set())  # as a resumed run's
    values = {theirs: getattr(config, ours) for ours, theirs in SAME.items()}
    values |= {"loss_type": LOSS[config.loss_norm], "use_bias_correction_kl": False}
    values |= {"scale_rewards": config.scale_advantages, "lr_scheduler_type": "cosine"}
    values |= {"adam_beta2": 0.99, "warmup_steps": config.warmup_ratio}  # below 1: a share
    values |= {"logging_steps": 1, "save_steps": config.save_every, "save_total_limit": 1}
    values |= {"use_cpu": config.device == "cpu", "bf16": config.dtype == "bfloat16"}
    parser.set_defaults(output_dir=f"{pool.parent}-trl", **values)
    given, _ = parser.parse_known_args(argv)
    asked, rows = given.processes, given.per_device_train_batch_size
    hint = f"start with torchrun --nproc_per_node {asked}"
    check(asked == PROCESSES, f"--processes {asked}, but {PROCESSES} run: {hint}.")
    episodes, at_once = config.batch_size * given.num_generations, PROCESSES * rows
    hint = f"{PROCESSES} processes with --per_device_train_batch_size {rows}"
    check(episodes % at_once == 0, f"{episodes} episodes a step do not divide into {hint}.")
    parser.set_defaults(gradient_accumulation_steps=episodes // at_once)
    with explain("TRL refuses these options", ValueError):
        settings, _ = parser.parse_args_into_dataclasses(argv)
    check(settings.max_steps > 0, f"{pool.parent} has no steps: say --max_steps.")
    for ours, theirs in SAME.items():
        setattr(config, ours, getattr(settings, theirs))
    return pool, config, settings


def make_trainer(pool: Path, config: Config, settings: trl.GRPOConfig) -> trl.GRPOTrainer:
    folder = resolve(config.model)
    model = SimpleNamespace(context=config.context or 4096)  # a prompt asks no more of it
    rollout = Rollout(model, Chat(folder), open_task(config), config)
    _, failures = read_failures(pool, rollout)
    prompts = Dataset.from_dict({"prompt": [str(i) for i in range(len(failures))]})
    parts = {"rollout_func": partial(explore, failures, rollout)}
    # AutoTokenizer may put a model type's own pre-tokenizer in place of the folder's.
    parts["processing_class"] = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    trainer = trl.GRPOTrainer(str(folder), reward, settings, prompts, **parts)
    theirs, ours = sorted(trainer.eos_token_ids), sorted(rollout.chat.stop_ids)
    check(theirs == ours, f"TRL ends a turn at the ids {theirs}, ours ends it at {ours}.")
    return trainer


def main(argv=None):
    with plain_errors("extras.train_trl"):
        check(trl.__version__ == "1.16.0", "pip install trl==1.16.0: its hooks may change.")
        pool, config, settings = options(argv)
        run, resume = Path(settings.output_dir), settings.resume_from_checkpoint
        is_first = settings.process_index == 0
        if is_first and not resume:
            check(not run.exists(), f"{run} exists: choose another --output_dir.")
        trainer = make_trainer(pool, config, settings)
        if is_first:
            print(f"{run}: {settings.world_size} processes, {settings.max_steps} steps")
        trainer.train(resume_from_checkpoint=resume)
        folder = run / f"step-{settings.max_steps:06}"
        trainer.processing_class = None  # the source's own files take its place
        trainer.save_model(folder)  # by all processes: each may hold a part
        if is_first:
            for name, content in Chat(resolve(config.model)).files.items():
                (folder / name).write_bytes(content)
            rewrite(run / "metrics.jsonl", trainer.state.log_history[:-1])
            (run / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")


if __name__ == "__main__":
    main()
