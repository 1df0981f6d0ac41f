"""rrr.py against TRL's GRPOTrainer, the trainer that the paper extends: the same loss and
gradient.

A real GRPOTrainer is given our episodes as its rollouts: its compute_loss with log-probs
made up for the purpose, and two whole steps of its `train` on a small random model. Runs
where trl is installed. What equals what (trl 1.16):

    --loss_norm    loss_type    where they differ
    token          dapo         TRL counts the groups without signal, too; ours does not
    token          bnpo         equal in a single micro-batch only: it counts each by itself
    sequence       grpo         as in dapo: groups without signal
    constant       dr_grpo      as in dapo; the constant is max_completion_length

TRL divides advantages by the unbiased standard deviation, ours by the biased one. TRL
multiplies the KL estimate by the ratio unless use_bias_correction_kl is False, GRPO as
published does not."""

import math
import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed: pip install trl==1.16.0")
transformers = pytest.importorskip("transformers", reason="trl needs transformers==5.23.0")
from conftest import close  # noqa: E402
from datasets import Dataset  # noqa: E402
from test_loss import make_episodes, settings  # noqa: E402
from test_model import write_chat  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from model import load  # noqa: E402
from rrr import (  # noqa: E402
    TRAINED_TURNS,
    assign_advantages,
    backward,
    grpo_loss,
    make_batches,
    trained_logps,
)

LOW, HIGH = 0.2, 0.28  # not alike, so that one side's bound on the other would show
CAP, G = 24, 4  # the constant of Dr. GRPO; the group size
LOSSES = {"dapo": "token", "bnpo": "token", "grpo": "sequence", "dr_grpo": "constant"}
EQUAL = [(name, parts) for name in LOSSES for parts in (1, 3)]
EQUAL.remove(("bnpo", 3))

# Of trl and transformers, about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Qwen2 with weights so large that its distributions are far from flat."""
    folder = write_chat(tmp_path_factory.mktemp("trl") / "m")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=272,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        eos_token_id=258,
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


# ---- the same episodes for both ----


def with_own_attempts(episodes, train_on):
    """For plain GRPO, where siblings do not share their attempt."""
    if train_on == "attempt":
        for e in episodes:
            e.attempt = replace(e.attempt, ids=e.reflection.ids, logps=e.reflection.logps)
            e.reflection, e.retries = replace(e.reflection), list(e.retries)
    return episodes


def number(episodes):
    """Writes 0, 1, 2, ... where the sampler's log-probs stand, one number to a sampled
    token, so that each place in a batch tells its token. Returns how many there are."""
    count, seen = 0, set()
    for episode in episodes:
        for turn in (episode.attempt, episode.reflection, *episode.retries):
            if id(turn) not in seen:  # a group shares its attempt
                turn.logps = [float(count + i) for i in range(len(turn.ids))]
                count += len(turn.ids)
            seen.add(id(turn))
    return count


def rollouts(episodes, train_on):
    """The episodes as TRL wants them: prompt, completion, and which of its tokens were
    sampled. Made from the turns themselves, not by our `ids_and_mask`."""
    first, last = TRAINED_TURNS[train_on][0], TRAINED_TURNS[train_on][-1]
    rows = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "env_mask": []}
    for episode in episodes:
        turns = [episode.attempt, episode.reflection, *episode.retries]
        prompt = [i for turn in turns[:first] for i in turn.prompt_ids + turn.ids]
        completion, logps, mask = [], [], []
        for i, turn in enumerate(turns[first : last + 1]):
            glue = turn.prompt_ids if i else []
            completion += glue + turn.ids
            logps += [-1.0] * len(glue) + turn.logps
            mask += [0] * len(glue) + [1] * len(turn.ids)
        rows["prompt_ids"].append(prompt + turns[first].prompt_ids)
        rows["completion_ids"].append(completion)
        rows["logprobs"].append(logps)
        rows["env_mask"].append(mask)
    return rows


def make_trainer(folder, loss_type, episodes, train_on="reflection", parts=1, **more):
    """A GRPOTrainer on the folder's model, in float64, whose rollouts are the episodes, in
    `parts` micro-batches, and whose reward function returns the episodes' rewards."""
    settings = {
        "output_dir": str(folder.parent / "out"),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "loss_type": loss_type,
        "epsilon": LOW,
        "epsilon_high": HIGH,
        "num_generations": sum(episode.group == 0 for episode in episodes),
        "per_device_train_batch_size": len(episodes) // parts,
        "gradient_accumulation_steps": parts,
        "max_completion_length": CAP,
        "use_bias_correction_kl": False,
    }
    groups = len({episode.group for episode in episodes})
    trainer = GRPOTrainer(
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64),
        lambda prompts, **_: [episode.reward for episode in episodes],
        args=GRPOConfig(**(settings | more)),
        train_dataset=Dataset.from_dict({"prompt": ["-"] * groups}),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        rollout_func=lambda prompts, trainer: rollouts(episodes, train_on),
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = parts  # what `train` sets
    return trainer


