"""Hooks capture what they name, at positions and not rows, and leave nothing behind."""
from functools import partial

import pytest
import torch
from conftest import tiny_model
from torch.utils.checkpoint import checkpoint

import hooks


def ids_of(B=4, T=16):
    return torch.randint(2, 300, (B, T), generator=torch.Generator().manual_seed(0))


def hook_count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_norms_equal_the_value_cache_of_the_model(kind):
    # independent reference: the values that the model itself caches for generation
    model, ids = tiny_model(kind), ids_of()
    with hooks.capture_norms(model, [0, 2], k=8) as norms, torch.no_grad():
        cache = getattr(model(input_ids=ids, use_cache=True), hooks.cache_name(model))
    for layer in (0, 2):
        values = cache.layers[layer].values  # (B, H, T, d)
        expected = values.norm(dim=-1).transpose(1, 2)[:, :8]  # (B, k, H)
        assert norms[layer][0].shape == (4, 8, 2)
        assert torch.allclose(norms[layer][0], expected, atol=1e-6)


def test_hook_takes_positions_not_rows():
    model = tiny_model()
    with hooks.capture_norms(model, [1], k=8) as with_bos:
        hooks.final_hidden(model, ids_of())
    with hooks.capture_norms(model, [1], k=7, include_bos=False) as without:
        hooks.final_hidden(model, ids_of())
    assert with_bos[1][0].shape == (4, 8, 2)
    assert torch.equal(without[1][0], with_bos[1][0][:, 1:])


def test_whole_vector_norm_is_the_root_of_the_heads_squares():
    model = tiny_model()
    with hooks.capture_norms(model, [0], 5) as heads:
        hooks.final_hidden(model, ids_of())
    with hooks.capture_norms(model, [0], 5, per_head=False) as whole:
        hooks.final_hidden(model, ids_of())
    assert torch.allclose(whole[0][0][..., 0], heads[0][0].pow(2).sum(-1).sqrt(), atol=1e-6)


@pytest.mark.parametrize("include_bos", [True, False])
def test_cached_norms_equal_full_forward(include_bos):
    model, ids = tiny_model(), ids_of()
    with hooks.capture_norms(model, [0, 1, 2], 8, include_bos) as norms, torch.no_grad():
        hooks.final_hidden(model, ids)
    short = hooks.sink_norms(model, ids, [0, 1, 2], 8, include_bos)
    assert short.shape == (4, 3, 8, 2)
    assert torch.allclose(short, hooks.stack_norms(norms), atol=1e-5)


def test_hidden_is_the_layers_output_before_the_final_norm():
    model, ids = tiny_model(), ids_of()
    with hooks.capture_hidden(model, 1) as hidden, torch.no_grad():
        reference = model(input_ids=ids, output_hidden_states=True).hidden_states[2]
    assert torch.equal(hidden[1], reference)
    with hooks.capture_hidden(model, 2) as hidden, torch.no_grad():
        final = hooks.final_hidden(model, ids)
    assert not torch.allclose(hidden[2], final)
    assert torch.allclose(model.base_model.norm(hidden[2]), final, atol=1e-6)


def test_final_hidden_and_head_give_the_models_logits():
    model, ids = tiny_model(), ids_of()
    with torch.no_grad():
        logits = hooks.final_hidden(model, ids) @ hooks.output_head(model).T
        assert torch.allclose(logits, model(input_ids=ids).logits, atol=1e-6)


def test_hooks_gone_after_an_error():
    model = tiny_model()
    for make in (lambda: hooks.capture_norms(model, [0, 1], 4),
                 lambda: hooks.capture_hidden(model, 1)):
        with pytest.raises(RuntimeError):
            with make():
                assert hook_count(model) > 0
                raise RuntimeError
        assert hook_count(model) == 0


def test_gradients_flow_through_captured_norms():
    model = tiny_model()
    with hooks.capture_norms(model, [2], 4) as norms:
        hooks.final_hidden(model, ids_of())
    norms[2][0].sum().backward()
    assert hooks.decoder_layers(model)[0].mlp.down_proj.weight.grad.abs().sum() > 0


