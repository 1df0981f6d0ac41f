"""One decoder for Qwen2/2.5/3, Llama 3.x, SmolLM2, Mistral, Phi-3.5; its weights and chat.

    model, chat = load("qwen2.5-1.5b", device="cuda", dtype=torch.bfloat16)
    logits = model.logits(model(ids, positions))  # (B, T) -> (B, T, C) -> (B, T, V)

The decoder comes first, then weights in and out, names and the hub, the chat template.
Parameters bear their Hugging Face names, so that they match the tensors of a file one to
one. There is no cache here: the caller says how queries meet keys.

B rows, T positions, C hidden_size, V vocab_size, D head_dim, S keys that may be seen,
H query heads, KV key heads: H / KV neighbouring query heads share a key head.
"""

import json
import math
import re
from contextlib import contextmanager
from datetime import date
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jinja2.ext
import jinja2.sandbox
import torch
import torch.nn.functional as F
from huggingface_hub import constants, save_torch_state_dict, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import nn
from torch.utils.checkpoint import checkpoint


# ---- the decoder ----
class ModelConfig(SimpleNamespace):
    """All of config.json as attributes, under the names it has there: hidden_size,
    num_attention_heads, num_key_value_heads, rope_theta and so on; the numbers of its rope
    among them. `source` is config.json itself."""

    @classmethod
    def from_dict(cls, source: dict, where="config.json") -> "ModelConfig":
        """UserError, by name, for what it asks for and the decoder does not do."""
        # Newer files keep rope's numbers in rope_parameters, older ones in rope_scaling and
        # at the top. I put all at the top.
        rope = source.get("rope_parameters") or source.get("rope_scaling") or {}
        settings = {"rope_theta": 1e4, **source, **rope}
        settings["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
        check_supported(settings, where)
        config = cls(**settings, source=source)
        H = config.num_attention_heads
        KV = settings.get("num_key_value_heads") or H
        check(H % KV == 0, f"{where}: {H} heads cannot share {KV} key heads.")
        config.num_key_value_heads = KV
        config.head_dim = settings.get("head_dim") or config.hidden_size // H
        config.tie_word_embeddings = bool(settings.get("tie_word_embeddings"))
        # We attend to all tokens, so no context goes beyond a window. Qwen's is not in use.
        window = settings.get("sliding_window") or config.max_position_embeddings
        if config.model_type not in ("qwen2", "qwen3"):
            config.max_position_embeddings = min(window, config.max_position_embeddings)
        return config


def rope_tables(config: ModelConfig, n: int):
    """cos and sin, (n, D) float32, of the angles position * rope_theta ** (-2i / D) for
    i < D/2, twice: once for each half of a head (RoFormer, arXiv 2104.09864)."""
    D, scale = config.head_dim, 1.0
    periods = config.rope_theta ** (torch.arange(0, D, 2).float() / D)  # (D/2,), of 2 pi
    frequencies = 1 / periods
    if config.rope_type == "llama3":
        # Slow frequencies, with few turns in the original context, are divided by factor,
        # fast ones are kept, and what is in between is blended.
        original = config.original_max_position_embeddings
        turns = original * frequencies / (2 * math.pi)
        low, high = config.low_freq_factor, config.high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # (D/2,)
        slow = frequencies / config.factor
        frequencies = keep * frequencies + (1 - keep) * slow
    if config.rope_type == "longrope":
        # arXiv 2402.13753: each period has its factor, and cos and sin are scaled.
        original = config.original_max_position_embeddings
        factors = config.long_factor if n > original else config.short_factor
        # Rounded as transformers does it, which shows at positions in the thousands.
        frequencies = 1 / (torch.tensor(factors) * periods)
        longer = vars(config).get("factor")
        longer = longer or config.source["max_position_embeddings"] / original
        scale = math.sqrt(1 + math.log(max(1, longer)) / math.log(original))
        scale = vars(config).get("attention_factor") or scale
    angles = torch.outer(torch.arange(n).float(), frequencies)  # (n, D/2)
    angles = torch.cat((angles, angles), dim=1)  # (n, D)
    return angles.cos() * scale, angles.sin() * scale


def rotate(x, cos, sin):
    """Rope, computed in float32: x (B, heads, T, D), cos and sin (B, 1, T, D) -> like x."""
    x1, x2 = x.chunk(2, dim=-1)
    # Each pair (x1[i], x2[i]) is a point of a plane; this one is turned by 90 degrees.
    turned = torch.cat((-x2, x1), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


def attention(layer, q, k, v, visible=None):
    """q (B, H, T, D), k and v (B, KV, S, D) -> (B, H, T, D). visible (B, T, S) bool: True
    where a query may see a key; None is causal. We leave enable_gqa alone: with a mask it
    is slow on a GPU."""
    B, H, T, D = q.shape
    group = H // k.shape[1]  # query heads that share a key head
    if visible is None:
        k = k.repeat_interleave(group, dim=1)  # (B, H, S, D)
        v = v.repeat_interleave(group, dim=1)  # (B, H, S, D)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # Cheaper than repeating keys: the heads of a group become more queries of one head.
    q = q.reshape(B, -1, group * T, D)  # (B, KV, group * T, D)
    visible = visible.repeat(1, group, 1)[:, None]  # (B, 1, group * T, S)
    y = F.scaled_dot_product_attention(q, k, v, visible)
    return y.view(B, H, T, D)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        H, KV = config.num_attention_heads, config.num_key_value_heads
        self.layer, self.head_dim = layer, D
        self.sizes = [H * D, KV * D, KV * D]
        bias = config.model_type == "qwen2"
        if config.model_type == "phi3":
            self.qkv_proj = nn.Linear(C, sum(self.sizes), bias=False)
        else:
            self.q_proj = nn.Linear(C, H * D, bias)
            self.k_proj = nn.Linear(C, KV * D, bias)
            self.v_proj = nn.Linear(C, KV * D, bias)
        self.o_proj = nn.Linear(H * D, C, bias=False)
        # Qwen3 normalises each head's query and key.
        Norm = nn.RMSNorm if config.model_type == "qwen3" else nn.Identity
        self.q_norm = Norm(D, eps=config.rms_norm_eps)
        self.k_norm = Norm(D, eps=config.rms_norm_eps)

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
        y = attend(self.layer, q, k, v)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, -1)  # (B, T, H * D)
        return self.o_proj(y)  # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        C, inner = config.hidden_size, config.intermediate_size
        if config.model_type == "phi3":
            self.gate_up_proj = nn.Linear(C, 2 * inner, bias=False)
        else:
            self.gate_proj = nn.Linear(C, inner, bias=False)
            self.up_proj = nn.Linear(C, inner, bias=False)
        self.down_proj = nn.Linear(inner, C, bias=False)

    def forward(self, x):
        if hasattr(self, "gate_up_proj"):
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)  # (B, T, inner)
        return self.down_proj(F.silu(gate) * up)  # (B, T, C)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        C, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(C, eps=eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(C, eps=eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, attend):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Ids to hidden states; `logits` is apart, since few positions need the head. Norms
    (nn.RMSNorm always), rope and head compute in float32 for any dtype of the weights."""

    def __init__(self, config: ModelConfig, context: int | None = None):
        super().__init__()
        V, C = config.vocab_size, config.hidden_size
        layers = [Layer(config, i) for i in range(config.num_hidden_layers)]
        self.config = config
        # True: layers are computed again in the backward pass, which saves memory.
        self.checkpointing = False
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(V, C)
        self.model.layers = nn.ModuleList(layers)
        self.model.norm = nn.RMSNorm(C, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(C, V, bias=False)
        self.tie()
        self.set_context(context)

    @property
    def head(self) -> nn.Linear:
        return self.lm_head

    def to_empty(self, **where):
        # It makes a new Parameter at each place, and so unties the head.
        super().to_empty(**where)
        return self.tie()

    def tie(self):
        """One Parameter for embedding and head, which named_parameters() lists once."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        return self

    def set_context(self, n: int | None = None) -> None:
        """Rope tables for positions 0..n-1; None or 0: what the model allows, up to 4096.
        UserError beyond that. n also chooses longrope's factors, so it is set once a run:
        cached keys and training must agree."""
        limit = self.config.max_position_embeddings
        n = n or min(4096, limit)
        check(n <= limit, f"a context of {n} is beyond the {limit} of its config.json.")
        device = self.model.embed_tokens.weight.device
        cos, sin = rope_tables(self.config, n)
        # No buffers: those would follow the weights to bfloat16, too coarse for angles.
        self.cos = cos.to(device)  # (n, D)
        self.sin = sin.to(device)  # (n, D)
        self.context = n

    def forward(self, ids, positions, attend=attention) -> torch.Tensor:
        """ids and positions (B, T) int64, positions < context -> hidden (B, T, C).
        attend(layer, q, k, v): q (B, H, T, D), k and v (B, KV, T, D), roped -> like q."""
        x = self.model.embed_tokens(ids)  # (B, T, C)
        cos = self.cos[positions][:, None]  # (B, 1, T, D)
        sin = self.sin[positions][:, None]  # (B, 1, T, D)
        for layer in self.model.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, attend, use_reentrant=False)
            else:
                x = layer(x, cos, sin, attend)
        return self.model.norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (..., C) -> (..., V) float32, computed in float32, as bfloat16 is coarse.
        The exception is sampling (inference mode) in bfloat16 on a CPU, where that would
        cost as much as ten layers: there, as in serving engines, logits are bfloat16."""
        if torch.is_inference_mode_enabled() and not hidden.is_cuda:
            return self.lm_head(hidden)
        weight, training = self.lm_head.weight, torch.is_grad_enabled()
        if weight.is_cuda and weight.dtype == torch.bfloat16 and not training:
            # Without a float32 copy of the head. This product takes matrices only.
            flat = torch.mm(hidden.flatten(0, -2), weight.t(), out_dtype=torch.float32)
            return flat.view(*hidden.shape[:-1], -1)
        return F.linear(hidden.float(), weight.float())


# ---- weights in and out ----
class UserError(Exception):
    """What the user can mend, in one sentence: entry points print it, no traceback."""


def check(ok, sentence: str):
    if not ok:
        raise UserError(sentence)


@contextmanager
def explain(sentence: str, *errors: type[Exception]):
    """Turns these errors into a UserError: the sentence, and the reason in brackets."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise  # who catches these has better words for them
    except errors as error:
        reason = " ".join(str(error).split())[:600].rstrip(".")
        raise UserError(f"{sentence} ({type(error).__name__}: {reason}).") from error


SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"  # tells which tensor is in which file
SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "max_position_embeddings rms_norm_eps rope_theta"
).split()
# Setting -> what we can do; None stands for absent, null, false and empty.
SUPPORTED = {
    "model_type": ["llama", "mistral", "phi3", "qwen2", "qwen3"],
    "rope_type": ["default", "llama3", "longrope"],
    "hidden_act": ["silu", None],
    "partial_rotary_factor": [1, None],
}
# attention_bias would be on o_proj as well; full_attention names one of several ropes.
UNSUPPORTED = (
    "attention_bias mlp_bias use_sliding_window full_attention num_experts "
    "num_local_experts quantization_config"
).split()


def check_supported(settings: dict, where: str) -> None:
    """UserError, by name, for what config.json asks for and the decoder does not do."""
    for key in [*SUPPORTED, *UNSUPPORTED]:
        value, can = settings.get(key) or None, SUPPORTED.get(key, [None])
        check(value in can, f"{where} has {key} = {value!r:.80}, this code does {can}.")
    kinds = set(settings.get("layer_types") or ["full_attention"])
    check(kinds == {"full_attention"}, f"{where} has layer_types {sorted(kinds)}.")
    for key in SIZES:
        value = settings.get(key)
        good = type(value) in (int, float) and value > 0
        check(good, f"{where}: {key} should be a positive number, not {value!r:.80}.")
    # Layers are built before the weights can contradict, and that takes its time.
    check(settings["num_hidden_layers"] <= 1000, f"{where} has over 1000 layers.")


