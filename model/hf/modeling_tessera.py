"""Tessera's GPT in PyTorch, to read its exported weights: every edge is computed, in float32, without a cache.

    score     x = c <q, k> - tau            dot: c = 1/sqrt(D);  cosine: q, k of unit length, c a scale of each head
              x = c (<q, k>^2 - tau)        fidelity: unit length as well
              x = c (<q, k> - tau_i)        threshold mode length: tau_i = beta sqrt(2 ln(i + 2) / D)
    gate      a = max(0, x)^p               relu, relu2, relu4: p = 1, 2, 4;  softmax: a = softmax(x), without tau
    output    o_i = sum_j a_ij v_j / z_i    z = 1 (none, rms), visible keys ^ alpha (length), epsilon + sum_j a_ij (sum)
              o_i = (sum_j a_ij v_j + s_i v_i) / (z_i + s_i)    always.self (sum): s_i = max(0, c f(<q_i, k_i>) + b)^p, f(s) = s, fidelity: s^2
              so joins each sink of a head, w = max(0, c f(<q_i, k>) + b)^p with learned k, v, b (always.sinks)
              o = gain o / sqrt(mean o^2 + 1e-5) for each head (rms)
              y = 2 sigmoid(W x) * o          output_gate: element by element, over all heads; x is what q, k and v are made of

Only visible edges count: key <= query, in the static pattern of the layer and head, in the query's document where document_mask is set.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_tessera import TesseraConfig

MASK64 = (1 << 64) - 1


def mix(x):
    """SplitMix64's finaliser (Steele, Lea & Flood 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def bigbird_draw(seed, random, row):
    """`random` different blocks of 0 .. row, by Floyd's algorithm with a keyed hash."""
    drawn = set()
    for t in range(max(0, row + 1 - random), row + 1):
        r = (mix(mix(mix(seed) ^ row) ^ t) * (t + 1)) >> 64
        drawn.add(t if r in drawn else r)
    return drawn


def by_blocks(seen, block, tokens):
    """A mask of blocks, [rows, rows], as one of tokens."""
    return seen.repeat_interleave(block, 0).repeat_interleave(block, 1)[:tokens, :tokens]


def visible_edges(pattern, tokens, block_masks):
    """Which keys a query may see: bool [tokens, tokens]."""
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
    distance = query - key
    causal = distance >= 0
    if pattern == "causal":
        return causal
    (kind, p), = pattern.items()
    if kind == "window":
        seen = distance < p["size"]
    elif kind == "strided":
        seen = distance % p["stride"] < p["width"]
    elif kind == "dilated":
        seen = (distance < p["window"] * p["dilation"]) & (distance % p["dilation"] == 0)
    elif kind == "global":
        seen = (key < p["tokens"]).expand(tokens, tokens)
    elif kind == "bigbird":
        rows = -(-tokens // p["block"])
        row, column = torch.arange(rows)[:, None], torch.arange(rows)[None, :]
        blocks = (row - column < p["window"]) | (column < p["global"])
        for r in range(rows):
            for c in bigbird_draw(p["seed"], p["random"], r):
                blocks[r, c] = True
        seen = by_blocks(blocks, p["block"], tokens)
    elif kind == "blocks":
        mask = block_masks[p["sha256"]]
        rows = -(-tokens // mask["block"])
        blocks = torch.zeros(rows, rows, dtype=torch.bool)
        for r in range(rows):
            line = mask["rows"][min(r, len(mask["rows"]) - 1)]  # queries past the last row see what it does
            for c in range(min(rows, len(line))):
                blocks[r, c] = line[c] == "1"
        seen = by_blocks(blocks, mask["block"], tokens)
    elif kind in ("any", "all"):
        seen = torch.stack([visible_edges(child, tokens, block_masks) for child in p])
        seen = seen.any(0) if kind == "any" else seen.all(0)
    else:
        raise ValueError(f"attention pattern {kind!r} is none that this file knows")
    return seen & causal


def covers(name, index):
    """Whether "3" or "4-7" holds the index."""
    first, _, last = name.partition("-")
    return int(first) <= index <= int(last or first)


def pattern_of(pattern, layer, head):
    """The pattern of a layer and head: the most particular override, the last of equals. A layer's own per_head goes before per_head,
    which goes before per_layer."""
    if not isinstance(pattern, dict) or not {"default", "per_layer", "per_head"} & pattern.keys():
        return pattern
    by_layer = [p for name, p in pattern.get("per_layer", {}).items() if covers(name, layer)]
    inner = [q for p in by_layer if isinstance(p, dict) for name, q in p.get("per_head", {}).items() if covers(name, head)]
    by_head = [p for name, p in pattern.get("per_head", {}).items() if covers(name, head)]
    plain = [p["default"] if isinstance(p, dict) and "default" in p else p for p in by_layer
             if not isinstance(p, dict) or "default" in p or "per_head" not in p]
    return (inner or by_head or plain or [pattern.get("default", "causal")])[-1]


class RMSNorm(nn.Module):
    def __init__(self, size, epsilon):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon) * self.weight


def make_norm(config):
    if config.norm == "layernorm":
        return nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon, bias=config.bias)
    return RMSNorm(config.hidden_size, config.norm_epsilon)


