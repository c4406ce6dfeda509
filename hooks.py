"""The only place that knows module names: value norms, hidden states, attention, trainable parts.

Everything is a context manager that removes its hooks whatever happens, or a plain function built
on one; what `hidden_leaving` teaches transformers' sdpa stays, and is idle without it. Works
for decoders that keep `<base>.layers[i].self_attn.v_proj` and `mlp.down_proj`: Llama, Mistral,
Qwen2, Qwen3 and their kin. Layers are 0-based; a layer that does not exist is an error.
"""
import inspect
from contextlib import contextmanager
from math import prod

import torch


def decoder_layers(model):
    """The list of decoder layers. Raises ValueError for a model that is not Llama-like."""
    layers = getattr(model.base_model, "layers", None)
    if layers is None or not hasattr(getattr(layers[-1], "self_attn", None), "v_proj"):
        raise ValueError(f"{type(model).__name__} has no layers[i].self_attn.v_proj: "
                         "use a Llama-, Mistral- or Qwen-type model")
    return layers


def parse_layers(spec, n):
    """'all', '7' or '0,5-7' of n layers -> sorted indices. Raises ValueError for a missing one."""
    if str(spec) == "all":
        return list(range(n))
    picked = set()
    for part in str(spec).split(","):
        low, _, high = part.partition("-")
        if not low.isdigit() or (high and not high.isdigit()):
            raise ValueError(f"layers must look like all, 7 or 0,5-7, got {spec!r}")
        picked |= set(range(int(low), int(high or low) + 1))
    if not picked or max(picked) >= n:
        raise ValueError(f"layer {max(picked, default=spec)} does not exist: "
                         f"the model has layers 0 to {n - 1}")
    return sorted(picked)


