"Texts: which documents are held out, which column of a table is read, what a window holds."
import csv, json, os, random, subprocess, sys, warnings

import numpy as np
import pytest
import torch

from sae_nb.alike import apart, choose, lot, prints, shared
from sae_nb.core import UserError
from sae_nb.tables import FILES
from sae_nb.text import Document, Text, Words, is_held_out, load_text, load_tokenizer, pieces, python_topics, text_files, windows


def story(seed, words=120):
    "A text of its own."
    g = random.Random(seed)
    return " ".join("".join(g.choices("abcdefghiklmnoprstuw", k=g.randint(2, 9))) for _ in range(words))


def sides(text): return {h: list(text.documents(h)) for h in (False, True)}


def files(folder, contents):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items(): (folder / name).write_text(content)
    return str(folder)


def passages(text): return {tuple(w) for w in zip(*(text.split()[i:] for i in range(5)))}


# --- held out --------------------------------------------------------------------------------------

@pytest.mark.parametrize("count", [2, 3, 7, 12, 40])
def test_a_file_stands_on_one_side(tmp_path, count):
    "Files are held out whole, however long their pieces are, and about a tenth of the text where there are enough."
    text = load_text(files(tmp_path, {f"f{i:02}.txt": story(i, 900) for i in range(count)}))
    names = {h: {d.name.split("#")[0] for d in docs} for h, docs in sides(text).items()}
    assert names[False] and names[True] and not names[False] & names[True]
    assert sum(map(len, names.values())) == count
    if count >= 10: assert 0.05 < len(names[True]) / count < 0.2


def test_a_story_between_separators_is_a_document(tmp_path):
    (tmp_path / "t.txt").write_text("<|endoftext|>".join(story(i, 400) for i in range(30)))
    text = text_files(str(tmp_path / "t.txt"), 500)
    for docs in sides(text).values():
        whole = "".join(d.text for d in docs)
        assert all(story(i, 400) in whole or not passages(story(i, 400)) & passages(whole) for i in range(30))


def test_a_long_file_is_held_out_at_its_end(tmp_path):
    (tmp_path / "t.txt").write_text(story(0, 9_000))
    docs = list(load_text(str(tmp_path / "t.txt")).read())
    held = [d.held for d in docs]
    assert held == sorted(held) and .05 < sum(held) / len(held) < .15


@pytest.mark.parametrize("kind", ["copy", "other layout", "words changed", "quoted in a longer file"])
def test_a_planted_duplicate_is_not_trained_on(tmp_path, kind):
    "A file like a held-out one, wherever it lies, is on the same side, or the two are on neither."
    contents = {f"f{i:02}.txt": story(i, 300) for i in range(30)}
    held = next(d.name.split("#")[0] for d in sides(load_text(files(tmp_path / "plain", contents)))[True])
    original = contents[held]
    planted = {"copy": original, "other layout": original.upper().replace(" ", "\n  "),
               "words changed": " ".join("changed" if i % 30 == 7 else w for i, w in enumerate(original.split())),
               "quoted in a longer file": story(99, 300) + " " + original + " " + story(98, 300)}[kind]
    for name in ("a.txt", "z.txt"):
        text = load_text(files(tmp_path / name, contents | {name: planted}))
        train = "".join(d.text for d in text.documents())
        found = sides(text)
        assert found[True] and not {d.name for d in found[True]} & {d.name for d in found[False]}
        for d in found[True]: assert shared(prints(d.text), prints(train)) < .5, d.name


def test_sides_promise_that_no_document_stands_on_the_other():
    "Whatever is alike: copies, quotations and chains of them."
    for seed in range(40):
        g = random.Random(seed)
        parts = [story(100 * seed + i, 40) for i in range(30)]
        docs = [" ".join(g.choices(parts, k=g.randint(1, 4))) for _ in range(40)]
        held = [b == 0 for b in choose([len(d) for d in docs])]
        found = [prints(d) for d in docs]
        got = apart(found, [len(d) for d in docs], held)
        if got == held: continue
        for side in (True, False):
            others = np.unique(np.concatenate([f for f, s in zip(found, got) if s is (not side)]))
            assert all(shared(f, others) <= .5 for f, s in zip(found, got) if s is side)


