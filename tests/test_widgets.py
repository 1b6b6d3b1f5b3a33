"Tokens, card and explorer as Python objects: what they promise without a browser."
import json
import xml.etree.ElementTree as tree

import pytest
from payloads import made

from sae_nb.core import UserError
from sae_nb.features import Feature, Payload
from sae_nb.widgets.card import Card
from sae_nb.widgets.explorer import Explorer, striking
from sae_nb.widgets.export import export_page, serve_command
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
    with pytest.raises(UserError, match="something else"): export_page(own, tmp_path / "full")
    with pytest.raises(UserError, match="is a folder"): (tmp_path / "x.html").mkdir(); export_page(own, tmp_path / "x.html")
    with pytest.raises(UserError, match="does not end"): export_page(own, tmp_path / "full" / "mine.txt")
    first = export_page(own, tmp_path / "out")
    stale = tmp_path / "out" / "shards" / "00009.js"
    stale.write_text("old")
    assert export_page(own, tmp_path / "out") == first and not stale.exists()
    with pytest.raises(UserError, match="index.json"): export_page(tmp_path / "full", tmp_path / "y.html")
    with pytest.raises(UserError, match="voila or lab"): serve_command("a.ipynb", 1, "cloud")