def score(trainer, episodes):
    """TRL's own way from rollouts to padded tensors, masks, advantages and the token
    count."""
    return trainer._generate_and_score_completions([{"prompt": "-"}] * len(episodes))


def made_up(count, seed=0):
    """Log-probs of the model, of the model before, and of the reference, by token number;
    the last place is everything that was not sampled, with wild values. Far off-policy, in
    float64."""
    torch.manual_seed(seed)
    new = -3 * torch.rand(count + 1, dtype=torch.float64)
    old, ref = (new + 0.4 * torch.randn(count + 1, dtype=torch.float64) for _ in range(2))
    old[-1], ref[-1] = new[-1] - 2, new[-1] + 3
    return new, old, ref


# ---- the two losses, on given log-probs ----


def our_settings(**changes):
    bounds = {"clip_low": LOW, "clip_high": HIGH, "reflection_tokens": CAP}
    return settings(**(bounds | changes))


def our_loss(episodes, values, config):
    new, old, ref = values
    new = new.clone().requires_grad_()
    loss, kl_sum, clipped, tokens, sides = 0.0, 0.0, 0, 0, []
    for batch in make_batches(episodes, config):
        place = torch.where(batch.mask, batch.sampled_logps.long(), len(new) - 1)
        given_ref = ref[place] if config.kl_beta else None
        part, kl, is_clipped = grpo_loss(new[place], old[place], given_ref, batch, config)
        loss = loss + part
        assert not kl[~batch.mask].any() and not is_clipped[~batch.mask].any()
        kl_sum += kl.sum().item()
        clipped += int(is_clipped.sum())
        tokens += int(batch.mask.sum())
        sides.append((batch.advantages * is_clipped)[batch.mask])
    loss.backward()
    sides = torch.cat(sides)
    return SimpleNamespace(
        loss=loss.item(),
        grad=new.grad,
        kl=kl_sum / tokens,
        clipped=clipped / tokens,
        above=int((sides > 0).sum()),
        below=int((sides < 0).sum()),
    )


def trl_loss(trainer, episodes, values, beta, parts):
    """TRL's compute_loss, summed over `parts` micro-batches, on given log-probs and on the
    advantages of the episodes."""
    new, old, ref = values
    new = new.clone().requires_grad_()
    inputs = score(trainer, episodes)
    sampled = inputs["completion_mask"] * inputs["tool_mask"] == 1
    place = torch.where(sampled, inputs["sampling_per_token_logps"].long(), len(new) - 1)
    advantages = [episode.advantage for episode in episodes]
    inputs["advantages"] = torch.tensor(advantages, dtype=torch.float64)
    inputs["old_per_token_logps"] = old[place]
    if beta:
        inputs["ref_per_token_logps"] = ref[place]
    loss = 0.0
    for rows in torch.arange(len(episodes)).chunk(parts):
        part = {}
        for key, tensor in inputs.items():
            part[key] = tensor[rows] if tensor.dim() else tensor
        given = new[place[rows]], torch.zeros(place[rows].shape), None
        trainer._get_per_token_logps_and_entropies = lambda *_, given=given, **__: given
        loss = loss + trainer.compute_loss(trainer.model, part)
    loss.backward()
    metrics = {key: values[-1] for key, values in trainer._metrics["train"].items()}
    return SimpleNamespace(loss=loss.item(), grad=new.grad, metrics=metrics)