def read_json(path: Path, optional: bool = False) -> dict:
    """The JSON object in a file ({} if an optional one is absent); UserError otherwise."""
    if optional and not path.is_file():
        return {}
    with explain(f"{path} is missing or damaged; fetch it", Exception):
        data = json.loads(path.read_text(encoding="utf-8"))
    check(isinstance(data, dict), f"{path} should hold a JSON object.")
    return data


def load(name, device="cpu", dtype=torch.float32, context=None):
    """A (Decoder, Chat) by name (see `resolve`), for that many tokens (see `set_context`).
    UserError for whatever is wrong with it, before the weights are read where it shows
    before."""
    no_gpu = torch.device(device).type == "cuda" and not torch.cuda.is_available()
    check(not no_gpu, "cuda is asked for, but PyTorch finds no GPU; take --device cpu.")
    folder = resolve(name)
    source = read_json(folder / "config.json")
    # For all that nobody thought of, too, such as a list where a number should be.
    damage = f"{folder}: config.json or weights are damaged or missing (no pickle is read)"
    with explain(damage, Exception):
        config = ModelConfig.from_dict(source, f"{folder}/config.json")
        chat = Chat(folder)
        V, ids = config.vocab_size, max(chat.tokenizer.get_vocab().values(), default=0) + 1
        check(ids <= V, f"{folder}: the tokenizer has {ids} ids, the model has {V}.")
        with torch.device("meta"):  # shapes without memory
            model = Decoder(config, context).to(dtype)
        read_weights(model, folder, device)
        model.set_context(model.context)  # the tables had no memory either
    return model, chat


