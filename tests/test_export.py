"Pages of the explorer on a disk: nothing of the user's is lost, a killed export is repeated, and what is written is inert."
import json, math, os, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from payloads import about, feature

from sae_nb import core
from sae_nb.cli import main
from sae_nb.core import UserError, lock, read_json
from sae_nb.features import Context, Feature, Payload, write_payload
from sae_nb.page import inert, page
from sae_nb.show import Picture
from sae_nb.widgets import export
from sae_nb.widgets.explorer import read_notes, state, write_notes
from sae_nb.widgets.export import PAGE, SCRIPT, check_place, explore_notebook, export_page


@pytest.fixture
def own(): return Payload.in_memory(about(4), map(feature, range(10)))   # three shards


@pytest.fixture
def other(): return Payload.in_memory(about(4), map(feature, range(20)))   # five shards


def tree(folder):
    "Everything in a folder but its lock: contents, and where links lead."
    found = [p for p in sorted(Path(folder).rglob("*")) if p.name != ".lock"]
    return {p.relative_to(folder).as_posix(): os.readlink(p) if p.is_symlink() else p.is_file() and p.read_bytes() for p in found}


def refused(payload, path, says, whole):
    "The export is refused in one sentence, and nothing in `whole` has changed."
    before = tree(whole), sorted(whole.rglob(".lock"))
    with pytest.raises(UserError, match=says) as e: export_page(payload, path)
    assert "\n" not in str(e.value) and (tree(whole), sorted(whole.rglob(".lock"))) == before


# --- what is not ours ---------------------------------------------------------------------------------------------------

FOREIGN = ["index.html", "plotly.js", "shards", "shards/photo.jpg", "shards/00000.js", "shards/00001.json", "shards/more/00000.js", "shards/.00000.js.9.tmp"]


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_left_alone(own, tmp_path, name, ours):
    "In a folder of the user's, and in one of ours: told before a byte has changed."
    site = tmp_path / "site"
    if ours: export_page(own, site)
    if name == "shards" and ours:
        for p in (site / "shards").iterdir(): p.unlink()
        (site / "shards").rmdir()
    (site / name).parent.mkdir(parents=True, exist_ok=True)
    (site / name).write_text("mine, and not sae_nb explorer's")
    refused(own, site, "not ours|no page of ours|is a file", tmp_path)


@pytest.mark.parametrize("name", ["paper.tex", "index.htm", ".git", "run/config.json", "features.sae_nb"])
def test_a_folder_of_other_files_is_no_place_but_a_page_of_ours_may_have_company(own, other, tmp_path, name):
    site = tmp_path / "site"
    (site / name).parent.mkdir(parents=True)
    (site / name).write_text("mine")
    refused(own, site, "no page of ours", tmp_path)
    (site / name).rename(tmp_path / "kept")
    if (site / "run").exists(): (site / "run").rmdir()
    export_page(own, site)
    (site / name).parent.mkdir(exist_ok=True)
    (tmp_path / "kept").rename(site / name)
    export_page(other, site)
    assert (site / name).read_text() == "mine" and len(list((site / "shards").iterdir())) == 5


@pytest.mark.parametrize("name", ["index.html", "plotly.js", "shards", "shards/00001.js"])
def test_a_link_is_not_followed(own, tmp_path, name):
    "Not even to files that are ours, for they belong to another page."
    first, site = tmp_path / "first", tmp_path / "site"
    export_page(own, first); export_page(own, site)
    (site / name).rename(tmp_path / "away")
    (site / name).symlink_to(first / name)
    refused(own, site, "not ours|is a link", tmp_path)
    for p in ((site / name), (tmp_path / "dangling")):
        if p.is_symlink(): p.unlink()
        p.symlink_to(tmp_path / "nowhere")
    refused(own, site, "not ours|is a link", tmp_path)
    refused(own, tmp_path / "dangling", "leads nowhere", tmp_path)


def test_a_link_to_a_folder_is_that_folder(own, other, tmp_path):
    (tmp_path / "site").symlink_to(tmp_path / "real")
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / ".index.html.999999999.sae_nb-tmp").touch()
    export_page(other, tmp_path / "site"); export_page(own, tmp_path / "site")
    export_page(own, tmp_path / "plain")
    assert tree(tmp_path / "real") == tree(tmp_path / "plain") and (tmp_path / "site").is_symlink()
    (tmp_path / "real" / "index.html").write_text("mine")
    refused(own, tmp_path / "site", "not ours", tmp_path)