def distance(a, b):
    """The largest difference, relative to the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("train_on", TRAINED_TURNS)
@pytest.mark.parametrize("beta", [0.0, 0.1], ids=["no kl", "kl"])
@pytest.mark.parametrize("loss_type, parts", EQUAL)
def test_loss_and_gradient_equal_trls(folder, loss_type, parts, beta, train_on):
    """Prevents: the clip on the wrong side or with the other side's bound, a sign, KL the
    wrong way round, a denominator that is not the batch's, glue that is trained, advantages
    of a neighbour. Ratios are far from 1, both sides clip, the log-probs outside the mask
    are wild."""
    episodes = with_own_attempts(make_episodes(groups=3, G=G, seed=2), train_on)
    values = made_up(number(episodes))
    config = our_settings(train_on=train_on, loss_norm=LOSSES[loss_type], kl_beta=beta)
    ours = our_loss(episodes, values, config)
    trainer = make_trainer(folder, loss_type, episodes, train_on, parts, beta=beta)
    theirs = trl_loss(trainer, episodes, values, beta, parts)
    close("TRL, the loss", abs(ours.loss / theirs.loss - 1), 1e-5)
    close("TRL, gradient of the log-probs", distance(ours.grad, theirs.grad), 1e-5)
    assert ours.grad[-1] == theirs.grad[-1] == 0  # what was not sampled
    if parts == 1:  # TRL averages these over micro-batches
        region = theirs.metrics["clip_ratio/region_mean"]
        assert math.isclose(ours.clipped, region, rel_tol=1e-5)
        assert not beta or math.isclose(ours.kl, theirs.metrics["kl"], rel_tol=1e-5)
    # Both sides must clip, or this shows nothing.
    assert ours.above > 10 and ours.below > 10


@pytest.mark.parametrize("loss_type, parts", EQUAL)
def test_our_micro_batches_equal_trls_whole_batch(folder, loss_type, parts):
    """Prevents: a denominator that follows the micro-batches: ours are cut group by group
    here, TRL's are not cut, or cut elsewhere."""
    episodes = make_episodes(groups=6, G=G, seed=3)
    values = made_up(number(episodes), seed=1)
    norm = LOSSES[loss_type]
    config = our_settings(loss_norm=norm, kl_beta=0.1, micro_batch_tokens=1)
    ours = our_loss(episodes, values, config)
    trainer = make_trainer(folder, loss_type, episodes, parts=parts, beta=0.1)
    theirs = trl_loss(trainer, episodes, values, 0.1, parts)
    close("TRL, the loss", abs(ours.loss / theirs.loss - 1), 1e-5)
    close("TRL, gradient of the log-probs", distance(ours.grad, theirs.grad), 1e-5)


def test_known_difference_bnpo_depends_on_the_micro_batches(folder):
    """bnpo divides each micro-batch by its own tokens, ours never does. Prevents: the loss
    named `token` turning into bnpo unseen."""
    episodes = make_episodes(groups=3, G=G, seed=2)
    values = made_up(number(episodes))
    ours = our_loss(episodes, values, our_settings(micro_batch_tokens=1))
    trainer = make_trainer(folder, "bnpo", episodes, parts=3, beta=0.0)
    assert distance(trl_loss(trainer, episodes, values, 0.0, 3).grad, ours.grad) > 0.01


@pytest.mark.parametrize("loss_type", LOSSES)
def test_known_difference_groups_without_signal(folder, loss_type):
    """TRL's denominators count groups whose rewards are all equal, ours do not: without KL
    the two differ by exactly that share. Prevents: a share that changes unseen, or a
    gradient from such a group. (With KL, TRL's loss holds these groups' KL as well.)"""
    rewards = [[1.0, 0.0, 0.0, 0.0], [0.0] * 4, [1.0, 1.0, 0.0, 1.0]]
    episodes = make_episodes(groups=3, G=G, seed=4, rewards=rewards)
    values = made_up(number(episodes))
    ours = our_loss(episodes, values, our_settings(loss_norm=LOSSES[loss_type]))
    trainer = make_trainer(folder, loss_type, episodes, beta=0.0)
    theirs = trl_loss(trainer, episodes, values, 0.0, 1)
    tokens = [len(episode.reflection.ids) for episode in episodes]
    share = 2 / 3  # of the episodes
    if LOSSES[loss_type] == "token":
        share = (sum(tokens[:4]) + sum(tokens[8:])) / sum(tokens)
    close("TRL, the loss", abs(ours.loss * share / theirs.loss - 1), 1e-5)
    close("TRL, gradient of the log-probs", distance(ours.grad * share, theirs.grad), 1e-5)
    assert math.isclose(theirs.metrics["frac_reward_zero_std"], 1 / 3, rel_tol=1e-6)


