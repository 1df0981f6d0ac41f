"""Reflect, Retry, Reward: the method of arXiv 2505.24726, from a problem to the loss.

    prompt -> attempt -> verify --yes--> done (nothing to learn from)
                           |no
                           v
             "you failed; reflect" -> REFLECTION -> "try again" -> retry -> verify -> reward 0/1
                                      ^^^^^^^^^^ the only trained tokens

Read from the top: settings, data, the three stages, the reward, the batch and its mask, the loss.
In a step of training each failure gets G reflections, and each reflection a retry. A reflection
whose retry succeeds, where its siblings' fail, becomes more likely.

Where this differs from the paper, or the paper is silent:
 1. The paper extends TRL's GRPOTrainer; here everything is written out.
 2. Group size, token limits, temperature, clip range and the exact prompts are not in the paper:
    `Method` has our numbers, tasks/ our words.
 3. A failure's prefix (prompt, attempt, instruction) runs once per group in the training pass, not
    once per reflection. The result is the same (tests/test_loss.py).
 4. Groups whose rewards are all equal have no policy gradient; they are left out of the training
    pass, and their KL term with them.
 5. `retries_per_reflection` > 1 makes the reward the mean of several retries. 1 is the paper's.
 6. With one update a batch the ratio is exactly 1: its denominator is the trainer's own log-prob,
    not the sampler's, whose rounding differs.
"""

import json
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from model import Chat, Decoder, UserError, causal
from sampler import Conversations

HEAD_CHUNK = 2048  # positions that meet the vocabulary at a time: the largest tensor there is


# ---- settings: each field is a command-line option, its comment the help ----


@dataclass
class Sampling:
    attempt_tokens: int = 512  # cap of a first attempt, in tokens
    reflection_tokens: int = 256  # cap of a reflection, in tokens
    retry_tokens: int = 512  # cap of a retry, in tokens
    temperature: float = 1.0  # of sampling, and divided out in the loss as well
    sample_rows: int = 256  # conversations sampled side by side (lower it to save memory)


@dataclass
class Method(Sampling):
    group_size: int = 8  # reflections for each failure (GRPO's G)
    retries_per_reflection: int = 1  # retries a reflection; its reward is their mean (the paper: 1)
    train_on: str = "reflection"  # reflection; for ablations: reflection+retry, everything
    scale_advantages: bool = True  # divide by the group's standard deviation (off: Dr. GRPO)
    loss_norm: str = "token"  # token (the batch's mean), sequence (GRPO), constant (Dr. GRPO)
    kl_beta: float = 0.001  # weight of the KL term (0 loads no reference model)
    clip_low: float = 0.2  # the ratio is clipped below 1 - clip_low
    clip_high: float = 0.2  # and above 1 + clip_high
    updates_per_batch: int = 1  # optimizer steps on the same episodes


TRAINED_TURNS = {"reflection": (1,), "reflection+retry": (1, 2), "everything": (0, 1, 2)}


# ---- the data ----


@dataclass
class Turn:
    """What was read and what was written. prompt_ids + ids, turn after turn, is the conversation
    as the model saw it, id for id; `text` is for verifiers and eyes."""

    prompt_ids: list[int]  # the prompt; in later turns the glue: end of turn, instruction, header
    ids: list[int]  # the sampled ids, the stop token included
    logps: list[float]  # of ids, at the sampling temperature, as the sampler saw them
    text: str
    stopped: bool  # False: cut at the cap


@dataclass
class Episode:
    """One problem's road. Each stage fills the next fields and overwrites none."""

    problem: dict
    group: int  # episodes of one group share the failed attempt
    attempt: Turn
    attempt_verdict: dict  # {"ok", "error", "detail"}: tasks.Verdict
    reflection: Turn | None = None
    retries: list[Turn] = field(default_factory=list)
    retry_verdicts: list[dict] = field(default_factory=list)
    reward: float | None = None  # the share of retries that succeeded
    advantage: float | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> "Episode":
        data = json.loads(line)
        data["attempt"] = Turn(**data["attempt"])
        data["reflection"] = data["reflection"] and Turn(**data["reflection"])
        data["retries"] = [Turn(**turn) for turn in data["retries"]]
        return cls(**data)


