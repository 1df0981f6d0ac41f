"""One decoder for Qwen2/2.5/3, Llama 3.x, SmolLM2, Mistral, Phi-3.5; its weights and chat.

    model, chat = load("qwen2.5-1.5b", device="cuda", dtype=torch.bfloat16)
    logits = model.logits(model(ids, positions))  # (B, T) -> (B, T, C) -> (B, T, V)

Parameters bear their Hugging Face names; the caller says how queries meet keys. In shapes:
B rows, T positions, C hidden_size, V vocab_size, D head_dim, S keys, H query heads, KV key
heads: H / KV neighbouring query heads share a key head.
"""

import json
import math
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from huggingface_hub import constants, save_torch_state_dict, snapshot_download
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import nn
from torch.utils.checkpoint import checkpoint

Linear = partial(nn.Linear, bias=False)


# ---- the decoder ----
class ModelConfig(SimpleNamespace):
    """config.json as attributes, those of its rope among them; `source` is all of it."""

    rope_theta, tie_word_embeddings = 1e4, False
    num_key_value_heads = head_dim = sliding_window = attention_factor = factor = None

    @classmethod
    def from_dict(cls, source: dict):
        # Newer files have rope_parameters, older ones rope_scaling. I put all at the top.
        rope = source.get("rope_parameters") or source.get("rope_scaling")
        rope = rope or {"type": "default"}
        config = cls(**{**source, **rope}, source=source)
        config.rope_type = rope.get("rope_type") or rope.get("type")
        for key, can in SUPPORTED.items():
            value = getattr(config, key, None) or None
            kinds = value if isinstance(value, list) else [value]
            known = all(kind in can for kind in kinds)
            check(known, f"config.json has {key} = {value!r:.80}, this code does {can}.")
        # They are built before any weight is read.
        check(0 < config.num_hidden_layers <= 1000, "config.json: not 1 to 1000 layers.")
        H = config.num_attention_heads
        KV = config.num_key_value_heads or H
        check(H % KV == 0, f"config.json: {H} heads cannot share {KV} key heads.")
        config.num_key_value_heads = KV
        config.head_dim = config.head_dim or config.hidden_size // H
        # I attend to all tokens, up to a sliding window. (Qwen's files only name one.)
        window, limit = config.sliding_window, config.max_position_embeddings
        if window and config.model_type not in ("qwen2", "qwen3"):
            config.max_position_embeddings = min(window, limit)
        return config


def rope_tables(config, n: int):
    """cos and sin, (n, D) float32, of the angles position * rope_theta ** (-2i / D) for
    i < D/2, twice: once for each half of a head (RoFormer, arXiv 2104.09864)."""
    D, scale = config.head_dim, 1.0
    periods = config.rope_theta ** (torch.arange(0, D, 2).float() / D)  # (D/2,), per radian
    frequencies = 1 / periods
    if config.rope_type == "llama3":
        # Slow frequencies are divided by factor, fast ones kept, the rest is blended.
        turns = config.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = config.low_freq_factor, config.high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # (D/2,)
        frequencies = keep * frequencies + (1 - keep) * (frequencies / config.factor)
    if config.rope_type == "longrope":
        # arXiv 2402.13753: each period has its factor, and cos and sin are scaled.
        original = config.original_max_position_embeddings
        factors = config.long_factor if n > original else config.short_factor
        # This order of operations rounds as transformers does: it shows far out.
        frequencies = 1 / (torch.tensor(factors) * periods)
        extension = config.factor or config.source["max_position_embeddings"] / original
        growth = math.log(max(1, extension)) / math.log(original)
        scale = config.attention_factor or math.sqrt(1 + growth)
    angles = torch.outer(torch.arange(n).float(), frequencies.repeat(2))  # (n, D)
    return angles.cos() * scale, angles.sin() * scale


def rotate(x, cos, sin):
    """Rope, computed in float32: x (B, heads, T, D), cos and sin (B, 1, T, D) -> like x."""
    x1, x2 = x.chunk(2, dim=-1)  # pairs (x1[i], x2[i]) are points of planes
    turned = torch.cat((-x2, x1), dim=-1)  # by 90 degrees
    return (x * cos + turned * sin).to(x.dtype)


