"""Reflect, Retry, Reward (arXiv 2505.24726): from a failed attempt to a gradient.

    prompt -> attempt -> verify --yes--> done (nothing to learn from)
                           |no
                           v
          "you failed; reflect" -> REFLECTION -> "try again" -> retry -> verify -> reward
                                   ^^^^^^^^^^ the only trained tokens

A reflection whose retry succeeds, where its siblings' fail, becomes more likely. The method
comes first, on one screen, then its parts in order. Optimizer and log are in train.py.

Where the paper is silent (group size, caps, temperature, clip range, instructions) the
choice is ours. Groups whose rewards are all equal have no policy gradient: they are left
out, with their KL term. (TRL counts them in its denominators: tests/test_witness_trl.py.)
"""

from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from model import Chat, Decoder, UserError, attention, check
from sampler import KVCache, Sampled


# ---- 1. the method on one screen ----
def explore(failures, cache, rollout, config, generator) -> list["Episode"]:
    """Each failure (a row of cache that holds its attempt) gets G reflections, and each of
    them R retries. Its reward is the share that succeed; siblings are compared."""
    G, R = config.group_size, config.retries_per_reflection
    episodes, cache = rollout.reflect(failures, cache, G, generator)
    episodes, cache = rollout.retry(episodes, cache, R, generator)
    assign_advantages(episodes, config.scale_advantages)
    return episodes


def explore_attempts(problems, rollout, config, generator) -> list["Episode"]:
    """Plain GRPO on the answers, to compare with (--train_on attempt): G attempts at each
    problem, all side by side, rewarded themselves. Nothing is reflected upon."""
    G = config.group_size
    episodes, _ = rollout.attempt(repeat(problems, G), generator)
    for i, e in enumerate(episodes):
        e.group = i // G
        e.reward = float(e.attempt_verdict["ok"])
    assign_advantages(episodes, config.scale_advantages)
    return episodes


def backward(model, batches, old_logps, ref_logps, config) -> dict[str, float]:
    """Adds the loss's gradient to the weights and returns metrics. old_logps: (N, T) for
    each micro-batch, the trainer's own from before the first update; not the sampler's,
    whose rounding differs. None with one update a batch: then this pass's logps, detached,
    take their place, and the ratio is exactly 1. ref_logps: the reference's, or None."""
    metrics = defaultdict(float)
    trained_tokens = sum(int(batch.mask.sum()) for batch in batches)  # for metrics alone
    for i, batch in enumerate(batches):
        logps = trained_logps(model, batch, config.temperature)  # (N, T)
        old = old_logps[i] if old_logps else logps.detach()  # (N, T)
        ref = ref_logps[i] if ref_logps else None
        loss, kl, clipped = grpo_loss(logps, old, ref, batch, config)
        loss.backward()  # logps are constant where the mask is 0: no gradient there

        gap = (logps.detach() - batch.sampled_logps)[batch.mask]  # (M,)
        metrics["loss"] += loss.item()  # its value says little (grpo_loss): watch reward
        metrics["kl"] += kl.sum().item() / trained_tokens  # mean, against the reference
        metrics["clip_fraction"] += clipped.sum().item() / trained_tokens  # of tokens
        # Trainer's minus sampler's log-probs: rounding alone, before the weights move.
        metrics["gap_mean"] += gap.abs().sum().item() / trained_tokens  # mean |gap|
        metrics["gap_max"] = max(metrics["gap_max"], gap.abs().max().item())  # max |gap|
        metrics["gap_kl"] += -gap.sum().item() / trained_tokens  # KL(sampler || trainer)
    return dict(metrics)


# ---- 2. the data ----
@dataclass
class Turn(Sampled):
    """A sampled turn (ids, logps, stopped) with what the model read before it. prompt_ids +
    ids, turn after turn, is the conversation as the model saw it."""

    prompt_ids: list[int]  # the prompt, or glue
    text: str  # of ids, for verifiers and eyes


@dataclass
class Episode:
    """One problem from attempt to advantage: each stage fills the next fields."""

    problem: dict
    group: int  # siblings share the attempt
    attempt: Turn
    attempt_verdict: dict  # a tasks.Verdict
    reflection: Turn | None = None
    retries: list[Turn] = field(default_factory=list)
    retry_verdicts: list[dict] = field(default_factory=list)
    reward: float | None = None  # successes / R
    advantage: float | None = None


