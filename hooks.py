"""The model: loading, the layers' names, value norms, attention, hidden tokens. Nothing to run.

The one place that knows what the parts of a model are called. It is written for decoders that
keep `<base>.layers[i].self_attn.v_proj` and add nothing between layers: Llama, Mistral, Qwen2,
Qwen3 and their kin; `self_check` confirms it on the real weights. Layers are counted from 0.

Value norms are ||v_i||_2 of (4): the output of v_proj at position i, for each KV head.
The read-out M_theta of (A4) and (A5) is what leaves layer `--layer`.
"""
import gc
import re
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

MANY = 10 ** 6  # an upper end for numbers of positions, where no row is at hand


class Refused(Exception):
    """Bad input: what was wrong and how to mend it, in one line. The scripts exit with 2."""


def say(*words):
    """Print once, however many ranks there are."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*words, flush=True)


# ---------------------------------------------------------------- loading
def dtype_of(precision):
    """The dtype of loaded models, of theta_o's constants and of the saved weights."""
    return torch.float32 if precision == "fp32" else torch.bfloat16


def load_pretrained(cls, name, **more):
    """cls.from_pretrained(name). Raises Refused, in one line that names it."""
    try:
        return cls.from_pretrained(name, **more)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        # RuntimeError: weights of another shape than the config's
        words = " ".join(str(error).split())
        hint = ""
        if "tiktoken" in words:  # what transformers asks for where tokenizer.model stands alone
            hint = "; it needs a tokenizer.json: tokenizer.model alone is read differently"
        elif not Path(name).exists():
            hint = f"; or there is no folder {name}"
        raise Refused(f"{name} does not load: {words:.200}{hint}") from error


def empty_model(name):
    """A model's shapes alone, on the meta device: no weights are read, no memory is taken."""
    config = load_pretrained(transformers.AutoConfig, name)
    try:
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise Refused(f"{name}: {config.model_type} is no causal language model") from error