@pytest.mark.parametrize("text", ["<p>mine", "", PAGE[:-1], PAGE.replace("sae_nb", "my"), SCRIPT, "\ufeff" + PAGE, page("a report of ours, and no explorer", [])])
def test_a_foreign_page_is_left_alone(own, tmp_path, text):
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    refused(own, tmp_path / "page.html", "no page of ours", tmp_path)


def test_a_page_that_is_a_link_is_left_alone(own, tmp_path):
    export_page(own, tmp_path / "real.html")
    (tmp_path / "page.html").symlink_to(tmp_path / "real.html")
    refused(own, tmp_path / "page.html", "is a link", tmp_path)


def test_notes_clear_away_what_a_killed_explorer_was_writing(tmp_path):
    (tmp_path / ".notes.json.999999999.sae_nb-tmp").write_text("half")
    write_notes(tmp_path, {1: "one"})
    assert [p.name for p in tmp_path.iterdir()] == ["notes.json"]


@pytest.mark.parametrize("place", ["~/site", "~/page.html"])
def test_a_home_is_understood(own, other, tmp_path, monkeypatch, place):
    "`~` is looked at as the place that is written to."
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir(); here.mkdir()
    monkeypatch.setenv("HOME", str(home)); monkeypatch.chdir(here)
    export_page(other, place)
    made = export_page(own, place)
    assert made.is_relative_to(home) and made.is_file() and not list(here.iterdir())
    made.write_text("mine")
    refused(own, place, "not ours|no page of ours", tmp_path)
    with pytest.raises(UserError, match="not ours|no page of ours"): check_place(place)
    explore_notebook("~", "1")
    write_notes("~", {1: "one"})
    assert read_notes("~") == {1: "one"} and (home / "explorer.ipynb").exists() and not list(here.iterdir())


def test_the_command_looks_at_the_place_before_it_collects(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sae_nb.explore.features_of", lambda *_, **__: pytest.fail("features are collected first"))
    (tmp_path / "index.html").write_text("mine")
    for place in (tmp_path, tmp_path / "index.html"):
        assert main(["export", str(tmp_path / "run"), "--out", str(place)]) == 2
        said = capsys.readouterr().err
        assert "ours: move it away" in said and said.count("\n") == 1 and (tmp_path / "index.html").read_text() == "mine"


# --- one after another, and killed --------------------------------------------------------------------------------------

@pytest.mark.parametrize("place", ["site", "page.html"])
def test_a_page_is_replaced_by_the_next(own, other, tmp_path, place):
    "Wholly: no shard of the first stays."
    export_page(other, tmp_path / "a" / place); export_page(own, tmp_path / "a" / place)
    export_page(own, tmp_path / "b" / place)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    for name, text in tree(tmp_path / "a").items(): assert text is False or text.startswith(PAGE.encode() if name.endswith("html") else SCRIPT.encode())


def test_one_export_at_a_time(own, tmp_path):
    export_page(own, tmp_path / "site")
    before = tree(tmp_path)
    with lock(tmp_path / "site"), pytest.raises(UserError, match="in use by another process"): export_page(own, tmp_path / "site")
    assert tree(tmp_path) == before


class Full(Exception): pass


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("place", ["site", "page.html"])
def test_an_export_that_fails_at_any_write_is_repeated(own, other, tmp_path, monkeypatch, place, old):
    "The next one ends with the same bytes; until all shards are written, the old page is whole."
    export_page(own, tmp_path / "wanted" / place)
    wanted, real, before = tree(tmp_path / "wanted"), export.write_atomic, {}
    if old:
        export_page(other, tmp_path / "old" / place)
        before = tree(tmp_path / "old")
    for at in range(1, 7):
        folder, calls = tmp_path / str(at), []
        def failing(path, content):
            calls.append(path.name)
            if len(calls) == at: raise Full
            real(path, content)
        if old: export_page(other, folder / place)
        monkeypatch.setattr(export, "write_atomic", failing)
        try: export_page(own, folder / place)
        except Full: assert at > 3 or tree(folder) == before or not old
        monkeypatch.setattr(export, "write_atomic", real)
        assert not list(folder.rglob("*-tmp"))
        export_page(own, folder / place)
        assert tree(folder) == wanted
        if len(calls) < at: break
    assert calls == (["page.html"] if place == "page.html" else ["00000.js", "00001.js", "00002.js", "plotly.js", "index.html"])


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import plotly.offline
from payloads import about, feature
from sae_nb.features import Payload
from sae_nb.widgets.export import export_page
from test_export import tree

root, place = Path(sys.argv[1]), sys.argv[2]
plotly.offline.get_plotlyjs = lambda: "plotly"   # five megabytes less in each of some hundred files
many, few = (Payload.in_memory(about(4), map(feature, range(n))) for n in (12, 6))

def kill_at(at):
    "Die at the operation number `at` on a file of `root`."
    seen = [0]
    def hook(event, args):
        if event in ("open", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod") and str(args[0]).startswith(str(root)):
            seen[0] += 1
            if seen[0] == at: os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

def killed(folder, at):
    "Export in a process of its own that dies; False when it ended before."
    if (pid := os.fork()) == 0:
        kill_at(at)
        export_page(few, folder / place)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])

