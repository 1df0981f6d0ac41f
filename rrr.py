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
 7. TRL (1.16) divides by the unbiased deviation, counts groups without signal in its denominators,
    and by default multiplies the KL estimate by the ratio (tests/test_witness_trl.py).
"""

import json
from dataclasses import asdict, dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Chat, Decoder, UserError, attention
from sampler import Conversations

HEAD_CHUNK = 1024  # positions that meet the vocabulary at a time: the largest tensor there is


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
        control = len(chat.encode(task.generic_reflection))  # which may be longer than the cap
        self.room = settings.attempt_tokens + max(settings.reflection_tokens, control)
        glue = chat.glue(task.reflect, -1) + chat.glue(task.retry, -1)
        self.room += settings.retry_tokens + len(glue)

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
        pairs, decode = zip(glue, reflections), self.chat.decode
        turns = [Turn(piece, ids, [], decode(ids), True) for piece, ids in pairs]
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
        stops, decode = self.chat.stop_ids, self.chat.decode
        sampled = conversations.sample(max_tokens, stops, generator, desc=desc, **self.drawing)
        pairs = zip(prompts, sampled)
        return [Turn(ids, s.ids, s.logps, decode(s.ids), s.stopped) for ids, s in pairs]

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
    """N groups, one a line: the shared prefix, then the G episodes' own ids, end to end. Segment 0
    is the prefix, g the g-th episode, which goes on from the prefix's last id; -1 is padding.
    Already shifted: `targets` are the ids that the positions predict. For a prefix "a b c" and
    reflections "x y." and "z.":

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
    mask: Tensor  # (N, T) bool: the trained tokens are exactly these
    weights: Tensor  # (N, T) float32: mask / denominator
    sampled_logps: Tensor  # (N, T) float32: the sampler's, for comparison
    advantages: Tensor  # (N, T) float32

    def to(self, device) -> "Batch":
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def spans(episode: Episode, train_on: str) -> tuple[list[int], list[int], list[bool], list[float]]:
    """The conversation, cut where training starts: the prefix's ids; from there on ids, trained?,
    and sampled logps. Ids and mask are made together, here and nowhere else. The sampled stop token
    is trained like any other; a turn that was cut has none."""
    trained = TRAINED_TURNS[train_on]
    turns = [episode.attempt, episode.reflection, *episode.retries[:1]][: trained[-1] + 1]
    ids, mask, logps = [], [], []
    for i, turn in enumerate(turns):
        ids += turn.prompt_ids + turn.ids
        mask += [False] * len(turn.prompt_ids) + [i in trained] * len(turn.ids)
        logps += [0.0] * len(turn.prompt_ids) + turn.logps
    start = mask.index(True)
    return ids[:start], ids[start:], mask[start:], logps[start:]


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

    def line(group):
        _, prefix, *_ = group[0]
        P = len(prefix) - 1
        columns = [prefix[:P], [0] * P, list(range(P)), [0] * P, [False] * P]
        columns += [[0.0] * P, [0.0] * P, [0.0] * P]  # in the order of Batch's fields
        for g, (episode, prefix, ids, mask, logps) in enumerate(group, start=1):
            n = len(ids)
            per_sequence = {"sequence": sum(mask) * count, "constant": constant * count}
            denominator = per_sequence.get(loss_norm, total)
            own = [prefix[P:] + ids[:-1], [g] * n, list(range(P, P + n)), ids, mask]
            own += [[trained / denominator for trained in mask], logps, [episode.advantage] * n]
            columns = [column + more for column, more in zip(columns, own)]
        return columns

    # Longest first: like lengths together, and what exceeds the memory does so at once.
    lines = sorted(map(line, groups), key=lambda columns: len(columns[0]), reverse=True)
    cuts = []
    for columns in lines:
        if cuts and (len(cuts[-1]) + 1) * len(cuts[-1][0][0]) <= max_tokens:
            cuts[-1].append(columns)
        else:
            cuts.append([columns])

    def pad(column, padding):
        T = max(map(len, column))
        return torch.tensor([row + [padding] * (T - len(row)) for row in column])  # (N, T)

    paddings = (0, -1, 0, 0, False, 0.0, 0.0, 0.0)  # in the order of Batch's fields
    return [Batch(*map(pad, zip(*lines), paddings)) for lines in cuts]


# ---- the training pass: the prefix once, the reflections on it ----


