"""Pages in a real Chromium without a window, and what must hold for each."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = shutil.which("chromium")
needed = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed; bash tests/install_browser.sh")
WIDTHS = (360, 1280)
SCHEMES = ("light", "dark")

# Elements with text of their own, and the contrast of each (WCAG 2.2, 1.4.3) with what is behind it.
CONTRASTS = """() => {
  const parts = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = rgb => {
    const [r, g, b] = rgb.map(c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parts(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].filter(n => n.nodeType === 3).map(n => n.data).join('').trim();
    if (!own) continue;
    const style = getComputedStyle(element);
    const ink = parts(element.namespaceURI.endsWith('svg') ? style.fill : style.color);
    const [a, b] = [ink.slice(0, 3), ground(element).slice(0, 3)].map(luminance);
    found.push([own.slice(0, 40), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]);
  }
  return found;
}"""
# Of each figure: its size, and the size in which its smallest text appears, in CSS pixels.
FIGURES = """() => [...document.querySelectorAll('svg')].map(svg => {
  const box = svg.getBoundingClientRect();
  const scale = svg.getScreenCTM().a;
  const sizes = [...svg.querySelectorAll('text')].map(text => parseFloat(getComputedStyle(text).fontSize) * scale);
  return [box.width, box.height, Math.min(...sizes), svg.getAttribute('role'), svg.getAttribute('aria-label')];
})"""
REFERENCES = """() => ({
  ids: [...document.querySelectorAll('[id]')].map(e => e.id),
  used: [...document.querySelectorAll('use')].map(e => e.href.baseVal.slice(1)),
})"""


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, file: Path, width: int = 1280, scheme: str = "light") -> Iterator[Page]:
    """The page; in the end, that it said nothing in the console and asked for nothing but itself."""
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    yield page
    assert (said, asked) == ([], [file.as_uri()])
    page.close()


def check_page(browser: Browser, file: Path, figures: int) -> None:
    """What a page must be on a phone and on a screen, light and dark."""
    for width, scheme in ((width, scheme) for width in WIDTHS for scheme in SCHEMES):
        with opened(browser, file, width, scheme) as page:
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            contrasts = page.evaluate(CONTRASTS)
            assert len(contrasts) > 100 and [one for one in contrasts if one[1] < 4.5] == []
            shown = page.evaluate(FIGURES)
            assert len(shown) == figures
            for wide, high, text, role, label in shown:
                assert wide > 250 and high > 150 and text >= 10 and role == "img" and label
            for box in page.locator(".box").all():
                assert box.bounding_box()["width"] <= width and box.get_attribute("tabindex") == "0"
    with opened(browser, file) as page:
        assert page.evaluate("document.documentElement.lang") == "en"
        assert page.title() == page.locator("h1").inner_text()
        levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map(h => Number(h.localName[1]))")
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
        assert page.locator("table").count() == page.locator(".box > table").count() > 0
        assert page.locator("script").count() == 0
        found = page.evaluate(REFERENCES)
        assert len(found["ids"]) == len(set(found["ids"])) and set(found["used"]) <= set(found["ids"])
