"The explorer in a real browser, from a static page: all that a reader does without a kernel."
import json, os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from browsing import chromium, needs_browser
from payloads import feature, made

from sae_nb.features import Context, Feature, Payload, encode_column
from sae_nb.page import visible
from sae_nb.widgets.export import export_page
from sae_nb.widgets.tokens import asset

SHOTS = os.environ.get("SAE_NB_SHOTS")   # a folder for screenshots to look at


def shot(page, name):
    if SHOTS: page.screenshot(path=f"{SHOTS}/b_{name}.png", full_page=True)


@pytest.fixture(scope="module")
def payload(tmp_path_factory): return made(tmp_path_factory.mktemp("features"), n=300)


def drive(page):
    "What every door must allow: search, sort, filter, select, hover, press, pin, compare, note."
    page.wait_for_selector(".plot .main-svg"); page.wait_for_selector(".card")
    count = page.get_by_role("status").filter(has_text="latents")
    assert "257 of 300" in count.inner_text()
    page.locator("body").press("/") if page.locator(".jp-Notebook").count() == 0 else page.get_by_role("searchbox").focus()
    page.keyboard.type("<B>, NUMBER 12")
    page.wait_for_function("document.querySelector('.count').textContent.startsWith('4 of')")   # 12, 120, 123, 126; 129 never fires
    page.keyboard.press("ArrowDown")
    first = int(page.locator(".latent.on").get_attribute("data-id"))
    page.wait_for_selector(f"article[data-latent='{first}'] .card")
    page.get_by_role("searchbox").fill("")
    page.get_by_label("sort by").select_option("density")
    values = [float(t.split()[0]) for t in page.locator(".latent .value").all_inner_texts()]
    assert values == sorted(values, reverse=True) and len(values) < 60, "sorted, and only the rows in sight are there"
    page.get_by_label("descending; press for ascending").click()
    assert values != [float(t.split()[0]) for t in page.locator(".latent .value").all_inner_texts()]
    page.get_by_label("alive only").uncheck()
    page.wait_for_function("document.querySelector('.count').textContent.startsWith('300 of')")
    page.get_by_label("sort by").select_option("id")
    page.get_by_label("ascending; press for descending").click(); page.get_by_label("descending; press for ascending").click()
    page.locator(".latent").filter(has=page.locator(".id", has_text="3")).first.click()   # latent 3 never fires
    page.wait_for_selector("article[data-latent='3'] .card")
    assert page.get_by_text("never fires on the text that was read").count() >= 2
    page.get_by_role("listbox", name="latents").press("ArrowDown")
    page.wait_for_selector("article[data-latent='4'] .card")
    assert page.locator("article[data-latent='4'] .panel h4").all_inner_texts() == ["Numbers", "Strongest contexts", "Random and weaker contexts", "Effects and meaning"]
    page.locator(".context .token").first.hover()
    page.wait_for_selector(".tip:not([hidden])")
    page.locator(".context .token.picked").first.click()
    page.get_by_role("tab", name="probabilities").click(); page.get_by_role("tab", name="KL").click()
    page.get_by_role("button", name="pin", exact=True).click()
    page.get_by_role("listbox", name="latents").press("ArrowDown")
    page.wait_for_selector("article[data-latent='5'] .card")
    page.get_by_role("button", name="pin", exact=True).click()
    page.get_by_label("note on latent 5").fill("a <b> note")
    page.wait_for_function("document.querySelector('.latent.on .about').textContent.includes('a <b> note')")
    page.get_by_role("button", name="compare pinned").click()
    page.wait_for_function("document.querySelectorAll('.stage.compare .card').length == 2")


def draw_lasso(page):
    "A box over the whole chart, then a lasso over its right half."
    def drag(*points):
        page.locator(".plot").scroll_into_view_if_needed()
        box = page.locator(".plot").bounding_box()
        at = [(box["x"] + u * box["width"], box["y"] + v * box["height"]) for u, v in points]
        page.mouse.move(*at[0]); page.mouse.down()
        for p in at[1:]: page.mouse.move(*p, steps=4)
        page.mouse.up()
    page.get_by_role("tab", name="box").click()
    drag((.1, .05), (.97, .8))
    page.wait_for_function("document.querySelector('.count').textContent.includes('in the selection')")
    every = page.locator(".count").inner_text().split()[0]
    page.get_by_role("tab", name="lasso").click()
    drag((.6, .03), (.98, .03), (.98, .85), (.6, .85), (.6, .05))
    page.wait_for_function(f"!document.querySelector('.count').textContent.startsWith('{every} ')")
    return [int(count.replace(",", "")) for count in (every, page.locator(".count").inner_text().split()[0])]


