"""The panel as its user meets it: in a real Chromium, under Voilà and in JupyterLab; screenshots in test-artefacts/."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest

from memoir import weights

playwright = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[dev]' brings playwright")
expect = playwright.expect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "panel.ipynb"
ARTEFACTS = ROOT / "test-artefacts"
START_MS = 180_000  # a kernel imports torch and transformers before the panel is there

PROMPT, REPHRASE = "What is the capital of Australia?", "Which city is Australia's capital?"
WRONG, RIGHT = "Sydney", "Canberra"
CITIES = dict(Australia=RIGHT, France="Lyon", Italy="Turin", Norway="Bergen", Austria="Graz", Switzerland="Basel")
CITIES |= dict(Portugal="Porto", Belgium="Gent", Sweden="Malmo", Ireland="Cork")
HOSTILE = "<img src=x onerror=window.broken=1> & <b>bold</b>?"  # shown as it is written
UNRELATED, SYMBOL = "What is the chemical symbol of gold?", "Au"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.xdist_group("browser"),  # one process: they share a server, and each page wants a core
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is missing: apt-get install -y chromium"),
]


# Servers and pages ---------------------------------------------------------------------------------------------------


def serve(command: list[str], folder: Path, ready: str, logs: Path | None = None, **environment: str):
    """Start a server on `folder`, with a free port for {port}; yields its address once `ready` answers, and stops it
    behind."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "BROWSER": "true", **environment}
    command = [part.replace("{port}", str(port)) for part in command]
    log = (logs or folder) / "server.log"
    with log.open("w") as out:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        deadline = time.monotonic() + START_MS / 1000
        while True:
            try:
                urllib.request.urlopen(address + ready, timeout=5).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):  # it ended by itself
            os.killpg(server.pid, signal.SIGTERM)  # make's own processes, too
        server.wait(30)


def serve_voila(folder: Path, model: str = "almanac"):
    put_notebook(folder, model)
    shutil.copy(NOTEBOOK.with_name("voila.json"), folder)
    command = [sys.executable, "-m", "voila", "panel.ipynb", "--no-browser", "--port={port}"]
    yield from serve(command, folder, "/voila/static/require.min.js")


