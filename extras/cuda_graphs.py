"""Here because launching a decoding step's 800 small kernels from Python takes longer than
running them: the first step of a kind is recorded as a CUDA graph, others are replayed in
one launch. A graph remembers addresses: all turns of a model share one state, whose tensors
never move, and a cache is copied to it when a turn begins, and back when it ends."""

from functools import partial

import torch

from sampler import DecodingState, KVCache, round_up


class GraphedState(DecodingState):
    """A DecodingState on memory that stays, whose steps are recorded and replayed."""

    def __init__(self, model, rows: int, capacity: int, max_tokens: int):
        cache = KVCache(model, rows, capacity)
        cache.grow(capacity)
        super().__init__(cache, max_tokens)
        self.graphs = {}  # kind of step -> a function that replays it
        self.pool = None  # the memory that all graphs share, given by the first

    def step(self, n: int, S: int) -> None:
        """The first step of its kind runs, and is then recorded, which runs nothing."""
        kind = (n, S, self.temperature)
        if kind in self.graphs:
            return self.graphs[kind]()
        super().step(n, S)
        self.graphs[kind], self.pool = record(partial(super().step, n, S), self.pool)

    def end(self) -> None:
        super().end()
        copy_rows(self.cache, self.source)


def sample_by_graphs(model):
    model.decoding_state = graphed_state


def graphed_state(cache: KVCache, max_tokens: int) -> GraphedState:
    """The model's state, with this cache in it. It is made anew, and all graphs with it,
    only where the last one is too small; sizes are rounded up so that this is rare."""
    model = cache.model
    sizes = (len(cache.lengths), round_up(cache.capacity, 256), round_up(max_tokens, 64))
    state = getattr(model, "graphed_state", None)
    old = state.sizes if state else (0, 0, 0)
    sizes = tuple(map(max, sizes, old))
    if sizes != old:
        model.graphed_state = state = None  # the memory of the old one goes first
        model.graphed_state = state = GraphedState(model, *sizes)
        state.sizes = sizes
    state.source = cache
    copy_rows(cache, state.cache)
    return state


def copy_rows(source: KVCache, target: KVCache) -> None:
    """What the rows of the smaller one hold: lengths, hidden states, keys and values."""
    B = min(len(source.lengths), len(target.lengths))
    S = int(source.lengths[:B].max())
    target.grow(S)
    target.lengths[:B] = source.lengths[:B]
    target.hidden[:B] = source.hidden[:B]
    for to, tensor in zip(target.keys + target.values, source.keys + source.values):
        to[:B, :, :S] = tensor[:B, :, :S]


def record(step, pool):
    """(a function that repeats `step` in one launch, the memory pool that graphs share)."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        step()
    return graph.replay, graph.pool()