def cache_name(model):
    """What a forward calls its KV cache: `cache` since transformers 5.24."""
    known = inspect.signature(model.base_model.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def final_hidden(model, ids):
    """Hidden states after the final norm, what the output head reads. (B, T) -> (B, T, C).

    No attention mask is passed: rows are padded on the right, which a causal model never looks at,
    and sdpa then needs no T x T mask.
    """
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


def hidden_leaving(model, ids, layer, n, keep=0):
    """`final_hidden` of the rows from n on; the first n rows end after decoder layer `layer`.

    Of those n rows only the first `keep` tokens go on through the layers above: by causality sink
    norms there need no more. (B, T) -> (B - n, T, C); with n = B what is left, (B, keep, C).
    RMU's losses on D_f need nothing above the read-out layer.
    """
    (B, T), upper = ids.shape, decoder_layers(model)[layer + 1:]
    if n == B:
        keep = max(keep, 1)  # a layer must see something
    if not len(upper):
        h = final_hidden(model, ids)
        return h[n:] if n < B else h[:, :keep]
    shapes = [shape for shape in ((n, keep), (B - n, T)) if prod(shape)]
    with _packed(model, upper, shapes):
        h = final_hidden(model, ids)
    rows, tokens = shapes[-1]
    return h[0, -rows * tokens:].view(rows, tokens, -1)


class _Given(torch.nn.Module):
    """Stands for a decoder layer whose output is known."""

    def __init__(self, hidden):
        super().__init__()
        self.hidden = hidden

    def forward(self, *_, **__):
        return self.hidden


@contextmanager
def entering(model, layer, hidden):
    """Inside, a forward begins at decoder layer `layer` with these hidden states. (B, T, C)

    For layers that nothing below trains: what enters them is a function of the row alone.
    """
    blocks = decoder_layers(model)
    below = list(blocks[:layer])
    for i in range(layer):
        blocks[i] = _Given(hidden)
    try:
        yield
    finally:
        for i, block in enumerate(below):
            blocks[i] = block


@contextmanager
def _packed(model, blocks, shapes):
    """Inside, blocks work on rows of several lengths, packed; only attention takes them apart.

    shapes: (B, T) of each part; the last rows of what enters, part after part, are cut to them.

    Few tokens through a matrix of their own cost as much as reading its weights. And no block is
    called twice, because FSDP frees its weights after the first of two backwards through it.
    Raises ValueError for another attention than sdpa, which would look across the rows.
    """
    if model.config._attn_implementation != "sdpa":
        raise ValueError(f"attention {model.config._attn_implementation!r}: rows of several "
                         "lengths need 'sdpa'")
    _teach_sdpa()
    places = None

    def pack(block, args, kwargs):
        nonlocal places
        if block is blocks[0]:
            sizes = [B for B, _ in shapes]
            parts = args[0][-sum(sizes):].split(sizes)
            packed = torch.cat([part[:, :T].flatten(0, 1) for part, (_, T) in zip(parts, shapes)])
            args = packed[None], *args[1:]  # (1, tokens, C)
            places = tuple(torch.cat([t[:, :T].repeat(1, B, 1) for B, T in shapes], 1)
                           for t in kwargs["position_embeddings"])  # (1, tokens, d) each
        return args, {**kwargs, "attention_mask": None, "position_embeddings": places,
                      "parts": shapes}  # in a block's arguments: recomputation knows them as well

    with _hooked(*(block.register_forward_pre_hook(pack, with_kwargs=True) for block in blocks)):
        yield


def _unpacked(x, shapes):
    """(1, tokens, ...) -> the parts of these shapes, (B, T, ...) each."""
    return [part.unflatten(0, shape) for part, shape in
            zip(x[0].split([prod(shape) for shape in shapes]), shapes)]


def _teach_sdpa():
    """Teach transformers' sdpa `parts`, the shapes (B, T) of packed rows. Changes nothing else, and
    stays, since a recomputation in backward runs after the forward's context has gone."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if hasattr(sdpa, "knows_parts"):
        return

    def attend(module, q, k, v, mask, parts=None, **kwargs):
        if parts is None:
            return sdpa(module, q, k, v, mask, **kwargs)
        out = [sdpa(module, *(t.transpose(1, 2) for t in qkv), None, **kwargs)[0].flatten(0, 1)
               for qkv in zip(*(_unpacked(t.transpose(1, 2), parts) for t in (q, k, v)))]
        return torch.cat(out)[None], None  # (1, tokens, H, d)

    attend.knows_parts = True
    ALL_ATTENTION_FUNCTIONS.register("sdpa", attend)


def output_head(model):
    """Weight of the output head, (V, C). Raises ValueError if the head has a bias."""
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ValueError(f"{type(model).__name__} has a biased output head: not supported")
    return head.weight


@contextmanager
def _hooked(*handles):
    """Removes the hooks of these handles at the end, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def capture_norms(model, layers, k=None, include_bos=True, per_head=True):
    """Value norms ||v_i||_2 of the forwards run inside: {layer: [(B, k, H)]}, fp32 (eq. 3-4).

    The first k positions, with position 0 unless include_bos is off; k=None takes every position.
    per_head=False gives the norm of the whole v_proj output as (B, k, 1), as the release does.
    The norm is taken in the hook: a kept slice would pin all of [B, T, D]. A layer that sees rows
    of several lengths (`hidden_leaving`) appends one tensor for each. The dict holds the last
    forward. Recomputation in backward runs the hook of each layer again, so it must outlive the
    backward; what it gives then is not kept, or it would keep every recomputed layer alive.
    """
    norms, H = {}, model.config.num_key_value_heads if per_head else 1
    whole, parts = False, None  # inside a whole forward; shapes of packed rows
    first = 0 if include_bos else 1
    stop = None if k is None else first + k

    def begin(*_):
        nonlocal whole
        norms.clear()
        whole = True

    def end(*_):
        nonlocal whole
        whole = False

    def note(attention, args, kwargs):
        nonlocal parts
        parts = kwargs.get("parts")

    def hook(layer):
        def take(v_proj, args, out):
            for v in _unpacked(out, parts) if parts else [out]:
                v = v[:, first:stop]
                norm = v.reshape(*v.shape[:2], H, -1).float().norm(dim=-1)  # (B, k, H)
                if whole:
                    norms.setdefault(layer, []).append(norm)
        return take

    base, blocks = model.base_model, decoder_layers(model)
    attentions = {i: blocks[i].self_attn for i in layers}
    with _hooked(base.register_forward_pre_hook(begin), base.register_forward_hook(end),
                 *(attention.register_forward_pre_hook(note, with_kwargs=True)
                   for attention in attentions.values()),
                 *(attention.v_proj.register_forward_hook(hook(i))
                   for i, attention in attentions.items())):
        yield norms


@contextmanager
def capture_hidden(model, layer):
    """Output of decoder layer `layer`, before any final norm: {layer: (B, T, C)}."""
    hidden, blocks = {}, decoder_layers(model)

    def take(module, args, out):
        hidden[layer] = out[0] if isinstance(out, tuple) else out

    with _hooked(blocks[parse_layers(layer, len(blocks))[0]].register_forward_hook(take)):
        yield hidden


def stack_norms(norms):
    """{layer: [(B, k, H)]} -> (B, L, k, H), layers in order."""
    return torch.stack([torch.cat(norms[layer]) for layer in sorted(norms)], dim=1)


@torch.no_grad()
def sink_norms(model, ids, layers, k=None, include_bos=True, per_head=True):
    """`capture_norms` of a frozen model, stacked. ids (N, T) -> (N, L, k, H).

    By causality the first k positions need a forward over those tokens only.
    """
    stop = None if k is None else k + (not include_bos)
    with capture_norms(model, layers, k, include_bos, per_head) as norms:
        final_hidden(model, ids[:, :stop])
    return stack_norms(norms)


def first_trained(spec, n):
    """The lowest of n decoder layers of what `set_trainable` trains; 0 if everything."""
    return 0 if spec == "all" else parse_layers(spec.partition(" ")[0], n)[0]


def set_trainable(model, spec):
    """Train everything ('all'), or only parts named '5-7 mlp.down_proj' (C.2). -> the parameters.

    By name, never by index: the paper's "6th parameter" is mlp.down_proj.
    """
    if spec == "all":
        model.requires_grad_(True)
        return list(model.parameters())
    (layers, _, name), blocks = spec.partition(" "), decoder_layers(model)
    picked = [p for i in parse_layers(layers, len(blocks))
              for key, p in blocks[i].named_parameters() if name and key.startswith(name)]
    if not picked:
        raise ValueError(f"trainable must be all or like '5-7 mlp.down_proj', got {spec!r}")
    model.requires_grad_(False)
    for p in picked:
        p.requires_grad_(True)
    return picked


# ---------------------------------------------------------------- attention for the figures

@torch.no_grad()
def attention_map(model, ids, layer, batch=16):
    """Attention of one layer, mean over heads and rows (Fig. 3). ids (N, L), no padding -> (L, L).

    Eager attention holds every layer's (batch, H_q, L, L): for short rows only.
    """
    kind, total = model.config._attn_implementation, 0
    model.set_attn_implementation("eager")
    try:
        for part in ids.split(batch):
            maps = model.base_model(input_ids=part, use_cache=False, output_attentions=True)
            total = total + maps.attentions[layer].float().mean(1).sum(0)  # (L, L)
    finally:
        model.set_attn_implementation(kind)
    return total / len(ids)


def _rotate(x, cos, sin):
    """Rotary position embedding: pairs (i, i + d/2) turn by their position's angle. (B, H, T, d)"""
    a, b = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-b, a], dim=-1) * sin[:, None]