def test_known_difference_trl_multiplies_kl_by_the_ratio(folder):
    """By default TRL's KL term is rho * kl, ours kl, as GRPO was published. Prevents: the
    one taken for the other. The difference is exactly that, and with KL off there is
    none."""
    episodes = make_episodes(groups=3, G=G, seed=2)
    new, old, ref = values = made_up(number(episodes))
    [batch] = make_batches(episodes, our_settings())
    place = batch.sampled_logps.long()[batch.mask]
    log_ratio, gap = (new - old)[place], (ref - new)[place]
    for beta in (0.0, 0.1):
        ours = our_loss(episodes, values, our_settings(kl_beta=beta))
        default = {"use_bias_correction_kl": True}
        trainer = make_trainer(folder, "dapo", episodes, beta=beta, **default)
        theirs = trl_loss(trainer, episodes, values, beta, 1)
        more = beta * ((log_ratio.exp() - 1) * (gap.exp() - gap - 1)).mean().item()
        assert beta == 0 or abs(more) > 1e-3
        assert math.isclose(theirs.loss - ours.loss, more, rel_tol=1e-5, abs_tol=1e-8)


# ---- advantages ----


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("retries", [1, 4])
def test_advantages_equal_trls_but_for_its_unbiased_deviation(folder, size, retries):
    """Prevents: groups mixed up, the mean or the 1e-4 in the wrong place. Ours divide by
    the group's biased standard deviation s, TRL's by the unbiased one, s * sqrt(G / (G -
    1)): ours are that much larger, a fixed factor for a fixed G. Without scaling (Dr. GRPO)
    they are equal."""
    generator = torch.Generator().manual_seed(size)
    rewards = torch.randint(0, retries + 1, (6, size), generator=generator) / retries
    rewards[0] = 1.0  # without signal
    rewards[1, 0], rewards[1, 1] = 0.0, 1.0  # with it
    episodes = make_episodes(groups=6, G=size, rewards=rewards.tolist())
    for scale in (True, False):
        assign_advantages(episodes, scale)
        how = "group" if scale else "none"
        trainer = make_trainer(folder, "dapo", episodes, beta=0.0, scale_rewards=how)
        theirs = score(trainer, episodes)["advantages"].tolist()
        assert any(theirs)
        for episode, advantage in zip(episodes, theirs, strict=True):
            s = statistics.pstdev(rewards[episode.group].tolist())
            ratio = (s * math.sqrt(size / (size - 1)) + 1e-4) / (s + 1e-4) if scale else 1.0
            near = {"rel_tol": 1e-5, "abs_tol": 1e-6}
            assert math.isclose(episode.advantage, advantage * ratio, **near)


# ---- the whole road: TRL's own forward pass, accumulation and steps ----


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("train_on", TRAINED_TURNS)
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_two_steps_of_trls_train(folder, loss_type, train_on):
    """The weights' gradient in both optimizer steps on one batch, against
    `GRPOTrainer.train` with plain SGD: its forward pass, temperature, shift, masks,
    reference model, advantages, three micro-batches and their accumulation. The first step
    is on-policy; the second is off-policy and clips. Prevents: temperature left out, a
    shift by one, a prefix that is shared wrongly, the old log-probs taken after the first
    step, gradients scaled by the number of micro-batches."""
    T, beta, lr = 0.7, 0.05, 0.05
    episodes = with_own_attempts(make_episodes(groups=3, G=G, seed=6), train_on)
    assign_advantages(episodes, scale=False)
    trainer = make_trainer(
        folder,
        loss_type,
        episodes,
        train_on,
        parts=3,
        beta=beta,
        temperature=T,
        scale_rewards="none",
        num_iterations=2,
        max_steps=2,
        optim="sgd",
        learning_rate=lr,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
    )
    steps, clipped = [], []

    class Keep(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            steps.append(gradients(model))
            clipped.append(trainer._metrics["train"]["clip_ratio/region_mean"][-3:])

    trainer.add_callback(Keep())
    trainer.train()
    assert len(steps) == 2 and not any(clipped[0]) and 0.1 < max(clipped[1]) < 0.9

    model, _ = load(str(folder), dtype=torch.float64)
    config = our_settings(
        train_on=train_on,
        loss_norm=LOSSES[loss_type],
        kl_beta=beta,
        temperature=T,
        micro_batch_tokens=1,
    )
    batches = make_batches(episodes, config)
    assert len(batches) == 3
    with torch.no_grad():
        before = [trained_logps(model, batch, T) for batch in batches]
    for i, theirs in enumerate(steps):
        model.zero_grad()
        backward(model, batches, before if i else None, before, config)
        ours = gradients(model)
        assert ours.keys() == theirs.keys()
        worst = max(distance(ours[name], theirs[name]) for name in ours)
        close("TRL, gradient of the weights in train", worst, 1e-5)
        with torch.no_grad():
            for p in model.parameters():
                p -= lr * p.grad