export_page(few, root / "wanted" / place)
export_page(many, root / "before" / place)
for start in ({}, tree(root / "before")):
    at, alive = 0, False
    wanted = tree(root / "wanted")
    while not alive:
        at += 1
        folder = root / str(bool(start)) / str(at)
        if start:
            shutil.copytree(root / "before", folder)
            (folder / ("" if place.endswith("html") else place) / "mine.txt").write_text("mine")
            mine = [p.relative_to(folder).as_posix() for p in folder.rglob("mine.txt")][0]
        alive = not killed(folder, at)
        left = {k: v for k, v in tree(folder).items() if not start or k != mine}
        if place.endswith("html") and place in left: assert left[place] in (start.get(place), wanted[place])
        if place + "/index.html" in left: assert {k: v for k, v in left.items() if "-tmp" not in k} in (start, wanted)
        export_page(few, folder / place)
        left = tree(folder)
        if start: assert left.pop(mine) == b"mine"
        assert left == wanted, (at, sorted(left))
        shutil.rmtree(folder)
    print(at)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("place", ["site", "page.html"])
def test_killed_at_any_step_it_is_repeated(tmp_path, place):
    "Really killed, at each operation on a file: what is left is the old page, none, or the new one; the next export ends with the same bytes."
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), str(Path(__file__).parent)])}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, tmp_path.resolve(), place], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fresh, again = map(int, done.stdout.split())
    assert fresh > (3 if place == "page.html" else 15) and again >= fresh


def test_leftovers_of_killed_exports_go_and_nothing_else(own, tmp_path):
    "For a single page only those of its own name: the folder around it is the user's."
    dead, mine = 999_999_999, [".other.html.999999999.sae_nb-tmp", ".page.html.tmp", f".page.html.{os.getppid()}.sae_nb-tmp", ".page.html.sae_nb-tmp"]
    for name in [*mine, f".page.html.{dead}.sae_nb-tmp"]: (tmp_path / name).touch()
    export_page(own, tmp_path / "page.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*mine, "page.html"])
    stage = tmp_path / "site" / f".shards.{dead}.sae_nb-tmp"
    stage.mkdir(parents=True)
    (stage / "00000.js").write_text(SCRIPT)
    for name in (f".00001.js.{dead}.sae_nb-tmp", f"../.plotly.js.{dead}.sae_nb-tmp"): (stage / name).write_text("cut off")
    foreign = tmp_path / "site" / ".shards.7.sae_nb-tmp"
    foreign.mkdir()
    (foreign / "00000.js").write_text("mine")
    (foreign / "photo.jpg").write_text("mine")
    shards = export_page(own, tmp_path / "another").parent / "shards"
    (tmp_path / "site" / ".shards.8.sae_nb-tmp").symlink_to(shards)
    export_page(own, tmp_path / "site")
    assert {p.name for p in (tmp_path / "site").iterdir()} == {"index.html", "plotly.js", "shards", ".lock", ".shards.7.sae_nb-tmp", ".shards.8.sae_nb-tmp"}
    assert [(foreign / name).read_text() for name in ("00000.js", "photo.jpg")] == ["mine", "mine"] and len(list(shards.iterdir())) == 3


# --- what is written is strict and inert --------------------------------------------------------------------------------

def strict(text):
    "JSON as any browser reads it."
    return json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))


