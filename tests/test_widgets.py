"Tokens, card and explorer as Python objects: what they promise without a browser."
import json
from dataclasses import replace
import xml.etree.ElementTree as tree

import numpy as np
import pytest
from payloads import made

from sae_nb.core import UserError
from sae_nb.features import Feature, Payload
from sae_nb.widgets.card import Card
from sae_nb.widgets.explorer import Explorer, striking
from sae_nb.widgets.export import SCRIPT, export_page, serve_command
from sae_nb.widgets.tokens import Tokens


@pytest.fixture
def own(tmp_path): return made(tmp_path / "features", n=80)


def test_choices_are_plain_values(own):
    "What Python sets is what Python reads; a double pin counts once, an empty note is none."
    e = Explorer(own)
    e.selected, e.pinned, e.lasso, e.notes = 5, [3, 3, 8], [1, 2], {5: "a <b> note", 6: "  "}
    assert (e.selected, e.pinned, e.lasso, e.notes) == (5, [3, 8], [1, 2], {5: "a <b> note"})
    e.selected = None
    assert e.selected is None


@pytest.mark.parametrize("name, value", [("selected", 80), ("selected", -1), ("pinned", [3, 80]), ("lasso", [99]), ("notes", {80: "no"})])
def test_unknown_latents_are_refused_in_a_sentence(own, name, value):
    with pytest.raises(UserError, match="0 to 79"): setattr(Explorer(own), name, value)


def test_notes_are_kept_and_shared(own):
    "Notes survive the explorer; two explorers of one folder each write what they changed."
    one, other = Explorer(own), Explorer(own.folder)
    one.notes = {1: "one", 2: "two"}
    other.notes = {3: "trois\n日本"}
    one.notes = {1: "one, again"}
    assert Explorer(own).notes == {1: "one, again", 3: "trois\n日本"}
    assert json.loads((own.folder / "notes.json").read_text(encoding="utf-8")) == {"1": "one, again", "3": "trois\n日本"}
    assert not [p for p in own.folder.iterdir() if p.name.endswith("tmp")]


@pytest.mark.parametrize("text", ['{"1": "cut', '{"1": 5}', '{"x": "y"}', "[1]"])
def test_damaged_notes_are_an_error_and_left_alone(own, text):
    (own.folder / "notes.json").write_text(text)
    with pytest.raises(UserError, match="notes.json"): Explorer(own)
    assert (own.folder / "notes.json").read_text() == text


def test_notes_damaged_meanwhile_are_told_in_the_page(own):
    e = Explorer(own)
    (own.folder / "notes.json").write_text("{")
    e.notes = {1: "one"}
    assert "not saved" in e.problem and (own.folder / "notes.json").read_text() == "{"
    (own.folder / "notes.json").unlink()
    e.notes = {1: "one", 2: "two"}
    assert e.problem == "" and Explorer(own).notes[2] == "two"


def need(library): return pytest.importorskip(library)


LIBRARIES = dict(list=list, tuple=tuple, numpy=np.array, torch=lambda x: need("torch").tensor(x),
                 pandas=lambda x: need("pandas").Series(x, index=range(7, 7 + len(x))), polars=lambda x: need("polars").Series(x))
of_every_library = pytest.mark.parametrize("of", LIBRARIES.values(), ids=LIBRARIES)


def first(x): return x.iloc[0] if hasattr(x, "iloc") else x[0]


def is_plain(x): return json.loads(json.dumps(x)) == x


@of_every_library
def test_numbers_of_every_library_are_taken(own, of):
    "A scalar, and a list of them, of numpy, torch, pandas and polars, wherever a widget takes numbers; what is kept is plain."
    texts = ["a", "b", "c"] if of is LIBRARIES["torch"] else of(["a", "b", "c"])
    t = Tokens(texts, of([1., 0., .5]), pick=first(of([2])), scale=first(of([2.5])))
    assert (t.tokens, t.values, t.picked, t.scale) == (["a", "b", "c"], [1., 0., .5], 2, 2.5)
    t.picked, t.scale, t.values = first(of([1])), first(of([4])), of([0, 3, 2])
    assert (t.picked, t.scale, t.values) == (1, 4, [0, 3, 2])
    e = Explorer(own)
    e.selected, e.pinned, e.lasso, e.notes = first(of([5])), of([3, 3, 8]), of([1, 2]), {first(of([7])): "seven"}
    assert (e.selected, e.pinned, e.lasso, e.notes) == (5, [3, 8], [1, 2], {7: "seven"})
    e.live = lambda text: dict(tokens=["a", "b"], latents=[of([1, 4]), of([2])], values=[of([2., .5]), of([1.])])
    e.text = "a b"
    assert e.answer == dict(text="a b", tokens=["a", "b"], latents=[[1, 4], [2]], values=[[2., .5], [1.]])
    f = own.feature(4)
    c = Card(replace(f, hist=of(f.hist), density=first(of([f.density])), max=first(of([f.max])), bin=first(of([f.bin]))))
    assert c.record["hist"] == f.hist and c.bin == f.bin and c.snapshot()
    c.selected = first(of([6]))
    for widget, names in ((t, ["tokens", "values", "picked", "scale"]), (e, ["selected", "pinned", "lasso", "answer"]), (c, ["selected"])):
        assert is_plain(widget.get_state(names))