def attention(layer, q, k, v, visible=None):
    """q (B, H, T, D), k and v (B, KV, S, D) -> (B, H, T, D). visible (B, T, S) bool: True
    where a query may see a key; None is causal."""
    B, H, T, D = q.shape
    group = H // k.shape[1]  # queries per key
    if visible is None:
        visible = q.new_ones(1, T, T, dtype=torch.bool).tril()  # (1, T, T)
    # With a mask enable_gqa is slow on a GPU: the heads of a group become more queries.
    q = q.reshape(B, -1, group * T, D)  # (B, KV, group * T, D)
    visible = visible.repeat(1, group, 1)[:, None]  # (B, 1, group * T, S)
    y = F.scaled_dot_product_attention(q, k, v, visible)
    return y.reshape(B, H, T, D)


class Attention(nn.Module):
    def __init__(self, config, layer: int):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        H, KV = config.num_attention_heads, config.num_key_value_heads
        self.layer, self.head_dim = layer, D
        self.sizes = [H * D, KV * D, KV * D]
        bias = config.model_type == "qwen2"
        if config.model_type == "phi3":
            self.qkv_proj = Linear(C, sum(self.sizes))
        else:
            self.q_proj = nn.Linear(C, H * D, bias)
            self.k_proj = nn.Linear(C, KV * D, bias)
            self.v_proj = nn.Linear(C, KV * D, bias)
        self.o_proj = Linear(H * D, C)
        # Qwen3 normalises each head's query and key.
        Norm = nn.RMSNorm if config.model_type == "qwen3" else nn.Identity
        self.q_norm = Norm(D, config.rms_norm_eps)
        self.k_norm = Norm(D, config.rms_norm_eps)

    def forward(self, x, cos, sin, attend):
        B, T, C = x.shape
        if hasattr(self, "qkv_proj"):
            q, k, v = self.qkv_proj(x).split(self.sizes, dim=-1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q = q.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, KV, T, D)
        v = v.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, KV, T, D)
        q = rotate(self.q_norm(q), cos, sin)
        k = rotate(self.k_norm(k), cos, sin)
        y = attend(self.layer, q, k, v).transpose(1, 2)  # (B, T, H, D)
        return self.o_proj(y.flatten(2))  # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, inner = config.hidden_size, config.intermediate_size
        if config.model_type == "phi3":
            self.gate_up_proj = Linear(C, 2 * inner)
        else:
            self.gate_proj = Linear(C, inner)
            self.up_proj = Linear(C, inner)
        self.down_proj = Linear(inner, C)

    def forward(self, x):
        if hasattr(self, "gate_up_proj"):
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)  # (B, T, inner)
        return self.down_proj(F.silu(gate) * up)  # (B, T, C)