@needs_browser
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_static_page(payload, tmp_path, kind):
    "All but the live text, from a disk, without a request, and notes after a reload."
    target = export_page(payload, tmp_path / ("page.html" if kind == "file" else "page"))
    with chromium(dark=kind == "folder", size=(1280, 900) if kind == "file" else (800, 900)) as page:
        page.goto(target.as_uri())
        drive(page)
        shot(page, f"static_{kind}_compare")
        every, some = draw_lasso(page)
        assert 0 < some < every
        assert page.evaluate("explorer.get('lasso').length") >= some
        assert page.get_by_text("This is a static page").is_visible()
        shot(page, f"static_{kind}_lasso")
        page.reload()
        page.wait_for_function("document.querySelector('.card') && explorer.get('notes')[5] == 'a <b> note'")
        with page.expect_download() as got: page.get_by_role("button", name="download notes").click()
        assert json.loads(Path(got.value.path()).read_text()) == {"5": "a <b> note"}
        (tmp_path / "mine.json").write_text('{"7": "seven"}')
        page.locator("input[type=file]").set_input_files(tmp_path / "mine.json")
        page.get_by_text("notes read").wait_for()
        assert page.evaluate("explorer.get('notes')") == {"5": "a <b> note", "7": "seven"}
        assert not page.problems


@needs_browser
def test_states_in_words(tmp_path):
    "No latents, only silent ones, no model, a shard that was lost."
    about = dict(rows=1_000)
    with chromium() as page:
        page.goto(export_page(Payload.in_memory(about, []), tmp_path / "none.html").as_uri())
        page.get_by_text("This payload holds no latents").wait_for(); shot(page, "state_empty")
        page.goto(export_page(Payload.in_memory(about, [Feature(i) for i in range(9)]), tmp_path / "silent.html").as_uri())
        page.get_by_text("No latent is selected").wait_for()
        page.get_by_text("No latent that fires has both numbers").wait_for()
        page.locator(".latent").first.click()
        page.wait_for_selector(".card"); shot(page, "state_silent")
        assert not page.problems
        target = export_page(Payload.in_memory(about, [feature(i) for i in range(9)]), tmp_path / "page")
        (tmp_path / "page" / "shards" / "00000.js").unlink()
        page.goto(target.as_uri())
        page.get_by_text("shards/00000.js cannot be read").wait_for(); shot(page, "state_lost")


@needs_browser
def test_an_address_for_each_latent(payload, tmp_path):
    "The address names the selected latent, survives a reload, and the back button returns; a wrong one is not obeyed."
    with chromium() as page:
        target = export_page(payload, tmp_path / "page.html").as_uri()
        card = lambda id: page.wait_for_selector(f"article[data-latent='{id}'] .card")
        page.goto(target + "#latent-12"); card(12)
        page.wait_for_timeout(1_100)   # a walk within a second is one step back
        page.evaluate("explorer.set('selected', 4)"); card(4)
        assert page.url.endswith("#latent-4") and page.get_by_label("link to latent 4").get_attribute("href") == "#latent-4"
        page.reload(); card(4)
        page.go_back(); card(12)
        assert page.evaluate("explorer.get('selected')") == 12
        page.evaluate("location.hash = '#latent-5'"); card(5)
        page.evaluate("location.hash = '#latent-300'")
        page.evaluate("location.hash = '#latent-<b>'")
        page.goto("about:blank"); page.goto(target); page.wait_for_selector(".card")
        first = page.evaluate("explorer.get('selected')")
        assert page.url.endswith(f"#latent-{first}") and not page.problems
        assert "nats" in page.locator(".figures").inner_text() and page.get_by_label("sort by").inner_text().count("effect (nats)") == 1


