"Rows for training: what is left out, how they are mixed, what a store says it was made from."
import json, math, os, shutil, subprocess, sys, warnings
from collections import Counter
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from said import sentence

import sae_nb.acts
from sae_nb.acts import NORMALISE, Block, Store, Stream, batches, norm_limit, normalise, read_rows, write_store
from sae_nb.lm import LM, load_lm
from sae_nb.text import Document, Text, load_text, windows

SITE, CONTEXT = "resid_post.1", 32


@pytest.fixture(scope="module")
def lm(): return load_lm("pylib-64", "cpu", "float32")


@pytest.fixture(scope="module")
def text():
    "Some documents of the library, every tenth held out."
    docs = [Document(d.name, d.text[:1_500]) for d in islice(load_text("pylib").documents(), 60)]
    return Text("some", lambda: iter(docs), lambda i, d: i % 10 == 9)


@pytest.fixture
def stream(lm, text): return Stream(lm, text, SITE, CONTEXT, 1_000, mix=64)


def ids_of(windows): return [tuple(r.tolist()) for w in windows for r in w.ids]


def passes(stream, count=1):
    "The windows of so many passes over its side of the text."
    own = sum(len(w) for w in windows(stream.text.documents(stream.held_out), stream.lm.tokenizer, stream.context, 64))
    found = []
    for w in stream.windows():
        found += ids_of([w])
        if len(found) >= count * own: return found


# --- mixing ----------------------------------------------------------------------------------------

def numbered(*sizes): return (Block(n, lambda i=i, n=n: torch.stack([torch.full((n,), i * 1.), torch.arange(n) * 1.], 1)) for i, n in enumerate(sizes))


def test_every_row_of_a_block_is_dealt_once_and_out_of_order():
    dealt = torch.cat(list(batches(numbered(60, 60), 10, seed=3)))
    for i, rows in enumerate(dealt.split(60)):
        assert (rows[:, 0] == i).all() and rows[:, 1].sort().values.tolist() == list(range(60))
        assert rows[:, 1].tolist() != list(range(60))
        steps = rows[1:, 1] - rows[:-1, 1]
        assert (steps == 1).float().mean() < .2
    assert dealt[:60, 1].tolist() != dealt[60:, 1].tolist()


def test_the_seed_and_only_the_seed_changes_the_shuffle():
    order = lambda seed: torch.cat(list(batches(numbered(60), 10, seed)))[:, 1].tolist()
    torch.manual_seed(1)
    first = order(0)
    torch.manual_seed(2)
    assert order(0) == first and len({tuple(order(s)) for s in range(5)}) == 5


def test_skipped_batches_are_those_that_would_have_come():
    whole = list(batches(numbered(60, 35, 60), 10, seed=1))
    for skip in (0, 1, 5, 6, 8, 9, 12):
        rest = list(batches(numbered(60, 35, 60), 10, seed=1, skip=skip))
        assert len(rest) == len(whole) - skip and all(torch.equal(a, b) for a, b in zip(rest, whole[skip:]))


def test_windows_of_all_over_the_text_are_mixed(stream):
    "A pass gives each window of the training side once, in another order than they stand in."
    plain, mixed = ids_of(windows(stream.text.documents(), stream.lm.tokenizer, CONTEXT, 64)), passes(stream)
    assert Counter(plain) == Counter(mixed)
    follow = set(zip(plain, plain[1:]))
    assert sum(pair in follow for pair in zip(mixed, mixed[1:])) < .1 * len(plain)
    wider = passes(replace(stream, mix=10**6))
    place = {w: i for i, w in enumerate(plain)}
    far = lambda found: sum(abs(place[w] - i) for i, w in enumerate(found)) / len(found)
    assert far(wider) > 3 * far(mixed) > 0


def test_held_out_rows_are_not_those_that_are_trained_on(stream):
    "A planted difference between the sides is seen: the held-out side has its own words."
    docs = [Document(f"d{i}", ("held " if i % 10 == 9 else "train ") * 60) for i in range(40)]
    text = Text("planted", lambda: iter(docs), lambda i, d: i % 10 == 9)
    for side, word, other in ((False, "train", "held"), (True, "held", "train")):
        s = replace(stream, text=text, held_out=side)
        words = {s.lm.tokenizer.decode(ids) for ids in passes(s)}
        assert words and all(word in w and other not in w for w in words)


