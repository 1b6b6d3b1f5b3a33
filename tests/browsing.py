"A real browser: Chromium without network, pages of files, of Voila and of JupyterLab."
import contextlib, importlib.util, os, shutil, socket, subprocess, sys, time
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WAIT = 180   # seconds that a page or a server may take: other programs may keep the machine busy
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
MISSING = [n for n in ("playwright", "voila", "jupyterlab") if not importlib.util.find_spec(n)] + ["Chromium"] * (CHROMIUM is None)
_skips = pytest.mark.skipif(bool(MISSING), reason=f"the extra `browser` and Chromium are needed; missing: {', '.join(MISSING)}")


def needs_browser(test):
    "A test that is skipped without a browser, and may take as long as several waits."
    return pytest.mark.timeout(5 * WAIT)(_skips(test))


@contextlib.contextmanager
def chromium(dark=False, size=(1280, 900)):
    "A page whose `problems` collects console errors and every request to another host."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport=dict(width=size[0], height=size[1]), color_scheme="dark" if dark else "light")
        page.set_default_timeout(1_000 * WAIT)
        page.problems = []
        page.on("console", lambda m: m.type == "error" and page.problems.append(m.text))
        page.on("pageerror", lambda e: page.problems.append(str(e)))
        page.on("request", lambda r: r.url.split(":")[0] in ("http", "https", "ws", "wss") and not r.url.split("/")[2].startswith(("localhost", "127.0.0.1")) and page.problems.append(f"request to {r.url}"))
        try: yield page
        finally: browser.close()


def _port():
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); return s.getsockname()[1]


@contextlib.contextmanager
def served(argv, env, folder, port, path):
    "The address of a server that is started in `folder`, and stopped at the end."
    log = Path(folder) / "server.log"
    own = {"OMP_NUM_THREADS": "1", "JUPYTER_CONFIG_DIR": str(folder), "JUPYTERLAB_WORKSPACES_DIR": str(folder),
           "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]}
    with open(log, "w") as f: server = subprocess.Popen(argv, cwd=folder, env=env | own, stdout=f, stderr=f)
    try:
        for _ in range(10 * WAIT):
            assert server.poll() is None, log.read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1): break
            time.sleep(.1)
        yield f"http://127.0.0.1:{port}{path}"
    finally:
        server.terminate()
        server.wait(WAIT)


def voila(notebook):
    "Voila on a notebook file, as `sae-nb explore` starts it."
    from sae_nb.widgets.export import serve_command
    port = _port()
    return served(*serve_command(notebook, port, browser=False), notebook.parent, port, "/")


def lab(notebook):
    "JupyterLab with a notebook file open."
    port = _port()
    argv = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--ServerApp.port={port}", "--ServerApp.ip=127.0.0.1", "--IdentityProvider.token=",
            "--ServerApp.password=", "--allow-root", "--LabApp.news_url=None", "--ServerApp.disable_check_xsrf=True",
            "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    return served(argv, os.environ, notebook.parent, port, f"/lab/tree/{notebook.name}")


def run_cell(page, i):
    "Run a cell of an open notebook: click, press, and see that it was heard, for a page may take its time to listen."
    from playwright.sync_api import TimeoutError
    cell = page.locator(".jp-CodeCell").nth(i)
    for _ in range(WAIT // 3):
        cell.locator(".cm-content").click()
        page.keyboard.press("Control+Enter")
        with contextlib.suppress(TimeoutError):
            return cell.locator(".jp-InputArea-prompt", has_text="[ ]:").wait_for(state="hidden", timeout=3_000)
    raise AssertionError(f"cell {i} does not run")


def idle(page):
    "Wait until an open notebook has its cells, and its kernel nothing to do."
    page.wait_for_selector(".jp-CodeCell")
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]")


def notebook(folder, *cells):
    "A notebook file with these code cells."
    import nbformat
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nb.metadata = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    path = Path(folder) / "page.ipynb"
    nbformat.write(nb, path)
    return path