def load_model(name, cfg):
    """A frozen model in eval mode, hub id or folder, on this rank's device.

    Raises Refused for weights that are missing, left over, of another shape, NaN or infinite:
    transformers only warns of the first two and fills the gaps with random numbers.
    """
    # a model trained before keeps itself alive in cycles: its losses_of holds it
    gc.collect()
    cls = transformers.AutoModelForCausalLM
    model, info = load_pretrained(cls, name, dtype=dtype_of(cfg.precision),
                                  output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(map(str, info[problem]))  # of shapes that differ: tuples
        # what belongs to no layer of this family (an old rotary buffer) is not reported
        if keys:
            raise Refused(f"{name} holds weights of another model: {len(keys)} "
                          f"{problem.replace('_', ' ')}, such as {keys[0]}")
    # sampling settings of a checkpoint would warn, and refuse to be saved; its EOS stays
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = model.config.eos_token_id
    model.generation_config = transformers.GenerationConfig(eos_token_id=eos)
    model.to(cfg.device).requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.isfinite().all():
            raise Refused(f"{name}: its weights hold NaN or infinity")
    return model.eval()


def load_tokenizer(cfg):
    """The tokenizer of --tokenizer, or the model's own. Raises Refused that names it."""
    name = cfg.tokenizer or cfg.model
    folder = Path(name)
    if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        # transformers would convert it, and then split "\n\n  The" otherwise than sentencepiece
        raise Refused(f"{name} has a tokenizer.model but no tokenizer.json: pass --tokenizer with "
                      "a folder or hub id that has one")
    return load_pretrained(transformers.AutoTokenizer, name)


def eos_ids(model, tok):
    """All ids that end an answer: the checkpoint's own and the tokenizer's."""
    eos = model.generation_config.eos_token_id
    if eos is None:
        found = []
    elif isinstance(eos, int):
        found = [eos]
    else:
        found = list(eos)
    if tok.eos_token_id is not None and tok.eos_token_id not in found:
        found.append(tok.eos_token_id)
    return found


def check_ids(model, tok, rows):
    """Raises Refused where the tokenizer, or a row of ids, has an id that the model lacks.

    Ids are counted by the highest, since a vocabulary may have holes. Added tokens beyond the
    embedding (a padding token, say) are no harm while no row uses them.
    """
    known = model.get_input_embeddings().num_embeddings
    own = set(tok.get_vocab().values()) - set(tok.added_tokens_decoder)
    highest = max(own)
    for row in rows:
        highest = max(highest, *row)
    if highest >= known:
        raise Refused(f"the tokenizer uses ids up to {highest}, the model knows 0 to {known - 1}: "
                      "pass --tokenizer")


# ---------------------------------------------------------------- layers and what trains
def decoder_layers(model):
    """The decoder layers. Raises Refused for a model that is not Llama-like."""
    layers = getattr(model.base_model, "layers", None)
    if not layers:
        raise Refused(f"model type {model.config.model_type} has no layers[i].self_attn.v_proj")
    for layer in layers:
        if not hasattr(getattr(layer, "self_attn", None), "v_proj"):
            raise Refused(f"model type {model.config.model_type}: a layer has no self_attn.v_proj")
    return layers


def parse_numbers(spec, n, what):
    """'all', '7' or '0,5-7' of n -> sorted numbers. Raises Refused for one that is not there."""
    if spec == "all":
        return list(range(n))
    numbers = set()
    if re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", str(spec)):
        for span in str(spec).split(","):
            ends = span.split("-")
            numbers.update(range(int(ends[0]), int(ends[-1]) + 1))
    if not numbers or max(numbers) >= n:
        raise Refused(f"{what} must look like 7 or 0,5-7 and be of 0 to {n - 1}, got {spec!r}")
    return sorted(numbers)


def layers_of(model, spec):
    return parse_numbers(spec, len(decoder_layers(model)), "layers")


def set_trainable(model, spec):
    """Train 'all', or only what is named like '5-7 mlp.down_proj' (C.2). -> the layers that train.

    By name, never by index: the paper's "6th parameter" of a layer is mlp.down_proj.
    """
    if spec == "all":
        model.requires_grad_(True)
        return layers_of(model, "all")
    model.requires_grad_(False)
    layers, _, part = spec.partition(" ")
    if not part:
        raise Refused(f"--trainable must be all or like '5-7 mlp.down_proj', got {spec!r}")
    # every layer named must have the part, or fewer would train than was asked for
    for i in layers_of(model, layers):
        names = []  # for the refusal: experts' names are hard to guess
        found = False
        for name, parameter in decoder_layers(model)[i].named_parameters():
            names.append(name.rsplit(".", 1)[0])
            if name.startswith(part):
                parameter.requires_grad_(True)
                found = True
        if not found:
            raise Refused(f"--trainable {spec!r}: layer {i} has no {part}, but "
                          f"{', '.join(dict.fromkeys(names))}")
    return layers_of(model, layers)


def first_trained(model):
    """The lowest layer of which something trains."""
    for i, layer in enumerate(decoder_layers(model)):
        for parameter in layer.parameters():
            if parameter.requires_grad:
                return i


# ---------------------------------------------------------------- forwards
def final_hidden(model, ids):
    """What the output head reads. (B, T) -> (B, T, C)

    No attention mask: rows are padded on the right, which a causal model never looks at.
    """
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


def run_layers(model, h, start, stop):
    """Decoder layers start..stop-1, so `train.forward` can leave rows out. (B, T, C) -> same"""
    position_ids = torch.arange(h.shape[1], device=h.device)[None]
    # no mask: causal attention is what the kernels take None for
    rotary = model.base_model.rotary_emb(h, position_ids)
    for layer in decoder_layers(model)[start:stop]:
        h = layer(h, attention_mask=None, position_ids=position_ids, position_embeddings=rotary)
        if isinstance(h, tuple):  # some families also return attention weights
            h = h[0]
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
def self_check(model, ids, layerwise):
    """Is this model what the code above takes it for? Raises Refused, before anything is trained.

    ids: (1, T), a real row. Three things are compared:
    - logits are final_hidden @ head.T (not so where they are scaled or capped, or NaN);
    - first tokens know nothing of later ones (not so under `rope_type: dynamic`);
    - layerwise: `run_layers` gives the model's forward (not so with a sliding window shorter than
      T, scaled residuals or embeddings, parallel blocks, layers of several kinds).
    """
    kind = model.config.model_type
    # the half first: the model must not have seen a longer row yet
    half = final_hidden(model, ids[:, :ids.shape[1] // 2 + 1])
    logits = model(input_ids=ids, use_cache=False).logits
    h = final_hidden(model, ids)
    # what differs, ours, theirs, how far they may be apart in bf16: behind RMU 0.12 was seen
    # between two lengths of one text, hence more room there
    checks = [
        ("logits are not final hidden states x head", h @ output_head(model).T, logits, 0.05),
        ("first tokens depend on later ones", half, h[:, :half.shape[1]], 0.25)]
    if layerwise:
        try:
            embedded = model.get_input_embeddings()(ids)
            ours = run_layers(model, embedded, 0, len(decoder_layers(model)))
        except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
            # whatever a foreign layer stumbles over means the same: it is not Llama-like
            raise Refused(f"model type {kind} cannot be run layer by layer: {error!r:.80}"
                          ) from error
        words = f"run layer by layer on {ids.shape[1]} tokens it differs"
        checks.append((words, final_norm(model, ours), h, 0.05))
    for words, ours, theirs, apart in checks:
        if h.dtype == torch.float32:
            apart = 1e-4
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
        self.k = k
        query_heads = model.config.num_attention_heads
        self.heads = getattr(model.config, "num_key_value_heads", query_heads)
        self.found = {i: [] for i in layers}
        self.open = False
        for i in layers:
            v_proj = decoder_layers(model)[i].self_attn.v_proj
            self.enter_context(v_proj.register_forward_hook(partial(self.take, i)))

    def begin(self):
        self.found = {i: [] for i in self.found}
        self.open = True

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
        layers = [torch.cat(norms) for norms in self.found.values()]  # RMU runs a layer twice
        return torch.stack(layers, dim=1)


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
    kind = model.config._attn_implementation  # to be set again below
    model.set_attn_implementation("eager")  # the fast kernels return no probabilities
    for rows in ids.split(batch):
        out = model.base_model(input_ids=rows, use_cache=False, output_attentions=True)
        yield torch.stack(out.attentions).float()
    model.set_attn_implementation(kind)


def sink_strength(model, ids, mask, longest=128):
    """Attention that real queries, all but the first, pay to position 0. -> ((L, H_q), even)

    ids, mask: (N, T), padded on the right, cut to `longest` tokens. even: what it were if heads
    attended evenly to all they see.
    """
    ids = ids[:, :longest]
    real = mask[:, 1:longest]  # (N, T-1)
    paid = [maps[..., 1:, 0].clone() for maps in attentions(model, ids)]  # clone frees the maps
    paid = torch.cat(paid, dim=1).transpose(2, 3)  # (L, N, T-1, H_q)
    seen = torch.arange(2, ids.shape[1] + 1, device=ids.device).expand_as(real)[real]
    return paid[:, real].mean(1), (1 / seen).mean().item()


@contextmanager
def hide_tokens(model, spec):
    """Hide positions `spec` ('0', '0-7', '1-8'; '' hides none) from all others, also in `generate`.

    Positions count a row's real tokens, left padding aside, and all keep their numbers. What is
    computed at a hidden position reaches no other, in any layer or head.
    """
    if not spec:
        yield
        return
    hidden = torch.tensor(parse_numbers(spec, MANY, "--hide"), device=model.device)

    # as a hook in front of the decoder, since `generate` builds its own masks step by step
    def hide(module, args, kwargs):
        ids = kwargs["input_ids"]
        past = kwargs.get("cache") or kwargs.get("past_key_values")  # "cache" from 5.24 on
        seen = 0  # tokens whose keys are in the cache
        if past:
            seen = past.get_seq_length()
        real = kwargs.get("attention_mask")
        if real is None:
            real = torch.ones(len(ids), seen + ids.shape[1], device=ids.device)
        place = real.long().cumsum(1) - 1  # (B, S) a row's own positions
        kwargs["position_ids"] = place[:, seen:].clamp(min=0)
        kwargs["attention_mask"] = real.bool() & ~torch.isin(place, hidden)
        return args, kwargs

    with model.base_model.register_forward_pre_hook(hide, with_kwargs=True):
        yield