class Layer(nn.Module):
    def __init__(self, config, layer: int):
        super().__init__()
        C, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(C, eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(C, eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, attend):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Ids to hidden states; `logits` is apart, since few positions need the head. Norms,
    rope and head compute in float32 for any dtype of the weights."""

    def __init__(self, config: ModelConfig, context: int | None = None):
        super().__init__()
        V, C = config.vocab_size, config.hidden_size
        layers = [Layer(config, i) for i in range(config.num_hidden_layers)]
        self.config = config
        self.checkpointing = False  # True: layers are computed again in the backward pass
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(V, C)
        self.model.layers = nn.ModuleList(layers)
        self.model.norm = nn.RMSNorm(C, config.rms_norm_eps)
        self.lm_head = Linear(C, V)
        if config.tie_word_embeddings:  # one Parameter, which named_parameters() lists once
            self.lm_head.weight = self.model.embed_tokens.weight
        self.set_context(context)

    def set_context(self, n=None):
        """Rope tables for positions 0..n-1; None or 0: what the model has, up to 4096."""
        limit = self.config.max_position_embeddings
        n = n or min(4096, limit)
        check(n <= limit, f"a context of {n} is beyond the {limit} of its config.json.")
        device = self.lm_head.weight.device
        cos, sin = rope_tables(self.config, n)
        # No buffers: those would follow the weights to bfloat16, too coarse for angles.
        self.cos, self.sin = cos.to(device), sin.to(device)  # (n, D)
        self.context = n

    def forward(self, ids, positions, attend=attention) -> torch.Tensor:
        """ids and positions (B, T) int64, positions < context -> hidden (B, T, C).
        attend(layer, q, k, v): q (B, H, T, D), k and v (B, KV, T, D), roped -> like q."""
        x = self.model.embed_tokens(ids)  # (B, T, C)
        cos = self.cos[positions][:, None]  # (B, 1, T, D)
        sin = self.sin[positions][:, None]
        for layer in self.model.layers:
            if self.checkpointing and torch.is_grad_enabled():
                layer = partial(checkpoint, layer, use_reentrant=False)
            x = layer(x, cos, sin, attend)
        return self.model.norm(x)

    def logits(self, hidden):
        """hidden (..., C) -> (..., V) float32, as bfloat16 is coarse. But sampling on a CPU
        (inference mode) keeps the weights' dtype: float32 would cost ten layers' time."""
        if torch.is_inference_mode_enabled() and not hidden.is_cuda:
            return self.lm_head(hidden)
        weight = self.lm_head.weight
        if torch.is_grad_enabled() or not hidden.is_cuda or hidden.dtype == torch.float32:
            return F.linear(hidden.float(), weight.float())
        # On a GPU without gradients: no float32 copy of the head. Takes matrices only.
        flat = torch.mm(hidden.flatten(0, -2), weight.t(), out_dtype=torch.float32)
        return flat.view(*hidden.shape[:-1], -1)


# ---- weights in and out ----
class UserError(Exception):
    """What the user can mend, in one sentence: entry points print it, no traceback."""


def check(ok, sentence: str):
    if not ok:
        raise UserError(sentence)


@contextmanager
def explain(sentence: str, *errors):
    """Turns these errors into a UserError: the sentence, and the reason in brackets."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise  # the caller has better words
    except errors as error:
        reason = " ".join(str(error).split())[:600].rstrip(".")
        raise UserError(f"{sentence} ({type(error).__name__}: {reason}).") from error


INDEX = "model.safetensors.index.json"  # tells which tensor is in which file
# Setting -> what we can do; None stands for absent, null, false and empty.
SUPPORTED = {
    "model_type": ["llama", "mistral", "phi3", "qwen2", "qwen3"],
    "rope_type": ["default", "llama3", "longrope"],
    "layer_types": ["full_attention", None],
    "hidden_act": ["silu", None],
    "partial_rotary_factor": [1, None],
    "use_sliding_window": [None],
}


def read_json(path: Path, optional: bool = False) -> dict:
    """The JSON object in a file ({} if an optional one is absent); UserError otherwise."""
    if optional and not path.is_file():
        return {}
    with explain(f"{path} is missing or damaged; fetch it", Exception):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def load(name, device="cpu", dtype=torch.float32, context=None):
    """(Decoder, Chat) by name (see `resolve`). UserError where files are missing, damaged,
    or of a kind that this code would compute wrongly."""
    found = torch.device(device).type != "cuda" or torch.cuda.is_available()
    check(found, "PyTorch finds no GPU for cuda; take --device cpu.")
    folder = resolve(name)
    damage = f"{folder}: config.json or weights are damaged or missing (no pickle is read)"
    with explain(damage, Exception):
        config = ModelConfig.from_dict(read_json(folder / "config.json"))
        chat = Chat(folder)
        V, ids = config.vocab_size, max(chat.tokenizer.get_vocab().values()) + 1
        check(ids <= V, f"{folder}: the tokenizer has {ids} ids, the model has {V}.")
        with torch.device("meta"):  # shapes alone
            model = Decoder(config, context).to(dtype)
        read_weights(model, folder, device)
        model.set_context(model.context)  # the rope tables again, on the device
    return model, chat


def read_weights(model: Decoder, folder: Path, device):
    """Fills a decoder on the meta device from one safetensors file, or more by an index."""
    index = read_json(folder / INDEX, optional=True).get("weight_map", {})
    state = {}
    for path in sorted(set(index.values())) or ["model.safetensors"]:
        check(Path(path).name == path, f"{folder / INDEX} points to {path!r:.80}.")
        file = safe_open(folder / path, "pt")
        for name in file.keys():
            # Older files hold tables of rope, and some shards a leftover.
            if index.get(name, path) == path and not name.endswith("inv_freq"):
                tensor = state[name] = file.get_tensor(name)
                check(tensor.is_floating_point(), f"{name} holds {tensor.dtype}.")
    model.to_empty(device=device)
    if model.config.tie_word_embeddings:  # few files hold it twice, and to_empty unties
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model.lm_head.weight = model.model.embed_tokens.weight
    model.load_state_dict(state)


def save(model, chat, folder):
    """Writes a Hugging Face folder, a new one, in the model's dtype."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    config = dict(model.config.source)
    config.pop("auto_map", None)  # names Python files that are not copied
    key = "dtype" if "dtype" in config else "torch_dtype"
    config[key] = str(model.lm_head.weight.dtype).split(".")[1]
    files = {**chat.files, "config.json": json.dumps(config, indent=2).encode()}
    with explain(f"the model cannot be written to {folder}", Exception):
        folder.mkdir(parents=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        save_torch_state_dict(weights, folder)


# ---- names and the hub ----
NAMES = {  # short name -> hub id
    **{f"qwen2-{n}b": f"Qwen/Qwen2-{n}B-Instruct" for n in ("1.5", "7")},
    **{f"qwen2.5-{n}b": f"Qwen/Qwen2.5-{n}B-Instruct" for n in ("0.5", "1.5", "3", "7")},
    **{f"qwen3-{n}b": f"Qwen/Qwen3-{n}B" for n in ("0.6", "1.7", "4", "8")},
    **{f"llama3.2-{n}b": f"meta-llama/Llama-3.2-{n}B-Instruct" for n in ("1", "3")},
    "llama3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    **{f"smollm2-{n}m": f"HuggingFaceTB/SmolLM2-{n}M-Instruct" for n in ("135", "360")},
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "phi3.5-mini": "microsoft/Phi-3.5-mini-instruct",
    "palmyra-mini": "Writer/palmyra-mini",
}
# Of a model's folder, besides config.json; save() copies them.
TEXT_FILES = "tokenizer.json tokenizer_config.json chat_template.jinja".split()
TEXT_FILES += "tokenizer.model special_tokens_map.json generation_config.json".split()


def resolve(name: str) -> Path:
    """The folder of a model: `tiny`, a short name, a folder, a run's last step, hub id."""
    if name == "tiny":
        return Path(__file__).resolve().parent / "tiny"
    path, repo = Path(name).expanduser(), NAMES.get(name.lower())
    if path.is_dir() and not repo:
        return max(path.glob("step-" + 6 * "[0-9]"), default=path)
    if name.count("/") == 1 and not path.parent.is_dir():
        repo = name
    known = ", ".join(["tiny", *NAMES])
    check(repo, f"there is no model '{name}'; known: {known}, hub ids, folders and runs.")
    return hub_download(repo, ["config.json", "model*.safetensors", INDEX, *TEXT_FILES])


def hub_download(repo: str, patterns: list[str], repo_type="model") -> Path:
    """The cached files of a Hugging Face repository that match a pattern: their folder."""
    hint = f"the {repo_type} {repo} could not be fetched from {constants.ENDPOINT}; check "
    hint += "the spelling, HF_TOKEN (if gated), the network, the disk, or pass a local path"
    with explain(hint, Exception):
        return Path(snapshot_download(repo, repo_type=repo_type, allow_patterns=patterns))


# ---- the chat template: what it expects; the tojson of jinja2 itself is for HTML ----
JINJA = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
JINJA.add_extension("jinja2.ext.loopcontrols")
JINJA.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
JINJA.globals["raise_exception"] = lambda reason: check(False, f"refused: {reason!r}.")
JINJA.globals["strftime_now"] = lambda form: "26 Jul 2024"  # the same prompt every day
# Qwen3 shall not think first: reflecting is its own turn.
JINJA.globals.update(add_generation_prompt=True, enable_thinking=False)


class Chat:
    """A model's tokenizer and chat template. stop_ids: every id that ends a turn. thinks:
    the template opens <think> itself. native_tools: it prints the tools that it is given,
    and calls as JSON (tried with one named MARKED). No sampled turn is encoded again."""

    def __init__(self, folder: Path):
        paths = [folder / name for name in TEXT_FILES if (folder / name).is_file()]
        self.files = {path.name: path.read_bytes() for path in paths}
        settings = read_json(folder / "special_tokens_map.json", optional=True)
        settings |= read_json(folder / "tokenizer_config.json", optional=True)
        tokens = {}  # templates may write them
        for key in ("bos_token", "eos_token", "pad_token"):
            if token := settings.get(key):
                tokens[key] = token["content"] if isinstance(token, dict) else token
        with explain(f"{folder}: tokenizer.json or chat template is damaged", Exception):
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            text = settings.get("chat_template")
            if "chat_template.jinja" in self.files:
                text = self.files["chat_template.jinja"].decode()
            check(text, f"{folder} has no chat template; take a model made for chat.")
            self.template = JINJA.from_string(text, globals=tokens)
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        # What ends a turn: the first special token that the template writes behind one.
        self.end_of_turn = None  # glue looks at it
        special = self.tokenizer.get_added_tokens_decoder()
        self.end_of_turn = next((i for i in self.glue("x") if i in special), None)
        eos = self.tokenizer.token_to_id(tokens.get("eos_token", ""))
        stops = {eos, self.end_of_turn}
        for name in ("config.json", "generation_config.json"):
            ids = read_json(folder / name, optional=True).get("eos_token_id")
            stops.update(ids if isinstance(ids, list) else [ids])
        self.stop_ids = frozenset(stops - {None})
        check(self.stop_ids, f"{folder}: no token ends a turn; take a model made for chat.")
        # All other special tokens (<answer>, </think>, <tool_call>) are for the verifier.
        silent = {self.tokenizer.token_to_id(token) for token in tokens.values()}
        self.silent_ids = self.stop_ids | silent
        user = [{"role": "user", "content": "x"}]
        self.thinks = self.render(user).rstrip().endswith("<think>")  # as each turn begins
        marked = {"name": "MARKED", "description": "", "parameters": {}}
        call = {"id": "123456789", "function": {"name": "MARKED", "arguments": {}}}
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        self.native_tools = False
        with suppress(UserError):  # a template may refuse all tools
            shown = self.render(user, [{"type": "function", "function": marked}])
            # Calls must be JSON, as verifiers read: else tools are told in our own words.
            written = '"name": "MARKED"' in self.render([*user, turn])
            self.native_tools = written and "MARKED" in shown

    def encode(self, text: str) -> list[int]:
        """Special tokens written in the text count as such; none is added."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        ids = [i for i in ids if i not in self.silent_ids]
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def prompt(self, messages: list[dict], tools=None) -> list[int]:
        """Messages ({"role", "content"}), tools (JSON schemas) and the next header."""
        return self.encode(self.render(messages, tools))

    def glue(self, instruction: str, last_id: int = -1) -> list[int]:
        """The ids between a sampled turn and the next: end of turn (unless last_id, the
        turn's last, was it), the user's instruction, the assistant's header."""
        answer = "SAMPLED-TURN"  # what the template writes behind it is the glue
        turns = [("user", "x"), ("assistant", answer), ("user", instruction)]
        text = self.render([{"role": role, "content": words} for role, words in turns])
        check(answer in text, "the chat template drops answers; take another model.")
        ids = self.encode(text.split(answer, 1)[1])
        if last_id == self.end_of_turn:
            ids = ids[ids.index(last_id) + 1 :]
        return ids

    def render(self, messages, tools=None):
        with explain("the chat template refuses these messages", Exception):
            return self.template.render(messages=messages, tools=tools)