def test_rows_are_those_of_the_windows(stream):
    "A block holds what the model gives for its windows, one row for each token that is no special one."
    block = next(stream.blocks())
    rows, expected = block.read(), []
    for w in stream.windows():
        expected.append(read_rows(stream.lm, w, SITE))
        if sum(map(len, expected)) >= 1_000: break
    torch.testing.assert_close(rows, torch.cat(expected))
    assert block.rows == len(rows)


# --- rows far outside ------------------------------------------------------------------------------

class Parked(LM):
    "A model that makes rows at some places of every window very long."
    places, factor = (0, 17), 40.
    def read(self, ids, site):
        x = super().read(ids, site)
        x[:, [p for p in self.places if p < x.shape[1]]] *= self.factor
        return x


@pytest.fixture
def parked(lm):
    "As many models that were asked without an opening token: the first position is text."
    tokenizer = SimpleNamespace(bos_token_id=None, cls_token_id=None, sep_token_id=None, eos_token_id=lm.tokenizer.eos_token_id)
    class Bare:
        def __getattr__(self, name): return getattr(tokenizer, name, None) if name in vars(tokenizer) else getattr(lm.tokenizer, name)
        def __call__(self, *a, **k): return lm.tokenizer(*a, **k)
    return Parked(lm.model, Bare(), "parked")


def test_rows_far_outside_are_left_out_counted_and_told(stream, parked):
    s = replace(stream, lm=parked)
    with pytest.warns(UserWarning, match=r"of the first \d,\d+ rows have a norm above .*left out"): rows = next(s.blocks()).read()
    raw = next(replace(s, limit=math.inf).blocks()).read()
    norms, limit = raw.norm(dim=-1), norm_limit(parked, s.text, SITE, CONTEXT)
    far = norms > limit
    assert 2 / 40 < far.float().mean() < 2 / 30 and norms[far].min() > 2 * limit > 4 * norms[~far].max()
    assert s.outside == {0: int(far.sum())} and rows.norm(dim=-1).max() < limit
    assert torch.equal(rows[~far], raw[~far])
    known = {tuple(r.tolist()) for r in raw[~far]}
    taken = [tuple(r.tolist()) for r in rows[far]]
    assert all(t in known for t in taken) and len(set(taken)) > .8 * len(taken)
    assert torch.equal(next(replace(s).blocks()).read(), rows)


def test_nothing_is_left_out_of_usual_rows(stream):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = next(stream.blocks()).read()
    assert stream.outside == {0: 0} and torch.equal(rows, next(replace(stream, limit=math.inf).blocks()).read())


def test_the_measure_uses_the_same_limit(stream, parked):
    from sae_nb.sampling import norm_limit as measured
    assert measured(parked, stream.text, SITE, CONTEXT) == norm_limit(parked, stream.text, SITE, CONTEXT) < math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_that_are_no_numbers_get_a_sentence(stream, lm, value):
    class Broken(LM):
        def read(self, ids, site):
            x = super().read(ids, site)
            x[-1, -1, 0] = value
            return x
    sentence(lambda: next(replace(stream, lm=Broken(lm.model, lm.tokenizer, "broken")).blocks()).read(), "NaN or infinity", "broken", "float32")
    sentence(lambda: next(batches(iter([Block(4, lambda: torch.full((4, 2), value))]), 2)), "block 0", "NaN or infinity")


# --- warnings --------------------------------------------------------------------------------------

def told(f):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        f()
    return [str(w.message) for w in found]


def test_a_text_that_is_read_again_is_told_once_with_its_size(stream):
    own = sum(int(w.keep.sum()) for w in windows(stream.text.documents(), stream.lm.tokenizer, CONTEXT, 64))
    assert not told(lambda: passes(stream))
    (sentence,) = told(lambda: passes(stream, 3))
    assert f"{own:,} tokens" in sentence and "read again" in sentence