def put_notebook(folder: Path, model: str) -> None:
    """The panel's notebook with its model."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    cell.source = cell.source.replace('MODEL = "almanac"', f'MODEL = "{model}"')
    nbformat.write(notebook, folder / "panel.ipynb")


@pytest.fixture(scope="module")
def voila(tmp_path_factory):
    yield from serve_voila(tmp_path_factory.mktemp("voila"))


def serve_lab(folder: Path, settings: Path, model: str = "almanac"):
    put_notebook(folder, model)
    quiet = settings / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text(json.dumps({"checkForUpdates": False, "fetchNews": "false", "doNotDisturbMode": True}))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port={port}"]
    command += ["--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True"]
    yield from serve(command, folder, "/api", JUPYTERLAB_SETTINGS_DIR=str(settings))


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    yield from serve_lab(tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("settings"))


@pytest.fixture(scope="module")
def chromium():
    expect.set_options(timeout=30_000)  # what is held against a clock says so itself
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield browser
        browser.close()


def page_of(chromium, address: str, width: int = 1280, height: int = 1300):
    page = chromium.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(30_000)
    page.goto(address, timeout=START_MS)
    return page


def ready(page):
    expect(page.get_by_text(re.compile("is open with MEMOIR"))).to_be_visible(timeout=START_MS)
    return page


@pytest.fixture(scope="module")
def voila_page(chromium, voila):
    page = ready(page_of(chromium, voila))
    yield page
    page.close()


@pytest.fixture
def panel(voila_page):
    """The page under Voilà as it comes: every field empty, no edit made."""
    voila_page.set_viewport_size(dict(width=1280, height=1300))
    if not field(voila_page, "Prompt").is_visible():
        button(voila_page, "One").click()
    for name in ("Prompt", "New answer", "Question"):
        field(voila_page, name).fill("")
    if not field(voila_page, "Model").is_visible():
        button(voila_page, "Change").click()
    field(voila_page, "Almanac edits to start with").fill("0")
    field(voila_page, "Settings of the method, one a line").fill("")
    voila_page.locator(".mm-drawer").get_by_label("τ", exact=True).fill("")
    for _ in range(2):  # the second time, what is not saved is dropped
        button(voila_page, "Apply").click()
        expect(voila_page.locator(".mm-busy")).to_have_count(0)
        if chip(voila_page, "Edits") == "0" and not voila_page.locator(".mm-badge").count():
            break
    close_drawer(voila_page)
    expect(voila_page.locator(".mm-chips")).to_contain_text("Edits 0")
    expect(voila_page.locator(".mm-badge")).to_have_count(0)
    return voila_page


def close_drawer(page) -> None:
    button(page, "Close").click()
    expect(field(page, "Model")).to_be_hidden()  # else the next test takes the closing drawer for an open one


def shoot(page, name: str) -> None:
    ARTEFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTEFACTS / f"{name}.png")


def button(page, name: str):
    return page.locator(".mm-panel").get_by_role("button", name=name, exact=True)


def field(page, label: str):
    return page.locator(".mm-panel").get_by_label(label, exact=True)


def chip(page, name: str) -> str:
    """What a chip of the header says behind its name."""
    return page.locator(".mm-chip", has_text=re.compile(f"^{name}")).locator("b").inner_text()


def answers(page):
    """The answer before and the answer after."""
    return [page.get_by_role("region", name=name, exact=True).locator(".mm-answer") for name in ("Before", "After")]


def alert(page):
    return page.locator(".mm-panel").get_by_role("alert")


def seconds_until(page, action, selector: str) -> float:
    """From a click or a key to the frame that shows what it brings; `expect` would look every half second."""
    began = time.perf_counter()
    action()
    visible = "selector => document.querySelector(selector)?.checkVisibility()"
    page.wait_for_function(visible, arg=selector, timeout=240_000)
    return time.perf_counter() - began


def ask(page, question: str, *expected: str) -> float:
    """Ask with Enter, and expect the answer before and the one after; returns the seconds until the latter is there."""
    field(page, "Question").fill(question)
    page.evaluate("() => document.querySelector('.mm-asked').classList.add('old')")
    took = seconds_until(page, lambda: field(page, "Question").press("Enter"), ".mm-asked:not(.old)")
    expect(page.locator(".mm-asked")).to_have_text(question)
    idle(page)
    for answer, text in zip(answers(page), expected, strict=False):
        expect(answer).to_have_text(text)
    return took


def write(page, prompt: str = PROMPT, target: str = RIGHT) -> float:
    for label, text in (("Prompt", prompt), ("New answer", target)):
        field(page, label).fill(text)
    page.evaluate("() => document.querySelectorAll('.mm-outcomes *').forEach(e => e.classList.add('old'))")
    return seconds_until(page, button(page, "Edit").click, ".mm-outcomes [role]:not(.old)")


def idle(page) -> None:
    expect(page.locator(".mm-busy")).to_have_count(0, timeout=60_000)


# The story -----------------------------------------------------------------------------------------------------------


def story(page, name: str) -> None:
    ask(page, HOSTILE)
    assert page.evaluate("() => [window.broken, document.querySelectorAll('.mm-panel img').length]") == [None, 0]
    asked = [ask(page, REPHRASE, WRONG, WRONG)]
    shoot(page, f"{name}-1-before")
    # A bad input first: it says so, and changes nothing.
    field(page, "Prompt").fill(PROMPT)
    button(page, "Edit").click()
    expect(alert(page)).to_have_text("new answer is empty, expected text")
    shoot(page, f"{name}-2-bad-input")

    edited = [write(page)]
    expect(page.get_by_text(f"Learned: answers {RIGHT}")).to_be_visible()
    expect(alert(page)).to_have_count(0)
    expect(page.locator(".mm-edited")).to_contain_text("Unrelated: unchanged")
    idle(page)
    expect(field(page, "Prompt")).to_have_value("")
    expect(field(page, "Question")).to_have_value(PROMPT)
    asked.append(ask(page, REPHRASE, WRONG, RIGHT))
    expect(page.locator(".mm-answer mark").nth(1)).to_have_text(RIGHT)
    expect(page.locator(".mm-met")).to_have_text(f"{PROMPT} → {RIGHT}")
    expect(page.get_by_text("the edit answers")).to_be_visible()
    meter = page.get_by_role("meter")
    overlap = float(meter.get_attribute("aria-valuenow"))
    assert overlap >= float(re.search(r"threshold ([\d.]+)", meter.get_attribute("aria-label"))[1])
    shoot(page, f"{name}-3-edited")

    asked.append(ask(page, UNRELATED, SYMBOL, SYMBOL))
    expect(page.get_by_text("the model answers by itself")).to_be_visible()
    expect(page.locator(".mm-badge")).to_have_text("unchanged")
    shoot(page, f"{name}-4-unrelated")

    page.get_by_title(f"Forget: {PROMPT}").click()
    expect(page.get_by_text(f"Forgot “{PROMPT}” → “{RIGHT}”.")).to_be_visible()
    idle(page)
    expect(page.locator(".mm-badge")).to_have_count(0)
    asked.append(ask(page, REPHRASE, WRONG, WRONG))
    expect(page.locator(".mm-count")).to_have_text("None yet")
    page.locator(".mm-at-edits").get_by_role("button", name="Undo").click()
    expect(page.locator(".mm-count")).to_have_text("1–1 of 1")
    idle(page)
    asked.append(ask(page, REPHRASE, WRONG, RIGHT))
    shoot(page, f"{name}-5-undone")

    assert "Traceback" not in page.inner_text("body")
    say_seconds(name, edited, asked)


def say_seconds(name: str, edited: list[float], asked: list[float]) -> None:
    """From click to answer, for who reads along (pytest -s); no test holds them, since machines differ."""
    for action, seconds in {"edit": edited, "question": asked}.items():
        print(f"{name}: {action} " + ", ".join(f"{each:.2f}" for each in seconds) + " s")


def test_the_story_under_voila(panel):
    story(panel, "voila")


def run_all(page) -> None:
    """Run the notebook once its kernel is up; JupyterLab may drop an order given just then, so it is given again."""
    expect(page.locator(".jp-Toolbar-kernelName")).to_have_text(re.compile("Python 3"), timeout=START_MS)
    page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for(timeout=START_MS)
    for _ in range(6):
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        with contextlib.suppress(AssertionError):
            expect(page.locator(".jp-CodeCell .jp-InputPrompt").first).not_to_have_text("[ ]:", timeout=10_000)
            return


def test_the_story_in_jupyterlab(chromium, lab):
    page = lab_page(chromium, lab)
    story(page, "lab")
    page.close()


def lab_page(chromium, lab: str):
    """The notebook, run; its panel in view."""
    page = page_of(chromium, f"{lab}/lab/tree/panel.ipynb", height=1600)
    run_all(page)
    ready(page).locator(".mm-panel").scroll_into_view_if_needed()
    return page


# What a tool owes its user --------------------------------------------------------------------------------------------


def test_cancel_ends_a_batch_and_the_page_stays_alive(panel):
    button(panel, "Change").click()
    field(panel, "Almanac edits to start with").fill("1000")
    button(panel, "Apply").click()
    expect(panel.get_by_text(re.compile(r"\d+ of 1000 edits"))).to_be_visible()
    panel.wait_for_function("() => Number(document.querySelector('.mm-line progress')?.value) >= 2", timeout=60_000)
    shoot(panel, "voila-batch")
    cancelled = panel.get_by_text(re.compile(r"Cancelled after \d+ of 1000 edits; those are kept\."))
    panel.locator(".mm-top").get_by_role("button", name="Cancel").click()
    expect(cancelled).to_be_visible()
    made = re.search(r"after (\d+)", cancelled.inner_text())[1]
    assert chip(panel, "Edits") == made
    ask(panel, UNRELATED, SYMBOL, SYMBOL)


def test_unsaved_edits_ask_before_the_page_is_left_and_a_reload_leaves_one_kernel(chromium, voila):
    page = ready(page_of(chromium, voila))
    kernel = kernel_of(page)
    write(page)
    idle(page)
    asked = []

    def stay_once(dialog) -> None:
        asked.append(dialog.type)
        dialog.dismiss() if len(asked) == 1 else dialog.accept()

    page.on("dialog", stay_once)
    page.evaluate("() => setTimeout(() => location.reload(), 0)")
    page.wait_for_timeout(2000)
    assert asked == ["beforeunload"]
    ask(page, REPHRASE, WRONG, RIGHT)  # who stays keeps the kernel
    page.evaluate("() => setTimeout(() => location.reload(), 0)")
    expect(page.locator(".mm-chips")).to_contain_text("Edits 0", timeout=START_MS)
    assert asked == ["beforeunload"] * 2
    assert kernel_of(page) != kernel
    wait_for_the_end(page, f"{voila}/api/kernels/{kernel}")
    # Without unsaved edits nobody is asked, and the kernel ends all the same.
    kernel = kernel_of(page)
    page.goto("about:blank")
    assert len(asked) == 2
    wait_for_the_end(page, f"{voila}/api/kernels/{kernel}")
    page.close()


def kernel_of(page) -> str:
    return json.loads(page.locator("#jupyter-config-data").text_content())["kernelId"]


def wait_for_the_end(page, kernel: str) -> None:
    """Wait until the server knows no such kernel any more."""
    for _ in range(150):
        try:
            urllib.request.urlopen(kernel, timeout=5).close()
            page.wait_for_timeout(200)
        except urllib.error.HTTPError as error:
            assert error.code == 404
            return
    pytest.fail("the kernel outlives its page")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is missing")
def test_make_panel_serves_the_almanac_and_a_page_that_is_left_ends_its_kernel(chromium, tmp_path):
    """The Makefile's own command, with the environment that runs this test in place of .venv."""
    command = ["make", "-o", ".venv/.installed", "panel", f"BIN={Path(sys.executable).parent}"]
    command += [f"OUT={tmp_path / 'out'}", "PORT={port}", "FLAGS="]  # those of `make test` are pytest's
    server = serve(command, ROOT, "/voila/static/require.min.js", logs=tmp_path)
    address = next(server)
    page = ready(page_of(chromium, address))
    assert chip(page, "Model") == "almanac"
    kernel = kernel_of(page)
    urllib.request.urlopen(f"{address}/api/kernels/{kernel}", timeout=5).close()
    page.goto("about:blank")
    wait_for_the_end(page, f"{address}/api/kernels/{kernel}")
    page.close()
    server.close()


