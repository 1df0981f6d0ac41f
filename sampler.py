"""Batched sampling on one growing KV cache: extend (read), sample (write), fork, select.

A conversation is one list of ids that only grows: prompt, answer, next instruction, next answer.
Its keys and values stay in the cache, so that no token is ever run twice. Rows have their own
lengths; row b's keys lie at positions 0..lengths[b]-1 without holes, and a query at position p sees
exactly the keys at positions <= p. There is no left padding: right padding, and the steps of rows
that have finished, write beyond a row's length, where nobody looks and the next piece overwrites.

Where the speed comes from: nothing runs twice; many rows share each reading of the weights; keys
are attended to up to a bucketed length, not the capacity; rows that finish leave the batch; a
decoding step is a fixed program on fixed tensors, which a GPU replays as a CUDA graph.
"""

import math
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from model import Decoder, UserError

# Tokens (padding included) of one forward pass in `extend`: on a CPU few, so that what passes from
# layer to layer stays within its cache.
PREFILL_TOKENS = {"cpu": 1024, "cuda": 8192}
BUCKET = {"cpu": 32, "cuda": 64}  # decoding attends to the longest row, rounded up to a multiple
# A GPU should not wait for Python: it looks only every few steps whether rows have finished, and
# keeps to batches of a multiple of 16 rows, so that few graphs serve all.
LOOK_EVERY = {"cpu": 1, "cuda": 8}
ROWS_BY = {"cpu": 1, "cuda": 16}


@dataclass
class Sampled:
    """One turn. `ids` ends with the stop token, if one came; `logps` are the log-probs of `ids`
    under softmax(logits / temperature); `stopped` is False where the cap cut the turn."""

    ids: list[int]
    logps: list[float]
    stopped: bool