@torch.no_grad()
def read_weights(model: Decoder, folder: Path, device) -> None:
    """Fills a decoder on the meta device from safetensors: one file, or several by their
    index. Tensors that misfit are named (UserError) before any is read."""
    wanted = {f"{name} float {[*p.shape]}" for name, p in model.named_parameters()}
    names = dict(model.named_parameters())
    index = read_json(folder / INDEX, optional=True).get("weight_map", {})
    tensors, present = {}, set()  # what is in the files, not read yet; the like of `wanted`
    for path in sorted(set(index.values())) or ["model.safetensors"]:
        check(Path(path).name == path, f"{folder / INDEX} points to {path!r:.80}.")
        file = safe_open(folder / path, framework="pt")
        for name in file.keys():
            # Older files hold tables of rope, and some a tied head a second time.
            extra = name.endswith(("rotary_emb.inv_freq", "lm_head.weight"))
            if index.get(name, path) != path or (extra and name not in names):
                continue
            tensors[name] = file.get_slice(name)
            dtype = re.sub("^(F32|F16|BF16)$", "float", tensors[name].get_dtype())
            present.add(f"{name} {dtype} {tensors[name].get_shape()}")
    lacks, has = sorted(wanted - present)[:5], sorted(present - wanted)[:5]
    sentence = f"{folder} misfits its config.json: it lacks {lacks} and has {has}."
    check(wanted == present, sentence)
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[name][:])


def save(model, chat, folder, dtype=None) -> None:
    """Writes a Hugging Face folder, which must not exist yet; dtype None keeps the model's.
    UserError if it cannot be written; the caller removes what was begun."""
    folder = Path(folder)
    dtype = dtype or model.head.weight.dtype
    weights = {name: p.detach().to(dtype) for name, p in model.named_parameters()}
    config = dict(model.config.source)
    # It names Python files that are neither copied nor needed.
    config.pop("auto_map", None)
    key = "dtype" if "dtype" in config else "torch_dtype"
    config[key] = str(dtype).removeprefix("torch.")
    with explain(f"the model cannot be written to {folder}", Exception):
        folder.mkdir(parents=True)
        for name, content in chat.files.items():
            (folder / name).write_bytes(content)
        text = json.dumps(config, indent=2)
        (folder / "config.json").write_text(text, encoding="utf-8")
        save_torch_state_dict(weights, folder, max_shard_size=SHARD_BYTES)


# ---- names and the hub ----
# Short name -> hub id; a new one is one line here.
NAMES = {
    **{f"qwen2-{n}b": f"Qwen/Qwen2-{n}B-Instruct" for n in ("1.5", "7")},
    **{f"qwen2.5-{n}b": f"Qwen/Qwen2.5-{n}B-Instruct" for n in ("0.5", "1.5", "3", "7")},
    **{f"qwen3-{n}b": f"Qwen/Qwen3-{n}B" for n in ("0.6", "1.7", "4", "8")},
    **{f"llama3.2-{n}b": f"meta-llama/Llama-3.2-{n}B-Instruct" for n in ("1", "3")},
    "llama3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "phi3.5-mini": "microsoft/Phi-3.5-mini-instruct",
    "palmyra-mini": "Writer/palmyra-mini",
}
TEXT_FILES = (  # of a model's folder, besides config.json; save() copies them
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json "
    "vocab.json merges.txt tokenizer.model chat_template.jinja generation_config.json"
).split()
WEIGHTS = ["model.safetensors", "model-*.safetensors", INDEX]


def resolve(name: str) -> Path:
    """The folder of a model: `tiny`, a short name, a folder, a run (its last step), a hub
    id. A short name wins over a folder of that name, which ./name still reaches."""
    path = Path(name).expanduser()
    if name == "tiny":
        return Path(__file__).resolve().parent / "tiny"
    if path.is_dir() and name.lower() not in NAMES:
        steps = [p for p in path.iterdir() if re.fullmatch(r"step-\d+", p.name)]
        return max(steps, key=lambda p: int(p.name[5:]), default=path)
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not path.parent.is_dir()
    known = ", ".join(["tiny", *NAMES])
    problem = f"there is no model '{name}'; known are {known}, hub ids, folders and runs."
    check(is_hub_id or name.lower() in NAMES, problem)
    repo = NAMES.get(name.lower(), name)
    return hub_download(repo, ["config.json", *WEIGHTS, *TEXT_FILES])