def test_short_documents_cut_in_the_middle_are_told(stream, text):
    docs = [Document(d.name, d.text[:150]) for d in text.read()]
    short = Text("short", lambda: iter(docs), text.rule)
    (sentence,) = told(lambda: passes(replace(stream, text=short)))
    assert "one_document=True" in sentence and "start in the middle" in sentence
    assert not told(lambda: passes(replace(stream, text=replace(short, one_document=True))))


# --- stores ----------------------------------------------------------------------------------------

@pytest.fixture
def stored(stream, tmp_path): return write_store(tmp_path / "store", stream, 2_500)


def contents(folder): return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_a_store_of_a_rewritten_text_is_refused(tmp_path, lm):
    "Also where the text has the same name, and even the same length."
    path = tmp_path / "t.txt"
    path.write_text("".join(f"line {i} of {i * i % 97} tells {i * 31 % 89}\n" for i in range(2_000)))
    make = lambda: Stream(lm, load_text(path), SITE, CONTEXT, 1_000)
    write_store(tmp_path / "store", make(), 1_500)
    before = contents(tmp_path / "store")
    path.write_text(path.read_text().replace("line 7 of", "Line 7 of"))
    sentence(lambda: write_store(tmp_path / "store", make(), 1_500), "text digest", "choose another folder")
    sentence(lambda: write_store(tmp_path / "store", make(), 1_500, origin=Store.open(tmp_path / "store").origin), "text digest")
    assert contents(tmp_path / "store") == before


@pytest.mark.parametrize("other", [dict(context=16), dict(site="resid_post.2"), dict(block_rows=900), dict(mix=32), dict(held_out=True), dict(limit=math.inf)])
def test_a_store_of_other_settings_is_refused(stored, stream, other):
    sentence(lambda: write_store(stored.folder, replace(stream, **other), 2_500), "other activations")
    sentence(lambda: write_store(stored.folder, replace(stream, **other), 2_500, origin=dict(name="mine")), "other activations")


def test_a_store_of_other_weights_is_refused(stored, stream, lm):
    import copy
    model = copy.deepcopy(lm.model)
    with torch.no_grad(): next(model.parameters())[5, 5] += 1
    sentence(lambda: write_store(stored.folder, replace(stream, lm=LM(model, lm.tokenizer, lm.name)), 2_500), "lm digest")


def test_a_renamed_text_and_model_are_the_same(stored, stream, lm, monkeypatch):
    same = replace(stream, lm=LM(lm.model, lm.tokenizer, lm.name), text=replace(stream.text))
    monkeypatch.setattr(sae_nb.acts, "read_rows", None)
    assert write_store(stored.folder, same, 2_500).shards == stored.shards


def test_shards_are_known_by_digest_kind_and_shape(stored):
    from safetensors.torch import load_file, save_file
    path, rows = stored.folder / "shard-00001.safetensors", stored.read(1)
    half = rows.flatten().view(torch.int32).view(rows.shape)
    for other in (rows[:, [1, 0, *range(2, rows.shape[1])]].contiguous(), rows.flip(0), rows.reshape(-1, rows.shape[1] * 2) if len(rows) % 2 == 0 else rows[:, :-1].contiguous(),
                  half, rows + 0 * rows + 1e-3):
        save_file({"rows": other}, path)
        sentence(lambda: stored.read(1), "shard-00001", "damaged")
    save_file({"rows": rows}, path)
    assert torch.equal(stored.read(1), rows)
    sentence(lambda: stored.read(7), "shard 7")


DAMAGED = {"not a list": lambda m: m | dict(shards={}), "no digest": lambda m: m | dict(shards=[{"file": "shard-00000.safetensors", "rows": 3}]),
           "another folder": lambda m: m | dict(shards=[m["shards"][0] | dict(file="../shard-00000.safetensors")]),
           "rows as text": lambda m: m | dict(shards=[m["shards"][0] | dict(rows="3")]), "no origin": lambda m: {"shards": []}, "origin a list": lambda m: m | dict(origin=[]),
           "null": lambda m: m | dict(shards=[None]), "older": lambda m: m | dict(shards=[dict(file="shard-00000.safetensors", rows=1, crc32=4)])}