class Cache:
    """Keys, values, lengths and last hidden states of B slots, which grow to `capacity` tokens."""

    def __init__(self, model: Decoder, rows: int, capacity: int):
        weight, layers = model.model.embed_tokens.weight, range(model.config.num_hidden_layers)
        self.model, self.capacity = model, capacity
        KV, D = model.config.num_key_value_heads, model.config.head_dim
        self.keys = [weight.new_zeros(rows, KV, 0, D) for _ in layers]  # by layer: (B, KV, S, D)
        self.values = [weight.new_zeros(rows, KV, 0, D) for _ in layers]  # (B, KV, S, D)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=weight.device)  # (B,)
        self.hidden = weight.new_zeros(rows, model.config.hidden_size)  # (B, C)

    def grow(self, longest: int) -> int:
        """Makes room for `longest` tokens a slot; returns how many places to attend to: those, in
        whole buckets. On a CPU, all there are: a product with a part would copy that part first."""
        size, old = BUCKET[self.lengths.device.type], self.values[0].shape[2]
        if longest > old:  # by half at least, since all is copied
            S = max(longest, min(3 * old // 2, self.capacity))
            more = -(-S // size) * size - old
            for tensors in (self.keys, self.values):
                for i, tensor in enumerate(tensors):
                    # Zeros, not empty: a masked key has weight 0, but 0 * NaN is NaN.
                    new = tensor.new_zeros(*tensor.shape[:2], more, tensor.shape[3])
                    tensors[i] = torch.cat((tensor, new), dim=2)
        return -(-longest // size) * size if self.lengths.is_cuda else self.values[0].shape[2]

    def tensors(self) -> list[Tensor]:
        return [self.lengths, self.hidden, *self.keys, *self.values]

    def select(self, slots: list[int]) -> "Cache":
        """A copy of these slots, in this order."""
        new, index = copy(self), torch.tensor(slots, device=self.lengths.device)
        new.lengths, new.hidden = self.lengths[index], self.hidden[index]
        new.keys = [keys[index] for keys in self.keys]
        new.values = [values[index] for values in self.values]
        return new

    def copy_(self, other: "Cache") -> None:
        """What the other holds, as far as both reach."""
        self.grow(int(other.lengths.max()))
        for mine, theirs in zip(self.tensors(), other.tensors()):
            common = tuple(slice(min(sizes)) for sizes in zip(mine.shape, theirs.shape))
            mine[common] = theirs[common]

    def forward(self, rows: slice, ids, positions, S: int):
        """Run ids (b, T) at positions (b, T) of some rows: their keys are written, and attended to
        up to place S, which `grow` gave. Returns hidden (b, T, C)."""
        config = self.model.config
        b, T = ids.shape
        KV, D = config.num_key_value_heads, config.head_dim
        group = config.num_attention_heads // KV  # query heads that share one key head
        index = torch.arange(rows.start, rows.start + b, device=ids.device)[:, None]  # (b, 1)
        unseen = torch.arange(S, device=ids.device) > positions[:, :, None]  # (b, T, S)
        bias = self.hidden.new_zeros(b, T, S).masked_fill(unseen, -torch.inf)[:, None, None]
        bias = bias.expand(b, KV, group, T, S).reshape(b * KV, group * T, S)

        def attend(layer, q, k, v):  # q (b, H, T, D); k, v (b, KV, T, D)
            keys, values = self.keys[layer], self.values[layer]
            keys[index, :, positions] = k.transpose(1, 2)
            values[index, :, positions] = v.transpose(1, 2)
            # The query heads of one key head become queries of that head: no key is copied.
            q = q.reshape(b * KV, group * T, D)
            keys, values = keys[rows, :, :S].flatten(0, 1), values[rows, :, :S].flatten(0, 1)
            scores = torch.baddbmm(bias, q, keys.mT, alpha=D**-0.5)  # (b * KV, group * T, S)
            return torch.bmm(scores.softmax(-1), values).view(b, KV * group, T, D)

        # Padding may lie beyond the context, where there is no rotary position; nobody reads it.
        return self.model(ids, positions.clamp(max=self.model.context - 1), attend)


class Desk:
    """What a decoding step reads and writes: a cache, and the tensors of one turn, all by slot.
    They never move and nothing else changes, so that a step can be recorded as a CUDA graph."""

    def __init__(self, cache: Cache, max_tokens: int):
        B, device = len(cache.lengths), cache.lengths.device
        self.cache, self.max_tokens = cache, max_tokens
        self.uniform = torch.zeros(B, max_tokens, device=device)  # all randomness of the turn
        self.ids = torch.zeros(B, max_tokens, dtype=torch.long, device=device)
        self.logps = torch.zeros(B, max_tokens, device=device)
        self.counts = torch.zeros(B, dtype=torch.long, device=device)  # ids of the row so far
        self.alive = torch.zeros(B, dtype=torch.bool, device=device)
        self.rows = torch.zeros(B, dtype=torch.long, device=device)  # the row at each slot
        self.t = torch.zeros(1, dtype=torch.long, device=device)  # column of the ids drawn next
        self.graphs, self.stop_tensors = {}, {}

    def begin(self, uniform: Tensor, row_at: list[int], stop_ids: frozenset, drawing: tuple):
        """A new turn of the first len(row_at) slots; uniform (B, M), by row."""
        B, M = uniform.shape
        if stop_ids not in self.stop_tensors:
            stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=self.t.device)
            self.stop_tensors[stop_ids] = stops  # (number of stop ids,)
        self.stop_ids, self.drawing = stop_ids, drawing
        self.rows[:B] = torch.tensor(row_at)
        self.uniform[:B, :M] = uniform.to(self.t.device)[self.rows[:B]]
        self.counts[:B], self.alive[:B] = 0, True
        self.t.zero_()

    def draw(self, n: int) -> None:
        """An id for each of the slots 0..n-1, from their hidden states."""
        logits = self.cache.model.logits(self.cache.hidden[:n])  # (n, V)
        uniform = self.uniform[:n].index_select(1, self.t)[:, 0]
        # A few rows at a time: their probabilities then stay within the processor's cache.
        size = n if logits.is_cuda else 16
        rows = zip(logits.split(size), uniform.split(size))
        ids, logps = map(torch.cat, zip(*(draw(*row, *self.drawing) for row in rows)))
        self.ids[:n].index_copy_(1, self.t, ids[:, None])
        self.logps[:n].index_copy_(1, self.t, logps[:, None])
        self.counts[:n] += self.alive[:n]
        # Not torch.isin: with many stop ids it asks the GPU, which a graph cannot.
        self.alive[:n] &= (ids[:, None] != self.stop_tensors[self.stop_ids]).all(1)
        self.t += 1

    def step(self, n: int, S: int) -> None:
        """The slots 0..n-1 read the ids drawn last, attending to S places, and draw the next."""
        cache = self.cache
        ids = self.ids[:n].index_select(1, self.t - 1)  # (n, 1)
        hidden = cache.forward(slice(0, n), ids, cache.lengths[:n, None], S)  # (n, 1, C)
        cache.hidden[:n] = hidden[:, 0]
        cache.lengths[:n] += self.alive[:n]
        self.draw(n)

    def replay(self, n: int, S: int) -> None:
        """`step`, by a CUDA graph. The first step of its kind runs as it is, and is then recorded
        (which runs nothing) for those to come."""
        kind = (n, S, self.stop_ids, self.drawing)
        if kind in self.graphs:
            self.graphs[kind]()
        else:
            self.step(n, S)
            self.graphs[kind] = record(lambda: self.step(n, S))

    def move_back(self, n: int, n_alive: int) -> None:
        """Swap rows among the first n slots so that those alive are slots 0..n_alive-1."""
        alive = self.alive[:n].tolist()
        holes = [slot for slot in range(n_alive) if not alive[slot]]
        movers = [slot for slot in range(n_alive, n) if alive[slot]]
        to, source = holes + movers, movers + holes
        turn = [self.uniform, self.ids, self.logps, self.counts, self.alive, self.rows]
        for tensor in turn + self.cache.tensors():
            tensor[to] = tensor[source]


def record(step):
    """A function that repeats `step` on the GPU in one launch."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


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
        self.cache = Cache(model, rows, capacity)
        self.pending = [[] for _ in range(rows)]  # by row: the id sampled last, not cached yet
        self.slot_of = list(range(rows))

    def __len__(self):
        return len(self.slot_of)

    @torch.inference_mode()
    def extend(self, pieces: list[list[int]]) -> None:
        """Read one piece of ids a row (ragged), behind what the row holds already."""
        pieces = [pending + piece for pending, piece in zip(self.pending, pieces, strict=True)]
        self.pending = [[] for _ in pieces]
        by_slot = sorted(range(len(pieces)), key=self.slot_of.__getitem__)  # row at each slot
        pieces = [pieces[row] for row in by_slot]
        longest = max(map(len, pieces))
        self._check_room(longest)
        step = max(1, PREFILL_TOKENS[self.cache.hidden.device.type] // longest)
        for start in range(0, len(pieces), step):
            self._extend(slice(start, start + step), pieces[start : start + step])

    def _extend(self, rows: slice, pieces):
        lengths, device = self.cache.lengths, self.cache.lengths.device
        T = max(map(len, pieces))
        sizes = torch.tensor([len(piece) for piece in pieces], device=device)  # (b,)
        padded = [piece + [0] * (T - len(piece)) for piece in pieces]
        ids = torch.tensor(padded, device=device)  # (b, T)
        offsets = torch.arange(T, device=device)  # (T,)
        positions = lengths[rows, None] + offsets  # (b, T)
        S = self.cache.grow(int(lengths[rows].max()) + T)  # padding has its place, too
        hidden = self.cache.forward(rows, ids, positions, S)  # (b, T, C)
        lengths[rows] += sizes
        self.cache.hidden[rows] = hidden[torch.arange(len(pieces), device=device), sizes - 1]

    @torch.inference_mode()
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
        B, device = len(self), self.cache.lengths.device
        row_at = sorted(range(B), key=self.slot_of.__getitem__)  # row at each slot
        uniform = torch.rand(B, max_tokens, generator=generator, device=generator.device)
        desk = self._desk(max_tokens)
        desk.begin(uniform, row_at, stop_ids, (temperature, top_k, top_p))
        step = desk.step if desk.cache is self.cache else desk.replay
        n, longest = B, int(self.cache.lengths.max())
        hide = None if desc else True  # None: only where there is no terminal
        bar = tqdm(range(max_tokens), desc, unit="token", leave=False, disable=hide)
        for t in bar:
            if t == 0:
                desk.draw(n)
            else:
                longest += 1
                step(n, desk.cache.grow(longest))
            if (t + 1) % LOOK_EVERY[device.type]:
                continue
            n_alive = int(desk.alive[:n].sum())
            bar.set_postfix(rows=n_alive, refresh=False)
            if n_alive == 0:
                break
            if n_alive <= 0.9 * n:  # moving rows costs a little, running finished ones costs more
                desk.move_back(n, n_alive)
                n = min(n, -(-n_alive // ROWS_BY[device.type]) * ROWS_BY[device.type])
                longest = int(desk.cache.lengths[:n_alive].max())
        if desk.cache is not self.cache:
            self.cache.copy_(desk.cache)
        turns = [None] * B
        stops = desk.stop_tensors[stop_ids]
        stopped = torch.isin(desk.ids[:B].gather(1, desk.counts[:B, None] - 1)[:, 0], stops)
        columns = (desk.rows, desk.counts, desk.ids, desk.logps)
        rows = zip(*(column[:B].tolist() for column in columns), stopped.tolist())
        for slot, (row, count, ids, logps, row_stopped) in enumerate(rows):
            turns[row] = Sampled(ids[:count], logps[:count], row_stopped)
            self.slot_of[row] = slot
            self.pending[row] = ids[count - 1 : count]
        return turns

    def _desk(self, max_tokens: int) -> Desk:
        """A desk for this cache. On a GPU it is one of the model's, which is kept, since graphs
        want fixed addresses: this cache is copied to it, and back at the end."""
        if not uses_graphs(self.cache):
            return Desk(self.cache, max_tokens)
        model, desk = self.cache.model, getattr(self.cache.model, "desk", None)
        sizes = len(self), self.cache.capacity, max_tokens
        if desk:
            old = len(desk.counts), desk.cache.capacity, desk.max_tokens
            sizes = tuple(map(max, sizes, old))
        if not desk or sizes != old:
            model.desk = desk = None  # the memory of the old one goes first
            model.desk = desk = Desk(Cache(model, *sizes[:2]), sizes[2])
            desk.cache.grow(sizes[1])
        desk.cache.copy_(self.cache)
        return desk

    def select(self, rows: list[int]) -> "Conversations":
        """A copy that holds these rows, in this order; a row may come more than once."""
        new = object.__new__(Conversations)
        new.cache = self.cache.select([self.slot_of[row] for row in rows])
        new.pending = [list(self.pending[row]) for row in rows]
        new.slot_of = list(range(len(rows)))
        return new

    def fork(self, G: int) -> "Conversations":
        """Every row G times, side by side: row b becomes rows b*G .. b*G+G-1."""
        return self.select([row for row in range(len(self)) for _ in range(G)])

    def _check_room(self, more):
        longest = int(self.cache.lengths.max())
        if longest + more > self.cache.capacity:
            raise UserError(
                f"a conversation of {longest} tokens cannot take {more} more: the cache was made "
                f"for {self.cache.capacity}."
            )


def uses_graphs(cache: Cache) -> bool:
    return cache.lengths.is_cuda


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0):
    """One id a row from softmax(logits / temperature), by inverting its distribution function.

    logits (n, V), uniform (n,) in [0, 1) -> ids (n,) int64, their log-probs (n,) float32.
    top_k and top_p narrow what is drawn from; the log-probs stay those of the full distribution."""
    logits = logits.float()
    if temperature not in (0, 1):
        logits = logits / temperature
    probs = logits.softmax(-1)  # (n, V)
    if temperature == 0:
        ids = logits.argmax(-1, keepdim=True)  # (n, 1)
        return ids[:, 0], probs.gather(1, ids)[:, 0].log()
    kept = probs
    if top_k > 0:
        kth = kept.topk(min(top_k, kept.shape[1])).values[:, -1:]  # (n, 1)
        kept = kept.where(kept >= kth, 0)
    if top_p < 1:
        ordered, order = kept.sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # (n, V): mass ahead of each id
        ordered = ordered.where(before < top_p * kept.sum(-1, keepdim=True), 0)
        kept = kept.scatter(1, order, ordered)
    # In two stages, a block and an id in it: a running sum over the whole vocabulary is slow. What
    # has probability 0 is never drawn: the search finds the first sum beyond u, and u is kept below
    # the last one, whatever the rounding.
    blocks = kept.unflatten(1, (-1, math.gcd(kept.shape[1], 256)))  # (n, blocks, width)
    sums = blocks.sum(-1).cumsum(-1)  # (n, blocks)
    below = torch.zeros_like(uniform)[:, None]
    u = torch.minimum(uniform[:, None] * sums[:, -1:], sums[:, -1:].nextafter(below))  # (n, 1)
    block = torch.searchsorted(sums, u, right=True)  # (n, 1)
    u = u - torch.cat((below, sums), dim=1).gather(1, block)
    sums = blocks.take_along_dim(block[:, :, None], dim=1)[:, 0].cumsum(-1)  # (n, width)
    u = torch.minimum(u, sums[:, -1:].nextafter(below))
    ids = block * sums.shape[1] + torch.searchsorted(sums, u, right=True)  # (n, 1)
    return ids[:, 0], probs.gather(1, ids)[:, 0].log()