class Reader(HTMLParser):
    "The elements of a page, and what stands in each script that has a name."
    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts = [], {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.name = dict(attrs).get("id") if tag == "script" else None
        if self.name: self.scripts[self.name] = ""

    def handle_endtag(self, tag):
        self.tags.append("/" + tag)
        self.name = None

    def handle_data(self, data):
        if self.name: self.scripts[self.name] += data


EVIL = "</script><script>alert(1)</script><!--<script>\u2028"


def payload_of(folder, word):
    "A payload whose every text is `word`."
    context = Context(["a ", word, " b"], [0., 1., 0.], 1, 1., word)
    features = [Feature(i, .1, .1, .2, 1., 5., 1., None, [1], [context], [context], explanation={"text": word}) for i in range(3)]
    payload = write_payload(folder, about(2) | dict(lm=word, site=word, text=word), features)
    write_notes(folder, {1: word})
    return payload


@pytest.mark.parametrize("place", ["site", "page.html"])
def test_a_script_in_any_text_stays_a_text(tmp_path, place):
    "Tokens, explanations, notes, names and the title of a page add no element to it, and come out as they went in."
    evil, tame = (Reader(export_page(payload_of(tmp_path / name, word), tmp_path / name / place, title=word).read_text(encoding="utf-8"))
                  for name, word in (("evil", EVIL), ("tame", "tame")))
    assert evil.tags == tame.tags and evil.tags.count("script") == (5 if place == "page.html" else 3)
    facts = strict(evil.scripts["state"])
    assert facts["notes"] == {"1": EVIL} and facts["head"]["title"] == EVIL and facts["head"]["about"].count(EVIL) == 3
    for p in tmp_path.glob("evil/site/shards/*.js"):
        text = p.read_text(encoding="utf-8")
        assert "<" not in text and "\u2028" not in text
        shard = strict(text[text.index("](") + 2:-2])
        assert EVIL in shard["words"] and shard["latents"][0]["explanation"]["text"] == EVIL


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_null(tmp_path, number):
    "In shards, in a picture of a page, in the state of an explorer."
    features = [Feature(0, .1, number, .2, number, 5., 1., None, [1], [Context(["a"], [number], 0, number)], explanation={"text": "x", "precision": number})]
    payload = Payload.in_memory(about(4), features)
    export_page(payload, tmp_path / "site")
    text = (tmp_path / "site" / "shards" / "00000.js").read_text(encoding="utf-8")
    shard = strict(text[text.index("](") + 2:-2])
    assert shard["latents"][0]["mean"] is None and shard["latents"][0]["explanation"]["precision"] is None
    strict(Reader((tmp_path / "site" / "index.html").read_text(encoding="utf-8")).scripts["state"])
    strict(state(payload)["texts_data"])
    class Drawn(Picture):
        def spec(self): return dict(data=[dict(y=[1., number, 2.5])])
    html = page("t", [("h", [Drawn(None)])])
    spec = html[html.rindex('("picture1",') + len('("picture1",'):html.rindex(")</script>")]
    assert strict(spec)["data"] == [{"y": [1., None, 2.5]}]
    assert strict(inert({"a": [number]})) == {"a": [None]}


@pytest.mark.parametrize("note", [math.nan, 3, None, ["a"]])
def test_a_note_is_a_text(tmp_path, note):
    "What could not be read again is not written."
    write_notes(tmp_path, {1: "one"})
    with pytest.raises(UserError, match="note on latent 2 is .*, but a text was expected"): write_notes(tmp_path, {1: "one", 2: note})
    assert read_notes(tmp_path) == {1: "one"}


def test_the_notebook_behind_an_explorer_is_strict(tmp_path, monkeypatch):
    "It is written by the strict writer, like every other file."
    written = []
    monkeypatch.setattr(core.json, "dumps", lambda x, _real=json.dumps, **how: written.append(how) or _real(x, **how))
    path = explore_notebook(tmp_path, "'</é>'")
    assert read_json(path)["cells"][0]["source"] == "'</é>'" and written and all(how["allow_nan"] is False for how in written)


def test_half_a_character_is_written(tmp_path):
    "A token may be half of a character; a page with it is written, and read again as it was."
    half = Feature(0, .1, .1, .2, 1., 5., 1., None, [1], [Context(["\udc80"], [1.], 0, 1., "d")], explanation={"text": "\udcff"})
    payload = Payload.in_memory(about(4), [half])
    export_page(payload, tmp_path / "page.html", title="\udc80")
    export_page(payload, tmp_path / "site")
    text = (tmp_path / "site" / "shards" / "00000.js").read_text(encoding="utf-8")
    assert strict(text[text.index("](") + 2:-2])["words"] == ["\udc80"] and strict(state(payload)["texts_data"])["explanations"] == ["\udcff"]
