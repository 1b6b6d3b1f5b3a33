"The report of a run: what stands first, every character readable, light and dark, and nothing in it runs or leaves."
import json
import re

import pytest
import torch
from browsing import chromium, needs_browser

from sae_nb.core import Table, UserError
from sae_nb.lm import load_lm
from sae_nb.metrics import measure
from sae_nb.page import OFFLINE, Folded, page, token_strip, visible
from sae_nb.report import TopContexts, contexts, headline, strongest, thin, window_texts, write_report
from sae_nb.runs import RunConfig, run
from sae_nb.sae import SAE, Code
from sae_nb.text import Words, load_text

SITE = "resid_post.2"
STORY = "吾輩は猫である。名前はまだ無い。どこで生れたか頓と見当がつかぬ。何でも薄暗いじめじめした所でニャーニャー泣いていた事だけは記憶している。🙂\n"


@pytest.fixture(scope="module")
def lm(): return load_lm("pylib-64", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def reported(tmp_path_factory, lm):
    "A small run on Japanese files, and its report."
    folder, texts = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("texts")
    for i in range(40): (texts / f"{i}.txt").write_text("".join(STORY[j:] + STORY[:j] for j in range(i % 7, 60, 7)), encoding="utf-8")
    cfg = RunConfig(lm="pylib-64", text=str(texts), site=SITE, n=96, k=6, tokens=6_000, context=64, dtype="float32")
    for _ in run(cfg, folder, lm=lm): pass
    sae, top = SAE.load(folder), TopContexts(96)
    metrics = measure(sae, lm, load_text(str(texts)), SITE, 64, 3_000, see=top)
    return folder, sae, metrics, top, write_report(folder, sae, lm, metrics, top, count=6)


def test_every_character_can_be_read(reported, lm):
    "In a script that the tokenizer cuts into bytes, each character stands whole, and none is replaced."
    folder, sae, metrics, top, path = reported
    body = path.read_text(encoding="utf-8").split("<body>")[1]
    assert "\ufffd" not in body and sum(c in STORY for c in body if ord(c) > 0x3000) > 60
    for latent in strongest(top, 6):
        for strip in contexts(sae, lm, top, latent, SITE):
            text = "".join(strip.tokens).replace("<|endoftext|>", "")
            assert "\ufffd" not in text and all(line in STORY * 3 or line in STORY[-1:] or len(line) < 3 for line in re.split("[\n🙂。]", text)), text


def test_tokens_of_a_window_are_decoded_together(lm):
    "Whole windows give their text; of a character that a window cuts, nothing is shown."
    words, ids = Words(lm.tokenizer), lm.tokens("日本語\ufffd")[0].tolist()
    texts, closed = window_texts(words, ids)
    assert "".join(texts[1:]) == "日本語\ufffd" or "".join(texts[1:]) == "日本語"
    text = "x日本語y"
    ids = lm.tokens(text)[0].tolist()
    texts, closed = window_texts(words, ids)
    assert "".join(texts[1:]) == text and len(texts) == len(ids) and len(closed) == len(ids) + 1
    assert ["".join(texts[1:i]) for i in range(1, len(ids) + 1) if closed[i]] == [text[:j] for j in range(6)]
    for cut in range(2, len(ids)):
        assert "\ufffd" not in "".join(window_texts(words, ids[:cut])[0]) and "\ufffd" not in "".join(window_texts(words, ids[:1] + ids[cut:])[0])
        assert "\ufffd" not in "".join(window_texts(words, ids[cut:])[0])


def test_results_first_settings_last(reported):
    "Results, curves and the best latents, densities, and folded at the end every setting."
    folder, sae, metrics, top, path = reported
    html = path.read_text(encoding="utf-8")
    heads = re.findall(r"<h2>(.*?)</h2>", html)
    shown = strongest(top, 6)
    assert heads == ["How good it is", "How it went", "What the strongest latents respond to", *(f"Latent {i}" for i in shown), "How often latents fire", "Settings"]
    told = html[html.index("<details>"):html.index("</details>")]
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert all(f"<td>{name}</td>" in told for part in ("run", "train") for name in settings[part])
    assert "details open" not in html and headline(metrics).replace("&", "&amp;") in html
    assert f"{metrics.ce_recovered:.2%}" in headline(metrics) and f"{metrics.dead_fraction:.2%}" in headline(metrics)


def test_what_is_no_run_is_told(reported, lm, tmp_path):
    "Missing or foreign settings are one sentence, and nothing is written."
    folder, sae, metrics, top, path = reported
    for content in ("{}", '{"run": 3, "train": {}}', '{"run": {"n": 3}, "train": {}}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match="does not describe a run"): write_report(tmp_path, sae, lm, metrics, top)
    with pytest.raises(UserError, match="choose from 0 to 95"): contexts(sae, lm, top, 96, SITE)
    with pytest.raises(UserError, match="n is 0"): TopContexts(0)
    assert not (tmp_path / "report.html").exists() and contexts(sae, lm, top, torch.tensor(strongest(top)[0]), SITE)


def test_strongest_windows_by_brute_force(lm):
    "The largest activation of each latent in each window, from a dense table, for any batches; rows that are not kept do not count."
    from sae_nb.text import windows
    g = torch.Generator().manual_seed(0)
    some = next(windows(load_text("pylib").documents(), lm.tokenizer, 32, 12))
    some.keep[3, 7:20] = False
    dense = torch.rand(int(some.keep.sum()), 20, generator=g) * (torch.rand(int(some.keep.sum()), 20, generator=g) < .1)
    dense[:, 13] = 0
    whole = torch.zeros(12, 32, 20)
    whole[some.keep] = dense
    for sizes in ([12], [5, 7], [1] * 12):
        top, row = TopContexts(20, m=3), 0
        for part in torch.arange(12).split(sizes):
            batch = some.take(part)
            rows = int(batch.keep.sum())
            best = dense[row:row + rows].topk(6)
            top(batch, Code(best.values, best.indices, 20))
            row += rows
        want = whole.amax(1).T.topk(3)
        torch.testing.assert_close(top.values, want.values)
        assert (top.where[want.values > 0] == want.indices[want.values > 0]).all() and (top.where[13] == -1).all()
        on = whole.flatten(0, 1)
        assert top.rows == len(dense)
        kept = on.topk(6).values
        assert top.counts.sum() == (kept > 0).sum() and top.squares.sum().item() == pytest.approx(kept.square().sum().item(), rel=1e-5)


def test_the_strongest_are_rare_and_ordered_by_what_they_write():
    "Squared activation among latents that fire on at most a fiftieth of the rows and often enough."
    top = TopContexts(5)
    top.rows, top.counts, top.squares = 1_000, torch.tensor([20, 21, 8, 7, 0]), torch.tensor([1., 99., 5., 50., 0.]).double()
    assert strongest(top) == [2, 0] and strongest(top, count=1) == [2] and strongest(top, most=.5) == [1, 2, 0]


def test_thin_keeps_what_was_evaluated():
    steps = [dict(i=i, held_out=1. if i == 777 else None) for i in range(1_000)]
    assert 300 <= len(thin(steps)) <= 502 and any(s["i"] == 777 for s in thin(steps)) and thin(steps)[0]["i"] == 0 and thin(steps[:5]) == steps[:5]


@pytest.mark.parametrize("token, seen", [
    ("a b\n\t", "a·b⏎⇥"), ("\xa0", "⍽"), ("\u3000\u2003\u2028", "␣␣␣"), ("\f\r\0\x7f", "␌␍␀␡"), ("\u200b\u200d\u00ad\ufeff\u202e\x85", "▯" * 6),
    ("\ufffd", "\ufffd"), ("\ud800", "\ufffd"), ("", "∅"), ("é日🙂א", "é日🙂א"), ("\U0010ffff\ue000", "▯▯")])
def test_each_character_has_a_picture(token, seen):
    "The mark of a broken character stands for nothing else."
    assert visible(token) == seen


@needs_browser
def test_the_browser_shows_the_same_pictures(tmp_path):
    "JavaScript and Python agree on every character that both know."
    from sae_nb.widgets.tokens import asset
    import unicodedata
    chars = [chr(i) for i in [*range(0x3000), 0x3000, 0xfeff, 0xfffd, 0x202e, 0x1f642, 0xe000] if not 0xd800 <= i < 0xe000 and unicodedata.category(chr(i)) != "Cn"]
    with chromium() as page_:
        source = asset("sae_nb.js")
        marks = re.search(r"const MARKS = .*?;", source)[0]
        functions = source[source.index("function visible"):source.index("/** The same as nodes")]
        seen = page_.evaluate(f"(chars) => {{ {marks} {functions} return chars.map(visible); }}", chars)
    odd = [(hex(ord(c)), s, visible(c)) for c, s in zip(chars, seen) if s != visible(c)]
    assert not odd, odd[:10]


def test_markup_is_shown_and_never_obeyed():
    "In cells, captions, tokens and headings, in backticks or not."
    evil = ["<script>alert(1)</script>", "`<script>alert(1)</script>`", "``<script>`", "`a` <img src=x onerror=alert(1)> `b`", "\\`<b>\\`", "</td></table><script>x", "a|b<script>"]
    shown = Table([{"a<b>": text} for text in evil])._repr_markdown_()
    assert not re.search("<(?!/?code>)", shown) and shown.count("\n") == len(evil) + 1
    html = page("<script>t", [("<script>h", [Table([{"<script>c": t} for t in evil]), token_strip(evil, range(len(evil)), "<script>s"), Folded("<script>f", ["<script>p"]), "<img>"])])
    assert "<script" not in html and "<img" not in html


def test_the_policy_of_a_page():
    "Nothing is fetched, sent, or redirected."
    words = page("t", [])
    for rule in ("default-src 'none'", "base-uri 'none'", "form-action 'none'"): assert rule in OFFLINE and rule in words
    from sae_nb.widgets.export import POLICY
    assert all(rule in POLICY for rule in ("base-uri 'none'", "form-action 'none'"))


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_the_report_in_a_browser(reported, dark):
    "Figures and strips are as light or dark as the page; no white in the dark, and text that can be read on every shade."
    path = reported[-1]
    with chromium(dark) as browser:
        browser.goto(path.as_uri())
        browser.locator(".picture .plot-container").first.wait_for()
        light = browser.evaluate("""() => {
            const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
            const rgb = (c) => { canvas.fillStyle = "#000"; canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data.slice(0, 3)]; };
            const lum = (c) => rgb(c).map((v) => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4).reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
            const spans = [...document.querySelectorAll(".strip > span")].map((s) => [lum(getComputedStyle(s).backgroundColor), lum(getComputedStyle(s).color)]);
            return {body: lum(getComputedStyle(document.body).backgroundColor), strips: [...document.querySelectorAll(".strip")].map((s) => lum(getComputedStyle(s).backgroundColor)),
                    filter: getComputedStyle(document.querySelector(".picture")).filter, worst: Math.min(...spans.map(([a, b]) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05))), spans: spans.length};
        }""")
        assert light["spans"] > 100 and light["worst"] > 4.5 and not browser.problems
        if dark: assert light["body"] < .05 and max(light["strips"]) < .05 and "invert" in light["filter"]
        else: assert light["body"] > .9 and min(light["strips"]) > .9 and light["filter"] == "none"
        summary = browser.locator("summary")
        assert not browser.get_by_text("k_aux").first.is_visible()
        summary.click()
        assert browser.get_by_text("k_aux").first.is_visible()


def test_strips_take_numbers_of_every_library():
    import numpy as np
    for values in ([1, 2.5], (1, 2.5), np.array([1, 2.5]), torch.tensor([1, 2.5]), [np.float32(1), torch.tensor(2.5)]):
        strip = token_strip(np.array(["a", "b"]), values, scale=np.float32(5), pick=np.int64(1))
        assert strip.values == [1, 2.5] and (strip.scale, strip.pick, strip.top) == (5, 1, 5) and "--v:50.0%" in strip.html()
    assert token_strip(["a"] * 3, [None, float("nan"), float("inf")]).values == [0, 0, 0]
    for wrong in ([[1], [2]], ["a", "b"], [1]): pytest.raises(UserError, token_strip, ["a", "b"], wrong)
    for wrong in (-1, "a"): pytest.raises(UserError, token_strip, ["a"], [1], scale=wrong)
