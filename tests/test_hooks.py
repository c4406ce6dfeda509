"""Hooks read what they name; what `self_check` lets pass is what the code takes it for."""
from functools import partial

import pytest
import torch
from conftest import ids_of, tiny_model
from torch.utils.checkpoint import checkpoint

import hooks
from hooks import Refused

KINDS = ["llama", "mistral", "qwen2", "qwen3"]

def close(ours, theirs, tolerance=1e-6):
    return ours.shape == theirs.shape and (ours - theirs).norm() <= tolerance * theirs.norm()

def values_of(model, ids):
    """Norms of the values that the model caches for generation. -> (B, L, T, H)"""
    out = model(input_ids=ids, use_cache=True)
    cache = out["cache" if "cache" in out else "past_key_values"]
    return torch.stack([layer.values.norm(dim=-1).transpose(1, 2) for layer in cache.layers], 1)

def attention_of(model, ids):
    model.set_attn_implementation("eager")
    maps = model(input_ids=ids, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    return torch.stack(maps)  # (L, B, H_q, T, T)

def hook_count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

# ---------------------------------------------------------------- layers
@pytest.mark.parametrize("kind", KINDS)
def test_run_layers_over_all_layers_is_the_models_forward(kind):
    model, ids = tiny_model(kind), ids_of()
    h = hooks.run_layers(model, model.get_input_embeddings()(ids), 0, 2)
    h = hooks.run_layers(model, h, 2, 3)
    assert close(hooks.final_norm(model, h) @ hooks.output_head(model).T, model(ids).logits)

@pytest.mark.parametrize("spec, layers", [
    ("all", [0, 1, 2]), ("2", [2]), ("0,1-2", [0, 1, 2]), *((spec, None) for spec in (
        "3", "0-7", "last", "-1", "", "2-1"))])
def test_layers_are_named_by_numbers_and_ranges_and_must_be_there(spec, layers):
    if layers:
        assert hooks.parse_layers(spec, 3) == layers
    else:
        with pytest.raises(Refused, match="layers"):
            hooks.parse_layers(spec, 3)

def test_parts_train_by_name():
    model = tiny_model()
    assert hooks.set_trainable(model, "1-2 mlp.down_proj") == [1, 2]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == \
        [f"model.layers.{i}.mlp.down_proj.weight" for i in (1, 2)]
    assert hooks.first_trained(model) == 1
    assert hooks.set_trainable(model, "all") == [0, 1, 2] and hooks.first_trained(model) == 0
    assert all(p.requires_grad for p in model.parameters())

@pytest.mark.parametrize("spec", ["1 mlp.no_such", "1 down_proj", "1", "3 mlp", ""])
def test_parts_that_are_not_there_are_refused(spec):
    with pytest.raises(Refused, match="--trainable|layers"):
        hooks.set_trainable(tiny_model(), spec)

# ---------------------------------------------------------------- self_check
DYNAMIC, EXPERTS = dict(rope_type="dynamic", factor=4.0), dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
FAMILIES = {  # settings for rows of 24 tokens; methods that must be able to train it: "" is none
    "llama": ({}, "npo rmu"), "mistral": ({}, "npo rmu"),
    "qwen2": ({}, "npo rmu"), "qwen3": ({}, "npo rmu"),
    "mistral, window of a row": (dict(sliding_window=24), "npo rmu"),
    "mistral, window shorter than a row": (dict(sliding_window=8), "npo"),
    "llama, dynamic beyond its length": (
        dict(max_position_embeddings=20, rope_scaling=DYNAMIC), ""),
    "llama, dynamic beyond twice its length": (
        dict(max_position_embeddings=8, rope_scaling=DYNAMIC), ""),
    "granite, logits divided": (dict(logits_scaling=8.0), ""),
    "granite, embeddings scaled": (dict(embedding_multiplier=12.0), "npo"),
    "cohere, logits scaled": ({}, ""), "gemma2, logits capped": ({}, ""),
    "gemma3_text, two rotary embeddings": ({}, "npo"),
    "phi, biases": ({}, ""), "gpt_neox, another layout": ({}, ""),
    "qwen3_next, some layers linear": (
        dict(layer_types=["full_attention", "linear_attention", "full_attention"],
             shared_expert_intermediate_size=16, **EXPERTS), ""),
    "llama, NaN weights": ({}, ""),
    # no matter which, but it must be true
    "stablelm, parallel": (dict(use_parallel_residual=True), None),
    "olmo2, norms behind": ({}, None),
    "glm, half rotary": ({}, None), "mixtral, experts": (dict(num_local_experts=4), None),
    "qwen3_moe, experts": (EXPERTS, None),
}

@pytest.mark.parametrize("method", ["npo", "rmu"])
@pytest.mark.parametrize("case", FAMILIES)
@torch.no_grad()
def test_a_family_is_what_the_engine_takes_it_for_or_refused(case, method):
    kind, (more, trains), ids = case.split(",")[0], FAMILIES[case], ids_of(1, 24)
    model, fresh = tiny_model(kind, **more), tiny_model(kind, **more)
    for each in (model, fresh):
        each.get_output_embeddings().weight.mul_(50)  # that caps bite
        if "NaN" in case:
            each.base_model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    try:
        hooks.set_trainable(model, "all")
        hooks.self_check(model, ids, 300, layerwise=method == "rmu")
        norms = hooks.sink_norms(model, ids, [0, 1, 2], 4)
    except Refused as refused:
        assert trains is None or method not in trains
        assert f"model type {kind}" in str(refused) and "\n" not in str(refused)
        return
    assert trains is None or method in trains
    out = model(input_ids=ids, output_hidden_states=True)
    h = out.hidden_states[-1]
    assert close(h @ hooks.output_head(model).T, out.logits, 1e-4)
    assert close(hooks.final_hidden(fresh, ids[:, :4]), h[:, :4], 1e-4)  # has seen no longer row
    assert close(norms, values_of(model, ids[:, :4]), 1e-4)
    if method == "rmu":
        ours = hooks.run_layers(model, model.get_input_embeddings()(ids), 0, 3)
        assert close(hooks.final_norm(model, ours), h, 1e-4)

# ---------------------------------------------------------------- value norms
@pytest.mark.parametrize("kind", KINDS)
def test_norms_are_those_of_the_cached_values_in_rows_and_in_their_first_k_tokens(kind):
    model, ids = tiny_model(kind), ids_of(B=4, T=16)
    with hooks.capture_norms(model, [0, 2], k=8) as norms:
        norms.begin()
        hooks.final_hidden(model, ids)
    assert norms.stack().shape == (4, 2, 8, 2)  # positions are cut, not rows
    assert close(norms.stack(), values_of(model, ids)[:, [0, 2], :8])
    assert close(hooks.sink_norms(model, ids, [0, 2], 8), norms.stack())

def test_hooks_are_gone_after_an_error():
    model = tiny_model()
    for context in (hooks.capture_norms(model, [0, 1], 4), hooks.mask_sinks(model, "0")):
        with pytest.raises(RuntimeError), context:
            assert hook_count(model) > 0
            raise RuntimeError
        assert hook_count(model) == 0

def test_recomputation_in_backward_leaves_norms_and_their_gradient_alone():
    model, ids, grads = tiny_model(), ids_of(), []
    for recompute in (False, True):
        for block in hooks.decoder_layers(model) if recompute else ():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        with hooks.capture_norms(model, [0, 2], 4) as norms:
            norms.begin()
            h, before = hooks.final_hidden(model, ids), norms.stack()
            (h.sum() + before.sum()).backward()
            assert torch.equal(norms.stack(), before)  # recomputed norms would pin their layers
        grads.append([p.grad for p in model.parameters()])
        model.zero_grad()
    assert all(close(*pair) for pair in zip(*grads))

# ---------------------------------------------------------------- attention
def test_attentions_are_those_of_the_whole_in_batches():
    model, ids = tiny_model(), ids_of(18, 8)  # two batches
    assert close(torch.cat([*hooks.attentions(model, ids)], 1), attention_of(model, ids))
    assert model.config._attn_implementation == "sdpa"

def test_sink_strength_is_a_mean_over_real_queries_but_the_first():
    model, ids = tiny_model(), ids_of(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    maps = attention_of(model, ids)[..., 0]  # (L, B, H_q, T) paid to position 0
    real = [maps[:, 0, :, q] for q in (1, 2, 3)] + [maps[:, 1, :, q] for q in range(1, 6)]
    assert close(hooks.sink_strength(model, ids, mask)[0], torch.stack(real).mean(0))
    for block in hooks.decoder_layers(model):
        block.self_attn.q_proj.weight.data.zero_()  # heads now attend evenly
    strength, even = hooks.sink_strength(model, ids, mask)
    assert even == pytest.approx(sum(1 / seen for seen in (2, 3, 4, 2, 3, 4, 5, 6)) / 8)
    assert torch.allclose(strength, torch.full((3, 4), even))

@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("spec", ["0", "0-2", "1-3"])
def test_hidden_positions_are_seen_by_no_other(spec, window):
    model, ids = tiny_model("mistral", sliding_window=window), ids_of(2, 10)
    hidden = hooks.parse_layers(spec, 10)
    others = [i for i in range(10) if i not in hidden]
    shown = torch.ones(10, 10).tril().triu(1 - (window or 10)).bool()
    shown[others, :] &= ~torch.isin(torch.arange(10), torch.tensor(hidden))
    expected = model(input_ids=ids, attention_mask=shown[None, None].expand(2, 1, -1, -1)).logits
    with hooks.mask_sinks(model, spec):
        assert close(model(input_ids=ids).logits[:, others], expected[:, others], 1e-5)
        left = model(  # three columns of padding
            input_ids=torch.cat([ids[:, :3], ids], 1),
            attention_mask=(torch.arange(13) >= 3).expand(2, 13)).logits[:, 3:]
    assert left.isfinite().all() and close(left[:, others], expected[:, others], 1e-5)
    assert not close(model(input_ids=ids).logits[:, 4:], expected[:, 4:], 1e-2)

def test_hidden_keys_stay_hidden_while_generating():
    model, how = tiny_model(), dict(max_new_tokens=5, do_sample=False, eos_token_id=299)
    with hooks.mask_sinks(model, "0-1"):
        out = model.generate(ids_of(2, 6), **how)
        for at in range(6, out.shape[1]):  # every next token from a whole forward
            assert torch.equal(model(input_ids=out[:, :at]).logits[:, -1].argmax(-1), out[:, at])
    assert not torch.equal(out, model.generate(ids_of(2, 6), **how))
