"""The one place that knows the layers' names: layers, value norms, attention, what trains. Not run.

For decoders that keep `<base>.layers[i].self_attn.v_proj` and add nothing between layers: Llama,
Mistral, Qwen2, Qwen3 and their kin; `self_check` confirms it on the real weights. Layers are
0-based. Value norms are ||v_i||_2 of (4), the output of v_proj at position i per KV head;
the read-out M_theta of (A4) and (A5) is what leaves layer `--layer`.
"""
import re
from contextlib import ExitStack, contextmanager
from functools import partial

import torch

class Refused(Exception):
    """Bad input: what was wrong and how to mend it, in one line. The scripts exit with 2."""

def decoder_layers(model):
    """The decoder layers. Raises Refused for a model that is not Llama-like."""
    layers = getattr(model.base_model, "layers", None)
    if not all(hasattr(getattr(block, "self_attn", None), "v_proj") for block in layers or [None]):
        raise Refused(f"model type {model.config.model_type} has no layers[i].self_attn.v_proj")
    return layers

def parse_layers(spec, n, what="layers"):
    """'all', '7' or '0,5-7' of n -> sorted numbers. Raises Refused for one that is not there."""
    if spec == "all":
        return list(range(n))
    known = re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", str(spec))
    spans = [span.split("-") for span in str(spec).split(",")] if known else []
    picked = sorted({i for span in spans for i in range(int(span[0]), int(span[-1]) + 1)})
    if not picked or picked[-1] >= n:
        raise Refused(f"{what} must look like 7 or 0,5-7 and be of 0 to {n - 1}, got {spec!r}")
    return picked

def layers_of(model, spec):
    return parse_layers(spec, len(decoder_layers(model)))

def set_trainable(model, spec):
    """Train 'all', or only what is named like '5-7 mlp.down_proj' (C.2). -> the layers that train.

    By name, never by index: the paper's "6th parameter" of a layer is mlp.down_proj.
    """
    model.requires_grad_(spec == "all")
    layers, _, prefix = spec.partition(" ")
    picked = [p for i in layers_of(model, layers) for name, p in
              decoder_layers(model)[i].named_parameters() if prefix and name.startswith(prefix)]
    if not picked and spec != "all":
        raise Refused(f"--trainable must be all or like '5-7 mlp.down_proj', got {spec!r}")
    for p in picked:
        p.requires_grad_(True)
    return layers_of(model, layers)

def first_trained(model):
    """The lowest layer of which something trains."""
    return next(i for i, layer in enumerate(decoder_layers(model))
                if any(p.requires_grad for p in layer.parameters()))

# ---------------------------------------------------------------- forwards
def final_hidden(model, ids):
    """What the output head reads. (B, T) -> (B, T, C)

    No attention mask: rows are padded on the right, which a causal model never looks at.
    """
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state

def run_layers(model, h, start, stop):
    """Decoder layers start..stop-1, so `train.forward` can leave rows out. (B, T, C) -> same"""
    position_ids = torch.arange(h.shape[1], device=h.device)[None]
    rotary = model.base_model.rotary_emb(h, position_ids)
    for layer in decoder_layers(model)[start:stop]:
        h = layer(h, attention_mask=None, position_ids=position_ids, position_embeddings=rotary)
        h = h[0] if isinstance(h, tuple) else h
    return h

def final_norm(model, h):
    return model.base_model.norm(h)

def output_head(model):
    """Weight of the output head, (V, C). Raises Refused for a head with a bias."""
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise Refused(f"model type {model.config.model_type}: its output head has a bias")
    return head.weight