def hub_download(repo: str, patterns: list[str], repo_type="model") -> Path:
    """The local folder with the files of a Hugging Face repository that match a pattern.
    They come from its cache, too; HF_ENDPOINT and HF_TOKEN are honoured."""
    hint = (
        f"the {repo_type} {repo} could not be fetched from {constants.ENDPOINT}; check the "
        "spelling, HF_TOKEN (if it is private, or gated: accept the terms on its page "
        "first), the network and the disk, or pass a local path instead"
    )
    with explain(hint, Exception):
        try:
            return Path(
                snapshot_download(repo, repo_type=repo_type, allow_patterns=patterns)
            )
        except LocalEntryNotFoundError as error:
            # It is not in the cache either. Why the hub did not give it is the cause.
            raise (error.__cause__ or error) from None


# ---- the chat template ----
# What templates expect of their environment. The tojson of jinja2 itself is for HTML.
JINJA = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
)
JINJA.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
JINJA.globals["raise_exception"] = lambda reason: check(False, f"refused: {reason}.")
# Llama 3 writes the date into its prompt: I pin it, or no run could be repeated.
JINJA.globals["strftime_now"] = date(2024, 7, 26).strftime


class Chat:
    """A model's tokenizer and chat template. A conversation only grows, by ids: `prompt`
    begins it, `glue` joins a sampled turn to the next, and no sampled turn is encoded
    again. stop_ids: every id that ends a turn. native_tools: the template can show
    tools."""

    def __init__(self, folder: Path):
        paths = [folder / name for name in TEXT_FILES if (folder / name).is_file()]
        # For save(), when the folder may be gone.
        self.files = {path.name: path.read_bytes() for path in paths}
        settings = read_json(folder / "tokenizer_config.json", optional=True)
        # Templates may write bos_token, eos_token and the like.
        self.special_tokens = {}
        for key, value in settings.items():
            value = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(value, str):
                self.special_tokens[key] = value
        damage = f"tokenizer.json or the chat template in {folder} is damaged; fetch both"
        with explain(damage, Exception):
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            text = settings.get("chat_template")
            if "chat_template.jinja" in self.files:
                text = self.files["chat_template.jinja"].decode("utf-8", "replace")
            if isinstance(text, list):  # several, by name
                text = {entry["name"]: entry["template"] for entry in text}.get("default")
            check(text, f"{folder} has no chat template; take a model made for chat.")
            # {% generation %} marks what the assistant says, and prints nothing.
            text = re.sub(r"{%(-?)\s*(?:end)?generation\s*(-?)%}", r"{#\1 \2#}", text)
            self.template = JINJA.from_string(text)
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.native_tools = "tools" in text
        # The first token behind an answer, blanks aside, ends a turn if it is a special
        # one.
        self.end_of_turn = None
        special = self.tokenizer.get_added_tokens_decoder()
        glue = self.glue("x", last_id=-1)
        words = [i for i in glue if i in special or self.decode([i]).strip()]
        if words and words[0] in special:
            self.end_of_turn = words[0]
        eos_token = self.special_tokens.get("eos_token", "")
        stop_ids = {self.end_of_turn, self.tokenizer.token_to_id(eos_token)}
        for name in ("config.json", "generation_config.json"):
            ids = read_json(folder / name, optional=True).get("eos_token_id")
            stop_ids.update(ids if isinstance(ids, list) else [ids])
        self.stop_ids = frozenset(stop_ids - {None})

    def encode(self, text: str) -> list[int]:
        """Special tokens written in the text count as such; none is added."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Special tokens are left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def prompt(self, messages: list[dict], tools=None) -> list[int]:
        """Ids of messages ({"role", "content"}), tools (JSON schemas), and the next
        header."""
        return self.encode(self.render(messages, tools))

    def glue(self, instruction: str, last_id: int) -> list[int]:
        """Ids between a sampled turn, whose last id is given, and the next: the end of turn
        (if it was not sampled), the instruction, and the header of the answer."""
        answer = "SAMPLED-TURN"  # what the template writes behind it is the glue
        turns = [("user", "x"), ("assistant", answer), ("user", instruction)]
        text = self.render([{"role": role, "content": words} for role, words in turns])
        check(answer in text, "the chat template drops answers; take another model.")
        ids = self.encode(text.partition(answer)[2])
        if last_id == self.end_of_turn:
            ids = ids[ids.index(last_id) + 1 :]
        return ids

    def render(self, messages, tools=None) -> str:
        """The text of a prompt. Qwen3 shall not think first: reflecting is its own turn."""
        options = {"add_generation_prompt": True, "enable_thinking": False}
        options.update(self.special_tokens, messages=messages, tools=tools)
        with explain("the chat template refuses these messages", Exception):
            return self.template.render(options)