def rotate(x, position, base):
    """Rotary positions (Su et al., arXiv 2104.09864) on [B, H, T, D]; pairs are (d, d + D/2). position: [B, T]."""
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angle = position[:, None, :, None].double() * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def unit(x):
    """Divided by its length; a vector shorter than 1e-6 has no direction and becomes zero."""
    length = x.norm(dim=-1, keepdim=True)
    return torch.where(length < 1e-6, torch.zeros_like(x), x / length)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        a, heads, width = config.attention, config.num_attention_heads, config.hidden_size
        self.config, self.heads, self.size = config, heads, width // heads
        self.c_attn = nn.Linear(width, 3 * width, bias=config.bias)
        self.c_proj = nn.Linear(width, width, bias=config.bias)
        if a["output_gate"]:
            self.c_gate = nn.Linear(width, width, bias=False)
            self.c_gate.init_std = 0.0  # as it starts, the gate is the identity
        self.power = {"relu": 1, "relu2": 2, "relu4": 4, "softmax": 0}[a["gate"]]
        self.by_length = self.power > 0 and a["threshold"]["mode"] == "length"
        if a["score"] != "dot":
            self.scale = nn.Parameter(torch.full((heads,), float(a["scale_init"])))
        if self.power > 0 and not self.by_length:
            self.threshold = nn.Parameter(torch.full((heads,), float(a["threshold"]["init"])))
        self.always_self = self.power > 0 and a["always"]["self"]
        if self.always_self:
            self.self_bias = nn.Parameter(torch.full((heads,), 0.25))
        self.sinks = a["always"]["sinks"] if self.power > 0 else 0
        if self.sinks:
            self.sink_keys = nn.Parameter(0.02 * torch.randn(heads, self.sinks, self.size))
            self.sink_values = nn.Parameter(0.02 * torch.randn(heads, self.sinks, self.size))
            self.sink_bias = nn.Parameter(torch.full((heads, self.sinks), 0.25))
        if self.power > 0 and a["normalizer"] == "rms":
            self.norm = nn.Parameter(torch.ones(heads, self.size))

    def forward(self, x, visible, position):
        a = self.config.attention
        batch, tokens, width = x.shape
        gate = 2 * self.c_gate(x).sigmoid() if a["output_gate"] else 1
        q, k, v = self.c_attn(x).view(batch, tokens, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        if a["score"] != "dot":
            q, k = unit(q), unit(k)
        if self.config.positions == "rotary":
            q, k = rotate(q, position, self.config.rotary_base), rotate(k, position, self.config.rotary_base)

        s = q @ k.transpose(-1, -2)  # [B, H, T, T]
        c = 1 / math.sqrt(self.size) if a["score"] == "dot" else self.scale[:, None, None]
        if self.power == 0:
            x = c * (s.square() if a["score"] == "fidelity" else s)
            weight = x.masked_fill(~visible, -torch.inf).softmax(-1)
            weight = weight.masked_fill(~visible.any(-1, keepdim=True), 0)  # a query that sees nothing
            o = weight @ v
        else:
            if self.by_length:
                tau = a["threshold"]["beta"] * (2 * (position[:, None, :, None] + 2.0).log() / self.size).sqrt()
                x = c * (s - tau)
            elif a["score"] == "fidelity":
                x = c * (s.square() - self.threshold[:, None, None])
            else:
                x = c * s - self.threshold[:, None, None]
            weight = x.clamp(min=0).pow(self.power).masked_fill(~visible, 0)
            o = weight @ v
            if a["normalizer"] == "sum":
                z = a["epsilon"] + weight.sum(-1, keepdim=True)
                if self.always_self:
                    own = (q * k).sum(-1, keepdim=True)
                    x = c * (own.square() if a["score"] == "fidelity" else own) + self.self_bias[:, None, None]
                    weight = x.clamp(min=0).pow(self.power)
                    o, z = o + weight * v, z + weight
                if self.sinks:
                    s = q @ self.sink_keys.transpose(-1, -2)
                    x = c * (s.square() if a["score"] == "fidelity" else s) + self.sink_bias[:, None, :]
                    weight = x.clamp(min=0).pow(self.power)
                    o, z = o + weight @ self.sink_values, z + weight.sum(-1, keepdim=True)
                o = o / z
            elif a["normalizer"] == "length":
                o = o / visible.sum(-1, keepdim=True).clamp(min=1).pow(a["length_alpha"])
            elif a["normalizer"] == "rms":
                o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-5) * self.norm[:, None, :]
        return self.c_proj(gate * o.transpose(1, 2).reshape(batch, tokens, width))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden = config.hidden_size * config.mlp_ratio
        self.c_fc = nn.Linear(config.hidden_size, hidden, bias=config.bias)
        self.c_proj = nn.Linear(hidden, config.hidden_size, bias=config.bias)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = Attention(config)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, visible, position):
        x = x + self.attn(self.ln_1(x), visible, position)
        return x + self.mlp(self.ln_2(x))