CHARACTERS = ["\xa0", "\u3000", "\u200b", "\u200d", "\xad", "\ufeff", "\x0c", "\x00", "\x1b", "\x7f", "\x85", "\u2028", "\u202e", "\ue000", "\ufffd", "",
              " ", "\t", "\n", "\r\n", "a", "é", "e\u0301", "日", "🙂", "\U000e0001", "\U0010ffff", "\u0378"]


@needs_browser
def test_python_and_javascript_show_the_same_characters(tmp_path):
    "Spaces of all kinds, marks without width, controls, what bytes that are no text become, and characters that nobody has assigned."
    code = asset("sae_nb.js").split("export {")[0]
    with chromium() as page:
        page.goto("about:blank")
        page.add_script_tag(content=code + "\nglobalThis.visible = visible;")
        told = page.evaluate("texts => texts.map(visible)", CHARACTERS)
        assert dict(zip(CHARACTERS, told)) == {c: visible(c) for c in CHARACTERS} and not page.problems


@needs_browser
def test_no_text_of_a_payload_runs(tmp_path):
    "Markup in tokens, explanations, documents and notes is shown as it is, in a page of one file and of a folder."
    bad = "<script>globalThis.ran = 1</script><img src=x onerror='globalThis.ran = 1'></script><script>ran=1</script>"
    made = [replace(feature(i, n=3), explanation={"text": bad}, top=[Context([bad, "a"], [1., 0.], 0, 1., bad, 0)]) for i in (0, 1, 2)]
    with chromium() as page:
        for name in ("page.html", "page"):
            page.goto(export_page(Payload.in_memory(dict(rows=1_000), made), tmp_path / name, title=bad).as_uri())
            page.wait_for_selector(".card")
            page.get_by_text("<img src=x onerror").first.wait_for()
            page.evaluate("bad => explorer.set('notes', {1: bad})", bad)
            page.wait_for_function("document.querySelector('.rows').textContent.includes('✎ <script>')")
            assert page.evaluate("globalThis.ran === undefined && !document.querySelector('#app script, #app img')") and not page.problems


@needs_browser
def test_keyboard_alone(payload, tmp_path):
    "Search, list, pin, bands, tokens and votes without a mouse; every control has a name."
    with chromium() as page:
        page.goto(export_page(payload, tmp_path / "page.html").as_uri())
        page.wait_for_selector(".card")
        page.keyboard.press("/"); page.keyboard.type("number 0"); page.keyboard.press("ArrowDown")
        page.wait_for_selector("article[data-latent='0'] .card")
        def tab_to(test):
            for _ in range(60):
                page.keyboard.press("Tab")
                if page.evaluate(f"(e => {test})(document.activeElement)"): return
            pytest.fail(f"no Tab leads to {test}")
        tab_to("e.dataset.pin"); page.keyboard.press("Enter")
        page.wait_for_function("explorer.get('pinned').includes(0)")
        assert page.evaluate("document.activeElement.dataset.pin") == "0", "the focus stays on the button"
        tab_to("e.className.includes('token')"); page.keyboard.press("Home"); page.keyboard.press("ArrowRight"); page.keyboard.press("Enter")
        assert page.evaluate("explorer.get('picked').latent") == 0
        assert page.locator(".tip").is_visible()
        tab_to("e.getAttribute('role') == 'tab' && e.textContent == 'random'"); page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.getAttribute('aria-selected')") == "true"
        tab_to("e.closest('ol.votes') && e.tagName == 'BUTTON'"); page.keyboard.press("Enter")
        page.wait_for_function("explorer.get('selected') != 0")
        nameless = page.evaluate("[...document.querySelectorAll('button,input:not([hidden]),select,textarea,[role]')].filter(e => !e.textContent.trim() && !e.getAttribute('aria-label') && !e.closest('label') && !e.closest('[hidden]')).map(e => e.outerHTML)")
        assert nameless == [] and not page.problems