def test_ten_edits_come_from_a_csv_and_tau_decides_which_questions_read_them(panel, tmp_path):
    path = tmp_path / "edits.csv"
    rows = [f"What is the capital of {land}?,{city}" for land, city in CITIES.items()]
    path.write_text("\n".join(["prompt,target", *rows]))
    button(panel, "Paste or upload").click()
    with panel.expect_file_chooser() as chooser:
        panel.get_by_role("button", name=re.compile("Upload")).click()
    chooser.value.set_files(path)
    expect(field(panel, "Edits, one a line")).to_have_value(re.compile("Canberra"))
    shoot(panel, "voila-upload")
    button(panel, "Edit").click()
    expect(panel.locator(".mm-edited b").first).to_have_text(re.compile(r"Learned \d+ of 10"), timeout=120_000)
    idle(panel)
    assert chip(panel, "Edits") == "10"
    for question in (REPHRASE, UNRELATED):
        ask(panel, question)
    idle(panel)
    slider, fired = panel.locator(".mm-tau .noUi-handle"), panel.locator(".mm-dot.mm-fired")
    counts = {}
    for share, tau in ((0.02, r"τ 0\.0"), (0.98, r"τ (0\.9|1\.0)")):
        box, track = slider.bounding_box(), panel.locator(".mm-tau .noUi-target").bounding_box()
        panel.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        panel.mouse.down()
        panel.mouse.move(track["x"] + share * track["width"], box["y"] + box["height"] / 2, steps=4)
        panel.mouse.up()
        expect(panel.locator(".mm-hand")).to_have_text(re.compile(f"{tau}.*, set by hand"))
        idle(panel)
        counts[share] = fired.count()
        shoot(panel, f"voila-tau-{share}")
    assert counts[0.02] == panel.locator(".mm-dot").count() >= 2 and counts[0.98] == 0
    expect(panel.get_by_text("the model answers by itself")).to_be_visible()


