"""Opens pages in headless Chromium, and finds what would keep somebody from reading them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

#: Widths in CSS pixels, and whether it is a mobile device.
SCREENS = {"phone": (375, True), "desktop": (1280, False)}
THEMES = ("light", "dark")


@contextmanager
def open_browser() -> Iterator[Any]:
    """Yield a headless Chromium; `make system` installs it if it is missing."""
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium")
    if not driver or not chromium:
        pytest.skip("no Chromium and chromedriver here; `make system` installs them")
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    running = webdriver.Chrome(options, Service(driver))
    try:
        yield running
    finally:
        running.quit()


def show(browser: Any, page: Path, screen: str, theme: str) -> None:
    """Open a page on a screen of `SCREENS`, in the light or the dark theme."""
    width, is_mobile = SCREENS[screen]
    device = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": is_mobile}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
    media = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    browser.get(page.as_uri())


def find_faults(browser: Any, page: Path) -> list[str]:
    """Return what is wrong with a page on any screen in any theme, each fault with its place."""
    found = []
    for screen in SCREENS:
        for theme in THEMES:
            show(browser, page, screen, theme)
            faults: list[str] = browser.execute_script(_CHECK)
            faults += [line["message"] for line in browser.get_log("browser")]
            found += [f"{screen}, {theme}: {fault}" for fault in faults]
    return found


# Contrast and large text as WCAG 2.2 defines them: success criteria 1.4.3 (AA) and 1.4.11.
_CHECK = r"""
const faults = [];
const name = (e) => e.tagName.toLowerCase() + " " + (e.textContent || "").trim().slice(0, 40);
const parse = (colour) => (colour.match(/[\d.]+/g) || []).map(Number);
const luminance = (colour) => parse(colour).slice(0, 3)
  .map((c) => c / 255).map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, k) => sum + c * [0.2126, 0.7152, 0.0722][k], 0);
const contrast = (a, b) => {
  const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p);
  return (x + 0.05) / (y + 0.05);
};
const behind = (e) => {
  for (; e; e = e.parentElement) {
    const colour = getComputedStyle(e).backgroundColor, alpha = parse(colour)[3] ?? 1;
    if (alpha === 1) return colour;
  }
  return "rgb(255, 255, 255)";
};
const compare = (e, colour, least) => {
  const ratio = contrast(colour, behind(e));
  if (ratio < least) faults.push(`contrast ${ratio.toFixed(2)} of ${name(e)}`);
};

const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let node = texts.nextNode(); node; node = texts.nextNode()) {
  const e = node.parentElement;
  if (!node.textContent.trim() || e.closest("script, style, title, desc, metadata")) continue;
  if (!e.getClientRects().length) continue;
  const style = getComputedStyle(e), size = parseFloat(style.fontSize);
  const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
  compare(e, e.closest("svg") ? style.fill : style.color, large ? 3 : 4.5);
}
const grid = getComputedStyle(document.documentElement).getPropertyValue("--line").trim();
for (const e of document.querySelectorAll("figure svg path")) {
  const style = getComputedStyle(e);
  const decorates = (e.getAttribute("style") || "").includes("--line");
  if (style.stroke !== "none" && style.fill === "none" && !decorates) compare(e, style.stroke, 3);
}

const levels = [...document.querySelectorAll("h1, h2, h3, h4, h5, h6")].map((h) => {
  if (!h.textContent.trim()) faults.push("a heading is empty");
  return Number(h.tagName[1]);
});
if (levels[0] !== 1 || levels.filter((level) => level === 1).length !== 1)
  faults.push("the first heading is not the only h1");
levels.slice(1).forEach((level, k) => {
  if (level > levels[k] + 1) faults.push(`h${level} follows h${levels[k]}`);
});
if (!document.title || !document.documentElement.lang) faults.push("no title or no language");

if (document.documentElement.scrollWidth > innerWidth) faults.push("the page is too wide");
for (const e of document.body.querySelectorAll("*")) {
  if (!e.getClientRects().length || e.closest(".scroll") && !e.matches(".scroll")) continue;
  const box = e.getBoundingClientRect(), svg = e.tagName === "text" && e.closest("svg");
  if (box.right > innerWidth + 1 || box.left < -1) faults.push(`too wide: ${name(e)}`);
  const around = svg && svg.getBoundingClientRect();
  if (svg && (box.right > around.right + 1 || box.left < around.left - 1
      || box.top < around.top - 1 || box.bottom > around.bottom + 1))
    faults.push(`cut off in a figure: ${name(e)}`);
}
for (const e of document.querySelectorAll(".scroll")) {
  const label = document.getElementById(e.getAttribute("aria-labelledby"));
  if (e.tabIndex < 0 || e.getAttribute("role") !== "region" || !label)
    faults.push(`no keyboard reaches ${name(e)}`);
}
const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
if (new Set(ids).size < ids.length) faults.push("an id is there twice");
for (const e of document.querySelectorAll("svg"))
  if (e.getAttribute("role") !== "img" || e.firstElementChild?.tagName !== "title")
    faults.push("a figure has no title");
return faults;
"""