TIMES = """async () => {
  const times = {}, list = document.querySelector('.list'), rest = () => new Promise((r) => requestAnimationFrame(() => setTimeout(r)));
  const time = async (name, act) => { const t = performance.now(); act(); list.querySelector('.rows').offsetHeight; (times[name] ??= []).push(Math.round(10 * (performance.now() - t)) / 10); await rest(); };
  const put = (box, value, event) => { box.value = value; box.dispatchEvent(new Event(event)); };
  for (const q of ['b', 'bo', 'bold', '']) await time('search', () => put(document.querySelector('input[type=search]'), q, 'input'));
  for (const c of ['density', 'max', 'skew', 'id', 'kurtosis']) await time('sort', () => put(document.querySelector('select[aria-label="sort by"]'), c, 'change'));
  for (const v of [40, 70, 0]) await time('filter', () => put(document.querySelector('input[type=range]'), v, 'input'));
  for (const y of [1e5, 3e6, 0]) await time('scroll', () => { list.scrollTop = y; list.dispatchEvent(new Event('scroll')); });
  for (let i = 1; i < 4; i++) { const t = performance.now(); explorer.set('selected', i); while (!document.querySelector(`article[data-latent="${i}"] .card`)) await new Promise((r) => setTimeout(r)); (times.select ??= []).push(Math.round(performance.now() - t)); }
  for (const step of [7, 2]) await time('lasso', () => explorer.set('lasso', Array.from({ length: Math.floor(100000 / step) }, (_, i) => step * i)));
  return times; }"""


@needs_browser
def test_a_hundred_thousand_latents(payload, tmp_path, record_property):
    "They open, sort, search and scroll; only the rows in sight are elements. Times are recorded, not asserted."
    n, small = 100_000, payload.index
    resize = lambda items: [items[i % payload.n] for i in range(n)]
    columns = {c: np.resize(v, n) for c, v in payload.columns.items()}
    index = small | dict(n=n, shard=50, tokens=resize(small["tokens"]), quotes=resize(small["quotes"]), explanations=resize(small["explanations"]), columns={c: encode_column(v) for c, v in columns.items()})
    read = lambda j: {"words": payload.shard(0)["words"], "latents": payload.shard(0)["latents"][:50]}   # the first shard is all that is written
    target = export_page(Payload(index, read), tmp_path / "page", progress=lambda shards: list(shards)[:1])
    with chromium() as page:
        page.goto(target.as_uri())
        page.wait_for_selector(".latent")
        alive = int((columns["density"] > 0).sum())
        assert f"{alive:,} of 100,000" in page.locator(".count").inner_text() and page.locator(".latent").count() < 60
        page.wait_for_selector(".plot .main-svg")
        times = page.evaluate(TIMES)
        record_property("times", times)
        print(times)
        assert "in the selection" in page.locator(".count").inner_text()
        page.get_by_role("button", name="clear selection").click()
        page.wait_for_function(f"document.querySelector('.count').textContent.startsWith('{alive:,} of')")
        top = int(page.locator(".latent").first.get_attribute("data-id"))
        assert columns["kurtosis"][top] == np.nanmax(np.where(columns["density"] > 0, columns["kurtosis"], np.nan))
        page.get_by_role("searchbox").fill("number 12")
        found = sum("number 12" in e and d > 0 for e, d in zip(index["explanations"], columns["density"]))
        page.wait_for_function(f"document.querySelector('.count').textContent.startsWith('{found:,} of')")
        page.get_by_role("searchbox").fill("")
        page.get_by_role("listbox", name="latents").press("End")
        page.wait_for_function("document.querySelector('.latent.on').getAttribute('aria-posinset') == document.querySelector('.latent.on').getAttribute('aria-setsize')")
        assert not page.problems or all("ERR_FILE_NOT_FOUND" in p for p in page.problems)


@needs_browser
def test_words_of_contexts_are_found(tmp_path):
    "The search looks into the strongest contexts as well, and a row found there says where."
    made(tmp_path / "features", n=30)
    payload = Payload.open(tmp_path / "features")
    fit = [i for i, quote in enumerate(payload.quotes) if "</b><script>" in quote and payload.columns["density"][i] > 0]
    named = [i for i in fit if "</b><script>" in payload.tokens[i] + payload.explanations[i]]
    assert 0 < len(fit) < 25 and not named
    target = export_page(payload, tmp_path / "page.html")
    with chromium() as page:
        page.goto(target.as_uri())
        page.get_by_role("searchbox").fill("</B><script>")
        page.wait_for_function(f"document.querySelector('.count').textContent.startsWith('{len(fit)} of')")
        assert {int(row.get_attribute("data-id")) for row in page.locator(".latent").all()} == set(fit)
        assert all("</b><script>" in text and text.startswith("«") for text in page.locator(".latent .about").all_inner_texts())
        assert not page.problems