def test_a_text_of_one_sentence_is_said_to_repeat_itself(tmp_path):
    (tmp_path / "t.txt").write_text("The fox jumped over the dog and slept.\n" * 400)
    with pytest.warns(UserWarning, match="repeats itself"): found = sides(load_text(str(tmp_path / "t.txt")))
    assert found[True] and found[False]


def test_no_held_out_topic_stands_on_the_training_side():
    "By an independent count of five words in a row; the training side is what the names say."
    found = sides(load_text("pylib"))
    train = set().union(*(passages(d.text) for d in found[False]))
    again = {d.name: len(passages(d.text) & train) / max(1, len(passages(d.text))) for d in found[True]}
    assert max(again.values()) < .6
    named = [d.name for d in python_topics() if is_held_out(d.name)]
    assert {d.name for d in found[True]} <= {d.name for d in load_text("pylib").read() if is_held_out(d.name)}
    assert not any(is_held_out(d.name) for d in found[False])
    assert len([n for n in named if n not in again]) >= 1


def test_copies_in_a_stream_go_the_same_way(monkeypatch):
    "A text too long to be looked through decides by content: copies and near duplicates together, a tenth held out."
    monkeypatch.setattr("sae_nb.text.HEAD", 20_000)
    rows = [story(i % 200, 60) for i in range(400)]
    rows = [r if i < 200 else " ".join("changed" if j == 30 else w for j, w in enumerate(r.split())) for i, r in enumerate(rows)]
    held = [d.held for d in load_text(rows).read()]
    assert 8 <= sum(held[:200]) <= 40
    assert sum(a == b for a, b in zip(held[:200], held[200:])) >= 188


def test_sides_are_the_same_in_every_process(tmp_path):
    files(tmp_path, {f"f{i}.txt": story(i, 100) for i in range(25)})
    code = f"from sae_nb.text import load_text; print([(d.name, d.held) for d in load_text({str(tmp_path)!r}).read()])"
    runs = {subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": s}, capture_output=True, text=True).stdout
            for s in "12"}
    assert len(runs) == 1 and "True" in next(iter(runs))


# --- tables ----------------------------------------------------------------------------------------

def named_rows(**columns): return [dict(zip(columns, row)) for row in zip(*columns.values())]


PROSE = [story(i, 30) for i in range(20)]
ADDRESSES = [f"https://example.org/{i}/a-long-address-of-a-page" for i in range(20)]
TABLES = {"url and content": (dict(url=ADDRESSES, content=PROSE), "content"), "Id and Text": (dict(Id=[f"{i:040x}" for i in range(20)], Text=PROSE), "Text"),
          "text of addresses": (dict(text=ADDRESSES, page=PROSE), "page"), "one of a name nobody knows": (dict(k=list(range(20)), blob=PROSE), "blob"),
          "short texts": (dict(text=["Yes."] * 10 + ["No."] * 10, id=[f"{i}" for i in range(20)]), "text"),
          "two texts": (dict(summary=PROSE[::-1], text=PROSE), "text"), "Japanese": (dict(id=ADDRESSES, body=["日本語の文章です。" * 4] * 20), "body")}


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("make", ["list", "pandas", "polars", "datasets"])
def test_the_text_of_a_table_is_found(kind, make):
    columns, want = TABLES[kind]
    if make == "list": table = named_rows(**columns)
    elif make == "datasets":
        datasets, pyarrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
        table = datasets.Dataset(datasets.table.InMemoryTable(pyarrow.table(columns)), fingerprint="0")
    else: table = pytest.importorskip(make).DataFrame(columns)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        text = load_text(table)
        assert [d.text for d in text.read()] == columns[want]
    found = sides(text)
    assert want == "body" or "short" in kind or (found[True] and found[False])
    named = [str(w.message) for w in told if "column" in str(w.message)]
    assert bool(named) == (want.lower() != "text" and sum(isinstance(v[0], str) for v in columns.values()) > 1)
    assert all(repr(want) in n for n in named)


