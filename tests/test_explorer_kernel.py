"The explorer in a real browser with a kernel behind it, through Voila and through JupyterLab."
from browsing import chromium, idle, lab, needs_browser, notebook, run_cell, voila
from payloads import made
from test_explorer import draw_lasso, drive, shot

from sae_nb.features import Payload
from sae_nb.widgets.export import explore_notebook

CODE = """
import ipywidgets
from sae_nb.widgets.explorer import Explorer
def live(text):
    if text == "break": raise RuntimeError("out of memory")
    tokens = [w + " " for w in text.split()]
    return dict(tokens=tokens, latents=[[len(t), {hot}] for t in tokens], values=[[float(len(t)), 1.5] for t in tokens])
e, echo = Explorer({folder!r}, live, lambda latent: e.payload.feature(0)), ipywidgets.Label()
def say(_=None): echo.value = f"kernel: {{e.selected}} | {{e.pinned}} | {{e.notes}} | {{len(e.lasso)}} | {{(e.picked or {{}}).get('text')!r}}"
e.observe(say, ["selected", "pinned", "notes", "lasso", "picked"]); say()
"""


def explored(folder, code):
    "The address of `sae-nb explore`'s server."
    return voila(explore_notebook(folder, code))


def says(page, text): page.locator(".widget-label", has_text="kernel: ").filter(has_text=text).first.wait_for()


def with_kernel(page):
    "The kernel hears what the page does, and the page shows what the kernel says."
    drive(page)
    says(page, "| [4, 5] | {5: 'a <b> note'} |")
    every, some = draw_lasso(page)
    says(page, "note'} | ")
    assert int(page.locator(".widget-label", has_text="kernel: ").inner_text().split("|")[3]) >= some
    box = page.get_by_label("a text of your own")
    box.fill("hello <b> world"); page.keyboard.press("Control+Enter")
    page.locator(".own .token").nth(2).wait_for()
    assert page.locator(".own .token").all_inner_texts() == ["hello·", "<b>·", "world·"]
    box.fill(" ".join("x" * i for i in range(1, 30))); page.keyboard.press("Control+Enter")
    page.get_by_role("button", name="all 29 that fire").click()   # lengths 2 to 30, and the hot one, which is among them
    assert page.locator(".own .votes li").count() == 29
    page.get_by_role("button", name="the strongest 15").click()
    assert page.locator(".own .votes li").count() == 15
    box.fill("hello <b> world"); page.keyboard.press("Control+Enter")
    page.locator(".own .token").nth(2).wait_for(); page.get_by_text("hello·").first.wait_for()
    page.locator(".own .token").nth(1).click()
    page.get_by_text("latents that fire at «<b>·»").wait_for()
    page.locator(".own .votes button").first.click()
    says(page, "kernel: 4 |")
    box.fill("break"); page.keyboard.press("Control+Enter")
    page.get_by_text("The model could not read this text: out of memory.").wait_for()


@needs_browser
def test_through_voila(tmp_path):
    "Two pages of Voila: everything in light, then a reload in dark with effects measured on request."
    made(tmp_path / "features", n=300)
    code = CODE.format(folder=str(tmp_path / "features"), hot=5) + "ipywidgets.VBox([e, echo])"
    with explored(tmp_path, code) as url, chromium() as page:
        page.goto(url)
        with_kernel(page)
        shot(page, "voila_light")
        page.emulate_media(color_scheme="dark")
        page.reload()
        page.wait_for_selector(".plot .main-svg")
        says(page, "{5: 'a <b> note'}")   # a new kernel, the same notes
        page.get_by_role("searchbox").fill("number 99"); page.get_by_role("searchbox").press("ArrowDown")
        page.get_by_role("button", name="measure now").click()
        page.get_by_role("tab", name="KL").wait_for()
        shot(page, "voila_dark")
        assert page.evaluate("getComputedStyle(document.querySelector('.sae-nb')).backgroundColor") == "rgb(23, 24, 27)"
        assert not page.problems


@needs_browser
def test_tokens_and_card(tmp_path):
    "A click on a token and on a related latent come back to the kernel; what the kernel sets is shown."
    made(tmp_path / "features", n=80)
    code = f"""
import ipywidgets
from sae_nb.features import Payload
from sae_nb.widgets.card import Card
from sae_nb.widgets.tokens import Tokens
payload = Payload.open({str(tmp_path / "features")!r})
t, c, echo, button = Tokens(["<i>", "a", "\\n", " b"], [1, 0, -1, .5], "some tokens"), Card(payload.feature(4)), ipywidgets.Label(), ipywidgets.Button(description="from Python")
def say(_=None): echo.value = f"kernel: {{t.picked}} | {{c.selected}} | {{c.feature.id}} | {{(c.picked or {{}}).get('token')}}"
def press(_): t.picked = 0; c.show(payload.feature(3)); say()
t.observe(say, "picked"); c.observe(say, ["selected", "picked"]); button.on_click(press); say()
ipywidgets.VBox([t, c, echo, button])"""
    with explored(tmp_path, code) as url, chromium() as page:
        page.goto(url)
        page.locator(".sae-nb.tokens .token").nth(3).click()
        says(page, "kernel: 3 | None | 4 | None")
        page.locator(".sae-nb.tokens .token").nth(2).hover()
        page.get_by_role("tooltip").filter(has_text="⏎: -1").wait_for()
        page.get_by_label("break lines").first.uncheck()
        page.locator(".sae-nb.card .context .picked").first.click()
        page.locator(".sae-nb.card ol.votes button").first.click()
        shot(page, "tokens_and_card")
        token, neighbour = payload_facts(tmp_path / "features")
        says(page, f"kernel: 3 | {neighbour} | 4 | {token}")
        page.get_by_role("button", name="from Python").click()
        page.get_by_text("This latent never fires").first.wait_for()
        page.wait_for_selector(".sae-nb.tokens .token:first-child.picked")
        assert not page.problems


def payload_facts(folder):
    "Document index of latent 4's strongest token, and its nearest neighbour."
    f = Payload.open(folder).feature(4)
    return f.top[0].token, f.neighbours[0][0]


@needs_browser
def test_through_jupyterlab(tmp_path):
    "In JupyterLab the same, and after a reload of the page the kernel's state is shown again."
    made(tmp_path / "features", n=300)
    code = CODE.format(folder=str(tmp_path / "features"), hot=5)
    with lab(notebook(tmp_path, code, "ipywidgets.VBox([e, echo])", "e.selected = 8; e.pinned")) as url, chromium(size=(1500, 1000)) as page:
        page.goto(url)
        idle(page)
        for i in (0, 1): run_cell(page, i)
        page.wait_for_selector(".card")
        with_kernel(page)
        shot(page, "lab_light")
        run_cell(page, 2)
        page.wait_for_selector("article[data-latent='4']")   # still comparing
        page.get_by_text("[4, 5]", exact=True).first.wait_for()
        page.keyboard.press("Control+s"); idle(page)
        page.wait_for_function("!document.querySelector('.jp-mod-dirty')")
        page.reload()
        page.wait_for_selector("article[data-latent='8'] .card")
        says(page, "kernel: 8 | [4, 5] | {5: 'a <b> note'}")
        page.get_by_role("listbox", name="latents").press("End")
        page.wait_for_function("!document.querySelector('article[data-latent=\"8\"]')")
        assert not page.problems
