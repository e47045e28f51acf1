"""The page of the report on codes: one whole file, which Chromium shows without a complaint."""

import re
from collections.abc import Iterator
from pathlib import Path

import browser
import codes
import miniature
import pytest
from browser import Tab

from vqbet_edge import EdgePolicy
from vqbet_edge.training.codes.findings import Finding, judge
from vqbet_edge.training.codes.page import render
from vqbet_edge.training.dataset import LeRobotDataset

# One worker trains the policy for all.
pytestmark = pytest.mark.xdist_group("two_ways")

IMAGES = re.compile(r'<img src="([^"]*)"')


@pytest.fixture(scope="module")
def pages(
    two_ways_run: Path, mini: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A page of every kind."""
    root = tmp_path_factory.mktemp("pages")
    noise = codes.write_random(root / "noise")
    dataset, robot = LeRobotDataset.open(noise), EdgePolicy.load(mini)
    with robot.record(root / "seen"):
        arrays = dataset.episode(1)
        for frame, state in zip(arrays[miniature.IMAGE], arrays[miniature.STATE], strict=True):
            robot.act({miniature.IMAGE: frame, miniature.STATE: state})
    trained = two_ways_run / "run/checkpoints/last/pretrained_model"
    inputs = {
        "data": (trained, two_ways_run / "data"),
        "alone": (trained, None),
        "bundle": (mini, noise),
        "recording": (mini, root / "seen"),
        "bundle_alone": (mini, None),
    }
    made = {name: root / f"{name}.html" for name in inputs}
    for name, (policy, data) in inputs.items():
        codes.report(policy, data, made[name])
    made["run"] = two_ways_run / "run/codes.html"
    # An arm's chunks are drawn over time; names of all kinds are only text.
    arm = codes.figures(codes.arm(name="<script>alert(1)</script>&\"'" + "a" * 200), None)
    made["arm"] = root / "arm.html"
    made["arm"].write_text(render(arm, judge(arm)))
    return made


KINDS = ["data", "alone", "bundle", "recording", "bundle_alone", "run", "arm"]


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with browser.chromium() as opened:
        yield opened


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_needs_nothing(pages: dict[str, Path], kind: str) -> None:
    text = pages[kind].read_text()
    assert all(found.startswith("data:image/svg+xml;base64,") for found in IMAGES.findall(text))
    plain = re.sub(r"base64,[\w+/=]+", "", text)
    assert not re.search(r"<(script|link|iframe|object)|(?:https?:)?//\w", plain)
    assert not re.search(r"\b(nan|inf|None)\b", plain)


@pytest.mark.extended
@pytest.mark.parametrize("kind", KINDS)
def test_chromium_shows_it_at_any_width(pages: dict[str, Path], tab: Tab, kind: str) -> None:
    for width in (320, 1280):
        tab.requests.clear()
        tab.complaints.clear()
        tab.open(pages[kind], width)
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        widths = tab.evaluate("[...document.images].map(i => i.complete && i.naturalWidth)")
        assert len(widths) == len(IMAGES.findall(pages[kind].read_text())) > 0
        assert all(widths)
        smallest = "Math.min(...[...document.querySelectorAll('p,td,th,figcaption,.finding')]"
        smallest += ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
        assert tab.evaluate(smallest) >= 12
        assert tab.requests == [pages[kind].resolve().as_uri()]
        assert tab.complaints == []


@pytest.mark.extended
def test_what_is_wrong_with_a_page_is_seen(tab: Tab, tmp_path: Path) -> None:
    """The browser would tell."""
    page = tmp_path / "bad.html"
    page.write_text(
        '<!DOCTYPE html><body style="width: 900px"><img src="missing.png">'
        "<script>console.error('oh'); nothing()</script>"
    )
    tab.complaints.clear()
    tab.requests.clear()
    tab.open(page, 390)
    assert tab.evaluate("document.documentElement.scrollWidth") > 390
    assert any("missing.png" in url for url in tab.requests)
    assert len(tab.complaints) >= 2


def test_a_finding_is_text(pages: dict[str, Path]) -> None:
    assert "<script>" not in pages["arm"].read_text()
    report = codes.figures(codes.attentive(), None)
    page = render(report, [Finding("any", "problem", "a < b", "<b>change</b>")])
    assert "a &lt; b" in page
    assert "<b>" not in page