def test_an_unclear_table_asks():
    rows = named_rows(question=PROSE, answer=PROSE[::-1])
    with pytest.raises(UserError, match="question, answer.*column='question'"): load_text(rows)
    assert [d.text for d in load_text(rows, column="answer").read()] == PROSE[::-1]
    with pytest.raises(UserError, match="no column 'other'.*question, answer"): load_text(rows, column="other")


def test_rows_without_a_text_are_passed_over():
    pandas = pytest.importorskip("pandas")
    values = PROSE[:5] + [None, float("nan"), "", "  "] + PROSE[5:]
    rows = named_rows(number=list(range(24)), text=values)
    assert [d.text for d in load_text(rows).read()] == PROSE
    assert [d.text for d in load_text(pandas.DataFrame(rows)).read()] == PROSE
    assert [d.text for d in load_text([None, *PROSE]).read()] == PROSE


def table_file(path, rows):
    "Rows in a file of the kind that its ending says."
    if path.suffix == ".jsonl": path.write_text("".join(json.dumps(r) + "\n\n" for r in rows), encoding="utf-8")
    elif path.suffix == ".parquet": pytest.importorskip("polars").DataFrame(rows).write_parquet(path)
    else:
        with open(path, "w", encoding="utf-8-sig", newline="") as f:
            out = csv.DictWriter(f, rows[0].keys(), dialect="excel-tab" if path.suffix == ".tsv" else "excel")
            out.writeheader(); out.writerows(rows)
    return str(path)


@pytest.mark.parametrize("ending", FILES)
def test_a_file_of_a_table_is_read_by_its_columns(tmp_path, ending):
    "Texts with commas, quotes, tabs and line breaks, one longer than the csv module takes by itself; chosen, named, and asked for."
    texts = PROSE[:-1] + ['A "quoted", \tlong\ntext. ' * 9_000]
    path = table_file(tmp_path / f"t{ending}", named_rows(page=ADDRESSES, answer=texts))
    with pytest.warns(UserWarning, match="'answer'"): chosen = load_text(path)
    for text in (chosen, load_text(path, column="answer")): assert [d.text for d in text.read()] == [d.text for d in text.read()] == texts
    assert [d.text for d in load_text(path, column="page").read()] == ADDRESSES
    with pytest.raises(UserError, match="no column 'other'.*page, answer"): load_text(path, column="other")


def test_a_file_that_is_no_table_of_its_kind_gets_a_sentence(tmp_path):
    for name, content, said in (("a.csv", b"a,text\n1,one\n2,two,three\n", "row 1.*more values"), ("b.csv", b"text\n\xff\xfe\n", "UTF-8"),
                                ("c.jsonl", b'{"text": "one"}\n{"text": \n', "line 2.*JSON"), ("d.jsonl", b"[" * 100_000, "line 1.*JSON"),
                                ("e.jsonl", b"3\n", "int"), ("f.parquet", b"PAR1, or not", "parquet"), ("g.csv", b"", "empty"), ("h.tsv", b"text\n", "empty")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=said) as told: list(load_text(tmp_path / name).read())
        assert "\n" not in str(told.value)


def test_a_column_of_what_has_none_is_told(tmp_path):
    (tmp_path / "notes.txt").write_text("Some words in a file. " * 30)
    for name in ("pylib", tmp_path / "notes.txt", tmp_path):
        with pytest.warns(UserWarning, match="no table.*'answer'"): load_text(name, column="answer")


@pytest.mark.parametrize("wrong, said", [(3, "int"), (None, "NoneType"), ([], "empty"), ([3], "int"), ([{"a": 1}], "none holds text"), ("", "empty name"),
                                         ([{"text": "a long text that reads like one"}] * 70 + [{"text": 4}], "row 70")])
def test_what_is_no_text_gets_a_sentence(wrong, said):
    with pytest.raises(UserError, match=said): list(load_text(wrong).read())


def test_code_that_comes_with_a_text_or_tokenizer_is_not_run(tmp_path, monkeypatch):
    asked = []
    import transformers
    real = transformers.AutoTokenizer.from_pretrained
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: (asked.append(k), real(*a, **k))[1])
    load_tokenizer()
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (asked.append(k), named_rows(text=PROSE))[1])
    assert len(list(load_text("some/set").read())) == 20
    assert [k["trust_remote_code"] for k in asked] == [False, False]


