"""The page of `cdistill report` in a real browser: alone, on a telephone, in the dark, on paper, and under attack."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdistill.workflows.inspection import report
from tests.browser import Browser, started
from tests.report_runs import change_json, evaluation, make_run, recipe, write, write_images

pytestmark = [pytest.mark.browser, pytest.mark.slow]

ATTACK = "<script>window.hit=1</script><img src=x onerror='window.hit=2'><svg onload='window.hit=3'>"

# The contrast of every text with what it stands on (WCAG 2.1), and the least of them.
CONTRAST = """
const channel = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const parse = text => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const behind = element => {
  for (let one = element; one; one = one.parentElement) {
    const colour = parse(getComputedStyle(one).backgroundColor);
    if (colour.length === 3 || colour[3] === 1) return colour;
  }
  return [255, 255, 255];
};
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || element.tagName === 'STYLE') continue;
  const style = getComputedStyle(element);
  const front = light(parse(element instanceof SVGElement ? style.fill : style.color)), back = light(behind(element));
  const ratio = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
  found.push([ratio, element.tagName, walker.currentNode.data.trim().slice(0, 30)]);
}
found.sort((a, b) => a[0] - b[0]);
return found;
"""

# The least contrast of a line of a chart with the page.
STROKES = """
const channel = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = t => { const [r, g, b] = t.match(/[\\d.]+/g).map(Number);
  return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b); };
const back = light(getComputedStyle(document.body).backgroundColor);
return [...document.querySelectorAll('.chart svg path')]
  .filter(one => /stroke: var\\(--c\\d\\)/.test(one.getAttribute('style')))
  .map(one => light(getComputedStyle(one).stroke))
  .map(front => (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05)).sort((a, b) => a - b);