# ---- 3. three stages: attempt, reflect, retry ----
class Rollout:
    """The turns of an episode, for one model and one task. Each stage returns episodes and
    the KV cache that holds their conversations, one a row. Glue is what the chat template
    writes between two sampled turns: end of turn, instruction, the assistant's header."""

    def __init__(self, model: Decoder, chat: Chat, task, config):
        self.model, self.chat, self.task, self.config = model, chat, task, config
        self.room = config.reflection_tokens + config.retry_tokens  # behind the attempt
        self.room += len(chat.glue(task.reflect)) + len(chat.glue(task.retry))

    def prompt(self, problem) -> list[int]:
        """Its prompt's ids. UserError where a conversation could overrun the context."""
        native = self.chat.native_tools and self.config.tools == "auto"
        tools = self.task.tools(problem) if native else None
        messages = self.task.messages(problem, native_tools=tools is not None)
        ids = self.chat.prompt(messages, tools)
        longest = len(ids) + self.config.attempt_tokens + self.room
        found = f"{problem['key'][:60]} may take {longest} tokens"
        hint = f"raise --context ({self.model.context}) or lower the caps, --*_tokens"
        check(longest <= self.model.context, f"{found}: {hint}.")
        return ids

    def fitting(self, problems: list[dict]) -> list[dict]:
        """The problems without those that `prompt` refuses. UserError if it refuses all."""
        fits = []
        for problem in problems:
            with suppress(UserError):
                self.prompt(problem)
                fits.append(problem)
        if problems and not fits:
            self.prompt(problems[0])  # says why
        if len(fits) < len(problems):
            print(f"{len(problems) - len(fits)} problems left out: beyond --context.")
        return fits

    def attempt(self, problems, generator):
        """First answers to the problems, verified; problem i begins group i."""
        prompts = [self.prompt(problem) for problem in problems]
        cap = self.config.attempt_tokens
        cache = self.read(prompts, cap + self.room)
        turns = self.write(cache, prompts, cap, generator)
        episodes = []
        for i, turn in enumerate(turns):
            verdict = self.verify(problems[i], turn)
            episodes.append(Episode(problems[i], i, turn, verdict))
        return episodes, cache

    def reflect(self, failures: list[Episode], cache: KVCache, G: int, generator):
        """G reflections on each failure: its row reads the instruction and is forked."""
        glue = [self.chat.glue(self.task.reflect, e.attempt.ids[-1]) for e in failures]
        cache.extend(glue)
        cache = cache.fork(G)
        failures = repeat(failures, G)
        glue = repeat(glue, G)
        turns = self.write(cache, glue, self.config.reflection_tokens, generator)
        return [replace(e, reflection=turn) for e, turn in zip(failures, turns)], cache

    def retry(self, episodes: list[Episode], cache: KVCache, R: int, generator):
        """R retries behind each reflection (or, as a control, attempt), verified."""
        last_turns = [e.reflection or e.attempt for e in episodes]
        glue = [self.chat.glue(self.task.retry, turn.ids[-1]) for turn in last_turns]
        cache.extend(glue)
        if R > 1:
            cache = cache.fork(R)
            glue = repeat(glue, R)
        turns = self.write(cache, glue, self.config.retry_tokens, generator)
        done = []
        for i, e in enumerate(episodes):
            retries = turns[i * R : (i + 1) * R]
            verdicts = [self.verify(e.problem, turn) for turn in retries]
            reward = sum(verdict["ok"] for verdict in verdicts) / R
            done.append(replace(e, retries=retries, retry_verdicts=verdicts, reward=reward))
        return done, cache

    def give(self, failures: list[Episode], cache: KVCache, reflections: list[list[int]]):
        """In place of `reflect`, for eval.py's controls: each failure is given this one."""
        episodes, pieces = [], []
        for e, ids in zip(failures, reflections):
            glue = self.chat.glue(self.task.reflect, e.attempt.ids[-1])
            turn = Turn(ids, [], True, glue, self.chat.decode(ids))
            episodes.append(replace(e, reflection=turn))
            pieces.append(glue + ids)
        cache.extend(pieces)
        return episodes, cache

    def reread(self, attempts: list[Episode]) -> KVCache:
        """A cache that holds these attempts again."""
        conversations = [e.attempt.prompt_ids + e.attempt.ids for e in attempts]
        return self.read(conversations, self.room)

    def read(self, conversations: list[list[int]], room: int) -> KVCache:
        """A new cache that holds these ids, with room for so many more in each row."""
        longest = max(map(len, conversations))
        cache = KVCache(self.model, len(conversations), longest + room)
        cache.extend(conversations)
        return cache

    def write(self, cache: KVCache, prompts, max_tokens: int, generator) -> list[Turn]:
        """Samples the next turn of each row; prompts: what the row has just read."""
        stop_ids, temperature = self.chat.stop_ids, self.config.temperature
        turns = []
        for i, s in enumerate(cache.sample(max_tokens, stop_ids, generator, temperature)):
            text = self.chat.decode(s.ids)
            turns.append(Turn(s.ids, s.logps, s.stopped, prompts[i], text))
        return turns

    def verify(self, problem, turn) -> dict:
        text = "<think>" + turn.text if self.chat.thinks else turn.text
        return asdict(self.task.verify(problem, text))