# --- characters ------------------------------------------------------------------------------------

VALID = "a\xa0b\u3000c\u200bd\xade\ufefff\x0cg\u2028h\u202ei\ue000j\x85 日本語 👩‍👩‍👧 é \U0010ffff"


def test_every_character_is_decoded():
    tok = load_tokenizer()
    words = Words(tok)
    for text in (VALID, VALID[::-1], "\ufeff", "\ufffd", "日\ufffd本"):
        ids = tok(text, add_special_tokens=False)["input_ids"]
        assert "".join(words(ids)) == text
    ids = tok("日本", add_special_tokens=False)["input_ids"]
    assert "".join(words(ids[:-1])).startswith("日") and "\ufffd" in "".join(words(ids[:-1]))


@pytest.mark.filterwarnings("ignore")
def test_a_mark_at_the_head_of_a_file_is_no_text(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbf" + (VALID * 40).encode())
    assert "".join(d.text for d in load_text(str(tmp_path / "t.txt")).read()) == VALID * 40


@pytest.mark.skipif(sys.platform == "darwin" or os.name == "nt", reason="file names are UTF-8 there")
def test_a_file_name_of_any_bytes(tmp_path):
    for i in range(12): (tmp_path / os.fsdecode(b"caf\xe9%d.txt" % i)).write_text(story(i))
    text = load_text(str(tmp_path))
    found = sides(text)
    assert found[True] and found[False] and len(text.fingerprint) == 64
    for d in text.read(): d.name.encode("utf-8")
    only = tmp_path / os.fsdecode(b"caf\xe91.txt")
    assert next(load_text(only).read()).name == "caf\\xe91.txt#0"


# --- one document a window -------------------------------------------------------------------------

def test_one_document_a_window():
    "Each window starts with its document or goes on with it; every token of every document is there once."
    tok = load_tokenizer()
    docs = [Document(f"d{i}", story(i, 5 + 17 * (i % 4))) for i in range(12)]
    found = [(w.ids[i], w.keep[i], w.spans[i]) for w in windows(docs, tok, 32, 5, one_document=True) for i in range(len(w))]
    own = {d.name: tok(d.text, add_special_tokens=False)["input_ids"] for d in docs}
    seen = {d.name: [] for d in docs}
    for ids, keep, spans in found:
        (s,) = spans
        assert s.start == 1 and s.token % 31 == 0 and keep.tolist() == [s.start <= t < s.stop for t in range(32)]
        seen[s.doc] += ids[keep].tolist()
    assert seen == own
    joined = [w.spans for w in windows(docs, tok, 32, 5)]
    assert any(len({s.doc for s in spans}) > 1 for b in joined for spans in b)


def test_a_text_of_one_document_a_window(tmp_path):
    rows = [story(i, 20) for i in range(30)]
    plain, alone = load_text(rows), load_text(rows, one_document=True)
    tok = load_tokenizer()
    assert all(len(spans) == 1 for w in windows(alone.documents(), tok, 64) for spans in w.spans)
    assert any(len(spans) > 1 for w in windows(plain.documents(), tok, 64) for spans in w.spans)
    assert plain.fingerprint != alone.fingerprint and [d.text for d in plain.read()] == [d.text for d in alone.read()]


@pytest.mark.parametrize("wrong", [dict(context=1), dict(context=0), dict(batch=0)])
def test_windows_of_nothing_get_a_sentence(wrong):
    with pytest.raises(UserError, match="needs at least"): next(windows([Document("a", "b")], load_tokenizer(), **wrong))


# --- fingerprint -----------------------------------------------------------------------------------

def test_the_fingerprint_is_of_what_the_text_says(tmp_path):
    contents = {f"f{i}.txt": story(i) for i in range(12)}
    one, moved = load_text(files(tmp_path / "a", contents)), load_text(files(tmp_path / "b", contents))
    assert one.fingerprint == moved.fingerprint
    (tmp_path / "b" / "f7.txt").write_text(contents["f7.txt"].replace("a", "b", 1))
    assert load_text(tmp_path / "b").fingerprint != one.fingerprint
    turned = Text("t", one.read, lambda i, d: not d.held)
    assert turned.fingerprint != one.fingerprint