"""

# What reaches beyond the right edge of the page, but for what scrolls in a box of its own.
BEYOND = """
const width = document.documentElement.clientWidth;
return [...document.querySelectorAll('body *')]
  .filter(one => one.getBoundingClientRect().right > width + 0.5 && !(arguments[0] && one.closest('.scroll')))
  .map(one => one.tagName + '.' + one.className + ': ' + one.textContent.trim().slice(0, 40));
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with started(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs with many metrics, long names and hashes, and colour images."""
    folder = tmp_path_factory.mktemp("runs")
    paths = [
        make_run(folder / "a-run-with-a-long-name-of-its-own", calls=(1, 2, 3, 5)),
        make_run(folder / "ctm", form="ctm", shift=-0.2, calls=(1, 2, 3, 5)),
    ]
    write_images(paths[0] / "samples" / "step-00000060.npz", (1, 2, 3, 5), channels=3, side=32)
    write_images(paths[1] / "samples" / "step-00000060.npz", (1, 2, 3, 5), channels=3, side=32)
    return Path(report(paths, folder / "page.html")["report"])


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run with nine metrics, whose titles are long."""
    folder = tmp_path_factory.mktemp("wide")
    path, record = make_run(folder / "wide"), evaluation()
    for one in record["rows"]:
        for kind in ("values", "errors", "intervals"):
            value = one[kind]["precision"]
            one[kind] |= {f"metric-with-a-long-name-{k}": value for k in range(7)}
    change_json(path / "evaluation.json", rows=record["rows"])
    return Path(report([path], folder / "page.html")["report"])


@pytest.fixture(params=["page", "wide"])
def each(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(autouse=True)
def _plain_screen(browser: Browser) -> None:
    browser.resize(1200, 900)
    browser.prefer("light")


def test_nothing_is_asked_for_but_the_page_and_nothing_is_complained_of(browser, each):
    browser.open(each)
    assert browser.requests() == [each.as_uri()]
    assert browser.complaints() == []
    assert browser.run("return document.compatMode") == "CSS1Compat"


def test_the_network_is_cut_off_and_requests_are_seen(browser, tmp_path):
    """The test above can fail: a page that asks for more is caught."""
    write(tmp_path / "leak.html", "<!doctype html><title>x</title><img src='http://127.0.0.1:9/x.png'>")
    browser.open(tmp_path / "leak.html")
    assert "http://127.0.0.1:9/x.png" in browser.requests()
    assert any("ERR_INTERNET_DISCONNECTED" in text for text in browser.complaints())


@pytest.mark.parametrize("width", [320, 360, 768])
def test_a_telephone_need_not_scroll_sideways(browser, each, width):
    browser.resize(width, 740, mobile=True)
    browser.open(each)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.run("return innerWidth") == width
    assert browser.run(BEYOND, True) == []


def test_a_wide_table_scrolls_in_its_own_box(browser, wide):
    browser.resize(360, 740, mobile=True)
    browser.open(wide)
    inside, box = browser.run("const b = document.querySelector('.scroll'); return [b.scrollWidth, b.clientWidth]")
    assert inside > box
    assert box <= 360
    moved = "const b = document.querySelector('.scroll'); b.scrollLeft = 100; return b.scrollLeft"
    assert browser.run(moved) == 100
    left = "return document.querySelector('.results tbody th').getBoundingClientRect().left"
    assert browser.run(left) >= 0  # the sampler's name stays


def test_texts_are_large_enough_on_a_telephone(browser, page):
    browser.resize(360, 740, mobile=True)
    browser.open(page)
    sizes = "return [...document.querySelectorAll('.chart svg')].map(s => 11 * s.getBoundingClientRect().width / 340)"
    assert min(browser.run(sizes)) >= 10


def test_every_picture_is_shown_and_described(browser, page):
    browser.open(page)
    shown = browser.run("return [...document.images].map(i => [i.naturalWidth, i.alt, i.complete])")
    assert len(shown) == 4 * 3
    assert all(width > 0 and alt and complete for width, alt, complete in shown)
    drawn = browser.run("return [...document.querySelectorAll('svg[role=img]')].map(s => s.getAttribute('aria-label'))")
    assert len(drawn) > 10
    assert all(len(text) > 20 for text in drawn)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read_in_either_scheme(browser, each, scheme):
    browser.prefer(scheme)
    browser.open(each)
    page_colour = browser.run("return getComputedStyle(document.body).backgroundColor")
    lightness = sum(map(int, re.findall(r"\d+", page_colour))) / 3
    assert lightness < 40 if scheme == "dark" else lightness > 240
    found = browser.run(CONTRAST)
    assert len(found) > 200
    assert found[0][0] >= 4.5, found[:5]
    assert browser.run(STROKES)[0] >= 3


def test_teacher_and_student_have_the_same_seed_at_the_same_place(browser, page):
    browser.open(page)
    under = """
    const parts = [...document.querySelectorAll('.comparison')];
    return parts.map(part => [...part.querySelectorAll('.images')].map(sheet => {
      sheet.scrollIntoView({block: 'center'});
      const box = sheet.querySelector('img').getBoundingClientRect();
      return [0, 1].flatMap(row => [0, 1, 2, 3, 4, 5].map(column => document.elementFromPoint(
        box.left + (column + 0.5) * box.width / 6, box.top + (row + 0.5) * box.height / 2).title || ''));
    }));
    """
    expected = [f"seed {seed}" for seed in (3, 4, 5, 6, 7, 8, 9, 20, 21, 22)] + ["", ""]
    assert browser.run(under) == [[expected] * 3] * 4
    labels = (
        "return [...document.querySelectorAll('.seeds')].map(list => [...list.children].map(one => one.textContent))"
    )
    assert browser.run(labels) == [["3", "9"]] * 12
    tops = "return [...document.querySelectorAll('.comparison')].map(part => [...part.querySelectorAll('img')]"
    tops += ".map(one => Math.round(one.getBoundingClientRect().top)))"
    assert [len(set(row)) for row in browser.run(tops)] == [1] * 4
    browser.resize(360, 740, mobile=True)
    assert [len(set(row[:2])) for row in browser.run(tops)] == [1] * 4


def test_paper_shows_everything(browser, each):
    browser.prefer("dark", "print")  # what prints is not what the screen prefers
    browser.resize(688, 1009)  # A4 less its margins, in CSS pixels
    browser.open(each)
    assert browser.run(BEYOND, False) == []
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.run(CONTRAST)[0][0] >= 4.5
    heights = (
        "return [...document.querySelectorAll('.results tbody th')].map(one => one.getBoundingClientRect().height)"
    )
    assert max(browser.run(heights)) < 60  # two lines or three: no word is broken letter by letter
    assert browser.run("return getComputedStyle(document.querySelector('nav')).display") == "none"
    pdf = browser.print_pdf()
    assert pdf.startswith(b"%PDF-")
    assert 4 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 14


def test_what_is_injected_does_nothing(browser, tmp_path):
    path = make_run(tmp_path / "<img src=x onerror='window.hit=4'>")
    write(path / "recipe.resolved.toml", f"# {ATTACK}\n{recipe('analytic')}")
    record = evaluation()
    for one in record["rows"]:
        one["sampler"] += ATTACK
        one["values"][ATTACK] = 1.0
    change_json(path / "evaluation.json", rows=record["rows"], split=ATTACK, more={ATTACK: ATTACK})
    change_json(path / "status.json", state=ATTACK)
    browser.open(Path(report([path], tmp_path / "page.html")["report"]))
    assert browser.run("return window.hit === undefined")
    assert browser.run("return document.scripts.length + document.querySelectorAll('[onerror], [onload]').length") == 0
    assert browser.requests() == [(tmp_path / "page.html").as_uri()]
    assert browser.complaints() == []
    assert ATTACK in browser.run("return document.querySelector('pre.recipe').textContent")


def test_the_policy_stops_a_script_that_gets_in_all_the_same(browser, page, tmp_path):
    text = page.read_text(encoding="utf-8")
    write(tmp_path / "page.html", text.replace("<main>", "<main><script>window.hit = 1</script>"))
    browser.open(tmp_path / "page.html")
    assert browser.run("return window.hit === undefined")
    assert any("Content Security Policy" in message for message in browser.complaints())