def repeat(items: list, n: int) -> list:
    """Each item n times, side by side: the order of KVCache.fork."""
    return [item for item in items for _ in range(n)]


# ---- 4. the reward becomes an advantage ----
def assign_advantages(episodes: list[Episode], scale: bool = True):
    """A_i = (r_i - mean r) / (std r + 1e-4) within each group (std over the group,
    unbiased=False); scale=False leaves the division out (Dr. GRPO, arXiv 2503.20783)."""
    for group in by_group(episodes):
        rewards = torch.tensor([e.reward for e in group], dtype=torch.float64)  # (G,)
        advantages = rewards - rewards.mean()  # (G,)
        if scale:
            advantages /= rewards.std(correction=0) + 1e-4
        for episode, advantage in zip(group, advantages.tolist()):
            episode.advantage = advantage


def by_group(episodes: list[Episode]) -> list[list[Episode]]:
    groups = {}
    for episode in episodes:
        groups.setdefault(episode.group, []).append(episode)
    return list(groups.values())


# ---- 5. ids and mask, made together ----
# Which turns are trained: 0 is the attempt, 1 the reflection, 2 the retry.
TRAINED_TURNS = {"reflection": (1,), "reflection+retry": (1, 2), "everything": (0, 1, 2)}
TRAINED_TURNS["attempt"] = (0,)  # plain GRPO, see explore_attempts


def ids_and_mask(episode: Episode, train_on: str = "reflection"):
    """The conversation up to its last trained turn: ids, mask (is it trained?), and the
    sampler's logps, made together so that they cannot drift apart. A stop token is trained
    if it was sampled; a turn that was cut at its cap has none."""
    trained_turns = TRAINED_TURNS[train_on]
    # Retries are trained only where there is one (train.py checks that).
    turns = [episode.attempt, episode.reflection, *episode.retries[:1]]
    ids, mask, logps = [], [], []
    for i, turn in enumerate(turns[: trained_turns[-1] + 1]):
        ids += turn.prompt_ids
        mask += [False] * len(turn.prompt_ids)
        logps += [0.0] * len(turn.prompt_ids)
        ids += turn.ids
        mask += [i in trained_turns] * len(turn.ids)
        logps += turn.logps
    return ids, mask, logps


@dataclass
class Batch:
    """N groups, one a row: the prefix that siblings share, run once, then what each has of
    its own. The prefix's last id is not in segment 0 but opens each segment 1..G, whose
    first own id it predicts. -1 is padding. Targets, mask, weights and sampled_logps are
    shifted: of the id that comes next. For a prefix "a b c", reflections "x y." and "z.":

        ids        a b   c x y   c z
        segments   0 0   1 1 1   2 2
        positions  0 1   2 3 4   2 3
        targets    - -   x y .   z .
        mask       0 0   1 1 1   1 1
    """

    ids: Tensor  # (N, T) int64
    segments: Tensor  # (N, T) int64
    positions: Tensor  # (N, T) int64
    targets: Tensor  # (N, T) int64
    mask: Tensor  # (N, T) bool: trained tokens
    weights: Tensor  # (N, T) float32: 1 / denominator where the mask is 1, else 0
    sampled_logps: Tensor  # (N, T) float32
    advantages: Tensor  # (N, T) float32