class TesseraPreTrainedModel(PreTrainedModel):
    config_class = TesseraConfig
    base_model_prefix = "transformer"

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(std=getattr(module, "init_std", 0.02))
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.data.zero_()


class TesseraModel(TesseraPreTrainedModel):
    """input_ids [B, T], attention_mask [B, T] (0: padding, which no query sees and which moves no position) -> output of the last norm [B, T, C]."""

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.positions == "learned":
            self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.h = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.ln_f = make_norm(config)
        self.patterns = [[pattern_of(config.attention["pattern"], layer, head) for head in range(config.num_attention_heads)]
                         for layer in range(config.num_hidden_layers)]
        self.tables = {}  # visible edges of a pattern, by its text, for as many tokens as were asked for
        self.post_init()

    def get_input_embeddings(self):
        return self.wte

    def set_input_embeddings(self, value):
        self.wte = value

    def table(self, pattern, tokens, device):
        key = (str(pattern), device)
        if key not in self.tables or len(self.tables[key]) < tokens:
            self.tables[key] = visible_edges(pattern, tokens, self.config.block_masks).to(device)
        return self.tables[key]

    def forward(self, input_ids, attention_mask=None):
        tokens = input_ids.shape[1]
        if self.config.positions == "learned" and tokens > self.config.max_position_embeddings:
            raise ValueError(f"{tokens} tokens, but positions are learned for {self.config.max_position_embeddings}")
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        position = (real.cumsum(-1) - 1).clamp(min=0)
        seen = real.bool()[:, None, :].expand(-1, tokens, -1)  # [B, queries, keys]
        if self.config.attention["document_mask"]:
            document = (input_ids == self.config.end_of_text_id).cumsum(-1)  # the end of text stands before each document
            seen = seen & (document[:, :, None] == document[:, None, :])

        x = self.wte(input_ids)
        if self.config.positions == "learned":
            x = x + self.wpe(position)
        for block, patterns in zip(self.h, self.patterns):
            edges = torch.stack([self.table(p, tokens, x.device)[position[:, :, None], position[:, None, :]] for p in patterns], 1)
            x = block(x, edges & seen[:, None], position)
        return self.ln_f(x)


class TesseraForCausalLM(TesseraPreTrainedModel, GenerationMixin):
    """The classifier is the embedding: logits = x wte^T."""

    def __init__(self, config):
        super().__init__(config)
        self.transformer = TesseraModel(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer.wte

    def set_input_embeddings(self, value):
        self.transformer.wte = value

    def forward(self, input_ids, attention_mask=None, labels=None, **ignored):
        logits = F.linear(self.transformer(input_ids, attention_mask), self.transformer.wte.weight)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **ignored):
        """Everything again for each token, of the last max_position_embeddings tokens."""
        last = self.config.max_position_embeddings
        return {"input_ids": input_ids[:, -last:], "attention_mask": None if attention_mask is None else attention_mask[:, -last:]}