# ---- the three stages ----


class Rollout:
    """The three turns of an episode, for one model and one task. A conversation is one growing KV
    cache: what `attempt` (or `reread`) leaves there serves `reflect`, and what that leaves serves
    `retry`. Nothing runs twice."""

    def __init__(self, model: Decoder, chat: Chat, task, settings: Sampling, **narrowed):
        """`narrowed`: temperature, top_k or top_p other than training's, for evaluation."""
        self.model, self.chat, self.task, self.settings = model, chat, task, settings
        self.drawing = {"temperature": settings.temperature} | narrowed
        self.room = settings.attempt_tokens + settings.reflection_tokens + settings.retry_tokens
        self.room += len(chat.glue(task.reflect, -1)) + len(chat.glue(task.retry, -1))

    def prompt(self, problem: dict) -> list[int]:
        """Ids of the problem's prompt. UserError where an episode could overrun the context."""
        tools = self.task.tools(problem) if self.chat.native_tools else None
        ids = self.chat.prompt(self.task.messages(problem, native_tools=tools is not None), tools)
        if len(ids) + self.room > self.model.context:
            raise UserError(
                f"the prompt of {problem['key'][:60]} has {len(ids)} tokens; with {self.room} for "
                f"the turns that exceeds the context of {self.model.context}: raise --context, or "
                "lower --attempt_tokens, --reflection_tokens and --retry_tokens."
            )
        return ids

    def attempt(self, problems: list[dict], generator, desc="attempts"):
        """First answers, verified; group i is problem i. Returns episodes and conversations."""
        prompts = [self.prompt(problem) for problem in problems]
        conversations = Conversations(self.model, len(problems), max(map(len, prompts)) + self.room)
        conversations.extend(prompts)
        turns = self._write(conversations, prompts, self.settings.attempt_tokens, generator, desc)
        verdicts = [self._verify(problem, turn) for problem, turn in zip(problems, turns)]
        groups = range(len(problems))
        return [Episode(*row) for row in zip(problems, groups, turns, verdicts)], conversations

    def reread(self, failures: list[Episode]) -> Conversations:
        """The conversations of attempts that were sampled earlier (the failure pool)."""
        read = [failure.attempt.prompt_ids + failure.attempt.ids for failure in failures]
        conversations = Conversations(self.model, len(failures), max(map(len, read)) + self.room)
        conversations.extend(read)
        return conversations

    def reflect(self, failures, conversations, G: int, generator, desc="reflections"):
        """G reflections on each failure, side by side: its cache is forked, group i is failure i.
        Returns G episodes for each failure, and their conversations."""
        glue = [self.chat.glue(self.task.reflect, failure.attempt.ids[-1]) for failure in failures]
        conversations.extend(glue)
        conversations = conversations.fork(G)
        glue = [piece for piece in glue for _ in range(G)]
        turns = self._write(conversations, glue, self.settings.reflection_tokens, generator, desc)
        groups = [i // G for i in range(len(turns))]
        rows = [replace(failures[g], group=g, reflection=turn) for g, turn in zip(groups, turns)]
        return rows, conversations

    def quote(self, failures, conversations, reflections: list[list[int]]) -> list[Episode]:
        """In place of `reflect`, for controls: each failure is given a reflection not its own."""
        glue = [self.chat.glue(self.task.reflect, failure.attempt.ids[-1]) for failure in failures]
        conversations.extend([piece + ids for piece, ids in zip(glue, reflections)])
        texts = map(self.chat.decode, reflections)
        rows = zip(glue, reflections, texts)
        turns = [Turn(piece, ids, [], text, True) for piece, ids, text in rows]
        return [replace(failure, reflection=turn) for failure, turn in zip(failures, turns)]

    def retry(self, episodes, conversations, R: int, generator, desc="retries") -> None:
        """R retries on each reflection, verified: fills in retries, retry_verdicts and reward."""
        last_ids = [(episode.reflection or episode.attempt).ids[-1] for episode in episodes]
        glue = [self.chat.glue(self.task.retry, last_id) for last_id in last_ids]
        conversations.extend(glue)
        conversations = conversations.fork(R) if R > 1 else conversations
        glue = [piece for piece in glue for _ in range(R)]
        turns = self._write(conversations, glue, self.settings.retry_tokens, generator, desc)
        for i, episode in enumerate(episodes):
            episode.retries = turns[i * R : (i + 1) * R]
            verdicts = [self._verify(episode.problem, turn) for turn in episode.retries]
            episode.retry_verdicts = verdicts
            episode.reward = sum(verdict["ok"] for verdict in verdicts) / R

    def _write(self, conversations, prompts, max_tokens, generator, desc) -> list[Turn]:
        stops = self.chat.stop_ids
        sampled = conversations.sample(max_tokens, stops, generator, desc=desc, **self.drawing)
        texts = [self.chat.decode(s.ids) for s in sampled]
        rows = zip(prompts, sampled, texts)
        return [Turn(prompt, s.ids, s.logps, text, s.stopped) for prompt, s, text in rows]

    def _verify(self, problem, turn):
        return asdict(self.task.verify(problem, turn.text))


# ---- the reward becomes an advantage ----


def assign_advantages(episodes: list[Episode], scale: bool = True) -> None:
    """A_i = (r_i - mean r) / (std r + 1e-4) within each group (std over the group, unbiased=False);
    scale=False leaves the division out (Dr. GRPO). A group of equal rewards gets zeros."""
    groups = {}
    for episode in episodes:
        groups.setdefault(episode.group, []).append(episode)
    for group in groups.values():
        rewards = torch.tensor([episode.reward for episode in group], dtype=torch.float64)  # (G,)
        centred = rewards - rewards.mean()
        advantages = centred / (rewards.std(correction=0) + 1e-4) if scale else centred
        for episode, advantage in zip(group, advantages.tolist()):
            episode.advantage = advantage


# ---- the batch and its mask ----


@dataclass
class Batch:
    """N groups of G episodes, for the shared-prefix pass. Already shifted: `targets` are the ids
    that the positions of `suffix` predict. For a prefix "a b c", reflections "x y." and "z."
    (N = 1, G = 2, R = 3; 0 is padding):

        prefix   a b          suffix  c x y     targets  x y .     mask  1 1 1
                                      c z 0              z . 0           1 1 0
    """

    prefix: Tensor  # (N, P) int64, right-padded: what the G episodes share, but for its last id
    prefix_lengths: Tensor  # (N,) int64
    suffix: Tensor  # (N, G, R) int64, right-padded: that last id, then its own but the last
    targets: Tensor  # (N, G, R) int64
    mask: Tensor  # (N, G, R) bool: the trained tokens are exactly these
    weights: Tensor  # (N, G, R) float32: mask / denominator
    sampled_logps: Tensor  # (N, G, R) float32: the sampler's, for comparison
    advantages: Tensor  # (N, G, 1) float32

    def to(self, device) -> "Batch":
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def spans(episode: Episode, train_on: str) -> tuple[list[int], list[int], list[bool], list[float]]:
    """The conversation, cut where training starts: the prefix's ids; from there on ids, trained?,
    and sampled logps. Ids and mask are made together, here and nowhere else. The sampled stop token
    is trained like any other; a turn that was cut has none."""
    trained = TRAINED_TURNS[train_on]
    turns = [episode.attempt, episode.reflection, *episode.retries[:1]][: trained[-1] + 1]
    prefix, ids, mask, logps = [], [], [], []
    for i, turn in enumerate(turns):
        if i <= trained[0]:
            prefix += turn.prompt_ids
        else:
            ids += turn.prompt_ids
            mask += [False] * len(turn.prompt_ids)
            logps += [0.0] * len(turn.prompt_ids)
        if i < trained[0]:
            prefix += turn.ids
        else:
            ids += turn.ids
            mask += [i in trained] * len(turn.ids)
            logps += turn.logps
    return prefix, ids, mask, logps


def make_batches(
    episodes: list[Episode], train_on: str, loss_norm: str, constant: int, max_tokens: int
) -> list[Batch]:
    """Episodes with advantages -> micro-batches of whole groups, of at most max_tokens ids each
    (padding included; a single group may be larger). Groups without signal are left out.

    The denominators are counted here, once, over the whole batch, so that the sum of the
    micro-batches' losses does not depend on how they are cut:
        token      the trained tokens of the batch
        sequence   an episode's trained tokens, times the number of episodes (GRPO)
        constant   `constant` (a cap in tokens), times the number of episodes (Dr. GRPO)
    """
    groups = {}
    for episode in episodes:
        groups.setdefault(episode.group, []).append(episode)
    groups = [group for group in groups.values() if len({episode.reward for episode in group}) > 1]
    groups = [[(episode, *spans(episode, train_on)) for episode in group] for group in groups]
    sizes = [sum(mask) for group in groups for *_, mask, _ in group]  # by episode
    total, count = sum(sizes), len(sizes)

    def denominator(mask):
        per_sequence = {"sequence": sum(mask) * count, "constant": constant * count}
        return per_sequence.get(loss_norm, total)

    def shape(some):  # P and R of a micro-batch
        longest = max(len(row[2]) for group in some for row in group)
        return max(len(group[0][1]) for group in some) - 1, longest

    # Longest first: like lengths together, and what exceeds the memory does so at once.
    groups.sort(key=lambda group: sum(shape([group])), reverse=True)
    cuts, batches = [], []
    for group in groups:
        P, R = shape([*cuts[-1], group]) if cuts else (0, 0)
        if cuts and (len(cuts[-1]) + 1) * (P + len(group) * R) <= max_tokens:
            cuts[-1].append(group)
        else:
            cuts.append([group])
    for some in cuts:
        (P, R), N, G = shape(some), len(some), len(some[0])
        batch = Batch(
            prefix=torch.zeros(N, P, dtype=torch.long),
            prefix_lengths=torch.tensor([len(group[0][1]) - 1 for group in some]),
            suffix=torch.zeros(N, G, R, dtype=torch.long),
            targets=torch.zeros(N, G, R, dtype=torch.long),
            mask=torch.zeros(N, G, R, dtype=torch.bool),
            weights=torch.zeros(N, G, R),
            sampled_logps=torch.zeros(N, G, R),
            advantages=torch.tensor([[[row[0].advantage] for row in group] for group in some]),
        )
        for n, group in enumerate(some):
            batch.prefix[n, : batch.prefix_lengths[n]] = torch.tensor(group[0][1][:-1])
            for g, (_, prefix, ids, mask, logps) in enumerate(group):
                batch.suffix[n, g, : len(ids)] = torch.tensor(prefix[-1:] + ids[:-1])
                batch.targets[n, g, : len(ids)] = torch.tensor(ids)
                batch.mask[n, g, : len(ids)] = torch.tensor(mask)
                batch.weights[n, g, : len(ids)] = torch.tensor(mask) / denominator(mask)
                batch.sampled_logps[n, g, : len(ids)] = torch.tensor(logps)
        batches.append(batch)
    return batches


# ---- the training pass: the prefix once, the reflections on it ----


def shared_prefix(batch: Batch):
    """The attention strategy of the training pass. Each row of the pass is one group, laid out as
    prefix (P) | suffix 1 (R) | ... | suffix G (R); a suffix sees the prefix and itself."""
    (N, P), (_, G, R) = batch.prefix.shape, batch.suffix.shape
    columns = torch.arange(P + R, device=batch.prefix.device)
    own = columns - P <= torch.arange(R, device=columns.device)[:, None]  # (R, P + R): causal
    prefix = columns < batch.prefix_lengths[:, None]  # (N, P + R): its padding is not seen
    visible = torch.where(columns < P, prefix[:, None], own)  # (N, R, P + R)
    visible = visible[:, None, None].expand(N, G, 1, R, P + R).reshape(N * G, 1, R, P + R)

    def attend(layer, q, k, v):  # q (N, H, P + G*R, D); k, v (N, KV, P + G*R, D)
        heads = q.shape[1] // k.shape[1]  # query heads that share a key head
        k, v = k.repeat_interleave(heads, dim=1), v.repeat_interleave(heads, dim=1)  # (N, H, ., D)
        of_prefix = causal(layer, q[:, :, :P], k[:, :, :P], v[:, :, :P])  # (N, H, P, D)

        def suffixes(x):  # (N, H, P + G*R, D) -> (N*G, H, R, D)
            return x[:, :, P:].unflatten(2, (G, R)).transpose(1, 2).flatten(0, 1)

        def with_prefix(x):  # (N, H, P + G*R, D) -> (N*G, H, P + R, D)
            shared = x[:, None, :, :P].expand(-1, G, -1, -1, -1).flatten(0, 1)
            return torch.cat((shared, suffixes(x)), dim=2)

        q, k, v = suffixes(q), with_prefix(k), with_prefix(v)
        of_suffix = scaled_dot_product_attention(q, k, v, attn_mask=visible)  # (N*G, H, R, D)
        of_suffix = of_suffix.unflatten(0, (N, G)).transpose(1, 2).flatten(2, 3)  # (N, H, G*R, D)
        return torch.cat((of_prefix, of_suffix), dim=2)

    return attend


def trained_logps(model: Decoder, batch: Batch, temperature: float) -> Tensor:
    """log pi(target) at the sampling temperature, (N, G, R) float32, 0 where the mask is 0.
    Only trained positions meet the vocabulary, HEAD_CHUNK at a time, and again in the backward
    pass, so that no logits are kept."""
    (N, P), (_, G, R) = batch.prefix.shape, batch.suffix.shape
    ids = torch.cat((batch.prefix, batch.suffix.flatten(1)), dim=1)  # (N, P + G*R)
    before = torch.arange(P, device=ids.device).expand(N, P)
    after = batch.prefix_lengths[:, None] + torch.arange(R, device=ids.device).repeat(G)  # (N, G*R)
    # Padding may run beyond the context; it is never read.
    positions = torch.cat((before, after), dim=1).clamp(max=model.context - 1)  # (N, P + G*R)
    hidden = model(ids, positions, shared_prefix(batch))[:, P:].unflatten(1, (G, R))  # (N, G, R, C)

    def head(hidden, targets):  # (M, C), (M,) -> (M,)
        logits = model.logits(hidden) / temperature  # (M, V)
        return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(dim=1)

    trained = hidden[batch.mask].split(HEAD_CHUNK), batch.targets[batch.mask].split(HEAD_CHUNK)
    logps = torch.cat([checkpoint(head, *chunk, use_reentrant=False) for chunk in zip(*trained)])
    return logps.new_zeros(N, G, R).masked_scatter(batch.mask, logps)


# ---- the loss ----


def grpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    weights: Tensor,
    ref_logps: Tensor | None = None,
    kl_beta: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[Tensor, dict[str, Tensor]]:
    """GRPO (arXiv 2402.03300, eq. 3). Log-probs and weights (N, G, R), the weights 0 outside the
    trained tokens; advantages (N, G, 1). Returns the loss and, per token (N, G, R), the KL estimate
    and where the clip is active.

        rho  = exp(logp - old_logp)
        L_pg = -min(rho * A, clip(rho, 1 - clip_low, 1 + clip_high) * A)
        kl   = exp(ref_logp - logp) - (ref_logp - logp) - 1          (k3)
        L    = sum of weights * (L_pg + kl_beta * kl)

    On the first update rho is 1, so L_pg sums to about 0 (advantages do); its gradient does not.
    """
    ratio = torch.exp(logps - old_logps)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    per_token = -torch.min(ratio * advantages, clipped * advantages)
    kl = torch.zeros_like(logps)
    if ref_logps is not None:
        kl = torch.exp(ref_logps - logps) - (ref_logps - logps) - 1
        per_token = per_token + kl_beta * kl
    clip_active = (clipped * advantages < ratio * advantages) & (weights > 0)
    return (weights * per_token).sum(), {"kl": kl.detach(), "clip_fraction": clip_active.float()}
