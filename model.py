"""One decoder for Qwen2/2.5/3, Llama 3.x, SmolLM2, Mistral and Phi-3.5; its weights, its chat template.

    model, chat = load("qwen2.5-1.5b", device="cuda", dtype=torch.bfloat16)
    logits = model.logits(model(ids, positions))  # (B, T) -> (B, T, C) -> (B, T, V)

In order: names to folders, config.json, the decoder, load and save, the chat. Parameters bear their Hugging Face
names, so the tensors of a file and state_dict() agree one to one. There is no cache and no mask here: how queries
meet keys is a strategy that the caller passes to `forward`.
"""

import datetime
import difflib
import fnmatch
import json
import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

import jinja2.ext
import jinja2.sandbox
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from torch.utils.checkpoint import checkpoint

NAMES = {  # short name -> hub id; a new one is one line here
    **{f"qwen2.5-{n}b": f"Qwen/Qwen2.5-{n}B-Instruct" for n in ("0.5", "1.5", "3", "7")},
    **{f"qwen2-{n}b": f"Qwen/Qwen2-{n}B-Instruct" for n in ("1.5", "7")},
    **{f"qwen3-{n}b": f"Qwen/Qwen3-{n}B" for n in ("0.6", "1.7", "4", "8")},
    **{f"llama3.2-{n}b": f"meta-llama/Llama-3.2-{n}B-Instruct" for n in ("1", "3")},
    **{f"smollm2-{n}": f"HuggingFaceTB/SmolLM2-{n.upper()}-Instruct" for n in ("135m", "360m", "1.7b")},
    "llama3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "phi3.5-mini": "microsoft/Phi-3.5-mini-instruct",
    "palmyra-mini": "Writer/palmyra-mini",
}
FAMILIES = {"llama": {}, "mistral": {}}  # model_type of config.json -> what sets it apart; SmolLM2 is a llama
FAMILIES |= {"qwen2": {"attention_bias": True}, "qwen3": {"qk_norm": True}, "phi3": {"fused": True}}
ROPE_TYPES = {  # rope_type of config.json -> the numbers that it needs
    "default": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
TEXT_FILES = (  # what a folder may hold besides config.json and the weights; save() copies it
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json tokenizer.model vocab.json "
    "merges.txt chat_template.jinja generation_config.json"
).split()
INDEX = "model.safetensors.index.json"  # says which tensor is in which shard
NEEDED = ["config.json", "model.safetensors", "model-*.safetensors", INDEX, *TEXT_FILES]
SHARD_BYTES = 5 * 10**9


class UserError(Exception):
    """Something the user can mend, told in one sentence; entry points print it without a traceback."""


def check(ok, sentence: str) -> None:
    if not ok:
        raise UserError(sentence)


def hub_download(repo: str, patterns: list[str], repo_type: str = "model") -> Path:
    """The local folder with those files of a Hugging Face repository that match one of `patterns`.
    Shows progress, resumes, caches; honours HF_ENDPOINT and HF_TOKEN; without a network the cache serves.
    UserError: no network, gated or unknown repository, no file that matches."""
    from huggingface_hub import errors, snapshot_download

    try:
        folder = Path(snapshot_download(repo, repo_type=repo_type, allow_patterns=patterns))
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
        if any(fnmatch.filter(names, pattern) for pattern in patterns):
            return folder
        problem = f"has no file that matches {', '.join(patterns)}"
    except errors.GatedRepoError:
        problem = "is gated: accept its terms on huggingface.co and set HF_TOKEN to a token of your account"
    except errors.RepositoryNotFoundError:
        problem = "is unknown to the hub: check the spelling, or set HF_TOKEN if it is private"
    except errors.HFValidationError:
        problem = "has no valid hub id, which is owner/name"
    except Exception as error:  # of whichever HTTP library this release of huggingface_hub uses
        reason = str(error).partition("\n")[0] or type(error).__name__
        problem = f"is not in the local cache and could not be downloaded ({reason}): check the network, "
        problem += "HF_ENDPOINT and the free disk space, or name local files"
    raise UserError(f"the {repo_type} {repo} {problem}.")


def resolve(name: str) -> Path:
    """The folder of a model: `tiny`, a short name, a folder, a run (its last step), or a hub id.
    A short name wins over a folder of that name, which ./name still reaches."""
    path = Path(name).expanduser()
    if name == "tiny":
        return Path(__file__).resolve().parent / "tiny"
    if name.lower() in NAMES:
        return hub_download(NAMES[name.lower()], NEEDED)
    if path.is_dir():
        steps = [p for p in path.iterdir() if re.fullmatch(r"step-\d+", p.name)]
        return max(steps, key=lambda p: int(p.name[5:]), default=path)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not path.parent.is_dir():
        return hub_download(name, NEEDED)
    near = " or ".join(difflib.get_close_matches(name.lower(), ["tiny", *NAMES], cutoff=0.5))
    raise UserError(
        f"there is no model and no folder '{name}'{near and f' (did you mean {near}?)'}; known are tiny, "
        f"{', '.join(NAMES)}, any hub id owner/name, and local folders and runs."
    )


def read_json(path: Path, optional: bool = False) -> dict:
    """The JSON object in a file ({} if an optional one is absent); UserError for anything else."""
    if optional and not path.is_file():
        return {}
    check(path.is_file(), f"the model folder {path.parent} lacks {path.name}; fetch it again.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable as JSON ({error}); fetch it again.") from None
    check(isinstance(data, dict), f"{path} should hold a JSON object, found {type(data).__name__}.")
    return data


@dataclass
class ModelConfig:
    """What the decoder needs to know of config.json, under the names that it has there."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None = None  # None, or the numbers of rope_type "llama3" or "longrope"
    sliding_window: int | None = None  # every token sees all before it, so no context goes beyond this
    tie_word_embeddings: bool = False  # the head is the embedding
    attention_bias: bool = False  # a bias on q, k and v, none on o
    qk_norm: bool = False  # RMSNorm on each head's query and key
    fused: bool = False  # qkv_proj and gate_up_proj, as in Phi-3
    source: dict = field(default_factory=dict, repr=False)  # config.json itself, which save() writes

    @classmethod
    def from_dict(cls, source: dict, where: str = "config.json") -> "ModelConfig":
        """Reads the older form (rope_theta, rope_scaling) and the newer one (rope_parameters).
        UserError, by name, for whatever the config asks for and the decoder does not do."""
        get = source.get
        family = get("model_type")
        rope = {**(get("rope_parameters") or get("rope_scaling") or {})}
        kind = str(rope.get("rope_type") or rope.get("type") or "default")
        kind = rope["rope_type"] = "longrope" if kind == "su" else kind  # su: its first name
        others = ", ".join(set(get("layer_types") or []) - {"full_attention"})
        partial = rope.get("partial_rotary_factor") or get("partial_rotary_factor") or 1
        asks = {
            f"the architecture {family} (known: {', '.join(FAMILIES)})": family not in FAMILIES,
            f"the activation {get('hidden_act')}": get("hidden_act", "silu") != "silu",
            "quantised weights (quantization_config)": get("quantization_config"),
            "a mixture of experts": get("num_experts") or get("num_local_experts"),
            "attention_bias": get("attention_bias"),  # on o as well; Qwen2 has its own without this key
            "mlp_bias": get("mlp_bias"),
            "a sliding window": get("use_sliding_window"),
            f"layer_types {others}": others,
            f"the rope type {kind}": kind not in ROPE_TYPES,
            "a rope for each kind of layer": any(isinstance(value, dict) for value in rope.values()),
            f"a partial_rotary_factor of {partial}": partial != 1,
        }
        for what, asked in asks.items():
            check(not asked, f"{where} asks for {what}, which this code does not do.")
        rope.setdefault("original_max_position_embeddings", get("original_max_position_embeddings"))
        for key in ROPE_TYPES[kind]:
            check(rope.get(key), f"{where} lacks {key} for the rope type {kind}; fetch it again.")

        numbers = {"num_key_value_heads": get("num_attention_heads"), "rope_theta": 10000.0}
        for f in fields(cls)[:10]:
            value = rope.get(f.name) or get(f.name) or numbers.get(f.name)
            if f.name == "head_dim" and not value:
                value = numbers["hidden_size"] // numbers["num_attention_heads"]
            fits = type(value) in (int, f.type) and value > 0
            check(fits, f"{where}: {f.name} should be a positive {f.type.__name__}, not {value!r}.")
            numbers[f.name] = value
        heads, shared = numbers["num_attention_heads"], numbers["num_key_value_heads"]
        check(heads % shared == 0, f"{where}: {heads} heads cannot share {shared} key heads.")
        return cls(
            **numbers,
            **FAMILIES[family],
            rope_scaling=None if kind == "default" else rope,
            sliding_window=None if family.startswith("qwen") else get("sliding_window"),
            tie_word_embeddings=bool(get("tie_word_embeddings")),
            source=source,
        )

    def default_context(self) -> int:
        """Enough for the tasks here, without a large cache."""
        return min(4096, self.max_position_embeddings, self.sliding_window or 4096)


def rope_tables(config: ModelConfig, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (n, D) float32 for positions 0..n-1; the two halves of D are alike.
    llama3 divides the slow frequencies by `factor`, keeps the fast ones, and blends in between. longrope
    (arXiv 2402.13753) divides each frequency by a factor of its own, and scales both tables."""
    D, rope = config.head_dim, config.rope_scaling or {"rope_type": "default"}
    old, slower, scale = rope.get("original_max_position_embeddings"), 1.0, 1.0
    if rope["rope_type"] == "longrope":
        slower = torch.tensor(rope["long_factor" if n > old else "short_factor"])  # (D/2,)
        stretch = max(1, rope.get("factor") or config.max_position_embeddings / old)
        scale = rope.get("attention_factor") or math.sqrt(1 + math.log(stretch) / math.log(old))
    frequencies = 1 / (slower * config.rope_theta ** (torch.arange(0, D, 2).float() / D))  # (D/2,)
    if rope["rope_type"] == "llama3":
        turns = old * frequencies / (2 * math.pi)  # (D/2,) rotations within the old context
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        fast = ((turns - low) / (high - low)).clamp(0, 1)  # (D/2,) 1: keep, 0: divide
        frequencies = fast * frequencies + (1 - fast) * frequencies / rope["factor"]
    angles = torch.arange(n).float()[:, None] * torch.cat((frequencies, frequencies))  # (n, D)
    return angles.cos() * scale, angles.sin() * scale


def causal(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Plain attention within each row: q (B, H, T, D), k and v (B, KV, T, D) -> (B, H, T, D).
    Keys are repeated, since enable_gqa falls to a slow path for some devices and dtypes."""
    group = q.shape[1] // k.shape[1]  # query heads that share a key head are neighbours
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # (B, H, T, D)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rope: x (B, heads, T, D), cos and sin (B, 1, T, D) float32, as are the products -> x's shape and dtype."""
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.config = layer, config
        C, D, bias = config.hidden_size, config.head_dim, config.attention_bias
        H, KV = config.num_attention_heads, config.num_key_value_heads
        if config.fused:
            self.qkv_proj = nn.Linear(C, (H + 2 * KV) * D, bias=bias)
        else:
            self.q_proj = nn.Linear(C, H * D, bias=bias)
            self.k_proj = nn.Linear(C, KV * D, bias=bias)
            self.v_proj = nn.Linear(C, KV * D, bias=bias)
        self.o_proj = nn.Linear(H * D, C, bias=False)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(D, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(D, eps=config.rms_norm_eps)

    def forward(self, x, cos, sin, attend):
        B, T, C = x.shape
        H, KV, D = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim
        if self.config.fused:
            q, k, v = self.qkv_proj(x).split((H * D, KV * D, KV * D), dim=-1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = q.view(B, T, H, D), k.view(B, T, KV, D), v.view(B, T, KV, D)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or KV, T, D)
        out = attend(self.layer, rotate(q, cos, sin), rotate(k, cos, sin), v)  # (B, H, T, D)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, H * D))  # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        C, inner, self.fused = config.hidden_size, config.intermediate_size, config.fused
        if self.fused:
            self.gate_up_proj = nn.Linear(C, 2 * inner, bias=False)
        else:
            self.gate_proj = nn.Linear(C, inner, bias=False)
            self.up_proj = nn.Linear(C, inner, bias=False)
        self.down_proj = nn.Linear(inner, C, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1) if self.fused else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, attend):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Ids to hidden states; `logits` is apart, because few positions need the head. Norms compute in float32
    (nn.RMSNorm does so for every dtype), and so do rope and head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        V, C = config.vocab_size, config.hidden_size
        self.config = config
        self.checkpointing = False  # True: recompute each layer in the backward pass, for less memory
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(V, C)
        self.model.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.model.norm = nn.RMSNorm(C, eps=config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(C, V, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        self.set_context(config.default_context())

    def set_context(self, n: int) -> None:
        """Rope tables for positions 0..n-1, float32, beside the weights (again after a change of dtype).
        n also chooses longrope's factors: once a run, so that cached keys and training agree.
        UserError if the model does not reach that far."""
        for limit in ("max_position_embeddings", "sliding_window"):
            most = getattr(self.config, limit) or n
            check(n <= most, f"a context of {n} tokens is beyond the model's {limit} of {most}.")
        cos, sin = rope_tables(self.config, n)
        device = self.model.embed_tokens.weight.device
        self.register_buffer("cos", cos.to(device), persistent=False)  # (n, D)
        self.register_buffer("sin", sin.to(device), persistent=False)  # (n, D)
        self.context = n

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, attend=causal) -> torch.Tensor:
        """ids and positions (B, T) int64, positions < context -> hidden (B, T, C), after the last norm.
        attend(layer, q, k, v): q (B, H, T, D), k and v (B, KV, T, D), after rope -> (B, H, T, D)."""
        x = self.model.embed_tokens(ids)  # (B, T, C)
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]  # (B, 1, T, D)
        for layer in self.model.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, attend, use_reentrant=False)
            else:
                x = layer(x, cos, sin, attend)
        return self.model.norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (..., C) -> (..., V), always float32: log-probs of bfloat16 logits are coarse."""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return F.linear(hidden.float(), head.weight.float())


def load(name: str, device="cpu", dtype=torch.float32, context: int | None = None) -> tuple[Decoder, "Chat"]:
    """A model by name (see `resolve`). What can be refused (UserError) is refused before the weights are read;
    then each tensor goes straight to its device and dtype."""
    no_gpu = torch.device(device).type == "cuda" and not torch.cuda.is_available()
    check(not no_gpu, "cuda is asked for, but PyTorch finds no GPU; take --device cpu.")
    folder = resolve(name)
    config = ModelConfig.from_dict(read_json(folder / "config.json"), f"{folder}/config.json")
    chat = Chat(folder)
    ids, V = 1 + max(chat.tokenizer.get_vocab().values(), default=0), config.vocab_size
    check(ids <= V, f"the tokenizer in {folder} has {ids} ids, the model {V}; they do not belong together.")
    with torch.device("meta"):
        model = Decoder(config)
    model.set_context(context or config.default_context())
    read_weights(model.to(dtype), folder, device)
    model.set_context(model.context)
    return model, chat


def read_weights(model: Decoder, folder: Path, device) -> None:
    """Fills a decoder on the meta device from safetensors: one file, or shards by the index. Missing, unknown
    and misshapen tensors are named before any is read. A pickle is never read."""
    where = read_json(folder / INDEX, optional=True).get("weight_map", {})  # tensor -> file
    files = sorted(set(where.values())) or ["model.safetensors"]
    absent = [file for file in files if not (folder / file).is_file()]
    pickled = absent and any(folder.glob("pytorch_model*.bin"))
    check(not pickled, f"{folder} holds a pickle, which can run code: convert it with transformers' save_pretrained.")
    check(not absent, f"the model folder {folder} lacks {', '.join(absent)}; fetch it again.")
    wanted, tied = model.state_dict(), model.config.tie_word_embeddings
    try:
        opened = {file: safe_open(folder / file, framework="pt") for file in files}
        found = {name: f for file, f in opened.items() for name in f.keys() if where.get(name, file) == file}
        ignored = {name for name in found if name.endswith("rotary_emb.inv_freq")}  # a table, in older files
        ignored |= {"lm_head.weight"} if tied else set()  # may be there all the same: see below
        missing = ", ".join(sorted(wanted.keys() - found.keys())[:5])
        unknown = ", ".join(sorted(found.keys() - wanted.keys() - ignored)[:5])
        check(not missing, f"the weights in {folder} lack {missing}.")
        check(not unknown, f"the weights in {folder} hold {unknown}, unknown to config.json.")
        for name, parameter in wanted.items():
            piece, shape = found[name].get_slice(name), list(parameter.shape)
            fits = piece.get_shape() == shape and piece.get_dtype() in ("F32", "F16", "BF16")
            what = f"{name} should be floats of shape {shape}, found {piece.get_dtype()} {piece.get_shape()}"
            check(fits, f"the weights in {folder} do not fit config.json: {what}.")
        model.to_empty(device=device)
        for name, parameter in model.state_dict().items():
            parameter.copy_(found[name].get_tensor(name))
        if tied and "lm_head.weight" in found:
            embedding = model.model.embed_tokens.weight.detach()
            head = found["lm_head.weight"].get_tensor("lm_head.weight").to(embedding)
            check(torch.equal(head, embedding), f"{folder} ties lm_head.weight, which differs from the embedding.")
    except (SafetensorError, OSError) as error:
        raise UserError(f"the weights in {folder} are damaged ({error}); fetch them again.") from None


def save(model: Decoder, chat: "Chat", folder: Path | str, dtype: torch.dtype | None = None) -> None:
    """Writes a Hugging Face folder, which must not exist yet; dtype None keeps the model's own.
    UserError if it cannot be written; the caller removes what was begun."""
    folder, weights = Path(folder), model.state_dict()
    dtype = dtype or model.model.embed_tokens.weight.dtype
    shards, total, where = {}, 0, {}
    for name, tensor in weights.items():
        shards.setdefault(total // SHARD_BYTES, []).append(name)
        total += tensor.numel() * dtype.itemsize
    config = {**model.config.source}
    config["dtype" if "dtype" in config else "torch_dtype"] = str(dtype).removeprefix("torch.")
    config.pop("auto_map", None)  # names Python files of the source, which are neither copied nor needed
    try:
        folder.mkdir(parents=True)
        for name, content in chat.files.items():
            (folder / name).write_bytes(content)
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        for i, names in enumerate(shards.values(), 1):
            file = f"model-{i:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            tensors = {name: weights[name].to("cpu", dtype).contiguous() for name in names}
            save_file(tensors, folder / file, metadata={"format": "pt"})
            where.update(dict.fromkeys(names, file))
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise UserError(f"the model cannot be written to {folder} ({error}).") from None


class Chat:
    """A model's tokenizer and chat template. A conversation only grows, by ids: `prompt` begins it, `glue` joins
    a sampled turn to the next. What was sampled is never decoded and encoded again.

    stop_ids: every id that ends a turn. native_tools: the template itself can show tools."""

    def __init__(self, folder: Path):
        paths = [folder / name for name in TEXT_FILES if (folder / name).is_file()]
        self.files = {path.name: path.read_bytes() for path in paths}  # for save(): the folder may be gone by then
        settings = read_json(folder / "tokenizer_config.json", optional=True)
        check("tokenizer.json" in self.files, f"the model folder {folder} lacks tokenizer.json; fetch it again.")
        try:
            self.tokenizer = Tokenizer.from_buffer(self.files["tokenizer.json"])
        except Exception as error:  # tokenizers raises nothing narrower
            raise UserError(f"{folder}/tokenizer.json is damaged ({error}); fetch it again.") from None
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        words = {key: value for key, value in settings.items() if key.endswith("_token")}
        words = {key: value["content"] if isinstance(value, dict) else value for key, value in words.items()}
        self.words = {key: value for key, value in words.items() if isinstance(value, str)}  # eos_token and so on

        texts = settings.get("chat_template")
        if "chat_template.jinja" in self.files:
            texts = self.files["chat_template.jinja"].decode("utf-8", "replace")
        if isinstance(texts, list):  # several, by name
            texts = {entry["name"]: entry["template"] for entry in texts}
        texts = texts if isinstance(texts, dict) else {"default": texts}
        check(texts.get("default"), f"{folder} has no chat template; take a model that was made for chat.")
        self.native_tools = any("tools" in text for text in texts.values())
        try:
            self.templates = {name: compile_template(text) for name, text in texts.items()}
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template in {folder} is damaged ({error}).") from None

        added = self.tokenizer.get_added_tokens_decoder()
        glue = self._after_answer("x")
        first = next((i for i in glue if i in added or self.decode([i]).strip()), None)  # blanks may precede it
        self.end_of_turn = first if first in added else None  # None: the template ends turns with plain words
        stops = {self.end_of_turn, self.tokenizer.token_to_id(self.words.get("eos_token", ""))}
        for name in ("config.json", "generation_config.json"):
            ids = read_json(folder / name, optional=True).get("eos_token_id")
            stops.update(ids if isinstance(ids, list) else [ids])
        self.stop_ids = frozenset(stops - {None})

    def encode(self, text: str) -> list[int]:
        """Special tokens that are written in the text count as such; none is added."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Special tokens are left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def prompt(self, messages: list[dict], tools: list[dict] | None = None) -> list[int]:
        """Ids of messages ({"role", "content"}) and tools (JSON schemas), up to the header of the answer."""
        return self.encode(self._render(messages, tools))

    def glue(self, instruction: str, last_id: int) -> list[int]:
        """Ids between a sampled turn, whose last id is given, and the next: the end of turn (unless the turn
        sampled it itself), the user's instruction, the header of the answer."""
        ids = self._after_answer(instruction)
        return ids[ids.index(last_id) + 1 :] if last_id == self.end_of_turn else ids

    def _after_answer(self, instruction: str) -> list[int]:
        """Ids of what the template writes after an answer, cut off behind one that is easily found."""
        answer = "SAMPLED-TURN"
        turns = [("user", "x"), ("assistant", answer), ("user", instruction)]
        text = self._render([{"role": role, "content": content} for role, content in turns])
        check(answer in text, "the model's chat template drops earlier answers; take another model.")
        return self.encode(text.partition(answer)[2])

    def _render(self, messages: list[dict], tools: list[dict] | None = None) -> str:
        template = self.templates["tool_use" if tools and "tool_use" in self.templates else "default"]
        options = {"add_generation_prompt": True, "documents": None, **self.words}
        options["enable_thinking"] = False  # Qwen3 answers at once: reflecting is a turn of its own here
        try:
            return template.render(messages=messages, tools=tools, **options)
        except jinja2.TemplateError as error:
            raise UserError(f"the model's chat template refuses these messages ({error}).") from None


def compile_template(text: str) -> jinja2.Template:
    """A chat template, with what the ecosystem lets templates use."""

    def tojson(value, ensure_ascii=False, **options):  # jinja2's own escapes < and & for HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    # Llama 3 writes the date into its prompt: one day for all runs, or none could be repeated.
    environment.globals["strftime_now"] = datetime.date(2024, 7, 26).strftime
    # {% generation %} marks the assistant's words and prints nothing; jinja2 does not know it.
    text = re.sub(r"{%(-?)\s*generation\s*(-?)%}", r"{%\1 if true \2%}", text)
    text = re.sub(r"{%(-?)\s*endgeneration\s*(-?)%}", r"{%\1 endif \2%}", text)
    return environment.from_string(text)