def test_recomputation_in_backward_keeps_nothing_captured():
    # kept, a recomputed norm would hold its whole layer: 6 GB of a 7B
    model = tiny_model()
    for block in hooks.decoder_layers(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    with hooks.capture_norms(model, [0, 1, 2], 4) as norms:
        h = hooks.final_hidden(model, ids_of())
        before = {layer: list(kept) for layer, kept in norms.items()}
        (h.sum() + hooks.stack_norms(norms).sum()).backward()
    assert {layer: len(kept) for layer, kept in norms.items()} == {0: 1, 1: 1, 2: 1}
    assert all(norms[layer][0] is before[layer][0] for layer in norms)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_a_forward_entered_in_the_middle_equals_the_whole_one(kind):
    model, ids = tiny_model(kind), ids_of()
    blocks = list(hooks.decoder_layers(model))
    with hooks.capture_hidden(model, 0) as hidden, torch.no_grad():
        whole = hooks.final_hidden(model, ids)
    with pytest.raises(RuntimeError), hooks.entering(model, 1, hidden[0]):
        assert torch.equal(hooks.final_hidden(model, torch.zeros_like(ids)), whole)
        raise RuntimeError
    assert list(hooks.decoder_layers(model)) == blocks


@pytest.mark.parametrize("spec, expected", [("all", [0, 1, 2]), ("2", [2]), ("0,1-2", [0, 1, 2])])
def test_layer_specs(spec, expected):
    assert hooks.parse_layers(spec, 3) == expected


@pytest.mark.parametrize("spec", ["3", "0-7", "last", "-1", ""])
def test_a_missing_layer_is_an_error_never_a_skip(spec):
    with pytest.raises(ValueError, match="layer"):
        hooks.parse_layers(spec, 3)


def test_trainable_parts_are_picked_by_name():
    model = tiny_model()
    picked = hooks.set_trainable(model, "0-1 mlp.down_proj")
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names == [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)] and len(picked) == 2
    with pytest.raises(ValueError, match="trainable"):
        hooks.set_trainable(model, "0-1 mlp.no_such")


def test_models_without_v_proj_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10))
    with pytest.raises(ValueError, match="Llama-, Mistral- or Qwen-type"):
        hooks.decoder_layers(gpt2)


def test_sink_attention_is_the_mean_over_real_queries():
    model, ids = tiny_model(), ids_of(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6]).bool()
    out = hooks.sink_strength(model, ids, mask, keys=1)[..., 0]
    kind = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(input_ids=ids, output_attentions=True).attentions
    real = [maps[1][0, :, q, 0] for q in (1, 2, 3)] + [maps[1][1, :, q, 0] for q in range(1, 6)]
    assert out.shape == (3, 4) and kind == "sdpa"
    assert torch.allclose(out[1], torch.stack(real).mean(0), atol=1e-6)


def test_even_attention_is_one_over_the_keys_seen():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    seen = [2, 3, 2, 3, 4]  # by queries 1, 2 of row 0 and 1, 2, 3 of row 1
    assert hooks.even_attention(mask) == pytest.approx(sum(1 / n for n in seen) / 5)


@pytest.mark.parametrize("n", [0, 2, 4])
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_rows_that_leave_change_nothing_for_the_others(kind, layer, n):
    # hidden states, activations and sink norms equal those of the whole forward
    model, ids = tiny_model(kind), ids_of()
    with hooks.capture_norms(model, [0, 1, 2], 5) as whole, \
            hooks.capture_hidden(model, layer) as acts:
        h = hooks.final_hidden(model, ids)
    with hooks.capture_norms(model, [0, 1, 2], 5) as left, \
            hooks.capture_hidden(model, layer) as acts_left:
        kept = hooks.hidden_leaving(model, ids, layer, n, keep=5)
    assert torch.allclose(hooks.stack_norms(left), hooks.stack_norms(whole), atol=1e-6)
    assert torch.allclose(acts_left[layer], acts[layer], atol=1e-6)
    assert torch.allclose(kept, h[n:] if n < 4 else h[:, :5], atol=1e-6)
    assert hook_count(model) == 0


def test_sink_tokens_go_through_the_upper_matrices_with_the_other_rows():
    model, ids, seen = tiny_model(), ids_of(), []
    block = hooks.decoder_layers(model)[2]
    for part in (block.mlp.down_proj, block.self_attn.q_proj, block.self_attn.o_proj):
        part.register_forward_hook(lambda module, args, out: seen.append(out.shape[:-1]))
    hooks.hidden_leaving(model, ids, 0, 2, keep=5)
    B, T = ids.shape
    assert seen == 3 * [(1, 2 * 5 + (B - 2) * T)]


def test_packed_rows_are_refused_where_attention_would_look_across_them():
    model = tiny_model()
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="'eager'.*need 'sdpa'"):
        hooks.hidden_leaving(model, ids_of(), 0, 2, keep=5)