def make_batches(episodes: list[Episode], config) -> list[Batch]:
    """Episodes with advantages -> micro-batches of whole groups with signal. Each has at
    most micro_batch_tokens, padding included, or a single group."""
    groups = [group for group in by_group(episodes) if has_signal(group)]
    # The denominator is counted once: how I cut the batch must not change the gradient.
    tokens, kept = 0, sum(groups, [])
    for episode in kept:
        _, mask, _ = ids_and_mask(episode, config.train_on)
        tokens += sum(mask)
    rows = [make_row(group, tokens, len(kept), config) for group in groups]
    # Longest first: like lengths together, and what exceeds the memory does so at once.
    rows.sort(key=lambda row: len(row["ids"]), reverse=True)
    batches = []
    while rows:
        N = max(1, config.micro_batch_tokens // len(rows[0]["ids"]))
        tensors = {}
        for name in rows[0]:
            values = [torch.tensor(row[name], device=config.device) for row in rows[:N]]
            padding = -1 if name == "segments" else 0
            tensors[name] = pad_sequence(values, batch_first=True, padding_value=padding)
        batches.append(Batch(**tensors))
        rows = rows[N:]
    return batches


def has_signal(group: list[Episode]):
    return len({episode.reward for episode in group}) > 1


def denominator(mask: list[bool], tokens: int, episodes: int, config) -> int:
    """What an episode's loss is divided by; tokens and episodes are the whole batch's.
    token      tokens, the trained ones of all episodes
    sequence   the episode's own trained tokens, times episodes (GRPO)
    constant   the cap of a reflection, times episodes (Dr. GRPO)"""
    if config.loss_norm == "token":
        return tokens
    if config.loss_norm == "sequence":
        return sum(mask) * episodes
    return config.reflection_tokens * episodes


def make_row(group: list[Episode], tokens: int, episodes: int, config) -> dict[str, list]:
    """A group's row, by the names of Batch: the prefix, then what each episode adds."""
    ids, mask, _ = ids_and_mask(group[0], config.train_on)
    P = mask.index(True) - 1  # index of the prefix's last id, the same for all siblings
    row = {"ids": ids[:P], "segments": [0] * P, "positions": list(range(P))}
    row["mask"] = [False] * P
    for name in ("targets", "weights", "sampled_logps", "advantages"):
        row[name] = [0] * P
    for segment, episode in enumerate(group, start=1):
        ids, mask, logps = ids_and_mask(episode, config.train_on)
        ids, targets = ids[P:-1], ids[P + 1 :]
        mask, logps = mask[P + 1 :], logps[P + 1 :]
        n, weight = len(ids), 1 / denominator(mask, tokens, episodes, config)
        row["ids"] += ids
        row["segments"] += [segment] * n
        row["positions"] += range(P, P + n)
        row["targets"] += targets
        row["mask"] += mask
        row["weights"] += [weight * trained for trained in mask]
        row["sampled_logps"] += logps
        row["advantages"] += [episode.advantage] * n
    return row


# ---- 6. the training pass ----
HEAD_CHUNK = 1024  # positions that meet the vocabulary at a time: it is the largest tensor


def visible(segments: Tensor) -> Tensor:
    """Which keys a query may see, (N, T, T) bool: segment 0 and its own, up to itself. In
    the example of Batch:
        x sees   a b   c x -   - -
        z sees   a b   - - -   c z
    """
    query, key = segments[:, :, None], segments[:, None, :]
    T = segments.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=segments.device).tril()  # (T, T)
    return ((key == 0) | (key == query)) & causal  # (N, T, T)


def trained_logps(model: Decoder, batch: Batch, temperature: float) -> Tensor:
    """log pi(target) at the sampling temperature, (N, T) float32, 0 where the mask is 0."""

    def target_logps(hidden, targets):  # (m, C), (m,) -> (m,)
        logits = model.logits(hidden) / temperature  # (m, V)
        return -F.cross_entropy(logits, targets, reduction="none")

    attend = partial(attention, visible=visible(batch.segments))
    hidden = model(batch.ids, batch.positions, attend)  # (N, T, C)
    # Untrained positions drop out here and never meet the vocabulary. No logits are kept:
    # the backward pass computes them again, chunk by chunk.
    hidden, targets = hidden[batch.mask], batch.targets[batch.mask]  # (M, C), (M,)
    parts = []
    for i in range(0, len(targets), HEAD_CHUNK):
        h, t = hidden[i : i + HEAD_CHUNK], targets[i : i + HEAD_CHUNK]
        parts.append(checkpoint(target_logps, h, t, use_reentrant=False))
    logps = torch.cat(parts)  # (M,)
    return logps.new_zeros(batch.mask.shape).masked_scatter(batch.mask, logps)


# ---- 7. the loss ----
def grpo_loss(logps: Tensor, old_logps: Tensor, ref_logps: Tensor | None, batch, config):
    """GRPO (arXiv 2402.03300, eq. 3), summed over the trained tokens; all (N, T).

        rho  = exp(logp - old_logp)
        L_pg = -min(rho * A, clip(rho, 1 - clip_low, 1 + clip_high) * A)
        kl   = exp(ref_logp - logp) - (ref_logp - logp) - 1          (k3)
        L    = sum of weights * (L_pg + kl_beta * kl)

    Returns the loss and, per token, the KL estimate and whether the clip is active. On the
    first update rho is 1, so the policy's part of L is -(sum of weights * A), whatever
    the model has learnt: its gradient is what counts."""
    A = batch.advantages
    ratio = torch.exp(logps - old_logps)
    clipped_ratio = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    per_token = -torch.min(ratio * A, clipped_ratio * A)
    kl = torch.zeros_like(logps)
    if ref_logps is not None:
        kl = torch.exp(ref_logps - logps) - (ref_logps - logps) - 1
        per_token = per_token + config.kl_beta * kl
    loss = (batch.weights * per_token).sum()
    is_clipped = (clipped_ratio * A < ratio * A) & batch.mask
    return loss, kl.detach() * batch.mask, is_clipped
