"""Batched sampling on one growing KV cache: extend (read), sample (write), fork, select.

A conversation is one list of ids that only grows: prompt, answer, next instruction, next answer.
Its keys and values stay in the cache, so that no token is ever run twice. Rows have their own
lengths; row b's keys lie at positions 0..lengths[b]-1 without holes, and a query at position p sees
exactly the keys at positions <= p. There is no left padding: right padding, and the steps of rows
that have finished, write beyond a row's length, where nobody looks and the next piece overwrites.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from model import Decoder, UserError

PREFILL_TOKENS = 16_384  # tokens (padding included) of one forward pass in `extend`
BUCKET = 64  # decoding attends to the longest row's length, rounded up to a multiple of this


@dataclass
class Sampled:
    """One turn. `ids` ends with the stop token, if one came; `logps` are the log-probs of `ids`
    under softmax(logits / temperature); `stopped` is False where the cap cut the turn."""

    ids: list[int]
    logps: list[float]
    stopped: bool


class Conversations:
    """B growing conversations. Methods take and return rows in the caller's order; inside, `sample`
    moves rows that have finished behind those that have not (so that the working batch is a plain
    slice of the cache), and `slot_of` remembers where each row lies."""

    def __init__(self, model: Decoder, rows: int, capacity: int):
        """`capacity`: tokens that a row can hold, all its turns together. UserError beyond the
        model's context."""
        if capacity > model.context:
            raise UserError(
                f"a conversation may grow to {capacity} tokens, the context holds {model.context}: "
                "lower the token limits of the turns, or raise --context."
            )
        config, weight = model.config, model.model.embed_tokens.weight
        # One slot more than the capacity: the padding of ragged pieces is written to the last one.
        # Zeros, not empty: a masked key has weight 0, but 0 * NaN is NaN.
        shape = (rows, config.num_key_value_heads, capacity + 1, config.head_dim)
        self.model, self.capacity = model, capacity
        # By layer, each (B, KV, S, D).
        self.keys = [weight.new_zeros(shape) for _ in range(config.num_hidden_layers)]
        self.values = [weight.new_zeros(shape) for _ in range(config.num_hidden_layers)]
        self.lengths = torch.zeros(rows, dtype=torch.long, device=weight.device)  # (B,) by slot
        self.hidden = weight.new_zeros(rows, config.hidden_size)  # (B, C) by slot
        self.pending = [[] for _ in range(rows)]  # by row: the id sampled last, not cached yet
        self.slot_of = list(range(rows))

    def __len__(self):
        return len(self.slot_of)

    @torch.no_grad()
    def extend(self, pieces: list[list[int]]) -> None:
        """Read one piece of ids a row (ragged), behind what the row holds already."""
        pieces = [pending + piece for pending, piece in zip(self.pending, pieces, strict=True)]
        self.pending = [[] for _ in pieces]
        by_slot = sorted(range(len(pieces)), key=self.slot_of.__getitem__)  # row at each slot
        pieces = [pieces[row] for row in by_slot]
        longest = max(map(len, pieces))
        self._check_room(longest)
        step = max(1, PREFILL_TOKENS // longest)
        for start in range(0, len(pieces), step):
            self._extend(slice(start, start + step), pieces[start : start + step])

    def _extend(self, rows: slice, pieces):
        device = self.lengths.device
        T = max(map(len, pieces))
        sizes = torch.tensor([len(piece) for piece in pieces], device=device)  # (b,)
        padded = [piece + [0] * (T - len(piece)) for piece in pieces]
        ids = torch.tensor(padded, device=device)  # (b, T)
        offsets = torch.arange(T, device=device)  # (T,)
        positions = self.lengths[rows, None] + offsets  # (b, T)
        positions = positions.where(offsets < sizes[:, None], self.capacity)  # or the spare slot
        self.lengths[rows] += sizes
        hidden = self._forward(rows, ids, positions, int(self.lengths[rows].max()))  # (b, T, C)
        self.hidden[rows] = hidden[torch.arange(len(pieces), device=device), sizes - 1]

    def _forward(self, rows: slice, ids, positions, longest):
        """Run ids (b, T) at positions (b, T) of some rows: their keys are written, and attended to
        up to position `longest`. Returns hidden (b, T, C)."""
        config = self.model.config
        b, T = ids.shape
        KV, D = config.num_key_value_heads, config.head_dim
        group = config.num_attention_heads // KV  # query heads that share one key head
        S = min(-(-longest // BUCKET) * BUCKET, self.capacity)
        index = torch.arange(rows.start, rows.start + b, device=ids.device)[:, None]  # (b, 1)
        visible = torch.arange(S, device=ids.device) <= positions[:, :, None]  # (b, T, S)
        visible = visible[:, None].expand(b, group, T, S).reshape(b, 1, group * T, S)

        def attend(layer, q, k, v):  # q (b, H, T, D); k, v (b, KV, T, D)
            keys, values = self.keys[layer], self.values[layer]
            keys[index, :, positions] = k.transpose(1, 2)
            values[index, :, positions] = v.transpose(1, 2)
            # The query heads of one key head become queries of that head: no key is copied.
            q = q.reshape(b, KV, group * T, D)
            keys, values = keys[rows, :, :S], values[rows, :, :S]
            out = scaled_dot_product_attention(q, keys, values, attn_mask=visible)
            return out.view(b, KV * group, T, D)

        # The spare slot has no rotary position of its own; what padding computes is never read.
        return self.model(ids, positions.clamp(max=self.model.context - 1), attend)

    @torch.no_grad()
    def sample(
        self,
        max_tokens: int,
        stop_ids: frozenset[int],
        generator: torch.Generator,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        desc: str | None = None,
    ) -> list[Sampled]:
        """Write one turn a row, until a stop id or max_tokens. Temperature 0 is greedy. Training
        wants the plain distribution; top_k and top_p are for evaluation. `desc` names the bar.

        All randomness is drawn at the start, one uniform number for each row and step: what a row
        gets does not depend on when its neighbours finish."""
        self._check_room(max_tokens)
        B, device = len(self), self.lengths.device
        row_at = sorted(range(B), key=self.slot_of.__getitem__)  # row at each slot
        uniform = torch.rand(B, max_tokens, generator=generator, device=generator.device)
        uniform = uniform.to(device)[row_at]  # (B, M)
        stops = torch.tensor(sorted(stop_ids), device=device)
        ids = torch.zeros(B, max_tokens, dtype=torch.long, device=device)  # by slot
        logps = torch.zeros(B, max_tokens, device=device)
        counts = torch.zeros(B, dtype=torch.long, device=device)
        alive = torch.ones(B, dtype=torch.bool, device=device)
        rows = torch.tensor(row_at, device=device)
        state = [uniform, ids, logps, counts, alive, rows, self.lengths, self.hidden]
        n, longest = B, int(self.lengths.max())
        hide = None if desc else True  # None: only where there is no terminal
        bar = tqdm(range(max_tokens), desc, unit="token", leave=False, disable=hide)
        for t in bar:
            logits = self.model.logits(self.hidden[:n])  # (n, V)
            ids[:n, t], logps[:n, t] = draw(logits, uniform[:n, t], temperature, top_k, top_p)
            counts[:n] += alive[:n]
            alive[:n] &= ~torch.isin(ids[:n, t], stops)
            n_alive = int(alive[:n].sum())
            bar.set_postfix(rows=n_alive, refresh=False)
            if n_alive == 0 or t == max_tokens - 1:
                break
            if n_alive <= 0.9 * n:  # moving rows costs a little, running finished ones costs more
                self._move_back(n, n_alive, state)
                n, longest = n_alive, int(self.lengths[:n_alive].max())
            longest += 1
            hidden = self._forward(slice(0, n), ids[:n, t, None], self.lengths[:n, None], longest)
            self.hidden[:n] = hidden[:, 0]
            self.lengths[:n] += alive[:n]
        turns = [None] * B
        stopped = torch.isin(ids.gather(1, counts[:, None] - 1)[:, 0], stops).tolist()
        for slot, (row, count, row_ids, row_logps) in enumerate(
            zip(rows.tolist(), counts.tolist(), ids.tolist(), logps.tolist())
        ):
            turns[row] = Sampled(row_ids[:count], row_logps[:count], stopped[slot])
            self.slot_of[row] = slot
            self.pending[row] = row_ids[count - 1 : count]
        return turns

    def _move_back(self, n, n_alive, state):
        """Swap rows among the first n slots so that those alive are slots 0..n_alive-1."""
        alive = state[4][:n].tolist()
        holes = [slot for slot in range(n_alive) if not alive[slot]]
        movers = [slot for slot in range(n_alive, n) if alive[slot]]
        to, source = holes + movers, movers + holes
        for tensor in state + self.keys + self.values:
            tensor[to] = tensor[source]

    def select(self, rows: list[int]) -> "Conversations":
        """A copy that holds these rows, in this order; a row may come more than once."""
        new = object.__new__(Conversations)
        slots = torch.tensor([self.slot_of[row] for row in rows], device=self.lengths.device)
        new.model, new.capacity = self.model, self.capacity
        new.keys = [keys[slots] for keys in self.keys]
        new.values = [values[slots] for values in self.values]
        new.lengths, new.hidden = self.lengths[slots], self.hidden[slots]
        new.pending = [list(self.pending[row]) for row in rows]
        new.slot_of = list(range(len(rows)))
        return new

    def fork(self, G: int) -> "Conversations":
        """Every row G times, side by side: row b becomes rows b*G .. b*G+G-1."""
        return self.select([row for row in range(len(self)) for _ in range(G)])

    def _check_room(self, more):
        longest = int(self.lengths.max())
        if longest + more > self.capacity:
            raise UserError(
                f"a conversation of {longest} tokens cannot take {more} more: the cache was made "
                f"for {self.capacity}."
            )


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0):
    """One id a row from softmax(logits / temperature), by inverting its distribution function.

    logits (n, V) float32, uniform (n,) in [0, 1) -> ids (n,) int64, their log-probs (n,) float32.
    top_k and top_p narrow what is drawn from; the log-probs stay those of the full distribution."""
    logps = torch.log_softmax(logits / (temperature or 1.0), dim=-1)  # (n, V)
    if temperature == 0:
        ids = logits.argmax(-1, keepdim=True)  # (n, 1)
        return ids[:, 0], logps.gather(1, ids)[:, 0]
    probs = logps.exp()
    if top_k > 0:
        kth = probs.topk(min(top_k, probs.shape[1])).values[:, -1:]  # (n, 1)
        probs = probs.where(probs >= kth, 0)
    if top_p < 1:
        ordered, order = probs.sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # (n, V): mass ahead of each id
        kept = ordered.where(before < top_p * probs.sum(-1, keepdim=True), 0)
        probs = probs.scatter(1, order, kept)
    cdf = probs.cumsum(-1)  # (n, V)
    # right=True: the first id whose sum exceeds the draw, so an id of probability 0 is never drawn.
    ids = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)  # (n, 1)
    ids = ids.clamp(max=logits.shape[1] - 1)
    return ids[:, 0], logps.gather(1, ids)[:, 0]