def test_nothing_moves_while_it_works(panel):
    places = "[...document.querySelectorAll('.mm-card, .mm-panel button')].map(e => e.getBoundingClientRect())"
    boxes = f"() => {places}.map(place => JSON.stringify(place))"
    field(panel, "Question").fill(UNRELATED)
    field(panel, "Question").press("Tab")
    before = panel.evaluate(boxes)
    seen = panel.evaluate(
        f"""async () => {{
            const seen = [], boxes = {boxes};
            const watch = new MutationObserver(() => seen.push(boxes()));
            watch.observe(document.querySelector('.mm-panel'), {{subtree: true, childList: true, attributes: true}});
            [...document.querySelectorAll('.mm-panel button')].find(b => b.textContent === 'Ask').click();
            for (let i = 0; i < 1500 && !document.querySelector('.mm-badge'); i++)
                await new Promise(r => setTimeout(r, 20));
            watch.disconnect();
            return [...seen, boxes()];
        }}"""
    )
    assert len(seen) > 2
    assert all(boxes == before for boxes in seen)


def test_the_keyboard_goes_through_it_in_order(panel):
    field(panel, "Prompt").focus()
    order = []
    for _ in range(8):
        order.append(panel.evaluate("() => (e => e.labels?.[0]?.textContent || e.textContent)(document.activeElement)"))
        panel.keyboard.press("Tab")
    assert order == ["Prompt", "New answer", "Edit", "More", "Canberra?", "Paris?", "Question", "Ask"]