def shared_prefix(model: Decoder, batch: Batch):
    """The attention strategy of the training pass: a segment sees the prefix and itself. The
    prefixes attend causally; then each segment, in a row of its own, attends to its prefix's keys
    and to its own. No two segments are multiplied with each other, as they would be under a mask
    of (T, T)."""
    segments, device = batch.segments, batch.segments.device
    counts = F.one_hot(segments + 1).sum(1)[:, 1:]  # (N, 1 + G) ids of each segment
    starts = counts.cumsum(1) - counts  # (N, 1 + G)
    (N, G), T = counts[:, 1:].shape, segments.shape[1]
    P, R = int(counts[:, 0].max()), int(counts[:, 1:].max())
    R += -(P + R) % 8  # rows of a mask in multiples of 8 spare a GPU a copy of it
    line, place = torch.arange(N, device=device)[:, None], torch.arange(T + R, device=device)
    # From places in the line to segments in rows, padded to R; and back, behind the prefix's P.
    there = (starts[:, 1:, None] + place[:R]).clamp(max=T - 1).flatten(1)  # (N, G * R)
    back = place[:T] - starts.gather(1, segments.clamp(min=0))  # (N, T): places in the segments
    back = (back + (segments > 0) * (P + (segments - 1) * R)).clamp(0, P + G * R - 1)

    def bias(visible):  # (B, T, S) -> (B, 1, H / KV * T, S)
        group = model.config.num_attention_heads // model.config.num_key_value_heads
        zeros = model.head.weight.new_zeros(visible.shape)
        return zeros.masked_fill(~visible, -torch.inf).repeat(1, group, 1)[:, None]

    prefix = (place[:P] < counts[:, :1])[:, None, None].expand(N, G, R, P)
    own = (place[:R] <= place[:R, None]).expand(N, G, R, R)
    first_bias = bias((place[:P] <= place[:P, None])[None])  # (1, 1, H / KV * P, P)
    rest_bias = bias(torch.cat((prefix, own), dim=3).flatten(0, 1))  # (N * G, 1, H / KV * R, P + R)

    def attend(layer, q, k, v):  # q (N, H, T, D); k, v (N, KV, T, D)
        def rows(x):
            x = x.transpose(1, 2)[line, there]  # (N, G * R, heads, D)
            return x.unflatten(1, (G, R)).flatten(0, 1).transpose(1, 2)  # (N * G, heads, R, D)

        def behind_prefix(x):
            return torch.cat((x[:, :, :P].repeat_interleave(G, dim=0), rows(x)), dim=2)

        first = attention(layer, *(x[:, :, :P] for x in (q, k, v)), first_bias)  # (N, H, P, D)
        rest = attention(layer, rows(q), behind_prefix(k), behind_prefix(v), rest_bias)
        rest = rest.transpose(1, 2).unflatten(0, (N, G)).flatten(1, 2)  # (N, G * R, H, D)
        return torch.cat((first.transpose(1, 2), rest), dim=1)[line, back].transpose(1, 2)

    return attend


class TargetLogps(torch.autograd.Function):
    """log softmax(logits)[target], HEAD_CHUNK positions at a time. No logits are kept: the backward
    pass computes them again, and their gradient by hand: onehot(target) - softmax(logits)."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, head, temperature):
        """hidden (M, C), the head's weight (V, C), targets (M,), head(hidden) -> (M,) float32"""
        ctx.save_for_backward(hidden, weight, targets)
        ctx.logits = lambda some: head(some).div_(temperature)  # (m, C) -> (m, V) float32
        ctx.temperature = temperature
        chunks = zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK))
        logps = [-F.cross_entropy(ctx.logits(h), t, reduction="none") for h, t in chunks]
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets = ctx.saved_tensors
        grad_hidden, grad_weight = [], torch.zeros_like(weight)
        columns = hidden, targets[:, None], grad[:, None] / ctx.temperature
        for h, t, g in zip(*(column.split(HEAD_CHUNK) for column in columns)):
            grad_logits = ctx.logits(h).softmax(1).mul_(-g).scatter_add_(1, t, g)  # (m, V)
            grad_logits = grad_logits.to(weight.dtype)
            grad_hidden.append(grad_logits @ weight)
            grad_weight.addmm_(grad_logits.t(), h)
        return torch.cat(grad_hidden), grad_weight, None, None, None


def trained_logps(model: Decoder, batch: Batch, temperature: float) -> Tensor:
    """log pi(target) at the sampling temperature, (N, T) float32, 0 where the mask is 0. Only
    trained positions meet the vocabulary."""
    hidden = model(batch.ids, batch.positions, shared_prefix(model, batch))[batch.mask]  # (M, C)
    weight, targets = model.head.weight, batch.targets[batch.mask]
    logps = TargetLogps.apply(hidden, weight, targets, model.logits, temperature)  # (M,)
    return logps.new_zeros(batch.mask.shape).masked_scatter(batch.mask, logps)


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
    """GRPO (arXiv 2402.03300, eq. 3). All (N, T), the weights 0 outside the trained tokens.
    Returns the loss and, per token, the KL estimate and where the clip is active.

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