def _sums_to_first_keys(attn, hidden, cos, sin, weight, keys, chunk):
    """Attention to the first keys, summed over weighted queries. -> (H_q, keys).

    The softmax runs over `chunk` queries at a time, so nothing of size T x T is kept.
    """
    B, T, _ = hidden.shape
    q, k = (proj(hidden).view(B, T, -1, attn.head_dim) for proj in (attn.q_proj, attn.k_proj))
    if hasattr(attn, "q_norm"):  # Qwen3
        q, k = attn.q_norm(q), attn.k_norm(k)
    q, k = (_rotate(x.transpose(1, 2), cos, sin) for x in (q, k))  # (B, H, T, d)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    place, total = torch.arange(T, device=q.device), 0
    for start in range(0, T, chunk):
        rows = slice(start, start + chunk)
        scores = q[:, :, rows] @ k.transpose(2, 3) * attn.scaling  # (B, H_q, chunk, T)
        scores = scores.masked_fill(place > place[rows, None], float("-inf"))
        share = scores.float().softmax(-1)[..., :keys]
        total = total + (share * weight[:, None, rows, None]).sum((0, 2))
    return total


@torch.no_grad()
def sink_strength(model, ids, mask, keys=8, chunk=128):
    """Mean attention that real queries (all but the first) pay to the first keys, for long inputs.

    ids, mask: (N, T), padded on the right -> (L, H_q, keys); key 0 is the sink. All layers in one
    forward with the model's own attention. An infix trigger lies outside the first keys.
    """
    weight = mask.float()
    weight[:, 0] = 0
    weight, found = weight / weight.sum(), {}

    def hook(layer):
        def take(attn, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            found[layer] = _sums_to_first_keys(attn, hidden, *kwargs["position_embeddings"],
                                               weight, keys, chunk)
        return take

    with _hooked(*(block.self_attn.register_forward_pre_hook(hook(i), with_kwargs=True)
                   for i, block in enumerate(decoder_layers(model)))):
        final_hidden(model, ids)
    return torch.stack([found[layer] for layer in sorted(found)])  # (L, H_q, keys)


def even_attention(mask):
    """The `sink_strength` of key 0 in a head that attends evenly to all it sees. (N, T) -> float"""
    weight = mask.float()
    weight[:, 0] = 0
    seen = torch.arange(1, mask.shape[1] + 1, device=mask.device)  # keys a query sees
    return ((weight / seen).sum() / weight.sum()).item()


def parse_span(spec):
    """'0' or '0-7' -> (first, last). Raises ValueError."""
    first, _, last = spec.partition("-")
    if not first.isdigit() or (last and not last.isdigit()) or int(last or first) < int(first):
        raise ValueError(f"positions to mask must look like 0, 0-7 or 1-8, got {spec!r}")
    return int(first), int(last or first)


@contextmanager
def mask_sinks(model, spec):
    """Hide the keys at positions `spec` ('0', '0-7', '1-8'; '' hides none) from all later queries.

    Positions count a row's real tokens, so left padding does not shift them. Queries up to the last
    hidden position attend as usual; no query after it sees the hidden keys, in any layer or head.
    Works in plain forwards and in `generate` with its cache. Every layer gets the same causal mask:
    for inputs shorter than a sliding window.
    """
    if not spec:
        yield
        return
    first, last = parse_span(spec)

    def hide(module, args, kwargs):
        ids, past = kwargs["input_ids"], kwargs.get(cache_name(model))
        seen = past.get_seq_length() if past is not None else 0
        real = kwargs.get("attention_mask")
        if real is None:
            real = torch.ones(len(ids), seen + ids.shape[1], device=ids.device)
        place = real.long().cumsum(1) - 1  # (B, S) a row's own positions
        query, key = place[:, seen:, None], place[:, None]
        column = torch.arange(place.shape[1], device=ids.device)
        shown = (column <= column[seen:, None]) & real.bool()[:, None]  # (B, T, S)
        shown &= ~((key >= first) & (key <= last) & (query > last))
        dtype = next(module.parameters()).dtype
        bias = torch.zeros(shown.shape, dtype=dtype, device=ids.device)
        kwargs["attention_mask"] = bias.masked_fill(~shown, torch.finfo(dtype).min)[:, None]
        return args, kwargs

    with _hooked(model.base_model.register_forward_pre_hook(hide, with_kwargs=True)):
        yield