def test_typed_at_once_and_entered_at_once_is_asked_whole(panel):
    field(panel, "Question").focus()
    for question in (UNRELATED, REPHRASE, UNRELATED, PROMPT):
        panel.keyboard.press("Control+A")
        panel.keyboard.type(question)
        panel.keyboard.press("Enter")
        expect(panel.locator(".mm-asked")).to_have_text(question)
        expect(panel.locator(".mm-busy")).to_have_count(0)
    expect(field(panel, "Question")).to_be_focused()
    # The same question again takes no text along, and is asked all the same.
    panel.evaluate("() => document.querySelectorAll('.mm-line [role]').forEach(e => e.classList.add('old'))")
    panel.keyboard.press("Enter")
    expect(panel.locator(".mm-line [role]:not(.old)", has_text="Answered in")).to_be_visible()


def test_every_control_has_a_name(panel):
    nameless = panel.evaluate(
        """() => [...document.querySelectorAll('.mm-panel :is(input, select, button)')]
            .filter(e => !(e.labels?.[0]?.textContent || e.textContent).trim()).map(e => e.outerHTML)"""
    )
    assert nameless == []


WIDTHS = {1280: 800, 480: 1500}


def test_it_fits_and_is_readable_in_the_light(panel):
    write(panel)
    idle(panel)
    for width in WIDTHS:
        check_looks(panel, width, "light")


def test_the_first_edit_is_seen_without_scrolling(panel):
    panel.set_viewport_size(dict(width=1280, height=800))
    write(panel)
    idle(panel)
    row = panel.locator(".mm-row:visible").first.bounding_box()
    assert panel.evaluate("() => scrollY") == 0 and row["y"] + row["height"] <= 800
    header = [panel.locator(name).first.bounding_box() for name in (".mm-brand", ".mm-header button:visible >> nth=-1")]
    middles = [place["y"] + place["height"] / 2 for place in header]
    assert abs(middles[0] - middles[1]) < 12, "the header is one row"


def test_it_fits_and_is_readable_in_the_dark(chromium, voila):
    page = ready(page_of(chromium, f"{voila}?theme=dark"))
    write(page)
    idle(page)
    button(page, "Change").click()
    for width in WIDTHS:
        check_looks(page, width, "dark")
    page.close()