@pytest.mark.parametrize("name, value, words", [
    ("selected", 3.5, "whole number"), ("selected", "3", "whole number"), ("pinned", 3, "give a list"),
    ("pinned", np.array([2.5]), "whole number"), ("lasso", np.int64(3), "give a list")])
def test_what_is_no_latent_is_refused_in_a_sentence(own, name, value, words):
    with pytest.raises(UserError, match=words): setattr(Explorer(own), name, value)


def test_numbers_that_no_page_can_show_are_refused():
    "JSON has no NaN and no infinity: one of them would leave the whole page blank."
    t = Tokens(["a", "b"], [1., 0.])
    nan, inf = np.float32("nan"), float("inf")
    wrong = [("scale", nan), ("scale", inf), ("scale", -1), ("values", [1., nan]), ("picked", np.float64(.5))]
    for name, value in wrong:
        with pytest.raises(UserError, match=f"{name if name != 'values' else 'item'} is"): setattr(t, name, value)
    assert (t.values, t.scale, t.picked) == ([1., 0.], None, None)
    assert Tokens(["a", "b"], [1., float("nan")]).values == [1., 0.]   # zero: it has no colour


def asked(e, **message):
    "What the kernel answers to a message of the page."
    said = []
    e.send = lambda content, buffers=None: said.append((content, buffers))
    e._asked(e, message, [])
    return said[0]


def test_messages_are_answered(own):
    e = Explorer(own, effect_of=lambda latent: own.feature(latent).top)
    assert asked(e, type="shard", key=1)[0]["shard"] == own.shard(1)
    content, (code,) = asked(e, type="plotly")
    assert b"plotly" in code[:200] and content["type"] == "plotly"
    assert asked(e, type="effect", key=4)[0]["record"]["top"][0]["effect"]
    for wrong in (dict(type="shard", key=99), dict(type="effect", key=1000), dict(type="nonsense", key=None)): assert asked(e, **wrong)[0]["error"]


def test_a_lost_shard_is_told(own):
    (own.folder / "shards" / "00001.json").unlink()
    assert "00001.json" in asked(Explorer(own), type="shard", key=1)[0]["error"]


def test_live_text_answers_or_says_why_not(own):
    e = Explorer(own, lambda text: dict(tokens=[text], latents=[[1]], values=[[2.]]))
    e.text = "one"
    assert e.answer == dict(text="one", tokens=["one"], latents=[[1]], values=[[2.]])
    e.live = lambda text: dict(tokens=["a", "b"], latents=[[1]], values=[[2.]])
    e.text = "two"
    assert "as many of each" in e.answer["error"] and e.answer["text"] == "two"
    wrong = [([1, 2], [2.], "as many of each"), ([80], [2.], "0 to 79"), ([1], [float("nan")], "finite")]
    for i, (latents, values, words) in enumerate(wrong):
        e.live = lambda text: dict(tokens=["a"], latents=[latents], values=[values])
        e.text = f"wrong {i}"
        assert words in e.answer["error"]
    silent = Explorer(own)
    silent.text = "three"
    assert silent.answer == {} and "live=" in silent.head["no_model"]


def test_the_first_latent_has_the_largest_effect_else_is_peaked():
    about = dict(rows=1_000)
    effects = [Feature(i, .01, kurtosis=5. + i, effect=e) for i, e in enumerate([.1, .9, None])]
    peaked = [Feature(0, .01, kurtosis=5.), Feature(1, 1e-6, kurtosis=1e6), Feature(2, .02, kurtosis=50.)]
    for features, first in ((effects, 1), (peaked, 2), ([Feature(0, 1e-6, kurtosis=3.)], 0), ([Feature(0), Feature(1)], None), ([], None)):
        assert striking(Payload.in_memory(about, features)) == first


def test_snapshots_are_the_same_at_every_run_and_escape_texts(own):
    for make in (lambda: Explorer(own.folder), lambda: Card(own.feature(4)), lambda: Card(own.feature(3)), lambda: Tokens(["<b>", "\n"], [1, -1])):
        bundle, again = make()._repr_mimebundle_()[0], make()._repr_mimebundle_()[0]
        assert bundle["image/svg+xml"] == again["image/svg+xml"] and bundle["text/plain"] == again["text/plain"]
        assert "<b>" not in bundle["image/svg+xml"] and "<script" not in bundle["image/svg+xml"] and len(bundle["image/svg+xml"]) < 120_000
        tree.fromstring(bundle["image/svg+xml"])


def test_a_card_shows_features_only():
    with pytest.raises(UserError, match="payload.feature"): Card({"id": 3})
    assert "never fires" in Card(Feature(3)).snapshot()


def test_export_paths(own, tmp_path):
    "A folder with something else is left alone; a second export of the same name replaces the first."
    (tmp_path / "full").mkdir(); (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="mine.txt but no page of ours"): export_page(own, tmp_path / "full")
    with pytest.raises(UserError, match="is a folder"): (tmp_path / "x.html").mkdir(); export_page(own, tmp_path / "x.html")
    with pytest.raises(UserError, match="does not end"): export_page(own, tmp_path / "full" / "mine.txt")
    first = export_page(own, tmp_path / "out")
    stale = tmp_path / "out" / "shards" / "00009.js"
    stale.write_text(SCRIPT + "old")
    assert export_page(own, tmp_path / "out") == first and not stale.exists()
    with pytest.raises(UserError, match="index.json"): export_page(tmp_path / "full", tmp_path / "y.html")
    with pytest.raises(UserError, match="voila or lab"): serve_command("a.ipynb", 1, "cloud")