@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_list_is_sentence(stored, stream, how):
    path = stored.folder / "store.json"
    path.write_text(json.dumps(DAMAGED[how](json.loads(path.read_text()))))
    sentence(lambda: Store.open(stored.folder), "store.json")
    before = contents(stored.folder)
    sentence(lambda: write_store(stored.folder, stream, 2_500), "store.json")
    assert contents(stored.folder) == before


def test_a_folder_of_others_loses_nothing(stream, tmp_path):
    "Neither a file nor what looks like a leftover of ours."
    for name in ("shard-00000.safetensors", "notes.txt", ".x.999999999.sae_nb-tmp"): (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    sentence(lambda: write_store(tmp_path, stream, 100), "holds other files", "notes.txt")
    assert contents(tmp_path) == before
    sentence(lambda: write_store(tmp_path / "notes.txt", stream, 100), "is a file")


def test_leftovers_of_killed_writes_are_cleared(stored, stream):
    left = stored.folder / ".shard-00003.safetensors.999999999.sae_nb-tmp"
    left.write_text("half")
    write_store(stored.folder, stream, 2_500)
    assert not left.exists()


def test_a_store_that_is_being_written_is_not_written_by_another(stored, stream):
    from sae_nb.core import lock
    with lock(stored.folder): sentence(lambda: write_store(stored.folder, stream, 2_500), "in use by another process")


def test_a_full_disk_is_told_beforehand_and_on_the_way(stored, stream, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda p: SimpleNamespace(free=10_000))
    sentence(lambda: write_store(tmp_path / "new", stream, 2_500), "disk")
    assert not list((tmp_path / "new").glob("shard-*"))
    assert write_store(stored.folder, stream, 2_500).shards == stored.shards   # it is all there
    monkeypatch.undo()
    monkeypatch.setattr("safetensors.torch.save_file", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    sentence(lambda: write_store(tmp_path / "new", stream, 2_500), "No space left", "free some room")
    monkeypatch.undo()
    assert write_store(tmp_path / "new", stream, 2_500).shards == stored.shards


def test_blocks_too_large_for_memory_are_told(stream, tmp_path):
    sentence(lambda: write_store(tmp_path / "new", replace(stream, block_rows=10**12), 10), "memory")


# --- borders ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong, said", [(dict(block_rows=0), "block_rows"), (dict(mix=0), "mix"), (dict(forward=0), "forward"), (dict(limit=0.), "limit"), (dict(limit=math.nan), "limit")])
def test_settings_of_a_stream(stream, wrong, said): sentence(lambda: replace(stream, **wrong), said)


@pytest.mark.parametrize("block, batch, skip, said", [(Block(4, lambda: torch.zeros(3, 2)), 2, 0, "block 0"), (Block(4, lambda: torch.zeros(4)), 2, 0, "block 0"),
                                                      (Block(4, lambda: torch.zeros(4, 2)), 5, 0, "batch is 5"), (Block(4, lambda: torch.zeros(4, 2)), 0, 0, "batch is 0"),
                                                      (Block(4, lambda: torch.zeros(4, 2)), 2, -1, "skip is -1"), (Block(4, lambda: None), 2, 0, "block 0")])
def test_blocks_that_do_not_fit(block, batch, skip, said): sentence(lambda: next(batches(iter([block]), batch, skip=skip)), said)


def test_rows_of_every_size_are_normalised_and_restored():
    g = torch.Generator().manual_seed(0)
    for scale in (1e-30, 1e-19, 1., 1e19, 1e30, 1e38):
        rows = torch.rand(8, 64, generator=g) * scale
        for how in NORMALISE:
            n = normalise(rows, how)
            assert n.rows.isfinite().all(), (how, scale)
            torch.testing.assert_close(n.restore(n.rows), rows, rtol=1e-4, atol=1e-6 * scale)
        torch.testing.assert_close(normalise(rows, "unit_norm").rows.norm(dim=-1), torch.ones(8))
    sentence(lambda: normalise(torch.ones(3, 4).long(), "none"), "rows are torch.int64")
    sentence(lambda: normalise(torch.ones(3, 4), "else"), "choose one of")