def check_looks(page, width: int, theme: str) -> None:
    page.set_viewport_size(dict(width=width, height=WIDTHS[width]))
    page.wait_for_timeout(300)
    shoot(page, f"voila-{width}-{theme}")
    too_wide = page.evaluate(
        """() => [...document.querySelectorAll('html, .mm-panel, .mm-card, .mm-bar, .mm-row, .mm-side, .mm-columns')]
            .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.className)"""
    )
    assert too_wide == []
    assert page.evaluate(FAINT) == []


# Texts whose contrast with what lies behind them is below 4.5 (WCAG 2, level AA); disabled controls are exempt there.
FAINT = """() => {
    const paint = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const rgba = colour => {
        paint.clearRect(0, 0, 1, 1); paint.fillStyle = colour; paint.fillRect(0, 0, 1, 1);
        return [...paint.getImageData(0, 0, 1, 1).data];
    };
    const light = c => c.slice(0, 3).map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = e => {
        for (; e; e = e.parentElement) {
            const colour = rgba(getComputedStyle(e).backgroundColor);
            if (colour[3] === 255) return colour;
        }
        return [255, 255, 255];
    };
    const faint = [];
    for (const e of document.querySelectorAll('.mm-panel *')) {
        const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
        if (!own || e.disabled || e.closest('style') || getComputedStyle(e).visibility === 'hidden') continue;
        const fore = rgba(getComputedStyle(e).color), back = behind(e), share = fore[3] / 255;
        const seen = fore.slice(0, 3).map((v, i) => share * v + (1 - share) * back[i]);
        const [a, b] = [light(seen), light(back)].sort((x, y) => y - x);
        const contrast = (a + 0.05) / (b + 0.05);
        if (contrast < 4.5) faint.push(`${e.className} ${e.textContent.slice(0, 40)}: ${contrast}`);
    }
    return faint;
}"""


# A real model ---------------------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.skipif(weights.installed("smollm2") is None, reason="needs the weights of smollm2")
@pytest.mark.parametrize("place", ["voila", "lab"])
def test_a_real_model_is_calibrated_edited_and_asked(chromium, tmp_path, place):
    folders = tmp_path / "notebook", tmp_path / "settings"
    for folder in folders:
        folder.mkdir()
    server = serve_voila(folders[0], "smollm2") if place == "voila" else serve_lab(*folders, "smollm2")
    address = next(server)
    page = ready(page_of(chromium, address, height=800)) if place == "voila" else lab_page(chromium, address)
    expect(page.locator(".mm-calibrated")).to_contain_text("calibrated on this model", timeout=120_000)
    idle(page)
    prompt, rephrase = "The capital of Australia is", "The capital city of Australia is"
    for label, text in (("Prompt", prompt), ("New answer", RIGHT)):
        field(page, label).fill(text)

    def edit() -> None:
        button(page, "Edit").click()
        expect(page.locator(".mm-line progress[value]")).to_be_visible(timeout=120_000)

    edited = seconds_until(page, edit, ".mm-edited b")
    expect(page.locator(".mm-edited b").first).to_have_text(f"✓ Learned: answers {RIGHT}")
    idle(page)
    page.wait_for_timeout(1000)
    expect(page.locator(".mm-calibrated")).to_be_visible()  # the slider rounds τ, and that moves nothing
    expect(page.locator(".mm-edited")).to_contain_text("Unrelated: unchanged")
    asked = [ask(page, rephrase)]
    expect(answers(page)[1]).to_contain_text(RIGHT)
    expect(page.get_by_text("the edit answers")).to_be_visible()
    expect(page.locator(".mm-met")).to_have_text(f"{prompt} → {RIGHT}")
    shoot(page, f"smollm2-{place}")
    asked.append(ask(page, "Who wrote Hamlet?"))
    expect(page.get_by_text("the model answers by itself")).to_be_visible()
    say_seconds(f"smollm2 in {place}", [edited], asked)
    page.close()
    server.close()