@torch.no_grad()
def self_check(model, ids, tokens, layerwise):
    """Is this model what the code above takes it for? Raises Refused, before anything is trained.

    ids: (1, T), a real row; tokens: how many the tokenizer knows. Logits are final_hidden @ head.T
    (not so: scaled, capped, NaN), first tokens know nothing of later ones (not so: `rope_type:
    dynamic`); layerwise: `run_layers` gives the model's forward (not so: a sliding window shorter
    than T, scaled residuals or embeddings, parallel blocks, mixed kinds of layers).
    """
    kind, embed = model.config.model_type, model.get_input_embeddings()
    if tokens > (known := embed.num_embeddings):
        raise Refused(f"the tokenizer has {tokens} ids, the model only {known}: pass --tokenizer")
    short = final_hidden(model, ids[:, :ids.shape[1] // 2 + 1])  # first: no longer row was seen yet
    logits, h = model(input_ids=ids, use_cache=False).logits, final_hidden(model, ids)
    checks = {  # ours, theirs, how far they may be apart in bf16: behind RMU 0.12 between lengths
        "logits are not final hidden states x head": (h @ output_head(model).T, logits, 0.05),
        "first tokens depend on later ones": (short, h[:, :short.shape[1]], 0.25)}
    if layerwise:
        try:
            ours = run_layers(model, embed(ids), 0, len(decoder_layers(model)))
            checks[f"run layer by layer on {ids.shape[1]} tokens it differs"] = (
                final_norm(model, ours), h, 0.05)
        except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
            raise Refused(f"model type {kind} cannot be run layer by layer: {error!r:.80}"
                          ) from error
    for words, (ours, theirs, apart) in checks.items():
        apart = 1e-4 if h.dtype == torch.float32 else apart
        if not (ours - theirs).float().norm() <= apart * theirs.float().norm():  # or NaN
            raise Refused(f"model type {kind}, or damaged weights, not supported: {words}")

# ---------------------------------------------------------------- value norms
class capture_norms(ExitStack):
    """||v_i||_2 of (4) for i < k, per KV head and layer, of what runs from begin to stack.

    A context of hooks: call begin before a forward and stack after it. Keep it open until backward
    is done: recomputed layers must run the same hooks.
    """
    def __init__(self, model, layers, k):
        super().__init__()
        self.k, heads = k, model.config.num_attention_heads
        self.heads = getattr(model.config, "num_key_value_heads", heads)
        self.found, self.open = {i: [] for i in layers}, False
        for i in layers:
            v_proj = decoder_layers(model)[i].self_attn.v_proj
            self.enter_context(v_proj.register_forward_hook(partial(self.take, i)))

    def begin(self):
        self.found, self.open = {i: [] for i in self.found}, True

    def take(self, layer, v_proj, args, v):
        # the norm at once, since a slice would pin all of (B, T, D). Recomputation in backward
        # does the same, but its norms are not kept: they would pin its whole layer
        v = v[:, :self.k]
        norm = v.reshape(*v.shape[:2], self.heads, -1).float().norm(dim=-1)  # (B, k, H)
        if self.open:
            self.found[layer].append(norm)

    def stack(self):
        """-> (B, L, k, H), rows in the order of the calls."""
        self.open = False
        return torch.stack([torch.cat(norms) for norms in self.found.values()], dim=1)

@torch.no_grad()
def sink_norms(model, ids, layers, k):
    """Value norms of a frozen model. (B, T) -> (B, L, k, H). By causality k tokens are enough."""
    with capture_norms(model, layers, k) as norms:
        norms.begin()
        final_hidden(model, ids[:, :k])
        return norms.stack()

# ---------------------------------------------------------------- attention
@torch.no_grad()
def attentions(model, ids, batch=16):
    """Attention probabilities by the model's eager path, some rows at a time: (L, B, H_q, T, T)."""
    kind = model.config._attn_implementation
    model.set_attn_implementation("eager")
    for rows in ids.split(batch):
        out = model.base_model(input_ids=rows, use_cache=False, output_attentions=True)
        yield torch.stack(out.attentions).float()
    model.set_attn_implementation(kind)

def sink_strength(model, ids, mask, longest=128):
    """Attention that real queries, all but the first, pay to position 0. -> ((L, H_q), even)

    ids, mask: (N, T), padded on the right, cut to `longest` tokens. even: what it were if heads
    attended evenly to all they see.
    """
    ids, real = ids[:, :longest], mask[:, 1:longest]
    paid = torch.cat([maps[..., 1:, 0].clone() for maps in attentions(model, ids)], dim=1)
    seen = torch.arange(2, ids.shape[1] + 1, device=ids.device).expand_as(real)[real]
    return paid.transpose(2, 3)[:, real].mean(1), (1 / seen).mean().item()  # paid: (L, N, H_q, T-1)

@contextmanager
def mask_sinks(model, spec):
    """Hide positions `spec` ('0', '0-7', '1-8'; '' hides none) from all others, also in `generate`.

    Positions count a row's real tokens, left padding aside, and all keep their numbers. What is
    computed at a hidden position reaches no other, in any layer or head.
    """
    if not spec:
        yield
        return
    hidden = torch.tensor(parse_layers(spec, 10 ** 6, "--mask_sinks"), device=model.device)

    def hide(module, args, kwargs):
        ids, past = kwargs["input_ids"], kwargs.get("cache") or kwargs.get("past_key_values")
        seen = past.get_seq_length() if past else 0  # "cache" from transformers 5.24 on
        real = kwargs.get("attention_mask")
        if real is None:
            real = torch.ones(len(ids), seen + ids.shape[1], device=ids.device)
        place = real.long().cumsum(1) - 1  # (B, S) a row's own positions
        kwargs["position_ids"] = place[:, seen:].clamp(min=0)
        kwargs["attention_mask"] = real.bool() & ~torch.isin(place, hidden)
        return args, kwargs

    with model.base_model.register_forward_pre_hook(hide, with_kwargs=True):
        yield
