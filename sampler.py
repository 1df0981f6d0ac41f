"""Batched sampling on one growing KV cache: extend (read), sample (write), fork, select.

A conversation is one list of ids that only grows, and no token is run twice. Each row has
its own length: its keys lie at positions 0 to length - 1 without holes, and a query at
position p sees the keys at positions <= p. Right padding and rows that have finished write
keys beyond their length: nobody sees those, and the next piece overwrites them.
"""

from copy import copy
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor
from tqdm import tqdm

from model import Decoder, check

# Tokens (padding included) of one pass in `extend`: on a CPU few, to stay in its cache.
PREFILL_TOKENS = {"cpu": 1024, "cuda": 8192}
# Decoding attends to the longest row, rounded up to a multiple of this.
BUCKET = {"cpu": 32, "cuda": 256}
# A GPU should not wait for Python: I seldom look whether rows have finished, and keep to
# batches of a multiple of 32 rows, so that few graphs serve all.
LOOK_EVERY = {"cpu": 1, "cuda": 8}
ROWS_BY = {"cpu": 1, "cuda": 32}


@dataclass
class Sampled:
    """One turn of one row."""

    ids: list[int]  # with its stop token
    logps: list[float]  # at the temperature
    stopped: bool  # False: cut at the cap


class KVCache:
    """Keys and values of B conversations, up to `capacity` tokens each, in their order."""

    def __init__(self, model: Decoder, rows: int, capacity: int):
        config, weight = model.config, model.model.embed_tokens.weight
        KV, D = config.num_key_value_heads, config.head_dim
        self.model, self.device = model, weight.device
        self.capacity = min(capacity, model.context)
        empty = weight.new_zeros(rows, KV, 0, D)  # (B, KV, S, D)
        self.keys = [empty] * config.num_hidden_layers
        self.values = [empty] * config.num_hidden_layers
        self.lengths = torch.zeros(rows, dtype=torch.long, device=self.device)  # (B,)
        self.hidden = weight.new_zeros(rows, config.hidden_size)  # (B, C) of the last token
        # The id that a row sampled last has no keys yet: the next `extend` runs it.
        self.unread = [[] for _ in range(rows)]

    @torch.inference_mode()
    def extend(self, pieces: list[list[int]]):
        """Each row reads its piece (ragged), behind what it holds. UserError: no room."""
        pieces = [last + piece for last, piece in zip(self.unread, pieces, strict=True)]
        self.unread = [[] for _ in pieces]
        longest = max(map(len, pieces))
        self._check_room(longest)
        rows = max(1, PREFILL_TOKENS[self.device.type] // longest)
        for start in range(0, len(pieces), rows):
            self._extend(slice(start, start + rows), pieces[start : start + rows])

    def _extend(self, rows: slice, pieces: list[list[int]]):
        """Some rows read their pieces in one pass, padded on the right."""
        sizes = torch.tensor([len(piece) for piece in pieces], device=self.device)  # (b,)
        T = int(sizes.max())
        padded = [piece + [0] * (T - len(piece)) for piece in pieces]
        ids = torch.tensor(padded, device=self.device)  # (b, T)
        offsets = torch.arange(T, device=self.device)  # (T,)
        positions = self.lengths[rows, None] + offsets  # (b, T)
        S = self.grow(int(self.lengths[rows].max()) + T)  # padding needs room, too
        hidden = self.forward(rows, ids, positions, S)  # (b, T, C)
        self.lengths[rows] += sizes
        self.hidden[rows] = hidden[torch.arange(len(pieces)), sizes - 1]

    @torch.inference_mode()
    def sample(
        self, max_tokens: int, stop_ids: frozenset[int], generator, temperature: float = 1.0
    ) -> list[Sampled]:
        """Each row writes a turn, until a stop id or max_tokens. Temperature 0 is greedy.
        All randomness is drawn at the start, a uniform number for each row and step: what a
        row gets does not depend on when others finish. UserError: see `extend`."""
        self._check_room(max_tokens)
        B = n = len(self.unread)  # n: the working batch, which rows leave as they finish
        uniform = torch.rand(B, max_tokens, generator=generator, device=generator.device)
        # On a GPU extras/cuda_graphs.py has one that records, and holds a cache of its own.
        new_state = getattr(self.model, "decoding_state", DecodingState)
        state = new_state(self, max_tokens)
        state.begin(uniform, stop_ids, temperature)
        longest = int(self.lengths.max())
        for t in tqdm(range(max_tokens), f"{B} rows", leave=False, disable=None):
            if t == 0:
                state.draw(n)
            else:
                longest += 1
                state.step(n, state.cache.grow(longest))
            if (t + 1) % LOOK_EVERY[self.device.type]:
                continue
            n_alive = int(state.alive[:n].sum())
            if n_alive == 0:
                break
            if n_alive <= 0.9 * n:  # moving rows costs time, too: not for every single one
                state.move_alive_forward(n, n_alive)
                n = min(n, round_up(n_alive, ROWS_BY[self.device.type]))
                longest = int(state.cache.lengths[:n].max())  # finished ones write, too
        state.end()
        turns, alive = [], state.alive.tolist()
        hint = "its weights are damaged, or --lr was too high"
        for row, count in enumerate(state.counts[:B].tolist()):
            ids, logps = state.ids[row, :count].tolist(), state.logps[row, :count].tolist()
            check(all(map(isfinite, logps)), f"the model's numbers are not finite: {hint}.")
            turns.append(Sampled(ids, logps, stopped=not alive[row]))
            self.unread[row] = ids[-1:]
        return turns

    def select(self, rows: list[int]):
        """A copy that holds these rows, in this order; a row may come more than once."""
        new, index = copy(self), torch.tensor(rows, device=self.device)
        new.lengths, new.hidden = self.lengths[index], self.hidden[index]
        new.keys = [k[index] for k in self.keys]
        new.values = [v[index] for v in self.values]
        new.unread = [self.unread[i] for i in rows]
        return new

    def fork(self, G: int) -> "KVCache":
        """Every row G times, side by side: row b becomes rows b*G .. b*G+G-1."""
        return self.select([row for row in range(len(self.unread)) for _ in range(G)])

    def _check_room(self, more: int):
        n, room = int(self.lengths.max()) + more, self.capacity
        check(n <= room, f"no room for {n} tokens in a conversation, only {room}.")

    def grow(self, longest: int) -> int:
        """Makes room for `longest` tokens a row. Returns S, how many keys to attend to: so
        many, in whole buckets; on a CPU all there are (it would copy a part first)."""
        bucket, old = BUCKET[self.device.type], self.keys[0].shape[2]
        if longest > old:  # by half: all is copied
            S = round_up(max(longest, min(3 * old // 2, self.capacity)), bucket)
            for tensors in (self.keys, self.values):
                for i, tensor in enumerate(tensors):
                    B, KV, _, D = tensor.shape
                    # Zeros, not empty: a masked key has weight 0, but 0 * NaN is NaN.
                    more = tensor.new_zeros(B, KV, S - old, D)
                    tensors[i] = torch.cat((tensor, more), dim=2)  # (B, KV, S, D)
        return round_up(longest, bucket) if self.lengths.is_cuda else self.keys[0].shape[2]

    def forward(self, rows: slice, ids: Tensor, positions: Tensor, S: int) -> Tensor:
        """Runs ids (b, T) at positions (b, T) of some rows. Their keys are written, and the
        first S of each row attended to (see `grow`). Returns hidden (b, T, C)."""
        (b, T), config = ids.shape, self.model.config
        KV, D = config.num_key_value_heads, config.head_dim
        group = config.num_attention_heads // KV  # query heads that share one key head
        index = torch.arange(len(self.lengths), device=self.device)[rows, None]  # (b, 1)
        key_positions = torch.arange(S, device=self.device)  # (S,)
        unseen = key_positions > positions[:, :, None]  # (b, T, S)
        bias = self.hidden.new_zeros(b, T, S).masked_fill(unseen, -torch.inf)
        # Like the queries below: (b, 1, 1, T, S) -> (b * KV, group * T, S).
        bias = bias[:, None, None].expand(b, KV, group, T, S).reshape(b * KV, group * T, S)

        def attend(layer, q, k, v):  # q (b, H, T, D); k, v (b, KV, T, D)
            keys, values = self.keys[layer], self.values[layer]  # (B, KV, S or more, D)
            keys[index, :, positions] = k.transpose(1, 2)  # (b, T, KV, D): indices first
            values[index, :, positions] = v.transpose(1, 2)
            # The query heads of one key head become queries of that head: no key is copied.
            q = q.reshape(b * KV, group * T, D)
            k = keys[rows, :, :S].flatten(0, 1)  # (b * KV, S, D)
            v = values[rows, :, :S].flatten(0, 1)  # (b * KV, S, D)
            scores = torch.baddbmm(bias, q, k.mT, alpha=D**-0.5)  # (b * KV, group * T, S)
            return torch.bmm(scores.softmax(-1), v).view(b, KV * group, T, D)

        # Padding may lie beyond the context, where rope has no angle; nobody reads it.
        return self.model(ids, positions.clamp(max=self.model.context - 1), attend)


class DecodingState:
    """All that the steps of one turn read and write. A step is a fixed program: it replaces
    no tensor and asks the GPU nothing, so that it can be recorded. Rows that finish move
    behind the others, so that the working batch is a plain slice, the first n places;
    `rows` remembers which row stands at each place, and `end` puts them back."""

    def __init__(self, cache: KVCache, max_tokens: int):
        B, V, device = len(cache.lengths), cache.model.config.vocab_size, cache.device
        self.cache = cache
        self.uniform = torch.zeros(B, max_tokens, device=device)  # a number for each draw
        self.ids = torch.zeros(B, max_tokens, dtype=torch.long, device=device)
        self.logps = torch.zeros(B, max_tokens, device=device)
        self.counts = torch.zeros(B, dtype=torch.long, device=device)  # ids drawn so far
        self.alive = torch.zeros(B, dtype=torch.bool, device=device)  # no stop id came yet
        self.rows = torch.arange(B, device=device)  # the caller's row at each place
        self.t = torch.zeros(1, dtype=torch.long, device=device)  # column of the next draw
        self.is_stop = torch.zeros(V, dtype=torch.bool, device=device)  # by id

    def begin(self, uniform: Tensor, stop_ids: frozenset[int], temperature: float):
        """A new turn of the first B rows; uniform (B, max_tokens)."""
        B, M = uniform.shape
        self.uniform[:B, :M] = uniform
        self.counts.zero_()
        self.alive[:B] = True
        self.t.zero_()
        self.is_stop.zero_()
        self.is_stop[sorted(stop_ids)] = True
        self.temperature = temperature

    def draw(self, n: int):
        """An id for each of the first n places, from their hidden states."""
        logits = self.cache.model.logits(self.cache.hidden[:n])  # (n, V)
        uniform = self.uniform[:n].index_select(1, self.t)  # (n, 1)
        ids, logps = draw_ids(logits, uniform, self.temperature)  # (n, 1), (n, 1)
        self.ids[:n].index_copy_(1, self.t, ids)
        self.logps[:n].index_copy_(1, self.t, logps)
        self.counts[:n] += self.alive[:n]
        self.alive[:n] &= ~self.is_stop[ids[:, 0]]
        self.t += 1

    def step(self, n: int, S: int):
        """The first n places read the ids drawn last, attending to S keys, and draw."""
        cache = self.cache
        ids = self.ids[:n].index_select(1, self.t - 1)  # (n, 1)
        positions = cache.lengths[:n, None]  # (n, 1)
        cache.hidden[:n] = cache.forward(slice(0, n), ids, positions, S)[:, 0]  # (n, C)
        cache.lengths[:n] += self.alive[:n]  # a stop id stays unread
        self.draw(n)

    def move_alive_forward(self, n: int, n_alive: int):
        """Swaps rows among the first n places so that those alive are the first n_alive."""
        alive = self.alive[:n].tolist()
        finished = [place for place in range(n_alive) if not alive[place]]
        unfinished = [place for place in range(n_alive, n) if alive[place]]
        self._move(finished + unfinished, unfinished + finished)

    def end(self):
        """Puts the rows back in the caller's order."""
        rows = self.rows.tolist()
        moved = [place for place, row in enumerate(rows) if place != row]
        self._move([rows[place] for place in moved], moved)

    def _move(self, to: list[int], source: list[int]):
        """What stands at the places `source` goes to the places `to`."""
        to = torch.tensor(to, dtype=torch.long, device=self.cache.device)
        source = torch.tensor(source, dtype=torch.long, device=self.cache.device)
        turn = [self.uniform, self.ids, self.logps, self.counts, self.alive, self.rows]
        kept = [self.cache.lengths, self.cache.hidden, *self.cache.keys, *self.cache.values]
        for tensor in turn + kept:
            tensor[to] = tensor[source]


def draw_ids(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One id a row from softmax(logits / temperature), by inverting its distribution
    function; the likeliest id at temperature 0. logits (n, V), uniform (n, 1) in [0, 1) ->
    ids (n, 1) int64, their log-probs (n, 1)."""
    probs = (logits.float() / (temperature or 1.0)).softmax(-1)  # (n, V)
    if temperature == 0:
        ids = probs.argmax(-1, keepdim=True)  # (n, 1)
    else:
        sums = probs.cumsum(-1)  # (n, V)
        # Below the last sum, whatever the rounding: so no id of probability 0 is drawn.
        target = uniform * sums[:, -1:] * (1 - 1e-6)  # (n, 1)
        ids = torch.searchsorted(sums, target, right=True)  # (n, 1)
        # Sums that a GPU adds up in parallel need not rise everywhere: stay within the ids.
        ids = ids.clamp(max=logits.shape[1] - 1)
    return ids, probs.gather(1, ids).log()


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
